"""
Use a trained model: ask about one picture, chat, answer about a whole folder, or export it for a serving engine.

    python sample.py --image cat.jpg                                  # describe it
    python sample.py --image cat.jpg --question "What colour is the cat?"
    python sample.py --chat                                           # a conversation; /image PATH shows a picture
    python sample.py --images holiday/ --out answers.jsonl            # a whole folder, one JSON line per picture
    python sample.py --serve                                          # a page in the browser, and OpenAI's API
    python sample.py --model=llava-ov-0.5b --image photo.jpg          # a finished public model, downloaded once
    python sample.py --model=qwen2.5-0.5b-instruct --chat             # a language model without vision
    python sample.py --export=my_llava                                # the model as a Hugging Face folder, for serving
    python sample.py --slim=my_model                                  # the checkpoint in a quarter of its bytes

Standard output contains the answer alone, so that it can be piped; everything else goes to standard error. The
checkpoint is --init, or the one written last of --model's under --out_dir, or --model's released weights; before you
have trained anything, a tiny one that comes with the code. The prompt is made by the same `render` as in training: a
prompt that differs even slightly from what a model was trained on is the most common reason for bad answers.
"""
import argparse
import base64
import codecs
import contextlib
import hashlib
import hmac
import http.server
import io
import ipaddress
import json
import math
import os
import queue
import re
import secrets
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import weights
from data import parse_flags, pick_device, run
from model import (FROM_SCRATCH, PRESETS, STAGES, Attention, Engine, LoRALinear, Request, VLM, VLMConfig, check_name,
                   checkpoints, load_checkpoint, load_pretrained, rope_table)
from tokenizer import Tokenizer
from vision import (MOST_TILES, MOST_TOKENS, Bridge, PictureCache, Tiles, ViTConfig, cut_tiles, load_image,
                    pixel_shuffle, preprocess)
from weights import note
from world import World

# A folder often contains other files too. They are recognised by their names: opening each one would take long.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

TINY = Path(__file__).with_name("assets") / "tiny"  # a small trained checkpoint that comes with the code

FLAGS = {  # name: (default, meaning); a type instead of a default: not given
    "image": ([], "picture to ask about; may be given several times"),
    "images": ("", "folder of pictures: ask about each, answers go to --out"),
    "question": ("Describe the picture.", "what to ask"),
    "attention": ("", "with --image: draw into this .png where each word of the answer looked"),
    "chat": (False, "talk on the terminal"),
    "serve": (False, "answer on --host and --port: a page for people, OpenAI's API for programs"),
    "host": ("127.0.0.1", "address to serve; 0.0.0.0: every network, so give --api_key"),
    "port": (8000, "port to serve; 0: any free one"),
    "api_key": ("", "with --serve: what a program must send as its key; empty: none"),
    "max_requests": (32, "with --serve: answered at once; more wait. Each has 8,192 tokens of memory: a qwen2.5-1.5b's "
                         "are 0.23 GB"),
    "out": ("answers.jsonl", "with --images; pictures that it already answers are skipped"),
    "init": ("", "checkpoint folder; empty: the one written last under OUT_DIR/MODEL"),
    "model": ("", f"{', '.join(PRESETS)}, or a hub id, Org/Name; empty: tiny"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "anyres": ("auto", "True: cut a large picture into tiles, ten times the tokens, and small print becomes legible "
                       "(only models like llava-ov-0.5b can); False; or auto: on a GPU"),
    "max_new_tokens": (256, "longest answer, in tokens"),
    # No numbers here: each released model has its publisher's (generation_config.json), ours are greedy.
    "temperature": (float, "0: always the most likely token; not given: the model's own, else 0"),
    "top_k": (int, "sample among the k most likely tokens; 0: all; not given: the model's own, else 0"),
    "top_p": (float, "sample among the fewest tokens that hold this share; not given: the model's own, else 1"),
    "repetition_penalty": (float, "above 1: words already used become less likely; not given: the model's own, else 1"),
    "seed": (0, "of sampling"),
    "batch_size": (16, "pictures at once, with --images"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "export": ("", "write the model into this new folder, in Hugging Face's form and bfloat16; no question is asked"),
    "decoder_only": (False, "with --export: the language model alone, as a Qwen2"),
    "slim": ("", "write the checkpoint into this new folder, in bfloat16 and without what only training needs"),
}


def check_flags(flags: argparse.Namespace) -> None:
    "Before the model is loaded: a wrong value or path should not cost that wait."
    if flags.model:
        check_name(flags.model)
    top_p, penalty = (1 if x is None else x for x in (flags.top_p, flags.repetition_penalty))
    if not 0 < top_p <= 1 or min(flags.temperature or 0, flags.top_k or 0) < 0 or penalty <= 0:
        raise ValueError("--top_p must be in 0 to 1, --temperature and --top_k from 0, --repetition_penalty above 0")
    if flags.anyres not in ("auto", "True", "False"):
        raise ValueError(f"--anyres={flags.anyres}: choose auto, True or False")
    for path in flags.image:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such image file")
    if flags.attention and (not flags.image or not flags.attention.endswith(".png")):
        raise ValueError(f"--attention={flags.attention}: give --image too, and a name that ends in .png")


def load(flags) -> tuple[VLM, Tokenizer]:
    device = pick_device(flags.device)
    # Half the bytes, and an answer is as fast as the weights can be read. Not on CPUs: most are far slower in bfloat16.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = [] if flags.init else checkpoints(flags.out_dir, flags.model or "tiny")
    folder = flags.init or (found[0][0] if found else "" if flags.model else TINY)
    if folder:
        vlm = load_checkpoint(folder, device, dtype)
    elif flags.model in FROM_SCRATCH:  # training would begin with random weights; their answers are noise
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}: train one by `python train_sft.py "
                         f"--model={flags.model}`, or name a checkpoint folder by --init=")
    else:  # text_only: an untrained bridge would give the decoder noise instead of the picture
        vlm, folder = load_pretrained(flags.model, device=device, dtype=dtype, text_only=True)
    # The tokenizer is in the folder of the weights: with another one's ids the same weights would write noise.
    tokenizer = Tokenizer.from_pretrained(folder)
    # Which of several models answers is easily mistaken, so it is printed; to standard error, as it is not the answer.
    run = vlm.config.run
    made = f": {run['stage']}, step {run['step']} of {run['steps']}, trained on {run['data']}, " \
           f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(run['saved']))}" if "saved" in run else ""
    note(f"({folder}{made}; {device})")
    if folder == TINY:
        note(f"(nothing is trained under {flags.out_dir}/tiny yet: this small model comes with the code)")
    for older, its in found[1:]:
        if STAGES.index(its["stage"]) > STAGES.index(found[0][1]["stage"]) and older.name in STAGES:
            note(f"({older} is older: it did not start from this one; --init={older} asks it)")
    check_ability(vlm, folder, flags)
    return vlm.eval(), tokenizer


