"""
What fits: how long rows must be to hold the data's conversations, and how many rows a GPU's memory holds at once, which
is tried, not computed. Called where the chapters make their loaders. A reader of the lessons need know only that on a
CPU all rows of a step are computed at once.
"""
import math
from functools import partial

import torch

from plumbing.files import attempt
from plumbing.flags import given

SMALLER = ("--activation_checkpointing, --lora_rank=16, or a shorter --seq_len (bench.py --what=memory tells what each "
           "saves)")


def largest_micro_batch(vlm, setup, share: int, make_batch) -> int:
    """
    The most rows per forward pass for which the GPU has the memory, of the divisors of `share`, a rank's rows in a
    step. make_batch(rows): such a batch. Without a GPU: all.
    """
    if setup.device.type != "cuda":
        return share
    torch.cuda.reset_peak_memory_stats()
    for rows in (n for n in range(share, 0, -1) if share % n == 0):
        try:  # Not computed but tried: what a pass needs depends on the compiler, the kernels and the model.
            batch = setup.to_device(make_batch(rows))
            for _ in range(min(2, share // rows)):  # of several micro-batches the second adds to gradients of the first
                loss = vlm(batch)
                if loss.requires_grad:  # not in alignment without a picture
                    loss.backward()
            # 7 % to spare: other batches have more pictures, and memory is fragmented
            fits = torch.cuda.max_memory_allocated() < 0.93 * torch.cuda.mem_get_info()[1]
        except torch.OutOfMemoryError:
            fits = False
        for p in vlm.parameters():
            p.grad = None
        torch.cuda.empty_cache()  # the fragments of a large attempt
        torch.cuda.reset_peak_memory_stats()
        if setup.all_reduce(fits) == setup.world_size:  # all ranks take the same
            setup.print(f"--micro_batch_size={rows}: the most rows of {share} that fit into this GPU's memory at once")
            return rows
    raise ValueError(f"not even one row fits into this GPU's memory; give {SMALLER}")


def row_length(lengths: list[int], usual: int, limit: int) -> int:
    "Tokens per row without a given --seq_len: the usual number, or what holds 99 of 100 documents, at most `limit`."
    needed = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1] if lengths else 0
    return usual if needed <= usual else min(-(-needed // 16) * 16, max(limit, usual))  # 16: what 8-bit products need


def fit_rows(flags, setup, vlm, dataset, make_document) -> None:
    """
    What rows will be cut, said before the time is spent; without --seq_len they become as long as the data need, and
    fewer, so that a step has as many tokens as before: flags.seq_len and flags.batch_size change.
    """
    first = (attempt(dataset.__getitem__, i) for i in range(500))
    make = partial(make_document, seq_len=10 ** 9)
    whole = [attempt(make, one, 0) for one in first if isinstance(one, dict) and "messages" in one]
    whole = [one for one in whole if not isinstance(one, Exception)]  # the loader will name it
    lengths = [len(document.ids) - 1 for document in whole if document]
    length = row_length(lengths, flags.seq_len, vlm.config.decoder.max_position_embeddings)
    if length > flags.seq_len and "seq_len" not in given() and not flags.resume:
        # rows are shared out over the ranks, and each rank's over its forward passes
        share = setup.world_size * max(1, flags.micro_batch_size)
        rows = max(1, flags.batch_size * flags.seq_len // length // share) * share
        setup.print(f"--seq_len={length} --batch_size={rows}, so that 99 of 100 conversations fit, instead of "
                    f"{flags.seq_len} and {flags.batch_size}")
        flags.seq_len, flags.batch_size = length, rows
    if vlm.config.run.get("stage") == "sft" and any(document and not document.slots for document in whole):
        vlm.config.run["texts"] = True
    # Cut conversations train without any error, and the model never learns how they end: say how many there are.
    long = [make_document(one.record, 0, seq_len=flags.seq_len) for one in whole
            if one and len(one.ids) - 1 > flags.seq_len]
    if long:
        setup.print(f"{len(long) - long.count(None)} of {len(whole)} conversations are longer than --seq_len="
                    f"{flags.seq_len} and are cut: their last turns are left out; {long.count(None)} do not fit at all"
                    + f" (with --tiles={flags.tiles} a picture has up to {vlm.config.bridge.most_tokens(flags.tiles)} "
                      "tokens)" * bool(flags.tiles))
    sets = getattr(dataset, "sets", [])
    if lengths and len(sets) == 1 and hasattr(sets[0], "records"):
        n, tokens = len(sets[0].records), max(1, sum(lengths) / len(lengths))
        setup.print(f"{n:,} records train; {flags.steps} steps are about "
                    f"{flags.steps * flags.batch_size * flags.seq_len / (n * tokens):.1f} epochs")
