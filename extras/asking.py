"""
A conversation and its pictures -> a Request for the engine, and an answer's tokens -> text, piece by piece. Called by
sample.py for one question, a chat or a folder, and by server.py. The prompt is made by the tokenizer's `render`.
"""
import codecs
import secrets

from PIL import Image

from plumbing.engine import Engine, Request
from plumbing.pictures import load_image
from plumbing.world import Scene, World
from model import FROM_SCRATCH, VLM
from tokenizer import Rendered, Tokenizer
from vision import to_pixels

CONTEXT = 8192  # tokens of a conversation with its answer, at most

SAMPLING = "temperature", "top_k", "top_p", "repetition_penalty"


def options(vlm: VLM, flags) -> dict:
    "How to choose tokens: as Request's fields."
    # What is given; else the publisher's; else generate's own defaults, greedy as in the evaluation: the answers shown
    # are the answers measured.
    given = {name: getattr(flags, name) for name in SAMPLING if getattr(flags, name) is not None}
    # No answer is longer than what the model can read: a huge --max_new_tokens must not ask for as much memory.
    most = min(flags.max_new_tokens, vlm.config.decoder.max_position_embeddings)
    return {"max_new_tokens": most, **vlm.config.generation, **given}


def open_pixels(vlm: VLM, path, alone: bool = True):
    "-> uint8 [3, S, S], or Tiles. alone: the conversation has no other picture."
    if vlm.vit is None:
        raise ValueError(f"{vlm.config.preset} cannot see: it is a language model, and its bridge is not trained; run "
                         f"`python train_align.py --model={vlm.config.preset}` and train_sft.py, or ask llava-ov-0.5b")
    # Size, filter and tiles belong to the checkpoint: its ViT was trained on pixels made in this way.
    return to_pixels(load_image(path), vlm.config.vision, alone)


def make_message(text: str, images: int = 0, role: str = "user") -> dict:
    "-> as `render` takes it; images: how many are shown with the text."
    # Content may be a string, in which "<image>" marks a picture's place, or a list of parts. We use parts: what people
    # and models write then stays text, even if it contains "<image>", and slots always match the pictures.
    # Pictures, a newline, the question: the order that the training data has. Without a picture, no newline.
    return {"role": role,
            "content": [{"type": "image"}] * images + [{"type": "text", "text": "\n" * bool(images) + text}]}


def render(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, think: bool = False):
    "-> the prompt: its ids, and the slots where each picture's image tokens begin. It ends where the answer begins."
    return tokenizer.render(messages, list(map(vlm.config.bridge.tokens_of, pixels)), add_generation_prompt=True,
                            think=think)


def make_request(vlm: VLM, tokenizer: Tokenizer, messages: list, pixels: list, flags, width: int = 0) -> Request:
    "width: of the engine's cache, which a long conversation leaves less room for the answer; 0: as much as needed."
    prompt, given = render(vlm, tokenizer, messages, pixels, flags.think), options(vlm, flags)
    if width:
        given["max_new_tokens"] = max(1, min(given["max_new_tokens"], width - len(prompt.ids)))
    return Request(prompt, pixels, stop=set(tokenizer.stop_ids), seed=flags.seed, **given)


def make_completion(vlm: VLM, tokenizer: Tokenizer, text: str, flags, width: int = 0) -> Request:
    "A Request whose answer continues the text as it stands, without the marks of a chat. width: as in make_request."
    # A little bolder than the most likely token, which soon repeats itself.
    ids, given = tokenizer.encode(text), {"temperature": 0.7} | options(vlm, flags)
    if width:
        given["max_new_tokens"] = max(1, min(given["max_new_tokens"], width - len(ids)))
    return Request(Rendered(ids, [], []), [], stop=set(tokenizer.stop_ids), seed=flags.seed, **given)


def only_pictures(vlm: VLM) -> bool:
    "Whether all that it has learned to answer are questions about pictures. Any other would get a meaningless answer."
    run = vlm.config.run  # older checkpoints do not say; the world's questions are all about pictures
    return vlm.config.preset in FROM_SCRATCH and not run.get("texts", run.get("data") != "world")


def open_engine(vlm: VLM, tokenizer: Tokenizer, rows: int) -> Engine:
    "For conversations, which grow: each row has room for as much as the model can read, or for CONTEXT tokens."
    width = min(CONTEXT, vlm.config.decoder.max_position_embeddings)
    return Engine(vlm, rows=rows, width=width, vocab_used=tokenizer.vocab_size)


class Text:
    """
    The tokens of an answer -> text that can be shown, piece by piece. Two things wait until more is known: a token that
    is a part of a character (an emoji has 4 bytes), and words that may be the beginning of a stop text. thoughts: what
    a Qwen3 thinks is shown, too.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str] = (), thoughts: bool = False):
        self.thoughts, self.hidden, self.trim = thoughts, False, False  # hidden: it thinks; trim: it has just thought
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.held, self.ended = stops, "", False  # ended: a stop text was found
        self.tokens = 0  # how many have been added

    def aloud(self, ids: list[int]) -> list[int]:
        "Those ids that are no thoughts."
        said = []
        for i in ids:
            if i in (self.tokenizer.think, self.tokenizer.think_end):
                self.hidden = i == self.tokenizer.think
                self.trim = not self.hidden
            elif not self.hidden:
                said.append(i)
        return said

    def add(self, ids: list[int], last: bool = False) -> str:
        self.tokens += len(ids)
        # Special tokens are left out.
        new = self.decoder.decode(self.tokenizer.decode_bytes(ids if self.thoughts else self.aloud(ids)), last)
        if self.trim:  # the empty line after the thoughts
            new = new.lstrip("\n")
            self.trim = not new
        text = self.held + new
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.held, self.ended = "", True
            return text[:min(found)]
        # The longest end of the text with which a stop text begins.
        keep = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        shown = len(text) - keep * (not last)
        self.held = text[shown:]
        return text[:shown]


def stream(engine: Engine, tokenizer: Tokenizer, request: Request, thoughts: bool = False) -> str:
    "Print the answer token by token, and return it."
    text, out = Text(tokenizer, thoughts=thoughts), ""
    while not request.finish:
        engine.step()
        out += (new := text.add(request.answer[text.tokens:], last=bool(request.finish)))
        print(new, end="", flush=True)  # without flush, a pipe shows nothing before the end
    print()
    return out


def new_scene() -> Scene:
    "Of the built-in world, which is all that the small models know."
    return World("captions", "scenes", secrets.randbits(32))[0]["images"][0]


def draw_scene() -> Image.Image:
    return new_scene().draw(320)
