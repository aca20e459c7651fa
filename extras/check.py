"""
The data check: every record and picture opened, tokens counted, what is wrong named. Called by `python data.py --check`
and for `python data.py --data=...`. Training needs none of it.
"""
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from plumbing.drawing import draw_records
from plumbing.files import attempt, read_json, require, say
from plumbing.hub import fetch
from plumbing.fitting import row_length
from plumbing.pictures import open_source
from plumbing.records import Records, text_of, turns_of
from plumbing.world import World
from data import make_document, parse_mixture, read_any, token_counter, tokenizer_texts
from model import FROM_SCRATCH, LLAVA, PRESETS, check_name, connect, preset
from tokenizer import Tokenizer
from train_sft import BY_MODEL
from vision import llava_vision


def as_in_training(flags) -> Tokenizer:
    "The tokenizer that train_sft.py --model= would take; its rows and image tokens go into flags that are not given."
    check_name(flags.model)
    config = preset(flags.model if flags.model in PRESETS else "qwen2.5-1.5b")  # a hub's Qwen gets the same bridge
    if flags.tokenizer:
        tokenizer = Tokenizer.from_pretrained(flags.tokenizer)
    elif flags.model in FROM_SCRATCH:
        tokenizer = Tokenizer.train(tokenizer_texts(flags.data, 0), config.decoder.vocab_size)
    else:
        folder = Path(flags.model) if Path(flags.model).is_dir() else fetch(flags.model)
        tokenizer, hf = Tokenizer.from_pretrained(folder), read_json(folder / "config.json")
        if hf.get("model_type") in LLAVA:  # which brings its own bridge
            config.vision, config.bridge = llava_vision(hf, folder)
            connect(config)
    config.vision.tiles = flags.tiles = config.vision.tiles if flags.tiles is None else flags.tiles
    flags.image_tokens = flags.image_tokens or token_counter(config)
    lengths = []
    for name, _ in parse_mixture(flags.data):
        records = read_any(name, World("chat"), 500)
        for record in itertools.islice(records.each() if isinstance(records, Records) else records, 500):
            if isinstance(record, dict) and "messages" in record:  # neither an error nor text, which is cut to fit
                document = attempt(make_document, record, 0, tokenizer, flags.image_tokens, 10 ** 9)
                lengths += [len(document.ids) - 1] if document and not isinstance(document, ValueError) else []
    usual = BY_MODEL.get(flags.model, BY_MODEL["released"])["seq_len"]
    flags.seq_len = flags.seq_len or row_length(lengths, usual, config.decoder.max_position_embeddings)
    return tokenizer

SHOWN = 5  # lines of each sort on the screen: 170 would hide the first, which mostly says what is wrong with all


