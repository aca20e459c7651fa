"""
Flags: --name=value with types, ranges and "did you mean"; how a script's main() is run; the device's name. Called at
the top and the bottom of every script. A reader of the lessons need not know how argparse is used.
"""
import argparse
import difflib
import io
import mimetypes
import os
import sys

from plumbing.files import require  # first: it says in one line that Ctrl-C came while PyTorch was imported

import torch
from tqdm import tqdm

# Of all four chapters, after --model and --vision (train_base.py). name: (default, meaning); None: a default that
# depends on the model, from the stage's BY_MODEL.
RUN_FLAGS = {
    "bridge": ("", "perceiver, pixelshuffle or mlp, in place of the preset's; only with mlp can the trained model be "
                   "exported for other engines (sample.py --export)"),
    "set": ("", "fields of the preset's configuration, --set=bridge.num_latents=16,decoder.num_hidden_layers=6"),
    "tiles": (int, "cut a picture larger than the encoder's square into so many squares at most, beside the whole in "
                   "small: small print becomes legible, and each square takes as many tokens; not given: as the model "
                   "was trained, llava-ov 36, others 0"),
    "init": ("", "checkpoint folder to start from; scratch: none, so random or released weights; empty: the newest "
                 "earlier stage under --out_dir, else as scratch"),
    "out_dir": ("out", "checkpoints go to OUT_DIR/MODEL/STAGE"),
    "data": ("world", "world, or files (see data.py), comma-separated, each with an optional :weight"),
    "val": ("", "file of held-out records; empty: a part of --data is held out, by picture"),
    # One step. Out of memory? Then the last two of this group: bench.py --what=memory tells what they save.
    "batch_size": (None, "packed rows per optimizer step, over all GPUs"),
    "micro_batch_size": (0, "rows per forward pass; 0: on a GPU as many as fit (tried out at the start), else all"),
    "seq_len": (None, "tokens per packed row"),
    "activation_checkpointing": (False, "store less for the backward pass and compute it twice: a fifth slower"),
    "lora_rank": (0, "above 0: train only thin matrices of this rank beside the decoder's frozen ones; give an --lr "
                     "about ten times as large"),
    "float8": (False, "the decoder's products in 8 bits while training: a sixth faster, on Hopper GPUs and later"),
    # How far each step goes, and how many there are. A poor result needs more --steps first, then another --lr.
    "lr": (None, "peak learning rate"),
    "lr_bridge": (-1.0, "that of the bridge; 0: frozen; -1: --lr"),
    "lr_vit": (-1.0, "that of the ViT; 0: frozen; -1: --lr, and 0 for released weights"),
    "steps": (None, "optimizer steps"),
    # Released weights were trained by AdamW, whose steps are small in every entry; Muon's are large in some directions.
    "optimizer": ("auto", "muon (matrices; AdamW for the rest), adamw, or auto: muon from scratch, else adamw"),
    "warmup": (0.02, "share of the steps in which the learning rate rises from 0"),  # a share suits any --steps
    "cooldown": (0.8, "share of the steps in which it falls to 0 at the end"),
    # Where it runs. auto is right for all but experiments.
    "device": ("auto", "auto, cpu, cuda or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16; auto is bfloat16 on cuda, float32 elsewhere"),
    "compile": ("auto", "torch.compile the transformer blocks: auto (on cuda), True or False"),  # three values: text
    "seed": (0, "of weights, data order and sampling"),
    # Stopping, saving, evaluating. An evaluation costs as much as several steps.
    "resume": (False, "continue the stage's last run, with that run's flags"),
    "eval_every": (-1, "steps between evaluations; -1: only at the end"),
    "eval_on_stop": (False, "evaluate also after Ctrl-C, not only at the end"),
    "save_every": (-1, "steps between checkpoints; -1: only at the end and on Ctrl-C"),
    "wandb": ("", "project on wandb.ai that gets what log.jsonl gets; empty: nothing is sent"),
    "keep": (3, "earlier runs of the stage that are kept, as STAGE.1 (the one before), STAGE.2, ..."),
    "max_bad_steps": (10, "stop after so many steps in a row whose loss or gradient is not a finite number"),
    "workers": (-1, "processes that open pictures, on each GPU; 0: a thread does it; -1: up to 8 on a GPU, else 0"),
    "max_bad": (0.01, "share of broken records that is left out, and named; more end the run"),
    # 600 questions: the 95 % interval around one half reaches 4 points to each side. Half of that takes 2,400.
    "eval_size": (600, "held-out questions (or texts) per evaluation"),
}

# These may change on --resume: they say where and how, not what is computed (dtype and device up to rounding).
# micro_batch_size too, as long as a step has the same number of micro-batches: make_loaders checks that.
MAY_CHANGE = ("init", "out_dir", "micro_batch_size", "activation_checkpointing", "device", "dtype", "compile", "resume",
              "eval_every", "eval_on_stop", "save_every", "keep", "max_bad_steps", "wandb", "workers", "max_bad")

POSITIVE = ("batch_size", "seq_len", "steps", "lr", "eval_size", "samples", "max_new_tokens", "gpus", "keep",
            "max_bad_steps", "max_requests", "image_tokens")

