"""
Chapter 4: reinforcement learning. The model answers, the answers are checked, and those that were rewarded more than
usual become more likely.

    python train_rl.py                                  # tiny, after train_sft.py: a few minutes on a laptop
    python train_rl.py --kinds=                         # all kinds of questions, not only the two weakest
    python train_rl.py --data=my.json                   # your own questions, if their answers are short enough to check
    python train_rl.py --model=qwen2.5-1.5b --data=my.json                           # one GPU
    torchrun --nproc_per_node=8 train_rl.py --model=small

What it teaches: GRPO, group relative policy optimization (arXiv 2402.03300), in a plain form. For each question the
model samples a group of answers, at temperature 1. An answer's advantage is its reward minus the mean reward of its
group: no value network, the group is the baseline. The update is the ordinary loss of chapter 3 on the model's own
answers, with the advantage as the weight of each token.

Prints the accuracy on held-out questions of all kinds before and after (on the laptop run 87.4 and 90.5 % of the two
kinds trained on), with 95 % intervals, and the interval of the difference, which is narrower because both times the
questions are the same. What is not rewarded may be forgotten: trained on two kinds alone, "How many things are there?"
fell from 100 to 75 %. With a quarter of the questions of all kinds, and a few descriptions (--rehearse), both stay.

New in this chapter: rollouts with the picture in the prompt, rewards, advantages as token weights.
Left out:
- the ratio and its clipping: the policy that samples is the policy that learns (one update per rollout, temperature 1);
- the division by the group's standard deviation, which gives the groups that are nearly all right or nearly all wrong
  more weight than the others (arXiv 2503.20783);
- the KL penalty and its reference model: short right answers leave no room to drift.
"""
import itertools
import math
import random
import time

from plumbing.flags import run  # before torch: see plumbing/files.py

import torch
from tqdm import tqdm

import data
from plumbing.checkpoints import save
from plumbing.files import attempt
from plumbing.fitting import largest_micro_batch
from plumbing.log import Interrupt, Log, finish, how_to_ask
from plumbing.optimizer import Optimizer, lr_scale
from plumbing.ranks import Setup
from plumbing.scoring import wilson
from plumbing.world import QUESTIONS, World
from train_base import SHARED_FLAGS, chapter_flags, freeze_all_but, load_start, train_step
from train_sft import evaluate, save_samples, score_answer

STAGE = "rl"
# batch_size counts questions here, not rows. A learning rate far below chapter 3's: a policy that changes too fast
# answers badly, is rarely rewarded, and learns nothing.
BY_MODEL = {"tiny": {"batch_size": 64, "seq_len": 256, "steps": 300, "lr": 0.0005, "eval_size": 2000},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 50, "lr": 0.0005, "eval_size": 1200},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 300, "lr": 1e-6, "eval_size": 1000}}
FLAGS = SHARED_FLAGS | {
    "batch_size": (None, "questions per step, over all GPUs"),
    "eval_size": (None, "held-out questions"),
    "samples": (16, "answers to each question: the group that serves as baseline"),
    # Room for the world's longest answer, the honest one with its 15 tokens: what is cut off earns nothing.
    "max_new_tokens": (20, "longest answer, in tokens"),
    "temperature": (1.0, "of sampling; anything but 1 samples from another policy than the one that learns"),
    # A question that is always answered right teaches nothing: train on what chapter 3 has not learned.
    "kinds": ("number,relation", "kinds of the world's questions to train on, comma-separated; empty: all"),
    "rehearse": (0.25, "share of the world's questions that are of all kinds, so that none is forgotten"),
}


