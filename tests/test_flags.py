"Flags: help, suggestions, bad input."
import copy
import importlib.util
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import model
import plumbing.files
import plumbing.flags
import plumbing.ranks
import plumbing.weights
import plumbing.world
import sample
import train_base
import train_sft
from plumbing.fitting import row_length
from tests.helpers import (DATA, HERE, QUICK, SCRIPTS, Ran, bytes_of, fails, image_bytes, llava, nested,
                           one_line, run, run_process, snapshot, write)
from tokenizer import Tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_its_default(script):
    ran = run(script, "--help")
    assert ran.code == 0 and not ran.err
    module = importlib.import_module(script)
    if script == "sample":
        flags = vars(plumbing.flags.parse_flags("", sample.FLAGS, argv=[]))
    else:
        flags = {name: default for name, (default, _) in getattr(module, "FLAGS", train_base.SHARED_FLAGS).items()}
    for name, default in flags.items():
        entry = re.search(rf"^  --{name}\b(.*?)(?=^  --|\Z)", ran.out, re.MULTILINE | re.DOTALL)
        assert entry, name
        if script != "sample":  # [default]; where it depends on the model, one for each
            shown = "not given" if isinstance(default, type) else \
                default if default is not None else module.BY_MODEL["tiny"][name]
            assert "[" in entry[1] and str(shown) in entry[1], name
        elif default and default is not True:
            assert f"[{default}]" in " ".join(entry[1].split()), name


def picture_file(folder: Path, kind: str) -> tuple[str, str]:
    "Five records, each with a picture of this kind -> (flag, culprit)."
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(bytes_of(kind))
    return f"--data={write(folder / 'd.json', [llava(f'{i}.jpg', id=f'r{i}') for i in range(5)])}", "record r"


def empty(folder: Path, name: str) -> tuple[str, str]:
    (folder / name).write_text("")
    return f"--data={folder / name}", f"{folder / name}: the file is empty"


def mismatch(folder: Path) -> tuple[str, str]:
    (folder / "a.png").write_bytes(image_bytes())
    rows = [llava("a.png"), llava("a.png", question="<image><image> What?")]
    return f"--data={write(folder / 'd.json', rows)}", "record 1 (id 'r1'): 2 <image> markers, 1 images"


def nan_checkpoint(folder: Path, trained: Path) -> tuple[str, str]:
    shutil.copytree(trained / "tiny/sft", folder / "nan")
    path = folder / "nan/model.safetensors"
    tensors = plumbing.weights.read_safetensors(trained / "tiny/sft/model.safetensors")
    tensors["gpt.embed.weight"] = torch.full_like(tensors["gpt.embed.weight"], torch.nan)
    plumbing.weights.write_safetensors(tensors, path)
    return f"--init={folder / 'nan'}", "gpt.embed.weight holds NaN"


def cut_checkpoint(folder: Path, trained: Path) -> tuple[str, str]:
    shutil.copytree(trained / "tiny" / "align", folder / "cut")
    path = folder / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return f"--init={folder / 'cut'}", str(path)


def empty_config(folder: Path, trained: Path) -> tuple[str, str]:
    shutil.copytree(trained / "tiny" / "align", folder / "bare")
    (folder / "bare" / "config.json").write_text('{"model_type": "ghostvis"}')
    return f"--init={folder / 'bare'}", str(folder / "bare" / "config.json")


def one_image(folder: Path, kind: str) -> tuple[str, str]:
    (folder / "x.jpg").write_bytes(bytes_of(kind))
    return f"--image={folder / 'x.jpg'}", str(folder / "x.jpg")

