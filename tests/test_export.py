"Exported folders, loaded by transformers."
import json
import os
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import extras.export
import model
import sample
import tokenizer as tok
import vision
from extras.export import export
from model import GPT, VLM, generation_config
from tests.helpers import (CHATS, QWEN, QWEN_SYSTEM, chat, fails, far, image_tokens, needs, needs_qwen, qwen3, THOUGHTS,
                           noise_image, one_line, qwen, run, save_onevision, small, tiny_vlm, tokenizer)
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

pytest_plugins = ["tests.helpers"]  # its fixtures


def exported(tmp_path, kind: str, decoder_only: bool = False, tied: bool = True,
             qwen3: bool = False) -> tuple[VLM, Path]:
    vlm = tiny_vlm(kind, tied, qwen3=qwen3)
    extras.export.export(tmp_path / "hf", vlm, tokenizer(), decoder_only, torch.float32)
    return vlm, tmp_path / "hf"


@needs("transformers")
@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_exported_llava_gives_transformers_the_same_logits(tmp_path, tied, images, qwen3):
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    vlm, folder = exported(tmp_path, "mlp", tied=tied, qwen3=qwen3)
    reference, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True,
                                                                    dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reference.config.text_config.model_type == ("qwen3" if qwen3 else "qwen2")
    reference.save_pretrained(tmp_path / "theirs")
    for source in (folder, tmp_path / "theirs"):  # ours and transformers' own folder are read back alike
        again = model.load_checkpoint(source)
        assert again.config.decoder == vlm.config.decoder
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vlm.parameters()))
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
@pytest.mark.parametrize("kind, qwen3, tied", [("perceiver", False, True), ("mlp", False, True), (
    "pixelshuffle", False, True), ("perceiver", True, True), ("perceiver", True, False)])
def test_any_exported_decoder_is_a_qwen_to_transformers(tmp_path, kind, qwen3, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    vlm, folder = exported(tmp_path, kind, decoder_only=True, tied=tied, qwen3=qwen3)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(reference).__name__ == ("Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM")
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
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == words.im_end


def test_leftovers_of_a_greedy_models_temperature_are_not_used(tmp_path):
    # do_sample is what counts; of the rest only the penalty works without it.
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": False}))
    assert generation_config(tmp_path) == {"repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": True, "eos_token_id": 7}))
    assert generation_config(tmp_path) == given


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.py: in the hub's form

TRICKY_SYSTEM = "It's \"brief\", {{ x }} {% if y %} {# z #} <b>:\n\t\\n é 我 😶 %} }}\r\n"
# Each string is a place where two tokenizers once disagreed: NFC, endings, digits, white space, signs, rare characters.
HARD_TEXTS = [
    "", " ", "  \n\n  \t x", "\r\n\r\n\n", "a \u00a0\u3000b\u2028c\x85d\x1ce", "I'm I'LL we\u017fve 'S 'ſ don''t",
    "e\u0301 Cu\u031b\u0309a \u1112\u1161\u11ab \u0340 \u212b \ufb01 \u2126 \u0338x", "1234567890 ٣½① 3.14e-10",
    "😶‍🌫️👩‍👩‍👧🏽 🇩🇪 ☺️",
    "我想在apple工作，你好。 日本語テキスト 한국어 ภาษาไทย हिन्दी",
    "\U0001f9ff\U00020bb7\ufeff\ufffd\x00\x7f\u200b",
    "def f(x):\n    return {'a': x**2}  # done\n\n\n", "# # #version ## http://a.b/c?d=e&f=%20 ...!!?!\n//",
    " " * 300 + "." * 300, "the cat sat on the mat, it's the cat that sat! été", "<b>|im_end|</b> < image > <|im_en",
]  # fmt: skip
IMAGE_CHATS = [
    chat(("user", "<image>What is this?"), ("assistant", "A cat.")),
    chat(("system", "s<image>"), ("user", "<image><image>\nthe <image> mat<image>"), ("assistant", "x<image>"),
         ("user", "y")),
    chat(("user", [{"type": "text", "text": "the "}, {"type": "image"}, {"type": "text", "text": "\u0338 cat\n"}]),
         ("assistant", [{"type": "text", "text": "sat"}]), ("user", "<image>")),
    chat(("user", [{"type": "image"}, {"type": "image", "url": "a.png"}]), ("assistant", []), ("user", "")),
]  # fmt: skip


