"""What OpenAI's clients ask for, as checked structs, and what of it is served.

Fields that nobody here knows are ignored, as OpenAI's own fields for bookkeeping are (user, metadata, store ...). A
field that would change the answer, and that is not done here, is refused by name unless it has its neutral value.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from coordinator.openai.errors import BadParameter
from wire.limits import MAX_PROMPT_TOKENS

MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 256
"""So much of an answer may be held back: a paragraph."""
MAX_NAME_CHARS: Final = 1024

Count = Annotated[int, Meta(ge=1, le=MAX_PROMPT_TOKENS)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not done -> values besides null with which the answer is the one that is given here."""

_NotDone = msgspec.defstruct("_NotDone", [(name, Any, None) for name in NEUTRAL])


class Settings(Struct, frozen=True, kw_only=True):
    """The field `edgelam`: how the model is to be deployed. None: as it is, or by default."""

    precision: str | None = None
    objective: str | None = None
    context_tokens: int | None = None
    replicas: int | None = None
    boards_at_least: int | None = None
    boards_at_most: int | None = None
    topology: str | None = None
    error_budget_percent: float | None = None
    excluded: tuple[str, ...] | None = None
    pins: tuple[tuple[str, str], ...] | None = None
    tokens_per_s: float | None = None
    weights: tuple[tuple[str, float], ...] | None = None
    reserve_percent: float | None = None
    engine: str | None = None
    speculate: str | None = None
    adapter: str | None = None
    """These two are of this request alone: see coordinator.inference.requests."""


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class Body(Struct, frozen=True, kw_only=True):
    """What both kinds have in common; None stands for a field left out."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Not OpenAI's, but many servers take it and so do we; 0 is off."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    edgelam: Settings | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream should end with the counts."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)


class Part(Struct, frozen=True, kw_only=True):
    """A part of a message's content. Images, sound and files are no text."""

    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    tool_calls: Any = None
    function_call: Any = None

    def plain(self) -> dict[str, str]:
        """As chat templates know messages. 'developer' is OpenAI's later name for 'system'."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class ChatBody(Body, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TextBody(Body, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    def text(self) -> str:
        """The one prompt; raise BadParameter if there is not exactly one, or if it is no text."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise BadParameter("token ids are not taken as a prompt", param="prompt", try_="the prompt as text")
        if len(prompts) != 1 or not prompts[0]:
            raise BadParameter(
                f"{len(prompts)} prompts, or an empty one", param="prompt", try_="one request for each prompt"
            )
        return str(prompts[0])


B = TypeVar("B", ChatBody, TextBody)


def decoded(data: bytes, kind: type[B]) -> B:
    """The body, checked; raise BadParameter naming the field that is wrong or not done."""
    try:
        body = msgspec.json.decode(data, type=kind)
        rest = msgspec.json.decode(data, type=_NotDone)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadParameter(f"the request can't be read: {error}", param=_field(str(error))) from None
    for name, neutral in NEUTRAL.items():
        value = getattr(rest, name)
        if value is not None and not any(type(value) is type(fine) and value == fine for fine in neutral):
            raise BadParameter(f"{name} is not supported here", param=name, try_=f"leave {name} out")
    if body.stream_options is not None and not body.stream:
        raise BadParameter("stream_options without stream", param="stream_options", try_="stream: true")
    if isinstance(body, ChatBody):
        for number, message in enumerate(body.messages):
            if message.tool_calls or message.function_call:
                raise BadParameter("calls of tools are not supported here", param=f"messages[{number}].tool_calls")
    return body


def _field(words: str) -> str | None:
    """The field that msgspec complains about: 'stop[1]' of '... - at `$.stop[1]`', 'prompt' of a missing one."""
    found = re.search(r"at `\$\.([^`]+)`", words) or re.search(r"missing required field `([^`]+)`", words)
    return found[1] if found else None
