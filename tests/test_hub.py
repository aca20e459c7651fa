"Downloads: resumed, verified, from the hub or any server."
import errno
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model
import plumbing.files
import plumbing.hub
import plumbing.recipes
import plumbing.weights
import tokenizer as tokenizer_file
import tests.helpers
from extras.asking import options
from model import GPT, VLM
from plumbing.recipes import fetch_file
from tests.helpers import (CHAPTERS, COMMIT, HERE, fails, far, needs, one_line, run, sample_flags, save_onevision,
                           wait_until)
from tokenizer import Tokenizer
from vision import ViT

pytest_plugins = ["tests.helpers"]  # its fixtures


# ----------------------------------------------------------------------------------------------------------------------
# weights.py: downloads

TABLE = plumbing.hub.REPOSITORIES  # the real one; the fixture `hub` empties it


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def table(hub, monkeypatch, repo="Org/Name", short="short", **more):
    "The repository as an entry of the table, with the true size and hash of its weights."
    content = hub.files[repo]["model.safetensors"]
    pair = len(content), hashlib.sha256(content).hexdigest()
    small = {name: plumbing.hub.ANY for name in hub.files[repo] if name != "model.safetensors"}
    files = small | {"model.safetensors": more.pop("pair", pair)}
    entry = plumbing.hub.Repository(repo, COMMIT, files, **{"licence": "Apache-2.0"} | more)
    monkeypatch.setitem(plumbing.hub.REPOSITORIES, short, entry)
    return entry


def serve(hub, name="Org/Name", size=60_000, **files) -> bytes:
    "A repository with the usual small files -> its weights."
    content = noise(size)
    hub.files[name] = {"config.json": b'{"a": 1}', "tokenizer.json": noise(3000, 1), "model.safetensors": content}
    hub.files[name].update(files)
    return content


def siglip(hub, seed=0, between=False) -> bytes:
    "A file with a text and a vision part, as SigLIP's are. between: with a tensor in the middle of the vision part."
    shapes = {"logit_bias": [1], "text_model.a": [4000], "vision_model.a": [50, 100], "vision_model.b": [3]}
    shapes |= {"vision_modelX": [9]} if between else {"zzz": [700]}
    order = ["logit_bias", "text_model.a", "vision_model.a", *(["vision_modelX"] if between else []), "vision_model.b",
             *([] if between else ["zzz"])]
    header, offset, content = {"__metadata__": {"format": "pt"}}, 0, b""
    for i, name in enumerate(order):
        raw = noise(4 * int(torch.tensor(shapes[name]).prod()), seed + i)
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [offset, offset + len(raw)]}
        offset, content = offset + len(raw), content + raw
    raw = json.dumps(header).encode()
    file = struct.pack("<Q", len(raw)) + raw + content
    hub.files["google/siglip"] = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": file}
    return file


def no_weights(hub) -> bool:
    "Nothing lies under the name of the weights."
    return not list(hub.folder.rglob("model.safetensors"))


def refuses(hub, *parts, name="Org/Name"):
    message = fails(lambda: plumbing.hub.fetch(name), *parts)
    assert no_weights(hub)
    return message


def forked(job) -> int:
    "Runs it in a process of its own, without the seconds that importing torch takes -> the process."
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        # TRAP: tqdm's own lock is shared with forked processes, and one that is killed never gives it back.
        plumbing.hub.tqdm.set_lock(threading.RLock())
        job()
        code = 0
    finally:
        os._exit(code)


def finished(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def test_any_repository_is_fetched_whole_and_only_once(hub):
    content = serve(hub)
    folder = plumbing.hub.fetch("Org/Name")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "commit")} \
        == hub.files["Org/Name"]
    assert folder.parent == hub.folder and (folder / "model.safetensors").read_bytes() == content
    asked = len(hub.log)
    assert plumbing.hub.fetch("Org/Name") == folder and len(hub.log) == asked  # no request at all
    assert plumbing.hub.fetch(f"Org/Name@{COMMIT}").name == f"Org--Name@{COMMIT[:12]}"
    # Small files are asked for as they are: zipped they would have another ETag and no length.
    assert {headers["Accept-Encoding"] for _, _, headers in hub.log} == {"identity"}


def test_an_older_repository_has_its_tokenizer_in_two_files(hub):
    serve(hub, **{"vocab.json": b"{}", "merges.txt": b"a b"})
    assert not (plumbing.hub.fetch("Org/Name") / "vocab.json").exists()
    del hub.files["Org/Name"]["tokenizer.json"]
    hub.files["Org/Old"] = hub.files["Org/Name"]
    assert (plumbing.hub.fetch("Org/Old") / "merges.txt").read_bytes() == b"a b"
    hub.files["Org/Eyes"] = {name: hub.files["Org/Old"][name] for name in ("config.json", "model.safetensors")}
    assert not list(plumbing.hub.fetch("Org/Eyes").glob("*.txt"))  # none at all is no error


