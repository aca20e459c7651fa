"""
The whole model once more, as plainly as it can be written: float64, one document, one head at a time, no packing. What
test_all.py holds the real one against. w: {name of a parameter: its values}.
"""
import math

import torch

from data import Document, pixel_loader
from model import VLM, GPTConfig, VLMConfig
from vision import BridgeConfig, ViTConfig


def norm(w: dict, name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    if name + ".bias" not in w:  # RMSNorm
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def product(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool = False) -> torch.Tensor:
    "q [T, heads d], k and v [S, kv heads d]: softmax(q k^T / sqrt(d)) v, head by head."
    d = q.shape[-1] // heads
    group, out = heads // (k.shape[-1] // d), []  # query heads 0 and 1 share kv head 0
    for h in range(heads):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        scores = q[:, mine] @ k[:, theirs].T / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        out.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[:, theirs])
    return torch.cat(out, -1)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_vit(w: dict, config: ViTConfig, pixels: torch.Tensor, last_norm: bool) -> torch.Tensor:
    "uint8 [3, S, S] -> [N, D]."
    P, n, heads = config.patch_size, config.image_size // config.patch_size, config.num_attention_heads
    x = pixels.double() / 255 * 2 - 1
    x = torch.stack([x[:, P * r:P * r + P, P * c:P * c + P].flatten() for r in range(n) for c in range(n)])
    x = product(w, "vit.patch", x) + w["vit.position"]
    for block in (f"vit.blocks.{i}." for i in range(config.num_hidden_layers)):
        q, k, v = product(w, block + "qkv", norm(w, block + "norm1", x)).chunk(3, -1)
        x = x + product(w, block + "out", attend(q, k, v, heads))
        y = product(w, block + "fc1", norm(w, block + "norm2", x))
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))  # GELU's tanh form
        x = x + product(w, block + "fc2", y)
    return norm(w, "vit.norm", x) if last_norm else x


def plain_bridge(w: dict, config: BridgeConfig, features: torch.Tensor) -> torch.Tensor:
    "[N, D] -> [M, H]."
    n = math.isqrt(config.num_patches)
    four = torch.stack([torch.cat([features[n * r + c], features[n * r + c + 1], features[n * r + n + c],
                                   features[n * r + n + c + 1]]) for r in range(0, n, 2) for c in range(0, n, 2)])
    if config.kind == "perceiver":
        x = w["bridge.perceiver.latents"] + product(w, "bridge.perceiver.seed", four)
        for layer in (f"bridge.perceiver.layers.{i}." for i in range(config.num_layers)):
            latents = norm(w, layer + "norm_latents", x, 1e-5)
            seen = torch.cat([norm(w, layer + "norm_features", features, 1e-5), latents])  # they see each other, too
            k, v = product(w, layer + "kv", seen).chunk(2, -1)
            x = x + product(w, layer + "out", attend(product(w, layer + "q", latents), k, v, config.num_heads))
            x = x + product(w, layer + "fc2", gelu(product(w, layer + "fc1", norm(w, layer + "norm_mlp", x, 1e-5))))
        features = norm(w, "bridge.perceiver.norm", x, 1e-5)
    elif config.kind == "pixelshuffle":
        features = four
    return product(w, "bridge.fc2", gelu(product(w, "bridge.fc1", features)))


def turn(x: torch.Tensor, heads: int, base: float) -> torch.Tensor:
    "RoPE: channels i and i + d / 2 of a head are one complex number, turned by position * base^(-2 i / d) radians."
    T, d = len(x), x.shape[-1] // heads
    a, b = x.view(T, heads, d).chunk(2, -1)
    angles = torch.arange(T).double()[:, None] * base ** (-2 * torch.arange(d // 2).double() / d)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([z.real, z.imag], -1).reshape(T, heads * d)


def plain_decoder(w: dict, config: GPTConfig, x: torch.Tensor) -> torch.Tensor:
    "Embeddings [T, H] -> logits [T, V]."
    heads, kv, d, base = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rope_theta
    for block in (f"gpt.blocks.{i}." for i in range(config.num_hidden_layers)):
        qkv = product(w, block + "attention.qkv", norm(w, block + "norm1", x))
        q, k, v = qkv.split([heads * d, kv * d, kv * d], -1)
        y = attend(turn(q, heads, base), turn(k, kv, base), v, heads, causal=True)
        x = x + product(w, block + "attention.out", y)
        gate, up = product(w, block + "mlp.gate_up", norm(w, block + "norm2", x)).chunk(2, -1)
        x = x + product(w, block + "mlp.down", gate / (1 + torch.exp(-gate)) * up)
    head = w["gpt.embed.weight" if config.tie_word_embeddings else "gpt.head.weight"]
    return norm(w, "gpt.norm", x) @ head.T


def plain_loss(w: dict, config: VLMConfig, doc: Document, pictures: list | None = None) -> torch.Tensor:
    "-log p of the document's supervised ids, summed. pictures: uint8 [3, S, S] each, in place of its own."
    load = pixel_loader(config.vision)
    pictures = [load(source, doc.record) for source in doc.record["images"]] if pictures is None else pictures
    x = list(w["gpt.embed.weight"][doc.ids])
    for slot, pixels in zip(doc.slots, pictures):
        tokens = plain_bridge(w, config.bridge, plain_vit(w, config.vision, pixels, config.bridge.kind != "mlp"))
        x[slot:slot + len(tokens)] = list(tokens)
    logits = plain_decoder(w, config.decoder, torch.stack(x))
    surprise = logits.logsumexp(-1)[:-1] - logits[torch.arange(len(x) - 1), doc.ids[1:]]  # of id i + 1, seen up to i
    return (surprise * torch.tensor(doc.mask[1:])).sum()


def weights_of(vlm: VLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in vlm.named_parameters()}


def plain_gradient(vlm: VLM, doc: Document) -> dict[str, torch.Tensor]:
    w = weights_of(vlm)
    return dict(zip(w, torch.autograd.grad(plain_loss(w, vlm.config, doc), w.values(), materialize_grads=True)))


def assert_same_gradients(vlm: VLM, expected: dict, rel: float = 1e-4) -> None:
    largest = max(g.abs().max() for g in expected.values())
    for name, p in vlm.named_parameters():
        error = ((0 if p.grad is None else p.grad.double()) - expected[name]).norm()
        # 1e-6 of the largest: a key's bias in the ViT shifts all scores alike, so its true gradient is 0
        assert error <= rel * expected[name].norm() + 1e-6 * largest * p.numel() ** 0.5, (name, error)
