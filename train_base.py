"""
Chapter 1: a language model from nothing. Reads text, learns to say what comes next.

    python train_base.py                                  # tiny, on the built-in world's prose: two minutes on a laptop
    python train_base.py --data=books.txt                 # your own text
    python train_base.py --model=small --steps=5000       # one GPU
    torchrun --nproc_per_node=8 train_base.py --model=small

The first half is the plumbing that all four chapters share: flags, device and ranks, the optimizer, schedule, log,
resume, evaluation. The second half, from "The chapter" on, is the lesson. Prints bits per byte on text it has not seen,
and lets the model go on writing.

Left out: gradient clipping (Muon's updates have a fixed size, AdamW's a largest one), weight averaging, the bookkeeping
of epochs (data are endless), sharding of weights (every GPU holds the whole model; masters and moments are shared out).
"""
import argparse
import difflib
import json
import math
import os
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
from model import (PRESETS, VLM, check_name, fit, load_checkpoint, load_pretrained, newest_checkpoint, preset,
                   read_json, read_metadata, read_safetensors, recover, respond, run_name, save_checkpoint)
from tokenizer import Tokenizer
from vision import SIGLIP, ViT, load_image, preprocess

# ----------------------------------------------------------------------------------------------------------------------
# Flags

FROM_SCRATCH = ("tiny", "small")  # presets without released weights

SHARED_FLAGS = {  # name: (default, meaning); None = a default of each model, from the stage's table
    # What learns, and from what. The first to change: --data, to your own; then --model, once you have a GPU.
    "model": ("tiny", f"{', '.join(PRESETS)}, or a Qwen2's hub id (Org/Name) or folder"),
    "vision": ("", f"encoder in place of the preset's, with its released weights: {', '.join(SIGLIP)}"),
    "bridge": ("", "perceiver, pixelshuffle or mlp, in place of the preset's"),
    "init": ("", "checkpoint folder to start from; empty: the newest earlier stage under --out_dir, else from scratch"),
    "out_dir": ("out", "checkpoints go to OUT_DIR/MODEL/STAGE"),
    "data": ("world", "world, or files (see data.py), comma-separated, each with an optional :weight"),
    "val": ("", "file of held-out records; empty: a part of --data is set aside, by picture"),
    # One step. Not one row fits? Then the last two of this group: bench.py --what=memory tells what they save.
    "batch_size": (None, "packed rows per optimizer step, over all GPUs"),
    "micro_batch_size": (0, "rows per forward pass; 0: on a GPU as many as fit (tried out at the start), else all"),
    "seq_len": (None, "tokens per packed row"),
    "activation_checkpointing": (False, "keep less for the way back and compute it twice: a fifth slower"),
    "lora_rank": (0, "above 0: of the decoder only thin matrices of this rank learn, beside the frozen ones; give an "
                     "--lr about ten times as large"),
    "float8": (False, "the decoder's products in 8 bits while training: a sixth faster, on Hopper GPUs and later"),
    # How far each step goes, and how many there are. A poor result asks for more --steps first, then for another --lr.
    "lr": (None, "peak learning rate"),
    "steps": (None, "optimizer steps"),
    # Released weights were made by AdamW, with small steps in every entry; Muon's are large in rare directions.
    "optimizer": ("auto", "muon (matrices; AdamW for the rest), adamw, or auto: muon from scratch, else adamw"),
    "warmup": (0.02, "share of the steps in which the learning rate rises from 0"),  # a share suits any --steps
    "cooldown": (0.8, "share of the steps in which it falls to 0 at the end"),
    # Where it runs. auto is right for all but experiments.
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16; auto is bfloat16 on cuda, float32 elsewhere"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),  # three values: text
    "seed": (0, "of weights, data order and sampling"),
    # Stopping, saving, looking. A look costs as much as several steps, so none is taken on the way unless asked for.
    "resume": (False, "go on from the stage's last checkpoint"),
    "eval_every": (-1, "steps between evaluations; -1: only at the end"),
    "save_every": (-1, "steps between checkpoints; -1: only at the end and on Ctrl-C"),
    # 600 questions: the 95 % interval around one half reaches 4 points to each side. Half of that takes 2,400.
    "eval_size": (600, "held-out questions (or texts) per evaluation"),
}