def check_ability(vlm: VLM, folder, flags) -> None:
    "One line instead of noise, where a model is asked for what it has not learned."
    asks, shows = flags.question != FLAGS["question"][0], bool(flags.image or flags.images)
    run = vlm.config.run
    learned, scratch = set(run.get("chapters", STAGES)), vlm.config.preset in FROM_SCRATCH
    if not learned & {"align", "sft", "rl"} and (shows or scratch):
        raise ValueError(f"{folder} has read text only and cannot see: run train_align.py and train_sft.py")
    if scratch and not learned & {"sft", "rl"} and (asks or flags.chat or flags.serve):
        raise ValueError(f"{folder} has learned to describe pictures, not to answer: run train_sft.py, or leave "
                         "--question out")
    other_work = flags.chat or flags.serve or flags.export or flags.slim
    if not (shows or other_work) and (not asks or scratch and run.get("data") == "world"):
        raise ValueError("no picture to ask about: give one by --image=PATH (cat.jpg is there to try)")


# ----------------------------------------------------------------------------------------------------------------------
# Asking

def options(vlm: VLM, flags) -> dict:
    # What is given; else the publisher's; else generate's own defaults, greedy as in the evaluation: the answers shown
    # are the answers measured.
    given = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
             if getattr(flags, name) is not None}
    return {"max_new_tokens": flags.max_new_tokens, **vlm.config.generation, **given}


def to_pixels(vlm: VLM, path, flags, alone: bool = True):
    "-> uint8 [3, S, S], or Tiles. alone: the conversation has no other picture."
    if vlm.vit is None:
        raise ValueError(f"{vlm.config.preset} cannot see: it is a language model, and its bridge is not trained; run "
                         f"`python train_align.py --model={vlm.config.preset}` and train_sft.py, or ask llava-ov-0.5b")
    # Size and filter belong to the checkpoint: its ViT was trained on pixels made in this way.
    config, image = vlm.config.vision, load_image(path)
    anyres = flags.anyres == "True" or (flags.anyres == "auto" and vlm.gpt.embed.weight.is_cuda)
    if anyres and alone and vlm.config.bridge.newline:  # LLaVA-OneVision was trained on tiles of single pictures only
        return cut_tiles(image, config.image_size, config.bicubic)
    return preprocess(image, config.image_size, config.bicubic, config.pad)


def user_message(question: str, images: int) -> dict:
    # Content may be a string, in which "<image>" marks a picture's place, or a list of parts. We use parts: what a user
    # types then stays text, even if it contains "<image>", and slots always match the pictures.
    # Pictures, a newline, the question: the order that the training data has. Without a picture, no newline.
    return {"role": "user",
            "content": [{"type": "image"}] * images + [{"type": "text", "text": "\n" * bool(images) + question}]}


def make_request(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, flags, width: int = 0) -> Request:
    "width: of the engine's cache, which a long conversation leaves less room for the answer; 0: as much as needed."
    prompt = tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, pixels)), add_generation_prompt=True)
    given = options(vlm, flags)
    if width:
        given["max_new_tokens"] = max(1, min(given["max_new_tokens"], width - len(prompt.ids)))
    return Request(prompt, pixels, stop=set(tokenizer.stop_ids), seed=flags.seed, **given)


class Text:
    "Tokens -> text. One may be a part of a character (an emoji has 4 bytes): it waits for the rest."

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: list[int], last: bool = False) -> str:
        return self.decoder.decode(self.tokenizer.decode_bytes(ids), last)  # special tokens are left out


def stream(engine: Engine, tokenizer: Tokenizer, request: Request) -> str:
    "Print the answer token by token, and return it."
    text, out = Text(tokenizer), ""
    while not request.finish:
        engine.step()
        out += (new := text.add(request.answer[-1:]))
        print(new, end="", flush=True)  # without flush, a pipe shows nothing before the end
    print(end := text.add([], last=True))
    return out + end


HELP = """/image PATH  show a picture; ask about it with the next question
/draw        draw a scene of the built-in world, save it here and show it
/undo        take back the last question and its answer
/save FILE   write the conversation as a JSON record, which data.py reads, with copies of its pictures
/reset       start over
/help        this list
/quit        end (also /exit, Ctrl-D)"""


class Chat:
    "A conversation on the terminal. Answers alone go to standard output: `--chat < questions.txt > answers.txt` works."

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, flags):
        self.vlm, self.tokenizer, self.flags = vlm, tokenizer, flags
        # One row for the whole conversation: each turn is prefilled from where the last one ended.
        width = min(CONTEXT, vlm.config.decoder.max_position_embeddings)
        self.engine = Engine(vlm, rows=1, width=width, vocab_used=tokenizer.vocab_size)
        self.reset("")
        for path in flags.image:
            self.image(path)

    def reset(self, rest: str) -> None:
        # turns: (question, its pictures, answer). waiting: pictures shown since the last question, before the next one;
        # each is (path, pixels).
        self.turns, self.waiting = [], []

    def image(self, rest: str) -> None:
        # As shells do, because paths are pasted and dragged in from there: quotes around, ~ for the home folder.
        path = os.path.expanduser(rest.strip().strip("'\""))
        self.waiting.append((path, to_pixels(self.vlm, path, self.flags, alone=False)))
        note("(picture loaded; ask about it)")

    def draw(self, rest: str) -> None:
        path = next(path for i in range(1, 10 ** 6) if not (path := Path(f"scene{i}.png")).exists())
        draw_scene(secrets.randbits(32)).save(path)
        note(f"(drew {path})")
        self.image(str(path))

    def undo(self, rest: str) -> None:
        if not self.turns and not self.waiting:
            raise ValueError("nothing to take back")
        question = self.turns.pop()[0] if self.turns and not self.waiting else "the picture"
        self.waiting = []
        note(f"(took back: {question})")

    def save(self, rest: str) -> None:
        if not rest.strip():
            raise ValueError("/save FILE: name the file")
        messages = []
        for question, shown, answer in self.turns:
            messages += [{"role": "user", "content": "<image>" * len(shown) + "\n" * bool(shown) + question},
                         {"role": "assistant", "content": answer}]
        # Its pictures are copied beside it: a record may only name what is in its own folder (data.py).
        path, images = Path(os.path.expanduser(rest.strip().strip("'\""))), []
        for source, _ in (picture for _, shown, _ in self.turns for picture in shown):
            images.append(f"{path.stem}-{len(images) + 1}{Path(source).suffix}")
            shutil.copyfile(source, path.with_name(images[-1]))
        record = [{"id": "chat", "messages": messages, "images": images}]
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"(wrote {path})")

    def ask(self, question: str) -> None:
        # Parts, not strings: what people and models write stays text, even if it contains "<image>".
        messages, turns = [], [*self.turns, (question, self.waiting, None)]
        for text, shown, answer in turns:
            messages.append(user_message(text, len(shown)))
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        request = make_request(self.vlm, self.tokenizer, messages, [pixels for _, shown, _ in turns
                               for _, pixels in shown], self.flags, self.engine.width)
        self.engine.submit(request)
        answer = stream(self.engine, self.tokenizer, request)
        self.turns, self.waiting = [*self.turns, (question, self.waiting, answer)], []

    def line(self, line: str) -> bool:
        "One line of input -> whether the chat goes on."
        word, _, rest = line.partition(" ")
        commands = {"/image": self.image, "/draw": self.draw, "/undo": self.undo, "/save": self.save,
                    "/reset": self.reset, "/help": lambda rest: note(HELP)}
        if word in ("/quit", "/exit"):
            return False
        try:  # a mistyped path should not cost the conversation so far
            if word.startswith("/") and word not in commands:
                raise ValueError(f"{word}: no such command; /help lists them")
            commands.get(word, lambda rest: self.ask(line) if line else None)(rest)
        except (ValueError, OSError) as error:
            note(f"error: {error}")
        return True


