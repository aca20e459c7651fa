"""
People's files -> records -> packed batches. The way of one record to the loss, in the order in which it is called:

    read_records    a file's row -> a record {"id", "messages": [{"role", "content"}], "images": [source], ...}
    load_data       --data -> an endless training set (record i for any i), and held-out records
    make_document   a record -> token ids, loss mask, image slots           (tokenizer.render does the work)
    pack            documents of all lengths -> rows of one fixed shape     [rows, seq_len]
    collate         these rows as tensors, with the pictures' pixels        -> VLM.forward(batch) in model.py -> loss

`Loader` calls the last three for each batch. Used as a script, this file checks data and downloads weights:

    python data.py                           # draw a contact sheet of the built-in world: world.png
    python data.py --data=my.json            # check your own records: read all, open every picture, show three
    python data.py --download=qwen2.5-1.5b   # fetch published weights, and the vision tower for them: 3.1 + 1.3 GB
    python data.py --download=list           # what has a short name here; anything else is given as Org/Name

Left out: streaming from object stores, and shuffle buffers: the number i alone says which record it is, so any order
can be had directly, and a stopped run needs only that number to go on.
"""
import argparse
import ast
import base64
import contextlib
import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import random
import re
import sys
import tarfile
import textwrap
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import weights
from vision import ViTConfig, load_image, preprocess
from weights import named_errors, require
from world import QUESTIONS, Scene, World

# ----------------------------------------------------------------------------------------------------------------------
# Reading: whatever the file, one record per conversation
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices"}
# A source is a path, a (zip file, member) pair, the bytes of a picture file, or a Scene of the built-in world. It is
# opened only when its record is used: the 558,000 pictures of LLaVA's first stage would fill 110 GB of memory.

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
END = "<|endoftext|>"  # between two documents of a text file
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CAPTION_PROMPT = "Describe the image."  # the question for a picture that comes with a caption only
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # LLaVA's wording, as is the next:
SHORT_PROMPT = "Answer the question using a single word or phrase."
# Part of a benchmark's file name -> the rule that scores it. The first match wins: DocVQA is not scored like VQA.
FILE_METRICS = {"chartqa": "relaxed", "docvqa": "anls", "infovqa": "anls", "ocrvqa": "exact", "ocrbench": "contains",
                "vqa": "vqa", "pope": "yesno"}


def read_json_rows(file):
    """A JSON list, or one JSON value per line -> its items."""
    # The content decides, not the file's name: POPE's .json files hold one object per line.
    is_list = file.readline().lstrip().startswith("[")
    file.seek(0)  # the first line of a list may hold the whole list
    # Line by line: a shard of C4 unpacks to 800 MB. In a list the JSON parser counts the lines itself.
    for number, text in [(0, file.read())] if is_list else enumerate(file, 1):
        try:
            yield from json.loads(text) if is_list else [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name}, line {number or error.lineno}: not JSON ({error.msg}); expected a list of "
                             "records or one record per line; fetch the file again if it was cut off") from None


def open_text(path: str):
    # Without encoding=, Windows uses an old code page and damages accents. utf-8-sig skips the byte order mark that
    # Windows editors write first and that a JSON parser refuses.
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig")


@lru_cache(maxsize=8)  # stays open: reading the directory of a big zip takes seconds
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # one per process: a forked worker would share its parent's file position


def open_source(source, px: int = 256) -> Image.Image:
    "A source -> an RGB image, a Scene px pixels wide. ValueError names what cannot be opened."
    if isinstance(source, Scene):
        return source.draw(px)  # at the size needed: no resizing blurs it
    name = source if isinstance(source, str) else "picture"
    if isinstance(source, tuple):
        name = " in ".join(reversed(source))  # "7.jpg in images.zip"
        with named_errors(name):
            source = open_zip(source[0], os.getpid()).read(source[1])
    return load_image(io.BytesIO(source) if isinstance(source, bytes) else source, name)


def pixel_loader(config: ViTConfig):
    "-> a function (source, record) -> uint8 [3, S, S], as this ViT needs it; its errors name the record."
    def load_pixels(source, record: dict) -> torch.Tensor:
        try:
            image = open_source(source, config.image_size)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None  # one of a million: say which
        return preprocess(image, config.image_size, config.bicubic, config.pad)
    return load_pixels


def image_finder(path: str):
    """-> a function: an image's name in this file -> its source, or None. It opens no image."""
    folder = os.path.dirname(os.path.abspath(path))
    # A zip stays packed: half a million small files take hours to unpack, and many disks run out of inodes.
    # The directory at the zip's end gives each member's position, so one picture is read without the others.
    archive, members = os.path.join(folder, "images.zip"), {}
    if os.path.exists(archive):
        with named_errors(archive):
            # macOS adds a hidden companion of each file. It has the name of a picture, but is none.
            names = [name for name in open_zip(archive, os.getpid()).namelist() if not name.startswith("__MACOSX/")]
        # Zipping a folder puts its name before all others: the zip has images/004/7.jpg, the records say 004/7.jpg.
        # Both are found. The full name is entered last, so it wins where two disagree.
        for depth in range(os.path.commonprefix(names).count("/"), -1, -1):
            members.update((name.split("/", depth)[-1], name) for name in names)

    def find(name: str):
        if name in members:
            return archive, members[name]
        # Some files say images/7.jpg, others 7.jpg.
        candidates = os.path.join(folder, "images", name), os.path.join(folder, name)
        return next(filter(os.path.isfile, candidates), None)
    return find


