"""Stages made from checkpoints in a folder of the test's own, and rings of them in one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from models.build.pack import Packed, pack
from models.build.stage import build_stage_graph
from models.engine.base import Array, StageEngine, StageSpec
from models.engine.onnx import OnnxStage
from models.families.config import Family
from models.formats.checkpoint import Checkpoint, open_checkpoint
from tests.models.tiny import random_tensors, tiny_config, write_gguf, write_hf

WIRE_OF = {"f32": "f32", "int8": "f16", "int4": "f16"}


def tiny_checkpoint(
    folder: Path, family: Family = "llama", *, as_gguf: bool = False, seed: int = 0, **changes: Any
) -> Checkpoint:
    config = tiny_config(family, **changes)
    tensors = random_tensors(config, seed)
    if as_gguf:
        return open_checkpoint(write_gguf(folder / f"{family}.gguf", config, tensors, "F32"))
    return open_checkpoint(write_hf(folder / family, config, tensors))


def packed_tiny(
    folder: Path, family: Family = "llama", precision: str = "f32", wire: str = "", **options: Any
) -> Packed:
    return pack(tiny_checkpoint(folder, family, **options), precision, wire or WIRE_OF[precision], folder / "cache")


def stage_files(packed: Packed, folder: Path, spec: StageSpec) -> tuple[Path, list[Path]]:
    """Write the graph that belongs to `spec`, and give it with the stage's weight files."""
    graph = packed.graph
    parts = ("embedding",) * spec.embedding + ("head",) * spec.head
    data = build_stage_graph(
        packed.config,
        graph.precision,
        graph.wire_dtype,
        first_block=spec.first_block,
        end_block=spec.end_block,
        embedding=spec.embedding,
        head=spec.head,
        adapters=packed.adapters,
    )
    kind = graph.precision + ("" if packed.adapters is None else "-lora")
    path = folder / f"{kind}-{spec.first_block}-{spec.end_block}-{'-'.join(parts)}.onnx"
    path.write_bytes(data)
    names = [*parts, *(f"block.{index}" for index in range(spec.first_block, spec.end_block))]
    digests = dict.fromkeys(digest for name in names for digest in graph.module(name).artifacts)
    return path, [packed.files[digest] for digest in digests]


def spec_of(packed: Packed, first: int, end: int, **changes: Any) -> StageSpec:
    """A stage of blocks [first, end) with the embedding if it is the first and the head if it is the last."""
    settings: dict[str, Any] = {
        "embedding": first == 0,
        "head": end == packed.graph.blocks,
        "first_block": first,
        "end_block": end,
        "hidden": packed.graph.hidden,
        "vocabulary": packed.graph.vocabulary,
        "wire_dtype": packed.graph.wire_dtype,
        "context_tokens": 64,
        "slots": 2,
        "threads": 1,
    }
    return StageSpec(**(settings | changes))


def load_stage(packed: Packed, folder: Path, spec: StageSpec) -> OnnxStage:
    path, weights = stage_files(packed, folder, spec)
    return OnnxStage.load(path, weights, spec)


class Ring:
    """Stages one after another in one process: what the network does, without it. One request."""

    def __init__(self, stages: list[StageEngine]) -> None:
        self.stages = stages
        self.slots = [stage.open() for stage in stages]

    @classmethod
    def of(cls, packed: Packed, folder: Path, cuts: tuple[int, ...], **changes: Any) -> Ring:
        """`cuts` (1, 3) of 4 blocks are the stages [0, 1), [1, 3), [3, 4)."""
        bounds = pairwise((0, *cuts, packed.graph.blocks))
        return cls([load_stage(packed, folder, spec_of(packed, first, end, **changes)) for first, end in bounds])

    def step(self, tokens: Array, position: int, logits_rows: int = 1) -> Array:
        given: Array = tokens
        for stage, slot in zip(self.stages, self.slots, strict=True):
            given = stage.step(slot, given, position, logits_rows)
        return given

    def generate(self, prompt: Array, count: int) -> tuple[list[int], list[Array]]:
        """Greedy tokens, and the logits that each was drawn from."""
        logits = [self.step(prompt, 0).copy()]
        tokens = [int(np.argmax(logits[0]))]
        for position in range(len(prompt), len(prompt) + count - 1):
            logits.append(self.step(np.array(tokens[-1:], np.int64), position).copy())
            tokens.append(int(np.argmax(logits[-1])))
        return tokens, logits
