"Files of all kinds: the same records from each, and what is wrong with a row."
import base64
import gzip
import io
import itertools
import json
import os
import random
import re
import tarfile
import time
import unicodedata
import zipfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import data
import plumbing.formats
import plumbing.pictures
import plumbing.recipes
import plumbing.records
import plumbing.scoring
import plumbing.text
import plumbing.world
from tests.helpers import (CHAT, COLOURS_4, DATA, add_to_tar, build, chat_model, fails, image_bytes, llava,
                           needs_shared, nested, plain_records, run, split, tokenizer, write, write_tsv)

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("place", ["images/a.png", "a.png", "images.zip", "deflated", "prefixed", "nested"])
def test_an_image_is_found_wherever_llava_puts_it(tmp_path, place):
    if place.endswith(".png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(image_bytes())
    else:
        method = zipfile.ZIP_DEFLATED if place == "deflated" else zipfile.ZIP_STORED
        folder = {"prefixed": "train2017/", "nested": "LLaVA/images/"}.get(place, "")
        with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as file:
            file.writestr("__MACOSX/._a.png", b"junk")
            file.writestr(folder + "a.png", image_bytes())
            file.writestr(folder + "sub/b.png", image_bytes("blue"))
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [llava()]))
    assert record["messages"] == [{"role": "user", "content": "<image>\nWhat colour?"},
                                  {"role": "assistant", "content": "red"}]
    assert plumbing.pictures.open_source(record["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    if not place.endswith(".png"):
        record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [llava(["sub/b.png"])]))
        assert plumbing.pictures.open_source(record["images"][0]).getpixel((0, 0)) == (0, 0, 255)


def test_every_layout_becomes_the_same_messages(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"instruction": "q", "input": "", "output": "a"}, {"question": "q", "answer": "a"},
            {"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "", "output": "a"}]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for path in (write(tmp_path / "d.json", rows), write(tmp_path / "d.jsonl", rows, lines=True)):
        records = plumbing.recipes.read_records(path)
        assert len(records) == 6 and all(r["messages"] == expected and r["images"] == [] for r in records)
        assert [r["id"] for r in records] == ["0", "1", "2", "3", "3", "4"]
    with_input, = plumbing.recipes.read_records(write(tmp_path / "i.json", [{"instruction": "q", "input": "x", "output": "a"}]))
    assert with_input["messages"][0]["content"] == "q\n\nx"


def test_a_unicode_line_separator_does_not_cut_a_json_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": "a\u2028b", "answer": "c"}\n\n', encoding="utf-8")
    assert plumbing.recipes.read_records(tmp_path / "d.jsonl")[0]["messages"][0]["content"] == "a\u2028b"


def test_a_single_picture_without_marker_comes_first_and_scoring_keys_travel_along(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes())
    path = write(tmp_path / "d.json", [llava(question="What?", kind="colour", answer="red", licence="x")])
    record, = plumbing.recipes.read_records(path)
    assert record["messages"][0]["content"] == "<image>\nWhat?"
    assert record["kind"] == "colour" and "licence" not in record


def test_a_bad_record_is_named_with_file_index_id_and_problem(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image_bytes())
    good, path = llava(), tmp_path / "d.json"
    turn = {"from": "human", "value": "q"}
    for bad, parts in [
            (llava("c.png"), ["'c.png'", "images.zip"]),
            (llava(["a.png", "b.png"]), ["1 <image> markers", "2 images"]),
            (llava(["a.png", "b.png"], question="q"), ["0 <image> markers", "2 images"]),
            (llava(None), ["1 <image> markers", "0 images"]),
            ({"id": "r1", "src": "a.png", "question": "q", "answer": "a"}, ["['src']", "the key must be image"]),
            (llava(conversations=[turn]), ["user", "alternate"]),
            (llava(None, conversations=[]), ["none", "alternate"]),
            (llava(None, conversations=[turn, turn]), ["user, user"]),
            (llava(None, conversations=[turn, {"from": "system", "value": "s"}]), ["user, system"]),
            (llava(conversations=[{"from": "human", "text": "q"}]), ["'value'"]),
            (llava(conversations=[{"from": "robot", "value": "q"}]), ["'robot'"]),
            (llava(None, answer=5), ["not text but 5", "in quotes"]),
            ({"id": "r1", "prompt": "q"}, ["missing key"])]:
        assert fails(lambda: plumbing.recipes.read_records(write(path, [good, bad])), path, "record 1", "'r1'", *parts)
    assert fails(lambda: plumbing.recipes.read_records(write(path, [good, "text"])), path, "record 1", "object")


def test_an_unreadable_file_is_named_with_the_line(tmp_path):
    path = tmp_path / "d.json"
    for text in ("", "[]", "\n"):
        path.write_text(text)
        assert fails(lambda: plumbing.recipes.read_records(path), path, "empty")
    path.write_text('[\n{"question": "q", "answer": "a"},\n{"question"')
    assert fails(lambda: plumbing.recipes.read_records(path), path, "line 3")
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": \n')
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.jsonl"), "d.jsonl", "line 2")
    (tmp_path / "d.jsonl").write_text(json.dumps({"data": [llava()]}, indent=1))  # over many lines, and no list
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.jsonl"), "d.jsonl", "one object", "['data']")
    (tmp_path / "d.jsonl").write_text("{\n" * 3)
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.jsonl"), "line 1 (a line holds a whole record")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "none.json"), "none.json")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.doc"), "d.doc", "no such file")
    (tmp_path / "d.doc").write_text("a text")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.doc"), "d.doc", "unknown kind")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.parquet"), "d.parquet", "is it there")
    path.write_bytes(b'["\xff"]')
    assert fails(lambda: plumbing.recipes.read_records(path), path, "UTF-8")
    (tmp_path / "images.zip").write_bytes(b"PK not a zip")
    assert fails(lambda: plumbing.recipes.read_records(write(path, [llava()])), "images.zip")


def test_tsv_choice_questions_get_llavas_prompt_and_shared_pictures(tmp_path):
    image = base64.b64encode(image_bytes()).decode()
    rows = [{"index": 7, "image": image, "hint": "Look.", "question": "Which?", "A": "cat", "B": "dog", "C": "",
             "answer": "B", "category": "animals"},
            {"index": 1000007, "image": "7", "hint": "", "question": "Which?", "A": "dog", "B": "cat", "C": "",
             "answer": "A", "category": "animals"}]
    one, two = plumbing.recipes.read_records(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows))
    assert one["messages"][0]["content"] == ("<image>\nLook.\nWhich?\nA. cat\nB. dog\n"
                                             "Answer with the option's letter from the given choices directly.")
    assert one["messages"][1]["content"] == one["answer"] == "B" and one["metric"] == "choice"
    assert one["images"] == two["images"] == [image_bytes()] and one["kind"] == "animals"
    assert one["choices"] == {"A": "cat", "B": "dog"}
    path = write_tsv(tmp_path / "x.tsv", [{**rows[0], "answer": "D"}])
    assert fails(lambda: plumbing.recipes.read_records(path), path, "record 0", "'7'", "'D'")
    path = write_tsv(tmp_path / "x.tsv", rows[1:])
    assert fails(lambda: plumbing.recipes.read_records(path), path, "record 0", "image '7'")
    path = write_tsv(tmp_path / "x.tsv", [{key: rows[0][key] for key in ("index", "image", "question")}])
    assert fails(lambda: plumbing.recipes.read_records(path), path, "no column answer")