def to_messages(row: dict) -> list[dict]:
    """One row, in any of four layouts -> [{"role", "content"}, ...]."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    for turns, role, content in ("messages", "role", "content"), ("conversations", "from", "value"):
        if turns in row:
            return [{"role": ROLES[turn[role]], "content": turn[content]} for turn in row[turns]]
    if "instruction" in row:
        question, answer = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    else:
        question, answer = row["question"], row["answer"]
    answer = answer[0] if isinstance(answer, list) else answer  # of several right answers, train on the first
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_record(row: dict, where: str, find) -> dict:
    """One row of a file -> a record that nothing later has to check again."""
    try:
        messages = to_messages(row)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: missing key or unknown role {error}; expected conversations (from, value), "
                         "messages (role, content), instruction and output, or question and answer") from None
    # OpenAI's later files have lists here: [{"type": "text", "text": ...}, {"type": "image_url", ...}].
    require(all(isinstance(turn["content"], str) for turn in messages),
            f"{where}: the content of a turn is not text; list pictures under images, mark their places by <image>")
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # the chat format allows a system message only here
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    require(roles and roles == ["user", "assistant"] * (len(roles) // 2), f"{where}: the turns are "
            f"{', '.join(roles) or 'none'}; user and assistant must alternate, the assistant last")
    names = row.get("images", row.get("image")) or []  # null, "" and no key at all mean a text-only record
    names = names if isinstance(names, list) else [names]
    # A .tsv or .tar brings the bytes along. str: a name may be a bare number in JSON.
    images = [name if isinstance(name, bytes) else find(str(name)) for name in names]
    missing = [name for name, image in zip(names, images) if image is None]
    require(not missing, f"{where}: no image {missing[:1]} in images/ beside the file, in its own folder, or in "
                         "images.zip")
    markers = sum(turn["content"].count("<image>") for turn in messages)
    if len(images) == 1 and markers == 0:  # as in LLaVA: a picture without a marker comes first
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"], markers = "<image>\n" + first["content"], 1
    # With one marker too few, every later picture would belong to the wrong question, and no number would look wrong.
    require(markers == len(images),
            f"{where}: {markers} <image> markers, {len(images)} images; write a marker for each")
    # Keys that scoring needs are kept; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if key in row}
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def read_records(path) -> list[dict]:
    """.json, .jsonl (LLaVA and others), .tsv (VLMEvalKit), .tar (webdataset) -> records. Errors count them from 0."""
    path, find, records = str(path), None, []
    with named_errors(path):
        if path.endswith(JSON_SUFFIXES):
            with open_text(path) as file:
                # All in memory (LLaVA's 665,000: a few GB), because a split by picture must look at every record first.
                rows, find = list(read_json_rows(file)), image_finder(path)
        else:
            require(path.endswith((".tsv", ".tar")),
                    f"{path}: unknown kind of file; give a .json, .jsonl, .tsv or .tar")
            # Their records contain the pictures themselves, so there is nothing to find.
            rows = (read_tsv if path.endswith(".tsv") else read_tar)(path)
    for index, row in enumerate(rows):
        require(isinstance(row, dict), f"{path}, record {index}: expected an object with keys, found {str(row)[:40]!r}")
        for instance in row.get("instances") or [{}]:  # Self-Instruct: several inputs under one instruction
            whole = {"id": index, **row, **instance}  # the row's own id, if it has one, wins
            records.append(make_record(whole, f"{path}, record {index} (id {whole['id']!r})", find))
    require(records, f"{path}: the file is empty; was its download cut off?")
    return records


def read_tsv(path: str) -> list[dict]:
    """VLMEvalKit's benchmarks: one question per row."""
    #   index  image        question         A    B    answer
    #   7      /9j/4AAQ...  What is it?      cat  dog  B              the picture in base64: letters for bytes
    #   8      7            What colour?               ['red', 'wine']  the picture of row 7; either answer is right
    csv.field_size_limit(2**31 - 1)  # Python stops at 128 KB, less than one picture
    with open(path, newline="", encoding="utf-8-sig") as file:  # newline="": a quoted question may hold line breaks
        rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    missing = {"index", "image", "question", "answer"} - set(rows[0]) if rows else ()
    require(not missing, f"{path}: no column {', '.join(sorted(missing))}; without right answers nothing can be scored")
    name, out = os.path.basename(path).lower(), []
    # A file may have any name (MME, HallusionBench, your own): then the answers tell which rule fits.
    metric = "yesno" if all(row["answer"].lower() in ("yes", "no") for row in rows) else "exact"
    metric = next((rule for part, rule in FILE_METRICS.items() if part in name), metric)
    pictures = {row["index"]: row["image"] for row in rows if len(row["image"]) > 64}  # no picture is that small
    for number, row in enumerate(rows):  # an empty cell, as for options C and D of a two-way question, is ""
        where = f"{path}, record {number} (id {row['index']!r})"
        image, answer = pictures.get(row["index"]) or pictures.get(row["image"]), row["answer"]
        require(image, f"{where}: image {row['image']!r} is neither base64 nor the index of a row with a picture")
        # "['5', 'five']" is two right answers, "[sic" just text. The original calls eval, which would run any code.
        with contextlib.suppress(ValueError, SyntaxError):
            answer = [str(one) for one in ast.literal_eval(answer)] if answer.startswith("[") else answer
        choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        require(answer and (not choices or answer in choices), f"{where}: answer {answer!r} is empty or not an option")
        # Without such a line a model answers in a whole sentence, which "exact" counts as wrong.
        suffix = CHOICE_PROMPT if choices else SHORT_PROMPT if metric != "contains" else ""  # OCRBench adds none
        lines = "<image>", row.get("hint"), row["question"], *map(". ".join, choices.items()), suffix
        out.append({"id": row["index"], "images": [base64.b64decode(image)], "question": "\n".join(filter(None, lines)),
                    "answer": answer, "metric": "choice" if choices else metric, "choices": choices,
                    "kind": row.get("category", "")})
    return out


