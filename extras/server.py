"""
The server: OpenAI's chat completions, and a page. Called by `python sample.py --serve`. It answers strangers, so every
limit is here, and has a test.

A request's way: Handler.route checks who asks; read_fields, read_messages and read_request check what is asked and
make Requests of it; Server.generate computes their tokens, together with everyone else's; Handler.words makes text of
them; Handler.complete sends it.
"""
import base64
import contextlib
import http.server
import io
import ipaddress
import json
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from pathlib import Path

from PIL import Image

from plumbing.engine import Request
from plumbing.files import parse_json, say
from plumbing.pictures import load_image
from model import FROM_SCRATCH, VLM
from tokenizer import Tokenizer
from extras.asking import CONTEXT, SAMPLING, Text, draw_scene, make_message, open_engine, options, render, to_pixels
from extras.attention_maps import where_it_looked, words_of

BODY = 20_000_000       # bytes of a request

PICTURES = 8            # of a request

PIXELS = 20_000_000     # of a picture

TURNS = 100             # messages of a request

LETTERS = 400_000       # of their texts: more cannot fit into CONTEXT, and to cut them into tokens would take long

CHOICES = 8             # answers to one request (n)

WAITING = 128           # answers that wait for a row; then 429

CONNECTIONS = 256       # open at once; each has a thread

SECONDS = 120           # for one answer, waiting included

IDLE = 20               # seconds in which the next request must have arrived as a whole

TELL = 0.001            # seconds for each running answer, between two times that all clients get their tokens

PATIENCE = 0.0003       # seconds that newcomers wait for each other, for each request that stands still meanwhile

GRACE = 10              # seconds for what is being answered when the server is told to end

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # not all that Pillow opens: EPS, for one, starts another program

DECODING = threading.Semaphore(2)  # pictures unpacked at once: each may take 3 bytes a pixel

PAGE = Path(__file__).parents[1] / "assets" / "page.html"


class Refused(ValueError):
    "An answer in the form of OpenAI's errors. param: the field at fault; code: what programs tell errors apart by."

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        self.status, self.body = status, {"error": {
            "message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": code}}


class Server(socketserver.ThreadingTCPServer):
    """
    A thread for each connection, and one for the engine: it alone computes. They meet in three places:

        inbox    functions of the connections' threads, which the engine's calls between two tokens: "answer these, too"
        answer   a Request's list of tokens, which the engine's thread makes longer and a connection's thread reads
        news     an Event by which the engine wakes the connection's thread: there are more tokens
    """
    # Not http.server's own class: it would ask a name server who we are, which may take seconds.
    allow_reuse_address, daemon_threads, block_on_close, request_queue_size = True, True, False, 128

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, flags):
        self.vlm, self.tokenizer, self.flags, self.name = vlm, tokenizer, flags, vlm.config.preset or "model"
        self.engine = open_engine(vlm, tokenizer, flags.max_requests)
        self.stop = set(tokenizer.stop_ids)
        self.inbox = queue.SimpleQueue()  # functions, for the engine's thread
        self.lock, self.open, self.ending = threading.Lock(), {}, False  # open: {request: its news}, unanswered ones
        self.connections = set()
        self.address_family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        try:
            super().__init__((flags.host, flags.port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host={flags.host} --port={flags.port}: {error}; choose another") from None
        self.server_port = self.server_address[1]
        threading.Thread(target=self.generate, daemon=True).start()

    # Three methods that socketserver calls at the beginning and the end of a connection, and when its thread fails.

    def verify_request(self, request, client_address) -> bool:
        self.connections.add(request)
        return len(self.connections) <= CONNECTIONS

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # those are connections that broke
            traceback.print_exc()

    @contextlib.contextmanager
    def answering(self, requests: list[Request]):
        """
        The block waits for the answers, and gets the Event that tells of news of them. However the block ends, also
        because the client hung up, their rows are free again.
        """
        news = threading.Event()
        with self.lock:
            if self.ending:
                raise Refused(503, "the server is about to end; ask again later")
            if len(self.open) + len(requests) > self.engine.rows + WAITING:
                raise Refused(429, f"{WAITING} answers are waiting already; ask again in a few seconds",
                              code="rate_limit_exceeded")
            self.open |= dict.fromkeys(requests, news)
        self.inbox.put(lambda: self.engine.waiting.extend(requests))
        try:
            yield news
        finally:
            with self.lock:
                for request in requests:
                    request.finish = request.finish or "cancelled"
                    del self.open[request]

    def generate(self) -> None:
        "The engine's thread: what is in the inbox, then one token more for everyone, and so on."
        opened = told = 0.0
        while True:
            engine, now = self.engine, time.monotonic()
            # Several prompts at once take hardly longer than one, and everyone else stands still for it. So the inbox
            # is opened less often the more there are. What comes while it is being emptied waits for the next time.
            if now - opened >= PATIENCE * len(engine.running):
                opened = now
                for _ in range(max(self.inbox.qsize(), 0 if engine.busy else 1)):  # nothing to do: it sleeps in get
                    self.inbox.get()()
            try:
                ended = engine.step()
            except Exception:  # noqa: BLE001 out of memory, for one: these answers fail, the next ones need not
                traceback.print_exc()
                ended = [*engine.running.values(), *engine.waiting]
                for request in ended:
                    request.finish = "error"
                engine.close()  # the new one takes over its memory
                self.engine = open_engine(self.vlm, self.tokenizer, self.flags.max_requests)
            # To wake a thread for every token of every client would take longer than to compute them: the more clients,
            # the more tokens come at once. A first token, and the end, are told at once.
            running = list(self.engine.running.values())
            due = now - told > TELL * len(running)
            told = now if due else told
            for request in ended + [request for request in running if due or len(request.answer) == 1]:
                if news := self.open.get(request):
                    news.set()


# The fields that a request may have: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, ...}
# Numbers have a kind and a range, others a type. top_k and repetition_penalty are not OpenAI's but vLLM's.
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 1e-6, 1), "top_k": (int, 0, 10 ** 6),
           "repetition_penalty": (float, 0.1, 10), "seed": (int, -2 ** 63, 2 ** 63 - 1), "n": (int, 1, CHOICES),
           "max_tokens": (int, 1, CONTEXT), "max_completion_tokens": (int, 1, CONTEXT)}

