"""
What a whole public benchmark counts from its answers (POPE's F1, MMBench's circular accuracy, MME's sum), beside the
same with blind and exchanged pictures (train_sft.py), with answers that are kept. One's own files of questions count
alike. Called by `python bench.py --what=eval`.

Questions about one picture or one option are not worth a point each in every benchmark. To be comparable with
published numbers, ours must be counted as theirs are, odd rules included.
"""
import json
import os
from pathlib import Path

from plumbing.files import named_errors, parse_json, read_json
from plumbing.pictures import picture_key
from plumbing.scoring import cider, wilson, yes_or_no
from train_sft import answers, exchange_pictures, score_answer


def official_score(name: str, records: list, texts: list[str], right: list[float]) -> tuple[str, float]:
    "-> (what the benchmark calls its score, the score), where that is not plain accuracy."
    if name.startswith("MMBench"):
        # Circular: each question comes in all rotations of its options, index + n * 1,000,000. Only if all of them are
        # right it counts: a model that prefers the letter A fails.
        groups = {}
        for record, value in zip(records, right):
            groups.setdefault(int(record["id"]) % 10 ** 6, []).append(value)
        return "circular accuracy", 100 * sum(map(min, groups.values())) / len(groups)
    if name.startswith("POPE"):
        # F1 of "yes", the harmonic mean of precision and recall: half of the questions ask for things that are not
        # there, and a model that says yes to all has a recall of 100 %. An answer that is neither counts as no.
        yes = [(yes_or_no(text) == "yes", record["answer"].lower() == "yes") for record, text in zip(records, texts)]
        hits, said, true = sum(a and b for a, b in yes), sum(a for a, _ in yes), sum(b for _, b in yes)
        return "F1", 200 * hits / max(said + true, 1)
    if name.startswith("MME"):
        # Two questions about each picture, one to be answered by yes, one by no. For each category: the accuracy, plus
        # the share of pictures with both right, in %. So the best score of a category is 200.
        categories = {}
        for record, value in zip(records, right):
            pictures = categories.setdefault(record["kind"], {})
            pictures.setdefault(picture_key(record["images"][0]), []).append(value)
        return "sum of accuracy and accuracy+", sum(
            100 * sum(map(sum, pictures.values())) / sum(map(len, pictures.values()))
            + 100 * sum(map(min, pictures.values())) / len(pictures) for pictures in categories.values())
    if name.startswith("HallusionBench"):
        # An id ends in _SET_FIGURE_QUESTION. A figure counts if all questions about it are right, a question if it is
        # right about all figures of its set: one is drawn with other facts, and there the answer is the opposite.
        figures, questions = {}, {}
        for record, value in zip(records, right):
            *some, figure, question = record["id"].split("_")
            figures.setdefault((*some, figure), []).append(value)
            questions.setdefault((*some, "", question), []).append(value)
        shares = [100 * sum(right) / len(right)] + [100 * sum(map(min, of.values())) / len(of)
                                                    for of in (figures, questions)]
        return "mean of aAcc {:.1f}, fAcc {:.1f} and qAcc {:.1f}".format(*shares), sum(shares) / 3
    if all(record.get("metric") == "cider" for record in records):
        references = [[a] if isinstance(a, str) else a for a in (record["answer"] for record in records)]
        return "CIDEr", 100 * sum(cider(texts, references)) / len(records)
    return "accuracy", 100 * sum(right) / len(right)


class Answers:
    """
    The answers to one set, in a file of one JSON object per line: a run that was stopped goes on from there. Thousands
    of questions, asked three times (own picture, blind, shuffled), take a large model hours.
    """

    # What tells two answers apart: another checkpoint's are not this one's, and in a file two records may have one id.
    KEY = "model", "set", "image", "number", "id"

    def __init__(self, path: str, setup, vlm, tokenizer, who: str):
        self.setup, self.vlm, self.tokenizer, self.known = setup, vlm, tokenizer, {}
        self.who = f"{who} {vlm.config.run.get('start')}"  # start: when the checkpoint was saved
        # Each rank writes a file of its own, PATH.0, PATH.1, ...; all are read, whatever number of ranks wrote them.
        self.path = f"{path}.{setup.rank}" if path and setup.world_size > 1 else path
        files = [Path(path), *sorted(Path(path).parent.glob(Path(path).name + ".[0-9]*"))] if path else []
        for file in filter(Path.exists, files):
            with named_errors(file), open(file, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n") or not '{"model": '.startswith(line[:10]):  # whole, or not ours
                        row = parse_json(line, file)
                        if not isinstance(row, dict) or not row.keys() >= {*self.KEY, "text"}:
                            raise ValueError(f"{file}: not written by --what=eval; name another file by --answers=")
                        self.known[tuple(row[name] for name in self.KEY)] = row["text"]
                    elif file == Path(self.path):  # killed in the middle of it: the next line must not follow it
                        os.truncate(file, os.path.getsize(file) - len(line))  # json.dumps wrote ASCII

    def __call__(self, name: str, records: list, image: str) -> list[str]:
        "-> the texts, of all ranks, in order. image: own, blind or shuffled."
        setup, keys = self.setup, [(self.who, name, image, n, record["id"]) for n, record in enumerate(records)]
        mine = list(zip(keys, records))[setup.rank::setup.world_size]
        for at in range(0, len(mine), 100):  # written every 100: no more than these are lost
            new = {key: record for key, record in mine[at:at + 100] if key not in self.known}
            texts = answers(self.vlm, self.tokenizer, [*new.values()], blind=image == "blind") if new else []
            self.known |= zip(new, texts)
            if self.path and new:
                with open(self.path, "a") as file:
                    file.writelines(json.dumps(dict(zip(self.KEY, key), text=text)) + "\n"
                                    for key, text in zip(new, texts))
        return setup.gather([self.known[key] for key, _ in mine])


def evaluate_file(name: str, records: list, ask: Answers) -> dict:
    "A benchmark or a file of questions -> its official score, accuracy and interval, blind and shuffled beside them."
    # The distance between the columns is what the picture is worth. A score alone does not tell: the likeliest answer
    # to a benchmark's question is often right.
    columns = {"own": records, "blind": records, "shuffled": exchange_pictures(records)}
    results, setup = {}, ask.setup
    for image, asked in columns.items():
        if asked:
            texts = ask(name, asked, image)
            right = [score_answer(record, text) for record, text in zip(records, texts)]
            title, score = official_score(name, records, texts, right)
            results[image] = {"score": score, "accuracy": sum(right) / len(right), "right": right}
    own, right = results["own"], results["own"]["right"]
    low, high = wilson(sum(right), len(right))
    setup.print(f"\n{name}: {title} " + ", ".join(f"{image} {r['score']:.1f}" for image, r in results.items())
                + f"   ({len(right)} questions, 95 % interval of the accuracy {low:.1%} to {high:.1%})")
    # What the papers and model cards of models of this size say, to stand beside ours.
    published = read_json(Path(__file__).parents[1] / "assets" / "published.json")
    for model_name, value in published.get(name, {}).items():
        setup.print(f"  {model_name:<40}{value:>8.1f}")
    kinds = {}
    for record, value in zip(records, right):
        kinds.setdefault(record.get("kind", "all"), []).append(value)
    return {"n": len(right), "accuracy": own["accuracy"], "ci95": (low, high), "score": own["score"], "score_is": title,
            "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())},
            "blind_accuracy": results["blind"]["accuracy"], "blind_score": results["blind"]["score"],
            "shuffled_accuracy": results["shuffled"]["accuracy"] if "shuffled" in results else None}
