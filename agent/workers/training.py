"""The worker that trains on this device's data: `python -m agent.workers.training`, its assignment as the first line on
stdin. The loop is that of agent.workers.inference; what it does in a round is in agent.workers.roundwork."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import msgspec
import numpy as np
import torch
from msgspec import Struct

from agent.workers.answering import Model
from agent.workers.child import Parent
from agent.workers.connectedwork import ConnectedWork, anchors_of, features_of_modalities, split_of_modalities
from agent.workers.endswork import EndsWork
from agent.workers.frozen import FrozenNet
from agent.workers.hubwork import HubWork
from agent.workers.inference import Say, StageWorker, check_memory, done, hold_stage, spec_of
from agent.workers.ledger import Ledger
from agent.workers.own import ADAPTERS, OwnFactors
from agent.workers.pipe import Assignment, Status
from agent.workers.roundwork import RoundWork
from agent.workers.shardwork import ShardWork
from agent.workers.trunkwork import TrunkWork
from agent.workers.work import Work
from hwprofiles.measure import resident_bytes
from models.engine.base import EngineFailed
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.families.bert import BertConfig
from models.families.config import LlamaConfig
from models.families.features import FeatureConfig
from models.families.modalities import ModalitiesConfig
from models.formats.bert import BertFile
from models.lora.adapter import HEAD, AdapterSpec, Config, Floats, initial, shapes, within
from models.lora.files import adapter_files
from models.lora.looped import shapes_of_hub, shapes_of_shard
from models.lora.serving import PROVENANCE
from models.training.computer import Computer, choose
from models.training.connectors import TrainedConnectors
from models.training.data import BadRow, Sample, read
from models.training.encoder import TrainedEncoder
from models.training.features import image_features, series_features
from models.training.heads import TrainedHead
from models.training.llama import TrainedStage
from models.training.looped import Hub, Shard
from models.training.samples import Row, Split, encoder_of, labelled_rows, rows_of, split
from models.training.trunk import Learner
from wire.errors import CorruptData
from wire.messages import ArtifactRef, EngineName, StageOrder, TrainingTask
from wire.modalities import Connected
from wire.transport import Transport
from wire.version import VERSION

Shapes = Mapping[str, tuple[int, int]]

SAID_EVERY_S: Final = 1.0
"""How far features are."""
LEDGERS: Final = "privacy"
"""In a board's state folder."""
MAX_TOKENIZER_BYTES: Final = 256 * 1024 * 1024


class Trainee(Struct, frozen=True, eq=False, kw_only=True):
    """A model with factors, and the rows of this device."""

    stage: Learner | Hub | Shard
    shaped: Shapes
    rows: Split
    bad_rows: int
    fingerprint: str
    """Of model, rows, software, and what computes with how many threads: what a round comes to depends on them."""
    ledger: Ledger
    computer: Computer = Computer()
    own: OwnFactors | None = None
    """Factors that stay here, in a job with such."""

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} {self.computer.name}"

    @property
    def held_bytes(self) -> int:
        return resident_bytes()


def main() -> int:
    return hold_stage(load, TrainingWorker)


def load(assignment: Assignment, say: Say = lambda _: None) -> Trainee:
    """Load model and data, to compute on the board's GPU or its processor. Raises EngineFailed, CorruptData,
    UsageError."""

    def trying(name: EngineName) -> None:
        say(Status(phase="loading", epoch=assignment.order.epoch, trying=name))

    # An emulated board is made out to be slower or smaller than a GPU is.
    whole = assignment.speed == 1.0 and not assignment.memory_limit_bytes
    computer = choose(assignment.gpu and whole, assignment.crashed, trying)
    return msgspec.structs.replace(_loaded(assignment, computer, say), computer=computer)


