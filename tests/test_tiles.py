"Large pictures in tiles (--tiles): training, evaluation, answering and export see the same."
import argparse
import io
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bench
import data
import extras.memory
import model
import sample
import train_base
import train_rl
import train_sft
import vision
from data import token_counter
from extras.asking import make_message, make_request
from extras.attention_maps import latent_maps, where_it_looked
from plumbing.engine import PictureCache, respond
from plumbing.pictures import open_source, picture_size
from plumbing.recipes import read_records
from plumbing.mural import QUARTERS, mural
from tests.helpers import (conversation, fails, far, needs, noise_image, run, sample_flags, save_onevision, setup,
                           tiny_vlm, tokenizer)
from tests.test_weights import hf_pixels, set_pixels
from tokenizer import Tokenizer
from vision import Tiles, layout_of, to_pixels

pytest_plugins = ["tests.helpers"]  # its fixtures
S, MURAL = 24, mural(3)["images"][0]  # S: the square of tiny_vlm


def png_of(width: int, height: int, seed: int = 0) -> bytes:
    noise_image(width, height, seed).save(file := io.BytesIO(), "PNG")
    return file.getvalue()

SMALL, TWO, SIX = png_of(20, 24, 1), png_of(48, 20, 2), png_of(72, 46, 3)  # one square, two and six tiles

CHATS = [conversation("<image>what is this?", "a red cat", images=[SIX], id="0"),
         conversation("one two three", "four", id="1"),
         conversation("<image>what is this?", "a blue dog.", images=[SMALL], id="2"),
         conversation("<image>what is this?", "a cat", "and <image>this?", "a red dog", images=[TWO, SMALL], id="3"),
         conversation("<image>", "a cat", "a dog?", "a red cat, a blue dog", images=[SIX], id="4")]


def tiled_vlm(kind: str, tiles: int = 6) -> model.VLM:
    "kind: of bridge; onevision: an MLP with newlines."
    vlm = tiny_vlm("mlp" if kind == "onevision" else kind)
    if kind == "onevision":
        vlm.config.bridge.newline, vlm.config.vision.pad = True, True
        vlm.bridge.newline = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    vlm.config.vision.tiles = tiles
    return vlm


def documents(vlm, chats=CHATS, seq_len: int = 10 ** 4) -> list:
    return [data.make_document(one, i, tokenizer(), token_counter(vlm.config), seq_len) for i, one in enumerate(chats)]


def batch_of(vlm, docs: list, rows: int, seq_len: int) -> dict:
    arrays, packed, waiting = data.pack(docs, rows, seq_len, token_counter(vlm.config))
    assert not waiting
    return data.collate(arrays, packed, data.pixel_loader(vlm.config.vision))


def tokens_by_hand(vlm, record: dict) -> list[torch.Tensor]:
    "Each picture's image tokens, square by square."
    out = []
    for source in record["images"]:
        alone = len(record["images"]) == 1
        image = open_source(source)
        if vlm.bridge.newline is not None and alone:
            tiles = vision.cut_tiles(image, S, False, vlm.config.vision.tiles)
            out.append(vlm.bridge.stitch(vlm.vit_features(tiles.pixels), tiles))
        elif vlm.bridge.newline is None and max(image.size) > S:
            squares = vision.cut_tiles(image, S, False, vlm.config.vision.tiles).pixels
            out.append(torch.cat([vlm.encode_images(square[None])[0] for square in squares]))
        else:
            out.append(vlm.encode_images(vision.preprocess(image, S, False, vlm.config.vision.pad)[None])[0])
    return out


def loss_by_hand(vlm, record: dict) -> torch.Tensor:
    "One conversation alone, without mask, packing or chunks."
    shown = tokens_by_hand(vlm, record)
    ids, mask, slots = tokenizer().render(record["messages"], list(map(len, shown)))
    x = vlm.gpt.embed(torch.tensor(ids))
    for slot, tokens in zip(slots, shown):
        x = torch.cat([x[:slot], tokens, x[slot + len(tokens):]])
    targets = torch.tensor([i if learn else -100 for i, learn in zip(ids, mask)])
    logits = F.linear(vlm.gpt.hidden(x[None])[0], vlm.gpt.head_weight)
    return F.cross_entropy(logits[:-1], targets[1:], reduction="sum")


