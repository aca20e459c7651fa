"Data from the web, and public sets by their names."
import hashlib
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import data
import plumbing.recipes
from plumbing.formats import benchmark_row
from plumbing.pictures import fetch_picture, open_source
from plumbing.recipes import locate, read_records, recipe_rows
from tests.helpers import CHAT, COMMIT, add_to_tar, fails, image_bytes, llava, write

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_pictures_named_by_urls_are_fetched_when_they_are_used_and_only_once(web, tmp_path):
    web.files["/a.png"] = image_bytes()
    rows = [llava(f"{web.url}/a.png"), llava(f"{web.url}/none.png", id="r2")]
    one, two = read_records(write(tmp_path / "d.json", rows))
    assert not web.log
    web.faults = ["break", "503", "stall"]
    for _ in range(2):
        assert open_source(one["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert len(web.log) == 4  # three failures, and the one that succeeded
    assert fails(lambda: open_source(two["images"][0]), "/none.png", "404")
    web.faults = ["503"] * 9
    web.files["/b.png"] = image_bytes()
    assert fails(lambda: open_source(f"{web.url}/b.png"), "/b.png", "503", "5 times")
    web.faults = []
    web.files["/big.png"] = b"\0" * 5000
    assert fails(lambda: fetch_picture(f"{web.url}/big.png", tmp_path / "c", 4000, bytes), "4,000 bytes")
    web.redirects = {"/there.png": "/a.png", "/circle.png": "/circle.png"}
    assert open_source(f"{web.url}/there.png").getpixel((0, 0)) == (255, 0, 0)
    web.files["/later.png"] = b"<html>please log in</html>"
    assert fails(lambda: open_source(f"{web.url}/later.png"), "/later.png", "not a readable image")
    web.files["/later.png"] = image_bytes()  # the page was not kept in the picture's place
    assert open_source(f"{web.url}/later.png").getpixel((0, 0)) == (255, 0, 0)
    for url in f"{web.url}/circle.png", "http://[::1/a.png", "http:///a.png":
        assert fails(lambda: open_source(url), url)


def test_a_file_of_records_and_tar_shards_come_from_a_url(web, tmp_path):
    for number in range(2):
        with tarfile.open(path := tmp_path / f"s-00{number}.tar", "w") as tar:
            for i in range(2):
                add_to_tar(tar, f"{i}.json", json.dumps(CHAT | {"id": f"{number}{i}"}).encode())
        web.files[f"/x/{path.name}"] = path.read_bytes()
    web.faults = ["break", "stall"]
    records = read_records(f"{web.url}/x/s-{{000..001}}.tar")
    assert [record["id"] for record in records] == ["00", "01", "10", "11"]
    asked = len(web.log)
    assert len(read_records(f"{web.url}/x/s-{{000..001}}.tar")) == 4 and len(web.log) == asked  # from the cache
    assert data.parse_mixture(f"{web.url}/a.jsonl:2,{web.url}/b.jsonl,C:\\a.json") == [
        (f"{web.url}/a.jsonl", 2), (f"{web.url}/b.jsonl", 1), ("C:\\a.json", 1)]
    assert fails(lambda: read_records(f"{web.url}/none.json"), "none.json", "404")


def test_what_follows_the_question_mark_of_an_address_reaches_the_server(web, tmp_path, capsys):
    # As in signed addresses, which are mostly for GET alone. Azure's have colons, but no weight behind them.
    for number in range(2):
        web.files[f"/d{number}.jsonl?end=9:30Z&sig=secret"] = json.dumps(CHAT | {"id": str(number)}).encode()
    spec = f"{web.url}/d{{0..1}}.jsonl?end=9:30Z&sig=secret"
    assert data.parse_mixture(f"{spec},{spec}:2") == [(spec, 1), (spec, 2)]
    assert [record["id"] for record in read_records(spec)] == ["0", "1"]
    assert {method for method, _ in web.log} == {"GET"} and "secret" not in capsys.readouterr().err
    asked = len(web.log)
    assert len(read_records(spec)) == 2 and len(web.log) == asked  # from the cache
    assert fails(lambda: read_records(f"{web.url}/d0.jsonl?sig=other"), "d0.jsonl", "404")  # no copy


def test_a_recipe_says_its_size_and_licence_and_is_checked_by_its_hash(web, monkeypatch, capsys):
    rows = [{"question": f"{i}+1?", "answer": f"Well.\n#### 1,00{i}"} for i in range(8)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    recipe = {"stage": "rl", "about": "8 sums", "licence": "MIT, of course", "rows": "gsm8k", "hub": web.url,
              "revision": "", "files": {"t.jsonl": [len(content), hashlib.md5(content).hexdigest()]}}
    monkeypatch.setitem(plumbing.recipes.RECIPES, "sums", recipe)
    web.files["/t.jsonl"] = content
    web.faults = ["lie"]
    assert fails(lambda: read_records("sums"), "t.jsonl", "expected", "run again")
    records = read_records("sums")
    said = capsys.readouterr().err
    assert "MIT, of course" in said and " MB  t.jsonl" in said and "python data.py --download=sums" in said
    assert [r["messages"][1]["content"] for r in records] == [f"100{i}" for i in range(8)]
    assert records[0]["metric"] == "exact"
    assert len(read_records("sums@0.25")) == 2
    web.files["/t.jsonl"] = content + b"x"  # another file now, but ours is here
    assert len(read_records("sums")) == 8


def test_a_recipe_whose_server_is_gone_comes_from_its_mirror_with_the_same_hash(hub, monkeypatch, capsys):
    content = json.dumps({"question": "1+1?", "answer": "#### 2"}).encode()
    hub.large, hub.files["Org/Mirror"] = ("jsonl",), {"t.jsonl": content}
    recipe = {"stage": "rl", "about": "a sum", "licence": "MIT", "rows": "gsm8k", "hub": "http://127.0.0.1:9/gone",
              "revision": "", "files": {"t.jsonl": [len(content), hashlib.md5(content).hexdigest()]}}
    monkeypatch.setitem(plumbing.recipes.RECIPES, "sums", recipe)
    assert fails(lambda: read_records("sums"), "127.0.0.1:9", "5 times")
    monkeypatch.setitem(plumbing.recipes.RECIPES, "sums", recipe | {"mirror": f"Org/Mirror@{COMMIT}"})
    assert len(read_records("sums")) == 1 and "trying its mirror, Org/Mirror" in capsys.readouterr().err
    (file,), asked = locate("sums")[0], len(hub.log)
    assert len(read_records("sums")) == 1 and len(hub.log) == asked  # from the cache
    shutil.rmtree(Path(file).parent)
    hub.files["Org/Mirror"]["t.jsonl"] = content.replace(b"2", b"3")  # of the same size, but another file
    assert fails(lambda: read_records("sums"), "t.jsonl", "expected", hashlib.md5(content).hexdigest())


def test_a_recipes_pictures_come_from_where_it_says(web, monkeypatch, tmp_path):
    web.files["/train/a.png"] = image_bytes()
    web.files["/d.json"] = json.dumps([llava("coco/train/a.png"), llava("vg/b.png")]).encode()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("VG/b.png", image_bytes("blue"))
    web.files["/vg/images.zip"] = (tmp_path / "images.zip").read_bytes()
    monkeypatch.setitem(plumbing.recipes.RECIPES, "mix", {
        "stage": "sft", "about": "", "licence": "", "hub": web.url, "revision": "", "files": {"d.json": [None, None]},
        "images": {"coco/": f"{web.url}/", "vg/": f"{web.url}/vg/images.zip"}})
    one, two = read_records("mix")
    assert open_source(one["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert open_source(two["images"][0]).getpixel((0, 0)) == (0, 0, 255)


def test_rows_of_public_sets_become_questions_that_can_be_scored(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("train.json", json.dumps([{"answer": 2, "image": "VG_100K/1.jpg", "question": "How many?",
                                                 "question_id": 7}]))
        file.writestr("CLEVR_v1.0/scenes/CLEVR_train_scenes.json", json.dumps(
            {"scenes": [{"image_filename": "CLEVR_train_000000.png", "objects": [{}, {}, {}]}]}))
    row, = (benchmark_row(*parts) for parts in recipe_rows("tallyqa", str(tmp_path / "t.zip")))
    assert (row["answer"], row["images"], row["metric"]) == ("2", "VG_100K/1.jpg", "exact")
    row, = (benchmark_row(*parts) for parts in recipe_rows("clevr", str(tmp_path / "t.zip")))
    assert (row["answer"], row["images"]) == ("3", "images/train/CLEVR_train_000000.png")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add_to_tar(tar, "aokvqa_v1p0_train.json", json.dumps([
            {"image_id": 299207, "question": "What?", "question_id": "x", "choices": ["nine", "two"],
             "correct_choice_idx": 1}]).encode())
    row, = (benchmark_row(*parts) for parts in recipe_rows("aokvqa", str(tmp_path / "a.tar.gz")))
    assert (row["answer"], row["images"], row["choices"]) == ("B", "000000299207.jpg", {"A": "nine", "B": "two"})


def test_the_table_of_recipes_is_complete():
    for name, recipe in plumbing.recipes.RECIPES.items():
        assert recipe["stage"] in ("base", "align", "sft", "rl", "benchmark") and recipe["licence"] and recipe["about"]
        assert recipe["hub"].startswith(("datasets/", "https://")) and recipe["files"], name
        assert recipe.get("rows", "gsm8k") in ("tallyqa", "aokvqa", "clevr", "gsm8k")
        for size, digest in recipe["files"].values():
            assert digest is None or len(digest) in (32, 64) and int(digest, 16)
    assert {n for n, r in plumbing.recipes.RECIPES.items() if r["stage"] != "benchmark"} == {
        "tinystories", "c4", "llava-pretrain", "cc3m-595k", "llava-instruct-150k", "llava-mix665k", "clevr-count",
        "tallyqa", "a-okvqa", "gsm8k"}
