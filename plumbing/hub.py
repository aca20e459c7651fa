"""
Downloads: published weights, tokenizers and data from the Hugging Face hub or any server, resumed and verified. Called
by `fetch(name)` where something is asked for by its name. A reader of the lessons need not know it.

Left out: several connections for one download: a file with holes could not be resumed from its length alone.
Connections that stay open between requests: we make about ten.
"""
import contextlib
import errno
import hashlib
import io
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests
from tqdm import tqdm

from plumbing.files import read_json, require, say, setting
from plumbing.weights import INDEX, SINGLE, pack_header, parse_header, read_index

# Connections break during gigabytes, and a weight with one wrong bit loads without an error. So a file grows under the
# name FILE.part, which any later process can resume, and gets its own name only after its hash was found right.
#   fetch      returns at once if all files are there; else, with the folder locked:
#     plan       asks the server for the size and hash of each missing file; of a SigLIP, selects the vision tensors
#     announce   prints sizes and licence, and checks that the disk has room
#     download   receive, with retries; then the hash; then the rename

ANY = None, None  # size and sha256 that the table does not know: the commit is fixed, so the server's word is enough

CONFIGS = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json",
           "added_tokens.json", "chat_template.jinja"]


@dataclass(frozen=True)
class Repository:
    hub: str           # Org/Name, datasets/Org/Name, or the address of a folder on any web server
    revision: str      # a commit, which fixes every byte, or a branch, of which we take the newest commit
    files: dict        # {name: (bytes, sha256)} in the order of downloading; {}: ask the server which files there are
    licence: str
    prefix: str = ""   # take only the tensors of model.safetensors whose names begin with this. The rest of a SigLIP
                       # file, more than half of it, is a text encoder that we never use.
    query: str = ""    # what follows the names in an address on another server: a signature, a token
    mirror: str = ""   # another address of the same files, Org/Name@commit, for when the first does not answer


# The table of what we know by name: commits, sizes, hashes and licences.
REPOSITORIES = {name: Repository(**entry) for name, entry in
                read_json(Path(__file__).parents[1] / "assets" / "hub.json").items()}

CHUNK = 2 ** 16              # bytes that a broken connection can lose

TIMEOUT = 10, 30             # seconds to connect, seconds without a byte

ATTEMPTS, BACKOFF = 5, 0.5   # failures in a row without a new byte; seconds to wait, doubled after each

CURABLE = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError  # try these again

TRY_AGAIN = 408, 429, 500, 502, 503, 504  # and these statuses: the server is overloaded, or restarts

REMEDIES = {401: "missing, private or gated: check the name, or set HF_TOKEN to a token that may read it",
            403: "not allowed: accept the licence on the repository's page, with the account that HF_TOKEN belongs to",
            404: "no such file: is this a model in safetensors?",
            (404, "RepoNotFound"): "no such repository: check the name",
            (404, "RevisionNotFound"): "no such revision: check what follows the @"}


@dataclass(frozen=True)
class RemoteFile:
    "A file on the server, or the range of its bytes that we want, with a header that we write ourselves."
    repository: Repository
    name: str
    digest: str = ""   # what its content must hash to, see check_hash
    total: int = 0     # bytes on the server
    size: int = 0      # bytes on our disk: our own header, if any, then the range
    head: bytes = b""  # that header
    offset: int = 0    # our byte i is byte i + offset on the server

    def __str__(self) -> str:
        return f"{self.repository.hub}, {self.name}"

    @property
    def url(self) -> str:
        place, revision = self.repository.hub, quote(self.repository.revision, safe="")
        return f"{place}/{self.name}{self.repository.query}" if "://" in place else \
            f"{endpoint()}/{place}/resolve/{revision}/{self.name}"


def tell(text: str) -> None:
    say(text, every_rank=True)  # whichever rank came first downloads


