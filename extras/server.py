"""
The server: OpenAI's completions, and a page. Called by `python sample.py --serve`. It answers strangers, so everything
has its limit: here, in connection.py and in fields.py, and each limit has a test.

A request's way: Connection.guard (connection.py) checks who asks; read_fields (fields.py), read_messages and
read_request check what is asked and make Requests of it; Server.generate computes their tokens, together with everyone
else's; Handler.words makes text of them; Handler.complete sends it.
"""
import base64
import collections
import contextlib
import io
import json
import queue
import random
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
import urllib.parse
from pathlib import Path

from PIL import Image

from plumbing.engine import Request
from plumbing.files import say
from plumbing.pictures import load_image
from plumbing.world import QUESTIONS, Scene, ask
from model import FROM_SCRATCH, VLM
from tokenizer import Rendered, Tokenizer
from extras.answers import Answer, score_prompt
from extras.asking import (SAMPLING, Text, make_message, new_scene, open_engine, open_pixels, options, render)
from extras.attention_maps import latent_maps, where_it_looked, words_of
from extras.connection import Connection
from extras.fields import Refused, check_message, count_rivals, read_fields

PICTURES = 8            # of a request

PIXELS = 50_000_000     # of a picture; a phone's have up to 50 million

LARGE = 20_000_000      # pixels; what has more is decoded alone, and at half its width and height

TURNS = 100             # messages of a request

LATENTS = 64            # of a picture that the page is told of

PROMPTS = 32            # texts to be continued, of a request

LETTERS = 400_000       # of their texts: more would fit into no context, and to cut them into tokens would take long

WAITING = 128           # answers that wait for a row; then 429

CONNECTIONS = 256       # open at once; each has a thread

TELL = 0.001            # seconds for each running answer, between two times that all clients get their tokens

PATIENCE = 0.0003       # seconds that newcomers wait for each other, for each request that stands still meanwhile

GRACE = 10              # seconds for what is being answered when the server is told to end

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # not all that Pillow opens: EPS, for one, starts another program

# Pictures unpacked at once: each may take 3 bytes a pixel. A large one takes both places.
DECODING, ALONE = threading.Semaphore(2), threading.Lock()

PAGE = Path(__file__).parents[1] / "assets" / "page.html"


def scene_questions(scene: Scene) -> list[str]:
    "Four questions that have an answer in this scene, of different kinds where it has so many."
    rng = random.Random(secrets.randbits(32))
    kinds = [kind for kind in rng.sample(list(QUESTIONS), len(QUESTIONS)) if kind != "choice"]  # that one has six lines
    # In four rounds: two things that look alike can only be counted and searched for, in three wordings each.
    asked = filter(None, (ask(kind, scene, rng) for kind in kinds * 4))
    return list(dict.fromkeys(question for question, _ in asked))[:4]


# Of any picture; a model that learned from its owner's data has the most frequent questions of those (train_sft.py).
WORLD_QUESTIONS = ["Describe the picture.", "How many things are there?", "What is the largest thing?",
                   "Is there a red cat?"]
COMMON_QUESTIONS = ["Describe the picture.", "What is the most striking thing here?", "What does the text say?",
                    "What might happen next?"]


