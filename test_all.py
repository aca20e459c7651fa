"""
What the lessons promise, one test for each promise, named after it, in the order of the lessons. The promises of
plumbing/ and extras/ are in tests/, in a file for each room.

    python -m pytest -n 2                     # all, offline, in two processes: three to four minutes on two idle cores
    python -m pytest -k packed                # those with "packed" in their name
    python test_all.py --long                 # also the full form of some: 10,000 files, 50 kills; an hour
    python test_all.py --mutants              # small faults, put into a copy one by one: would a test notice?

Random weights and small files made on the spot; transformers and safetensors are the references. Tests on real data are
skipped, by name, where the folder they read is not there.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizer as tok
import torch
import torch.nn.functional as F
import train_align
import train_base
import train_rl
import train_sft
import vision
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageColor
from tests.helpers import (CHAPTERS, CHATS, HERE, QUICK, QWEN, QWEN3_TOKENS, QWEN_SYSTEM, RAGGED, RUNS, SEQ_LEN, SHARED,
                           SHOWN, START, THOUGHTS, TINY, CHATS_model, Ran, about, batch_of, bytes_of, call,
                           change_config, chat, chat_model, conversation, document, documents, equal_batches, fails,
                           far, image_bytes, image_tokens, left_by, llava, log_of, needs, needs_qwen, one_line, picture,
                           plain_records, png, prompts, questions, qwen, qwen3, records_of, render, rendered,
                           right_by_hand, rows_of, run, run_chapter, run_process, sample_flags, say, seen, setup, shake,
                           shipped, small, text_only, tiny_vlm, tokenizer, write)
from tests.plain_model import assert_same_gradients, plain_gradient, plain_loss, weights_of

import bench
import data
import model
import sample
from plumbing.checkpoints import save_checkpoint
from plumbing.engine import Engine, Request, respond, take_cache
from plumbing.files import read_json, require
from plumbing.optimizer import Optimizer
from plumbing.recipes import read_records
from plumbing.records import hash_keys
from plumbing.scoring import wilson
from plumbing.weights import read_safetensors
from plumbing.world import QUESTIONS, World
from bench import clock, llava_like, step_flops
from data import Document, Loader, make_document, pack, pixel_loader, split_by_image
from extras.asking import Text, make_message, open_pixels
from model import GPT, VLM, cross_entropy, load_checkpoint, preset, token_loss
from sample import Chat, answer_folder, check_ability, load
from tokenizer import SPECIAL_TOKENS, Rendered, Tokenizer, train_bpe
from train_align import write_captions
from train_base import (bits_per_byte, chapter_flags, count_supervised, freeze_all_but, held_out_loss, make_documents,
                        make_loaders, train_step)
from train_rl import gain, pack_all, reward, rollout, to_documents
from train_sft import answers, evaluate, evaluate_with_baselines, save_samples
from vision import Bridge, BridgeConfig, ViT, ViTConfig, preprocess, sincos_positions

pytest_plugins = ["tests.helpers"]  # its fixtures


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.py

def test_merges_are_learned_by_how_often_a_pair_occurs():
    # Pieces: "xy" once, " xy" three times, and " pqa", " pqb", " pqc". So x y occurs 4 times and is merged first. Then
    # three pairs occur 3 times each; the smaller ids come first: " " p before " " xy (which is id 256), and then p q.
    ranks = train_bpe(["xy xy xy xy pqa pqb pqc"], 260)
    assert list(ranks)[256:] == [b"xy", b" p", b" xy", b" pq"]
    assert list(train_bpe(["aaaa"] * 2, 260))[256:] == [b"aa", b"aaaa"]  # from the left, never overlapping


def test_training_cuts_text_into_words_and_single_digits():
    words = Tokenizer.train(["in 2024 the caf\u00e9, in 2024 the caf\u00e9"] * 9, 400)
    assert [words.decode([i]) for i in words.encode("in 2024 the caf\u00e9,")] == [
        "in", " ", "2", "0", "2", "4", " the", " caf\u00e9", ","]
    assert words.encode("cafe\u0301") == words.encode("caf\u00e9")  # an accented letter has only one spelling


SHAKESPEARE = SHARED / "data" / "text" / "tinyshakespeare.txt"
needs_text = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
# Qwen2.5's own template without its branch for tools, spelled as a tokenizer_config.json spells it.
QWEN_TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# What Qwen3's own template (of 0.6B to 8B, April 2025) does with conversations without tools.
QWEN3_TEMPLATE = """
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content, reasoning = message.content, '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last_query and (loop.last or reasoning) %}
        {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
def read_merges():
    lines = (QWEN / "merges.txt").read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@needs_qwen
def test_tokenizer_reproduces_llama_cpp_ids_of_qwen():
    cases = (QWEN / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (QWEN / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    assert cases.pop() == lines.pop() == "" and len(cases) == len(lines) == 46
    for case, line in zip(cases, lines):
        ids = [int(i) for i in line.split()]
        assert qwen().encode(case) == ids, case
        assert qwen().decode(ids) == unicodedata.normalize("NFC", case)


@needs_qwen
def test_tokenizer_has_qwens_special_ids():
    expected = json.loads((QWEN / "special_tokens.json").read_text())
    assert qwen().special == {name: token["id"] for name, token in expected["tokens"].items()}
    assert tok.PATTERN == expected["pat_str"] and qwen().vocab_size == expected["total_tokens"] == 151665
    assert (qwen().endoftext, qwen().im_start, qwen().im_end) == (151643, 151644, 151645)
    assert (qwen().vision_start, qwen().vision_end, qwen().image_pad) == (151652, 151653, 151655)
    assert qwen().stop_ids == (151645, 151643) and qwen().default_system is None
    assert qwen().encode("Hello, world!") == [9707, 11, 1879, 0]


@needs_qwen
@pytest.mark.parametrize("merge_form", [str, list])
def test_tokenizer_json_gives_the_same_as_vocab_and_merges(tmp_path, merge_form):
    hub = {
        "added_tokens": [{"id": i, "content": name} for name, i in qwen().special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tok.PATTERN}}, {"type": "ByteLevel", "use_regex": False}]},
        "model": {"type": "BPE", "vocab": json.loads((QWEN / "vocab.json").read_text(encoding="utf-8")),
                  "merges": [m if merge_form is str else m.split(" ") for m in read_merges()]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(hub), encoding="utf-8")
    write_config(tmp_path, chat_template=QWEN_TEMPLATE)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.ranks, loaded.special) == (qwen().ranks, qwen().special)
    assert loaded.default_system == QWEN_SYSTEM

    hub["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(hub), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json does not cut text by Qwen's pattern"):
        Tokenizer.from_pretrained(tmp_path)


@needs_qwen
@pytest.mark.parametrize("turns", CHATS)
def test_render_equals_qwens_chat_template_in_transformers(turns):
    transformers = pytest.importorskip("transformers")
    reference = _reference(transformers)
    ours = Tokenizer(qwen().ranks, qwen().special, default_system=QWEN_SYSTEM)
    for n in range(1, len(turns) + 1):
        messages = chat(*turns[:n])
        for prompt in {False, turns[n - 1][0] != "assistant"}:
            text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            want = reference(text, add_special_tokens=False)["input_ids"]
            assert ours.render(messages, add_generation_prompt=prompt).ids == want
            system = "" if messages[0]["role"] == "system" else f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"
            written = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            assert text == system + written + "<|im_start|>assistant\n" * prompt


@needs_qwen
@pytest.mark.parametrize("turns", [*CHATS, *THOUGHTS, [("user", "7+5?"), ("assistant", "\n\n12")]])
def test_render_equals_qwen3s_chat_template_in_transformers(turns):
    transformers = pytest.importorskip("transformers")
    reference = _reference(transformers, qwen3=True)
    assert (qwen3().think, qwen3().think_end) == (151667, 151668)
    for n in range(1, len(turns) + 1):
        messages = chat(*turns[:n])
        for prompt in {False, turns[n - 1][0] != "assistant"}:
            for think in {False, prompt}:  # with a question at the end, both ways to ask for the answer
                text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt,
                                                     enable_thinking=think)
                want = reference(text, add_special_tokens=False)["input_ids"]
                assert qwen3().render(messages, add_generation_prompt=prompt, think=think).ids == want


def test_of_a_qwen3s_answer_all_but_the_empty_thoughts_is_learned():
    t = qwen3(small)
    block = [t.think, *t.encode("\n\n"), t.think_end, *t.encode("\n\n")]

    def learned(*turns):
        r = t.render(chat(*turns))
        return t.decode([i for i, m in zip(r.ids, r.mask) if m], skip_special=False)
    said = [("user", "the cat"), ("assistant", "sat"), ("user", "it?"), ("assistant", "the mat")]
    assert learned(*said) == "sat<|im_end|>the mat<|im_end|>"
    assert learned(said[0], ("assistant", "<think>\nthe\n</think>\n\nsat")) == "<think>\nthe\n</think>\n\nsat<|im_end|>"
    row, prompt = t.render(chat(*said)), t.render(chat(*said[:3]), add_generation_prompt=True)
    assert row.ids[:len(prompt.ids)] == prompt.ids and prompt.ids[-len(block):] == block
    assert not any(row.mask[i] for i in range(len(prompt.ids)) if row.ids[i] in block[:2])
    assert t.render(chat(*said[:3]), add_generation_prompt=True, think=True).ids == prompt.ids[:-len(block)]
    plain = Tokenizer(t.ranks, t.special)  # the same tokens, but a template that knows no thoughts
    assert t.think not in plain.render(chat(*said)).ids


@lru_cache
def _reference(transformers, qwen3=False):
    reference = transformers.Qwen2Tokenizer(
        vocab=json.loads((QWEN / "vocab.json").read_text(encoding="utf-8")),
        merges=[tuple(m.split(" ")) for m in read_merges()],
    )
    reference.add_tokens([transformers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    assert reference.convert_tokens_to_ids(SPECIAL_TOKENS) == list(qwen().special.values())
    reference.chat_template = QWEN_TEMPLATE
    if qwen3:
        reference.add_tokens([transformers.AddedToken(name, normalized=False) for name in QWEN3_TOKENS])
        reference.chat_template = QWEN3_TEMPLATE
    return reference


@needs_qwen
@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_encode_equals_transformers_on_any_text(text):
    transformers = pytest.importorskip("transformers")
    assert qwen().encode(text) == _reference(transformers)(text, split_special_tokens=True)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(SPECIAL_TOKENS + ["<image>", " ", "\n"])).map("".join)))
def test_decode_undoes_encode_and_text_never_makes_a_special_token(text):
    for t in [small(), qwen()] if (QWEN / "vocab.json").exists() else [small()]:
        ids = t.encode(text)
        assert t.decode(ids) == t.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)
        assert not t.special_ids & set(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from(" \t\r\n'sStTlL12_.ſ\x1c\x85\xa0\u2028")), max_size=60))
def test_training_cuts_text_where_tiktoken_does(text):
    regex = pytest.importorskip("regex")
    text = tok.clean("".join(c for c in text if unicodedata.category(c) != "Cn"))
    assert tok.split(text) == regex.findall(tok.PATTERN, text)
    # A table that has exactly these pieces as tokens encodes the text to one token per piece.
    pieces = [p.encode() for p in tok.split(text)]
    ranks = {bytes([b]): b for b in range(256)}
    for piece in pieces:
        ranks.setdefault(piece, len(ranks))
    encoding = tiktoken.Encoding("pieces", pat_str=tok.PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary(text) == [ranks[piece] for piece in pieces]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc é", max_size=40), max_size=6), st.integers(256, 290))
def test_training_equals_counting_everything_anew_and_tiktoken_encodes_alike(texts, size):
    words = [(list(p.encode()), n) for p, n in Counter(p for t in texts for p in tok.split(tok.clean(t))).items()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        counts = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                counts[pair] += n
        best = min(counts, key=lambda p: (-counts[p], p), default=None)
        if best is None or counts[best] < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        words = [(tok._merge(ids, best, len(tokens) - 1), n) for ids, n in words]
    ranks = train_bpe(texts, size)
    assert list(ranks.items()) == [(token, i) for i, token in enumerate(tokens)]
    encoding = tiktoken.Encoding("trained", pat_str=tok.PATTERN, mergeable_ranks=ranks, special_tokens={})
    for ids, _ in words:
        assert encoding.encode_ordinary(b"".join(tokens[i] for i in ids).decode()) == ids


@needs_text
def test_training_1000_entries_on_a_megabyte_takes_seconds_and_survives_saving(tmp_path):
    text = SHAKESPEARE.read_text(encoding="utf-8")
    start = time.time()
    t = Tokenizer.train([text], 1000)
    assert time.time() - start < 20
    ids = t.encode(text)
    assert t.vocab_size == 1000 and t.special["<|endoftext|>"] == 978 and t.decode(ids) == text
    assert 2.2 < len(text) / len(ids) < 3.2  # characters per token
    t.save(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.ranks, loaded.special, loaded.default_system) == (t.ranks, t.special, None)
    assert loaded.encode(text) == ids and t.train([text], 1000).ranks == t.ranks


def test_training_stops_when_no_pair_occurs_twice():
    ranks = train_bpe(["abab cd"], 1000)
    assert list(ranks)[256:] == [b"ab"] and ranks[b"ab"] == 256
    t = Tokenizer.train(["abab cd"], 1000)
    assert t.vocab_size == 257 + 22 and t.special["<|file_sep|>"] == 278


def test_saving_keeps_default_system_and_odd_special_ids(tmp_path):
    special = {"<|endoftext|>": 600, "<|im_start|>": 601, "<|im_end|>": 602, "<image>": 603}
    Tokenizer(train_bpe([], 256), special, default_system="Be brief.\né").save(tmp_path / "new" / "folder")
    t = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert t.special == special and t.default_system == "Be brief.\né" and t.vocab_size == 604
    # The table of LLaVA-OneVision: pads called <image>, nothing around them.
    r = t.render(chat(("system", "s"), ("user", "<image>a")), image_tokens=2)
    assert r.ids[r.slots[0] : r.slots[0] + 3] == [603, 603, ord("a")] and r.ids[r.slots[0] - 1] == ord("\n")


@needs_qwen
def test_added_tokens_come_from_the_files_when_they_tell(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        os.symlink(QWEN / name, tmp_path / name)
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 151643, "<|im_start|>": 151644, '
                                                '"<|im_end|>": 151650}')
    assert Tokenizer.from_pretrained(tmp_path).im_end == 151650
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    write_config(tmp_path, added_tokens_decoder={str(151643 + i): {"content": n} for i, n in enumerate(names)})
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% x %}")
    t = Tokenizer.from_pretrained(tmp_path)
    assert (t.image_pad, t.vision_start, t.vocab_size) == (151646, None, 151648)
    assert t.default_system == "You are a helpful assistant."


def test_mask_marks_the_answers_and_their_ends_and_nothing_else():
    t = small()
    r = t.render(chat(("system", "the cat"), ("user", "<image>sat?"), ("assistant", "the mat."), ("user", "it"),
                      ("assistant", "\nsat")), image_tokens=3)  # fmt: skip
    assert len(r.ids) == len(r.mask)
    learned = [i for i, m in zip(r.ids, r.mask) if m]
    assert learned == t.encode("the mat.") + [t.im_end] + t.encode("\nsat") + [t.im_end]
    last = len(r.ids) - 1 - len(t.encode("\nsat")) - 1
    assert r.mask[last - 1] == 0 and r.mask[last] == 1 and r.mask[-1] == 0
    assert t.decode(r.ids, skip_special=False) == (
        "<|im_start|>system\nthe cat<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>sat?<|im_end|>\n"
        "<|im_start|>assistant\nthe mat.<|im_end|>\n<|im_start|>user\nit<|im_end|>\n"
        "<|im_start|>assistant\n\nsat<|im_end|>\n"
    )
    assert t.decode(r.ids) == "system\nthe cat\nuser\nsat?\nassistant\nthe mat.\nuser\nit\nassistant\n\nsat\n"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_prompt_of_inference_is_the_start_of_the_training_row(question, answer):
    for t in (small(), Tokenizer(small().ranks, small().special, default_system="the mat")):
        text = [{"type": "text", "text": answer}]
        row = t.render(chat(("user", question), ("assistant", text)), image_tokens=2)
        prompt = t.render(chat(("user", question)), image_tokens=2, add_generation_prompt=True)
        assert row.ids[: len(prompt.ids)] == prompt.ids and sum(row.mask[: len(prompt.ids)]) == 0
        assert row.ids[len(prompt.ids) :] == t.encode(answer) + [t.im_end] + t.encode("\n")
        assert row.mask[len(prompt.ids) :] == [1] * (len(t.encode(answer)) + 1) + [0] and not sum(prompt.mask)


def test_slots_point_at_each_images_pads():
    t = small()
    r = t.render(chat(("user", "<image><image>\nthe <image> mat"), ("assistant", "sat"), ("user", "cat<image>")),
                 image_tokens=[2, 1, 4, 3])  # fmt: skip
    assert len(r.slots) == 4 and r.ids.count(t.image_pad) == 10
    for slot, n in zip(r.slots, [2, 1, 4, 3]):
        assert r.ids[slot - 1 : slot + n + 1] == [t.vision_start] + [t.image_pad] * n + [t.vision_end]
    assert t.render(chat(("user", "no picture"))).slots == []


def test_parts_and_marked_string_render_alike_and_text_parts_stay_plain():
    t = small()
    image = {"type": "image"}
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}, image, {"type": "text", "text": "sat"}]
    assert t.render(chat(("user", parts))) == t.render(chat(("user", "the cat<image>sat")))
    plain = t.render(chat(("user", [{"type": "text", "text": "<image><|im_end|>"}])))
    assert plain.slots == [] and plain.ids.count(t.im_end) == 1
    assert t.decode(plain.ids) == "user\n<image><|im_end|>\n"


