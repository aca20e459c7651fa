"""
Muon and AdamW over float32 master weights, shared out over the ranks, and the schedule of the learning rate. Called by
the training loop: `optimizer.step(lr_scale(step, flags))`. A reader of the lessons may trust it unread.

Left out: gradient clipping (Muon's updates have a fixed size, AdamW's a largest one), weight averaging, sharding of
weights (every GPU holds the whole model; only master weights and optimizer state are shared out among the ranks).
"""

import torch
import torch.distributed as dist

from plumbing.files import require


# a, b, c of each round, by Polar Express (arXiv 2505.16932): those that bring the values nearest to 1 after it.
ROUNDS = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
          (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
          (3.9486908534822946, -2.908902115962949, 0.5518191394370137))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """
    g [n, rows, cols] -> for each matrix, roughly the closest one whose singular values are all 1 (Newton-Schulz
    iteration, as in Muon, kellerjordan.github.io/posts/muon).
    """
    # Why: a gradient has a few strong directions. Made equal, rare ones are learned as fast as common ones.
    # How: a singular value decomposition would be exact and slow on GPUs. Products alone come close: each round maps
    # every singular value v to a v + b v^3 + c v^5 and does not change the directions. The slopes a raise small values
    # 134 times in three rounds; b and c hold large ones near 1: all from 0.003 to 1 end within 0.19 to
    # 1.87. More rounds would bring them nearer, and training does not notice the difference (docs/tried.md).
    x = g.bfloat16() if g.is_cuda else g.float()  # bfloat16 is enough, and on most CPUs far too slow
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # [n, short, long]: s below is then [short, short], the cheaper of the two
    # TRAP: a v above 1.01 would grow without limit. The norm is the root of the sum of all v^2, so after the division
    # none is above 1 / 1.02, even when rounded to 8 bits. 1e-7: a gradient of zeros stays zeros, instead of 0 / 0.
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in ROUNDS:
        s = x @ x.mT                         # [n, short, short], v^2
        x = a * x + (b * s + c * s @ s) @ x  # [n, short, long]
    return (x.mT if tall else x).to(g.dtype)


# On the tiny model, chapter 3 alone reaches 71 % with 0.8, 66 % with 0.9, 57 % with the usual 0.95.
MOMENTUM = 0.8
# Each step matrices shrink by this times the learning rate. Muon's updates do not become smaller as the weights grow,
# so that without it they would count less and less: 87 instead of 83 % in the quick start (docs/tried.md).
WEIGHT_DECAY = 0.1


