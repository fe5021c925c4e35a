"""Links by name and by figures."""

from __future__ import annotations

import math

import pytest

from testbed import links
from testbed.links import Address, LinkSpec, broker_address, checked_link, parse_address
from wire.errors import UsageError


def test_presets_are_what_the_documentation_says() -> None:
    assert links.preset("none") is None
    assert links.preset("ethernet") == LinkSpec(rate_bytes_per_s=12.5e6, delay_s=0.001)
    assert links.preset("wifi") == LinkSpec(rate_bytes_per_s=2.5e6, delay_s=0.005, jitter_s=0.001)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        links.preset("5g")
    assert caught.value.try_ == "one of: none, ethernet, wifi"


@pytest.mark.parametrize(
    "spec",
    [
        LinkSpec(rate_bytes_per_s=0),
        LinkSpec(rate_bytes_per_s=math.inf),
        LinkSpec(rate_bytes_per_s=math.nan),
        LinkSpec(delay_s=-1),
        LinkSpec(delay_s=math.nan),
        LinkSpec(jitter_s=1000),
    ],
)
def test_figures_that_no_link_has_are_refused(spec: LinkSpec) -> None:
    with pytest.raises(UsageError, match="link"):
        checked_link(spec)


def test_a_link_reads_well() -> None:
    assert links.WIFI.text() == "20 Mbit/s, 5.0 ms + up to 1.0 ms one way"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1883", Address("127.0.0.1", 1883)),
        ("[::1]:0", Address("::1", 0)),
        ("board:80", Address("board", 80)),
    ],
)
def test_addresses_are_read_and_written_alike(text: str, address: Address) -> None:
    assert parse_address(text, "upstream") == address
    assert address.text() == text


@pytest.mark.parametrize("text", ["10.0.0.5:8570", "mqtt://10.0.0.5:8570", "mqtt://10.0.0.5:8570/"])
def test_a_broker_is_named_as_hints_name_it(text: str) -> None:
    assert broker_address(text) == Address("10.0.0.5", 8570)


@pytest.mark.parametrize("text", ["", "1883", ":1883", "host:", "host:x", "host:70000", "::1:80", "[x]:80", "host:²"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="upstream"):
        parse_address(text, "upstream")
