"""
How good, and how fast: measured on the real code, never on a copy of it.

    python bench.py --what=eval --init=out/tiny/rl                    # held-out accuracy, blind and shuffled baselines
    python bench.py --what=eval --init=out/tiny/rl --data=test.json   # on your own questions
    python bench.py --what=eval --init=out/tiny/rl --data=MMStar      # on a public benchmark, fetched first
    python bench.py --what=data --data=my.json --workers=8            # the loader alone: does it keep up with the step?
    python bench.py --what=speed                                      # this machine: the training step and decoding
    python bench.py --what=speed --model=qwen2.5-1.5b --micro_batch_size=8  # the same of a large model, random weights
    python bench.py --what=ladder --model=qwen2.5-1.5b --batch_size=8 --micro_batch_size=4  # what each idea is worth
    python bench.py --what=profile --model=small                      # which kernels a step spends its time in
    python bench.py --what=memory --model=qwen2.5-3b --gpus=8         # what each stage will need; no GPU is asked
    python bench.py --what=serve                                      # 1 to 64 clients of a real server
    python bench.py --what=compare --init=out/tiny/sft.1,out/tiny/sft # two runs: which is better, and what differs
    python bench.py --what=figures --init=assets/tiny                 # the pictures of README.md and docs/

The last line of standard output is one JSON object; tables go to standard error.
"""
import argparse
import functools
import json
import math
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

from plumbing.flags import parse_flags, run  # before torch: see plumbing/files.py

import torch
import torch.nn.functional as F

import data
import model
import sample
import train_rl
from plumbing.checkpoints import newest_checkpoint
from plumbing.engine import Engine, Request
from plumbing.files import require, say
from plumbing.fitting import largest_micro_batch
from plumbing.optimizer import Optimizer
from plumbing.ranks import Setup
from plumbing.recipes import read_records
from plumbing.workers import share_workers
from plumbing.world import World
from model import FROM_SCRATCH, PRESETS, VLM, preset
from tokenizer import Tokenizer
from train_base import chapter_flags, count_supervised, freeze_all_but, load_start, make_loaders, train_step
from train_sft import evaluate_with_baselines
from vision import Tiles, layout_of
from extras.benchmarks import Answers, evaluate_file
from extras.compare import compare, read_log
from extras.figures import draw_book, draw_ladder
from extras.load_test import make_bodies, measure
from extras.memory import STAGES, bench_memory
from extras.server import Handler, Server

BY_MODEL = {"tiny": {"batch_size": 32, "seq_len": 128}, "small": {"batch_size": 64, "seq_len": 1024},
            "released": {"batch_size": 32, "seq_len": 2048}}
