"""
Requests that join and leave: rows of a cache, prompts that share a prefix, pictures that were seen before, CUDA graphs
and compiled decoding. Called wherever a model answers. A reader of the lessons need know only that what a request says
does not depend on who shares the batch; the computation itself is VLM.prefill and VLM.decode in model.py.
"""
import bisect
import contextlib
import hashlib
import itertools
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Iterable, Iterator

import torch

# On a CPU, products of a few rows add in another order than those of many, and attention to 9 columns in another than
# to 16. With rows and columns rounded up, a request's numbers are the same, bit for bit, whoever else is there.
ROWS, COLUMNS = 4, 16


def whole(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclass(eq=False)
class Request:
    "One answer to be generated: what is asked, how, and what has been said so far."
    prompt: object                   # ids, and slots: where its pictures' image tokens begin (tokenizer.Rendered)
    images: list = ()                # uint8 [3, S, S] or Tiles
    max_new_tokens: int = 128
    stop: set[int] = frozenset()     # ids that end the answer
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    rivals: int = -1                 # likeliest tokens to tell beside each one of the answer; -1: no probabilities
    answer: list[int] = field(default_factory=list)  # ids, the stop token too
    finish: str = ""                 # "stop" or "length"; whoever writes "cancelled" here frees the row
    scores: list[tuple] = field(default_factory=list)  # of each token: its log-probability, [(id, that of a rival)]
    reused: int = 0                  # tokens of the prompt whose keys and values were still there

    def __post_init__(self):
        # Drawn on the CPU from its own seed: every device gets the same numbers, whoever else is there.
        self.noise = torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.keys = list(self.prompt.ids)  # what tells one prompt from another: at the place of a picture, its digest
        for slot, image in zip(self.prompt.slots, self.images):
            self.keys[slot] = digest(image)

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.answer)


