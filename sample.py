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

From top to bottom: the flags and the model; asking, on which all else is built; the chat; a folder of pictures; where
the model looked; the server; export. Each part can be read alone. How an answer is computed is in model.py (Engine).
"""
import base64
import codecs
import contextlib
import http.server
import inspect
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
import socketserver
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from data import draw_sheet, parse_flags, pick_device, run  # first: see its imports
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import weights
from model import (FROM_SCRATCH, PRESETS, STAGES, Attention, Engine, LoRALinear, Request, VLM, VLMConfig, check_name,
                   checkpoints, load_checkpoint, load_pretrained, rope_table)
from tokenizer import Tokenizer
from vision import (MOST_TILES, MOST_TOKENS, Bridge, PictureCache, Tiles, cut_tiles, load_image, pixel_shuffle,
                    preprocess)
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


def check_flags(flags) -> None:
    "Before the model is loaded: a wrong value or path should not cost that wait."
    if flags.model:
        check_name(flags.model)
    top_p, penalty = (1 if x is None else x for x in (flags.top_p, flags.repetition_penalty))
    written = [Path(path) for path in (flags.attention, flags.images and flags.out) if path]
    new = [Path(folder) for folder in (flags.export, flags.slim) if folder]
    works = ["--" + work for work in ("export", "slim", "images", "serve", "chat", "attention") if getattr(flags, work)]
    for wrong, message in [
        (not (0 < top_p <= 1 and (flags.temperature or 0) >= 0 <= (flags.top_k or 0) and penalty > 0),  # so NaN is, too
         "--top_p must be in 0 to 1, --temperature and --top_k from 0, --repetition_penalty above 0"),
        (len(works) > 1, f"{' and '.join(works)}: give one of them at a time"),
        (flags.anyres not in ("auto", "True", "False"), f"--anyres={flags.anyres}: choose auto, True or False"),
        *((not Path(path).is_file(), f"{path}: no such image file") for path in flags.image),
        (flags.images and not Path(flags.images).is_dir(), f"--images={flags.images}: no such folder"),
        (flags.attention and not (flags.image and flags.attention.endswith(".png")),
         f"--attention={flags.attention}: give --image too, and a name that ends in .png"),
        *((not path.parent.is_dir(), f"{path}: there is no folder {path.parent}; make it first") for path in written),
        *((folder.exists() and any(folder.iterdir()), f"{folder}: is not empty; name a new folder") for folder in new),
    ]:
        if wrong:
            raise ValueError(message)


def load(flags) -> tuple[VLM, Tokenizer]:
    "In this order: the folder of --init, the newest checkpoint of --model, its released weights, the tiny model."
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
    # Training never saves NaN; a file from elsewhere may hold it, and then every answer would be blank.
    if broken := [name for name, p in vlm.named_parameters() if not p.sum(dtype=torch.float32).isfinite()]:
        raise ValueError(f"{folder}: {broken[0]} holds NaN or infinity, so every answer would be noise; take another "
                         "checkpoint, or fetch this one again")
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

CONTEXT = 8192  # tokens of a conversation with its answer, at most
SAMPLING = "temperature", "top_k", "top_p", "repetition_penalty"


def options(vlm: VLM, flags) -> dict:
    "How to choose tokens: as Request's fields."
    # What is given; else the publisher's; else generate's own defaults, greedy as in the evaluation: the answers shown
    # are the answers measured.
    given = {name: getattr(flags, name) for name in SAMPLING if getattr(flags, name) is not None}
    # No answer is longer than what the model can read: a huge --max_new_tokens must not ask for as much memory.
    most = min(flags.max_new_tokens, vlm.config.decoder.max_position_embeddings)
    return {"max_new_tokens": most, **vlm.config.generation, **given}


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


def make_message(text: str, images: int = 0, role: str = "user") -> dict:
    "-> as `render` takes it; images: how many are shown with the text."
    # Content may be a string, in which "<image>" marks a picture's place, or a list of parts. We use parts: what people
    # and models write then stays text, even if it contains "<image>", and slots always match the pictures.
    # Pictures, a newline, the question: the order that the training data has. Without a picture, no newline.
    return {"role": role,
            "content": [{"type": "image"}] * images + [{"type": "text", "text": "\n" * bool(images) + text}]}


def render(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list):
    "-> the prompt: its ids, and the slots where each picture's image tokens begin. It ends where the answer begins."
    return tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, pixels)), add_generation_prompt=True)


def make_request(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, flags, width: int = 0) -> Request:
    "width: of the engine's cache, which a long conversation leaves less room for the answer; 0: as much as needed."
    prompt, given = render(vlm, tokenizer, messages, pixels), options(vlm, flags)
    if width:
        given["max_new_tokens"] = max(1, min(given["max_new_tokens"], width - len(prompt.ids)))
    return Request(prompt, pixels, stop=set(tokenizer.stop_ids), seed=flags.seed, **given)


def open_engine(vlm: VLM, tokenizer: Tokenizer, rows: int) -> Engine:
    "For conversations, which grow: each row has room for as much as the model can read, or for CONTEXT tokens."
    width = min(CONTEXT, vlm.config.decoder.max_position_embeddings)
    return Engine(vlm, rows=rows, width=width, vocab_used=tokenizer.vocab_size)


class Text:
    """
    The tokens of an answer -> text that can be shown, piece by piece. Two things wait until more is known: a token that
    is a part of a character (an emoji has 4 bytes), and words that may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str] = ()):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.held, self.ended = stops, "", False  # ended: a stop text was found
        self.tokens = 0  # how many have been added

    def add(self, ids: list[int], last: bool = False) -> str:
        self.tokens += len(ids)
        # Special tokens are left out.
        text = self.held + self.decoder.decode(self.tokenizer.decode_bytes(ids), last)
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.held, self.ended = "", True
            return text[:min(found)]
        # The longest end of the text with which a stop text begins.
        keep = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        shown = len(text) - keep * (not last)
        self.held = text[shown:]
        return text[:shown]


