"""Power from profiles."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.planning.powered import power_of
from hwprofiles.profile import Phase
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.samples import EnergyMeasurement, EnergyRun
from tests.hwprofiles.examples import profile

IDLE = Reading(3.0, "meter")


def run(phase: Phase, joules: Reading[float] | Absent | Failed, duration_s: float = 2.0) -> EnergyRun:
    return EnergyRun(
        key="a", phase=phase, tokens=1, context=16, stack=6, steps=10, duration_s=duration_s, joules=joules
    )  # fmt: skip


def energy(*runs: EnergyRun, idle: Reading[float] | Absent = IDLE) -> EnergyMeasurement:
    return EnergyMeasurement(meter="meter", covers="the board", idle_w=idle, runs=runs)


def test_the_power_of_a_board_is_that_of_its_decode_steps() -> None:
    runs = (run("decode", Reading(12.0, "meter")), run("decode", Reading(3.0, "meter"), 1.0))
    found = power_of(msgspec.structs.replace(profile(), energy=energy(*runs, run("prefill", Reading(99.0, "meter")))))
    assert found is not None and (found.active_w, found.idle_w, found.covers) == (5.0, 3.0, "the board")


@pytest.mark.parametrize(
    "measured",
    [
        Absent("no meter"),
        Failed("it broke"),
        energy(),
        energy(run("decode", Absent("too short"))),
        energy(run("prefill", Reading(9.0, "meter"))),
        energy(run("decode", Reading(9.0, "meter")), idle=Absent("never idle")),
    ],
)
def test_what_was_not_measured_is_unknown(measured: EnergyMeasurement | Absent | Failed) -> None:
    assert power_of(msgspec.structs.replace(profile(), energy=measured)) is None
