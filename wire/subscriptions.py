"""Which handlers a message goes to: MQTT's topic filters, and the one place where handlers are called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

from wire.errors import EdgelamError
from wire.limits import MAX_PUBLISH_BYTES
from wire.transport import Buffer, Handler, Inbound, TooLarge

P = ParamSpec("P")

_logger = logging.getLogger("edgelam.wire")


def check_filter(topic_filter: str) -> None:
    """Raise ValueError if this is no topic filter (MQTT 5, section 4.7.1)."""
    levels = topic_filter.split("/")
    mixed = any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
    if not topic_filter or mixed or "#" in levels[:-1]:
        raise ValueError(f"not a topic filter: {topic_filter!r}")


def check_message(topic: str, payload_bytes: int, qos: int) -> None:
    """Raise ValueError for a wrong topic or QoS, TooLarge for a payload over MAX_PUBLISH_BYTES."""
    if not topic or "+" in topic or "#" in topic or qos not in (0, 1):
        raise ValueError(f"can't publish to {topic!r} at QoS {qos}")
    if payload_bytes > MAX_PUBLISH_BYTES:
        raise TooLarge(f"{topic}: {payload_bytes} bytes, a message has at most {MAX_PUBLISH_BYTES}")


def joined(payload: Buffer | Sequence[Buffer]) -> bytes:
    """One bytes object of a payload, copied only if it is not one already."""
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, (bytearray, memoryview)):
        return bytes(payload)
    return b"".join(payload)


def matches(topic_filter: str, topic: str) -> bool:
    """Does `topic` match? Wildcards at the first level don't match topics that begin with '$'."""
    if topic_filter == topic:
        return True
    pattern, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and pattern[0] in ("+", "#"):
        return False
    for index, expected in enumerate(pattern):
        if expected == "#":
            return True
        if index >= len(levels) or expected not in ("+", levels[index]):
            return False
    return len(pattern) == len(levels)


class Subscriptions:
    """The filters of one transport with their QoS and handlers. Not thread-safe."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}
        self._qos: dict[str, int] = {}
        self._patterns: list[str] = []
        """The filters with wildcards."""
        self.handler_errors = 0
        """Handlers that raised; each was logged."""

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(tuple(self._qos.items()))

    def __contains__(self, topic_filter: str) -> bool:
        return topic_filter in self._handlers

    def add(self, topic_filter: str, handler: Handler, qos: int) -> bool:
        """Add a handler; give whether the broker must be told (a new filter, or a higher QoS)."""
        check_filter(topic_filter)
        if qos not in (0, 1):
            raise ValueError(f"QoS {qos}: only 0 and 1 are used")
        if topic_filter not in self._handlers and ("+" in topic_filter or "#" in topic_filter):
            self._patterns.append(topic_filter)
        self._handlers.setdefault(topic_filter, []).append(handler)
        news = qos > self._qos.get(topic_filter, -1)
        self._qos[topic_filter] = max(qos, self._qos.get(topic_filter, 0))
        return news

    def remove(self, topic_filter: str, handler: Handler | None) -> bool:
        """Remove one handler, or all; give whether the broker must be told that the filter is gone."""
        handlers = self._handlers.get(topic_filter)
        if handlers is None:
            return False
        if handler is None:
            handlers.clear()
        elif handler in handlers:
            handlers.remove(handler)
        if handlers:
            return False
        del self._handlers[topic_filter], self._qos[topic_filter]
        if topic_filter in self._patterns:
            self._patterns.remove(topic_filter)
        return True

    def matching(self, topic: str) -> list[Handler]:
        found = list(self._handlers.get(topic, ()))
        for pattern in self._patterns:
            if pattern != topic and matches(pattern, topic):
                found += self._handlers[pattern]
        return found

    def dispatch(self, inbound: Inbound) -> None:
        """Call every handler that matches, so that nothing it raises reaches the loop."""
        for handler in self.matching(inbound.topic):
            self.guard(inbound.topic, handler, inbound)

    def guard(self, what: str, handler: Callable[P, None], *args: P.args, **named: P.kwargs) -> None:
        """Call a handler; if it raises, count and log that."""
        try:
            handler(*args, **named)
        except EdgelamError as error:
            self.handler_errors += 1
            _logger.warning("%s: %s", what, error.message)
        except Exception:
            self.handler_errors += 1
            _logger.exception("%s: the handler failed", what)
