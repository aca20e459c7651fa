"""
Weights as files: how they are stored, named, replaced and downloaded. This file contains no model. In reading order:
  errors       two helpers that turn a user's wrong file into one clear line
  safetensors  the file format of the weights: a JSON header, then the bytes of all tensors
  names        a tensor has one name in our modules and another in Hugging Face's files
  folders      a checkpoint folder is replaced all at once, so that a crash never leaves half of one
  downloads    published weights and tokenizers from the Hugging Face hub: resumed and verified

Left out: pickled files (.pt, .bin), because reading one can run any code. Several connections for one download: a file
with holes could not be resumed from its length alone. Connections that stay open between requests: we make about ten.
"""
import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests
import torch
import torch.nn as nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Errors

# What Python raises for a file that is missing, cut short, or of another kind than its name says.
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, csv.Error, UnicodeDecodeError,
          json.JSONDecodeError)


def require(condition, problem: str) -> None:
    if not condition:  # not `assert`: `python -O` removes those
        raise ValueError(problem)


@contextlib.contextmanager
def named_errors(path):
    "Python's errors rarely say which file is missing, cut short or not text. Inside this block they do."
    try:
        yield
    except BROKEN as error:  # a plain ValueError is passed on: it already names the file
        raise ValueError(f"{path}: cannot be read ({error}); is it there, complete, and in UTF-8?") from None


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors
#
#   8 bytes   N, the header's length, little-endian
#   N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
#             "__metadata__": {str: str}}
#   the rest  the tensors' bytes, row-major, without gap or overlap; offsets count from here

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
KNOWN = ", ".join(DTYPES)
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_SIDES = 64            # of a tensor; torch's own limit for most operations
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file, or the index of several shards


def parse_json(text: str | bytes, where, **options):
    "json.loads, with one kind of error: a hundred thousand open brackets are a RecursionError, 5,000 digits another."
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise ValueError(f"{where}: not valid JSON ({error}); is the file complete, and in UTF-8?") from None


def read_json(path) -> dict:
    with named_errors(path):
        content = parse_json(Path(path).read_bytes(), path)
    require(isinstance(content, dict), f"{path}: a JSON object in braces is expected here")
    return content


def read_index(path) -> dict[str, str]:
    "The index of a model in several shards -> {tensor name: file name}."
    names = read_json(path).get("weight_map")
    # Plain file names only: a downloaded index must not make us write to ../../.bashrc.
    require(isinstance(names, dict) and names and all(
        isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names.values()),
        f"{path}: lacks the weight_map from tensor names to plain file names; use another repository")
    return names


def unique_keys(pairs: list) -> dict:
    "For json.loads: the format forbids a name that occurs twice, and json.loads would silently take the last one."
    require(len(dict(pairs)) == len(pairs), "a key occurs twice")
    return dict(pairs)


def entry_is_valid(info) -> bool:
    "One entry of a header has all fields, of the right types, and its shape accounts for every byte."
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        # type(), not isinstance(): JSON's `true` is an int to isinstance. torch would read -1 as "guess this side".
        # The limits come before the product: 2,000 sides of 4,300 digits would take minutes to multiply.
        # Sides of 0 are counted as 1 in the limit: [0, 2^40, 2^40] has no bytes, but torch's strides would overflow.
        return (isinstance(shape, list) and len(shape) <= MAX_SIDES
                and all(type(n) is int and 0 <= n < 2 ** 59 for n in [*shape, begin, end])
                and math.prod(n or 1 for n in shape) < 2 ** 59
                and end - begin == math.prod(shape) * DTYPES[dtype].itemsize)  # so a view stays within its own tensor
    except (TypeError, KeyError, ValueError):
        return False


