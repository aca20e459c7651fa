"Two processes learn what one does, and gather what each has answered."
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from model import load_checkpoint
from plumbing.files import read_json
from plumbing.weights import read_safetensors
from plumbing.workers import threads
from tests.helpers import RUNS, Runs, left_by, log_of, questions, right_by_hand, run_chapter, setup, shipped
from train_sft import evaluate

pytest_plugins = ["tests.helpers"]  # its fixtures


# The shipped model answers nearly all questions. So that both ranks have some to learn from: harder ones, more chance.
MORE = {"rl": ["--kinds=number", "--samples=8", "--temperature=2.5"]}


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    "What each of two processes does: it meets the other, then runs the four chapters with it."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    threads.cache_clear()  # a fork has no copy of the threads that prepare batches
    here = setup()
    results = {"gathered": here.gather([10 * n for n in range(7)[rank::2]]), "none": here.gather([]),
               "sum": here.all_reduce(rank + 1.5), "exact": here.all_reduce(2.0 ** 24 + 1),
               "blind": evaluate(*shipped(), questions(20), here, blind=True)["right"]}
    results |= {stage: run_chapter(stage, folder, *MORE.get(stage, [])) for stage in RUNS}
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    "-> (folder, what rank 0 got, what rank 1 got)."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, as the loader's workers are: another two imports of PyTorch would take longer than the test.
    ranks = [multiprocessing.get_context("fork").Process(target=rank_of_two, args=(rank, port, folder))
             for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))


def test_answers_of_two_ranks_are_gathered_in_the_order_of_the_questions(two_ranks):
    for rank in two_ranks[1:]:  # rank 0 had questions 0, 2, 4 and 6
        assert rank["gathered"] == [0, 10, 20, 30, 40, 50, 60] and rank["none"] == [] and rank["sum"] == 1.5 + 2.5
        assert rank["exact"] == 2 ** 25 + 2  # a sum over millions of tokens: float32 has no odd numbers above 2^24
        assert rank["blind"] == right_by_hand(20, "blind")  # each answer is scored with its own question


@pytest.mark.parametrize("stage", RUNS)
def test_two_ranks_learn_what_one_learns_from_two_micro_batches(chapters, two_ranks, stage, tmp_path):
    folder, first, second = two_ranks
    if stage in MORE:
        chapters = Runs(tmp_path)
        chapters[stage] = run_chapter(stage, tmp_path, *MORE[stage])
        assert log_of(chapters, stage)["teaching"] > 2 / 32
    (one, _, result), two = left_by(chapters, stage), load_checkpoint(folder / "tiny" / stage)
    for name, p in one.named_parameters():
        if not name.endswith("qkv.bias"):  # a key's: its true gradient is 0, and AdamW makes full steps of its noise
            assert torch.allclose(p, two.get_parameter(name), rtol=0, atol=2e-4), name
    # Muon and AdamW forget how large a gradient was; their moments do not. Each rank had a share, and all are saved.
    ours, theirs = (read_safetensors(of / "tiny" / stage / "optimizer.safetensors") for of in (chapters.out, folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6), name
    # the places in the data, too: a run may be resumed on another number of processes
    ours, theirs = (read_json(of / "tiny" / stage / "state.json") for of in (chapters.out, folder))
    if stage == "base":  # bits per byte before the first step
        assert ours.pop("before") == pytest.approx(theirs.pop("before"), rel=1e-3)
    assert ours == theirs
    told = {"base": ["bits_per_byte"], "align": ["caption_loss", "blind_loss"], "sft": ["blind_accuracy"],
            "rl": ["before"]}[stage]
    for name in told:
        assert first[stage][name] == pytest.approx(result[name], rel=1e-3)
    if stage == "sft":
        ours, theirs = (one["held_out"]["scenes"] for one in (result, first[stage]))
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-3) for name in ("loss", "blind_loss"))
    assert second[stage] == {}  # one line of JSON, from the main process
