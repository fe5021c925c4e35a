"""Answers in OpenAI's shapes: whole, or piece by piece as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import secrets
from typing import Any, Literal, NamedTuple

import msgspec

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"


class Opened(NamedTuple):
    """The stages work on it."""


class Piece(NamedTuple):
    """Text of the answer."""

    text: str


class Remark(NamedTuple):
    """What happens meanwhile, for people."""

    text: str


class Finished(NamedTuple):
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


Item = Opened | Piece | Remark | Finished


def event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients skip: it keeps a quiet connection alive."""
    return f": {' '.join(text.split())}\n\n".encode("utf-8", "replace")


class Shape:
    """One answer. `kind` is a chat's or a plain completion's."""

    def __init__(self, kind: Literal["chat", "text"], model: str, now_unix: float, with_usage: bool) -> None:
        self._chat = kind == "chat"
        self._with_usage = with_usage
        self._head: Json = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "created": int(now_unix),
            "model": model,
        }

    def whole(self, text: str, end: Finished) -> Json:
        kind = "chat.completion" if self._chat else "text_completion"
        said: Json = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {**self._head, "object": kind, "choices": [self._choice(said, text, end.reason)], "usage": usage(end)}

    def streamed(self, item: Item) -> bytes:
        """The events for an item; b'' if there are none."""
        if isinstance(item, Remark):
            return comment(item.text)
        if isinstance(item, Opened):
            return self._chunk({"role": "assistant", "content": ""}, "", None) if self._chat else comment("begun")
        if isinstance(item, Piece):
            return self._chunk({"content": item.text}, item.text, None)
        last = self._chunk({}, "", item.reason)
        if self._with_usage:
            last += event({**self._head, "object": self._chunk_kind, "choices": [], "usage": usage(item)})
        return last + DONE

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, delta: Json, text: str, reason: str | None) -> bytes:
        body = {**self._head, "object": self._chunk_kind, "choices": [self._choice({"delta": delta}, text, reason)]}
        return event({**body, "usage": None} if self._with_usage else body)

    def _choice(self, said: Json, text: str, reason: str | None) -> Json:
        return {"index": 0, **(said if self._chat else {"text": text}), "logprobs": None, "finish_reason": reason}


def usage(end: Finished) -> Json:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
