"What training meets beside the world's own records: how often, never where it is held out, and what it looks like."
from collections import Counter

import numpy as np
import pytest

from plumbing.strange import (AMERICAN_SHARE, GARBLED_SHARE, GREY_SHARE, HONEST, NO_WORDS, STRANGE_SHARE, Grey,
                              Strange, to_american)
from plumbing.world import CAPTIONS, Scene, World
from tests.helpers import texts

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("task", ["captions", "chat", "exam"])
def test_strange_and_grey_pictures_have_their_share_of_training_and_their_answers(task):
    n, dataset, kinds, garbled = 6000, World(task), Counter(), 0
    for record in map(dataset.__getitem__, range(n)):
        picture, = record["images"]
        kinds[type(picture)] += 1
        answers = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        assert (answers == [HONEST]) == isinstance(picture, Strange)  # one answer to whatever is asked
        garbled += answers == [NO_WORDS]
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
