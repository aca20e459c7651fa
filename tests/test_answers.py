"Answers as OpenAI's API tells them: probabilities, and texts that are continued."
import json
import math

import pytest
import torch

import plumbing.engine
from extras.answers import score_prompt, spell
from tests.helpers import request, tiny_vlm, tokenizer, user

pytest_plugins = ["tests.helpers"]  # its fixtures


def scores_of(vlm, requests: list) -> list:
    engine = plumbing.engine.Engine(vlm, requests)
    list(engine.run())
    return [r.scores for r in requests]


def test_probabilities_are_those_of_an_uncached_pass_and_change_no_answer():
    vlm = tiny_vlm()
    plain, asked = [request(vlm, i) for i in range(8)], [request(vlm, i, rivals=i % 6 - 1) for i in range(8)]
    scores_of(vlm, plain)
    alone = [scores_of(vlm, [request(vlm, i, rivals=i % 6 - 1)])[0] for i in range(8)]
    assert [[own for own, _ in scores] for scores in scores_of(vlm, asked)] == [
        [own for own, _ in scores] for scores in alone]  # bit for bit, whoever else is there
    assert [r.answer for r in asked] == [r.answer for r in plain]
    for r in asked:
        assert len(r.scores) == (0 if r.rivals < 0 else len(r.answer)) and all(len(o) == r.rivals for _, o in r.scores)
        if r.images or r.rivals < 1:
            continue
        expected = score_prompt(vlm, [*r.prompt.ids, *r.answer], r.rivals, len(vlm.gpt.embed.weight))[-len(r.answer):]
        for (own, others), (right, best) in zip(r.scores, expected):
            assert math.isclose(own, right, abs_tol=1e-4)
            assert [i for i, _ in others] == [i for i, _ in best] and others == sorted(others, key=lambda o: -o[1])


def test_the_prompt_is_scored_in_pieces_as_in_one():
    vlm, ids = tiny_vlm(), torch.randint(0, 300, (600, ), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        logs = vlm.gpt(torch.tensor([ids]))[0].log_softmax(-1)
    scores = score_prompt(vlm, ids, 2, len(vlm.gpt.embed.weight))
    assert scores[0] == (None, []) and len(scores) == 600
    for at in (1, 255, 256, 257, 599):
        assert math.isclose(scores[at][0], logs[at - 1, ids[at]], abs_tol=1e-4)
        assert scores[at][1][0][0] == logs[at - 1].argmax()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_tells_the_probability_of_each_token(served, streamed, photo):
    body = {"messages": [user("What is it?", photo)], "max_tokens": 8, "logprobs": True, "top_logprobs": 5, "n": 2,
            "temperature": 1.5, "seed": 3, "stream": streamed}
    answer = served.post(body)
    if streamed:
        events = [json.loads(line[6:]) for line in answer.content.splitlines() if line.startswith(b"data: {")]
        choices = [choice for event in events for choice in event["choices"]]
    else:
        choices = answer.json()["choices"]
    for i in range(2):
        mine = [choice for choice in choices if choice["index"] == i]
        text = "".join((choice.get("message") or choice["delta"]).get("content", "") for choice in mine)
        tokens = [token for choice in mine for token in choice["logprobs"]["content"]]
        assert bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace") == text
        for token in tokens:
            best = [other["logprob"] for other in token["top_logprobs"]]
            assert len(best) == 5 and best == sorted(best, reverse=True) and token["logprob"] <= best[0] <= 0
    assert served.post({**body, "logprobs": False, "top_logprobs": 0, "stream": False}).json()["choices"][0][
        "logprobs"] is None


def test_lm_eval_can_score_multiple_choice(served, monkeypatch):
    "What it computes from an answer: the sum of the continuation's log-probabilities, and whether it is the likeliest."
    vlm, tokens = served.server.vlm, served.server.tokenizer
    # The token behind the continuation may be one that ends a text. It is left out by its place, so it must be told.
    monkeypatch.setattr(served.server, "stop", set(range(tokens.vocab_size)))
    context, endings = tokens.encode("Top left: large red"), [tokens.encode(" cat."), tokens.encode(" yellow sun.")]
    body = {"model": "tiny", "prompt": [context + ending for ending in endings], "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "seed": 1234, "echo": True}
    choices = served.post(body, "/v1/completions").json()["choices"]
    for choice, ending in zip(sorted(choices, key=lambda choice: choice["index"]), endings):
        told = choice["logprobs"]
        own, top = told["token_logprobs"][len(context):-1], told["top_logprobs"][len(context):-1]
        with torch.no_grad():
            logits = vlm.gpt(torch.tensor([context + ending]))[0, :, :tokens.vocab_size]  # rows behind it are no tokens
        logs = logits.log_softmax(-1)[len(context) - 1:-1]
        assert math.isclose(sum(own), logs[range(len(ending)), ending].sum(), abs_tol=1e-3)
        assert all(a == max(b.values()) for a, b in zip(own, top)) == (logs.argmax(-1).tolist() == ending)
        assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(context + ending) + 1
        assert told["text_offset"][1] == len(told["tokens"][0])


def test_texts_are_continued(served):
    prompt = "2 things in"
    whole = served.post({"prompt": prompt, "max_tokens": 6}, "/v1/completions").json()
    both = served.post({"prompt": [prompt, served.server.tokenizer.encode(prompt)], "max_tokens": 6, "echo": True},
                       "/v1/completions").json()
    text = whole["choices"][0]["text"]
    assert whole["object"] == "text_completion" and [c["text"] for c in both["choices"]] == [prompt + text] * 2
    streamed = served.post({"prompt": prompt, "max_tokens": 6, "stream": True}, "/v1/completions").text
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in streamed.splitlines()
                   if line.startswith("data: {")) == text
    assert both["usage"]["prompt_tokens"] == 2 * whole["usage"]["prompt_tokens"]
    for wrong in (5, [], [[]] * 40, [10 ** 9], [-1], [["a"]], [True], "cat " * 200_000, "cat " * 3000):
        answer = served.post({"prompt": wrong}, "/v1/completions")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt", wrong
    assert served.post({"prompt": "x", "logprobs": 9}, "/v1/completions").status_code == 400
    assert served.post({"messages": [user("x")]}, "/v1/completions").status_code == 400


def test_a_part_of_a_character_is_spelt():
    parts = [spell(tokenizer(), token) for token in tokenizer().encode("é")]
    assert parts == [{"token": "é", "bytes": [195, 169]}] or [part["token"] for part in parts] == [
        "bytes:\\xc3", "bytes:\\xa9"]