def parse_header(read, size: int, where) -> tuple[dict, dict, int]:
    """
    -> (entries {name: {"dtype", "shape", "data_offsets"}}, metadata, offset of the data section in the file).
    read(n) gives the next n bytes of a file of `size` bytes, which may also be on a server. A file that was cut short,
    or made by an attacker, is a ValueError here and never a crash later.
    """
    def check(condition, problem: str) -> None:
        require(condition, f"{where}: not a valid safetensors file ({problem}); fetch or write it again")

    check(size >= 8, "shorter than 8 bytes")  # after a full disk or a broken download
    # Any 8 bytes are a number, up to 18 million TB. This check comes before we allocate that much memory.
    length = int.from_bytes(read(8), "little")
    check(2 <= length <= min(MAX_HEADER, size - 8), f"header of {length:,} bytes in a file of {size:,}: cut short?")
    raw = read(length)
    check(raw.startswith(b"{"), "header: does not begin with {")  # JSON allows blanks in front, the format does not
    entries = parse_json(raw, f"{where}: not a valid safetensors file", object_pairs_hook=unique_keys)
    metadata = entries.pop("__metadata__", {})  # the only key that is not a tensor
    check(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
          "__metadata__ is not a map of strings")
    for name, info in entries.items():  # [:100]: a name may be as long as the header
        check(entry_is_valid(info), f"tensor {name[:100]!r}: needs a dtype of {KNOWN}, and a shape and data_offsets "
                                    "that agree")
    # Sorted by offset, the tensors must fill the data section exactly. A gap could hide a second file. With overlaps
    # a small file could describe a thousand large tensors, all on the same bytes.
    position = 0
    for name, info in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = info["data_offsets"]
        check(begin == position, f"tensor {name[:100]!r}: begins at {begin}, not at {position}: a gap or an overlap")
        position = end
    check(8 + length + position == size,  # the most common accident: a download that stopped early
          f"{size:,} bytes, its tensors end at {8 + length + position:,}: cut short or changed")
    return entries, metadata, 8 + length


def read_header(path) -> tuple[dict, dict, int]:
    with open(path, "rb") as file:
        return parse_header(file.read, os.path.getsize(path), path)


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """
    One file, or a folder with model.safetensors or with shards and their index -> {name: tensor}.
    The tensors are views of the mapped file: do not write to them.
    """
    path, tensors = Path(path), {}
    if (path / SINGLE).exists():  # Qwen2.5 up to 1.5B is one file, 3B is two shards and an index
        return read_safetensors(path / SINGLE)
    if path.is_dir():
        index, shards = read_index(path / INDEX), {}
        for file in sorted(set(index.values())):  # a folder would be read as another model, perhaps this one again
            require((path / file).is_file(), f"{path / file}: no such file, though {INDEX} names it; fetch it again")
            shards[file] = read_safetensors(path / file)
        for name, file in index.items():  # fails for shards of two different downloads
            require(name in shards[file], f"{path / file}: lacks {name}, which {INDEX} says it holds")
        return {name: shards[file][name] for name, file in index.items()}
    require(path.exists(), f"{path}: no such file")
    entries, _, start = read_header(path)
    # Mapped, not read: the operating system loads a page when it is first used, and may drop it again when memory is
    # short. So unused tensors cost nothing, and a model that is copied out of its file is not in memory twice.
    # ACCESS_COPY is private: torch wants writable memory, and an accidental write must not reach the disk.
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, info in entries.items():
        dtype, shape, (begin, end) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
        # One side may be 0: frombuffer does not accept zero bytes.
        tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=start + begin).view(
            shape) if begin < end else torch.empty(shape, dtype=dtype)
    return tensors


def pack_header(header: dict) -> bytes:
    "The start of a file: the length, then the JSON, padded so that the data section begins at a multiple of 8 bytes."
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_safetensors(tensors: dict[str, torch.Tensor], path, metadata: dict[str, str] | None = None) -> None:
    "The same tensors give the same bytes, in any order of the dict."
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    # Largest dtype first, then by name: every tensor then starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        tensor, begin = tensors[name], offset
        offset += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, offset]}
    with open(path, "wb") as file:
        file.write(pack_header(header))
        for name in order:  # one tensor at a time is copied to the host, never the whole model
            # .view(uint8): numpy has no bfloat16, so it gets plain bytes.
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before anyone renames the file


# ----------------------------------------------------------------------------------------------------------------------
# Names: ours on the left, Hugging Face's on the right. Several names on the right: our tensor is their rows stacked.
# "#" is a layer's number, "*" is weight or bias.

