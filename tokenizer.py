"""
Text -> ids, and conversations -> (ids, loss mask, image slots). Start reading here: this file uses no other.

A language model reads integers, called token ids. Text becomes ids in four steps:

    "I'm at  ten"  --regex-->  "I" "'m" " at" " " " ten"  --UTF-8-->  bytes  --merges-->  [40, 2776, 518, 220, 5779]

1. Text is normalised (Unicode NFC), so that an accented letter has only one spelling.
2. PATTERN cuts it into pieces of about one word. A token never reaches over the end of a piece.
3. Each piece becomes its UTF-8 bytes. There are only 256 bytes, so no character is unknown.
4. Byte-pair encoding (BPE) merges neighbours into longer tokens. It takes the merge that was learned first, then the
   next, until no learned merge fits.

`train_bpe` learns the merges. The position of a merge in the learned order is its rank and also its token id, so the
whole tokenizer is one table {bytes: id}: 151,643 entries for Qwen, a few thousand for our own. tiktoken applies it.

A conversation is text with special tokens in it. This format is called ChatML:

    <|im_start|>user                                                             mask 0
    <|vision_start|><|image_pad|>...<|image_pad|><|vision_end|>What is this?     mask 0    slot = the first image token
    <|im_end|>                                                                   mask 0
    <|im_start|>assistant                                                        mask 0
    A cat.<|im_end|>                                                             mask 1    the supervised tokens

Each special token has its own id, and no text can produce it: a user who types "<|im_end|>" gets ordinary tokens.
<|image_pad|> is the image token. An image is a run of them, and the model replaces their embeddings by image features.
`Tokenizer.render` makes all this, and nothing else does. So training, evaluation and chat always use the same format.

Left out: tool calls. Also vocabularies that cut text with another pattern than Qwen's: they would load and then give
slightly wrong ids, so they are refused.
"""
import base64
import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable, NamedTuple

import tiktoken

# Qwen's rule for cutting text into pieces. The regex engine tries the alternatives from first to last:
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # an English ending: I'm -> I 'm
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with one space or punctuation mark before it
    r"|\p{N}"  # digits one by one: 2024 is four tokens, and every number is cut in the same way
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # a run of punctuation marks, with the newlines after it
    r"|\s*[\r\n]+"  # newlines, with the spaces before them
    r"|\s+(?!\S)|\s+"  # other white space, but its last space goes to the word that follows
)

# Qwen2.5's special tokens in the order of their ids. The ids follow those of the regular tokens: from 151643 on for
# Qwen2.5, and directly after the merges for a tokenizer of our own.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]

IMAGE = "<image>"  # in the content of a message: the place of the next image (as in LLaVA's data)
ROLES = ("system", "user", "assistant")  # only what the assistant says is supervised
THINK = ("<think>", "</think>")  # in the answer of a Qwen3: around what it thinks first
MAX_BLANKS = 100_000  # trap: a longer run of white space overflows the stack of tiktoken's regex engine

# ----------------------------------------------------------------------------------------------------------------------
# Text to pieces

def clean(text: str) -> str:
    """Text as it is trained on and encoded: in Unicode form NFC and without broken characters."""
    text = unicodedata.normalize("NFC", text)
    # JSON can contain one half of a surrogate pair, which UTF-8 cannot encode. It becomes U+FFFD here.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Only training needs the pieces: tiktoken cuts inside its own code. Python's re knows no \p{L} (any letter) and \p{N}
