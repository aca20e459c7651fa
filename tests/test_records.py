"Rows as records; those that turn out to be bad are left out, and too many end a run."
import json
import zipfile
from pathlib import Path

import pytest

from plumbing.records import hash_keys
from plumbing.world import COLOURS
from tests.helpers import image_bytes, llava, run, write

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_pictures_of_two_folders_with_one_name_are_two_pictures():
    def key(source: str) -> list[int]:
        return hash_keys({"images": [source]})
    assert key("/home/ann/train2017/7.jpg") == key("/data/train2017/7.jpg") != key("/data/vg/7.jpg")


def partly_broken(folder: Path) -> list:
    "600 records, of which the last 60 have pictures that cannot be opened, and 8 held-out ones -> the flags."
    rows = [llava(f"{i}.png", id=f"r{i}", answer=list(COLOURS)[i % 7]) for i in range(600)]
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for i in range(600):
            content = image_bytes((*COLOURS[list(COLOURS)[i % 7]][:2], i % 256))
            file.writestr(f"{i}.png", content if i < 540 else content[:40] + b"%d" % i)
    write(folder / "val.json", rows[:8])  # the first 500 that train are opened before a run, too
    return [f"--data={write(folder / 'd.json', rows)}", f"--val={folder / 'val.json'}", f"--out_dir={folder / 'out'}",
            "--device=cpu", "--eval_size=2", "--seq_len=64"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_records_end_the_run_after_the_steps_that_are_done_are_saved(tmp_path, workers):
    flags = [*partly_broken(tmp_path), "--steps=12", "--batch_size=4"]
    ran = run("train_sft", *flags, "--max_bad=0.01", f"--workers={workers}")
    assert ran.code == 1 and not ran.out and ran.err.splitlines()[-1].startswith("error: record r5")
    assert "7 bad records, 6 are allowed: see --max_bad" in ran.err and ran.err.count("skipped, ") == 6
    state = json.loads((tmp_path / "out/tiny/sft/state.json").read_text())
    assert 0 < state["step"] < 12
    more = run("train_sft", *flags, "--max_bad=0.2", "--resume")
    assert more.code == 0 and f"at step {state['step']}" in more.err and more.result["step"] == 12


def test_reinforcement_learning_leaves_out_bad_records_and_saves_before_they_end_it(tmp_path):
    flags = [*partly_broken(tmp_path), "--steps=3", "--batch_size=16", "--samples=2", "--max_new_tokens=2"]
    ran = run("train_rl", *flags, "--max_bad=0.1")
    assert ran.code == 0 and "skipped, 1 of at most 60: record r5" in ran.err and ran.result["step"] == 3
    ran = run("train_rl", *flags, "--max_bad=0.002")
    assert ran.code == 1 and "2 bad records, 1 are allowed" in ran.err.splitlines()[-1]
    assert json.loads((tmp_path / "out/tiny/rl/state.json").read_text())["step"] <= 3
