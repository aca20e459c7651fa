"""
`--data=mural`: large pictures of four small scenes each, whose things are too small to be told apart at the encoder's
size. It shows what --tiles is worth (docs/data.md). Called by recipes.py. A reader of the lessons need not know it.
"""
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from plumbing.records import Records, hash_keys
from plumbing.strange import Drawing
from plumbing.world import Scene, make_scene, to_messages

RECORDS = 20_000
QUARTERS = "top left", "top right", "bottom left", "bottom right"


@dataclass(frozen=True)
class Mural(Drawing):
    "Four scenes of one small thing each. In a tile a thing is as wide as in the world's pictures, in the square half."
    scenes: tuple
    sides = 2

    def draw(self, px: int) -> Image.Image:
        image = Image.new("RGB", (px, px))
        for k, scene in enumerate(self.scenes):
            image.paste(scene.draw(px // 2), (k % 2 * (px // 2), k // 2 * (px // 2)))
        return image


def draw_scene(rng: random.Random) -> Scene:
    while len((scene := make_scene(rng)).things) > 1:
        pass
    return replace(scene, things=(replace(scene.things[0], size="small"), ))


def mural(i: int) -> dict:
    "Record i: a picture, and what is in each quarter, in random order."
    rng = random.Random(f"mural {i}")
    scenes = tuple(draw_scene(rng) for _ in QUARTERS)
    turns = [(f"What is at the {QUARTERS[k]}?", scenes[k].things[0].kind) for k in rng.sample(range(4), 4)]
    messages = to_messages((f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:])
    return {"id": f"mural/{i}", "messages": messages, "images": [Mural(scenes)], "kind": "mural"}


def murals() -> Records:
    "The same records on every machine, each with a picture of its own."
    # The number of a record takes the place of its picture's hash: to draw all of them first would take seconds.
    keys = [hash_keys({"images": [], "id": f"mural/{i}"})[0] for i in range(RECORDS)]
    return Records(mural, np.arange(RECORDS)[:, None], np.array(keys, np.uint64), np.ones(RECORDS, int))
