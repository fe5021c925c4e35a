"""Times a module of an item model: items of several sizes, or of the only one, with weights made up here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.workers import emulated
from agent.workers.memory import give_back_memory
from agent.workers.pipe import MeasureModule, MeasureTask
from hwprofiles.measure import MeasurePlan, Point, StopRule, forget_peak, measure_module, peak_bytes
from hwprofiles.profile import ModuleMeasurement, Phase

ENGINE: Final = "onnxruntime"
ROWS: Final = (16, 64, 256)
"""Of items that have rows: a sentence, a paragraph, a page."""
RETRIES: Final = 3
SEED: Final = 1


class ItemBench:
    """One module of the kit, loaded when it is first run. Items are runs of "prefill": all rows at once."""

    def __init__(
        self,
        item: MeasureModule,
        task: MeasureTask,
        cold: Callable[[], None],
        polite: Callable[[], None] = lambda: None,
    ) -> None:
        self._item = item
        self._threads = task.threads
        self._task = task
        self._rule = StopRule(time_budget_s=task.budget_s)
        self._cold, self._polite = cold, polite
        self.engine_name = ""

    def step_once(self) -> None:
        """Load it, run the least item through it, and forget it."""
        from models.engine.items import ItemStage

        [(_, path)] = self._item.graph_paths
        stage = ItemStage.load_synthetic(Path(path), self._threads, SEED)
        stage.run(stage.sample(1), 1)

    def measure(self, base_bytes: int) -> ModuleMeasurement:
        from models.engine.items import ItemStage
        from models.items.manifest import read_item_manifest

        module = self._item.module
        [(_, path)] = self._item.graph_paths
        manifest = read_item_manifest(Path(path).read_bytes(), Path(path).name)
        sizes = sorted({min(rows, manifest.most_rows) for rows in ROWS}) if manifest.has_rows else [1]
        plan = MeasurePlan(points=tuple(Point("prefill", rows, 0) for rows in sizes), stacks=(1,), rule=self._rule)
        stages: list[ItemStage] = []

        def run(_phase: Phase, rows: int, _context: int, _stack: int) -> Callable[[], float]:
            if not stages:
                stages.append(ItemStage.load_synthetic(Path(path), self._threads, SEED))
                self.engine_name = stages[0].name
                give_back_memory()  # as a worker does with its stage
                forget_peak()  # what an item takes is given back behind each one
            stage, item = stages[0], stages[0].sample(rows)
            self._polite()
            timer = emulated.timer_of(self._task)

            def step() -> float:
                self._cold()
                timer.begin()
                stage.run(item, rows)
                return timer.end("item", rows)

            return step

        plan = msgspec.structs.replace(plan, retries=RETRIES, rounds=emulated.rounds_of(self._task))
        return measure_module(
            module.key, module.kind, ENGINE, self._threads, run, plan, base_bytes=base_bytes, held_bytes=peak_bytes
        )