def stream(engine: Engine, tokenizer: Tokenizer, request: Request) -> str:
    "Print the answer token by token, and return it."
    text, out = Text(tokenizer), ""
    while not request.finish:
        engine.step()
        out += (new := text.add(request.answer[text.tokens:], last=bool(request.finish)))
        print(new, end="", flush=True)  # without flush, a pipe shows nothing before the end
    print()
    return out


def typed_path(text: str) -> Path:
    "As shells do, because paths are pasted and dragged in from there: 'quotes', ~ for the home folder, my\\ cat.jpg."
    if not text.strip():
        raise ValueError("/image PATH, /save FILE: name the file")
    return Path(os.path.expanduser(text.strip().strip("'\"").replace("\\ ", " ")))


class Chat:
    """
    /image PATH  show a picture; ask about it with the next question
    /draw        draw a scene of the built-in world, save it here and show it
    /undo        take back the last picture that no question has shown, else the last question and its answer
    /save FILE   write the conversation as a JSON record, which data.py reads, with copies of its pictures
    /reset       start over
    /help        this list
    /quit        end (also /exit, Ctrl-D); Ctrl-C ends an answer
    """
    # The text above is what /help says. Each command has its method, do_NAME.

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, flags):
        self.vlm, self.tokenizer, self.flags = vlm, tokenizer, flags
        # One row for the whole conversation: each turn is prefilled from where the last one ended.
        self.engine = open_engine(vlm, tokenizer, rows=1)
        self.do_reset()
        for path in flags.image:
            self.do_image(path)

    def do_reset(self, rest: str = "") -> None:
        self.messages, self.pictures = [], []  # questions and answers in turn; (path, pixels)
        self.saved = set()  # files that hold this conversation: saved again, they lose nothing

    def do_image(self, rest: str) -> None:
        path = typed_path(rest)
        self.pictures.append((path, to_pixels(self.vlm, path, self.flags, alone=False)))
        note("(picture loaded; ask about it)")

    def do_draw(self, rest: str) -> None:
        path = next(path for i in range(1, 10 ** 6) if not (path := Path(f"scene{i}.png")).exists())
        draw_scene().save(path)
        note(f"(drew {path})")
        self.do_image(str(path))

    def asked(self) -> int:
        "How many pictures belong to the questions so far; those after them are for the next one."
        return sum(part["type"] == "image" for message in self.messages for part in message["content"])

    def do_undo(self, rest: str) -> None:
        if len(self.pictures) > self.asked():
            what = self.pictures.pop()[0]
        elif self.messages:
            what = self.messages[-2]["content"][-1]["text"].strip()
            del self.messages[-2:]
            del self.pictures[self.asked():]
        else:
            raise ValueError("nothing to take back")
        note(f"(took back: {what})")

    def do_save(self, rest: str) -> None:
        path, images = typed_path(rest), []
        if not self.messages:
            raise ValueError("nothing to save yet")
        if path.exists() and path not in self.saved:
            raise ValueError(f"{path} would be lost: name a new file")
        # Its pictures are copied beside it: a record may only name what is in its own folder (data.py).
        for source, _ in self.pictures[:self.asked()]:
            images.append(f"{path.stem}-{len(images) + 1}{source.suffix}")
            copy = path.with_name(images[-1])
            if not copy.exists():
                shutil.copyfile(source, copy)
            elif copy.read_bytes() != source.read_bytes():
                raise ValueError(f"{copy} is another picture, which would be lost: save under another name")
        record = [{"id": "chat", "messages": self.messages, "images": images}]
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.saved.add(path)
        note(f"(wrote {path})")

    def do_help(self, rest: str) -> None:
        note(inspect.cleandoc(self.__doc__))

    def ask(self, text: str) -> None:
        question = make_message(text, len(self.pictures) - self.asked())
        request = make_request(self.vlm, self.tokenizer, [*self.messages, question],
                               [pixels for _, pixels in self.pictures], self.flags, self.engine.width)
        self.engine.submit(request)
        # Ctrl-C ends the answer, not the chat. An exception could end the engine in the middle of a step, so: a flag.
        usual = signal.signal(signal.SIGINT, lambda *_: setattr(request, "finish", request.finish or "cancelled"))
        try:
            answer = stream(self.engine, self.tokenizer, request)
        finally:
            signal.signal(signal.SIGINT, usual)
        if answer or request.finish != "cancelled":
            self.messages += [question, make_message(answer, role="assistant")]

    def run(self) -> None:
        "Answers alone go to standard output: `--chat < questions.txt > answers.txt` works."
        note("Type a question. /image PATH shows a picture, /help lists all commands, /quit ends.")
        while True:
            # Not input("> "): it would write its prompt to standard output.
            print("> ", end="", file=sys.stderr, flush=True)
            # "" only at the end of input (Ctrl-D); an empty line is "\n". Files from Windows may begin with a mark.
            line = sys.stdin.readline().removeprefix("\ufeff")
            word, _, rest = line.strip().partition(" ")
            if not line or word in ("/quit", "/exit"):
                return
            try:  # a mistyped path should not cost the conversation so far
                # Dragged into the terminal; some quote the path. isfile: a long question is no file, and no error.
                if word.startswith(("/", "'", '"', "~")) and os.path.isfile(typed_path(line)):
                    self.do_image(line)
                elif not word.startswith("/"):
                    self.ask(line.strip()) if word else None
                elif command := getattr(self, "do_" + word[1:], None):
                    command(rest)
                else:
                    raise ValueError(f"{word}: no such command; /help lists them")
            except (ValueError, OSError) as error:
                note(f"error: {error}")


