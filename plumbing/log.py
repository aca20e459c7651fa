"""
A run's log.jsonl, what Ctrl-C and SIGTERM do (a flag is set; the loop finishes its step, saves and stops), and the
run's last line. Called by the training loop of each chapter. A reader of the lessons may trust it unread.
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoints import claim, set_aside, stage_folder
from plumbing.drawing import draw_curves
from plumbing.ranks import Setup


class Log:
    "One JSON object per line, in log.jsonl beside the checkpoint; each run has its own."

    def __init__(self, flags, setup: Setup, stage: str):
        self.path, self.is_main, self.usual = stage_folder(flags, stage) / "log.jsonl", setup.is_main, None
        self.lock = claim(self.path.parent) if setup.is_main else None
        if setup.is_main and flags.resume and self.path.exists():  # a full disk or a crash may have cut its last line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.keep, self.wandb = 0 if flags.resume else flags.keep, None
        if flags.wandb and setup.is_main:
            try:
                import wandb
            except ImportError:
                raise ValueError(f"--wandb={flags.wandb}: the package is not there; pip install wandb") from None
            self.wandb = wandb.init(project=flags.wandb, name=f"{flags.model}-{stage}", config=vars(flags))
        # The first line says what was run, and on what: months later nothing else tells two curves apart. A resumed run
        # adds its own. A downloaded archive has no .git, and so no commit to name.
        here = Path(__file__).parents[1]
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=here).stdout.strip() if (here / ".git").exists() else ""
        self.waiting = [dict(
            command=" ".join(sys.argv), flags=vars(flags), device=str(setup.device), world_size=setup.world_size,
            dtype=str(setup.dtype), torch=torch.__version__, python=sys.version.split()[0], commit=git,
            time=time.strftime("%Y-%m-%d %H:%M:%S"))]

    def write(self, **values) -> None:
        loss = values.get("loss")
        if loss is not None and math.isfinite(loss):
            values |= {"spike": True} if self.usual and loss > 2 * self.usual else {}
            self.usual = loss if self.usual is None else 0.9 * self.usual + 0.1 * loss  # a mean of some 10 steps
        elif loss is not None:  # a skipped step; JSON has no NaN
            values["loss"] = None
        if not self.is_main:
            return
        # Only now, after a whole step: a run that fails at once leaves the run before it as it was.
        if self.keep and set_aside(self.path.parent, self.keep):
            tqdm.write(f"{self.path.parent} of the run before is now {self.path.parent}.1 (--keep={self.keep})",
                       file=sys.stderr)
        # TRAP: opened again for each line. A save puts a new folder in the old one's place: an open file would write
        # into the deleted one.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in [*self.waiting, values]))
        self.keep, self.waiting = 0, []
        if "lr" not in values:  # an evaluation or the run's result, not one of its many steps
            draw_curves(self.path)
        if self.wandb:
            self.wandb.log(values)


class Interrupt:
    "Ctrl-C, SIGTERM (a machine that is taken back) or SIGHUP: finish the step, save, stop. Ctrl-C again: stop at once."

    def __init__(self):
        self.interrupted, self.first, self.steps = False, 0.0, 0
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.old = {number: signal.signal(number, self.handle) for number in signals
                    if signal.getsignal(number) != signal.SIG_IGN}  # as nohup wishes

    def handle(self, number, _):
        # Only a flag for the loop: raising here could stop a step half-way, with some weights updated.
        if not self.interrupted:
            self.interrupted, self.first = True, time.time()
            print("\nstopping: finishing this step and saving (Ctrl-C again: at once)", file=sys.stderr, flush=True)
        # TRAP: the terminal and torchrun both pass a Ctrl-C on: the second within a second is the same one.
        elif number == signal.SIGINT and time.time() - self.first > 1:
            raise KeyboardInterrupt

    def requested(self, setup: Setup) -> bool:
        "To be called before each step."
        # Also if a loader cannot go on, for too many bad records, say: the steps that are done must not be lost.
        failures = [setup.failure, *(loader.failure() for loader in setup.loaders)]
        setup.failure = next(filter(None, failures), None)
        # On any rank, and then on all: one that stopped alone would leave the others waiting for its gradients.
        self.interrupted = setup.all_reduce(float(self.interrupted or setup.failure is not None)) > 0
        if self.interrupted and not self.steps:  # nothing was learned yet, so an earlier run's checkpoint stays
            raise setup.failure or KeyboardInterrupt
        self.steps += 1
        return self.interrupted

    def close(self) -> None:
        "After the loop signals have their usual meaning again: there is nothing left to save."
        for number, handler in self.old.items():
            signal.signal(number, handler)


def finish(setup: Setup, log: Log, **results) -> None:
    "The run's last line: one JSON object on standard output; or the error for which it stopped, now that it is saved."
    if setup.device.type == "cuda":
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    log.write(**results)
    if log.lock:
        log.lock.close()  # the next run may write here
    if setup.failure:
        raise setup.failure
    if setup.is_main:  # the only print to standard output: `python train_sft.py | tail -1` is ready for a script
        print(json.dumps(results))