@pytest.mark.parametrize("name, answer, metric", [
    ("ChartQA_TEST", "['14', '14.0']", "relaxed"), ("TextVQA_VAL", "['a', 'b']", "vqa"), ("DocVQA_VAL", "x", "anls"),
    ("InfoVQA_VAL", "x", "anls"), ("OCRBench", "['x']", "contains"), ("OCRVQA_TEST", "x", "exact"),
    ("MME", "Yes", "yesno"), ("GQA_TestDev_Balanced", "table", "exact"), ("mine", "[1, 2", "exact")])
def test_the_files_name_chooses_the_official_rule(tmp_path, name, answer, metric):
    image = base64.b64encode(os.urandom(200000)).decode()  # longer than csv's own limit of 128 KB
    rows = [{"index": 0, "image": image, "question": "q", "answer": answer}]
    record, = plumbing.recipes.read_records(write_tsv(tmp_path / f"{name}.tsv", rows))
    assert record["metric"] == metric
    assert record["answer"] == (eval(answer) if answer.endswith("]") else answer)
    assert record["messages"][0]["content"].endswith("q" if metric == "contains" else "word or phrase.")


def test_tar_shards_hold_captions_or_conversations(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        conversation = json.dumps({"conversations": llava()["conversations"]}).encode()
        for name, content in [("x/1.jpg", image_bytes(kind="JPEG")), ("x/1.txt", b"A red square.\n"),
                              ("x/2.png", image_bytes()), ("x/2.json", conversation)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    one, two = plumbing.recipes.read_records(tmp_path / "s.tar")
    assert one["id"] == "x/1" and one["messages"][1]["content"] == "A red square."
    assert one["messages"][0]["content"].startswith("<image>\n") and two["messages"][1]["content"] == "red"
    assert plumbing.pictures.open_source(two["images"][0]).size == (8, 8)
    (tmp_path / "bad.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:700])
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "bad.tar"), "bad.tar")
    with tarfile.open(tmp_path / "mac.tar", "w") as tar:  # macOS packs a companion of each file
        for name, content in ("./._1.jpg", b"?"), ("./1.jpg", image_bytes()), ("./._1.txt", b"?"), ("./1.txt", b"Red."):
            add_to_tar(tar, name, content)
        add_to_tar(tar, "2.jpg", image_bytes())
    record, = plumbing.recipes.read_records(tmp_path / "mac.tar", max_bad=0.5)
    assert record["messages"][1]["content"] == "Red."
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "mac.tar"), "record 1: 2: no 2.json or .txt next to it")


def test_what_is_wrong_with_a_parquet_is_said_of_the_users_file(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    path, picture = tmp_path / "d.parquet", {"bytes": image_bytes(), "path": None}
    table = {"image": [picture, picture], "question": ["q", "q"], "answer": ["a", ""]}
    parquet.write_table(pyarrow.table(table), path)
    assert fails(lambda: plumbing.recipes.read_records(path), f"{path}, record 1", "empty")  # not of the .tar in the cache
    monkeypatch.setenv("GHOSTVIS_CACHE", str(path))  # a disk that takes nothing
    assert fails(lambda: plumbing.recipes.read_records(path), path, "cannot be laid out", "GHOSTVIS_CACHE")
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    table["image"][0] = {"bytes": None, "path": "a.jpg"}  # without it this would train as a question about nothing
    parquet.write_table(pyarrow.table(table), path)
    assert fails(lambda: plumbing.recipes.read_records(path), f"{path}, record 0", "a.jpg", "only named")


def test_text_is_cut_where_documents_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n<|endoftext|>\ntwo<|endoftext|>three\n")
    assert list(plumbing.text.read_text(path)) == ["one\n\nstill one", "two", "three"]
    paragraphs = [f"{number} " + "word " * 300 for number in range(20)]
    path.write_text("\n\n".join(paragraphs))
    documents = list(plumbing.text.read_text(path))
    assert all(1500 < len(one) < 8000 for one in documents)
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())
    assert all(one.split()[0].isdigit() for one in documents)  # cut between paragraphs only
    path.write_text("caption\n" * 10000)
    assert max(map(len, plumbing.text.read_text(path))) < 17000


def test_text_comes_from_json_gzip_and_folders(tmp_path):
    write(tmp_path / "a.json", ["one", "two"])
    with gzip.open(tmp_path / "b.json.gz", "wt") as file:  # as C4: lines, in spite of the name
        file.write('{"text": "three", "url": "u"}\n{"text": "four"}\n')
    write(tmp_path / "c.jsonl", [{"text": "five"}], lines=True)
    assert list(plumbing.text.read_text(tmp_path)) == ["one", "two", "three", "four", "five"]
    (tmp_path / "c.jsonl").write_text('{"txt": "five"}\n')
    assert fails(lambda: list(plumbing.text.read_text(tmp_path / "c.jsonl")), "c.jsonl", "record 0")
    (tmp_path / "b.json.gz").write_bytes((tmp_path / "b.json.gz").read_bytes()[:30])
    assert fails(lambda: list(plumbing.text.read_text(tmp_path / "b.json.gz")), "b.json.gz", "complete")
    (tmp_path / "e.txt").write_text(" \n")
    assert fails(lambda: list(plumbing.text.read_text(tmp_path / "e.txt")), "e.txt", "empty")
    assert fails(lambda: list(plumbing.text.read_text(tmp_path / "none.txt")), "none.txt")
    (tmp_path / "void").mkdir()
    assert fails(lambda: list(plumbing.text.read_text(tmp_path / "void")), "void")
    (tmp_path / "void" / ".kept").mkdir()
    for name in "._a.txt", ".kept/a.txt", "a.txt":  # macOS's companion of a file, an editor's copy
        (tmp_path / "void" / name).write_bytes(b"six" if name == "a.txt" else b"\xff")
    assert list(plumbing.text.read_text(tmp_path / "void")) == ["six"]
    (tmp_path / "void" / "a.txt").write_bytes(b"\xff")  # the error is about this file, not about pictures
    assert fails(lambda: data.tokenizer_texts(str(tmp_path / "void"), 0), "void/a.txt", "UTF-8")


def test_a_mixture_names_files_and_weights():
    assert data.parse_mixture("a.json:2,b.json") == [("a.json", 2.0), ("b.json", 1.0)]
    assert data.parse_mixture("world") == [("world", 1.0)]
    assert data.parse_mixture("a:0.5, b:.5") == [("a", 0.5), ("b", 0.5)]
    for wrong in ("", "a,,b", "a:0", "a:-1", "a:x", "a:", ":2", "a:nan", "a:inf"):
        assert fails(lambda: data.parse_mixture(wrong), repr(wrong), "NAME:WEIGHT")