def test_shards_are_found_by_their_index(hub):
    serve(hub)
    files = hub.files["Org/Name"]
    del files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": noise(9000, i) for i in (1, 2)}
    files.update(shards, **{"model.safetensors.index.json": json.dumps(
        {"weight_map": dict(zip("abc", [*shards, *shards]))}).encode()})
    folder = plumbing.hub.fetch("Org/Name")
    assert {name: (folder / name).read_bytes() for name in shards} == shards
    asked = len(hub.log)
    assert plumbing.hub.fetch("Org/Name") == folder and len(hub.log) == asked
    (folder / "model-00002-of-00002.safetensors").unlink()
    plumbing.hub.fetch("Org/Name")
    assert [path.split("?")[0][-33:] for path, _ in hub.requests("GET", "signature=")][2:] \
        == ["/model-00002-of-00002.safetensors"]


def test_an_index_cannot_make_us_write_outside_the_folder(hub):
    serve(hub)
    del hub.files["Org/Name"]["model.safetensors"]
    hub.files["Org/Name"]["model.safetensors.index.json"] = b'{"weight_map": {"a": "../evil.safetensors"}}'
    assert refuses(hub, "model.safetensors.index.json", "weight_map")


def test_a_branch_is_one_commit_even_if_it_moves_on(hub):
    """The first answer's commit is asked for from then on, in a later process too."""
    serve(hub)
    hub.faults = ["status 403"]
    assert refuses(hub)
    plumbing.hub.fetch("Org/Name")
    revisions = [path.split("/")[4] for _, path, _ in hub.log if "/resolve/" in path]
    assert revisions[0] == "main" and set(revisions[1:]) == {COMMIT}


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch):
    """Not to the storage, which differs from the hub in its port alone; and ~/.netrc does not replace it."""
    serve(hub)
    (tmp_path / "netrc").write_text("default login me password secret")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", "hf_mine\n")
    plumbing.hub.fetch("Org/Name")
    for _, path, headers in hub.log:
        assert headers.get("Authorization") == (None if "signature=" in path else "Bearer hf_mine"), path
    assert hub.requests("GET", "signature=")


def test_the_token_is_found_in_its_file(hub, tmp_path, monkeypatch):
    serve(hub)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_file\n")
    plumbing.hub.fetch("Org/Name")
    assert hub.log[0][2]["Authorization"] == "Bearer hf_file"
    (tmp_path / "elsewhere").write_text("hf_other")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    plumbing.hub.fetch(f"Org/Name@{COMMIT}")
    assert hub.log[-1][2].get("Authorization") is None and "hf_other" in str(hub.log[-2][2])

CURABLE = {
    "cut": ["cut 20000", "cut 10000"],
    "cut_more_often_than_attempts": ["cut 5000"] * 9,
    "unranged": ["cut 20000", "unranged"],
    "shifted": ["cut 20000", "shifted"],
    "no_such_range": ["cut 20000", "status 416"],
    "short": ["short 20000"],
    "stall": ["stall 20000"],
    "status_503": ["status 503", "cut 20000", "status 500"],
}


@pytest.mark.parametrize("name", CURABLE)
def test_a_download_recovers_from_a_fault_on_the_way(hub, name):
    content, hub.faults = serve(hub), CURABLE[name]
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content
    assert not hub.faults and not list(hub.folder.rglob("*.part"))
    # Resumed where it makes sense, from the start where it does not.
    first, *later = hub.ranges()
    assert first is None and len(later) >= 1
    if name in ("cut", "cut_more_often_than_attempts", "short", "stall"):
        assert all(later) and hub.sent < 1.3 * len(content)
    if name in ("shifted", "no_such_range"):
        assert later[0] and later[1] is None


def test_a_download_goes_on_in_a_new_process(hub):
    content, hub.faults = serve(hub), ["cut 20000"] + ["status 404"]
    assert refuses(hub, "model.safetensors", "404")
    part, = hub.folder.rglob("*.part")
    assert part.read_bytes() == content[:20_000]
    assert finished(forked(lambda: plumbing.hub.fetch("Org/Name")))
    assert part.with_suffix("").read_bytes() == content
    assert hub.ranges() == [None, *["bytes=20000-59999"] * 2] and hub.sent == 60_000


@pytest.mark.parametrize("header, seconds", [("Retry-After 7", 8), ("ratelimit \"api\";r=0;t=55", 56),
                                             ("Retry-After Wed", 0.004)])
