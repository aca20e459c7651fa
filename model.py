"""
The model: a Qwen2.5 decoder, a VLM around it, its loss, generation, and checkpoints.

    ids [B, T] -> embeddings [B, T, H], the picture's tokens written over the <|image_pad|> positions
      L x ( RMSNorm -> attention (RoPE, grouped queries) -> +  RMSNorm -> SwiGLU -> + )
      RMSNorm -> head -> logits [B, T, V]

Read it in this order: RMSNorm and RoPE, Attention, MLP, GPT (a complete language model), VLM (the same with eyes), then
how it is trained (token_loss) and used (generate). The layers compute exactly what Hugging Face's Qwen2 does (arXiv
2412.15115): the released weights load into them and give the same logits.

Axis letters: B rows, T tokens in a row, H the decoder's width, d a head's width, V words, n pictures, M tokens of each.

The last section fetches released weights, and writes trained ones in the form in which engines serve them.

Left out: sliding windows (no released Qwen2.5 uses them), dropout (none of the recipes uses it), YaRN for very long
texts.
"""
import copy
import inspect
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

import data
from vision import (MOST_TILES, MOST_TOKENS, SIGLIP, SIGLIP_NAMES, Bridge, BridgeConfig, Tiles, ViT, ViTConfig,
                    init_linears, load_renamed, read_json, read_metadata, read_safetensors, renamed, vit_config,
                    write_safetensors)

# PyTorch 2.11's FlashAttention takes fewer key than query heads unasked, later ones want to be told.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass
class GPTConfig:
    "Field names are those of Hugging Face's Qwen2Config; the values here are Qwen2.5-1.5B's."
    vocab_size: int = 151936          # V: rows of the embedding; 151,665 are words, the rest is padding
    hidden_size: int = 1536           # H: the width of the residual stream
    intermediate_size: int = 8960     # I: width inside the MLP, where most of the weights are
    num_hidden_layers: int = 28       # L
    num_attention_heads: int = 12     # query heads, of d = 1536 / 12 = 128 channels each
    num_key_value_heads: int = 2      # each serves 12 / 2 = 6 query heads: the cache is 6 times smaller
    rms_norm_eps: float = 1e-6        # added under the root: an all-zero vector stays finite
    rope_theta: float = 1_000_000.0   # the slowest rotary pair turns once in about 5 million tokens
    tie_word_embeddings: bool = True  # the head is the embedding matrix, transposed
    max_position_embeddings: int = 32768  # tokens of the longest text that it has learned to read

    @property
    def head_dim(self) -> int:        # d
        return self.hidden_size // self.num_attention_heads


@dataclass
class VLMConfig:
    vision: ViTConfig = field(default_factory=ViTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    decoder: GPTConfig = field(default_factory=GPTConfig)
    pretrained_vision: str = ""       # the released encoder's name; then the ViT stays frozen in every stage
    preset: str = "tiny"              # also the folder under --out_dir in which its checkpoints lie
    generation: dict = field(default_factory=dict)  # the publisher's temperature, top_k, ...; ours: empty, greedy
    lora_rank: int = 0                # above 0: the decoder's matrices are frozen, and thin ones beside them learn

    @classmethod
    def from_dict(cls, d: dict) -> "VLMConfig":
        return cls(**(d | {"vision": ViTConfig(**d["vision"]), "bridge": BridgeConfig(**d["bridge"]),
                           "decoder": GPTConfig(**d["decoder"])}))


PRESETS = {
    "tiny": VLMConfig(   # 1.7 million parameters: ViT 0.66, bridge 0.30, decoder 0.72
        ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=72,
                  patch_size=12),                         # 72 / 12 = 6 patches a side: N = 36
        BridgeConfig(num_latents=9, num_layers=1, num_heads=4),  # M = N / 4: each latent starts from 2 x 2 patches
        GPTConfig(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=2048)),
    "small": VLMConfig(  # 64 million parameters: ViT 21, bridge 5, decoder 38
        ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=128,
                  patch_size=8),                          # 128 / 8 = 16 patches a side: N = 256, like SigLIP-L/16
        BridgeConfig(num_latents=64, num_layers=2, num_heads=6),
        GPTConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
                  num_key_value_heads=2, max_position_embeddings=4096)),
}
# Qwen2.5 as released. The fields not named here are the same in all: vocabulary, RoPE's base, epsilon, the tied head.
QWEN = {
    "qwen2.5-0.5b": GPTConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen2.5-1.5b": GPTConfig(max_position_embeddings=131072),
    "qwen2.5-3b": GPTConfig(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
}
for _name, _decoder in list(QWEN.items()):  # the instruct models have the same shapes
    QWEN[_name + "-instruct"] = replace(_decoder, max_position_embeddings=32768)
PRESETS |= {_name: VLMConfig(SIGLIP[data.DEFAULT_VISION], BridgeConfig(), _decoder,
                             pretrained_vision=data.DEFAULT_VISION) for _name, _decoder in QWEN.items()}
# A finished public model: SigLIP so400m without its last layer, an MLP, Qwen2-0.5B with a few more rows of padding.
PRESETS["llava-ov-0.5b"] = VLMConfig(
    replace(SIGLIP["siglip-so400m-patch14-384"], num_hidden_layers=26, pad=True),
    BridgeConfig(kind="mlp", newline=True), replace(QWEN["qwen2.5-0.5b"], vocab_size=152000),
    pretrained_vision="llava-ov-0.5b")


def fit(config: VLMConfig) -> VLMConfig:
    "What follows from the other parts is written once, here: the bridge's two ends."
    config.bridge.vision_size, config.bridge.text_size = config.vision.hidden_size, config.decoder.hidden_size
    config.bridge.num_patches = config.vision.num_patches
    return config


def check_name(model: str) -> None:
    "Before anything is loaded: a preset, or what may be a hub id or a path."
    if model not in PRESETS and "/" not in model:
        raise ValueError(f"--model={model}: unknown; choose from {', '.join(PRESETS)}, or give a hub id, Org/Name")


def preset(name: str, bridge: str = "") -> VLMConfig:
    "A fresh configuration, with another kind of bridge if one is named."
    config = copy.deepcopy(PRESETS[name])
    config.preset, config.bridge.kind = name, bridge or config.bridge.kind
    return fit(config)


# ----------------------------------------------------------------------------------------------------------------------
# The decoder

class RMSNorm(nn.Module):
    "LayerNorm without mean and bias (arXiv 1910.07467)."

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)  # float32 inside, whatever x is


