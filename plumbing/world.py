"""
The built-in world: an endless data set of drawn pictures with captions, questions and answers.

It lets a person train and test all four chapters without a download. Code draws every scene and writes every text
about it. So no answer is wrong, the data have no end, and a new kind of question costs a few lines. To see it, run
`python data.py`: it draws a contact sheet, world.png, and prints one question of each kind.

Read from the top: tables of shapes become pictures; things on a 3 x 3 grid become scenes; captions and questions are
written about a scene; at the end, World makes records of them. Or start with World and look up what it uses.

Two held-out splits measure two different abilities:
    "scenes"    scenes that training did not use, made by the same rules. Does the model answer about a new picture?
    "pairs"     questions about the 12 pairs of colour and kind in HELD_OUT, which training never shows or names. Does
                the model combine a colour and a kind that it has only seen in other pairs? Task "exam" only.

Left out: things that hide each other, shadows, perspective and free grammar. They would make some answers doubtful, and
the chapters need clear answers that a small model learns in minutes.
"""
import cmath
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from PIL import Image, ImageDraw

from plumbing.strange import Drawing, widen

# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# Things and backgrounds are tables of flat shapes with coordinates from 0 to 100, so they can be drawn at any size.

# Red, green and blue, 0 to 255. No brown, grey or white, because details of things and backgrounds use them.
COLOURS = {"red": (222, 48, 48), "orange": (250, 140, 30), "yellow": (255, 218, 50), "green": (58, 166, 74),
           "blue": (32, 118, 226), "purple": (150, 80, 206), "pink": (255, 140, 196)}
DARK_FACTORS, EDGE_FACTORS = (0.86, 0.78, 0.75), (0.45, 0.36, 0.42)  # on a thing's colour: for dark parts and outline
FIXED_SHADES = {"white": (255, 252, 244), "ink": (46, 40, 52), "wood": (128, 88, 62)}  # the same on every thing

