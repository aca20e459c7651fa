"""
Where the model looked: the attention of each word over the picture's patches. Called by `sample.py --attention`, the
page and the book's figures.

Two attentions lie one behind the other. In the decoder each word attends to the image tokens (where_it_looked); in the
bridge each image token was made of patches (patch_shares). Multiplied, they tell what a word has of each patch. It is a
hint, not a proof: attention shows where information could come from, not what was made of it.
"""
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from plumbing.drawing import draw_sheet
from plumbing.engine import PictureCache, Request
from plumbing.files import say
from model import VLM, rope_table
from tokenizer import Tokenizer
from vision import Bridge, Tiles, pixel_shuffle
from extras.asking import Text


def patch_shares(bridge: Bridge, features: torch.Tensor) -> torch.Tensor:
    "One picture's features [N, D] -> [M, N]: how much each image token has from each patch. Rows add up to 1."
    N = len(features)
    own = torch.eye(N, device=features.device)
    if bridge.config.kind == "mlp":
        return own
    # A shuffled vector is four patches side by side; a seeded latent starts from four quarters too.
    if bridge.perceiver is None:
        return pixel_shuffle(own[None])[0].view(-1, 4, N).mean(1)                                    # [N/4, N]
    # The Perceiver: as its forward, layer by layer, but for the attention weights, which the fused kernel never shows.
    latents = bridge.perceiver.start(features[None])                                                 # [1, M, D]
    shares = bridge.perceiver.places(own[None])[0].view(-1, 4, N).mean(1) if bridge.perceiver.seed is not None else \
        torch.full((latents.shape[1], N), 1 / N, device=features.device)                             # [M, N]
    for layer in bridge.perceiver.layers:
        q, k, _ = layer.project(latents, features[None])
        weights = (q @ k.mT * q.shape[-1] ** -0.5)[0].float().softmax(-1).mean(0)                    # [M, N + M]
        # Attention rollout (arXiv 2005.00928): half is what the latent was before, half is what it attended to.
        shares = (shares + weights[:, :N] + weights[:, N:] @ shares) / 2
        latents = layer(latents, features[None])
    return shares


@torch.no_grad()
def latent_maps(vlm: VLM, pixels: torch.Tensor) -> torch.Tensor:
    """
    uint8 [3, S, S], or Tiles, of which the whole -> [M, n, n], 0 to 1: what each image token took from each patch,
    beside what it took most from.
    """
    n, whole = math.isqrt(vlm.config.vision.num_patches), pixels.pixels[0] if isinstance(pixels, Tiles) else pixels
    features = vlm.vit_features(whole[None].to(vlm.gpt.embed.weight.device))[0]                      # [N, D]
    shares = patch_shares(vlm.bridge, features)                                                      # [M, N]
    return (shares / shares.amax(1, keepdim=True)).view(-1, n, n).cpu()


