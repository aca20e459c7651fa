"""
What lies in a folder of pictures -> rows: a sub-folder for each kind, or a caption beside each picture; or why it is
neither, and the command that would be right. Called by formats.py, recipes.py and data.py. A reader of the lessons
need not know it.
"""
import glob
import os
import re
from pathlib import Path

from plumbing.files import attempt, named_errors, require
from plumbing.pictures import MEDIA, PICTURES, UNREAD
from plumbing.records import CLASS_PROMPT

LISTINGS = "metadata.jsonl", "metadata.csv", "metadata.parquet"  # of a folder's pictures; the first that is there

SPLIT = re.compile(r"(train|val|test|dev|eval|valid|trainval)(ing|idation)?[ _-]?(set|\d*)")  # Train2017, validation

OTHERS = {  # what people also give: the end of a name -> what to do
    ".arrow": "of save_to_disk; write it anew by datasets.load_from_disk(FOLDER).to_parquet('x.parquet')",
    ".zip": "an archive; unpack it, and give the file of records (a .zip of pictures may stay beside that)",
    (".gz", ".tgz"): "compressed; unpack it: gunzip, or tar -xf",
    (".bz2", ".xz", ".zst", ".7z", ".rar"): "compressed; unpack it", (".xls", ".xlsx"): "a table; save it as .csv",
    ".xml": "no records; write them as .jsonl", ".txt": "a text; conversations are .json or .jsonl"}


def what_is_there(names: list) -> str:
    return next((f"; {os.path.basename(name)} is {what}" for end, what in OTHERS.items() for name in names
                 if name.lower().endswith(end)), "")


def give(paths: list) -> str:
    "The flags that give the first of them to training, and the second to be held out; that of training comes first."
    paths = sorted(paths, key=lambda path: not os.path.basename(path).lower().startswith("train"))
    return "; give " + " ".join(f"{flag}='{path}'" if "*" in path else f"{flag}={path}"
                                for flag, path in zip(("--data", "--val"), paths))


def look_into(path: str) -> tuple[list, list, dict]:
    "-> (the files of a folder, at any depth; the pictures among them; {a picture: the .txt beside it})."
    # glob passes over hidden ones, no pictures of the user's: .ipynb_checkpoints/7.jpg, or cat/._7.jpg, macOS's
    # companion of 7.jpg
    names = sorted((name.replace(os.sep, "/") for name in glob.glob("**", root_dir=path, recursive=True)),
                   key=lambda name: name.split("/"))
    texts = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
    pictures = [name for name in names if name.lower().endswith(PICTURES + UNREAD + MEDIA)]
    return names, pictures, {name: texts[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in texts}


def holds_pictures(path: str) -> bool:
    "Is it a folder of records, not of texts? A cover.jpg among the texts does not make it one."
    names, pictures, captions = look_into(path)
    return bool(captions) or any("/" in name for name in pictures) or any(
        name in LISTINGS or name.lower().endswith(".parquet") for name in names)


def read_folder(path: str):
    """A folder of pictures with one sub-folder for each kind, or with a caption beside each."""
    #   cat/7.jpg        "What is this?" -> cat
    #   7.jpg, 7.txt     "Describe the image." -> what the text says
    names, pictures, captions = look_into(path)
    flat = any("/" not in name for name in captions)
    problem = "" if flat else not_kinds(path, names, pictures, captions)
    require(not problem, f"{path}: {problem}")

    def row_of(name: str) -> dict:
        kind, depth, moves = name.split("/")[0], name.count("/"), name.lower().endswith(UNREAD + MEDIA)
        require(not moves, "files of this kind are not read; convert it to .jpg, or remove it")
        require(depth < 2 - flat, f"lies too deep; move it up to {'' if flat else kind + '/'}")
        if flat:
            require(name in captions, f"no {os.path.splitext(name)[0]}.txt with its caption lies beside it")
            text = Path(path, captions[name])
            with named_errors(text):
                return {"id": name, "image": name, "caption": text.read_text(encoding="utf-8-sig").strip()}
        require(depth, "lies beside the folders of kinds; move it into one of them, or away")
        return {"id": name, "image": name, "question": CLASS_PROMPT, "answer": kind, "metric": "exact"}
    for name in pictures:
        row = attempt(row_of, name)
        yield 0, 0, ValueError(f"{name}: {row}") if isinstance(row, ValueError) else row
    for name in sorted({name for name in names if flat and name.lower().endswith(".txt")} - {*captions.values()}):
        yield 0, 0, ValueError(f"{name}: no picture lies beside this caption; move it away")


def not_kinds(path: str, names: list, pictures: list, captions: dict) -> str:
    "Why the sub-folders are not one for each kind, and the command that would be right; else empty."
    kinds = list(dict.fromkeys(name.split("/")[0] for name in pictures if "/" in name))
    others = {os.path.splitext(name)[0] for name in pictures} | {"state", "dataset_info", "dataset_dict"}
    shards = {}  # files of records: {"train-*.tar": ["train-000.tar", "train-001.tar"]}
    for name in names:
        stem, end = os.path.splitext(name)
        if end.lower() in (".json", ".jsonl", ".csv", ".tsv", ".tar", ".parquet") and stem not in others:
            shards.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    files = [some[0] if len(some) == 1 else shape for shape, some in shards.items()]
    files = [os.path.join(path, name) for name in sorted(files, key=lambda name: "caption" not in name)[:1]]
    if not kinds:
        return ("no metadata.jsonl here, and no sub-folders (one for each kind) with pictures in them, nor captions "
                "(7.txt beside 7.jpg)") + (give(files) if files else what_is_there(names))
    splits = [kind for kind in kinds if SPLIT.fullmatch(kind.lower())]
    own = [kind for kind in kinds if any(f"{kind}/{name}" in names for name in LISTINGS)
           or any(name.startswith(kind + "/") for name in captions)]
    if len(kinds) > 1 and len(splits) < 2 and not own:
        return ""
    why = "sets of their own" if own else "splits of a set" if splits else "a single kind"
    own = own or [kind for kind in kinds if any(re.match(re.escape(kind) + "/.*/", name) for name in pictures)]
    if good := [os.path.join(path, kind) for kind in own] or files:
        return f"{', '.join(kinds[:9])}: {why}, so nothing tells kinds apart{give(good)}"
    if kinds == ["images"]:
        return "all its pictures are in images/, as those of a .json or .jsonl are; give that file"
    return (f"{', '.join(kinds[:9])}: {why}, so nothing tells kinds apart; give a folder with one sub-folder for each "
            "kind, or write what they show in a metadata.jsonl")


def parquets_of(folder: str) -> list[str]:
    "The .parquet files of a folder as the hub has it: train-00000-of-00002.parquet, ... in it or in data/."
    paths = sorted(str(one) for place in (folder, os.path.join(folder, "data")) for one in Path(place).glob("*")
                   if one.name.lower().endswith(".parquet") and one.name != "metadata.parquet")
    splits = list(dict.fromkeys(re.split(r"[-_.]\d|\.", os.path.basename(path))[0] for path in paths))
    require(sum(map(bool, map(SPLIT.fullmatch, splits))) < 2, f"{folder}: several splits, {', '.join(splits)}" + give(
        [f"{os.path.dirname(paths[0])}/{split}-*" for split in splits]))
    return paths
