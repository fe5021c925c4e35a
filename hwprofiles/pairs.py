"""The way between two boards: round trip, jitter, goodput each way, and what is lost, measured as activations travel.

One board measures and the other answers; each sends where a stage on it would send (to the broker of the other's board,
or through the site's) and receives where a stage would receive. Frames are PROBE frames with a word in JSON in front:

    echo     -> echoed              one small message there and one back
    burst .. -> told                a load of chunks there; the receiver tells from its first arrival to its last
    send     -> burst ..            the same load back

So the rate of each direction is timed on one clock, the receiver's, and no two clocks need agree. How a round trip is
shared between its two directions can't be told so: half of it is taken for each.

Nothing waits without a deadline, and what one measurement may send is bounded on both sides, so that a board that asks
for too much is not given it. It takes some 5 s and at most 7 MB.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta, Struct

from hwprofiles import stats
from hwprofiles.link import CONNECT_DEADLINE_S, FIRST_ANSWER_REPEAT_S, POLL_S, ROUND_TRIP_BYTES
from hwprofiles.measure import StopRule, sample
from hwprofiles.profile import Goodput, PairMeasurement, PairWay
from hwprofiles.reading import Absent, Failed
from wire.errors import EdgelamError, MalformedFrame
from wire.frames import FLAG_FINAL, LARGEST_CHUNK_BYTES, Kind, Parcel, Tensor, encode, parse
from wire.transport import Inbound, Link, Transport

Clock = Callable[[], float]

CHUNKS: Final = 8
CHUNK_BYTES: Final = (2 * 1024, 8 * 1024, 32 * 1024, 64 * 1024)
"""Loads of 8 chunks, the next larger one as long as one takes too little time to say much."""
ENOUGH_S: Final = 0.2
"""A load that took so long from its first chunk to its last tells the rate well enough."""
MAX_BYTES: Final = 8 * 1024 * 1024
"""What an answering board sends in all: the loads above, five or six times the largest, and round trips."""

FIRST_DEADLINE_S: Final = 20.0
"""For the first answer: the worker on the other board is being started, or its board finishes something else."""
LOST_S: Final = 2.0
"""What has not come back by then is lost; retransmissions of TCP take less."""
LATE_S: Final = 0.25
"""What took longer is late: a token that comes after a quarter of a second is seen to stall."""
MOST_LOST: Final = 3
"""In a row; then the other board is gone."""
LOAD_S: Final = 8.0
"""For one load: the smallest, at 20 kbit/s, just does."""
REST_S: Final = 0.02
"""Between two round trips, in which both boards fill their caches with something else (see `before`)."""
SILENCE_S: Final = 30.0
"""An answering board leaves when it has heard nothing for so long."""
LONGEST_S: Final = 90.0

ROUND_TRIP_RULE: Final = StopRule(
    target=0.05, min_samples=20, max_samples=40, least_samples=12, time_budget_s=2.0, give_up_s=10.0, warmup_min=3
)
LOAD_RULE: Final = StopRule(
    target=0.05, min_samples=3, max_samples=5, least_samples=3, time_budget_s=1.5, give_up_s=15.0,
    warmup_min=0, warmup_max=0,
)  # fmt: skip

Load = Annotated[int, Meta(ge=0, le=64)]


class _Word(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a PROBE frame is. `number` tells runs and round trips from each other."""

    say: Literal["echo", "echoed", "burst", "told", "send", "end"]
    number: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    chunks: Load = 0
    chunk_bytes: Annotated[int, Meta(ge=0, le=64 * 1024)] = 0
    seconds: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class _Gone(Exception):
    """The other board, or the way to it, is not there: the text says what was waited for."""


class Poll(Protocol):
    def __call__(self, timeout_s: float) -> object: ...


class Ends(NamedTuple):
    """A board's two connections, which may be one, started, and how both are polled."""

    inward: Transport
    outward: Transport
    poll: Poll


class Arrivals:
    """The load that comes: from its first chunk to its last."""

    def __init__(self) -> None:
        self._number = -1
        self._count = 0
        self._first_s = 0.0

    def saw(self, word: _Word, now_s: float) -> float | None:
        """Take a chunk; the seconds of its load, if it was the last."""
        if word.number != self._number:
            self._number, self._count, self._first_s = word.number, 0, now_s
        self._count += 1
        return now_s - self._first_s if self._count == word.chunks else None


