"""What two boards may believe about the way between them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from hwprofiles.pairs import (
    FIRST_DEADLINE_S,
    LOST_S,
    MAX_BYTES,
    Answerer,
    Ends,
    bytes_per_s,
    jitter_s,
    measure_pair,
    one_way_s,
)
from hwprofiles.profile import PairMeasurement
from hwprofiles.reading import Absent, Failed
from tests.hwprofiles.simulated import Clock
from wire.frames import Kind, Parcel, encode, parse
from wire.transport import Buffer, Handler, Inbound, Link, NotConnected

TOKEN = 7


class Wire:
    """Two boards in simulated time: the transports of `a` and `b`, each of whose sends arrive at the other's handler.
    Rates in bytes per second and delays are those from a to b, and from b to a."""

    def __init__(self, rates: tuple[float, float] = (1e6, 1e6), delays_s: tuple[float, float] = (0.01, 0.01)) -> None:
        self.clock = Clock()
        self.a, self.b = End(self, rates[0], delays_s[0]), End(self, rates[1], delays_s[1])
        self.a.other, self.b.other = self.b, self.a
        self.events: list[tuple[float, int, End, Inbound]] = []
        self.order = itertools.count()
        self.sent_bytes = 0

    def poll(self, timeout_s: float) -> int:
        """Deliver what comes next within the time, or let it pass."""
        if self.events and self.events[0][0] <= self.clock.now_s + timeout_s:
            due_s, _, receiver, message = heapq.heappop(self.events)
            self.clock.now_s = max(self.clock.now_s, due_s)
            if receiver.handler is not None:
                receiver.handler(message)
            return 1
        self.clock.now_s += timeout_s
        return 0


class End:
    """One board's only transport."""

    protocol = "simulated"
    last_error = ""
    other: End

    def __init__(self, wire: Wire, rate: float, delay_s: float) -> None:
        self.wire, self.rate, self.delay_s = wire, rate, delay_s
        self.link = Link.UP
        self.free_s = 0.0
        self.handler: Handler | None = None
        self.loses: Callable[[bytes], bool] = lambda _data: False

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 0) -> None:
        self.handler = handler

    def unsubscribe(self, topic_filter: str) -> None:
        self.handler = None

    def publish(self, topic: str, payload: Buffer | Sequence[Buffer], **_: Any) -> None:
        if self.link is not Link.UP:
            raise NotConnected("not connected")
        data = payload if isinstance(payload, bytes) else b"".join(payload)  # type: ignore[arg-type]
        self.wire.sent_bytes += len(data)
        self.free_s = max(self.wire.clock(), self.free_s) + len(data) / self.rate
        if not self.loses(data):
            message = Inbound(topic, data, False)
            heapq.heappush(self.wire.events, (self.free_s + self.delay_s, next(self.wire.order), self.other, message))


def ends(wire: Wire, end: End) -> Ends:
    return Ends(end, end, wire.poll)  # type: ignore[arg-type]


def answering(wire: Wire) -> Answerer:
    """Board b answers, as long as somebody polls."""
    answerer = Answerer(ends(wire, wire.b), "b", "a", TOKEN, wire.clock)
    wire.b.handler = answerer.arrived
    return answerer


def found(wire: Wire) -> PairMeasurement | Absent | Failed:
    return measure_pair(ends(wire, wire.a), "a", "b", "b", "direct", TOKEN, 1e9, wire.clock)


def measured(wire: Wire) -> PairMeasurement:
    answering(wire)
    pair = found(wire)
    assert isinstance(pair, PairMeasurement), pair
    return pair


@pytest.mark.parametrize("mbit", [(0.2, 2), (2, 20), (20, 5), (100, 100)])
def test_the_rate_of_each_direction_is_found_and_the_round_trip(mbit: tuple[float, float]) -> None:
    there, back = (value * 1e6 / 8 for value in mbit)
    pair = measured(Wire((there, back), (0.004, 0.002)))
    assert bytes_per_s(pair.there) == pytest.approx(there, rel=0.05)
    assert bytes_per_s(pair.back) == pytest.approx(back, rel=0.05)
    assert one_way_s(pair) == pytest.approx((0.006 + 1300 / there + 1300 / back) / 2, rel=0.02)
    assert (pair.lost, pair.late) == (0, 0) and pair.sent >= len(pair.round_trip.samples_s)


