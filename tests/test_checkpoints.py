"Stop and resume, crashes, which model a run starts from."
import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
import plumbing.checkpoints
import plumbing.log
import sample
import train_base
import train_sft
from model import GPT, VLM
from plumbing.checkpoints import save_checkpoint
from plumbing.files import read_json
from plumbing.weights import read_header, read_safetensors, write_safetensors
from plumbing.world import World
from tests.helpers import (CHAPTERS, HERE, QUICK, SCRIPTS, START, TINY, call, change_config, fails, long_form,
                           one_line, run, setup, shake, shipped, snapshot, tiny_vlm, tokenizer, wait_until)
from tokenizer import Tokenizer
from vision import Bridge, ViT

pytest_plugins = ["tests.helpers"]  # its fixtures


# ----------------------------------------------------------------------------------------------------------------------
# training.py: checkpoints

def test_checkpoint_round_trip_keeps_weights_and_other_files(tmp_path):
    folder = tmp_path / "tiny" / "sft"
    for kind, tied in (("perceiver", True), ("mlp", False)):
        vlm = tiny_vlm(kind, tied)
        save_checkpoint(folder, vlm, tokenizer(), {"m": torch.ones(2)}, {"step": 3})
        again = model.load_checkpoint(folder)
        assert asdict(again.config) == asdict(vlm.config)
        assert all(torch.equal(p, again.get_parameter(name)) for name, p in vlm.named_parameters())
        assert Tokenizer.from_pretrained(folder).encode("a red cat") == tokenizer().encode("a red cat")
    (folder / "log.jsonl").write_text("{}\n")
    save_checkpoint(folder, vlm, tokenizer(), None, None)
    assert (folder / "log.jsonl").read_text() == "{}\n"
    # Moments of the model before would not fit this one's weights.
    assert not (folder / "optimizer.safetensors").exists() and not (folder / "state.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["sft"]  # nothing is left beside it


def test_a_checkpoint_from_before_latents_of_any_number_were_seeded_still_loads(tmp_path):
    for latents, seeded in ((4, True), (5, False)):  # 16 patches: then only 4 latents were
        vlm = tiny_vlm()
        vlm.config.bridge.num_latents, vlm.config.bridge.seeded = latents, seeded
        vlm.bridge = shake(Bridge(vlm.config.bridge))
        save_checkpoint(tmp_path / "sft", vlm, tokenizer())
        change_config(tmp_path / "sft", lambda config: config["bridge"].pop("seeded"))
        again = model.load_checkpoint(tmp_path / "sft")
        assert torch.equal(again.bridge(torch.ones(1, 16, 32)), vlm.bridge(torch.ones(1, 16, 32)))


def test_a_checkpoint_from_before_qwen3_is_the_model_it_was(tmp_path):
    shutil.copytree(sample.TINY, tmp_path / "tiny")
    change_config(tmp_path / "tiny", lambda config: [
        config["decoder"].pop(name) for name in ("head_dim", "attention_bias", "use_qk_norm")])
    vlm, now = model.load_checkpoint(tmp_path / "tiny"), model.load_checkpoint(sample.TINY)
    assert vlm.config.decoder == model.PRESETS["tiny"].decoder and vlm.config.decoder.head_dim == 32
    attention, ids = vlm.gpt.blocks[0].attention, torch.arange(9)[None]
    assert attention.qkv.bias is not None and attention.q_norm is None and attention.out.weight.shape == (128, 128)
    assert torch.equal(vlm.gpt.hidden(vlm.embed(ids)), now.gpt.hidden(now.embed(ids)))


def test_a_folder_inside_a_checkpoint_does_not_stop_the_save(tmp_path):
    (tmp_path / "sft" / "plots").mkdir(parents=True)
    (tmp_path / "sft" / "plots" / "a.txt").write_text("a")
    save_checkpoint(tmp_path / "sft", tiny_vlm(), tokenizer())
    assert (tmp_path / "sft" / "plots" / "a.txt").read_text() == "a"


def crash_at(monkeypatch, number: int) -> None:
    "The power fails at the number-th rename."
    count, rename = itertools.count(1), os.rename

    def broken(*places):
        if next(count) == number:
            raise KeyboardInterrupt
        rename(*places)
    monkeypatch.setattr(os, "rename", broken)


@pytest.mark.parametrize("number", [1, 2])
def test_a_crash_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, number):
    folder, before, after = tmp_path / "tiny" / "base", tiny_vlm(seed=1), tiny_vlm(seed=2)
    save_checkpoint(folder, before, tokenizer(), {}, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, number)
        save_checkpoint(folder, after, tokenizer(), {}, {"step": 2})
    assert plumbing.checkpoints.newest_checkpoint(tmp_path, "tiny") == folder
    again = model.load_checkpoint(folder)
    assert torch.equal(again.gpt.embed.weight, before.gpt.embed.weight)
    save_checkpoint(folder, after, tokenizer(), {}, {"step": 2})
    assert torch.equal(model.load_checkpoint(folder).gpt.embed.weight, after.gpt.embed.weight)


