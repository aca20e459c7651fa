"""
The model: a Qwen2.5 decoder, a vision-language model (VLM) around it, the loss, generation, and loading.

    ids [B, T] -> embeddings [B, T, H], image tokens written over the <|image_pad|> positions
      L x ( RMSNorm -> attention (RoPE, grouped queries) -> +  RMSNorm -> SwiGLU -> + )
      RMSNorm -> head -> logits [B, T, V]

The layers compute exactly what Hugging Face's Qwen2 computes (arXiv 2412.15115): same weights, same logits. Two
sections only save time or memory; they say so, and a first reader can skip them.
Axis letters: B rows, T tokens in a row, H the decoder's width, d a head's width, V vocabulary, n pictures, M image
tokens of each picture. Left out: sliding windows (no released Qwen2.5 uses them), dropout, YaRN for very long texts.
"""
import bisect
import contextlib
import copy
import inspect
import itertools
import re
from collections import deque
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

import weights
from vision import (SIGLIP, Bridge, BridgeConfig, PictureCache, ViT, ViTConfig, check_sizes, digest, init_linears,
                    llava_vision)

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass
class GPTConfig:
    "Field names are those of Hugging Face's Qwen2Config; the values here are Qwen2.5-1.5B's."
    vocab_size: int = 151936          # V: rows of the embedding; 151,665 are tokens, the rest is padding
    hidden_size: int = 1536           # H: the width of the residual stream
    intermediate_size: int = 8960     # I: width inside the MLP, where most of the weights are
    num_hidden_layers: int = 28       # L
    num_attention_heads: int = 12     # query heads, of d = 1536 / 12 = 128 channels each
    num_key_value_heads: int = 2      # each serves 12 / 2 = 6 query heads: the cache is 6 times smaller
    rms_norm_eps: float = 1e-6        # added under the root: an all-zero vector stays finite
    rope_theta: float = 1_000_000.0   # the slowest rotary pair turns once in about 5 million tokens
    tie_word_embeddings: bool = True  # the head is the embedding matrix, transposed
    max_position_embeddings: int = 32768  # tokens of the longest text it was trained on

    @property
    def head_dim(self) -> int:        # d
        return self.hidden_size // self.num_attention_heads