ALL, TRAINING = SCRIPTS, SCRIPTS[:4]
WITH_PICTURES = ["train_align", "train_sft", "train_rl", "bench"]  # those that read records with pictures
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
# What is wrong: (the scripts it is tried on, (folder, out folder) -> (flag or flags, what the error must name)).
WRONG = {
    "unknown_flag": (ALL, lambda f, t: ("--frobnicate=1", "--frobnicate")),
    "mistyped_flag": (ALL, lambda f, t: ("--bach_size=4", "did you mean --batch_size?")),
    "no_number": (ALL, lambda f, t: ("--batch_size=two", "batch_size")),
    "batch_size_0": (ALL, lambda f, t: ("--batch_size=0", "--batch_size")),
    "no_gpu": (ALL, lambda f, t: ("--device=cuda", "--device=cuda")),
    "no_such_device": (ALL, lambda f, t: ("--device=abacus", "--device=abacus")),
    "no_such_model": (ALL, lambda f, t: ("--model=huge", "huge")),
    "no_such_init": (ALL, lambda f, t: (f"--init={f / 'nowhere'}", f / "nowhere")),
    "cut_checkpoint": (ALL, cut_checkpoint),
    "config_lacks_a_part": (["train_sft", "sample"], empty_config),
    "optimizer": (TRAINING, lambda f, t: ("--optimizer=foo", "--optimizer=foo")),
    "dtype": (TRAINING + ["bench"], lambda f, t: ("--dtype=int3", "--dtype=int3")),
    "compile": (TRAINING + ["bench"], lambda f, t: ("--compile=perhaps", "--compile=perhaps")),
    "resume_is_no_word": (TRAINING, lambda f, t: ("--resume=perhaps", "perhaps")),
    "batch_does_not_divide": (TRAINING[:3],
                              lambda f, t: (["--batch_size=5", "--micro_batch_size=2"], "--micro_batch_size=2")),
    "float8": (TRAINING + ["bench"], lambda f, t: ("--float8", "--float8")),  # not on a CPU
    "max_bad_below_0": (TRAINING, lambda f, t: ("--max_bad=-1", "--max_bad=-1")),
    "micro_batch_below_0": (TRAINING, lambda f, t: ("--micro_batch_size=-1", "--micro_batch_size=-1")),
    "eval_size_0": (TRAINING + ["bench"], lambda f, t: ("--eval_size=0", "--eval_size=0")),
    "nothing_to_resume": (TRAINING, lambda f, t: (["--resume", f"--out_dir={f / 'new'}"], f / "new")),
    "data_missing": (TRAINING + ["bench"], lambda f, t: (f"--data={f / 'none.json'}", f / "none.json")),
    "data_empty": (TRAINING + ["bench"], lambda f, t: empty(f, "e.json")),
    "data_of_unknown_kind": (TRAINING + ["bench"], lambda f, t: (f"--data={f / 'd.parquet'}", f / "d.parquet")),
    "text_empty": (["train_base"], lambda f, t: empty(f, "e.txt")),
    "weight": (TRAINING + ["bench"], lambda f, t: ("--data=world:0", "world:0")),
    "markers_and_images_disagree": (WITH_PICTURES, lambda f, t: mismatch(f)),
    "picture_missing": (WITH_PICTURES,
                        lambda f, t: (f"--data={write(f / 'd.json', [llava('gone.jpg')])}", "'gone.jpg'")),
    "picture_cut": (WITH_PICTURES, lambda f, t: picture_file(f, "cut")),
    "picture_huge": (WITH_PICTURES, lambda f, t: picture_file(f, "huge")),
    "val_missing": (TRAINING[1:],
                    lambda f, t: ([f"--data={write(f / 'd.json', [{'question': 'q', 'answer': 'a'}] * 3)}",
                                   f"--val={f / 'none.json'}"], f / "none.json")),
    "val_with_the_world": (TRAINING, lambda f, t: (f"--val={f / 'v.json'}", f"--val={f / 'v.json'}")),
    "another_bridge": (TRAINING[1:], lambda f, t: (["--bridge=mlp", f"--init={t / 'tiny/align'}"],
                                                   "--bridge=perceiver: give that")),
    "no_byte_held_out": (["train_base"], lambda f, t: ("--seq_len=1", "--seq_len=1")),
    "kinds": (["train_rl"], lambda f, t: ("--kinds=count,foo", "'foo'")),
    "samples": (["train_rl"], lambda f, t: ("--samples=0", "--samples")),
    "temperature": (["train_rl", "sample"], lambda f, t: ("--temperature=-1", "--temperature")),
    "max_new_tokens": (["train_rl", "sample"], lambda f, t: ("--max_new_tokens=0", "--max_new_tokens")),
    "prompt_too_long": (["train_sft"], lambda f, t: ("--seq_len=8", "--seq_len=8")),
    "figures_of_nothing": (["bench"], lambda f, t: ("--what=figures", "--init=")),
    "figures_without_chapters": (["bench"], lambda f, t: (["--what=figures", f"--init={t / 'tiny/sft'}"], "--init=")),
    "clients": (["bench"], lambda f, t: (["--what=serve", "--clients=0"], "--clients=0")),
    "what": (["bench"], lambda f, t: ("--what=magic", "--what=magic")),
    "no_checkpoint": (["sample", "bench"], lambda f, t: ([f"--out_dir={f / 'new'}", "--model=small"], f / "new")),
    "top_p": (["sample"], lambda f, t: ("--top_p=0", "--top_p")),
    "top_k": (["sample"], lambda f, t: ("--top_k=-3", "--top_k")),
    "image_missing": (["sample"], lambda f, t: (f"--image={f / 'x.jpg'}", f / "x.jpg")),
    "image_cut": (["sample"], lambda f, t: one_image(f, "cut")),
    "image_huge": (["sample"], lambda f, t: one_image(f, "huge")),
    "images_missing": (["sample"], lambda f, t: (f"--images={f / 'none'}", f / "none")),
    "images_none_there": (["sample"], lambda f, t: (f"--images={f}", f)),
    "attention_alone": (["sample"], lambda f, t: (f"--attention={f / 'a.png'}", "--image")),
    "attention_in_a_chat": (["sample"], lambda f, t: (
        ["--chat", f"--image={HERE / 'cat.jpg'}", f"--attention={f / 'a.png'}"], "--chat and --attention")),
    "nan_in_the_weights": (["sample"], nan_checkpoint),
    "port": (["sample"], lambda f, t: (["--serve", "--port=99999"], "--port=99999")),
    "max_requests": (["sample"], lambda f, t: (["--serve", "--max_requests=0"], "--max_requests=0")),
}
CASES = [pytest.param(script, name, id=f"{script}-{name}", marks=NO_GPU if name == "no_gpu" else ())
         for name, (scripts, _) in WRONG.items() for script in scripts]


