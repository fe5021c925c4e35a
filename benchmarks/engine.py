"""One model on one core of this machine: prefill and decode, each precision, beside llama.cpp where it is installed.

    make bench AREA=engine
    make bench AREA=engine ARGS="--threads 2 --rounds 40"

All engines run in turns of a few tokens inside one process, pinned to as many cores as threads, so that whatever else
the machine does falls on all of them; figures are medians over the turns, ratios are medians of the turns' ratios.
llama.cpp (`pip install llama-cpp-python`, no dependency of ours) reads the same GGUF file. What the materialised
residual stream costs is measured against the same weights with float32 between blocks, a graph without the casts. Both
are loaded twice, since where a model's weights come to lie in memory moves its speed by some percent, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.report import Figure, at_least, at_most, emit, machine
from models.build.pack import Packed, pack
from models.build.stage import build_stage_graph
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
from models.formats.checkpoint import Checkpoint, open_checkpoint

PROMPT_TOKENS: Final = 256
CONTEXT_TOKENS: Final = 512
BEFORE_TOKENS: Final = 64
"""Tokens in the context where a turn of decoding starts."""

TURN_TOKENS: Final = 16
SHOWN: Final = ("int4", "int8", "f32", "llama.cpp")
"""The others are there to be compared with."""

PREFILL_EVERY: Final = 4
"""Prefill takes longer than a turn of decoding: it is run in every fourth round."""

Step = Callable[[Any, int], None]
"""Run token ids at a position."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    asked = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: asked.threads]))
    path = resolve(asked.model, cache_dir())
    checkpoint = open_checkpoint(path, cache_dir())
    conditions = machine() | {"model": asked.model, "threads": asked.threads, "rounds": asked.rounds}
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        engines: dict[str, Step] = {}
        for name, precision, wire in (
            ("int4", "int4", "f16"),
            ("int4 uncast", "int4", "f32"),
            ("int4 uncast again", "int4", "f32"),
            ("int4 again", "int4", "f16"),
            ("int8", "int8", "f16"),
            ("f32", "f32", "f32"),
        ):
            engines[name] = _stepper(whole_model(checkpoint, precision, wire, Path(folder), asked.threads))
        overhead_s = _python_overhead_s(checkpoint, Path(folder))
        peer = _llama(path, asked.threads)
        if peer is not None:
            engines["llama.cpp"] = peer
        conditions["llama.cpp"] = _llama_version() if peer is not None else "not installed"
        decode, prefill = measure(engines, checkpoint.config.vocabulary, asked.rounds)
    figures = _figures(decode, prefill)
    figures.append(at_most("our Python per step", overhead_s * 1e6, "us", 60))
    return 0 if emit("engine", conditions, figures) else 1


def whole_model(
    checkpoint: Checkpoint, precision: str, wire: str, folder: Path, threads: int, context_tokens: int = CONTEXT_TOKENS
) -> OnnxStage:
    """Load all of a model as one stage; `folder` takes packed weights and the graph."""
    packed = pack(checkpoint, precision, wire, folder)
    spec = _spec(packed, packed.graph.blocks, threads, context_tokens)
    return OnnxStage.load(_graph(packed, spec, folder), list(packed.files.values()), spec)


def _spec(packed: Packed, end_block: int, threads: int, context_tokens: int) -> StageSpec:
    return StageSpec(
        embedding=True,
        head=end_block == packed.graph.blocks,
        first_block=0,
        end_block=end_block,
        hidden=packed.graph.hidden,
        vocabulary=packed.graph.vocabulary,
        wire_dtype=packed.graph.wire_dtype,
        context_tokens=context_tokens,
        slots=1,
        threads=threads,
    )


def _graph(packed: Packed, spec: StageSpec, folder: Path) -> Path:
    path = folder / f"{packed.graph.precision}-{packed.graph.wire_dtype}-{spec.end_block}.onnx"
    path.write_bytes(
        build_stage_graph(
            packed.config,
            packed.graph.precision,
            packed.graph.wire_dtype,
            first_block=0,
            end_block=spec.end_block,
            embedding=True,
            head=spec.head,
        )
    )
    return path


