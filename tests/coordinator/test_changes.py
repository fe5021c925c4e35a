"""Who waits is woken by the bell, by his deadline, or by being cancelled: whatever comes first, and nothing is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from coordinator.changes import Changes


def test_the_bell_wakes_all_whose_wish_has_come_true() -> None:
    async def scenario() -> None:
        changes, seen = Changes(), set[int]()
        works = [asyncio.ensure_future(changes.wait(lambda n=n: n in seen, 30.0)) for n in (1, 2)]
        await asyncio.sleep(0)
        seen.add(1)
        changes.ring()
        started_s = time.monotonic()
        assert await works[0] and time.monotonic() - started_s < 0.9, "by the bell, not by looking again"
        assert not works[1].done()
        seen.add(2)
        changes.ring()
        assert await works[1]
        assert not changes._waiters

    asyncio.run(scenario())


def test_what_does_not_come_true_is_told_at_the_deadline() -> None:
    assert asyncio.run(Changes().wait(lambda: False, 0.02)) is False


@pytest.mark.parametrize("steps_between", [0, 1, 2, 3])
def test_who_is_cancelled_while_the_bell_rings_is_cancelled(steps_between: int) -> None:
    async def scenario() -> None:
        changes = Changes()
        work = asyncio.ensure_future(changes.wait(lambda: False, 30.0))
        await asyncio.sleep(0.01)
        changes.ring()
        for _ in range(steps_between):
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.wait([work], timeout=2.0)
        assert work.cancelled() and not changes._waiters

    asyncio.run(scenario())