def rope_table(positions: torch.Tensor, config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    "positions [B, T] -> cos, sin [B, T, 1, d / 2]; the 1 stands for the heads, which all turn alike."
    d = config.head_dim
    # Radians per token: 1 for the first pair of channels, about a millionth for the last. Fast pairs tell neighbours
    # apart, slow ones tell chapters apart, as a clock has a hand for seconds and one for hours.
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    # float32 throughout: bfloat16 cannot tell position 1000 from 1001
    angles = positions[:, :, None, None].float() * frequencies                                       # [B, T, 1, d/2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary positions (arXiv 2104.09864): each pair of channels is turned by an angle that grows with the position, so
    that a query meets a key by their distance alone.
    """
    # TRAP: channel i of the first half and channel i of the second are one pair. Llama's first code paired 2i with
    # 2i + 1, and weights trained for one pairing are noise in the other.
    a, b = x.float().chunk(2, dim=-1)                                                          # [B, T, heads, d/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)                     # [B, T, heads, d]


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    "x -> (x / scale in 8 bits, scale): the largest entry becomes the largest number that the type has."
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class Float8Product(torch.autograd.Function):
    """
    x [n, in], w [out, in] -> x w^T [n, out]. A Hopper GPU multiplies 8-bit numbers twice as fast as 16-bit ones, and
    sums the products in more digits. Values get 3 bits of fraction (e4m3: up to 448), gradients, whose sizes differ
    more, 2 bits and a larger exponent (e5m2: up to 57,344); one scale for a whole tensor (arXiv 2209.05433).
    """

    @staticmethod
    def forward(ctx, x, w):
        (x, x_scale), (w, w_scale) = to_float8(x, torch.float8_e4m3fn), to_float8(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x, x_scale, w, w_scale)  # half as much memory, too
        return torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        x, x_scale, w, w_scale = ctx.saved_tensors
        grad, scale = to_float8(grad, torch.float8_e5m2)
        # TRAP: the 8-bit product reads both of its factors along the summed axis, so that they are turned in memory.
        grad_x = torch._scaled_mm(grad, w.t().contiguous().t(), scale, w_scale, out_dtype=torch.bfloat16)
        grad_w = torch._scaled_mm(grad.t().contiguous(), x.t().contiguous().t(), scale, x_scale,
                                  out_dtype=torch.bfloat16)
        return grad_x, grad_w


class Linear(nn.Linear):
    "nn.Linear, in 8 bits while training if so asked."
    float8 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.float8 and torch.is_grad_enabled():
            y = Float8Product.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight)
        # Two operations: torch.compile fuses either with its neighbours, and cannot look into one call for both.
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        H, d = config.hidden_size, config.head_dim
        # rows of query, key and value; 1536, 256 and 256 in Qwen2.5-1.5B
        self.sizes = [config.num_attention_heads * d, config.num_key_value_heads * d, config.num_key_value_heads * d]
        self.qkv = Linear(H, sum(self.sizes))          # Qwen has a bias here and nowhere else
        self.out = Linear(H, H, bias=False)

    def forward(self, x, rope, documents=None, cache=None) -> torch.Tensor:
        """
        x [B, T, H] -> [B, T, H], causal. documents: None, one a row; or what `document_mask` gives; when decoding what
        KVCache.mask gives. cache: None; or this layer's keys and values [2, B, kv heads, S, d] and the columns [B] at
        which one more token a row is appended, None while the prompts are read, which fill the first T columns.
        """
        B, T, H = x.shape
        q, k, v = (part.view(B, T, -1, self.config.head_dim) for part in self.qkv(x).split(self.sizes, dim=-1))
        # Values are not turned: where a word stands decides who finds it, not what it says.
        q, k = rotate(q, *rope), rotate(k, *rope)                                            # [B, T, heads, d]
        if isinstance(documents, tuple):
            # FlashAttention over the documents themselves, laid end to end: what lies outside them is never computed.
            (ends, longest), (q, k, v) = documents, (t.flatten(0, 1) for t in (q, k, v))     # [B * T, heads, d]
            y = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **GQA)  # (-1, 0): causal
            return self.out(y.view(B, T, H))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                     # [B, heads, T, d]
        if cache is not None:
            kept, columns = cache  # keys are kept turned: their positions never change
            if columns is not None:
                return self.out(self.look_back(q, torch.stack([k, v]), kept, columns, documents).reshape(B, T, H))
            kept[0, :, :, :T], kept[1, :, :, :T] = k, v
        # enable_gqa: query heads 0 to 5 read kv head 0, and so on, without copying it six times.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents, is_causal=documents is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, H))                                          # [B, T, H]

    def look_back(self, q, new, kept, columns, mask) -> torch.Tensor:
        "One token a row: q [B, heads, 1, d], its key and value [2, B, kv heads, 1, d] -> [B, kv heads, group, d]."
        kept[:, torch.arange(len(q), device=q.device), :, columns] = new[:, :, :, 0].transpose(0, 1)
        # The query heads that share a kv head take the place of the tokens: they read the same keys, in one product.
        q = q.view(len(q), new.shape[2], -1, q.shape[-1])                                            # [B, kv, group, d]
        if torch.compiler.is_compiling() and len(q) == 1:
            # A single row leaves most of a GPU idle in SDPA's kernels, which go through the keys one after the other.
            # Written out, the compiler spreads keys and channels over all of it, and never builds the 5 axes.
            scores = (q.float()[:, :, :, None] * kept[0][:, :, None]).sum(-1) * q.shape[-1] ** -0.5  # [1, kv, group, S]
            shares = (scores + mask).softmax(-1)
            return (shares[..., None] * kept[1][:, :, None]).sum(-2).to(q.dtype)
        return F.scaled_dot_product_attention(q, kept[0], kept[1], attn_mask=mask)


class MLP(nn.Module):
    "SwiGLU (arXiv 2002.05202): one half decides how much of the other passes."

    def __init__(self, config: GPTConfig):
        super().__init__()
        # gate and up in one product: a large one keeps the hardware busier than two of half the size
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)                                                  # [B, T, I] each
        y = F.silu(gate) * up
        if torch.compiler.is_compiling() and y.numel() == y.shape[-1]:
            # The product with a single row is compiled as H sums, and in each of them the compiler would make all of y
            # again. What is viewed by its strides has to lie in memory, so that it is made once.
            y = y.as_strided(y.shape, y.stride())
        return self.down(y)                                                                          # [B, T, H]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, documents=None, cache=None) -> torch.Tensor:
        # Norms stand on the branches, not on x itself: the gradient has a straight way from the loss to layer 0.
        x = x + self.attention(self.norm1(x), rope, documents, cache)  # tokens exchange what they know
        return x + self.mlp(self.norm2(x))                             # each token thinks for itself


class LoRALinear(Linear):
    """
    LoRA (arXiv 2106.09685): the matrix W [out, in] stays as it is, and b a is added to it, with a [rank, in] and
    b [out, rank]. At rank 16 that is 1 % of the weights to learn, and no moments are needed for the other 99 %.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)  # not Linear's own: its weights would be drawn only to be replaced
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, **like) * self.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))  # at first nothing is added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> torch.Tensor:
        return self.weight + self.lora_b @ self.lora_a                                               # [out, in]


