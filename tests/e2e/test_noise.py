"""A trial that fails is tried again where the machine or another board disturbed it, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e import noise
from tests.e2e.noise import (
    PERIOD_S,
    STILL_S,
    TRIALS_AT_MOST,
    Look,
    Machine,
    Trial,
    once_more,
    undisturbed,
    unsteadiness,
)


def seen(*took_s: float, late_s: float = 0.0, stolen: float = 0.0) -> list[Look]:
    """Each of these for five seconds."""
    count = int(5 / PERIOD_S)
    return [
        Look(number * PERIOD_S, late_s, took_s[number // count], number * PERIOD_S * stolen)
        for number in range(count * len(took_s))
    ]


def test_a_machine_that_is_always_as_fast_is_steady_however_fast() -> None:
    assert unsteadiness([]) == unsteadiness(seen(0.001)) == unsteadiness(seen(0.1, 0.1)) == ""
    assert unsteadiness(seen(0.001, 0.0011)) == ""


def test_a_machine_that_was_slower_for_a_while_or_stood_still_is_not() -> None:
    assert "2.0 times as slow" in unsteadiness(seen(0.001, 0.002, 0.001))
    assert "stood still for 0.50 s" in unsteadiness([*seen(0.001), Look(9.0, 0.5, 0.001, 0.0)])
    assert unsteadiness(seen(0.001, late_s=STILL_S)) != ""
    assert "given to others" in unsteadiness(seen(0.001, stolen=0.3))
    assert unsteadiness(seen(0.001, stolen=0.01)) == ""


def test_a_machine_is_looked_at_while_the_trial_runs() -> None:
    with Machine() as machine:
        while not machine.seen:
            pass
    look = machine.seen[0]
    assert look.late_s >= 0 and look.took_s > 0 and look.stolen_s >= 0


class FakeSite:
    """A site whose coordinator has said so."""

    def __init__(self, *slow: str) -> None:
        self.slow = slow

    def get(self, _path: str) -> Any:
        return {
            "notices": [{"code": "device-slow", "text": f"{name} is slower than it measured"} for name in self.slow]
        }


def tried(*slow: str, holds_at: int = 99) -> int:
    """How many trials there were, where these boards were found slow and `hot` had been slowed on purpose."""
    count = 0

    @contextmanager
    def start(number: int) -> Iterator[Any]:
        nonlocal count
        count = number
        yield FakeSite(*slow)

    def attempt(trial: Trial) -> None:
        trial.slowed.add("hot")
        assert count >= holds_at, "it fails"

    try:
        with warnings.catch_warnings(record=True) as told:
            undisturbed(start, attempt)
        assert len(told) == count - 1, "each disturbance is said"
    except AssertionError as error:
        assert "it fails" in str(error)
        return -count
    return count


def test_only_a_trial_that_was_disturbed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "unsteadiness", lambda _seen: "")
    assert tried(holds_at=1) == tried("other", holds_at=1) == 1
    assert tried() == tried("hot") == -1, "nothing excuses it"
    assert tried("hot", "other", holds_at=2) == 2
    assert tried("other") == -TRIALS_AT_MOST
    monkeypatch.setattr(noise, "unsteadiness", lambda _seen: "it stood still")
    assert tried(holds_at=3) == 3 and tried() == -TRIALS_AT_MOST


@pytest.mark.parametrize(
    ("still", "fails", "calls"), [("", 0, 1), ("", 1, 1), ("still", 0, 1), ("still", 1, 2), ("still", 9, 2)]
)
def test_a_test_that_failed_while_the_machine_stood_still_is_called_once_more(
    still: str, fails: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "standstill", lambda _seen: still)
    done: list[str] = []

    def call() -> None:
        done.append("call")
        if done.count("call") <= fails:
            raise ValueError("it fails")

    if fails >= calls:
        with pytest.raises(ValueError, match="it fails"):
            once_more(call, lambda: done.append("settle"))
    else:
        assert once_more(call, lambda: done.append("settle")) == (still if calls > 1 else "")
    assert done == ["call", "settle", "call"][: 2 * calls - 1]
