"""Frames: what goes in comes out, nothing is copied, and nothing from the network can hurt."""

from __future__ import annotations

import random
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import limits
from wire.assembly import Assembler
from wire.drafts import drafts_in, drafts_meta
from wire.errors import MalformedFrame, PeerError
from wire.frames import (
    CHECKSUM_BYTES,
    FLAG_DRAFTS,
    FLAG_FINAL,
    LEAD,
    Dtype,
    Frame,
    Kind,
    Parcel,
    Tensor,
    encode,
    header_bytes,
    lay_out,
    parse,
)
from wire.rows import ROW_BYTES, RowOf, rows_in, rows_meta
from wire.tensors import bf16_bits, bf16_to_f32, tensor_bytes

GOLDEN = Path(__file__).parent / "golden"


def joined(frames):
    return [b"".join(frame) for frame in frames]


def assembled(frames, now_s=0.0):
    assembler = Assembler()
    parcels = [assembler.add(parse(data), now_s) for data in frames]
    return [parcel for parcel in parcels if parcel is not None]


def tensors():
    shape = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
    dtypes = st.sampled_from([np.float32, np.float16, np.int32, np.uint8])

    def made(shape, dtype, seed):
        return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)

    return st.builds(made, shape, dtypes, st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(
    array=tensors(), chunk=st.integers(1, 500), meta=st.binary(max_size=100), order=st.randoms(use_true_random=False)
)
def test_a_parcel_survives_chunking_in_any_order_with_duplicates(array, chunk, meta, order):
    parcel = Parcel(Kind.HIDDEN, 7, 2**62, 41, FLAG_FINAL, Tensor.of(array), meta)
    frames = joined(encode(parcel, 9, 1000, 3, max(chunk, -(-array.nbytes // 4096))))
    shuffled = frames + frames[: len(frames) // 2]
    if len(frames) > 1:
        order.shuffle(shuffled)
        last_new = max(shuffled.index(frame) for frame in frames)
        shuffled = shuffled[: last_new + 1]
    else:
        shuffled = frames
    [back] = assembled(shuffled)
    assert (back.kind, back.epoch, back.request, back.position, back.final, back.meta) == (
        Kind.HIDDEN, 7, 2**62, 41, True, meta,
    )  # fmt: skip
    np.testing.assert_array_equal(back.tensor.array(), array)
    assert back.tensor.array().dtype == array.dtype


def test_offsets_count_whole_frames():
    frames = joined(encode(Parcel(Kind.HIDDEN, tensor=Tensor.of(np.zeros((4, 100), np.float32))), 1, 500, 0, 512))
    offset = 500
    for data in frames:
        frame = parse(data)
        assert frame.offset == offset
        offset += frame.whole_bytes
    assert len(frames) == 4


def test_a_token_costs_its_hidden_state_and_one_header():
    hidden = 576
    parcel = Parcel(Kind.HIDDEN, 1, 2, 3, 0, Tensor.of(np.ones((1, hidden), np.float16)))
    [frame] = joined(encode(parcel, 1, 0, 0))
    assert len(frame) == hidden * 2 + header_bytes(2)
    assert header_bytes(2) == 64


def test_encoding_shares_memory_with_the_tensor_and_decoding_with_the_message():
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    frames = encode(Parcel(Kind.HIDDEN, tensor=Tensor.of(array)), 1, 0, 0, 1 << 16)
    assert np.shares_memory(np.frombuffer(frames[0][-1], np.uint8), array)
    data = b"".join(frames[0])
    frame = parse(data)
    parcel = frame.parcel_with(frame.payload, frame.meta)
    assert np.shares_memory(parcel.tensor.array(), np.frombuffer(data, np.uint8))


def test_payloads_are_aligned_whatever_rides_in_front():
    for rank in range(1, 5):
        for meta in (b"", b"x", b"x" * 13):
            data = b"".join(
                encode(Parcel(Kind.HIDDEN, tensor=Tensor.of(np.ones((1,) * rank, np.float32)), meta=meta), 1, 0, 0)[0]
            )
            assert (len(data) - 4) % 8 == 0


def test_four_megabytes_become_messages_of_at_most_one():
    tensor = Tensor.of(np.zeros((1024, 1024), np.float32))
    for chunk in (65536, 262144):
        frames = joined(encode(Parcel(Kind.HIDDEN, tensor=tensor, meta=b"m" * limits.MAX_META_BYTES), 1, 0, 0, chunk))
        assert all(len(frame) <= limits.MAX_PUBLISH_BYTES for frame in frames)
        assert len(frames) == 4 * 1024 * 1024 // chunk
    with pytest.raises(ValueError, match="chunks of"):
        encode(Parcel(Kind.HIDDEN, tensor=tensor), 1, 0, 0, limits.MAX_PUBLISH_BYTES)


def test_parcels_without_a_tensor_carry_their_meta():
    for kind in (Kind.CLOSE, Kind.ERROR, Kind.INQUIRY, Kind.STANDING):
        [back] = assembled(joined(encode(Parcel(kind, 1, 2, meta=b'{"a":1}'), 5, 0, 0)))
        assert back.kind is kind
        assert back.tensor is None
        assert back.meta == b'{"a":1}'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_rounds_to_nearest_even(values):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        expected = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    ours = bf16_to_f32(bf16_bits(array))
    np.testing.assert_array_equal(ours, expected)
    assert np.array_equal(np.isnan(ours), np.isnan(array))


def test_bfloat16_travels_as_bits():
    bits = bf16_bits(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4))
    [back] = assembled(joined(encode(Parcel(Kind.HIDDEN, tensor=Tensor.bf16(bits)), 1, 0, 0, 7)))
    np.testing.assert_array_equal(back.tensor.array(), bits)
    np.testing.assert_array_equal(back.tensor.to_f32(), bf16_to_f32(bits))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), group=st.sampled_from([1, 8, 32]), seed=st.integers(0, 2**32))
def test_int8_errs_by_at_most_half_a_scale(rows, groups, group, seed):
    array = np.random.default_rng(seed).normal(size=(rows, groups * group)).astype(np.float32)
    array[0, :group] = 0
    tensor = Tensor.int8(array, group)
    [back] = assembled(joined(encode(Parcel(Kind.HIDDEN, tensor=tensor), 1, 0, 0, 33)))
    scale = np.abs(array).reshape(rows, groups, group).max(-1, keepdims=True) / 127
    error = np.abs(back.tensor.to_f32() - array).reshape(rows, groups, group)
    assert (error <= scale * 0.5001 + 1e-12).all()
    assert tensor.nbytes == array.size + array.size // group * 4


def test_an_array_that_is_not_contiguous_arrives_right():
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T
    [back] = assembled(joined(encode(Parcel(Kind.HIDDEN, tensor=Tensor.of(array)), 1, 0, 0)))
    np.testing.assert_array_equal(back.tensor.array(), array)


GOLDEN_PARCELS = {
    "hidden-f16": Parcel(Kind.HIDDEN, 3, 0x1122334455667788, 9, 0, Tensor.of(np.arange(8, dtype="<f2").reshape(2, 4))),
    "tokens-final": Parcel(Kind.TOKENS, 1, 5, 0, FLAG_FINAL, Tensor.of(np.array([1, 2, 49151], "<i4")), b'{"v":1}'),
    "bf16": Parcel(Kind.HIDDEN, 2, 6, 1, 0, Tensor.bf16(np.array([[0x3F80, 0xC000]], "<u2"))),
    "int8": Parcel(Kind.HIDDEN, 2, 6, 1, 0, Tensor.int8(np.array([[1, -2, 3, 4]], "f4"), 2)),
    "close": Parcel(Kind.CLOSE, 1, 5),
    "rows-f16": Parcel(
        Kind.ROWS,
        4,
        0,
        0,
        0,
        Tensor.of(np.arange(6, dtype="<f2").reshape(2, 3)),
        rows_meta([RowOf(0x1122334455667788, 70), RowOf(2**64 - 1, 2**32 - 1)]),
    ),
    "rows-tokens": Parcel(
        Kind.ROWS,
        4,
        0,
        0,
        0,
        Tensor.of(np.array([9, 49151, 0], "<i4")),
        rows_meta([RowOf(n, 7 * n) for n in (1, 2, 3)]),
    ),
    "drafts": Parcel(
        Kind.HIDDEN, 4, 7, 70, FLAG_DRAFTS, Tensor.of(np.arange(6, dtype="<f2").reshape(3, 2)), drafts_meta([49151, 0])
    ),
    "inquiry": Parcel(Kind.INQUIRY, 1, 5, meta=b'{"reply":{"topic":"t"},"number":1}'),
    "standing": Parcel(Kind.STANDING, 1, 5, meta=b'{"stage":0,"number":1,"known":true}'),
}


@pytest.mark.parametrize("name", GOLDEN_PARCELS)
def test_the_frame_format_is_what_it_was(name):
    [data] = joined(encode(GOLDEN_PARCELS[name], 0xABCDEF, 4096, 17))
    assert data.hex(" ", 8) == (GOLDEN / f"{name}.hex").read_text().strip()


def header(**changes) -> Frame:
    frame = parse(b"".join(encode(GOLDEN_PARCELS["hidden-f16"], 1, 0, 0)[0]))
    return frame._replace(**changes)


REFUSED = {
    "too long": (lambda d: d + bytes(limits.MAX_PUBLISH_BYTES), "at most 1048576"),
    "too short": (lambda d: d[:20], "are no frame"),
    "other magic": (lambda d: b"xyz" + d[3:], "starts with"),
    "other protocol": (lambda d: d[:3] + b"\x09" + d[4:], "protocol 9"),
    "a flipped bit": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "checksum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_frame_is_refused_and_named(name):
    change, words = REFUSED[name]
    [data] = joined(encode(GOLDEN_PARCELS["hidden-f16"], 1, 0, 0))
    with pytest.raises(MalformedFrame, match=words):
        parse(change(data))


def test_a_shape_of_a_terabyte_is_refused_before_anything_is_allocated():
    with pytest.raises(MalformedFrame, match="at most"):
        tensor_bytes(Dtype.F32, (1 << 24, 1 << 14))
    with pytest.raises(MalformedFrame, match="dimension"):
        tensor_bytes(Dtype.F32, (1 << 25,))
    with pytest.raises(MalformedFrame, match="dimension"):
        tensor_bytes(Dtype.F32, (0, 5))


def big_frame(stream, dtype=Dtype.F32, shape=(4096, 4096)):
    """The first of 64 chunks of a tensor of 64 MiB, as a sender would make it."""
    return Frame(
        Kind.HIDDEN, 0, dtype, shape, 0, 1, 0, stream, 0, 1, 0, 0, 64, b"", memoryview(bytes(1 << 20)), 1 << 26, 1 << 20
    )


def test_reassembly_holds_no_more_than_its_caps():
    assembler = Assembler()
    assembler.add(big_frame(1), 0.0)
    assembler.add(big_frame(2), 0.0)
    with pytest.raises(PeerError, match="more than"):
        assembler.add(big_frame(3), 0.0)
    assert assembler.held_bytes == limits.MAX_PARTIAL_BYTES
    assert assembler.stale(limits.PARTIAL_TIMEOUT_S + 1) == [1, 2]
    assembler.drop(1)
    assert assembler.held_bytes == limits.MAX_PARTIAL_BYTES // 2


def test_a_later_parcel_drops_the_unfinished_one_before_it():
    tensor = Tensor.of(np.arange(100, dtype=np.float32))
    first = joined(encode(Parcel(Kind.HIDDEN, tensor=tensor), 1, 0, 2**32 - 1, 100))
    second = joined(encode(Parcel(Kind.TOKENS, tensor=tensor), 1, 0, 2**32, 100))
    [back] = assembled(first[:3] + second)
    assert back.kind is Kind.TOKENS


def test_a_chunk_that_contradicts_its_parcel_is_refused():
    tensor = Tensor.of(np.arange(100, dtype=np.float32))
    frames = joined(encode(Parcel(Kind.HIDDEN, 1, tensor=tensor), 1, 0, 0, 100))
    other = joined(encode(Parcel(Kind.HIDDEN, 2, tensor=tensor), 1, 0, 0, 100))
    other_size = joined(encode(Parcel(Kind.HIDDEN, 1, tensor=tensor), 1, 0, 0, 99))
    for wrong in (other[1], other_size[1]):
        assembler = Assembler()
        assembler.add(parse(frames[0]), 0.0)
        with pytest.raises(MalformedFrame, match="contradicts"):
            assembler.add(parse(wrong), 0.0)


def test_ten_thousand_random_and_mutated_frames_are_refused_or_understood():
    from zlib import crc32

    rng = random.Random(20260101)
    samples = [
        data
        for parcel in GOLDEN_PARCELS.values()
        for chunk in (3, 65536)
        for data in joined(encode(parcel, rng.getrandbits(63), rng.getrandbits(20), rng.getrandbits(32), chunk))
    ]
    assembler = Assembler()
    understood = refused = 0
    for number in range(10_000):
        data = bytearray(rng.randbytes(rng.randrange(200)) if number % 10 == 0 else rng.choice(samples))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.getrandbits(8)))
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data) + 1)]
        if len(data) >= 8 and number % 10 and rng.random() < 0.8:
            data[4:8] = crc32(data[8:]).to_bytes(4, "little")  # let the mutation past the checksum
        try:
            assembler.add(parse(bytes(data)), 0.0)
            understood += 1
        except PeerError:
            refused += 1
        assert assembler.held_bytes <= limits.MAX_PARTIAL_BYTES
        assert assembler.partials <= limits.MAX_PARTIAL_TENSORS
    assert understood > 500
    assert refused > 500


