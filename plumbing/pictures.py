"""
Where a record's picture lies, and how it is opened safely: paths, zips, URLs and bytes become upright RGB images; zip
bombs, huge pictures and names that lead out of the data's folder are refused.
Called by the loader, the data check, sample.py and the server. A reader of the lessons need know only `open_source` and
`load_image`; what is done to the pixels from there on is in vision.py.
"""
import base64
import contextlib
import hashlib
import io
import itertools
import os
import re
import unicodedata
import warnings
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import requests
from PIL import ExifTags, Image, ImageOps

from plumbing.files import cache, named_errors, new_file, require
from plumbing.hub import CHUNK, request, retry
from plumbing.strange import Drawing

# A source is a path, a URL, a (zip file, member) pair, the bytes of a picture file, or a Drawing of the built-in world.
# It is opened only when its record is used.

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")

UNREAD = (".heic", ".heif", ".avif", ".tif", ".tiff")  # pictures, too, but not for every Pillow

MEDIA = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".m4a", ".ogg")  # not read at all

# A picture in letters: data:image/png;base64,iVBORw0KG..., or only how a PNG, JPEG, GIF or WebP begins in base64
INLINE = re.compile(r"data:(video|audio)?[^,\s]*;base64,|(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/=\s]{50}")

LEADS_OUT = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.($|[/\\])|\0")  # /etc/passwd, C:x, ../x

MAX_PICTURE = 200 * 2 ** 20  # bytes of one picture's file; a larger one is a mistake or an attack (a zip bomb)


@lru_cache(maxsize=32)  # stays open: reading the directory of a big zip takes seconds
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # one per process: a forked worker would share its parent's file position


def read_member(path: str, member: str) -> bytes:
    file = open_zip(path, os.getpid())
    size = file.getinfo(member).file_size  # zipfile never unpacks more than this directory entry says
    require(size <= MAX_PICTURE, f"{member} in {path}: {size:,} bytes are too many for a picture")
    try:
        return file.read(member)
    except RuntimeError as error:  # encrypted, or packed by a method that Python lacks
        raise zipfile.BadZipFile(str(error)) from None


def fetch_picture(url: str, folder: Path, most: int, check) -> bytes:
    """
    A small file from any web server, kept in the folder -> its bytes.
    check(bytes) raises an error where they are something else: a hotel's login page must not be kept as the picture.
    """
    digest = hashlib.sha1(url.encode()).hexdigest()
    kept = folder / digest[:2] / digest  # 256 folders: a hundred thousand files in one are slow
    with contextlib.suppress(FileNotFoundError):
        return kept.read_bytes()

    def receive_all() -> bytes:
        content = b""
        with request("GET", url, url) as reply:
            for chunk in reply.iter_content(CHUNK):
                content += chunk
                require(len(content) <= most, f"{url}: more than {most:,} bytes")
        if len(content) < int(reply.headers.get("Content-Length", 0)):
            raise requests.ConnectionError("the connection closed early")
        return content

    content = retry(url, receive_all)
    check(content)
    with new_file(kept) as file:
        file.write(content)
    return content


def open_source(source, px: int = 256) -> Image.Image:
    "A source -> an RGB image, a Drawing px pixels wide, or a multiple. ValueError names what cannot be opened."
    if isinstance(source, Drawing):
        return source.draw(px * source.sides)  # at the size needed: no resizing blurs it
    return load_image(*file_of(source))


def picture_size(source, px: int) -> tuple[int, int]:
    "(width, height) of what open_source gives. Of a file the header alone is read, where that is enough."
    if isinstance(source, Drawing):
        return px * source.sides, px * source.sides
    with contextlib.suppress(Exception), Image.open(file_of(source)[0]) as image:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # see load_image
        return image.size[::-1] if on_its_side else image.size
    return open_source(source, px).size  # which says what is wrong with it


