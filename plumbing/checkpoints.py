"""
Folders of checkpoints: which there are, from which a stage starts, how one is saved all at once and resumed, how an
earlier run is set aside. Called at both ends of a chapter. A checkpoint holds plain tensors and JSON; nothing is ever
unpickled. A reader of the lessons may trust it unread.
"""
import copy
import json
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from plumbing.drawing import draw_curves
from plumbing.settings import FOLLOWS, KIND, differences, set_fields
from plumbing.files import read_json, recover, replace_folder, require
from plumbing.flags import MAY_CHANGE
from plumbing.weights import read_header, read_safetensors, write_safetensors

STAGES = ["base", "align", "sft", "rl"]  # each starts from the one before
SCRATCH = "scratch"  # --init=scratch: from no checkpoint


def run_name(model: str) -> str:
    "The folder under --out_dir: a preset's name, or the last part of a hub id or path. Org/Name@revision -> Name"
    return Path(model.split("@")[0]).name


def stage_folder(flags, stage: str) -> Path:
    return Path(flags.out_dir, run_name(flags.model), stage)


def checkpoints(out_dir, model: str) -> list[tuple[Path, dict]]:
    "All under OUT_DIR/MODEL -> [(folder, the run that made it)], last written first. STAGE.1: the run before STAGE."
    found = []
    for path in Path(out_dir, run_name(model)).glob("*/config.json"):
        # .old counts too: after an interrupted save it is the only one, and load_checkpoint puts it back in place
        if name := re.fullmatch(r"((\w+)(\.\d+)?)(\.old)?", path.parent.name):
            # A copied folder has new file times, so the run's own clock counts; older checkpoints do not have it.
            run = {"saved": path.stat().st_mtime, **read_json(path).get("run", {}), "stage": name[2]}
            found += [(path.parent.with_name(name[1]), run)] if name[2] in STAGES else []
    return sorted(found, key=lambda one: -one[1]["saved"])


def newest_checkpoint(out_dir, model: str) -> Path | None:
    return next((folder for folder, _ in checkpoints(out_dir, model)), None)


def has_world(spec: str) -> bool:
    "Whether the built-in world is among --data."
    return any(part.split(":")[0].strip() == "world" for part in spec.split(","))


def find_start(flags, stage: str, own_words: bool = False) -> tuple[Path | None, str]:
    """
    -> (the checkpoint from which a new run of the stage starts, why this one); None: there is no earlier stage.
    own_words: the model's tokenizer knows what it was trained on. Then models of the world do not count for one's own
    data, nor those for the world, nor what this stage made of other files.
    """
    if flags.init:
        return (None, f" (--init={SCRATCH})") if flags.init == SCRATCH else (Path(flags.init), "")
    found, before = checkpoints(flags.out_dir, flags.model), STAGES[:STAGES.index(stage)]
    newest, world, why = next((folder for folder, _ in found), None), has_world(flags.data), ""
    if own_words:
        found = [(folder, run) for folder, run in found if has_world(run.get("data", "world")) == world
                 and (world or run["stage"] in before or run["data"] == flags.data)]
        why = f", since {newest} has learned other words (--init={newest} starts from it)" if newest else ""
    earlier = [folder for name in reversed(before) for folder, run in found if run["stage"] == name]
    last = next((run for _, run in found if run["stage"] == stage), {})
    if last.get("data", flags.data) == flags.data:  # no other data. A fine-tuning that is repeated starts where it did.
        again = [folder for folder, run in found if run["stage"] not in before and run["saved"] == last.get("start")]
        if again:
            return again[0], (", where the last run on these data started (--init= chooses another; "
                              f"--init={SCRATCH}: none)")
        start = next(iter(earlier), None)
        return start, ", the newest earlier stage" if start else why
    # On other data, their own, people expect to go on with what the model has learned so far.
    finished = [folder for folder, run in found if run.get("step") == run.get("steps")]
    return next(iter(finished + earlier), None), (f", the newest finished model, since the last run had other data: "
                                                  f"{last['data']} (--init= chooses another; --init={SCRATCH}: none)")


def check_asked(flags, source, config, today=None) -> str:
    """
    Flags that ask for another model than the one that was loaded are errors -> in what its configuration is not that
    of today's code, in words. today: the latter; None: there is none to compare with.
    """
    thin = 0 if str(source).startswith("random weights") else flags.lora_rank  # beside frozen noise: of no use
    for name, asked, found in (("model", run_name(flags.model), config.preset),
                               ("vision", flags.vision, config.pretrained_vision),
                               ("bridge", flags.bridge, config.bridge.kind),
                               ("lora_rank", flags.lora_rank, config.lora_rank or thin)):
        require(asked in ("", 0, found), f"--{name}={asked}, but {source} has --{name}={found}: "
                f"give that, or start from another model by --init= (--init={SCRATCH}: none) or --out_dir=")
    set_fields(asked := copy.deepcopy(config), flags.set)
    for name, (found, value) in differences([asdict(config), asdict(asked)]).items():
        raise ValueError(f"--set={name}={value}, but {source} has {name}={found}, and weights of that shape: start "
                         f"without them by --init={SCRATCH}, or from another checkpoint by --init= or --out_dir=")
    told = [f"{name} is {found} there and {value} in today's PRESETS" for name, (found, value) in differences(
        [asdict(config), asdict(today)]).items() if name.split(".")[0] in ("vision", "bridge", "decoder")
        and not (config.pretrained_vision and name.startswith("vision.")) and (name not in FOLLOWS or name == KIND)
    ] if today else []
    return f"{source}: {'; '.join(told)}. The checkpoint counts; --init={SCRATCH} takes today's, with random weights" \
        if told else ""


