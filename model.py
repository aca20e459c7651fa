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
import copy
import inspect
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

import weights
from vision import (SIGLIP, Bridge, BridgeConfig, Tiles, ViT, ViTConfig, check_sizes, encode_tiled, init_linears,
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
        "x [B, T, H] -> [B, T, H]. documents: see attend. cache: see KVCache; training needs none."
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

    def hidden(self, x: torch.Tensor, positions=None, documents=None, cache: "KVCache | None" = None) -> torch.Tensor:
        """
        Embeddings x [B, T, H] -> hidden states [B, T, H] after the last norm. positions [B, T] count from 0 in each
        document; documents: see attend; without both, each row is one document. cache: for generation, see KVCache.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]                              # [1, T]
        rope = rope_table(positions, self.config)
        layers = cache.layers() if cache is not None else None
        for i, block in enumerate(self.blocks):
            if cache is not None:
                # Prefill runs uncompiled: every new prompt length would be compiled again.
                run = self.compiled_decode.get(len(x) == 1, Block.forward) if cache.decoding else Block.forward
                x = run(block, x, rope, None, layers[i])
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
        self.idle_caches = {}  # see take_cache
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
    # Generation: prefill computes all prompts in one forward pass, then decode adds one token per row and step

    def batch_prompts(self, prompts: list, images: list) -> tuple[int, list]:
        "-> (the longest prompt's tokens, inputs of prefill: ids [B, T], lengths [B], image positions [K], pictures)."
        # Padded on the right: no token attends to later ones, so padding changes nothing and needs no mask. On a GPU
        # the width is rounded up, so that few different shapes occur.
        device = self.gpt.embed.weight.device
        limit, longest = self.config.decoder.max_position_embeddings, max(len(p.ids) for p in prompts)
        if longest > limit:  # it would answer, but worse and worse
            raise ValueError(f"a conversation of {longest:,} tokens; this model was trained on up to {limit:,}: "
                             "shorten it, or show fewer or smaller pictures")
        T = -(-longest // 64) * 64 if device.type == "cuda" else longest
        ids = torch.tensor([list(p.ids) + [0] * (T - len(p.ids)) for p in prompts], device=device)   # [B, T]
        lengths = torch.tensor([len(p.ids) for p in prompts], device=device)                         # [B]
        starts = [b * T + slot for b, p in enumerate(prompts) for slot in p.slots]
        if len(starts) != len(images):
            raise ValueError(f"{len(starts)} places for images in the prompts, but {len(images)} images")
        positions = [start + i for start, image in zip(starts, images)
                     for i in range(self.config.bridge.tokens_of(image))]
        inputs = [ids, lengths, torch.tensor(positions, device=device, dtype=torch.long)]
        if images:  # tiled pictures differ in size and are encoded first; others go through prefill as pixels
            inputs.append(encode_tiled(self.vit_features, self.bridge, images, device)
                          if any(isinstance(image, Tiles) for image in images)
                          else torch.stack(images).to(device))
        return longest, inputs

    def prefill(self, cache: "KVCache", ids, lengths, image_positions, images=None) -> torch.Tensor:
        """
        All prompts in one pass: ids [B, T], of which lengths [B] count; images: pixels uint8 [n, 3, S, S] or image
        tokens [K, H] -> the logits of each row's next token [B, V].
        """
        if images is not None and images.dtype == torch.uint8:
            images = self.encode_images(images).flatten(0, 1)
        cache.start(ids.shape[1])
        h = self.gpt.hidden(self.embed(ids, images, image_positions), cache=cache)                   # [B, T, H]
        cache.next.copy_(lengths)
        return self.gpt.logits(h[torch.arange(len(ids), device=ids.device), lengths - 1])

    def decode(self, cache: "KVCache", token) -> torch.Tensor:
        "token [B] -> the logits of what follows it [B, V]."
        cache.start()
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
        still yielded). samples = n: every prompt is prefilled once and answered n times, in rows i*n to i*n+n-1.
        """
        longest, inputs = self.batch_prompts(prompts, images)
        cache, logits = self.prefill_cache(inputs, longest + max_new_tokens, samples)
        B, V = len(logits), vocab_used or logits.shape[1]  # the embedding's padding rows are not tokens
        # From each row's own seed: its answer does not depend on its neighbours. Drawn on the CPU, so that every device
        # gets the same numbers, and all at once: step i uses column i.
        noise = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
                             for seed in seeds or range(B)]).to(logits.device)             # [B, max_new_tokens]
        present = torch.zeros(B, logits.shape[1], dtype=torch.bool, device=logits.device)   # tokens in each row so far
        if repetition_penalty != 1.0:
            for row, prompt in zip(present, (p for p in prompts for _ in range(samples))):
                row[torch.tensor(prompt.ids, device=row.device)] = True
        ended = [False] * B
        try:
            for i in range(max_new_tokens):
                token = sample(logits[:, :V], noise[:, i], present[:, :V], temperature, top_k, top_p,
                               repetition_penalty)                                                   # [B]
                if repetition_penalty != 1.0:
                    present.scatter_(1, token[:, None], True)
                step = NextStep(self, cache, token, last=i == max_new_tokens - 1)
                row = step.token_ids()
                yield [None if end else id_ for end, id_ in zip(ended, row)]
                # Rows that have ended are still computed, and ignored, until all have ended.
                ended = [end or id_ in stop for end, id_ in zip(ended, row)]
                if all(ended) or step.last:
                    return
                logits = step.logits()
        finally:
            self.return_cache(cache)

    def prefill_cache(self, inputs: list, width: int, samples: int) -> tuple["KVCache", torch.Tensor]:
        "-> (the prompts' keys and values, with room for `width` tokens a row; the logits of each row's next token)."
        B, T = inputs[0].shape
        cache = self.take_cache(B, max(T, width))
        # A long prompt keeps a GPU busy without a graph, and its shape seldom comes again.
        logits = run_graph(self.prefill, cache, *inputs) if B * T <= 2048 else self.prefill(cache, *inputs)
        if samples == 1:
            return cache, logits
        # Repeated only now: the expensive part, pictures and prompts, was computed once for all samples.
        repeated = self.take_cache(B * samples, max(T, width))
        repeated.copy_rows(cache, T, samples)
        self.return_cache(cache)
        return repeated, logits.repeat_interleave(samples, dim=0)

    def take_cache(self, batch: int, width: int) -> "KVCache":
        "A cache for `batch` rows of `width` tokens or more. On a GPU an earlier one is reused, with its CUDA graphs."
        weight = self.gpt.embed.weight
        if not weight.is_cuda:
            return KVCache(self.config.decoder, batch, width, weight.device, weight.dtype)
        # Widths are rounded up to powers of two: few different graphs. TRAP: a graph remembers the weights' addresses.
        key = (batch, max(256, 1 << (width - 1).bit_length()), weight.data_ptr(), weight.dtype)
        cache = self.idle_caches.pop(key, None) or KVCache(self.config.decoder, *key[:2], weight.device, weight.dtype)
        cache.key = key
        return cache

    def return_cache(self, cache: "KVCache") -> None:
        if cache.key:
            self.idle_caches[cache.key] = cache