def about(vlm: VLM) -> dict:
    "What the page tells of the model: its checkpoint, what it was trained on and when, questions it can answer."
    run, scratch = vlm.config.run, vlm.config.preset in FROM_SCRATCH
    # world,pets/train.json:2 -> world, train.json: without weights, and without the folders of this machine.
    data = [re.sub(r":[\d.]+$", "", part).rstrip("/").split("/")[-1]
            for part in run.get("data", "world" * scratch).split(",") if part]
    world = "world" in data
    known = run.get("questions") or (WORLD_QUESTIONS if data == ["world"] else COMMON_QUESTIONS[:1 if scratch else 4])
    folder = "/".join(Path(vlm.source).parts[-2:]) if "saved" in run else ""  # of released weights: one of the cache
    return {"checkpoint": folder, "stage": run.get("stage", ""), "step": run.get("step"), "steps": run.get("steps"),
            "data": data, "world": world, "scratch": scratch, "questions": known,
            "latents": vlm.config.bridge.num_tokens if vlm.vit else 0}


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
        self.told = set()  # unknown fields that the log has named
        self.cut = False   # the server ends, and waits no longer
        self.origins = {origin.strip().rstrip("/") for origin in flags.allow_origins.split(",") if origin.strip()}
        # Those that were one too many, and when the log last said so. They stay open for a while: to close at once
        # what has not been read would take back the answer.
        self.connections, self.refused, self.noted = set(), collections.deque(maxlen=64), 0.0
        self.address_family = family(flags.host)
        super().__init__((flags.host, flags.port), Handler)
        self.server_port = self.server_address[1]
        threading.Thread(target=self.generate, daemon=True).start()

    # Three methods that socketserver calls at the beginning and the end of a connection, and when its thread fails.

    def verify_request(self, request, client_address) -> bool:
        self.connections.add(request)
        if len(self.connections) <= CONNECTIONS:
            return True
        if time.monotonic() - self.noted > 1:  # a flood must not fill the log
            self.noted = time.monotonic()
            say(f"more than {CONNECTIONS} connections: 503 for the next ones")
        body = json.dumps(Refused(503, f"{CONNECTIONS} connections are open; ask again in a few seconds").body).encode()
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
                         b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            request.shutdown(socket.SHUT_WR)
        self.refused.append(request)
        return False

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        if request not in self.refused:
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

    @contextlib.contextmanager
    def paused(self):
        "The block may use the model: the engine's thread comes to the barrier between two tokens, and stands still."
        still = threading.Barrier(2)
        self.inbox.put(lambda: [still.wait(), still.wait()])
        still.wait()
        try:
            yield
        finally:
            still.wait()

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


def read_picture(url: str) -> Image.Image:
    "A data URI -> an RGB picture."
    head, _, content = url.partition(",")
    # http: and file: would make this server fetch for strangers what only it can reach.
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head[:100]):
        raise ValueError("send the picture itself, as data:image/png;base64,...; other addresses are not opened")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)), formats=FORMATS)
        # The decoders of other formats keep several copies: WEBP's would need a gigabyte.
        most = PIXELS if image.format in ("JPEG", "MPO", "PNG") else LARGE
        if image.width * image.height > most:
            raise ValueError(f"{image.width} x {image.height} pixels is over the limit of {most:,}")
        if image.width * image.height > LARGE:
            with ALONE, DECODING, DECODING:
                half = image.width // 2, image.height // 2
                image.draft(None, half)  # a JPEG is never larger than this in memory; others are, but not as RGB
                return load_image(image if image.width < 2 * half[0] else image.resize(half, Image.Resampling.BOX),
                                  "the picture")
    except Exception as error:  # noqa: BLE001 see load_image
        raise ValueError(f"not a readable picture ({' '.join(str(error).split())[:100]})") from None
    with DECODING:
        return load_image(image, "the picture")


def read_message(message, images: list) -> dict:
    "One of OpenAI's messages -> one of ours. Its pictures are added to `images`."
    check_message(message)
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
    return out, [open_pixels(server.vlm, image, alone=len(images) == 1) for image in images]


def read_sampling(server: Server, fields: dict, length: int) -> dict:
    "How to answer a prompt of this many tokens: as Request's fields. max_tokens is a limit, which room may lower."
    given, room = options(server.vlm, server.flags), server.engine.width - length
    if room < 1:
        raise Refused(400, f"{length:,} tokens: there is room for {server.engine.width:,} with the answer; send less, "
                      "or start over", "messages" if "messages" in fields else "prompt", "context_length_exceeded")
    most = fields.get("max_completion_tokens", fields.get("max_tokens", given["max_new_tokens"]))
    given |= {name: fields[name] for name in SAMPLING if name in fields}
    return given | {"max_new_tokens": min(most, room), "stop": server.stop}


def read_request(server: Server, fields: dict, rivals: int) -> list[Request]:
    "-> one Request for each of the n choices. Only their seeds differ; the engine prefills their prompt once."
    messages, pixels = read_messages(server, fields.get("messages"))
    prompt = render(server.vlm, server.tokenizer, messages, pixels)
    given, seed = read_sampling(server, fields, len(prompt.ids)), fields.get("seed", secrets.randbits(31))
    return [Request(prompt, pixels, seed=seed + i, rivals=rivals, **given) for i in range(fields.get("n", 1))]


