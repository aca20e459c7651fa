"""
What the tests share: a model of 50,000 weights, a tokenizer, pictures that are numbers, how scripts are run, and a
trained tiny model. Random weights and small files made on the spot; transformers and safetensors are the references.
"""
import argparse
import base64
import contextlib
import csv
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import data
import extras.server
import plumbing.engine
import plumbing.flags
import plumbing.hub
import plumbing.ranks
import plumbing.weights
import plumbing.world
import sample
import train_align
import train_base
import train_rl
import train_sft
from data import Document, collate, make_document, pack, pixel_loader
from model import GPT, VLM, GPTConfig, VLMConfig, load_checkpoint
from plumbing.engine import respond
from plumbing.flags import parse_flags
from plumbing.records import Records, hash_keys
from plumbing.world import COLOURS, World
from sample import FLAGS as SAMPLE_FLAGS
from tokenizer import Rendered, Tokenizer
from vision import BridgeConfig, ViTConfig

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # two processes with two threads each would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parents[1]
SHARED = HERE.parent / "shared"  # optional: real pictures and texts
# Whatever lies in this machine's caches, and whatever its network, the tests find none of it; only the fixture `hub`,
# a server on this machine, is ever asked.
os.environ |= {"HF_HUB_OFFLINE": "1", "GHOSTVIS_CACHE": "/nonexistent/ghostvis", "HF_HOME": "/nonexistent/huggingface"}
DATA = SHARED / "data"
# The full form of some promises takes an hour: python test_all.py --long
long_form = pytest.mark.skipif("GHOSTVIS_LONG" not in os.environ, reason="the full form: python test_all.py --long")
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")


# ----------------------------------------------------------------------------------------------------------------------
# Helpers: a model of 50,000 weights, a tokenizer, and pictures that are numbers

SEQ_LEN = 128


@lru_cache
def tokenizer() -> Tokenizer:
    texts = ["user\n", "assistant\n", "what is this? a red cat, a blue dog. one two three four"] * 3
    return Tokenizer.train(texts, 300)


QWEN3 = {"head_dim": 12, "attention_bias": False, "use_qk_norm": True}  # 4 heads of 12 channels: wider than H = 32


def tiny_vlm(kind: str = "perceiver", tied: bool = True, seed: int = 0, qwen3: bool = False) -> VLM:
    torch.manual_seed(seed)
    config = VLMConfig(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24,
                  patch_size=6),
        BridgeConfig(kind, num_latents=4, num_layers=1, num_heads=2, vision_size=32, text_size=32, num_patches=16),
        GPTConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, rope_theta=1e4, tie_word_embeddings=tied, **(QWEN3 if qwen3 else {})))
    return shake(VLM(config), seed)


def text_only(gpt: GPT) -> VLM:
    vlm = tiny_vlm()
    vlm.gpt, vlm.config.decoder = gpt, gpt.config
    return vlm


def picture(number: int, record=None) -> torch.Tensor:
    "In place of a file: uint8 [3, 24, 24]."
    return torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def setup() -> plumbing.ranks.Setup:
    return plumbing.ranks.Setup(argparse.Namespace(device="cpu", dtype="float32", compile="False", seed=0))


def chat_model(*turns, images=()) -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"id": "chat", "messages": messages, "images": list(images)}

CHATS_model = [
    chat_model("<image>what is this?", "a red cat", images=[1]),
    chat_model("one two three", "four"),
    chat_model("<image>what is this?", "a blue dog. a cat.", "and <image>this?", "a red dog", images=[2, 3]),
    chat_model("what is this", "one two three four one two three four"),
    chat_model("<image>", "a cat", "a dog?", "a red cat, a blue dog", images=[1]),  # the picture of the first one
    chat_model("a", "b"),
]


def render(record: dict, index: int, vlm: VLM, seq_len: int = SEQ_LEN) -> data.Document | None:
    return data.make_document(record, index, tokenizer(), vlm.config.bridge.num_tokens, seq_len)


def documents(vlm: VLM, chats: list = CHATS_model) -> list[data.Document]:
    return [render(record, i, vlm) for i, record in enumerate(chats)]


def batch_of(vlm: VLM, docs: list, rows: int = 3, seq_len: int = SEQ_LEN) -> dict:
    arrays, placed, waiting = data.pack(docs, rows, seq_len, vlm.config.bridge.num_tokens)
    assert not waiting
    return data.collate(arrays, placed, picture)


