"""Who is to take part: what each way of choosing comes to in the same time; the time is computed, training is real.

20 boards share one radio channel (tests/rounds/radio.py), 3 Mbit from each that takes part; near: all at 300 m, far:
from 100 to 500 m and as unequal in computing. How long a round takes is computed, whom it takes along is the project's
own choice (coordinator.rounds). What is trained is a task module on MiniLM's vectors of package descriptions (the
sections of benchmarks/parts/sections). Alike: every board has of all labels; skewed: each has two of them. All get the
same time, so who takes fewer boards along makes more rounds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from statistics import mean
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.parts import sections
from benchmarks.report import Figure, at_least, at_most
from coordinator.rounds.airtime import Offer, split
from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.schedule import TRADEOFF_PER_DELAY, Knobs, Queues, after, choose, fastest
from coordinator.rounds.settling import drawn
from tests.rounds.radio import DENSITY, Radio

Floats = npt.NDArray[np.float32]

BOARDS: Final = 20
LABELS: Final = 10
EACH: Final = 200
"""Texts of a board; half as many again of all are held out."""
SEEDS: Final = (1, 2, 3)
TIME_S: Final = 200.0
DELAYS_S: Final = (0.8, 1.2, 1.8)
COUNTS: Final = (2, 3, 5)
STEPS: Final = 5
RATE: Final = 0.5
SENT_BYTES: Final = 3e6 / 8
MEDIUM: Final = Radio(1e6, DENSITY)


class Policy(NamedTuple):
    """`who` as in a job; `count` for those that want so many, `delay_s` for the schedule."""

    who: str
    count: int = 0
    delay_s: float = 0.0
    penalty: str = "quadratic"
    least_share: float = 0.0

    @property
    def name(self) -> str:
        if self.who != "scheduled":
            return f"{self.who} {self.count}" if self.count else self.who
        owed = f", {self.least_share:g} owed" if self.least_share else ""
        return f"scheduled {self.delay_s:g} s, {self.penalty}{owed}"


POLICIES: Final = (
    Policy("all"),
    *(Policy(who, count) for who in ("random", "round-robin", "fastest") for count in COUNTS),
    Policy("scheduled", 0, DELAYS_S[1], "linear"),
    *(Policy("scheduled", 0, delay_s) for delay_s in DELAYS_S),
    *(Policy("scheduled", 0, delay_s, "quadratic", 0.1) for delay_s in DELAYS_S),
)


class Went(NamedTuple):
    """A run of one policy: who took part in each round, and seconds of each."""

    chosen: list[tuple[int, ...]]
    seconds: list[float]

    @property
    def parts(self) -> list[float]:
        """Share of rounds that each board took part in."""
        counted = Counter(board for chosen in self.chosen for board in chosen)
        return [counted[board] / len(self.chosen) for board in range(BOARDS)]


def offers(rng: np.random.Generator, far: bool) -> list[Offer]:
    """Of one round: Rayleigh fading."""
    km = np.linspace(0.1, 0.5, BOARDS) if far else np.full(BOARDS, 0.3)
    compute_s = np.linspace(0.05, 0.6, BOARDS) if far else rng.uniform(0.16, 0.24, BOARDS)
    power = 0.1 * 10 ** (-(128.1 + 37.6 * np.log10(km)) / 10) * rng.exponential(1.0, BOARDS)
    return [Offer(f"{n:02}", float(compute_s[n]), SENT_BYTES, float(max(power[n], 1e-16))) for n in range(BOARDS)]


def run(policy: Policy, far: bool, seed: int) -> Went:
    """Rounds until the time is over."""
    rng = np.random.default_rng(seed)
    knobs = Knobs(
        delay_s=policy.delay_s,
        tradeoff=TRADEOFF_PER_DELAY * policy.delay_s,
        penalty=policy.penalty,  # type: ignore[arg-type]
        least_share=policy.least_share,
    )
    job = Job(name="p", model="m", data="d", seed=seed, rounds=_rounds(policy))
    queues, went = Queues(), Went([], [])
    while sum(went.seconds) < TIME_S:
        there = offers(rng, far)
        names = [one.device for one in there]
        if policy.who == "scheduled":
            chosen, divided = choose(there, MEDIUM, knobs, queues)
            queues = after(queues, knobs, names, chosen, divided.tau_s)
        else:
            number = len(went.seconds)
            chosen = fastest(there, policy.count) if policy.who == "fastest" else drawn(names, job, number)
            divided = split([one for one in there if one.device in chosen], MEDIUM)
        went.chosen.append(tuple(int(name) for name in chosen))
        went.seconds.append(divided.tau_s)
    return went


def _rounds(policy: Policy) -> Rounds:
    if policy.who in ("random", "round-robin"):
        return Rounds(who=policy.who, devices=policy.count)  # type: ignore[arg-type]
    return Rounds()


class Data(NamedTuple):
    """Vectors [n, hidden] and labels [n] of each board, and of what is held out."""

    boards: list[tuple[Floats, npt.NDArray[np.int64]]]
    held_out: tuple[Floats, npt.NDArray[np.int64]]


def data_of(vectors: Floats, labels: npt.NDArray[np.int64], skewed: bool, seed: int) -> Data:
    """Of each label as many. Skewed: a board has two of them, each label being on as many boards as any other."""
    rng = np.random.default_rng(seed)
    held = BOARDS * EACH // 2
    by_label = [rng.permutation(np.flatnonzero(labels == label)) for label in range(LABELS)]
    held_out = np.concatenate([places[: held // LABELS] for places in by_label])
    rest = [places[held // LABELS :] for places in by_label]
    if skewed:
        pieces = [np.array_split(places[: BOARDS * EACH // LABELS], 2 * BOARDS // LABELS) for places in rest]
        flat = [piece for of_label in pieces for piece in of_label]
        order = rng.permutation(len(flat))
        own = [np.concatenate([flat[order[2 * n]], flat[order[2 * n + 1]]]) for n in range(BOARDS)]
    else:
        own = np.array_split(rng.permutation(np.concatenate([p[: BOARDS * EACH // LABELS] for p in rest])), BOARDS)
    return Data([(vectors[at], labels[at]) for at in own], (vectors[held_out], labels[held_out]))


def loss_of(data: Data, went: Went) -> tuple[float, float]:
    """Held-out loss and share of right labels behind all rounds."""
    head = np.zeros((LABELS, data.held_out[0].shape[1] + 1))
    for chosen in went.chosen:
        head = np.mean([_trained(head, *data.boards[board]) for board in chosen], axis=0)
    scores = _scores(head, data.held_out[0])
    at = np.arange(len(scores))
    return float(-scores[at, data.held_out[1]].mean()), float((scores.argmax(axis=1) == data.held_out[1]).mean())


def _trained(head: npt.NDArray[np.float64], vectors: Floats, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    head = head.copy()
    for _ in range(STEPS):
        off = np.exp(_scores(head, vectors))
        off[np.arange(len(labels)), labels] -= 1
        head[:, :-1] -= RATE * off.T @ vectors / len(labels)
        head[:, -1] -= RATE * off.mean(axis=0)
    return head


def _scores(head: npt.NDArray[np.float64], vectors: Floats) -> npt.NDArray[np.float64]:
    """[n, labels] logarithms of probabilities."""
    raw = vectors @ head[:, :-1].T + head[:, -1]
    raw = raw - raw.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    return found


def measure() -> list[Figure]:
    vectors, labels = sections.vectors_of(LABELS, BOARDS * EACH * 3 // 2 // LABELS)
    figures: list[Figure] = []
    for far in (False, True):
        where = "far" if far else "near"
        went = {policy: [run(policy, far, seed) for seed in SEEDS] for policy in POLICIES}
        losses: dict[str, dict[Policy, float]] = {}
        for policy in POLICIES:
            name, runs = f"{where}, {policy.name}", went[policy]
            figures.append(Figure(f"{name}: a round", mean(mean(one.seconds) for one in runs), "s"))
            figures.append(Figure(f"{name}: boards in a round", mean(sum(one.parts) for one in runs), ""))
            figures.append(Figure(f"{name}: least part of a board", min(min(one.parts) for one in runs), "of rounds"))
        for skewed in (False, True):
            how = "skewed" if skewed else "alike"
            data = [data_of(vectors, labels, skewed, seed) for seed in SEEDS]
            losses[how] = {}
            for policy in POLICIES:
                found = [loss_of(one, ran) for one, ran in zip(data, went[policy], strict=True)]
                losses[how][policy] = mean(loss for loss, _ in found)
                name = f"{where}, {how}, {policy.name}"
                spread = max(loss for loss, _ in found) - min(loss for loss, _ in found)
                figures.append(Figure(f"{name}: loss", losses[how][policy], "nats"))
                figures.append(Figure(f"{name}: loss, largest less smallest", spread, "nats"))
                figures.append(Figure(f"{name}: right", mean(right for _, right in found), "of labels"))
            print(f"... {where}, {how}", file=sys.stderr)
        figures += list(_facts(where, went, losses["skewed"]))
    return figures


def _facts(where: str, went: dict[Policy, list[Went]], skewed: dict[Policy, float]) -> Iterator[Figure]:
    """What must hold, and what is known not to flatter the schedule."""
    fair = [policy for policy in POLICIES if policy.least_share]
    plain = [policy for policy in POLICIES if policy.who == "scheduled" and not policy.least_share]
    best = min(fair, key=lambda policy: skewed[policy])
    for who in ("random", "round-robin"):
        rival = min((policy for policy in POLICIES if policy.who == who), key=lambda policy: skewed[policy])
        ratio = skewed[best] / skewed[rival]
        yield Figure(f"{where}, skewed, best schedule / best {who}: loss", ratio, "ratio")
    all_of_them = skewed[Policy("all")]
    yield Figure(f"{where}, skewed, best schedule / all: loss", skewed[best] / all_of_them, "ratio")
    least = min(loss for policy, loss in skewed.items() if policy.who != "all")
    yield at_most(f"{where}, skewed, best of those that leave some out / all: loss", least / all_of_them, "ratio", 1.0)
    if where == "near":
        for who in ("random", "round-robin"):
            yield at_least(f"near, boards at the same mean time / {who}", _more(went, who), "ratio", 1.2)
        return
    for policy in plain:
        if policy.penalty != "quadratic":
            continue
        owed = policy._replace(least_share=0.1)
        starved = min(min(one.parts) for one in went[policy])
        kept = min(min(one.parts) for one in went[owed])
        name = f"far, {policy.delay_s:g} s"
        yield at_most(f"{name}: least part of a board where nothing is owed", starved, "of rounds", 0.05)
        yield at_least(f"{name}: least part where 0.1 is owed", kept, "of rounds", 0.07)
        yield at_most(f"{name}, skewed: loss where it is owed / not", skewed[owed] / skewed[policy], "ratio", 1.0)


def _more(went: dict[Policy, list[Went]], who: str) -> float:
    """Least over the delays: how many times as many boards the schedule takes along as rounds of `who` that take as
    long."""
    by_count = [(mean(mean(one.seconds) for one in went[p]), p.count) for p in POLICIES if p.who == who]
    times, counts = zip(*sorted(by_count), strict=True)
    found = []
    for policy in POLICIES:
        if policy.who == "scheduled" and not policy.least_share and policy.penalty == "quadratic":
            seconds = mean(mean(one.seconds) for one in went[policy])
            if times[0] <= seconds <= times[-1]:
                found.append(mean(sum(one.parts) for one in went[policy]) / float(np.interp(seconds, times, counts)))
    return min(found)
