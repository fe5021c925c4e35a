"""All engines of this machine on one model: speed, memory, time to load, and how far their answers are apart.

    make bench AREA=engines
    make bench AREA=engines ARGS="--engines tensorrt,onnxruntime --precision int8"

Each engine runs in a process of its own, one after the other: a library that crashes costs its engine, and no GPU is
shared. What can't be loaded is named under the conditions with the reason. Steps are given the same tokens, whatever
they answer, so that logits can be compared: 64 rows of a prompt, then one row after the other. Logits are held against
those of onnxruntime on the processor, from the same packed weights.

The record of a board with a GPU is what this prints (docs/engines.md).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from benchmarks.report import Figure, at_most, emit, machine
from hwprofiles.measure import resident_bytes
from hwprofiles.reading import Reading
from hwprofiles.survey import survey
from models.build.pack import Packed, pack
from models.build.stage import build_stage_graph
from models.build.standard import build_standard_graph
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageEngine, StageSpec
from models.engine.choice import StageFiles, load_on, start
from models.engine.names import ENGINES
from models.formats.checkpoint import open_checkpoint
from wire.errors import EdgelamError
from wire.messages import EngineName

REFERENCE: Final[EngineName] = "onnxruntime"
PROMPT_ROWS: Final = 64
CONTEXT_TOKENS: Final = 512
COMPARED_STEPS: Final = 16

APART: Final = 0.2
"""Root mean square of what logits differ by, as a share of their spread: the usual graph rounds activations to 8 bits,
the other one weights to float16."""

LONGEST_S: Final = 3600.0
"""Of one engine: a board that builds takes minutes, not hours."""


class Task(Struct, frozen=True, kw_only=True):
    """What one engine is to do; files are in `folder`."""

    engine: EngineName
    folder: str
    weights: tuple[str, ...]
    spec: StageSpec
    steps: int


class Found(Struct, frozen=True, kw_only=True):
    """What came out; `because` alone where the engine can't be used."""

    because: str = ""
    name: str = ""
    load_s: float = 0.0
    again_s: float = 0.0
    """Loaded once more: of what was built and kept the first time."""
    prefill_s: float = 0.0
    decode_s: tuple[float, ...] = ()
    held_bytes: int = 0
    grown_bytes: int = 0
    """Resident memory of the process, since the engine was started."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name of the catalog, or a path")
    parser.add_argument("--precision", default="int4", choices=("int4", "int8", "f32"))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=128, help="decode steps that are timed")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.task:
        print(msgspec.json.encode(run(msgspec.json.decode(asked.task, type=Task))).decode())
        return 0
    try:
        names = [msgspec.convert(name.strip(), EngineName) for name in asked.engines.split(",")]
    except msgspec.ValidationError:
        parser.error(f"--engines {asked.engines}: of {', '.join(ENGINES)}")
    engines = list(dict.fromkeys([REFERENCE, *names]))
    conditions = machine() | {"model": asked.model, "precision": asked.precision, "threads": asked.threads}
    gpus = survey(Path("/"), "this machine").identity.accelerators
    conditions["gpu"] = ", ".join(gpus.value) if isinstance(gpus, Reading) else gpus.because
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        checkpoint = open_checkpoint(resolve(asked.model, cache_dir()), cache_dir())
        packed = pack(checkpoint, asked.precision, "f32" if asked.precision == "f32" else "f16", cache_dir())
        spec = prepared(packed, Path(folder), asked.threads)
        weights = tuple(map(str, packed.files.values()))
        found: dict[str, Found] = {}
        for engine in engines:
            task = Task(engine=engine, folder=folder, weights=weights, spec=spec, steps=asked.steps)
            found[engine] = apart(task)
            conditions[engine] = found[engine].name or found[engine].because
        figures = [figure for engine in engines for figure in figures_of(engine, found[engine], Path(folder))]
    return 0 if emit("engines", conditions, figures) else 1


def prepared(packed: Packed, folder: Path, threads: int) -> StageSpec:
    """Write both graphs of the whole model, and the tokens that all are given."""
    graph = packed.graph
    spec = StageSpec(
        embedding=True, head=True, first_block=0, end_block=graph.blocks, hidden=graph.hidden,
        vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype,
        context_tokens=min(CONTEXT_TOKENS, graph.max_context_tokens), slots=1, threads=threads,
    )  # fmt: skip
    builders: dict[str, Callable[..., bytes]] = {"usual": build_stage_graph, "standard": build_standard_graph}
    for name, build in builders.items():
        data = build(
            packed.config, graph.precision, graph.wire_dtype, first_block=0, end_block=graph.blocks, embedding=True,
            head=True,
        )  # fmt: skip
        (folder / f"{name}.onnx").write_bytes(data)
    ids = np.random.default_rng(0).integers(0, graph.vocabulary, spec.context_tokens, dtype=np.int64)
    np.save(folder / "ids.npy", ids)
    return spec


def apart(task: Task) -> Found:
    """Run an engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engines", "--task", msgspec.json.encode(task).decode()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return Found(because=f"did not end within {LONGEST_S:.0f} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        return Found(because=f"ended with {done.returncode}: {last[0]}")
    return msgspec.json.decode(lines[-1], type=Found)


