"""Virtual boards: what each one is, and the command line of its agent. Pure.

A virtual board is an ordinary process running the real agent. It is made slower by stretching each of its steps, and
smaller by a limit that it counts; its profile then says `emulated`. See testbed.cgroups for limits by the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from testbed import links
from testbed.links import Address, LinkSpec, checked_link
from wire.errors import UsageError
from wire.ids import checked_name
from wire.units import bytes_text

MAX_BOARDS: Final = 64
"""More agents than this on one machine measure its scheduler."""

MIN_MEMORY_BYTES: Final = 64 << 20
"""An agent alone takes about 50 MB."""

_GIB: Final = 1 << 30


LEAST_SHARE: Final = 0.05
"""The agent takes no smaller one."""

THROTTLE_FILE: Final = "throttle"
"""In a board's folder: which share of its speed it has now (`edgelam testbed slow`)."""

SHARED: Final = ".measured"
"""Next to the boards' folders: what the machine was measured to be, which each of them would measure again. No board
is named so."""

DATA: Final = "data"
DATA_OWN: Final = "data-own"
"""Of a board with a shaped link: where others reach its own broker, over the link, and where that listens."""


class BoardSpec(Struct, frozen=True, kw_only=True):
    """One virtual board. `speed` is a share of one core of this machine; `link` None is no shaped link at all."""

    name: str
    speed: float = 1.0
    memory_bytes: int = 2 * _GIB
    link: LinkSpec | None = None
    data_broker: bool = True
    """Whether it may have a broker of its own; False is a board without mosquitto."""
    data: tuple[tuple[str, str], ...] = ()
    """(name, file or folder) of what it may be trained on."""

    def text(self) -> str:
        """For people: 'pi4: 0.25 of a core, 1.0 GB, 20 Mbit/s, 5.0 ms one way'."""
        link = self.link.text() if self.link else "no shaped link"
        return f"{self.name}: {self.speed:g} of a core, {bytes_text(self.memory_bytes)}, {link}"


