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
    python bench.py --what=compare --init=out/tiny/sft,out/tiny/sft.1 # two runs' curves in one picture, compare.png
    python bench.py --what=figures --init=assets/tiny                 # the pictures of README.md and docs/

The last line of standard output is one JSON object; tables go to standard error.
"""
import argparse
import base64
import functools
import http.client
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import data  # first: see its imports
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

import model
import sample
import train_rl
from model import PRESETS, VLM, Block, add_lora, newest_checkpoint, preset, respond, rope_table
from tokenizer import Tokenizer
from train_sft import answers, cider, evaluate_with_baselines, exchange_pictures, score_answer, wilson, yes_or_no
from training import (FROM_SCRATCH, Optimizer, Setup, count_supervised, draw_lines, freeze_all_but,
                      largest_micro_batch, load_start, make_loaders, parse_flags, read_curves, run, train_step)
from vision import Bridge, ViTBlock, load_image
from weights import named_errors, parse_json, read_json
from world import World

# Its data in the built-in world, and the parts that are trained; chapter 4 trains the same parts as sft.
STAGES = {"base": ("text", ["decoder"]), "align": ("captions", ["bridge", "vit"]),
          "sft": ("chat", ["bridge", "decoder", "vit"])}
BY_MODEL = {"tiny": {"batch_size": 32, "seq_len": 128}, "small": {"batch_size": 64, "seq_len": 1024},
            "released": {"batch_size": 32, "seq_len": 2048}}
CARDS = (8, 12, 16, 24, 40, 80, 141)  # GiB
FLAGS = {
    "what": ("eval", "eval, data, speed, ladder, profile, memory, serve, compare or figures"),
    "clients": ("1,8,32,64", "serve: how many at once, one number after another"),
    "model": ("tiny", f"{', '.join(PRESETS)}, or a hub id (Org/Name) or folder"),
    "vision": ("", "speed: encoder in place of the preset's"),
    "bridge": ("", "speed: perceiver, pixelshuffle or mlp, in place of the preset's"),
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

# Questions about one picture or one option are not worth a point each in every benchmark. To be comparable with
# published numbers, ours must be counted as theirs are, odd rules included.

def official_score(name: str, records: list, texts: list[str], right: list[float]) -> tuple[str, float]:
    "-> (what the benchmark calls its score, the score), where that is not plain accuracy."
    if name.startswith("MMBench"):
        # Circular: each question comes in all rotations of its options, index + n * 1,000,000. Only if all of them are
        # right it counts: a model that prefers the letter A fails.
        groups = {}
        for record, value in zip(records, right):
            groups.setdefault(int(record["id"]) % 10 ** 6, []).append(value)
        return "circular accuracy", 100 * sum(map(min, groups.values())) / len(groups)
    if name.startswith("POPE"):
        # F1 of "yes", the harmonic mean of precision and recall: half of the questions ask for things that are not
        # there, and a model that says yes to all has a recall of 100 %. An answer that is neither counts as no.
        yes = [(yes_or_no(text) == "yes", record["answer"].lower() == "yes") for record, text in zip(records, texts)]
        hits, said, true = sum(a and b for a, b in yes), sum(a for a, _ in yes), sum(b for _, b in yes)
        return "F1", 200 * hits / max(said + true, 1)
    if name.startswith("MME"):
        # Two questions about each picture, one to be answered by yes, one by no. For each category: the accuracy, plus
        # the share of pictures with both right, in %. So the best score of a category is 200.
        categories = {}
        for record, value in zip(records, right):
            pictures = categories.setdefault(record["kind"], {})
            pictures.setdefault(data.picture_key(record["images"][0]), []).append(value)
        return "sum of accuracy and accuracy+", sum(
            100 * sum(map(sum, pictures.values())) / sum(map(len, pictures.values()))
            + 100 * sum(map(min, pictures.values())) / len(pictures) for pictures in categories.values())
    if name.startswith("HallusionBench"):
        # An id ends in _SET_FIGURE_QUESTION. A figure counts if all questions about it are right, a question if it is
        # right about all figures of its set: one is drawn with other facts, and there the answer is the opposite.
        figures, questions = {}, {}
        for record, value in zip(records, right):
            *some, figure, question = record["id"].split("_")
            figures.setdefault((*some, figure), []).append(value)
            questions.setdefault((*some, "", question), []).append(value)
        shares = [100 * sum(right) / len(right)] + [100 * sum(map(min, of.values())) / len(of)
                                                    for of in (figures, questions)]
        return "mean of aAcc {:.1f}, fAcc {:.1f} and qAcc {:.1f}".format(*shares), sum(shares) / 3
    if all(record.get("metric") == "cider" for record in records):
        references = [[a] if isinstance(a, str) else a for a in (record["answer"] for record in records)]
        return "CIDEr", 100 * sum(cider(texts, references)) / len(records)
    return "accuracy", 100 * sum(right) / len(right)


class Answers:
    """
    The answers to one set, in a file of one JSON object per line: a run that was stopped goes on from there. Thousands
    of questions, asked three times (own picture, blind, shuffled), take a large model hours.
    """

    # What tells two answers apart: another checkpoint's are not this one's, and in a file two records may have one id.
    KEY = "model", "set", "image", "number", "id"

    def __init__(self, path: str, setup, vlm, tokenizer, who: str):
        self.setup, self.vlm, self.tokenizer, self.known = setup, vlm, tokenizer, {}
        self.who = f"{who} {vlm.config.run.get('start')}"  # start: when the checkpoint was saved
        # Each rank writes a file of its own, PATH.0, PATH.1, ...; all are read, whatever number of ranks wrote them.
        self.path = f"{path}.{setup.rank}" if path and setup.world_size > 1 else path
        files = [Path(path), *sorted(Path(path).parent.glob(Path(path).name + ".[0-9]*"))] if path else []
        for file in filter(Path.exists, files):
            with named_errors(file), open(file, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n") or not '{"model": '.startswith(line[:10]):  # whole, or not ours
                        row = parse_json(line, file)
                        if not isinstance(row, dict) or not row.keys() >= {*self.KEY, "text"}:
                            raise ValueError(f"{file}: not written by --what=eval; name another file by --answers=")
                        self.known[tuple(row[name] for name in self.KEY)] = row["text"]
                    elif file == Path(self.path):  # killed in the middle of it: the next line must not follow it
                        os.truncate(file, os.path.getsize(file) - len(line))  # json.dumps wrote ASCII

    def __call__(self, name: str, records: list, image: str) -> list[str]:
        "-> the texts, of all ranks, in order. image: own, blind or shuffled."
        setup, keys = self.setup, [(self.who, name, image, n, record["id"]) for n, record in enumerate(records)]
        mine = list(zip(keys, records))[setup.rank::setup.world_size]
        for at in range(0, len(mine), 100):  # written every 100: no more than these are lost
            new = {key: record for key, record in mine[at:at + 100] if key not in self.known}
            texts = answers(self.vlm, self.tokenizer, [*new.values()], blind=image == "blind") if new else []
            self.known |= zip(new, texts)
            if self.path and new:
                with open(self.path, "a") as file:
                    file.writelines(json.dumps(dict(zip(self.KEY, key), text=text)) + "\n"
                                    for key, text in zip(new, texts))
        return setup.gather([self.known[key] for key, _ in mine])


def evaluate_file(name: str, records: list, ask: Answers) -> dict:
    "A benchmark or a file of questions -> its official score, accuracy and interval, blind and shuffled beside them."
    # The distance between the columns is what the picture is worth. A score alone does not tell: the likeliest answer
    # to a benchmark's question is often right.
    columns = {"own": records, "blind": records, "shuffled": exchange_pictures(records)}
    results, setup = {}, ask.setup
    for image, asked in columns.items():
        if asked:
            texts = ask(name, asked, image)
            right = [score_answer(record, text) for record, text in zip(records, texts)]
            title, score = official_score(name, records, texts, right)
            results[image] = {"score": score, "accuracy": sum(right) / len(right), "right": right}
    own, right = results["own"], results["own"]["right"]
    low, high = wilson(sum(right), len(right))
    setup.print(f"\n{name}: {title} " + ", ".join(f"{image} {r['score']:.1f}" for image, r in results.items())
                + f"   ({len(right)} questions, 95 % interval of the accuracy {low:.1%} to {high:.1%})")
    # What the papers and model cards of models of this size say, to stand beside ours.
    published = read_json(Path(__file__).with_name("assets") / "published.json")
    for model_name, value in published.get(name, {}).items():
        setup.print(f"  {model_name:<40}{value:>8.1f}")
    kinds = {}
    for record, value in zip(records, right):
        kinds.setdefault(record.get("kind", "all"), []).append(value)
    return {"n": len(right), "accuracy": own["accuracy"], "ci95": (low, high), "score": own["score"], "score_is": title,
            "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())},
            "blind_accuracy": results["blind"]["accuracy"], "blind_score": results["blind"]["score"],
            "shuffled_accuracy": results["shuffled"]["accuracy"] if "shuffled" in results else None}


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
            records = [question for record in data.read_records(name) for question in data.questions_of(record)]
            sets[name if Path(name).stem in sets else Path(name).stem] = records[:flags.eval_size]
        results = {name: evaluate_file(name, records, ask) for name, records in sets.items()}
    # The first split's numbers stand on top too: a script finds "accuracy" there, whatever the split's name.
    return {"what": "eval", "data": flags.data, **next(iter(results.values())), "splits": results}


def bench_data(flags) -> dict:
    "The loader alone: records, pictures and tokens a second, padding, memory. No model, and no GPU."
    config, M = preset(flags.model, flags.bridge), preset(flags.model, flags.bridge).bridge.num_tokens
    # A tokenizer of these data's own, so that nothing must be downloaded; its tokens are about as long as Qwen's.
    tokenizer = Tokenizer.train(data.tokenizer_texts(flags.data, 0, 3_000_000), min(config.decoder.vocab_size, 8192))
    started = time.perf_counter()
    dataset, _ = data.load_data(flags.data, World("chat"), {}, flags.seed, 1, max_bad=0.01)
    opened = time.perf_counter() - started
    workers, = data.share_workers(flags.workers, "cuda" if torch.cuda.is_available() else "cpu", 1, 1)
    make = functools.partial(data.make_document, tokenizer=tokenizer, image_tokens=M, seq_len=flags.seq_len)
    loader = data.Loader(dataset, make, data.pixel_loader(config.vision), flags.batch_size, flags.seq_len, M,
                         workers=workers)
    for _ in range(3):  # until the workers are busy and their queues are full
        next(loader)
    batches, times = [], [time.perf_counter()]
    while len(batches) < flags.steps or times[-1] - times[0] < 5:
        batch = next(loader)
        times.append(time.perf_counter())
        batches.append((len(batch["records"]), len(batch["image_index"]), int((batch["document_ids"] > 0).sum())))
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
    def make(record, index) -> data.Document:
        rng, M = random.Random(index), vlm.config.bridge.num_tokens
        words = seq_len + 1 if stage == "base" else round(min(max(200 * math.exp(rng.gauss(0, 0.7)), 32), seq_len - M))
        ids = [rng.randrange(vlm.config.decoder.vocab_size) for _ in range(words)]
        if stage == "base":
            return data.Document(index, ids, [1] * words, [], record)
        return data.Document(index, [0] * M + ids, [0] * (M + words // 2) + [1] * (words - words // 2), [0],
                             {"id": str(index), "images": [index]})
    return make


def noise(vlm: VLM):
    # How long a picture takes does not depend on what it shows. Seeded: whichever thread draws it, it is the same one.
    size = vlm.config.vision.image_size
    return lambda source, record: torch.randint(0, 256, (3, size, size), dtype=torch.uint8,
                                                generator=torch.Generator().manual_seed(int(source)))


# No kernel looks at the values that it multiplies, so a step takes as long with random weights. Accuracy needs real
# ones: bench_eval refuses to measure without.

def random_model(flags, setup) -> VLM:
    "A preset of random weights, made on the device."
    config = preset(flags.model, flags.bridge)
    config.lora_rank = flags.lora_rank
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
                return data.Loader(endless, self.make, noise(vlm), rows, flags.seq_len, vlm.config.bridge.num_tokens,
                                   micro_batch, micro_batches, prefetch=False, pin=setup.device.type == "cuda")
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
    rows, M, new = {}, vlm.config.bridge.num_tokens, 128
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
    M, out = step.vlm.config.bridge.num_tokens, []
    documents = [step.make(None, int(name)) for batch in step.batches for name in batch["records"]]
    for four in (documents[i:i + 4] for i in range(0, len(documents), 4)):
        width = max(len(document.ids) for document in four) - 1
        # A batch of one row for each, and then these are joined: `pack` alone would lay two short ones into one row.
        rows = [data.collate(*data.pack([document], 1, width, M)[:2], noise(step.vlm)) for document in four]
        out.append({name: torch.cat([row[name] for row in rows]) for name in rows[0] if torch.is_tensor(rows[0][name])})
        out[-1] |= {"image_positions": torch.cat([row["image_positions"] + j * width for j, row in enumerate(rows)]),
                    "image_index": torch.arange(len(rows)), "cu_seqlens": None, "supervised": None, "records": []}
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
# Memory, predicted without a GPU
# Memory of training has six parts. Weights, gradients, float32 master weights and the optimizer's moments follow from
# the number of parameters. Activations, what the forward pass stores for the backward pass, are the largest part and
# hard to derive: they depend on what the compiler decides to keep. So they are measured, on one layer, on the CPU. The
# loss needs some logits at once.

def saved_bytes(module, compiled: bool, *inputs) -> int:
    "Bytes that autograd stores of one call in bfloat16 for the backward pass."
    module.to(torch.bfloat16)
    own, pieces, alive = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)  # else its memory might be given to another, and both would count as one
        if tensor.untyped_storage().data_ptr() not in own:  # a view's memory counts once, and whole
            pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch._dynamo.reset()
    # torch.compile computes some things twice rather than keep them. This backend makes the same choice, without a GPU.
    call = torch.compile(module, backend="aot_eager_decomp_partition") if compiled else module
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*inputs)
    return sum(pieces.values())


# A layer stores so many bytes for each token, and some that do not depend on their number. Two measurements tell both.

def line(measure, a: int, b: int) -> tuple[float, float]:
    "measure(n) = each * n + fixed -> (each, fixed)."
    each = (measure(b) - measure(a)) / (b - a)
    return each, measure(a) - each * a


def predict(flags, stage: str, lora: int):
    """
    A function: (rows per forward pass, with activation checkpointing?) -> GiB that a stage needs at its peak, by part,
    in bfloat16, with float32 master weights, compiled. Measured are one layer of each kind with small inputs, on the
    CPU; the rest is arithmetic.
    """
    config = preset(flags.model, flags.bridge)
    config.lora_rank, decoder, vision = lora, config.decoder, config.vision
    with torch.device("meta"):
        vlm = VLM(config)
    learn = sum(p.numel() for p in freeze_all_but(vlm, STAGES[stage][1]).values())
    total = sum(p.numel() for p in vlm.parameters())
    layers, V, H = decoder.num_hidden_layers, decoder.vocab_size, decoder.hidden_size

    def layer(T: int) -> int:
        block, rope = Block(decoder), rope_table(torch.arange(T)[None], decoder)
        if lora:
            add_lora(block, lora)
        for mine, real in zip(block.parameters(), vlm.gpt.blocks[0].parameters()):
            mine.requires_grad_(real.requires_grad)
        return saved_bytes(block, True, torch.randn(1, T, H, requires_grad=True, dtype=torch.bfloat16), rope)

    def seeing(module, compiled: bool):
        return line(lambda n: saved_bytes(module, compiled, torch.randn(
            n, vision.num_patches, vision.hidden_size, requires_grad=True, dtype=torch.bfloat16)), 1, 2)

    per_token, fixed = line(layer, 64, 128)
    per_picture, bridge = (0, 0) if stage == "base" else seeing(Bridge(config.bridge), False)
    if vlm.vit.patch.weight.requires_grad:
        each, once = seeing(ViTBlock(vision), True)
        per_picture, bridge = per_picture + each * vision.num_hidden_layers, bridge + once * vision.num_hidden_layers

    def parts(micro: int, thrift: bool) -> dict[str, float]:
        tokens = micro * flags.seq_len
        pictures = tokens / (config.bridge.num_tokens + 256)  # LLaVA's conversations
        one = per_token * tokens
        # With checkpointing each layer stores only its input; the backward pass computes the rest, layer by layer.
        stored = layers * fixed + layers * (tokens * H * 2 if thrift else one) + bridge + per_picture * pictures
        # There one layer's gradients come and go, mostly those of gate and up; but by then the logits are gone.
        returning = 8 * tokens * decoder.intermediate_size + (one if thrift else 0)
        # token_loss: a chunk's logits and their gradient; the head's gradient in float32, and once more in bfloat16.
        logits = 4 * V * min(4096, tokens if stage == "base" else tokens / 2)
        loss = max(0, logits - returning) + 6 * V * H * vlm.gpt.embed.weight.requires_grad
        # All in bfloat16; master weights and moments, two by AdamW, one by Muon, in float32.
        own = learn / flags.gpus  # each GPU keeps those of its share
        out = {"weights": 2 * total, "gradients": 2 * learn, "master weights": 4 * own,
               "optimizer": (4 if flags.model in FROM_SCRATCH else 8) * own,
               "activations": stored + returning, "loss": loss}
        # Of several passes the last meets the gradients of those before. Of one, they are made while activations go.
        one_pass = micro * flags.gpus >= flags.batch_size
        out["peak"] = sum(out.values()) - one_pass * min(2 * learn, out["activations"] + loss)
        # The optimizer takes the gradients in float32; by then no activations are left.
        out["peak"] = max(out["peak"], out["weights"] + out["master weights"] + out["optimizer"] + 4 * own)
        return {name: value / 2 ** 30 for name, value in out.items()}
    return parts


def bench_memory(flags) -> dict:
    "Each stage's peak on a GPU, and what to set for cards of several sizes."
    if flags.model not in PRESETS:
        raise ValueError(f"--what=memory needs a preset ({', '.join(PRESETS)}), not --model={flags.model}")
    share = flags.batch_size // flags.gpus
    if share < 1 or flags.batch_size % flags.gpus:
        raise ValueError(f"--batch_size={flags.batch_size} is not a multiple of --gpus={flags.gpus}")
    micro, rows = flags.micro_batch_size or share, {}
    say(f"{flags.model}, rows of {flags.seq_len} tokens, {flags.batch_size} a step, {micro} a pass; GiB a GPU")
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    for stage in STAGES:
        ranks = [0] if stage == "align" else [0, flags.lora_rank or 16]  # in align the decoder is frozen
        parts = {rank: predict(flags, stage, rank) for rank in ranks}
        rows[stage] = parts[flags.lora_rank if stage != "align" else 0](micro, flags.activation_checkpointing)
        say(f"{stage:<6}" + ", ".join(f"{name} {value:.1f}" for name, value in rows[stage].items()))
        for card in CARDS:  # 1 GiB is CUDA's own
            # from the fastest way to the thriftiest
            fitting = (f"--lora_rank={rank} " * bool(rank) + "--activation_checkpointing " * thrift
                       + f"--micro_batch_size={n}" for rank in ranks for thrift in (False, True) for n in sizes
                       if parts[rank](n, thrift)["peak"] + 1 < card)
            rows[stage][f"{card} GiB"] = next(fitting, "does not fit")
            say(f"{card:>10} GiB: {rows[stage][f'{card} GiB']}")
    return {"what": "memory", "model": flags.model, "batch_size": flags.batch_size, "seq_len": flags.seq_len, **rows}


# ----------------------------------------------------------------------------------------------------------------------
# Serving: clients of a real server, over real sockets

# What counts for a user is not tokens per second, but how long the first word takes, and whether the next ones flow. So
# each client notes when each piece of text arrives, over a real socket, with pictures that the server must decode.

def make_bodies(n: int) -> list[bytes]:
    "n requests: a picture of 100 to 1,000 pixels a side and 40 words each, answers of 32 to 256 tokens."
    bodies, rng = [], random.Random(0)
    for i in range(n):
        file = io.BytesIO()
        World("captions", seed=i)[0]["images"][0].draw(rng.choice([100, 250, 500, 1000])).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        text = " ".join(rng.choice(["what", "is", "the", "cat", "red"]) for _ in range(40))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        bodies.append(json.dumps({
            "stream": True, "stream_options": {"include_usage": True}, "seed": i,
            "messages": [{"role": "user", "content": content}], "max_tokens": rng.choice([32, 96, 160, 256])}).encode())
    return bodies


def ask(port: int, body: bytes) -> tuple[float, list[float], int]:
    "One request -> (when it was sent, when its pieces of text came, tokens)."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent, times, tokens = time.perf_counter(), [], 0
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"the server answered {answer.status}: {answer.read()[:200]}")
    for line in answer:
        if b'"content": "' in line and b'"role"' not in line:
            times.append(time.perf_counter())
        elif b'"usage"' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    connection.close()
    return sent, times, tokens


def clients(port: int, n: int, each: int) -> tuple[float, list]:
    """
    n clients, a thread each, in a process of their own -> (seconds, what `ask` gave for each request). Each takes the
    next request as soon as it has an answer, so that all are busy nearly to the end.
    """
    bodies = make_bodies(n * each)
    with ThreadPoolExecutor(n) as pool:
        started = time.perf_counter()
        results = list(pool.map(functools.partial(ask, port), bodies))
    return time.perf_counter() - started, results


def quantiles(values: list[float]) -> list[float]:
    "-> [p50, p95], milliseconds."
    values = sorted(values) or [math.nan]
    return [values[int(len(values) * share)] * 1e3 for share in (0.5, 0.95)]


def bench_serve(flags) -> dict:
    "1, 8, 32 and 64 clients at once; a single one sends its requests one after another."
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.clients):
        raise ValueError(f"--clients={flags.clients}: give numbers above 0, comma-separated")
    setup, rows = Setup(flags), {}
    vlm, tokenizer = load_or_draw(flags, setup)
    tokenizer = tokenizer or Tokenizer.train(["user\nassistant\n"], 300)
    asked = data.parse_flags("", sample.FLAGS, argv=["--serve", "--port=0"])
    server = sample.Server(vlm.to(setup.dtype).eval(), tokenizer, asked)
    server.stop = set()  # every answer is as long as it was asked to be
    sample.Handler.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Clients in this process would compete for its interpreter. One process, in which each client is a thread.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    setup.print(f"{'clients':>8}{'tokens/s':>10}{'first token ms, p50':>21}{'p95':>8}{'next ms, p50':>14}{'p95':>8}")
    counts = [int(n) for n in flags.clients.split(",")]
    # On a GPU the first time compiles, and the second records graphs, which the others replay.
    for n in [max(counts)] * (2 if setup.device.type == "cuda" else 1) + counts:
        seconds, results = pool.submit(clients, server.server_port, n, flags.steps).result()
        speed = sum(tokens for *_, tokens in results) / seconds
        # The first n arrive together. Those that follow, if there are any, are newcomers among others.
        first = quantiles([times[0] - sent for sent, times, _ in results[n:] or results if times])
        after = quantiles([b - a for _, times, _ in results for a, b in zip(times, times[1:])])
        rows[str(n)] = {"tokens_per_s": speed, "first_token_ms": first, "next_token_ms": after}
        setup.print(f"{n:>8}{speed:>10,.0f}{first[0]:>21.1f}{first[1]:>8.1f}{after[0]:>14.1f}{after[1]:>8.1f}")
    pool.shutdown()
    server.shutdown()
    # Without sockets and files of pictures: the same engine gets all requests at the start. Once those of as many
    # clients as it has rows, with their lengths; once an answer of the mean length for each row, so that none is free.
    R = min(max(counts), server.engine.rows)

    def answer_all(lengths: list[int]) -> None:
        prompts = [data.Document(0, [1] * (vlm.config.bridge.num_tokens + 59) + [i], [], [0], {})
                   for i in range(len(lengths))]
        requests = [model.Request(prompt, [noise(vlm)(i, None)], max_new_tokens=n)
                    for i, (prompt, n) in enumerate(zip(prompts, lengths))]
        engine = model.Engine(vlm, rows=R, width=1024)
        list(engine.run(requests))
        engine.close()
    offline = [json.loads(body)["max_tokens"] for body in make_bodies(R * flags.steps)]
    speeds = {name: sum(lengths) / clock(lambda lengths=lengths: answer_all(lengths), 3, setup.device)
              for name, lengths in (("offline", offline), ("generate", [136] * R))}
    setup.print("\n".join(f"{name:>8}{speed:>10,.0f}" for name, speed in speeds.items()))
    return {"what": "serve", "model": flags.model, "device": setup.device.type, "clients": rows,
            "tokens_per_s": speeds}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: the curves of several runs in one chart, and the figures of README.md and docs/, drawn from the checkpoint
# and the logs themselves. All are 800 pixels wide with few, large letters, so that they can be read on a phone.

def read_log(folder: str) -> list[dict]:
    with open(path := Path(folder, "log.jsonl"), encoding="utf-8") as file:
        return [parse_json(line, path) for line in file]


def bench_compare(flags) -> dict:
    "Several runs -> compare.png with a chart for each thing that their logs have, and the flags in which they differ."
    if not flags.init:
        raise ValueError("--what=compare: name the folders of two runs or more, --init=out/tiny/sft,out/tiny/sft.1")
    logs, charts, results = {name: read_log(name) for name in flags.init.split(",")}, {}, {}
    common = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in logs])
    for name, rows in logs.items():
        for title, lines in read_curves(rows).items():
            # Of accuracy only the total: ten kinds of questions in each run would be too many lines.
            for line, points in lines.items():
                if line.split()[0] in ("loss", "caption_loss", "bits_per_byte", "accuracy", "reward"):
                    # Beside a line there is room for some 18 letters: what all names begin with is left out.
                    charts.setdefault(f"{title}: {line}", {})[os.path.relpath(name, common)] = points
        results[name] = {key: value for key, value in rows[-1].items() if isinstance(value, (int, float, str))}
    if not charts:
        raise ValueError(f"--init={flags.init}: these logs have no steps yet")
    draw_lines(Path("compare.png"), charts)
    told = [rows[0].get("flags", {}) for rows in logs.values()]  # a log's first line says how the run was started
    differ = {key: values for key in told[0] if len(set(map(str, values := [one.get(key) for one in told]))) > 1}
    say("\n".join(f"{key}: {', '.join(map(str, values))}" for key, values in differ.items()) or "the same flags in all")
    return {"what": "compare", "chart": "compare.png", "flags_that_differ": differ, "results": results}


# One meaning for each colour in all figures: grey is given or blind, blue comes from a picture or is read, green is
# learned or right, orange is computed, red is wrong, pale is empty.
GREY, BLUE, GREEN, ORANGE, RED, PALE = "#d4d4d4", "#7db8e0", "#57b894", "#e8a33d", "#d0603a", "#e4eef6"
WIDE = 800  # pixels. A page shows a figure at half of that or less on a phone: letters below 20 could not be read.


def font(size: int = 24):
    return ImageFont.load_default(size)


def page(high: int, title: str = "") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    "White paper with a title -> (the picture, a pen to draw on it)."
    sheet = Image.new("RGB", (WIDE, high), "white")  # a background of its own: a reader's page may be dark
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 10), title, "black", font(26))
    return sheet, pen


def cells(sheet, at: tuple, size: tuple, colours: list[list[str]]) -> None:
    "A table of coloured cells, without lines between them, that fills size pixels."
    rgb = np.array([[ImageColor.getrgb(colour) for colour in row] for row in colours], dtype=np.uint8)
    sheet.paste(Image.fromarray(rgb).resize(size, Image.Resampling.NEAREST), at)


def bars(title: str, rows: list[tuple[str, list[tuple[float, str]], str]], left: int = 300, tall: int = 46,
         legend: dict = {}) -> Image.Image:
    """
    Horizontal bars, (name, [(length, colour), ...] end to end, what is written behind). Negative ones go to the left.
    legend: {what a colour means: the colour}.
    """
    sheet, pen = page(60 + tall * len(rows) + 36 * -(-len(legend) // 3), title)
    totals = [sum(value for value, _ in parts) for _, parts, _ in rows]
    zero, unit = left, (WIDE - left - 110) / (max(0, *totals) - min(0, *totals) or 1)
    zero -= min(0, *totals) * unit
    for i, (name, parts, text) in enumerate(rows):
        x, y = zero, 56 + tall * i
        pen.text((left - 14, y + tall / 2 - 5), name, "black", font(), "rm")
        for value, colour in parts:
            pen.rectangle((min(x, x + value * unit), y, max(x, x + value * unit), y + tall - 10), colour)
            x += value * unit
        pen.text((max(x, zero) + 10, y + tall / 2 - 5), text, "black", font(), "lm")
    for i, (name, colour) in enumerate(legend.items()):
        x, y = 20 + i % 3 * 260, sheet.height - 36 * (-(-len(legend) // 3) - i // 3)
        pen.rectangle((x, y, x + 22, y + 22), colour)
        pen.text((x + 32, y + 11), name, "black", font(), "lm")
    return sheet


def draw_ladder(path, rungs: list[dict]) -> None:
    bars("tokens a second; each idea on top of those above", [
        (r["rung"], [(r["tokens_per_s"], BLUE)], f"{r['tokens_per_s']:,.0f}") for r in rungs], left=430).save(path)


class Subject:
    "What the figures are about: cat.jpg, a trained model, and what it computes of the picture."

    def __init__(self, vlm: VLM, tokenizer: Tokenizer):
        self.vlm, self.tokenizer, self.M = vlm.eval(), tokenizer, vlm.config.bridge.num_tokens
        self.image = load_image(Path(__file__).with_name("cat.jpg"))
        self.pixels = data.preprocess(self.image, vlm.config.vision.image_size)                  # [3, S, S]
        self.features = vlm.vit_features(self.pixels[None])[0]                                   # [N, D]

    def ask(self, question: str) -> str:
        return respond(self.vlm, self.tokenizer, [[sample.make_message(question, 1)]], [[self.pixels]])[0]

    def document(self, question: str, answer: str) -> data.Document:
        messages = [sample.make_message(question, 1), {"role": "assistant", "content": answer}]
        return data.make_document({"id": "cat", "messages": messages, "images": ["cat.jpg"]}, 0, self.tokenizer,
                                  self.M, 1000)

    def words(self, ids) -> list[str]:
        "What each token stands for. <|im_end|> -> im_end"
        texts = [self.tokenizer.decode([i], skip_special=False).replace("\n", "\\n").strip() for i in ids]
        return [text.replace("<|image_pad|>", "pad").replace("<|", "").replace("|>", "") for text in texts]

    def colours(self, ids, mask) -> list[str]:
        return [GREEN if learned else BLUE if token == self.tokenizer.image_pad else GREY
                for token, learned in zip(ids, mask)]


# Each of the figures says one thing. Nothing in them is written by hand: what the model says and computes is drawn,
# and another checkpoint gives other pictures. The names of these functions are the names of the files.

def draw_answers(s: Subject) -> Image.Image:
    "Questions about cat.jpg, and what the model says, right or wrong."
    sheet, pen = page(400)
    sheet.paste(s.image.resize((380, 380)), (10, 10))
    for i, question in enumerate(["What colour is the cat?", "Where is the tree?", "Is there a blue bird?",
                                  "What is the smallest thing?", "How many things are there?"]):
        pen.text((412, 12 + 76 * i), question, "#555555", font())
        pen.text((412, 42 + 76 * i), s.ask(question), "black", font(30))
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
    shares, n = sample.patch_shares(s.vlm.bridge, s.features), math.isqrt(len(s.features))       # [M, N]
    sheet, pen = page(60 + 268 * -(-s.M // 3), "where each latent looks: the brighter, the more")
    for i, share in enumerate(shares):
        x, y = 8 + i % 3 * 264, 52 + i // 3 * 268
        # Relative to its own maximum: all have the same sum, and some spread it wider.
        sheet.paste(sample.shade(s.image, (share / share.max()).view(n, n), 256), (x, y))
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
    # From record 12,000 on nine of ten records are questions: short, so that several fit.
    documents = [data.make_document(World("chat")[i], i, s.tokenizer, s.M, T) for i in range(40000, 40008)]
    arrays, *_ = data.pack(documents, 1, T, s.M)
    numbers, allowed = arrays["document_ids"][0], model.document_mask(torch.from_numpy(arrays["document_ids"]))[0, 0]
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
    "The loss at the first words of a caption, with the picture and with a grey one."
    document = s.document("Describe the picture.", s.ask("Describe the picture."))
    # The text is the model's own caption, so the losses with the picture are small. Without it the same words surprise.
    rows, losses = [], []
    for pixels in (s.pixels, torch.full_like(s.pixels, 128)):
        batch = data.collate(*data.pack([document], 1, len(document.ids), s.M)[:2], lambda *_: pixels)
        x = s.vlm.embed(batch["ids"], s.vlm.encode_images(batch["pixels"]).flatten(0, 1), batch["image_positions"])
        at = batch["supervised"][:12]  # positions; what is predicted there is the target
        losses.append(F.cross_entropy(s.vlm.gpt.logits(s.vlm.gpt.hidden(x))[0, at], batch["targets"][0, at],
                                      reduction="none").tolist())
    for word, own, blind in zip(s.words(batch["targets"][0, at].tolist()), *losses):
        rows += [(word, [(own, GREEN)], f"{own:.2f}"), ("", [(blind, GREY)], f"{blind:.2f}")]
    return bars("loss at the first tokens of a caption, in nats", rows, 150, 36,
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
    flags = argparse.Namespace(model="qwen2.5-1.5b", bridge="", batch_size=32, seq_len=2048, gpus=1)
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
def bench_figures(flags) -> dict:
    "assets/*.png, from the checkpoint --init, its log.jsonl and docs/results.json; and README.md's count of lines."
    home, folder, runs, name = Path(__file__).parent, Path("assets"), {}, ""
    for row in read_log(flags.init) if flags.init else ():  # that of assets/tiny holds all four chapters, in order
        name = Path(row["command"].split()[0]).stem if "command" in row else name
        runs.setdefault(name, []).append(row)
    curves = {name: read_curves(rows) for name, rows in runs.items()}
    accuracy = curves.get("train_sft", {}).get("held-out accuracy")
    if not accuracy:
        raise ValueError(f"--what=figures --init={flags.init}: needs a log of chapter 3 with --eval_every, such as "
                         "--init=assets/tiny has")
    subject = Subject(*load(flags, Setup(flags)))
    folder.mkdir(exist_ok=True)
    figures = (draw_answers, draw_patches, draw_latents, draw_tokens, draw_embeddings, draw_row, draw_surprise,
               draw_rollouts, draw_cache, draw_memory)
    for draw in figures:
        draw(subject).save(folder / f"{draw.__name__.removeprefix('draw_')}.png", optimize=True)
    results = read_json(home / "docs/results.json")
    draw_ladder(folder / "ladder.png", results["ladder"]["rungs"])
    draw_lines(folder / "chapters.png", {f"{title}: {name}.py": lines for name, charts in curves.items()
                                         for title, lines in charts.items() if "accuracy" not in title}, height=300)
    draw_lines(folder / "kinds.png", {"held-out accuracy": {"all kinds": accuracy["accuracy"]} | {
        # half of the ten kinds: more lines would hide each other
        kind: accuracy[kind] for kind in ("count", "kind", "relation", "number", "choice")}}, height=460)
    # Counts of lines go stale with every change: here they are counted anew, and a test compares them.
    if (readme := Path("README.md")).exists():
        count = lambda m: f"| {m[1]} | {len((home / m[1]).read_text(encoding='utf-8').splitlines())} |"  # noqa: E731
        readme.write_text(re.sub(r"\| (\w+\.py) \| \d+ \|", count, readme.read_text(encoding="utf-8")),
                          encoding="utf-8")
    return {"what": "figures", "files": sorted(map(str, folder.glob("*.png")))}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    flags = parse_flags(__doc__, "bench", FLAGS, BY_MODEL)
    jobs = {"eval": bench_eval, "data": bench_data, "speed": bench_speed, "ladder": bench_ladder,
            "profile": bench_profile, "memory": bench_memory, "serve": bench_serve, "compare": bench_compare,
            "figures": bench_figures}
    if flags.what not in jobs:
        raise ValueError(f"--what={flags.what}: choose {', '.join(jobs)}")
    print(json.dumps(jobs[flags.what](flags)))


if __name__ == "__main__":
    run(main)