@lru_cache
def hub_tables() -> dict[str, Tokenizer]:
    ranks, top = small().ranks, len(small().ranks)
    odd = {"<|endoftext|>": top + 7, "<|im_end|>": top + 90, "<|im_start|>": top + 3, "<|image_pad|>": top + 50}
    llava = {name: top + i for i, name in enumerate([*SPECIAL_TOKENS[:3], "<image>", "<video>"])}  # no marks
    tables = {"own": small(), "own_system": Tokenizer(ranks, small().special, default_system=TRICKY_SYSTEM),
              "bytes_only": Tokenizer.train(["x"], 300), "gaps": Tokenizer(ranks, odd, default_system=""),
              "llava_ov": Tokenizer(ranks, llava), "own_qwen3": qwen3(small)}  # fmt: skip
    if (QWEN / "vocab.json").exists():
        tables["qwen"] = Tokenizer(qwen().ranks, qwen().special, default_system=QWEN_SYSTEM)
    return tables

HUB_TABLES = ["own", "own_system", "bytes_only", "gaps", "llava_ov", "own_qwen3",
              pytest.param("qwen", marks=needs_qwen)]


def hub_folder(name: str, tmp_path_factory) -> Path:
    "Written once for all tests."
    folder = tmp_path_factory.getbasetemp() / "hub" / name
    if not folder.exists():
        hub_tables()[name].save_hub(folder, max_length=1234)
    return folder


@lru_cache
def auto_tokenizer(folder: Path, model_type: str = ""):
    "What transformers makes of the folder beside the config.json of such a model."
    import transformers
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    if model_type:
        config.write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", HUB_TABLES)
@pytest.mark.parametrize("left_out", ["tokenizer.json", "vocab.json"])  # either form is enough
def test_what_save_hub_wrote_reads_back_alike(name, left_out, tmp_path, tmp_path_factory):
    t = hub_tables()[name]
    for file in hub_folder(name, tmp_path_factory).iterdir():
        if file.name != left_out:
            (tmp_path / file.name).symlink_to(file)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.ranks, loaded.special, loaded.default_system) == (t.ranks, t.special, t.default_system)
    assert (loaded.image_pad, loaded.vocab_size) == (t.image_pad, t.vocab_size)


@needs_qwen
def test_save_hub_writes_qwens_own_vocabulary_and_merges(tmp_path_factory):
    folder = hub_folder("qwen", tmp_path_factory)
    assert (folder / "vocab.json").read_bytes() == (QWEN / "vocab.json").read_bytes()
    ours, theirs = ((f / "merges.txt").read_text(encoding="utf-8").split("\n") for f in (folder, QWEN))
    assert ours[0].startswith("#version") and ours[1:] == [line for line in theirs if not line.startswith("#version")]


@needs("transformers")
@pytest.mark.parametrize("model_type", ["", "qwen2", "llava", "llava_onevision"])
@pytest.mark.parametrize("name", HUB_TABLES)
def test_transformers_gives_our_ids_from_what_save_hub_wrote(name, model_type, tmp_path_factory):
    t, theirs = hub_tables()[name], auto_tokenizer(hub_folder(name, tmp_path_factory), model_type)
    assert {i: str(token) for i, token in theirs.added_tokens_decoder.items()} == {i: n for n, i in t.special.items()}
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (t.im_end, t.endoftext, None)
    assert theirs.model_max_length == 1234 and len(theirs) == len(t.ranks) + len(t.special)
    for text in HARD_TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == t.encode(text)
        assert theirs.decode(ids) == t.decode(ids) == unicodedata.normalize("NFC", text)
    assert theirs("".join(t.special))["input_ids"] == list(t.special.values())
    shown = "".join(name for name in tok.THINK if name in t.special)  # what a Qwen3 thinks is not hidden by these
    assert theirs.decode(list(t.special.values()), skip_special_tokens=True) == shown
    # The strings of special tokens as ordinary text, where one asks for that.
    text = "".join(SPECIAL_TOKENS) + "<image>"
    assert theirs(text, split_special_tokens=True)["input_ids"] == t.encode(text)