def _stepper(stage: OnnxStage) -> Step:
    slot = stage.open()

    def step(ids: Any, position: int) -> None:
        stage.step(slot, ids, position)

    return step


def measure(
    engines: Mapping[str, Step], vocabulary: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Give seconds per token of each turn, by engine: (decode, prefill)."""
    ids = np.random.default_rng(0).integers(0, vocabulary, CONTEXT_TOKENS, dtype=np.int64)
    decode: dict[str, list[float]] = {name: [] for name in engines}
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    for step in engines.values():
        step(ids[:PROMPT_TOKENS], 0)
    for number in range(rounds):
        # The order turns, there and back, so that nobody always runs behind the same neighbour's cache.
        names = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
        names = names[::-1] if number % 2 else names
        for name in names:
            engines[name](ids[:BEFORE_TOKENS], 0)
            with _timed(decode[name], TURN_TOKENS):
                for position in range(BEFORE_TOKENS, BEFORE_TOKENS + TURN_TOKENS):
                    engines[name](ids[position : position + 1], position)
        for name in names if number % PREFILL_EVERY == 0 else []:
            with _timed(prefill[name], PROMPT_TOKENS):
                engines[name](ids[:PROMPT_TOKENS], 0)
    return decode, prefill


@contextmanager
def _timed(samples: list[float], tokens: int) -> Iterator[None]:
    start = time.perf_counter()
    yield
    samples.append((time.perf_counter() - start) / tokens)


def _figures(decode: Mapping[str, list[float]], prefill: Mapping[str, list[float]]) -> list[Figure]:
    figures = []
    for kind, samples in (("decode", decode), ("prefill", prefill)):
        for name, seconds in samples.items():
            if name in SHOWN:
                figures.append(Figure(f"{kind} {name}", 1 / statistics.median(seconds), "tokens/s"))
    for kind, samples, least in (("decode", decode, 1.14), ("prefill", prefill, 2.0)):
        if "llama.cpp" in samples:
            ratio = _ratio(samples["llama.cpp"], samples["int4"])
            figures.append(at_least(f"{kind} int4 to llama.cpp", ratio, "x", least))
        pairs = [_ratio(samples["int4"], samples["int4 uncast"])]
        pairs += [_ratio(samples["int4 again"], samples["int4 uncast again"])]
        cost = 100 * (statistics.mean(pairs) - 1)
        figures.append(at_most(f"{kind} cost of materialising", cost, "%", 3))
    return figures


def _ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of neighbouring turns."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _python_overhead_s(checkpoint: Checkpoint, folder: Path) -> float:
    """Give what `step` adds to onnxruntime's own run of the same binding: medians on a stage of one block, in turns."""
    packed = pack(checkpoint, "int4", "f16", folder)
    spec = _spec(packed, 1, 1, CONTEXT_TOKENS)
    stage = OnnxStage.load(_graph(packed, spec, folder), list(packed.files.values()), spec)
    slot = stage.open()
    ids = np.array([7], np.int64)
    stage.step(slot, ids, 0)
    bare = stage.bare_run(slot, 1)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(2000):
        with _timed(ours, 1):
            stage.step(slot, ids, 0)
        with _timed(theirs, 1):
            bare(ids, 0)
    return statistics.median(ours) - statistics.median(theirs)


def _llama(path: Path, threads: int) -> Step | None:
    """Give llama.cpp on the same file, or None where it is not installed or the file is no GGUF."""
    if path.suffix != ".gguf":
        return None
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    model = Llama(
        str(path),
        n_ctx=CONTEXT_TOKENS,
        n_batch=CONTEXT_TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def step(ids: Any, position: int) -> None:
        model.n_tokens = position
        model.eval(ids.tolist())

    return step


def _llama_version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


if __name__ == "__main__":
    sys.exit(main())
