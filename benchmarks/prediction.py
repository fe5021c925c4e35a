"""What the planner promises, beside what is measured: the boards and links of `edgelam demo`, real weights.

Plans of one stream and of a full pipeline, over two, three and four of the unequal boards. Every plan is made from what
the boards measured themselves to be at the start of the run; each figure is the median over its answers.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

from benchmarks.parts.sites import MODEL, ask, site
from benchmarks.report import Figure, emit, machine
from models.cache import cache_dir
from models.fetch import fetch
from testbed.boards import preset

TOLERANCE = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=4, help="answers per plan")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--precision", default="int4")
    options = parser.parse_args()
    fetch(MODEL, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    boards = preset("shelf", 4)
    figures: list[Figure] = []
    shares: dict[str, list[str]] = {}
    with site(options.precision, boards) as there:
        for objective in ("throughput", "latency"):
            for count in (2, 3, 4):
                name = f"{count} boards, {objective}"
                ask(there, count, options.precision, 4, objective)
                answers = [
                    ask(there, count, options.precision, options.tokens, objective) for _ in range(options.answers)
                ]
                figures += compared(name, answers)
                shares[name] = [f"{stage['device']}: {stage['blocks']}" for stage in answers[0]["stages"]]
    return 0 if emit("prediction", {**machine(), **vars(options), "shares": shares}, figures) else 1


def compared(name: str, answers: list[dict[str, Any]]) -> list[Figure]:
    predicted_s = median(answer["predicted_token_s"] for answer in answers)
    measured_s = median(answer["token_s"] for answer in answers)
    ratio = predicted_s / measured_s
    return [
        Figure(f"{name}: predicted", predicted_s * 1e3, "ms/token"),
        Figure(f"{name}: measured", measured_s * 1e3, "ms/token"),
        Figure(
            f"{name}: predicted / measured",
            ratio,
            "ratio",
            f"{1 - TOLERANCE:g} to {1 + TOLERANCE:g}",
            1 - TOLERANCE <= ratio <= 1 + TOLERANCE,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
