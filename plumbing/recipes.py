"""
What --data names -> its files and records: a path, a URL, shards, or a public set by its short name
(assets/recipes.json). Called by `load_data` in data.py. A reader of the lessons need know only `read_records`.
"""
import glob
import hashlib
import json
import os
import random
import re
import tarfile
import zipfile
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch

from plumbing.files import new_file, read_json, require, say
from plumbing.folders import parquets_of
from plumbing.formats import read_file, read_json_rows
from plumbing.hub import ANY, Repository, fetch, folders, missing_files
from plumbing.mural import murals
from plumbing.pictures import read_member
from plumbing.records import Records
from plumbing.scoring import benchmark_row

RECIPES = read_json(Path(__file__).parents[1] / "assets" / "recipes.json")


def fetch_file(url: str) -> str:
    "A file on any web server -> its path in the cache."
    place, mark, query = url.partition("?")
    parent, _, name = place.rpartition("/")
    # Another query may mean another file, so each has a folder of its own, whose name does not give a signature away.
    revision = hashlib.sha1(query.encode()).hexdigest()[:12] if query else ""
    return str(fetch(Repository(parent, revision, {name: ANY}, "see the server",
                                                query=mark + query)) / name)


def fetch_recipe(name: str) -> tuple[list[str], dict]:
    "As locate, for a recipe."
    recipe = RECIPES[name]
    repository = Repository(recipe["hub"], recipe["revision"],
                                    {file: tuple(known) for file, known in recipe["files"].items()}, recipe["licence"],
                                    mirror=recipe.get("mirror", ""))
    if missing_files(repository, folders(repository)[0]):
        say(f"{name}: {recipe['about']}; licence: {recipe['licence']}. Ahead of time: python data.py --download={name}")
    folder = fetch(repository)
    paths = [str(folder / file) for file in repository.files if "rows" in recipe or not file.endswith(".zip")]
    if "rows" in recipe:  # laid out as we read it, once
        listing = folder / f"{name}.jsonl"
        if not listing.exists():
            with new_file(listing, "w") as file:
                file.writelines(json.dumps(benchmark_row(*row)) + "\n" for row in recipe_rows(recipe["rows"], paths[0]))
        paths = [str(listing)]
    return paths, {start: str(Path(fetch_file(place)).parent) if place.endswith(".zip") else place
                   for start, place in recipe.get("images", {}).items()}


def locate(name: str) -> tuple[list[str], dict]:
    """
    A path, URL or recipe, each with an optional share (gsm8k@0.1) -> (its files on this disk, where pictures are that
    do not lie beside them: {the beginning of their names: a folder or a URL}). What is missing is fetched.
    """
    name = os.path.expanduser(re.sub(r"@0?\.\d+$", "", name))
    require(name != "world", "world: it is no file and has no end; as a part of a mixture give it a weight, world:0.1; "
                             "bench.py --what=eval takes it alone")
    if name in RECIPES:
        return fetch_recipe(name)
    names = [name]
    if shards := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name):  # name-{000..127}.tar
        start, first, last, end = shards.groups()
        names = [f"{start}{number:0{len(first)}}{end}" for number in range(int(first), int(last) + 1)]
        require(names, f"{name}: the second number is below the first")
    elif re.search(r"[*?[]", name) and "://" not in name and not os.path.exists(name):
        names = sorted(glob.glob(name, recursive=True))
        require(names, f"{name}: no file has such a name")
    elif os.path.isdir(name):
        names = parquets_of(name) or [name]
    return [fetch_file(one) if one.startswith(("http://", "https://")) else one for one in names], {}


def recipe_rows(layout: str, path: str):
    "A file with a layout of its own -> for each question its id, picture, words, right answer (and choices)."
    if layout == "tallyqa":
        #  {"answer": 2, "image": "VG_100K_2/2410408.jpg", "question": "How many people?", "question_id": 30096646, ...}
        for row in json.loads(read_member(path, "train.json")):
            yield row["question_id"], row["image"], row["question"], str(row["answer"])
    elif layout == "aokvqa":
        #  {"image_id": 299207, "question": "...", "choices": ["nine", "two", ...], "correct_choice_idx": 1, ...}
        with tarfile.open(path) as tar:
            rows = json.load(tar.extractfile(next(m for m in tar if m.name.endswith("aokvqa_v1p0_train.json"))))
        for row in rows:
            yield (row["question_id"], f"{row['image_id']:012}.jpg", row["question"],
                   ascii_uppercase[row["correct_choice_idx"]], dict(zip(ascii_uppercase, row["choices"])))
    elif layout == "clevr":
        #  {"scenes": [{"image_filename": "CLEVR_train_000000.png", "objects": [{"color": "cyan", ...}, ...]}, ...]}
        with zipfile.ZipFile(path) as file:
            scenes = json.load(file.open("CLEVR_v1.0/scenes/CLEVR_train_scenes.json"))["scenes"]
        for scene in scenes:
            yield (scene["image_filename"], f"images/train/{scene['image_filename']}",
                   "How many items are there in the image?", str(len(scene["objects"])))
    elif layout == "gsm8k":
        #  {"question": "...", "answer": "48 / 2 = 24, 48 + 24 = 72\n#### 72"}; only the number can be checked
        for number, (_, _, row) in enumerate(read_json_rows(path)):
            yield number, None, row["question"], row["answer"].rpartition("#### ")[2].replace(",", "")


def read_records(name, max_bad: float = 0.0) -> Records:
    """
    A file, folder, URL, recipe, or name-{000..127}.tar -> its records. Rows that are no records are left out and named,
    if they are at most the share max_bad of all; else the first of them is an error.
    """
    if re.fullmatch(r"mural(@0?\.\d+)?", str(name)):
        parts = [murals()]
    else:
        paths, places = locate(str(name))
        parts = [read_file(path, places) for path in paths]
    records, bad = parts[0], [line for part in parts for line in part.bad]
    if len(parts) > 1:  # shards, as one sequence
        joined = torch.utils.data.ConcatDataset(parts)
        records = Records(joined.__getitem__, np.arange(len(joined))[:, None], np.concatenate([p.keys for p in parts]),
                          np.concatenate([p.counts for p in parts]), bad)
    require(len(bad) <= max_bad * (len(bad) + len(records)), bad and bad[0] + (
        f" (and {len(bad) - 1} more; python data.py --data={name} names all)" if len(bad) > 1 else ""))
    for line in bad[:5]:
        say(f"skipped: {line}")
    say(f"skipped: {len(bad) - 5} more; python data.py --check --data={name} writes all to a file") if bad[5:] else None
    require(len(records), f"{name}: " + (f"all of its {len(bad)} records are bad; they are named above" if bad else
                                         "the file is empty; was its download cut off?"))
    if share := re.search(r"@(0?\.\d+)$", str(name)):  # the same records every time
        chosen = random.Random("share").sample(range(len(records)), max(1, round(float(share[1]) * len(records))))
        records = records.select(np.isin(np.arange(len(records)), chosen))
    return records
