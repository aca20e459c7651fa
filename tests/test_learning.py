"""
What each chapter computes, with numbers worked out by hand: the second half of the lesson. In the order of the files.

    python -m pytest tests/test_learning.py         # 25 seconds on one core
"""
import argparse
import base64
import contextlib
import http.client
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor

import bench
import data
import train_align
import train_base
import train_rl
import train_sft
from bench import clock, llava_like, step_flops
from data import Document, Loader, collate, make_document, pack, pixel_loader, split_by_image
from extras.asking import Text, make_message, make_request, options, to_pixels
from extras.benchmarks import Answers, evaluate_file
from extras.export import export
from extras.load_test import quantiles
from extras.server import Server, read_picture
from model import VLM, cross_entropy, generation_config, load_checkpoint, preset, token_loss
from plumbing.checkpoints import save_checkpoint
from plumbing.engine import Engine, Request, respond
from plumbing.flags import parse_flags
from plumbing.optimizer import Optimizer
from plumbing.pictures import image_finder
from plumbing.recipes import fetch_file
from plumbing.records import Records, hash_keys
from plumbing.scoring import score
from plumbing.weights import read_safetensors
from plumbing.workers import threads
from plumbing.world import QUESTIONS, World
from sample import FLAGS as SAMPLE_FLAGS, Chat, answer_folder, check_ability, load
from tests.helpers import HERE, setup, tiny_vlm, tokenizer
from tests.plain_model import assert_same_gradients, plain_gradient, plain_loss, weights_of
from tokenizer import Rendered, Tokenizer, train_bpe
from train_align import write_captions
from train_base import (bits_per_byte, chapter_flags, count_supervised, freeze_all_but, held_out_loss, make_documents,
                        make_loaders, train_step)
from train_rl import gain, pack_all, reward, rollout, to_documents
from train_sft import answers, evaluate, evaluate_with_baselines, save_samples
from vision import Tiles, ViTConfig, preprocess, sincos_positions

TINY = HERE / "assets" / "tiny"  # a small trained model: 88 % of new questions right, 21 % blind

# ----------------------------------------------------------------------------------------------------------------------
# Helpers: a model of 50,000 weights, a trained one, pictures that are numbers, and records of both


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
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"id": "chat", "messages": messages, "images": [png(n) if isinstance(n, int) else n for n in images], **more}


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

# ----------------------------------------------------------------------------------------------------------------------
# vision.py and model.py: loss and gradients, against the plain formulas above

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
    p = (h @ vlm.gpt.embed.weight.T).softmax(-1)[0, :3, 99]
    assert torch.allclose(vlm.gpt.embed.weight.grad[99], p @ h[0, :3], rtol=1e-4, atol=1e-7) and p.min() > 0


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


def test_a_new_model_starts_with_these_values():
    # tiny: H = D = 128; 4 layers in the decoder, 3 in the ViT, so 8 and 6 branches are added up in their residual
    # streams. A matrix that reads n numbers starts at 1 / sqrt(n).
    torch.manual_seed(0)
    table = {"embed.weight": 3 / 128 ** 0.5, "attention.qkv.weight": 128 ** -0.5, "gate_up.weight": 128 ** -0.5,
             "attention.out.weight": (8 * 128) ** -0.5, "mlp.down.weight": (8 * 256) ** -0.5,
             "vit.patch.weight": (3 * 12 * 12) ** -0.5, "seed.weight": (4 * 128) ** -0.5, "latents": 1.0,
             **{f"blocks.{i}.{name}.weight": std for i in range(3) for name, std in (
                 ("qkv", 128 ** -0.5), ("out", (6 * 128) ** -0.5), ("fc1", 128 ** -0.5), ("fc2", (6 * 512) ** -0.5))},
             "layers.0.q.weight": 128 ** -0.5, "layers.0.kv.weight": 128 ** -0.5, "layers.0.fc1.weight": 128 ** -0.5,
             "layers.0.out.weight": 0, "layers.0.fc2.weight": 0,  # the resampler begins as what its latents start from
             "bridge.fc1.weight": 128 ** -0.5, "bridge.fc2.weight": 128 ** -0.5}
    for name, p in VLM(preset("tiny")).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        elif name != "vit.position":
            std, = {std for end, std in table.items() if name.endswith(end)}
            assert p.std().item() == pytest.approx(std, rel=0.06) and p.mean().abs() < 0.1 * std + 1e-9, name


def test_the_preset_tiny_has_the_readmes_numbers():
    vlm = VLM(preset("tiny"))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in vlm.parts().items()}
    assert millions == pytest.approx({"vit": 0.66, "bridge": 0.30, "decoder": 0.72}, abs=0.005)
    assert vlm.config.vision.num_patches == 36 and vlm.config.bridge.num_tokens == 9


def test_the_first_loss_of_a_new_model_is_near_15():
    # Logits of standard deviation 3 guess with confidence, and mostly wrong: not ln 1024 = 6.9.
    torch.manual_seed(0)
    vlm, words = VLM(preset("tiny")), shipped()[1]
    doc = make_document(World("text", seed=1)[0], 0, words, 9, 256, supervise_all=True)
    with torch.no_grad():
        loss = vlm(rows_of(vlm, [doc], 1, 256)).item() / (len(doc.ids) - 1)
    assert 13 < loss < 17