def read_tar(path: str) -> list[dict]:
    """webdataset: 7.jpg with 7.json (a record) or 7.txt (a caption) is record 7."""
    # A tar has no directory like a zip: to find one member, the headers of all before it are read. So this is done
    # once, and the pictures stay in memory: as large as the shard, usually about 1 GB.
    samples, rows = {}, []  # samples: {"7": {"jpg": b"...", "txt": b"..."}}
    with tarfile.open(path) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            # Cut at the first dot of the name, not of its folders: v1.0/7.jpg -> v1.0/7 and jpg.
            stem, suffix = re.fullmatch(r"(.*?[^/.]*)\.?([^/]*)", member.name).groups()
            samples.setdefault(stem, {})[suffix.lower()] = tar.extractfile(member).read()
    for stem, files in samples.items():
        with named_errors(f"{path}, {stem}"):
            row = json.loads(files.get("json", "{}"))
            if "txt" in files and not {"messages", "conversations"} & row.keys():
                row = {"instruction": CAPTION_PROMPT, "output": files["txt"].decode().strip()}
        pictures = [files[suffix] for suffix in files if suffix in ("jpg", "jpeg", "png", "webp")]
        require(pictures or "txt" not in files, f"{path}, {stem}: a caption without its .jpg, .png or .webp")
        rows.append({**row, "id": stem, "images": pictures})
    return rows


def cut_documents(file):
    """A text file -> its documents: END separates them; without END, pieces of some thousand characters."""
    # TinyStories has separators, Shakespeare's plays have none. Uncut they would be one document, which can neither be
    # shuffled nor held out in part.
    separated = any(END in line for line in file)  # a first pass, which ends at the first separator
    file.seek(0)
    lines, size = [], 0  # of the document being collected, in characters
    for line in file:
        *ended, line = line.split(END)  # a line can end several documents, or (mostly) none
        for last in ended:
            yield "".join(lines + [last]).strip("\n")
            lines = []
        lines.append(line)
        size += len(line)
        # Cut at a blank line if one comes soon. 4,000 characters of English are about 1,000 of Qwen's tokens.
        if not separated and size > (16_000 if line.strip() else 4_000):
            yield "".join(lines).strip("\n")
            lines, size = [], 0
    yield "".join(lines).strip("\n")


def read_text(path):
    """.txt, .jsonl and .json.gz with {"text"}, .json with a list of strings, or a folder of them -> documents."""
    # sorted: a folder lists its files in another order on every disk, and a document is known by its number.
    paths = sorted(map(str, Path(path).rglob("*"))) if os.path.isdir(path) else [str(path)]
    paths = [one for one in paths if one.endswith((".txt", *JSON_SUFFIXES))]
    require(paths, f"{path}: no text here; give a .txt, .json, .jsonl or .json.gz file, or a folder of them")
    for path in paths:
        found = False
        with named_errors(path), open_text(path) as file:
            for index, row in enumerate((cut_documents if path.endswith(".txt") else read_json_rows)(file)):
                text = row.get("text") if isinstance(row, dict) else row
                require(isinstance(text, str), f"{path}, record {index}: neither a string nor an object with a text")
                if text.strip():
                    found = True
                    yield text
        require(found, f"{path}: the file is empty; was its download cut off?")