def test_streamed_bytes_join_to_the_text():
    t = small()
    ids = t.encode("été 我 😶")
    assert b"".join(t.decode_bytes([i]) for i in ids).decode() == "été 我 😶"
    assert t.decode(ids[:-1]).endswith("\ufffd") and t.decode_bytes([t.im_end]) == b""
    assert t.decode([t.im_end], skip_special=False) == "<|im_end|>" and t.encode("\ud83d") == t.encode("\ufffd")


@pytest.mark.parametrize("messages, options, error", [
    ([], {}, "no messages"),
    (chat(("bot", "x")), {}, "message 0: role 'bot' is unknown"),
    (["x"], {}, "message 0: role None is unknown"),
    (chat(("user", "x"), ("assistant", None)), {}, "message 1: content is NoneType"),
    ([{"role": "user"}], {}, "message 0: content is NoneType"),
    (chat(("user", [{"type": "video"}])), {}, "message 0: bad part"),
    (chat(("user", [{"type": "text", "text": 3}])), {}, "message 0: bad part"),
    (chat(("user", ["x"])), {}, "message 0: bad part x"),
    (chat(("user", "x"), ("assistant", "y")), {"add_generation_prompt": True}, "message 1 is already the assistant's"),
    (chat(("user", "<image>")), {"image_tokens": [4, 4]}, "1 images need one positive number each"),
    (chat(("user", "<image>")), {"image_tokens": 0}, "but image_tokens is 0"),
])  # fmt: skip
def test_render_refuses_malformed_conversations(messages, options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        small().render(messages, **options)


def test_tokenizer_errors_name_the_file_or_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer here; looked for .*tokenizer.json, or vocab.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}: tokenizer.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"pattern": {"Regex": tok.PATTERN}}}))
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer's files lack the entry 'model'"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()

    letters = tok._byte_alphabet()

    def write(vocab, merges):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")

    write(letters | {"ab": 256, "abc": 257}, "a b\nab c\n")
    assert Tokenizer.from_pretrained(tmp_path).encode("abcab") == [257, 256]
    for vocab, merges, error in [
        ({"ab": 256, "abc": 257}, "ab c\na b\n", "merge 'ab c' is out of order"),
        ({"ab": 257, "abc": 256}, "a b\nab c\n", "merge 'ab c' is out of order"),
        ({"ab": 256}, "a b\nab c\n", "merge 'ab c' is out of order or not in the vocabulary"),
        ({"ab": 256, "abc": 257, "zz": 258}, "a b\nab c\n", "bytes and merges do not give the listed tokens: see 'zz'"),
    ]:
        write(letters | vocab, merges)
        with pytest.raises(ValueError, match=error):
            Tokenizer.from_pretrained(tmp_path)

    ranks, special = small().ranks, small().special
    with pytest.raises(ValueError, match=r"lacks '<\|im_end"):
        Tokenizer(ranks, {"<|endoftext|>": 999})
    with pytest.raises(ValueError, match="share one id"):
        Tokenizer(ranks, special | {"<|im_end|>": 5})
    with pytest.raises(ValueError, match="cannot decode .* from 0 to"):
        small().decode([10**6])
    with pytest.raises(ValueError, match="needs 256 entries"):
        Tokenizer.train(["x"], 200)
    with pytest.raises(ValueError, match="list of texts"):
        Tokenizer.train("x", 300)
    with pytest.raises(ValueError, match="100,000 white-space characters in a row"):
        small().encode("a" + " " * 300_000 + "b")
    no_image = Tokenizer(ranks, {n: i for n, i in special.items() if "image" not in n})
    with pytest.raises(ValueError, match=r"no <\|image_pad\|> token"):
        no_image.render(chat(("user", "<image>")))


def test_importing_tokenizer_needs_only_the_standard_library_and_tiktoken():
    source = Path(tok.__file__).read_text()
    names = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
    assert names - set(sys.stdlib_module_names) == {"tiktoken"}


# ----------------------------------------------------------------------------------------------------------------------
# vision.py: the vision transformer

def test_positions_of_patches_start_as_sines_of_column_and_row_with_base_100():
    # D = 128 channels: 32 wavelengths, 1 to 1/100 radian a patch; number 16 has 100^(-16/32) = 1/10. A side has 6.
    at = sincos_positions(6, 128)
    assert at.shape == (36, 128) and at[0].tolist() == [0] * 32 + [1] * 32 + [0] * 32 + [1] * 32
    right, below = at[1], at[6]
    assert [right[i].item() for i in (0, 16, 32, 48)] == pytest.approx(
        [math.sin(1), math.sin(0.1), math.cos(1), math.cos(0.1)])
    assert torch.equal(right[64:], at[0][64:]) and torch.equal(below[:64], at[0][:64])  # the same row, the same column
    assert torch.allclose(below[64:], right[:64])


def test_a_new_model_starts_with_these_values():
    # tiny: H = D = 128; 4 layers in the decoder, 1 in the ViT, so 8 and 2 branches are added up in their residual
    # streams. A matrix that reads n numbers starts at 1 / sqrt(n).
    torch.manual_seed(0)
    table = {"embed.weight": 3 / 128 ** 0.5, "attention.qkv.weight": 128 ** -0.5, "gate_up.weight": 128 ** -0.5,
             "attention.out.weight": (8 * 128) ** -0.5, "mlp.down.weight": (8 * 256) ** -0.5,
             "vit.patch.weight": (3 * 12 * 12) ** -0.5, "seed.weight": (4 * 128) ** -0.5, "latents": 1.0,
             **{f"blocks.{i}.{name}.weight": std for i in range(1) for name, std in (
                 ("qkv", 128 ** -0.5), ("out", (2 * 128) ** -0.5), ("fc1", 128 ** -0.5), ("fc2", (2 * 256) ** -0.5))},
             "layers.0.q.weight": 128 ** -0.5, "layers.0.kv.weight": 128 ** -0.5, "layers.0.fc1.weight": 128 ** -0.5,
             "layers.0.out.weight": 0, "layers.0.fc2.weight": 0,  # the resampler begins as what its latents start from
             "bridge.fc1.weight": 128 ** -0.5, "bridge.fc2.weight": 128 ** -0.5}
    for name, p in VLM(preset("tiny")).named_parameters():
        if "norm" in name or name.endswith("bias"):
            start = 2.5 if name == "gpt.norm.weight" else 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (p == start).all(), name
        elif name != "vit.position":
            std, = {std for end, std in table.items() if name.endswith(end)}
            assert p.std().item() == pytest.approx(std, rel=0.06) and p.mean().abs() < 0.1 * std + 1e-9, name


def test_small_features_are_normalised_with_the_eps_they_were_trained_with():
    # 0.001 and -0.001 have the variance 1e-6; with eps 1e-6 they become 0.001 / sqrt(2e-6) = 0.7071, with 1e-5 0.30.
    vlm, x = VLM(preset("tiny")), torch.tensor([1e-3, -1e-3] * 64)
    for layer in (vlm.vit.norm, *(b.norm1 for b in vlm.vit.blocks), *(b.norm2 for b in vlm.vit.blocks), vlm.gpt.norm,
                  vlm.gpt.blocks[0].norm1, vlm.gpt.blocks[0].norm2):
        assert (layer(x)[:2] / layer.weight[:2]).tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)


def test_a_frozen_vit_is_computed_without_a_graph():
    vlm, recording = tiny_vlm(), []
    vlm.vit.blocks[0].register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    batch = rows_of(vlm, rendered(vlm))
    for trained in (["bridge", "decoder", "vit"], ["bridge", "decoder"]):
        freeze_all_but(vlm, trained)
        vlm(batch).backward()
    assert recording == [True, False] and vlm.bridge.fc1.weight.grad.any()


# so400m at 384 px leaves 6 px unused; here 30 = 2 * 14 + 2. The other one is all defaults, as the hub's sparse files.
ODD_SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=30,
                patch_size=14)

DEFAULTS = dict(hidden_size=48, intermediate_size=96)


@needs("transformers")
@pytest.mark.parametrize("shards", [False, True], ids=["one_file", "shards"])
@pytest.mark.parametrize("whole", [False, True], ids=["vision_tower", "whole_siglip"])
@pytest.mark.parametrize("sizes", [ODD_SIZE, DEFAULTS], ids=["odd_size", "sparse_config"])
def test_vit_equals_siglip_of_transformers(tmp_path, sizes, whole, shards):
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel
    config = SiglipVisionConfig(**sizes)
    if whole:
        text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                    max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
        reference = SiglipModel(SiglipConfig(text_config=text, vision_config=config.to_dict()))
    else:
        reference = SiglipVisionModel(config)
    shake(reference).save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards

    def make_sparse(full):
        part = full.get("vision_config", full)
        for name, value in SiglipVisionConfig().to_dict().items():
            if name != "model_type" and part.get(name) == value:
                part.pop(name, None)
    change_config(tmp_path, make_sparse)
    vit = ViT.from_pretrained(tmp_path)
    assert vit.config.num_patches == (config.image_size // config.patch_size) ** 2
    pixels = torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1
    with torch.no_grad():
        tower = reference.vision_model if whole else reference
        expected = tower(pixels, output_hidden_states=True)
        assert far(vit(pixels), expected.last_hidden_state) < 1e-4
        # What LLaVA takes: an inner layer, without the last norm.
        assert far(vit(pixels, layer=-1, norm=False), expected.hidden_states[-1]) < 1e-4
        assert far(vit(pixels, layer=-2, norm=False), expected.hidden_states[-2]) < 1e-4


def test_vit_reads_bytes_and_normalised_pixels_alike():
    vit = ViT(ViTConfig(**ODD_SIZE))
    pixels = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    assert torch.equal(vit(pixels), vit(vision.normalize(pixels, torch.float32)))
    extremes = vision.normalize(torch.tensor([0, 255], dtype=torch.uint8), torch.float32)
    assert extremes.tolist() == [-1, 1]


@needs("transformers")
@pytest.mark.parametrize("resample, bicubic", [(2, False), (3, True)], ids=["siglip2_bilinear", "siglip_bicubic"])
def test_preprocessing_equals_transformers(tmp_path, resample, bicubic):
    from transformers import SiglipImageProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.utils import is_torchvision_available
    # transformers' own choice resizes with torchvision, and we as it does, bit for bit. Pillow is a level of 255 away.
    processors = [(SiglipImageProcessorPil, 1.01 / 127.5)] + [(SiglipImageProcessor, 1e-5)] * is_torchvision_available()
    for kind, most in processors:
        processor, rng = kind(size={"height": 48, "width": 48}, resample=resample), np.random.default_rng(0)
        for width, height in [(97, 31), (31, 200), (48, 48), (1, 7), (50, 49), (640, 480)]:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
            ours = vision.normalize(vision.preprocess(image, 48, bicubic), torch.float32)
            assert (ours - expected).abs().max() < most
    # The checkpoint's own file says which of the two it wants.
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ODD_SIZE))
    from transformers import SiglipVisionConfig, SiglipVisionModel
    SiglipVisionModel(SiglipVisionConfig(**ODD_SIZE)).save_pretrained(tmp_path)
    assert ViT.from_pretrained(tmp_path).config.bicubic == bicubic


# ----------------------------------------------------------------------------------------------------------------------
# vision.py: the bridge

def bridge_config(kind: str, latents: int = 4, patches: int = 16) -> BridgeConfig:
    return BridgeConfig(kind, num_latents=latents, num_layers=2, num_heads=2, vision_size=16, text_size=24,
                        num_patches=patches)


@pytest.mark.parametrize("latents, seeded", [(4, True), (5, True), (5, False)], ids=["patches", "shares", "learned"])
def test_latents_differ_and_receive_different_gradients(latents, seeded):
    bridge = Bridge(replace(bridge_config("perceiver", latents), seeded=seeded))
    assert (bridge.perceiver.seed is not None) == seeded
    for step in range(2):  # fresh, when the layers add nothing yet, and after a step
        features = torch.randn(3, 16, 16)
        tokens = bridge(features)
        (tokens * torch.randn_like(tokens)).sum().backward()
        for rows in (bridge.perceiver.latents, bridge.perceiver.latents.grad, *tokens):
            assert torch.pdist(rows).min() > 1e-4  # no two alike, or they would stay alike for ever
        with torch.no_grad():
            for p in bridge.parameters():
                p -= 0.01 * p.grad
                p.grad = None


def test_perceiver_latents_depend_on_the_picture():
    perceiver = shake(Bridge(bridge_config("perceiver", 5))).perceiver
    assert not torch.allclose(*perceiver(torch.randn(2, 16, 16)), atol=1e-3)


def test_another_number_of_latents_changes_nothing_but_the_latents():
    bridges = {M: Bridge(bridge_config("perceiver", M, patches=36)) for M in (1, 5, 9, 16, 50)}
    others = {M: {name: p.shape for name, p in bridge.named_parameters() if name != "perceiver.latents"}
              for M, bridge in bridges.items()}
    assert all(shapes == others[9] for shapes in others.values())
    for M, bridge in bridges.items():
        assert bridge(torch.randn(2, 36, 16)).shape == (2, M, 24)
        # Where a latent starts: the mean over the patches around its place, and all patches are somebody's.
        shares = bridge.perceiver.places(torch.eye(36)[None])[0].view(M, 4, 36)
        assert torch.allclose(shares.sum(-1), torch.ones(M, 4)) and (shares.sum((0, 1)) > 0).all()
        rows, columns = torch.arange(36) // 6 + 0.5, torch.arange(36) % 6 + 0.5
        middle = torch.stack([shares.mean(1) @ rows, shares.mean(1) @ columns])  # of what each latent starts from
        if M in (9, 16):
            n = math.isqrt(M)
            wanted = (torch.arange(n) + 0.5) * 6 / n
            assert torch.allclose(middle, torch.stack([wanted.repeat_interleave(n), wanted.repeat(n)]), atol=0.2)
    # Of M = N / 4 they are pixel_shuffle's, to the bit.
    general = vision.quarter_shares(9, 36, torch.device("cpu"), torch.float32)
    assert torch.equal(general @ torch.eye(36), vision.pixel_shuffle(torch.eye(36)[None])[0].view(36, 36))


def test_pixel_shuffle_joins_2x2_neighbours():
    grid = torch.arange(16.0).view(1, 16, 1)  # 4 x 4 patches, numbered row by row
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert vision.pixel_shuffle(grid)[0].tolist() == expected


def test_bridge_gives_as_many_tokens_as_its_config_says():
    for kind, tokens in [("perceiver", 5), ("pixelshuffle", 4), ("mlp", 16)]:
        config = bridge_config(kind, latents=5)
        assert config.num_tokens == tokens
        assert Bridge(config)(torch.randn(2, 16, 16)).shape == (2, tokens, 24)
    assert fails(lambda: Bridge(bridge_config("qformer")), "qformer", "perceiver, pixelshuffle or mlp")
    assert fails(lambda: Bridge(bridge_config("pixelshuffle", patches=25)), "even", "5")


# ----------------------------------------------------------------------------------------------------------------------
# data.py: data sets and packing

def text_of(first: int, length: int, index: int = 0) -> Document:
    return Document(index, [first] * length, [1] * length, [], {"id": str(index), "images": []})


def test_two_documents_that_fill_a_row_to_the_last_token_share_it():
    # 3 ids and 3 ids: each takes 2 positions, as its last id is only ever a target.
    arrays, packed, waiting = pack([text_of(1, 3), text_of(2, 3), text_of(3, 2)], 1, 4, 1)
    assert arrays["ids"].tolist() == [[1, 1, 2, 2]] and len(packed) == 2 and len(waiting) == 1


def test_a_short_document_does_not_wait_while_long_ones_pass():
    # Rows of 10. Document 3 takes 2 positions, all others 9: it fits beside none of them.
    loader = Loader(range(1000), lambda record, i: text_of(record + 1, 3 if record == 3 else 10, i), None, 1, 10, 1)
    assert [4, 4] in [next(loader)["ids"][0, :2].tolist() for _ in range(6)]


def test_a_picture_that_ends_one_token_behind_the_row_is_left_out():
    # <|im_start|>user\n a? <|im_end|>\n <|im_start|>assistant\n b <picture>: something is learned before the picture.
    record = conversation("a?", "b<image>c", images=[1])
    whole = make_document(record, 0, tokenizer(), 4, 500)
    end = whole.slots[0] + 4  # one behind its last place
    fits = make_document(record, 0, tokenizer(), 4, end)
    assert make_document(record, 0, tokenizer(), 4, end - 1) is None
    arrays, _, _ = pack([fits], 1, end, 4)
    assert arrays["image_positions"].tolist() == [end - 4, end - 3, end - 2, end - 1]


