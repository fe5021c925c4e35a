"""safetensors: our files are read by the reference, the reference's by us, and damage is an error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from models.formats.safetensors import open_safetensors, read, to_bytes, write
from wire.errors import CorruptData, EdgelamError, Refused, UsageError

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def _tensors() -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(0)
    made = {f"t.{dtype}": draw.integers(0, 2, (3, 5)).astype(dtype) for dtype in DTYPES}
    return {**made, "empty": np.zeros((0, 4), np.float32), "scalar": np.array(2.5, np.float32), "odd": np.ones(7, "u1")}


def _file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_reference_reads_what_we_write() -> None:
    theirs = load(to_bytes(_tensors(), {"made": "here"}))
    assert theirs.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert theirs[name].dtype == tensor.dtype
        np.testing.assert_array_equal(theirs[name], tensor)


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "a.safetensors", {"made": "there"})
    ours = read(tmp_path / "a.safetensors")
    assert open_safetensors(tmp_path / "a.safetensors").metadata == {"made": "there"}
    for name, tensor in _tensors().items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor)


def test_views_are_read_only_aligned_and_not_copies(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", _tensors())
    for name, view in read(tmp_path / "a.safetensors").items():
        assert not view.flags.owndata and not view.flags.writeable, name
        assert view.flags.aligned, name


def test_equal_tensors_give_equal_bytes_in_whatever_order() -> None:
    tensors = _tensors()
    turned = dict(reversed(tensors.items()))
    assert to_bytes(tensors, {"a": "1", "b": "2"}) == to_bytes(turned, {"b": "2", "a": "1"})
    assert to_bytes({"x": np.asfortranarray(np.eye(3, 4))}) == to_bytes({"x": np.eye(3, 4)})
    assert to_bytes({"x": np.arange(3, dtype=">i4")}) == to_bytes({"x": np.arange(3, dtype="<i4")})


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = {"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    (tmp_path / "a.safetensors").write_bytes(_file(header, bits.tobytes()))
    file = open_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(file.view("x"), bits)
    np.testing.assert_array_equal(file.float32("x"), values)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": np.arange(3)})
    with pytest.raises(Refused, match="I64"):
        open_safetensors(tmp_path / "a.safetensors").float32("x")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.zeros(2)})
    before = path.read_bytes()

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write(path, {"x": np.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"not json", b"", "header"),
        ([], b"", "header"),
        ({"x": {"dtype": "F32"}}, b"", "header"),
        ({"x": GOOD, "__metadata__": {"a": 1}}, bytes(8), "header"),
        ({"x": GOOD}, bytes(4), "end at byte"),
        ({"x": GOOD}, bytes(12), "end at byte"),
        ({"x": {**GOOD, "shape": [3]}}, bytes(8), "expected 0 to 12"),
        ({"x": {**GOOD, "shape": [-2]}}, bytes(8), "shape"),
        ({"x": {**GOOD, "shape": [1 << 62, 1 << 62]}}, bytes(8), "expected"),
        ({"x": {**GOOD, "data_offsets": [8, 0]}}, bytes(8), "lies at"),
        ({"x": GOOD, "y": GOOD}, bytes(8), "expected 8 to 16"),
        ({"x": GOOD, "y": {**GOOD, "data_offsets": [12, 20]}}, bytes(20), "expected 8 to 16"),
        ({"x": {**GOOD, "shape": [1] * 20}}, bytes(8), "shape"),
        (b"[" * 100_000, b"", "header"),
    ],
)
def test_a_header_that_contradicts_itself_is_damage(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_file(header, data))
    with pytest.raises(CorruptData, match=says) as caught:
        open_safetensors(path)
    assert "a.safetensors" in caught.value.message


def test_a_header_length_beyond_the_file_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in (b"", b"123", struct.pack("<Q", 1 << 63) + bytes(16), struct.pack("<Q", 17) + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(CorruptData):
            open_safetensors(path)


def test_an_unknown_dtype_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_file({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)))
    with pytest.raises(Refused, match="F8_E4M3"):
        open_safetensors(path)


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        open_safetensors(tmp_path / "no.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=5))
def test_damage_gives_an_error_of_ours_or_a_readable_file(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(to_bytes(_tensors()))
    for at, value in changes:
        damaged[at] = value
    path = tmp_path / "a.safetensors"
    path.write_bytes(damaged)
    try:
        for view in read(path).values():
            view.sum()
    except EdgelamError:
        pass
