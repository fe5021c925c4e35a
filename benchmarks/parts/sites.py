"""A site of processes for measurements, and one answer over it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from coordinator.shelf import wire_dtype_of
from models.build.pack import Packed, pack
from models.cache import cache_dir
from models.catalog import resolve
from models.formats.checkpoint import open_checkpoint
from testbed import commands
from testbed.boards import BoardSpec
from testbed.site import CoordinatorProcess, until

MODEL = "smollm2"
LINKS = ("none", "ethernet", "wifi")
SLOWED = 0.2
"""Speed of each board where all of them work at once: four of them then need 0.8 cores of two, and seldom compute at
the same time. Where they do they slow each other, since two processors of a machine may be threads of one core (the
chunks of a prompt took 1.45 times as long on four boards of 0.4 as on one). Boards of their own don't."""
PROMPT = "Write three sentences about the sea and the people who live by it."
CONTEXT_TOKENS = 512


def packed_model(precision: str) -> Packed:
    """The model as the coordinator packs it."""
    checkpoint = open_checkpoint(resolve(MODEL, cache_dir()), cache_dir())
    return pack(checkpoint, precision, wire_dtype_of(precision), cache_dir())


class Site(NamedTuple):
    """What runs: a client of the coordinator, the boards, and the folder of both."""

    there: Client
    boards: commands.Testbed
    folder: Path


@contextlib.contextmanager
def site(precision: str, boards: Sequence[BoardSpec]) -> Iterator[Client]:
    """A coordinator and virtual boards, as processes, all online."""
    with whole_site(precision, boards) as running:
        yield running.there


@contextlib.contextmanager
def whole_site(precision: str, boards: Sequence[BoardSpec], model: str = MODEL) -> Iterator[Site]:
    """The same, with all that one may do to it."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        state = Path(folder)
        name = f"bench-{os.getpid()}"
        coordinator = CoordinatorProcess(state, name, ["--model", model, "--precision", precision])
        address = coordinator.start()
        try:
            with (
                commands.up(
                    commands.UpOptions(site=name, boards=tuple(boards), state_dir=state / "testbed")
                ) as running,
                Client(address["http_url"]) as there,
            ):

                def all_online() -> bool:
                    states = [device["state"] for device in there.get("/v1/devices")["devices"]]
                    return states.count("online") == len(boards)

                until(all_online, 60.0, "all boards online")
                yield Site(there, running, state)
        finally:
            coordinator.stop()


def await_links(there: Client) -> None:
    """Until all boards have measured their links, which they do once, as soon as they are idle: by sending."""

    def known() -> bool:
        return all(row["round_trip_s"] for row in there.get("/v1/devices")["devices"])

    until(known, 120.0, "all links measured")


def ask(
    there: Client, boards: int, precision: str, tokens: int, objective: str = "throughput", topology: str = "auto"
) -> dict[str, Any]:
    """One answer over exactly so many boards. Equal boards get equal shares for throughput; for one stream alone
    nearly all would go to one."""
    request = GenerateRequest(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=tokens + 1,
        ignore_stop=True,
        precision=precision,
        objective=objective,
        context_tokens=CONTEXT_TOKENS,
        boards_at_least=boards,
        boards_at_most=boards,
        topology=topology,
        speculate="off",
    )
    return there.last("/v1/generate", request, lambda text: print(f"... {text}", file=sys.stderr))


def compute_s(answer: dict[str, Any]) -> float:
    """What its stages took of a token, all together."""
    return float(sum(stage["measured_compute_s"] for stage in answer["stages"]))


def struck(there: Client, request: GenerateRequest, after: int, strike: Callable[[], None]) -> dict[str, Any]:
    """The last event of an answer, in the middle of which, after so many tokens, something is done."""
    end: dict[str, Any] = {}
    given = 0
    for event in there.stream("/v1/generate", request):
        if event["event"] == "status":
            print(f"... {event['text']}", file=sys.stderr)
        given += event["event"] == "token"
        if event["event"] == "token" and given == after:
            strike()
        end = event
    return end