@given(tensors(), st.sampled_from([Kind.HIDDEN, Kind.TOKENS]), st.integers(0, 2**40), st.integers(0, 2**33))
def test_a_frame_that_was_laid_out_is_the_one_that_is_encoded(array, kind, offset, number):
    parcel = Parcel(kind, 7, 11, 13, FLAG_FINAL, Tensor.of(array))
    laid = lay_out(parcel, 5, offset, number)
    [whole] = joined(encode(parcel, 5, offset, number, limits.CHUNK_BYTES_DEFAULT))
    payload = array.tobytes()
    checksum = crc32(payload, crc32(laid.rest)).to_bytes(CHECKSUM_BYTES, "little")
    assert LEAD + checksum + laid.rest + payload == whole
    assert laid.frame_bytes == len(whole)


def test_only_a_tensor_without_meta_is_laid_out():
    with pytest.raises(ValueError, match="tensor"):
        lay_out(Parcel(Kind.CLOSE), 1, 0, 0)
    with pytest.raises(ValueError, match="meta"):
        lay_out(Parcel(Kind.TOKENS, tensor=Tensor.of(np.zeros(1, np.int32)), meta=b"{}"), 1, 0, 0)


ROWS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=limits.MAX_LIVE_REQUESTS, unique=True).flatmap(
    lambda requests: st.tuples(
        st.just(requests), st.lists(st.integers(0, 2**32 - 1), min_size=len(requests), max_size=len(requests))
    )
)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.booleans(), st.integers(60, 70000))
def test_rows_of_several_requests_come_back_with_their_owners(rows, tokens, chunk):
    wanted = tuple(RowOf(*row) for row in zip(*rows, strict=True))
    array = np.arange(len(wanted), dtype=np.int32) if tokens else np.ones((len(wanted), 5), np.float16)
    parcel = Parcel(Kind.ROWS, 3, 0, 0, 0, Tensor.of(array), rows_meta(wanted))
    [back] = assembled(joined(encode(parcel, 1, 0, 0, chunk)))
    assert back.kind is Kind.ROWS
    assert rows_in(back.meta, back.tensor.shape) == wanted
    np.testing.assert_array_equal(back.tensor.array(), array)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=ROW_BYTES * 5), st.lists(st.integers(1, 6), max_size=4).map(tuple))
