"""
How good, and how fast: measured on the real code, never on a copy of it.

    python bench.py --what=eval --init=out/tiny/rl                    # held-out accuracy, blind and shuffled baselines
    python bench.py --what=eval --init=out/tiny/rl --data=test.json   # on your own questions
    python bench.py --what=eval --init=out/tiny/rl --data=MMStar.tsv  # on a benchmark in VLMEvalKit's format
    python bench.py --what=speed                                      # this machine: the training step and decoding
    python bench.py --what=memory --model=qwen2.5-1.5b --batch_size=32  # what each stage will need; no GPU is asked

The last line of standard output is one JSON object; tables go to standard error.
"""
import argparse
import json
import sys
import time

import torch

import data
from model import PRESETS, VLM, Block, add_lora, newest_checkpoint, preset, rope_table
from tokenizer import Tokenizer
from train_base import (FROM_SCRATCH, Optimizer, Setup, evaluate_with_baselines, freeze, make_tokenizer, parse_flags,
                        run, start, start_data, supervised, train_step)
from vision import Bridge, ViTBlock

STAGES = {"base": ("text", ["decoder"]), "align": ("captions", ["bridge", "vit"]),
          "sft": ("chat", ["bridge", "decoder", "vit"])}  # its data, and the parts that learn; chapter 4 is as sft
BY_MODEL = {"tiny": {"batch_size": 32, "seq_len": 128}, "small": {"batch_size": 64, "seq_len": 1024},
            "released": {"batch_size": 32, "seq_len": 2048}}
CARDS = (8, 12, 16, 24, 40, 80, 141)  # GiB
FLAGS = {
    "what": ("eval", "eval, speed or memory"),
    "model": ("tiny", f"{', '.join(PRESETS)}, or a hub id (Org/Name) or folder"),
    "vision": ("", "speed: encoder in place of the preset's"),
    "bridge": ("", "speed: perceiver, pixelshuffle or mlp, in place of the preset's"),
    "init": ("", "checkpoint folder; empty: the latest stage under --out_dir, for speed else random weights"),
    "out_dir": ("out", "where the stages keep their checkpoints"),
    "data": ("world", "world, or a file of records: .json, .jsonl, .tsv"),
    # With half of 2,000 questions right, the 95 % interval reaches 2 points to each side; of 100 questions, 10 points.
    "eval_size": (2000, "questions at most"),
    "batch_size": (None, "speed, memory: rows per training step; speed: prompts decoded at once"),
    "micro_batch_size": (0, "memory: rows per forward pass; 0: batch_size"),
    "seq_len": (None, "speed, memory: tokens per row"),
    "lora_rank": (0, "speed, memory: as in training"),
    "activation_checkpointing": (False, "speed, memory: as in training"),
    "steps": (10, "speed: steps that are timed, after three that are not"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),
    "seed": (0, "of random weights"),
}


def bench_eval(flags) -> dict:
    "The same questions three times: with their own picture, with none, and with another's."
    setup = Setup(flags)
    # Asked before load(): start() would fall back to random weights. They do for speed; their accuracy means nothing.
    if not (flags.init or newest_checkpoint(flags.out_dir, flags.model) or flags.model == "llava-ov-0.5b"):
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}; train one, or name a "
                         "checkpoint folder by --init=")
    vlm, tokenizer = load(flags, setup)
    if flags.data == "world":
        _, held = data.load_data("world", "exam", 0, flags.eval_size)
    else:
        # The file is taken as a whole: nothing is set aside, as it is in training. Trap: a file that the model was
        # trained on measures its memory.
        held = {"all": [record for name, _ in data.parse_mixture(flags.data)
                        for record in data.read_records(name)][:flags.eval_size]}
    # An accuracy alone does not show that the model sees. Blind (a grey picture) is what the question gives away:
    # guessing answers half of all yes/no questions. Where shuffled (another's picture) is not well below the model's
    # own score, the answers do not follow the picture.
    results = evaluate_with_baselines(vlm, tokenizer, held, setup)
    # The first split's numbers stand on top too: a script finds "accuracy" there, whatever the split's name.
    return {"what": "eval", "data": flags.data, **next(iter(results.values())), "splits": results}


def load(flags, setup) -> tuple[VLM, Tokenizer]:
    flags.resume = False  # start() reads it; here it is no flag
    flags.init = flags.init or newest_checkpoint(flags.out_dir, flags.model)
    # With nothing to start from, start() looks for the stages before the one named. It must then be a real stage:
    # before base there are none, so it makes the random weights that base begins with.
    vlm, tokenizer, _, _ = start(flags, setup, "bench" if flags.init else "base", make_tokenizer(flags))
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


