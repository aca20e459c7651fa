"""
Everything that comes from disk or network, and a world that needs neither.

    python data.py                           # draw a contact sheet of the built-in world: world.png
    python data.py --data=my.json            # check your own records: read all, open every picture, show three
    python data.py --download=qwen2.5-1.5b   # fetch published weights, and the vision tower for them: 3.1 + 1.3 GB
    python data.py --download=list           # what can be fetched by a short name; anything else by Org/Name

In the order of this file:
  drawing     things and backgrounds as tables of flat shapes, painted at any size
  the world   scenes, captions, ten kinds of questions: an endless data set without label noise, with two held-out
              splits
  reading     LLaVA-style JSON, JSONL, TSV benchmarks, tar shards, plain text -> records
  packing     documents of all lengths -> rows of one fixed shape, and the loader that feeds training
  scoring     the official rules of the benchmarks
  downloads   weights and tokenizers from the Hugging Face hub: resumed, checked, kept

A record is one conversation: {"id", "messages": [{"role", "content"}], "images": [source]}. It is drawn and rendered
when it is its turn.

Left out: streaming from object stores, and shuffling buffers: a record's index alone says what it is, so any order can
be had directly. Several connections at once for one download: its parts could not be resumed from its length alone.
"""
import argparse
import ast
import base64
import cmath
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from string import ascii_uppercase
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
import requests
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# Drawing: things and backgrounds are tables of flat shapes, so that a picture is the same at any size.

COLOURS = {"red": (222, 48, 48), "orange": (250, 140, 30), "yellow": (255, 218, 50), "green": (58, 166, 74),
           "blue": (32, 118, 226), "purple": (150, 80, 206), "pink": (255, 140, 196)}
# Seven hues that stay apart on every background; no brown, grey or white, which things and backgrounds need themselves.
DARK, EDGE = (0.86, 0.78, 0.75), (0.45, 0.36, 0.42)  # factors on red, green and blue: a thing's shades from its colour
FIXED = {"white": (255, 252, 244), "ink": (46, 40, 52), "wood": (128, 88, 62)}  # the same on every thing

# Shapes are painted one over the other in a box of 100 x 100 units, 0,0 is its top left corner:
#   oval SHADE x,y w,h              centre, half width and half height
#   poly SHADE r x,y x,y ...        straight sides, corners rounded with radius r
#   blob SHADE r x,y x,y ...        a smooth closed curve through the points
#   line SHADE r x,y x,y ...        a smooth stroke through the points, 2 r wide
#   dots SHADE r x,y x,y ...        a disc of radius r on every point
#   star SHADE r x,y outer,inner n  n rays around x,y
# A thing may be 11 pixels wide in training: its colour must cover most of it, and no two kinds may share an outline.
SHAPES = {
    # The cat sits and looks at us, ears up. The dog stands and looks aside, one ear hanging.
    "cat": "line body 5 64,88 84,88 91,74 84,60; blob body 0 46,50 64,62 71,84 62,95 46,96 30,95 21,84 28,62;"
           "oval light 46,82 11,12; poly body 3 16,42 17,8 38,27; poly body 3 76,42 75,8 54,27; oval body 46,44 33,23;"
           "poly light 1 20,31 21,17 30,25; poly light 1 72,31 71,17 62,25; oval light 46,54 11,8;"
           "poly ink 1 43,50 49,50 46,53; oval ink 33,41 5,6.5; oval ink 59,41 5,6.5; dots white 1.6 34.5,39 60.5,39;"
           "line ink 0.8 25,52 6,48; line ink 0.8 25,56 6,60; line ink 0.8 67,52 86,48; line ink 0.8 67,56 86,60",
    "dog": "line body 4.5 16,58 8,48 8,32; line dark 6 31,72 31,90; line dark 6 64,72 64,90;"
           "blob body 3 14,58 34,51 62,48 71,58 66,72 40,73 20,75; line body 12 63,50 65,36; line body 6 19,70 19,90;"
           "line body 6 53,70 53,90; oval body 67,29 20,20; line light 9 77,37 85,37; line ink 1 80,42 87,43 92,40;"
           "dots ink 5 92,31; dots ink 3.4 73,24; line white 2.6 54,57 63,61 73,58;"
           "blob dark 2 53,12 59,22 57,42 49,52 42,43 45,22",
    "fish": "poly dark 4 66,52 92,26 85,52 92,78; blob dark 2 26,32 42,13 62,16 60,34;"
            "blob dark 2 36,74 52,90 60,84 54,70; blob body 0 5,53 20,33 42,26 64,36 76,52 64,68 42,78 20,72;"
            "line light 2.5 44,36 50,52 44,68; line light 2.5 58,42 62,52 58,62; dots white 7.5 23,46;"
            "dots ink 4 21,46; line ink 1.2 9,60 15,63 21,61",
    "bird": "line ink 1.8 44,76 44,94 54,95; line ink 1.8 58,76 58,94 68,95; poly dark 3 26,62 6,46 11,68 30,74;"
            "poly ink 2 82,25 96,32 82,39; blob body 2 66,7 84,20 85,44 74,70 50,82 28,74 20,60 36,52 48,38 50,16;"
            "blob light 0 82,46 72,68 54,78 60,58; blob dark 1 24,48 44,44 60,52 56,66 42,70;"
            "dots white 5.5 69,25; dots ink 3.4 70,25",
    "house": "poly dark 1 68,16 80,16 80,40 68,40; poly body 1 15,46 85,46 85,95 15,95; poly dark 3 50,8 94,47 6,47;"
             "dots light 6 50,31; poly light 1 24,58 40,58 40,74 24,74; line body 1 32,57 32,75;"
             "line body 1 23,66 41,66; poly white 2 54,62 72,62 72,94 54,94; dots ink 1.8 67,79",
    "tree": "poly wood 2 44,58 56,58 60,95 40,95; dots body 19 26,50 74,50; dots body 22 36,28 64,28 50,50;"
            "line dark 2 30,60 40,64 50,60; line dark 2 62,52 70,54 78,48;"
            "line light 3 24,27 30,18 38,14; line light 2 52,38 58,34 64,35",
    "car": "blob body 2 18,50 28,30 42,25 60,26 76,48; poly body 8 14,52 80,50 89,58 89,70 12,70;"
           "poly white 2 32,37 44,35 44,46 27,46; poly white 2 53,35 59,36 67,46 53,46; line dark 1.6 8,66 92,66;"
           "line dark 1.4 52,54 57,54; dots white 3.5 90,58; dots ink 11 28,78 73,78; dots white 4.5 28,78 73,78",
    "sun": "star body 1.5 50,50 45.5,25 8; dots dark 28 50,50; dots body 26 50,50; dots ink 3.2 41,46 59,46;"
           "dots light 4 34,55 66,55; line ink 1.4 41,56 50,62 59,56",
    "star": "star body 4 50,54 44,20 5; line light 2 49,24 44,40",
    "circle": "dots body 43 50,50; line light 3 18,41 21,34 27,27 34,21 41,18",
    "square": "poly body 3 9,9 91,9 91,91 9,91; poly light 3 20,50 20,20 50,20 20,20",
    "triangle": "poly body 4 50,12 92,86 8,86; line light 3 26,70 45,36",
}
KINDS = list(SHAPES)

# Colour at the top, colour at the bottom, shapes. All pale or dull, so that every colour shows on them.
BACKGROUNDS = {
    "sky": ("b2d8f0", "eaf6f8",
            "oval f6fbfd 22,18 12,5; oval f6fbfd 30,15 8,6; oval f6fbfd 76,27 11,4; oval f6fbfd 69,25 6,5;"
            "blob c2dab2 0 -30,80 20,62 60,74 110,66 140,120 -30,120; dots ecf0de 0.7 8,74 34,72 17,68;"
            "blob aece9c 0 -30,76 30,82 80,72 130,78 140,130 -30,130; dots ecf0de 0.8 8,88 24,95 45,90 63,84 78,94"),
    "night": ("1a1e3e", "424872",
              "dots e6e8f0 0.6 8,9 27,22 45,7 61,26 83,12 93,38 14,47 38,40 72,52;"
              "blob 34405c 0 -30,80 30,70 70,82 120,72 140,130 -30,130;"
              "blob 2a364e 0 -30,92 30,88 70,80 120,90 140,130 -30,130"),
    "sand": ("c8e4f2", "e6f2f2",
             "poly 92c4d0 0 -5,32 105,32 105,60 -5,60; line f2f8f4 2 -5,54 20,51 45,55 75,51 105,54;"
             "blob eedebc 0 -30,54 20,53 45,57 75,53 130,56 140,130 -30,130;"
             "dots decaa4 0.8 9,68 22,90 37,76 56,93 70,70 91,84"),
    "plain": ("faf6ec", "f2ebdc", "dots e4dac8 0.5 17,17 50,17 83,17 17,50 50,50 83,50 17,83 50,83 83,83"),
    "room": ("e8dad2", "ece0d8",
             "dots dcccc2 1.2 10,8 30,8 50,8 70,8 90,8 20,24 40,24 60,24 80,24 10,40 30,40 50,40 70,40 90,40;"
             "dots dcccc2 1.2 20,56 40,56 60,56 80,56; poly c4aa94 0 -5,70 105,70 105,105 -5,105;"
             "line f8f2ea 1.5 -5,70 105,70; oval d6c0b0 50,87 38,9; oval ccb4a4 50,87 30,6.5"),
    "snow": ("c0d2e4", "e2eaf2",
             "blob e4ecf4 0 -30,70 15,54 50,66 90,52 130,70 140,130 -30,130;"
             "blob f2f6fa 0 -30,66 25,78 70,70 130,82 140,130 -30,130;"
             "dots f8fbfd 0.8 10,14 30,34 48,10 66,30 88,18 6,42"),
}
TINTS = [(1, 1, 1), (1.01, 0.97, 1), (0.96, 1, 1.02), (1, 1, 0.96)]  # factors again; odd tints are mirrored as well


def shaded(colour, factors: tuple) -> tuple:
    return tuple(min(255, round(c * f)) for c, f in zip(colour, factors))


def curve(p: list[complex], closed: bool) -> list[complex]:
    "The Catmull-Rom spline, a chain of cubics through all the points, in twelve straight pieces from point to point."
    p = p[-1:] + p + p[:2] if closed else p[:1] + p + p[-1:]
    # complex numbers as points: one product and one sum serve x and y at once
    return [b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - 3 * c + d - a)))
            for a, b, c, d in zip(p, p[1:], p[2:], p[3:]) for t in (i / 12 for i in range(13))]


def paint(image: Image.Image, shapes: str, colour_of, grow: float = 0) -> None:
    "colour_of(shade) -> RGB, or None to leave the shape out. grow: units added to each shape on all sides."
    pen, unit = ImageDraw.Draw(image), image.width / 100  # pixels per unit
    for shape in shapes.split(";"):
        form, shade, *numbers = shape.replace(",", " ").split()
        colour, (r, *v) = colour_of(shade), [float(n) for n in numbers]
        if colour is None:  # the outline leaves out what is dark enough by itself
            continue
        if form == "oval":
            x, (y, w, h) = r, v
            pen.ellipse([n * unit for n in (x - w - grow, y - h - grow, x + w + grow, y + h + grow)], colour)
            continue
        points, r = [complex(x, y) for x, y in zip(v[::2], v[1::2])], round((r + grow) * unit)
        if form == "star":  # outer and inner points in turn; the first one is straight up
            x, y, *radii, n = v
            points = [complex(x, y) + cmath.rect(radii[i % 2], math.pi * (i / n - 0.5)) for i in range(2 * int(n))]
        points = curve(points, form == "blob") if form in ("blob", "line") else points
        points = [(round(p.real * unit), round(p.imag * unit)) for p in points]
        if form in ("poly", "blob", "star"):
            pen.polygon(points, colour)
            points.append(points[0])
        if form != "dots":
            pen.line(points, colour, width=2 * r + 1)  # as wide as the discs: from -r to r, both included
        for x, y in points:  # round ends and corners
            pen.ellipse((x - r, y - r, x + r, y + r), colour)