def add_lora(block: Block, rank: int) -> None:
    for part, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "gate_up"), (block.mlp, "down")):
        setattr(part, name, LoRALinear(getattr(part, name), rank))


# Ours on the left, Hugging Face's on the right; where several stand on the right, ours is their rows stacked.
QWEN_NAMES = {
    "embed.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],  # untied models only
    "blocks.#.norm1.*": ["model.layers.#.input_layernorm.*"],
    "blocks.#.norm2.*": ["model.layers.#.post_attention_layernorm.*"],  # before the MLP, in spite of its name
    "blocks.#.attention.qkv.*": [f"model.layers.#.self_attn.{x}_proj.*" for x in "qkv"],
    "blocks.#.attention.out.*": ["model.layers.#.self_attn.o_proj.*"],
    "blocks.#.mlp.gate_up.*": ["model.layers.#.mlp.gate_proj.*", "model.layers.#.mlp.up_proj.*"],
    "blocks.#.mlp.down.*": ["model.layers.#.mlp.down_proj.*"],
}


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=3 * config.hidden_size ** -0.5)  # as loud as what the blocks add to it
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # True: see hidden
        self.step = {}                         # Block.forward, compiled for decoding one row (True) or several (False)
        init_linears(self.blocks, outputs=("out", "down"), depth=config.num_hidden_layers)
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def set_float8(self, on: bool) -> None:
        "The head stays in 16 bits: its logits are what the loss hangs on."
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.float8 = on

    @property
    def head_weight(self) -> torch.Tensor:
        # looked up each time: a tied head that was stored would still be the old matrix after weights are loaded
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight            # [V, H]

    def hidden(self, x: torch.Tensor, positions=None, documents=None, cache: "KVCache | None" = None) -> torch.Tensor:
        """
        Embeddings x [B, T, H] -> [B, T, H] after the last norm. positions [B, T] count from 0 in each document;
        documents: see `document_mask`; without them: one document a row, causal. With a cache: see KVCache.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]                              # [1, T]
        rope = rope_table(positions, self.config)
        if cache is not None and cache.decoding:
            documents = cache.mask()  # one for all layers
        for i, block in enumerate(self.blocks):
            if cache is not None:
                # A prompt goes through the block as written: its length is new each time, and would be compiled anew.
                call = self.step.get(len(x) == 1, Block.forward) if cache.decoding else Block.forward
                x = call(block, x, rope, documents, cache.layer(i))
            elif self.activation_checkpointing and torch.is_grad_enabled():
                # Only a block's input is kept, and the rest is computed again on the way back: a third more work, and
                # memory for one block's activations instead of all blocks'.
                x = checkpoint(block, x, rope, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, documents)
        return self.norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        "h [..., H] after the last norm -> [..., V]."
        return F.linear(h, self.head_weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        "ids [B, T] -> logits [B, T, V]."
        # Training uses hidden() and token_loss instead: it never needs all logits at once.
        return self.logits(self.hidden(self.embed(ids)))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "GPT":
        "From a Qwen2 or Qwen2.5 folder as the hub ships it: config.json and one or more safetensors files."
        folder = Path(folder)
        with torch.device("meta"):  # shapes without memory: no random weights are drawn only to be replaced
            gpt = cls(gpt_config(read_json(folder / "config.json"), folder))
        tensors = read_safetensors(folder)
        if gpt.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some tools write the tied head out a second time
        load_renamed(gpt, tensors, QWEN_NAMES, "", str(folder), device, dtype)
        return gpt


def gpt_config(hf: dict, folder: Path) -> GPTConfig:
    "Qwen2's config.json; one that asks for what this decoder does not do is refused."
    # TRAP: within a LLaVA's config.json, what equals a default is left out, and Qwen2Config's are not GPTConfig's.
    hf = {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 32, "rope_theta": 10000.0, "tie_word_embeddings": False, **hf}
    hf |= hf.get("rope_parameters") or {}  # transformers 5 moved rope_theta in there
    rope = {**hf, **(hf.get("rope_scaling") or {})}
    # What we would compute differently is refused: such a model would load, and answer a little worse.
    if hf.get("model_type", "qwen2") != "qwen2":
        raise ValueError(f"{folder}/config.json: a {hf['model_type']} model; only Qwen2 and Qwen2.5 are supported")
    if hf.get("use_sliding_window") or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder}/config.json: sliding windows and scaled RoPE are not supported")
    config = GPTConfig(**{f.name: hf[f.name] for f in fields(GPTConfig) if f.name in hf})
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if min(heads, kv_heads) < 1 or config.hidden_size % heads or heads % kv_heads:
        raise ValueError(f"{folder}/config.json: hidden_size {config.hidden_size}, {heads} heads and {kv_heads} key "
                         "and value heads do not divide; is the file whole?")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# The loss

def cross_entropy(logits, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    "logits [n, V], targets [n], weights [n] -> (sum of weight * -log p(target), its gradient [n, V] by the logits)."
    dtype, targets, weights = logits.dtype, targets[:, None], weights[:, None]
    logits = logits.float()
    logsum = logits.logsumexp(dim=-1, keepdim=True)                                                  # [n, 1]
    # -log softmax at the target = logsumexp - the target's logit: no probability underflows to log 0
    surprise = logsum - logits.gather(1, targets)
    delta = (logits.sub_(logsum).exp_() * weights).to(dtype)  # d loss / d logits = softmax - 1 at the target
    # TRAP: the 1 is taken off before rounding: in bfloat16 a probability of 0.999 is 1, and its error 0.
    return (surprise * weights).sum(), delta.scatter_(1, targets, (torch.expm1(-surprise) * weights).to(dtype))


class TokenLoss(torch.autograd.Function):
    """
    Head and cross-entropy in one, a chunk of tokens at a time, the gradients already made on the way forward. The
    logits of 16,384 tokens over Qwen's 151,936 words are 10 GB in float32, and autograd would keep them until the way
    back; here a chunk's logits are gone before the next one's are made (the idea of Liger and of Cut Cross-Entropy,
    arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, chunk, train, cross_entropy):
        # n supervised tokens: x [n, H], targets [n], weights [n]; head [V, H]. Sums in float32: bfloat16 has 2 to 3
        # digits.
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.zeros_like(x) if train else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if train and head.requires_grad else None
        for i in range(0, len(x), chunk):
            xi = x[i:i + chunk]
            loss, delta = cross_entropy(xi @ head.t(), targets[i:i + chunk], weights[i:i + chunk])   # [chunk, V]
            total += loss
            if train:
                grad_x[i:i + chunk] = delta @ head                                                   # [chunk, H]
                if grad_head is not None:
                    grad_head += delta.t() @ xi                                                      # [V, H]
        ctx.save_for_backward(grad_x, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        # The loss is one number: its gradient only scales what forward has made. One result per input of it.
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad, None if grad_head is None else grad_head * grad, None, None, None, None, None


def token_loss(x, head, targets, weights=None, learned=None, chunk: int = 4096,
               cross_entropy=cross_entropy) -> torch.Tensor:
    """
    x [B, T, H], head [V, H], targets [B, T] with -100 where nothing is to be learned -> the SUM over supervised tokens
    of weight * -log p(target). `weights` [B, T] are the advantages in reinforcement learning, else ones; `learned`
    [n]: the supervised places in targets.flatten(), if they are known.
    """
    # TRAP: the caller divides, by the tokens of the whole step over all micro-batches and ranks. A mean of means would
    # weigh a token in a short micro-batch more.
    if learned is None:  # to ask a GPU for their number would mean to wait for it
        learned = (targets.flatten() >= 0).nonzero()[:, 0]
    # Most positions are picture or question: they never reach the head.
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    return TokenLoss.apply(x.flatten(0, 1).index_select(0, learned), head, targets.flatten()[learned],
                           weights.flatten()[learned], chunk, torch.is_grad_enabled(), cross_entropy)


# ----------------------------------------------------------------------------------------------------------------------
# The VLM

def document_mask(documents: torch.Tensor) -> torch.Tensor:
    "document ids [B, T] -> [B, 1, T, T], True where a query may look: back, and only within its own document."
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()                      # [T, T]
    # Padding is document 0 and sees itself: every query has at least one key, so no softmax is over nothing.
    return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]


