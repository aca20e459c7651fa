"Requests that join and leave: nobody's answer changes."
import itertools

import pytest
import torch

import vision
from model import VLM
from plumbing.engine import Engine, Request, digest, respond
from tests.helpers import RAGGED, chat_model, picture, prompts, request, say, tiny_vlm, tokenizer
from tokenizer import Rendered

pytest_plugins = ["tests.helpers"]  # its fixtures


def logits_of(vlm: VLM, requests: list, rows: int, joins=lambda step: 99) -> list:
    "Runs them, joins(step) more of them before each step -> for each the logits that its tokens were chosen from."
    engine, waiting, seen = Engine(vlm, rows=rows, width=160), list(requests), {r: [] for r in requests}
    choose = engine.choose

    def watched(B):
        for row, r in engine.running.items():
            seen[r].append(engine.logits[row].clone())
        return choose(B)
    engine.choose = watched
    for step in itertools.count():
        for r in waiting[:joins(step)]:
            engine.submit(r)
        del waiting[:joins(step)]
        if not (waiting or engine.busy):
            return [torch.stack(seen[r]) for r in requests]
        engine.step()


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_a_request_is_the_same_bit_for_bit_alone_and_among_others_that_join_and_leave(rows):
    vlm = tiny_vlm()
    alone, among = [request(vlm, i) for i in range(20)], [request(vlm, i) for i in range(20)]
    expected = [logits_of(vlm, [r], 1)[0] for r in alone]
    for r, a, b in zip(among, expected, logits_of(vlm, among, rows, joins=lambda step: step % 3)):
        assert torch.equal(a, b) and len(b) == r.max_new_tokens and r.finish == "length"
    assert [r.answer for r in among] == [r.answer for r in alone] and len({tuple(r.answer) for r in alone}) == 20


def test_a_finished_row_is_free_at_once_and_a_cancelled_one_too():
    vlm = tiny_vlm()
    engine = Engine(vlm, rows=4, width=64)
    requests = [request(vlm, 0, max_new_tokens=n) for n in (1, 9, 9, 9, 9)]
    for r in requests:
        engine.submit(r)
    assert engine.step() == requests[:1] and len(engine.running) == 3 and len(engine.waiting) == 1
    assert engine.step() == [] and len(engine.running) == 4 and len(requests[4].answer) == 1
    requests[1].finish = "cancelled"
    assert engine.step() == [requests[1]] and len(engine.free) == 1
    gone = request(vlm, 1)
    gone.finish = "cancelled"  # before it got a row
    engine.submit(gone)
    assert set(engine.run()) == set(requests[2:]) and not gone.answer and len(engine.free) == 4
    # From an endless source only as many are taken as there are rows.
    taken = []
    endless = (taken.append(i) or request(vlm, i % 5) for i in itertools.count())
    assert len(list(itertools.islice(engine.run(endless), 6))) == 6 and len(taken) < 16


def test_rows_that_end_early_are_not_computed_any_more_and_nobody_notices():
    vlm, computed = tiny_vlm(), []
    alone, among = ([request(vlm, i, max_new_tokens=9 if i in (6, 17, 18) else 2) for i in range(20)] for _ in range(2))
    expected = [logits_of(vlm, [r], 1)[0] for r in alone]
    decode = vlm.decode
    vlm.decode = lambda kv, S, token, columns: computed.append(len(token)) or decode(kv, S, token, columns)
    assert all(map(torch.equal, expected, logits_of(vlm, among, 20)))
    assert computed == [20, 20, 4, 4, 4, 4, 4, 4] and [r.answer for r in among] == [r.answer for r in alone]
    # Those that changed places are found again: of each prompt only the last token is computed once more.
    engine = Engine(vlm, rows=20, width=160)
    for _ in range(2):
        again = [request(vlm, i, max_new_tokens=9 if i in (6, 17, 18) else 2) for i in range(20)]
        assert sorted(map(id, engine.run(again))) == sorted(map(id, again))
        assert [r.answer for r in again] == [r.answer for r in alone] and len(set(engine.free)) == 20
    assert [r.reused for r in again] == [len(r) - len(r.answer) - 1 for r in again]


def test_a_conversation_that_goes_on_is_not_read_again_and_answered_alike():
    vlm, calls = tiny_vlm(), []
    vlm.vit.register_forward_hook(lambda *_: calls.append(1))
    turns = chat_model("<image>what is this?", "a red cat", "and <image>this?", "a blue dog", "one two", images=[1, 2])
    images, parts = [picture(1), picture(2)], [turns["messages"][:n] for n in (1, 3, 5)]
    asked = [tokenizer().render(part, 4, add_generation_prompt=True) for part in parts]
    engine, shown = Engine(vlm, rows=4, width=256), (1, 2, 2)
    for i, (prompt, n) in enumerate(zip(asked, shown)):
        again = Request(prompt, images[:n], max_new_tokens=8)
        fresh = Request(prompt, images[:n], max_new_tokens=8)
        other = request(vlm, i, max_new_tokens=3)  # someone else, in between
        engine.submit(again), engine.submit(other)
        list(engine.run())
        assert torch.equal(*(logits_of(vlm, [Request(prompt, images[:n], max_new_tokens=8)], 1)[0]
                             for _ in range(2)))
        list(Engine(vlm, [fresh]).run())
        assert again.answer == fresh.answer
        # all but what the last answer and the new question add
        assert again.reused == (len(asked[i - 1].ids) if i else 0) and not fresh.reused
    # The start of another conversation keeps its own row, and an edited turn goes on from what is equal.
    other_turn = [*parts[1][:2], {"role": "user", "content": "a dog?"}]
    edited = Request(tokenizer().render(other_turn, 4, True), images[:1], max_new_tokens=8)
    engine.submit(edited)
    list(engine.run())
    assert len(asked[0].ids) <= edited.reused < len(edited.prompt.ids)
    assert edited.answer == say(vlm, [edited.prompt], [1], max_new_tokens=8)[0]
    # Another picture in the same place is another conversation.
    swapped = Request(asked[0], [picture(9)], max_new_tokens=8)
    engine.submit(swapped)
    list(engine.run())
    assert swapped.reused <= asked[0].slots[0] and swapped.answer == say(vlm, [asked[0]], [9], max_new_tokens=8)[0]


