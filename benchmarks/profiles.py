"""What measuring is worth and costs: a plain board on this machine, measured twice; and our harness beside another.

- Repeatability: ratio of the second measuring to the first, for each module (median over its steps), memory and disk.
- Duration and cost: seconds from the kit to the profile, seconds of processor, bytes fetched and published.
- Our harness beside MLPerf's (mlcommons-loadgen, SingleStream): the same decode step of six blocks, taken by turns.
  loadgen is not among our dependencies and never on a board; where it can't be imported, that is said and left out:
      pip install --no-deps --target DIR mlcommons-loadgen;  PYTHONPATH=DIR make bench AREA=profiles
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.parts.loadgen import Compared, compare_with_loadgen
from benchmarks.report import Figure, at_most, emit, machine
from coordinator.calls import MeasureRequest
from coordinator.client import Client
from hwprofiles import ceilings, stats
from hwprofiles.profile import Profile, encode
from hwprofiles.samples import Ceilings, Course, DiskMeasurement, Samples
from testbed.site import CoordinatorProcess, until

BOARD = "plain"
MODEL = "smollm2"
PRECISION = "int4"
MOST_S = 35.0
"""20 to 30 s were promised for modules and link, and 5 more for the rest."""
MOST_OFF = 1.25
"""Between two measurings of the same module on a machine that does other things too."""
LOADGEN_OFF = 1.05
QUIET_SHARE = 0.1
"""Of the processor, for others: with more, two runs one after the other are of two machines."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loadgen-only", action="store_true", help="leave the board out")
    parser.add_argument("--rounds", type=int, default=12, help="turns of ours and loadgen's")
    options = parser.parse_args()
    figures: list[Figure] = []
    conditions: dict[str, Any] = {**machine(), **vars(options)}
    if not options.loadgen_only:
        figures += board_figures(conditions)
    figures += loadgen_figures(options.rounds, conditions)
    return 0 if emit("profiles", conditions, figures) else 1


def board_figures(conditions: dict[str, Any]) -> list[Figure]:
    """Two measurings of one board."""
    with plain_board() as (there, agent, cache):
        first, first_s, first_cpu_s = measured(there, agent, again=False)
        fetched = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        second, second_s, second_cpu_s = measured(there, agent, again=True)
    conditions["load_before"] = [first.conditions.load_before, second.conditions.load_before]
    shares = [found.course.processor_share if isinstance(found.course, Course) else None for found in (first, second)]
    conditions["others"] = shares
    quiet = all(share is not None and share <= QUIET_SHARE for share in shares)
    figures = repeated(first, second)
    return [
        *(figures if quiet else [figure._replace(holds=None) for figure in figures]),
        at_most("from the kit to the profile", first_s, "s", MOST_S),
        Figure("measured again", second_s, "s"),
        Figure("of it, modules", sum(module.took_s for module in first.modules), "s"),
        Figure("processor, first", first_cpu_s, "s"),
        Figure("processor, again", second_cpu_s, "s"),
        Figure("graphs fetched", fetched / 1e3, "KB"),
        at_most("profile published", len(encode(first)) / 1024, "KB", 200.0),
        Figure("written to the disk and read back", disk_mb(first), "MB"),
    ]


def disk_mb(found: Profile) -> float:
    disk = found.disk
    return len(disk.write.samples_s) * disk.chunk_bytes / 2**20 if isinstance(disk, DiskMeasurement) else 0.0


