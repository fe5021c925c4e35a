"""A board's part in a job of several modalities: it has samples of one or more, and trains the connectors of these,
and the task module that all share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from agent.workers.frozen import FrozenNet
from agent.workers.pipe import Assignment
from agent.workers.roundwork import RoundWork, Told
from models.engine.base import EngineFailed
from models.lora.adapter import Floats
from models.training.connectors import TrainedConnectors, rows_of_modality
from models.training.features import Features, image_features, series_features
from models.training.rounds import Round
from models.training.samples import Split
from wire import modalities
from wire.errors import CorruptData
from wire.messages import RoundMeta, TrainingTask, UpdateMeta
from wire.modalities import Connected, Owned


class ConnectedWork(RoundWork):
    """As RoundWork; modules are trained for what the round says, and each modality is told of by itself."""

    def _made(self, meta: RoundMeta, start: Any) -> tuple[Round, Told | None]:
        if meta.train and not meta.objectives:
            raise ValueError("a round that says nothing of what its modules are for")
        self._connectors.aim(meta.objectives)
        return super()._made(meta, start)

    def _told_of(self, meta: RoundMeta, made: Round, told: Told | None) -> UpdateMeta:
        names, held = self._connectors.names, made.held_out_by
        trained = Counter(names[int(row.ids[0])] for row in self._model.rows.trained)
        by_modality = {}
        for name in names:
            count, right = held.get(name, (0, 0))
            by_modality[name] = modalities.Told(samples=trained[name], held_out_count=count, held_out_right=right)
        return msgspec.structs.replace(super()._told_of(meta, made, told), by_modality=by_modality)

    @property
    def _connectors(self) -> TrainedConnectors:
        """By which an order of this kind was loaded."""
        return cast("TrainedConnectors", self._model.stage)


def features_of_modalities(
    assignment: Assignment, task: TrainingTask, connected: Connected, say: Callable[[str], None]
) -> dict[str, Features]:
    """By modality, in the order of their names. Raises EngineFailed, CorruptData, UsageError."""
    found: dict[str, Features] = {}
    for name, owned in sorted(connected.modalities.items()):
        path = Path(assignment.data_paths.get(name, ""))
        if owned.series is not None:
            found[name] = series_features(path, owned.series, task.labels, task.seed, say=say)
        elif owned.images is not None:
            net = _net_of(assignment, owned, owned.images.pool)
            found[name] = image_features(path, owned.images, task.labels, task.seed, net, say=say)
        else:
            raise EngineFailed(f"an order that says nothing of the samples of {name}")
    return found


def split_of_modalities(made: Mapping[str, Features], task: TrainingTask) -> Split:
    """Rows of all modalities, of each its own share held out."""
    splits = [features.split(task.held_out, task.seed) for _, features in sorted(made.items())]
    return Split(
        tuple(row for place, one in enumerate(splits) for row in rows_of_modality(place, one.trained)),
        tuple(row for place, one in enumerate(splits) for row in rows_of_modality(place, one.held_out)),
    )


def anchors_of(assignment: Assignment, task: TrainingTask, connected: Connected) -> Floats | None:
    """[labels, width] where labels are, if the order says so. Raises EngineFailed, CorruptData."""
    if connected.anchors is None:
        return None
    path, shape = Path(_path_of(assignment, connected.anchors)), (len(task.labels), connected.width)
    due_bytes = 4 * shape[0] * shape[1]
    if path.stat().st_size != due_bytes:
        raise CorruptData(f"anchors of {path.stat().st_size} bytes, {due_bytes} are due for {list(shape)}")
    found = np.frombuffer(path.read_bytes(), "<f4").astype(np.float32).reshape(shape)
    if not np.isfinite(found).all():
        raise CorruptData("an anchor is no number")
    return found


def _net_of(assignment: Assignment, owned: Owned, pool: str) -> FrozenNet:
    if owned.graph is None:
        raise EngineFailed("an order that says nothing of the net that makes features")
    weights = [_path_of(assignment, digest) for digest in owned.weights]
    return FrozenNet.load(_path_of(assignment, owned.graph), weights, pool, assignment.threads)


def _path_of(assignment: Assignment, digest: str) -> str:
    """Of one of the order's files."""
    found = [path for ref, path in zip(assignment.order.weights, assignment.weight_paths, strict=True)
             if ref.digest == digest]  # fmt: skip
    if not found:
        raise EngineFailed(f"an order that names {digest[:19]} and has no such file")
    return found[0]
