"""
Is one answer right? The rules of the benchmarks' own code (VQA, ChartQA, DocVQA, multiple choice, CIDEr), odd cases
included, so that numbers can be compared (VLMEvalKit). Called by chapter 3's evaluation and chapter 4's reward. A
reader of the lessons need know only `score`: 0 (wrong) to 1 (right).

A better rule would give numbers that nobody can compare. Odd cases are marked, because the model of chapter 4 will find
them when a rule is its reward.
"""
import ast
import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from string import ascii_uppercase

from plumbing.files import attempt, require

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
    if len(forms) == 1:  # nobody is left to agree: equality counts, instead of always 0
        return float(forms[0] == mine)
    return sum(min(1, (forms.count(mine) - (form == mine)) / 3) for form in forms) / len(forms)


def relaxed(prediction: str, answer: str) -> bool:
    """ChartQA: a number may be off by 5 %, other answers not at all; nor zero, as 5 % of it is nothing."""
    # Nobody can read exactly 41.7 from a bar: 42 is right for it. But "1,000" is no number here, and wrong for 1000.
    # TRAP: years are numbers too, so that 2010 is right for 2020.
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
    # "A or B" gives "Z", which is no option and so always wrong: naming both must not be right. TRAP: "A dog" gives
    # A, as an article near the end counts as a letter.
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
    # "Yes, there is no dog" is neither: the rule does not understand the sentence.
    return "unknown" if ("yes" in words) == ("no" in words) else "yes" if "yes" in words else "no"


def simple(text: str) -> str:
    # For equality, not for "is contained in": "red" is also in "not red" and in "red or blue".
    return text.strip().lower().removesuffix(".").strip()


def composed(text: str) -> str:
    "macOS writes an accent as a letter of its own, two for \u00e9. A model writes one, and would never be right."
    return unicodedata.normalize("NFC", text)