def read_text_records(path, encode, end: int, seq_len: int) -> list[dict]:
    "Documents cut into records {\"ids\"} of at most seq_len + 1 tokens. `end`: the id that ends every document."
    # The last id of a piece is only a target there and is the first id of the next piece. So every token but a
    # document's first is a target exactly once. The pieces share one record id, so a split never separates them.
    out = []
    for number, text in enumerate(read_text(path)):
        ids = encode(text) + [end]
        out += [{"id": f"{path} document {number}", "images": [], "ids": ids[at:at + seq_len + 1]}
                for at in range(0, len(ids) - 1, seq_len)]
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: record i, for any i from 0 on, is the same on every machine and every rank
# Arithmetic on i instead of iterators: a stopped iterator must repeat everything it gave before, or save its buffers.
# Here one integer is the whole state, and rank r of 4 takes r, r + 4, r + 8, ... without any communication.

class Shuffled:
    "Records of a file without end: every epoch in another order."

    def __init__(self, records: list, seed: int):
        self.records, self.seed = records, seed
        # Cached, since an order costs a shuffle of the whole file. Two: waiting documents may be of the last epoch.
        self.order = lru_cache(maxsize=2)(self.shuffle)

    def shuffle(self, epoch: int) -> list[int]:
        # The seed is a text: seed + epoch would give epoch 0 of seed 1 the order of epoch 1 of seed 0.
        return random.Random(f"{self.seed}/{epoch}").sample(range(len(self.records)), len(self.records))

    def __getitem__(self, i: int) -> dict:
        epoch, at = divmod(i, len(self.records))  # of 3 records, i = 7 is position 1 of epoch 2, both counted from 0
        return self.records[self.order(epoch)[at]]


class Mixture:
    """Several data sets in proportion to their weights: record i is of the set that is furthest behind its share."""

    def __init__(self, parts: list[tuple]):
        # Weights 3 and 1 -> sets 0 0 1 0, 0 0 1 0, ... With random draws, all draws before i would have to be repeated
        # to know how far its set has come. A table of 1,000 draws, used again and again, tells it at once.
        # TRAP: a share far below 1/1000 is never drawn.
        self.sets, total = [part for part, _ in parts], sum(weight for _, weight in parts)
        counts, self.table = [0] * len(parts), []  # table: (set, how many of that set came before)
        for i in range(1000):
            k = max(range(len(parts)), key=lambda k: parts[k][1] / total * (i + 1) - counts[k])
            self.table.append((k, counts[k]))
            counts[k] += 1
        self.counts = counts

    def __getitem__(self, i: int) -> dict:
        rounds, at = divmod(i, len(self.table))
        k, before = self.table[at]
        return self.sets[k][rounds * self.counts[k] + before]  # each set's own records in order: none is left out


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """"a.json:2,b.json" -> [("a.json", 2.0), ("b.json", 1.0)]."""
    # Split from the right: C:\a.json has a colon of its own. TRAP: such a path needs its weight too, C:\a.json:1.
    pairs = [(part.strip().rsplit(":", 1) + ["1"])[:2] for part in text.split(",")]
    for name, weight in pairs:
        # float() alone would accept "nan" and "inf", and every share would be nan.
        require(name.strip() and re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0,
                f"{text!r}: expected NAME or NAME:WEIGHT, joined by commas, weights above 0; found {name!r}:{weight!r}")
    return [(name.strip(), float(weight)) for name, weight in pairs]


def picture_key(source) -> str:
    """The same key for the same picture: data sets often contain copies under other names."""
    if isinstance(source, Scene):
        return source
    if isinstance(source, tuple):  # a zip's directory has the checksums: no picture is read for them
        info = open_zip(source[0], os.getpid()).getinfo(source[1])
        return f"{info.CRC} {info.file_size}"
    if isinstance(source, bytes):
        return f"{zlib.crc32(source)} {len(source)}"
    # For plain files the name is used, or 100 GB would be read. With one folder's name, because train2017/7.jpg is not
    # vg/7.jpg; without the folders above, or the split would differ from machine to machine.
    return "/".join(Path(source).parts[-2:])


def split_by_image(records: list[dict], fraction=0.05, at_most=500) -> tuple[list[dict], list[dict]]:
    """-> (train, held out), which share no picture."""
    # VQAv2 has five questions about each photo. Split by record, nearly every held-out photo would be in training too,
    # and the score would reward memory. A record without pictures counts as a picture of its own.
    keys = [{picture_key(source) for source in record["images"]} or {f"id {record['id']}"} for record in records]
    # In the order of their hashes: as good as random, but independent of the file's order and, unlike Python's hash(),
    # of the process. When records are added later, nearly all others stay on their side.
    pictures = sorted(set().union(*keys), key=lambda key: hashlib.sha1(key.encode()).hexdigest())
    chosen = set(pictures[:max(1, round(fraction * len(pictures)))])
    held = [record for record, key in zip(records, keys) if key & chosen]
    # A record with pictures a and b is held out because of a: now b is used, too. Another record with b and c would
    # show b in training; it goes to neither side.
    used = set().union(*(key for key in keys if key & chosen))
    train = [record for record, key in zip(records, keys) if not key & used]
    require(train, f"{len(records)} records with {len(pictures)} pictures are too few to hold some out; "
                   "give a file by --val=")
    return train, held[:at_most]