def repeated(first: Profile, second: Profile) -> list[Figure]:
    """Second over first."""
    figures = []
    others = {module.key: module for module in second.modules}
    for module in first.modules:
        again = {step_of(timing): timing.samples for timing in others[module.key].timings}
        ratios = [ratio(again[step_of(timing)], timing.samples) for timing in module.timings]
        figures.append(within(f"{module.key}, median of {len(ratios)} steps", median(ratios), MOST_OFF))
        figures.append(Figure(f"{module.key}, the step that differs most", max(ratios, key=lambda r: abs(r - 1)), "x"))
    if isinstance(first.ceilings, Ceilings) and isinstance(second.ceilings, Ceilings):
        pairs = zip(
            (*first.ceilings.memory, *first.ceilings.products),
            (*second.ceilings.memory, *second.ceilings.products),
            strict=True,
        )
        figures += [Figure(f"ceiling {one.what}", ratio(two.samples, one.samples), "x") for one, two in pairs]
        read = ceilings.reading(first.ceilings)
        figures += [Figure("memory, best pass", read / 1e9 if read else 0.0, "GB/s")]
        for module in first.modules:
            figures += [
                Figure(f"{one.key}, decode of the rate of memory", one.memory_share, "share")
                for one in ceilings.achieved(module, first.ceilings)
                if one.phase == "decode" and one.memory_share is not None
            ]
    return figures


def step_of(timing: Any) -> tuple[Any, ...]:
    return timing.phase, timing.tokens, timing.context, timing.stack


def ratio(two: Samples, one: Samples) -> float:
    return stats.median(two.samples_s) / stats.median(one.samples_s)


def within(name: str, value: float, most: float) -> Figure:
    return Figure(name, value, "x", f"{1 / most:.2f} to {most:.2f}", 1 / most <= value <= most)


@contextlib.contextmanager
def plain_board() -> Iterator[tuple[Client, subprocess.Popen[bytes], Path]]:
    """A coordinator, and an agent without any emulation."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-", dir=Path.home()) as folder:
        state = Path(folder)
        site = f"bench-{os.getpid()}"
        coordinator = CoordinatorProcess(state, site, ["--precision", PRECISION])
        address = coordinator.start()
        agent = subprocess.Popen(
            [
                sys.executable, "-m", "agent", "run", "--site", site, "--name", BOARD, "--broker", address["mqtt_url"],
                "--state-dir", str(state / "board"), "--cache-dir", str(state / "cache"), "--log-level", "warning",
            ]
        )  # fmt: skip
        try:
            with Client(address["http_url"]) as there:
                until(lambda: online(there), 60.0, "the board online")
                yield there, agent, state / "cache"
        finally:
            agent.terminate()
            agent.wait(20)
            coordinator.stop()


def online(there: Client) -> bool:
    return [device["state"] for device in there.get("/v1/devices")["devices"]] == ["online"]


def measured(there: Client, agent: subprocess.Popen[bytes], again: bool) -> tuple[Profile, float, float]:
    """The profile, and the seconds and the processor time that it took."""
    before_s, began_s = processor_s(agent.pid), time.monotonic()
    request = MeasureRequest(model=MODEL, precision=PRECISION, again=again)
    there.last("/v1/measure", request, lambda text: print(f"... {text}", file=sys.stderr))
    found = msgspec.convert(there.get(f"/v1/profiles/{BOARD}"), type=Profile)
    wall_s = time.monotonic() - began_s
    until(lambda: online(there), 20.0, "the board at rest")  # its worker is reaped, and counts
    return found, wall_s, processor_s(agent.pid) - before_s


def processor_s(pid: int) -> float:
    """Of a process, its threads, and its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def loadgen_figures(rounds: int, conditions: dict[str, Any]) -> list[Figure]:
    found = compare_with_loadgen(rounds)
    if not isinstance(found, Compared):
        conditions["loadgen"] = found
        return []
    conditions["loadgen"] = found.version
    conditions["others_loadgen"] = found.others_share
    quiet = found.others_share is not None and found.others_share <= QUIET_SHARE
    turns = within("the same step by turns, ours over loadgen's", found.by_turns, LOADGEN_OFF)
    return [
        Figure("decode step of six blocks, ours", found.ours_s * 1e3, "ms"),
        Figure("the same by loadgen, SingleStream", found.theirs_s * 1e3, "ms"),
        within("the same queries, ours over loadgen's", found.same_queries, LOADGEN_OFF),
        turns if quiet else turns._replace(target=f"{turns.target} on a quiet machine", holds=None),
    ]


if __name__ == "__main__":
    sys.exit(main())