def test_positions_of_patches_start_as_sines_of_column_and_row_with_base_100():
    # D = 128 channels: 32 wavelengths, 1 to 1/100 radian a patch; number 16 has 100^(-16/32) = 1/10. A side has 6.
    at = sincos_positions(6, 128)
    assert at.shape == (36, 128) and at[0].tolist() == [0] * 32 + [1] * 32 + [0] * 32 + [1] * 32
    right, below = at[1], at[6]
    assert [right[i].item() for i in (0, 16, 32, 48)] == pytest.approx(
        [math.sin(1), math.sin(0.1), math.cos(1), math.cos(0.1)])
    assert torch.equal(right[64:], at[0][64:]) and torch.equal(below[:64], at[0][:64])  # the same row, the same column
    assert torch.allclose(below[64:], right[:64])


def test_small_features_are_normalised_with_the_eps_they_were_trained_with():
    # 0.001 and -0.001 have the variance 1e-6; with eps 1e-6 they become 0.001 / sqrt(2e-6) = 0.7071, with 1e-5 0.30.
    vlm, x = VLM(preset("tiny")), torch.tensor([1e-3, -1e-3] * 64)
    for layer in (vlm.vit.norm, *(b.norm1 for b in vlm.vit.blocks), *(b.norm2 for b in vlm.vit.blocks), vlm.gpt.norm,
                  vlm.gpt.blocks[0].norm1, vlm.gpt.blocks[0].norm2):
        assert layer(x)[:2].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)


def test_a_frozen_vit_is_computed_without_a_graph():
    vlm, recording = tiny_vlm(), []
    vlm.vit.blocks[0].register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    batch = rows_of(vlm, rendered(vlm))
    for trained in (["bridge", "decoder", "vit"], ["bridge", "decoder"]):
        freeze_all_but(vlm, trained)
        vlm(batch).backward()
    assert recording == [True, False] and vlm.bridge.fc1.weight.grad.any()


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


def test_a_conversation_longer_than_the_model_was_trained_on_is_refused():
    vlm = tiny_vlm()
    vlm.config.decoder.max_position_embeddings = 20
    engine = Engine(vlm, rows=1, width=256)
    engine.submit(Request(Rendered([1] * 20, [], []), max_new_tokens=3))  # to the last position
    with pytest.raises(ValueError, match="21 tokens.*20"):
        engine.submit(Request(Rendered([1] * 21, [], []), max_new_tokens=3))


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
    assert 8 < first < 25 and len(norms) == 3 and all((p != 1).any() for p in norms.values())
    assert all(part.grad.any() for part in (vlm.vit.patch.weight, vlm.bridge.fc1.weight, vlm.gpt.embed.weight))


# ----------------------------------------------------------------------------------------------------------------------
# data.py

def records_of(rows: list[dict]) -> Records:
    keys = [hash_keys(row) for row in rows]
    return Records(rows.__getitem__, np.arange(len(rows))[:, None], np.array(sum(keys, []), np.uint64),
                   np.array([len(one) for one in keys]))


def test_a_record_that_shares_a_held_out_records_second_picture_does_not_train():
    # Pictures in the order of their hashes, in which they are chosen. 1 of 10 is held out: the first.
    a, b, c, *rest = sorted((b"picture %d" % i for i in range(10)), key=lambda source: hash_keys({"images": [source]}))
    shows = {"held": [a, b], "neither": [b, c], "trains": [c], **{f"rest {i}": [one] for i, one in enumerate(rest)}}
    train, held = split_by_image(records_of([{"id": name, "images": some} for name, some in shows.items()]), 0.1)
    assert [one["id"] for one in held] == ["held"]
    assert [one["id"] for one in train] == ["trains", *(f"rest {i}" for i in range(7))]


def test_a_link_leads_neither_out_of_the_folder_nor_into_one_whose_name_begins_alike(tmp_path):
    for folder in ("data", "data-private"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(1))
    (tmp_path / "data" / "inside.png").symlink_to(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "secret.png").symlink_to(tmp_path / "data-private" / "a.png")
    find = image_finder(str(tmp_path / "data"))
    assert find("a.png") and find("inside.png")
    with pytest.raises(ValueError, match="secret.png.*leads out"):
        find("secret.png")


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


