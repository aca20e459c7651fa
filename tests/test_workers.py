"Loader workers: the same batches for any number of them; bad records and dead workers by name."
import os
import re
import signal

from data import Loader, Mixture, Shuffled, pixel_loader
from plumbing.recipes import read_records
from plumbing.world import World
from tests.helpers import (chat_model, document, equal_batches, fails, image_bytes, plain_records, render, tiny_vlm,
                           wait_until)

pytest_plugins = ["tests.helpers"]  # its fixtures


def loader_of(records, workers=0, state=None, vlm=tiny_vlm(), **options) -> Loader:
    return Loader(records, lambda record, i: render(record, i, vlm, 100), pixel_loader(vlm.config.vision), 2, 100, 4,
                  state=state, workers=workers, **options)


def picture_records(n: int, broken=()) -> list[dict]:
    "Record i has a picture of its own; those in `broken` cannot be opened."
    return [chat_model("<image>what is this?", "a red cat " * (1 + i % 5), images=[
        image_bytes((i, 9, 9)) if i not in broken else b"no picture %d" % i]) | {"id": f"r{i}"} for i in range(n)]


def test_the_batches_are_the_same_for_any_number_of_workers_and_from_any_state(own_data):
    broken = range(0, 40, 3)
    zipped = read_records(str(own_data / "zip/zip.json"))  # one open file for all the processes
    dataset = Mixture([(Shuffled(picture_records(40, broken), 0), 1), (World("chat"), 1), (Shuffled(zipped, 0), 1)],
                      len(broken))
    plain = loader_of(dataset)
    expected, states = [], []
    for _ in range(9):
        expected.append(next(plain))
        states.append(plain.state())
    for workers in (1, 2):
        loader = loader_of(dataset, workers)
        for batch, state in zip(expected, states):
            assert equal_batches(next(loader), batch) and loader.state() == state
        resumed = loader_of(dataset, workers, states[3])
        assert all(equal_batches(next(resumed), batch) for batch in expected[4:])
        processes = [*loader.iterator._workers, *resumed.iterator._workers]
        del loader, resumed  # and with the loaders their processes
        wait_until(lambda: not any(process.is_alive() for process in processes), 20)
    lines = plain.bad.lines
    assert lines and {int(re.match(r"record r(\d+):", line)[1]) for line in lines} <= set(broken)


def test_a_bad_record_is_skipped_and_named_and_too_many_end_the_run(capsys):
    dataset = Mixture([(Shuffled(picture_records(120, broken=[60]), 0), 1)], 1)
    for workers in (0, 2):
        loader = loader_of(dataset, workers)
        for _ in range(60):
            next(loader)
        said = capsys.readouterr().err
        assert said.count("record r60:") == 1 and "skipped, 1 of at most 1: record r60" in said
        dataset.max_bad = 0
        strict = loader_of(dataset, workers)
        assert fails(lambda: [next(strict) for _ in range(60)], "record r60", "--max_bad")
        dataset.max_bad = 1


def test_a_workers_death_names_its_record():
    def make(record, index):
        if index == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return document(range(5), index=index)
    loader = Loader(plain_records(1000), make, None, 2, 16, 4, workers=2)
    assert fails(lambda: [next(loader) for _ in range(1000)], "record 100: ", "-9", "--workers=0")
