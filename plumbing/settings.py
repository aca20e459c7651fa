"""
The fields of a configuration by their names, "bridge.num_latents": set from the command line (--set=), and compared
between two configurations. Called by model.py's `preset`, where a stage starts from a checkpoint, and by
`bench.py --what=compare`. A reader of the lessons need know only --set.
"""
import difflib
from dataclasses import asdict, fields

from plumbing.files import require

# These are not free: {name: what decides it}.
KIND = "bridge.kind"
FOLLOWS = {KIND: "--bridge=", "bridge.vision_size": "vision.hidden_size",
           "bridge.text_size": "decoder.hidden_size", "bridge.num_patches": "vision.image_size and vision.patch_size",
           "vision.tiles": "--tiles="}

KINDS = {int: "a whole number", float: "a number", bool: "True or False"}


def flat(config: dict, prefix: str = "") -> dict:
    '{"bridge": {"num_latents": 9}, "preset": "tiny"} -> {"bridge.num_latents": 9, "preset": "tiny"}.'
    out = {}
    for name, value in config.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def set_fields(config, text: str, parts=("vision", "bridge", "decoder"), why: str = "") -> None:
    '''
    --set's "bridge.num_latents=16,decoder.num_hidden_layers=6" into a configuration. parts: those that may be changed;
    why: the reason that others may not.
    '''
    known = {name: value for name, value in flat(asdict(config)).items() if name.split(".")[0] in (
        "vision", "bridge", "decoder") and "." in name}
    for item in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        require(equals and value, f"--set={text}: {item!r} is not FIELD=VALUE, such as bridge.num_latents=16")
        near = difflib.get_close_matches(name, known, n=1)
        # a field without its part in front: num_latents
        near = [one for one in known if one.endswith(f".{name}")] or near
        require(name in known, f"--set={name}={value}: there is no such field" + (
            f"; did you mean {' or '.join(near)}?" if near else
            f"; there are {', '.join(one for one in known if one not in FOLLOWS)}"))
        require(name not in FOLLOWS, f"--set={name}={value}: {name} follows from {FOLLOWS.get(name)}; set that")
        part, field = name.split(".")
        require(part in parts, f"--set={name}={value}: {why}")
        kind = type(known[name])
        try:
            require(kind is not bool or value in ("True", "False"), "")  # bool("False") would be True
            setattr(getattr(config, part), field, value == "True" if kind is bool else kind(value))
        except ValueError:
            raise ValueError(f"--set={name}={value}: {name} is {KINDS.get(kind, 'a text')}, such as "
                             f"{known[name]}") from None


def differences(configs: list[dict]) -> dict[str, list]:
    "-> {field: its value in each} of those that are not the same in all. None: it lacks the field."
    configs = [flat(config) for config in configs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: value for name, value in values.items() if any(one != value[0] for one in value)}


def check_sizes(config, where, remedy: str = "is this the right file?") -> None:
    "config.json may come from a stranger: 10^9 layers are refused before time or memory is spent on them."
    for f in fields(config):
        value, most = getattr(config, f.name), 1000 if f.name.endswith("layers") else 2 ** 24
        fine = type(value) in ((int, float) if f.type is float else (f.type, ))
        if f.type is int:  # bridge.layer alone may be negative: -1 is the last one; vision.tiles may be 0
            fine = fine and (0 < value <= most or f.name == "layer" and -most < value < 0
                             or f.name == "tiles" and value == 0)
        require(fine, f"{where}: {f.name} {str(value)[:50]!r} cannot be; {remedy}")


def check_shapes(config, where: str) -> None:
    "Said here, before PyTorch says it in words of its own."
    v, b, d = config.vision, config.bridge, config.decoder
    for part in (v, b, d):
        check_sizes(part, where, "take another value, and a picture of at least one patch")
    for whole_, n, what in (
        (v.hidden_size, v.num_attention_heads, "vision.num_attention_heads"),
        (v.hidden_size, 4, "as sincos_positions needs"), (v.hidden_size, b.num_heads, "bridge.num_heads"),
        (d.num_attention_heads, d.num_key_value_heads, "decoder.num_key_value_heads"),
        (d.hidden_size, d.num_attention_heads, "decoder.num_attention_heads"),
        (d.head_dim, 2, "decoder.head_dim (RoPE turns pairs of channels)"),
    ):
        if whole_ % n:
            raise ValueError(f"{where}: {whole_} is not a multiple of {n}, {what}")