FLAGS = {
    "what": ("eval", "eval, data, speed, ladder, profile, memory, serve, compare or figures"),
    "clients": ("1,8,32,64", "serve: how many at once, one number after another"),
    "model": ("tiny", f"{', '.join(PRESETS)}, or a hub id (Org/Name) or folder"),
    "vision": ("", "speed: encoder in place of the preset's"),
    "bridge": ("", "speed: perceiver, pixelshuffle or mlp, in place of the preset's"),
    "set": ("", "speed, memory: as in training"),
    "tiles": (int, "as in training, with pictures as large as that; not given: 0, but for accuracy the model's own"),
    "init": ("", "checkpoint folder; empty: the latest stage under --out_dir, for speed else random weights; "
                 "compare: several, comma-separated"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "data": ("world", "world, a benchmark's name (data.py --download=list), or files of records, comma-separated"),
    "answers": ("", "eval of files and benchmarks: a .jsonl that keeps the answers; run again to go on"),
    "workers": (-1, "data: processes that open pictures; -1: up to 8 with a GPU, else 0"),
    # With half of 2,000 questions right, the 95 % interval reaches 2 points to each side; of 100 questions, 10 points.
    "eval_size": (2000, "questions at most"),
    "batch_size": (None, "speed, memory: rows per training step; speed: prompts decoded at once"),
    "micro_batch_size": (0, "rows per forward pass; 0: on a GPU as many as fit, else and for memory: batch_size"),
    "seq_len": (None, "speed, memory: tokens per row"),
    "lora_rank": (0, "speed, memory: as in training"),
    "activation_checkpointing": (False, "speed, memory: as in training"),
    "float8": (False, "speed, profile: as in training"),
    "gpus": (1, "memory: how many share a step"),
    "steps": (10, "speed: steps that are timed, after three that are not; serve: requests of each client"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),
    "seed": (0, "of random weights"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: the built-in world, one's own files, and the public benchmarks by their official rules

def bench_eval(flags) -> dict:
    "The same questions three times: with their own picture, with none, and with another's."
    setup = Setup(flags)
    # Checked here, since load_start would use random weights: good enough for speed, but without any accuracy.
    if not (flags.init or newest_checkpoint(flags.out_dir, flags.model) or flags.model == "llava-ov-0.5b"):
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}; train one, or name a "
                         "checkpoint folder by --init=")
    vlm, tokenizer = load(flags, setup)
    if flags.data == "world":
        held_out = {split: [world[i] for i in range(flags.eval_size)] for split in ("scenes", "pairs")
                    for world in [World("exam", split, seed=1)]}
        # seed=1: the questions that the stages ask at their end, only more of them.
        results = evaluate_with_baselines(vlm, tokenizer, held_out, setup)
    else:
        # The whole file: nothing is held out, as it is in training. TRAP: on a file that the model was trained on this
        # measures its memory.
        ask, sets = Answers(flags.answers, setup, vlm, tokenizer, flags.init or flags.model), {}
        for name, _ in data.parse_mixture(flags.data):
            records = [question for record in read_records(name) for question in data.questions_of(record)]
            sets[name if Path(name).stem in sets else Path(name).stem] = records[:flags.eval_size]
        results = {name: evaluate_file(name, records, ask) for name, records in sets.items()}
    # The first split's numbers stand on top too: a script finds "accuracy" there, whatever the split's name.
    return {"what": "eval", "data": flags.data, **next(iter(results.values())), "splits": results}


def bench_data(flags) -> dict:
    "The loader alone: records, pictures and tokens a second, padding, memory. No model, and no GPU."
    config = preset(flags.model, flags.bridge)
    config.vision.tiles = flags.tiles or 0
    image_tokens = data.token_counter(config)
    # A tokenizer of these data's own, so that nothing must be downloaded; its tokens are about as long as Qwen's.
    tokenizer = Tokenizer.train(data.tokenizer_texts(flags.data, 0, 3_000_000), min(config.decoder.vocab_size, 8192))
    started = time.perf_counter()
    dataset, _ = data.load_data(flags.data, World("chat"), {}, flags.seed, 1, max_bad=0.01)
    opened = time.perf_counter() - started
    workers, = share_workers(flags.workers, "cuda" if torch.cuda.is_available() else "cpu", 1, 1)
    make = functools.partial(data.make_document, tokenizer=tokenizer, image_tokens=image_tokens, seq_len=flags.seq_len)
    loader = data.Loader(dataset, make, data.pixel_loader(config.vision), flags.batch_size, flags.seq_len, image_tokens,
                         workers=workers)
    for _ in range(3):  # until the workers are busy and their queues are full
        next(loader)
    batches, times = [], [time.perf_counter()]
    while len(batches) < flags.steps or times[-1] - times[0] < 5:
        batch = next(loader)
        times.append(time.perf_counter())
        shown = len(batch["tiles"] or batch["image_index"])
        batches.append((len(batch["records"]), shown, int((batch["document_ids"] > 0).sum())))
    # What was ready in the queues when the clock began is not paid for here: with few batches, that would flatter.
    seconds = times[-1] - times[0]
    records, pictures, tokens = (sum(column) for column in zip(*batches))
    # What no packing could fill: attention and matrix products run over it for nothing.
    waste = 1 - tokens / (len(batches) * flags.batch_size * flags.seq_len)
    import resource  # not on Windows
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    say(f"{flags.data}: opened in {opened:.1f} s; {workers} workers: {records / seconds:,.0f} records, "
        f"{pictures / seconds:,.0f} pictures, {tokens / seconds:,.0f} tokens a second, {waste:.1%} padding, "
        f"{seconds / len(batches) * 1e3:.0f} ms a batch, {memory:,.0f} MB in the main process")
    return {"what": "data", "data": flags.data, "model": flags.model, "workers": workers, "open_s": opened,
            "records_per_s": records / seconds, "pictures_per_s": pictures / seconds, "tokens_per_s": tokens / seconds,
            "ms_per_batch": seconds / len(batches) * 1e3, "padding": waste, "main_mb": memory}


def load(flags, setup) -> tuple[VLM, Tokenizer]:
    flags.resume = False  # load_start reads it; here it is no flag
    flags.init = flags.init or newest_checkpoint(flags.out_dir, flags.model)
    # Without --init, load_start looks for earlier stages than the one named. Before base there are none, so the result
    # is the random weights that base begins with.
    vlm, tokenizer, _, _ = load_start(flags, setup, "bench" if flags.init else "base")
    return vlm, tokenizer


def clock(work, steps: int, device) -> float:
    "Seconds per call, the median of `steps`."
    times = []
    for i in range(steps + 3):
        start_time = time.perf_counter()
        work()
        # work() only puts kernels into the GPU's queue. Without waiting we would time the queueing.
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_time)
    # The first three calls warm up: they compile, choose kernels, fetch memory, make the optimizer's moments.
    # The median of the rest, not the mean: one slow moment of a shared machine would move the mean.
    return sorted(times[3:])[steps // 2]


# A step's speed alone says little: is 50,000 tokens/s good? So it is held against what this machine can do at most,
# measured in the same minute: a card that is hot or shared is slower today than its data sheet.

def matmul_ceiling(setup) -> float:
    "FLOP/s of large matrix products here and now, one after another: what no training step can exceed."
    # So large that computing outweighs launching the kernel and reading memory: 1.1 TFLOP on a GPU, 2.1 GFLOP on a CPU.
    n, times = (8192, 300) if setup.device.type == "cuda" else (1024, 1)
    # In the dtype of the step: a float32 step compared with bfloat16's ceiling would look worse than it is.
    a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
    # Each of the n^2 results is a sum of n products: n multiplications and n additions, 2 n FLOP. On a GPU for half a
    # second at a stretch: a single product runs faster than the card's power allows for long.
    return 2 * n ** 3 * times / clock(lambda: [a @ b for _ in range(times)], 3, setup.device)


def step_flops(vlm: VLM, trained: list[str], tokens: int, supervised: int, images: int) -> dict[str, float]:
    "FLOP of one step in each part, only those of matrix products with weights. supervised: supervised tokens."
    # Attention's scores, norms and the optimizer take time but are not counted. So the share of the ceiling errs on the
    # low side, and 100 % is out of reach.
    out = {}
    for name, group in vlm.parts().items():
        # Positions and latents are added, an embedding is looked up: no product.
        weights = sum(p.numel() for n, p in group.named_parameters()
                      if p.ndim == 2 and not n.endswith(("embed.weight", "head.weight", "position", "latents")))
        # The Perceiver's keys and values are really made at N + M positions, patches and latents; M are counted.
        positions = {"vit": images * vlm.config.vision.num_patches, "bridge": images * vlm.config.bridge.num_tokens,
                     "decoder": tokens}[name]
        products = weights * positions + (vlm.gpt.head_weight.numel() * supervised if name == "decoder" else 0)
        # Per weight and position: 2 FLOP forward, 2 for the gradient of the input, 2 for that of the weight. A frozen
        # decoder has no weight gradient, but passes the input's on to the bridge: 4. A frozen ViT only runs forward: 2.
        learns = name in trained and not (name == "vit" and vlm.config.pretrained_vision)
        out[name] = products * (6 if learns else 4 if name == "decoder" else 2)
    return out


def llava_like(vlm: VLM, stage: str, seq_len: int):
    """
    A function (record, index) -> Document of random words, as long as LLaVA's conversations are: a picture and words
    whose number has the median 200, half of them supervised. Stage base: plain text, a row each.
    """
    M = picture_tokens(vlm)
    require(stage == "base" or M + 32 <= seq_len, f"--tiles={vlm.config.vision.tiles}: a picture takes {M} tokens, "
            f"which leaves too few of --seq_len={seq_len}")

    def make(record, index) -> data.Document:
        rng = random.Random(index)
        words = seq_len + 1 if stage == "base" else round(min(max(200 * math.exp(rng.gauss(0, 0.7)), 32), seq_len - M))
        ids = [rng.randrange(vlm.config.decoder.vocab_size) for _ in range(words)]
        if stage == "base":
            return data.Document(index, ids, [1] * words, [], record)
        return data.Document(index, [0] * M + ids, [0] * (M + words // 2) + [1] * (words - words // 2), [0],
                             {"id": str(index), "images": [index]}, counts=[M])
    return make


def noise(vlm: VLM):
    # How long a picture takes does not depend on what it shows. Seeded: whichever thread draws it, it is the same one.
    config, S = vlm.config.vision, vlm.config.vision.image_size
    rows = math.isqrt(max(1, config.tiles))
    tiles = layout_of(config.tiles // rows * S, rows * S, config, alone=True)

    def draw(source, record) -> torch.Tensor | Tiles:
        squares = torch.randint(0, 256, (tiles.squares if tiles else 1, 3, S, S), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(int(source)))
        return replace(tiles, pixels=squares) if tiles else squares[0]
    return draw


def picture_tokens(vlm: VLM) -> int:
    return vlm.config.bridge.tokens_of(noise(vlm)(0, None))


# No kernel looks at the values that it multiplies, so a step takes as long with random weights. Accuracy needs real
# ones: bench_eval refuses to measure without.

def random_model(flags, setup) -> VLM:
    "A preset of random weights, made on the device."
    config = preset(flags.model, flags.bridge, flags.set)
    config.lora_rank, config.vision.tiles = flags.lora_rank, flags.tiles or 0
    with setup.device:
        vlm = VLM(config)
    vlm.gpt.activation_checkpointing = flags.activation_checkpointing
    vlm.gpt.set_float8(flags.float8)
    if setup.compile:
        vlm.compile_parts()
    return vlm


def load_or_draw(flags, setup) -> tuple[VLM, Tokenizer | None]:
    "A trained model, or, of those that are too large to train for a measurement, random weights and no tokenizer."
    if flags.model in FROM_SCRATCH or flags.init:
        return load(flags, setup)
    return random_model(flags, setup), None


class Step:
    """
    One stage's real training step, again and again on the same rows: the functions that the stages call, in their
    order. A copy of the loop would soon measure something else.
    """

    def __init__(self, flags, setup, vlm: VLM, tokenizer, stage: str):
        task, self.trained = STAGES[stage]
        vlm.float().train()  # the optimizer's master weights start from these
        torch.compiler.reset()  # TRAP: code compiled for a frozen decoder would be used again, and give it no gradients
        self.vlm, self.setup, self.params = vlm, setup, freeze_all_but(vlm, self.trained)
        # A step's work does not depend on the rate. A real rate, again and again on one batch, could drive the weights,
        # which the next stage goes on with, to NaN.
        self.optimizer = Optimizer(self.params, "muon" if flags.model in FROM_SCRATCH else "adamw", 1e-9)
        vlm.to(setup.dtype)
        if tokenizer is None:
            self.make, share = llava_like(vlm, stage, flags.seq_len), flags.batch_size
            endless = [{"images": []}] * 10 ** 6  # make needs no more than a record's number

            def loader(rows: int, micro_batch: int = 0, micro_batches: int = 1) -> data.Loader:
                return data.Loader(endless, self.make, noise(vlm), rows, flags.seq_len, None, micro_batch,
                                   micro_batches, prefetch=False, pin=setup.device.type == "cuda")
            micro = flags.micro_batch_size or largest_micro_batch(vlm, setup, share, lambda rows: next(loader(rows)))
            self.loaders = [loader(micro, i, share // micro) for i in range(share // micro)]
        else:
            self.loaders = make_loaders(flags, setup, vlm, tokenizer, World(task), {}, supervise_all=task == "text")
            for loader in self.loaders:
                loader.prefetch = False  # loading is timed separately
        self.batches = [next(loader) for loader in self.loaders]
        # Padding (document 0) is work without use and counts as no token. A picture shared by several rows counts once.
        self.tokens = sum(int((b["document_ids"] > 0).sum()) for b in self.batches)
        self.images = sum(0 if b["pixels"] is None else len(b["pixels"]) for b in self.batches)
        self.supervised = count_supervised(self.batches, setup)

    def __call__(self) -> float:
        return train_step(self.vlm, self.batches, self.supervised, self.optimizer, self.setup, 1.0)


def bench_speed(flags) -> dict:
    "A training step of each stage, chapter 4's rollouts and update, decoding; each beside the machine's ceiling."
    setup = Setup(flags)
    vlm, tokenizer = load_or_draw(flags, setup)
    ceiling, rows, gpu = matmul_ceiling(setup), {}, setup.device.type == "cuda"
    setup.print(f"{torch.cuda.get_device_name() if gpu else 'cpu'}, {setup.dtype}, {torch.get_num_threads()} threads, "
              f"torch {torch.__version__}; matrix products reach {ceiling / 1e9:,.0f} GFLOP/s")
    # "of ceiling" compares machines, each held against its own limit, and shows how much room is left. It cannot tell
    # where the rest of the time went: small products, attention, the optimizer, or waiting.
    setup.print(f"{'stage':<10}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'of ceiling':>12}{'vit':>6}{'bridge':>8}"
              f"{'decoder':>9}{'loader ms':>11}{'first s':>9}{'GiB':>7}")
    for stage in STAGES:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = Step(flags, setup, vlm, tokenizer, stage)
        started = time.perf_counter()
        step()  # compiles
        first = time.perf_counter() - started
        # Timed apart from the step; in training a thread does it meanwhile.
        loading = clock(lambda: [next(loader) for loader in step.loaders], 3, torch.device("cpu"))
        seconds = clock(step, flags.steps, setup.device)
        shares = {part: flop / seconds / ceiling for part, flop in step_flops(
            vlm, step.trained, step.tokens, step.supervised, step.images).items()}
        rows[stage] = {"ms": seconds * 1e3, "tokens_per_s": step.tokens / seconds,
                       "images_per_s": step.images / seconds, "of_ceiling": sum(shares.values()), "by_part": shares,
                       "loader_ms": loading * 1e3, "first_step_s": first,
                       "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if gpu else None}
        setup.print(f"{stage:<10}{seconds * 1e3:>9.1f}{step.tokens / seconds:>10,.0f}{step.images / seconds:>10,.0f}"
                  f"{sum(shares.values()):>12.0%}" + "".join(f"{shares[p]:>{w}.1%}" for p, w in
                                                             (("vit", 6), ("bridge", 8), ("decoder", 9)))
                  + f"{loading * 1e3:>11.1f}{first:>9.1f}{rows[stage]['peak_gib'] or 0:>7.1f}")
        del step
    rows["rl"] = bench_rl(flags, setup, vlm, tokenizer or Tokenizer.train(["user\nassistant\n"], 300))
    rows |= bench_decode(flags, setup, vlm.eval())
    return {"what": "speed", "device": setup.device.type, "dtype": str(setup.dtype), "matmul_gflops": ceiling / 1e9,
            **rows}


def bench_rl(flags, setup, vlm: VLM, tokenizer: Tokenizer) -> dict:
    "Chapter 4's step, 16 questions x 16 answers: the time of the rollouts and of the update."
    ours = argparse.Namespace(**{name: default for name, (default, _) in train_rl.FLAGS.items()} | vars(flags))
    records, step = [World("exam")[i] for i in range(16)], Step(flags, setup, vlm, None, "sft")

    def roll_out() -> tuple[list, list]:
        return train_rl.rollout(vlm, tokenizer, records, ours, 0)

    def learn() -> None:
        # Random weights are never right, and then there would be nothing to learn: every other answer is praised.
        documents, step.supervised, _ = train_rl.to_documents(records, prompts, groups, tokenizer,
                                                           lambda record, ids, tokenizer: ids[0] % 2)
        step.batches = train_rl.pack_all(documents, flags.micro_batch_size or 4, flags.seq_len, vlm)
        step()
    prompts, groups = roll_out()
    rolling, learning = (clock(work, min(flags.steps, 5), setup.device) for work in (roll_out, learn))
    setup.print(f"rl: 16 x 16 answers of {ours.max_new_tokens} tokens in {rolling * 1e3:.0f} ms, the update in "
              f"{learning * 1e3:.0f} ms: rollouts take {rolling / (rolling + learning):.0%} of the step")
    return {"rollout_ms": rolling * 1e3, "update_ms": learning * 1e3, "rollout_share": rolling / (rolling + learning)}


def bench_decode(flags, setup, vlm: VLM) -> dict:
    "After a picture and 40 words: time to the first token, and tokens per second after it."
    rows, M, new = {}, picture_tokens(vlm), 128
    # How long words take does not depend on what they say; but equal prompts and pictures would be computed once.
    prompts = [data.Document(0, [1] * (M + 39) + [2 + i], [], [0], {}) for i in range(flags.batch_size)]
    pictures = [noise(vlm)(i, None) for i in range(len(prompts))]
    for batch in sorted({1, flags.batch_size}):
        # list() runs the generator to its end: without it nothing would be computed. No stop tokens: all answers are
        # equally long.
        first, all_ = (clock(lambda: list(vlm.generate(prompts[:batch], pictures[:batch], max_new_tokens=n)),
                             min(flags.steps, 5), setup.device)
                       for n in (1, new + 1))
        # The first token waits for ViT, bridge and prompt. The difference of the two times is pure decoding. Every step
        # must read all the decoder's weights once: its share of what memory could carry.
        speed = batch * new / (all_ - first)
        moved = sum(p.nbytes for p in vlm.gpt.parameters()) * new / (all_ - first)
        rows[f"decode_{batch}"] = {"first_token_ms": first * 1e3, "tokens_per_s": speed,
                                   "weights_gb_per_s": moved / 1e9}
        setup.print(f"decode, {batch} at once: first token after {first * 1e3:.1f} ms, then {speed:,.0f} tokens/s, "
                  f"weights at {moved / 1e9:,.{0 if moved > 1e10 else 2}f} GB/s")
    return rows


def bench_profile(flags) -> dict:
    "A trace of one step of chapter 3, to be opened at ui.perfetto.dev, and the kernels that take longest."
    setup = Setup(flags)
    vlm = random_model(flags, setup)
    step = Step(flags, setup, vlm, None, "sft")
    for _ in range(3):
        step()
    with torch.profiler.profile() as recorded:
        step()
    recorded.export_chrome_trace("trace.json")
    gpu = setup.device.type == "cuda"
    sort = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [e for e in recorded.key_averages() if (e.device_type.name == "CUDA") == gpu]
    events.sort(key=lambda e: -getattr(e, sort))
    for event in events[:20]:
        setup.print(f"{getattr(event, sort) / 1e3:>9.2f} ms {event.count:>6} x  {event.key[:90]}")
    return {"what": "profile", "trace": "trace.json", "ms": {e.key: getattr(e, sort) / 1e3 for e in events[:20]}}


# ----------------------------------------------------------------------------------------------------------------------
# The ladder: chapter 3's step from the plainest code to the one we use, one idea at a time

# What is each idea for speed worth? The only honest answer is the same work on the same rows without it. From rung to
# rung one idea is added, and the loss must stay the same (a test).

def plain_loss(x, head, targets, loss_weights=None, supervised=None, chunk=0, cross_entropy=None) -> torch.Tensor:
    "What token_loss computes, in the obvious way: all logits at once, also where there is no target."
    return F.cross_entropy(F.linear(x, head).flatten(0, 1).float(), targets.flatten(), reduction="sum")


def one_by_one(step: Step) -> list[dict]:
    "The documents of a step, each in a row of its own, in passes of four rows that are padded to the longest of them."
    out = []
    documents = [step.make(None, int(name)) for batch in step.batches for name in batch["records"]]
    for four in (documents[i:i + 4] for i in range(0, len(documents), 4)):
        width = max(len(document.ids) for document in four) - 1
        # A batch of one row for each, and then these are joined: `pack` alone would lay two short ones into one row.
        rows = [data.collate(*data.pack([document], 1, width, None)[:2], noise(step.vlm)) for document in four]
        out.append({name: torch.cat([row[name] for row in rows]) for name in rows[0] if torch.is_tensor(rows[0][name])})
        out[-1] |= {"image_positions": torch.cat([row["image_positions"] + j * width for j, row in enumerate(rows)]),
                    "image_index": torch.arange(len(out[-1]["pixels"])), "tiles": rows[0]["tiles"] and sum(
                        (row["tiles"] for row in rows), []), "cu_seqlens": None, "supervised": None, "records": []}
    return out


RUNGS = ["one conversation a row, float32", "bfloat16 over float32 master weights", "packed rows",
         "loss of supervised tokens only", "torch.compile", "float8"]


def bench_ladder(flags) -> dict:
    "Real tokens per second of chapter 3's step on each rung. A rung keeps what those below it have."
    rows, gpu, fused = [], Setup(flags).device.type == "cuda", model.token_loss
    # bfloat16 and the last two are for GPUs, and float8 for those that have it
    skipped = (1, 4, 5) if not gpu else (5,) if torch.cuda.get_device_capability() < (8, 9) else ()
    for i, rung in enumerate(RUNGS):
        if i in skipped:
            continue
        flags.dtype, flags.compile, flags.float8 = "float32" if i == 0 else "auto", str(i >= 4), i == 5
        model.token_loss = plain_loss if i < 3 else fused
        setup = Setup(flags)
        vlm = random_model(flags, setup)
        try:
            step = Step(flags, setup, vlm, None, "sft")
            if i < 2:
                step.batches = one_by_one(step)
            if i < 3:  # the last block and the logits at every position, too
                step.batches = [batch | {"supervised": None} for batch in step.batches]
            seconds = clock(step, 3, setup.device)
            rows.append({"rung": rung, "tokens_per_s": step.tokens / seconds})
            setup.print(f"{rung:<50}{step.tokens / seconds:>10,.0f} tokens/s"
                      + (f"{rows[-1]['tokens_per_s'] / rows[-2]['tokens_per_s']:>8.2f} x" if i else ""))
        finally:
            model.token_loss = fused
        del vlm, step
        if gpu:
            torch.cuda.empty_cache()
    draw_ladder("ladder.png", rows)
    return {"what": "ladder", "model": flags.model, "rungs": rows, "chart": "ladder.png"}


# ----------------------------------------------------------------------------------------------------------------------
# Serving

def bench_serve(flags) -> dict:
    "1, 8, 32 and 64 clients at once; a single one sends its requests one after another."
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.clients):
        raise ValueError(f"--clients={flags.clients}: give numbers above 0, comma-separated")
    setup, counts = Setup(flags), [int(n) for n in flags.clients.split(",")]
    vlm, tokenizer = load_or_draw(flags, setup)
    tokenizer = tokenizer or Tokenizer.train(["user\nassistant\n"], 300)
    asked = parse_flags("", sample.FLAGS, argv=["--serve", "--port=0"])
    server = Server(vlm.to(setup.dtype).eval(), tokenizer, asked)
    server.stop = set()  # every answer is as long as it was asked to be
    Handler.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # On a GPU the first time compiles, and the second records graphs, which the others replay.
    rows = measure(server, counts, flags.steps, 2 if setup.device.type == "cuda" else 1, setup.print)
    server.shutdown()
    # Without sockets and files of pictures: the same engine gets all requests at the start. Once those of as many
    # clients as it has rows, with their lengths; once an answer of the mean length for each row, so that none is free.
    R = min(max(counts), server.engine.rows)

    def answer_all(lengths: list[int]) -> None:
        prompts = [data.Document(0, [1] * (picture_tokens(vlm) + 59) + [i], [], [0], {})
                   for i in range(len(lengths))]
        requests = [Request(prompt, [noise(vlm)(i, None)], max_new_tokens=n)
                    for i, (prompt, n) in enumerate(zip(prompts, lengths))]
        engine = Engine(vlm, rows=R, width=1024)
        list(engine.run(requests))
        engine.close()
    offline = [json.loads(body)["max_tokens"] for body in make_bodies(R * flags.steps)]
    speeds = {name: sum(lengths) / clock(lambda lengths=lengths: answer_all(lengths), 3, setup.device)
              for name, lengths in (("offline", offline), ("generate", [136] * R))}
    setup.print("\n".join(f"{name:>8}{speed:>10,.0f}" for name, speed in speeds.items()))
    return {"what": "serve", "model": flags.model, "device": setup.device.type, "clients": rows,
            "tokens_per_s": speeds}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: the curves of several runs in one chart, and the figures of the book

def bench_compare(flags) -> dict:
    "Several runs: accuracy on the same questions, the difference with its interval, what differs, and their curves."
    return compare(flags, Setup(flags))


def bench_figures(flags) -> dict:
    "assets/*.png, from the checkpoint --init, its log.jsonl and docs/results.json; and README.md's count of lines."
    return {"what": "figures", "files": draw_book(
        read_log(flags.init) if flags.init else [], flags.init, lambda: load(flags, Setup(flags)))}


def main() -> None:
    flags = chapter_flags(__doc__, "bench", FLAGS, BY_MODEL)
    jobs = {"eval": bench_eval, "data": bench_data, "speed": bench_speed, "ladder": bench_ladder,
            "profile": bench_profile, "memory": bench_memory, "serve": bench_serve, "compare": bench_compare,
            "figures": bench_figures}
    if flags.what not in jobs:
        raise ValueError(f"--what={flags.what}: choose {', '.join(jobs)}")
    print(json.dumps(jobs[flags.what](flags)))


if __name__ == "__main__":
    run(main)
