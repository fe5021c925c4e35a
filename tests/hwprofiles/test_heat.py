"""Course, energy, continued load and what others take of the processor: kept small, judged, and never guessed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hwprofiles import energy, sustained
from hwprofiles.course import course_of
from hwprofiles.energy import Work, measure_energy, token_j, token_j_above_idle
from hwprofiles.probe.busy import Others
from hwprofiles.profile import Profile
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.figures import plots
from hwprofiles.report.heat_rows import tables
from hwprofiles.report.plots import NoPlot, Plot
from hwprofiles.report.verdict import in_all, sections
from hwprofiles.sampler import Sample, Sampler, Trace
from hwprofiles.samples import MAX_MOMENTS, Course, EnergyMeasurement, Sustained, Window
from tests.hwprofiles import examples
from tests.hwprofiles.test_probe import put
from tests.hwprofiles.test_sampler import Clock
from tests.hwprofiles.test_sensors import hwmon
from tests.hwprofiles.test_verdict import good


def trace(count: int = 10, **changes: object) -> Trace:
    samples = tuple(
        Sample(at_mono_s=100.0 + at, watts=3.0 + at, celsius=40.0 + at, clock_hz=1.5e9) for at in range(count)
    )
    made = Trace(samples=samples, interval_s=1.0, covers="rail X", power=Reading("sensor", "x"))
    return msgspec.structs.replace(made, **changes)


def test_a_course_begins_at_zero_and_keeps_its_last_moment() -> None:
    short, long = course_of(trace(), 0.1), course_of(trace(1000), None)
    assert [moment.at_s for moment in short.moments] == list(range(10)) and short.processor_share == 0.1
    assert (len(long.moments), long.moments[0].at_s, long.moments[-1].at_s) == (MAX_MOMENTS, 0, 999)
    assert course_of(trace(0), None).moments == ()


def test_counted_energy_becomes_power_between_moments() -> None:
    samples = tuple(Sample(at_mono_s=float(2 * at), counted_j=10.0 * at) for at in range(3))
    assert [moment.watts for moment in course_of(trace(samples=samples), None).moments] == [None, 5.0, 5.0]


# Energy.


def board_with_a_meter(root: Path) -> None:
    hwmon(root, "1-0040", ("VDD_IN", 5000, 1000))


def measured(root: Path) -> EnergyMeasurement | Absent | Failed:
    """5 W idle, 10 W in steps that take an eighth of a second; the meter is read at the ends and each second."""
    clock = Clock()

    def step() -> None:
        hwmon(root, "1-0040", ("VDD_IN", 5000, 2000))
        clock.now_s += 0.125

    def sleep(seconds: float) -> None:
        clock.now_s += seconds

    works = (Work("block", "decode", 1, 16, 6, step), Work("block", "prefill", 32, 16, 6, step))
    return measure_energy(works, lambda: Sampler(1.0, root, clock=clock), 1.0, clock, sleep)


def test_joules_of_a_step_and_what_of_them_is_not_the_idle_board(tmp_path: Path) -> None:
    board_with_a_meter(tmp_path)
    found = measured(tmp_path)
    assert isinstance(found, EnergyMeasurement) and found.covers == "module input VDD_IN, on-board sensor"
    assert isinstance(found.idle_w, Reading) and found.idle_w.value == pytest.approx(5.0)
    decode, prefill = found.runs
    assert decode.steps == 8 and token_j(decode) == pytest.approx(1.25)
    assert token_j_above_idle(decode, found.idle_w) == pytest.approx(0.625)
    assert token_j(prefill) == pytest.approx(1.25 / 32)


def test_a_board_without_a_meter_has_no_energy_and_takes_no_time_for_it(tmp_path: Path) -> None:
    def step() -> None:
        raise AssertionError("nothing is to be run")

    put(tmp_path, "proc/cpuinfo", "model name : x")
    found = measure_energy(
        (Work("b", "decode", 1, 16, 1, step),), lambda: Sampler(1.0, tmp_path, gpu=False), sleep=lambda s: step()
    )
    assert isinstance(found, Absent) and "nothing on this board measures power" in found.because
    [table] = [table for table in tables(examples.profile(energy=found)) if table.title == "Energy"]
    assert "unknown, not zero" in table.rows[0][1]
    section = next(one for one in sections(examples.profile(energy=found)) if one.name == "energy")
    assert section.verdict == "ABSENT" and "unknown, not zero" in section.because[0]


def test_energy_that_was_not_seen_is_unknown() -> None:
    run = measured_run(Failed("power known for 9% of 3 s"))
    assert token_j(run) is None and token_j_above_idle(run, Reading(1.0, "x")) is None
    found = energy_of(run)
    section = next(one for one in sections(good_with(energy=found)) if one.name == "energy")
    assert section.verdict == "INVALID" and "9%" in section.because[0]


def measured_run(joules: Reading[float] | Failed) -> energy.EnergyRun:
    return energy.EnergyRun(
        key="block", phase="decode", tokens=1, context=16, stack=6, steps=100, duration_s=1.0, joules=joules
    )


def energy_of(*runs: energy.EnergyRun) -> EnergyMeasurement:
    return EnergyMeasurement(meter="sensor", covers="module input", idle_w=Reading(2.0, "x"), runs=runs)


def good_with(**changes: object) -> Profile:
    return msgspec.structs.replace(good(), **changes)


# Continued load.


def windows(slow_from: int, count: int = 30, throttled: bool | None = True, factor: float = 1.5) -> tuple[Window, ...]:
    return tuple(
        Window(
            end_s=at + 1.0, steps=100, step_s=0.010 * (factor if at >= slow_from else 1.0), celsius=50.0 + at,
            clock_hz=1.5e9, throttled=throttled and at >= slow_from if throttled is not None else None,
        )
        for at in range(count)
    )  # fmt: skip


def loaded(*of: Window, **changes: object) -> Sustained:
    made = Sustained(
        key="block", engine="onnxruntime", threads=4, phase="decode", tokens=1, context=16, stack=6, asked_s=30.0,
        windows=of, measured_at_unix=1.79e9, throttling=Reading("0x40000: throttled since boot", "vcgencmd"),
        processor_share=0.02,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_windows_hold_the_steps_of_the_whole_time() -> None:
    clock = Clock()
    seen: list[float] = []

    def step() -> float:
        clock.now_s += 0.01
        return 0.01 if clock.now_s < 105 else 0.02

    found = sustained.run(step, 10.0, lambda: sustained.Look(60.0, None, False), seen.append, clock)
    assert len(found) == len(seen) == 20 and found[-1].end_s == pytest.approx(10, abs=0.5)
    assert sum(window.steps for window in found) == pytest.approx(1000, abs=20)
    assert (found[0].step_s, found[-1].step_s, found[0].celsius) == (0.01, 0.02, 60.0)


def test_cool_and_sustained_speed_stand_apart() -> None:
    speed = sustained.speeds(loaded(*windows(15)))
    assert speed is not None
    assert (speed.cool_s, speed.sustained_s, speed.slowdown) == pytest.approx((0.010, 0.015, 1.5))
    assert speed.throttled_at_s == 16.0
    assert sustained.speeds(loaded(*windows(3, count=5))) is None


def test_a_board_that_throttles_under_load_is_a_result_and_not_an_error() -> None:
    profile = good_with(sustained=loaded(*windows(15)))
    assert in_all(profile, sections(profile)) == ("VALID", ())
    [table] = [table for table in tables(profile) if table.title.startswith("Speed under")]
    shown = dict(table.rows)
    assert shown["slowdown"] == "1.50 times as long: slower when hot" and shown["throttling"] == "seen from 16.0 s on"
    assert shown["cool"] == "10.0 ms a step" and shown["sustained"].startswith("15.0 ms a step")


@pytest.mark.parametrize(
    ("found", "because"),
    [
        (loaded(*windows(3, count=5)), "5 windows, at least 6"),
        (loaded(*windows(15), processor_share=0.4), "everything else on the machine used 40%"),
    ],
)
def test_a_run_that_was_too_short_or_disturbed_is_invalid(found: Sustained, because: str) -> None:
    profile = good_with(sustained=found)
    section = next(one for one in sections(profile) if one.name == "sustained")
    assert section.verdict == "INVALID" and because in section.because[0]


def test_where_nobody_can_say_whether_it_throttled_that_is_unknown() -> None:
    found = loaded(*windows(99, throttled=None), throttling=Absent("the board tells nothing about throttling"))
    [table] = [table for table in tables(examples.profile(sustained=found)) if table.title.startswith("Speed under")]
    assert dict(table.rows)["throttling"] == "unknown: absent: the board tells nothing about throttling"


# Plots.


def test_what_was_read_meanwhile_is_drawn_as_a_line() -> None:
    profile = good_with(course=course_of(trace(), 0.0), sustained=loaded(*windows(15)), energy=energy_of())
    drawn = {plot.title: plot for plot in plots(profile)}
    heat, power, speed = drawn["Temperature over time"], drawn["Power over time"], drawn["Speed under continued load"]
    assert isinstance(heat, Plot) and heat.series[0].joined and len(heat.series[0].points) == 10
    assert isinstance(power, Plot) and power.series[0].name == "rail X"
    assert isinstance(speed, Plot) and [one.name for one in speed.series][1] == "throttled"
    assert isinstance(drawn["Temperature under continued load"], Plot)
    assert isinstance(drawn["Energy"], NoPlot)


def test_energy_is_drawn_against_tokens() -> None:
    plot = {plot.title: plot for plot in plots(good_with(energy=energy_of(measured_run(Reading(5.0, "x")))))}["Energy"]
    assert isinstance(plot, Plot) and [one.points[0].y for one in plot.series] == pytest.approx([0.05, 0.03])


# Others.


def stat(root: Path, busy: int, idle: int) -> None:
    put(root, "proc/stat", f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4\n")


def test_what_others_take_is_what_is_busy_and_not_ours(tmp_path: Path) -> None:
    own_s = [0.0]
    stat(tmp_path, 1000, 1000)
    others = Others(tmp_path, lambda: own_s[0])
    assert others.share() is None, "no time has passed"
    stat(tmp_path, 1300, 1100)  # 4 s of two cores at 100 ticks a second: 3 busy, 1 of them ours
    own_s[0] = 1.0
    assert others.share() == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu a b c d\n", "intr 1 2 3 4 5\n"])
def test_a_kernel_that_says_something_else_is_not_believed(tmp_path: Path, text: str) -> None:
    put(tmp_path, "proc/stat", text)
    assert Others(tmp_path).share() is None


def test_a_run_beside_other_work_is_invalid() -> None:
    busy = Course(interval_s=0.5, moments=(), power=Absent("none"), processor_share=0.43)
    profile = good_with(course=busy)
    verdict, because = in_all(profile, sections(profile))
    assert verdict == "INVALID" and "everything else on the machine used 43% of the processor" in because[0]
    calm = good_with(course=msgspec.structs.replace(busy, processor_share=0.05))
    assert in_all(calm, sections(calm))[0] == "VALID"