# (any number). So a copy of the text is matched, the shadow, with an ASCII character for each of the same kind.
class _Shadow(dict):
    """Code point -> an ASCII character of the same kind: {"é": "a", "½": "0", "。": "!"}, filled when needed."""
    def __missing__(self, code: int) -> str:
        char = chr(code)
        if code < 128:
            kind = "!" if char == "_" else char  # an underscore is a letter for re, but not for PATTERN
        elif char == "\u017f":
            kind = "s"  # the old long s: (?i:'s) matches it too. No other letter of the English endings has such a form
        else:
            kind = "\t" if char.isspace() else {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")
        self[code] = kind
        return kind


_SHADOW = _Shadow()
# The shadow has no underscores, so \w matches exactly letters and digits in it. re.ASCII makes \s match the same six
# characters as in tiktoken's engine.
_SHADOW_PATTERN = re.compile(
    PATTERN.replace(r"\p{L}\p{N}", r"\w").replace(r"\p{L}", r"[^\W\d]").replace(r"\p{N}", r"\d"), re.ASCII)


def split(text: str) -> list[str]:
    """Pieces of cleaned text: "I'm at  ten" -> ["I", "'m", " at", " ", " ten"]"""
    return [text[m.start() : m.end()] for m in _SHADOW_PATTERN.finditer(text.translate(_SHADOW))]


# ----------------------------------------------------------------------------------------------------------------------
# Training

def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """[1, 2, 3, 1, 2] with the pair (1, 2) becoming 9 -> [9, 3, 9]"""
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        out.append(new if found else ids[i])
        i += 2 if found else 1  # from the left and never overlapping, as in tiktoken: "aaa" becomes "aa" "a"
    return out


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """
    Learn merges: in each step the most frequent pair of neighbours becomes a new token. Returns {bytes: id}: the 256
    single bytes, then the merges in the order learned. It stops before vocab_size if no pair occurs twice any more.
    """
    if vocab_size < 256:
        raise ValueError(f"a byte-level vocabulary needs 256 entries before its first merge, got room for {vocab_size}")
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one string: put it into a list")
    # The same pieces occur again and again: the work is done once per distinct piece, of which 1 MB has about 15,000.
    frequency = Counter()  # piece -> occurrences
    for text in texts:
        frequency.update(split(clean(text)))
    words = [list(piece.encode("utf-8")) for piece in frequency]  # ids of each word, so far its bytes
    times = list(frequency.values())  # how often each word occurs

    counts = Counter()  # pair -> occurrences in the whole text
    where = defaultdict(set)  # pair -> words that contain it, or did so before some merge
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times[w]
            where[pair].add(w)
    # A heap finds the most frequent pair without a search through all pairs. Counts are negative because heapq returns
    # the smallest entry first. A heap entry cannot be changed: each changed count is pushed as a new entry, and an
    # entry with an old count is skipped. Of two equal counts, the pair with the smaller ids comes first.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]  # id -> bytes
    while heap and len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            continue  # an entry with an old count
        if -count < 2:
            break  # a pair that occurs only once would be a token for one place in the text
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        change = Counter()  # pair -> by how much this merge changes its count, counted in the words that contain it
        for w in where.pop(pair):
            before, words[w] = words[w], _merge(words[w], pair, new)
            for p in zip(before, before[1:]):
                change[p] -= times[w]
            for p in zip(words[w], words[w][1:]):
                change[p] += times[w]
                where[p].add(w)  # pairs with the new token
        for p, delta in change.items():
            if delta:
                counts[p] += delta  # the merged pair itself falls to 0 here
                heapq.heappush(heap, (-counts[p], p))
    return {token: i for i, token in enumerate(tokens)}


# ----------------------------------------------------------------------------------------------------------------------
# The files of the Hugging Face hub

def _byte_alphabet() -> dict[str, int]:
    """The hub's files write bytes as visible characters, like GPT-2: {"!": 33, "Ġ": 32 (space), "Ċ": 10 (newline)}"""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these are written as themselves
    rest = [b for b in range(256) if b not in visible]  # written as the characters from U+0100 on, in order
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path.name} is not valid JSON ({error}); download it again") from None


