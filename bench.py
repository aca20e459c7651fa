"""
How good, and how fast: measured on the real code, never on a copy of it.

    python bench.py --what=eval --init=out/tiny/rl                    # held-out accuracy, blind and shuffled baselines
    python bench.py --what=eval --init=out/tiny/rl --data=test.json   # on your own questions
    python bench.py --what=eval --init=out/tiny/rl --data=MMStar.tsv  # on a benchmark in VLMEvalKit's format
    python bench.py --what=speed                                      # this machine: the training step and decoding

The last line of standard output is one JSON object; tables go to standard error.
"""
import json
import time

import torch

import data
from model import PRESETS, VLM, newest_checkpoint
from tokenizer import Tokenizer
from train_base import (Optimizer, Setup, evaluate_with_baselines, freeze, make_tokenizer, parse_flags, run, start,
                        start_data, supervised, train_step)

FLAGS = {
    "what": ("eval", "eval or speed"),
    "model": ("tiny", f"preset: {', '.join(PRESETS)}"),
    "init": ("", "checkpoint folder; empty: the latest stage under --out_dir, for speed else random weights"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "data": ("world", "world, or a file of records: .json, .jsonl, .tsv"),
    "eval_size": (2000, "questions at most"),
    "batch_size": (32, "speed: rows per training step, and prompts decoded at once"),
    "seq_len": (128, "speed: tokens per row"),
    "steps": (10, "speed: steps that are timed, after three that are not"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),
    "seed": (0, "of random weights"),
}


def bench_eval(flags) -> dict:
    "The same questions three times: with their own picture, with none, and with another's."
    setup = Setup(flags)
    if not (flags.init or newest_checkpoint(flags.out_dir, flags.model)):
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}; train one, or name a "
                         "checkpoint folder by --init=")
    vlm, tokenizer = load(flags, setup)
    if flags.data == "world":
        _, held = data.load_data("world", "exam", 0, flags.eval_size)
    else:  # a file given to be evaluated is held out as a whole
        held = {"all": [record for name, _ in data.parse_mixture(flags.data)
                        for record in data.read_records(name)][:flags.eval_size]}
    results = evaluate_with_baselines(vlm, tokenizer, held, setup)
    return {"what": "eval", "data": flags.data, **next(iter(results.values())), "splits": results}


def load(flags, setup) -> tuple[VLM, Tokenizer]:
    flags.resume = False
    vlm, tokenizer, _, _ = start(flags, setup, "", make_tokenizer(flags))
    return vlm, tokenizer


def clock(work, steps: int, device) -> float:
    "Seconds per call, the median of `steps`: a shared machine has slow moments. GPUs work ahead, so wait for them."
    times = []
    for i in range(steps + 3):
        start_time = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_time)
    return sorted(times[3:])[steps // 2]


def matmul_ceiling(setup) -> float:
    "FLOP/s of one large matrix product here and now: what no training step can exceed."
    n = 8192 if setup.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
    return 2 * n ** 3 / clock(lambda: a @ b, 10, setup.device)


def step_flops(vlm: VLM, trained: list[str], tokens: int, images: int) -> float:
    """
    Matrix products only: 2 FLOP per weight and position forward, 2 for the gradient of the input, 2 for that of the
    weight.
    """
    out = 0.0
    for name, group in vlm.groups().items():
        weights = sum(p.numel() for n, p in group.named_parameters()
                      if p.ndim == 2 and not n.endswith(("embed.weight", "position", "latents")))
        positions = {"vit": images * vlm.config.vision.num_patches, "bridge": images * vlm.config.bridge.num_tokens,
                     "decoder": tokens}[name]
        out += weights * positions * (6 if name in trained else 4 if name == "decoder" else 2)
    return out


def bench_speed(flags) -> dict:
    setup = Setup(flags)
    vlm, tokenizer = load(flags, setup)
    ceiling, rows = matmul_ceiling(setup), {}
    setup.say(f"{setup.device.type}, {setup.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
              f"matrix products reach {ceiling / 1e9:,.0f} GFLOP/s")
    setup.say(f"{'stage':<10}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'of ceiling':>12}{'loader ms':>11}")
    flags.val, flags.micro_batch_size = "", 0
    for stage, task, trained in (("base", "text", ["decoder"]), ("align", "captions", ["bridge", "vit"]),
                                 ("sft", "chat", ["bridge", "decoder", "vit"])):
        params = freeze(vlm, trained)
        optimizer = Optimizer(params, "muon", 1e-9)  # the weights hardly move: every step does the same work
        flags.eval_size = 1
        loaders, _ = start_data(flags, setup, vlm, tokenizer, task, {})
        loading = clock(lambda: next(loaders[0]), flags.steps, torch.device("cpu"))
        batch = next(loaders[0])
        tokens, images = int((batch["documents"] > 0).sum()), 0 if batch["pixels"] is None else len(batch["pixels"])
        seconds = clock(lambda: train_step(vlm, [batch], supervised([batch], setup), params, optimizer, setup, 1.0),
                        flags.steps, setup.device)
        share = step_flops(vlm, trained, tokens, images) / seconds / ceiling
        rows[stage] = {"ms": seconds * 1e3, "tokens_per_s": tokens / seconds, "images_per_s": images / seconds,
                       "of_ceiling": share, "loader_ms": loading * 1e3}
        setup.say(f"{stage:<10}{seconds * 1e3:>9.1f}{tokens / seconds:>10,.0f}{images / seconds:>10,.0f}"
                  f"{share:>12.0%}{loading * 1e3:>11.1f}")
    rows |= bench_decode(flags, setup, vlm.eval(), tokenizer)
    return {"what": "speed", "device": setup.device.type, "dtype": str(setup.dtype), "matmul_gflops": ceiling / 1e9,
            **rows}


def bench_decode(flags, setup, vlm: VLM, tokenizer: Tokenizer) -> dict:
    "After a picture and a question: time to the first token, and tokens per second after it."
    record, new, rows = data.World("exam", "scenes")[0], 32, {}
    prompt = tokenizer.render(record["messages"][:-1], image_tokens=vlm.config.bridge.num_tokens,
                              add_generation_prompt=True)
    size = vlm.config.vision.image_size
    for batch in (1, flags.batch_size):
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        first, all_ = (clock(lambda: list(vlm.generate([prompt] * batch, pixels, max_new_tokens=n)),
                             flags.steps, setup.device)
                       for n in (1, new + 1))
        rows[f"decode_{batch}"] = {"first_token_ms": first * 1e3, "tokens_per_s": batch * new / (all_ - first)}
        setup.say(f"decode, {batch} at once: first token after {first * 1e3:.1f} ms, then "
                  f"{batch * new / (all_ - first):,.0f} tokens/s")
    return rows


def main() -> None:
    flags = parse_flags(__doc__, FLAGS, {})
    jobs = {"eval": bench_eval, "speed": bench_speed}
    if flags.what not in jobs:
        raise ValueError(f"--what={flags.what}: choose {' or '.join(jobs)}")
    print(json.dumps(jobs[flags.what](flags)))


if __name__ == "__main__":
    run(main)