@dataclass
class VLMConfig:
    vision: ViTConfig = field(default_factory=ViTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    decoder: GPTConfig = field(default_factory=GPTConfig)
    pretrained_vision: str = ""       # the released encoder's name; then the ViT stays frozen in every stage
    preset: str = "tiny"              # also the folder of its checkpoints under --out_dir
    generation: dict = field(default_factory=dict)  # the publisher's temperature, top_k, ...; ours: empty, greedy
    lora_rank: int = 0                # above 0: the decoder is frozen, and thin matrices beside its own are trained
    run: dict = field(default_factory=dict)  # what trained it: chapters so far, stage, step, data, time (training.save)


PRESETS = {
    # 1.7 million parameters: ViT 0.66, bridge 0.30, decoder 0.72. 72 / 12 = 6 patches a side: N = 36, and M = N / 4:
    # each latent starts from 2 x 2 patches.
    "tiny": VLMConfig(
        ViTConfig(128, 512, num_hidden_layers=3, num_attention_heads=4, image_size=72, patch_size=12),
        BridgeConfig(num_latents=9, num_layers=1, num_heads=4),
        GPTConfig(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=2048)),
    # 64 million parameters: ViT 21, bridge 5, decoder 38. 128 / 8 = 16 patches a side: N = 256, like SigLIP-L/16.
    "small": VLMConfig(
        ViTConfig(384, 1536, num_hidden_layers=12, num_attention_heads=6, image_size=128, patch_size=8),
        BridgeConfig(num_latents=64, num_layers=2, num_heads=6),
        GPTConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
                  num_key_value_heads=2, max_position_embeddings=4096)),
}
FROM_SCRATCH = tuple(PRESETS)  # these have no released weights
# Qwen2.5 as released. The fields not named here are the same in all: vocabulary, RoPE's base, epsilon, the tied head.
QWEN = {
    "qwen2.5-0.5b": GPTConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen2.5-1.5b": GPTConfig(max_position_embeddings=131072),
    "qwen2.5-3b": GPTConfig(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
}
for _name, _decoder in list(QWEN.items()):  # the instruct models have the same shapes
    QWEN[_name + "-instruct"] = replace(_decoder, max_position_embeddings=32768)
PRESETS |= {_name: VLMConfig(SIGLIP[weights.DEFAULT_VISION], BridgeConfig(), _decoder,
                             pretrained_vision=weights.DEFAULT_VISION) for _name, _decoder in QWEN.items()}
# A finished public model: SigLIP so400m without its last layer, an MLP, Qwen2-0.5B with a few more rows of padding.
PRESETS["llava-ov-0.5b"] = VLMConfig(
    replace(SIGLIP["siglip-so400m-patch14-384"], num_hidden_layers=26, pad=True),
    BridgeConfig(kind="mlp", newline=True), replace(QWEN["qwen2.5-0.5b"], vocab_size=152000),
    pretrained_vision="llava-ov-0.5b")


def connect(config: VLMConfig) -> VLMConfig:
    "Set the bridge's sizes from the two parts that it connects."
    config.bridge.vision_size, config.bridge.text_size = config.vision.hidden_size, config.decoder.hidden_size
    config.bridge.num_patches = config.vision.num_patches
    return config


def preset(name: str, bridge: str = "") -> VLMConfig:
    "A fresh configuration, with another kind of bridge if one is named."
    config = copy.deepcopy(PRESETS[name])
    config.preset, config.bridge.kind = name, bridge or config.bridge.kind
    return connect(config)


def check_name(model: str) -> None:
    "--model must be a preset, a hub id or a path."
    if model not in PRESETS and "/" not in model:
        raise ValueError(f"--model={model}: unknown; choose from {', '.join(PRESETS)}, or give a hub id, Org/Name")


def run_name(model: str) -> str:
    "The folder under --out_dir: a preset's name, or the last part of a hub id or path. Org/Name@revision -> Name"
    return Path(model.split("@")[0]).name


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
    "positions [B, T] -> cos, sin [B, T, 1, d / 2]; the 1 stands for the heads, which share the angles."
    d = config.head_dim
    # Radians per token: 1 for the first pair of channels, about a millionth for the last. Fast pairs tell
    # neighbours apart, slow ones tell distant parts apart, like the second and the hour hand of a clock.
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    # float32 throughout: bfloat16 cannot tell position 1000 from 1001
    angles = positions[:, :, None, None].float() * frequencies                                       # [B, T, 1, d/2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary position embedding (arXiv 2104.09864): each pair of channels is rotated by an angle that grows with the
    position, so the product of a query and a key depends only on the distance between their positions.
    """
    # TRAP: channel i of the first half and channel i of the second are one pair. Llama's first code paired 2i with
    # 2i + 1, and weights trained for one pairing are noise in the other.
    a, b = x.float().chunk(2, dim=-1)                                                          # [B, T, heads, d/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)                     # [B, T, heads, d]


class Linear(nn.Linear):
    "nn.Linear; during training in 8 bits, if asked for (see Float8Product)."
    float8 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.float8 and torch.is_grad_enabled():
            y = Float8Product.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight)
        # Product and bias as two operations: torch.compile fuses the sum into its neighbours, but not one joint call.
        return y if self.bias is None else y + self.bias


# PyTorch 2.11's FlashAttention accepts fewer key than query heads without being told, later versions need the flag.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend(q, k, v, documents=None) -> torch.Tensor:
    """
    q [B, T, heads, d], k and v [B, T, kv heads, d] -> softmax(q k^T / sqrt(d)) v [B, T, heads, d], causal.
    documents: None (one document per row); or what keeps documents in a row apart: a mask from document_mask, or for
    FlashAttention cu_seqlens int32 [D + 1] (see data.cumulative_lengths).
    """
    if documents is not None and documents.dtype == torch.int32:
        # FlashAttention over the documents themselves, end to end: what a mask would hide is never computed.
        B, T, flat = *q.shape[:2], [t.flatten(0, 1) for t in (q, k, v)]                      # [B * T, heads, d]
        return varlen_attn(*flat, documents, documents, T, T, window_size=(-1, 0), **GQA).view_as(q)  # causal
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                         # [B, heads, T, d]
    # enable_gqa: query heads 0 to 5 use kv head 0, and so on, without six copies of it.
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents, is_causal=documents is None, enable_gqa=True)
    return y.transpose(1, 2)                                                                 # [B, T, heads, d]


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    "[B, T] -> [B, 1, T, T], True where a query may attend: to earlier positions of its own document."
    T = document_ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()                   # [T, T]
    # Padding is document 0 and attends to itself: every query has at least one key, so no softmax is over nothing.
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :]))[:, None]


class Attention(nn.Module):
    "Grouped-query attention (arXiv 2305.13245): several query heads share one key and value head."

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        H, d = config.hidden_size, config.head_dim
        # rows of query, key and value in one matrix; 1536, 256 and 256 in Qwen2.5-1.5B
        self.sizes = [config.num_attention_heads * d, config.num_key_value_heads * d, config.num_key_value_heads * d]
        self.qkv = Linear(H, sum(self.sizes))          # Qwen has a bias here and nowhere else
        self.out = Linear(H, H, bias=False)

    def project(self, x, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "x [B, T, H] -> q [B, T, heads, d], k and v [B, T, kv heads, d]."
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.config.head_dim) for part in self.qkv(x).split(self.sizes, dim=-1))
        # Only queries and keys are rotated: position decides where to attend, not what is found there.
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, x, rope, documents=None, cache=None) -> torch.Tensor:
        "x [B, T, H] -> [B, T, H]. documents: see attend. cache: see LayerCache; training needs none."
        q, k, v = self.project(x, rope)
        y = attend(q, k, v, documents) if cache is None else attend_with_cache(q, k, v, cache)   # [B, T, heads, d]
        return self.out(y.flatten(2))                                                            # [B, T, H]


class MLP(nn.Module):
    "SwiGLU (arXiv 2002.05202): one half of the channels decides how much of the other half passes."

    def __init__(self, config: GPTConfig):
        super().__init__()
        # gate and up in one product: one large product uses the hardware better than two of half the size
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)                                                  # [B, T, I] each
        return self.down(F.silu(gate) * up)                                                          # [B, T, H]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, documents=None, cache=None) -> torch.Tensor:
        # Norms are on the branches, not on x itself: the gradient has a direct path from the loss to layer 0.
        x = x + self.attention(self.norm1(x), rope, documents, cache)  # mixes information between tokens
        return x + self.mlp(self.norm2(x))                             # works on each token alone


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        # As large as what the blocks add to it. The tied head's first logits then have a standard deviation of 3, and
        # the first loss is 15, not ln V = 7. Started at 7, tiny learns less: 60 instead of 67 % (docs/tried.md).
        nn.init.normal_(self.embed.weight, std=3 * config.hidden_size ** -0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # True: see hidden
        self.compiled_decode = {}              # see compile_decoding
        init_linears(self.blocks, outputs=("out", "down"), depth=config.num_hidden_layers)
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def set_float8(self, on: bool) -> None:
        "The head stays in 16 bits: the loss depends directly on its logits."
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.float8 = on

    @property
    def head_weight(self) -> torch.Tensor:
        # Not stored at construction: a stored tied head would still be the old matrix after weights are loaded.
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight            # [V, H]

    def hidden(self, x: torch.Tensor, positions=None, documents=None, cache: "list[LayerCache]" = ()) -> torch.Tensor:
        """
        Embeddings x [B, T, H] -> hidden states [B, T, H] after the last norm. positions [B, T] count from 0 in each
        document; documents: see attend; without both, each row is one document. cache: for generation, see LayerCache.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]                              # [1, T]
        rope = rope_table(positions, self.config)
        for i, block in enumerate(self.blocks):
            if cache:
                # Prefill runs uncompiled: every new prompt length would be compiled again.
                run = self.compiled_decode.get(len(x) == 1, Block.forward) if x.shape[1] == 1 else Block.forward
                x = run(block, x, rope, None, cache[i])
            elif self.activation_checkpointing and torch.is_grad_enabled():
                # Only a block's input is stored; the backward pass computes the rest again: a third more work, and
                # memory for one block's activations instead of all blocks'.
                x = checkpoint(block, x, rope, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, documents)
        return self.norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:  # h [..., H] -> [..., V]
        return F.linear(h, self.head_weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        "ids [B, T] -> logits [B, T, V]. Training uses hidden() and token_loss: it never needs all logits at once."
        return self.logits(self.hidden(self.embed(ids)))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "GPT":
        "From a Qwen2 or Qwen2.5 folder as the hub ships it: config.json and one or more safetensors files."
        folder = Path(folder)
        with torch.device("meta"):  # shapes without memory: no random weights are drawn only to be replaced
            gpt = cls(gpt_config(weights.read_json(folder / "config.json"), folder))
        tensors = weights.read_safetensors(folder)
        if gpt.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some tools write the tied head a second time
        weights.load_tensors(gpt, tensors, weights.QWEN_NAMES, "", str(folder), device, dtype)
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
    check_sizes(config, folder)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads or heads % kv_heads:
        raise ValueError(f"{folder}/config.json: hidden_size {config.hidden_size}, {heads} heads and {kv_heads} key "
                         "and value heads do not divide; is the file whole?")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Training, faster or with less memory (skip at first reading): products in 8 bits, and LoRA

def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    "x -> (x / scale in 8 bits, scale): the largest entry becomes the largest number of the type."
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
        # TRAP: the 8-bit product needs both factors contiguous along the summed axis, hence the transposed copies.
        grad_x = torch._scaled_mm(grad, w.t().contiguous().t(), scale, w_scale, out_dtype=torch.bfloat16)
        grad_w = torch._scaled_mm(grad.t().contiguous(), x.t().contiguous().t(), scale, x_scale,
                                  out_dtype=torch.bfloat16)
        return grad_x, grad_w


class LoRALinear(Linear):
    """
    LoRA (arXiv 2106.09685): the matrix W [out, in] stays frozen, and the product b a is added to it, with a [rank, in]
    and b [out, rank]. At rank 16 that trains 1 % of the weights, and the other 99 % need no optimizer state.
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


# ----------------------------------------------------------------------------------------------------------------------
# The loss

def cross_entropy(logits, targets, loss_weights) -> tuple[torch.Tensor, torch.Tensor]:
    "logits [n, V], targets [n], loss_weights [n] -> (sum of weight * -log p(target), its gradient [n, V])."
    dtype, targets, loss_weights = logits.dtype, targets[:, None], loss_weights[:, None]
    logits = logits.float()
    logsum = logits.logsumexp(dim=-1, keepdim=True)                                                  # [n, 1]
    # -log softmax at the target = logsumexp - the target's logit: no probability underflows to log 0
    surprise = logsum - logits.gather(1, targets)
    delta = (logits.sub_(logsum).exp_() * loss_weights).to(dtype)  # d loss / d logits = softmax - 1 at the target
    # TRAP: the 1 is subtracted before rounding: in bfloat16 a probability of 0.999 is 1, and its error 0.
    delta = delta.scatter_(1, targets, (torch.expm1(-surprise) * loss_weights).to(dtype))
    return (surprise * loss_weights).sum(), delta


class TokenLoss(torch.autograd.Function):
    """
    Head and cross-entropy in one, a chunk of tokens at a time, with the gradients already computed in the forward pass.
    The logits of 16,384 tokens for Qwen's 151,936 ids are 10 GB in float32, and autograd would store them until the
    backward pass; here each chunk's logits are freed before the next one's (the idea of Liger and of Cut Cross-Entropy,
    arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, x, head, targets, loss_weights, chunk, train, cross_entropy):
        # n supervised tokens: x [n, H], targets and loss_weights [n]; head [V, H]. Sums in float32: bfloat16 has 2 to 3
        # digits.
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.zeros_like(x) if train else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if train and head.requires_grad else None
        for i in range(0, len(x), chunk):
            xi = x[i:i + chunk]
            loss, delta = cross_entropy(xi @ head.t(), targets[i:i + chunk], loss_weights[i:i + chunk])  # [chunk, V]
            total += loss
            if train:
                grad_x[i:i + chunk] = delta @ head                                                   # [chunk, H]
                if grad_head is not None:
                    grad_head += delta.t() @ xi                                                      # [V, H]
        ctx.save_for_backward(grad_x, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        # The loss is one number: its gradient only scales what forward computed. One result for each input of forward.
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad, None if grad_head is None else grad_head * grad, None, None, None, None, None


def token_loss(x, head, targets, loss_weights=None, supervised=None, chunk: int = 4096,
               cross_entropy=cross_entropy) -> torch.Tensor:
    """
    x [B, T, H], head [V, H], targets [B, T] with -100 where there is none -> the SUM over supervised tokens of
    weight * -log p(target). loss_weights [B, T]: ones, or in reinforcement learning the advantages. supervised [n]: the
    positions with a target in targets.flatten(), if they are known.
    """
    # TRAP: the caller divides by the tokens of the whole step, over all micro-batches and ranks. A mean of means would
    # give a token in a short micro-batch more weight.
    if supervised is None:  # on a GPU this waits for the result; pack has counted on the CPU
        supervised = (targets.flatten() >= 0).nonzero()[:, 0]
    loss_weights = torch.ones_like(targets, dtype=torch.float32) if loss_weights is None else loss_weights
    # Most positions are image tokens or questions: no logits are computed for them.
    return TokenLoss.apply(x.flatten(0, 1).index_select(0, supervised), head, targets.flatten()[supervised],
                           loss_weights.flatten()[supervised], chunk, torch.is_grad_enabled(), cross_entropy)


# ----------------------------------------------------------------------------------------------------------------------
# The VLM

class VLM(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vision) if config.vision else None  # None: a language model alone
        self.bridge = Bridge(config.bridge) if config.vision else None
        self.gpt = GPT(config.decoder)
        self.cross_entropy = cross_entropy
        self.idle_caches = {}  # see take_cache, Engine.close
        if config.lora_rank:
            self.add_lora(config.lora_rank)

    def add_lora(self, rank: int) -> None:
        self.config.lora_rank = rank
        for block in self.gpt.blocks:
            add_lora(block, rank)

    def parts(self) -> dict[str, nn.Module]:
        return {"vit": self.vit, "bridge": self.bridge, "decoder": self.gpt}  # each is trained or frozen as a whole

    def vit_features(self, pixels: torch.Tensor) -> torch.Tensor:
        "pixels uint8 [n, 3, S, S] -> the bridge's input [n, N, D]."
        # A frozen ViT needs no graph for gradients: the activations of its layers are freed at once.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vit.patch.weight.requires_grad):
            return self.vit(pixels, self.config.bridge.layer, self.config.bridge.norm)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        "pixels uint8 [n, 3, S, S] -> image tokens [n, M, H]."
        return self.bridge(self.vit_features(pixels))

    def embed(self, ids, image_tokens=None, image_positions=None) -> torch.Tensor:
        "ids [B, T] -> [B, T, H]; at image_positions [K] of ids.flatten() image_tokens [K, H] replace the embeddings."
        x = self.gpt.embed(ids)
        if image_tokens is None:
            return x
        # index_copy, not an assignment in place: gradients flow to the image tokens.
        return x.flatten(0, 1).index_copy(0, image_positions, image_tokens.to(x.dtype)).view_as(x)

    def forward(self, batch: dict) -> torch.Tensor:
        "A packed batch (data.pack, data.collate) -> the summed loss over its supervised tokens."
        image_tokens = None
        if batch["pixels"] is not None:
            # image_index [m]: which of the n pictures each slot shows. A picture that several documents share is
            # encoded once.
            image_tokens = self.encode_images(batch["pixels"])[batch["image_index"]].flatten(0, 1)   # [m * M, H]
        x = self.embed(batch["ids"], image_tokens, batch["image_positions"])                         # [B, T, H]
        if batch["cu_seqlens"] is None:  # one document in each row: plain causal attention
            documents = None
        elif x.is_cuda and x.dtype == torch.bfloat16:  # what FlashAttention needs; elsewhere a mask means the same
            documents = batch["cu_seqlens"]
        else:
            documents = document_mask(batch["document_ids"])
        h = self.gpt.hidden(x, batch["positions"], documents)                                        # [B, T, H]
        return token_loss(h, self.gpt.head_weight, batch["targets"], batch["loss_weights"], batch["supervised"],
                          cross_entropy=self.cross_entropy)

    def compile_parts(self) -> None:
        "torch.compile where the time goes: many small operations become one kernel, without trips through memory."
        # Block by block: equal blocks share one compilation. The whole model as one piece would take many times longer.
        # TRAP: torch.compile(block) would put "_orig_mod." before all parameter names; block.compile() does not.
        for block in self.vit.blocks if self.vit else ():
            block.compile()  # the number of pictures varies: after two of them PyTorch compiles for any number
        for block in self.gpt.blocks:
            block.compile(dynamic=False)  # fixed shapes give faster kernels
        self.gpt.compiled_decode = compile_decoding()
        self.cross_entropy = torch.compile(cross_entropy)

    # ------------------------------------------------------------------------------------------------------------------
    # Generation: prefill computes whole prompts in one forward pass, then decode adds one token per row and step

    def prefill(self, kv, S: int, ids, rows, starts, lengths, image_positions, image_tokens=None) -> torch.Tensor:
        """
        Texts ids [B, T], of which lengths [B] tokens count, go into columns starts [B] and following of the cache's
        rows [B]; image_tokens [K, H] -> the logits of each one's next token [B, V]. S: see layer_caches.
        """
        # Padding is on the right: no token attends to later ones. What it leaves in the cache is overwritten before it
        # is seen; where it would not fit, it goes into the last column, which no prompt reaches.
        columns = (starts[:, None] + torch.arange(ids.shape[1], device=ids.device)).clamp(max=kv.shape[4] - 1)
        h = self.gpt.hidden(self.embed(ids, image_tokens, image_positions), columns,
                            cache=layer_caches(kv, rows[:, None], columns, S))                       # [B, T, H]
        last = torch.arange(len(ids) if h.is_cuda else whole(len(ids), ROWS), device=ids.device) % len(ids)
        return self.gpt.logits(h[last, lengths[last] - 1])[:len(ids)]

    def decode(self, kv, S: int, token, columns) -> torch.Tensor:
        "token [B], one for each of the first B rows, and its column [B] -> the logits of what follows it [B, V]."
        rows, columns = torch.arange(len(token), device=token.device)[:, None], columns[:, None]     # [B, 1] each
        h = self.gpt.hidden(self.gpt.embed(token[:, None]), columns, cache=layer_caches(kv, rows, columns, S))
        return self.gpt.logits(h[:, 0])

    def generate(self, prompts: list, images: list = (), *, samples: int = 1, vocab_used: int = 0,
                 seeds: list[int] | None = None, **options) -> Iterator[list[int | None]]:
        """
        Prompts of any lengths, as tokenizer.render gives them, with all their pictures in order; options: see Request.
        Yields, for each new position, one id per row, None for rows that have ended (the stop token itself is still
        yielded). samples = n: every prompt is prefilled once and answered n times, in rows i*n to i*n+n-1.
        """
        if (places := sum(len(prompt.slots) for prompt in prompts)) != len(images):
            raise ValueError(f"{places} places for images in the prompts, but {len(images)} images")
        images = iter(images)
        shown = [[next(images) for _ in prompt.slots] for prompt in prompts]
        requests = [Request(prompts[i // samples], shown[i // samples], seed=seed, **options)
                    for i, seed in enumerate(seeds or range(len(prompts) * samples))]
        with contextlib.closing(Engine(self, requests, vocab_used=vocab_used)) as engine:
            for i in itertools.count():
                if not engine.busy:
                    return
                engine.step()
                yield [r.answer[i] if i < len(r.answer) else None for r in requests]


# On a CPU, products of a few rows add in another order than those of many, and attention to 9 columns in another than
# to 16. With rows and columns rounded up, a request's numbers are the same, bit for bit, whoever else is there.
ROWS, COLUMNS = 4, 16


def whole(n: int, step: int) -> int:
    return -(-n // step) * step


class LayerCache(NamedTuple):
    "One layer's keys and values, and where this call's tokens belong."
    kv: torch.Tensor            # [2, R, kv heads, W, d]: R rows, one for each request, of W columns
    rows: torch.Tensor          # [B, 1]
    columns: torch.Tensor       # [B, T]: the column of each new token
    mask: torch.Tensor | None   # [B, 1, T, S]: added to the scores of the first S columns; None: whole prompts


def layer_caches(kv, rows, columns, S: int) -> list[LayerCache]:
    "kv [L, 2, R, kv heads, W, d]. S: how many columns are attended to; 0: the new tokens are all there is."
    mask = None
    if S:  # -inf hides columns that come later than a token, or are still empty
        later = torch.arange(S, device=columns.device) > columns[..., None]                          # [B, T, S]
        mask = torch.zeros_like(later, dtype=kv.dtype).masked_fill_(later, -torch.inf)[:, None]
    return [LayerCache(layer, rows, columns, mask) for layer in kv]


def attend_with_cache(q, k, v, cache: LayerCache) -> torch.Tensor:
    "As attend, with this layer's cache: k and v are stored, and new tokens attend to all columns so far."
    (B, T, _, d), kv_heads = q.shape, k.shape[2]
    store(k, v, cache)
    if cache.mask is None:
        return attend(q, k, v)
    S = cache.mask.shape[-1]
    keys, values = cache.kv[:, :B, :, :S] if T == 1 else cache.kv[:, cache.rows[:, 0], :, :S]        # [B, kv, S, d]
    # The query heads that share a kv head take the place of tokens: they use the same keys, in one product.
    q = q.view(B, T, kv_heads, -1, d).permute(0, 2, 3, 1, 4)                                         # [B,kv,group,T,d]
    mask = cache.mask if T == 1 else cache.mask.repeat(1, 1, q.shape[2], 1)                          # [B,1,group*T,S]
    y = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=mask)                # [B,kv,group*T,d]
    return y.view(B, kv_heads, -1, T, d).permute(0, 3, 1, 2, 4).flatten(2, 3)                        # [B, T, heads, d]


def store(k, v, cache: LayerCache) -> None:
    "k and v [B, T, kv heads, d] -> their rows and columns. Keys are stored rotated: their positions never change."
    cache.kv[:, cache.rows, :, cache.columns] = torch.stack([k, v]).permute(1, 2, 0, 3, 4)           # [B, T, 2, kv, d]


def sample(logits, noise, present, temperature, top_k, top_p, repetition_penalty) -> torch.Tensor:
    "logits [B, V], noise [B] uniform in 0 to 1, present [B, V] -> ids [B]. The filters come in Hugging Face's order."
    if temperature != 0 or repetition_penalty != 1.0:  # sums over V need float32; argmax does not
        logits = logits.float()
    if repetition_penalty != 1.0:  # above 1: tokens already present become less likely. Both branches lower a logit.
        logits = torch.where(
            present, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1), None  # below 1 likely tokens gain, above 1 unlikely
    if top_k or top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)  # order [B, V]: the id of each rank
        if top_k:  # the k most likely
            probs[:, top_k:] = 0
            probs /= probs.sum(dim=-1, keepdim=True)  # top-p is a share of what top-k has left
        # top-p, the fewest that hold p of the mass: drop those before which p is reached. The first always stays.
        probs[probs.cumsum(dim=-1) - probs > top_p] = 0
    # Inverse transform sampling: the first token at which the running sum passes the noise. argmax of equal values
    # returns the first.
    total = probs.cumsum(dim=-1)                                                                     # [B, V]
    # probs > 0: rounding in a long sum must not choose a token that is not allowed
    index = ((total > noise[:, None] * total[:, -1:]) & (probs > 0)).int().argmax(dim=-1, keepdim=True)  # [B, 1]
    return (index if order is None else order.gather(1, index))[:, 0]


@dataclass(eq=False)
class Request:
    "One answer to be generated: what is asked, how, and what has been said so far."
    prompt: object                   # ids, and slots: where its pictures' image tokens begin (tokenizer.Rendered)
    images: list = ()                # uint8 [3, S, S] or Tiles
    max_new_tokens: int = 128
    stop: set[int] = frozenset()     # ids that end the answer
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    answer: list[int] = field(default_factory=list)  # ids, the stop token too
    finish: str = ""                 # "stop" or "length"; whoever writes "cancelled" here frees the row
    reused: int = 0                  # tokens of the prompt whose keys and values were still there

    def __post_init__(self):
        # Drawn on the CPU from its own seed: every device gets the same numbers, whoever else is there.
        self.noise = torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.keys = list(self.prompt.ids)  # what tells one prompt from another: at the place of a picture, its digest
        for slot, image in zip(self.prompt.slots, self.images):
            self.keys[slot] = digest(image)

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.answer)


class Engine:
    """
    Continuous batching (Orca, OSDI 2022): requests join and leave between two tokens, each in a row of its own.

        engine = Engine(vlm, rows=32, width=2048); engine.submit(request); engine.step() -> the requests that ended

    What a request says does not depend on who shares the batch. The keys and values of a prompt stay when its request
    ends, and a conversation that goes on is prefilled from there. A picture seen before is not encoded again.
    """

    def __init__(self, vlm: VLM, requests: Iterable[Request] = (), rows: int = 0, width: int = 0, vocab_used: int = 0):
        weight, requests = vlm.gpt.embed.weight, list(requests)
        rows, width = rows or len(requests), width or max(len(r) + r.max_new_tokens for r in requests)
        self.vlm, self.device, self.gpu = vlm, weight.device, weight.is_cuda
        self.kv, self.graphs, self.key = take_cache(vlm, rows, width)
        self.rows, self.width = self.kv.shape[2], self.kv.shape[4]
        self.waiting, self.running = deque(), {}            # running: {row: request}
        self.free, self.kept = list(range(self.rows)), {}   # kept: {free row: Request.keys that its columns hold}
        self.vocab_used = vocab_used or len(weight)         # the embedding's padding rows are not tokens
        self.logits = weight.new_zeros(self.rows, len(weight))                     # [R, V], of each row's next token
        self.present = torch.zeros_like(self.logits, dtype=torch.bool)             # [R, V], tokens in each row so far
        self.pictures = PictureCache(vlm.vit_features, vlm.bridge, self.device, self.run_encoder)
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        # Beyond what it was trained on it would answer, but worse and worse.
        limit = min(self.vlm.config.decoder.max_position_embeddings, self.width - request.max_new_tokens)
        if len(request) > limit:
            raise ValueError(f"a conversation of {len(request):,} tokens; this model can read {limit:,} here: shorten "
                             "it, or show fewer or smaller pictures")
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Request]:
        "Requests from any iterator -> each as soon as it is answered; rows that end early make room for the next."
        requests = iter(requests)
        while True:
            for request in itertools.islice(requests, max(0, len(self.free) - len(self.waiting))):
                self.submit(request)
            if not self.busy:
                return
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        "Prefill those that wait, as far as there are free rows; then one token more for all -> those that ended."
        self.admit()
        if not self.running:
            return []
        # On a GPU always all rows, one graph. On a CPU the first ones: free rows are given out from the lowest on.
        B = self.rows if self.gpu else whole(max(self.running) + 1, ROWS)
        S = self.columns(max(map(len, self.running.values())) + 1)
        # Free rows are computed too. Their tokens go behind what is kept, and nobody looks.
        columns = self.upload([len(self.running.get(row, self.kept.get(row, ()))) for row in range(B)])      # [B]
        token = self.choose(B)

        def decode():
            compute = partial(self.vlm.decode, self.kv, S)
            self.logits[:B] = run_graph(self.graphs, ("decode", S), compute, token, columns)
        ids, copied = token.to("cpu", non_blocking=True), self.gpu and torch.cuda.current_stream().record_event()
        if self.gpu and any(len(r.answer) + 1 < r.max_new_tokens for r in self.running.values()):
            decode()  # launched before the CPU waits for this step's tokens
        if self.gpu:
            copied.synchronize()
        ended = [request for (row, request), id_ in zip(list(self.running.items()), ids[list(self.running)].tolist())
                 if self.extend(row, request, id_)]
        if self.running and not self.gpu:
            decode()
        return ended

    def extend(self, row: int, request: Request, token: int) -> str:
        "One token more -> why the request has ended, or an empty string."
        request.answer.append(token)
        request.finish = request.finish or (
            "stop" if token in request.stop else "length" if len(request.answer) == request.max_new_tokens else "")
        if request.finish:
            # The answer's own columns do not count as kept. They differ in the last bits from what prefill would give:
            # the next answer would depend on whether this row was still there.
            self.kept[row] = self.running.pop(row).keys
            bisect.insort(self.free, row, key=lambda r: 0 if self.gpu else r // ROWS)  # the oldest is used first
        return request.finish

    def choose(self, B: int) -> torch.Tensor:
        "-> token [B]. Rows with the same options are sampled together; what free rows get is ignored."
        groups, noise = {}, [0.0] * B
        for row, r in self.running.items():
            groups.setdefault((r.temperature, r.top_k, r.top_p, r.repetition_penalty), []).append(row)
            noise[row] = r.noise[len(r.answer)]
        inputs = self.logits[:B, :self.vocab_used], self.upload(noise), self.present[:B, :self.vocab_used]
        if len(groups) == 1:
            token = sample(*inputs, *next(iter(groups)))
        else:
            token = torch.zeros(B, dtype=torch.long, device=self.device)
            for options, rows in groups.items():
                rows = self.upload(rows)
                token[rows] = sample(*(t[rows] for t in inputs), *options)
        if any(penalty != 1.0 for *_, penalty in groups):
            self.present[:B].scatter_(1, token[:, None], True)
        return token

    def pick_row(self, request: Request) -> tuple[int, int]:
        "-> (a free row, how many of its columns already hold this request's first tokens)."
        row, start, keys = self.free[0], 0, request.keys
        for other, kept in self.kept.items():
            n = bisect.bisect_left(range(min(len(kept), len(keys))), True, key=lambda i: kept[:i + 1] != keys[:i + 1])
            if n > start and 2 * n >= len(kept):  # else it is another conversation that only begins alike
                row, start = other, n
        self.free.remove(row)
        self.kept.pop(row, None)
        return row, min(start, len(request) - 1)  # the last token is computed in any case: its logits are needed

    def admit(self) -> None:
        "Requests that wait -> free rows."
        batches, leaders, twins = {}, {}, []
        while self.waiting and self.free:
            request = self.waiting.popleft()
            if request.finish:  # cancelled
                continue
            row, start = self.pick_row(request)
            self.running[row], request.reused = request, start
            if request.repetition_penalty != 1.0:
                self.present[row] = False
                self.present[row, self.upload(list(request.prompt.ids))] = True
            leader = leaders.setdefault(tuple(request.keys), row)
            if leader != row:  # another answer to the same prompt: it is computed once
                twins.append((leader, row))
            else:  # On a CPU prompts go together by their own length, so that nothing depends on the others' length.
                T = 0 if self.gpu else whole(len(request) - start, COLUMNS)
                batches.setdefault((T, start > 0), []).append((row, start, request))
        for batch in batches.values():
            self.prefill(*zip(*batch))
        if twins:
            (a, b), T = self.upload(twins).t(), max(map(len, self.running.values()))
            self.kv[:, :, b, :, :T], self.logits[b] = self.kv[:, :, a, :, :T], self.logits[a]

    def prefill(self, rows, starts, requests) -> None:
        "The prompts of some requests, each from its column `start` on, in one pass."
        texts = [r.prompt.ids[start:] for start, r in zip(starts, requests)]
        T = whole(max(map(len, texts)), 64 if self.gpu else COLUMNS)  # on a GPU few shapes, see run_graph
        places = [(b * T + slot - start, image) for b, (start, r) in enumerate(zip(starts, requests))
                  for slot, image in zip(r.prompt.slots, r.images) if slot >= start]
        shown = self.pictures([image for _, image in places])
        inputs = [list(text) + [0] * (T - len(text)) for text in texts], rows, starts, list(map(len, texts)), [
            at + i for (at, _), tokens in zip(places, shown) for i in range(len(tokens))]
        inputs = [*map(self.upload, inputs), *([torch.cat(shown)] if shown else [])]
        # On a GPU whole prompts take the fastest kernels, which know no mask. On a CPU equal bits come first.
        S = self.columns(max(starts) + T) if any(starts) or not self.gpu else 0
        compute, short = partial(self.vlm.prefill, self.kv, S), len(texts) * T <= 2048
        # A long prompt keeps a GPU busy without a graph, and its shape seldom comes again.
        self.logits[inputs[1]] = run_graph(self.graphs, ("prefill", S), compute, *inputs) if short else compute(*inputs)

    def run_encoder(self, function, pixels) -> torch.Tensor:
        few = len(pixels) * self.vlm.config.vision.num_patches <= 2048
        return run_graph(self.graphs, ("encode", ), function, pixels).clone() if few else function(pixels)

    def columns(self, n: int) -> int:
        "n rounded up; on a GPU so that few graphs are recorded."
        return min(power_of_two(n) if self.gpu else whole(n, COLUMNS), self.width)

    def upload(self, values: list) -> torch.Tensor:
        "-> a tensor on the device; on a GPU without waiting."
        values = torch.tensor(values, dtype=None if values else torch.long, pin_memory=self.gpu)
        return values.to(self.device, non_blocking=True)

    def close(self) -> None:
        if self.key:
            self.vlm.idle_caches[self.key] = self.kv, self.graphs


def respond(vlm: VLM, tokenizer, conversations: list, images: list, seeds: list[int] | None = None,
            **options) -> list[str]:
    "Chat messages and each one's list of pictures (uint8 [3, S, S] or Tiles) -> the assistant's next words."
    requests = [Request(tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, group)), True), group,
                        stop=set(tokenizer.stop_ids), seed=seed, **options)
                for messages, group, seed in zip(conversations, images, seeds or itertools.count())]
    with contextlib.closing(Engine(vlm, requests, vocab_used=tokenizer.vocab_size)) as engine:
        list(engine.run())
    return [tokenizer.decode(token for token in r.answer if token not in r.stop).strip() for r in requests]


