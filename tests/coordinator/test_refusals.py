"""What can't be done is refused at once, by the coordinator or by a board, and what runs goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.journal import DeployRequest
from coordinator.turns import Hold
from tests.coordinator.memory_site import until
from tests.coordinator.operations_site import Scenario, Site, silent
from wire.errors import Degraded, UsageError


def test_a_board_that_does_not_take_its_order_is_named_at_once(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        board = site.lab.boards["a"]
        work = site.ensure()
        await site.ordered("tiny")
        board.refuse(board.orders[-1].epoch - 1, "an earlier one")
        board.refuse(board.orders[-1].epoch + 1000, "one that nobody here gave")
        await asyncio.sleep(0.05)
        assert not work.done()
        board.refuse(board.orders[-1].epoch, "context_tokens: at least 2")
        with pytest.raises(Degraded, match="a could not load its stage: it refused the order: context_tokens"):
            await asyncio.wait_for(work, 5)
        again = site.ensure()
        await site.carry_out(again)
        assert (await again)[0].orders, "the next order may be a better one"

    play(scenario)


@pytest.mark.parametrize(
    "changes",
    [
        {"context_tokens": 0},
        {"context_tokens": 1},
        {"slots": 0},
        {"slots": 1000},
        {"precision": "x"},
        {"objective": "x"},
        {"boards_at_least": 0},
        {"boards_at_least": 2, "boards_at_most": 1},
        {"excluded": ("nobody",)},
        {"pins": (("head", "a"), ("head", "b"))},
        {"objective": "weighted"},
        {"objective": "throughput", "tokens_per_s": -1.0},
        {"reserve_percent": 99.0},
        {"engine": "x"},
    ],
    ids=str,
)
def test_what_can_not_be_is_refused_and_what_runs_goes_on(
    changes: dict[str, Any], play: Callable[[Scenario], None]
) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        first = await site.ensured(Hold())
        for work in (
            site.ensure(**changes),
            site.operations.preparing.plan(DeployRequest(model="tiny", **changes), silent),
        ):
            with pytest.raises(UsageError) as refused:
                await asyncio.wait_for(work, 5)
            assert refused.value.try_
        assert site.lab.coordinator.records() == [first]

    play(scenario)


def test_who_waits_for_boards_is_told_at_once(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        work = site.ensure()
        await until(lambda: bool(site.said))
        assert site.said == ["waiting for boards: none of site lab online yet, 1 wanted"] and not work.done()
        work.cancel()
        await asyncio.wait([work])

    play(scenario)
