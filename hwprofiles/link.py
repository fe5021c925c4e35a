"""The device's own link: round trip and goodput, measured through the real transport to its own topic and back.

Every probe is one frame, as stages send them, that comes back by subscription: it crosses the device's link up and
down, and the broker once. Where the transport has a short way for what is foreseen (wire.transport.ShortWay), round
trips take it, as decode steps do. Nothing waits without a deadline, and a link that is slow gets a smaller load instead
of more minutes. On a fast link a good part of a round trip is the code at its ends, which takes several times as long
after a step that has filled the caches: so each round trip is measured after a call of `before`, which does the same.

From the samples two figures are derived, under one assumption that can't be checked from one end: the link carries
the same rate both ways.

    one_way_s    half the round trip: one crossing of the link and half of the broker. The hop from device d to e is
                 one_way_s(d) + one_way_s(e), which counts the broker once.
    bytes_per_s  n chunks of c bytes through the broker to oneself use both directions at once, as a pipeline of two:
                 the time is n * c / rate + c / rate + delay, and the delay is the round trip of a small message
                 (without its own 2 * p bytes). Hence rate = ((n + 1) * c - 2 * p) / (time - round trip).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from math import ceil
from time import perf_counter
from typing import Final

import numpy as np

from hwprofiles import stats
from hwprofiles.measure import StopRule, sample
from hwprofiles.profile import LinkMeasurement, Samples
from hwprofiles.reading import Absent, Failed
from wire.errors import MalformedFrame
from wire.foreseen import Coming, Going, frame_head
from wire.frames import (
    LARGEST_CHUNK_BYTES,
    Kind,
    Parcel,
    Tensor,
    encode,
    header_bytes,
    lay_out,
    parse,
)
from wire.transport import Inbound, Link, NotConnected, ShortWay, Transport

Clock = Callable[[], float]

ROUND_TRIP_BYTES: Final = 1_200
"""About one hidden state of a small model (576 wide, 2 bytes), and one Ethernet frame."""
GOODPUT_BYTES: Final = 512 * 1024
"""Load of one goodput run: below the credit window, and below what a broker drops of a slow client's queue."""
GOODPUT_CHUNK_BYTES: Final = 64 * 1024
"""As tensors are chunked by default."""
GOODPUT_CHUNKS: Final = GOODPUT_BYTES // GOODPUT_CHUNK_BYTES
TRIAL_CHUNK_BYTES: Final = (2 * 1024, 8 * 1024, 32 * 1024)
"""Chunks of growing trial loads, to see how large a load the link can take. One small trial would not do: shapers and
routers let the first tens of KB pass at full speed."""
TRIAL_ENOUGH_S: Final = 0.4
"""A trial that took so long tells the rate well enough; a larger one would only cost time."""
MIN_CHUNK_BYTES: Final = 2_048
"""Least chunk of a shrunken load: below it the headers of MQTT and TCP would count."""
RUN_TARGET_S: Final = 3.0
"""One goodput run should take at most so long: 512 KB at 2 Mbit/s just do."""

CONNECT_DEADLINE_S: Final = 5.0
FIRST_ANSWER_DEADLINE_S: Final = 10.0
"""For the first answer, which also waits for the subscription to be in force."""
FIRST_ANSWER_REPEAT_S: Final = 0.5
ANSWER_DEADLINE_S: Final = 10.0
"""For one round trip, or for one goodput run."""
POLL_S: Final = 0.2
"""Longest sleep in the transport: how late a lost connection may be noticed."""
MIN_DENOMINATOR: Final = 1 / 8
"""Share of the measured time that is taken as transmission at the least: on a long fast link time and round trip are
nearly equal, and their difference would be noise."""

ROUND_TRIP_RULE: Final = StopRule(
    target=0.05, min_samples=20, max_samples=60, least_samples=12, time_budget_s=3.0, give_up_s=15.0, warmup_min=3
)
GOODPUT_RULE: Final = StopRule(
    target=0.05, min_samples=3, max_samples=5, least_samples=3, time_budget_s=6.0, give_up_s=20.0,
    warmup_min=1, warmup_max=1,
)  # fmt: skip


class _LinkLost(Exception):
    """An answer did not come: the text says what was waited for."""


class _ConnectionLost(_LinkLost):
    """There was a link, and the broker or the way to it went away: that says nothing of the link."""


def measure_link(
    transport: Transport,
    topic: str,
    broker_text: str,
    clock: Clock = perf_counter,
    token: int | None = None,
    before: Callable[[], None] = lambda: None,
) -> LinkMeasurement | Absent | Failed:
    """Measure round trip and goodput over a started transport that this thread polls; it subscribes to `topic`, which
    nobody else should use, and unsubscribes at the end.

    `broker_text` names the broker for people. Failed says what did not come, within about a minute in the worst case;
    Absent that the connection was lost meanwhile, so that nothing is known yet.
    """
    probe = _Probe(transport, topic, clock, secrets.randbits(63) if token is None else token)
    transport.subscribe(topic, probe.arrived)
    try:
        return _measured(probe, broker_text, before)
    except _ConnectionLost as error:
        return Absent(f"{broker_text}: {error}")
    except _LinkLost as error:
        return Failed(f"{broker_text}: {error}")
    finally:
        transport.unsubscribe(topic)


