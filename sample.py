"""
Ask a trained model about pictures.

    python sample.py --image cat.jpg                                  # describe it
    python sample.py --image cat.jpg --question "What colour is the cat?"
    python sample.py --chat                                           # a conversation; /image PATH shows a picture
    python sample.py --images holiday/ --out answers.jsonl            # a whole folder, one JSON line per picture
    python sample.py --model=llava-ov-0.5b --image photo.jpg          # a finished public model, downloaded once
    python sample.py --model=qwen2.5-0.5b-instruct --chat             # a language model without eyes
    python sample.py --export=my_llava                                # the model as a Hugging Face folder, for serving

Standard output holds the answer alone, so that it can be piped; everything else goes to standard error. The checkpoint
is --init, or the latest stage of --model under --out_dir, or --model's released weights; without --model the tiny one,
or, before that is trained, llava-ov-0.5b. The prompt is made by the same `render` as in training: a chat that looks
even slightly different from what a model was trained on is the most common reason for bad answers.
"""
import argparse
import difflib
import json
import sys
from pathlib import Path

import torch

# No train_base.py: asking must not load the training code. Hence this file's own flags and choice of device.
import data
from model import PRESETS, VLM, check_name, export, load_checkpoint, load_pretrained, newest_checkpoint, respond
from tokenizer import Tokenizer
from vision import cut_tiles, load_image, preprocess

# A folder often holds other files too. They are told by their names: opening each one would take long.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

TRAIN = "train one by `python train_align.py` and then `python train_sft.py`, a quarter of an hour on two CPU cores"


def did_you_mean(message: str, names) -> str:
    for word in message.split():
        # "--imge=cat.jpg" -> "imge" -> near "image". Only words with dashes can be meant as flags.
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), names, n=1) if word.startswith("--") else []
        if near and near[0] not in message:  # else the message is about a known flag's value
            return f"; did you mean --{near[0]}?"
    return ""


def parse_flags(argv=None) -> argparse.Namespace:
    # allow_abbrev would take --temp for --temperature, until a new flag that begins alike makes it an error.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--image", action="append", default=[], help="picture to ask about; may be given several times")
    add("--images", default="", help="folder of pictures: ask about each, answers go to --out")
    add("--question", default="Describe the picture.", help="[%(default)s]")
    add("--chat", action="store_true", help="talk on the terminal")
    add("--out", default="answers.jsonl",
        help="with --images; pictures that it already answers are skipped [%(default)s]")
    add("--init", default="", help="checkpoint folder [the latest stage under OUT_DIR/MODEL]")
    add("--model", default="", help=f"{', '.join(PRESETS)}, or a hub id, Org/Name [tiny, or llava-ov-0.5b]")
    add("--out_dir", default="out", help="where the stages keep their checkpoints [%(default)s]")
    add("--anyres", default="auto", choices=["auto", "True", "False"],
        help="cut a large picture into tiles: ten times the tokens, and small print becomes legible; only models like "
             "llava-ov-0.5b can; auto: on a GPU [%(default)s]")
    add("--max_new_tokens", type=int, default=256, help="[%(default)s]")
    # No numbers here: each released model has its publisher's (generation_config.json), ours are greedy.
    add("--temperature", type=float, help="0: always the likeliest token [the model's own, else 0]")
    add("--top_k", type=int, help="sample among the k likeliest tokens; 0: all [the model's own, else 0]")
    add("--top_p", type=float, help="sample among the fewest tokens that hold this share [the model's own, else 1]")
    add("--repetition_penalty", type=float,
        help="above 1: words already used become less likely [the model's own, else 1]")
    add("--seed", type=int, default=0, help="of sampling [%(default)s]")
    add("--batch_size", type=int, default=16, help="pictures at once, with --images [%(default)s]")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--export", default="",
        help="write the model into this new folder, in Hugging Face's form and bfloat16; no question is asked")
    add("--decoder_only", action="store_true", help="with --export: the language model alone, as a Qwen2")
    # Exit codes: 2 for a flag that does not exist or does not parse (argparse's custom), 1 for any other bad input.
    parser.error = lambda message: parser.exit(
        2, f"error: {message}{did_you_mean(message, vars(parser.parse_args([])))} (--help lists all flags)\n")
    flags = parser.parse_args(argv)
    if flags.model:
        check_name(flags.model)
    # argparse knows types, not ranges. Checked before the model is loaded: a slip should not cost that wait.
    top_p, penalty = (1 if x is None else x for x in (flags.top_p, flags.repetition_penalty))
    if not 0 < top_p <= 1 or min(flags.temperature or 0, flags.top_k or 0) < 0 or penalty <= 0 \
            or min(flags.max_new_tokens, flags.batch_size) < 1:
        raise ValueError("--top_p must be in 0 to 1, --temperature and --top_k from 0, --repetition_penalty above 0, "
                         "--max_new_tokens and --batch_size from 1")
    return flags