def _ranks_from_merges(vocab: dict[str, int], merges: list, special: dict[str, int]) -> dict[bytes, int]:
    """{"Ġt": 258, ...} -> {b" t": 258, ...}"""
    # The hub stores the order of the merges and the ids separately, but tiktoken uses the ids as the order. That is the
    # same only if ids rise along the list of merges and each merge joins two tokens that already exist. Check both.
    alphabet = _byte_alphabet()
    regular = {token: i for token, i in vocab.items() if token not in special}
    known, last = set(alphabet), -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge  # "Ġ t" in older files, ["Ġ", "t"] in newer ones
        token = "".join(pair)
        if len(pair) != 2 or not known.issuperset(pair) or regular.get(token, -1) <= last:
            raise ValueError(f"merge {merge!r} is out of order or not in the vocabulary; use one Qwen model's files")
        known.add(token)
        last = regular[token]
    # The hub's tokenizer can never produce a token that no merge makes, but tiktoken can. So there must be none.
    if known != regular.keys():
        raise ValueError(f"bytes and merges do not give the listed tokens: see {min(known ^ regular.keys())!r}")
    return {bytes(alphabet[c] for c in token): i for token, i in regular.items()}


def _read_hub(folder: Path) -> tuple[dict[bytes, int], dict[str, int], str | None, bool]:
    """tokenizer.json, or the older vocab.json and merges.txt -> ranks, special tokens, default system text, thinking"""
    config = folder / "tokenizer_config.json"
    config = _read_json(config) if config.exists() else {}
    if (folder / "tokenizer.json").exists():  # one file with everything, including the pattern
        hub = _read_json(folder / "tokenizer.json")
        cutter = hub.get("pre_tokenizer") or {}
        steps = cutter.get("pretokenizers", [cutter])
        if [step["pattern"].get("Regex") for step in steps if "pattern" in step] != [PATTERN]:
            raise ValueError("tokenizer.json does not cut text by Qwen's pattern; use a Qwen2 or Qwen2.5 tokenizer")
        vocab, merges = hub["model"]["vocab"], hub["model"]["merges"]
        special = {token["content"]: token["id"] for token in hub["added_tokens"]}
    else:
        vocab = _read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]  # "# #" is a merge
        # These two files contain regular tokens only. Special tokens are in one of two other files, or we take Qwen's.
        if "added_tokens_decoder" in config:
            special = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
        elif (folder / "added_tokens.json").exists():
            special = _read_json(folder / "added_tokens.json")
        else:
            special = {name: max(vocab.values()) + 1 + i for i, name in enumerate(SPECIAL_TOKENS)}
    # The chat template, a program in Jinja, in newer repositories a file of its own. We need two things from it: the
    # system text of a conversation that has none, where a newline may be written as a backslash and an n; and whether
    # it knows Qwen3's switch for thinking.
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else str(config.get("chat_template", ""))
    # This search misses a text that contains a quote or a brace. So `save_hub` also writes both as entries.
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^<{}']+)<\|im_end\|>", template)
    default_system = config.get("default_system", found[1] if found else None)
    # LLaVA-OneVision was trained with this text before every conversation, but its template lacks it.
    if IMAGE in special and "default_system" not in config:
        default_system = default_system or "You are a helpful assistant."
    thinking = config.get("thinking", "enable_thinking" in template)
    return _ranks_from_merges(vocab, merges, special), special, default_system, thinking


def _find_merges(vocab: dict[str, int]) -> list[str]:
    """Merges from ids, which must rise: {..., "t": 83, "Ġ": 220, "Ġt": 259, "Ġth": 339} -> ["Ġ t", "Ġt h"]"""
    merges = []
    for token, rank in vocab.items():
        parts = list(token)
        while len(parts) > 2:  # merge as tiktoken does; the last two parts are the pair that makes the token
            ranks = [vocab.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] >= rank:  # tiktoken finds such a token directly in its table, but no merges make it
                raise ValueError(f"token {token!r} is not made of older ones; the hub's files cannot hold this table")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges += [" ".join(parts)] if len(parts) == 2 else []
    return merges


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

