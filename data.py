"""
People's files -> records -> packed batches. The way of one record to the loss, in the order in which it is called:

    read_records    a file's row -> a record {"id", "messages": [{"role", "content"}], "images": [source], ...}
    load_data       --data -> an endless training set (record i for any i), and held-out records
    make_document   a record -> token ids, loss mask, image slots           (tokenizer.render does the work)
    pack            documents of all lengths -> rows of one fixed shape     [rows, seq_len]
    collate         these rows as tensors, with the pictures' pixels        -> VLM.forward(batch) in model.py -> loss

`Loader` calls the last three for each batch. Used as a script, this file checks data and downloads weights and data:

    python data.py                           # draw a contact sheet of the built-in world: world.png
    python data.py --data=my.json,world      # read all, name every bad record, show three
    python data.py --check --data=my.json    # the same, and open every picture, count tokens, draw check.png
    python data.py --download=qwen2.5-1.5b   # fetch published weights, and the vision tower for them: 3.1 + 1.3 GB
    python data.py --download=gsm8k          # fetch a public data set
    python data.py --download=list           # what has a short name here; other weights are given as Org/Name

Left out: streaming from object stores, and shuffle buffers. An index of byte offsets makes every record of a file, also
of a tar shard, readable by its number, so any order can be had directly, and a stopped run needs only that number.
"""
import argparse
import ast
import base64
import contextlib
import csv
import ctypes
import difflib
import gc
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import tarfile
import textwrap
import time
import unicodedata
import weakref
import zipfile
import zlib
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from string import ascii_uppercase

# PyTorch takes two seconds to import. Ctrl-C in that time, or later, ends a script in one line, without a traceback. So
# that it does, the scripts import this file before any other.
sys.excepthook = lambda kind, *error: print("stopped", file=sys.stderr) if kind is KeyboardInterrupt else \
    sys.__excepthook__(kind, *error)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import weights
from tokenizer import Tokenizer
from vision import ViTConfig, load_image, preprocess
from weights import named_errors, parse_json, require
from world import QUESTIONS, Scene, World

# ----------------------------------------------------------------------------------------------------------------------
# Pictures: a source is a path, a URL, a (zip file, member) pair, the bytes of a picture file, or a Scene of the
# built-in world. It is opened only when its record is used: the 558,000 pictures of LLaVA's first stage fill 110 GB.

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
UNREAD = (".heic", ".heif", ".avif", ".tif", ".tiff")  # pictures, too, but not for every Pillow
LEADS_OUT = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.($|[/\\])|\0")  # /etc/passwd, C:x, ../x
MAX_PICTURE = 200 * 2 ** 20  # bytes of one picture's file; a larger one is a mistake or an attack (a zip bomb)


def cache(*parts: str) -> Path:
    return weights.setting("GHOSTVIS_CACHE", "~/.cache/ghostvis").joinpath(*parts)


@contextlib.contextmanager
def new_file(path: Path, mode: str = "wb"):
    "A file that gets its name when it is complete: no other process ever sees half of it."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def say(text: str) -> None:
    "To standard error, once for all ranks, and not into the middle of a progress bar."
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


@lru_cache(maxsize=32)  # stays open: reading the directory of a big zip takes seconds
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # one per process: a forked worker would share its parent's file position


def read_member(path: str, member: str) -> bytes:
    file = open_zip(path, os.getpid())
    size = file.getinfo(member).file_size  # zipfile never unpacks more than this directory entry says
    require(size <= MAX_PICTURE, f"{member} in {path}: {size:,} bytes are too many for a picture")
    try:
        return file.read(member)
    except RuntimeError as error:  # encrypted, or packed by a method that Python lacks
        raise zipfile.BadZipFile(str(error)) from None


def open_source(source, px: int = 256) -> Image.Image:
    "A source -> an RGB image, a Scene px pixels wide. ValueError names what cannot be opened."
    if isinstance(source, Scene):
        return source.draw(px)  # at the size needed: no resizing blurs it
    name = source if isinstance(source, str) else "picture"
    if isinstance(source, tuple):
        name = " in ".join(reversed(source))  # "7.jpg in images.zip"
        with named_errors(name):
            source = read_member(*source)
    elif name.startswith(("http://", "https://")):
        source = weights.fetch_url(name, cache("pictures"), MAX_PICTURE,
                                   check=lambda content: load_image(io.BytesIO(content), name))
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


def image_finder(folder: str, places: dict = {}):
    """
    -> a function: an image's name in a record -> its source, or None. It opens no image. places: where those are that
    the folder lacks, {the beginning of their names: another folder, or a URL}. A name that leads out of the folder is a
    ValueError: a file of records from a stranger must not make us read, and describe, the user's other files.
    """
    folder = os.path.abspath(folder)
    true_path = lru_cache(2 ** 14)(os.path.realpath)
    roots = tuple(os.path.join(true_path(os.path.join(root, end)), "")
                  for root in [folder, *places.values()] for end in ("", "images"))

    def is_file(path: str) -> bool:
        if not os.path.isfile(path):
            return False
        # realpath takes 30 microseconds, so only links are followed one by one, folders once
        true = os.path.realpath(path) if os.path.islink(path) else os.path.join(true_path(os.path.dirname(path)), "x")
        require(true.startswith(roots), f"image {path[:200]!r} is a link that leads out of the data's folder {folder}; "
                                        "copy the file there")
        return True

    @lru_cache
    def zips(place: str) -> list:
        # A zip stays packed: half a million small files take hours to unpack, and many disks run out of inodes.
        # The directory at the zip's end gives each member's position, so one picture is read without the others.
        names = [name for name in os.listdir(place) if name.endswith(".zip")] if os.path.isdir(place) else []
        out = []
        for path in (os.path.join(place, name) for name in sorted(names, key=lambda one: (one != "images.zip", one))):
            with named_errors(path):
                members = open_zip(path, os.getpid()).NameToInfo
            # macOS adds a hidden companion of each file. It has the name of a picture, but is none.
            common = os.path.commonprefix([name for name in members if not name.startswith("__MACOSX/")])
            # Zipping a folder puts its name before all others: the zip has images/004/7.jpg, the records say
            # 004/7.jpg. Both are found, the full name first.
            folders = itertools.accumulate(part + "/" for part in common.split("/")[:-1])
            out.append((path, members, ["", *folders]))
        return out

    def find_in(place: str, name: str):
        for archive, members, prefixes in zips(place):
            for prefix in prefixes:
                if prefix + name in members:
                    return archive, prefix + name
        # Some files say images/7.jpg, others 7.jpg.
        for path in f"{place}/images/{name}", f"{place}/{name}":
            if is_file(path):
                return path
        first, _, rest = name.partition("/")  # gqa/images/7.jpg may be images/7.jpg in gqa/images.zip
        return find_in(os.path.join(place, first), rest) if rest else None

    def find(name: str):
        if name.startswith("data:"):  # data:image/png;base64,iVBORw0KG...: the picture itself
            try:
                return base64.b64decode("".join(name.partition(",")[2].split()), validate=True)
            except ValueError:
                raise ValueError(f"image {name[:40]!r} is not base64") from None
        if name.startswith(("http://", "https://")):
            return name
        require(not LEADS_OUT.search(name), f"image {name[:100]!r} leads out of the data's folder {folder}; name it "
                                            "relative to the folder")
        # macOS spells ü as two letters, u and two dots, others as one: a name from there may lack its file here.
        spellings = [name] + [unicodedata.normalize(form, name) for form in ("NFC", "NFD") if not name.isascii()]
        source = next(filter(None, map(partial(find_in, folder), spellings)), None)
        for start, place in places.items():
            if not source and name.startswith(start):
                rest = name[len(start):]
                source = place + rest if "://" in place else find_in(place, rest)
        return source
    return find


# ----------------------------------------------------------------------------------------------------------------------
# Records: whatever the file, one record per conversation
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices"}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
METRICS = ("exact", "yesno", "relaxed", "anls", "contains", "vqa", "choice", "cider")  # train_sft.py has the rules
CAPTION_PROMPT = "Describe the image."  # the question for a picture that comes with a caption only
CLASS_PROMPT = "What is this?"          # and for one in a folder that is named after what it shows
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # LLaVA's wording, as is the next:
SHORT_PROMPT = "Answer the question using a single word or phrase."


def attempt(work, *arguments):
    "work(*arguments), or the ValueError that it ends in: one bad row of a million does not stop the others."
    try:
        return work(*arguments)
    except (ValueError, RecursionError) as error:
        return error


def flatten(content, images: list):
    "A turn's content -> its text. OpenAI's later files have a list of parts; their pictures are added to `images`."
    # [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "7.jpg"}}] -> "What?<image>"
    if not isinstance(content, list):
        return content  # make_record checks that it is text
    texts = []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"].replace("<image>", ""))  # here the list alone says where pictures are
        else:
            require(part["type"] in ("image_url", "image"), f"a part of type {part['type']!r}; use text or image_url")
            url = part.get("image_url", part.get("image"))
            images += [] if url is None else [url["url"] if isinstance(url, dict) else url]
            texts.append("<image>")
    return "".join(texts)