def endpoint() -> str:
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    require(url.startswith(("https://", "http://")), f"HF_ENDPOINT={url}: expected an address such as https://NAME")
    return url


def at_hub(url: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(endpoint())[:2]  # the scheme, and the host with its port


def find_repository(name: str) -> Repository:
    known = REPOSITORIES | {repository.hub: repository for repository in REPOSITORIES.values()}
    if name in known:
        return known[name]
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", name)  # neither part may begin with a dot: ../../x
    require(match, f"{name!r}: no such repository; known are {', '.join(REPOSITORIES)}, and any other as Org/Name or "
                   "Org/Name@revision; data.py --download=list shows data sets, too")
    return Repository(match[1], match[2] or "main", {}, f"see {endpoint()}/{match[1]}")


def folders(repository: Repository) -> tuple[Path, Path]:
    "-> (our cache, huggingface_hub's cache: users of transformers need not download the same files again)."
    name, revision = repository.hub.replace("://", "--").replace("/", "--").replace(":", "-"), repository.revision
    # The revision is part of our folder's name: two of them never share one. A branch may be called refs/pr/1.
    short = revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision.replace("/", "--")
    theirs = setting("HF_HUB_CACHE", setting("HF_HOME", "~/.cache/huggingface") / "hub") / f"models--{name}"
    with contextlib.suppress(OSError):  # in their cache, a branch is a small file that contains its commit
        revision = (theirs / "refs" / revision).read_text().strip()
    return setting("GHOSTVIS_CACHE", "~/.cache/ghostvis") / f"{name}@{short}", theirs / "snapshots" / revision


def missing_files(repository: Repository, folder: Path) -> list[str]:
    files = repository.files
    if not files:  # optional files are downloaded before the weights: if the weights are there, all is there
        sharded = (folder / INDEX).exists() and not (folder / SINGLE).exists()
        files = dict.fromkeys(["config.json", *(read_index(folder / INDEX).values() if sharded else [SINGLE])], ANY)
    # In our folder, selected tensors make a smaller file than the table says; it was verified before it got its name.
    selected = SINGLE if repository.prefix and folder == folders(repository)[0] else None
    return [name for name, (size, _) in files.items() if not (folder / name).is_file()
            or name != selected and size not in (None, (folder / name).stat().st_size)]


def authorize(request):
    "requests calls this before each request. The token is for the hub: a storage host must not see it."
    path = setting("HF_TOKEN_PATH", setting("HF_HOME", "~/.cache/huggingface") / "token")
    token = (os.environ.get("HF_TOKEN") or (path.read_text() if path.is_file() else "")).strip()
    if token and at_hub(request.url):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def request(method: str, url: str, where, headers: dict = {}, accept=()) -> requests.Response:
    "The reply after all redirects, of which HEAD follows only those within the hub. Statuses from 400 are errors."
    # We follow redirects ourselves. Of a large file the hub's own reply tells size and hash; then it redirects to a
    # storage host, with a signature in the address that is valid for minutes and for GET: every attempt has to start at
    # the hub.
    with requests.Session() as session:  # it keeps the cookies that some servers ask for after a redirect
        for _ in range(10):
            # Not compressed: a small file would have no length then, and another ETag. TRAP: without an auth function,
            # requests reads ~/.netrc and replaces our token by what it finds there.
            reply = session.request(method, url, headers={"Accept-Encoding": "identity"} | headers, auth=authorize,
                                    timeout=TIMEOUT, stream=True, allow_redirects=False)
            target = urljoin(url, reply.headers.get("Location", ""))
            if not reply.is_redirect or method == "HEAD" and at_hub(url) and not at_hub(target):
                break
            reply.close()
            url = target
    status, code = reply.status_code, reply.headers.get("X-Error-Code")
    if status in TRY_AGAIN:
        raise requests.ConnectionError(f"the server answers {status}", response=reply)
    known = REMEDIES.get((status, code)) or REMEDIES.get(status) if at_hub(url) else None
    place = f"HF_ENDPOINT ({endpoint()})" if at_hub(url) else "the address"
    # A redirect as GET's last answer: after ten of them it is a circle.
    arrived = status < (300 if method == "GET" else 400)
    require(arrived or status in accept, f"{where}: the server answers {status}, " + (
        known or f"{reply.reason}; check {place} and proxies"))
    return reply


def retry(where, attempt, progress=lambda: 0):
    "The result of attempt(). A failure counts only if progress() has not grown: a slow line may break a hundred times."
    # Not urllib3.Retry: it repeats a request, but cannot resume a body that breaks after the first gigabyte.
    failures, most = 0, progress()  # most: bytes
    while True:
        try:
            return attempt()
        except CURABLE as error:
            # "HTTPSConnectionPool(...): Max retries exceeded ...: [Errno 111] Connection refused'))": keep the end
            reason = str(error).rsplit(": ", 1)[-1].split("', ")[0].strip("')\".")[:90]
            headers = {} if error.response is None else error.response.headers
        except requests.RequestException as error:  # such as an address that is none
            raise ValueError(f"{where}: {error}") from None
        # Compared with the most ever, not with the last attempt: some server may start from zero each time.
        failures, most = (0, progress()) if progress() > most else (failures + 1, most)
        require(failures < ATTEMPTS, f"{where}: {reason}, {failures} times in a row; check the connection, and "
                                     f"HF_ENDPOINT ({endpoint()}), and run again: it will go on from here")
        # ratelimit: "api";r=0;t=55 or Retry-After: 55. One second more, because the two clocks differ.
        named = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) \
            or re.fullmatch(r"(\d+)", headers.get("Retry-After", ""))
        seconds = int(named[1]) + 1 if named else BACKOFF * 2 ** failures
        tell(f"{where}: {reason}; next attempt in {seconds:g} s")
        time.sleep(seconds)


