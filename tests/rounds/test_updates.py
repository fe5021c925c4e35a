"""What is no update of the round is refused, each with its reason."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.rounds.updates import checked, farthest_of
from wire.errors import PeerError
from wire.frames import Tensor
from wire.messages import UpdateMeta

START = np.linspace(-1, 1, 8, dtype=np.float32)
META = UpdateMeta(round=2, device="pi4", samples=5)
FARTHEST = farthest_of(0.01, 4)


def take(vector: Any, **changes: Any) -> Any:
    meta = msgspec.structs.replace(META, **changes)
    return checked(meta, None if vector is None else Tensor.of(vector), "pi4", 2, START, FARTHEST)


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
