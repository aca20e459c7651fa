"What README.md and docs/ say is so; the house's rooms."
import ast
import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import extras.attention_maps
import extras.check
import extras.figures
import model
import plumbing.flags
import plumbing.world
import sample
import train_base
from tests.helpers import HERE, SCRIPTS
from tokenizer import Tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures

def names_of_tests() -> list[str]:
    return [name for path in [HERE / "test_all.py", *(HERE / "tests").glob("test_*.py")]
            for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)]


BOOK = [HERE / "README.md", HERE / "CONTRIBUTING.md", *sorted((HERE / "docs").glob("*.md"))]
FLAGS_OF_OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--shm-size",
                   "--long", "--extra-index-url", "--help", "--mutants"}


def commands(text: str):
    "Each call of one of our scripts in a text -> (script, its arguments)."
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^(?:python|torchrun|srun torchrun|    --rdzv).*$", text, re.M) + re.findall(
            r"`((?:python|torchrun) [^`]+)`", text):
        words = shlex.split(line.split("  #")[0])
        for i, word in enumerate(words):
            if word.endswith(".py"):
                yield word, words[i + 1:]
                break


@pytest.mark.parametrize("path", BOOK, ids=lambda path: path.name)
def test_the_book_names_commands_that_parse(path):
    text, tests = path.read_text(encoding="utf-8"), names_of_tests()
    known = set(FLAGS_OF_OTHERS)
    for script in (*SCRIPTS, "data"):
        module = importlib.import_module(script)
        known |= {f"--{name}" for name in getattr(module, "FLAGS", train_base.SHARED_FLAGS)}
    for script, arguments in commands(text):
        if script == "test_all.py":
            continue
        module = importlib.import_module(script.removesuffix(".py"))
        known_here = getattr(module, "FLAGS", train_base.SHARED_FLAGS)  # an unknown flag ends the test by SystemExit
        flags = plumbing.flags.parse_flags("", known_here, getattr(module, "BY_MODEL", {}), argv=arguments)
        model_ = getattr(flags, "model", "") or "tiny"
        model.check_name(model_)
        if script == "bench.py":
            assert hasattr(module, f"bench_{flags.what}"), flags.what
    for flag in re.findall(r"`(--\w[\w-]*)", text):
        assert flag in known, f"{path.name}: {flag}"
    for expression in re.findall(r"pytest[^\n]*? -k \"?([^\"\n#`]+)", text):
        for word in set(expression.split()) - {"and", "or", "not"}:
            assert any(word in name for name in tests), f"{path.name}: no test named {word}"


@pytest.mark.parametrize("path", BOOK, ids=lambda path: path.name)
def test_the_book_names_places_that_exist(path):
    text = path.read_text(encoding="utf-8")

    def anchors(file: Path) -> set:
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists() and (not anchor or anchor in anchors(file)), f"{path.name}: {target}"
    # "`Perceiver` and `Bridge` in vision.py", "`ViT.forward` in vision.py"
    for names, file in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in ((?:\w+/)?\w+\.py)", text):
        source = (HERE / file).read_text(encoding="utf-8")
        for name in re.findall(r"[\w.]+", names.replace(" and ", " ").replace("`", " ")):
            for part in name.split("."):
                assert re.search(rf"(def|class) {part}\b|^{part}\b.*=", source, re.M), f"{path.name}: {name} in {file}"
    for script in re.findall(r"(?<!/)\b((?:(?:plumbing|extras|tests)/)?\w+\.py)\b", text):
        assert (HERE / script).exists(), f"{path.name}: {script}"


def test_the_book_counts_lines_and_quotes_results_as_they_are():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    for file, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", text, re.M):
        real = len((HERE / file).read_text(encoding="utf-8").splitlines())
        assert int(lines) == real, f"README.md: {file} has {real} lines; bench.py --what=figures counts them anew"
    # <!-- results: sft.accuracy = 87 %; ... -->: numbers of the text before it, and where in docs/results.json each is
    results, checked = json.loads((HERE / "docs/results.json").read_text()), 0
    for path in BOOK:
        text = path.read_text(encoding="utf-8")
        for comment in re.finditer(r"<!-- results: (.*?) -->", text, re.S):
            before = text[max(0, text.rfind("\n#", 0, comment.start())):comment.start()]
            for entry in comment[1].replace("\n", " ").split("; "):
                place, _, shown = (part.strip() for part in entry.partition("="))
                value = results
                for key in place.split("."):
                    value = value[int(key) if key.isdigit() else key]
                number = shown.split()[0]
                digits = len(number.partition(".")[2])
                assert f"{value * (100 if '%' in shown else 1):.{digits}f}" == number, (path.name, place, value, shown)
                assert number in before, (path.name, entry)
                checked += 1
    assert checked > 20
    # The log of the model that comes with the code has the same result lines.
    lines = [json.loads(line) for line in (HERE / "assets/tiny/log.jsonl").read_text().splitlines()]
    assert all(results[line["stage"]] == line for line in lines if "stage" in line)


