"""What a round is foretold to take, by how fast boards multiply and send, as their profiles say. Pure.

Every text counts as long as `rounds.row_tokens`, and nothing is held out: how long texts are, and how many, is known to
the boards that have them alone. So a round takes that at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import Base
from coordinator.rounds.cutting import Cut, step_s
from coordinator.rounds.job import Job
from coordinator.rounds.offers import link_rate
from coordinator.rounds.orders import states_bytes
from coordinator.rounds.trunks import operations_of, product_rate
from hwprofiles.link import one_way_s
from hwprofiles.profile import LinkMeasurement, Profile
from models.families.config import LlamaConfig
from models.lora.adapter import length_of, shapes


class Rates(NamedTuple):
    """Of a board, as it measured them; 0 for what was not."""

    products: float
    """Operations/s."""
    link: float
    """Bytes/s."""
    way_s: float = 0.0
    """Of a small message, to the broker."""

    @property
    def known(self) -> bool:
        return self.products > 0 and self.link > 0


def rates_of(profile: Profile | None) -> Rates:
    found = one_way_s(profile.link) if profile is not None and isinstance(profile.link, LinkMeasurement) else None
    return Rates(product_rate(profile) or 0.0, link_rate(profile) or 0.0, found or 0.0)


def federated_s(
    base: Base, job: Job, rates: Mapping[str, Rates], devices: Collection[str], again: Collection[str] = ()
) -> float | None:
    """Of a round of boards that have the whole model: the slowest decides, computing and sending factors both ways.
    `again`: those that compute blocks twice to save memory. None where some board's rates are not known."""
    factors_bytes = 4 * length_of(shapes(base.config, spec_of(job)))
    found = []
    for device in devices:
        if not (own := rates[device]).known:
            return None
        operations = operations_of(base, job, device in again) + _of_ends(base, job)
        found.append(job.rounds.steps * operations / own.products + 2 * (factors_bytes / own.link + own.way_s))
    return max(found, default=None)


def split_s(
    base: Base,
    job: Job,
    rates: Mapping[str, Rates],
    devices: Collection[str],
    cuts: Sequence[Cut],
    again: Collection[str] = (),
) -> float | None:
    """The same of a model that is split: the trunk computes for all of them, and they send states and gradients."""
    trunk = [rates[one.device] for one in cuts]
    ends = [rates[device] for device in devices]
    if not ends or not all(own.known for own in trunk) or not all(own.link > 0 for own in ends):
        return None
    if _of_ends(base, job) and not all(own.known for own in ends):
        return None
    sent, back = states_bytes(base, job), _back_bytes(base, job)
    compute_s = [
        one.blocks / base.config.blocks * operations_of(base, job, one.device in again) / own.products
        for one, own in zip(cuts, trunk, strict=True)
    ]
    # Between segments states come and gradients of these; of an encoder boards with data send back less.
    hop = sent if len(cuts) > 1 else (sent + back) / 2
    shared_s = step_s(compute_s, [hop / own.link for own in trunk], len(ends))
    slowest_s = max(
        (sent + 2 * back) / own.link + 3 * own.way_s + (_of_ends(base, job) / own.products if own.products else 0.0)
        for own in ends
    )
    # States go to the first segment, features come from the last, and gradients go back: in turn, each a step's wait.
    waits_s = trunk[0].way_s + 2 * trunk[-1].way_s
    waits_s += sum(2 * (one.way_s + other.way_s) for one, other in itertools.pairwise(trunk))
    factors_s = max(2 * _of_cut(base, job, one) / own.link for one, own in zip(cuts, trunk, strict=True))
    return job.rounds.steps * (shared_s + slowest_s + waits_s) + factors_s


def _of_ends(base: Base, job: Job) -> float:
    """Operations of a step before and behind the blocks: a language model scores every token of its vocabulary."""
    if not isinstance(base.config, LlamaConfig):
        return 0.0
    return 4.0 * base.config.vocabulary * base.config.hidden * job.rounds.batch_rows * job.rounds.row_tokens


def _back_bytes(base: Base, job: Job) -> float:
    """Of what boards with data are answered, and of what they send then: of an encoder means over texts."""
    if isinstance(base.config, LlamaConfig):
        return states_bytes(base, job)
    task_module = length_of(shapes(base.config, spec_of(job)), ("c",))
    return 4.0 * (job.rounds.batch_rows * base.config.hidden + task_module)


def _of_cut(base: Base, job: Job, at: Cut) -> float:
    """Bytes of a segment's factors."""
    return 4.0 * length_of(shapes(base.config, spec_of(job))) * at.blocks / base.config.blocks