def matmul_ceiling(setup) -> float:
    "FLOP/s of one large matrix product here and now: what no training step can exceed."
    # So large that computing outweighs launching the kernel and reading memory: 1.1 TFLOP on a GPU, 2.1 GFLOP on a CPU.
    n = 8192 if setup.device.type == "cuda" else 1024
    # In the type that the step computes in: a float32 step held against bfloat16's ceiling would look worse than it is.
    a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
    # Each of the n^2 results is a sum of n products: n multiplications and n additions, 2 n FLOP.
    return 2 * n ** 3 / clock(lambda: a @ b, 10, setup.device)


def step_flops(vlm: VLM, trained: list[str], tokens: int, images: int) -> float:
    "FLOP of one step, only those of matrix products with weights."
    # Attention's scores, norms and the optimizer take time but are not counted. So the share of the ceiling errs on the
    # low side, and 100 % is out of reach.
    out = 0.0
    for name, group in vlm.groups().items():
        # Positions and latents are added, an embedding is looked up: no product. Trap: a tied embedding is also the
        # head, whose product then goes uncounted.
        weights = sum(p.numel() for n, p in group.named_parameters()
                      if p.ndim == 2 and not n.endswith(("embed.weight", "position", "latents")))
        # The Perceiver's keys and values are really made at N + M positions, patches and latents; M are counted.
        positions = {"vit": images * vlm.config.vision.num_patches, "bridge": images * vlm.config.bridge.num_tokens,
                     "decoder": tokens}[name]
        # Per weight and position: 2 FLOP forward, 2 for the gradient of the input, 2 for that of the weight. A frozen
        # decoder has no weight gradient, but passes the input's on to the bridge: 4. A frozen ViT only runs forward: 2.
        out += weights * positions * (6 if name in trained else 4 if name == "decoder" else 2)
    return out


def bench_speed(flags) -> dict:
    setup = Setup(flags)
    vlm, tokenizer = load(flags, setup)
    ceiling, rows = matmul_ceiling(setup), {}
    setup.say(f"{setup.device.type}, {setup.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
              f"matrix products reach {ceiling / 1e9:,.0f} GFLOP/s")
    # "of ceiling" compares machines, each held against its own limit, and shows how much room is left. It cannot tell
    # where the rest of the time went: small products, attention, the optimizer, or waiting.
    setup.say(f"{'stage':<10}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'of ceiling':>12}{'loader ms':>11}")
    flags.val, flags.micro_batch_size = "", 0  # start_data reads both; 0: the whole step in one forward pass
    for stage, (task, trained) in STAGES.items():
        params = freeze(vlm, trained)
        # A step's work does not depend on the rate. A real rate, again and again on one batch, could drive the weights,
        # which the next stage goes on with, to NaN.
        optimizer = Optimizer(params, "muon", 1e-9)
        flags.eval_size = 1  # start_data also makes held-out records; nobody asks them here
        loaders, _ = start_data(flags, setup, vlm, tokenizer, task, {})
        # Timed apart from the step. Training does one after the other, so its time per step is the sum of both columns.
        loading = clock(lambda: next(loaders[0]), flags.steps, torch.device("cpu"))
        batch = next(loaders[0])
        # Padding (document 0) is work without use and counts as no token. A picture shared by several rows counts once.
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
    # One prompt for all rows: no padding. Real batches of unlike lengths are a little slower.
    prompt = tokenizer.render(record["messages"][:-1], image_tokens=vlm.config.bridge.num_tokens,
                              add_generation_prompt=True)
    size = vlm.config.vision.image_size
    for batch in (1, flags.batch_size):
        # Noise will do: how long a picture takes does not depend on what it shows.
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        # list() runs the generator to its end: without it nothing would be computed. No stop tokens: all answers are
        # equally long. As in sample.py there is no autocast: decoding runs in float32, whatever --dtype says.
        first, all_ = (clock(lambda: list(vlm.generate([prompt] * batch, pixels, max_new_tokens=n)),
                             flags.steps, setup.device)
                       for n in (1, new + 1))
        # The first token waits for ViT, bridge and prompt. The difference of the two times is pure decoding.
        rows[f"decode_{batch}"] = {"first_token_ms": first * 1e3, "tokens_per_s": batch * new / (all_ - first)}
        setup.say(f"decode, {batch} at once: first token after {first * 1e3:.1f} ms, then "
                  f"{batch * new / (all_ - first):,.0f} tokens/s")
    return rows


def kept(module, compiled: bool, *inputs) -> int:
    "Bytes that autograd keeps of one call for the way back, the weights' copies in bfloat16 among them."
    own, pieces, alive = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)  # else its memory might be given to another, and both would count as one
        if tensor.untyped_storage().data_ptr() not in own:  # a view's memory counts once, and whole
            pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch._dynamo.reset()
    # torch.compile computes some things twice rather than keep them. This backend makes the same choice, without a GPU.
    call = torch.compile(module, backend="aot_eager_decomp_partition") if compiled else module
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        call(*inputs)
    return sum(pieces.values())


