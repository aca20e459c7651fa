"""
Chapter 1: a language model from nothing. It reads text and learns to predict the next token.

    python train_base.py                                       # tiny, on the built-in world: half a minute on a laptop
    python train_base.py --data=books.txt                      # your own text
    python train_base.py --model=small                         # one GPU
    torchrun --nproc_per_node=8 train_base.py --model=small    # several GPUs: each takes a share of the rows

What it teaches: next-token prediction, the training loop that all four chapters share, and bits per byte, a measure of
language models that does not depend on the tokenizer. On the laptop run it falls from 13.7 to 0.28 on held-out text.
At the end the model continues three prompts: a number does not show whether it writes nonsense.

Left out: epochs (the loader never ends: it shuffles a file anew for every pass over it). The optimizer, the log and the
checkpoints are in plumbing/, which can be trusted unread.
"""
import itertools
import math
import shlex
import time
from collections import Counter
from dataclasses import replace
from functools import partial

from plumbing.flags import RUN_FLAGS, given, parse_flags, run  # before torch: see plumbing/files.py

import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data
from plumbing.checkpoints import (STAGES, check_asked, find_start, read_resume, run_name, save, stage_folder,
                                  take_flags_of_run)
from plumbing.settings import set_fields
from plumbing.files import recover, require
from plumbing.fitting import SMALLER, fit_rows, largest_micro_batch
from plumbing.hub import fetch
from plumbing.log import Interrupt, Log, finish
from plumbing.optimizer import Optimizer, lr_scale
from plumbing.ranks import Setup
from plumbing.text import read_text_records
from plumbing.workers import share_workers
from plumbing.world import World
from model import FROM_SCRATCH, PRESETS, VLM, check_name, connect, load_checkpoint, load_pretrained, preset
from tokenizer import Tokenizer
from vision import SIGLIP, Bridge, ViT

STAGE = "base"
# The defaults of the flags that depend on --model. A step of tiny has 16 x 256 = 4,096 tokens. At a learning rate of
# 0.005 text alone is learned faster (0.22 bits per byte after 140 steps, not 0.28), but then chapter 3 learns slower:
# what the decoder has learned too firmly is harder to change. The rate for released models is the one with which LLaVA
# and others trained such models further (arXiv 2310.03744).
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 100, "lr": 0.002},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 200, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-5}}


SHARED_FLAGS = {  # of all four chapters, {name: (default, meaning)}
    # What is trained, and on what. The first to change: --data, to your own; then --model, once you have a GPU.
    "model": ("tiny", f"{', '.join(PRESETS)}, or a Qwen's hub id (Org/Name) or folder"),
    "vision": ("", f"encoder in place of the preset's, with its released weights: {', '.join(SIGLIP)}"), **RUN_FLAGS}


def chapter_flags(doc: str, stage: str, flags: dict, by_model: dict, argv=None):
    "As parse_flags, with names checked. After --resume, flags that are not given are those of the run."
    out = parse_flags(doc, flags, by_model, argv)
    check_name(out.model)
    if getattr(out, "optimizer", "") == "auto":
        out.optimizer = "muon" if out.model in FROM_SCRATCH else "adamw"
    require(not getattr(out, "val", "") or any(name != "world" for name, _ in data.parse_mixture(out.data)),
            f"--val={getattr(out, 'val', '')}: goes with files in --data=; the world holds out scenes of its own")
    if getattr(out, "resume", False):
        take_flags_of_run(out, stage, given(argv))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The model that a stage starts from

def without_checkpoint(flags, setup: Setup) -> tuple[VLM, Tokenizer, str]:
    "The model before any stage of ours -> (model, tokenizer, where they come from)."
    if flags.model not in FROM_SCRATCH:
        # Its bridge is new and useless before chapter 2, unless the model is a finished LLaVA.
        vlm, folder = load_pretrained(flags.model, flags.vision, flags.bridge, setup.device)
        vlm.config.generation = {}  # the publisher's temperatures are for the publisher's model, not for ours
        if flags.set:
            new = "align" not in vlm.config.run["chapters"]
            set_fields(vlm.config, flags.set, ("bridge", ) * new, f"released weights have their shape ({folder})"
                       + "; of these only bridge.* is new, and can be set" * new)
            vlm.bridge = Bridge(vlm.config.bridge).to(setup.device)
        return vlm, Tokenizer.from_pretrained(folder), f"the weights of {folder}"
    # A short text may have fewer tokens than the embedding has rows: the rest is never sampled (vocab_used).
    config = preset(flags.model, flags.bridge, flags.set, flags.vision)
    tokenizer = Tokenizer.train(data.tokenizer_texts(flags.data, flags.seed), config.decoder.vocab_size)
    if not flags.vision:
        return VLM(config), tokenizer, "random weights (the first loss is near 37, not ln V = 7: see GPT's norm)"
    vit = ViT.from_pretrained(fetch(flags.vision))
    config.vision, config.pretrained_vision = vit.config, flags.vision
    vlm = VLM(connect(config))
    vlm.vit = vit
    return vlm, tokenizer, f"random weights, the encoder from {flags.vision}"