class VLM(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vision) if config.vision else None  # a bare language model sees nothing
        self.bridge = Bridge(config.bridge) if config.vision else None
        self.gpt = GPT(config.decoder)
        self.cross_entropy = cross_entropy
        self.caches = {}  # idle ones: see KVCache
        if config.lora_rank:
            self.add_lora(config.lora_rank)

    def add_lora(self, rank: int) -> None:
        self.config.lora_rank = rank
        for block in self.gpt.blocks:
            add_lora(block, rank)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        "pixels uint8 [n, 3, S, S] -> what the bridge reads, [n, N, D]."
        # A frozen ViT leaves no graph behind: the activations of its layers are freed at once.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vit.patch.weight.requires_grad):
            return self.vit(pixels, self.config.bridge.layer, self.config.bridge.norm)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        "pixels uint8 [n, 3, S, S] -> the pictures' tokens [n, M, H]."
        return self.bridge(self.features(pixels))

    def look(self, images: list) -> torch.Tensor:
        "Pictures, each uint8 [3, S, S] or Tiles -> all their tokens in a row [K, H]."
        # Tiled pictures one by one: 37 tiles fill any device, and plain ones, all alike, go in one batch.
        device = self.gpt.embed.weight.device
        plain = [image for image in images if not isinstance(image, Tiles)]
        seen = iter(self.see(torch.stack(plain).to(device)) if plain else [])
        return torch.cat([self.bridge.stitch(self.features(image.pixels.to(device)), image)
                          if isinstance(image, Tiles) else next(seen) for image in images])

    def num_tokens(self, image) -> int:
        "How many decoder positions a picture (uint8 [3, S, S] or Tiles) takes."
        config = self.config.bridge
        return image.num_tokens(config.num_patches) if isinstance(image, Tiles) else config.num_tokens

    def embed(self, ids, tokens=None, slots=None) -> torch.Tensor:
        """
        ids [B, T] -> [B, T, H]. slots [K] are the places of the pictures' placeholders in ids.flatten(); the embeddings
        there are overwritten by the pictures' tokens [K, H].
        """
        x = self.gpt.embed(ids)
        if tokens is None:
            return x
        # Gradients go to the pictures' tokens here. The packer has checked that pictures and places fit together.
        return x.flatten(0, 1).index_copy(0, slots, tokens.to(x.dtype)).view_as(x)

    def forward(self, batch: dict) -> torch.Tensor:
        "A packed batch (data.pack) -> summed loss over its supervised tokens."
        tokens = None
        if batch["pixels"] is not None:
            # pictures [m]: which of the n pixels each place shows. One that several documents talk about is seen once.
            tokens = self.see(batch["pixels"])[batch["pictures"]].flatten(0, 1)                      # [m * M, H]
        x = self.embed(batch["ids"], tokens, batch["slots"])
        if batch["boundaries"] is None:  # one document in each row, as in long texts: plainly causal
            documents = None
        elif x.is_cuda and x.dtype == torch.bfloat16:  # what FlashAttention wants; elsewhere a mask says the same
            documents = batch["boundaries"], x.shape[1]
        else:
            documents = document_mask(batch["documents"])
        h = self.gpt.hidden(x, batch["positions"], documents)                                        # [B, T, H]
        return token_loss(h, self.gpt.head_weight, batch["targets"], batch["weights"], batch["learned"],
                          cross_entropy=self.cross_entropy)

    def compile_parts(self) -> None:
        "torch.compile where the time goes: small steps become one kernel, and what they pass on never leaves the chip."
        # Block by block: equal blocks share one compilation. The model as one piece would take many times longer.
        # TRAP: torch.compile(block) would put "_orig_mod." before all parameter names; block.compile() keeps them.
        for block in self.vit.blocks if self.vit else ():
            block.compile()  # the number of pictures differs: after two of them PyTorch compiles for any
        for block in self.gpt.blocks:
            block.compile(dynamic=False)  # fixed shapes make faster kernels
        # Decoding has shapes of its own. The kernels of a step are so short that the next should be launched before
        # one ends (pdl); and a single row's products are faster as sums that are tuned than as matrix products.
        torch._dynamo.config.recompile_limit = 64  # beyond it all would silently run uncompiled
        self.gpt.step = {one: torch.compile(Block.forward, dynamic=False, options={
            "triton.enable_pdl": True, "coordinate_descent_tuning": one}) for one in (False, True)}
        self.cross_entropy = torch.compile(cross_entropy)

    def groups(self) -> dict[str, nn.Module]:
        return {"vit": self.vit, "bridge": self.bridge, "decoder": self.gpt}  # what a stage trains or freezes

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    def take_cache(self, batch: int, length: int) -> "KVCache":
        "One for `batch` rows of `length` columns or more, from the idle ones if there is such a one."
        weight = self.gpt.embed.weight
        if not weight.is_cuda:
            return KVCache(self.config.decoder, batch, length, weight.device, weight.dtype)
        # Few different lengths, so that few graphs are recorded. TRAP: graphs remember where the weights lay.
        key = (batch, max(256, 1 << (length - 1).bit_length()), weight.data_ptr(), weight.dtype)
        cache = self.caches.pop(key, None) or KVCache(self.config.decoder, *key[:2], weight.device, weight.dtype)
        cache.key = key
        return cache

    def lay_out(self, prompts: list, images: list) -> tuple[int, list]:
        """
        -> (the longest prompt's tokens, what `read` takes: ids [B, T], lengths [B], the pictures' places in
        ids.flatten() [K], and the pictures).
        """
        # One rectangle of ids. Padded on the right: what comes later in a row is seen by nothing before it, so that no
        # mask is needed. On a GPU few different widths, so that few graphs are recorded.
        device = self.gpt.embed.weight.device
        most, longest = self.config.decoder.max_position_embeddings, max(len(p.ids) for p in prompts)
        if longest > most:  # it would answer all the same, and more and more strangely
            raise ValueError(f"a conversation of {longest:,} tokens; this model has learned to read {most:,}: shorten "
                             "it, or show fewer or smaller pictures")
        T = -(-longest // 64) * 64 if device.type == "cuda" else longest
        ids = torch.tensor([list(p.ids) + [0] * (T - len(p.ids)) for p in prompts], device=device)   # [B, T]
        lengths = torch.tensor([len(p.ids) for p in prompts], device=device)                         # [B]
        # Where the pictures go: from its slot, its run's first place in the row, one place a token.
        starts = [b * T + s for b, p in enumerate(prompts) for s in p.slots]
        if len(starts) != len(images):
            raise ValueError(f"{len(starts)} places for images in the prompts, but {len(images)} images")
        places = [start + i for start, image in zip(starts, images) for i in range(self.num_tokens(image))]
        inputs = [ids, lengths, torch.tensor(places, device=device, dtype=torch.long)]
        if images:  # tiled pictures first become tokens; plain ones, all alike, are read with the prompt
            inputs.append(self.look(images) if any(isinstance(image, Tiles) for image in images)
                          else torch.stack(images).to(device))
        return longest, inputs

    def read(self, cache: "KVCache", ids, lengths, slots, seen=None) -> torch.Tensor:
        """
        All prompts in one pass: ids [B, T] of which lengths [B] count, seen: pixels uint8 [n, 3, S, S] or the pictures'
        tokens [K, H] -> the logits of each row's next token [B, V].
        """
        if seen is not None and seen.dtype == torch.uint8:
            seen = self.see(seen).flatten(0, 1)
        cache.decoding = False
        h = self.gpt.hidden(self.embed(ids, seen, slots), cache=cache)                               # [B, T, H]
        cache.next.copy_(lengths)
        return self.gpt.logits(h[torch.arange(len(ids), device=ids.device), lengths - 1])

    def step(self, cache: "KVCache", token) -> torch.Tensor:
        "token [B] -> the logits of what follows it [B, V]."
        cache.decoding = True
        h = self.gpt.hidden(self.gpt.embed(token[:, None]), cache.next[:, None], cache=cache)[:, 0]  # [B, H]
        cache.next += 1
        return self.gpt.logits(h)

    @torch.no_grad()
    def generate(self, prompts: list, images: list = (), *, max_new_tokens: int = 128, stop: set[int] = frozenset(),
                 samples: int = 1, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 repetition_penalty: float = 1.0, vocab_used: int = 0,
                 seeds: list[int] | None = None) -> Iterator[list[int | None]]:
        """
        Prompts of any lengths, as tokenizer.render gives them, with all their pictures in order, each uint8 [3, S, S]
        or Tiles. Yields, for each new position, one id per row, None for rows that have ended (the stop token itself is
        still yielded). With samples = n every prompt is read once and answered n times: rows i*n to i*n+n-1.
        temperature 0 takes the likeliest token.
        """
        # 1. Read all prompts in one pass, and keep their keys and values.
        longest, inputs = self.lay_out(prompts, images)
        ids, lengths, device = inputs[0], inputs[1], inputs[0].device
        B, T = ids.shape
        cache = self.take_cache(B, max(T, longest + max_new_tokens))
        logits = cache.replay(self.read, *inputs) if B * T <= 2048 else self.read(cache, *inputs)    # [B, V]
        if samples > 1:  # only now: the costly part, reading the pictures, was done once for all samples
            once, B = cache, B * samples
            cache = self.take_cache(B, max(T, longest + max_new_tokens))
            cache.copy(once, T, samples)
            self.give_back(once)
            logits, ids, lengths = (t.repeat_interleave(samples, dim=0) for t in (logits, ids, lengths))

        # 2. What the sampler needs: the words each row has seen, and its random numbers.
        seen = torch.zeros(B, self.config.decoder.vocab_size, dtype=torch.bool, device=device)       # [B, V]
        if repetition_penalty != 1.0:
            seen.scatter_(1, ids, torch.arange(T, device=device) < lengths[:, None])
            # TRAP: id 0 is a word and also the padding: the scatter may have written either last.
            seen[:, 0] = torch.tensor([0 in p.ids for p in prompts for _ in range(samples)], device=device)
        seen = seen[:, :vocab_used or None]  # padding rows of the embedding are not words
        # From each row's own seed: what it says does not depend on its neighbours. Drawn on the CPU, so that every
        # device gets the same numbers, and all at once: one column is used at each step.
        seeds = list(range(B)) if seeds is None else seeds
        noise = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s))
                             for s in seeds]).to(device)                                           # [B, max_new_tokens]

        # 3. One token per row and step, until every row has ended.
        ended, ahead = [False] * B, device.type == "cuda"
        try:
            for step in range(max_new_tokens):
                token = sample(logits[:, :seen.shape[1]], noise[:, step], seen, temperature, top_k, top_p,
                               repetition_penalty)                                                   # [B]
                if repetition_penalty != 1.0:
                    seen.scatter_(1, token[:, None], True)
                more, cache.end = step < max_new_tokens - 1, cache.width if ahead else longest + step + 1
                row = token.to("cpu", non_blocking=True)
                if ahead:  # The GPU gets its next step before we wait for this one's tokens, and is never idle.
                    read = torch.cuda.Event()
                    read.record()
                    logits = cache.replay(self.step, token) if more else None
                    read.synchronize()
                row = row.tolist()
                yield [None if ended[b] else row[b] for b in range(B)]
                ended = [ended[b] or row[b] in stop for b in range(B)]  # such rows go on, unheard, until all have ended
                if all(ended) or not more:
                    return
                if not ahead:
                    logits = self.step(cache, token)
        finally:
            self.give_back(cache)

    def give_back(self, cache: "KVCache") -> None:
        if cache.key:
            self.caches[cache.key] = cache


