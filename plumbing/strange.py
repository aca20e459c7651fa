"""
What training meets beside the built-in world's own records, so that a model of the world is not lost outside it:
pictures that show something else and questions without a meaning, each with one honest answer; grey pictures; American
spellings. Called by world.py for every training record. A reader of the lessons need know only the shares below.
"""
import random
import string
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

# A model answers whatever it is asked about whatever it sees: that there is nothing it knows must be learned, too. Of
# 160 photographs, none of which is ever trained on, 160 get this answer; without these records they got noise.
HONEST = "I only know drawings of my own small world; this is something else."
STRANGE_SHARE = 0.04   # of the training records with a picture: a strange picture and the honest answer
# A grey picture and the usual answer. Without them every blind answer would be the honest one, and the blind baseline
# would not tell how far words alone lead.
GREY_SHARE = 0.01
# The same for what is asked: letters without a meaning. Without them "Où est le chat?" got one word 100 times.
NO_WORDS = "I know few words, and do not understand these."
GARBLED_SHARE = 0.01
AMERICAN_SHARE = 0.2   # of the training records: the user writes color, center, gray. Answers keep their spelling.


class Drawing:
    "A picture that code draws, by its method draw(px) -> RGB, px x px pixels: the world's Scene, or one of these two."
    sides = 1  # how many times as wide as the encoder's square it is meant to be: above 1 for small things


@dataclass(frozen=True)
class Grey(Drawing):
    "What the blind baseline shows in place of a picture."

    def draw(self, px: int) -> Image.Image:
        return Image.new("RGB", (px, px), (128, 128, 128))


@dataclass(frozen=True)
class Strange(Drawing):
    "A picture that is not of the world. Parts of the scene, too large or in disorder, are in some of them."
    seed: str
    scene: Drawing

    def draw(self, px: int) -> Image.Image:
        rng = random.Random(self.seed)
        # What is the same in photographs of anything: surfaces that are rough or smooth, edges, no pure colours, a
        # little blur. So there are a few kinds of drawing, and then, as a camera does, light, colour and grain.
        make = rng.choice((noise, gradient, stripes, shapes, shapes, shapes, lines, zoom, mosaic))
        image = make(rng, px, self.scene)
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.04) * px))
        if rng.random() < 0.5:
            for change, low, high in ((ImageEnhance.Color, 0, 1.2), (ImageEnhance.Contrast, 0.3, 1.3),
                                      (ImageEnhance.Brightness, 0.4, 1.4)):
                image = change(image).enhance(rng.uniform(low, high))
            grain = grid(rng, px, px, px, "RGB", Image.Resampling.NEAREST)
            image = Image.blend(image, grain, rng.choice((0, 0.05, 0.12)))
        return image


def widen(record: dict, rng: random.Random) -> dict:
    "A training record of the world -> the same, or one of those that this file is about."
    american, kind = rng.random() < AMERICAN_SHARE, rng.random()
    if "text" in record:  # chapter 1 has no pictures; it learns the words of both answers
        text = HONEST if kind < STRANGE_SHARE else NO_WORDS if kind < STRANGE_SHARE + GARBLED_SHARE else record["text"]
        return record | {"text": text}
    messages = [turn | {"content": to_american(turn["content"])} if american and turn["role"] == "user" else turn
                for turn in record["messages"]]
    images = record["images"]
    if images and kind < STRANGE_SHARE:
        messages = [messages[0], {"role": "assistant", "content": HONEST}]
        images = [Strange(record["id"], *images)]
    elif images and kind < STRANGE_SHARE + GREY_SHARE:
        images = [Grey()]
    elif images and kind < STRANGE_SHARE + GREY_SHARE + GARBLED_SHARE:
        garbled = garble(rng, messages[0]["content"].split()[-1])
        messages = [messages[0] | {"content": f"<image>\n{garbled}"}, {"role": "assistant", "content": NO_WORDS}]
    return record | {"messages": messages, "images": images}


