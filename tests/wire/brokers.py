"""Brokers for tests: one start per module, and the reason where one is missing."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from wire.broker import Broker, EmbeddedBroker, MosquittoBroker, _find
from wire.transport import Link, Transport


def make_broker(kind: str, directory: Path, **options) -> Broker:
    """A broker on a free loopback port, not started; skips the test where it is not installed."""
    if kind == "amqtt":
        if importlib.util.find_spec("amqtt") is None:
            pytest.skip("amqtt is not installed")
        return EmbeddedBroker(directory, "127.0.0.1", 0, **options)
    binary = _find("mosquitto")
    if binary is None:
        pytest.skip("mosquitto is not installed")
    return MosquittoBroker(directory, "127.0.0.1", 0, binary=binary, **options)


def until(condition, *transports: Transport, within_s: float = 10.0) -> None:
    """Poll until the condition holds; fail if it never does."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, [(each.link, each.last_error) for each in transports]
        for transport in transports:
            transport.poll(0.01)


def connect(*transports: Transport) -> None:
    for transport in transports:
        transport.start()
    until(lambda: all(each.link is Link.UP for each in transports), *transports)
