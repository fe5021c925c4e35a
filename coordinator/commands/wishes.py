"""Options of `plan` and `run` that say what a plan is for and what it must keep, and their values in a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from wire.errors import UsageError
from wire.messages import EngineName

Load = Annotated[
    float | None,
    typer.Option(
        "--tokens-per-second",
        help="With --objective throughput: a load that must be carried, by the plan that answers soonest.",
    ),
]
Weigh = Annotated[
    list[str] | None,
    typer.Option(
        "--weigh",
        metavar="OBJECTIVE=WEIGHT",
        help="With --objective weighted: what counts how much; may be given again.",
    ),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="MODULE=BOARD",
        help="A module (embedding, block.0, .., head) that must be on this board; may be given again.",
    ),
]
Exclude = Annotated[list[str] | None, typer.Option(help="A board to leave out; may be given again.")]
Reserve = Annotated[
    float,
    typer.Option("--reserve", help="Per cent of each board's usable memory that stays free; 32 MB at least."),
]
Engine = Annotated[
    Literal["auto", EngineName],
    typer.Option(help="Plan with the figures of this engine, and run on it; auto: each board's fastest."),
]


def pins_of(given: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """('embedding=pi4', ..) as (module, board) pairs; raise UsageError for what is none."""
    return tuple(_pair(text, "--pin", "MODULE=BOARD") for text in given or ())


def weights_of(given: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """('latency=1', ..) as (objective, weight) pairs; raise UsageError for what is none."""
    pairs = [_pair(text, "--weigh", "OBJECTIVE=WEIGHT") for text in given or ()]
    try:
        return tuple((name, float(weight)) for name, weight in pairs)
    except ValueError as error:
        raise UsageError(f"--weigh: {error}", try_="a number, as in --weigh latency=1") from None


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise UsageError(f"{option} {text!r} is not {form}", try_=f"{option} {form}")
    return left, right
