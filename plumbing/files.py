"""
Errors in one line, JSON, and files or folders that are replaced all at once, so that a crash never leaves half of one.
Called by nearly every other file. A reader of the lessons need know only `require(condition, problem)`: if the
condition does not hold, the program ends with this problem as its one line.
"""
import contextlib
import csv
import hashlib
import json
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

# PyTorch takes two seconds to import. Ctrl-C in that time, or later, ends a script in one line, without a traceback. So
# that it does, every script imports this file, or one that stands on it, before PyTorch.
sys.excepthook = lambda kind, *error: print("stopped", file=sys.stderr) if kind is KeyboardInterrupt else \
    sys.__excepthook__(kind, *error)


# ----------------------------------------------------------------------------------------------------------------------
# Errors and messages

# What Python raises for a file that is missing, cut short, or of another kind than its name says.
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, csv.Error, UnicodeDecodeError,
          json.JSONDecodeError)


def require(condition, problem: str) -> None:
    if not condition:  # not `assert`: `python -O` removes those
        raise ValueError(problem)


@contextlib.contextmanager
def named_errors(path):
    "Python's errors rarely say which file is missing, cut short or not text. Inside this block they do."
    try:
        yield
    except BROKEN as error:  # a plain ValueError is passed on: it already names the file
        raise ValueError(f"{path}: cannot be read ({error}); is it there, complete, and in UTF-8?") from None


def attempt(work, *arguments):
    "work(*arguments), or the ValueError that it ends in: one bad row of a million does not stop the others."
    try:
        return work(*arguments)
    except (ValueError, RecursionError) as error:
        return error


def say(text: str, every_rank: bool = False) -> None:
    "To standard error, once for all ranks, and not into the middle of a progress bar."
    if every_rank or os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# JSON

def parse_json(text: str | bytes, where, **options):
    "json.loads, with one kind of error: a hundred thousand open brackets are a RecursionError, 5,000 digits another."
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise ValueError(f"{where}: not valid JSON ({error}); is the file complete, and in UTF-8?") from None


def read_json(path) -> dict:
    with named_errors(path):
        content = parse_json(Path(path).read_bytes(), path)
    require(isinstance(content, dict), f"{path}: a JSON object in braces is expected here")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders that are replaced all at once

def setting(variable: str, default) -> Path:
    return Path(os.environ.get(variable) or default).expanduser()


def cache(*parts: str) -> Path:
    return setting("GHOSTVIS_CACHE", "~/.cache/ghostvis").joinpath(*parts)


def fingerprint(*paths: str) -> str:
    "A name for the present content of files: it changes with their place, size or time."
    stats = [(os.path.abspath(path), s.st_size, s.st_mtime_ns) for path in paths for s in [os.stat(path)]]
    return hashlib.sha1(repr((3, stats)).encode()).hexdigest()[:24]  # 3: raise it if what is kept changes


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


def recover(folder) -> Path:
    "If the last save stopped between its two renames, the only checkpoint is called FOLDER.old: give it its name back."
    place = Path(folder).resolve()  # FOLDER may be a link to a larger disk
    old = place.with_name(place.name + ".old")
    # FOLDER.new is never used: we cannot tell whether it is complete. At most one save is lost.
    if not place.exists() and old.exists():
        os.rename(old, place)
    return Path(folder)


@contextlib.contextmanager
def replace_folder(folder, drop=()):
    """
    Gives an empty FOLDER.new to be filled. After the block it takes the old folder's place, together with the old files
    that it lacks, except those in `drop`. After an error in the block, or a crash, the old folder is as it was.
    """
    # First recover, then remove leftovers: after an interrupted save the only whole folder may be the one named .old.
    folder = recover(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new  # an error in the block is raised here, and the rest of this function does not run
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # half a checkpoint may have gigabytes, and the disk is mostly full now
        raise
    if folder.exists():
        for file in folder.iterdir():  # such as log.jsonl, samples.png
            if not (new / file.name).exists() and file.name not in drop:
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        # Two renames, because one rename cannot replace a folder that has files in it. Each is done completely or not
        # at all. Between them the whole folder is called .old, and recover() finds it.
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)  # last: up to here there was always one whole folder