def read_resume(folder: Path) -> tuple[dict, dict]:
    "A checkpoint's training state -> (state.json, optimizer tensors). Stopped and resumed must equal never stopped."
    state = read_json(folder / "state.json")
    moments = read_safetensors(folder / "optimizer.safetensors")
    # A save stamps its files with the step: files copied together from two saves are noticed.
    steps = {read_header(folder / f)[1].get("step") for f in ("model.safetensors", "optimizer.safetensors")}
    require("step" in state and steps == {str(state["step"])},
            f"{folder}: weights, optimizer and state are of different steps; start again without --resume")
    return state, moments


def take_flags_of_run(flags, stage: str, given: set[str]) -> None:
    "--resume: flags that are not given become those of the run; those that say what is computed must be the same."
    folder = recover(stage_folder(flags, stage))
    require((folder / "state.json").exists(), f"--resume: there is no checkpoint to resume in {folder}; an earlier run "
            f"({folder}.1) is resumed under that name: move it there")
    for name, value in read_json(folder / "state.json").get("flags", {}).items():
        if name not in given | {"resume"}:
            setattr(flags, name, value)
        # With another --steps, say, the schedule would jump half-way.
        require(name in MAY_CHANGE or getattr(flags, name) == value, f"--resume with --{name}={getattr(flags, name)}, "
                f"but the run was started with {value}; give --{name}={value}, or start anew without --resume")


def set_aside(folder: Path, keep: int) -> bool:
    "Before a new run: the stage's folder becomes STAGE.1, that of the run before STAGE.2, and so on -> whether it did."
    folder = recover(folder)
    if not (folder / "config.json").exists():  # a run that never saved: at most its log
        shutil.rmtree(folder, ignore_errors=True)
        return False
    names = [folder, *(folder.with_name(f"{folder.name}.{i}") for i in range(1, keep + 1))]
    free = next((i for i, name in enumerate(names) if not name.exists()), keep)
    shutil.rmtree(names[free], ignore_errors=True)  # the oldest, if all names are taken
    for i in range(free, 0, -1):
        os.rename(names[i - 1], names[i])
    return True


def claim(folder: Path):
    "For one run at a time: two would mix their logs, and the later save would replace the other's -> a locked file."
    if os.name == "posix":  # there is no fcntl on Windows
        import fcntl
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f".{folder.name}.lock"), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed or the process ends
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir=") from None
        except OSError:  # a network folder that knows no locks
            pass
        return file


def save_checkpoint(folder, vlm, tokenizer, moments: dict | None = None, state: dict | None = None,
                    master_weights: dict | None = None) -> None:
    """
    config.json, model.safetensors and the tokenizer; for --resume optimizer.safetensors and state.json. Tensors and
    JSON only: nothing is ever unpickled. All or nothing: a crash at any moment leaves a whole checkpoint.
    """
    tensors = dict(vlm.named_parameters()) | (master_weights or {})
    for name, tensor in tensors.items():
        require(tensor.isfinite().all(), f"{folder}: not saved, because {name} holds NaN or Inf; a checkpoint that is "
                "there stays as it was. Start again with a lower --lr")
    # log.jsonl and samples.png of the old folder are carried over; an old optimizer beside new weights must not be.
    with replace_folder(folder, drop=("optimizer.safetensors", "state.json")) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "ghostvis", **asdict(vlm.config)}, indent=2) + "\n")
        tokenizer.save(new)  # with the weights: another tokenizer's ids would mean other words
        stamp = {"step": str((state or {}).get("step", 0))}  # proves that all files belong to one moment
        write_safetensors(tensors, new / "model.safetensors", {"format": "pt", **stamp})
        if moments is not None:
            write_safetensors(moments, new / "optimizer.safetensors", stamp)
            (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def save(flags, setup, stage: str, vlm, tokenizer, optimizer, loaders: list, step: int,
         **more) -> Path:
    "The stage's checkpoint, with all that --resume needs -> its folder. `more` goes into state.json."
    folder = stage_folder(flags, stage)
    vlm.config.run |= {"step": step, "saved": time.time()}
    # Weights alone are not the run: without optimizer state the first steps are poor, without positions in the data
    # records are used twice. TRAP: all ranks must call save(), though one writes: each has only its own part.
    positions = setup.gather([loader.state() for loader in loaders])  # a handful of integers each
    moments, master_weights = optimizer.state()
    if setup.is_main:
        kept = {name: value for name, value in vars(flags).items()
                if name not in ("init", "out_dir", "resume", "micro_batch_size", "given")}  # these are found anew
        state = {"step": step, "data": positions, "flags": kept, **more}
        try:
            # resolve: a link to a folder on a larger disk stays one; the folder that it names is replaced.
            save_checkpoint(folder.resolve(), vlm, tokenizer, moments, state, master_weights)
            draw_curves(folder / "log.jsonl")
        except OSError as error:  # a full disk, a network folder that is gone; Python does not name the file
            raise ValueError(f"{folder}: step {step} could not be saved ({error}); make room and " + (
                "continue what was saved before by --resume; it is whole" if (folder / "state.json").exists() else
                "start again; nothing was saved before")) from None
    return folder
