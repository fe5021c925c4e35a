"""What was measured is kept at once, under which conditions is not forgotten, and a load is put on idle boards only."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

from agent.jobs import Subject
from agent.joining import Found, joined
from agent.lifecycle import State
from agent.measuring import Measuring
from agent.store import Store
from agent.workers.pipe import BrokerLogin, MeasuredModule, MeasureNote, MeasureTask
from hwprofiles.profile import NOT_MEASURED, Profile, Snapshot, load, save
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.verdict import sections
from hwprofiles.samples import Ceilings
from hwprofiles.survey import Survey, survey
from tests.agent.fakes import DEVICE, SITE, FakeLauncher, Lab
from tests.agent.test_measuring import (
    GRAPH,
    ask,
    kit,
    lab,
    measured,
    module,
    obedient,
    obedient_again,
    profile,
    start,
    tasks,
)
from tests.agent.test_service import running
from tests.hwprofiles import examples
from tests.hwprofiles.test_heat import loaded, windows
from wire import topics
from wire.messages import DeviceState, decode

__all__ = ["lab"]


def one_and_then(launcher: FakeLauncher, *end: str) -> None:
    """The worker says its first module, and dies with these words or hangs."""

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, MeasuredModule(module=measured(task).modules[0]))
        for words in end:
            launcher.kill(worker, words)

    launcher.on_measure = answer


def test_a_module_is_on_the_disk_before_the_next_one_is_measured(lab: Lab) -> None:
    launcher = FakeLauncher()
    one_and_then(launcher)
    service = start(lab, launcher, module("a"), module("b"))
    kept = service.config.state_dir / "profile.json"
    lab.turn(kept.exists)
    assert [one["key"] for one in json.loads(kept.read_bytes())["modules"]] == ["a"]
    assert service.state is State.MEASURING and profile(lab) is None, "the job goes on"


def test_an_agent_that_was_killed_while_measuring_goes_on_with_the_next_module(lab: Lab) -> None:
    launcher = FakeLauncher()
    one_and_then(launcher)
    first = start(lab, launcher, module("a"), module("b"))
    lab.turn((first.config.state_dir / "profile.json").exists)
    first.close()  # as a kill: nothing is said, nothing is written
    lab.services.remove(first)
    again = obedient()
    second = lab.agent(again)
    lab.turn(lambda: second.state is State.SERVING)
    lab.publish(topics.KIT, kit(module("a"), module("b")))
    lab.turn(lambda: second.measured)
    assert [[item.module.key for item in task.modules] for task in tasks(again)] == [["b"]]
    found = profile(lab)
    assert found is not None and [one.key for one in found.modules] == ["a", "b"] and found.failed == {}


def test_a_worker_that_dies_leaves_what_it_had_said(lab: Lab) -> None:
    launcher = FakeLauncher()
    one_and_then(launcher, "killed: out of memory")
    start(lab, launcher, module("a"), module("b"))
    lab.turn(lambda: profile(lab) is not None)
    found = profile(lab)
    assert found is not None and [one.key for one in found.modules] == ["a"]
    assert found.failed == {"b": "killed: out of memory"}


def again(known: Profile | None, **changes: object) -> Profile:
    """A second job, on a board that is well, that measures nothing."""
    task = MeasureTask(device=DEVICE, site=SITE, modules=(), login=None, threads=1, speed=1.0)
    fields: dict[str, object] = {
        "result": measured(task, link=Absent("not asked for")), "failed": {}, "link_asked": False,
        "board_asked": False, "disturbed": False,
        "before": examples.snapshot(load=0.0), "now": examples.snapshot(load=0.0),
    }  # fmt: skip
    of = examples.profile()
    surveyed = Survey(of.identity, of.memory, of.cores, of.engines)
    return joined(known, Found(**{**fields, **changes}), surveyed, "", ())  # type: ignore[arg-type]


def test_modules_that_were_measured_on_a_busy_board_stay_invalid_when_it_is_well() -> None:
    busy = examples.profile(conditions=examples.conditions(load_before=3.5))
    found = again(busy)
    assert found.conditions.load_before == 0.0
    assert all("load of 3.5" in one.spoiled_because for one in found.modules)
    judged = {one.name: one for one in sections(found)}
    assert judged["conditions"].verdict == "VALID"
    spoilt = judged[f"module {found.modules[0].key}"]
    assert spoilt.verdict == "INVALID" and spoilt.because[0].startswith("conditions: load of 3.5")
    assert again(found).modules == found.modules, "and do not forget it"
    assert all(not one.spoiled_because for one in again(examples.profile()).modules)


def test_a_job_for_a_link_leaves_ceilings_and_load_as_they_were() -> None:
    known = examples.profile(
        ceilings=examples.ceilings(), disk=examples.disk(), codings=examples.codings(), sustained=loaded(*windows(9))
    )
    found = again(known)
    assert (found.ceilings, found.disk, found.sustained) == (known.ceilings, known.disk, known.sustained)
    assert found.codings == known.codings


def test_ceilings_are_asked_of_real_boards_and_once(lab: Lab) -> None:
    launcher = obedient(ceilings=Failed("no memory for it"))
    service = start(lab, launcher, module("a"))
    lab.turn(lambda: service.measured)
    lab.publish(topics.KIT, kit(module("a"), module("b")))
    lab.turn(lambda: len(profile(lab).modules) == 2)  # type: ignore[union-attr]
    assert [task.board for task in tasks(launcher)] == [True, False]
    assert tasks(launcher)[0].cache_folder == str(service.config.cache_dir / "artifacts")
    found = profile(lab)
    assert found is not None and found.ceilings == Failed("no memory for it")


def test_an_emulated_board_has_no_ceilings_of_its_own(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module("a"), emulate_speed=0.5)
    lab.turn(lambda: service.measured)
    assert [task.board for task in tasks(launcher)] == [False]
    found = profile(lab)
    assert found is not None and isinstance(found.ceilings, Absent) and "machine underneath" in found.ceilings.because


def test_a_profile_without_ceilings_gets_them_when_the_agent_starts(lab: Lab) -> None:
    launcher = obedient()
    first = start(lab, launcher, module("a"))
    lab.turn(lambda: first.measured)
    kept = first.config.state_dir / "profile.json"
    first.close()
    lab.services.remove(first)
    save(msgspec.structs.replace(load(kept), ceilings=NOT_MEASURED), kept)
    after = obedient(ceilings=examples.ceilings())
    second = lab.agent(after)
    lab.turn(lambda: second.state is State.SERVING)
    lab.publish(topics.KIT, kit(module("a")))
    lab.turn(lambda: second.measured)
    assert [(task.modules, task.board) for task in tasks(after)] == [((), True)]
    found = profile(lab)
    assert found is not None and isinstance(found.ceilings, Ceilings) and [one.key for one in found.modules] == ["a"]


# Continued load.


def test_a_load_is_a_job_of_its_own_and_leaves_the_modules_alone(lab: Lab) -> None:
    launcher = obedient(sustained=loaded(*windows(9)))
    service = start(lab, launcher, module("a"))
    lab.turn(lambda: service.measured)
    before = profile(lab)
    answer = ask(lab, "sustain", seconds=60)
    assert answer.ok and answer.result == {"windows": 30}
    task = tasks(launcher)[-1]
    assert (task.sustained_s, task.login, task.board, len(task.modules)) == (60.0, None, False, 1)
    found = profile(lab)
    assert found is not None and before is not None
    assert found == msgspec.structs.replace(before, sustained=loaded(*windows(9)))


@pytest.mark.parametrize("seconds", [0, 4, 1801, -1, "60", None, True, float("inf")])
def test_a_load_for_no_sensible_time_is_refused(lab: Lab, seconds: object) -> None:
    service = start(lab, obedient(), module("a"))
    lab.turn(lambda: service.measured)
    answer = ask(lab, "sustain", seconds=seconds)
    assert not answer.ok and "must be 5 to 1800" in answer.error


def test_a_board_that_runs_stages_is_not_put_under_load_and_measured_in_their_pauses(lab: Lab) -> None:
    launcher = obedient()
    running(lab, launcher)
    lab.store(lab.services[0], GRAPH)
    lab.publish(topics.KIT, kit(module("a")))
    lab.turn(lambda: lab.services[0].measured)
    assert [(task.yields, task.nice > 0) for task in tasks(launcher)] == [(True, True)]
    answer = ask(lab, "sustain", seconds=60)
    assert not answer.ok and "stages run on this board" in answer.error


def test_a_load_that_came_to_nothing_is_an_error_with_the_reason(lab: Lab) -> None:
    service = start(lab, obedient(sustained=Failed("no kernel for it")), module("a"))
    lab.turn(lambda: service.measured)
    answer = ask(lab, "sustain", seconds=10)
    assert not answer.ok and answer.error == "no kernel for it"


def test_progress_is_told_while_measuring(lab: Lab) -> None:
    launcher = FakeLauncher()
    launcher.on_measure = lambda worker, task: launcher.say(worker, MeasureNote(note="block (1 of 3)"))
    start(lab, launcher, module("a"))

    def last() -> DeviceState:
        return decode(lab.seen[topics.STATE.on(SITE, DEVICE)][-1], DeviceState, "")

    lab.turn(lambda: last().reason == "block (1 of 3)")
    assert last().state == "busy"


# Expiry.


def at_rest(tmp_path: Path, now: list[Snapshot]) -> tuple[Measuring, FakeLauncher]:
    """Measured once, on a board whose snapshot the test changes."""
    launcher = FakeLauncher()
    launcher.on_measure = obedient_again(launcher)
    subject = Subject(
        site=SITE, device=DEVICE, threads=1, speed=1.0, emulation="", budget_s=1.0, profile_path=tmp_path / "profile"
    )
    made = Measuring(
        subject, launcher, Store(tmp_path / "cache", 1 << 20), None,  # type: ignore[arg-type]
        lambda client_id: BrokerLogin(url="mqtt://memory:1", client_id=client_id), None,  # type: ignore[arg-type]
        lambda: survey(Path("/"), DEVICE), snapshot=lambda: now[0],
    )  # fmt: skip
    made.kit(kit(msgspec.structs.replace(module("a"), graphs=())))
    turn(made, launcher, 0.0)
    assert made.satisfied and len(tasks(launcher)) == 1
    return made, launcher


def turn(made: Measuring, launcher: FakeLauncher, now_s: float) -> None:
    made.step(now_s, "mqtt://memory:1", False)
    for event in launcher.drain():
        made.heard(event, now_s)


def test_a_board_whose_power_mode_changes_while_the_agent_runs_is_measured_again(tmp_path: Path) -> None:
    now = [examples.snapshot(at_unix=time.time())]
    made, launcher = at_rest(tmp_path, now)
    for at_s in range(0, 400, 10):
        turn(made, launcher, float(at_s))
    assert len(tasks(launcher)) == 1, "nothing changed"
    now[0] = examples.snapshot(at_unix=time.time(), power_mode=Reading("15W", "nvpmodel -q"))
    turn(made, launcher, 1000.0)
    assert len(tasks(launcher)) == 1, "seen once"
    turn(made, launcher, 1060.0)
    assert len(tasks(launcher)) == 2 and tasks(launcher)[-1].login is not None
    assert made.profile is not None and made.profile.conditions.power_mode == Reading("15W", "nvpmodel -q")


def test_a_governor_that_comes_and_goes_does_not_have_the_board_measure_for_ever(tmp_path: Path) -> None:
    now = [examples.snapshot(at_unix=time.time())]
    made, launcher = at_rest(tmp_path, now)
    for at_s in range(0, 7200, 5):
        name = ("ondemand", "performance")[at_s // 150 % 2]
        now[0] = examples.snapshot(at_unix=time.time(), governor=Reading(name, "x"))
        turn(made, launcher, float(at_s))
    assert 2 <= len(tasks(launcher)) <= 13


def test_a_replayed_profile_is_not_taken_for_the_boards_own(tmp_path: Path) -> None:
    now = [examples.snapshot(at_unix=time.time())]
    made, _ = at_rest(tmp_path, now)
    assert made.profile is not None
    save(msgspec.structs.replace(made.profile, source="replayed"), tmp_path / "profile")
    again, _ = at_rest(tmp_path, now)
    assert again.profile is not None and again.profile.source == "live", "it was measured anew"


def test_a_card_that_is_moved_to_another_board_is_measured_again(tmp_path: Path) -> None:
    now = [examples.snapshot(at_unix=time.time())]
    made, _ = at_rest(tmp_path, now)
    assert made.profile is not None
    identity = msgspec.structs.replace(made.profile.identity, board=Reading("Raspberry Pi 4 Model B", "x"))
    save(msgspec.structs.replace(made.profile, identity=identity), tmp_path / "profile")
    at_rest(tmp_path, now)  # one task: measured anew