def test_each_answer_of_a_held_out_conversation_is_asked_for(tmp_path):
    rows = [{"id": str(i), "messages": conversation("a?", "b", "c?", "d")["messages"]} for i in range(10)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    _, held_out = data.load_data(str(tmp_path / "d.json"), None, {}, 0, 4)  # two conversations of ten
    asked_for = held_out["held_out"]
    assert [len(one["messages"]) for one in asked_for] == [2, 4, 2, 4] and len({one["id"] for one in asked_for}) == 4


def test_a_picture_that_ends_one_token_behind_the_row_is_left_out():
    # <|im_start|>user\n a? <|im_end|>\n <|im_start|>assistant\n b <picture>: something is learned before the picture.
    record = conversation("a?", "b<image>c", images=[1])
    whole = make_document(record, 0, tokenizer(), 4, 500)
    end = whole.slots[0] + 4  # one behind its last place
    fits = make_document(record, 0, tokenizer(), 4, end)
    assert make_document(record, 0, tokenizer(), 4, end - 1) is None
    arrays, _, _ = pack([fits], 1, end, 4)
    assert arrays["image_positions"].tolist() == [end - 4, end - 3, end - 2, end - 1]


def test_a_picture_of_a_record_is_resized_as_the_model_was_trained(tmp_path):
    wide = Image.open(io.BytesIO(png(1, 60))).crop((0, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    square = Image.new("RGB", (60, 60), (127, 127, 127))
    square.paste(wide, (0, 15))  # grey bars above and below
    for bicubic in (True, False):
        load = pixel_loader(ViTConfig(image_size=24, bicubic=bicubic, pad=True))
        assert torch.equal(load(str(tmp_path / "wide.png"), {"id": 1}), preprocess(square, 24, bicubic))


def test_pictures_of_two_folders_with_one_name_are_two_pictures():
    def key(source: str) -> list[int]:
        return hash_keys({"images": [source]})
    assert key("/home/ann/train2017/7.jpg") == key("/data/train2017/7.jpg") != key("/data/vg/7.jpg")


def test_held_out_scenes_are_other_scenes():
    scenes = {split: {World("captions", split)[i]["images"][0] for i in range(200)} for split in ("train", "scenes")}
    assert not scenes["train"] & scenes["scenes"] and len(scenes["train"]) > 190


def test_the_curriculum_goes_by_record_number_from_captions_to_questions(monkeypatch):
    # Of captions: 0.9 at the start, 0.9 - 6000 / 15000 = 0.5 half-way, 0.1 from record 12,000 on.
    world, _ = data_of(train_sft.main, monkeypatch)
    for share in (world.caption_share, World("chat").caption_share):
        assert [share(i) for i in (0, 6000, 12_000, 10 ** 6)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    questions = [sum(len(world[first + i]["messages"]) == 4 for i in range(200)) for first in (0, 6000, 12_000)]
    assert questions[0] < 40 and 60 < questions[1] < 120 and 140 < questions[2]  # two questions make four messages


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


# ----------------------------------------------------------------------------------------------------------------------
# train_base.py: the step, bits per byte

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
    flags, vlm = argparse.Namespace(batch_size=8, micro_batch_size=2, seq_len=128, steps=1), tiny_vlm()
    for rank in (0, 1):
        here = setup()
        here.rank, here.world_size = rank, 2
        loaders = make_loaders(flags, here, vlm, tokenizer(), World("text"), {}, supervise_all=True)
        assert [(loader.next, loader.stride, loader.rows) for loader in loaders] == [(rank, 4, 2), (rank + 2, 4, 2)]


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


def test_in_samples_a_right_answer_is_green_and_a_wrong_one_red(tmp_path):
    record = questions(20)[right_by_hand(20, "own").index(True)]
    wrong = record | {"messages": [record["messages"][0], {"role": "assistant", "content": "elephant"}]}
    for one, colours in ((record, {"green"}), (wrong, {"firebrick"})):
        save_samples(tmp_path / "samples.png", *shipped(), {"scenes": [one]})
        words = Image.open(tmp_path / "samples.png").crop((0, 240, 240, 999))  # below the picture
        drawn = {colour for _, colour in words.getcolors(10 ** 6)}
        assert {name for name in ("green", "firebrick") if ImageColor.getrgb(name) in drawn} == colours


def test_parts_of_a_point_count_as_parts():
    # By DocVQA's rule a letter too few of n costs 1/n: the model says "orange", and right is "orangeX".
    which = [i for i, right in enumerate(right_by_hand(20, "own")) if right][:4]
    said = [questions(20)[i]["messages"][1]["content"] for i in which]
    records = [questions(20)[i] | {"metric": "anls", "answer": text + "X"} for i, text in zip(which, said)]
    scores = [(n / (n + 1) if n else 0) * (n / (n + 1) >= 0.5) for n in map(len, said)]
    result = evaluate(*shipped(), records, setup())
    assert result["right"] == pytest.approx(scores) and result["accuracy"] == pytest.approx(sum(scores) / 4)


def test_bench_puts_a_benchmark_beside_the_same_baselines():
    ask = Answers("", setup(), *shipped(), "tiny")
    result = evaluate_file("mine", questions(20), ask)
    assert [result[name] for name in ("accuracy", "blind_accuracy", "shuffled_accuracy")] == [
        sum(right_by_hand(20, image)) / 20 for image in ("own", "blind", "shuffled")]
    assert result["score"] == 100 * result["accuracy"] and result["blind_score"] == 100 * result["blind_accuracy"]


def test_bench_asks_the_questions_of_the_chapters_whatever_its_seed():
    result = call(bench.main, "--what=eval", f"--init={TINY}", "--eval_size=20", "--device=cpu", "--seed=5")
    assert set(result["splits"]) == {"scenes", "pairs"} and result["n"] == 20
    assert [result[name] for name in ("accuracy", "blind_accuracy", "shuffled_accuracy")] == [
        sum(right_by_hand(20, image)) / 20 for image in ("own", "blind", "shuffled")]
    assert result["splits"]["pairs"]["by_kind"] == evaluate(
        *shipped(), [World("exam", "pairs", seed=1)[i] for i in range(20)], setup())["by_kind"]


def test_a_word_that_is_less_than_half_right_earns_nothing():
    # DocVQA: 2 of 3 letters of "cat" must be changed to get "man": 1/3 is below a half. 1 of 2 is not.
    assert [score("anls", text, "man") for text in ("cat", "an", "men")] == pytest.approx([0, 2 / 3, 2 / 3])
    assert score("anls", "ab", "ax") == 0.5


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
    flags = argparse.Namespace(seed=3, samples=4, max_new_tokens=5, temperature=1.0)
    prompts, groups = rollout(vlm, tokenizer(), records, flags, 7)
    assert [len(group) for group in groups] == [4, 4] and len({tuple(ids) for group in groups for ids in group}) > 5
    for record, prompt, group in zip(records, prompts, groups):
        assert prompt == asked(vlm, record)
        load = pixel_loader(vlm.config.vision)
        for k, ids in enumerate(group):  # alone, from the seed of step, question and number
            one = Request(prompt, [load(source, record) for source in record["images"]], max_new_tokens=5,
                          stop=set(tokenizer().stop_ids), temperature=1.0,
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


def test_a_quarter_of_the_questions_is_of_all_kinds(monkeypatch):
    world, _ = data_of(train_rl.main, monkeypatch, f"--init={TINY}")
    kinds = Counter(world[i]["kind"] for i in range(len(world.kinds)))
    # Of 40, each of the ten kinds once, and the two that are trained on 15 times more.
    assert kinds == {kind: 16 if kind in ("number", "relation") else 1 for kind in QUESTIONS}


def test_no_question_comes_twice(monkeypatch, tmp_path):
    asked_for = []
    monkeypatch.setattr(train_rl, "rollout", lambda vlm, words, records, *_: (asked_for.extend(records), ([], []))[1])
    call(train_rl.main, f"--init={TINY}", f"--out_dir={tmp_path}", "--steps=3", "--batch_size=4", "--eval_size=2",
         "--device=cpu")
    assert [record["id"] for record in asked_for] == [f"world/train/0/{i}" for i in range(12)]


# ----------------------------------------------------------------------------------------------------------------------
# plumbing/optimizer.py: one step by hand

def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    "What orthogonalize does, by a singular value decomposition: each value v, of length 1 in all, -> p(v), five times."
    u, v, wt = torch.linalg.svd(g.double(), full_matrices=False)
    v = v / v.norm()
    for _ in range(5):
        v = 3.4445 * v - 4.7750 * v ** 3 + 2.0315 * v ** 5
    return u @ torch.diag(v) @ wt


def test_two_muon_steps_on_a_2x3_matrix():
    start = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    one, two = torch.tensor([[1.0, 0, 2], [0, 3, 1]]), torch.tensor([[-2.0, 1, 0], [1, 1, 1]])
    p, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Optimizer({"mlp.weight": p, "out.weight": other}, "muon", 0.1)
    p.grad, other.grad = one.clone(), two.clone()  # matrices of one shape are computed together
    optimizer.step(0.5)
    # Momentum 0.8: the mean is 0.2 one, and Nesterov's look ahead 0.2 one + 0.8 * 0.2 one, which has one's direction.
    # The learning rate is 0.1 * 0.5; the entries of the update are 0.2 in root mean square: times 0.2 sqrt(3).
    expected = start - 0.05 * 0.2 * 3 ** 0.5 * newton_schulz(one)
    assert torch.allclose(p, expected.float(), atol=1e-5)
    assert torch.allclose(other, (-0.05 * 0.2 * 3 ** 0.5 * newton_schulz(two)).float(), atol=1e-5)
    p.grad = two.clone()
    optimizer.step(1.0)
    mean = 0.8 * 0.2 * one + 0.2 * two
    expected = expected - 0.1 * 0.2 * 3 ** 0.5 * newton_schulz(0.2 * two + 0.8 * mean)
    assert torch.allclose(p, expected.float(), atol=1e-5)


def test_two_adamw_steps_by_the_formula():
    # betas 0.9 and 0.95, eps 1e-8, no weight decay. After one step m / (1 - 0.9) = g and v / (1 - 0.95) = g^2: every
    # entry moves by the learning rate. What has no gradient stays, however large it is.
    start, one, two = torch.tensor([1.0, -2, 300]), torch.tensor([0.1, -5, 0]), torch.tensor([0.3, 1, 0])
    p = torch.nn.Parameter(start.clone())
    optimizer = Optimizer({"norm.weight": p}, "muon", 0.01)
    p.grad = one.clone()
    optimizer.step(1.0)
    assert p.tolist() == pytest.approx([0.99, -1.99, 300])
    p.grad = two.clone()
    optimizer.step(0.5)
    m, v = (0.9 * 0.1 * one + 0.1 * two) / (1 - 0.9 ** 2), (0.95 * 0.05 * one ** 2 + 0.05 * two ** 2) / (1 - 0.95 ** 2)
    expected = torch.tensor([0.99, -1.99, 300]) - 0.005 * m / (v.sqrt() + 1e-8)
    assert torch.allclose(p, expected, rtol=1e-6)


def test_muon_is_for_matrices_and_adamw_for_tables_and_vectors():
    vlm = VLM(preset("tiny"))
    optimizer = Optimizer(dict(vlm.named_parameters()), "muon", 0.1)
    adamw = {name for name, keys in optimizer.keys.items() if keys == ("step", "exp_avg", "exp_avg_sq")}
    tables = {"gpt.embed.weight", "vit.position", "bridge.perceiver.latents"}
    assert adamw == tables | {name for name, p in vlm.named_parameters() if p.ndim < 2}
    assert all(keys == ("muon",) for name, keys in optimizer.keys.items() if name not in adamw)


def test_auto_is_muon_from_random_weights_and_adamw_for_released_ones():
    chosen = {model: chapter_flags("", "sft", train_sft.FLAGS, train_sft.BY_MODEL, [f"--model={model}"]).optimizer
              for model in ("tiny", "small", "qwen2.5-0.5b", "llava-ov-0.5b", "Org/Name")}
    assert chosen == {"tiny": "muon", "small": "muon"} | dict.fromkeys(list(chosen)[2:], "adamw")


@pytest.mark.parametrize("name, shape", [("mlp.weight", (4, 4)), ("norm.weight", (4,))], ids=["muon", "adamw"])
def test_bfloat16_weights_follow_their_float32_masters_through_steps_too_small_for_them(name, shape):
    # Near 1, bfloat16 has 1, 0.996, 0.992, ...: a step of at most 0.0005 would be rounded away, a hundred are not.
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = Optimizer({name: p}, "muon", 5e-4)
    p.data = p.data.bfloat16()  # as vlm.to(torch.bfloat16) does, after the optimizer has taken the float32 weights
    for _ in range(100):
        p.grad = torch.eye(4).bfloat16() if p.ndim == 2 else torch.ones(4).bfloat16()
        optimizer.step(1.0)
        master = optimizer.master_weights[name]
        assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
    moved = 1 - p.float().diagonal() if p.ndim == 2 else 1 - p.float()
    assert (moved > 0.01).all()


# ----------------------------------------------------------------------------------------------------------------------
# The chapters as they are run: what they report is what their checkpoint gives, on one rank or two

RUNS = {"base": [train_base.main, "--seq_len=128", "--eval_size=4", "--batch_size=4"],
        "align": [train_align.main, "--seq_len=128", "--eval_size=4", "--batch_size=4"],
        "sft": [train_sft.main, "--eval_size=6", "--batch_size=4"],
        "rl": [train_rl.main, "--eval_size=6", "--batch_size=32", "--samples=4"]}


def run_chapter(stage: str, out: Path) -> dict:
    "One step from the small trained model, with another seed than 0."
    main, *more = RUNS[stage]
    return call(main, f"--init={TINY}", f"--out_dir={out}", "--steps=1", "--micro_batch_size=2", "--seed=10",
                "--device=cpu", *more)


class Runs(dict):
    "{stage: its result}, each run when it is first asked for."

    def __init__(self, out: Path):
        self.out = out

    def __missing__(self, stage: str) -> dict:
        self[stage] = run_chapter(stage, self.out)
        return self[stage]


@pytest.fixture(scope="module")
def chapters(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("chapters"))


def left_by(chapters: Runs, stage: str) -> tuple[VLM, Tokenizer, dict]:
    result, folder = chapters[stage], chapters.out / "tiny" / stage
    return load_checkpoint(folder), Tokenizer.from_pretrained(folder), result


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
        assert {name: result["held_out"][split][name] for name in expected if name != "ci95"} == {
            name: value for name, value in expected.items() if name != "ci95"}
        if split == "scenes":
            assert (result["accuracy"], result["blind_accuracy"]) == (expected["accuracy"], expected["blind_accuracy"])
            docs = [make_document(one, 0, words, 9, 72) for one in records]
            for name, image in (("loss", "own"), ("blind_loss", "blind"), ("shuffled_loss", "shuffled")):
                nats, tokens = held_out_loss(vlm, docs, setup(), 72, image)
                assert result["held_out"][split][name] == pytest.approx(nats / tokens, rel=1e-5)


def test_chapter_4_reports_what_its_model_gained_on_all_questions_and_on_its_kinds(chapters):
    vlm, words, result = left_by(chapters, "rl")
    pairs, asked_of = [], ("number", "relation")
    for split in ("scenes", "pairs"):
        records = [World("exam", split, seed=1)[i] for i in range(6)]
        before, after = (evaluate(*of, records, setup())["right"] for of in (shipped(), (vlm, words)))
        told = result["held_out"][split]
        assert (told["before"], told["accuracy"]) == (sum(before) / 6, sum(after) / 6)
        pairs += [(a, b) for a, b, record in zip(before, after, records) if record["kind"] in asked_of]
        if split == "scenes":
            assert (result["before"], result["accuracy"]) == (told["before"], told["accuracy"])
    expected = gain(*zip(*pairs))
    assert [result["trained_on"][name] for name in ("n", "before", "gain")] == [
        expected[name] for name in ("n", "before", "gain")]


PARTS = {"base": {"gpt"}, "align": {"vit", "bridge"}, "sft": {"vit", "bridge", "gpt"}, "rl": {"vit", "bridge", "gpt"}}


@pytest.mark.parametrize("stage", RUNS)
def test_a_chapter_changes_the_parts_it_trains_and_keeps_moments_of_no_other(chapters, stage):
    start = dict(shipped()[0].named_parameters())
    moved = {name.split(".")[0] for name, p in left_by(chapters, stage)[0].named_parameters()
             if not torch.equal(p, start[name])}
    moments = read_safetensors(chapters.out / "tiny" / stage / "optimizer.safetensors")
    assert moved == {name.split(".")[0] for name in moments} == PARTS[stage]


def log_of(chapters, stage: str) -> dict:
    "What the log says of the first step."
    assert chapters[stage]["step"] == 1
    rows = map(json.loads, (chapters.out / "tiny" / stage / "log.jsonl").read_text().splitlines())
    return next(row for row in rows if "lr" in row)


@pytest.mark.parametrize("stage, task, seq_len",
                         [("base", "text", 128), ("align", "captions", 128), ("sft", "chat", 72)])
def test_the_first_step_has_the_mean_loss_of_the_first_rows(chapters, stage, task, seq_len):
    # 4 rows in two passes: one takes the world's records 0, 2, 4, ... and the other 1, 3, 5, ...
    (vlm, words), nats, tokens = shipped(), 0.0, 0
    make = partial(make_document, tokenizer=words, image_tokens=9, seq_len=seq_len, supervise_all=stage == "base")
    for i in (0, 1):
        loader = Loader(World(task, seed=10), make, pixel_loader(vlm.config.vision), 2, seq_len, 9, i, 2)
        batch = next(loader)
        nats, tokens = nats + vlm(batch).item(), tokens + int((batch["targets"] >= 0).sum())
    assert log_of(chapters, stage)["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_a_step_from_few_groups_that_teach_is_a_small_one(chapters):
    # A sixteenth of the questions got right and wrong answers. From an eighth on steps are whole: this one is half.
    told = log_of(chapters, "rl")
    assert told["teaching"] == 2 / 32 and told["lr"] == 0.0005 / 2 and 0.5 < told["reward"] < 1


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    "What each of two processes does: it meets the other, then runs three chapters with it."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    threads.cache_clear()  # a fork has no copy of the threads that prepare batches
    here = setup()
    results = {"gathered": here.gather([10 * n for n in range(7)[rank::2]]), "none": here.gather([]),
               "sum": here.all_reduce(rank + 1.5),
               "blind": evaluate(*shipped(), questions(20), here, blind=True)["right"]}
    results |= {stage: run_chapter(stage, folder) for stage in ("base", "align", "rl")}
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    "-> (folder, what rank 0 got, what rank 1 got)."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, as the loader's workers are: another two imports of PyTorch would take longer than the test.
    ranks = [multiprocessing.get_context("fork").Process(target=rank_of_two, args=(rank, port, folder))
             for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))


def test_answers_of_two_ranks_are_gathered_in_the_order_of_the_questions(two_ranks):
    for rank in two_ranks[1:]:  # rank 0 had questions 0, 2, 4 and 6
        assert rank["gathered"] == [0, 10, 20, 30, 40, 50, 60] and rank["none"] == [] and rank["sum"] == 1.5 + 2.5
        assert rank["blind"] == right_by_hand(20, "blind")  # each answer is scored with its own question


@pytest.mark.parametrize("stage", ["base", "align", "rl"])
def test_two_ranks_learn_what_one_learns_from_two_micro_batches(chapters, two_ranks, stage):
    folder, first, second = two_ranks
    (one, _, result), two = left_by(chapters, stage), load_checkpoint(folder / "tiny" / stage)
    for name, p in one.named_parameters():
        if not name.endswith("qkv.bias"):  # a key's: its true gradient is 0, and AdamW makes full steps of its noise
            assert torch.allclose(p, two.get_parameter(name), rtol=0, atol=2e-4), name
    # Muon and AdamW forget how large a gradient was; their moments do not. Each rank had a share, and all are saved.
    ours, theirs = (read_safetensors(of / "tiny" / stage / "optimizer.safetensors") for of in (chapters.out, folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6), name
    for name in {"base": ["bits_per_byte"], "align": ["caption_loss", "blind_loss"], "rl": ["before"]}[stage]:
        assert first[stage][name] == pytest.approx(result[name], rel=1e-3)
    assert second[stage] == {}  # one line of JSON, from the main process


# ----------------------------------------------------------------------------------------------------------------------
# sample.py

def sample_flags(*flags) -> argparse.Namespace:
    return parse_flags("", SAMPLE_FLAGS, argv=["--device=cpu", *map(str, flags)])


def test_what_is_given_counts_before_the_publishers_options():
    vlm = tiny_vlm()
    vlm.config.generation, vlm.config.decoder.max_position_embeddings = {"temperature": 0.7, "top_k": 20}, 100
    assert options(vlm, sample_flags()) == {"max_new_tokens": 100, "temperature": 0.7, "top_k": 20}  # not 256
    assert options(vlm, sample_flags("--temperature=0", "--max_new_tokens=9", "--top_p=0.5")) == {
        "max_new_tokens": 9, "temperature": 0, "top_k": 20, "top_p": 0.5}


@pytest.mark.parametrize("images, written", [(0, "What?"), (1, "<image>\nWhat?"), (2, "<image><image>\nWhat?")])
def test_a_question_is_written_as_in_training(images, written):
    asked = [make_message("What?", images)]
    assert tokenizer().render(asked, 4) == tokenizer().render([{"role": "user", "content": written}], 4)


def test_a_picture_is_resized_as_the_model_was_trained(tmp_path):
    picture = Image.open(io.BytesIO(png(1, 60))).crop((0, 0, 60, 30))
    vlm = tiny_vlm("mlp")
    vlm.config.vision.bicubic = vlm.config.vision.pad = True
    padded = Image.new("RGB", (60, 60), (127, 127, 127))
    padded.paste(picture, (0, 15))
    assert torch.equal(to_pixels(vlm, picture, sample_flags()), preprocess(padded, 24, bicubic=True))
    vlm.config.bridge.newline = True  # it can do tiles: of a single picture, where they are wanted
    for flag, alone in (("True", True), ("True", False), ("False", True), ("auto", True)):
        pixels = to_pixels(vlm, picture, sample_flags(f"--anyres={flag}"), alone)
        assert isinstance(pixels, Tiles) == (flag == "True" and alone)


def test_a_long_conversation_leaves_room_for_an_answer():
    vlm, talk = tiny_vlm(), [make_message("what is this? " * 3)]
    n = len(tokenizer().render(talk, add_generation_prompt=True).ids)
    for width, left in ((0, 50), (n + 60, 50), (n + 7, 7), (n, 1)):
        request = make_request(vlm, tokenizer(), talk, [], sample_flags("--max_new_tokens=50"), width)
        assert request.max_new_tokens == left


def test_text_is_shown_when_it_is_certain():
    smile = tokenizer().encode("\U0001f642")  # four bytes, a token each
    text = Text(tokenizer())
    assert [text.add([i]) for i in smile] == ["", "", "", "\U0001f642"] and text.tokens == 4
    text = Text(tokenizer(), ["END", "."])
    shown = [text.add(tokenizer().encode(piece)) for piece in ("a EN", "d", " E", "N", "D b")]
    assert shown == ["a ", "ENd", " ", "", ""] and text.ended  # "EN" could have been the beginning of END
    text = Text(tokenizer(), ["."])
    assert text.add(tokenizer().encode(". a")) == "" and text.ended


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
# bench.py

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


def test_made_up_conversations_have_a_picture_and_are_half_supervised():
    vlm = tiny_vlm()
    for i in range(20):
        doc = llava_like(vlm, "sft", 300)(None, i)
        words = len(doc.ids) - 4
        assert doc.slots == [0] and doc.ids[:4] == [0] * 4 and 32 <= words <= 296
        assert doc.mask == [0] * (4 + words // 2) + [1] * (words - words // 2)
    assert llava_like(vlm, "base", 300)(None, 1).mask == [1] * 301


def test_the_clock_tells_the_median_after_three_calls_that_warm_up():
    seconds = iter([0.0, 0.0, 0.0, 0.02, 0.06, 0.02])
    assert 0.018 < clock(lambda: time.sleep(next(seconds)), 3, torch.device("cpu")) < 0.05 and not list(seconds)


def test_quantiles_are_the_half_and_the_twentieth_of_the_slowest():
    assert quantiles([i / 1000 for i in range(100, 0, -1)]) == pytest.approx([51, 96])  # milliseconds


def test_answers_that_were_kept_are_not_asked_again(tmp_path):
    (vlm, words), path = shipped(), str(tmp_path / "a.jsonl")
    told = [Answers(path, setup(), vlm, words, "tiny")("mine", questions(6), image) for image in ("own", "blind")]
    cannot_answer = argparse.Namespace(config=vlm.config)
    again = Answers(path, setup(), cannot_answer, words, "tiny")
    assert [again("mine", questions(6), image) for image in ("own", "blind")] == told and told[0] != told[1]
    for other in (again, Answers(path, setup(), cannot_answer, words, "another")):  # or another set, or another model
        with pytest.raises(AttributeError):
            other("yours" if other is again else "mine", questions(6), "own")


# ----------------------------------------------------------------------------------------------------------------------
# extras/server.py: each limit by itself

@contextlib.contextmanager
def serving(*flags):
    "A server of the tiny model, over real sockets, until the block ends."
    with contextlib.redirect_stderr(io.StringIO()):
        server = Server(tiny_vlm().eval(), tokenizer(), parse_flags("", SAMPLE_FLAGS, argv=["--port=0", *flags]))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()


def ask_server(server, path: str, body: dict | None = None, **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body),
                       {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content)


def test_only_who_has_the_key_is_told_where_the_model_looked():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(1)).decode()}}
    body = {"messages": [{"role": "user", "content": [picture]}, {"role": "assistant", "content": "a cat"}]}
    with serving("--api_key=sesame") as server:
        assert ask_server(server, "/look", body)[0] == 401
        status, told = ask_server(server, "/look", body, Authorization="Bearer sesame")
        assert status == 200 and [word["text"] for word in told["words"]] == ["a", " cat"]


def test_a_page_of_another_site_is_not_answered():
    with serving() as server:
        here = f"http://127.0.0.1:{server.server_port}"
        for headers, status in (({}, 200), ({"Origin": here}, 200), ({"Origin": "http://evil.example"}, 403),
                                ({"Host": "evil.example"}, 403)):
            assert ask_server(server, "/v1/models", **headers)[0] == status


def test_the_257th_connection_is_closed_and_the_others_are_not():
    with serving() as server, contextlib.ExitStack() as stack:
        began = time.monotonic()
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=5))
                for _ in range(256)]
        while len(server.connections) < 256 and time.monotonic() < began + 5:
            time.sleep(0.01)
        late = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=5))
        assert late.recv(1) == b"" and time.monotonic() < began + 15  # long before anyone has been idle for too long
        for one in (held[0], held[-1]):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(15) == b"HTTP/1.1 200 OK"


