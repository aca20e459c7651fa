"""
A row of any layout -> a record {"id", "messages", "images"}, or in one line what is wrong with it; and Records, a
sequence of which only the places in the file are in memory. Called by formats.py and text.py. A reader of the lessons
need know only what a record looks like, below.
"""
import hashlib
import re
from functools import lru_cache
from operator import itemgetter

import numpy as np

from plumbing.files import attempt, require
from plumbing.pictures import INLINE, MEDIA, PICTURES, UNREAD, picture_key
from plumbing.scoring import METRICS, QUESTIONS, letter_of, options_of, with_options

# Whatever the file, one record per conversation:
#   {"id": "7", "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", ...}],
#    "images": [source], and where the file has them "kind", "answer", "metric", "choices", "captions"}
# Where a text has the word <image>, the content is a list of parts, as `render` takes it: see flatten.

# The keys of a row, the likeliest first; of each sort the first that is not null is used.
TURNS = "messages", "conversations", "conversation"
CHOSEN = "correct_choice_idx", "answerkey", "correct_answer", "answer_idx", "answer_index", "label"  # of options
ANSWERS = "answer", "answers", "output", "response", "completion", "solution", *CHOSEN
CAPTIONS = "text", "caption", "captions", "sentences", "sentence", "comment", "description"
KINDS = "label", "class", "class_name", "category"
TEXTS = {*TURNS, *QUESTIONS, *ANSWERS, *CAPTIONS, *KINDS, "id", "input", "system", "history", "hint", "texts"}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

CAPTION_PROMPT = "Describe the image."  # the question for a picture that comes with a caption only

CLASS_PROMPT = "What is this?"          # and for one of which only the kind is known


# ----------------------------------------------------------------------------------------------------------------------
# A row's pictures, whatever their columns are called. One that is overlooked trains as a text, and no number looks
# wrong: so what looks like a picture by its column's name or by its value is one, or the record is bad.

SURE = "images", "image", "file_name"  # these hold pictures, whatever their value
COLUMN = re.compile(r"(images?|file_?names?|imgs?|pictures?|photos?|pics?|jpe?g|png|webp|gif)"  # image_path_2
                    r"([ _-]?(?:path|file|name|url|uri|bytes|base64|b64|data|list)s?)?[ _-]?(\d*)")
SAYS_PICTURE = re.compile(r"image|img|picture|photo|jpe?g|png|pixel|thumbnail|screenshot")
SAYS_MEDIA = re.compile(r"video|audio|speech|(^|_)sounds?(_|$)|mp[34]|(^|_)wav(_|$)")
NUMBERED = re.compile(r"<image[ _](\d+)>")
# how other formats mark the place of a picture, and of what is not read
FOREIGN = re.compile(r"<img>[^<]*</img>|<\|(?:image|vision|video|audio)\w*\|>|^\s*<(?:video|audio)>|"
                     r"<(?:video|audio)>\s*$|<(?:image_placeholder|image_soft_token|ImageHere)>|^<I(?:mage|MAGE)>\n")
PICTURE, MOVING = "a picture", "video or sound"


@lru_cache(4096)
def columns_of(keys: tuple) -> list[tuple]:
    "The columns that are no texts -> (key, () or what COLUMN finds in it, the kind that it says)."
    # image_url_2 -> ("image_url_2", ("image", "_url", "2"), PICTURE). Rows of one file mostly have the same keys, so
    # this is worked out once for all of them.
    return [(key, match.groups("") if (match := COLUMN.fullmatch(key)) else (),
             PICTURE if SAYS_PICTURE.search(key) else MOVING if SAYS_MEDIA.search(key) else "")
            for key in keys if key not in TEXTS]