def wrong_call(script: str, name: str, tmp_path: Path, out: Path) -> tuple[list, str]:
    flags, culprit = WRONG[name][1](tmp_path, out)
    quick = {"sample": ["--max_new_tokens=4"], "bench": ["--eval_size=4"]}.get(
        script, ["--steps=2", "--eval_size=4", "--batch_size=2"])
    if script == "train_base":  # otherwise it would train a tokenizer on the world first, each time
        quick.append(f"--init={out / 'tiny/base'}")
    return ["--device=cpu", f"--out_dir={out}", *quick, *([flags] if isinstance(flags, str) else flags)], culprit


@pytest.mark.parametrize("script, name", CASES)
def test_bad_input_is_one_line_and_leaves_everything_as_it_was(trained, tmp_path, script, name):
    out = trained[0]
    flags, culprit = wrong_call(script, name, tmp_path, out)
    before, here = snapshot(out), snapshot(tmp_path)
    one_line(run(script, *flags), culprit)
    assert snapshot(out) == before and snapshot(tmp_path) == here


def test_bad_input_is_one_line_in_a_process_of_its_own(trained, tmp_path):
    flags, culprit = wrong_call("train_sft", "picture_cut", tmp_path, trained[0])
    ran = run_process("train_sft", *flags)
    one_line(ran, culprit)
    assert ran.code in (1, 2)


