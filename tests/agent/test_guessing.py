"""Tokens guessed and confirmed in one round: the answer is the one without guesses, whatever is guessed or sent."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.base import ContextFull, EngineFailed
from tests.agent.fakes import FakeEngine
from tests.agent.test_ring import EverySecond, Ring, meta_of
from wire.drafts import drafts_meta
from wire.frames import FLAG_DRAFTS, Kind, Parcel, Tensor
from wire.messages import Sampling, StageOrder
from wire.rows import RowOf, rows_meta

Rule = Callable[[list[int]], int]
"""What comes after a text, below 32."""


class Remembering(FakeEngine):
    """What it gives depends on all rows before, as keys and values do: a row that should have been overwritten and was
    not, or was overwritten and should not have been, shows."""

    def __init__(self, order: StageOrder, rule: Rule) -> None:
        super().__init__(order)
        self.rule = rule
        self.kept: dict[int, list[int]] = {}

    def step(self, slot: int, given: np.ndarray, position: int, logits_rows: int = 1) -> np.ndarray:
        if position > self.rows[slot]:
            raise EngineFailed(f"rows from {position}, {self.rows[slot]} were run")
        if position + len(given) > self.order.context_tokens:
            raise ContextFull("full")
        values = [int(value) for value in (given if given.ndim == 1 else given[:, 0])]
        kept = self.kept[slot] = [*self.kept.get(slot, [])[:position], *values]
        self.rows[slot] = len(kept)
        self.steps.append((slot, position, len(given)))
        if not self.order.head:
            return np.repeat(np.array(values, np.float32)[:, None], self.order.hidden, 1)
        logits = np.zeros((logits_rows, self.order.vocabulary), np.float32)
        for row in range(logits_rows):
            text = kept[: len(kept) - logits_rows + 1 + row]
            logits[row] = np.random.default_rng(sum(text) + len(text)).random(self.order.vocabulary)
            logits[row, self.rule(text)] = 2
        return logits[0] if logits_rows == 1 else logits


def hashed(text: list[int]) -> int:
    """Few words, in an order that depends on all that was before: some guesses are right, some are not."""
    return (sum(token * (at % 5 + 1) for at, token in enumerate(text)) // 3) % 4


def repeating(text: list[int]) -> int:
    return text[-6] if len(text) >= 6 else 0


def ring_of(rule: Rule, stages: int = 3, **changes: object) -> Ring:
    return Ring(
        stages,
        changes={"context_tokens": 128, "slots": 4, **changes},
        stretch=EverySecond(),
        make=lambda order: Remembering(order, rule),
    )


def answer(ring: Ring, request: int = 7) -> list[int]:
    """Tokens that came to the requester, each in its place, the last one final."""
    parcels = [parcel for parcel in ring.answers if parcel.request == request and parcel.kind is Kind.TOKENS]
    tokens: list[int] = []
    for parcel in parcels:
        assert parcel.position == parcels[0].position + len(tokens)
        assert parcel.tensor is not None
        tokens += [int(token) for token in parcel.tensor.array()]
    assert [parcel.final for parcel in parcels] == [False] * (len(parcels) - 1) + [True]
    return tokens


PROMPT = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]


def plain(rule: Rule, **changes: Any) -> list[int]:
    ring = ring_of(rule)
    ring.ask(PROMPT, **changes)
    ring.run()
    return answer(ring)


MODES = [(7, True), (3, True), (1, True), (7, False)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("most", "padded"), MODES)
@pytest.mark.parametrize("rule", [hashed, repeating])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing_but_the_number_of_rounds(
    rule: Rule, most: int, padded: bool, stages: int, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=3)
    wanted = plain(rule, max_new_tokens=60, sampling=sampling)
    assert len(wanted) == 60
    ring = ring_of(rule, stages)
    ring.ask(PROMPT, max_new_tokens=60, sampling=sampling, speculate=most, padded=padded)
    ring.run()
    assert answer(ring) == wanted
    assert ring.idle and not ring.errors()
    assert all(work.tally.refused == 0 for work in ring.works)
    [first, head] = ring.works[0], ring.works[-1]
    steps = [count for _, position, count in ring.engines[-1].steps if position >= len(PROMPT)]
    assert not padded or min(steps) >= 2
    assert max(steps) <= 1 + most
    assert head.tally.decode_rows == 59
    assert head.tally.decode_rows_run == sum(steps), "wrong guesses are work too"
    assert 59 - most <= first.tally.decode_rows <= 59
    assert first.tally.drafts_accepted <= first.tally.drafts_sent
    if rule is repeating and temperature == 0:
        assert len(steps) < 60 / (1 + most) + 9
        assert first.tally.drafts_accepted > 0.8 * first.tally.drafts_sent > 20


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_ends_an_answer_ends_it_within_guesses_as_without(data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=20))
    most, padded = data.draw(st.sampled_from(MODES))
    changes = {
        "max_new_tokens": data.draw(st.integers(1, 44)),
        "stop_ids": tuple(data.draw(st.sets(st.integers(0, 3), max_size=1))),
    }
    period = data.draw(st.integers(1, 6))
    rule = data.draw(st.sampled_from([hashed, lambda text: (text[-period] if len(text) >= period else 1) % 4]))
    wanted, ring = ring_of(rule, 2, context_tokens=64), ring_of(rule, 2, context_tokens=64)
    wanted.ask(prompt, **changes)
    ring.ask(prompt, speculate=most, padded=padded, **changes)
    wanted.run()
    ring.run()
    assert answer(ring) == answer(wanted)
    assert ring.idle and not ring.errors()


def test_an_answer_up_to_the_end_of_the_context_keeps_its_second_row() -> None:
    ring = ring_of(hashed, context_tokens=32)
    ring.ask(PROMPT, max_new_tokens=21, speculate=7, padded=True)
    ring.run()
    assert len(answer(ring)) == 21
    assert min(count for _, _, count in ring.engines[0].steps) >= 2
    over = ring_of(hashed, context_tokens=32)
    over.ask(PROMPT, max_new_tokens=22, speculate=7, padded=True)
    over.run()
    assert "no room for a second row" in over.errors()[0].text
    # Without a promise of two rows the last step has one.
    auto = ring_of(repeating, context_tokens=32)
    auto.ask(PROMPT, max_new_tokens=40, speculate=7)
    auto.run()
    assert len(answer(auto)) == 22
    assert auto.idle


def test_what_was_given_goes_on_as_a_prompt() -> None:
    """What exact recovery does: the steps have two rows or more, before and after."""
    wanted = plain(hashed, max_new_tokens=40)
    for kept in (1, 2, 17, 38):
        ring = ring_of(hashed, 2)
        ring.ask(PROMPT + wanted[:kept], max_new_tokens=40 - kept, speculate=7, padded=True, alone=True)
        ring.run()
        assert answer(ring) == wanted[kept:]
        assert min(count for engine in ring.engines for _, _, count in engine.steps) >= 2


def test_requests_that_are_guessed_for_and_others_do_not_touch_each_other() -> None:
    guessing: dict[int, dict[str, object]] = {
        8: {"speculate": 7, "padded": True}, 9: {"speculate": 7}, 10: {"speculate": 3, "padded": True},
    }  # fmt: skip
    asked: dict[int, dict[str, object]] = {request: guessing.get(request, {}) for request in range(7, 15)}
    ring = ring_of(hashed, slots=8)
    for request, changes in asked.items():
        ring.ask(PROMPT[: request - 3], request, max_new_tokens=40, **changes)
    ring.run()
    for request in asked:
        alone = ring_of(hashed)
        alone.ask(PROMPT[: request - 3], request, max_new_tokens=40)
        alone.run()
        assert answer(ring, request) == answer(alone, request)
    assert ring.idle and not ring.errors()
    assert any(len(batch) > 1 for batch in ring.engines[1].batches)


def test_a_close_in_the_middle_of_guesses_frees_all() -> None:
    ring = ring_of(repeating)
    ring.ask(PROMPT, max_new_tokens=100, speculate=7, padded=True)
    for _ in range(9):
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                work.accept(_Given(ring.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 7, 0))
    ring.run()
    assert ring.idle
    assert not ring.errors()


def test_guesses_amid_a_prompt_are_refused() -> None:
    ring = ring_of(repeating)
    hidden, meta = Tensor.of(np.ones((4, 8), np.float32)), meta_of(11, speculate=3)
    ring.queues[1].append(Parcel(Kind.HIDDEN, 1, 7, 0, 0, hidden, meta))
    ring.queues[1].append(Parcel(Kind.HIDDEN, 1, 7, 4, FLAG_DRAFTS, hidden, drafts_meta([1, 2, 3])))
    ring.run()
    assert "3 guesses at row 4" in ring.errors()[0].text


def test_guesses_of_an_old_epoch_are_dropped() -> None:
    ring, hidden = ring_of(repeating), Tensor.of(np.ones((3, 8), np.float32))
    ring.queues[1].append(Parcel(Kind.HIDDEN, 9, 7, 4, FLAG_DRAFTS, hidden, drafts_meta([1, 2])))
    ring.run()
    assert ring.works[1].tally.stale == 1


class _Given:
    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel


BAD_DRAFTS: dict[str, tuple[bytes, int, int, str]] = {
    "no guesses": (b"", 2, 11, "holds no guesses"),
    "half a number": (b"\x01\x00", 2, 11, "holds no guesses"),
    "too many": (bytes(4 * 8), 9, 11, "holds no guesses"),
    "more than asked for": (drafts_meta([1] * 4), 5, 11, "4 guesses"),
    "other rows": (drafts_meta([1, 2]), 2, 11, "the tensor is"),
    "a negative one": (drafts_meta([-1]), 2, 11, "no token id"),
    "beyond the vocabulary": (drafts_meta([32]), 2, 11, "vocabulary"),
    "in the prompt": (drafts_meta([3]), 2, 10, "rows from 10 came"),
    "a gap": (drafts_meta([3]), 2, 12, "rows from 12 came"),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_bad_guesses_end_their_request_with_a_reason(name: str, stage: int) -> None:
    meta, rows, position, said = BAD_DRAFTS[name]
    ring = entered(3)
    hidden = Tensor.of(np.ones((rows, 8), np.float32))
    ring.queues[stage].append(Parcel(Kind.HIDDEN, 1, 7, position, FLAG_DRAFTS, hidden, meta))
    ring.run()
    assert [said in error.text for error in ring.errors()] == [True]
    assert ring.idle


def entered(most: int, padded: bool = True, **changes: object) -> Ring:
    """A ring in which the prompt of a request went through, and its first token lies before the first stage."""
    ring = ring_of(repeating, **changes)
    ring.ask(PROMPT, max_new_tokens=60, speculate=most, padded=padded)
    while not ring.answers:
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                work.accept(_Given(ring.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    ring.queues[0].clear()
    return ring


def test_guesses_for_a_request_that_has_none_and_rows_alone_of_one_that_has_are_refused() -> None:
    hidden, two = Tensor.of(np.ones((1, 8), np.float32)), Tensor.of(np.ones((2, 8), np.float32))
    bad = {
        0: Parcel(Kind.HIDDEN, 1, 7, 11, FLAG_DRAFTS, two, drafts_meta([1])),
        3: Parcel(Kind.HIDDEN, 1, 7, 11, 0, hidden),
        2: Parcel(Kind.ROWS, 1, 0, 0, 0, hidden, rows_meta([RowOf(7, 11)])),
    }
    for most, parcel in bad.items():
        ring = entered(most, padded=most > 0)
        ring.queues[1].append(parcel)
        ring.run()
        assert [error.code for error in ring.errors()] == ["protocol"]
        assert ring.idle


@pytest.mark.parametrize("ids", [[9], [5, 9], [5, 6, 1, 9], [5, 6, 1, 2]])
def test_the_first_stage_takes_guesses_that_were_right_and_one_token_more(ids: list[int]) -> None:
    ring = three_guessed()
    ring.works[0].accept(_Given(tokens(16, ids)), 9.0)  # type: ignore[arg-type]
    ring.works[0].work(9.0)
    assert not ring.errors()
    [parcel] = ring.queues[1]
    assert parcel.position == 15 + len(ids)
    assert ring.engines[0].kept[0][16 : 16 + len(ids)] == ids


@pytest.mark.parametrize(
    ("position", "ids"),
    [(15, [4]), (17, [5]), (16, [9, 6]), (16, [5, 6, 1, 2, 3]), (16, [5] * 50), (16, [99]), (16, [5, 99]), (0, [5])],
)
def test_what_can_not_have_been_drawn_ends_the_request(position: int, ids: list[int]) -> None:
    ring = three_guessed()
    ring.works[0].accept(_Given(tokens(position, ids)), 9.0)  # type: ignore[arg-type]
    assert [error.code for error in ring.errors()] == ["protocol"]
    assert ring.works[0].live == 0


def test_tokens_that_come_twice_end_the_request() -> None:
    ring = three_guessed()
    for _ in range(2):
        ring.works[0].accept(_Given(tokens(16, [5, 6])), 9.0)  # type: ignore[arg-type]
    assert [error.code for error in ring.errors()] == ["protocol"]


def tokens(position: int, ids: list[int]) -> Parcel:
    return Parcel(Kind.TOKENS, 1, 7, position, 0, Tensor.of(np.array(ids, np.int32)))


def three_guessed() -> Ring:
    """Row 15, of a 4, and guesses 5, 6, 1 are under way: the text repeated itself for long enough."""
    ring = entered(3)
    work = ring.works[0]
    for position, token in [(11, 6), (12, 1), (13, 2), (14, 3), (15, 4)]:
        ring.queues[1].clear()
        work.accept(_Given(tokens(position, [token])), float(position))  # type: ignore[arg-type]
        work.work(0.0)
    [parcel] = ring.queues[1]
    assert (parcel.position, parcel.meta) == (15, drafts_meta([5, 6, 1]))
    ring.queues[1].clear()
    return ring


BAD_METAS: list[tuple[dict[str, object], list[int]]] = [
    ({"speculate": 0, "padded": True}, PROMPT),
    ({"speculate": 3, "padded": True}, [1]),
    ({"speculate": 3, "padded": True, "replay_tokens": 2}, PROMPT),
]


@pytest.mark.parametrize(("changes", "ids"), BAD_METAS)
def test_a_request_whose_steps_can_not_all_have_two_rows_is_refused(changes: dict[str, object], ids: list[int]) -> None:
    ring = ring_of(hashed)
    ring.ask(ids, **changes)
    ring.run()
    assert [error.code for error in ring.errors()] == ["protocol"]
    assert ring.idle


def test_more_guesses_than_may_be_are_no_request() -> None:
    ring = ring_of(hashed)
    meta = meta_of(2, speculate=7).replace(b'"speculate":7', b'"speculate":8')
    ring.queues[0].append(Parcel(Kind.TOKENS, 1, 7, 0, 0, Tensor.of(np.array([1, 2], np.int32)), meta))
    ring.run()
    assert not ring.answers and "speculate" in ring.works[0].last_refusal


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_comes_meanwhile_no_stage_breaks_and_nothing_stays(data: st.DataObject) -> None:
    ring = entered(data.draw(st.integers(1, 7)), data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 4))):
        stage = data.draw(st.integers(0, 2))
        rows = data.draw(st.integers(1, 9))
        hidden = stage > 0
        array = np.ones((rows, 8), np.float32) if hidden else np.full(rows, data.draw(st.integers(0, 40)), np.int32)
        flags = data.draw(st.sampled_from([0, FLAG_DRAFTS]))
        meta = data.draw(st.one_of(st.binary(max_size=40), st.just(drafts_meta([3] * max(1, min(7, rows - 1))))))
        meta = meta if flags else b""
        position = data.draw(st.integers(0, 20))
        kind = Kind.HIDDEN if hidden else Kind.TOKENS
        ring.queues[stage].append(Parcel(kind, 1, 7, position, flags, Tensor.of(array), meta))
    ring.run()
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 7, 3))
    ring.run()
    assert ring.idle


def test_rows_of_steps_follow_one_another_but_for_those_that_were_wrong() -> None:
    ring = ring_of(hashed)
    ring.ask(PROMPT, max_new_tokens=50, speculate=7, padded=True)
    ring.run()
    steps = [(position, count) for _, position, count in ring.engines[1].steps if position >= len(PROMPT)]
    for (before, count), (after, _) in pairwise(steps):
        assert before < after <= before + count
    assert any(after < before + count for (before, count), (after, _) in pairwise(steps))
