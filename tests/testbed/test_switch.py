"""The switch decides which ports a frame goes to, and when; no device is needed to see it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.links import LinkSpec
from testbed.switch import MAX_ADDRESSES, Plug, SetPort, Switch

EVERYBODY = b"\xff" * 6
PLAIN = LinkSpec()


def mac(number: int) -> bytes:
    return b"\x02" + number.to_bytes(5, "big")


def frame(sender: int, target: bytes, count: int = 100) -> bytes:
    return (target + mac(sender) + b"\x08\x00").ljust(count, b".")


def ports(switch: Switch, source: int, data: bytes, now_s: float = 0.0) -> list[int]:
    return [delivery.port for delivery in switch.forward(source, data, now_s)]


def test_broadcast_and_unknown_addresses_are_flooded_and_learned_ones_are_not() -> None:
    switch = Switch({"a": PLAIN, "b": PLAIN, "c": PLAIN})
    assert ports(switch, 0, frame(0, EVERYBODY)) == [1, 2]
    assert ports(switch, 1, frame(1, mac(9))) == [0, 2]
    assert ports(switch, 2, frame(2, mac(0))) == [0]
    assert ports(switch, 0, frame(0, b"\x01\x00\x5e\x00\x00\xfb")) == [1, 2], "mDNS goes to everybody"


def test_a_frame_crosses_the_senders_link_and_the_receivers() -> None:
    switch = Switch({"a": LinkSpec(delay_s=0.005), "b": LinkSpec(rate_bytes_per_s=10_000, delay_s=0.001)})
    (delivery,) = switch.forward(0, frame(0, EVERYBODY, 100), 7.0)
    assert delivery.due_s == pytest.approx(7.0 + 0.005 + 100 / 10_000 + 0.001)


def test_a_link_serialises_frames_and_drops_what_its_queue_does_not_hold() -> None:
    switch = Switch({"a": LinkSpec(rate_bytes_per_s=100_000), "b": PLAIN})
    due = [delivery.due_s for _ in range(100) for delivery in switch.forward(0, frame(0, EVERYBODY, 1000), 0.0)]
    assert due == pytest.approx([0.01 * number for number in range(1, len(due) + 1)])
    assert len(due) == 6, "50 ms at 10 ms a frame, and the one that is being sent"


def test_a_pulled_cable_passes_nothing_either_way() -> None:
    switch = Switch({"a": PLAIN, "b": PLAIN, "c": PLAIN})
    switch.change(Plug(port="b", up=False))
    assert ports(switch, 0, frame(0, EVERYBODY)) == [2]
    assert ports(switch, 1, frame(1, EVERYBODY)) == []
    switch.change(Plug(port="b", up=True))
    assert ports(switch, 0, frame(0, EVERYBODY)) == [1, 2]
    with pytest.raises(KeyError):
        switch.change(Plug(port="z", up=True))


def test_loss_is_drawn_at_each_link_that_a_frame_crosses() -> None:
    switch = Switch({"a": PLAIN, "b": PLAIN}, seed=3)
    for name in ("a", "b"):
        switch.change(SetPort(port=name, link=PLAIN, loss=0.1))
    arrived = sum(len(switch.forward(0, frame(0, EVERYBODY), 0.0)) for _ in range(5000))
    assert 0.79 <= arrived / 5000 <= 0.83


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 0.01), st.integers(14, 1500)), max_size=60))
@settings(max_examples=50)
def test_frames_keep_their_order_whatever_the_jitter(sent: list[tuple[int, float, int]]) -> None:
    link = LinkSpec(rate_bytes_per_s=1e6, delay_s=0.002, jitter_s=0.02)
    switch = Switch({"a": link, "b": link, "c": link})
    last: dict[int, float] = {}
    now_s = 0.0
    for source, pause_s, count in sent:
        now_s += pause_s
        for delivery in switch.forward(source, frame(source, EVERYBODY, count), now_s):
            assert delivery.due_s >= now_s + 0.004
            assert delivery.due_s >= last.get(delivery.port, 0.0)
            last[delivery.port] = delivery.due_s


@given(st.binary(max_size=80), st.integers(0, 1))
def test_any_bytes_are_forwarded_or_dropped(data: bytes, source: int) -> None:
    assert set(ports(Switch({"a": PLAIN, "b": PLAIN}), source, data)) <= {0, 1} - {source}


def test_made_up_addresses_do_not_fill_the_memory() -> None:
    switch = Switch({"a": PLAIN, "b": PLAIN})
    for number in range(MAX_ADDRESSES + 10):
        switch.forward(0, frame(number, EVERYBODY), 0.0)
    assert len(switch._learned) <= MAX_ADDRESSES
