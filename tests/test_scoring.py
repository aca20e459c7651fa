"The benchmarks' scoring rules."
import pytest

import plumbing.scoring
from plumbing.scoring import score
from tests.helpers import fails

pytest_plugins = ["tests.helpers"]  # its fixtures

OPTIONS = {"A": "a red car", "B": "a dog", "C": "5", "D": "none of these"}


@pytest.mark.parametrize("metric", [*plumbing.scoring.RULES, "vqa", "choice"])
def test_an_empty_answer_scores_nothing_under_every_metric(metric):
    for prediction in ("", " ", "\n\t "):
        for answers in ("A", ["yes"], ["the"] * 10, [""], ["0"], ["", "."]):
            assert plumbing.scoring.score(metric, prediction, answers, OPTIONS) == 0.0


@pytest.mark.parametrize("prediction, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("**B**", "B"), ("The answer is B", "B"), ("B. a dog", "B"),
    ("I think it is B: a dog", "B"), ("A or B", "Z"), ("It is a dog", "B"), ("an a dog", "B"), ("b", "Z"), ("E", "Z"),
    ("A red car and a dog are both here", "Z"), ("Z", "Z"),
    ("A DOG", "A"),  # an article is taken for the letter, by the original too
    ("B is what I say because of it", "Z"),  # the letter stands too far from the end
    ("B is right, and the answer is B, I say it once more now", "B"),  # but here the sentence says it
    ("It must be a dog, " + "for so it is " * 5, "Z")])  # too long to be an option's text
def test_a_letter_is_found_as_vlmevalkit_does(prediction, letter):
    assert plumbing.scoring.infer_choice(prediction, dict(OPTIONS)) == letter
    assert plumbing.scoring.score("choice", prediction, "B", OPTIONS) == float(letter == "B")


@pytest.mark.parametrize("metric, prediction, answers, expected", [
    ("exact", " Red. ", "red", 1), ("exact", "dark red", "red", 0), ("exact", "3.5", "3.5", 1),
    ("exact", "b", ["a", "b"], 1),
    ("yesno", "Yes, there is.", "Yes", 1), ("yesno", "No", "yes", 0), ("yesno", "yes and no", "yes", 0),
    ("yesno", "I do not know", "no", 0), ("yesno", "yesterday", "yes", 0),
    ("relaxed", "105", "100", 1), ("relaxed", "105.1", "100", 0), ("relaxed", "-95", "-100", 1),
    ("relaxed", "0.1", "0", 0), ("relaxed", "0", "0", 1), ("relaxed", "5%", "0.05", 1), ("relaxed", "5", "5%", 0),
    ("relaxed", "Germany ", "germany", 1), ("relaxed", "1,000", "1000", 0), ("relaxed", "7", ["8", "7.2"], 1),
    ("anls", "hello world", "Hello  World", 1), ("anls", "helo", "hello", 0.8), ("anls", "cat", "dogs", 0),
    ("anls", "ab", "abcd", 0.5), ("anls", "abcd", ["zzzz", "abce"], 0.75),
    ("contains", "The sign says STOP now", "stop", 1), ("contains", "sto", "stop", 0),
    ("contains", "a\nb", ["x", "A b"], 1)])
def test_scores_follow_the_official_rules(metric, prediction, answers, expected):
    assert plumbing.scoring.score(metric, prediction, answers) == pytest.approx(expected)


def test_vqa_averages_over_the_people_left_out():
    for said, expected in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]:
        assert plumbing.scoring.score("vqa", "red", ["red"] * said + ["blue"] * (10 - said)) == pytest.approx(expected)
    assert plumbing.scoring.score("vqa", "red", "red") == 1.0


@pytest.mark.parametrize("text, form", [
    ("The two dogs.", "2 dogs"), ("A cat", "cat"), ("dont", "don't"), ("couldn'tve", "couldn't've"), ("none", "0"),
    ("1,000", "1000"), ("t-shirt", "t shirt"), ("red, white", "red white"), ("3.5", "3.5"), ("Yes!", "yes"),
    ("hello?", "hello"), ("well -known", "well known"), ("o'clock", "o'clock"), ("a\nb", "b"), ("U.S.A.", "usa")])
def test_vqa_answers_are_normalised_as_in_the_official_code(text, form):
    assert plumbing.scoring.vqa_form(text) == form


def test_an_unknown_metric_is_named():
    assert fails(lambda: plumbing.scoring.score("bleu", "a", "a"), "'bleu'", "relaxed")
    assert fails(lambda: plumbing.scoring.score("exact", "a", []), "no right answer")


def test_the_95_percent_interval_is_wilsons():
    assert plumbing.scoring.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # the textbook's example
    assert plumbing.scoring.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert plumbing.scoring.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert plumbing.scoring.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("metric", sorted({*plumbing.scoring.METRICS} - {"yesno"}))
def test_an_accent_of_two_letters_is_right_for_one(metric):
    for got, answer in ("Caf\u00e9", "Cafe\u0301"), ("Cafe\u0301", "Caf\u00e9"):  # macOS writes the second
        choices = {"A": "tea", "B": answer}
        assert plumbing.scoring.score(metric, got, "B" if metric == "choice" else answer, choices) == 1
    assert plumbing.scoring.cider(["a caf\u00e9", "b"], [["a cafe\u0301"], ["c"]])[0] > 1


def test_a_word_that_is_less_than_half_right_earns_nothing():
    # DocVQA: 2 of 3 letters of "cat" must be changed to get "man": 1/3 is below a half. 1 of 2 is not.
    assert [score("anls", text, "man") for text in ("cat", "an", "men")] == pytest.approx([0, 2 / 3, 2 / 3])
    assert score("anls", "ab", "ax") == 0.5


CAPTIONS = [["a cat is sitting on the table", "a cat on a table"],
            ["two dogs play on the grass", "dogs running on grass"], ["a red car is parked", "red car on a street"]]
WRITTEN = ["a cat sits on a table", "two dogs run on grass", "a red car"]


def test_captions_score_what_the_reference_implementation_gives():
    # computed with pycocoevalcap 1.2 (CiderScorer, n=4, sigma=6)
    assert plumbing.scoring.cider(WRITTEN, CAPTIONS) == pytest.approx([3.15658748, 2.27989102, 3.92219775])
    assert plumbing.scoring.cider(["", "cat"], [["a cat"], ["a dog", "dogs"]]) == [0, 0]
    # its tokenizer's words, without marks
    grams = plumbing.scoring.caption_ngrams("The dog doesn't run. It's a T-shirt, at 6:55!")
    assert [gram[0] for gram in grams if len(gram) == 1] == "the dog does n't run it 's a t-shirt at 6:55".split()