def load(flags) -> tuple[VLM, Tokenizer]:
    device = flags.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device={device}: choose auto, cpu, cuda or mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: PyTorch sees no GPU here; use --device=cpu")
    # Half the bytes, and answers are as fast as weights can be read. Not on CPUs: most are far slower in bfloat16.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    folder = flags.init or newest_checkpoint(flags.out_dir, flags.model or "tiny")
    if folder:
        vlm = load_checkpoint(folder, device, dtype)
    elif flags.model in ("tiny", "small"):  # training would begin with random weights; asking them gives noise
        raise ValueError(f"no trained model under {flags.out_dir}/{flags.model}; {TRAIN}, or name a checkpoint folder "
                         "by --init=")
    else:
        try:
            # blind: a bridge that nobody has trained would tell the decoder noise about the picture.
            vlm, folder = load_pretrained(flags.model or "llava-ov-0.5b", device=device, dtype=dtype, blind=True)
        except (ValueError, OSError) as error:
            if flags.model:
                raise
            raise ValueError(f"no trained model under {flags.out_dir}/tiny; {TRAIN}. A public model could not be had "
                             f"either: {error}") from None
    # The tokenizer lies with the weights: with another one's ids the same weights would write noise.
    tokenizer = Tokenizer.from_pretrained(folder)
    # Which of several stages answers is easily mistaken, so it is said. Not on standard output: that is the answer's.
    print(f"({folder}, {device})", file=sys.stderr)
    return vlm.eval(), tokenizer


def options(vlm: VLM, flags) -> dict:
    # What is given; else the publisher's; else generate's own defaults, greedy as in the evaluation: what you see is
    # what was measured.
    given = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
             if getattr(flags, name) is not None}
    return {"max_new_tokens": flags.max_new_tokens, **vlm.config.generation, **given}


def to_pixels(vlm: VLM, path, flags, alone: bool = True):
    "-> uint8 [3, S, S], or Tiles. alone: the conversation has no other picture."
    if vlm.vit is None:
        raise ValueError(f"{vlm.config.preset} cannot see: it is a language model, and its bridge is not trained; run "
                         f"`python train_align.py --model={vlm.config.preset}` and train_sft.py, or ask llava-ov-0.5b")
    # Size and filter belong to the checkpoint: pixels made in another way look strange to its ViT.
    config, image = vlm.config.vision, load_image(path)
    anyres = flags.anyres == "True" or (flags.anyres == "auto" and vlm.gpt.embed.weight.is_cuda)
    if anyres and alone and vlm.config.bridge.newline:  # LLaVA-OneVision has learned tiles of single pictures only
        return cut_tiles(image, config.image_size, config.bicubic)
    return preprocess(image, config.image_size, config.bicubic, config.pad)


def user_message(question: str, images: int) -> dict:
    # Content may be a string, in which "<image>" marks a picture's place, or a list of parts. We use parts: what a user
    # types then stays text, even if it contains "<image>", and the places always match the pictures.
    # Pictures, a newline, the question: the order that the training data has. Without a picture, no newline.
    return {"role": "user",
            "content": [{"type": "image"}] * images + [{"type": "text", "text": "\n" * bool(images) + question}]}


def stream(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, flags) -> str:
    "Print the answer as it comes, and return it."
    # In a chat the whole conversation is read again for each answer: simple, but every turn waits a little longer.
    prompt = tokenizer.render(messages, image_tokens=[vlm.num_tokens(p) for p in pixels], add_generation_prompt=True)
    ids, shown = [], ""
    # One row, so each step yields one id. The last may be a stop token; decode leaves special tokens out. vocab_used:
    # the embedding may have more rows than there are words.
    for (token,) in vlm.generate([prompt], pixels, stop=set(tokenizer.stop_ids), vocab_used=tokenizer.vocab_size,
                                 seeds=[flags.seed], **options(vlm, flags)):
        ids.append(token)
        text = tokenizer.decode(ids)  # all of them: a single token may be a part of a character, and no text by itself
        # U+FFFD at the end is the begun character (an emoji has 4 bytes, often in several tokens). A terminal cannot
        # take it back, so it is held until the next tokens complete it.
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)  # without flush, a pipe shows nothing before the end
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown):])  # what is left of a character that the answer broke off
    return text