def prompts(vlm: VLM, chats: list) -> list[Rendered]:
    tokens = vlm.config.bridge.num_tokens
    return [tokenizer().render(c["messages"][:1], tokens, add_generation_prompt=True) for c in chats]


def image_tokens(vlm: VLM, images: list) -> torch.Tensor:
    return torch.cat(plumbing.engine.PictureCache(vlm)(images))


def say(vlm: VLM, asked: list, images: list = (), **options) -> list[list[int]]:
    "What each row generates, as ids."
    rows = [list(row) for row in zip(*vlm.generate(asked, [picture(i) for i in images], **options))]
    return [[token for token in row if token is not None] for row in rows]


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install -r requirements-dev.txt")


def fails(call, *parts):
    "The call raises a ValueError of one line that contains all these parts. Returns the line."
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    "Relative error: the difference's length over the reference's."
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def shake(module: torch.nn.Module, seed: int = 0, by: float = 0.1) -> torch.nn.Module:
    "Every parameter at random: fresh biases are 0 and fresh norms 1, and would hide that one of them was forgotten."
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(by * torch.randn(p.shape, generator=generator))
    return module.eval()


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.py

QWEN = SHARED / "data" / "qwen_tokenizer"
needs_qwen = pytest.mark.skipif(not (QWEN / "vocab.json").exists(), reason=f"needs Qwen's vocab.json in {QWEN}")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATS = [
    [("user", "Hi"), ("assistant", "Hello! How can I help?")],
    [("system", "Answer in French."), ("user", "Count to 12, please."), ("assistant", "1, 2, 3 ... 12.")],
    [("user", "\n\n  indented, after newlines"), ("assistant", "ok"), ("user", "   leading spaces\n"),
     ("assistant", "x")],
    [("user", "我想在apple工作 😶‍🌫️ Cu\u031b\u0309a Việt"),
     ("assistant", "e\u0301te\u0301 ½ ٣ ①")],
    [("user", ""), ("assistant", ""), ("system", "be short"), ("user", "\tdef f(x):\r\n\t\treturn 'x'")],
    [("user", "What's 7+5?"), ("assistant", "12"), ("user", "I'LL ask: and 12345*6?"), ("assistant", "74,070\n")],
]


QWEN3_TOKENS = ["<tool_response>", "</tool_response>", "<think>", "</think>"]  # after Qwen2.5's special tokens
THOUGHTS = [
    [("user", "Hi"), ("assistant", "<think>\nThey greet me.\n</think>\n\nHello!")],
    [("user", "Hi"), ("assistant", "<think>\nA.\n\nB.\n</think>\n\nHello!"), ("user", "7+5?"),
     ("assistant", "<think>\n\n</think>\n\n12")],
    [("user", "Hi"), ("assistant", "no mark</think>\n\nHello!"), ("user", "7+5?"), ("assistant", "12\n")],
    [("system", "s"), ("user", "a"), ("assistant", "<think>t</think>b"), ("assistant", "c")],
    [("assistant", "no question"), ("assistant", "was asked")],
]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@lru_cache
def qwen():
    return Tokenizer.from_pretrained(QWEN)


@lru_cache
def qwen3(table=qwen) -> Tokenizer:
    "Qwen3's tokenizer: another's with four more tokens."
    special = table().special | {name: table().vocab_size + i for i, name in enumerate(QWEN3_TOKENS)}
    return Tokenizer(table().ranks, special, thinking=True)


@lru_cache
def small():
    return Tokenizer.train(["the cat sat on the mat. the cat, it's the cat that sat! été 12 12"] * 2, 300)


# ----------------------------------------------------------------------------------------------------------------------
# weights.py: downloads

COMMIT = "c0ffee" * 6 + "abcd"
BLOCK = 4096  # bytes that the server sends at once


