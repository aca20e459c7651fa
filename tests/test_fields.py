"""
What a request may hold. The requests of real clients are written down as each client sent them, or as its source makes
them, but for the picture; none of them need be installed.
"""
import json

import pytest

import extras.fields
from tests.helpers import user

pytest_plugins = ["tests.helpers"]  # its fixtures

NEUTRAL = [{"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []},
           {"tools": []}, {"top_logprobs": 0}, {"logprobs": False}, {"min_p": 0}, {"min_p": 0.0}, {"best_of": 1},
           {"echo": False}, {"ignore_eos": False}, {"skip_special_tokens": True}, {"top_k": -1}, {"max_tokens": -1},
           {"max_tokens": 5.0}, {"max_completion_tokens": -1}, {"options": {"num_ctx": 2048}}, {"keep_alive": "5m"},
           {"chat_id": "x"}, {"session_id": "y"}, {"reasoning_effort": "low"}, {"verbosity": "low"},
           {"chat_template_kwargs": {"enable_thinking": False}}, {"stop": ""}, {"stop": []}, {"logit_bias": {}},
           {"response_format": {"type": "text"}}, {"frequency_penalty": 0.0}, {"model": "default"}, {"model": ""},
           {"user": "me"}, {"num_beams": 1}, {"format": ""}, {"frob\nnicate": 1}, {"metadata": {"tags": []}},
           {"extra_headers": {}}, {"features": {"web_search": False}}, {"variables": {}}]

CHANGING = [{"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"functions": [{"name": "f"}]},
            {"response_format": {"type": "json_object"}}, {"min_p": 0.1}, {"logit_bias": {"5": 9}}, {"best_of": 3},
            {"echo": True}, {"ignore_eos": True}, {"skip_special_tokens": False}, {"frequency_penalty": 1},
            {"guided_json": {"type": "object"}}, {"repeat_penalty": 1.3}, {"num_beams": 4}, {"format": "json"},
            {"modalities": ["text", "audio"]}, {"top_logprobs": 6, "logprobs": True}, {"prompt": "Hello"},
            {"stop_token_ids": [5]}, {"continue_final_message": True}, {"suffix": "end"}]


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_what_changes_nothing_is_accepted(served, more, capfd):
    told = [served.says([user("What is it?")], seed=1, **more) for _ in range(2)]
    if not set(more) & {"max_tokens", "max_completion_tokens"}:
        assert told == [served.says([user("What is it?")], seed=1)] * 2
    log = capfd.readouterr().err
    (name, ) = more
    unknown = name in ("options", "keep_alive", "chat_id", "session_id", "reasoning_effort", "verbosity",
                       "chat_template_kwargs", "frob\nnicate", "extra_headers", "features", "variables")
    assert log.count(f"(clients send {name.encode('unicode_escape').decode()}, unknown here") == unknown


@pytest.mark.parametrize("more", CHANGING, ids=str)
def test_what_would_change_the_answer_is_refused_by_name(served, more):
    answer = served.post({"messages": [user("What is it?")], **more})
    assert answer.status_code == 400 and next(iter(more)) == answer.json()["error"]["param"]


@pytest.mark.parametrize("message, culprit", [
    ({"role": "user", "content": "What?", "images": ["iVBORw0KGgo="]}, "images"),
    ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls"),
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
    ({"role": "tool", "content": "7", "tool_call_id": "1"}, "tools are not supported"),
    ({"role": "function", "name": "f", "content": "7"}, "tools are not supported"),
    ({"role": "user", "content": "x", "experimental_attachments": [{"url": "data:,"}]}, "experimental_attachments")])
def test_a_key_of_a_message_that_would_change_the_answer_is_not_dropped(served, message, culprit):
    answer = served.post({"messages": [message, user("Why?")]})
    assert answer.status_code == 400 and culprit in answer.json()["error"]["message"]
    # The same keys, empty, and what is only noted beside a text.
    noted = {"role": "assistant", "content": "x", "tool_calls": [], "images": None, "refusal": None, "name": "bot",
             "reasoning_content": "hm", "annotations": []}
    assert served.post({"messages": [user("x"), noted, user("Why?")], "max_tokens": 1}).status_code == 200


def test_max_tokens_is_a_limit_and_not_a_reservation(served, monkeypatch):
    width = 480
    monkeypatch.setattr(served.server.engine, "width", width)
    for most in (2048, 4096, 10 ** 30, -1):
        answer = served.post({"messages": [user("cat " * 400)], "max_tokens": most}).json()
        assert answer["usage"]["total_tokens"] <= width, most
    kept, served.server.stop = served.server.stop, set()  # nothing else ends it
    try:
        answer = served.post({"messages": [user("cat " * 400)], "max_tokens": 4096}).json()
        assert answer["usage"]["total_tokens"] == width and answer["choices"][0]["finish_reason"] == "length"
    finally:
        served.server.stop = kept
    assert served.post({"messages": [user("cat " * 3000)], "max_tokens": 1}).json()["error"]["code"] == \
        "context_length_exceeded"


def test_the_log_names_no_more_than_so_many_unknown_fields(monkeypatch, capfd):
    monkeypatch.setattr(extras.fields, "NAMES", 5)
    told = set()
    for i in range(20):
        extras.fields.read_fields("tiny", {f"field{i}" + "x" * 1000: 1}, True, told)
    log = capfd.readouterr().err.splitlines()
    assert len(log) == len(told) == 5 and max(map(len, log)) < 120


# ----------------------------------------------------------------------------------------------------------------------
# What real clients send, but for some of X-Stainless-*. %s: a small picture in base64; %d: the length of the body.

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

CLIENTS = {
    # captured from litellm 1.110.2 (openai 3.57.0), 28 November 2026: completion("openai/tiny", ..., stream=True)
    # with user and metadata, which it keeps to itself
    "litellm": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate, zstd\r\n"
        b"Connection: keep-alive\r\nauthorization: Bearer sk-none\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.57.0\r\nx-stainless-async: false\r\n"
        b"x-stainless-raw-response: true\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600.0\r\n"
        b"Content-Length: %d\r\n",
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s","detail":"auto"}},{"type":"text","text":"What is it?",'
        '"cache_control":{"type":"ephemeral"}}]}],"temperature":0.0,"top_p":1.0,"n":1,"stop":["\\n\\n"],'
        '"max_tokens":5,"presence_penalty":0,"frequency_penalty":0,"seed":1,"parallel_tool_calls":false,"stream":true,'
        '"stream_options":{"include_usage":true}}'),
    # captured from langchain-openai 1.7.4 (openai 3.57.0), 28 November 2026:
    # ChatOpenAI(model="tiny", base_url=..., max_tokens=5, ...).stream(...)
    "langchain-openai": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate\r\n"
        b"Connection: keep-alive\r\nauthorization: Bearer -\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.57.0\r\nx-stainless-async: false\r\n"
        b"x-stainless-retry-count: 0\r\nContent-Length: %d\r\n",
        '{"model":"tiny","stream":true,"messages":[{"content":"Be brief.","role":"system"},{"content":[{"type":"text",'
        '"text":"What is it?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}],"role":"user"}],'
        '"frequency_penalty":0.0,"max_completion_tokens":5,"n":1,"presence_penalty":0.0,"seed":1,'
        '"stream_options":{"include_usage":true},"temperature":0.7,"top_p":1.0}'),
    # captured from llm 0.36 (openai 3.57.0), 28 November 2026: llm -m tiny -a a.png -o max_tokens 5 -o temperature 0
    # "What is it?" with extra-openai-models.yaml
    "llm": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate\r\n"
        b"Connection: keep-alive\r\nauthorization: Bearer DUMMY_KEY\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.57.0\r\nx-stainless-async: false\r\n"
        b"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\nContent-Length: %d\r\n",
        '{"model":"tiny","stream":true,"messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},'
        '{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}]}],"max_tokens":5,'
        '"stream_options":{"include_usage":true},"temperature":0.0}'),
    # captured from Vercel's ai 7.0.173 with @ai-sdk/openai-compatible 3.0.92 in Node 22.23.3, 28 November 2026:
    # streamText({model: createOpenAICompatible({..., includeUsage: true})("tiny"), ...})
    "ai": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\nconnection: keep-alive\r\n"
        b"content-type: application/json\r\n"
        b"user-agent: ai-sdk-openai-compatible/3.0.92 ai-sdk-provider-utils/5.0.81 node.js/22\r\naccept: */*\r\n"
        b"accept-language: *\r\nsec-fetch-mode: cors\r\naccept-encoding: gzip, deflate\r\ncontent-length: %d\r\n",
        '{"model":"tiny","max_tokens":5,"temperature":0,"top_p":1,"frequency_penalty":0,"presence_penalty":0,'
        '"stop":["\\n\\n"],"seed":1,"messages":[{"role":"system","content":"Be brief."},{"role":"user",'
        '"content":[{"type":"text","text":"What is it?"},{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s"}}]}],"stream":true,"stream_options":{"include_usage":true}}'),
    # Open WebUI's backend, from its source, 0.12.4: a connection without a key to OpenAI's API, parameters set and user
    # headers on; with function calling "Legacy" or without built-in tools: else it sends tools, which are refused
    "open-webui": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: host.docker.internal:8000\r\nContent-Type: application/json\r\n"
        b"X-OpenWebUI-User-Name: Me\r\nX-OpenWebUI-User-Id: 1\r\nX-OpenWebUI-User-Email: me@example.com\r\n"
        b"X-OpenWebUI-User-Role: user\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        b"User-Agent: Python/3.11 aiohttp/3.14.5\r\nContent-Length: %d\r\n",
        '{"stream":true,"model":"tiny","messages":[{"role":"system","content":"Be brief."},{"role":"user",'
        '"content":[{"type":"text","text":"What is it?"},{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s"}}]}],"stream_options":{"include_usage":true},"seed":0,'
        '"temperature":0.8,"frequency_penalty":0,"repeat_penalty":1,"mirostat":0,"top_k":40,"min_p":0,"stop":[],'
        '"tfs_z":1,"num_ctx":2048,"max_tokens":5,"think":false,"keep_alive":"5m"}'),
    # OpenAIWrapper of VLMEvalKit, by requests: from its source, commit 00006c5
    "VLMEvalKit": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: python-requests/2.32.5\r\n"
        b"Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer sk-1\r\nContent-Length: %d\r\n",
        '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": '
        '"data:image/jpeg;base64,%s", "detail": "low"}}, {"type": "text", "text": "What is it?"}]}], "n": 1, '
        '"temperature": 0, "max_tokens": 2048}'),
    # captured from lmms-eval 0.7.3 (openai 3.57.0), 28 November 2026: generate_until of its chat model "openai"
    "lmms-eval": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate\r\n"
        b"Connection: keep-alive\r\nauthorization: Bearer EMPTY\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.57.0\r\nx-stainless-async: false\r\n"
        b"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\nContent-Length: %d\r\n",
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s"}},{"type":"text","text":"What is it?"}]}],"max_tokens":5,'
        '"temperature":0,"top_p":1.0}'),
    # captured from lm_eval 0.4.13, 28 November 2026: generate_until of local-chat-completions with num_concurrent=2,
    # by aiohttp
    "lm_eval chat": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAuthorization: Bearer \r\nAccept: */*\r\n"
        b"Accept-Encoding: gzip, deflate\r\nUser-Agent: Python/3.11 aiohttp/3.14.5\r\nContent-Length: %d\r\n"
        b"Content-Type: application/json\r\n",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
        '%s", "detail": "auto"}}, {"type": "text", "text": "What is it?"}]}], "model": "tiny", "max_tokens": 5, '
        '"temperature": 0.0, "stop": ["a.b", "Question:", "</s>", "\\n\\n"], "seed": 1234}'),
    # captured from lm_eval 0.4.13, 28 November 2026: generate_until of local-completions, by requests: more stop texts
    # than OpenAI takes
    "lm_eval text": (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: python-requests/2.34.2\r\n"
        b"Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\nAuthorization: Bearer \r\n"
        b"Content-Length: %d\r\nContent-Type: application/json\r\n",
        '{"prompt": "3 things in", "model": "tiny", "max_tokens": 5, "temperature": 0.0, "stop": ["a.b", "Question:", '
        '"</s>", "\\n\\n", "<|im_end|>"], "seed": 1234}'),
    # HttpClient.PostAsJsonAsync of .NET: chunked, and a character set; from its source, JsonContent of commit 04da5a1
    ".NET": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8000\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json; charset=utf-8\r\n",
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},'
        '{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}]}],"max_tokens":5}')}


@pytest.mark.parametrize("name", CLIENTS)
def test_requests_of_real_clients_are_answered(served, name, monkeypatch):
    monkeypatch.setattr(served.server.engine, "width", 160)  # a model after two steps hardly ever ends an answer
    head, text = CLIENTS[name]
    body = text.replace("%s", PNG).encode()
    if b"chunked" in head:
        parts = [body[i:i + 100] for i in range(0, len(body), 100)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    head = head.replace(b"%d", b"%d" % len(body))
    answer, _, said = served.raw(head.replace(b"Connection: keep-alive\r\n", b"").replace(
        b"connection: keep-alive\r\n", b"") + b"Connection: close\r\n\r\n" + body).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 "), said
    if b"event-stream" in answer:
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b'"usage"' in said or b"stream_options" not in body
    else:
        (choice, ) = json.loads(said)["choices"]
        assert choice["finish_reason"] in ("stop", "length") and (choice.get("message") or choice)