def test_the_next_save_after_a_crash_does_not_begin_by_deleting_the_only_copy(tmp_path, monkeypatch):
    folder, vlm = tmp_path / "base", tiny_vlm()
    save_checkpoint(folder, vlm, tokenizer())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 2)
        save_checkpoint(folder, vlm, tokenizer())

    def disk_full(*_):
        raise OSError("no space left")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(plumbing.checkpoints, "write_safetensors", disk_full)
        save_checkpoint(folder, vlm, tokenizer())
    model.load_checkpoint(folder)


def resume_flags(out_dir: Path) -> argparse.Namespace:
    return argparse.Namespace(out_dir=str(out_dir), model="tiny", init="", resume=True, vision="", bridge="",
                              set="", tiles=None, lora_rank=0, activation_checkpointing=False, float8=False)


def test_resume_works_after_a_crash_between_the_renames(tmp_path, monkeypatch):
    folder, vlm = tmp_path / "tiny" / "base", tiny_vlm()
    save_checkpoint(folder, vlm, tokenizer(), {}, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 2)
        save_checkpoint(folder, vlm, tokenizer(), {}, {"step": 2})
    _, _, state, _ = train_base.load_start(resume_flags(tmp_path), setup(), "base")
    assert state["step"] == 1


def test_resume_refuses_files_of_different_steps(tmp_path):
    folder, vlm = tmp_path / "tiny" / "base", tiny_vlm()
    save_checkpoint(folder, vlm, tokenizer(), {}, {"step": 1})
    (folder / "state.json").write_text('{"step": 2}')
    assert fails(lambda: train_base.load_start(resume_flags(tmp_path), setup(), "base"), folder, "--resume")


def test_a_broken_checkpoint_is_one_line_that_names_the_file(tmp_path):
    folder = tmp_path / "sft"
    assert fails(lambda: model.load_checkpoint(folder), folder)
    save_checkpoint(folder, tiny_vlm(), tokenizer())
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, good = {n: t.clone() for n, t in read_safetensors(file).items()}, config.read_text()
    raw = file.read_bytes()
    for length in (0, 5, 500, len(raw) - 1):
        file.write_bytes(raw[:length])
        assert fails(lambda: model.load_checkpoint(folder), file)
    name = "gpt.blocks.1.mlp.down.weight"
    for broken in ({n: t for n, t in tensors.items() if n != name}, tensors | {"x.y": tensors[name]},
                   tensors | {name: tensors[name].t()}, tensors | {name: torch.tensor(1.0)}):
        write_safetensors(broken, file)
        assert fails(lambda: model.load_checkpoint(folder), file, "x.y" if "x.y" in broken else name)
    file.write_bytes(raw)
    model.load_checkpoint(folder)
    without, odd = json.loads(good), json.loads(good)
    del without["decoder"]
    odd["vision"]["depth"] = 3
    for text in ("", "{", "[]", "3", '{"model_type": "qwen2"}', '{"model_type": "ghostvis"}', json.dumps(without),
                 json.dumps(odd)):
        config.write_text(text)
        assert fails(lambda: model.load_checkpoint(folder), config)
    config.unlink()
    assert fails(lambda: model.load_checkpoint(folder), config)


# ----------------------------------------------------------------------------------------------------------------------
# The stage scripts: stop and resume, several processes

