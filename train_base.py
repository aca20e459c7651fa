"""
Chapter 1: a language model from nothing. It reads text and learns to predict the next token.

    python train_base.py                                       # tiny, on the built-in world: half a minute on a laptop
    python train_base.py --data=books.txt                      # your own text
    python train_base.py --model=small                         # one GPU
    torchrun --nproc_per_node=8 train_base.py --model=small    # several GPUs: each takes a share of the rows

What it teaches: next-token prediction, the training loop that all four chapters share, and bits per byte, a measure of
language models that does not depend on the tokenizer. On the laptop run it falls from 5.72 to 0.28 on held-out text.
At the end the model continues three prompts: a number does not show whether it writes nonsense.

Left out: epochs (the loader never ends: it shuffles a file anew for every pass over it). Flags, optimizer and
checkpoints are in training.py, which says what it leaves out, and need not be read first.
"""
import math
import time
from functools import partial

import data  # first: see its imports
import torch
from tqdm import tqdm

from model import VLM
from tokenizer import Tokenizer
from training import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, count_supervised, finish, freeze_all_but,
                      load_start, lr_scale, make_loaders, parse_flags, run, save, train_step)
from weights import require
from world import World

STAGE = "base"
# The defaults of the flags that depend on --model. A step of tiny has 16 x 256 = 4,096 tokens. At a learning rate of
# 0.005 text alone is learned faster (0.22 bits per byte after 140 steps, not 0.28), but then chapter 3 learns slower:
# what the decoder has learned too firmly is harder to change. The rate for released models is the one with which LLaVA
# and others trained such models further (arXiv 2310.03744).
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 100, "lr": 0.002},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 200, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-5}}


# ----------------------------------------------------------------------------------------------------------------------
# The loss on held-out text: the chapters that follow use it too

def make_documents(records: list[dict], vlm: VLM, tokenizer: Tokenizer, seq_len: int, **options) -> list:
    "Held-out records -> the documents that fit into a row, for held_out_loss."
    documents = (data.make_document(record, i, tokenizer, vlm.config.bridge.num_tokens, seq_len, **options)
                 for i, record in enumerate(records))
    return [document for document in documents if document]


@torch.no_grad()
def held_out_loss(vlm: VLM, documents: list, setup: Setup, seq_len: int, image: str = "own") -> tuple[float, int]:
    "Documents -> (summed loss in nats, supervised tokens). image: own, blind (grey pictures) or shuffled (exchanged)."
    total, tokens, waiting = 0.0, 0, documents[setup.rank::setup.world_size]
    # TRAP: ranks may need different numbers of rounds. An all_reduce inside this loop would wait for one that is done.
    while waiting:
        # 16 rows at a time. No document waits for ever: make_document leaves out those that are longer than a row.
        arrays, packed, waiting = data.pack(waiting, 16, seq_len, vlm.config.bridge.num_tokens)
        batch = data.collate(arrays, packed, data.pixel_loader(vlm.config.vision))
        if image == "blind" and batch["pixels"] is not None:
            batch["pixels"] = torch.full_like(batch["pixels"], 128)
        if image == "shuffled" and batch["pixels"] is not None:
            if len(batch["pixels"]) == 1:  # there is no other picture: left out
                continue
            batch["image_index"] = (batch["image_index"] + 1) % len(batch["pixels"])
        total += vlm(setup.to_device(batch)).item()
        tokens += len(batch["supervised"])
    return setup.all_reduce(total), int(setup.all_reduce(tokens))


def bits_per_byte(vlm, tokenizer, documents: list, setup: Setup, seq_len: int) -> float:
    "How many bits the model needs to encode one byte of held-out text."
    # A loss per token falls when text is merely cut into more and shorter tokens. Bytes do not depend on the tokenizer:
    #   bits per byte = summed loss [nats] / ln 2 [nats per bit] / bytes
    # 8 means no knowledge at all, one of 256 equally likely bytes; good models of prose reach 0.7.
    nats, _ = held_out_loss(vlm, documents, setup, seq_len)
    # ids[1:]: the first id is given, not predicted, so its bytes do not count
    size = sum(len(tokenizer.decode_bytes(doc.ids[1:])) for doc in documents)
    require(size, f"no byte of the held-out text can be predicted; give more by --val=, or raise --seq_len={seq_len}")
    return nats / math.log(2) / size


