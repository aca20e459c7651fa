"""
Memory of training, predicted without a GPU. Called by `python bench.py --what=memory`.

It has six parts. Weights, gradients, float32 master weights and the optimizer's moments follow from the number of
parameters. Activations, what the forward pass stores for the backward pass, are the largest part and hard to derive:
they depend on what the compiler decides to keep. So they are measured, on one layer, on the CPU. The loss needs some
logits at once.
"""

import torch

from plumbing.files import say
from model import FROM_SCRATCH, PRESETS, VLM, Block, add_lora, preset, rope_table
from train_base import freeze_all_but
from vision import Bridge, ViTBlock

# Its data in the built-in world, and the parts that are trained; chapter 4 trains the same parts as sft.
STAGES = {"base": ("text", ["decoder"]), "align": ("captions", ["bridge", "vit"]),
          "sft": ("chat", ["bridge", "decoder", "vit"])}
CARDS = (8, 12, 16, 24, 40, 80, 141)  # GiB


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
    config = preset(flags.model, flags.bridge, flags.set)
    config.lora_rank, decoder, vision = lora, config.decoder, config.vision
    vision.tiles = flags.tiles or 0
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
        # LLaVA's conversations; with --tiles all pictures are large ones, each of 1 + tiles squares
        pictures = (1 + vision.tiles) * tokens / (config.bridge.most_tokens(vision.tiles) + 256)
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
