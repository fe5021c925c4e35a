"""Outbox and Inbox over a broker that stops, loses and lies."""

from __future__ import annotations

import random

import numpy as np
import pytest

from wire import limits, topics
from wire.channel import Backlogged, Inbox, Outbox
from wire.flow import Credit, encode_credit
from wire.frames import Kind, Parcel, Tensor, encode, header_bytes
from wire.memory import MemoryBroker, MemoryTransport
from wire.pace import Pace
from wire.transport import Link, NotConnected

TOPIC = topics.INBOX.on("lab", "chat", "1")
WINDOW = limits.CREDIT_WINDOW_BYTES


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Pair:
    """A sender and a receiver, each with its connection."""

    def __init__(self, **outbox):
        self.clock = Clock()
        self.broker = MemoryBroker()
        self.near = MemoryTransport(self.broker, "near")
        self.far = MemoryTransport(self.broker, "far")
        for transport in (self.near, self.far):
            transport.start()
            transport.poll(0)
        self.inbox = Inbox(self.far, TOPIC, clock=self.clock)
        self.outbox = Outbox(self.near, TOPIC, clock=self.clock, **outbox)

    def run(self, rounds=3):
        for _ in range(rounds):
            self.far.poll(0)
            self.near.poll(0)

    def tick(self, seconds=1.0):
        self.clock.now_s += seconds
        self.outbox.tick()
        self.inbox.tick()
        self.run()

    def take_all(self):
        taken = []
        while True:
            delivery = self.inbox.take()
            if delivery is None:
                return taken
            taken.append(delivery.parcel)
            self.inbox.done(delivery)


def parcel(number, size=1000):
    return Parcel(Kind.HIDDEN, 1, number, number, 0, Tensor.of(np.full(size, number % 251, np.uint8)))


def numbers(parcels):
    return [each.request for each in parcels]


def test_parcels_arrive_in_order_and_whole():
    pair = Pair()
    for number in range(20):
        pair.outbox.send(parcel(number))
    pair.run()
    taken = pair.take_all()
    assert numbers(taken) == list(range(20))
    assert all((each.tensor.array() == each.request).all() for each in taken)
    assert pair.outbox.bytes == pair.near.bytes_sent == pair.inbox.counters.bytes


def test_bytes_per_token_are_payload_and_header_and_no_credit_message():
    pair = Pair()
    for number in range(50):
        pair.outbox.send(Parcel(Kind.HIDDEN, 1, 1, number, 0, Tensor.of(np.zeros((1, 576), np.float16))))
        pair.run(1)
        pair.take_all()
    assert pair.near.bytes_sent == 50 * (576 * 2 + header_bytes(2))
    assert pair.far.bytes_sent == 0


def test_a_parcel_larger_than_the_window_passes():
    pair = Pair()
    array = np.random.default_rng(1).integers(0, 255, 5 * WINDOW, np.uint8)
    pair.outbox.send(Parcel(Kind.HIDDEN, tensor=Tensor.of(array)))
    assert pair.outbox.bytes <= WINDOW
    pair.run(60)
    [taken] = pair.take_all()
    np.testing.assert_array_equal(taken.tensor.array(), array)
    assert pair.outbox.backlog_bytes == 0


@pytest.mark.parametrize("chunk_bytes", [limits.CHUNK_BYTES_DEFAULT, limits.CHUNK_BYTES_FAST])
def test_many_large_parcels_to_a_slow_consumer_pass_one_by_one(chunk_bytes):
    pair = Pair(chunk_bytes=chunk_bytes)
    sent = 0
    got = []
    for _ in range(400):
        if sent < 12 and pair.outbox.backlog_bytes == 0:
            pair.outbox.send(parcel(sent, 3 * WINDOW))
            sent += 1
        pair.run(1)
        delivery = pair.inbox.take()
        if delivery is not None:
            assert (delivery.parcel.tensor.array() == delivery.parcel.request).all()
            got.append(delivery.parcel.request)
            pair.inbox.done(delivery)
        assert pair.inbox.held_bytes < 16 * WINDOW
    assert got == list(range(12))


def test_a_stalled_receiver_stops_its_sender_at_the_window():
    pair = Pair()
    for number in range(3000):
        pair.outbox.send(parcel(number))
    pair.run()
    assert WINDOW - 2000 < pair.outbox.bytes <= WINDOW
    assert pair.inbox.held_bytes <= WINDOW + 1024 * 1000
    assert pair.outbox.backlog_bytes > WINDOW
    pair.clock.now_s += 2
    assert pair.outbox.blocked_s == pytest.approx(2)
    taken = []
    for _ in range(20):
        taken += pair.take_all()
        pair.run()
    assert numbers(taken) == list(range(3000))
    assert pair.outbox.backlog_bytes == 0


