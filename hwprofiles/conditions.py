"""The conditions of a measurement: a snapshot before, one after, joined into one statement."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Final

from hwprofiles.probe import clocks, engines, jetson, limits, proc, tegrastats, thermal
from hwprofiles.probe.commands import Runner, runner_for
from hwprofiles.profile import Conditions, Snapshot
from hwprofiles.reading import Absent, Failed, Reading
from wire.version import VERSION

LONG_QUOTA_PERIOD_S: Final = 0.010
"""With a longer quota period short steps run at full speed and then wait: times come in two kinds (measured: 26 and
76 ms for one step at half a core and the default 100 ms)."""


def snapshot(root: Path = Path("/"), run: Runner | None = None) -> Snapshot:
    """Read the conditions of this moment. `run` starts programs, by default as fits the root."""
    run = run or runner_for(root)
    quota, frequency = limits.processor_quota(root), clocks.clocks(root)
    kernel, load, affinity = proc.kernel(root), proc.load(root), proc.affinity(root)
    timer = time.get_clock_info("perf_counter")
    return Snapshot(
        software=VERSION,
        python=platform.python_version(),
        engine_versions={
            name: found.value for name, found in engines.engines_of(root).items() if isinstance(found, Reading)
        },
        kernel=kernel.value if isinstance(kernel, Reading) else "unknown",
        affinity=affinity.value if isinstance(affinity, Reading) else (),
        quota_cores=Reading(quota.value.cores, quota.source) if isinstance(quota, Reading) else quota,
        quota_period_s=Reading(quota.value.period_s, quota.source) if isinstance(quota, Reading) else quota,
        governor=clocks.governor(root),
        clock_hz=Reading(frequency.value.current_hz, frequency.source) if isinstance(frequency, Reading) else frequency,
        temperature_c=thermal.hottest(root),
        throttle=thermal.throttle(root, run),
        load=load.value if isinstance(load, Reading) else 0.0,
        timer=f"{timer.implementation}, resolution {timer.resolution:g} s",
        at_unix=time.time(),
        at_mono_s=time.monotonic(),
        power_mode=_power_mode(root, run),
    )


def _power_mode(root: Path, run: Runner) -> Reading[str] | Absent | Failed:
    if not tegrastats.runs_on(root):
        return Absent("not a Jetson")
    found = jetson.power_mode(run)
    return Reading(found.value.name, found.source) if isinstance(found, Reading) else found


def join(before: Snapshot, after: Snapshot, allow_spinning: bool) -> Conditions:
    """Make one statement of both. What can't change during a measurement is taken from `before`."""
    return Conditions(
        software=before.software,
        python=before.python,
        engine_versions=before.engine_versions,
        kernel=before.kernel,
        affinity=before.affinity,
        quota_cores=before.quota_cores,
        quota_period_s=before.quota_period_s,
        governor=before.governor,
        clock_hz_before=before.clock_hz,
        clock_hz_after=after.clock_hz,
        temperature_c_before=before.temperature_c,
        temperature_c_after=after.temperature_c,
        throttle_before=before.throttle,
        throttle_after=after.throttle,
        load_before=before.load,
        load_after=after.load,
        allow_spinning=allow_spinning,
        timer=before.timer,
        measured_at_unix=before.at_unix,
        duration_s=max(0.0, after.at_mono_s - before.at_mono_s),
        power_mode=before.power_mode,
    )