class LayerCache(NamedTuple):
    "One layer's part of a KVCache."
    kv: torch.Tensor              # [2, B, kv heads, S, d]: keys and values of S columns
    columns: torch.Tensor | None  # [B]: the column of each row's new token; None: prefill, which fills the first T
    mask: torch.Tensor | None     # [B, 1, 1, S]: added to the scores when decoding


class KVCache:
    "Keys and values of all tokens so far. Allocated once for the longest answer; all rows begin in column 0."

    def __init__(self, config: GPTConfig, batch: int, width: int, device, dtype):
        # Qwen2.5-1.5B in bfloat16: 2 x 28 layers x 2 heads x 128 channels x 2 bytes = 28 KiB for each token of a row.
        # zeros, not empty: a stray NaN would survive a multiplication with weight zero.
        self.kv = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads, width, config.head_dim,
                              device=device, dtype=dtype)
        self.next = torch.zeros(batch, device=device, dtype=torch.long)  # [B]: the column of each row's next token
        self.used = width      # attention covers this many columns; on a GPU always all, so that shapes stay the same
        self.decoding = False
        self.graphs, self.key = {}, None  # see run_graph and VLM.take_cache

    def start(self, T: int = 0) -> None:
        "Before a prefill of T columns, or (0) before decoding one more."
        self.decoding = not T
        self.used = self.used if self.kv.is_cuda else T or self.used + 1

    def layers(self) -> list[LayerCache]:
        if not self.decoding:
            return [LayerCache(kv, None, None) for kv in self.kv]
        return [LayerCache(kv[:, :, :, :self.used], self.next, mask) for mask in [self.mask()] for kv in self.kv]

    def mask(self) -> torch.Tensor:
        "-> [B, 1, 1, S], added to the scores of each row's new token: -inf for columns that are still empty."
        empty = torch.arange(self.used, device=self.next.device) > self.next[:, None]                # [B, S]
        return torch.zeros_like(empty, dtype=self.kv.dtype).masked_fill_(empty, -torch.inf)[:, None, None]

    def copy_rows(self, other: "KVCache", T: int, n: int) -> None:
        "Row i of a prefilled cache becomes rows i*n to i*n+n-1 of this one. T: tokens of the longest prompt."
        self.kv[:, :, :, :, :T] = other.kv[:, :, :, :, :T].repeat_interleave(n, dim=2)
        self.next.copy_(other.next.repeat_interleave(n))
        self.start(T)


