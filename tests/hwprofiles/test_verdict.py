"""Verdicts: what spoils a figure gives INVALID with the reason, what is not there is ABSENT, and the rest is VALID."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from hwprofiles import conditions
from hwprofiles.probe.commands import Runner, runner_for
from hwprofiles.profile import Profile, Samples
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.verdict import Section, in_all, run_because, sections
from tests.hwprofiles import examples
from tests.hwprofiles.test_probe import PI

QUIET = Reading("0x0: none", "vcgencmd get_throttled")


def good(**changes: Any) -> Profile:
    """A board that nothing can be said against."""
    base = examples.profile()
    block = msgspec.structs.replace(base.modules[0], timings=base.modules[0].timings[:-1])
    held = examples.conditions(throttle_before=QUIET, throttle_after=QUIET)
    return msgspec.structs.replace(base, **{"modules": (block, *base.modules[1:]), "conditions": held, **changes})


def with_run(samples: Samples) -> Profile:
    timing = msgspec.structs.replace(examples.timing(1.0), samples=samples)
    return good(modules=(examples.module("head", timing),))


def reasons(profile: Profile) -> str:
    """Why the board is INVALID; '' if it is VALID."""
    verdict, because = in_all(profile, sections(profile))
    assert (verdict == "INVALID") == bool(because)
    return "\n".join(because)


def section(profile: Profile, name: str) -> Section:
    [found] = [one for one in sections(profile) if one.name.startswith(name)]
    return found


def run_of(*values: float) -> Samples:
    return Samples(samples_s=values, warmup=2, stopped_because="x")


def test_a_quiet_board_is_valid_and_what_it_has_not_is_absent() -> None:
    assert reasons(good()) == ""
    found = {one.name: one.verdict for one in sections(good())}
    assert {found.pop(name) for name in ("ceilings", "disk", "energy", "sustained")} == {"ABSENT"}
    assert set(found.values()) == {"VALID"} and len(found) == 6


def test_too_few_samples_are_invalid() -> None:
    assert "5 samples, at least 6 are needed" in reasons(with_run(examples.samples(0.01, count=5)))
    assert reasons(with_run(examples.samples(0.01, count=6))) == ""
    assert "0 samples" in reasons(with_run(run_of()))


def test_drift_is_found_in_the_samples_whatever_the_board_said_of_them() -> None:
    rising = run_of(*(0.01 * (1 + 0.02 * at) for at in range(24)))
    assert rising.valid
    assert "drift: the last third took" in reasons(with_run(rising))
    shuffled = list(rising.samples_s)
    random.Random(1).shuffle(shuffled)
    assert "drift" not in reasons(with_run(run_of(*shuffled)))


def test_a_median_that_is_hardly_known_is_invalid() -> None:
    wide = run_of(*(0.010, 0.015) * 6)
    assert "wide interval: the median is known to 20% only" in reasons(with_run(wide))
    assert reasons(with_run(run_of(*(0.010, 0.0115) * 6))) == ""


def test_two_populations_are_invalid() -> None:
    assert "spread: p90 is 3.0 times the median" in reasons(with_run(run_of(*(0.01, 0.01, 0.01, 0.01, 0.03) * 6)))


def test_what_the_board_called_invalid_stays_so_and_is_told_once() -> None:
    said = msgspec.structs.replace(examples.samples(0.01), valid=False, invalid_because="the board was busy")
    assert "the board was busy" in reasons(with_run(said))
    rising = msgspec.structs.replace(
        run_of(*(0.01 * (1 + 0.02 * at) for at in range(24))), valid=False, invalid_because="drift: 1.4 times"
    )
    assert run_because(rising) == ("drift: 1.4 times",)


def test_a_board_under_load_is_invalid_with_the_load() -> None:
    held = good().conditions
    busy = good(conditions=msgspec.structs.replace(held, load_before=2.1))
    assert reasons(busy) == "conditions: load of 2.1 on 4 cores before measuring"
    assert reasons(good(conditions=msgspec.structs.replace(held, load_before=1.9))) == ""


def pi_that_says(word: str) -> Runner:
    def run(command: tuple[str, ...]) -> Reading[str] | Absent | Failed:
        return Reading(f"throttled={word}", "vcgencmd get_throttled")

    return run


def replayed(before: Runner, after: Runner) -> Profile:
    """A Raspberry Pi's tree, recorded, with what its firmware said before and after measuring."""
    held = conditions.join(conditions.snapshot(PI, before), conditions.snapshot(PI, after), False)
    return good(source="replayed", conditions=held)


def test_a_throttled_board_replayed_is_invalid_with_what_its_firmware_said() -> None:
    found = section(replayed(runner_for(PI), runner_for(PI)), "conditions")
    assert found.verdict == "INVALID"
    assert found.because[0].startswith("throttled before measuring: 0x50005: under-voltage now")
    cool = replayed(pi_that_says("0x0"), pi_that_says("0x0"))
    assert section(cool, "conditions").verdict == "VALID"
    assert reasons(cool) == "replayed from a recording: not measured now"


def test_a_board_that_throttled_only_while_it_was_measured_is_found_by_its_memory_since_boot() -> None:
    found = section(replayed(pi_that_says("0x10000"), pi_that_says("0x50000")), "conditions")
    assert found.because == ("throttled while measuring: throttled had not happened before",)
    assert section(replayed(pi_that_says("0x50000"), pi_that_says("0x50000")), "conditions").verdict == "VALID"


def test_an_emulated_board_is_never_valid_though_its_parts_may_be() -> None:
    emulated = good(source="emulated", emulation="speed 0.25")
    assert reasons(emulated) == "emulated (speed 0.25): not a real board's speed"
    assert section(emulated, "link").verdict == "VALID"


def test_links_and_modules_that_failed_are_invalid_and_those_that_are_absent_are_not() -> None:
    assert "link: no route" in reasons(good(link=Failed("no route")))
    assert reasons(good(link=Absent("no broker"))) == ""
    assert section(good(link=Absent("no broker")), "link").verdict == "ABSENT"
    assert "module x: not measured: no kernel" in reasons(good(failed={"x": "no kernel"}))
    assert "no module was measured" in reasons(good(modules=()))


def test_few_goodput_runs_are_enough_and_three_are_the_least() -> None:
    link = examples.link()
    few = msgspec.structs.replace(link, goodput=examples.samples(0.05, count=2))
    assert reasons(good(link=msgspec.structs.replace(link, goodput=examples.samples(0.05, count=3)))) == ""
    assert "2 samples, at least 3 are needed" in reasons(good(link=few))


@pytest.mark.parametrize(("count", "known"), [(28, 0), (29, 1), (58, 1), (59, 2), (298, 2), (299, 3)])
def test_percentiles_stand_in_the_figures_from_their_least_samples_on(count: int, known: int) -> None:
    [run] = section(with_run(examples.samples(0.01, count=count)), "module").figures
    assert [value is not None for value in (run.p90_s, run.p95_s, run.p99_s)] == [at < known for at in range(3)]