def caption_ngrams(text: str) -> Counter:
    """"It doesn't run." -> how often each run of 1 to 4 of the words it, does, n't, run occurs."""
    text = re.sub(r"n't\b|'(s|re|ve|ll|d|m)\b", r" \g<0>", composed(text).lower())
    words = re.findall(r"n't|'\w+|[\w.:/-]*\w", text)
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(texts: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D (arXiv 1411.5726) of each caption, 0 to 10: is it like what several people wrote about the picture?"""
    # A run of words that occurs in the references of nearly all pictures ("a", "on the") says little about this one:
    # each counts by the logarithm of how rare it is. So the score of one caption depends on all pictures of the set.
    references = [[caption_ngrams(one) for one in some] for some in references]
    pictures_with = Counter(gram for some in references for gram in set().union(*some))

    def weigh(counts: Counter) -> tuple[dict, list[float], int]:
        "-> (each run's weight, the length of the vector of weights for runs of 1 to 4 words, pairs of words)"
        vector = {gram: n * math.log(len(texts) / max(1, pictures_with[gram])) for gram, n in counts.items()}
        norms = [math.sqrt(sum(w * w for gram, w in vector.items() if len(gram) == n)) for n in range(1, 5)]
        return vector, norms, sum(n for gram, n in counts.items() if len(gram) == 2)
    scores = []
    for text, some in zip(texts, references):
        (mine, norms, length), total = weigh(caption_ngrams(text)), 0.0
        for vector, other_norms, other_length in map(weigh, some):
            # Cosine of the two vectors; min: a word said again and again earns no more than the reference has of it.
            products = [sum(min(w, vector[gram]) * vector[gram] for gram, w in mine.items()
                            if len(gram) == n and gram in vector) for n in range(1, 5)]
            cosines = [p / (a * b) if a and b else 0.0 for p, a, b in zip(products, norms, other_norms)]
            total += sum(cosines) / 4 * math.exp(-(length - other_length) ** 2 / 72)  # 72 = 2 x 6^2: 6 words apart
        scores.append(10 * total / len(some))
    return scores


RULES = {  # (prediction, one right answer) -> 0 to 1
    "exact": lambda got, answer: simple(got) == simple(answer),
    # A caption alone can only be equal to a reference or not. bench.py scores a whole set of them, see cider.
    "cider": lambda got, answer: simple(got) == simple(answer),
    "yesno": lambda got, answer: yes_or_no(got) == simple(answer),
    "relaxed": relaxed,
    "anls": anls,
    # OCRBench. A sign's words may come in two lines. TRAP: as a reward it teaches to list all that could be right.
    "contains": lambda got, answer: answer.strip().lower().replace("\n", " ") in got.lower().replace("\n", " "),
}


METRICS = (*RULES, "vqa", "choice")


def score(metric: str, prediction: str, answers: str | list[str], choices: dict[str, str] | None = None) -> float:
    """0 (wrong) to 1 (right); the best of the right answers counts. An empty prediction is wrong under every rule."""
    require(metric in METRICS, f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    answers = [composed(answer) for answer in ([answers] if isinstance(answers, str) else answers)]
    prediction = composed(prediction).strip()
    require(answers, "no right answer to score against")
    if not prediction:  # else it would equal "the", which loses its article, or contain an empty answer
        return 0.0
    if metric == "vqa":
        return vqa(prediction, answers)
    if metric == "choice":
        choices = {letter: composed(text) for letter, text in (choices or dict.fromkeys("ABCD", "")).items()}
        return float(infer_choice(prediction, choices) in answers)
    return max(float(RULES[metric](prediction, answer)) for answer in answers)


def wilson(k: float, n: int) -> tuple[float, float]:
    """k right of n -> the 95 % interval of the accuracy, which unlike k/n +- 2 sigma holds for small n and near 0."""
    # 10 of 10 right: k/n +- 2 sigma is 1 to 1, as if there were no doubt; this is 0.72 to 1.
    # TRAP: n questions about few pictures are not independent, and the true interval is wider.
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, k / n  # z: 95 % of a normal distribution lie within this many standard deviations
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


# ----------------------------------------------------------------------------------------------------------------------
# How the questions are put, in the words of LLaVA's evaluations

CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."

SHORT_PROMPT = "Answer the question using a single word or phrase."

QUESTIONS = "instruction", "question", "query", "prompt", "problem"  # under these a row asks, the likeliest first

OPTION = lru_cache(4096)(re.compile(r"[A-Z]|(?:option|choice|op)s?[ _-]?[a-z\d]").fullmatch)  # columns: A, option_a


def benchmark_row(name, image, question: str, answer, choices: dict = {}, metric: str = "exact") -> dict:
    "A question whose answer can be checked."
    # Without such a line a model answers in a whole sentence, which "exact" counts as wrong. OCRBench adds none.
    suffix = CHOICE_PROMPT if choices else SHORT_PROMPT if metric != "contains" else ""
    return {"id": name, "images": image, "answer": answer, "metric": "choice" if choices else metric,
            "question": "\n".join(filter(None, [question, *map(". ".join, choices.items()), suffix])),
            "choices": choices}


def with_options(question: str, choices: dict) -> str:
    "The options are written below a question that has them not."
    listed = (re.search(rf"\b{re.escape(letter)}\W{{1,3}}{re.escape(text)}", question)
              for letter, text in choices.items())
    return question if all(listed) else benchmark_row("", None, question, "", choices)["question"]


def options_of(row: dict) -> dict:
    "The options of a row, in whatever form -> {\"A\": \"red\", \"B\": \"green\"}; {} where there are none."
    options = row.get("choices") or row.get("options")
    if isinstance(options, str):  # MMMU: "['red', 'green']", and "[]" of an open question
        options = attempt(ast.literal_eval, options)
    columns = sorted(filter(OPTION, row)) if not options and not row.keys().isdisjoint(QUESTIONS) else []
    if len(columns) > 1:  # an option that is empty keeps its letter from the others: B of "", "red", "green" is red
        options = {key[-1].upper() if key[-1].isalpha() else letter: row[key]
                   for letter, key in zip(ascii_uppercase, columns) if row[key] not in (None, "")}
    if isinstance(options, dict) and options.keys() == {"label", "text"}:  # ARC: two lists
        options = dict(zip(options["label"], options["text"]))
    if isinstance(options, (list, tuple)) and len(options) <= 26:
        options = dict(zip(ascii_uppercase, options))
    require(not options or isinstance(options, dict) and len(options) > 1 and all(
        type(text) in (str, int, float) for text in options.values()), "choices must be an object of letters and "
            "texts, such as {\"A\": \"cat\", \"B\": \"dog\"}, or a list of texts, and at least two")
    return {letter: str(text) for letter, text in (options or {}).items()}


def letter_of(answer, choices: dict) -> str:
    "A right answer as people write it -> its letter: B, (B), the option's text, or its index from 0 (ScienceQA, AI2D)."
    text, letters = str(answer).strip(), list(choices)
    if isinstance(answer, str) and (letter := next(filter(choices.get, (text, text.strip("().: "))), "")):
        return letter
    meant = {letters[int(text)]} if text.isdecimal() and int(text) < len(letters) else set()
    if not meant or isinstance(answer, str):  # "2" may be the third option, or the one that says 2
        meant |= {letter for letter, option in choices.items() if option.strip().lower() == text.lower()}
    require(len(meant) == 1, f"the answer {str(answer)[:40]!r} is {'more than one' if meant else 'none'} of the "
                             f"choices {', '.join(choices)}; write the letter")
    return meant.pop()