def test_a_record_that_shares_a_held_out_records_second_picture_does_not_train():
    # Pictures in the order of their hashes, in which they are chosen. 1 of 10 is held out: the first.
    a, b, c, *rest = sorted((b"picture %d" % i for i in range(10)), key=lambda source: hash_keys({"images": [source]}))
    shows = {"held": [a, b], "neither": [b, c], "trains": [c], **{f"rest {i}": [one] for i, one in enumerate(rest)}}
    train, held = split_by_image(records_of([{"id": name, "images": some} for name, some in shows.items()]), 0.1)
    assert [one["id"] for one in held] == ["held"]
    assert [one["id"] for one in train] == ["trains", *(f"rest {i}" for i in range(7))]


def test_each_answer_of_a_held_out_conversation_is_asked_for(tmp_path):
    rows = [{"id": str(i), "messages": conversation("a?", "b", "c?", "d")["messages"]} for i in range(10)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    _, held_out = data.load_data(str(tmp_path / "d.json"), None, {}, 0, 4)  # two conversations of ten
    asked_for = held_out["held_out"]
    assert [len(one["messages"]) for one in asked_for] == [2, 4, 2, 4] and len({one["id"] for one in asked_for}) == 4


def test_a_picture_of_a_record_is_resized_as_the_model_was_trained(tmp_path):
    wide = Image.open(io.BytesIO(png(1, 60))).crop((0, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    square = Image.new("RGB", (60, 60), (127, 127, 127))
    square.paste(wide, (0, 15))  # grey bars above and below
    for bicubic in (True, False):
        load = pixel_loader(ViTConfig(image_size=24, bicubic=bicubic, pad=True))
        assert torch.equal(load(str(tmp_path / "wide.png"), {"id": 1}), preprocess(square, 24, bicubic))


def test_packing_puts_each_document_into_the_first_row_with_room():
    one = document([1, 2, 3], [0, 0, 1])
    two = document([4, 5, 6, 7], [0, 1, 1, 1], slots=[1], weight=0.5)   # its picture stands at 1 and 2
    three = document([8, 9], [1, 1])
    long = document(range(10, 16))
    batch, placed, waiting = data.pack([one, two, long, three], rows=2, seq_len=4, image_tokens=2)
    assert placed == [one, two, three] and waiting == [long]
    expected = {"ids": [[1, 2, 8, 0], [4, 5, 6, 0]], "targets": [[-100, 3, 9, -100], [5, 6, 7, -100]],
                "positions": [[0, 1, 0, 0], [0, 1, 2, 0]], "document_ids": [[1, 1, 2, 0], [1, 1, 1, 0]],
                "loss_weights": [[1, 1, 1, 0], [0.5, 0.5, 0.5, 0]], "image_positions": [5, 6],
                "supervised": [1, 2, 4, 5, 6],
                "cu_seqlens": [0, 2, 3, 4, 7, 8, 8, 8, 8]}  # the last three documents are empty
    assert {name: array.tolist() for name, array in batch.items()} == expected


def test_batches_prepared_ahead_are_the_same_and_state_is_of_what_was_handed_out():
    def loader(prefetch, state=None):
        return data.Loader(plain_records(10 ** 4), lambda record, i: document(range(3 + i % 5), index=i), None, 2, 16,
                           4, state=state, prefetch=prefetch)
    plain, ahead = loader(False), loader(True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(next(plain)["ids"], next(ahead)["ids"]))
        assert plain.state() == ahead.state()
    assert torch.equal(next(loader(True, ahead.state()))["ids"], next(plain)["ids"])


def test_shuffled_visits_every_record_once_per_pass_in_another_order():
    records = plain_records(50)
    shuffled = data.Shuffled(records, seed=1)
    passes = [[int(shuffled[p * 50 + i]["id"]) for i in range(50)] for p in range(4)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert passes[0] == [int(data.Shuffled(records, seed=1)[i]["id"]) for i in range(50)]
    assert passes[0] != [int(data.Shuffled(records, seed=2)[i]["id"]) for i in range(50)]


def test_a_mixture_keeps_its_proportions():
    class Named:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, i):
            return self.name, i

    mixture = data.Mixture([(Named("a"), 3), (Named("b"), 1)])
    drawn = [mixture[i] for i in range(8000)]
    for name, share in (("a", 0.75), ("b", 0.25)):
        # each set's records in turn, none left out
        assert [i for n, i in drawn if n == name] == list(range(round(8000 * share)))
        for at in range(0, 8000, 400):  # at any time, not only in the end
            assert abs(sum(n == name for n, _ in drawn[at:at + 400]) - 400 * share) <= 1
    assert fails(lambda: data.Mixture([(Named("a"), 2000), (Named("b"), 0.5)]), "--data", "0.5 of 2000.5", "too small")
    assert drawn[5000:5010] == [mixture[i] for i in range(5000, 5010)]


def test_load_data_holds_out_new_scenes_and_new_pairs_or_a_share_of_a_file(tmp_path):
    def load(spec, **options):
        exams = {split: World("exam", split, seed=1) for split in ("scenes", "pairs")}
        return data.load_data(spec, World("chat"), exams, 0, 20, **options)
    train, held = load("world")
    assert set(held) == {"scenes", "pairs"} and all(len(records) == 20 for records in held.values())
    assert all("kind" in record for record in held["pairs"]) and "messages" in train[0]
    rows = [{"id": str(i), "question": f"q{i}", "answer": str(i)} for i in range(40)]
    path = write(tmp_path / "d.json", rows)
    train, held = load(str(path))
    ids = {train[i]["id"] for i in range(32)}  # of so few a fifth is held out
    assert len(ids) == 32 and not ids & {record["id"] for record in held["held_out"]} and len(held["held_out"]) == 8
    orders = [[data.load_data(str(path), None, {}, seed, 4)[0][i]["id"] for i in range(32)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    other = write(tmp_path / "v.json", [{"id": "v", "question": "q", "answer": "a"}])
    train, held = load(f"{path}:3,world,{path}", val=str(other))  # one set for all files
    assert [r["id"] for r in held["held_out"]] == ["v"] and set(held) == {"scenes", "pairs", "held_out"}


def test_long_documents_wait_but_all_are_seen():
    seen = Counter()

    def convert(record, index):
        seen[index] += 1
        return document([index] * (3 + index % 7), index=index)

    loader = data.Loader(data.Shuffled(plain_records(60), 0), convert, None, 2, 9, 1, prefetch=False)
    shown = Counter()
    for _ in range(60):
        shown.update(set(next(loader)["ids"].flatten().tolist()) - {0})
    waiting = {d.index for d in loader.waiting}
    made = {i for i in seen if 0 < i < loader.next}  # others are made ahead
    assert made - waiting == set(shown) and len(waiting) < 10  # nothing lost
    assert max(seen.values()) == 1  # and nothing made twice


def test_records_that_waited_when_a_run_stopped_may_have_changed_when_it_is_resumed():
    def convert(record, index):
        require(index != 1, "its picture is gone")
        return None if index == 2 else document([index] * 4, index=index)  # now it is too long

    records = plain_records(60)
    with pytest.raises(ValueError, match="its picture is gone"):
        data.Loader(records, convert, None, 1, 9, 1, state={"next": 5, "waiting": [1, 2, 3]})
    dataset = data.Mixture([(data.Shuffled(records, 0), 1)], max_bad=1)
    loader = data.Loader(dataset, convert, None, 1, 9, 1, state={"next": 5, "waiting": [1, 2, 3]})
    assert next(loader)["ids"][0, :3].tolist() == [3, 3, 3] and len(loader.bad.lines) == 1


# ----------------------------------------------------------------------------------------------------------------------
# data.py: the loader

def test_a_loader_goes_on_from_its_state_bit_for_bit():
    vlm = tiny_vlm()

    def make(state=None):
        return data.Loader(World("chat", seed=3), lambda record, i: render(record, i, vlm, 400),
                           data.pixel_loader(vlm.config.vision), 2, 400, 4, micro_batch=1, micro_batches=2, state=state)
    loader = make()
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state()))  # as it lies in state.json
    assert state["waiting"]  # some documents found no room yet: they must not be lost
    resumed = make(state)
    for _ in range(3):
        assert equal_batches(next(loader), next(resumed))
    assert loader.state() == resumed.state()


def numbered(record: int, index: int) -> data.Document:
    "Document i is made of i's alone, and of a length of its own."
    n = 2 + record * 7 % 11
    return data.Document(index, [record] * n, [1] * n, [], {"id": record, "images": []})


def test_micro_batches_share_the_records_without_gap_or_repeat():
    parts = []
    for number in range(3):
        loader = data.Loader(range(10 ** 6), numbered, None, 2, 16, 4, number, 3)
        ids = seen(loader, 40)
        waiting = [doc.ids[0] for doc in loader.waiting]
        assert sorted(ids + waiting) == list(range(number, loader.next, 3))  # each record once, packed or waiting
        parts.append(set(ids))
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]


def test_no_document_waits_for_ever():
    loader = data.Loader(range(10 ** 6), numbered, None, 2, 16, 4)
    for _ in range(60):
        next(loader)
        assert all(loader.next - doc.index < 40 for doc in loader.waiting)


def test_a_loader_leaves_out_what_does_not_fit_but_not_everything():
    def odd_only(record, index):
        return data.Document(index, [record] * 9, [1] * 9, [], {"id": 1, "images": []}) if record % 2 else None
    loader = data.Loader(range(10 ** 6), odd_only, None, 1, 8, 4)
    assert seen(loader, 1500) == list(range(1, 3001, 2))  # many are left out in all, but never many in a row
    assert fails(lambda: next(data.Loader(range(10 ** 6), lambda record, index: None, None, 1, 8, 4)), "--seq_len=8")


def test_a_record_whose_pictures_and_places_disagree_stops_with_its_name():
    vlm = tiny_vlm()
    (doc,) = documents(vlm, [chat_model("<image>what is this?", "a cat", images=[1])])
    broken = replace(doc, record=doc.record | {"images": [1, 2], "id": "record 17"})
    with pytest.raises(AssertionError, match="record 17"):
        batch_of(vlm, [broken])


def test_a_document_is_cut_only_where_its_pictures_stay():
    vlm = tiny_vlm()
    record = chat_model("<image>what is this?", "a red cat " * 9, "and <image>this?", "a blue dog", images=[1, 2])
    whole = render(record, 0, vlm, 200)
    for seq_len in range(10, len(whole.ids) + 3):
        doc = render(record, 0, vlm, seq_len)
        assert (doc is not None) == (seq_len >= whole.mask.index(1))  # its first picture, and a word of the answer
        if doc:  # both turns, or the first one, of which then the end may be missing
            assert len(doc.slots) == len(doc.record["images"]) == 1 + (seq_len >= len(whole.ids) - 1)
            assert doc.ids == whole.ids[:min(len(doc.ids), seq_len + 1)]
            assert math.isfinite(vlm(batch_of(vlm, [doc], 1, seq_len)).item())


def test_an_unreadable_picture_names_its_record(tmp_path):
    vlm, path = tiny_vlm(), tmp_path / "cat.jpg"
    path.write_bytes(b"not a picture")
    assert fails(lambda: data.pixel_loader(vlm.config.vision)(str(path), {"id": "record 17"}), "record 17", path)
    Image.new("RGB", (40, 30), "red").save(path)
    pixels = data.pixel_loader(vlm.config.vision)(str(path), {"id": "record 17"})
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.uint8 and pixels[0].min() > 250
    # A .tsv holds the bytes themselves.
    assert torch.equal(pixels, data.pixel_loader(vlm.config.vision)(path.read_bytes(), {"id": "record 17"}))


# ----------------------------------------------------------------------------------------------------------------------
# model.py: loss and gradients against the plain formulas, start values

@pytest.mark.parametrize("kind, tied", [("perceiver", True), ("pixelshuffle", False), ("mlp", False)])
def test_loss_and_every_gradient_are_those_of_the_plain_formulas_in_float64(kind, tied):
    vlm = tiny_vlm(kind, tied)
    docs = rendered(vlm)
    batch = rows_of(vlm, docs)
    w = weights_of(vlm)
    expected = sum(plain_loss(w, vlm.config, doc) for doc in docs)
    vlm(batch).backward()
    assert vlm(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    # materialize: a bare MLP reads the features before the ViT's last norm, which gets no gradient then
    assert_same_gradients(vlm, dict(zip(w, torch.autograd.grad(expected, w.values(), materialize_grads=True))))


def test_every_gradient_is_the_slope_of_the_loss():
    # Without any derivative: a step of 1e-5 to each side along a random direction, for each parameter by itself.
    vlm = tiny_vlm()
    doc = rendered(vlm, SHOWN[:1])[0]
    vlm(rows_of(vlm, [doc])).backward()
    w = {name: p.detach() for name, p in weights_of(vlm).items()}
    for name, p in vlm.named_parameters():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).double()
        up, down = (plain_loss(w | {name: w[name] + step * direction}, vlm.config, doc) for step in (1e-5, -1e-5))
        slope = (p.grad.double() * direction).sum()
        assert slope.item() == pytest.approx((up - down).item() / 2e-5, rel=2e-3, abs=2e-4), name


def test_a_tied_head_teaches_the_embedding_of_words_that_only_could_have_come():
    # An id that is nowhere in the text is still a row of the head: at each supervised position it had a probability p,
    # and d loss / d row = sum of p h.
    vlm, ids = tiny_vlm(), torch.tensor([[5, 6, 7, 8]])
    h = vlm.gpt.hidden(vlm.gpt.embed(ids))
    token_loss(h, vlm.gpt.head_weight, torch.tensor([[6, 7, 8, -100]])).backward()
    p = (h @ vlm.gpt.embed.weight.T).softmax(-1)[0, :3]                                                  # [3, V]
    likely = p[:, 9:].sum(0).argmax() + 9
    assert p[:, likely].max() > 0.01 and far(vlm.gpt.embed.weight.grad[likely], p[:, likely] @ h[0, :3]) < 1e-4


def test_cross_entropy_is_float32_inside_also_of_bfloat16_logits():
    logits = (8 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(40)
    loss, gradient = cross_entropy(logits.clone(), targets, torch.ones(40))
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, targets, reduction="sum").backward()
    # in bfloat16 each of the 40 would be off by up to 1/256 of itself
    assert loss.item() == pytest.approx(F.cross_entropy(exact, targets, reduction="sum").item(), rel=1e-6)
    assert gradient.dtype == torch.bfloat16 and torch.allclose(gradient.double(), exact.grad, rtol=1 / 256, atol=1e-6)


def test_a_nearly_certain_token_still_has_its_error_in_bfloat16():
    # p = 1 / (1 + e^-7) = 0.99909 is 1 in bfloat16. The gradient at the target is p - 1 = -0.00091, and not 0.
    _, gradient = cross_entropy(torch.tensor([[7.0, 0.0]]).bfloat16(), torch.tensor([0]), torch.ones(1))
    assert gradient[0].tolist() == pytest.approx([-0.000911, 0.000911], rel=0.01)


def test_losses_and_head_gradients_are_summed_in_float32():
    # 3,000 tokens, each with the loss ln 8: in bfloat16 the sum would stop growing at 512, where half a digit is 1.
    x = torch.zeros(1, 3000, 4, dtype=torch.bfloat16)
    x[..., 0] = 1
    head = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = token_loss(x, head, torch.zeros(1, 3000, dtype=torch.long), chunk=1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(3000 * math.log(8), rel=1e-4)
    loss.backward()  # at the target 1/8 - 1, elsewhere 1/8, 3,000 times
    assert head.grad[:, 0].float().tolist() == pytest.approx([-2625] + [375] * 7, rel=1 / 256)


def test_the_preset_tiny_has_the_readmes_numbers():
    vlm = VLM(preset("tiny"))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in vlm.parts().items()}
    assert millions == pytest.approx({"vit": 0.19, "bridge": 0.30, "decoder": 0.72}, abs=0.005)
    assert vlm.config.vision.num_patches == 36 and vlm.config.bridge.num_tokens == 9


def test_the_first_loss_of_a_new_model_is_near_37():
    # Logits of standard deviation 3 x 2.5 guess with confidence, and mostly wrong: not ln 1024 = 6.9.
    torch.manual_seed(0)
    vlm, words = VLM(preset("tiny")), shipped()[1]
    doc = make_document(World("text", seed=1)[0], 0, words, 9, 256, supervise_all=True)
    with torch.no_grad():
        loss = vlm(rows_of(vlm, [doc], 1, 256)).item() / (len(doc.ids) - 1)
    assert 33 < loss < 43


def stored_bytes(vlm: VLM, batch: dict) -> int:
    "What autograd keeps of a forward pass for the backward pass, weights not counted."
    own, kept = {p.untyped_storage().data_ptr() for p in vlm.parameters()}, {}

    def pack_hook(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: its place is not given to another
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        loss = vlm(batch)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_activation_checkpointing_stores_a_blocks_input_and_nothing_else_of_it():
    vlm = tiny_vlm()
    batch, per_block = rows_of(vlm, [doc for doc in rendered(vlm) if not doc.slots], 1, 64), {}
    blocks = vlm.gpt.blocks
    for vlm.gpt.activation_checkpointing in (False, True):
        vlm.gpt.blocks = blocks[:1]
        one = stored_bytes(vlm, batch)
        vlm.gpt.blocks = blocks
        per_block[vlm.gpt.activation_checkpointing] = stored_bytes(vlm, batch) - one
    hidden = 64 * 32 * 4  # bytes: a row of 64 tokens, H = 32, float32
    assert per_block[True] <= hidden and per_block[False] > 10 * hidden


def test_the_preset_small_is_built_and_learns_from_a_row():
    torch.manual_seed(0)
    vlm = VLM(preset("small"))
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6) for name, part in vlm.parts().items()}
    assert millions == {"vit": 21, "bridge": 5, "decoder": 38} and vlm.config.bridge.num_tokens == 64
    doc = make_document(conversation("<image>a?", "b", images=[png(1, 128)]), 0, tokenizer(), 64, 96)
    batch = rows_of(vlm, [doc], 1, 96)
    # Gradients for all, and a step of the norms: one of all 64 million would take seconds.
    norms = {name: p for name, p in freeze_all_but(vlm, list(vlm.parts())).items() if name.endswith("norm.weight")}
    first = train_step(vlm, [batch], len(batch["supervised"]), Optimizer(norms, "muon", 1e-3), setup(), 1.0)
    assert 20 < first < 60 and len(norms) == 3 and all((p != 1).any() for p in norms.values())
    assert all(part.grad.any() for part in (vlm.vit.patch.weight, vlm.bridge.fc1.weight, vlm.gpt.embed.weight))


# ----------------------------------------------------------------------------------------------------------------------
# model.py: Qwen2 and Qwen3

# Odd shapes: Qwen3's 6 heads of 10 channels are wider than H = 40, and each of its 3 kv heads serves two of them.
ODD_QWEN3 = {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}


def save_qwen(folder: Path, tied: bool, shards: bool = False, dtype=torch.float32, old_names: bool = False,
              qwen3: bool = False):
    "A small random Qwen as the hub ships it; returns transformers' own reading of it, in float32."
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
    torch.manual_seed(0)
    sizes = ODD_QWEN3 if qwen3 else {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = (Qwen3Config if qwen3 else Qwen2Config)(
        vocab_size=90, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"}, bos_token_id=0, eos_token_id=0, **sizes)
    reference = shake(AutoModelForCausalLM.from_config(config), by=0.2).to(dtype)
    reference.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards

    def rename(config):
        config["rope_theta"], config["torch_dtype"] = config.pop("rope_parameters")["rope_theta"], config.pop("dtype")
    if old_names:  # as all of Qwen's files have it; transformers 5 writes the other form
        change_config(folder, rename)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@needs("transformers")
@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("tied, shards, dtype, old_names", [
    (True, False, torch.float32, True), (False, False, torch.float32, True), (True, True, torch.float32, False),
    (False, True, torch.float32, False), (True, False, torch.bfloat16, True), (False, True, torch.bfloat16, False)],
    ids=["tied", "untied", "tied_shards", "untied_shards", "bf16_tied", "bf16_untied_shards"])
def test_gpt_equals_qwen2_and_qwen3_of_transformers(tmp_path, tied, shards, dtype, old_names, qwen3):
    reference = save_qwen(tmp_path, tied, shards, dtype, old_names, qwen3)
    gpt = GPT.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in gpt.parameters())  # whatever the file has
    assert gpt.config.use_qk_norm == qwen3 == (not gpt.config.attention_bias)  # from the file, not from a name
    ids = torch.randint(0, 90, (2, 70))
    with torch.no_grad():
        assert far(gpt(ids), reference(ids).logits) < 1e-5


@needs("transformers")
@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_greedy_text_equals_transformers(tmp_path, qwen3):
    reference = save_qwen(tmp_path, tied=True, qwen3=qwen3)
    vlm = text_only(GPT.from_pretrained(tmp_path))
    for prompt in ([5, 17, 80], [3] * 20):
        out = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64,
                                 do_sample=False, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0)
        assert say(vlm, [Rendered(prompt, [0] * len(prompt), [])], max_new_tokens=64) == [out[0, len(prompt):].tolist()]


@needs("transformers")
@pytest.mark.parametrize("penalty, temperature, top_k, top_p", [
    (1.0, 1.0, 0, 1.0), (1.5, 1.0, 0, 1.0), (1.0, 0.6, 8, 1.0), (1.0, 1.0, 0, 0.7), (1.3, 0.8, 20, 0.9),
    (1.2, 1.0, 1, 1.0), (1.0, 1.0, 0, 0.01)])
def test_sampling_has_the_distribution_of_transformers(penalty, temperature, top_k, top_p):
    from transformers import generation as hf
    torch.manual_seed(1)
    V, n = 40, 40_000
    logits, ids = 2 * torch.randn(1, V), torch.tensor([[3, 7, 7, 20, 31]])
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    expected = hf.TemperatureLogitsWarper(temperature)(ids, expected)
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(ids, expected)
    seen = torch.zeros(1, V, dtype=torch.bool).scatter_(1, ids, True)
    # Noise that covers 0 to 1 evenly draws each token exactly as often as its probability says.
    noise = (torch.arange(n) + 0.5) / n
    drawn = model.sample(logits.expand(n, V), noise, seen.expand(n, V), temperature, top_k, top_p, penalty)
    shares = torch.bincount(drawn, minlength=V) / n
    assert ((shares > 0) == (expected[0] > -torch.inf)).all()
    assert (shares - expected.softmax(-1)[0]).abs().max() < 2 / n + 1e-5


def test_sampling_never_leaves_the_filters_at_the_ends_of_the_noise():
    logits = torch.randn(500, 30)
    kept = logits >= logits.topk(3).values[:, -1:]
    for noise in (0.0, 1 - 2 ** -24):
        token = model.sample(logits, torch.full((500,), noise), None, 1.0, 3, 1.0, 1.0)
        assert kept.gather(1, token[:, None]).all()


def test_sampling_from_bfloat16_logits_computes_in_float32():
    logits, noise = torch.randn(200, 1000).bfloat16(), torch.rand(200)
    seen = torch.rand(200, 1000) < 0.5
    for options in ((0.0, 0, 1.0, 1.3), (0.0, 0, 1.0, 1.0), (1.0, 0, 1.0, 1.0), (0.7, 20, 0.9, 1.1)):
        assert torch.equal(*(model.sample(x, noise, seen, *options) for x in (logits, logits.float())))


# ----------------------------------------------------------------------------------------------------------------------
# model.py: packed rows and the loss

def reference_loss(vlm: VLM, doc: data.Document) -> torch.Tensor:
    "One document alone, without mask, packing or chunks: as plainly as it can be written."
    x = vlm.gpt.embed(torch.tensor(doc.ids))
    for slot, number in zip(doc.slots, doc.record["images"]):
        tokens = vlm.encode_images(picture(number)[None])[0]
        x = torch.cat([x[:slot], tokens, x[slot + len(tokens):]])
    logits = F.linear(vlm.gpt.hidden(x[None])[0], vlm.gpt.head_weight)
    targets = torch.tensor([i if learn else -100 for i, learn in zip(doc.ids, doc.mask)])
    return F.cross_entropy(logits[:-1], targets[1:], reduction="sum")


@pytest.mark.parametrize("kind", ["perceiver", "pixelshuffle", "mlp"])
def test_packed_loss_is_the_sum_of_unpacked_and_of_padded(kind):
    vlm = tiny_vlm(kind)
    docs = documents(vlm)
    with torch.no_grad():
        alone = [reference_loss(vlm, doc).item() for doc in docs]
        exact = [vlm(batch_of(vlm, [doc], 1, len(doc.ids) - 1)).item() for doc in docs]
        padded = [vlm(batch_of(vlm, [doc], 2, SEQ_LEN + 7)).item() for doc in docs]
        packed = vlm(batch_of(vlm, docs)).item()
        shuffled = vlm(batch_of(vlm, docs[::-1], rows=4)).item()
    assert exact == pytest.approx(alone, rel=1e-5) and padded == pytest.approx(alone, rel=1e-5)
    assert packed == pytest.approx(sum(alone), rel=1e-5) and shuffled == pytest.approx(sum(alone), rel=1e-5)


def test_no_document_sees_another():
    vlm, docs = tiny_vlm(), documents(tiny_vlm())
    batch = batch_of(vlm, docs)

    def hidden(ids):
        with torch.no_grad():
            tokens = vlm.encode_images(batch["pixels"])[batch["image_index"]].flatten(0, 1)
            x = vlm.embed(ids, tokens, batch["image_positions"])
            return vlm.gpt.hidden(x, batch["positions"], model.document_mask(batch["document_ids"]))
    before = hidden(batch["ids"])
    assert batch["document_ids"].max() >= 2  # or there is nothing to see
    places = {(row, number) for row, line in enumerate(batch["document_ids"].tolist()) for number in line}
    for row, number in places:  # number 0 is the padding
        inside = torch.zeros_like(batch["ids"], dtype=torch.bool)
        inside[row] = batch["document_ids"][row] == number
        after = hidden(torch.where(inside, (batch["ids"] + 1) % 256, batch["ids"]))
        assert torch.equal(after[~inside], before[~inside])
        assert not torch.allclose(after[inside], before[inside])


def test_no_token_sees_a_later_one():
    gpt = tiny_vlm().gpt
    ids = torch.randint(0, 300, (1, 20))
    changed = torch.cat([ids[:, :12], (ids[:, 12:] + 1) % 300], dim=1)
    with torch.no_grad():
        assert torch.allclose(gpt(ids)[:, :12], gpt(changed)[:, :12], atol=1e-5)


def test_a_picture_that_two_documents_share_is_encoded_once_to_the_same_loss():
    vlm = tiny_vlm()
    docs = [doc for doc in documents(vlm) if 1 in doc.record["images"]]
    batch = batch_of(vlm, docs)
    assert len(docs) == 2 and len(batch["pixels"]) == 1 and batch["image_index"].tolist() == [0, 0]
    twice = batch | {"pixels": batch["pixels"].repeat(2, 1, 1, 1), "image_index": torch.tensor([0, 1])}
    assert vlm(batch).item() == pytest.approx(vlm(twice).item(), rel=1e-6)
    vlm(batch).backward()
    once = vlm.vit.position.grad.clone()
    vlm.zero_grad()
    vlm(twice).backward()
    assert far(once, vlm.vit.position.grad) < 1e-5


def test_each_picture_goes_to_its_own_place():
    vlm = tiny_vlm()
    batch = batch_of(vlm, documents(vlm))
    tokens = vlm.encode_images(batch["pixels"])[batch["image_index"]].flatten(0, 1)
    tokens = vlm.embed(batch["ids"], tokens, batch["image_positions"]).flatten(0, 1)[batch["image_positions"]]
    # In the order of the placed documents; the picture of the last one is the first one's.
    expected = torch.cat([vlm.encode_images(picture(i)[None])[0] for i in (1, 2, 3, 1)])
    assert torch.allclose(tokens, expected, atol=1e-5)
    text = batch["ids"].flatten() != tokenizer().image_pad
    assert set(batch["image_positions"].tolist()) == set((~text).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_token_loss_equals_cross_entropy(chunk):
    torch.manual_seed(0)
    x, head = torch.randn(3, 9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, loss_weights = torch.randint(0, 50, (3, 9)), torch.randn(3, 9)
    targets[torch.rand(3, 9) < 0.4] = -100
    for w in (None, loss_weights):
        each = F.cross_entropy((x @ head.t()).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        expected = (each.view(3, 9) * (1 if w is None else w)).sum()
        ours = model.token_loss(x, head, targets, w, chunk=chunk)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        # Scaled, as every stage divides by the step's tokens.
        grads = torch.autograd.grad(expected / 3, (x, head))
        for a, b in zip(torch.autograd.grad(ours / 3, (x, head)), grads):
            assert far(a, b) < 1e-5
        frozen_head = model.token_loss(x, head.detach(), targets, w, chunk=chunk)
        assert far(torch.autograd.grad(frozen_head / 3, x)[0], grads[0]) < 1e-5


def test_a_row_with_nothing_to_learn_has_loss_0_and_a_way_back():
    x, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = model.token_loss(x, head, torch.full((2, 5), -100))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not head.grad.any()


# ----------------------------------------------------------------------------------------------------------------------
# model.py: generation

@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_cached_decoding_equals_uncached(qwen3):
    vlm = tiny_vlm(qwen3=qwen3)
    gpt, ids = vlm.gpt, torch.randint(0, 300, (3, 24))
    lengths = torch.tensor([10, 3, 7])  # each row goes on where its prompt ends; what lies behind that is not seen
    with torch.no_grad():
        whole = gpt.hidden(gpt.embed(ids))
        kv, rows = take_cache(vlm, 3, 24)[0], torch.arange(3)[:, None]
        columns = torch.arange(10).expand(3, 10)
        for S in (0, 16):  # without and with a mask
            first = gpt.hidden(gpt.embed(ids[:, :10]), columns, cache=model.layer_caches(kv, rows, columns, S))
            assert all(far(first[b, :n], whole[b, :n]) < 1e-5 for b, n in enumerate(lengths))
        for i in range(14):
            columns = (lengths + i)[:, None]
            layers = model.layer_caches(kv, rows, columns, 32)
            one = gpt.hidden(gpt.embed(ids.gather(1, columns)), columns, cache=layers)
            assert far(one[:, 0], whole[torch.arange(3), lengths + i]) < 1e-5


@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_one_row_decodes_alike_when_compiled(qwen3):
    # A single row has attention of its own then, written as sums. "eager": as the compiler sees it, but not compiled.
    gpt = tiny_vlm(qwen3=qwen3).gpt
    kvs = [torch.randn(2, 2, 1, 2, 16, gpt.config.head_dim, generator=torch.Generator().manual_seed(0))
           for _ in range(2)]
    x, block, column = torch.randn(1, 1, 32), gpt.blocks[0], torch.tensor([[5]])
    rope, compiled = model.rope_table(column, gpt.config), torch.compile(model.Block.forward, backend="eager")
    with torch.no_grad():
        layers = [model.layer_caches(kv, torch.zeros_like(column), column, 12)[0] for kv in kvs]
        plain, as_sums = block(x, rope, None, layers[0]), compiled(block, x, rope, None, layers[1])
    assert not torch.equal(as_sums, plain) and far(as_sums, plain) < 1e-5 and torch.equal(*kvs)


def test_generation_equals_reading_everything_anew_for_each_token():
    vlm = tiny_vlm()
    (asked,) = prompts(vlm, CHATS_model[:1])
    said = say(vlm, [asked], [1], max_new_tokens=12, repetition_penalty=1.3)[0]
    ids = list(asked.ids)
    for token in said:
        x = vlm.embed(torch.tensor([ids]), image_tokens(vlm, [picture(1)]), torch.arange(4) + asked.slots[0])
        logits = vlm.gpt.hidden(x)[:, -1] @ vlm.gpt.head_weight.t()
        seen = torch.zeros_like(logits, dtype=torch.bool).index_fill_(1, torch.tensor(ids), True)
        assert model.sample(logits, None, seen, 0.0, 0, 1.0, 1.3).item() == token
        ids.append(token)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"temperature": 0.9, "top_k": 30, "top_p": 0.95}],
                         ids=["greedy", "penalty", "sampled"])
def test_batched_ragged_generation_equals_one_by_one(options):
    vlm = tiny_vlm()
    asked = prompts(vlm, RAGGED)
    together = say(vlm, asked, [1, 2, 3, 4], max_new_tokens=16, seeds=[5, 6, 7, 8, 9], **options)
    alone = [say(vlm, [p], c["images"], max_new_tokens=16, seeds=[5 + i], **options)[0]
             for i, (p, c) in enumerate(zip(asked, RAGGED))]
    assert together == alone
    assert len({tuple(row) for row in together}) == 5  # or the test would be blind


def test_a_row_ends_after_its_stop_token():
    vlm = tiny_vlm()
    asked = prompts(vlm, RAGGED[:2])
    free = say(vlm, asked, [1], max_new_tokens=12, temperature=1.0)
    stop = free[0][4]
    columns = list(vlm.generate(asked, [picture(1)], max_new_tokens=12, temperature=1.0, stop={stop}))
    for b in range(2):
        end = free[b].index(stop) + 1 if stop in free[b] else 12
        assert [c[b] for c in columns] == (free[b][:end] + [None] * 12)[:len(columns)]  # the others go on undisturbed
    assert len(list(vlm.generate(asked[:1], [picture(1)], max_new_tokens=1))) == 1


def test_a_wrong_number_of_images_is_one_line():
    vlm = tiny_vlm()
    asked = prompts(vlm, RAGGED[:3])  # three places
    for images in ([], [1, 2], [1, 2, 3, 4]):
        assert fails(lambda: say(vlm, asked, images), "3 places", f"{len(images)} images")
    assert fails(lambda: say(vlm, asked[1:2], [1]), "0 places", "1 images")


# ----------------------------------------------------------------------------------------------------------------------
# train_base.py: the step, bits per byte

def test_a_step_divides_by_the_tokens_of_all_its_micro_batches():
    vlm = tiny_vlm()
    docs, w = rendered(vlm), weights_of(vlm)
    batches = [rows_of(vlm, docs[:1], 1), rows_of(vlm, docs[1:], 2)]
    tokens = sum(sum(doc.mask) for doc in docs)
    assert count_supervised(batches, setup()) == tokens
    params = freeze_all_but(vlm, ["bridge", "decoder", "vit"])
    keep = argparse.Namespace(params=params, step=lambda scale: scales.append(scale))  # leaves the gradients there
    scales = []
    mean = sum(plain_loss(w, vlm.config, doc) for doc in docs) / tokens
    assert train_step(vlm, batches, tokens, keep, setup(), 0.5) == pytest.approx(mean.item(), rel=1e-5)
    assert_same_gradients(vlm, dict(zip(w, torch.autograd.grad(mean, w.values()))))
    assert scales == [0.5]


def test_nan_in_one_gradient_beside_a_finite_loss_skips_the_step():
    vlm, here = tiny_vlm(), setup()
    optimizer, batch = Optimizer(freeze_all_but(vlm, ["decoder"]), "adamw", 1e-3), rows_of(vlm, rendered(vlm))
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    spoil = vlm.gpt.blocks[0].norm1.weight.register_hook(lambda gradient: gradient * math.nan)
    assert vlm(batch).isfinite() and math.isnan(train_step(vlm, [batch], 9, optimizer, here, 1.0))
    assert here.bad_steps == 1 and all(torch.equal(p, before[name]) for name, p in vlm.named_parameters())
    assert all(p.grad is None for p in vlm.parameters())  # nothing of it is added to the next step's
    spoil.remove()
    assert math.isfinite(train_step(vlm, [batch], 9, optimizer, here, 1.0)) and here.bad_steps == 0


def test_a_step_has_a_loader_for_each_micro_batch_of_its_rank():
    # 8 rows a step, 2 a pass: 4 micro-batches. The first of 2 ranks computes numbers 0 and 2, the second 1 and 3.
    flags, vlm = argparse.Namespace(
        batch_size=8, micro_batch_size=2, seq_len=512, steps=1, resume=False), tiny_vlm()
    for rank in (0, 1):
        here = setup()
        here.rank, here.world_size = rank, 2
        loaders = make_loaders(flags, here, vlm, tokenizer(), World("text"), {}, supervise_all=True)
        assert [(loader.next, loader.stride, loader.rows) for loader in loaders] == [(rank, 4, 2), (rank + 2, 4, 2)]


def test_bits_per_byte_of_an_even_guess_are_the_bits_of_a_token_over_the_bytes_of_a_token():
    # All logits equal: each of the 320 rows of the embedding is as likely, so a token costs log2(320) = 8.32 bits.
    # "abc" as a text: three tokens of one byte, and the end, of none. The first one is given.
    vlm = tiny_vlm()
    vlm.gpt.embed.weight.data.zero_()
    plain = Tokenizer.train([], 300)  # no merges: a token is a byte
    docs = make_documents([{"id": "1", "text": "abc", "images": []}], vlm, plain, 32, supervise_all=True)
    assert len(docs[0].ids) == 4 and docs[0].mask == [1] * 4
    assert bits_per_byte(vlm, plain, docs, setup(), 32) == pytest.approx(3 * math.log2(320) / 2, rel=1e-5)


def test_blind_and_shuffled_losses_are_those_of_grey_and_of_exchanged_pictures():
    vlm = tiny_vlm()
    docs, load = rendered(vlm), pixel_loader(vlm.config.vision)
    pixels = {number: load(png(number), {"id": "1"}) for number in (-1, 1, 2, 3, 4)}
    # The conversations show 1; none; 2 and 3; 4. Exchanged, each place shows the next picture, the last the first.
    shown = {"own": [[1], [], [2, 3], [4]], "blind": [[-1], [], [-1, -1], [-1]], "shuffled": [[2], [], [3, 4], [1]]}
    w = weights_of(vlm)
    for image, numbers in shown.items():
        expected = sum(plain_loss(w, vlm.config, doc, [pixels[n] for n in some]) for doc, some in zip(docs, numbers))
        loss, tokens = held_out_loss(vlm, docs, setup(), 128, image)
        assert loss == pytest.approx(expected.item(), rel=1e-5) and tokens == sum(sum(doc.mask) for doc in docs), image
    assert held_out_loss(vlm, docs[:1], setup(), 128, "shuffled") == (0, 0)  # there is no other picture


def test_auto_is_muon_from_random_weights_and_adamw_for_released_ones():
    chosen = {model: chapter_flags("", "sft", train_sft.FLAGS, train_sft.BY_MODEL, [f"--model={model}"]).optimizer
              for model in ("tiny", "small", "qwen2.5-0.5b", "llava-ov-0.5b", "Org/Name")}
    assert chosen == {"tiny": "muon", "small": "muon"} | dict.fromkeys(list(chosen)[2:], "adamw")


# ----------------------------------------------------------------------------------------------------------------------
# train_align.py

def test_captions_are_written_about_their_own_pictures_to_the_end():
    (vlm, words), records = shipped(), [World("captions", "scenes", seed=1)[i] for i in range(8)]
    load, right = pixel_loader(vlm.config.vision), [record["messages"][-1]["content"] for record in records]
    longest = max(len(words.encode(text)) for text in right)
    alone = [respond(vlm, words, [one["messages"][:1]], [[load(one["images"][0], one)]], max_new_tokens=longest + 4)[0]
             for one in records]
    assert write_captions(vlm, words, records) == alone and sum(map(str.__eq__, alone, right)) >= 4


# ----------------------------------------------------------------------------------------------------------------------
# train_sft.py: scores beside their baselines, by a model that sees

def test_accuracy_stands_beside_grey_and_exchanged_pictures():
    counts = {image: sum(right_by_hand(20, image)) for image in ("own", "blind", "shuffled")}
    assert counts["own"] > 15 and max(counts["blind"], counts["shuffled"]) < 10
    result = evaluate_with_baselines(*shipped(), {"scenes": questions(20)}, setup())["scenes"]
    assert (result["accuracy"], result["blind_accuracy"], result["shuffled_accuracy"]) == tuple(
        count / 20 for count in counts.values())
    # question i of an exam is of kind i modulo 10
    right = right_by_hand(20, "own")
    assert result["by_kind"] == {kind: (right[i] + right[10 + i]) / 2 for i, kind in enumerate(QUESTIONS)}


def test_questions_are_answered_alike_in_batches_of_any_size():
    assert answers(*shipped(), questions(7), batch=3) == answers(*shipped(), questions(7))


def test_parts_of_a_point_count_as_parts():
    # By DocVQA's rule a letter too few of n costs 1/n: the model says "orange", and right is "orangeX".
    which = [i for i, right in enumerate(right_by_hand(20, "own")) if right][:4]
    said = [questions(20)[i]["messages"][1]["content"] for i in which]
    records = [questions(20)[i] | {"metric": "anls", "answer": text + "X"} for i, text in zip(which, said)]
    scores = [(n / (n + 1) if n else 0) * (n / (n + 1) >= 0.5) for n in map(len, said)]
    result = evaluate(*shipped(), records, setup())
    assert result["right"] == pytest.approx(scores) and result["accuracy"] == pytest.approx(sum(scores) / 4)


def test_in_samples_a_right_answer_is_green_and_a_wrong_one_red(tmp_path):
    record = questions(20)[right_by_hand(20, "own").index(True)]
    wrong = record | {"messages": [record["messages"][0], {"role": "assistant", "content": "elephant"}]}
    for one, colours in ((record, {"green"}), (wrong, {"firebrick"})):
        save_samples(tmp_path / "samples.png", *shipped(), {"scenes": [one]})
        words = Image.open(tmp_path / "samples.png").crop((0, 240, 240, 999))  # below the picture
        drawn = {colour for _, colour in words.getcolors(10 ** 6)}
        assert {name for name in ("green", "firebrick") if ImageColor.getrgb(name) in drawn} == colours


def test_shuffled_never_gives_a_picture_back_to_itself():
    records = about("a.png", 3) + about("b.png", 2) + about("c.png")
    swapped = train_sft.exchange_pictures(records)
    assert [record["images"] for record in swapped] == [["b.png"]] * 3 + [["c.png"]] * 2 + [["a.png"]]
    assert train_sft.exchange_pictures(about("a.png", 3)) is None
    worlds = [World("exam", "scenes")[i] for i in range(9)]
    assert all(a["images"] != b["images"] for a, b in zip(worlds, train_sft.exchange_pictures(worlds)))


def test_few_held_out_questions_are_told_as_few(monkeypatch, capsys):
    monkeypatch.setattr(train_sft, "answers", lambda vlm, tokenizer, rows, blind=False: ["yes"] * len(rows))
    result = train_sft.evaluate_with_baselines(None, None, {"mine": about("a.png", 2)}, setup())["mine"]
    said = capsys.readouterr().err
    assert result["accuracy"] == 1 and result["shuffled_accuracy"] is None and "no shuffled baseline" in said
    assert said.index("only 2 questions, 95 % interval of the total 34.2% to 100.0%") < said.index("own")
    assert sum(line.split()[:1] == ["all"] for line in said.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# train_rl.py: one question, four answers, two of them right

QUESTION = conversation("<image>what is this?", "a cat", images=[1], answer=["a cat", "a dog"])
FOUR = ["a cat", "one", "two three", "a dog"]  # rewards 1, 0, 0, 1; their mean is 1/2


def asked(vlm: VLM, record: dict) -> Rendered:
    return tokenizer().render(record["messages"][:-1], vlm.config.bridge.num_tokens, add_generation_prompt=True)


def ended(text: str) -> list[int]:
    return tokenizer().encode(text) + [tokenizer().im_end]


def test_a_group_of_four_answers_becomes_the_four_gradients_of_its_advantages():
    vlm, group = tiny_vlm(), [ended(text) for text in FOUR]
    prompt = asked(vlm, QUESTION)
    documents, tokens, sums = to_documents([QUESTION], [prompt], [group], tokenizer())
    assert [doc.weight for doc in documents] == [0.5, -0.5, -0.5, 0.5]
    assert sums == {"reward": 0.5, "teaching": 1} and tokens == sum(map(len, group))
    for batch in pack_all(documents, 2, 64, vlm):
        (vlm(batch) / tokens).backward()
    # By hand: -log p of each answer alone, from its first token to its last, the one that ends it.
    gradients = [plain_gradient(vlm, Document(0, prompt.ids + ids, [0] * len(prompt.ids) + [1] * len(ids), prompt.slots,
                                              QUESTION)) for ids in group]
    one, two, three, four = gradients
    expected = {name: (one[name] - two[name] - three[name] + four[name]) / 2 / tokens for name in one}
    assert_same_gradients(vlm, expected)


def test_an_update_makes_right_answers_likelier_and_wrong_ones_less_likely():
    vlm, group = tiny_vlm(), [ended(text) for text in FOUR]
    documents, tokens, _ = to_documents([QUESTION], [asked(vlm, QUESTION)], [group], tokenizer())
    alone = [rows_of(vlm, [doc], 1, 64) | {"loss_weights": torch.ones(1, 64)} for doc in documents]
    before = [vlm(batch).item() for batch in alone]
    optimizer = Optimizer(freeze_all_but(vlm, ["bridge", "decoder", "vit"]), "adamw", 1e-3)
    train_step(vlm, pack_all(documents, 2, 64, vlm), tokens, optimizer, setup(), 1.0)
    assert [vlm(batch).item() < loss for batch, loss in zip(alone, before)] == [True, False, False, True]


def test_equal_answers_are_one_document_with_the_sum_of_their_advantages():
    # Right three times of four: 1/4 each, 3/4 together, and -3/4 for the wrong one. All tokens count, merged or not.
    vlm, group = tiny_vlm(), [ended(text) for text in ("a cat", "a cat", "one", "a cat")]
    documents, tokens, _ = to_documents([QUESTION], [asked(vlm, QUESTION)], [group], tokenizer())
    assert [doc.weight for doc in documents] == [0.75, -0.75] and tokens == sum(map(len, group))
    assert [doc.ids[-len(ids):] for doc, ids in zip(documents, (group[0], group[2]))] == [group[0], group[2]]


def test_the_readmes_advantages_ten_right_of_sixteen():
    # The mean is 10/16 = 0.625: +0.375 for a right answer, -0.625 for a wrong one.
    group = [[i, tokenizer().im_end] for i in range(16)]
    documents, tokens, sums = to_documents([QUESTION], [Rendered([1], [0], [])], [group], tokenizer(),
                                           lambda record, ids, tokenizer: float(ids[0] < 10))
    assert [doc.weight for doc in documents] == [0.375] * 10 + [-0.625] * 6
    assert (tokens, sums) == (32, {"reward": 0.625, "teaching": 1})


def test_a_group_that_is_all_right_or_all_wrong_teaches_nothing_and_does_not_count_as_teaching():
    groups = [[ended(text) for text in some] for some in (["a cat", "a dog"], ["one", "two"], ["a cat", "one"])]
    documents, tokens, sums = to_documents([QUESTION] * 3, [Rendered([1], [0], [])] * 3, groups, tokenizer())
    assert sums == {"reward": 1 + 0 + 0.5, "teaching": 1}
    assert [doc.weight for doc in documents] == [0.5, -0.5] and tokens == sum(map(len, groups[2]))


@pytest.mark.parametrize("text, end, earned", [
    ("a cat", "<|im_end|>", 1), ("A dog.", "<|im_end|>", 1), ("a cat", "<|endoftext|>", 1),
    ("a cat", "", 0),  # right, but it never ended: it was cut off
    ("a cat, a dog", "<|im_end|>", 0), ("one", "<|im_end|>", 0), ("", "<|im_end|>", 0)])
def test_a_reward_is_for_a_right_answer_that_ends(text, end, earned):
    words = tokenizer()
    assert reward(QUESTION, words.encode(text) + [words.special[end] for end in (end,) if end], words) == earned


def test_rollouts_are_a_group_for_each_question_sampled_from_seeds_of_their_own():
    vlm = tiny_vlm()
    records = [QUESTION | {"id": "1"}, conversation("one two", "three") | {"id": "2"}]
    flags = argparse.Namespace(seed=3, samples=4, max_new_tokens=5, temperature=2.5)
    prompts, groups = rollout(vlm, tokenizer(), records, flags, 7)
    assert [len(group) for group in groups] == [4, 4] and len({tuple(ids) for group in groups for ids in group}) > 5
    for record, prompt, group in zip(records, prompts, groups):
        assert prompt == asked(vlm, record)
        load = pixel_loader(vlm.config.vision)
        for k, ids in enumerate(group):  # alone, from the seed of step, question and number
            one = Request(prompt, [load(source, record) for source in record["images"]], max_new_tokens=5,
                          stop=set(tokenizer().stop_ids), temperature=2.5,
                          seed=random.Random(f"3/7/{record['id']}/{k}").getrandbits(40))
            list(Engine(vlm, [one], vocab_used=tokenizer().vocab_size).run())
            assert ids == one.answer and max(ids) < tokenizer().vocab_size
    assert rollout(vlm, tokenizer(), records, flags, 8)[1] != groups
    assert rollout(vlm, tokenizer(), records[1:], flags, 7)[1] == groups[1:]  # on another rank
    assert rollout(vlm, tokenizer(), [], flags, 7) == ([], [])


def test_the_token_that_ends_an_answer_is_a_part_of_it():
    # To stop is learned, too. The trained model answers in a word or two.
    flags = argparse.Namespace(seed=0, samples=3, max_new_tokens=12, temperature=1.0)
    _, groups = rollout(*shipped(), questions(3), flags, 0)
    assert all(ids[-1] == shipped()[1].im_end and len(ids) < 12 for group in groups for ids in group)


# ----------------------------------------------------------------------------------------------------------------------
# All chapters: what they train on and ask, and what they report

class Caught(Exception):
    pass


def data_of(main, monkeypatch, *flags) -> tuple[World, dict]:
    "The world that a chapter trains on, and those it holds out: what its main() gives to load_data."
    def caught(spec, world, held_out_worlds, *_, **__):
        raise Caught(world, held_out_worlds)
    with monkeypatch.context() as patch, pytest.raises(Caught) as error:
        patch.setattr(data, "load_data", caught)
        call(main, "--device=cpu", *flags)
    return error.value.args


def test_the_curriculum_goes_by_record_number_from_captions_to_questions(monkeypatch):
    # Of captions: 0.9 at the start, 0.9 - 6000 / 15000 = 0.5, and 0.05 from record 12,750 on; 0.1 without chapter 3.
    world, _ = data_of(train_sft.main, monkeypatch)
    for share, last in ((world.caption_share, 0.05), (World("chat").caption_share, 0.1)):
        assert [share(i) for i in (0, 6000, 12_000, 10 ** 6)] == pytest.approx([0.9, 0.5, 0.1, last])
    questions = [sum(len(world[first + i]["messages"]) == 4 for i in range(200)) for first in (0, 6000, 12_000)]
    assert questions[0] < 40 and 60 < questions[1] < 120 and 140 < questions[2]  # two questions make four messages


@pytest.mark.parametrize("main", [train_base.main, train_align.main, train_sft.main, train_rl.main],
                         ids=["base", "align", "sft", "rl"])
def test_all_runs_answer_the_same_questions_which_training_never_shows(monkeypatch, main):
    (world, held_out), (other, same) = (data_of(main, monkeypatch, f"--init={TINY}", f"--seed={seed}")
                                          for seed in (0, 7))
    assert world[0] != other[0] and held_out.keys() == same.keys()
    for split, exam in held_out.items():
        assert exam.split == split != world.split == "train"
        assert [exam[i] for i in range(5)] == [same[split][i] for i in range(5)]
        assert exam[1]["id"] == f"world/{split}/1/1"  # seed 1: bench.py asks them, too


def test_a_quarter_of_the_questions_is_of_all_kinds(monkeypatch):
    world, _ = data_of(train_rl.main, monkeypatch, f"--init={TINY}")
    kinds = Counter(world[i]["kind"] for i in range(len(world.kinds)))
    # Of 40, each of the ten kinds once, and the two that are trained on 15 times more.
    assert kinds == {kind: 16 if kind in ("number", "relation") else 1 for kind in QUESTIONS}


def test_the_policy_that_answers_is_the_one_that_learns():
    # No ratio corrects for another: 16 answers (README) at temperature 1, one update for each rollout.
    flags = chapter_flags("", "rl", train_rl.FLAGS, train_rl.BY_MODEL, [])
    assert (flags.samples, flags.temperature, flags.kinds, flags.rehearse) == (16, 1.0, "number,relation", 0.25)


def test_no_question_comes_twice(monkeypatch, tmp_path):
    asked_for = []
    monkeypatch.setattr(train_rl, "rollout", lambda vlm, words, records, *_: (asked_for.extend(records), ([], []))[1])
    call(train_rl.main, f"--init={TINY}", f"--out_dir={tmp_path}", "--steps=3", "--batch_size=4", "--eval_size=2",
         "--device=cpu")
    assert [record["id"] for record in asked_for] == [f"world/train/0/{i}" for i in range(12)]


@pytest.mark.parametrize("stage, task, seq_len",
                         [("base", "text", 128), ("align", "captions", 128), ("sft", "chat", 112)])
def test_the_first_step_has_the_mean_loss_of_the_first_rows(chapters, stage, task, seq_len):
    # 4 rows in two passes: one takes the world's records 0, 2, 4, ... and the other 1, 3, 5, ...
    (vlm, words), nats, tokens, pictures = shipped(), 0.0, 0, 0
    make = partial(make_document, tokenizer=words, image_tokens=9, seq_len=seq_len, supervise_all=stage == "base")
    for i in (0, 1):
        world = World(task, seed=10, caption_share=(lambda i: 0.05) if stage == "sft" else None)  # as it goes on
        loader = Loader(world, make, pixel_loader(vlm.config.vision), 2, seq_len, 9, i, 2)
        batch = next(loader)
        nats, tokens = nats + vlm(batch).item(), tokens + int((batch["targets"] >= 0).sum())
        pictures += 0 if batch["pixels"] is None else len(batch["pixels"])
    told = log_of(chapters, stage)
    assert told["loss"] == pytest.approx(nats / tokens, rel=1e-4) and told.get("images", 0) == pictures
    # of a single step the learning rate neither rises nor falls
    usual = {"base": train_base, "align": train_align, "sft": train_sft}[stage].BY_MODEL["tiny"]["lr"]
    assert told["lr"] == pytest.approx(usual * (train_sft.AGAIN if stage == "sft" else 1))  # it goes on with chapter 3


PARTS = {"base": {"gpt"}, "align": {"vit", "bridge"}, "sft": {"vit", "bridge", "gpt"}, "rl": {"vit", "bridge", "gpt"}}


@pytest.mark.parametrize("stage", RUNS)
def test_a_chapter_changes_the_parts_it_trains_and_keeps_moments_of_no_other(chapters, stage):
    start = dict(shipped()[0].named_parameters())
    moved = {name.split(".")[0] for name, p in left_by(chapters, stage)[0].named_parameters()
             if not torch.equal(p, start[name])}
    moments = read_safetensors(chapters.out / "tiny" / stage / "optimizer.safetensors")
    assert moved == {name.split(".")[0] for name in moments} == PARTS[stage]


def test_chapter_1_reports_the_bits_per_byte_of_its_model_before_and_after(chapters):
    vlm, words, result = left_by(chapters, "base")
    texts = [World("text", "scenes", seed=1)[i] for i in range(4)]
    docs = [make_document(one, 0, words, 9, 128, supervise_all=True) for one in texts]
    assert all(all(doc.mask) for doc in docs)  # every token counts, not only what an assistant says
    size = sum(len(words.decode_bytes(doc.ids[1:])) for doc in docs)
    for name, model in (("bits_per_byte", vlm), ("bits_per_byte_before", shipped()[0])):
        w = {name: p.detach() for name, p in weights_of(model).items()}
        nats = sum(plain_loss(w, model.config, doc) for doc in docs)
        assert result[name] == pytest.approx(nats.item() / math.log(2) / size, rel=1e-4)
    assert result["bits_per_byte"] < result["bits_per_byte_before"]


def test_chapter_2_reports_the_loss_of_captions_with_the_right_a_grey_and_another_picture(chapters):
    vlm, words, result = left_by(chapters, "align")
    records = [World("captions", "scenes", seed=1)[i] for i in range(4)]
    docs, load = [make_document(one, 0, words, 9, 128) for one in records], pixel_loader(vlm.config.vision)
    pixels = [load(one["images"][0], one) for one in records]
    w = {name: p.detach() for name, p in weights_of(vlm).items()}
    for name, shown in (("caption_loss", pixels), ("shuffled_loss", pixels[1:] + pixels[:1]),
                        ("blind_loss", [torch.full((3, 72, 72), 128)] * 4)):
        nats = sum(plain_loss(w, vlm.config, doc, [one]) for doc, one in zip(docs, shown))
        assert result[name] == pytest.approx(nats.item() / sum(sum(doc.mask) for doc in docs), rel=1e-4), name


def test_chapter_3_reports_accuracy_and_loss_of_its_model_beside_the_baselines(chapters):
    vlm, words, result = left_by(chapters, "sft")
    for split in ("scenes", "pairs"):
        records = [World("exam", split, seed=1)[i] for i in range(6)]
        expected = evaluate_with_baselines(vlm, words, {split: records}, setup())[split]
        assert {name: result["held_out"][split][name] for name in expected} == expected | {"ci95": [*expected["ci95"]]}
        if split == "scenes":
            assert (result["accuracy"], result["blind_accuracy"]) == (expected["accuracy"], expected["blind_accuracy"])
            docs = [make_document(one, 0, words, 9, 72) for one in records]
            for name, image in (("loss", "own"), ("blind_loss", "blind"), ("shuffled_loss", "shuffled")):
                nats, tokens = held_out_loss(vlm, docs, setup(), 72, image)
                assert result["held_out"][split][name] == pytest.approx(nats / tokens, rel=1e-5)


def test_chapter_4_reports_what_its_model_gained_on_all_questions_and_on_its_kinds(tmp_path):
    result = run_chapter("rl", tmp_path, "--lr=0.1")  # a step so large that much is forgotten: a loss
    after_it = load_checkpoint(tmp_path / "tiny" / "rl"), shipped()[1]
    pairs, trained_on = [], ("number", "relation")
    for split in ("scenes", "pairs"):
        records = [World("exam", split, seed=1)[i] for i in range(6)]
        before, after = (evaluate(*of, records, setup())["right"] for of in (shipped(), after_it))
        told = result["held_out"][split]
        assert (told["before"], told["accuracy"]) == (sum(before) / 6, sum(after) / 6) and sum(before) > sum(after)
        assert told["gain"] == pytest.approx((sum(after) - sum(before)) / 6)
        pairs += [(a, b) for a, b, record in zip(before, after, records) if record["kind"] in trained_on]
        if split == "scenes":
            assert (result["before"], result["accuracy"]) == (told["before"], told["accuracy"])
    expected = gain(*zip(*pairs))
    assert [result["trained_on"][name] for name in ("n", "before", "gain")] == [
        expected[name] for name in ("n", "before", "gain")]


def test_a_step_of_chapter_4_divides_by_its_questions_and_by_all_tokens_of_groups_that_teach(monkeypatch, tmp_path):
    asked, divisors, roll, step = [], [], train_rl.rollout, train_rl.train_step

    def watched(vlm, words, records, *rest):
        prompts, groups = roll(vlm, words, records, *rest)
        asked.extend(([reward(record, ids, words) for ids in group], group) for record, group in zip(records, groups))
        return prompts, groups
    monkeypatch.setattr(train_rl, "rollout", watched)
    monkeypatch.setattr(train_rl, "train_step", lambda vlm, batches, tokens, *rest: divisors.append(tokens) or step(
        vlm, batches, tokens, *rest))
    monkeypatch.setattr(data, "keep_good", lambda records, bad: records[2:])  # as if two had broken pictures
    run_chapter("rl", tmp_path, "--batch_size=24", "--temperature=3")
    told = next(row for row in map(json.loads, (tmp_path / "tiny/rl/log.jsonl").open()) if "lr" in row)
    teach = [group for rewards, group in asked if len(set(rewards)) > 1]
    assert len(asked) == 22 and 0 < len(teach) < 22 and divisors == [sum(len(ids) for one in teach for ids in one)]
    assert told["reward"] == pytest.approx(sum(sum(rewards) / 4 for rewards, _ in asked) / 22)
    assert told["teaching"] == len(teach) / 22


def test_a_resumed_chapter_4_compares_with_where_it_began(chapters, tmp_path):
    assert chapters["rl"]["before"] > 0
    shutil.copytree(chapters.out / "tiny/rl", tmp_path / "tiny/rl")
    state = read_json(path := tmp_path / "tiny/rl/state.json")
    for one in state["before"].values():
        one["right"] = [0.0] * 6  # as if it had begun with nothing right
    path.write_text(json.dumps(state))
    result = call(train_rl.main, f"--out_dir={tmp_path}", "--resume", "--device=cpu")
    assert all(one["before"] == 0 < one["accuracy"] for one in result["held_out"].values())


@pytest.mark.parametrize("stage", ["base", "align", "rl"])
def test_what_a_chapter_logs_on_the_way_is_what_it_reports_at_the_end(chapters, stage):
    # After the only step the weights are those of the end. (Chapter 3 evaluates before its last step alone.)
    result, log = chapters[stage], (chapters.out / "tiny" / stage / "log.jsonl").open()
    rows = [row for row in map(json.loads, log) if "step" in row and "lr" not in row and "stage" not in row]
    expected = {"base": [{"bits_per_byte": result.get("bits_per_byte")}],
                "align": [{name: result.get(name) for name in ("caption_loss", "blind_loss")}],
                "rl": [{"split": split, "accuracy": one["accuracy"], "accuracy_by_kind": one["by_kind"]}
                       for split, one in result.get("held_out", {}).items()]}[stage]
    assert [{name: row[name] for name in one} for row, one in zip(rows, expected)] == expected


def test_a_step_from_few_groups_that_teach_is_a_small_one(chapters):
    # Fewer than an eighth of the questions got right and wrong answers. From an eighth on steps are whole.
    told = log_of(chapters, "rl")
    assert 0 < told["teaching"] < 1 / 8 and told["lr"] == 0.0005 * 8 * told["teaching"] and 0.5 < told["reward"] < 1


# ----------------------------------------------------------------------------------------------------------------------
# The stage scripts: a first run through all chapters

def test_the_three_held_out_losses_are_of_the_same_tokens(monkeypatch):
    monkeypatch.setattr(data, "pixel_loader", lambda config: picture)
    vlm, text = tiny_vlm(), CHATS_model[1]
    chats = [CHATS_model[0], *[text] * 80, chat_model("<image>what is this?", "a dog", images=[2])]  # two batches
    docs = [render(record, i, vlm, 48) for i, record in enumerate(chats)]
    losses = {image: train_base.held_out_loss(vlm, docs, setup(), 48, image) for image in ("own", "blind", "shuffled")}
    assert len({tokens for _, tokens in losses.values()}) == 1 and len({loss for loss, _ in losses.values()}) == 3
    assert train_base.held_out_loss(vlm, docs[:16], setup(), 48, "shuffled") == (0.0, 0)  # there is no other picture


KEYS = {"base": {"bits_per_byte", "bits_per_byte_before"}, "align": {"caption_loss", "blind_loss", "shuffled_loss"},
        "sft": {"accuracy", "blind_accuracy", "ci95", "held_out"},
        "rl": {"accuracy", "before", "gain_ci95", "held_out"}}

FILES = {"model.safetensors", "config.json", "tokenizer.tiktoken", "special_tokens.json", "optimizer.safetensors",
         "state.json", "log.jsonl", "curves.png"}


@pytest.mark.parametrize("stage", CHAPTERS)
def test_a_chapter_ends_with_one_line_of_json_on_standard_output(trained, stage):
    ran = trained[1][stage]
    assert len(ran.out.splitlines()) == 1 \
        and ran.result.keys() >= KEYS[stage] | {"stage", "step", "seconds", "checkpoint", "interrupted"}
    assert (ran.result["stage"], ran.result["step"], ran.result["interrupted"]) == (stage, 2, False)


@pytest.mark.parametrize("stage", CHAPTERS)
def test_a_chapter_leaves_a_whole_checkpoint_with_log_and_samples(trained, stage):
    folder = trained[0] / "tiny" / stage
    assert folder == Path(trained[1][stage].result["checkpoint"])
    assert {path.name for path in folder.iterdir()} == FILES | ({"samples.png"} if stage != "base" else set())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"command", "flags", "device", "torch", "time"} <= rows[0].keys() and rows[0]["flags"]["steps"] == 2
    assert [row["step"] for row in rows[1:-1] if "lr" in row] == [1, 2] and rows[-1] == trained[1][stage].result
    if stage != "base":
        assert min(Image.open(folder / "samples.png").size) > 200


def test_a_chapter_evaluates_on_the_way_and_learns_the_same(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "EVERY", 1)
    monkeypatch.setattr(train_sft, "FEW", 3)
    asked, real = [], train_sft.evaluate
    monkeypatch.setattr(train_sft, "evaluate", lambda vlm, tokenizer, records, *rest, **more: asked.append(
        len(records)) or real(vlm, tokenizer, records, *rest, **more))
    for out, flags in (("with", []), ("own", ["--eval_every=2"]), ("without", ["--eval_every=0"])):
        ran = run("train_sft", "--steps=3", *QUICK[1:], "--eval_size=4", f"--out_dir={tmp_path / out}", *flags,
                  f"--init={TINY}", main=train_sft.main)
        assert ran.code == 0
    # On the way twice, then once, where it was asked for of all; at the end two sets: own, blind and shuffled.
    assert asked == [3, 3, *[4] * 6, 4, *[4] * 6, *[4] * 6]
    rows = [json.loads(line) for line in (tmp_path / "with/tiny/sft/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "accuracy_by_kind" in row] == [1, 2, 3]
    one, two = ((tmp_path / out / "tiny/sft/model.safetensors").read_bytes() for out in ("with", "without"))
    assert one == two


def test_a_chapter_ends_by_saying_where_it_saved_and_how_to_ask_it(trained, photo):
    for stage, flag in (("base", "--prompt="), ("align", "--image"), ("sft", "--question"), ("rl", "--question")):
        last = trained[1][stage].err.splitlines()[-1]
        folder = trained[0] / "tiny" / stage
        assert last.startswith(f"saved in {folder}; ask it: python ") and f"sample.py --init={folder}" in last
        words = shlex.split(last.split("python ")[1])[1:]
        assert any(word.startswith(flag) for word in words)
        words = [str(photo) if word == "cat.jpg" else word for word in words]  # beside the script, in the code's folder
        assert run("sample", *words, "--device=cpu", "--max_new_tokens=2").code == 0


def test_each_chapter_says_what_it_starts_from(trained):
    out, ran = trained
    assert "starting base from random weights" in ran["base"].err
    for stage, before in (("align", "base"), ("sft", "align"), ("rl", "sft")):
        assert f"starting {stage} from {out / 'tiny' / before}" in ran[stage].err


def test_alignment_leaves_the_decoder_as_it_was_to_the_last_bit(trained):
    base, align, sft = (read_safetensors(trained[0] / "tiny" / stage / "model.safetensors")
                        for stage in ("base", "align", "sft"))
    decoder = [name for name in base if name.startswith("gpt.")]
    assert decoder and all(torch.equal(base[name], align[name]) for name in decoder)
    assert any(not torch.equal(align[name], sft[name]) for name in decoder)
    for group in ("vit.", "bridge."):
        assert any(not torch.equal(base[name], align[name]) for name in base if name.startswith(group))


def test_a_run_can_be_repeated_bit_for_bit(trained, tmp_path):
    for stage in ("sft", "rl"):
        before = trained[0] / "tiny" / ("align" if stage == "sft" else "sft")
        run(CHAPTERS[stage], *QUICK, f"--out_dir={tmp_path}", f"--init={before}")
        assert (tmp_path / "tiny" / stage / "model.safetensors").read_bytes() \
            == (trained[0] / "tiny" / stage / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# The stage scripts: one's own data

def test_a_broken_held_out_picture_is_found_before_training(trained, tmp_path, own_data):
    for path in (own_data / "images").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny/align'}",
              f"--data={own_data}/zip/zip.json", f"--val={own_data}/files.json")
    one_line(ran, "record r", ".png")
    ran = run("train_sft", *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny/align'}",
              f"--data={own_data}/zip/zip.json", f"--val={own_data}/files.json", "--max_bad=1")
    assert ran.code == 1 and "files.json: not one of the records that are held out" in ran.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, stage", [("train_align", "align"), ("train_sft", "sft"), ("train_rl", "rl")])
def test_a_chapter_learns_from_files_zips_and_tables(trained, tmp_path, own_data, script, stage):
    spec = f"{own_data}/files.json:2,{own_data}/zip/zip.json,{own_data}/table.tsv,world"
    ran = run(script, *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny' / START[stage]}",
              f"--data={spec}")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "tiny" / stage / "samples.png").exists()


def test_a_folder_of_own_photos_is_learned_and_asked(tmp_path):
    # README's recipe: lay them in a folder for each kind, check, fine-tune, ask.
    for kind, colour in (("apple", (200, 30, 30)), ("sky", (40, 90, 220))):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(20):
            photo = image_bytes(tuple(part + i for part in colour), "JPEG", (40, 30))
            (tmp_path / "photos" / kind / f"{i}.jpg").write_bytes(photo)
    assert run("data", "--check", f"--data={tmp_path / 'photos'}", f"--out={tmp_path / 'check.png'}").code == 0
    ran = run("train_sft", "--steps=20", "--batch_size=4", "--device=cpu", f"--out_dir={tmp_path / 'out'}",
              f"--init={TINY}", f"--data={tmp_path / 'photos'}")
    assert ran.code == 0 and "32 of 40 records train, 8 questions are held out" in ran.err
    assert ran.result["accuracy"] == 1 and ran.result["blind_accuracy"] <= 0.5 + 0.2, ran.result
    (tmp_path / "new.jpg").write_bytes(image_bytes((41, 88, 215), "JPEG", (40, 30)))
    said = run("sample", f"--out_dir={tmp_path / 'out'}", f"--image={tmp_path / 'new.jpg'}", "--question=What is this?")
    assert said.code == 0 and said.out.strip() == "sky"


def test_a_description_is_taught_beside_every_eight_questions(trained, tmp_path, monkeypatch):
    seen, real = [], train_rl.pack_all
    monkeypatch.setattr(train_rl, "pack_all", lambda documents, *more: seen.append(documents) or real(documents, *more))
    for share in (0.25, 0):
        ran = run("train_rl", *QUICK, f"--init={trained[0]}/tiny/sft", f"--out_dir={tmp_path / str(share)}",
                  "--batch_size=16", f"--rehearse={share}", "--seed=3", main=train_rl.main)
        assert ran.code == 0
    taught = [[doc for doc in documents if "kind" not in doc.record] for documents in seen]
    world = World("captions", seed=3)
    assert [[doc.record for doc in docs] for docs in taught] == [[world[0], world[8]], [world[16], world[24]], [], []]
    assert all(doc.weight == 1 and 0 < sum(doc.mask) < len(doc.ids) for docs in taught for doc in docs)


def test_steps_of_reinforcement_learning_are_smaller_where_few_groups_teach(trained, tmp_path, monkeypatch):
    rates = {}
    for teaching in (0, 1, 2, 16):
        monkeypatch.setattr(train_rl, "to_documents", lambda *_: ([], 0, {"reward": 0, "teaching": teaching}))
        ran = run("train_rl", *QUICK, f"--init={trained[0]}/tiny/sft", f"--out_dir={tmp_path / str(teaching)}",
                  "--batch_size=16", "--samples=1", "--eval_size=1", main=train_rl.main)
        assert ran.code == 0, ran.err
        rows = map(json.loads, (tmp_path / str(teaching) / "tiny/rl/log.jsonl").read_text().splitlines())
        rates[teaching] = [row["lr"] for row in rows if "lr" in row]
    assert rates[0] == [0, 0] and rates[1] == [rate / 2 for rate in rates[16]] and rates[2] == rates[16] > [0, 0]


def test_alignment_goes_on_where_a_step_shows_no_picture(trained, tmp_path):
    # Among captions there may be text-only records: a micro-batch of them teaches the bridge nothing, and must not stop
    # the run.
    path = write(tmp_path / "d.json", [{"id": str(i), "question": f"What comes after {i}?", "answer": str(i + 1)}
                                       for i in range(40)])
    ran = run("train_align", *QUICK, f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny/base'}",
              f"--data={path}")
    assert ran.code == 0 and ran.result["step"] == 2


def test_the_first_chapter_learns_from_text(trained, tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"The number after {i} is {i + 1}. " + "Then come others. " * 9
                                                      for i in range(60)))
    ran = run("train_base", *QUICK, "--seq_len=24", f"--out_dir={tmp_path / 'out'}", f"--data={tmp_path / 'a.txt'}")
    assert ran.code == 0 and "random weights" in ran.err and ran.result["bits_per_byte"] > 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out/tiny/base")
    assert len(tokenizer.encode(" number")) == 1  # the tokenizer has learned from the same file
    # Each document is in several pieces, and those of one are on one side.
    train, all_, held, documents = map(int, re.search(
        r"(\d+) of (\d+) pieces of text train, (\d+) are held out, of (\d+) other documents", ran.err).groups())
    assert all_ >= 120 and train + held <= all_ and held == 10 >= documents
    # What it writes at the end begins as held-out documents do, and so does the command that asks it for more.
    samples = re.findall(r"^  (The number after .*)$", ran.err, re.M)
    assert len(samples) == 3 and ran.err.splitlines()[-1].endswith("'") and "--prompt='The number after" in ran.err


def test_continuing_from_a_trained_model_takes_a_lower_rate_and_the_curriculums_end(
        trained, tmp_path, own_data, monkeypatch):
    shares, real = [], train_sft.World.__getitem__

    def getitem(self, i):
        shares.append(self.caption_share(i)) if self.task == "chat" else None
        return real(self, i)
    monkeypatch.setattr(train_sft.World, "__getitem__", getitem)

    def go(start: str, *flags) -> tuple[Ran, dict, float]:
        shares.clear()
        ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}",
                  f"--init={trained[0] / 'tiny' / start}", *flags, main=train_sft.main)
        assert ran.code == 0
        first = json.loads((tmp_path / "tiny/sft/log.jsonl").read_text().splitlines()[0])["flags"]
        return ran, first, max(shares)
    usual = train_sft.BY_MODEL["tiny"]["lr"]
    ran, first, share = go("align")
    assert first["lr"] == usual and share > 0.8 and "been through" not in ran.err
    for start in ("sft", "rl"):
        ran, first, share = go(start)
        assert first["lr"] == pytest.approx(usual * train_sft.AGAIN) and share == pytest.approx(0.05)
        assert ran.err.count("it has been through this chapter") == 1 and f"instead of {usual:g}" in ran.err
    ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}", f"--init={trained[0] / 'tiny/sft'}",
              f"--data={own_data / 'files.json'}")  # new things to learn: the usual rate, and nothing to tell
    assert ran.code == 0 and "been through" not in ran.err
    assert read_json(tmp_path / "tiny/sft/state.json")["flags"]["lr"] == usual
    ran, first, share = go("sft", f"--lr={usual}")  # a rate that is given counts, also where it is the usual one
    assert first["lr"] == usual and share == pytest.approx(0.05) and "instead of" not in ran.err
    state = read_json(tmp_path / "tiny/sft/state.json")
    assert state["flags"]["lr"] == usual  # so that --resume goes on with it
    assert run("train_sft", f"--out_dir={tmp_path}", "--resume", main=train_sft.main).code == 0


