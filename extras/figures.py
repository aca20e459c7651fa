"""
The book's pictures (assets/*.png), drawn from the checkpoint and the logs themselves. Called by `python bench.py
--what=figures`. All are 800 pixels wide with few, large letters, so that they can be read on a phone.
"""
import argparse
import math
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import train_rl
from plumbing.drawing import (BLUE, GREEN, GREY, ORANGE, PALE, RED, WIDE, bars, cells, draw_lines, draw_panels, font,
                              page, read_curves)
from plumbing.engine import respond
from plumbing.files import read_json
from plumbing.pictures import load_image
from plumbing.strange import Strange
from plumbing.world import QUESTIONS, World
from model import VLM, document_mask, preset
from tokenizer import Tokenizer
from vision import preprocess
from extras.asking import make_message
from extras.attention_maps import patch_shares, shade
from extras.memory import predict


def draw_ladder(path, rungs: list[dict]) -> None:
    bars("tokens a second; each idea on top of those above", [
        (r["rung"], [(r["tokens_per_s"], BLUE)], f"{r['tokens_per_s']:,.0f}") for r in rungs], left=430).save(path)


# Nothing in the figures is written by hand. The names of these functions are the names of the files.


class Subject:
    "What the figures are about: cat.jpg, a trained model, and what it computes of the picture."

    def __init__(self, vlm: VLM, tokenizer: Tokenizer):
        self.vlm, self.tokenizer, self.M = vlm.eval(), tokenizer, vlm.config.bridge.num_tokens
        self.image = load_image(Path(__file__).parents[1] / "cat.jpg")
        self.pixels = preprocess(self.image, vlm.config.vision.image_size)                  # [3, S, S]
        self.features = vlm.vit_features(self.pixels[None])[0]                                   # [N, D]

    def ask(self, question: str, image: Image.Image | None = None) -> str:
        pixels = preprocess(image, self.vlm.config.vision.image_size) if image else self.pixels
        return respond(self.vlm, self.tokenizer, [[make_message(question, 1)]], [[pixels]])[0]

    def document(self, question: str, answer: str) -> data.Document:
        messages = [make_message(question, 1), {"role": "assistant", "content": answer}]
        return data.make_document({"id": "cat", "messages": messages, "images": ["cat.jpg"]}, 0, self.tokenizer,
                                  self.M, 1000)

    def words(self, ids) -> list[str]:
        "What each token stands for. <|im_end|> -> im_end"
        texts = [self.tokenizer.decode([i], skip_special=False).replace("\n", "\\n").strip() for i in ids]
        return [text.replace("<|image_pad|>", "pad").replace("<|", "").replace("|>", "") for text in texts]

    def colours(self, ids, mask) -> list[str]:
        return [GREEN if learned else BLUE if token == self.tokenizer.image_pad else GREY
                for token, learned in zip(ids, mask)]