@pytest.mark.parametrize("script, words, remedy", [
    ("sample", ["cat.jpg"], "did you mean --image cat.jpg?"), ("sample", ["here"], "did you mean --images here?"),
    ("sample", ["--question", "What", "colour?"], "goes into quotes"), ("train_sft", ["my.json"], "--data=my.json?"),
    ("train_sft", ["lr=0.1"], "did you mean --lr=0.1?"), ("train_sft", ["stepz=3"], "did you mean --steps=3?")])
def test_a_word_without_its_flag_gets_a_suggestion(tmp_path, monkeypatch, script, words, remedy):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    (tmp_path / "here").mkdir()
    assert one_line(run(script, *words), "unrecognized arguments", remedy)


@pytest.mark.parametrize("script", ["train_align", "train_sft"])
def test_without_any_checkpoint_the_error_about_a_record_is_the_same(tmp_path, script):
    flag, culprit = mismatch(tmp_path)  # now the tokenizer is the first to read the file
    one_line(run(script, *QUICK, f"--out_dir={tmp_path / 'out'}", flag), culprit)
    assert not (tmp_path / "out").exists()


def test_resuming_with_another_number_of_micro_batches_is_refused(trained):
    # On another number of processes --micro_batch_size=0 would mean other rows per forward pass, and other positions
    # in the data.
    flags = train_base.chapter_flags("", "sft", train_sft.FLAGS, train_sft.BY_MODEL, [*QUICK, "--micro_batch_size=2"])
    vlm, tokenizer = model.load_checkpoint(trained[0] / "tiny/sft"), Tokenizer.from_pretrained(trained[0] / "tiny/sft")
    state = plumbing.files.read_json(trained[0] / "tiny/sft/state.json")
    assert len(state["data"]) == 1
    dataset = plumbing.world.World("chat")
    assert fails(lambda: train_base.make_loaders(flags, plumbing.ranks.Setup(flags), vlm, tokenizer, dataset, state),
          "--micro_batch_size")


def test_thin_matrices_beside_random_frozen_weights_are_refused(tmp_path):
    path = write(tmp_path / "d.json", [{"question": f"q{i}", "answer": "a"} for i in range(20)])
    ran = run("train_sft", f"--data={path}", f"--out_dir={tmp_path}", "--lora_rank=4", "--steps=1", "--device=cpu")
    assert ran.code == 1 and "--lora_rank=4" in ran.err and "random weights" in ran.err


def plant(rows: list, folder: Path) -> dict:
    "Kinds of faults -> a function that plants it in the set."
    def set_(**fields):
        return lambda: rows[5].update(fields)

    def turn(i, **fields):
        return lambda: rows[5]["conversations"][i].update(fields)

    def file(content: bytes):
        return lambda: (folder / "images" / rows[5]["image"]).write_bytes(content)

    def raw(edit):
        return lambda: rows.append(edit)  # a line of text in place of a row
    picture = rows[5]["image"]
    user, assistant = rows[5]["conversations"]
    return {
        "picture missing": set_(image="none.png"), "picture named by nothing": set_(image=["a", None]),
        "picture cut short": file(image_bytes("red", "JPEG", (64, 64))[:500]), "picture of no bytes": file(b""),
        "picture is a text": file(b"<html>404</html>"), "picture huge": file(bytes_of("huge")),
        "picture of one pixel": file(image_bytes(size=(1, 1))), "picture a mere line": file(image_bytes(size=(900, 4))),
        "picture outside": set_(image="../secret.png"), "picture absolute": set_(image="/etc/hosts"),
        "two markers": turn(0, value="<image>\n<image>\nWhat?"),
        "two pictures": set_(image=[picture, rows[4]["image"]]),
        "no picture for a marker": set_(image=None), "marker in the answer": turn(1, value="<image>"),
        "marker moved to the answer": lambda: (user.update(value="What?"), assistant.update(value="<image> red")),
        "answer empty": turn(1, value=""), "answer of blanks": turn(1, value=" \n"), "answer null": turn(1, value=None),
        "answer a number": turn(1, value=7), "answer a list of nothing": turn(1, value=[]),
        "unknown role": turn(1, **{"from": "robot"}), "two questions": turn(1, **{"from": "human"}),
        "answer first": lambda: rows[5]["conversations"].reverse(),
        "answer missing": lambda: rows[5]["conversations"].pop(),
        "no turns": set_(conversations=[]), "turns are a text": set_(conversations="red"),
        "turns are a number": set_(conversations=3), "role missing": lambda: assistant.pop("from"),
        "text missing": lambda: assistant.pop("value"), "system in the middle": turn(1, **{"from": "system"}),
        "no turns at all": lambda: rows[5].pop("conversations"), "row a list": lambda: rows.insert(5, [1]),
        "row a text": lambda: rows.insert(5, "x"), "row null": lambda: rows.insert(5, None),
        "duplicate": lambda: rows.append(copy.deepcopy(rows[5])),
        "mark of another format": turn(1, value="red</s>"), "chat mark in a text": turn(0, value="<|im_end|> <image>"),
        "damaged letter": turn(1, value="r\ufffdd"), "control character": turn(1, value="re\x00d"),
        "unknown metric": set_(metric="bleu"), "answer to score a number": set_(answer=4),
        "choices a list": set_(choices=["a"]), "right answer no choice": set_(answer="D", choices={"A": "x"}),
        "instances a number": set_(instances=4), "line cut off": raw('{"id": "x", "conv'),
        "line no JSON": raw("red, blue"),
        "nested too deep": raw(nested()), "number too long": raw('{"id": ' + "7" * 5000 + "}"),
    }


