"""The short way for QoS 0 messages: every packet reaches whom it is for, however the stream is cut."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.wire.brokers import connect, make_broker, until
from wire.lane import READ_BYTES, Lane, Nonsense
from wire.mqtt import MqttTransport
from wire.transport import Expected, Inbound

MOST_BYTES = 200_000


class Wire:
    """A socket whose other end is a list of pieces; what is written is taken in bites."""

    def __init__(self, pieces: list[bytes], bites: Iterator[int] | None = None, error: OSError | None = None) -> None:
        self.pieces = pieces
        self.written = b""
        self.bites = bites
        self.error = error
        self.closes = False

    def recv_into(self, room: memoryview) -> int:
        if not self.pieces:
            if self.error:
                raise self.error
            if self.closes:
                return 0
            raise BlockingIOError
        piece = self.pieces.pop(0)
        taken = min(len(piece), len(room))
        room[:taken] = piece[:taken]
        if taken < len(piece):
            self.pieces.insert(0, piece[taken:])
        return taken

    def send(self, data: Any) -> int:
        most = len(data) if self.bites is None else next(self.bites, 0)
        if most == 0:
            raise BlockingIOError
        self.written += bytes(data)[:most]
        return min(most, len(data))

    def sendmsg(self, parts: Any) -> int:
        return self.send(b"".join(parts))


def lane(pieces: list[bytes], *, five: bool = False, **options: Any) -> tuple[Lane, Wire]:
    wire = Wire(pieces, **options)
    return Lane(wire, five=five, most_bytes=MOST_BYTES), wire  # type: ignore[arg-type]


def length(value: int) -> bytes:
    """Variable byte integer, by the book (MQTT 5, 1.5.5)."""
    out = b""
    while True:
        value, low = divmod(value, 128)
        out += bytes([low + 128 * (value > 0)])
        if not value:
            return out


def publish(topic: str, payload: bytes, *, five: bool = False, retain: bool = False, properties: bytes = b"") -> bytes:
    body = len(topic.encode()).to_bytes(2, "big") + topic.encode()
    if five:
        body += length(len(properties)) + properties
    body += payload
    return bytes([0x30 | retain]) + length(len(body)) + body


def other(first: int, body: bytes) -> bytes:
    return bytes([first]) + length(len(body)) + body


def read_all(one: Lane) -> tuple[list[Inbound], bytes]:
    """What the transport gets, and what paho gets."""
    messages, others = [], b""
    for _ in range(100_000):
        found, _ = one.read()
        messages += found
        while one._others:
            others += one.recv(7)
        if not one.connection.pieces:  # type: ignore[attr-defined]
            return messages, others
    raise AssertionError("it does not end")


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


topics = st.text(st.characters(codec="utf-8", exclude_characters="\0+#"), min_size=1, max_size=12)
messages = st.tuples(st.just("message"), topics, st.binary(max_size=300), st.booleans())
others = st.tuples(
    st.just("other"), st.sampled_from([0x20, 0x40, 0x32, 0x3A, 0x34, 0x90, 0xB0, 0xD0, 0xE0]), st.binary(max_size=200)
)


@given(st.lists(messages | others, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=30), st.booleans())
def test_every_packet_reaches_whom_it_is_for_however_the_stream_is_cut(
    packets: list[Any], places: list[int], five: bool
) -> None:
    stream, for_us, for_paho = b"", [], b""
    for kind, *rest in packets:
        if kind == "message":
            topic, payload, retain = rest
            stream += publish(topic, payload, five=five, retain=retain, properties=b"\x02\0\0\0\x09" * (retain & five))
            for_us.append(Inbound(topic, payload, retain))
        else:
            packet = other(*rest)
            stream += packet
            for_paho += packet
    one, _ = lane(cut(stream, places), five=five)
    assert read_all(one) == (for_us, for_paho)
    assert one.refused == 0


@given(st.lists(st.binary(max_size=60), max_size=12))
def test_any_bytes_are_packets_or_nonsense_and_nothing_else(pieces: list[bytes]) -> None:
    one, _ = lane([piece for piece in pieces if piece])
    try:
        read_all(one)
    except Nonsense:
        return


@pytest.mark.parametrize("size", [READ_BYTES - 20, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES])
def test_a_message_larger_than_the_buffer_comes_whole_and_the_buffer_shrinks_again(size: int) -> None:
    payload = bytes(range(256)) * (size // 256)
    stream = publish("big", payload) + publish("small", b"s")
    one, _ = lane(cut(stream, list(range(0, len(stream), 10_000))))
    found, _ = read_all(one)
    assert found == [Inbound("big", payload, False), Inbound("small", b"s", False)]
    assert len(one._buffer) == READ_BYTES


def test_a_packet_over_the_cap_is_skipped_without_being_held() -> None:
    stream = publish("huge", bytes(MOST_BYTES)) + publish("after", b"a")
    one, _ = lane(cut(stream, list(range(0, len(stream), 50_000))))
    found, _ = read_all(one)
    assert found == [Inbound("after", b"a", False)]
    assert one.refused == 1
    assert len(one._buffer) == READ_BYTES


def test_a_packet_of_another_kind_over_the_cap_is_skipped_too() -> None:
    one, _ = lane([other(0x32, bytes(MOST_BYTES + 1)) + publish("after", b"a")])
    found, others = read_all(one)
    assert [message.topic for message in found] == ["after"]
    assert others == b""


@pytest.mark.parametrize(
    "stream",
    [
        b"\x30\x00",
        b"\x30\x01\x00",
        b"\x30\x03\x00\x09a",
        b"\x30\xff\xff\xff\xff\x01",
        b"\x20\x80\x80\x80\x80\x00",
    ],
)
def test_what_is_no_mqtt_is_called_so(stream: bytes) -> None:
    one, _ = lane([stream])
    with pytest.raises(Nonsense):
        one.read()


@pytest.mark.parametrize("body", [b"\x00\x01t", b"\x00\x01t\x05ab", b"\x00\x01t\x80", b"\x00\x01t\x80\x80\x80\x80\x01"])
def test_properties_that_do_not_fit_are_nonsense(body: bytes) -> None:
    one, _ = lane([other(0x30, body)], five=True)
    with pytest.raises(Nonsense):
        one.read()


def test_a_topic_that_is_no_text_is_refused_and_the_rest_is_read() -> None:
    one, _ = lane([other(0x30, b"\x00\x02\xff\xfepayload") + publish("t", b"x")])
    assert read_all(one)[0] == [Inbound("t", b"x", False)]
    assert one.refused == 1


def test_the_end_and_errors_are_left_for_paho_to_find() -> None:
    one, wire = lane([publish("t", b"last")])
    with pytest.raises(BlockingIOError):
        one.recv(1)
    wire.closes = True
    assert read_all(one)[0] == [Inbound("t", b"last", False)]
    assert not one.others
    one.read()
    assert one.others
    assert one.recv(1) == b""
    broken, wire = lane([], error=ConnectionResetError("reset"))
    broken.read()
    assert broken.others
    with pytest.raises(ConnectionResetError):
        broken.recv(1)


@given(st.lists(st.integers(0, 900), max_size=60), st.lists(st.binary(max_size=400), min_size=1, max_size=8))
def test_what_is_sent_arrives_whole_and_in_order_whatever_the_socket_takes(
    bites: list[int], payloads: list[bytes]
) -> None:
    one, wire = lane([], bites=iter(bites))
    expected = b""
    for number, payload in enumerate(payloads):
        if number % 3 == 2:
            packet = other(0xC0, payload)
            assert one.send(packet) == len(packet)
        else:
            packet = publish("topic", payload)
            half = len(payload) // 2
            one.publish("topic", [payload[:half], memoryview(payload)[half:]], len(payload))
        expected += packet
        assert expected == wire.written + bytes(one.unsent)
    wire.bites = None
    one.flush()
    assert wire.written == expected
    assert not one.unsent


def test_what_is_sent_is_what_the_book_says() -> None:
    for five in (False, True):
        for size in (0, 1, 100, 127 * 3, 20_000, 70_000):
            one, wire = lane([], five=five)
            one.publish("a/b", [b"x" * size], size, retain=True)
            assert wire.written == publish("a/b", b"x" * size, five=five, retain=True)


def test_a_thousand_topics_do_not_pile_up() -> None:
    one, wire = lane([])
    for number in range(1000):
        one.publish(f"topic/{number}", [b"x"], 1)
    assert wire.written == b"".join(publish(f"topic/{number}", b"x") for number in range(1000))
    assert len(one._heads) <= 256


def test_paho_gets_its_socket_by_the_method_that_is_replaced(tmp_path) -> None:
    """A paho that makes its socket in another way must be found here, and not on a board."""
    assert hasattr(paho.Client, "_create_socket")
    broker = make_broker("mosquitto", tmp_path)
    broker.start()
    near = MqttTransport(broker.url, "near", keepalive_s=5)
    try:
        connect(near)
        assert isinstance(near._client.lane, Lane)  # type: ignore[union-attr]
        assert near._client.socket() is near._client.lane  # type: ignore[union-attr]
    finally:
        near.close()
        broker.stop()


@pytest.mark.parametrize("five", [True, False])
def test_a_receiver_that_stops_reading_gets_all_of_it_later(tmp_path, five: bool) -> None:
    """The broker stops taking; what waits here goes out when it takes again, and a PINGREQ in between harms nothing."""
    broker = make_broker("mosquitto", tmp_path)
    broker.start()
    near = MqttTransport(broker.url, "near", keepalive_s=5, five=five)
    far = MqttTransport(broker.url, "far", keepalive_s=5, five=five)
    got: list[Inbound] = []
    try:
        far.subscribe("x", got.append)
        connect(near, far)
        assert near.socket is not None
        near.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        payloads = [bytes([number]) * 100_000 for number in range(40)]
        for payload in payloads:
            near.publish("x", payload)
            far.poll(0)
        began_s = time.monotonic()
        until(lambda: len(got) == len(payloads), near, far)
        assert [message.payload for message in got] == payloads
        assert time.monotonic() - began_s < 30
    finally:
        near.close()
        far.close()
        broker.stop()


@given(
    st.lists(messages | others, min_size=1, max_size=8),
    st.lists(st.integers(0, 1 << 20), max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.integers(0, 7),
)
def test_a_look_at_what_comes_takes_nothing_away(
    packets: list[Any], places: list[int], looks: list[bool], known: int
) -> None:
    stream, whole = b"", []
    for kind, *rest in packets:
        packet = publish(*rest[:2], retain=rest[2]) if kind == "message" else other(*rest)
        whole.append(packet)
        stream += packet
    plain, _ = lane(cut(stream, places))
    peeking, _ = lane(cut(stream, places))
    wanted = whole[known % len(whole)]
    assume(len(wanted) >= 9)
    expected = Expected(wanted[:5], 2, wanted[7:9], len(wanted))
    messages_seen, others_seen = [], b""
    for turn in range(100_000):
        if looks[turn % len(looks)]:
            view = peeking.peek(expected)
            if view is not None:
                seen = bytes(view)
                assert len(seen) == len(wanted) - 5 and seen[2:4] == wanted[7:9]
        found, _ = peeking.read()
        messages_seen += found
        while peeking._others:
            others_seen += peeking.recv(7)
        if not peeking.connection.pieces and not peeking._unread:  # type: ignore[attr-defined]
            break
    assert (messages_seen, others_seen) == read_all(plain)


def test_the_packet_that_was_expected_is_seen_and_then_read() -> None:
    packet = publish("here", b"elm1....rest of it" + b"payload")
    head = packet[: packet.index(b"....")]
    expected = Expected(head, 4, b"rest of it", len(packet))
    one, _ = lane([packet, packet[:-1], packet[-1:] + packet])
    view = one.peek(expected)
    assert view is not None and bytes(view) == b"....rest of itpayload"
    assert one.peek(expected) is None, "it is still to be read"
    assert one.read()[0] == [Inbound("here", b"elm1....rest of itpayload", False)]
    assert one.peek(expected) is None, "not whole"
    assert one.read()[0] == []
    assert one.peek(expected) is None, "the rest of one and the next"
    assert len(one.read()[0]) == 2
    assert one.peek(expected) is None and one.read() == ([], False)


@pytest.mark.parametrize("five", [False, True])
def test_a_packet_that_is_put_is_the_one_that_is_published(five: bool) -> None:
    one, wire = lane([], five=five)
    one.publish("a/topic", (b"some ", b"payload"), 12)
    published, wire.written = wire.written, b""
    head = one.packet_head("a/topic", 12)
    one.put((head, b"some payload"), len(head) + 12)
    assert wire.written == published


def test_the_end_that_a_look_finds_is_left_for_paho() -> None:
    expected = Expected(b"0", 0, b"", 1)
    one, wire = lane([])
    wire.closes = True
    assert one.peek(expected) is None and one.others and one.recv(9) == b""
    two, _ = lane([], error=ConnectionResetError("reset"))
    assert two.peek(expected) is None and two.others
    with pytest.raises(ConnectionResetError):
        two.recv(9)
