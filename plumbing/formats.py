"""
Readers of files: JSON, tables, .tar, .parquet, a folder of pictures -> rows, and an index of where each row is. Called
by recipes.py. A reader of the lessons need not know it.
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

from plumbing.files import BROKEN, attempt, cache, fingerprint, named_errors, new_file, parse_json, read_json, require, say
from plumbing.pictures import LEADS_OUT, MEDIA, PICTURES, UNREAD, image_finder
from plumbing.records import CLASS_PROMPT, QUESTIONS, TURNS, Records, hash_keys, instances_of, read_row
from plumbing.scoring import benchmark_row

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
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
        head = file.read(2 ** 12)
        require(not head.startswith((b"\xff\xfe", b"\xfe\xff")), f"{path}: is in UTF-16; save it in UTF-8")
        at = 3 * head.startswith(b"\xef\xbb\xbf")  # Windows editors begin with a byte order mark
        file.seek(at)
        # The content decides, not the file's name: POPE's .json files hold one object per line.
        if head[at:].lstrip().startswith(b"["):
            yield from read_json_list(file, path, at)
            return
        first = file.readline()
        if not first.rstrip().endswith(b"}") or not file.peek(1):  # over several lines, or all that there is
            whole = attempt(json.loads, first + file.read(2 ** 30))
            if isinstance(whole, dict):
                yield from ((0, 0, row) for row in rows_of_object(whole, path))
                return
        file.seek(at)
        for number, line in enumerate(file, 1):  # line by line: a shard of C4 unpacks to 800 MB
            if line.strip():
                yield at, at + len(line), attempt(parse_json, line, f"line {number} (a line holds a whole record, or "
                                                                    "the file a list of them)")
            at += len(line)


def rows_of_object(whole: dict, path: str):
    "A file that is one object: COCO's captions, VQAv2's pair of files, a single record -> rows; else what it seems to be."
    place, split = Path(path).parent, re.search(r"(train|val|test)\d{4}", os.path.basename(path))
    held = {key: value for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    if whole.keys() & {*TURNS, *QUESTIONS, "texts"}:
        yield whole
    elif "questions" in held or "question_id" in held.get("annotations", [{}])[0]:
        name, asked = Path(path).name, "questions" in held
        other = place / (name.replace("OpenEnded_", "").replace("questions", "annotations") if asked else
                         name.replace("mscoco", "OpenEnded_mscoco").replace("annotations", "questions"))
        require(other.exists(), f"{path}: half of a set; put the other one beside it, {other.name}")
        questions, answers = [read_json(other), whole][::-1 if asked else 1]
        right = {row["question_id"]: row for row in answers["annotations"]}
        for row in questions["questions"]:
            name = f"COCO_{split and split[0]}_{row['image_id']:012}.jpg"
            # ten people's answers; the most frequent first: that one is learned
            some = sorted((one["answer"] for one in right[row["question_id"]]["answers"]),
                          key=lambda one: one != right[row["question_id"]]["multiple_choice_answer"])
            yield benchmark_row(row["question_id"], in_split(place, split, name), row["question"], some, metric="vqa")
    elif "images" in held and "caption" in held.get("annotations", [{}])[0]:
        captions = {}
        for row in whole["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"])
        for row in whole["images"]:
            yield {"id": row["id"], "image": in_split(place, split, row["file_name"]), "captions": captions.get(row["id"])}
    else:
        require("bbox" not in held.get("annotations", [{}])[0], f"{path}: boxes of COCO, in which there is nothing to read; "
                "give its captions_*.json")
        require("features" not in whole and "_data_files" not in whole, f"{path}: describes a data set, whose rows are in "
                "other files; give its .parquet, or save one by datasets.load_from_disk(...).to_parquet(...)")
        lists = [f"json.load(open({path!r}))[{key!r}]" for key in held] or [f"list(json.load(open({path!r})).values())"] * (
            len(whole) > 0 and all(isinstance(value, dict) for value in whole.values()))
        require(not lists, f"{path}: one object, and the records are inside; a line must hold a record, or the file a list "
                           f"of them: python -c \"import json; json.dump({lists[:1] and lists[0]}, open('rows.json', 'w'))\"")
        yield whole


def in_split(place: Path, split, name: str) -> str:
    "A picture's name with the folder of its split, train2017/7.jpg, where there is one beside the file or its folder."
    roots = [place, place.parent] if place.name.lower() == "annotations" else [place]
    found = split and any((root / form.format(split[0])).exists() for root in roots for form in ("{}", "images/{}", "{}.zip"))
    return f"{split[0]}/{name}" if found else name


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
    line += text.count("\n", 0, i)
    for text in itertools.chain([text[i + 1:]], iter(lambda: file.read(BLOCK).decode("latin-1"), "")):
        line += text.count("\n", 0, len(text) - len(text.lstrip()))
        require(not text.strip(), f"{path}, line {line}: something follows the end of the list, as after `cat a.json "
                                  "b.json`; put all records into one list, or one on each line")


def listed(text: str) -> str | list:
    "\"['5', 'five']\" is two right answers, \"[sic\" just text. VLMEvalKit calls eval here, which would run any code."
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return [str(one) for one in ast.literal_eval(text)] if text.startswith("[") else text
    return text


def read_csv(path: str):
    """Captions or questions in a table, with names above: image,caption or Flickr's image_name| comment_number| comment."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        mark = max(",;|\t", key=head.count)
        file.seek(0)
        names, *rows = csv.reader(file, delimiter=mark, quoting=csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL)
    for row in filter(None, rows):
        yield 0, 0, {name.strip(): cell.strip() for name, cell in zip(names, row) if cell.strip()} if len(row) == len(
            names) else ValueError(f"{len(row)} cells under {len(names)} names; put a text with {mark!r} in it in quotes")


