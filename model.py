"""
The model: a Qwen2.5 decoder, a VLM around it, its loss, generation, and checkpoints.

    ids [B, T] -> embeddings [B, T, H], the picture's tokens written over the <|image_pad|> positions
      L x ( RMSNorm -> attention (RoPE, grouped queries) -> +  RMSNorm -> SwiGLU -> + )
      RMSNorm -> head -> logits [B, T, V]

Read it in this order: RMSNorm and RoPE, Attention, MLP, GPT (a complete language model), VLM (the same with eyes), then
how it is trained (token_loss) and used (generate). The layers compute exactly what Hugging Face's Qwen2 does (arXiv
2412.15115): the released weights load into them and give the same logits.

Left out: sliding windows (no released Qwen2.5 uses them), dropout (none of the recipes uses it), YaRN for very long
texts.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from vision import (Bridge, BridgeConfig, ViT, ViTConfig, init_linears, load_renamed, read_json, read_metadata,
                    read_safetensors, write_safetensors)

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass
class GPTConfig:
    "Field names are those of Hugging Face's Qwen2Config; the values here are Qwen2.5-1.5B's."
    vocab_size: int = 151936          # V: rows of the embedding, some of them padding
    hidden_size: int = 1536           # H
    intermediate_size: int = 8960
    num_hidden_layers: int = 28       # L
    num_attention_heads: int = 12
    num_key_value_heads: int = 2      # each serves 12 / 2 = 6 query heads: the cache is 6 times smaller
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True  # the head is the embedding matrix, transposed
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class VLMConfig:
    vision: ViTConfig = field(default_factory=ViTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    decoder: GPTConfig = field(default_factory=GPTConfig)
    pretrained_vision: bool = False   # then the ViT stays frozen in every stage
    image_pad: int = -1               # the id whose embedding the picture's tokens replace; set from the tokenizer
    preset: str = "tiny"

    @classmethod
    def from_dict(cls, d: dict) -> "VLMConfig":
        return cls(ViTConfig(**d["vision"]), BridgeConfig(**d["bridge"]), GPTConfig(**d["decoder"]),
                   d["pretrained_vision"], d["image_pad"], d["preset"])


PRESETS = {
    "tiny": VLMConfig(
        ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=72,
                  patch_size=12),
        BridgeConfig(num_latents=9, num_layers=1, num_heads=4),
        GPTConfig(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=2048)),
    "small": VLMConfig(
        ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=128,
                  patch_size=8),
        BridgeConfig(num_latents=64, num_layers=2, num_heads=6),
        GPTConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
                  num_key_value_heads=2, max_position_embeddings=4096)),
}
for _name, _preset in PRESETS.items():  # what follows from the rest is written once
    _preset.preset = _name
    _preset.bridge.vision_size, _preset.bridge.text_size = _preset.vision.hidden_size, _preset.decoder.hidden_size
    _preset.bridge.num_patches = _preset.vision.num_patches


# ----------------------------------------------------------------------------------------------------------------------
# The decoder

class RMSNorm(nn.Module):
    "LayerNorm without mean and bias (arXiv 1910.07467)."

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_table(positions: torch.Tensor, config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    "positions [B, T] -> cos, sin [B, 1, T, head_dim / 2], in float32: bfloat16 cannot tell position 1000 from 1001."
    d = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary positions (arXiv 2104.09864): channel i of the first half and channel i of the second are one pair, turned by
    an angle that grows with the position, so that a query meets a key by their distance alone. (Llama's first code
    paired 2i with 2i+1: weights trained for one pairing are noise in the other.)
    """
    a, b = x.float().chunk(2, dim=-1)                                                          # [B, heads, T, d/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """
    Keys and values of what was read so far, allocated once for the longest sequence: nothing grows or moves while
    decoding.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        # zeros, not empty: a stray NaN would pass through a zero weight
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; the same for all rows, as prompts are padded on the left

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append k, v [B, kv heads, T, d] of one layer; returns all keys and values up to now. `length` moves on after the
        last layer.
        """
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def repeat(self, n: int) -> None:
        "Row i becomes rows i*n to i*n+n-1: several answers to one prompt, read only once."
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        H, d = config.hidden_size, config.head_dim
        self.sizes = [config.num_attention_heads * d, config.num_key_value_heads * d, config.num_key_value_heads * d]
        self.qkv = nn.Linear(H, sum(self.sizes))       # Qwen has a bias here and nowhere else
        self.out = nn.Linear(H, H, bias=False)

    def forward(self, x, rope, mask, cache) -> torch.Tensor:
        B, T, H = x.shape
        q, k, v = (part.view(B, T, -1, self.config.head_dim).transpose(1, 2)
                   for part in self.qkv(x).split(self.sizes, dim=-1))
        q, k = rotate(q, *rope), rotate(k, *rope)                                         # [B, heads or kv heads, T, d]
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, H))


class MLP(nn.Module):
    "SwiGLU (arXiv 2002.05202): one half decides how much of the other passes."

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), rope, mask, cache)
        return x + self.mlp(self.norm2(x))


# Ours on the left, Hugging Face's on the right; where several stand on the right, ours is their rows stacked.
QWEN_NAMES = {
    "embed.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],  # untied models only
    "blocks.#.norm1.*": ["model.layers.#.input_layernorm.*"],
    "blocks.#.norm2.*": ["model.layers.#.post_attention_layernorm.*"],
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
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        init_linears(self.blocks, outputs=("out", "down"), depth=config.num_hidden_layers)
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight            # [V, H]

    def hidden(self, x: torch.Tensor, positions=None, mask=None, cache: KVCache | None = None) -> torch.Tensor:
        """
        Embeddings x [B, T, H] -> [B, T, H] after the last norm. positions [B, T] count from 0 in each document, mask
        [B, 1, T, keys] is True where a query may look; without them: one document a row, causal.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rope_table(positions, self.config)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """
        ids [B, T] -> logits [B, T, V]. Training uses hidden() and token_loss instead: it never needs all logits at
        once.
        """
        return F.linear(self.hidden(self.embed(ids)), self.head_weight.to(self.embed.weight.dtype))

    @classmethod
    def from_pretrained(cls, folder) -> "GPT":
        "From a Qwen2 or Qwen2.5 folder as the hub ships it: config.json and one or more safetensors files."
        folder = Path(folder)
        hf = read_json(folder / "config.json")
        hf |= hf.get("rope_parameters") or {}  # transformers 5 moved rope_theta in there
        rope = {**hf, **(hf.get("rope_scaling") or {})}
        if hf.get("use_sliding_window") or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{folder}/config.json: sliding windows and scaled RoPE are not supported")
        config = GPTConfig(**{f.name: hf[f.name] for f in fields(GPTConfig) if f.name in hf})
        with torch.device("meta"):
            gpt = cls(config)
        tensors = dict(read_safetensors(folder))
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some tools write the tied head out a second time
        load_renamed(gpt, tensors, QWEN_NAMES, "", str(folder))
        return gpt


