"""
A row of any layout -> a record {"id", "messages", "images"}, or in one line what is wrong with it; and Records, a
sequence of which only the places in the file are in memory. Called by formats.py and text.py. A reader of the lessons
need know only what a record looks like, below.
"""
import hashlib
from functools import lru_cache

import numpy as np

from plumbing.columns import (ANSWERS, CAPTIONS, CHOSEN, KINDS, QUESTIONS, TURNS, pictures_of, place_pictures,
                              source_of)
from plumbing.files import attempt, require
from plumbing.folders import CLASS_PROMPT
from plumbing.pictures import picture_key
from plumbing.scoring import METRICS, letter_of, options_of, with_options

# Whatever the file, one record per conversation:
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices", "captions"}
# Where a text has the word <image>, the content is a list of parts, as `render` takes it: see flatten.

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

CAPTION_PROMPT = "Describe the image."  # the question for a picture that comes with a caption only


# ----------------------------------------------------------------------------------------------------------------------
# A row's turns

def flatten(content: list, images: list):
    "OpenAI's list of parts -> a text. Their pictures are added to `images`."
    # [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "7.jpg"}}] -> "What?<image>"
    parts = []
    for part in content:
        text, kind = part["type"] in ("text", "input_text", "output_text"), part["type"]
        require(text or kind in ("image_url", "image", "input_image"),
                f"a part of type {kind!r}; use text or image_url")
        url = None if text else part.get("image_url") or part.get("image") or part.get("source")  # as Anthropic's
        images += [] if url is None else [url]
        parts.append({"type": "text", "text": part["text"]} if text else {"type": "image"})
    # Here the list alone says where pictures are; in a string every <image> is one.
    return parts if any("<image>" in part.get("text", "") for part in parts) else text_of(parts)


def text_of(content: str | list) -> str:
    "A turn's content as a string, to show it or to compare with it."
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def images_in(content: str | list) -> int:
    return content.count("<image>") if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def read_turn(turn: dict, images: list) -> dict:
    role, content = turn["role" if "role" in turn else "from"], turn["content" if "content" in turn else "value"]
    out = {"role": ROLES[role], "content": flatten(content, images) if isinstance(content, list) else content}
    # OpenAI's weight 0, ms-swift's loss false: an answer that is read but not learned.
    if len(turn) > 2:
        weight = next((turn[key] for key in ("weight", "loss", "train") if turn.get(key) is not None), 1)
        require(weight in (0, 1), f"the weight of a turn is {str(weight)[:40]!r}; it must be 0 (not learned) or 1")
        out |= {} if weight else {"weight": 0}
    return out