def draw_scene() -> Image.Image:
    "A new picture of the built-in world, which is all that the small models know."
    return World("captions", "scenes", secrets.randbits(32))[0]["images"][0].draw(320)


def answer_folder(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Every picture of a folder -> one line of --out: a JSON object with its answer, or with the error if it is broken."
    root, out = Path(flags.images), Path(flags.out)
    # A large folder takes hours. A run that was stopped continues: what --out answers already is skipped. The question
    # is part of the key: another question is other work. Lines with an error do not count: those are tried again.
    done, lines = set(), [""]
    if out.exists():
        # A line cut off by a crash is an error that names the file. Appending after it would spoil the next line too.
        with weights.named_errors(out):
            lines = out.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at an answer's U+2028
            done = {(row.get("image"), row.get("question"))
                    for row in map(json.loads, filter(None, lines)) if "answer" in row}
    # Relative to the folder: it may be moved, and a.png in two subfolders stays two pictures. Sorted: the file system's
    # order differs from machine to machine.
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"--images={root}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names, failed = [name for name in names if (name, flags.question) not in done], 0
    if not names:
        return
    bridge = vlm.config.bridge
    # A picture in tiles has up to 1.21 * MOST_TOKENS times N tokens and some newlines.
    most = bridge.num_tokens if not bridge.newline else (2 + MOST_TOKENS * 5 // 4) * bridge.num_patches
    width = most + len(tokenizer.encode(flags.question)) + 100 + flags.max_new_tokens
    engine = Engine(vlm, rows=flags.batch_size, width=width, vocab_used=tokenizer.vocab_size)
    # Append, never rewrite: nothing that goes wrong later can harm the answers that are there.
    with open(out, "a", encoding="utf-8") as file:
        file.write("\n" * bool(lines[-1]))  # an editor may have left the last line without its end

        def write(name: str, **result) -> None:
            # ensure_ascii=False: answers in any script stay readable in the file. Flushed: a crash loses none of them.
            file.write(json.dumps({"image": name, "question": flags.question, **result}, ensure_ascii=False) + "\n")
            file.flush()

        def requests():  # a picture is read only when there is a row for it
            nonlocal failed
            for name in names:
                try:
                    pixels = to_pixels(vlm, root / name, flags)
                except ValueError as error:
                    # One broken file among thousands must not end the run; its line says what is wrong with it.
                    failed += 1
                    note(f"error: {error}")
                    write(name, error=str(error))
                else:
                    request = make_request(vlm, tokenizer, [make_message(flags.question, 1)], [pixels], flags)
                    request.name = name
                    yield request
        # All with the same seed, and rows do not depend on each other: a run that was stopped gives the same answers
        # as one that was not, in whatever order they come.
        for n, request in enumerate(engine.run(requests()), 1):
            write(request.name, answer=tokenizer.decode(request.answer).strip())
            if n % flags.batch_size == 0 or n + failed == len(names):
                note(f"{n + failed} of {len(names)} pictures")
    # At the end, when all others are answered: exit code 1 tells a script that some are missing.
    if failed:
        raise ValueError(f"{failed} of {len(names)} pictures could not be read; {out} says which")


# ----------------------------------------------------------------------------------------------------------------------
# Where the model looked: the attention of each word over the picture's patches
# Two attentions lie one behind the other. In the decoder each word attends to the image tokens (where_it_looked); in
# the bridge each image token was made of patches (patch_shares). Multiplied, they tell what a word has of each patch.
# It is a hint, not a proof: attention shows where information could come from, not what was made of it.

def patch_shares(bridge: Bridge, features: torch.Tensor) -> torch.Tensor:
    "One picture's features [N, D] -> [M, N]: how much each image token has from each patch. Rows add up to 1."
    N = len(features)
    own = torch.eye(N, device=features.device)
    if bridge.config.kind == "mlp":
        return own
    # A shuffled vector is four patches side by side; a seeded latent starts from them too.
    four = pixel_shuffle(own[None])[0].view(N // 4, 4, N).mean(1)                                    # [N/4, N]
    if bridge.perceiver is None:
        return four
    # The Perceiver: as its forward, layer by layer, but for the attention weights, which the fused kernel never shows.
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
    # The whole conversation once more, in one pass without a cache, in which all attention weights are kept.
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


def shade(image: Image.Image, shares: torch.Tensor, px: int = 150) -> Image.Image:
    "The picture in a square px wide, dark but for where shares [n, n] is high."
    image = ImageOps.contain(image, (px, px))
    light = F.interpolate(shares[None, None], image.size[::-1], mode="bicubic")[0, 0].clamp(0, 1)
    mask = Image.fromarray((light * 255).byte().numpy())
    shaded = Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.7), mask)
    return ImageOps.pad(shaded, (px, px), color="white")


def draw_attention(path: str, vlm: VLM, tokenizer: Tokenizer, request: Request, images: list) -> None:
    "One sheet: for each word of the answer the pictures, light where it looked."
    answer = [token for token in request.answer if token not in request.stop]
    if not answer:
        raise ValueError(f"{path}: the answer has no words to draw")
    words = words_of(tokenizer, answer, where_it_looked(vlm, request.prompt, request.images, answer))
    cells = [(shade(image, shares), word.strip()) for word, maps in words for image, shares in zip(images, maps)]
    draw_sheet(path, [cell for cell, _ in cells], [[(word, "black")] for _, word in cells], columns=8, px=158)
    note(f"(wrote {path})")


# ----------------------------------------------------------------------------------------------------------------------
# The server: OpenAI's chat completions, and a page. It answers strangers, so every limit is here, and has a test
# A request's way: Handler.route checks who asks; read_fields, read_messages and read_request check what is asked and
# make Requests of it; Server.generate computes their tokens, together with everyone else's; Handler.words makes text of
# them; Handler.complete sends it.

BODY = 20_000_000       # bytes of a request
PICTURES = 8            # of a request
PIXELS = 20_000_000     # of a picture
TURNS = 100             # messages of a request
LETTERS = 400_000       # of their texts: more cannot fit into CONTEXT, and to cut them into tokens would take long
CHOICES = 8             # answers to one request (n)
WAITING = 128           # answers that wait for a row; then 429
CONNECTIONS = 256       # open at once; each has a thread
SECONDS = 120           # for one answer, waiting included
IDLE = 20               # seconds in which the next request must have arrived as a whole
TELL = 0.001            # seconds for each running answer, between two times that all clients get their tokens
PATIENCE = 0.0003       # seconds that newcomers wait for each other, for each request that stands still meanwhile
GRACE = 10              # seconds for what is being answered when the server is told to end
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # not all that Pillow opens: EPS, for one, starts another program
DECODING = threading.Semaphore(2)  # pictures unpacked at once: each may take 3 bytes a pixel
PAGE = Path(__file__).parent / "assets" / "page.html"


class Refused(ValueError):
    "An answer in the form of OpenAI's errors. param: the field at fault; code: what programs tell errors apart by."

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        self.status, self.body = status, {"error": {
            "message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": code}}


class Server(socketserver.ThreadingTCPServer):
    """
    A thread for each connection, and one for the engine: it alone computes. They meet in three places:

        inbox    functions of the connections' threads, which the engine's calls between two tokens: "answer these, too"
        answer   a Request's list of tokens, which the engine's thread makes longer and a connection's thread reads
        news     an Event by which the engine wakes the connection's thread: there are more tokens
    """
    # Not http.server's own class: it would ask a name server who we are, which may take seconds.
    allow_reuse_address, daemon_threads, block_on_close, request_queue_size = True, True, False, 128

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, flags):
        self.vlm, self.tokenizer, self.flags, self.name = vlm, tokenizer, flags, vlm.config.preset or "model"
        self.engine = open_engine(vlm, tokenizer, flags.max_requests)
        self.stop = set(tokenizer.stop_ids)
        self.inbox = queue.SimpleQueue()  # functions, for the engine's thread
        self.lock, self.open, self.ending = threading.Lock(), {}, False  # open: {request: its news}, unanswered ones
        self.connections = set()
        self.address_family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        try:
            super().__init__((flags.host, flags.port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host={flags.host} --port={flags.port}: {error}; choose another") from None
        self.server_port = self.server_address[1]
        threading.Thread(target=self.generate, daemon=True).start()

    # Three methods that socketserver calls at the beginning and the end of a connection, and when its thread fails.

    def verify_request(self, request, client_address) -> bool:
        self.connections.add(request)
        return len(self.connections) <= CONNECTIONS

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # those are connections that broke
            traceback.print_exc()

    @contextlib.contextmanager
    def answering(self, requests: list[Request]):
        """
        The block waits for the answers, and gets the Event that tells of news of them. However the block ends, also
        because the client hung up, their rows are free again.
        """
        news = threading.Event()
        with self.lock:
            if self.ending:
                raise Refused(503, "the server is about to end; ask again later")
            if len(self.open) + len(requests) > self.engine.rows + WAITING:
                raise Refused(429, f"{WAITING} answers are waiting already; ask again in a few seconds",
                              code="rate_limit_exceeded")
            self.open |= dict.fromkeys(requests, news)
        self.inbox.put(lambda: self.engine.waiting.extend(requests))
        try:
            yield news
        finally:
            with self.lock:
                for request in requests:
                    request.finish = request.finish or "cancelled"
                    del self.open[request]

    def generate(self) -> None:
        "The engine's thread: what is in the inbox, then one token more for everyone, and so on."
        opened = told = 0.0
        while True:
            engine, now = self.engine, time.monotonic()
            # Several prompts at once take hardly longer than one, and everyone else stands still for it. So the inbox
            # is opened less often the more there are. What comes while it is being emptied waits for the next time.
            if now - opened >= PATIENCE * len(engine.running):
                opened = now
                for _ in range(max(self.inbox.qsize(), 0 if engine.busy else 1)):  # nothing to do: it sleeps in get
                    self.inbox.get()()
            try:
                ended = engine.step()
            except Exception:  # noqa: BLE001 out of memory, for one: these answers fail, the next ones need not
                traceback.print_exc()
                ended = [*engine.running.values(), *engine.waiting]
                for request in ended:
                    request.finish = "error"
                engine.close()  # the new one takes over its memory
                self.engine = open_engine(self.vlm, self.tokenizer, self.flags.max_requests)
            # To wake a thread for every token of every client would take longer than to compute them: the more clients,
            # the more tokens come at once. A first token, and the end, are told at once.
            running = list(self.engine.running.values())
            due = now - told > TELL * len(running)
            told = now if due else told
            for request in ended + [request for request in running if due or len(request.answer) == 1]:
                if news := self.open.get(request):
                    news.set()


# The fields that a request may have: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, ...}
# Numbers have a kind and a range, others a type. top_k and repetition_penalty are not OpenAI's but vLLM's.
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 1e-6, 1), "top_k": (int, 0, 10 ** 6),
           "repetition_penalty": (float, 0.1, 10), "seed": (int, -2 ** 63, 2 ** 63 - 1), "n": (int, 1, CHOICES),
           "max_tokens": (int, 1, CONTEXT), "max_completion_tokens": (int, 1, CONTEXT)}