def row_blocks(name: str, params: dict) -> list[int]:
    "Rows of each matrix in a parameter: query, key and value are stored as one for speed, [heads d + 2 kv heads d, H]."
    rows = len(params[name])
    if not name.endswith("qkv.weight"):
        return [rows]
    # All query heads side by side are what the next matrix reads, [H, heads d]. TRAP: in a Qwen3 that is not H.
    query = params[name.removesuffix("qkv.weight") + "out.weight"].shape[1]
    return [query, (rows - query) // 2, (rows - query) // 2]


class Optimizer:
    """
    Muon (momentum, then orthogonalize) for matrices, AdamW for embeddings, norms and biases. It updates float32 master
    weights; the model's weights are these, rounded to the type in which the model computes. Each parameter is owned by
    one rank, which alone stores its master weight and optimizer state (ZeRO, arXiv 1910.02054).
    """

    def __init__(self, params: dict, kind: str, lr: float, state: dict | None = None, **parts: float):
        "parts: learning rates of others than lr, as bridge=0.001; below 0: lr."
        require(kind in ("muon", "adamw"), f"--optimizer={kind}: choose muon or adamw")
        self.params, parts = params, {part: rate for part, rate in parts.items() if rate >= 0}
        self.lr = {n: parts.get(n.split(".")[0], lr) for n in params}
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.owner, load = {}, [0] * self.world_size  # load: numbers each rank owns; large parameters go first
        for n in sorted(params, key=lambda n: -params[n].numel()):
            self.owner[n] = load.index(min(load))
            load[self.owner[n]] += params[n].numel()
        # In bfloat16's 2 to 3 digits small updates would be rounded away, and towards the end of a run all updates are
        # small. p.data: while the model is float32, master weights and weights are the same memory.
        self.master_weights = {n: p.data for n, p in params.items() if self.owner[n] == self.rank}
        # Muon is for matrices that map one space to another. Embeddings, positions and latents have two axes, too, but
        # are tables: each row is a vector of its own, and orthogonal rows would mean nothing.
        matrices = {n for n, p in params.items() if kind == "muon" and p.ndim == 2
                    and not n.endswith(("embed.weight", "head.weight", "position", "latents"))}
        # Muon stores the running mean of the gradients, AdamW also that of their squares.
        self.keys = {n: ("muon",) if n in matrices else ("step", "exp_avg", "exp_avg_sq") for n in params}
        self.moments = {n: {key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                            for key in self.keys[n]} for n, p in self.master_weights.items()}
        # 0.95 instead of the usual 0.999: a mean over some 20 steps, not 1000; tiny's whole runs are not that long.
        # fused: one kernel for all tensors. Else launching many small ones would cost more than the arithmetic.
        rest = [n for n in self.master_weights if n not in matrices]
        groups = [{"params": [self.master_weights[n] for n in rest if self.lr[n] == rate], "rate": rate}
                  for rate in dict.fromkeys(self.lr[n] for n in rest)]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True) if rest else None
        for n in rest:
            self.adamw.state[self.master_weights[n]] = self.moments[n]
        for n, key in ((n, key) for n in self.moments if state for key in self.keys[n]):
            saved, tensor = state.get(f"{n}.{key}"), self.moments[n][key]
            require(saved is not None and saved.shape == tensor.shape,
                    f"--resume: optimizer.safetensors lacks {n}.{key} of shape {list(tensor.shape)}; was it saved by "
                    "another version? Start again without --resume")
            tensor.copy_(saved)

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        "One update from the gradients in params; lr_scale: the schedule's factor on the learning rate."
        self.reduce_gradients()
        for n, p in self.params.items():
            if n in self.master_weights:
                self.master_weights[n].grad = None if p.grad is None else p.grad.to(self.master_weights[n].dtype)
            p.grad = None  # freed at once: its memory serves for the next one's float32
        if self.adamw:
            for group in self.adamw.param_groups:
                group["lr"] = group["rate"] * lr_scale
            self.adamw.step()
        self.step_muon(lr_scale)
        for n, p in self.master_weights.items():
            p.grad = None
            if self.params[n].data_ptr() != p.data_ptr():
                self.params[n].copy_(p)
        if self.world_size > 1:
            for n, p in self.params.items():
                dist.broadcast(p.data, self.owner[n])

    def step_muon(self, lr_scale: float) -> None:
        "Matrices of one shape are orthogonalized together: few large products instead of many small ones."
        shapes = {}
        for n, p in self.master_weights.items():
            if "muon" not in self.keys[n] or p.grad is None:
                continue
            mean = self.moments[n]["muon"].lerp_(p.grad, 1 - MOMENTUM)
            p.mul_(1 - self.lr[n] * lr_scale * WEIGHT_DECAY)
            g = p.grad.lerp(mean, MOMENTUM)  # Nesterov: the gradient, moved one step ahead along the momentum
            # Query, key and value separately: in one piece the value's large gradient would leave almost nothing of the
            # update to the other two, which decide where to attend.
            rows = row_blocks(n, self.params)
            for block, gradient in zip(p.split(rows), g.split(rows)):
                shapes.setdefault(block.shape, []).append((block, gradient, self.lr[n] * lr_scale))
        for shape, pairs in shapes.items():
            # An orthogonal [rows, cols] has entries of 1 / sqrt(longer side) in root mean square. Times 0.2 sqrt(longer
            # side) they are 0.2, as AdamW's usually are (arXiv 2502.16982): one learning rate serves both.
            updates = orthogonalize(torch.stack([gradient for _, gradient, _ in pairs]))
            for (block, _, lr), update in zip(pairs, updates):
                block.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)  # a view: this writes into the weight

    def reduce_gradients(self) -> None:
        "Each parameter's gradient, summed over the ranks, to its owner. Once a step, after all micro-batches."
        # Not DistributedDataParallel: it divides by the number of ranks, and our loss is divided already.
        if self.world_size == 1:
            return
        # A parameter that no row used has no gradient, as the bridge in a batch without pictures. If that holds on all
        # ranks it is skipped; else all must take part.
        used = torch.tensor([p.grad is not None for p in self.params.values()], dtype=torch.int32,
                            device=next(iter(self.params.values())).device)
        dist.all_reduce(used)
        for (n, p), by_some in zip(self.params.items(), used.tolist()):  # TRAP: in the same order on all ranks
            if by_some:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.reduce(p.grad, self.owner[n])  # NCCL only queues it: these follow each other without gaps

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        "-> on rank 0 (moments, master weights) of all parameters, by name. TRAP: all ranks must call it."
        def collect(n: str, tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
            if self.world_size == 1:
                return tensor
            # one at a time, and only rank 0 keeps it, in host memory: a GPU has no room for all of them
            tensor = torch.empty_like(like, dtype=torch.float32) if tensor is None else tensor
            dist.broadcast(tensor, self.owner[n])
            return tensor.cpu() if self.rank == 0 else None
        moments = {f"{n}.{key}": collect(n, self.moments.get(n, {}).get(key), p.new_zeros(()) if key == "step" else p)
                   for n, p in self.params.items() for key in self.keys[n]}
        return moments, {n: collect(n, self.master_weights.get(n), p) for n, p in self.params.items()}


def lr_scale(step: int, flags) -> float:
    "Up, flat, linearly down to 0. Of 100 steps, warmup 0.1, cooldown 0.5: 0.1 at step 0, 1 at 9 to 50, 0.5 at 75."
    # Up: at first the momentum is a mean of very few batches, too noisy for full steps. Flat: a cosine depends on the
    # run's length from its first step, this only once the descent begins. Down: large steps jitter around the minimum.
    warmup, cooldown = max(1, flags.warmup * flags.steps), max(1, flags.cooldown * flags.steps)
    return min(1.0, (step + 1) / warmup, (flags.steps - step) / cooldown)  # + 1: the first step is an update, too