def test_one_picture_is_never_on_both_sides_of_a_split():
    rng = random.Random(0)
    records = [{"id": str(i), "images": [b"%d" % rng.randrange(200)] * (i % 9 > 0)} for i in range(900)]
    records += [{"id": f"m{i}", "images": [b"%d" % i, b"%d" % (i + 1)]} for i in range(0, 20, 2)]  # two pictures each
    train, held = split(records, 0.1)
    # who shows both sides' goes
    assert 0.9 * len(records) < len(train) + len(held) <= len(records) and 60 < len(held) <= 91
    seen = {image for r in train for image in r["images"]}
    assert not any(image in seen for r in held for image in r["images"])
    assert any(r["images"] for r in held) and any(not r["images"] for r in held)
    again = split(records[::-1], 0.1)[1]
    assert {r["id"] for r in again} == {r["id"] for r in held}  # the order in the file does not matter
    assert len(split(records, 0.5, at_most=40)[1]) <= 40


def test_a_split_leaves_no_side_empty():
    for sizes in [(1, 1), (50, 1), (1, 50), (30, 30), (1, 1, 1)]:
        records = [{"id": f"{i}-{j}", "images": [b"%d" % i]} for i, size in enumerate(sizes) for j in range(size)]
        for fraction in (0.0, 0.05, 0.5):
            train, held = split(records, fraction)
            assert train and held, (sizes, fraction)
    for records in ([{"id": "1", "images": []}], [{"id": "1", "images": [b"x"]}, {"id": "2", "images": [b"x"]}]):
        assert fails(lambda: split(records), "too few", "--val=")


def test_equal_bytes_under_two_names_in_a_zip_are_one_picture(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name in "ab":
            file.writestr(f"{name}.png", image_bytes())
    one, two = plumbing.recipes.read_records(write(tmp_path / "d.json", [llava("a.png"), llava("b.png")]))
    assert plumbing.pictures.picture_key(one["images"][0]) == plumbing.pictures.picture_key(two["images"][0])


@pytest.mark.parametrize("kind", ["files", "lines", "linked", "gzip", "zips", "zip of a part", "data URIs", "openai",
                                  "metadata", "shards", "FineVision", "LLaVA-OneVision"])
def test_the_same_conversations_come_out_of_every_container(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    spec = build(tmp_path, kind)
    for _ in range(2):  # the second time out of the cache, where there is one
        records = plumbing.recipes.read_records(spec)
        assert [record["id"] for record in records] == list(COLOURS_4)
        for record, (name, colour) in zip(records, COLOURS_4.items()):
            assert record["messages"] == [{"role": "user", "content": "<image>\nWhat colour?"},
                                          {"role": "assistant", "content": name}]
            assert plumbing.pictures.open_source(record["images"][0]).getpixel((0, 0)) == colour
        assert len(data.split_by_image(records, 0.5)[1]) == 2
        one, = plumbing.recipes.read_records(spec + "@0.25")
        assert one["id"] in COLOURS_4


def test_a_folder_per_class_and_captions_in_a_listing_are_read(tmp_path):
    for name, colour in COLOURS_4.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.JPG").write_bytes(image_bytes(colour, "JPEG"))
    records = plumbing.recipes.read_records(tmp_path / "classes")
    assert [r["messages"][1]["content"] for r in records] == sorted(COLOURS_4)
    assert records[0]["messages"][0]["content"] == "<image>\nWhat is this?"
    (tmp_path / "a.png").write_bytes(image_bytes())
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "A red square."}], lines=True)
    record, = plumbing.recipes.read_records(tmp_path)
    assert record["messages"][0]["content"] == "<image>\nDescribe the image."
    assert record["messages"][1]["content"] == "A red square."
    (tmp_path / "LICENSE.txt").write_text("My own.")
    assert run("data", f"--data={tmp_path}").result["images"] == 1  # no text, though there are "text" and .txt


def test_of_a_folder_of_pictures_nothing_is_left_out_in_silence_but_hidden_files(tmp_path):
    for name in "cat/1.png", "dog/1.JFIF", ".hidden/1.png", "cat/._1.png":  # JFIF: so Windows saves many a JPEG
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes())
    (tmp_path / "notes.txt").write_text("A note.")
    assert [record["id"] for record in plumbing.recipes.read_records(tmp_path)] == ["cat/1.png", "dog/1.JFIF"]
    assert run("data", f"--data={tmp_path}").result["images"] == 2  # it is no text
    (tmp_path / "cat" / "IMG_1.HEIC").write_bytes(b"x")  # as iPhones write them
    assert fails(lambda: plumbing.recipes.read_records(tmp_path), "cat/IMG_1.HEIC", "convert it")
    (tmp_path / "cat" / "2024").mkdir()
    (tmp_path / "cat" / "IMG_1.HEIC").rename(tmp_path / "cat" / "2024" / "2.png")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path), "cat/2024/2.png", "move it up to cat/")


@pytest.mark.parametrize("name,problem", [
    ("flat", "no sub-folders"), ("llava", "give that file"), ("nosuch", "no such file or folder"),
    ("s-{2..0}.tar", "below the first"), ("world@0.1", "give it a weight, world:0.1")])
def test_data_that_are_not_there_are_not_called_an_empty_file(tmp_path, name, problem):
    for folder in tmp_path / "flat", tmp_path / "llava" / "images":
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(image_bytes())
    assert fails(lambda: plumbing.recipes.read_records(name if "world" in name else tmp_path / name), name.split("@")[0], problem)

def put(folder: Path, *names, **more) -> None:
    "Files of these names: pictures, and captions or what `more` says."
    for name in (*names, *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = more.get(name, "A red cat." if name.lower().endswith(".txt") else image_bytes())
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_parquet(path: Path, table: dict, features: dict = {}) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(table).replace_schema_metadata(about), path)
    return path


def in_every_container(folder: Path, row: dict) -> list[Path]:
    "The row as .json, .jsonl, the .json of a .tar, and .parquet."
    with tarfile.open(folder / "d.tar", "w") as tar:
        add_to_tar(tar, "7.json", json.dumps(row).encode())
    return [write(folder / "d.json", [row]), write(folder / "d.jsonl", [row, row], lines=True), folder / "d.tar",
            write_parquet(folder / "d.parquet", {key: [value] for key, value in row.items()})]


def said(record: dict) -> list:
    return [turn["content"] for turn in record["messages"]]


@pytest.mark.parametrize("names, parts", [
    (["train2017/0.jpg", "annotations/x.json"], ["--data=", "annotations/x.json"]),
    (["train/1.jpg", "train/metadata.jsonl"], ["--data=", "/train"]), (["train/1.jpg", "val/2.jpg"], ["train, val", "split"]),
    (["Train/1.jpg", "TEST/2.jpg", "other/3.jpg"], ["split"]), (["train/1.jpg", "train/1.txt"], ["--data=", "/train"]),
    (["a/1.jpg", "a/1.txt", "b/2.jpg"], ["--data=", "/a"]), (["cat/1.jpg", "cat/2.jpg"], ["cat", "single kind"]),
    (["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg"], ["--data=", "/train --val=", "/val"]),
    (["cat/1.jpg", "dog/2.jpg", "3.jpg"], ["3.jpg", "beside"]), (["cat/1.jpg", "dog/2.jpg", "dog/3.mp4"], ["dog/3.mp4"]),
    (["cat/1.jpg", "dog/a/b/2.jpg"], ["dog/a/b/2.jpg", "too deep"]), (["1.jpg", "1.txt", "2.jpg"], ["2.jpg", "no 2.txt"]),
    (["images/cat/1.jpg", "images/dog/2.jpg"], ["--data=", "/x/images"]),
    (["images/1.jpg", "a.json"], ["--data=", "/x/a.json"]),
    (["1.jpg", "labels.csv"], ["--data=", "/x/labels.csv"]), (["1.jpg", "1.json"], ["no sub-folders"]),
    (["s-0.tar", "s-1.tar"], ["--data='", "/x/s-*.tar'"]), (["1.jpg", "1.txt", "2.txt"], ["2.txt", "no picture"]),
    (["data.arrow", "state.json"], ["save_to_disk", "to_parquet"])])
