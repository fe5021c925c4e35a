"""What a second copy of each stage saves, and what it costs while it waits: part of the benchmark of recovery.

Three equal boards on slow links, the model over two of them; the third has fetched nothing yet. In the middle of an
answer the board of the second stage is killed, agent and workers. Without copies the third board has to fetch the
weights before the answer goes on; with `replicas` 2 it has them loaded. Each trial has a site of its own, so that no
cache holds anything.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import psutil

from benchmarks.parts.sites import CONTEXT_TOKENS, MODEL, PROMPT, Site, struck, whole_site
from benchmarks.report import Figure, at_most
from coordinator.inference.requests import GenerateRequest
from testbed.boards import preset
from testbed.site import until

BOARDS = 2
GIVEN = 32
"""Tokens before the loss."""
MORE_TOKENS = 8
IDLE_S = 10.0
RECOVERY_TIMEOUT_S = 300.0


class Trial(NamedTuple):
    pause_s: float
    fetched_bytes: int
    """From the loss until the answer was over."""
    idle_share: float | None
    """Of a processor, used by a copy that waits; None without copies."""
    resident_bytes: float | None


def compare(rounds: int, link: str, limit_s: float) -> tuple[list[Figure], dict[str, Any]]:
    """Figures, and each trial."""
    trials = {replicas: [trial(replicas, link) for _ in range(rounds)] for replicas in (1, 2)}
    figures = []
    for replicas, found in trials.items():
        how = "no copies" if replicas == 1 else "2 copies of each stage"
        pause = median(one.pause_s for one in found)
        name = f"board killed, {link}, {how}: pause"
        figures.append(at_most(name, pause, "s", limit_s) if replicas > 1 else Figure(name, pause, "s"))
        fetched = max(one.fetched_bytes for one in found) / 1e6
        name = f"board killed, {link}, {how}: fetched after the loss"
        figures.append(at_most(name, fetched, "MB", 0.0) if replicas > 1 else Figure(name, fetched, "MB"))
    shares = [one.idle_share for one in trials[2] if one.idle_share is not None]
    held = [one.resident_bytes for one in trials[2] if one.resident_bytes is not None]
    figures.append(at_most("processor used by a copy that waits", median(shares), "cores", 0.05))
    figures.append(Figure("memory of a copy that waits, most", max(held) / 1e6, "MB"))
    return figures, {str(replicas): [one._asdict() for one in found] for replicas, found in trials.items()}


def trial(replicas: int, link: str) -> Trial:
    with whole_site("int4", list(preset("equal", BOARDS + 1, link))) as site:
        answer(site, replicas, 1)
        idle_share = resident_bytes = None
        if replicas > 1:
            await_copies(site)
            idle_share, resident_bytes = while_idle(site)
        fetched: list[int] = []

        def kill() -> None:
            stages = site.there.get("/v1/status")["deployments"][0]["plan"]["stages"]
            fetched.append(fetched_bytes(site))
            site.boards.kill(stages[1]["device"])

        end = answer(site, replicas, GIVEN + MORE_TOKENS, kill)
        [pause] = end["pauses"]
        return Trial(pause["pause_s"], fetched_bytes(site) - fetched[0], idle_share, resident_bytes)


def answer(site: Site, replicas: int, tokens: int, kill: Callable[[], None] = lambda: None) -> dict[str, Any]:
    request = GenerateRequest(
        model=MODEL, prompt=PROMPT, max_tokens=tokens, ignore_stop=True, context_tokens=CONTEXT_TOKENS, slots=1,
        boards_at_least=BOARDS, boards_at_most=BOARDS, objective="throughput", replicas=replicas,
        recovery_timeout_s=RECOVERY_TIMEOUT_S,
    )  # fmt: skip
    return struck(site.there, request, GIVEN, kill)


def await_copies(site: Site) -> None:
    def loaded() -> bool:
        rows = site.there.get("/v1/status")["deployments"][0]["standbys"]
        return len(rows) == BOARDS and all(row["phase"] == "ready" for row in rows)

    until(loaded, RECOVERY_TIMEOUT_S, "all copies loaded")


def while_idle(site: Site) -> tuple[float, float]:
    """The most that a worker of a copy uses of a processor while nothing is asked for, and the most memory."""
    deployment = site.there.get("/v1/status")["deployments"][0]
    spare = {row["device"] for row in deployment["standbys"]} - {s["device"] for s in deployment["plan"]["stages"]}
    pids = {board.name: board.pid for board in site.boards.status().boards}
    workers = [
        child
        for name in spare
        for child in psutil.Process(pids[name]).children(recursive=True)
        if "agent.workers.inference" in " ".join(child.cmdline())
    ]
    before = [_processor_s(worker) for worker in workers]
    time.sleep(IDLE_S)
    shares = [(_processor_s(worker) - used) / IDLE_S for worker, used in zip(workers, before, strict=True)]
    return max(shares), max(float(worker.memory_info().rss) for worker in workers)


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def fetched_bytes(site: Site) -> int:
    with urllib.request.urlopen(f"{site.there.url}/metrics") as page:
        found = re.search(r"^edgelam_artifact_bytes_total (\S+)$", page.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))
