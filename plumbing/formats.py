"""
Readers of files: JSON, tables, .tar, .parquet, a folder of pictures -> rows, and an index of where each row is. Called
by recipes.py. A reader of the lessons need not know it.
"""
import ast
import contextlib
import csv
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

from plumbing.files import (BROKEN, attempt, cache, fingerprint, named_errors, new_file, parse_json, read_json, require,
                            say)
from plumbing.folders import LISTINGS, read_folder, what_is_there
from plumbing.pictures import LEADS_OUT, MEDIA, PICTURES, UNREAD, image_finder
from plumbing.records import TURNS, Records, hash_keys, instances_of, kind_of, read_row
from plumbing.scoring import QUESTIONS, benchmark_row

# A reader is a generator of (start, end, row): the bytes of the file from which the row can be read again (0, 0 where
# rows stay in memory). In place of a row there may be a ValueError: it is bad, the others go on.

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz")

BLOCK = 2 ** 24  # bytes of a file that are read at once


def read_json_rows(path: str):
    """A JSON list, or one JSON value after the other, mostly one per line -> its items, without all of it in memory."""
    # In Latin-1 every byte is one letter, so the decoder's places in the text are places in the file, and what
    # structures JSON is ASCII in any case. Only items that hold other letters are decoded again, from UTF-8.
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n,]*").match
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
        text, at, line = file.read(BLOCK).decode("latin-1"), 0, 1  # text begins at byte `at` of the file, in this line
        require(not text.startswith(("\xff\xfe", "\xfe\xff")), f"{path}: is in UTF-16; save it in UTF-8")
        i = gap(text, 3 * text.startswith("\xef\xbb\xbf")).end()  # Windows editors begin with a byte order mark
        # The content decides, not the file's name: POPE's .json files hold one object per line.
        is_list = text.startswith("[", i)
        i, first = gap(text, i + is_list).end(), not is_list  # i: up to here the text is used up
        while not (is_list and text.startswith("]", i)):
            try:
                row, end = decode(text, i)
                if not text.isascii() and not text[i:end].isascii():
                    row = json.loads(text[i:end].encode("latin-1"))
                after = gap(text, end).end()
                more = after == len(text)  # 12 may be the beginning of 123; and is this all that there is?
            except (ValueError, RecursionError) as error:
                # Is the item wrong, or does it only continue in the next block? A string is reported at its start.
                row, pos, reason = error, getattr(error, "pos", i), getattr(error, "msg", str(error))
                more = isinstance(error, json.JSONDecodeError) and (
                    pos > len(text) - 2 ** 16 or "Unterminated" in reason)
            # twice as much each time: a long item stays cheap
            if block := more and file.read(max(BLOCK, len(text) - i)):
                at, line = at + i, line + text.count("\n", 0, i)
                text = text[i:] + block.decode("latin-1")
                i = gap(text).end()
                continue
            if isinstance(row, Exception):
                if i == len(text) and not is_list:
                    return
                row = ValueError(f"line {line + text.count(chr(10), 0, pos if is_list else i)} (a line holds a whole "
                                 f"record, or the file a list of them): not valid JSON ({reason}); is the file "
                                 "complete, and in UTF-8?")
                require(not is_list, f"{path}, {row}")
                end = text.find("\n", i) % (len(text) + 1)  # the next line may be right
                after = gap(text, end).end()
            if first and more and isinstance(row, dict):
                try:
                    yield from ((0, 0, one) for one in rows_of_object(row, path))
                except (KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}: it looks like COCO or VQAv2, but a row lacks {error}") from None
            else:
                yield at + i, at + end, row
            i, first = after, False
        rest = text[i + 1:] + file.read(BLOCK).decode("latin-1")
    line += text.count("\n", 0, i) + rest.count("\n", 0, len(rest) - len(rest.lstrip()))
    require(not rest.strip(), f"{path}, line {line}: something follows the end of the list, as after `cat a.json "
                              "b.json`; put all records into one list, or one on each line")


