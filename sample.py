"""
Use a trained model: ask about one picture, chat, answer about a whole folder, or export it for a serving engine.

    python sample.py --image cat.jpg                                  # describe it
    python sample.py --image cat.jpg --question "What colour is the cat?"
    python sample.py --chat                                           # a conversation; /image PATH shows a picture
    python sample.py --images holiday/ --out answers.jsonl            # a whole folder, one JSON line per picture
    python sample.py --prompt="ROMEO:"                                # continue a text, as after train_base.py
    python sample.py --serve                                          # a page in the browser, and OpenAI's API
    python sample.py --model=llava-ov-0.5b --image photo.jpg          # a finished public model, downloaded once
    python sample.py --model=qwen2.5-0.5b-instruct --chat             # a language model without vision
    python sample.py --export=my_llava                                # the model as a Hugging Face folder, for serving
    python sample.py --slim=my_model                                  # the checkpoint in a quarter of its bytes

Standard output contains the answer alone, so that it can be piped; everything else goes to standard error. The
checkpoint is --init, or the one written last of --model's under --out_dir, or --model's released weights; before you
have trained anything, a tiny one that comes with the code. The prompt is made by the same `render` as in training: a
prompt that differs even slightly from what a model was trained on is the most common reason for bad answers.

From top to bottom: the flags and the model; the chat; a folder of pictures; `ask`, one question. What they share is in
extras/asking.py; how an answer is computed is in model.py (VLM.prefill and decode) and plumbing/engine.py.
"""
import inspect
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from plumbing.flags import parse_flags, pick_device, run  # before torch: see plumbing/files.py

import torch

from plumbing.checkpoints import STAGES, checkpoints
from plumbing.engine import Engine
from plumbing.files import named_errors, say
from plumbing.pictures import load_image
from model import FROM_SCRATCH, PRESETS, VLM, check_name, load_checkpoint, load_pretrained
from tokenizer import Tokenizer
from extras.asking import (draw_scene, make_completion, make_message, make_request, only_pictures, open_engine,
                           open_pixels, stream)
from extras.attention_maps import draw_attention
from extras.export import export, slim
from extras.server import check_port, serve

# A folder often contains other files too. They are recognised by their names: opening each one would take long.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

EMPTY = "(the answer is empty: the model ended it at once)"

TINY = Path(__file__).with_name("assets") / "tiny"  # a small trained checkpoint that comes with the code