def kind_of(value) -> str:
    "PICTURE: bytes, a name or address, a data URI, base64, or a list or an object with one in it; MOVING; or empty."
    if isinstance(value, (list, dict)):
        return max(map(kind_of, value.values() if isinstance(value, dict) else value), default="")
    if not isinstance(value, str):
        return PICTURE if isinstance(value, bytes) else ""
    if inline := INLINE.match(value):
        return MOVING if inline[1] else PICTURE
    name = "" if len(value) > 2000 else (re.split("[?#]", value)[0] if "://" in value else value).strip().lower()
    return PICTURE if name.endswith(PICTURES + UNREAD) else MOVING if name.endswith(MEDIA) else ""


def pictures_of(row: dict, texts: tuple = ()) -> tuple[list, list]:
    "-> (a row's pictures; their columns' numbers, as of image_1 and image_2, or none). texts: more columns of texts."
    groups, strays = {}, []  # groups: {("image", ""): [(1, picture), (2, picture)]}
    for key, column, says in columns_of(tuple(row)):
        value = row[key]
        if value and column and (key in SURE and not texts or kind_of(value) == PICTURE or str(value)[:4] == "http"):
            some = value if isinstance(value, list) else [value]
            groups.setdefault(column[:2], []).extend((int(column[2] or -1), one) for one in some)
        elif value and (says or key not in texts and kind_of(value)):
            strays.append((key, kind_of(value), says))
    for key, kind, says in strays:
        if not groups or kind and says == MOVING:
            raise ValueError(f"{[key]} " + (
                f"is {MOVING}, which is not read; remove the record" if MOVING in (kind, says) else
                "seems to name a picture; the key must be image, or images for a list"))
    if not groups:
        return [], []
    # the likeliest: images before image before file_name before all others, and image before image_url
    best = min(groups, key=lambda one: (SURE.index(one[0]) if one[0] in SURE and not one[1] else 3, one[1] != ""))
    if best[0] not in SURE and len({stem.rstrip("s") for stem, _ in groups}) > 1:
        raise ValueError(f"{[stem for stem, _ in groups]} all name pictures; list them under images")
    numbers, pictures = zip(*sorted(groups[best], key=itemgetter(0)))
    return list(pictures), list(numbers) if numbers[-1] >= 0 else []


def place_pictures(messages: list, pictures: list, numbers: list) -> list:
    "MMMU's <image 2> becomes <image> -> the pictures in the order of the texts. Those that no text names come first."
    asked = [turn for turn in messages if turn["role"] == "user"]
    texts = [turn for turn in asked if isinstance(turn["content"], str)]
    found = [int(number) for turn in texts for number in NUMBERED.findall(turn["content"])]
    if not numbers and not found and len(pictures) != 1:  # of one picture without a marker the place is clear
        return pictures
    numbers = numbers or list(range(1, len(pictures) + 1))
    require({*found} <= {*numbers}, f"<image {max(found, default=0)}> is in a text, but there is no such picture")
    for turn in texts:
        turn["content"] = NUMBERED.sub("<image>", turn["content"])
    order = [numbers.index(number) for number in found]
    rest = [i for i in range(len(pictures)) if i not in order]
    first = asked[0]
    first["content"] = "<image>\n" * len(rest) + first["content"] if isinstance(first["content"], str) else \
        [{"type": "image"}] * len(rest) + first["content"]
    return [pictures[i] for i in rest + order]


# ----------------------------------------------------------------------------------------------------------------------
# A row's turns

def flatten(content: list, images: list):
    "OpenAI's list of parts -> a text. Their pictures are added to `images`."
    # [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "7.jpg"}}] -> "What?<image>"
    parts = []
    for part in content:
        if part["type"] in ("text", "input_text", "output_text"):
            parts.append({"type": "text", "text": part["text"]})
            continue
        require(part["type"] in ("image_url", "image", "input_image"), f"a part of type {part['type']!r}, which is "
                "not read; use text or image_url, or remove the record")
        url = part.get("image_url") or part.get("image") or part.get("source")  # as Anthropic's
        images += [url] if url else []
        parts.append({"type": "image"})
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
    if len(turn) > 2 and (key := first_of(("weight", "loss", "train"), turn)):
        require(turn[key] in (0, 1), f"the {key} of a turn is {str(turn[key])[:40]!r}; it must be 0 (not learned) or 1")
        out |= {} if turn[key] else {"weight": 0}
    return out


