"""What processes that train take at their peak beside what was foretold (benchmarks/parts/peak)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final, NamedTuple

from benchmarks.report import Figure, at_most

PEAKS: Final = (
    "int4 1 64 8 q,v keep",
    "int4 4 128 8 q,v keep",
    "int4 1 32 64 q,v,o,down keep",
    "int4 4 128 8 q,k,v,o,gate,up,down again",
    "int8 2 64 8 q,v again",
    "f32 2 64 8 q,v again",
    "encoder 16 32 8 q,v keep",
    "encoder 32 128 8 q,k,v,o,up,down keep",
    "encoder 32 128 8 q,v again",
    "encoder 16 64 8 blocks keep",
    "int4 4 64 8 q,v keep ends",
    "int4 2 64 8 q,v keep trunk",
    "int4 4 64 8 q,v again trunk",
    "encoder 16 128 8 q,v keep ends",
    "encoder 16 64 8 q,v keep trunk",
    "encoder 16 64 8 blocks keep trunk",
    "int4 4 64 8 last:q,v keep",
    "encoder 16 64 8 last:q,v keep",
    "int4 2 64 8 last:q,v keep trunk",
    "int4 4 64 8 last:q,v again trunk",
    "encoder 16 64 8 last:q,v keep trunk",
    "int4 4 64 8 last:down keep ends lowrank",
    "int4 4 64 8 last:down keep trunk lowrank",
    "encoder 2 48 8 blocks keep hub",
    "encoder 16 64 8 blocks keep hub",
    "encoder 16 128 8 blocks keep hub",
    "encoder 2 48 8 blocks keep shard",
    "encoder 16 64 8 blocks keep shard",
    "encoder 16 128 8 blocks keep shard",
)
"""benchmarks.parts.peak."""
WAYS: Final = ("keep", "again")
"""What ends those of whole models."""


class Peak(NamedTuple):
    """In bytes."""

    foretold: int
    measured: int


def peak_of(words: str) -> Peak:
    """Of a process that does what these words say (benchmarks/parts/peak)."""
    command = [sys.executable, "-m", "benchmarks.parts.peak", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = Peak(**json.loads(done.stdout.splitlines()[-1]))
    print(f"... {words}: {found}", file=sys.stderr)
    return found


def measure() -> list[Figure]:
    figures = []
    for words in PEAKS:
        found = peak_of(words)
        figures.append(Figure(f"{words}: peak", found.measured / 1e6, "MB"))
        off = 100 * abs(found.foretold / found.measured - 1)
        figures.append(at_most(f"{words}: foretold is off by", off, "%", 15))
    whole = [figure.value for words, figure in zip(PEAKS, figures[::2], strict=True) if words.split()[-1] in WAYS]
    figures.append(at_most("smallest of whole models", min(whole), "MB", 700))
    return figures