# A thing is a list of shapes, separated by semicolons. Later shapes cover earlier ones. The box is 100 x 100 units and
# 0,0 is its top left corner. One shape is written as:
#   oval SHADE x,y w,h              centre, half width and half height
#   poly SHADE r x,y x,y ...        polygon with straight sides, corners rounded with radius r
#   blob SHADE r x,y x,y ...        smooth closed curve through the points
#   line SHADE r x,y x,y ...        smooth open curve through the points, 2 r wide
#   dots SHADE r x,y x,y ...        a disc of radius r on every point
#   star SHADE r x,y outer,inner n  star with n rays around x,y; the two numbers are its outer and inner radius
# SHADE is body (the colour itself), dark, light, or one of FIXED_SHADES. In a picture of 72 pixels a small thing is 16
# pixels wide, so the body colour must cover most of it, and no two kinds may have the same outline.
SHAPES = {
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
        "line light 2.5 44,36 50,52 44,68; line light 2.5 58,42 62,52 58,62; dots white 7.5 23,46; dots ink 4 21,46;"
        "line ink 1.2 9,60 15,63 21,61",
    "bird": "line ink 1.8 44,76 44,94 54,95; line ink 1.8 58,76 58,94 68,95; poly dark 3 26,62 6,46 11,68 30,74;"
        "poly ink 2 82,25 96,32 82,39; blob body 2 66,7 84,20 85,44 74,70 50,82 28,74 20,60 36,52 48,38 50,16;"
        "blob light 0 82,46 72,68 54,78 60,58; blob dark 1 24,48 44,44 60,52 56,66 42,70; dots white 5.5 69,25;"
        "dots ink 3.4 70,25",
    "house": "poly dark 1 68,16 80,16 80,40 68,40; poly body 1 15,46 85,46 85,95 15,95; poly dark 3 50,8 94,47 6,47;"
        "dots light 6 50,31; poly light 1 24,58 40,58 40,74 24,74; line body 1 32,57 32,75; line body 1 23,66 41,66;"
        "poly white 2 54,62 72,62 72,94 54,94; dots ink 1.8 67,79",
    "tree": "poly wood 2 44,58 56,58 60,95 40,95; dots body 19 26,50 74,50; dots body 22 36,28 64,28 50,50;"
        "line dark 2 30,60 40,64 50,60; line dark 2 62,52 70,54 78,48; line light 3 24,27 30,18 38,14;"
        "line light 2 52,38 58,34 64,35",
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

# {name: (colour at the top, colour at the bottom, shapes)}. All are pale or dull, so every thing stands out on them.
BACKGROUNDS = {
    "sky": ("b2d8f0", "eaf6f8", "oval f6fbfd 22,18 12,5; oval f6fbfd 30,15 8,6; oval f6fbfd 76,27 11,4;"
        "oval f6fbfd 69,25 6,5; blob c2dab2 0 -30,80 20,62 60,74 110,66 140,120 -30,120;"
        "dots ecf0de 0.7 8,74 34,72 17,68; blob aece9c 0 -30,76 30,82 80,72 130,78 140,130 -30,130;"
        "dots ecf0de 0.8 8,88 24,95 45,90 63,84 78,94"),
    "night": ("1a1e3e", "424872", "dots e6e8f0 0.6 8,9 27,22 45,7 61,26 83,12 93,38 14,47 38,40 72,52;"
        "blob 34405c 0 -30,80 30,70 70,82 120,72 140,130 -30,130;"
        "blob 2a364e 0 -30,92 30,88 70,80 120,90 140,130 -30,130"),
    "sand": ("c8e4f2", "e6f2f2", "poly 92c4d0 0 -5,32 105,32 105,60 -5,60;"
        "line f2f8f4 2 -5,54 20,51 45,55 75,51 105,54; blob eedebc 0 -30,54 20,53 45,57 75,53 130,56 140,130 -30,130;"
        "dots decaa4 0.8 9,68 22,90 37,76 56,93 70,70 91,84"),
    "plain": ("faf6ec", "f2ebdc", "dots e4dac8 0.5 17,17 50,17 83,17 17,50 50,50 83,50 17,83 50,83 83,83"),
    "room": ("e8dad2", "ece0d8",
        "dots dcccc2 1.2 10,8 30,8 50,8 70,8 90,8 20,24 40,24 60,24 80,24 10,40 30,40 50,40 70,40 90,40;"
        "dots dcccc2 1.2 20,56 40,56 60,56 80,56; poly c4aa94 0 -5,70 105,70 105,105 -5,105;"
        "line f8f2ea 1.5 -5,70 105,70; oval d6c0b0 50,87 38,9; oval ccb4a4 50,87 30,6.5"),
    "snow": ("c0d2e4", "e2eaf2", "blob e4ecf4 0 -30,70 15,54 50,66 90,52 130,70 140,130 -30,130;"
        "blob f2f6fa 0 -30,66 25,78 70,70 130,82 140,130 -30,130; dots f8fbfd 0.8 10,14 30,34 48,10 66,30 88,18 6,42"),
}
TINTS = [(1, 1, 1), (1.01, 0.97, 1), (0.96, 1, 1.02), (1, 1, 0.96)]  # factors; odd ones also mirror the background


def scale_colour(colour: Iterable[int], factors: tuple) -> tuple:
    """(222, 48, 48), (0.5, 1, 6) -> (111, 48, 255). Values above 255 are cut to 255."""
    return tuple(min(255, round(c * f)) for c, f in zip(colour, factors))


def smooth_curve(points: list[complex], closed: bool) -> list[complex]:
    """A smooth curve through all points (a Catmull-Rom spline: one cubic from each point to the next)."""
    # The cubic from b to c also needs the points a before and d after it. An open curve repeats its end points.
    p = points[-1:] + points + points[:2] if closed else points[:1] + points + points[-1:]
    # Complex numbers x + yj, so the same arithmetic serves x and y. t goes from 0 (b) to 1 (c) in twelve steps.
    return [b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - 3 * c + d - a)))
            for a, b, c, d in zip(p, p[1:], p[2:], p[3:]) for t in (i / 12 for i in range(13))]