OTHERS = {"messages": list, "model": str, "stop": (str, list), "stream": bool, "stream_options": dict}
# What would change the answer and is not built in is refused, never ignored. With these values it changes nothing.
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [],
           "response_format": {"type": "text"}, "modalities": ["text"]}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # for statistics only


def read_fields(server: Server, body: dict) -> dict:
    "The JSON body of a request -> its fields that are not null, checked."
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in NUMBERS:
            kind, least, most = NUMBERS[name]
            if type(value) not in (int, kind) or not least <= value <= most:  # type: True is an instance of int
                kind = "an integer" if kind is int else "a number"
                raise Refused(400, f"{name} must be {kind} from {least} to {most}", name)
        elif name in OTHERS:
            if not isinstance(value, OTHERS[name]):
                raise Refused(400, f"{name} is of the wrong type: {type(value).__name__}", name)
        elif name not in IGNORED and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise Refused(400, f"{name[:50]} is not supported by this server", name[:50], "unsupported_parameter")
    if fields.get("model", server.name) != server.name:
        raise Refused(404, f"the model {fields['model'][:50]!r} is not here; this is {server.name}", "model",
                      "model_not_found")
    stops = fields.get("stop", [])
    fields["stop"] = stops = [stops] if isinstance(stops, str) and stops else list(stops)
    if len(stops) > 4 or not all(type(stop) is str and 0 < len(stop) <= 100 for stop in stops):
        raise Refused(400, "stop must be a text or up to 4 texts, of at most 100 letters", "stop")
    return fields


