"""Hidden states in the form of a cut, and back: how far they may be off, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wire.codecs import CODECS, GROUP_CHANNELS, codecs_for, group_of, is_codec_for, payload_bytes
from wire.coding import Coder, coder
from wire.errors import MalformedFrame
from wire.frames import Dtype, Kind, Parcel, Tensor, encode, parse
from wire.tensors import bf16_bits, bf16_to_f32

LARGEST = {"f32": 3e38, "f16": 65504.0, "bf16": 3e38}
HALF_STEP = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 0.0}
"""Rounding to a dtype errs by at most this share of a number (that is not denormal)."""


def rows_of(wire: str, rows: int, hidden: int, seed: int, size: float) -> np.ndarray:
    """Numbers of many sizes, a few channels much larger than the rest, as the engine has them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, hidden)) * size * 10.0 ** random.uniform(-3, 0, (rows, 1))
    values[:, random.integers(hidden)] *= 500
    values = np.clip(values, -LARGEST[wire], LARGEST[wire]).astype(np.float32)
    return bf16_bits(values) if wire == "bf16" else values.astype("f4" if wire == "f32" else "f2")


def wide(wire: str, rows: np.ndarray) -> np.ndarray:
    return (bf16_to_f32(rows) if wire == "bf16" else rows).astype(np.float64)


def crossed(coding: Coder, rows: np.ndarray) -> np.ndarray:
    """Through a frame, as over the network."""
    frames = encode(Parcel(Kind.HIDDEN, 1, 7, 0, 0, coding.encode(rows)), 1, 0, 0)
    [frame] = [parse(b"".join(buffers)) for buffers in frames]
    tensor = frame.parcel_with(frame.payload, frame.meta).tensor
    assert tensor is not None
    return coding.decode(tensor)