def load_start(flags, setup: Setup, stage: str) -> tuple[VLM, Tokenizer, dict, dict]:
    """
    The model a stage starts from -> (model on its device, tokenizer, resume state, optimizer tensors): the first that
    applies of four, and it says which.
    """
    # A broken source is an error and never falls through to the next: training would run from random weights and look
    # healthy, only worse.
    state, moments, why = {}, {}, ""
    if flags.resume:
        # 1. --resume: this stage's own last checkpoint, with its optimizer and its position in the data.
        source = recover(stage_folder(flags, stage))
        state, moments = read_resume(source)
    else:
        # 2. --init: that folder, or none.  3. The newest earlier stage under --out_dir; on other data the newest model.
        # Tiny and small have the tokenizer of what they were trained on. The world's cuts other words into twice as
        # many pieces, and its eyes know flat drawings: 300 steps on hand signs reach 94 % from random weights and 87 %
        # from the world's model, on clothes 62 and 53 %, though on drawn shapes 88 and 92 %. Chapter 4 needs a model.
        own_words = flags.model in FROM_SCRATCH and stage != "rl"
        source, why = find_start(flags, stage, own_words)
    today = None
    if source:
        # The tokenizer comes with the weights: ids mean nothing without it.
        vlm, tokenizer = load_checkpoint(source, setup.device), Tokenizer.from_pretrained(source)
        vlm.config.preset = vlm.config.preset or run_name(flags.model)  # a LLaVA folder of Hugging Face's has none
        vlm.config.run.setdefault("chapters", STAGES[:3])  # older checkpoints do not say
        if flags.model == vlm.config.preset in FROM_SCRATCH:  # an edit of PRESETS does not reach the weights
            today = preset(flags.model, flags.bridge, flags.set)
    else:
        # 4. The released weights of --model, or, for the presets that have none, random ones.
        vlm, tokenizer, source = without_checkpoint(flags, setup)
    if not flags.resume:
        start = vlm.config.run
        before = start.get("chapters", [])
        vlm.config.run = {"chapters": list(dict.fromkeys([*before, stage])), "stage": stage, "again": stage in before,
                          "start": start.get("saved"), "start_data": start.get("data"), "steps": flags.steps,
                          "data": flags.data,
                          # whether it has learned to answer without a picture, too (make_loaders)
                          "texts": start.get("texts", "sft" in before and start.get("data") != "world")}
    if told := check_asked(flags, source, vlm.config, today):
        setup.print(told)
    # Not given: as the model was trained; llava-ov as it was published. From here on the model says it, to all that
    # open pictures, and so does its checkpoint.
    vlm.config.vision.tiles = flags.tiles = vlm.config.vision.tiles if flags.tiles is None else flags.tiles
    if flags.lora_rank and not vlm.config.lora_rank:
        vlm.add_lora(flags.lora_rank)
    vlm.gpt.activation_checkpointing = flags.activation_checkpointing
    vlm.gpt.set_float8(flags.float8)
    setup.print(f"{'resuming' if flags.resume else 'starting'} {stage} from {source}"
                + (f" at step {state['step']}" if flags.resume else why))
    vlm.to(setup.device)
    if setup.compile:
        vlm.compile_parts()
    return vlm, tokenizer, state, moments