def test_a_retry_waits_as_long_as_the_server_asks(hub, monkeypatch, header, seconds):
    slept = []
    monkeypatch.setattr(plumbing.hub.time, "sleep", slept.append)
    content, hub.faults = serve(hub), [f"status 429 {header}"]
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content and slept == [seconds]


def test_five_failures_in_a_row_are_one_line_and_the_next_run_goes_on(hub, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(plumbing.hub.time, "sleep", slept.append)
    content, hub.faults = serve(hub), ["cut 20000"] + ["status 503"] * 5
    message = fails(lambda: plumbing.hub.fetch("Org/Name"), "Org/Name, model.safetensors", "503", "run again")
    assert no_weights(hub) and "5 times" in message
    # 0: after progress; then 1 to 4, each twice as long
    assert slept == [plumbing.hub.BACKOFF * 2 ** n for n in range(5)]
    assert capsys.readouterr().err.count("next attempt") == 5
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content and hub.sent < 65_000


def test_without_a_network_it_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert refuses(hub, "Org/Name, config.json", "Connection refused", "http://127.0.0.1:9", "run again")
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert refuses(hub, "HF_ENDPOINT=huggingface.co", "https://")

REFUSED = {  # the answer about config.json, and what the line says
    "401": ((401, {"X-Error-Code": "RepoNotFound"}), ["config.json", "gated", "HF_TOKEN"]),
    "403": ((403, {"X-Error-Code": "GatedRepo"}), ["config.json", "accept the licence", "HF_TOKEN"]),
    "404_repository": ((404, {"X-Error-Code": "RepoNotFound"}), ["no such repository", "name"]),
    "404_revision": ((404, {"X-Error-Code": "RevisionNotFound"}), ["no such revision", "@"]),
    "404_config": ((404, {"X-Error-Code": "EntryNotFound"}), ["config.json", "no such file"]),
    "418": ((418, {}), ["config.json", "418", "HF_ENDPOINT"]),
    "proxy_page": ((200, {"Content-Type": "text/html"}, b"<html>log in"), ["proxy", "HF_ENDPOINT"]),
    "proxy_redirect": ((302, {"Location": "http://127.0.0.2/login"}), ["proxy", "HF_ENDPOINT"]),
    "circle": ((302, {"Location": "/Org/Name/resolve/main/config.json"}), ["HF_ENDPOINT"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_that_no_retry_changes_is_one_line(hub, name):
    serve(hub)
    hub.answers["config.json"], parts = REFUSED[name]
    assert refuses(hub, "Org/Name", *parts)
    assert not hub.requests("GET", "signature=")


def test_missing_weights_are_one_line(hub):
    serve(hub)
    del hub.files["Org/Name"]["model.safetensors"]
    assert refuses(hub, "Org/Name, model.safetensors.index.json", "404", "safetensors")


def test_a_file_of_another_size_or_hash_than_in_the_table_is_refused_before_a_byte_is_fetched(hub, monkeypatch):
    content = serve(hub)
    right = hashlib.sha256(content).hexdigest()
    for pair in (len(content) + 1, right), (len(content), "0" * 64):
        table(hub, monkeypatch, pair=pair)
        assert refuses(hub, "Org/Name, model.safetensors", right, f"{pair[0]:,}", "HF_ENDPOINT", name="short")
    assert not hub.requests("GET", "")
    table(hub, monkeypatch)
    assert plumbing.hub.fetch("short") == plumbing.hub.fetch("Org/Name")  # the hub's id means the table's entry too


@pytest.mark.parametrize("pinned", [True, False])
def test_a_damaged_file_never_gets_its_name(hub, monkeypatch, pinned):
    content, hub.faults = serve(hub), ["flipped"]
    if pinned:
        table(hub, monkeypatch)
    assert refuses(hub, "model.safetensors", hashlib.sha256(content).hexdigest(), "damaged", "run again")
    assert not list(hub.folder.rglob("*.part"))  # deleted: nobody knows which byte is wrong
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content


def test_a_small_file_is_checked_by_gits_hash(hub, monkeypatch):
    serve(hub)
    monkeypatch.setattr(tests.helpers, "blob", lambda content: "ab" * 20)
    message = fails(lambda: plumbing.hub.fetch("Org/Name"), "config.json", "ab" * 20, "damaged")
    assert "deleted" in message and not list(hub.folder.rglob("config.json*"))


def test_a_full_disk_is_one_line_and_the_rest_comes_later(hub, monkeypatch):
    content, keep = serve(hub), plumbing.hub.receive

    def receive(remote, file):
        if remote.name == "model.safetensors":
            file.write(content[:20_000])
            raise OSError(errno.ENOSPC, "No space left on device")
        keep(remote, file)
    monkeypatch.setattr(plumbing.hub, "receive", receive)
    assert refuses(hub, "model.safetensors", "disk is full", "make room", "run again")
    monkeypatch.setattr(plumbing.hub, "receive", keep)
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content
    assert hub.ranges() == [f"bytes=20000-{len(content) - 1}"]


def test_too_little_room_is_an_error_before_the_first_byte(hub, monkeypatch):
    content, usage = serve(hub), plumbing.hub.shutil.disk_usage
    monkeypatch.setattr(plumbing.hub.shutil, "disk_usage", lambda path: usage(path)._replace(free=63_007))
    assert refuses(hub, hub.folder, "63,008 bytes", "63,007", "GHOSTVIS_CACHE")
    assert not hub.requests("GET", "")
    monkeypatch.setattr(plumbing.hub.shutil, "disk_usage", lambda path: usage(path)._replace(free=63_008))
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content


def test_files_sizes_and_licence_are_printed_before_a_download(hub, monkeypatch, capsys):
    serve(hub)
    table(hub, monkeypatch, licence="Qwen Research licence: non-commercial use only")
    monkeypatch.setattr(plumbing.hub, "download", lambda remote, folder: plumbing.hub.tell(f"> {remote.name}"))
    plumbing.hub.fetch("short")
    said = capsys.readouterr().err.splitlines()
    first = said.index("> config.json")
    assert all(line.startswith(">") for line in said[first:])
    text = "\n".join(said[:first])
    for part in "Org/Name", COMMIT[:12], "non-commercial", "model.safetensors", "0.1 MB  to come", hub.folder, "free":
        assert str(part) in text, text


def test_offline_nothing_is_asked(hub, monkeypatch):
    content = serve(hub)
    table(hub, monkeypatch)
    for variable, value in ("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "yes"), ("HF_HUB_OFFLINE", "True"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert refuses(hub, "lacks config.json, tokenizer.json, model.safetensors", variable, "--download=short",
                    name="short")
    assert not hub.log
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = plumbing.hub.fetch("short")
    monkeypatch.setenv("HF_HUB_OFFLINE", "on")
    hub.log.clear()
    assert plumbing.hub.fetch("short") == folder and not hub.log
    (folder / "model.safetensors").write_bytes(content[:-1])  # someone cut it: its size gives it away
    fails(lambda: plumbing.hub.fetch("short"), "lacks model.safetensors,")


@pytest.mark.parametrize("where", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_of_huggingface_hub_is_used_where_it_lies(hub, tmp_path, monkeypatch, where):
    content = serve(hub)
    table(hub, monkeypatch)
    cache = tmp_path / "hf" / "hub"
    if where == "HF_HUB_CACHE":
        cache = tmp_path / "other"
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--Org--Name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, content in hub.files["Org/Name"].items():
        (snapshot / name).write_bytes(content)
    (cache / "models--Org--Name" / "refs").mkdir()
    (cache / "models--Org--Name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert plumbing.hub.fetch("short") == snapshot
    plumbing.hub.REPOSITORIES.clear()
    assert plumbing.hub.fetch("Org/Name") == snapshot  # by refs/main
    assert not hub.log and not hub.folder.exists()
    # one file of a wrong size, and ours is fetched instead
    monkeypatch.delenv("HF_HUB_OFFLINE")
    table(hub, monkeypatch)
    (snapshot / "model.safetensors").write_bytes(content[:-1])
    assert plumbing.hub.fetch("short").parent == hub.folder


def test_two_processes_at_once_fetch_it_once(hub, tmp_path, monkeypatch):
    content, hub.hold = serve(hub), 30_000
    monkeypatch.setattr(plumbing.hub, "TIMEOUT", (2, 20))

    def job(number):
        with open(tmp_path / f"said{number}", "w", buffering=1) as said:
            plumbing.hub.tell = lambda text: said.write(text + "\n")  # in a process of its own
            plumbing.hub.fetch("Org/Name")
    children = [forked(lambda: job(0))]
    wait_until(lambda: any(path.stat().st_size > 10_000 for path in hub.folder.rglob("model*.part")))
    asked = len(hub.log)
    children.append(forked(lambda: job(1)))
    wait_until(lambda: (tmp_path / "said1").exists() and "waiting" in (tmp_path / "said1").read_text())
    hub.hold = None
    hub.released.set()
    assert all(finished(child) for child in children)
    assert (plumbing.hub.fetch("Org/Name") / "model.safetensors").read_bytes() == content
    # The first one's attempt after the break is all that came: the second has not even asked what there is.
    assert [path.split("?")[0] for _, path, _ in hub.log[asked:]] == [
        f"/Org/Name/resolve/{COMMIT}/model.safetensors", "/Org/Name/model.safetensors"]


@pytest.mark.parametrize("kind", ["whole", "cut_out"])
def test_after_a_kill_at_any_byte_the_next_process_resumes_the_download(hub, monkeypatch, kind):
    """SIGKILL, ten times in one download."""
    monkeypatch.setattr(plumbing.hub, "TIMEOUT", (2, 20))
    if kind == "whole":
        name, file = "Org/Name", serve(hub, size=300_000)
        begin, end = 0, len(file)
    else:
        name, file = "google/siglip", siglip(hub)
        table(hub, monkeypatch, name, prefix="vision_model.")
        begin = file.index(noise(20_000, 2))
        end = begin + 20_012
    places = [begin + (end - begin) * i // 10 for i in range(10)]
    for place in places:
        hub.hold = place
        before = len(hub.ranges())
        child = forked(lambda: plumbing.hub.fetch(name))
        # As far as the server goes; what Python holds back may be 8 KiB and a chunk.
        wait_until(lambda: len(hub.ranges()) > before and sum(
            path.stat().st_size for path in hub.folder.rglob("model*.part")) + 10_000 >= place - begin)
        os.kill(child, signal.SIGKILL)
        assert not finished(child) and no_weights(hub)
    hub.hold = None
    folder = plumbing.hub.fetch(name)
    if kind == "whole":
        assert (folder / "model.safetensors").read_bytes() == file
    else:
        assert (folder / "model.safetensors").read_bytes().endswith(file[begin:end])
        assert set(plumbing.weights.read_safetensors(folder)) == {"vision_model.a", "vision_model.b"}


# ----------------------------------------------------------------------------------------------------------------------
# weights.py: the vision tower out of a SigLIP file

def test_of_siglip_only_the_vision_tower_is_fetched(hub, monkeypatch, tmp_path):
    file = siglip(hub)
    table(hub, monkeypatch, "google/siglip", prefix="vision_model.")
    folder = plumbing.hub.fetch("short")
    (tmp_path / "whole.safetensors").write_bytes(file)
    whole, ours = map(plumbing.weights.read_safetensors, (tmp_path / "whole.safetensors", folder))
    assert set(ours) == {name for name in whole if name.startswith("vision_model.")} and len(ours) == 2
    assert all(torch.equal(tensor.view(torch.int32), whole[name].view(torch.int32)) for name, tensor in ours.items())
    entries, metadata, start = plumbing.weights.read_header(folder / "model.safetensors")
    assert start % 8 == 0 and metadata == {"format": "pt"}
    assert hub.sent < 21_000 < len(file) and all(hub.ranges())
    asked = len(hub.log)
    assert plumbing.hub.fetch("short") == folder and len(hub.log) == asked


def test_where_the_vision_tower_is_not_one_piece_the_whole_file_is_fetched(hub, monkeypatch):
    file = siglip(hub, between=True)
    table(hub, monkeypatch, "google/siglip", prefix="vision_model.")
    assert (plumbing.hub.fetch("short") / "model.safetensors").read_bytes() == file
    file = siglip(hub)
    table(hub, monkeypatch, "google/siglip", "other", prefix="audio_model.")
    plumbing.hub.REPOSITORIES["other"] = replace(plumbing.hub.REPOSITORIES["other"], revision="main")
    assert (plumbing.hub.fetch("other") / "model.safetensors").read_bytes() == file


@pytest.mark.parametrize("faults", [
    ["cut 4", "cut 100", "cut 9000"], ["unranged"] * 3, ["", "", "cut 9000", "unranged"],
    ["", "", "cut 9000", "shifted"], ["", "", "cut 9000", "status 416"]])
def test_the_vision_tower_recovers_too(hub, monkeypatch, faults):
    file = siglip(hub)
    table(hub, monkeypatch, "google/siglip", prefix="vision_model.")
    monkeypatch.setattr(plumbing.hub, "CHUNK", 16)
    hub.faults = list(faults)
    folder = plumbing.hub.fetch("short")
    at = file.index(noise(20_000, 2))
    assert not hub.faults and (folder / "model.safetensors").read_bytes()[-20_012:] == file[at:at + 20_012]
    plumbing.weights.read_header(folder / "model.safetensors")


def test_a_vision_tower_goes_on_in_a_new_process_but_not_after_another_header(hub, monkeypatch):
    """Its .part begins with a header of our own: bytes after any other header would be at wrong places."""
    file = siglip(hub)
    table(hub, monkeypatch, "google/siglip", pair=plumbing.hub.ANY, prefix="vision_model.")
    at = file.index(noise(20_000, 2))
    for other in False, True:
        hub.faults = ["", "", "cut 9000", "status 404"]
        assert refuses(hub, "model.safetensors", "404", name="short")
        part, = hub.folder.rglob("*.part")
        if other:
            part.write_bytes(b"?" + part.read_bytes()[1:])
        sent = hub.sent
        assert finished(forked(lambda: plumbing.hub.fetch("short")))
        done = part.with_suffix("")
        assert done.read_bytes()[-20_012:] == file[at:at + 20_012] and plumbing.weights.read_header(done)
        assert (hub.sent - sent > 20_000) == other
        done.unlink()


@pytest.mark.parametrize("length, header", [
    (2 ** 40, b""), (100_000_001, b""), (4, b"[1, "), (4, b"[12]"), (28, b'{"vision_model.a": {"a": 1}}'),
    (41, b'{"vision_model.a": {"data_offsets": [1]}}')])
def test_a_broken_header_is_one_line(hub, monkeypatch, length, header):
    siglip(hub)
    hub.files["google/siglip"]["model.safetensors"] = struct.pack("<Q", length) + header + noise(30_000)
    table(hub, monkeypatch, "google/siglip", prefix="vision_model.")
    assert refuses(hub, "google/siglip, model.safetensors", "not a valid safetensors file", name="short")


# ----------------------------------------------------------------------------------------------------------------------
# weights.py: the table; data.py: --download

def test_the_table_is_complete():
    names = [f"qwen2.5-{size}{kind}" for size in ("0.5b", "1.5b", "3b", "7b") for kind in ("", "-instruct")]
    asked = [f"qwen3-{size}{kind}" for size in ("0.6b", "1.7b", "4b", "8b") for kind in ("", "-base")]
    names += ["siglip2-large-patch16-256", "siglip-large-patch16-256", "siglip2-base-patch16-224",
              "siglip-base-patch16-224", "siglip-so400m-patch14-224", "siglip-so400m-patch14-384", "llava-ov-0.5b"]
    assert sorted(plumbing.hub.REPOSITORIES) == sorted(names + asked)
    for name in asked:  # their commits and hashes are the hub's own word, as with any Org/Name
        entry, size = plumbing.hub.REPOSITORIES[name], name.split("-")[1].upper()
        assert entry.hub == f"Qwen/Qwen3-{size}" + "-Base" * name.endswith("base")
        assert not entry.files and entry.revision == "main"
    for name, entry in ((name, plumbing.hub.REPOSITORIES[name]) for name in names):
        assert len(entry.revision) == 40 and next(iter(entry.files)) == "config.json" and "@" not in entry.hub
        assert list(entry.files)[-1].endswith(".safetensors")  # last: who has the weights has all
        for size, digest in entry.files.values():
            assert (size is None or size > 1e6) and (digest is None or len(digest) == 64 and int(digest, 16))
        assert (entry.prefix == "vision_model.") == name.startswith("siglip")
        assert ("non-commercial" in entry.licence) == ("3b" in name)
    assert list(plumbing.hub.REPOSITORIES["qwen2.5-3b"].files)[-3:] == [
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_an_unknown_name_shows_the_known_ones():
    for name in "qwen", "Org/Name/more", "../evil", "Org/../x@main":
        assert fails(lambda: plumbing.hub.fetch(name), repr(name), "qwen2.5-0.5b", "llava-ov-0.5b", "Org/Name@revision")
    ran = run("data", "--download=Org/Name,qwen")
    one_line(ran, "'qwen': no such repository")
    assert len(ran.err.splitlines()) == 1 and run("data", "--downlod=x").code == 2


def test_download_list_names_all():
    ran = run("data", "--download=list")
    names = [line.split()[0] for line in ran.out.splitlines()]
    assert ran.code == 0 and names == [*plumbing.hub.REPOSITORIES, *plumbing.recipes.RECIPES]
    assert ran.out.count("non-commercial") == 2


def test_download_prints_the_folder_of_each(hub):
    serve(hub)
    serve(hub, "Org/Other")
    ran = run("data", "--download=Org/Name, Org/Other,Org/Name")
    assert ran.code == 0 and ran.out.splitlines() == [f"{name} {hub.folder / name.replace('/', '--')}@main" for name in
                                              ("Org/Name", "Org/Other")]
    assert "model.safetensors: complete" in ran.err and "%|" not in ran.err  # no progress bar where nobody looks


def test_qwen_comes_with_a_vision_tower_and_3b_with_its_licence(hub, monkeypatch, capsys):
    """Its real entry of the table: the server here has none of it, and that is said after the licence."""
    hub.files["Qwen/Qwen2.5-3B"] = {}
    monkeypatch.setattr(plumbing.hub, "REPOSITORIES", TABLE)
    one_line(run("data", "--download=qwen2.5-3b", "--vision=nothing"), "'nothing'")
    assert not hub.log
    serve(hub)
    assert run("data", "--download=Org/Name", "--vision=nothing").code == 0  # only a Qwen needs eyes
    folder = hub.folder / "x"
    folder.mkdir(parents=True)
    plumbing.hub.announce([plumbing.hub.RemoteFile(TABLE["qwen2.5-3b"], "config.json")], folder)
    said = capsys.readouterr().err.splitlines()
    assert "Qwen Research licence: non-commercial use only" in said[0] and "Qwen/Qwen2.5-3B" in said[0]


def test_download_works_in_a_process_of_its_own(hub):
    content = serve(hub)
    done = subprocess.run([sys.executable, str(HERE / "data.py"), "--download=Org/Name"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, folder = done.stdout.split()
    assert (Path(folder) / "model.safetensors").read_bytes() == content


# ----------------------------------------------------------------------------------------------------------------------
# From a hub to an answer: whole runs against a server that this file starts

def serve_models(hub, tmp_path, qwen3: bool = False) -> Tokenizer:
    "A small Qwen in shards and a small SigLIP with its text tower, saved by transformers, as two repositories."
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, SiglipConfig, SiglipModel
    words = Tokenizer.train(["user\n", "assistant\n", "What colour is the cat? red blue a b c"] * 3, 400)
    words.default_system = "You are a helpful assistant."
    if qwen3:
        marks = {name: words.vocab_size + i for i, name in enumerate(tokenizer_file.THINK)}
        words = Tokenizer(words.ranks, words.special | marks, thinking=True)
    qwen = AutoModelForCausalLM.from_config((Qwen3Config if qwen3 else Qwen2Config)(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, **({"head_dim": 24} if qwen3 else {}),
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}))
    qwen.to(torch.bfloat16).save_pretrained(tmp_path / "qwen", max_shard_size="100KB")
    words.save_hub(tmp_path / "qwen")
    part = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    siglip = SiglipModel(SiglipConfig(text_config=part | {"vocab_size": 50}, vision_config=part | {
        "image_size": 32, "patch_size": 8}))
    siglip.save_pretrained(tmp_path / "siglip")
    path = tmp_path / "siglip" / "model.safetensors"
    tensors = {n: t.clone() for n, t in plumbing.weights.read_safetensors(path).items()}
    plumbing.weights.write_safetensors(tensors, path, {"format": "pt"})
    (tmp_path / "siglip" / "preprocessor_config.json").write_text('{"resample": 2}')
    for name in ("qwen", "siglip"):
        hub.files[f"Org/{name}"] = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    return words

SMALL = ["--steps=2", "--eval_size=6", "--batch_size=2", "--seq_len=128", "--device=cpu"]


@needs("transformers")
def test_a_hub_model_trains_and_answers_by_its_name_alone(hub, tmp_path, monkeypatch):
    serve_models(hub, tmp_path)
    out, cat = tmp_path / "out", HERE / "cat.jpg"
    model_, eyes = "--model=Org/qwen", "--vision=Org/siglip"
    for script in CHAPTERS.values():
        ran = run(script, *SMALL, model_, eyes, f"--out_dir={out}")
        assert ran.code == 0, ran.err
        assert ("starting" in ran.err) and ran.result["step"] == 2
    assert "the weights of" in run("train_align", *SMALL, model_, eyes, f"--out_dir={tmp_path / 'other'}").err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # all is here now: nobody asks the hub again
    ran = run("sample", model_, f"--image={cat}", f"--out_dir={out}", "--device=cpu", "--max_new_tokens=5")
    assert ran.code == 0 and "rl" in ran.err
    # The frozen parts are the hub's to the last bit, also after three stages.
    vlm = model.load_checkpoint(out / "qwen" / "rl")
    source = ViT.from_pretrained(tmp_path / "siglip")
    assert all(torch.equal(a, b) for a, b in zip(vlm.vit.parameters(), source.parameters()))
    assert vlm.config.pretrained_vision and not vlm.config.generation
    for flag, *parts in (("--vision=siglip-base-patch16-224", "--vision=", "qwen"),
                         ("--bridge=mlp", "--bridge=mlp", "perceiver")):
        one_line(run("train_sft", *SMALL, model_, flag, f"--out_dir={out}"), *parts)
    # With a bare MLP it goes out as a LLaVA, whose placeholder is the tokenizer's.
    assert run("train_align", *SMALL, model_, eyes, "--bridge=mlp", f"--out_dir={tmp_path / 'mlp'}").code == 0
    ran = run("sample", model_, f"--out_dir={tmp_path / 'mlp'}", "--device=cpu", f"--export={tmp_path / 'llava'}")
    config = plumbing.files.read_json(tmp_path / "llava" / "config.json")
    assert ran.code == 0 and config["image_token_index"] == Tokenizer.from_pretrained(tmp_path / "qwen").image_pad
    assert isinstance(model.load_checkpoint(tmp_path / "llava"), VLM)


@needs("transformers")
def test_a_qwen3_is_fetched_by_its_short_name_trained_and_exported(hub, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    words, out = serve_models(hub, tmp_path, qwen3=True), tmp_path / "out"
    hub.files["Qwen/Qwen3-0.6B"] = hub.files.pop("Org/qwen")
    monkeypatch.setattr(plumbing.hub, "REPOSITORIES", {"qwen3-0.6b": TABLE["qwen3-0.6b"]})
    ran = run("train_sft", *SMALL, "--model=qwen3-0.6b", "--vision=Org/siglip", f"--out_dir={out}", "--optimizer=muon")
    assert ran.code == 0 and ran.result["step"] == 2, ran.err
    vlm, saved = model.load_checkpoint(out / "qwen3-0.6b/sft"), Tokenizer.from_pretrained(out / "qwen3-0.6b/sft")
    assert vlm.config.decoder.use_qk_norm and vlm.config.decoder.head_dim == 24
    assert saved.thinking and saved.special == words.special
    for think in ([], ["--think"]):  # the answer, and the same after thoughts
        ran = run("sample", f"--init={out / 'qwen3-0.6b/sft'}", f"--image={HERE / 'cat.jpg'}", "--device=cpu",
                  "--max_new_tokens=5", *think)
        assert ran.code == 0, ran.err
    ran = run("sample", f"--init={out / 'qwen3-0.6b/sft'}", f"--export={tmp_path / 'hf'}", "--decoder_only")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([saved.render([{"role": "user", "content": "red"}], add_generation_prompt=True).ids])
    with torch.no_grad():
        ours = GPT.from_pretrained(tmp_path / "hf")(ids)
        assert theirs.config.model_type == "qwen3" and far(ours, theirs(ids).logits) < 1e-5


@needs("transformers")
def test_a_decoder_without_eyes_talks_and_says_so_when_shown_a_picture(hub, tmp_path):
    serve_models(hub, tmp_path)
    hub.files["Org/qwen"]["generation_config.json"] = json.dumps(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}).encode()
    flags = ["--model=Org/qwen", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_new_tokens=6"]
    ran = run("sample", *flags, "--question=What colour?")
    assert ran.code == 0 and ran.out.endswith("\n") and not hub.requests("GET", "siglip")
    one_line(run("sample", *flags, f"--image={HERE / 'cat.jpg'}"), "qwen", "train_align.py")
    vlm, folder = model.load_pretrained("Org/qwen", text_only=True)
    assert vlm.config.generation == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert options(vlm, sample_flags()) == {"max_new_tokens": 256, **vlm.config.generation}
    assert options(vlm, sample_flags("--temperature=0", "--top_k=3"))["top_k"] == 3
    assert Tokenizer.from_pretrained(folder).default_system == "You are a helpful assistant."
    greedy = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    assert model.generation_config(folder) == {"repetition_penalty": 1.05}
    (folder / "generation_config.json").unlink()
    assert model.generation_config(folder) == {}


@needs("transformers")
def test_a_public_model_is_fetched_and_answers(hub, tmp_path, monkeypatch):
    entry = plumbing.hub.Repository("llava-hf/ov", "main", {}, "")
    flags = [f"--image={HERE / 'cat.jpg'}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_new_tokens=4",
             "--model=llava-ov-0.5b"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(plumbing.hub.REPOSITORIES, "llava-ov-0.5b", entry)
    one_line(run("sample", *flags), "llava-hf--ov", "HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    save_onevision(tmp_path / "ov")
    special = {f"<unused {i}>": i for i in range(256, 297)}  # every id that random weights may choose is a token
    special |= {"<|endoftext|>": 297, "<|im_start|>": 298, "<|im_end|>": 299, "<image>": 300}
    Tokenizer({bytes([b]): b for b in range(256)}, special).save_hub(tmp_path / "ov")
    hub.files["llava-hf/ov"] = {p.name: p.read_bytes() for p in (tmp_path / "ov").iterdir()}
    monkeypatch.setitem(plumbing.hub.REPOSITORIES, "llava-ov-0.5b", entry)
    for tiles in (36, 0):
        ran = run("sample", *flags, f"--tiles={tiles}")
        assert ran.code == 0 and ran.out, ran.err


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells a file's name by /proc")
def test_a_download_is_on_the_disk_before_it_gets_its_name(web, disk):
    web.files["/a.json"] = b"[]"
    assert Path(fetch_file(web.url + "/a.json")).read_text() == "[]" and disk == ["a.json.part", "-> a.json"]