# ----------------------------------------------------------------------------------------------------------------------
# sample.py

def test_the_checkpoint_written_last_is_the_one_that_answers(tmp_path):
    for stage, saved in (("rl", 100), ("sft", 200), ("base", 50)):
        vlm = tiny_vlm(seed=saved)
        vlm.config.run = {"chapters": ["base", "align", "sft"], "stage": stage, "step": 1, "steps": 1, "saved": saved,
                          "data": "world"}
        save_checkpoint(tmp_path / "tiny" / stage, vlm, tokenizer())
    with contextlib.redirect_stderr(said := io.StringIO()):
        answers = load(sample_flags(f"--out_dir={tmp_path}", f"--image={HERE / 'cat.jpg'}"))[0]
        named = load(sample_flags(f"--init={tmp_path / 'tiny' / 'rl'}", f"--image={HERE / 'cat.jpg'}"))[0]
    assert torch.equal(answers.gpt.norm.weight, tiny_vlm(seed=200).gpt.norm.weight)
    assert torch.equal(named.gpt.norm.weight, tiny_vlm(seed=100).gpt.norm.weight)
    assert f"{tmp_path / 'tiny' / 'rl'} is older" in said.getvalue()  # though its chapter is the later one


def test_a_chat_remembers_its_questions_answers_and_pictures(tmp_path, capsys):
    vlm = tiny_vlm().eval()
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    talk = Chat(vlm, tokenizer(), sample_flags("--max_new_tokens=6"))
    talk.ask("one two")
    talk.do_image(str(tmp_path / "1.png"))
    talk.ask("what is this?")
    talk.do_image(str(tmp_path / "2.png"))
    talk.ask("and this?")
    *said, last = capsys.readouterr().out.splitlines()
    load, turns = pixel_loader(vlm.config.vision), [
        make_message("one two"), make_message(said[0], role="assistant"), make_message("what is this?", 1),
        make_message(said[1], role="assistant"), make_message("and this?", 1)]
    assert len(said) == 2 and talk.messages[:5] == turns
    assert last.strip() == respond(vlm, tokenizer(), [turns], [[load(png(n), {"id": 1}) for n in (1, 2)]],
                                   max_new_tokens=6)[0]


