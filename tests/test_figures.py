"Curves, the book's pictures."
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import extras.memory
import sample
from plumbing.drawing import draw_curves, draw_lines, read_curves
from tests.helpers import CHAPTERS, HERE, QUICK, run

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_curves_show_what_the_log_says(tmp_path):
    rows = [{"command": "train_sft.py", "flags": {}}, *({"step": i, "loss": 4.0 / i, "lr": 1.0} for i in range(1, 9)),
            {"step": 5, "loss": None}, {"step": 4, "accuracy": 0.25, "accuracy_by_kind": {"colour": 0.5, "count": 0.0}},
            {"step": 8, "accuracy": 0.75, "accuracy_by_kind": {"colour": 1.0, "count": 0.5}},
            {"step": 2, "loss": 1.0, "lr": 1.0},  # again, after a crash
            {"stage": "sft", "step": 8, "accuracy": 0.1}]  # the result is no point of a curve
    charts = read_curves(rows)
    assert charts["loss, nats per token"] == {"loss": [(i, 1.0 if i == 2 else 4.0 / i) for i in range(1, 9)]}
    assert charts["held-out accuracy"] == {"accuracy": [(4, 0.25), (8, 0.75)], "colour": [(4, 0.5), (8, 1.0)],
                                           "count": [(4, 0.0), (8, 0.5)]}
    assert read_curves([{"step": 1, "reward": 0.5, "teaching": 0.8}])["reward"].keys() == {"reward", "teaching"}
    draw_lines(tmp_path / "a.png", {"up": {"one": [(0, 0.0), (10, 1.0)]}, "loss": {"two": [(0, 9.0), (9, 1)]}})
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    blue = (abs(picture - (0, 114, 178)).sum(-1) < 30) & (np.arange(800) < 580)  # the lines, without their names
    (upper, lower), across = (blue[:420], blue[420:]), np.arange(800)
    for chart, sign in ((upper, -1), (lower, 1)):  # y counts downwards in a picture
        heights = [np.argwhere(chart[:, x]).mean() for x in across[chart.any(0)]]
        assert np.sign(np.diff(heights[::40])).tolist() == [sign] * len(heights[::40][1:]) and len(heights) > 400
    # One point, one value, no step yet, and values of zero are no errors.
    draw_lines(tmp_path / "b.png", {"loss": {"x": [(1, 0.0)]}, "other": {"x": [(1, 0.0)], "y": [(3, 0.0)]}})
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0]) + "\n")
    draw_curves(tmp_path / "log.jsonl")
    assert not (tmp_path / "curves.png").exists()


def test_every_stage_draws_its_curves(trained, tmp_path):
    for stage in CHAPTERS:
        folder = trained[0] / "tiny" / stage
        expected = read_curves(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
        assert expected and Image.open(folder / "curves.png").size == (800, 420 * len(expected))
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path}", "--eval_every=1", f"--init={trained[0] / 'tiny/align'}")
    assert ran.code == 0 and Image.open(tmp_path / "tiny/sft/curves.png").size == (800, 840)  # accuracy by kind, too


def test_the_figures_are_those_that_the_checkpoint_gives(tmp_path, monkeypatch):
    import bench
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras.memory, "saved_bytes", lambda module, compiled, *inputs: inputs[0].nbytes)
    shutil.copy(HERE / "README.md", "README.md")
    ran = run("bench", "--what=figures", f"--init={sample.TINY}", "--device=cpu", main=bench.main)
    assert ran.code == 0, ran.err
    ours = {Path(name).name for name in ran.result["files"]}
    assert ours | {"page.png"} == {path.name for path in (HERE / "assets").glob("*.png")}  # a screenshot
    assert sum(path.stat().st_size for path in (HERE / "assets").glob("*.png")) < 1_500_000  # bytes
    for name in ours - {"memory.png"}:
        new, old = (np.asarray(Image.open(folder / name).convert("RGB")).astype(int)
                    for folder in (tmp_path / "assets", HERE / "assets"))
        assert new.shape[1] == 800 and new.shape == old.shape, name
        assert abs(new - old).mean() < 3, name  # letters are drawn a little differently from Pillow to Pillow
    assert "| bench.py | " + str(len((HERE / "bench.py").read_text().splitlines())) in Path("README.md").read_text()
