"""
Chapter 2: the language model learns to use pictures. Pictures become image tokens that a frozen decoder understands.

    python train_align.py                                  # tiny, after train_base.py: half a minute on a laptop
    python train_align.py --data=captions.json             # your own pictures and captions
    python train_align.py --model=qwen2.5-1.5b --data=blip_laion_cc_sbu_558k.json    # one GPU
    torchrun --nproc_per_node=8 train_align.py --model=small

What it teaches: the decoder stays as chapter 1 left it, to the last bit; only the bridge is trained (and the ViT, where
it has no pretrained weights), by one question: which image tokens make the caption most likely? So the bridge learns
the decoder's language before the decoder may start to change, and cannot damage what it knows.

Prints captions before and after, and the caption loss with the right picture, without one, and with a wrong one (on the
laptop run 0.90 with and 1.14 without): a model that only guesses typical captions shows no difference between them.

New in this chapter: pictures in the batch, a frozen part, and the check that the picture is used at all.
Left out: contrastive pretraining of the ViT (SigLIP's own recipe); with --model=tiny it learns from captions alone.
"""
import time

from tqdm import tqdm

import data
from model import respond
from train_base import held_out_loss, make_documents
from training import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, count_images, count_supervised, finish,
                      freeze_all_but, load_start, lr_scale, make_loaders, parse_flags, run, save, train_step)
from world import World

STAGE = "align"
# Rows here are longer than the captions: several captions, each with its picture, share a row (data.pack).
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 80, "lr": 0.003},
            "small": {"batch_size": 64, "seq_len": 512, "steps": 1500, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-3}}  # only the new bridge learns


def write_captions(vlm, tokenizer, records: list) -> list[str]:
    "The model's caption for each record's picture, as long as the longest right one and a little more."
    load_pixels = data.pixel_loader(vlm.config.vision)
    length = max(len(tokenizer.encode(record["messages"][-1]["content"])) for record in records)
    vlm.eval()
    captions = respond(vlm, tokenizer, [record["messages"][:-1] for record in records],
                       [[load_pixels(source, record) for source in record["images"]] for record in records],
                       max_new_tokens=min(128, length + 4))
    vlm.train()
    return captions


def show_captions(vlm, tokenizer, records: list, setup: Setup, title: str) -> None:
    # Read them: a falling loss with captions that do not fit their pictures means that only the style was learned.
    setup.print(f"\ncaptions {title}:")
    for record, text in zip(records, write_captions(vlm, tokenizer, records)):
        setup.print(f"  model: {text}\n  right: {record['messages'][-1]['content']}")


def save_samples(path, vlm, tokenizer, records: list) -> None:
    "samples.png: pictures with the model's caption and the right one."
    lines = [[(f"model: {text}", "black"), (f"right: {record['messages'][-1]['content']}", "grey")]
             for record, text in zip(records, write_captions(vlm, tokenizer, records))]
    data.draw_sheet(path, [next(iter(record["images"]), None) for record in records], lines)


def caption_losses(vlm, documents: list, setup: Setup, seq_len: int) -> dict[str, float]:
    "New: nats per caption token with the right picture, a grey one, and another record's."
    out = {}
    for image in ("own", "blind", "shuffled"):
        # "blind" is what a caption's grammar tells; only the distance from there to "own" comes from the picture.
        # "shuffled" is above "blind" once the model relies on the picture: a wrong one then misleads it.
        nats, tokens = held_out_loss(vlm, documents, setup, seq_len, image)
        out[image] = nats / tokens if tokens else None  # shuffled, where there is only one picture
    setup.print("caption loss: " + ", ".join(f"{value:.3f} {name}" for name, value in out.items() if value is not None))
    return out


def main() -> None:
    flags = parse_flags(__doc__, STAGE, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    # From chapter 1 if it was run; else from random weights: then a decoder that knows no words is frozen.
    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    # New: the decoder is frozen. Gradients flow through it to the image tokens, but it gets none of its own.
    params = freeze_all_but(vlm, ["bridge", "vit"])
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume

    # Data. New: records with a picture and its caption; held out are scenes that training does not show.
    dataset, held_out = data.load_data(flags.data, World("captions", seed=flags.seed),
                                       {"scenes": World("captions", "scenes", seed=1)}, flags.seed, flags.eval_size,
                                       flags.val, max_bad=flags.max_bad)
    loaders = make_loaders(flags, setup, vlm, tokenizer, dataset, state)
    records = next(iter(held_out.values()))
    documents = make_documents(records, vlm, tokenizer, flags.seq_len)
    # Say what is trained: to train the wrong part is the most common mistake, and the loss alone does not show it.
    trained = {name.split(".")[0] for name in params}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vlm.parts().items()}
    setup.print(", ".join(f"{name} {n:,} parameters" + ("" if name in trained else " (frozen)")
                          for name, n in counts.items()))
    show_captions(vlm, tokenizer, records[:3], setup, "before")  # chapter 1's text, about nothing in particular

    vlm.train()
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.is_main, desc=STAGE,
                                     unit="step")
    while step < flags.steps and not interrupt.requested(setup):
        # ---- one step ------------------------------------------------------------------------------------------------
        # New: a batch also has "pixels", the pictures as bytes. The loss is on the captions' tokens only.
        batches = [next(loader) for loader in loaders]
        loss = train_step(vlm, batches, count_supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        images = count_images(batches, setup)  # captions differ in length, so a step's number of pictures varies
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", images=images)
        log.write(step=step, loss=loss, images=images, lr=flags.lr * lr_scale(step - 1, flags),
                  seconds=time.time() - started)
        # once in a while
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            losses = caption_losses(vlm, documents, setup, flags.seq_len)
            log.write(step=step, caption_loss=losses["own"], blind_loss=losses["blind"])
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    interrupt.close()

    # Save before anything else: an error in the evaluation must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    if interrupt.interrupted and not flags.eval_on_stop:
        return finish(setup, log, stage=STAGE, step=step, checkpoint=str(folder), interrupted=True)
    show_captions(vlm, tokenizer, records[:3], setup, "after")
    # nats per token: e^-0.6 = 0.55 is then the probability, on average, that the model gives to a caption's next token
    losses = caption_losses(vlm, documents, setup, flags.seq_len)
    if setup.is_main:
        save_samples(folder / "samples.png", vlm, tokenizer, records[:8])
    finish(setup, log, stage=STAGE, step=step, caption_loss=losses["own"], blind_loss=losses["blind"],
           shuffled_loss=losses["shuffled"], seconds=time.time() - started, checkpoint=str(folder),
           interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
