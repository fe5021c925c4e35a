"""What stands in an advertisement: refused with a reason when we write it, counted and dropped when others do."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import addresses, limits
from wire.advertisement import (
    Found,
    agent_properties,
    coordinator_properties,
    instance_label,
    read_record,
    txt_record,
)
from wire.discovery import chosen
from wire.errors import PeerError, Refused, UsageError
from wire.version import PROTOCOL

BOOT = "0123456789ab"


def raw(record: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in record.items()}


def coordinator(site: str, protocol: int = PROTOCOL) -> Found:
    record = txt_record(site, "coordinator", "coordinator", BOOT, coordinator_properties(8080))
    return read_record(raw({**record, "v": str(protocol)}), ["10.0.0.5"], 1883)


def test_what_is_written_is_what_is_read() -> None:
    record = txt_record("lab", "pi5", "agent", BOOT, agent_properties(3.5, 8 << 30, ["onnxruntime", "torch"]))
    found = read_record(raw(record), ["10.0.0.7"], 0)
    assert (found.role, found.site, found.name, found.boot, found.port) == ("agent", "lab", "pi5", BOOT, 0)
    assert found.properties == {"cores": "3.5", "mem": "8192", "engines": "onnxruntime,torch"}
    assert found.http_port is None
    assert coordinator("lab").http_port == 8080


def test_a_broker_on_another_machine_is_where_the_coordinator_says() -> None:
    record = txt_record("lab", "coordinator", "coordinator", BOOT, coordinator_properties(8571, "10.0.0.9"))
    assert read_record(raw(record), ["10.0.0.5"], 1883).broker_hosts == ("10.0.0.9",)
    assert coordinator("lab").broker_hosts == ("10.0.0.5",)
    strange = read_record(raw({**record, "broker": "a b/c"}), ["10.0.0.5"], 1883)
    assert strange.broker_hosts == ("10.0.0.5",)


def test_the_longest_names_and_properties_of_an_agent_fit_into_the_record_and_the_label() -> None:
    site, name = "s" * 32, "d" * 32
    record = txt_record(
        site, name, "agent", BOOT, agent_properties(4095.25, 1 << 45, ["onnxruntime", "torch", "tensorrt"])
    )
    assert sum(len(key) + len(value) + 2 for key, value in record.items()) <= limits.MAX_TXT_BYTES
    label = instance_label(site, name)
    assert len(f"{label}-2") <= 63
    assert label != instance_label(site, "d" * 31 + "e")


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"boot": "1"}, "reserved"),
        ({"a=b": "1"}, "can't stand"),
        ({"": "1"}, "can't stand"),
        ({"k": "x" * 254}, "256 bytes"),
        ({f"k{number}": "x" * 90 for number in range(5)}, "one packet"),
    ],
)
def test_a_property_that_may_not_stand_is_refused_with_the_reason(properties: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        txt_record("lab", "pi5", "agent", BOOT, properties)
    assert caught.value.try_


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"role": "king"}, "role"),
        ({"site": "Lab/#"}, "site"),
        ({"id": "+"}, "id"),
        ({"boot": "xyz"}, "boot"),
        ({"v": "1.0"}, "v"),
        ({"v": "²"}, "v"),
    ],
)
def test_a_malformed_field_is_named(change: dict[str, str], field: str) -> None:
    record = txt_record("lab", "coordinator", "coordinator", BOOT, {})
    with pytest.raises(PeerError, match=f"{field} missing or malformed"):
        read_record(raw({**record, **change}), ["10.0.0.5"], 1883)


def test_a_coordinator_without_port_or_address_is_malformed() -> None:
    record = raw(txt_record("lab", "coordinator", "coordinator", BOOT, {}))
    with pytest.raises(PeerError, match="port"):
        read_record(record, ["10.0.0.5"], 0)
    with pytest.raises(PeerError, match="address"):
        read_record(record, [], 1883)


@given(
    st.dictionaries(
        st.binary(max_size=12) | st.sampled_from([b"role", b"site", b"id", b"boot", b"v"]),
        st.none() | st.binary(max_size=40),
    ),
    st.none() | st.integers(-5, 70000),
)
@settings(max_examples=200)
def test_any_record_is_read_or_refused_and_nothing_else(pairs: dict[bytes, bytes | None], port: int | None) -> None:
    try:
        found = read_record(pairs, ["10.0.0.5"], port)
    except PeerError:
        return
    assert found.site
    assert found.http_port is None or 0 < found.http_port < 65536


def test_addresses_in_our_network_come_first_and_ipv6_last() -> None:
    networks = [ipaddress.IPv4Network("10.1.0.0/16")]
    given_addresses = ["fe80::1%3", "172.17.0.1", "10.1.2.3"]
    assert addresses.nearest_first(given_addresses, networks) == ("10.1.2.3", "172.17.0.1", "fe80::1%3")


def test_an_interface_that_is_no_address_is_refused() -> None:
    with pytest.raises(UsageError, match="'eth0' is not an IP address"):
        addresses.checked_interfaces(["eth0"])


def test_several_sites_are_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"2 sites.*den.*lab") as caught:
        chosen([coordinator("lab"), coordinator("den"), coordinator("lab")])
    assert caught.value.try_ == "say which one: --site den"


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(Refused, match=f"speaks protocol 9, this is {PROTOCOL}"):
        chosen([coordinator("lab", protocol=9)])
