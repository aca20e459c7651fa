"""
Vision: from a picture to the few vectors that the language model receives.

    picture, any size and mode
      -> pixels         [B, 3, S, S]   resized to a square, values -1 to 1            preprocess, normalize
      -> patches        [B, N, D]      P x P pixels each, plus a learned position     ViT
      -> features       [B, N, D]      attention has mixed all patches                ViT
      -> latents        [B, M, D]      M < N summaries: fewer tokens for the decoder  Perceiver
      -> image tokens   [B, M, H]      as wide as the decoder's text embeddings       Bridge

For SigLIP2-L/16 at 256 pixels in front of Qwen2.5-1.5B: S = 256, P = 16, N = 256, D = 1024, M = 64, H = 1536.
The ViT computes exactly what SigLIP computes (arXiv 2303.15343, 2502.14786), so its released weights load into it. The
last section cuts a large picture into tiles (--tiles), as the public model LLaVA-OneVision does (arXiv 2408.03326).

Left out: SigLIP's text tower and its pooling head (we need every patch, not one vector), dropout (the encoder is frozen
or small), and NaFlex's variable shapes.
"""
import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from plumbing.files import read_json, require
from plumbing.settings import check_sizes
from plumbing.weights import SIGLIP_NAMES, load_tensors, read_safetensors

# ----------------------------------------------------------------------------------------------------------------------
# From a file to pixels

def resize(image: Image.Image, width: int, height: int, bicubic: bool) -> torch.Tensor:
    "RGB image -> uint8 [3, height, width]. SigLIP was released with bicubic, SigLIP 2 with bilinear resampling."
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                                 # [h, w, 3] -> [3, h, w]
    if image.size == (width, height):
        return pixels.contiguous()
    # As Pillow resizes, at most one level of 255 apart, but four times as fast.
    mode = "bicubic" if bicubic else "bilinear"
    return F.interpolate(pixels[None], (height, width), mode=mode, antialias=True)[0].contiguous()


