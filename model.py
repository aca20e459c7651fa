"""
The model: a Qwen decoder, a vision-language model (VLM) around it, the loss, generation, and loading.

    ids [B, T] -> embeddings [B, T, H], image tokens written over the <|image_pad|> positions
      L x ( RMSNorm -> attention (RoPE, grouped queries) -> +  RMSNorm -> SwiGLU -> + )
      RMSNorm -> head -> logits [B, T, V]

The layers compute exactly what Hugging Face's Qwen2 and Qwen3 compute (arXiv 2412.15115, 2505.09388): same weights,
same logits. Skip at first reading: from_pretrained, gpt_config, Loading, and what is marked so: all for time or memory.
Axis letters: B rows, T tokens in a row, H the decoder's width, d a head's width, V vocabulary, n pictures, M image
tokens of each. Left out: sliding windows (none of these models uses them), mixtures of experts, dropout, YaRN.
"""
import contextlib
import copy
import inspect
import itertools
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from plumbing.checkpoints import STAGES, run_name
from plumbing.engine import ROWS, Engine, Request, compile_decoding, whole
from plumbing.files import read_json, recover, require
from plumbing.hub import fetch
from plumbing.linear import Linear, LoRALinear
from plumbing.published import generation_config, qwen_fields
from plumbing.settings import check_shapes, check_sizes, set_fields
from plumbing.weights import LLAVA_NAMES, QWEN_NAMES, load_tensors, read_llava, read_safetensors
from vision import DEFAULT_VISION, SIGLIP, Bridge, BridgeConfig, Tiles, ViT, ViTConfig, init_linears, llava_vision

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass
class GPTConfig:
    "Field names are those of Hugging Face's Qwen2Config and Qwen3Config; the values here are Qwen2.5-1.5B's."
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
    head_dim: int = 0                 # d; 0: H / heads. Qwen3's is always 128: its queries may be wider than x
    attention_bias: bool = True       # of q, k and v: Qwen2 has one
    use_qk_norm: bool = False         # RMSNorm of each head's query and key: Qwen3 has that instead

    def __post_init__(self):
        with contextlib.suppress(TypeError, ZeroDivisionError):  # of a stranger's file; check_sizes names the field
            self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class VLMConfig:
    vision: ViTConfig = field(default_factory=ViTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    decoder: GPTConfig = field(default_factory=GPTConfig)
    pretrained_vision: str = ""       # the released encoder's name; then the ViT stays frozen in every stage
    preset: str = "tiny"              # also the folder of its checkpoints under --out_dir
    generation: dict = field(default_factory=dict)  # the publisher's temperature, top_k, ...; ours: empty, greedy
    lora_rank: int = 0                # above 0: the decoder is frozen, and thin matrices beside its own are trained
    run: dict = field(default_factory=dict)  # what trained it: chapters so far, stage, step, data, time (save)


PRESETS = {
    # 1.2 million parameters: ViT 0.19, bridge 0.30, decoder 0.72. 72 / 12 = 6 patches a side: N = 36, and M = N / 4:
    # each latent starts from 2 x 2 patches. One layer is enough to see drawings: with two or three, a run of the same
    # length learns less of what is asked (docs/tried.md).
    "tiny": VLMConfig(
        ViTConfig(128, 256, num_hidden_layers=1, num_attention_heads=4, image_size=72, patch_size=12),
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
# Qwen2.5 and Qwen3 as released. The fields not named here are the same in all: RoPE's base, epsilon.
QWEN = {
    "qwen2.5-0.5b": GPTConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen2.5-1.5b": GPTConfig(max_position_embeddings=131072),
    "qwen2.5-3b": GPTConfig(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "qwen2.5-7b": GPTConfig(152064, 3584, 18944, num_attention_heads=28, num_key_value_heads=4,
                            tie_word_embeddings=False, max_position_embeddings=131072),
}
for _name, _decoder in list(QWEN.items()):  # the instruct models have the same shapes
    QWEN[_name + "-instruct"] = replace(_decoder, max_position_embeddings=32768)
for _name, _H, _I, _layers, _heads in (("0.6b", 1024, 3072, 28, 16), ("1.7b", 2048, 6144, 28, 16),
                                       ("4b", 2560, 9728, 36, 32), ("8b", 4096, 12288, 36, 32)):
    QWEN[f"qwen3-{_name}"] = GPTConfig(
        151936, _H, _I, _layers, _heads, num_key_value_heads=8, tie_word_embeddings=_name != "8b",
        max_position_embeddings=40960, head_dim=128, attention_bias=False, use_qk_norm=True)
    QWEN[f"qwen3-{_name}-base"] = replace(QWEN[f"qwen3-{_name}"], max_position_embeddings=32768)
PRESETS |= {_name: VLMConfig(SIGLIP[DEFAULT_VISION], BridgeConfig(), _decoder,
                             pretrained_vision=DEFAULT_VISION) for _name, _decoder in QWEN.items()}
# A finished public model: SigLIP so400m without its last layer, an MLP, Qwen2-0.5B with a few more rows of padding.
PRESETS["llava-ov-0.5b"] = VLMConfig(
    replace(SIGLIP["siglip-so400m-patch14-384"], num_hidden_layers=26, pad=True, tiles=36),
    BridgeConfig(kind="mlp", newline=True), replace(QWEN["qwen2.5-0.5b"], vocab_size=152000),
    pretrained_vision="llava-ov-0.5b")


def connect(config: VLMConfig) -> VLMConfig:
    "Set the bridge's sizes from the two parts that it connects."
    config.bridge.vision_size, config.bridge.text_size = config.vision.hidden_size, config.decoder.hidden_size
    config.bridge.num_patches = config.vision.num_patches
    return config


def preset(name: str, bridge: str = "", changes: str = "", vision: str = "") -> VLMConfig:
    "A fresh configuration, with the flags --bridge and --set; vision: --vision, an encoder that --set cannot change."
    config = copy.deepcopy(PRESETS[name])
    config.preset, config.bridge.kind = name, bridge or config.bridge.kind
    parts = ("bridge", "decoder") if vision else ("vision", "bridge", "decoder")
    d = config.decoder
    if d.head_dim * d.num_attention_heads == d.hidden_size:
        d.head_dim = 0  # H / heads, also of the new H and heads
    set_fields(config, changes, parts, f"the encoder is --vision={vision}, as it was released")
    d.__post_init__()
    connect(config)
    check_shapes(config, f"--set={changes}" if changes else f"PRESETS[{name!r}] in model.py")
    return config


def check_name(model: str) -> None:
    "--model must be a preset, a hub id or a path."
    if model not in PRESETS and "/" not in model:
        raise ValueError(f"--model={model}: unknown; choose from {', '.join(PRESETS)}, or give a hub id, Org/Name")


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
        self.qkv = Linear(H, sum(self.sizes), bias=config.attention_bias)  # nowhere else has Qwen2 a bias, Qwen3 none
        self.out = Linear(self.sizes[0], H, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(d, config.rms_norm_eps) if config.use_qk_norm else None for _ in range(2))

    def project(self, x, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "x [B, T, H] -> q [B, T, heads, d], k and v [B, T, kv heads, d]."
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.config.head_dim) for part in self.qkv(x).split(self.sizes, dim=-1))
        if self.q_norm is not None:
            # However large the weights grow, a score stays below sqrt(d) times the two gains: no head's softmax can
            # collapse onto one token (arXiv 2302.05442). Over d channels, before the rotation, which keeps lengths.
            q, k = self.q_norm(q), self.k_norm(k)
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
        y = F.silu(gate) * up
        if y.shape[:2] == (1, 1):
            # The product with one row is compiled as H sums, and each of them would compute all of y again. as_strided
            # forces y into memory once: 47 instead of 50 microseconds a layer.
            y = y.as_strided(y.shape, y.stride())
        return self.down(y)                                                                          # [B, T, H]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, documents=None, cache=None, only=None) -> torch.Tensor:
        "x [B, T, H] -> [B, T, H]; or [n, H], at the positions `only` [n] of x.flatten(0, 1)."
        # Norms are on the branches, not on x itself: the gradient has a direct path from the loss to layer 0.
        x = x + self.attention(self.norm1(x), rope, documents, cache)  # mixes information between tokens
        x = x if only is None else x.flatten(0, 1).index_select(0, only)
        return x + self.mlp(self.norm2(x))                             # works on each token alone


def add_lora(block: Block, rank: int) -> None:
    "Beside the block's four matrices thin ones, which are trained in their place (see LoRALinear)."
    for part, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "gate_up"), (block.mlp, "down")):
        setattr(part, name, LoRALinear(getattr(part, name), rank))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        # As large as what the blocks add to it.
        nn.init.normal_(self.embed.weight, std=3 * config.hidden_size ** -0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # With the tied head, the first logits have a standard deviation of 3 x 2.5, and the first loss is 37 instead of
        # ln V = 7: wrong answers are punished hard at once. The quick start learns more by it, 83 % at 1 and 91 at 2.5.
        nn.init.constant_(self.norm.weight, 2.5)
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

    def hidden(self, x: torch.Tensor, positions=None, documents=None, cache: "list[LayerCache]" = (),
               only=None) -> torch.Tensor:
        """
        Embeddings x [B, T, H] -> hidden states [B, T, H] after the last norm. positions [B, T] count from 0 in each
        document; documents: see attend; without both, each row is one document. cache: for generation, see LayerCache.
        only [n]: of x.flatten(0, 1) these positions alone are wanted -> [n, H].
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
                # What the last block's MLP makes of other positions, nobody would read: on a CPU a tenth of the step.
                # TRAP: on a GPU n is no fixed shape, and the block would be compiled again for every n.
                last = block is self.blocks[-1] and not x.is_cuda
                x = block(x, rope, documents, None, only if last else None)
        if only is not None and x.ndim == 3:
            x = x.flatten(0, 1).index_select(0, only)                                                # [n, H]
        return self.norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:  # h [..., H] -> [..., V]
        return F.linear(h, self.head_weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        "ids [B, T] -> logits [B, T, V]. Training uses hidden() and token_loss: it never needs all logits at once."
        return self.logits(self.hidden(self.embed(ids)))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "GPT":
        "From a Qwen2, Qwen2.5 or Qwen3 folder as the hub ships it: config.json and one or more safetensors files."
        folder = Path(folder)
        with torch.device("meta"):  # shapes without memory: no random weights are drawn only to be replaced
            gpt = cls(gpt_config(read_json(folder / "config.json"), folder))
        tensors = read_safetensors(folder)
        if gpt.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some tools write the tied head a second time
        load_tensors(gpt, tensors, QWEN_NAMES, "", str(folder), device, dtype)
        return gpt


def gpt_config(hf: dict, folder: Path) -> GPTConfig:
    "A Qwen2's or Qwen3's config.json; one that asks for what this decoder does not do is refused."
    hf = qwen_fields(hf, folder)
    config = GPTConfig(**{f.name: hf[f.name] for f in fields(GPTConfig) if hf.get(f.name) is not None})
    check_sizes(config, folder / "config.json")
    H, heads, kv_heads, d = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    require(heads % kv_heads == d % 2 == 0 and (hf["head_dim"] or H == heads * d),
            f"{folder}/config.json: hidden_size {H}, {heads} heads of {d} channels and {kv_heads} key and value heads "
            "do not divide; is the file whole?")
    return config


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
    Skip at first reading; it only saves memory. Head and cross-entropy in one, a chunk at a time, gradients included.
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
    positions with a target in targets.flatten(), if they are known; then x may be [n, H], at these alone.
    """
    # TRAP: the caller divides by the tokens of the whole step, over all micro-batches and ranks. A mean of means would
    # give a token in a short micro-batch more weight.
    if supervised is None:  # on a GPU this waits for the result; pack has counted on the CPU
        supervised = (targets.flatten() >= 0).nonzero()[:, 0]
    loss_weights = torch.ones_like(targets, dtype=torch.float32) if loss_weights is None else loss_weights
    # Most positions are image tokens or questions: no logits are computed for them.
    x = x if x.ndim == 2 else x.flatten(0, 1).index_select(0, supervised)                            # [n, H]
    return TokenLoss.apply(x, head, targets.flatten()[supervised], loss_weights.flatten()[supervised], chunk,
                           torch.is_grad_enabled(), cross_entropy)


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
        self.sample = sample   # how a token is chosen from its logits: here, so that the engine finds it
        self.idle_caches = {}  # see take_cache, Engine.close
        self.source = ""       # the folder that its weights come from, for the server's page
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

    def encode_tiles(self, tiles: Tiles) -> torch.Tensor:
        "A large picture in tiles -> its image tokens [K, H]."
        return self.bridge.stitch(self.vit_features(tiles.pixels.to(self.gpt.embed.weight.device)), tiles)

    def embed(self, ids, image_tokens=None, image_positions=None) -> torch.Tensor:
        "ids [B, T] -> [B, T, H]; at image_positions [K] of ids.flatten() image_tokens [K, H] replace the embeddings."
        x = self.gpt.embed(ids)
        if image_tokens is None:
            return x
        # index_copy, not an assignment in place: gradients flow to the image tokens.
        return x.flatten(0, 1).index_copy(0, image_positions, image_tokens.to(x.dtype)).view_as(x)

    def place_images(self, batch: dict) -> torch.Tensor | None:
        "A packed batch -> the image tokens of all its slots, one after another [K, H]."
        pixels, index, tiles = batch["pixels"], batch["image_index"], batch.get("tiles")
        # index [m]: which of the n pictures each slot shows. A picture that several documents share is encoded once.
        # One in tiles is several of the n, all of them shown in turn.
        if pixels is None or not tiles or self.bridge.newline is None:
            return None if pixels is None else self.encode_images(pixels)[index].flatten(0, 1)       # [m * M, H]
        features = self.vit_features(pixels)[index].split([one.squares if one else 1 for one in tiles])
        # LLaVA-OneVision joins a picture's tiles before they become tokens.
        return torch.cat(list(map(self.bridge.stitch, features, tiles)))

    def forward(self, batch: dict) -> torch.Tensor:
        "A packed batch (data.pack, data.collate) -> the summed loss over its supervised tokens."
        x = self.embed(batch["ids"], self.place_images(batch), batch["image_positions"])             # [B, T, H]
        if batch["cu_seqlens"] is None:  # one document in each row: plain causal attention
            documents = None
        elif x.is_cuda and x.dtype == torch.bfloat16:  # what FlashAttention needs; elsewhere a mask means the same
            documents = batch["cu_seqlens"]
        else:
            documents = document_mask(batch["document_ids"])
        h = self.gpt.hidden(x, batch["positions"], documents, only=batch["supervised"])              # [n, H]
        return token_loss(h, self.gpt.head_weight, batch["targets"], batch["loss_weights"], batch["supervised"],
                          cross_entropy=self.cross_entropy)

    def compile_parts(self) -> None:
        "Skip at first reading. torch.compile where the time goes: many small operations become one kernel."
        # Block by block: equal blocks share one compilation. The whole model as one piece would take many times longer.
        # TRAP: torch.compile(block) would put "_orig_mod." before all parameter names; block.compile() does not.
        for block in self.vit.blocks if self.vit else ():
            block.compile()  # the number of pictures varies: after two of them PyTorch compiles for any number
        for block in self.gpt.blocks:
            block.compile(dynamic=False)  # fixed shapes give faster kernels
        self.gpt.compiled_decode = compile_decoding(Block.forward)
        self.cross_entropy = torch.compile(cross_entropy)

    # ------------------------------------------------------------------------------------------------------------------
    # Generation: prefill computes prompts, then decode adds one token a row and step. Skip at first reading, to Loading

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
    if B == T == 1 and torch.compiler.is_compiling():
        return attend_one_row(q, *cache.kv[:, :, :, :S], cache.mask)
    keys, values = cache.kv[:, :B, :, :S] if T == 1 else cache.kv[:, cache.rows[:, 0], :, :S]        # [B, kv, S, d]
    # The query heads that share a kv head take the place of tokens: they use the same keys, in one product.
    q = q.view(B, T, kv_heads, -1, d).permute(0, 2, 3, 1, 4)                                         # [B,kv,group,T,d]
    mask = cache.mask if T == 1 else cache.mask.repeat(1, 1, q.shape[2], 1)                          # [B,1,group*T,S]
    y = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=mask)                # [B,kv,group*T,d]
    return y.view(B, kv_heads, -1, T, d).permute(0, 3, 1, 2, 4).flatten(2, 3)                        # [B, T, heads, d]


def attend_one_row(q, keys, values, mask) -> torch.Tensor:
    "The same for one new token of a single row, q [1, 1, heads, d], written as sums for the compiler."
    # SDPA's kernels go through the keys of a row one after the other, which leaves most of a GPU idle. The compiler
    # spreads these sums over all of it, and never stores the tensors of 5 axes.
    grouped = q.view(1, keys.shape[1], -1, q.shape[-1])                                              # [1,kv,group,d]
    scores = (grouped.float()[:, :, :, None] * keys[:, :, None]).sum(-1) * q.shape[-1] ** -0.5       # [1,kv,group,S]
    shares = (scores + mask).softmax(-1)
    return (shares[..., None] * values[:, :, None]).sum(-2).to(q.dtype).view_as(q)                   # [1, 1, heads, d]


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


# ----------------------------------------------------------------------------------------------------------------------
# Loading: checkpoints (written by save_checkpoint) and released weights

LLAVA = ("llava_onevision", "llava")  # Hugging Face's model types: with and without a newline token and tiles


def load_checkpoint(folder, device="cpu", dtype=torch.float32) -> VLM:
    """
    The folder's model: one of our checkpoints, or Hugging Face's folder of a LLaVA-OneVision or of a LLaVA with SigLIP
    and a Qwen. ValueError if anything is missing, cut short or of another shape.
    """
    folder = recover(folder)
    hf = read_json(path := folder / "config.json")
    if hf.get("model_type") in LLAVA:
        tensors, names, source = read_llava(folder), LLAVA_NAMES, folder
        vision, bridge = llava_vision(hf, folder)
        decoder = gpt_config(hf["text_config"], folder)
        decoder.tie_word_embeddings = "language_model.lm_head.weight" not in tensors
        config = connect(VLMConfig(vision, bridge, decoder, pretrained_vision=hf["model_type"], preset="",
                                   generation=generation_config(folder), run={"chapters": STAGES[:3]}))
    elif hf.pop("model_type", "") == "ghostvis":
        try:
            # Older checkpoints do not say whether latents are seeded: they were where M = N / 4.
            bridge = {"seeded": 4 * hf["bridge"]["num_latents"] == hf["bridge"]["num_patches"]} | hf["bridge"]
            config = VLMConfig(**hf | {"vision": ViTConfig(**hf["vision"]), "bridge": BridgeConfig(**bridge),
                                       "decoder": GPTConfig(**hf["decoder"])})
            for part in (config.vision, config.bridge, config.decoder, GPTConfig(vocab_size=config.lora_rank + 1)):
                check_sizes(part, path)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: does not fit this version of the code ({error})") from None
        source, names = folder / "model.safetensors", None
        tensors = read_safetensors(source)
    else:
        raise ValueError(f"{path}: neither a checkpoint of this project nor a LLaVA; a bare Qwen folder is given by "
                         "--model=")
    with torch.device("meta"):
        vlm = VLM(config)
    # Ours have the same names in the file: checked all the same, none missing and none left over.
    names = names or {name: [name] for name, _ in vlm.named_parameters()}
    load_tensors(vlm, tensors, names, "", str(source), device, dtype)
    return vlm


def load_pretrained(name: str, vision: str = "", bridge: str = "", device="cpu", dtype=torch.float32,
                    text_only: bool = False) -> tuple[VLM, Path]:
    """
    Released weights -> (model, the folder with its tokenizer). name: a preset, a hub id or a folder with a Qwen or a
    LLaVA. A Qwen gets a released vision encoder and a new bridge, which chapter 2 trains; text_only: it gets neither.
    """
    folder = Path(name) if Path(name).is_dir() else fetch(name)
    if read_json(folder / "config.json").get("model_type") in LLAVA:
        vlm = load_checkpoint(folder, device, dtype)
    else:
        gpt = GPT.from_pretrained(folder, device, dtype)
        vision = vision or DEFAULT_VISION
        vit = None if text_only else ViT.from_pretrained(
            Path(vision) if Path(vision).is_dir() else fetch(vision), device, dtype)
        config = VLMConfig(vit and vit.config, BridgeConfig(kind=bridge or "perceiver"), gpt.config,
                           pretrained_vision=vision, generation=generation_config(folder), run={"chapters": ["base"]})
        with torch.device("meta"):
            vlm = VLM(config if text_only else connect(config))
        vlm.vit, vlm.gpt, vlm.bridge = vit, gpt, None if text_only else Bridge(config.bridge).to(device, dtype)
    vlm.config.preset = run_name(name)
    return vlm, folder
