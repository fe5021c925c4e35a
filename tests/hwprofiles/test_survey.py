"""A board says what it is and what its agent may use, with every limit counted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hwprofiles import conditions
from hwprofiles.probe import limits
from hwprofiles.profile import Conditions
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.survey import cores, memory, survey
from tests.hwprofiles.test_probe import CONTAINER, GUEST, JETSON, PI

LIVE = Path("/")


def test_survey_of_a_raspberry_pi_in_a_limited_unit() -> None:
    identity, held, allowed, engines = survey(PI, "pi5")
    assert identity.device == "pi5" and isinstance(identity.board, Reading)
    assert held.usable_bytes == 3 << 30 and isinstance(held.limit_bytes, Reading) and not held.unified
    assert (allowed.online, allowed.allowed, allowed.usable) == (4, 4, 1.5)
    assert allowed.because == "4 allowed of 4 online, quota of 1.5 per 100 ms (/sys/fs/cgroup/system.slice/cpu.max)"
    assert engines["onnxruntime"] == Absent("engines were not recorded"), "ours are not the recorded board's"
    assert isinstance(survey(LIVE, "here").engines["onnxruntime"], Reading)


def test_processor_set_and_quota_both_count() -> None:
    found = cores(CONTAINER)
    assert (found.online, found.allowed, found.usable) == (8, 3, 0.25)


def test_memory_that_a_user_sets_is_a_limit_unless_a_tighter_one_holds() -> None:
    assert memory(PI, 1 << 30).limit_bytes == Reading(1 << 30, "set by the user")
    assert memory(PI, 1 << 30).usable_bytes == 1 << 30
    assert memory(PI, 1 << 40).usable_bytes == 3 << 30


def test_gpu_of_a_jetson_shares_its_memory() -> None:
    found = survey(JETSON, "orin")
    assert found.identity.accelerators == Reading(
        ("GPU of tegra234 (Orin NX or Orin Nano p3767-0005)",), "/proc/device-tree/compatible"
    )
    assert found.memory.unified


def test_empty_tree_is_surveyed_without_inventing_anything(tmp_path: Path) -> None:
    identity, held, allowed, _ = survey(tmp_path, "blank")
    assert all(isinstance(found, Absent) for found in (identity.board, identity.cpu, identity.os))
    assert identity.arch == "unknown"
    assert isinstance(held.total_bytes, Absent) and held.usable_bytes == 0
    assert (allowed.online, allowed.allowed, allowed.usable) == (1, 1, 1.0)
    assert allowed.because == "nothing says which processors there are"


def test_live_survey_agrees_with_the_kernel() -> None:
    found = survey(LIVE, "here")
    assert found.identity.arch == os.uname().machine
    assert found.cores.allowed == len(os.sched_getaffinity(0))
    assert isinstance(found.memory.total_bytes, Reading)
    assert 0 < found.memory.usable_bytes <= found.memory.total_bytes.value


def test_survey_imports_nothing_heavy() -> None:
    """A supervisor does this at each start: no engine, no numpy, and no NVML where there is no driver."""
    script = (
        "import sys; from pathlib import Path; from hwprofiles.survey import survey; "
        "from hwprofiles.conditions import snapshot; import hwprofiles.profile; survey(Path('/'), 'x'); snapshot(); "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"numpy", "onnxruntime", "torch", "tensorrt", "email", "statistics", "models", "agent", "coordinator"}
    if not Path("/proc/driver/nvidia/version").exists():
        heavy.add("pynvml")
    assert not heavy & set(done.stdout.split())


def test_snapshots_join_into_conditions_that_travel() -> None:
    before, after = conditions.snapshot(PI), conditions.snapshot()
    joined = conditions.join(before, after, allow_spinning=True)
    assert joined.quota_cores == Reading(1.5, "/sys/fs/cgroup/system.slice/cpu.max")
    assert joined.temperature_c_before == Reading(61.5, "thermal_zone0 cpu-thermal")
    assert joined.load_after == after.load and joined.allow_spinning and joined.duration_s >= 0
    assert after.engine_versions and joined.kernel == "6.12.47+rpt-rpi-2712"
    assert msgspec.json.decode(msgspec.json.encode(joined), type=Conditions) == joined


def test_conditions_of_a_machine_without_sensors_are_absent_with_reasons() -> None:
    found = conditions.snapshot(GUEST)
    for reading in (found.governor, found.clock_hz, found.temperature_c, found.throttle, found.quota_cores):
        assert isinstance(reading, Absent) and reading.because


@contextlib.contextmanager
def group(controller: str, settings: dict[str, str]) -> Iterator[Path]:
    """A real group beside our own with the given settings; skips where groups can't be made."""
    found = limits.group_of(LIVE, controller)
    if not isinstance(found, limits.Group) or os.geteuid() != 0:
        pytest.skip(f"no control groups for {controller}, or not root")
    folder = LIVE / found.folders[0] / f"edgelam-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"can't make a control group: {error}")
    try:
        for name, text in settings.items():
            (folder / name).write_text(text)
        yield folder
    except OSError as error:
        pytest.skip(f"can't limit a control group: {error}")
    finally:
        folder.rmdir()


def _settings(controller: str) -> dict[str, str]:
    found = limits.group_of(LIVE, controller)
    version = found.version if isinstance(found, limits.Group) else 2
    if controller == "memory":
        return {"memory.limit_in_bytes" if version == 1 else "memory.max": str(200 << 20)}
    if version == 2:
        return {"cpu.max": "2500 10000"}
    return {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "2500"}


@pytest.mark.lab
def test_agent_in_a_group_of_200_mb_and_a_quarter_of_a_core_says_so() -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "for folder in sys.argv[1:]: Path(folder, 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from hwprofiles.survey import survey; found = survey(Path('/'), 'x')\n"
        "print(found.memory.usable_bytes, found.cores.usable, found.cores.because)"
    )
    with group("memory", _settings("memory")) as memory_group, group("cpu", _settings("cpu")) as cpu_group:
        done = subprocess.run(
            [sys.executable, "-c", script, *{str(memory_group), str(cpu_group)}], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    usable_bytes, usable_cores, because = done.stdout.split(" ", 2)
    assert (int(usable_bytes), float(usable_cores)) == (200 << 20, 0.25)
    assert "quota of 0.25 per 10 ms" in because


def test_unreadable_limit_is_failed_and_not_taken_for_unlimited(tmp_path: Path) -> None:
    from tests.hwprofiles.test_probe import put, v2

    v2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/a/b/memory.max", "garbage")
    put(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "garbage")
    assert isinstance(memory(tmp_path).limit_bytes, Failed)
    assert "quota unknown" in cores(tmp_path).because