def parse_flags(doc: str, flags: dict, by_model: dict[str, dict], argv=None) -> argparse.Namespace:
    "--name=value for every entry of `flags`; an unknown or mistyped one is an error of one line."
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            # argparse's own error() prints all flags first and buries the one line that says what is wrong.
            for word in message.split():
                # "--bach_size=4" -> "bach_size" -> near "batch_size"; one spelled right is in the message already
                near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), flags, n=1)
                if word.startswith("--") and near and near[0] not in message:
                    message += f"; did you mean --{near[0]}?"
            self.exit(2, f"error: {message} (--help lists all flags)\n")

    def boolean(text):
        # TRAP: type=bool would call bool("False"), which is True, as every text but the empty one is.
        if text not in ("True", "False", "true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
        return text in ("True", "true", "1")

    # allow_abbrev would take --seq for --seq_len, until a new flag that begins alike makes it an error.
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (default, meaning) in flags.items():
        # A default's type is the flag's. TRAP: write 1.0 where fractions are allowed; a default of 1 would refuse 0.5.
        kind = type(default) if default is not None else type(by_model["tiny"][name])
        shown = default if default is not None else ", ".join(f"{m} {d[name]}" for m, d in by_model.items())
        # nargs "?" with const: --resume alone means --resume=True
        extra = {"type": boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", default=default, metavar=kind.__name__.upper(), help=f"{meaning} [{shown}]",
                            **extra)
    out = parser.parse_args(argv)
    if "model" in flags:
        check_name(out.model)
    # None: not given. Only now is the model known, and with it the default. All released models share theirs.
    scratch = getattr(out, "model", "") in FROM_SCRATCH
    if getattr(out, "optimizer", "") == "auto":
        out.optimizer = "muon" if scratch else "adamw"
    for name, default in (by_model and by_model[out.model if scratch else "released"]).items():
        if getattr(out, name) is None:
            setattr(out, name, default)
    # Ranges, which argparse does not know. A flag that a script lacks passes.
    for name in ("batch_size", "seq_len", "steps", "lr", "eval_size", "samples", "max_new_tokens", "gpus"):
        if getattr(out, name, 1) <= 0:
            raise ValueError(f"--{name}={getattr(out, name)}: must be above 0")
    for name in ("micro_batch_size", "lora_rank", "temperature", "warmup", "cooldown"):
        if getattr(out, name, 0) < 0:
            raise ValueError(f"--{name}={getattr(out, name)}: must not be below 0")
    if getattr(out, "compile", "auto") not in ("auto", "True", "False"):
        raise ValueError(f"--compile={out.compile}: choose auto, True or False")
    return out


def run(main) -> None:
    "Run a script's main(): bad input ends in one line on standard error and exit code 1."
    try:
        main()
    # Only these two: a wrong value or file is the user's to mend. Any other exception is our mistake, and shows where.
    except (ValueError, OSError) as error:
        if os.environ.get("GHOSTVIS_DEBUG"):  # =1: the traceback all the same
            raise
        for bar in list(tqdm._instances):
            bar.close()  # else the message would stand on the progress bar's line
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():  # else PyTorch warns of connections left open
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Device, ranks, start

class Setup:
    "Where this process runs: device, number type, and its place among the processes that torchrun started."

    def __init__(self, flags):
        # torchrun starts one process for each GPU and tells it its number (RANK) and how many there are. Without
        # torchrun it is number 0 of 1.
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = flags.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        # What was asked for and is missing is an error: on the CPU instead, the run would crawl.
        if name not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device={name}: choose auto, cpu, cuda or mps")
        if name == "mps" and not torch.backends.mps.is_available():
            raise ValueError("--device=mps: PyTorch sees no Apple GPU here; use --device=cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device=cuda: PyTorch sees no GPU here; use --device=cpu")
        # TRAP: LOCAL_RANK counts within one machine, RANK over all. On the second machine they differ.
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if name == "cuda":
            torch.cuda.set_device(self.device)  # else whatever says just "cuda" lands on GPU 0, from every process
            torch.set_float32_matmul_precision("high")  # TF32: float32 products on tensor cores, rounded to 3 digits
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        # bfloat16 has float32's range with 2 to 3 digits: twice as fast or more on GPUs, and no loss scaling, which
        # float16 would need. TRAP: CPUs without units for it are 100 times slower with it.
        dtype = flags.dtype if flags.dtype != "auto" else "bfloat16" if name == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype={flags.dtype}: choose auto, float32 or bfloat16")
        self.dtype = getattr(torch, dtype)
        if getattr(flags, "float8", False):
            if name != "cuda" or torch.cuda.get_device_capability() < (8, 9) or dtype != "bfloat16":
                raise ValueError("--float8: needs a GPU that multiplies 8-bit numbers (Nvidia's Ada, Hopper and "
                                 "later), and --dtype=bfloat16")
            if flags.seq_len % 16:
                raise ValueError(f"--float8: needs a multiple of 16 as --seq_len, not {flags.seq_len}")
        self.compile = {"auto": name == "cuda", "True": True, "False": False}[str(flags.compile)]
        self.master = self.rank == 0  # the one that prints, logs and saves
        # The same seed everywhere: all ranks draw the same first weights and then make the same updates, so that
        # weights are never sent. What ranks must not share, their data, does not come from this generator.
        torch.manual_seed(flags.seed)

    def say(self, text: str = "") -> None:
        if self.master:
            tqdm.write(text, file=sys.stderr)  # print would cut the bar in two; standard output is for the result

    def sum(self, value: float) -> float:
        "Over all ranks."
        if self.world == 1:
            return value
        # float64: losses are summed over millions of tokens, too many for float32's 7 digits. Apple's GPUs lack it.
        total = torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)  # TRAP: every rank must come here, or the others wait for ever
        return total.item()


def check_resume(flags, state: dict) -> None:
    # Stopped and resumed must equal never stopped. With another --steps, say, the schedule would jump half-way.
    for name, value in state.get("flags", {}).items():
        if getattr(flags, name) != value:
            raise ValueError(f"--resume with --{name}={getattr(flags, name)}, but the run was started with {value}; "
                             f"give --{name}={value}, or start anew without --resume")