def run(task: Task) -> Found:
    """Load an engine, time its steps, leave its logits in the folder."""
    folder = Path(task.folder)
    files = StageFiles(
        folder / "usual.onnx", folder / "standard.onnx", tuple(map(Path, task.weights)), folder / "engines"
    )
    spec = task.spec
    try:
        start(task.engine)
        before_bytes = resident_bytes()
        stage, load_s = loaded(task.engine, files, spec)
        ids = np.load(folder / "ids.npy")
        np.save(folder / f"{task.engine}.npy", logits_of(stage, ids))
        prefill_s, decode_s = timed(stage, ids, task.steps)
        grown_bytes = resident_bytes() - before_bytes
        name, held_bytes = stage.name, stage.held_bytes
        del stage
        _, again_s = loaded(task.engine, files, spec)
    except EdgelamError as error:
        return Found(because=str(error))
    return Found(
        name=name, load_s=load_s, again_s=again_s, prefill_s=prefill_s, decode_s=tuple(decode_s),
        held_bytes=held_bytes, grown_bytes=max(0, grown_bytes),
    )  # fmt: skip


def loaded(engine: EngineName, files: StageFiles, spec: StageSpec) -> tuple[StageEngine, float]:
    began_s = time.perf_counter()
    stage = load_on(engine, files, spec, lambda said: print(said, file=sys.stderr))
    stage.step(slot := stage.open(), np.zeros(1, np.int64), 0)
    stage.close(slot)
    return stage, time.perf_counter() - began_s


def logits_of(stage: StageEngine, ids: Any) -> Any:
    """Of the last row of a prompt, and of each of some rows behind it."""
    slot, first = stage.open(), min(PROMPT_ROWS, len(ids) // 2)
    rows = [np.array(stage.step(slot, ids[:first], 0)).reshape(-1)]
    for position in range(first, first + min(COMPARED_STEPS, len(ids) - first)):
        rows.append(np.array(stage.step(slot, ids[position : position + 1], position)).reshape(-1))
    stage.close(slot)
    return np.stack(rows)


def timed(stage: StageEngine, ids: Any, steps: int) -> tuple[float, list[float]]:
    """Seconds of a prompt (median of five), and of each decode step behind it; behind the context they begin anew."""
    slot, first, clock = stage.open(), min(PROMPT_ROWS, len(ids) // 2), time.perf_counter
    prompts, decode = [], []
    for _ in range(5):
        began_s = clock()
        stage.step(slot, ids[:first], 0)
        prompts.append(clock() - began_s)
    for number in range(steps):
        position = first + number % (len(ids) - first)
        began_s = clock()
        stage.step(slot, ids[position : position + 1], position)
        decode.append(clock() - began_s)
    return statistics.median(prompts), decode


def figures_of(engine: str, found: Found, folder: Path) -> list[Figure]:
    if found.because:
        return []
    made = [
        Figure(f"{engine}: decode step", statistics.median(found.decode_s) * 1e3, "ms"),
        Figure(f"{engine}: decode step, 90 of 100", float(np.quantile(found.decode_s, 0.9)) * 1e3, "ms"),
        Figure(f"{engine}: prompt of {PROMPT_ROWS}", found.prefill_s * 1e3, "ms"),
        Figure(f"{engine}: first load", found.load_s, "s"),
        Figure(f"{engine}: load again", found.again_s, "s"),
        Figure(f"{engine}: memory held, as it says", found.held_bytes / 1e6, "MB"),
        Figure(f"{engine}: memory of the process", found.grown_bytes / 1e6, "MB"),
    ]
    reference = folder / f"{REFERENCE}.npy"
    if engine != REFERENCE and reference.exists():
        wanted, given = np.load(reference), np.load(folder / f"{engine}.npy")
        off = float(np.sqrt(np.mean((given - wanted) ** 2)) / wanted.std())
        same = float(np.mean(given.argmax(axis=1) == wanted.argmax(axis=1)))
        made.append(at_most(f"{engine}: logits apart from {REFERENCE}'s, of their spread", off, "", APART))
        made.append(Figure(f"{engine}: same first choice", 100 * same, "%"))
    return made


if __name__ == "__main__":
    sys.exit(main())
