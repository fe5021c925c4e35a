"""The planner in figures, by parts.

    prediction   deployments at random: what was predicted beside what was measured (5 minutes for each 8, per model)
    choice       the chosen plan beside all others in its order, and two splits without a planner (6 minutes a round)
    change       a board becomes four times as slow while answers run, or its link ten times (2 minutes each a round)
    scale        what planning itself takes, against boards and blocks (boards that are made up)

Virtual boards on this machine, real weights, links shaped. Each part's module (benchmarks/parts) says what it does and
what its targets are. `--seed` draws others.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from benchmarks.parts import changed, chosen, predicted, scale
from benchmarks.report import Figure, emit, machine
from models.cache import cache_dir
from models.fetch import fetch

PARTS = ("prediction", "choice", "change", "scale")
MODELS = ("smollm2", "minilm", "vit")
"""With which predictions are made."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--deployments", type=int, default=30, help="prediction: how many, per model")
    parser.add_argument("--rounds", type=int, default=1, help="choice, change: how often each is measured")
    parser.add_argument("--kinds", nargs="*", default=changed.KINDS, choices=changed.KINDS, help="change: of what")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--precision", default="int4")
    options = parser.parse_args()
    for model in options.models if options.parts != ["scale"] else ():
        fetch(model, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    figures: list[Figure] = []
    conditions: dict[str, object] = {**machine(), **vars(options)}
    if "prediction" in options.parts:
        cases = []
        print(predicted.heading(), flush=True)
        for model in options.models:
            for case in predicted.measure(options.seed, options.deployments, options.precision, model):
                cases.append(case)
                print(predicted.line(case), flush=True)
        figures += predicted.figures(cases)
        conditions["cases"] = msgspec.to_builtins(cases)
    if "choice" in options.parts:
        rows, conditions["plans"] = chosen.measure(options.precision, options.rounds, options.seed)
        figures += rows
    if "change" in options.parts:
        trials = [changed.trial(options.precision, what) for what in options.kinds for _ in range(options.rounds)]
        figures += changed.figures(trials)
        conditions["trials"] = [one._asdict() for one in trials]
    if "scale" in options.parts:
        figures += scale.figures()
    return 0 if emit("planning", conditions, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
