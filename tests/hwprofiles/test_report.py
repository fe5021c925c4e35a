"""Reports say everything the profile says, at any width, and never show an emulated figure as measured.

Goldens are in tests/hwprofiles/golden; `EDGELAM_WRITE_GOLDENS=1 pytest tests/hwprofiles/test_report.py` writes them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import pytest

from hwprofiles.profile import Profile, Samples
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report import markdown, plain, rows, warnings
from tests.hwprofiles import examples

GOLDEN = Path(__file__).parent / "golden"


def emulated() -> Profile:
    return examples.profile(
        source="emulated",
        emulation="speed 0.25, memory 512 MB",
        conditions=examples.conditions(
            quota_cores=Reading(0.25, "/sys/fs/cgroup/cpu.max"),
            quota_period_s=Reading(0.1, "/sys/fs/cgroup/cpu.max"),
            allow_spinning=True,
            throttle_before=Reading("0x5: under-voltage now, throttled now", "vcgencmd get_throttled"),
            load_before=9.5,
        ),
        modules=(),
        link=Failed("mqtt://10.0.0.5:1883: not connected after 5 s (connection refused)"),
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("live.md", markdown(examples.profile())),
        ("emulated.md", markdown(emulated())),
        *[(f"live-{width}.txt", plain(examples.profile(), width)) for width in (30, 40, 60, 80, 120, 200)],
        ("emulated-80.txt", plain(emulated(), 80)),
    ],
)
def test_report_is_as_agreed(name: str, text: str) -> None:
    if os.environ.get("EDGELAM_WRITE_GOLDENS"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize("width", range(20, 201))
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    assert max(map(len, plain(examples.profile(), width).splitlines())) <= width


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_every_verdict_and_reason_is_there_at_any_width(width: int) -> None:
    words = " ".join(plain(examples.profile(), width).split())
    for said in ("INVALID: drift:", "1.27 times", "torch is not installed", "no control group", "VALID"):
        assert said.replace(" ", "") in words.replace(" ", ""), said


def test_origin_stands_first_and_emulated_or_replayed_is_never_called_measured() -> None:
    for source, said in (("live", "measured live"), ("emulated", "EMULATED (speed"), ("replayed", "REPLAYED")):
        profile = msgspec.structs.replace(emulated(), source=source)
        for text in (plain(profile, 100), markdown(profile)):
            assert said in text.splitlines()[0]
            assert (source == "live") == ("measured live" in text)


def test_conditions_that_spoil_figures_are_warned_of() -> None:
    said = "\n".join(warnings(emulated()))
    assert "processor quota with a period of 100.0 ms" in said and "10.0 ms or less" in said
    assert "allow_spinning is on" in said
    assert "throttled before measuring: 0x5: under-voltage now" in said
    assert "load of 9.5 on 4 cores" in said


def test_good_conditions_are_not_warned_of() -> None:
    profile = examples.profile(
        conditions=examples.conditions(
            quota_cores=Reading(0.25, "x"), quota_period_s=Reading(0.01, "x"), throttle_after=Absent("x")
        ),
        modules=(),
    )
    assert warnings(profile) == ()


def test_round_trip_of_delayed_acknowledgements_is_flagged_by_name() -> None:
    slow = msgspec.structs.replace(examples.link(), round_trip=examples.samples(0.044))
    assert any("Nagle" in said for said in warnings(examples.profile(link=slow, modules=())))
    slow = msgspec.structs.replace(examples.link(), round_trip=examples.samples(0.060))
    assert not any("Nagle" in said for said in warnings(examples.profile(link=slow, modules=())))


def test_percentiles_without_enough_samples_are_not_shown() -> None:
    few = examples.timing(0.001)
    few = msgspec.structs.replace(few, samples=examples.samples(0.001, count=5))
    table = rows(examples.profile(modules=(examples.module("head", few),)))[3]
    assert table.rows[0][4:7] == ("-", "-", "5")


def test_thinned_samples_and_outliers_are_told() -> None:
    values = (0.010, 0.0101, 0.0099, 0.0102, 0.050, 0.0098, 0.010)
    run = Samples(samples_s=values, warmup=0, stopped_because="x", taken=900)
    table = rows(
        examples.profile(modules=(examples.module("head", msgspec.structs.replace(examples.timing(1), samples=run)),))
    )[3]
    assert table.rows[0][-2:] == ("7 of 900", "INVALID: wide interval: the median is known to 201% only, 1 outliers")


def test_profile_without_any_sample_is_still_shown() -> None:
    empty = Samples(samples_s=(), warmup=0, stopped_because="", valid=False, invalid_because="")
    timing = msgspec.structs.replace(examples.timing(1), samples=empty)
    dead = msgspec.structs.replace(examples.link(), round_trip=empty, goodput=empty)
    profile = examples.profile(
        modules=(examples.module("block", timing, msgspec.structs.replace(timing, stack=6)),), link=dead
    )
    assert "INVALID: no reason given" in plain(profile, 100)
    assert "INVALID: no samples" in markdown(profile)


def test_text_from_a_board_reaches_neither_terminal_nor_document_as_commands() -> None:
    evil = "\x1b[2J\x07boom|<script>`x`\n# title\u202e"
    profile = examples.profile(
        identity=msgspec.structs.replace(
            examples.profile().identity, board=Reading(evil, "x"), device=evil, os=Absent(evil)
        ),
        emulation=evil,
        engines={evil: Failed(evil)},
        modules=(msgspec.structs.replace(examples.module("head", examples.timing(1)), key=evil),),
    )
    for text in (plain(profile, 100), markdown(profile)):
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "\n# title" not in text
    assert not re.search(r"(?<!\\)<script", markdown(profile))


def test_own_words_are_ascii() -> None:
    assert plain(examples.profile(), 80).isascii() and markdown(emulated()).isascii()


def test_power_mode_and_all_modes_are_told_where_a_board_has_them() -> None:
    made = examples.profile(conditions=examples.conditions(power_mode=Reading("15W", "nvpmodel -q")))
    identity = msgspec.structs.replace(made.identity, power_modes=Reading(("15W", "7W"), "nvpmodel -p --verbose"))
    said = markdown(msgspec.structs.replace(made, identity=identity))
    assert "| power mode | 15W |" in said and "| power modes | 15W, 7W |" in said
    assert "power mode" not in markdown(examples.profile())
