"""Power, heat and clocks over time; joules only where enough was seen, and with what they are of."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from hwprofiles.probe import nvidia, rapl
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.sampler import MAX_SAMPLES, Sample, Sampler, Trace
from tests.hwprofiles.test_probe import GUEST, FakeNvml, put, value
from tests.hwprofiles.test_sensors import hwmon, package
from wire.errors import UsageError


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def trace(*points: tuple[float, float | None], interval_s: float = 1.0) -> Trace:
    samples = tuple(Sample(at_mono_s=at_s, watts=watts) for at_s, watts in points)
    return Trace(samples=samples, interval_s=interval_s, covers="rail X", power=Reading("sensor", "x"))


def test_energy_is_power_integrated_over_time() -> None:
    found = trace((0, 2.0), (1, 4.0), (3, 4.0)).energy()
    assert found.joules == Reading(11.0, "sensor") and (found.covered, found.duration_s) == (1.0, 3.0)
    assert found.covers == "rail X"


def test_gap_or_failed_readings_are_not_filled_in() -> None:
    long_gap = trace((0, 2.0), (1, 2.0), (11, 2.0)).energy()
    assert isinstance(long_gap.joules, Failed) and "9%" in long_gap.joules.because
    small_gap = trace(*((float(at), 2.0) for at in range(20)), (20.0, None), (21.0, 2.0)).energy()
    assert value(small_gap.joules) == 38.0 and small_gap.covered == pytest.approx(19 / 21)


def test_one_sample_or_none_has_no_energy() -> None:
    assert isinstance(trace((0, 2.0)).energy().joules, Failed)
    assert isinstance(trace().energy().joules, Failed)


def test_part_of_a_trace_is_one_measurement_of_several() -> None:
    found = trace(*((float(at), float(at)) for at in range(10))).between(3.0, 5.0)
    assert [sample.watts for sample in found.samples] == [3.0, 4.0, 5.0]
    assert value(found.energy().joules) == 8.0


def test_rails_heat_and_clocks_of_a_made_up_board(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("VDD_IN", 5000, 1000), ("VDD_SOC", 5000, 100))
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "50000")
    for name in ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"):
        put(tmp_path, f"sys/devices/system/cpu/cpufreq/policy0/{name}", "1500000")
    clock = Clock()
    sampler = Sampler(1.0, tmp_path, clock=clock)
    assert sampler.sample() == Sample(at_mono_s=100.0, watts=5.0, celsius=50.0, clock_hz=1.5e9)
    hwmon(tmp_path, "1-0040", ("VDD_IN", 5000, 2000), ("VDD_SOC", 5000, 100))
    clock.now_s = 102.0
    sampler.sample()
    found = sampler.trace().energy()
    assert value(found.joules) == 15.0 and found.covers == "module input VDD_IN, on-board sensor"


def test_sensor_that_fails_on_the_way_leaves_a_hole_with_its_reason(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("VDD_IN", 5000, 1000))
    sampler = Sampler(1.0, tmp_path, clock=Clock())
    put(tmp_path, "sys/bus/i2c/devices/1-0040/hwmon/hwmon7/curr1_input", "broken")
    assert sampler.sample().watts is None
    assert "broken" in sampler.trace().failed[0]


def test_energy_counters_are_counted_over_a_wrap_and_not_integrated(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "package-0", 262143328850 - 1_000_000)
    clock = Clock()
    sampler = Sampler(1.0, tmp_path, clock=clock)
    sampler.sample()
    package(tmp_path, "intel-rapl:0", "package-0", 3_000_000)
    clock.now_s += 50.0
    assert sampler.sample().counted_j == pytest.approx(4.0)
    found = sampler.trace().energy()
    assert value(found.joules) == pytest.approx(4.0) and found.covered == 1.0
    assert found.covers == "processor packages by RAPL, not the board's input"


def test_counter_for_root_only_is_failed_and_a_board_without_meters_is_absent(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    put(tmp_path, "UNREADABLE", "EACCES /sys/class/powercap/intel-rapl:0/energy_uj\n")
    found = Sampler(root=tmp_path).trace().energy().joules
    assert isinstance(found, Failed) and rapl.ROOT_ONLY in found.because
    assert Sampler(root=GUEST).trace().energy().joules == Absent("nothing on this board measures power")


def test_rails_of_an_unknown_set_are_not_taken_for_the_whole(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("VDD_MYSTERY", 5000, 1000))
    found = Sampler(root=tmp_path).trace().energy().joules
    assert isinstance(found, Absent) and "VDD_MYSTERY" in found.because


class PowerNvml(FakeNvml):
    """Two GPUs of 100 W."""

    def __init__(self) -> None:
        super().__init__()
        self.inits = 0

    def nvmlInit(self) -> None:
        self.inits += 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 100_000


def test_gpus_are_sampled_together_by_an_nvml_that_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = PowerNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(nvidia, "DRIVER_TRACES", ("proc/self/status",))
    monkeypatch.setattr(rapl, "counters", lambda root: Absent("none"))
    sampler = Sampler(1.0)
    before = nvml.inits
    with sampler:
        for _ in range(3):
            assert sampler.sample().watts == 200.0
    assert nvml.inits == before + 1 == nvml.shut
    found = sampler.trace().energy()
    assert isinstance(found.joules, Reading) and found.covers == "GPU boards by NVML, not the computer's input"


def test_gpu_that_answers_no_power_leaves_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvidia.watts(FakeNvml()) == Failed("NVML: GPU is lost")
    monkeypatch.setattr(PowerNvml, "nvmlDeviceGetCount", lambda self: 0)
    assert isinstance(nvidia.watts(PowerNvml()), Absent)


def test_long_run_is_thinned_instead_of_growing(tmp_path: Path) -> None:
    clock = Clock()
    sampler = Sampler(1.0, tmp_path, clock=clock)
    for _ in range(MAX_SAMPLES + 10):
        sampler.sample()
        clock.now_s += 1.0
    found = sampler.trace()
    assert len(found.samples) < MAX_SAMPLES and found.interval_s == 2.0
    assert found.samples[0].at_mono_s == 100.0


def test_live_sampler_keeps_its_pace_and_ends_at_once(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with Sampler(0.1, tmp_path) as sampler:
        time.sleep(0.55)
    taken = sampler.trace().samples
    assert 3 <= len(taken) <= (time.monotonic() - began_s) / 0.1 + 2
    times = [sample.at_mono_s for sample in taken]
    assert times == sorted(times) and times[-1] - times[0] >= 0.5
    with pytest.raises(RuntimeError):
        sampler.start()


@pytest.mark.parametrize("interval_s", [0.05, 0.0, 61.0, float("nan")])
def test_faster_than_ten_a_second_is_refused(interval_s: float) -> None:
    with pytest.raises(UsageError):
        Sampler(interval_s)
