"""
Chapter 4: learning from being right. The model answers, the answers are checked, and what earned more than usual
becomes likelier.

    python train_rl.py                                  # tiny, after train_sft.py: a few minutes on a laptop
    python train_rl.py --kinds=count,number             # only some kinds of questions
    python train_rl.py --data=my.json                   # your own questions, if their answers are short enough to check
    torchrun --nproc_per_node=8 train_rl.py --model=small

GRPO (arXiv 2402.03300) in its plainest form. For each question the model is asked `samples` times, at temperature 1. An
answer's advantage is its reward minus the mean reward of its group: no value network, the group is the baseline. The
update is the ordinary loss of chapter 3 on the model's own answers, each token weighted by its answer's advantage.

Prints the accuracy on held-out questions before and after, with 95 % intervals, and the interval of the difference,
which is narrower because both times the questions are the same.

New in this chapter: rollouts with the picture in the prompt, rewards, advantages as token weights.
Left out, because the policy that samples is the policy that learns (one update per rollout, temperature 1): the ratio
and its clipping.
Left out, because it shrinks exactly the hard and the easy questions' share: the division by the group's standard
deviation (arXiv 2503.20783). Left out, because short right answers leave no room to drift: the KL penalty and its
reference model.
"""
import math
import random
import time

import torch
from tqdm import tqdm

import data
from train_base import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, check_resume, evaluate, finish, freeze,
                        lr_scale, make_tokenizer, parse_flags, run, save, save_samples, start, to_pixels, train_step)

STAGE = "rl"
BY_MODEL = {"tiny": {"batch_size": 64, "seq_len": 256, "steps": 200, "lr": 0.0004, "eval_size": 1200},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 300, "lr": 0.0005, "eval_size": 1200}}
FLAGS = SHARED_FLAGS | {
    "batch_size": (None, "questions per step, over all GPUs"),
    "eval_size": (None, "held-out questions"),
    "samples": (16, "answers to each question: the group that serves as baseline"),
    "max_new_tokens": (12, "longest answer, in tokens"),
    "temperature": (1.0, "of sampling; anything but 1 samples from another policy than the one that learns"),
    "kinds": ("", "train on these kinds of questions only, comma-separated; empty: all"),
}


def roll_out(vlm, tokenizer, records: list, flags, step: int) -> tuple[list, list[list[list[int]]]]:
    """
    -> (prompts, the ids of each question's samples). Each sample has its own seed; the picture is encoded once for all
    of them.
    """
    prompts = [tokenizer.render(record["messages"][:-1], image_tokens=vlm.config.bridge.num_tokens,
                                add_generation_prompt=True) for record in records]
    convert = to_pixels(vlm)
    pixels = [convert(source, record) for record in records for source in record["images"]]
    n = len(prompts) * flags.samples
    # Not Python's hash(), which differs from process to process.
    seeds = [random.Random(f"{flags.seed}/{step}/{record['id']}/{k}").getrandbits(40)
             for record in records for k in range(flags.samples)]
    rows = [[] for _ in range(n)]
    for column in vlm.generate(prompts, torch.stack(pixels) if pixels else None, max_new_tokens=flags.max_new_tokens,
                               samples=flags.samples, stop=set(tokenizer.stop_ids), temperature=flags.temperature,
                               vocab_used=tokenizer.vocab_size, seeds=seeds):
        for row, token in zip(rows, column):
            if token is not None:
                row.append(token)
    return prompts, [rows[i * flags.samples:(i + 1) * flags.samples] for i in range(len(prompts))]


def reward(record: dict, ids: list[int], tokenizer) -> float:
    "1 for a right answer that also ends; the scoring rules are those of the evaluation."
    if ids[-1] not in tokenizer.stop_ids:
        return 0.0
    answer = record.get("answer", record["messages"][-1]["content"])
    return data.score(record.get("metric", "exact"), tokenizer.decode(ids).strip(), answer, record.get("choices"))


def to_documents(records, prompts, groups, tokenizer) -> tuple[list, int, dict]:
    """
    Rollouts -> (documents whose weight is their advantage, tokens sampled in the groups that teach, statistics).
    Equal answers to a question are one document with the sum of their advantages: the same gradient, several times
    cheaper.
    """
    documents, tokens, means, teaching = [], 0, [], 0
    for record, prompt, group in zip(records, prompts, groups):
        rewards = [reward(record, ids, tokenizer) for ids in group]
        mean = sum(rewards) / len(rewards)
        means.append(mean)
        if max(rewards) == min(rewards):
            continue  # all right or all wrong: every advantage is 0, and there is nothing to learn
        teaching += 1
        tokens += sum(len(ids) for ids in group)
        advantages = {}
        for ids, r in zip(group, rewards):
            advantages[tuple(ids)] = advantages.get(tuple(ids), 0.0) + r - mean
        for ids, advantage in advantages.items():
            documents.append(data.Document(0, prompt.ids + list(ids), [0] * len(prompt.ids) + [1] * len(ids),
                                           prompt.slots, record, advantage))
    return documents, tokens, {"reward": sum(means) / max(len(means), 1), "teaching": teaching / max(len(means), 1)}


