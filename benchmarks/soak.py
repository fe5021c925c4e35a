"""Minutes of everything at once: requests of all sizes, clients that leave, boards that die and come back.

Every request must end in an answer, or in a refusal with its reason. Whoever lives through it must not grow: memory,
descriptors and threads of the coordinator, of the brokers, of agents that were not killed and of what shapes the links
are sampled, and what they take in the last third is compared with the second: the first is for warming up. Afterwards
no stage may hold a slot for a request that is over.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
from msgspec import Struct

from benchmarks.parts import load
from benchmarks.parts.prompts import WORDS
from benchmarks.parts.sites import MODEL, Site, whole_site
from benchmarks.report import Figure, at_most, emit, machine
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from models.cache import cache_dir
from models.fetch import fetch
from testbed.boards import preset
from wire.errors import EdgelamError, Refused

SAMPLE_PERIOD_S = 5.0
LOSS_PERIOD_S = (15.0, 35.0)
AWAY_S = 6.0
VICTIM = "board4"
"""The board that is killed; the others lose workers, and are stopped for a while, but their agents live."""


class Sample(Struct):
    resident_mb: float
    descriptors: int
    threads: int


class Clients:
    """Ask without a pause until told to stop; `ends` counts how requests ended."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []
        self.tokens = 0
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(f"{seed}/{n}"),)) for n in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120.0)
        if any(thread.is_alive() for thread in self._threads):
            self.ends["never ended"] += sum(thread.is_alive() for thread in self._threads)

    def _run(self, chance: random.Random) -> None:
        while not self._stop.is_set():
            words = chance.randrange(1, 200)
            request = GenerateRequest(
                model=MODEL,
                prompt=" ".join(WORDS[:words]),
                raw=True,
                max_tokens=chance.randrange(1, 80),
                temperature=chance.choice([0.0, 0.8]),
                seed=chance.randrange(1 << 30),
                ignore_stop=True,
                context_tokens=512,
                objective="throughput",
                boards_at_least=2,
            )
            leaves_after = chance.randrange(1, 40) if chance.random() < 0.2 else None
            try:
                self.ends[self._ask(request, leaves_after)] += 1
            except Refused as error:
                self.ends["refused"] += 1
                self.failures.append(error.message)
                time.sleep(0.5)
            except EdgelamError as error:
                self.ends["failed with a reason" if error.message else "failed without a reason"] += 1
                self.failures.append(error.message)
                time.sleep(0.5)

    def _ask(self, request: GenerateRequest, leaves_after: int | None) -> str:
        given = 0
        paused = False
        with Client(self._url) as there:
            for event in there.stream("/v1/generate", request):
                kind = event.get("event")
                paused = paused or kind == "pause"
                if kind == "token":
                    given += 1
                    self.tokens += 1
                    if given == leaves_after:
                        return "left by its client"
                elif kind == "end":
                    if len(event["token_ids"]) != request.max_tokens:
                        return "ended short"
                    return "answered after a pause" if paused else "answered"
        return "ended without an end"


