"""One process that trains SmolLM2 for some steps and says what it took at its peak, beside what was foretold.

python -m benchmarks.parts.peak PRECISION ROWS TOKENS RANK MATRIX,... keep|again
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from agent.workers import training as worker
from benchmarks.parts.sites import packed_model
from models.build.stage import build_stage_graph
from models.engine.base import StageSpec
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.lora.adapter import AdapterSpec, flat, initial, shapes
from models.training.llama import TrainedStage
from models.training.memory import peak_bytes
from models.training.rounds import Round
from models.training.samples import Row, Split
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, TrainingTask

STEPS = 3


def main(precision: str, rows: str, tokens: str, rank: str, matrices: str, keep: str) -> None:
    torch.set_num_threads(1)
    assert worker.Trainee is not None  # a worker's imports are among what it takes
    packed, remember = packed_model(precision), keep == "keep"
    graph, config = packed.graph, packed.config
    spec = AdapterSpec(rank=int(rank), alpha=2.0 * int(rank), matrices=tuple(matrices.split(",")))  # type: ignore[arg-type]
    stage_spec = StageSpec(
        embedding=True, head=True, first_block=0, end_block=graph.blocks, hidden=graph.hidden,
        vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=int(tokens), slots=1, threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.onnx"
        data = build_stage_graph(
            config, precision, graph.wire_dtype, first_block=0, end_block=graph.blocks, embedding=True, head=True
        )
        path.write_bytes(data)
        _, manifest = load_graph(path, stage_spec)
    weights = map_weights(manifest.weights, list(packed.files.values()))
    start = initial(config, spec)
    stage = TrainedStage(manifest, weights.tensors, spec, start, int(tokens))
    rng = np.random.default_rng(0)
    made = tuple(Row(rng.integers(0, graph.vocabulary, int(tokens)), 1) for _ in range(int(rows)))
    task = TrainingTask(
        data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=spec.rank, alpha=spec.alpha,
        matrices=spec.matrices, row_tokens=int(tokens), batch_rows=int(rows), steps=STEPS, learning_rate=1e-4,
        most_norm=1.0, held_out=0.0, seed=1, remember=remember,
    )  # fmt: skip
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=("a", "b"))
    shaped = shapes(config, spec)
    round_ = Round(stage, shaped, Split(made, ()), task, 1, asked, flat(start, shaped))
    while round_.step():
        pass
    round_.vector()
    packed_bytes = sum(file.stat().st_size for file in packed.files.values())
    foretold = peak_bytes(config, packed_bytes, spec, int(rows) * int(tokens), remember)
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"foretold": foretold, "measured": measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