def test_a_picture_of_more_than_20_million_pixels_is_refused_though_it_could_be_decoded():
    def url(width: int, height: int) -> str:
        Image.new("1", (width, height)).save(file := io.BytesIO(), "PNG")  # a bit a pixel: a few KB
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert read_picture(url(5000, 4000)).size == (5000, 4000)
    with pytest.raises(ValueError, match="5000 x 4001 pixels is over the limit of 20,000,000"):
        read_picture(url(5000, 4001))


def test_more_than_400_000_letters_are_refused_before_they_are_cut_into_tokens():
    def told(letters: int) -> str:
        messages = [{"role": "user", "content": ("one two " * 25_001)[:letters - 200_000]},
                    {"role": "assistant", "content": "one two " * 25_000}, {"role": "user", "content": ""}]
        status, answer = ask_server(server, "/v1/chat/completions", {"messages": messages})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        return answer["error"]["message"]
    with serving() as server:
        assert "letters" not in told(400_000) and "more than 400,000 letters" in told(400_001)


# ----------------------------------------------------------------------------------------------------------------------
# extras/export.py, plumbing/weights.py, hub.py, checkpoints.py: files

@pytest.mark.parametrize("generation, sampled", [({}, False), ({"temperature": 0.7, "top_p": 0.8}, True)])
def test_an_exported_model_says_how_it_samples_and_when_it_stops(tmp_path, generation, sampled):
    vlm, words = tiny_vlm(), tokenizer()
    vlm.config.generation = generation
    export(tmp_path / "hf", vlm, words, decoder_only=True)
    told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert told == {"eos_token_id": [words.im_end, words.endoftext], "pad_token_id": words.endoftext,
                    "do_sample": sampled, **generation}
    assert generation_config(tmp_path / "hf") == generation


