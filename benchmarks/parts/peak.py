"""One process that trains SmolLM2 or MiniLM for some steps and says what it took at its peak, beside what was foretold.

python -m benchmarks.parts.peak PRECISION|encoder ROWS TOKENS RANK MATRIX,... keep|again [ends|trunk]

The last word: the part of a split model that a board with data has, or the trunk of ENDS such boards.
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
from coordinator.rounds.bases import part_of
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageSpec
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.families.bert import BertConfig
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, PARTS, AdapterSpec, Config, Floats, flat, initial, length_of, shapes
from models.training.encoder import TrainedEncoder
from models.training.llama import TrainedStage
from models.training.memory import encoder_peak_bytes, ends_peak_bytes, peak_bytes, trunk_peak_bytes
from models.training.rounds import Round
from models.training.samples import Row, Split
from models.training.split import EndsRound, Question
from models.training.trunk import TrunkRound
from wire.messages import ArtifactRef, InboxAddress, Role, RoundMeta, TrainingTask

STEPS = 3
ENDS = 4
WHOLE = "blocks"
"""Instead of matrices: all weights of the blocks are trained."""
LABELS = tuple(f"label {number}" for number in range(30))


class Loaded(NamedTuple):
    stage: TrainedStage | TrainedEncoder
    config: Config
    foretold: int


def foretold_of(
    role: Role, config: Config, weight_bytes: int, spec: AdapterSpec, rows: int, tokens: int, remember: bool
) -> int:
    if role == "ends":
        return ends_peak_bytes(config, weight_bytes, spec, rows * tokens)
    if role == "trunk":
        return trunk_peak_bytes(config, weight_bytes, spec, rows * tokens, ENDS, remember)
    if isinstance(config, BertConfig):
        return encoder_peak_bytes(config, weight_bytes, spec, rows * tokens, remember)
    return peak_bytes(config, weight_bytes, spec, rows * tokens, remember)


def language_model(precision: str, spec: AdapterSpec, rows: int, tokens: int, remember: bool, role: Role) -> Loaded:
    packed = packed_model(precision)
    graph, config = packed.graph, packed.config
    part = part_of(packed, role)
    stage_spec = StageSpec(
        embedding=part.ends, head=part.ends, first_block=0, end_block=part.end_block, hidden=graph.hidden,
        vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=tokens, slots=1, threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        path.write_bytes(part.graph)
        _, manifest = load_graph(path, stage_spec)
    weights = map_weights(manifest.weights, list(part.files.values()))
    stage = TrainedStage(manifest, weights.tensors, spec, {} if role == "ends" else initial(config, spec), tokens)
    return Loaded(stage, config, foretold_of(role, config, part.weight_bytes, spec, rows, tokens, remember))


def encoder(spec: AdapterSpec, rows: int, tokens: int, remember: bool, role: Role) -> Loaded:
    source = resolve("minilm", cache_dir())
    folder = source if source.is_dir() else source.parent
    config, path = read_bert_config(folder), folder / "model.safetensors"
    factors = initial(config, spec)
    stage = TrainedEncoder(BertFile.open(config, path), spec, {HEAD: factors[HEAD]} if role == "ends" else factors)
    return Loaded(stage, config, foretold_of(role, config, path.stat().st_size, spec, rows, tokens, remember))


def run_ends(stage: Any, shaped: Any, rows: Split, task: TrainingTask, asked: RoundMeta) -> None:
    """With features as the trunk might give."""
    made, rng = EndsRound(stage, shaped, rows, task, 1, asked), np.random.default_rng(1)
    head = length_of(shaped, ("c",))
    while (question := made.question()) is not None:
        count, _, hidden = question.states.shape
        size = count * hidden if task.labels else question.states.size
        made.answered(rng.standard_normal(size + head).astype(np.float32))


def run_trunk(stage: Any, shaped: Any, task: TrainingTask, asked: RoundMeta, start: Floats, hidden: int) -> None:
    """With states as boards might send."""
    names, rng = [f"board{number}" for number in range(ENDS)], np.random.default_rng(1)
    made = TrunkRound(stage, shaped, task, asked, start, names)
    lengths = np.full(task.batch_rows, task.row_tokens, np.int64)
    while not made.over:
        step, sent = made.step, {}
        for name in names:
            states = rng.standard_normal((task.batch_rows, task.row_tokens, hidden)).astype(np.float32)
            features = made.forwards(name, Question(step, False, states, lengths), 1)
            assert features is not None
            sent[name] = np.zeros_like(features)
        for name, gradients in sent.items():
            made.take(name, step, gradients)
        while made.addable:
            made.backwards()
        made.make_step(made.square(0.0))
    made.vector()


def main(precision: str, rows: str, tokens: str, rank: str, matrices: str, keep: str, part: Role = "whole") -> None:
    torch.set_num_threads(1)
    assert worker.Trainee is not None  # a worker's imports are among what it takes
    labels, remember, count, length = LABELS if precision == "encoder" else (), keep == "keep", int(rows), int(tokens)
    named: Any = ("q", "v") if matrices == WHOLE else tuple(matrices.split(","))
    spec = AdapterSpec(
        rank=int(rank), alpha=2.0 * int(rank), matrices=named, labels=len(labels), blocks=matrices == WHOLE
    )
    if labels:
        stage, config, foretold = encoder(spec, count, length, remember, part)
    else:
        stage, config, foretold = language_model(precision, spec, count, length, remember, part)
    rng = np.random.default_rng(0)
    label = 1 if labels else None
    made = tuple(Row(rng.integers(0, config.vocabulary, length), 1, label) for _ in range(count))
    task = TrainingTask(
        data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=spec.rank, alpha=spec.alpha,
        matrices=spec.matrices, row_tokens=length, batch_rows=count, steps=STEPS, learning_rate=1e-4,
        most_norm=1.0, held_out=0.0, seed=1, remember=remember, labels=labels,
    )  # fmt: skip
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=PARTS if labels else ("a", "b"))
    shaped = shapes(config, spec)
    start = flat(initial(config, spec), shaped)
    if part == "ends":
        run_ends(stage, shaped, Split(made, ()), task, asked)
    elif part == "trunk":
        run_trunk(stage, shaped, task, asked, start, config.hidden)
    else:
        round_ = Round(stage, shaped, Split(made, ()), task, 1, asked, start)
        while round_.step():
            pass
        round_.vector()
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"foretold": foretold, "measured": measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
