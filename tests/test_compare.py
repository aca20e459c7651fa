"Several runs beside each other."
import shutil
from pathlib import Path

import pytest
from PIL import Image

import bench
import extras.compare
from tests.helpers import QUICK, image_bytes, llava, one_line, run, write
from train_rl import gain

pytest_plugins = ["tests.helpers"]  # its fixtures


def compare(*folders, flags=("--eval_size=20", "--device=cpu")):
    return run("bench", "--what=compare", f"--init={','.join(map(str, folders))}", *flags, main=bench.main)


def test_runs_are_compared_on_the_same_questions_with_all_that_differs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'b'}", "--lr=0.001", "--init=scratch",
              "--set=bridge.num_latents=12")
    assert ran.code == 0
    one, two = folders = [str(trained[0] / "tiny/sft"), str(tmp_path / "b/tiny/sft")]
    log = Path(two, "log.jsonl")
    log.write_text(log.read_text().replace('"commit": "', '"commit": "other '))
    asked, real = [], extras.compare.evaluate

    def evaluate(vlm, tokenizer, records, setup):
        asked.append([record["id"] for record in records])
        result = real(vlm, tokenizer, records, setup)
        right = [float(i % 2 == 0 or len(asked) > 2 and i % 3 == 0) for i in range(len(records))]  # the second: 3 more
        return result | {"right": right, "accuracy": sum(right) / len(right)}
    monkeypatch.setattr(extras.compare, "evaluate", evaluate)
    ran = compare(*folders)
    assert ran.code == 0, ran.err
    assert asked[0] == asked[2] and asked[1] == asked[3] and len(asked[0]) == 20 and asked[0] != asked[1]
    result = ran.result
    assert set(result["results"]) == set(folders) and result["accuracy"][one]["scenes"]["accuracy"] == 0.5
    before, after = ([float(i % 2 == 0 or more and i % 3 == 0) for i in range(20)] for more in (False, True))
    told = result["against_the_first"][two]["scenes"]
    assert told["gain"] == pytest.approx(0.15) and told["gain_ci95"] == gain(before, after)["gain_ci95"]
    assert told["within_noise"] is (told["gain_ci95"][0] <= 0) and ("within noise" in ran.err) == told["within_noise"]
    assert result["flags_that_differ"]["lr"] == [0.005, 0.001] and "seed" not in result["flags_that_differ"]
    assert result["configuration_that_differs"]["bridge.num_latents"] == [9, 12]
    assert result["code_that_differs"]["commit"][1].startswith("other ")
    assert result["parameters"][two] - result["parameters"][one] == 3 * 128
    for part in ("lr 0.005, 0.001", "bridge.num_latents 9, 12", "1,213,312", "+15.0 points", "scenes"):
        assert part in ran.err, part
    assert Image.open("compare.png").size == (800, 840)  # accuracy beside loss


def test_equal_models_differ_by_nothing_within_noise(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0] / "tiny/sft", tmp_path / "copy")
    ran = compare(trained[0] / "tiny/sft", tmp_path / "copy")
    told = ran.result["against_the_first"][str(tmp_path / "copy")]
    assert all(one == {"gain": 0, "gain_ci95": [0, 0], "within_noise": True} for one in told.values())
    assert ran.result["flags_that_differ"] == ran.result["configuration_that_differs"] == {}
    assert "flags: the same in all" in ran.err and ran.err.count("within noise") == 2


def test_the_questions_for_a_comparison_are_those_held_out_of_the_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(20):
        Path(f"{i}.png").write_bytes(image_bytes((i, 9, 9)))
        rows.append(llava(f"{i}.png", id=f"r{i}"))
    own = write(tmp_path / "d.json", rows)
    for out in "ab":
        ran = run("train_sft", *QUICK, f"--out_dir={out}", f"--data={own}", f"--init={trained[0] / 'tiny/align'}")
        assert ran.code == 0
    ran = compare("a/tiny/sft", "b/tiny/sft")
    assert ran.code == 0 and ran.result["accuracy"]["a/tiny/sft"]["held_out"]["n"] == 4  # a fifth: the rest has trained
    one_line(compare("a/tiny/sft", trained[0] / "tiny/sft"), "different data", "--data=")
    ran = compare("a/tiny/sft", trained[0] / "tiny/sft", flags=["--data=world", "--eval_size=10", "--device=cpu"])
    assert ran.code == 0 and set(ran.result["accuracy"]["a/tiny/sft"]) == {"scenes", "pairs"}
    ran = compare("a/tiny/sft", trained[0] / "tiny/sft", flags=[f"--data={own}", "--device=cpu"])
    assert ran.code == 0 and ran.result["accuracy"]["a/tiny/sft"]["d"]["n"] == 20  # named: all of it


def test_chapters_that_answer_nothing_are_compared_by_their_own_measure(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = compare(trained[0] / "tiny/base", trained[0] / "tiny/align")
    assert ran.code == 0 and "bits_per_byte" in ran.err and "caption_loss" in ran.err and "scenes" not in ran.err
    one_line(compare(tmp_path / "none", trained[0] / "tiny/sft"), tmp_path / "none")
    one_line(compare(trained[0] / "tiny/sft"), "two runs or more")


def test_logs_without_a_checkpoint_are_drawn_under_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn, names = {}, [f"{tmp_path}/{'long' * 9}/{seed}/rl" for seed in "ab"]
    monkeypatch.setattr(extras.compare, "draw_lines", lambda path, charts: drawn.update(charts))
    for name in names:
        Path(name).mkdir(parents=True)
        rows = [{"step": 1, "reward": 0.5}, {"step": 1, "split": "pairs", "accuracy": 0.25}]
        write(Path(name, "log.jsonl"), rows, lines=True)
    ran = compare(*names)
    # Names short enough to be read in the picture, and chapter 4's accuracy, which its log has for each held-out set.
    assert ran.code == 0 and drawn == {"reward: reward": {"a/rl": [(1, 0.5)], "b/rl": [(1, 0.5)]},
                                       "held-out accuracy: accuracy pairs": {"a/rl": [(1, 0.25)], "b/rl": [(1, 0.25)]}}
