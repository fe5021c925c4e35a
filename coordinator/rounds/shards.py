"""Which boards share one block that stands at every depth, and how much each has of it: heads and columns by how fast
boards multiply, as far as their memory goes. And which of them sums up: the one with the fastest link, since all that
shards are asked and answer goes through it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from coordinator.rounds.bases import Base, bert_of
from coordinator.rounds.cutting import Cut, divided
from coordinator.rounds.job import Job
from coordinator.rounds.offers import link_rate
from coordinator.rounds.orders import without_torch
from coordinator.rounds.trunks import Found, ends_of, product_rate, trunk_of
from coordinator.service import Coordinator
from wire.limits import MAX_SEGMENTS
from wire.shares import Share
from wire.units import bytes_text

COLUMNS_AT_ONCE: Final = 16
"""Columns are divided in so many, where they can be: what products of matrices are made of."""
LEAST_SHARDS: Final = 2


def found_for(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str], passed_over: Collection[str] = ()
) -> Found:
    """The boards for the blocks of a split model, or for its one block."""
    find = shards_of if job.mode == "looped" else trunk_of
    return find(coordinator, job, base, with_data, passed_over)


def shards_of(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str], passed_over: Collection[str] = ()
) -> Found:
    """A hub and its shards, of all boards that can be some, or of those that the job names. Those that are
    `passed_over` are some only where there are not enough others."""
    heads, columns = bert_of(base.config).num_attention_heads, bert_of(base.config).intermediate_size
    memory, unable = _able(coordinator, job, base, with_data)
    profiles, ends = coordinator.profiles(), ends_of(job, with_data)
    rates = {device: product_rate(profiles.get(device)) or 0.0 for device in memory}
    links = {device: link_rate(profiles.get(device)) or 0.0 for device in memory}
    for those in ([name for name in memory if name not in passed_over], list(memory)):
        if job.trunks and set(those) != set(job.trunks):
            continue
        count = min(len(those), heads, MAX_SEGMENTS)
        fastest = set(sorted(those, key=lambda name: (-rates[name], name))[:count])
        boards = [name for name in those if name in fastest]
        if len(boards) < LEAST_SHARDS or (job.trunks and len(boards) < len(job.trunks)):
            continue
        hub = max(boards, key=lambda name: (links[name], rates[name], -boards.index(name)))
        left = dict(memory)
        left[hub] -= base.hub_bytes(job, ends, len(boards))
        shares = shares_of(base, job, [left[name] for name in boards], [rates[name] for name in boards])
        if shares and left[hub] >= 0:
            blocks = base.config.blocks
            shards = [Cut(name, 0, blocks, "shard", share) for name, share in zip(boards, shares, strict=True)]
            because = _because(job, hub, links, [rates[name] for name in boards])
            return Found((Cut(hub, 0, blocks, "hub"), *shards), because, unable)
    for device in memory:
        unable[device] = f"one of {len(memory)} that could have a share of {heads} heads and {columns} columns"
    return Found((), "", unable)


def shares_of(base: Base, job: Job, memory: Sequence[int], rates: Sequence[float]) -> tuple[Share, ...]:
    """Of boards with so much memory for it, that multiply so fast (0: not known): one head at least, and as many
    columns for each head as the others have, by and large. None where a block does not go in."""
    heads, columns = bert_of(base.config).num_attention_heads, bert_of(base.config).intermediate_size
    unit = COLUMNS_AT_ONCE if columns % COLUMNS_AT_ONCE == 0 and columns // COLUMNS_AT_ONCE >= len(memory) else 1
    slowest = min((rate for rate in rates if rate), default=1.0)
    seconds = [1 / (rate or slowest) for rate in rates]

    def most(held: int, at_most: int, bytes_of: Mapping[int, int]) -> int:
        return next((many for many in range(at_most, 0, -1) if bytes_of[many] <= held), 0)

    # With so many columns beside as may fall to that many heads, rounded up: so columns go in where heads do.
    units = columns // unit
    beside = {many: base.shard_bytes(job, many, unit * -(-many * units // heads)) for many in range(1, heads + 1)}
    of_heads = divided([most(held, heads, beside) for held in memory], seconds, heads)
    if not of_heads:
        return ()
    room = []
    for held, mine in zip(memory, of_heads, strict=True):
        room.append(most(held, units, {many: base.shard_bytes(job, mine, unit * many) for many in range(1, units + 1)}))
    of_columns = divided(room, seconds, units)
    found, head, column = [], 0, 0
    for mine, wide in zip(of_heads, of_columns, strict=False):
        end_column = column + unit * wide
        found.append(Share(first_head=head, end_head=head + mine, first_column=column, end_column=end_column))
        head, column = head + mine, end_column
    return tuple(found)


def _able(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Board -> what memory it has for shares, in the order in which the job names them, if it does; and why others
    can't have any."""
    memory: dict[str, int] = {}
    unable: dict[str, str] = dict.fromkeys(job.trunks, "not heard of")
    for device in coordinator.devices():
        if job.trunks and device.name not in job.trunks:
            continue
        unable.pop(device.name, None)
        info = device.info
        if info is None or not coordinator.is_online(device.name):
            unable[device.name] = "offline"
        elif not info.knows_looped:
            unable[device.name] = f"its software, {info.software}, knows no shares of a block"
        elif because := without_torch(info):
            unable[device.name] = because
        else:
            left = info.memory_bytes - (base.ends_bytes(job) if device.name in with_data else 0)
            if (least := base.shard_bytes(job, 1, 1)) <= left:
                memory[device.name] = left
                continue
            unable[device.name] = f"would take {bytes_text(least)} of {bytes_text(max(0, left))} of memory for one head"
    order = job.trunks or tuple(sorted(memory))
    return {name: memory[name] for name in order if name in memory}, unable


def _because(job: Job, hub: str, links: Mapping[str, float], rates: Sequence[float]) -> str:
    of = "the job names them" if job.trunks else f"all {len(rates)} that can have some"
    speeds = ", ".join(f"{rate / 1e9:.3g}" for rate in rates) if all(rates) else "not measured of all"
    link = f"its link is the fastest, {bytes_text(round(links[hub]))}/s" if links[hub] else "no link was measured"
    return f"{of}; GFLOP/s: {speeds}; the hub since {link}"