KINDS = ["perceiver", "pixelshuffle", "mlp", "onevision"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_unpacked_and_padded_with_pictures_of_one_and_of_seven_squares(kind):
    vlm = tiled_vlm(kind)
    docs = documents(vlm)
    if kind == "perceiver":  # 4 latents a square
        assert [doc.counts for doc in docs] == [[28], [], [4], [12, 4], [28]]
    with torch.no_grad():
        alone = [loss_by_hand(vlm, record).item() for record in CHATS]
        exact = [vlm(batch_of(vlm, [doc], 1, len(doc.ids) - 1)).item() for doc in docs]
        padded = [vlm(batch_of(vlm, [doc], 2, len(doc.ids) + 9)).item() for doc in docs]
        width = sum(len(doc.ids) for doc in docs)
        packed, other = (vlm(batch_of(vlm, some, 1, width)).item() for some in (docs, docs[::-1]))
    assert exact == pytest.approx(alone, rel=1e-5) and padded == pytest.approx(alone, rel=1e-5)
    assert packed == pytest.approx(sum(alone), rel=1e-5) and other == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_encodes_a_picture_in_tiles_as_answering_does(kind):
    vlm, load = tiled_vlm(kind), data.pixel_loader(tiled_vlm(kind).config.vision)
    docs = documents(vlm)
    batch = batch_of(vlm, docs, 3, 700)
    shown = [load(source, doc.record) for doc in sorted(docs, key=lambda doc: batch["records"].index(doc.record["id"]))
             for source in doc.record["images"]]
    assert len({id(one) for one in batch["tiles"]}) > 1 and len(batch["tiles"]) == 5  # per place
    with torch.no_grad():
        assert far(vlm.place_images(batch), torch.cat(PictureCache(vlm)(shown))) < 1e-5
    pads = (batch["ids"].flatten() == tokenizer().image_pad).nonzero()[:, 0]
    assert batch["image_positions"].tolist() == pads.tolist()


def test_a_picture_in_tiles_that_two_documents_share_is_encoded_once():
    vlm = tiled_vlm("perceiver")
    docs = documents(vlm)
    batch = batch_of(vlm, docs, 1, 1000)
    assert len(batch["pixels"]) == 7 + 1 + 3 and len(batch["image_index"]) == 7 + 1 + 3 + 1 + 7
    vlm(batch).backward()
    assert vlm.vit.position.grad.abs().sum() > 0


@pytest.mark.parametrize("size, most, grid", [
    ((24, 24), 6, None), ((24, 10), 6, None),       # not larger than the square
    ((25, 10), 6, (1, 2)), ((48, 48), 6, (2, 2)), ((900, 900), 36, (6, 6)),
    ((72, 48), 4, (2, 2)), ((72, 24), 2, (1, 2)),   # at most so many
    ((48, 48), 3, None), ((100, 20), 0, None)])     # a grid of one tile adds nothing to the whole
def test_a_picture_is_cut_only_where_it_is_larger_and_into_so_many_tiles_at_most(size, most, grid):
    config = vision.ViTConfig(image_size=24, tiles=most)
    for alone in (True, False):
        tiles = layout_of(*size, config, alone)
        assert (tiles and (tiles.rows, tiles.columns)) == grid
    pixels = to_pixels(noise_image(*size), config)
    assert isinstance(pixels, Tiles) == (grid is not None) and (grid is None or len(pixels.pixels) == pixels.squares)


def test_a_llava_onevision_cuts_single_pictures_alone_and_small_ones_too():
    config = vision.ViTConfig(image_size=24, tiles=36, pad=True)
    assert layout_of(10, 10, config, True).squares == 2 and layout_of(100, 100, config, False) is None
    config.tiles = 0
    assert layout_of(100, 100, config, True) is None


def test_a_pictures_size_is_that_of_the_opened_picture(tmp_path):
    for orientation in range(1, 9):
        image = Image.new("RGB", (30, 20), "red")
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path := tmp_path / f"{orientation}.jpg", exif=exif)
        for source in (str(path), path.read_bytes()):
            assert picture_size(source, 24) == open_source(source, 24).size
    assert picture_size(MURAL, 24) == open_source(MURAL, 24).size == (48, 48)
    fails(lambda: picture_size(str(tmp_path / "none.png"), 24), "none.png", "no such image file")
    assert fails(lambda: documents(tiled_vlm("mlp"), [conversation("<image>", "b", images=[b"broken"], id="r7")]), "r7")