def draw_scene(seed: int) -> Image.Image:
    return World("captions", "scenes", seed)[0]["images"][0].draw(320)


def chat(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    talk = Chat(vlm, tokenizer, flags)
    note("Type a question. /image PATH shows a picture, /help lists all commands, /quit ends.")
    while True:
        # Not input("> "): it would write its prompt to standard output.
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()  # "" only at the end of input (Ctrl-D); an empty line is "\n"
        if not line or not talk.line(line.strip()):
            return


def answer_folder(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Every picture of a folder -> one line of --out: a JSON object with its answer, or with the error if it is broken."
    root, out = Path(flags.images), Path(flags.out)
    if not root.is_dir():
        raise ValueError(f"--images={root}: no such folder")
    # A large folder takes hours. A run that was stopped continues: what --out answers already is skipped. The question
    # is part of the key: another question is other work. Lines with an error do not count: those are tried again.
    done = set()
    if out.exists():
        # A line cut off by a crash is an error that names the file. Appending after it would spoil the next line too.
        with weights.named_errors(out):
            done = {(row["image"], row["question"])
                    for row in map(json.loads, out.read_text(encoding="utf-8").splitlines()) if "answer" in row}
    # Relative to the folder: it may be moved, and a.png in two subfolders stays two pictures. Sorted: the file system's
    # order differs from machine to machine.
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"--images={root}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names, failed, asked = [name for name in names if (name, flags.question) not in done], 0, {}
    if not names:
        return
    bridge = vlm.config.bridge
    # A picture in tiles has up to 1.21 * MOST_TOKENS times N tokens and some newlines.
    most = bridge.num_tokens if not bridge.newline else (2 + MOST_TOKENS * 5 // 4) * bridge.num_patches
    width = most + len(tokenizer.encode(flags.question)) + 100 + flags.max_new_tokens
    engine = Engine(vlm, rows=flags.batch_size, width=width, vocab_used=tokenizer.vocab_size)
    # Append, never rewrite: nothing that goes wrong later can harm the answers that are there.
    with open(out, "a", encoding="utf-8") as file:
        def write(name: str, **result) -> None:
            # ensure_ascii=False: answers in any script stay readable in the file. Flushed: a crash loses none of them.
            file.write(json.dumps({"image": name, "question": flags.question, **result}, ensure_ascii=False) + "\n")
            file.flush()

        def requests():  # read only when there is a row for it
            nonlocal failed
            for name in names:
                try:
                    pixels = to_pixels(vlm, root / name, flags)
                    request = make_request(vlm, tokenizer, [user_message(flags.question, 1)], [pixels], flags)
                except ValueError as error:
                    # One broken file among thousands must not end the run; its line says what is wrong with it.
                    failed += 1
                    note(f"error: {error}")
                    write(name, error=str(error))
                    continue
                asked[request] = name
                yield request
        # All with the same seed, and rows do not depend on each other: a run that was stopped gives the same answers
        # as one that was not, in whatever order they come.
        for n, request in enumerate(engine.run(requests()), 1):
            write(asked.pop(request), answer=tokenizer.decode(request.answer).strip())
            if n % flags.batch_size == 0 or n + failed == len(names):
                note(f"{n + failed} of {len(names)} pictures")
    # At the end, when all others are answered: exit code 1 tells a script that some are missing.
    if failed:
        raise ValueError(f"{failed} of {len(names)} pictures could not be read; {out} says which")


# ----------------------------------------------------------------------------------------------------------------------
# Where the model looked: the attention of each word over the picture's patches

def patch_shares(bridge: Bridge, features: torch.Tensor) -> torch.Tensor:
    "One picture's features [N, D] -> [M, N]: how much each image token has from each patch. Rows add up to 1."
    N = len(features)
    own = torch.eye(N, device=features.device)
    if bridge.config.kind == "mlp":
        return own
    # A shuffled vector is four patches side by side; a seeded latent starts from them too.
    four = pixel_shuffle(own[None])[0].view(N // 4, 4, N).mean(1)                                    # [N/4, N]
    if bridge.config.kind == "pixelshuffle":
        return four
    latents = bridge.perceiver.latents[None]
    seeded = bridge.perceiver.seed is not None
    latents = latents + bridge.perceiver.seed(pixel_shuffle(features[None])) if seeded else latents  # [1, M, D]
    shares = four if seeded else torch.full((latents.shape[1], N), 1 / N, device=features.device)    # [M, N]
    for layer in bridge.perceiver.layers:
        x = layer.norm_latents(latents)
        k = layer.kv(torch.cat([layer.norm_features(features[None]), x], dim=1)).chunk(2, dim=-1)[0]
        q, k = (t.view(t.shape[1], layer.num_heads, -1).transpose(0, 1) for t in (layer.q(x), k))    # [heads, .., d]
        weights = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).mean(0)                       # [M, N + M]
        # Attention rollout (arXiv 2005.00928): half is what the latent was before, half is what it attended to.
        shares = (shares + weights[:, :N] + weights[:, N:] @ shares) / 2
        latents = layer(latents, features[None])
    return shares


@torch.no_grad()
def where_it_looked(vlm: VLM, prompt, images: list, answer: list[int]) -> list[torch.Tensor]:
    "-> for each picture [A, n, n], 0 to 1: where each of the answer's A tokens looked more than usual."
    device, bridge, n = vlm.gpt.embed.weight.device, vlm.bridge, math.isqrt(vlm.config.vision.num_patches)
    encoded = PictureCache(vlm.vit_features, bridge, device)(images)
    columns = [torch.arange(len(tokens), device=device) + slot for slot, tokens in zip(prompt.slots, encoded)]
    # The last token is not needed: each is chosen at the position before it.
    ids = torch.tensor([list(prompt.ids) + list(answer)[:-1]], device=device)                        # [1, T]
    x, T, after = vlm.embed(ids, torch.cat(encoded), torch.cat(columns)), ids.shape[1], int(columns[-1][-1]) + 1
    rope, total = rope_table(torch.arange(T, device=device)[None], vlm.config.decoder), 0
    later = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)[after:]                        # [R, T]
    for block in vlm.gpt.blocks:  # R: the text behind the pictures, question and answer
        q, k, _ = block.attention.project(block.norm1(x), rope)
        q, k = q[0, after:].transpose(0, 1), k[0].repeat_interleave(q.shape[2] // k.shape[2], 1).transpose(0, 1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).float().masked_fill(later, -torch.inf)             # [heads, R, T]
        total, x = total + scores.softmax(-1).mean(0), block(x, rope)  # the mean over heads, the sum over layers
    maps = []
    for image, at in zip(images, columns):
        seen, tiled = total[:, at], isinstance(image, Tiles)                                         # [R, K]
        if tiled:  # the whole picture's tokens, and those of its parts, a newline behind each row
            h, w = image.layout(n)[2]
            parts = F.interpolate(seen[:, n * n:].view(-1, 1, h, w + 1)[..., :-1], (n, n), mode="area")[:, 0]
            grid = seen[:, :n * n].view(-1, n, n) + parts
        else:
            features = vlm.vit_features(image[None].to(device))[0]
            shares = patch_shares(bridge, features)
            grid = (seen[:, :len(shares)] @ shares).view(-1, n, n)
        # Every token looks everywhere a little, at some places always. What tells is where it looks more than the mean.
        grid = (grid - grid.mean(0)).clamp(min=0)[-len(answer):]
        # Words that look nowhere in particular stay dark, but not as dark as they are: their own maximum counts half.
        most = (grid.amax() * grid.amax((1, 2), keepdim=True)).sqrt().clamp(min=1e-9)
        maps.append((grid / most).cpu())
    return maps


def words_of(tokenizer: Tokenizer, answer: list[int], maps: list[torch.Tensor]) -> list[tuple[str, list]]:
    "-> (word, for each picture [n, n], the mean of its tokens'). A word begins with its white space."
    text, words = Text(tokenizer), []
    for i, token in enumerate(answer):
        piece = text.add([token], last=i == len(answer) - 1)
        if not words or piece[:1].isspace():
            words.append((piece, [i]))
        elif piece:
            words[-1] = words[-1][0] + piece, words[-1][1] + [i]
    return [(word, [m[at].mean(0) for m in maps]) for word, at in words if word]


def shade(image: Image.Image, shares: torch.Tensor, px: int) -> Image.Image:
    "A picture px wide, dark but for where [n, n] is high."
    image = image.resize((px, max(1, round(px * image.height / image.width))))
    light = F.interpolate(shares[None, None], image.size[::-1], mode="bicubic")[0, 0].clamp(0, 1)
    mask = Image.fromarray((light * 255).byte().numpy())
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.7), mask)


def draw_attention(path: str, vlm: VLM, tokenizer: Tokenizer, request: Request, images: list, px: int = 150) -> None:
    "One sheet: for each word of the answer the pictures, light where it looked."
    answer = [token for token in request.answer if token not in request.stop]
    words = words_of(tokenizer, answer, where_it_looked(vlm, request.prompt, request.images, answer) if answer else [])
    cells = [(word.strip(), shade(image, shares, px)) for word, maps in words for image, shares in zip(images, maps)]
    wide, high = 8, max((cell.height for _, cell in cells), default=0) + 28
    sheet = Image.new("RGB", (wide * (px + 8), max(1, -(-len(cells) // wide)) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (word, cell) in enumerate(cells):
        x, y = i % wide * (px + 8) + 4, i // wide * high + 4
        sheet.paste(cell, (x, y))
        pen.text((x, y + cell.height + 2), word, fill="black", font=ImageFont.load_default(16))
    sheet.save(path)
    note(f"(wrote {path})")


# ----------------------------------------------------------------------------------------------------------------------
# The server: OpenAI's chat completions, and a page. It answers strangers, so every limit is here, and has a test

CONTEXT = 8192          # tokens of a conversation with its answer, at most
BODY = 20_000_000       # bytes of a request
PICTURES = 8            # of a request
PIXELS = 20_000_000     # of a picture
TURNS = 100             # messages of a request
LETTERS = 400_000       # of their texts: more cannot fit into CONTEXT, and to cut them into tokens would take long
CHOICES = 8             # answers to one request (n)
WAITING = 128           # answers that wait for a row; then 429
CONNECTIONS = 256
SECONDS = 120           # for one answer, waiting included
IDLE = 20               # seconds in which the next request must have arrived as a whole
TELL = 0.001            # seconds for each streaming client, between two times that all of them get their tokens
PATIENCE = 0.0003       # seconds that newcomers wait for each other, for each request that stands still meanwhile
GRACE = 10              # seconds for what is being answered when the server is told to end
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # not all that Pillow opens: EPS, for one, starts another program
DECODING = threading.Semaphore(2)  # pictures unpacked at once: each may take 3 bytes a pixel
PAGE = Path(__file__).parent / "assets" / "page.html"


class Refused(Exception):
    "An answer in the form of OpenAI's errors."

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "param": param, "code": code, "type": {
            401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(
                status, "invalid_request_error")}}


@dataclass(eq=False)
class Asked(Request):
    "A request of a connection, whose thread waits at `out` for (index, new tokens, is it the end)."
    index: int = 0           # which of n choices
    streamed: bool = False   # else only the end is of interest
    told: int = 0            # tokens that it has been told
    came: float = field(default_factory=time.monotonic)
    out: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def tell(self, last: bool = False) -> None:
        self.out.put((self.index, self.answer[self.told:], last))
        self.told = len(self.answer)


class Server(http.server.ThreadingHTTPServer):
    "A thread for each connection, and one for the engine: it alone touches the model."
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, flags):
        self.vlm, self.tokenizer, self.flags, self.name = vlm, tokenizer, flags, vlm.config.preset or "model"
        width = min(CONTEXT, vlm.config.decoder.max_position_embeddings)
        self.engine = Engine(vlm, rows=flags.max_requests, width=width, vocab_used=tokenizer.vocab_size)
        self.stop = set(tokenizer.stop_ids)
        self.changed, self.jobs, self.inbox, self.ending = threading.Condition(), [], [], False
        self.deadlines = {}  # {handler: until when its next request must be there}
        self.connections = set()
        self.page = PAGE.read_bytes()
        # Only what is in the page itself runs: its one script and one style are named by their hashes.
        own = {tag: base64.b64encode(hashlib.sha256(re.search(rf"<{tag}>(.*?)</{tag}>", self.page.decode(), re.S)[1]
                                                    .encode()).digest()).decode() for tag in ("script", "style")}
        self.policy = (f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'; "
                       "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                       "frame-ancestors 'none'")
        self.address_family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        try:
            super().__init__((flags.host, flags.port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host={flags.host} --port={flags.port}: {error}; choose another") from None
        for work in (self.generate, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def server_bind(self) -> None:  # http.server's own asks a name server who we are, which may take seconds
        http.server.socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request, client_address) -> None:
        if len(self.connections) >= CONNECTIONS:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # those are connections that broke
            traceback.print_exc()

    def watch(self) -> None:
        "Connections that are idle, or send slowly, are closed: each would hold a thread."
        while True:
            time.sleep(min(1, IDLE / 4))
            for handler, deadline in list(self.deadlines.items()):
                if time.monotonic() > deadline:
                    handler.hang_up()

    def submit(self, requests: list[Asked]) -> None:
        with self.changed:
            if self.ending:
                raise Refused(503, "the server is about to end; ask again later")
            waiting = [r for r in [*self.inbox, *list(self.engine.waiting)] if not r.finish]
            if len(waiting) + len(requests) > WAITING:
                raise Refused(429, f"{WAITING} answers are waiting already; ask again in a few seconds",
                              code="rate_limit_exceeded")
            self.inbox += requests
            self.changed.notify()

    def do(self, job):
        "job() in the engine's thread, between two tokens -> its result."
        done = Future()
        with self.changed:
            self.jobs.append((done, job))
            self.changed.notify()
        return done.result()

    def generate(self) -> None:
        engine, told = self.engine, 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: engine.busy or self.jobs or self.inbox)
                jobs, self.jobs = self.jobs, []
                # Several prompts at once take hardly longer than one, and everyone else stands still for it.
                patience = PATIENCE * len(engine.running)
                if self.inbox and time.monotonic() - self.inbox[0].came >= patience:
                    engine.waiting.extend(self.inbox)
                    self.inbox = []
            for done, job in jobs:
                try:
                    done.set_result(job())
                except Exception as error:  # noqa: BLE001 it is raised again where it was asked for
                    done.set_exception(error)
            try:
                ended = engine.step() if engine.busy else []
            except Exception:  # noqa: BLE001 out of memory, for one: these answers fail, the next ones need not
                traceback.print_exc()
                ended = [*engine.running.values(), *engine.waiting]
                engine.waiting.clear()
                for request in ended:
                    request.finish = "error"
                for row, request in list(engine.running.items()):
                    engine.extend(row, request, 0)  # frees the row
                engine.kept.clear()
            # To wake a thread for every token of every client would take longer than to compute them: the more clients,
            # the more tokens come at once. A first token is told at once.
            streamed = [request for request in engine.running.values() if request.streamed]
            due = time.monotonic() - told > TELL * len(streamed)
            told = time.monotonic() if due else told
            for request in streamed:
                if due or not request.told:
                    request.tell()
            for request in ended:
                request.tell(last=True)


def number(body: dict, name: str, default, low, high, kinds=(int, float)):
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in kinds or not low <= value <= high:  # type: True is no 1
        kind = "a number" if float in kinds else "an integer"
        raise Refused(400, f"{name} must be {kind} from {low} to {high}", name)
    return value


# What would change the answer and is not built in is refused, never ignored. The last line changes nothing here.
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
         "top_k", "repetition_penalty", "seed", "stop", "n",
         "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {"frequency_penalty": (0, ), "presence_penalty": (0, ), "logit_bias": ({}, ), "logprobs": (False, ),
           "tools": ([], ), "response_format": ({"type": "text"}, ), "modalities": (["text"], )}


def read_picture(server: Server, url, where: str) -> Image.Image:
    "A data URI -> an RGB picture."
    match = isinstance(url, str) and re.match(r"data:image/[\w.+-]+;base64,", url[:100])
    if not match:  # http: and file: would make this server fetch for strangers what only it can reach
        raise Refused(400, f"{where}: send the picture itself, as data:image/png;base64,...; other addresses are not "
                      "opened", where)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(url[match.end():], validate=True)), formats=FORMATS)
    except Exception as error:  # noqa: BLE001 see load_image
        raise Refused(400, f"{where}: not a readable picture ({' '.join(str(error).split())[:100]})", where) from None
    if image.width * image.height > PIXELS:
        raise Refused(400, f"{where}: {image.width} x {image.height} pixels is over the limit of {PIXELS:,}", where)
    with DECODING:
        return load_image(image, where)


def read_messages(server: Server, messages) -> tuple[list, list]:
    "OpenAI's messages -> (ours, the pictures)."
    if not isinstance(messages, list) or not 1 <= len(messages) <= TURNS:
        raise Refused(400, f"messages must be a list of 1 to {TURNS}", "messages")
    out, images, letters = [], [], 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(400, f"{where}: role must be system, user or assistant", where)
        content = message.get("content")
        parts, texts, shown = [{"type": "text", "text": content}] if isinstance(content, str) else content, [], 0
        for j, part in enumerate(parts if isinstance(parts, list) else [None]):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif kind == "image_url" and role == "user" and isinstance(part.get("image_url"), (dict, str)):
                url = part["image_url"]
                if len(images) == PICTURES:
                    raise Refused(400, f"{where}: more than {PICTURES} pictures", where)
                images.append(read_picture(server, url.get("url") if isinstance(url, dict) else url, where))
                shown += 1
            else:
                raise Refused(400, f"{where}: content must be a text, or a list of parts of the types text and (of a "
                              f"user) image_url; part {j} is not", where)
        # Pictures first, then the words: the order in which the model has learned them.
        text = "\n".join(texts)
        letters += len(text)
        if letters > LETTERS:
            raise Refused(400, f"more than {LETTERS:,} letters of text", where, "context_length_exceeded")
        out.append(user_message(text, shown) if role == "user" else {
            "role": role.replace("developer", "system"), "content": [{"type": "text", "text": text}]})
    return out, images


def read_request(server: Server, body) -> tuple[list[Asked], list[str], dict]:
    "The JSON body of a request -> (one Asked for each choice, texts that end an answer, the body)."
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    for name, value in body.items():
        if name not in KNOWN and value is not None and not any(value == neutral for neutral in NEUTRAL.get(name, ())):
            raise Refused(400, f"{name[:50]} is not supported by this server", name[:50], "unsupported_parameter")
    if body.get("model") not in (None, server.name):
        raise Refused(404, f"the model {str(body['model'])[:50]!r} is not here; this is {server.name}", "model",
                      "model_not_found")
    for name, kind in (("stream", bool), ("stream_options", dict)):
        if not isinstance(body.get(name), (kind, type(None))):
            raise Refused(400, f"{name} must be a {kind.__name__}", name)
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if type(stops) is not list or len(stops) > 4 or not all(type(s) is str and 0 < len(s) <= 100 for s in stops):
        raise Refused(400, "stop must be a text or up to 4 texts, of at most 100 letters", "stop")
    vlm, defaults = server.vlm, options(server.vlm, server.flags)
    given = {"temperature": number(body, "temperature", defaults.get("temperature", 0.0), 0, 2),
             "top_p": number(body, "top_p", defaults.get("top_p", 1.0), 1e-6, 1),
             "top_k": number(body, "top_k", defaults.get("top_k", 0), 0, 10 ** 6, (int, )),
             "repetition_penalty": number(body, "repetition_penalty", defaults.get("repetition_penalty", 1.0), 0.1, 10)}
    n, width = number(body, "n", 1, 1, CHOICES, (int, )), server.engine.width
    seed = number(body, "seed", secrets.randbits(31), -2 ** 63, 2 ** 63 - 1, (int, ))
    longest = number(body, "max_tokens", None, 1, width, (int, ))
    longest = number(body, "max_completion_tokens", longest, 1, width, (int, ))
    messages, images = read_messages(server, body.get("messages"))
    pixels = [to_pixels(vlm, image, server.flags, alone=len(images) == 1) for image in images]
    prompt = server.tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, pixels)) if images else 1,
                                     add_generation_prompt=True)
    if len(prompt.ids) + (longest or 1) > width:
        raise Refused(400, f"{len(prompt.ids):,} tokens and an answer of up to {longest or 1:,}: there is room for "
                      f"{width:,}", "messages", "context_length_exceeded")
    longest = longest or min(defaults["max_new_tokens"], width - len(prompt.ids))
    out = queue.SimpleQueue()
    return [Asked(prompt, pixels, longest, server.stop, seed=seed + i, index=i, out=out,
                  streamed=bool(body.get("stream") or stops), **given) for i in range(n)], stops, body