def begin(flags, setup: Setup, make_tokenizer) -> tuple[VLM, Tokenizer, str]:
    "The model before any stage of ours -> (model, tokenizer, where they are from)."
    if flags.model not in FROM_SCRATCH:
        # Its bridge is new, and says nothing sensible before chapter 2, unless the model is a finished LLaVA.
        vlm, folder = load_pretrained(flags.model, flags.vision, flags.bridge, setup.device)
        vlm.config.generation = {}  # the publisher's temperatures are for the publisher's model, not for what we make
        return vlm, Tokenizer.from_pretrained(folder), f"the weights of {folder}"
    # Random weights, and a tokenizer trained on the data at hand. A short text may hold fewer words than the embedding
    # has rows: the rest is never sampled (vocab_used).
    config = preset(flags.model, flags.bridge)
    tokenizer = make_tokenizer(config.decoder.vocab_size)
    if not flags.vision:
        return VLM(config), tokenizer, "random weights"
    vit = ViT.from_pretrained(data.fetch(flags.vision))
    config.vision, config.pretrained_vision = vit.config, flags.vision
    vlm = VLM(fit(config))
    vlm.vit = vit
    return vlm, tokenizer, f"random weights, the encoder from {flags.vision}"


def start(flags, setup: Setup, stage: str, make_tokenizer) -> tuple[VLM, Tokenizer, dict, dict]:
    """
    The model a stage starts from -> (model on its device, tokenizer, resume state, optimizer tensors): the first that
    applies of the four below, and it says which.
    """
    # Nothing falls through to the next because it is broken: that is an error. Training would go on from random weights
    # and look healthy, only worse.
    state, moments = {}, {}
    if flags.resume:
        # 1. --resume: this stage's own last checkpoint, with its optimizer and its place in the data.
        source = here = recover(Path(flags.out_dir) / run_name(flags.model) / stage)
        state, moments = read_json(here / "state.json"), read_safetensors(here / "optimizer.safetensors")
        # One save writes three files, stamped with its step: files copied together from two saves are found out.
        steps = {read_metadata(here / f).get("step") for f in ("model.safetensors", "optimizer.safetensors")}
        if "step" not in state or steps != {str(state["step"])}:
            raise ValueError(f"{here}: weights, optimizer and state are of different steps; "
                             "start again without --resume")
        check_resume(flags, state)
    else:
        # 2. --init: that folder.  3. The newest earlier stage under --out_dir.
        source = flags.init or newest_checkpoint(flags.out_dir, flags.model, before=stage)
    if source:
        # The tokenizer comes with the weights: ids mean nothing without it.
        vlm, tokenizer = load_checkpoint(source, setup.device), Tokenizer.from_pretrained(source)
        vlm.config.preset = vlm.config.preset or run_name(flags.model)  # a LLaVA folder of Hugging Face's has none
    else:
        # 4. The released weights of --model, or, for the presets that have none, random ones.
        vlm, tokenizer, source = begin(flags, setup, make_tokenizer)
    for name, asked, held in (("model", run_name(flags.model), vlm.config.preset),
                              ("vision", flags.vision, vlm.config.pretrained_vision),
                              ("bridge", flags.bridge, vlm.config.bridge.kind),
                              ("lora_rank", flags.lora_rank, vlm.config.lora_rank or flags.lora_rank)):
        if asked and asked != held:
            raise ValueError(f"--{name}={asked}, but {source} holds a {held or 'home-made'} {name}")
    if flags.lora_rank and not vlm.config.lora_rank:
        vlm.add_lora(flags.lora_rank)
    vlm.gpt.activation_checkpointing = flags.activation_checkpointing
    vlm.gpt.set_float8(flags.float8)
    setup.say(f"{'resuming' if flags.resume else 'starting'} {stage} from {source}"
              + (f" at step {state['step']}" if flags.resume else ""))
    vlm.to(setup.device)
    if setup.compile:
        vlm.compile_parts()
    return vlm, tokenizer, state, moments