def blob(content: bytes) -> str:
    "Git's name for a file, the hub's ETag of small ones."
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """
    Two servers, as the real hub is: one knows the files and sends small ones (307, relative), the other holds the large
    ones (302, a signed address that is good once). `faults`: what goes wrong with the next requests for large files.
    """

    def __init__(self):
        self.files, self.large = {}, ("safetensors",)   # files: {"Org/Name": {name: bytes}}
        self.log, self.faults, self.answers = [], [], {}  # answers: {file name: (status, headers)} instead of the file
        self.hold, self.released = None, threading.Event()  # hold: a byte at which large files stop until released
        self.sent, self.signature, self.etags = 0, 0, {}
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler(role)) for role in
                        (self.hub, self.storage)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def close(self):
        self.released.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def handler(hub, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.log.append((self.command, self.path, dict(self.headers)))
                with contextlib.suppress(OSError):  # the client may be gone
                    answer(self)

            do_HEAD = do_GET

            def reply(self, status, headers=(), body=b"", length=None):
                self.send_response(status)
                for key, value in {"Content-Length": len(body) if length is None else length, **dict(headers)}.items():
                    if value is not None:
                        self.send_header(key, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *parts):
                pass
        return Handler

    def hub(self, http):
        path = http.path.split("?")[0]
        if path.startswith("/api/resolve-cache/"):
            repo, name = "/".join(path.split("/")[3:5]), path.split("/")[-1]
            content = self.files[repo][name]
            return http.reply(200, {"ETag": f'W/"{blob(content)}"', "X-Repo-Commit": COMMIT}, content)
        org, name, _, revision, file = path[1:].split("/", 4)
        repo, files = f"{org}/{name}", self.files.get(f"{org}/{name}")
        if file in self.answers:
            return http.reply(*self.answers[file])
        if files is None:
            return http.reply(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return http.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if file not in files:
            return http.reply(404, {"X-Error-Code": "EntryNotFound"})
        if not file.endswith(self.large):
            return http.reply(307, {"Location": f"/api/resolve-cache/{repo}/{COMMIT}/{file}", "X-Repo-Commit": COMMIT})
        self.signature += 1
        etag = self.etags.get(file) or hashlib.sha256(files[file]).hexdigest()
        http.reply(302, {"Location": f"{self.storage_url}/{repo}/{file}?signature={self.signature}", "X-Linked-Etag":
                         f'"{etag}"', "X-Linked-Size": len(files[file]), "X-Repo-Commit": COMMIT})

    def storage(self, http):
        path, signature = http.path.split("?signature=")
        assert http.command == "GET" and int(signature) == self.signature  # an older address is no longer good
        repo, file = path[1:].rsplit("/", 1)
        content, wanted = self.files[repo][file], http.headers.get("Range", "")
        fault, *number = (self.faults.pop(0) if self.faults else "").split() or [""]
        start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content) - 1)
        if fault == "status":
            return http.reply(int(number[0]), {number[1]: " ".join(number[2:])} if number[1:] else ())
        if fault == "unranged":
            start, stop, wanted = 0, len(content) - 1, ""
        headers = {"ETag": '"the storage has an ETag of its own"'}
        if wanted:
            headers["Content-Range"] = f"bytes {start + (7 if fault == 'shifted' else 0)}-{stop}/{len(content)}"
        body = content[start:stop + 1]
        if fault == "flipped":
            body = bytes([body[0] ^ 1]) + body[1:]
        http.send_response(206 if wanted else 200)
        for key, value in headers.items():
            http.send_header(key, value)
        http.close_connection = True
        http.send_header(*("Connection", "close") if fault == "short" else ("Content-Length", len(body)))
        http.end_headers()
        last = int(number[0]) if number else len(body)
        for i in range(0, last, BLOCK):
            block = body[i:min(i + BLOCK, last)]
            if self.hold is not None and start + i + len(block) > self.hold:
                http.wfile.write(block[:max(0, self.hold - start - i)])
                self.released.wait(20)
                return
            http.wfile.write(block)
            self.sent += len(block)
        if fault == "stall":
            self.released.wait(20)

    def requests(self, method: str, part: str) -> list:
        return [(path, headers) for verb, path, headers in list(self.log) if verb == method and part in path]

    def ranges(self) -> list:
        "The Range of every request to the storage, in order."
        return [headers.get("Range") for path, headers in self.requests("GET", "signature=")]


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    server = Hub()
    server.folder = tmp_path / "cache"
    for variable in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HF_ENDPOINT": server.url, "GHOSTVIS_CACHE": server.folder, "NO_PROXY": "*",
                            "HF_HOME": tmp_path / "hf", "NETRC": tmp_path / "netrc"}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(plumbing.hub, "BACKOFF", 0.002)
    monkeypatch.setattr(plumbing.hub, "CHUNK", 1000)
    monkeypatch.setattr(plumbing.hub, "TIMEOUT", (2, 0.3))
    monkeypatch.setattr(plumbing.hub, "REPOSITORIES", {})
    yield server
    server.close()