def test_a_chat_takes_back_a_picture_or_a_question_with_what_it_showed(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    talk = Chat(tiny_vlm().eval(), tokenizer(), sample_flags("--max_new_tokens=2"))
    talk.ask("one")
    for _ in range(2):
        talk.do_image(str(tmp_path / "1.png"))
    talk.do_undo("")  # the second picture, which no question has shown
    talk.ask("two")
    assert (len(talk.messages), len(talk.pictures)) == (4, 1)
    talk.do_undo("")  # "two", its answer and its picture
    assert (len(talk.messages), len(talk.pictures)) == (2, 0)
    talk.do_undo("")
    with pytest.raises(ValueError, match="nothing to take back"):
        talk.do_undo("")


def test_a_folder_is_answered_once_and_what_is_missing_again(tmp_path):
    folder, out, vlm = tmp_path / "photos", tmp_path / "a.jsonl", tiny_vlm().eval()
    (folder / "sub").mkdir(parents=True)
    for name, content in (("b.png", png(1)), ("sub/a.PNG", png(2)), ("c.jpg", b"broken"), ("notes.txt", b"x")):
        (folder / name).write_bytes(content)

    def run(question: str) -> list[dict]:
        "-> the lines that are new"
        before = out.read_text() if out.exists() else ""
        with contextlib.suppress(ValueError):  # at the end, where some could not be read
            answer_folder(vlm, tokenizer(), sample_flags(f"--images={folder}", f"--out={out}", "--max_new_tokens=4",
                                                         f"--question={question}"))
        assert out.read_text().startswith(before)  # nothing that was there is lost
        return [json.loads(line) for line in out.read_text().removeprefix(before).splitlines()]
    rows = run("what is this?")
    assert {row["image"]: "answer" in row for row in rows} == {"b.png": True, "c.jpg": False, "sub/a.PNG": True}
    load = pixel_loader(vlm.config.vision)
    for row in rows:
        if "answer" in row:
            pixels = load(str(folder / row["image"]), {"id": 1})
            assert row["answer"] == respond(vlm, tokenizer(), [[make_message("what is this?", 1)]], [[pixels]],
                                            max_new_tokens=4)[0]
    (folder / "c.jpg").write_bytes(png(3))
    assert [row["image"] for row in run("what is this?")] == ["c.jpg"]
    assert run("what is this?") == [] and len(run("and this?")) == 3  # another question is other work


@pytest.mark.parametrize("chapters_of, flags, problem", [
    (["base"], ["--image=x"], "cannot see"), (["base"], ["--chat"], "cannot see"),
    (["base", "align"], ["--image=x"], ""), (["base", "align"], ["--image=x", "--question=Why?"], "not to answer"),
    (["base", "align"], ["--chat"], "not to answer"), (["base", "align", "sft"], ["--image=x", "--question=Why?"], ""),
    (["base", "align", "sft"], ["--question=Why?"], "no picture"), (["base", "align", "sft"], ["--chat"], "")])
def test_a_model_is_not_asked_for_what_it_has_not_learned(chapters_of, flags, problem):
    vlm = tiny_vlm()
    vlm.config.run = {"chapters": chapters_of, "data": "world"}
    with pytest.raises(ValueError, match=problem) if problem else contextlib.nullcontext():
        check_ability(vlm, "out/tiny/x", sample_flags(*flags))


# ----------------------------------------------------------------------------------------------------------------------
# sample.py, on a trained model

def ask(trained: Path, question: str, image: Path | None = None, new: int = 12) -> str:
    "What the model under `trained` says, by the library and not by the script."
    vlm, tokenizer = model.load_checkpoint(trained / "tiny/rl").eval(), Tokenizer.from_pretrained(trained / "tiny/rl")
    pixels = [open_pixels(vlm, image)] if image else []
    return respond(vlm, tokenizer, [[make_message(question, len(pixels))]], [pixels],
                         max_new_tokens=new)[0]


def test_standard_output_holds_the_answer_alone(trained, photo):
    flags = [f"--out_dir={trained[0]}", "--device=cpu", f"--image={photo}", "--question=What is it?",
             "--max_new_tokens=12"]
    ran = run("sample", *flags)
    assert ran.code == 0 and ran.out.strip() == ask(trained[0], "What is it?", photo) and ran.out.endswith("\n")
    assert f"({trained[0]}/tiny/rl: rl, step 2 of 2, trained on world, 20" in ran.err and "older" not in ran.err
    alone = run_process("sample", *flags)
    assert alone.out == ran.out and alone.code == 0
    several = run("sample", *flags, f"--image={photo}", "--temperature=1", "--seed=3", "--top_k=9", "--top_p=0.9",
                  "--repetition_penalty=1.2")
    assert several.code == 0 and several.out


def test_only_a_single_picture_may_be_cut_into_tiles(photo, tmp_path, monkeypatch):
    alone, real = [], sample.open_pixels
    monkeypatch.setattr(sample, "open_pixels", lambda *args, **more: alone.append(more["alone"]) or real(*args))
    for images in ([photo], [photo, photo]):
        flags = [f"--out_dir={tmp_path}", *(f"--image={image}" for image in images), "--max_new_tokens=1"]
        assert run("sample", *flags, "--device=cpu", main=sample.main).code == 0
    assert alone == [True, False, False]


def test_a_huge_longest_answer_takes_no_more_memory_than_the_model_can_fill(photo, tmp_path):
    ran = run("sample", f"--out_dir={tmp_path}", f"--image={photo}", "--max_new_tokens=100000000", "--device=cpu")
    assert ran.code == 0 and "thing" in ran.out


def talk(trained, *lines, flags=(), **more) -> Ran:
    return run("sample", f"--out_dir={trained[0]}", "--chat", "--device=cpu", "--max_new_tokens=4", *flags,
               stdin="\n".join(lines), main=sample.main, **more)


def test_chat_shows_pictures_and_survives_a_slip(trained, photo, monkeypatch):
    monkeypatch.setattr(sample, "only_pictures", lambda vlm: False)  # as a model that has learned from texts, too
    seen = []

    def answer(engine, tokenizer, request, thoughts):
        seen.append((len(request.images), len(request.prompt.slots)))
        request.finish = "cancelled"
        print("A cat.")
        return "A cat."
    monkeypatch.setattr(sample, "stream", answer)
    ran = talk(trained, "Hello?", f"/image {photo}", "What is <image> it?", "", "/image nowhere.png",
               f"/image '{photo}'", "And this?", "/frobnicate", "/reset", "/help", "Again?", f"/image {photo}",
               f"/image {photo}", "/undo", "Or?", "/undo", "/undo", "/quit", "no")
    assert ran.code == 0 and ran.out == "A cat.\n" * 5  # no prompts, no notes: they go to standard error
    assert seen == [(0, 0), (1, 1), (2, 2), (0, 0), (1, 1)]  # pictures, places
    assert re.findall(r"took back: (.*)\)", ran.err) == [str(photo), "Or?", "Again?"]
    assert "error: nowhere.png" in ran.err and "error: /frobnicate: no such command" in ran.err and "/undo" in ran.err
    monkeypatch.undo()
    real = talk(trained, f"/image {photo}", "What is it?", "/exit", "And?")
    assert real.code == 0 and real.out.strip() == ask(trained[0], "What is it?", photo, new=4)


def test_a_question_without_a_picture_gets_one_line_where_the_model_answers_about_pictures_only(
        trained, tmp_path, own_data, monkeypatch):
    answered = []
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)  # where /draw saves
        patch.setattr(sample, "stream", lambda engine, tokenizer, request, *more: answered.append(
            len(request.images)) or "A cat.")
        ran = talk(trained, "What colour is the cat?", "/draw", "And now?", "/undo", "And now?")
    assert ran.code == 0 and ran.err.count("answers about pictures only: /image PATH") == 2 and answered == [1]
    # Trained on one's own pictures it is the same; with texts among them it has learned to answer without.
    texts = write(tmp_path / "texts.json", [llava(None, id=f"t{i}", question=f"{i}?") for i in range(12)])
    for spec, answers in ((own_data / "files.json", False), (f"{own_data / 'files.json'},{texts}", True)):
        out = f"--out_dir={tmp_path / str(answers)}"
        assert run("train_sft", *QUICK, out, f"--init={trained[0] / 'tiny/align'}", f"--data={spec}").code == 0
        for _ in range(2):  # and after reinforcement learning, whose questions all have pictures, it still has
            ran = run("sample", out, "--question=Why?", "--device=cpu", "--max_new_tokens=2")
            if answers:
                assert ran.code == 0, ran.err
                assert run("train_rl", *QUICK, out).code == 0
            else:
                one_line(ran, "no picture to ask about", "--image=")


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_a_text_is_continued_by_any_model_without_the_form_of_a_chat(trained, stage, monkeypatch):
    flags = [f"--init={trained[0] / 'tiny' / stage}", "--prompt=3 things in", "--device=cpu", "--max_new_tokens=6"]
    seen, real = [], Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, rows, starts, requests: seen.extend(
        requests) or real(self, rows, starts, requests))
    ran = run("sample", *flags)
    assert ran.code == 0 and ran.out.strip() and ran.out == run("sample", *flags).out
    one, two = (run("sample", *flags, "--temperature=9", f"--seed={seed}").out for seed in (0, 1))
    assert one != two
    t = Tokenizer.from_pretrained(trained[0] / "tiny" / stage)
    assert list(seen[0].prompt.ids) == t.encode("3 things in") and len(seen[0].answer) <= 6
    assert seen[0].temperature == 0.7 and not seen[0].images
    run("sample", *flags, "--temperature=0")
    assert seen[-1].temperature == 0
    one_line(run("sample", *flags, "--question=What?"), "--prompt", "--question")
    one_line(run("sample", *flags, "--chat"), "--chat and --prompt")