def freeze_all_but(vlm: VLM, trained: list[str], flags=None) -> dict[str, torch.nn.Parameter]:
    "Train only these parts (of vit, bridge, decoder), but for those with a rate of 0 -> their parameters by name."
    # A ViT with pretrained weights stays frozen, unless --lr_vit is given: it has seen far more pictures than we have.
    rates = {"vit": 0 if vlm.config.pretrained_vision else -1} | {
        name: rate for name in vlm.parts() if (rate := getattr(flags, f"lr_{name}", -1)) >= 0}
    trained = [name for name in trained if rates.get(name, -1) != 0]
    require(trained, "nothing is left to train: --lr_bridge and --lr_vit are 0")
    # A frozen parameter costs its own bytes. A trained one costs 3 to 4 times that: gradient and optimizer state.
    for name, part in vlm.parts().items():
        part.requires_grad_(name in trained)
    if vlm.config.lora_rank and "decoder" in trained:  # of the decoder these alone
        for name, p in vlm.gpt.named_parameters():
            p.requires_grad_(".lora_" in name)
    return {name: p for name, p in vlm.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------------------
# Data: records -> packed micro-batches (data.py), for this model and these ranks

def make_loaders(flags, setup: Setup, vlm: VLM, tokenizer: Tokenizer, dataset, state: dict, **options) -> list:
    "-> one data.Loader for each micro-batch of this rank. options: of data.make_document. See also fit_rows."
    image_tokens = data.token_counter(vlm.config)
    make_document = partial(data.make_document, tokenizer=tokenizer, image_tokens=image_tokens, **options)
    fit_rows(flags, setup, vlm, dataset, make_document)
    make_document = partial(make_document, seq_len=flags.seq_len)
    make = partial(data.Loader, dataset, make_document, data.pixel_loader(vlm.config.vision), seq_len=flags.seq_len,
                   image_tokens=image_tokens, pin=setup.device.type == "cuda")
    # batch_size 32, micro_batch_size 8 -> 4 micro-batches a step. Each reads its own share of the records, whichever
    # rank computes it, so that 1 GPU x 4 micro-batches and 4 GPUs x 1 train on the same rows.
    saved, micro = state.get("data") or [], flags.micro_batch_size  # saved: each micro-batch's position in the data
    if not micro and saved:
        micro = flags.batch_size // len(saved)
    elif not micro and flags.batch_size % setup.world_size == 0:
        micro = largest_micro_batch(vlm, setup, flags.batch_size // setup.world_size,
                                    lambda rows: next(make(rows=rows, prefetch=False)))
    count = flags.batch_size // max(micro, 1)
    require(micro >= 1 and count * micro == flags.batch_size and count % setup.world_size == 0,
            f"--batch_size={flags.batch_size} is not a multiple of --micro_batch_size={micro or 1} x "
            f"{setup.world_size} processes")
    require(len(saved) in (0, count), f"--resume: the run was started with {len(saved)} micro-batches a step, now "
            f"there are {count}; give --micro_batch_size={flags.batch_size // max(len(saved), 1)}")
    workers = share_workers(getattr(flags, "workers", 0), setup.device.type, setup.world_size, count)
    setup.loaders = [make(rows=micro, micro_batch=i, micro_batches=count, state=saved[i] if saved else None,
                          workers=workers[i // setup.world_size])
                     for i in range(setup.rank, count, setup.world_size)]  # 4 micro-batches, 2 ranks: 0 and 2, 1 and 3
    return setup.loaders


# ----------------------------------------------------------------------------------------------------------------------
# The training step

def count_supervised(batches: list[dict], setup: Setup) -> float:
    "Supervised tokens of the step, over all micro-batches and ranks."
    tokens = setup.all_reduce(sum(len(batch["supervised"]) for batch in batches))
    require(tokens, f"no token of this step is supervised; its records: {record_names(batches)}")
    return tokens


def record_names(batches: list[dict]) -> str:
    names = [str(name) for batch in batches for name in batch["records"]]
    return ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20)


def count_images(batches: list[dict], setup: Setup) -> int:
    "How many squares the ViT sees; a picture in tiles is several."
    return int(setup.all_reduce(sum(len(batch["pixels"]) for batch in batches if batch["pixels"] is not None)))


def train_step(vlm: VLM, batches: list[dict], tokens: float, optimizer: Optimizer, setup: Setup,
               scale: float) -> float:
    """
    One optimizer step over this rank's micro-batches -> the loss of the whole step, in nats per token. tokens:
    supervised ones, of all micro-batches and ranks. scale: lr_scale's factor.
    """
    # The loss is a sum, divided by the tokens of the WHOLE step. Gradients add up, in p.grad over the micro-batches
    # (gradient accumulation) and in reduce_gradients over the ranks, so the result is the gradient of the mean over all
    # tokens, however they are split. TRAP: a mean of means would give a token in a short micro-batch more weight.
    total = 0.0
    for batch in batches:
        try:
            loss = vlm(setup.to_device(batch)) / tokens
            if loss.requires_grad:  # in alignment a micro-batch without pictures trains nothing
                loss.backward()
        except torch.OutOfMemoryError:
            rows = len(batch["ids"])
            raise ValueError(f"out of GPU memory with {rows} rows a forward pass; give " + (
                f"--micro_batch_size={next(n for n in range(rows - 1, 0, -1) if rows % n == 0)}" if rows > 1 else
                SMALLER)) from None
        total += loss.detach()  # a tensor on the GPU: its value here would make the CPU wait
    # 0 * norm is 0, and NaN if any gradient is not finite: one update with it, and all weights would be lost.
    total += 0 * get_total_norm([p.grad for p in optimizer.params.values() if p.grad is not None])
    total = setup.all_reduce(float(total))  # the one place where the CPU waits; it goes on while the optimizer works
    if math.isfinite(total):
        setup.bad_steps = 0
        optimizer.step(scale)
        return total
    for p in optimizer.params.values():
        p.grad = None
    setup.bad_steps += 1
    problem = f"loss or gradient is not a finite number ({setup.bad_steps} in a row; {record_names(batches)})"
    require(setup.bad_steps < setup.max_bad_steps, f"{problem}: stopped, and the last checkpoint is as it was; look at "
            "these records, or give a lower --lr")
    setup.print(f"step skipped: {problem}")
    return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# The loss on held-out text: the chapters that follow use it too

def make_documents(records: list[dict], vlm: VLM, tokenizer: Tokenizer, seq_len: int, **options) -> list:
    "Held-out records -> the documents that fit into a row, for held_out_loss."
    count = data.token_counter(vlm.config)
    documents = (data.make_document(record, i, tokenizer, count, seq_len, **options)
                 for i, record in enumerate(records))
    return [document for document in documents if document]


def pictures_of(documents: list) -> list[tuple]:
    "The different pictures in documents, each as (source, its number of image tokens)."
    return list(dict.fromkeys(pair for doc in documents for pair in zip(doc.record["images"], doc.counts or ())))


def exchange(packed: list, pictures: list[tuple]) -> list:
    "The same documents, each picture replaced by the next other one of the batch, or else by one of `pictures`."
    own, other = pictures_of(packed), {}
    for i, (source, k) in enumerate(own):  # only one of as many image tokens, which tiles make different, fits there
        others = itertools.chain(own[i + 1:], own[:i], pictures)
        other[source, k] = next((one for one, n in others if n == k and one != source), source)
    return [replace(doc, record=doc.record | {
        "images": [other[pair] for pair in zip(doc.record["images"], doc.counts or ())]}) for doc in packed]


@torch.no_grad()
def held_out_loss(vlm: VLM, documents: list, setup: Setup, seq_len: int, image: str = "own") -> tuple[float, int]:
    "Documents -> (summed loss in nats, supervised tokens). image: own, blind (grey pictures) or shuffled (exchanged)."
    total, tokens, waiting = 0.0, 0, documents[setup.rank::setup.world_size]
    pictures = pictures_of(documents)
    if image == "shuffled" and (stay := sum(n == 1 for n in Counter(k for _, k in pictures).values())):
        if stay == len(pictures):  # there is no other picture
            return 0.0, 0
        setup.print(f"shuffled: {stay} of {len(pictures)} pictures stay: no other is cut into as many --tiles")
    # TRAP: ranks may need different numbers of rounds. An all_reduce inside this loop would wait for one that is done.
    while waiting:
        # 16 rows at a time. No document waits for ever: make_document leaves out those that are longer than a row.
        arrays, packed, waiting = data.pack(waiting, 16, seq_len, data.token_counter(vlm.config))
        if image == "shuffled":
            packed = exchange(packed, pictures)
        batch = data.collate(arrays, packed, data.pixel_loader(vlm.config.vision))
        if image == "blind" and batch["pixels"] is not None:
            batch["pixels"] = torch.full_like(batch["pixels"], 128)
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
    flags = chapter_flags(__doc__, STAGE, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    params = freeze_all_but(vlm, ["decoder"])  # ViT and bridge wait for chapter 2
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)  # its master weights are float32
    vlm.to(setup.dtype)  # what computes: bfloat16 on a GPU
    step = state.get("step", 0)  # above 0 with --resume

    # Data: text in records of at most seq_len tokens. Held-out text was never trained on, so it cannot be memorised.
    read = partial(read_text_records, encode=tokenizer.encode, end=tokenizer.endoftext, seq_len=flags.seq_len)
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
    # 0.7 is a little bolder than the most likely token, which soon repeats itself. On one's own text it continues what
    # held-out documents begin with; a long document is in several pieces, of which the first one counts.
    begun = {document.record["id"]: tokenizer.decode(document.ids[:8]) for document in reversed(documents)}
    prompts = ["3 things", "There", "The"] if flags.data == "world" else list(begun.values())[-3:]
    for prompt in prompts:
        prompt_ids = tokenizer.encode(prompt)
        # A document with ids alone: no loss mask, no pictures.
        generated = vlm.generate([data.Document(0, prompt_ids, [], [], {})], max_new_tokens=40, temperature=0.7,
                                 stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size)
        setup.print("  " + tokenizer.decode(prompt_ids + [row[0] for row in generated]))
    finish(setup, log, f"--prompt={shlex.quote(prompts[0])}", stage=STAGE, step=step, bits_per_byte=after,
           bits_per_byte_before=before, seconds=time.time() - started, checkpoint=str(folder),
           interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