def attend_with_cache(q, k, v, cache: LayerCache) -> torch.Tensor:
    "As attend, with this layer's cache: k and v are stored, and a new token attends to all columns so far."
    B, T = q.shape[:2]
    if cache.columns is None:  # prefill; keys are stored rotated: their positions never change
        cache.kv[:, :, :, :T] = torch.stack([k, v]).transpose(2, 3)                                  # [2, B, kv, T, d]
        return attend(q, k, v)
    store_token(k, v, cache)
    # The query heads that share a kv head take the place of tokens: they use the same keys, in one product.
    q = q.view(B, k.shape[2], -1, q.shape[-1])                                                       # [B, kv, group, d]
    y = F.scaled_dot_product_attention(q, cache.kv[0], cache.kv[1], attn_mask=cache.mask)
    return y.reshape(B, 1, -1, q.shape[-1])                                                          # [B, 1, heads, d]


def store_token(k, v, cache: LayerCache) -> None:
    "k and v [B, 1, kv heads, d] -> column cache.columns[b] of every row b."
    rows = torch.arange(len(k), device=k.device)
    cache.kv[:, rows, :, cache.columns] = torch.stack([k, v])[:, :, 0].transpose(0, 1)               # [B, 2, kv, d]


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


def respond(vlm: VLM, tokenizer, conversations: list, images: list, **options) -> list[str]:
    """
    Chat messages and each one's list of pictures (uint8 [3, S, S] or Tiles) -> the assistant's next words. `options`
    are those of generate; with samples = n there are n answers in a row for each conversation.
    """
    prompts = [tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, group)), add_generation_prompt=True)
               for messages, group in zip(conversations, images)]
    rows = [[] for _ in range(len(prompts) * options.get("samples", 1))]
    for column in vlm.generate(prompts, [image for group in images for image in group], stop=set(tokenizer.stop_ids),
                               vocab_used=tokenizer.vocab_size, **options):
        for row, token in zip(rows, column):
            if token is not None and token not in tokenizer.stop_ids:
                row.append(token)
    return [tokenizer.decode(row).strip() for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Generation, faster on a GPU (skip at first reading: nothing here changes a result)
# A decoding step is a thousand short kernels. To keep the GPU busy, the step is recorded as one CUDA graph, the next
# one is launched before the CPU waits for this one's tokens, and the blocks are compiled for decoding.

def run_graph(function, cache: KVCache, *inputs) -> torch.Tensor:
    "function(cache, *inputs); on a GPU as a CUDA graph: recorded once per input shape, then launched as one."
    if not cache.kv.is_cuda:
        return function(cache, *inputs)
    key = (function.__name__, *(tuple(t.shape) for t in inputs))
    if key not in cache.graphs:  # The first call runs as it is: what must be compiled is compiled now.
        cache.graphs[key] = None
        return function(cache, *inputs)
    if cache.graphs[key] is None:  # The second call is recorded. A prompt shape that occurs only once never is.
        static, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may fetch data meanwhile
            result = function(cache, *static)
        cache.graphs[key] = graph, static, result
    # TRAP: a graph always uses the same memory: inputs must be copied there, and the next call overwrites the result.
    graph, static, result = cache.graphs[key]
    for mine, given in zip(static, inputs):
        mine.copy_(given)
    graph.replay()
    return result


class NextStep:
    "The decoding step after `token` [B]: computed when logits() is called on a CPU, launched at once on a GPU."

    def __init__(self, vlm: VLM, cache: KVCache, token: torch.Tensor, last: bool):
        self.compute, self.last = lambda: run_graph(vlm.decode, cache, token), last
        self.launched, self.copied = None, None
        self.ids = token.to("cpu", non_blocking=True)
        if token.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()  # marks the end of the copy; the next step runs after it
            self.launched = None if last else self.compute()

    def token_ids(self) -> list[int]:
        if self.copied:
            self.copied.synchronize()
        return self.ids.tolist()

    def logits(self) -> torch.Tensor:
        return self.compute() if self.launched is None else self.launched


def one_row_block(block: Block, x, rope, documents, cache: LayerCache) -> torch.Tensor:
    "Block.forward for one new token of a single row, written so that the compiler makes fast kernels from it."
    q, k, v = block.attention.project(block.norm1(x), rope)
    store_token(k, v, cache)
    q = q.view(1, k.shape[2], -1, q.shape[-1])                                                   # [1, kv, group, d]
    # SDPA's kernels go through the keys of a row one after the other, which leaves most of a GPU idle. The compiler
    # spreads these sums over all of it, and never stores the tensors of 5 axes.
    scores = (q.float()[:, :, :, None] * cache.kv[0][:, :, None]).sum(-1) * q.shape[-1] ** -0.5  # [1, kv, group, S]
    shares = (scores + cache.mask).softmax(-1)
    y = (shares[..., None] * cache.kv[1][:, :, None]).sum(-2).to(q.dtype)                        # [1, kv, group, d]
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
