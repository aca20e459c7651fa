"A run's log, and what it says of a slow machine."
import subprocess
from types import SimpleNamespace

import torch

import plumbing.log


def pace(monkeypatch, capsys, products: dict, seconds: list[float], device: str = "cpu") -> str:
    "What is said of steps that take these seconds. products: {threads: seconds of one}."
    monkeypatch.setattr(torch, "get_num_threads", lambda: max(products))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(plumbing.log.Pace, "product", staticmethod(products.get))
    watch, now = plumbing.log.Pace(SimpleNamespace(type=device)), 0.0
    for one in seconds:
        now += one
        watch.step(now)
    return capsys.readouterr().err


def test_where_threads_wait_for_each_other_one_line_names_the_remedy(monkeypatch, capsys):
    # From the start, or from when another program began; once.
    for seconds in ([0.5] * 30, [0.1] * 10 + [0.5] * 30):
        said = pace(monkeypatch, capsys, {1: 0.003, 2: 0.06}, seconds)
        assert said.count("OMP_NUM_THREADS=1") == 1 and "20 times" in said and "--resume" in said
    said = pace(monkeypatch, capsys, {1: 0.003, 2: 0.002}, [0.1] * 10 + [0.5] * 30)
    assert not said  # slow for another reason: one thread would not be faster
    assert not pace(monkeypatch, capsys, {1: 0.003}, [0.1, 0.5, 0.5])  # one thread waits for nobody
    assert not pace(monkeypatch, capsys, {1: 0.003, 2: 0.06}, [0.1] * 9, "cuda")


def test_the_probe_leaves_the_number_of_threads_and_the_random_numbers_as_they_were():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    watch = plumbing.log.Pace(torch.device("cpu"))
    watch.threads = 2  # as where there are several
    for step in range(1, 4):
        watch.step(step / 10)
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_log_names_edits_that_are_not_committed(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)
    monkeypatch.setattr(plumbing.log, "__file__", str(tmp_path / "plumbing/log.py"))
    assert plumbing.log.code_version() == ""  # a downloaded archive
    git("init")
    (tmp_path / "model.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "a")
    clean = plumbing.log.code_version()
    assert len(clean) >= 7 and "edits" not in clean
    names = set()
    for text in ("a = 2\n", "a = 3\n"):
        (tmp_path / "model.py").write_text(text)
        names.add(plumbing.log.code_version())
    assert len(names) == 2 and all(name.startswith(f"{clean} with edits ") for name in names)