@torch.no_grad()
def where_it_looked(vlm: VLM, prompt, images: list, answer: list[int]) -> list[torch.Tensor]:
    "-> for each picture [A, n, n], 0 to 1: where each of the answer's A tokens looked more than usual."
    device, bridge, n = vlm.gpt.embed.weight.device, vlm.bridge, math.isqrt(vlm.config.vision.num_patches)
    # The whole conversation once more, in one pass without a cache, in which all attention weights are kept.
    encoded = PictureCache(vlm)(images)
    columns = [torch.arange(len(tokens), device=device) + slot for slot, tokens in zip(prompt.slots, encoded)]
    # The last token is not needed: each is chosen at the position before it.
    ids = torch.tensor([list(prompt.ids) + list(answer)[:-1]], device=device)                        # [1, T]
    x, T, after = vlm.embed(ids, torch.cat(encoded), torch.cat(columns)), ids.shape[1], int(columns[-1][-1]) + 1
    rope, total = rope_table(torch.arange(T, device=device)[None], vlm.config.decoder), 0
    later = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)[after:]                        # [R, T]
    for block in vlm.gpt.blocks:  # R: the text behind the pictures, question and answer
        q, k, _ = block.attention.project(block.norm1(x), rope)
        q, k = q[0, after:].transpose(0, 1), k[0].repeat_interleave(q.shape[2] // k.shape[2], 1).transpose(0, 1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).float().masked_fill(later, -torch.inf)             # [heads, R, T]
        total, x = total + scores.softmax(-1).mean(0), block(x, rope)  # the mean over heads, the sum over layers
    maps = []
    for image, at in zip(images, columns):
        seen, tiled = total[:, at], isinstance(image, Tiles)                                         # [R, K]
        if tiled and bridge.newline is not None:  # the whole, and its parts, a newline behind each row
            h, w = image.layout(n)[2]
            parts = F.interpolate(seen[:, n * n:].view(-1, 1, h, w + 1)[..., :-1], (n, n), mode="area")[:, 0]
            grid = seen[:, :n * n].view(-1, n, n) + parts
        else:
            features = vlm.vit_features((image.pixels if tiled else image[None]).to(device))         # [squares, N, D]
            grid, *parts = (part[:, :len(shares)] @ shares for part, shares in zip(
                seen.tensor_split(len(features), dim=1), (patch_shares(bridge, one) for one in features)))
            grid = grid.view(-1, n, n)
            if tiled:  # the tiles side by side, without the bars around the picture, as coarse as the whole
                parts = torch.stack(parts, 1).view(-1, image.rows, image.columns, n, n).transpose(2, 3)
                (top, h), (left, w), _ = image.layout(n)
                parts = parts.reshape(len(grid), 1, image.rows * n, image.columns * n)[..., top:top + h, left:left + w]
                grid = grid + F.interpolate(parts, (n, n), mode="area")[:, 0]
        # Every token looks everywhere a little, at some places always. What tells is where it looks more than the mean.
        grid = (grid - grid.mean(0)).clamp(min=0)[-len(answer):]
        # Words that look nowhere in particular stay dark, but not as dark as they are: their own maximum counts half.
        most = (grid.amax() * grid.amax((1, 2), keepdim=True)).sqrt().clamp(min=1e-9)
        maps.append((grid / most).cpu())
    return maps


def words_of(tokenizer: Tokenizer, answer: list[int], maps: list[torch.Tensor]) -> list[tuple[str, list]]:
    "-> (word, for each picture [n, n], the mean of its tokens'). A word begins with its white space."
    text, words = Text(tokenizer), []
    for i, token in enumerate(answer):
        piece = text.add([token], last=i == len(answer) - 1)
        if not words or piece[:1].isspace():
            words.append((piece, [i]))
        elif piece:
            words[-1] = words[-1][0] + piece, words[-1][1] + [i]
    return [(word, [m[at].mean(0) for m in maps]) for word, at in words if word]


def shade(image: Image.Image, shares: torch.Tensor, px: int = 150) -> Image.Image:
    "The picture in a square px wide, dark but for where shares [n, n] is high."
    image = ImageOps.contain(image, (px, px))
    light = F.interpolate(shares[None, None], image.size[::-1], mode="bicubic")[0, 0].clamp(0, 1)
    mask = Image.fromarray((light * 255).byte().numpy())
    shaded = Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.7), mask)
    return ImageOps.pad(shaded, (px, px), color="white")


def draw_attention(path: str, vlm: VLM, tokenizer: Tokenizer, request: Request, images: list) -> None:
    "One sheet: for each word of the answer the pictures, light where it looked."
    answer = [token for token in request.answer if token not in request.stop]
    if not answer:
        raise ValueError(f"{path}: the answer has no words to draw")
    words = words_of(tokenizer, answer, where_it_looked(vlm, request.prompt, request.images, answer))
    cells = [(shade(image, shares), word.strip()) for word, maps in words for image, shares in zip(images, maps)]
    draw_sheet(path, [cell for cell, _ in cells], [[(word, "black")] for _, word in cells], columns=8, px=158)
    say(f"(wrote {path})")