def ask(question, answer) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def first_of(keys: tuple, row: dict) -> str:
    return next((key for key in keys if row.get(key) is not None), "")


def to_messages(row: dict, images: list, extra: dict) -> list[dict]:
    """One row -> [{"role", "content"}, ...]. Its pictures are added to `images`, what scoring needs to `extra`."""
    # OpenAI  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    # LLaVA   {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Cat."}]}
    # Alpaca  {"instruction": "Translate into English.", "input": "Haus", "output": "house"}
    # GSM8K   {"question": "Ann has 2 + 3 eggs. How many?", "answer": "2 + 3 = 5\n#### 5"}
    # caption {"file_name": "7.jpg", "text": "A cat."};   kind  {"image": "7.jpg", "label": "cat"}
    if turns := first_of(TURNS, row):
        return [read_turn(turn, images) for turn in row[turns]]
    if row.get("texts"):  # FineVision, the_cauldron
        return [turn for pair in row["texts"] for turn in ask(pair["user"], pair["assistant"])]
    question = first_of(QUESTIONS, row)
    if images and not question and (key := first_of(CAPTIONS, row)):
        some = row[key] if isinstance(row[key], list) else [row[key]]
        require(some, f"{key} is an empty list; nothing could be learned from it")
        extra |= {"captions": some} if len(some) > 1 else {}  # data.py draws one of them for each epoch
        return ask(CAPTION_PROMPT, some[0])
    if images and not question and (key := first_of(KINDS, row)):
        require(isinstance(row[key], str), f"{key} is {str(row[key])[:40]!r}: write the name of the kind instead")
        extra |= {"answer": row[key], "metric": "exact"}
        return ask(CLASS_PROMPT, row[key])
    alpaca = question == "instruction"
    words, key = row[question or "question"], first_of(("output",) * alpaca + ANSWERS, row) or "answer"
    answer = row[key]
    if key == "answers":  # what most people said is learned, each of them is right
        answer = answer if isinstance(answer, list) else [answer]  # TRAP: the letters of a text would be answers, too
        answer = [one["answer"] if isinstance(one, dict) else one for one in answer]
        answer = sorted(answer, key=lambda one: -answer.count(one))
    require(answer != [], f"{key} is an empty list; nothing could be learned from it")
    extra |= {"answer": answer} if key in ("answers", *CHOSEN) else {}
    words = "\n\n".join(filter(None, (words, row["input"]))) if alpaca and row.get("input") else words
    words = "\n".join((row["hint"], words)) if row.get("hint") else words
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


def check_turns(messages: list) -> None:
    roles = [turn["role"] for turn in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles  # the chat format allows a system message only here
    # Filters that drop single turns leave a question without its answer, or two questions in a row.
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the turns are {', '.join(roles[:9]) or 'none'}; user and assistant must alternate, the "
                         "assistant last")
    for i, turn in enumerate(messages):  # TRAP: a message is made only for what is wrong: this runs a million times
        content, answer = turn["content"], turn["role"] == "assistant"
        if not isinstance(content, (str, list)):
            raise ValueError(f"the content of a turn is not text but {repr(content)[:40]}; write a number in quotes, "
                             "list pictures under images, and mark their places by <image>")
        text = text_of(content)
        if answer and (not text or text.isspace()):
            raise ValueError(f"the answer in turn {[i]} is empty; nothing could be learned from it")
        if answer and images_in(content):
            raise ValueError(f"<image> in the answer of turn {[i]}: the model cannot draw; where the word is meant, "
                             "write a list of parts, [{\"type\": \"text\", \"text\": ...}]")
        if not answer and content is text and "<" in text and (mark := FOREIGN.search(text)):
            raise ValueError(f"{mark[0][:40]!r} in a question: " + (
                f"{MOVING} is not read; remove the record" if SAYS_MEDIA.search(mark[0]) else
                "another format's mark of a picture; list pictures under images, and write <image> for each"))
    if all("weight" in turn for turn in messages if turn["role"] == "assistant"):
        raise ValueError("all answers have weight 0; nothing can be learned")


