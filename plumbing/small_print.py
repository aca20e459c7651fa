"""
Small print: `--data=print`, large pictures with a number that is too small to be read at the encoder's size. It shows
what --tiles is worth (docs/data.md). Called by recipes.py. A reader of the lessons need not know it.
"""
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from plumbing.records import Records, hash_keys
from plumbing.strange import Drawing
from plumbing.world import BACKGROUNDS, draw_background, to_messages

RECORDS = 20_000
CELLS, DOTS = 12, 144  # a picture is 12 x 12 cells of 12 x 12 dots; the number stands in one cell
# 0 to 9, three dots wide and five high, row by row
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001011001111", "101101111001001",
          "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111")


@dataclass(frozen=True)
class Print(Drawing):
    "A picture with a white label, on which there is a digit."
    seed: int
    sides = 2  # in the encoder's square a dot is half a pixel

    @property
    def number(self) -> str:
        return str(random.Random(f"number {self.seed}").randrange(10))

    def draw(self, px: int) -> Image.Image:
        rng = random.Random(f"print {self.seed}")
        image = draw_background(rng.choice(list(BACKGROUNDS)), rng.randrange(4), px).copy()
        ink = bytes(255 - 255 * int(dot) for dot in DIGITS[int(self.number)])
        label = Image.new("L", (8, 8), 255)
        label.paste(Image.frombytes("L", (3, 5), ink), (rng.randint(2, 3), rng.randint(1, 2)))
        size, cell = round(8 * px / DOTS), px / CELLS
        label = label.resize((size, size), Image.Resampling.BOX).convert("RGB")
        image.paste(label, tuple(round((rng.randrange(CELLS) + 1 / 6) * cell) for _ in "xy"))
        return image


def small_print() -> Records:
    "The same records on every machine, each with a picture of its own."
    def make(i: int) -> dict:
        turn = "<image>\nWhich number is printed here?", Print(i).number
        return {"id": f"print/{i}", "messages": to_messages(turn), "images": [Print(i)], "kind": "print",
                "metric": "exact"}
    keys = [hash_keys({"images": [Print(i)]})[0] for i in range(RECORDS)]
    return Records(make, np.arange(RECORDS)[:, None], np.array(keys, np.uint64), np.ones(RECORDS, int))
