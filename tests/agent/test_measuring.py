"""Taking the device's measure: when, of what, and what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.jobs import Subject
from agent.joining import engines_in_words
from agent.lifecycle import State
from agent.measuring import Measuring
from agent.store import Store
from agent.workers.pipe import BrokerLogin, Measured, MeasureNote, MeasureTask
from hwprofiles.profile import (
    Goodput,
    LinkMeasurement,
    ModuleMeasurement,
    ModuleTiming,
    PairMeasurement,
    Profile,
    Samples,
)
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.render import markdown
from hwprofiles.survey import Survey, survey
from tests.agent.fakes import DEVICE, SITE, FakeLauncher, Lab, ref_of
from wire import topics
from wire.messages import Command, DeviceState, Kit, KitModule, Reply, decode

GRAPH = b"the graph of a block"
RUN = Samples(samples_s=(0.001,) * 12, warmup=3, stopped_because="enough")
LINK = LinkMeasurement(
    broker="mqtt://memory:1", round_trip_payload_bytes=1200, round_trip=RUN,
    goodput_payload_bytes=512, goodput_chunk_bytes=64, goodput=RUN,
)  # fmt: skip


def module(key: str = "block", graph: bytes = GRAPH) -> KitModule:
    return KitModule(key=key, kind="block", graphs=((1, ref_of(graph)),), hidden=8, vocabulary=32, wire_dtype="f32")


def kit(*modules: KitModule) -> Kit:
    return Kit(artifacts_url="http://127.0.0.1:1", modules=modules)


def measured(task: MeasureTask, **changes: object) -> Measured:
    found = tuple(
        ModuleMeasurement(
            key=item.module.key, kind="block", engine="onnxruntime", threads=task.threads,
            timings=(ModuleTiming(phase="decode", tokens=1, context=16, stack=1, samples=RUN),),
            resident_bytes=1, base_bytes=1,
        )
        for item in task.modules
    )  # fmt: skip
    fields: dict[str, object] = {
        "modules": found, "failed": {}, "link": LINK, "allow_spinning": False,
        "engines_loaded": {"onnxruntime": "onnxruntime 1 CPUExecutionProvider"} if found else {},
    }  # fmt: skip
    return Measured(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path):  # type: ignore[no-untyped-def]
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def obedient(**changes: object) -> FakeLauncher:
    """Measuring workers that answer at once and end."""
    launcher = FakeLauncher()

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, MeasureNote(note="at it"))
        launcher.say(worker, measured(task, **changes))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    return launcher


def obedient_again(launcher: FakeLauncher) -> Callable[[int, MeasureTask], None]:
    """Measure all from now on."""

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, measured(task))
        launcher.kill(worker, "ended with exit code 0")

    return answer


def profile(lab: Lab) -> Profile | None:
    found = lab.retained(topics.PROFILE, Profile)
    assert found is None or isinstance(found, Profile)
    return found


def start(lab: Lab, launcher: FakeLauncher, *modules: KitModule, **changes: object):  # type: ignore[no-untyped-def]
    service = lab.agent(launcher, **changes)
    lab.store(service, GRAPH)
    lab.turn(lambda: service.state is State.SERVING)
    lab.publish(topics.KIT, kit(*modules))
    return service


def tasks(launcher: FakeLauncher) -> list[MeasureTask]:
    return [task for task in launcher.assignments.values() if isinstance(task, MeasureTask)]


def test_a_kit_is_measured_and_the_profile_published_and_kept(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module("a"), module("b"))
    lab.turn(lambda: profile(lab) is not None)
    found = profile(lab)
    assert found is not None and [m.key for m in found.modules] == ["a", "b"]
    assert isinstance(found.link, LinkMeasurement) and found.source == "live"
    assert found.engines["onnxruntime"] == Reading(
        "onnxruntime 1 CPUExecutionProvider", "loaded by the measuring worker"
    )
    assert (service.config.state_dir / "profile.json").exists() and service.measured
    said = [decode(data, DeviceState, "").state for data in lab.seen[topics.STATE.on(SITE, DEVICE)]]
    assert "busy" in said and said[-1] == "online"


def test_the_profile_says_of_each_engine_what_was_measured_or_why_it_was_not(lab: Lab) -> None:
    start(lab, obedient(), module("a"))
    lab.turn(lambda: profile(lab) is not None)
    known = profile(lab)
    board = {
        "onnxruntime": Reading("1", "/opt"), "torch": Reading("2.13.0", "/opt"),
        "tensorrt": Absent("tensorrt is not installed"),
    }  # fmt: skip
    loaded = {"onnxruntime": "onnxruntime 1 CPUExecutionProvider"}
    said = engines_in_words(board, loaded, None, {})
    assert said["onnxruntime"] == Reading(loaded["onnxruntime"], "loaded by the measuring worker")
    torch = said["torch"]
    assert (
        isinstance(torch, Absent)
        and "not measured, though torch 2.13.0 is installed: it is the reference" in torch.because
    )
    assert said["tensorrt"] == board["tensorrt"]
    assert engines_in_words(board, {}, known, {})["onnxruntime"] == said["onnxruntime"], "a link alone"
    assert engines_in_words(board, {}, known, {"tensorrt": "no GPU"})["tensorrt"] == Failed("no GPU")
    loaded["onnxruntime-cuda"] = "onnxruntime 1 CUDAExecutionProvider"
    assert engines_in_words(board, loaded, None, {})["onnxruntime-cuda"].value == loaded["onnxruntime-cuda"]  # type: ignore[union-attr]
    assert known is not None and torch.because in markdown(msgspec.structs.replace(known, engines=said))


def test_only_what_is_new_in_a_kit_is_measured(lab: Lab) -> None:
    launcher = obedient()
    start(lab, launcher, module("a"))
    lab.turn(lambda: profile(lab) is not None)
    lab.publish(topics.KIT, kit(module("a"), module("b")))
    lab.turn(lambda: len(profile(lab).modules) == 2)  # type: ignore[union-attr]
    assert [[item.module.key for item in task.modules] for task in tasks(launcher)] == [["a"], ["b"]]


def test_a_restart_needs_no_measuring(lab: Lab) -> None:
    first = start(lab, obedient(), module("a"))
    lab.turn(lambda: first.measured)
    first.stop()
    lab.turn(lambda: first.state is State.STOPPED)
    first.close()
    lab.broker.stop()
    lab.broker.start()
    launcher = obedient()
    second = lab.agent(launcher)
    lab.turn(lambda: second.state is State.SERVING and profile(lab) is not None)
    lab.publish(topics.KIT, kit(module("a")))
    lab.turn(lambda: second.measured)
    assert tasks(launcher) == []


@pytest.mark.parametrize("changes", [{"emulate_speed": 0.5}, {"emulate_memory_bytes": 10**8}, {"threads": 7}])
def test_a_changed_device_is_measured_again(lab: Lab, changes: dict[str, object]) -> None:
    first = start(lab, obedient(), module("a"))
    lab.turn(lambda: first.measured)
    first.stop()
    lab.turn(lambda: first.state is State.STOPPED)
    first.close()
    launcher = obedient()
    second = start(lab, launcher, module("a"), **changes)
    lab.turn(lambda: second.measured)
    assert len(tasks(launcher)) == 1
    found = profile(lab)
    assert found is not None and found.source == ("live" if "threads" in changes else "emulated")


def test_a_module_that_fails_is_told_and_not_tried_for_ever(lab: Lab) -> None:
    launcher = obedient(modules=(), failed={"a": "no kernel for it"})
    service = start(lab, launcher, module("a"))
    lab.turn(lambda: service.measured)
    lab.turn(lambda: b"no kernel for it" in b"".join(lab.seen.get(topics.EVENT.on(SITE, DEVICE), [])))
    assert len(tasks(launcher)) == 1
    found = profile(lab)
    assert found is not None and found.failed == {"a": "no kernel for it"} and found.modules == ()
    assert "no kernel for it" in markdown(found)
    lab.publish(topics.KIT, kit(module("a", b"another graph")))
    lab.turn(lambda: not service.measured)


def test_a_measuring_worker_that_dies_is_told_and_the_device_is_online_again(lab: Lab) -> None:
    launcher = FakeLauncher()
    launcher.on_measure = lambda worker, task: launcher.kill(worker, "killed by SIGSEGV")
    service = start(lab, launcher, module("a"))
    lab.turn(lambda: b"SIGSEGV" in b"".join(lab.seen.get(topics.EVENT.on(SITE, DEVICE), [])))
    lab.turn(lambda: service.state is State.SERVING)
    found = profile(lab)
    assert found is not None and found.failed == {"a": "killed by SIGSEGV"} and isinstance(found.link, Absent)


def test_what_failed_once_and_is_measured_later_is_no_longer_a_failure(lab: Lab) -> None:
    launcher = obedient(modules=(), failed={"a": "no memory"})
    start(lab, launcher, module("a"))
    lab.turn(lambda: profile(lab) is not None)
    launcher.on_measure = obedient_again(launcher)
    assert ask(lab, "measure").ok
    found = profile(lab)
    assert found is not None and found.failed == {} and [m.key for m in found.modules] == ["a"]


def ask(lab: Lab, verb: str, **arguments: object) -> Reply:
    reply = topics.REPLY.on(SITE, "coordinator", verb)
    lab.publish(topics.COMMAND, Command(id="q1", reply_topic=reply, arguments=arguments), DEVICE, verb)
    lab.turn(lambda: reply in lab.seen)
    return decode(lab.seen[reply][-1], Reply, "test")


def test_measure_on_command_measures_the_whole_kit_again(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module("a"), module("b"))
    lab.turn(lambda: service.measured)
    answer = ask(lab, "measure")
    assert answer.ok and answer.id == "q1" and answer.result["measured"] == ["a", "b"]
    assert len(tasks(launcher)) == 2


def test_probe_link_on_command_gives_the_link(lab: Lab) -> None:
    service = start(lab, obedient(), module("a"))
    lab.turn(lambda: service.measured)
    answer = ask(lab, "probe-link")
    assert answer.ok and answer.result["link"]["broker"] == "mqtt://memory:1"


def test_a_link_that_cannot_be_measured_is_an_error_with_the_reason(lab: Lab) -> None:
    start(lab, obedient(link=Failed("no answer within 10 s")), module("a"))
    lab.turn(lambda: profile(lab) is not None)
    answer = ask(lab, "probe-link")
    assert not answer.ok and answer.error == "no answer within 10 s"


def link_of(lab: Lab) -> object:
    found = profile(lab)
    return found.link if found is not None else None


def test_a_link_that_was_cut_off_is_tried_again_soon_and_what_was_known_stays(lab: Lab) -> None:
    launcher = FakeLauncher()
    links: list[object] = [Absent("mqtt://memory:1: connection lost"), LINK]

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, measured(task, link=links.pop(0)))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    start(lab, launcher, module("a"))
    lab.turn(lambda: isinstance(link_of(lab), Absent))
    lab.turn(lambda: link_of(lab) == LINK)
    assert [len(task.modules) for task in tasks(launcher)] == [1, 0]
    links.append(Absent("mqtt://memory:1: connection lost"))
    assert "connection lost" in ask(lab, "probe-link").error
    assert link_of(lab) == LINK


def test_a_link_that_failed_while_the_device_was_cut_off_itself_is_not_a_failed_link(lab: Lab) -> None:
    launcher = FakeLauncher()
    start(lab, launcher, module("a"))
    lab.turn(lambda: bool(tasks(launcher)))
    lab.broker.stop(keep_retained=True)
    lab.turn(lambda: not lab.up())
    lab.broker.start()
    lab.turn(lab.up)
    [(worker, task)] = [(w, t) for w, t in launcher.assignments.items() if isinstance(t, MeasureTask)]
    launcher.say(worker, measured(task, link=Failed("nothing came back within 10 s")))
    launcher.kill(worker, "ended with exit code 0")
    lab.turn(lambda: isinstance(link_of(lab), Absent))


def test_a_failed_link_is_tried_again_after_growing_pauses(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    subject = Subject(
        site=SITE, device=DEVICE, threads=1, speed=1.0, emulation="", budget_s=1.0, profile_path=tmp_path / "profile"
    )
    store = Store(tmp_path / "cache", 1 << 20)

    def login(client_id: str) -> BrokerLogin:
        return BrokerLogin(url="mqtt://memory:1", client_id=client_id)

    def surveyed() -> Survey:
        return survey(Path("/"), DEVICE)

    made = Measuring(subject, launcher, store, None, login, None, surveyed)  # type: ignore[arg-type]
    made.kit(kit(KitModule(key="a", kind="block", graphs=(), hidden=8, vocabulary=32, wire_dtype="f32")))
    now_s, url, starts = 0.0, "mqtt://memory:1", list[float]()
    while now_s < 3000:
        if made.step(now_s, url, False)[0]:
            starts.append(now_s)
            worker, task = next(reversed(launcher.assignments.items()))
            assert isinstance(task, MeasureTask)
            launcher.say(worker, measured(task, link=Failed("nothing came back")))
            launcher.kill(worker)
            for event in launcher.drain():
                made.heard(event, now_s)
        now_s += 0.5
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] and set(pauses[10:]) == {600}
    assert made.step(now_s, "mqtt://memory:2", False)[0], "another broker is tried at once"


def test_measure_without_a_kit_is_refused(lab: Lab) -> None:
    service = lab.agent(obedient())
    lab.turn(lambda: service.state is State.SERVING)
    assert "no kit" in ask(lab, "measure").error


def test_probe_ways_on_command_gives_the_round_trip_to_each_broker_and_leaves_the_profile_alone(lab: Lab) -> None:
    near, far = "mqtt://10.0.0.1:1884", "mqtt://10.0.0.2:1884"
    launcher = obedient()
    service = start(lab, launcher, module())
    lab.turn(lambda: service.measured)
    before = service._measuring.profile  # type: ignore[union-attr]

    def answer(worker: int, task: MeasureTask) -> None:
        assert task.modules == () and task.login is None
        assert [(name, login.url) for name, login in task.ways] == [(near, near), (far, far)]
        assert len({login.client_id for _, login in task.ways}) == 2
        launcher.say(worker, measured(task, link=Absent("not asked for"), ways={near: 0.002}, ways_failed={far: "no"}))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    reply = ask(lab, "probe-ways", brokers=[near, far])
    assert reply.ok and reply.result == {"round_trip_s": {near: 0.002}, "failed": {far: "no"}}
    assert service._measuring.profile is before  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "brokers", [None, [], "mqtt://a:1", ["http://a:1"], [1], ["mqtt://a:1", "x"], ["mqtt://a:1"] * 65]
)
def test_probe_ways_to_what_is_no_broker_is_refused(lab: Lab, brokers: object) -> None:
    service = lab.agent(obedient())
    lab.turn(lambda: service.state is State.SERVING)
    reply = ask(lab, "probe-ways", brokers=brokers)
    assert not reply.ok and "addresses of brokers" in reply.error


PAIR = PairMeasurement(
    peer="other", way="direct", measured_at_unix=1e9, round_trip_payload_bytes=1200, round_trip=RUN, sent=15, lost=0,
    late=0, there=Goodput(payload_bytes=16384, chunk_bytes=2048, samples=RUN),
    back=Goodput(payload_bytes=16384, chunk_bytes=2048, samples=RUN),
)  # fmt: skip
NEAR, FAR = "mqtt://10.0.0.1:1884", "mqtt://10.0.0.2:1884"


def asks_pair(lab: Lab, **changes: object) -> Reply:
    fields = {"peer": "other", "measure": True, "token": 9, "inward": NEAR, "outward": FAR}
    return ask(lab, "probe-pair", **{**fields, **changes})


def test_probe_pair_measures_the_way_through_both_boards_brokers_and_keeps_it(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module())
    lab.turn(lambda: service.measured)
    before = service._measuring.profile  # type: ignore[union-attr]
    seen: list[MeasureTask] = []

    def answer(worker: int, task: MeasureTask) -> None:
        seen.append(task)
        found = PAIR if task.pair is not None and task.pair.measure else Absent("answered")
        launcher.say(worker, measured(task, link=Absent("not asked for"), pair=found))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    reply = asks_pair(lab)
    assert reply.ok and reply.result["pair"]["peer"] == "other"
    assert seen[0].pair is not None and (seen[0].pair.inward.url, seen[0].pair.outward.url) == (NEAR, FAR)
    assert seen[0].pair.inward.client_id != seen[0].pair.outward.client_id
    kept = service._measuring.profile  # type: ignore[union-attr]
    assert before is not None and kept is not None and [pair.peer for pair in kept.pairs] == ["other"]
    assert msgspec.structs.replace(kept, pairs=()) == before, "it makes nothing else fresh"
    lab.turn(lambda: (said := profile(lab)) is not None and len(said.pairs) == 1)


def test_the_board_at_the_other_end_answers_and_keeps_nothing(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module())
    lab.turn(lambda: service.measured)
    before = service._measuring.profile  # type: ignore[union-attr]

    def answer(worker: int, task: MeasureTask) -> None:
        assert task.pair is not None and task.pair.way == "central" and task.pair.inward == task.pair.outward
        launcher.say(worker, measured(task, link=Absent("not asked for"), pair=Absent("answered")))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    reply = asks_pair(lab, measure=False, inward="", outward="")
    assert reply.ok and reply.result == {}
    assert service._measuring.profile is before  # type: ignore[union-attr]


def test_a_pair_that_could_not_be_measured_is_an_error_and_the_profile_stays(lab: Lab) -> None:
    launcher = obedient()
    service = start(lab, launcher, module())
    lab.turn(lambda: service.measured)
    before = service._measuring.profile  # type: ignore[union-attr]

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, measured(task, link=Absent("not asked for"), pair=Failed("nothing came back")))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    reply = asks_pair(lab)
    assert not reply.ok and "nothing came back" in reply.error
    assert service._measuring.profile is before  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [
        {"peer": "a/b"},
        {"peer": 7},
        {"token": -1},
        {"token": "x"},
        {"inward": "http://a"},
        {"outward": ""},
        {"measure": "yes"},
    ],
)
def test_a_pair_that_is_none_is_refused(lab: Lab, wrong: dict[str, object]) -> None:
    service = lab.agent(obedient())
    lab.turn(lambda: service.state is State.SERVING)
    assert not asks_pair(lab, **wrong).ok
