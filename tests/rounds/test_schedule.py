"""The schedule: best by brute force, its long-term laws, and whom it starves unless it owes them something."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds.airtime import Medium, Offer, Own, Shared, split, split_equally
from coordinator.rounds.schedule import ALL_SETS_UP_TO, Choice, Knobs, Queues, after, choose, fastest
from tests.rounds.radio import DENSITY, Radio
from tests.rounds.test_airtime import FOUR

LONG_S = 1.2


def knobs(tradeoff: float, **fields: object) -> Knobs:
    return Knobs(**{"delay_s": LONG_S, "tradeoff": tradeoff, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tradeoff", "late_s", "linear", "quadratic"), [(10, 1, 4, 4), (10, 5, 4, 3), (10, 20, 1, 1), (1, 5, 1, 1)]
)
def test_how_many_take_part_in_the_worked_example(tradeoff: float, late_s: float, linear: int, quadratic: int) -> None:
    for penalty, count in (("linear", linear), ("quadratic", quadratic)):
        found = choose(FOUR, Shared(), knobs(tradeoff, penalty=penalty), Queues(late_s=late_s))
        assert len(found.devices) == count, penalty


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.sampled_from(("linear", "quadratic")), st.booleans())
def test_no_set_is_better(rng: object, count: int, penalty: str, equally: bool) -> None:
    draw = rng.uniform  # type: ignore[attr-defined]
    offers = [Offer(f"d{number}", draw(0, 2), draw(1e5, 3e6), draw(1e5, 1e7), draw(0.1, 3)) for number in range(count)]
    queues = Queues(late_s=draw(0, 10), owed={offer.device: draw(0, 3) for offer in offers})
    wanted = knobs(draw(0.1, 50), penalty=penalty)
    total = sum(offer.weight for offer in offers)

    def cost(chosen: tuple[Offer, ...], tau_s: float) -> float:
        left_out = 1 - sum(offer.weight for offer in chosen) / total
        lost = left_out**2 if penalty == "quadratic" else left_out
        owed = sum(queues.owed[offer.device] for offer in chosen)
        return wanted.tradeoff * lost + queues.late_s * tau_s - owed

    divide = split_equally if equally else split
    best = min(
        cost(chosen, divide(chosen, Shared()).tau_s)
        for m in range(1, count + 1)
        for chosen in itertools.combinations(offers, m)
    )
    found = choose(offers, Shared(), wanted, queues, equally)
    taken = tuple(offer for offer in offers if offer.device in found.devices)
    assert cost(taken, found.split.tau_s) == pytest.approx(best, rel=1e-6, abs=1e-9)


def together_s(offers: Sequence[Offer], each_s: float) -> float:
    """Of a round of a split model: the slowest, and what each adds."""
    return max(offer.offset_s for offer in offers) + each_s * len(offers)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 10), st.sampled_from(("linear", "quadratic")), st.booleans())
def test_no_set_is_better_where_all_make_each_step_together(rng: object, count: int, penalty: str, fair: bool) -> None:
    """With a quadratic penalty and more devices than all sets are tried of, where nothing is owed."""
    draw = rng.uniform  # type: ignore[attr-defined]
    fair = fair and (penalty == "linear" or count <= ALL_SETS_UP_TO)
    offers = [Offer(f"d{number}", draw(0, 2), 0.0, 1e9, draw(0.1, 3)) for number in range(count)]
    queues = Queues(late_s=draw(0, 10), owed={offer.device: draw(0, 3) * fair for offer in offers})
    wanted, each_s = knobs(draw(0.1, 50), penalty=penalty), draw(0.01, 1)
    total = sum(offer.weight for offer in offers)

    def cost(chosen: Sequence[Offer]) -> float:
        left_out = 1 - sum(offer.weight for offer in chosen) / total
        lost = left_out**2 if penalty == "quadratic" else left_out
        owed = sum(queues.owed[offer.device] for offer in chosen)
        return wanted.tradeoff * lost + queues.late_s * together_s(chosen, each_s) - owed

    sets = (chosen for m in range(1, count + 1) for chosen in itertools.combinations(offers, m))
    found = choose(offers, Own(), wanted, queues, each_s=each_s)
    taken = [offer for offer in offers if offer.device in found.devices]
    assert cost(taken) == pytest.approx(min(map(cost, sets)), rel=1e-9, abs=1e-9)
    assert found.split.tau_s == pytest.approx(max(offer.offset_s for offer in taken))


def test_how_many_make_a_step_together_in_a_worked_example() -> None:
    """Rounds of 1, 2, 3, 4 boards take 1.5, 2.5, 3.5, 7 s; with penalty u^2, tradeoff 16 and a queue of q that costs
    9 + 1.5 q, 4 + 2.5 q, 1 + 3.5 q, 7 q: four boards up to q = 2 / 7, three to 3, two to 5, then one."""
    offers = [Offer(name, own_s, 0.0, 1e9) for name, own_s in (("a", 1.0), ("b", 1.5), ("c", 2.0), ("d", 5.0))]
    for late_s, devices in ((0.28, "abcd"), (0.29, "abc"), (2.9, "abc"), (3.1, "ab"), (4.9, "ab"), (5.1, "a")):
        found = choose(offers, Own(), knobs(16.0), Queues(late_s=late_s), each_s=0.5)
        assert "".join(found.devices) == devices, late_s


def test_the_queue_bounds_how_late_steps_made_together_are() -> None:
    rng = np.random.default_rng(7)
    queues, seconds, wanted = Queues(), [], knobs(30 * 2.0, delay_s=2.0, least_share=0.1)
    parts: dict[str, int] = {}
    for _ in range(300):
        offers = [Offer(f"d{n}", 0.2 * (n + 1) * float(rng.uniform(0.8, 1.2)), 0.0, 1e9) for n in range(12)]
        found = choose(offers, Own(), wanted, queues, each_s=0.2)
        took_s = found.split.tau_s + 0.2 * len(found.devices)
        queues = after(queues, wanted, [offer.device for offer in offers], found.devices, took_s)
        seconds.append(took_s)
        for device in found.devices:
            parts[device] = parts.get(device, 0) + 1
    assert queues.late_s / 300 >= np.mean(seconds) - 2.0 - 1e-9
    assert 1.9 < np.mean(seconds) <= 1.2 * 2.0 and min(parts.values()) >= 15 and len(parts) == 12


def test_of_many_devices_the_choice_is_near_the_best_of_few_kinds() -> None:
    """20 devices of equal weights and nothing owed: the frontier holds the best set."""
    rng = np.random.default_rng(3)
    for _ in range(3):
        offers = cell(rng, far=False)
        wanted, queues = knobs(36.0), Queues(late_s=float(rng.uniform(0, 20)))
        found = choose(offers, MEDIUM, wanted, queues)
        costs = []
        for m in range(1, 21):
            best = choose_of(offers, m)
            costs.append(wanted.tradeoff * (1 - m / 20) ** 2 + queues.late_s * best.split.tau_s)
        mine = wanted.tradeoff * (1 - len(found.devices) / 20) ** 2 + queues.late_s * found.split.tau_s
        assert mine <= min(costs) * (1 + 1e-9)


MEDIUM: Medium = Radio(1e6, DENSITY)


def choose_of(offers: list[Offer], m: int) -> Choice:
    from coordinator.rounds.airtime import frontier

    _, members = frontier(offers, MEDIUM)[m - 1]
    chosen = [offers[number] for number in members]
    return Choice(tuple(offer.device for offer in chosen), split(chosen, MEDIUM))


def cell(rng: np.random.Generator, far: bool, km: np.ndarray | None = None) -> list[Offer]:
    """20 devices, 3 Mbit each; all at 300 m, or anywhere from 100 to 500 m and as unequal in computing."""
    if km is None:
        km = np.linspace(0.1, 0.5, 20) if far else np.full(20, 0.3)
    compute_s = np.linspace(0.05, 0.6, 20) if far else rng.uniform(0.16, 0.24, 20)
    power = 0.1 * 10 ** (-(128.1 + 37.6 * np.log10(km)) / 10) * rng.exponential(1.0, 20)
    return [Offer(f"d{n:02}", float(compute_s[n]), 3e6 / 8, float(max(power[n], 1e-16))) for n in range(20)]


def run(
    wanted: Knobs, rounds: int, far: bool, seed: int
) -> tuple[list[float], list[float], dict[str, float], list[float]]:
    """Seconds and weight of each round, how often each device took part, and the queue after each."""
    rng = np.random.default_rng(seed)
    queues = Queues()
    seconds, weights, late = [], [], []
    parts: dict[str, float] = {}
    for _ in range(rounds):
        offers = cell(rng, far)
        found = choose(offers, MEDIUM, wanted, queues)
        queues = after(queues, wanted, [offer.device for offer in offers], found.devices, found.split.tau_s)
        seconds.append(found.split.tau_s)
        weights.append(len(found.devices) / 20)
        late.append(queues.late_s)
        for device in found.devices:
            parts[device] = parts.get(device, 0.0) + 1 / rounds
    return seconds, weights, parts, late


def test_the_queue_bounds_how_late_rounds_are_on_a_shared_channel() -> None:
    rng = np.random.default_rng(5)
    queues, seconds = Queues(), []
    wanted = knobs(1.0, delay_s=0.7)
    for _ in range(150):
        offers = [one._replace(rate=one.rate * float(rng.uniform(0.5, 2)), offset_s=one.offset_s / 2) for one in FOUR]
        found = choose(offers, Shared(), wanted, queues)
        queues = after(queues, wanted, [offer.device for offer in offers], found.devices, found.split.tau_s)
        seconds.append(found.split.tau_s)
    assert queues.late_s / 150 >= np.mean(seconds) - 0.7 - 1e-9
    assert 0.6 < np.mean(seconds) <= 1.05 * 0.7


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_the_queue_bounds_how_late_rounds_are(penalty: str) -> None:
    for tradeoff in (1.2, 36.0):
        seconds, _, _, late = run(knobs(tradeoff, penalty=penalty), 300, False, 1)
        excess = float(np.mean(seconds)) - LONG_S
        assert late[-1] / 300 >= excess - 1e-9
        assert np.mean(seconds) <= 1.05 * LONG_S


@pytest.mark.slow
def test_more_tradeoff_takes_more_of_the_data_along_and_lets_the_queue_grow() -> None:
    found = [run(knobs(LONG_S * times), 200, False, 2) for times in (0.1, 1, 10, 100)]
    took = [float(np.mean(weights)) for _, weights, _, _ in found]
    assert all(later >= earlier * 0.98 for earlier, later in itertools.pairwise(took)), took
    assert np.mean(found[3][3]) >= 0.95 * np.mean(found[2][3])


@pytest.mark.slow
def test_at_the_same_mean_time_it_takes_more_along_than_chance_and_turns() -> None:
    seconds, weights, _, _ = run(knobs(30 * LONG_S), 200, False, 3)
    mine_s, mine = float(np.mean(seconds)), float(np.mean(weights))

    def baseline(pick: Callable[[np.random.Generator, int], list[int]]) -> float:
        rng = np.random.default_rng(3)
        times = []
        for number in range(200):
            offers = cell(rng, False)
            times.append(split([offers[n] for n in pick(rng, number)], MEDIUM).tau_s)
        return float(np.mean(times))

    for of_m in (
        lambda m: baseline(lambda rng, _: list(rng.choice(20, m, replace=False))),
        lambda m: baseline(lambda _, number: [(number * m + place) % 20 for place in range(m)]),
    ):
        by_m = {m: of_m(m) for m in (1, 2, 3, 4, 5)}
        within = np.interp(mine_s, list(by_m.values()), list(by_m))  # how many they take along in the same time
        assert mine >= 1.2 * within / 20, (mine, within / 20, by_m)


@pytest.mark.slow
def test_who_is_far_starves_unless_something_is_owed_to_him() -> None:
    plain = run(knobs(30 * LONG_S), 300, True, 4)[2]
    fair = run(knobs(30 * LONG_S, least_share=0.1), 300, True, 4)[2]
    everybody = [f"d{number:02}" for number in range(20)]
    assert min(plain.get(device, 0.0) for device in everybody) <= 0.05
    assert min(fair.get(device, 0.0) for device in everybody) >= 0.07


def test_what_is_owed_counts_rounds_in_which_somebody_was_there() -> None:
    wanted = knobs(1.0, least_share=0.25)
    queues = after(Queues(), wanted, ["a", "b"], ["a"], LONG_S + 0.5)
    assert queues.late_s == pytest.approx(0.5) and queues.owed == {"a": 0.0, "b": 0.25}
    queues = after(queues, wanted, ["a"], ["a"], 0.1)
    assert queues == Queues(late_s=0.0, owed={"a": 0.0, "b": 0.25})


def test_the_fastest_are_those_that_would_be_first_alone() -> None:
    assert fastest(FOUR, 1) == ("a",) and fastest(FOUR, 2) == ("a", "b") and fastest(FOUR, 4) == ("a", "b", "c", "d")