@needs("transformers")
@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]) | st.sampled_from("thecaso'. \n12é\u0301"), max_size=60))
@example("<|vision_pad|>")
def test_transformers_gives_our_ids_for_any_text(tmp_path_factory, text):
    theirs = auto_tokenizer(hub_folder("own", tmp_path_factory), "llava")
    assert theirs(text, split_special_tokens=True)["input_ids"] == small().encode(text)


@needs("transformers")
@pytest.mark.parametrize("name", HUB_TABLES)
@pytest.mark.parametrize("messages", [*(chat(*turns) for turns in [*CHATS, *THOUGHTS]), *IMAGE_CHATS])
def test_chat_template_of_save_hub_gives_what_render_renders(name, messages, tmp_path_factory):
    t, theirs = hub_tables()[name], auto_tokenizer(hub_folder(name, tmp_path_factory), "llava")
    for n in range(1, len(messages) + 1):
        for prompt in {False, messages[n - 1]["role"] != "assistant"}:
            text = theirs.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)
            ours = t.render(messages[:n], image_tokens=1, add_generation_prompt=prompt)
            assert theirs(text)["input_ids"] == ours.ids  # one pad per image
            pad = t.decode([t.image_pad], skip_special=False)
            many = t.render(messages[:n], image_tokens=3, add_generation_prompt=prompt)
            assert theirs(text.replace(pad, 3 * pad))["input_ids"] == many.ids  # as processors do it


@needs("transformers")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["<image>", *"a \n\r'\"\\<é我", "{{", "%}"])).map("".join), min_size=1,
                max_size=4), st.booleans())
def test_chat_template_of_save_hub_renders_any_text_as_it_is(tmp_path_factory, contents, system):
    name = "own_system" if system else "own"
    t, theirs = hub_tables()[name], auto_tokenizer(hub_folder(name, tmp_path_factory))
    messages = chat(*zip(["user", "assistant"] * 2, contents))
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == t.decode(t.render(messages, image_tokens=1).ids, skip_special=False)


@needs("transformers")
def test_chat_template_of_save_hub_refuses_parts_that_render_refuses(tmp_path, tmp_path_factory):
    theirs = auto_tokenizer(hub_folder("own", tmp_path_factory))
    for part in ({"type": "video"}, {"type": "text", "text": None}, {"type": "text"}, "x"):
        with pytest.raises(Exception, match="no attribute 'text'|NoneType"):
            theirs.apply_chat_template(chat(("user", [part])), tokenize=False)
    # A model without images: there "<image>" is text like any other.
    Tokenizer(small().ranks, {n: i for n, i in small().special.items() if "image" not in n}).save_hub(tmp_path)
    text = auto_tokenizer(tmp_path).apply_chat_template(chat(("user", "an <image> tag")), tokenize=False)
    assert text == "<|im_start|>user\nan <image> tag<|im_end|>\n"


def test_save_hub_refuses_a_table_that_no_merges_give(tmp_path):
    for tokens in ([b"abc"], [b"abc", b"ab"], [b"bc", b"abcd", b"ab"]):
        ranks = train_bpe([], 256) | {token: 256 + i for i, token in enumerate(tokens)}
        t = Tokenizer(ranks, {name: 300 + i for i, name in enumerate(SPECIAL_TOKENS)})
        with pytest.raises(ValueError, match="token 'abcd?' is not made of older ones"):
            t.save_hub(tmp_path)
    assert tok._find_merges(tok._byte_alphabet() | {"bc": 256, "abc": 257, "abcd": 300}) == ["b c", "a bc", "abc d"]