class KVCache:
    """
    Keys and values of what was read so far, allocated once for the longest answer: nothing grows or moves while
    decoding. All rows begin in column 0.
    """

    def __init__(self, config: GPTConfig, batch: int, width: int, device, dtype):
        # Qwen2.5-1.5B in bfloat16: 2 x 28 layers x 2 heads x 128 channels x 2 bytes = 28 KiB for each token of a row
        # zeros, not empty: a stray NaN would pass through a zero weight
        self.kv = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads, width, config.head_dim,
                              device=device, dtype=dtype)
        self.next = torch.zeros(batch, device=device, dtype=torch.long)  # [B]: the column of each row's next token
        self.width = self.end = width  # columns from `end` on are empty in all rows
        self.decoding = False          # else a prompt is being read, from column 0 on
        self.graphs, self.key = {}, None

    def layer(self, i: int) -> tuple:
        return self.kv[i, :, :, :, :self.end], self.next if self.decoding else None

    def mask(self) -> torch.Tensor:
        "-> [B, 1, 1, S], to be added to the scores of each row's next token: -inf where nothing stands yet."
        empty = torch.arange(self.end, device=self.next.device) > self.next[:, None]                 # [B, S]
        return torch.zeros_like(empty, dtype=self.kv.dtype).masked_fill_(empty, -torch.inf)[:, None, None]

    def copy(self, other: "KVCache", T: int, n: int) -> None:
        "Row i becomes rows i*n to i*n+n-1: several answers to one prompt of at most T tokens, read only once."
        self.kv[:, :, :, :, :T] = other.kv[:, :, :, :, :T].repeat_interleave(n, dim=2)
        self.next.copy_(other.next.repeat_interleave(n))

    def replay(self, function, *inputs) -> torch.Tensor:
        """
        function(self, *inputs); on a GPU its kernels are recorded once (a CUDA graph) and then launched as one. A step
        of one token is a thousand short kernels, and Python cannot launch them as fast as they run.
        """
        if not self.kv.is_cuda:
            return function(self, *inputs)
        key = (function.__name__, *(tuple(t.shape) for t in inputs))
        if key not in self.graphs:  # The first time it runs as it is: what has to be compiled is compiled now.
            self.graphs[key] = None
            return function(self, *inputs)
        if self.graphs[key] is None:  # The second time it is recorded. A prompt's form that comes only once never is.
            held, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread may be fetching data meanwhile
                result = function(self, *held)
            self.graphs[key] = graph, held, result
        # TRAP: the recorded kernels read and write always the same memory: inputs go there, and the result is
        # overwritten by the next call.
        graph, held, result = self.graphs[key]
        for mine, given in zip(held, inputs):
            mine.copy_(given)
        graph.replay()
        return result