def _loaded(assignment: Assignment, computer: Computer, say: Say) -> Trainee:
    order, task = assignment.order, assignment.order.training
    if task is None:
        raise EngineFailed("the order says nothing of what to train")
    torch.set_num_threads(assignment.threads)
    ledger = Ledger(Path(assignment.state_path) / LEDGERS, task.data, assignment.most_epsilon)
    if task.role not in ("whole", "ends"):
        make = _part_of_block if task.role != "trunk" else _encoder if task.labels else _language_model
        stage, shaped = make(assignment, task)
        check_memory(assignment)
        return Trainee(stage=stage, shaped=shaped, rows=Split((), ()), bad_rows=0, fingerprint="", ledger=ledger)
    say(Status(phase="loading", epoch=order.epoch, detail="reading the data"))
    if task.connected is not None:
        return _connected(assignment, task, task.connected, ledger, say)
    if task.series is not None or task.images is not None:
        return _on_features(assignment, task, ledger, computer, say)
    data = read(Path(assignment.data_path))
    rows = _rows(assignment, task, data.samples)
    bad_rows = data.bad_rows + len(data.samples) - len(rows)
    _check_bad_rows(task, bad_rows, data.said, "too short a text, or without one of the labels")
    stage, shaped = (_encoder if task.labels else _language_model)(assignment, task)
    private = task.privacy is not None
    trainee = Trainee(
        stage=stage,
        shaped=shaped,
        rows=split(rows, task.held_out, task.seed),
        bad_rows=0 if private else bad_rows,
        fingerprint=fingerprint_of(rows, assignment.threads, [order.graph, *order.weights], computer=computer.name),
        ledger=ledger,
        own=_own_factors(assignment, task, shaped) if task.begins == "own-b" else None,
    )
    check_memory(assignment)
    return trainee


def _own_factors(assignment: Assignment, task: TrainingTask, shaped: Shapes) -> OwnFactors:
    """In the folder of the job, with what says of what model they are."""
    order = assignment.order
    kind: type[BertConfig | LlamaConfig] = BertConfig if task.labels else LlamaConfig
    config = msgspec.json.decode(order.config, type=kind)
    told = {
        "schema": "edgelam.adapter/1", "edgelam": VERSION, "job": order.deployment, "device": assignment.device,
        "b": "this board's own; it was never sent",
    }  # fmt: skip

    def files(factors: Mapping[str, Floats]) -> dict[str, bytes]:
        made = adapter_files(config, _spec(task), order.model, factors, task.labels)
        return {**made, PROVENANCE: msgspec.json.format(msgspec.json.encode(told))}

    return OwnFactors(Path(assignment.state_path) / ADAPTERS / order.deployment, order.epoch, shaped, files)


def _on_features(assignment: Assignment, task: TrainingTask, ledger: Ledger, computer: Computer, say: Say) -> Trainee:
    """Of samples whose features are computed here, once."""
    order, private, told = assignment.order, task.privacy is not None, _sometimes(assignment, say)
    path = Path(assignment.data_path)
    if task.images is not None:
        net = FrozenNet.load(assignment.graph_path, assignment.weight_paths, task.images.pool, assignment.threads)
        made = image_features(path, task.images, task.labels, task.seed, net, private, told)
    elif task.series is not None:
        made = series_features(path, task.series, task.labels, task.seed, private, told)
    else:
        raise EngineFailed("an order that says nothing of its samples")
    _check_bad_rows(task, made.bad_rows, made.said, "none of the job's labels")
    spec, config = _spec(task), FeatureConfig(hidden=made.values.shape[1])
    trainee = Trainee(
        # It has no parts; the coordinator gives nobody a part of one.
        stage=cast(Learner, TrainedHead(made.values, initial(config, spec)[HEAD])),
        shaped=shapes(config, spec),
        rows=made.split(task.held_out, task.seed),
        bad_rows=0 if private else made.bad_rows,
        fingerprint=fingerprint_of(
            made.rows, assignment.threads, [order.graph, *order.weights], made.values, computer.name
        ),
        ledger=ledger,
    )
    check_memory(assignment)
    return trainee