def check_data(flags) -> dict:
    """
    Every record and picture of --data (and --val) -> the counts, which are also the last line printed. Names each bad
    record. With --check tokens are counted, too, and check.png is drawn.
    """
    counts, bad, lengths, shown, drawn = Counter(records=0, images=0, turns=0, supervised_tokens=0), [], [], [], []
    blank = []  # pictures that show nothing, perhaps: no error, as a picture may be black
    seen, trained = {}, set()  # {hash of a record: the first that has it}; of the pictures and texts of --data
    tokenizer = as_in_training(flags) if flags.check else None
    parts = [(name, False) for name, _ in parse_mixture(flags.data)] + [(flags.val, True)] * bool(flags.val)
    for name, held_out in parts:
        records = read_any(name, World("chat"), 500)
        bad += getattr(records, "bad", [])
        numbers = itertools.count()
        if isinstance(records, Records):
            numbers, records = records.spans[:, 0], records.each()  # numbers in the file, where bad ones count, too
        for number, record in zip(numbers, tqdm(records, desc=f"checking {name}", delay=5, disable=None)):
            where = f"{name}, record {number}"
            try:
                if isinstance(record, ValueError):
                    raise record
                where += f" (id {record['id'][:60]!r})"
                counts.update(records=1, images=len(record["images"]), turns=len(record.get("messages", [])))
                pictures = [attempt(open_source, source) for source in record["images"]]
                # By content: "1.jpg" and "1 (copy).jpg" may be one picture, train/1.jpg and val/1.jpg need not be. Nor
                # need two texts be the same whose id is 0, their number in two files.
                keys = [hash((one.size, one.tobytes()) if isinstance(one, Image.Image) else repr(one))
                        for one in pictures or [turns_of(record)]]
                bad += [f"{where}: {problem}" for problem in problems_of(record, pictures, keys, where, seen)]
                blank += [f"{where}: a picture is nearly all black, or of one colour" for one in pictures
                          if isinstance(one, Image.Image) and is_blank(one)]
                if not held_out:
                    trained.update(keys)
                elif not trained.isdisjoint(keys):
                    bad.append(f"{where}: a picture or text of it is in --data, too")
                drawn += [record] * (len(drawn) < 20)
                line = count_tokens(record, tokenizer, flags, counts, lengths) if tokenizer else \
                    json.dumps({"id": record["id"], "messages": record.get("messages", record.get("text")),
                                "images": len(record["images"])}, ensure_ascii=False)
                shown += [line] * (line != "" and len(shown) < 3)
            except ValueError as error:
                bad.append(str(error) if name in str(error) else f"{where}: {error}")
    path = Path(flags.out.replace("world.png", "check.png"))
    if drawn and flags.check:
        draw_records(path, drawn)
        say(f"wrote {path}")
    print("\n".join(shown + [f"bad: {line}" for line in bad[:SHOWN]] + [f"look at: {line}" for line in blank[:SHOWN]]))
    if max(len(bad), len(blank)) > SHOWN:
        print(f"{len(bad)} bad records in all, {len(blank)} pictures that are nearly black or of one colour; " + (
            f"all are named in {path.with_suffix('.txt')}" if flags.check else "--check writes all to a file"))
    if flags.check and (bad or blank):
        path.with_suffix(".txt").write_text("\n".join(bad + blank) + "\n", encoding="utf-8")
    if lengths:
        print(f"tokens of a record: median {int(np.median(lengths))}, longest {max(lengths)}; {counts['cut']} of "
              f"{len(lengths)} are longer than --seq_len={flags.seq_len} and lose their last turns, another "
              f"{counts['left_out']} do not fit at all" + f"; pictures in --tiles={flags.tiles}" * bool(flags.tiles))
    return {**counts, "bad": len(bad)}


def is_blank(image: Image.Image) -> bool:
    "All but a hundredth of the pixels are nearly black, or alike. 16 bits of which few are used look so, read as 8."
    values = np.asarray(image.resize((64, 64)))
    low, high = np.percentile(values, (1, 99), axis=(0, 1))  # [3] each
    return high.max() < 24 or (high - low).max() < 4


def problems_of(record: dict, pictures: list, keys: list[int], where: str, seen: dict) -> list[str]:
    "What is wrong with a record that could be read. In place of a picture there may be the error that opening it was."
    bad, turns = [], turns_of(record)
    for image in pictures:
        if isinstance(image, ValueError):
            bad.append(str(image))
        elif min(image.size) < 4 or max(image.size) > 100 * min(image.size):
            bad.append(f"a picture of {image.width} x {image.height} pixels shows nothing")
    for turn in turns:
        text = text_of(turn["content"])
        if turn["role"] in ("user", "system") and not text.strip() and not record["images"]:
            bad.append("a question is empty")
        if found := re.search(r"<\|[a-z_]+\|>|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f]|\[INST\]|</?s>", text):
            bad.append(f"{found[0]!r} in a text: a mark of another format, or a damaged letter")
    first = seen.setdefault(hash(repr((turns, keys))), where)
    return bad + [f"the same as {first}"] * (first != where)


def count_tokens(record: dict, tokenizer, flags, counts: Counter, lengths: list) -> str:
    """
    A record's tokens are added to the counts -> the record as the model reads it: pictures as [64 image tokens], the
    part that is learned in **stars**; "" if it does not fit.
    """
    document = make_document(record, 0, tokenizer, flags.image_tokens, 10 ** 9)
    require(document, "nothing in it is learned")
    lengths.append(len(document.ids) - 1)
    if "messages" in record:  # text is cut into pieces, of which none is lost
        document = make_document(record, 0, tokenizer, flags.image_tokens, flags.seq_len)
        counts["left_out" if document is None else "cut"] += lengths[-1] > flags.seq_len
    if document is None:
        return ""
    counts["supervised_tokens"] += sum(document.mask[1:])
    out, learned = "", False
    for (picture, mask), group in itertools.groupby(zip(document.ids, document.mask), lambda pair: (
            pair[0] == tokenizer.image_pad, bool(pair[1]))):
        ids = [token for token, _ in group]
        text = f"[{len(ids)} image tokens]" if picture else tokenizer.decode(ids, skip_special=False)
        out, learned = out + "**" * (mask != learned) + text, mask
    return (out + "**" * learned).replace("\n", "\\n")
