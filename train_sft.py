"""
Chapter 3: from a model that describes pictures to one that answers questions about them.

    python train_sft.py --batch_size=32                        # tiny, on the built-in world: five minutes on a laptop
    python train_sft.py                                        # the same with its usual 96 rows a step: ten minutes
    python train_sft.py --data=my.json                         # your own pictures and conversations (LLaVA's format)
    python train_sft.py --model=qwen2.5-1.5b --data=llava_v1_5_mix665k.json                    # one GPU
    torchrun --nproc_per_node=8 train_sft.py --model=small     # several GPUs

What it teaches: supervised fine-tuning (SFT). The loss is the same next-token loss, but on conversations, and only on
the assistant's words: the model is not trained to predict what the user will say. All parts are trained now (the ViT
only where it has no pretrained weights).

It also teaches how answers are judged. Each kind of question is scored beside two baselines: with the picture blanked
(blind: what the question alone tells) and with pictures exchanged (shuffled: does the answer follow the picture?). With
96 rows a step the laptop run reaches 87 % on new scenes, and 24 % blind.

New in this chapter: the decoder is trained again, and answers are scored.
Left out: a separate learning rate for each part. It was tried, and one rate for all was as good, within noise.
"""
import math
import re
import time
from collections import Counter

import data  # first: see its imports
import torch
from tqdm import tqdm

from model import respond
from train_base import held_out_loss, make_documents
from training import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, count_images, count_supervised, finish,
                      freeze_all_but, load_start, lr_scale, make_loaders, parse_flags, run, save, train_step)
from weights import require
from world import World

STAGE = "sft"
# Many small steps of short rows: a tiny model learns more from many updates than from many tokens in each. A picture
# with two questions takes 45 to 70 tokens. TRAP: longer conversations of your own need a longer --seq_len. Turns that
# do not fit are left out.
BY_MODEL = {"tiny": {"batch_size": 96, "seq_len": 72, "steps": 1200, "lr": 0.005, "eval_size": 400},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 800, "lr": 0.002, "eval_size": 1000},
            "released": {"batch_size": 32, "seq_len": 2048, "steps": 1000, "lr": 2e-5, "eval_size": 1000}}
FLAGS = SHARED_FLAGS | {"eval_size": (None, "held-out questions per evaluation, of each set")}

# ----------------------------------------------------------------------------------------------------------------------
# Scoring: the rules of the benchmarks' own code, odd cases included, so that numbers can be compared (VLMEvalKit)
# A better rule would give numbers that nobody can compare. Odd cases are marked, because the model of chapter 4 will
# find them when a rule is its reward.

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


def caption_ngrams(text: str) -> Counter:
    """"It doesn't run." -> how often each run of 1 to 4 of the words it, does, n't, run occurs."""
    text = re.sub(r"n't\b|'(s|re|ve|ll|d|m)\b", r" \g<0>", text.lower())
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


def score(metric: str, prediction: str, answers: str | list[str], choices: dict[str, str] | None = None) -> float:
    """0 (wrong) to 1 (right); the best of the right answers counts. An empty prediction is wrong under every rule."""
    require(metric in (*RULES, "vqa", "choice"),
            f"unknown metric {metric!r}; there are {', '.join(RULES)}, vqa, choice")
    prediction, answers = prediction.strip(), [answers] if isinstance(answers, str) else answers
    require(answers, "no right answer to score against")
    if not prediction:  # else it would equal "the", which loses its article, or contain an empty answer
        return 0.0
    if metric == "vqa":
        return vqa(prediction, answers)
    if metric == "choice":
        return float(infer_choice(prediction, choices or dict.fromkeys("ABCD", "")) in answers)
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
# Evaluation: the model's answers to held-out questions, scored, beside the blind and the shuffled baseline

def exchange_pictures(records: list) -> list | None:
    "The same questions, each about the next picture that is another one. None if all are the same picture."
    flat = [source for record in records for source in record["images"]]
    # Five questions about one photo follow each other: the next record's picture is often the same one.
    keys, n = [data.picture_key(source) for source in flat], len(flat)
    if len(set(keys)) < 2:
        return None
    others = iter([next(flat[(i + k) % n] for k in range(1, n) if keys[(i + k) % n] != keys[i]) for i in range(n)])
    return [{**record, "images": [next(others) for _ in record["images"]]} for record in records]