def test_an_empty_answer_is_said_to_be_empty(trained, photo, monkeypatch):
    monkeypatch.setattr(Text, "add", lambda self, ids, last=False: "")
    ran = run("sample", f"--out_dir={trained[0]}", f"--image={photo}", "--device=cpu", main=sample.main)
    assert ran.code == 0 and ran.out == "\n" and "the answer is empty" in ran.err
    assert talk(trained, f"/image {photo}", "What?").err.count("the answer is empty") == 1


def test_ctrl_c_ends_an_answer_and_not_the_chat(trained, photo, monkeypatch):
    monkeypatch.setattr(sample, "only_pictures", lambda vlm: False)  # as a model that has learned from texts, too
    whole, step = talk(trained, f"/image {photo}", "What is it?"), Engine.step
    stop_at = [3, 1]  # tokens of the first answer, and of the second

    def interrupted(engine):
        ended = step(engine)
        if stop_at and any(len(request.answer) == stop_at[0] for request in engine.running.values()):
            stop_at.pop(0)
            signal.raise_signal(signal.SIGINT)
        return ended
    monkeypatch.setattr(Engine, "step", interrupted)
    ran = talk(trained, f"/image {photo}", "What is it?", "/undo", f"/image {photo}", "Why?", "/undo",
               f"/image {photo}", "What is it?")  # /undo takes the picture back, too
    first, *_, last = ran.out.splitlines()
    assert ran.code == 0 and not stop_at and ran.err.count("took back") == 2
    assert last == whole.out.strip("\n") and last.startswith(first) and len(first) < len(last)