def interrupt_after(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    "A signal, if no other Ctrl-C's, that comes while step number `step` is being logged."
    write = plumbing.log.Log.write

    def write_and_press(self, **values):
        write(self, **values)
        if values.get("step") == step and "lr" in values:
            signal.raise_signal(number)
    monkeypatch.setattr(plumbing.log.Log, "write", write_and_press)


@pytest.mark.parametrize("stage", CHAPTERS)
def test_a_stopped_and_resumed_run_equals_one_never_stopped_bit_for_bit(trained, tmp_path, monkeypatch, stage):
    script = CHAPTERS[stage]
    main = importlib.import_module(script).main
    if stage == "rl":  # two steps of training earn no right answer; a reward for length makes every update real
        monkeypatch.setattr(importlib.import_module(script), "reward",
                            lambda record, ids, tokenizer: (sum(ids) + len(ids)) % 3 / 2)
    flags = ["--steps=4", "--eval_size=4", "--batch_size=4", "--micro_batch_size=2", "--device=cpu", "--lr=0.01",
             f"--init={trained[0] / 'tiny' / START[stage]}"]
    whole = run(script, *flags, f"--out_dir={tmp_path / 'a'}", main=main)
    assert whole.code == 0 and whole.result["step"] == 4
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        half = run(script, *flags, f"--out_dir={tmp_path / 'b'}", main=main)
    assert half.code == 0 and half.result["step"] == 2 and half.result["interrupted"] is True
    assert read_json(tmp_path / "b" / "tiny" / stage / "state.json")["step"] == 2
    rest = run(script, *flags, f"--out_dir={tmp_path / 'b'}", "--resume", main=main)
    assert rest.code == 0 and rest.result["step"] == 4 and "at step 2" in rest.err
    same = {"seconds": 0, "checkpoint": ""}  # these alone differ; "before" is where the run began, not the resumed part
    assert {**rest.result, **same} == {**whole.result, **same}
    start = (trained[0] / "tiny" / START[stage] / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, two = ((tmp_path / run_ / "tiny" / stage / name).read_bytes() for run_ in "ab")
        assert one == two and one != start, name
    steps = [json.loads(line) for line in (tmp_path / "b" / "tiny" / stage / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "lr" in row] == [1, 2, 3, 4]  # one log tells of both runs


@pytest.mark.parametrize("stage, flag", [("base", "--lr=0.5"), ("sft", "--lr=0.5"), ("sft", "--steps=9"),
                                         ("sft", "--seq_len=96"),
                                         ("sft", "--data=world:2"), ("sft", "--seed=1"), ("sft", "--optimizer=adamw"),
                                         ("sft", "--cooldown=0.1"), ("rl", "--lr=0.5"), ("rl", "--kinds=count"),
                                         ("rl", "--samples=8"), ("rl", "--temperature=0.5")])
def test_resuming_with_a_flag_that_changes_the_result_is_refused(trained, tmp_path, stage, flag):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "tiny" / stage, out / "tiny" / stage)
    before = snapshot(out)
    ran = run(CHAPTERS[stage], *QUICK, f"--out_dir={out}", "--resume", flag)
    one_line(ran, flag.split("=")[0], "--resume")
    assert snapshot(out) == before


def test_two_runs_never_write_into_one_folder(trained, tmp_path):
    shutil.copytree(trained[0] / "tiny/base", tmp_path / "tiny/base")
    before = snapshot(tmp_path)
    with plumbing.checkpoints.claim(tmp_path / "tiny/base"):  # as a run does that is still at work
        for resume in ((), ("--resume", )):
            one_line(run("train_base", *QUICK, f"--out_dir={tmp_path}", *resume), "tiny/base", "--out_dir")
        assert snapshot(tmp_path, but=[".base.lock"]) == before
    assert run("train_base", *QUICK, f"--out_dir={tmp_path}").code == 0


def test_a_log_whose_last_line_was_cut_is_continued(trained, tmp_path):
    shutil.copytree(trained[0] / "tiny/base", tmp_path / "tiny/base")
    whole = (log := tmp_path / "tiny/base/log.jsonl").read_text()
    log.write_text(whole + '{"step": 2, "lo')  # by a full disk
    assert run("train_base", *QUICK, f"--out_dir={tmp_path}", "--resume").code == 0
    assert log.read_text().startswith(whole) and json.loads(log.read_text().removeprefix(whole).splitlines()[0])


def test_a_stage_folder_that_is_a_link_stays_one(trained, tmp_path):
    (tmp_path / "out/tiny").mkdir(parents=True)
    shutil.copytree(trained[0] / "tiny/base", tmp_path / "large_disk")
    (tmp_path / "out/tiny/base").symlink_to(tmp_path / "large_disk")
    for _ in range(2):
        assert run("train_base", *QUICK, f"--out_dir={tmp_path / 'out'}", "--resume").code == 0
        os.rename(tmp_path / "large_disk", tmp_path / "large_disk.old")  # where a crash between two renames leaves it
    assert run("train_base", *QUICK, f"--out_dir={tmp_path / 'out'}", "--resume").code == 0
    assert (tmp_path / "out/tiny/base").is_symlink() and not list(tmp_path.rglob("*.old"))


def test_a_finished_run_resumes_to_itself(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'out'}", "--resume")
    assert ran.code == 0 and ran.result["step"] == 2
    assert (tmp_path / "out/tiny/sft/model.safetensors").read_bytes() \
        == (trained[0] / "tiny/sft/model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# The stage scripts: which model answers and which one is trained further; nothing good is lost

TINY_ACCURACY = {"scenes": 0.884, "pairs": 0.806}


EARLIER = ", the newest earlier stage"


def fake_checkpoint(out: Path, name: str, **run) -> Path:
    "A checkpoint as far as its config.json tells."
    (out / "tiny" / name).mkdir(parents=True)
    (out / "tiny" / name / "config.json").write_text(json.dumps({"model_type": "ghostvis", "run": run}))
    return out / "tiny" / name


def starts(out: Path, stage: str, source: str = "world", own_words: bool = False, init: str = ""):
    folder, why = plumbing.checkpoints.find_start(argparse.Namespace(
        out_dir=out, model="tiny", data=source, init=init), stage, own_words)
    return folder and folder.name, why


def test_a_run_keeps_the_runs_before_it_and_their_logs(trained, tmp_path):
    out = tmp_path / "out"
    flags = ["train_sft", "--steps=1", "--eval_size=1", "--batch_size=1", "--device=cpu", f"--out_dir={out}",
             f"--init={trained[0] / 'tiny/align'}", "--keep=2"]
    for seed in range(4):
        ran = run(*flags, f"--seed={seed}", main=train_sft.main)
        assert ran.code == 0 and (f"is now {out}/tiny/sft.1" in ran.err) == (seed > 0)
    seeds = {path.name: [json.loads(line)["flags"]["seed"] for line in (path / "log.jsonl").read_text().splitlines()
                         if "flags" in line] for path in (out / "tiny").glob("sft*")}
    assert seeds == {"sft": [3], "sft.1": [2], "sft.2": [1]}  # each run with a log of its own
    assert model.load_checkpoint(out / "tiny/sft.1").config.run["saved"] < model.load_checkpoint(
        out / "tiny/sft").config.run["saved"]


def test_a_run_that_never_saved_does_not_replace_one_that_did(tmp_path):
    good = fake_checkpoint(tmp_path, "sft", step=2, steps=2, saved=1.0)
    assert plumbing.checkpoints.set_aside(good, 3) and not good.exists()
    good.mkdir()
    (good / "log.jsonl").write_text("{}")  # killed before its first save
    assert not plumbing.checkpoints.set_aside(good, 3)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["sft.1"]
    assert plumbing.checkpoints.newest_checkpoint(tmp_path, "tiny").name == "sft.1"


def test_a_run_on_other_data_starts_from_the_newest_finished_model_and_when_repeated_from_the_same(tmp_path):
    fake_checkpoint(tmp_path, "base", step=2, steps=2, saved=1.0, data="world")
    fake_checkpoint(tmp_path, "align", step=2, steps=2, saved=2.0, data="world")
    assert starts(tmp_path, "base") == (None, "") and starts(tmp_path, "sft") == ("align", EARLIER)
    assert starts(tmp_path, "sft", "my.json") == ("align", EARLIER)  # its first run: nothing to go on with
    fake_checkpoint(tmp_path, "sft", step=2, steps=2, saved=3.0, data="world", start=2.0)
    assert starts(tmp_path, "sft") == ("align", EARLIER)  # the same command starts at the same place
    name, why = starts(tmp_path, "sft", "my.json")
    assert name == "sft" and "newest finished" in why and "world" in why and "--init" in why
    (tmp_path / "tiny/sft").rename(tmp_path / "tiny/sft.1")
    fake_checkpoint(tmp_path, "sft", step=1, steps=2, saved=4.0, data="my.json", start=3.0)  # stopped half-way
    name, why = starts(tmp_path, "sft", "my.json")  # where the first run on these data started, and it says why
    assert name == "sft.1" and "where the last run on these data started" in why and "--init=scratch" in why
    assert starts(tmp_path, "sft", "other.json")[0] == "sft.1"  # not from the unfinished one
    assert starts(tmp_path, "rl") == ("sft", EARLIER)
    # From no checkpoint, whatever there is; and a folder that is named needs no reason.
    assert starts(tmp_path, "sft", "my.json", init="scratch") == (None, " (--init=scratch)")
    assert starts(tmp_path, "sft", "my.json", init="elsewhere/base") == ("base", "")


def test_chapter_3_alone_can_be_had_again_after_all_chapters(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'out'}", "--init=scratch")
    assert ran.code == 0 and "starting sft from random weights" in ran.err and "(--init=scratch)" in ran.err
    assert model.load_checkpoint(tmp_path / "out/tiny/sft").config.run["chapters"] == ["sft"]


def test_a_model_that_has_only_its_own_words_starts_from_none_of_other_words(tmp_path):
    assert starts(tmp_path, "sft", "my.json", True) == (None, "")
    for stage, saved in (("base", 1.0), ("align", 2.0), ("sft", 3.0), ("rl", 4.0)):
        fake_checkpoint(tmp_path, stage, step=2, steps=2, saved=saved, data="world", start=saved - 1)
    for stage in ("base", "align", "sft"):
        name, why = starts(tmp_path, stage, "my.json", True)
        assert name is None and "other words" in why and f"--init={tmp_path / 'tiny/rl'}" in why
    assert starts(tmp_path, "sft", "world:3,my.json", True)[0] == "rl"  # the world's words are among them
    (tmp_path / "tiny/sft").rename(tmp_path / "tiny/sft.1")
    fake_checkpoint(tmp_path, "sft", step=2, steps=2, saved=5.0, data="my.json")
    assert starts(tmp_path, "sft", "my.json", True)[0] is None      # repeated: where it started, from random weights
    assert starts(tmp_path, "sft", "other.json", True)[0] is None   # not from my.json's words
    assert starts(tmp_path, "sft", "world", True) == ("align", EARLIER)  # and the world goes on as if nothing had been
    assert starts(tmp_path, "rl", "my.json")[0] == "sft"            # chapter 4 takes what there is
    (tmp_path / "tiny/base").rename(tmp_path / "tiny/base.1")
    fake_checkpoint(tmp_path, "base", step=2, steps=2, saved=6.0, data="books.txt")
    assert starts(tmp_path, "sft", "other.json", True) == ("base", EARLIER)  # an earlier chapter on one's own text


def test_a_small_trained_model_comes_with_the_code_and_answers_before_anything_is_trained(tmp_path):
    flags = [f"--out_dir={tmp_path}", f"--image={HERE / 'cat.jpg'}", "--device=cpu"]
    ran = run("sample", *flags, "--question=What colour is the cat?")
    assert ran.code == 0 and ran.out == "orange\n" and "comes with the code" in ran.err
    assert sum(path.stat().st_size for path in sample.TINY.iterdir()) < 4_000_000  # bytes
    entries = read_header(sample.TINY / "model.safetensors")[0].values()
    assert {entry["dtype"] for entry in entries} == {"BF16"}
    vlm, tokenizer_ = model.load_checkpoint(sample.TINY), Tokenizer.from_pretrained(sample.TINY)
    assert vlm.config.run["chapters"] == ["base", "align", "sft", "rl"]
    for split, least in TINY_ACCURACY.items():  # README's figures, of 2,000 questions each; these are 300
        records = [World("exam", split, seed=1)[i] for i in range(300)]
        assert train_sft.evaluate(vlm, tokenizer_, records, setup())["accuracy"] > least - 0.05


def test_training_never_starts_from_the_model_that_comes_with_the_code(tmp_path):
    assert starts(tmp_path, "rl") == (None, "")
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={sample.TINY}")  # unless it is named
    assert ran.code == 0 and f"from {sample.TINY}" in ran.err


def test_a_slim_checkpoint_answers_and_can_be_trained_further(trained, photo, tmp_path):
    ran = run("sample", f"--init={trained[0] / 'tiny/sft'}", f"--slim={tmp_path / 'slim'}", "--device=cpu")
    assert ran.code == 0 and not ran.out
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (trained[0] / "tiny/sft", tmp_path / "slim")]
    assert sizes[1] < 0.51 * sizes[0] and not (tmp_path / "slim/optimizer.safetensors").exists()
    init = f"--init={tmp_path / 'slim'}"
    assert run("sample", init, f"--image={photo}", "--device=cpu", "--max_new_tokens=2").code == 0
    assert run("train_rl", *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={tmp_path / 'slim'}").code == 0
    one_line(run("sample", init, f"--slim={tmp_path / 'slim'}"), tmp_path / "slim", "new folder")


@pytest.mark.parametrize("stage, flags, parts", [
    ("base", ["--image"], ["cannot see", "train_align.py"]), ("base", ["--chat"], ["cannot see"]),
    ("align", ["--image", "--question=How many?"], ["describe", "train_sft.py"]), ("align", ["--chat"], ["describe"]),
    ("sft", [], ["no picture", "--image="]), ("sft", ["--question=What colour is the cat?"], ["no picture"])])
def test_a_model_that_has_not_learned_to_see_or_to_answer_says_so(trained, photo, stage, flags, parts):
    flags = [f"--image={photo}" if flag == "--image" else flag for flag in flags]
    ran = run("sample", f"--init={trained[0] / 'tiny' / stage}", *flags, "--device=cpu")
    one_line(ran, *parts)
    assert run("sample", f"--init={trained[0] / 'tiny/align'}", f"--image={photo}", "--device=cpu",
               "--max_new_tokens=2").code == 0


@pytest.mark.parametrize("script", [*SCRIPTS, "data"])
def test_ctrl_c_while_pytorch_is_imported_ends_a_script_in_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ran = subprocess.run([sys.executable, str(HERE / f"{script}.py")], text=True, capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "stopped\n")


def test_ctrl_c_before_the_first_step_leaves_the_run_before_as_it_was(trained, monkeypatch):
    def interrupted(self, real=plumbing.log.Interrupt.__init__):
        real(self)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(plumbing.log.Interrupt, "__init__", interrupted)
    before = snapshot(trained[0])
    for script in CHAPTERS.values():
        with pytest.raises(KeyboardInterrupt):
            run(script, *QUICK, f"--out_dir={trained[0]}")
    assert snapshot(trained[0]) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # Ctrl-C: test_a_stopped_and_resumed_run above
def test_a_signal_finishes_the_step_saves_and_ends_without_an_evaluation(trained, tmp_path, monkeypatch, number):
    flags = ["--steps=3", "--eval_size=2", "--batch_size=2", "--device=cpu", "--seed=5", f"--out_dir={tmp_path}"]
    before = signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored, and then a run ignores it, too
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, number)
        ran = run("train_sft", *flags, f"--init={trained[0] / 'tiny/align'}", main=train_sft.main)
    signal.signal(number, before)
    assert ran.code == 0 and (ran.result["step"], ran.result["interrupted"]) == (2, True), ran.err
    assert ran.err.count("stopping:") == 1 and "held" not in ran.out
    ran = run("train_sft", f"--out_dir={tmp_path}", "--resume")  # alone: it goes on with the flags of the run
    assert ran.code == 0 and ran.result["step"] == 3 and "at step 2" in ran.err
    assert read_json(tmp_path / "tiny/sft/state.json")["flags"]["seed"] == 5


def test_a_signal_from_outside_finishes_the_step_saves_and_ends_the_process(trained, tmp_path):
    command = [sys.executable, str(HERE / "train_sft.py"), "--steps=500", "--batch_size=2", "--device=cpu",
               f"--init={trained[0] / 'tiny/align'}", f"--out_dir={tmp_path}", "--eval_size=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        wait_until(lambda: (tmp_path / "tiny/sft/log.jsonl").exists(), 60)
        process.send_signal(signal.SIGTERM)
        said, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 0 < json.loads(said)["step"] < 500 and err.count("stopping:") == 1


def test_a_step_that_is_not_finite_is_skipped_counted_and_never_saved(trained, tmp_path, monkeypatch):
    """Ten in a row stop the run, with the records' names; what was saved before stays."""
    flags = ["train_sft", "--steps=30", "--eval_size=4", "--batch_size=4", "--device=cpu", "--save_every=4",
             f"--init={trained[0] / 'tiny/align'}", f"--out_dir={tmp_path}"]
    real, calls = VLM.forward, []

    def forward(self, batch):
        calls.append(1)
        bad = self.training and len(calls) in (3, *range(7, 99))
        return real(self, batch) * (math.nan if bad else 1)
    monkeypatch.setattr(VLM, "forward", forward)
    ran = run(*flags, main=train_sft.main)
    one_line(ran, "10 in a row", "world", "--lr")
    assert ran.err.count("step skipped") == 10  # the one after two good steps, and nine before the last
    log = [json.loads(line) for line in (tmp_path / "tiny/sft/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row.get("loss", 0) is None] == [3, *range(7, 16)]
    state = read_json(tmp_path / "tiny/sft/state.json")
    assert state["step"] == 12 and model.load_checkpoint(tmp_path / "tiny/sft")  # finite weights: saved on the way


def test_a_spike_of_the_loss_is_marked_in_the_log(tmp_path):
    flags = train_base.chapter_flags("", "sft", train_sft.FLAGS, train_sft.BY_MODEL, [f"--out_dir={tmp_path}"])
    log = plumbing.log.Log(flags, setup(), "sft")
    for loss in (2.0, 1.9, 4.5, 1.8):
        log.write(loss=loss)
    rows = [json.loads(line) for line in (tmp_path / "tiny/sft/log.jsonl").read_text().splitlines()][1:]
    assert [row.get("spike", False) for row in rows] == [False, False, True, False]


def test_wandb_gets_what_the_log_gets_if_asked_and_if_it_is_there(tmp_path, monkeypatch):
    sent = []
    fake = SimpleNamespace(init=lambda **options: sent.append(options) or SimpleNamespace(log=sent.append))
    flags = train_base.chapter_flags("", "sft", train_sft.FLAGS, train_sft.BY_MODEL, [f"--out_dir={tmp_path}"])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    plumbing.log.Log(flags, setup(), "sft").write(loss=1.0)
    assert not sent  # nothing is sent unless it is asked for
    flags.wandb = "mine"
    plumbing.log.Log(flags, setup(), "sft").write(loss=2.0)
    assert sent[0]["project"] == "mine" and sent[1] == {"loss": 2.0}
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert fails(lambda: plumbing.log.Log(flags, setup(), "sft"), "--wandb=mine", "pip install wandb")


def test_out_of_memory_names_the_flags_that_would_fit():
    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for rows, part in ((12, "--micro_batch_size=6"), (1, "--activation_checkpointing")):
        batch = {"ids": torch.zeros(rows, 4), "supervised": [1], "records": []}
        assert fails(lambda: train_base.train_step(full, [batch], 1, None, setup(), 1.0), f"{rows} rows", part)


def test_a_step_without_a_supervised_token_names_its_records():
    empty = {"supervised": [], "records": ["7", "photo 8"]}
    assert fails(lambda: train_base.count_supervised([empty], setup()), "7, photo 8")


@pytest.mark.parametrize("part, field, value", [
    ("decoder", "num_hidden_layers", 10 ** 9), ("decoder", "hidden_size", 2 ** 40), ("decoder", "vocab_size", -1),
    ("decoder", "num_attention_heads", 0), ("vision", "image_size", 10 ** 12), ("vision", "num_hidden_layers", 1.5),
    ("vision", "patch_size", True), ("bridge", "num_layers", 10 ** 8), ("bridge", "num_latents", "9"),
    ("decoder", "rope_theta", None), ("", "lora_rank", 10 ** 12), ("", "vision", [])])
def test_a_config_with_absurd_sizes_is_refused_before_memory_is_asked_for(trained, tmp_path, part, field, value):
    folder = tmp_path / "sft"
    shutil.copytree(trained[0] / "tiny/sft", folder)
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    assert len(fails(lambda: model.load_checkpoint(folder), folder)) < 500
    assert time.process_time() - start < 1  # seconds


@pytest.mark.parametrize("call", [GPT.from_pretrained, ViT.from_pretrained, model.load_checkpoint])
def test_a_published_config_with_absurd_sizes_is_refused_too(tmp_path, call):
    kind = {"model_type": "qwen2"} if call == GPT.from_pretrained else {"model_type": "siglip_vision_model"}
    huge = {"hidden_size": 2 ** 13, "num_hidden_layers": 10 ** 9, "num_attention_heads": 2, "num_key_value_heads": 2}
    if call == model.load_checkpoint:
        kind = {"model_type": "llava", "text_config": kind | huge, "vision_config": huge,
                "vision_feature_select_strategy": "full"}
    (tmp_path / "config.json").write_text(json.dumps(kind | huge))
    write_safetensors({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert fails(lambda: call(tmp_path), tmp_path / "config.json", "num_hidden_layers")


def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_whole(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    before = (out / "tiny/sft/model.safetensors").read_bytes()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, most[1]))  # no file above 1 MB: the weights have 7
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails, as on a full disk
    try:
        ran = run("train_sft", *QUICK, f"--out_dir={out}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, ignored)
    one_line(ran, "sft", "start again; nothing was saved before")
    assert (out / "tiny/sft.1/model.safetensors").read_bytes() == before
    assert not (out / "tiny/sft.new").exists()  # the half of it that was written does not keep the disk full
    assert model.load_checkpoint(plumbing.checkpoints.newest_checkpoint(out, "tiny")).config.run["stage"] == "rl"


@pytest.mark.parametrize("stage", CHAPTERS)
def test_an_output_folder_that_cannot_be_written_is_one_line(trained, tmp_path, stage):
    (tmp_path / "out").write_text("a file")  # also what a lost network disk looks like: an OSError at any place
    ran = run(CHAPTERS[stage], *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny' / stage}")
    one_line(ran, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


@long_form
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", CHAPTERS)
def test_a_run_killed_up_to_50_times_and_resumed_equals_one_never_killed(trained, tmp_path, stage, ranks):
    """SIGKILL while starting, training and saving; the final weights are those of the undisturbed run, bit for bit."""
    flags = ["--steps=200", "--batch_size=4", "--micro_batch_size=2", "--device=cpu", "--lr=0.01", "--eval_size=4",
             "--save_every=1", f"--init={trained[0] / 'tiny' / START[stage]}"]
    flags += ["--compile=True"] if stage == "base" and ranks == 1 else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []

    def start(name, *more):
        return subprocess.Popen([sys.executable, *launcher, str(HERE / f"{CHAPTERS[stage]}.py"), *flags,
                                 f"--out_dir={tmp_path / name}", *more], stderr=subprocess.DEVNULL, text=True,
                                stdout=subprocess.PIPE, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = start("whole")
    assert json.loads(whole.communicate()[0])["step"] == 200
    chance, folder, kills = random.Random(stage), tmp_path / "killed" / "tiny" / stage, 0
    while True:
        process = start("killed", *(["--resume"] if (folder / "state.json").exists() or
                                    folder.with_name(stage + ".old").exists() else []))
        try:
            process.wait(chance.uniform(3, 9) if kills < 50 else None)
            break
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-KILL", "-f", f"out_dir={tmp_path / 'killed'}( |$)"])
            process.wait()  # torchrun and its workers, which are no children of this process group
            kills += 1
    print(f"{stage}, {ranks} ranks: {kills} kills")
    assert process.returncode == 0 and kills > 5
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole/tiny" / stage / name).read_bytes() == (folder / name).read_bytes(), name


@long_form
def test_a_soak_of_two_hours_leaves_memory_and_open_files_flat(tmp_path):
    """All stages again and again in one process: GHOSTVIS_SOAK minutes, 120 if it is not set."""
    flags = ["--steps=30", "--eval_size=40", "--batch_size=8", "--device=cpu", f"--out_dir={tmp_path}"]
    end, readings = time.time() + 60 * float(os.environ.get("GHOSTVIS_SOAK", 120)), []
    while time.time() < end:
        for script in CHAPTERS.values():
            assert run(script, *flags).code == 0
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2 ** 20  # MiB
        readings.append((memory, len(os.listdir("/proc/self/fd"))))
        print(f"round {len(readings)}: {memory:.0f} MiB, {readings[-1][1]} open files", file=sys.stderr, flush=True)
    first, last = readings[min(2, len(readings) - 1)], readings[-1]
    assert last[0] < 1.1 * first[0] + 20 and last[1] <= first[1] + 2


def test_a_run_in_bfloat16_keeps_its_float32_weights(tmp_path):
    flags = [f"--init={TINY}", "--steps=1", "--batch_size=1", "--seq_len=128", "--eval_size=1", "--device=cpu"]
    call(train_base.main, *flags, "--dtype=bfloat16", f"--out_dir={tmp_path}")
    start = dict(shipped()[0].named_parameters())
    saved = read_safetensors(tmp_path / "tiny/base/model.safetensors")
    moved = {name: p for name, p in saved.items() if name.startswith("gpt.") and not torch.equal(p, start[name])}
    assert len(moved) > 20
    for name, p in moved.items():  # not rounded: bfloat16 has 8 bits of fraction, these have 24
        assert p.dtype == torch.float32 and (p != p.bfloat16()).any(), name


def test_a_model_with_nan_replaces_no_checkpoint(tmp_path):
    vlm, folder = tiny_vlm(), tmp_path / "sft"
    save_checkpoint(folder, vlm, tokenizer())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for value in (math.nan, -math.inf):
        vlm.gpt.norm.weight.data[3] = value
        assert fails(lambda: save_checkpoint(folder, vlm, tokenizer()), folder, "not saved", "gpt.norm.weight")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells a file's name by /proc")
def test_weights_are_on_the_disk_before_their_folder_gets_its_name(tmp_path, disk):
    save_checkpoint(tmp_path / "sft", tiny_vlm(), tokenizer(), {"m": torch.ones(2)}, {"step": 1})
    assert disk == ["model.safetensors", "optimizer.safetensors", "-> sft"]
