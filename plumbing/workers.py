"""
Threads and processes that make documents and open their pictures while the GPU computes. Called by `Loader` in data.py.
A reader of the lessons need know only that the batches are the same for any number of workers.
"""
import ctypes
import itertools
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from plumbing.files import attempt, require
from plumbing.world import World


@lru_cache
def threads(work: str) -> ThreadPoolExecutor:
    "For \"batches\" one thread, for \"pictures\" those that decode them, started when first needed."
    # Two pools: in one, a batch could wait for pictures whose turn comes after it. Above 16 threads Python's lock is
    # the limit.
    return ThreadPoolExecutor(1 if work == "batches" else min(16, os.cpu_count()))


def share_workers(asked: int, device: str, world_size: int, micro_batches: int) -> list[int]:
    "--workers -> the processes for each of a rank's loaders, one loader per micro-batch."
    forks = hasattr(os, "fork")  # where there is no fork (Windows), processes would have to be sent the whole data set
    require(asked <= 0 or forks, f"--workers={asked}: this system cannot fork processes; give --workers=0")
    if asked < 0:  # on a CPU the training itself needs all cores, and a thread has the next batch ready in time
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        asked = min(8, cores) if device == "cuda" and forks else 0
    loaders = max(1, micro_batches // world_size)
    return [asked // loaders + (i < asked % loaders) for i in range(loaders)]


def is_document(item) -> bool:
    "Not None, which does not fit into a row, and not the error that making it was."
    return item is not None and not isinstance(item, Exception)


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

    def make(self, index: int):
        if worker := torch.utils.data.get_worker_info():
            self.current[worker.id] = index
        return self.make_document(self.dataset[index], index)

    def open_pictures(self, item):
        if is_document(item):
            if worker := torch.utils.data.get_worker_info():
                self.current[worker.id] = item.index
            sources = item.record["images"]
            item.pixels = [self.load_pixels(source, item.record) for source in sources]
            # The record is not kept: it may contain picture files. A hash, which all forks of a process make alike,
            # still tells which pictures are the same.
            item.record = {"id": item.record.get("id"), "images": [hash(source) for source in sources]}
        return item

    def chunk(self, first: int) -> list:
        "-> for each record its document, None or a ValueError."
        indices = range(first, first + self.CHUNK * self.stride, self.stride)
        return list(self.each(partial(attempt, self.open_pictures), [attempt(self.make, index) for index in indices]))

    def __getitem__(self, first: int) -> tuple[list, np.ndarray, np.ndarray, torch.Tensor]:
        "A chunk as a worker process sends it: ids and masks in one array, pixels in one tensor, as each costs time."
        items = self.chunk(first)
        documents = [item for item in items if is_document(item)]
        tokens = [np.array([document.ids, document.mask], dtype=np.int32) for document in documents]  # [2, n] each
        # A picture in tiles is several squares; what is left of it here tells how many.
        pixels = [square for document in documents for picture in document.pixels
                  for square in getattr(picture, "pixels", [picture])]
        for document in documents:
            document.ids = document.mask = None
            document.pixels = [None if torch.is_tensor(one) else replace(one, pixels=None) for one in document.pixels]
        return (items, np.cumsum([part.shape[1] for part in tokens]), np.concatenate(tokens or [[]], axis=-1),
                torch.stack(pixels) if pixels else torch.zeros(0))

    def unpack(self, chunks):
        "What worker processes send -> one item after the other, documents with their ids and pixels."
        try:
            for items, ends, tokens, pixels in chunks:
                documents = [item for item in items if is_document(item)]
                squares = iter(pixels.unbind())
                for document, (ids, mask) in zip(documents, np.split(tokens, ends, axis=-1)):
                    document.ids, document.mask = ids, mask
                    document.pixels = [next(squares) if one is None else replace(one, pixels=torch.stack(
                        list(itertools.islice(squares, one.squares)))) for one in document.pixels]
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
