"""Boards that are not there: candidates made from profiles in files, for a plan that nobody can put in force. Pure.

Such a board is named as it named itself, with a star behind (`pi5*`, or `pi5*1`, `pi5*2` for several alike), which is
no name of a device: no topic takes it, so nothing can be sent to one. Its link is the one that it measured where it
was, or an assumed one, which is said.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.planning.cost import link_cost
from coordinator.planning.request import Candidate
from hwprofiles.link import ROUND_TRIP_BYTES
from hwprofiles.profile import MAX_AGE_S, LinkMeasurement, Profile, Samples
from hwprofiles.reading import Reading
from wire.errors import Refused, UsageError
from wire.units import rate_text, seconds_text

STAR: Final = "*"
MAX_BOARDS: Final = 64
"""Of one plan, those that are there and those that are not."""

CLOCK_S: Final = 86_400.0
"""Clocks of boards without a battery are off by so much until they have met a time server."""

ASSUMED_CHUNK_BYTES: Final = 2**24
ASSUMED_PAYLOAD_BYTES: Final = 8 * ASSUMED_CHUNK_BYTES
"""Of the run that an assumed link is written down as: so long that its delay does not matter."""

MOST_RATE_BYTES_PER_S: Final = 1e12 / 8
LEAST_RATE_BYTES_PER_S: Final = 1e3
MOST_DELAY_S: Final = 10.0


class AssumedLink(Struct, frozen=True, kw_only=True):
    """A link that nobody measured: rate in each direction, delay of one crossing."""

    rate_bytes_per_s: float
    delay_s: float

    def text(self) -> str:
        return f"{rate_text(self.rate_bytes_per_s)}, {seconds_text(self.delay_s)} one way"


class AbsentBoard(Struct, frozen=True, kw_only=True):
    """A board that is planned for and is not there."""

    device: str
    """As the plan calls it: with a star."""
    file: str
    board: str
    source: str
    """Of its figures: live, emulated, replayed."""
    measured_at_unix: float
    link: str
    link_assumed: bool
    profile: Profile

    @property
    def candidate(self) -> Candidate:
        return Candidate(device=self.device, profile=self.profile, usable_memory_bytes=self.profile.memory.usable_bytes)


def assumed_link(rate_bytes_per_s: float, delay_s: float) -> AssumedLink:
    """The link, if there could be one like it; raise UsageError otherwise (NaN included)."""
    if not LEAST_RATE_BYTES_PER_S <= rate_bytes_per_s <= MOST_RATE_BYTES_PER_S:
        raise UsageError(
            f"a link of {rate_bytes_per_s * 8 / 1e6:g} Mbit/s is not possible", try_="--link-rate 100, in Mbit/s"
        )
    if not 0 <= delay_s <= MOST_DELAY_S:
        raise UsageError(
            f"a link with a delay of {delay_s * 1e3:g} ms is not possible", try_="--link-delay 1, in ms, one way"
        )
    return AssumedLink(rate_bytes_per_s=rate_bytes_per_s, delay_s=delay_s)


def as_measured(link: AssumedLink) -> LinkMeasurement:
    """The link as a board would have measured it, had it taken no time itself (hwprofiles.link has the formulas)."""
    round_trip_s = 2 * (link.delay_s + ROUND_TRIP_BYTES / link.rate_bytes_per_s)
    crossed_bytes = ASSUMED_PAYLOAD_BYTES + ASSUMED_CHUNK_BYTES - 2 * ROUND_TRIP_BYTES
    return LinkMeasurement(
        broker="(assumed)",
        round_trip_payload_bytes=ROUND_TRIP_BYTES,
        round_trip=_assumed(round_trip_s),
        goodput_payload_bytes=ASSUMED_PAYLOAD_BYTES,
        goodput_chunk_bytes=ASSUMED_CHUNK_BYTES,
        goodput=_assumed(round_trip_s + crossed_bytes / link.rate_bytes_per_s),
    )


def _assumed(seconds: float) -> Samples:
    return Samples(samples_s=(seconds,), warmup=0, stopped_because="assumed, not measured")


def check_age(profile: Profile, file: str, now_unix: float) -> None:
    """Raise Refused for a profile that is older than profiles hold, or from the future."""
    measured_unix, device = profile.conditions.measured_at_unix, profile.identity.device
    age_s = now_unix - measured_unix
    if age_s > MAX_AGE_S:
        because = f"was measured {age_s / 86_400:.0f} days ago, and a profile holds for {MAX_AGE_S / 86_400:.0f}"
    elif age_s < -CLOCK_S:
        because = f"was measured {-age_s / 86_400:.0f} days from now, by the clock of the board"
    else:
        return
    raise Refused(
        f"{file}: {device} {because}",
        try_=f"edgelam bench {device} --again measures it; --accept-expired plans with it as it is",
    )


def absent_boards(
    found: Sequence[tuple[str, Profile]], there: Collection[str], link: AssumedLink | None
) -> list[AbsentBoard]:
    """One board for each (file, profile), under a name of its own. `there`: the boards that are; only counted.

    Raises UsageError for more boards than a plan takes.
    """
    if len(found) + len(there) > MAX_BOARDS:
        raise UsageError(
            f"{len(found)} boards that are not there and {len(there)} that are: a plan takes {MAX_BOARDS}",
            try_="fewer profiles, or smaller numbers behind *",
        )
    alike = Counter(profile.identity.device for _, profile in found)
    given: Counter[str] = Counter()
    boards = []
    for file, profile in found:
        name = profile.identity.device
        given[name] += 1
        number = f"{given[name]}" if alike[name] > 1 else ""
        boards.append(_absent(f"{name}{STAR}{number}", file, profile, link))
    return boards


def _absent(device: str, file: str, profile: Profile, link: AssumedLink | None) -> AbsentBoard:
    if link is not None:
        profile = msgspec.structs.replace(profile, link=as_measured(link))
        link_said = f"link assumed: {link.text()}"
    else:
        cost, because = link_cost(profile)
        link_said = because if cost is None else f"link as measured where it was: {rate_text(cost.bytes_per_s)}, "
        link_said += f"{seconds_text(cost.one_way_s)} one way" if cost is not None else ""
    board = profile.identity.board
    return AbsentBoard(
        device=device,
        file=file,
        board=board.value if isinstance(board, Reading) else profile.identity.arch,
        source=profile.source,
        measured_at_unix=profile.conditions.measured_at_unix,
        link=link_said,
        link_assumed=link is not None,
        profile=profile,
    )


def absent_text(boards: Sequence[AbsentBoard], used: Collection[str], there: int) -> list[str]:
    """Lines that stand before a plan with such boards: that it is predicted only, and for what."""
    share = sum(board.device in used for board in boards)
    beside = f", beside {there} that {'is' if there == 1 else 'are'}" if there else ""
    count = "1 board that is" if len(boards) == 1 else f"{len(boards)} boards that are"
    lines = [
        f"WHAT IF: predicted for {count} not there (marked {STAR}){beside}. {share} of them would get a share. "
        "This plan can't be deployed."
    ]
    for board in boards:
        day = time.strftime("%Y-%m-%d", time.gmtime(board.measured_at_unix))
        lines.append(f"  {board.device}: {board.board}, {board.source} figures of {day}, {board.link} ({board.file})")
    return lines