FLAGS = {  # name: (default, meaning); a type instead of a default: not given
    "image": ([], "picture to ask about; may be given several times"),
    "images": ("", "folder of pictures: ask about each, answers go to --out"),
    "question": ("Describe the picture.", "what to ask"),
    "prompt": ("", "a text to continue, without a picture and without the form of a chat"),
    "attention": ("", "with --image: draw into this .png where each word of the answer looked"),
    "chat": (False, "talk on the terminal"),
    "serve": (False, "answer on --host and --port: a page for people, OpenAI's API for programs"),
    "host": ("127.0.0.1", "address to serve; 0.0.0.0: every network, so give --api_key"),
    "port": (8000, "port to serve; 0: any free one"),
    "api_key": ("", "with --serve: what a program must send as its key; empty: none"),
    "allow_origins": ("", "with --serve: pages elsewhere that may ask, http://localhost:3000, comma-separated"),
    "max_requests": (32, "with --serve: answered at once; more wait. Each has 8,192 tokens of memory: a qwen2.5-1.5b's "
                         "are 0.23 GB"),
    "out": ("answers.jsonl", "with --images; pictures that it already answers are skipped"),
    "init": ("", "checkpoint folder; empty: the one written last under OUT_DIR/MODEL"),
    "model": ("", f"{', '.join(PRESETS)}, or a hub id, Org/Name; empty: tiny"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "tiles": (int, "cut a large picture into so many squares at most: small print becomes legible, and each takes as "
                   "many tokens; not given: as the model was trained (llava-ov-0.5b as it comes: 36, on a CPU 0)"),
    "max_new_tokens": (256, "longest answer, in tokens"),
    # No numbers here: each released model has its publisher's (generation_config.json), ours are greedy.
    "temperature": (float, "0: always the most likely token; not given: the model's own, else 0 (with --prompt 0.7)"),
    "top_k": (int, "sample among the k most likely tokens; 0: all; not given: the model's own, else 0"),
    "top_p": (float, "sample among the fewest tokens that hold this share; not given: the model's own, else 1"),
    "repetition_penalty": (float, "above 1: words already used become less likely; not given: the model's own, else 1"),
    "think": (False, "of a Qwen3: it thinks before it answers, and its thoughts are shown"),
    "seed": (0, "of sampling"),
    "batch_size": (16, "pictures at once, with --images"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "export": ("", "write the model into this new folder, in Hugging Face's form and bfloat16; no question is asked"),
    "decoder_only": (False, "with --export: the language model alone, as a Qwen2 or Qwen3"),
    "slim": ("", "write the checkpoint into this new folder, in bfloat16 and without what only training needs"),
}


def check_flags(flags) -> None:
    "Before the model is loaded: a wrong value or path should not cost that wait."
    if flags.model:
        check_name(flags.model)
    top_p, penalty = (1 if x is None else x for x in (flags.top_p, flags.repetition_penalty))
    written = [Path(path) for path in (flags.attention, flags.images and flags.out) if path]
    new = [Path(folder) for folder in (flags.export, flags.slim) if folder]
    works = ["--" + work for work in ("export", "slim", "images", "serve", "chat", "attention", "prompt")
             if getattr(flags, work)]
    for wrong, message in [
        (not (0 < top_p <= 1 and (flags.temperature or 0) >= 0 <= (flags.top_k or 0) and penalty > 0),  # so NaN is, too
         "--top_p must be in 0 to 1, --temperature and --top_k from 0, --repetition_penalty above 0"),
        (len(works) > 1, f"{' and '.join(works)}: give one of them at a time"),
        (flags.prompt and (flags.image or flags.question != FLAGS["question"][0]),
         "--prompt: continues a text alone; about a picture, ask a --question"),
        *((not Path(path).is_file(), f"{path}: no such image file") for path in flags.image),
        (flags.images and not Path(flags.images).is_dir(), f"--images={flags.images}: no such folder"),
        (flags.attention and not (flags.image and flags.attention.endswith(".png")),
         f"--attention={flags.attention}: give --image too, and a name that ends in .png"),
        *((not path.parent.is_dir(), f"{path}: there is no folder {path.parent}; make it first") for path in written),
        *((folder.exists() and any(folder.iterdir()), f"{folder}: is not empty; name a new folder") for folder in new),
    ]:
        if wrong:
            raise ValueError(message)
    if flags.serve:
        check_port(flags)


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
    vlm.source = str(folder)
    choose_tiles(vlm, flags)
    # The tokenizer is in the folder of the weights: with another one's ids the same weights would write noise.
    tokenizer = Tokenizer.from_pretrained(folder)
    if flags.think and not tokenizer.thinking:
        raise ValueError(f"--think: {folder} has no such switch; a Qwen3 of April 2025 does")
    # Which of several models answers is easily mistaken, so it is printed; to standard error, as it is not the answer.
    run = vlm.config.run
    made = f": {run['stage']}, step {run['step']} of {run['steps']}, trained on {run['data']}, " \
           f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(run['saved']))}" if "saved" in run else ""
    say(f"({folder}{made}; {device})")
    if folder == TINY:
        say(f"(nothing is trained under {flags.out_dir}/tiny yet: this small model comes with the code)")
    for older, its in found[1:]:
        if STAGES.index(its["stage"]) > STAGES.index(found[0][1]["stage"]) and older.name in STAGES:
            say(f"({older} is older: it did not start from this one; --init={older} asks it)")
    check_ability(vlm, folder, flags)
    return vlm.eval(), tokenizer


def choose_tiles(vlm: VLM, flags) -> None:
    "Those of --tiles, else those that the model was trained with."
    config, published = vlm.config.vision, "stage" not in vlm.config.run
    if not config:
        return
    if flags.tiles is not None:
        config.tiles = flags.tiles
    elif config.tiles and published and not (vlm.gpt.embed.weight.is_cuda or flags.export or flags.slim):
        config.tiles = 0  # of a model that was trained here they stay
        say("(on a CPU pictures are not cut into tiles; --tiles=36 makes small print legible, and takes minutes)")


def check_ability(vlm: VLM, folder, flags) -> None:
    "One line instead of noise, where a model is asked for what it has not learned."
    if flags.prompt:
        return
    asks, shows = flags.question != FLAGS["question"][0], bool(flags.image or flags.images)
    run = vlm.config.run
    learned, scratch = set(run.get("chapters", STAGES)), vlm.config.preset in FROM_SCRATCH
    if not learned & {"align", "sft", "rl"} and (shows or scratch):
        raise ValueError(f"{folder} has read text only and cannot see: run train_align.py and train_sft.py, or let it "
                         "continue a text by --prompt=")
    if scratch and not learned & {"sft", "rl"} and (asks or flags.chat or flags.serve):
        raise ValueError(f"{folder} has learned to describe pictures, not to answer: run train_sft.py, or leave "
                         "--question out")
    other_work = flags.chat or flags.serve or flags.export or flags.slim
    if not (shows or other_work) and (not asks or only_pictures(vlm)):
        raise ValueError("no picture to ask about: give one by --image=PATH (cat.jpg is there to try)")