# ----------------------------------------------------------------------------------------------------------------------
# Generation, faster on a GPU (skip at first reading: nothing here changes a result)
# A decoding step is a thousand short kernels. To keep the GPU busy, the step is recorded as one CUDA graph, the next
# one is launched before the CPU waits for this one's tokens, and the blocks are compiled for decoding.

def power_of_two(n: int) -> int:
    return max(256, 1 << (n - 1).bit_length())


def take_cache(vlm: VLM, rows: int, width: int) -> tuple[torch.Tensor, dict, tuple | None]:
    "-> (keys and values of `rows` rows or more, CUDA graphs that use them, where Engine.close leaves both)."
    weight, c = vlm.gpt.embed.weight, vlm.config.decoder
    # Widths are rounded up to powers of two: few different graphs. TRAP: a graph remembers the weights' addresses.
    key = (rows, power_of_two(width), weight.data_ptr(), weight.dtype) if weight.is_cuda else None
    if key in vlm.idle_caches:
        return *vlm.idle_caches.pop(key), key
    rows, width = key[:2] if key else (whole(rows, ROWS), whole(width, COLUMNS))
    # Qwen2.5-1.5B in bfloat16: 2 x 28 layers x 2 heads x 128 channels x 2 bytes = 28 KiB for each token of a row.
    # zeros, not empty: a stray NaN would survive a multiplication with weight zero.
    return weight.new_zeros(c.num_hidden_layers, 2, rows, c.num_key_value_heads, width, c.head_dim), {}, key