# ----------------------------------------------------------------------------------------------------------------------
# The chapter

def main() -> None:
    flags = parse_flags(__doc__, STAGE, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    params = freeze_all_but(vlm, ["decoder"])  # ViT and bridge wait for chapter 2
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)  # its master weights are float32
    vlm.to(setup.dtype)  # what computes: bfloat16 on a GPU
    step = state.get("step", 0)  # above 0 with --resume

    # Data: text in records of at most seq_len tokens. Held-out text was never trained on, so it cannot be memorised.
    read = partial(data.read_text_records, encode=tokenizer.encode, end=tokenizer.endoftext, seq_len=flags.seq_len)
    dataset, held_out = data.load_data(flags.data, World("text", seed=flags.seed),
                                       {"scenes": World("text", "scenes", seed=1)}, flags.seed, flags.eval_size,
                                       flags.val, read, flags.max_bad)
    loaders = make_loaders(flags, setup, vlm, tokenizer, dataset, state, supervise_all=True)
    documents = make_documents(next(iter(held_out.values())), vlm, tokenizer, flags.seq_len, supervise_all=True)
    # What the flags amount to, said before the time is spent: a wrong --batch_size shows here.
    setup.print(f"{sum(p.numel() for p in params.values()):,} parameters, {flags.batch_size * flags.seq_len:,} tokens "
                f"a step, {flags.steps} steps on {setup.world_size} x {setup.device.type} in {setup.dtype}")
    # To compare with at the end. A resumed run compares with where it began, not with where it was interrupted.
    before = state.get("before") or bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)

    vlm.train()
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.is_main, desc=STAGE,
                                     unit="step")
    while step < flags.steps and not interrupt.requested(setup):
        # ---- one step ------------------------------------------------------------------------------------------------
        # One micro-batch per loader: ids [rows, seq_len], and as targets the same ids, one position later.
        batches = [next(loader) for loader in loaders]
        # Every position predicts its next token, all at once: a step has as many examples as tokens.
        loss = train_step(vlm, batches, count_supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        bar.update()
        # In nats per token. e^loss is the number of tokens between which the model hesitates: 2 nats, about 7 tokens.
        bar.set_postfix(loss=f"{loss:.3f}")
        # step - 1: the learning rate that this step used
        log.write(step=step, loss=loss, lr=flags.lr * lr_scale(step - 1, flags), seconds=time.time() - started)
        # once in a while
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            now = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)
            setup.print(f"step {step}: {now:.3f} bits per byte")
            log.write(step=step, bits_per_byte=now)
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step, before=before)
    bar.close()
    interrupt.close()

    # Save before anything else: an error in the evaluation must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step, before=before)
    if interrupt.interrupted and not flags.eval_on_stop:
        return finish(setup, log, stage=STAGE, step=step, checkpoint=str(folder), interrupted=True)
    after = bits_per_byte(vlm, tokenizer, documents, setup, flags.seq_len)
    setup.print(f"bits per byte on held-out text: {before:.3f} before, {after:.3f} after")
    # 0.7 is a little bolder than the most likely token, which soon repeats itself.
    for prompt in ("3 things", "There", "The"):
        prompt_ids = tokenizer.encode(prompt)
        # A document with ids alone: no loss mask, no pictures.
        generated = vlm.generate([data.Document(0, prompt_ids, [], [], {})], max_new_tokens=40, temperature=0.7,
                                 stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size)
        setup.print("  " + tokenizer.decode(prompt_ids + [row[0] for row in generated]))
    finish(setup, log, stage=STAGE, step=step, bits_per_byte=after, bits_per_byte_before=before,
           seconds=time.time() - started, checkpoint=str(folder), interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