class Rendered(NamedTuple):
    """A conversation as the model reads it. ids and mask have the same length T."""
    ids: list[int]
    mask: list[int]  # loss mask: 1 where ids[i] is supervised, that is, the model learns to predict it from ids[:i]
    slots: list[int]  # per image, in order: where its run of image tokens starts in ids


def _read_message(i: int, message: dict) -> tuple[str, list[str], bool]:
    """Message number i -> role, texts around its images, learned?: "<image>What?" -> ("user", ["", "What?"], False)"""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"message {i}: role {role!r} is unknown; use one of {', '.join(ROLES)}")
    content, learned = message.get("content"), role == "assistant" and message.get("weight") != 0
    if isinstance(content, str):
        return role, content.split(IMAGE), learned  # n images are between n + 1 texts, which may be empty
    if not isinstance(content, list):
        raise ValueError(f"message {i}: content is {type(content).__name__}; it must be a string or a list of parts")
    texts = [""]
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts[-1] += part["text"]  # "<image>" in it is plain text: here the list says where images are
        elif kind == "image":
            texts.append("")  # an image ends one text and starts the next
        else:
            raise ValueError(f'message {i}: bad part {str(part)[:50]}; use {{"type": "text", "text": ...}} or "image"')
    return role, texts, learned


def _split_thoughts(text: str) -> tuple[str, str]:
    """"<think>\\nA tail.\\n</think>\\n\\nA cat." -> ("A tail.", "A cat."), as Qwen3's template does it"""
    parts = text.split(THINK[1])
    return (parts[0].split(THINK[0])[-1].strip("\n"), parts[-1].lstrip("\n")) if parts[1:] else ("", text)


