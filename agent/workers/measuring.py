"""The worker that takes the device's measure: `python -m agent.workers.measuring`, its task as the first line on
stdin.

Each module is loaded with weights made up here (time does not depend on their values). On one machine the measuring
workers of several agents take turns: virtual boards would measure each other otherwise. What such a board takes is what
the machine takes, stretched as its steps will be (agent.workers.emulated).
"""

from __future__ import annotations

import contextlib
import gc
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

from agent.workers import emulated
from agent.workers.child import Parent, become_worker
from agent.workers.cold import Cold, sweep_bytes
from agent.workers.dataplane import data_connection
from agent.workers.itembench import ItemBench
from agent.workers.memory import give_back_memory
from agent.workers.pairing import take_part
from agent.workers.pipe import BrokerLogin, Measured, MeasuredModule, MeasureModule, MeasureNote, MeasureTask
from agent.workers.polite import Polite
from agent.workers.stretch import Stretch
from agent.workers.throttle import Throttle
from hwprofiles.energy import INTERVAL_S, Work, measure_energy
from hwprofiles.link import measure_link, measure_round_trip
from hwprofiles.measure import BATCHES, DECODE_CONTEXTS, StopRule, measure_module, plan_for, resident_bytes
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, Phase
from hwprofiles.reading import Absent, Failed
from hwprofiles.sampler import Sampler
from hwprofiles.samples import EnergyMeasurement
from models.engine.base import StageEngine, StageSpec
from models.engine.choice import StageFiles, load_synthetic_on, start
from models.engine.manifest import load_graph
from models.engine.work import work_of
from wire import topics
from wire.errors import EdgelamError

LOG = logging.getLogger("edgelam.measuring")

ENGINE: Final = "onnxruntime"
CONTEXT_TOKENS: Final = 512
"""Room for the longest context that is measured (256 rows) and the largest prefill step (128) on top."""

RETRIES: Final = 3
"""A point without a valid run keeps the device out of every plan, and machines have noisy seconds."""

ENERGY_STEPS: Final[tuple[tuple[Phase, int], ...]] = (("decode", 1), ("prefill", 32))

SEED: Final = 1
NOTHING: Final = Measured(modules=(), failed={}, link=Absent("not asked for"), engines_loaded={}, allow_spinning=False)
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
    found = NOTHING
    if task.modules or task.board:
        waits = MeasureNote(note="waits for another agent's measuring")
        with take_turn(lambda: parent.gone, lambda: parent.say(waits)):
            found = _sustained(task, parent) if task.sustained_s else _at_rest(task, parent)
    if task.login is not None:
        parent.say(MeasureNote(note="link"))
        found = msgspec.structs.replace(found, link=_link(task, task.login))
    if task.ways:
        parent.say(MeasureNote(note="ways to other boards"))
        found = _with_ways(task, found)
    if task.pair is not None:
        parent.say(MeasureNote(note=f"the way {'to' if task.pair.measure else 'from'} {task.pair.peer}"))
        found = msgspec.structs.replace(found, pair=take_part(task.pair, task.site, task.device))
    parent.say(found)
    return 0


def _at_rest(task: MeasureTask, parent: Parent) -> Measured:
    """Modules in short runs, and what the board gives at best."""
    if not task.board:
        return measure(task, parent)
    from agent.workers import boards

    watch = boards.CourseWatch()
    found = measure(task, parent)
    course = watch.end() if task.modules else Absent("no module was measured")
    parent.say(MeasureNote(note="memory, arithmetic and disk"))
    return msgspec.structs.replace(boards.with_board(task, found), course=course)


def _sustained(task: MeasureTask, parent: Parent) -> Measured:
    """Steps of the first module without a pause, for as long as the task says."""
    from agent.workers import boards
    from models.engine.onnx import OnnxStage

    bench = ModuleBench(task.modules[0], task, OnnxStage.load_synthetic, lambda: None)
    try:
        stack, step = bench.hot("decode", 1, boards.SUSTAINED_CONTEXT)

        def told(done_s: float) -> None:
            parent.say(MeasureNote(note=f"under load for {done_s:.0f} of {task.sustained_s:.0f} s"))

        made = boards.sustain(task, step, lambda: bench.engine_name, stack, told)
    except (EdgelamError, OSError, ValueError) as error:
        return msgspec.structs.replace(NOTHING, sustained=Failed(str(error)[:1024]))
    return msgspec.structs.replace(NOTHING, sustained=made, engines_loaded={ENGINE: bench.engine_name})


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
    """Time every module of the task on its engine; the link is still to be measured."""
    modules: list[ModuleMeasurement] = []
    loaded: dict[str, str] = {}

    def told(module: ModuleMeasurement, engine_name: str) -> None:
        if emulated.is_emulated(task):
            module = emulated.on_board(module, task.speed * Throttle(task.throttle_path).share())
        modules.append(module)
        loaded[task.engine] = engine_name
        parent.say(MeasuredModule(module=module))

    shared = emulated.Shared(Path(task.shared_folder), emulated.machine(task.threads)) if task.shared_folder else None
    left: list[MeasureModule] = []
    for item in task.modules:
        known = None if shared is None else shared.find(item.module.key, task.engine, task.shared_since_s)
        if known is None:
            left.append(item)
        else:
            told(known.module, known.engine_name)
    if not left:
        return msgspec.structs.replace(NOTHING, modules=tuple(modules), engines_loaded=loaded)

    def found(module: ModuleMeasurement, engine_name: str) -> None:
        if shared is not None:
            shared.keep(module, engine_name)
        told(module, engine_name)

    failed, energy = _measure(task, parent, left, found)
    return msgspec.structs.replace(NOTHING, modules=tuple(modules), failed=failed, engines_loaded=loaded, energy=energy)


