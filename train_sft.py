"""
Chapter 3: from a model that describes pictures to one that answers questions about them.

    python train_sft.py --batch_size=32                        # tiny, on the built-in world: six minutes on a laptop
    python train_sft.py                                        # the same with its usual 64 rows a step: eleven minutes
    python train_sft.py --data=my.json                         # your own pictures and conversations (LLaVA's format)
    python train_sft.py --model=qwen2.5-1.5b --data=llava_v1_5_mix665k.json                    # one GPU
    torchrun --nproc_per_node=8 train_sft.py --model=small     # several GPUs

What it teaches: supervised fine-tuning (SFT). The loss is the same next-token loss, but on conversations, and only on
the assistant's words: the model is not trained to predict what the user will say. All parts are trained now (the ViT
only where it has no pretrained weights).

It also teaches how answers are judged. Each kind of question is scored beside two baselines: with the picture blanked
(blind: what the question alone tells) and with pictures exchanged (shuffled: does the answer follow the picture?). With
64 rows a step the laptop run reaches 98 % on new scenes, and 24 % blind.

New in this chapter: the decoder is trained again, and answers are scored.
One learning rate serves all parts: for the tiny model others were as good, within noise. LLaVA's recipes for released
weights give the bridge and the encoder rates of their own: --lr_bridge, --lr_vit.
"""
import math
import time
from collections import Counter

from plumbing.flags import given, run  # before torch: see plumbing/files.py

import torch
from tqdm import tqdm

import data
from plumbing.checkpoints import save
from plumbing.drawing import draw_sheet
from plumbing.engine import respond
from plumbing.log import Interrupt, Log, finish, how_to_ask
from plumbing.optimizer import Optimizer, lr_scale
from plumbing.pictures import picture_key
from plumbing.ranks import Setup
from plumbing.records import text_of
from plumbing.scoring import score, wilson
from plumbing.world import World
from model import FROM_SCRATCH
from train_base import (SHARED_FLAGS, chapter_flags, count_images, count_supervised, freeze_all_but, held_out_loss,
                        load_start, make_documents, make_loaders, train_step)
from vision import blank

STAGE = "sft"
# Many small steps of short rows: a tiny model learns more from many updates than from many tokens in each. A picture
# with two questions takes 45 to 70 tokens, so that two of them fill a row. TRAP: longer conversations of your own need
# longer rows. Without --seq_len they get them (plumbing/fitting.py); with it, turns that do not fit are left out.
BY_MODEL = {"tiny": {"batch_size": 64, "seq_len": 112, "steps": 1200, "lr": 0.005, "eval_size": 400},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 800, "lr": 0.002, "eval_size": 1000},
            "released": {"batch_size": 32, "seq_len": 2048, "steps": 1000, "lr": 2e-5, "eval_size": 1000}}
# Times the usual rate, from a model that has been through this chapter on the same data. At the full rate it forgets
# what it knew: in 30 steps it fell from 90.8 to 84.6 % of new scenes, at a tenth it stayed (docs/tried.md).
AGAIN = 0.1
# Kinds of questions are learned one after the other: where a curve rises is worth the 1 % of the time that it costs.
EVERY, FEW = 200, 200
FLAGS = SHARED_FLAGS | {
    "eval_size": (None, "held-out questions per evaluation, of each set"),
    "eval_every": (-1, f"steps between evaluations; -1: every {EVERY}, on {FEW} questions; 0: only at the end")}


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: the model's answers to held-out questions, scored, beside the blind and the shuffled baseline

def exchange_pictures(records: list) -> list | None:
    "The same questions, each about the next picture that is another one. None if all are the same picture."
    flat = [source for record in records for source in record["images"]]
    # Five questions about one photo follow each other: the next record's picture is often the same one.
    keys, n = [picture_key(source) for source in flat], len(flat)
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
    length = max(len(tokenizer.encode(text_of(record["messages"][-1]["content"]))) for record in records)
    vlm.eval()
    for at in range(0, len(records), batch):
        rows = records[at:at + batch]
        pixels = [[load_pixels(source, record) for source in record["images"]] for record in rows]
        if blind:
            pixels = [[blank(p) for p in group] for group in pixels]
        out += respond(vlm, tokenizer, [r["messages"][:-1] for r in rows], pixels, max_new_tokens=min(128, length + 4))
    vlm.train()
    return out