def test_a_folder_that_is_not_one_of_kinds_is_refused_with_what_would_be_right(tmp_path, names, parts):
    put(tmp_path / "x", *names)
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "x"), tmp_path / "x", *parts)
    assert run("data", f"--data={tmp_path / 'x'}").code == 1  # the check says so, too


def test_captions_beside_pictures_are_read_by_check_and_training_alike(tmp_path):
    put(tmp_path / "x", "0.jpg", "1.PNG", **{"0.txt": "A cat.\n", "1.TXT": "\ufeffA dog."})
    records = plumbing.recipes.read_records(tmp_path / "x")
    assert [said(record) for record in records] == [["<image>\nDescribe the image.", text] for text in ("A cat.", "A dog.")]
    assert run("data", f"--data={tmp_path / 'x'}").result["images"] == 2


@pytest.mark.parametrize("column", ["picture", "jpg", "IMG", "photo_url", "image_path", "imagePaths", "img", "Image"])
@pytest.mark.parametrize("value", ["a.png", "a.PNG", ["a.png"], {"path": "a.png", "bytes": None},
                                   "data:image/png;base64," + base64.b64encode(image_bytes()).decode(),
                                   base64.b64encode(image_bytes()).decode()])
def test_a_picture_is_one_under_any_name_in_any_spelling(tmp_path, monkeypatch, column, value):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    put(tmp_path, "a.png", "a.PNG")
    for path in in_every_container(tmp_path, {"question": "q", "answer": "a", column: value, "images": None}):
        record = plumbing.recipes.read_records(path)[0]
        assert said(record) == ["<image>\nq", "a"]
        assert plumbing.pictures.open_source(record["images"][0]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("column, value", [
    ("image_id", 42), ("src", "a.png"), ("meta", {"image": ["a.jpg"]}), ("file", "https://x/7.jpg?w=1"), ("pixels", [1, 2]),
    ("scan", "a.tif"), ("video", "x.mp4"), ("videos", ["x.MP4"]), ("audio", {"path": "a.wav"}), ("clip", "x.mov"),
    ("video_id", "abc"), ("url", "https://x/7.jpg"), ("frames", ["a.png", "b.png"]),
    ("blob", "data:video/mp4;base64,AAAA"), ("src", "data:image/png;base64,AAAA")])
@pytest.mark.parametrize("text", [{"question": "q", "answer": "a"}, {"text": "A cat."}])
def test_what_only_seems_to_be_a_picture_is_a_bad_record_named_by_its_column(tmp_path, monkeypatch, column, value, text):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    for path in in_every_container(tmp_path, text | {column: value}):
        moves = re.search("video|audio|clip|blob", column)
        assert fails(lambda: plumbing.recipes.read_records(path), path, "record 0", f"['{column}']",
                     "video or sound" if moves else "the key must be image")
        if column not in ("meta", "url") or "text" not in text:  # a web page's text may have links
            assert run("data", f"--data={path}").code == 1


def test_numbered_pictures_stand_where_the_text_names_them(tmp_path):
    put(tmp_path, "a.png", **{"b.png": image_bytes("blue")})
    row = {"question": "Is <image 2> like <image 1>?", "image_1": "a.png", "image_2": "b.png", "image_3": None,
           "options": "['yes', 'no']", "answer": "B"}
    record, other = plumbing.recipes.read_records(write(tmp_path / "d.json", [row, row | {"question": "Alike?"}]))
    assert [Path(source).name for source in record["images"]] == ["b.png", "a.png"] and record["answer"] == "B"
    assert said(record)[0].startswith("Is <image> like <image>?\nA. yes\nB. no\n")
    assert [Path(source).name for source in other["images"]] == ["a.png", "b.png"]
    assert said(other)[0].startswith("<image>\n<image>\nAlike?\n")
    path = write(tmp_path / "d.json", [row | {"question": "And <image 4>?"}])
    assert fails(lambda: plumbing.recipes.read_records(path), "record 0", "<image 4>")


def test_what_follows_a_list_is_an_error_with_its_line(tmp_path, monkeypatch):
    for block, (end, line) in itertools.product((30, 10 ** 6), {"]\n\n[": 3, "] x": 1, "]\n{}": 2}.items()):
        monkeypatch.setattr(plumbing.formats, "BLOCK", block)
        text = json.dumps([CHAT] * 9)[:-1] + end + "]" * end.endswith("[")
        (tmp_path / "d.json").write_text(text)
        assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.json"), f"line {line}:", "one list")


@pytest.mark.parametrize("options", [
    {"options": ["red", "green"]}, {"choices": ["red", "green"]}, {"choices": {"A": "red", "B": "green"}},
    {"A": "red", "B": "green", "C": "", "D": None}, {"option_a": "red", "option_b": "green"}, {"Options": "['red', 'green']"},
    {"choices": {"text": ["red", "green"], "label": ["A", "B"]}}])
@pytest.mark.parametrize("answer", [{"answer": "B"}, {"answer": 1}, {"answer": "1"}, {"answer": "(B)"}, {"answer": "Green"},
                                    {"answerKey": "B"}, {"correct_choice_idx": 1}, {"response": "B."}])
def test_options_of_every_form_are_in_the_question_and_the_answer_is_a_letter(tmp_path, options, answer):
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [{"question": "Colour?", **options, **answer}]))
    assert said(record) == ["Colour?\nA. red\nB. green\nAnswer with the option's letter from the given choices directly.",
                            "B"]
    assert (record["answer"], record["metric"], record["choices"]) == ("B", "choice", {"A": "red", "B": "green"})


@pytest.mark.parametrize("answer, part", [("blue", "none"), (2, "none"), (-1, "none"), ("1", "more than one")])
def test_an_answer_that_is_no_option_or_may_be_two_is_named(tmp_path, answer, part):
    path = write(tmp_path / "d.json", [{"question": "How many?", "options": ["1", "0"], "answer": answer}])
    assert fails(lambda: plumbing.recipes.read_records(path), path, "record 0", part)


def test_an_empty_option_leaves_the_others_their_letters_and_any_question_has_options(tmp_path):
    row = {"query": "Colour?", "A": "", "B": "red", "C": "green", "response": "B"}
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [row]))
    assert said(record)[0].startswith("Colour?\nB. red\nC. green\n") and said(record)[1] == "B"
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [llava(None, "q") | {"A": 1, "B": 2}]))
    assert "choices" not in record  # columns are options where they stand beside a question


def test_options_that_the_question_has_are_not_written_twice(tmp_path):
    row = {"question": "Colour?\n(A) red\n(B) green", "choices": ["red", "green"], "answer": "A"}
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [row]))
    assert said(record) == [row["question"], "A"]


