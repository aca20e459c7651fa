"""
A row of any layout -> a record {"id", "messages", "images"}, or in one line what is wrong with it; and Records, a
sequence of which only the places in the file are in memory. Called by formats.py and text.py. A reader of the lessons
need know only what a record looks like, below.
"""
import hashlib

import numpy as np

from plumbing.files import attempt, require
from plumbing.pictures import PICTURES, picture_key
from plumbing.scoring import METRICS

# Whatever the file, one record per conversation:
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices"}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


CAPTION_PROMPT = "Describe the image."  # the question for a picture that comes with a caption only

CLASS_PROMPT = "What is this?"          # and for one in a folder that is named after what it shows

CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # LLaVA's wording, as is the next:

SHORT_PROMPT = "Answer the question using a single word or phrase."


def flatten(content, images: list):
    "A turn's content -> its text. OpenAI's later files have a list of parts; their pictures are added to `images`."
    # [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "7.jpg"}}] -> "What?<image>"
    if not isinstance(content, list):
        return content  # make_record checks that it is text
    texts = []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"].replace("<image>", ""))  # here the list alone says where pictures are
        else:
            require(part["type"] in ("image_url", "image"), f"a part of type {part['type']!r}; use text or image_url")
            url = part.get("image_url", part.get("image"))
            images += [] if url is None else [url["url"] if isinstance(url, dict) else url]
            texts.append("<image>")
    return "".join(texts)


def to_messages(row: dict, images: list) -> list[dict]:
    """One row, in any of five layouts -> [{"role", "content"}, ...]. Pictures within it are added to `images`."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    # caption {"file_name": "7.jpg", "text": "A cat."}, as in a folder's metadata.jsonl
    for turns, role, content in ("messages", "role", "content"), ("conversations", "from", "value"):
        if turns in row:
            return [{"role": ROLES[turn[role]], "content": flatten(turn[content], images)} for turn in row[turns]]
    if "instruction" in row:
        question, answer = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    elif images and "question" not in row and ("text" in row or "caption" in row):
        question, answer = CAPTION_PROMPT, row.get("text", row.get("caption"))
    else:
        question, answer = row["question"], row["answer"]
    answer = answer[0] if isinstance(answer, list) else answer  # of several right answers, train on the first
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def instances_of(row) -> list:
    "Self-Instruct: several inputs under one instruction -> a row for each. Every other row is one."
    several = row.get("instances") if isinstance(row, dict) else None
    if not several:
        return [row]
    if isinstance(several, list) and all(isinstance(one, dict) for one in several):
        return [row | one for one in several]
    return [ValueError(f"instances is {str(several)[:40]!r}; expected a list of objects")]


def read_row(row, where: str, number: int, find) -> dict:
    "A row of a file, or what is wrong with it -> its record, or a ValueError that names file, record and id."
    # The one place where errors get their names: what is called below says only what is wrong.
    try:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict):  # TRAP: in require() the message would be made for every good row, too
            raise ValueError(f"expected an object with keys, found {str(row)[:40]!r}")
        row = {"id": number} | row
        where += f" (id {str(row['id'])[:60]!r})"
        return make_record(row, find)
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # a row of any other shape
        raise ValueError(f"{where}: missing key or unknown role {error}; expected conversations (from, value), "
                         "messages (role, content), instruction and output, or question and answer") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def make_record(row: dict, find) -> dict:
    """One row of a file -> a record that nothing later has to check again."""
    names = row.get("images", row.get("image", row.get("file_name"))) or []  # null, "" and no key: a text-only record
    names = list(names) if isinstance(names, list) else [names]
    if not names:  # {"img": "7.jpg"} must not train as a text
        texts = "id", "instruction", "input", "output", "question", "answer"
        other = [key for key, value in row.items() if key not in texts and str(value).lower().endswith(PICTURES)]
        require(not other, f"{other[:1]} seems to name a picture; the key must be image, or images for a list")
    messages = to_messages(row, names)
    other = [turn["content"] for turn in messages if not isinstance(turn["content"], str)]
    require(not other, f"the content of a turn is not text but {str(other)[1:-1][:40]}; write a number in quotes, list "
                       "pictures under images, and mark their places by <image>")
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # the chat format allows a system message only here
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    require(roles and roles == ["user", "assistant"] * (len(roles) // 2), f"the turns are "
            f"{', '.join(roles[:9]) or 'none'}; user and assistant must alternate, the assistant last")
    empty = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"
             and (not turn["content"] or turn["content"].isspace())]
    require(not empty, f"the answer in turn {empty[:1]} is empty; nothing could be learned from it")
    # A .tsv or .tar brings the bytes along. A name may be a bare number in JSON, but is no list and no object.
    require(all(type(name) in (str, int, bytes) for name in names), "an image is no name, but a list or an object")
    images = [name if isinstance(name, bytes) else find(str(name)) for name in names]
    missing = [str(name)[:100] for name, image in zip(names, images) if image is None]
    require(not missing, f"no image {missing[:1]} in images/ beside the file, in its own folder, or in images.zip")
    markers = sum(turn["content"].count("<image>") for turn in messages)
    if len(images) == 1 and markers == 0:  # as in LLaVA: a picture without a marker comes first
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"], markers = "<image>\n" + first["content"], 1
    # With one marker too few, every later picture would belong to the wrong question, and no number would look wrong.
    require(markers == len(images), f"{markers} <image> markers, {len(images)} images; write a marker for each")
    # Keys that scoring needs are kept; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if key in row}
    check_scoring(extra)
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def check_scoring(extra: dict) -> None:
    "What scoring will use is of the right kind: later it would end an evaluation, or silently score nothing."
    answers, metric, choices = extra.get("answer", "x"), extra.get("metric", "exact"), extra.get("choices", {})
    for answer in answers if isinstance(answers, list) and answers else [answers]:
        require(isinstance(answer, str) and answer.strip(), f"the answer {str(answers)[:40]!r} must be a text, or a "
                                                            "list of texts, and not empty")
    require(metric in METRICS, f"unknown metric {str(metric)[:40]!r}; choose from {', '.join(METRICS)}")
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
