"""What is settled before a round: who takes part, how a shared medium is divided, how fast each may send. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

from coordinator.rounds.airtime import Medium, Offer, Own, Shared, Split
from coordinator.rounds.job import Job
from coordinator.rounds.schedule import TRADEOFF_PER_DELAY, Choice, Knobs, choose, divide, fastest
from coordinator.rounds.store import JobRecord
from wire.limits import CHUNK_BYTES_DEFAULT, PARTIAL_TIMEOUT_S

MEDIA: Final[Mapping[str, Medium]] = {"own": Own(), "shared": Shared()}
LEAST_PACE: Final = 4 * CHUNK_BYTES_DEFAULT / PARTIAL_TIMEOUT_S
"""Bytes/s: chunks of a message may not be farther apart than the receiver's patience."""
MOST_PACE: Final = 1e12


def settled(record: JobRecord, able: Sequence[str], offers: Sequence[Offer], last: bool) -> dict[str, Any]:
    """Who takes part in a round, how a shared medium is divided, and what the round should take: fields of the
    record."""
    job = record.job
    rounds, medium = job.rounds, MEDIA[job.rounds.medium]
    equally, each_s = rounds.airtime == "equal", record.each_s or 0.0
    if last:
        return {"chosen": tuple(sorted(able))}
    if rounds.who == "scheduled":
        choice = choose(offers, medium, knobs_of(job), record.queues, equally, each_s)
        chosen, divided = at_least(choice, offers, medium, rounds.at_least, equally)
    else:
        chosen = fastest(offers, rounds.devices) if rounds.who == "fastest" else drawn(able, job, record.round)
        divided = divide([offer for offer in offers if offer.device in chosen], medium, equally)
    # Where somebody was never timed nobody can say what it takes.
    known = set(chosen) <= record.timing.keys() and (record.each_s is not None or not job.is_split)
    expected_s = divided.tau_s + each_s * len(chosen)
    found: dict[str, Any] = {"chosen": chosen, "expected_s": expected_s if known else None}
    if rounds.medium == "shared":
        by_name = {offer.device: offer for offer in offers}
        paces = {device: pace_of(by_name[device], share, rounds.timeout_s) for device, share in divided.shares.items()}
        found |= {"shares": divided.shares, "paces": paces}
    return found


def pace_of(offer: Offer, share: float, timeout_s: float) -> float:
    """Bytes/s that a board is told to send with: its share of what it can do alone, but never so slow that it would end
    behind half of the round's patience because of somebody slower, or that parts of a message die of age."""
    left_s = timeout_s / 2 - offer.offset_s
    least = offer.sent_bytes / left_s if left_s > 0 else offer.rate
    return min(MOST_PACE, max(share * offer.rate, min(least, offer.rate), LEAST_PACE))


def at_least(
    choice: Choice, offers: Sequence[Offer], medium: Medium, least: int, equally: bool
) -> tuple[tuple[str, ...], Split]:
    """The choice, or with those who are over first beside them if they are too few for a round that counts."""
    if len(choice.devices) >= least:
        return choice
    others = [offer for offer in offers if offer.device not in choice.devices]
    more = fastest(others, least - len(choice.devices))
    chosen = tuple(sorted((*choice.devices, *more)))
    return chosen, divide([offer for offer in offers if offer.device in chosen], medium, equally)


def knobs_of(job: Job) -> Knobs:
    rounds = job.rounds
    delay_s = rounds.delay_s or 0.0
    tradeoff = TRADEOFF_PER_DELAY * delay_s if rounds.tradeoff is None else rounds.tradeoff
    return Knobs(delay_s=delay_s, tradeoff=tradeoff, penalty=rounds.penalty, least_share=rounds.least_share)


def drawn(devices: Sequence[str], job: Job, number: int) -> tuple[str, ...]:
    """Who takes part in a round, of those that are there: the same for the same."""
    devices, rounds = sorted(devices), job.rounds
    if rounds.who == "all" or rounds.devices >= len(devices):
        return tuple(devices)
    if rounds.who == "random":
        return tuple(sorted(random.Random(f"{job.seed} {number}").sample(devices, rounds.devices)))
    return tuple(devices[(number * rounds.devices + place) % len(devices)] for place in range(rounds.devices))
