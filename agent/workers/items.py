"""The worker that holds one stage of an item model: `python -m agent.workers.items`, its assignment as the first line
on stdin. The loop is that of agent.workers.inference."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.workers.inference import Say, StageWorker, check_memory, done, hold_stage
from agent.workers.itemwork import ItemWork
from agent.workers.pipe import Assignment
from agent.workers.work import Work
from models.engine.items import ItemStage
from wire.messages import StageOrder

WARM_ROWS = 8
"""Of the item that is run before the stage is ready."""


def main() -> int:
    return hold_stage(load, ItemWorker)


def load(assignment: Assignment, _say: Say = lambda _: None) -> ItemStage:
    """Load the stage and run an item through it, so that `ready` means that it works. Raises EngineFailed."""
    weights = [Path(path) for path in assignment.weight_paths]
    engine = ItemStage.load(Path(assignment.graph_path), weights, assignment.threads)
    rows = min(WARM_ROWS, engine.manifest.most_rows) if engine.manifest.has_rows else 1
    engine.run(engine.sample(rows), rows)
    check_memory(assignment)
    return engine


class ItemWorker(StageWorker[ItemStage]):
    """A loaded stage on its connections."""

    def _make_work(self, order: StageOrder) -> Work:
        assignment = self._assignment
        return ItemWork(order, self._engine, self._outboxes, done, self._stretch, assignment.site, assignment.device)


if __name__ == "__main__":
    sys.exit(main())
