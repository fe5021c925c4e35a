"""What a job trains: a language model, or a sentence encoder under a task module, as boards are handed it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.rounds.adapters import most_held, spec_of
from coordinator.rounds.job import Job
from coordinator.shelf import ItemSource, Prepared
from models.build.pack import Packed
from models.build.stage import build_stage_graph
from models.families.bert import BertConfig
from models.families.features import FeatureConfig
from models.families.modalities import ModalitiesConfig
from models.formats.bert import BertFile, is_bert, read_bert_config
from models.lora.adapter import Config, Floats, flat, initial, shapes, sizes
from models.lora.whole import weights_of
from models.training.memory import (
    HELD_COPIES,
    connectors_peak_bytes,
    encoder_peak_bytes,
    ends_peak_bytes,
    head_peak_bytes,
    hub_peak_bytes,
    peak_bytes,
    shard_peak_bytes,
    trunk_peak_bytes,
)
from wire.errors import Refused, UsageError
from wire.messages import Role

ROLES: Final[tuple[Role, ...]] = ("whole", "ends", "trunk")
"""Whose weights are files; those of hubs and shards come with each round."""


class Part(Struct, frozen=True, kw_only=True):
    """Of a model, as an order names it."""

    graph: bytes
    """An encoder's is its configuration."""
    files: Mapping[str, Path]
    """Weights by digest."""
    ends: bool
    """Whether it has what goes before the blocks and behind them."""
    end_block: int
    first_block: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


class Base(Struct, frozen=True, kw_only=True):
    """Of one job."""

    config: Config
    parts: Mapping[Role, Part]
    tokenizer: bytes
    digest: str
    """Of the checkpoint."""
    end_id: int | None
    wire_dtype: str
    packed: Packed | None = None
    """Of a language model."""
    most_samples: int = 0
    """Whose features a board keeps, where a task module alone is trained."""
    working_bytes: int = 0
    """What it takes to compute them."""
    modalities: Mapping[str, Base] = {}
    """Of a job of several."""
    anchors: bytes = b""
    """Of its labels, [labels, width] float32, if something is trained by them."""

    def of(self, owned: Collection[str]) -> Base:
        """What a device with these modalities trains; all of it where there are none."""
        if not isinstance(self.config, ModalitiesConfig):
            return self
        mine = {name: base for name, base in self.modalities.items() if name in owned}
        return msgspec.structs.replace(self, config=self.config.of(owned), modalities=mine)

    def peak_bytes(self, job: Job, device: str, rows: int, remember: bool) -> int:
        """What a worker that has the whole model takes at most, as foretold, with so many samples at once."""
        weights = self.parts["whole"].weight_bytes
        spec, row_tokens = spec_of(job, device), job.rounds.row_tokens
        if isinstance(self.config, FeatureConfig):
            return head_peak_bytes(self.config, spec, rows, self.most_samples, self.working_bytes)
        if isinstance(self.config, ModalitiesConfig):
            kept = {name: base.most_samples for name, base in self.modalities.items()}
            working_bytes = max((base.working_bytes for base in self.modalities.values()), default=0)
            return connectors_peak_bytes(self.config, spec, rows, kept, working_bytes)
        held = HELD_COPIES * 4 * most_held(self.config, job)
        if isinstance(self.config, BertConfig):
            return held + encoder_peak_bytes(self.config, weights, spec, rows * row_tokens, remember)
        return held + peak_bytes(self.config, weights, spec, rows * row_tokens, remember)

    def ends_bytes(self, job: Job) -> int:
        """The same of one that has the ends of a split model."""
        tokens = job.step_rows * job.rounds.row_tokens
        assert not isinstance(self.config, FeatureConfig | ModalitiesConfig), (
            "coordinator.rounds.job refuses to split it"
        )
        lowrank, weights, rows = job.uplink_grad == "lowrank", self.parts["ends"].weight_bytes, job.rounds.batch_rows
        if job.privacy is not None and not job.privacy.losses:
            rows = 1  # samples one by one; losses are of batches
        said_tokens = rows * job.rounds.row_tokens
        return ends_peak_bytes(self.config, weights, spec_of(job), tokens, lowrank, said_tokens)

    def trunk_bytes(self, job: Job, ends: int, remember: bool, blocks: int | None = None) -> int:
        """The same of one that has all blocks, or so many, for so many of those."""
        tokens, weights = job.step_rows * job.rounds.row_tokens, self.parts["trunk"].weight_bytes
        assert not isinstance(self.config, FeatureConfig | ModalitiesConfig), (
            "coordinator.rounds.job refuses to split it"
        )
        lowrank = job.uplink_grad == "lowrank"
        return trunk_peak_bytes(self.config, weights, spec_of(job), tokens, ends, remember, blocks, lowrank)

    def hub_bytes(self, job: Job, ends: int, shards: int) -> int:
        """The same of the hub of one block that stands at every depth."""
        tokens = job.rounds.batch_rows * job.rounds.row_tokens
        return hub_peak_bytes(bert_of(self.config), spec_of(job), tokens, ends, shards)

    def shard_bytes(self, job: Job, heads: int, columns: int) -> int:
        """The same of a shard with so many."""
        tokens = job.rounds.batch_rows * job.rounds.row_tokens
        return shard_peak_bytes(bert_of(self.config), heads, columns, tokens, job.rounds.row_tokens)

    def part_of_block(self) -> Part:
        """What a hub or a shard is handed."""
        config = bert_of(self.config)
        return Part(graph=msgspec.json.encode(config), files={}, ends=False, end_block=config.blocks)

    def initial(self, job: Job) -> Floats:
        """What the first round begins with; raises CorruptData. Takes a moment: for a thread."""
        spec = spec_of(job)
        if job.begins == "fresh":
            return flat(initial(self.config, spec), shapes(self.config, spec), ("c",))  # nothing was learnt yet
        begun = initial(self.config, spec)
        if spec.blocks and isinstance(self.config, BertConfig):
            [path] = self.parts["whole"].files.values()
            begun.update(weights_of(BertFile.open(self.config, path)))
        return flat(begun, shapes(self.config, spec))

    def segment(self, first_block: int, end_block: int) -> Part:
        """What of the trunk a device with these blocks is handed."""
        if self.packed is not None:
            return part_of(self.packed, "trunk", first_block, end_block)
        return msgspec.structs.replace(self.parts["trunk"], first_block=first_block, end_block=end_block)