def read_picture(url: str) -> Image.Image:
    "A data URI -> an RGB picture."
    head, _, content = url.partition(",")
    # http: and file: would make this server fetch for strangers what only it can reach.
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head[:100]):
        raise ValueError("send the picture itself, as data:image/png;base64,...; other addresses are not opened")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)), formats=FORMATS)
    except Exception as error:  # noqa: BLE001 see load_image
        raise ValueError(f"not a readable picture ({' '.join(str(error).split())[:100]})") from None
    if image.width * image.height > PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is over the limit of {PIXELS:,}")
    with DECODING:
        return load_image(image, "the picture")


def read_message(message, images: list) -> dict:
    "One of OpenAI's messages -> one of ours. Its pictures are added to `images`."
    match message:
        case {"role": "system" | "developer" | "user" | "assistant" as role, "content": str() | list() as content}:
            texts, before = [], len(images)
        case _:
            raise ValueError("role must be system, user or assistant, and content a text or a list of parts")
    for i, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} if role == "user":
                images.append(read_picture(url))
            case _:
                raise ValueError(f"part {i} is neither a text nor, of a user, an image_url with a data: URI")
        if len(images) > PICTURES:
            raise ValueError(f"more than {PICTURES} pictures")
    # Pictures first, then the words: the order in which the model has learned them.
    return make_message("\n".join(texts), len(images) - before, role.replace("developer", "system"))


