"""The worker that takes the device's measure: `python -m agent.workers.measuring`, its task as the first line on
stdin.

Each module is loaded with weights made up here (time does not depend on their values) and timed through the same
stretch as an inference worker's steps. On one machine the measuring workers of several agents take turns: virtual
boards would measure each other otherwise.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from agent.workers.child import Parent, become_worker
from agent.workers.cold import Cold, sweep_bytes
from agent.workers.dataplane import data_connection
from agent.workers.pipe import BrokerLogin, Measured, MeasureModule, MeasureNote, MeasureTask
from agent.workers.stretch import Stretch
from hwprofiles.link import measure_link
from hwprofiles.measure import StopRule, measure_module, plan_for, resident_bytes
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, Phase
from hwprofiles.reading import Absent, Failed
from models.engine.base import StageEngine, StageSpec
from wire import topics
from wire.errors import EdgelamError

LOG = logging.getLogger("edgelam.measuring")

ENGINE: Final = "onnxruntime"
CONTEXT_TOKENS: Final = 512
"""Room for the longest context that is measured (256 rows) and the largest prefill step (128) on top."""

RETRIES: Final = 3
"""A point without a valid run keeps the device out of every plan, and machines have noisy seconds."""

SEED: Final = 1
TURN_PERIOD_S: Final = 0.1


def main() -> int:
    """Do the task, say what came out, end."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    parent = become_worker()
    task = parent.first(MeasureTask)
    if task.nice:
        os.nice(task.nice)
    parent.listen(lambda: None)
    # The link is measured after the turn: it takes little of the processor, and boards need not wait for each other's.
    with take_turn(lambda: parent.gone, lambda: parent.say(MeasureNote(note="waits for another agent's measuring"))):
        found = measure(task, parent)
    if task.login is not None:
        parent.say(MeasureNote(note="link"))
        found = msgspec.structs.replace(found, link=_link(task, task.login))
    parent.say(found)
    return 0


def take_turn(gone: Callable[[], bool], waiting: Callable[[], None]) -> socket.socket:
    """Wait until no other agent of this machine measures; the socket that is given back is the turn.

    An abstract socket name is a lock that leaves no file and that the kernel frees when its holder dies.
    """
    turn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    told = False
    while True:
        try:
            turn.bind("\0edgelam-measuring")
            return turn
        except OSError:
            if gone():
                raise SystemExit(0) from None
            if not told:
                told = True
                waiting()
            time.sleep(TURN_PERIOD_S)


def measure(task: MeasureTask, parent: Parent) -> Measured:
    """Time every module of the task; the link is still to be measured."""
    from models.engine.onnx import OnnxStage

    base_bytes = resident_bytes()
    cold = Cold(sweep_bytes())
    found: list[ModuleMeasurement] = []
    failed: dict[str, str] = {}
    loaded: dict[str, str] = {}
    for number, item in enumerate(task.modules):
        parent.say(MeasureNote(note=f"{item.module.kind} ({number + 1} of {len(task.modules)})"))
        bench = ModuleBench(item, task, OnnxStage.load_synthetic, cold)
        try:
            found.append(bench.measure(base_bytes))
            loaded[ENGINE] = bench.engine_name
        except (EdgelamError, OSError, ValueError) as error:
            LOG.warning("%s: %s", item.module.key, error)
            failed[item.module.key] = str(error)
    link = Absent("not asked for")
    return Measured(modules=tuple(found), failed=failed, link=link, engines_loaded=loaded, allow_spinning=False)


class ModuleBench:
    """One module of the kit, loaded at each depth when it is first asked for."""

    def __init__(
        self,
        item: MeasureModule,
        task: MeasureTask,
        load: Callable[[Path, StageSpec, int], StageEngine],
        cold: Callable[[], None],
    ) -> None:
        self._item = item
        self._threads = task.threads
        self._speed = task.speed
        self._rule = StopRule(time_budget_s=task.budget_s)
        self._load = load
        self._cold = cold
        self._loaded: dict[int, tuple[StageEngine, int]] = {}
        self.engine_name = ""

    def measure(self, base_bytes: int) -> ModuleMeasurement:
        module = self._item.module
        plan = plan_for(module.kind, tuple(stack for stack, _ in self._item.graph_paths), self._rule)
        plan = msgspec.structs.replace(plan, retries=RETRIES)
        return measure_module(module.key, module.kind, ENGINE, self._threads, self._run, plan, base_bytes=base_bytes)

    def _run(self, phase: Phase, tokens: int, context: int, stack: int) -> Callable[[], float]:
        """A step over `tokens` rows behind `context` rows; it can be repeated, since an engine may rewind."""
        engine, slot = self._stage(stack)
        position = 0
        if context:
            engine.step(slot, self._rows(context), 0)
            position = context
        rows = self._rows(tokens)
        stretch = Stretch(self._speed, self._threads)

        def step() -> float:
            if phase == "decode":
                self._cold()
            stretch.begin()
            engine.step(slot, rows, position)
            return stretch.end()

        return step

    def _stage(self, stack: int) -> tuple[StageEngine, int]:
        if stack not in self._loaded:
            path = dict(self._item.graph_paths)[stack]
            engine = self._load(Path(path), self._spec(stack), SEED)
            self.engine_name = engine.name
            self._loaded[stack] = (engine, engine.open())
        return self._loaded[stack]

    def _spec(self, stack: int) -> StageSpec:
        module = self._item.module
        return StageSpec(
            embedding=module.kind == "embedding",
            head=module.kind == "head",
            first_block=0,
            end_block=stack if module.kind == "block" else 0,
            hidden=module.hidden,
            vocabulary=module.vocabulary,
            wire_dtype=module.wire_dtype,
            context_tokens=CONTEXT_TOKENS,
            slots=1,
            threads=self._threads,
        )

    def _rows(self, count: int) -> Any:
        """Token ids all over the vocabulary, or hidden states of unit size in wire dtype: zeros would be too kind."""
        module = self._item.module
        generator = np.random.default_rng(SEED)
        if module.kind == "embedding":
            return generator.integers(0, module.vocabulary, count, dtype=np.int64)
        values = generator.standard_normal((count, module.hidden), dtype=np.float32)
        if module.wire_dtype == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values if module.wire_dtype == "f32" else values.astype(np.float16)


def _link(task: MeasureTask, login: BrokerLogin) -> LinkMeasurement | Absent | Failed:
    transport = data_connection(login)
    transport.start()
    try:
        topic = topics.INBOX.on(task.site, task.device, "probe")
        return measure_link(transport, topic, login.url, before=Cold(sweep_bytes()))
    finally:
        transport.close()


if __name__ == "__main__":
    sys.exit(main())
