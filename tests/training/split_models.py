"""Models in two parts and in one piece, on the rows of several devices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models.build.pack import Packed
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, AdapterSpec, Config, Floats, flat, named, shapes, within
from models.training.encoder import TrainedEncoder
from models.training.llama import TrainedStage
from models.training.lowrank import ends_kind, trunk_kind
from models.training.rounds import BETAS
from models.training.samples import Batch, Row, Split, drawn
from models.training.trunk import Place, TrunkRound
from tests.models.stages import spec_of, stage_files
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, TrainingTask

NUMBER = 2
"""Of the round."""


class Halves(NamedTuple):
    """A model whole, its blocks cut into segments, and its ends (each device its own)."""

    config: Config
    spec: AdapterSpec
    whole: Any
    segments: tuple[Any, ...]
    cuts: tuple[int, ...]
    """First block of each segment, and the end of the last."""
    ends: dict[str, Any]

    @property
    def trunk(self) -> Any:
        [only] = self.segments
        return only

    def shaped_of(self, segment: int) -> dict[str, tuple[int, int]]:
        blocks = range(*self.cuts[segment : segment + 2])
        return within(self.shaped, blocks, segment == len(self.segments) - 1)

    @property
    def shaped(self) -> dict[str, tuple[int, int]]:
        return shapes(self.config, self.spec)


def llama(
    packed: Packed,
    folder: Path,
    spec: AdapterSpec,
    devices: tuple[str, ...],
    start: Mapping[str, Any],
    cuts: tuple[int, ...] = (),
) -> Halves:
    """`cuts`: blocks before which the trunk is cut."""
    blocks = packed.graph.blocks
    edges = (0, *cuts, blocks)

    def part(factors: Mapping[str, Any], first: int, end: int, ends: bool) -> TrainedStage:
        wanted = spec_of(packed, first, end, embedding=ends, head=ends)
        path, files = stage_files(packed, folder, wanted)
        _, manifest = load_graph(path, wanted)
        return TrainedStage(
            manifest, map_weights(manifest.weights, files).tensors, spec, factors, wanted.context_tokens
        )

    return Halves(
        packed.config, spec, part(start, 0, blocks, True),
        tuple(part(start, first, end, False) for first, end in itertools.pairwise(edges)), edges,
        {device: part({}, 0, 0, True) for device in devices},
    )  # fmt: skip


def bert(
    folder: Path, spec: AdapterSpec, devices: tuple[str, ...], start: Mapping[str, Any], cuts: tuple[int, ...] = ()
) -> Halves:
    """`cuts` as for `llama`."""
    config = read_bert_config(folder)
    edges = (0, *cuts, config.blocks)
    file = BertFile.open(config, folder / "model.safetensors")

    def segment(first: int, end: int) -> TrainedEncoder:
        blocks = range(first, end)
        shaped = within(shapes(config, spec), blocks, end == config.blocks)
        return TrainedEncoder(file, spec, {name: start[name] for name in shaped}, blocks)

    return Halves(
        config, spec, TrainedEncoder(file, spec, start), tuple(itertools.starmap(segment, itertools.pairwise(edges))),
        edges, {device: TrainedEncoder(file, spec, {HEAD: start[HEAD]}, range(0)) for device in devices},
    )  # fmt: skip


def task_of(spec: AdapterSpec, steps: int, batch_rows: int = 3, **changes: Any) -> TrainingTask:
    fields: dict[str, Any] = {
        "data": "d", "tokenizer": ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), "rank": spec.rank,
        "alpha": spec.alpha, "matrices": spec.matrices, "row_tokens": 64, "batch_rows": batch_rows, "steps": steps,
        "learning_rate": 0.01, "most_norm": 1.0, "held_out": 0.0, "seed": 3, "last_only": spec.last_only,
    }  # fmt: skip
    return TrainingTask(**{**fields, **changes})


def asked(parts: tuple[Any, ...] = ("a", "b", "c"), train: bool = True) -> RoundMeta:
    return RoundMeta(reply=InboxAddress(topic="t"), round=NUMBER, parts=parts, train=train)


class Together:
    """A round of devices with these rows, in this process."""

    def __init__(
        self, halves: Halves, rows: Mapping[str, Split], task: TrainingTask, start: Floats, parts: tuple[Any, ...]
    ) -> None:
        shaped = halves.shaped
        self.rows = rows
        factors, last = named(start, shaped), len(halves.segments) - 1
        self.segments = []
        for number, stage in enumerate(halves.segments):
            own, place = halves.shaped_of(number), Place(number == 0, number == last)
            kind = trunk_kind(task, place)
            self.segments.append(kind(stage, own, task, asked(parts), flat(factors, own), rows, place))
        self.ends = {
            device: ends_kind(task)(halves.ends[device], shaped, held, task, seed, asked(parts))
            for seed, (device, held) in enumerate(rows.items())
        }

    @property
    def trunk(self) -> TrunkRound:
        [only] = self.segments
        return only

    def vector(self) -> Floats:
        return np.concatenate([segment.vector() for segment in self.segments])

    def gradients(self) -> dict[str, Floats]:
        """Those that the last step was made with, as they were clipped."""
        leaves = {name: leaf for segment in self.segments for name, leaf in segment._leaves.items()}
        return {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}

    def judge(self) -> None:
        for device, end in self.ends.items():
            for _ in end._held_out:
                question = end.question()
                assert question is not None and question.judged
                for segment in self.segments:
                    made = segment.judged(device, question)
                    question = question._replace(states=made)
                assert end.answered(made) is None

    def step(self, order: tuple[str, ...] | None = None) -> float:
        """Make one step, boards in this order; gives the weighted loss."""
        before = {device: end._loss for device, end in self.ends.items()}
        for device in order or tuple(self.ends):
            question = self.ends[device].question()
            assert question is not None and not question.judged
            for segment in self.segments:
                made = segment.forwards(device, question, len(self.rows[device].trained))
                assert made is not None
                question = question._replace(states=made)
            gradients = self.ends[device].answered(made)
            assert gradients is not None
            assert self.segments[-1].take(device, question.step, gradients)
        square = 0.0
        for number in reversed(range(len(self.segments))):
            segment, step = self.segments[number], self.segments[number].step
            while segment.addable:
                device, gradient = segment.backwards()
                if gradient is not None:
                    assert self.segments[number - 1].take(device, step, gradient.reshape(-1))
            square = segment.square(square)
        for segment in self.segments:
            segment.make_step(square)
        losses = {device: end._loss - before[device] for device, end in self.ends.items()}
        return weighted(self.rows, losses)


class InOnePlace:
    """The same steps of the whole model, on the same batches."""

    def __init__(
        self,
        halves: Halves,
        rows: Mapping[str, Split],
        task: TrainingTask,
        start: Floats,
        parts: tuple[Any, ...],
        seeds: Mapping[str, int] | None = None,
        number: int = NUMBER,
    ) -> None:
        self.stage, self.rows, self.task, self.shaped, self.parts = halves.whole, rows, task, halves.shaped, parts
        self.seeds = seeds or {device: seed for seed, device in enumerate(rows)}
        self.number = number
        self.stage.take(named(start, self.shaped))
        self.stage.train_only(parts)
        self.leaves = {name: leaf for name, leaf in self.stage.factors.items() if name[-1] in parts}
        self.optimiser = torch.optim.AdamW(
            list(self.leaves.values()), lr=task.learning_rate, betas=BETAS, weight_decay=0.0
        )
        self.done = 0

    def step(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        total = sum(len(held.trained) for held in self.rows.values())
        loss = torch.zeros(())
        for device, held in self.rows.items():
            batch: Batch = drawn(held.trained, self.task.batch_rows, self.seeds[device], self.number, self.done)
            loss = loss + len(held.trained) / total * self.stage.loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), self.task.most_norm)
        self.optimiser.step()
        self.done += 1
        return float(loss.detach())

    def gradients(self) -> dict[str, Floats]:
        return {name: leaf.grad.numpy() for name, leaf in self.leaves.items()}

    def vector(self) -> Floats:
        factors = {name: leaf.detach().numpy() for name, leaf in self.stage.factors.items()}
        return flat(factors, self.shaped, self.parts)


def weighted(rows: Mapping[str, Split], losses: Mapping[str, float]) -> float:
    total = sum(len(held.trained) for held in rows.values())
    return sum(len(held.trained) / total * losses[device] for device, held in rows.items())


def rows_of(rng: np.random.Generator, count: int, vocabulary: int, labels: int, longest: int = 12) -> tuple[Row, ...]:
    """Of unequal length; with a label each if there are some."""
    found = []
    for number in range(count):
        ids = rng.integers(0, vocabulary, int(rng.integers(3, longest)))
        found.append(Row(ids.astype(np.int64), 1, number % labels if labels else None))
    return tuple(found)
