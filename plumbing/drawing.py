"""
What Pillow draws for people: contact sheets, the curves of a run, line charts, bars, tables of cells. Called by the
chapters for samples.png and curves.png, and by the book's figures. A reader of the lessons need not know it.
"""
import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from plumbing.files import attempt
from plumbing.pictures import open_source
from plumbing.records import text_of, turns_of


def draw_sheet(path, sources: list, captions: list[list[tuple[str, str]]], columns: int = 4, px: int = 240) -> None:
    "A contact sheet of pictures, each with its lines below it, (text, colour), wrapped at 34 letters."
    wrapped = [[(line, colour) for text, colour in texts for line in textwrap.wrap(text, 34)[:20]]
               for texts in captions]
    lines, font = max(map(len, wrapped)), ImageFont.load_default(14)  # 20: an answer without end is cut
    height = px + 18 * lines + 10 * bool(lines)
    sheet = Image.new("RGB", (columns * px, -(-len(sources) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (source, texts) in enumerate(zip(sources, wrapped)):
        x, y = i % columns * px, i // columns * height
        image = None if source is None else attempt(open_source, source, px - 8)  # a text-only record has no picture
        if isinstance(image, Image.Image):  # nor is there one that cannot be opened
            sheet.paste(image.resize((px - 8, px - 8)), (x + 4, y + 4))
        for row, (line, colour) in enumerate(texts):
            pen.text((x + 6, y + px + 18 * row), line, fill=colour, font=font)
    sheet.save(path)


def draw_records(path: str, records: list) -> None:
    "A contact sheet of records: the first picture and the first turns of each."
    colours = {"assistant": "green"}
    draw_sheet(path, [next(iter(record["images"]), None) for record in records],
               [[(text_of(turn["content"]).replace("<image>", "").strip(), colours.get(turn["role"], "black"))
                 for turn in turns_of(record)[:3]] for record in records], columns=5)


# The curves of a run: log.jsonl as a picture. {title of a chart: the log's names that are drawn in it}
CHARTS = {"loss, nats per token": ("loss", "caption_loss", "blind_loss"), "bits per byte": ("bits_per_byte", ),
          "held-out accuracy": ("accuracy", ), "reward": ("reward", "teaching")}

LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f3fbf", "#8c564b", "#707070",
                "#e01010", "#000000")


def read_curves(rows: list[dict]) -> dict[str, dict[str, list]]:
    "A log's rows -> {title: {name: [(step, value), ...]}} for every chart of which the log has something."
    charts = {title: {} for title in CHARTS}
    for row in rows:
        if "step" not in row or "stage" in row:  # how the run was started, and its result: no points of a curve
            continue
        # RL evaluates two held-out splits at one step, and says which; so the split is part of the name.
        values = {f"{name} {row.get('split', '')}".strip(): value for name, value in row.items()}
        values |= {} if "split" in row else {f"accuracy: {kind}": value for kind, value in row.get(
            "accuracy_by_kind", {}).items()}
        for title, names in CHARTS.items():
            for name, value in values.items():
                # None: a step that was skipped, as its loss was no finite number
                if re.split("[ :]", name)[0] in names and value is not None and math.isfinite(value):
                    # By step: after a crash, a resumed run repeats some steps, and what it did then counts.
                    charts[title].setdefault(name.removeprefix("accuracy: "), {})[row["step"]] = value
    return {title: {name: sorted(line.items()) for name, line in lines.items()}
            for title, lines in charts.items() if lines}


def draw_curves(log: Path) -> None:
    "curves.png beside a log.jsonl."
    if charts := read_curves([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]):
        draw_lines(log.with_name("curves.png"), charts)


def draw_lines(path: Path, charts: dict[str, dict[str, list]], width: int = 800, height: int = 420) -> None:
    "Line charts under each other, {title: {name: [(x, y), ...]}}. Each line's name stands at its right end."
    # 24 pixels of 800 are letters that can still be read on a phone. White paper, so that dark pages show it too.
    font, small = ImageFont.load_default(24), ImageFont.load_default(20)
    left, top, right, bottom = 90, 60, width - 220, height - 50
    sheet = Image.new("RGB", (width, height * len(charts)), "white")
    for number, (title, lines) in enumerate(charts.items()):
        chart = Image.new("RGB", (width, height), "white")
        pen, (xs, ys) = ImageDraw.Draw(chart), zip(*(point for line in lines.values() for point in line))
        round_numbers = [m * 10.0 ** e for e in range(-4, 7) for m in (1, 1.5, 2, 3, 5, 7)]
        if title.startswith("loss"):  # it falls from 15 to 0.2: on a logarithmic scale both ends can be read
            scale = lambda y: math.log(max(y, 9e-5))  # noqa: E731
            low, high, ticks = max(min(ys), 1e-4) / 1.1, max(*ys, 1e-4) * 1.1, round_numbers
            title += ", logarithmic axis"
        else:
            scale, step = lambda y: y, next(n for n in round_numbers if 5 * n >= max(ys))
            low, high, ticks = min(0, *ys), step * math.ceil(max(*ys, step) / step), [step * i for i in range(6)]

        def place(x: float, y: float) -> tuple[float, float]:  # a point of the chart -> a point of the picture
            return (left + (right - left) * (x - min(xs)) / max(max(xs) - min(xs), 1e-9),
                    bottom - (bottom - top) * (scale(y) - scale(low)) / (scale(high) - scale(low)))
        pen.text((12, 10), title, "black", font)
        above = math.inf
        for y in ticks:
            if low <= y <= high and place(0, y)[1] < above - 26:  # no number on top of another
                above = place(0, y)[1]
                pen.line((place(min(xs), y), place(max(xs), y)), "#dddddd", 2)
                pen.text((left - 10, above), f"{y:g}", "#555555", font, "rm")
        pen.text((left, bottom + 10), f"step {min(xs):g}", "#555555", font)
        pen.text((right, bottom + 10), f"{max(xs):g}", "#555555", font, "ra")
        free = 0.0  # The names from the highest line's end to the lowest's, moved apart where two would touch.
        for rest, (i, (name, line)) in zip(range(len(lines) - 1, -1, -1), sorted(
                enumerate(lines.items()), key=lambda item: -item[1][1][-1][1])):
            colour, n = LINE_COLOURS[i % len(LINE_COLOURS)], len(line) // 20
            points = [place(x, y) for x, y in line]
            if n > 0:  # Long runs are noisy: each step is drawn pale, and over it the mean of the steps around it.
                pale = tuple((v + 3 * 255) // 4 for v in ImageColor.getrgb(colour))
                pen.line(points, pale, 2)
                around = [line[max(0, at - n):at + n + 1] for at in range(len(line))]
                points = [place(x, sum(y for _, y in near) / len(near)) for (x, _), near in zip(line, around)]
                pen.text(((left + right) / 2, bottom + 12), "thick: running mean", "#555555", small, "ma")
            pen.line(points, colour, 4, "curve")
            pen.circle(points[-1], 6, colour)
            free = max(free + 27, min(points[-1][1], bottom - 27 * rest))
            pen.text((right + 16, free), name, colour, font, "lm")
        sheet.paste(chart, (0, number * height))
    sheet.save(path)


def draw_panels(path: Path, title: str, lines: dict[str, list], behind: list) -> None:
    "A small chart from 0 to 1 for each of {name: [(x, y), ...]}, two beside each other; another line behind it."
    sheet, pen = page(50 + 150 * -(-len(lines) // 2), title)
    most = behind[-1][0]
    for i, (name, line) in enumerate(lines.items()):
        left, top = 12 + i % 2 * 400, 60 + i // 2 * 150
        for y in (0, 1):
            pen.line((left, top + 35 + 90 * (1 - y), left + 290, top + 35 + 90 * (1 - y)), "#dddddd", 2)
        for points, colour in ((behind, "#b0b0b0"), (line, LINE_COLOURS[0])):
            pen.line([(left + 290 * x / most, top + 125 - 90 * y) for x, y in points], colour, 4, "curve")
        pen.text((left, top), name, "black", font())
        last = line[-1][1]
        pen.text((left + 300, top + 125 - 90 * last), f"{100 * last:.0f} %", LINE_COLOURS[0], font(), "lm")
    sheet.save(path)


# One meaning for each colour in all figures: grey is given or blind, blue comes from a picture or is read, green is
# learned or right, orange is computed, red is wrong, pale is empty.
GREY, BLUE, GREEN, ORANGE, RED, PALE = "#d4d4d4", "#7db8e0", "#57b894", "#e8a33d", "#d0603a", "#e4eef6"

WIDE = 800  # pixels. A page shows a figure at half of that or less on a phone: letters below 20 could not be read.


def font(size: int = 24):
    return ImageFont.load_default(size)


def page(high: int, title: str = "") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    "White paper with a title -> (the picture, a pen to draw on it)."
    sheet = Image.new("RGB", (WIDE, high), "white")  # a background of its own: a reader's page may be dark
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 10), title, "black", font(26))
    return sheet, pen


def cells(sheet, at: tuple, size: tuple, colours: list[list[str]]) -> None:
    "A table of coloured cells, without lines between them, that fills size pixels."
    rgb = np.array([[ImageColor.getrgb(colour) for colour in row] for row in colours], dtype=np.uint8)
    sheet.paste(Image.fromarray(rgb).resize(size, Image.Resampling.NEAREST), at)


def bars(title: str, rows: list[tuple[str, list[tuple[float, str]], str]], left: int = 300, tall: int = 46,
         legend: dict = {}) -> Image.Image:
    """
    Horizontal bars, (name, [(length, colour), ...] end to end, what is written behind). Negative ones go to the left.
    legend: {what a colour means: the colour}.
    """
    sheet, pen = page(60 + tall * len(rows) + 36 * -(-len(legend) // 3), title)
    totals = [sum(value for value, _ in parts) for _, parts, _ in rows]
    zero, unit = left, (WIDE - left - 110) / (max(0, *totals) - min(0, *totals) or 1)
    zero -= min(0, *totals) * unit
    for i, (name, parts, text) in enumerate(rows):
        x, y = zero, 56 + tall * i
        pen.text((left - 14, y + tall / 2 - 5), name, "black", font(), "rm")
        for value, colour in parts:
            pen.rectangle((min(x, x + value * unit), y, max(x, x + value * unit), y + tall - 10), colour)
            x += value * unit
        pen.text((max(x, zero) + 10, y + tall / 2 - 5), text, "black", font(), "lm")
    for i, (name, colour) in enumerate(legend.items()):
        x, y = 20 + i % 3 * 260, sheet.height - 36 * (-(-len(legend) // 3) - i // 3)
        pen.rectangle((x, y, x + 22, y + 22), colour)
        pen.text((x + 32, y + 11), name, "black", font(), "lm")
    return sheet
