"""
What a request may hold. The requests of real clients are written down as each client's source makes them, but for the
picture; none of them need be installed.
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
           {"user": "me"}, {"num_beams": 1}, {"format": ""}, {"frob\nnicate": 1}]

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
                       "chat_template_kwargs", "frob\nnicate")
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
# What real clients send. %s: a small picture in base64.

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

CLIENTS = {
    # litellm.completion("openai/tiny", ..., stream=True): the openai package 1.x with its own extra_body
    "litellm": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate\r\n"
        b"Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        b"User-Agent: OpenAI/Python 1.99.5\r\nX-Stainless-Lang: python\r\nX-Stainless-Async: false\r\n"
        b"x-stainless-retry-count: 0\r\nAuthorization: Bearer sk-none\r\n",
        '{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"'
        ',"detail":"auto","format":"image/png"}},{"type":"text","text":"What is it?","cache_control":'
        '{"type":"ephemeral"}}]}],"model":"tiny","max_tokens":5,"n":1,"parallel_tool_calls":false,'
        '"temperature":0.0,"stream":true,"stream_options":{"include_usage":true},"user":"",'
        '"extra_headers":{},"metadata":{"tags":[]}}'),
    # ChatOpenAI(model="tiny", base_url=..., max_tokens=5).stream(...) of langchain-openai
    "langchain-openai": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.1\r\n"
        b"X-Stainless-Raw-Response: true\r\nAuthorization: Bearer -\r\n",
        '{"messages":[{"content":"Be brief.","role":"system"},{"content":[{"type":"text","text":'
        '"What is it?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}],'
        '"role":"user"}],"model":"tiny","frequency_penalty":0.0,"logprobs":false,'
        '"max_completion_tokens":5,"n":1,"presence_penalty":0.0,"stream":true,'
        '"stream_options":{"include_usage":true},"temperature":0.7,"top_p":1.0}'),
    # llm -m tiny -a a.png "What is it?" with extra-openai-models.yaml
    "llm": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 1.109.1\r\nAuthorization: Bearer DUMMY_KEY\r\n",
        '{"messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s"}}]}],"model":"tiny","max_tokens":5,"stream":true,'
        '"stream_options":{"include_usage":true}}'),
    # streamText({model: createOpenAICompatible({...})("tiny"), ...}) of Vercel's ai, in Node
    "ai": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\nconnection: keep-alive\r\n"
        b"content-type: application/json\r\nuser-agent: ai/5.0.60 ai-sdk/openai-compatible/1.0.19 "
        b"ai-sdk/provider-utils/3.0.10 runtime/node.js/v22.11.0\r\naccept: */*\r\naccept-language: *\r\n"
        b"sec-fetch-mode: cors\r\naccept-encoding: gzip, deflate\r\n",
        '{"model":"tiny","max_tokens":5,"temperature":0,"messages":[{"role":"system","content":"Be brief."},{"role":'
        '"user","content":[{"type":"text","text":"What is it?"},{"type":"image_url","image_url":{"url":'
        '"data:image/png;base64,%s"}}]}],"tool_choice":"auto","stream":true}'),
    # Open WebUI's backend, for a connection to OpenAI's API, with its parameters set
    "open-webui": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: host.docker.internal:8000\r\nContent-Type: "
        b"application/json\r\nAuthorization: Bearer \r\nAccept: */*\r\nAccept-Encoding: gzip, deflate, br\r\n"
        b"User-Agent: Python/3.11 aiohttp/3.12.15\r\nX-OpenWebUI-User-Name: Me\r\n",
        '{"stream": true, "model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, {"role": '
        '"user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": '
        '{"url": "data:image/png;base64,%s"}}]}], "max_tokens": 5, "temperature": 0.8, "top_k": 40, '
        '"min_p": 0.0, "frequency_penalty": 0, "repeat_penalty": 1, "tfs_z": 1, "mirostat": 0, "seed": 0, '
        '"stop": [], "keep_alive": "5m", "options": {}, "chat_id": "c", "session_id": "s", "id": "m", '
        '"tool_ids": null, "features": {"web_search": false}, "variables": {}, "stream_options": '
        '{"include_usage": true}}'),
    # OpenAIWrapper of VLMEvalKit, by requests
    "VLMEvalKit": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: python-requests/2.32.5\r\n"
        b"Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer sk-1\r\n",
        '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
        '{"url": "data:image/jpeg;base64,%s", "detail": "low"}}, {"type": "text", "text": "What is it?"}]}], '
        '"n": 1, "temperature": 0, "max_tokens": 2048}'),
    # openai_compatible of lmms-eval
    "lmms-eval": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nUser-Agent: AsyncOpenAI/Python 1.99.5\r\n"
        b"Authorization: Bearer EMPTY\r\n",
        '{"messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},{"type":"image_url",'
        '"image_url":{"url":"data:image/png;base64,%s"}}]}],"model":"tiny","max_tokens":4096,"temperature":0,'
        '"response_format":{"type":"text"},"reasoning_effort":"medium"}'),
    # local-chat-completions of lm_eval, generate_until
    "lm_eval chat": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8000\r\nAuthorization: Bearer \r\n"
        b"Accept: */*\r\nUser-Agent: Python/3.12 aiohttp/3.13.2\r\nContent-Type: application/json\r\n",
        '{"messages": [{"role": "user", "content": "Question: 2+2?", "type": "text"}], "model": "tiny", '
        '"max_tokens": 256, "temperature": 0, "stop": ["\\n\\n", "Question:", "</s>", "<|im_end|>"], '
        '"seed": 1234}'),
    # local-completions of lm_eval, generate_until: more stop texts than OpenAI takes
    "lm_eval text": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost:8000\r\nAuthorization: Bearer \r\nAccept: */*\r\n"
        b"Content-Type: application/json\r\n",
        '{"prompt": ["3 things in"], "model": "tiny", "max_tokens": 16, "temperature": 0, "stop": ["a.b", '
        '"Question:", "</s>", "<|im_end|>", "\\n\\n"], "seed": 1234}'),
    # HttpClient.PostAsJsonAsync of .NET: chunked, and an upper case character set
    ".NET": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8000\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json; charset=utf-8\r\n",
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},{"type":'
        '"image_url","image_url":{"url":"data:image/png;base64,%s"}}]}],"max_tokens":5}')}


@pytest.mark.parametrize("name", CLIENTS)
def test_requests_of_real_clients_are_answered(served, name, monkeypatch):
    monkeypatch.setattr(served.server.engine, "width", 160)  # a model after two steps hardly ever ends an answer
    head, text = CLIENTS[name]
    body = text.replace("%s", PNG).encode()
    if b"chunked" in head:
        parts = [body[i:i + 100] for i in range(0, len(body), 100)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        head += b"Content-Length: %d\r\n" % len(body)
    answer, _, said = served.raw(head.replace(b"Connection: keep-alive\r\n", b"").replace(
        b"connection: keep-alive\r\n", b"") + b"Connection: close\r\n\r\n" + body).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 "), said
    if b"event-stream" in answer:
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b'"usage"' in said or b"stream_options" not in body
    else:
        (choice, ) = json.loads(said)["choices"]
        assert choice["finish_reason"] in ("stop", "length") and (choice.get("message") or choice)