# ----------------------------------------------------------------------------------------------------------------------
# The chat

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
        self.pictures.append((path, open_pixels(self.vlm, path, alone=False)))
        say("(picture loaded; ask about it)")

    def do_draw(self, rest: str) -> None:
        path = next(path for i in range(1, 10 ** 6) if not (path := Path(f"scene{i}.png")).exists())
        draw_scene().save(path)
        say(f"(drew {path})")
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
        say(f"(took back: {what})")

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
        say(f"(wrote {path})")

    def do_help(self, rest: str) -> None:
        say(inspect.cleandoc(self.__doc__))

    def ask(self, text: str) -> None:
        if not self.pictures and only_pictures(self.vlm):
            return say("(this model answers about pictures only: /image PATH shows one, /draw draws one)")
        question = make_message(text, len(self.pictures) - self.asked())
        request = make_request(self.vlm, self.tokenizer, [*self.messages, question],
                               [pixels for _, pixels in self.pictures], self.flags, self.engine.width)
        self.engine.submit(request)
        # Ctrl-C ends the answer, not the chat. An exception could end the engine in the middle of a step, so: a flag.
        usual = signal.signal(signal.SIGINT, lambda *_: setattr(request, "finish", request.finish or "cancelled"))
        try:
            answer = stream(self.engine, self.tokenizer, request, self.flags.think)
        finally:
            signal.signal(signal.SIGINT, usual)
        if not answer.strip() and request.finish != "cancelled":
            say(EMPTY)
        if answer or request.finish != "cancelled":
            self.messages += [question, make_message(answer, role="assistant")]

    def run(self) -> None:
        "Answers alone go to standard output: `--chat < questions.txt > answers.txt` works."
        say("Type a question. /image PATH shows a picture, /help lists all commands, /quit ends.")
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
                say(f"error: {error}")


def answer_folder(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Every picture of a folder -> one line of --out: a JSON object with its answer, or with the error if it is broken."
    root, out = Path(flags.images), Path(flags.out)
    # A large folder takes hours. A run that was stopped continues: what --out answers already is skipped. The question
    # is part of the key: another question is other work. Lines with an error do not count: those are tried again.
    done, lines = set(), [""]
    if out.exists():
        # A line cut off by a crash is an error that names the file. Appending after it would spoil the next line too.
        with named_errors(out):
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
        return say(f"{out} answers all of them already")
    most = vlm.config.bridge.most_tokens(vlm.config.vision.tiles if vlm.config.vision else 0)
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
                    pixels = open_pixels(vlm, root / name)
                except ValueError as error:
                    # One broken file among thousands must not end the run; its line says what is wrong with it.
                    failed += 1
                    say(f"error: {error}")
                    write(name, error=str(error))
                else:
                    request = make_request(vlm, tokenizer, [make_message(flags.question, 1)], [pixels], flags)
                    request.name = name
                    yield request
        # All with the same seed, and rows do not depend on each other: a run that was stopped gives the same answers
        # as one that was not, in whatever order they come.
        for n, request in enumerate(engine.run(requests()), 1):
            write(request.name, answer=tokenizer.answer(request.answer))
            if n % flags.batch_size == 0 or n + failed == len(names):
                say(f"{n + failed} of {len(names)} pictures")
    say(f"wrote {out}")
    # At the end, when all others are answered: exit code 1 tells a script that some are missing.
    if failed:
        raise ValueError(f"{failed} of {len(names)} pictures could not be read; {out} says which")


# ----------------------------------------------------------------------------------------------------------------------
# One question

def ask(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "--question about all --image, in the order given, or --prompt; the answer is printed as it comes."
    if flags.prompt:
        request = make_completion(vlm, tokenizer, flags.prompt, flags)
    else:
        pixels = [open_pixels(vlm, path, alone=len(flags.image) == 1) for path in flags.image]
        request = make_request(vlm, tokenizer, [make_message(flags.question, len(pixels))], pixels, flags)
    if not stream(Engine(vlm, [request], vocab_used=tokenizer.vocab_size), tokenizer, request,
                  flags.think).strip():
        say(EMPTY)
    if flags.attention:
        draw_attention(flags.attention, vlm, tokenizer, request, list(map(load_image, flags.image)))


def main() -> None:
    flags = parse_flags(__doc__, FLAGS)
    check_flags(flags)
    vlm, tokenizer = load(flags)
    if flags.export:
        export(flags.export, vlm, tokenizer, flags.decoder_only)
        say(f"wrote {flags.export}")
    elif flags.slim:
        slim(flags.slim, vlm, tokenizer)
        say(f"wrote {flags.slim}")
    elif flags.images:
        answer_folder(vlm, tokenizer, flags)
    elif flags.serve:
        serve(vlm, tokenizer, flags)
    elif flags.chat:
        Chat(vlm, tokenizer, flags).run()
    else:
        ask(vlm, tokenizer, flags)


if __name__ == "__main__":
    run(main)
