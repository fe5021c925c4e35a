"""Sensors of boards: rails and what their total covers, energy counters, power modes, GPU clocks, names of boards.

Trees and figures here are made up after the kernel's formats, to test readers; they are no board's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles import board, sensors
from hwprofiles.conditions import snapshot
from hwprofiles.probe import boards, commands, ina3221, jetson, power, rapl, raspberry
from hwprofiles.probe.commands import Runner
from hwprofiles.probe.ina3221 import Rail
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.survey import survey
from tests.hwprofiles.test_probe import GUEST, JETSON, ORIN, PI, put, value

I2C = "sys/bus/i2c/devices"


def says(*lines: str) -> Runner:
    return lambda command: Reading("\n".join(lines), " ".join(command))


def hwmon(root: Path, device: str, *rails: tuple[str, int, int]) -> None:
    """An INA3221 as JetPack 5 and later show it, with the shunt sums that are no rails."""
    put(root, f"{I2C}/{device}/name", "ina3221\n")
    folder = f"{I2C}/{device}/hwmon/hwmon7"
    for number, (label, millivolts, milliamperes) in enumerate(rails, 1):
        put(root, f"{folder}/in{number}_label", f"{label}\n")
        put(root, f"{folder}/in{number}_input", f"{millivolts}\n")
        put(root, f"{folder}/curr{number}_input", f"{milliamperes}\n")
    put(root, f"{folder}/in7_label", "sum of shunt voltages\n")
    put(root, f"{folder}/in7_input", "12\n")
    put(root, f"{folder}/in4_input", "8\n")


def rail(name: str, watts: float = 1.0) -> Rail:
    return Rail(name, watts)


# rails and totals


def test_input_rail_is_the_total_and_is_not_added_to_its_parts(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300))
    found = value(power.power(tmp_path, says()))
    assert found.total_w == Reading(6.0, f"/{I2C}/1-0040")
    assert found.covers == "module input VDD_IN, on-board sensor"
    assert found.rails_w == {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 2.0, "VDD_SOC": 1.5}


def test_boards_without_an_input_rail_have_a_sum_that_is_named_and_no_rail_of_a_rail_in_it(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("VDD_GPU_SOC", 20000, 100), ("VDD_CPU_CV", 20000, 50), ("VIN_SYS_5V0", 5000, 900))
    hwmon(tmp_path, "1-0041", ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 1800, 500), ("NC", 0, 0))
    found = value(power.power(tmp_path, says()))
    assert value(found.total_w) == pytest.approx(7.5)
    assert found.covers == "sum of rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0, on-board sensor"
    assert found.rails_w["VDDQ_VDD2_1V8AO"] == 0.9 and "NC" not in found.rails_w


@pytest.mark.parametrize(
    ("names", "total", "covers"),
    [
        (("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"), 1.0, "board input VIN, on-board sensor"),
        (("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"), 1.0, "module input POM_5V_IN, on-board sensor"),
        (("VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_IN", "VDD_SYS_CPU"), 1.0, "module input VDD_IN, on-board sensor"),
        (
            ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
            6.0,
            "sum of rails GPU + CPU + SOC + CV + VDDRQ + SYS5V, on-board sensor",
        ),
    ],
)
def test_table_of_totals(names: tuple[str, ...], total: float, covers: str) -> None:
    found = power.of_rails(tuple(rail(name) for name in names), "x")
    assert (value(found.total_w), found.covers) == (total, covers)


def test_part_of_a_known_set_and_an_unknown_rail_make_no_total() -> None:
    for names in (("GPU", "CPU"), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDD_NEW"), ("VDD_CPU",)):
        found = power.of_rails(tuple(rail(name) for name in names), "x")
        assert isinstance(found.total_w, Absent) and names[-1] in found.total_w.because and not found.covers


@given(st.lists(st.sampled_from([*power.TOTAL_RAILS, "VDD_SOC", "GPU"]), unique=True, min_size=1))
def test_total_is_never_more_than_what_its_name_says(names: list[str]) -> None:
    found = power.of_rails(tuple(rail(name) for name in names), "x")
    if isinstance(found.total_w, Reading):
        assert found.total_w.value == 1.0, "an input rail stands alone"


def test_rails_of_jetpack_4_by_iio(tmp_path: Path) -> None:
    folder = f"{I2C}/6-0040/iio:device0"
    put(tmp_path, f"{I2C}/6-0040/name", "ina3221x\n")
    for number, (name, millivolts, milliamperes) in enumerate([("POM_5V_IN", 5000, 400), ("POM_5V_GPU", 5000, 8)]):
        put(tmp_path, f"{folder}/rail_name_{number}", name)
        put(tmp_path, f"{folder}/in_voltage{number}_input", str(millivolts))
        put(tmp_path, f"{folder}/in_current{number}_input", str(milliamperes))
    assert value(ina3221.rails(tmp_path)) == (Rail("POM_5V_IN", 2.0), Rail("POM_5V_GPU", 0.04))


def test_rail_that_fails_fails_the_sum_and_a_label_without_current_is_no_rail(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ("GPU", 1, 1), ("CPU", 1, 1))
    (tmp_path / f"{I2C}/1-0040/hwmon/hwmon7/curr2_input").unlink()
    assert value(ina3221.rails(tmp_path)) == (Rail("GPU", 1e-6),)
    put(tmp_path, f"{I2C}/1-0040/hwmon/hwmon7/curr2_input", "?")
    assert isinstance(ina3221.rails(tmp_path), Failed)
    assert isinstance(ina3221.rails(GUEST), Absent)


# Raspberry Pi

PMIC = """\
  3V3_SYS_A current(1)=0.50000000A
 VDD_CORE_A current(7)=2.00000000A
  3V3_SYS_V volt(9)=3.30000000V
 VDD_CORE_V volt(15)=0.90000000V
    EXT5V_V volt(24)=4.92450000V
     BATT_V volt(25)=0.00341880V