def to_messages(row: dict, images: list) -> list[dict]:
    """One row, in any of five layouts -> [{"role", "content"}, ...]. Pictures within it are added to `images`."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    # caption {"file_name": "7.jpg", "text": "A cat."}, as in a folder's metadata.jsonl
    for turns, role, content in ("messages", "role", "content"), ("conversations", "from", "value"):
        if turns in row:
            return [{"role": ROLES[turn[role]], "content": flatten(turn[content], images)} for turn in row[turns]]
    if "instruction" in row:
        question, answer = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    elif images and "question" not in row and ("text" in row or "caption" in row):
        question, answer = CAPTION_PROMPT, row.get("text", row.get("caption"))
    else:
        question, answer = row["question"], row["answer"]
    answer = answer[0] if isinstance(answer, list) else answer  # of several right answers, train on the first
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def instances_of(row) -> list:
    "Self-Instruct: several inputs under one instruction -> a row for each. Every other row is one."
    several = row.get("instances") if isinstance(row, dict) else None
    if not several:
        return [row]
    if isinstance(several, list) and all(isinstance(one, dict) for one in several):
        return [row | one for one in several]
    return [ValueError(f"instances is {str(several)[:40]!r}; expected a list of objects")]


def read_row(row, where: str, number: int, find) -> dict:
    "A row of a file, or what is wrong with it -> its record, or a ValueError that names file, record and id."
    # The one place where errors get their names: what is called below says only what is wrong.
    try:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict):  # TRAP: in require() the message would be made for every good row, too
            raise ValueError(f"expected an object with keys, found {str(row)[:40]!r}")
        row = {"id": number} | row
        where += f" (id {str(row['id'])[:60]!r})"
        return make_record(row, find)
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # a row of any other shape
        raise ValueError(f"{where}: missing key or unknown role {error}; expected conversations (from, value), "
                         "messages (role, content), instruction and output, or question and answer") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def make_record(row: dict, find) -> dict:
    """One row of a file -> a record that nothing later has to check again."""
    names = row.get("images", row.get("image", row.get("file_name"))) or []  # null, "" and no key: a text-only record
    names = list(names) if isinstance(names, list) else [names]
    if not names:  # {"img": "7.jpg"} must not train as a text
        texts = "id", "instruction", "input", "output", "question", "answer"
        other = [key for key, value in row.items() if key not in texts and str(value).lower().endswith(PICTURES)]
        require(not other, f"{other[:1]} seems to name a picture; the key must be image, or images for a list")
    messages = to_messages(row, names)
    other = [turn["content"] for turn in messages if not isinstance(turn["content"], str)]
    require(not other, f"the content of a turn is not text but {str(other)[1:-1][:40]}; write a number in quotes, list "
                       "pictures under images, and mark their places by <image>")
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # the chat format allows a system message only here
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    require(roles and roles == ["user", "assistant"] * (len(roles) // 2), f"the turns are "
            f"{', '.join(roles[:9]) or 'none'}; user and assistant must alternate, the assistant last")
    empty = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"
             and (not turn["content"] or turn["content"].isspace())]
    require(not empty, f"the answer in turn {empty[:1]} is empty; nothing could be learned from it")
    # A .tsv or .tar brings the bytes along. A name may be a bare number in JSON, but is no list and no object.
    require(all(type(name) in (str, int, bytes) for name in names), "an image is no name, but a list or an object")
    images = [name if isinstance(name, bytes) else find(str(name)) for name in names]
    missing = [str(name)[:100] for name, image in zip(names, images) if image is None]
    require(not missing, f"no image {missing[:1]} in images/ beside the file, in its own folder, or in images.zip")
    markers = sum(turn["content"].count("<image>") for turn in messages)
    if len(images) == 1 and markers == 0:  # as in LLaVA: a picture without a marker comes first
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"], markers = "<image>\n" + first["content"], 1
    # With one marker too few, every later picture would belong to the wrong question, and no number would look wrong.
    require(markers == len(images), f"{markers} <image> markers, {len(images)} images; write a marker for each")
    # Keys that scoring needs are kept; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if key in row}
    check_scoring(extra)
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def check_scoring(extra: dict) -> None:
    "What scoring will use is of the right kind: later it would end an evaluation, or silently score nothing."
    answers, metric, choices = extra.get("answer", "x"), extra.get("metric", "exact"), extra.get("choices", {})
    for answer in answers if isinstance(answers, list) and answers else [answers]:
        require(isinstance(answer, str) and answer.strip(), f"the answer {str(answers)[:40]!r} must be a text, or a "
                                                            "list of texts, and not empty")
    require(metric in METRICS, f"unknown metric {str(metric)[:40]!r}; choose from {', '.join(METRICS)}")
    require(isinstance(choices, dict) and all(isinstance(text, str) for text in choices.values()),
            "choices must be an object of letters and texts, such as {\"A\": \"cat\"}")
    require(isinstance(extra.get("kind", ""), str), "the kind must be a text")


def picture_key(source) -> str:
    """The same text for the same picture: data sets often contain copies under other names."""
    if isinstance(source, tuple):  # a zip's directory has the checksums: no picture is read for them
        info = open_zip(source[0], os.getpid()).getinfo(source[1])
        return f"{info.CRC} {info.file_size}"
    if isinstance(source, bytes):
        return f"{zlib.crc32(source)} {len(source)}"
    if isinstance(source, Scene):
        return repr(source)
    # For plain files the name is used, or 100 GB would be read. With one folder's name, because train2017/7.jpg is not
    # vg/7.jpg; without the folders above, or the split would differ from machine to machine.
    return "/".join(Path(source).parts[-2:])


def hash_keys(record: dict) -> list[int]:
    "A record's pictures as 64-bit numbers, the same on every machine. Without a picture its id counts as one."
    keys = {picture_key(source) for source in record["images"]} or {f"id {record['id']}"}
    return sorted(int.from_bytes(hashlib.sha1(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
                  for key in keys)


class Records:
    """
    The records of a file: a sequence, whose items are read and made when they are asked for. Per record there are only
    a few numbers in memory: `spans` (where it is in the file) and the hashes of its pictures, by which a set is split.
    """

    def __init__(self, make, spans: np.ndarray, keys: np.ndarray, counts: np.ndarray, bad: list = ()):
        self.make, self.spans = make, spans     # make(*spans[i]) -> record i; spans int64 [n, k]
        self.keys, self.counts = keys, counts   # hashes of all pictures in a row, uint64; how many of each record [n]
        self.bad = list(bad)                    # what is wrong with rows that are no records

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.make(*self.spans[i].tolist())  # numpy's IndexError ends a `for` over the records

    def each(self):
        "All, one after the other; in place of one the error that making it was: its picture may have gone since."
        return (attempt(self.__getitem__, i) for i in range(len(self)))

    def select(self, chosen: np.ndarray) -> "Records":
        "chosen: bool [n]."
        return Records(self.make, self.spans[chosen], self.keys[np.repeat(chosen, self.counts)], self.counts[chosen])


# ----------------------------------------------------------------------------------------------------------------------
# Reading files. A reader is a generator of (start, end, row): the bytes of the file from which the row can be read
# again (0, 0 where rows stay in memory). In place of a row there may be a ValueError: it is bad, the others go on.

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Part of a benchmark's file name -> the rule that scores it. The first match wins: DocVQA is not scored like VQA.
FILE_METRICS = {"chartqa": "relaxed", "docvqa": "anls", "infovqa": "anls", "ocrvqa": "exact", "ocrbench": "contains",
                "vqa": "vqa", "pope": "yesno"}
BLOCK = 2 ** 24  # bytes of a file that are read at once


def read_span(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:  # opened each time: processes and threads that share a file share its position
        file.seek(start)
        return file.read(end - start)


def read_json_rows(path: str):
    """A JSON list, or one JSON value per line -> its items."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        head = file.read(2 ** 12)
        at = 3 * head.startswith(b"\xef\xbb\xbf")  # Windows editors begin with a byte order mark
        file.seek(at)
        # The content decides, not the file's name: POPE's .json files hold one object per line.
        if head[at:].lstrip().startswith(b"["):
            yield from read_json_list(file, path, at)
            return
        for number, line in enumerate(file, 1):  # line by line: a shard of C4 unpacks to 800 MB
            if line.strip():
                yield at, at + len(line), attempt(parse_json, line, f"line {number} (a line holds a whole record, or "
                                                                    "the file a list of them)")
            at += len(line)


