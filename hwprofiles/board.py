"""A board's sensors at one moment: what slows it, heats it and feeds it, each reading with its source.

`survey` says what a board is and `conditions` what sets its speed; this says the rest, for people and for recordings.
It may take seconds where programs have to be asked, so agents don't read it while they work.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from hwprofiles.probe import boards, clocks, jetson, nvidia, power, rapl, raspberry, tegrastats, thermal
from hwprofiles.probe.commands import Runner, runner_for
from hwprofiles.reading import Absent, Failed, Reading


class Board(Struct, frozen=True, kw_only=True):
    known: Reading[boards.Known] | Absent | Failed
    governor: Reading[str] | Absent | Failed
    clocks: Reading[clocks.Clocks] | Absent | Failed
    power_mode: Reading[jetson.PowerMode] | Absent | Failed
    zones: tuple[thermal.Zone, ...]
    hottest_c: Reading[float] | Absent | Failed
    throttle: Reading[str] | Absent | Failed
    under_voltage: Reading[bool] | Absent | Failed
    power: Reading[power.Power] | Absent | Failed
    energy_counters: Reading[tuple[rapl.Counter, ...]] | Absent | Failed
    tegra_gpu: Reading[jetson.GpuClock] | Absent | Failed
    gpus: Reading[tuple[nvidia.Gpu, ...]] | Absent | Failed
    tegrastats: Reading[tegrastats.Stats] | Absent | Failed


def read(root: Path = Path("/"), run: Runner | None = None) -> Board:
    """Read everything; programs are asked only on boards that may have them."""
    run = run or runner_for(root)
    tegra = tegrastats.runs_on(root)
    not_tegra = Absent("not a Jetson")
    stats = tegrastats.read(run) if tegra else not_tegra
    hottest = thermal.hottest(root)
    if isinstance(hottest, Absent) and isinstance(stats, Reading):
        hottest = _hottest(stats.value)
    return Board(
        known=boards.known(root),
        governor=clocks.governor(root),
        clocks=clocks.clocks(root),
        power_mode=jetson.power_mode(run) if tegra else not_tegra,
        zones=thermal.zones(root),
        hottest_c=hottest,
        throttle=thermal.throttle(root, run),
        under_voltage=raspberry.under_voltage(root),
        power=power.power(root, run, stats.value if isinstance(stats, Reading) else None),
        energy_counters=rapl.counters(root),
        tegra_gpu=jetson.gpu(root) if tegra else not_tegra,
        gpus=nvidia.gpus(root),
        tegrastats=stats,
    )


def _hottest(stats: tegrastats.Stats) -> Reading[float] | Absent:
    """The highest temperature of a line; 'PMIC' is a constant there, too."""
    found = {
        name: celsius
        for name, celsius in stats.temperatures_c.items()
        if not any(name.startswith(fake) for fake in thermal.FAKE_ZONES)
    }
    if not found:
        return Absent("tegrastats names no temperature")
    name = max(found, key=lambda name: found[name])
    return Reading(found[name], f"tegrastats {name}")