def chat(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    # Only answers go to standard output, so `--chat < questions.txt > answers.txt` works.
    print("Type a question. /image PATH shows a picture, /reset starts over, /quit ends.", file=sys.stderr)
    # pixels: all pictures of the conversation so far. waiting: those shown since the last question, which go before the
    # next one.
    messages, pixels, waiting = [], [], [to_pixels(vlm, path, flags, alone=False) for path in flags.image]
    while True:
        # Not input("> "): it would write its prompt to standard output.
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()  # "" only at the end of input (Ctrl-D); an empty line is "\n"
        if not line or line.strip() == "/quit":
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/image":
            try:
                waiting.append(to_pixels(vlm, rest.strip(), flags, alone=False))
                print("(picture loaded; ask about it)", file=sys.stderr)
            except ValueError as error:  # a mistyped path should not cost the conversation so far
                print(f"error: {error}", file=sys.stderr)
        elif command == "/reset":
            messages, pixels, waiting = [], [], []
        elif command:  # anything else is a question, an unknown /word too
            messages.append(user_message(line.strip(), len(waiting)))
            pixels, waiting = pixels + waiting, []
            answer = stream(vlm, tokenizer, messages, pixels, flags)
            # The answer as parts too: a model may write "<image>" as well.
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def folder(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Every picture of a folder -> one line of --out: a JSON object with its answer, or with the error if it is broken."
    root, out = Path(flags.images), Path(flags.out)
    if not root.is_dir():
        raise ValueError(f"--images={root}: no such folder")
    # A large folder takes hours. A run that was stopped goes on: what --out answers already is skipped. The question is
    # part of the key, as another question is other work. Lines with an error do not count: those are tried again.
    done = set()
    if out.exists():
        # A line cut off by a crash is an error that names the file. Going on behind it would spoil the next line too.
        with data.naming(out):
            done = {(row["image"], row["question"])
                    for row in map(json.loads, out.read_text(encoding="utf-8").splitlines()) if "answer" in row}
    # Relative to the folder: it may be moved, and a.png in two subfolders stays two pictures. Sorted: the file system's
    # order differs from machine to machine.
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"--images={root}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names, failed = [name for name in names if (name, flags.question) not in done], 0
    # Append, never rewrite: nothing that goes wrong later can harm the answers that are there.
    with open(out, "a", encoding="utf-8") as file:
        for at in range(0, len(names), flags.batch_size):
            rows = []
            for name in names[at:at + flags.batch_size]:
                try:
                    rows.append((name, to_pixels(vlm, root / name, flags)))
                except ValueError as error:
                    # One broken file among thousands must not end the run; its line says what is wrong with it.
                    failed += 1
                    print(f"error: {error}", file=sys.stderr)
                    file.write(json.dumps({"image": name, "question": flags.question, "error": str(error)}) + "\n")
            # A seed for each row, the same for all: an answer depends neither on the batch size nor on which pictures
            # share the batch, so a run that was stopped gives the same answers as one that was not. Where all pictures
            # of a batch are broken there is no row, and generate cannot take none.
            said = respond(vlm, tokenizer, [[user_message(flags.question, 1)]] * len(rows),
                           [[pixels] for _, pixels in rows], seeds=[flags.seed] * len(rows),
                           **options(vlm, flags)) if rows else []
            # ensure_ascii=False: answers in any script stay readable in the file.
            for (name, _), answer in zip(rows, said):
                file.write(json.dumps({"image": name, "question": flags.question, "answer": answer},
                                      ensure_ascii=False) + "\n")
            file.flush()  # a crash loses one batch at most
            print(f"{min(at + flags.batch_size, len(names))} of {len(names)} pictures", file=sys.stderr)
    # At the end, when all others are answered: exit code 1 tells a script that some are missing.
    if failed:
        raise ValueError(f"{failed} of {len(names)} pictures could not be read; {out} says which")


def main() -> None:
    flags = parse_flags()
    for path in flags.image:  # before the model: a slip in a path should not wait for gigabytes
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such image file")
    vlm, tokenizer = load(flags)
    if flags.export:
        export(flags.export, vlm, tokenizer, flags.decoder_only)
        print(f"wrote {flags.export}", file=sys.stderr)
    elif flags.images:
        folder(vlm, tokenizer, flags)
    elif flags.chat:
        chat(vlm, tokenizer, flags)
    else:  # several --image: all of them before the one question, in the order given
        stream(vlm, tokenizer, [user_message(flags.question, len(flags.image))],
               [to_pixels(vlm, path, flags, alone=len(flags.image) == 1) for path in flags.image], flags)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")  # a text goes to standard error, and the exit code is 1
    except KeyboardInterrupt:
        sys.exit(130)  # the shells' number for Ctrl-C: 128 + SIGINT (2)