@lru_cache(maxsize=1024)  # a training run needs 12 kinds x 7 colours x 3 sizes x 2 directions = 504
def sprite(kind: str, colour: str, px: int, flip: bool = False) -> Image.Image:
    "One thing, px x px, RGBA. Drawn larger and then averaged, which makes smooth edges: Pillow's pen has none."
    body, big = COLOURS[colour], max(4 * px, 256)
    shades = FIXED | {"body": body, "dark": shaded(body, DARK), "light": tuple((c + 255) // 2 for c in body)}
    image = Image.new("RGBA", (big, big))
    # The outline is the thing itself in one dark colour and a little larger. Ink is dark enough without one.
    paint(image, SHAPES[kind], lambda shade: None if shade == "ink" else shaded(body, EDGE), grow=2.5)
    paint(image, SHAPES[kind], shades.get)
    image = image.resize((px, px), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@lru_cache(maxsize=64)  # 6 names x 4 tints = 24 for one size
def background(name: str, tint: int, px: int) -> Image.Image:
    *ends, shapes = BACKGROUNDS[name]
    big, colour_of = max(4 * px, 256), lambda code: shaded(bytes.fromhex(code), TINTS[tint])
    # A gradient from top to bottom first, then the shapes over it.
    top, bottom = (Image.new("RGB", (big, big), colour_of(code)) for code in ends)
    image = Image.composite(bottom, top, Image.linear_gradient("L").resize((big, big)))  # 0 = top, 255 = bottom
    paint(image, shapes, colour_of)
    image = image.resize((px, px), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if tint % 2 else image


# ----------------------------------------------------------------------------------------------------------------------
# The built-in world: scenes that are drawn and described by code. No download, no label noise, endless, and every
# answer checkable.

PAIRS = [(colour, kind) for kind in KINDS for colour in COLOURS]
# 12 of 84: each kind lacks one colour in training
HELD_OUT = {p for i, p in enumerate(PAIRS) if (i // 7 * 3 + i % 7) % 7 == 0}
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
SIZES = {"small": 0.22, "medium": 0.275, "large": 0.33}  # sides, of the picture's side
PLACES = ["top left", "top centre", "top right", "middle left", "centre", "middle right", "bottom left",
          "bottom centre", "bottom right"]
WHERE = {"sky": "in a meadow", "night": "at night", "sand": "on a beach", "plain": "on plain paper",
         "room": "in a room", "snow": "in the snow"}
MOST = 4  # things in one picture


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str
    cell: int       # 0 to 8, row by row
    x: float        # centre, in picture sides
    y: float
    flip: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    things: tuple   # in reading order
    background: str
    tint: int

    def draw(self, px: int) -> Image.Image:
        picture = background(self.background, self.tint, px).copy()  # the cached one must stay clean
        for t in self.things:
            thing = sprite(t.kind, t.colour, max(1, round(SIZES[t.size] * px)), t.flip)
            corner = round(t.x * px - thing.width / 2), round(t.y * px - thing.height / 2)
            picture.paste(thing, corner, thing)  # its transparency is the mask
        return picture

    def count(self, word: str) -> int:
        "How many things are of this kind, colour, or 'colour kind'."
        return sum(word in (t.kind, t.colour, t.name) for t in self.things)


def make_scene(rng: random.Random, new_pairs: bool = False) -> Scene:
    """
    One to four things on a lightly jittered 3 x 3 grid. In half of the scenes kinds and colours come from small pools,
    so that there is something to count and the same kind stands there in several colours: knowing what is present is
    not enough then, kind, colour and place must be bound to each other. new_pairs: half of the things are HELD_OUT
    pairs, which training never shows.
    """
    n = rng.randint(1, MOST)
    pool = rng.randint(1, 3) if rng.random() < 0.5 else 12
    # pool 1: all of one kind and one colour; 12: anything goes
    kinds, colours = rng.sample(KINDS, pool), rng.sample(list(COLOURS), min(pool, 7))
    allowed = [(c, k) for c, k in SEEN if c in colours and k in kinds] or SEEN
    pairs = [rng.choice(allowed) for _ in range(n)]
    if new_pairs:  # the others are familiar: a scene of nothing but new things could be told from training at a glance
        pairs[:(n + 1) // 2] = [rng.choice(sorted(HELD_OUT)) for _ in range((n + 1) // 2)]
    things = []
    for (colour, kind), cell in zip(pairs, rng.sample(range(9), n)):  # no two things in one cell, so none overlap
        size = rng.choice(list(SIZES))
        room = 0.15 * (1 / 3 - SIZES[size])  # how far from the middle of its cell
        x, y = (cell % 3 + 0.5) / 3 + rng.uniform(-room, room), (cell // 3 + 0.5) / 3 + rng.uniform(-room, room)
        things.append(Thing(colour, kind, size, cell, x, y, rng.random() < 0.5))
    return Scene(tuple(sorted(things, key=lambda t: t.cell)), rng.choice(list(WHERE)), rng.randrange(4))


def a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(word: str) -> str:
    return word if word.endswith("fish") else word + "s"


def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """
    Every thing with place, size and colour, in reading order: "2 things at night. Top left: small red cat. Centre: blue
    dog." The place comes first: then each word that follows can be looked up in one known spot of the picture. With
    rng: in any order.
    """
    n, things = len(scene.things), list(scene.things)
    # Medium goes without saying: a word that is always there would be learned from the grammar alone.
    if rng:
        rng.shuffle(things)
    parts = [f"{PLACES[t.cell].capitalize()}: {t.size + ' ' if t.size != 'medium' else ''}{t.name}." for t in things]
    return f"{n} thing{'s' * (n > 1)} {WHERE[scene.background]}. " + " ".join(parts)


def summarize(scene: Scene) -> str:
    "What there is, and how often: \"A red cat and 2 blue fish on a beach.\""
    counts = Counter(t.name for t in scene.things)  # {"red cat": 2, ...}, in reading order
    *parts, last = [a(name) if n == 1 else f"{n} {plural(name)}" for name, n in counts.items()]
    text = " and ".join(filter(None, (", ".join(parts), last))) + f" {WHERE[scene.background]}."
    return text[0].upper() + text[1:]


def several(word: str) -> str:
    return plural(word) if word in KINDS else f"{word} things"


def unique(scene: Scene, rng: random.Random, focus: set = frozenset(), but=None) -> tuple[Thing | None, str]:
    """
    A thing that can be named without doubt, and its name: 'cat' if it is the only cat, else 'red cat'. Things in focus
    go first.
    """
    # Two red cats cannot be told apart by words; a question about one of them would have two answers.
    things = preferred([t for t in scene.things if scene.count(t.name) == 1 and t != but], focus)
    if not things:
        return None, ""
    thing = rng.choice(things)
    return thing, thing.kind if scene.count(thing.kind) == 1 and rng.random() < 0.5 else thing.name


def preferred(things, focus: set):
    "Those that show a pair in focus, if any do; else all."
    return [t for t in things if (t.colour, t.kind) in focus] or things


def absent(scene: Scene, rng: random.Random, focus: set = frozenset()) -> str | None:
    "A 'colour kind' that is not there although its colour and its kind are, if possible: only binding tells."
    near = [(t.colour, u.kind) for t in scene.things for u in scene.things]
    near += [(t.colour, rng.choice(KINDS)) for t in scene.things] \
        + [(rng.choice(list(COLOURS)), t.kind) for t in scene.things]
    near = [p for p in near if not scene.count(" ".join(p)) and (bool(focus) or p not in HELD_OUT)]
    near = [p for p in near if p in focus] or [p for p in sorted(focus) if not scene.count(" ".join(p))] or near
    return " ".join(rng.choice(near)) if near else None


def sides(t: Thing | None, u: Thing | None) -> list[tuple]:
    "[(\"left\", \"right of\", \"left\"), (\"above\", \"below\", \"below\")]: t is left of u and below it."
    # Only between things in different columns or rows (cell = 3 * row + column).
    axes = [("left", "right of", t.cell % 3, u.cell % 3), ("above", "below", t.cell // 3, u.cell // 3)] if u else []
    return [(one, two, one if mine < other else two.split()[0]) for one, two, mine, other in axes if mine != other]


# Captions. Each function returns one text about a scene, or "" where it has nothing to say.

def per_thing(word: str, sentence: str):
    "A writer of one sentence for each thing that `word` (its kind or name) picks out without doubt, in any order."
    def write(scene: Scene, rng: random.Random) -> str:
        # "The cat is red" must not be said of two cats, one of them blue.
        things = [t for t in scene.things if scene.count(getattr(t, word)) == 1]
        return " ".join(sentence.format(t, place=PLACES[t.cell]) for t in rng.sample(things, len(things)))
    return write


def count_list(scene: Scene, rng: random.Random) -> str:
    "\"Cats: 2. Red things: 1. Dogs: 0.\""
    there = {word for t in scene.things for word in (t.kind, t.colour)}
    # sorted: a set's order differs from run to run, and with it all that the dice give after it
    words = rng.sample(sorted(there), min(4, len(there))) + rng.sample([*KINDS, *COLOURS], 2)
    rng.shuffle(words)
    return " ".join(f"{several(word).capitalize()}: {scene.count(word)}." for word in dict.fromkeys(words))


def check_list(scene: Scene, rng: random.Random) -> str:
    "\"Red cat: yes. Blue cat: no.\""
    names = [rng.choice(scene.things).name if rng.random() < 0.5 else absent(scene, rng) for _ in range(6)]
    return " ".join(f"{name.capitalize()}: {'yes' if scene.count(name) else 'no'}."
                    for name in dict.fromkeys(names) if name)


def relation_list(scene: Scene, rng: random.Random) -> str:
    "\"Red cat left or right of dog: left.\""
    out = []
    for _ in range(4):
        t, name = unique(scene, rng)
        u, other = unique(scene, rng, but=t)
        out += [f"{name.capitalize()} {one} or {two} {other}: {answer}." for one, two, answer in sides(t, u)]
    return " ".join(dict.fromkeys(out))


# What to ask for, who writes it, how often. What a text says first is what the next word can be looked up by: a model
# that only reads "small red cat" learns to go from a place to a colour and on to a kind, and cannot say what colour the
# cat has. Hence all the orders.
CAPTIONS = [
    (["Describe the picture.", "What do you see, and where?", "Describe everything in this image."],
     lambda scene, rng: describe(scene), 10),
    (["What is in the picture?", "Write a short caption.", "Say briefly what this shows."],
     lambda scene, rng: summarize(scene), 1),
    (["Name the colours."], per_thing("kind", "The {0.kind} is {0.colour}."), 1),
    (["Name the sizes."], per_thing("kind", "The {0.kind} is {0.size}."), 1),
    (["Where are the things?"], per_thing("kind", "The {0.kind} is at the {place}."), 1),
    (["Where is each one?"], per_thing("name", "The {0.name} is at the {place}."), 1),
    (["Count everything."], count_list, 1),
    (["What is there, and what is not?"], check_list, 1),
    (["How do they stand to each other?"], relation_list, 1),
]


# Questions. Each function returns (wordings of the question, answer), or None where the scene has no such question.
# Several wordings for each kind: with one, the model would learn the sentence instead of the question.
# `focus`: pairs of colour and kind that it should be about. The wanted answer is drawn first and the question made to
# fit: the question alone gives nothing away.

def ask_count(scene, rng, focus):
    wordings = ["How many things are there?", "How many things do you see in total?", "Count all the things."]
    return wordings, str(len(scene.things))


def ask_number(scene, rng, focus):
    "How many of one kind or colour; 0 to 3 equally often."
    target = rng.randrange(4)
    # Kinds and colours in turn: most words that nothing in a scene fits are kinds, so "cats" alone would say 0.
    words = [w for w in (KINDS if rng.random() < 0.5 else COLOURS) if scene.count(w) == target]
    if words:
        what = several(rng.choice(words))
        return [f"How many {what} are there?", f"What is the number of {what}?", f"Count the {what}."], str(target)


def ask_property(given: str, wanted: str, *wordings: str):
    def ask(scene, rng, focus):
        # Only of what stands there once: of the one cat its colour, of the one red thing its kind. Others are around
        # it, so the picture's colours alone do not answer it.
        things = preferred([t for t in scene.things if scene.count(getattr(t, given)) == 1], focus)
        if things:
            t = rng.choice(things)
            return [wording.format(getattr(t, given)) for wording in wordings], getattr(t, wanted)
    return ask


def ask_exists(scene, rng, focus):
    # The answer first, then a question that it fits: yes and no come equally often.
    yes = rng.random() < 0.5
    name = rng.choice(preferred(scene.things, focus)).name if yes else absent(scene, rng, focus)
    if name:
        name = a(name)
        return [f"Is there {name}?", f"Do you see {name}?", f"Does the picture show {name}?"], "yes" if yes else "no"


def ask_relation(scene, rng, focus):
    "Left or right, above or below."
    t, name = unique(scene, rng, focus)
    u, other = unique(scene, rng, but=t)
    if u:
        one, two, answer = rng.choice(sides(t, u))
        between = f"{one} or {two} the {other}?"
        return [f"Is the {name} {between}", f"Where is the {name}, {between}"], answer


def ask_place(scene, rng, focus):
    t, name = unique(scene, rng, focus)
    if t:
        return [f"Where is the {name}?", f"In which part of the picture is the {name}?",
                f"Where do you see the {name}?"], PLACES[t.cell]


def ask_compare(scene, rng, focus):
    "Of which are there more? Both occur, and not equally often."
    words = [w for w in (KINDS if rng.random() < 0.5 else COLOURS) if scene.count(w)]
    pairs = [(v, w) for v in words for w in words if scene.count(v) > scene.count(w)]
    if pairs:
        more, fewer = map(several, rng.choice(pairs))
        one, two = (more, fewer) if rng.random() < 0.5 else (fewer, more)
        return [f"Which are there more of, {one} or {two}?", f"What is more common, {one} or {two}?",
                f"Are there more {one} or more {two}?"], more


def ask_size(scene, rng, focus):
    # One thing must stand out: of two large ones neither is "the largest".
    sizes = [SIZES[t.size] for t in scene.things]
    ends = [(word, end) for word, end in (("largest", max(sizes)), ("smallest", min(sizes))) if sizes.count(end) == 1]
    if len(sizes) > 1 and ends:
        word, end = rng.choice(ends)
        t = scene.things[sizes.index(end)]
        if rng.random() < 0.5:
            return [f"What colour is the {word} thing?"], t.colour
        return [f"What is the {word} thing?", f"Which thing is the {word}?"], t.kind


def ask_choice(scene, rng, focus):
    "Multiple choice: one of three is in the picture, the others nearly are."
    right = rng.choice(preferred(scene.things, focus)).name
    wrong = {absent(scene, rng, focus) for _ in range(4)} - {None}
    if len(wrong) >= 2:
        options, at = rng.sample(sorted(wrong), 2), rng.randrange(3)
        options.insert(at, right)  # the letter says nothing by itself: each place is as likely
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
        return [f"{question}\n{lines}\nAnswer with the letter." for question in
                ("Which of these is in the picture?", "What can you see?", "Which one is there?")], "ABC"[at]


# How often a kind is asked in training, and who asks. What needs two looks, or counting, is learned last and asked
# most. But not much more: one run with relations at 4 left number and choice unlearned as well (70 % in all).
QUESTIONS = {
    "count": (0.5, ask_count), "number": (2.0, ask_number),
    "colour": (1.0, ask_property("kind", "colour", "What colour is the {}?", "Which colour does the {} have?",
                                 "The {} is of what colour?")),
    "kind": (1.0, ask_property("colour", "kind", "What is the {} thing?", "Which thing is {}?",
                               "What kind of thing is {}?")),
    "exists": (1.0, ask_exists), "relation": (2.0, ask_relation), "place": (1.5, ask_place),
    "compare": (1.2, ask_compare), "size": (0.7, ask_size), "choice": (1.5, ask_choice)}


def ask(kind: str, scene: Scene, rng: random.Random, focus: set = frozenset()) -> tuple[str, str] | None:
    "-> (question, answer)"
    wordings, answer = QUESTIONS[kind][1](scene, rng, focus) or ([], "")
    if wordings:  # one wording takes no throw of the dice
        return rng.choice(wordings) if len(wordings) > 1 else wordings[0], answer


def conversation(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


class World:
    """
    An endless data set: record i is made from (seed, split, i) alone, the same on every machine, in any order, on any
    rank.
    split: "train"; "scenes" (held out: other scenes); "pairs" (held out: colour-kind pairs that training never shows).
    task: "text" (prose and text-only dialogues, stage 1), "captions" (2), "chat" (3, two questions a picture), "exam"
    (one question).
    """

    def __init__(self, task: str, split: str = "train", seed: int = 0, kinds: list[str] = ()):
        self.task, self.split, self.seed, self.kinds = task, split, seed, list(kinds or QUESTIONS)
        for kind in self.kinds:
            need(kind in QUESTIONS, f"{kind!r} is not a kind of question; choose from {', '.join(QUESTIONS)}")

    def __getitem__(self, i: int) -> dict:
        # A string seeds by its hash (SHA-512), the same in every Python and process; a tuple's hash would not be.
        rng = random.Random(f"{self.seed}/{self.split}/{self.task}/{i}")
        record = {"id": f"world/{self.split}/{self.seed}/{i}", "images": []}
        if self.task == "exam":
            return record | self.exam(i, rng)
        scene = make_scene(rng)
        # A weighted shuffle: u^(1/w) with u uniform comes first with a chance in proportion to w.
        kinds = sorted(self.kinds, key=lambda kind: rng.random() ** (1 / QUESTIONS[kind][0]), reverse=True)
        # Lazily, until there are two: some kinds of questions do not fit some scenes.
        questions = list(itertools.islice(filter(None, (ask(kind, scene, rng) for kind in kinds)), 2))
        text = ""
        while not text:  # not every scene has something to say in every form
            prompts, write, _ = rng.choices(CAPTIONS, [weight for *_, weight in CAPTIONS])[0]
            text = write(scene, rng)
        caption = rng.choice(prompts), text
        if self.task == "text" and rng.random() < 0.3:
            return record | {"text": f"{describe(scene)} {text}"}
        # A curriculum for stage 3: captions teach the eye, word by word; once it sees, questions teach more.
        turns = [caption] if not questions or self.task == "captions" or rng.random() < max(0.1, 0.9 - i / 15_000) \
            else questions
        messages = conversation(*turns)
        # Stage 1 has no pictures: there a description, in no particular order, is what the questions are about.
        shown = describe(scene, rng) if self.task == "text" else "<image>"
        messages[0]["content"] = f"{shown}\n{messages[0]['content']}"
        return record | {"messages": messages, "images": [] if self.task == "text" else [scene]}

    def exam(self, i: int, rng: random.Random) -> dict:
        "One question, the kinds in turn. In the split of new pairs it is about such a pair wherever it can be."
        kind, focus = self.kinds[i % len(self.kinds)], HELD_OUT if self.split == "pairs" else set()
        # The same dice for the question at every attempt, so that the answer it wants does not depend on which scenes
        # can give it.
        while not (found := ask(kind, scene := make_scene(rng, bool(focus)), random.Random(f"{self.seed}/{i}"), focus)):
            pass
        question, answer = found
        return {"messages": conversation((f"<image>\n{question}", answer)), "images": [scene], "kind": kind,
                "metric": "exact"}


# ----------------------------------------------------------------------------------------------------------------------
# Reading: whatever the file, one record per conversation
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices"}
# A source is a path, a (zip file, member) pair, the picture's bytes or the world's Scene: opened only when its record
# is drawn. The 558,000 pictures of LLaVA's first stage, at 256 x 256 x 3 bytes, would fill 110 GB of memory.

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
END = "<|endoftext|>"  # between two documents of a text file
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CAPTION_PROMPT = "Describe the image."  # asked of a picture that comes with a bare caption
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # LLaVA's words; so are these:
SHORT_PROMPT = "Answer the question using a single word or phrase."
# Part of a benchmark's file name -> the rule that scores it. The first that fits: DocVQA is not scored as VQA is.
FILE_METRICS = {"chartqa": "relaxed", "docvqa": "anls", "infovqa": "anls", "ocrvqa": "exact", "ocrbench": "contains",
                "vqa": "vqa", "pope": "yesno"}
# What reading raises for a file that is missing, cut off, or of another kind than its name says.
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, csv.Error, UnicodeDecodeError)


def need(good, problem: str) -> None:
    if not good:  # no assert: `python -O` drops those, and a user's wrong file needs no traceback
        raise ValueError(problem)


@contextlib.contextmanager
def naming(path):
    """Python's errors rarely say which file was missing, cut off or not text. Inside this block they do."""
    try:
        yield
    except (*BROKEN, json.JSONDecodeError) as error:  # a plain ValueError passes: it has its name already
        raise ValueError(f"{path}: cannot be read ({error}); is it there, complete, and in UTF-8?") from None


def read_json_rows(file):
    """A JSON list, or one JSON value per line -> its items."""
    # The content decides, not the name: POPE's .json files hold one object per line.
    whole = file.readline().lstrip().startswith("[")
    file.seek(0)  # a first line of a list may hold the whole list
    # Lines come one at a time: a shard of C4 unpacks to 800 MB. In a list the parser counts the lines itself.
    for number, text in [(0, file.read())] if whole else enumerate(file, 1):
        try:
            yield from json.loads(text) if whole else [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name}, line {number or error.lineno}: not JSON ({error.msg}); expected a list of "
                             "records or one record per line; fetch the file again if it was cut off") from None


def open_text(path: str):
    # Windows would read with an old code page, and turn accents into gibberish. -sig skips the byte order mark that its
    # editors put first and that a JSON parser refuses.
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig")


@lru_cache(maxsize=8)  # kept open: reading the directory of a big zip takes seconds
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # one per process: a forked worker would share its parent's place in the file


def open_source(source):
    """A source -> what Pillow can open: a path as it is, anything else as a file in memory."""
    if isinstance(source, tuple):
        with naming(" in ".join(reversed(source))):
            source = open_zip(source[0], os.getpid()).read(source[1])
    return io.BytesIO(source) if isinstance(source, bytes) else source


def load_source(source, load):
    """`load` is vision.load_image."""
    # The name is for its errors: "7.jpg in images.zip" can be looked for, an object in memory cannot.
    name = " in ".join(reversed(source)) if isinstance(source, tuple) \
        else source if isinstance(source, str) else "picture"
    return load(open_source(source), name)


def image_finder(path: str):
    """-> the function that turns an image's name in this file into its source, or None. It opens no image."""
    folder = os.path.dirname(os.path.abspath(path))
    # A zip stays packed: half a million small files take hours to unpack, and many disks run out of inodes.
    # The directory at its end says where each member lies, so that one is read without the others.
    archive, members = os.path.join(folder, "images.zip"), {}
    if os.path.exists(archive):
        with naming(archive):
            # macOS packs a hidden companion of each file into that folder. It has the name of a picture, and is none.
            names = [name for name in open_zip(archive, os.getpid()).namelist() if not name.startswith("__MACOSX/")]
        # Who zips a folder puts its name before all others: the zip has images/004/7.jpg, the records say 004/7.jpg.
        # Both are found. The full name is entered last, so it wins where two disagree.
        for depth in range(os.path.commonprefix(names).count("/"), -1, -1):
            members.update((name.split("/", depth)[-1], name) for name in names)

    def find(name: str):
        if name in members:
            return archive, members[name]
        # Some files say images/7.jpg, others 7.jpg.
        places = os.path.join(folder, "images", name), os.path.join(folder, name)
        return next(filter(os.path.isfile, places), None)
    return find


def to_messages(row: dict) -> list[dict]:
    """One row, in any of four layouts -> [{"role", "content"}, ...]."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    for turns, role, content in ("messages", "role", "content"), ("conversations", "from", "value"):
        if turns in row:
            return [{"role": ROLES[turn[role]], "content": turn[content]} for turn in row[turns]]
    if "instruction" in row:
        question, answer = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    else:
        question, answer = row["question"], row["answer"]
    answer = answer[0] if isinstance(answer, list) else answer  # of several right answers, the one to learn
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_record(row: dict, where: str, find) -> dict:
    """One row of a file -> a record that nothing later has to check again."""
    try:
        messages = to_messages(row)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: missing key or unknown role {error}; expected conversations (from, value), "
                         "messages (role, content), instruction and output, or question and answer") from None
    # OpenAI's later files hold lists here: [{"type": "text", "text": ...}, {"type": "image_url", ...}].
    need(all(isinstance(turn["content"], str) for turn in messages),
         f"{where}: the content of a turn is not text; list pictures under images, mark their places by <image>")
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # anywhere else the chat format has no place for it
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    need(roles and roles == ["user", "assistant"] * (len(roles) // 2),
         f"{where}: the turns are {', '.join(roles) or 'none'}; user and assistant must alternate, the assistant last")
    names = row.get("images", row.get("image")) or []  # null, "" and no key at all mean a text-only record
    names = names if isinstance(names, list) else [names]
    # A .tsv or .tar brings the bytes along. str: a name may be a bare number in JSON.
    images = [name if isinstance(name, bytes) else find(str(name)) for name in names]
    lost = [name for name, image in zip(names, images) if image is None]
    need(not lost, f"{where}: no image {lost[:1]} in images/ beside the file, in its own folder, or in images.zip")
    markers = sum(turn["content"].count("<image>") for turn in messages)
    if len(images) == 1 and markers == 0:  # as in LLaVA: a picture without a place comes first
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"], markers = "<image>\n" + first["content"], 1
    # Left to itself, one marker too few shows every later picture to the wrong question, and no number looks wrong.
    need(markers == len(images), f"{where}: {markers} <image> markers, {len(images)} images; write a marker for each")
    # What only scoring needs travels along; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if key in row}
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def read_records(path) -> list[dict]:
    """.json, .jsonl (LLaVA and others), .tsv (VLMEvalKit), .tar (webdataset) -> records. Errors count them from 0."""
    path, find, records = str(path), None, []
    with naming(path):
        if path.endswith(JSON_SUFFIXES):
            with open_text(path) as file:
                # All in memory (LLaVA's 665,000: a few GB), for a split by picture has to see every record first.
                rows, find = list(read_json_rows(file)), image_finder(path)
        else:
            need(path.endswith((".tsv", ".tar")), f"{path}: unknown kind of file; give a .json, .jsonl, .tsv or .tar")
            # Their records carry the pictures themselves, so there is nothing to find.
            rows = (read_tsv if path.endswith(".tsv") else read_tar)(path)
    for index, row in enumerate(rows):
        need(isinstance(row, dict), f"{path}, record {index}: expected an object with keys, found {str(row)[:40]!r}")
        for instance in row.get("instances") or [{}]:  # Self-Instruct: several inputs under one instruction
            whole = {"id": index, **row, **instance}  # the row's own id, if it has one, wins
            records.append(make_record(whole, f"{path}, record {index} (id {whole['id']!r})", find))
    need(records, f"{path}: the file is empty; was its download cut off?")
    return records


def read_tsv(path: str) -> list[dict]:
    """VLMEvalKit's benchmarks: one question per row."""
    #   index  image        question         A    B    answer
    #   7      /9j/4AAQ...  What is it?      cat  dog  B              the picture in base64: letters for bytes
    #   8      7            What colour?               ['red', 'wine']  the picture of row 7; any of two answers
    csv.field_size_limit(2**31 - 1)  # Python stops at 128 KB, less than one picture
    with open(path, newline="", encoding="utf-8-sig") as file:  # newline="": a quoted question may hold line breaks
        rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    missing = {"index", "image", "question", "answer"} - set(rows[0]) if rows else ()
    need(not missing, f"{path}: no column {', '.join(sorted(missing))}; without right answers nothing can be scored")
    name, out = os.path.basename(path).lower(), []
    # A file may have any name (MME, HallusionBench, your own): then the answers tell which rule fits.
    metric = "yesno" if all(row["answer"].lower() in ("yes", "no") for row in rows) else "exact"
    metric = next((rule for part, rule in FILE_METRICS.items() if part in name), metric)
    pictures = {row["index"]: row["image"] for row in rows if len(row["image"]) > 64}  # no picture is that small
    for number, row in enumerate(rows):  # an empty cell, as for options C and D of a two-way question, is ""
        where = f"{path}, record {number} (id {row['index']!r})"
        image, answer = pictures.get(row["index"]) or pictures.get(row["image"]), row["answer"]
        need(image, f"{where}: image {row['image']!r} is neither base64 nor the index of a row with a picture")
        # "['5', 'five']" is two right answers, "[sic" just text. The original calls eval, which would run any code.
        with contextlib.suppress(ValueError, SyntaxError):
            answer = [str(one) for one in ast.literal_eval(answer)] if answer.startswith("[") else answer
        choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        need(answer and (not choices or answer in choices), f"{where}: answer {answer!r} is empty or not an option")
        # Without such a line a chatty model is right in a whole sentence, which "exact" counts as wrong.
        suffix = CHOICE_PROMPT if choices else SHORT_PROMPT if metric != "contains" else ""  # OCRBench asks plainly
        lines = "<image>", row.get("hint"), row["question"], *map(". ".join, choices.items()), suffix
        out.append({"id": row["index"], "images": [base64.b64decode(image)], "question": "\n".join(filter(None, lines)),
                    "answer": answer, "metric": "choice" if choices else metric, "choices": choices,
                    "kind": row.get("category", "")})
    return out


def read_tar(path: str) -> list[dict]:
    """webdataset: 7.jpg with 7.json (a record) or 7.txt (a caption) is record 7."""
    # A tar has no directory as a zip has: to find one member, the headers of all before it are read. So this is done
    # once, and the pictures stay in memory: as large as the shard, by custom about 1 GB.
    samples, rows = {}, []  # samples: {"7": {"jpg": b"...", "txt": b"..."}}
    with tarfile.open(path) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            # Cut at the first dot of the name, not of its folders: v1.0/7.jpg -> v1.0/7 and jpg.
            stem, suffix = re.fullmatch(r"(.*?[^/.]*)\.?([^/]*)", member.name).groups()
            samples.setdefault(stem, {})[suffix.lower()] = tar.extractfile(member).read()
    for stem, files in samples.items():
        with naming(f"{path}, {stem}"):
            row = json.loads(files.get("json", "{}"))
            if "txt" in files and not {"messages", "conversations"} & row.keys():
                row = {"instruction": CAPTION_PROMPT, "output": files["txt"].decode().strip()}
        pictures = [files[suffix] for suffix in files if suffix in ("jpg", "jpeg", "png", "webp")]
        need(pictures or "txt" not in files, f"{path}, {stem}: a caption without its .jpg, .png or .webp")
        rows.append({**row, "id": stem, "images": pictures})
    return rows


def cut_documents(file):
    """A text file -> its documents: what END marks part; without marks, paragraphs of some thousand characters."""
    # TinyStories has marks, Shakespeare's plays have none. Uncut they would be one document: it could not be shuffled,
    # and nothing of it held out.
    marked = any(END in line for line in file)  # a first pass, which ends at the first mark
    file.seek(0)
    lines, size = [], 0  # of the document being collected, in characters
    for line in file:
        *ended, line = line.split(END)  # a line can end several documents, or (mostly) none
        for last in ended:
            yield "".join(lines + [last]).strip("\n")
            lines = []
        lines.append(line)
        size += len(line)
        # At a blank line if there is one in time. 4,000 characters of English are about 1,000 of Qwen's tokens.
        if not marked and size > (16_000 if line.strip() else 4_000):
            yield "".join(lines).strip("\n")
            lines, size = [], 0
    yield "".join(lines).strip("\n")


def read_text(path):
    """.txt, .jsonl and .json.gz with {"text"}, .json with a list of strings, or a folder of them -> documents."""
    # sorted: a folder lists its files in another order on every disk, and a document is known by its number.
    paths = sorted(map(str, Path(path).rglob("*"))) if os.path.isdir(path) else [str(path)]
    paths = [one for one in paths if one.endswith((".txt", *JSON_SUFFIXES))]
    need(paths, f"{path}: no text here; give a .txt, .json, .jsonl or .json.gz file, or a folder of them")
    for path in paths:
        found = False
        with naming(path), open_text(path) as file:
            for index, row in enumerate((cut_documents if path.endswith(".txt") else read_json_rows)(file)):
                text = row.get("text") if isinstance(row, dict) else row
                need(isinstance(text, str), f"{path}, record {index}: neither a string nor an object with a text")
                if text.strip():
                    found = True
                    yield text
        need(found, f"{path}: the file is empty; was its download cut off?")


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """"a.json:2,b.json" -> [("a.json", 2.0), ("b.json", 1.0)]."""
    # From the right: C:\a.json has a colon of its own. Trap: such a path needs its weight too, C:\a.json:1.
    pairs = [(part.strip().rsplit(":", 1) + ["1"])[:2] for part in text.split(",")]
    for name, weight in pairs:
        # float() alone would take "nan" and "inf", and every share would be nan.
        need(name.strip() and re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0,
             f"{text!r}: expected NAME or NAME:WEIGHT, joined by commas, weights above 0; found {name!r}:{weight!r}")
    return [(name.strip(), float(weight)) for name, weight in pairs]


def picture_name(source) -> str:
    """The same text for the same picture, of which sets often have copies under other names."""
    if isinstance(source, tuple):  # a zip's directory has the checksums: no picture is read for them
        info = open_zip(source[0], os.getpid()).getinfo(source[1])
        return f"{info.CRC} {info.file_size}"
    if isinstance(source, bytes):
        return f"{zlib.crc32(source)} {len(source)}"
    # In a folder the name must do, or 100 GB would be read. With one folder's name: train2017/7.jpg is not vg/7.jpg.
    # Without those above, or the split would differ from machine to machine.
    return "/".join(Path(source).parts[-2:])


def split_by_image(records: list[dict], fraction=0.05, at_most=500) -> tuple[list[dict], list[dict]]:
    """-> (train, held out), which share no picture."""
    # VQAv2 asks five questions about each photo. Split by record, nearly every held-out photo would be seen in
    # training, and the score would reward memory. A record without pictures stands for itself.
    names = [{picture_name(source) for source in record["images"]} or {f"id {record['id']}"} for record in records]
    # In the order of their hashes: as good as random, yet it depends neither on the file's order nor, as Python's own
    # hash() does, on the process. Records that are added later leave nearly all the others on their side.
    pictures = sorted(set().union(*names), key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    chosen = set(pictures[:max(1, round(fraction * len(pictures)))])
    held = [record for record, name in zip(records, names) if name & chosen]
    # A record with pictures a, b is held out for a: now b is used, too. Another with b, c would give b away in
    # training, and is on neither side.
    used = set().union(*(name for name in names if name & chosen))
    train = [record for record, name in zip(records, names) if not name & used]
    need(train, f"{len(records)} records with {len(pictures)} pictures are too few to hold some out; "
                "give a file by --val=")
    return train, held[:at_most]


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: record i, for any i from 0 on, is the same on every machine and every rank
# Arithmetic on i, not iterators: an iterator that was stopped must give again all it gave before, or save its buffers.
# Here one integer is the whole state, and rank r of 4 takes r, r + 4, r + 8, ... without a word to the others.

class Shuffled:
    "Records of a file without end: every pass over them in another order."

    def __init__(self, records: list, seed: int):
        self.records, self.seed = records, seed
        # Remembered, since an order costs a shuffle of the whole file. Two: waiting documents may be of the last pass.
        self.order = lru_cache(maxsize=2)(self.shuffle)

    def shuffle(self, epoch: int) -> list[int]:
        # A text as seed: seed + epoch would give pass 0 of seed 1 the order of pass 1 of seed 0.
        return random.Random(f"{self.seed}/{epoch}").sample(range(len(self.records)), len(self.records))

    def __getitem__(self, i: int) -> dict:
        epoch, at = divmod(i, len(self.records))  # of 3 records, i = 7 is place 1 of pass 2, both counted from 0
        return self.records[self.order(epoch)[at]]


class Mixture:
    """Several data sets in proportion to their weights: record i is of the set that is furthest behind its share."""

    def __init__(self, parts: list[tuple]):
        # Weights 3 and 1 -> sets 0 0 1 0, 0 0 1 0, ... With dice, all throws before i would have to be repeated to know
        # how far its set has come. A table of 1,000 draws, used again and again, says it at once.
        # Trap: a share far below 1/1000 is never drawn.
        self.sets, total = [part for part, _ in parts], sum(weight for _, weight in parts)
        counts, self.round = [0] * len(parts), []  # round: (set, how many of that set came before it)
        for i in range(1000):
            k = max(range(len(parts)), key=lambda k: parts[k][1] / total * (i + 1) - counts[k])
            self.round.append((k, counts[k]))
            counts[k] += 1
        self.counts = counts

    def __getitem__(self, i: int) -> dict:
        rounds, at = divmod(i, len(self.round))
        k, before = self.round[at]
        return self.sets[k][rounds * self.counts[k] + before]  # each set's own records one after another: none left out


def text_records(path: str, encode, end: int, seq_len: int) -> list[dict]:
    "Documents cut into pieces of at most seq_len tokens, each with the id that ends a document where it ends."
    # One token more than a row holds: the last is only a target here, and begins the next piece. So every token but a
    # document's first is learned exactly once. The pieces share a record id, and so stay on one side of a split.
    out = []
    for number, text in enumerate(read_text(path)):
        ids = encode(text) + [end]
        out += [{"id": f"{path} document {number}", "images": [], "ids": ids[at:at + seq_len + 1]}
                for at in range(0, len(ids) - 1, seq_len)]
    return out


def load_data(spec: str, task: str, seed: int, held: int, val: str = "", encode=None, end: int = 0, seq_len: int = 0,
              kinds=()):
    """--data -> (endless training set, {name: list of at most `held` held-out records})."""
    parts, kept = [], {}
    for name, weight in parse_mixture(spec):
        if name == "world":
            exam = "exam" if task == "chat" else task  # learned in dialogues, examined by single questions
            parts.append((World(task, seed=seed, kinds=kinds), weight))
            # New scenes, and for questions also pairs of colour and kind that training never shows.
            for split in ("scenes", "pairs") if exam == "exam" else ("scenes",):
                # Seed 1 whatever --seed is: runs face the same questions. Of all kinds: what is not trained on may be
                # forgotten, and that should show.
                world = World(exam, split, seed=1)
                kept[split] = [world[i] for i in range(held)]
            continue
        read = read_records if task != "text" else lambda path: text_records(path, encode, end, seq_len)
        records = read(name)
        # --val is for sets that come with a split of their own. Else a share is set aside, by picture.
        train, aside = (records, read(val)[:held]) if val else split_by_image(records, at_most=held)
        parts.append((Shuffled(train, seed), weight))
        kept["held_out"] = kept.get("held_out", []) + aside
    return Mixture(parts), kept


# ----------------------------------------------------------------------------------------------------------------------
# Packing: documents of all lengths -> rows of one fixed shape
# Were each padded to the longest, most of a batch would be padding; and every new shape would be compiled anew.
# The documents 1 2 3 (only 3 is to be learned) and 8 9 in one row of 4:
#   ids           1     2     8     0    each without its last id, which is only ever a target: nothing comes after it
#   targets    -100     3     9  -100    the id that follows; -100: nothing to learn, in prompts and over padding
#   positions     0     1     0     0    RoPE starts anew in every document
#   documents     1     1     2     0    attention stays within equal numbers; 0 is padding
#   weights       1     1     1     0    in the loss, where there is a target

@dataclass
class Document:
    "One rendered conversation or piece of text, not yet drawn: pictures are only opened when they reach a batch."
    index: int               # in the data set: all that a resumed run needs to make it again
    ids: list[int]           # at most seq_len + 1
    mask: list[int]          # 1 where ids[i] is to be learned
    slots: list[int]         # where each picture's placeholders begin
    record: dict
    weight: float = 1.0      # of each of its tokens in the loss; in reinforcement learning the advantage


def pack(documents: list[Document], rows: int, seq_len: int,
         image_tokens: int) -> tuple[dict, list[Document], list[Document]]:
    """-> (the arrays above, each [rows, seq_len], and slots; the placed documents; those that found no room)."""
    ids, positions, numbers = (np.zeros((rows, seq_len), dtype=np.int64) for _ in range(3))
    targets, weights = np.full((rows, seq_len), -100, dtype=np.int64), np.zeros((rows, seq_len), dtype=np.float32)
    used, count, placed, waiting, slots = [0] * rows, [0] * rows, [], [], []
    for doc in documents:
        n = len(doc.ids) - 1
        # First fit: the first row with room. To find the best packing is NP-hard; long before short, this one needs at
        # most about 11/9 of its rows.
        row = next((r for r in range(rows) if used[r] + n <= seq_len), None)
        if row is None:
            waiting.append(doc)
            continue
        at = used[row]
        used[row], count[row] = at + n, count[row] + 1
        ids[row, at:at + n] = doc.ids[:-1]
        # Trap: the mask moves with the targets. One place off, no answer's first token would be learned.
        targets[row, at:at + n] = np.where(np.array(doc.mask[1:]) > 0, doc.ids[1:], -100)
        weights[row, at:at + n] = doc.weight
        positions[row, at:at + n] = np.arange(n)
        numbers[row, at:at + n] = count[row]
        for slot in doc.slots:  # places in ids.flatten(): the pictures of all rows are written in one operation
            slots.append(np.arange(image_tokens) + row * seq_len + at + slot)
        placed.append(doc)
    batch = {"ids": ids, "targets": targets, "positions": positions, "documents": numbers, "weights": weights,
             "slots": np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64),  # [pictures * image_tokens]
             "learned": np.flatnonzero(targets >= 0),  # places in targets.flatten(): the others never reach the head
             "boundaries": boundaries(numbers) if max(count) > 1 else None}
    return batch, placed, waiting


def boundaries(numbers: np.ndarray) -> np.ndarray:
    """
    Document ids [rows, seq_len] -> int32 [D + 1]: in the flat array document i lies from [i] up to [i + 1].
    """
    change = np.ones(numbers.shape, dtype=bool)  # a row's first place always begins one
    change[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(change)
    # Filled up to a power of two with empty documents: a length that differs each time would be compiled each time.
    size = 1 << (len(starts) - 1).bit_length()
    return np.append(starts, np.full(size - len(starts) + 1, numbers.size)).astype(np.int32)


@lru_cache
def threads(process: int) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """-> (the one thread that prepares batches, those that draw their pictures), started when they are needed."""
    # Two pools: in one, the batch would wait for pictures, and they for the thread in which it waits. Above 16 threads
    # Python's lock is the limit. New ones in each process, as in open_zip: a forked one has the pools but no threads.
    return ThreadPoolExecutor(1), ThreadPoolExecutor(min(16, os.cpu_count()))


def to_batch(arrays: dict, placed: list[Document], to_pixels) -> dict:
    """pack's arrays as tensors, with the pictures drawn."""
    # {source: (its place in pixels, a record to name in errors)}. A picture that several documents talk about, as all
    # answers to one question in chapter 4 do, is drawn and later encoded once.
    index = {}
    pictures = [index.setdefault(source, (len(index), doc.record))[0] for doc in placed
                for source in doc.record["images"]]
    # The last chance: from here on, a picture at another's place trains without any error.
    assert len(pictures) == sum(len(doc.slots) for doc in placed), \
        f"pictures and places disagree near {placed[0].record['id']}"
    batch = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
    # Pillow lets go of Python's lock while it decodes and resizes: several threads, and still in order. The world's own
    # drawings are Python throughout, and threads would only get into each other's way.
    drawn = all(isinstance(source, Scene) for source in index)
    run = map if drawn else threads(os.getpid())[1].map
    pixels = list(run(to_pixels, index, [record for _, record in index.values()]))  # uint8 [3, S, S] each
    batch["pixels"] = torch.stack(pixels) if pixels else None     # uint8 [n, 3, S, S]: a quarter of float32 to move
    batch["pictures"] = torch.tensor(pictures, dtype=torch.long)  # [m]: which of the n each run of placeholders shows
    return batch


class Loader:
    """
    An endless iterator of packed batches over a data set. `to_document(record, index)` renders one (None: leave it
    out), `to_pixels(source, record)` draws one picture. ahead: while a step computes, a thread prepares the next batch.
    pin: into memory from which a GPU can fetch it by itself.
    """

    def __init__(self, dataset, to_document, to_pixels, rows, seq_len, image_tokens, lane=0, lanes=1, state=None,
                 ahead=True, pin=False):
        self.dataset, self.to_document, self.to_pixels = dataset, to_document, to_pixels
        self.rows, self.seq_len, self.image_tokens, self.ahead, self.pin = rows, seq_len, image_tokens, ahead, pin
        # Lane 1 of 4 takes records 1, 5, 9, ... A lane for each micro-batch of a step, not for each GPU: the data of a
        # step are the same however many GPUs share it.
        self.next, self.lanes = (state["next"] if state else lane), lanes
        self.waiting = [to_document(dataset[i], i) for i in state["waiting"]] if state else []
        self.coming = {}  # {process: the next batch, under way}; a forked process finds none of its own, and starts one

    def state(self) -> dict:  # {"next": 1201, "waiting": [1181, 1197]}: indices are enough, record i can be made again
        # After the batches handed out. The one under way is not among them: a resumed run makes it again.
        return {"next": self.next, "waiting": [d.index for d in self.waiting]}

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        # An error of the thread is raised here, by result(), and again at every later call: nothing has moved on.
        process = os.getpid()
        done = self.coming[process].result() if process in self.coming else self.prepare()
        batch, self.next, self.waiting = done
        if self.ahead:
            self.coming = {process: threads(process)[0].submit(self.prepare)}
        return batch

    def prepare(self) -> tuple[dict, int, list[Document]]:
        """-> (the next batch, `next` and `waiting` after it). TRAP: in a thread, so it must not change self."""
        documents, tokens = list(self.waiting), sum(len(d.ids) for d in self.waiting)
        at, misfits = self.next, 0
        # 2 % more than the rows hold: each document's last id takes no place, and with a few to spare the gaps at the
        # rows' ends are filled. Many more would only wait longer.
        while tokens < self.rows * self.seq_len * 1.02:
            document = self.to_document(self.dataset[at], at)
            at += self.lanes
            # A few long records are normal; if nothing fits, this would look for ever.
            misfits = 0 if document else misfits + 1
            need(misfits <= 1000, f"{misfits} records in a row do not fit into --seq_len={self.seq_len}; raise it")
            if document:
                documents.append(document)
                tokens += len(document.ids)
        # Those that waited go first: sorted in with the others, a short one could wait for ever. Then long before
        # short, since short ones still fit into the gaps that long ones leave.
        first = len(self.waiting)
        documents = documents[:first] + sorted(documents[first:], key=lambda d: -len(d.ids))
        arrays, placed, waiting = pack(documents, self.rows, self.seq_len, self.image_tokens)
        batch = to_batch(arrays, placed, self.to_pixels)
        if self.pin:  # page-locked, it is sent while Python goes on; from other memory a copy to the GPU would wait
            batch = {name: value if value is None else value.pin_memory() for name, value in batch.items()}
        return batch, at, waiting


# ----------------------------------------------------------------------------------------------------------------------
# Scoring: the rules of the benchmarks' own code, odd corners included, so that numbers can be compared (VLMEvalKit)
# A wiser rule would give numbers that nobody else has. The corners are marked: a reward in chapter 4 will find them.

ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8",
               nine="9", ten="10")
# VQA's table restores a forgotten apostrophe: it lists each of these words with any one of its apostrophes missing.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
    """.split() for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}  # sic


def no_punctuation(text: str) -> str:
    """A mark beside a space vanishes, others become a space; all vanish where a number has a comma."""
    # "t-shirt" -> "t shirt", "red, white" -> "red white", "1,000" -> "1000". Dropping all would join t and shirt, and
    # spaces for all would split 1,000 in two.
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        # Looked up in text, not in out: a mark removed before must not change the verdict on the next.
        vanish = mark + " " in text or " " + mark in text or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if vanish else " ")
    # "3.5." -> "3.5": a dot stays before a digit. 32: the original passes a flag where the count belongs.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def vqa_form(text: str) -> str:
    """"The two dogs." -> "2 dogs"."""
    words = no_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [NUMBERS.get(word, word) for word in words]  # people type "two" and "2"; equality alone would fail one
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa(prediction: str, answers: list[str]) -> float:
    """Of ten people, leave out each in turn: right if three of the others agree, averaged."""
    # Is it a sofa or a couch? By the majority's word alone, the other would be wrong.
    # A dropped match is subtracted below, so 4 equal answers of 10 give 1.0, 3 give 0.9, 1 gives 0.3.
    forms, mine = [vqa_form(answer) for answer in answers], vqa_form(prediction)
    if len(forms) == 1:  # nobody is left to agree; count equality instead of always 0
        return float(forms[0] == mine)
    return sum(min(1, (forms.count(mine) - (form == mine)) / 3) for form in forms) / len(forms)


def relaxed(prediction: str, answer: str) -> bool:
    """ChartQA: a number may be off by 5 %, other answers not at all; nor zero, for 5 % of it is nothing."""
    # Nobody reads exactly 41.7 off a bar: 42 is right for it. But "1,000" is no number here, and wrong for 1000.
    # Trap: years are numbers too, so that 2010 is right for 2020.
    try:
        got, true = (float(text.rstrip("%")) / (100 if text.endswith("%") else 1) for text in (prediction, answer))
        return abs(got - true) / abs(true) <= 0.05
    except (ValueError, ZeroDivisionError):
        return prediction.lower() == answer.lower()


def anls(prediction: str, answer: str) -> float:
    """DocVQA: 1 - edits / length of the longer; below a half it counts as nothing."""
    # "helo" for "hello" is 1 edit of 5, so 0.8, where equality gives 0. Without the cut at a half, "cat" for "man"
    # would earn 0.33 for one letter that is the same by chance.
    a, b = (" ".join(text.lower().split()) for text in (prediction, answer))
    row = list(range(len(b) + 1))  # row[j]: edits from the part of a seen so far to b[:j]
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (letter != other)))
    # Pages have long answers and scans have flaws: a wrong letter should cost a little, a wrong word all.
    similarity = 1 - row[-1] / max(len(a), len(b), 1)
    return similarity if similarity >= 0.5 else 0.0


def infer_choice(text: str, choices: dict[str, str]) -> str:
    """The letter an answer means, or "Z": a lone letter near the end, "answer is B", or the text of one option."""
    # "A or B" gives "Z", which is no option and so always wrong: who names both may not win. Trap: "A dog" gives A.
    # Only in longer texts is an article no letter, as letters count among the last five words.
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    match = ANSWER_IS.search(text)  # odd: "the answer is a dog" gives A
    if match and match[1].upper() in choices:
        return match[1].upper()
    found = [letter for letter, option in choices.items() if option.lower() in text.lower()]
    too_long = len(text) > 2 * sum(map(len, choices.values()))  # an essay mentions an option by chance
    return found[0] if len(found) == 1 and not too_long else "Z"


def yes_or_no(text: str) -> str:
    words = no_punctuation(text.lower()).split()  # words: "yesterday" begins with yes, "nothing" with no
    # "Yes, there is no dog" is neither: the rule does not read on.
    return "unknown" if ("yes" in words) == ("no" in words) else "yes" if "yes" in words else "no"


def simple(text: str) -> str:
    # For equality, not for "is contained in": "red" is also in "not red" and in "red or blue".
    return text.strip().lower().removesuffix(".").strip()


RULES = {  # (prediction, one right answer) -> 0 to 1
    "exact": lambda got, answer: simple(got) == simple(answer),
    "yesno": lambda got, answer: yes_or_no(got) == simple(answer),
    "relaxed": relaxed,
    "anls": anls,
    # OCRBench. A sign's words may come in two lines. Trap: as a reward it teaches to list all that could be right.
    "contains": lambda got, answer: answer.strip().lower().replace("\n", " ") in got.lower().replace("\n", " "),
}


def score(metric: str, prediction: str, answers: str | list[str], choices: dict[str, str] | None = None) -> float:
    """0 (wrong) to 1 (right); the best of the right answers counts. An empty prediction is wrong under every rule."""
    need(metric in (*RULES, "vqa", "choice"), f"unknown metric {metric!r}; there are {', '.join(RULES)}, vqa, choice")
    prediction, answers = prediction.strip(), [answers] if isinstance(answers, str) else answers
    need(answers, "no right answer to score against")
    if not prediction:  # else it would equal "the", which loses its article, or contain an empty answer
        return 0.0
    if metric == "vqa":
        return vqa(prediction, answers)
    if metric == "choice":
        return float(infer_choice(prediction, choices or dict.fromkeys("ABCD", "")) in answers)
    return max(float(RULES[metric](prediction, answer)) for answer in answers)


def wilson(k: float, n: int) -> tuple[float, float]:
    """k right of n -> the 95 % interval of the accuracy, which unlike k/n +- 2 sigma holds for small n and near 0."""
    # 10 of 10 right: k/n +- 2 sigma is 1 to 1, as if nothing were left to doubt; this is 0.72 to 1.
    # Trap: n questions about few pictures are not independent, and the true interval is wider.
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, k / n  # z: 95 % of a normal distribution lie within this many standard deviations
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


# ----------------------------------------------------------------------------------------------------------------------
# Downloads: published weights and tokenizers from the Hugging Face hub, by plain HTTP
# Gigabytes over a home line break off now and then, and a weight with one flipped bit loads as well as before. So a
# file grows under the name FILE.part, where another process can go on, and gets its own name once its hash is right.
#   fetch      what is here already, else under a lock:
#     plan       look_up asks the server for size and hash of each file, before a byte is fetched; cut_out may narrow it
#     announce   bytes, licence, and whether the disk has room
#     download   retry(pour), as often as the line breaks; then the hash; then the name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the index says which shard holds which tensor
ANY = None, None  # no bytes and sha256 known here: at a fixed commit the server's word is enough, see look_up()
CONFIGS = dict.fromkeys(["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json",
                         "added_tokens.json"], ANY)
QWEN = dict.fromkeys(["config.json", "generation_config.json", "tokenizer_config.json"], ANY) | {
    "tokenizer.json": (7_031_645, "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539")}
LLAVA = CONFIGS | {
    "vocab.json": (2_776_833, "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"),
    "merges.txt": (1_671_853, "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5")}
SIGLIP = dict.fromkeys(["config.json", "preprocessor_config.json"], ANY)
RESEARCH = "Qwen Research licence: non-commercial use only"
DEFAULT_VISION = "siglip2-large-patch16-256"  # the encoder that a Qwen gets unless another is named
TOWER = "vision_model."  # the rest of a SigLIP file, more than half of it, is a text encoder, which we never use


@dataclass(frozen=True)
class Repository:
    hub: str           # Org/Name
    revision: str      # a commit, which fixes every byte, or a branch, whose newest commit is taken
    files: dict        # {name: (bytes, sha256)} in the order of fetching; {}: the server is asked what there is
    licence: str = "Apache-2.0"
    prefix: str = ""   # of model.safetensors only the tensors whose names begin so


def pin(hub: str, revision: str, small: dict, *weights: tuple, **more) -> Repository:
    "weights: (bytes, sha256) of the one file, or of each shard."
    n = len(weights)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [SINGLE]
    return Repository(hub, revision, small | ({INDEX: ANY} if n > 1 else {}) | dict(zip(names, weights)), **more)


REPOSITORIES = {repository.hub.split("/")[1].lower(): repository for repository in (
    pin("Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987", QWEN,
        (988_097_824, "88c142557820ccad55bb59756bfcfcf891de9cc6202816bd346445188a0ed342")),
    pin("Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", QWEN,
        (988_097_824, "fdf756fa7fcbe7404d5c60e26bff1a0c8b8aa1f72ced49e7dd0210fe288fb7fe")),
    pin("Qwen/Qwen2.5-1.5B", "8faed761d45a263340a0528343f099c05c9a4323", QWEN,
        (3_087_467_144, "a961db72e75d52b18e6b0c9d379e51a26973b233385e0e127fdda7d648aec796")),
    pin("Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306", QWEN,
        (3_087_467_144, "dd924a11b4c220f385b51ffa522daea7c9f3d850e31b162bb5661df483c6d3ee")),
    pin("Qwen/Qwen2.5-3B", "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b", QWEN,
        (3_968_658_944, None), (2_203_268_048, None), licence=RESEARCH),
    pin("Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1", QWEN,
        (3_968_658_944, "67347b23fb4165b652eb6611f5e1f2a06dfcddba8e909df1b2b0b1857bee06c2"),
        (2_203_268_048, "a40d941d0e7e0b966ad8b62bb6d6b7c88cce1299197b599d9d0a4ce59aabfc1d"), licence=RESEARCH),
    pin("google/siglip2-large-patch16-256", "787800c8990e6f058423089178e718139608408c", SIGLIP,
        (3_526_204_360, "fa34f822f016dbb167d8d0e3a8af99b5e199aa28573360d4295252b9ec418e2a"), prefix=TOWER),
    pin("google/siglip-large-patch16-256", "d0da9f876e7d66b4e250cd2450c3ba2ce735e447", SIGLIP, ANY, prefix=TOWER),
    pin("google/siglip2-base-patch16-224", "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2", SIGLIP,
        (1_500_800_904, "612923381c76ec5a9bed335d1c48827e3f2e506ac31b044b63b2031fadee6a0b"), prefix=TOWER),
    pin("google/siglip-base-patch16-224", "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed", SIGLIP,
        (812_672_320, "2c63cb7d1f2e95ba501893cbb8faeb4ea9a3af295498d35097126228659c2af8"), prefix=TOWER),
    pin("google/siglip-so400m-patch14-224", "d04cf29fca7b6374f74d8bea1969314492266b5e", SIGLIP, ANY, prefix=TOWER),
    pin("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3", SIGLIP,
        (3_511_950_624, "ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a"), prefix=TOWER),
)} | {"llava-ov-0.5b":
    pin("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "74dd0bf867a4cda7950c17663794267c60cf4b40", LLAVA,
        (1_787_445_680, "07b3362c3412de79baf2379e44e5b0b2a8f4b965ebebd11d7b5b3eb4450fe96e")),
}

CHUNK = 2 ** 16              # bytes that a break can lose
TIMEOUT = 10, 30             # seconds to connect, seconds without a byte
ATTEMPTS, BACKOFF = 5, 0.5   # failures in a row without a new byte; seconds, doubled from one to the next
MAX_HEADER = 100_000_000     # bytes; the safetensors format's own limit
# What another attempt may help against; anything else would only be repeated. HTTPError: the server is overloaded or
# restarting, which we raise of these statuses only.
CURABLE = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, requests.HTTPError
TRY_AGAIN = 408, 429, 500, 502, 503, 504
REMEDIES = {401: "missing, private or gated: check the name, or set HF_TOKEN to a token that may read it",
            403: "not allowed: accept the licence on the repository's page, with the account that HF_TOKEN belongs to",
            404: "no such file: is this a model in safetensors?",
            (404, "RepoNotFound"): "no such repository: check the name",
            (404, "RevisionNotFound"): "no such revision: check what stands behind the @"}


@dataclass(frozen=True)
class Piece:
    "A file as the server describes it; or the part of it that we want, under a header of our own."
    name: str
    what: str          # "Org/Name, config.json": for errors
    url: str
    commit: str
    etag: str          # of a large file its sha256, 64 hex digits; of a small one git's hash, 40
    digest: str        # the table's sha256, or else the etag
    total: int         # bytes on the server
    size: int          # bytes on our disk: a header of our own, if any, then a run of the server's
    head: bytes = b""  # that header
    offset: int = 0    # our byte i is byte i + offset on the server


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def setting(variable: str, default) -> Path:
    return Path(os.environ.get(variable) or default).expanduser()


def hub_home() -> Path:
    return setting("HF_HOME", "~/.cache/huggingface")  # huggingface_hub's: its downloads and the login of its users


def endpoint() -> str:
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    need(url.startswith(("https://", "http://")), f"HF_ENDPOINT={url}: expected an address such as https://NAME")
    return url


def at_hub(url: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(endpoint())[:2]  # scheme, and name with port


def find_repository(name: str) -> Repository:
    known = REPOSITORIES | {repository.hub: repository for repository in REPOSITORIES.values()}
    if name in known:
        return known[name]
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", name)  # a name must not begin with a dot: ../../x
    need(match, f"{name!r}: no such repository; known are {', '.join(REPOSITORIES)}, and any other as Org/Name or "
                "Org/Name@revision")
    return Repository(match[1], match[2] or "main", {}, f"see {endpoint()}/{match[1]}")


def folders(repository: Repository) -> tuple[Path, Path]:
    "-> (where we put its files, where huggingface_hub does: who has used transformers need not fetch them again)."
    name, revision = repository.hub.replace("/", "--"), repository.revision
    # The revision is part of our name: two of them never share a folder. A branch may be called refs/pr/1.
    short = revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision.replace("/", "--")
    theirs = setting("HF_HUB_CACHE", hub_home() / "hub") / f"models--{name}"
    with contextlib.suppress(OSError):  # a branch is a file with its commit
        revision = (theirs / "refs" / revision).read_text().strip()
    return setting("GHOSTVIS_CACHE", "~/.cache/ghostvis") / f"{name}@{short}", theirs / "snapshots" / revision


def read_shards(folder: Path) -> list[str]:
    with naming(folder / INDEX):
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    where = index.get("weight_map") if isinstance(index, dict) else None
    names = list(where.values()) if isinstance(where, dict) else []
    # Plain names only: a stranger's index must not make us write to ../../.bashrc.
    need(names and all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names),
         f"{folder / INDEX}: lacks the weight_map from tensors to plain file names; use another repository")
    return sorted(set(names))


def lacking(repository: Repository, folder: Path) -> list[str]:
    "The files that are not in a folder yet."
    files = repository.files
    if not files:  # what is optional was fetched before the weights: who has these has all
        sharded = (folder / INDEX).exists() and not (folder / SINGLE).exists()
        files = dict.fromkeys(["config.json", *(read_shards(folder) if sharded else [SINGLE])], ANY)
    # The part of the weights that lies in our folder has a size of its own; it was checked before it got that name.
    cut = SINGLE if repository.prefix and folder == folders(repository)[0] else None
    return [name for name, (size, _) in files.items() if not (folder / name).is_file()
            or name != cut and size not in (None, (folder / name).stat().st_size)]


def authorize(request):
    "Called by requests before each request. Our token is for the hub: it is none of the storage hosts' business."
    path = setting("HF_TOKEN_PATH", hub_home() / "token")
    token = (os.environ.get("HF_TOKEN") or (path.read_text() if path.is_file() else "")).strip()
    if token and at_hub(request.url):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def request(web, method: str, url: str, what: str, headers: dict, accept=()) -> tuple:
    "-> (the reply, the headers that the hub itself sent on the way to it). Statuses of 400 and more are errors."
    # Redirects by hand, for the hub's own headers. For large files it sends us on to a storage host, with a signature
    # in the address that holds for minutes only, so that each attempt starts at the hub.
    hub = requests.structures.CaseInsensitiveDict()
    for _ in range(10):
        reply = web.request(method, url, headers=headers, timeout=TIMEOUT, stream=method == "GET",
                            allow_redirects=False)
        hub.update(reply.headers if at_hub(url) else {})
        url = urljoin(url, reply.headers.get("Location", ""))
        if not reply.is_redirect or method == "HEAD" and not at_hub(url):  # the hub has said all
            break
        reply.close()
    hub["ETag"] = (hub.get("X-Linked-Etag") or hub.get("ETag") or "").removeprefix("W/").strip('"')
    status, kind = reply.status_code, (reply.status_code, reply.headers.get("X-Error-Code"))
    if status in TRY_AGAIN:
        raise requests.HTTPError(f"the server answers {status}", response=reply)
    need(status < 400 or status in accept, f"{what}: the server answers {status}, " + str(
        REMEDIES.get(kind) or REMEDIES.get(status) or f"{reply.reason}; check HF_ENDPOINT ({endpoint()}) and proxies"))
    return reply, hub


def retry(what: str, attempt, say, size=lambda: 0):
    "The result of attempt(). A failure counts if size() has not grown: a bad line may break a hundred times."
    # No urllib3.Retry: it starts a request again, but knows nothing of a body that breaks off after the first gigabyte.
    failures, most = 0, size()
    while True:
        try:
            return attempt()
        except CURABLE as error:
            # "HTTPSConnectionPool(...): Max retries exceeded ...: [Errno 111] Connection refused'))": the end says it
            reason = str(error).rsplit(": ", 1)[-1].split("', ")[0].strip("')\".")[:90]
            headers = {} if error.response is None else error.response.headers
        # "More than ever", not "more than before": a server that always starts over would keep us for ever.
        failures, most = (0, size()) if size() > most else (failures + 1, most)
        need(failures < ATTEMPTS, f"{what}: {reason}, {failures} times in a row; check the connection to {endpoint()} "
                                  "and run again: it will go on from here")
        # ratelimit: "api";r=0;t=55 or Retry-After: 55; a second more, for the server's clock is not ours
        named = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) \
            or re.fullmatch(r"(\d+)", headers.get("Retry-After", ""))
        seconds = int(named[1]) + 1 if named else BACKOFF * 2 ** failures
        say(f"{what}: {reason}; next attempt in {seconds:g} s")
        time.sleep(seconds)


def look_up(web, repository: Repository, revision: str, name: str, say, optional=False) -> Piece | None:
    "What the server says of a file, held against the table before a byte is fetched. None: not there."
    what = f"{repository.hub}, {name}"

    def url(revision: str) -> str:
        return f"{endpoint()}/{repository.hub}/resolve/{quote(revision, safe='')}/{quote(name)}"

    reply, hub = retry(what, lambda: request(web, "HEAD", url(revision), what, {}, [404] if optional else []), say)
    if reply.status_code == 404:
        return None
    # a redirect's own Content-Length is that of the redirect
    length = hub.get("X-Linked-Size") or ("" if reply.is_redirect else hub.get("Content-Length", ""))
    etag, commit, (size, sha256) = hub["ETag"], hub.get("X-Repo-Commit"), repository.files.get(name, ANY)
    # A login page of a hotel is a fine 200 as well, and would be kept as config.json.
    need(commit and etag and length.isdecimal(), f"{what}: a proxy's page answers here, not a Hugging Face hub; log in "
                                                 f"to this network, or check HF_ENDPOINT ({endpoint()})")
    total = int(length)  # the etag of a small file is of another kind: that one is hashed when it is here
    need(size in (None, total) and (sha256 in (None, etag) or len(etag) != 64), f"{what}: {endpoint()} has {total:,} "
         f"bytes with hash {etag}, expected are {size or total:,} with {sha256 or etag}; the file was replaced, or the "
         "mirror is wrong: check HF_ENDPOINT")
    return Piece(name, what, url(commit), commit, etag, sha256 or etag, total, total)


def pour(web, piece: Piece, file) -> None:
    "One connection: appends what it brings to the file, which may be in memory."
    start, resumed, whole = file.tell() + piece.offset, file.tell() > len(piece.head), piece.size == piece.total
    asked = {} if whole and not resumed else {"Range": f"bytes={start}-{piece.size + piece.offset - 1}"}
    reply, hub = request(web, "GET", piece.url, piece.what, asked, [416] if resumed else [])
    with reply:
        # Two versions of a file must not be mixed where no hash of the whole can tell. TRAP: If-Range would ask the
        # storage host, which has an ETag of its own: it never agrees, and each time the whole file comes.
        need(whole or hub["ETag"] == piece.etag, f"{piece.what}: replaced on the server just now; run again")
        where = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
        # 200: the whole file, whatever we asked for. 416: no such range, so ours is of another file.
        came = int(where[1]) if where else 0 if reply.status_code == 200 else math.inf
        if came > start:  # what we have cannot be continued with this: the next attempt is from the beginning
            file.truncate(len(piece.head))
            file.seek(0, os.SEEK_END)
            raise requests.ConnectionError("the server sent another part than was asked for")
        skip = start - came  # what lies before the part that we want
        for chunk in reply.iter_content(CHUNK):
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
            file.write(chunk[:piece.size - file.tell()])
            if file.tell() == piece.size:
                return
    raise requests.ConnectionError("the connection closed early")


def cut_out(web, piece: Piece, prefix: str, say) -> Piece:
    "Of a safetensors file only the tensors with a prefix, if they lie side by side: a smaller file of the same kind."
    # 8 bytes with the header's length, {name: {"dtype", "shape", "data_offsets": [begin, end]}} counted from the
    # header's end, the data. The hub's SigLIP files are sorted by name: text_model before vision_model.
    def read(start: int, stop: int) -> bytes:
        part, file = replace(piece, size=stop - start, offset=start), io.BytesIO()
        retry(piece.what, lambda: pour(web, part, file), say, file.tell)
        return file.getvalue()

    length = int.from_bytes(read(0, 8), "little")  # any 8 bytes make a number: checked before that much is asked for
    bad = f"{piece.what}: not a valid safetensors file; choose another revision"
    need(length <= min(MAX_HEADER, piece.total - 8), bad)
    raw = read(8, 8 + length)
    try:
        header = json.loads(raw)
        wanted = {name: info for name, info in header.items() if name.startswith(prefix)}
        begins, ends = zip(*(info["data_offsets"] for info in wanted.values())) if wanted else ([0], [0])
        begin, end, held = min(begins), max(ends), sum(ends) - sum(begins)  # held: bytes of the wanted tensors alone
        for info in wanted.values():
            info["data_offsets"] = [at - begin for at in info["data_offsets"]]
        # The ETag goes along: a part that was begun with another version of the file has another header.
        head = json.dumps({"__metadata__": header.get("__metadata__", {}) | {"etag": piece.etag}} | wanted).encode()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(bad) from None
    # Something else lies between them, or the numbers cannot be: take all, the reader of the file will tell.
    if not wanted or held != end - begin or not 0 <= begin <= end <= piece.total - 8 - length:
        return piece
    head += b" " * (-len(head) % 8)  # the data start at a multiple of 8
    head = len(head).to_bytes(8, "little") + head
    return replace(piece, size=len(head) + held, head=head, offset=8 + length + begin - len(head))


def plan(web, repository: Repository, folder: Path, say) -> list[Piece]:
    "What is still to be fetched, the weights last. Nothing is yet, but headers and the index of shards."
    record, revision = folder / "commit", repository.revision
    with contextlib.suppress(OSError):
        # A branch moves on, and files that are fetched on two days would be of two commits. So the first day's commit
        # is kept; delete the folder for a newer one.
        revision = record.read_text() or revision
    ask = partial(look_up, web, repository, say=say)
    if repository.files:
        pieces = [ask(revision, name) for name in lacking(repository, folder)]
        return [cut_out(web, piece, repository.prefix, say) if piece.name == SINGLE and repository.prefix
                else piece for piece in pieces]
    config = ask(revision, "config.json")
    record.write_text(revision := config.commit)  # from here on all is asked of this commit

    def those(*names: str) -> list[Piece]:
        return [piece for name in names if (piece := ask(revision, name, optional=True))]

    # older repositories have the tokenizer in two files
    pieces = [config, *those(*list(CONFIGS)[1:]), *(those("tokenizer.json") or those("vocab.json", "merges.txt"))]
    weights = those(SINGLE)
    if not weights:  # then in shards, and only the index knows how many
        download(web, ask(revision, INDEX), folder, say)
        weights = [ask(revision, name) for name in read_shards(folder)]
    return [piece for piece in pieces + weights if not (folder / piece.name).exists()]


def announce(repository: Repository, pieces: list[Piece], folder: Path, say) -> None:
    "Bytes and licence, before any of it is fetched; and no start on a disk that will be full before the end."
    commit, free, left = pieces[0].commit if pieces else repository.revision, shutil.disk_usage(folder).free, 0
    say(f"{repository.hub}, revision {commit[:12]}, licence: {repository.licence}")
    for piece in pieces:
        part = folder / f"{piece.name}.part"
        here = part.stat().st_size if part.exists() else 0
        left += max(0, piece.size - here)
        say(f"{piece.size / 1e6:12,.1f} MB  {piece.name}" + f", {here / 1e6:,.1f} MB are here already" * bool(here)
            + f" (only {repository.prefix}* of {piece.total / 1e6:,.1f} MB)" * bool(piece.head))
    say(f"{left / 1e6:12,.1f} MB  to come, to {folder}, where {free / 1e6:,.1f} MB are free")
    need(left <= free, f"{folder}: {left:,} bytes are to come and {free:,} are free; make room, or set GHOSTVIS_CACHE "
                       "to a folder on another disk")


def check_hash(path: Path, expected: str) -> None:
    "64 digits are a sha256; 40 are the sha1 by which git names a file, with its size in front."
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        path.unlink()  # wrong somewhere, and nobody knows where
        raise ValueError(f"{path}: hash {digest.hexdigest()}, expected {expected}: damaged on the way; it was deleted, "
                         "run again to fetch it anew")


def download(web, piece: Piece, folder: Path, say) -> None:
    target, part = folder / piece.name, folder / f"{piece.name}.part"
    try:
        with open(part, "a+b") as file:  # what another process left is gone on with
            file.seek(0)
            if file.read(len(piece.head)) != piece.head or file.seek(0, os.SEEK_END) > piece.size:
                file.truncate(0)  # begun with another version
                file.write(piece.head)
            file.seek(0, os.SEEK_END)
            # The bar counts what is written. disable=None: only on a terminal, not in a log file.
            with tqdm.wrapattr(file, "write", total=piece.size, initial=file.tell(), desc=piece.name,
                               disable=None) as counted:
                if file.tell() < piece.size:
                    retry(piece.what, lambda: pour(web, piece, counted), say, file.tell)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name: else a power cut could leave a name without bytes
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{target}: the disk is full; make room and run again: it will go on from here") from None
    # A part cannot be checked by the hash of the whole. That the server's ETag was the table's sha256 has to do.
    # Other forms of ETag than these two say nothing about the content.
    if not piece.head and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", piece.digest):
        check_hash(part, piece.digest)
    os.replace(part, target)  # all at once: nobody ever sees half a file under this name
    say(f"{piece.name}: complete")


@contextlib.contextmanager
def locked(folder: Path, say):
    "One process at a time: the ranks of a run all ask for the same weights."
    with open(folder / ".lock", "w") as file:
        if fcntl:  # the system's own lock, which ends with its process: a kill leaves nothing to clean up
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process fetches to {folder}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(name: str, say=note) -> Path:
    """"qwen2.5-1.5b", or any "Org/Name@revision" -> the folder with its files; what is missing is fetched."""
    repository = find_repository(name)
    folder, theirs = folders(repository)
    for ready in folder, theirs:
        if not lacking(repository, ready):
            return ready
    offline = [variable for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
               if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")]
    need(not offline, f"{folder}: lacks {', '.join(lacking(repository, folder))}, and {''.join(offline[:1])} is set; "
                      f"run python data.py --download={name} once without it")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, say), requests.Session() as web:
        web.headers["Accept-Encoding"] = "identity"  # else small files come zipped, with no length, another ETag
        # TRAP: without an auth of ours, requests looks into ~/.netrc and puts what it finds in our token's place.
        web.auth = authorize
        if lacking(repository, folder):  # who had to wait for the lock finds all there
            pieces = plan(web, repository, folder, say)
            announce(repository, pieces, folder, say)
            for piece in pieces:
                download(web, piece, folder, say)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def show_world(path: str, columns: int = 5, rows: int = 4, px: int = 240) -> None:
    sheet = Image.new("RGB", (columns * px, rows * px), "white")
    captions, exam = World("captions"), World("exam", "scenes")
    for i in range(columns * rows):
        sheet.paste(captions[i]["images"][0].draw(px - 8), (i % columns * px + 4, i // columns * px + 4))
    sheet.save(path)
    for i, kind in enumerate(QUESTIONS):  # record i asks the i-th kind
        question, answer = (message["content"] for message in exam[i]["messages"])
        print(f"{kind:>9}: {question.removeprefix('<image>').strip()!r} -> {answer}")
    print(f"wrote {path}")


def check_records(path: str) -> None:
    records = read_records(path)
    for record in records:
        for source in record["images"]:
            try:
                Image.open(open_source(source)).load()  # open alone reads the header, and finds no file cut short
            # Pillow says SyntaxError of a broken PNG, and bomb of a picture with more than 179 million pixels.
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path}, record {record['id']}: picture {source!r:.80} cannot be opened "
                                 f"({error})") from None
    for record in records[:3]:
        print(json.dumps({"id": record["id"], "messages": record["messages"], "images": len(record["images"])},
                         ensure_ascii=False))
    print(f"{path}: {len(records)} records, {sum(len(r['images']) for r in records)} pictures, all readable")


def download_all(names: str, vision: str) -> None:
    if names == "list":
        for name, repository in REPOSITORIES.items():
            print(f"{name:26} {repository.hub:43} {repository.licence}")
        return
    names = [name.strip() for name in names.split(",")]
    names += [vision] if vision and any(name.startswith("qwen2.5-") for name in names) else []
    for name in names:  # a slip in the last name is found before the gigabytes of the first
        find_repository(name)
    for name in dict.fromkeys(names):
        print(f"{name} {fetch(name)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--data", default="world", help="world, or a file of records to check [world]")
    parser.add_argument("--out", default="world.png", help="where the world's contact sheet goes [world.png]")
    parser.add_argument("--download", default="", help="what to fetch: names joined by commas; list shows them [off]")
    parser.add_argument("--vision", default=DEFAULT_VISION,
                        help="fetched along with any qwen2.5-*, \"\" is none [%(default)s]")
    flags = parser.parse_args()
    if flags.download:
        download_all(flags.download, flags.vision)
    elif flags.data == "world":
        show_world(flags.out)
    else:
        check_records(flags.data)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # nothing is lost: a download goes on from where it was
        sys.exit("stopped")