def rows_of_object(whole: dict, path: str):
    "A file that is one object: a record, COCO's captions, VQAv2's questions -> rows; else what it seems to be is said."
    items = {key: one[0] for key, one in whole.items() if isinstance(one, list) and one and isinstance(one[0], dict)}
    year = "".join(re.findall(r"(?:train|val|test)\d{4}", os.path.basename(path))[:1])  # of captions_train2017.json
    if "question_id" in items.get("questions", ()):
        other = path.replace("OpenEnded_", "").replace("questions", "annotations")
        require(other != path and os.path.exists(other), f"{path}: the answers are in a file of their own; put it "
                                                         f"beside this one, {os.path.basename(other)}")
        right = {row["question_id"]: row for row in read_json(other)["annotations"]}
        for row in whole["questions"]:
            answer = right.get(row["question_id"], {"answers": []})
            # ten people's answers, the most frequent one first: that is learned
            some = [one["answer"] for one in answer["answers"]]
            some.sort(key=lambda one: one != answer["multiple_choice_answer"])
            picture = f"{year}/COCO_{year}_{row['image_id']:012}.jpg"
            yield benchmark_row(row["question_id"], picture, row["question"], some, metric="vqa")
    elif "caption" in items.get("annotations", ()) and "images" in items:
        captions = {}
        for row in whole["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"])
        for row in whole["images"]:
            picture = f"{year}/{row['file_name']}".lstrip("/")
            yield {"id": row["id"], "image": picture, "captions": captions.get(row["id"], [])}
    elif whole.keys() & {*TURNS, *QUESTIONS, "texts"} or not items and not all(
            isinstance(one, dict) for one in whole.values()):
        yield whole
    else:
        place = f"[{next(iter(items))!r}]" if items else ".values()"
        raise ValueError(f"{path}: one object" + (
            " that describes a data set; give the .parquet beside it" if "features" in whole else
            ": boxes or answers of COCO; give its captions_*.json or *_questions.json" if "annotations" in items else
            ", in which the records are, and no list of them: python -c \"import json; json.dump(list(json.load(open("
            f"{path!r})){place}), open('rows.json', 'w'))\""))


# Part of a benchmark's file name -> the rule that scores it. The first match wins: DocVQA is not scored like VQA.
FILE_METRICS = {"chartqa": "relaxed", "docvqa": "anls", "infovqa": "anls", "ocrvqa": "exact", "ocrbench": "contains",
                "vqa": "vqa", "pope": "yesno"}


def read_table(path: str):
    """A table with names above it: image,caption; question and answer; Flickr's image_name| comment_number| comment."""
    csv.field_size_limit(2**31 - 1)  # Python stops at 128 KB, less than one picture
    with open(path, newline="", encoding="utf-8-sig") as file:  # newline="": a quoted question may hold line breaks
        head = file.readline()
        mark = max(",;|\t", key=head.count)
        file.seek(0)
        # strict: else a lost quote makes one text of all rows up to the next one
        quoting = csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL
        reader = csv.reader(file, delimiter=mark, quoting=quoting, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; put a text with quotes in it in quotes, and "
                             "double its own") from None
    names = [name.strip() for name in rows.pop(0)] if rows else []
    require(not any(map(kind_of, names)), f"{path}: its first line must hold the columns' names, such as image,caption")
    again = [name for name in names if name and names.count(name) > 1]
    require(not again, f"{path}: several columns are called {again[:1]}; give each a name of its own")
    if mark == "\t" and {"index", "question"} <= {*names}:
        yield from read_benchmark(path, names, rows)
        return
    for row in filter(None, rows):
        cells = {name: cell.strip() for name, cell in zip(names, row) if cell.strip()}
        yield 0, 0, cells if len(row) == len(names) else ValueError(
            f"{len(row)} cells under {len(names)} names; put a text with {mark!r} in it in quotes")


def listed(text: str) -> str | list:
    "\"['5', 'five']\" is two right answers, \"[sic\" just text. VLMEvalKit calls eval, which would run any code."
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return [str(one) for one in ast.literal_eval(text)] if text.startswith("[") else text
    return text