def run_graph(graphs: dict, name: tuple, function, *inputs) -> torch.Tensor:
    "function(*inputs); on a GPU as a CUDA graph: recorded once per name and input shapes, then launched as one."
    if not inputs[0].is_cuda:
        return function(*inputs)
    key = (*name, *(tuple(t.shape) for t in inputs))
    if key not in graphs:  # The first call runs as it is: what must be compiled is compiled now.
        graphs[key] = None
        return function(*inputs)
    if graphs[key] is None:  # The second call is recorded. A prompt shape that occurs only once never is.
        static, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may fetch data meanwhile
            result = function(*static)
        graphs[key] = graph, static, result
    # TRAP: a graph always uses the same memory: inputs must be copied there, and the next call overwrites the result.
    graph, static, result = graphs[key]
    for mine, given in zip(static, inputs):
        mine.copy_(given)
    graph.replay()
    return result


def one_row_block(block: Block, x, rope, documents, cache: LayerCache) -> torch.Tensor:
    "Block.forward for one new token of a single row, written so that the compiler makes fast kernels from it."
    q, k, v = block.attention.project(block.norm1(x), rope)
    store(k, v, cache)
    q = q.view(1, k.shape[2], -1, q.shape[-1])                                                   # [1, kv, group, d]
    keys, values = cache.kv[:, :, :, :cache.mask.shape[-1]]                                      # [1, kv, S, d] each
    # SDPA's kernels go through the keys of a row one after the other, which leaves most of a GPU idle. The compiler
    # spreads these sums over all of it, and never stores the tensors of 5 axes.
    scores = (q.float()[:, :, :, None] * keys[:, :, None]).sum(-1) * q.shape[-1] ** -0.5  # [1, kv, group, S]
    shares = (scores + cache.mask).softmax(-1)
    y = (shares[..., None] * values[:, :, None]).sum(-2).to(q.dtype)                        # [1, kv, group, d]
    x = x + block.attention.out(y.reshape(1, 1, -1))
    gate, up = block.mlp.gate_up(block.norm2(x)).chunk(2, dim=-1)
    y = F.silu(gate) * up
    # The product with one row is compiled as H sums, and each of them would compute all of y again. as_strided forces
    # y into memory once: 47 instead of 50 microseconds a layer.
    return x + block.mlp.down(y.as_strided(y.shape, y.stride()))


