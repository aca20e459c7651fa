"""
Several runs beside each other: a table, the difference with its interval, in what the runs differ, and compare.png.
Called by `python bench.py --what=compare --init=A,B`. A reader of the lessons need not know it.

Accuracies are measured anew, not read from the logs: a log does not say which questions were answered right, and the
difference of two models is known best where both were asked the same. Most answers are alike, and cancel.
"""
import os
from dataclasses import asdict
from pathlib import Path

import data
from plumbing.drawing import draw_lines, read_curves
from plumbing.settings import differences
from plumbing.files import parse_json, read_json, require
from plumbing.flags import given
from plumbing.recipes import read_records
from plumbing.world import World
from model import load_checkpoint
from tokenizer import Tokenizer
from train_rl import gain
from train_sft import evaluate

# Of accuracy only the total: ten kinds of questions in each run would be too many lines.
DRAWN = ("loss", "caption_loss", "bits_per_byte", "accuracy", "reward")


def read_log(folder: str) -> list[dict]:
    with open(path := Path(folder, "log.jsonl"), encoding="utf-8") as file:
        return [parse_json(line, path) for line in file]


def questions(flags, specs: set[tuple[str, str]]) -> dict[str, list]:
    "-> {held-out set: records}, the same for all runs. specs: --data and --val of each of them."
    spec, val = flags.data, ""
    if "data" not in given():
        names = ", ".join(sorted(one for one, _ in specs))
        require(len(specs) == 1, f"--what=compare: trained on different data ({names}); name the questions for all by "
                "--data=, world or a file")
        (spec, val), = specs
    elif spec != "world":  # a file of questions: all of it, as in --what=eval
        records = [one for name, _ in data.parse_mixture(spec) for row in read_records(name)
                   for one in data.questions_of(row)]
        return {Path(spec).stem: records[:flags.eval_size]}
    # What the chapters hold out: the split does not depend on the seed, so it is held out of all of these runs.
    exams = {split: World("exam", split, seed=1) for split in ("scenes", "pairs")}
    return data.load_data(spec, World("chat"), exams, flags.seed, flags.eval_size, val, max_bad=0.01)[1]


def ask_all(flags, setup, logs: dict, config: dict) -> tuple[dict, dict]:
    """
    -> ({run: its parameters}, {run: {held-out set: evaluation}}); {} for runs that cannot answer yet. Into config goes
    what the loaded model has: an older config.json lacks fields.
    """
    answer = [name for name in logs if {"sft", "rl"} & set(config[name].get("run", {}).get("chapters", []))]
    asked = questions(flags, {(config[name]["run"]["data"], logs[name][0].get("flags", {}).get("val", ""))
                              for name in answer}) if answer else {}
    sizes, scores = {}, {name: {} for name in logs}
    for name in filter(config.get, logs):
        vlm, tokenizer = load_checkpoint(name, setup.device).to(setup.dtype), Tokenizer.from_pretrained(name)
        sizes[name], config[name] = sum(p.numel() for p in vlm.parameters()), asdict(vlm.config)
        if name in answer:
            setup.print(f"{name} answers {sum(map(len, asked.values())):,} questions")
            scores[name] = {split: evaluate(vlm, tokenizer, records, setup) for split, records in asked.items()}
    return sizes, scores


def tell_difference(one: dict, other: dict) -> dict:
    "Two evaluations of the same questions -> how much more the other has right, and whether that is more than chance."
    out = gain(one["right"], other["right"])
    low, high = out["gain_ci95"]
    return {"gain": out["gain"], "gain_ci95": [low, high], "within_noise": low <= 0 <= high}


def draw(logs: dict, short: dict, scores: dict) -> None:
    "compare.png: a chart for each thing that the logs have."
    charts = {}
    for name, rows in logs.items():
        for title, lines in read_curves(rows).items():
            for line, points in lines.items():
                if line.split()[0] in DRAWN:
                    charts.setdefault(f"{title}: {line}", {})[short[name]] = points
        if scores[name]:  # its log may have none: chapter 3 evaluates on the way in long runs only
            first = next(iter(scores[name].values()))["accuracy"]
            charts.setdefault("held-out accuracy: accuracy", {}).setdefault(short[name], [(rows[-1]["step"], first)])
    require(charts, f"--init={','.join(logs)}: these logs have no steps yet")
    draw_lines(Path("compare.png"), charts)