def preprocess(image: Image.Image, size: int, bicubic: bool = False, pad: bool = False) -> torch.Tensor:
    """
    RGB image -> uint8 [3, size, size]. Like SigLIP: one direct resize, the aspect ratio is not kept and nothing is
    cropped away. pad: first bars make it a square, as LLaVA-OneVision does where it cuts no tiles.
    """
    if pad and image.width != image.height:
        x, y = max(image.size) - image.width, max(image.size) - image.height  # pixels of bar, on both sides together
        # mid-grey, which normalises to about 0
        image = ImageOps.expand(image, (x // 2, y // 2, x - x // 2, y - y // 2), (127, 127, 127))
    # Bytes, a quarter of the size of floats, travel to the device; `normalize` is done there.
    return resize(image, size, size, bicubic)


def normalize(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    "Bytes 0 to 255 -> -1 to 1: SigLIP's mean 0.5 and standard deviation 0.5 on a 0 to 1 scale."
    # float32 until the end: bfloat16 would round the middle greys before 1 is subtracted
    return (pixels.to(torch.float32) / 127.5 - 1).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The vision transformer

@dataclass
class ViTConfig:
    "Field names and defaults are those of Hugging Face's SiglipVisionConfig. SigLIP2-L/16's values stand in brackets."
    # TRAP: the hub's config.json files leave out what equals a default, so these numbers may not be changed.
    hidden_size: int = 768            # D: width of a patch's vector [1024]
    intermediate_size: int = 3072     # width inside the MLP, 4 D as a rule [4096]
    num_hidden_layers: int = 12       # [24]
    num_attention_heads: int = 12     # [16, of 64 channels each]
    image_size: int = 224             # S, pixels [256]
    patch_size: int = 16              # P, pixels; N = (S // P) ** 2 [16, so N = 256]
    layer_norm_eps: float = 1e-6      # TRAP: PyTorch's own default is 1e-5
    bicubic: bool = False             # how pictures are resized; from preprocessor_config.json
    pad: bool = False                 # grey bars instead of squeezing, and the tiles' rules; LLaVA-OneVision
    tiles: int = 0                    # --tiles: how many a larger picture is cut into at most; 0: it is not cut

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# The released encoders that give one vector per patch at a fixed size, by their names on the hub. SigLIP 1 was released
# with bicubic resizing, SigLIP 2 with bilinear.
SIGLIP = {
    "siglip2-large-patch16-256": ViTConfig(1024, 4096, 24, 16, image_size=256, patch_size=16),
    "siglip-large-patch16-256": ViTConfig(1024, 4096, 24, 16, image_size=256, patch_size=16, bicubic=True),
    "siglip2-base-patch16-224": ViTConfig(768, 3072, 12, 12, image_size=224, patch_size=16),
    "siglip-base-patch16-224": ViTConfig(768, 3072, 12, 12, image_size=224, patch_size=16, bicubic=True),
    "siglip-so400m-patch14-224": ViTConfig(1152, 4304, 27, 16, image_size=224, patch_size=14, bicubic=True),
    "siglip-so400m-patch14-384": ViTConfig(1152, 4304, 27, 16, image_size=384, patch_size=14, bicubic=True),
}
DEFAULT_VISION = "siglip2-large-patch16-256"  # the encoder that a Qwen gets unless another is named


def sincos_positions(side: int, D: int) -> torch.Tensor:
    """
    Start values for the positions of side x side patches [side^2, D]: sines and cosines of the column, then of the row,
    in D / 4 wavelengths.
    """
    # They are learned from there on. Random ones would have to find out first which patches are neighbours.
    # 1 to 1/100 radian per patch: a side has tens of places, where a text (with its usual 1/10,000) has thousands.
    frequencies = 100 ** -(torch.arange(D // 4) / (D // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")  # row by row, as patches are cut
    x, y = x.flatten()[:, None] * frequencies, y.flatten()[:, None] * frequencies                   # [side^2, D/4] each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)                                    # [side^2, D]


class ViTBlock(nn.Module):
    "Pre-norm transformer block; attention is not causal: every patch attends to every other."

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        # query, key and value in one product: three small ones keep the hardware less busy
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(D, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        q, k, v = (part.view(B, N, self.num_heads, -1).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))                  # 3 x [B, heads, N, D/heads]
        y = F.scaled_dot_product_attention(q, k, v)  # no mask: a picture has no past and no future
        x = x + self.out(y.transpose(1, 2).reshape(B, N, D))                                         # [B, N, D]
        # TRAP: SigLIP was trained with GELU's tanh form; the exact one is off by up to 0.0005 in every layer
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D, P, S = config.hidden_size, config.patch_size, config.image_size
        # the usual "patch convolution": with stride = kernel it is one matrix product
        self.patch = nn.Linear(3 * P * P, D)
        self.position = nn.Parameter(sincos_positions(S // P, D))                                    # [N, D]
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        init_linears(self, outputs=("out", "fc2"), depth=config.num_hidden_layers)

    def forward(self, pixels: torch.Tensor, layer: int = -1, norm: bool = True) -> torch.Tensor:
        """
        pixels [B, 3, S, S], bytes or already normalised -> features [B, N, D].
        layer = -1 is the last block's output, -2 the one before; norm=False leaves out the last norm, as LLaVA does.
        """
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels, self.patch.weight.dtype)
        B, C, S, _ = pixels.shape
        # A rest at the right and lower edge is not seen: 6 pixels in SigLIP so400m, where 384 = 27 * 14 + 6.
        P, n = self.config.patch_size, S // self.config.patch_size
        # [B, C, rows, P, columns, P] -> [B, rows, columns, C, P, P]: a patch's values in the order of SigLIP's weight
        x = pixels[:, :, :n * P, :n * P].reshape(B, C, n, P, n, P).permute(0, 2, 4, 1, 3, 5).reshape(
            B, n * n, C * P * P)                                                                     # [B, N, 3*P*P]
        x = self.patch(x) + self.position                                                            # [B, N, D]
        for block in self.blocks[:len(self.blocks) + 1 + layer]:  # later blocks are not computed at all
            x = block(x)
        return self.norm(x) if norm else x

    # Skip at first reading, down to init_linears: released weights.
    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "ViT":
        "From a SigLIP or SigLIP 2 folder as the hub ships it: config.json and one or more safetensors files."
        folder = Path(folder)
        config = read_json(folder / "config.json")
        with torch.device("meta"):  # no memory and no random numbers: every tensor comes from the file
            vit = cls(vit_config(config.get("vision_config", config), folder))  # whole SigLIP, or the tower alone
        # Left out by name, not by "whatever we do not know": a tensor that we forgot would be an error below.
        tensors = {name: tensor for name, tensor in read_safetensors(folder).items()
                   if not name.startswith(("text_model.", "logit_")) and ".head." not in f".{name}"}
        # the hub's files have the prefix, those that transformers 5 saves do not
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
        load_tensors(vit, tensors, SIGLIP_NAMES, prefix, str(folder), device, dtype)
        return vit


def vit_config(config: dict, folder: Path) -> ViTConfig:
    "The hub's vision config, and the folder in which preprocessor_config.json may lie."
    fill = {f.name: config[f.name] for f in fields(ViTConfig) if f.name in config}
    if (folder / "preprocessor_config.json").exists():  # resample: 2 is bilinear, 3 bicubic
        fill["bicubic"] = read_json(folder / "preprocessor_config.json").get("resample", 3) == 3
    config = ViTConfig(**fill)
    check_sizes(config, folder / "config.json")
    return config


def llava_vision(hf: dict, folder: Path) -> tuple[ViTConfig, "BridgeConfig"]:
    "A LLaVA's config.json -> its encoder, and how its bridge uses it. What we would compute differently is an error."
    tiled = hf["model_type"] == "llava_onevision"
    # A missing key means Hugging Face's default, which is not the same for both types.
    hf = {"vision_feature_select_strategy": "full" if tiled else "default",
          "vision_feature_layer": -1 if tiled else -2, **hf}
    for key, ours in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full"),
                      ("vision_aspect_ratio", "anyres_max_9")):
        require(hf.get(key, ours) == ours,
                        f"{folder}/config.json: {key} {hf.get(key)!r} is not supported, only {ours!r}")
    vision, layer = vit_config(hf["vision_config"], folder), hf["vision_feature_layer"]
    vision.pad, S = tiled, vision.image_size
    if tiled:  # a missing key: up to 6 x 6 tiles
        grids = {(h // S, w // S) for h, w in hf.get("image_grid_pinpoints", [])} or {*grids_of(MOST_TILES ** 2)}
        vision.tiles = max(rows * columns for rows, columns in grids)
        require(grids == {*grids_of(vision.tiles)}, f"{folder}/config.json: image_grid_pinpoints is not supported, "
                f"only all grids of up to {MOST_TILES} x {MOST_TILES} tiles, or those of at most so many tiles")
    require(type(layer) is int,
                    f"{folder}/config.json: vision_feature_layer {layer} is not supported, only a single number")
    # Hugging Face counts the embeddings as layer 0, so its layer 26 of 26 is our -1, and its -1 too.
    layer = layer if layer < 0 else layer - vision.num_hidden_layers - 1
    return vision, BridgeConfig(kind="mlp", layer=layer, newline=tiled)


def init_linears(module: nn.Module, outputs: tuple, depth: int) -> None:
    "Start values that keep a signal's size from layer to layer, as in GPT-2."
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            # Layers that write to the residual stream start smaller: 2 * depth of them are added up in it.
            shrink = (2 * depth) ** -0.5 if name.split(".")[-1] in outputs else 1.0
            # A sum of n products is sqrt(n) times as large as one of them: this factor takes it back.
            nn.init.normal_(linear.weight, std=shrink * linear.in_features ** -0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


# ----------------------------------------------------------------------------------------------------------------------
# The bridge: from the ViT's features to vectors in the decoder's space

@dataclass
class BridgeConfig:
    kind: str = "perceiver"   # or "pixelshuffle" (2 x 2 neighbours side by side) or "mlp" (every patch is a token)
    num_latents: int = 64     # M; only the Perceiver is free to choose it
    num_layers: int = 2       # Perceiver; each has 12 D^2 weights
    num_heads: int = 16       # Perceiver; of 1024 / 16 = 64 channels each
    vision_size: int = 1024   # D, as wide as the ViT
    text_size: int = 1536     # H, as wide as the decoder
    num_patches: int = 256    # N, what the ViT gives for one picture
    layer: int = -1           # which block's output is read: -1 the last one's, -2 the one's before
    newline: bool = False     # one learned token ends each picture, or each row of its tiles: LLaVA-OneVision
    seeded: bool = True       # Perceiver: latents start from the patches at their own place; False: all alike, Flamingo

    @property
    def num_tokens(self) -> int:
        "How many decoder positions one picture takes."
        return {"perceiver": self.num_latents, "pixelshuffle": self.num_patches // 4,
                "mlp": self.num_patches}[self.kind] + self.newline

    def tokens_of(self, image) -> int:
        "The same for one picture: uint8 [3, S, S], or Tiles, of which large pictures have more."
        if not isinstance(image, Tiles):
            return self.num_tokens
        return image.num_tokens(self.num_patches) if self.newline else image.squares * self.num_tokens

    def most_tokens(self, tiles: int) -> int:
        "The same for the largest picture, cut into so many tiles."
        joined = tiles and self.newline  # LLaVA-OneVision: up to 1.21 * MOST_TOKENS times N tokens and some newlines
        return (2 + MOST_TOKENS * 5 // 4) * self.num_patches if joined else (1 + tiles) * self.num_tokens

    @property
    def norm(self) -> bool:
        "Whether features are read after the ViT's last norm. LLaVA's bridge, the bare MLP, reads them before it."
        return self.kind != "mlp"


class PerceiverLayer(nn.Module):
    "Cross-attention from the latents to the features and to each other, then an MLP; both with norms in front."

    def __init__(self, config: BridgeConfig):
        super().__init__()
        D = config.vision_size
        self.num_heads = config.num_heads
        self.norm_latents, self.norm_features, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.q = nn.Linear(D, D, bias=False)  # queries from the latents only: M queries, so M vectors come out
        self.kv = nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.fc1 = nn.Linear(D, 4 * D, bias=False)
        self.fc2 = nn.Linear(4 * D, D, bias=False)
        for linear in (self.q, self.kv, self.fc1):
            nn.init.normal_(linear.weight, std=D ** -0.5)
        # Both branches add nothing at first: the resampler begins as what its latents start from, and attention grows
        # where it helps. (Gradients still reach these two; once they have moved, they reach the rest.)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.fc2.weight)

    def project(self, latents: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "latents [B, M, D], features [B, N, D] -> q [B, heads, M, D/heads], k and v [B, heads, N+M, D/heads]."
        # A function of its own: extras/attention_maps.py draws what these queries and keys give.
        B, M, _ = latents.shape
        x = self.norm_latents(latents)                                                               # [B, M, D]
        # Keys from features and latents: a latent also attends to the others, so that they can divide the work.
        kv = self.kv(torch.cat([self.norm_features(features), x], dim=1))                            # [B, N+M, 2D]
        q = self.q(x).view(B, M, self.num_heads, -1).transpose(1, 2)
        k, v = (part.view(B, kv.shape[1], self.num_heads, -1).transpose(1, 2) for part in kv.chunk(2, dim=-1))
        return q, k, v

    def forward(self, latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(*self.project(latents, features))               # [B, heads, M, D/heads]
        latents = latents + self.out(y.transpose(1, 2).reshape(latents.shape))                       # [B, M, D]
        return latents + self.fc2(F.gelu(self.fc1(self.norm_mlp(latents))))


def pixel_shuffle(features: torch.Tensor) -> torch.Tensor:
    "[B, N, D] -> [B, N/4, 4D]: each 2 x 2 neighbourhood of patches becomes one long vector."
    # Nothing is lost and nothing chosen: the baseline a resampler must beat.
    B, N, D = features.shape
    n = math.isqrt(N)  # patches a side
    x = features.view(B, n // 2, 2, n // 2, 2, D).permute(0, 1, 3, 2, 4, 5)                     # [B, n/2, n/2, 2, 2, D]
    return x.reshape(B, N // 4, 4 * D)


# Skip at first reading, down to Perceiver: the same for numbers of latents other than N / 4.
def part_shares(count: int, n: int) -> torch.Tensor:
    "A side of n patches cut into `count` equal parts -> [count, n]: which share of a part each patch is."
    edges, i = torch.arange(count + 1) * n / count, torch.arange(n)
    shared = (torch.minimum(edges[1:, None], i + 1) - torch.maximum(edges[:-1, None], i)).clamp(min=0)
    return shared / shared.sum(1, keepdim=True)


@lru_cache
def quarter_shares(M: int, N: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """
    M latents in rows over n x n patches, the place of each cut into four quarters -> [4 M, N]: the patches of which
    each quarter is the mean. For M = N / 4 a quarter is one patch, in the order of pixel_shuffle.
    """
    n, rows, out = math.isqrt(N), round(math.sqrt(M)), []
    for row in range(rows):
        columns = M * (row + 1) // rows - M * row // rows  # 5 latents: rows of 2 and 3
        tall, wide = part_shares(2 * rows, n)[2 * row:2 * row + 2], part_shares(2 * columns, n).view(columns, 2, n)
        out.append(torch.einsum("ya,cxb->cyxab", tall, wide).reshape(-1, n * n))
    return torch.cat(out).to(device, dtype)


class Perceiver(nn.Module):
    "Flamingo's resampler (arXiv 2204.14198): features [B, N, D] -> latents [B, M, D]."

    def __init__(self, config: BridgeConfig):
        super().__init__()
        M, D = config.num_latents, config.vision_size
        # Flamingo's latents are the same for every picture and must first learn where to look. Ours start from what is
        # at their own place instead: on the tiny model the caption loss after 150 steps is 0.21 that way and 0.55 the
        # other, and most of the time was spent on finding places. With M = N / 4 a place is 2 x 2 patches, and
        # pixel_shuffle lays them side by side; with another M it has four quarters all the same.
        self.seed = nn.Linear(4 * D, D) if config.seeded else None
        if self.seed is not None:
            init_linears(self.seed, outputs=(), depth=1)
        # Drawn at random: equal latents would receive equal gradients and stay equal for ever. As loud as the patches:
        # a latent's own vector is what tells the decoder which place it speaks of.
        self.latents = nn.Parameter(torch.randn(M, D))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(D)

    def places(self, features: torch.Tensor) -> torch.Tensor:
        "[B, N, D] -> [B, M, 4D]: what is at each latent's place, quarter by quarter."
        B, N, D = features.shape
        M = len(self.latents)
        if 4 * M == N:
            return pixel_shuffle(features)
        return (quarter_shares(M, N, features.device, features.dtype) @ features).view(B, M, 4 * D)

    def start(self, features: torch.Tensor) -> torch.Tensor:
        "[B, N, D] -> the latents before the first layer [B, M, D]."
        latents = self.latents.expand(len(features), -1, -1)
        return latents if self.seed is None else latents + self.seed(self.places(features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        latents = self.start(features)                                                               # [B, M, D]
        for layer in self.layers:  # every layer attends to the same features again
            latents = layer(latents, features)
        return self.norm(latents)


class Bridge(nn.Module):
    "features [B, N, D] -> tokens [B, M, H]: fewer vectors (or all of them), then LLaVA's 2-layer MLP to width H."

    def __init__(self, config: BridgeConfig):
        super().__init__()
        self.config = config
        side, H = math.isqrt(config.num_patches), config.text_size
        require(config.kind in ("perceiver", "pixelshuffle", "mlp"),
                        f"bridge {config.kind!r} is unknown; choose perceiver, pixelshuffle or mlp")
        require(config.kind != "pixelshuffle" or side % 2 == 0,
                        f"pixelshuffle needs an even grid of patches, not {side} a side")
        self.perceiver = Perceiver(config) if config.kind == "perceiver" else None
        # shuffled vectors are four patches long
        width = config.vision_size * (4 if config.kind == "pixelshuffle" else 1)
        self.fc1 = nn.Linear(width, H)
        self.fc2 = nn.Linear(H, H)
        for linear in (self.fc1, self.fc2):
            init_linears(linear, outputs=(), depth=1)
        self.newline = nn.Parameter(torch.randn(H) * H ** -0.5) if config.newline else None

    def project(self, features: torch.Tensor) -> torch.Tensor:
        if self.perceiver is not None:
            features = self.perceiver(features)                                                      # [B, M, D]
        elif self.config.kind == "pixelshuffle":
            features = pixel_shuffle(features)                                                       # [B, N/4, 4D]
        return self.fc2(F.gelu(self.fc1(features)))                                                  # [B, M, H]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.project(features)
        if self.newline is not None:
            x = torch.cat([x, self.newline.to(x.dtype).expand(len(x), 1, -1)], dim=1)                # M counts it
        return x

    # Skip at first reading: see the last section.
    def stitch(self, features: torch.Tensor, tiles: "Tiles | None") -> torch.Tensor:
        """
        One picture's features [1 + rows * columns, N, D] -> tokens [K, H]: those of the whole picture, then those of
        its tiles, row by row. LLaVA-OneVision's tiles are put together as one large grid, without the bars around it,
        a newline at the end of every row. tiles: None for a picture that is not cut [1, N, D].
        """
        if tiles is None or self.newline is None:
            return self(features).flatten(0, 1)
        n = math.isqrt(self.config.num_patches)
        whole, x = self.project(features).tensor_split([1])                       # [1, N, H], [rows * columns, N, H]
        x = x.view(tiles.rows, tiles.columns, n, n, -1).permute(4, 0, 2, 1, 3)              # [H, rows, n, columns, n]
        x = x.reshape(-1, tiles.rows * n, tiles.columns * n)                                 # [H, rows n, columns n]
        (top, height), (left, width), shape = tiles.layout(n)
        x = x[:, top:top + height, left:left + width]
        if shape != (height, width):  # still too many: a coarser grid
            x = F.interpolate(x[None], shape, mode="bilinear")[0]                                    # [H, h, w]
        newline = self.newline.to(x.dtype)[:, None, None].expand(-1, shape[0], 1)                    # [H, h, 1]
        return torch.cat([whole[0], torch.cat([x, newline], dim=2).flatten(1).t()])     # [N + h (w + 1), H]


# ----------------------------------------------------------------------------------------------------------------------
# Any resolution: a large picture as several tiles of the size that the ViT knows (LLaVA-NeXT, LLaVA-OneVision)
# Skip at first reading: without --tiles, tiny, small and the Qwens see a picture as one square.

MOST_TILES = 6     # a side: the grids are 1 x 1 to 6 x 6
MOST_TOKENS = 9    # times N: LLaVA-OneVision makes a grid with more tokens coarser ("anyres_max_9")


@dataclass
class Tiles:
    pixels: torch.Tensor | None  # uint8 [1 + rows * columns, 3, S, S]: the whole, squeezed, then its tiles row by row
    rows: int
    columns: int
    width: int            # of the picture as it was, pixels
    height: int

    @property
    def squares(self) -> int:
        "How many the ViT sees: the tiles, and the whole picture in small."
        return 1 + self.rows * self.columns

    def layout(self, n: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        "n x n tokens a tile -> (first row, rows) and (first column, columns) that show the picture, (h, w) in the end."
        h, w = self.rows * n, self.columns * n
        top = left = 0
        # Bars lie above and below, or left and right. TRAP: half a bar is rounded down on both sides, so up to one row
        # of bar is kept; the released weights have learned it so. round: 0.9999999 is a 1 that was computed.
        if self.width / self.height > w / h:
            top = (h - int(round(self.height * (w / self.width), 7))) // 2
        else:
            left = (w - int(round(self.width * (h / self.height), 7))) // 2
        h, w = h - 2 * top, w - 2 * left
        ratio = math.sqrt(h * w / (MOST_TOKENS * n * n))
        return (top, h), (left, w), (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)

    def num_tokens(self, num_patches: int) -> int:
        "The length of what Bridge.stitch gives with newlines."
        h, w = self.layout(math.isqrt(num_patches))[2]
        return num_patches + h * (w + 1)


def grids_of(most: int) -> list[tuple[int, int]]:
    "(rows, columns) of all grids of at most so many tiles."
    return [(r, c) for r in range(1, MOST_TILES + 1) for c in range(1, MOST_TILES + 1) if r * c <= most]


def best_grid(width: int, height: int, side: int, most: int = MOST_TILES ** 2) -> tuple[int, int]:
    "(rows, columns) of tiles, side pixels each, that keep most of a picture's pixels; of those, the fewest."
    def kept(grid):
        scale = min(grid[1] * side / width, grid[0] * side / height)
        # enlarging adds no detail, so the picture's own size is the most there is to keep
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - grid[0] * grid[1] * side * side  # most kept, then least wasted
    return max(grids_of(most), key=kept)


def layout_of(width: int, height: int, config: ViTConfig, alone: bool) -> Tiles | None:
    "Into which tiles a picture is cut, still without their pixels; None: into none. alone: no other is shown with it."
    # LLaVA-OneVision was trained on tiles of single pictures only, and of small ones, too.
    if not config.tiles or (not alone if config.pad else max(width, height) <= config.image_size):
        return None
    grid = best_grid(width, height, config.image_size, config.tiles)
    return Tiles(None, *grid, width, height) if config.pad or grid != (1, 1) else None


def to_pixels(image: Image.Image, config: ViTConfig, alone: bool = True) -> torch.Tensor | Tiles:
    "RGB image -> what the ViT gets of it, in training and everywhere else: uint8 [3, S, S], or Tiles."
    if layout_of(*image.size, config, alone):
        return cut_tiles(image, config.image_size, config.bicubic, config.tiles)
    return preprocess(image, config.image_size, config.bicubic, config.pad)


def blank(image: torch.Tensor | Tiles) -> torch.Tensor | Tiles:
    "A grey picture of the same size: mid-grey, which normalises to about 0."
    return replace(image, pixels=blank(image.pixels)) if isinstance(image, Tiles) else torch.full_like(image, 128)


def cut_tiles(image: Image.Image, side: int, bicubic: bool = True, most: int = MOST_TILES ** 2) -> Tiles:
    "RGB image -> its tiles. The aspect ratio is kept; black bars fill what the picture does not cover."
    rows, columns = best_grid(*image.size, side, most)
    width, height = columns * side, rows * side
    scale = min(width / image.width, height / image.height)
    w, h = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
    x, y = (width - w) // 2, (height - h) // 2
    canvas = torch.zeros(3, height, width, dtype=torch.uint8)
    canvas[:, y:y + h, x:x + w] = resize(image, w, h, bicubic)
    # [3, rows, side, columns, side] -> [rows * columns, 3, side, side]: tile by tile, row by row
    tiles = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return Tiles(torch.cat([preprocess(image, side, bicubic)[None], tiles]), rows, columns, *image.size)