def compile_decoding() -> dict:
    "-> {one row?: the compiled function that replaces Block.forward when decoding}."
    torch._dynamo.config.recompile_limit = 64  # beyond it everything would silently run uncompiled
    # pdl: the kernels are so short that the next one is launched before one ends. Coordinate descent: the sums of a
    # single row are tuned, which makes them faster than matrix products.
    return {one: torch.compile(one_row_block if one else Block.forward, dynamic=False, options={
        "triton.enable_pdl": True, "coordinate_descent_tuning": one}) for one in (False, True)}


# ----------------------------------------------------------------------------------------------------------------------
# Loading: checkpoints (written by training.save_checkpoint) and released weights

STAGES = ["base", "align", "sft", "rl"]  # each starts from the one before
LLAVA = ("llava_onevision", "llava")  # Hugging Face's model types: with and without a newline token and tiles


def checkpoints(out_dir, model: str) -> list[tuple[Path, dict]]:
    "All under OUT_DIR/MODEL -> [(folder, the run that made it)], last written first. STAGE.1: the run before STAGE."
    found = []
    for path in Path(out_dir, run_name(model)).glob("*/config.json"):
        # .old counts too: after an interrupted save it is the only one, and load_checkpoint puts it back in place
        if name := re.fullmatch(r"((\w+)(\.\d+)?)(\.old)?", path.parent.name):
            # A copied folder has new file times, so the run's own clock counts; older checkpoints do not have it.
            run = {"saved": path.stat().st_mtime, **weights.read_json(path).get("run", {}), "stage": name[2]}
            found += [(path.parent.with_name(name[1]), run)] if name[2] in STAGES else []
    return sorted(found, key=lambda one: -one[1]["saved"])


