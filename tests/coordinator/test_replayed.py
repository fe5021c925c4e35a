"""A recording is no measurement of the board that shows it: nobody plans with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from coordinator.journal import DeployRequest
from coordinator.preparing import Preparing
from tests.hwprofiles import examples


@pytest.mark.parametrize(("source", "because"), [("live", ""), ("emulated", ""), ("replayed", "of a recording")])
def test_a_replayed_profile_leaves_its_board_out_of_plans(
    source: Literal["live", "replayed", "emulated"], because: str
) -> None:
    coordinator: Any = SimpleNamespace(
        calls=None, records=list, is_online=lambda name: True, slowed=lambda name: None, data_brokers=dict,
        slow_links=SimpleNamespace(of=lambda name: None, between=lambda *ends: None),
        borne=SimpleNamespace(of=lambda name: None), without_engines=lambda *names: {},
        profiles=lambda: {"pi5": examples.profile(source=source)},
    )  # fmt: skip
    [candidate] = Preparing(coordinator, shelf=None).candidates(DeployRequest(model="smollm2"))  # type: ignore[arg-type]
    assert because in candidate.unavailable and bool(candidate.unavailable) == bool(because)