@torch.no_grad()
def test_the_book_works_its_examples_with_the_tiny_models_numbers():
    pages = [(HERE / name).read_text(encoding="utf-8") for name in ("README.md", "docs/design.md")]
    text = " ".join(" ".join(pages).split())
    s = extras.figures.Subject(model.load_checkpoint(sample.TINY), Tokenizer.from_pretrained(sample.TINY))
    middle = s.pixels[:, 36, 36]
    said = [str(tuple(middle.tolist())), "({:.2f}, {:.2f}, {:.2f})".format(*(middle / 127.5 - 1).tolist())]
    share = extras.attention_maps.patch_shares(s.vlm.bridge, s.features)[4].view(6, 6)[2:4, 2:4].sum()
    said += [f"Latent 4 gives {share:.0%}".replace("%", " %")]
    document = s.document("What colour is the cat?", "orange")
    said += [f"Here {len(document.ids)} ids stand"]
    for pixels, told in ((s.pixels, "the model gives {:.4f}, so the loss is {:.2f} nats"), (
            torch.full_like(s.pixels, 128), "it gives {:.4f}, and the loss is {:.2f}")):
        batch = data.collate(*data.pack([document], 1, len(document.ids), s.M)[:2], lambda *_: pixels)
        x = s.vlm.embed(batch["ids"], s.vlm.encode_images(batch["pixels"]).flatten(0, 1), batch["image_positions"])
        at = batch["supervised"][0]
        loss = F.cross_entropy(s.vlm.gpt.logits(s.vlm.gpt.hidden(x))[0, at], batch["targets"][0, at]).item()
        said += [told.format(math.exp(-loss), loss)]
    records = [plumbing.world.World("chat")[i] for i in range(40000, 40020)]
    documents = [data.make_document(one, 0, s.tokenizer, s.M, 216) for one in records if len(one["messages"]) == 4]
    arrays, packed, _ = data.pack(documents, 1, 216, s.M)  # as extras.figures.draw_row
    lengths = [len(one.ids) - 1 for one in packed]
    number = ("two", "three", "four", "five")[len(lengths) - 2]
    said += [f"{number} conversations of {', '.join(map(str, lengths[:-1]))} and {lengths[-1]} tokens",
             f"At {len(arrays['supervised'])} of the 216 positions",
             "boundaries " + ", ".join(map(str, np.cumsum([0, *lengths])))]
    said += [f"(here that of a caption, {s.document('Describe the picture.', 'x').mask.index(1)} positions"]
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in s.vlm.parts().items()}
    said += [f"`ViT`: {sizes['vit']:.2f} or", f"Perceiver {sizes['bridge']:.2f} or",
             f"`GPT`: {sizes['decoder']:.2f} or"]
    assert [one for one in said if one not in text] == []
    assert s.ask("Describe the picture.") in text


