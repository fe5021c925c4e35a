"""The link is measured truly through a real broker and a shaped link of known rate and delay."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwprofiles.link import bytes_per_s, measure_link, one_way_s
from hwprofiles.profile import LinkMeasurement
from hwprofiles.reading import Failed
from wire.broker import Broker, start_broker
from wire.errors import Unreachable
from wire.mqtt import MqttTransport

_NUMBERS = itertools.count()

TRIALS = 3
"""Of which one has to find a link as fast as it is: the machine may do other things for a while."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    try:
        started = start_broker(tmp_path_factory.mktemp("broker"), "127.0.0.1", 0)
    except Unreachable as error:
        pytest.skip(error.message)
    yield started
    started.stop()


def measured(url: str) -> LinkMeasurement | Failed:
    transport = MqttTransport(url, f"probe-{os.getpid()}-{next(_NUMBERS)}", keepalive_s=30)
    transport.start()
    try:
        return measure_link(transport, "edgelam/v1/lab/act/probe/0/in", url)
    finally:
        transport.close()


def test_loopback_is_fast_and_valid(broker: Broker) -> None:
    found = measured(broker.url)
    assert isinstance(found, LinkMeasurement)
    assert found.goodput_payload_bytes == 512 * 1024 and len(found.round_trip.samples_s) >= 20
    rate, one_way = bytes_per_s(found), one_way_s(found)
    assert rate is not None and rate > 5e6
    assert one_way is not None and 0 < one_way < 0.05


@pytest.mark.parametrize(("mbit", "delay_ms"), [(20, 5), (8, 1)])
def test_shaped_link_is_found_as_it_was_set(broker: Broker, mbit: int, delay_ms: int) -> None:
    upstream = broker.url.removeprefix("mqtt://")
    options = ["--listen", "127.0.0.1:0", "--upstream", upstream]
    options += ["--rate-mbit", str(mbit), "--delay-ms", str(delay_ms)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-m", "testbed.shaper", *options], stdout=subprocess.PIPE, text=True, cwd=root
    ) as shaper:
        try:
            assert shaper.stdout is not None
            address = json.loads(shaper.stdout.readline())["result"]["default"]
            set_rate = mbit * 1e6 / 8
            for _ in range(TRIALS):
                began_s = time.monotonic()
                found = measured(f"mqtt://{address}")
                elapsed_s = time.monotonic() - began_s
                assert isinstance(found, LinkMeasurement)
                rate, one_way = bytes_per_s(found), one_way_s(found)
                # A busy machine adds to a delay and takes from a rate, and never the other way round.
                assert rate is not None and rate < 1.25 * set_rate
                assert one_way is not None and one_way >= delay_ms / 1e3
                if rate > 0.5 * set_rate and one_way < 10 * (delay_ms / 1e3 + 1200 / set_rate) and elapsed_s < 60:
                    return
            pytest.fail(f"{rate} of {set_rate} bytes/s, {one_way} s one way, measured in {elapsed_s} s")
        finally:
            shaper.terminate()


def test_broker_that_is_not_there_is_failed_with_the_reason() -> None:
    found = measured("mqtt://127.0.0.1:1")
    assert isinstance(found, Failed) and "refused" in found.because
