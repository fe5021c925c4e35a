"""One parser for all forms of tegrastats: captured lines of real boards, made-up lines for forms without a capture that
may be kept, and anything at all.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles.probe import commands, tegrastats
from hwprofiles.probe.tegrastats import Core, Unit, parse
from hwprofiles.reading import Absent, Failed, Reading
from tests.hwprofiles.test_probe import FIXTURES, GUEST, ORIN, value

OLDER = FIXTURES / "captured-jetson-older-tegrastats" / "lines"


def captured(board: str) -> tegrastats.Stats:
    return parse((OLDER / f"{board}.txt").read_text())


def test_captured_orin_nano_by_its_last_line() -> None:
    found = value(tegrastats.read(commands.runner_for(ORIN)))
    assert (found.ram_used_bytes, found.ram_total_bytes) == (2272 << 20, 7620 << 20)
    assert (found.largest_free_block_bytes, found.swap_used_bytes) == (4 << 20, 221 << 20)
    assert found.cores == (Core(0.0, 729e6),) * 6
    assert found.gpu == Unit(True, 0.0) and found.memory_controller is None
    assert found.temperatures_c["soc0"] == 56.0 and found.temperatures_c["cpu"] == 54.75
    assert found.rails_w == {"VDD_IN": 4.673, "VDD_CPU_GPU_CV": 0.527, "VDD_SOC": 1.339}
    assert found.unknown == ()


@pytest.mark.parametrize("board", sorted(path.stem for path in OLDER.iterdir()))
def test_nothing_of_a_captured_line_is_unknown(board: str) -> None:
    found = captured(board)
    assert found.unknown == () and not found.empty
    assert found.ram_total_bytes and found.cores and found.temperatures_c["PMIC"] == 100


def test_captured_cores_that_are_off_have_neither_load_nor_clock() -> None:
    assert captured("tx2").cores[1] == Core(None, None)
    assert captured("tx2").cores[5] == Core(0.02, 345e6)


def test_captured_rails_without_a_unit_are_no_engines() -> None:
    found = captured("agx-xavier")
    assert found.rails_w == {"GPU": 0.0, "CPU": 0.311, "SOC": 0.932, "CV": 0.0, "VDDRQ": 0.621, "SYS5V": 1.482}
    assert found.engines == {"APE": Unit(True, None, (150e6,))}
    assert found.gpu == Unit(True, 0.0, (318e6,)) and found.memory_controller == Unit(True, 0.0, (665e6,))


def test_captured_gpu_at_work() -> None:
    assert captured("xavier-nx").gpu == Unit(True, 0.62, (306e6,))


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("GR3D_FREQ 7%", Unit(True, 0.07)),
        ("GR3D_FREQ 7%@76", Unit(True, 0.07, (76e6,))),
        ("GR3D_FREQ 7%@[305]", Unit(True, 0.07, (305e6,))),
        ("GR3D_FREQ 7%@[1300,1301]", Unit(True, 0.07, (1300e6, 1301e6))),
        ("GR3D_FREQ @[0,0,0]", Unit(True, None, (0.0, 0.0, 0.0))),
        ("GR3D 52%@998", Unit(True, 0.52, (998e6,))),
        ("CPU [0%@1]", None),
    ],
)
def test_made_up_forms_of_the_gpu(text: str, unit: Unit | None) -> None:
    found = parse(f"RAM 1/2MB (lfb 1x512kB) {text} cpu@1C")
    assert found.gpu == unit and found.unknown == () and found.largest_free_block_bytes == 512 << 10


@pytest.mark.parametrize(
    ("text", "name", "unit"),
    [
        ("NVENC off", "NVENC", Unit(False)),
        ("NVENC 79%@166", "NVENC", Unit(True, 0.79, (166e6,))),
        ("NVENC 716", "NVENC", Unit(True, None, (716e6,))),
        ("NVENC0_FREQ @314", "NVENC0_FREQ", Unit(True, None, (314e6,))),
        ("PVA0_FREQ off", "PVA0_FREQ", Unit(False)),
        ("VIC_FREQ 115", "VIC_FREQ", Unit(True, None, (115e6,))),
    ],
)
def test_made_up_forms_of_engines(text: str, name: str, unit: Unit) -> None:
    found = parse(f"RAM 1/2MB (lfb 1x4MB) EMC_FREQ @4266 {text} tj@1C VDD_GPU 0mW/0mW")
    assert found.engines == {name: unit} and found.unknown == () and found.rails_w == {"VDD_GPU": 0.0}
    assert found.memory_controller == Unit(True, None, (4266e6,))


def test_made_up_form_with_peaks_takes_the_first_of_three_and_of_two() -> None:
    found = parse("01-02-2030 03:04:05 RAM 9/10MB cpu@47.5C/48C VIN 9000mW/4500mW/9100mW NC 0mW/0mW")
    assert found.temperatures_c == {"cpu": 47.5} and found.rails_w == {"VIN": 9.0} and found.unknown == ()


def test_made_up_sensor_that_is_off_is_absent() -> None:
    assert parse("RAM 1/2MB GPU@-256C CPU@-5.5C").temperatures_c == {"CPU": -5.5}


def test_made_up_oldest_form_has_one_clock_for_all_cores() -> None:
    found = parse("RAM 7/8MB SWAP 0/0MB (cached 0MB) cpu [14%,off]@1912 EMC 24%@1600 AVP 82%@13 VDE 0 EDP limit 1912")
    assert found.cores == (Core(0.14, 1912e6), Core(None, None))
    assert found.memory_controller == Unit(True, 0.24, (1600e6,)) and found.unknown == ()
    assert set(found.engines) == {"AVP", "VDE"}


def test_unknown_words_are_kept_and_cost_nothing_else() -> None:
    found = parse("RAM 1/2MB FLUX 9GW?? cpu@40C quantum[3] VDD_IN 5mW/5mW")
    assert found.unknown == ("FLUX", "9GW??", "quantum[3]")
    assert found.rails_w == {"VDD_IN": 0.005} and found.temperatures_c == {"cpu": 40.0}


_WORDS = st.sampled_from(
    [
        "RAM",
        "1/2MB",
        "(lfb",
        "4x4MB)",
        "CPU",
        "[1%@2,off]",
        "]@",
        "GR3D_FREQ",
        "0%@[1,2]",
        "@[",
        "off",
        "EMC_FREQ",
        "cpu@4C",
        "cpu@-256C",
        "VDD_IN",
        "1/1",
        "1mW/2mW/3mW",
        "NC",
        "IRAM",
        "0/252kB(lfb",
        "SWAP",
        "99999999999/9MB",
        "9e9",
        "\x00",
        "é",
        "MTS",
        "fg",
        "1%",
        "bg",
    ]
)


@given(st.lists(_WORDS | st.text(max_size=12), max_size=40).map(" ".join))
def test_any_line_is_read_without_an_error(line: str) -> None:
    found = parse(line)
    assert found.empty == (
        not (found.ram_total_bytes is not None or found.cores or found.temperatures_c or found.rails_w)
    )


def test_line_without_end_is_cut_and_read_quickly() -> None:
    assert parse("VDD_IN 1mW/" * 100_000).rails_w == {}
    assert parse("[" * 100_000).empty and parse("1%" * 100_000).empty


def test_program_that_is_missing_fails_or_prints_no_line_is_told_apart() -> None:
    assert isinstance(tegrastats.read(commands.runner_for(GUEST)), Absent)
    assert tegrastats.read(lambda command: Failed("x")) == Failed("x")
    assert isinstance(tegrastats.read(lambda command: Reading("usage: tegrastats", "t")), Failed)
    assert tegrastats.runs_on(ORIN) and not tegrastats.runs_on(GUEST)


def test_endless_program_is_stopped_and_what_it_said_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "COMMAND_DEADLINE_S", 0.3)
    monkeypatch.setattr(commands, "ENDLESS", ("sh",))
    assert commands.live(("sh", "-c", "echo RAM 1/2MB; sleep 9")) == Reading(
        "RAM 1/2MB", "sh -c echo RAM 1/2MB; sleep 9"
    )
    assert isinstance(commands.live(("sh", "-c", "sleep 9")), Failed)