def check(folder: Path, *more) -> Ran:
    return run("data", "--check", f"--data={folder / 'd.jsonl'}", f"--out={folder / 'check.png'}", *more)


def clean_set(folder: Path) -> list[dict]:
    "Twelve records, of real pictures where there are some."
    (folder / "images").mkdir()
    rows = [llava(f"{i}.png", id=f"r{i}", question=f"<image>\nWhat is number {i}?", answer=f"number {i}")
            for i in range(12)]
    for i, row in enumerate(rows):
        if DATA.is_dir():
            row = rows[i] = json.loads((DATA / "sign_digits" / "train.json").read_text())[i]
            with zipfile.ZipFile(DATA / "sign_digits" / "images.zip") as file:
                (folder / "images" / row["image"]).write_bytes(file.read(row["image"]))
        else:
            (folder / "images" / f"{i}.png").write_bytes(image_bytes((i, 9, 9), size=(40, 30)))
    return rows


def write_rows(folder: Path, rows: list) -> None:
    (folder / "d.jsonl").write_text("\n".join(row if isinstance(row, str) and row != "x" else json.dumps(row)
                                              for row in rows))


def test_the_check_finds_nothing_in_a_clean_set_and_counts_it(tmp_path):
    write_rows(tmp_path, clean_set(tmp_path))
    ran = check(tmp_path, "--seq_len=128", "--image_tokens=8")
    assert ran.code == 0 and "bad: " not in ran.out and Image.open(tmp_path / "check.png").size[0] == 1200
    result = ran.result
    assert (result["records"], result["images"], result["turns"], result["bad"]) == (12, 12, 24, 0)
    assert result["supervised_tokens"] >= 24 and ran.out.count("[8 image tokens]") == 3 and ran.out.count("**") == 6


@pytest.mark.parametrize("fault", sorted(plant([llava()] * 6, Path())))
def test_the_check_finds_the_planted_fault(tmp_path, fault):
    rows = clean_set(tmp_path)
    plant(rows, tmp_path)[fault]()
    write_rows(tmp_path, rows)
    ran = check(tmp_path)
    lines = [line for line in ran.out.splitlines() if line.startswith("bad: ")]
    assert ran.code == 1 and ran.result["bad"] == len(lines) == 1, ran.out + ran.err
    assert str(tmp_path / "d.jsonl") in lines[0] and re.search(r"record (5|12)\b|line 13", lines[0]), lines[0]


