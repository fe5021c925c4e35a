"""What adapters cost a step: SmolLM2 in one process, with none, one, several and large ones in its graph.

Steps of all stages take turns, so that a machine that gets slower gets slower for all; ratios are of each turn with
that of the base.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from benchmarks.parts.sites import packed_model
from benchmarks.report import Figure
from models.build.pack import Packed
from models.build.stage import build_stage_graph
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
from models.formats import safetensors
from models.lora.adapter import MATRICES, AdapterSpec, peft_modules, shapes, to_peft
from models.lora.serving import CONFIG, TENSORS, keep, with_adapters

TURNS = 40
STEPS = 8
PROMPT = 32
KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "none": (0, 0, ()),
    "one of rank 8 on q and v": (1, 8, ("q", "v")),
    "four of rank 8 on q and v": (4, 8, ("q", "v")),
    "one of rank 16 on all matrices": (1, 16, MATRICES),
}
"""Adapters, their rank, their matrices."""


class Stepping:
    """A whole model that steps with the first of its adapters, if it has some."""

    def __init__(self, packed: Packed, folder: Path) -> None:
        graph = packed.graph
        spec = StageSpec(
            embedding=True, head=True, first_block=0, end_block=graph.blocks, hidden=graph.hidden,
            vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=1024, slots=1, threads=1,
        )  # fmt: skip
        path = folder / "whole.onnx"
        path.write_bytes(
            build_stage_graph(
                packed.config, graph.precision, graph.wire_dtype, first_block=0, end_block=graph.blocks,
                embedding=True, head=True, adapters=packed.adapters,
            )
        )  # fmt: skip
        self._engine = OnnxStage.load(path, list(packed.files.values()), spec)
        self._slot = self._engine.open(packed.adapters.ranks[0][0] if packed.adapters is not None else "")
        self._engine.step(self._slot, np.arange(1, PROMPT + 1), 0)

    def token_s(self) -> float:
        """Seconds per decode step behind the prompt, always the same ones."""
        began_s = time.perf_counter()
        for position in range(PROMPT, PROMPT + STEPS):
            self._engine.step(self._slot, np.array([7]), position)
        return (time.perf_counter() - began_s) / STEPS


def made_up(packed: Packed, count: int, rank: int, matrices: tuple[str, ...], folder: Path) -> Packed:
    """The model with adapters of random numbers."""
    ids = []
    for number in range(count):
        spec = AdapterSpec(rank=rank, alpha=2.0 * rank, matrices=matrices)  # type: ignore[arg-type]
        draw = np.random.default_rng(number)
        factors = {
            name: (0.01 * draw.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes(packed.config, spec).items()
        }
        source = folder / f"adapter{number}"
        source.mkdir()
        (source / TENSORS).write_bytes(safetensors.to_bytes(dict(to_peft(packed.config, factors)), {"format": "pt"}))
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2.0 * rank, "bias": "none"}
        settings.update(peft_modules(packed.config, spec))
        (source / CONFIG).write_bytes(msgspec.json.encode(settings))
        ids.append(keep(source, folder / "cache"))
    return with_adapters(packed, ids, folder / "cache") if ids else packed


def measure(precision: str = "int4") -> list[Figure]:
    base = packed_model(precision)
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as root:
        stages = {}
        for name, (count, rank, matrices) in KINDS.items():
            folder = Path(root) / name.replace(" ", "-")
            folder.mkdir()
            stages[name] = Stepping(made_up(base, count, rank, matrices, folder), folder)
        turns: dict[str, list[float]] = {name: [] for name in stages}
        for turn in range(TURNS):
            order = list(stages) if turn % 2 else list(stages)[::-1]
            for name in order:
                turns[name].append(stages[name].token_s())
    rows = [Figure("a step without adapters in the graph", median(turns["none"]) * 1e3, "ms")]
    for name in list(stages)[1:]:
        ratio = median(one / base_s for one, base_s in zip(turns[name], turns["none"], strict=True))
        rows.append(Figure(f"a step with adapters, {name} / without", ratio, "ratio"))
    return rows
