"""
Text for chapter 1: files of text -> documents -> pieces of at most seq_len tokens, kept as ids in a file that is mapped
into memory. Called by train_base.py. A reader of the lessons need know only `read_text_records`.
"""
import contextlib
import hashlib
import io
import itertools
import os
import re
from array import array
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.files import attempt, cache, fingerprint, named_errors, new_file, require
from plumbing.formats import BLOCK, JSON_SUFFIXES, read_json_rows
from plumbing.recipes import locate
from plumbing.records import Records, hash_keys, pictures_of

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
    paths = [one for one in paths if one.lower().endswith((".txt", *JSON_SUFFIXES))]
    require(paths, f"{path}: no text here; give a .txt, .json, .jsonl or .json.gz file, or a folder of them")
    return paths


def read_text(path):
    """.txt, .jsonl and .json.gz with {"text"}, .json with a list of strings, or a folder of them -> documents."""
    for path in text_files(str(path)):
        rows, found = cut_documents(path), False
        if not path.lower().endswith(".txt"):
            rows = map(itemgetter(2), read_json_rows(path))
        with named_errors(path):
            for index, row in enumerate(rows):
                if isinstance(row, dict):  # what is beside a picture is a caption; a web page may have links
                    alone = attempt(pictures_of, row, ("source", "link", "url", "meta", "metadata")) == ([], [])
                    row = row.get("text") if alone else None
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
