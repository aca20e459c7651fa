"Public benchmarks: beside their baselines, and gone on with where they stopped."
import argparse
import hashlib

import pytest

import bench
import extras.benchmarks
from extras.benchmarks import Answers, evaluate_file, official_score
from plumbing.recipes import RECIPES
from tests.helpers import one_line, questions, right_by_hand, run, setup, shipped, write
from tests.test_scoring import CAPTIONS, WRITTEN

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_bench_puts_a_benchmark_beside_the_same_baselines():
    ask = Answers("", setup(), *shipped(), "tiny")
    result = evaluate_file("mine", questions(20), ask)
    assert [result[name] for name in ("accuracy", "blind_accuracy", "shuffled_accuracy")] == [
        sum(right_by_hand(20, image)) / 20 for image in ("own", "blind", "shuffled")]
    assert result["score"] == 100 * result["accuracy"] and result["blind_score"] == 100 * result["blind_accuracy"]


def test_answers_that_were_kept_are_not_asked_again(tmp_path):
    (vlm, words), path = shipped(), str(tmp_path / "a.jsonl")
    told = [Answers(path, setup(), vlm, words, "tiny")("mine", questions(6), image) for image in ("own", "blind")]
    cannot_answer = argparse.Namespace(config=vlm.config)
    again = Answers(path, setup(), cannot_answer, words, "tiny")
    assert [again("mine", questions(6), image) for image in ("own", "blind")] == told and told[0] != told[1]
    for other in (again, Answers(path, setup(), cannot_answer, words, "another")):  # or another set, or another model
        with pytest.raises(AttributeError):
            other("yours" if other is again else "mine", questions(6), "own")


def test_benchmarks_are_scored_by_their_official_rules():
    def records(answers, ids=None, kind="", picture=None):
        return [{"id": str(ids[i] if ids else i), "answer": a, "kind": kind, "images": [picture or b"%d" % i]}
                for i, a in enumerate(answers)]
    # MMBench: question 1 is right in both rotations, question 2 in one of two
    rows = records("ABCD", [1, 1000001, 2, 1000002])
    assert official_score("MMBench_DEV_EN", rows, [], [1, 1, 1, 0]) == ("circular accuracy", 50)
    # POPE, by hand: 2 hits, 3 said yes, 4 are yes -> precision 2/3, recall 1/2, F1 4/7
    texts = ["Yes.", "yes", "Yes", "No", "perhaps", "no"]
    answers = ["Yes", "Yes", "No", "Yes", "Yes", "No"]
    assert official_score("POPE", records(answers), texts, [])[1] == pytest.approx(100 * 4 / 7)
    # MME: 3 of 4 right, one picture of two wholly right -> 75 + 50
    rows = records(["Yes", "No"], kind="count", picture=b"p") + records(["Yes", "No"], [2, 3], "count", b"q")
    assert official_score("MME", rows, [], [1, 1, 1, 0])[1] == 125
    assert official_score("MMStar", rows, [], [1, 0, 0, 0]) == ("accuracy", 25)
    # HallusionBench, two figures with two questions each: 3 of 4 right, one figure and one question wholly right
    rows = records(["Yes"] * 4, [f"hallusion_VS_table_0_{figure}_{question}" for figure in "01" for question in "01"])
    assert official_score("HallusionBench", rows, [], [1, 1, 0, 1]) == (
        "mean of aAcc 75.0, fAcc 50.0 and qAcc 50.0", pytest.approx(175 / 3))
    captions = [{"id": str(i), "metric": "cider", "answer": answer} for i, answer in enumerate(CAPTIONS)]
    assert official_score("mine", captions, WRITTEN, [0, 0, 0]) == ("CIDEr", pytest.approx(311.9558751))


def test_a_benchmark_is_fetched_by_name_and_goes_on_where_it_stopped(trained, tmp_path, own_data, web, monkeypatch):
    content = (own_data / "table.tsv").read_bytes()
    web.files["/MMStar.tsv"] = content
    files = {"MMStar.tsv": [len(content), hashlib.md5(content).hexdigest()]}
    monkeypatch.setitem(RECIPES, "MMStar", RECIPES["MMStar"] | {"hub": web.url, "files": files})
    asked, real = [], extras.benchmarks.answers

    def answers(vlm, tokenizer, records, **more):
        asked.append(len(records))
        return real(vlm, tokenizer, records, **more)
    monkeypatch.setattr(extras.benchmarks, "answers", answers)
    flags = ["--what=eval", f"--init={trained[0] / 'tiny/sft'}", "--data=MMStar", f"--answers={tmp_path / 'a.jsonl'}",
             "--device=cpu"]
    ran = run("bench", *flags, main=bench.main)
    assert ran.code == 0 and ran.result["n"] == 24 and ran.result["score_is"] == "accuracy", ran.err
    assert "LLaVA-OneVision 0.5B" in ran.err and sum(asked) == 72
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:30]) + "\n" + lines[30][:20])  # killed while it wrote a line
    asked.clear()
    again = run("bench", *flags, main=bench.main)
    assert again.code == 0 and sum(asked) == 42 and again.result == ran.result
    assert run("bench", *flags, main=bench.main).result == ran.result and sum(asked) == 42


def test_kept_answers_are_of_this_model_and_this_question_also_where_two_have_one_id(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.json", [{"id": "1", "question": f"{i}?", "answer": str(i)} for i in range(3)])
    flags = ["--what=eval", "--data=q.json", "--answers=a.jsonl", "--device=cpu"]
    for stage in ("sft", "rl"):
        results = []
        for said in (None, "wrong"):  # with another model's answers in its place this one would have got none right
            monkeypatch.setattr(extras.benchmarks, "answers", lambda vlm, tokenizer, records, **more: [
                said or record["answer"] for record in records])
            results.append(run("bench", *flags, f"--init={trained[0] / 'tiny' / stage}", main=bench.main).result)
        assert results[0]["accuracy"] == 1 and results[1] == results[0]
    for end in ("\n", ""):
        (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "question": "?", "answer": "a line of sample.py"}' + end)
        one_line(run("bench", *flags, f"--init={trained[0] / 'tiny/sft'}", main=bench.main), "a.jsonl: not written by")
        assert (tmp_path / "a.jsonl").read_text().endswith("}" + end)