def freeze(vlm: VLM, trained: list[str]) -> dict[str, torch.nn.Parameter]:
    "Only these groups (of vit, bridge, decoder) learn. Returns their parameters by name."
    # A ViT with pretrained weights stays frozen in every chapter: it has seen far more pictures than we can show it.
    trained = [name for name in trained if name != "vit" or not vlm.config.pretrained_vision]
    # A frozen parameter costs its own bytes. One that learns costs 3 to 4 times that: gradient, optimizer's memory.
    for name, group in vlm.groups().items():
        group.requires_grad_(name in trained)
    if vlm.config.lora_rank and "decoder" in trained:  # of the decoder these alone
        for name, p in vlm.gpt.named_parameters():
            p.requires_grad_(".lora_" in name)
    return {name: p for name, p in vlm.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer

def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    g [n, rows, cols] -> for each matrix, nearly the closest one whose singular values are all 1 (Newton-Schulz,
    coefficients by Keller Jordan).
    """
    # Why: a gradient has a few strong directions. Made equal, the rare ones are learned as fast as the common.
    # How: a singular value decomposition would be exact and slow on GPUs. Products alone reach it too: each round turns
    # every singular value v into a v + b v^3 + c v^5 and leaves the directions as they are. The slope a lifts small
    # values 3.4 times a round; b and c hold large ones near 1. After five rounds all from 0.002 to 1 lie within 0.68 to
    # 1.16. Coefficients that end at exactly 1 climb more slowly, and training does not notice the difference.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()  # bfloat16 is enough, and on most CPUs far too slow
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # [n, short, long]: s below is then [short, short], the cheaper of the two
    # TRAP: rounds make a v of 1.3 explode. The norm is the root of the sum of all v^2, at least the largest v, so that
    # none is above 1 after the division. 1e-7: a gradient of zeros stays zeros, instead of 0 / 0.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT                         # [n, short, short], v^2
        x = a * x + (b * s + c * s @ s) @ x  # [n, short, long]
    return (x.mT if tall else x).to(g.dtype)


def stacked(name: str, p: torch.Tensor) -> list[int]:
    "Rows of each matrix in p: query, key and value are three that lie in one for speed, [H + 2 kv, H]."
    rows, H = p.shape
    return [H, (rows - H) // 2, (rows - H) // 2] if name.endswith("qkv.weight") else [rows]


class Optimizer:
    """
    Muon (momentum, then orthogonalize) for matrices, AdamW for embeddings, norms and biases. It moves float32 masters,
    and the model's weights are these, rounded to the type in which the model computes. Several processes share the
    work: each parameter belongs to one of them, which alone keeps its master and moments (ZeRO, arXiv 1910.02054).
    """

    # momentum 0.8: on the tiny model, chapter 3 alone reaches 71 % with it, 66 % with 0.9, 57 % with the usual 0.95
    def __init__(self, params: dict, kind: str, lr: float, moments: dict | None = None, weight_decay: float = 0.0,
                 momentum: float = 0.8):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"--optimizer={kind}: choose muon or adamw")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.params, self.owner = params, {}
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = [0] * self.world  # numbers that each rank owns; the largest parameters are given away first
        for n in sorted(params, key=lambda n: -params[n].numel()):
            self.owner[n] = share.index(min(share))
            share[self.owner[n]] += params[n].numel()
        # In bfloat16's 2 to 3 digits small moves of a weight would be rounded away, and towards the end of a run all
        # moves are small. The weights as they are now; if the model stays in float32, the same memory as its own.
        self.masters = {n: p.data for n, p in params.items() if self.owner[n] == self.rank}
        # Muon is for matrices that map one space to another. Embeddings, positions and latents look like some, but are
        # tables: each row is a vector of its own, and nothing is gained by making one orthogonal to another.
        matrices = {n for n, p in params.items()
                    if kind == "muon" and p.ndim == 2
                    and not n.endswith(("embed.weight", "head.weight", "position", "latents"))}
        # What is kept of each parameter: by Muon the gradients' running mean, by AdamW that of their squares, too.
        self.kept = {n: ("muon",) if n in matrices else ("step", "exp_avg", "exp_avg_sq") for n in params}
        self.moments = {n: {key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                            for key in self.kept[n]} for n, p in self.masters.items()}
        # 0.95 instead of the usual 0.999: a mean over some 20 steps, not 1000; tiny's whole runs are not that long.
        # fused: one kernel for all tensors. Else their many small launches would cost more than the arithmetic.
        rest = [n for n in self.masters if n not in matrices]
        self.adamw = torch.optim.AdamW([self.masters[n] for n in rest], lr=lr, betas=(0.9, 0.95),
                                       weight_decay=weight_decay, fused=True) if rest else None
        for n in rest:
            self.adamw.state[self.masters[n]] = self.moments[n]
        if moments:
            self.load(moments)

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        lr = self.lr * lr_scale  # the schedule in one place: lr_scale() knows steps, the optimizer only a factor
        self.reduce()
        for n, p in self.params.items():
            if n in self.masters:
                self.masters[n].grad = None if p.grad is None else p.grad.to(self.masters[n].dtype)
            p.grad = None  # not zeros, and at once: its memory serves for the next one's float32
        if self.adamw:
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
        # Matrices of one shape are orthogonalized together: few large products instead of many small ones.
        shapes = {}
        for n, p in self.masters.items():
            if "muon" not in self.kept[n] or p.grad is None:
                continue
            mean = self.moments[n]["muon"].lerp_(p.grad, 1 - self.momentum)
            g = p.grad.lerp(mean, self.momentum)  # Nesterov: look one step ahead along the momentum
            # Query, key and value each for itself: in one piece the value's large gradient would leave the others,
            # which decide where to look, almost none of the update.
            for part, gradient in zip(p.split(stacked(n, p)), g.split(stacked(n, p))):
                shapes.setdefault(part.shape, []).append((part, gradient))
        for shape, pairs in shapes.items():
            # An orthogonal [rows, cols] has entries of 1 / sqrt(longer side) in root mean square. Times 0.2 sqrt(longer
            # side) they are 0.2, as AdamW's usually are (arXiv 2502.16982): one learning rate serves both.
            updates = orthogonalize(torch.stack([gradient for _, gradient in pairs]))
            for (part, _), update in zip(pairs, updates):
                # `part` is a view: this writes into the weight. Decay acts on the weight itself, as in AdamW.
                part.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)
        for n, p in self.masters.items():
            p.grad = None
            if self.params[n].data_ptr() != p.data_ptr():
                self.params[n].copy_(p)
        if self.world > 1:  # all at once, then wait: they follow each other without gaps
            for sent in [dist.broadcast(p.data, self.owner[n], async_op=True) for n, p in self.params.items()]:
                sent.wait()

    def reduce(self) -> None:
        "Each rank's gradients, summed, to the owner of each parameter."
        # By hand, once a step. DistributedDataParallel would divide by the ranks; our sum is divided already.
        if self.world == 1:
            return
        # A parameter without a gradient was used by no row, as the bridge in a batch without pictures. It stays where
        # it is if that holds for all ranks; else all must take part.
        used = torch.tensor([p.grad is not None for p in self.params.values()], dtype=torch.int32,
                            device=next(iter(self.params.values())).device)
        dist.all_reduce(used)
        sent = []
        for (n, p), by_some in zip(self.params.items(), used.tolist()):  # TRAP: in the same order on all ranks
            if by_some:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                sent.append(dist.reduce(p.grad, self.owner[n], async_op=True))
        for gradient in sent:
            gradient.wait()

    def collect(self, n: str, tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        "A tensor that the owner of parameter n has, others give None -> it, on rank 0 in host memory, elsewhere None."
        if self.world == 1:
            return tensor
        # one at a time, and not kept: a GPU has no room for all of them
        tensor = torch.empty_like(like, dtype=torch.float32) if tensor is None else tensor
        dist.broadcast(tensor, self.owner[n])
        return tensor.cpu() if self.rank == 0 else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        "-> on rank 0 (moments, masters) of all parameters. TRAP: all ranks must call it, as each has only its own."
        # By name, not by number as in torch's own state_dict: no parameter can be given another's moments.
        moments, masters = {}, {}
        for n, p in self.params.items():
            masters[n] = self.collect(n, self.masters.get(n), p)
            for key in self.kept[n]:
                like = p.new_zeros(()) if key == "step" else p
                moments[f"{n}.{key}"] = self.collect(n, self.moments.get(n, {}).get(key), like)
        return moments, masters

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for n, moments in self.moments.items():
            for key, tensor in moments.items():
                saved = state.get(f"{n}.{key}")
                if saved is None or saved.shape != tensor.shape:
                    raise ValueError(f"--resume: optimizer.safetensors lacks {n}.{key} of shape {list(tensor.shape)}; "
                                     "was it saved by another version? Start again without --resume")
                tensor.copy_(saved)


def lr_scale(step: int, flags) -> float:
    "Up, flat, linearly down to 0. Of 100 steps, warmup 0.1, cooldown 0.5: 0.1 at step 0, 1 at 9 to 50, 0.5 at 75."
    # Up: at first the momentum rests on a few batches, and its direction is not to be trusted with full steps.
    # Flat: a cosine depends on the run's length from its first step on, this only once the descent begins.
    # Down: large steps make way but jitter around the best place; small ones settle there.
    warmup, cooldown = max(1, flags.warmup * flags.steps), max(1, flags.cooldown * flags.steps)
    # max above: a share of 0 switches its part off, without dividing by 0. + 1: the first step learns something, too.
    return min(1.0, (step + 1) / warmup, (flags.steps - step) / cooldown)


# ----------------------------------------------------------------------------------------------------------------------
# Data: the stages share how records become documents, and pixels

def to_pixels(vlm: VLM):
    "A function (source, record) -> uint8 [3, S, S]; its errors name the record."
    config = vlm.config.vision

    def convert(source, record) -> torch.Tensor:
        try:
            # The world draws itself at the size asked for: no resizing blurs it.
            image = source.draw(config.image_size) if isinstance(source, data.Scene) \
                else data.load_source(source, load_image)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None  # one of a million: say which
        return preprocess(image, config.image_size, config.bicubic, config.pad)
    return convert


def to_document(tokenizer: Tokenizer, vlm: VLM, seq_len: int, learn_all: bool = False):
    """
    A function (record, index) -> data.Document, or None if it does not fit. learn_all: next-token prediction on prompts
    too.
    """
    def convert(record, index) -> data.Document | None:
        if "ids" in record or "text" in record:
            # Prose: every token is learned, also the one that says that the document ends.
            ids = record.get("ids") or tokenizer.encode(record["text"])[:seq_len] + [tokenizer.endoftext]
            return data.Document(index, ids, [1] * len(ids), [], record)
        try:
            ids, mask, slots = tokenizer.render(record["messages"], image_tokens=vlm.config.bridge.num_tokens)
        except ValueError as error:
            raise ValueError(f"record {record['id']}: {error}") from None
        # A long conversation is cut at the end, where only later turns are lost; but pictures and something to learn
        # must be left. + 1: the last id is only ever a target, it takes no place in the row.
        ids, mask = ids[:seq_len + 1], mask[:seq_len + 1]
        # mask[1:]: nothing stands before the first id that could predict it
        if not any(mask[1:]) or (slots and slots[-1] + vlm.config.bridge.num_tokens > seq_len):
            return None
        return data.Document(index, ids, [1] * len(ids) if learn_all else mask, slots, record)
    return convert


def most_rows(vlm: VLM, setup: Setup, share: int, make_batch) -> int:
    """
    The most rows per forward pass, of the numbers that divide a rank's `share` of a step, for which its GPU has the
    memory. make_batch(rows): such a batch. Elsewhere than on a GPU: all.
    """
    if setup.device.type != "cuda":
        return share
    torch.cuda.reset_peak_memory_stats()
    for rows in (n for n in range(share, 0, -1) if share % n == 0):
        try:  # Not computed but tried: what a pass keeps depends on the compiler, the kernels and the model.
            batch = to_device(make_batch(rows), setup)
            for _ in range(min(2, share // rows)):  # of several passes the second meets the gradients of the first
                loss = vlm(batch)
                if loss.requires_grad:  # not in alignment without a picture
                    loss.backward()
            # 7 % to spare: other batches hold more pictures, and between pieces of memory there are gaps
            fits = torch.cuda.max_memory_allocated() < 0.93 * torch.cuda.mem_get_info()[1]
        except torch.OutOfMemoryError:
            fits = False
        for p in vlm.parameters():
            p.grad = None
        torch.cuda.empty_cache()  # what a large attempt has left in pieces
        torch.cuda.reset_peak_memory_stats()
        if setup.sum(fits) == setup.world:  # all ranks take the same
            setup.say(f"--micro_batch_size={rows}: the most rows of {share} that fit into this GPU's memory at once")
            return rows
    raise ValueError("not even one row fits into this GPU's memory: give --activation_checkpointing, --lora_rank=16, "
                     "or a shorter --seq_len (bench.py --what=memory tells what each saves)")


def start_data(flags, setup: Setup, vlm: VLM, tokenizer: Tokenizer, task: str, state: dict):
    "-> (loaders of this rank, {name: held-out records})."
    dataset, held = data.load_data(flags.data, task, flags.seed, flags.eval_size, flags.val, tokenizer.encode,
                                   tokenizer.endoftext, flags.seq_len)
    render = to_document(tokenizer, vlm, flags.seq_len, learn_all=task == "text")

    def loader(rows: int, lane: int = 0, lanes: int = 1, place=None, ahead: bool = True) -> data.Loader:
        return data.Loader(dataset, render, to_pixels(vlm), rows, flags.seq_len, vlm.config.bridge.num_tokens, lane,
                           lanes, place, ahead, pin=setup.device.type == "cuda")
    # A step is cut into lanes, one for each micro-batch: batch_size 32, micro_batch_size 8 -> 4 lanes. A lane reads its
    # own share of the records, whoever holds it, so that 1 GPU x 4 lanes and 4 GPUs x 1 lane learn from the same rows.
    saved, micro = state.get("data") or [], flags.micro_batch_size  # saved: each lane's place in the data
    if not micro and saved:
        micro = flags.batch_size // len(saved)
    elif not micro and flags.batch_size % setup.world == 0:
        micro = most_rows(vlm, setup, flags.batch_size // setup.world, lambda rows: next(loader(rows, ahead=False)))
    lanes = flags.batch_size // max(micro, 1)
    if micro < 1 or lanes * micro != flags.batch_size or lanes % setup.world:
        raise ValueError(f"--batch_size={flags.batch_size} is not a multiple of "
                         f"--micro_batch_size={micro or 1} x {setup.world} processes")
    # Cut conversations train without any error, and the model never learns how they end: say how many there are.
    whole = to_document(tokenizer, vlm, seq_len=10 ** 9, learn_all=True)
    first = [whole(record, i) for i in range(100) if "messages" in (record := dataset[i])]
    cut = sum(len(document.ids) - 1 > flags.seq_len for document in first if document)
    if cut:
        setup.say(f"{cut} of {len(first)} conversations are longer than --seq_len={flags.seq_len} and are cut at "
                  "their end")
    if saved and len(saved) != lanes:
        raise ValueError(f"--resume: the run was started with {len(saved)} micro-batches a step, "
                         f"now there are {lanes}; give --micro_batch_size={flags.batch_size // len(saved)}")
    loaders = [loader(micro, lane, lanes, saved[lane] if saved else None)
               for lane in range(setup.rank, lanes, setup.world)]  # 4 lanes, 2 ranks: 0 and 2, 1 and 3
    convert = to_pixels(vlm)
    for record in (record for records in held.values() for record in records):
        for source in record["images"]:
            if not isinstance(source, data.Scene):  # a broken held-out picture: say so now, not after the training
                convert(source, record)
    return loaders, held


def to_device(batch: dict, setup: Setup) -> dict:
    # None: the pixels of a batch without pictures
    return {name: value if value is None else value.to(setup.device, non_blocking=True)
            for name, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Log, checkpoint, Ctrl-C

class Log:
    "One JSON object per line, in log.jsonl beside the checkpoint."

    def __init__(self, flags, setup: Setup, stage: str):
        self.path = Path(flags.out_dir) / run_name(flags.model) / stage / "log.jsonl"
        self.master = setup.master
        # The first line says what was run, and on what: months later nothing else tells two curves apart. A resumed run
        # adds its own. A downloaded archive has no .git, and so no commit to name.
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip() \
            if (Path(__file__).parent / ".git").exists() else ""
        self.write(command=" ".join(sys.argv), flags=vars(flags), device=str(setup.device), world=setup.world,
                   dtype=str(setup.dtype), torch=torch.__version__, python=sys.version.split()[0], commit=git,
                   time=time.strftime("%Y-%m-%d %H:%M:%S"))

    def write(self, **values) -> None:
        if self.master:
            # TRAP: opened anew for each line. A save puts a new folder in the old one's place: an open file would go on
            # writing into the deleted one.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class Interrupt:
    "Ctrl-C once: finish the step, save, stop. Twice: stop at once."

    def __init__(self):
        self.wanted = False
        self.old = signal.signal(signal.SIGINT, self.handle)

    def handle(self, *_):
        # Only a note, which the loop reads: raising here could stop a step half-way, with some weights moved.
        self.wanted = True
        signal.signal(signal.SIGINT, self.old)

    def heard(self, setup: Setup) -> bool:
        # By any rank, and then by all: one that stopped alone would leave the others waiting for its gradients.
        self.wanted = setup.sum(float(self.wanted)) > 0
        return self.wanted


# These may change on --resume: they say where and how, not what is computed (dtype and device up to rounding).
# micro_batch_size too, as long as a step keeps its number of micro-batches: start_data checks that.
FREE = ("init", "out_dir", "micro_batch_size", "activation_checkpointing", "device", "dtype", "compile", "resume",
        "eval_every", "save_every")


def save(flags, setup: Setup, stage: str, vlm: VLM, tokenizer: Tokenizer, optimizer: Optimizer, loaders: list,
         step: int, **more) -> Path:
    "The stage's checkpoint, with all that --resume needs. `more` goes into state.json."
    folder = Path(flags.out_dir) / run_name(flags.model) / stage
    # Weights alone are not the run: without moments the first steps stumble, without places data are seen twice.
    places = [loader.state() for loader in loaders]  # a handful of integers each
    if setup.world > 1:
        # TRAP: all ranks must call save(), though one writes: each knows only its own lanes. Sorted by lane, so that
        # another number of GPUs can go on.
        gathered = [None] * setup.world
        dist.all_gather_object(gathered, places)
        places = [gathered[lane % setup.world][lane // setup.world] for lane in range(sum(map(len, gathered)))]
    moments, masters = optimizer.state()
    if setup.master:
        kept = {name: value for name, value in vars(flags).items() if name not in FREE}
        save_checkpoint(folder, vlm, tokenizer, moments, {"step": step, "data": places, "flags": kept, **more}, masters)
    return folder


def train_step(vlm: VLM, batches: list[dict], tokens: float, optimizer: Optimizer, setup: Setup,
               scale: float) -> float:
    """
    One optimizer step over this rank's micro-batches -> the loss of the whole step, in nats per token. `tokens`:
    supervised ones, of all micro-batches and ranks.
    """
    # The loss is a sum, divided by the tokens of the WHOLE step. Gradients add up, in p.grad over the micro-batches and
    # in Optimizer.reduce over the ranks, so that the result is the gradient of the mean over all tokens, however they
    # are split. TRAP: a mean of means would count a token in a micro-batch with few of them more.
    total = 0.0
    for batch in batches:
        loss = vlm(to_device(batch, setup)) / tokens
        if loss.requires_grad:  # in alignment a micro-batch without pictures teaches nothing
            loss.backward()
        total += loss.detach()  # still on the GPU: to read it now would mean to wait for it
    total = setup.sum(float(total))  # the one place where the CPU waits; while the optimizer works it goes on
    optimizer.step(scale)
    return total


def supervised(batches: list[dict], setup: Setup) -> float:
    "Supervised tokens of the step, over all micro-batches and ranks."
    # -100 marks what is read but not learned: questions, pictures, padding. The data alone tell; no model is needed.
    return setup.sum(sum(int((batch["targets"] >= 0).sum()) for batch in batches))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def answers(vlm: VLM, tokenizer: Tokenizer, records: list, image: str = "own", batch: int = 100) -> list[str]:
    "The model's answers to the records' last questions. image: own, blank or shuffled."
    # Greedy: the likeliest token each time. No dice, so that two evaluations differ only by what was learned.
    convert, out = to_pixels(vlm), []
    # A few tokens more than the longest right answer: longer ones are wrong anyway, and one that rambles costs time.
    length = max(len(tokenizer.encode(record["messages"][-1]["content"])) for record in records)
    vlm.eval()
    for at in range(0, len(records), batch):
        rows = records[at:at + batch]
        pixels = [[convert(source, record) for source in record["images"]] for record in rows]
        if image == "blank":  # mid-grey, which normalises to about 0: what does the question alone give away?
            pixels = [[torch.full_like(p, 128) for p in group] for group in pixels]
        if image == "shuffled":
            # The next record's pictures: does the answer follow the picture? Each record keeps its number of pictures,
            # for the prompt has that many places. TRAP: a record alone in its batch gets its own back.
            flat = [p for group in pixels for p in group]
            flat = iter(flat[len(pixels[0]):] + flat[:len(pixels[0])])
            pixels = [[next(flat) for _ in group] for group in pixels]
        out += respond(vlm, tokenizer, [r["messages"][:-1] for r in rows], pixels, max_new_tokens=min(128, length + 4))
    vlm.train()
    return out


def evaluate(vlm: VLM, tokenizer: Tokenizer, records: list, setup: Setup, image: str = "own") -> dict:
    "-> {n, accuracy, ci95, by_kind: {kind: accuracy}, right: [0 to 1 for each record]}."
    # Decoding takes most of an evaluation's time, so the ranks share it: rank 1 of 4 answers questions 1, 5, 9, ...
    mine = records[setup.rank::setup.world]
    said = answers(vlm, tokenizer, mine, image) if mine else []
    right = [data.score(r.get("metric", "exact"), text, r.get("answer", r["messages"][-1]["content"]), r.get("choices"))
             for r, text in zip(mine, said)]
    if setup.world > 1:
        gathered = [None] * setup.world
        dist.all_gather_object(gathered, right)
        right = [gathered[i % setup.world][i // setup.world] for i in range(len(records))]  # back in order
    kinds = {}  # a total hides that one kind is mastered and another is guessed
    for record, value in zip(records, right):
        kinds.setdefault(record.get("kind", "all"), []).append(value)
    return {"n": len(right), "accuracy": sum(right) / len(right), "ci95": data.wilson(sum(right), len(right)),
            "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}, "right": right}


def evaluate_with_baselines(vlm, tokenizer, held: dict, setup: Setup) -> dict:
    "Accuracy on every held-out set, beside the same questions with the picture blanked and exchanged. Prints a table."
    # Accuracy alone does not show that the model sees: "yes" to every yes/no question is right half of the time. What
    # counts is the distance from "own" to the other two.
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
    # Ranks may need different numbers of rounds: no all_reduce inside this loop, or they would wait for each other.
    while waiting:
        # 16 rows at once. It ends, as to_document let nothing pass that is longer than a row.
        batch, placed, waiting = data.pack(waiting, 16, seq_len, vlm.config.bridge.num_tokens)
        batch = data.to_batch(batch, placed, convert)
        if image == "blank" and batch["pixels"] is not None:
            batch["pixels"] = torch.full_like(batch["pixels"], 128)
        if image == "shuffled":
            batch["pictures"] = batch["pictures"].roll(1)  # [m]: which picture each place shows
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
        # A vote among several right answers gives parts of a point: above one half counts as right.
        ok = data.score(record.get("metric", "exact"), text, record.get("answer", right), record.get("choices")) > 0.5
        question = record["messages"][-2]["content"].replace("<image>", "").strip()
        # 34 letters fit into 240 pixels; 3 + 2 + 2 lines are the 7 that the sheet leaves room for
        rows = [(line, "black") for line in textwrap.wrap(question, 34)[:3]]
        rows += [(line, "green" if ok else "firebrick") for line in textwrap.wrap(f"model: {text}", 34)[:2]]
        rows += [(line, "grey") for line in textwrap.wrap(f"right: {right}", 34)[:2]]
        for row, (line, colour) in enumerate(rows):
            pen.text((x + 6, y + px + 18 * row), line, fill=colour, font=font)
    sheet.save(path)


def finish(setup: Setup, log: Log, **results) -> None:
    "The run's last word: one JSON object on standard output."
    if setup.device.type == "cuda":
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    log.write(**results)
    if setup.master:  # the only print to standard output: `python train_sft.py | tail -1` is ready for a script
        print(json.dumps(results))


# ----------------------------------------------------------------------------------------------------------------------
# The chapter: next-token prediction

STAGE = "base"
# The rates for released models are those under which LLaVA and others trained such models further (2310.03744).
# A step of tiny reads 16 x 256 = 4,096 tokens. Text alone is learned faster at 0.005 (0.22 bits per byte after 140
# steps, not 0.28), but then chapter 3 learns slower: what was pressed in hard is harder to reshape.
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 100, "lr": 0.002},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 3000, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-5}}


def bits_per_byte(vlm, tokenizer, documents: list, setup: Setup, seq_len: int) -> float:
    "How many bits the model needs to spell out one byte of unseen text."
    # A loss per token falls merely by cutting text into more and shorter tokens. Bytes do not depend on the tokenizer:
    #   bits per byte = summed loss [nats] / ln 2 [nats per bit] / bytes
    # 8 is no idea at all, one of 256 equally likely bytes; good models of prose reach 0.7.
    nats, _ = held_out_loss(vlm, documents, setup, seq_len)
    # ids[1:]: the first id is given, not predicted, so its bytes do not count
    return nats / math.log(2) / sum(len(tokenizer.decode_bytes(doc.ids[1:])) for doc in documents)


def make_tokenizer(flags):
    "A function size -> Tokenizer, trained on the text of --data."
    # A function, as most runs never call it: the tokenizer lies in the checkpoint they start from.
    def train(size: int) -> Tokenizer:
        texts = ["user\n", "assistant\n"] * 50  # roles stand in every conversation: worth a token each
        for name, _ in data.parse_mixture(flags.data):
            if name == "world":  # it has no end; 3,000 records stand for it
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
    params = freeze(vlm, ["decoder"])  # ViT and bridge wait for chapter 2
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)  # keeps the float32 weights
    vlm.to(setup.dtype)  # what computes: bfloat16 on a GPU
    step = state.get("step", 0)  # above 0 with --resume
    loaders, held = start_data(flags, setup, vlm, tokenizer, "text", state)
    # Held-out text: the model never learns from it, so that it cannot have learned it by heart.
    render = to_document(tokenizer, vlm, flags.seq_len, learn_all=True)
    documents = [doc for i, record in enumerate(next(iter(held.values()))) if (doc := render(record, i))]
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    # The derived numbers, before the time is spent: a wrong --batch_size shows here.
    setup.say(f"{sum(p.numel() for p in params.values()):,} parameters, {flags.batch_size * flags.seq_len:,} tokens "
              f"a step, {flags.steps} steps on {setup.world} x {setup.device.type} in {setup.dtype}")
    # Where it starts from: random weights, or the checkpoint of --init or --resume.
    before = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)

    vlm.train()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.master, desc=STAGE, unit="step")
    while step < flags.steps and not interrupt.heard(setup):
        # ---- one step: read, learn -----------------------------------------------------------------------------------
        # One micro-batch for each lane of this rank: ids [rows, seq_len], and as targets the same ids, one place on.
        batches = [next(loader) for loader in loaders]
        # Every position is asked for the next token, all at once: a step holds as many lessons as tokens.
        loss = train_step(vlm, batches, supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")  # nats per token; e^loss: tokens it wavers between
        # step - 1: the rate that this step was made with
        log.write(step=step, loss=loss, lr=flags.lr * lr_scale(step - 1, flags), seconds=time.time() - started)
        # once in a while
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            setup.say(f"step {step}: {bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len):.3f} "
                      "bits per byte")
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    # Save before anything else: an error in the evaluation must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    after = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)
    setup.say(f"bits per byte on held-out text: {before:.3f} before, {after:.3f} after")
    # Let it write on: numbers do not show nonsense. 0.7 is a little bolder than greedy, which soon repeats itself.
    for prompt in ("3 things", "There", "The"):
        prompt_ids = tokenizer.encode(prompt)
        # A document with ids alone: nothing to learn, no pictures.
        from_prompt = vlm.generate([data.Document(0, prompt_ids, [], [], {})], max_new_tokens=40, temperature=0.7,
                                   stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size)
        setup.say("  " + tokenizer.decode(prompt_ids + [row[0] for row in from_prompt]))
    finish(setup, log, stage=STAGE, step=step, bits_per_byte=after, bits_per_byte_before=before,
           seconds=time.time() - started, checkpoint=str(folder), interrupted=interrupt.wanted)


if __name__ == "__main__":
    run(main)