def wait_until(condition, seconds=20.0):  # a busy machine may need that long
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)



# ----------------------------------------------------------------------------------------------------------------------
# plumbing.world.py

def texts(record: dict) -> str:
    return record.get("text", "") + "\n".join(m["content"] for m in record.get("messages", []))



# ----------------------------------------------------------------------------------------------------------------------
# vision.py: pictures of all sorts

def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)

def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(side: int) -> bytes:
    "A header that promises side x side pixels, and hardly a byte of them."
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------------------------
# data.py: reading files

def image_bytes(color="red", kind="PNG", size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def llava(image="a.png", question="<image>\nWhat colour?", answer="red", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r1", "conversations": turns, **({"image": image} if image else {}), **more}


def write(path: Path, rows, lines=False) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def write_tsv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def records_of(rows: list[dict]) -> Records:
    "Records that lie in no file."
    keys = [hash_keys(row) for row in rows]
    return Records(rows.__getitem__, np.arange(len(rows))[:, None], np.array(sum(keys, []), np.uint64),
                   np.array([len(one) for one in keys]))


@pytest.fixture()
def own_data(tmp_path):
    "Pictures as files, in a zip beside them, and within the records; 24 records each."
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(24):
        colour = list(COLOURS)[i % 7]
        rows.append(llava(f"{i}.png", id=f"r{i}", answer=colour))
        (folder / "images" / f"{i}.png").write_bytes(image_bytes((*COLOURS[colour][:2], i)))
    (folder / "zip").mkdir()
    with zipfile.ZipFile(folder / "zip" / "images.zip", "w") as file:
        for path in (folder / "images").iterdir():
            file.write(path, path.name)
    write(folder / "files.json", rows)
    write(folder / "zip" / "zip.json", rows)
    write_tsv(folder / "table.tsv", [
        {"index": i, "image": base64.b64encode((folder / "images" / f"{i}.png").read_bytes()).decode(),
         "question": "What colour?", "answer": row["conversations"][1]["value"]} for i, row in enumerate(rows)])
    return folder


def add_to_tar(tar, member: str, content: bytes, **fields) -> None:
    info = tarfile.TarInfo(member)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def nested(depth: int = 200_000) -> str:
    return '{"question": ' + "[" * depth + "]" * depth + ', "answer": "a"}'

CHAT = {"id": "r1", "question": "q", "answer": "a"}


# ----------------------------------------------------------------------------------------------------------------------
# data.py: from the web

class Web:
    "A plain web server: files {path: bytes}; faults: what goes wrong with the next requests (break, stall, 503, lie)."

    def __init__(self):
        self.files, self.faults, self.log, self.released = {}, [], [], threading.Event()
        self.redirects = {}  # {path: path}

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler):
                self.log.append((handler.command, handler.path))
                if handler.path in self.redirects:
                    handler.send_response(302)
                    handler.send_header("Location", self.redirects[handler.path])
                    handler.send_header("Content-Length", "0")
                    return handler.end_headers()
                content, fault = self.files.get(handler.path), ""
                if handler.command == "GET" and self.faults:
                    fault = self.faults.pop(0)
                if content is None or fault == "503":
                    handler.send_response(503 if fault else 404)
                    handler.send_header("Content-Length", "0")
                    return handler.end_headers()
                start, whole = 0, len(content)
                if wanted := handler.headers.get("Range"):
                    start = int(re.match(r"bytes=(\d+)", wanted)[1])
                body = content[start:]
                handler.send_response(206 if wanted else 200)
                handler.send_header("Content-Length", str(len(body)))
                if wanted:
                    handler.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
                handler.end_headers()
                if handler.command == "HEAD":
                    return
                handler.close_connection = bool(fault)
                with contextlib.suppress(OSError):
                    if fault == "lie":
                        body = bytes([body[0] ^ 1]) + body[1:]
                    handler.wfile.write(body[:len(body) // 2] if fault in ("break", "stall") else body)
                if fault == "stall":
                    self.released.wait(20)

            do_HEAD = do_GET

            def log_message(handler, *parts):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture()
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(plumbing.hub, "BACKOFF", 0.01)
    monkeypatch.setattr(plumbing.hub, "TIMEOUT", (2, 0.5))
    server = Web()
    yield server
    server.released.set()
    server.server.shutdown()
    server.server.server_close()


# ----------------------------------------------------------------------------------------------------------------------
# data.py: data sets and packing

def document(ids, mask=None, slots=(), weight=1.0, index=0, images=()) -> data.Document:
    return data.Document(index, list(ids), list(mask or [1] * len(ids)), list(slots),
                         {"id": "r", "images": list(images)}, weight)


def plain_records(n: int) -> list[dict]:
    return [{"id": str(i), "images": []} for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# data.py: the loader

def equal_batches(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) if torch.is_tensor(a[n]) else a[n] == b[n] for n in a)


def seen(loader: data.Loader, batches: int) -> list[int]:
    out = []
    for _ in range(batches):
        batch = next(loader)
        out += batch["ids"][(batch["positions"] == 0) & (batch["document_ids"] > 0)].tolist()  # documents' first ids
    return out


# ----------------------------------------------------------------------------------------------------------------------
# model.py: LLaVA-OneVision, and the sizes of the published files

def save_onevision(folder: Path, tied: bool = True, layer: int = -1, old_names: bool = False):
    "A small random LLaVA-OneVision, as transformers saves it or under the hub's older names -> transformers' own."
    from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config,
                              SiglipVisionConfig)
    side = 28
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                         num_attention_heads=4, image_size=side, patch_size=7, vision_use_head=False),
        text_config=Qwen2Config(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
                                rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        image_token_index=300, vision_feature_layer=layer, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[side * a, side * b] for a in range(1, 7) for b in range(1, 7)],
        tie_word_embeddings=tied)
    reference = shake(LlavaOnevisionForConditionalGeneration(config), by=0.2)
    reference.save_pretrained(folder)
    if old_names:
        path = folder / "model.safetensors"
        tensors = {n.replace("vision_tower.", "vision_tower.vision_model."): t.clone()
                   for n, t in plumbing.weights.read_safetensors(path).items()}
        plumbing.weights.write_safetensors(tensors, path, {"format": "pt"})
    return reference


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# model.py: generation