def newest_checkpoint(out_dir, model: str) -> Path | None:
    return next((folder for folder, _ in checkpoints(out_dir, model)), None)


def load_checkpoint(folder, device="cpu", dtype=torch.float32) -> VLM:
    """
    The folder's model: one of our checkpoints, or Hugging Face's folder of a LLaVA-OneVision or of a LLaVA with SigLIP
    and Qwen2. ValueError if anything is missing, cut short or of another shape.
    """
    folder = weights.recover(folder)
    hf = weights.read_json(path := folder / "config.json")
    if hf.get("model_type") in LLAVA:
        tensors, names, source = weights.read_llava(folder), weights.LLAVA_NAMES, folder
        vision, bridge = llava_vision(hf, folder)
        decoder = gpt_config(hf["text_config"], folder)
        decoder.tie_word_embeddings = "language_model.lm_head.weight" not in tensors
        config = connect(VLMConfig(vision, bridge, decoder, pretrained_vision=hf["model_type"], preset="",
                                   generation=generation_config(folder), run={"chapters": STAGES[:3]}))
    elif hf.pop("model_type", "") == "ghostvis":
        try:
            config = VLMConfig(**hf | {"vision": ViTConfig(**hf["vision"]), "bridge": BridgeConfig(**hf["bridge"]),
                                       "decoder": GPTConfig(**hf["decoder"])})
            for part in (config.vision, config.bridge, config.decoder, GPTConfig(vocab_size=config.lora_rank + 1)):
                check_sizes(part, folder)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: does not fit this version of the code ({error})") from None
        source, names = folder / "model.safetensors", None
        tensors = weights.read_safetensors(source)
    else:
        raise ValueError(f"{path}: neither a checkpoint of this project nor a LLaVA; a bare Qwen2 folder is given by "
                         "--model=")
    with torch.device("meta"):
        vlm = VLM(config)
    # Ours have the same names in the file: checked all the same, none missing and none left over.
    names = names or {name: [name] for name, _ in vlm.named_parameters()}
    weights.load_tensors(vlm, tensors, names, "", str(source), device, dtype)
    return vlm