class Engine:
    """
    Continuous batching (Orca, OSDI 2022): requests join and leave between two tokens, each in a row of its own.

        engine = Engine(vlm, rows=32, width=2048); engine.submit(request); engine.step() -> the requests that ended

    What a request says does not depend on who shares the batch. The keys and values of a prompt stay when its request
    ends, and a conversation that goes on is prefilled from there. A picture seen before is not encoded again.
    """

    def __init__(self, vlm, requests: Iterable[Request] = (), rows: int = 0, width: int = 0, vocab_used: int = 0):
        weight, requests = vlm.gpt.embed.weight, list(requests)
        rows, width = rows or len(requests), width or max(len(r) + r.max_new_tokens for r in requests)
        self.vlm, self.device, self.gpu = vlm, weight.device, weight.is_cuda
        self.kv, self.graphs, self.key = take_cache(vlm, rows, width)
        self.rows, self.width = self.kv.shape[2], self.kv.shape[4]
        self.waiting, self.running = deque(), {}            # running: {row: request}
        self.free, self.kept = list(range(self.rows)), {}   # kept: {free row: Request.keys that its columns hold}
        self.vocab_used = vocab_used or len(weight)         # the embedding's padding rows are not tokens
        self.logits = weight.new_zeros(self.rows, len(weight))                     # [R, V], of each row's next token
        self.present = torch.zeros_like(self.logits, dtype=torch.bool)             # [R, V], tokens in each row so far
        self.pictures = PictureCache(vlm, self.run_encoder)
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        # Beyond what it was trained on it would answer, but worse and worse.
        limit = min(self.vlm.config.decoder.max_position_embeddings, self.width - request.max_new_tokens)
        if len(request) > limit:
            raise ValueError(f"a conversation of {len(request):,} tokens; this model can read {limit:,} here: shorten "
                             "it, or show fewer or smaller pictures")
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Request]:
        "Requests from any iterator -> each as soon as it is answered; rows that end early make room for the next."
        requests = iter(requests)
        while True:
            for request in itertools.islice(requests, max(0, len(self.free) - len(self.waiting))):
                self.submit(request)
            if not self.busy:
                return
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        "Prefill those that wait, as far as there are free rows; then one token more for all -> those that ended."
        self.admit()
        if not self.running:
            return []
        # On a GPU always all rows, one graph. On a CPU the first ones: free rows are given out from the lowest on.
        if not self.gpu:
            self.close_up()
        B = self.rows if self.gpu else whole(max(self.running) + 1, ROWS)
        S = self.columns(max(map(len, self.running.values())) + 1)
        # Free rows are computed too. Their tokens go behind what is kept, and nobody looks.
        columns = self.upload([len(self.running.get(row, self.kept.get(row, ()))) for row in range(B)])      # [B]
        token = self.choose(B)

        def decode():
            compute = partial(self.vlm.decode, self.kv, S)
            self.logits[:B] = run_graph(self.graphs, ("decode", S), compute, token, columns)
        scores = self.score(token)
        ids, copied = token.to("cpu", non_blocking=True), self.gpu and torch.cuda.current_stream().record_event()
        if self.gpu and any(len(r.answer) + 1 < r.max_new_tokens for r in self.running.values()):
            decode()  # launched before the CPU waits for this step's tokens
        if self.gpu:
            copied.synchronize()
        for request, own, values, others in scores:  # before the tokens: who reads a token finds its score
            request.scores.append((own.item(), list(zip(others.tolist(), values.tolist()))[:request.rivals]))
        ended = [request for (row, request), id_ in zip(list(self.running.items()), ids[list(self.running)].tolist())
                 if self.extend(row, request, id_)]
        if self.running and not self.gpu:
            decode()
        return ended

    def extend(self, row: int, request: Request, token: int) -> str:
        "One token more -> why the request has ended, or an empty string."
        request.answer.append(token)
        request.finish = request.finish or (
            "stop" if token in request.stop else "length" if len(request.answer) == request.max_new_tokens else "")
        if request.finish:
            # The answer's own columns do not count as kept. They differ in the last bits from what prefill would give:
            # the next answer would depend on whether this row was still there.
            self.kept[row] = self.running.pop(row).keys
            bisect.insort(self.free, row, key=lambda r: 0 if self.gpu else r // ROWS)  # the oldest is used first
        return request.finish

    def close_up(self) -> None:
        "Rows whose answers have ended leave holes; once most are holes, the last running rows change places with them."
        n = whole(len(self.running), ROWS)
        if max(self.running) < 2 * n:
            return
        holes = (row for row in range(n) if row not in self.running)
        swap = dict(zip((row for row in self.running if row >= n), holes))
        swap |= {b: a for a, b in swap.items()}
        to, of = map(self.upload, (list(swap), list(swap.values())))
        self.kv[:, :, to], self.logits[to], self.present[to] = self.kv[:, :, of], self.logits[of], self.present[of]
        self.running, self.kept = ({swap.get(row, row): there for row, there in rows.items()}
                                   for rows in (self.running, self.kept))
        self.free = sorted((swap.get(row, row) for row in self.free), key=lambda row: row // ROWS)

    def choose(self, B: int) -> torch.Tensor:
        "-> token [B]. Rows with the same options are sampled together; what free rows get is ignored."
        groups, noise = {}, [0.0] * B
        for row, r in self.running.items():
            groups.setdefault((r.temperature, r.top_k, r.top_p, r.repetition_penalty), []).append(row)
            noise[row] = r.noise[len(r.answer)]
        inputs = self.logits[:B, :self.vocab_used], self.upload(noise), self.present[:B, :self.vocab_used]
        if len(groups) == 1:
            token = self.vlm.sample(*inputs, *next(iter(groups)))
        else:
            token = torch.zeros(B, dtype=torch.long, device=self.device)
            for options, rows in groups.items():
                rows = self.upload(rows)
                token[rows] = self.vlm.sample(*(t[rows] for t in inputs), *options)
        if any(penalty != 1.0 for *_, penalty in groups):
            self.present[:B].scatter_(1, token[:, None], True)
        return token

    def score(self, token: torch.Tensor) -> list[tuple]:
        "For each request that asks: it, its token's log-probability [], those of the likeliest [k], and their ids [k]."
        asked = {row: request for row, request in self.running.items() if request.rivals >= 0}
        if not asked:
            return []
        rows = self.upload(list(asked))
        # The model's own: before temperature, penalty and filters.
        logs = self.logits[rows, :self.vocab_used].float().log_softmax(-1)                             # [asked, V]
        values, others = logs.topk(max(1, *(request.rivals for request in asked.values())))
        told = [t.to("cpu", non_blocking=True) for t in (logs.gather(1, token[rows, None])[:, 0], values, others)]
        return list(zip(asked.values(), *told))

    def pick_row(self, request: Request) -> tuple[int, int]:
        "-> (a free row, how many of its columns already hold this request's first tokens)."
        row, start, keys = self.free[0], 0, request.keys
        for other, kept in self.kept.items():
            n = bisect.bisect_left(range(min(len(kept), len(keys))), True, key=lambda i: kept[:i + 1] != keys[:i + 1])
            if n > start and 2 * n >= len(kept):  # else it is another conversation that only begins alike
                row, start = other, n
        self.free.remove(row)
        self.kept.pop(row, None)
        return row, min(start, len(request) - 1)  # the last token is computed in any case: its logits are needed

    def admit(self) -> None:
        "Requests that wait -> free rows."
        batches, leaders, twins = {}, {}, []
        while self.waiting and self.free:
            request = self.waiting.popleft()
            if request.finish:  # cancelled
                continue
            row, start = self.pick_row(request)
            self.running[row], request.reused = request, start
            if request.repetition_penalty != 1.0:
                self.present[row] = False
                self.present[row, self.upload(list(request.prompt.ids))] = True
            leader = leaders.setdefault(tuple(request.keys), row)
            if leader != row:  # another answer to the same prompt: it is computed once
                twins.append((leader, row))
            else:  # On a CPU prompts go together by their own length, so that nothing depends on the others' length.
                T = 0 if self.gpu else whole(len(request) - start, COLUMNS)
                batches.setdefault((T, start > 0), []).append((row, start, request))
        for batch in batches.values():
            self.prefill(*zip(*batch))
        if twins:
            (a, b), T = self.upload(twins).t(), max(map(len, self.running.values()))
            self.kv[:, :, b, :, :T], self.logits[b] = self.kv[:, :, a, :, :T], self.logits[a]

    def prefill(self, rows, starts, requests) -> None:
        "The prompts of some requests, each from its column `start` on, in one pass."
        texts = [r.prompt.ids[start:] for start, r in zip(starts, requests)]
        T = whole(max(map(len, texts)), 64 if self.gpu else COLUMNS)  # on a GPU few shapes, see run_graph
        places = [(b * T + slot - start, image) for b, (start, r) in enumerate(zip(starts, requests))
                  for slot, image in zip(r.prompt.slots, r.images) if slot >= start]
        shown = self.pictures([image for _, image in places])
        inputs = [list(text) + [0] * (T - len(text)) for text in texts], rows, starts, list(map(len, texts)), [
            at + i for (at, _), tokens in zip(places, shown) for i in range(len(tokens))]
        inputs = [*map(self.upload, inputs), *([torch.cat(shown)] if shown else [])]
        # On a GPU whole prompts take the fastest kernels, which know no mask. On a CPU equal bits come first.
        S = self.columns(max(starts) + T) if any(starts) or not self.gpu else 0
        compute, short = partial(self.vlm.prefill, self.kv, S), len(texts) * T <= 2048
        # A long prompt keeps a GPU busy without a graph, and its shape seldom comes again.
        self.logits[inputs[1]] = run_graph(self.graphs, ("prefill", S), compute, *inputs) if short else compute(*inputs)

    def run_encoder(self, function, pixels) -> torch.Tensor:
        few = len(pixels) * self.vlm.config.vision.num_patches <= 2048
        return run_graph(self.graphs, ("encode", ), function, pixels).clone() if few else function(pixels)

    def columns(self, n: int) -> int:
        "n rounded up; on a GPU so that few graphs are recorded."
        return min(power_of_two(n) if self.gpu else whole(n, COLUMNS), self.width)

    def upload(self, values: list) -> torch.Tensor:
        "-> a tensor on the device; on a GPU without waiting."
        values = torch.tensor(values, dtype=None if values else torch.long, pin_memory=self.gpu)
        return values.to(self.device, non_blocking=True)

    def close(self) -> None:
        if self.key:
            self.vlm.idle_caches[self.key] = self.kv, self.graphs


def respond(vlm, tokenizer, conversations: list, images: list, seeds: list[int] | None = None, **options) -> list[str]:
    "Chat messages and each one's list of pictures (uint8 [3, S, S] or Tiles) -> the assistant's next words."
    requests = [Request(tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, group)), True), group,
                        stop=set(tokenizer.stop_ids), seed=seed, **options)
                for messages, group, seed in zip(conversations, images, seeds or itertools.count())]
    with contextlib.closing(Engine(vlm, requests, vocab_used=tokenizer.vocab_size)) as engine:
        list(engine.run())
    return [tokenizer.answer(r.answer) for r in requests]


