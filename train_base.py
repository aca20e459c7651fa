"""
Chapter 1: a language model from nothing. Reads text, learns to say what comes next.

    python train_base.py                                  # tiny, on the built-in world's prose: two minutes on a laptop
    python train_base.py --data=books.txt                 # your own text
    python train_base.py --model=small --steps=5000       # one GPU
    torchrun --nproc_per_node=8 train_base.py --model=small

The first half is the plumbing that all four chapters share: flags, device and ranks, the optimizer, schedule, log,
resume, evaluation. The second half, from "The chapter" on, is the lesson. Prints bits per byte on text it has not seen,
and lets the model go on writing.

Left out: gradient clipping (Muon's updates have a fixed size anyway), weight averaging, several epochs' bookkeeping
(data are endless).
"""
import argparse
import difflib
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from model import (PRESETS, VLM, load_checkpoint, newest_checkpoint, read_json, recover, read_metadata,
                   read_safetensors, respond, save_checkpoint, token_loss)
from tokenizer import Tokenizer
from vision import load_image, preprocess

# ----------------------------------------------------------------------------------------------------------------------
# Flags

SHARED_FLAGS = {  # name: (default, meaning); None = a default of each model, from the stage's table
    "model": ("tiny", f"preset: {', '.join(PRESETS)}"),
    "init": ("", "checkpoint folder to start from; empty: the newest earlier stage under --out_dir, else from scratch"),
    "out_dir": ("out", "checkpoints go to OUT_DIR/MODEL/STAGE"),
    "data": ("world", "world, or files (see data.py), comma-separated, each with an optional :weight"),
    "val": ("", "file of held-out records; empty: a part of --data is set aside, by picture"),
    "batch_size": (None, "packed rows per optimizer step, over all GPUs"),
    "micro_batch_size": (0, "rows per forward pass; 0: batch_size / number of GPUs. Lower it when memory runs out"),
    "seq_len": (None, "tokens per packed row"),
    "lr": (None, "peak learning rate"),
    "steps": (None, "optimizer steps"),
    "optimizer": ("muon", "muon (matrices; AdamW for the rest) or adamw"),
    "warmup": (0.02, "share of the steps in which the learning rate rises from 0"),
    "cooldown": (0.8, "share of the steps in which it falls to 0 at the end"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16; auto is bfloat16 on cuda, float32 elsewhere"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),
    "seed": (0, "of weights, data order and sampling"),
    "resume": (False, "go on from the stage's last checkpoint"),
    "eval_every": (-1, "steps between evaluations; -1: only at the end"),
    "save_every": (-1, "steps between checkpoints; -1: only at the end and on Ctrl-C"),
    "eval_size": (600, "held-out questions (or texts) per evaluation"),
}


def parse_flags(doc: str, flags: dict, by_model: dict[str, dict], argv=None) -> argparse.Namespace:
    "--name=value for every entry of `flags`; an unknown or mistyped one is an error of one line."
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            for word in message.split():
                near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), flags, n=1) \
                    if word.startswith("--") else []
                message += f"; did you mean --{near[0]}?" if near and near[0] not in message else ""
            self.exit(2, f"error: {message} (--help lists all flags)\n")

    def boolean(text):
        if text not in ("True", "False", "true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")  # bool("False") would be True
        return text in ("True", "true", "1")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (default, meaning) in flags.items():
        kind = type(default) if default is not None else type(by_model["tiny"][name])
        shown = default if default is not None else ", ".join(f"{m} {d[name]}" for m, d in by_model.items())
        extra = {"type": boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", default=default, metavar=kind.__name__.upper(), help=f"{meaning} [{shown}]",
                            **extra)
    out = parser.parse_args(argv)
    if "model" in flags and out.model not in PRESETS:
        raise ValueError(f"--model={out.model}: unknown; choose from {', '.join(PRESETS)}")
    for name, default in by_model.get(getattr(out, "model", ""), {}).items():
        if getattr(out, name) is None:
            setattr(out, name, default)
    for name in ("batch_size", "seq_len", "steps", "lr", "eval_size", "samples", "max_new_tokens"):
        if getattr(out, name, 1) <= 0:
            raise ValueError(f"--{name}={getattr(out, name)}: must be above 0")
    for name in ("micro_batch_size", "temperature", "warmup", "cooldown"):
        if getattr(out, name, 0) < 0:
            raise ValueError(f"--{name}={getattr(out, name)}: must not be below 0")
    if getattr(out, "compile", "auto") not in ("auto", "True", "False"):
        raise ValueError(f"--compile={out.compile}: choose auto, True or False")
    return out


