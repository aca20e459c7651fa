"HTTP with strangers: pieces, hosts, origins, keys, and what the log says of a refusal."
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

import extras.connection
import sample
from tests.helpers import HERE, Served, one_line, run, user

pytest_plugins = ["tests.helpers"]  # its fixtures

GOOD = {"messages": [user("x")], "max_tokens": 1}
BODY = json.dumps(GOOD).encode()
HEAD = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\n")
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def pieces(body: bytes, size: int) -> bytes:
    parts = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("status, request_", {
    "bytes": (200, CHUNKED + pieces(BODY, 1)), "one": (200, CHUNKED + pieces(BODY, 9999)),
    "extension": (200, CHUNKED + b"%X;a=b\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(BODY), BODY)),
    "both": (400, HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces(BODY, 9)),
    "gzip": (400, HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + pieces(BODY, 9)),
    "old": (400, CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + pieces(BODY, 9)),
    "no_length": (400, CHUNKED + b"hello\r\n"),
    "longer": (400, CHUNKED + b"3\r\nhello\r\n0\r\n\r\n"), "huge": (413, CHUNKED + b"1312D01\r\n"),
    "behind": (400, CHUNKED + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 30),
    "crumbs": (413, CHUNKED + b"1\r\n \r\n" * 200), "neither": (411, HEAD + b"\r\n"),
    "on_get": (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two_hosts": (400, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"),
    "http2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
}.values(), ids=lambda value: str(value)[:3] if isinstance(value, int) else "")
def test_a_body_in_chunks_is_read_within_the_same_limits(served, status, request_, monkeypatch):
    monkeypatch.setattr(extras.connection, "CHUNKS", len(BODY) + 1)
    answer = served.raw(request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert status == 200 or b'"error"' in answer


def test_a_stream_that_is_cut_does_not_look_like_a_whole_one(trained):
    "kill -9, and SIGHUP, which is SIGTERM's way to end: the running answer may finish."
    asked = {"messages": [user("x")], "temperature": 2, "seed": 1, "max_tokens": 400, "stream": True}
    for number in (signal.SIGKILL, signal.SIGHUP):
        process = subprocess.Popen([sys.executable, str(HERE / "sample.py"), "--serve", "--port=0", "--device=cpu",
                                    f"--out_dir={trained[0]}"], stderr=subprocess.PIPE, text=True)
        try:
            url = next(line for line in process.stderr if "is a page" in line).split()[0]
            with requests.post(url + "v1/chat/completions", stream=True, json=asked) as answer:
                assert answer.headers["Transfer-Encoding"] == "chunked"
                events = answer.iter_lines()
                next(events)
                process.send_signal(number)
                if number == signal.SIGKILL:
                    with pytest.raises(requests.exceptions.ChunkedEncodingError):
                        list(events)
                else:
                    assert [line for line in events if line][-1] == b"data: [DONE]"
            assert process.wait(15) == (0 if number == signal.SIGHUP else -9)
        finally:
            process.kill()


def test_a_stream_in_http_1_0_ends_with_its_connection_and_in_1_1_the_connection_goes_on(served):
    body = json.dumps({**GOOD, "stream": True}).encode()
    for version, pieces_ in ((b"1.0", False), (b"1.1", True)):
        head = HEAD.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body)
        head, _, said = served.raw(head + body).partition(b"\r\n\r\n")
        assert (b"chunked" in head) == pieces_ and said.endswith(b"data: [DONE]\n\n" + b"\r\n0\r\n\r\n" * pieces_)
    connection, sockets = http.client.HTTPConnection(*served.address, timeout=30), set()
    for _ in range(3):
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        sockets.add(connection.sock)
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    assert len(sockets) == 1
    connection.close()
    # What comes behind a stream is refused as a request of its own, not as a part of the stream.
    head = HEAD.replace(b"Connection: close\r\n", b"") + b"Content-Length: %d\r\n\r\n" % len(body)
    assert served.raw(head + body, b"FROB\r\n\r\n").count(b"HTTP/1.1 4") == 1


@pytest.mark.parametrize("key", ["", "sesame"])
def test_names_and_origins(trained, key):
    there = Served(trained[0], f"--api_key={key}", "--allow_origins=http://localhost:3000, https://chat.example.com/",
                   "--max_requests=4")
    me = {"Authorization": "bEARER sesame"} if key else {}
    for name, status in (("host.docker.internal:8000", 200), ("printer.local", 200), ("a.localhost:1", 200),
                         ("chat.example.com", 200), ("evil.example", 200 if key else 403),
                         ("internal", 200 if key else 403),
                         ("evil.internal.example.com", 200 if key else 403)):
        assert there.post(GOOD, Host=name, **me).status_code == status, name
    # A proxy before us keeps the page's name, or puts ours: both ways the page that is named is answered.
    for origin, host, status in (
            ("http://localhost:3000", "localhost", 200), ("https://chat.example.com", "127.0.0.1", 200),
            ("http://chat.example.com", "127.0.0.1", 403), ("http://localhost:3001", "localhost", 403),
            ("null", "localhost", 403)):
        answer = there.post(GOOD, Host=host, Origin=origin, **{"X-Forwarded-Host": origin.split("/")[-1]}, **me)
        assert answer.status_code == status, (origin, host)
        assert answer.headers.get("Access-Control-Allow-Origin") == (origin if status == 200 else None)
        names = "authorization,content-type,x-stainless-os"
        asked = {"Origin": origin, "Host": host, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": names}
        before = requests.options(there.url + "/v1/chat/completions", headers=asked)
        assert before.status_code == status
        assert status == 403 or before.headers["Access-Control-Allow-Headers"] == names
    # A refusal, too, can be read by the page that is named.
    wrong = there.post({"messages": 5}, Origin="http://localhost:3000", **me)
    assert wrong.status_code == 400 and wrong.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    there.server.shutdown()
    one_line(run("sample", "--serve", "--allow_origins=*"), "--allow_origins=*", "http://localhost:3000")


def test_every_refusal_says_why_in_the_log_and_what_would_do(trained, capfd):
    there = Served(trained[0], "--api_key=sesame", "--max_requests=4")
    me = {"Authorization": "Bearer sesame"}
    there.post({**GOOD, "tools": [{"type": "function"}]}, **me)
    assert there.post(GOOD).headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(there.url + "/v1/completions", headers=me).headers["Allow"] == "POST"
    assert requests.delete(there.url + "/v1/models", headers=me).headers["Allow"] == "GET, HEAD"
    assert requests.request("FROB", there.url + "/").headers["Allow"]
    log = capfd.readouterr().err.splitlines()
    for line, reason in zip(log[-5:], ("tools is not supported", "the API key", "no GET", "no DELETE", "FROB")):
        assert reason in line and " 4" in line, log
    there.server.shutdown()


@pytest.mark.parametrize("kind", ["used", "not_allowed", "no_address"])
def test_a_port_that_cannot_be_had_is_said_before_the_model_is_loaded(kind, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda flags: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other, contextlib.ExitStack() as stack:
        port = other.getsockname()[1] if kind == "used" else 70_000 if kind == "no_address" else 1
        if kind == "not_allowed" and os.geteuid() == 0:  # root may have any port
            def refuse(self, address):
                raise PermissionError(13, "Permission denied")
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(socket, "socket", type("Socket", (socket.socket, ), {"bind": refuse}))
        one_line(run("sample", "--serve", f"--port={port}", main=sample.main), f"--port={port}", "choose another")


def test_who_got_no_row_when_the_server_ends_is_told_so_and_who_is_cut_too(trained, monkeypatch):
    there = Served(trained[0], "--max_requests=4")
    engine, step = there.server.engine, there.server.engine.step
    there.server.stop = set()
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.02) or step())
    with requests.post(there.url + "/v1/chat/completions", json={**GOOD, "n": 4, "max_tokens": 2000, "stream": True},
                       stream=True) as running:
        events = running.iter_lines()
        while b'"content": "' not in next(events).replace(b'"content": ""', b""):
            pass
        body = json.dumps(GOOD).encode()
        with socket.create_connection(there.address, timeout=20) as waits:
            waits.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            while len(there.server.open) < 5:
                time.sleep(0.01)
            there.server.ending = True
            said = waits.recv(9999)
        assert said.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in said
        there.server.cut = True
        rest = [line for line in events if line]
        assert b'data: {"error": {"message": ' in rest[-1] and b"length" not in b"".join(rest)
    there.server.shutdown()
