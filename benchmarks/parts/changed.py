"""A board, or its link, becomes slow while answers run: is it noticed, planned anew, and are answers faster then?

    board    three equal boards over all of which the model is cut, as many streams; the board with the most blocks is
             throttled to a quarter of its speed
    link     a model cut over three of four equal boards, one stream; the link of the last board becomes ten times as
             slow, in rate and delay

Answers have no end. Counted are tokens per second before, while nothing has changed yet, and after the move, which is
due within 30 s; and how often what runs has moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from statistics import median
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple

from benchmarks.parts.prompts import prompt
from benchmarks.parts.sites import MODEL, Site, whole_site
from benchmarks.report import Figure, at_least, at_most
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from testbed.boards import BoardSpec
from testbed.links import LinkSpec
from testbed.site import until
from wire.errors import EdgelamError

BOARDS: Final = tuple(BoardSpec(name=f"board{number}", speed=0.3) for number in (1, 2, 3))
LINK: Final = LinkSpec(rate_bytes_per_s=100e6 / 8, delay_s=0.002)
SLOWER: Final = LinkSpec(rate_bytes_per_s=10e6 / 8, delay_s=0.020)
LINKED: Final = tuple(BoardSpec(name=f"board{number}", speed=0.3, link=LINK) for number in (1, 2, 3, 4))
SHARE: Final = 0.25
STEADY_S: Final = 15.0
"""Before anything is changed: the boards show what they can do."""

What = Literal["board", "link"]
KINDS: Final[tuple[What, ...]] = ("board", "link")
NOTICES: Final[Mapping[What, str]] = {"board": "device-slow", "link": "link-slow"}

WITHIN_S: Final = 30.0
AFTER_S: Final = 20.0
PATIENCE_S: Final = 120.0


class Streams:
    """So many answers at once, one after the other, as long as this is open; `times` is when each token came."""

    def __init__(self, url: str, request: GenerateRequest, count: int) -> None:
        self._url = url
        self._request = request
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        self.times: list[float] = []
        self.failed: list[EdgelamError] = []

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.failed:
            raise self.failed[0]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with Client(self._url) as there:
                    for event in there.stream("/v1/generate", self._request):
                        if event["event"] == "token":
                            self.times.append(time.monotonic())
        except EdgelamError as error:
            self.failed.append(error)

    def rate(self, began_s: float, until_s: float) -> float:
        """Tokens per second."""
        return sum(began_s <= at_s < until_s for at_s in self.times) / (until_s - began_s)


class Trial(NamedTuple):
    what: What
    before: float
    slowed: float
    after: float
    noticed_s: float
    moved_s: float
    moves: int


def said(site: Site, code: str) -> int:
    notices: list[dict[str, Any]] = site.there.get("/v1/notices")["notices"]
    return sum(notice["code"] == code for notice in notices)


def trial(precision: str, what: What) -> Trial:
    streams_at_once = len(BOARDS) if what == "board" else 1
    request = GenerateRequest(
        model=MODEL, prompt=prompt(32), raw=True, max_tokens=200, ignore_stop=True, precision=precision,
        objective="throughput" if what == "board" else "latency", context_tokens=256, slots=streams_at_once,
        boards_at_least=len(BOARDS), boards_at_most=len(BOARDS), speculate="off",
    )  # fmt: skip
    shelf = BOARDS if what == "board" else LINKED
    with whole_site(precision, shelf) as site, Streams(site.there.url, request, streams_at_once) as streams:
        until(lambda: len(streams.times) > 100, PATIENCE_S, "tokens")
        time.sleep(STEADY_S)
        [deployment] = site.there.get("/v1/status")["deployments"]
        stages = deployment["plan"]["stages"]
        moves = said(site, "deployment-moved")
        changed_s = time.monotonic()
        if what == "board":
            site.boards.slow(max(stages, key=lambda stage: stage["end_block"] - stage["first_block"])["device"], SHARE)
        else:
            site.boards.set_link(stages[-1]["device"], SLOWER)
        until(lambda: said(site, NOTICES[what]) > 0, WITHIN_S, "it is noticed")
        noticed_s = time.monotonic()
        until(lambda: said(site, "deployment-moved") > moves, WITHIN_S, "it moves")
        moved_s = time.monotonic()
        time.sleep(AFTER_S)
        return Trial(
            what=what,
            before=streams.rate(changed_s - 10, changed_s),
            slowed=streams.rate(changed_s + 1, noticed_s),
            after=streams.rate(max(moved_s + 4, changed_s + 10), time.monotonic()),
            noticed_s=noticed_s - changed_s,
            moved_s=moved_s - changed_s,
            moves=said(site, "deployment-moved") - moves,
        )


def figures(trials: list[Trial]) -> list[Figure]:
    """Of each kind medians, and the worst of what must never be worse."""
    rows = []
    for what in dict.fromkeys(one.what for one in trials):
        these = [one for one in trials if one.what == what]
        rows += [
            Figure(f"{what}: before", median(one.before for one in these), "tokens/s"),
            Figure(f"{what}: slowed, nothing changed yet", median(one.slowed for one in these), "tokens/s"),
            Figure(f"{what}: after the move", median(one.after for one in these), "tokens/s"),
            at_most(f"{what}: noticed after, at most", max(one.noticed_s for one in these), "s", WITHIN_S),
            at_most(f"{what}: moved after, at most", max(one.moved_s for one in these), "s", WITHIN_S),
            at_most(f"{what}: moves per change, at most", max(one.moves for one in these), "", 1),
            at_least(f"{what}: after / slowed, at least", min(one.after / one.slowed for one in these), "ratio", 1.1),
        ]
    return rows