def tokenizer_texts(spec: str, seed: int) -> list[str]:
    "The texts of --data on which a tokenizer is trained, before a stage starts from random weights."
    texts = ["user\n", "assistant\n"] * 50  # these occur in every conversation: worth a token each
    for name, _ in parse_mixture(spec):
        if name == "world":  # it has no end; 3,000 records stand for it
            world = World("text", seed=seed)
            records = (world[i] for i in range(3000))
        else:
            try:
                records = [{"text": text} for text in read_text(name)]
            except ValueError:  # not text: then it is conversations, or an error that names the file
                if name.endswith(".txt") or Path(name).is_dir():
                    raise
                records = read_records(name)
        for record in records:
            texts += [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
    return texts


def check_pictures(records: list[dict], where: str) -> None:
    "Open every picture, by the same rules as in training; ValueError names the record of one that is broken."
    for record in records:
        for source in record["images"]:
            try:
                open_source(source)
            except ValueError as error:
                raise ValueError(f"{where}record {record['id']}: {error}") from None


def load_data(spec: str, world: World, held_out_worlds: dict[str, World], seed: int, eval_size: int, val: str = "",
              read=read_records):
    """
    --data -> (endless training set, {name: at most eval_size held-out records}). Where the text says "world", training
    takes `world`, and every entry of held_out_worlds becomes a held-out set. Files are read by `read`.
    """
    parts, held_out = [], {}
    for name, weight in parse_mixture(spec):
        if name == "world":
            parts.append((world, weight))
            held_out |= {split: [one[i] for i in range(eval_size)] for split, one in held_out_worlds.items()}
            continue
        records = read(name)
        # --val is for data that come with a split of their own. Else a part is held out, by picture.
        train, held = (records, read(val)[:eval_size]) if val else split_by_image(records, at_most=eval_size)
        parts.append((Shuffled(train, seed), weight))
        check_pictures(held, "")  # an error now, not after the training
        held_out["held_out"] = held_out.get("held_out", []) + held
    return Mixture(parts), held_out


# ----------------------------------------------------------------------------------------------------------------------
# Documents: one record as token ids

@dataclass
class Document:
    "One rendered conversation or piece of text. Its pictures are not opened before the document is in a batch."
    index: int               # of its record in the data set: a resumed run makes the document again from it
    ids: list[int]           # at most seq_len + 1 tokens
    mask: list[int]          # the loss mask: 1 where ids[i] is supervised, that is, a target of the loss
    slots: list[int]         # per picture: where its run of image tokens starts in ids
    record: dict
    weight: float = 1.0      # of each of its tokens in the loss; in reinforcement learning the advantage


def make_document(record: dict, index: int, tokenizer, image_tokens: int, seq_len: int,
                  supervise_all: bool = False) -> Document | None:
    """
    A record -> its document, or None if it does not fit into a row of seq_len tokens. image_tokens: per picture.
    supervise_all: next-token prediction on everything, as in chapter 1, instead of on the assistant's words.
    """
    if "ids" in record or "text" in record:
        # Plain text: every token is supervised, also the one that ends the document.
        ids = record.get("ids") or tokenizer.encode(record["text"])[:seq_len] + [tokenizer.endoftext]
        return Document(index, ids, [1] * len(ids), [], record)
    try:
        ids, mask, slots = tokenizer.render(record["messages"], image_tokens=image_tokens)
    except ValueError as error:
        raise ValueError(f"record {record['id']}: {error}") from None
    # A long conversation is cut at its end, where only later turns are lost. + 1: the last id is only ever a target,
    # it takes no position in the row.
    ids, mask = ids[:seq_len + 1], mask[:seq_len + 1]
    # Not without any supervised token (mask[1:]: the first id has nothing before it to be predicted from), and not with
    # a picture that is cut off.
    if not any(mask[1:]) or (slots and slots[-1] + image_tokens > seq_len):
        return None
    return Document(index, ids, [1] * len(ids) if supervise_all else mask, slots, record)


# ----------------------------------------------------------------------------------------------------------------------
# Packing: documents of all lengths -> rows of one fixed shape
# If each document were padded to the longest, most of a batch would be padding; and torch.compile would compile every
# new shape again. The documents 1 2 3 (only 3 is supervised) and 8 9 in one row of 4:
#   ids            1     2     8     0    each document without its last id, which is only ever a target
#   targets     -100     3     9  -100    the id that follows; -100, PyTorch's ignore_index: prompts and padding
#   positions      0     1     0     0    RoPE starts again in every document
#   document_ids   1     1     2     0    attention stays within equal numbers; 0 is padding
#   loss_weights   1     1     1     0    factors in the loss, where there is a target

def pack(documents: list[Document], rows: int, seq_len: int,
         image_tokens: int) -> tuple[dict, list[Document], list[Document]]:
    """-> (the arrays above, each [rows, seq_len], and three index lists; documents packed; documents without room)."""
    ids, positions, document_ids = (np.zeros((rows, seq_len), dtype=np.int64) for _ in range(3))
    targets, loss_weights = np.full((rows, seq_len), -100, dtype=np.int64), np.zeros((rows, seq_len), dtype=np.float32)
    used, count, packed, waiting, image_positions = [0] * rows, [0] * rows, [], [], []
    for doc in documents:
        n = len(doc.ids) - 1
        # First fit: the first row with room. The best packing is NP-hard to find; with long documents first, this one
        # needs at most about 11/9 of its rows.
        row = next((r for r in range(rows) if used[r] + n <= seq_len), None)
        if row is None:
            waiting.append(doc)
            continue
        at = used[row]
        used[row], count[row] = at + n, count[row] + 1
        ids[row, at:at + n] = doc.ids[:-1]
        # TRAP: the mask shifts together with the targets. One position off, no answer's first token would be trained.
        targets[row, at:at + n] = np.where(np.array(doc.mask[1:]) > 0, doc.ids[1:], -100)
        loss_weights[row, at:at + n] = doc.weight
        positions[row, at:at + n] = np.arange(n)
        document_ids[row, at:at + n] = count[row]
        image_positions += [np.arange(image_tokens) + row * seq_len + at + slot for slot in doc.slots]
        packed.append(doc)
    batch = {"ids": ids, "targets": targets, "positions": positions, "document_ids": document_ids,
             "loss_weights": loss_weights,
             # where image tokens go in ids.flatten(), for all rows in one operation [images * image_tokens]
             "image_positions": np.concatenate(image_positions or [np.zeros(0, dtype=np.int64)]),
             # supervised positions in targets.flatten(): the loss computes logits for these only
             "supervised": np.flatnonzero(targets >= 0),
             "cu_seqlens": cumulative_lengths(document_ids) if max(count) > 1 else None}
    return batch, packed, waiting


def cumulative_lengths(document_ids: np.ndarray) -> np.ndarray:
    """
    Document ids [rows, seq_len] -> int32 [D + 1], FlashAttention's cu_seqlens: in the flattened rows document i lies
    from entry i to entry i + 1.
    """
    change = np.ones(document_ids.shape, dtype=bool)  # a row's first position always begins a document
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(change)
    # Padded to a power of two with empty documents: every new length of this array would be compiled again.
    size = 1 << (len(starts) - 1).bit_length()
    return np.append(starts, np.full(size - len(starts) + 1, document_ids.size)).astype(np.int32)


@lru_cache
def thread_pools(process: int) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """-> (one thread that prepares batches, those that decode their pictures), started when first needed."""
    # Two pools: in one, a batch could wait for pictures whose turn comes after it. Above 16 threads Python's lock is
    # the limit. One pair per process, as in open_zip: a forked process has the pool objects, but not their threads.
    return ThreadPoolExecutor(1), ThreadPoolExecutor(min(16, os.cpu_count()))


def collate(arrays: dict, packed: list[Document], load_pixels) -> dict:
    """pack's arrays as tensors, and the pictures' pixels. load_pixels(source, record) -> uint8 [3, S, S]."""
    # {source: (its index in pixels, a record to name in errors)}. A picture that several documents share, as all
    # answers to one question do in chapter 4, is decoded and later encoded once.
    sources = {}
    image_index = [sources.setdefault(source, (len(sources), doc.record))[0] for doc in packed
                   for source in doc.record["images"]]
    # The last chance to notice: after this, a picture in another's place trains without any error.
    assert len(image_index) == sum(len(doc.slots) for doc in packed), \
        f"pictures and slots disagree near {packed[0].record['id']}"
    batch = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
    # Pillow releases Python's lock while it decodes and resizes, so threads help, and map keeps the order. The world's
    # drawings are mostly Python, where threads would only slow each other down.
    run = map if all(isinstance(source, Scene) for source in sources) else thread_pools(os.getpid())[1].map
    pixels = list(run(load_pixels, sources, [record for _, record in sources.values()]))
    batch["pixels"] = torch.stack(pixels) if pixels else None   # uint8 [n, 3, S, S]: a quarter of float32 to transfer
    batch["image_index"] = torch.tensor(image_index, dtype=torch.long)  # [m]: which of the n each slot shows
    batch["records"] = [doc.record["id"] for doc in packed]  # for messages
    return batch


class Loader:
    """
    An endless iterator of packed batches: the micro-batch number `micro_batch` of each step's `micro_batches`.
    make_document(record, index): see above (None: skip the record). load_pixels(source, record): see collate.
    prefetch: a thread prepares the next batch during a step. pin: into memory that a GPU copies from by itself.
    """

    def __init__(self, dataset, make_document, load_pixels, rows, seq_len, image_tokens, micro_batch=0, micro_batches=1,
                 state=None, prefetch=True, pin=False):
        self.dataset, self.make_document, self.load_pixels = dataset, make_document, load_pixels
        self.rows, self.seq_len, self.image_tokens = rows, seq_len, image_tokens
        self.prefetch, self.pin = prefetch, pin
        # Micro-batch 1 of 4 takes records 1, 5, 9, ... Counted by micro-batches, not by GPUs: the data of a step are
        # the same however many GPUs share it.
        self.next, self.stride = (state["next"] if state else micro_batch), micro_batches
        self.waiting = [make_document(dataset[i], i) for i in state["waiting"]] if state else []
        self.pending = {}  # {process: the next batch, in preparation}; a forked process finds none of its own

    def state(self) -> dict:  # {"next": 1201, "waiting": [1181, 1197]}: indices are enough, record i can be made again
        # As of the batches handed out. A prefetched one is not among them: a resumed run makes it again.
        return {"next": self.next, "waiting": [d.index for d in self.waiting]}

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        # result() raises the thread's error here, and again at every later call: the state has not moved on.
        process = os.getpid()
        done = self.pending[process].result() if process in self.pending else self.prepare()
        batch, self.next, self.waiting = done
        if self.prefetch:
            self.pending = {process: thread_pools(process)[0].submit(self.prepare)}
        return batch

    def prepare(self) -> tuple[dict, int, list[Document]]:
        """-> (the next batch, `next` and `waiting` after it). TRAP: it runs in a thread and must not change self."""
        documents, tokens = list(self.waiting), sum(len(d.ids) for d in self.waiting)
        at, skipped = self.next, 0
        # 2 % more than the rows hold: each document's last id takes no position, and a few spare documents fill the
        # gaps at the rows' ends. Many more would only wait longer.
        while tokens < self.rows * self.seq_len * 1.02:
            document = self.make_document(self.dataset[at], at)
            at += self.stride
            # A few records that are too long are normal; if none fits, this loop would never end.
            skipped = 0 if document else skipped + 1
            require(skipped <= 1000, f"{skipped} records in a row do not fit into --seq_len={self.seq_len}; raise it")
            if document:
                documents.append(document)
                tokens += len(document.ids)
        # Those that waited go first: sorted among the others, a short one could wait without end. Then long before
        # short, since short ones still fit into the gaps that long ones leave.
        first = len(self.waiting)
        documents = documents[:first] + sorted(documents[first:], key=lambda d: -len(d.ids))
        arrays, packed, waiting = pack(documents, self.rows, self.seq_len, self.image_tokens)
        batch = collate(arrays, packed, self.load_pixels)
        if self.pin:  # from page-locked memory the copy to the GPU runs in the background; from other memory it blocks
            batch = {name: value.pin_memory() if torch.is_tensor(value) else value
                     for name, value in batch.items()}
        return batch, at, waiting


# ----------------------------------------------------------------------------------------------------------------------
# Flags, for every script

POSITIVE = ("batch_size", "seq_len", "steps", "lr", "eval_size", "samples", "max_new_tokens", "gpus", "keep",
            "max_bad_steps", "max_requests")
NOT_NEGATIVE = ("micro_batch_size", "lora_rank", "temperature", "warmup", "cooldown", "top_k")


class Parser(argparse.ArgumentParser):
    flags = {}

    def error(self, message: str):
        "One line, with a suggestion. argparse's own error() prints all flags first, which hides what is wrong."
        for word in message.split():
            # "--bach_size=4" -> "bach_size" -> near "batch_size"; a known flag is in the message already
            near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), self.flags, n=1)
            if word.startswith("--") and near and near[0] not in message:
                message += f"; did you mean --{near[0]}?"
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def boolean(text: str) -> bool:
    # TRAP: type=bool would call bool("False"), which is True, as for every text but the empty one.
    if text not in ("True", "False", "true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text in ("True", "true", "1")


def parse_flags(doc: str, flags: dict, by_model: dict[str, dict] = {}, argv=None) -> argparse.Namespace:
    """
    --name=value for every entry of flags, {name: (default, meaning)}. None: the model's default, from by_model. A type
    (float) or [] (may be given several times) as default: not given.
    """
    # allow_abbrev would accept --seq for --seq_len, until a new flag that begins alike makes it an error.
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.flags = flags
    for name, (default, meaning) in flags.items():
        # The type of the default is the flag's type. TRAP: write 1.0 where fractions are allowed; 1 would refuse 0.5.
        kind = default if isinstance(default, type) else str if default == [] else \
            type(default if default is not None else by_model["tiny"][name])
        shown = ", ".join(f"{m} {d[name]}" for m, d in by_model.items()) if default is None else \
            "not given" if kind is default or default == [] else default
        # nargs "?" with const: --resume alone means --resume=True
        extra = {"type": boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        extra |= {"action": "append"} if default == [] else {}
        parser.add_argument(f"--{name}", default=None if kind is default else default, metavar=kind.__name__.upper(),
                            help=f"{meaning} [{shown}]".replace("%", "%%"), **extra)
    out = parser.parse_args(argv)
    # None: not given. Only now is the model known, and with it the default. All released models share theirs.
    for name, default in (by_model and by_model.get(out.model, by_model["released"])).items():
        if getattr(out, name) is None:
            setattr(out, name, default)
    # Ranges, which argparse does not know. Flags that a script does not have pass.
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(out, name, None)
        if value is not None and (value < 0 or value == 0 and name in POSITIVE):
            raise ValueError(f"--{name}={value}: must {'be above' if name in POSITIVE else 'not be below'} 0")
    if getattr(out, "compile", "auto") not in ("auto", "True", "False"):
        raise ValueError(f"--compile={out.compile}: choose auto, True or False")
    return out


def run(main) -> None:
    "Run a script's main(): bad input ends in one line on standard error and exit code 1."
    try:
        main()
    # Only these two: a wrong value or file is for the user to correct. Any other exception is our mistake, and its
    # traceback shows where.
    except (ValueError, OSError) as error:
        if os.environ.get("GHOSTVIS_DEBUG"):  # =1: the traceback all the same
            raise
        for bar in list(tqdm._instances):
            bar.close()  # else the message would be printed on the progress bar's line
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)  # the shells' number for Ctrl-C: 128 + SIGINT (2)
    finally:
        if torch.distributed.is_initialized():  # else PyTorch warns of connections left open
            torch.distributed.destroy_process_group()


def pick_device(name: str) -> str:
    "auto, cpu, cuda or mps -> cpu, cuda or mps."
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    if name not in available:
        raise ValueError(f"--device={name}: choose auto, cpu, cuda or mps")
    if not available[name]:  # an error, because on the CPU instead the run could take days
        raise ValueError(f"--device={name}: PyTorch sees no {'Apple ' * (name == 'mps')}GPU here; use --device=cpu")
    return name


# ----------------------------------------------------------------------------------------------------------------------
# python data.py

def draw_sheet(path, sources: list, captions: list[list[tuple[str, str]]], columns: int = 4, px: int = 240) -> None:
    "A contact sheet of pictures, each with its lines below it, (text, colour), wrapped at 34 letters."
    wrapped = [[(line, colour) for text, colour in texts for line in textwrap.wrap(text, 34)[:20]]
               for texts in captions]
    lines, font = max(map(len, wrapped)), ImageFont.load_default(14)  # 20: an answer without end is cut
    height = px + 18 * lines + 10 * bool(lines)
    sheet = Image.new("RGB", (columns * px, -(-len(sources) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (source, texts) in enumerate(zip(sources, wrapped)):
        x, y = i % columns * px, i // columns * height
        if source is not None:  # a text-only record has no picture
            sheet.paste(open_source(source, px - 8).resize((px - 8, px - 8)), (x + 4, y + 4))
        for row, (line, colour) in enumerate(texts):
            pen.text((x + 6, y + px + 18 * row), line, fill=colour, font=font)
    sheet.save(path)


def show_world(path: str) -> None:
    "A contact sheet of scenes, and one printed example of each kind of question."
    captions, exam = World("captions"), World("exam", "scenes")
    draw_sheet(path, [captions[i]["images"][0] for i in range(20)], [[]] * 20, columns=5)
    for i, kind in enumerate(QUESTIONS):  # record i of an exam is of the i-th kind
        question, answer = (message["content"] for message in exam[i]["messages"])
        print(f"{kind:>9}: {question.removeprefix('<image>').strip()!r} -> {answer}")
    print(f"wrote {path}")


def check_records(path: str) -> None:
    "Read every record and open every picture; the first problem is an error that names its record."
    records = read_records(path)
    check_pictures(records, f"{path}, ")
    for record in records[:3]:
        print(json.dumps({"id": record["id"], "messages": record["messages"], "images": len(record["images"])},
                         ensure_ascii=False))
    print(f"{path}: {len(records)} records, {sum(len(r['images']) for r in records)} pictures, all readable")


def download(names: str, vision: str) -> None:
    "\"list\", or names joined by commas: fetch each, and print the folder it is in."
    if names == "list":
        for name, repository in weights.REPOSITORIES.items():
            print(f"{name:26} {repository.hub:43} {repository.licence}")
        return
    names = [name.strip() for name in names.split(",")]
    names += [vision] if vision and any(name.startswith("qwen2.5-") for name in names) else []
    for name in names:  # a typing error in the last name is found before the gigabytes of the first
        weights.find_repository(name)
    for name in dict.fromkeys(names):
        print(f"{name} {weights.fetch(name)}", flush=True)


FLAGS = {
    "data": ("world", "world, or a file of records to check"),
    "out": ("world.png", "where the world's contact sheet goes"),
    "download": ("", "what to fetch: names joined by commas; list shows them"),
    "vision": (weights.DEFAULT_VISION, "fetched along with any qwen2.5-*; empty: none"),
}


def main() -> None:
    flags = parse_flags(__doc__, FLAGS)
    if flags.download:
        download(flags.download, flags.vision)
    elif flags.data == "world":
        show_world(flags.out)
    else:
        check_records(flags.data)


if __name__ == "__main__":
    run(main)