OTHERS = {"messages": list, "model": str, "stop": (str, list), "stream": bool, "stream_options": dict}

# What would change the answer and is not built in is refused, never ignored. With these values it changes nothing.
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [],
           "response_format": {"type": "text"}, "modalities": ["text"]}

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # for statistics only


def read_fields(server: Server, body: dict) -> dict:
    "The JSON body of a request -> its fields that are not null, checked."
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in NUMBERS:
            kind, least, most = NUMBERS[name]
            if type(value) not in (int, kind) or not least <= value <= most:  # type: True is an instance of int
                kind = "an integer" if kind is int else "a number"
                raise Refused(400, f"{name} must be {kind} from {least} to {most}", name)
        elif name in OTHERS:
            if not isinstance(value, OTHERS[name]):
                raise Refused(400, f"{name} is of the wrong type: {type(value).__name__}", name)
        elif name not in IGNORED and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise Refused(400, f"{name[:50]} is not supported by this server", name[:50], "unsupported_parameter")
    if fields.get("model", server.name) != server.name:
        raise Refused(404, f"the model {fields['model'][:50]!r} is not here; this is {server.name}", "model",
                      "model_not_found")
    stops = fields.get("stop", [])
    fields["stop"] = stops = [stops] if isinstance(stops, str) and stops else list(stops)
    if len(stops) > 4 or not all(type(stop) is str and 0 < len(stop) <= 100 for stop in stops):
        raise Refused(400, "stop must be a text or up to 4 texts, of at most 100 letters", "stop")
    return fields


def read_picture(url: str) -> Image.Image:
    "A data URI -> an RGB picture."
    head, _, content = url.partition(",")
    # http: and file: would make this server fetch for strangers what only it can reach.
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head[:100]):
        raise ValueError("send the picture itself, as data:image/png;base64,...; other addresses are not opened")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)), formats=FORMATS)
    except Exception as error:  # noqa: BLE001 see load_image
        raise ValueError(f"not a readable picture ({' '.join(str(error).split())[:100]})") from None
    if image.width * image.height > PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is over the limit of {PIXELS:,}")
    with DECODING:
        return load_image(image, "the picture")