def instances_of(row) -> list:
    "Self-Instruct: several inputs under one instruction -> a row for each. Every other row is one."
    several = row.get("instances") if isinstance(row, dict) else None
    if several and not (isinstance(several, list) and all(isinstance(one, dict) for one in several)):
        return [ValueError(f"instances is {str(several)[:40]!r}; expected a list of objects")]
    # LLaVA's detection data has instances, too: boxes
    return [row | one for one in several] if several and "output" in several[0] else [row]


def read_row(row, where: str, number: int, find) -> dict:
    "A row of a file, or what is wrong with it -> its record, or a ValueError that names file, record and id."
    # The one place where errors get their names: what is called below says only what is wrong.
    try:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict):  # TRAP: in require() the message would be made for every good row, too
            raise ValueError(f"expected an object with keys, found {str(row)[:40]!r}")
        row = {key.lower() if len(key) > 1 else key: value for key, value in row.items()}  # options are called A, B
        if row.get("id") in (None, ""):
            row["id"] = number
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
    pictures, numbers = pictures_of(row)
    # Keys that scoring needs are kept; other keys of the file (licence, url) are dropped.
    extra = {key: row[key] for key in ("kind", "answer", "metric", "choices") if row.get(key) is not None}
    messages = to_messages(row, pictures, extra)
    if choices := options_of(row):
        extra["choices"] = choices
        if "answer" in extra or str(messages[-1]["content"]) in choices or not any(map(row.get, TURNS)):
            write_options(messages, extra, choices)
    for pair in reversed(row.get("history") or []):  # of ms-swift and LLaMA-Factory: what was said before
        messages = ([read_turn(pair, pictures)] if isinstance(pair, dict) else ask(*pair)) + messages
    if system := row.get("system") or row.get("system_prompt"):
        system = {"role": "system", "content": system}
        messages = [system] * (messages[:1] != [system]) + messages
    check_turns(messages)
    markers = sum(images_in(turn["content"]) for turn in messages)
    if not markers:
        pictures = place_pictures(messages, pictures, list(range(len(pictures))) if "texts" in row else numbers)
        markers = sum(images_in(turn["content"]) for turn in messages)
    images = [find(picture) for picture in pictures]
    if None in images:
        raise ValueError(f"no image {[str(pictures[images.index(None)])[:100]]} in images/ beside the file, in its own "
                         "folder, or in images.zip; it is only named")
    # With one marker too few, every later picture would belong to the wrong question, and no number would look wrong.
    if markers != len(images):
        raise ValueError(f"{markers} <image> markers, {len(images)} images; write a marker for each")
    if extra:
        check_scoring(extra)
    return {"id": str(row["id"]), "messages": messages, "images": images, **extra}


def check_scoring(extra: dict) -> None:
    "What scoring will use is of the right kind: later it would end an evaluation, or silently score nothing."
    for key in "answer", "captions", "kind":
        value = extra.get(key, "x")
        texts = value if isinstance(value, list) and key != "kind" else [value]
        require(texts and all(isinstance(text, str) and (text.strip() or key == "kind") for text in texts),
                f"the {key} must be a text, or a list of texts, and not empty; found {str(value)[:40]!r}")
        require(key != "captions" or "<image>" not in "".join(texts), "<image> in a caption: the model cannot draw")
    metric = extra.get("metric", "exact")
    require(metric in METRICS, f"unknown metric {str(metric)[:40]!r}; choose from {', '.join(METRICS)}")


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