def line(measure, a: int, b: int) -> tuple[float, float]:
    "measure(n) = each * n + fixed -> (each, fixed)."
    each = (measure(b) - measure(a)) / (b - a)
    return each, measure(a) - each * a


def predict(flags, stage: str, lora: int):
    """
    A function: rows per forward pass, with activation checkpointing or not -> GiB that a stage needs at its peak, by
    part. bfloat16 with float32 weights, compiled. Small inputs go through one real layer of each kind, on the CPU; the
    rest is arithmetic.
    """
    config = preset(flags.model, flags.bridge)
    config.lora_rank, decoder, vision = lora, config.decoder, config.vision
    with torch.device("meta"):
        vlm = VLM(config)
    learn = sum(p.numel() for p in freeze(vlm, STAGES[stage][1]).values())
    total, halved = (sum(p.numel() for p in module.parameters()) for module in (vlm, vlm.gpt))
    layers, V, H = decoder.num_hidden_layers, decoder.vocab_size, decoder.hidden_size

    def layer(T: int) -> int:
        block, rope = Block(decoder, 0), rope_table(torch.arange(T)[None], decoder)
        if lora:
            add_lora(block, lora)
            block.to(torch.bfloat16)  # all of it here: the thin ones do not count
        for mine, real in zip(block.parameters(), vlm.gpt.blocks[0].parameters()):
            mine.requires_grad_(real.requires_grad)
        x = torch.randn(1, T, H, requires_grad=True, dtype=torch.bfloat16 if lora else torch.float32)
        return kept(block, True, x, rope, None, None)

    def seeing(module, compiled: bool):
        return line(lambda n: kept(module, compiled, torch.randn(
            n, vision.num_patches, vision.hidden_size, requires_grad=True)), 1, 2)

    per_token, fixed = line(layer, 64, 128)
    per_picture, bridge = (0, 0) if stage == "base" else seeing(Bridge(config.bridge), False)
    if vlm.vit.patch.weight.requires_grad:
        each, once = seeing(ViTBlock(vision), True)
        per_picture, bridge = per_picture + each * vision.num_hidden_layers, bridge + once * vision.num_hidden_layers

    def parts(micro: int, thrift: bool) -> dict[str, float]:
        tokens = micro * flags.seq_len
        pictures = tokens / (config.bridge.num_tokens + 40)  # 40 words beside each, about
        one = per_token * tokens + 2 * tokens * flags.seq_len  # the mask, as numbers, is kept by every layer
        # With checkpointing every layer keeps its input alone, and one layer at a time the rest.
        decoding = layers * fixed + (one + layers * tokens * H * (2 if lora else 4) if thrift else layers * one)
        # token_loss: a chunk's logits in float32 and one more of that size; the head in bfloat16, and its gradient.
        loss = 8 * V * min(4096, tokens if stage == "base" else tokens / 2) \
            + V * H * (2 + 6 * vlm.gpt.embed.weight.requires_grad)
        # AdamW keeps two moments for each weight; Muon, from scratch, one. LoRA's frozen decoder has 2 bytes a weight.
        out = {"weights": 4 * total - (2 * halved if lora else 0), "gradients": 4 * learn,
               "optimizer": (4 if flags.model in FROM_SCRATCH else 8) * learn,
               "activations": decoding + bridge + per_picture * pictures, "loss": loss}
        # Of several passes the last meets the gradients of those before. Of one, they are made while activations go.
        out["peak"] = sum(out.values()) - (0 if micro < flags.batch_size else min(4 * learn, out["activations"] + loss))
        return {name: value / 2 ** 30 for name, value in out.items()}
    return parts


def bench_memory(flags) -> dict:
    "Each stage's peak on a GPU, and what to set for cards of several sizes."
    if flags.model not in PRESETS:
        raise ValueError(f"--what=memory needs a preset ({', '.join(PRESETS)}), not --model={flags.model}")
    micro, rows = flags.micro_batch_size or flags.batch_size, {}
    say(f"{flags.model}, rows of {flags.seq_len} tokens, {flags.batch_size} a step, {micro} a pass; GiB")
    sizes = [n for n in range(flags.batch_size, 0, -1) if flags.batch_size % n == 0]
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


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    flags = parse_flags(__doc__, FLAGS, BY_MODEL)
    jobs = {"eval": bench_eval, "speed": bench_speed, "memory": bench_memory}
    if flags.what not in jobs:
        raise ValueError(f"--what={flags.what}: choose {', '.join(jobs)}")
    print(json.dumps(jobs[flags.what](flags)))


if __name__ == "__main__":
    run(main)
