"""Requests with adapters, round a ring of stages that have them or not."""

from __future__ import annotations

import pytest

from tests.agent.test_ring import Ring


def test_a_request_is_opened_with_its_adapter_at_every_stage() -> None:
    ring, adapter = Ring(3), "1" * 32
    for engine in ring.engines:
        engine.adapters = {adapter}
    ring.ask([1, 2, 3], request=1, adapter=adapter)
    ring.ask([1, 2, 3], request=2)
    ring.run()
    assert [engine.opened for engine in ring.engines] == [[adapter, ""]] * 3 and not ring.errors()


def test_a_request_whose_adapter_a_stage_has_not_ends_everywhere() -> None:
    ring, adapter = Ring(3), "1" * 32
    for engine in ring.engines[:2]:
        engine.adapters = {adapter}
    ring.ask([1, 2, 3, 4, 5, 6], adapter=adapter)
    ring.run()
    [error] = ring.errors()
    assert (error.code, error.stage) == ("engine", 2) and "not in this stage: run again" in error.text
    assert ring.idle
    ring.ask([9, 9], request=8)
    ring.run()
    assert len(ring.tokens(8)) == 5


@pytest.mark.parametrize("adapter", ["x", "1" * 31, "1" * 33, "G" * 32, "../" * 10])
def test_what_can_be_no_adapter_s_id_is_no_request(adapter: str) -> None:
    ring = Ring(2)
    ring.ask([1, 2, 3], adapter=adapter)
    ring.run()
    assert ring.works[0].tally.refused == 1 and ring.idle and not ring.answers
