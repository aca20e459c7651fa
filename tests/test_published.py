"What published configuration files say, and what of it is refused."
import json

import pytest

import model
from model import GPT
from tests.helpers import fails

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_what_the_decoder_cannot_compute_is_refused(tmp_path):
    sizes = {"vocab_size": 90, "hidden_size": 32}
    for more in ({"use_sliding_window": True}, {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
                 {"rope_scaling": {"type": "yarn", "factor": 4}},  # as Qwen2.5's own manual writes it
                 {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
                 {"layer_types": ["full_attention", "sliding_attention"]}, {"model_type": "qwen3_moe"},
                 {"model_type": "qwen3", "attention_bias": True}):
        (tmp_path / "config.json").write_text(json.dumps(sizes | more))
        assert fails(lambda: GPT.from_pretrained(tmp_path), tmp_path, "support")
    for more, name in (({"head_dim": 7}, "7 channels"),
                       ({"head_dim": "128"}, "head_dim"), ({"head_dim": -4}, "head_dim"),
                       ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_attention_heads": 12}, "divide"),
                       ({"hidden_size": "32"}, "hidden_size")):
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "qwen2"} | more))
        assert fails(lambda: GPT.from_pretrained(tmp_path), tmp_path, name)


def test_what_a_qwen3s_config_leaves_out_is_hugging_faces_default(tmp_path):
    pytest.importorskip("transformers")
    from transformers import Qwen3Config
    ours = model.gpt_config({"model_type": "qwen3", "num_attention_heads": 20, "num_key_value_heads": 4}, tmp_path)
    theirs = Qwen3Config(num_attention_heads=20, num_key_value_heads=4)
    for name in ("head_dim", "attention_bias", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
