"Public benchmarks: beside their baselines, and gone on with where they stopped."
import argparse

import pytest

from extras.benchmarks import Answers, evaluate_file
from tests.helpers import questions, right_by_hand, setup, shipped

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