def test_of_a_long_conversation_the_pictures_that_are_left_decide_how_they_are_cut():
    # Two pictures, which a LLaVA-OneVision does not cut; of the first turn alone one, which it does.
    vlm = tiled_vlm("onevision")
    two = conversation("<image>what is this?", "a cat", "and <image>this? " + "one two three " * 40, "a dog",
                       images=[SMALL, SIX])
    whole, = documents(vlm, [two])
    assert whole.counts == [17, 17]
    cut, = documents(vlm, [two], len(whole.ids) - 2)
    assert len(cut.slots) == 1 and cut.counts == [16 + 4 * 5]
    loader = data.pixel_loader(vlm.config.vision)
    assert vlm.config.bridge.tokens_of(loader(SMALL, cut.record)) == cut.counts[0]


def test_a_picture_whose_tiles_do_not_fit_is_left_out_and_told_with_the_flags(tmp_path):
    vlm = tiled_vlm("perceiver")
    one, = documents(vlm, CHATS[:1])
    assert documents(vlm, CHATS[:1], one.slots[0] + 27) == [None]
    flags = ["--data=mural", "--tiles=4", "--seq_len=48", "--steps=1", "--batch_size=2", "--device=cpu",
             "--eval_size=4", f"--out_dir={tmp_path}"]
    ran = run("train_sft", *flags)
    assert ran.code == 1 and "--tiles" in ran.err.splitlines()[-1] and "--seq_len=48" in ran.err.splitlines()[-1]
    assert "with --tiles=4 a picture has up to 45 tokens" in ran.err
    ran = run("data", "--check", "--data=mural@.001", "--tiles=4", "--seq_len=48", f"--out={tmp_path / 'a.png'}")
    assert ran.code == 0 and ran.result["left_out"] == 20 and "--tiles=4" in ran.out


SPECIAL = {f"<unused {i}>": i for i in range(256, 297)} | {"<|endoftext|>": 297, "<|im_start|>": 298, "<|im_end|>": 299,
                                                           "<image>": 300}


def onevision_tokenizer() -> Tokenizer:
    "Every id that random weights may choose is a token."
    return Tokenizer({bytes([b]): b for b in range(256)}, SPECIAL)


def logits_in_training(vlm, record: dict, tokenizer) -> torch.Tensor:
    "As in a training step: through make_document, pack and collate [T, V]."
    doc = data.make_document(record, 0, tokenizer, token_counter(vlm.config), 10 ** 4)
    batch = batch_of(vlm, [doc], 1, len(doc.ids) - 1)
    x = vlm.embed(batch["ids"], vlm.place_images(batch), batch["image_positions"])
    return vlm.gpt.logits(vlm.gpt.hidden(x, batch["positions"]))[0], doc


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("size", [(20, 45), (150, 60), (200, 190)], ids=str)
def test_a_llava_onevision_trains_on_the_logits_of_transformers_and_of_its_answers(tmp_path, size):
    reference = save_onevision(tmp_path)
    vlm, words = model.load_checkpoint(tmp_path).eval(), onevision_tokenizer()
    assert vlm.config.vision.tiles == 36
    vlm.config.vision.bicubic = True  # as hf_pixels does it
    record = conversation("<image>\nwhat?", "a cat", images=[png_of(*size)])
    logits, doc = logits_in_training(vlm, record, words)
    tiles = to_pixels(open_source(record["images"][0]), vlm.config.vision)
    theirs = hf_pixels([open_source(record["images"][0])])
    set_pixels(theirs, tiles.pixels)
    ids = torch.tensor([doc.ids[:-1]])
    assert far(logits, reference(input_ids=ids, **theirs).logits[0]) < 1e-4
    asked = make_request(vlm, words, [make_message("what?", 1)], [tiles], sample_flags())
    n = len(asked.prompt.ids)
    assert asked.prompt.ids == doc.ids[:n]
    x = vlm.embed(ids[:, :n], torch.cat(PictureCache(vlm)([tiles])), torch.arange(doc.counts[0]) + doc.slots[0])
    assert far(vlm.gpt.logits(vlm.gpt.hidden(x))[0], logits[:n]) < 1e-5


