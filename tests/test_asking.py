"A conversation as a request, and the answer as text."
import io

import pytest
import torch
from PIL import Image

from extras.asking import Text, make_message, make_request, open_pixels, options
from tests.helpers import png, sample_flags, tiny_vlm, tokenizer
from vision import Tiles, preprocess

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_what_is_given_counts_before_the_publishers_options():
    vlm = tiny_vlm()
    vlm.config.generation, vlm.config.decoder.max_position_embeddings = {"temperature": 0.7, "top_k": 20}, 100
    assert options(vlm, sample_flags()) == {"max_new_tokens": 100, "temperature": 0.7, "top_k": 20}  # not 256
    assert options(vlm, sample_flags("--temperature=0", "--max_new_tokens=9", "--top_p=0.5")) == {
        "max_new_tokens": 9, "temperature": 0, "top_k": 20, "top_p": 0.5}


@pytest.mark.parametrize("images, written", [(0, "What?"), (1, "<image>\nWhat?"), (2, "<image><image>\nWhat?")])
def test_a_question_is_written_as_in_training(images, written):
    asked = [make_message("What?", images)]
    assert tokenizer().render(asked, 4) == tokenizer().render([{"role": "user", "content": written}], 4)


def test_a_picture_is_resized_as_the_model_was_trained(tmp_path):
    picture = Image.open(io.BytesIO(png(1, 60))).crop((0, 0, 60, 30))
    vlm = tiny_vlm("mlp")
    vlm.config.vision.bicubic = vlm.config.vision.pad = True
    padded = Image.new("RGB", (60, 60), (127, 127, 127))
    padded.paste(picture, (0, 15))
    assert torch.equal(open_pixels(vlm, picture), preprocess(padded, 24, bicubic=True))
    vlm.config.bridge.newline = True  # a LLaVA-OneVision cuts a single picture into tiles, where they are wanted
    for vlm.config.vision.tiles, alone in ((36, True), (36, False), (0, True)):
        assert isinstance(open_pixels(vlm, picture, alone), Tiles) == (vlm.config.vision.tiles == 36 and alone)


def test_a_long_conversation_leaves_room_for_an_answer():
    vlm, talk = tiny_vlm(), [make_message("what is this? " * 3)]
    n = len(tokenizer().render(talk, add_generation_prompt=True).ids)
    for width, left in ((0, 50), (n + 60, 50), (n + 7, 7), (n, 1)):
        request = make_request(vlm, tokenizer(), talk, [], sample_flags("--max_new_tokens=50"), width)
        assert request.max_new_tokens == left


def test_text_is_shown_when_it_is_certain():
    smile = tokenizer().encode("\U0001f642")  # four bytes, a token each
    text = Text(tokenizer())
    assert [text.add([i]) for i in smile] == ["", "", "", "\U0001f642"] and text.tokens == 4
    text = Text(tokenizer(), ["END", "."])
    shown = [text.add(tokenizer().encode(piece)) for piece in ("a EN", "d", " E", "N", "D b")]
    assert shown == ["a ", "ENd", " ", "", ""] and text.ended  # "EN" could have been the beginning of END
    text = Text(tokenizer(), ["."])
    assert text.add(tokenizer().encode(". a")) == "" and text.ended