def table(short: dict, sizes: dict, results: dict, scores: dict, gains: dict) -> list[str]:
    "-> lines: the runs, then the differences to the first of them."
    sets = list(dict.fromkeys(split for one in scores.values() for split in one))
    wide = max(map(len, short.values())) + 2
    lines = [f"{'':<{wide}}{'parameters':>12}{'steps':>8}{'seconds':>9}" + "".join(
        f"   {split:<26}" for split in sets)]
    for name, label in short.items():
        result = results[name]
        row = f"{label:<{wide}}{sizes.get(name, 0):>12,}{result.get('step', 0):>8,}{result.get('seconds', 0):>9.0f}"
        for score in (scores[name].get(split) for split in sets):
            row += "   " + (f"{score['accuracy']:>6.1%} ({score['ci95'][0]:.1%} to {score['ci95'][1]:.1%})"
                            if score else "").ljust(26)
        # chapters 1 and 2 answer no questions: their own measure
        row += "".join(f"   {key} {result[key]:.3f}" for key in ("bits_per_byte", "caption_loss") if key in result)
        lines.append(row)
    for name, of in gains.items():
        for split, told in of.items():
            gained, low, high = (100 * share for share in (told["gain"], *told["gain_ci95"]))
            lines.append(f"{short[name]} against {next(iter(short.values()))}, {split}: {gained:+.1f} points "
                         f"({low:+.1f} to {high:+.1f})" + ", within noise" * told["within_noise"])
    if gains:
        lines.append("(95 % intervals; of the differences on the same questions. They know nothing of chance in "
                     "training: another --seed alone moves a tiny model by some points, so compare three of each)")
    return lines


def compare(flags, setup) -> dict:
    names = [name for name in flags.init.split(",") if name]
    require(len(names) > 1, "--what=compare: name the folders of two runs or more, --init=out/tiny/sft,out/tiny/sft.1")
    logs = {name: read_log(name) for name in names}
    # Beside a line of the chart there is room for some 18 letters: what all names begin with is left out.
    common = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    short = {name: os.path.relpath(name, common) for name in names}
    config = {name: read_json(path) if (path := Path(name, "config.json")).exists() else {} for name in names}
    results = {name: {key: value for key, value in rows[-1].items() if isinstance(value, (int, float, str))}
               for name, rows in logs.items()}
    sizes, scores = ask_all(flags, setup, logs, config)
    draw(logs, short, scores)
    gains = {name: {split: tell_difference(scores[names[0]][split], score) for split, score in scores[name].items()}
             for name in names[1:] if scores[name] and scores[names[0]]}
    setup.print("\n".join(table(short, sizes, results, scores, gains)))
    # The first line of a log says how the run was started, and on what; of a resumed run, or of several in one log, the
    # last such line counts.
    starts = [next((row for row in reversed(rows) if "flags" in row), {}) for rows in logs.values()]
    differ = {"flags": differences([one.get("flags", {}) for one in starts]),
              "configuration": differences([{key: value for key, value in config[name].items() if key != "run"}
                                            | {"chapters": config[name].get("run", {}).get("chapters")}
                                            for name in names if config[name]] or [{}]),
              "code": differences([{key: one.get(key) for key in (
                  "commit", "torch", "python", "device", "dtype", "world_size")} for one in starts])}
    for what, fields in differ.items():
        for field in [field for field, values in fields.items() if not any(values) and None in values]:
            del fields[field]  # an older log does not know this flag, and the others have its "off"
        shown = [f"{field} {', '.join('-' if value in (None, '') else str(value) for value in values)}"
                 for field, values in fields.items()]
        setup.print(f"{what}: {'; '.join(shown) or 'the same in all'}")
    setup.print("wrote compare.png")
    return {"what": "compare", "chart": "compare.png", "results": results, "parameters": sizes,
            "accuracy": {name: {split: {key: score[key] for key in ("n", "accuracy", "ci95", "by_kind")}
                                for split, score in of.items()} for name, of in scores.items()},
            "against_the_first": gains, "flags_that_differ": differ["flags"],
            "configuration_that_differs": differ["configuration"], "code_that_differs": differ["code"]}