@needs("transformers")
def test_a_llava_onevision_learns_large_pictures_in_tiles_and_is_exported_as_it_is(tmp_path):
    # The whole way: a folder of transformers', check, training, an answer, export, and transformers again.
    from transformers import LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    save_onevision(tmp_path / "ov")
    onevision_tokenizer().save_hub(tmp_path / "ov")
    rows = []
    for i in range(8):
        mural(i)["images"][0].draw(112).resize((112, 84)).save(tmp_path / f"{i}.png")  # 4 x 3 squares of 28 pixels
        rows.append({"image": f"{i}.png", "question": "<image>\nWhat is it?", "answer": "cat"})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    given = [f"--data={tmp_path / 'd.json'}", f"--model={tmp_path / 'ov'}", "--tiles=6"]
    ran = run("data", "--check", *given, f"--out={tmp_path / 'check.png'}")
    assert ran.code == 0 and ran.result["bad"] == 0, ran.out + ran.err
    told = int(ran.out.split("[")[1].split(" image tokens")[0])
    ran = run("train_sft", *given, f"--out_dir={tmp_path / 'out'}", "--steps=2", "--batch_size=2", "--seq_len=256",
              "--device=cpu", "--lr=0.01", "--lr_vit=0.01", "--eval_size=2")
    assert ran.code == 0, ran.err
    folder = tmp_path / "out/ov/sft"
    vlm, words = model.load_checkpoint(folder).eval(), Tokenizer.from_pretrained(folder)
    assert vlm.config.vision.tiles == json.loads((folder / "state.json").read_text())["flags"]["tiles"] == 6
    ran = run("sample", f"--init={folder}", f"--image={tmp_path / '1.png'}", "--question=What is it?",
              "--device=cpu", "--max_new_tokens=4")
    tiles = to_pixels(open_source(str(tmp_path / "1.png")), vlm.config.vision)
    assert tiles.squares == 1 + 6 and vlm.config.bridge.tokens_of(tiles) == told
    assert ran.out.strip() == respond(vlm, words, [[make_message("What is it?", 1)]], [[tiles]], max_new_tokens=4)[0]
    assert run("sample", f"--init={folder}", f"--export={tmp_path / 'hf'}", "--device=cpu").code == 0
    reference, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = model.load_checkpoint(tmp_path / "hf").eval()
    assert again.config.vision.tiles == 6  # its grids are in the exported files
    record = conversation("<image>\nWhat is it?", "cat", images=[(tmp_path / "1.png").read_bytes()])
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path / "hf")
    theirs = dict(processor([[open_source(record["images"][0])]], return_tensors="pt"))
    set_pixels(theirs, tiles.pixels)
    with torch.no_grad():
        logits, doc = logits_in_training(again, record, words)
        assert far(logits, reference.eval()(input_ids=torch.tensor([doc.ids[:-1]]), **theirs).logits[0]) < 1e-4


