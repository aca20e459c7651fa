"The server: OpenAI's API, the page, hostile requests."
import base64
import contextlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

import extras.asking
import extras.connection
import extras.server
import plumbing.engine
import plumbing.world
import sample
from extras.server import Server, read_picture
from plumbing.flags import parse_flags
from sample import FLAGS as SAMPLE_FLAGS
from tests.helpers import (HERE, Served, bytes_of, image_bytes, needs, png, run, tiny_vlm, tokenizer, uri, user,
                           wait_until)

pytest_plugins = ["tests.helpers"]  # its fixtures


@needs("openai")
def test_the_openai_client_gets_what_sample_py_says(trained, served, photo, tmp_path):
    import openai
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none")
    name = client.models.list().data[0].id
    plumbing.world.World("captions")[5]["images"][0].draw(90).save(tmp_path / "b.png")
    flags = ["--seed=3", "--temperature=0.8", "--max_new_tokens=12", f"--out_dir={trained[0]}", "--device=cpu"]
    two = [f"--image={photo}", f"--image={tmp_path / 'b.png'}"]
    options = dict(model=name, seed=3, temperature=0.8, max_tokens=12)
    said = run("sample", *flags, *two, "--question=What is it?")
    messages = [user("What is it?", photo, tmp_path / "b.png")]
    lines = ["What is it?", "Why?", "And where?"]
    chat = run("sample", *flags, *two, "--chat", stdin="\n".join(lines), main=sample.main).out
    for turn, question in enumerate(lines):
        if turn:
            messages.append(user(question))
        whole = client.chat.completions.create(messages=messages, **options)
        pieces = list(client.chat.completions.create(messages=messages, stream=True,
                                                     stream_options={"include_usage": True}, **options))
        text = whole.choices[0].message.content
        streamed = "".join(p.choices[0].delta.content or "" for p in pieces[:-1])
        assert text == streamed and chat.startswith(text + "\n") and (turn or text + "\n" == said.out)
        chat = chat[len(text) + 1:]
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens > 0 and not pieces[-1].choices
        assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        if turn:  # all but the last answer and question is still in the cache
            assert whole.usage.prompt_tokens_details.cached_tokens >= 20
        messages.append({"role": "assistant", "content": text})
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(messages=messages[:1], model=name, frequency_penalty=1.0)
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(messages=messages[:1], model="gpt-4o")


