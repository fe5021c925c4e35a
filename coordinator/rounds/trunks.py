"""Which boards get the blocks of a split model: of those that can hold them the one that multiplies fastest, or as many
as can hold them together, or make a step fast, by how fast they multiply and send."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from coordinator.rounds.bases import Base
from coordinator.rounds.cutting import Cut, Holder, cut
from coordinator.rounds.job import COUNTED, Job
from coordinator.rounds.offers import link_rate
from coordinator.rounds.orders import AMPLE, states_bytes, without_torch
from coordinator.rounds.store import TrunkAt
from coordinator.service import Coordinator
from hwprofiles.ceilings import best, best_of_blocks
from hwprofiles.profile import Profile
from hwprofiles.samples import Ceilings
from models.lora.adapter import MATRICES, sizes
from wire.limits import MAX_SEGMENTS
from wire.units import bytes_text


class Found(NamedTuple):
    """`cuts` is empty where no boards can have the blocks; `unable` says why each of the others can't."""

    cuts: tuple[Cut, ...]
    because: str
    unable: Mapping[str, str]


def trunk_of(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str], passed_over: Collection[str] = ()
) -> Found:
    """The boards for the blocks. They may have data, too: then they have both parts. Those that are `passed_over` get
    them where others can't. With mode 'split' one has all if one can, else as few as can have them together."""
    able, unable = _able(coordinator, job, base, with_data)
    profiles, ends, blocks = coordinator.profiles(), ends_of(job, with_data), base.config.blocks
    rates = {device: product_rate(profiles.get(device)) or 0.0 for device in able}
    at_least, at_most = (2, MAX_SEGMENTS) if job.mode == "pipeline" else (1, 1)
    if job.trunks:
        at_least = at_most = len(job.trunks)
    for those in ([name for name in able if name not in passed_over], list(able)):
        if job.trunks and set(those) != set(job.trunks):
            continue
        holders = [_holder(job, base, device, able[device], rates[device], profiles.get(device)) for device in those]
        whole = [holder for holder in holders if holder.most_blocks == blocks]
        cuts = cut(holders if at_most > 1 else whole, blocks, ends, at_least, at_most)
        if not cuts and at_most == 1 and not job.trunks:
            chains = (cut(holders, blocks, ends, count, count) for count in range(2, MAX_SEGMENTS + 1))
            cuts = next((found for found in chains if found), ())
        if cuts:
            return Found(cuts, _because(job, cuts, rates, len(whole if len(cuts) == 1 else holders)), unable)
    for device in able:
        unable[device] = f"has memory for {able[device]} of {blocks} blocks"
    return Found((), "", unable)


def _able(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Board -> for how many blocks it has memory, in the order in which the job names them, if it does; and why others
    can't have any."""
    most: dict[str, int] = {}
    unable: dict[str, str] = dict.fromkeys(job.trunks, "not heard of")
    ends = ends_of(job, with_data)
    for device in coordinator.devices():
        if job.trunks and device.name not in job.trunks:
            continue
        unable.pop(device.name, None)
        info = device.info
        if info is None or not coordinator.is_online(device.name):
            unable[device.name] = "offline"
        elif not info.knows_split:
            unable[device.name] = f"its software, {info.software}, knows no split models"
        elif because := without_torch(info):
            unable[device.name] = because
        else:
            beside = base.ends_bytes(job) if device.name in with_data else 0
            blocks = base.config.blocks
            while blocks and base.trunk_bytes(job, ends, False, blocks) + beside > info.memory_bytes:
                blocks -= 1
            if blocks:
                most[device.name] = blocks
                continue
            needs_bytes = base.trunk_bytes(job, ends, False, 1) + beside
            unable[device.name] = (
                f"would take {bytes_text(needs_bytes)} of its {bytes_text(info.memory_bytes)} of memory for one block"
            )
    order = job.trunks or tuple(sorted(most))
    return {name: most[name] for name in order if name in most}, unable


def _holder(job: Job, base: Base, device: str, most: int, rate: float, profile: Profile | None) -> Holder:
    link = link_rate(profile)
    block_s = operations_of(base, job) / base.config.blocks / rate if rate else None
    return Holder(device, most, block_s, states_bytes(base, job) / link if link else None)


def _because(job: Job, cuts: Sequence[Cut], rates: Mapping[str, float], of_boards: int) -> str:
    if job.trunks:
        return "the job names it" if len(cuts) == 1 else "the job names them"
    measured = [rates[one.device] for one in cuts]
    if len(cuts) > 1:
        speeds = ", ".join(f"{rate / 1e9:.3g}" for rate in measured) if all(measured) else "not measured of all"
        return f"of {of_boards} that can have some; GFLOP/s: {speeds}"
    those = f"{of_boards} that can hold the blocks"
    if not measured[0]:
        return f"the first of {those}: none has measured how fast it multiplies"
    return f"multiplies fastest of {those}: {measured[0] / 1e9:.3g} GFLOP/s"


def where_text(cuts: Sequence[Cut | TrunkAt], because: str) -> str:
    """Where the blocks are, and why."""
    if cuts[0].role == "hub":
        shards = [(one.device, one.share) for one in cuts[1:] if one.share is not None]
        each = ", ".join(f"{device} ({share.heads} heads, {share.columns} columns)" for device, share in shards)
        return f"the shards are on {each}, the hub on {cuts[0].device}: {because}"
    if len(cuts) == 1:
        return f"the blocks are on {cuts[0].device}: {because}"
    each = ", ".join(f"{one.device} ({one.end_block - one.first_block})" for one in cuts)
    return f"the blocks are on {each}: {because}"


def keeps_all(coordinator: Coordinator, job: Job, base: Base, at: Cut | TrunkAt, with_data: Collection[str]) -> bool:
    """Whether the board of a segment has ample memory to keep what the gradients of all others need."""
    memory = next(
        (device.info.memory_bytes for device in coordinator.devices() if device.name == at.device and device.info), 0
    )
    beside = base.ends_bytes(job) if at.device in with_data else 0
    needs_bytes = base.trunk_bytes(job, ends_of(job, with_data), True, at.end_block - at.first_block)
    return needs_bytes + beside <= AMPLE * memory


def operations_of(base: Base, job: Job, again: bool = False) -> float:
    """Of all blocks, for the batch of one board: a multiplication and an addition are two. Where weights are frozen
    there are as many backwards as forwards, in blocks that gradients go through, else twice as many. `again`: what
    gradients need is computed once more there."""
    weights = 0
    for matrix in MATRICES:
        try:
            out, columns = sizes(base.config, matrix)
        except KeyError:
            continue  # an encoder has no gate
        weights += out * columns
    through = 1 if job.adapter.blocks == "last" else base.config.blocks
    passes = base.config.blocks + through * (1 + (job.train == "blocks") + again)
    return 2.0 * passes * weights * job.rounds.batch_rows * job.rounds.row_tokens


def ends_of(job: Job, with_data: Collection[str]) -> int:
    """Boards that make a step together, at most."""
    return min(len(with_data), job.rounds.devices) if job.rounds.who in COUNTED else len(with_data)


def product_rate(profile: Profile | None) -> float | None:
    """Operations a second in products of float32 matrices; where those were not measured, as on virtual boards, the
    most that the board's blocks make; None where there are none either."""
    if profile is None:
        return None
    found = profile.ceilings
    rate = best(tuple(one for one in found.products if one.what == "f32")) if isinstance(found, Ceilings) else None
    return rate or best_of_blocks(profile.modules)