# ----------------------------------------------------------------------------------------------------------------------
# The loss

class TokenLoss(torch.autograd.Function):
    """
    Head and cross-entropy in one, a chunk of tokens at a time, the gradients already made on the way forward. The
    logits of 16,384 tokens over Qwen's 151,936 words are 10 GB in float32, and autograd would keep them until the way
    back; here a chunk's logits are gone before the next one's are made (the idea of Liger and of Cut Cross-Entropy,
    arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, chunk, train):
        total = x.new_zeros((), dtype=torch.float32)
        w = head.to(x.dtype)
        grad_x = torch.zeros_like(x) if train else None
        grad_head = torch.zeros_like(head) if train and head.requires_grad else None
        for i in range(0, len(x), chunk):
            xi, ti, wi = x[i:i + chunk], targets[i:i + chunk], weights[i:i + chunk]
            logits = (xi @ w.t()).float()                                                            # [chunk, V]
            logsum = logits.logsumexp(dim=-1, keepdim=True)
            total += ((logsum[:, 0] - logits.gather(1, ti[:, None])[:, 0]) * wi).sum()
            if train:  # d loss / d logits = softmax - 1 at the target
                delta = logits.sub_(logsum).exp_()
                delta[torch.arange(len(ti), device=x.device), ti] -= 1
                delta = delta.mul_(wi[:, None]).to(x.dtype)
                grad_x[i:i + chunk] = delta @ w
                if grad_head is not None:
                    grad_head += delta.t() @ xi
        ctx.save_for_backward(grad_x, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad, None if grad_head is None else grad_head * grad, None, None, None, None


def token_loss(x, head, targets, weights=None, chunk: int = 4096) -> torch.Tensor:
    """
    x [B, T, H], head [V, H], targets [B, T] with -100 where nothing is to be learned -> the SUM over supervised tokens
    of weight * -log p(target). The caller divides by the tokens of the whole step, over all micro-batches and ranks: a
    mean of means would weigh a token in a short micro-batch more. `weights` [B, T] are the advantages in reinforcement
    learning, else ones.
    """
    rows = (targets.flatten() >= 0).nonzero()[:, 0]  # most positions are picture or question: they never reach the head
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    return TokenLoss.apply(x.flatten(0, 1)[rows], head, targets.flatten()[rows], weights.flatten()[rows], chunk,
                           torch.is_grad_enabled())


# ----------------------------------------------------------------------------------------------------------------------
# The VLM

def document_mask(documents: torch.Tensor) -> torch.Tensor:
    "document ids [B, T] -> [B, 1, T, T], True where a query may look: back, and only within its own document."
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]


class VLM(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vision)
        self.bridge = Bridge(config.bridge)
        self.gpt = GPT(config.decoder)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        "pixels uint8 [n, 3, S, S] -> the pictures' tokens [n, M, H]. A frozen ViT leaves no graph behind."
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vit.patch.weight.requires_grad):
            features = self.vit(pixels)
        return self.bridge(features)

    def embed(self, ids, pixels=None, slots=None, pictures=None) -> torch.Tensor:
        """
        ids [B, T] -> [B, T, H]. slots [m * M] are the places of m pictures' placeholders in ids.flatten(); the
        embeddings there are overwritten. pictures [m] says which of the n pixels each one shows (default: each in
        turn): a picture that several documents talk about is encoded once. The packer has checked that pictures and
        places belong together.
        """
        x = self.gpt.embed(ids)
        if pixels is not None and len(pixels):
            tokens = self.see(pixels)                                                                # [n, M, H]
            tokens = tokens if pictures is None else tokens[pictures]                                # [m, M, H]
            x = x.flatten(0, 1).index_copy(0, slots, tokens.flatten(0, 1).to(x.dtype)).view_as(x)
        return x

    def forward(self, batch: dict) -> torch.Tensor:
        "A packed batch (data.pack) -> summed loss over its supervised tokens."
        x = self.embed(batch["ids"], batch.get("pixels"), batch.get("slots"), batch.get("pictures"))
        h = self.gpt.hidden(x, batch["positions"], document_mask(batch["documents"]))
        return token_loss(h, self.gpt.head_weight, batch["targets"], batch["weights"])

    def groups(self) -> dict[str, nn.Module]:
        return {"vit": self.vit, "bridge": self.bridge, "decoder": self.gpt}

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def generate(self, prompts: list, pixels=None, *, max_new_tokens: int = 128, stop: set[int] = frozenset(),
                 samples: int = 1, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 repetition_penalty: float = 1.0, vocab_used: int = 0,
                 seeds: list[int] | None = None) -> Iterator[list[int | None]]:
        """
        Prompts of any lengths, as tokenizer.render gives them, with `pixels` [n, 3, S, S] of all their pictures in
        order. Yields, for each new position, one id per row, None for rows that have ended (the stop token itself is
        still yielded). With samples = n every prompt is read once and answered n times: rows i*n to i*n+n-1.
        temperature 0 takes the likeliest token. A row's random numbers come from its own seed: what it says does not
        depend on its neighbours.
        """
        device, B = self.gpt.embed.weight.device, len(prompts)
        T = max(len(p.ids) for p in prompts)
        # Padded on the left, so that all rows' last prompt tokens, and then all new ones, stand in one column.
        pad = torch.tensor([T - len(p.ids) for p in prompts], device=device)
        ids = torch.tensor([[0] * (T - len(p.ids)) + list(p.ids) for p in prompts], device=device)   # [B, T]
        M = self.config.bridge.num_tokens
        starts = [b * T + T - len(p.ids) + s for b, p in enumerate(prompts) for s in p.slots]
        if len(starts) != (0 if pixels is None else len(pixels)):
            raise ValueError(f"{len(starts)} places for images in the prompts, "
                             f"but {0 if pixels is None else len(pixels)} images")
        slots = (torch.tensor(starts, device=device, dtype=torch.long)[:, None]
                 + torch.arange(M, device=device)).flatten()
        cache = KVCache(self.config.decoder, B, T + max_new_tokens, device, self.gpt.embed.weight.dtype)

        columns = torch.arange(T + max_new_tokens, device=device)
        mask = (columns[:T, None] >= columns[None, :T]) & (columns[None, :T] >= pad[:, None, None])  # [B, T, T]
        # a padding position sees itself: a softmax over nothing is NaN
        mask |= torch.eye(T, dtype=torch.bool, device=device)
        positions = (columns[:T] - pad[:, None]).clamp(min=0)
        x = self.embed(ids, pixels.to(device) if pixels is not None else None, slots)
        h = self.gpt.hidden(x, positions, mask[:, None], cache)[:, -1]                               # [B, H]
        if samples > 1:
            cache.repeat(samples)
            h, pad, ids = (t.repeat_interleave(samples, dim=0) for t in (h, pad, ids))
            B *= samples
        seen = torch.zeros(B, self.config.decoder.vocab_size, dtype=torch.bool, device=device)
        if repetition_penalty != 1.0:
            seen.scatter_(1, ids, columns[None, :T] >= pad[:, None])
            # 0 also pads
            seen[:, 0] = torch.tensor([0 in p.ids for p in prompts for _ in range(samples)], device=device)
        # All random numbers at once: one column is used at each step.
        seeds = list(range(B)) if seeds is None else seeds
        noise = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s))
                             for s in seeds]).to(device)
        ended = [False] * B
        for step in range(max_new_tokens):
            logits = F.linear(h, self.gpt.head_weight.to(h.dtype)).float()                           # [B, V]
            if vocab_used:
                logits[:, vocab_used:] = -torch.inf  # padding rows of the embedding are not words
            token = sample(logits, noise[:, step], seen, temperature, top_k, top_p, repetition_penalty)
            row = token.tolist()
            yield [None if ended[b] else row[b] for b in range(B)]
            ended = [ended[b] or row[b] in stop for b in range(B)]
            if all(ended) or step == max_new_tokens - 1:
                return
            if repetition_penalty != 1.0:
                seen.scatter_(1, token[:, None], True)
            mask = (columns[None, :T + step + 1] >= pad[:, None])[:, None, None]                     # [B, 1, 1, keys]
            h = self.gpt.hidden(self.gpt.embed(token[:, None]), (T + step - pad)[:, None], mask, cache)[:, 0]


def sample(logits, noise, seen, temperature: float, top_k: int, top_p: float,
           repetition_penalty: float) -> torch.Tensor:
    """
    logits [B, V], noise [B] uniform in 0 to 1 -> token ids [B]. The filters come in Hugging Face's order: repetition
    penalty (a token that was `seen` loses likelihood), temperature, top-k (the k likeliest), top-p (the fewest that
    hold p of the mass).
    """
    if repetition_penalty != 1.0:
        logits = torch.where(
            seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
        probs /= probs.sum(dim=-1, keepdim=True)
    probs[probs.cumsum(dim=-1) - probs > top_p] = 0  # drop those before which p is already full: the first always stays
    # Inverse transform: the first token at which the running sum passes the noise.
    total = probs.cumsum(dim=-1)
    index = (total <= noise[:, None] * total[:, -1:]).sum(dim=-1, keepdim=True)
    return order.gather(1, index.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1))[:, 0]


def respond(vlm: VLM, tokenizer, conversations: list, pixels: list, **options) -> list[str]:
    """
    Chat messages and each one's list of uint8 [3, S, S] pictures -> the assistant's next words. `options` are those of
    generate; with samples = n there are n answers in a row for each conversation.
    """
    prompts = [tokenizer.render(m, image_tokens=vlm.config.bridge.num_tokens, add_generation_prompt=True)
               for m in conversations]
    images = [p for group in pixels for p in group]
    rows = [[] for _ in range(len(prompts) * options.get("samples", 1))]
    for column in vlm.generate(prompts, torch.stack(images) if images else None, stop=set(tokenizer.stop_ids),
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
    if not folder.exists() and old.exists():
        os.rename(old, folder)
    return folder


def save_checkpoint(folder, vlm: VLM, tokenizer, optimizer: dict | None = None, state: dict | None = None) -> None:
    """
    All or nothing: the new folder is written beside the old one and then takes its place, so that a crash at any moment
    leaves a whole checkpoint. Other files in the old folder (log.jsonl, samples.png) move along.
    """
    folder = recover(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
    tokenizer.save(new)
    stamp = {"step": str((state or {}).get("step", 0))}  # proves that weights, moments and state belong to one moment
    write_safetensors(dict(vlm.named_parameters()), new / "model.safetensors", {"format": "pt", **stamp})
    if optimizer is not None:
        write_safetensors(optimizer, new / "optimizer.safetensors", stamp)
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    if folder.exists():
        for file in folder.iterdir():
            if not (new / file.name).exists() and file.name not in ("optimizer.safetensors", "state.json"):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


STAGES = ["base", "align", "sft", "rl"]  # in the order in which they build on each other


def newest_checkpoint(out_dir, preset: str, before: str = "") -> Path | None:
    "The checkpoint of the latest stage (of those before a given one) under OUT_DIR/PRESET, if there is any."
    stages = STAGES[:STAGES.index(before)] if before else STAGES
    folders = [Path(out_dir) / preset / stage for stage in stages]
    return next((f for f in reversed(folders)
                 if (f / "config.json").exists() or f.with_name(f.name + ".old").exists()), None)


def load_checkpoint(folder) -> VLM:
    "The folder's model, on the CPU, in float32. ValueError if anything is missing, cut short or of another shape."
    folder = recover(folder)
    config = read_json(folder / "config.json")
    if config.pop("model_type", "") != "ghostvis":
        raise ValueError(f"{folder}/config.json: not a checkpoint of this project")
    try:
        config = VLMConfig.from_dict(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: does not fit this version of the code ({error})") from None
    with torch.device("meta"):
        vlm = VLM(config)
    tensors = read_safetensors(folder / "model.safetensors")
    load_renamed(vlm, tensors, {name: [name] for name, _ in vlm.named_parameters()}, "",
                 str(folder / "model.safetensors"))
    return vlm
