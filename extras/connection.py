"""
HTTP with strangers: how a request is read, within limits, who may ask, and how an answer or a refusal is sent. Called
by server.py, whose Handler says what is answered. A reader of the lessons need know none of it.
"""
import http.server
import io
import ipaddress
import json
import re
import secrets
import socket
import time
import urllib.parse

from plumbing.files import parse_json, say
from extras.fields import Refused

BODY = 20_000_000       # bytes of a request

CHUNKS = 50_000         # pieces in which a body may come whose length is not told before

IDLE = 20               # seconds in which the next request must have arrived as a whole


class Incoming(socket.SocketIO):
    "What a connection receives. All bytes of a request share one deadline: a slow sender must not hold its thread."
    deadline = 0.0

    def readinto(self, buffer) -> int:
        self._sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        return super().readinto(buffer)


class Connection(http.server.BaseHTTPRequestHandler):
    "Requests and answers, one after the other. http.server reads their first lines and headers."
    # default_request_version: 0.9 knows no headers, and a malformed first line would be answered without any.
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version, disable_nagle_algorithm = "GhostVis", "", True
    events = False  # whether the head of a stream of events has been sent
    reason = requestline = ""  # why this request is refused, for the log

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Incoming(self.connection, "r"))

    def handle_one_request(self) -> None:
        self.rfile.raw.deadline = time.monotonic() + IDLE
        self.events, self.reason, self.headers = False, "", None  # what the last request left
        super().handle_one_request()

    def log_request(self, code="-", size="-") -> None:
        self.log_message('"%s" %s %s', self.requestline[:100], int(code), self.reason)

    def log_message(self, format: str, *args) -> None:
        # Escaped: what a client sends must not forge lines or move the cursor of the terminal.
        say(f"{self.client_address[0]} {(format % args)[:300].encode('unicode_escape').decode()}".rstrip())

    def send(self, content, kind: str = "application/json", status: int = 200, **headers) -> None:
        "content: bytes, or what is sent as JSON; None: it follows as a stream of events."
        self.connection.settimeout(IDLE)  # Incoming has set another
        self.send_response(status)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin", **headers}
        if (origin := self.named_origin()) is not None:
            headers |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*",
                        "Cross-Origin-Resource-Policy": "cross-origin"}
        if content is not None:
            headers["Content-Length"] = len(body)
        elif self.request_version != "HTTP/1.0":  # in pieces, the last of which is empty: who gets no end, knows it
            headers["Transfer-Encoding"] = "chunked"
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if content is not None and self.command != "HEAD":
            self.wfile.write(body)

    def send_piece(self, piece: bytes) -> None:
        "Of a stream; an empty one ends it."
        if self.request_version == "HTTP/1.0":  # knows no pieces: the end of the connection is the end of the stream
            self.close_connection = True
        else:
            piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        self.wfile.write(piece)

    def send_event(self, value) -> None:
        "Server-sent events: lines such as data: {...}, each followed by an empty one."
        self.send_piece(b"data: " + json.dumps(value).encode() + b"\n\n")

    def refuse(self, error: Refused) -> None:
        self.close_connection = True  # what is left of a body would be taken for the next request
        self.reason = str(error)
        if self.events:  # too late for a status; clients read this too
            self.log_request(error.status)
            self.send_event(error.body)
            return self.send_piece(b"")
        later = {"Retry-After": 5} if error.status in (429, 503) else {}
        self.send(error.body, status=error.status, **later, **error.headers)

    def send_error(self, code, message=None, explain=None) -> None:
        "What http.server itself finds wrong: a request line, a header, a method, HTTP/2 (505)."
        allow = {"Allow": "GET, HEAD, POST, OPTIONS"} if code == 501 else {}
        status = 405 if code == 501 else code if code == 505 else min(code, 499)
        self.refuse(Refused(status, str(message or code)[:200], **allow))

    def named_origin(self) -> str | None:
        "The page elsewhere that asks, if --allow_origins names it."
        origin = self.headers.get("Origin") if self.headers else None
        return origin if origin in self.server.origins else None

    def send_permission(self) -> None:
        "A browser asks beforehand (a preflight) whether a page elsewhere may send this request."
        asked = self.headers.get("Access-Control-Request-Headers", "")
        self.send(b"", "text/plain", **{
            "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": 600,
            "Access-Control-Allow-Private-Network": "true",
            # Clients add some of their own (x-stainless-os): whatever is only a list of names.
            "Access-Control-Allow-Headers": asked if re.fullmatch(r"[\w, -]{1,1000}", asked, re.A) else "content-type"})

    def guard(self, path: str) -> None:
        "A page elsewhere must not reach a local server through its visitor's browser."
        hosts, key = self.headers.get_all("Host", []), self.server.flags.api_key
        if len(hosts) > 1:
            raise Refused(400, "two Host headers")
        host, origin = hosts[0] if hosts else "", self.headers.get("Origin")
        name, own = re.sub(r":\d+$", "", host).strip("[]").lower(), self.server.flags.host.lower()
        named = {urllib.parse.urlsplit(origin).hostname for origin in self.server.origins}
        try:  # An attacker's name may point here (DNS rebinding); a bare address cannot be of that kind.
            ipaddress.ip_address(name)
        except ValueError:
            # Names that no server on the internet gives out cannot either. Who has a key, needs no other check.
            if not (key or name in {"localhost", own, socket.gethostname().lower(), *named}
                    or name.endswith((".localhost", ".local", ".internal"))):
                raise Refused(403, "the Host header names another machine") from None
        if origin not in (None, f"http://{host}", f"https://{host}") and self.named_origin() is None:
            raise Refused(403, f"pages from elsewhere ({origin[:100]}) are not answered; --allow_origins names those "
                          "that are")
        sent = re.sub(r"^bearer +", "", self.headers.get("Authorization", ""), flags=re.I)
        # compare_digest takes equally long for all wrong keys: the time does not tell how much of one is right.
        open_to_all = path in ("/", "/health") or self.command == "OPTIONS"
        if key and not open_to_all and not secrets.compare_digest(sent.encode("latin-1"), key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key", WWW_Authenticate="Bearer")

    def read_json(self) -> dict:
        "The body, checked before and while it is read: its length is what the client says, and may be a lie."
        # The other types are those that a form of a page elsewhere could send without being asked.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        pieces, lengths = self.headers.get_all("Transfer-Encoding", []), self.headers.get_all("Content-Length", [])
        if pieces:
            # With both, a proxy before us might believe the other one, and see requests where we see a body.
            if lengths or [piece.lower() for piece in pieces] != ["chunked"] or self.request_version == "HTTP/1.0":
                raise Refused(400, "Transfer-Encoding must be chunked, in HTTP/1.1 and without a Content-Length")
            raw = self.read_pieces()
        else:
            if not re.fullmatch(r"[0-9]{1,12}", ", ".join(lengths)):
                raise Refused(411, "one Content-Length is needed, or a chunked body")
            if int(lengths[0]) > BODY:
                raise Refused(413, f"a body of {lengths[0]} bytes is over the limit of {BODY:,}")
            raw = self.read_exactly(int(lengths[0]))
        body = parse_json(raw, "the body")
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return body

    def read_exactly(self, n: int) -> bytes:
        raw = self.rfile.read(n)
        if len(raw) < n:
            raise ConnectionError("hung up")
        return raw

    def read_pieces(self) -> bytes:
        "A chunked body, 5 CRLF hello CRLF 0 CRLF CRLF -> hello. Its length is known at its end only."
        body = bytearray()
        for _ in range(CHUNKS):
            size = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\r\n]*)?\r\n", self.rfile.readline(200))
            if not size:
                raise Refused(400, "a chunk of the body does not begin with its length")
            size = int(size[1], 16)
            if len(body) + size > BODY:
                break
            body += self.read_exactly(size)
            if size == 0:
                for _ in range(20):  # lines of headers may follow it, which nobody needs
                    if self.rfile.readline(1000) in (b"\r\n", b""):
                        return bytes(body)
                raise Refused(400, "too much behind the body")
            if self.read_exactly(2) != b"\r\n":
                raise Refused(400, "a chunk of the body is longer than it says")
        raise Refused(413, f"a body of more than {BODY:,} bytes, or in more than {CHUNKS:,} chunks")
