"""A transport over a simulated link in simulated time: exact rates and delays, and faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wire.transport import Buffer, Handler, Inbound, Link, NotConnected


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedTransport:
    """One client whose messages come back to itself: up-link, broker, down-link, each a queue of its own.

    Rates in bytes per second, `delay_s` per direction. `burst_bytes` pass unshaped at the start of each direction.
    """

    protocol = "simulated"
    bytes_sent = 0
    bytes_received = 0

    def __init__(
        self, clock: Clock, up_rate: float = 1e6, down_rate: float = 1e6, delay_s: float = 0.0, burst_bytes: int = 0
    ) -> None:
        self.link = Link.UP
        self.last_error = ""
        self.clock = clock
        self.up_rate, self.down_rate, self.delay_s = up_rate, down_rate, delay_s
        self.bursts = [burst_bytes, burst_bytes]
        self.up_free_s = self.down_free_s = 0.0
        self.subscribed_after_s = 0.0
        self.started_s = clock()
        self.handler: Handler | None = None
        self.on_its_way: list[tuple[float, Inbound]] = []
        self.lose: Callable[[int], bool] = lambda number: False
        self.extra: list[bytes] = []
        self.published = 0

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 0) -> None:
        self.handler = handler

    def unsubscribe(self, topic_filter: str) -> None:
        self.handler = None

    def on_up(self, handler: Callable[[], None]) -> None: ...

    def on_down(self, handler: Callable[[str], None]) -> None: ...

    def start(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        self.link = Link.CLOSED

    def _shaped_s(self, direction: int, size: int, rate: float) -> float:
        free = min(size, self.bursts[direction])
        self.bursts[direction] -= free
        return (size - free) / rate

    def publish(
        self, topic: str, payload: Buffer | Sequence[Buffer], *, qos: int = 0, retain: bool = False, expiry_s: int = 0
    ) -> None:
        if self.link is not Link.UP:
            raise NotConnected("not connected")
        data = payload if isinstance(payload, bytes) else b"".join(payload)  # type: ignore[arg-type]
        self.published += 1
        now_s = self.clock()
        if self.lose(self.published) or now_s - self.started_s < self.subscribed_after_s:
            return
        self.up_free_s = max(now_s, self.up_free_s) + self._shaped_s(0, len(data), self.up_rate)
        at_broker_s = self.up_free_s + self.delay_s
        self.down_free_s = max(at_broker_s, self.down_free_s) + self._shaped_s(1, len(data), self.down_rate)
        for other in self.extra:
            self.on_its_way.append((self.down_free_s, Inbound(topic, other, False)))
        self.on_its_way.append((self.down_free_s + self.delay_s, Inbound(topic, data, False)))

    def poll(self, timeout_s: float) -> int:
        until_s = self.clock() + timeout_s
        if not self.on_its_way or self.on_its_way[0][0] > until_s:
            self.clock.now_s = until_s
            return 0
        at_s, message = self.on_its_way.pop(0)
        self.clock.now_s = max(self.clock.now_s, at_s)
        if self.handler:
            self.handler(message)
        return 1
