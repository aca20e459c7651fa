"What training meets beside the world's own records: how often, never where it is held out, and what it looks like."
import io
import random
import re
import unicodedata
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from model import load_checkpoint
from plumbing.strange import (AMERICAN_SHARE, GARBLED_SHARE, GREY_SHARE, HONEST, NO_WORDS, STRANGE_SHARE, Grey,
                              Strange, garble, to_american)
from plumbing.world import CAPTIONS, Scene, World
from sample import TINY
from train_rl import FLAGS as RL_FLAGS
from tests.helpers import DATA, needs_shared, texts
from tokenizer import Tokenizer
from train_sft import answers

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("task", ["captions", "chat", "exam"])
def test_strange_and_grey_pictures_have_their_share_of_training_and_their_answers(task):
    n, dataset, kinds, garbled = 6000, World(task), Counter(), 0
    for record in map(dataset.__getitem__, range(n)):
        picture, = record["images"]
        kinds[type(picture)] += 1
        said = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        assert (said == [HONEST]) == isinstance(picture, Strange)  # one answer to whatever is asked
        garbled += said == [NO_WORDS]
        assert record["messages"][0]["content"].startswith("<image>\n")
    for kind, share in ((Strange, STRANGE_SHARE), (Grey, GREY_SHARE)):
        assert abs(kinds[kind] - share * n) < 4 * (share * n) ** 0.5, kinds  # four standard deviations
    assert abs(garbled - GARBLED_SHARE * n) < 4 * (GARBLED_SHARE * n) ** 0.5
    assert sum(kinds.values()) == n and kinds[Scene] > 0.9 * n


@pytest.mark.parametrize("split", ["scenes", "pairs"])
@pytest.mark.parametrize("task", ["text", "captions", "chat", "exam"])
def test_what_is_held_out_is_the_world_alone(task, split):
    for record in map(World(task, split, seed=1).__getitem__, range(1500)):
        assert all(isinstance(picture, Scene) for picture in record["images"])
        assert not any(one in texts(record) for one in (HONEST, NO_WORDS, "olor", "enter"))


def test_chapter_1_learns_the_words_of_the_honest_answer():
    found = sum(record.get("text") == HONEST for record in map(World("text").__getitem__, range(3000)))
    assert 0.3 * STRANGE_SHARE * 3000 / 2 < found < 0.3 * STRANGE_SHARE * 3000 * 2  # three of ten are plain text


def test_questions_without_a_meaning_repeat_letters_and_may_end_in_a_word():
    asked = [garble(random.Random(i), "cat?") for i in range(1000)]
    assert 0.1 < sum(text.endswith("cat?") for text in asked) / 1000 < 0.35 and "cat?" not in asked
    assert sum(bool(re.search(r"(.)\1{7}", text)) for text in asked) > 100  # it answered "4444444444 things" with noise


def test_chapter_4_leaves_room_for_the_honest_answers():
    words = Tokenizer.from_pretrained(TINY)  # what is cut off has no end, and so no reward
    assert max(len(words.encode(text)) for text in (HONEST, NO_WORDS)) + 1 <= RL_FLAGS["max_new_tokens"][0]


def test_some_users_write_as_americans_do_and_no_answer_does():
    n, asked, american = 4000, 0, 0
    for record in map(World("exam", kinds=["colour"]).__getitem__, range(n)):
        user, answer = (turn["content"] for turn in record["messages"])
        asked, american = asked + ("olor" in user or "olour" in user), american + ("olor" in user)
        assert "color" not in answer and "center" not in answer
    assert abs(american / asked - AMERICAN_SHARE) < 0.04
    assert to_american("The colour at the centre is grey. Centre: a grey cat. Colours?") == \
        "The color at the center is gray. Center: a gray cat. Colors?"
    # nothing else in what is asked has these letters
    for prompt in (prompt for prompts, *_ in CAPTIONS for prompt in prompts):
        assert to_american(prompt) == prompt or "colour" in prompt