def read_messages(server: Server, messages) -> tuple[list, list]:
    "-> (our messages, the pixels of their pictures)."
    if not isinstance(messages, list) or not 1 <= len(messages) <= TURNS:
        raise Refused(400, f"messages must be a list of 1 to {TURNS}; for more, start over", "messages")
    out, images = [], []
    for i, message in enumerate(messages):
        try:
            out.append(read_message(message, images))
        except ValueError as error:
            raise Refused(400, f"messages[{i}]: {error}", f"messages[{i}]") from None
    if sum(len(message["content"][-1]["text"]) for message in out) > LETTERS:
        raise Refused(400, f"more than {LETTERS:,} letters of text", "messages", "context_length_exceeded")
    return out, [to_pixels(server.vlm, image, server.flags, alone=len(images) == 1) for image in images]


def read_request(server: Server, fields: dict) -> list[Request]:
    "-> one Request for each of the n choices. Only their seeds differ; the engine prefills their prompt once."
    messages, pixels = read_messages(server, fields.get("messages"))
    prompt, width = render(server.vlm, server.tokenizer, messages, pixels), server.engine.width
    given = options(server.vlm, server.flags)
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if len(prompt.ids) + (most or 1) > width:
        raise Refused(400, f"{len(prompt.ids):,} tokens and an answer of up to {most or 1:,}: there is room for "
                      f"{width:,}; send less, or start over", "messages", "context_length_exceeded")
    given["max_new_tokens"] = most or min(given["max_new_tokens"], width - len(prompt.ids))
    given |= {name: fields[name] for name in SAMPLING if name in fields}
    seed = fields.get("seed", secrets.randbits(31))
    return [Request(prompt, pixels, stop=server.stop, seed=seed + i, **given) for i in range(fields.get("n", 1))]


class Incoming(socket.SocketIO):
    "What a connection receives. All bytes of a request share one deadline: a slow sender must not hold its thread."
    deadline = 0.0

    def readinto(self, buffer) -> int:
        self._sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        return super().readinto(buffer)