def rollout(vlm, tokenizer, records: list, flags, step: int) -> tuple[list, list[list[list[int]]]]:
    "-> (prompts, for each question a group of answers as ids). Picture and prompt are computed once for a group."
    # The same render as in training and in sample.py: it opens the assistant's turn, and the model continues it.
    load_pixels = data.pixel_loader(vlm.config.vision)
    shown = [[load_pixels(source, record) for source in record["images"]] for record in records]
    prompts = [tokenizer.render(record["messages"][:-1], list(map(vlm.config.bridge.tokens_of, images)),
                                add_generation_prompt=True) for record, images in zip(records, shown)]
    if not prompts:
        return [], []  # all of this rank's questions were bad records
    pixels = list(itertools.chain.from_iterable(shown))
    n = len(prompts) * flags.samples
    # A seed for each answer: it depends neither on its neighbours in the batch nor on the number of ranks. Not Python's
    # hash(), which differs from process to process.
    seeds = [random.Random(f"{flags.seed}/{step}/{record['id']}/{k}").getrandbits(40)
             for record in records for k in range(flags.samples)]
    rows = [[] for _ in range(n)]
    for column in vlm.generate(prompts, pixels, max_new_tokens=flags.max_new_tokens,
                               samples=flags.samples, stop=set(tokenizer.stop_ids), temperature=flags.temperature,
                               vocab_used=tokenizer.vocab_size, seeds=seeds):
        for row, token in zip(rows, column):
            if token is not None:  # None: this answer has ended. Its stop token is part of it: stopping is learned, too
                row.append(token)
    return prompts, [rows[i * flags.samples:(i + 1) * flags.samples] for i in range(len(prompts))]


def reward(record: dict, ids: list[int], tokenizer) -> float:
    "1 for a right answer that also ends; the scoring rules are those of the evaluation."
    # Without this, an endless answer that happens to score would become more likely, and answers would grow and grow.
    return score_answer(record, tokenizer.answer(ids)) if ids[-1] in tokenizer.stop_ids else 0.0


def to_documents(records, prompts, groups, tokenizer, reward=reward) -> tuple[list, int, dict]:
    """
    Rollouts -> (documents whose weight is their advantage, tokens sampled in the groups used, sums over the groups).
    Equal answers to a question are one document with the sum of their advantages: the same gradient, several times
    cheaper.
    """
    documents, tokens, means, teaching = [], 0, [], 0
    for record, prompt, group in zip(records, prompts, groups):
        rewards = [reward(record, ids, tokenizer) for ids in group]
        # The baseline: an answer is reinforced for being better than its group, not for an easy question.
        mean = sum(rewards) / len(rewards)
        means.append(mean)
        if max(rewards) == min(rewards):
            continue  # all right or all wrong: every advantage is 0, and there is nothing to learn
        teaching += 1
        # Counted over all samples, also those merged below: the step is divided by it, as if none were merged.
        tokens += sum(len(ids) for ids in group)
        advantages = {}  # {answer as ids: sum over its occurrences}; short answers repeat often
        for ids, r in zip(group, rewards):
            advantages[tuple(ids)] = advantages.get(tuple(ids), 0.0) + r - mean
        for ids, advantage in advantages.items():
            # Loss mask: the answer only, not the prompt with its image tokens.
            documents.append(data.Document(0, prompt.ids + list(ids), [0] * len(prompt.ids) + [1] * len(ids),
                                           prompt.slots, record, advantage))
    # reward: of samples at temperature 1; greedy answers, as in the evaluation, are somewhat better
    return documents, tokens, {"reward": sum(means), "teaching": teaching}


def pack_all(documents: list, rows: int, seq_len: int, vlm) -> list[dict]:
    "Documents -> as many micro-batches as they need. Answers to one question share its picture (data.collate)."
    batches = []
    while documents:
        arrays, packed, waiting = data.pack(documents, rows, seq_len, data.token_counter(vlm.config))
        if len(waiting) == len(documents):
            raise ValueError(f"a question with its answer has {len(documents[0].ids)} tokens; raise --seq_len={seq_len}"
                             + f", or lower --tiles={vlm.config.vision.tiles}" * bool(vlm.config.vision.tiles))
        # The pictures are encoded again, now with gradients: rollouts store none, and the ViT learns from rewards, too.
        batches.append(data.collate(arrays, packed, data.pixel_loader(vlm.config.vision)))
        documents = waiting
    return batches


def full_batch(rows: int, dataset, flags, vlm, tokenizer, bad: data.BadRecords) -> dict:
    "The largest micro-batch possible: questions with a picture and the longest answer, until the rows are full."
    documents, count = [], data.token_counter(vlm.config)
    good = (record for i in itertools.count() for record in data.keep_good([dataset[i]], bad))
    while sum(len(doc.ids) for doc in documents) < rows * flags.seq_len:
        record = next(good)
        prompt = tokenizer.render(record["messages"][:-1], count(record) if callable(count) else count, True)
        documents.append(data.Document(0, prompt.ids + [0] * flags.max_new_tokens,
                                       [0] * len(prompt.ids) + [1] * flags.max_new_tokens, prompt.slots, record))
    arrays, packed, _ = data.pack(documents, rows, flags.seq_len, count)
    return data.collate(arrays, packed, data.pixel_loader(vlm.config.vision))


