"""
How many rows of a batch fit into a GPU's memory at once: tried, not computed. Called where the chapters make their
loaders, and by chapter 4. A reader of the lessons need know only that on a CPU it is all of them.
"""
import torch

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