def paint_shapes(image: Image.Image, shapes: str, colour_of: Callable[[str], tuple | None], grow: float = 0) -> None:
    """colour_of(shade) -> RGB, or None to leave out that shade. grow: makes shapes larger by so many units per side."""
    pen, unit = ImageDraw.Draw(image), image.width / 100  # unit: pixels per unit of the tables
    for shape in shapes.split(";"):
        form, shade, *numbers = shape.replace(",", " ").split()
        colour, (r, *v) = colour_of(shade), [float(n) for n in numbers]
        if colour is None:
            continue
        if form == "oval":  # the only form that starts with a point instead of a radius
            x, (y, w, h) = r, v
            pen.ellipse([n * unit for n in (x - w - grow, y - h - grow, x + w + grow, y + h + grow)], colour)
            continue
        points, r = [complex(x, y) for x, y in zip(v[::2], v[1::2])], round((r + grow) * unit)  # r is now in pixels
        if form == "star":
            # Outer and inner points take turns around the centre. The first outer point is straight up, at -90 degrees.
            x, y, *radii, n = v
            points = [complex(x, y) + cmath.rect(radii[i % 2], cmath.pi * (i / n - 0.5)) for i in range(2 * int(n))]
        points = smooth_curve(points, form == "blob") if form in ("blob", "line") else points
        points = [(round(p.real * unit), round(p.imag * unit)) for p in points]
        if form in ("poly", "blob", "star"):
            pen.polygon(points, colour)
            points.append(points[0])  # the border drawn below must also run from the last point to the first
        if form != "dots":
            pen.line(points, colour, width=2 * r + 1)  # as wide as the discs below: from -r to r, both included
        for x, y in points:  # a disc on every point gives round ends and corners
            pen.ellipse((x - r, y - r, x + r, y + r), colour)