def test_garbage_in_front_of_rows_is_refused_or_understood(meta, shape):
    try:
        rows = rows_in(meta, shape)
    except MalformedFrame:
        return
    assert len(rows) == shape[0] == len(meta) // ROW_BYTES
    assert rows_meta(rows) == meta


@pytest.mark.parametrize(
    ("meta", "shape", "words"),
    [
        (b"", (1,), "names no rows"),
        (bytes(11), (1,), "names no rows"),
        (bytes(ROW_BYTES * (limits.MAX_LIVE_REQUESTS + 1)), (limits.MAX_LIVE_REQUESTS + 1, 4), "names no rows"),
        (bytes(ROW_BYTES), (), "1 rows are named"),
        (bytes(ROW_BYTES), (2, 4), "1 rows are named"),
        (bytes(ROW_BYTES * 2), (2, 4), "two rows of one request"),
    ],
)
def test_rows_that_contradict_their_tensor_are_refused(meta, shape, words):
    with pytest.raises(MalformedFrame, match=words):
        rows_in(meta, shape)


def test_more_rows_than_may_live_are_not_sent():
    with pytest.raises(ValueError, match="256"):
        rows_meta([RowOf(n, 0) for n in range(limits.MAX_LIVE_REQUESTS + 1)])
    with pytest.raises(ValueError, match="256"):
        rows_meta([])


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=limits.MAX_DRAFTS))
def test_guesses_come_back(tokens):
    assert drafts_in(drafts_meta(tokens), (len(tokens) + 1, 64)) == tuple(tokens)


@given(st.binary(max_size=40), st.lists(st.integers(0, 9), max_size=3))
def test_what_is_read_as_guesses_fits_its_tensor_or_is_refused(meta, shape):
    try:
        tokens = drafts_in(meta, shape)
    except MalformedFrame:
        return
    assert drafts_meta(tokens) == meta
    assert shape[0] == len(tokens) + 1 and min(tokens) >= 0


def test_more_guesses_than_may_be_are_our_own_fault():
    for count in (0, limits.MAX_DRAFTS + 1):
        with pytest.raises(ValueError, match="guesses"):
            drafts_meta([1] * count)


@pytest.mark.parametrize(("kind", "flags"), [(Kind.TOKENS, FLAG_DRAFTS), (Kind.ROWS, FLAG_DRAFTS), (Kind.HIDDEN, 4)])
def test_flags_that_a_kind_has_not_are_refused(kind, flags):
    [data] = joined(encode(Parcel(kind, 1, 2, 3, flags, Tensor.of(np.zeros((2, 2), "<f2")), b"1234"), 1, 0, 0))
    with pytest.raises(MalformedFrame, match="flags"):
        parse(data)