SIGLIP_NAMES = {
    "patch.weight": ["embeddings.patch_embedding.weight"],  # [D, 3, P, P] there, flattened to [D, 3*P*P] here
    "patch.bias": ["embeddings.patch_embedding.bias"],
    "position": ["embeddings.position_embedding.weight"],
    "norm.*": ["post_layernorm.*"],
    "blocks.#.norm1.*": ["encoder.layers.#.layer_norm1.*"],
    "blocks.#.norm2.*": ["encoder.layers.#.layer_norm2.*"],
    "blocks.#.qkv.*": [f"encoder.layers.#.self_attn.{x}_proj.*" for x in "qkv"],
    "blocks.#.out.*": ["encoder.layers.#.self_attn.out_proj.*"],
    "blocks.#.fc1.*": ["encoder.layers.#.mlp.fc1.*"],
    "blocks.#.fc2.*": ["encoder.layers.#.mlp.fc2.*"],
}
QWEN_NAMES = {
    "embed.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],  # only in models whose head is not tied to the embedding
    "blocks.#.norm1.*": ["model.layers.#.input_layernorm.*"],
    "blocks.#.norm2.*": ["model.layers.#.post_attention_layernorm.*"],  # before the MLP, in spite of its name
    "blocks.#.attention.qkv.*": [f"model.layers.#.self_attn.{x}_proj.*" for x in "qkv"],
    "blocks.#.attention.out.*": ["model.layers.#.self_attn.o_proj.*"],
    "blocks.#.mlp.gate_up.*": ["model.layers.#.mlp.gate_proj.*", "model.layers.#.mlp.up_proj.*"],
    "blocks.#.mlp.down.*": ["model.layers.#.mlp.down_proj.*"],
}
LLAVA_NAMES = {
    **{f"vit.{ours}": [f"vision_tower.vision_model.{n}" for n in theirs] for ours, theirs in SIGLIP_NAMES.items()},
    **{f"gpt.{ours}": [f"language_model.{n}" for n in theirs] for ours, theirs in QWEN_NAMES.items()},
    "bridge.fc1.*": ["multi_modal_projector.linear_1.*"],
    "bridge.fc2.*": ["multi_modal_projector.linear_2.*"],
    "bridge.newline": ["image_newline"],
}


def hub_names(module: nn.Module, table: dict[str, list[str]], prefix: str) -> dict[str, list[str]]:
    'blocks.3.norm1.weight -> {"blocks.3.norm1.weight": ["encoder.layers.3.layer_norm1.weight"]}, for all parameters.'
    names = {}
    for name, _ in module.named_parameters():
        number, last = "".join(re.findall(r"\.(\d+)\.", name)), name.split(".")[-1]         # "3", "weight"
        general = re.sub(r"\.\d+\.", ".#.", name)                                          # blocks.#.norm1.weight
        # TRAP: a parameter that is not in the table is skipped and keeps its values, so the tables must be complete.
        # A checkpoint of ours is read by a table of its own names.
        for pattern in (name, general, general.removesuffix(last) + "*"):
            if pattern in table:
                names[name] = [prefix + hub.replace("#", number).replace("*", last) for hub in table[pattern]]
                break
    return names


def load_tensors(module: nn.Module, tensors: dict, table: dict, prefix: str, where: str, device="cpu",
                 dtype=torch.float32) -> None:
    """
    Fill a module (on the meta device, or real) from a file's tensors, which are removed from the dict one by one.
    Missing, unexpected and wrongly shaped tensors are errors: a model that is partly random still writes text, only
    worse, and nobody finds out why.
    """
    parameters = dict(module.named_parameters())
    for ours, theirs in hub_names(module, table, prefix).items():
        missing = [name for name in theirs if name not in tensors]
        require(not missing, f"{where}: tensor {', '.join(missing[:1])} is missing; is this the right model?")
        mapped = [tensors.pop(name) for name in theirs]
        # First to the device, then to the dtype: 16 bits from the file are half as much to copy as 32.
        parts = [part.to(device).to(dtype) for part in mapped]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if value is mapped[0]:  # still the mapped file, but training writes to parameters
            value = value.clone()
        # Size and rows, not the whole shape: SigLIP's patch weight [D, 3, P, P] becomes [D, 3*P*P] below.
        shape = parameters[ours].shape
        require(value.numel() == shape.numel() and len(value) == shape[0],
                f"{where}: {theirs[0]} has shape {list(value.shape)}, config.json asks for {list(shape)}")
        owner, _, last = ours.rpartition(".")
        # A new parameter, because one on the meta device cannot be filled. TRAP: create optimizers after loading.
        setattr(module.get_submodule(owner), last, nn.Parameter(value.reshape(shape)))
    # With layers or biases that we do not compute it is another model.
    require(not tensors, f"{where}: {len(tensors)} tensors are not part of this model, first "
                         f"{min(tensors, default='')}")


# language_model.model.norm.weight in the hub's files, model.language_model.norm.weight from transformers 5.
LLAVA_AGES = {r"^model\.": "", r"^lm_head\.": "language_model.lm_head.",
              r"^vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
              r"^language_model\.(?!model\.|lm_head\.)": "language_model.model."}


def read_llava(folder) -> dict[str, torch.Tensor]:
    "A LLaVA folder of any age -> its tensors under the names of LLAVA_NAMES."
    tensors = {}
    for name, tensor in read_safetensors(folder).items():
        for pattern, ours in LLAVA_AGES.items():
            name = re.sub(pattern, ours, name)
        if ".head." not in name:  # SigLIP's pooling head, which some files still contain
            tensors[name] = tensor
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are replaced all at once

