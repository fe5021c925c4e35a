"""What planning costs, against the number of boards and blocks: boards that are made up, and nothing is run on them.

    python -m benchmarks.parts.scale

`figures()` is for a benchmark that shows these among others. Times are those of a whole plan as a user gets it, for as
many requests at once as go well, with its reasons: seconds of the processor, the least of a few runs, so that what else
the machine does is not in them. Peak memory is what planning allocates beyond what is there before, counted in a run of
its own, as counting takes time.
"""

from __future__ import annotations

import argparse
import random
import re
import time
import tracemalloc
from typing import Final, NamedTuple

from benchmarks.report import Figure, at_most, emit, machine
from coordinator.planning.best import planned
from coordinator.planning.plan import Objective, Plan
from coordinator.planning.planner import Candidate
from models.graph import Graph
from tests.planning import boards as made

MOST_S: Final = {(8, 32): 1.0, (64, 80): 2.0}
"""(boards, blocks) -> seconds that a plan may take."""


class Size(NamedTuple):
    boards: int
    blocks: int
    tight: bool
    """Memory so small that the model must be cut; else each board holds all of it."""


SIZES: Final = (
    Size(2, 32, False),
    Size(8, 32, False),
    Size(8, 32, True),
    Size(8, 80, True),
    Size(24, 80, True),
    Size(64, 80, False),
    Size(64, 80, True),
)

OBJECTIVES: Final[tuple[Objective, ...]] = ("latency", "throughput")


def fleet(size: Size, seed: int = 1) -> list[Candidate]:
    """Boards up to five times slower than the fastest, on links from 20 Mbit/s to 1 Gbit/s."""
    draw = random.Random(seed)
    least, most = (160, 220) if size.tight else (4_000, 4_001)
    return [
        made.board(
            f"board-{number:02}",
            draw.uniform(1, 5),
            int(draw.uniform(least, most)) * made.MB,
            link_to_broker=made.link(draw.uniform(0.2e-3, 5e-3), draw.choice([20e6, 100e6, 1e9]) / 8),
        )
        for number in range(size.boards)
    ]


def plan_of(graph: Graph, candidates: list[Candidate], objective: Objective) -> Plan:
    return planned(graph, candidates, made.request(objective=objective), None, made.address)


def gap_percent(plan: Plan) -> float:
    """How far above the best the plan can be at most, as it says itself; 0 where the search was exact."""
    found = re.search(r"at most (\d+)% above a bound", plan.because)
    return float(found[1]) if found else 0.0


def figures(sizes: tuple[Size, ...] = SIZES, repeats: int = 3) -> list[Figure]:
    """Seconds, peak memory and gap of one plan of each size and objective."""
    found: list[Figure] = []
    for size in sizes:
        graph, candidates = made.graph(size.blocks), fleet(size)
        for objective in OBJECTIVES:
            room = "little memory" if size.tight else "much memory"
            name = f"{size.boards} boards, {size.blocks} blocks, {room}, {objective}"
            taken_s = []
            for _ in range(repeats):
                started_s = time.process_time()
                plan = plan_of(graph, candidates, objective)
                taken_s.append(time.process_time() - started_s)
            most_s = MOST_S.get((size.boards, size.blocks))
            label = f"{name}: one plan"
            found.append(at_most(label, min(taken_s), "s", most_s) if most_s else Figure(label, min(taken_s), "s"))
            tracemalloc.start()
            try:
                plan_of(graph, candidates, objective)
                found.append(Figure(f"{name}: peak memory", tracemalloc.get_traced_memory()[1] / 1e6, "MB"))
            finally:
                tracemalloc.stop()
            found.append(Figure(f"{name}: above the best, at most", gap_percent(plan), "%"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="plans of each size; the swiftest counts")
    options = parser.parse_args()
    return 0 if emit("scale", {**machine(), **vars(options)}, figures(repeats=options.repeats)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