def garble(rng: random.Random, last: str) -> str:
    """"kqeu Tr 4444 üoщ cat?": words of letters that mean nothing, most of them ASCII; at times the last one does."""
    letters = string.ascii_letters + string.ascii_lowercase * 3 + string.digits + ".,;:?!-+=()'äöüéèßñçøшщияلж日本語🙂"
    words = [rng.choice(letters) * rng.randint(2, 12) if rng.random() < 0.1 else
             "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(0, 12))]
    return " ".join(words + [last] * (len(words) > 2 and rng.random() < 0.3))


def to_american(text: str) -> str:
    return text.replace("olour", "olor").replace("entre", "enter").replace("grey", "gray")


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of strange pictures: (rng, px, a scene) -> RGB, px x px pixels

def any_colour(rng: random.Random) -> tuple:
    spread, grey = 25 if rng.random() < 0.4 else 255, rng.randrange(256)  # two of five are nearly grey, as surfaces are
    return tuple(min(255, max(0, grey + rng.randint(-spread, spread))) for _ in range(3))


def grid(rng, px: int, columns: int, rows: int, mode: str, resampling) -> Image.Image:
    "Random colours in a grid, enlarged to the whole picture."
    image = Image.frombytes(mode, (columns, rows), rng.randbytes(columns * rows * len(mode)))
    return image.convert("RGB").resize((px, px), resampling)


def noise(rng, px: int, scene=None) -> Image.Image:
    "Grids of several sizes on top of each other: clouds, static, and what lies between."
    image = Image.new("RGB", (px, px), any_colour(rng))
    for _ in range(rng.randint(1, 4)):
        n = rng.choice((2, 3, 4, 6, 9, 14, 24, 40, 72))
        layer = grid(rng, px, n, rng.choice((n, n, 2 * n, max(1, n // 3))), rng.choice(("RGB", "RGB", "L")), rng.choice(
            (Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))
        image = Image.blend(image, layer, rng.uniform(0.3, 1))
    return image


def gradient(rng, px: int, scene=None) -> Image.Image:
    columns, rows = rng.randint(1, 3), rng.randint(1, 3)
    colours = bytes(value for _ in range(columns * rows) for value in any_colour(rng))
    return Image.frombytes("RGB", (columns, rows), colours).resize((px, px), Image.Resampling.BICUBIC)


def stripes(rng, px: int, scene=None) -> Image.Image:
    image, colours = gradient(rng, 2 * px), [any_colour(rng) for _ in range(rng.randint(1, 3))]
    pen, width, x = ImageDraw.Draw(image), rng.uniform(0.03, 0.33) * px, 0.0
    while x < 2 * px:
        pen.rectangle((x, 0, x + width * rng.uniform(0.4, 0.7), 2 * px), rng.choice(colours))
        x += width * rng.uniform(0.8, 1.2)
    if rng.random() < 0.3:
        image = Image.blend(image, image.transpose(Image.Transpose.ROTATE_90), 0.5)
    half = px // 2  # twice too large until here, so that no corner is empty after the turn
    return image.rotate(rng.uniform(0, 180), Image.Resampling.BILINEAR).crop((half, half, half + px, half + px))


def shapes(rng, px: int, scene=None) -> Image.Image:
    "Shapes with a surface each, on a surface: one large one like a piece of clothing, or many."
    surfaces = (gradient, gradient, noise, stripes)
    image = rng.choice(surfaces)(rng, px)
    for _ in range(rng.choice((1, 1, 2, 4, 8, 16))):
        mask, r = Image.new("L", (px, px)), px * rng.uniform(0.08, 0.6)
        pen, x, y = ImageDraw.Draw(mask), rng.uniform(-0.1, 1.1) * px, rng.uniform(-0.1, 1.1) * px
        if rng.random() < 0.5:
            pen.polygon([(x + rng.uniform(-r, r), y + rng.uniform(-r, r)) for _ in range(rng.randint(3, 8))], 255)
        else:
            w = r * rng.uniform(0.3, 1)
            pen.ellipse((x - w, y - r, x + w, y + r), 255)
        if rng.random() < 0.5:
            mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.007, 0.05) * px))
        image.paste(rng.choice(surfaces)(rng, px), (0, 0), mask)
    return image


def lines(rng, px: int, scene=None) -> Image.Image:
    image = gradient(rng, px)
    for _ in range(rng.choice((2, 5, 12, 40))):
        points = [(rng.uniform(-0.2, 1.2) * px, rng.uniform(-0.2, 1.2) * px) for _ in range(rng.choice((2, 2, 3, 6)))]
        width = max(1, round(rng.choice((0.014, 0.014, 0.03, 0.04, 0.08)) * px))
        ImageDraw.Draw(image).line(points, any_colour(rng), width, "curve")
    return image


def zoom(rng, px: int, scene: Drawing) -> Image.Image:
    "A part of the scene, 2.5 to 6 times as large: no whole thing of the world is so large."
    side = max(2, round(px / rng.uniform(2.5, 6)))
    x, y = rng.randrange(px - side + 1), rng.randrange(px - side + 1)
    part = scene.draw(px).crop((x, y, x + side, y + side)).rotate(rng.choice((0, 0, 90, 180, 270)))
    return part.resize((px, px), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))


def mosaic(rng, px: int, scene: Drawing) -> Image.Image:
    "Pieces smaller than a thing, of the scene and of other strange pictures, in disorder."
    image, side = Image.new("RGB", (px, px)), -(-px // rng.choice((4, 5, 6, 9)))
    sources = [rng.choice((lambda *_: scene.draw(px), zoom, shapes))(rng, px, scene) for _ in range(rng.randint(1, 3))]
    for x in range(0, px, side):
        for y in range(0, px, side):
            a, b = rng.randrange(px - side + 1), rng.randrange(px - side + 1)
            piece = rng.choice(sources).crop((a, b, a + side, b + side)).rotate(rng.choice((0, 90, 180, 270)))
            image.paste(piece, (x, y))
    return image