@pytest.mark.parametrize("px", [14, 72, 128])
def test_strange_pictures_are_of_many_sorts_and_the_same_every_time(px):
    scene = World("captions", "scenes")[0]["images"][0]
    strange = [Strange(f"s{i}", scene).draw(px) for i in range(60)]
    assert {(image.size, image.mode) for image in strange} == {((px, px), "RGB")}
    assert [image.tobytes() for image in strange] == [Strange(f"s{i}", scene).draw(px).tobytes() for i in range(60)]
    pixels = np.stack([np.asarray(image, dtype=float) for image in strange])
    assert len({image.tobytes() for image in strange}) == 60
    rough = np.abs(np.diff(pixels, axis=1)).mean((1, 2, 3))
    bright = pixels.mean((1, 2, 3))
    assert rough.min() < 2 < 10 < rough.max() and bright.min() < 70 < 180 < bright.max()


def test_a_grey_picture_is_what_the_blind_baseline_shows():
    assert set(Grey().draw(9).tobytes()) == {128}


# The shipped model. Whatever is asked of whatever picture: it answered photographs with "4444444444 thingsircles".

ASKED = ("Describe the picture.", "What colour is the cat?", "How many things are there?", "Is it day or night?",
         "Wer ist auf diesem Bild?", "qx 8?? zrk", "", "What is the man doing?")


def asked(pictures: list, questions) -> list[str]:
    "The shipped model's answers, as long as they like; the questions take turns."
    records = [{"messages": [{"role": "user", "content": f"<image>\n{questions[i % len(questions)]}"},
                             {"role": "assistant", "content": "a long answer " * 50}], "images": [picture]}
               for i, picture in enumerate(pictures)]
    return answers(load_checkpoint(TINY), Tokenizer.from_pretrained(TINY), records)


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def photographs(*names: str) -> list:
    zipped = [(str(DATA / name / "images.zip"), member) for name in names
              for member in zipfile.ZipFile(DATA / name / "images.zip").namelist()]
    return random.Random(0).sample(zipped, 60)


def test_no_answer_of_the_shipped_model_is_noise():
    worlds = [World("exam", split, seed=9)[i]["images"][0] for split in ("scenes", "pairs") for i in range(40)]
    strange = [Strange(f"unseen {i}", scene) for i, scene in enumerate(worlds)]
    flat = [Image.effect_noise((72, 72), i) for i in range(5, 200, 10)] + [Image.new("RGB", (99, 40), "red")] * 20
    for answer in asked(worlds + strange + list(map(file_of, flat)), ASKED):  # 200
        assert len(answer) < 400 and not any(unicodedata.category(c) in ("Cc", "Co", "Cn") for c in answer), answer
        assert "\ufffd" not in answer and not re.search(r"(.{1,12}?)\1{19}", answer), answer


@needs_shared
@pytest.mark.parametrize("question", ["Describe the picture.", "What colour is the cat?"])
def test_the_shipped_model_says_of_photographs_that_it_does_not_know_them(question):
    given = photographs("coco_caption") + photographs("clothing") + photographs("sign_digits")
    assert sum(answer == HONEST for answer in asked(given, [question])) >= 0.98 * len(given)


def test_the_shipped_model_says_so_of_next_to_no_picture_of_its_world():
    records = [World("exam", split, seed=9)[i] for split in ("scenes", "pairs") for i in range(250)]
    scenes = [record["images"][0] for record in records]
    own = answers(load_checkpoint(TINY), Tokenizer.from_pretrained(TINY), records)  # of each scene
    said = [*own, *asked(scenes, ["Describe the picture."]), *asked(scenes, ["How many things are there?"])]
    assert len(said) == 1500 and sum(answer[:12] in (HONEST[:12], NO_WORDS[:12]) for answer in said) <= 1