def test_choices_seeds_and_stop_texts(served, photo):
    messages = [user("What is it?", photo)]
    both = served.post({"messages": messages, "max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 5}).json()
    texts = [choice["message"]["content"] for choice in both["choices"]]
    assert texts == [served.says(messages, max_tokens=8, temperature=1.0, seed=seed) for seed in (5, 6)]
    assert both["usage"]["completion_tokens"] <= 16 and [c["index"] for c in both["choices"]] == [0, 1]
    free = served.says(messages, max_tokens=40, temperature=1.0, seed=5)
    stop = free[4:6]
    cut = served.post({"messages": messages, "max_tokens": 40, "temperature": 1.0, "seed": 5, "stop": stop}).json()
    assert cut["choices"][0] == {**cut["choices"][0], "finish_reason": "stop"}
    assert cut["choices"][0]["message"]["content"] == free[:free.index(stop)]
    assert served.post({"messages": messages, "max_tokens": 1}).json()["choices"][0]["finish_reason"] == "length"
    text = extras.asking.Text(tokenizer(), ["abc"])
    told = [text.add(tokenizer().encode(piece)) for piece in ("xa", "b", "d", "yab", "c z")]
    assert "".join(told) == "xabdy" and told[0] == "x" and text.ended  # held back until it is certain

def test_pictures_between_texts_keep_their_places_and_others_come_first():
    text = {"type": "text", "text": "a"}
    shown = {"type": "image_url", "image_url": {"url": uri(image_bytes())}}
    for content, kinds in (([text, shown, text, shown], "titi"),
                           ([shown, text], "it"), ([text, shown], "it"), ([text], "t")):
        images = []
        message = extras.server.read_message({"role": "user", "content": content}, images)
        assert "".join(part["type"][0] for part in message["content"]) == kinds and len(images) == kinds.count("i")


BAD = {  # what the body has instead of a good one's; the answer names the parameter or says what is wrong
    "no_messages": ({"messages": None}, "messages"), "empty": ({"messages": []}, "messages"),
    "many": ({"messages": [user("x")] * 101}, "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    "content": ({"messages": [{"role": "user", "content": 7}]}, "content"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "part 0"),
    "not_a_message": ({"messages": ["hi"]}, "messages[0]"),
    "assistant_last": ({"messages": [user("x"), {"role": "assistant", "content": "y"}]}, "assistant"),
    "assistant_picture": ({"messages": [{**user("x", b"x"), "role": "assistant"}]}, "part 1"),
    "long": ({"messages": [user("cat " * 3000)]}, "context_length_exceeded"),
    "endless": ({"messages": [user("cat " * 200_000)]}, "context_length_exceeded"),
    "tokens_0": ({"max_tokens": 0}, "max_tokens"),
    "tokens_text": ({"max_tokens": "5"}, "max_tokens"),
    "tokens_true": ({"max_tokens": True}, "max_tokens"),
    "tokens_new": ({"max_completion_tokens": -2}, "max_completion"),
    "hot": ({"temperature": 99}, "temperature"), "cold": ({"temperature": -0.1}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"), "n": ({"n": 100}, "n must be"), "seed": ({"seed": 0.5}, "seed"),
    "seed_huge": ({"seed": 2 ** 200}, "seed"), "stop": ({"stop": 5}, "stop"), "stops": ({"stop": ["a"] * 17}, "stop"),
    "stream": ({"stream": "yes"}, "stream"), "stream_options": ({"stream_options": [1]}, "stream_options"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "json": ({"response_format": {"type": "json_object"}}, "response"),
    "bias": ({"logit_bias": {"5": 9}}, "logit_bias"),
    **{name: ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}, "data:")
       for name, url in (("http", {"url": "http://x/a.png"}), ("file", "file:///etc/passwd"), ("no_url", {}))},
    "broken": ({"messages": [user("x", b"no picture")]}, "not a readable picture"),
    "eps": ({"messages": [user("x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")]}, "not a readable picture"),
    "many_pictures": ({"messages": [user("x", *[b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01"
                                                  b"\0\0\x02\x02D\x01\0;"] * 9)]}, "more than 8 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_told_what_is_wrong(served, name):
    change, culprit = BAD[name]
    answer = served.post({"messages": [user("What?")], **change})
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500 and culprit in json.dumps(error) and set(error) == {
        "message", "type", "param", "code"} and len(answer.text) < 800


def test_a_body_that_is_too_long_is_refused_before_it_is_read(served):
    for length, status in ((extras.connection.BODY + 1, b"413"), (10 ** 20, b"411")):
        answer = served.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length)
        assert answer.startswith(b"HTTP/1.1 " + status) and b'"error"' in answer


@pytest.mark.parametrize("kind", ["cut", "huge"])
def test_a_picture_that_is_cut_or_a_bomb_is_refused(served, kind):
    answer = served.post({"messages": [user("x", bytes_of(kind))]})
    assert answer.status_code == 400 and "messages[0]" in answer.text


@pytest.mark.parametrize("form, size, right", [
    ("JPEG", (5712, 4284), True), ("PNG", (8160, 6120), True), ("PNG", (8200, 6120), False),
    ("WEBP", (5712, 4284), False), ("GIF", (5712, 4284), False), ("JPEG", (4000, 4000), True)])
def test_a_phone_s_photo_is_read_and_unpacked_sparingly(form, size, right, monkeypatch):
    "A large picture alone, and never more of it than a small one may have."
    file, shown = io.BytesIO(), []
    Image.new("RGB", size, (77, 77, 77)).convert("L" if form == "PNG" else "RGB").save(file, form)
    load_image = extras.server.load_image

    def watched(image, name):
        shown.append((image.size, extras.server.DECODING._value, extras.server.ALONE.locked()))
        return load_image(image, name)
    monkeypatch.setattr(extras.server, "load_image", watched)
    url = "data:image/x;base64," + base64.b64encode(file.getvalue()).decode()
    if not right:
        with pytest.raises(ValueError, match="over the limit of"):
            extras.server.read_picture(url)
        return
    threads = [threading.Thread(target=extras.server.read_picture, args=(url, )) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(w * h < extras.server.LARGE for (w, h), _, _ in shown) and len(shown) == 3
    large = size[0] * size[1] > extras.server.LARGE
    assert all(alone == large and (free == 0 or not large) for _, free, alone in shown)
    assert extras.server.read_picture(url).getpixel((9, 9)) == (77, 77, 77) and not extras.server.ALONE.locked()


def test_a_page_elsewhere_cannot_use_a_local_server(served, photo):
    good = {"messages": [user("x")], "max_tokens": 1}
    port = served.address[1]
    for headers, status in (({"Host": "evil.example"}, 403), ({"Host": f"evil.example:{port}"}, 403),
                            ({"Host": ""}, 403),
                            ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
                            ({"Host": f"localhost:{port}"}, 200), ({"Host": "192.168.1.7:1"}, 200),
                            ({"Host": "[::1]:80"}, 200), ({"Origin": f"http://127.0.0.1:{port}"}, 200)):
        answer = served.post(good, **headers)
        assert answer.status_code == status, (headers, answer.text)
        assert not any(name.lower().startswith("access-control") for name in answer.headers)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what a form can send
        answer = requests.post(served.url + "/v1/chat/completions", data=json.dumps(good),
                               headers={"Content-Type": kind})
        assert answer.status_code == 415
    assert requests.options(served.url + "/v1/chat/completions", headers={"Origin": "http://evil"}).status_code == 403


def test_the_page_and_its_headers(served):
    page = requests.get(served.url + "/")
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff" and not re.search(r"https?://(?!www.w3.org)", page.text)
    assert not re.search(r"\sstyle=|\son\w+=\"", page.text)  # the policy would forbid them
    assert requests.get(served.url + "/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    (card, ) = requests.get(served.url + "/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["sees"] and card["world"]
    assert Image.open(io.BytesIO(requests.get(served.url + "/draw").content)).size == (320, 320)
    head = requests.head(served.url + "/")
    assert head.status_code == 200 and not head.content and int(head.headers["Content-Length"]) == len(page.content)
    assert requests.get(served.url + "/nowhere").status_code == 404
    assert requests.get(served.url + "/look").status_code == 405


def test_the_page_is_told_where_each_word_looked(served, photo):
    asked = [user("What is it?", photo), {"role": "assistant", "content": "a red cat"}]
    words = served.post({"messages": asked}, "/look").json()["words"]
    assert [word["text"] for word in words] == ["a", " red", " cat"]
    assert np.array([word["maps"] for word in words]).shape == (3, 1, 6, 6)
    for wrong in ({"messages": asked[:1]}, {"messages": [user("x"), asked[1]]}, [], {"messages": 5}):
        assert served.post(wrong, "/look").status_code == 400


def test_a_key_is_asked_for(trained):
    there = Served(trained[0], "--api_key=sesame", "--max_requests=4")
    good = {"messages": [user("x")], "max_tokens": 1}
    for headers, status in (({}, 401), ({"Authorization": "Bearer sesam"}, 401), ({"Authorization": "sesame"}, 200),
                            ({"Authorization": "Bearer sesame"}, 200), ({"Authorization": "Bearer "}, 401)):
        assert there.post(good, **headers).status_code == status
    for path, status in (("/", 200), ("/health", 200), ("/v1/models", 401), ("/draw", 401)):
        assert requests.get(there.url + path).status_code == status
    there.server.shutdown()


def test_a_client_that_hangs_up_frees_its_row(served):
    engine = served.server.engine
    wait_until(lambda: not engine.busy)
    served.server.stop, kept = set(), served.server.stop
    try:
        body = json.dumps({"messages": [user("x")], "max_tokens": 2000}).encode()
        for stream_ in (b"", b"text/event-stream"):
            with socket.create_connection(served.address) as s:
                sent = body[:-1] + (b', "stream": true}' if stream_ else b"}")
                s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                          b"Content-Length: %d\r\n\r\n%s" % (len(sent), sent))
                wait_until(lambda: engine.running)
                said = next(iter(engine.running.values()))
            wait_until(lambda: not engine.running)
            assert said.finish == "cancelled" and len(said.answer) < 2000
    finally:
        served.server.stop = kept


def test_too_many_wait_then_429_and_nobody_is_given_half_an_answer(served, monkeypatch):
    engine = served.server.engine
    wait_until(lambda: not engine.busy)
    step, gate = engine.step, threading.Event()
    monkeypatch.setattr(extras.server, "WAITING", 2)
    monkeypatch.setattr(engine, "step", lambda: (gate.wait(20), step())[1])  # nothing moves
    answers = []
    body = {"messages": [user("x")], "max_tokens": 1, "n": 6}  # 4 rows, and 2 that wait
    first = threading.Thread(target=lambda: answers.append(served.post(body)))
    first.start()
    wait_until(lambda: len(served.server.open) == 6)
    refused = served.post({"messages": [user("x")]})
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
    time.sleep(0.5)
    assert not answers  # as long as it takes
    gate.set()
    first.join()
    assert answers[0].status_code == 200 and served.says([user("x")]) is not None


def test_an_error_in_the_engine_costs_those_it_hits_and_no_other(served, monkeypatch, capfd):
    engine = served.server.engine
    wait_until(lambda: not engine.busy)
    expected = served.says([user("What?")])
    with monkeypatch.context() as patch:
        patch.setattr(plumbing.engine.Engine, "choose", lambda self, B: 1 / 0)
        assert served.post({"messages": [user("What?")]}).status_code == 500
        answer = served.post({"messages": [user("What?")], "stream": True})
        assert answer.status_code == 200 and b'data: {"error": {"message": ' in answer.content.splitlines()[-2]
    wait_until(lambda: len(served.server.engine.free) == 4)
    assert served.says([user("What?")]) == expected and "ZeroDivisionError" in capfd.readouterr().err


def test_idle_and_slow_connections_are_dropped_and_those_too_many_told_so(trained, monkeypatch, capfd):
    monkeypatch.setattr(extras.connection, "IDLE", 0.6)
    there = Served(trained[0], "--max_requests=4")
    monkeypatch.setattr(extras.server, "CONNECTIONS", 3)
    began = time.monotonic()
    assert there.raw() == b""  # says nothing
    with socket.create_connection(there.address, timeout=10) as s:  # a byte now and then
        with contextlib.suppress(OSError):
            for letter in b"POST /v1/chat/completions HTTP/1.1\r\n" * 9:
                s.sendall(bytes([letter]))
                time.sleep(0.05)
        with contextlib.suppress(OSError):
            assert s.recv(9) == b""
    assert time.monotonic() - began < 6
    wait_until(lambda: not there.server.connections)
    held = [socket.create_connection(there.address) for _ in range(3)]
    wait_until(lambda: len(there.server.connections) == 3)
    assert there.raw(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")  # one too many
    assert "503" in capfd.readouterr().err
    for s in held:
        s.close()
    wait_until(lambda: not there.server.connections)
    assert there.says([user("x")]) is not None
    there.server.shutdown()


def hostile(rng: random.Random, good: bytes) -> list[bytes]:
    "The pieces of one malformed request."
    path = rng.choice([b"/v1/chat/completions"] * 3 + [b"/v1/completions", b"/look", b"/latents"])
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path
    junk = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
    body = bytearray(good)
    for _ in range(rng.randrange(1, 6)):  # bytes changed, dropped, doubled
        at = rng.randrange(len(body))
        body[at:at + rng.randrange(3)] = bytes([rng.randrange(256)] * rng.randrange(3))
    value = rng.choice([b"NaN", b"Infinity", b"-1e999", b"1" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b'"\\ud800"',
                        b"null", b"true", b"{}", b"[[]]", b'"' + junk.hex().encode() + b'"'])
    field = rng.choice([b"messages", b"max_tokens", b"temperature", b"seed", b"n", b"stop", b"stream", b"top_p",
                        b"prompt", b"logprobs", b"top_logprobs", b"echo", b"image", b"model", b"logit_bias",
                        b"tools", b"\\ud800"])
    odd = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "%s": %s}' % (field, value)
    if path == b"/v1/completions":
        odd = odd.replace(b'"messages": [{"role": "user", "content": "x"}]', b'"prompt": "x"')

    def post(body, length=None):
        return [head + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length), bytes(body)]
    return rng.choice([
        lambda: [junk], lambda: post(body), lambda: post(odd), lambda: post(odd), lambda: post(junk),
        lambda: post(good, len(good) + 50), lambda: post(good, -5), lambda: post(good, 10 ** 15),
        lambda: post(good, 10 ** 30),
        lambda: [head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", good], lambda: [head + b"\r\n", good],
        lambda: [head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
        lambda: [head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s" % (rng.choice([5, 10 ** 9, 10 ** 7]), junk)],
        lambda: [head + b"Transfer-Encoding: chunked\r\n\r\n" + junk],
        lambda: [head + b"Transfer-Encoding: %s\r\n\r\n" % rng.choice([b"gzip, chunked", junk.hex().encode()])],
        lambda: [head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
        lambda: [head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 50],
        lambda: [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], lambda: [b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
        lambda: [b"GET / HTTP/1.1\r\n" + b"X-%d: y\r\n" % rng.randrange(99) * 500 + b"\r\n"],
        lambda: [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"], lambda: [b"GET / HTTP/9.9\r\n\r\n"],
        lambda: [b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 70_000 + b"\r\n\r\n"],
        lambda: [b"FROB / HTTP/1.1\r\nHost: localhost\r\n\r\n"], lambda: [b"GET /\r\n"], lambda: [b"GET"],
        lambda: [b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"],
        lambda: [b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % junk.replace(b"\n", b"")],
        lambda: [*post(odd), *post(good), b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"],  # pipelined
    ])()


def test_500_hostile_requests_and_the_next_good_one_is_answered(served, capfd):
    wait_until(lambda: not served.server.connections)
    good, rng = json.dumps({"messages": [user("x")], "max_tokens": 1}).encode(), random.Random(0)
    expected = served.says([user("What?")])
    for i in range(500):
        pieces = hostile(rng, good)
        answer = served.raw(*pieces, half=True)
        for status in re.findall(rb"^HTTP/1.1 (\d+)", answer, re.M):
            # a few mutations are still good; 505: HTTP/9.9
            assert status in (b"200", b"505") or 400 <= int(status) < 500, (pieces, answer)
        if answer and b" 200 " not in answer[:20]:
            assert b'{"error": {"message": ' in answer, (pieces, answer)
        if i % 50 == 0:
            assert served.says([user("What?")]) == expected
    assert served.says([user("What?")]) == expected
    wait_until(lambda: not served.server.connections and not served.server.engine.busy)
    log = capfd.readouterr().err
    assert "Traceback" not in log and log.replace("\n", "").isprintable()


def test_memory_files_and_threads_stay_level(served, photo):
    def state():
        import gc
        gc.collect()
        return (len(os.listdir("/proc/self/fd")), threading.active_count(),
                int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
    body = {"messages": [user("What is it?", photo)], "max_tokens": 1}
    with requests.Session() as session:
        for i in range(400):
            session.post(served.url + "/v1/chat/completions", json={**body, "stream": i % 2 == 0}).content
            if i == 100:
                files, threads, mib = state()
    after = state()
    assert after[0] <= files + 2 and after[1] <= threads + 2 and after[2] < mib + 30
    assert len(served.server.engine.pictures.known) <= 256


def test_sigterm_lets_running_answers_finish_and_no_new_one_begin(trained):
    process = subprocess.Popen([sys.executable, str(HERE / "sample.py"), "--serve", "--port=0", "--host=0.0.0.0",
                                f"--out_dir={trained[0]}", "--device=cpu"], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not (lines and "page" in lines[-1]):
            lines.append(process.stderr.readline())
        assert any("warning" in line and "--api_key" in line for line in lines)
        url = "http://127.0.0.1:" + re.search(r":(\d+)/", lines[-1])[1]
        with requests.post(url + "/v1/chat/completions", stream=True, json={
                "messages": [user("x")], "temperature": 2, "seed": 1, "max_tokens": 1000, "stream": True}) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(requests.ConnectionError):
                requests.post(url + "/v1/chat/completions", json={"messages": [user("y")]}, timeout=5)
            rest = [line for line in events if line]
            assert rest[-1] == b"data: [DONE]" and b'"finish_reason": "' in rest[-2]
        assert process.wait(15) == 0
    finally:
        process.kill()

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_and_talks(tmp_path, photo):
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)  # milliseconds: a busy machine
    there = Served(tmp_path, "--max_requests=4")  # the model that comes with the code
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, told, asked = browser.new_page(), [], []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(there.url)
        expect(page.locator("#model")).to_contain_text("tiny")
        # Dropped, drawn and removed again.
        page.locator("body").evaluate_handle("""(body, [raw, name]) => {
            const bytes = Uint8Array.from(atob(raw), c => c.charCodeAt(0)), data = new DataTransfer()
            data.items.add(new File([bytes], name, {type: "image/png"}))
            for (const kind of ["dragenter", "dragover", "drop"])
                document.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}))
        }""", [base64.b64encode(photo.read_bytes()).decode(), "photo.png"])
        expect(page.locator("#waiting figure")).to_have_count(1)
        page.click("#draw")
        expect(page.locator("#waiting figure")).to_have_count(2)
        page.click("#waiting figure:nth-child(2) button")
        # Words arrive one by one: slowed down, or they would be there at once. Then stopped.
        engine, step = there.server.engine, there.server.engine.step
        there.server.stop, kept = set(), there.server.stop
        engine.step = lambda: time.sleep(0.05) or step()
        page.fill("#text", "What is it?")
        page.press("#text", "Enter")
        text = page.locator(".bot .text")
        lengths = set()
        for _ in range(30):
            lengths.add(len(text.text_content()))
            time.sleep(0.03)
        assert len(lengths) > 5
        page.click("#send")  # now it says stop
        expect(page.locator(".bot .foot")).to_contain_text("stopped")
        wait_until(lambda: not engine.running)
        engine.step = step
        # An edited question takes the place of the first. Its answer is long: it grows under the pointer.
        page.click(".user .foot button")
        expect(page.locator("#text")).to_have_value("What is it?")
        page.fill("#text", "What is this?")
        page.press("#text", "Enter")
        expect(page.locator(".bot .text")).to_contain_text(re.compile(r"\w"))
        page.hover(".bot .text")  # before the answer has ended, and it does not move until the words are there
        expect(page.locator(".bot .foot")).to_contain_text("tokens")
        expect(page.locator(".user .text")).to_have_text(["What is this?"])
        there.server.stop = kept
        # The words under the pointer, and under the arrow keys, change the overlay.
        expect(page.locator(".bot .text span").first).to_be_visible()
        page.locator(".bot .text span").first.hover()
        expect(page.locator("figure canvas.on")).to_have_count(1)
        seen = page.locator("figure canvas").screenshot()
        page.mouse.move(1, 1)
        expect(page.locator("figure canvas.on")).to_have_count(0)
        time.sleep(0.3)
        assert page.locator("figure").screenshot() != seen
        page.focus(".bot .text")
        page.keyboard.press("ArrowRight")
        expect(page.locator("figure canvas.on")).to_have_count(1)
        # A picture without words is described, and what went wrong can be tried again.
        page.click("#new")
        page.click("#draw")
        page.fill("#text", "")
        expect(page.locator("#text")).to_have_attribute("placeholder", "Describe the picture.")
        page.evaluate("model.id = 'another'")
        page.press("#text", "Enter")
        expect(page.locator(".error")).to_contain_text("another")
        told.clear()  # the browser itself notes the 404
        page.evaluate("model.id = 'tiny'")
        page.click(".error button")
        expect(page.locator(".bot .foot")).to_contain_text("tokens")
        expect(page.locator(".error")).to_have_count(0)
        expect(page.locator(".user .text")).to_have_text(["Describe the picture."])
        expect(page.locator(".user img")).to_have_count(1)
        page.reload()  # the conversation is still there
        expect(page.locator(".user .text")).to_have_text(["Describe the picture."])
        expect(page.locator("figure img")).to_have_count(1)
        browser.close()
    there.server.shutdown()
    assert not told and all(url.startswith((there.url, "data:", "blob:")) for url in asked)


@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_asks_for_the_key(trained):
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)  # milliseconds: a busy machine
    there = Served(trained[0], "--api_key=clé", "--max_requests=4", "--max_new_tokens=5")
    assert requests.get(there.url + "/v1/models", headers={"Authorization": "Bearer clé".encode()}).ok  # as curl does
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(there.url)
        for key, said in (("ключ", "asks for one"), ("clé", "not accepted")):
            expect(page.locator("#key-note")).to_contain_text(said)
            page.fill("#key", key)
            page.press("#key", "Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        expect(page.locator(".error")).to_have_count(0)
        assert page.input_value("#length") == "5"  # --max_new_tokens
        # Another key counts from now on: the question that was refused is asked again with it.
        page.click("#draw")
        expect(page.locator("#waiting figure")).to_have_count(1)
        there.server.flags.api_key = "new"
        page.fill("#text", "What?")
        page.press("#text", "Enter")
        page.fill("#key", "new")
        page.press("#key", "Enter")
        expect(page.locator(".bot .foot")).to_contain_text("token")
        expect(page.locator(".error")).to_have_count(0)
        # A server that is gone, and back.
        page.route("**/v1/**", lambda route: route.abort())
        page.reload()
        expect(page.locator(".error")).to_contain_text("The server does not answer.")
        page.unroute("**/v1/**")
        page.click(".error button")
        expect(page.locator("#model")).to_contain_text("tiny")
        browser.close()
    there.server.shutdown()


@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_keeps_a_draft_while_an_earlier_question_is_edited_or_tried_again(served):
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)  # milliseconds: a busy machine
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(served.url)
        expect(page.locator("#model")).to_contain_text("tiny")
        # Without a picture a model of pictures would answer "no": one line instead, and nothing is lost.
        page.fill("#text", "What?")
        page.press("#text", "Enter")
        expect(page.locator(".error")).to_contain_text("only answer about pictures")
        expect(page.locator("#text")).to_have_value("What?")
        page.click("#draw")
        expect(page.locator("#waiting figure")).to_have_count(1)
        page.route("**/v1/**", lambda route: route.abort())
        page.press("#text", "Enter")
        expect(page.locator(".error")).to_be_visible()
        for _ in range(2):
            page.click("#draw")
        page.fill("#text", "my draft")
        expect(page.locator("#waiting figure")).to_have_count(2)
        page.unroute("**/v1/**")
        page.click(".error button")
        expect(page.locator(".bot .foot")).to_contain_text("token")
        for key in ("Escape", "Enter"):  # the edit is given up, then sent
            expect(page.locator("#text")).to_have_value("my draft")
            expect(page.locator("#waiting figure")).to_have_count(2)
            page.click(".user .foot button")
            page.click(".user .foot button")  # twice: what is edited is no draft
            expect(page.locator("#text")).to_have_value("What?")
            expect(page.locator("#waiting figure")).to_have_count(1)
            page.press("#text", key)
        expect(page.locator("#text")).to_have_value("my draft")
        expect(page.locator("#waiting figure")).to_have_count(2)
        expect(page.locator(".user")).to_have_count(1)
        browser.close()


def test_any_scene_suggests_four_questions_also_two_things_that_look_alike():
    twins = plumbing.world.Scene(tuple(plumbing.world.Thing("red", "cat", "large", cell, x, 0.5, False)
                                       for cell, x in ((3, 0.2), (5, 0.8))), "plain", 0)
    lone = plumbing.world.Scene(twins.things[:1], "plain", 0)
    for scene in [twins, lone] * 50 + [extras.asking.new_scene() for _ in range(200)]:
        asked = extras.server.scene_questions(scene)
        assert len(set(asked)) == len(asked) == 4 and not any("\n" in question for question in asked)


@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_introduces_the_model_suggests_questions_and_forgets_nothing(tmp_path):
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)  # milliseconds: a busy machine
    there = Served(tmp_path, "--max_requests=4")  # the model that comes with the code
    with sync_playwright() as play:
        browser, told = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]), []
        page = browser.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(there.url)
        expect(page.locator("#made")).to_contain_text("assets/tiny: rl, step 300 of 300, trained on the drawn world, ")
        expect(page.locator("#suggest")).to_be_hidden()
        page.set_input_files("#file", HERE / "cat.jpg")
        expect(page.locator("#suggest button")).to_have_text(extras.server.WORLD_QUESTIONS)
        page.click("#suggest button >> nth=1")
        expect(page.locator(".bot .text")).to_have_text(["4"])
        expect(page.locator("#suggest button")).to_have_count(3)  # what was asked is not suggested again
        # Another answer, not the likeliest once more.
        page.click(".again")
        expect(page.locator(".bot .foot")).to_contain_text("temperature 0.7")
        expect(page.locator(".user")).to_have_count(1)
        # Start over is undone, also after a reload; so is the theme kept, and the switch.
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.click("#new")
        expect(page.locator(".user")).to_have_count(0)
        page.reload()
        expect(page.locator("#hello")).to_be_visible()
        page.click("#undo")
        expect(page.locator(".user .text")).to_have_text(["How many things are there?"])
        page.reload()
        expect(page.locator(".user .text")).to_have_text(["How many things are there?"])
        expect(page.locator(".bot .again")).to_have_count(1)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        # Inside: the probability of a word and its four rivals, and the picture's nine latents.
        page.click("#inside")
        expect(page.locator(".latents canvas")).to_have_count(9)
        page.hover(".bot .text span")
        expect(page.locator("#rivals .own")).to_contain_text("4")
        expect(page.locator("#rivals div:not(.own)")).to_have_count(4)
        page.mouse.move(1, 1)
        expect(page.locator("#rivals")).to_be_hidden()
        page.reload()
        expect(page.locator(".latents canvas")).to_have_count(9)
        page.click("#inside")
        expect(page.locator(".latents")).to_be_hidden()
        # A picture opens large.
        page.click("#talk figure")
        expect(page.locator("#large img")).to_be_visible()
        assert page.locator("#large img").bounding_box()["width"] > 500
        page.keyboard.press("Escape")
        expect(page.locator("#large img")).to_be_hidden()
        # Markdown is shown, and HTML stays text.
        said = "# A head\n- **one** and\n2. `two` <img src=x onerror=alert(1)>\n```\na  = 1\n```\n2 * 3 * 4"
        event = "data: " + json.dumps({"choices": [{"delta": {"content": said}, "finish_reason": "stop"}]}) + "\n\n"
        page.route("**/chat/completions", lambda route: route.fulfill(body=event))
        page.fill("#text", "What?")
        page.click("#send")
        text = page.locator(".bot .text").last
        for inside, words in (("b", "one"), ("code", "two"), ("pre", "a  = 1\n"), (".head", "A head")):
            assert text.locator(inside).text_content() == words
        expect(text).to_contain_text("<img src=x onerror=alert(1)>")
        expect(text).to_contain_text("2 * 3 * 4")
        assert text.locator("img").count() == 0
        # A drawn scene comes with questions of its own.
        page.click("#draw")
        expect(page.locator("#suggest button")).to_have_count(5)
        browser.close()
        # Where there is no pointer, words are tapped.
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(has_touch=True, is_mobile=True).new_page()
        page.goto(there.url)
        expect(page.locator("#looks")).to_contain_text("Tap a word")
        browser.close()
    assert not told
    there.server.shutdown()


@pytest.mark.parametrize("preset, run, world, data, questions", [
    ("tiny", {"data": "world"}, True, ["world"], 4), ("tiny", {}, True, ["world"], 4),
    ("tiny", {"data": "world:2,/home/me/pets/train.json:0.5"}, True, ["world", "train.json"], 1),
    ("tiny", {"data": "pets/train.json", "questions": ["Which pet?"]}, False, ["train.json"], 1),
    ("small", {"data": "photos/"}, False, ["photos"], 1), ("llava-ov-0.5b", {}, False, [], 4),
    ("qwen2.5-0.5b", {"data": "llava-mix665k"}, False, ["llava-mix665k"], 4)])
def test_the_page_is_told_what_the_model_was_trained_on(served, preset, run, world, data, questions, monkeypatch):
    config = served.server.vlm.config
    monkeypatch.setattr(config, "preset", preset)
    monkeypatch.setattr(config, "run", run)
    (card, ) = requests.get(served.url + "/v1/models/").json()["data"]
    assert (card["world"], card["data"], len(card["questions"])) == (world, data, questions)
    assert requests.get(served.url + "/v1/models/tiny").json() == card
    assert requests.get(served.url + "/v1/models/gpt-4o").status_code == 404


def test_a_model_of_ones_own_pictures_is_introduced_as_such_and_its_data_s_questions_are_suggested(trained, tmp_path):
    asked = ["Which pet is it?", "Is it asleep?", "What is it called?" + " Say." * 40]
    rows = []
    for i in range(60):  # the question of each third is asked most
        plumbing.world.World("captions")[i]["images"][0].draw(72).save(tmp_path / f"{i}.png")
        rows.append({"id": i, "image": f"{i}.png", "conversations": [
            {"from": "human", "value": f"<image>\n{asked[0] if i % 3 == 0 else asked[i % 3]}"},
            {"from": "gpt", "value": "a cat"}]})
    (tmp_path / "pets.json").write_text(json.dumps(rows))
    ran = run("train_sft", "--steps=2", "--eval_size=9", "--batch_size=4", "--device=cpu",
              f"--out_dir={tmp_path / 'out'}", f"--init={trained[0] / 'tiny/sft'}", f"--data={tmp_path / 'pets.json'}")
    assert ran.code == 0, ran.err
    there = Served(tmp_path / "out", "--max_requests=4")
    (card, ) = requests.get(there.url + "/v1/models").json()["data"]
    assert card["checkpoint"] == "tiny/sft" and card["data"] == ["pets.json"] and not card["world"]
    assert card["questions"] and set(card["questions"]) <= set(asked[:2])
    there.server.shutdown()


@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_takes_any_picture_follows_the_answer_and_shows_at_the_first_tap_where_it_looked(tmp_path):
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)  # milliseconds: a busy machine
    there = Served(tmp_path, "--max_requests=4")  # the model that comes with the code

    def file(size, noise=False) -> dict:
        out, image = io.BytesIO(), Image.new("RGB", size, "red")
        (Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)) if noise else image).save(out, "PNG")
        return {"name": "a.png", "mimeType": "image/png", "buffer": out.getvalue()}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 700}, has_touch=True)
        page.goto(there.url)
        expect(page.locator("#model")).to_contain_text("tiny")
        page.set_input_files("#file", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
        expect(page.locator(".error")).to_contain_text("a.pdf")
        # Eight pictures fit into one request, and each into its number of pixels. What is transparent becomes white.
        lines = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M2 2h1v1"/></svg>'
        page.set_input_files("#file", [file((960, 960), True)] * 6 + [file((5100, 4000)), {
            "name": "a.svg", "mimeType": "image/svg+xml", "buffer": lines}])
        expect(page.locator("#waiting figure")).to_have_count(8)
        assert page.evaluate("waiting.join().length") < extras.connection.BODY
        pictures = [extras.server.read_picture(url) for url in page.evaluate("waiting")]
        assert max(image.width * image.height for image in pictures) < extras.server.PIXELS
        assert pictures[7].getpixel((0, 0)) == (255, 255, 255)
        # Side by side, a wide and a tall one keep their shapes: what is laid over them lies on them.
        page.reload()
        page.set_input_files("#file", [file((90, 40)), file((40, 90)), file((60, 60))])
        page.click("#send")
        expect(page.locator(".bot .foot")).to_contain_text("tokens")
        for figure in page.locator(".user figure").all():
            assert figure.bounding_box() == figure.locator("img").bounding_box()
        # A finger moves nothing before it taps.
        page.locator(".bot .text span").first.tap()
        expect(page.locator("figure canvas.on")).to_have_count(3)
        # An answer that comes faster than a page can glide is followed to its end.
        event = "data: " + json.dumps({"choices": [{"delta": {"content": "word\n"}, "finish_reason": "stop"}]}) + "\n\n"
        page.route("**/chat/completions", lambda route: route.fulfill(body=event * 300))
        page.fill("#text", "What?")
        page.click("#send")
        expect(page.locator(".bot .foot").last).to_contain_text("first word")
        expect(page.locator(".bot .foot").last).to_be_in_viewport()
        # The pictures have scrolled away: copies are shown, all of them, also on a phone, and not over the word.
        page.set_viewport_size({"width": 390, "height": 700})
        page.touchscreen.tap(20, 100)
        expect(page.locator("#lens canvas")).to_have_count(3)
        places = [canvas.bounding_box() for canvas in page.locator("#lens canvas").all()]
        assert min(place["x"] for place in places) >= 0 and min(place["y"] for place in places) > 130
        browser.close()
    there.server.shutdown()


@contextlib.contextmanager
def serving(*flags):
    "A server of the tiny model, over real sockets, until the block ends."
    with contextlib.redirect_stderr(io.StringIO()):
        server = Server(tiny_vlm().eval(), tokenizer(), parse_flags("", SAMPLE_FLAGS, argv=["--port=0", *flags]))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()


def ask_server(server, path: str, body: dict | None = None, **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body),
                       {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content)


def test_only_who_has_the_key_is_told_where_the_model_looked():
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(png(1))}}]},
                         {"role": "assistant", "content": "a cat"}]}
    with serving("--api_key=sesame") as server:
        assert ask_server(server, "/look", body)[0] == 401
        status, told = ask_server(server, "/look", body, Authorization="Bearer sesame")
        assert status == 200 and [word["text"] for word in told["words"]] == ["a", " cat"]


