"""
What a request to the server may hold: which fields it knows, which values change nothing, and what is refused. Called
by server.py. A reader of the lessons need know none of it.

The rule: a value that would change the answer, and that is not built in, is refused by name; a value that changes
nothing is accepted, and so is a field that nobody here knows (it is named once in the log). Real clients send dozens
of both with every request.
"""
from plumbing.files import say

CHOICES = 8             # answers to one request (n)

RIVALS = 5              # likeliest tokens that a request may ask for beside each token of the answer

STOPS = 16              # texts that end an answer

NAMES = 200             # unknown fields that the log names; a stranger must not fill it, nor our memory


class Refused(ValueError):
    "An answer in the form of OpenAI's errors. param: the field at fault; code: what programs tell errors apart by."

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param,
                               "code": code}}


# The fields that a request may have: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, ...}
# Numbers have a kind and a range, others a type. top_k and repetition_penalty are not OpenAI's but vLLM's.
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 1e-6, 1), "top_k": (int, 0, 10 ** 6),
           "repetition_penalty": (float, 0.1, 10), "seed": (int, -2 ** 63, 2 ** 63 - 1), "n": (int, 1, CHOICES),
           "top_logprobs": (int, 0, RIVALS), "max_tokens": (int, 1, None), "max_completion_tokens": (int, 1, None)}

OTHERS = {"messages": list, "model": str, "stop": (str, list), "stream": bool, "stream_options": dict,
          "logprobs": (bool, int), "prompt": (str, list), "echo": bool}

# Some programs write -1 for "no limit".
UNLIMITED = ("max_tokens", "max_completion_tokens", "top_k")

# What would change the answer and is not built in, with the values that change nothing. An empty text, list or object
# changes nothing either. OpenAI's fields come first, then those of vLLM, SGLang, llama.cpp and Ollama.
NEUTRAL = {
    "frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [], "best_of": [1], "suffix": [], "tools": [],
    "functions": [], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}], "modalities": [["text"]], "audio": [], "web_search_options": [],
    "min_p": [0], "min_tokens": [0], "typical_p": [1], "length_penalty": [1], "use_beam_search": [False],
    "num_beams": [1], "ignore_eos": [False], "skip_special_tokens": [True], "spaces_between_special_tokens": [True],
    "include_stop_str_in_output": [False], "stop_token_ids": [], "bad_words": [], "allowed_token_ids": [],
    "prompt_logprobs": [], "add_generation_prompt": [True], "continue_final_message": [False], "documents": [],
    "chat_template": [], "structured_outputs": [], "guided_json": [], "guided_regex": [], "guided_choice": [],
    "guided_grammar": [], "regex": [], "ebnf": [], "json_schema": [], "grammar": [], "format": [],
    "repeat_penalty": [1], "tfs_z": [1], "mirostat": [0], "xtc_probability": [0], "dry_multiplier": [0]}

# For statistics, or about tools, without which they say nothing: every value is neutral.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
           "prediction"}

# Keys of a message that would change the answer. Ollama's pictures and Vercel's attachments lie beside the text.
BESIDE = ("images", "image", "files", "attachments", "experimental_attachments", "audio", "videos", "tool_calls",
          "function_call")

# Names that programs send when the user gave none: the only model there is serves them.
PLACEHOLDERS = {"", "-", "none", "default", "model", "local", "local-model", "any", "auto", "test", "ghostvis"}


def read_number(name: str, value):
    "A number, checked; 512.0 is one of JSON's ways to write 512."
    kind, least, most = NUMBERS[name]
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if name in UNLIMITED and type(value) is int and value == -1:
        return 0 if name == "top_k" else None
    # type: True is an instance of int
    if type(value) not in (int, kind) or not least <= value or most is not None and value > most:
        kind = "an integer" if kind is int else "a number"
        raise Refused(400, f"{name} must be {kind} from {least}" + f" to {most}" * (most is not None), name)
    return value


def read_fields(name: str, body: dict, chat: bool, told: set) -> dict:
    """
    The JSON body of a request to the model `name` -> its fields that are not null, checked. chat: chat completions,
    else those of text. told: the unknown fields that the log has named.
    """
    fields, other = {}, {"prompt", "echo"} if chat else {"messages", "top_logprobs"}
    for key, value in body.items():
        if value is None or key == "max_tokens" and value == 0 and body.get("echo"):
            continue  # an echo needs no answer; one token of it does no harm
        if key in NEUTRAL or key in other:
            if value not in NEUTRAL.get(key, [False, 0]) and value not in ("", [], {}):
                raise Refused(400, f"{key} is not supported here: leave it out", key, "unsupported_parameter")
        elif key in NUMBERS:
            if (value := read_number(key, value)) is not None:
                fields[key] = value
        elif key in OTHERS:
            if not isinstance(value, OTHERS[key]):
                raise Refused(400, f"{key} is of the wrong type: {type(value).__name__}", key)
            fields[key] = value
        elif key not in IGNORED and key not in told and len(told) < NAMES:
            told.add(key)
            say(f"(clients send {key[:50].encode('unicode_escape').decode()}, unknown here: it changes nothing)")
    if fields.get("model", name) != name and fields["model"].lower() not in PLACEHOLDERS:
        raise Refused(404, f"the model {fields['model'][:50]!r} is not here; this is {name}", "model",
                      "model_not_found")
    stops = fields.get("stop", [])
    fields["stop"] = stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    if len(stops) > STOPS or not all(type(stop) is str and len(stop) <= 100 for stop in stops):
        raise Refused(400, f"stop must be a text or up to {STOPS} texts, of at most 100 letters", "stop")
    return fields


def check_message(message) -> None:
    "What would change the answer and cannot be shown to the model must not be dropped in silence."
    if not isinstance(message, dict):
        return
    for key in BESIDE:
        if message.get(key):
            more = ": send a picture as a part of content, an image_url with a data: URI" * key.startswith("im")
            raise ValueError(f"{key} is not supported here{more}")
    if message.get("role") in ("tool", "function"):
        raise ValueError(f"the role {message['role']} answers a tool, and tools are not supported here")


def count_rivals(fields: dict, chat: bool) -> int:
    "How many likely tokens are told beside each one of the answer; -1: not even its own probability."
    asked = fields.get("logprobs", False)
    if chat:
        if asked not in (True, False):
            raise Refused(400, "logprobs must be true or false; top_logprobs says how many", "logprobs")
        if fields.get("top_logprobs") and not asked:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return fields.get("top_logprobs", 0) if asked else -1
    if asked is True or not 0 <= asked <= RIVALS:  # of text: their number itself
        raise Refused(400, f"logprobs must be an integer from 0 to {RIVALS}", "logprobs")
    return -1 if asked is False else asked