class Choice:
    "One answer on its way to a client: text as far as it is certain that no stop text begins in it."

    def __init__(self, tokenizer: Tokenizer, stops: list[str]):
        self.text, self.held, self.stops, self.content, self.finish = Text(tokenizer), "", stops, "", ""

    def add(self, ids: list[int], last: bool = False) -> str:
        "-> what can be shown now."
        if self.finish:
            return ""
        text = self.held + self.text.add(ids, last)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        keep = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                                  default=0)
        if ends:
            text, keep, self.finish = text[:min(ends)], 0, "stop"
        self.held, new = text[len(text) - keep:], text[:len(text) - keep]
        self.content += new
        return new


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", IDLE, True
    server_version, sys_version = "GhostVis", ""

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self)

    def finish(self) -> None:
        self.server.connections.discard(self)
        self.server.deadlines.pop(self, None)
        super().finish()

    def handle_one_request(self) -> None:
        self.server.deadlines[self] = time.monotonic() + IDLE
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the connection is gone
            self.close_connection = True

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args) -> None:
        # Escaped: what a client sends must not forge lines or move the cursor of the terminal.
        note(f"{self.client_address[0]} {(format % args)[:200].encode('unicode_escape').decode()}")

    def send(self, status: int, body: bytes, kind: str, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin", **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value, status: int = 200, **headers) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", **headers)

    def refuse(self, error: Refused) -> None:
        # What is left of a body would be taken for the next request.
        self.close_connection = True
        retry = {"Retry_After": 5} if error.status in (429, 503) else {}
        self.send_json(error.body, error.status, **retry)

    def send_error(self, code, message=None, explain=None) -> None:
        "What http.server itself finds wrong: a request line, a header, a method."
        self.command, self.request_version = getattr(self, "command", None), self.protocol_version
        self.refuse(Refused(405 if code == 501 else min(code, 499), str(message or code)[:200]))

    def guard(self) -> None:
        "A page elsewhere must not reach a local server through its visitor's browser."
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        try:  # An attacker's name may point here (DNS rebinding); a bare address cannot be of that kind.
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            if host.lower() not in ("localhost", self.server.flags.host, socket.gethostname().lower()):
                raise Refused(403, "the Host header names another machine") from None
        origin = self.headers.get("Origin")
        if origin not in (None, f"http://{self.headers.get('Host')}", f"https://{self.headers.get('Host')}"):
            raise Refused(403, "requests of pages from elsewhere are not answered")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "send the body as one piece, with its Content-Length")
        key = self.server.flags.api_key
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        if key and self.path.split("?")[0] not in ("/", "/health") and not hmac.compare_digest(sent, key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def read_json(self):
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,12}", lengths[0]):
            raise Refused(411, "one Content-Length is needed")
        if int(lengths[0]) > BODY:
            raise Refused(413, f"a body of {lengths[0]} bytes is over the limit of {BODY:,}")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        raw = self.rfile.read(int(lengths[0]))
        if len(raw) < int(lengths[0]):
            raise ConnectionError
        self.server.deadlines.pop(self, None)  # it has arrived

        def no_number(text):
            raise ValueError(f"{text} is not JSON")
        try:
            return json.loads(raw.decode("utf-8"), parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {str(error)[:100]}") from None

    def route(self) -> None:
        routes = {("GET", "/"): self.get_page, ("GET", "/health"): self.get_health, ("GET", "/draw"): self.get_scene,
                  ("GET", "/v1/models"): self.get_models, ("POST", "/v1/chat/completions"): self.complete,
                  ("POST", "/look"): self.look}
        path, command = self.path.split("?")[0], self.command.replace("HEAD", "GET")
        try:
            if self.request_version == "HTTP/0.9":  # which knows no headers
                return self.send_error(400, "speak HTTP/1.1")
            self.guard()
            if (command, path) not in routes:
                known = any(path == other for _, other in routes)
                raise Refused(405 if known else 404, f"{'this method is' if known else 'there is'} not here: "
                              f"{command} {path[:100]}")
            if command == "GET" and self.headers.get("Content-Length", "0") != "0":
                raise Refused(400, "a GET has no body")
            self.server.deadlines.pop(self, None) if command == "GET" else None
            routes[command, path]()
        except Refused as error:
            self.refuse(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except ValueError as error:  # a conversation that cannot be rendered, a picture that is cut short, ...
            self.refuse(Refused(400, str(error)[:500]))
        except Exception:  # noqa: BLE001 a mistake of ours; the next request need not suffer
            traceback.print_exc()
            self.refuse(Refused(500, "an error inside the server; its log says more"))

    do_GET = do_HEAD = do_POST = route

    def get_page(self) -> None:
        self.send(200, self.server.page, "text/html; charset=utf-8", Content_Security_Policy=self.server.policy)

    def get_health(self) -> None:
        engine = self.server.engine
        self.send_json({"status": "ending" if self.server.ending else "ok", "running": len(engine.running),
                        "waiting": len(engine.waiting) + len(self.server.inbox)})

    def get_models(self) -> None:
        vlm, flags = self.server.vlm, self.server.flags
        self.send_json({"object": "list", "data": [{
            "id": self.server.name, "object": "model", "created": 0, "owned_by": "ghostvis",
            "context": self.server.engine.width, "sees": vlm.vit is not None, "most_pictures": PICTURES,
            "world": vlm.config.preset in FROM_SCRATCH,
            "parameters": sum(p.numel() for p in vlm.parameters()), "defaults": options(vlm, flags)}]})

    def get_scene(self) -> None:
        file = io.BytesIO()
        draw_scene(secrets.randbits(32)).save(file, "PNG")
        self.send(200, file.getvalue(), "image/png")

    def gone(self) -> bool:
        "Whether the client has hung up."
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def complete(self) -> None:
        requests, stops, body = read_request(self.server, self.read_json())
        streamed, include = bool(body.get("stream")), (body.get("stream_options") or {}).get("include_usage")
        head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": self.server.name,
                "object": "chat.completion" + ".chunk" * streamed}
        choices = [Choice(self.server.tokenizer, stops) for _ in requests]
        self.server.submit(requests)
        try:
            if streamed:
                self.close_connection = True  # its end is the end of the body
                self.send_response(200)
                for line in ("Content-Type: text/event-stream", "Cache-Control: no-store", "Connection: close",
                             "X-Content-Type-Options: nosniff"):
                    self.send_header(*line.split(": "))
                self.end_headers()
                self.events({**head, "choices": [{"index": i, "delta": {"role": "assistant", "content": ""},
                                                  "finish_reason": None}]} for i in range(len(choices)))
            for i, new, finish in self.tokens(requests, choices):
                if streamed:
                    self.events([{**head, "choices": [{"index": i, "delta": {"content": new} if new else {},
                                                       "finish_reason": finish}]}] if new or finish else [])
        except Refused as error:
            if not streamed:
                raise
            self.events([error.body])  # the head is sent already; clients read this too
            return
        finally:
            for request in requests:  # a client that hung up frees its rows
                request.finish = request.finish or "cancelled"
        prompt, said = len(requests[0].prompt.ids), sum(len(r.answer) for r in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
                 "prompt_tokens_details": {"cached_tokens": requests[0].reused}}
        if streamed:
            self.events([{**head, "choices": [], "usage": usage}] if include else [])
            self.wfile.write(b"data: [DONE]\n\n")
            return
        self.send_json({**head, "usage": usage, "choices": [{
            "index": i, "finish_reason": choice.finish, "logprobs": None, "message": {
                "role": "assistant", "content": choice.content, "refusal": None}} for i, choice in enumerate(choices)]})

    def events(self, chunks) -> None:
        self.wfile.write(b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks))

    def tokens(self, requests: list[Asked], choices: list[Choice]):
        "-> (which choice, its new text, why it ended or None), as tokens arrive."
        until, open_ = time.monotonic() + SECONDS, set(range(len(requests)))
        while open_:
            try:
                i, ids, last = requests[0].out.get(timeout=0.2)
            except queue.Empty:
                if self.gone():
                    raise ConnectionError from None
                if time.monotonic() < until:
                    continue
                i, ids, last = min(open_), [], True
            request, choice = requests[i], choices[i]
            if request.finish == "error":
                raise Refused(500, "an error inside the server; its log says more")
            if i not in open_:
                continue
            text = choice.add(ids, last)
            if last or choice.finish:
                open_.discard(i)
                choice.finish = choice.finish or ("stop" if request.finish == "stop" else "length")
                request.finish = request.finish or "cancelled"
            yield i, text, choice.finish or None

    def look(self) -> None:
        "The page's question where each word of an answer, the last message, was seen."
        body = self.read_json()
        messages, images = read_messages(self.server, body.get("messages") if isinstance(body, dict) else None)
        vlm, tokenizer = self.server.vlm, self.server.tokenizer
        if messages[-1]["role"] != "assistant" or not images:
            raise Refused(400, "a conversation with a picture, and the answer as its last message", "messages")
        pixels = [to_pixels(vlm, image, self.server.flags, alone=len(images) == 1) for image in images]
        prompt = tokenizer.render(messages[:-1], list(map(vlm.config.bridge.tokens_of, pixels)), True)
        answer = tokenizer.encode(messages[-1]["content"][0]["text"])
        if not 0 < len(answer) <= self.server.engine.width - len(prompt.ids):
            raise Refused(400, "an empty answer, or one that is too long", "messages")
        maps = self.server.do(lambda: where_it_looked(vlm, prompt, pixels, answer))
        self.send_json({"words": [{"text": word, "maps": [(m * 255).int().tolist() for m in shares]}
                                  for word, shares in words_of(tokenizer, answer, maps)]})