def test_the_check_finds_held_out_pictures_that_also_train(tmp_path):
    rows = clean_set(tmp_path)
    write_rows(tmp_path, rows[:8])
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows[7:])))
    ran = check(tmp_path, f"--val={tmp_path / 'v.jsonl'}")
    assert ran.code == 1 and ran.result["bad"] == 2 and "is in --data, too" in ran.out  # it is a duplicate as well
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows[8:])))
    assert check(tmp_path, f"--val={tmp_path / 'v.jsonl'}").code == 0
    for name, answer in ("d.jsonl", "a"), ("v.jsonl", "b"):  # texts without an id are told apart by their words
        write(tmp_path / name, [{"question": "q", "answer": answer}], lines=True)
    assert check(tmp_path, f"--val={tmp_path / 'v.jsonl'}").code == 0
    shutil.copy(tmp_path / "d.jsonl", tmp_path / "v.jsonl")
    assert "is in --data, too" in check(tmp_path, f"--val={tmp_path / 'v.jsonl'}").out


def test_the_check_knows_pictures_by_their_content_not_by_their_names(tmp_path):
    names = "a/cat/1.png", "a/cat/2.png", "b/cat/1.png", "b/cat/3.png", "a/dog/1.png", "b/dog/1.png"
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes((number, 9, 9)))
    flags = ["--check", f"--data={tmp_path / 'a'}", f"--val={tmp_path / 'b'}", f"--out={tmp_path / 'check.png'}"]
    assert run("data", *flags).code == 0  # cat/1.png here is another picture than cat/1.png there
    shutil.copy(tmp_path / "a/cat/1.png", tmp_path / "a/cat/1 (copy).png")
    shutil.copy(tmp_path / "a/cat/2.png", tmp_path / "b/cat/3.png")
    out = run("data", *flags).out
    assert re.search(r"'cat/1.png'\): the same as .*'cat/1 \(copy\).png'", out)
    assert re.search(r"b, record 1 \(id 'cat/3.png'\): a picture or text of it is in --data, too", out)


def test_letters_that_the_terminal_lacks_are_written_as_numbers(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))  # a pipe on Windows
    plumbing.flags.run(lambda: print("猫 café \udce9", flush=True))
    assert sys.stdout.buffer.getvalue().decode("cp1252").strip() == r"\u732b café \udce9"


def test_mixtures_text_and_the_world_are_checked_too(tmp_path):
    write_rows(tmp_path, clean_set(tmp_path))
    (tmp_path / "a.txt").write_text("One.<|endoftext|>Two.")
    ran = run("data", f"--data={tmp_path / 'd.jsonl'}:2,{tmp_path / 'a.txt'},world", "--check",
              f"--out={tmp_path / 'c.png'}")
    assert ran.code == 0 and ran.result["records"] == 12 + 2 + 500 and (tmp_path / "c.png").exists()


def test_data_py_checks_a_file_of_records(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes())
    path = write(tmp_path / "d.json", [llava()])
    ran = run("data", f"--data={path}")
    assert ran.code == 0 and ran.result == {"records": 1, "images": 1, "turns": 2, "supervised_tokens": 0, "bad": 0}
    (tmp_path / "a.png").write_bytes(bytes_of("cut"))
    ran = run("data", f"--data={path}")
    assert ran.code == 1 and "1 of the records is bad" in ran.err and ran.result["bad"] == 1
    ran = run("data", f"--data={write(tmp_path / 'e.json', [{'id': 'x'}, llava()])}")
    assert "e.json, record 1 (id 'r1')" in ran.out  # its place in the file, not among the good ones
    (tmp_path / "a.png").write_bytes(bytes_of("huge"))
    ran = run_process("data", f"--data={path}")  # not here: it must not be decoded
    line, = (line for line in ran.out.splitlines() if line.startswith("bad: "))
    assert ran.code == 1 and str(path) in line and "'r1'" in line and "a.png" in line and "limit" in line
    for name in "nosuch/sheet.png", "sheet":
        ran = run("data", f"--data={path}", f"--out={tmp_path / name}")
        assert ran.code == 1 and "--out=" in ran.err and not ran.out  # before all is read, not after
    ran = run("data", f"--out={tmp_path / 'world.png'}")
    assert ran.code == 0 and Image.open(tmp_path / "world.png").size[0] == 1200
    asked = [plumbing.world.World("exam", "scenes")[i]["messages"][0]["content"] for i in range(10)]
    assert all(repr(question.removeprefix("<image>\n")) in ran.out for question in asked)  # of the scenes drawn