def test_a_page_of_another_site_is_not_answered():
    with serving() as server:
        here = f"http://127.0.0.1:{server.server_port}"
        for headers, status in (({}, 200), ({"Origin": here}, 200), ({"Origin": "http://evil.example"}, 403),
                                ({"Host": "evil.example"}, 403)):
            assert ask_server(server, "/v1/models", **headers)[0] == status


def test_the_257th_connection_is_closed_and_the_others_are_not():
    with serving() as server, contextlib.ExitStack() as stack:
        began = time.monotonic()
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=5))
                for _ in range(256)]
        while len(server.connections) < 256 and time.monotonic() < began + 5:
            time.sleep(0.01)
        late = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=15))
        assert late.recv(12) == b"HTTP/1.1 503"
        assert time.monotonic() < began + 15  # long before anyone has been idle for too long
        for one in (held[0], held[-1]):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(15) == b"HTTP/1.1 200 OK"


def test_a_picture_of_more_than_50_million_pixels_is_refused_though_it_could_be_decoded():
    def url(width: int, height: int) -> str:
        Image.new("1", (width, height)).save(file := io.BytesIO(), "PNG")  # a bit a pixel: a few KB
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert min(read_picture(url(8000, 6250)).size) > 1000  # decoded at half its size
    with pytest.raises(ValueError, match="8000 x 6251 pixels is over the limit of 50,000,000"):
        read_picture(url(8000, 6251))


def test_more_than_400_000_letters_are_refused_before_they_are_cut_into_tokens():
    def told(letters: int) -> str:
        messages = [{"role": "user", "content": ("one two " * 25_001)[:letters - 200_000]},
                    {"role": "assistant", "content": "one two " * 25_000}, {"role": "user", "content": ""}]
        status, answer = ask_server(server, "/v1/chat/completions", {"messages": messages})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        return answer["error"]["message"]
    with serving() as server:
        assert "letters" not in told(400_000) and "more than 400,000 letters" in told(400_001)
