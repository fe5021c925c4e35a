"""What a board is asked about its way to another one: a command read, and what is kept of the answers. Pure."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from agent.orders import is_broker
from hwprofiles.profile import MAX_PAIRS, PairMeasurement, PairWay
from wire.ids import is_name
from wire.messages import Command

VERB: Final = "probe-pair"


class PairAsk(Struct, frozen=True, kw_only=True):
    """Measure the way to `peer`, or answer it while it measures. `inward` and `outward` are the brokers over which we
    receive and send, '' for the site's."""

    peer: str
    measure: bool
    token: Annotated[int, Meta(ge=1, lt=2**53)]
    inward: str
    outward: str

    @property
    def way(self) -> PairWay:
        return "direct" if self.inward and self.outward else "central"


def pair_in(command: Command) -> PairAsk | str:
    """What a command asks for, or what is wrong with it."""
    try:
        asked = msgspec.convert(command.arguments, PairAsk)
    except msgspec.ValidationError as error:
        return f"no pair: {error}"
    if not is_name(asked.peer):
        return f"{asked.peer[:40]!r} is no name of a device"
    if bool(asked.inward) != bool(asked.outward):
        return "a pair is measured through both boards' own brokers or through the site's"
    for url in (asked.inward, asked.outward):
        if url and not is_broker(url):
            return f"{url[:80]!r} is no address of a broker"
    return asked


def with_pair(known: tuple[PairMeasurement, ...], found: PairMeasurement) -> tuple[PairMeasurement, ...]:
    """What is known of ways, with the latest measurement last; the oldest are dropped where there are too many."""
    others = (pair for pair in known if (pair.peer, pair.way) != (found.peer, found.way))
    return (*others, found)[-MAX_PAIRS:]
