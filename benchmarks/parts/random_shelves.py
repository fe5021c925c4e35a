"""Virtual boards at random, within bounds, and what may be done to them while they run."""

from __future__ import annotations

import random
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from benchmarks.parts.sites import MODEL, Site
from coordinator.journal import DeployRequest
from testbed.boards import BoardSpec
from testbed.links import LinkSpec
from wire import messages, topics
from wire.errors import EdgelamError
from wire.limits import DATA_KEEPALIVE_S
from wire.messages import Command, Reply
from wire.mqtt import MqttTransport
from wire.transport import Inbound

SHARES: Final = (0.15, 0.60)
"""Of a core, for each board."""

SHARES_SUM: Final = 1.4
"""Of all boards together: two cores, of which coordinator, brokers and links take the rest."""

RATES_BIT_PER_S: Final = (5e6, 200e6)
DELAYS_S: Final = (0.0, 0.010)
OPEN_LINK: Final = LinkSpec(rate_bytes_per_s=1e9)
"""A shaped link that shapes next to nothing: for measuring modules and fetching weights."""

PROBE_TIMEOUT_S: Final = 120.0
REQUESTER: Final = "bench"


def random_boards(rng: random.Random, count: int) -> tuple[BoardSpec, ...]:
    """Boards `board1` .. of random speed, on open links."""
    while True:
        shares = [round(rng.uniform(*SHARES), 3) for _ in range(count)]
        if sum(shares) <= SHARES_SUM:
            return tuple(
                BoardSpec(name=f"board{number}", speed=share, link=OPEN_LINK)
                for number, share in enumerate(shares, start=1)
            )


def random_link(rng: random.Random) -> LinkSpec:
    """A rate that is as likely to be doubled as to be halved, and any delay."""
    low, high = RATES_BIT_PER_S
    rate = low * (high / low) ** rng.random()
    return LinkSpec(rate_bytes_per_s=rate / 8, delay_s=rng.uniform(*DELAYS_S))


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def fetched_everywhere(site: Site, names: Iterable[str], precision: str, model: str = MODEL) -> None:
    """Have each board load the whole model once: later no weights travel."""
    names = list(names)
    for name in names:
        others = tuple(other for other in names if other != name)
        site.there.last(
            "/v1/deployments", DeployRequest(model=model, precision=precision, boards_at_most=1, excluded=others), say
        )


def relink(site: Site, links: dict[str, LinkSpec]) -> None:
    """Give boards other links, and have them measure these."""
    before = {name: site.there.get(f"/v1/profiles/{name}")["link"] for name in links}
    for name, link in links.items():
        site.boards.set_link(name, link)
    _probe(site, list(links))
    deadline_s = time.monotonic() + PROBE_TIMEOUT_S
    while any(site.there.get(f"/v1/profiles/{name}")["link"] == before[name] for name in links):
        if time.monotonic() > deadline_s:
            raise EdgelamError("the boards' new links did not come")
        time.sleep(0.2)


def _probe(site: Site, names: Sequence[str]) -> None:
    status: dict[str, Any] = site.there.get("/v1/status")
    answered: dict[str, Reply] = {}

    def heard(message: Inbound) -> None:
        reply = messages.decode(message.payload, Reply, message.topic)
        answered[reply.device] = reply

    transport = MqttTransport(status["mqtt_url"], f"bench-{secrets.token_hex(4)}", keepalive_s=DATA_KEEPALIVE_S)
    try:
        transport.subscribe(topics.REPLY.on(status["site"], REQUESTER, "+"), heard, qos=1)
        transport.start()
        # One after the other: two boards that measure at once slow each other.
        for name in names:
            number = secrets.token_hex(8)
            reply_topic = topics.REPLY.on(status["site"], REQUESTER, number)
            command = Command(id=number, reply_topic=reply_topic)
            transport.publish(topics.COMMAND.on(status["site"], name, "probe-link"), messages.encode(command), qos=1)
            deadline_s = time.monotonic() + PROBE_TIMEOUT_S
            while name not in answered:
                if time.monotonic() > deadline_s:
                    raise EdgelamError(f"{name} did not measure its link within {PROBE_TIMEOUT_S:.0f} s")
                transport.poll(0.2)
            if not answered[name].ok:
                raise EdgelamError(f"{name}: {answered[name].error}")
    finally:
        transport.close()
