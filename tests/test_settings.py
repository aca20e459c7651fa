"Fields of a configuration by name: --set, and an edit of PRESETS that a checkpoint does not have."
import argparse
import json

import pytest
import torch

import extras.memory
import model
import plumbing.settings
import train_base
from tests.helpers import QUICK, fails, one_line, run, setup, tiny_vlm, tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("text, parts", [
    ("bridge.num_latent=16", ["no such field", "did you mean bridge.num_latents?"]),
    ("num_latents=16", ["did you mean bridge.num_latents?"]),
    ("num_hidden_layers=2", ["did you mean vision.num_hidden_layers or decoder.num_hidden_layers?"]),
    ("foo.bar=1", ["there are vision.hidden_size"]), ("bridge.num_latents", ["not FIELD=VALUE"]),
    ("bridge.num_latents=", ["not FIELD=VALUE"]), ("bridge.num_latents=x", ["a whole number, such as 9"]),
    ("bridge.num_latents=2.5", ["a whole number"]), ("bridge.num_latents=-3", ["num_latents", "cannot be"]),
    ("bridge.seeded=0", ["True or False"]), ("decoder.rope_theta=x", ["a number"]),
    ("bridge.num_patches=4", ["follows from vision.image_size and vision.patch_size"]),
    ("bridge.kind=mlp", ["follows from --bridge="]), ("decoder.num_key_value_heads=3", ["not a multiple of 3"]),
    ("vision.hidden_size=130", ["not a multiple of 4"]), ("decoder.num_attention_heads=128", ["RoPE"]),
    ("decoder.num_attention_heads=12", ["not a multiple of 12"]), ("decoder.head_dim=33", ["decoder.head_dim", "RoPE"]),
    ("vision.patch_size=200", ["at least one patch"])])
def test_set_checks_names_and_values_in_one_line(text, parts):
    assert fails(lambda: model.preset("tiny", "", text), "--set=", *parts)


def test_set_changes_what_it_names_and_what_follows_from_it():
    config = model.preset("tiny", "", "bridge.num_latents=16, decoder.rope_theta=1e4,vision.image_size=96,"
                          "bridge.seeded=False")
    assert (config.bridge.num_latents, config.bridge.num_patches, config.bridge.seeded) == (16, 64, False)
    assert config.decoder.rope_theta == 1e4 and model.PRESETS["tiny"].bridge.num_latents == 9
    for text, d in (("num_attention_heads=8", 16), ("hidden_size=256", 64), ("head_dim=48", 48)):
        assert model.preset("tiny", "", "decoder." + text).decoder.head_dim == d  # H / heads, unless it is named
    with pytest.raises(ValueError, match="--set=vision.image_size=96: the encoder is --vision=siglip"):
        model.preset("tiny", "", "vision.image_size=96", "siglip-base-patch16-224")


def test_a_run_is_changed_by_set_and_says_so_in_log_and_checkpoint(trained, tmp_path):
    changed = "--set=bridge.num_latents=12,decoder.num_hidden_layers=3"
    ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}", changed)
    assert ran.code == 0
    folder = tmp_path / "tiny/sft"
    vlm = model.load_checkpoint(folder)
    assert len(vlm.gpt.blocks) == 3 and len(vlm.bridge.perceiver.latents) == 12
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["flags"]["set"] == changed[6:]
    # The checkpoint's weights have a shape: another one is refused, the same is not, and --resume has it from the run.
    one_line(run("train_rl", *QUICK, f"--out_dir={tmp_path}", "--set=bridge.num_latents=13"),
             "--set=bridge.num_latents=13", folder, "bridge.num_latents=12", "--init=scratch")
    ran = run("train_rl", *QUICK, f"--out_dir={tmp_path}", changed)
    assert ran.code == 0 and "PRESETS" not in ran.err
    assert run("train_sft", f"--out_dir={tmp_path}", "--resume").code == 0
    one_line(run("train_sft", f"--out_dir={tmp_path}", "--resume", "--set=bridge.num_latents=13"),
             "--resume with --set")


def test_an_edit_of_presets_is_never_ignored_in_silence(trained, tmp_path, monkeypatch):
    import train_sft
    start = f"--init={trained[0] / 'tiny/align'}"
    ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}", start, main=train_sft.main)
    assert ran.code == 0 and "PRESETS" not in ran.err
    monkeypatch.setattr(model.PRESETS["tiny"].bridge, "num_latents", 16)
    monkeypatch.setattr(model.PRESETS["tiny"].decoder, "intermediate_size", 300)
    ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}", start, main=train_sft.main)
    line, = (line for line in ran.err.splitlines() if "PRESETS" in line)
    assert ran.code == 0 and "bridge.num_latents is 9 there and 16" in line and "--init=scratch" in line
    assert "decoder.intermediate_size is 256 there and 300" in line
    assert model.load_checkpoint(tmp_path / "tiny/sft").config.bridge.num_latents == 9
    ran = run("train_sft", *QUICK, "--eval_size=2", f"--out_dir={tmp_path}", "--init=scratch", main=train_sft.main)
    assert ran.code == 0 and model.load_checkpoint(tmp_path / "tiny/sft").config.bridge.num_latents == 16


def test_memory_is_predicted_for_what_set_changes(monkeypatch):
    monkeypatch.setattr(extras.memory, "saved_bytes", lambda module, compiled, *inputs: inputs[0].nbytes)
    plain, wide = (run("bench", "--what=memory", *more) for more in ([], ["--set=decoder.intermediate_size=4096"]))
    assert wide.result["base"]["weights"] > 2 * plain.result["base"]["weights"]


def test_differences_name_the_fields_that_are_not_the_same_in_all():
    one, two = ({"bridge": {"num_latents": n, "kind": "mlp"}, "preset": "tiny"} for n in (9, 16))
    assert plumbing.settings.differences([one, two, one]) == {"bridge.num_latents": [9, 16, 9]}
    assert plumbing.settings.differences([one, {}]) == {"bridge.num_latents": [9, None], "bridge.kind": ["mlp", None],
                                                      "preset": ["tiny", None]}


def test_beside_released_weights_only_the_new_bridge_can_be_set(tmp_path, monkeypatch):
    def load_pretrained(name, vision="", bridge="", device="cpu"):
        vlm = tiny_vlm()
        vlm.config.run = {"chapters": finished}
        return vlm, tmp_path
    monkeypatch.setattr(train_base, "load_pretrained", load_pretrained)
    tokenizer().save(tmp_path)
    flags = argparse.Namespace(model="Org/Qwen", vision="", bridge="", set="bridge.num_latents=6,bridge.num_layers=2")
    finished = ["base"]  # a Qwen: its bridge is made here
    vlm, *_ = train_base.without_checkpoint(flags, setup())
    assert vlm.bridge(torch.ones(1, 16, 32)).shape == (1, 6, 32) and len(vlm.bridge.perceiver.layers) == 2
    flags.set = "decoder.num_hidden_layers=1"
    assert fails(lambda: train_base.without_checkpoint(flags, setup()), "--set=decoder.num_hidden_layers=1",
                 "released weights have their shape", "bridge.*")
    finished, flags.set = ["base", "align", "sft"], "bridge.num_latents=6"  # a LLaVA
    assert fails(lambda: train_base.without_checkpoint(flags, setup()), "--set=bridge.num_latents=6", "released")