@needs("transformers")
def test_grids_that_are_not_ours_are_refused(tmp_path):
    save_onevision(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_grid_pinpoints"] = [[28, 56], [56, 28]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(lambda: model.load_checkpoint(tmp_path), tmp_path, "image_grid_pinpoints")


QUICK = ["--data=mural", "--device=cpu", "--batch_size=2", "--eval_size=4", "--steps=1"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Path:
    "A tiny model after one step with tiles."
    out = tmp_path_factory.mktemp("printed")
    ran = run("train_sft", *QUICK, "--tiles=4", f"--out_dir={out}")
    assert ran.code == 0, ran.err
    return out


def test_a_model_keeps_the_tiles_that_it_was_trained_with(printed, tmp_path, monkeypatch):
    folder = printed / "tiny/sft"
    assert json.loads((folder / "config.json").read_text())["vision"]["tiles"] == 4
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["flags"]["tiles"] == 4
    mural(5)["images"][0].draw(144).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr(sample, "open_pixels", lambda vlm, path, alone=True: seen.append(
        to_pixels(open_source(str(path)), vlm.config.vision, alone)) or seen[-1])
    for flags in ([], ["--tiles=0"]):
        assert run("sample", f"--init={folder}", f"--image={tmp_path / 'a.png'}", "--device=cpu", "--max_new_tokens=2",
                   *flags, main=sample.main).code == 0
    assert isinstance(seen[0], Tiles) and seen[0].squares == 5 and seen[1].shape == (3, 72, 72)
    # The next stage, and a run that goes on, follow; and of the latter the number cannot change.
    one_more = ["--samples=2", "--kinds=", f"--init={folder}", f"--out_dir={tmp_path}"]
    assert run("train_rl", *QUICK, *one_more).code == 0
    assert json.loads((tmp_path / "tiny/rl/config.json").read_text())["vision"]["tiles"] == 4
    ran = run("train_sft", "--resume", "--tiles=2", f"--out_dir={printed}", "--device=cpu")
    assert ran.code == 1 and "--tiles=4" in ran.err.splitlines()[-1]


def test_without_tiles_nothing_is_cut_and_with_them_the_evaluation_sees_them(printed):
    vlm, words = model.load_checkpoint(printed / "tiny/sft"), Tokenizer.from_pretrained(printed / "tiny/sft")
    records = read_records("mural@.001")[:3]
    load = data.pixel_loader(vlm.config.vision)
    shown = [[load(record["images"][0], record)] for record in records]
    assert all(one.squares == 5 for one, in shown)
    asked = [record["messages"][:-1] for record in records]
    most = 4 + max(len(words.encode(record["messages"][-1]["content"])) for record in records)
    assert train_sft.answers(vlm, words, records) == respond(vlm, words, asked, shown, max_new_tokens=most)
    assert train_sft.answers(vlm, words, records, blind=True) == respond(
        vlm, words, asked, [[vision.blank(one)] for one, in shown], max_new_tokens=most)
    assert vision.blank(shown[0][0]).pixels.unique().tolist() == [128] and shown[0][0].pixels.unique().numel() > 1
    vlm.config.vision.tiles = 0
    assert isinstance(data.pixel_loader(vlm.config.vision)(*records[0]["images"], records[0]), torch.Tensor)


def test_pictures_are_exchanged_for_others_of_as_many_tokens(capsys):
    vlm = tiled_vlm("perceiver")
    seven, three = png_of(70, 48, 9), png_of(24, 48, 8)
    chats = [*CHATS, conversation("<image>what?", "a cat", images=[seven], id="5")]
    docs = documents(vlm, chats)
    # SIX and seven change places, two small ones do not exist, and TWO has no other of three squares.
    swapped = train_base.exchange(docs, train_base.pictures_of(docs))
    assert [doc.record["images"] for doc in swapped] == [[seven], [], [SMALL], [TWO, SMALL], [seven], [SIX]]
    nats, tokens = train_base.held_out_loss(vlm, docs, setup(), 700, "shuffled")
    assert "shuffled: 2 of 4 pictures stay" in capsys.readouterr().err
    expected = sum(loss_by_hand(vlm, {**record, "images": doc.record["images"]}) for record, doc in zip(chats, swapped))
    assert nats == pytest.approx(expected.item(), rel=1e-5) and tokens == sum(sum(doc.mask) for doc in docs)
    alone = documents(vlm, [CHATS[0], conversation("<image>", "b", images=[three])])
    assert train_base.held_out_loss(vlm, alone, setup(), 700, "shuffled") == (0.0, 0)
    blind, _ = train_base.held_out_loss(vlm, docs, setup(), 700, "blind")
    grey = [{**record, "images": [grey_of(source) for source in record["images"]]} for record in chats]
    assert blind == pytest.approx(sum(loss_by_hand(vlm, record).item() for record in grey), rel=1e-5)


def grey_of(source: bytes) -> bytes:
    "Without the black bars around its tiles: the blind baseline is grey there, too."
    image = open_source(source)
    width, height = -(-image.width // S) * S, -(-image.height // S) * S
    Image.new("RGB", (width, height), (128, 128, 128)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_batches_with_tiles_are_the_same_for_any_number_of_workers():
    vlm, shapes = tiled_vlm("perceiver"), [(20, 20), (48, 20), (70, 46)]
    records = [conversation("<image>what?", "a cat", images=[png_of(*shapes[i % 3], i)], id=str(i)) for i in range(40)]
    make = partial(data.make_document, tokenizer=tokenizer(), image_tokens=token_counter(vlm.config), seq_len=100)

    def batches(workers: int) -> list[dict]:
        loader = data.Loader(data.Mixture([(data.Shuffled(records, 0), 1)]), make, data.pixel_loader(vlm.config.vision),
                             2, 100, token_counter(vlm.config), workers=workers)
        return [next(loader) for _ in range(4)]
    for one, other in zip(batches(0), batches(1)):
        assert all(torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name]
                   for name in one)
        sizes = {tiles and tiles.squares for tiles in one["tiles"]}
        assert len(sizes) > 1 and sizes <= {None, 3, 7}


def test_rollouts_and_their_update_see_the_same_tiles():
    vlm = tiled_vlm("perceiver")
    records = [one | {"messages": one["messages"][:2]} for one in CHATS if one["id"] in "02"]
    flags = sample_flags()
    flags.samples, flags.temperature, flags.max_new_tokens = 2, 1.0, 3
    prompts, groups = train_rl.rollout(vlm, tokenizer(), records, flags, 0)
    docs = documents(vlm, records)
    assert [prompt.ids == doc.ids[:len(prompt.ids)] for prompt, doc in zip(prompts, docs)] == [True, True]
    reward = lambda record, ids, tokenizer: float(ids == groups[int(record["id"]) // 2][0])  # noqa: E731
    written, _, _ = train_rl.to_documents(records, prompts, groups, tokenizer(), reward)
    batch, = train_rl.pack_all(written, 4, 200, vlm)
    pads = (batch["ids"].flatten() == tokenizer().image_pad).nonzero()[:, 0]
    assert written and batch["image_positions"].tolist() == pads.tolist()
    vlm(batch).backward()
    flags = argparse.Namespace(seq_len=120, max_new_tokens=3)
    full = train_rl.full_batch(2, [records[0]] * 50, flags, vlm, tokenizer(), data.BadRecords(0))
    assert full["tiles"] and vlm(full).isfinite()
    fails(lambda: train_rl.pack_all(written, 1, 30, vlm), "--seq_len=30", "--tiles=6")


def test_memory_and_speed_follow_the_tiles(monkeypatch):
    monkeypatch.setattr(extras.memory, "saved_bytes", lambda module, compiled, *inputs: inputs[0].nbytes)
    flags = {"model": "small", "bridge": "", "set": "", "batch_size": 4, "seq_len": 1024, "gpus": 1}
    plain, tiled = (extras.memory.predict(argparse.Namespace(**flags, tiles=tiles), "sft", 0)(4, False)
                    for tiles in (0, 4))
    # Pictures of 5 x 64 tokens beside 256 of text: 5 squares for 576 tokens, where one was for 320.
    assert tiled["activations"] > plain["activations"] and tiled["weights"] == plain["weights"]
    for kind in ("perceiver", "onevision"):
        vlm = tiled_vlm(kind, 4)
        flags = argparse.Namespace(model="tiny", batch_size=2, micro_batch_size=1, seq_len=256)
        step = bench.Step(flags, setup(), vlm, None, "sft")
        assert step.images == 5 * sum(len(batch["records"]) for batch in step.batches) and math.isfinite(step())
    fails(lambda: bench.llava_like(tiled_vlm("mlp", 36), "sft", 300), "--tiles=36", "--seq_len=300")


@torch.no_grad()
def test_where_the_model_looked_is_told_of_a_picture_in_tiles():
    vlm = tiled_vlm("perceiver")
    tiles = to_pixels(noise_image(70, 40), vlm.config.vision)
    asked = tokenizer().render([{"role": "user", "content": "<image>"}], [vlm.config.bridge.tokens_of(tiles)], True)
    grid, = where_it_looked(vlm, asked, [tiles], [5, 6, 7])
    assert grid.shape == (3, 4, 4) and grid.isfinite().all() and grid.max() > 0
    assert torch.equal(latent_maps(vlm, tiles), latent_maps(vlm, tiles.pixels[0]))


def test_a_mural_is_the_same_everywhere_and_says_what_is_in_each_quarter():
    first, again = (read_records("mural@.05") for _ in range(2))
    assert len(first) == 1000 and np.array_equal(first.keys, again.keys)
    for record, other in zip(first[:50], again):
        said = {one["content"].removeprefix("<image>\n"): two["content"] for one, two in zip(
            record["messages"][::2], record["messages"][1::2])}
        assert said == {f"What is at the {place}?": scene.things[0].kind
                        for place, scene in zip(QUARTERS, other["images"][0].scenes)}
    image = first[3]["images"][0]
    assert image.draw(144).crop((72, 0, 144, 72)).tobytes() == image.scenes[1].draw(72).tobytes()  # the top right