def read_tsv(path: str):
    """VLMEvalKit's benchmarks: one question per row."""
    #   index  image        question         A    B    answer
    #   7      /9j/4AAQ...  What is it?      cat  dog  B              the picture in base64: letters for bytes
    #   8      7            What colour?               ['red', 'wine']  the picture of row 7; either answer is right
    csv.field_size_limit(2**31 - 1)  # Python stops at 128 KB, less than one picture
    with open(path, newline="", encoding="utf-8-sig") as file:  # newline="": a quoted question may hold line breaks
        rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    if rows and not {"index", "question"} <= rows[0].keys():
        yield from read_csv(path)
        return
    missing = {"index", "image", "question", "answer"} - set(rows[0]) if rows else ()
    require(not missing, f"{path}: no column {', '.join(sorted(missing))}; without right answers nothing can be scored")
    name = os.path.basename(path).lower()
    # A file may have any name (MME, HallusionBench, your own): then the answers tell which rule fits.
    metric = "yesno" if all(row["answer"].lower() in ("yes", "no") for row in rows) else "exact"
    metric = next((rule for part, rule in FILE_METRICS.items() if part in name), metric)
    pictures = {row["index"]: f"data:,{row['image']}" for row in rows if len(row["image"]) > 64}  # none is that small

    def question(row: dict) -> dict:  # an empty cell, as for options C and D of a two-way question, is ""
        image, answer = pictures.get(row["index"]) or pictures.get(row["image"]), listed(row["answer"])
        require(image, f"image {row['image'][:70]!r} is neither base64 nor the index of a row with one")
        choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        require(answer and (not choices or answer in choices), f"answer {answer!r} is empty or no option")
        asked = "\n".join(filter(None, (row.get("hint"), row["question"])))
        several = {f"image_{i}": f"data:;base64,{one}" for i, one in enumerate(listed(image[6:]), 1)} if image[6] == "[" else {}
        return benchmark_row(row["index"], None if several else image, asked, answer, choices, metric) | several | {
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
    if "row" in files:  # one of parquet_to_tar
        return {"id": stem} | fill(parse_json(files["row"], stem), files)
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


LISTINGS = "metadata.jsonl", "metadata.csv", "metadata.parquet"


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def look_into(path: str) -> tuple[list, list, set]:
    "-> (the files of a folder, at any depth; the pictures among them; texts beside a picture, without .txt)."
    # glob passes over hidden ones, no pictures of the user's: .ipynb_checkpoints/7.jpg, or cat/._7.jpg, macOS's
    # companion of 7.jpg
    names = sorted((name.replace(os.sep, "/") for name in glob.glob("**", root_dir=path, recursive=True)),
                   key=lambda name: name.split("/"))
    pictures = [name for name in names if name.lower().endswith(PICTURES + UNREAD + MEDIA)]
    return names, pictures, {*map(stem_of, pictures)} & {stem_of(name) for name in names if name.lower().endswith(".txt")}


def holds_pictures(path: str) -> bool:
    "Is it a folder of records, not of texts? A cover.jpg among texts does not make it one."
    names, pictures, captions = look_into(path)
    return bool(captions) or any("/" in name for name in pictures) or any(
        name in LISTINGS or name.endswith(".parquet") for name in names)


def read_folder(path: str):
    """A folder of pictures with one sub-folder for each kind, or with a caption beside each."""
    #   cat/7.jpg        "What is this?" -> cat
    #   7.jpg, 7.txt     "Describe the image." -> what the text says
    names, pictures, captions = look_into(path)
    flat = any("/" not in name for name in captions)
    if not flat:
        problem = not_kinds(path, names, pictures, captions)
        require(not problem, f"{path}: {problem}")
    for name in pictures:
        if name.lower().endswith(UNREAD + MEDIA):
            yield 0, 0, ValueError(f"{name}: files of this kind are not read; convert it to .jpg, or remove it")
        elif name.count("/") > (not flat):
            yield 0, 0, ValueError(f"{name}: lies too deep; move it up to {'' if flat else name.split('/')[0] + '/'}")
        elif flat:
            yield 0, 0, attempt(read_caption, path, name)
        elif "/" not in name:
            yield 0, 0, ValueError(f"{name}: lies beside the folders of kinds; move it into one of them, or away")
        else:
            yield 0, 0, {"id": name, "image": name, "question": CLASS_PROMPT, "answer": name.split("/")[0],
                         "metric": "exact"}
    for name in names if flat else ():
        if name.lower().endswith(".txt") and stem_of(name) not in captions:
            yield 0, 0, ValueError(f"{name}: a caption without its picture beside it; move it away")


def read_caption(path: str, name: str) -> dict:
    text = next((one for one in (stem_of(name) + end for end in (".txt", ".TXT")) if os.path.exists(os.path.join(path, one))), "")
    require(text, f"{name}: no {stem_of(name)}.txt with its caption beside it")
    with named_errors(text):
        return {"id": name, "image": name, "caption": Path(path, text).read_text(encoding="utf-8-sig").strip()}


def not_kinds(path: str, names: list, pictures: list, captions: set) -> str:
    "Why the sub-folders are not one for each kind, and the command that would be right; else empty."
    kinds = list(dict.fromkeys(name.split("/")[0] for name in pictures if "/" in name))
    if not kinds:
        return what_is_there(names) or ("no metadata.jsonl here, and no sub-folders (one for each kind) with pictures in "
                                        "them, nor captions (7.txt for 7.jpg)")
    if kinds == ["images"]:
        return "all its pictures are in images/, as those of a .json or .jsonl are; give that file"
    splits = [one for one in kinds if re.fullmatch(r"(train|val|test|dev|eval|valid|trainval)(ing|idation)?[ _-]?\d*",
                                                   one.lower())]
    inside = [one for one in kinds if any(f"{one}/{name}" in names for name in LISTINGS)
              or any(name.startswith(one + "/") for name in captions)]
    deep = [one for one in kinds if any(name.startswith(one + "/") and name.count("/") > 1 for name in pictures)]
    if len(kinds) > 1 and len(splits) < 2 and not inside:
        return ""
    own = inside or [one for one in deep if one in splits or len(kinds) == 1]
    if own:
        return f"{', '.join(kinds)} are no kinds; give --data={os.path.join(path, own[0])}" + "".join(
            f" --val={os.path.join(path, one)}" for one in own[1:2])
    listing = sorted((name for name in names if name.lower().endswith((*JSON_SUFFIXES, ".csv", ".tsv"))),
                     key=lambda name: "caption" not in name)
    return f"{', '.join(kinds)}: " + ("the names of splits, no kinds" if splits else "a single kind, so there is nothing to "
            "tell apart") + "; give " + (f"--data={os.path.join(path, listing[0])}" if listing else "a folder with one "
            "sub-folder for each kind, or write what they show in a metadata.jsonl")


# What people also give in place of records: the ends of names -> what to do.
THERE = {(".arrow",): "written by save_to_disk; write a .parquet: datasets.load_from_disk(FOLDER).to_parquet('x.parquet')",
         (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"): "a compressed .tar; unpack it (tar -xf), and give what is "
         "in it, or pack it again without compression", (".zip", ".7z", ".rar"): "an archive; unpack it, and give the file "
         "of records in it (pictures may stay in a .zip beside that)", (".xlsx", ".ods"): "a table; save it as .csv"}


def what_is_there(names: list) -> str:
    return next((f"{name} is {what}" for ends, what in THERE.items() for name in names if name.lower().endswith(ends)), "")


def fill(value, files: dict):
    "A row of parquet_to_tar, with the bytes in it again."
    if isinstance(value, str):
        return files.get(value[1:], value) if value.startswith("\0") else value
    return {key: fill(one, files) for key, one in value.items()} if isinstance(value, dict) else \
        [fill(one, files) for one in value] if isinstance(value, list) else value


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

    def lay_out(value):
        "Bytes become files of the tar; in the row remains the file's name, behind a zero byte."
        if isinstance(value, bytes):
            files.append(f"{len(files):03}.jpg")
            add(f"{number}.{files[-1]}", value)
            return "\0" + files[-1]
        return {key: lay_out(one) for key, one in value.items()} if isinstance(value, dict) else \
            [lay_out(one) for one in value] if isinstance(value, list) else value
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
                add(f"{number}.row", json.dumps(lay_out(row), default=str).encode())
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
        kinds = {".tar": (read_tar, parse_sample), ".tsv": (read_tsv, None), ".gz": (read_json_rows, None),
                 ".json": (read_json_rows, json.loads), ".jsonl": (read_json_rows, json.loads), ".csv": (read_csv, None)}
        if os.path.isdir(path):
            kind = read_folder, None
        else:
            require(path.lower().endswith((".tsv", ".tar", ".csv", *JSON_SUFFIXES)), f"{path}: " + (
                what_is_there([os.path.basename(path)]) or "unknown kind of file; give a .json, .jsonl, .csv, .tsv, .tar or "
                ".parquet, or a folder of pictures" if os.path.exists(path) else
                "no such file or folder, nor a public set (python data.py --download=list)"))
            kind = kinds[os.path.splitext(path.lower())[1]]
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