def _connected(assignment: Assignment, task: TrainingTask, connected: Connected, ledger: Ledger, say: Say) -> Trainee:
    """Of samples of the modalities that this device owns."""
    made = features_of_modalities(assignment, task, connected, _sometimes(assignment, say))
    bad_rows = 0
    for name, features in made.items():
        of_this = msgspec.structs.replace(task, data=connected.modalities[name].data)
        _check_bad_rows(of_this, features.bad_rows, features.said, "none of the job's labels")
        bad_rows += features.bad_rows
    spec = _spec(task)
    config = ModalitiesConfig(
        width=connected.width, features={name: features.values.shape[1] for name, features in made.items()}
    )
    tables = {name: features.values for name, features in made.items()}
    trainee = Trainee(
        stage=cast(
            Learner,
            TrainedConnectors(
                tables, _zeros(shapes(config, spec)), anchors_of(assignment, task, connected), connected.temperature
            ),
        ),
        shaped=shapes(config, spec),
        rows=split_of_modalities(made, task),
        bad_rows=bad_rows,
        fingerprint="",
        ledger=ledger,
    )
    check_memory(assignment)
    return trainee


def _sometimes(assignment: Assignment, say: Say) -> Callable[[str], None]:
    """Says how far loading is, once in a while."""
    said_s = time.monotonic()

    def told(detail: str) -> None:
        nonlocal said_s
        if time.monotonic() - said_s > SAID_EVERY_S:
            said_s = time.monotonic()
            say(Status(phase="loading", epoch=assignment.order.epoch, detail=detail))

    return told


def _check_bad_rows(task: TrainingTask, count: int, said: Sequence[BadRow], otherwise: str) -> None:
    """Raise CorruptData where there are some, and the job says that there may be none."""
    if count and task.refuse_bad_rows:
        first = said[0] if said else otherwise
        raise CorruptData(f"data {task.data}: {count} rows are no samples: {first}", try_="bad_rows = 'leave-out'")


def _rows(assignment: Assignment, task: TrainingTask, samples: Sequence[Sample]) -> list[Row]:
    path = Path(assignment.tokenizer_path)
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CorruptData(f"tokenizer of {path.stat().st_size} bytes, at most {MAX_TOKENIZER_BYTES} are read")
    encode, private = encoder_of(path.read_text(encoding="utf-8")), task.privacy is not None
    if task.labels:
        rows = labelled_rows(samples, encode, task.row_tokens, task.labels, keep_all=private)
        if not rows:
            raise CorruptData(
                f"data {task.data}: no text has one of the job's {len(task.labels)} labels",
                try_='rows such as {"text": "...", "label": "..."}',
            )
        return rows
    rows = rows_of(samples, encode, task.row_tokens, task.end_id, keep_all=private)
    if not rows:
        raise CorruptData(f"data {task.data}: no sample has two tokens", try_="longer texts")
    return rows


def _spec(task: TrainingTask) -> AdapterSpec:
    return AdapterSpec(
        rank=task.rank, alpha=task.alpha, matrices=task.matrices, seed=task.seed, labels=len(task.labels),
        blocks=task.blocks, last_only=task.last_only,
    )  # fmt: skip


def _language_model(assignment: Assignment, task: TrainingTask) -> tuple[TrainedStage, Shapes]:
    spec = _spec(task)
    _, manifest = load_graph(Path(assignment.graph_path), spec_of(assignment.order, assignment.threads))
    weights = map_weights(manifest.weights, [Path(path) for path in assignment.weight_paths])
    factors = {} if task.role == "ends" else initial(manifest.config, spec)
    stage = TrainedStage(manifest, weights.tensors, spec, factors, task.row_tokens)
    return stage, _own(manifest.config, spec, assignment.order, task)


def _encoder(assignment: Assignment, task: TrainingTask) -> tuple[TrainedEncoder, Shapes]:
    try:
        config = msgspec.json.decode(assignment.order.config, type=BertConfig)
        config.check_context(task.row_tokens)
        [path] = assignment.weight_paths
        spec = _spec(task)
        shaped = _own(config, spec, assignment.order, task)
        blocks = range(assignment.order.first_block, assignment.order.end_block)
        held = {HEAD: shaped[HEAD]} if task.role == "ends" else shaped
        # What they are comes with each round.
        stage = TrainedEncoder(BertFile.open(config, Path(path)), spec, _zeros(held), blocks)
    except (msgspec.DecodeError, ValueError, KeyError) as error:
        raise EngineFailed(f"an order that says nothing of an encoder: {error}") from error
    return stage, shaped


