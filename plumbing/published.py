"""
What the configuration files of published models say, with the defaults that they leave out; what this code does not do
is refused. Called where model.py loads released weights. A reader of the lessons need not know it.
"""
from pathlib import Path

from plumbing.files import read_json, require

# What Hugging Face's code does for a model type, whatever its config.json says.
FAMILIES = {"qwen2": {"attention_bias": True, "use_qk_norm": False},
            "qwen3": {"attention_bias": False, "use_qk_norm": True}}


def qwen_fields(hf: dict, folder: Path) -> dict:
    "A Qwen2's or Qwen3's config.json -> fields of GPTConfig; what the decoder does not do is refused."
    # TRAP: within a LLaVA's config.json, what equals a default is left out, and Qwen2Config's are not GPTConfig's.
    kind = hf.get("model_type", "qwen2")
    hf = {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 32, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "head_dim": 128 if kind == "qwen3" else None, **hf}
    hf |= hf.get("rope_parameters") or {}  # transformers 5 moved rope_theta in there
    rope = {**hf, **(hf.get("rope_scaling") or {})}
    # What we would compute differently is refused: such a model would load, and answer a little worse.
    require(kind in FAMILIES, f"{folder}/config.json: a {kind} model; only Qwen2, Qwen2.5 and "
                              "dense Qwen3 are supported")
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()) \
            or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder}/config.json: sliding windows and scaled RoPE are not supported")
    if kind == "qwen3" and hf.get("attention_bias"):
        raise ValueError(f"{folder}/config.json: a Qwen3 with attention_bias is not supported; no released one has it")
    return hf | FAMILIES[kind]


def generation_config(folder) -> dict:
    "How the publisher samples: options of `generate`."
    hf = read_json(path) if (path := Path(folder) / "generation_config.json").exists() else {}
    # TRAP: without do_sample the other entries are leftovers, for the checkpoint is greedy; the penalty still counts.
    keys = ("temperature", "top_k", "top_p", "repetition_penalty") if hf.get("do_sample") else ("repetition_penalty", )
    return {key: hf[key] for key in keys if hf.get(key) is not None}
