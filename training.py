"""
What all four stages share: flags, device and ranks, the model to start from, optimizer, data glue, the training step,
log and checkpoints. A stage script is the lesson; this file is its plumbing and can be trusted unread.

Left out: gradient clipping (Muon's updates have a fixed size, AdamW's a largest one), weight averaging, sharding of
weights (every GPU holds the whole model; only master weights and optimizer state are shared out among the ranks).
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data
import weights
from data import pick_device, run
from model import (FROM_SCRATCH, PRESETS, STAGES, VLM, check_name, checkpoints, connect, load_checkpoint,
                   load_pretrained, preset, run_name)
from tokenizer import Tokenizer
from vision import SIGLIP, ViT
from weights import require

# ----------------------------------------------------------------------------------------------------------------------
# Flags

SHARED_FLAGS = {  # name: (default, meaning); None = a default that depends on the model, from the stage's BY_MODEL
    # What is trained, and on what. The first to change: --data, to your own; then --model, once you have a GPU.
    "model": ("tiny", f"{', '.join(PRESETS)}, or a Qwen2's hub id (Org/Name) or folder"),
    "vision": ("", f"encoder in place of the preset's, with its released weights: {', '.join(SIGLIP)}"),
    "bridge": ("", "perceiver, pixelshuffle or mlp, in place of the preset's; only with mlp can the trained model be "
                   "exported for other engines (sample.py --export)"),
    "init": ("", "checkpoint folder to start from; empty: the newest earlier stage under --out_dir, else from scratch"),
    "out_dir": ("out", "checkpoints go to OUT_DIR/MODEL/STAGE"),
    "data": ("world", "world, or files (see data.py), comma-separated, each with an optional :weight"),
    "val": ("", "file of held-out records; empty: a part of --data is held out, by picture"),
    # One step. Out of memory? Then the last two of this group: bench.py --what=memory tells what they save.
    "batch_size": (None, "packed rows per optimizer step, over all GPUs"),
    "micro_batch_size": (0, "rows per forward pass; 0: on a GPU as many as fit (tried out at the start), else all"),
    "seq_len": (None, "tokens per packed row"),
    "activation_checkpointing": (False, "store less for the backward pass and compute it twice: a fifth slower"),
    "lora_rank": (0, "above 0: train only thin matrices of this rank beside the decoder's frozen ones; give an --lr "
                     "about ten times as large"),
    "float8": (False, "the decoder's products in 8 bits while training: a sixth faster, on Hopper GPUs and later"),
    # How far each step goes, and how many there are. A poor result needs more --steps first, then another --lr.
    "lr": (None, "peak learning rate"),
    "steps": (None, "optimizer steps"),
    # Released weights were trained by AdamW, whose steps are small in every entry; Muon's are large in some directions.
    "optimizer": ("auto", "muon (matrices; AdamW for the rest), adamw, or auto: muon from scratch, else adamw"),
    "warmup": (0.02, "share of the steps in which the learning rate rises from 0"),  # a share suits any --steps
    "cooldown": (0.8, "share of the steps in which it falls to 0 at the end"),
    # Where it runs. auto is right for all but experiments.
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16; auto is bfloat16 on cuda, float32 elsewhere"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),  # three values: text
    "seed": (0, "of weights, data order and sampling"),
    # Stopping, saving, evaluating. An evaluation costs as much as several steps.
    "resume": (False, "continue the stage's last run, with that run's flags"),
    "eval_every": (-1, "steps between evaluations; -1: only at the end"),
    "eval_on_stop": (False, "evaluate also after Ctrl-C, not only at the end"),
    "save_every": (-1, "steps between checkpoints; -1: only at the end and on Ctrl-C"),
    "wandb": ("", "project on wandb.ai that gets what log.jsonl gets; empty: nothing is sent"),
    "keep": (3, "earlier runs of the stage that are kept, as STAGE.1 (the one before), STAGE.2, ..."),
    "max_bad_steps": (10, "stop after so many steps in a row whose loss or gradient is not a finite number"),
    "workers": (-1, "processes that open pictures, on each GPU; 0: a thread does it; -1: up to 8 on a GPU, else 0"),
    "max_bad": (0.01, "share of broken records that is left out, and named; more end the run"),
    # 600 questions: the 95 % interval around one half reaches 4 points to each side. Half of that takes 2,400.
    "eval_size": (600, "held-out questions (or texts) per evaluation"),
}
# These may change on --resume: they say where and how, not what is computed (dtype and device up to rounding).
# micro_batch_size too, as long as a step has the same number of micro-batches: make_loaders checks that.
MAY_CHANGE = ("init", "out_dir", "micro_batch_size", "activation_checkpointing", "device", "dtype", "compile", "resume",
              "eval_every", "eval_on_stop", "save_every", "keep", "max_bad_steps", "wandb", "workers", "max_bad")


def parse_flags(doc: str, stage: str, flags: dict, by_model: dict, argv=None):
    "As data.parse_flags, with names checked. After --resume, flags that are not given are those of the run."
    out = data.parse_flags(doc, flags, by_model, argv)
    check_name(out.model)
    if getattr(out, "optimizer", "") == "auto":
        out.optimizer = "muon" if out.model in FROM_SCRATCH else "adamw"
    require(not getattr(out, "val", "") or any(name != "world" for name, _ in data.parse_mixture(out.data)),
            f"--val={getattr(out, 'val', '')}: goes with files in --data=; the world holds out scenes of its own")
    if not getattr(out, "resume", False):
        return out
    given = {text[2:].split("=")[0] for text in (sys.argv[1:] if argv is None else argv)} | {"resume"}
    folder = weights.recover(stage_folder(out, stage))
    require((folder / "state.json").exists(), f"--resume: there is no checkpoint to resume in {folder}; an earlier run "
            f"({folder}.1) is resumed under that name: move it there")
    for name, value in weights.read_json(folder / "state.json").get("flags", {}).items():
        if name not in given:
            setattr(out, name, value)
        # With another --steps, say, the schedule would jump half-way.
        require(name in MAY_CHANGE or getattr(out, name) == value, f"--resume with --{name}={getattr(out, name)}, but "
                f"the run was started with {value}; give --{name}={value}, or start anew without --resume")
    return out


def stage_folder(flags, stage: str) -> Path:
    return Path(flags.out_dir, run_name(flags.model), stage)


# ----------------------------------------------------------------------------------------------------------------------
# Device and ranks

class Setup:
    "Where this process runs: device, number type, and its rank among the processes that torchrun started."

    def __init__(self, flags):
        # torchrun starts one process for each GPU and sets these variables. Without torchrun it is rank 0 of 1.
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0  # the main process prints, logs and saves
        name = pick_device(flags.device)
        # TRAP: LOCAL_RANK counts within one machine, RANK over all. On the second machine they differ.
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if name == "cuda":
            torch.cuda.set_device(self.device)  # else code that says just "cuda" uses GPU 0, in every process
            torch.set_float32_matmul_precision("high")  # TF32: float32 products on tensor cores, rounded to 3 digits
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        # bfloat16 has float32's range with 2 to 3 digits: at least twice as fast on GPUs, and no loss scaling, which
        # float16 would need. TRAP: CPUs without instructions for it are 100 times slower with it.
        dtype = flags.dtype if flags.dtype != "auto" else "bfloat16" if name == "cuda" else "float32"
        require(dtype in ("float32", "bfloat16"), f"--dtype={flags.dtype}: choose auto, float32 or bfloat16")
        self.dtype = getattr(torch, dtype)
        if getattr(flags, "float8", False):
            capable = name == "cuda" and torch.cuda.get_device_capability() >= (8, 9) and dtype == "bfloat16"
            require(capable and flags.seq_len % 16 == 0,
                    "--float8: needs a GPU that multiplies 8-bit numbers (Nvidia's Ada, Hopper, later), "
                    f"--dtype=bfloat16, and a multiple of 16 as --seq_len, not {flags.seq_len}")
        self.compile = {"auto": name == "cuda", "True": True, "False": False}[str(flags.compile)]
        self.bad_steps, self.max_bad_steps = 0, getattr(flags, "max_bad_steps", 10)  # in a row, see train_step
        self.loaders, self.failure = [], None  # of this rank; the error for which a run stops once it is saved
        # The same seed everywhere: all ranks draw the same first weights and then make the same updates. What must
        # differ between ranks, their data, does not come from this generator.
        torch.manual_seed(flags.seed)

    def print(self, text: str = "") -> None:
        if self.is_main:
            tqdm.write(text, file=sys.stderr)  # print would cut the bar in two; standard output is for the result

    def all_reduce(self, value: float) -> float:
        "The sum over all ranks. TRAP: every rank must call it, or the others wait without end."
        if self.world_size == 1:
            return value
        # float64: losses are summed over millions of tokens, too many for float32's 7 digits. Apple's GPUs lack it.
        total = torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, mine: list) -> list:
        "Rank r has items r, r + world_size, ... -> all items in order, on every rank."
        if self.world_size == 1:
            return mine
        parts = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def to_device(self, batch: dict) -> dict:
        # others: None, the pixels of a batch without pictures; and the records' names
        return {name: value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value
                for name, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The model that a stage starts from

def read_resume(folder: Path) -> tuple[dict, dict]:
    "A checkpoint's training state -> (state.json, optimizer tensors). Stopped and resumed must equal never stopped."
    state = weights.read_json(folder / "state.json")
    moments = weights.read_safetensors(folder / "optimizer.safetensors")
    # A save stamps its files with the step: files copied together from two saves are noticed.
    steps = {weights.read_header(folder / f)[1].get("step") for f in ("model.safetensors", "optimizer.safetensors")}
    require("step" in state and steps == {str(state["step"])},
            f"{folder}: weights, optimizer and state are of different steps; start again without --resume")
    return state, moments


def without_checkpoint(flags, setup: Setup) -> tuple[VLM, Tokenizer, str]:
    "The model before any stage of ours -> (model, tokenizer, where they come from)."
    if flags.model not in FROM_SCRATCH:
        # Its bridge is new and useless before chapter 2, unless the model is a finished LLaVA.
        vlm, folder = load_pretrained(flags.model, flags.vision, flags.bridge, setup.device)
        vlm.config.generation = {}  # the publisher's temperatures are for the publisher's model, not for ours
        return vlm, Tokenizer.from_pretrained(folder), f"the weights of {folder}"
    # A short text may have fewer tokens than the embedding has rows: the rest is never sampled (vocab_used).
    config = preset(flags.model, flags.bridge)
    tokenizer = Tokenizer.train(data.tokenizer_texts(flags.data, flags.seed), config.decoder.vocab_size)
    if not flags.vision:
        return VLM(config), tokenizer, "random weights (the first loss is near 15, not ln V = 7: see GPT's embed)"
    vit = ViT.from_pretrained(weights.fetch(flags.vision))
    config.vision, config.pretrained_vision = vit.config, flags.vision
    vlm = VLM(connect(config))
    vlm.vit = vit
    return vlm, tokenizer, f"random weights, the encoder from {flags.vision}"


def find_start(flags, stage: str) -> tuple[Path | None, str]:
    "-> (the checkpoint from which a new run of the stage starts, why this one); None: there is no earlier stage."
    found, before = checkpoints(flags.out_dir, flags.model), STAGES[:STAGES.index(stage)]
    earlier = [folder for name in reversed(before) for folder, run in found if run["stage"] == name]
    last = next((run for _, run in found if run["stage"] == stage), {})
    if last.get("data", flags.data) == flags.data:  # no other data. A fine-tuning that is repeated starts where it did.
        again = [folder for folder, run in found if run["stage"] not in before and run["saved"] == last.get("start")]
        return next(iter(again + earlier), None), ""
    # On other data, their own, people expect to go on with what the model has learned so far.
    finished = [folder for folder, run in found if run.get("step") == run.get("steps")]
    return next(iter(finished + earlier), None), (f", the newest finished model, since the last run had other data: "
                                                  f"{last['data']} (--init= chooses another)")


def load_start(flags, setup: Setup, stage: str) -> tuple[VLM, Tokenizer, dict, dict]:
    """
    The model a stage starts from -> (model on its device, tokenizer, resume state, optimizer tensors): the first that
    applies of four, and it says which.
    """
    # A broken source is an error and never falls through to the next: training would run from random weights and look
    # healthy, only worse.
    state, moments, why = {}, {}, ""
    if flags.resume:
        # 1. --resume: this stage's own last checkpoint, with its optimizer and its position in the data.
        source = weights.recover(stage_folder(flags, stage))
        state, moments = read_resume(source)
    else:
        # 2. --init: that folder.  3. The newest earlier stage under --out_dir; for fine-tuning the newest model.
        source, why = (flags.init, "") if flags.init else find_start(flags, stage)
    if source:
        # The tokenizer comes with the weights: ids mean nothing without it.
        vlm, tokenizer = load_checkpoint(source, setup.device), Tokenizer.from_pretrained(source)
        vlm.config.preset = vlm.config.preset or run_name(flags.model)  # a LLaVA folder of Hugging Face's has none
        vlm.config.run.setdefault("chapters", STAGES[:3])  # older checkpoints do not say
    else:
        # 4. The released weights of --model, or, for the presets that have none, random ones.
        vlm, tokenizer, source = without_checkpoint(flags, setup)
    if not flags.resume:
        start = vlm.config.run
        vlm.config.run = {"chapters": list(dict.fromkeys([*start.get("chapters", []), stage])), "stage": stage,
                          "start": start.get("saved"), "steps": flags.steps, "data": flags.data}
    for name, asked, found in (("model", run_name(flags.model), vlm.config.preset),
                               ("vision", flags.vision, vlm.config.pretrained_vision),
                               ("bridge", flags.bridge, vlm.config.bridge.kind),
                               ("lora_rank", flags.lora_rank, vlm.config.lora_rank or flags.lora_rank)):
        require(asked in ("", 0, found), f"--{name}={asked}, but {source} has --{name}={found}: "
                "give that, or start from another model by --init= or --out_dir=")
    if flags.lora_rank and not vlm.config.lora_rank:
        vlm.add_lora(flags.lora_rank)
    vlm.gpt.activation_checkpointing = flags.activation_checkpointing
    vlm.gpt.set_float8(flags.float8)
    setup.print(f"{'resuming' if flags.resume else 'starting'} {stage} from {source}"
                + (f" at step {state['step']}" if flags.resume else why))
    vlm.to(setup.device)
    if setup.compile:
        vlm.compile_parts()
    return vlm, tokenizer, state, moments


def freeze_all_but(vlm: VLM, trained: list[str]) -> dict[str, torch.nn.Parameter]:
    "Train only these parts (of vit, bridge, decoder) -> their parameters by name."
    # A ViT with pretrained weights stays frozen in every chapter: it was trained on far more pictures than we have.
    trained = [name for name in trained if name != "vit" or not vlm.config.pretrained_vision]
    # A frozen parameter costs its own bytes. A trained one costs 3 to 4 times that: gradient and optimizer state.
    for name, part in vlm.parts().items():
        part.requires_grad_(name in trained)
    if vlm.config.lora_rank and "decoder" in trained:  # of the decoder these alone
        for name, p in vlm.gpt.named_parameters():
            p.requires_grad_(".lora_" in name)
    return {name: p for name, p in vlm.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer

def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    g [n, rows, cols] -> for each matrix, nearly the closest one whose singular values are all 1 (Newton-Schulz
    iteration, coefficients by Keller Jordan, kellerjordan.github.io/posts/muon).
    """
    # Why: a gradient has a few strong directions. Made equal, rare ones are learned as fast as common ones.
    # How: a singular value decomposition would be exact and slow on GPUs. Products alone come close: each round maps
    # every singular value v to a v + b v^3 + c v^5 and does not change the directions. The slope a raises small values
    # 3.4 times a round; b and c hold large ones near 1. After five rounds all from 0.002 to 1 lie within 0.68 to 1.16.
    # Coefficients that end at exactly 1 rise more slowly, and training does not notice the difference.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()  # bfloat16 is enough, and on most CPUs far too slow
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # [n, short, long]: s below is then [short, short], the cheaper of the two
    # TRAP: a v above 1.3 would grow without limit. The norm is the root of the sum of all v^2, so after the division
    # none is above 1. 1e-7: a gradient of zeros stays zeros, instead of 0 / 0.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT                         # [n, short, short], v^2
        x = a * x + (b * s + c * s @ s) @ x  # [n, short, long]
    return (x.mT if tall else x).to(g.dtype)