class Census:
    """Samples the processes that should live through it."""

    def __init__(self, folder: Path, coordinator: int) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self._processes = {"coordinator": psutil.Process(coordinator)}
        ours = psutil.Process().children(recursive=True)
        for process in ours:
            with contextlib.suppress(psutil.Error):
                name = self._name(process.cmdline(), folder)
                if name:
                    self._processes[name] = process

    @staticmethod
    def _name(words: list[str], folder: Path) -> str:
        text = " ".join(words)
        if "testbed.keeper" in words:
            return "links"
        if str(folder) not in text or VICTIM in text:
            return ""
        if "mosquitto" in words[0]:
            board = re.search(r"/(board\d+)/", text)
            return f"broker of {board[1]}" if board else "broker"
        if "agent" in words:
            return f"agent of {words[words.index('--name') + 1]}"
        return ""

    def take(self) -> None:
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                with process.oneshot():
                    sample = Sample(process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
                self.samples.setdefault(name, []).append(sample)

    def growth(self, name: str) -> Sample:
        """Median of the last third less that of the second."""
        found = self.samples[name]
        third = len(found) // 3
        second, last = found[third : 2 * third], found[2 * third :]

        def change(figure: str) -> float:
            return float(median(getattr(one, figure) for one in last) - median(getattr(one, figure) for one in second))

        return Sample(change("resident_mb"), int(change("descriptors")), int(change("threads")))


def losses(running: Site, until_s: float, chance: random.Random) -> Iterator[str]:
    """Lose something now and then; gives what."""
    boards = running.boards
    while time.monotonic() < until_s - 2 * AWAY_S:
        time.sleep(min(chance.uniform(*LOSS_PERIOD_S), max(0.0, until_s - 2 * AWAY_S - time.monotonic())))
        what = chance.choice(["board killed", "board stopped", "worker killed", "worker stopped"])
        other = f"board{chance.randrange(1, 4)}"
        if what == "board killed":
            boards.kill(VICTIM)
            time.sleep(AWAY_S)
            boards.start(VICTIM)
        elif what == "board stopped":
            boards.pause(other)
            time.sleep(AWAY_S)
            boards.unpause(other)
        else:
            number = signal.SIGKILL if what == "worker killed" else signal.SIGSTOP
            found = workers(running.folder)
            if not found:
                continue
            with contextlib.suppress(psutil.Error):
                chance.choice(found).send_signal(number)
        yield what


def workers(folder: Path) -> list[psutil.Process]:
    """Inference workers of the testbed in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if "agent.workers.inference" in process.cmdline() and parent and str(folder) in " ".join(parent.cmdline()):
                found.append(process)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    fetch(MODEL, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    lost: Counter[str] = Counter()
    with whole_site("int4", list(preset("equal", 4, "ethernet"))) as running:
        clients = Clients(running.there.url, options.clients, options.seed)
        census = Census(running.folder, running.there.get("/v1/status")["pid"])
        until_s = time.monotonic() + 60.0 * options.minutes
        clients.start()
        done = threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_PERIOD_S):
                census.take()

        sampler = threading.Thread(target=sample)
        sampler.start()
        for what in losses(running, until_s, random.Random(options.seed)):
            lost[what] += 1
            print(f"... {what}; {dict(clients.ends)}", file=sys.stderr)
        clients.stop()
        done.set()
        sampler.join()
        held = sum(int(stage["live"]) for stage in load.settled_counters(running.there.url).values())
    resident = [round(sample.resident_mb, 1) for sample in census.samples["coordinator"]]
    conditions = {**machine(), **vars(options), **report(clients, lost), "coordinator_mb": resident}
    return 0 if emit("soak", conditions, figures(clients, census, held)) else 1


def report(clients: Clients, lost: Counter[str]) -> dict[str, object]:
    return {"ends": dict(clients.ends), "lost": dict(lost), "reasons": dict(Counter(clients.failures).most_common(12))}


def figures(clients: Clients, census: Census, held: int) -> list[Figure]:
    bad = ("ended short", "ended without an end", "failed without a reason", "never ended")
    rows = [
        Figure("requests", sum(clients.ends.values()), ""),
        Figure("answered", clients.ends["answered"] + clients.ends["answered after a pause"], ""),
        Figure("answered after a pause", clients.ends["answered after a pause"], ""),
        Figure(
            "refused or failed, with the reason", clients.ends["refused"] + clients.ends["failed with a reason"], ""
        ),
        at_most("neither answered nor told why", sum(clients.ends[end] for end in bad), "", 0),
        Figure("tokens", clients.tokens, ""),
        at_most("slots that are held afterwards", held, "", 0),
    ]
    for name in sorted(census.samples):
        grown = census.growth(name)
        rows += [
            at_most(f"{name}: memory grows by", grown.resident_mb, "MB", 5.0),
            at_most(f"{name}: descriptors grow by", grown.descriptors, "", 4),
            at_most(f"{name}: threads grow by", grown.threads, "", 3),
        ]
    return rows


if __name__ == "__main__":
    sys.exit(main())
