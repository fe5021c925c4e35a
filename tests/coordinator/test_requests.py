"""A request gives each token once, in order, or a clear error: never a hole, never a repeat."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from coordinator.inference.patience import LONGEST_S, MARGIN, first_token_timeout_s, prefill_s
from coordinator.inference.requests import GenerateRequest, Generation, Guesses, Token, guesses_for, request_meta
from coordinator.planning.plan import Plan
from tests.coordinator.plans import plan_of
from wire import frames
from wire.errors import PeerError, Refused, Unreachable, UsageError
from wire.messages import InboxAddress, RequestMeta, Sampling, StageError

EPOCH = 4


def generation(stall_timeout_s: float = 5.0, speculate: int = 0) -> Generation:
    meta = RequestMeta(
        reply=InboxAddress(topic="t/in"), sampling=Sampling(), prompt_tokens=3, max_new_tokens=8, speculate=speculate
    )
    return Generation(7, "tiny", EPOCH, [1, 2, 3], meta, stall_timeout_s)


def token(index: int, value: int, final: bool = False, epoch: int = EPOCH) -> frames.Parcel:
    return frames.Parcel(
        kind=frames.Kind.TOKENS,
        epoch=epoch,
        request=7,
        position=3 + index,
        flags=frames.FLAG_FINAL if final else 0,
        tensor=frames.Tensor.of(np.array([value], dtype=np.int32)),
    )


async def next_token(live: Generation) -> Token:
    item = await live.next(live.timeout_s)
    if item is None:
        raise live.timed_out()
    assert isinstance(item, Token)
    return item


def take(live: Generation, count: int) -> list[Token]:
    async def run() -> list[Token]:
        return [await next_token(live) for _ in range(count)]

    return asyncio.run(run())


def test_tokens_come_in_order_and_the_final_one_says_so() -> None:
    live = generation()
    live.feed(token(0, 10))
    live.feed(token(1, 11, final=True))
    assert [(t.id, t.index, t.final) for t in take(live, 2)] == [(10, 0, False), (11, 1, True)]
    assert live.finished


def test_a_token_that_comes_twice_is_given_once() -> None:
    live = generation()
    for parcel in (token(0, 10), token(0, 10), token(1, 11), token(0, 99), token(2, 12, final=True)):
        live.feed(parcel)
    assert [t.id for t in take(live, 3)] == [10, 11, 12]


def test_a_lost_token_fails_the_request_instead_of_leaving_a_hole() -> None:
    live = generation()
    live.feed(token(1, 11))
    with pytest.raises(PeerError, match="token 1 where token 0"):
        take(live, 1)


def test_tokens_of_an_old_epoch_are_not_taken() -> None:
    live = generation()
    live.feed(token(0, 66, epoch=EPOCH - 1))
    live.feed(token(0, 10, final=True))
    assert [t.id for t in take(live, 1)] == [10]


def test_silence_ends_in_an_error_that_says_how_long() -> None:
    live = generation(stall_timeout_s=0.05)
    with pytest.raises(Unreachable, match="no token came"):
        take(live, 1)


def test_the_first_token_may_take_longer_than_the_next_ones() -> None:
    live = generation(stall_timeout_s=0.05)
    live.first_timeout_s = 30.0

    async def scenario() -> None:
        asyncio.get_running_loop().call_later(0.2, live.feed, token(0, 10))
        assert (await next_token(live)).id == 10
        with pytest.raises(Unreachable, match=r"after 1 tokens"):
            await next_token(live)

    asyncio.run(asyncio.wait_for(scenario(), 10))


# How long the first token may take.


def slow_plan(chunk_s: float | None, hop_s: float = 0.0) -> Plan:
    """Two stages that take 0.1 s for a token; prompts in chunks of 32."""
    plan = plan_of("a", "b")
    changes = {"prefill_chunk_s": chunk_s, "hop_s": hop_s, "compute_s": 0.1}
    return msgspec.structs.replace(
        plan, stages=tuple(msgspec.structs.replace(stage, **changes) for stage in plan.stages)
    )


def test_a_long_prompt_on_slow_boards_is_given_its_time_and_a_short_one_the_usual() -> None:
    plan = slow_plan(chunk_s=3.0)
    assert prefill_s(plan, 320) == pytest.approx(10 * 2 * 3.0)
    assert first_token_timeout_s(plan, 320, 1, 30.0) == pytest.approx(MARGIN * 60.0)
    assert first_token_timeout_s(plan, 3, 1, 30.0) == 30.0


def test_prompts_that_run_at_once_wait_for_each_other() -> None:
    plan = slow_plan(chunk_s=3.0)
    assert first_token_timeout_s(plan, 320, 3, 30.0) == pytest.approx(3 * first_token_timeout_s(plan, 320, 1, 30.0))


def test_without_a_measured_chunk_the_time_of_single_tokens_is_the_bound() -> None:
    assert prefill_s(slow_plan(chunk_s=None), 64) == pytest.approx(64 * 2 * 0.1)
    assert prefill_s(slow_plan(chunk_s=None), 5) == pytest.approx(5 * 2 * 0.1)


def test_slow_links_count_by_the_token() -> None:
    assert prefill_s(slow_plan(chunk_s=1.0, hop_s=0.05), 32) == pytest.approx(2 * (1.0 + 32 * 0.05))


def test_the_longest_wait_is_what_stages_may_be_told_and_they_keep_the_request_as_long() -> None:
    first_s = first_token_timeout_s(slow_plan(chunk_s=500.0), 3200, 4, 30.0)
    assert first_s == LONGEST_S
    request = GenerateRequest(model="m", prompt="x")
    meta = request_meta(InboxAddress(topic="t/in"), request, 3200, (), first_s, Guesses())
    assert meta.idle_timeout_s == LONGEST_S
    assert msgspec.json.decode(msgspec.json.encode(meta), type=RequestMeta) == meta
    assert request_meta(InboxAddress(topic="t/in"), request, 3, (), 5.0, Guesses()).idle_timeout_s == 60.0


@pytest.mark.parametrize(("code", "kind"), [("busy", Refused), ("too-long", Refused), ("engine", Exception)])
def test_an_error_of_a_stage_names_stage_and_device(code: str, kind: type[Exception]) -> None:
    live = generation()
    told = StageError(stage=2, device="pi4", code=code, text="because")  # type: ignore[arg-type]
    parcel = frames.Parcel(kind=frames.Kind.ERROR, epoch=EPOCH, request=7, position=0, meta=msgspec.json.encode(told))
    live.feed(parcel)
    with pytest.raises(kind, match=r"stage 2 on pi4.*because"):
        take(live, 1)


def test_garbage_instead_of_a_stage_error_is_still_an_error() -> None:
    live = generation()
    live.feed(frames.Parcel(kind=frames.Kind.ERROR, epoch=EPOCH, request=7, position=0, meta=b"\xff{"))
    with pytest.raises(PeerError):
        take(live, 1)


def test_the_prompt_travels_with_what_every_stage_must_know() -> None:
    parcel = generation().first_parcel()
    assert parcel.tensor is not None
    assert parcel.tensor.array().tolist() == [1, 2, 3]
    assert msgspec.json.decode(parcel.meta, type=RequestMeta).max_new_tokens == 8


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"seed": -1}],
)
def test_sampling_out_of_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    request = msgspec.convert({"model": "m", **wrong}, type=GenerateRequest)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        request.sampling()


def tokens(index: int, values: list[int], final: bool = False) -> frames.Parcel:
    parcel = token(index, 0, final)
    return msgspec.structs.replace(parcel, tensor=frames.Tensor.of(np.array(values, dtype=np.int32)))


def test_tokens_of_one_round_come_together_and_the_last_is_final() -> None:
    live = generation(speculate=3)
    live.feed(tokens(0, [10, 11, 12]))
    live.feed(token(3, 13))
    live.feed(tokens(2, [12, 13, 14, 15], final=True))  # two of them a second time
    found = take(live, 6)
    assert [t.id for t in found] == [10, 11, 12, 13, 14, 15]
    assert [t.index for t in found] == list(range(6))
    assert [t.final for t in found] == [False] * 5 + [True]
    assert live.finished


@pytest.mark.parametrize(
    ("speculate", "index", "values"),
    [(0, 0, [1, 2]), (3, 0, [1, 2, 3, 4, 5]), (3, 1, [1, 2]), (7, 0, [1] * 9), (3, -5, [1, 2])],
)
def test_tokens_that_can_not_be_of_one_round_end_the_request(speculate: int, index: int, values: list[int]) -> None:
    live = generation(speculate=speculate)
    parcel = tokens(0, values) if index < 0 else tokens(index, values)
    live.feed(msgspec.structs.replace(parcel, position=2**32 - 1) if index < 0 else parcel)
    with pytest.raises(PeerError, match="the head sent"):
        take(live, 1)


def test_more_tokens_than_were_asked_for_end_the_request() -> None:
    live = generation(speculate=7)
    live.feed(tokens(0, [1, 2, 3, 4, 5]))
    live.feed(tokens(5, [6, 7, 8, 9]))
    with pytest.raises(PeerError, match="the head sent"):
        take(live, 9)


@pytest.mark.parametrize(
    ("speculate", "exact", "prompt", "pays", "wanted"),
    [
        ("off", False, 9, True, (0, False, 0, False)),
        ("off", True, 9, True, (0, False, 4, True)),
        ("auto", False, 9, True, (7, False, 0, False)),
        ("auto", True, 9, True, (7, True, 0, True)),
        ("auto", False, 9, False, (0, False, 0, False)),
        ("auto", True, 9, False, (0, False, 4, True)),
        ("3", False, 9, False, (3, True, 0, False)),
        ("3", True, 9, True, (3, True, 0, True)),
        ("3", False, 1, True, (0, False, 0, False)),
        ("3", True, 1, True, (0, False, 4, True)),
    ],
)
def test_what_is_guessed_keeps_its_class_of_steps_and_needs_no_replay(
    speculate: str, exact: bool, prompt: int, pays: bool, wanted: tuple[int, bool, int, bool]
) -> None:
    """It is decided once for an answer, before and after a loss."""
    request = GenerateRequest(model="m", prompt="x", speculate=speculate, exact=exact, max_tokens=20)
    guesses = guesses_for(request, prompt, pays)
    for given in (0, 4):
        meta = request_meta(InboxAddress(topic="t/in"), request, prompt + given, (), 5.0, guesses, given)
        most, padded, replay, alone = wanted
        assert (meta.speculate, meta.padded, meta.alone) == (most, padded, alone)
        assert meta.replay_tokens == (replay if given else 0)


@pytest.mark.parametrize("speculate", ["on", "0", "8", "-1", ""])
def test_other_ways_to_guess_are_not_known(speculate: str) -> None:
    with pytest.raises(UsageError, match="speculate"):
        GenerateRequest(model="m", prompt="x", speculate=speculate).sampling()