def sample(logits, noise, seen, temperature: float, top_k: int, top_p: float,
           repetition_penalty: float) -> torch.Tensor:
    "logits [B, V], noise [B] uniform in 0 to 1 -> token ids [B]. The filters come in Hugging Face's order."
    if temperature != 0 or repetition_penalty != 1.0:  # the largest is found without; sums over words need the digits
        logits = logits.float()
    if repetition_penalty != 1.0:  # above 1: whatever was seen loses likelihood. Both branches push a logit down.
        logits = torch.where(
            seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1), None  # below 1 the likely tokens gain, above 1 the unlikely
    if top_k or top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)  # order [B, V] leads back from ranks to ids
        if top_k:  # the k likeliest
            probs[:, top_k:] = 0
            probs /= probs.sum(dim=-1, keepdim=True)  # top-p counts shares of what top-k has left
        # top-p, the fewest that hold p of the mass: drop those before which p is already full. The first always stays.
        probs[probs.cumsum(dim=-1) - probs > top_p] = 0
    # Inverse transform: the first token at which the running sum passes the noise; argmax gives the first of equals.
    total = probs.cumsum(dim=-1)                                                                     # [B, V]
    # probs > 0: rounding in a long sum must not choose a token that is not allowed
    index = ((total > noise[:, None] * total[:, -1:]) & (probs > 0)).int().argmax(dim=-1, keepdim=True)  # [B, 1]
    return (index if order is None else order.gather(1, index))[:, 0]