def gain(before: list[float], after: list[float]) -> dict:
    "Scores of the same questions before and after -> accuracies and their difference, with 95 % intervals."
    # Both times the same questions, decoded greedily: most answers do not change, and their variance cancels.
    changes = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    # 1.96 standard errors on either side hold 95 % of a normal distribution.
    n, mean, error = len(after), changes.mean().item(), 1.96 * changes.std(correction=0).item() / math.sqrt(len(after))
    return {"n": n, "before": sum(before) / n, "before_ci95": wilson(sum(before), n),
            "accuracy": sum(after) / n, "ci95": wilson(sum(after), n),
            "gain": mean, "gain_ci95": [mean - error, mean + error]}


def compare(before: dict, after: dict, records: list, kinds: list, setup: Setup) -> dict:
    "Two evaluations of one held-out set -> the gain on all of it, and on the kinds trained on. Prints a table."
    asked = [i for i, record in enumerate(records) if record.get("kind") in kinds] or range(len(records))
    out = gain(before["right"], after["right"]) | {"by_kind_before": before["by_kind"], "by_kind": after["by_kind"]}
    out["pairs"] = [(before["right"][i], after["right"][i]) for i in asked]
    out["trained_on"] = gain(*zip(*out["pairs"]))
    for kind, value in after["by_kind"].items():
        setup.print(f"  {kind:<11}{before['by_kind'][kind]:>8.1%} {value:>8.1%}")
    for name, r in (("all", out), ("trained on", out["trained_on"])):
        setup.print(f"  {name:<11}{r['before']:>8.1%} {r['accuracy']:>8.1%}   "
                  f"({r['n']} questions; 95 % interval {r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}; "
                  f"gain {r['gain']:+.1%}, {r['gain_ci95'][0]:+.1%} to {r['gain_ci95'][1]:+.1%})")
    return out


def with_rehearsal(kinds: list[str], share: float) -> list[str]:
    "-> the kinds of question to take in turn: `kinds` again and again, and every kind once, in this share of them."
    # Kinds that are always answered right cost little: their groups teach nothing, until one is being forgotten.
    if not kinds or share <= 0:
        return kinds
    return kinds * round(len(QUESTIONS) * (1 / share - 1) / len(kinds)) + list(QUESTIONS)