"""


def test_pmic_rails_are_paired_by_name_and_their_sum_says_what_it_lacks() -> None:
    found = value(power.power(PI, says(PMIC)))
    assert value(found.total_w) == pytest.approx(3.45) and set(found.rails_w) == {"3V3_SYS", "VDD_CORE"}
    assert "not input power" in found.covers
    assert value(raspberry.pmic(says(PMIC))).volts[raspberry.SUPPLY_RAIL] == 4.9245


@pytest.mark.parametrize("run", [says('error=1 error_msg="Command not registered"'), lambda command: Absent("none")])
def test_board_that_measures_no_power_has_none_and_not_zero(run: Runner) -> None:
    assert isinstance(power.power(PI, run), Absent)


def test_answer_without_a_pair_has_failed() -> None:
    assert isinstance(raspberry.pmic(says("VDD_CORE_A current(7)=2.0A")), Failed)


@given(st.text())
def test_any_answer_of_the_pmic_is_read(text: str) -> None:
    assert raspberry.parse_pmic(text).rails == () or "current" in text


def test_weak_supply_by_its_own_sensor(tmp_path: Path) -> None:
    assert isinstance(raspberry.under_voltage(tmp_path), Absent)
    put(tmp_path, "sys/class/hwmon/hwmon1/name", "cpu_thermal\n")
    put(tmp_path, "sys/class/hwmon/hwmon3/name", "rpi_volt\n")
    put(tmp_path, "sys/class/hwmon/hwmon3/in0_lcrit_alarm", "1\n")
    assert raspberry.under_voltage(tmp_path) == Reading(True, "/sys/class/hwmon/hwmon3/in0_lcrit_alarm")


# x86


def package(root: Path, folder: str, name: str, microjoules: int) -> None:
    put(root, f"sys/class/powercap/{folder}/name", f"{name}\n")
    put(root, f"sys/class/powercap/{folder}/energy_uj", f"{microjoules}\n")
    put(root, f"sys/class/powercap/{folder}/max_energy_range_uj", "262143328850\n")


def test_energy_counters_are_of_packages_without_their_parts(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "package-0", 5)
    package(tmp_path, "intel-rapl:0:0", "core", 3)
    package(tmp_path, "intel-rapl:1", "psys", 9)
    package(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    assert value(rapl.counters(tmp_path)) == (rapl.Counter("package-0", 5, 262143328850),)


def test_energy_counter_that_wrapped_around_goes_on() -> None:
    before = (rapl.Counter("package-0", 900_000, 1_000_000), rapl.Counter("package-1", 0, 1_000_000))
    after = (rapl.Counter("package-0", 100_000, 1_000_000), rapl.Counter("package-1", 500_000, 1_000_000))
    assert rapl.used_j(before, after) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="packages"):
        rapl.used_j(before, after[:1])


def test_counter_that_only_root_may_read_has_failed_and_says_so(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    put(tmp_path, "UNREADABLE", "EACCES /sys/class/powercap/intel-rapl:0/energy_uj\n")
    found = rapl.counters(tmp_path)
    assert isinstance(found, Failed) and "EACCES" in found.because and "only root" in found.because


# Jetson


def test_power_mode_with_its_number_and_all_modes_in_order() -> None:
    assert value(jetson.power_mode(commands.runner_for(ORIN))) == jetson.PowerMode("25W", 1)
    assert value(jetson.power_mode(says("NVPM WARN: x", "NV Power Mode: MAXN_SUPER", "2"))) == ("MAXN_SUPER", 2)
    assert value(jetson.power_mode(says("NV Power Mode: MODE 15W 6CORE"))) == ("MODE 15W 6CORE", None)
    assert isinstance(jetson.power_mode(says("nvpmodel: what?")), Failed)
    listing = says("< POWER_MODEL ID=1 NAME=7W >", "CPU_ONLINE CORE_0 1", "< POWER_MODEL ID=0 NAME=15W >")
    assert value(jetson.power_modes(listing)) == ("15W", "7W")
    assert isinstance(jetson.power_modes(says("")), Failed)


@pytest.mark.parametrize("name", ["17000000.gpu", "17000000.ga10b", "57000000.gpu", "gpu-gpc-0"])
def test_gpu_by_devfreq(tmp_path: Path, name: str) -> None:
    folder = f"sys/class/devfreq/{name}"
    for file, text in {"cur_freq": "306000000", "min_freq": "306000000", "max_freq": "1020000000"}.items():
        put(tmp_path, f"{folder}/{file}", text)
    assert value(jetson.gpu(tmp_path)) == jetson.GpuClock(None, 306e6, 306e6, 1020e6)
    put(tmp_path, f"{folder}/device/load", "437\n")
    assert value(jetson.gpu(tmp_path)).load == 0.437
    assert isinstance(jetson.gpu(GUEST), Absent)


@pytest.mark.parametrize(
    ("compatible", "code", "name"),
    [
        ("nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234", "p3767-0005", "Orin Nano 8 GB (dev"),
        ("nvidia,p3449-0000-b00+p3448-0002-b00\0nvidia,jetson-nano\0nvidia,tegra210", "p3448-0002", "Jetson Nano"),
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234", "p3701-0005", "AGX Orin 64 GB"),
        ("nvidia,p4071-0000+p3834-0008\0nvidia,tegra264", "p3834-0008", "Jetson AGX Thor"),
        ("nvidia,p9999-0001\0nvidia,tegra999", "p9999-0001", "Jetson"),
    ],
)
def test_jetsons_are_known_by_the_code_of_their_module(tmp_path: Path, compatible: str, code: str, name: str) -> None:
    put(tmp_path, "proc/device-tree/compatible", f"{compatible}\0")
    put(tmp_path, "proc/device-tree/model", "Some Carrier Board\0")
    assert value(jetson.module(tmp_path)).code == code
    found = value(boards.known(tmp_path))
    assert name in found.name and found.kind == "jetson" and found.raw == "Some Carrier Board"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", "Raspberry Pi 5 Model B"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "Raspberry Pi 3 Model B Plus"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "Raspberry Pi Zero 2 W"),
        ("Raspberry Pi Compute Module 4 Rev 1.1", "Raspberry Pi Compute Module 4"),
        ("Raspberry Pi 9 Something New", "Raspberry Pi 9 Something New"),
    ],
)
def test_raspberry_pis_are_known_by_their_model_and_the_raw_text_is_kept(tmp_path: Path, model: str, name: str) -> None:
    put(tmp_path, "proc/device-tree/model", f"{model}\0")
    assert value(boards.known(tmp_path)) == boards.Known("raspberry-pi", name, model)


# a whole board


def test_replayed_orin_nano_has_what_was_captured_and_nothing_else() -> None:
    found = board.read(ORIN)
    assert value(found.known).kind == "jetson"
    assert found.hottest_c == Reading(56.593, "tegrastats tj")
    assert value(value(found.power).total_w) == 4.673 and value(found.power).covers.startswith("module input VDD_IN")
    for absent in (found.clocks, found.throttle, found.tegra_gpu, found.energy_counters, found.gpus):
        assert isinstance(absent, Absent)
    assert snapshot(ORIN).power_mode == Reading("25W", "nvpmodel -q")
    assert isinstance(survey(ORIN, "x").identity.power_modes, Absent)


def test_programs_of_other_boards_are_not_asked() -> None:
    def forbidden(command: tuple[str, ...]) -> Failed:
        raise AssertionError(command)

    assert isinstance(board.read(GUEST, forbidden).tegrastats, Absent)


def test_everything_that_was_asked_is_shown_with_its_source_or_its_reason() -> None:
    shown = dict(sensors.lines(board.read(PI)))
    assert (
        shown["throttled"].startswith("0x50005: under-voltage now") and "(vcgencmd get_throttled)" in shown["throttled"]
    )
    assert shown["power"] == "absent: vcgencmd pmic_read_adc was not recorded"
    assert shown["governor"] == "ondemand  (/sys/devices/system/cpu/cpufreq)"
    shown = dict(sensors.lines(board.read(JETSON)))
    assert shown["zone gpu-thermal"].startswith("absent:") and shown["hottest"].startswith("56.7 C")
    assert "no total" not in dict(sensors.lines(board.read(ORIN)))["power"]