def respond(vlm: VLM, tokenizer, conversations: list, images: list, **options) -> list[str]:
    """
    Chat messages and each one's list of pictures (uint8 [3, S, S] or Tiles) -> the assistant's next words. `options`
    are those of generate; with samples = n there are n answers in a row for each conversation.
    """
    prompts = [tokenizer.render(m, image_tokens=[vlm.num_tokens(image) for image in group], add_generation_prompt=True)
               for m, group in zip(conversations, images)]
    rows = [[] for _ in range(len(prompts) * options.get("samples", 1))]
    for column in vlm.generate(prompts, [image for group in images for image in group], stop=set(tokenizer.stop_ids),
                               vocab_used=tokenizer.vocab_size, **options):
        for row, token in zip(rows, column):
            if token is not None and token not in tokenizer.stop_ids:
                row.append(token)
    return [tokenizer.decode(row).strip() for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder of plain tensors and JSON. Nothing in it is ever unpickled.
#
#   config.json              sizes of all parts         tokenizer.*             the tokenizer it was trained with
#   model.safetensors        the weights                optimizer.safetensors   moments, for --resume
#   state.json               step, place in the data, ... for --resume

def recover(folder) -> Path:
    "If the last save was interrupted between its two renames, the checkpoint lies beside its place: put it back."
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    # .new is never taken instead: nothing tells from outside whether it was finished. At most one save is lost.
    if not folder.exists() and old.exists():
        os.rename(old, folder)
    return folder


def save_checkpoint(folder, vlm: VLM, tokenizer, optimizer: dict | None = None, state: dict | None = None,
                    masters: dict | None = None) -> None:
    """
    All or nothing: the new folder is written beside the old one and then takes its place, so that a crash at any moment
    leaves a whole checkpoint. masters: weights in more digits than the model's own, by name.
    """
    # First recover, then clean up: after an interrupted save the only whole checkpoint may be the one named .old.
    folder = recover(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
    tokenizer.save(new)  # with the weights: under another tokenizer's ids they would speak gibberish
    stamp = {"step": str((state or {}).get("step", 0))}  # proves that weights, moments and state belong to one moment
    write_safetensors(dict(vlm.named_parameters()) | (masters or {}), new / "model.safetensors",
                      {"format": "pt", **stamp})
    if optimizer is not None:
        write_safetensors(optimizer, new / "optimizer.safetensors", stamp)
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    if folder.exists():
        for file in folder.iterdir():  # log.jsonl, samples.png move along; an old optimizer beside new weights must not
            if not (new / file.name).exists() and file.name not in ("optimizer.safetensors", "state.json"):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        # Two renames, as a folder that has files in it cannot be replaced by one. Each happens wholly or not at all;
        # in the moment between them the checkpoint is .old, where recover() finds it.
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)  # last: until here there was always one whole checkpoint


STAGES = ["base", "align", "sft", "rl"]  # in the order in which they build on each other


def newest_checkpoint(out_dir, model: str, before: str = "") -> Path | None:
    "The checkpoint of the latest stage (of those before a given one) under OUT_DIR/MODEL, if there is any."
    stages = STAGES[:STAGES.index(before)] if before else STAGES
    folders = [Path(out_dir) / run_name(model) / stage for stage in stages]
    # .old counts too: after an interrupted save it is all there is, and load_checkpoint will put it back
    return next((f for f in reversed(folders)
                 if (f / "config.json").exists() or f.with_name(f.name + ".old").exists()), None)


def load_checkpoint(folder, device="cpu", dtype=torch.float32) -> VLM:
    """
    The folder's model: one of our checkpoints, or a LLaVA folder of Hugging Face's. ValueError if anything is missing,
    cut short or of another shape.
    """
    folder = recover(folder)
    config = read_json(folder / "config.json")
    kind = config.pop("model_type", "")
    if kind in LLAVA:
        return load_llava(folder, device, dtype)
    if kind != "ghostvis":
        raise ValueError(f"{folder}/config.json: neither a checkpoint of this project nor a LLaVA; "
                         "a bare Qwen2 folder is given by --model=")
    try:
        config = VLMConfig.from_dict(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: does not fit this version of the code ({error})") from None
    with torch.device("meta"):
        vlm = VLM(config)
    # Our own names on both sides, through the same checks as released weights: none missing, none left over.
    load_renamed(vlm, read_safetensors(folder / "model.safetensors"), {n: [n] for n, _ in vlm.named_parameters()}, "",
                 str(folder / "model.safetensors"), device, dtype)
    return vlm


# ----------------------------------------------------------------------------------------------------------------------
# Released weights: from the hub, and back into its form

LLAVA = ("llava_onevision", "llava")  # model types: with and without a newline token and tiles
LLAVA_NAMES = {
    **{f"vit.{ours}": [f"vision_tower.vision_model.{n}" for n in theirs] for ours, theirs in SIGLIP_NAMES.items()},
    **{f"gpt.{ours}": [f"language_model.{n}" for n in theirs] for ours, theirs in QWEN_NAMES.items()},
    "bridge.fc1.*": ["multi_modal_projector.linear_1.*"],
    "bridge.fc2.*": ["multi_modal_projector.linear_2.*"],
    "bridge.newline": ["image_newline"],
}


def load_llava(folder, device="cpu", dtype=torch.float32) -> VLM:
    "From a Hugging Face folder of LLaVA-OneVision, or of a LLaVA with SigLIP and Qwen2."
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    newline = hf["model_type"] == "llava_onevision"
    # What is left out equals Hugging Face's default, which is not the same for both types.
    hf = {"vision_feature_select_strategy": "full" if newline else "default",
          "vision_feature_layer": -1 if newline else -2, **hf}
    # What we would compute differently is refused.
    for key, ours in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full"),
                      ("vision_aspect_ratio", "anyres_max_9")):
        if hf.get(key, ours) != ours:
            raise ValueError(f"{folder}/config.json: {key} {hf[key]!r} is not supported, only {ours!r}")
    tensors = {}
    for name, tensor in read_safetensors(folder).items():
        # The hub's files begin with the part's name, and what transformers 5 writes with "model." and no inner name.
        part, _, rest = name.removeprefix("model.").partition(".")
        inner = {"vision_tower": "vision_model.", "language_model": "model."}.get(part, "")
        if part == "lm_head":
            part, rest, inner = "language_model", name, ""
        if not rest.startswith((inner, "lm_head.")):
            rest = inner + rest
        if ".head." not in rest:  # SigLIP's pooling head, where it was kept
            tensors[f"{part}.{rest}".removesuffix(".")] = tensor
    decoder = gpt_config(hf["text_config"], folder)
    decoder.tie_word_embeddings = "language_model.lm_head.weight" not in tensors
    vision, layer = vit_config(hf["vision_config"], folder), hf["vision_feature_layer"]
    vision.pad = newline
    if type(layer) is not int:
        raise ValueError(f"{folder}/config.json: vision_feature_layer {layer} is not supported, only a single number")
    # Hugging Face counts the embeddings as layer 0, so layer 26 of 26 is our -1, as their -1 is.
    config = fit(VLMConfig(
        vision, BridgeConfig(kind="mlp", layer=layer if layer < 0 else layer - vision.num_hidden_layers - 1,
                             newline=newline), decoder, pretrained_vision=hf["model_type"], preset="",
        generation=generation_config(folder)))
    with torch.device("meta"):
        vlm = VLM(config)
    load_renamed(vlm, tensors, LLAVA_NAMES, "", str(folder), device, dtype)
    return vlm


def generation_config(folder) -> dict:
    "How the publisher samples: options of `generate`."
    path = Path(folder) / "generation_config.json"
    hf = read_json(path) if path.exists() else {}
    # TRAP: without do_sample the other entries are leftovers, for the checkpoint is greedy; the penalty still counts.
    keys = ("temperature", "top_k", "top_p", "repetition_penalty") if hf.get("do_sample") else ("repetition_penalty", )
    return {key: hf[key] for key in keys if hf.get(key) is not None}


def load_pretrained(name: str, vision: str = "", bridge: str = "", device="cpu", dtype=torch.float32,
                    blind: bool = False) -> tuple[VLM, Path]:
    """
    Released weights -> (model, the folder with its tokenizer). name: a preset, a hub id or a folder that holds a Qwen2
    or a LLaVA. A Qwen gets eyes: a released encoder, and a new bridge that chapter 2 has to train; blind: it gets none.
    """
    def find(source: str) -> Path:
        return Path(source) if Path(source).is_dir() else data.fetch(source)
    folder = find(name)
    if read_json(folder / "config.json").get("model_type") in LLAVA:
        vlm = load_llava(folder, device, dtype)
    else:
        gpt = GPT.from_pretrained(folder, device, dtype)
        vision = vision or data.DEFAULT_VISION
        vit = None if blind else ViT.from_pretrained(find(vision), device, dtype)
        config = VLMConfig(vit and vit.config, BridgeConfig(kind=bridge or "perceiver"), gpt.config,
                           pretrained_vision=vision, generation=generation_config(folder))
        with torch.device("meta"):
            vlm = VLM(config if blind else fit(config))
        vlm.vit, vlm.gpt = vit, gpt
        if not blind:
            vlm.bridge = Bridge(config.bridge).to(device, dtype)
    vlm.config.preset = run_name(name)
    return vlm, folder


def run_name(model: str) -> str:
    "The folder under --out_dir: a preset's name, or the last part of a hub id or path. Org/Name@revision -> Name"
    return Path(model.split("@")[0]).name


def export(folder, vlm: VLM, tokenizer, decoder_only: bool = False, dtype=torch.bfloat16) -> None:
    """
    Write a Hugging Face folder that transformers and serving engines load: a LLaVA (bridge "mlp"), or the decoder alone
    as a Qwen2. Other bridges exist only here; their decoder can be had.
    """
    folder, config = Path(folder), vlm.config
    if not decoder_only and config.bridge.kind != "mlp":
        raise ValueError(f"Hugging Face has no model with a {config.bridge.kind} bridge: train with --bridge=mlp, "
                         "or export the decoder alone by --decoder_only")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; give --export= a new folder")
    tokenizer.save_hub(folder, config.decoder.max_position_embeddings)
    text = {**asdict(config.decoder), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end, "pad_token_id": tokenizer.endoftext}
    files = {"config.json": text, "generation_config.json": {
        "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.endoftext,
        "do_sample": config.generation.get("temperature", 0) > 0, **config.generation}}
    if not decoder_only:
        files |= llava_files(config, text, tokenizer.image_pad)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = hub_tensors(vlm.gpt, QWEN_NAMES) if decoder_only else hub_tensors(vlm, LLAVA_NAMES)
    write_safetensors({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors",
                      {"format": "pt"})


def hub_tensors(module: nn.Module, table: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    "The way back from load_renamed: the module's weights under the hub's names and in its shapes."
    tensors, parameters = {}, dict(module.named_parameters())
    for ours, theirs in renamed(module, table, prefix).items():
        if ".lora_" in ours:  # goes out as a part of its matrix
            continue
        value, owner = parameters[ours].detach(), module.get_submodule(ours.rpartition(".")[0])
        if isinstance(owner, LoRALinear) and ours.endswith("weight"):
            value = owner.merged().detach()
        if ours.endswith("patch.weight"):  # flat here, a convolution's [D, 3, P, P] there
            P = math.isqrt(value.shape[1] // 3)
            value = value.view(len(value), 3, P, P)
        # Stacked ones are cut apart: the decoder's query, key and value by their heads, all others into equal parts.
        owner = module.get_submodule(ours.rsplit(".", 2)[0]) if len(theirs) > 1 else None
        sizes = owner.sizes if isinstance(owner, Attention) else [len(value) // len(theirs)] * len(theirs)
        tensors |= dict(zip(theirs, value.split(sizes)))
    return tensors


def llava_files(config: VLMConfig, text: dict, image_pad: int) -> dict[str, dict]:
    "The JSON files of a LLaVA or LLaVA-OneVision folder, by name."
    vision, tiled, mean = config.vision, config.bridge.newline, [0.5, 0.5, 0.5]
    side, name = vision.image_size, "LlavaOnevision" if config.bridge.newline else "Llava"
    pinpoints = [[h * side, w * side] for h in range(1, MOST_TILES + 1) for w in range(1, MOST_TILES + 1)]
    layout = {"image_grid_pinpoints": pinpoints, "vision_aspect_ratio": f"anyres_max_{MOST_TOKENS}"} if tiled else {}
    return {
        "config.json": {
            "model_type": LLAVA[0 if tiled else 1], "architectures": [f"{name}ForConditionalGeneration"],
            "image_token_index": image_pad, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_feature_layer": config.bridge.layer, "vision_feature_select_strategy": "full",
            "image_seq_length": vision.num_patches, "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": text["torch_dtype"], "text_config": text, **layout,
            "vision_config": {
                "model_type": "siglip_vision_model", "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh",
                **{f.name: getattr(vision, f.name) for f in fields(ViTConfig) if f.name not in ("bicubic", "pad")}}},
        "preprocessor_config.json": {
            "image_processor_type": f"{name}ImageProcessor" if tiled else "SiglipImageProcessor",
            "processor_class": f"{name}Processor", "do_resize": True, "size": {"height": side, "width": side},
            "resample": 3 if vision.bicubic else 2, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": mean, "image_std": mean, "do_convert_rgb": True, **layout},
        "processor_config.json": {
            "processor_class": f"{name}Processor", "vision_feature_select_strategy": "full",
            **({"num_image_tokens": vision.num_patches, "image_token": "<image>", "video_token": "<video>"} if tiled
               else {"patch_size": vision.patch_size, "image_token": "<|image_pad|>",
                     "num_additional_image_tokens": 0})},
    }