def read_message(message, images: list) -> dict:
    "One of OpenAI's messages -> one of ours. Its pictures are added to `images`."
    match message:
        case {"role": "system" | "developer" | "user" | "assistant" as role, "content": str() | list() as content}:
            parts, before = [], len(images)
        case _:
            raise ValueError("role must be system, user or assistant, and content a text or a list of parts")
    for i, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        match part:
            case {"type": "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} if role == "user":
                images.append(read_picture(url))
                parts.append({"type": "image"})
            case _:
                raise ValueError(f"part {i} is neither a text nor, of a user, an image_url with a data: URI")
        if len(images) > PICTURES:
            raise ValueError(f"more than {PICTURES} pictures")
    role = role.replace("developer", "system")
    if re.search("ti+t", "".join(part["type"][0] for part in parts)):  # pictures between texts have their place there
        return {"role": role, "content": parts}
    # Else pictures first, then the words: the order in which the model has learned them.
    return make_message("\n".join(part["text"] for part in parts if "text" in part), len(images) - before, role)


def read_messages(server: Server, messages) -> tuple[list, list]:
    "-> (our messages, the pixels of their pictures)."
    if not isinstance(messages, list) or not 1 <= len(messages) <= TURNS:
        raise Refused(400, f"messages must be a list of 1 to {TURNS}; for more, start over", "messages")
    out, images = [], []
    for i, message in enumerate(messages):
        try:
            out.append(read_message(message, images))
        except ValueError as error:
            raise Refused(400, f"messages[{i}]: {error}", f"messages[{i}]") from None
    if sum(len(part.get("text", "")) for message in out for part in message["content"]) > LETTERS:
        raise Refused(400, f"more than {LETTERS:,} letters of text", "messages", "context_length_exceeded")
    return out, [to_pixels(server.vlm, image, server.flags, alone=len(images) == 1) for image in images]


def read_request(server: Server, fields: dict) -> list[Request]:
    "-> one Request for each of the n choices. Only their seeds differ; the engine prefills their prompt once."
    messages, pixels = read_messages(server, fields.get("messages"))
    prompt, width = render(server.vlm, server.tokenizer, messages, pixels), server.engine.width
    given = options(server.vlm, server.flags)
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if len(prompt.ids) + (most or 1) > width:
        raise Refused(400, f"{len(prompt.ids):,} tokens and an answer of up to {most or 1:,}: there is room for "
                      f"{width:,}; send less, or start over", "messages", "context_length_exceeded")
    given["max_new_tokens"] = most or min(given["max_new_tokens"], width - len(prompt.ids))
    given |= {name: fields[name] for name in SAMPLING if name in fields}
    seed = fields.get("seed", secrets.randbits(31))
    return [Request(prompt, pixels, stop=server.stop, seed=seed + i, **given) for i in range(fields.get("n", 1))]


class Incoming(socket.SocketIO):
    "What a connection receives. All bytes of a request share one deadline: a slow sender must not hold its thread."
    deadline = 0.0

    def readinto(self, buffer) -> int:
        self._sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        return super().readinto(buffer)


class Handler(http.server.BaseHTTPRequestHandler):
    "One connection: requests and answers, one after the other. http.server reads their first lines and headers."
    # default_request_version: 0.9 knows no headers, and a malformed first line would be answered without any.
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version, disable_nagle_algorithm = "GhostVis", "", True
    events = False  # whether the head of a stream of events has been sent

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Incoming(self.connection, "r"))

    def handle_one_request(self) -> None:
        self.rfile.raw.deadline = time.monotonic() + IDLE
        super().handle_one_request()

    def log_message(self, format: str, *args) -> None:
        # Escaped: what a client sends must not forge lines or move the cursor of the terminal.
        say(f"{self.client_address[0]} {(format % args)[:200].encode('unicode_escape').decode()}")

    def send(self, content, kind: str = "application/json", status: int = 200, **headers) -> None:
        "content: bytes, or what is sent as JSON; None: it follows as a stream of events."
        self.connection.settimeout(IDLE)  # Incoming has set another
        self.send_response(status)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers |= {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
        headers |= {"Content-Length": len(body)} if content is not None else {}
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if content is not None and self.command != "HEAD":
            self.wfile.write(body)

    def send_event(self, value) -> None:
        "Server-sent events: lines such as data: {...}, each followed by an empty one."
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def refuse(self, error: Refused) -> None:
        self.close_connection = True  # what is left of a body would be taken for the next request
        if self.events:  # too late for a status; clients read this too
            return self.send_event(error.body)
        self.send(error.body, status=error.status, **{"Retry-After": 5} if error.status in (429, 503) else {})

    def send_error(self, code, message=None, explain=None) -> None:
        "What http.server itself finds wrong: a request line, a header, a method."
        self.refuse(Refused(405 if code == 501 else min(code, 499), str(message or code)[:200]))

    def route(self) -> None:
        path, command = self.path.split("?")[0], self.command.replace("HEAD", "GET")
        method, answer = {
            "/": ("GET", self.get_page), "/health": ("GET", self.get_health), "/draw": ("GET", self.get_scene),
            "/v1/models": ("GET", self.get_models), "/v1/chat/completions": ("POST", self.complete),
            "/look": ("POST", self.look)}.get(path, ("", None))
        try:
            self.guard(path)
            if command != method:
                raise Refused(405 if method else 404, f"there is no {command} {path[:100]} here")
            if command == "GET" and self.headers.get("Content-Length", "0") != "0":
                raise Refused(400, "a GET has no body")
            answer()
        except ValueError as error:  # any other: a conversation that cannot be rendered, a body that is no JSON, ...
            self.refuse(error if isinstance(error, Refused) else Refused(400, str(error)[:500]))
        except OSError:  # the connection broke, see Server.handle_error
            raise
        except Exception:  # noqa: BLE001 a mistake of ours; the next request need not suffer
            traceback.print_exc()
            self.refuse(Refused(500, "an error inside the server; its log says more"))

    do_GET = do_HEAD = do_POST = route

    def guard(self, path: str) -> None:
        "A page elsewhere must not reach a local server through its visitor's browser."
        host = self.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        try:  # An attacker's name may point here (DNS rebinding); a bare address cannot be of that kind.
            ipaddress.ip_address(name)
        except ValueError:
            if name not in ("localhost", self.server.flags.host.lower(), socket.gethostname().lower()):
                raise Refused(403, "the Host header names another machine") from None
        if self.headers.get("Origin") not in (None, f"http://{host}", f"https://{host}"):
            raise Refused(403, "requests of pages from elsewhere are not answered")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "send the body as one piece, with its Content-Length")
        key = self.server.flags.api_key
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it came
        # compare_digest takes equally long for all wrong keys: the time does not tell how much of one is right.
        if key and path not in ("/", "/health") and not secrets.compare_digest(sent, key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def read_json(self) -> dict:
        "The body, checked before and while it is read: its length is what the client says, and may be a lie."
        length = ", ".join(self.headers.get_all("Content-Length", []))
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refused(411, "one Content-Length is needed")
        if int(length) > BODY:
            raise Refused(413, f"a body of {length} bytes is over the limit of {BODY:,}")
        # The other types are those that a form of a page elsewhere could send without being asked.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ConnectionError("hung up")
        body = parse_json(raw, "the body")
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return body

    def get_page(self) -> None:
        # Only what is in the page itself runs: its script and its style know the word that is made up for this answer.
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: "
                  "blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        self.send(page.encode(), "text/html; charset=utf-8", **{"Content-Security-Policy": policy})

    def get_health(self) -> None:
        running = len(self.server.engine.running)
        self.send({"status": "ending" if self.server.ending else "ok", "running": running,
                   "waiting": max(0, len(self.server.open) - running)})

    def get_models(self) -> None:
        vlm, flags = self.server.vlm, self.server.flags
        self.send({"object": "list", "data": [{
            "id": self.server.name, "object": "model", "created": 0, "owned_by": "ghostvis",
            "context": self.server.engine.width, "sees": vlm.vit is not None, "most_pictures": PICTURES,
            "world": vlm.config.preset in FROM_SCRATCH,
            "parameters": sum(p.numel() for p in vlm.parameters()), "defaults": options(vlm, flags)}]})

    def get_scene(self) -> None:
        file = io.BytesIO()
        draw_scene().save(file, "PNG")
        self.send(file.getvalue(), "image/png")

    def complete(self) -> None:
        "The chat completions of OpenAI's API, as one JSON object or as a stream of events."
        fields = read_fields(self.server, self.read_json())
        requests, streamed = read_request(self.server, fields), fields.get("stream", False)
        head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": self.server.name,
                "object": "chat.completion" + ".chunk" * streamed}
        said, why = [""] * len(requests), [""] * len(requests)  # of each choice: its text, and why it has ended

        def send_chunk(i: int, delta: dict, finish: str | None = None) -> None:
            self.send_event({**head, "choices": [{"index": i, "delta": delta, "finish_reason": finish}]})

        with self.server.answering(requests) as news:
            if streamed:
                self.events = self.close_connection = True  # the end of the connection is the end of the body
                self.send(None, "text/event-stream")
                for i in range(len(requests)):
                    send_chunk(i, {"role": "assistant", "content": ""})
            for i, new, why[i] in self.words(requests, fields["stop"], news):
                said[i] += new
                if streamed and (new or why[i]):
                    send_chunk(i, {"content": new} if new else {}, why[i] or None)
        prompt, answer = len(requests[0].prompt.ids), sum(len(request.answer) for request in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
                 "prompt_tokens_details": {"cached_tokens": requests[0].reused}}
        if streamed:
            if fields.get("stream_options", {}).get("include_usage"):
                self.send_event({**head, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        self.send({**head, "usage": usage, "choices": [
            {"index": i, "finish_reason": why[i], "logprobs": None,
             "message": {"role": "assistant", "content": text, "refusal": None}} for i, text in enumerate(said)]})

    def words(self, requests: list[Request], stops: list[str], news: threading.Event):
        "-> (which choice, its new text, why it has ended or an empty string), as tokens arrive."
        until, texts = time.monotonic() + SECONDS, {i: Text(self.server.tokenizer, stops) for i in range(len(requests))}
        while texts:
            news.wait(0.2)
            news.clear()  # before the tokens are read: what comes later sets it again
            if self.gone():  # an answer to nobody would hold its row to the end
                raise ConnectionError("hung up")
            for i, text in list(texts.items()):
                # The end is read before the tokens: the engine writes it behind the last of them.
                request, finish = requests[i], requests[i].finish or "length" * (time.monotonic() > until)
                if finish == "error":
                    raise Refused(500, "an error inside the server; its log says more")
                new = text.add(request.answer[text.tokens:], last=bool(finish))
                finish = "stop" if text.ended else finish
                if finish:
                    request.finish = request.finish or "cancelled"  # its row is free while the other choices go on
                    del texts[i]
                yield i, new, finish

    def gone(self) -> bool:
        "Whether the client has hung up."
        # A closed connection can be read, and gives nothing. MSG_PEEK leaves what else is there for the next request.
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def look(self) -> None:
        "The page's question where each word of an answer, the last message, was seen."
        server = self.server
        messages, pixels = read_messages(server, self.read_json().get("messages"))
        if messages[-1]["role"] != "assistant" or not pixels:
            raise Refused(400, "a conversation with a picture, and the answer as its last message", "messages")
        prompt = render(server.vlm, server.tokenizer, messages[:-1], pixels)
        answer = server.tokenizer.encode(messages[-1]["content"][0]["text"])
        if not 0 < len(answer) <= server.engine.width - len(prompt.ids):
            raise Refused(400, "an empty answer, or one that is too long", "messages")
        # The engine's thread comes to the barrier between two tokens, and stands still until this one is there again.
        still = threading.Barrier(2)
        server.inbox.put(lambda: [still.wait(), still.wait()])
        still.wait()
        try:
            maps = where_it_looked(server.vlm, prompt, pixels, answer)
        finally:
            still.wait()
        self.send({"words": [{"text": word, "maps": [(m * 255).int().tolist() for m in shares]}
                             for word, shares in words_of(server.tokenizer, answer, maps)]})


def serve(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Until SIGTERM or Ctrl-C: then no new requests, and those that run may finish."
    local = flags.host in ("localhost", "::1") or flags.host.startswith("127.")
    if not local and not flags.api_key:
        say(f"warning: --host={flags.host} can be reached from other machines, and there is no --api_key")
    server, end = Server(vlm, tokenizer, flags), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    say(f"http://{host}:{server.server_port}/ is a page; the API is under /v1 (model {server.name}); Ctrl-C ends")
    end.wait()
    server.ending = True
    server.shutdown()
    server.server_close()  # who comes now is refused; connections that are open go on
    until = time.monotonic() + GRACE
    while server.open and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # the last words are on their way
    say("ended")