def look_up(repository: Repository, name: str, optional=False) -> RemoteFile | None:
    "What the server says about a file, compared with the table before a byte is downloaded. None: no such file."
    remote = RemoteFile(repository, name)
    method = "GET" if repository.query else "HEAD"  # a signature is mostly for GET; its body is not read
    reply = retry(remote, lambda: request(method, remote.url, remote, accept=[404] if optional else []))
    reply.close()
    if reply.status_code == 404:  # only for optional files: all others raise
        return None
    headers, (size, digest) = reply.headers, repository.files.get(name, ANY)
    if "://" in repository.hub:  # no hub: it knows no commits, and its ETags say nothing about the content
        etag, commit = "", repository.revision
    else:
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        commit = headers.get("X-Repo-Commit")
        # The login page of a hotel's network has status 200 too, and would be stored as config.json.
        require(commit and etag, f"{remote}: a proxy's page answers here, not a Hugging Face hub; log in to this "
                                 f"network, or check HF_ENDPOINT ({endpoint()})")
    # TRAP: the Content-Length of a redirect is the length of the redirect itself.
    length = headers.get("X-Linked-Size") or ("" if reply.is_redirect else headers.get("Content-Length", ""))
    require(length.isdecimal(), f"{remote}: the server does not say how long this file is; fetch it by hand")
    total = int(length)  # a small file's ETag is not a sha256: such a file is compared with the table after download
    other = digest and len(digest) == len(etag) and digest != etag  # hashes of one kind that differ
    require(size in (None, total) and not other, f"{remote}: {endpoint()} has "
            f"{total:,} bytes with hash {etag}, expected are {size or total:,} with {digest or etag}; the file was "
            "replaced, or the mirror is wrong: check HF_ENDPOINT")
    return RemoteFile(replace(repository, revision=commit), name, digest or etag, total, total)


