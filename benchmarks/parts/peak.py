"""One process that trains SmolLM2 or MiniLM for some steps and says what it took at its peak, beside what was foretold.

python -m benchmarks.parts.peak PRECISION|encoder ROWS TOKENS RANK MATRIX,... keep|again
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agent.workers import training as worker
from benchmarks.parts.sites import packed_model
from models.build.stage import build_stage_graph
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageSpec
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import AdapterSpec, Config, flat, initial, shapes
from models.training.encoder import TrainedEncoder
from models.training.llama import TrainedStage
from models.training.memory import encoder_peak_bytes, peak_bytes
from models.training.rounds import Round, Trained
from models.training.samples import Row, Split
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, TrainingTask

STEPS = 3
LABELS = tuple(f"label {number}" for number in range(30))


class Loaded(NamedTuple):
    stage: Trained
    config: Config
    foretold: int


def language_model(precision: str, spec: AdapterSpec, rows: int, tokens: int, remember: bool) -> Loaded:
    packed = packed_model(precision)
    graph, config = packed.graph, packed.config
    stage_spec = StageSpec(
        embedding=True, head=True, first_block=0, end_block=graph.blocks, hidden=graph.hidden,
        vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=tokens, slots=1, threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.onnx"
        data = build_stage_graph(
            config, precision, graph.wire_dtype, first_block=0, end_block=graph.blocks, embedding=True, head=True
        )
        path.write_bytes(data)
        _, manifest = load_graph(path, stage_spec)
    weights = map_weights(manifest.weights, list(packed.files.values()))
    stage = TrainedStage(manifest, weights.tensors, spec, initial(config, spec), tokens)
    packed_bytes = sum(file.stat().st_size for file in packed.files.values())
    return Loaded(stage, config, peak_bytes(config, packed_bytes, spec, rows * tokens, remember))


def encoder(spec: AdapterSpec, rows: int, tokens: int, remember: bool) -> Loaded:
    source = resolve("minilm", cache_dir())
    folder = source if source.is_dir() else source.parent
    config, path = read_bert_config(folder), folder / "model.safetensors"
    stage = TrainedEncoder(BertFile.open(config, path), spec, initial(config, spec))
    return Loaded(stage, config, encoder_peak_bytes(config, path.stat().st_size, spec, rows * tokens, remember))


def main(precision: str, rows: str, tokens: str, rank: str, matrices: str, keep: str) -> None:
    torch.set_num_threads(1)
    assert worker.Trainee is not None  # a worker's imports are among what it takes
    labels, remember, count, length = LABELS if precision == "encoder" else (), keep == "keep", int(rows), int(tokens)
    named: Any = tuple(matrices.split(","))
    spec = AdapterSpec(rank=int(rank), alpha=2.0 * int(rank), matrices=named, labels=len(labels))
    if labels:
        stage, config, foretold = encoder(spec, count, length, remember)
    else:
        stage, config, foretold = language_model(precision, spec, count, length, remember)
    rng = np.random.default_rng(0)
    label = 1 if labels else None
    made = tuple(Row(rng.integers(0, config.vocabulary, length), 1, label) for _ in range(count))
    task = TrainingTask(
        data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=spec.rank, alpha=spec.alpha,
        matrices=spec.matrices, row_tokens=length, batch_rows=count, steps=STEPS, learning_rate=1e-4,
        most_norm=1.0, held_out=0.0, seed=1, remember=remember, labels=labels,
    )  # fmt: skip
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=("a", "b", "c") if labels else ("a", "b"))
    shaped = shapes(config, spec)
    round_ = Round(stage, shaped, Split(made, ()), task, 1, asked, flat(initial(config, spec), shaped))
    while round_.step():
        pass
    round_.vector()
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"foretold": foretold, "measured": measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