def base_of(prepared: Prepared, job: Job) -> Base:
    """Raises UsageError where model and job don't go together, Refused for a model that can't be trained, CorruptData
    and UsageError for what can't be read. Takes a moment: for a thread."""
    packed, source = prepared.packed, prepared.checkpoint
    if isinstance(packed, Packed) and not isinstance(source, ItemSource):
        base = Base(
            config=packed.config,
            parts={role: part_of(packed, role) for role in ROLES},
            tokenizer=prepared.tokenizer.to_json().encode(),
            digest=source.digest,
            end_id=source.eos_id,
            wire_dtype=packed.graph.wire_dtype,
            packed=packed,
        )
    elif isinstance(source, ItemSource) and source.words is not None and is_bert(source.folder):
        config = read_bert_config(source.folder)
        base = Base(
            config=config,
            parts={
                role: Part(
                    graph=msgspec.json.encode(config),
                    files={source.digest: source.folder / "model.safetensors"},
                    ends=role != "trunk",
                    end_block=0 if role == "ends" else config.blocks,
                )
                for role in ROLES
            },
            tokenizer=source.words.to_json().encode(),
            digest=source.digest,
            end_id=None,
            wire_dtype="f32",
        )
    else:
        raise Refused(
            f"{prepared.name} is no language model of the Llama family, and no sentence encoder of the Bert family",
            try_="edgelam model list",
        )
    _check(prepared.name, base.config, job)
    return base


def bert_of(config: Config) -> BertConfig:
    """Of a job that no language model has."""
    assert isinstance(config, BertConfig)
    return config


def _check(name: str, config: Config, job: Job) -> None:
    problems = []
    if isinstance(config, BertConfig) and not job.labels:
        problems.append(f"labels: missing; {name} is a sentence encoder, which learns which of some labels a text has")
    if not isinstance(config, BertConfig) and job.labels:
        problems.append(f"labels: {name} is a language model, which learns to say a text")
    for matrix in job.adapter.matrices:
        try:
            sizes(config, matrix)
        except KeyError:
            problems.append(f"adapter.matrices: {name} has no {matrix!r}")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UsageError(f"job {job.name}:{lines}", try_="docs/tuning.md lists the keys")
    config.check_context(job.rounds.row_tokens)


def part_of(packed: Packed, role: Role, first_block: int = 0, end_block: int | None = None) -> Part:
    """What of a language model a device with this role is handed; of a trunk, these blocks or all."""
    graph, ends = packed.graph, role != "trunk"
    last = graph.blocks if end_block is None else end_block
    blocks = range(first_block, 0 if role == "ends" else last)
    of_blocks = [module for module in graph.modules if module.kind == "block"][blocks.start : blocks.stop]
    modules = [*of_blocks, *(module for module in graph.modules if ends and module.kind != "block")]
    digests = {digest for module in modules for digest in module.artifacts}
    made = build_stage_graph(
        packed.config, graph.precision, graph.wire_dtype,
        first_block=blocks.start, end_block=blocks.stop, embedding=ends, head=ends,
    )  # fmt: skip
    files = {digest: packed.files[digest] for digest in digests}
    return Part(graph=made, files=files, ends=ends, first_block=blocks.start, end_block=blocks.stop)