class Handler(http.server.BaseHTTPRequestHandler):
    "One connection: requests and answers, one after the other. http.server reads their first lines and headers."
    # default_request_version: 0.9 knows no headers, and a malformed first line would be answered without any.
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version, disable_nagle_algorithm = "GhostVis", "", True
    events = False  # whether the head of a stream of events has been sent

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Incoming(self.connection, "r"))

    def handle_one_request(self) -> None:
        self.rfile.raw.deadline = time.monotonic() + IDLE
        super().handle_one_request()

    def log_message(self, format: str, *args) -> None:
        # Escaped: what a client sends must not forge lines or move the cursor of the terminal.
        note(f"{self.client_address[0]} {(format % args)[:200].encode('unicode_escape').decode()}")

    def send(self, content, kind: str = "application/json", status: int = 200, **headers) -> None:
        "content: bytes, or what is sent as JSON; None: it follows as a stream of events."
        self.connection.settimeout(IDLE)  # Incoming has set another
        self.send_response(status)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers |= {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
        headers |= {"Content-Length": len(body)} if content is not None else {}
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if content is not None and self.command != "HEAD":
            self.wfile.write(body)

    def send_event(self, value) -> None:
        "Server-sent events: lines such as data: {...}, each followed by an empty one."
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def refuse(self, error: Refused) -> None:
        self.close_connection = True  # what is left of a body would be taken for the next request
        if self.events:  # too late for a status; clients read this too
            return self.send_event(error.body)
        self.send(error.body, status=error.status, **{"Retry-After": 5} if error.status in (429, 503) else {})

    def send_error(self, code, message=None, explain=None) -> None:
        "What http.server itself finds wrong: a request line, a header, a method."
        self.refuse(Refused(405 if code == 501 else min(code, 499), str(message or code)[:200]))

    def route(self) -> None:
        path, command = self.path.split("?")[0], self.command.replace("HEAD", "GET")
        method, answer = {
            "/": ("GET", self.get_page), "/health": ("GET", self.get_health), "/draw": ("GET", self.get_scene),
            "/v1/models": ("GET", self.get_models), "/v1/chat/completions": ("POST", self.complete),
            "/look": ("POST", self.look)}.get(path, ("", None))
        try:
            self.guard(path)
            if command != method:
                raise Refused(405 if method else 404, f"there is no {command} {path[:100]} here")
            if command == "GET" and self.headers.get("Content-Length", "0") != "0":
                raise Refused(400, "a GET has no body")
            answer()
        except ValueError as error:  # any other: a conversation that cannot be rendered, a body that is no JSON, ...
            self.refuse(error if isinstance(error, Refused) else Refused(400, str(error)[:500]))
        except OSError:  # the connection broke, see Server.handle_error
            raise
        except Exception:  # noqa: BLE001 a mistake of ours; the next request need not suffer
            traceback.print_exc()
            self.refuse(Refused(500, "an error inside the server; its log says more"))

    do_GET = do_HEAD = do_POST = route

    def guard(self, path: str) -> None:
        "A page elsewhere must not reach a local server through its visitor's browser."
        host = self.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        try:  # An attacker's name may point here (DNS rebinding); a bare address cannot be of that kind.
            ipaddress.ip_address(name)
        except ValueError:
            if name not in ("localhost", self.server.flags.host.lower(), socket.gethostname().lower()):
                raise Refused(403, "the Host header names another machine") from None
        if self.headers.get("Origin") not in (None, f"http://{host}", f"https://{host}"):
            raise Refused(403, "requests of pages from elsewhere are not answered")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "send the body as one piece, with its Content-Length")
        key = self.server.flags.api_key
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it came
        # compare_digest takes equally long for all wrong keys: the time does not tell how much of one is right.
        if key and path not in ("/", "/health") and not secrets.compare_digest(sent, key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def read_json(self) -> dict:
        "The body, checked before and while it is read: its length is what the client says, and may be a lie."
        length = ", ".join(self.headers.get_all("Content-Length", []))
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refused(411, "one Content-Length is needed")
        if int(length) > BODY:
            raise Refused(413, f"a body of {length} bytes is over the limit of {BODY:,}")
        # The other types are those that a form of a page elsewhere could send without being asked.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ConnectionError("hung up")
        body = weights.parse_json(raw, "the body")
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return body

    def get_page(self) -> None:
        # Only what is in the page itself runs: its script and its style know the word that is made up for this answer.
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: "
                  "blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        self.send(page.encode(), "text/html; charset=utf-8", **{"Content-Security-Policy": policy})

    def get_health(self) -> None:
        running = len(self.server.engine.running)
        self.send({"status": "ending" if self.server.ending else "ok", "running": running,
                   "waiting": max(0, len(self.server.open) - running)})

    def get_models(self) -> None:
        vlm, flags = self.server.vlm, self.server.flags
        self.send({"object": "list", "data": [{
            "id": self.server.name, "object": "model", "created": 0, "owned_by": "ghostvis",
            "context": self.server.engine.width, "sees": vlm.vit is not None, "most_pictures": PICTURES,
            "world": vlm.config.preset in FROM_SCRATCH,
            "parameters": sum(p.numel() for p in vlm.parameters()), "defaults": options(vlm, flags)}]})

    def get_scene(self) -> None:
        file = io.BytesIO()
        draw_scene().save(file, "PNG")
        self.send(file.getvalue(), "image/png")

    def complete(self) -> None:
        "The chat completions of OpenAI's API, as one JSON object or as a stream of events."
        fields = read_fields(self.server, self.read_json())
        requests, streamed = read_request(self.server, fields), fields.get("stream", False)
        head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": self.server.name,
                "object": "chat.completion" + ".chunk" * streamed}
        said, why = [""] * len(requests), [""] * len(requests)  # of each choice: its text, and why it has ended

        def send_chunk(i: int, delta: dict, finish: str | None = None) -> None:
            self.send_event({**head, "choices": [{"index": i, "delta": delta, "finish_reason": finish}]})

        with self.server.answering(requests) as news:
            if streamed:
                self.events = self.close_connection = True  # the end of the connection is the end of the body
                self.send(None, "text/event-stream")
                for i in range(len(requests)):
                    send_chunk(i, {"role": "assistant", "content": ""})
            for i, new, why[i] in self.words(requests, fields["stop"], news):
                said[i] += new
                if streamed and (new or why[i]):
                    send_chunk(i, {"content": new} if new else {}, why[i] or None)
        prompt, answer = len(requests[0].prompt.ids), sum(len(request.answer) for request in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
                 "prompt_tokens_details": {"cached_tokens": requests[0].reused}}
        if streamed:
            if fields.get("stream_options", {}).get("include_usage"):
                self.send_event({**head, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        self.send({**head, "usage": usage, "choices": [
            {"index": i, "finish_reason": why[i], "logprobs": None,
             "message": {"role": "assistant", "content": text, "refusal": None}} for i, text in enumerate(said)]})

    def words(self, requests: list[Request], stops: list[str], news: threading.Event):
        "-> (which choice, its new text, why it has ended or an empty string), as tokens arrive."
        until, texts = time.monotonic() + SECONDS, {i: Text(self.server.tokenizer, stops) for i in range(len(requests))}
        while texts:
            news.wait(0.2)
            news.clear()  # before the tokens are read: what comes later sets it again
            if self.gone():  # an answer to nobody would hold its row to the end
                raise ConnectionError("hung up")
            for i, text in list(texts.items()):
                # The end is read before the tokens: the engine writes it behind the last of them.
                request, finish = requests[i], requests[i].finish or "length" * (time.monotonic() > until)
                if finish == "error":
                    raise Refused(500, "an error inside the server; its log says more")
                new = text.add(request.answer[text.tokens:], last=bool(finish))
                finish = "stop" if text.ended else finish
                if finish:
                    request.finish = request.finish or "cancelled"  # its row is free while the other choices go on
                    del texts[i]
                yield i, new, finish

    def gone(self) -> bool:
        "Whether the client has hung up."
        # A closed connection can be read, and gives nothing. MSG_PEEK leaves what else is there for the next request.
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def look(self) -> None:
        "The page's question where each word of an answer, the last message, was seen."
        server = self.server
        messages, pixels = read_messages(server, self.read_json().get("messages"))
        if messages[-1]["role"] != "assistant" or not pixels:
            raise Refused(400, "a conversation with a picture, and the answer as its last message", "messages")
        prompt = render(server.vlm, server.tokenizer, messages[:-1], pixels)
        answer = server.tokenizer.encode(messages[-1]["content"][0]["text"])
        if not 0 < len(answer) <= server.engine.width - len(prompt.ids):
            raise Refused(400, "an empty answer, or one that is too long", "messages")
        # The engine's thread comes to the barrier between two tokens, and stands still until this one is there again.
        still = threading.Barrier(2)
        server.inbox.put(lambda: [still.wait(), still.wait()])
        still.wait()
        try:
            maps = where_it_looked(server.vlm, prompt, pixels, answer)
        finally:
            still.wait()
        self.send({"words": [{"text": word, "maps": [(m * 255).int().tolist() for m in shares]}
                             for word, shares in words_of(server.tokenizer, answer, maps)]})


def serve(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Until SIGTERM or Ctrl-C: then no new requests, and those that run may finish."
    local = flags.host in ("localhost", "::1") or flags.host.startswith("127.")
    if not local and not flags.api_key:
        note(f"warning: --host={flags.host} can be reached from other machines, and there is no --api_key")
    server, end = Server(vlm, tokenizer, flags), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    note(f"http://{host}:{server.server_port}/ is a page; the API is under /v1 (model {server.name}); Ctrl-C ends")
    end.wait()
    server.ending = True
    server.shutdown()
    server.server_close()  # who comes now is refused; connections that are open go on
    until = time.monotonic() + GRACE
    while server.open and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # the last words are on their way
    note("ended")


# ----------------------------------------------------------------------------------------------------------------------
# Export: into Hugging Face's form
# The numbers are the same there; names, shapes and configuration files differ. That all of it fits is tested by letting
# transformers load the folder and compute the same logits.

def export(folder, vlm: VLM, tokenizer, decoder_only: bool = False, dtype=torch.bfloat16) -> None:
    """
    Write a Hugging Face folder that transformers and serving engines load: a LLaVA (bridge "mlp"), or the decoder alone
    as a Qwen2. Other bridges exist only in this project; the decoder beside them can be exported.
    """
    folder, config = Path(folder), vlm.config
    if not decoder_only and config.bridge.kind != "mlp":
        raise ValueError(f"Hugging Face has no model with a {config.bridge.kind} bridge: train with --bridge=mlp, "
                         "or export the decoder alone by --decoder_only")
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
    # With tiles it is a LLaVA-OneVision, which brings its own image processor; without, a LLaVA with SigLIP's.
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
                **{name: value for name, value in asdict(vision).items() if name not in ("bicubic", "pad")}}},
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
        Chat(vlm, tokenizer, flags).run()
    else:  # several --image: all of them before the one question, in the order given
        pixels = [to_pixels(vlm, path, flags, alone=len(flags.image) == 1) for path in flags.image]
        request = make_request(vlm, tokenizer, [make_message(flags.question, len(pixels))], pixels, flags)
        stream(Engine(vlm, [request], vocab_used=tokenizer.vocab_size), tokenizer, request)
        if flags.attention:
            draw_attention(flags.attention, vlm, tokenizer, request, list(map(load_image, flags.image)))


if __name__ == "__main__":
    run(main)
