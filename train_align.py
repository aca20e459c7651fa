"""
Chapter 2: the language model learns to use pictures. Pictures become image tokens that a frozen decoder understands.

    python train_align.py                                      # tiny, after train_base.py: half a minute on a laptop
    python train_align.py --data=captions.json                 # your own pictures and captions
    python train_align.py --model=qwen2.5-1.5b --data=blip_laion_cc_sbu_558k.json              # one GPU
    torchrun --nproc_per_node=8 train_align.py --model=small   # several GPUs

What it teaches: three parts make a vision-language model. The vision transformer (ViT) turns a picture into features,
the bridge turns these into a few image tokens, vectors like those of words, and the decoder continues a text that
contains them. The decoder stays as chapter 1 left it, to the last bit. Only the bridge is trained (and the ViT, where
it has no pretrained weights), by one question: which image tokens make the right caption most likely? So the bridge
learns the decoder's language before the decoder may change, and its first, random tokens cannot damage what the decoder
knows.

The run prints captions before and after, and the caption loss with the right picture, without one, and with a wrong one
(on the laptop run 0.91 with and 1.53 without). A model that only guesses typical captions has the same loss in all
three.

New in this chapter: pictures in the batch, a frozen part, and the check that the picture is used at all.
Left out: contrastive pretraining of the ViT (SigLIP's own recipe), which needs batches of thousands of pictures. The
ViT of --model=tiny learns from captions alone.
"""
import time

from plumbing.flags import run  # before torch: see plumbing/files.py

from tqdm import tqdm

import data
from plumbing.checkpoints import save
from plumbing.drawing import draw_sheet
from plumbing.engine import respond
from plumbing.log import Interrupt, Log, finish, how_to_ask
from plumbing.optimizer import Optimizer, lr_scale
from plumbing.ranks import Setup
from plumbing.records import text_of
from plumbing.world import World
from train_base import (SHARED_FLAGS, chapter_flags, count_images, count_supervised, freeze_all_but, held_out_loss,
                        load_start, make_documents, make_loaders, train_step)

STAGE = "align"
# Rows are longer than a caption: several captions, each with its picture, share a row (data.pack). The learning rate of
# released models is 100 times that of chapter 1, because only the bridge is trained, and it starts from random weights.
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 80, "lr": 0.003},
            "small": {"batch_size": 64, "seq_len": 512, "steps": 200, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-3}}


def write_captions(vlm, tokenizer, records: list) -> list[str]:
    "The model's caption for each record's picture, as long as the longest right one and a little more."
    load_pixels = data.pixel_loader(vlm.config.vision)  # opens a picture, in the size that the ViT needs
    length = max(len(tokenizer.encode(text_of(record["messages"][-1]["content"]))) for record in records)
    # No layer of ours behaves otherwise in evaluation. A dropout that you add would.
    vlm.eval()
    # [:-1]: all messages but the last one, which is the right caption. The model writes its own in that place.
    captions = respond(vlm, tokenizer, [record["messages"][:-1] for record in records],
                       [[load_pixels(source, record) for source in record["images"]] for record in records],
                       max_new_tokens=min(128, length + 4))
    vlm.train()
    return captions


def show_captions(vlm, tokenizer, records: list, setup: Setup, title: str) -> None:
    # Read them: if the loss falls and the captions do not fit their pictures, only the style of captions was learned.
    setup.print(f"\ncaptions {title}:")
    for record, text in zip(records, write_captions(vlm, tokenizer, records)):
        setup.print(f"  model: {text}\n  right: {text_of(record['messages'][-1]['content'])}")


def save_samples(path, vlm, tokenizer, records: list) -> None:
    "samples.png: pictures with the model's caption and the right one."
    lines = [[(f"model: {text}", "black"), (f"right: {text_of(record['messages'][-1]['content'])}", "grey")]
             for record, text in zip(records, write_captions(vlm, tokenizer, records))]
    draw_sheet(path, [next(iter(record["images"]), None) for record in records], lines)


def caption_losses(vlm, documents: list, setup: Setup, seq_len: int) -> dict[str, float]:
    "New: nats per caption token with the right picture, a grey one, and another record's."
    out = {}
    for image in ("own", "blind", "shuffled"):
        # The loss without a picture ("blind") shows how far grammar and habit alone lead. What lies between it and
        # "own" comes from the picture. "shuffled" rises above "blind" once the model trusts the picture, because a
        # wrong one then misleads it.
        nats, tokens = held_out_loss(vlm, documents, setup, seq_len, image)
        out[image] = nats / tokens if tokens else None  # shuffled, where there is only one picture
    setup.print("caption loss: " + ", ".join(f"{value:.3f} {name}" for name, value in out.items() if value is not None))
    return out


def main() -> None:
    flags = chapter_flags(__doc__, STAGE, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    # Data. New: records with a picture and its caption. Held out are scenes that training does not show: of those that
    # it shows, the captions could be remembered.
    dataset, held_out = data.load_data(flags.data, World("captions", seed=flags.seed),
                                       {"scenes": World("captions", "scenes", seed=1)}, flags.seed, flags.eval_size,
                                       flags.val, max_bad=flags.max_bad)

    # From chapter 1 if it was run. Else from random weights: then the frozen decoder knows no words, and the captions
    # will be nonsense. A released --model needs no chapter 1.
    vlm, tokenizer, state, moments = load_start(flags, setup, STAGE)
    # New: the decoder is frozen. Gradients flow through it to the image tokens, but it gets none of its own.
    params = freeze_all_but(vlm, ["bridge", "vit"], flags)
    # It knows the trained parameters alone. The frozen ones, by far the most, need no memory for gradients and moments.
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments, bridge=flags.lr_bridge, vit=flags.lr_vit)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume
    loaders = make_loaders(flags, setup, vlm, tokenizer, dataset, state)
    records = next(iter(held_out.values()))
    documents = make_documents(records, vlm, tokenizer, flags.seq_len)
    # Say what is trained. To train the wrong part is the most common mistake here, and the loss alone does not show it.
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
        # New: a batch also has "pixels", the pictures as bytes [images, 3, S, S], and "image_positions", the places in
        # the rows where their image tokens go. The loss is on the captions' tokens only: image tokens have no targets.
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
    # In nats per token. 0.6 nats: the model gives a caption's next token a probability of e^-0.6 = 0.55, on (geometric)
    # average.
    losses = caption_losses(vlm, documents, setup, flags.seq_len)
    if setup.is_main:
        save_samples(folder / "samples.png", vlm, tokenizer, records[:8])
    finish(setup, log, how_to_ask(records, question=False), stage=STAGE, step=step, caption_loss=losses["own"],
           blind_loss=losses["blind"], shuffled_loss=losses["shuffled"], seconds=time.time() - started,
           checkpoint=str(folder), interrupted=interrupt.interrupted)


if __name__ == "__main__":
    run(main)
