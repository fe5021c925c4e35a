"""Files of numpy's that hold objects are read, and not run."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import numpy as np
import pytest

from benchmarks.parts.arrays import objects_in


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-a-pickle",)


def test_arrays_and_plain_values_come_out_as_they_were() -> None:
    made = {
        "X": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3))],
        "y": np.array([3, 1], np.int64),
        "names": ["a", "b", None, True, -70_000, 300],
    }
    whole = np.empty((), object)
    whole[()] = made
    found = objects_in(io.BytesIO(pickle.dumps(whole, 2)))
    for one, other in zip(found["X"], made["X"], strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert found["y"].tolist() == [3, 1] and found["names"] == made["names"]


def test_nothing_that_a_file_names_is_called(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 4):
        with pytest.raises(ValueError, match=r"is no array|makes no plain value"):
            objects_in(io.BytesIO(pickle.dumps({"a": Harmful()}, protocol)))
    assert not list(tmp_path.iterdir())
