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
COLUMN = lru_cache(4096)(re.compile(  # image_path_2 -> image, path, 2. lru_cache: the rows of a file have the same keys
    r"(images?|file_?names?|imgs?|pictures?|photos?|pics?|jpe?g|png|webp|gif)"
    r"([ _-]?(?:path|file|name|url|uri|bytes|base64|b64|data|list)s?)?[ _-]?(\d*)").fullmatch)
SAYS_PICTURE = lru_cache(4096)(re.compile(r"image|img|picture|photo|jpe?g|png|pixel|thumbnail|screenshot").search)
SAYS_MEDIA = lru_cache(4096)(re.compile(r"video|audio|speech|(^|_)sounds?(_|$)|mp[34]|(^|_)wav(_|$)").search)

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


def media_in(row: dict, texts: set = TEXTS) -> str:
    "The column with a picture, video or sound of a row in which none was found yet; else empty."
    return next((key for key in row if row[key] and (SAYS_PICTURE(key) or SAYS_MEDIA(key))), "") or next(
        (key for key in row if key not in texts and looks_like(row[key], PICTURES + UNREAD + MEDIA)), "")


def pictures_of(row: dict) -> tuple[list, list]:
    "-> (a row's pictures; their columns' numbers, as of image_1 and image_2, or none)."
    groups = {}  # {("image", None): [(1, picture), (2, picture)]}
    for key, value in row.items():
        if value and (match := COLUMN(key)) and (key in SURE or looks_like(value) or str(value)[:4] == "http"):
            groups.setdefault(match.groups()[:2], []).extend(
                (int(match[3] or -1), one) for one in (value if isinstance(value, list) else [value]))
    other = media_in(row) if not groups else next(
        (key for key in row if SAYS_MEDIA(key) and looks_like(row[key], MEDIA)), "")
    media = other and (SAYS_MEDIA(other) or looks_like(row[other], MEDIA))
    require(not other, f"{[other]} " + ("is video or sound, which is not read; remove the record" if media else
                                        "seems to name a picture; the key must be image, or images for a list"))
    if not groups:
        return [], []
    best = min(groups, key=lambda group: (SURE.index(group[0]) if group[0] in SURE and not group[1] else 3,
                                          group[1] or ""))
    others = {stem.rstrip("s") for stem, _ in groups} - {best[0].rstrip("s")}
    require(not others or best[0] in SURE, f"{[best[0], *others]} all name pictures; list them under images")
    numbers, pictures = zip(*sorted(groups[best], key=lambda pair: pair[0]))
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
    named = re.compile(r"<image[ _](\d+)>")
    asked = [turn for turn in messages if turn["role"] == "user" and isinstance(turn["content"], str)]
    texts = "".join(turn["content"] for turn in asked)
    found = [int(number) for number in named.findall(texts)] if "<image" in texts else []
    if "<image>" in texts or not asked or not (numbers or found):
        return names
    numbers = numbers or list(range(1, len(names) + 1))
    require({*found} <= {*numbers}, f"<image {max(found, default=0)}> is in a text, but there is no such picture")
    for turn in asked if found else ():
        turn["content"] = named.sub("<image>", turn["content"])
    order = [numbers.index(number) for number in found]
    rest = [i for i in range(len(names)) if i not in order]
    asked[0]["content"] = "<image>\n" * len(rest) + asked[0]["content"]
    return [names[i] for i in rest + order]