def read_json_list(file, path: str, at: int):
    "[{...}, {...}, ...] -> its items, without the whole file in memory. at: the byte at which the list begins."
    # In Latin-1 every byte is one letter, so the decoder's places in the text are places in the file, and what
    # structures JSON is ASCII in any case. Only items that hold other letters are decoded again, from UTF-8.
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n,]*")
    text, line = file.read(BLOCK).decode("latin-1"), 1  # the text begins at byte `at` of the file, in this line
    i = text.index("[") + 1  # up to here the text is used up
    while not text.startswith("]", i := gap.match(text, i).end()):
        try:
            row, end = decode(text, i)
            if end == len(text):  # 12 may be the beginning of 123; the last item has a ] behind it
                raise json.JSONDecodeError("the text ends", text, end)
            if not text[i:end].isascii():
                row = json.loads(text[i:end].encode("latin-1"))
        except (ValueError, RecursionError) as error:
            # Is the item wrong, or does it only continue in the next block? A string is reported at its start.
            pos, reason = getattr(error, "pos", i), getattr(error, "msg", str(error))
            cut = isinstance(error, json.JSONDecodeError) and (pos > len(text) - 2 ** 16 or "Unterminated" in reason)
            # twice as much each time: a long item stays cheap
            if block := cut and file.read(max(BLOCK, len(text) - i)):
                at, line = at + i, line + text.count("\n", 0, i)
                text, i = text[i:] + block.decode("latin-1"), 0
                continue
            raise ValueError(f"{path}, line {line + text.count(chr(10), 0, pos)}: not valid JSON ({reason}); expected "
                             "a list of records or one record per line, in UTF-8; fetch the file again if it was cut "
                             "off") from None
        yield at + i, at + end, row
        i = end


def benchmark_row(name, image, question: str, answer, choices: dict = {}, metric: str = "exact") -> dict:
    "A question whose answer can be checked, worded as in LLaVA's evaluations."
    # Without such a line a model answers in a whole sentence, which "exact" counts as wrong. OCRBench adds none.
    suffix = CHOICE_PROMPT if choices else SHORT_PROMPT if metric != "contains" else ""
    return {"id": name, "images": image, "answer": answer, "metric": "choice" if choices else metric,
            "question": "\n".join(filter(None, [question, *map(". ".join, choices.items()), suffix])),
            "choices": choices}


def read_tsv(path: str):
    """VLMEvalKit's benchmarks: one question per row."""
    #   index  image        question         A    B    answer
    #   7      /9j/4AAQ...  What is it?      cat  dog  B              the picture in base64: letters for bytes
    #   8      7            What colour?               ['red', 'wine']  the picture of row 7; either answer is right
    csv.field_size_limit(2**31 - 1)  # Python stops at 128 KB, less than one picture
    with open(path, newline="", encoding="utf-8-sig") as file:  # newline="": a quoted question may hold line breaks
        rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    missing = {"index", "image", "question", "answer"} - set(rows[0]) if rows else ()
    require(not missing, f"{path}: no column {', '.join(sorted(missing))}; without right answers nothing can be scored")
    name = os.path.basename(path).lower()
    # A file may have any name (MME, HallusionBench, your own): then the answers tell which rule fits.
    metric = "yesno" if all(row["answer"].lower() in ("yes", "no") for row in rows) else "exact"
    metric = next((rule for part, rule in FILE_METRICS.items() if part in name), metric)
    pictures = {row["index"]: f"data:,{row['image']}" for row in rows if len(row["image"]) > 64}  # none is that small

    def question(row: dict) -> dict:  # an empty cell, as for options C and D of a two-way question, is ""
        image, answer = pictures.get(row["index"]) or pictures.get(row["image"]), row["answer"]
        require(image, f"image {row['image'][:70]!r} is neither base64 nor the index of a row with one")
        # "['5', 'five']" is two right answers, "[sic" just text. The original calls eval, which would run any code.
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            answer = [str(one) for one in ast.literal_eval(answer)] if answer.startswith("[") else answer
        choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        require(answer and (not choices or answer in choices), f"answer {answer!r} is empty or no option")
        asked = "\n".join(filter(None, (row.get("hint"), row["question"])))
        return benchmark_row(row["index"], image, asked, answer, choices, metric) | {
            "kind": row.get("category", "")}
    for row in rows:
        found = attempt(question, row)
        yield 0, 0, ValueError(f"question {row['index']!r}: {found}") if isinstance(found, ValueError) else found


SAMPLE = re.compile(r"(.*?[^/.]*)\.?([^/]*)")  # cut at the first dot of the name, not of its folders: v1.0/7, jpg