def test_too_much_backlog_is_an_error_of_whoever_sends():
    pair = Pair()
    with pytest.raises(Backlogged):
        for number in range(200):
            pair.outbox.send(parcel(number, 1 << 20))
    assert pair.outbox.backlog_bytes <= limits.MAX_BACKLOG_BYTES


def test_what_waits_for_credit_is_safe_from_the_next_step_of_the_engine():
    pair = Pair()
    array = np.zeros(2 * WINDOW, np.uint8)
    pair.outbox.send(Parcel(Kind.HIDDEN, tensor=Tensor.of(array)))
    array[:] = 9
    pair.run(30)
    [taken] = pair.take_all()
    assert not taken.tensor.array().any()


def test_lost_grants_are_asked_for_again():
    pair = Pair()
    pair.broker.copies = lambda client, message: 0 if message.topic.endswith("credit") else 1
    for number in range(2000):
        pair.outbox.send(parcel(number))
    pair.run()
    taken = pair.take_all()
    pair.run()
    assert pair.outbox.backlog_bytes > 0
    pair.broker.copies = None
    for _ in range(6):
        pair.tick()
        taken += pair.take_all()
        pair.run()
    assert numbers(taken) == list(range(2000))


def test_a_window_that_is_lost_whole_does_not_stop_the_stream():
    pair = Pair()
    pair.outbox.send(parcel(0))
    pair.run()
    first = pair.inbox.take()  # not done with: no grant of its credit helps the sender
    pair.broker.copies = lambda client, message: 0 if client == "far" else 1
    for number in range(1, 1500):
        pair.outbox.send(parcel(number))
    pair.run()
    assert pair.inbox.waiting == 0
    pair.broker.copies = None
    for _ in range(5):
        pair.tick()
    taken = pair.take_all()
    assert numbers(taken)[-1] == 1499
    assert len(taken) > 400
    assert pair.inbox.counters.lost_bytes > WINDOW - 3000
    pair.inbox.done(first)


def test_random_loss_and_doubling_never_apply_a_parcel_twice_and_never_stop_the_stream():
    rng = random.Random(5)
    pair = Pair(chunk_bytes=700)
    pair.broker.copies = lambda client, message: rng.choice((0, 1, 1, 1, 1, 1, 2))
    taken = []
    for number in range(3000):
        pair.outbox.send(parcel(number, rng.choice((10, 1000, 5000))))
        if number % 100 == 0:
            pair.tick()
            taken += pair.take_all()
    pair.broker.copies = None
    for _ in range(30):
        pair.tick()
        taken += pair.take_all()
    pair.outbox.send(parcel(3000))
    pair.run()
    taken += pair.take_all()
    assert numbers(taken) == sorted(set(numbers(taken)))
    assert taken[-1].request == 3000
    assert all((each.tensor.array() == each.request % 251).all() for each in taken)
    assert len(taken) > 800
    assert pair.inbox.counters.duplicates > 0
    assert pair.inbox.counters.lost_bytes > 0


def test_a_sender_without_a_connection_is_told_and_goes_on_afterwards():
    pair = Pair()
    pair.outbox.send(parcel(0))
    pair.broker.cut("near")
    assert pair.near.link is Link.DOWN
    with pytest.raises(NotConnected):
        pair.outbox.send(parcel(1))
    pair.broker.mend("near")
    pair.near.poll(limits.RECONNECT_DELAY_S + 0.5)
    assert pair.near.link is Link.UP
    pair.outbox.send(parcel(2))
    pair.run()
    assert numbers(pair.take_all()) == [0, 2]


def test_grants_that_could_not_be_sent_are_sent_later():
    pair = Pair()
    for number in range(2000):
        pair.outbox.send(parcel(number))
    pair.run()
    pair.broker.cut("far")
    taken = pair.take_all()
    pair.broker.mend("far")
    pair.far.poll(limits.RECONNECT_DELAY_S + 0.5)
    for _ in range(5):
        pair.tick(0.1)
        taken += pair.take_all()
        pair.run()
    assert numbers(taken) == list(range(2000))


def test_a_receiver_that_starts_again_takes_up_a_running_stream():
    pair = Pair()
    for number in range(1500):
        pair.outbox.send(parcel(number))
    pair.run()
    pair.inbox.close()
    pair.inbox = Inbox(pair.far, TOPIC, clock=pair.clock)
    taken = []
    for _ in range(5):
        pair.tick()
        taken += pair.take_all()
    assert numbers(taken)[-1] == 1499