@torch.no_grad()
def answers(vlm, tokenizer, records: list, blind: bool = False, batch: int = 100) -> list[str]:
    "The model's answers to the records' last questions. blind: about grey pictures."
    # Greedy, the most likely token each time: two evaluations differ only by what was learned, not by chance.
    load_pixels, out = data.pixel_loader(vlm.config.vision), []
    # A few tokens more than the longest right answer: longer ones are wrong anyway, and cost time.
    length = max(len(tokenizer.encode(record["messages"][-1]["content"])) for record in records)
    vlm.eval()
    for at in range(0, len(records), batch):
        rows = records[at:at + batch]
        pixels = [[load_pixels(source, record) for source in record["images"]] for record in rows]
        if blind:  # mid-grey, which normalises to about 0
            pixels = [[torch.full_like(p, 128) for p in group] for group in pixels]
        out += respond(vlm, tokenizer, [r["messages"][:-1] for r in rows], pixels, max_new_tokens=min(128, length + 4))
    vlm.train()
    return out


def score_answer(record: dict, text: str) -> float:
    "0 to 1. A record of a benchmark has its own rule and right answers; else the last turn is the right answer."
    return score(record.get("metric", "exact"), text, record.get("answer", record["messages"][-1]["content"]),
                 record.get("choices"))


