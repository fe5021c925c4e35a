"""Requests at the same time, as a client sees them: when each token came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct

from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest

T = TypeVar("T")


class Stream(Struct):
    """One answer: monotonic seconds of its request, of each token, and its last event."""

    asked_s: float
    tokens_s: list[float]
    end: dict[str, Any]

    @property
    def first_s(self) -> float:
        return self.tokens_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens_s, self.tokens_s[1:], strict=False)]


def stream(url: str, request: GenerateRequest) -> Stream:
    """Ask, and read to the end."""
    taken = Stream(asked_s=time.monotonic(), tokens_s=[], end={})
    with Client(url) as there:
        for event in there.stream("/v1/generate", request):
            if event.get("event") == "token":
                taken.tokens_s.append(time.monotonic())
            elif event.get("event") == "end":
                taken.end = event
    return taken


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls at the same time; what they give, in order. Raises what the first that failed raised."""
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        return [made.result() for made in [pool.submit(call) for call in calls]]


def together(url: str, requests: Sequence[GenerateRequest]) -> list[Stream]:
    """Ask all at once; raises what the first that failed raised."""
    return at_once([partial(stream, url, request) for request in requests])


def shared(streams: Sequence[Stream]) -> tuple[float, float]:
    """From when the last has its first token until the first has its last; there may be no such moments."""
    return max(one.tokens_s[0] for one in streams), min(one.tokens_s[-1] for one in streams)


def shared_tokens(streams: Sequence[Stream]) -> int:
    """Tokens of all within the moments that they share."""
    begin_s, end_s = shared(streams)
    return sum(sum(begin_s < at_s <= end_s for at_s in one.tokens_s) for one in streams)


def steady_rate(streams: Sequence[Stream]) -> float:
    """Tokens per second of all together in the moments that they share."""
    begin_s, end_s = shared(streams)
    return shared_tokens(streams) / (end_s - begin_s) if end_s > begin_s else float("nan")


def rate_within(one: Stream, began_s: float, until_s: float) -> float:
    """Tokens per second of one stream between two of all its moments; NaN if there is no time between them."""
    inside = [at_s for at_s in one.tokens_s if began_s <= at_s <= until_s]
    return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 else float("nan")


def counters(url: str) -> dict[int, dict[str, float]]:
    """Stage -> its counters, as the boards told them last."""
    with Client(url) as there:
        devices = there.get("/v1/devices")["devices"]
    return {stage["stage"]: stage for device in devices for stage in device["counters"]}


PeakKey = tuple[str, int, int]
"""Deployment, epoch and stage."""


@contextmanager
def resident_peaks(url: str) -> Iterator[dict[PeakKey, float]]:
    """The most bytes that each stage's worker was told to hold, by heartbeats within the block."""
    peaks: dict[PeakKey, float] = {}
    ended = threading.Event()

    def look() -> None:
        with Client(url) as there:
            while not ended.wait(0.5):
                for device in there.get("/v1/devices")["devices"]:
                    for stage in device["counters"]:
                        key = (stage["deployment"], stage["epoch"], stage["stage"])
                        peaks[key] = max(peaks.get(key, 0), stage["resident_bytes"])

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield peaks
        finally:
            ended.set()
        looking.result()


def settled_counters(url: str) -> dict[int, dict[str, float]]:
    """The same after the next heartbeats: they come every second."""
    time.sleep(2.2)
    return counters(url)
