"""What several files about operations have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import operations as operations_module
from coordinator import preparing as preparing_module
from tests.coordinator.memory_site import running
from tests.coordinator.operations_site import Scenario, Site


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, plan, stage: b"%d" % stage.stage)
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)

    def run(scenario: Scenario) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                await scenario(Site(lab, tmp_path))

        asyncio.run(whole())

    return run