class _End:
    """What both boards do: send words to the other, and hear those that are for this measurement."""

    def __init__(self, ends: Ends, own_topic: str, peer_topic: str, token: int, clock: Clock) -> None:
        self._ends = ends
        self._own_topic = own_topic
        self._peer_topic = peer_topic
        self._token = token
        self.clock = clock
        self._number = 0
        # Random: a compressing tunnel must not look fast.
        self._filler = np.frombuffer(secrets.token_bytes(CHUNK_BYTES[-1]), np.uint8)

    def say(self, word: _Word, payload_bytes: int = 0) -> None:
        tensor = Tensor.of(self._filler[:payload_bytes]) if payload_bytes else None
        meta = msgspec.json.encode(word)
        probe = Parcel(Kind.PROBE, 0, self._token, 0, FLAG_FINAL, tensor, meta)
        self._number += 1
        [frame] = encode(probe, self._token, 0, self._number & 0xFFFFFFFF, LARGEST_CHUNK_BYTES)
        self._ends.outward.publish(self._peer_topic, frame)

    def burst(self, number: int, chunks: int, chunk_bytes: int) -> None:
        for _ in range(chunks):
            self.say(_Word(say="burst", number=number, chunks=chunks), chunk_bytes)

    def heard(self, message: Inbound) -> tuple[_Word, int] | None:
        """A word of this measurement and the bytes behind it; None for anything else that comes to the topic."""
        try:
            frame = parse(message.payload)
            if frame.kind is not Kind.PROBE or frame.request != self._token or not frame.meta:
                return None
            return msgspec.json.decode(frame.meta, type=_Word), len(frame.payload)
        except (MalformedFrame, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None

    def await_up(self) -> None:
        deadline_s = self.clock() + CONNECT_DEADLINE_S
        for transport in (self._ends.inward, self._ends.outward):
            while transport.link is not Link.UP:
                if self.clock() >= deadline_s or transport.link is Link.CLOSED:
                    raise _Gone(f"not connected ({transport.last_error or 'no answer'})")
                self._ends.poll(POLL_S)

    def poll(self, until_s: float) -> None:
        self._ends.poll(max(0.0, min(POLL_S, until_s - self.clock())))
        for transport in (self._ends.inward, self._ends.outward):
            if transport.link is not Link.UP:
                raise _Gone(f"connection lost ({transport.last_error or 'no reason given'})")


class Answerer(_End):
    """The other end. `arrived` answers, `over` says that the measuring board is done, or asks for too much."""

    def __init__(
        self,
        ends: Ends,
        own_topic: str,
        peer_topic: str,
        token: int,
        clock: Clock = perf_counter,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(ends, own_topic, peer_topic, token, clock)
        self.over = False
        self.heard_s: float | None = None
        self._left_bytes = MAX_BYTES
        self._after = after
        self._arrivals = Arrivals()

    def arrived(self, message: Inbound) -> None:
        found = self.heard(message)
        if found is None or self.over:
            return
        (word, payload_bytes), self.heard_s = found, self.clock()
        if word.say == "echo":
            self._give(payload_bytes, lambda: self.say(_Word(say="echoed", number=word.number), payload_bytes))
            self._after()
        elif word.say == "burst":
            seconds = self._arrivals.saw(word, self.heard_s)
            if seconds is not None:
                self.say(_Word(say="told", number=word.number, seconds=seconds))
        elif word.say == "send":
            chunks, chunk_bytes = word.chunks, word.chunk_bytes
            self._give(chunks * chunk_bytes, lambda: self.burst(word.number, chunks, chunk_bytes))
        elif word.say == "end":
            self.over = True

    def _give(self, count: int, send: Callable[[], None]) -> None:
        self._left_bytes -= count
        if self._left_bytes < 0:
            self.over = True
        else:
            send()

    def serve(self) -> str:
        """Answer until it is over; '' or, in words, why it ended otherwise."""
        began_s = self.clock()
        self._ends.inward.subscribe(self._own_topic, self.arrived)
        try:
            self.await_up()
            while not self.over:
                now_s = self.clock()
                if now_s - began_s > LONGEST_S or now_s - (self.heard_s or began_s) > SILENCE_S:
                    return "nothing was heard of the board that measures"
                self.poll(now_s + POLL_S)
        except (_Gone, EdgelamError) as error:
            return str(error)
        finally:
            self._ends.inward.unsubscribe(self._own_topic)
        return "" if self._left_bytes >= 0 else "the board that measures asked for too much"


def measure_pair(
    ends: Ends,
    own_topic: str,
    peer_topic: str,
    peer: str,
    way: PairWay,
    token: int,
    now_unix: float,
    clock: Clock = perf_counter,
    before: Callable[[], None] = lambda: None,
) -> PairMeasurement | Absent | Failed:
    """Measure the way to `peer` and back, where an Answerer serves under the same `token`.

    Failed says what did not come; Absent that our own connection was not there, so that nothing is known yet.
    """
    measurer = Measurer(ends, own_topic, peer_topic, token, clock, before)
    ends.inward.subscribe(own_topic, measurer.arrived)
    try:
        measurer.await_up()
        measurer.first()
        return measurer.measured(peer, way, now_unix)
    except _Gone as error:
        return Failed(f"the way to {peer}: {error}")
    except EdgelamError as error:
        return Absent(f"the way to {peer}: {error.message}")
    finally:
        measurer.end()
        ends.inward.unsubscribe(own_topic)


class Measurer(_End):
    """The end that asks and keeps what it found."""

    def __init__(
        self, ends: Ends, own_topic: str, peer_topic: str, token: int, clock: Clock, before: Callable[[], None]
    ) -> None:
        super().__init__(ends, own_topic, peer_topic, token, clock)
        self._before = before
        self._arrivals = Arrivals()
        self._asked = 0
        self._came: dict[int, float] = {}
        """Seconds of loads and times of echoes, by number; only what was asked for last is waited for."""
        self._sent = self._lost = self._late = 0

    def arrived(self, message: Inbound) -> None:
        found = self.heard(message)
        if found is None:
            return
        (word, _), now_s = found, self.clock()
        if word.number != self._asked or word.number in self._came:
            return
        if word.say == "echoed":
            self._came[word.number] = now_s
        elif word.say == "told":
            self._came[word.number] = word.seconds
        elif word.say == "burst":
            seconds = self._arrivals.saw(word, now_s)
            if seconds is not None:
                self._came[word.number] = seconds

    def first(self) -> None:
        """Ask until the other board answers: it may still be starting."""
        deadline_s = self.clock() + FIRST_DEADLINE_S
        while self.clock() < deadline_s:
            if self._echo(FIRST_ANSWER_REPEAT_S) is not None:
                return
        raise _Gone(f"nothing came back within {FIRST_DEADLINE_S:g} s of asking for it")

    def measured(self, peer: str, way: PairWay, now_unix: float) -> PairMeasurement:
        round_trip = sample(self._round_trip, ROUND_TRIP_RULE, self.clock)
        return PairMeasurement(
            peer=peer,
            way=way,
            measured_at_unix=now_unix,
            round_trip_payload_bytes=ROUND_TRIP_BYTES,
            round_trip=round_trip,
            sent=self._sent,
            lost=self._lost,
            late=self._late,
            there=self._goodput(self._there),
            back=self._goodput(self._back),
        )

    def end(self) -> None:
        """Tell the other board that it is over, if it can be told."""
        if self._ends.outward.link is Link.UP:
            self.say(_Word(say="end"))

    def _round_trip(self) -> float:
        for _ in range(MOST_LOST):
            self._rest()
            self._before()
            self._sent += 1
            seconds = self._echo(LOST_S)
            if seconds is not None:
                self._late += seconds > LATE_S
                return seconds
            self._lost += 1
        raise _Gone(f"{MOST_LOST} messages in a row did not come back within {LOST_S:g} s each")

    def _echo(self, patience_s: float) -> float | None:
        number = self._next()
        began_s = self.clock()
        self.say(_Word(say="echo", number=number), ROUND_TRIP_BYTES)
        came_s = self._await(number, patience_s)
        return None if came_s is None else came_s - began_s

    def _goodput(self, run: Callable[[int], float]) -> Goodput:
        for chunk_bytes in CHUNK_BYTES:
            if run(chunk_bytes) >= ENOUGH_S:
                break
        return Goodput(
            chunk_bytes=chunk_bytes,
            payload_bytes=CHUNKS * chunk_bytes,
            samples=sample(lambda: run(chunk_bytes), LOAD_RULE, self.clock),
        )

    def _there(self, chunk_bytes: int) -> float:
        return self._load(lambda number: self.burst(number, CHUNKS, chunk_bytes))

    def _back(self, chunk_bytes: int) -> float:
        return self._load(
            lambda number: self.say(_Word(say="send", number=number, chunks=CHUNKS, chunk_bytes=chunk_bytes))
        )

    def _load(self, send: Callable[[int], None]) -> float:
        """One load; one of which something was lost is sent once more."""
        for _ in range(2):
            number = self._next()
            send(number)
            seconds = self._await(number, LOAD_S)
            if seconds is not None:
                return seconds
        raise _Gone(f"a load of {CHUNKS} chunks did not come through within {LOAD_S:g} s")

    def _next(self) -> int:
        self._asked += 1
        self._came.clear()
        return self._asked

    def _await(self, number: int, patience_s: float) -> float | None:
        deadline_s = self.clock() + patience_s
        while number not in self._came and self.clock() < deadline_s:
            self.poll(deadline_s)
        return self._came.get(number)

    def _rest(self) -> None:
        until_s = self.clock() + REST_S
        while self.clock() < until_s:
            self.poll(until_s)


def one_way_s(pair: PairMeasurement) -> float | None:
    """Half of the median round trip; None if there are no samples."""
    samples_s = pair.round_trip.samples_s
    return stats.median(samples_s) / 2 if samples_s else None


def bytes_per_s(goodput: Goodput) -> float | None:
    """Rate of one direction: all chunks but the first, from the first arrival to the last. None without samples, or
    where all came at once."""
    samples_s = goodput.samples.samples_s
    seconds = stats.median(samples_s) if samples_s else 0.0
    return (goodput.payload_bytes - goodput.chunk_bytes) / seconds if seconds > 0 else None


def jitter_s(samples_s: Sequence[float]) -> float | None:
    """Mean difference between one round trip and the next (as RFC 3550 does with transit times, without its smoothing);
    None for less than two."""
    changes = [abs(later - earlier) for earlier, later in pairwise(samples_s)]
    return sum(changes) / len(changes) if changes else None