def _measure(
    task: MeasureTask, parent: Parent, items: list[MeasureModule], found: Callable[[ModuleMeasurement, str], None]
) -> tuple[dict[str, str], EnergyMeasurement | Absent | Failed]:
    """Time these modules as this machine runs them; why some could not be, and the energy of a block."""
    try:
        start_engine(task)
    except EdgelamError as error:
        return {item.module.key: str(error) for item in items}, NOTHING.energy
    base_bytes = resident_bytes()
    cold, polite = Cold(sweep_bytes()), Polite(task.yields)
    failed: dict[str, str] = {}
    energy = NOTHING.energy
    for number, item in enumerate(items):
        gc.collect()
        give_back_memory()  # or the next one would grow into what the last one left, and seem to need nothing
        parent.say(MeasureNote(note=f"{item.module.kind}, {number + 1} of {len(items)}"))
        bench: ModuleBench | ItemBench = (
            ItemBench(item, task, cold, polite)
            if item.module.runs == "items"
            else ModuleBench(item, task, loader(item, task), cold, polite)
        )
        try:
            found(bench.measure(base_bytes), bench.engine_name)
            if (
                isinstance(bench, ModuleBench)
                and task.board
                and item.module.kind == "block"
                and energy == NOTHING.energy
            ):
                parent.say(MeasureNote(note="energy"))
                energy = measure_energy(bench.works(), lambda: Sampler(INTERVAL_S, gpu=False))
        except (EdgelamError, OSError, ValueError) as error:
            LOG.warning("%s: %s", item.module.key, error)
            failed[item.module.key] = str(error)
    return failed, energy


def start_engine(task: MeasureTask) -> None:
    """Load the smallest stack of a module, make a step, and forget it: what the engine takes once, whatever it holds,
    is in the base then, and not in the first module. A module that can't be loaded is found out when it is measured;
    an engine that can't be used here at all raises EngineFailed."""
    start(task.engine)
    for item in sorted(task.modules, key=lambda item: (item.module.runs == "items", item.module.kind != "block"))[:1]:
        bench: ModuleBench | ItemBench = (
            ItemBench(item, task, lambda: None)
            if item.module.runs == "items"
            else ModuleBench(item, task, loader(item, task), lambda: None)
        )
        with contextlib.suppress(EdgelamError, OSError, ValueError):
            bench.step_once()
        del bench
    gc.collect()
    give_back_memory()


def loader(item: MeasureModule, task: MeasureTask) -> Callable[[Path, StageSpec, int], StageEngine]:
    """What loads a graph of the module on the task's engine."""
    standard = {path: dict(item.standard_paths).get(stack, "") for stack, path in item.graph_paths}

    def load(path: Path, spec: StageSpec, seed: int) -> StageEngine:
        other = standard[str(path)]
        files = StageFiles(path, Path(other) if other else None, (), Path(task.engines_path or path.parent / "engines"))
        return load_synthetic_on(task.engine, files, spec, seed)

    return load


