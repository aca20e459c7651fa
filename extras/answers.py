"""
An answer as OpenAI's API tells it: as chat or as text, whole or piece by piece, with the probabilities of its tokens.
Called by server.py. A reader of the lessons need know none of it.
"""
import torch

from plumbing.engine import Request
from model import VLM
from tokenizer import Tokenizer


def score_prompt(vlm: VLM, ids: list[int], rivals: int, vocab_used: int) -> list[tuple]:
    "Text as ids -> Request.scores of its tokens, the first of which follows nothing: None. One pass without a cache."
    device, scores = vlm.gpt.embed.weight.device, [(None, [])]
    ids = torch.tensor(ids, device=device)                                                           # [T]
    with torch.no_grad():
        h = vlm.gpt.hidden(vlm.gpt.embed(ids[None]))[0, :-1]                                         # [T - 1, H]
        for at in range(0, len(h), 256):  # all logits at once would be gigabytes: 8,192 x 152,000 numbers
            logs = vlm.gpt.logits(h[at:at + 256])[:, :vocab_used].float().log_softmax(-1)            # [256, V]
            own = logs.gather(1, ids[1:][at:at + 256, None])[:, 0]
            values, others = logs.topk(max(1, rivals))
            scores += [(a, list(zip(b, c))[:rivals]) for a, b, c in zip(own.tolist(), others.tolist(), values.tolist())]
    return scores


def spell(tokenizer: Tokenizer, token: int) -> dict:
    "-> a token's text and bytes; a part of a character has no text, and is spelt as OpenAI does."
    raw = tokenizer.decode_bytes([token], skip_special=False)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {"token": text, "bytes": list(raw)}


def chat_logprobs(tokenizer: Tokenizer, scored: list[tuple], start: int = 0) -> dict:
    "[(id, Request.scores of it)] -> as OpenAI's chat completions tell them."
    return {"refusal": None, "content": [
        {**spell(tokenizer, token), "logprob": own, "top_logprobs": [
            {**spell(tokenizer, other), "logprob": log} for other, log in rivals]} for token, (own, rivals) in scored]}


def text_logprobs(tokenizer: Tokenizer, scored: list[tuple], start: int) -> dict:
    "The same as OpenAI's completions tell them. start: letters of text before the first token."
    tokens, starts = [spell(tokenizer, token)["token"] for token, _ in scored], [start]
    for token in tokens:
        starts.append(starts[-1] + len(token))
    # The token itself is always among them; the first one of a text has no probability.
    return {"tokens": tokens, "token_logprobs": [own for _, (own, _) in scored], "text_offset": starts[:-1],
            "top_logprobs": [None if own is None else {token: own} | {
                spell(tokenizer, other)["token"]: log for other, log in rivals}
                for token, (_, (own, rivals)) in zip(tokens, scored)]}


class Answer:
    "One choice: its text so far, and [(id, its Request.scores)]; and what is new of both since the last piece."

    def __init__(self, tokenizer: Tokenizer, request: Request, index: int, chat: bool):
        self.tokenizer, self.request, self.index, self.chat = tokenizer, request, index, chat
        self.text, self.scored, self.finish = "", [], None
        self.tokens, self.sent = 0, (0, 0)  # tokens of the request that are here; (letters, scores) that were sent

    def echo(self, scores: list[tuple]) -> None:
        "The prompt comes before the answer; scores: of its tokens, or empty."
        ids = self.request.prompt.ids
        self.text, self.scored = self.tokenizer.decode(ids, skip_special=False), list(zip(ids, scores))

    def add(self, text: str, tokens: int, finish: str) -> None:
        "tokens: how many of the request's are in the text by now."
        new, scores = self.request.answer[self.tokens:tokens], self.request.scores[self.tokens:tokens]
        # The token that ends an answer is one of a text's tokens, and none of a chat's.
        self.scored += [(token, score) for token, score in zip(new, scores)
                        if not (self.chat and token in self.request.stop)]
        self.text, self.tokens, self.finish = self.text + text, tokens, finish or None

    def first(self) -> dict:
        "The first piece of a stream."
        return {**self.tell(), "delta": {"role": "assistant", "content": ""}} if self.chat else self.tell()

    def tell(self, whole: bool = False) -> dict:
        "-> all of the answer, or what is new since the last piece."
        letters, scores = (0, 0) if whole else self.sent
        text, scored, self.sent = self.text[letters:], self.scored[scores:], (len(self.text), len(self.scored))
        if not self.chat:
            said = {"text": text}
        elif whole:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"delta": {"content": text} if text else {}}
        logprobs = None
        if self.request.rivals >= 0:
            tell = chat_logprobs if self.chat else text_logprobs
            logprobs = tell(self.tokenizer, scored, letters)
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": self.finish}