def run(main) -> None:
    """
    Run a script's main(): bad input ends in one line on standard error and exit code 1. GHOSTVIS_DEBUG=1 shows the
    traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("GHOSTVIS_DEBUG"):
            raise
        for bar in list(tqdm._instances):
            bar.close()  # else the message would stand on the progress bar's line
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Device, ranks, start

class Setup:
    "Where this process runs: device, number type, and its place among the processes that torchrun started."

    def __init__(self, flags):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = flags.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device={name}: choose auto, cpu, cuda or mps")
        if name == "mps" and not torch.backends.mps.is_available():
            raise ValueError("--device=mps: PyTorch sees no Apple GPU here; use --device=cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device=cuda: PyTorch sees no GPU here; use --device=cpu")
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if name == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        dtype = flags.dtype if flags.dtype != "auto" else "bfloat16" if name == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype={flags.dtype}: choose auto, float32 or bfloat16")
        self.dtype = getattr(torch, dtype)
        self.compile = {"auto": name == "cuda", "True": True, "False": False}[str(flags.compile)]
        self.master = self.rank == 0
        torch.manual_seed(flags.seed)

    def autocast(self):
        """
        float32 master weights, products in bfloat16. On CPUs without bfloat16 units that type is 100 times slower:
        float32 there.
        """
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text: str = "") -> None:
        if self.master:
            tqdm.write(text, file=sys.stderr)

    def sum(self, value: float) -> float:
        "Over all ranks."
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)
        return total.item()


def start(flags, setup: Setup, stage: str, make_tokenizer) -> tuple[VLM, Tokenizer, dict, dict]:
    """
    The model a stage starts from -> (model on its device, tokenizer, resume state, optimizer tensors), the first that
    applies of
      1. --resume: this stage's own last checkpoint, with its optimizer and its place in the data
      2. --init: that folder
      3. the newest earlier stage under --out_dir
      4. random weights, and a tokenizer trained on the data at hand
    and says which. Never falls from one to the next because something is broken: that is an error.
    """
    here = Path(flags.out_dir) / flags.model / stage
    source, state, moments = flags.init or newest_checkpoint(flags.out_dir, flags.model, before=stage), {}, {}
    if flags.resume:
        recover(here)
        state, moments, source = read_json(here / "state.json"), read_safetensors(here / "optimizer.safetensors"), here
        if {read_metadata(here / f)["step"] for f in ("model.safetensors", "optimizer.safetensors")} \
                != {str(state["step"])}:
            raise ValueError(f"{here}: weights, optimizer and state are of different steps; "
                             "start again without --resume")
    if source:
        vlm, tokenizer = load_checkpoint(source), Tokenizer.from_pretrained(source)
        if vlm.config.preset != flags.model:
            raise ValueError(f"--model={flags.model}, but {source} holds a {vlm.config.preset} model")
    else:
        config, tokenizer = PRESETS[flags.model], make_tokenizer(PRESETS[flags.model].decoder.vocab_size)
        config.image_pad, config.decoder.vocab_size = \
            tokenizer.image_pad, max(tokenizer.vocab_size, config.decoder.vocab_size)
        vlm = VLM(config)
    setup.say(f"{'resuming' if flags.resume else 'starting'} {stage} from {source or 'random weights'}"
              + (f" at step {state['step']}" if flags.resume else ""))
    vlm.to(setup.device)
    if setup.compile:
        for block in [*vlm.vit.blocks, *vlm.gpt.blocks]:
            block.compile()
    return vlm, tokenizer, state, moments


def freeze(vlm: VLM, trained: list[str]) -> dict[str, torch.nn.Parameter]:
    "Only these groups (of vit, bridge, decoder) learn. Returns their parameters by name."
    for name, group in vlm.groups().items():
        group.requires_grad_(name in trained)
    return {name: p for name, p in vlm.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer

def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    g [n, rows, cols] -> for each matrix, nearly the closest one whose singular values are all 1 (Newton-Schulz,
    coefficients by Keller Jordan). A gradient has a few strong directions; made equal, the rare ones are learned as
    fast as the common.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()  # bfloat16 is enough, and on most CPUs far too slow
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products below are of the short side's size
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).to(g.dtype)


class Optimizer:
    """
    Muon (momentum, then orthogonalize) for the matrices inside blocks, AdamW for embeddings, norms and biases. Muon's
    update is scaled by 0.2 sqrt(longer side), the usual size of AdamW's (arXiv 2502.16982): so one learning rate serves
    both.
    """

    def __init__(self, params: dict, kind: str, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"--optimizer={kind}: choose muon or adamw")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.params = params
        matrices = [n for n, p in params.items()
                    if kind == "muon" and p.ndim == 2
                    and not n.endswith(("embed.weight", "head.weight", "position", "latents"))]
        self.buffers = {n: torch.zeros_like(params[n]) for n in matrices}
        # matrices of one shape are orthogonalized together: few large products instead of many small ones
        self.shapes = {}
        for n in matrices:
            self.shapes.setdefault(params[n].shape, []).append(n)
        self.rest = [n for n in params if n not in self.buffers]
        assert len(self.buffers) + len(self.rest) == len(params)
        self.adamw = torch.optim.AdamW([params[n] for n in self.rest], lr=lr, betas=(0.9, 0.95),
                                       weight_decay=weight_decay, fused=True) if self.rest else None

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        lr = self.lr * lr_scale
        if self.adamw:
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
        for shape, names in self.shapes.items():
            names = [n for n in names if self.params[n].grad is not None]
            if not names:
                continue
            for n in names:
                self.buffers[n].lerp_(self.params[n].grad, 1 - self.momentum)
            # Nesterov: look one step ahead along the momentum
            g = torch.stack([self.params[n].grad.lerp(self.buffers[n], self.momentum) for n in names])
            for n, update in zip(names, orthogonalize(g)):
                self.params[n].mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)
        for p in self.params.values():
            p.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        out = {f"muon.{n}": b for n, b in self.buffers.items()}
        for n in self.rest:
            out |= {f"adamw.{n}.{key}": value for key, value in self.adamw.state.get(self.params[n], {}).items()}
        return out

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for n, b in self.buffers.items():
            b.copy_(state[f"muon.{n}"])
        for n in self.rest:
            moments = {k: state[f"adamw.{n}.{k}"].clone()
                       for k in ("step", "exp_avg", "exp_avg_sq") if f"adamw.{n}.{k}" in state}
            if moments:
                self.adamw.state[self.params[n]] = {k: v.to(self.params[n].device) for k, v in moments.items()}


def lr_scale(step: int, flags) -> float:
    "Up, flat, and linearly down to 0: the length of the run is only needed when the descent begins."
    warmup, cooldown = max(1, flags.warmup * flags.steps), max(1, flags.cooldown * flags.steps)
    return min(1.0, (step + 1) / warmup, (flags.steps - step) / cooldown)


# ----------------------------------------------------------------------------------------------------------------------
# Data: the stages share how records become documents, and pixels

def to_pixels(vlm: VLM):
    """
    A function (source, record) -> uint8 [3, S, S]. The world draws itself at the size asked for; errors name the
    record.
    """
    config = vlm.config.vision

    def convert(source, record) -> torch.Tensor:
        try:
            image = source.draw(config.image_size) if isinstance(source, data.Scene) \
                else data.load_source(source, load_image)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None
        return preprocess(image, config.image_size, config.bicubic)
    return convert


def to_document(tokenizer: Tokenizer, vlm: VLM, seq_len: int, learn_all: bool = False):
    """
    A function (record, index) -> data.Document, or None if it does not fit. learn_all: next-token prediction on prompts
    too.
    """
    def convert(record, index) -> data.Document | None:
        if "ids" in record or "text" in record:
            ids = record.get("ids") or tokenizer.encode(record["text"])[:seq_len] + [tokenizer.endoftext]
            return data.Document(index, ids, [1] * len(ids), [], record)
        try:
            ids, mask, slots = tokenizer.render(record["messages"], image_tokens=vlm.config.bridge.num_tokens)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None
        # A long conversation is cut at the end, where only later turns are lost; but pictures and something to learn
        # must be left.
        ids, mask = ids[:seq_len + 1], mask[:seq_len + 1]
        if not any(mask[1:]) or (slots and slots[-1] + vlm.config.bridge.num_tokens > seq_len):
            return None
        return data.Document(index, ids, [1] * len(ids) if learn_all else mask, slots, record)
    return convert


def start_data(flags, setup: Setup, vlm: VLM, tokenizer: Tokenizer, task: str, state: dict):
    """
    -> (loaders of this rank, {name: held-out records}). A step has batch_size / micro_batch_size lanes, one loader
    each; rank r takes every world-th. So the same rows make a step on one GPU with four lanes as on four GPUs with one.
    """
    micro = flags.micro_batch_size or flags.batch_size // setup.world
    lanes = flags.batch_size // max(micro, 1)
    if micro < 1 or lanes * micro != flags.batch_size or lanes % setup.world:
        raise ValueError(f"--batch_size={flags.batch_size} is not a multiple of "
                         f"--micro_batch_size={micro} x {setup.world} processes")
    dataset, held = data.load_data(flags.data, task, flags.seed, flags.eval_size, flags.val, tokenizer.encode,
                                   tokenizer.endoftext, flags.seq_len)
    render = to_document(tokenizer, vlm, flags.seq_len, learn_all=task == "text")
    saved = state.get("data") or [None] * lanes
    if len(saved) != lanes:
        raise ValueError(f"--resume: the run was started with {len(saved)} micro-batches a step, "
                         f"now there are {lanes}; give --micro_batch_size={flags.batch_size // len(saved)}")
    loaders = [data.Loader(dataset, render, to_pixels(vlm), micro, flags.seq_len, vlm.config.bridge.num_tokens,
                           lane, lanes, saved[lane])
               for lane in range(setup.rank, lanes, setup.world)]
    return loaders, held


def to_device(batch: dict, setup: Setup) -> dict:
    return {name: value if value is None else value.to(setup.device, non_blocking=True)
            for name, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Log, checkpoint, Ctrl-C

class Log:
    "One JSON object per line, in log.jsonl beside the checkpoint. The first line says what was run, and on what."

    def __init__(self, flags, setup: Setup, stage: str):
        self.path = Path(flags.out_dir) / flags.model / stage / "log.jsonl"
        self.master = setup.master
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip() \
            if (Path(__file__).parent / ".git").exists() else ""
        self.write(command=" ".join(sys.argv), flags=vars(flags), device=str(setup.device), world=setup.world,
                   dtype=str(setup.dtype), torch=torch.__version__, python=sys.version.split()[0], commit=git,
                   time=time.strftime("%Y-%m-%d %H:%M:%S"))

    def write(self, **values) -> None:
        if self.master:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class Interrupt:
    "Ctrl-C once: finish the step, save, stop. Twice: stop at once."

    def __init__(self):
        self.wanted = False
        self.old = signal.signal(signal.SIGINT, self.handle)

    def handle(self, *_):
        self.wanted = True
        signal.signal(signal.SIGINT, self.old)


FREE = ("init", "out_dir", "device", "dtype", "compile", "resume", "eval_every", "save_every")  # may change on --resume


def save(flags, setup: Setup, stage: str, vlm: VLM, tokenizer: Tokenizer, optimizer: Optimizer, loaders: list,
         step: int, **more) -> Path:
    """
    The stage's checkpoint, with all that --resume needs (`more` goes into state.json). The loaders' places come from
    all ranks.
    """
    folder = Path(flags.out_dir) / flags.model / stage
    places = [loader.state() for loader in loaders]
    if setup.world > 1:
        gathered = [None] * setup.world
        dist.all_gather_object(gathered, places)
        places = [gathered[lane % setup.world][lane // setup.world] for lane in range(sum(map(len, gathered)))]
    if setup.master:
        # What a resumed run must not change, or it would not be the same run.
        kept = {name: value for name, value in vars(flags).items() if name not in FREE}
        save_checkpoint(folder, vlm, tokenizer, optimizer.state(),
                        {"step": step, "data": places, "flags": kept, **more})
    return folder


def check_resume(flags, state: dict) -> int:
    "The step to go on from. A flag that changes the run's course is refused."
    for name, value in state.get("flags", {}).items():
        if getattr(flags, name) != value:
            raise ValueError(f"--resume with --{name}={getattr(flags, name)}, but the run was started with {value}; "
                             f"give --{name}={value}, or start anew without --resume")
    return state.get("step", 0)


def train_step(vlm: VLM, batches: list[dict], tokens: float, params: dict, optimizer: Optimizer, setup: Setup,
               scale: float) -> float:
    """
    One optimizer step over this rank's micro-batches -> the loss of the whole step. `tokens`: supervised ones, of all
    micro-batches and ranks. Each micro-batch's sum is divided by it, so that the gradients, added up, are those of the
    mean over all tokens.
    """
    total = 0.0
    for batch in batches:
        with setup.autocast():
            loss = vlm(to_device(batch, setup)) / tokens
        if loss.requires_grad:  # in alignment a micro-batch without pictures teaches nothing
            loss.backward()
        total += loss.item()
    if setup.world > 1:
        for p in params.values():  # a parameter that no row of this rank used takes part all the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    optimizer.step(scale)
    return setup.sum(total)


def supervised(batches: list[dict], setup: Setup) -> float:
    "Supervised tokens of the step, over all micro-batches and ranks."
    return setup.sum(sum(int((batch["targets"] >= 0).sum()) for batch in batches))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def answers(vlm: VLM, tokenizer: Tokenizer, records: list, image: str = "own", batch: int = 100) -> list[str]:
    """
    The model's greedy answer to each record's last question. image: "own"; "blank": a grey square, to see what the
    question alone gives away; "shuffled": the next record's pictures, to see whether the answer follows the picture.
    """
    convert, out = to_pixels(vlm), []
    length = max(len(tokenizer.encode(record["messages"][-1]["content"])) for record in records)
    vlm.eval()
    for at in range(0, len(records), batch):
        rows = records[at:at + batch]
        pixels = [[convert(source, record) for source in record["images"]] for record in rows]
        if image == "blank":
            pixels = [[torch.full_like(p, 128) for p in group] for group in pixels]
        if image == "shuffled":  # as many pictures as before for each record, taken one record's place further on
            flat = [p for group in pixels for p in group]
            flat = iter(flat[len(pixels[0]):] + flat[:len(pixels[0])])
            pixels = [[next(flat) for _ in group] for group in pixels]
        out += respond(vlm, tokenizer, [r["messages"][:-1] for r in rows], pixels, max_new_tokens=min(128, length + 4))
    vlm.train()
    return out


def evaluate(vlm: VLM, tokenizer: Tokenizer, records: list, setup: Setup, image: str = "own") -> dict:
    "-> {n, accuracy, ci95, by_kind: {kind: accuracy}, right: [0 to 1 for each record]}; ranks share the work."
    mine = records[setup.rank::setup.world]
    said = answers(vlm, tokenizer, mine, image) if mine else []
    right = [data.score(r.get("metric", "exact"), text, r.get("answer", r["messages"][-1]["content"]), r.get("choices"))
             for r, text in zip(mine, said)]
    if setup.world > 1:
        gathered = [None] * setup.world
        dist.all_gather_object(gathered, right)
        right = [gathered[i % setup.world][i // setup.world] for i in range(len(records))]
    kinds = {}
    for record, value in zip(records, right):
        kinds.setdefault(record.get("kind", "all"), []).append(value)
    return {"n": len(right), "accuracy": sum(right) / len(right), "ci95": data.wilson(sum(right), len(right)),
            "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}, "right": right}


def evaluate_with_baselines(vlm, tokenizer, held: dict, setup: Setup) -> dict:
    "Accuracy on every held-out set, beside the same questions with the picture blanked and exchanged. Prints a table."
    results = {}
    for name, records in held.items():
        own, blank, shuffled = (evaluate(vlm, tokenizer, records, setup, image)
                                for image in ("own", "blank", "shuffled"))
        setup.say(f"\n{name:<12}{'own':>8}{'blind':>8}{'shuffled':>10}   ({own['n']} questions, "
                  f"95 % interval of the total {own['ci95'][0]:.1%} to {own['ci95'][1]:.1%})")
        for kind in own["by_kind"]:
            setup.say(f"  {kind:<10}" + "".join(f"{r['by_kind'][kind]:>8.1%}" for r in (own, blank))
                      + f"{shuffled['by_kind'][kind]:>10.1%}")
        setup.say(f"  {'all':<10}{own['accuracy']:>8.1%}{blank['accuracy']:>8.1%}{shuffled['accuracy']:>10.1%}")
        results[name] = {"n": own["n"], "accuracy": own["accuracy"], "ci95": own["ci95"], "by_kind": own["by_kind"],
                         "blind_accuracy": blank["accuracy"], "shuffled_accuracy": shuffled["accuracy"]}
    return results


@torch.no_grad()
def held_out_loss(vlm: VLM, documents: list, setup: Setup, seq_len: int, image: str = "own") -> tuple[float, int]:
    "Documents -> (summed loss in nats, number of supervised tokens). image as in `answers`."
    convert, total, tokens = to_pixels(vlm), 0.0, 0
    waiting = documents[setup.rank::setup.world]
    while waiting:
        batch, placed, waiting = data.pack(waiting, 16, seq_len, vlm.config.bridge.num_tokens)
        batch = data.to_batch(batch, placed, convert)
        if image == "blank" and batch["pixels"] is not None:
            batch["pixels"] = torch.full_like(batch["pixels"], 128)
        if image == "shuffled":
            batch["pictures"] = batch["pictures"].roll(1)
        with setup.autocast():
            total += vlm(to_device(batch, setup)).item()
        tokens += int((batch["targets"] >= 0).sum())
    return setup.sum(total), int(setup.sum(tokens))


def save_samples(path: Path, vlm: VLM, tokenizer: Tokenizer, records: list, columns: int = 4, px: int = 240) -> None:
    "A sheet of pictures, each with its question, the model's answer (green if right, red if not) and the right one."
    said, font, lines = answers(vlm, tokenizer, records), ImageFont.load_default(14), 7
    height = px + 18 * lines + 10
    sheet = Image.new("RGB", (columns * px, -(-len(records) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (record, text) in enumerate(zip(records, said)):
        x, y, right = i % columns * px, i // columns * height, record["messages"][-1]["content"]
        source = record["images"][0] if record["images"] else None
        if source is not None:
            picture = source.draw(px - 8) if isinstance(source, data.Scene) else data.load_source(source, load_image)
            sheet.paste(picture.resize((px - 8, px - 8)), (x + 4, y + 4))
        ok = data.score(record.get("metric", "exact"), text, record.get("answer", right), record.get("choices")) > 0.5
        question = record["messages"][-2]["content"].replace("<image>", "").strip()
        rows = [(line, "black") for line in textwrap.wrap(question, 34)[:3]]
        rows += [(line, "green" if ok else "firebrick") for line in textwrap.wrap(f"model: {text}", 34)[:2]]
        rows += [(line, "grey") for line in textwrap.wrap(f"right: {right}", 34)[:2]]
        for row, (line, colour) in enumerate(rows):
            pen.text((x + 6, y + px + 18 * row), line, fill=colour, font=font)
    sheet.save(path)


def finish(setup: Setup, log: Log, **results) -> None:
    "The run's last word: one JSON object on standard output."
    log.write(**results)
    if setup.master:
        print(json.dumps(results))


# ----------------------------------------------------------------------------------------------------------------------
# The chapter: next-token prediction

STAGE = "base"
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 160, "lr": 0.005},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 3000, "lr": 0.003}}


def bits_per_byte(vlm, tokenizer, documents: list, setup: Setup, seq_len: int) -> float:
    """
    Unlike loss per token it compares models with different vocabularies. 8 would be no idea at all; good models of
    prose reach 0.7.
    """
    nats, _ = held_out_loss(vlm, documents, setup, seq_len)
    return nats / math.log(2) / sum(len(tokenizer.decode_bytes(doc.ids[1:])) for doc in documents)


def make_tokenizer(flags):
    """
    A function size -> Tokenizer, trained on the text of --data. It is saved with the checkpoint; later stages take it
    from there.
    """
    def train(size: int) -> Tokenizer:
        texts = ["user\n", "assistant\n"] * 50  # roles stand in every conversation: worth a token each
        for name, _ in data.parse_mixture(flags.data):
            if name == "world":
                records = (data.World("text", seed=flags.seed)[i] for i in range(3000))
            else:
                try:
                    records = [{"text": text} for text in data.read_text(name)]
                except ValueError:  # not text: then it is conversations, or an error that names the file
                    if name.endswith(".txt") or Path(name).is_dir():
                        raise
                    records = data.read_records(name)
            for record in records:
                texts += [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
        return Tokenizer.train(texts, size)
    return train


def main() -> None:
    flags = parse_flags(__doc__, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    vlm, tokenizer, state, moments = start(flags, setup, STAGE, make_tokenizer(flags))
    params = freeze(vlm, ["decoder"])
    optimizer = Optimizer(params, flags.optimizer, flags.lr)
    step = check_resume(flags, state)
    if moments:
        optimizer.load(moments)
    loaders, held = start_data(flags, setup, vlm, tokenizer, "text", state)
    render = to_document(tokenizer, vlm, flags.seq_len, learn_all=True)
    documents = [doc for i, record in enumerate(held[next(iter(held))]) if (doc := render(record, i))]
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    setup.say(f"{sum(p.numel() for p in params.values()):,} parameters, {flags.batch_size * flags.seq_len:,} tokens "
              f"a step, {flags.steps} steps on {setup.world} x {setup.device.type} in {setup.dtype}")
    before = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)

    vlm.train()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.master, desc=STAGE, unit="step")
    while step < flags.steps and not interrupt.wanted:
        batches = [next(loader) for loader in loaders]
        loss = train_step(vlm, batches, supervised(batches, setup), params, optimizer, setup, lr_scale(step, flags))
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        log.write(step=step, loss=loss, lr=flags.lr * lr_scale(step - 1, flags), seconds=time.time() - started)
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            setup.say(f"step {step}: {bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len):.3f} "
                      "bits per byte")
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    after = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)
    setup.say(f"bits per byte on held-out text: {before:.3f} before, {after:.3f} after")
    for prompt in ("3 things", "There", "The"):
        prompt_ids = tokenizer.encode(prompt)
        from_prompt = vlm.generate([data.Document(0, prompt_ids, [], [], {})], max_new_tokens=40, temperature=0.7,
                                   stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size)
        setup.say("  " + tokenizer.decode(prompt_ids + [row[0] for row in from_prompt]))
    finish(setup, log, stage=STAGE, step=step, bits_per_byte=after, bits_per_byte_before=before,
           seconds=time.time() - started, checkpoint=str(folder), interrupted=interrupt.wanted)


if __name__ == "__main__":
    run(main)
