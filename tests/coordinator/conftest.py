"""What several files about operations have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from coordinator import operations as operations_module
from coordinator import preparing as preparing_module
from tests.coordinator.operations_site import Scenario, played


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, plan, stage: b"%d" % stage.stage)
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)

    return partial(played, tmp_path)
