"""Clients that stop reading: what they cost in memory, and what others feel of them.

The same requests over the same site, by clients that read and by clients that stop after their first token, at both
doors. Meanwhile another client asks. Its tokens per second beside stalled clients are compared with those beside
clients that read, before and after; the most memory that each process took with that of two rounds of readers before.
Then the stalled ones read again, and must find every token of their answer, in order.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median

import httpx
import msgspec
import psutil

from benchmarks.parts import load
from benchmarks.parts.prompts import prompt
from benchmarks.parts.sites import MODEL, SLOWED, Site, whole_site
from benchmarks.report import Figure, at_least, at_most
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from testbed.boards import preset
from wire.errors import EdgelamError

LINK = "ethernet"
CLIENTS = 6
"""Half of them at each door; a deployment has eight turns, so the other client never waits for its own."""
TOKENS = 600
CONTEXT_TOKENS = 1024
OBSERVED_TOKENS = 48
SAMPLE_PERIOD_S = 0.5
WINDOW_BYTES = 300 * TOKENS + 500_000
"""What may wait for one stalled client in the coordinator: 300 bytes for each token, and its socket's buffers."""
OTHERS_GROW_BYTES = 2_000_000
"""Brokers and workers hold nothing for a client; this is what their memory scatters by."""


class Memory:
    """The most resident bytes of each process of a site while it is watched."""

    def __init__(self, site: Site) -> None:
        self.most: dict[str, int] = {}
        self._processes = dict(processes(site))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for name, process in self._processes.items():
                with contextlib.suppress(psutil.Error):
                    self.most[name] = max(self.most.get(name, 0), process.memory_info().rss)
            if self._done.wait(SAMPLE_PERIOD_S):
                return


def processes(site: Site) -> Iterator[tuple[str, psutil.Process]]:
    """What a client could make grow: coordinator, brokers, workers."""
    coordinator = psutil.Process(site.there.get("/v1/status")["pid"])
    yield "coordinator", coordinator
    for child in coordinator.children(recursive=True):
        if "mosquitto" in child.name():
            yield "broker", child
    for board in site.boards.status().boards:
        for child in psutil.Process(board.pid).children(recursive=True):
            words = " ".join(child.cmdline())
            if "mosquitto" in words:
                yield f"broker of {board.name}", child
            elif "agent.workers.inference" in words:
                yield f"worker of {board.name}", child


class Reader:
    """One client; it stops after its first token until `go_on` is set, if it is one that stalls. `whole` says what is
    missing of its answer, '' for nothing."""

    def __init__(self, number: int, url: str, request: GenerateRequest, go_on: threading.Event) -> None:
        self.missing = "no answer"
        self.began = threading.Event()
        self._url = url
        self._request = request
        self._go_on = go_on
        self._ask = self._at_ours if number % 2 else self._at_openais
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.missing = self._ask()
        except (EdgelamError, httpx.HTTPError, ValueError, KeyError) as error:
            self.missing = f"{type(error).__name__}: {error}"
        finally:
            self.began.set()

    def _pause(self) -> None:
        self.began.set()
        self._go_on.wait()

    def _at_ours(self) -> str:
        ids: list[int] = []
        with Client(self._url) as there:
            for event in there.stream("/v1/generate", self._request):
                if event["event"] == "token":
                    ids.append(event["id"])
                    if len(ids) == 1:
                        self._pause()
                elif event["event"] == "end":
                    return "" if ids == event["token_ids"] and len(ids) == self._request.max_tokens else "tokens"
        return "the end"

    def _at_openais(self) -> str:
        wanted = self._request
        body = {
            "model": wanted.model, "prompt": wanted.prompt, "temperature": 0, "max_tokens": wanted.max_tokens,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, tokens, reason = "", 0, None
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=900.0, trust_env=False) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return "" if text and (tokens == wanted.max_tokens or reason == "stop") else f"{tokens} tokens"
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return str(chunk["error"])
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
                    if choice["text"] and not self.began.is_set():
                        self._pause()
        return "the end"


def measure(precision: str, boards: int) -> list[Figure]:
    """Rows."""
    specs = [msgspec.structs.replace(board, speed=SLOWED) for board in preset("equal", boards, LINK)]
    with whole_site(precision, specs) as site:

        def make(tokens: int, number: int) -> GenerateRequest:
            return GenerateRequest(
                model=MODEL, prompt=prompt(24 + number), raw=True, max_tokens=tokens, ignore_stop=True, speculate="off",
                precision=precision, objective="throughput", context_tokens=CONTEXT_TOKENS, slots=CLIENTS + 2,
                boards_at_least=boards, boards_at_most=boards,
            )  # fmt: skip

        load.together(site.there.url, [make(64, number) for number in range(CLIENTS + 1)])
        before = [_beside(site, make, stalls=False) for _ in range(2)]
        stalled = _beside(site, make, stalls=True)
        after = _beside(site, make, stalls=False)
    return _figures(before, stalled, after)


class Beside(msgspec.Struct):
    """What one round showed."""

    rate: float
    """Tokens per second of the other client while the answers are made."""
    memory: dict[str, int]
    missing: list[str]


def _beside(site: Site, make: Callable[[int, int], GenerateRequest], stalls: bool) -> Beside:
    url, go_on = site.there.url, threading.Event()
    if not stalls:
        go_on.set()
    readers = [Reader(number, url, make(TOKENS, number), go_on) for number in range(CLIENTS)]
    rates: list[float] = []
    with Memory(site) as memory:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.began.wait(120.0)
        while _live(site) == CLIENTS:
            one = load.stream(url, make(OBSERVED_TOKENS, CLIENTS))
            if _live(site) == CLIENTS:  # they were all at work beside it
                rates.append(1 / median(one.gaps_s))
        while _live(site):
            time.sleep(0.5)
    go_on.set()
    for reader in readers:
        reader.join()
    return Beside(median(rates) if rates else float("nan"), memory.most, [reader.missing for reader in readers])


def _live(site: Site) -> int:
    """Requests that the stages work on."""
    page = httpx.get(f"{site.there.url}/metrics", trust_env=False).text
    line = next(line for line in page.splitlines() if line.startswith("edgelam_requests_live "))
    return int(float(line.split(" ")[1]))


def _figures(before: list[Beside], stalled: Beside, after: Beside) -> list[Figure]:
    name = f"{LINK}, beside {CLIENTS} clients"
    rate = (before[-1].rate + after.rate) / 2
    rows = [
        Figure(f"{name} that read", rate, "tokens/s"),
        at_least(f"{name} that stalled / that read", stalled.rate / rate, "ratio", 0.9),
        at_most("stalled: answers with something missing", sum(map(bool, stalled.missing)), "", 0),
    ]
    kinds = {"coordinator": CLIENTS * WINDOW_BYTES, "broker": OTHERS_GROW_BYTES, "worker": OTHERS_GROW_BYTES}
    for kind, limit in kinds.items():
        grown = max(
            stalled.memory[process] - max(one.memory[process] for one in before)
            for process in stalled.memory
            if process.split(" ")[0] == kind
        )
        rows.append(at_most(f"stalled: memory of a {kind} beyond that with readers", grown / 1e6, "MB", limit / 1e6))
    return rows