@pytest.mark.parametrize("lengths, expected", [([30] * 99 + [900], 112), ([30] * 98 + [120] * 2, 128), ([], 112),
                                               ([5000] * 3, 2048), ([112] * 100, 112), ([113] * 100, 128)])
def test_a_row_holds_99_of_100_documents_and_is_no_longer_than_the_model_reads(lengths, expected):
    assert row_length(lengths, 112, 2048) == expected


def test_rows_become_as_long_as_the_data_need_unless_their_length_is_given(tmp_path):
    rows = [{"question": f"Say it {'again and ' * 60}{i}.", "answer": "no"} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--steps=1", "--eval_size=2", "--batch_size=8", "--device=cpu", f"--data={tmp_path / 'long.jsonl'}"]
    ran = run("train_sft", *flags, f"--out_dir={tmp_path / 'a'}")
    length = int(re.search(r"--seq_len=(\d+) --batch_size=(\d+), so that", ran.err)[1])
    assert ran.code == 0 and length % 16 == 0 and "are cut" not in ran.err
    kept = json.loads((tmp_path / "a/tiny/sft/state.json").read_text())["flags"]
    assert kept["seq_len"] == length > 112 and kept["batch_size"] == max(1, 8 * 112 // length)
    # and the check says the same of them
    ran = run("data", "--check", f"--data={tmp_path / 'long.jsonl'}", f"--out={tmp_path / 'sheet.png'}")
    assert f"0 of 40 are longer than --seq_len={length}" in ran.out
    ran = run("train_sft", *flags, "--seq_len=112", f"--out_dir={tmp_path / 'b'}")
    assert ran.code == 1 and "so that" not in ran.err and "--seq_len=112; raise it" in ran.err


def test_zero_means_never_for_the_every_flags(trained, tmp_path):
    ran = run("train_base", *QUICK, f"--out_dir={tmp_path}", f"--init={trained[0] / 'tiny/base'}", "--eval_every=0",
              "--save_every=0")
    assert ran.code == 0 and ran.result["step"] == 2


def test_evaluations_and_checkpoints_on_the_way(trained, tmp_path, monkeypatch):
    saved = []
    module = importlib.import_module("train_sft")
    keep = module.save
    monkeypatch.setattr(module, "save", lambda *parts, **more: saved.append(parts[7]) or keep(*parts, **more))
    ran = run("train_sft", "--steps=3", "--eval_size=4", "--batch_size=2", "--device=cpu", "--eval_every=2",
              "--save_every=1", f"--out_dir={tmp_path}", f"--init={trained[0] / 'tiny/align'}", main=module.main)
    assert ran.code == 0 and saved == [1, 2, 3, 3] and ran.err.count("held-out accuracy") == 1


def test_the_first_chapter_reads_with_a_short_window(trained, tmp_path):
    # In a window of 24 tokens many dialogues have nothing left to learn; they are skipped, not stumbled over.
    flags = [*QUICK, f"--out_dir={tmp_path}", f"--init={trained[0] / 'tiny/base'}"]
    ran = run("train_base", *flags, "--seq_len=24")
    assert ran.code == 0 and ran.result["bits_per_byte"] > 0
    # What does not fit is cut, and it says how often: cut ends train without any error.
    assert "--seq_len=24 and are cut" in ran.err and "are cut" not in run("train_base", *flags).err
