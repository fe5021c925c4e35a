"""What is no update of the round is refused, each with its reason."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.updates import checked, farthest_of
from models.privacy.plan import measure_of
from wire.errors import PeerError
from wire.frames import Tensor
from wire.messages import ArtifactRef, TrainingTask, UpdateMeta
from wire.privacy import Privacy

START = np.linspace(-1, 1, 8, dtype=np.float32)
META = UpdateMeta(round=2, device="pi4", samples=5)
FARTHEST = farthest_of(Job(name="n", model="m", data="d", rounds=Rounds(learning_rate=0.01, steps=4)))


def take(vector: Any, **changes: Any) -> Any:
    meta = msgspec.structs.replace(META, **changes)
    return checked(meta, None if vector is None else Tensor.of(vector), "pi4", 2, START, FARTHEST)


def test_noise_on_what_a_device_has_changed_is_no_reason_to_refuse_it() -> None:
    rounds = Rounds(learning_rate=0.01, steps=4, count=10)
    plain = Job(name="n", model="m", data="d", rounds=rounds)
    private = msgspec.structs.replace(plain, privacy=Privacy(epsilon=4.0, unit="device", clip=0.5))
    task = TrainingTask(
        data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=1, alpha=1.0, matrices=("q",),
        row_tokens=8, batch_rows=1, steps=4, learning_rate=0.01, most_norm=1.0, held_out=0.0, seed=1, rounds=10,
        privacy=private.privacy,
    )  # fmt: skip
    deviation = measure_of(task, 5, 2, 1, 0).deviation
    assert farthest_of(private) > farthest_of(plain) + 6 * deviation
    by_sample = msgspec.structs.replace(plain, privacy=Privacy(epsilon=4.0))
    assert farthest_of(by_sample) == farthest_of(plain), "noise on a gradient makes no step of Adam longer"


def test_who_has_no_factors_sends_none() -> None:
    nothing = np.zeros(0, np.float32)
    assert checked(META, None, "pi4", 2, nothing, FARTHEST).size == 0
    with pytest.raises(PeerError, match=r"F32 \[0\] was due"):
        checked(META, Tensor.of(START), "pi4", 2, nothing, FARTHEST)
    with pytest.raises(PeerError, match="of round 1"):
        checked(msgspec.structs.replace(META, round=1), None, "pi4", 2, nothing, FARTHEST)


def test_an_update_is_taken_as_it_is() -> None:
    moved = START + np.float32(0.9 * FARTHEST)
    assert (take(moved) == moved).all()


@pytest.mark.parametrize(
    ("vector", "changes", "said"),
    [
        (START, {"device": "pi5"}, "of pi5"),
        (START, {"round": 1}, "of round 1"),
        (START, {"samples": 0}, "no samples"),
        (None, {}, "holds nothing"),
        (START[:-1], {}, r"F32 \[7\]"),
        (START.reshape(2, 4), {}, r"F32 \[2, 4\]"),
        (START.astype(np.float16), {}, "F16"),
        (np.where(np.arange(8) == 3, np.nan, START).astype(np.float32), {}, "1 elements that are no numbers"),
        (np.where(np.arange(8) == 3, np.inf, START).astype(np.float32), {}, "no numbers"),
        (START * np.float32(1e6), {}, "has moved an element"),
        (START + np.float32(1.1 * FARTHEST), {}, "has moved an element"),
    ],
)
def test_what_is_none_is_refused(vector: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PeerError, match=said):
        take(vector, **changes)