def read_prompts(server: Server, fields: dict, rivals: int) -> list[Request]:
    "Of /v1/completions: a text, its ids, or a list of either, to be continued -> n Requests for each."
    prompts, tokenizer = fields.get("prompt", ""), server.tokenizer
    if isinstance(prompts, str) or prompts and all(type(token) is int for token in prompts):
        prompts = [prompts]
    if not 1 <= len(prompts) <= PROMPTS or sum(len(p) if isinstance(p, (str, list)) else 0 for p in prompts) > LETTERS:
        raise Refused(400, f"prompt must be 1 to {PROMPTS} texts, of {LETTERS:,} letters in all", "prompt")
    out, seed = [], fields.get("seed", secrets.randbits(31))
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
            raise Refused(400, f"prompt must be texts, or lists of ids from 0 to {tokenizer.vocab_size - 1}", "prompt")
        # A document follows the end of another one: so a text that is empty begins.
        ids = ids or [tokenizer.endoftext]
        given = read_sampling(server, fields, len(ids))
        prompt = Rendered(ids, [], [])
        out += [Request(prompt, seed=seed + i, rivals=rivals, **given) for i in range(fields.get("n", 1))]
    return out


class Handler(Connection):
    "One connection: what is asked, and the answers."

    def route(self) -> None:
        path, command = self.path.split("?")[0].rstrip("/") or "/", self.command.replace("HEAD", "GET")
        method, answer = {
            "/": ("GET", self.get_page), "/health": ("GET", self.get_health), "/draw": ("GET", self.get_scene),
            "/v1/models": ("GET", self.get_models), "/v1/chat/completions": ("POST", self.complete),
            "/v1/completions": ("POST", lambda: self.complete(chat=False)), "/latents": ("POST", self.get_latents),
            "/look": ("POST", self.look)}.get(path, ("", None))
        if path.startswith("/v1/models/"):
            method, answer = "GET", lambda: self.get_model(urllib.parse.unquote(path.removeprefix("/v1/models/")))
        try:
            self.guard(path)
            if command != "POST" and (self.headers.get("Content-Length", "0") != "0" or
                                      "Transfer-Encoding" in self.headers):
                raise Refused(400, f"a {command} has no body")
            if command == "OPTIONS" and self.named_origin() is not None:
                return self.send_permission()
            if command != method:
                allow = {"Allow": method.replace("GET", "GET, HEAD")} if method else {}
                raise Refused(405 if method else 404, f"there is no {command} {path[:100]} here", **allow)
            answer()
        except ValueError as error:  # any other: a conversation that cannot be rendered, a body that is no JSON, ...
            self.refuse(error if isinstance(error, Refused) else Refused(400, str(error)[:500]))
        except OSError:  # the connection broke, see Server.handle_error
            raise
        except Exception:  # noqa: BLE001 a mistake of ours; the next request need not suffer
            traceback.print_exc()
            self.refuse(Refused(500, "an error inside the server; its log says more"))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = route

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

    def card(self) -> dict:
        "What the API tells of the model, and what the page needs to introduce it."
        server = self.server
        return {"id": server.name, "object": "model", "created": int(server.vlm.config.run.get("saved", 0)),
                "owned_by": "ghostvis", "context": server.engine.width, "sees": server.vlm.vit is not None,
                "most_pictures": PICTURES, "most_pixels": PIXELS, "defaults": options(server.vlm, server.flags),
                "parameters": sum(p.numel() for p in server.vlm.parameters()), **about(server.vlm)}

    def get_models(self) -> None:
        self.send({"object": "list", "data": [self.card()]})

    def get_model(self, name: str) -> None:
        if name != self.server.name:
            raise Refused(404, f"the model {name[:50]!r} is not here; this is {self.server.name}", "model",
                          "model_not_found")
        self.send(self.card())

    def get_scene(self) -> None:
        file, scene = io.BytesIO(), new_scene()
        scene.draw(320).save(file, "PNG")
        self.send(file.getvalue(), "image/png", **{"X-Questions": json.dumps(scene_questions(scene))})

    def complete(self, chat: bool = True) -> None:
        "OpenAI's chat completions, or completions of text, as one JSON object or as a stream of events."
        server = self.server
        fields = read_fields(server.name, self.read_json(), chat, server.told)
        rivals, streamed = count_rivals(fields, chat), fields.get("stream", False)
        requests = (read_request if chat else read_prompts)(server, fields, rivals)
        answers = [Answer(server.tokenizer, request, i, chat) for i, request in enumerate(requests)]
        if fields.get("echo"):
            self.echo(answers)
        head = {"id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), "created": int(time.time()),
                "model": server.name, "object": "chat.completion" + ".chunk" * streamed if chat else "text_completion"}
        with server.answering(requests) as news:
            if streamed:
                self.send(None, "text/event-stream")
                self.events = True
                for answer in answers:
                    self.send_event({**head, "choices": [answer.first()]})
            for i, new, tokens, why in self.words(requests, fields["stop"], news):
                answers[i].add(new, tokens, why)
                if streamed and (new or why):
                    self.send_event({**head, "choices": [answers[i].tell()]})
        prompts = {id(request.prompt): len(request.prompt.ids) for request in requests}
        prompt, answer = sum(prompts.values()), sum(len(request.answer) for request in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
                 "prompt_tokens_details": {"cached_tokens": requests[0].reused}}
        if not streamed:
            return self.send({**head, "usage": usage, "choices": [answer.tell(whole=True) for answer in answers]})
        if fields.get("stream_options", {}).get("include_usage"):
            self.send_event({**head, "choices": [], "usage": usage})
        self.send_piece(b"data: [DONE]\n\n")
        self.send_piece(b"")

    def echo(self, answers: list[Answer]) -> None:
        "Each prompt before its answer; its probabilities, where they are asked for, take one more pass."
        server, known = self.server, {}
        for answer in answers:
            request, scores = answer.request, []
            if request.rivals >= 0:
                if id(request.prompt) not in known:
                    with server.paused():
                        known[id(request.prompt)] = score_prompt(
                            server.vlm, request.prompt.ids, request.rivals, server.tokenizer.vocab_size)
                scores = known[id(request.prompt)]
            answer.echo(scores)

    def words(self, requests: list[Request], stops: list[str], news: threading.Event):
        "-> (which choice, its new text, its tokens so far, why it has ended or an empty string), as tokens arrive."
        server, texts = self.server, {i: Text(self.server.tokenizer, stops) for i in range(len(requests))}
        while texts:
            news.wait(0.2)
            news.clear()  # before the tokens are read: what comes later sets it again
            if self.gone():  # an answer to nobody would hold its row to the end
                raise ConnectionError("hung up")
            for i, text in list(texts.items()):
                # The end is read before the tokens: the engine writes it behind the last of them.
                request, finish = requests[i], requests[i].finish
                if finish == "error":
                    raise Refused(500, "an error inside the server; its log says more")
                # As long as somebody waits, an answer has all the time it takes. Half of one is never sent as whole.
                if not finish and (server.cut or server.ending and not request.answer):
                    raise Refused(503, "the server is about to end, before this answer did; ask again later")
                new = text.add(request.answer[text.tokens:], last=bool(finish))
                finish = "stop" if text.ended else finish
                if finish:
                    request.finish = request.finish or "cancelled"  # its row is free while the other choices go on
                    del texts[i]
                yield i, new, text.tokens, finish

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
        with server.paused():
            maps = where_it_looked(server.vlm, prompt, pixels, answer)
        self.send({"words": [{"text": word, "maps": [(m * 255).int().tolist() for m in shares]}
                             for word, shares in words_of(server.tokenizer, answer, maps)]})

    def get_latents(self) -> None:
        "The page's question what each image token takes from a picture."
        server, url = self.server, self.read_json().get("image")
        if not isinstance(url, str) or not server.vlm.vit or server.vlm.config.bridge.num_tokens > LATENTS:
            raise Refused(400, f"image must be a data URI, and the model have at most {LATENTS} image tokens", "image")
        pixels = open_pixels(server.vlm, read_picture(url), alone=False)
        with server.paused():
            maps = latent_maps(server.vlm, pixels)
        self.send({"latents": (maps * 255).int().tolist()})


def check_port(flags) -> None:
    "Before the model is loaded, which may take minutes: is the address free, and allowed?"
    if wrong := [origin for origin in flags.allow_origins.split(",") if not re.fullmatch(
            r"(https?://[^/\s*,]+/?)?", origin.strip())]:
        raise ValueError(f"--allow_origins={wrong[0]}: name pages as http://localhost:3000, separated by commas")
    try:
        with socket.socket(family(flags.host)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((flags.host, flags.port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host={flags.host} --port={flags.port}: {error}; choose another") from None


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def serve(vlm: VLM, tokenizer: Tokenizer, flags) -> None:
    "Until SIGTERM or Ctrl-C: then no new requests, and those that run may finish."
    local = flags.host in ("localhost", "::1") or flags.host.startswith("127.")
    if not local and not flags.api_key:
        say(f"warning: --host={flags.host} can be reached from other machines, and there is no --api_key")
    server, end = Server(vlm, tokenizer, flags), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup: the end of the terminal is to be ignored
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
    server.cut = True
    time.sleep(0.5)  # the last words are on their way
    say("ended")
