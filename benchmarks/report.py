"""What every benchmark prints: a table for people, and one JSON document on the last line of stdout for machines.

    {"benchmark": "transport", "conditions": {...}, "figures": [{"name", "value", "unit", "target", "holds"}, ...]}

`target` is '' and `holds` null where nothing was promised.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from benchmarks.quiet import Watch
from wire.version import VERSION

_WATCH: Final = Watch()


class Figure(NamedTuple):
    """One measured number. `target` in words ('at most 5'), `holds` whether the number keeps it."""

    name: str
    value: float
    unit: str
    target: str = ""
    holds: bool | None = None


def at_most(name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(name, value, unit, f"at most {limit:g}", value <= limit)


def at_least(name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(name, value, unit, f"at least {limit:g}", value >= limit)


def machine() -> dict[str, object]:
    """Conditions that every report states."""
    return {
        "edgelam": VERSION,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def emit(
    benchmark: str, conditions: Mapping[str, object], figures: Sequence[Figure], shown: Sequence[Figure] = ()
) -> bool:
    """Print the report; give whether every target holds. `shown` are in the document only: a table of another form
    has shown them. `lost_share`, the part of this machine that its host gave to others since the benchmark began, is
    among its conditions."""
    conditions = {**conditions, "lost_share": round(_WATCH.lost_share(), 4)}
    rows = [("figure", "value", "unit", "target", "holds")]
    rows += [
        (
            figure.name,
            f"{figure.value:.4g}",
            figure.unit,
            figure.target,
            {None: "", True: "yes", False: "NO"}[figure.holds],
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    for name, value in conditions.items():
        print(f"{name}: {value}")
    document = {
        "benchmark": benchmark,
        "conditions": dict(conditions),
        "figures": [figure._asdict() for figure in (*figures, *shown)],
    }
    print(json.dumps(document), flush=True)
    return all(figure.holds is not False for figure in (*figures, *shown))