def test_continued_logits_equal_fresh_ones_bit_for_bit():
    vlm = tiny_vlm()
    engine = Engine(vlm, rows=2, width=128)
    for n in (12, 29, 60):  # one prompt, ever longer
        r = Request(Rendered(list(range(n)), [0] * n, []), max_new_tokens=1)
        engine.submit(r)
        with torch.no_grad():
            engine.admit()
        seen = [engine.logits[next(iter(engine.running))].clone()]
        engine.step()
        fresh = logits_of(vlm, [Request(r.prompt, max_new_tokens=1)], 1)[0][0]
        assert torch.equal(seen[0], fresh) and r.reused == {12: 0, 29: 12, 60: 29}[n]


def test_a_picture_seen_before_is_not_encoded_again():
    vlm, seen = tiny_vlm(), []
    vlm.vit.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    engine = Engine(vlm, rows=4, width=64)
    for numbers in ([1], [1], [2, 1], [2, 1]):
        words = " ".join("<image>" for _ in numbers) + "one two"[:len(seen)]
        prompt = tokenizer().render([{"role": "user", "content": words}], 4, add_generation_prompt=True)
        engine.submit(Request(prompt, [picture(i) for i in numbers], max_new_tokens=2))
        list(engine.run())
    assert len(seen) == 2
    engine.pictures.SIZE = 1  # the oldest goes
    engine.pictures([picture(1)])
    assert list(engine.pictures.known) == [digest(picture(1))] and len(seen) == 2
    a, b = (vision.Tiles(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), *shape, 7, 7) for shape in ((1, 2), (2, 1)))
    assert digest(a) != digest(b)


def test_a_conversation_longer_than_the_model_was_trained_on_is_refused():
    vlm = tiny_vlm()
    vlm.config.decoder.max_position_embeddings = 20
    engine = Engine(vlm, rows=1, width=256)
    engine.submit(Request(Rendered([1] * 20, [], []), max_new_tokens=3))  # to the last position
    with pytest.raises(ValueError, match="21 tokens.*20"):
        engine.submit(Request(Rendered([1] * 21, [], []), max_new_tokens=3))


def test_samples_of_one_prompt_equal_single_runs_with_their_seeds():
    vlm = tiny_vlm()
    asked = prompts(vlm, RAGGED[1:3])
    options = {"max_new_tokens": 10, "temperature": 2.5, "repetition_penalty": 1.1}
    together = say(vlm, asked, [2, 3], samples=3, seeds=list(range(6)), **options)
    alone = [say(vlm, [asked[i // 3]], RAGGED[1 + i // 3]["images"], seeds=[i], **options)[0] for i in range(6)]
    assert together == alone and len({tuple(row) for row in together}) > 3


def test_equal_prompts_are_computed_once_and_not_mixed_up_with_other_pictures():
    vlm, computed = tiny_vlm(), []
    (asked,), prefill = prompts(vlm, RAGGED[:1]), vlm.prefill
    vlm.prefill = lambda kv, S, ids, *rest: computed.append(len(ids)) or prefill(kv, S, ids, *rest)
    together = say(vlm, [asked] * 4, [1, 2, 1, 2], max_new_tokens=8)
    assert computed == [2] and together[:2] == together[2:]
    assert together[:2] == [say(vlm, [asked], [i], max_new_tokens=8)[0] for i in (1, 2)]


def test_padding_rows_of_the_vocabulary_are_never_said():
    vlm, used = tiny_vlm(tied=False), 300
    with torch.no_grad():  # they would win every time
        vlm.gpt.head.weight[used:] = 100 * vlm.gpt.head.weight[:20]
    (asked,) = prompts(vlm, RAGGED[1:2])
    for options in ({}, {"temperature": 5.0}, {"repetition_penalty": 1.5}):
        assert max(say(vlm, [asked], max_new_tokens=30, **options)[0]) >= used
        assert max(say(vlm, [asked], max_new_tokens=30, vocab_used=used, **options)[0]) < used


def test_respond_gives_the_text_without_special_tokens():
    vlm = tiny_vlm()
    pixels = [[picture(i) for i in c["images"]] for c in RAGGED]
    texts = respond(vlm, tokenizer(), [c["messages"] for c in RAGGED], pixels, max_new_tokens=8)
    assert len(texts) == 5 and not any("<|" in text for text in texts)
    assert texts[2] == respond(vlm, tokenizer(), [RAGGED[2]["messages"]], pixels[2:3], max_new_tokens=8)[0]
