"""Which rules give the mean product exactly, which nearly, and that none minds the order of arrival."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from models.lora.aggregate import (
    ANY_RANKS,
    Factors,
    Middle,
    Rule,
    Update,
    aggregated,
    pad,
    product,
    sent,
    shortened,
    shortened_to,
    taken,
    truncate,
)
from wire.errors import UsageError

RULES: tuple[Rule, ...] = ("fedavg", "ffa", "rolora", "fedsa", "stack", "pad", "svd")
ROWS, COLUMNS = 24, 20


def factors(rng: np.random.Generator, rank: int) -> Factors:
    a, b = rng.standard_normal((rank, COLUMNS)), rng.standard_normal((ROWS, rank))
    return Factors(a.astype(np.float32), b.astype(np.float32))


def updates(seed: int, ranks: list[int], frozen: str = "") -> list[Update]:
    rng = np.random.default_rng(seed)
    found = []
    first = factors(rng, ranks[0])
    for number, rank in enumerate(ranks):
        own = factors(rng, rank)
        own = own._replace(**{frozen: getattr(first, frozen)}) if frozen else own
        found.append(Update(f"board{number}", int(rng.integers(1, 100)), own))
    return found


def mean_product(them: list[Update]) -> np.ndarray:
    total = sum(update.samples for update in them)
    return np.sum([update.samples / total * product(update.factors) for update in them], axis=0)


def off(found: Factors, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(product(found) - wanted) / np.linalg.norm(wanted))


@given(some.integers(0, 10_000), some.sampled_from(RULES), some.integers(0, 3))
def test_the_order_of_arrival_changes_no_bit(seed: int, rule: Rule, number: int) -> None:
    them = updates(seed, [4, 2, 8] if rule in ANY_RANKS else [4, 4, 4])
    mixed = random.Random(seed).sample(them, len(them))
    one, other = aggregated(rule, them, number), aggregated(rule, mixed, number)
    assert one.a.tobytes() == other.a.tobytes() and one.b.tobytes() == other.b.tobytes()


@pytest.mark.parametrize(
    ("rule", "number", "frozen", "ranks"),
    [
        ("ffa", 0, "a", [4, 4, 4]),
        ("rolora", 0, "a", [4, 4, 4]),
        ("rolora", 1, "b", [4, 4, 4]),
        ("stack", 0, "", [1, 4, 8]),
    ],
)
def test_exact_rules_give_the_mean_product(rule: Rule, number: int, frozen: str, ranks: list[int]) -> None:
    them = updates(7, ranks, frozen)
    assert off(aggregated(rule, them, number), mean_product(them)) <= 1e-6


def test_the_mean_of_factors_is_off_the_more_the_further_they_went() -> None:
    rng = np.random.default_rng(3)
    start = factors(rng, 4)

    def drifted(by: float) -> float:
        them = [
            Update(
                f"b{k}",
                1,
                Factors(*((part + by * rng.standard_normal(part.shape)).astype(np.float32) for part in start)),
            )
            for k in range(8)
        ]
        return off(aggregated("fedavg", them), mean_product(them))

    assert 0 < drifted(0.01) < drifted(0.1) < 0.2
    independent = updates(5, [4] * 8)
    assert off(aggregated("fedavg", independent), mean_product(independent)) > 0.5


@given(some.integers(0, 1000), some.lists(some.integers(1, 8), min_size=1, max_size=5))
def test_svd_is_the_nearest_of_its_rank(seed: int, ranks: list[int]) -> None:
    them = updates(seed, ranks)
    wanted = mean_product(them)
    found = aggregated("svd", them)
    assert found.rank == max(ranks)
    u, sizes, v = np.linalg.svd(wanted)
    for rank in sorted(set(ranks)):
        nearest = (u[:, :rank] * sizes[:rank]) @ v[:rank]
        assert product(taken("svd", found, rank)) == pytest.approx(nearest, abs=1e-4)


def test_padding_changes_no_product_and_truncation_gives_the_factors_back() -> None:
    rng = np.random.default_rng(0)
    own = factors(rng, 3)
    padded = pad(own, 8)
    assert padded.rank == 8 and (product(padded) == product(own)).all()
    again = truncate(padded, 3)
    assert (again.a == own.a).all() and (again.b == own.b).all()


def test_padded_adapters_weigh_by_size_and_keep_common_leading_ranks() -> None:
    rng = np.random.default_rng(1)
    small, large = factors(rng, 2), factors(rng, 4)
    nothing = Update("z", 1000, Factors(np.zeros_like(large.a), np.zeros_like(large.b)))
    found = aggregated("pad", [Update("a", 1, large), nothing])
    assert off(found, product(large)) < 1e-6, "what has changed nothing counts for nothing"
    both = aggregated("pad", [Update("a", 1, small), Update("b", 1, small)])
    assert off(both, product(small)) < 1e-6 and both.rank == 2
    assert aggregated("pad", [Update("a", 1, small), Update("b", 1, large)]).rank == 4


def test_shortened_below_what_there_is_fills_with_zeros() -> None:
    own = factors(np.random.default_rng(2), 2)
    found = shortened(own, 5)
    assert found.rank == 5 and off(found, product(own)) < 1e-6


def test_what_is_sent() -> None:
    assert sent("ffa", 3) == ("b",) and sent("fedsa", 0) == ("a",)
    assert [sent("rolora", number) for number in range(3)] == [("b",), ("a",), ("b",)]
    assert all(sent(rule, 0) == ("a", "b") for rule in ("fedavg", "stack", "pad", "svd"))


def test_what_is_kept_at_home_is_not_mixed() -> None:
    them = updates(1, [4, 4])
    found = aggregated("fedsa", them)
    assert (found.b == them[0].factors.b).all() and not (found.a == them[0].factors.a).all()


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "fedsa"])
def test_different_ranks_are_refused_by_name(rule: Rule) -> None:
    with pytest.raises(UsageError, match="2, 4") as refused:
        aggregated(rule, updates(1, [4, 2]))
    assert "stack" in str(refused.value.try_)


def test_no_updates_and_other_weights_are_refused() -> None:
    own = factors(np.random.default_rng(2), 2)
    with pytest.raises(ValueError, match="nothing"):
        aggregated("fedavg", [])
    with pytest.raises(ValueError, match="different weights"):
        aggregated("stack", [Update("a", 1, own), Update("b", 1, Factors(own.a[:, :3], own.b))])


def test_nobody_with_samples_counts_alike() -> None:
    them = [update._replace(samples=0) for update in updates(1, [4, 4])]
    assert (aggregated("fedavg", them).a == ((them[0].factors.a + them[1].factors.a) / 2)).all()


@given(
    some.integers(0, 10_000), some.sampled_from(("median", "trimmed")), some.sampled_from(("fedavg", "ffa", "rolora"))
)
def test_a_few_that_send_anything_move_nothing_beyond_the_others(seed: int, middle: Middle, rule: Rule) -> None:
    honest = updates(seed, [3] * 6)
    wild = Factors(*(np.full_like(part, 1e30) for part in honest[0].factors))
    them = [*honest, Update("a-liar", 10**9, wild)]
    found = aggregated(rule, them, 0, middle)
    mixed = aggregated(rule, random.Random(seed).sample(them, len(them)), 0, middle)
    assert all((one == other).all() for one, other in zip(found, mixed, strict=True))
    for part in sent(rule, 0):
        all_of_part = np.stack([getattr(update.factors, part) for update in honest])
        inside = getattr(found, part)
        assert (inside >= all_of_part.min(axis=0)).all() and (inside <= all_of_part.max(axis=0)).all()


def test_the_middle_of_two_and_of_one_is_their_mean() -> None:
    for count in (1, 2):
        them = [update._replace(samples=1) for update in updates(3, [2] * count)]
        for middle in ("median", "trimmed"):
            for one, other in zip(aggregated("fedavg", them, 0, middle), aggregated("fedavg", them), strict=True):
                assert np.allclose(one, other, atol=1e-7)


def test_the_trimmed_mean_leaves_out_as_many_at_each_end() -> None:
    them = [
        Update(f"d{number}", 1, Factors(np.full((1, 1), value, np.float32), np.full((1, 1), value, np.float32)))
        for number, value in enumerate((-100.0, 1.0, 2.0, 6.0, 900.0))
    ]
    assert aggregated("fedavg", them, 0, "trimmed").a.item() == pytest.approx(3.0)
    assert aggregated("fedavg", them, 0, "median").a.item() == pytest.approx(2.0)


def test_a_change_that_is_too_long_keeps_its_direction() -> None:
    changes = [np.array([3.0, 4.0], np.float32), np.array([0.0, 4.0], np.float32), np.array([600.0, 800.0], np.float32)]
    found = shortened_to(2.0, changes)
    assert (found[0] == changes[0]).all() and (found[1] == changes[1]).all()
    assert found[2] == pytest.approx([6.0, 8.0]), "twice the median of 5, 4 and 1000"
