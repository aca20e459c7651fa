"""
Clients of a real server, over real sockets. Called by `python bench.py --what=serve`.

What counts for a user is not tokens per second, but how long the first word takes, and whether the next ones flow. So
each client notes when each piece of text arrives, with pictures that the server must decode.
"""
import base64
import functools
import http.client
import io
import json
import math
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from plumbing.world import World


def make_bodies(n: int) -> list[bytes]:
    "n requests: a picture of 100 to 1,000 pixels a side and 40 words each, answers of 32 to 256 tokens."
    bodies, rng = [], random.Random(0)
    for i in range(n):
        file = io.BytesIO()
        World("captions", seed=i)[0]["images"][0].draw(rng.choice([100, 250, 500, 1000])).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        text = " ".join(rng.choice(["what", "is", "the", "cat", "red"]) for _ in range(40))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        bodies.append(json.dumps({
            "stream": True, "stream_options": {"include_usage": True}, "seed": i,
            "messages": [{"role": "user", "content": content}], "max_tokens": rng.choice([32, 96, 160, 256])}).encode())
    return bodies


def ask(port: int, body: bytes) -> tuple[float, list[float], int]:
    "One request -> (when it was sent, when its pieces of text came, tokens)."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent, times, tokens = time.perf_counter(), [], 0
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"the server answered {answer.status}: {answer.read()[:200]}")
    for line in answer:
        if b'"content": "' in line and b'"role"' not in line:
            times.append(time.perf_counter())
        elif b'"usage"' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    connection.close()
    return sent, times, tokens


def clients(port: int, n: int, each: int) -> tuple[float, list]:
    """
    n clients, a thread each, in a process of their own -> (seconds, what `ask` gave for each request). Each takes the
    next request as soon as it has an answer, so that all are busy nearly to the end.
    """
    bodies = make_bodies(n * each)
    with ThreadPoolExecutor(n) as pool:
        started = time.perf_counter()
        results = list(pool.map(functools.partial(ask, port), bodies))
    return time.perf_counter() - started, results


def quantiles(values: list[float]) -> list[float]:
    "-> [p50, p95], milliseconds."
    values = sorted(values) or [math.nan]
    return [values[int(len(values) * share)] * 1e3 for share in (0.5, 0.95)]


def measure(server, counts: list[int], each: int, warm: int, tell) -> dict:
    "counts of clients, one after another, `each` requests a client -> {count: speed and times}. tell: prints a line."
    rows = {}
    # Clients in this process would compete for its interpreter. One process, in which each client is a thread.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    tell(f"{'clients':>8}{'tokens/s':>10}{'first token ms, p50':>21}{'p95':>8}{'next ms, p50':>14}{'p95':>8}")
    for n in [max(counts)] * warm + counts:
        seconds, results = pool.submit(clients, server.server_port, n, each).result()
        speed = sum(tokens for *_, tokens in results) / seconds
        # The first n arrive together. Those that follow, if there are any, are newcomers among others.
        first = quantiles([times[0] - sent for sent, times, _ in results[n:] or results if times])
        after = quantiles([b - a for _, times, _ in results for a, b in zip(times, times[1:])])
        rows[str(n)] = {"tokens_per_s": speed, "first_token_ms": first, "next_token_ms": after}
        tell(f"{n:>8}{speed:>10,.0f}{first[0]:>21.1f}{first[1]:>8.1f}{after[0]:>14.1f}{after[1]:>8.1f}")
    pool.shutdown()
    return rows