def python_of_readme() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_book_answers_in_ten_lines_as_the_engine_does(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    source, question = python_of_readme()[0], "What colour is the cat?"
    s = extras.figures.Subject(model.load_checkpoint(sample.TINY), Tokenizer.from_pretrained(sample.TINY))
    for other in (question, "Where is the tree?", "Describe the picture."):
        exec(source.replace(question, other), {})
        assert capsys.readouterr().out.strip() == s.ask(other)
    assert s.ask(question) == "orange"  # as the page says


def test_the_books_eleventh_kind_of_question_is_asked(monkeypatch):
    world = plumbing.world
    monkeypatch.setattr(world, "QUESTIONS", dict(world.QUESTIONS))
    exec(python_of_readme()[1], names := dict(vars(world)))
    world.QUESTIONS.update(names["QUESTIONS"])
    records = [world.World("exam", "scenes")[i] for i in range(10, 440, 11)]
    assert {record["kind"] for record in records} == {"leftmost"}
    for record in records:
        left = min(record["images"][0].things, key=lambda thing: thing.cell % 3)
        assert record["messages"][1]["content"] == left.kind
    assert len({record["messages"][1]["content"] for record in records}) > 6  # no answer is always right


def test_the_hour_through_the_core_is_as_long_as_the_book_says():
    text, lines = (HERE / "README.md").read_text(encoding="utf-8"), 0
    rows = re.findall(r"^\| \d+ \| [^|]+ \| ([^|]+) \| (\w+\.py) \|", text, re.M)
    for names, file in rows:
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        for name in re.findall(r"`([\w.]+)`", names):
            node = tree
            for part in name.split("."):
                node = next(one for one in node.body if getattr(one, "name", "") == part)
            lines += node.end_lineno - node.lineno + 1
    told = int(re.search(r"some (\d+) lines", text)[1])
    assert len(rows) == 10 and abs(lines - told) <= 20, lines


def rooms() -> list[tuple[str, int, int]]:
    "CONTRIBUTING.md's table -> (file, floor, lines at most), from the ground up."
    rows = re.findall(r"^\| (\d) \| ([\w/]+\.py) \|.*\| (\d+) \|$", (HERE / "CONTRIBUTING.md").read_text(), re.M)
    return [(file, int(floor), int(most)) for floor, file, most in rows]


def test_the_house_has_the_rooms_of_its_table_each_within_its_length():
    there = [path.relative_to(HERE).as_posix() for folder in (".", "plumbing", "extras")
             for path in (HERE / folder).glob("*.py")]
    assert sorted(there) == sorted([file for file, *_ in rooms()] + ["test_all.py"])
    too_long = {file: n for file, _, most in rooms() if (n := len((HERE / file).read_text().splitlines())) > most}
    assert too_long == {}
    # Each begins with what it does and who calls it.
    for file, *_ in rooms():
        head = ast.get_docstring(ast.parse((HERE / file).read_text()))
        assert head and (head.count("\n") >= 1 or "/" not in file), file


def test_imports_point_downwards_in_the_house_and_never_in_a_circle():
    order = {file.removesuffix(".py").replace("/", "."): (i, floor) for i, (file, floor, _) in enumerate(rooms())}
    for name, (place, floor) in order.items():
        tree = ast.parse((HERE / (name.replace(".", "/") + ".py")).read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            used = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for other in filter(order.get, used):
                allowed = order[other][0] < place or order[other][1] == floor == 6 and name == "bench"
                one_exception = (name, other) == ("data", "extras.check") and id(node) not in top
                assert allowed or one_exception, f"{name} imports {other}, which is not below it"
                assert not name.startswith("plumbing") or other.startswith("plumbing"), f"{name} imports {other}"


def test_importing_any_file_is_silent_and_touches_no_device():
    names = [file.removesuffix(".py").replace("/", ".") for file, *_ in rooms()]
    code = f"import importlib, torch; [importlib.import_module(n) for n in {names}]\n" \
           "assert not torch.cuda.is_initialized()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_book_names_tests_that_exist():
    tests = " ".join(names_of_tests())
    for row in re.findall(r"^\| [^|]+ \| ([^|]*`[^|]*) \|", (HERE / "docs/tests.md").read_text(), re.M):
        assert all(name in tests for name in re.findall(r"`(\w+)`", row)), row


def faults() -> list[tuple[str, str, str]]:
    "Those of tests/mutants.py, which itself imports a lot: (line, worse form, names of tests)."
    source = (HERE / "tests/mutants.py").read_text(encoding="utf-8")
    exec(source[source.index("PLAIN = "):source.index("def find_tests")], names := {})
    return [fault for of_a_file in names["MUTANTS"].values() for fault in of_a_file]


def test_the_book_names_for_each_promise_a_fault_that_its_tests_notice():
    text, rows = (HERE / "docs/tests.md").read_text(encoding="utf-8"), 0
    assert f"{len(faults())} small faults" in text, len(faults())
    for promise, tests, proof in re.findall(r"^\| ([^|]+) \| ([^|]*`[^|]*) \| ([^|]+) \|", text, re.M):
        shown, words, rows = re.findall(r"`([^`]+)`", proof), re.findall(r"`(\w+)`", tests), rows + 1
        assert shown or proof.startswith("none"), promise
        for part in shown:
            noticed = " ".join(names for line, worse, names in faults() if part in line or part in worse)
            assert any(word in noticed for word in words), f"{promise}: no fault with {part} is noticed by its tests"
    assert rows > 30
