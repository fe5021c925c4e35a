"""Credit: never more than the window outstanding, never stuck once credits are repeated, nothing applied twice."""

from __future__ import annotations

import random
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wire.errors import MalformedFrame
from wire.flow import Credit, Deadline, ReceiveWindow, SendWindow, Verdict, encode_credit, parse_credit
from wire.limits import MAX_WINDOW_BYTES

WINDOW = 1000


class Stream(RuleBasedStateMachine):
    """A sender and a receiver joined by two wires that lose, double and reorder."""

    in_order: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.sender = SendWindow(WINDOW)
        self.receiver = ReceiveWindow(WINDOW)
        self.data: list[tuple[int, int] | tuple[int]] = []  # (offset, length), or (offset,) for an ask
        self.credits: list[int] = []
        self.held: list[int] = []
        self.applied: set[int] = set()

    @rule(length=st.integers(1, WINDOW // 2))
    def send(self, length):
        if self.sender.may_send(length):
            self.data.append((self.sender.sent(length), length))

    @rule()
    def ask(self):
        self.data.append((self.sender.offset,))

    def place(self, wire, pick):
        return 0 if self.in_order else pick % len(wire)

    @precondition(lambda self: self.data)
    @rule(pick=st.integers(0, 50), again=st.booleans())
    def data_arrives(self, pick, again):
        index = self.place(self.data, pick)
        message = self.data[index] if again and not self.in_order else self.data.pop(index)
        if len(message) == 1:
            self.receiver.asked(message[0])
            self.credits.append(self.receiver.grant_now())
            return
        verdict, _ = self.receiver.arrived(*message)
        assert verdict is not Verdict.BEYOND, "an honest sender is never beyond its credit"
        if verdict is Verdict.FRESH:
            assert message[0] not in self.applied
            self.applied.add(message[0])
            self.held.append(message[1])

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 50))
    def consume(self, pick):
        self.receiver.consumed(self.held.pop(pick % len(self.held)))
        limit = self.receiver.grant_due()
        if limit is not None:
            self.credits.append(limit)

    @precondition(lambda self: self.credits)
    @rule(pick=st.integers(0, 50), again=st.booleans())
    def credit_arrives(self, pick, again):
        index = pick % len(self.credits)
        self.sender.granted(self.credits[index] if again else self.credits.pop(index))

    @precondition(lambda self: self.data)
    @rule(pick=st.integers(0, 50))
    def data_is_lost(self, pick):
        self.data.pop(pick % len(self.data))

    @precondition(lambda self: self.credits)
    @rule(pick=st.integers(0, 50))
    def credit_is_lost(self, pick):
        self.credits.pop(pick % len(self.credits))

    @invariant()
    def no_more_than_the_window_is_held(self):
        assert sum(self.held) == self.receiver.held_bytes <= WINDOW

    @invariant()
    def no_more_than_the_window_is_outstanding(self):
        if self.in_order:
            in_flight = sum(message[1] for message in self.data if len(message) == 2)
            assert in_flight + sum(self.held) <= WINDOW

    def teardown(self):
        """However it went: when what is held is consumed, one ask and its answer let the sender go on."""
        for length in self.held:
            self.receiver.consumed(length)
        self.receiver.asked(self.sender.offset)
        self.sender.granted(self.receiver.grant_now())
        assert self.sender.may_send(WINDOW)


class StreamInOrder(Stream):
    """As MQTT is on one connection: lost or in order. Then what is under way counts, too."""

    in_order = True


TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStreamInOrder = StreamInOrder.TestCase
TestStreamInOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_gap_is_counted_and_costs_no_credit():
    receiver = ReceiveWindow(WINDOW)
    assert receiver.arrived(0, 100) == (Verdict.FRESH, 0)
    assert receiver.arrived(300, 100) == (Verdict.FRESH, 200)
    assert receiver.held_bytes == 200
    receiver.consumed(200)
    assert receiver.grant_due() == 400 + WINDOW


def test_grants_come_by_the_quarter_not_by_the_frame():
    receiver = ReceiveWindow(WINDOW)
    grants = 0
    for offset in range(0, 100_000, 10):
        receiver.arrived(offset, 10)
        receiver.consumed(10)
        grants += receiver.grant_due() is not None
    assert grants == 100_000 // (WINDOW // 4)


def test_a_sender_that_ignores_its_credit_is_not_served():
    receiver = ReceiveWindow(WINDOW)
    assert receiver.arrived(0, WINDOW + 1) == (Verdict.BEYOND, 0)
    assert receiver.held_bytes == 0


def test_a_receiver_that_starts_late_starts_where_the_sender_is():
    receiver = ReceiveWindow(WINDOW, first_offset=5_000_000)
    assert receiver.arrived(5_000_000, 10) == (Verdict.FRESH, 0)
    assert receiver.grant_now() == 5_000_000 + WINDOW


def test_old_and_absurd_grants_change_nothing():
    sender = SendWindow(WINDOW)
    assert not sender.granted(WINDOW - 1)
    assert not sender.granted(MAX_WINDOW_BYTES + 1)
    assert not sender.granted(2**64 - 1)
    assert sender.granted(WINDOW + 1)
    assert sender.limit == WINDOW + 1


def test_consuming_what_is_not_held_is_our_own_fault():
    with pytest.raises(ValueError, match="are held"):
        ReceiveWindow(WINDOW).consumed(1)


def test_credits_survive_and_broken_ones_are_refused():
    rng = random.Random(7)
    for _ in range(300):
        credit = Credit(rng.getrandbits(64), rng.getrandbits(64))
        data = encode_credit(credit)
        assert len(data) == 24
        assert parse_credit(data) == credit
        broken = bytearray(data)
        broken[rng.randrange(24)] ^= 1 << rng.randrange(8)
        with pytest.raises(MalformedFrame):
            parse_credit(bytes(broken))
        with pytest.raises(MalformedFrame):
            parse_credit(rng.randbytes(rng.randrange(60)))


def test_a_deadline_is_a_moment_of_the_callers_clock():
    deadline = Deadline.after(10.0, 0.5)
    assert not deadline.passed(10.4)
    assert deadline.remaining_s(10.4) == pytest.approx(0.1)
    assert deadline.passed(10.5)
    assert deadline.remaining_s(11) == 0
