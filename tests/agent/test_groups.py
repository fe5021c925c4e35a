"""Requests that step together: as many groups as stages, equal ones, and nobody waits for somebody who is gone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.workers.groups import PATIENCE_S, Groups
from agent.workers.requests import Live, Unit
from wire.messages import Sampling


def unit(request: int) -> Unit:
    return Unit(Live(request, request, "", Sampling(), 1, 9, frozenset(), 60.0, b"", 0.0), None, 1, True)


def numbers(units: object) -> list[int]:
    return [unit.live.request for unit in units]  # type: ignore[attr-defined]


class Round:
    """A ring: what the first stage sends comes back after all that was sent before it."""

    def __init__(self, stages: int) -> None:
        self.groups = Groups(stages)
        self.out: list[list[int]] = []
        self.steps: list[list[int]] = []

    def join(self, *requests: int) -> None:
        for request in requests:
            self.groups.file([unit(request)])

    def send(self) -> None:
        while self.groups.ready:
            taken = numbers(self.groups.take(0.0))
            if taken:
                self.out.append(taken)
                self.steps.append(taken)

    def turn(self) -> None:
        """One group comes back, and what is ready goes out."""
        if self.out:
            self.groups.file([unit(request) for request in self.out.pop(0)])
        self.send()


@pytest.mark.parametrize(
    ("stages", "requests", "sizes"),
    [(4, 1, [1]), (4, 3, [1, 1, 1]), (4, 5, [1, 1, 1, 2]), (4, 8, [2] * 4), (3, 8, [2, 3, 3]), (1, 8, [8])],
)
def test_there_are_as_many_groups_as_stages_and_they_are_equal(stages: int, requests: int, sizes: list[int]) -> None:
    ring = Round(stages)
    for request in range(requests):
        ring.join(request)
        ring.turn()
    for _ in range(12):
        ring.turn()
    assert sorted(map(len, ring.out)) == sizes
    assert sorted(request for group in ring.out for request in group) == list(range(requests))


def test_groups_that_nobody_joins_or_leaves_stay_as_they_are() -> None:
    ring = Round(4)
    ring.join(*range(8))
    for _ in range(8):
        ring.turn()
    before = [set(group) for group in ring.out]
    for _ in range(40):
        ring.turn()
    assert [set(group) for group in ring.out] == before


def test_who_ends_makes_room_and_the_rest_are_made_equal() -> None:
    ring = Round(4)
    ring.join(*range(8))
    for _ in range(8):
        ring.turn()
    for request in {request for group in ring.out[:2] for request in group}:
        ring.groups.leave(request)
    ring.out = ring.out[2:]
    for _ in range(8):
        ring.turn()
    assert sorted(map(len, ring.out)) == [1, 1, 1, 1]


def test_everybody_steps_equally_often() -> None:
    ring = Round(4)
    ring.join(*range(7))
    for _ in range(400):
        ring.turn()
    counts = [sum(request in group for group in ring.steps) for request in range(7)]
    assert max(counts) - min(counts) <= 2


def test_what_does_not_come_back_with_its_group_is_not_waited_for() -> None:
    groups = Groups(1)
    groups.file([unit(1), unit(2), unit(3)])
    assert numbers(groups.take(0.0)) == [1, 2, 3]
    groups.file([unit(1), unit(3)])
    assert numbers(groups.take(0.0)) == [1, 3]
    groups.file([unit(2)])  # after all: as one who is new
    assert not groups.ready
    groups.file([unit(1), unit(3)])
    assert sorted(numbers(groups.take(0.0))) == [1, 2, 3]


def test_a_group_that_stays_away_is_not_waited_for_for_ever() -> None:
    groups = Groups(1)
    groups.file([unit(1)])
    assert numbers(groups.take(10.0)) == [1]
    groups.file([unit(2)])
    groups.tick(10.0 + PATIENCE_S)
    assert not groups.ready
    groups.tick(10.1 + PATIENCE_S)
    assert numbers(groups.take(12.0)) == [2]
    groups.tick(1e6)  # nobody waits for 2
    groups.file([unit(1)])
    assert not groups.ready
    groups.file([unit(2)])
    assert sorted(numbers(groups.take(13.0))) == [1, 2]


def test_who_waits_for_a_group_of_which_all_have_left_waits_no_more() -> None:
    groups = Groups(1)
    groups.file([unit(1)])
    groups.take(0.0)
    groups.file([unit(2)])
    assert not groups.ready
    groups.leave(1)
    assert numbers(groups.take(0.0)) == [2]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_no_request_is_lost_doubled_or_left_waiting(stages: int, seed: int) -> None:
    """Requests come, go, come back in parts or never, in any order."""
    dice = random.Random(seed)
    groups, out, live, away, now_s, fresh = Groups(stages), [], set(), set(), 0.0, 0
    for _ in range(120):
        now_s += dice.random() / 4
        action = dice.randrange(6)
        if action == 0 and len(live) < 12:
            fresh += 1
            live.add(fresh)
            groups.file([unit(fresh)])
        elif action == 1 and live:
            gone = dice.choice(sorted(live))
            live.discard(gone)
            away.discard(gone)
            groups.leave(gone)
        elif action == 2 and out:
            sent = out.pop(dice.randrange(len(out)))
            back = [request for request in sent if request in live and dice.random() < 0.9]
            away.update(request for request in sent if request in live and request not in back)
            if back:
                groups.file([unit(request) for request in back])
        elif action == 3:
            groups.tick(now_s)
        else:
            taken = numbers(groups.take(now_s))
            assert set(taken) <= live and len(set(taken)) == len(taken)
            assert not set(taken) & {request for sent in out for request in sent if request in live}
            if taken:
                out.append(taken)
    # What is lost is lost; all others step again, and in groups as they should be.
    flying = {request for sent in out for request in sent} & live
    for request in away:
        groups.leave(request)
    live -= away
    ring = Round(stages)
    ring.groups = groups
    for sent in out:
        if set(sent) & live:
            groups.file([unit(request) for request in sent if request in live])
    groups.tick(now_s + 100)
    # Nobody loses patience within a turn: groups that are given up each time somebody waits for them never settle.
    for _ in range(30 + 4 * len(live)):
        ring.turn()
    stepped = {request for sent in ring.steps[-4 * max(1, len(live)) :] for request in sent}
    assert stepped == live and flying <= live | away
    assert sorted(groups.sizes) == sorted(len(sent) for sent in ring.out)
    assert len(groups.sizes) == min(stages, len(live))
    assert not live or max(groups.sizes) <= -(-len(live) // stages)