def test_chunks_that_stop_coming_are_dropped_and_their_credit_returns():
    pair = Pair()
    frames = [b"".join(frame) for frame in encode(parcel(1, 300_000), 77, 0, 0, 65536)]
    for data in frames[:-1]:
        pair.near.publish(TOPIC, data)
    pair.run()
    assert pair.inbox.held_bytes == 300_000
    pair.tick(limits.PARTIAL_TIMEOUT_S + 1)
    assert pair.inbox.held_bytes == 0
    assert pair.inbox.counters.dropped_parcels == 1


def test_closing_one_outbox_leaves_the_other_of_the_same_inbox_its_credit():
    pair = Pair()
    other = Outbox(pair.near, TOPIC, clock=pair.clock)
    pair.outbox.close()
    for number in range(2000):
        other.send(parcel(number))
    taken = []
    for _ in range(10):
        pair.run()
        taken += pair.take_all()
    assert numbers(taken) == list(range(2000))


def test_a_retained_frame_is_refused():
    pair = Pair()
    [frame] = encode(parcel(1), 5, 0, 0)
    pair.near.publish(TOPIC, frame, retain=True)
    late = MemoryTransport(pair.broker, "late")
    late.start()
    late.poll(0)
    inbox = Inbox(late, TOPIC)
    late.poll(0)
    assert inbox.waiting == 0
    assert "retained" in inbox.last_refusal


def test_only_so_many_senders_are_remembered():
    pair = Pair()
    for stream in range(1, 3 * limits.MAX_SENDERS):
        [frame] = encode(parcel(stream), stream, 0, 0)
        pair.near.publish(TOPIC, frame)
    pair.run()
    assert len(pair.take_all()) == 3 * limits.MAX_SENDERS - 1
    assert len(pair.inbox._senders) == limits.MAX_SENDERS


def test_a_flood_from_ever_new_senders_is_bounded():
    pair = Pair()
    payload = Tensor.of(np.zeros(limits.CHUNK_BYTES_FAST, np.uint8))
    for stream in range(1, 700):
        [frame] = encode(Parcel(Kind.HIDDEN, tensor=payload), stream, 0, 0, limits.CHUNK_BYTES_FAST)
        pair.near.publish(TOPIC, frame)
        pair.far.poll(0)
    assert pair.inbox.held_bytes <= limits.MAX_HELD_BYTES
    assert "full" in pair.inbox.counters.refusals


