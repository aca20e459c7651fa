"""
Which columns of a row hold its pictures, whatever they are called. Called by records.py and text.py. One that is
overlooked trains as a text, and no number looks wrong: so what looks like a picture by its column's name or by its
value is one, or the record is bad. A reader of the lessons need not know it.
"""
import re
from functools import lru_cache

from plumbing.files import require
from plumbing.pictures import MEDIA, PICTURES, UNREAD

# The keys of a row, the likeliest first; of each kind the first that is not null is used.
TURNS = "messages", "conversations", "conversation"
QUESTIONS = "instruction", "question", "query", "prompt", "problem"
CHOSEN = "correct_choice_idx", "answerkey", "correct_answer", "answer_idx", "answer_index", "label"  # of options
ANSWERS = "answer", "answers", "output", "response", "completion", "solution", *CHOSEN
CAPTIONS = "text", "caption", "captions", "sentences", "sentence", "comment", "description"
KINDS = "label", "class", "class_name", "category"
TEXTS = {*TURNS, *QUESTIONS, *ANSWERS, *CAPTIONS, *KINDS, "id", "input", "system", "history", "hint", "texts", "url"}

SURE = "images", "image", "file_name"  # these hold pictures, whatever their value
COLUMN = re.compile(r"(images?|file_?names?|imgs?|pictures?|photos?|pics?|jpe?g|png|webp|gif)"  # image_path_2
                    r"([ _-]?(?:path|file|name|url|uri|bytes|base64|b64|data|list)s?)?[ _-]?(\d*)")
SAYS_PICTURE = re.compile(r"image|img|picture|photo|jpe?g|png|pixel|thumbnail|screenshot")
SAYS_MEDIA = re.compile(r"video|audio|speech|(^|_)sounds?(_|$)|mp[34]|(^|_)wav(_|$)")
NUMBERED = re.compile(r"<image[ _](\d+)>")

BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how a PNG, JPEG, GIF or WebP begins when bytes are letters


def looks_like(value, ends: tuple = PICTURES + UNREAD) -> bool:
    "Is it a picture: bytes, a name or address, a data URI, base64, or a list or an object with one in it?"
    if isinstance(value, (list, dict)):
        return any(looks_like(one, ends) for one in (value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str):
        return isinstance(value, bytes)
    if value.startswith(BASE64) and len(value) > 64 or re.match(r"data:[^,\s]*;base64,", value):
        return True
    name = re.split("[?#]", value)[0] if "://" in value else value
    return len(name) < 2000 and name.strip().lower().endswith(ends)


@lru_cache(4096)
def columns_of(keys: tuple) -> tuple[list, list]:
    "-> (the columns that may hold pictures, the likeliest first: (key, stem, form, number); those of video or sound)."
    # Rows of one file mostly have the same keys, so this is worked out once for all of them.
    columns = [(key, stem, form or "", int(number or -1)) for key in keys
               for stem, form, number in [match.groups() for match in [COLUMN.fullmatch(key)] if match]]
    columns.sort(key=lambda one: (SURE.index(one[1]) if one[1] in SURE and not one[2] else 3, one[2] != "", one[3]))
    return columns, [key for key in keys if SAYS_MEDIA.search(key)]


def media_in(row: dict, texts: set = TEXTS) -> str:
    "The column with a picture, video or sound of a row in which none was found yet; else empty."
    columns, media = columns_of(tuple(row))
    return next((key for key in row if row[key] and (key in media or SAYS_PICTURE.search(key))), "") or next(
        (key for key in row if key not in texts and looks_like(row[key], PICTURES + UNREAD + MEDIA)), "")


def pictures_of(row: dict) -> tuple[list, list]:
    "-> (a row's pictures; their columns' numbers, as of image_1 and image_2, or none)."
    groups, (columns, media) = {}, columns_of(tuple(row))  # groups: {("image", ""): [(1, picture), (2, picture)]}
    for key, stem, form, number in columns:
        value = row[key]
        if value and (key in SURE or looks_like(value) or str(value)[:4] == "http"):
            some = value if isinstance(value, list) else [value]
            groups[stem, form] = groups.get((stem, form), []) + [(number, one) for one in some]
    other = next((key for key in media if looks_like(row[key], MEDIA)), "") if groups else media_in(row)
    if other:
        moves = other in media or looks_like(row[other], MEDIA)
        raise ValueError(f"{[other]} " + ("is video or sound, which is not read; remove the record" if moves else
                                          "seems to name a picture; the key must be image, or images for a list"))
    if not groups:
        return [], []
    best = next(iter(groups))
    if len({stem.rstrip("s") for stem, _ in groups}) > 1 and best[0] not in SURE:
        raise ValueError(f"{[stem for stem, _ in groups]} all name pictures; list them under images")
    numbers, pictures = zip(*groups[best])
    return list(pictures), list(numbers) if numbers[-1] >= 0 else []


def source_of(picture) -> str | bytes:
    "A picture as a row has it -> bytes, a name, a URL or a data URI."
    if isinstance(picture, dict):  # {"bytes", "path"} of Hugging Face, {"url"} of OpenAI, {"data"} of Anthropic
        picture = next((picture[key] for key in ("bytes", "data", "path", "url") if picture.get(key)), None)
    if isinstance(picture, str) and len(picture) > 64 and picture.startswith(BASE64):
        return "data:," + picture
    # A name may be a bare number in JSON, but is no list and no object.
    require(type(picture) in (str, int, bytes), "an image is no name, but a list or an object")
    return picture if isinstance(picture, bytes) else str(picture)


def place_pictures(messages: list, names: list, numbers: list) -> list:
    "MMMU's <image 2> becomes <image> -> the pictures in the order of the texts. Those that no text names come first."
    asked = [turn for turn in messages if turn["role"] == "user" and isinstance(turn["content"], str)]
    found = [int(number) for turn in asked for number in NUMBERED.findall(turn["content"])]
    if not asked or not (numbers or found) or any("<image>" in turn["content"] for turn in asked):
        return names
    numbers = numbers or list(range(1, len(names) + 1))
    require({*found} <= {*numbers}, f"<image {max(found, default=0)}> is in a text, but there is no such picture")
    for turn in asked if found else ():
        turn["content"] = NUMBERED.sub("<image>", turn["content"])
    order = [numbers.index(number) for number in found]
    rest = [i for i in range(len(names)) if i not in order]
    asked[0]["content"] = "<image>\n" * len(rest) + asked[0]["content"]
    return [names[i] for i in rest + order]