TURN, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
COCO = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
READ = {  # a row, or a file -> what is said in its record
    "system and history": ({"system": "s", "instruction": "q", "output": "a", "history": [["x", "y"]]}, ["s", "x", "y", "q", "a"]),
    "query and response": ({"query": "q", "response": "a", "history": [[TURN["content"], "y"]]}, ["q", "y", "q", "a"]),
    "system beside messages": ({"system": "s", "messages": [TURN, REPLY]}, ["s", "q", "a"]),
    "conversations of role and content": ({"conversations": [TURN, REPLY]}, ["q", "a"]),
    "messages of from and value": ({"messages": llava()["conversations"], "image": "a.png"}, ["<image>\nWhat colour?", "red"]),
    "boxes are no instances": (llava(instances=[{"bbox": [1]}, {"bbox": [2]}]), ["<image>\nWhat colour?", "red"]),
    "answers that are one": ({"question": "q", "answers": "aye"}, ["q", "aye"]),
    "an instruction that is all input": ({"instruction": "", "input": "q", "output": "a"}, ["q", "a"]),
    "answers": ({"question": "q", "answers": ["x", "a", "a"]}, ["q", "a"]),
    "a kind": ({"image": "a.png", "label": "cat"}, ["<image>\nWhat is this?", "cat"]),
    "Windows": ({"image": "images\\b.png", "question": "q", "answer": "a"}, ["<image>\nq", "a"]),
    "Anthropic": ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data":
                   base64.b64encode(image_bytes()).decode()}}, {"type": "text", "text": "q"}]}, REPLY]}, ["<image>q", "a"]),
    "parts in their order": ({"images": ["a.png", "a.png"], "messages": [{"role": "user", "content": [
        {"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}, {"type": "image"}]}, REPLY]},
        ["x<image>y<image>", "a"]),
    "captions.csv": ('image,caption\na.png,"A red, red cat."\n', ["<image>\nDescribe the image.", "A red, red cat."]),
    "flickr.csv": ("image_name| comment_number| comment\na.png| 0| A cat .\n", ["<image>\nDescribe the image.", "A cat ."]),
    "x.tsv": ("image\tcaption\na.png\tA cat.\n", ["<image>\nDescribe the image.", "A cat."]),
    "D.JSON": (json.dumps([CHAT]), ["q", "a"]), "one.json": (json.dumps(CHAT, indent=1), ["q", "a"]),
    "lines.NDJSON": (json.dumps(CHAT) + ",\n", ["q", "a"]),
    "tools.json": (json.dumps({"messages": [TURN, REPLY], "tools": [{}]}, indent=1), ["q", "a"]),
    "a word in parts, a picture beside": ({"image": "a.png", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "<image>?"}]}, REPLY]},
        [[{"type": "image"}, {"type": "text", "text": "<image>?"}], "a"]),
    "bytes in letters": ({"image": {"bytes": base64.b64encode(image_bytes()).decode()}, "question": "q", "answer": "a"},
                         ["<image>\nq", "a"]),
    "a picture numbered 2": ({"image": "a.png", "image2": "a.png", "question": "q", "answer": "a"},
                             ["<image>\n<image>\nq", "a"]),
    "captions_train2017.json": (json.dumps(COCO), ["<image>\nDescribe the image.", "A cat."]),
    "annotations/captions_val2017.json": (json.dumps(COCO), ["<image>\nDescribe the image.", "A cat."]),
}


@pytest.mark.parametrize("name", READ)
def test_layouts_that_most_people_have_are_read(tmp_path, name):
    content, expected = READ[name]
    put(tmp_path, "a.png", "images/b.png", "train2017/0.jpg", "val2017/0.jpg")
    put(tmp_path, **{name if isinstance(content, str) else "d.json":
                     content if isinstance(content, str) else json.dumps([content])})
    record, = plumbing.recipes.read_records(tmp_path / (name if isinstance(content, str) else "d.json"))
    assert said(record) == expected
    assert len(record["images"]) == sum(map(plumbing.records.images_in, expected))


def test_a_row_of_a_table_with_a_cell_too_few_or_many_is_named(tmp_path):
    put(tmp_path, "a.png", **{"c.csv": "image,caption\na.png,A red, red cat.\na.png\na.png,A cat.\n"})
    assert len(plumbing.recipes.read_records(tmp_path / "c.csv", max_bad=0.7).bad) == 2
    names = "image,caption\n"
    for text, part in {"": "empty", "image,caption,caption\na.png,x,y\n": "['caption']", "a.png,x\n": "first line",
                       names + 'a.png,"x\na.png,y\n': "line 3: unexpected", names + 'a.png,"x" y\n': "line 2:"}.items():
        (tmp_path / "e.csv").write_text(text)
        assert fails(lambda: plumbing.recipes.read_records(tmp_path / "e.csv"), "e.csv", part)
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "c.csv"), "c.csv, record 0", "3 cells under 2 names")


def test_vqav2s_pair_of_files_is_one_set(tmp_path):
    put(tmp_path, "val2014/COCO_val2014_000000000042.jpg")
    path = write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json",
                 {"questions": [{"question_id": 1, "image_id": 42, "question": "Colour?"}]})
    assert fails(lambda: plumbing.recipes.read_records(path), "v2_mscoco_val2014_annotations.json")
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [{
        "question_id": 1, "multiple_choice_answer": "red", "answers": [{"answer": one} for one in ("blue", "red", "red")]}]})
    record, = plumbing.recipes.read_records(path)
    assert said(record)[1] == "red" and record["metric"] == "vqa" and record["answer"] == ["red", "red", "blue"]


@pytest.mark.parametrize("name, content, parts", [
    ("d.json", {"data": [CHAT]}, ["['data']", "json.dump"]), ("problems.json", {"1": CHAT, "2": CHAT}, [".values()"]),
    ("i.json", {"images": [{"id": 1}], "annotations": [{"bbox": [1]}]}, ["boxes", "captions_"]),
    ("dataset_info.json", {"features": {"a": {}}}, ["describes a data set"]), ("d.tar.gz", "x", ["tar -xf"]),
    ("d.zip", "x", ["unpack"]), ("d.arrow", "x", ["to_parquet"]),
    ("utf16.jsonl", json.dumps(CHAT).encode("utf-16"), ["UTF-16", "UTF-8"]),
    ("tasks.json", [{"data": {"image": "a.png"}, "annotations": []}], ["Label Studio"]),
    ("captions_val.json", COCO | {"annotations": [{"caption": "x"}]}, ["COCO", "'image_id'"]),
    ("captions_val.json", COCO | {"annotations": [{"image_id": 9, "caption": "x"}]}, ["captions is an empty list"])])
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, name, content, parts):
    put(tmp_path, **{name: content if isinstance(content, (str, bytes)) else json.dumps(content, indent=1)})
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / name), tmp_path / name, *parts)


def test_image_as_a_word_stays_a_word_in_parts_and_is_refused_in_an_answer(tmp_path):
    put(tmp_path, "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is <image>?"}]
    row = {"messages": [{"role": "user", "content": parts},
                        {"role": "assistant", "content": [{"type": "text", "text": "<image> is a tag."}]}]}
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [row]))
    document = data.make_document(record, 0, tokenizer(), 4, 999)
    assert len(document.slots) == 1 and "What is <image>?" in tokenizer().decode(document.ids)
    assert run("data", f"--data={tmp_path / 'd.json'}").code == 0
    path = write(tmp_path / "d.json", [llava(question="What?", answer="<image>")])
    assert fails(lambda: plumbing.recipes.read_records(path), "record 0", "cannot draw", "list of parts")