def measure_round_trip(
    transport: Transport, topic: str, clock: Clock = perf_counter, before: Callable[[], None] = lambda: None
) -> float | str:
    """Give the median round trip of a small message over a started transport, seconds; or in words why there is none.
    As `measure_link`, without the goodput, and in a second or two."""
    probe = _Probe(transport, topic, clock, secrets.randbits(63))
    transport.subscribe(topic, probe.arrived)
    try:
        probe.wait_until_up()
        probe.first_answer()
        return stats.median(_round_trip(probe, before).samples_s)
    except _LinkLost as error:
        return str(error)
    finally:
        transport.unsubscribe(topic)


def _measured(probe: _Probe, broker_text: str, before: Callable[[], None]) -> LinkMeasurement:
    probe.wait_until_up()
    probe.first_answer()
    round_trip = _round_trip(probe, before)
    small_s = stats.median(round_trip.samples_s)
    for trial_chunk_bytes in TRIAL_CHUNK_BYTES:
        trial_s = probe.seconds(GOODPUT_CHUNKS, trial_chunk_bytes)
        chunk_bytes = fitting_chunk_bytes(small_s, trial_s, trial_chunk_bytes)
        if trial_s >= TRIAL_ENOUGH_S:
            break
    goodput = sample(lambda: probe.seconds(GOODPUT_CHUNKS, chunk_bytes), GOODPUT_RULE, probe.clock)
    return LinkMeasurement(
        broker=broker_text,
        round_trip_payload_bytes=ROUND_TRIP_BYTES,
        round_trip=round_trip,
        goodput_payload_bytes=GOODPUT_CHUNKS * chunk_bytes,
        goodput_chunk_bytes=chunk_bytes,
        goodput=goodput,
    )


def _round_trip(probe: _Probe, before: Callable[[], None]) -> Samples:
    def round_trip_s() -> float:
        trip = probe.short_trip(ROUND_TRIP_BYTES)
        before()
        return probe.seconds(1, ROUND_TRIP_BYTES) if trip is None else trip()

    return sample(round_trip_s, ROUND_TRIP_RULE, probe.clock)