@settings(max_examples=60, deadline=None)
@given(
    wire=st.sampled_from(["f32", "f16", "bf16"]),
    rows=st.integers(1, 5),
    groups=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
@example(wire="f32", rows=2, groups=2, seed=6278881, size=100.0)  # a number beyond float16
def test_what_comes_out_is_as_near_as_the_codec_says(wire: str, rows: int, groups: int, seed: int, size: float) -> None:
    hidden = groups * GROUP_CHANNELS
    all_rows = rows_of(wire, rows, hidden, seed, size)
    for codec in codecs_for(wire, hidden):
        coding = coder(codec, wire, hidden)
        given_rows = np.delete(all_rows, coding.unfit(all_rows), axis=0)  # as senders leave them out
        if not len(given_rows):
            continue
        values = wide(wire, given_rows)
        got = crossed(coding, given_rows)
        assert got.dtype == given_rows.dtype and got.shape == given_rows.shape
        off = np.abs(wide(wire, got) - values)
        if codec == "as-is":
            assert (got == given_rows).all()
        elif group := group_of(codec, hidden):
            grouped = np.abs(values).reshape(len(values), -1, group).max(axis=-1)
            allowed = np.repeat(grouped / 254, group, axis=-1) * (1 + 1e-5) + np.abs(values) * HALF_STEP[wire] * 1.01
            assert (off <= allowed + 1e-7).all()
        else:
            assert (off <= np.abs(values) * HALF_STEP[codec] + 1e-7).all()


@pytest.mark.parametrize("wire", ["f32", "f16", "bf16"])
def test_the_largest_numbers_stay_numbers(wire: str) -> None:
    values = np.full((1, 64), LARGEST[wire], np.float32)
    values[0, ::2] *= -1
    given_rows = bf16_bits(values) if wire == "bf16" else values.astype("f4" if wire == "f32" else "f2")
    for codec in codecs_for(wire, 64):
        coding = coder(codec, wire, 64)
        if codec == "f16":
            assert coding.unfit(given_rows) == [0]
        else:
            assert coding.unfit(given_rows) == [] and np.isfinite(wide(wire, crossed(coding, given_rows))).all()


def test_only_the_rows_that_float16_can_not_say_are_unfit() -> None:
    rows = np.ones((4, 64), np.float32)
    rows[1, 5], rows[3, 0] = 65520.0, -1e9
    rows[2, 1] = 65519.0
    assert coder("f16", "f32", 64).unfit(rows) == [1, 3]
    assert np.isfinite(crossed(coder("f16", "f32", 64), rows[[0, 2]])).all()
    assert coder("bf16", "f32", 64).unfit(rows) == []


@pytest.mark.parametrize("hidden", [64, 576, 2048])
@pytest.mark.parametrize("wire", ["f32", "f16", "bf16"])
def test_sizes_are_those_of_the_formula_and_a_codec_makes_rows_shorter(wire: str, hidden: int) -> None:
    for codec in codecs_for(wire, hidden):
        for rows in (1, 7):
            made = coder(codec, wire, hidden).encode(rows_of(wire, rows, hidden, 1, 1.0))
            assert made.nbytes == payload_bytes(codec, wire, hidden, rows)
        assert codec == "as-is" or payload_bytes(codec, wire, hidden) < payload_bytes("as-is", wire, hidden)


def test_a_row_alone_is_the_same_bytes_and_comes_back_the_same() -> None:
    row = rows_of("f16", 1, 576, 3, 1.0)
    for codec in codecs_for("f16", 576)[1:]:
        coding = coder(codec, "f16", 576)
        payload = coding.payload_of(row)
        assert payload == b"".join(coding.encode(row).buffers)
        back = coding.row_in(memoryview(payload))
        assert back is not None and bytes(back) == crossed(coding, row).tobytes()
        assert coding.row_in(memoryview(payload)[:-1]) is None
        assert coding.row_in(memoryview(payload + b"x")) is None


def test_codecs_that_a_model_can_not_have_are_none() -> None:
    assert codecs_for("f16", 576) == ("as-is", "int8-group", "int8-token")
    assert codecs_for("f32", 576) == CODECS
    assert codecs_for("f16", 8) == ("as-is", "int8-token")
    assert not is_codec_for("int8-group", "f16", 100)
    with pytest.raises(ValueError, match="no codec f16 for bf16"):
        Coder("f16", "bf16", 64)


def test_another_form_than_the_cut_has_is_refused() -> None:
    rows = rows_of("f16", 2, 64, 1, 1.0)
    made = {codec: coder(codec, "f16", 64).encode(rows) for codec in codecs_for("f16", 64)}
    for codec in made:
        for other, tensor in made.items():
            if other != codec:
                with pytest.raises(MalformedFrame, match="hidden states as"):
                    coder(codec, "f16", 64).decode(tensor)
    with pytest.raises(MalformedFrame, match=r"\(2, 64\), they are I8 in groups of 32 \[n, 96\]"):
        coder("int8-group", "f16", 96).decode(made["int8-group"])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 600.0])
def test_a_scale_that_gives_no_number_is_refused(scale: float) -> None:
    tensor = coder("int8-group", "f16", 64).encode(rows_of("f16", 1, 64, 1, 1.0))
    scales = np.frombuffer(tensor.buffers[0], "<f4").copy()
    scales[1] = scale
    hostile = Tensor(Dtype.I8, tensor.shape, tensor.group, (memoryview(scales.tobytes()), tensor.buffers[1]))
    with pytest.raises(MalformedFrame, match="scale"):
        coder("int8-group", "f16", 64).decode(hostile)
    assert coder("int8-group", "f16", 64).row_in(memoryview(b"".join(hostile.buffers))) is None


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(min_size=0, max_size=200))
def test_any_bytes_give_numbers_or_nothing(payload: bytes) -> None:
    for codec in codecs_for("f16", 64)[1:]:
        row = coder(codec, "f16", 64).row_in(memoryview(payload))
        if row is not None:
            assert len(payload) == payload_bytes(codec, "f16", 64)
            assert np.isfinite(np.frombuffer(row, np.float16)[np.frombuffer(payload, np.int8)[-64:] != -128]).all()