def recover(folder) -> Path:
    "If the last save stopped between its two renames, the only checkpoint is called FOLDER.old: give it its name back."
    place = Path(folder).resolve()  # FOLDER may be a link to a larger disk
    old = place.with_name(place.name + ".old")
    # FOLDER.new is never used: we cannot tell whether it is complete. At most one save is lost.
    if not place.exists() and old.exists():
        os.rename(old, place)
    return Path(folder)


@contextlib.contextmanager
def replace_folder(folder, drop=()):
    """
    Gives an empty FOLDER.new to be filled. After the block it takes the old folder's place, together with the old files
    that it lacks, except those in `drop`. After an error in the block, or a crash, the old folder is as it was.
    """
    # First recover, then remove leftovers: after an interrupted save the only whole folder may be the one named .old.
    folder = recover(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new  # an error in the block is raised here, and the rest of this function does not run
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # half a checkpoint may have gigabytes, and the disk is mostly full now
        raise
    if folder.exists():
        for file in folder.iterdir():  # such as log.jsonl, samples.png
            if not (new / file.name).exists() and file.name not in drop:
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        # Two renames, because one rename cannot replace a folder that has files in it. Each is done completely or not
        # at all. Between them the whole folder is called .old, and recover() finds it.
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)  # last: up to here there was always one whole folder


# ----------------------------------------------------------------------------------------------------------------------
# Downloads from the Hugging Face hub, by plain HTTP
# Connections break during gigabytes, and a weight with one wrong bit loads without an error. So a file grows under the
# name FILE.part, which any later process can resume, and gets its own name only after its hash was found right.
#   fetch      returns at once if all files are there; else, with the folder locked:
#     plan       asks the server for the size and hash of each missing file; of a SigLIP, selects the vision tensors
#     announce   prints sizes and licence, and checks that the disk has room
#     download   receive, with retries; then the hash; then the rename

ANY = None, None  # size and sha256 that the table does not know: the commit is fixed, so the server's word is enough
CONFIGS = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json",
           "added_tokens.json"]
DEFAULT_VISION = "siglip2-large-patch16-256"  # the encoder that a Qwen gets unless another is named


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
                read_json(Path(__file__).with_name("assets") / "hub.json").items()}

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


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def setting(variable: str, default) -> Path:
    return Path(os.environ.get(variable) or default).expanduser()


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
        note(f"{where}: {reason}; next attempt in {seconds:g} s")
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
            note(f"{error}\ntrying its mirror, {repository.mirror}: the same hash proves the same file")
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
    note(f"{repository.hub}, revision {repository.revision[:12]}, licence: {repository.licence}")
    for remote in remotes:
        part = folder / f"{remote.name}.part"
        here = part.stat().st_size if part.exists() else 0  # bytes of an earlier attempt
        left += max(0, remote.size - here)
        note(f"{remote.size / 1e6:12,.1f} MB  {remote.name}" + f", {here / 1e6:,.1f} MB are here already" * bool(here)
             + f" (only {repository.prefix}* of {remote.total / 1e6:,.1f} MB)" * bool(remote.head))
    note(f"{left / 1e6:12,.1f} MB  to come, to {folder}, where {free / 1e6:,.1f} MB are free")
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
    note(f"{remote.name}: complete")


def lock(file, folder: Path) -> None:
    "One process at a time: all ranks of a run ask for the same weights. The lock ends when the file is closed."
    if os.name == "posix":  # there is no fcntl on Windows
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another process downloads to {folder}: waiting for it")
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


def fetch_url(url: str, folder: Path, most: int, check) -> bytes:
    """
    One small file from any web server, such as a picture that a record names, kept in the folder -> its bytes.
    check(bytes) raises an error where they are something else: a hotel's login page must not be kept as the picture.
    """
    digest = hashlib.sha1(url.encode()).hexdigest()
    kept = folder / digest[:2] / digest  # 256 folders: a hundred thousand files in one are slow
    with contextlib.suppress(FileNotFoundError):
        return kept.read_bytes()

    def receive_all() -> bytes:
        content = b""
        with request("GET", url, url) as reply:
            for chunk in reply.iter_content(CHUNK):
                content += chunk
                require(len(content) <= most, f"{url}: more than {most:,} bytes")
        if len(content) < int(reply.headers.get("Content-Length", 0)):
            raise requests.ConnectionError("the connection closed early")
        return content

    content = retry(url, receive_all)
    check(content)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{digest}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, kept)
    return content