def receive(remote: RemoteFile, file) -> None:
    "One connection: appends the bytes that come to `file`, which may also be in memory."
    start = file.tell() + remote.offset  # on the server
    part = start or remote.size < remote.total
    with request("GET", remote.url, remote, {"Range": f"bytes={start}-{remote.size + remote.offset - 1}"} if part else
                 {}, [416]) as reply:  # only the headers are here yet
        # 200: the whole file, whatever we asked for. 416: no such range, so our bytes are of another file.
        given = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
        begin = int(given[1]) if given else 0 if reply.status_code == 200 else math.inf
        if begin > start:  # does not continue what we have: the next attempt starts from the beginning
            file.truncate(len(remote.head))
            file.seek(0, os.SEEK_END)
            raise requests.ConnectionError("the server sent another part than was asked for")
        skip = start - begin  # bytes in front of the range that we want
        for chunk in reply.iter_content(CHUNK):
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
            file.write(chunk[:remote.size - file.tell()])
            if file.tell() == remote.size:  # the reply may be longer than our range
                return
    raise requests.ConnectionError("the connection closed early")


def select_tensors(remote: RemoteFile) -> RemoteFile:
    "Only the tensors with the repository's prefix, if their bytes are one range. (SigLIP's are sorted by name.)"
    prefix = remote.repository.prefix
    if not prefix or remote.name != SINGLE:
        return remote
    file = io.BytesIO()  # the first bytes of the file on the server

    def read(n: int) -> bytes:
        begin = file.tell()
        part = replace(remote, size=begin + n)
        retry(remote, lambda: receive(part, file), file.tell)
        return file.getvalue()[begin:]

    entries, metadata, start = parse_header(read, remote.total, remote)
    entries = {name: info for name, info in entries.items() if name.startswith(prefix)}
    spans = sorted(info["data_offsets"] for info in entries.values())
    if not spans or any(end != begin for (_, end), (begin, _) in zip(spans, spans[1:])):
        return remote  # other tensors lie in between: take the whole file
    begin, size = spans[0][0], spans[-1][1] - spans[0][0]
    for info in entries.values():  # the offsets of a data section that begins with our first tensor
        info["data_offsets"] = [offset - begin for offset in info["data_offsets"]]
    head = pack_header({"__metadata__": metadata} | entries)
    # We have no hash of a range: that the server's ETag was the table's hash has to be enough.
    return replace(remote, digest="", size=len(head) + size, head=head, offset=start + begin - len(head))


def plan(repository: Repository, folder: Path) -> list[RemoteFile]:
    "What has to be downloaded, the weights last. Only headers, and the index of shards, are downloaded here already."
    if repository.files:
        try:
            return [select_tensors(look_up(repository, name)) for name in missing_files(repository, folder)]
        except ValueError as error:
            if not repository.mirror:
                raise
            tell(f"{error}\ntrying its mirror, {repository.mirror}: the same hash proves the same file")
            hub, _, revision = repository.mirror.partition("@")
            return plan(replace(repository, hub=hub, revision=revision, mirror=""), folder)
    # A branch moves on, and files of two commits must not be mixed. So the first commit is recorded and used from then
    # on; delete the folder to get a newer one.
    record = folder / "commit"
    with contextlib.suppress(OSError):
        repository = replace(repository, revision=record.read_text() or repository.revision)
    config = look_up(repository, "config.json")
    repository = config.repository
    record.write_text(repository.revision)

    def find(*names: str) -> list[RemoteFile]:
        return [remote for name in names if (remote := look_up(repository, name, optional=True))]

    # Older repositories have the tokenizer in two files.
    found = [config, *find(*CONFIGS[1:]), *(find("tokenizer.json") or find("vocab.json", "merges.txt"))]
    weights = find(SINGLE)
    if not weights:  # then there are shards, and only the index knows how many
        download(look_up(repository, INDEX), folder)
        weights = [look_up(repository, name) for name in sorted(set(read_index(folder / INDEX).values()))]
    return [remote for remote in found + weights if not (folder / remote.name).exists()]