def fitting_chunk_bytes(round_trip_s: float, trial_s: float, trial_chunk_bytes: int) -> int:
    """Give the chunk size whose load of 8 chunks should take at most RUN_TARGET_S, from the time that a load of 8
    smaller chunks took: 64 KB unless the link is slow, never below 2 KB."""
    per_chunk_byte_s = max(0.0, trial_s - round_trip_s) / trial_chunk_bytes
    left_s = max(0.0, RUN_TARGET_S - round_trip_s)
    if per_chunk_byte_s * GOODPUT_CHUNK_BYTES <= left_s:
        return GOODPUT_CHUNK_BYTES
    return max(MIN_CHUNK_BYTES, int(left_s / per_chunk_byte_s) // 1024 * 1024)


class _Probe:
    """Sends numbered messages to itself and waits for them, each wait with a deadline."""

    def __init__(self, transport: Transport, topic: str, clock: Clock, token: int) -> None:
        self.clock = clock
        self._transport = transport
        self._topic = topic
        self._token = token
        self._next = 0
        self._missing: set[int] = set()
        self._last_s = 0.0
        # Random: a compressing tunnel must not look fast.
        self._filler = np.frombuffer(secrets.token_bytes(GOODPUT_CHUNK_BYTES), np.uint8)

    def arrived(self, message: Inbound) -> None:
        """Note one of our own messages; whatever else comes to the topic is ignored."""
        try:
            frame = parse(message.payload)
        except MalformedFrame:
            return
        if frame.kind is Kind.PROBE and frame.request == self._token and frame.position in self._missing:
            self._missing.discard(frame.position)
            self._last_s = self.clock()

    def wait_until_up(self) -> None:
        deadline_s = self.clock() + CONNECT_DEADLINE_S
        while self._transport.link is not Link.UP:
            if self._transport.link is Link.CLOSED:
                raise _LinkLost("the connection is closed")
            left_s = deadline_s - self.clock()
            if left_s <= 0:
                because = self._transport.last_error or "no answer"
                raise _LinkLost(f"not connected after {CONNECT_DEADLINE_S:g} s ({because})")
            self._transport.poll(min(POLL_S, left_s))

    def first_answer(self) -> None:
        """Send until one comes back: a subscription takes force some time after it was asked for."""
        deadline_s = self.clock() + FIRST_ANSWER_DEADLINE_S
        waiting: set[int] = set()
        while True:
            self._send(1, ROUND_TRIP_BYTES)
            waiting |= self._missing
            self._missing = set(waiting)
            repeat_s = self.clock() + FIRST_ANSWER_REPEAT_S
            while self.clock() < repeat_s:
                self._poll(repeat_s)
                if len(self._missing) < len(waiting):
                    return
            if self.clock() > deadline_s:
                raise _LinkLost(f"nothing came back within {FIRST_ANSWER_DEADLINE_S:g} s of asking for it")

    def seconds(self, messages: int, payload_bytes: int) -> float:
        """Seconds from the first publish of `messages` x `payload_bytes` to the arrival of the last of them."""
        started_s = self._send(messages, payload_bytes)
        self._await(messages, payload_bytes, started_s)
        return self._last_s - started_s

    def _await(self, messages: int, payload_bytes: int, started_s: float) -> None:
        deadline_s = started_s + ANSWER_DEADLINE_S
        while self._missing:
            if self.clock() >= deadline_s:
                raise _LinkLost(
                    f"{len(self._missing)} of {messages} messages of {payload_bytes} bytes did not come back within "
                    f"{ANSWER_DEADLINE_S:g} s"
                )
            self._poll(deadline_s)

    def short_trip(self, payload_bytes: int) -> Callable[[], float] | None:
        """Lay out one message for the short way, there and back; give what sends it and gives the seconds that it took.
        None where there is no such way."""
        way = self._transport
        if not isinstance(way, ShortWay):
            return None
        number, self._next = self._next, self._next + 1
        filler = self._filler.data[: payload_bytes - header_bytes(1)]
        probe = Parcel(Kind.PROBE, request=self._token, position=number, tensor=Tensor.of(self._filler[: len(filler)]))
        laid = lay_out(probe, self._token, 0, number)
        try:
            head = frame_head(way, self._topic, laid.frame_bytes)
        except NotConnected as error:
            raise _ConnectionLost(f"connection lost ({error})") from None
        coming, going = Coming(head, laid), Going(head, laid)
        came_s: list[float] = []

        def look() -> None:
            if coming.look(way) is not None:
                came_s.append(self.clock())

        def trip() -> float:
            self._missing = {number}
            way.ahead = look
            started_s = self.clock()
            try:
                going.send(way, filler)
                self._await(1, payload_bytes, started_s)
            except NotConnected as error:
                raise _ConnectionLost(f"connection lost ({error})") from None
            finally:
                way.ahead = None
            return (came_s[0] if came_s else self._last_s) - started_s

        return trip

    def _send(self, messages: int, payload_bytes: int) -> float:
        """Publish numbered messages and forget what was waited for; give the time of the first publish."""
        numbers = range(self._next, self._next + messages)
        self._next += messages
        self._missing = set(numbers)
        filler = self._filler[: payload_bytes - header_bytes(1)]
        started_s = self.clock()
        try:
            for number in numbers:
                probe = Parcel(Kind.PROBE, request=self._token, position=number, tensor=Tensor.of(filler))
                [frame] = encode(probe, self._token, 0, number, LARGEST_CHUNK_BYTES)
                self._transport.publish(self._topic, frame)
        except NotConnected as error:
            raise _ConnectionLost(f"connection lost ({error})") from None
        return started_s

    def _poll(self, until_s: float) -> None:
        self._transport.poll(max(0.0, min(POLL_S, until_s - self.clock())))
        if self._transport.link is not Link.UP:
            raise _ConnectionLost(f"connection lost ({self._transport.last_error or 'no reason given'})")


def one_way_s(link: LinkMeasurement, payload_bytes: int = 0) -> float | None:
    """Seconds for one message over this link, with half of the broker: half the round trip, and at the link's rate the
    bytes beyond the probe's. None if there are no samples (or, for a larger payload, no rate)."""
    if not link.round_trip.samples_s:
        return None
    half_s = stats.median(link.round_trip.samples_s) / 2
    beyond_bytes = payload_bytes - link.round_trip_payload_bytes
    if beyond_bytes <= 0:
        return half_s
    rate = bytes_per_s(link)
    return None if rate is None else half_s + beyond_bytes / rate


def bytes_per_s(link: LinkMeasurement) -> float | None:
    """Rate of the link in each direction, by the formula above; None if there are no samples.

    The difference in the denominator is not let below 1/8 of the time.
    """
    if not link.goodput.samples_s or not link.round_trip.samples_s:
        return None
    time_s, round_trip_s = stats.median(link.goodput.samples_s), stats.median(link.round_trip.samples_s)
    if time_s <= 0:
        return None
    chunks = ceil(link.goodput_payload_bytes / link.goodput_chunk_bytes)
    crossed_bytes = (chunks + 1) * link.goodput_chunk_bytes - 2 * link.round_trip_payload_bytes
    if crossed_bytes <= 0:
        return None
    return crossed_bytes / max(time_s - round_trip_s, time_s * MIN_DENOMINATOR)