NOT_NEGATIVE = ("max_bad", "micro_batch_size", "lora_rank", "temperature", "warmup", "cooldown", "top_k", "rehearse",
                "tiles")


class Parser(argparse.ArgumentParser):
    flags = {}

    def error(self, message: str):
        "One line, with a suggestion. argparse's own error() prints all flags first, which hides what is wrong."
        for word in message.split():
            # "--bach_size=4" -> "bach_size" -> near "batch_size"; a known flag is in the message already
            near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), self.flags, n=1)
            if word.startswith("--") and near and near[0] not in message:
                message += f"; did you mean --{near[0]}?"
        left = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and not any(word.startswith("-") for word in left):
            message += self.remedy(left[0])
        self.exit(2, f"error: {message} (--help lists all flags)\n")


    def remedy(self, word: str) -> str:
        "For a word without a flag in front of it: cat.jpg, lr=0.1, my.json."
        near = difflib.get_close_matches(word.split("=")[0], self.flags, n=1)
        if "=" in word and near:
            return f"; did you mean --{near[0]}={word.partition('=')[2]}?"
        picture = (mimetypes.guess_type(word)[0] or "").startswith("image/")
        for fits, flag in ((picture, "image"), (os.path.isdir(word), "images"), (os.path.exists(word), "data")):
            if fits and flag in self.flags:
                return f"; did you mean --{flag}{'=' if flag == 'data' else ' '}{word}?"
        return "; a text of several words goes into quotes"


def boolean(text: str) -> bool:
    # TRAP: type=bool would call bool("False"), which is True, as for every text but the empty one.
    if text not in ("True", "False", "true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text in ("True", "true", "1")


def given(argv=None) -> set[str]:
    "The names of the flags on the command line; all others have their defaults."
    return {text[2:].split("=")[0] for text in (sys.argv[1:] if argv is None else argv) if text.startswith("--")}


def parse_flags(doc: str, flags: dict, by_model: dict[str, dict] = {}, argv=None) -> argparse.Namespace:
    """
    --name=value for every entry of flags, {name: (default, meaning)}. None: the model's default, from by_model. A type
    (float) or [] (may be given several times) as default: not given.
    """
    # allow_abbrev would accept --seq for --seq_len, until a new flag that begins alike makes it an error.
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.flags = flags
    for name, (default, meaning) in flags.items():
        # The type of the default is the flag's type. TRAP: write 1.0 where fractions are allowed; 1 would refuse 0.5.
        kind = default if isinstance(default, type) else str if default == [] else \
            type(default if default is not None else by_model["tiny"][name])
        shown = ", ".join(f"{m} {d[name]}" for m, d in by_model.items()) if default is None else \
            "not given" if kind is default or default == [] else default
        # nargs "?" with const: --resume alone means --resume=True
        extra = {"type": boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        extra |= {"action": "append"} if default == [] else {}
        parser.add_argument(f"--{name}", default=None if kind is default else default, metavar=kind.__name__.upper(),
                            help=f"{meaning} [{shown}]".replace("%", "%%"), **extra)
    out = parser.parse_args(argv)
    # None: not given. Only now is the model known, and with it the default. All released models share theirs.
    for name, default in (by_model and by_model.get(out.model, by_model["released"])).items():
        if getattr(out, name) is None:
            setattr(out, name, default)
    # Ranges, which argparse does not know. Flags that a script does not have pass.
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(out, name, None)
        if value is not None and (value < 0 or value == 0 and name in POSITIVE):
            raise ValueError(f"--{name}={value}: must {'be above' if name in POSITIVE else 'not be below'} 0")
    tiles = getattr(out, "tiles", None) or 0
    require(tiles <= 36, f"--tiles={tiles}: 36 at most, a grid of 6 x 6")
    compiled = getattr(out, "compile", "auto")
    require(compiled in ("auto", "True", "False"), f"--compile={compiled}: choose auto, True or False")
    return out


def run(main) -> None:
    "Run a script's main(): bad input ends in one line on standard error and exit code 1."
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a pipe on Windows cannot take every letter
    try:
        main()
    # Only these two: a wrong value or file is for the user to correct. Any other exception is our mistake, and its
    # traceback shows where.
    except (ValueError, OSError) as error:
        if os.environ.get("GHOSTVIS_DEBUG"):  # =1: the traceback all the same
            raise
        for bar in list(tqdm._instances):
            bar.close()  # else the message would be printed on the progress bar's line
        sys.exit(f"error: {error}")
    finally:
        if torch.distributed.is_initialized():  # else PyTorch warns of connections left open
            torch.distributed.destroy_process_group()


def pick_device(name: str) -> str:
    "auto, cpu, cuda or mps -> cpu, cuda or mps."
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    require(name in available, f"--device={name}: choose auto, cpu, cuda or mps")
    # an error, because on the CPU instead the run could take days
    require(available[name], f"--device={name}: PyTorch sees no {'Apple ' * (name == 'mps')}GPU here; use --device=cpu")
    return name
