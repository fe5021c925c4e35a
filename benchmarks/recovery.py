"""What a loss costs: a stage's worker is killed in the middle of an answer, and the answer goes on.

The model is cut over boards of equal speed, links not shaped. After so many tokens one worker is killed (kill -9), each
time another; its agent starts it again. Plain recovery runs prompt and given tokens as one prompt; exact recovery runs
the given ones row by row. Both wait for the same start of a worker, so their difference is the price of exactness.
Every exact answer is compared with an undisturbed one. Each answer has a deployment of its own: in one and the same, a
worker that dies twice rests before it is started again.

Then a whole board is killed, with and without second copies of the stages (benchmarks.replicas).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil

from benchmarks.parts.sites import CONTEXT_TOKENS, MODEL, PROMPT, struck, whole_site
from benchmarks.replicas import compare
from benchmarks.report import Figure, at_least, at_most, emit, machine
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from models.cache import cache_dir
from models.fetch import fetch
from testbed import commands
from testbed.boards import preset

MORE_TOKENS = 8
"""Given after the loss."""

COPY_PAUSE_S = 2.0
"""Most that the pause may take where nothing needs to be fetched or loaded."""


class Boards:
    """The boards of a testbed, and their workers."""

    def __init__(self, testbed: commands.Testbed) -> None:
        self._testbed = testbed
        self._killed = 0

    def kill_a_worker(self) -> None:
        workers = [
            child
            for board in self._testbed.status().boards
            for child in psutil.Process(board.pid).children(recursive=True)
            if "agent.workers.inference" in " ".join(child.cmdline())
        ]
        workers[self._killed % len(workers)].kill()
        self._killed += 1


def ask(
    there: Client,
    boards: int,
    tokens: int,
    kill: Callable[[], None] = lambda: None,
    after: int = -1,
    exact: bool = False,
) -> dict[str, Any]:
    request = GenerateRequest(
        model=MODEL, prompt=PROMPT, max_tokens=tokens, ignore_stop=True, context_tokens=CONTEXT_TOKENS,
        boards_at_least=boards, boards_at_most=boards, exact=exact, objective="throughput",
    )  # fmt: skip
    return struck(there, request, after, kill)


def measure(options: argparse.Namespace) -> tuple[dict[tuple[int, bool], list[dict[str, float]]], float]:
    """Pauses by (tokens given, exact), and the share of exact answers that were the undisturbed one."""
    pauses: dict[tuple[int, bool], list[dict[str, float]]] = {}
    same: list[bool] = []
    with whole_site("int4", list(preset("equal", options.boards))) as site:
        there, boards = site.there, Boards(site.boards)
        most = max(options.given) + MORE_TOKENS
        undisturbed = ask(there, options.boards, most)["token_ids"]
        for _ in range(options.rounds):
            for given in options.given:
                for exact in (False, True):
                    end = ask(there, options.boards, given + MORE_TOKENS, boards.kill_a_worker, given, exact)
                    pauses.setdefault((given, exact), []).extend(end["pauses"])
                    if exact:
                        same.append(end["token_ids"] == undisturbed[: given + MORE_TOKENS])
                    there.delete(f"/v1/deployments/{end['deployment']}")
    return pauses, sum(same) / len(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--given", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--replica-rounds", type=int, default=3, help="killed boards, with and without copies; 0: none")
    parser.add_argument("--replica-link", default="wifi", help="a preset of testbed.links")
    options = parser.parse_args()
    fetch(MODEL, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    found, same = measure(options)
    figures = [at_least("exact answers that are the undisturbed one", same, "share", 1.0)]
    for (given, exact), pauses in found.items():
        how = "exact" if exact else "plain"
        figures.append(Figure(f"pause after {given} tokens, {how}", median(pause["pause_s"] for pause in pauses), "s"))
    for given in options.given:
        plain, exactly = (median(pause["pause_s"] for pause in found[given, exact]) for exact in (False, True))
        figures.append(Figure(f"price of exactness after {given} tokens", exactly - plain, "s"))
    everything = [pause for pauses in found.values() for pause in pauses]
    figures.append(at_most("detection", median(pause["detection_s"] for pause in everything), "s", 0.5))
    with_copies: dict[str, Any] = {}
    if options.replica_rounds:
        more, with_copies = compare(options.replica_rounds, options.replica_link, COPY_PAUSE_S)
        figures += more
    raw = {f"{given} {'exact' if exact else 'plain'}": pauses for (given, exact), pauses in found.items()}
    return 0 if emit("recovery", {**machine(), **vars(options), "pauses": raw, "copies": with_copies}, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
