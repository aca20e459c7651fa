"Exported folders, loaded by transformers."
import json
import os
from pathlib import Path

import pytest
import torch

import extras.export
import model
import sample
import vision
from extras.export import export
from model import GPT, VLM, generation_config
from tests.helpers import (fails, far, image_tokens, needs, noise_image, one_line, run, save_onevision, tiny_vlm,
                           tokenizer)
from tokenizer import Tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures


def exported(tmp_path, kind: str, decoder_only: bool = False, tied: bool = True) -> tuple[VLM, Path]:
    vlm = tiny_vlm(kind, tied)
    extras.export.export(tmp_path / "hf", vlm, tokenizer(), decoder_only, torch.float32)
    return vlm, tmp_path / "hf"


@needs("transformers")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_exported_llava_gives_transformers_the_same_logits(tmp_path, tied, images):
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    vlm, folder = exported(tmp_path, "mlp", tied=tied)
    reference, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True,
                                                                    dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # The whole way as an engine goes it: its own processor makes ids and pixels from the same conversation.
    photos = [noise_image(40 + 9 * i, 31, i) for i in range(images)]
    messages = [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "what is this?"}]}]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(images=photos or None, text=text, return_tensors="pt")
    ours = [vision.preprocess(photo, 24, vlm.config.vision.bicubic) for photo in photos]
    asked = tokenizer().render(messages, [vlm.config.bridge.tokens_of(p) for p in ours], add_generation_prompt=True)
    assert theirs["input_ids"][0].tolist() == asked.ids
    with torch.no_grad():
        expected = reference.eval()(**theirs).logits
        places = torch.tensor([s + i for s in asked.slots for i in range(16)], dtype=torch.long)
        x = vlm.embed(torch.tensor([asked.ids]), image_tokens(vlm, ours) if ours else None, places)
        assert far(vlm.gpt.hidden(x) @ vlm.gpt.head_weight.t(), expected) < (1e-4 if not images else 0.02)
        if images:  # their pixels into our model: then all of it is equal, not only up to how a picture is resized
            x = vlm.embed(torch.tensor([asked.ids]), vlm.encode_images(theirs["pixel_values"]).flatten(0, 1), places)
            assert far(vlm.gpt.hidden(x) @ vlm.gpt.head_weight.t(), expected) < 1e-4


@needs("transformers")
@pytest.mark.parametrize("kind", ["perceiver", "mlp", "pixelshuffle"])
def test_any_exported_decoder_is_a_qwen2_to_transformers(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    vlm, folder = exported(tmp_path, kind, decoder_only=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "one two"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    asked = tokenizer().render([{"role": "user", "content": "one two"}], add_generation_prompt=True)
    assert ids["input_ids"][0].tolist() == asked.ids
    with torch.no_grad():
        assert far(vlm.gpt(torch.tensor([asked.ids])), reference(**ids).logits) < 1e-4
    again = GPT.from_pretrained(folder)  # and comes back as it was
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vlm.gpt.parameters()))


@needs("transformers")
def test_onevision_goes_out_as_it_came_in(tmp_path):
    from transformers import LlavaOnevisionForConditionalGeneration
    save_onevision(tmp_path / "in")
    vlm = model.load_checkpoint(tmp_path / "in").eval()
    special = {"<|endoftext|>": 297, "<|im_start|>": 298, "<|im_end|>": 299, "<image>": 300}
    table = Tokenizer({bytes([b]): b for b in range(256)}, special)
    extras.export.export(tmp_path / "out", vlm, table, dtype=torch.float32)
    reference, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    first, again = dict(vlm.named_parameters()), dict(model.load_checkpoint(tmp_path / "out").named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert reference.config.image_token_index == 300 and reference.config.vision_feature_layer == -1


def test_what_hugging_face_has_no_model_for_is_not_exported(tmp_path):
    assert fails(lambda: exported(tmp_path, "perceiver"), "perceiver", "--decoder_only")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    for flag in ("--export", "--slim"):
        one_line(run("sample", f"{flag}={tmp_path / 'hf'}", f"--init={sample.TINY}"), tmp_path / "hf", "not empty")
    assert os.listdir(tmp_path / "hf") == ["mine"]


@pytest.mark.parametrize("generation, sampled", [({}, False), ({"temperature": 0.7, "top_p": 0.8}, True)])
def test_an_exported_model_says_how_it_samples_and_when_it_stops(tmp_path, generation, sampled):
    vlm, words = tiny_vlm(), tokenizer()
    vlm.config.generation = generation
    export(tmp_path / "hf", vlm, words, decoder_only=True)
    told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert told == {"eos_token_id": [words.im_end, words.endoftext], "pad_token_id": words.endoftext,
                    "do_sample": sampled, **generation}
    assert generation_config(tmp_path / "hf") == generation


def test_leftovers_of_a_greedy_models_temperature_are_not_used(tmp_path):
    # do_sample is what counts; of the rest only the penalty works without it.
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": False}))
    assert generation_config(tmp_path) == {"repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": True, "eos_token_id": 7}))
    assert generation_config(tmp_path) == given