@pytest.mark.parametrize("mbit", [0.05, 1, 1000])
def test_it_costs_few_bytes_and_seconds_at_any_rate(mbit: float) -> None:
    rate = mbit * 1e6 / 8
    wire = Wire((rate, rate))
    measured(wire)
    assert wire.clock() - 100 < 45 and wire.sent_bytes < MAX_BYTES


def test_lost_and_late_messages_are_counted_and_no_samples_of_the_round_trip() -> None:
    wire = Wire()
    count = itertools.count()
    wire.b.loses = lambda data: next(count) in (8, 10, 19)
    pair = measured(wire)  # and the third is of a load, which is tried again
    assert pair.lost == 2 and max(pair.round_trip.samples_s) < LOST_S and pair.late == 0
    slow = measured(Wire(delays_s=(0.2, 0.2)))
    assert slow.lost == 0 and slow.late == slow.sent


def test_jitter_is_the_mean_difference_from_one_to_the_next() -> None:
    assert jitter_s([0.01, 0.012, 0.011]) == pytest.approx(0.0015)
    assert jitter_s([0.01]) is None


def test_a_board_that_does_not_answer_is_failed_in_time() -> None:
    wire = Wire()
    failed = found(wire)
    assert isinstance(failed, Failed) and "nothing came back" in failed.because
    assert wire.clock() - 100 < FIRST_DEADLINE_S + 2


def test_a_board_that_goes_away_in_the_middle_is_failed() -> None:
    wire = Wire()
    answering(wire)
    count = itertools.count()
    wire.b.loses = lambda _data: next(count) > 15
    failed = found(wire)
    assert isinstance(failed, Failed) and "in a row did not come back" in failed.because


def test_a_connection_that_is_lost_is_failed_or_absent_and_never_raises() -> None:
    wire = Wire()
    answering(wire)
    deliver = wire.poll

    def cut(timeout_s: float) -> int:
        if wire.clock() > 100.5:
            wire.a.link = Link.DOWN
        return deliver(timeout_s)

    wire.poll = cut  # type: ignore[method-assign]
    lost = found(wire)
    assert isinstance(lost, Failed | Absent) and "the way to b" in lost.because


def word(**fields: Any) -> bytes:
    parcel = Parcel(Kind.PROBE, 0, fields.pop("token", TOKEN), meta=msgspec.json.encode(fields))
    [frame] = encode(parcel, 1, 0, 0)
    return b"".join(frame)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 20,
        word(say="echo", token=8),
        word(say="shout"),
        word(say="send", chunks=65, chunk_bytes=1024),
        word(say="send", chunks=8, chunk_bytes=1 << 30),
        word(say="told", number=-1),
        word(say="burst", seconds="x"),
        word(say="burst", number=1, chunks=0),
    ],
)
def test_whatever_else_comes_is_not_answered(data: bytes) -> None:
    wire = Wire()
    answerer = answering(wire)
    answerer.arrived(Inbound("b", data, False))
    assert not wire.events and not answerer.over


def test_a_board_that_asks_for_too_much_is_left() -> None:
    wire = Wire()
    answerer = answering(wire)
    for number in range(100):
        answerer.arrived(Inbound("b", word(say="send", number=number, chunks=64, chunk_bytes=65536), False))
    assert answerer.over and wire.sent_bytes < MAX_BYTES * 1.05
    assert "too much" in answerer.serve()


def test_the_answering_board_leaves_when_it_is_told_or_hears_nothing() -> None:
    wire = Wire()
    answerer = answering(wire)
    answerer.arrived(Inbound("b", word(say="end"), False))
    assert answerer.over and answerer.serve() == ""
    silent = Answerer(ends(wire, wire.b), "b", "a", TOKEN, wire.clock)
    assert "nothing was heard" in silent.serve()


def test_every_probe_is_a_frame_that_stages_would_read() -> None:
    wire = Wire()
    seen: list[Kind] = []
    publish = wire.a.publish

    def keep(topic: str, payload: Any, **more: Any) -> None:
        seen.append(parse(b"".join(payload)).kind)
        publish(topic, payload, **more)

    wire.a.publish = keep  # type: ignore[method-assign]
    measured(wire)
    assert set(seen) == {Kind.PROBE}