class ModuleBench:
    """One module of the kit, loaded at each depth when it is first asked for."""

    def __init__(
        self,
        item: MeasureModule,
        task: MeasureTask,
        load: Callable[[Path, StageSpec, int], StageEngine],
        cold: Callable[[], None],
        polite: Callable[[], None] = lambda: None,
    ) -> None:
        self._item = item
        self._threads = task.threads
        self._engine = task.engine
        self._speed = task.speed
        self._task = task
        self._throttle = Throttle(task.throttle_path)
        self._polite = polite
        self._rule = StopRule(time_budget_s=task.budget_s)
        self._load = load
        self._cold = cold
        self._loaded: dict[int, tuple[StageEngine, int]] = {}
        self._others: dict[int, list[int]] = {}
        """Slots of further requests, by the depth of the stage."""
        self._held_bytes = 0
        """By an engine with one request, at most."""
        self.engine_name = ""

    def measure(self, base_bytes: int) -> ModuleMeasurement:
        module = self._item.module
        plan = plan_for(module.kind, tuple(stack for stack, _ in self._item.graph_paths), self._rule)
        plan = msgspec.structs.replace(plan, retries=RETRIES, rounds=emulated.rounds_of(self._task))
        began_s = time.monotonic()
        found = measure_module(
            module.key, module.kind, self._engine, self._threads, self._run, plan, base_bytes=base_bytes
        )
        found = msgspec.structs.replace(found, took_s=time.monotonic() - began_s)
        return self._of_gpu(found) if self._engine != ENGINE else self._with_work(found, max(plan.stacks))

    def _of_gpu(self, found: ModuleMeasurement) -> ModuleMeasurement:
        """The kernel doesn't count to a process what a GPU holds for it."""
        return msgspec.structs.replace(found, resident_bytes=max(found.resident_bytes, self._held_bytes))

    def _with_work(self, found: ModuleMeasurement, deepest: int) -> ModuleMeasurement:
        """What it reads and computes, to be held against what the processor gives at best."""
        work = work_of(load_graph(self._path(deepest), self._spec(deepest))[1])
        return msgspec.structs.replace(found, weight_bytes=work.weight_bytes, row_operations=work.row_operations)

    def step_once(self) -> None:
        engine, slot = self._stage(min(stack for stack, _ in self._item.graph_paths))
        engine.step(slot, self._rows(1), 0)

    def hot(self, phase: Phase, tokens: int, context: int) -> tuple[int, Callable[[], float]]:
        """A step through the deepest stack without a pause before it; and how deep that is."""
        deepest = max(stack for stack, _ in self._item.graph_paths)
        return deepest, self._run(phase, tokens, context, deepest, pause=False)

    def works(self) -> tuple[Work, ...]:
        """A step of decoding and one of prefill, of which the energy is to be known."""
        found = []
        for phase, tokens in ENERGY_STEPS:
            stack, step = self.hot(phase, tokens, DECODE_CONTEXTS[0])
            found.append(Work(self._item.module.key, phase, tokens, DECODE_CONTEXTS[0], stack, step))
        return tuple(found)

    def _run(self, phase: Phase, tokens: int, context: int, stack: int, pause: bool = True) -> Callable[[], float]:
        """A step over `tokens` rows behind `context` rows; it can be repeated, since an engine may rewind."""
        engine, slot = self._stage(stack)
        slots = [slot]
        if phase == "decode" and tokens > 1:
            others = self._others.setdefault(stack, [])
            others += [engine.open() for _ in range(tokens - 1 - len(others))]
            slots += others[: tokens - 1]
        for one in slots if context else ():
            engine.step(one, self._rows(context), 0)
        rows, positions = self._rows(tokens), [context] * len(slots)

        def run() -> None:
            if len(slots) == 1:
                engine.step(slot, rows, context)
            else:
                engine.step_many(slots, rows, positions)

        if not pause:
            return self._stretched(run, phase, tokens, context)
        self._polite()
        timer = emulated.timer_of(self._task)

        def step() -> float:
            if phase == "decode":
                self._cold()
            timer.begin()
            run()
            return timer.end(phase, tokens, context)

        return step

    def _stretched(self, run: Callable[[], None], phase: Phase, tokens: int, context: int) -> Callable[[], float]:
        """As slow as the board is just now, in fact and not on paper."""
        stretch = Stretch(self._speed, self._threads)

        def step() -> float:
            stretch.throttle(self._throttle.share())
            stretch.begin()
            run()
            return stretch.end(phase, tokens, context)

        return step

    def _stage(self, stack: int) -> tuple[StageEngine, int]:
        if stack not in self._loaded:
            engine = self._load(self._path(stack), self._spec(stack), SEED)
            self.engine_name = engine.name
            self._loaded[stack] = (engine, engine.open())
            self._held_bytes = max(self._held_bytes, engine.held_bytes - engine.idle_bytes)
            give_back_memory()  # as a worker does with its stage
        return self._loaded[stack]

    def _path(self, stack: int) -> Path:
        return Path(dict(self._item.graph_paths)[stack])

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
            slots=max(BATCHES),
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


def _with_ways(task: MeasureTask, found: Measured) -> Measured:
    """Time the round trip to each broker that was asked for, one after the other."""
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    cold = Cold(sweep_bytes())
    for name, login in task.ways:
        transport = data_connection(login)
        transport.start()
        try:
            round_trip = measure_round_trip(transport, topics.INBOX.on(task.site, task.device, "probe"), before=cold)
        finally:
            transport.close()
        if isinstance(round_trip, str):
            failed[name] = round_trip
        else:
            times[name] = round_trip
    return msgspec.structs.replace(found, ways=times, ways_failed=failed)


if __name__ == "__main__":
    sys.exit(main())