def file_of(source) -> tuple:
    "-> (a path, or a file in memory, that holds the picture; its name for messages)."
    name = source if isinstance(source, str) else "picture"
    if isinstance(source, tuple):
        name = " in ".join(reversed(source))  # "7.jpg in images.zip"
        with named_errors(name):
            source = read_member(*source)
    elif name.startswith(("http://", "https://")):
        source = fetch_picture(name, cache("pictures"), MAX_PICTURE,
                                   check=lambda content: load_image(io.BytesIO(content), name))
    return io.BytesIO(source) if isinstance(source, bytes) else source, name


MAX_PIXELS = 100_000_000  # 300 MB once decoded as RGB: above this a small file may well be an attack on our memory

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns at first; ours, below, looks before anything is decoded


def load_image(source, name: str = "") -> Image.Image:
    """
    A path, an open binary file or a PIL image -> an RGB image, upright, the first frame of an animation.
    ValueError names the image if it is missing, broken, cut short or too large.
    """
    name, problem = name or (str(source) if isinstance(source, (str, Path)) else "image"), ""
    try:
        # Image.open reads only the header. So the size is known before memory is spent on pixels.
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            problem = f"{image.width} x {image.height} pixels is over the limit of {MAX_PIXELS:,}; make it smaller"
        else:
            image.load()  # decoding happens here, and with it most errors
    except FileNotFoundError:
        problem = "no such image file"
    except Exception as error:  # noqa: BLE001 Pillow's decoders answer a broken file with almost any type of error
        why = " ".join(str(error).split())[:200].split(" <_io")[0]
        problem = f"not a readable image ({why}); replace it or remove it from the data"
    require(not problem, f"{name}: {problem}")
    # A broken EXIF block raises almost anything, or warns; the pixels themselves are fine.
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Phones store the picture as the sensor lay, and how to turn it. Most need no turn, and then no copy.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    "Any PIL mode -> RGB."
    # 16 or 32 bits a pixel: PIL's own conversion would clip all above 255 to white
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        # The file does not say what its white is. So the brightest pixel decides: 4,080 is of 12 bits, white is 4,095.
        top = values.max(initial=0)
        white = 1 if image.mode == "F" and top <= 1 else max(255, 2 ** int(top).bit_length() - 1)
        image = Image.fromarray((values * 255 / white).clip(0, 255).astype(np.uint8))
    # Transparent pixels become white: what lies under them in the file is arbitrary, often black.
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies in any case


def bytes_or_name(picture) -> bytes | str:
    "A picture as a row has it -> its bytes, or where they are."
    if isinstance(picture, dict):  # {"bytes", "path"} of Hugging Face, {"url"} of OpenAI, {"data"} of Anthropic
        picture = next((picture[key] for key in ("bytes", "data", "path", "url") if picture.get(key)), None)
    # A name may be a bare number in JSON, but is no list and no object.
    if type(picture) not in (str, int, bytes):
        raise ValueError("an image is no name, but a list or an object")
    if isinstance(picture, bytes) or not INLINE.match(picture := str(picture)):
        return picture
    try:
        return base64.b64decode("".join(picture.rpartition(",")[2].split()), validate=True)
    except ValueError:
        raise ValueError(f"image {picture[:40]!r} is not base64") from None


def zips_in(place: str) -> list[tuple]:
    "A folder's zips -> (path, members, the folders that all members lie in, \"\" first) of each."
    # A zip stays packed: half a million small files take hours to unpack, and many disks run out of inodes.
    # The directory at the zip's end gives each member's position, so one picture is read without the others.
    out = []
    for path in map(str, sorted(Path(place).glob("*.zip"), key=lambda path: (path.name != "images.zip", path))):
        with named_errors(path):
            members = open_zip(path, os.getpid()).NameToInfo
        # macOS adds a hidden companion of each file. It has the name of a picture, but is none.
        common = os.path.commonprefix([name for name in members if not name.startswith("__MACOSX/")])
        # Zipping a folder puts its name before all others: the zip has images/004/7.jpg, the records say 004/7.jpg.
        # Both are found, the full name first.
        out.append((path, members, ["", *itertools.accumulate(part + "/" for part in common.split("/")[:-1])]))
    return out