@pytest.mark.parametrize("key, value", [("weight", 0), ("loss", False), ("train", False)])
def test_an_answer_of_weight_0_is_read_but_not_learned(tmp_path, key, value):
    turns = [TURN, REPLY | {key: value}, TURN, {"role": "assistant", "content": "b", "weight": 1}]
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [{"messages": turns}]))
    document = data.make_document(record, 0, tokenizer(), 4, 999)
    learned = [token for token, mask in zip(document.ids, document.mask) if mask]
    assert learned == tokenizer().encode("b") + [tokenizer().im_end]
    assert [len(one["messages"]) for one in data.questions_of(record)] == [4]
    path = write(tmp_path / "d.json", [{"messages": turns[:2]}])
    assert fails(lambda: plumbing.recipes.read_records(path), "record 0", "weight 0")


def test_of_several_captions_one_is_drawn_for_each_epoch(tmp_path):
    put(tmp_path, "a.png")
    path = write(tmp_path / "d.json", [{"image": "a.png", "captions": list("abcde")}] * 2)
    draws = [[said(data.Shuffled(plumbing.recipes.read_records(path), seed)[i])[1] for i in range(40)] for seed in (0, 0, 1)]
    assert set(draws[0]) == set("abcde") and draws[0] == draws[1] != draws[2]
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, content in {"7.png": image_bytes(), "7.json": b'{"instruction": "q", "output": "a"}', "7.txt": b"x"}.items():
            add_to_tar(tar, name, content)
    assert said(plumbing.recipes.read_records(tmp_path / "d.tar")[0]) == ["<image>\nq", "a"]  # not the .txt


def test_parquets_of_a_folder_class_labels_and_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        write_parquet(tmp_path / "x" / f"train-0000{number}-of-00002.PARQUET", {
            "img": [{"bytes": image_bytes(), "path": None}], "label": [number]},
            {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}})
    for spec in tmp_path / "x", tmp_path / "x" / "train-*":
        assert [said(r)[1] for r in plumbing.recipes.read_records(spec)] == ["cat", "dog"]
    write_parquet(tmp_path / "x" / "test-00000-of-00001.parquet", {"text": ["x"]})
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "x"), "train-*'", "--val=", "test-*'")


def test_names_and_links_inside_the_data_are_found_and_no_others(tmp_path, monkeypatch):
    put(tmp_path, "blobs/abc", "secret.png", "a,b/images/c.png")
    (tmp_path / "snapshots/x/images").mkdir(parents=True)
    (tmp_path / "snapshots/x/images/0.png").symlink_to("../../../blobs/abc")
    (tmp_path / "snapshots/x/images/1.png").symlink_to("../../../secret.png")
    path = write(tmp_path / "snapshots/x/d.json", [llava("0.png")])
    assert len(plumbing.recipes.read_records(path)) == 1
    assert fails(lambda: plumbing.recipes.read_records(write(path, [llava("1.png")])), "leads out")
    inside = tmp_path / "a,b" / "images" / "c.png"
    path = write(tmp_path / "a,b" / "d.json", [llava(str(inside)), llava(f"file://{inside}"), llava({"path": str(inside)})])
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in f'"{path}":2', str(path).replace(",", "\\,") + ":2", '"~/a,b/d.json":2':
        (name, weight), = data.parse_mixture(spec)
        assert weight == 2 and len(plumbing.recipes.read_records(name)) == 3


def test_a_run_that_goes_on_with_other_records_says_so(tmp_path, capsys):
    def loader(rows, state=None):
        records = plumbing.recipes.read_records(write(tmp_path / "d.json", rows))
        make = partial(data.make_document, tokenizer=tokenizer(), image_tokens=4, seq_len=64)
        return data.Loader(data.Mixture([(data.Shuffled(records, 0), 1)]), make, None, 2, 64, 4, state=state)
    rows = [CHAT | {"id": i} for i in range(40)]
    first = loader(rows)
    next(first)
    state = json.loads(json.dumps(first.state()))
    loader(rows, state)
    assert not capsys.readouterr().err
    for others, now in (rows[:12], 12), (rows[1:] + [CHAT | {"id": 41}], 40):
        next(loader(others, state))
        assert f"40 records before, {now} now" in capsys.readouterr().err


def test_texts_whose_ids_are_null_are_told_apart(tmp_path):
    path = write(tmp_path / "d.json", [CHAT | {"id": None} for _ in range(30)])
    assert len(data.split_by_image(plumbing.recipes.read_records(path))[1]) == 6