def pack_all(documents: list, rows: int, seq_len: int, vlm) -> list[dict]:
    batches = []
    while documents:
        arrays, placed, waiting = data.pack(documents, rows, seq_len, vlm.config.bridge.num_tokens)
        if len(waiting) == len(documents):
            raise ValueError(f"a question with its answer has {len(documents[0].ids)} tokens; "
                             f"raise --seq_len={seq_len}")
        batches.append(data.to_batch(arrays, placed, to_pixels(vlm)))
        documents = waiting
    return batches


def compare(before: dict, after: dict) -> dict:
    """
    Accuracies with their 95 % intervals, and the paired difference: mean and standard error of each question's change.
    """
    changes = torch.tensor(after["right"], dtype=torch.float64) - torch.tensor(before["right"], dtype=torch.float64)
    mean, error = changes.mean().item(), 1.96 * changes.std().item() / math.sqrt(len(changes))
    return {"n": after["n"], "before": before["accuracy"], "before_ci95": before["ci95"], "accuracy": after["accuracy"],
            "ci95": after["ci95"], "gain": mean, "gain_ci95": [mean - error, mean + error],
            "by_kind_before": before["by_kind"], "by_kind": after["by_kind"]}


def main() -> None:
    flags = parse_flags(__doc__, FLAGS, BY_MODEL)
    setup = Setup(flags)
    vlm, tokenizer, state, moments = start(flags, setup, STAGE, make_tokenizer(flags))
    params = freeze(vlm, ["bridge", "decoder"] if vlm.config.pretrained_vision else ["bridge", "decoder", "vit"])
    optimizer = Optimizer(params, flags.optimizer, flags.lr)
    step = check_resume(flags, state)
    if moments:
        optimizer.load(moments)
    kinds = [kind for kind in flags.kinds.split(",") if kind]
    dataset, held = data.load_data(flags.data, "exam", flags.seed, flags.eval_size, flags.val, kinds=kinds)
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    before = state.get("before") or {name: evaluate(vlm, tokenizer, records, setup) for name, records in held.items()}
    for name, result in before.items():
        setup.say(f"before: {name} {result['accuracy']:.1%} "
                  f"(95 % interval {result['ci95'][0]:.1%} to {result['ci95'][1]:.1%})")

    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.master, desc=STAGE, unit="step")
    while step < flags.steps and not interrupt.wanted:
        # ---- one step: ask, check, learn -----------------------------------------------------------------------------
        # this rank's questions
        mine = range(step * flags.batch_size + setup.rank, (step + 1) * flags.batch_size, setup.world)
        records = [dataset[i] for i in mine]
        prompts, groups = roll_out(vlm, tokenizer, records, flags, step)
        documents, tokens, stats = to_documents(records, prompts, groups, tokenizer)
        batches = pack_all(documents, flags.micro_batch_size or 16, flags.seq_len, vlm)
        # token-level: a long answer's tokens count as much as a short one's (DAPO, arXiv 2503.14476)
        tokens = setup.sum(tokens)
        train_step(vlm, batches, max(tokens, 1), params, optimizer, setup, lr_scale(step, flags))
        step += 1
        # ------------------------------------------------------------------------------------------------------------
        stats = {name: setup.sum(value) / setup.world for name, value in stats.items()}
        bar.update()
        bar.set_postfix(reward=f"{stats['reward']:.3f}", teaching=f"{stats['teaching']:.0%}")
        log.write(step=step, **stats, tokens=tokens, lr=flags.lr * lr_scale(step - 1, flags),
                  seconds=time.time() - started)
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            for name, records in held.items():
                setup.say(f"step {step}: {name} {evaluate(vlm, tokenizer, records, setup)['accuracy']:.1%}")
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, [], step, before=before)
    bar.close()
    seconds = time.time() - started
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, [], step, before=before)
    results = {name: compare(before[name], evaluate(vlm, tokenizer, records, setup)) for name, records in held.items()}
    for name, r in results.items():
        setup.say(f"\n{name:<12}  before    after   ({r['n']} questions)")
        for kind in r["by_kind"]:
            setup.say(f"  {kind:<10}{r['by_kind_before'][kind]:>8.1%} {r['by_kind'][kind]:>8.1%}")
        setup.say(f"  {'all':<10}{r['before']:>8.1%} {r['accuracy']:>8.1%}   95 % intervals "
                  f"{r['before_ci95'][0]:.1%} to {r['before_ci95'][1]:.1%}, "
                  f"{r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}; "
                  f"gain {r['gain']:+.1%} ({r['gain_ci95'][0]:+.1%} to {r['gain_ci95'][1]:+.1%})")
    if setup.master:
        save_samples(folder / "samples.png", vlm, tokenizer, [r for records in held.values() for r in records[:8]][:16])
    main_result = next(iter(results.values()))
    finish(setup, log, stage=STAGE, step=step, accuracy=main_result["accuracy"], before=main_result["before"],
           gain_ci95=main_result["gain_ci95"], held_out=results, seconds=seconds,
           checkpoint=str(folder), interrupted=interrupt.wanted)


if __name__ == "__main__":
    run(main)
