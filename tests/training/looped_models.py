"""Encoders of which one block stands at every depth: in shards, and in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, AdapterSpec, Floats, flat, initial, named, shapes
from models.lora.looped import FIRST, joined, part_of, shapes_of_hub, shapes_of_shard
from models.lora.whole import weights_of
from models.training.encoder import TrainedEncoder
from models.training.looped import Hub, Shard
from models.training.looping import HubRound, ShardRound
from models.training.samples import Split
from models.training.split import EndsRound
from tests.training.split_models import Halves, asked, weighted
from wire.messages import TrainingTask
from wire.shares import Share

PARTS = ("w", "c")


def shares_of(heads: Sequence[int], columns: Sequence[int]) -> tuple[Share, ...]:
    """So many for each shard."""
    found, head, column = [], 0, 0
    for many, wide in zip(heads, columns, strict=True):
        found.append(Share(first_head=head, end_head=head + many, first_column=column, end_column=column + wide))
        head, column = head + many, column + wide
    return tuple(found)


class OneBlock(dict[str, Any]):
    """Factors by name, where each block's are those of the first."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(_first(name))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(_first(name), default)


def _first(name: str) -> str:
    return FIRST + name.split(".", 2)[2] if name.startswith("block.") else name


class Looped:
    """A model in shards, each device with data with its own ends, and whole."""

    def __init__(self, folder: Path, spec: AdapterSpec, shares: Sequence[Share], devices: Sequence[str]) -> None:
        self.config = read_bert_config(folder)
        self.spec = msgspec.structs.replace(spec, blocks=True, looped=True)
        self.shares = tuple(shares)
        self.shaped = shapes(self.config, self.spec)
        self.file = BertFile.open(self.config, folder / "model.safetensors")
        begun = {**initial(self.config, self.spec), **weights_of(self.file)}
        # Not of zeros: balanced labels would have gradients of rounding alone, of which Adam makes whole steps.
        begun[HEAD] = np.random.default_rng(8).normal(0, 0.3, begun[HEAD].shape).astype(np.float32)
        self.start: Floats = flat(begun, self.shaped)
        self.shaped_of = [shapes_of_hub(self.shaped), *(shapes_of_shard(self.config, one) for one in shares)]
        weights = self.parts_of(self.start)
        self.hub = Hub(self.config, weights[0])
        self.shards = [Shard(self.config, one, part) for one, part in zip(shares, weights[1:], strict=True)]
        self.ends = {device: TrainedEncoder(self.file, spec, {HEAD: begun[HEAD]}, range(0)) for device in devices}

    def parts_of(self, vector: Floats) -> list[dict[str, Floats]]:
        """Of the hub, and of each shard."""
        weights = named(vector, self.shaped)
        return [part_of(self.config, weights, None), *(part_of(self.config, weights, one) for one in self.shares)]

    def vectors_of(self, vector: Floats) -> list[Floats]:
        parts = self.parts_of(vector)
        return [flat(part, shaped) for part, shaped in zip(parts, self.shaped_of, strict=True)]

    def joined(self, vectors: Sequence[Floats]) -> Floats:
        parts = [named(vector, shaped) for vector, shaped in zip(vectors, self.shaped_of, strict=True)]
        return flat(joined(parts), self.shaped)

    @property
    def whole(self) -> Halves:
        """For InOnePlace."""
        begun = named(self.start, self.shaped)
        stage = TrainedEncoder(self.file, self.spec, begun)
        stage.factors = OneBlock(stage.factors)
        return Halves(self.config, self.spec, stage, (), (), {})


class LoopedTogether:
    """A round of devices with these rows, in this process."""

    def __init__(self, looped: Looped, rows: Mapping[str, Split], task: TrainingTask) -> None:
        self.looped, self.rows = looped, rows
        vectors, meta = looped.vectors_of(looped.start), asked(PARTS)
        loops = looped.config.blocks
        self.hub = HubRound(looped.hub, looped.shaped_of[0], task, meta, vectors[0], rows, loops)
        self.shards = [
            ShardRound(stage, shaped, task, meta, start)
            for stage, shaped, start in zip(looped.shards, looped.shaped_of[1:], vectors[1:], strict=True)
        ]
        self.ends = {
            device: EndsRound(looped.ends[device], looped.shaped, held, task, seed, meta)
            for seed, (device, held) in enumerate(rows.items())
        }
        self.turns = 0

    def through(self) -> Floats | None:
        """All turns of what is under way."""
        made = None
        while self.hub.busy:
            want = self.hub.wanted
            self.turns += 1
            made = self.hub.answered(
                [one.answer(want.part, want.backwards, want.values.copy(), want.lengths) for one in self.shards]
            )
        return made

    def judge(self) -> None:
        for device, end in self.ends.items():
            for _ in end._held_out:
                question = end.question()
                assert question is not None and question.judged
                assert self.hub.begin(device, question, 0)
                made = self.through()
                assert made is not None and end.answered(made) is None

    def step(self, order: Sequence[str] = ()) -> float:
        """Make one step, boards in this order; gives the weighted loss."""
        before = {device: end._loss for device, end in self.ends.items()}
        for device in order or tuple(self.ends):
            question = self.ends[device].question()
            assert question is not None and not question.judged
            assert self.hub.begin(device, question, len(self.rows[device].trained))
            made = self.through()
            assert made is not None
            gradients = self.ends[device].answered(made)
            assert gradients is not None
            assert self.hub.take(device, question.step, gradients)
        while self.hub.addable:
            self.hub.begin_back()
            assert self.through() is None
        square = self.hub.square([one.square() for one in self.shards])
        for one in (self.hub, *self.shards):
            one.make_step(square)
        losses = {device: end._loss - before[device] for device, end in self.ends.items()}
        return weighted(self.rows, losses)

    def vector(self) -> Floats:
        return self.looped.joined([self.hub.vector(), *(one.vector() for one in self.shards)])