def announce(remotes: list[RemoteFile], folder: Path) -> None:
    "Sizes and licence before the download starts; and no start if the disk would be full before the end."
    repository, free, left = remotes[0].repository, shutil.disk_usage(folder).free, 0
    tell(f"{repository.hub}, revision {repository.revision[:12]}, licence: {repository.licence}")
    for remote in remotes:
        part = folder / f"{remote.name}.part"
        here = part.stat().st_size if part.exists() else 0  # bytes of an earlier attempt
        left += max(0, remote.size - here)
        tell(f"{remote.size / 1e6:12,.1f} MB  {remote.name}" + f", {here / 1e6:,.1f} MB are here already" * bool(here)
             + f" (only {repository.prefix}* of {remote.total / 1e6:,.1f} MB)" * bool(remote.head))
    tell(f"{left / 1e6:12,.1f} MB  to come, to {folder}, where {free / 1e6:,.1f} MB are free")
    require(left <= free, f"{folder}: {left:,} bytes are to come and {free:,} are free; make room, or set "
                          "GHOSTVIS_CACHE to a folder on another disk")


def check_hash(path: Path, expected: str) -> None:
    "64 digits are a sha256; 32 an MD5; 40 are the sha1 by which git names a file, which starts with the file's size."
    if not re.fullmatch("[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return  # an ETag of another form says nothing about the content
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.md5() if len(expected) == 32 else \
        hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        path.unlink()  # we cannot know which byte is wrong
        raise ValueError(f"{path}: hash {digest.hexdigest()}, expected {expected}: damaged on the way; it was deleted, "
                         "run again to fetch it anew")


def download(remote: RemoteFile, folder: Path) -> None:
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)  # a data set's file may be in a folder
    try:
        with open(part, "a+b") as file:  # another process may have begun it
            file.seek(0)
            if file.read(len(remote.head)) != remote.head or file.seek(0, os.SEEK_END) > remote.size:
                file.truncate(0)  # not begun by us
                file.write(remote.head)
            file.seek(0, os.SEEK_END)
            # The bar counts the bytes that are written. disable=None: only on a terminal, not in a log file.
            with tqdm.wrapattr(file, "write", total=remote.size, initial=file.tell(), desc=remote.name,
                               disable=None) as counted:
                if file.tell() < remote.size:
                    retry(remote, lambda: receive(remote, counted), file.tell)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut could leave the name without the bytes
    except OSError as error:
        require(error.errno not in (errno.ENOSPC, errno.EDQUOT),
                f"{target}: the disk is full; make room and run again: it will resume from here")
        raise  # requests' errors are OSErrors too
    check_hash(part, remote.digest)
    os.replace(part, target)  # all at once: nobody ever sees half a file under this name
    tell(f"{remote.name}: complete")


def lock(file, folder: Path) -> None:
    "One process at a time: all ranks of a run ask for the same weights. The lock ends when the file is closed."
    if os.name == "posix":  # there is no fcntl on Windows
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another process downloads to {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)


def fetch(name: str | Repository) -> Path:
    """"qwen2.5-1.5b", or any "Org/Name@revision" -> the folder with its files; missing files are downloaded first."""
    repository = name if isinstance(name, Repository) else find_repository(name)
    folder, theirs = folders(repository)
    for ready in folder, theirs:
        if not missing_files(repository, ready):
            return ready
    offline = [variable for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
               if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")]
    require(not offline, f"{folder}: lacks {', '.join(missing_files(repository, folder))}, and {''.join(offline[:1])} "
                         f"is set; run python data.py --download={name if isinstance(name, str) else 'NAME'} once "
                         "without it")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        lock(file, folder)
        if missing_files(repository, folder):  # a process that had to wait for the lock finds all files there
            remotes = plan(repository, folder)
            announce(remotes, folder)
            for remote in remotes:
                download(remote, folder)
    return folder
