"""
People's files -> records -> packed batches. The way of one record to the loss, in the order in which it is called:

    read_records    a file's rows -> records {"id", "messages": [{"role", "content"}], "images": [source], ...}
                    (in plumbing/recipes.py; formats.py and records.py there do the work)
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
import gc
import itertools
import json
import os
import random
import re
import signal
import weakref
import zlib
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from plumbing.flags import parse_flags, run  # before torch: see plumbing/files.py

import numpy as np
import torch

from plumbing.drawing import draw_records
from plumbing.files import attempt, require, say
from plumbing.folders import holds_pictures
from plumbing.hub import REPOSITORIES, fetch, find_repository
from plumbing.pictures import PICTURES, open_source, picture_size
from plumbing.recipes import RECIPES, locate, read_records
from plumbing.records import Records, images_in, text_of
from plumbing.text import read_text
from plumbing.workers import Documents, start_worker, threads
from plumbing.strange import Drawing
from plumbing.world import QUESTIONS, World
from vision import DEFAULT_VISION, Tiles, ViTConfig, layout_of, to_pixels


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: record i, for any i from 0 on, is the same on every machine and every rank
# Skip at first reading, down to Documents: a record with its pictures is all that the lessons need to know of it.
# Arithmetic on i instead of iterators: a stopped iterator must repeat everything it gave before, or save its buffers.
# Here one integer is the whole state, and rank r of 4 takes r, r + 4, r + 8, ... without any communication.
# A record: {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
# "images": [source], and where the file has them "kind", "answer", "metric", "choices"}. A source is a path, a URL,
# a (zip file, member) pair, the bytes of a picture file, or a Drawing of the built-in world. It is opened only when its
# record is used: the 558,000 pictures of LLaVA's first stage fill 110 GB.

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
        record = self.records[self.order(epoch)[at]]
        if "captions" in record:  # of several captions of a picture one for each epoch
            one = random.Random(f"{self.seed}/{epoch}/{at}").choice(record["captions"])
            record = record | {"messages": [*record["messages"][:-1], {"role": "assistant", "content": one}]}
        return record


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
    # A comma of a name: "a,b.json" in quotes, or a\,b.json
    for part in re.split(r'(?<!\\),(?=(?:[^"]*"[^"]*")*[^"]*$)', text):
        name, colon, weight = part.strip().rpartition(":")
        if not colon or re.search(r'[/\\&="]', weight):  # the colon of https://host/a.json?end=9:30Z&x, or of C:\a.json
            name, weight = part.strip(), "1"
        name = re.sub(r'^"(.*)"$', r"\1", name.strip()).replace("\\,", ",")
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
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and "weight" not in turn]
    # a benchmark says itself what is asked
    if not messages or turns == [len(messages) - 1] or "metric" in record or "answer" in record:
        return [record]
    shown = list(itertools.accumulate(images_in(turn["content"]) for turn in messages))
    return [record | {"id": f"{record['id']} turn {i}", "messages": messages[:i + 1],
                      "images": record["images"][:shown[i]]} for i in turns]


def read_any(name: str, world: World, count: int):
    "A part of --data, conversations or text -> its records; of the world, which has no end, the first `count`."
    if name == "world":
        return [world[i] for i in range(count)]
    # Chapter 1's kind of data: the first row is a text, not a conversation, and no picture's caption. Where even that
    # row is an error, reading will say what is wrong with it.
    name = os.path.expanduser(name)
    folder = os.path.isdir(name)
    texts = name.lower().endswith(".txt") or folder and any(Path(name).rglob("*.txt"))
    # beside pictures may lie a notes.txt
    if not (folder and holds_pictures(name)) and (texts or isinstance(attempt(next, read_text(name)), str)):
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
            texts += [record["text"]] if "text" in record else [text_of(m["content"]) for m in record["messages"]]
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
                if not isinstance(source, Drawing):
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
        told = f"{name}: {len(train):,} of {len(records):,} "
        if "ids" in held[0]:  # chapter 1: no document has pieces on both sides
            documents = len({record["id"] for record in held})
            say(f"{told}pieces of text train, {len(held):,} are held out, of {documents:,} other documents"
                + f" in {val}" * bool(val))
            continue
        say(f"{told}records train, {len(held):,} questions are held out" + f" in {val}" * bool(val) + (
            ": fewer than 50, so look at the interval of the score, not at the score" if len(held) < 50 else ""))
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
    pixels: list | None = None  # of its pictures, uint8 [3, S, S] or Tiles each, where the loader opened them
    counts: list | None = None  # image tokens of each picture; None: see image_tokens in pack


def token_counter(config):
    """
    A VLM's configuration -> how many image tokens a picture has: one number for all, or, where large ones are cut into
    tiles, a function: a record -> the number of each of its pictures.
    """
    vision, bridge = config.vision, config.bridge

    def count(record: dict) -> list[int]:
        sizes = [picture_size(source, vision.image_size) for source in record["images"]]
        return [bridge.tokens_of(layout_of(*size, vision, alone=len(sizes) == 1)) for size in sizes]
    return count if vision.tiles else bridge.num_tokens


def make_document(record: dict, index: int, tokenizer, image_tokens, seq_len: int,
                  supervise_all: bool = False) -> Document | None:
    """
    A record -> its document, or None if it does not fit into a row of seq_len tokens. image_tokens: see token_counter.
    supervise_all: next-token prediction on everything, as in chapter 1, instead of on the assistant's words.
    """
    if "ids" in record or "text" in record:
        # Plain text: every token is supervised, also the one that ends the document.
        ids = record.get("ids") or tokenizer.encode(record["text"])[:seq_len] + [tokenizer.endoftext]
        return Document(index, ids, [1] * len(ids), [], record)
    messages, counts = record["messages"], image_tokens
    # Of a long conversation the last turns are left out; if even the first is too long, its end is cut off. + 1: the
    # last id is only ever a target, it takes no position in the row.
    while True:
        try:
            if callable(image_tokens):  # of the pictures that are left, since it may count how many there are
                shown = sum(images_in(turn["content"]) for turn in messages)
                counts = image_tokens(record | {"images": record["images"][:shown]})
            ids, mask, slots = tokenizer.render(messages, image_tokens=counts)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None
        if len(ids) <= seq_len + 1 or len(messages) <= 3:
            break
        messages = messages[:-2]
    record = record | {"images": record["images"][:len(slots)]}  # those of the turns that are left
    ids, mask = ids[:seq_len + 1], mask[:seq_len + 1]
    counts = counts if callable(image_tokens) else [counts] * len(slots)
    # Not without any supervised token (mask[1:]: the first id has nothing before it to be predicted from), and not with
    # a picture that is cut off.
    if not any(mask[1:]) or (slots and slots[-1] + counts[-1] > seq_len):
        return None
    return Document(index, ids, [1] * len(ids) if supervise_all else mask, slots, record, counts=counts)


def pixel_loader(config: ViTConfig):
    "-> a function (source, record) -> uint8 [3, S, S] or Tiles, as this ViT needs it; its errors name the record."
    def load_pixels(source, record: dict) -> torch.Tensor | Tiles:
        try:
            image = open_source(source, config.image_size)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None  # one of a million: say which
        return to_pixels(image, config, alone=len(record.get("images", [source])) == 1)
    return load_pixels


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
         image_tokens) -> tuple[dict, list[Document], list[Document]]:
    """
    -> (the arrays above, each [rows, seq_len], and three index lists; documents packed; documents without room).
    image_tokens: see token_counter; of documents that do not say it themselves.
    """
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
        if doc.counts is None:
            doc.counts = image_tokens(doc.record) if callable(image_tokens) else [image_tokens] * len(doc.slots)
        image_positions += [np.arange(k) + row * seq_len + at + slot for slot, k in zip(doc.slots, doc.counts)]
        packed.append(doc)
    batch = {"ids": ids, "targets": targets, "positions": positions, "document_ids": document_ids,
             "loss_weights": loss_weights,
             # where image tokens go in ids.flatten(), for all rows in one operation [K]
             "image_positions": np.concatenate(image_positions or [np.zeros(0, dtype=np.int64)]),
             # supervised positions in targets.flatten(): the loss computes logits for these only
             "supervised": np.flatnonzero(targets >= 0),
             "cu_seqlens": cumulative_lengths(document_ids) if max(count) > 1 else None}
    return batch, packed, waiting


# Skip at first reading: FlashAttention's form of document_ids.
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


def collate(arrays: dict, packed: list[Document], load_pixels=None) -> dict:
    """pack's arrays as tensors, and the pictures' pixels. load_pixels(source, record) -> uint8 [3, S, S] or Tiles."""
    # {(source, image tokens): (its index in pixels, a document, which of its pictures it is)}. A picture that several
    # documents share, as all answers to one question do in chapter 4, is decoded and later encoded once.
    sources = {}
    image_index = [sources.setdefault((source, *doc.counts[k:k + 1]), (len(sources), doc, k))[0]
                   for doc in packed for k, source in enumerate(doc.record["images"])]
    # The last chance to notice: after this, a picture in another's place trains without any error.
    assert len(image_index) == sum(len(doc.slots) for doc in packed), \
        f"pictures and slots disagree near {packed[0].record['id']}"
    batch = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}

    def pixels_of(place: tuple) -> torch.Tensor:
        _, doc, k = place
        return load_pixels(doc.record["images"][k], doc.record) if doc.pixels is None else doc.pixels[k]
    closed = load_pixels and not isinstance(next(iter(sources), [None])[0], Drawing)
    pixels = list((threads("pictures").map if closed else map)(pixels_of, sources.values()))  # as in Documents below
    batch["tiles"] = None
    if any(isinstance(one, Tiles) for one in pixels):  # some are several squares, of which each slot shows a whole run
        runs = np.cumsum([0] + [one.squares if isinstance(one, Tiles) else 1 for one in pixels])
        shapes = [replace(one, pixels=None) if isinstance(one, Tiles) else None for one in pixels]
        batch["tiles"] = [shapes[i] for i in image_index]
        image_index = [at for i in image_index for at in range(runs[i], runs[i + 1])]
        pixels = [square for one in pixels for square in (one.pixels if isinstance(one, Tiles) else [one])]
    batch["pixels"] = torch.stack(pixels) if pixels else None   # uint8 [n, 3, S, S]: a quarter of float32 to transfer
    batch["image_index"] = torch.tensor(image_index, dtype=torch.long)  # [m]: which of the n each slot shows
    batch["records"] = [doc.record["id"] for doc in packed]  # for messages
    return batch


# Skip at first reading: make_document, pack and collate for the next batch, while this one is computed.
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
        # how many records there are, and a number that tells others apart: for --resume
        sets = [part.records for part in getattr(dataset, "sets", []) if isinstance(part, Shuffled)]
        self.size = [sum(map(len, sets)), zlib.crc32(b"".join(one.keys for one in sets if isinstance(one, Records)))]
        was = (state or {}).get("records", self.size)
        if was != self.size and micro_batch == 0:
            say(f"--resume: the data have changed, {was[0]:,} records before, {self.size[0]:,} now; the run goes on "
                "with these")
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
        return {"next": self.next, "waiting": [d.index for d in self.waiting], "records": self.size}

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
            require(skipped <= 1000, f"{skipped} records in a row do not fit into --seq_len={self.seq_len}; raise it"
                    + ", or cut pictures into fewer --tiles" * callable(self.image_tokens))
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
# python data.py. Skip at first reading

def show_world(path: str) -> None:
    "A contact sheet of scenes, one question of each kind about the first ten of them, printed with its answer."
    exam, captions = World("exam", "scenes"), World("captions")
    records = [exam[i] for i in range(len(QUESTIONS))] + [captions[i] for i in range(20 - len(QUESTIONS))]
    draw_records(path, records)
    for number, record in enumerate(records[:len(QUESTIONS)], 1):  # record i of an exam is of the i-th kind
        question, answer = (message["content"] for message in record["messages"])
        print(f"{number:>3} {record['kind']:>9}: {question.removeprefix('<image>').strip()!r} -> {answer}")
    print(f"wrote {path}")


def download(names: str, vision: str) -> None:
    "\"list\", or names joined by commas: fetch each, and print the folder it is in."
    if names == "list":
        for name, repository in REPOSITORIES.items():
            print(f"{name:26} {repository.hub:43} {repository.licence}")
        for name, recipe in RECIPES.items():
            print(f"{name:26} {recipe['stage']}: {recipe['about']:37} {recipe['licence']}")
        return
    names = [name.strip() for name in names.split(",")]
    names += [vision] if vision and any(name.startswith("qwen") for name in names) else []
    for name in names:  # a typing error in the last name is found before the gigabytes of the first
        if name not in RECIPES:
            find_repository(name)
    for name in dict.fromkeys(names):
        print(f"{name} {Path(locate(name)[0][0]).parent if name in RECIPES else fetch(name)}", flush=True)


FLAGS = {
    "data": ("world", "world, or what to check: .json, .jsonl, .csv, .tsv, .tar, .parquet, .txt, folders of pictures "
                      "or of these, URLs, recipes; joined by commas"),
    "val": ("", "with --check: held-out records, which must not be in --data"),
    "check": (False, "open every picture, count tokens, draw check.png"),
    "model": ("tiny", "with --check: whose tokenizer, tokens per picture and rows count, as in train_sft.py"),
    "tiles": (int, "with --check: as in training"),
    "seq_len": (int, "with --check: tokens per row, to count what does not fit; not given: as the training takes"),
    "image_tokens": (int, "with --check: tokens per picture; not given: the model's"),
    "tokenizer": ("", "with --check: a folder with a tokenizer; empty: the model's, or one that is trained on --data"),
    "out": ("world.png", "where the contact sheet goes; of --check: check.png"),
    "download": ("", "what to fetch: names joined by commas; list shows them"),
    "vision": (DEFAULT_VISION, "fetched along with any qwen*; empty: none"),
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
        from extras.check import check_data  # here alone: a lesson needs none of it
        result = check_data(flags)
        print(json.dumps(result))
        require(not result["bad"], "1 of the records is bad; mend or remove it" if result["bad"] == 1 else
                f"{result['bad']} of the records are bad; mend or remove them")


if __name__ == "__main__":
    run(main)
