"""
Chapter 2: the language model gets eyes. Pictures become tokens that a frozen decoder can use.

    python train_align.py                                  # tiny, after train_base.py: about a minute on a laptop
    python train_align.py --data=captions.json             # your own pictures and captions
    torchrun --nproc_per_node=8 train_align.py --model=small

The decoder stays as chapter 1 left it, to the last bit; only the bridge learns (and the ViT, where it has no pretrained
weights), from one signal: what must the picture's tokens be, for the decoder to find the caption likely? So the bridge
learns the decoder's language before the decoder may start to adapt, and cannot spoil what it knows. Prints captions
before and after, and the caption loss with the right picture, none, and a wrong one: a model that merely guesses
typical captions shows no difference between them.

New in this chapter: pictures in the batch, a frozen part, and the check that the picture is used at all.
Left out: contrastive pretraining of the ViT (SigLIP's own recipe); with --model=tiny it learns from captions alone.
"""
import time

from tqdm import tqdm

from train_base import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, answers, finish, freeze,
                        held_out_loss, lr_scale, make_tokenizer, parse_flags, run, save, save_samples, start,
                        start_data, supervised, to_document, train_step)

STAGE = "align"
# Rows here are longer than the captions: several captions, each with its picture, share a row (data.pack).
BY_MODEL = {"tiny": {"batch_size": 16, "seq_len": 256, "steps": 80, "lr": 0.003},
            "small": {"batch_size": 64, "seq_len": 512, "steps": 1500, "lr": 0.003},
            "released": {"batch_size": 16, "seq_len": 2048, "steps": 1000, "lr": 1e-3}}  # only the new bridge learns


def show_captions(vlm, tokenizer, records: list, setup: Setup, title: str) -> None:
    # Read them: a falling loss with captions that do not fit their pictures means that only the style was learned.
    setup.say(f"\ncaptions {title}:")
    for record, text in zip(records, answers(vlm, tokenizer, records)):
        setup.say(f"  model: {text}\n  right: {record['messages'][-1]['content']}")


def picture_losses(vlm, documents: list, setup: Setup, seq_len: int) -> dict:
    "New: nats per caption token with the right picture, a grey one, and another record's."
    out = {}
    for image in ("own", "blank", "shuffled"):
        # "blank" is what a caption's grammar gives away; only the distance from there to "own" is seeing. "shuffled"
        # lies above "blank" once the model trusts its eyes: a wrong picture then misleads it.
        nats, tokens = held_out_loss(vlm, documents, setup, seq_len, image)
        out[image] = nats / tokens
    setup.say("caption loss: " + ", ".join(f"{value:.3f} with {image} pictures" for image, value in out.items()))
    return out


def main() -> None:
    flags = parse_flags(__doc__, SHARED_FLAGS, BY_MODEL)
    setup = Setup(flags)
    # From chapter 1 if it is there, else from scratch: then a decoder without words is frozen, and little is learned.
    vlm, tokenizer, state, moments = start(flags, setup, STAGE, make_tokenizer(flags))
    # New: the decoder is frozen. Gradients flow through it to the picture's tokens, but it keeps none of its own.
    params = freeze(vlm, ["bridge", "vit"])
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume
    loaders, held = start_data(flags, setup, vlm, tokenizer, "captions", state)
    records = next(iter(held.values()))  # the first held-out set: the world's new scenes, or a share of your file
    render = to_document(tokenizer, vlm, flags.seq_len)
    documents = [doc for i, record in enumerate(records) if (doc := render(record, i))]
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    # Say what learns: to train the wrong part is the most common slip, and the loss alone does not show it.
    counts = {name: sum(p.numel() for p in group.parameters()) for name, group in vlm.groups().items()}
    setup.say(", ".join(f"{name} {n:,} parameters" + ("" if name in {p.split('.')[0] for p in params} else " (frozen)")
                        for name, n in counts.items() if name != "decoder")
              + f", decoder {counts['decoder']:,} (frozen)")
    show_captions(vlm, tokenizer, records[:3], setup, "before")  # chapter 1's prose, about nothing in particular

    # The loop is chapter 1's; a batch now brings its pictures along, already drawn as bytes.
    vlm.train()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.master, desc=STAGE, unit="step")
    while step < flags.steps and not interrupt.heard(setup):
        batches = [next(loader) for loader in loaders]
        loss = train_step(vlm, batches, supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        # Captions differ in length, so that a step's number of pictures does too.
        images = setup.sum(sum(len(batch["pixels"]) for batch in batches if batch["pixels"] is not None))
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", images=int(images))
        log.write(step=step, loss=loss, images=images, lr=flags.lr * lr_scale(step - 1, flags),
                  seconds=time.time() - started)
        # once in a while
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            picture_losses(vlm, documents, setup, flags.seq_len)
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    # Save before anything else: an error in the evaluation must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    show_captions(vlm, tokenizer, records[:3], setup, "after")
    # nats per token: e^-0.6 = 0.55 is then the chance, on average, that the model gives to a caption's next word
    losses = picture_losses(vlm, documents, setup, flags.seq_len)
    if setup.master:
        save_samples(folder / "samples.png", vlm, tokenizer, records[:8])
    finish(setup, log, stage=STAGE, step=step, caption_loss=losses["own"], blind_loss=losses["blank"],
           shuffled_loss=losses["shuffled"], seconds=time.time() - started, checkpoint=str(folder),
           interrupted=interrupt.wanted)


if __name__ == "__main__":
    run(main)