def evaluate(vlm, tokenizer, records: list, setup: Setup, blind: bool = False) -> dict:
    "-> {n, accuracy, ci95, by_kind: {kind: accuracy}, right: [0 to 1 for each record]}."
    # Decoding takes most of an evaluation's time, so the ranks share it: rank 1 of 4 answers questions 1, 5, 9, ...
    mine = records[setup.rank::setup.world_size]
    texts = answers(vlm, tokenizer, mine, blind) if mine else []
    right = setup.gather([score_answer(record, text) for record, text in zip(mine, texts)])
    kinds = {}  # a total hides that one kind is mastered and another is guessed
    for record, value in zip(records, right):
        kinds.setdefault(record.get("kind", "all"), []).append(value)
    return {"n": len(right), "accuracy": sum(right) / len(right), "ci95": wilson(sum(right), len(right)),
            "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}, "right": right}


def evaluate_with_baselines(vlm, tokenizer, held_out: dict, setup: Setup) -> dict:
    "Accuracy on every held-out set, beside the same questions with the picture blanked and exchanged. Prints a table."
    # Accuracy alone does not show that the model uses the picture: "yes" to every yes/no question is right half of the
    # time. What counts is the distance from "own" to the other two.
    results = {}
    for name, records in held_out.items():
        exchanged = exchange_pictures(records)
        columns = {"own": evaluate(vlm, tokenizer, records, setup),
                   "blind": evaluate(vlm, tokenizer, records, setup, blind=True)}
        if exchanged:
            columns["shuffled"] = evaluate(vlm, tokenizer, exchanged, setup)
        own, few = columns["own"], len(records) < 50
        interval = f"{own['n']} questions, 95 % interval of the total {own['ci95'][0]:.1%} to {own['ci95'][1]:.1%}"
        if few:  # "100 %" of 4 questions may be 51 % of a thousand
            setup.print(f"\n{name}: only {interval}; a larger --eval_size, or more held out by --val=, tells more")
        setup.print(f"\n{name:<12}" + "".join(f"{title:>10}" for title in columns) + f"   ({interval})" * (not few))
        for kind in own["by_kind"] if len(own["by_kind"]) > 1 else ():
            setup.print(f"  {kind:<10}" + "".join(f"{column['by_kind'][kind]:>10.1%}" for column in columns.values()))
        setup.print(f"  {'all':<10}" + "".join(f"{column['accuracy']:>10.1%}" for column in columns.values()))
        if not exchanged:
            setup.print("  no shuffled baseline: it takes questions about different pictures")
        results[name] = {"n": own["n"], "accuracy": own["accuracy"], "ci95": own["ci95"], "by_kind": own["by_kind"],
                         "blind_accuracy": columns["blind"]["accuracy"],
                         "shuffled_accuracy": columns["shuffled"]["accuracy"] if exchanged else None}
    return results


def save_samples(path, vlm, tokenizer, held_out: dict) -> None:
    "samples.png: question, the model's answer (green if right, red if not), the right answer, 8 of each held-out set."
    chosen, lines = [(name, record) for name, records in held_out.items() for record in records[:8]][:16], []
    records = [record for _, record in chosen]
    for (name, record), text in zip(chosen, answers(vlm, tokenizer, records)):
        question, right = (message["content"].replace("<image>", "").strip() for message in record["messages"][-2:])
        # A vote among several right answers gives parts of a point: above one half counts as right. Sentences are
        # hardly ever equal word by word, and are left to the reader.
        colour = "black" if "metric" not in record and len(right.split()) > 4 else \
            "green" if score_answer(record, text) > 0.5 else "firebrick"
        lines.append([(f"{name} {record.get('kind', '')}", "grey"), (question, "black"), (f"model: {text}", colour),
                      (f"right: {right}", "grey")])
    data.draw_sheet(path, [next(iter(record["images"]), None) for record in records], lines)


# ----------------------------------------------------------------------------------------------------------------------
# The chapter

def main() -> None:
    flags = parse_flags(__doc__, STAGE, FLAGS, BY_MODEL)
    setup = Setup(flags)
    # Data. New: conversations, and a curriculum. The world starts with 90 % captions, which train the ViT word by word;
    # from record 12,000 on 10 % are captions and 90 % questions, which teach more once the picture is understood.
    world = World("chat", seed=flags.seed, caption_share=lambda i: max(0.1, 0.9 - i / 15_000))
    # Held out are single questions, about new scenes and about pairs of colour and kind that training never shows.
    # seed=1, whatever --seed is: all runs answer the same questions.
    exams = {split: World("exam", split, seed=1) for split in ("scenes", "pairs")}
    dataset, held_out = data.load_data(flags.data, world, exams, flags.seed, flags.eval_size, flags.val,
                                       max_bad=flags.max_bad)

    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    # New: all parts are trained. The decoder must be: to answer, it has to find a thing among the image tokens by the
    # name that the question gives it, and text has taught it nothing of that kind.
    params = freeze_all_but(vlm, ["bridge", "decoder", "vit"])
    # A fresh optimizer state, even when the weights come from chapter 2: its moments belong to another loss.
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume
    loaders = make_loaders(flags, setup, vlm, tokenizer, dataset, state)
    first = next(iter(held_out.values()))
    setup.print(f"{sum(p.numel() for p in params.values()):,} parameters are trained, {flags.batch_size} rows x "
                f"{flags.seq_len} tokens a step, {flags.steps} steps on {setup.world_size} x {setup.device.type} in "
                f"{setup.dtype}")

    vlm.train()
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.is_main, desc=STAGE,
                                     unit="step")
    while step < flags.steps and not interrupt.requested(setup):
        # ---- one step ------------------------------------------------------------------------------------------------
        # New: targets are -100, which the loss skips, everywhere but in the answers. Several conversations share a row,
        # and none attends to another.
        batches = [next(loader) for loader in loaders]
        loss = train_step(vlm, batches, count_supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        images = count_images(batches, setup)
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", images=images)
        log.write(step=step, loss=loss, images=images, lr=flags.lr * lr_scale(step - 1, flags),
                  seconds=time.time() - started)
        # once in a while; kinds of questions are learned one after the other, and the total hides that
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            result = evaluate(vlm, tokenizer, first, setup)
            kinds = ", ".join(f"{kind} {value:.0%}" for kind, value in result["by_kind"].items())
            setup.print(f"step {step}: held-out accuracy {result['accuracy']:.1%} ({kinds})")
            log.write(step=step, accuracy=result["accuracy"], accuracy_by_kind=result["by_kind"])
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    interrupt.close()
    seconds = time.time() - started

    # Save before anything else: an error in the evaluation must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    if interrupt.interrupted and not flags.eval_on_stop:
        return finish(setup, log, stage=STAGE, step=step, checkpoint=str(folder), interrupted=True)
    # New: accuracy beside its baselines. A number without the blind one proves nothing: "yes" alone is often right.
    results = evaluate_with_baselines(vlm, tokenizer, held_out, setup)
    # Long answers are never equal word by word; for them the loss with and without the picture tells more.
    documents = make_documents(first, vlm, tokenizer, flags.seq_len)
    for name, image in (("loss", "own"), ("blind_loss", "blind"), ("shuffled_loss", "shuffled")):
        nats, tokens = held_out_loss(vlm, documents, setup, flags.seq_len, image)
        results[next(iter(held_out))][name] = nats / tokens if tokens else None
    # Look at them: which mistakes it makes says more than their number.
    if setup.is_main:
        save_samples(folder / "samples.png", vlm, tokenizer, held_out)
    # In one line for scripts: the first held-out set, and all of them under "held_out".
    main_result = next(iter(results.values()))
    finish(setup, log, stage=STAGE, step=step, accuracy=main_result["accuracy"],
           blind_accuracy=main_result["blind_accuracy"], ci95=main_result["ci95"], held_out=results, seconds=seconds,
           checkpoint=str(folder), interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
