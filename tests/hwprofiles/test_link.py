"""What a board may believe about its own link."""

from __future__ import annotations

import pytest

from hwprofiles.link import (
    ANSWER_DEADLINE_S,
    CONNECT_DEADLINE_S,
    FIRST_ANSWER_DEADLINE_S,
    bytes_per_s,
    measure_link,
    one_way_s,
)
from hwprofiles.profile import LinkMeasurement
from hwprofiles.reading import Absent, Failed
from tests.hwprofiles.simulated import Clock, SimulatedTransport
from wire.frames import Kind, Parcel, encode
from wire.memory import MemoryBroker, MemoryTransport
from wire.transport import Link


def measured(transport: SimulatedTransport) -> LinkMeasurement:
    found = measure_link(transport, "probe", "mqtt://broker:1883", transport.clock, token=7)
    assert isinstance(found, LinkMeasurement), found
    return found


@pytest.mark.parametrize("mbit", [0.5, 2, 20, 100, 1000])
@pytest.mark.parametrize("delay_s", [0.0001, 0.005, 0.04])
def test_rate_and_delay_of_a_known_symmetrical_link_are_found(mbit: float, delay_s: float) -> None:
    rate = mbit * 1e6 / 8
    link = measured(SimulatedTransport(Clock(), rate, rate, delay_s))
    assert one_way_s(link) == pytest.approx(delay_s + 1200 / rate, rel=0.01)
    floor = 8 * (link.goodput_payload_bytes * 9 / 8) / max(link.goodput.samples_s)
    assert bytes_per_s(link) == pytest.approx(min(rate, floor), rel=0.02)
    assert link.round_trip.valid and link.goodput.valid


def test_larger_payload_costs_its_bytes_at_the_rate_of_the_link() -> None:
    link = measured(SimulatedTransport(Clock(), 1e6, 1e6, 0.01))
    base, large = one_way_s(link), one_way_s(link, 1200 + 500_000)
    assert base is not None and large is not None
    assert large - base == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(("kbit", "burst_bytes"), [(100, 0), (256, 0), (512, 32_768), (2000, 32_768)])
def test_slow_link_gets_a_smaller_load_and_takes_no_minutes(kbit: int, burst_bytes: int) -> None:
    clock, rate = Clock(), kbit * 1e3 / 8
    began_s = clock()
    link = measured(SimulatedTransport(clock, rate, rate, 0.01, burst_bytes))
    assert clock() - began_s < 40
    assert bytes_per_s(link) == pytest.approx(rate, rel=0.05)
    assert link.goodput_payload_bytes <= 512 * 1024


def test_asymmetrical_link_is_never_called_faster_than_its_faster_side_nor_slower_than_its_slower() -> None:
    link = measured(SimulatedTransport(Clock(), 1e6, 4e6, 0.005))
    rate = bytes_per_s(link)
    assert rate is not None and 0.95e6 < rate < 4e6


def test_subscription_that_takes_force_late_is_waited_for() -> None:
    transport = SimulatedTransport(Clock())
    transport.subscribed_after_s = 2.0
    assert measured(transport).round_trip.valid


def test_transport_that_is_down_is_failed_with_its_reason() -> None:
    transport = SimulatedTransport(Clock())
    transport.link, transport.last_error = Link.DOWN, "connection refused"
    began_s = transport.clock()
    found = measure_link(transport, "probe", "mqtt://b:1", transport.clock)
    assert isinstance(found, Failed) and "connection refused" in found.because and "mqtt://b:1" in found.because
    assert transport.clock() - began_s <= CONNECT_DEADLINE_S + 1


def test_closed_transport_is_failed_at_once() -> None:
    transport = SimulatedTransport(Clock())
    transport.close()
    assert isinstance(measure_link(transport, "probe", "b", transport.clock), Failed)


def test_broker_that_never_answers_is_failed_within_the_deadline() -> None:
    transport = SimulatedTransport(Clock())
    transport.lose = lambda number: True
    began_s = transport.clock()
    found = measure_link(transport, "probe", "b", transport.clock)
    assert isinstance(found, Failed) and "nothing came back" in found.because
    assert transport.clock() - began_s <= FIRST_ANSWER_DEADLINE_S + 1


def test_lost_message_in_the_middle_is_failed_within_the_deadline() -> None:
    transport = SimulatedTransport(Clock())
    transport.lose = lambda number: number == 30
    began_s = transport.clock()
    found = measure_link(transport, "probe", "b", transport.clock)
    assert isinstance(found, Failed) and "did not come back" in found.because
    assert transport.clock() - began_s < ANSWER_DEADLINE_S + 5


def test_connection_lost_in_the_middle_says_nothing_of_the_link() -> None:
    transport = SimulatedTransport(Clock())
    poll = transport.poll

    def dying(timeout_s: float) -> int:
        if transport.published > 10:
            transport.link = Link.DOWN
        return poll(timeout_s)

    transport.poll = dying  # type: ignore[method-assign]
    found = measure_link(transport, "probe", "b", transport.clock)
    assert isinstance(found, Absent) and "connection lost" in found.because


def test_garbage_and_other_peoples_probes_on_the_topic_change_nothing() -> None:
    clean = measured(SimulatedTransport(Clock(), 1e6, 1e6, 0.01))
    noisy = SimulatedTransport(Clock(), 1e6, 1e6, 0.01)
    [ours_but_of_another] = encode(Parcel(Kind.PROBE, request=8, position=30), 8, 0, 30)
    [ours_but_no_probe] = encode(Parcel(Kind.CLOSE, request=7, position=30), 8, 0, 30)
    noisy.extra = [b"", b"elm", b"\x00" * 40, b"".join(ours_but_of_another), b"".join(ours_but_no_probe)]
    assert measured(noisy).round_trip.samples_s == pytest.approx(clean.round_trip.samples_s)


def test_it_leaves_no_subscription_behind() -> None:
    transport = SimulatedTransport(Clock())
    measured(transport)
    assert transport.handler is None


def test_measures_through_a_broker_in_memory() -> None:
    transport = MemoryTransport(MemoryBroker(), "pi5")
    transport.start()
    found = measure_link(transport, "probe", "memory")
    transport.close()
    assert isinstance(found, LinkMeasurement)
    assert 20 <= len(found.round_trip.samples_s) <= 60 and 3 <= len(found.goodput.samples_s) <= 5