# Unequal in every way that a planner must see. Memory is what such a board leaves to a model, scaled so that all of
# them together still fit into an ordinary computer.
_SHELF: Final[tuple[BoardSpec, ...]] = (
    BoardSpec(name="orin", speed=1.0, memory_bytes=4 * _GIB, link=links.ETHERNET),
    BoardSpec(name="nuc", speed=0.8, memory_bytes=4 * _GIB, link=links.ETHERNET),
    BoardSpec(name="pi5", speed=0.5, memory_bytes=2 * _GIB, link=links.ETHERNET),
    BoardSpec(name="pi4", speed=0.25, memory_bytes=_GIB, link=links.WIFI),
    BoardSpec(name="nano", speed=0.6, memory_bytes=2 * _GIB, link=links.ETHERNET),
    BoardSpec(name="n100", speed=0.7, memory_bytes=4 * _GIB, link=links.ETHERNET),
    BoardSpec(name="pi5-wifi", speed=0.5, memory_bytes=2 * _GIB, link=links.WIFI),
    BoardSpec(name="pi3", speed=0.15, memory_bytes=_GIB // 2, link=links.WIFI),
)


def shelf(count: int) -> tuple[BoardSpec, ...]:
    """Unequal boards, 1 to 8 of them."""
    _checked_count(count, len(_SHELF), "shelf")
    return _SHELF[:count]


def equal(count: int) -> tuple[BoardSpec, ...]:
    """Boards `board1` .. that are all alike, each as fast as one core, without shaped links."""
    _checked_count(count, MAX_BOARDS, "equal")
    return tuple(BoardSpec(name=f"board{number}") for number in range(1, count + 1))


PRESETS: Final[Mapping[str, Callable[[int], tuple[BoardSpec, ...]]]] = {"shelf": shelf, "equal": equal}


def preset(name: str, count: int, link: str | None = None) -> tuple[BoardSpec, ...]:
    """Give `count` boards of a preset, all with the link preset `link` if one is named. Raises UsageError."""
    if name not in PRESETS:
        raise UsageError(f"no board preset {name!r}", try_=f"one of: {', '.join(PRESETS)}")
    boards = PRESETS[name](count)
    return boards if link is None else with_link(boards, links.preset(link))


def with_link(boards: Sequence[BoardSpec], link: LinkSpec | None) -> tuple[BoardSpec, ...]:
    """Give the same boards with another link."""
    return tuple(msgspec.structs.replace(board, link=link) for board in boards)


def with_data(boards: Sequence[BoardSpec], name: str, folder: Path) -> tuple[BoardSpec, ...]:
    """Give each board as data of that name what is called like it in a folder: pi4.jsonl, or a folder pi4. Those for
    whom there is nothing stay as they are; UsageError if that is all of them."""
    checked_name(name, "data set")
    try:
        there = {path.stem if path.is_file() else path.name: path.resolve() for path in sorted(folder.iterdir())}
    except OSError as error:
        raise UsageError(
            f"data {folder}: {(error.strerror or str(error)).lower()}", try_="--data NAME=FOLDER"
        ) from None
    if not any(board.name in there for board in boards):
        names = ", ".join(board.name for board in boards)
        raise UsageError(
            f"data {folder}: nothing in it is called like a board ({names})", try_=f"{boards[0].name}.jsonl"
        )
    return tuple(
        msgspec.structs.replace(board, data=(*board.data, (name, str(there[board.name]))))
        if board.name in there
        else board
        for board in boards
    )


def checked_boards(boards: Sequence[BoardSpec]) -> tuple[BoardSpec, ...]:
    """Give the boards back if each may be started; raise UsageError otherwise."""
    _checked_count(len(boards), MAX_BOARDS, "testbed")
    for board in boards:
        checked_name(board.name, "board")
        if not 0.01 <= board.speed <= 1.0:
            raise UsageError(f"board {board.name}: speed {board.speed:g}", try_="a share of one core, 0.01 to 1")
        if board.memory_bytes < MIN_MEMORY_BYTES:
            raise UsageError(
                f"board {board.name}: memory of {bytes_text(board.memory_bytes)}",
                try_=f"at least {bytes_text(MIN_MEMORY_BYTES)}",
            )
        if board.link is not None:
            checked_link(board.link)
    names = [board.name for board in boards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two boards are named {twice[0]!r}", try_="each board needs a name of its own")
    return tuple(boards)


def overcommitted(total_cores: float, machine_cores: float) -> str:
    """A line for people if stretched boards may together use more cores than there are, else ''.

    A stretched board computes for a share of each step and sleeps for the rest, so speed x threads is the most it
    uses. While one answer is generated the boards compute one after the other, and never get there.
    """
    if total_cores <= machine_cores:
        return ""
    return (
        f"all boards at work at once would use {total_cores:g} cores, this machine has {machine_cores:g}: "
        "one answer at a time is not slowed by that, since boards take turns; several at once are"
    )


def _checked_count(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise UsageError(f"{what}: {count} boards", try_=f"1 to {most}")


class AgentOptions(Struct, frozen=True, kw_only=True):
    """What all agents of one testbed share. `broker` '' lets each agent find its coordinator over mDNS."""

    command: tuple[str, ...]
    site: str
    broker: str = ""
    interfaces: tuple[str, ...] = ()
    threads: int = 1
    emulate: bool = True
    """Whether speed and memory are emulated by the agent; False where cgroups limit it."""


def agent_arguments(board: BoardSpec, options: AgentOptions, folder: Path, via: Mapping[str, Address]) -> list[str]:
    """The command line of a board's agent. `via`: what to dial instead of the coordinator's own 'mqtt' and 'http', and
    where others reach the board's own broker, DATA, which listens on DATA_OWN."""
    arguments = [*options.command, "run", "--site", options.site, "--name", board.name]
    arguments += ["--state-dir", str(folder / "state"), "--cache-dir", str(folder / "cache")]
    if options.broker:
        arguments += ["--broker", options.broker]
    if options.interfaces:
        arguments += ["--interfaces", ",".join(options.interfaces)]
    dialled = {name: address for name, address in via.items() if name not in (DATA, DATA_OWN)}
    if dialled:
        arguments += ["--via", ",".join(f"{name}={address.text()}" for name, address in dialled.items())]
    if board.data:
        arguments += ["--data", ",".join(f"{name}={path}" for name, path in board.data)]
    if not board.data_broker:
        arguments += ["--data-broker", "off"]
    elif DATA in via:
        arguments += ["--data-address", via[DATA].text(), "--data-port", str(via[DATA_OWN].port)]
    if options.emulate and board.speed < 1.0:
        arguments += ["--emulate-speed", f"{board.speed:g}"]
    if options.emulate:
        arguments += ["--emulate-throttle", str(folder / THROTTLE_FILE)]
        arguments += ["--emulate-shared", str(folder.parent / SHARED)]
        arguments += ["--emulate-memory", str(board.memory_bytes)]
    return [*arguments, "--threads", str(options.threads)]
