"""Stages whose cuts have codecs: both ends use them, and nothing else is taken."""

from __future__ import annotations

import numpy as np
import pytest

from agent.orders import problem_with
from tests.agent.fakes import DEVICE, SITE, FakeEngine, desired_of, order_of
from tests.agent.test_guessing import PROMPT, answer, hashed, plain, ring_of
from tests.agent.test_ring import Given, Ring, prompt
from wire.coding import coder
from wire.frames import FLAG_DRAFTS, Kind, Parcel, Tensor
from wire.messages import StageOrder
from wire.tensors import Dtype


def both(codec: str) -> dict[str, object]:
    """Chunks of prompts and rows of answers."""
    return dict.fromkeys(("codec_in", "codec_out", "row_codec_in", "row_codec_out"), codec)


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8-token"])
def test_prompts_and_tokens_cross_in_the_form_of_the_cut(codec: str) -> None:
    coded, plain = Ring(changes=both(codec)), Ring()
    crossed = []
    for ring in (coded, plain):
        ring.ask([1, 2, 3, 4, 5, 6], max_new_tokens=6)
    for _ in range(400):
        for number, work in enumerate(coded.works):
            if coded.queues[number]:
                parcel = coded.queues[number].popleft()
                crossed += [parcel.tensor.dtype] if parcel.kind is Kind.HIDDEN and parcel.tensor else []
                work.accept(Given(parcel), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    plain.run()
    assert coded.tokens() == plain.tokens() and len(plain.tokens()) == 6
    assert set(crossed) == {{"f16": Dtype.F16, "bf16": Dtype.BF16, "int8-token": Dtype.I8}[codec]}


def test_prompts_may_be_coded_and_rows_of_answers_not() -> None:
    ring = Ring(changes={"codec_in": "int8-token", "codec_out": "int8-token", "slots": 6})
    for request in range(6):
        ring.ask([request + 1, 2, 3], request, max_new_tokens=8)
    crossed: set[tuple[Dtype, bool]] = set()
    for _ in range(400):
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                parcel = ring.queues[number].popleft()
                if number and parcel.tensor:
                    crossed.add((parcel.tensor.dtype, parcel.kind is Kind.HIDDEN and parcel.tensor.shape[0] > 1))
                work.accept(Given(parcel), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    assert crossed == {(Dtype.I8, True), (Dtype.F32, False)}
    assert any(len(slots) > 1 for slots in ring.engines[1].batches)
    assert all(len(ring.tokens(request)) == 8 for request in range(6))


@pytest.mark.parametrize("of_rows", ["as-is", "bf16"])
def test_guessed_rows_cross_as_rows_of_answers_do_and_change_nothing(of_rows: str) -> None:
    changes = {"codec_in": "f16", "codec_out": "f16", "row_codec_in": of_rows, "row_codec_out": of_rows}
    ring = ring_of(hashed, **changes)
    ring.ask(PROMPT, max_new_tokens=30, speculate=7, padded=True)
    crossed: set[tuple[Dtype, bool]] = set()
    for _ in range(800):
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                parcel = ring.queues[number].popleft()
                if number and parcel.tensor:
                    crossed.add((parcel.tensor.dtype, bool(parcel.flags & FLAG_DRAFTS)))
                work.accept(Given(parcel), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    assert answer(ring) == plain(hashed, max_new_tokens=30)
    assert crossed == {(Dtype.F16, False), (Dtype.F32 if of_rows == "as-is" else Dtype.BF16, True)}


def test_rows_of_several_requests_cross_so_too_and_each_is_what_it_is_alone() -> None:
    coded = Ring(changes=both("int8-token") | {"slots": 4})
    for request in range(4):
        coded.ask([request + 1, 2, 3], request, max_new_tokens=8)
    coded.run()
    for request in range(4):
        alone = Ring()
        alone.ask([request + 1, 2, 3], request, max_new_tokens=8)
        alone.run()
        assert coded.tokens(request) == alone.tokens(request)
    assert any(len(slots) > 1 for slots in coded.engines[1].batches)


def test_a_parcel_in_another_form_ends_its_request_with_the_reason() -> None:
    ring = Ring(stages=2, changes=both("int8-token"))
    ring.works[0]._say.order = order_of(0, 2)  # as if the stage before had another order
    ring.ask([1, 2, 3])
    ring.run()
    [error] = ring.errors()
    assert error.code == "protocol" and "F32 (3, 8), they are I8 in groups of 8 [n, 8]" in error.text
    assert ring.idle


class Large(FakeEngine):
    """Rows that begin as token 9 grow beyond float16 at the first decode step."""

    def step(self, slot: int, given: np.ndarray, position: int) -> np.ndarray:
        hidden = super().step(slot, given, position)
        if self.order.stage == 0 and len(given) == 1:
            hidden[given == self.large] = 1e9
        return hidden

    large = 12


def test_a_row_that_the_codec_can_not_say_fails_alone() -> None:
    def make(order: StageOrder) -> FakeEngine:
        return Large(order)

    ring = Ring(stages=2, changes=both("f16") | {"slots": 4}, make=make)
    for request, first in enumerate((1, 8, 20)):  # of [8, 9]'s answer the second token is 13, the first one 11
        ring.ask([first, first + 1], request, max_new_tokens=6)
    Large.large = 12
    ring.run()
    failed = {p.request for p in ring.answers if p.kind is Kind.ERROR}
    for error in ring.errors():
        assert error.code == "engine" and "range of f16" in error.text
    done = {request for request in range(3) if request not in failed}
    assert len(failed) == 1
    assert all(len(ring.tokens(request)) == 6 for request in done)
    assert ring.idle


def test_a_prompt_that_the_codec_can_not_say_is_told() -> None:
    class AlwaysLarge(FakeEngine):
        def step(self, slot: int, given: np.ndarray, position: int) -> np.ndarray:
            return super().step(slot, given, position) * np.float32(1e6)

    ring = Ring(stages=2, changes=both("f16"), make=AlwaysLarge)
    ring.queues[0].append(prompt([1, 2, 3], 7))
    ring.run()
    [error] = ring.errors()
    assert error.code == "engine" and "range of f16" in error.text
    assert ring.idle


def test_an_order_with_a_codec_that_can_not_be_is_refused_before_anything_is_loaded() -> None:
    fine = desired_of(order_of(0, 2, codec_out="int8-token"))
    assert problem_with(fine, SITE, DEVICE) == ""
    for changes in ({"codec_in": "int8-group"}, {"row_codec_out": "bf16", "wire_dtype": "f16"}):
        assert "no codec" in problem_with(desired_of(order_of(0, 2, **changes)), SITE, DEVICE)


def test_hostile_scales_end_the_request_and_nothing_else() -> None:
    ring = Ring(stages=2, changes=both("int8-token"))
    ring.ask([1, 2, 3])
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.works[0].work(0.0)
    came = ring.queues[1].popleft()
    good = coder("int8-token", "f32", 8).encode(np.ones((3, 8), np.float32))
    bad = Tensor(good.dtype, good.shape, good.group, (memoryview(b"\xff" * 12), good.buffers[1]))
    ring.queues[1].append(Parcel(came.kind, came.epoch, came.request, came.position, came.flags, bad, came.meta))
    ring.run()
    [error] = ring.errors()
    assert error.code == "protocol" and "scale" in error.text
    assert ring.idle
