"""
Chapter 3: from a model that describes pictures to one that answers questions about them.

    python train_sft.py --batch_size=32                    # tiny, on the built-in world: under five minutes on a laptop
    python train_sft.py --data=my.json                     # your own pictures and conversations (LLaVA's format)
    torchrun --nproc_per_node=8 train_sft.py --model=small

Supervised fine-tuning: the same next-token loss, but now on conversations, and only the assistant's words count: the
model is not asked to guess what the user will say. All parts learn now (the ViT only where it has no pretrained
weights).

Prints the accuracy on questions it has not seen, each kind of question beside two baselines: with the picture blanked
(what the question alone gives away) and with pictures exchanged (does the answer follow the picture?).

New in this chapter: the decoder learns again, and answers are scored.
Left out: a separate learning rate for each part; one served all parts within noise.
"""
import time

from tqdm import tqdm

from train_base import (SHARED_FLAGS, Interrupt, Log, Optimizer, Setup, evaluate, evaluate_with_baselines,
                        finish, freeze, held_out_loss, lr_scale, make_tokenizer, parse_flags, run, save, save_samples,
                        start, start_data, supervised, to_document, train_step)

STAGE = "sft"
# Short rows, small steps, many of them: what a tiny model lacks is updates, not tokens. A picture with two questions
# takes some 50 tokens. Longer conversations of your own want a longer --seq_len: a row's end cuts them off.
BY_MODEL = {"tiny": {"batch_size": 96, "seq_len": 64, "steps": 1200, "lr": 0.005, "eval_size": 400},
            "small": {"batch_size": 64, "seq_len": 1024, "steps": 4000, "lr": 0.002, "eval_size": 1000},
            "released": {"batch_size": 32, "seq_len": 2048, "steps": 1000, "lr": 2e-5, "eval_size": 1000}}
FLAGS = SHARED_FLAGS | {"eval_size": (None, "held-out questions per evaluation, of each set")}


def main() -> None:
    flags = parse_flags(__doc__, FLAGS, BY_MODEL)
    setup = Setup(flags)
    vlm, tokenizer, state, moments = start(flags, setup, STAGE, make_tokenizer(flags))
    # New: all learn. The decoder must: to answer, it has to look a thing up among the picture's tokens by what the
    # question calls it, and text has taught it nothing of that kind.
    params = freeze(vlm, ["bridge", "decoder", "vit"])
    # Fresh moments, even when the weights come from chapter 2: they speak of another loss.
    optimizer = Optimizer(params, flags.optimizer, flags.lr, moments)
    vlm.to(setup.dtype)
    step = state.get("step", 0)  # above 0 with --resume
    loaders, held = start_data(flags, setup, vlm, tokenizer, "chat", state)
    first = next(iter(held.values()))  # the world has two: new scenes, and pairs of colour and kind never trained on
    log, interrupt = Log(flags, setup, STAGE), Interrupt()
    setup.say(f"{sum(p.numel() for p in params.values()):,} parameters learn, {flags.batch_size} rows x "
              f"{flags.seq_len} tokens a step, {flags.steps} steps on "
              f"{setup.world} x {setup.device.type} in {setup.dtype}")

    vlm.train()
    started, bar = time.time(), tqdm(total=flags.steps, initial=step, disable=not setup.master, desc=STAGE, unit="step")
    while step < flags.steps and not interrupt.heard(setup):
        batches = [next(loader) for loader in loaders]
        # A row holds several conversations, each blind to the others; -100 keeps all but the answers out of the loss.
        loss = train_step(vlm, batches, supervised(batches, setup), optimizer, setup, lr_scale(step, flags))
        step += 1
        images = setup.sum(sum(len(batch["pixels"]) for batch in batches if batch["pixels"] is not None))
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", images=int(images))
        log.write(step=step, loss=loss, images=images, lr=flags.lr * lr_scale(step - 1, flags),
                  seconds=time.time() - started)
        # once in a while; kinds of questions are learned one after the other, and the total hides that
        if flags.eval_every > 0 and step % flags.eval_every == 0:
            result = evaluate(vlm, tokenizer, first, setup)
            kinds = ", ".join(f"{kind} {value:.0%}" for kind, value in result["by_kind"].items())
            setup.say(f"step {step}: held-out accuracy {result['accuracy']:.1%} ({kinds})")
        if flags.save_every > 0 and step % flags.save_every == 0:
            save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    bar.close()
    seconds = time.time() - started
    # Save before evaluating: an error there must not cost the run.
    folder = save(flags, setup, STAGE, vlm, tokenizer, optimizer, loaders, step)
    # New: accuracy beside its baselines. A number without the blind one proves nothing: "yes" alone is often right.
    results = evaluate_with_baselines(vlm, tokenizer, held, setup)
    # Long answers are never equal word by word; for them the loss with and without the picture tells more.
    render = to_document(tokenizer, vlm, flags.seq_len)
    documents = [doc for i, record in enumerate(first) if (doc := render(record, i))]
    for name, image in (("loss", "own"), ("blind_loss", "blank"), ("shuffled_loss", "shuffled")):
        nats, tokens = held_out_loss(vlm, documents, setup, flags.seq_len, image)
        results[next(iter(held))][name] = nats / max(tokens, 1)
    # Look at them: which mistakes it makes says more than their number.
    if setup.master:
        save_samples(folder / "samples.png", vlm, tokenizer, [r for records in held.values() for r in records[:8]][:16])
    # In one line for scripts: the first held-out set, and all of them under "held_out".
    main_result = next(iter(results.values()))
    finish(setup, log, stage=STAGE, step=step, accuracy=main_result["accuracy"],
           blind_accuracy=main_result["blind_accuracy"], ci95=main_result["ci95"], held_out=results, seconds=seconds,
           checkpoint=str(folder), interrupted=interrupt.wanted)


if __name__ == "__main__":
    run(main)