def draw_world(s: Subject) -> Image.Image:
    "One held-out scene for each kind of question, with its right answer."
    records = [World("exam", "scenes")[i] for i in range(len(QUESTIONS))]  # record i is of the i-th kind
    sheet, pen = page(52 + 204 * -(-len(records) // 2), "Each kind of question, and the right answer")
    for i, record in enumerate(records):
        x, y = 10 + i % 2 * 398, 52 + i // 2 * 204
        sheet.paste(record["images"][0].draw(188), (x, y))
        question, right = (message["content"].removeprefix("<image>\n") for message in record["messages"])
        lines = [(line, "black") for part in question.splitlines() for line in textwrap.wrap(part, 18)]
        for row, (line, colour) in enumerate([(record["kind"], "#777777"), *lines, (right, "#00794f")]):
            pen.text((x + 196, y - 3 + 22 * row), line, colour, font(20))
    return sheet


def draw_architecture(s: Subject) -> Image.Image:
    "The parts as boxes, each with what comes out of it, for this model and for the 1.5B."
    sheet, pen = page(1026, "What comes out of each part: of tiny, then of the 1.5B")

    def shapes(template: str) -> str:  # "[{N}, {D}]" -> "[36, 128]    [256, 1024]"
        return template if "{" not in template else "    ".join(template.format(
            S=c.vision.image_size, N=c.vision.num_patches, P=3 * c.vision.patch_size ** 2, D=c.vision.hidden_size,
            M=c.bridge.num_tokens, H=c.decoder.hidden_size, V=c.decoder.vocab_size, K=c.decoder.num_hidden_layers)
            for c in (s.vlm.config, preset("qwen2.5-1.5b")))
    for x, row, wide, colour, boxes in (
            (10, 0, 384, BLUE, "pixels/[3, {S}, {S}]; patches/[{N}, {P}]; ViT: features/[{N}, {D}]; "
                               "Perceiver: latents/[{M}, {D}]; MLP: image tokens/[{M}, {H}]"),
            (406, 3, 384, GREY, "tokenizer: ids/[T]; embedding table/[T, {H}]"),
            (10, 5, 780, ORANGE, "image tokens written over their places/[T, {H}]; decoder, {K} layers/[T, {H}]; "
                                 "scores of all tokens: logits/[T, {V}]")):
        for i, box in enumerate(boxes.split("; "), row):
            y, middle = 60 + 112 * i, x + wide / 2
            pen.rounded_rectangle((x, y, x + wide, y + 84), 10, colour)
            for down, text in zip((24, 59), box.split("/")):
                pen.text((middle, y + down), shapes(text), "black", font(23), "mm")
            pen.polygon([(middle - 10, y + 92), (middle + 10, y + 92), (middle, y + 106)], "#555555")
    sheet.paste(s.image.resize((220, 220)), (488, 60))
    for x, y, text in ((598, 310, "What colour is the cat?"), (598, 356, "T: tokens in a row"),
                       (400, 994, s.ask("What colour is the cat?"))):
        pen.text((x, y), text, "black", font(), "mm")
    return sheet


def draw_answers(s: Subject) -> Image.Image:
    "Questions about cat.jpg, and what the model says, right or wrong."
    sheet, pen = page(400)
    sheet.paste(s.image.resize((380, 380)), (10, 10))
    for i, question in enumerate(("What colour is the cat?", "Where is the tree?", "Is there a blue bird?",
                                  "What is the smallest thing?", "How many things are there?")):
        pen.text((412, 12 + 76 * i), question, "#555555", font())
        pen.text((412, 42 + 76 * i), s.ask(question), "black", font(30))
    return sheet


def draw_strange(s: Subject) -> Image.Image:
    "Four pictures that are not of the world, and the beginning of what the model says of each."
    sheet, pen = page(380, "Not of the world, and what the model says of it")
    for i, chosen in enumerate((7, 15, 25, 27)):  # of different sorts
        picture = Strange(f"book {chosen}", World("exam", "scenes")[chosen]["images"][0]).draw(188)
        sheet.paste(picture, (10 + 197 * i, 52))
        pen.text((12, 254 + 31 * i), f"{i + 1}: {s.ask('Describe the picture.', picture)[:70]}", "black", font(20))
    return sheet


def draw_patches(s: Subject) -> Image.Image:
    "What the ViT gets: the picture at its size, and the pieces that become one vector each."
    S, P, n = s.vlm.config.vision.image_size, s.vlm.config.vision.patch_size, math.isqrt(len(s.features))
    sheet, _ = page(430, f"{S} x {S} pixels; {n * n} patches of {P} x {P}, 4 for each latent")
    picture = Image.fromarray(s.pixels.permute(1, 2, 0).numpy())
    sheet.paste(picture.resize((360, 360), Image.Resampling.NEAREST), (20, 55))
    for y, x in np.ndindex(n, n):  # a wider gap every second patch: 2 x 2 of them begin one latent
        patch = picture.crop((x * P, y * P, x * P + P, y * P + P)).resize((54, 54), Image.Resampling.NEAREST)
        sheet.paste(patch, (420 + x * 57 + x // 2 * 10, 55 + y * 57 + y // 2 * 10))
    return sheet


def draw_latents(s: Subject) -> Image.Image:
    "How much each latent has from each patch: attention and the 2 x 2 patches it starts from, in one number."
    shares, n = patch_shares(s.vlm.bridge, s.features), math.isqrt(len(s.features))       # [M, N]
    sheet, pen = page(60 + 268 * -(-s.M // 3), "where each latent looks: the brighter, the more")
    for i, share in enumerate(shares):
        x, y = 8 + i % 3 * 264, 52 + i // 3 * 268
        # Relative to its own maximum: all have the same sum, and some spread it wider.
        sheet.paste(shade(s.image, (share / share.max()).view(n, n), 256), (x, y))
        pen.text((x + 10, y + 6), str(i), "white", font(30), stroke_width=2, stroke_fill="black")
    return sheet


def draw_tokens(s: Subject) -> Image.Image:
    "One conversation as the renderer makes it: tokens, ids, and what is learned."
    document = s.document("What colour is the cat?", "orange")
    sheet, pen = page(500, "grey: given   blue: image tokens   green: learned")
    x, y = 12, 56
    for token, text, colour in zip(document.ids, s.words(document.ids), s.colours(document.ids, document.mask)):
        wide = max(52, pen.textlength(text, font(22)) + 18)
        if x + wide > WIDE - 8:  # the next line
            x, y = 12, y + 76
        pen.rectangle((x, y, x + wide - 3, y + 38), colour)
        pen.text((x + wide / 2, y + 19), text, "black", font(22), "mm")
        pen.text((x + wide / 2, y + 52), str(token), "#555555", font(19), "mm")
        x += wide
    return sheet.crop((0, 0, WIDE, y + 76))


def draw_embeddings(s: Subject) -> Image.Image:
    "The decoder's input before and after VLM.embed writes image tokens into it; a column is a position."
    document = s.document("What colour is the cat?", "orange")
    ids = torch.tensor([document.ids[:-1]])
    places = torch.arange(s.M) + document.slots[0]
    sheet, pen = page(566, f"24 of the {s.features.shape[1]} numbers at each of {ids.shape[1]} positions")
    for y, title, x in ((82, "before: the same vector for every <|image_pad|>", s.vlm.embed(ids)), (
            336, "after: image tokens are written over them",
            s.vlm.embed(ids, s.vlm.bridge(s.features[None])[0], places))):
        pen.text((12, y - 32), title, "#555555", font())
        # 2 and above is full colour. Text embeddings are smaller than image tokens, and that is to be seen.
        shades = ((x[0, :, :24].t() / 2).clamp(-1, 1) * 255).int().tolist()                      # [24, T]
        cells(sheet, (12, y), (776, 192), [  # red above 0, white, blue below
            [f"rgb({min(255, 255 + v)}, {255 - abs(v)}, {min(255, 255 - v)})" for v in row] for row in shades])
        cells(sheet, (12, y + 196), (776, 18), [s.colours(document.ids[:-1], [0] * ids.shape[1])])
    return sheet


def draw_row(s: Subject) -> Image.Image:
    "A row as chapter 3 packs it, only longer: what is in it, and which position attends to which."
    T = 216
    # Records of two questions: short, so that several fit.
    records = [one for one in map(World("chat").__getitem__, range(40000, 40020)) if len(one["messages"]) == 4]
    documents = [data.make_document(one, 0, s.tokenizer, s.M, T) for one in records]
    arrays, *_ = data.pack(documents, 1, T, s.M)
    numbers, allowed = arrays["document_ids"][0], document_mask(torch.from_numpy(arrays["document_ids"]))[0, 0]
    # The row stands on top (what is attended to) and once more at the left (who attends).
    kinds = np.array(s.colours(arrays["ids"][0], arrays["targets"][0] >= 0))
    kinds[numbers == 0] = PALE
    sheet, pen = page(800, f"a row of {T} tokens: {numbers.max()} conversations, and its mask")
    cells(sheet, (110, 56), (648, 34), [kinds])
    cells(sheet, (66, 100), (34, 648), kinds[:, None])
    cells(sheet, (110, 100), (648, 648), [[ORANGE if yes else PALE for yes in row] for row in allowed.tolist()])
    pen.text((12, 760), "line i: what position i may attend to, in orange", "#555555", font())
    return sheet


def draw_surprise(s: Subject) -> Image.Image:
    "The five tokens that the model finds likeliest as an answer, with the picture or with a grey one."
    document, shares = s.document("What colour is the cat?", "orange"), []
    at = document.mask.index(1)  # the answer's first token; what comes before it predicts it
    ids, places = torch.tensor([document.ids[:at]]), torch.arange(s.M) + document.slots[0]
    for pixels in (s.pixels, torch.full_like(s.pixels, 128)):
        x = s.vlm.embed(ids, s.vlm.encode_images(pixels[None])[0], places)
        shares.append(s.vlm.gpt.logits(s.vlm.gpt.hidden(x)[0, -1]).softmax(-1))                  # [V]
    rows, ranked = [], torch.stack(shares).amax(0).topk(5).indices
    for word, own, blind in zip(s.words(ranked.tolist()), *(share[ranked].tolist() for share in shares)):
        rows += [(word, [(own, GREEN)], f"{own:.3f}"), ("", [(blind, GREY)], f"{blind:.3f}")]
    return bars("What colour is the cat? Probability of the next token", rows, 150, 36,
                {"with the picture": GREEN, "grey picture": GREY})


def draw_rollouts(s: Subject) -> Image.Image:
    "The first question for a number of which the model answers neither nearly all nor nearly none of 16 right."
    flags = argparse.Namespace(samples=16, max_new_tokens=12, temperature=1.0, seed=0)
    for record in (World("exam", "scenes", kinds=["number"])[i] for i in range(100)):
        _, (group, ) = train_rl.rollout(s.vlm, s.tokenizer, [record], flags, 0)
        rewards = [train_rl.reward(record, ids, s.tokenizer) for ids in group]
        if 5 <= sum(rewards) <= 11:
            break
    # Equal answers are one bar, as they are one document in the update (train_rl.to_documents).
    mean, texts = sum(rewards) / 16, [s.tokenizer.decode(ids) for ids in group]
    found = sorted(set(zip(texts, rewards)), key=lambda one: (-texts.count(one[0]), -one[1], one[0]))
    below = bars("advantage = reward - mean reward of the group", [
        (f'{texts.count(text)} x "{text}", reward {r:.0f}', [(r - mean, GREEN if r else RED)], f"{r - mean:+.4g}")
        for text, r in found], 320)
    sheet, pen = page(300 + below.height)
    sheet.paste(record["images"][0].draw(280), (10, 10))
    sheet.paste(below, (0, 300))
    question, right = (message["content"].removeprefix("<image>\n") for message in record["messages"])
    for i, text in enumerate([question, f"right: {right}", "16 answers, temperature 1", f"mean reward {mean:.4g}"]):
        pen.text((310, 24 + 50 * i), text, "black", font(28))
    return sheet


def draw_cache(s: Subject) -> Image.Image:
    "Which keys and values a step computes, and which it only reads."
    document = s.document("Describe the picture.", s.ask("Describe the picture."))
    at = document.mask.index(1)
    words, T = s.words(document.ids[at:at + 8]), at + 8
    sheet, pen = page(130 + 46 * len(words), "keys and values in the cache, step by step")
    for i, word in enumerate(words):  # step 0 is prefill; each further one has the token before it as input
        pen.text((150, 78 + 46 * i), f"-> {word}", "black", font(), "rm")
        new = range(at) if i == 0 else [at + i - 1]  # prefill computes the whole prompt
        cells(sheet, (165, 60 + 46 * i), (620, 36), [[ORANGE if j in new else BLUE if j < at + i else PALE
                                                      for j in range(T)]])
    pen.text((12, sheet.height - 46), f"orange: computed ({at} at first, then 1)   blue: read", "#555555", font())
    return sheet


def draw_memory(s: Subject) -> Image.Image:
    "What chapter 3 of qwen2.5-1.5b needs, predicted."
    flags = argparse.Namespace(model="qwen2.5-1.5b", bridge="", set="", batch_size=32, seq_len=2048, gpus=1, tiles=0)
    colours = dict(zip(("weights", "gradients", "master weights", "optimizer", "activations", "loss"),
                       (GREY, RED, BLUE, GREEN, ORANGE, "#9a7bc0")))
    with torch.enable_grad():  # measured is what autograd stores
        rows, ways = [], {lora: predict(flags, "sft", lora) for lora in (0, 16)}
    for name, lora, thrift in (("no flag", 0, False), ("activation checkpointing", 0, True),
                               ("LoRA, rank 16", 16, False), ("both", 16, True)):
        told = ways[lora](8, thrift)
        rows.append((name, [(told[part], colour) for part, colour in colours.items()], f"{told['peak']:.0f} GiB"))
    return bars("SFT of qwen2.5-1.5b, 8 rows a pass, by part", rows, 310, legend=colours)


@torch.no_grad()
def draw_book(log: list[dict], init: str, load) -> list[str]:
    "A log that holds all four chapters, and the function that loads its checkpoint -> the files that were drawn."
    home, folder, runs, name = Path(__file__).parents[1], Path("assets"), {}, ""
    for row in log:
        name = Path(row["command"].split()[0]).stem if "command" in row else name
        runs.setdefault(name, []).append(row)
    curves = {name: read_curves(rows) for name, rows in runs.items()}
    accuracy = curves.get("train_sft", {}).get("held-out accuracy")
    if not accuracy or not {"train_base", "train_align", "train_rl"} <= curves.keys():
        raise ValueError(f"--what=figures --init={init}: needs a log of all four chapters, such as assets/tiny has")
    subject = Subject(*load())
    folder.mkdir(exist_ok=True)
    for draw in (draw_world, draw_architecture, draw_answers, draw_strange, draw_patches, draw_latents, draw_tokens,
                 draw_embeddings, draw_row, draw_surprise, draw_rollouts, draw_cache, draw_memory):
        draw(subject).save(folder / f"{draw.__name__.removeprefix('draw_')}.png", optimize=True)
    draw_ladder(folder / "ladder.png", read_json(home / "docs/results.json")["ladder"]["rungs"])
    draw_lines(folder / "chapters.png", {f"{title}: {name}.py": lines for name, charts in curves.items()
                                         for title, lines in charts.items() if "accuracy" not in title}, height=300)
    everything = accuracy.pop("accuracy")
    draw_panels(folder / "kinds.png", f"Accuracy, 0 to 100 %, over {everything[-1][0]:,} steps; grey: all kinds",
                accuracy, everything)
    if (readme := Path("README.md")).exists():
        count = lambda m: f"| {m[1]} | {len((home / m[1]).read_text(encoding='utf-8').splitlines())} |"  # noqa: E731
        readme.write_text(re.sub(r"\| (\w+\.py) \| \d+ \|", count, readme.read_text("utf-8")), "utf-8")
    return sorted(map(str, folder.glob("*.png")))