def test_garbage_is_counted_and_the_next_parcel_still_arrives():
    pair = Pair()
    rng = random.Random(3)
    good = [b"".join(frame) for frame in encode(parcel(1, 3000), 5, 0, 0, 1000)]
    for _ in range(3000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        pair.near.publish(TOPIC, bytes(data) if rng.random() < 0.7 else rng.randbytes(rng.randrange(300)))
        credit = encode_credit(Credit(pair.outbox.stream, rng.getrandbits(64)))
        pair.far.publish(topics.credit_of(TOPIC), credit if rng.random() < 0.5 else rng.randbytes(24))
        pair.run(1)
    assert pair.inbox.counters.refused > 2900
    assert pair.outbox.bad_credits > 1000
    assert "malformed" in pair.inbox.counters.refusals
    assert pair.near.handler_errors == pair.far.handler_errors == 0
    pair.take_all()
    pair.outbox.send(parcel(42))
    pair.run()
    assert numbers(pair.take_all()) == [42]


def test_windows_and_chunks_that_could_stop_a_stream_are_refused():
    pair = Pair()
    with pytest.raises(ValueError, match="window"):
        Inbox(pair.far, TOPIC, window_bytes=WINDOW - 1)
    with pytest.raises(ValueError, match="chunks"):
        Outbox(pair.near, TOPIC, chunk_bytes=limits.CHUNK_BYTES_FAST + 1)


def row(position, request=9, width=8):
    return Parcel(Kind.HIDDEN, 3, request, position, 0, Tensor.of(np.full((1, width), position, np.float32)))


def test_the_next_frame_is_foreseen_to_the_byte():
    pair = Pair()
    seen = []
    pair.far.subscribe(TOPIC, seen.append)
    assert pair.inbox.foresee(9, 0) is None, "nothing came yet"
    foreseen = None
    for position in range(20):
        pair.outbox.send(row(position))
        pair.run()
        if foreseen is not None:
            frame = seen[-1].payload
            assert frame[8 : 8 + len(foreseen.rest)] == foreseen.rest and len(frame) == foreseen.frame_bytes
        pair.inbox.done(pair.inbox.take())
        foreseen = pair.inbox.foresee(9, position + 1)
        assert foreseen is not None
    assert pair.inbox.foresee(8, 20) is None, "another request"
    pair.outbox.send(Parcel(Kind.CLOSE, 3, 9, 0))
    pair.run()
    assert pair.inbox.foresee(9, 20) is None, "a parcel waits to be taken"
    pair.inbox.done(pair.inbox.take())
    assert pair.inbox.foresee(9, 20) is None, "the last one was no tensor"


def test_what_is_foreseen_is_within_the_credit():
    pair = Pair()
    big = Tensor.of(np.zeros((1, 60_000), np.uint8))
    kept = []
    for position in range(100):
        pair.outbox.send(Parcel(Kind.HIDDEN, 3, 9, position, 0, big))
        pair.run()
        taken = pair.inbox.take()
        if taken is None:
            break
        kept.append(taken)
        if pair.inbox.foresee(9, position + 1) is None:
            break
    assert 1 < len(kept) < 100, "none is foreseen that would be refused"
    assert pair.outbox.lay_out(Parcel(Kind.HIDDEN, 3, 9, 99, 0, big)) is None, "and none is laid out without credit"


def test_frames_that_were_laid_out_and_frames_that_were_sent_make_one_stream():
    pair = Pair()
    for position in range(12):
        parcel = row(position)
        if position % 3 == 1:
            laid = pair.outbox.lay_out(parcel)
            assert laid is not None
            [frame] = encode(parcel, pair.outbox.stream, pair.outbox._end_offset, pair.outbox.parcels)
            pair.near.publish(TOPIC, frame)
            pair.outbox.went(laid)
        else:
            pair.outbox.send(parcel)
        pair.run()
        delivery = pair.inbox.take()
        assert delivery is not None and delivery.parcel.position == position
        pair.inbox.done(delivery)
    counters = pair.inbox.counters
    assert (counters.parcels, counters.gaps, counters.duplicates, counters.refused) == (12, 0, 0, 0)
    assert pair.outbox.parcels == pair.outbox.frames == 12 and pair.outbox.bytes == counters.bytes


def test_nothing_is_laid_out_while_something_waits_or_the_link_is_down():
    pair = Pair()
    assert pair.outbox.lay_out(Parcel(Kind.CLOSE)) is None
    pair.near.close()
    assert pair.outbox.lay_out(row(0)) is None


def test_what_has_a_pace_takes_its_time_and_comes_whole():
    pair = Pair(chunk_bytes=1000)
    pair.outbox.pace = Pace(2000.0, 1000, pair.clock)
    pair.outbox.send(parcel(1, 9000))
    pair.run()
    assert not pair.take_all() and pair.outbox.backlog_bytes > 8000, "the bucket was empty"
    began_s = pair.clock.now_s
    while not (taken := pair.take_all()):
        assert pair.clock.now_s - began_s < 10
        pair.tick(0.02)
    took_s = pair.clock.now_s - began_s
    assert took_s == pytest.approx(pair.outbox.bytes / 2000, rel=0.05)
    assert taken[0].tensor.array().tobytes() == parcel(1, 9000).tensor.array().tobytes()
    pair.outbox.pace = None
    pair.outbox.send(parcel(2, 9000))
    pair.run()
    assert numbers(pair.take_all()) == [2], "without one it goes at once"


def test_who_waits_for_his_pace_asks_for_no_credit():
    pair = Pair(chunk_bytes=1000)
    pair.outbox.pace = Pace(10.0, 1000, pair.clock)
    pair.outbox.send(parcel(1, 900))
    heard = []
    pair.far.subscribe(TOPIC, lambda inbound: heard.append(bytes(inbound.payload)))
    pair.far.poll(0)
    for _ in range(5):
        pair.tick(limits.CREDIT_ASK_S)
    assert heard == [] and pair.outbox.backlog_bytes


def test_a_bucket_lets_no_more_through_at_once_than_a_burst():
    clock = Clock()
    pace = Pace(100.0, 50, clock)
    assert not pace.may_send(1)
    clock.now_s += 1000
    assert pace.may_send(50) and pace.may_send(5000), "what is larger than a burst goes when the bucket is full"
    pace.sent(5000)
    clock.now_s += 49
    assert not pace.may_send(1), "and is paid for afterwards"
    clock.now_s += 2
    assert pace.may_send(1)
    with pytest.raises(ValueError, match="bytes/s"):
        Pace(0.0, 1, clock)
