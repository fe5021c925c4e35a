"""What becomes of the adapters of several devices: one of the rules below, module by module. Pure, and the same bits in
whatever order they came: they are taken in the order of the devices' names and summed in float64.

An adapter adds s * B A to a frozen weight [m, n], with A [r, n] and B [m, r]. Wanted is the mean of the products; a
device counts by its samples. Where the mean of the factors is taken instead, terms of one device's B with another's A
come in, which are harmless as long as the devices stay near their common start.

    fedavg   mean of A, mean of B (FedIT)
    ffa      A is frozen and the same everywhere, mean of B: exact (FFA-LoRA, arXiv 2403.12313)
    rolora   mean of B in even rounds, of A in odd ones, the other frozen meanwhile: exact in each round
             (arXiv 2502.01755)
    fedsa    mean of A; B stays where it is (FedSA-LoRA)
    stack    all side by side: exact, for any ranks; what comes out has the sum of the ranks and belongs into the base
             weights (FLoRA, arXiv 2409.05976)
    pad      filled up with zeros to the largest rank, weighed by the size of their products, too; each device takes the
             first ranks of it (HetLoRA)
    svd      the best factors of the mean product, of which each device takes the first ranks (FlexLoRA,
             arXiv 2402.11505)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from wire.errors import UsageError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

Rule = Literal["fedavg", "ffa", "rolora", "fedsa", "stack", "pad", "svd"]
Middle = Literal["mean", "median", "trimmed"]
"""What stands for the elements of all devices. 'mean': weighted by samples. The others don't count samples, which
anybody may claim to have: 'median', and 'trimmed': the mean without the largest and smallest TRIMMED of them (Yin and
others, Byzantine-robust distributed learning, 2018)."""

TRIMMED: Final = 0.2
"""Share of the devices that is left out at each end, rounded up: of three or more one at least."""

ANY_RANKS: Final[tuple[Rule, ...]] = ("stack", "pad", "svd")
"""Rules for devices of different ranks."""


class Factors(NamedTuple):
    """A [r, n] and B [m, r], float32."""

    a: Floats
    b: Floats

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


class Update(NamedTuple):
    """What a device made of the factors of a module, from so many samples."""

    device: str
    samples: int
    factors: Factors


def sent(rule: Rule, round_number: int) -> tuple[str, ...]:
    """Which factors devices train and send in a round."""
    if rule == "ffa":
        return ("b",)
    if rule == "fedsa":
        return ("a",)
    if rule == "rolora":
        return ("b",) if round_number % 2 == 0 else ("a",)
    return ("a", "b")


def aggregated(rule: Rule, updates: Sequence[Update], round_number: int = 0, middle: Middle = "mean") -> Factors:
    """The factors that come out of a round. Factors that nobody sent are those of the first device: they are the same
    on all, but for B with fedsa, which stays on each. Raises UsageError where ranks differ and the rule wants equal
    ones, and ValueError for no updates or different shapes of weights."""
    updates = sorted(updates, key=lambda update: update.device)
    _check(rule, updates)
    weights = _weights(updates)
    first = updates[0].factors
    if rule == "stack":
        return _stacked(updates, weights)
    if rule == "svd":
        most = max(update.factors.rank for update in updates)
        return shortened(_stacked(updates, weights), most)
    if rule == "pad":
        most = max(update.factors.rank for update in updates)
        weights = _by_size(updates, weights)
        padded = [pad(update.factors, most) for update in updates]
        return Factors(_mean([one.a for one in padded], weights), _mean([one.b for one in padded], weights))
    parts = sent(rule, round_number)
    a = _middle([update.factors.a for update in updates], weights, middle) if "a" in parts else first.a
    b = _middle([update.factors.b for update in updates], weights, middle) if "b" in parts else first.b
    return Factors(a, b)


def mixed(matrices: Sequence[Floats], samples: Sequence[int], middle: Middle = "mean") -> Floats:
    """What stands for a matrix that every device trains whole, devices in the order of their names."""
    return _middle(matrices, _shares(samples), middle)


def taken(rule: Rule, factors: Factors, rank: int) -> Factors:
    """What a device of that rank takes of what came out; with fedsa its own B goes with it."""
    return truncate(factors, rank) if rule in ANY_RANKS else factors


def pad(factors: Factors, rank: int) -> Factors:
    """With zeros up to a rank: the product is the same."""
    more = rank - factors.rank
    return Factors(np.pad(factors.a, ((0, more), (0, 0))), np.pad(factors.b, ((0, 0), (0, more))))


def truncate(factors: Factors, rank: int) -> Factors:
    """The first ranks."""
    return Factors(factors.a[:rank], factors.b[:, :rank])


def joined(one: Factors, other: Factors) -> Factors:
    """Side by side: their product is the sum of both."""
    return Factors(np.concatenate([one.a, other.a]), np.concatenate([one.b, other.b], axis=1))


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference of their products."""
    return size(joined(one, Factors(other.a, -other.b)))