def generation_config(folder) -> dict:
    "How the publisher samples: options of `generate`."
    hf = weights.read_json(path) if (path := Path(folder) / "generation_config.json").exists() else {}
    # TRAP: without do_sample the other entries are leftovers, for the checkpoint is greedy; the penalty still counts.
    keys = ("temperature", "top_k", "top_p", "repetition_penalty") if hf.get("do_sample") else ("repetition_penalty", )
    return {key: hf[key] for key in keys if hf.get(key) is not None}


def load_pretrained(name: str, vision: str = "", bridge: str = "", device="cpu", dtype=torch.float32,
                    text_only: bool = False) -> tuple[VLM, Path]:
    """
    Released weights -> (model, the folder with its tokenizer). name: a preset, a hub id or a folder with a Qwen2 or a
    LLaVA. A Qwen gets a released vision encoder and a new bridge, which chapter 2 trains; text_only: it gets neither.
    """
    folder = Path(name) if Path(name).is_dir() else weights.fetch(name)
    if weights.read_json(folder / "config.json").get("model_type") in LLAVA:
        vlm = load_checkpoint(folder, device, dtype)
    else:
        gpt = GPT.from_pretrained(folder, device, dtype)
        vision = vision or weights.DEFAULT_VISION
        vit = None if text_only else ViT.from_pretrained(
            Path(vision) if Path(vision).is_dir() else weights.fetch(vision), device, dtype)
        config = VLMConfig(vit and vit.config, BridgeConfig(kind=bridge or "perceiver"), gpt.config,
                           pretrained_vision=vision, generation=generation_config(folder), run={"chapters": ["base"]})
        with torch.device("meta"):
            vlm = VLM(config if text_only else connect(config))
        vlm.vit, vlm.gpt, vlm.bridge = vit, gpt, None if text_only else Bridge(config.bridge).to(device, dtype)
    vlm.config.preset = run_name(name)
    return vlm, folder
