"""Two deployments at once, on boards that share nothing but this machine: each against itself alone.

Four boards, two models of the same weights under two names (one name is deployed in one way at a time), each cut over
two boards that the other leaves out, through the boards' own brokers. One stream each: first, second, both, in turns.
Boards are slowed so far that the processor is not what they share: they compute for SPEED of the time, and two steps
on two hardware threads of one core slow each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from benchmarks.parts import load
from benchmarks.parts.prompts import prompt
from benchmarks.parts.sites import MODEL, whole_site
from benchmarks.report import Figure, at_least
from coordinator.inference.requests import GenerateRequest
from models.cache import cache_dir
from models.catalog import resolve
from testbed.boards import preset

LINKS = ("ethernet", "wifi")
SPEED = 0.15
TOKENS = 48
LEAST_SHARE = 0.9
"""Of what each gives alone."""

PAIRS: Mapping[str, tuple[str, ...]] = {"first": ("board1", "board2"), "second": ("board3", "board4")}


def measure(link: str, precision: str, rounds: int) -> list[Figure]:
    """Rows for one kind of link."""
    boards = [msgspec.structs.replace(board, speed=SPEED) for board in preset("equal", 4, link)]
    with whole_site(precision, boards) as site:
        twin = site.folder / "twin" / Path(resolve(MODEL, cache_dir())).name
        twin.parent.mkdir()
        twin.symlink_to(resolve(MODEL, cache_dir()))
        models = {"first": MODEL, "second": str(twin)}
        wanted = {name: _request(models[name], precision, _others(name)) for name in PAIRS}
        load.together(site.there.url, list(wanted.values()))  # deploys both, and warms up
        deployed = {
            tuple(stage["device"] for stage in deployment["plan"]["stages"])
            for deployment in site.there.get("/v1/status")["deployments"]
        }
        if {frozenset(boards) for boards in deployed} != {frozenset(boards) for boards in PAIRS.values()}:
            raise RuntimeError(f"two deployments on two pairs of boards were wanted, there are {sorted(deployed)}")
        return _figures(link, _rounds(lambda names: _given(site.there.url, wanted, names), rounds))


def _others(name: str) -> tuple[str, ...]:
    return tuple(board for pair, boards in PAIRS.items() if pair != name for board in boards)


def _request(model: str, precision: str, excluded: tuple[str, ...]) -> GenerateRequest:
    return GenerateRequest(
        model=model, prompt=prompt(48), raw=True, max_tokens=TOKENS, ignore_stop=True, speculate="off",
        precision=precision, objective="throughput", context_tokens=512, boards_at_least=2, boards_at_most=2,
        topology="direct", excluded=excluded,
    )  # fmt: skip


class Given(NamedTuple):
    """Of one deployment: tokens per second, and its stages' own seconds for a token."""

    rate: float
    compute_s: float


def _given(url: str, wanted: Mapping[str, GenerateRequest], names: tuple[str, ...]) -> dict[str, Given]:
    """What each gives while all of them run."""
    streams = load.together(url, [wanted[name] for name in names])
    began_s, until_s = load.shared(streams)
    return {
        name: Given(
            load.rate_within(one, began_s, until_s), sum(stage["measured_compute_s"] for stage in one.end["stages"])
        )
        for name, one in zip(names, streams, strict=True)
    }


Round = tuple[dict[str, Given], dict[str, Given]]
"""(each alone, both)"""


def _rounds(give: Callable[[tuple[str, ...]], dict[str, Given]], rounds: int) -> list[Round]:
    """Alone is the mean of before and after, as the machine's speed drifts."""
    found = []
    for _ in range(rounds):
        before = {name: give((name,))[name] for name in PAIRS}
        both = give(tuple(PAIRS))
        after = {name: give((name,))[name] for name in PAIRS}
        found.append(({name: _mean(before[name], after[name]) for name in PAIRS}, both))
        print(f"... alone, both: {found[-1]}", file=sys.stderr)
    return found


def _mean(one: Given, other: Given) -> Given:
    return Given((one.rate + other.rate) / 2, (one.compute_s + other.compute_s) / 2)


def _figures(link: str, found: list[Round]) -> list[Figure]:
    """The stages' own seconds tell what is missing: they grow with what the boards share of this machine's processor,
    and with nothing else."""
    rows = []
    for name in PAIRS:
        alone = median(solo[name].rate for solo, _ in found)
        share = median(both[name].rate / solo[name].rate for solo, both in found)
        grown = median(both[name].compute_s / solo[name].compute_s for solo, both in found)
        what = f"{link}: {name} of two deployments"
        rows += [
            Figure(f"{what}, alone", alone, "tokens/s"),
            at_least(f"{what}, both / alone", share, "ratio", LEAST_SHARE),
            Figure(f"{what}, stages' own seconds, both / alone", grown, "ratio"),
        ]
    return rows