def test_chat_goes_on_from_its_cache_and_is_undone_drawn_and_saved(trained, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # ~ is there, as in a shell
    monkeypatch.setattr("extras.asking.secrets.randbits", lambda bits: 1)  # one scene: of some, this model says nothing
    read, prefill = [], Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, rows, starts, requests: read.append(
        (starts[0], len(requests[0].prompt.ids))) or prefill(self, rows, starts, requests))
    ran = talk(trained, "/image ~/photo.png", "What is it?", "Why?", "Who?", "/undo", "Who?", "/draw", "And this?",
               "/save ~/talk.json", "/undo", "/undo", "/undo", "/undo", "/undo", "/save", "/save empty.json")
    assert ran.code == 0 and "error: nothing to take back" in ran.err and "/save FILE: name the file" in ran.err
    assert "error: nothing to save yet" in ran.err and not (tmp_path / "empty.json").exists()
    for (start, _), (_, before) in list(zip(read[1:], read))[:2]:
        assert start == before  # only the last answer and the new question
    assert read[3][1] == read[2][1]
    assert [line for line in ran.out.splitlines()][2] == ran.out.splitlines()[3]
    (record, ) = read_records(str(tmp_path / "talk.json"))
    assert [len(record["messages"]), len(record["images"])] == [8, 2]
    assert (tmp_path / "talk-1.png").read_bytes() == photo.read_bytes()
    assert (tmp_path / "talk-2.png").read_bytes() == (tmp_path / "scene1.png").read_bytes()
    assert record["messages"][1]["content"] == ran.out.splitlines()[0]
    asked = [m["content"].split("\n")[-1] for m in record["messages"][::2]]
    assert asked == ["What is it?", "Why?", "Who?", "And this?"]