def score_answer(record: dict, text: str) -> float:
    "0 to 1. A record of a benchmark has its own rule and right answers; else the last turn is the right answer."
    return score(record.get("metric", "exact"), text, record.get("answer", text_of(record["messages"][-1]["content"])),
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
        question, right = (text_of(message["content"]).replace("<image>", "").strip()
                           for message in record["messages"][-2:])
        # A vote among several right answers gives parts of a point: above one half counts as right. Sentences are
        # hardly ever equal word by word, and are left to the reader.
        colour = "black" if "metric" not in record and len(right.split()) > 4 else \
            "green" if score_answer(record, text) > 0.5 else "firebrick"
        lines.append([(f"{name} {record.get('kind', '')}", "grey"), (question, "black"), (f"model: {text}", colour),
                      (f"right: {right}", "grey")])
    draw_sheet(path, [next(iter(record["images"]), None) for record in records], lines)


def frequent_questions(held_out: dict, most: int = 4) -> list[str]:
    "Of one's own data; the server's page suggests them. Long ones are no suggestions."
    first = [record["messages"][0]["content"] for records in held_out.values() for record in records]
    asked = Counter(text.replace("<image>", "").strip() for text in first)
    return [text for text, _ in asked.most_common() if 0 < len(text) <= 80][:most]


# ----------------------------------------------------------------------------------------------------------------------
# The chapter

def go_on(flags, vlm, world: World, setup: Setup) -> None:
    "From a model that has been through this chapter: the curriculum at its end, a lower rate on data that it knows."
    start, told = world.caption_share, []
    world.caption_share = lambda i: start(math.inf)
    if flags.resume:  # with the rate of the run
        return
    if any(name == "world" for name, _ in data.parse_mixture(flags.data)):
        told += [f"captions are {start(math.inf):.0%} of the world's records"]
    # Other data have new things in them, which the usual rate learns better (docs/tried.md). A released model's usual
    # rate is one for going on already.
    if flags.model in FROM_SCRATCH and vlm.config.run["start_data"] == flags.data and "lr" not in given():
        told += [f"--lr={flags.lr * AGAIN:g} instead of {flags.lr:g} (--lr= chooses another)"]
        flags.lr *= AGAIN
    if told:
        setup.print(f"it has been through this chapter, so {', and '.join(told)}")


def main() -> None:
    flags = chapter_flags(__doc__, STAGE, FLAGS, BY_MODEL)
    setup = Setup(flags)
    # Data. New: conversations, and a curriculum. The world starts with 90 % captions, which train the ViT word by word;
    # from record 12,750 on 5 % are captions and 95 % questions, which teach more once the picture is understood.
    world = World("chat", seed=flags.seed, caption_share=lambda i: max(0.05, 0.9 - i / 15_000))
    # Held out are single questions, about new scenes and about pairs of colour and kind that training never shows.
    # seed=1, whatever --seed is: all runs answer the same questions.
    exams = {split: World("exam", split, seed=1) for split in ("scenes", "pairs")}
    dataset, held_out = data.load_data(flags.data, world, exams, flags.seed, flags.eval_size, flags.val,
                                       max_bad=flags.max_bad)

    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    if flags.data != "world":
        vlm.config.run["questions"] = frequent_questions(held_out)
    if vlm.config.run.get("again"):
        go_on(flags, vlm, world, setup)
    # New: all parts are trained. The decoder must be: to answer, it has to find a thing among the image tokens by the
    # name that the question gives it, and text has taught it nothing of that kind.
    params = freeze_all_but(vlm, ["bridge", "decoder", "vit"], flags)
    # A fresh optimizer state, even when the weights come from chapter 2: its moments belong to another loss.
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments, bridge=flags.lr_bridge, vit=flags.lr_vit)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume
    loaders = make_loaders(flags, setup, vlm, tokenizer, dataset, state)
    first = next(iter(held_out.values()))
    setup.print(f"{sum(p.numel() for p in params.values()):,} parameters are trained, {flags.batch_size} rows x "
                f"{flags.seq_len} tokens a step, {flags.steps} steps on {setup.world_size} x {setup.device.type} in "
                f"{setup.dtype}")

    vlm.train()
    every = EVERY if flags.eval_every < 0 else flags.eval_every
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
        if every > 0 and step % every == 0 and step < flags.steps:
            result = evaluate(vlm, tokenizer, first[:FEW] if flags.eval_every < 0 else first, setup)
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
    log.write(step=step, accuracy=main_result["accuracy"], accuracy_by_kind=main_result["by_kind"])  # the curves' end
    finish(setup, log, how_to_ask(first), stage=STAGE, step=step, accuracy=main_result["accuracy"],
           blind_accuracy=main_result["blind_accuracy"], ci95=main_result["ci95"], held_out=results, seconds=seconds,
           checkpoint=str(folder), interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
