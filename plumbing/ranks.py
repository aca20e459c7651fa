"""
Where a process runs: its device, its number type, and its rank among the processes that torchrun started. Called as
`setup = Setup(flags)` at the top of every chapter. With one process there is nothing to share, and
a reader of the lessons may pass over it.
"""
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.files import require
from plumbing.flags import pick_device


class Setup:
    "Where this process runs: device, number type, and its rank among the processes that torchrun started."

    def __init__(self, flags):
        # torchrun starts one process for each GPU and sets these variables. Without torchrun it is rank 0 of 1.
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0  # the main process prints, logs and saves
        name = pick_device(flags.device)
        # TRAP: LOCAL_RANK counts within one machine, RANK over all. On the second machine they differ.
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if name == "cuda":
            torch.cuda.set_device(self.device)  # else code that says just "cuda" uses GPU 0, in every process
            torch.set_float32_matmul_precision("high")  # TF32: float32 products on tensor cores, rounded to 3 digits
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        # bfloat16 has float32's range with 2 to 3 digits: at least twice as fast on GPUs, and no loss scaling, which
        # float16 would need. TRAP: CPUs without instructions for it are 100 times slower with it.
        dtype = flags.dtype if flags.dtype != "auto" else "bfloat16" if name == "cuda" else "float32"
        require(dtype in ("float32", "bfloat16"), f"--dtype={flags.dtype}: choose auto, float32 or bfloat16")
        self.dtype = getattr(torch, dtype)
        if getattr(flags, "float8", False):
            capable = name == "cuda" and torch.cuda.get_device_capability() >= (8, 9) and dtype == "bfloat16"
            require(capable and flags.seq_len % 16 == 0,
                    "--float8: needs a GPU that multiplies 8-bit numbers (Nvidia's Ada, Hopper, later), "
                    f"--dtype=bfloat16, and a multiple of 16 as --seq_len, not {flags.seq_len}")
        self.compile = {"auto": name == "cuda", "True": True, "False": False}[str(flags.compile)]
        self.bad_steps, self.max_bad_steps = 0, getattr(flags, "max_bad_steps", 10)  # in a row, see train_step
        self.loaders, self.failure = [], None  # of this rank; the error for which a run stops once it is saved
        # The same seed everywhere: all ranks draw the same first weights and then make the same updates. What must
        # differ between ranks, their data, does not come from this generator.
        torch.manual_seed(flags.seed)

    def print(self, text: str = "") -> None:
        if self.is_main:
            tqdm.write(text, file=sys.stderr)  # print would cut the bar in two; standard output is for the result

    def all_reduce(self, value: float) -> float:
        "The sum over all ranks. TRAP: every rank must call it, or the others wait without end."
        if self.world_size == 1:
            return value
        # float64: losses are summed over millions of tokens, too many for float32's 7 digits. Apple's GPUs lack it.
        total = torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, mine: list) -> list:
        "Rank r has items r, r + world_size, ... -> all items in order, on every rank."
        if self.world_size == 1:
            return mine
        parts = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def to_device(self, batch: dict) -> dict:
        # others: None, the pixels of a batch without pictures; and the records' names
        return {name: value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value
                for name, value in batch.items()}