# On the tiny model, chapter 3 alone reaches 71 % with 0.8, 66 % with 0.9, 57 % with the usual 0.95.
MOMENTUM = 0.8


def row_blocks(name: str, p: torch.Tensor) -> list[int]:
    "Rows of each matrix in p: query, key and value are stored as one for speed, [H + 2 kv, H]."
    rows, H = p.shape
    return [H, (rows - H) // 2, (rows - H) // 2] if name.endswith("qkv.weight") else [rows]


class Optimizer:
    """
    Muon (momentum, then orthogonalize) for matrices, AdamW for embeddings, norms and biases. It updates float32 master
    weights; the model's weights are these, rounded to the type in which the model computes. Each parameter is owned by
    one rank, which alone stores its master weight and optimizer state (ZeRO, arXiv 1910.02054).
    """

    def __init__(self, params: dict, kind: str, lr: float, state: dict | None = None):
        require(kind in ("muon", "adamw"), f"--optimizer={kind}: choose muon or adamw")
        self.params, self.lr = params, lr
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.owner, load = {}, [0] * self.world_size  # load: numbers each rank owns; large parameters go first
        for n in sorted(params, key=lambda n: -params[n].numel()):
            self.owner[n] = load.index(min(load))
            load[self.owner[n]] += params[n].numel()
        # In bfloat16's 2 to 3 digits small updates would be rounded away, and towards the end of a run all updates are
        # small. p.data: while the model is float32, master weights and weights are the same memory.
        self.master_weights = {n: p.data for n, p in params.items() if self.owner[n] == self.rank}
        # Muon is for matrices that map one space to another. Embeddings, positions and latents have two axes, too, but
        # are tables: each row is a vector of its own, and orthogonal rows would mean nothing.
        matrices = {n for n, p in params.items() if kind == "muon" and p.ndim == 2
                    and not n.endswith(("embed.weight", "head.weight", "position", "latents"))}
        # Muon stores the running mean of the gradients, AdamW also that of their squares.
        self.keys = {n: ("muon",) if n in matrices else ("step", "exp_avg", "exp_avg_sq") for n in params}
        self.moments = {n: {key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                            for key in self.keys[n]} for n, p in self.master_weights.items()}
        # 0.95 instead of the usual 0.999: a mean over some 20 steps, not 1000; tiny's whole runs are not that long.
        # fused: one kernel for all tensors. Else launching many small ones would cost more than the arithmetic.
        rest = [n for n in self.master_weights if n not in matrices]
        self.adamw = torch.optim.AdamW([self.master_weights[n] for n in rest], lr=lr, betas=(0.9, 0.95),
                                       weight_decay=0.0, fused=True) if rest else None
        for n in rest:
            self.adamw.state[self.master_weights[n]] = self.moments[n]
        for n, key in ((n, key) for n in self.moments if state for key in self.keys[n]):
            saved, tensor = state.get(f"{n}.{key}"), self.moments[n][key]
            require(saved is not None and saved.shape == tensor.shape,
                    f"--resume: optimizer.safetensors lacks {n}.{key} of shape {list(tensor.shape)}; was it saved by "
                    "another version? Start again without --resume")
            tensor.copy_(saved)

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        "One update from the gradients in params; lr_scale: the schedule's factor on the learning rate."
        lr = self.lr * lr_scale
        self.reduce_gradients()
        for n, p in self.params.items():
            if n in self.master_weights:
                self.master_weights[n].grad = None if p.grad is None else p.grad.to(self.master_weights[n].dtype)
            p.grad = None  # freed at once: its memory serves for the next one's float32
        if self.adamw:
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
        self.step_muon(lr)
        for n, p in self.master_weights.items():
            p.grad = None
            if self.params[n].data_ptr() != p.data_ptr():
                self.params[n].copy_(p)
        if self.world_size > 1:
            for n, p in self.params.items():
                dist.broadcast(p.data, self.owner[n])

    def step_muon(self, lr: float) -> None:
        "Matrices of one shape are orthogonalized together: few large products instead of many small ones."
        shapes = {}
        for n, p in self.master_weights.items():
            if "muon" not in self.keys[n] or p.grad is None:
                continue
            mean = self.moments[n]["muon"].lerp_(p.grad, 1 - MOMENTUM)
            g = p.grad.lerp(mean, MOMENTUM)  # Nesterov: the gradient, moved one step ahead along the momentum
            # Query, key and value separately: in one piece the value's large gradient would leave almost nothing of the
            # update to the other two, which decide where to attend.
            for block, gradient in zip(p.split(row_blocks(n, p)), g.split(row_blocks(n, p))):
                shapes.setdefault(block.shape, []).append((block, gradient))
        for shape, pairs in shapes.items():
            # An orthogonal [rows, cols] has entries of 1 / sqrt(longer side) in root mean square. Times 0.2 sqrt(longer
            # side) they are 0.2, as AdamW's usually are (arXiv 2502.16982): one learning rate serves both.
            updates = orthogonalize(torch.stack([gradient for _, gradient in pairs]))
            for (block, _), update in zip(pairs, updates):
                block.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)  # a view: this writes into the weight

    def reduce_gradients(self) -> None:
        "Each parameter's gradient, summed over the ranks, to its owner. Once a step, after all micro-batches."
        # Not DistributedDataParallel: it divides by the number of ranks, and our loss is divided already.
        if self.world_size == 1:
            return
        # A parameter that no row used has no gradient, as the bridge in a batch without pictures. If that holds on all
        # ranks it is skipped; else all must take part.
        used = torch.tensor([p.grad is not None for p in self.params.values()], dtype=torch.int32,
                            device=next(iter(self.params.values())).device)
        dist.all_reduce(used)
        for (n, p), by_some in zip(self.params.items(), used.tolist()):  # TRAP: in the same order on all ranks
            if by_some:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.reduce(p.grad, self.owner[n])  # NCCL only queues it: these follow each other without gaps

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        "-> on rank 0 (moments, master weights) of all parameters, by name. TRAP: all ranks must call it."
        def collect(n: str, tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
            if self.world_size == 1:
                return tensor
            # one at a time, and only rank 0 keeps it, in host memory: a GPU has no room for all of them
            tensor = torch.empty_like(like, dtype=torch.float32) if tensor is None else tensor
            dist.broadcast(tensor, self.owner[n])
            return tensor.cpu() if self.rank == 0 else None
        moments = {f"{n}.{key}": collect(n, self.moments.get(n, {}).get(key), p.new_zeros(()) if key == "step" else p)
                   for n, p in self.params.items() for key in self.keys[n]}
        return moments, {n: collect(n, self.master_weights.get(n), p) for n, p in self.params.items()}


def lr_scale(step: int, flags) -> float:
    "Up, flat, linearly down to 0. Of 100 steps, warmup 0.1, cooldown 0.5: 0.1 at step 0, 1 at 9 to 50, 0.5 at 75."
    # Up: at first the momentum is a mean of very few batches, too noisy for full steps. Flat: a cosine depends on the
    # run's length from its first step, this only once the descent begins. Down: large steps jitter around the minimum.
    warmup, cooldown = max(1, flags.warmup * flags.steps), max(1, flags.cooldown * flags.steps)
    return min(1.0, (step + 1) / warmup, (flags.steps - step) / cooldown)  # + 1: the first step is an update, too


# ----------------------------------------------------------------------------------------------------------------------
# Data: records -> packed micro-batches (data.py), for this model and these ranks

SMALLER = ("--activation_checkpointing, --lora_rank=16, or a shorter --seq_len (bench.py --what=memory tells what each "
           "saves)")


def largest_micro_batch(vlm: VLM, setup: Setup, share: int, make_batch) -> int:
    """
    The most rows per forward pass for which the GPU has the memory, of the divisors of `share`, a rank's rows in a
    step. make_batch(rows): such a batch. Without a GPU: all.
    """
    if setup.device.type != "cuda":
        return share
    torch.cuda.reset_peak_memory_stats()
    for rows in (n for n in range(share, 0, -1) if share % n == 0):
        try:  # Not computed but tried: what a pass needs depends on the compiler, the kernels and the model.
            batch = setup.to_device(make_batch(rows))
            for _ in range(min(2, share // rows)):  # of several micro-batches the second adds to gradients of the first
                loss = vlm(batch)
                if loss.requires_grad:  # not in alignment without a picture
                    loss.backward()
            # 7 % to spare: other batches have more pictures, and memory is fragmented
            fits = torch.cuda.max_memory_allocated() < 0.93 * torch.cuda.mem_get_info()[1]
        except torch.OutOfMemoryError:
            fits = False
        for p in vlm.parameters():
            p.grad = None
        torch.cuda.empty_cache()  # the fragments of a large attempt
        torch.cuda.reset_peak_memory_stats()
        if setup.all_reduce(fits) == setup.world_size:  # all ranks take the same
            setup.print(f"--micro_batch_size={rows}: the most rows of {share} that fit into this GPU's memory at once")
            return rows
    raise ValueError(f"not even one row fits into this GPU's memory; give {SMALLER}")


def make_loaders(flags, setup: Setup, vlm: VLM, tokenizer: Tokenizer, dataset, state: dict, **options) -> list:
    "-> one data.Loader for each micro-batch of this rank. options: of data.make_document."
    M = vlm.config.bridge.num_tokens
    make_document = partial(data.make_document, tokenizer=tokenizer, image_tokens=M, seq_len=flags.seq_len, **options)
    make = partial(data.Loader, dataset, make_document, data.pixel_loader(vlm.config.vision), seq_len=flags.seq_len,
                   image_tokens=M, pin=setup.device.type == "cuda")
    # batch_size 32, micro_batch_size 8 -> 4 micro-batches a step. Each reads its own share of the records, whichever
    # rank computes it, so that 1 GPU x 4 micro-batches and 4 GPUs x 1 train on the same rows.
    saved, micro = state.get("data") or [], flags.micro_batch_size  # saved: each micro-batch's position in the data
    if not micro and saved:
        micro = flags.batch_size // len(saved)
    elif not micro and flags.batch_size % setup.world_size == 0:
        micro = largest_micro_batch(vlm, setup, flags.batch_size // setup.world_size,
                                    lambda rows: next(make(rows=rows, prefetch=False)))
    count = flags.batch_size // max(micro, 1)
    require(micro >= 1 and count * micro == flags.batch_size and count % setup.world_size == 0,
            f"--batch_size={flags.batch_size} is not a multiple of --micro_batch_size={micro or 1} x "
            f"{setup.world_size} processes")
    require(len(saved) in (0, count), f"--resume: the run was started with {len(saved)} micro-batches a step, now "
            f"there are {count}; give --micro_batch_size={flags.batch_size // max(len(saved), 1)}")
    # Cut conversations train without any error, and the model never learns how they end: say how many there are.
    first = (data.attempt(dataset.__getitem__, i) for i in range(100))
    whole = [make_document(one, 0, seq_len=10 ** 9) for one in first if isinstance(one, dict) and "messages" in one]
    sets = getattr(dataset, "sets", [])
    if whole and len(sets) == 1 and isinstance(sets[0], data.Shuffled):
        n, tokens = len(sets[0].records), sum(len(document.ids) for document in whole if document) / len(whole)
        setup.print(f"{n:,} records train; {flags.steps} steps are about "
                    f"{flags.steps * flags.batch_size * flags.seq_len / (n * max(tokens, 1)):.1f} epochs")
    cut = sum(len(document.ids) - 1 > flags.seq_len for document in whole if document)
    if cut:
        setup.print(f"{cut} of {len(whole)} conversations are longer than --seq_len={flags.seq_len} and are cut: "
                    "their last turns are left out")
    workers = data.share_workers(getattr(flags, "workers", 0), setup.device.type, setup.world_size, count)
    setup.loaders = [make(rows=micro, micro_batch=i, micro_batches=count, state=saved[i] if saved else None,
                          workers=workers[i // setup.world_size])
                     for i in range(setup.rank, count, setup.world_size)]  # 4 micro-batches, 2 ranks: 0 and 2, 1 and 3
    return setup.loaders


# ----------------------------------------------------------------------------------------------------------------------
# The training step

def count_supervised(batches: list[dict], setup: Setup) -> float:
    "Supervised tokens of the step, over all micro-batches and ranks."
    tokens = setup.all_reduce(sum(len(batch["supervised"]) for batch in batches))
    require(tokens, f"no token of this step is supervised; its records: {record_names(batches)}")
    return tokens


def record_names(batches: list[dict]) -> str:
    names = [str(name) for batch in batches for name in batch["records"]]
    return ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20)


def count_images(batches: list[dict], setup: Setup) -> int:
    return int(setup.all_reduce(sum(len(batch["pixels"]) for batch in batches if batch["pixels"] is not None)))


def train_step(vlm: VLM, batches: list[dict], tokens: float, optimizer: Optimizer, setup: Setup,
               scale: float) -> float:
    """
    One optimizer step over this rank's micro-batches -> the loss of the whole step, in nats per token. tokens:
    supervised ones, of all micro-batches and ranks. scale: lr_scale's factor.
    """
    # The loss is a sum, divided by the tokens of the WHOLE step. Gradients add up, in p.grad over the micro-batches
    # (gradient accumulation) and in reduce_gradients over the ranks, so the result is the gradient of the mean over all
    # tokens, however they are split. TRAP: a mean of means would give a token in a short micro-batch more weight.
    total = 0.0
    for batch in batches:
        try:
            loss = vlm(setup.to_device(batch)) / tokens
            if loss.requires_grad:  # in alignment a micro-batch without pictures trains nothing
                loss.backward()
        except torch.OutOfMemoryError:
            rows = len(batch["ids"])
            raise ValueError(f"out of GPU memory with {rows} rows a forward pass; give " + (
                f"--micro_batch_size={next(n for n in range(rows - 1, 0, -1) if rows % n == 0)}" if rows > 1 else
                SMALLER)) from None
        total += loss.detach()  # a tensor on the GPU: its value here would make the CPU wait
    # 0 * norm is 0, and NaN if any gradient is not finite: one update with it, and all weights would be lost.
    total += 0 * get_total_norm([p.grad for p in optimizer.params.values() if p.grad is not None])
    total = setup.all_reduce(float(total))  # the one place where the CPU waits; it goes on while the optimizer works
    if math.isfinite(total):
        setup.bad_steps = 0
        optimizer.step(scale)
        return total
    for p in optimizer.params.values():
        p.grad = None
    setup.bad_steps += 1
    problem = f"loss or gradient is not a finite number ({setup.bad_steps} in a row; {record_names(batches)})"
    require(setup.bad_steps < setup.max_bad_steps, f"{problem}: stopped, and the last checkpoint is as it was; look at "
            "these records, or give a lower --lr")
    setup.print(f"step skipped: {problem}")
    return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Log, Ctrl-C, checkpoint, samples

def set_aside(folder: Path, keep: int) -> bool:
    "Before a new run: the stage's folder becomes STAGE.1, that of the run before STAGE.2, and so on -> whether it did."
    folder = weights.recover(folder)
    if not (folder / "config.json").exists():  # a run that never saved: at most its log
        shutil.rmtree(folder, ignore_errors=True)
        return False
    names = [folder, *(folder.with_name(f"{folder.name}.{i}") for i in range(1, keep + 1))]
    free = next((i for i, name in enumerate(names) if not name.exists()), keep)
    shutil.rmtree(names[free], ignore_errors=True)  # the oldest, if all names are taken
    for i in range(free, 0, -1):
        os.rename(names[i - 1], names[i])
    return True


def claim(folder: Path):
    "For one run at a time: two would mix their logs, and the later save would replace the other's -> a locked file."
    if os.name == "posix":  # there is no fcntl on Windows
        import fcntl
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f".{folder.name}.lock"), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed or the process ends
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir=") from None
        except OSError:  # a network folder that knows no locks
            pass
        return file


class Log:
    "One JSON object per line, in log.jsonl beside the checkpoint; each run has its own."

    def __init__(self, flags, setup: Setup, stage: str):
        self.path, self.is_main, self.usual = stage_folder(flags, stage) / "log.jsonl", setup.is_main, None
        self.lock = claim(self.path.parent) if setup.is_main else None
        if setup.is_main and flags.resume and self.path.exists():  # a full disk or a crash may have cut its last line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.keep, self.wandb = 0 if flags.resume else flags.keep, None
        if flags.wandb and setup.is_main:
            try:
                import wandb
            except ImportError:
                raise ValueError(f"--wandb={flags.wandb}: the package is not there; pip install wandb") from None
            self.wandb = wandb.init(project=flags.wandb, name=f"{flags.model}-{stage}", config=vars(flags))
        # The first line says what was run, and on what: months later nothing else tells two curves apart. A resumed run
        # adds its own. A downloaded archive has no .git, and so no commit to name.
        here = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=here).stdout.strip() if (here / ".git").exists() else ""
        self.waiting = [dict(
            command=" ".join(sys.argv), flags=vars(flags), device=str(setup.device), world_size=setup.world_size,
            dtype=str(setup.dtype), torch=torch.__version__, python=sys.version.split()[0], commit=git,
            time=time.strftime("%Y-%m-%d %H:%M:%S"))]

    def write(self, **values) -> None:
        loss = values.get("loss")
        if loss is not None and math.isfinite(loss):
            values |= {"spike": True} if self.usual and loss > 2 * self.usual else {}
            self.usual = loss if self.usual is None else 0.9 * self.usual + 0.1 * loss  # a mean of some 10 steps
        elif loss is not None:  # a skipped step; JSON has no NaN
            values["loss"] = None
        if not self.is_main:
            return
        # Only now, after a whole step: a run that fails at once leaves the run before it as it was.
        if self.keep and set_aside(self.path.parent, self.keep):
            tqdm.write(f"{self.path.parent} of the run before is now {self.path.parent}.1 (--keep={self.keep})",
                       file=sys.stderr)
        # TRAP: opened again for each line. A save puts a new folder in the old one's place: an open file would write
        # into the deleted one.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in [*self.waiting, values]))
        self.keep, self.waiting = 0, []
        if "lr" not in values:  # an evaluation or the run's result, not one of its many steps
            draw_curves(self.path)
        if self.wandb:
            self.wandb.log(values)


# The curves of a run: log.jsonl as a picture. {title of a chart: the log's names that are drawn in it}
CHARTS = {"loss, nats per token": ("loss", "caption_loss", "blind_loss"), "bits per byte": ("bits_per_byte", ),
          "held-out accuracy": ("accuracy", ), "reward": ("reward", "teaching")}
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f3fbf", "#8c564b", "#707070",
                "#e01010", "#000000")


def read_curves(rows: list[dict]) -> dict[str, dict[str, list]]:
    "A log's rows -> {title: {name: [(step, value), ...]}} for every chart of which the log has something."
    charts = {title: {} for title in CHARTS}
    for row in rows:
        if "step" not in row or "stage" in row:  # how the run was started, and its result: no points of a curve
            continue
        # RL evaluates two held-out splits at one step, and says which; so the split is part of the name.
        values = {f"{name} {row.get('split', '')}".strip(): value for name, value in row.items()}
        values |= {} if "split" in row else {f"accuracy: {kind}": value for kind, value in row.get(
            "accuracy_by_kind", {}).items()}
        for title, names in CHARTS.items():
            for name, value in values.items():
                # None: a step that was skipped, as its loss was no finite number
                if re.split("[ :]", name)[0] in names and value is not None and math.isfinite(value):
                    # By step: after a crash, a resumed run repeats some steps, and what it did then counts.
                    charts[title].setdefault(name.removeprefix("accuracy: "), {})[row["step"]] = value
    return {title: {name: sorted(line.items()) for name, line in lines.items()}
            for title, lines in charts.items() if lines}


def draw_curves(log: Path) -> None:
    "curves.png beside a log.jsonl."
    if charts := read_curves([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]):
        draw_lines(log.with_name("curves.png"), charts)


def draw_lines(path: Path, charts: dict[str, dict[str, list]], width: int = 800, height: int = 420) -> None:
    "Line charts under each other, {title: {name: [(x, y), ...]}}. Each line's name stands at its right end."
    # 24 pixels of 800 are letters that can still be read on a phone. White paper, so that dark pages show it too.
    font, (left, top, right, bottom) = ImageFont.load_default(24), (90, 60, width - 220, height - 50)
    sheet = Image.new("RGB", (width, height * len(charts)), "white")
    for number, (title, lines) in enumerate(charts.items()):
        chart = Image.new("RGB", (width, height), "white")
        pen, (xs, ys) = ImageDraw.Draw(chart), zip(*(point for line in lines.values() for point in line))
        round_numbers = [m * 10.0 ** e for e in range(-4, 7) for m in (1, 1.5, 2, 3, 5, 7)]
        if title.startswith("loss"):  # it falls from 15 to 0.2: on a logarithmic scale both ends can be read
            scale = lambda y: math.log(max(y, 9e-5))  # noqa: E731
            low, high, ticks = max(min(ys), 1e-4) / 1.1, max(*ys, 1e-4) * 1.1, round_numbers
        else:
            scale, step = lambda y: y, next(n for n in round_numbers if 5 * n >= max(ys))
            low, high, ticks = min(0, *ys), step * math.ceil(max(*ys, step) / step), [step * i for i in range(6)]

        def place(x: float, y: float) -> tuple[float, float]:  # a point of the chart -> a point of the picture
            return (left + (right - left) * (x - min(xs)) / max(max(xs) - min(xs), 1e-9),
                    bottom - (bottom - top) * (scale(y) - scale(low)) / (scale(high) - scale(low)))
        pen.text((12, 10), title, "black", font)
        above = math.inf
        for y in ticks:
            if low <= y <= high and place(0, y)[1] < above - 26:  # no number on top of another
                above = place(0, y)[1]
                pen.line((place(min(xs), y), place(max(xs), y)), "#dddddd", 2)
                pen.text((left - 10, above), f"{y:g}", "#555555", font, "rm")
        pen.text((left, bottom + 10), f"step {min(xs):g}", "#555555", font)
        pen.text((right, bottom + 10), f"{max(xs):g}", "#555555", font, "ra")
        free = 0.0  # The names from the highest line's end to the lowest's, moved apart where two would touch.
        for rest, (i, (name, line)) in zip(range(len(lines) - 1, -1, -1), sorted(
                enumerate(lines.items()), key=lambda item: -item[1][1][-1][1])):
            # Long runs are noisy: at most 150 points, each the mean of as many steps as that needs.
            colour, n = LINE_COLOURS[i % len(LINE_COLOURS)], -(-len(line) // 150)
            means = [[sum(axis) / len(axis) for axis in zip(*line[at:at + n])] for at in range(0, len(line), n)]
            points = [place(x, y) for x, y in means]
            pen.line(points, colour, 4, "curve")
            pen.circle(points[-1], 6, colour)
            free = max(free + 27, min(points[-1][1], bottom - 27 * rest))
            pen.text((right + 16, free), name, colour, font, "lm")
        sheet.paste(chart, (0, number * height))
    sheet.save(path)


class Interrupt:
    "Ctrl-C, SIGTERM (a machine that is taken back) or SIGHUP: finish the step, save, stop. Ctrl-C again: stop at once."

    def __init__(self):
        self.interrupted, self.first, self.steps = False, 0.0, 0
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.old = {number: signal.signal(number, self.handle) for number in signals
                    if signal.getsignal(number) != signal.SIG_IGN}  # as nohup wishes

    def handle(self, number, _):
        # Only a flag for the loop: raising here could stop a step half-way, with some weights updated.
        if not self.interrupted:
            self.interrupted, self.first = True, time.time()
            print("\nstopping: finishing this step and saving (Ctrl-C again: at once)", file=sys.stderr, flush=True)
        # TRAP: the terminal and torchrun both pass a Ctrl-C on: the second within a second is the same one.
        elif number == signal.SIGINT and time.time() - self.first > 1:
            raise KeyboardInterrupt

    def requested(self, setup: Setup) -> bool:
        "To be called before each step."
        # Also if a loader cannot go on, for too many bad records, say: the steps that are done must not be lost.
        failures = [setup.failure, *(loader.failure() for loader in setup.loaders)]
        setup.failure = next(filter(None, failures), None)
        # On any rank, and then on all: one that stopped alone would leave the others waiting for its gradients.
        self.interrupted = setup.all_reduce(float(self.interrupted or setup.failure is not None)) > 0
        if self.interrupted and not self.steps:  # nothing was learned yet, so an earlier run's checkpoint stays
            raise setup.failure or KeyboardInterrupt
        self.steps += 1
        return self.interrupted

    def close(self) -> None:
        "After the loop signals have their usual meaning again: there is nothing left to save."
        for number, handler in self.old.items():
            signal.signal(number, handler)


def save_checkpoint(folder, vlm: VLM, tokenizer: Tokenizer, moments: dict | None = None, state: dict | None = None,
                    master_weights: dict | None = None) -> None:
    """
    config.json, model.safetensors and the tokenizer; for --resume optimizer.safetensors and state.json. Tensors and
    JSON only: nothing is ever unpickled. All or nothing: a crash at any moment leaves a whole checkpoint.
    """
    tensors = dict(vlm.named_parameters()) | (master_weights or {})
    for name, tensor in tensors.items():
        require(tensor.isfinite().all(), f"{folder}: not saved, because {name} holds NaN or Inf; a checkpoint that is "
                "there stays as it was. Start again with a lower --lr")
    # log.jsonl and samples.png of the old folder are carried over; an old optimizer beside new weights must not be.
    with weights.replace_folder(folder, drop=("optimizer.safetensors", "state.json")) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
        tokenizer.save(new)  # with the weights: another tokenizer's ids would mean other words
        stamp = {"step": str((state or {}).get("step", 0))}  # proves that all files belong to one moment
        weights.write_safetensors(tensors, new / "model.safetensors", {"format": "pt", **stamp})
        if moments is not None:
            weights.write_safetensors(moments, new / "optimizer.safetensors", stamp)
            (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def save(flags, setup: Setup, stage: str, vlm: VLM, tokenizer: Tokenizer, optimizer: Optimizer, loaders: list,
         step: int, **more) -> Path:
    "The stage's checkpoint, with all that --resume needs -> its folder. `more` goes into state.json."
    folder = stage_folder(flags, stage)
    vlm.config.run |= {"step": step, "saved": time.time()}
    # Weights alone are not the run: without optimizer state the first steps are poor, without positions in the data
    # records are used twice. TRAP: all ranks must call save(), though one writes: each has only its own part.
    positions = setup.gather([loader.state() for loader in loaders])  # a handful of integers each
    moments, master_weights = optimizer.state()
    if setup.is_main:
        kept = {name: value for name, value in vars(flags).items()
                if name not in ("init", "out_dir", "resume", "micro_batch_size")}  # these are found anew
        state = {"step": step, "data": positions, "flags": kept, **more}
        try:
            # resolve: a link to a folder on a larger disk stays one; the folder that it names is replaced.
            save_checkpoint(folder.resolve(), vlm, tokenizer, moments, state, master_weights)
            draw_curves(folder / "log.jsonl")
        except OSError as error:  # a full disk, a network folder that is gone; Python does not name the file
            raise ValueError(f"{folder}: step {step} could not be saved ({error}); make room and " + (
                "continue what was saved before by --resume; it is whole" if (folder / "state.json").exists() else
                "start again; nothing was saved before")) from None
    return folder


def finish(setup: Setup, log: Log, **results) -> None:
    "The run's last line: one JSON object on standard output; or the error for which it stopped, now that it is saved."
    if setup.device.type == "cuda":
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    log.write(**results)
    if log.lock:
        log.lock.close()  # the next run may write here
    if setup.failure:
        raise setup.failure
    if setup.is_main:  # the only print to standard output: `python train_sft.py | tail -1` is ready for a script
        print(json.dumps(results))
