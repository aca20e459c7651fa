"""
Weights as files: the safetensors format, and the names that our tensors have in Hugging Face's files. Called where a
model is loaded, saved or exported. It contains no model, and a reader of the lessons need not know it.

Left out: pickled files (.pt, .bin), because reading one can run any code.
"""
import json
import math
import mmap
import os
import re
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.files import parse_json, read_json, require


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
    "blocks.#.attention.q_norm.*": ["model.layers.#.self_attn.q_norm.*"],  # these two: Qwen3 alone
    "blocks.#.attention.k_norm.*": ["model.layers.#.self_attn.k_norm.*"],
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
