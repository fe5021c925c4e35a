"""A profile survives being kept and sent, is never half written, and says when it no longer holds."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles.profile import (
    FEWEST_KEPT,
    KEPT_SAMPLES,
    MAX_AGE_S,
    MAX_FILE_BYTES,
    MAX_PROFILE_BYTES,
    ModuleTiming,
    Profile,
    Samples,
    compact,
    digest,
    encode,
    expired,
    load,
    save,
)
from hwprofiles.reading import Absent, Failed, Reading
from tests.hwprofiles import examples
from wire import messages
from wire.errors import CorruptData, PeerError, Refused, UsageError
from wire.limits import MAX_CONTROL_BYTES


def large(modules: int, timings: int, samples: int) -> Profile:
    timing = ModuleTiming(
        phase="decode", tokens=1, context=0, stack=1, samples=examples.samples(0.0123456789, count=samples)
    )
    return examples.profile(modules=(examples.module("block", *[timing] * timings),) * modules)


def test_profile_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "profile.json"
    kept = compact(examples.profile())
    save(examples.profile(), path)
    assert load(path) == kept
    assert digest(load(path)) == digest(examples.profile())
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


def test_absent_failed_and_read_values_stay_three_different_things(tmp_path: Path) -> None:
    held = examples.conditions(
        quota_cores=Reading(0.25, "/sys/fs/cgroup/cpu.max"),
        governor=Absent("no cpufreq"),
        throttle_before=Failed("EACCES /sys/x"),
    )
    save(examples.profile(conditions=held, link=Failed("no broker")), tmp_path / "p")
    back = load(tmp_path / "p")
    assert back.conditions == held and back.link == Failed("no broker")


def test_rounding_keeps_a_tenth_of_a_microsecond() -> None:
    kept = compact(examples.profile(modules=(examples.module("head", examples.timing(0.001234567891)),)))
    for value in kept.modules[0].timings[0].samples.samples_s:
        assert value == round(value, 7)


def test_long_runs_are_thinned_evenly_and_say_how_many_were_taken() -> None:
    values = tuple(float(at) for at in range(1000))
    timing = ModuleTiming(
        phase="decode",
        tokens=1,
        context=0,
        stack=1,
        samples=Samples(samples_s=values, warmup=0, stopped_because="x"),
    )
    kept = compact(examples.profile(modules=(examples.module("head", timing),))).modules[0].timings[0].samples
    assert len(kept.samples_s) == KEPT_SAMPLES and kept.taken == 1000
    assert kept.samples_s[0] == 0 and kept.samples_s[-1] >= 990


def test_largest_profile_passes_as_a_control_message() -> None:
    profile = large(modules=12, timings=12, samples=200)
    assert len(msgspec.json.encode(profile)) > MAX_PROFILE_BYTES
    assert len(encode(profile)) <= MAX_PROFILE_BYTES
    assert len(messages.encode(compact(profile))) <= MAX_CONTROL_BYTES
    runs = [timing.samples for module in compact(profile).modules for timing in module.timings]
    assert all(FEWEST_KEPT <= len(run.samples_s) < 200 and run.taken == 200 for run in runs)


def test_profile_that_cannot_be_kept_small_is_refused_with_a_hint() -> None:
    with pytest.raises(Refused, match="200 modules") as caught:
        compact(large(modules=200, timings=12, samples=12))
    assert caught.value.try_


def test_compacting_twice_changes_nothing() -> None:
    once = compact(large(modules=12, timings=12, samples=200))
    assert compact(once) == once


def test_missing_profile_is_the_users_matter_and_a_damaged_one_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no profile"):
        load(tmp_path / "none")
    for text in (b"", b"{", b"[]", b"\xff\xfe", b'{"schema":"edgelam.profile/2"}', encode(examples.profile())[:-20]):
        (tmp_path / "p").write_bytes(text)
        with pytest.raises(CorruptData):
            load(tmp_path / "p")
    (tmp_path / "p").write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(CorruptData, match="larger"):
        load(tmp_path / "p")


def test_failure_while_saving_keeps_the_old_profile_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p"
    save(examples.profile(), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(examples.profile(emulation="other"), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        (("modules", 0, "timings", 0, "samples", "samples_s"), [-1.0]),
        (("modules", 0, "timings", 0, "samples", "samples_s"), [1e300]),
        (("modules", 0, "timings", 0, "samples", "samples_s"), [0.1] * 3000),
        (("modules", 0, "timings", 0, "stack"), 0),
        (("modules", 0, "timings", 0, "phase"), "dream"),
        (("modules", 0, "resident_bytes"), -5),
        (("link", "goodput_chunk_bytes"), 0),
        (("cores", "usable"), 0),
        (("memory", "usable_bytes"), -1),
        (("schema",), "edgelam.profile/9"),
    ],
)
def test_profile_from_the_network_with_an_impossible_value_is_a_peer_error(path: tuple[Any, ...], bad: Any) -> None:
    document: Any = msgspec.json.decode(encode(examples.profile()))
    place = document
    for step in path[:-1]:
        place = place[step]
    assert path[-1] in place
    place[path[-1]] = bad
    with pytest.raises(PeerError):
        messages.decode(msgspec.json.encode(document), Profile, "profile of pi5")


@given(st.integers(0, 4000), st.integers(0, 255))
def test_any_changed_byte_gives_a_profile_or_a_peer_error(at: int, value: int) -> None:
    data = bytearray(encode(examples.profile()))
    data[at % len(data)] = value
    with contextlib.suppress(PeerError):
        messages.decode(bytes(data), Profile, "profile of pi5")


def why(now: Any = None, emulation: str = "", memory: Any = None, later_s: float = 60.0) -> str:
    profile = examples.profile()
    return expired(
        profile,
        profile.conditions.measured_at_unix + later_s,
        now or examples.snapshot(),
        memory or profile.memory,
        emulation,
    )


def test_profile_holds_while_nothing_that_sets_the_speed_changes() -> None:
    assert why() == ""
    assert why(examples.snapshot(load=9.0, temperature_c=Absent("gone"), quota_cores=Absent("other words"))) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"software": "0.2.0"}, "software changed from 0.1.0 to 0.2.0"),
        ({"engine_versions": {"onnxruntime": "1.32"}}, "engines changed from onnxruntime 1.31.1 to onnxruntime 1.32"),
        ({"kernel": "7.0"}, "kernel"),
        ({"affinity": (0,)}, "allowed cores"),
        ({"quota_cores": Reading(0.25, "x")}, "processor quota changed from none to 0.25"),
        ({"quota_period_s": Reading(0.1, "x")}, "quota period"),
        ({"governor": Reading("powersave", "x")}, "governor changed from ondemand to powersave"),
        ({"power_mode": Reading("15W", "nvpmodel -q")}, "power mode changed from none to 15W"),
    ],
)
def test_profile_expires_when_what_it_was_measured_with_changes(changes: dict[str, Any], said: str) -> None:
    assert said in why(examples.snapshot(**changes))


def test_profile_expires_with_emulation_memory_limit_and_age() -> None:
    assert "emulation changed from none to speed 0.5" in why(emulation="speed 0.5")
    limited = msgspec.structs.replace(examples.profile().memory, limit_bytes=Reading(10, "set by the user"))
    assert "memory limit" in why(memory=limited)
    assert "days ago" in why(later_s=MAX_AGE_S + 1)
    assert "clock of the board" in why(later_s=-MAX_AGE_S - 1)
