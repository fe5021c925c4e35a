"""Our harness beside MLPerf's loadgen: the same step, which is hot; what is compared is the timing, not the pauses.

loadgen calls the step from its own thread, one query after the other (SingleStream), and writes its percentiles into a
summary. Twice compared: the very queries of loadgen, which our step times too, whatever else the machine does; and runs
of ours and of loadgen by turns, which agree where the machine is quiet.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from agent.workers.measuring import ModuleBench
from agent.workers.pipe import MeasureModule, MeasureTask
from hwprofiles.measure import StopRule, sample
from hwprofiles.probe.busy import Others
from models.build.kit import build_kit
from models.engine.onnx import OnnxStage
from models.families.config import LlamaConfig
from wire.messages import KitModule

QUERIES: Final = 200
"""A turn: a third of a second of steps of 1.5 ms, so that turns are shorter than the moods of a machine."""
RULE: Final = StopRule(
    target=0.0, min_samples=QUERIES, max_samples=QUERIES, time_budget_s=60.0, warmup_min=20, warmup_max=20
)
CONTEXT: Final = 16
SMOLLM2: Final = LlamaConfig(
    family="llama", blocks=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152, rms_eps=1e-5,
    rope_base=100_000.0, rope_interleaved=False, qkv_bias=False, qk_norm=False, tied_embeddings=True, max_context=8192,
)  # fmt: skip
_MEDIAN: Final = re.compile(r"^50\.00 percentile latency \(ns\)\s*:\s*([0-9]+)", re.MULTILINE)


class Compared(NamedTuple):
    """Ratios are ours over theirs, medians over the rounds."""

    version: str
    ours_s: float
    theirs_s: float
    by_turns: float
    same_queries: float
    others_share: float | None
    """Of the processor, used by other programs meanwhile."""


def compare_with_loadgen(rounds: int) -> Compared | str:
    """Medians of both, or why loadgen can't be had."""
    try:
        loadgen = import_module("mlperf_loadgen")
        name = f"mlcommons-loadgen {version('mlcommons-loadgen')}"
    except (ImportError, PackageNotFoundError) as error:
        return f"left out: {error}; pip install --no-deps --target DIR mlcommons-loadgen, and DIR in PYTHONPATH"
    with tempfile.TemporaryDirectory() as folder:
        step = block_step(Path(folder))
        others = Others()
        ours: list[float] = []
        theirs: list[Stream] = []
        for number in range(rounds):
            turns: list[Callable[[], None]] = [
                lambda: ours.append(median(sample(step, RULE).samples_s)),
                lambda: theirs.append(single_stream(loadgen, step, Path(folder))),
            ]
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
    by_turns = [mine / stream.median_s for mine, stream in zip(ours, theirs, strict=True)]
    same = [stream.seen_s / stream.median_s for stream in theirs]
    middle_s = median(stream.median_s for stream in theirs)
    return Compared(name, median(ours), middle_s, median(by_turns), median(same), others.share())


class Stream(NamedTuple):
    median_s: float
    """By loadgen."""
    seen_s: float
    """Median of what the step gave in the same queries."""


def block_step(folder: Path) -> Callable[[], float]:
    """A decode step through six blocks of SmolLM2, with weights made up."""
    entry = next(entry for entry in build_kit(SMOLLM2, "int4", "f16") if entry.kind == "block")
    stack = max(entry.graphs)
    path = folder / "block.onnx"
    path.write_bytes(entry.graphs[stack])
    module = KitModule(
        key=entry.key, kind="block", graphs=(), hidden=entry.hidden, vocabulary=entry.vocabulary,
        wire_dtype=entry.wire_dtype,
    )  # fmt: skip
    item = MeasureModule(module=module, graph_paths=((stack, str(path)),))
    task = MeasureTask(device="here", site="bench", modules=(item,), login=None, threads=1, speed=1.0)
    return ModuleBench(item, task, OnnxStage.load_synthetic, lambda: None).hot("decode", 1, CONTEXT)[1]


def single_stream(loadgen: Any, step: Callable[[], float], folder: Path) -> Stream:
    """A run of SingleStream."""
    seen: list[float] = []

    def issue(samples: list[Any]) -> None:
        for one in samples:
            seen.append(step())
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(one.id, 0, 0)])

    for _ in range(RULE.warmup_min):
        step()
    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.SingleStream
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = QUERIES
    settings.min_duration_ms = 0
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    logs = loadgen.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(1, 1, _nothing, _nothing)
    try:
        loadgen.StartTestWithLogSettings(system, library, settings, logs)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
    time.sleep(0.05)  # its files are written by a thread of its own
    found = _MEDIAN.search((folder / "mlperf_log_summary.txt").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError("loadgen wrote no median into its summary")
    return Stream(int(found[1]) / 1e9, median(seen))


def _nothing(indices: Any) -> None:
    """There is one query, and nothing to load for it."""
    del indices