def size(factors: Factors) -> float:
    """Frobenius norm of their product, which is never formed."""
    return float(np.linalg.norm(_core(factors)))


def product(factors: Factors) -> Doubles:
    """[m, n] what the factors add to a weight, but for the scale."""
    found: Doubles = factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return found


def shortened(factors: Factors, rank: int) -> Factors:
    """The factors of that rank whose product is nearest to theirs, largest parts first, each half of the size of its
    part. Never forms the product: it may be as large as the weight."""
    left, left_core = np.linalg.qr(factors.b.astype(np.float64))
    right, right_core = np.linalg.qr(factors.a.T.astype(np.float64))
    u, sizes, v = np.linalg.svd(left_core @ right_core.T)
    roots = np.sqrt(sizes[:rank])
    b = (left @ u[:, : len(roots)]) * roots
    a = (v[: len(roots)] @ right.T) * roots[:, None]
    return pad(Factors(a.astype(np.float32), b.astype(np.float32)), rank)


def _check(rule: Rule, updates: Sequence[Update]) -> None:
    if not updates:
        raise ValueError("nothing to aggregate")
    shapes = {(update.factors.b.shape[0], update.factors.a.shape[1]) for update in updates}
    if len(shapes) > 1:
        raise ValueError(f"adapters of different weights: {sorted(shapes)}")
    ranks = sorted({update.factors.rank for update in updates})
    if len(ranks) > 1 and rule not in ANY_RANKS:
        raise UsageError(
            f"aggregation {rule} needs the same rank on all devices, not {', '.join(map(str, ranks))}",
            try_=f"aggregation = {' or '.join(ANY_RANKS)}, or one rank for all",
        )


def _weights(updates: Sequence[Update]) -> Doubles:
    """[K] by samples; equal where nobody has any."""
    return _shares([update.samples for update in updates])


def _shares(samples: Sequence[int]) -> Doubles:
    counted = np.array(samples, dtype=np.float64)
    return counted / counted.sum() if counted.sum() > 0 else np.full(len(counted), 1 / len(counted))


def _by_size(updates: Sequence[Update], weights: Doubles) -> Doubles:
    sizes = weights * [size(update.factors) for update in updates]
    found: Doubles = sizes / sizes.sum() if sizes.sum() > 0 else weights
    return found


def _core(factors: Factors) -> Doubles:
    """[r, r] of the same Frobenius norm as the product."""
    _, left = np.linalg.qr(factors.b.astype(np.float64))
    _, right = np.linalg.qr(factors.a.T.astype(np.float64))
    found: Doubles = left @ right.T
    return found


def _middle(arrays: Sequence[Floats], weights: Doubles, middle: Middle) -> Floats:
    if middle == "mean":
        return _mean(arrays, weights)
    if middle == "median":
        found: Floats = np.median(np.stack(arrays).astype(np.float64), axis=0).astype(np.float32)
        return found
    left_out = min(math.ceil(TRIMMED * len(arrays)), (len(arrays) - 1) // 2)
    inner = np.sort(np.stack(arrays).astype(np.float64), axis=0)[left_out : len(arrays) - left_out]
    trimmed: Floats = inner.mean(axis=0).astype(np.float32)
    return trimmed


def shortened_to(most: float, changes: Sequence[Floats]) -> list[Floats]:
    """What devices have changed, none longer than `most` times the median of their lengths: longer ones keep their
    direction."""
    lengths = [float(np.linalg.norm(change.astype(np.float64))) for change in changes]
    limit = most * float(np.median(lengths))
    return [
        change if length <= limit else (change * (limit / length)).astype(np.float32)
        for change, length in zip(changes, lengths, strict=True)
    ]


def _mean(arrays: Sequence[Floats], weights: Doubles) -> Floats:
    total = np.zeros(arrays[0].shape, np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += weight * array
    return total.astype(np.float32)


def _stacked(updates: Sequence[Update], weights: Doubles) -> Factors:
    b = [weight * update.factors.b for update, weight in zip(updates, weights, strict=True)]
    return Factors(
        np.concatenate([update.factors.a for update in updates]), np.concatenate(b, axis=1).astype(np.float32)
    )