def main() -> None:
    flags = chapter_flags(__doc__, STAGE, FLAGS, BY_MODEL)
    setup = Setup(flags)
    # Data, first: a wrong file or picture shows before a large model is loaded. New: single questions, with an answer
    # that code can check. No loader: the model itself makes the rows.
    kinds = [kind for kind in flags.kinds.split(",") if kind]
    # Held out are questions of all kinds: what is not trained on may be forgotten, and that should show.
    exams = {split: World("exam", split, seed=1) for split in ("scenes", "pairs")}
    world = World("exam", seed=flags.seed, kinds=with_rehearsal(kinds, flags.rehearse))
    captions = World("captions", seed=flags.seed) if flags.data == "world" and flags.rehearse > 0 else None
    dataset, held_out = data.load_data(flags.data, world, exams, flags.seed, flags.eval_size, flags.val,
                                       max_bad=flags.max_bad)

    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    params = freeze_all_but(vlm, ["bridge", "decoder", "vit"], flags)  # the same parts as in chapter 3
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments, bridge=flags.lr_bridge, vit=flags.lr_vit)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume

    # A resumed run compares with where it began, not with where it was interrupted.
    before = state.get("before") or {name: evaluate(vlm, tokenizer, records, setup)
                                     for name, records in held_out.items()}
    for name, result in before.items():
        setup.print(f"before: {name} {result['accuracy']:.1%} "
                  f"(95 % interval {result['ci95'][0]:.1%} to {result['ci95'][1]:.1%})")

    bad = data.BadRecords(dataset.max_bad)
    rows = flags.micro_batch_size or largest_micro_batch(
        vlm, setup, 16, lambda n: full_batch(n, dataset, flags, vlm, tokenizer, bad))
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.is_main, desc=STAGE,
                                     unit="step")
    while step < flags.steps and not interrupt.requested(setup):
        # ---- one step ------------------------------------------------------------------------------------------------
        # This rank's questions. The numbers run on from step to step: no question comes twice.
        mine = range(step * flags.batch_size + setup.rank, (step + 1) * flags.batch_size, setup.world_size)
        try:
            records = data.keep_good([attempt(dataset.__getitem__, i) for i in mine], bad)
        except ValueError as error:  # more than --max_bad: this rank adds nothing to the step, which is the last one
            setup.failure, records = error, []
        # New: rollouts, rewards, and advantages as token weights.
        prompts, groups = rollout(vlm, tokenizer, records, flags, step)
        documents, tokens, sums = to_documents(records, prompts, groups, tokenizer)
        # No code can say whether a description is good. What is not rewarded may be forgotten, so the right words are
        # taught as in chapter 3, one description for every eight questions.
        documents += [data.make_document(captions[i], i, tokenizer, vlm.config.bridge.num_tokens, flags.seq_len)
                      for i in mine if captions and i % 8 == 0]
        batches = pack_all(documents, rows, flags.seq_len, vlm)
        # One update per rollout: the model that is updated is the one that answered, so no ratio is needed. Divided by
        # all tokens: a long answer's tokens count as much as a short one's (DAPO, arXiv 2503.14476).
        tokens, questions = setup.all_reduce(tokens), setup.all_reduce(len(groups))
        # "teaching": groups with right and wrong answers. Near 0 the questions are too easy or too hard to learn from.
        stats = {name: setup.all_reduce(value) / max(questions, 1) for name, value in sums.items()}
        # An update has the same size, from however few groups it comes, and from a handful it is mostly noise: the
        # model would forget more than it learns. So below an eighth of the questions steps are smaller.
        scale = lr_scale(step, flags) * min(1.0, 8 * stats["teaching"])
        train_step(vlm, batches, max(tokens, 1), optimizer, setup, scale)
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        bar.update()
        bar.set_postfix(reward=f"{stats['reward']:.3f}", teaching=f"{stats['teaching']:.0%}")
        log.write(step=step, **stats, tokens=tokens, lr=flags.lr * scale, seconds=time.time() - started)
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            for name, records in held_out.items():
                result = evaluate(vlm, tokenizer, records, setup)
                setup.print(f"step {step}: {name} {result['accuracy']:.1%}")
                log.write(step=step, split=name, accuracy=result["accuracy"], accuracy_by_kind=result["by_kind"])
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, [], step, before=before)
    bar.close()
    interrupt.close()
    seconds = time.time() - started
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, [], step, before=before)
    if interrupt.interrupted and not flags.eval_on_stop:
        return finish(setup, log, stage=STAGE, step=step, checkpoint=str(folder), interrupted=True)
    # All kinds again, also those not trained on: a policy may forget what is not rewarded.
    results = {}
    for name, records in held_out.items():
        setup.print(f"\n{name:<13}  before    after")
        results[name] = compare(before[name], evaluate(vlm, tokenizer, records, setup), records, kinds, setup)
    # All held-out sets together: more questions, a narrower interval.
    changed = [pair for r in results.values() for pair in r.pop("pairs")]
    trained_on = gain(*zip(*changed))
    setup.print(f"\ntrained on, all sets: {trained_on['before']:.1%} before, {trained_on['accuracy']:.1%} after "
              f"({trained_on['n']} questions), gain {trained_on['gain']:+.1%} "
              f"({trained_on['gain_ci95'][0]:+.1%} to {trained_on['gain_ci95'][1]:+.1%})")
    if setup.is_main:
        save_samples(folder / "samples.png", vlm, tokenizer, held_out)
    main_result = next(iter(results.values()))
    finish(setup, log, how_to_ask(next(iter(held_out.values()))), stage=STAGE, step=step,
           accuracy=main_result["accuracy"], before=main_result["before"],
           gain_ci95=main_result["gain_ci95"], trained_on=trained_on, held_out=results, seconds=seconds,
           checkpoint=str(folder), interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