def digest(image) -> bytes:
    "Equal for equal pictures only, each uint8 [3, S, S] or Tiles."
    plain = torch.is_tensor(image)
    shape = "" if plain else f"{image.rows} {image.columns} {image.width} {image.height}"
    return hashlib.sha256(shape.encode() + (image if plain else image.pixels).numpy().tobytes()).digest()


class PictureCache:
    "Pictures, each uint8 [3, S, S] or Tiles -> the image tokens of each [K, H]; the last ones are not encoded again."
    SIZE = 256  # pictures

    def __init__(self, vlm, run=lambda function, pixels: function(pixels)):
        self.vlm, self.run = vlm, run
        self.known = {}  # {digest: image tokens}, oldest first

    def __call__(self, images: list) -> list[torch.Tensor]:
        names, device = [digest(image) for image in images], self.vlm.gpt.embed.weight.device
        new = {name: image for name, image in zip(names, images) if name not in self.known}
        # Tiled pictures one by one: 37 tiles fill any device. The others, all of one size, go in one batch.
        plain = [name for name, image in new.items() if torch.is_tensor(image)]
        if plain:
            # At least 32 vectors: on a CPU, products of a few rows add in another order, and bits would differ.
            n = max(len(plain), -(-32 // self.vlm.config.bridge.num_tokens))
            pixels = [new[plain[i % len(plain)]] for i in range(n)]
            self.known |= zip(plain, self.run(self.vlm.encode_images, torch.stack(pixels).to(device)))
        for name in new.keys() - set(plain):
            self.known[name] = self.vlm.encode_tiles(new[name])
        for name in names:  # the youngest are last
            self.known[name] = self.known.pop(name)
        out = [self.known[name] for name in names]
        for name in list(self.known)[:-self.SIZE]:
            del self.known[name]
        return out


# ----------------------------------------------------------------------------------------------------------------------
# Faster on a GPU: nothing here changes a result
# A decoding step is a thousand short kernels. To keep the GPU busy, the step is recorded as one CUDA graph, the next
# one is launched before the CPU waits for this one's tokens, and the blocks are compiled for decoding.

def power_of_two(n: int) -> int:
    return max(256, 1 << (n - 1).bit_length())


def take_cache(vlm, rows: int, width: int) -> tuple[torch.Tensor, dict, tuple | None]:
    "-> (keys and values of `rows` rows or more, CUDA graphs that use them, where Engine.close leaves both)."
    weight, c = vlm.gpt.embed.weight, vlm.config.decoder
    # Widths are rounded up to powers of two: few different graphs. TRAP: a graph remembers the weights' addresses.
    key = (rows, power_of_two(width), weight.data_ptr(), weight.dtype) if weight.is_cuda else None
    if key in vlm.idle_caches:
        return *vlm.idle_caches.pop(key), key
    rows, width = key[:2] if key else (whole(rows, ROWS), whole(width, COLUMNS))
    # Qwen2.5-1.5B in bfloat16: 2 x 28 layers x 2 heads x 128 channels x 2 bytes = 28 KiB for each token of a row.
    # zeros, not empty: a stray NaN would survive a multiplication with weight zero.
    return weight.new_zeros(c.num_hidden_layers, 2, rows, c.num_key_value_heads, width, c.head_dim), {}, key


def run_graph(graphs: dict, name: tuple, function, *inputs) -> torch.Tensor:
    "function(*inputs); on a GPU as a CUDA graph: recorded once per name and input shapes, then launched as one."
    if not inputs[0].is_cuda:
        return function(*inputs)
    key = (*name, *(tuple(t.shape) for t in inputs))
    if key not in graphs:  # The first call runs as it is: what must be compiled is compiled now.
        graphs[key] = None
        return function(*inputs)
    if graphs[key] is None:  # The second call is recorded. A prompt shape that occurs only once never is.
        static, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may fetch data meanwhile
            result = function(*static)
        graphs[key] = graph, static, result
    # TRAP: a graph always uses the same memory: inputs must be copied there, and the next call overwrites the result.
    graph, static, result = graphs[key]
    for mine, given in zip(static, inputs):
        mine.copy_(given)
    graph.replay()
    return result


def compile_decoding(forward) -> dict:
    "A block's forward -> {one row?: the compiled function that replaces it when decoding}."
    torch._dynamo.config.recompile_limit = 64  # beyond it everything would silently run uncompiled
    # pdl: the kernels are so short that the next one is launched before one ends. Coordinate descent: the sums of a
    # single row (attend_one_row in model.py) are tuned, which makes them faster than matrix products.
    return {one: torch.compile(forward, dynamic=False, options={
        "triton.enable_pdl": True, "coordinate_descent_tuning": one}) for one in (False, True)}