def serve(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Until SIGTERM or Ctrl-C: then no new requests, and those that run may finish."
    local = flags.host == "localhost" or flags.host.startswith("127.") or flags.host == "::1"
    if not local and not flags.api_key:
        note(f"warning: --host={flags.host} can be reached from other machines, and there is no --api_key")
    server, end = Server(vlm, tokenizer, flags), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    note(f"http://{flags.host}:{server.server_port}/ is a page; the API is under /v1 (model {server.name}); Ctrl-C "
         "ends")
    end.wait()
    server.ending = True
    server.shutdown()
    until = time.monotonic() + GRACE
    while (server.engine.busy or server.jobs or server.inbox) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # the last words are on their way
    note("ended")


# ----------------------------------------------------------------------------------------------------------------------
# Export: into Hugging Face's form

def export(folder, vlm: VLM, tokenizer, decoder_only: bool = False, dtype=torch.bfloat16) -> None:
    """
    Write a Hugging Face folder that transformers and serving engines load: a LLaVA (bridge "mlp"), or the decoder alone
    as a Qwen2. Other bridges exist only in this project; the decoder beside them can be exported.
    """
    folder, config = Path(folder), vlm.config
    if not decoder_only and config.bridge.kind != "mlp":
        raise ValueError(f"Hugging Face has no model with a {config.bridge.kind} bridge: train with --bridge=mlp, "
                         "or export the decoder alone by --decoder_only")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; give --export= a new folder")
    tokenizer.save_hub(folder, config.decoder.max_position_embeddings)
    text = {**asdict(config.decoder), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end, "pad_token_id": tokenizer.endoftext}
    files = {"config.json": text, "generation_config.json": {
        "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.endoftext,
        "do_sample": config.generation.get("temperature", 0) > 0, **config.generation}}
    if not decoder_only:
        files |= llava_files(config, text, tokenizer.image_pad)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = hub_tensors(vlm.gpt, weights.QWEN_NAMES) if decoder_only else hub_tensors(vlm, weights.LLAVA_NAMES)
    weights.write_safetensors({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors",
                      {"format": "pt"})


def slim(folder, vlm: VLM, tokenizer: Tokenizer) -> None:
    "A checkpoint to share: bfloat16 instead of float32, no optimizer. It answers, and training can start from it."
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder}: is not empty; give --slim= a new folder")
    with weights.replace_folder(folder) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
        tokenizer.save(new)
        weights.write_safetensors({name: p.bfloat16() for name, p in vlm.named_parameters()},
                                  new / "model.safetensors", {"format": "pt"})


def hub_tensors(module: nn.Module, table: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    "The inverse of weights.load_tensors: the module's weights under the hub's names and in its shapes."
    tensors, parameters = {}, dict(module.named_parameters())
    for ours, theirs in weights.hub_names(module, table, prefix).items():
        if ".lora_" in ours:  # part of its matrix, see merged
            continue
        value, owner = parameters[ours].detach(), module.get_submodule(ours.rpartition(".")[0])
        if isinstance(owner, LoRALinear) and ours.endswith("weight"):
            value = owner.merged().detach()
        if ours.endswith("patch.weight"):  # flat here, a convolution's [D, 3, P, P] there
            P = math.isqrt(value.shape[1] // 3)
            value = value.view(len(value), 3, P, P)
        # Stacked ones are cut apart: the decoder's query, key and value by their heads, all others into equal parts.
        owner = module.get_submodule(ours.rsplit(".", 2)[0]) if len(theirs) > 1 else None
        sizes = owner.sizes if isinstance(owner, Attention) else [len(value) // len(theirs)] * len(theirs)
        tensors |= dict(zip(theirs, value.split(sizes)))
    return tensors


def llava_files(config: VLMConfig, text: dict, image_pad: int) -> dict[str, dict]:
    "The JSON files of a LLaVA or LLaVA-OneVision folder, by name."
    vision, tiled, mean = config.vision, config.bridge.newline, [0.5, 0.5, 0.5]
    side, name = vision.image_size, "LlavaOnevision" if config.bridge.newline else "Llava"
    pinpoints = [[h * side, w * side] for h in range(1, MOST_TILES + 1) for w in range(1, MOST_TILES + 1)]
    layout = {"image_grid_pinpoints": pinpoints, "vision_aspect_ratio": f"anyres_max_{MOST_TOKENS}"} if tiled else {}
    return {
        "config.json": {
            "model_type": "llava_onevision" if tiled else "llava", "architectures": [f"{name}ForConditionalGeneration"],
            "image_token_index": image_pad, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_feature_layer": config.bridge.layer, "vision_feature_select_strategy": "full",
            "image_seq_length": vision.num_patches, "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": text["torch_dtype"], "text_config": text, **layout,
            "vision_config": {
                "model_type": "siglip_vision_model", "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh",
                **{f.name: getattr(vision, f.name) for f in fields(ViTConfig) if f.name not in ("bicubic", "pad")}}},
        "preprocessor_config.json": {
            "image_processor_type": f"{name}ImageProcessor" if tiled else "SiglipImageProcessor",
            "processor_class": f"{name}Processor", "do_resize": True, "size": {"height": side, "width": side},
            "resample": 3 if vision.bicubic else 2, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": mean, "image_std": mean, "do_convert_rgb": True, **layout},
        "processor_config.json": {
            "processor_class": f"{name}Processor", "vision_feature_select_strategy": "full",
            **({"num_image_tokens": vision.num_patches, "image_token": "<image>", "video_token": "<video>"} if tiled
               else {"patch_size": vision.patch_size, "image_token": "<|image_pad|>",
                     "num_additional_image_tokens": 0})},
    }


def main() -> None:
    flags = parse_flags(__doc__, FLAGS)
    check_flags(flags)
    vlm, tokenizer = load(flags)
    if flags.export:
        export(flags.export, vlm, tokenizer, flags.decoder_only)
        note(f"wrote {flags.export}")
    elif flags.slim:
        slim(flags.slim, vlm, tokenizer)
        note(f"wrote {flags.slim}")
    elif flags.images:
        answer_folder(vlm, tokenizer, flags)
    elif flags.serve:
        serve(vlm, tokenizer, flags)
    elif flags.chat:
        chat(vlm, tokenizer, flags)
    else:  # several --image: all of them before the one question, in the order given
        pixels = [to_pixels(vlm, path, flags, alone=len(flags.image) == 1) for path in flags.image]
        request = make_request(vlm, tokenizer, [user_message(flags.question, len(pixels))], pixels, flags)
        stream(Engine(vlm, [request], vocab_used=tokenizer.vocab_size), tokenizer, request)
        if flags.attention:
            draw_attention(flags.attention, vlm, tokenizer, request, list(map(load_image, flags.image)))


if __name__ == "__main__":
    run(main)