def _part_of_block(assignment: Assignment, task: TrainingTask) -> tuple[Hub | Shard, Shapes]:
    """Of the block that stands at every depth; its weights come with each round."""
    try:
        config = msgspec.json.decode(assignment.order.config, type=BertConfig)
        if task.share is not None:
            shaped = shapes_of_shard(config, task.share)
            return Shard(config, task.share, _zeros(shaped)), shaped
        shaped = shapes_of_hub(shapes(config, msgspec.structs.replace(_spec(task), looped=True)))
        return Hub(config, _zeros(shaped)), shaped
    except (msgspec.DecodeError, ValueError) as error:
        raise EngineFailed(f"an order that says nothing of an encoder: {error}") from error


def _zeros(shaped: Shapes) -> dict[str, Floats]:
    return {name: np.zeros(shape, np.float32) for name, shape in shaped.items()}


def _own(config: Config, spec: AdapterSpec, order: StageOrder, task: TrainingTask) -> Shapes:
    """Of a segment of a trunk its blocks' factors, and the task module where it has the last of them; else all."""
    shaped = shapes(config, spec)
    if task.role != "trunk":
        return shaped
    return within(shaped, range(order.first_block, order.end_block), order.end_block == config.blocks)


def fingerprint_of(
    rows: Sequence[Row],
    threads: int,
    files: Sequence[ArtifactRef],
    features: Floats | None = None,
    computer: str = "cpu",
) -> str:
    """Of all that a round comes from and its question does not say; `features`: the table that rows are numbers of."""
    words = [str(threads), torch.__version__, computer, VERSION, *(ref.digest for ref in files)]
    made = hashlib.sha256("/".join(words).encode())
    for row in rows:
        made.update(f"/{row.learnt_from}/{row.label}/{len(row.ids)}/".encode() + row.ids.tobytes())
    if features is not None:
        made.update(features.data)
    return made.hexdigest()


class TrainingWorker(StageWorker[Trainee]):
    """On its connections."""

    def __init__(self, assignment: Assignment, trainee: Trainee, site: Transport, parent: Parent) -> None:
        super().__init__(assignment, trainee, site, parent, trainee.computer.fell_back)

    def _make_work(self, order: StageOrder) -> Work:
        assignment = self._assignment
        role: str = order.training.role if order.training is not None else "whole"
        if order.training is not None and order.training.secure:
            return self._secure_work(order)
        if order.training is not None and order.training.connected is not None:
            role = "connected"
        kinds: dict[str, type[RoundWork | EndsWork | TrunkWork | HubWork | ShardWork]] = {
            "ends": EndsWork, "trunk": TrunkWork, "hub": HubWork, "shard": ShardWork,
            "connected": ConnectedWork,
        }  # fmt: skip
        return kinds.get(role, RoundWork)(
            order, self._held, self._outboxes, done, self._stretch, assignment.site, assignment.device, self._fits
        )

    def _secure_work(self, order: StageOrder) -> Work:
        # Here, since a board without `cryptography` can do all other jobs.
        from agent.workers.securework import SecureWork
        from agent.workers.summed import Sums

        assignment = self._assignment
        sums = Sums(Path(assignment.state_path) / LEDGERS)
        return SecureWork(
            order, self._held, self._outboxes, done, self._stretch, assignment.site, assignment.device, self._fits,
            sums=sums,
        )  # fmt: skip

    @property
    def _held(self) -> Model:
        """Of the kind that the order's role asks for, by which it was loaded."""
        return cast("Model", self._engine)

    def _fits(self) -> None:
        check_memory(self._assignment)


if __name__ == "__main__":
    sys.exit(main())