def is_ours(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not os.path.basename(member.name).startswith("._")  # macOS's companion of a file


def read_tar(path: str):
    """webdataset: 7.jpg with 7.json (a record) or 7.txt (a caption) is record 7. Its files are neighbours."""
    # A tar has no directory like a zip: the headers of all members are read, once, and from then on the index knows
    # where each record is. "r:": a compressed tar has no such places, and may unpack to any size.
    stem, starts = None, array("q")
    with tarfile.open(path, "r:") as tar:
        while member := tar.next():
            tar.members = []  # TRAP: else the names of all members stay in memory, 1 KB each
            plain = (member.isfile() or member.isdir()) and not member.issparse() and not LEADS_OUT.search(member.name)
            require(plain, f"{path}: member {member.name[:100]!r} is a link, a device, sparse, or leads out of the "
                           "archive; pack plain files only")
            if is_ours(member) and SAMPLE.fullmatch(member.name)[1] != stem:
                stem = SAMPLE.fullmatch(member.name)[1]
                starts.append(member.offset)
        starts.append(tar.offset)
    for start, end in itertools.pairwise(starts):
        yield start, end, attempt(parse_sample, read_span(path, start, end))


def parse_sample(raw: bytes) -> dict:
    "The bytes of one record's members in a tar -> its row."
    files, stem = {}, ""
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for member in filter(is_ours, tar):
            stem, suffix = SAMPLE.fullmatch(member.name).groups()
            files[suffix.lower()] = tar.extractfile(member).read()
    pictures = [files[suffix] for suffix in sorted(files) if ("." + suffix).endswith(PICTURES)]
    row = parse_json(files.get("json", b"{}"), f"{stem}.json")
    require(isinstance(row, dict), f"{stem}.json is no object")
    require(pictures or "txt" not in files, f"{stem}.txt: a caption without its .jpg, .png or .webp next to it")
    require(files.keys() & {"json", "txt"}, f"{stem}: no {stem}.json or .txt next to it in the archive")
    if "txt" in files and not {"messages", "conversations", "question"} & row.keys():
        with named_errors(f"{stem}.txt"):
            row = {"caption": files["txt"].decode("utf-8-sig").strip()}  # without Windows' byte order mark
    return {"id": stem, **row, "images": pictures}


def read_folder(path: str):
    """A folder of pictures with metadata.jsonl, or with one sub-folder for each class."""
    #   metadata.jsonl   {"file_name": "7.jpg", "text": "A cat."} or {"file_name", "question", "answer"} per line
    #   cat/7.jpg        "What is this?" -> cat
    listing = os.path.join(path, "metadata.jsonl")
    if os.path.exists(listing):
        yield from read_json_rows(listing)
        return
    # glob passes over hidden ones, no pictures of the user's: .ipynb_checkpoints/7.jpg, or cat/._7.jpg, macOS's
    # companion of 7.jpg
    names = [name.replace(os.sep, "/") for form in ("*/*", "*/*/*") for name in glob.glob(form, root_dir=path)
             if name.lower().endswith(PICTURES + UNREAD)]
    require(any(name.count("/") == 1 for name in names),
            f"{path}: no metadata.jsonl here, and no sub-folders (one for each kind) with pictures in them")
    listed = all(name.startswith("images/") for name in names)
    require(not listed, f"{path}: all its pictures are in images/, as those of a .json or .jsonl are; give that file")
    for name in sorted(names, key=lambda name: name.split("/")):
        if name.lower().endswith(UNREAD):
            yield 0, 0, ValueError(f"{name}: pictures of this kind are not read; convert it to .jpg, or remove it")
        elif name.count("/") > 1:
            yield 0, 0, ValueError(f"{name}: lies too deep; move it up to {name.split('/')[0]}/, its kind's folder")
        else:
            yield 0, 0, {"id": name, "image": name, "question": CLASS_PROMPT, "answer": name.split("/")[0],
                         "metric": "exact"}


def parquet_to_tar(path: str) -> str:
    """A Hugging Face .parquet -> the same records as a .tar in the cache, made once, some rows at a time."""
    #   FineVision, the_cauldron  images [{bytes, path}], texts [{user, assistant}]
    #   LLaVA-OneVision-Data      image {bytes, path}, conversations [{from, value}];   captions: image, text or caption
    # A parquet has no place for a row: columns are compressed over thousands of rows. To read them in any order it
    # would be unpacked again and again; a tar has them ready.
    target = cache("parquet", fingerprint(path) + ".tar")
    if target.exists():
        return str(target)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow; run pip install pyarrow") from None

    def add(name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        tar.members = []
    number = 0
    say(f"{path}: its rows are laid out in {target}, once")
    try:
        with parquet.ParquetFile(path) as file, new_file(target) as out, tarfile.open(fileobj=out, mode="w") as tar:
            # TRAP: asked for all row groups at once, pyarrow keeps those that it has read: 2 GB for a file of 2 GB
            for row in (row for group in range(file.num_row_groups)
                        for batch in file.iter_batches(batch_size=32, row_groups=[group]) for row in batch.to_pylist()):
                pictures = row.pop("images", None) or [row.pop("image", None)]
                pictures = [picture["bytes"] or picture.get("path") if isinstance(picture, dict) else picture
                            for picture in pictures]
                pictures = [picture for picture in pictures if picture]  # None: a text-only row
                require(all(isinstance(picture, bytes) for picture in pictures), f"{path}, record {number}: a picture "
                        f"is only named, {str(pictures)[:70]}, but not in the file; give a .jsonl beside the pictures")
                if "texts" in row:  # no markers here: the pictures come first
                    row["messages"] = [{"role": role, "content": turn[role]} for turn in row.pop("texts")
                                       for role in ("user", "assistant")]
                    if row["messages"] and "<image>" not in str(row["messages"]):
                        row["messages"][0]["content"] = "<image>\n" * len(pictures) + row["messages"][0]["content"]
                for i, picture in enumerate(pictures):
                    add(f"{number}.{i:03}.jpg", picture)
                add(f"{number}.json", json.dumps(row, default=str).encode())
                number += 1
    except (ArrowException, OSError, KeyError, TypeError, AttributeError) as error:
        # pyarrow calls what it cannot read an OSError, too, but without a number: the others are the disk's.
        raise ValueError(f"{path}: cannot be laid out in {target} ({error}); make room there, or set GHOSTVIS_CACHE to "
                         "a folder on another disk" if getattr(error, "errno", None) else
                         f"{path}, record {number}: not a .parquet of images and texts ({error})") from None
    return str(target)


def fingerprint(*paths: str) -> str:
    "A name for the present content of files: it changes with their place, size or time."
    stats = [(os.path.abspath(path), s.st_size, s.st_mtime_ns) for path in paths for s in [os.stat(path)]]
    return hashlib.sha1(repr((1, stats)).encode()).hexdigest()[:24]  # 1: raise it if what is kept changes


def read_file(name: str, places: dict = {}) -> Records:
    "One file, or a folder of pictures."
    path = name
    with named_errors(name):
        if path.endswith(".parquet"):
            path = parquet_to_tar(path)
        # The reader, and what reads a row again from its bytes. None: rows stay in memory, as no row of a compressed
        # file can be read alone.
        if os.path.isdir(path):
            return index_records(name, path, read_folder, None, image_finder(path, places))
        kinds = {".tar": (read_tar, parse_sample), ".tsv": (read_tsv, None), ".gz": (read_json_rows, None),
                 ".json": (read_json_rows, json.loads), ".jsonl": (read_json_rows, json.loads)}
        require(path.endswith((".tsv", ".tar", *JSON_SUFFIXES)), f"{path}: " + (
            "unknown kind of file; give a .json, .jsonl, .tsv, .tar or .parquet, or a folder of pictures"
            if os.path.exists(path) else "no such file or folder, nor a public set (python data.py --download=list)"))
        kind = kinds[os.path.splitext(path)[1]]
        return index_records(name, path, *kind, image_finder(os.path.dirname(path), places))


def index_records(name: str, path: str, read, read_again, find) -> Records:
    """
    Every row is read and checked once. A large file's index is kept in the cache until the file or a zip beside it
    changes, so that the next run, and every other rank, starts at once. name: what the user calls the file, for
    messages; path: where it lies, also after it was laid out anew.
    """
    zips = map(str, sorted(Path(path).parent.glob("*.zip")))
    kept, rows = cache("index", fingerprint(path, *zips) + ".npz"), []

    def make(number: int, start: int, end: int, part: int) -> dict:
        row = attempt(read_again, read_span(path, start, end)) if read_again else rows[number]
        return read_row(instances_of(row)[part], f"{name}, record {number}", number, find)
    if read_again and kept.exists():
        with contextlib.suppress(*weights.BROKEN, ValueError, KeyError), np.load(kept) as saved:
            return Records(make, saved["spans"], saved["keys"], saved["counts"])
    spans, keys, counts, bad, started = array("q"), array("Q"), array("q"), [], time.time()
    for number, (start, end, row) in enumerate(tqdm(read(path), desc=f"reading {name}", delay=5, disable=None)):
        if not read_again:
            rows.append(row)
        for part, one in enumerate(instances_of(row)):
            record = attempt(read_row, one, f"{name}, record {number}", number, find)
            if isinstance(record, ValueError):
                bad.append(str(record))
                continue
            hashes = hash_keys(record)
            spans.extend((number, start, end, part))
            keys.extend(hashes)
            counts.append(len(hashes))
    spans = np.array(spans, dtype=np.int64).reshape(-1, 4)
    out = Records(make, spans, np.array(keys, dtype=np.uint64), np.array(counts, dtype=np.int64), bad)
    # Not kept where something is bad: it will be mended, perhaps in a folder whose changes we cannot see from here.
    if read_again and not bad and time.time() - started > 0.5:
        with contextlib.suppress(OSError), new_file(kept) as file:  # a full or read-only disk: next time, then
            np.savez(file, spans=out.spans, keys=out.keys, counts=out.counts)
    return out


def read_records(name, max_bad: float = 0.0) -> Records:
    """
    A file, folder, URL, recipe, or name-{000..127}.tar -> its records. Rows that are no records are left out and named,
    if they are at most the share max_bad of all; else the first of them is an error.
    """
    paths, places = locate(str(name))
    parts = [read_file(path, places) for path in paths]
    records, bad = parts[0], [line for part in parts for line in part.bad]
    if len(parts) > 1:  # shards, as one sequence
        joined = torch.utils.data.ConcatDataset(parts)
        records = Records(joined.__getitem__, np.arange(len(joined))[:, None], np.concatenate([p.keys for p in parts]),
                          np.concatenate([p.counts for p in parts]), bad)
    require(len(bad) <= max_bad * (len(bad) + len(records)), bad and bad[0] + (
        f" (and {len(bad) - 1} more; python data.py --data={name} names all)" if len(bad) > 1 else ""))
    for line in bad:
        say(f"skipped: {line}")
    require(len(records), f"{name}: " + (f"all of its {len(bad)} records are bad; they are named above" if bad else
                                         "the file is empty; was its download cut off?"))
    if share := re.search(r"@(0?\.\d+)$", str(name)):  # the same records every time
        chosen = random.Random("share").sample(range(len(records)), max(1, round(float(share[1]) * len(records))))
        records = records.select(np.isin(np.arange(len(records)), chosen))
    return records


# ----------------------------------------------------------------------------------------------------------------------
# Data from the web: a URL, or the name of a recipe (assets/recipes.json)

RECIPES = weights.read_json(Path(__file__).with_name("assets") / "recipes.json")


def fetch_file(url: str) -> str:
    "A file on any web server -> its path in the cache."
    place, mark, query = url.partition("?")
    parent, _, name = place.rpartition("/")
    # Another query may mean another file, so each has a folder of its own, whose name does not give a signature away.
    revision = hashlib.sha1(query.encode()).hexdigest()[:12] if query else ""
    return str(weights.fetch(weights.Repository(parent, revision, {name: weights.ANY}, "see the server",
                                                query=mark + query)) / name)


def fetch_recipe(name: str) -> tuple[list[str], dict]:
    "As locate, for a recipe."
    recipe = RECIPES[name]
    repository = weights.Repository(recipe["hub"], recipe["revision"],
                                    {file: tuple(known) for file, known in recipe["files"].items()}, recipe["licence"],
                                    mirror=recipe.get("mirror", ""))
    if weights.missing_files(repository, weights.folders(repository)[0]):
        say(f"{name}: {recipe['about']}; licence: {recipe['licence']}. Ahead of time: python data.py --download={name}")
    folder = weights.fetch(repository)
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
    name = re.sub(r"@0?\.\d+$", "", name)
    require(name != "world", "world: it is no file and has no end; as a part of a mixture give it a weight, world:0.1; "
                             "bench.py --what=eval takes it alone")
    if name in RECIPES:
        return fetch_recipe(name)
    names = [name]
    if shards := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name):  # name-{000..127}.tar
        start, first, last, end = shards.groups()
        names = [f"{start}{number:0{len(first)}}{end}" for number in range(int(first), int(last) + 1)]
        require(names, f"{name}: the second number is below the first")
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


# ----------------------------------------------------------------------------------------------------------------------
# Text, for chapter 1

END = "<|endoftext|>"  # between two documents of a text file


def cut_documents(path: str):
    """A text file -> its documents: END separates them; without END, pieces of some thousand characters."""
    # TinyStories has separators, Shakespeare's plays have none. Uncut they would be one document, which can neither be
    # shuffled nor held out in part. utf-8-sig skips the byte order mark that Windows editors write first.
    with open(path, encoding="utf-8-sig") as file:
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


def text_files(path: str) -> list[str]:
    # sorted: a folder lists its files in another order on every disk, and a document is known by its number.
    # Hidden ones are not the user's: ._a.txt, macOS's companion of a.txt, or what editors keep in .ipynb_checkpoints/.
    inside = (one for one in Path(path).rglob("*") if not re.search(r"(^|/)\.", one.relative_to(path).as_posix()))
    paths = sorted(map(str, inside)) if os.path.isdir(path) else locate(path)[0]
    paths = [one for one in paths if one.endswith((".txt", *JSON_SUFFIXES))]
    require(paths, f"{path}: no text here; give a .txt, .json, .jsonl or .json.gz file, or a folder of them")
    return paths


def read_text(path):
    """.txt, .jsonl and .json.gz with {"text"}, .json with a list of strings, or a folder of them -> documents."""
    for path in text_files(str(path)):
        rows, found = cut_documents(path) if path.endswith(".txt") else map(itemgetter(2), read_json_rows(path)), False
        with named_errors(path):
            for index, row in enumerate(rows):
                if isinstance(row, dict):
                    row = None if row.keys() & {"image", "images", "file_name"} else row.get("text")
                require(isinstance(row, str), f"{path}, record {index}: " + (
                    str(row) if isinstance(row, ValueError) else "neither a string nor an object with a text"))
                if row.strip():
                    found = True
                    yield row
        require(found, f"{path}: the file is empty; was its download cut off?")


def token_file(path: str, encode, end: int) -> tuple[np.ndarray, np.ndarray]:
    "-> (the ids of all documents one after another, uint32; where each document ends in them)."
    def write_ids(file) -> array:
        ends = array("q")
        with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:  # tiktoken works outside of Python's lock
            texts = iter(tqdm(read_text(path), desc=f"tokens of {path}", delay=5, disable=None))
            while some := list(itertools.islice(texts, 100)):
                for ids in pool.map(encode, some):
                    ends.append((ends[-1] if ends else 0) + len(ids) + 1)
                    file.write(np.array(ids + [end], dtype=np.uint32))
        return ends
    files = text_files(path)
    with named_errors(path):
        if sum(map(os.path.getsize, files)) < BLOCK:
            ends = write_ids(memory := io.BytesIO())
            return np.frombuffer(memory.getbuffer(), np.uint32), np.array(ends)
        # The 500 million tokens of TinyStories are 2 GB in a file that is mapped into memory; as Python's ints they
        # would be 18. Another tokenizer gives other ids: a few words tell them apart.
        probe = repr(encode("The quick brown fox, 12 dogs; größer. def f(x):\n")) + str(end)
        kept = cache("tokens", hashlib.sha1((fingerprint(*files) + probe).encode()).hexdigest()[:24])
    ids_file, ends_file, whole = kept.with_suffix(".ids"), kept.with_suffix(".ends"), False
    with contextlib.suppress(OSError, IndexError):  # one was deleted, or cut short by a power cut
        whole = ids_file.stat().st_size == 4 * np.fromfile(ends_file, np.int64)[-1]
    if not whole:
        try:
            with new_file(ids_file) as file:
                ends = write_ids(file)
            with new_file(ends_file) as file:
                file.write(ends)
        except OSError as error:
            raise ValueError(f"{path}: its tokens cannot be kept in {ids_file} ({error}); make room there, or set "
                             "GHOSTVIS_CACHE to a folder on another disk") from None
    return np.memmap(ids_file, np.uint32, "r"), np.fromfile(ends_file, np.int64)


def read_text_records(path, encode, end: int, seq_len: int) -> Records:
    "Documents cut into records {\"ids\"} of at most seq_len + 1 tokens. `end`: the id that ends every document."
    # The last id of a piece is only a target there and is the first id of the next piece. So every token but a
    # document's first is a target exactly once. The pieces share one record id, so a split never separates them.
    ids, ends = token_file(str(path), encode, end)
    starts = np.concatenate([[0], ends[:-1]])
    pieces = -(-(ends - starts - 1) // seq_len)                                 # of each document, rounded up
    document = np.repeat(np.arange(len(ends)), pieces)                          # of each piece
    at = starts[document] + (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_len

    def make(number: int, begin: int, stop: int) -> dict:
        return {"id": f"{path} document {number}", "images": [], "ids": ids[begin:stop].tolist()}
    keys = np.fromiter((hash_keys(make(number, 0, 0))[0] for number in range(len(ends))), np.uint64, len(ends))
    return Records(make, np.stack([document, at, np.minimum(at + seq_len + 1, ends[document])], axis=1),
                   np.repeat(keys, pieces), np.ones(len(document), dtype=np.int64))


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: record i, for any i from 0 on, is the same on every machine and every rank
# Arithmetic on i instead of iterators: a stopped iterator must repeat everything it gave before, or save its buffers.
# Here one integer is the whole state, and rank r of 4 takes r, r + 4, r + 8, ... without any communication.

class Shuffled:
    "Records of a file without end: every epoch in another order."

    def __init__(self, records, seed: int):
        self.records, self.seed = records, seed
        # Cached, since an order costs a shuffle of the whole file. Two: waiting documents may be of the last epoch.
        self.order = lru_cache(maxsize=2)(self.shuffle)

    def shuffle(self, epoch: int) -> array:
        # The seed is a text: seed + epoch would give epoch 0 of seed 1 the order of epoch 1 of seed 0.
        return array("I", random.Random(f"{self.seed}/{epoch}").sample(range(len(self.records)), len(self.records)))

    def __getitem__(self, i: int) -> dict:
        epoch, at = divmod(i, len(self.records))  # of 3 records, i = 7 is position 1 of epoch 2, both counted from 0
        return self.records[self.order(epoch)[at]]


class Mixture:
    """Several data sets in proportion to their weights: record i is of the set that is furthest behind its share."""

    def __init__(self, parts: list[tuple], max_bad: int = 0):
        # Weights 3 and 1 -> sets 0 0 1 0, 0 0 1 0, ... With random draws, all draws before i would have to be repeated
        # to know how far its set has come. A table of 1,000 draws, used again and again, tells it at once.
        self.sets, total = [part for part, _ in parts], sum(weight for _, weight in parts)
        counts, self.table = [0] * len(parts), []  # table: (set, how many of that set came before)
        for i in range(1000):
            k = max(range(len(parts)), key=lambda k: parts[k][1] / total * (i + 1) - counts[k])
            self.table.append((k, counts[k]))
            counts[k] += 1
        require(all(counts), f"--data: a weight of {min(weight for _, weight in parts):g} of {total:g} in all is too "
                             "small; of less than a thousandth nothing would be used")
        self.counts, self.max_bad = counts, max_bad  # max_bad: how many records may turn out to be broken

    def __getitem__(self, i: int) -> dict:
        rounds, at = divmod(i, len(self.table))
        k, before = self.table[at]
        return self.sets[k][rounds * self.counts[k] + before]  # each set's own records in order: none is left out


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """"a.json:2,b.json" -> [("a.json", 2.0), ("b.json", 1.0)]."""
    pairs = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon or re.search(r"[/\\&=]", weight):  # the colon of https://host/a.json?end=9:30Z&x, or of C:\a.json
            name, weight = part.strip(), "1"
        # float() alone would accept "nan" and "inf", and every share would be nan.
        require(name.strip() and re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0,
                f"{text!r}: expected NAME or NAME:WEIGHT, joined by commas, weights above 0; found {name!r}:{weight!r}")
        pairs.append((name.strip(), float(weight)))
    return pairs


def split_by_image(records: Records, fraction: float | None = None, at_most: int = 500) -> tuple[Records, Records]:
    """-> (train, held out), which share no picture. fraction: of the pictures."""
    # VQAv2 has five questions about each photo. Split by record, nearly every held-out photo would be in training too,
    # and the score would reward memory. A record without pictures counts as a picture of its own.
    if fraction is None:  # 5 % of 100 records would be 5 questions, and 4 of 5 right says nothing
        fraction = 0.05 if 0.05 * len(records) >= 50 else 0.2
    # In the order of their hashes: as good as random, but independent of the file's order and, unlike Python's hash(),
    # of the process. When records are added later, nearly all others stay on their side.
    keys, owner, n = records.keys, np.repeat(np.arange(len(records)), records.counts), len(records)
    pictures = np.unique(keys)
    chosen = keys <= pictures[max(1, round(fraction * len(pictures))) - 1]
    held = np.bincount(owner[chosen], minlength=n) > 0
    # A record with pictures a and b is held out because of a: now b is used, too. Another record with b and c would
    # show b in training; it goes to neither side.
    train = np.bincount(owner[np.isin(keys, keys[held[owner]])], minlength=n) == 0
    require(train.any(), f"{n} records with {len(pictures)} pictures or texts are too few to hold some out; give a "
                         "file by --val=")
    return records.select(train), records.select(held & (np.cumsum(held) <= at_most))


def questions_of(record: dict) -> list[dict]:
    "A held-out conversation -> a question to score for each answer in it: what was said and shown before it."
    messages = record.get("messages", [])
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if len(turns) < 2 or "metric" in record or "answer" in record:  # a benchmark says itself what is asked
        return [record]
    shown = list(itertools.accumulate(turn["content"].count("<image>") for turn in messages))
    return [record | {"id": f"{record['id']} turn {i}", "messages": messages[:i + 1],
                      "images": record["images"][:shown[i]]} for i in turns]


def read_any(name: str, world: World, count: int):
    "A part of --data, conversations or text -> its records; of the world, which has no end, the first `count`."
    if name == "world":
        return [world[i] for i in range(count)]
    # Chapter 1's kind of data: the first row is a text, not a conversation, and no picture's caption. Where even that
    # row is an error, reading will say what is wrong with it.
    pictures = os.path.isdir(name) and attempt(next, read_folder(name), None)  # beside them may lie a notes.txt
    texts = name.endswith(".txt") or isinstance(pictures, ValueError) and any(Path(name).rglob("*.txt"))
    if texts or not isinstance(pictures, tuple) and isinstance(attempt(next, read_text(name)), str):
        return ({"id": f"{name} document {i}", "text": text, "images": []} for i, text in enumerate(read_text(name)))
    return read_records(name, 1.0)


def tokenizer_texts(spec: str, seed: int, characters: int = 30_000_000) -> list[str]:
    "The first texts of --data, on which a tokenizer is trained, before a stage starts from random weights."
    texts = ["user\n", "assistant\n"] * 50  # these occur in every conversation: worth a token each
    for name, _ in parse_mixture(spec):
        left = characters  # of a large file a part is enough to find the frequent words
        records = read_any(name, World("text", seed=seed), 3000)
        for record in records.each() if isinstance(records, Records) else records:
            if isinstance(record, ValueError):  # the loader will name it
                continue
            texts += [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
            left -= len(texts[-1])
            if left < 0:
                break
    return texts


class BadRecords:
    "What is wrong with records that were left out. Each is named once; more than `limit` are an error."

    def __init__(self, limit: float):
        self.limit, self.lines = limit, set()

    def leave_out(self, error: ValueError) -> None:
        if str(error) not in self.lines:  # in the next epoch it is the same record
            self.lines.add(str(error))
            require(len(self.lines) <= self.limit, f"{error} ({len(self.lines)} bad records, {int(self.limit)} are "
                    "allowed: see --max_bad, and python data.py --check)")
            say(f"skipped, {len(self.lines)} of at most {int(self.limit)}: {error}")


def keep_good(records: list, bad: BadRecords) -> list[dict]:
    "The records whose pictures open, by the same rules as in training; in place of a record there may be its error."
    def open_all(record) -> None:
        if isinstance(record, Exception):
            raise record
        try:
            for source in record["images"]:
                if not isinstance(source, Scene):
                    open_source(source)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None
    problems = list(threads("pictures").map(partial(attempt, open_all), records))
    for problem in filter(None, problems):
        bad.leave_out(problem)
    return [record for record, problem in zip(records, problems) if not problem]


def load_data(spec: str, world: World, held_out_worlds: dict[str, World], seed: int, eval_size: int, val: str = "",
              read=None, max_bad: float = 0.0):
    """
    --data -> (endless training set, {name: at most eval_size held-out records}). Where the text says "world", training
    takes `world`, and every entry of held_out_worlds becomes a held-out set. Files are read by `read`. max_bad: the
    share of bad records that is left out; more are an error.
    """
    parts, held_out, total = [], {}, 0
    read = read or partial(read_records, max_bad=max_bad)
    for name, weight in parse_mixture(spec):
        if name == "world":
            parts.append((world, weight))
            held_out |= {split: [one[i] for i in range(eval_size)] for split, one in held_out_worlds.items()}
            continue
        records = read(name)
        # --val is for data that come with a split of their own. Else a part is held out, by picture.
        train, held = (records, read(val)) if val else split_by_image(records, at_most=eval_size)
        parts.append((Shuffled(train, seed), weight))
        total += len(train)
        # an error now, not after the training
        held = keep_good(list(itertools.islice(held.each(), eval_size)), BadRecords(max_bad * len(records)))
        require(held, f"{val or name}: not one of the records that are held out can be used; they are named above")
        held = [question for record in held for question in questions_of(record)][:eval_size]
        # and the first that train, unless they would have to be fetched: a wrong folder of pictures shows in a second
        keep_good([one for one in itertools.islice(train.each(), 500) if isinstance(one, ValueError)
                   or not str(one["images"][:1]).startswith("['http")], BadRecords(max_bad * len(records)))
        held_out["held_out"] = held if val else held_out.get("held_out", []) + held  # --val is one set for all files
        say(f"{name}: {len(train):,} of {len(records):,} records train, {len(held):,} questions are held out"
            + f" in {val}" * bool(val) + (": fewer than 50, so look at the interval of the score, not at the score"
                                          if len(held) < 50 else ""))
    return Mixture(parts, int(max_bad * total)), held_out


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
    pixels: list | None = None  # of its pictures, uint8 [3, S, S] each, where the loader opened them


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
    # Of a long conversation the last turns are left out; if even the first is too long, its end is cut off. + 1: the
    # last id is only ever a target, it takes no position in the row.
    messages = record["messages"]
    while len(ids) > seq_len + 1 and len(messages) > 3:
        messages = messages[:-2]
        ids, mask, slots = tokenizer.render(messages, image_tokens=image_tokens)
    record = record | {"images": record["images"][:len(slots)]}  # those of the turns that are left
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
def threads(work: str) -> ThreadPoolExecutor:
    "For \"batches\" one thread, for \"pictures\" those that decode them, started when first needed."
    # Two pools: in one, a batch could wait for pictures whose turn comes after it. Above 16 threads Python's lock is
    # the limit.
    return ThreadPoolExecutor(1 if work == "batches" else min(16, os.cpu_count()))


def collate(arrays: dict, packed: list[Document], load_pixels=None) -> dict:
    """pack's arrays as tensors, and the pictures' pixels. load_pixels(source, record) -> uint8 [3, S, S]."""
    # {source: (its index in pixels, a document, which of its pictures it is)}. A picture that several documents share,
    # as all answers to one question do in chapter 4, is decoded and later encoded once.
    sources = {}
    image_index = [sources.setdefault(source, (len(sources), doc, k))[0]
                   for doc in packed for k, source in enumerate(doc.record["images"])]
    # The last chance to notice: after this, a picture in another's place trains without any error.
    assert len(image_index) == sum(len(doc.slots) for doc in packed), \
        f"pictures and slots disagree near {packed[0].record['id']}"
    batch = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}

    def pixels_of(place: tuple) -> torch.Tensor:
        _, doc, k = place
        return load_pixels(doc.record["images"][k], doc.record) if doc.pixels is None else doc.pixels[k]
    closed = load_pixels and not isinstance(next(iter(sources), None), Scene)
    pixels = list((threads("pictures").map if closed else map)(pixels_of, sources.values()))  # as in Documents below
    batch["pixels"] = torch.stack(pixels) if pixels else None   # uint8 [n, 3, S, S]: a quarter of float32 to transfer
    batch["image_index"] = torch.tensor(image_index, dtype=torch.long)  # [m]: which of the n each slot shows
    batch["records"] = [doc.record["id"] for doc in packed]  # for messages
    return batch


def share_workers(asked: int, device: str, world_size: int, micro_batches: int) -> list[int]:
    "--workers -> the processes for each of a rank's loaders, one loader per micro-batch."
    forks = hasattr(os, "fork")  # where there is no fork (Windows), processes would have to be sent the whole data set
    require(asked <= 0 or forks, f"--workers={asked}: this system cannot fork processes; give --workers=0")
    if asked < 0:  # on a CPU the training itself needs all cores, and a thread has the next batch ready in time
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        asked = min(8, cores) if device == "cuda" and forks else 0
    loaders = max(1, micro_batches // world_size)
    return [asked // loaders + (i < asked % loaders) for i in range(loaders)]


class Documents(torch.utils.data.Dataset):
    "Records as documents with their pixels, CHUNK of them at once: what a loader's thread or worker processes make."
    CHUNK = 64  # records sent at once: one message for each would keep the main process busy

    def __init__(self, dataset, make_document, load_pixels, stride: int, workers: int):
        self.dataset, self.make_document, self.load_pixels, self.stride = dataset, make_document, load_pixels, stride
        # Pillow releases Python's lock while it decodes and resizes, so threads help, and map keeps the order. The
        # world's drawings are mostly Python, where threads would only slow each other down. Processes are several.
        drawn = all(isinstance(one, World) for one in getattr(dataset, "sets", [dataset]))
        self.each = map if drawn or workers else threads("pictures").map
        # What each worker is busy with, in shared memory: if the system kills it, this is all that is left.
        self.current = torch.full((max(workers, 1),), -1, dtype=torch.int64).share_memory_()

    def make(self, index: int) -> Document | None:
        if worker := torch.utils.data.get_worker_info():
            self.current[worker.id] = index
        return self.make_document(self.dataset[index], index)

    def open_pictures(self, item):
        if isinstance(item, Document):  # not an error, and not None
            if worker := torch.utils.data.get_worker_info():
                self.current[worker.id] = item.index
            sources = item.record["images"]
            item.pixels = [self.load_pixels(source, item.record) for source in sources]
            # The record is not kept: it may contain picture files. A hash, which all forks of a process make alike,
            # still tells which pictures are the same.
            item.record = {"id": item.record.get("id"), "images": [hash(source) for source in sources]}
        return item

    def chunk(self, first: int) -> list:
        "-> for each record a Document, None or a ValueError."
        indices = range(first, first + self.CHUNK * self.stride, self.stride)
        return list(self.each(partial(attempt, self.open_pictures), [attempt(self.make, index) for index in indices]))

    def __getitem__(self, first: int) -> tuple[list, np.ndarray, np.ndarray, torch.Tensor]:
        "A chunk as a worker process sends it: ids and masks in one array, pixels in one tensor, as each costs time."
        items = self.chunk(first)
        documents = [item for item in items if isinstance(item, Document)]
        tokens = [np.array([document.ids, document.mask], dtype=np.int32) for document in documents]  # [2, n] each
        pixels = [picture for document in documents for picture in document.pixels]
        for document in documents:
            document.ids = document.mask = document.pixels = None
        return (items, np.cumsum([part.shape[1] for part in tokens]), np.concatenate(tokens or [[]], axis=-1),
                torch.stack(pixels) if pixels else torch.zeros(0))

    def unpack(self, chunks):
        "What worker processes send -> one item after the other, documents with their ids and pixels."
        try:
            for items, ends, tokens, pixels in chunks:
                documents = [item for item in items if isinstance(item, Document)]
                pictures = iter(pixels.unbind())
                for document, (ids, mask) in zip(documents, np.split(tokens, ends, axis=-1)):
                    document.ids, document.mask = ids, mask
                    document.pixels = [next(pictures) for _ in document.record["images"]]
                yield from items
        except RuntimeError:
            for number, process in enumerate(chunks._workers):
                if code := process.exitcode:
                    record = self.dataset[int(self.current[number])]
                    raise ValueError(f"record {record.get('id')}: the loader's worker process that worked on it ended "
                                     f"with code {code} (-9: killed, mostly for want of memory; -7: /dev/shm is full); "
                                     "use fewer --workers, or --workers=0") from None
            raise


def start_worker(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal. The main process finishes its step and saves; it still needs batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: if the main process is killed, nothing of it may stay behind
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Loader:
    """
    An endless iterator of packed batches: the micro-batch number `micro_batch` of each step's `micro_batches`.
    make_document(record, index): see above (None: skip the record). load_pixels(source, record): see collate.
    prefetch: a thread prepares the next batch during a step. pin: into memory that a GPU copies from by itself.
    workers: processes that make the documents and open their pictures; 0: the thread does it. The batches are the same.
    A record that turns out to be bad is left out, named, and counted: more than dataset.max_bad are an error.
    """

    def __init__(self, dataset, make_document, load_pixels, rows, seq_len, image_tokens, micro_batch=0, micro_batches=1,
                 state=None, prefetch=True, pin=False, workers=0):
        self.rows, self.seq_len, self.image_tokens = rows, seq_len, image_tokens
        self.prefetch, self.pin = prefetch, pin
        # Micro-batch 1 of 4 takes records 1, 5, 9, ... Counted by micro-batches, not by GPUs: the data of a step are
        # the same however many GPUs share it.
        self.next, self.stride = (state["next"] if state else micro_batch), micro_batches
        self.documents = Documents(dataset, make_document, load_pixels, micro_batches, workers)
        self.pending = None  # the next batch, in preparation
        self.bad, self.waiting = BadRecords(getattr(dataset, "max_bad", 0)), []
        # What was a document when the run was stopped need not be one now: people mend and extend their data meanwhile.
        for item in [attempt(self.documents.open_pictures, attempt(self.documents.make, index))
                     for index in (state["waiting"] if state else [])]:
            if isinstance(item, Document):
                self.waiting.append(item)
            elif item is not None:
                self.bad.leave_out(item)
        chunks = itertools.count(self.next, self.stride * Documents.CHUNK)  # the number of each one's first record
        if workers:  # at once, and in the main thread: a fork copies the locks of other threads as they are, locked
            # Python looks for garbage now and then, through all objects that it has: a third of a second for those that
            # a compiled model leaves, in every fork. From here on it looks at new ones only.
            gc.collect()
            gc.freeze()
            self.iterator = iter(torch.utils.data.DataLoader(
                self.documents, batch_size=None, sampler=chunks, num_workers=workers, prefetch_factor=2,
                collate_fn=tuple,  # as it is; the default would send each array as a tensor, for a file handle more
                worker_init_fn=start_worker, multiprocessing_context="fork",
                generator=torch.Generator()))  # of its own: else it would draw from the one that samples answers
            # TRAP: at its end Python stops its children by SIGTERM, which these ignore, and would wait for ever.
            weakref.finalize(self, self.iterator._shutdown_workers)
            # PyTorch would end the training step in which a worker dies. The next batch finds it, too, and in order.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.items = self.documents.unpack(self.iterator) if workers else \
            itertools.chain.from_iterable(map(self.documents.chunk, chunks))

    def state(self) -> dict:  # {"next": 1201, "waiting": [1181, 1197]}: indices are enough, record i can be made again
        # As of the batches handed out. A prefetched one is not among them: a resumed run makes it again.
        return {"next": self.next, "waiting": [d.index for d in self.waiting]}

    def failure(self) -> Exception | None:
        "The error in which the preparation of the next batch ended, if it did. Waits for it."
        return self.pending.exception() if self.pending else None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        # result() raises the thread's error here, and again at every later call: the state has not moved on.
        batch, self.next, self.waiting = self.pending.result() if self.pending else self.prepare()
        if self.prefetch:
            self.pending = threads("batches").submit(self.prepare)
        return batch

    def prepare(self) -> tuple[dict, int, list[Document]]:
        """-> (the next batch, `next` and `waiting` after it). TRAP: it runs in a thread and must not change those."""
        new, tokens, at, skipped = [], sum(len(document.ids) for document in self.waiting), self.next, 0
        # 2 % more than the rows hold: each document's last id takes no position, and a few spare documents fill the
        # gaps at the rows' ends. Many more would only wait longer.
        while tokens < self.rows * self.seq_len * 1.02:
            item, at = next(self.items), at + self.stride
            if isinstance(item, Document):
                new.append(item)
                tokens, skipped = tokens + len(item.ids), 0
                continue
            if item is not None:
                self.bad.leave_out(item)
            # A few records that are too long are normal; if none fits, this loop would never end.
            skipped += 1
            require(skipped <= 1000, f"{skipped} records in a row do not fit into --seq_len={self.seq_len}; raise it")
        # Those that waited go first: sorted among the others, a short one could wait without end. Then long before
        # short, since short ones still fit into the gaps that long ones leave.
        documents = self.waiting + sorted(new, key=lambda document: -len(document.ids))
        arrays, packed, waiting = pack(documents, self.rows, self.seq_len, self.image_tokens)
        batch = collate(arrays, packed)
        if self.pin:  # from page-locked memory the copy to the GPU runs in the background; from other memory it blocks
            batch = {name: value.pin_memory() if torch.is_tensor(value) else value
                     for name, value in batch.items()}
        return batch, at, waiting


# ----------------------------------------------------------------------------------------------------------------------
# Flags, for every script

POSITIVE = ("batch_size", "seq_len", "steps", "lr", "eval_size", "samples", "max_new_tokens", "gpus", "keep",
            "max_bad_steps", "max_requests", "image_tokens")
NOT_NEGATIVE = ("max_bad", "micro_batch_size", "lora_rank", "temperature", "warmup", "cooldown", "top_k", "rehearse")


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a pipe on Windows cannot take every letter
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
        image = None if source is None else attempt(open_source, source, px - 8)  # a text-only record has no picture
        if isinstance(image, Image.Image):  # nor is there one that cannot be opened
            sheet.paste(image.resize((px - 8, px - 8)), (x + 4, y + 4))
        for row, (line, colour) in enumerate(texts):
            pen.text((x + 6, y + px + 18 * row), line, fill=colour, font=font)
    sheet.save(path)


def turns_of(record: dict) -> list[dict]:
    return record.get("messages") or [{"role": "", "content": record["text"]}]


def draw_records(path: str, records: list) -> None:
    "A contact sheet of records: the first picture and the first turns of each."
    draw_sheet(path, [next(iter(record["images"]), None) for record in records],
               [[(turn["content"].replace("<image>", "").strip(), "green" if turn["role"] == "assistant" else "black")
                 for turn in turns_of(record)[:3]] for record in records], columns=5)


def show_world(path: str) -> None:
    "A contact sheet of scenes, one question of each kind about the first ten of them, printed with its answer."
    exam, captions = World("exam", "scenes"), World("captions")
    records = [exam[i] for i in range(len(QUESTIONS))] + [captions[i] for i in range(20 - len(QUESTIONS))]
    draw_records(path, records)
    for number, record in enumerate(records[:len(QUESTIONS)], 1):  # record i of an exam is of the i-th kind
        question, answer = (message["content"] for message in record["messages"])
        print(f"{number:>3} {record['kind']:>9}: {question.removeprefix('<image>').strip()!r} -> {answer}")
    print(f"wrote {path}")


def check_data(flags) -> dict:
    """
    Every record and picture of --data (and --val) -> the counts, which are also the last line printed. Names each bad
    record. With --check tokens are counted, too, and check.png is drawn.
    """
    counts, bad, lengths, shown, drawn = Counter(records=0, images=0, turns=0, supervised_tokens=0), [], [], [], []
    seen, trained = {}, set()  # {hash of a record: the first that has it}; of the pictures and texts of --data
    tokenizer = flags.check and (Tokenizer.from_pretrained(flags.tokenizer) if flags.tokenizer else
                                 Tokenizer.train(tokenizer_texts(flags.data, 0, 3_000_000), 2048))
    parts = [(name, False) for name, _ in parse_mixture(flags.data)] + [(flags.val, True)] * bool(flags.val)
    for name, held_out in parts:
        records = read_any(name, World("chat"), 500)
        bad += getattr(records, "bad", [])
        numbers = itertools.count()
        if isinstance(records, Records):
            numbers, records = records.spans[:, 0], records.each()  # numbers in the file, where bad ones count, too
        for number, record in zip(numbers, tqdm(records, desc=f"checking {name}", delay=5, disable=None)):
            where = f"{name}, record {number}"
            try:
                if isinstance(record, ValueError):
                    raise record
                where += f" (id {record['id'][:60]!r})"
                counts.update(records=1, images=len(record["images"]), turns=len(record.get("messages", [])))
                pictures = [attempt(open_source, source) for source in record["images"]]
                # By content: "1.jpg" and "1 (copy).jpg" may be one picture, train/1.jpg and val/1.jpg need not be. Nor
                # need two texts be the same whose id is 0, their number in two files.
                keys = [hash((one.size, one.tobytes()) if isinstance(one, Image.Image) else repr(one))
                        for one in pictures or [turns_of(record)]]
                bad += [f"{where}: {problem}" for problem in problems_of(record, pictures, keys, where, seen)]
                if not held_out:
                    trained.update(keys)
                elif not trained.isdisjoint(keys):
                    bad.append(f"{where}: a picture or text of it is in --data, too")
                drawn += [record] * (len(drawn) < 20)
                line = count_tokens(record, tokenizer, flags, counts, lengths) if tokenizer else \
                    json.dumps({"id": record["id"], "messages": record.get("messages", record.get("text")),
                                "images": len(record["images"])}, ensure_ascii=False)
                shown += [line] * (line != "" and len(shown) < 3)
            except ValueError as error:
                bad.append(str(error) if name in str(error) else f"{where}: {error}")
    if drawn and flags.check:
        path = flags.out.replace("world.png", "check.png")
        draw_records(path, drawn)
        say(f"wrote {path}")
    print("\n".join(shown + [f"bad: {line}" for line in bad]))
    if lengths:
        print(f"tokens of a record: median {int(np.median(lengths))}, longest {max(lengths)}; {counts['cut']} of "
              f"{len(lengths)} are longer than --seq_len={flags.seq_len} and lose their last turns, "
              f"{counts['left_out']} do not fit at all")
    return {**counts, "bad": len(bad)}


def problems_of(record: dict, pictures: list, keys: list[int], where: str, seen: dict) -> list[str]:
    "What is wrong with a record that could be read. In place of a picture there may be the error that opening it was."
    bad, turns, answers = [], turns_of(record), record.get("answer", [])
    for image in pictures:
        if isinstance(image, ValueError):
            bad.append(str(image))
        elif min(image.size) < 4 or max(image.size) > 100 * min(image.size):
            bad.append(f"a picture of {image.width} x {image.height} pixels shows nothing")
    for turn in turns:
        if turn["role"] in ("user", "system") and not turn["content"].strip() and not record["images"]:
            bad.append("a question is empty")
        if found := re.search(r"<\|[a-z_]+\|>|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f]|\[INST\]|</?s>", turn["content"]):
            bad.append(f"{found[0]!r} in a text: a mark of another format, or a damaged letter")
        if turn["role"] == "assistant" and "<image>" in turn["content"]:
            bad.append("<image> in an answer: the model cannot draw")
    if record.get("choices") and not set([answers] if isinstance(answers, str) else answers) <= set(record["choices"]):
        bad.append(f"the answer {answers!r} is none of the choices")
    first = seen.setdefault(hash(repr((turns, keys))), where)
    return bad + [f"the same as {first}"] * (first != where)


def count_tokens(record: dict, tokenizer, flags, counts: Counter, lengths: list) -> str:
    """
    A record's tokens are added to the counts -> the record as the model reads it: pictures as [64 image tokens], the
    part that is learned in **stars**; "" if it does not fit.
    """
    document = make_document(record, 0, tokenizer, flags.image_tokens, 10 ** 9)
    require(document, "nothing in it is learned")
    lengths.append(len(document.ids) - 1)
    if "messages" in record:  # text is cut into pieces, of which none is lost
        counts["cut"] += lengths[-1] > flags.seq_len
        document = make_document(record, 0, tokenizer, flags.image_tokens, flags.seq_len)
        counts["left_out"] += document is None
    if document is None:
        return ""
    counts["supervised_tokens"] += sum(document.mask[1:])
    out, learned = "", False
    for (picture, mask), group in itertools.groupby(zip(document.ids, document.mask), lambda pair: (
            pair[0] == tokenizer.image_pad, bool(pair[1]))):
        ids = [token for token, _ in group]
        text = f"[{len(ids)} image tokens]" if picture else tokenizer.decode(ids, skip_special=False)
        out, learned = out + "**" * (mask != learned) + text, mask
    return (out + "**" * learned).replace("\n", "\\n")


def download(names: str, vision: str) -> None:
    "\"list\", or names joined by commas: fetch each, and print the folder it is in."
    if names == "list":
        for name, repository in weights.REPOSITORIES.items():
            print(f"{name:26} {repository.hub:43} {repository.licence}")
        for name, recipe in RECIPES.items():
            print(f"{name:26} {recipe['stage']}: {recipe['about']:37} {recipe['licence']}")
        return
    names = [name.strip() for name in names.split(",")]
    names += [vision] if vision and any(name.startswith("qwen2.5-") for name in names) else []
    for name in names:  # a typing error in the last name is found before the gigabytes of the first
        if name not in RECIPES:
            weights.find_repository(name)
    for name in dict.fromkeys(names):
        print(f"{name} {Path(locate(name)[0][0]).parent if name in RECIPES else weights.fetch(name)}", flush=True)


FLAGS = {
    "data": ("world", "world, or what to check: files, folders, URLs, recipes, joined by commas"),
    "val": ("", "with --check: held-out records, which must not be in --data"),
    "check": (False, "open every picture, count tokens, draw check.png"),
    "seq_len": (2048, "with --check: tokens per row, to count what does not fit"),
    "image_tokens": (64, "with --check: tokens per picture"),
    "tokenizer": ("", "with --check: a folder with a tokenizer; empty: one that is trained on --data"),
    "out": ("world.png", "where the contact sheet goes; of --check: check.png"),
    "download": ("", "what to fetch: names joined by commas; list shows them"),
    "vision": (weights.DEFAULT_VISION, "fetched along with any qwen2.5-*; empty: none"),
}


def main() -> None:
    flags = parse_flags(__doc__, FLAGS)
    # Now, not after an hour of reading.
    require(flags.out.lower().endswith(PICTURES) and Path(flags.out).parent.is_dir(),
            f"--out={flags.out}: give a picture's name, such as sheet.png, in a folder that exists")
    if flags.download:
        download(flags.download, flags.vision)
    elif flags.data == "world" and not flags.check:
        show_world(flags.out)
    else:
        result = check_data(flags)
        print(json.dumps(result))
        require(not result["bad"], "1 of the records is bad; mend or remove it" if result["bad"] == 1 else
                f"{result['bad']} of the records are bad; mend or remove them")


if __name__ == "__main__":
    run(main)