def read_benchmark(path: str, names: list, rows: list):
    """VLMEvalKit's benchmarks: one question per row."""
    #   index  image        question         A    B    answer
    #   7      /9j/4AAQ...  What is it?      cat  dog  B              the picture in base64: letters for bytes
    #   8      7            What colour?               ['red', 'wine']  the picture of row 7; either answer is right
    missing = {"image", "answer"} - {*names}
    require(not missing, f"{path}: no column {', '.join(sorted(missing))}; without right answers nothing can be scored")
    # An empty cell, as for options C and D of a two-way question, is "", and so is one that lacks at the end of a row.
    rows = [dict(itertools.zip_longest(names, row[:len(names)], fillvalue="")) for row in rows if row]
    name = os.path.basename(path).lower()
    # A file may have any name (MME, HallusionBench, your own): then the answers tell which rule fits.
    metric = "yesno" if all(row["answer"].lower() in ("yes", "no") for row in rows) else "exact"
    metric = next((rule for part, rule in FILE_METRICS.items() if part in name), metric)
    pictures = {row["index"]: row["image"] for row in rows if len(row["image"]) > 64}  # none is that small

    def question(row: dict) -> dict:
        image, answer = pictures.get(row["index"]) or pictures.get(row["image"]), listed(row["answer"])
        require(image, f"image {row['image'][:70]!r} is neither base64 nor the index of a row with one")
        choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        require(answer and (not choices or answer in choices), f"answer {answer!r} is empty or no option")
        several = listed(image)
        several = {"images": f"data:;base64,{image}"} if isinstance(several, str) else {
            "images": None} | {f"image_{i}": f"data:;base64,{one}" for i, one in enumerate(several, 1)}
        asked = "\n".join(filter(None, (row.get("hint"), row["question"])))
        return benchmark_row(row["index"], None, asked, answer, choices, metric) | several | {
            "kind": row.get("category", "")}
    for row in rows:
        found = attempt(question, row)
        yield 0, 0, ValueError(f"question {row['index']!r}: {found}") if isinstance(found, ValueError) else found


SAMPLE = re.compile(r"(.*?[^/.]*)\.?([^/]*)")  # cut at the first dot of the name, not of its folders: v1.0/7, jpg