class Tokenizer:
    """ranks: {bytes: id} of the regular tokens. special: {name: id}. default_system, thinking: see `render`."""

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], *, default_system: str | None = None,
                 thinking: bool = False):
        needed = {bytes([b]) for b in range(256)} | set(SPECIAL_TOKENS[:3])
        if lacking := needed - ranks.keys() - special.keys():
            raise ValueError(f"the vocabulary lacks {min(lacking, key=str)!r}; it needs all bytes and ChatML's tokens")
        if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
            raise ValueError("two tokens of the vocabulary share one id; the tokenizer's files do not belong together")
        # tiktoken gets the special tokens only for decoding: see `encode`.
        self.ranks, self.special, self.default_system = ranks, special, default_system
        self.encoding = tiktoken.Encoding("ghostvis", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self.encoding.n_vocab  # Qwen's embedding has more rows (151936): never sample those ids
        self.endoftext, self.im_start, self.im_end = (special[name] for name in SPECIAL_TOKENS[:3])
        self.thinking, (self.think, self.think_end) = thinking and THINK[1] in special, map(special.get, THINK)
        self.special_ids = {i for name, i in special.items() if name not in THINK}  # decode leaves them out
        self.stop_ids = (self.im_end, self.endoftext)  # a chat model stops with the first, a base model with the second
        # Trap: LLaVA-OneVision's image token is named <image>, and it has no start and end tokens around an image.
        self.image_pad = special.get("<|image_pad|>", special.get("<image>"))
        self.vision_start, self.vision_end = special.get("<|vision_start|>"), special.get("<|vision_end|>")
        self.image_marks = [[i] if i is not None else [] for i in (self.vision_start, self.vision_end)]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read what `save` or `save_hub` wrote, or a Qwen2 or Qwen2.5 tokenizer as it is on the hub."""
        folder = Path(folder)
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        try:
            if {"tokenizer.tiktoken", "special_tokens.json"} <= names:
                lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
                ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
                settings = _read_json(folder / "special_tokens.json")
                special, default_system = settings["special_tokens"], settings["default_system"]
                thinking = settings.get("thinking", False)  # older checkpoints have no such entry
            elif "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
                ranks, special, default_system, thinking = _read_hub(folder)
            else:
                wanted = "tokenizer.tiktoken + special_tokens.json, tokenizer.json, or vocab.json + merges.txt"
                raise ValueError(f"no tokenizer here; looked for {wanted}")
            return cls(ranks, special, default_system=default_system, thinking=thinking)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None  # every message names the folder
        except KeyError as error:
            raise ValueError(f"{folder}: the tokenizer's files lack the entry {error}; download them again") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a new tokenizer with at most vocab_size ids, including the special tokens."""
        ranks = train_bpe(texts, vocab_size - len(SPECIAL_TOKENS))
        return cls(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    def save(self, folder: str | Path) -> None:
        """tokenizer.tiktoken: one line "base64 rank" per token, as tiktoken does. special_tokens.json: all the rest."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items()]
        (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
        settings = {"special_tokens": self.special, "default_system": self.default_system, "thinking": self.thinking}
        (folder / "special_tokens.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def save_hub(self, folder: str | Path, max_length: int = 32768) -> None:
        """
        A Qwen tokenizer's files as on the hub. max_length: tokens the model can read. Two differences to this class
        remain: other programs read "<|im_end|>" in a user's text as the special token, and they merge the newline after
        "assistant" with one at the start of an answer (`render`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spell = {byte: char for char, byte in _byte_alphabet().items()}
        # Decoded as latin-1, every byte is the character with the same number; then `spell` replaces it.
        vocab = {t.decode("latin-1").translate(spell): self.ranks[t] for t in sorted(self.ranks, key=self.ranks.get)}
        merges = _find_merges(vocab)
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        added = {i: {"content": name, **flags, "special": name not in THINK} for name, i in self.special.items()}
        # One image token per image: the hub's image processors repeat it. json.dumps quotes text as Jinja does.
        shown = self.image_marks[0] + [self.image_pad] + self.image_marks[1]
        names = {"image": IMAGE if self.image_pad is None else self.decode(shown, skip_special=False)}
        names |= {} if self.default_system is None else {"default_system": self.default_system}
        names |= {"thinking": True} if self.thinking else {}
        quoted = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n" for name, text in names.items()]
        template = "".join(quoted) + (Path(__file__).parent / "assets" / "chat_template.jinja").read_text("utf-8")
        config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None,
                  "pad_token": "<|endoftext|>", "model_max_length": max_length, "clean_up_tokenization_spaces": False,
                  "added_tokens_decoder": added, "default_system": self.default_system, "thinking": self.thinking,
                  "chat_template": template}
        # The same again in one file, which transformers needs for a LLaVA model. Trap: if special tokens were not in
        # this vocabulary too, transformers would give them new ids without gaps.
        letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        cut = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
        whole = {"version": "1.0", "added_tokens": [{"id": i, **token} for i, token in added.items()],
                 "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, letters]},
                 "model": {"type": "BPE", "vocab": vocab | self.special, "merges": merges},
                 "post_processor": letters, "decoder": letters}
        for name, content in {"vocab": vocab, "tokenizer_config": config, "tokenizer": whole}.items():
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")  # image processors read it here

    def encode(self, text: str) -> list[int]:
        """Text -> ids of regular tokens. For pretraining, append endoftext to each document."""
        # encode_ordinary: no special tokens. Else a user could type "<|im_end|>" and go on in the assistant's name.
        if len(text) > MAX_BLANKS and re.search(r"\s{%d}" % MAX_BLANKS, text):
            raise ValueError(f"the text {text.strip()[:20]!r}... has {MAX_BLANKS:,} white-space characters in a row")
        return self.encoding.encode_ordinary(clean(text))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Ids -> text. Ids may end in the middle of a character: bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """For streaming: one token may be a third of a Chinese character, so collect bytes before you show text."""
        drop = self.special_ids if skip_special else ()
        try:
            return self.encoding.decode_bytes([i for i in ids if i not in drop])
        except (KeyError, OverflowError):
            raise ValueError(f"cannot decode an id that is no token; ids run from 0 to {self.vocab_size - 1}") from None

    def answer(self, ids: Iterable[int]) -> str:
        """What an answer says, without its thoughts: ids of "<think>\\nA tail.\\n</think>\\n\\nA cat." -> "A cat." """
        ids = list(ids)
        while self.think_end in ids:
            ids = ids[ids.index(self.think_end) + 1 :]
        return "" if self.think in ids else self.decode(ids).strip()  # "": it was cut off while it thought

    def think_block(self, thoughts: str = "") -> list[int]:
        return [self.think, *self.encode(f"\n{thoughts}\n"), self.think_end, *self.encode("\n\n")]

    def render(self, messages: list[dict], image_tokens: int | list[int] = 64, add_generation_prompt=False,
               think=False) -> Rendered:
        """
        [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}] -> Rendered
        content: a string with "<image>" at the place of each image, or a list of {"type": "text", "text": "..."} and
        {"type": "image"}. image_tokens: the number of image tokens per image, or a list with one number for each image.
        add_generation_prompt: end with the header of an assistant message, so that the model writes the answer next.
        If the tokenizer has a default_system text, it is added to a conversation that has no system message.
        A Qwen3 (self.thinking) was trained with a block of thoughts before the last answer, empty where it shall not
        think, and none before earlier answers. think: leave it to the model to open that block.
        """
        turns = [_read_message(i, message) for i, message in enumerate(messages)]
        if not turns:
            raise ValueError("the conversation has no messages")
        if add_generation_prompt and turns[-1][0] == "assistant":
            raise ValueError(f"message {len(turns) - 1} is already the assistant's answer; drop it to ask for one")
        if self.default_system is not None and turns[0][0] != "system":
            turns.insert(0, ("system", [self.default_system], False))
        images = sum(len(texts) - 1 for _, texts, _ in turns)
        counts = [image_tokens] * images if isinstance(image_tokens, int) else list(image_tokens)
        if len(counts) != images or any(n < 1 for n in counts):
            raise ValueError(f"{images} images need one positive number each, but image_tokens is {image_tokens}")
        if images and self.image_pad is None:
            raise ValueError("this tokenizer has no <|image_pad|> token, so it cannot show images; use Qwen2.5's")

        ids, mask, slots = [], [], []

        def put(new: list[int], supervised: bool = False) -> None:
            ids.extend(new)
            mask.extend([int(supervised)] * len(new))  # ids and mask grow together, so their lengths stay equal
        # Trap: training must see the same tokens as generation. "user\n" and a user's content are encoded as one text,
        # as Qwen does: if the content starts with a newline, the two become one token. But the model starts its answer
        # after the header's token "\n", so an answer is encoded separately from it.
        header = self.encode("assistant\n")
        last_user = max((i for i, turn in enumerate(turns) if turn[0] == "user"), default=len(turns))
        for i, (role, (first, *rest), learned) in enumerate(turns):
            answer = role == "assistant"
            put([self.im_start] + header * answer)  # a list times False is []
            if answer and self.thinking:
                thoughts, first = _split_thoughts(first)
                if i > last_user and (thoughts or i == len(turns) - 1):
                    first = first.lstrip("\n")
                    # The empty block is a part of the prompt. Thoughts are what the model is to say itself.
                    put(self.think_block(thoughts), bool(thoughts) and learned)
            put(self.encode(first if answer else role + "\n" + first), learned)
            for text in rest:  # each of these follows an image
                put(self.image_marks[0])  # image tokens are never supervised, not even inside an answer
                slots.append(len(ids))
                put([self.image_pad] * counts[len(slots) - 1] + self.image_marks[1])
                put(self.encode(text), learned)
            put([self.im_end], learned)  # supervised, or the model would not learn when to stop
            put(self.encode("\n"))  # not supervised: generation stops before it
        if add_generation_prompt:
            put([self.im_start] + header + (self.think_block() if self.thinking and not think else []))
        return Rendered(ids, mask, slots)
