"""
Readers of files: JSON lists and lines, .tsv, .tar, .parquet, a folder of pictures -> rows, and an index of where each
row is. Called by recipes.py. A reader of the lessons need not know it.
"""
import ast
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import time
from array import array
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from tqdm import tqdm

from plumbing.files import BROKEN, attempt, cache, fingerprint, named_errors, new_file, parse_json, require, say
from plumbing.pictures import LEADS_OUT, PICTURES, UNREAD, image_finder
from plumbing.records import CHOICE_PROMPT, CLASS_PROMPT, SHORT_PROMPT, Records, hash_keys, instances_of, read_row

# A reader is a generator of (start, end, row): the bytes of the file from which the row can be read again (0, 0 where
# rows stay in memory). In place of a row there may be a ValueError: it is bad, the others go on.

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
        with contextlib.suppress(*BROKEN, ValueError, KeyError), np.load(kept) as saved:
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