def spellings_of(name: str):
    "The names under which a picture may lie here, the likeliest first."
    yield name
    # Windows writes images\0.jpg. macOS spells ü as two letters, u and two dots, others as one: a name from there may
    # lack its file here. COCO's train2017/0.jpg may lie without its folder.
    slashes = name.replace("\\", "/")
    others = (slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")),
              re.sub(r"^(train|val|test)20\d\d/", "", slashes))
    yield from dict.fromkeys(other for other in others if other != name)


def image_finder(folder: str, places: dict = {}):
    """
    -> a function: a picture as a row has it -> its source, or None. It opens no image. places: where those are that the
    folder lacks, {the beginning of their names: another folder, or a URL}. A name that leads out of the folder is a
    ValueError: a file of records from a stranger must not make us read, and describe, the user's other files.
    """
    folder = os.path.abspath(folder)
    true_path, zips = lru_cache(2 ** 14)(os.path.realpath), lru_cache(zips_in)
    # Hugging Face's cache has links: snapshots/x/images/0.png -> ../../../blobs/0
    cached = [folder.rpartition("/snapshots/")[0] + "/blobs"] * ("/snapshots/" in folder)
    roots = tuple(os.path.join(true_path(os.path.join(root, end)), "")
                  for root in [folder, *cached, *places.values()] for end in ("", "images"))

    def is_file(path: str) -> bool:
        if not os.path.isfile(path):
            return False
        # realpath takes 30 microseconds, so only links are followed one by one, folders once
        true = os.path.realpath(path) if os.path.islink(path) else os.path.join(true_path(os.path.dirname(path)), "x")
        if not true.startswith(roots):
            raise ValueError(f"image {path[:200]!r} is a link that leads out of the data's folder {folder}; copy the "
                             "file there")
        return True

    def find_in(place: str, name: str):
        for archive, members, prefixes in zips(place):
            for prefix in prefixes:
                if prefix + name in members:
                    return archive, prefix + name
        # Some files say images/7.jpg, others 7.jpg.
        for path in f"{place}/images/{name}", f"{place}/{name}":
            if is_file(path):
                return path
        first, _, rest = name.partition("/")  # gqa/images/7.jpg may be images/7.jpg in gqa/images.zip
        return find_in(os.path.join(place, first), rest) if rest else None

    def find(picture):
        name = bytes_or_name(picture)
        if isinstance(name, bytes) or name.startswith(("http://", "https://")):
            return name
        name = re.sub("^file://(localhost)?", "", unquote(name)) if name.startswith("file://") else name
        if name.startswith("/"):
            name = next((os.path.relpath(name, root) for root in (folder, true_path(folder))
                         if os.path.normpath(name).startswith(os.path.join(root, ""))), name)
        if LEADS_OUT.search(name):
            raise ValueError(f"image {str(picture)[:100]!r} leads out of the data's folder {folder}; name it relative "
                             "to the folder")
        for start, place in [("", folder), *places.items()]:
            for one in spellings_of(name):
                rest = one.removeprefix(start)
                if one.startswith(start) and (source := place + rest if "://" in place else find_in(place, rest)):
                    return source
    return find


def picture_key(source) -> str:
    """The same text for the same picture: data sets often contain copies under other names."""
    if isinstance(source, tuple):  # a zip's directory has the checksums: no picture is read for them
        info = open_zip(source[0], os.getpid()).getinfo(source[1])
        return f"{info.CRC} {info.file_size}"
    if isinstance(source, bytes):
        return f"{zlib.crc32(source)} {len(source)}"
    if isinstance(source, Drawing):
        return repr(source)
    # For plain files the name is used, or 100 GB would be read. With one folder's name, because train2017/7.jpg is not
    # vg/7.jpg; without the folders above, or the split would differ from machine to machine.
    return "/".join([part for part in source.replace("\\", "/").split("/") if part not in ("", ".")][-2:])