HOSTILE = {  # a row (or its text) that the reader refuses, and what it says
    "absolute name": (llava("/etc/passwd"), "leads out"),
    "name with ..": (llava("../../x.png"), "leads out"),
    ".. in the middle": (llava("a/../../x.png"), "leads out"),
    "Windows drive": (llava("C:\\x.png"), "leads out"),
    "zero byte": (llava("a\0.png"), "leads out"),
    "link that leads out": (llava("link.png"), "link that leads out"),
    "in a folder that is a link": (llava("away/secret.png"), "link that leads out"),
    "name too long": (llava("x" * 100_000), "no image"),
    "file: URL": (llava("file:///etc/passwd"), "leads out"),
    "nested JSON": (nested(), "not valid JSON"),
    "number of 5,000 digits": ('{"question": "q", "answer": ' + "7" * 5000 + "}", "not valid JSON"),
    "instances is a number": (CHAT | {"instances": 7}, "instances"),
    "instances is a text": (CHAT | {"instances": "abc"}, "instances"),
    "instances is a dict": (CHAT | {"instances": {"input": "x"}}, "instances"),
    "instance is a number": (CHAT | {"instances": [7]}, "instances"),
    "answer is a number": (CHAT | {"answer": 7}, "not text"),
    "answer is null": (CHAT | {"answer": None}, "not text"),
    "no answers": (CHAT | {"answer": []}, "'r1'"),
    "answers of numbers": (CHAT | {"answer": [1, 2]}, "not text"),
    "answer to score is a number": (llava(None, "q", answer="a") | {"answer": 7}, "must be a text"),
    "answers to score are none": (llava(None, "q") | {"answer": []}, "must be a text"),
    "answer to score is empty": (llava(None, "q") | {"answer": " "}, "must be a text"),
    "unknown metric": (CHAT | {"metric": "bleu"}, "unknown metric 'bleu'"),
    "metric is a list": (CHAT | {"metric": ["exact"]}, "unknown metric"),
    "choices are a text": (CHAT | {"choices": "a or b"}, "choices must be"),
    "choices are one": (CHAT | {"choices": ["a"]}, "choices must be"),
    "choices are objects": (CHAT | {"choices": [{"text": "a"}, {"text": "b"}]}, "choices must be"),
    "another format's picture": (CHAT | {"question": "Picture 1: <img>a.png</img>\nq"}, "'<img>a.png</img>' in a"),
    "another format's mark": (llava("images/x.png", "<|image_1|>\nq"), "another format's mark"),
    "video at the end": (CHAT | {"question": "q\n<video>"}, "video or sound"),
    "part with a video": ({"id": "r1", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video'"),
    "input is a list": (CHAT | {"instruction": "q", "input": [1], "output": "a"}, "list found"),
    "caption with a mark": ({"id": "r1", "image": "data:;base64,AAAA", "captions": ["a", "An <image>"]}, "in a caption"),
    "mark of another spelling": (llava("images/x.png", "<Image>\nq"), "'<Image>"),
    "choice is a number": (CHAT | {"choices": {"A": 1}}, "choices must be"),
    "kind is a number": (CHAT | {"kind": 3}, "kind must be"),
    "image is a dict": (llava({"width": 7}), "no name"),
    "image is a dict that leads out": (llava({"path": "/etc/passwd"}), "leads out"),
    "absolute name that leads out again": (llava(os.path.abspath("a") + "/../../x.png"), "leads out"),
    "image is a list of lists": (llava([["a.png"]]), "no name"),
    "messages is a number": ({"id": "r1", "messages": 7}, "missing key"),
    "turn is a number": ({"id": "r1", "messages": [7]}, "missing key"),
    "role is a list": ({"id": "r1", "messages": [{"role": [], "content": "x"}]}, "missing key"),
    "content part of unknown type": ({"id": "r1", "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
                                     "'audio'"),
    "content part is a number": ({"id": "r1", "messages": [{"role": "user", "content": [7]}]}, "missing key"),
    "data URI of no base64": (llava("data:image/png;base64,%%%"), "'r1'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_refused_in_one_line_that_names_it(tmp_path, name):
    row, part = HOSTILE[name]
    folder = tmp_path / "data"
    (tmp_path / "elsewhere").mkdir()
    (folder / "images").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret.png").write_bytes(image_bytes())
    (folder / "images" / "link.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "images" / "away").symlink_to(tmp_path / "elsewhere")
    text = row if isinstance(row, str) else json.dumps(row)
    for file, content in ("d.jsonl", json.dumps(CHAT) + "\n" + text), ("d.json", f"[{json.dumps(CHAT)},\n{text}]"):
        (folder / file).write_text(content)
        line = fails(lambda: plumbing.recipes.read_records(folder / file), folder / file, part)
        assert len(line) < 1000 and re.search("record 1|line 2", line)
    records = plumbing.recipes.read_records(folder / "d.jsonl", max_bad=0.5)  # the others go on
    assert [record["id"] for record in records] == ["r1"] and len(records.bad) == 1


@pytest.mark.parametrize("fields, part", [
    ({"name": "/etc/x.jpg"}, "leads out"), ({"name": "a/../../x.jpg"}, "leads out"),
    ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link"),
    ({"type": tarfile.LNKTYPE, "linkname": "a"}, "link"),
    ({"type": tarfile.FIFOTYPE}, "device"), ({"type": tarfile.CHRTYPE}, "device")])
def test_a_hostile_tar_is_refused_by_name(tmp_path, fields, part):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add_to_tar(tar, "1.jpg", image_bytes())
        add_to_tar(tar, "1.txt", b"red")
        add_to_tar(tar, "2.jpg", b"", **fields)
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "s.tar"), tmp_path / "s.tar", part)


def test_compressed_tars_and_zip_bombs_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        add_to_tar(tar, "1.txt", b"red")
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "s.tar"), "s.tar", "cannot be read")
    monkeypatch.setattr(plumbing.pictures, "MAX_PICTURE", 10 ** 6)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", b"\0" * 10 ** 7)  # 10 KB in the zip
    record, = plumbing.recipes.read_records(write(tmp_path / "d.json", [llava()]))
    assert fails(lambda: plumbing.pictures.open_source(record["images"][0]), "a.png in", "10,000,000 bytes")


def test_of_thousands_of_frames_only_the_first_is_decoded(tmp_path):
    frames = [Image.new("P", (300, 300), i % 200) for i in range(3000)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    started = time.time()
    assert plumbing.pictures.open_source(str(tmp_path / "a.gif")).size == (300, 300) and time.time() - started < 0.5


def test_all_bad_records_are_listed_not_only_the_first(tmp_path):
    rows = [CHAT | {"answer": i if i % 3 else f"a{i}", "question": f"q{i}"} for i in range(30)]
    ran = run("data", f"--data={write(tmp_path / 'd.json', rows)}")
    lines = [line for line in ran.out.splitlines() if line.startswith("bad: ")]
    assert ran.code == 1 and len(lines) == 5 and "20 bad records in all" in ran.out  # all are in a file:
    run("data", "--check", f"--data={tmp_path / 'd.json'}", f"--out={tmp_path / 'check.png'}")
    named = (tmp_path / "check.txt").read_text()
    assert all(f"record {i} " in named for i in range(30) if i % 3) and len(named.splitlines()) == 20
    assert ran.result["bad"] == 20 and ran.result["records"] == 10
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.json"), "record 1 ", "19 more")
    write(tmp_path / "d.json", [row for row in rows if isinstance(row["answer"], int)])
    assert fails(lambda: plumbing.recipes.read_records(tmp_path / "d.json", max_bad=1.0), "all of its 20 records are bad")


def test_a_list_of_any_layout_is_read_block_by_block(tmp_path, monkeypatch):
    rows = [{"id": i, "question": "q\u00e9\u2028\U0001f600 " * (i % 40), "answer": f'"{i}" [x], {{y}}'}
            for i in range(300)]
    for block, indent, ascii_only, between in itertools.product((50, 1000, 10 ** 6), (None, 2), (True, False),
                                                                ("list", "\n", "\r\n\r\n", ",\n", "")):
        monkeypatch.setattr(plumbing.formats, "BLOCK", block)
        path, say = tmp_path / "d.json", partial(json.dumps, indent=indent, ensure_ascii=ascii_only)
        text = say(rows) if between == "list" else between.join(map(say, rows))
        path.write_bytes(f"\ufeff\n {text}\n".encode())
        found = list(plumbing.formats.read_json_rows(str(path)))
        assert [row for _, _, row in found] == rows
        raw = path.read_bytes()
        assert all(json.loads(raw[start:end]) == row for start, end, row in found)
        path.write_bytes(raw[:len(raw) - 40])
        assert fails(lambda: plumbing.recipes.read_records(path), path)
    path.write_text("{'one'}\n" + json.dumps(rows[7]) + "\n{\n" + json.dumps(rows[8], indent=1))  # after a bad line
    good = [row for _, _, row in plumbing.formats.read_json_rows(str(path))]
    assert [type(row) for row in good] == [ValueError, dict, ValueError, dict] and good[3] == rows[8]


def test_a_caption_written_by_a_windows_editor_begins_with_its_first_letter(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_to_tar(tar, "1.png", image_bytes())
        add_to_tar(tar, "1.txt", "Müller".encode("utf-8-sig"))
    assert plumbing.recipes.read_records(tmp_path / "a.tar")[0]["messages"][1]["content"] == "Müller"


@pytest.mark.parametrize("ours, theirs", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_picture_is_found_in_both_spellings_of_its_umlaut(tmp_path, ours, theirs):
    name = unicodedata.normalize(theirs, "Söhne/ü.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr(f"z/{name}", image_bytes("blue"))
    path = write(tmp_path / "d.json", [llava(unicodedata.normalize(ours, name))])
    assert plumbing.pictures.open_source(plumbing.recipes.read_records(path)[0]["images"][0]).getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "images.zip").unlink()
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(image_bytes())
    assert plumbing.pictures.open_source(plumbing.recipes.read_records(path)[0]["images"][0]).getpixel((0, 0)) == (255, 0, 0)


def test_the_index_of_a_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    clock = iter(range(0, 10 ** 6, 10))
    monkeypatch.setattr(plumbing.formats.time, "time", lambda: next(clock))  # as if reading took 10 seconds
    path = write(tmp_path / "d.json", [CHAT | {"id": i} for i in range(50)])
    first = plumbing.recipes.read_records(path)
    kept, = (tmp_path / "cache" / "index").iterdir()
    read = []
    original = plumbing.formats.read_json_rows
    monkeypatch.setattr(plumbing.formats, "read_json_rows", lambda path: read.append(path) or original(path))
    again = plumbing.recipes.read_records(path)
    assert not read and list(again) == list(first) and (again.keys == first.keys).all()
    write(path, [CHAT | {"id": i} for i in range(51)])
    assert len(plumbing.recipes.read_records(path)) == 51 and read
    kept, = {*kept.parent.iterdir()} - {kept}
    for content in b"damaged", b"":  # empty: after a power cut
        kept.write_bytes(content)
        assert len(plumbing.recipes.read_records(path)) == 51


def test_a_picture_that_goes_after_the_index_was_made_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    clock = iter(range(0, 10 ** 6, 10))
    monkeypatch.setattr(plumbing.formats.time, "time", lambda: next(clock))  # as if reading took 10 seconds
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(image_bytes())
    path = write(tmp_path / "d.json", [llava(f"{i}.png", id=str(i)) for i in range(40)])
    flags = str(path), plumbing.world.World("chat"), {}, 0, 40
    held = data.load_data(*flags)[1]["held_out"]
    trained = min({str(i) for i in range(40)} - {record["id"] for record in held})
    for gone in trained, held[0]["id"]:
        (tmp_path / f"{gone}.png").unlink()
        assert fails(lambda: data.load_data(*flags), f"no image ['{gone}.png']")
        assert data.load_data(*flags, max_bad=0.1)[1]["held_out"] == [r for r in held if r["id"] != gone]
        assert f"no image ['{gone}.png']" in capsys.readouterr().err
        assert len(data.tokenizer_texts(str(path), 0)) == 100 + 2 * 39
        (tmp_path / f"{gone}.png").write_bytes(image_bytes())


def test_every_answer_of_a_held_out_conversation_becomes_a_question():
    record = chat_model("<image>a", "b", "<image>c", "d", "e", "f", images=[b"1", b"2"])
    one, two, three = data.questions_of(record)
    assert [len(r["messages"]) for r in (one, two, three)] == [2, 4, 6]
    assert [r["images"] for r in (one, two, three)] == [[b"1"], [b"1", b"2"], [b"1", b"2"]]
    assert len({r["id"] for r in (one, two, three)}) == 3
    scored = record | {"metric": "exact", "answer": "f"}
    assert data.questions_of(scored) == [scored]
    assert data.questions_of({"id": "t", "text": "x", "images": []}) == [{"id": "t", "text": "x", "images": []}]


def test_of_small_sets_a_fifth_is_held_out_and_the_counts_are_said(tmp_path, capsys):
    for n, expected in (100, 20), (999, 200), (1000, 50), (3000, 150):
        train, held = split(plain_records(n))
        assert len(held) == expected and len(train) == n - expected
    path = write(tmp_path / "d.json", [CHAT | {"id": i} for i in range(100)])
    data.load_data(str(path), None, {}, 0, 500)
    assert f"{path}: 80 of 100 records train, 20 questions are held out: fewer than 50" in capsys.readouterr().err


def test_the_reader_knows_every_scoring_rule():
    assert set(plumbing.records.METRICS) == set(plumbing.scoring.RULES) | {"vqa", "choice"}


def test_a_long_text_is_cut_into_the_same_pieces_from_memory_and_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join("a red cat " * (1 + i % 30) for i in range(300)))
    encode = tokenizer().encode
    small = plumbing.text.read_text_records(tmp_path / "a.txt", encode, 300, 16)
    monkeypatch.setattr(plumbing.text, "BLOCK", 100)
    large = plumbing.text.read_text_records(tmp_path / "a.txt", encode, 300, 16)
    again = plumbing.text.read_text_records(tmp_path / "a.txt", encode, 300, 16)
    kept = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(kept) == 2 and list(small) == list(large) == list(again)
    for file, spoil in itertools.product(kept, (Path.unlink, lambda file: os.truncate(file, 8))):
        spoil(file)  # the cache was cleaned, or the power went
        assert list(plumbing.text.read_text_records(tmp_path / "a.txt", encode, 300, 16)) == list(small)
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "a.txt"))  # a disk that takes nothing
    assert fails(lambda: plumbing.text.read_text_records(tmp_path / "a.txt", encode, 300, 16), "a.txt", "GHOSTVIS_CACHE")
    expected = []
    for number, text in enumerate(plumbing.text.read_text(tmp_path / "a.txt")):
        ids = encode(text) + [300]
        expected += [ids[at:at + 17] for at in range(0, len(ids) - 1, 16)]
    assert [record["ids"] for record in small] == expected
    train, held = data.split_by_image(small, 0.2)
    assert not {r["id"] for r in train} & {r["id"] for r in held}  # all pieces of a document stay together


@needs_shared
@pytest.mark.parametrize("name, count", [
    ("coco_caption/train.json", 971), ("clothing/train.json", 3068), ("clothing/val.json", 341),
    ("sign_digits/train.json", 1533), ("sign_digits/val.json", 210), ("easy_vqa/train.json", 14897),
    ("nlvr/train.json", None), ("nlvr/count_train.json", None),  # None: whatever the file holds
    ("sft_text/gsm8k_1500.jsonl", 1500), ("sft_text/instruction_data_1100.json", 1100),
    ("sft_text/self_instruct_seed_tasks.json", 175)])
def test_the_shared_sets_are_read_without_loss(name, count):
    records = plumbing.recipes.read_records(DATA / name)
    if not name.endswith("jsonl"):
        assert len(records) == len(json.loads((DATA / name).read_text()))
    assert count in (None, len(records))
    if records[0]["images"]:
        for record in records[::max(1, len(records) // 50)]:
            plumbing.pictures.open_source(record["images"][0])
        train, held = data.split_by_image(records)
        keys = [{plumbing.pictures.picture_key(image) for r in side for image in r["images"]} for side in (train, held)]
        assert train and 0 < len(held) <= 500 and not keys[0] & keys[1]


@needs_shared
def test_the_shared_texts_are_read_without_loss():
    text = (DATA / "text" / "tinyshakespeare.txt").read_text()
    documents = list(plumbing.text.read_text(DATA / "text" / "tinyshakespeare.txt"))
    assert "".join("".join(documents).split()) == "".join(text.split()) and max(map(len, documents)) < 8000
    assert len(list(plumbing.text.read_text(DATA / "text" / "books_train.jsonl"))) == 8
    assert len(list(plumbing.text.read_text(DATA / "text" / "books_val.jsonl"))) == 1
    captions = "\n".join(plumbing.text.read_text(DATA / "text" / "coco_captions_val2017.txt"))
    assert captions.count("\n") + 1 == 24834