def test_chat_knows_a_path_as_people_paste_and_drag_it(trained, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(photo, tmp_path / "my photo.png")
    for line in (f"/image {tmp_path}/my photo.png", f"/image '{tmp_path}/my photo.png' ", "/image ~/my photo.png",
                 f"/image {tmp_path}/my\\ photo.png", f"{tmp_path}/my\\ photo.png", f"{tmp_path}/my photo.png",
                 f"'{tmp_path}/my photo.png'", "~/my photo.png"):
        ran = talk(trained, line)
        assert ran.code == 0 and "(picture loaded" in ran.err and "error" not in ran.err, line
    assert "(picture loaded" in talk(trained, f"\ufeff/image {photo}").err  # the first line of a file from Windows
    for line in ("/image", "/image ''", f"/image {tmp_path}", "/image none.png", f"{tmp_path}/none.png", "/",
                 "/image ~nobody"):
        ran = talk(trained, line)
        assert ran.code == 0 and ran.err.count("error: ") == 1 and "(picture loaded" not in ran.err, line
    assert "error" not in talk(trained, "'What'" + " is it?" * 99).err  # a question, and too long for a file's name


def test_chat_saves_over_no_other_file(trained, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "only_pictures", lambda vlm: False)  # as a model that has learned from texts, too
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo-1.png").write_bytes(b"another")
    pixels = photo.read_bytes()
    (tmp_path / "mine.json").write_text("[]")
    ran = talk(trained, "/image photo.png", "What?", "/save photo.json", "/save photo.png", "/save mine.json",
               "/save talk.json", "/save talk.json", "/reset", "What?", "/save talk.json")
    assert "error: mine.json would be lost" in ran.err and (tmp_path / "mine.json").read_text() == "[]"
    assert "error: photo-1.png is another picture" in ran.err and "error: photo.png would be lost" in ran.err
    assert ran.err.count("(wrote talk.json)") == 2 and "error: talk.json would be lost" in ran.err
    assert (tmp_path / "photo-1.png").read_bytes() == b"another" and not (tmp_path / "photo.json").exists()
    assert (tmp_path / "talk-1.png").read_bytes() == photo.read_bytes() == pixels


def test_a_folder_of_pictures_is_answered_and_gone_on_with(trained, photo, tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "answers.jsonl"
    folder.mkdir()
    shutil.copy(photo, folder / "a.png")
    (folder / "b.jpg").write_bytes(bytes_of("cut"))
    flags = [f"--out_dir={trained[0]}", f"--images={folder}", f"--out={out}", "--question=What?", "--max_new_tokens=6",
             "--device=cpu", "--batch_size=2"]

    def rows():
        return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    ran = run("sample", *flags)
    assert ran.code == 1 and not ran.out and "b.jpg" in ran.err and "error: 1 of 2 pictures" in ran.err
    assert {row["image"]: row.get("answer") for row in rows()} == {
        "a.png": ask(trained[0], "What?", photo, new=6), "b.jpg": None}
    shutil.copy(photo, folder / "b.jpg")
    ran = run("sample", *flags)
    assert ran.code == 0 and f"wrote {out}" in ran.err and [row["image"] for row in rows()[2:]] == ["b.jpg"]
    ran = run("sample", *flags)
    assert ran.code == 0 and len(rows()) == 3 and f"{out} answers all of them already" in ran.err
    # As an editor may leave the file: a line separator in an answer, no newline at the end.
    out.write_text(out.read_text().replace('"answer": "', '"answer": "\u2028').rstrip("\n"), encoding="utf-8")
    assert run("sample", *flags, "--question=Why?").code == 0 and len(rows()) == 5  # another question is other work



def test_a_wrong_path_is_named_before_a_model_is_loaded(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    none = tmp_path / "none"
    for flags in ([f"--images={none}"], [f"--images={tmp_path}", f"--out={none / 'a.jsonl'}"],
                  [f"--image={photo}", f"--attention={none / 'a.png'}"], [f"--image={none}"]):
        assert one_line(run("sample", *flags, main=sample.main), none)


def test_an_answer_file_cut_in_the_middle_of_a_line_is_named(trained, photo, tmp_path):
    (tmp_path / "pictures").mkdir()
    shutil.copy(photo, tmp_path / "pictures" / "a.png")
    out = tmp_path / "answers.jsonl"
    out.write_text('{"image": "a.png", "question": "Wh')
    ran = run("sample", f"--out_dir={trained[0]}", f"--images={tmp_path / 'pictures'}", f"--out={out}",
              "--max_new_tokens=4", "--device=cpu")
    one_line(ran, out)
    assert out.read_text() == '{"image": "a.png", "question": "Wh'


# ----------------------------------------------------------------------------------------------------------------------
# bench.py

def test_bench_asks_the_questions_of_the_chapters_whatever_its_seed():
    result = call(bench.main, "--what=eval", f"--init={TINY}", "--eval_size=20", "--device=cpu", "--seed=5")
    assert set(result["splits"]) == {"scenes", "pairs"} and result["n"] == 20
    assert [result[name] for name in ("accuracy", "blind_accuracy", "shuffled_accuracy")] == [
        sum(right_by_hand(20, image)) / 20 for image in ("own", "blind", "shuffled")]
    assert result["splits"]["pairs"]["by_kind"] == evaluate(
        *shipped(), [World("exam", "pairs", seed=1)[i] for i in range(20)], setup())["by_kind"]


def test_every_answer_of_a_file_is_asked_for_and_two_files_of_one_name_are_two_sets(tmp_path):
    rows = [{"id": str(i), "messages": conversation("a?", "b", "c?", "d")["messages"]} for i in range(3)]
    paths = [tmp_path / folder / "q.json" for folder in ("one", "two")]
    for path, some in zip(paths, (rows, rows[:1])):
        path.parent.mkdir()
        path.write_text(json.dumps(some))
    flags = ["--what=eval", f"--init={TINY}", f"--data={paths[0]},{paths[1]}", "--device=cpu"]
    assert [one["n"] for one in call(bench.main, *flags)["splits"].values()] == [6, 2]
    assert [one["n"] for one in call(bench.main, *flags, "--eval_size=4")["splits"].values()] == [4, 2]


def test_nothing_is_measured_of_a_model_that_was_never_trained(tmp_path):
    with pytest.raises(ValueError, match="no trained model"):
        call(bench.main, "--what=eval", f"--out_dir={tmp_path}", "--device=cpu")


def test_the_work_of_a_step_by_hand():
    # Matrices only. Decoder: qkv 64 x 32, out 32 x 32, gate and up 96 x 32, down 32 x 48, in 2 layers; head 320 x 32.
    decoder, head = 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48), 320 * 32
    vit = 32 * 108 + 2 * (96 * 32 + 32 * 32 + 48 * 32 + 32 * 48)
    bridge = 32 * 128 + (1 + 2 + 1 + 4 + 4) * 32 * 32 + 2 * 32 * 32  # where latents start from, a layer, the MLP
    vlm = tiny_vlm()
    # 100 tokens of which 10 are supervised, 3 pictures of 16 patches and 4 latents. 2 FLOP forward, 4 backward; 2 of
    # these 4 go through a frozen decoder to the bridge; a frozen ViT runs forward only.
    for trained, factors in ((["decoder", "bridge", "vit"], (6, 6, 6)), (["bridge", "vit"], (6, 6, 4)),
                             (["bridge"], (2, 6, 4))):
        assert step_flops(vlm, trained, 100, 10, 3) == {
            "vit": factors[0] * vit * 3 * 16, "bridge": factors[1] * bridge * 3 * 4,
            "decoder": factors[2] * (decoder * 100 + head * 10)}
    vlm.config.pretrained_vision = "siglip2"
    assert step_flops(vlm, ["bridge", "vit"], 100, 10, 3)["vit"] == 2 * vit * 3 * 16


def test_a_measured_step_counts_pictures_and_supervised_tokens_but_no_padding():
    flags = argparse.Namespace(model="tiny", batch_size=4, micro_batch_size=2, seq_len=128)
    step = bench.Step(flags, setup(), tiny_vlm(), None, "sft")
    docs = [step.make(None, int(name)) for batch in step.batches for name in batch["records"]]
    assert (len(step.batches), step.images) == (2, len(docs)) and step.tokens == sum(len(doc.ids) - 1 for doc in docs)
    assert step.supervised == sum(sum(doc.mask) for doc in docs) < step.tokens < 4 * 128


def test_made_up_conversations_have_a_picture_and_are_half_supervised():
    vlm = tiny_vlm()
    for i in range(20):
        doc = llava_like(vlm, "sft", 300)(None, i)
        words = len(doc.ids) - 4
        assert doc.slots == [0] and doc.ids[:4] == [0] * 4 and 32 <= words <= 296
        assert doc.mask == [0] * (4 + words // 2) + [1] * (words - words // 2)
    assert llava_like(vlm, "base", 300)(None, 1).mask == [1] * 301


def test_the_clock_tells_the_median_after_three_calls_that_warm_up():
    seconds = iter([0.0, 0.0, 0.0, 0.03, 0.4, 0.03])
    assert 0.028 < clock(lambda: time.sleep(next(seconds)), 3, torch.device("cpu")) < 0.3 and not list(seconds)


def test_bench_says_how_good_a_checkpoint_is(trained, own_data):
    out = trained[0]
    ran = run("bench", "--what=eval", f"--out_dir={out}", "--eval_size=10", "--device=cpu")
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    keys = {"n", "accuracy", "ci95", "blind_accuracy", "shuffled_accuracy", "by_kind"}
    assert ran.result.keys() >= keys and ran.result["n"] == 10 \
        and ran.result["ci95"] == list(wilson(10 * ran.result["accuracy"], 10))
    assert set(ran.result["splits"]) == {"scenes", "pairs"}
    ran = run("bench", "--what=eval", f"--init={out / 'tiny/sft'}", "--eval_size=100", "--device=cpu",
              f"--data={own_data}/table.tsv")
    assert ran.code == 0 and ran.result.keys() >= keys and ran.result["n"] == 24  # a file is evaluated as a whole


def test_bench_measures_the_loader_alone(tmp_path, own_data, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) * 3.0)
    for workers in (0, 2):
        ran = run("bench", "--what=data", f"--data={own_data / 'files.json'}", f"--workers={workers}", "--steps=2",
                  "--batch_size=4", main=bench.main)
        assert ran.code == 0 and ran.result["records_per_s"] > 0 and ran.result["workers"] == workers, ran.err
        assert 0 <= ran.result["padding"] < 0.2


def test_bench_says_how_fast_this_machine_is(trained, monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(bench, "clock", lambda work, *_: (work(), float(next(calls)))[1])  # 1 s, 2 s, ...
    ran = run("bench", "--what=speed", f"--out_dir={trained[0]}", "--batch_size=2", "--seq_len=128", "--steps=1",
              "--device=cpu", main=bench.main)
    assert ran.code == 0 and ran.result.keys() >= {"what", "device", "dtype"}, ran.err
    # A product of 1,024^3 in the first second; for each chapter loader and step; rollouts in 8 s, the update in 9.
    assert ran.result["matmul_gflops"] == 2 * 1024 ** 3 / 1e9 and ran.result["rl"]["rollout_share"] == 8 / 17
    stages = [ran.result[stage] for stage in ("base", "align", "sft")]
    assert [(one["loader_ms"], one["ms"]) for one in stages] == [(2000, 3000), (4000, 5000), (6000, 7000)]
    assert all(9 * one["images_per_s"] < one["tokens_per_s"] for one in stages) and stages[1]["images_per_s"] > 0
    # decoding: the first token of each answer after 10 and 12 s, all 129 after 11 and 13
    assert [(ran.result[name]["first_token_ms"], ran.result[name]["tokens_per_s"]) for name in (
        "decode_1", "decode_2")] == [(10_000, 128), (12_000, 256)]


# bench.py: the ladder and the profile

def test_the_ladder_computes_the_same_on_every_rung_and_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses, real = [], bench.clock
    monkeypatch.setattr(bench, "clock", lambda work, steps, device: losses.append(work()) or real(work, 1, device))
    ran = run("bench", "--what=ladder", "--device=cpu", "--batch_size=4", "--micro_batch_size=2", "--seq_len=64",
              main=bench.main)
    assert ran.code == 0 and [rung["tokens_per_s"] > 0 for rung in ran.result["rungs"]] == [True] * 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)  # slower code for the same loss
    assert Image.open(tmp_path / "ladder.png").size[0] == 800 and bench.model.token_loss is model.token_loss


def test_the_profile_is_written_and_names_what_takes_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("bench", "--what=profile", "--device=cpu", "--batch_size=4", "--micro_batch_size=2", "--seq_len=64")
    assert ran.code == 0 and any("mm" in name for name in ran.result["ms"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


if __name__ == "__main__":
    if "--mutants" in sys.argv:  # in a fresh process: it must not have imported the files that it makes worse
        flags = [flag for flag in sys.argv[1:] if flag != "--mutants"]
        os.execv(sys.executable, [sys.executable, str(HERE / "tests" / "mutants.py"), *flags])
    os.environ |= {"GHOSTVIS_LONG": "1"} if "--long" in sys.argv else {}
    sys.exit(pytest.main([str(HERE), *(flag for flag in sys.argv[1:] if flag != "--long")]))
