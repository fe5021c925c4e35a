"""Commands to a running shaper or testbed: JSON lines in, one JSON line back for each.

    {"op": "link", "link": "pi5", "rate_mbit": 20, "delay_ms": 5}     make a link
    {"op": "forward", "link": "pi5", "name": "mqtt", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1883"}
    {"op": "set", "link": "pi5", "rate_mbit": 5}                      replace its spec: what is not given is none
    {"op": "stall" | "cut" | "resume" | "reset", "link": "pi5"}
    {"op": "stats"}

Answers are {"ok": true, ...} or {"ok": false, "error": "...", "try": "..."}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from msgspec import Struct

from testbed.links import LinkSpec, parse_address
from testbed.shaper import LinkStats, Shaper
from wire.errors import EdgelamError, UsageError

MAX_LINE_BYTES: Final = 1_048_576
"""A testbed of hundreds of boards in one line; a longer line is not ours."""


class LinkCommand(Struct, frozen=True, kw_only=True):
    """Base of the commands that carry a spec. Units are those that links are sold in."""

    link: str
    rate_mbit: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0

    def spec(self) -> LinkSpec:
        rate = None if self.rate_mbit is None else self.rate_mbit * 1e6 / 8
        return LinkSpec(rate_bytes_per_s=rate, delay_s=self.delay_ms / 1e3, jitter_s=self.jitter_ms / 1e3)


class MakeLink(LinkCommand, frozen=True, kw_only=True, tag_field="op", tag="link"):
    pass


class SetLink(LinkCommand, frozen=True, kw_only=True, tag_field="op", tag="set"):
    pass


class MakeForward(Struct, frozen=True, kw_only=True, tag_field="op", tag="forward"):
    link: str
    name: str
    listen: str
    upstream: str


class Stall(Struct, frozen=True, kw_only=True, tag_field="op", tag="stall"):
    link: str


class Cut(Struct, frozen=True, kw_only=True, tag_field="op", tag="cut"):
    link: str


class Resume(Struct, frozen=True, kw_only=True, tag_field="op", tag="resume"):
    link: str


class Reset(Struct, frozen=True, kw_only=True, tag_field="op", tag="reset"):
    link: str


class Stats(Struct, frozen=True, kw_only=True, tag_field="op", tag="stats"):
    pass


LinkControl = MakeLink | SetLink | MakeForward | Stall | Cut | Resume | Reset | Stats


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`ok` is always there; `address` answers a forward, `links` answers stats, `result` whatever else there is."""

    ok: bool
    error: str = ""
    try_: str = msgspec.field(default="", name="try")
    exit_code: int = 0
    address: str = ""
    links: tuple[LinkStats, ...] = ()
    result: dict[str, Any] = {}


def command_of(spec: LinkSpec, link: str) -> SetLink:
    """The command that gives `link` this spec."""
    rate = spec.rate_bytes_per_s
    return SetLink(
        link=link,
        rate_mbit=None if rate is None else rate * 8 / 1e6,
        delay_ms=spec.delay_s * 1e3,
        jitter_ms=spec.jitter_s * 1e3,
    )


async def obey(shaper: Shaper, command: LinkControl) -> Answer:
    """Carry out one command; raise EdgelamError."""
    if isinstance(command, Stats):
        return Answer(ok=True, links=shaper.stats())
    if isinstance(command, MakeLink):
        shaper.add_link(command.link, command.spec())
    elif isinstance(command, SetLink):
        shaper.link(command.link).change(command.spec())
    elif isinstance(command, MakeForward):
        listen = parse_address(command.listen, "listen address")
        upstream = parse_address(command.upstream, "upstream")
        return Answer(ok=True, address=(await shaper.add_forward(command.link, command.name, listen, upstream)).text())
    elif isinstance(command, Stall):
        shaper.link(command.link).stall()
    elif isinstance(command, Cut):
        shaper.link(command.link).cut()
    elif isinstance(command, Resume):
        shaper.link(command.link).resume()
    else:
        shaper.link(command.link).reset()
    return Answer(ok=True)


async def serve_lines(
    descriptor: int, kinds: Any, act: Callable[[Any], Awaitable[Answer]], answer: Callable[[bytes], None]
) -> None:
    """Read JSON lines from a descriptor until its end; do and answer each. A bad line is answered, not fatal.

    `kinds` is the union of command types. `answer` is given one line, with its newline.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    stream = open(descriptor, "rb", buffering=0, closefd=False)  # noqa: SIM115 - the transport closes it
    try:
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    except ValueError:
        raise UsageError("commands can't be read from a plain file", try_="use a pipe: cat FILE | ...") from None
    decoder = msgspec.json.Decoder(kinds)
    try:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                answer(_line(refusal(UsageError(f"a line of more than {MAX_LINE_BYTES} bytes"))))
                continue
            if not line:
                return
            if line.strip():
                answer(_line(await _answered(decoder, line, act)))
    finally:
        transport.close()


async def _answered(decoder: msgspec.json.Decoder[Any], line: bytes, act: Callable[[Any], Awaitable[Answer]]) -> Answer:
    try:
        return await act(decoder.decode(line))
    except msgspec.MsgspecError as error:
        return refusal(UsageError(f"not a command: {error}"))
    except EdgelamError as error:
        return refusal(error)


def refusal(error: EdgelamError) -> Answer:
    return Answer(ok=False, error=error.message, try_=error.try_, exit_code=error.exit_code)


def _line(answer: Answer) -> bytes:
    return msgspec.json.encode(answer) + b"\n"
