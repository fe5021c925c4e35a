"""Comparisons: ratios with intervals that hold, unlike conditions refused by name, and never two bare figures."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from hwprofiles import stats
from hwprofiles.profile import ModuleMeasurement, Profile, Samples
from hwprofiles.reading import Absent, Reading
from hwprofiles.report.compare import Comparison, compare, part, ratio_interval
from hwprofiles.report.document import make
from hwprofiles.report.render import markdown_of, plain_of
from tests.hwprofiles import examples
from tests.hwprofiles.test_verdict import good
from wire.errors import Refused


def compared(a: Profile, b: Profile, anyway: bool = False) -> Comparison:
    return compare(make([a], 0.0).boards[0], make([b], 0.0).boards[0], anyway)


def times(profile: Profile, factor: float) -> Profile:
    """The board with modules that take so many times as long."""
    return msgspec.structs.replace(profile, modules=tuple(stretched(module, factor) for module in profile.modules))


def stretched(module: ModuleMeasurement, factor: float) -> ModuleMeasurement:
    timings = []
    for timing in module.timings:
        values = tuple(value * factor for value in timing.samples.samples_s)
        timings.append(
            msgspec.structs.replace(timing, samples=msgspec.structs.replace(timing.samples, samples_s=values))
        )
    return msgspec.structs.replace(module, timings=tuple(timings))


def held(**changes: Any) -> Profile:
    return good(conditions=msgspec.structs.replace(good().conditions, **changes))


def test_a_board_twice_as_fast_takes_half_the_time_and_the_link_is_as_it_was() -> None:
    found = compared(good(), times(good(), 0.5))
    assert found.verdict == "VALID" and found.unlike == ()
    modules = [one for one in found.ratios if one.part != "link"]
    assert len(modules) == 7
    for one in modules:
        assert one.ratio == pytest.approx(0.5, rel=0.01)
        assert one.low is not None and one.high is not None and one.low <= 0.5 <= one.high < 0.55
    [round_trip] = [one for one in found.ratios if one.what.startswith("round trip")]
    assert round_trip.ratio == 1.0
    text = " ".join(plain_of(part(found), 160).split())
    assert "VALID, B is faster" in text and "VALID, no difference shown" in text
    assert "B is slower" in markdown_of(part(compared(times(good(), 0.5), good())))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            good(source="emulated", emulation="speed 0.5"),
            "source: live against emulated; emulation: none against speed",
        ),
        (held(engine_versions={"onnxruntime": "1.23.2"}), "engines: onnxruntime 1.31.1 against onnxruntime 1.23.2"),
        (held(governor=Reading("performance", "x")), "governor: ondemand against performance"),
        (held(power_mode=Reading("15W", "nvpmodel -q")), "power mode: none against 15W"),
        (held(governor=Absent("x")), "governor: ondemand against none"),
        (held(quota_cores=Reading(0.5, "x"), quota_period_s=Reading(0.01, "x")), "processor quota: none against 0.5"),
        (held(software="0.0.9"), "software: 0.1.0 against 0.0.9"),
        (held(allow_spinning=True), "spinning: off against on"),
        (held(throttle_after=Reading("0x4: throttled now", "x")), "throttling: none seen against seen"),
        (held(load_before=3.0), "load: low against high"),
        (good(cores=msgspec.structs.replace(good().cores, usable=2.0)), "usable cores: 4 against 2"),
        (
            good(modules=tuple(msgspec.structs.replace(module, threads=4) for module in good().modules)),
            "threads of llama/576/block/q4/f32: 1 against 4",
        ),
        (
            good(modules=tuple(msgspec.structs.replace(module, engine="torch") for module in good().modules)),
            "engine of llama/576/head/q4/f32: onnxruntime 1.31.1 CPUExecutionProvider against torch",
        ),
        (
            good(
                modules=tuple(
                    msgspec.structs.replace(module, key=module.key.replace("/q4/", "/f32/"))
                    for module in good().modules
                )
            ),
            "block: llama/576/block/q4/f32 against llama/576/block/f32/f32",
        ),
    ],
    ids=lambda given: given[:24] if isinstance(given, str) else "",
)
def test_unlike_conditions_are_refused_by_name_and_told_when_compared_anyway(other: Profile, said: str) -> None:
    with pytest.raises(Refused) as refused:
        compared(good(), other)
    assert said in refused.value.message and "--anyway" in refused.value.try_
    found = compared(good(), other, anyway=True)
    assert found.verdict == "INVALID"
    what = said.partition(":")[0]
    assert any(one.what == what for one in found.unlike)
    text = plain_of(part(found), 120)
    assert text.splitlines()[0].endswith("INVALID")
    assert f"unlike conditions: {what}" in " ".join(text.split())
    assert all(one.ratio is not None for one in found.ratios)


def test_what_comes_with_another_board_is_told_and_does_not_stop_the_comparison() -> None:
    base = good()
    other = msgspec.structs.replace(
        good(
            identity=msgspec.structs.replace(base.identity, device="pi4", board=Reading("Raspberry Pi 4", "x")),
            cores=msgspec.structs.replace(base.cores, usable=2.0),
        ),
        conditions=msgspec.structs.replace(base.conditions, kernel="6.6.1"),
    )
    found = compared(base, other)
    assert {one.what for one in found.also} == {"board", "kernel"}
    assert found.verdict == "VALID"


def test_two_boards_alike_in_being_throttled_or_emulated_are_compared_and_invalid() -> None:
    hot = held(throttle_before=Reading("0x4: throttled now", "x"))
    assert "A: throttled before measuring: 0x4: throttled now" in compared(hot, times(hot, 0.5)).because
    virtual = good(source="emulated", emulation="speed 0.5")
    assert "B: emulated (speed 0.5): not a real board's speed" in compared(virtual, virtual).because


def test_a_run_that_is_invalid_gives_an_invalid_ratio_with_the_side_at_fault() -> None:
    drifting = Samples(samples_s=tuple(0.01 * (1 + 0.02 * at) for at in range(24)), warmup=2, stopped_because="x")
    head = good().modules[2]
    worse = msgspec.structs.replace(head, timings=(msgspec.structs.replace(head.timings[0], samples=drifting),))
    found = compared(good(), good(modules=(*good().modules[:2], worse)))
    [one] = [one for one in found.ratios if "head" in one.part]
    assert one.verdict == "INVALID" and one.because[0].startswith("B: drift")
    assert found.verdict == "VALID"


def test_without_samples_for_an_interval_there_is_no_valid_ratio() -> None:
    [goodput] = [one for one in compared(good(), good()).ratios if "there and back" in one.what]
    assert (goodput.verdict, goodput.low) == ("INVALID", None)
    assert goodput.because == ("5 samples, an interval takes 6",)
    zeros = msgspec.structs.replace(good().modules[2].timings[0], samples=examples.samples(0.0))
    still = good(modules=(examples.module("head", zeros),), link=Absent("x"))
    assert compared(still, still).because == ("no ratio is valid",)


def test_modules_of_one_side_are_named_and_nothing_in_common_is_refused() -> None:
    alone = good(modules=good().modules[:1])
    found = compared(good(), alone)
    assert found.only_a == ("llama/576/embedding/q4/f32", "llama/576/head/q4/f32") and found.only_b == ()
    assert "llama/576/head/q4/f32" in plain_of(part(found), 120)
    with pytest.raises(Refused, match="nothing in common"):
        compared(good(link=Absent("x")), good(link=Absent("x"), modules=()))


def test_links_with_other_loads_are_not_compared() -> None:
    smaller = good(link=msgspec.structs.replace(examples.link(), goodput_payload_bytes=65536))
    assert not [one for one in compared(good(), smaller).ratios if "there and back" in one.what]


def test_modules_on_two_engines_are_compared_engine_by_engine() -> None:
    base = good().modules[2]
    torch = stretched(msgspec.structs.replace(base, engine="torch"), 3.0)
    found = compared(good(modules=(base, torch)), good(modules=(torch, base)))
    assert [one.ratio for one in found.ratios if one.part != "link"] == [1.0, 1.0]


def test_the_same_samples_give_the_same_interval() -> None:
    assert compared(good(), times(good(), 0.9)) == compared(good(), times(good(), 0.9))
    a, b = [0.01 + at * 1e-3 for at in range(20)], [0.02 + at**2 * 1e-4 for at in range(20)]
    assert ratio_interval(a, b, seed=1) == ratio_interval(a, b, seed=1) != ratio_interval(a, b, seed=2)


@pytest.mark.parametrize("count", [12, 40])
def test_intervals_hold_the_true_ratio_as_often_as_they_say(count: int) -> None:
    """300 comparisons of skewed times whose medians are known to be 0.8 apart: 95 % of the intervals should hold it.
    Fewer than 90 % would be chance once in 10 000 times."""
    dice, held_it = random.Random(count), 0
    for trial in range(300):
        a = [0.010 * dice.lognormvariate(0, 0.1) for _ in range(count)]
        b = [0.008 * dice.lognormvariate(0, 0.1) for _ in range(count)]
        interval = ratio_interval(a, b, seed=trial)
        assert interval is not None and interval.low <= stats.median(b) / stats.median(a) <= interval.high
        held_it += interval.low <= 0.8 <= interval.high
    assert held_it >= 270


def test_text_from_boards_reaches_no_terminal_as_commands() -> None:
    evil = "\x1b[2J|<script>\n"
    base = good()
    bad = good(
        identity=msgspec.structs.replace(base.identity, device=evil, board=Reading(evil, "x")),
        modules=(msgspec.structs.replace(base.modules[2], key=evil, engine=evil), *base.modules[:2]),
        source="emulated",
        emulation=evil,
    )
    with pytest.raises(Refused) as refused:
        compared(base, bad)
    text = plain_of(part(compared(base, bad, anyway=True)), 100)
    for shown in (refused.value.message, text):
        assert all(character.isprintable() or character == "\n" for character in shown)
