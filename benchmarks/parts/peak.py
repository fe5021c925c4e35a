"""One process that trains SmolLM2 or MiniLM for some steps and says what it took at its peak, beside what was foretold.

python -m benchmarks.parts.peak PRECISION|encoder ROWS TOKENS RANK MATRIX,... keep|again [PART [lowrank|DEPTH]]

MATRIX,...: also `last:MATRIX,...`, of the last block alone, or `blocks`. PART: of a split model `ends`, which a board
with data has, or `trunk`, for ENDS of those; of one block at every depth `hub`, or `shard`, one of SHARDS. The last
word: that gradients go by a low-rank matrix, or how deep the model is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
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
from models.families.features import FeatureConfig
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, PARTS, AdapterSpec, Config, Floats, flat, initial, length_of, shapes
from models.lora.looped import shapes_of_hub, shapes_of_shard
from models.training.encoder import TrainedEncoder
from models.training.llama import TrainedStage
from models.training.looped import Hub, Shard
from models.training.looping import HubRound, ShardRound
from models.training.lowrank import LowRankCut, ends_kind, trunk_kind
from models.training.memory import (
    encoder_peak_bytes,
    ends_peak_bytes,
    hub_peak_bytes,
    peak_bytes,
    shard_peak_bytes,
    trunk_peak_bytes,
)
from models.training.rounds import Round
from models.training.samples import Row, Split
from models.training.split import Question
from models.training.trunk import Place
from wire.messages import ArtifactRef, InboxAddress, Role, RoundMeta, TrainingTask
from wire.shares import PartOfBlock, Share

STEPS = 3
ENDS = 4
BOARDS = tuple(f"board{number}" for number in range(ENDS))
SHARDS = 2
LAST = "last:"
WHOLE = "blocks"
"""Instead of matrices: all weights of the blocks are trained."""
LABELS = tuple(f"label {number}" for number in range(30))


class Loaded(NamedTuple):
    stage: TrainedStage | TrainedEncoder
    config: Config
    foretold: int


class Work(NamedTuple):
    """What a process does."""

    spec: AdapterSpec
    task: TrainingTask
    asked: RoundMeta
    role: Role

    @property
    def tokens(self) -> int:
        return self.task.batch_rows * self.task.row_tokens

    @property
    def lowrank(self) -> bool:
        return self.task.uplink_grad == "lowrank"

    def foretold(self, config: Config, weight_bytes: int) -> int:
        spec, tokens, remember = self.spec, self.tokens, self.task.remember
        assert not isinstance(config, FeatureConfig)
        if self.role == "ends":
            return ends_peak_bytes(config, weight_bytes, spec, tokens, self.lowrank)
        if self.role == "trunk":
            return trunk_peak_bytes(config, weight_bytes, spec, tokens, ENDS, remember, None, self.lowrank)
        if isinstance(config, BertConfig):
            return encoder_peak_bytes(config, weight_bytes, spec, tokens, remember)
        return peak_bytes(config, weight_bytes, spec, tokens, remember)


def language_model(precision: str, work: Work) -> Loaded:
    packed = packed_model(precision)
    graph, config, tokens = packed.graph, packed.config, work.task.row_tokens
    part = part_of(packed, work.role)
    stage_spec = StageSpec(
        embedding=part.ends, head=part.ends, first_block=0, end_block=part.end_block, hidden=graph.hidden,
        vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=tokens, slots=1, threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        path.write_bytes(part.graph)
        _, manifest = load_graph(path, stage_spec)
    weights = map_weights(manifest.weights, list(part.files.values()))
    factors = {} if work.role == "ends" else initial(config, work.spec)
    stage = TrainedStage(manifest, weights.tensors, work.spec, factors, tokens)
    return Loaded(stage, config, work.foretold(config, part.weight_bytes))


def encoder(work: Work) -> Loaded:
    config, path = encoder_file()
    factors = initial(config, work.spec)
    held = {HEAD: factors[HEAD]} if work.role == "ends" else factors
    stage = TrainedEncoder(BertFile.open(config, path), work.spec, held)
    return Loaded(stage, config, work.foretold(config, path.stat().st_size))


def encoder_file() -> tuple[BertConfig, Path]:
    source = resolve("minilm", cache_dir())
    folder = source if source.is_dir() else source.parent
    return read_bert_config(folder), folder / "model.safetensors"


def run_whole(loaded: Loaded, rows: Split, work: Work) -> None:
    shaped = shapes(loaded.config, work.spec)
    start = flat(initial(loaded.config, work.spec), shaped)
    made = Round(loaded.stage, shaped, rows, work.task, 1, work.asked, start)
    while made.step():
        pass
    made.vector()


def run_ends(loaded: Loaded, rows: Split, work: Work) -> None:
    """With features as the trunk might give."""
    shaped, rng = shapes(loaded.config, work.spec), np.random.default_rng(1)
    made = ends_kind(work.task)(loaded.stage, shaped, rows, work.task, 1, work.asked)
    while (question := made.question()) is not None:
        count, tokens, hidden = question.states.shape
        behind = length_of(shaped, ("c",))
        if work.lowrank:
            behind = LowRankCut(shaped, work.task, work.asked.parts).length_behind(count * tokens, question.step)
        size = count * hidden if work.task.labels else question.states.size
        made.answered(rng.standard_normal(size + behind).astype(np.float32))


def run_trunk(loaded: Loaded, work: Work) -> None:
    """With states as boards might send."""
    task, shaped, rng = work.task, shapes(loaded.config, work.spec), np.random.default_rng(1)
    start = flat(initial(loaded.config, work.spec), shaped)
    made = trunk_kind(task, Place())(loaded.stage, shaped, task, work.asked, start, BOARDS)
    while not made.over:
        step, sent = made.step, {}
        for name in BOARDS:
            features = made.forwards(name, Question(step, False, *states_of(rng, task, loaded.config.hidden)), 1)
            assert features is not None
            due = len(features)
            if work.lowrank:
                due = LowRankCut(shaped, task, work.asked.parts).length_back(work.tokens)
            sent[name] = np.zeros(due, np.float32)
        for name, gradients in sent.items():
            made.take(name, step, gradients)
        while made.addable:
            made.backwards()
        made.make_step(made.square(0.0))
    made.vector()


def states_of(rng: np.random.Generator, task: TrainingTask, hidden: int) -> tuple[Floats, Any]:
    """Of a batch, and how long its texts are."""
    states = rng.standard_normal((task.batch_rows, task.row_tokens, hidden), np.float32)
    return states, np.full(task.batch_rows, task.row_tokens, np.int64)


def run_hub(config: BertConfig, work: Work) -> int:
    """With states as boards might send, and answers as shards might; gives what is foretold."""
    task, shaped, rng = work.task, shapes_of_hub(shapes(config, work.spec)), np.random.default_rng(1)
    begun = {name: np.zeros(shape, np.float32) for name, shape in shaped.items()}
    made = HubRound(Hub(config, begun), shaped, task, work.asked, flat(begun, shaped), BOARDS, config.blocks)

    def through() -> Floats | None:
        found = None
        while made.busy:
            asked = np.ascontiguousarray(made.wanted.values, np.float32)
            shape = asked.shape[-3:]
            found = made.answered([rng.standard_normal(shape, np.float32) for _ in range(SHARDS)])
        return found

    while not made.over:
        step = made.step
        for name in BOARDS:
            made.begin(name, Question(step, False, *states_of(rng, task, config.hidden)), 1)
            features = through()
            assert features is not None
            made.take(name, step, np.zeros_like(features))
        while made.addable:
            made.begin_back()
            through()
        made.make_step(made.square([0.0] * SHARDS))
    made.vector()
    return hub_peak_bytes(config, work.spec, work.tokens, ENDS, SHARDS)


def run_shard(config: BertConfig, work: Work) -> int:
    """With turns as a hub might ask; gives what is foretold."""
    heads, columns = config.num_attention_heads // SHARDS, config.intermediate_size // SHARDS
    share = Share(first_head=0, end_head=heads, first_column=0, end_column=columns)
    task, shaped, rng = work.task, shapes_of_shard(config, share), np.random.default_rng(1)
    begun = {name: np.zeros(shape, np.float32) for name, shape in shaped.items()}
    made = ShardRound(Shard(config, share, begun), shaped, task, work.asked, flat(begun, shaped))
    turns: tuple[PartOfBlock, ...] = ("attention", "feed-forward")
    while not made.over:
        for back in (False, True):
            for part in turns * (config.blocks * ENDS):
                values, lengths = states_of(rng, task, config.hidden)
                made.answer(part, back, np.stack([values, values]) if back else values, lengths)
        made.make_step(made.square())
    made.vector()
    return shard_peak_bytes(config, heads, columns, work.tokens, task.row_tokens)


def work_of(rows: str, tokens: str, rank: str, matrices: str, keep: str, part: Role, more: str, labels: Any) -> Work:
    last, blocks = matrices.startswith(LAST), matrices == WHOLE
    named: Any = ("q", "v") if blocks else tuple(matrices.removeprefix(LAST).split(","))
    spec = AdapterSpec(
        rank=int(rank), alpha=2.0 * int(rank), matrices=named, labels=len(labels), blocks=blocks, last_only=last,
        looped=part in ("hub", "shard"),
    )  # fmt: skip
    task = TrainingTask(
        data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=spec.rank, alpha=spec.alpha,
        matrices=spec.matrices, row_tokens=int(tokens), batch_rows=int(rows), steps=STEPS, learning_rate=1e-4,
        most_norm=1.0, held_out=0.0, seed=1, remember=keep == "keep", labels=labels, last_only=last,
        uplink_grad="lowrank" if more == "lowrank" else "cut",
    )  # fmt: skip
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=PARTS if labels else ("a", "b"))
    return Work(spec, task, asked, part)


def main(
    precision: str, rows: str, tokens: str, rank: str, matrices: str, keep: str, part: Role = "whole", more: str = ""
) -> None:
    torch.set_num_threads(1)
    assert worker.Trainee is not None  # a worker's imports are among what it takes
    labels = LABELS if precision == "encoder" else ()
    work = work_of(rows, tokens, rank, matrices, keep, part, more, labels)
    if part in ("hub", "shard"):
        config, _ = encoder_file()
        config = msgspec.structs.replace(config, num_hidden_layers=int(more)) if more else config
        foretold = (run_hub if part == "hub" else run_shard)(config, work)
    else:
        loaded = encoder(work) if labels else language_model(precision, work)
        foretold = loaded.foretold
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, loaded.config.vocabulary, work.task.row_tokens) for _ in range(work.task.batch_rows)]
        held = Split(tuple(Row(of_row, 1, 1 if labels else None) for of_row in ids), ())
        if part == "trunk":
            run_trunk(loaded, work)
        else:
            (run_ends if part == "ends" else run_whole)(loaded, held, work)
    print(json.dumps({"foretold": foretold, "measured": peak_bytes_of_this()}))


def peak_bytes_of_this() -> int:
    """VmHWM: what getrusage tells begins with the peak of who started this."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