@lru_cache(maxsize=1024)  # a training run needs 12 kinds x 7 colours x 3 sizes x 2 directions = 504
def draw_sprite(kind: str, colour: str, px: int, flip: bool = False) -> Image.Image:
    """One thing on a transparent ground, RGBA, px x px pixels."""
    # Pillow draws hard edges only. Drawing at four times the size and then averaging makes them smooth.
    body, big = COLOURS[colour], max(4 * px, 256)
    shades = FIXED_SHADES | {"body": body, "dark": scale_colour(body, DARK_FACTORS),
                             "light": tuple((c + 255) // 2 for c in body)}  # light: halfway to white
    image = Image.new("RGBA", (big, big))
    # First the outline: the whole thing a little larger, in one dark colour. Parts in ink are dark enough without it.
    paint_shapes(image, SHAPES[kind], lambda s: None if s == "ink" else scale_colour(body, EDGE_FACTORS), grow=2.5)
    paint_shapes(image, SHAPES[kind], shades.get)
    image = image.resize((px, px), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@lru_cache(maxsize=64)  # 6 names x 4 tints = 24 for one size
def draw_background(name: str, tint: int, px: int) -> Image.Image:
    """A picture without things, RGB, px x px pixels."""
    *ends, shapes = BACKGROUNDS[name]
    big, colour_of = max(4 * px, 256), lambda code: scale_colour(bytes.fromhex(code), TINTS[tint])
    # A gradient from the top colour to the bottom colour. The mask is 0 at the top and 255 at the bottom.
    top, bottom = (Image.new("RGB", (big, big), colour_of(code)) for code in ends)
    image = Image.composite(bottom, top, Image.linear_gradient("L").resize((big, big)))
    paint_shapes(image, shapes, colour_of)
    image = image.resize((px, px), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if tint % 2 else image


# ----------------------------------------------------------------------------------------------------------------------
# Scenes
# Trap from here on: one call of rng more, less or moved changes all records, and the README's numbers no longer apply.

PAIRS = [(colour, kind) for kind in KINDS for colour in COLOURS]
# 12 of the 84 pairs: for each kind k the one colour c where 3 k + c is a multiple of 7. The factor 3 spreads them over
# all colours, so training shows every kind and every colour in many other pairs.
HELD_OUT = {pair for i, pair in enumerate(PAIRS) if (i // 7 * 3 + i % 7) % 7 == 0}
TRAIN_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT]
SIZES = {"small": 0.22, "medium": 0.275, "large": 0.33}  # the side of a thing, as a share of the picture's side
PLACES = ["top left", "top centre", "top right", "middle left", "centre", "middle right", "bottom left",
          "bottom centre", "bottom right"]  # the names of the nine cells, row by row
BACKGROUND_PHRASES = {"sky": "in a meadow", "night": "at night", "sand": "on a beach", "plain": "on plain paper",
                      "room": "in a room", "snow": "in the snow"}  # how a caption names each background


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str
    cell: int       # 0 to 8, row by row: cell = 3 * row + column
    x: float        # its centre, as a share of the picture's side, from the left
    y: float        # and from the top
    flip: bool      # mirrored, left to right

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene(Drawing):
    things: tuple   # in reading order: by rows, and from left to right in each row
    background: str
    tint: int       # index into TINTS

    def draw(self, px: int) -> Image.Image:
        picture = draw_background(self.background, self.tint, px).copy()  # a copy: the cached one must not change
        for t in self.things:
            thing = draw_sprite(t.kind, t.colour, max(1, round(SIZES[t.size] * px)), t.flip)
            corner = round(t.x * px - thing.width / 2), round(t.y * px - thing.height / 2)
            picture.paste(thing, corner, thing)  # the third argument is the mask: transparent parts change nothing
        return picture

    def count(self, word: str) -> int:
        """How many things match the word, which is a kind, a colour, or a name such as "red cat"."""
        return sum(word in (t.kind, t.colour, t.name) for t in self.things)


def make_scene(rng: random.Random, new_pairs: bool = False) -> Scene:
    """One to four things in different cells of a 3 x 3 grid. new_pairs: half of them (rounded up) are from HELD_OUT."""
    n = rng.randint(1, 4)
    # Half of the scenes take kinds and colours from pools of 1 to 3. They have something to count, and may show a kind
    # in several colours: it is not enough to know which words occur, but which belong together. Pool 12: everything.
    pool = rng.randint(1, 3) if rng.random() < 0.5 else 12
    kinds, colours = rng.sample(KINDS, pool), rng.sample(list(COLOURS), min(pool, 7))
    allowed = [(c, k) for c, k in TRAIN_PAIRS if c in colours and k in kinds] or TRAIN_PAIRS  # a pool may be held out
    pairs = [rng.choice(allowed) for _ in range(n)]
    if new_pairs:
        # Not all: if every thing were new, a model could recognise the split itself by any thing in the picture.
        pairs[:(n + 1) // 2] = [rng.choice(sorted(HELD_OUT)) for _ in range((n + 1) // 2)]
    things = []
    for (colour, kind), cell in zip(pairs, rng.sample(range(9), n)):  # different cells, so no two things overlap
        size = rng.choice(list(SIZES))
        jitter = 0.15 * (1 / 3 - SIZES[size])  # largest shift from the middle of the cell: the thing stays inside
        x, y = (cell % 3 + 0.5) / 3 + rng.uniform(-jitter, jitter), (cell // 3 + 0.5) / 3 + rng.uniform(-jitter, jitter)
        things.append(Thing(colour, kind, size, cell, x, y, rng.random() < 0.5))
    return Scene(tuple(sorted(things, key=lambda t: t.cell)), rng.choice(list(BACKGROUND_PHRASES)), rng.randrange(4))


def with_article(words: str) -> str:
    """orange cat -> an orange cat"""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(word: str) -> str:
    return word if word.endswith("fish") else word + "s"


def plural_phrase(word: str) -> str:
    """cat -> cats, red -> red things"""
    return plural(word) if word in KINDS else f"{word} things"


def prefer_focus(things: Iterable[Thing], focus: set) -> Iterable[Thing]:
    """The things whose pair of colour and kind is in focus. If there are none: all things."""
    return [t for t in things if (t.colour, t.kind) in focus] or things


def pick_unique(scene: Scene, rng: random.Random, focus=frozenset(), but=None) -> tuple[Thing | None, str]:
    """A thing other than `but` that one name fits, and that name: "cat" if it is the only cat, else "red cat"."""
    # No name tells two red cats apart. A question about one of them would have two answers.
    things = prefer_focus([t for t in scene.things if scene.count(t.name) == 1 and t != but], focus)
    if not things:
        return None, ""
    thing = rng.choice(things)
    return thing, thing.kind if scene.count(thing.kind) == 1 and rng.random() < 0.5 else thing.name


def pick_absent(scene: Scene, rng: random.Random, focus: set = frozenset()) -> str | None:
    """The name of a thing that is not in the scene: "red dog", where a red cat and a blue dog are."""
    # Hard on purpose: both words may fit something in the scene, only not the same thing. Or one of the words does.
    near = [(t.colour, u.kind) for t in scene.things for u in scene.things]
    near += [(t.colour, rng.choice(KINDS)) for t in scene.things]
    near += [(rng.choice(list(COLOURS)), t.kind) for t in scene.things]
    # Without a focus (in training, for example) held-out pairs must not even be mentioned.
    near = [p for p in near if not scene.count(" ".join(p)) and (bool(focus) or p not in HELD_OUT)]
    # With a focus: first near pairs in it, then any absent pair in it, then the other near pairs.
    near = [p for p in near if p in focus] or [p for p in sorted(focus) if not scene.count(" ".join(p))] or near
    return " ".join(rng.choice(near)) if near else None


def relations(t: Thing | None, u: Thing | None) -> list[tuple]:
    """[("left", "right of", "left"), ("above", "below", "below")]: t is left of u and below it."""
    # Left or right is certain only in different columns, above or below only in different rows.
    axes = [("left", "right of", t.cell % 3, u.cell % 3), ("above", "below", t.cell // 3, u.cell // 3)] if u else []
    return [(one, two, one if mine < other else two.split()[0]) for one, two, mine, other in axes if mine != other]


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# Each function returns one text about a scene, or "" where this form of text does not fit the scene.

def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """2 things at night. Top left: small red cat. Centre: blue dog. (With rng: the things in random order.)"""
    n, things = len(scene.things), list(scene.things)
    if rng:
        rng.shuffle(things)
    # The place comes first: it tells the model where in the picture to find every word that follows. "medium" is left
    # out: a size word in every sentence would be learned partly from the grammar, without looking.
    parts = [f"{PLACES[t.cell].capitalize()}: {t.size + ' ' if t.size != 'medium' else ''}{t.name}." for t in things]
    return f"{n} thing{'s' * (n > 1)} {BACKGROUND_PHRASES[scene.background]}. " + " ".join(parts)


def summarize(scene: Scene) -> str:
    """A red cat and 2 blue fish on a beach."""
    counts = Counter(t.name for t in scene.things)  # {"red cat": 1, "blue fish": 2}, in reading order
    *parts, last = [with_article(name) if n == 1 else f"{n} {plural(name)}" for name, n in counts.items()]
    text = " and ".join(filter(None, (", ".join(parts), last))) + f" {BACKGROUND_PHRASES[scene.background]}."
    return text[0].upper() + text[1:]


def sentence_per_thing(word: str, sentence: str) -> Callable[[Scene, random.Random], str]:
    """Makes a function that writes one sentence for each thing. word: how the sentence names it, "kind" or "name"."""
    def write(scene: Scene, rng: random.Random) -> str:
        # Only for things that this word identifies: with a red and a blue cat, "The cat is red" would be wrong.
        things = [t for t in scene.things if scene.count(getattr(t, word)) == 1]
        return " ".join(sentence.format(t, place=PLACES[t.cell]) for t in rng.sample(things, len(things)))
    return write


def list_counts(scene: Scene, rng: random.Random) -> str:
    """Cats: 2. Red things: 1. Dogs: 0."""
    present = {word for t in scene.things for word in (t.kind, t.colour)}
    # sorted, because the order of a set differs between processes, and the random sample depends on it.
    words = rng.sample(sorted(present), min(4, len(present))) + rng.sample([*KINDS, *COLOURS], 2)
    rng.shuffle(words)
    return " ".join(f"{plural_phrase(word).capitalize()}: {scene.count(word)}."
                    for word in dict.fromkeys(words))  # without duplicates, in the same order


def list_checks(scene: Scene, rng: random.Random) -> str:
    """Red cat: yes. Blue cat: no."""
    names = [rng.choice(scene.things).name if rng.random() < 0.5 else pick_absent(scene, rng) for _ in range(6)]
    return " ".join(f"{name.capitalize()}: {'yes' if scene.count(name) else 'no'}."
                    for name in dict.fromkeys(names) if name)


def list_relations(scene: Scene, rng: random.Random) -> str:
    """Red cat left or right of dog: left."""
    out = []
    for _ in range(4):
        t, name = pick_unique(scene, rng)
        u, other = pick_unique(scene, rng, but=t)
        out += [f"{name.capitalize()} {one} or {two} {other}: {answer}." for one, two, answer in relations(t, u)]
    return " ".join(dict.fromkeys(out))


# (the user's requests, the function that writes the text, its weight in the random choice). Why so many forms: a model
# that only reads "Top left: small red cat" learns to go from a place to a colour to a kind. It cannot answer "What
# colour is the cat?", which goes from a kind to a colour. Together the forms train what the questions need.
CAPTIONS = [
    (["Describe the picture.", "What do you see, and where?", "Describe everything in this image."],
     lambda scene, rng: describe(scene), 10),
    (["What is in the picture?", "Write a short caption.", "Say briefly what this shows."],
     lambda scene, rng: summarize(scene), 1),
    (["Name the colours."], sentence_per_thing("kind", "The {0.kind} is {0.colour}."), 1),
    (["Name the sizes."], sentence_per_thing("kind", "The {0.kind} is {0.size}."), 1),
    (["Where are the things?"], sentence_per_thing("kind", "The {0.kind} is at the {place}."), 1),
    (["Where is each one?"], sentence_per_thing("name", "The {0.name} is at the {place}."), 1),
    (["Count everything."], list_counts, 0.3),
    (["What is there, and what is not?"], list_checks, 0.3),
    (["How do they stand to each other?"], list_relations, 0.3),
]


# ----------------------------------------------------------------------------------------------------------------------
# Questions
# Each function returns (wordings of the question, the answer), or None where the scene has no such question. There are
# several wordings, because with one the model would learn the exact sentence instead of its meaning.
# focus: pairs of colour and kind that the question should be about; empty: any. Where an answer could be guessed from
# the question alone, the answer is drawn first and then a question that fits it. So all answers are equally frequent.

def ask_count(scene: Scene, rng: random.Random, focus: set):
    wordings = ["How many things are there?", "How many things do you see in total?", "Count all the things."]
    return wordings, str(len(scene.things))


def ask_number(scene: Scene, rng: random.Random, focus: set):
    target = rng.randrange(4)  # 0, 1, 2 and 3 equally often
    # Not one list of both: most absent words would be kinds, so "How many cats?" would mostly have the answer 0.
    words = [w for w in (KINDS if rng.random() < 0.5 else COLOURS) if scene.count(w) == target]
    if words:
        what = plural_phrase(rng.choice(words))
        return [f"How many {what} are there?", f"What is the number of {what}?", f"Count the {what}."], str(target)


def ask_property(given: str, wanted: str, *wordings: str) -> Callable:
    """Makes a question function: one property identifies a thing (the only cat), another one is the answer (red)."""
    def ask_one(scene: Scene, rng: random.Random, focus: set):
        things = prefer_focus([t for t in scene.things if scene.count(getattr(t, given)) == 1], focus)
        if things:
            t = rng.choice(things)
            return [wording.format(getattr(t, given)) for wording in wordings], getattr(t, wanted)
    return ask_one


def ask_exists(scene: Scene, rng: random.Random, focus: set):
    yes = rng.random() < 0.5  # the answer first: yes and no are equally frequent
    name = rng.choice(prefer_focus(scene.things, focus)).name if yes else pick_absent(scene, rng, focus)
    if name:
        name = with_article(name)
        return [f"Is there {name}?", f"Do you see {name}?", f"Does the picture show {name}?"], "yes" if yes else "no"


def ask_relation(scene: Scene, rng: random.Random, focus: set):
    t, name = pick_unique(scene, rng, focus)
    u, other = pick_unique(scene, rng, but=t)
    if u:
        one, two, answer = rng.choice(relations(t, u))  # never empty: two cells differ in their row or their column
        between = f"{one} or {two} the {other}?"
        return [f"Is the {name} {between}", f"Where is the {name}, {between}"], answer


def ask_place(scene: Scene, rng: random.Random, focus: set):
    t, name = pick_unique(scene, rng, focus)
    if t:
        return [f"Where is the {name}?", f"In which part of the picture is the {name}?",
                f"Where do you see the {name}?"], PLACES[t.cell]


def ask_compare(scene: Scene, rng: random.Random, focus: set):
    words = [w for w in (KINDS if rng.random() < 0.5 else COLOURS) if scene.count(w)]  # only what is in the picture
    pairs = [(v, w) for v in words for w in words if scene.count(v) > scene.count(w)]
    if pairs:
        more, fewer = map(plural_phrase, rng.choice(pairs))
        one, two = (more, fewer) if rng.random() < 0.5 else (fewer, more)  # the right one is named first half the time
        return [f"Which are there more of, {one} or {two}?", f"What is more common, {one} or {two}?",
                f"Are there more {one} or more {two}?"], more


def ask_size(scene: Scene, rng: random.Random, focus: set):
    # Exactly one thing must have the extreme size: of two large ones neither is "the largest".
    sizes = [SIZES[t.size] for t in scene.things]
    ends = [(word, end) for word, end in (("largest", max(sizes)), ("smallest", min(sizes))) if sizes.count(end) == 1]
    if len(sizes) > 1 and ends:
        word, end = rng.choice(ends)
        t = scene.things[sizes.index(end)]
        if rng.random() < 0.5:
            return [f"What colour is the {word} thing?"], t.colour
        return [f"What is the {word} thing?", f"Which thing is the {word}?"], t.kind


def ask_choice(scene: Scene, rng: random.Random, focus: set):
    # Multiple choice with one right name. The wrong ones are similar to things in the picture: see pick_absent.
    right = rng.choice(prefer_focus(scene.things, focus)).name
    wrong = {pick_absent(scene, rng, focus) for _ in range(4)} - {None}
    if len(wrong) >= 2:
        options, at = rng.sample(sorted(wrong), 2), rng.randrange(3)
        options.insert(at, right)  # each of A, B and C is equally likely to be right
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
        return [f"{question}\n{lines}\nAnswer with the letter." for question in
                ("Which of these is in the picture?", "What can you see?", "Which one is there?")], "ABC"[at]


# {kind: (weight in training, function)}. Questions about two things or a number are learned last, so they have larger
# weights. Not much larger: with "relation" at 4, a run did not learn "number" and "choice" (70 % over all kinds).
QUESTIONS = {
    "count": (0.5, ask_count), "number": (2.0, ask_number),
    "colour": (1.0, ask_property("kind", "colour", "What colour is the {}?", "Which colour does the {} have?",
                                 "The {} is of what colour?")),
    "kind": (1.0, ask_property("colour", "kind", "What is the {} thing?", "Which thing is {}?",
                               "What kind of thing is {}?")),
    "exists": (1.0, ask_exists), "relation": (2.0, ask_relation), "place": (1.5, ask_place),
    "compare": (1.2, ask_compare), "size": (0.7, ask_size), "choice": (1.5, ask_choice)}


def ask(kind: str, scene: Scene, rng: random.Random, focus: set = frozenset()) -> tuple[str, str] | None:
    """One question of this kind -> (question, answer), or None where the scene has no such question."""
    wordings, answer = QUESTIONS[kind][1](scene, rng, focus) or ([], "")
    if wordings:
        return rng.choice(wordings), answer


# ----------------------------------------------------------------------------------------------------------------------
# Records

def to_messages(*turns: tuple[str, str]) -> list[dict]:
    """("Hi", "Hello!") -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]"""
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


class World:
    """
    World(task, split, seed)[i] -> record i. The arguments and i alone determine it, so it is the same on every machine
    and in any order of reading. Shuffling, resuming and training on several GPUs rely on that.
    task            "text"      chapter 1: no picture; plain text, or a dialogue about a scene described in words
                    "captions"  chapter 2: a picture and one caption
                    "chat"      chapter 3: a picture with a caption, or with one or two questions
                    "exam"      a picture and one question; the kinds of questions take turns
    split           "train", or held out: "scenes" or "pairs" (see the top of this file)
    kinds           kinds of questions; empty: all
    caption_share   in "text" and "chat": a function i -> the probability that record i is a caption, not questions.
                    None: 0.9 at i = 0, falling to 0.1 at i = 12,000: a curriculum, first captions, then questions.
    """
    TASKS, SPLITS = ("text", "captions", "chat", "exam"), ("train", "scenes", "pairs")

    def __init__(self, task: str, split: str = "train", seed: int = 0, kinds: Iterable[str] = (),
                 caption_share: Callable[[int], float] | None = None):
        self.task, self.split, self.seed, self.kinds = task, split, seed, list(kinds or QUESTIONS)
        self.caption_share = caption_share or (lambda i: max(0.1, 0.9 - i / 15_000))
        if task not in self.TASKS or split not in self.SPLITS:
            raise ValueError(f"no task {task!r} with split {split!r}; choose from {self.TASKS} and {self.SPLITS}")
        if unknown := [kind for kind in self.kinds if kind not in QUESTIONS]:
            raise ValueError(f"{unknown[0]!r} is not a kind of question; choose from {', '.join(QUESTIONS)}")

    def __getitem__(self, i: int) -> dict:
        # A string seeds by its SHA-512 hash, the same in every Python process. The hash() of a tuple of strings is not.
        rng = random.Random(f"{self.seed}/{self.split}/{self.task}/{i}")
        record = {"id": f"world/{self.split}/{self.seed}/{i}", "images": []}
        record |= self.exam_record(i, rng) if self.task == "exam" else self.chat_record(i, rng)
        return widen(record, rng) if self.split == "train" else record  # what is held out is the world alone

    def chat_record(self, i: int, rng: random.Random) -> dict:
        scene = make_scene(rng)
        questions, caption = self.pick_questions(scene, rng), self.pick_caption(scene, rng)
        if self.task == "text" and rng.random() < 0.3:  # 3 of 10 records of chapter 1 are plain text, not a dialogue
            return {"text": f"{describe(scene)} {caption[1]}"}
        only_caption = self.task == "captions" or not questions or rng.random() < self.caption_share(i)
        messages = to_messages(*[caption] if only_caption else questions)
        # Chapter 1 has no pictures: a description in random order takes the place of the picture.
        shown = describe(scene, rng) if self.task == "text" else "<image>"
        messages[0]["content"] = f"{shown}\n{messages[0]['content']}"
        return {"messages": messages, "images": [] if self.task == "text" else [scene]}

    def pick_questions(self, scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
        """Two (question, answer) pairs of different kinds, or fewer where the scene does not have two."""
        # A weighted shuffle: with u uniform, u^(1 / weight) is the largest with a chance in proportion to the weight.
        kinds = sorted(self.kinds, key=lambda kind: rng.random() ** (1 / QUESTIONS[kind][0]), reverse=True)
        # Generators are lazy: kinds are tried one after another, and no more once there are two questions.
        return list(islice(filter(None, (ask(kind, scene, rng) for kind in kinds)), 2))

    def pick_caption(self, scene: Scene, rng: random.Random) -> tuple[str, str]:
        text = ""
        while not text:  # some forms of caption do not fit some scenes; then another form is drawn
            prompts, write, _ = rng.choices(CAPTIONS, [weight for *_, weight in CAPTIONS])[0]
            text = write(scene, rng)
        return rng.choice(prompts), text

    def exam_record(self, i: int, rng: random.Random) -> dict:
        """One question, kinds in turn. In the split "pairs" it is about a held-out pair wherever its kind allows it."""
        kind, focus = self.kinds[i % len(self.kinds)], HELD_OUT if self.split == "pairs" else set()
        turn = None
        while not turn:  # until a scene allows a question of this kind
            scene = make_scene(rng, new_pairs=bool(focus))
            # Always the same seed, so the wanted answer stays the same. Otherwise hard-to-find answers would be rare.
            turn = ask(kind, scene, random.Random(f"{self.seed}/{i}"), focus)
        return {"messages": to_messages((f"<image>\n{turn[0]}", turn[1])), "images": [scene], "kind": kind,
                "metric": "exact"}  # the scoring rule: the whole answer must be right