RAGGED = [chat_model("<image>what is this?", images=[1]), chat_model("one two three four one two three four what?"),
          chat_model("<image>and <image>this?", images=[2, 3]), chat_model("a"),
          chat_model("a red <image>cat", images=[4])]


# ----------------------------------------------------------------------------------------------------------------------
# model.py: the engine

def request(vlm: VLM, number: int, **more) -> plumbing.engine.Request:
    "One of the ragged prompts, with options and a length of its own."
    chat = RAGGED[number % 5]
    options = [{}, {"temperature": 0.9, "top_k": 30}, {"repetition_penalty": 1.3}, {"temperature": 1.2}][number % 4]
    return plumbing.engine.Request(prompts(vlm, [chat])[0], [picture(i) for i in chat["images"]],
                         **{"max_new_tokens": 5 + number, "seed": number, **options, **more})


# ----------------------------------------------------------------------------------------------------------------------
# The stage scripts: how they are called here

SCRIPTS = ["train_base", "train_align", "train_sft", "train_rl", "sample", "bench"]
CHAPTERS = {"base": "train_base", "align": "train_align", "sft": "train_sft", "rl": "train_rl"}
QUICK = ["--steps=2", "--eval_size=10", "--batch_size=4", "--device=cpu"]


class Ran:
    def __init__(self, code, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def result(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


def run(script: str, *flags, stdin: str = "", main=None) -> Ran:
    """
    The script as `python script.py flags` runs it, but in this process, which saves the seconds that importing torch
    takes. A traceback there is an exception here. With main the module's own function runs instead of a fresh copy of
    the file.
    """
    out, err, code, kept = io.StringIO(), io.StringIO(), 0, (sys.argv, sys.stdin)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv, sys.stdin = [f"{script}.py", *map(str, flags)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if main:
                plumbing.flags.run(main)
            else:
                runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):  # what Python does with it at the end of a process
            err.write(code + "\n")
            code = 1
        return Ran(code, out.getvalue(), err.getvalue())
    finally:
        sys.argv, sys.stdin = kept
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def run_process(script: str, *flags, stdin: str = "", launcher=()) -> Ran:
    done = subprocess.run([sys.executable, *launcher, str(HERE / f"{script}.py"), *map(str, flags)], input=stdin,
                          text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Ran(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path, but=()) -> dict:
    "Every file and what is in it; to see that nothing was touched."
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) if path.is_file() else None
            for path in sorted(folder.rglob("*")) if path.name not in but}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """
    All four chapters one after the other, two steps each -> (out folder, what each printed, base as chapter 1 left it).
    """
    out, ran = tmp_path_factory.mktemp("trained") / "out", {}
    for stage, script in CHAPTERS.items():
        ran[stage] = run(script, *QUICK, f"--out_dir={out}")
        assert ran[stage].code == 0, ran[stage].err
    return out, ran


START = {"base": "base", "align": "base", "sft": "align", "rl": "sft"}


# ----------------------------------------------------------------------------------------------------------------------
# All scripts: help, and bad input

def one_line(ran: Ran, *parts) -> str:
    "It stopped with exactly one line that says error: and contains these parts. Returns the line."
    assert ran.code not in (0, None) and ran.out == ""
    lines = [line for line in ran.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and ran.err.count("error:") == 1 and "Traceback" not in ran.err, ran.err
    assert ran.err.rstrip("\n").endswith(lines[0])  # the last thing that is said
    for part in parts:
        assert str(part) in lines[0], lines[0]
    return lines[0]


def bytes_of(kind: str) -> bytes:
    "A picture file that is huge when decoded, or cut off in the middle."
    if kind == "huge":
        return huge_png(30_000)  # 900 MB once it is decoded as RGB
    whole = saved(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG").getvalue()
    return whole[:len(whole) // 2]


# ----------------------------------------------------------------------------------------------------------------------
# sample.py and bench.py, on a trained model

@pytest.fixture()
def photo(tmp_path):
    plumbing.world.World("captions")[0]["images"][0].draw(100).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def about(picture: str, n: int = 1) -> list[dict]:
    return [{"id": i, "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}],
             "images": [picture]} for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: the server

def uri(image, kind: str = "png") -> str:
    raw = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:image/{kind};base64," + base64.b64encode(raw).decode()


def user(text: str, *images) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}, *(
        {"type": "image_url", "image_url": {"url": uri(image)}} for image in images)]}


class Served:
    "A server in this process, over real sockets."

    def __init__(self, trained: Path, *flags):
        flags = ["--serve", f"--out_dir={trained}", "--port=0", "--device=cpu", *flags]
        flags = plumbing.flags.parse_flags("", sample.FLAGS, argv=flags)
        with contextlib.redirect_stderr(io.StringIO()):
            self.server = extras.server.Server(*sample.load(flags), flags)
        self.address, self.url = ("127.0.0.1", self.server.server_port), f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01, ), daemon=True).start()

    def post(self, body: dict, path: str = "/v1/chat/completions", **headers) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=headers, timeout=30)

    def says(self, messages: list, **more) -> str:
        answer = self.post({"messages": messages, "max_tokens": 5, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def raw(self, *pieces: bytes, half: bool = False) -> bytes:
        "Bytes on a socket -> all bytes that come back until the server closes it."
        with socket.create_connection(self.address, timeout=10) as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                for piece in pieces:
                    s.sendall(piece)
                if half:
                    s.shutdown(socket.SHUT_WR)
            out = b""
            with contextlib.suppress(ConnectionError):
                while piece := s.recv(65536):
                    out += piece
            return out


@pytest.fixture(scope="session")
def served(trained):
    there = Served(trained[0], "--max_requests=4")
    yield there
    there.server.shutdown()
    there.server.server_close()


# ----------------------------------------------------------------------------------------------------------------------
# The learning mathematics: a trained model, pictures as files, conversations about them, and chapters of one step

TINY = HERE / "assets" / "tiny"  # a small trained model: 98 % of new questions right, 24 % blind


@lru_cache
def shipped() -> tuple[VLM, Tokenizer]:
    return load_checkpoint(TINY), Tokenizer.from_pretrained(TINY)


def png(number: int, side: int = 24) -> bytes:
    "A picture of noise, as a file; number -1 is grey."
    if number == -1:
        pixels = np.full((side, side, 3), 128, np.uint8)
    else:
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def conversation(*turns: str, images=(), **more) -> dict:
    return chat_model(*turns, images=[png(n) if isinstance(n, int) else n for n in images]) | more


SHOWN = [
    conversation("<image>what is this?", "a red cat", images=[1]),
    conversation("one two three", "four"),
    conversation("<image>what is this?", "a blue dog.", "and <image>this?", "a red dog", images=[2, 3]),
    conversation("<image>a dog?", "a red cat", images=[4]),
]


def rendered(vlm: VLM, chats: list = SHOWN, seq_len: int = 128) -> list[Document]:
    return [make_document(one, i, tokenizer(), vlm.config.bridge.num_tokens, seq_len) for i, one in enumerate(chats)]


def rows_of(vlm: VLM, docs: list, rows: int = 2, seq_len: int = 128) -> dict:
    arrays, packed, waiting = pack(docs, rows, seq_len, vlm.config.bridge.num_tokens)
    assert not waiting
    return collate(arrays, packed, pixel_loader(vlm.config.vision))


def call(main, *flags) -> dict:
    "A chapter's main() with these flags -> the JSON object that it prints last."
    kept, out = sys.argv, io.StringIO()
    sys.argv = ["chapter.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main()
    finally:
        sys.argv = kept
    return json.loads(out.getvalue().splitlines()[-1]) if out.getvalue() else {}


def questions(n: int) -> list[dict]:
    return [World("exam", "scenes", seed=1)[i] for i in range(n)]


@lru_cache
def right_by_hand(n: int, image: str) -> list[bool]:
    "Which of the first n questions the small trained model answers right: own picture, a grey one, the next one's."
    vlm, words = shipped()
    records, load = questions(n), pixel_loader(vlm.config.vision)
    pixels = [load(record["images"][0], record) for record in records]
    pixels = {"own": pixels, "blind": [torch.full((3, 72, 72), 128, dtype=torch.uint8)] * n,
              "shuffled": pixels[1:] + pixels[:1]}[image]
    texts = respond(vlm, words, [record["messages"][:1] for record in records], [[one] for one in pixels])
    return [text == record["messages"][1]["content"] for text, record in zip(texts, records)]


RUNS = {"base": [train_base.main, "--seq_len=128", "--eval_size=4", "--batch_size=4"],
        "align": [train_align.main, "--seq_len=128", "--eval_size=4", "--batch_size=4"],
        "sft": [train_sft.main, "--eval_size=6", "--batch_size=4"],
        "rl": [train_rl.main, "--eval_size=6", "--batch_size=32", "--samples=4"]}


def run_chapter(stage: str, out: Path, *flags) -> dict:
    "One step from the small trained model, with another seed than 0."
    main, *more = RUNS[stage]
    return call(main, f"--init={TINY}", f"--out_dir={out}", "--steps=1", "--micro_batch_size=2", "--seed=10",
                "--device=cpu", "--eval_every=1", *more, *flags)


class Runs(dict):
    "{stage: its result}, each run when it is first asked for."

    def __init__(self, out: Path):
        self.out = out

    def __missing__(self, stage: str) -> dict:
        self[stage] = run_chapter(stage, self.out)
        return self[stage]


@pytest.fixture(scope="session")
def chapters(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("chapters"))


def left_by(chapters: Runs, stage: str) -> tuple[VLM, Tokenizer, dict]:
    result, folder = chapters[stage], chapters.out / "tiny" / stage
    return load_checkpoint(folder), Tokenizer.from_pretrained(folder), result


def log_of(chapters, stage: str) -> dict:
    "What the log says of the first step."
    assert chapters[stage]["step"] == 1
    rows = map(json.loads, (chapters.out / "tiny" / stage / "log.jsonl").read_text().splitlines())
    return next(row for row in rows if "lr" in row)


def sample_flags(*flags) -> argparse.Namespace:
    return parse_flags("", SAMPLE_FLAGS, argv=["--device=cpu", *map(str, flags)])


@pytest.fixture()
def disk(monkeypatch):
    "-> a list to which each fsync adds the file's name, and each rename the new name after ->."
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    for name, real in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, lambda a, b, real=real: (seen.append(f"-> {Path(b).name}"), real(a, b)))
    return seen
