"""Lines of NVIDIA's tegrastats: one parser for the forms of JetPack 3 to 7, Nano to Thor.

What a board does not print is None, and words that are not known are kept: the program changes with each release, and a
line must never cost more than the words that are new in it. Power is read as watts of this moment: the program's own
averages may count a first zero, so they are not taken.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.probe.commands import Runner
from hwprofiles.reading import Absent, Failed, Reading

COMMAND: Final = ("tegrastats", "--interval", "500")
"""Endless: `commands` stops it at its deadline and gives the lines until then."""

MAX_LINE_CHARACTERS: Final = 4096
"""Four times the longest line known (a Thor's)."""

_MEGABYTES = 1 << 20
_LFB = {"kB": 1 << 10, "MB": 1 << 20}
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"  # bounded: no run of digits makes an infinity or a slow integer


class Core(NamedTuple):
    """One processor; a core that is off has neither. The load is of the clock that it has now."""

    load: float | None
    clock_hz: float | None


class Unit(NamedTuple):
    """The GPU, the memory controller or an engine: on, share of time it works (0 to 1), clocks."""

    on: bool
    load: float | None = None
    clocks_hz: tuple[float, ...] = ()


class Stats(NamedTuple):
    """One line; () and None where it says nothing."""

    ram_used_bytes: int | None
    ram_total_bytes: int | None
    largest_free_block_bytes: int | None
    swap_used_bytes: int | None
    swap_total_bytes: int | None
    cores: tuple[Core, ...]
    memory_controller: Unit | None
    gpu: Unit | None
    engines: dict[str, Unit]
    temperatures_c: dict[str, float]
    """Sensors that are off (-256 C) are left out."""
    rails_w: dict[str, float]
    unknown: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return self.ram_total_bytes is None and not (self.cores or self.temperatures_c or self.rails_w)


_TIME = re.compile(r"\d\d-\d\d-\d{4} \d\d:\d\d:\d\d")
_RAM = re.compile(r"RAM (\d{1,9})/(\d{1,9})MB")
_SWAP = re.compile(r"SWAP (\d{1,9})/(\d{1,9})MB ?(?:\(cached \d+MB\))?")
_IRAM = re.compile(r"IRAM \d+/\d+kB ?(?:\(lfb \d+kB\))?")
_BLOCK = re.compile(r"\(lfb (\d{1,9})x(\d{1,9})(kB|MB)\)")
_CORES = re.compile(rf"(?:CPU|cpu) \[([^\]]{{0,2000}})\](?:@({_NUMBER}))?")
_RAIL = re.compile(rf"(\S{{1,40}}) ({_NUMBER})(mW)?/{_NUMBER}(?:mW)?(?:/{_NUMBER}(?:mW)?)?")
_HEAT = re.compile(rf"([A-Za-z]\S{{0,40}}?)@(-?{_NUMBER})C(?:/-?{_NUMBER}C)?")
_MTS = re.compile(rf"MTS fg {_NUMBER}% bg {_NUMBER}%")
_LIMIT = re.compile(r"EDP limit \d+")
_UNIT = re.compile(
    rf"([A-Z][A-Z0-9_]{{1,20}}) "
    rf"(?:(off)|(?:({_NUMBER})%)?@(?:\[({_NUMBER}(?:,{_NUMBER}){{0,31}})\]|({_NUMBER}))|({_NUMBER})%|({_NUMBER}))(?!\S)"
)


def parse(line: str) -> Stats:
    """Read a line; whatever it holds, this raises nothing."""
    left = line.strip()[:MAX_LINE_CHARACTERS]

    def take(pattern: re.Pattern[str]) -> re.Match[str] | None:
        nonlocal left
        found = pattern.search(left)
        if found:
            left = f"{left[: found.start()]} {left[found.end() :]}"
        return found

    take(_TIME)
    iram, ram, swap, block, cores = take(_IRAM), take(_RAM), take(_SWAP), take(_BLOCK), take(_CORES)
    del iram
    for known in (_MTS, _LIMIT):
        take(known)
    rails: dict[str, float] = {}
    heat: dict[str, float] = {}
    units: dict[str, Unit] = {}
    # Rails first: 'GPU 463/463' is a rail, and only its second number tells it from an engine.
    while rail := take(_RAIL):
        if rail[1] != "NC":
            rails[rail[1]] = float(rail[2]) / 1e3
    while sensor := take(_HEAT):
        if float(sensor[2]) > -256:
            heat[sensor[1]] = float(sensor[2])
    while unit := take(_UNIT):
        units[unit[1]] = _unit(unit)
    gpu = units.pop("GR3D_FREQ", units.pop("GR3D", None))
    memory = units.pop("EMC_FREQ", units.pop("EMC", None))
    return Stats(
        ram_used_bytes=int(ram[1]) * _MEGABYTES if ram else None,
        ram_total_bytes=int(ram[2]) * _MEGABYTES if ram else None,
        largest_free_block_bytes=int(block[2]) * _LFB[block[3]] if block else None,
        swap_used_bytes=int(swap[1]) * _MEGABYTES if swap else None,
        swap_total_bytes=int(swap[2]) * _MEGABYTES if swap else None,
        cores=_cores(cores[1], cores[2]) if cores else (),
        memory_controller=memory,
        gpu=gpu,
        engines=units,
        temperatures_c=heat,
        rails_w=rails,
        unknown=tuple(left.split()),
    )


def _unit(found: re.Match[str]) -> Unit:
    _, off, load, several, one, percent, bare = found.groups()
    if off:
        return Unit(on=False)
    said = load or percent
    clocks = (several or one or bare or "").split(",")
    return Unit(
        on=True,
        load=float(said) / 100 if said else None,
        clocks_hz=tuple(float(clock) * 1e6 for clock in clocks if clock),
    )


def _cores(listing: str, shared_mhz: str | None) -> tuple[Core, ...]:
    """'1%@729,off' or, with one clock for all, '14%,off'."""
    found = []
    for text in listing.split(","):
        core = re.fullmatch(rf"\s*({_NUMBER})%(?:@({_NUMBER}))?\s*", text)
        clock = (core[2] or shared_mhz) if core else None
        found.append(Core(float(core[1]) / 100 if core else None, float(clock) * 1e6 if clock else None))
    return tuple(found)


def read(run: Runner) -> Reading[Stats] | Absent | Failed:
    """The latest line that says anything. Live this takes as long as a command may (2 s)."""
    said = run(COMMAND)
    if not isinstance(said, Reading):
        return said
    for line in reversed(said.value.splitlines()[-100:]):
        stats = parse(line)
        if not stats.empty:
            return Reading(stats, "tegrastats")
    return Failed(f"tegrastats says {said.value[: files.MAX_QUOTED]!r}")


def runs_on(root: Path) -> bool:
    """A Jetson by its release file or its chip; elsewhere the program is not asked for."""
    if files.exists(root, "etc/nv_tegra_release"):
        return True
    names = files.text(root, "proc/device-tree/compatible")
    return isinstance(names, Reading) and "nvidia,tegra" in names.value
