"""Has boards measure the ways between them, where a plan may use them: one pair after the other, and seldom.

Which pairs: the neighbours of the plan that would be made, and in a small fleet all others too, since a way that the
boards' own links say nothing of may be the best one. Not while answers run on one of the two boards, and not for longer
than somebody waits for a plan. What was found stands in the profile of the board that measured, with its time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Final, NamedTuple

from coordinator.calls import CallFailed, Calls
from coordinator.planning.pairs import Direct
from coordinator.planning.plan import Plan
from coordinator.planning.topology import hops_of

SMALL_FLEET: Final = 6
"""Boards of which all pairs are measured: 15 pairs, at some 5 s each."""

BUDGET_S: Final = 30.0
"""No further pair is begun after so long; what is missing is measured when the next plan is made."""

TIMEOUT_S: Final = 60.0
"""For one pair; one of the boards may be in the middle of measuring something else."""

FRESH_S: Final = 6 * 3600.0
"""By the boards' clocks, as profiles are: an older figure is used, and measured again when there is time."""

TRY_AGAIN_S: Final = 600.0
"""No pair is asked sooner again, whatever came of it: what fails takes its deadlines, and a board may promise much."""


class Pair(NamedTuple):
    """Two boards, in order of their names: the first one measures."""

    one: str
    other: str


def pair_of(one: str, other: str) -> Pair:
    return Pair(min(one, other), max(one, other))


def pairs_worth(plan: Plan, boards: Iterable[str]) -> list[Pair]:
    """Pairs in the order in which they should be measured: the plan's neighbours, then all of a small fleet."""
    found = [pair_of(*hop) for hop in hops_of(plan) if hop[0] != hop[1]]
    names = sorted(boards)
    if len(names) <= SMALL_FLEET:
        found += [Pair(*two) for two in combinations(names, 2)]
    return list(dict.fromkeys(found))


class Pairs:
    """All methods run in the event loop's thread. `is_used(device)` says that answers run on a board; `token()` gives a
    number that nobody else has."""

    def __init__(
        self,
        calls: Calls,
        is_online: Callable[[str], bool],
        is_used: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
        token: Callable[[], int] = lambda: secrets.randbelow(2**53 - 1) + 1,
    ) -> None:
        self._calls = calls
        self._is_online = is_online
        self._is_used = is_used
        self._clock = clock
        self._token = token
        self._tried_s: dict[Pair, float] = {}
        self.failed: dict[Pair, str] = {}
        """Why a pair has no figures, in words."""

    def due(self, wanted: Iterable[Pair], known: Direct, brokers: Mapping[str, str], now_unix: float) -> list[Pair]:
        """Those of `wanted` that can be measured, are not known or old, and were not tried lately."""
        now_s = self._clock()
        return [
            pair
            for pair in wanted
            if brokers.get(pair.one)
            and brokers.get(pair.other)
            and not (pair in known and now_unix - known[pair].measured_at_unix < FRESH_S)
            and now_s - self._tried_s.get(pair, -TRY_AGAIN_S) >= TRY_AGAIN_S
            and not self._is_used(pair.one)
            and not self._is_used(pair.other)
        ]

    async def measure(
        self, due: Iterable[Pair], brokers: Mapping[str, str], say: Callable[[str], None], budget_s: float = BUDGET_S
    ) -> float:
        """Have them measured one after the other until the budget is spent; gives what is left of it."""
        began_s = self._clock()
        for pair in due:
            if self._clock() - began_s >= budget_s:
                break
            if self._is_used(pair.one) or self._is_used(pair.other):
                continue
            say(f"measuring the way between {pair.one} and {pair.other}")
            await self._ask(pair, brokers)
        return max(0.0, budget_s - (self._clock() - began_s))

    async def _ask(self, pair: Pair, brokers: Mapping[str, str]) -> None:
        token = self._token()
        self._tried_s[pair] = self._clock()

        async def part(device: str, peer: str) -> None:
            await self._calls.call(
                device,
                "probe-pair",
                lambda: self._is_online(pair.one) and self._is_online(pair.other),
                TIMEOUT_S,
                peer=peer,
                measure=device == pair.one,
                token=token,
                inward=brokers[device],
                outward=brokers[peer],
            )

        ends = (part(pair.one, pair.other), part(pair.other, pair.one))
        found = await asyncio.gather(*ends, return_exceptions=True)
        problems = [error for error in found if isinstance(error, BaseException)]
        for error in problems:
            if not isinstance(error, CallFailed):
                raise error
        if problems:
            self.failed[pair] = "; ".join(error.message for error in problems if isinstance(error, CallFailed))[:400]
        else:
            self.failed.pop(pair, None)