def ask(question, answer) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def to_messages(row: dict, images: list, extra: dict) -> list[dict]:
    """One row -> [{"role", "content"}, ...]. Its pictures are added to `images`, what scoring needs to `extra`."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    # caption {"file_name": "7.jpg", "text": "A cat."};   kind  {"image": "7.jpg", "label": "cat"}
    def first(keys: tuple) -> str:
        return next((key for key in keys if row.get(key) is not None), "")
    if turns := first(TURNS):
        return [read_turn(turn, images) for turn in row[turns]]
    if row.get("texts"):  # FineVision, the_cauldron
        return [turn for pair in row["texts"] for turn in ask(pair["user"], pair["assistant"])]
    question = first(QUESTIONS)
    if images and not question and (key := first(CAPTIONS)):
        some = row[key] if isinstance(row[key], list) else [row[key]]
        extra |= {"captions": some} if len(some) > 1 else {}  # data.py draws one of them for each epoch
        return ask(CAPTION_PROMPT, some[0])
    if images and not question and (key := first(KINDS)):
        require(isinstance(row[key], str), f"{key} is {str(row[key])[:40]!r}: write the name of the kind instead")
        extra |= {"answer": row[key], "metric": "exact"}
        return ask(CLASS_PROMPT, row[key])
    words, key = row[question or "question"], first(("output",) * (question == "instruction") + ANSWERS) or "answer"
    answer = row[key]
    if key == "answers":  # what most people said is learned, each of them is right
        answer = [one["answer"] if isinstance(one, dict) else one for one in answer]
        answer = sorted(answer, key=lambda one: -answer.count(one))
    extra |= {"answer": answer} if key in ("answers", *CHOSEN) else {}
    words = f"{words}\n\n{row['input']}" if question == "instruction" and row.get("input") else words
    words = f"{row['hint']}\n{words}" if row.get("hint") else words
    return ask(words, answer[0] if isinstance(answer, list) else answer)  # of several right answers, the first


def write_options(messages: list, extra: dict, choices: dict) -> None:
    "The options go into the last question, and its answer becomes a letter; an answer in other words stays."
    asked, said = messages[-2:]
    answers = extra.get("answer", said["content"])
    answers = answers if isinstance(answers, list) else [answers]
    letters = [letter_of(one, choices) for one in answers]
    extra["answer"] = letters if isinstance(extra.get("answer"), list) else letters[0]
    if said["content"] in answers + letters:
        question, said["content"] = asked["content"], letters[0]
        asked["content"] = with_options(question, choices)
        extra |= {"metric": "choice"} if asked["content"] != question and "metric" not in extra else {}


# ----------------------------------------------------------------------------------------------------------------------
# A row -> its record

def instances_of(row) -> list:
    "Self-Instruct: several inputs under one instruction -> a row for each. Every other row is one."
    several = row.get("instances") if isinstance(row, dict) else None
    if not several:
        return [row]
    if isinstance(several, list) and all(isinstance(one, dict) for one in several):
        # LLaVA's detection data has instances, too: boxes
        return [row | one for one in several] if "output" in several[0] else [row]
    return [ValueError(f"instances is {str(several)[:40]!r}; expected a list of objects")]


@lru_cache(1024)
def lower_case(keys: tuple) -> tuple:
    "(\"Image\", \"A\") -> (\"image\", \"A\"); () where nothing is to be changed."
    names = tuple(key if len(key) == 1 else key.lower() for key in keys)  # options are called A, B
    return names if names != keys else ()


def read_row(row, where: str, number: int, find) -> dict:
    "A row of a file, or what is wrong with it -> its record, or a ValueError that names file, record and id."
    # The one place where errors get their names: what is called below says only what is wrong.
    try:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict):  # TRAP: in require() the message would be made for every good row, too
            raise ValueError(f"expected an object with keys, found {str(row)[:40]!r}")
        if names := lower_case(tuple(row)):
            row = dict(zip(names, row.values()))
        if row.get("id") in (None, ""):
            row = row | {"id": number}
        where += f" (id {str(row['id'])[:60]!r})"
        return make_record(row, find)
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # a row of any other shape
        raise ValueError(f"{where}: missing key or unknown role {error}; expected conversations (from, value), "
                         "messages (role, content), instruction and output, or question and answer; the keys are "
                         f"{', '.join(map(str, row))[:100]}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def make_record(row: dict, find) -> dict:
    """One row of a file -> a record that nothing later has to check again."""
    require("data" not in row or "annotations" not in row, "a task of Label Studio; export it as JSON-MIN or CSV, and "
            "call the columns image, question and answer")
    names, numbers = pictures_of(row)
    # Keys that scoring needs are kept; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if row.get(key) is not None}
    messages = to_messages(row, names, extra)
    if choices := options_of(row):
        extra["choices"] = choices
        if "answer" in extra or str(messages[-1]["content"]) in choices or not any(map(row.get, TURNS)):
            write_options(messages, extra, choices)
    for pair in reversed(row.get("history") or []):  # of ms-swift and LLaMA-Factory: what was said before
        messages = ([read_turn(pair, names)] if isinstance(pair, dict) else ask(*pair)) + messages
    if system := row.get("system") or row.get("system_prompt"):
        system = {"role": "system", "content": system}
        messages = [system] * (messages[:1] != [system]) + messages
    other = [turn["content"] for turn in messages if not isinstance(turn["content"], (str, list))]
    if other:
        raise ValueError(f"the content of a turn is not text but {str(other)[1:-1][:40]}; write a number in quotes, "
                         "list pictures under images, and mark their places by <image>")
    names = place_pictures(messages, names, list(range(len(names))) if "texts" in row else numbers)
    check_turns(messages)
    images = [name if isinstance(name, bytes) else find(name) for name in map(source_of, names)]
    if None in images:
        missing = [str(name)[:100] for name, image in zip(names, images) if image is None]
        raise ValueError(f"no image {missing[:1]} in images/ beside the file, in its own folder, or in images.zip; it "
                         "is only named")
    markers = sum(images_in(turn["content"]) for turn in messages)
    if len(images) == 1 and markers == 0:  # as in LLaVA: a picture without a marker comes first
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"], markers = "<image>\n" + first["content"], 1
    # With one marker too few, every later picture would belong to the wrong question, and no number would look wrong.
    if markers != len(images):
        raise ValueError(f"{markers} <image> markers, {len(images)} images; write a marker for each")
    if extra:
        check_scoring(extra)
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def check_turns(messages: list) -> None:
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # the chat format allows a system message only here
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the turns are {', '.join(roles[:9]) or 'none'}; user and assistant must alternate, the "
                         "assistant last")
    for i, turn in enumerate(messages):  # TRAP: a message is made only for what is wrong: this runs a million times
        content, answer = turn["content"], turn["role"] == "assistant"
        text = content if isinstance(content, str) else text_of(content)
        if answer and (not text or text.isspace()):
            raise ValueError(f"the answer in turn {[i]} is empty; nothing could be learned from it")
        if answer and "<image>" in text and images_in(content):
            raise ValueError(f"<image> in the answer of turn {[i]}: the model cannot draw; where the word is meant, "
                             "write a list of parts, [{\"type\": \"text\", \"text\": ...}]")
        if text.startswith(("<video>", "<audio>")) and not answer:
            raise ValueError("a question about video or sound, which is not read; remove the record")
    require(any("weight" not in turn for turn in messages if turn["role"] == "assistant"),
            "all answers have weight 0; nothing can be learned")


def check_scoring(extra: dict) -> None:
    "What scoring will use is of the right kind: later it would end an evaluation, or silently score nothing."
    answers, metric, choices = extra.get("answer", "x"), extra.get("metric", "exact"), extra.get("choices", {})
    for answer in answers if isinstance(answers, list) and answers else [answers]:
        require(isinstance(answer, str) and answer.strip(), f"the answer {str(answers)[:40]!r} must be a text, or a "
                                                            "list of texts, and not empty")
    require(metric in METRICS, f"unknown metric {str(metric)[:40]!r}; choose from {', '.join(METRICS)}")
    require(all(isinstance(text, str) and text.strip() for text in extra.get("captions", [])), "a caption is no text")
    require(isinstance(choices, dict) and all(isinstance(text, str) for text in choices.values()),
            "choices must be an object of letters and texts, such as {\"A\": \"cat\"}")
    require(isinstance(extra.get("kind", ""), str), "the kind must be a text")


def turns_of(record: dict) -> list[dict]:
    return record.get("messages") or [{"role": "", "content": record["text"]}]


def hash_keys(record: dict) -> list[int]:
    "A record's pictures as 64-bit numbers, the same on every machine. Without a picture its id counts as one."
    keys = {picture_key(source) for source in record["images"]} or {f"id {record['id']}"}
    return sorted(int.from_bytes(hashlib.sha1(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
                  for key in keys)


class Records:
    """
    The records of a file: a sequence, whose items are read and made when they are asked for. Per record there are only
    a few numbers in memory: `spans` (where it is in the file) and the hashes of its pictures, by which a set is split.
    """

    def __init__(self, make, spans: np.ndarray, keys: np.ndarray, counts: np.ndarray, bad: list = ()):
        self.make, self.spans = make, spans     # make(*spans[i]) -> record i; spans int64 [n, k]
        self.keys, self.counts = keys, counts   # hashes of all pictures in a row, uint64; how many of each record [n]
        self.bad = list(bad)                    # what is wrong with rows that are no records

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.make(*self.spans[i].tolist())  # numpy's IndexError ends a `for` over the records

    def each(self):
        "All, one after the other; in place of one the error that making it was: its picture may have gone since."
        return (attempt(self.__getitem__, i) for i in range(len(self)))

    def select(self, chosen: np.ndarray) -> "Records":
        "chosen: bool [n]."
        return Records(self.make, self.spans[chosen], self.keys[np.repeat(chosen, self.counts)], self.counts[chosen])