def read_span(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:  # opened each time: processes and threads that share a file share its position
        file.seek(start)
        return file.read(end - start)


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
    if "row" in files:  # one of parquet_to_tar
        return {"id": stem} | parse_json(files["row"], stem, object_hook=lambda one: files.get(one.get(BYTES), one))
    other = [suffix for suffix in files if ("." + suffix).endswith(UNREAD + MEDIA)]
    require(not other, f"{stem}.{' '.join(other)}: files of this kind are not read; convert it to .jpg, or remove it")
    pictures = [files[suffix] for suffix in sorted(files) if ("." + suffix).endswith(PICTURES)]
    row = parse_json(files.get("json", b"{}"), f"{stem}.json")
    require(isinstance(row, dict), f"{stem}.json is no object")
    require(pictures or "txt" not in files, f"{stem}.txt: a caption without its .jpg, .png or .webp next to it")
    require(files.keys() & {"json", "txt"}, f"{stem}: no {stem}.json or .txt next to it in the archive")
    if "txt" in files and not {*TURNS, *QUESTIONS} & row.keys():
        with named_errors(f"{stem}.txt"):
            row = {"caption": files["txt"].decode("utf-8-sig").strip()}  # without Windows' byte order mark
    return {"id": stem, **row, "images": pictures}


BYTES = "\0bytes"  # in a row of parquet_to_tar, {BYTES: "000.jpg"} stands for the bytes of this file of the tar


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
        info = tarfile.TarInfo(f"{number}.{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        tar.members = []

    def lay_out(value):
        "What JSON cannot say: bytes become files of the tar; times and the like texts."
        if not isinstance(value, bytes):
            return str(value)
        files.append(f"{len(files):03}.jpg")
        add(files[-1], value)
        return {BYTES: files[-1]}
    number = 0
    say(f"{path}: its rows are laid out in {target}, once")
    try:
        with parquet.ParquetFile(path) as file, new_file(target) as out, tarfile.open(fileobj=out, mode="w") as tar:
            about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            names = {key: one["names"] for key, one in about.get("info", {}).get("features", {}).items()
                     if isinstance(one, dict) and one.get("_type") == "ClassLabel"}  # {"label": ["cat", "dog"]}
            # TRAP: asked for all row groups at once, pyarrow keeps those that it has read: 2 GB for a file of 2 GB
            for row in (row for group in range(file.num_row_groups)
                        for batch in file.iter_batches(batch_size=32, row_groups=[group]) for row in batch.to_pylist()):
                files = []
                row |= {key: some[row[key]] for key, some in names.items() if row[key] in range(len(some))}
                add("row", json.dumps(row, default=lay_out).encode())
                number += 1
    except (ArrowException, OSError, KeyError, TypeError, AttributeError) as error:
        # pyarrow calls what it cannot read an OSError, too, but without a number: the others are the disk's.
        raise ValueError(f"{path}: cannot be laid out in {target} ({error}); make room there, or set GHOSTVIS_CACHE to "
                         "a folder on another disk" if getattr(error, "errno", None) else
                         f"{path}, record {number}: not a .parquet of images and texts ({error})") from None
    return str(target)


def read_file(name: str, places: dict = {}) -> Records:
    "One file, or a folder of pictures."
    path, folder = name, name if os.path.isdir(name) else os.path.dirname(name)
    with named_errors(name):
        if os.path.isdir(path):
            path = next(filter(os.path.exists, (os.path.join(path, one) for one in LISTINGS)), path)
        if path.lower().endswith(".parquet"):
            path = parquet_to_tar(path)
        if os.path.basename(folder).lower() == "annotations":  # as of COCO: the pictures are in folders beside it
            places = places | {"": os.path.dirname(os.path.abspath(folder))}
        # The reader, and what reads a row again from its bytes. None: rows stay in memory, as no row of a compressed
        # file can be read alone.
        kinds = {".tar": (read_tar, parse_sample), (".csv", ".tsv"): (read_table, None),
                 (".json.gz", ".jsonl.gz"): (read_json_rows, None),
                 (".json", ".jsonl", ".ndjson"): (read_json_rows, json.loads)}
        kind = (read_folder, None) if os.path.isdir(path) else next(
            (kind for ends, kind in kinds.items() if path.lower().endswith(ends)), None)
        require(kind, f"{path}: " + (
            "unknown kind of file; give a .json, .jsonl, .csv, .tsv, .tar or .parquet, or a folder of pictures"
            + what_is_there([path]) if os.path.exists(path) else
            "no such file or folder, nor a public set (python data.py --download=list)"))
        return index_records(name, path, folder, *kind, image_finder(folder, places))


def index_records(name: str, path: str, folder: str, read, read_again, find) -> Records:
    """
    Every row is read and checked once. A large file's index is kept in the cache until the file or a zip beside it
    changes, so that the next run, and every other rank, starts at once. name: what the user calls the file, for
    messages; path: where it lies, also after it was laid out anew; folder: where its pictures are.
    """
    zips = map(str, sorted(Path(folder).glob("*.zip")))
    kept, rows = cache("index", fingerprint(path, *zips) + ".npz"), {}

    def make(number: int, start: int, end: int, part: int) -> dict:
        row = rows[number] if number in rows else attempt(read_again, read_span(path, start, end))
        return read_row(instances_of(row)[part], f"{name}, record {number}", number, find)
    if read_again and kept.exists():
        with contextlib.suppress(*BROKEN, ValueError, KeyError), np.load(kept) as saved:
            return Records(make, saved["spans"], saved["keys"], saved["counts"])
    spans, keys, counts, bad, started = array("q"), array("Q"), array("q"), [], time.time()
    for number, (start, end, row) in enumerate(tqdm(read(path), desc=f"reading {name}", delay=5, disable=None)):
        if not (read_again and end):
            rows[number] = row
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
    if not rows and not bad and time.time() - started > 0.5:
        with contextlib.suppress(OSError), new_file(kept) as file:  # a full or read-only disk: next time, then
            np.savez(file, spans=out.spans, keys=out.keys, counts=out.counts)
    return out
