"""What the index guesses is what stood behind the same words the last time; what is worth guessing pays."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from agent.workers.drafting import MANY, Drafting, Rounds, tokens_of
from agent.workers.lookup import LENGTHS, NOTHING, Guess, Lookup

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def brute(tokens: Sequence[int], most: int) -> Guess:
    """The same, by looking at the whole text."""
    end = len(tokens)
    for length in LENGTHS:
        run = list(tokens[end - length :])
        for place in range(end - 1, length - 1, -1):
            if length <= end and list(tokens[place - length : place]) == run:
                made = list(tokens)
                for at in range(most):
                    made.append(made[place + at])
                return Guess(tuple(made[end:]), length)
    return NOTHING


@given(TEXTS, st.integers(1, 9))
def test_a_guess_is_what_followed_the_longest_run_the_last_time(tokens: list[int], most: int) -> None:
    lookup = Lookup()
    for place, token in enumerate(tokens):
        assert lookup.guess(most) == brute(tokens[:place], most)
        lookup.add([token])
    assert lookup.guess(most) == brute(tokens, most)


@given(TEXTS, st.integers(1, 12), st.integers(1, 9))
def test_with_less_memory_a_guess_still_followed_the_run_some_time(tokens: list[int], most: int, many: int) -> None:
    lookup = Lookup(most)
    for token in tokens:
        lookup.add([token])
    found = lookup.guess(many)
    assert len(lookup._followed) + len(lookup._older) <= 2 * len(LENGTHS) * most
    if found.tokens:
        run = [*tokens[-found.length :], found.tokens[0]]
        assert any(tokens[at : at + len(run)] == run for at in range(len(tokens)))
    if tokens and tokens[-1] in tokens[-1 - most : -1]:
        assert found.tokens, "what stood within reach is found"


def test_a_long_prompt_is_remembered_from_its_end() -> None:
    lookup = Lookup(100)
    lookup.add(list(range(1000)))
    assert len(lookup) == 100
    lookup.add([950])
    assert lookup.guess(3) == Guess((951, 952, 953), 1)
    lookup.add([5])
    assert lookup.guess(3) == NOTHING
    assert lookup.guess(0) == NOTHING


def test_a_round_costs_more_by_rows_and_an_outlier_little() -> None:
    rounds = Rounds()
    assert rounds.expected(8) < 2
    for _ in range(20):
        rounds.add(2, 0.010)
        rounds.add(8, 0.024)
    assert abs(rounds.expected(8) - 2.4) < 0.05
    rounds.add(2, 9.0)
    assert rounds.expected(2) == 1.0
    assert 1.5 < rounds.expected(8) < 2.5


def follow(drafting: Drafting, text: Sequence[int], start: int, row_s: float) -> list[int]:
    """Have `text` come from `start` on, in rounds of 10 ms and so much more per further row; give how many guesses
    went with each."""
    sent, now_s, at = [], 0.0, start
    drafting.came([text[at]], now_s)
    while at + 9 < len(text):
        drafts = drafting.draft(text[at], 100, False)
        right = 0
        while right < len(drafts) and drafts[right] == text[at + 1 + right]:
            right += 1
        now_s += 0.010 + row_s * len(drafts)
        drafting.came(text[at + 1 : at + 2 + right], now_s)
        at += 1 + right
        sent.append(len(drafts))
    return sent


def test_a_text_that_repeats_its_prompt_is_guessed_far_ahead() -> None:
    prompt = list(range(200))
    padded = follow(Drafting(prompt, 7, True), prompt + prompt, 200, 0.001)
    assert padded[:4] == [1] * 4
    assert set(padded[5:]) == {7}
    sent = follow(Drafting(prompt, 7, False), prompt + prompt, 200, 0.001)
    assert min(sent[1:]) >= 1
    assert set(sent[6:]) == {7}


def test_where_rows_cost_as_much_as_rounds_nothing_is_guessed_for_long() -> None:
    prompt = list(range(300))
    padded = follow(Drafting(prompt, 7, True), prompt + prompt, 300, 0.030)
    assert sum(many > 1 for many in padded) < 5


@given(st.lists(st.integers(0, 5), min_size=30, max_size=120), st.floats(0, 0.1))
def test_where_rows_may_stand_alone_times_decide_nothing(text: list[int], row_s: float) -> None:
    slow, fast = (follow(Drafting(text[:12], 7, False), text, 12, cost_s) for cost_s in (row_s, 0.0))
    assert slow == fast


def test_a_text_that_repeats_nothing_is_left_alone() -> None:
    generator = random.Random(4)
    text = [generator.randrange(12) for _ in range(600)]
    sent = follow(Drafting(text[:100], 7, False), text, 100, 0.003)
    assert sum(sent[100:]) < 40


def test_what_is_padded_always_has_a_second_row_and_counts_only_guesses() -> None:
    drafting = Drafting([1, 2, 3], 7, True)
    assert drafting.draft(3, 5, False) == (3,)
    assert drafting.counted == 0
    assert drafting.came([3, 9], 1.0) == 0
    drafting = Drafting([1, 2, 1], 7, True)
    assert drafting.draft(1, 5, True) == (2,)
    assert drafting.counted == 1
    assert drafting.came([2, 9], 1.0) == 1


def test_in_company_a_request_that_may_step_alone_guesses_nothing() -> None:
    drafting, text = Drafting([1, 2] * 10, 7, False), [1, 2] * 20
    follow(drafting, text, 0, 0.001)
    assert len(drafting.draft(1, 100, False)) == 7
    assert drafting.draft(1, 100, True) == ()
    assert len(drafting.draft(1, 4, False)) == 3


@given(st.floats(0, 1), st.sampled_from(MANY))
def test_a_step_gives_at_least_one_token_and_at_most_one_per_row(likely: float, many: int) -> None:
    assert 1 <= tokens_of(likely, many) <= 1 + many