def test_leftovers_of_a_greedy_models_temperature_are_not_used(tmp_path):
    # do_sample is what counts; of the rest only the penalty works without it.
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": False}))
    assert generation_config(tmp_path) == {"repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": True, "eos_token_id": 7}))
    assert generation_config(tmp_path) == given


def test_a_model_with_nan_replaces_no_checkpoint(tmp_path):
    vlm, folder = tiny_vlm(), tmp_path / "sft"
    save_checkpoint(folder, vlm, tokenizer())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    vlm.gpt.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not saved.*gpt.norm.weight"):
        save_checkpoint(folder, vlm, tokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture()
def disk(monkeypatch):
    "-> a list to which each fsync adds the file's name, and each rename the new name after ->."
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    for name, real in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, lambda a, b, real=real: (seen.append(f"-> {Path(b).name}"), real(a, b)))
    return seen


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells a file's name by /proc")
def test_weights_are_on_the_disk_before_their_folder_gets_its_name(tmp_path, disk):
    save_checkpoint(tmp_path / "sft", tiny_vlm(), tokenizer(), {"m": torch.ones(2)}, {"step": 1})
    assert disk == ["model.safetensors", "optimizer.safetensors", "-> sft"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells a file's name by /proc")
def test_a_download_is_on_the_disk_before_it_gets_its_name(tmp_path, disk, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "a.json").write_text("[]")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as web:
        threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
        got = fetch_file(f"http://127.0.0.1:{web.server_port}/a.json")
        web.shutdown()
    assert Path(got).read_text() == "[]" and disk == ["a.json.part", "-> a.json"]
