"""The supervisor over a MemoryBroker, with workers that exist on paper."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent import claim, hanging, lifecycle, restarts, stages
from agent.databroker import Wanted
from agent.lifecycle import State
from agent.records import Records
from agent.service import Service
from agent.workers.pipe import Assignment, DataBrokerAt, Status
from tests.agent.fakes import DEVICE, SITE, FakeLauncher, Lab, desired_of, inbox, order_of
from wire import topics
from wire.errors import Refused
from wire.messages import (
    Applied,
    Command,
    DeviceInfo,
    DeviceState,
    Event,
    Reply,
    StageOrder,
    Telemetry,
    TrainingTask,
    decode,
    encode,
)
from wire.privacy import Privacy


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.05)
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def serving(lab: Lab, launcher: FakeLauncher | None = None, **changes: object) -> Service:
    service = lab.agent(launcher, **changes)
    lab.turn(lambda: service.state is State.SERVING)
    return service


def applied(lab: Lab) -> Applied:
    found = lab.retained(topics.APPLIED, Applied)
    assert isinstance(found, Applied)
    return found


def phases(lab: Lab) -> list[tuple[int, str]]:
    return [(report.epoch, report.phase) for report in applied(lab).stages]


def running(lab: Lab, launcher: FakeLauncher, epoch: int = 1, **changes: object) -> Service:
    """An agent that holds one stage."""
    service = serving(lab, launcher, **changes)
    lab.store(service, b"graph", b"weights")
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=epoch), epoch=epoch), DEVICE)
    lab.turn(lambda: phases(lab) == [(epoch, "ready")])
    return service


def test_a_started_agent_says_all_that_is_retained(lab: Lab) -> None:
    service = serving(lab)
    lab.turn(lambda: lab.retained(topics.STATE, DeviceState) is not None)
    state, info = lab.retained(topics.STATE, DeviceState), lab.retained(topics.INFO, DeviceInfo)
    assert isinstance(state, DeviceState) and state.state == "online" and state.boot == service.boot
    assert isinstance(info, DeviceInfo) and info.cores > 0 and info.memory_bytes > 0
    assert applied(lab).stages == ()


def test_heartbeats_carry_the_boot_and_a_rising_number(lab: Lab) -> None:
    service = serving(lab)
    topic = topics.TELEMETRY.on(SITE, DEVICE)
    lab.turn(lambda: len(lab.seen.get(topic, [])) >= 3)
    beats = [decode(data, Telemetry, "test") for data in lab.seen[topic]]
    assert {beat.boot for beat in beats} == {service.boot}
    assert [beat.seq for beat in beats] == sorted({beat.seq for beat in beats})


def test_an_order_becomes_a_worker_and_then_a_report(lab: Lab) -> None:
    launcher = FakeLauncher()
    service = running(lab, launcher)
    [worker] = launcher.stage_workers
    assignment = launcher.assignments[worker]
    assert assignment.order.stage == 0 and Path(assignment.graph_path).read_bytes() == b"graph"  # type: ignore[union-attr]
    assert service.boot in assignment.login.client_id  # type: ignore[union-attr]


def test_the_same_order_again_changes_nothing(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    said = len(lab.seen[topics.APPLIED.on(SITE, DEVICE)])
    lab.publish(topics.DESIRED, desired_of(order_of()), DEVICE)
    lab.turn(lambda: lab.services[0]._control.session.transport.bytes_received > 0)  # type: ignore[union-attr]
    for _ in range(20):
        lab.services[0].step(0.001)
    lab.coordinator.poll(0)
    assert launcher.stage_workers == [1] and launcher.told[1] == []
    assert len(lab.seen[topics.APPLIED.on(SITE, DEVICE)]) == said


def test_a_new_epoch_of_the_same_stage_is_adopted_without_loading_again(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=2), epoch=2), DEVICE)
    lab.turn(lambda: phases(lab) == [(2, "ready")])
    assert launcher.stage_workers == [1]
    [told] = launcher.told[1]
    assert told.adopt is not None and told.adopt.epoch == 2 and told.adopt.weights == ()


def test_a_copy_takes_its_stages_place_and_goes_back_in_the_same_worker(lab: Lab) -> None:
    launcher = FakeLauncher()
    service = serving(lab, launcher)
    lab.store(service, b"graph", b"weights")
    apart = inbox(7)

    def said(epoch: int, standby: bool) -> bool:
        return [(r.epoch, r.phase, r.standby) for r in applied(lab).stages] == [(epoch, "ready", standby)]

    lab.publish(topics.DESIRED, desired_of(order_of(inbox=apart, next=apart, standby=True)), DEVICE)
    lab.turn(lambda: said(1, True))
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=2), epoch=2), DEVICE)
    lab.turn(lambda: said(2, False))
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=3, inbox=apart, next=apart, standby=True), epoch=3), DEVICE)
    lab.turn(lambda: said(3, True))
    assert launcher.stage_workers == [1]
    orders = [told.adopt for told in launcher.told[1]]
    assert [(order.standby, order.inbox) for order in orders if order] == [(False, inbox(0)), (True, apart)]


def test_other_blocks_mean_another_worker(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=2, end_block=3), epoch=2), DEVICE)
    lab.turn(lambda: phases(lab) == [(2, "ready")])
    assert launcher.stage_workers == [2]


def test_an_empty_order_ends_all_stages(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    lab.publish(topics.DESIRED, desired_of(epoch=2), DEVICE)
    lab.turn(lambda: applied(lab).epoch == 2 and not applied(lab).stages)
    assert launcher.stage_workers == []


def test_an_older_epoch_is_ignored_also_after_a_restart(lab: Lab) -> None:
    first = running(lab, FakeLauncher(), epoch=5)
    lab.broker.stop()
    lab.broker.start()
    first.stop()
    lab.turn(lambda: first.state is State.STOPPED)
    first.close()
    launcher = FakeLauncher()
    second = serving(lab, launcher)
    lab.turn(lab.up)
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=4), epoch=4), DEVICE)
    lab.turn(lambda: second.stale_orders == 1)
    assert launcher.stage_workers == [] and applied(lab).epoch == 5


def test_orders_that_make_no_sense_are_refused_with_a_notice(lab: Lab) -> None:
    launcher = FakeLauncher()
    serving(lab, launcher)
    bad = order_of(inbox=order_of().inbox.__class__(topic="edgelam/v1/lab/dev/pi5/desired"))
    for message in (desired_of(order_of(), device="other"), desired_of(order_of(), order_of()), desired_of(bad)):
        before = len(lab.seen.get(topics.EVENT.on(SITE, DEVICE), []))
        lab.publish(topics.DESIRED, message, DEVICE)
        lab.turn(lambda: len(lab.seen.get(topics.EVENT.on(SITE, DEVICE), [])) > before)  # noqa: B023
    assert launcher.stage_workers == []


def test_a_refused_order_is_told_in_what_is_applied_until_another_is_taken(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    torn = encode(desired_of(order_of(epoch=2), epoch=2)).replace(b'"context_tokens":64', b'"context_tokens":0')
    lab.coordinator.publish(topics.DESIRED.on(SITE, DEVICE), torn)
    lab.turn(lambda: applied(lab).refused_epoch == 2)
    assert "context_tokens" in applied(lab).refused_because
    assert phases(lab) == [(1, "ready")], "what runs goes on"
    lab.publish(topics.DESIRED, desired_of(order_of(), order_of(), epoch=3), DEVICE)
    lab.turn(lambda: applied(lab).refused_epoch == 3)
    assert "listed twice" in applied(lab).refused_because
    lab.coordinator.publish(topics.DESIRED.on(SITE, DEVICE), b"garbage")
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=4), epoch=4), DEVICE)
    lab.turn(lambda: phases(lab) == [(4, "ready")])
    assert (applied(lab).refused_epoch, applied(lab).refused_because) == (0, "")


def test_a_killed_worker_is_started_again_and_the_reason_is_told(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    launcher.kill(1, "killed by the kernel: out of memory")
    lab.turn(lambda: "out of memory" in applied(lab).stages[0].detail)
    assert applied(lab).stages[0].phase == "loading"
    lab.turn(lambda: phases(lab) == [(1, "ready")])
    assert launcher.stage_workers == [2] and applied(lab).stages[0].restarts == 1
    launcher.kill(2, "killed by SIGSEGV")
    lab.turn(lambda: "SIGSEGV" in applied(lab).stages[0].detail)
    assert applied(lab).stages[0].phase == "waiting", "the second time it rests first"
    lab.turn(lambda: phases(lab) == [(1, "ready")])


def test_a_worker_that_hangs_is_killed_and_started_again_and_the_site_is_told(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hanging, "HANGING_AFTER_S", 0.3)
    monkeypatch.setattr(stages, "LOOK_PERIOD_S", 0.05)
    launcher = FakeLauncher()
    launcher.processor[1] = 5.0
    running(lab, launcher)
    status = Status(phase="ready", epoch=1, engine="fake")
    for _ in range(5):
        said_s = time.monotonic()
        launcher.say(1, status)
        lab.turn(lambda: time.monotonic() - said_s > 0.1)  # noqa: B023
    assert launcher.stage_workers == [1], "it reports"
    lab.turn(lambda: launcher.stage_workers == [2])
    lab.turn(lambda: phases(lab) == [(1, "ready")])
    assert applied(lab).stages[0].restarts == 1
    told = [decode(payload, Event, "event") for payload in lab.seen[topics.EVENT.on(SITE, DEVICE)]]
    assert [event.code for event in told] == ["worker-hung"]
    assert "no processor time" in told[0].text
    lab.turn(lambda: launcher.stage_workers == [3])


def test_workers_are_not_blamed_for_a_silence_in_which_the_agent_was_stopped_too(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hanging, "HANGING_AFTER_S", 0.3)
    monkeypatch.setattr(stages, "LOOK_PERIOD_S", 0.05)
    launcher = FakeLauncher()
    running(lab, launcher)
    launcher.say(1, Status(phase="ready", epoch=1, engine="fake"))
    lab.turn(lambda: not launcher.events)
    time.sleep(0.5)
    lab.services[0].step(0.0)
    assert launcher.stage_workers == [1]


def test_an_engine_that_cannot_load_is_given_one_more_chance_and_then_waits_for_a_new_epoch(lab: Lab) -> None:
    launcher = FakeLauncher(ready=False)
    service = serving(lab, launcher)
    lab.store(service, b"graph", b"weights")
    lab.publish(topics.DESIRED, desired_of(order_of()), DEVICE)
    for worker in (1, 2):
        lab.turn(lambda: launcher.stage_workers == [worker])  # noqa: B023
        launcher.say(worker, Status(phase="failed", epoch=1, detail="no such kernel", final=True))
        launcher.kill(worker, "ended with exit code 1")
    lab.turn(lambda: phases(lab) == [(1, "failed")])
    assert applied(lab).stages[0].detail == "no such kernel"
    launcher.ready = True
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=2), epoch=2), DEVICE)
    lab.turn(lambda: phases(lab) == [(2, "ready")])


def test_a_broker_that_loses_everything_is_told_everything_again(lab: Lab) -> None:
    launcher = FakeLauncher()
    running(lab, launcher)
    lab.broker.stop()
    lab.turn(lambda: not lab.services[0]._control.session.up)  # type: ignore[union-attr]
    assert lab.broker.retained == {}
    lab.broker.start()
    wanted = {topic.on(SITE, DEVICE) for topic in (topics.STATE, topics.INFO, topics.APPLIED)}
    lab.turn(lambda: wanted <= set(lab.broker.retained))
    assert launcher.stage_workers == [1], "workers keep running while the broker is away"


def test_a_stopped_agent_leaves_no_worker_and_says_offline(lab: Lab) -> None:
    launcher = FakeLauncher()
    service = running(lab, launcher)
    service.stop()
    lab.turn(lambda: service.state is State.STOPPED)
    state = lab.retained(topics.STATE, DeviceState)
    assert isinstance(state, DeviceState) and state.state == "offline" and state.reason == "stopped"
    assert launcher.stage_workers == [] and applied(lab).stages == ()


def test_a_vanished_agent_is_offline_by_its_will(lab: Lab) -> None:
    service = serving(lab)
    lab.transports[-1].vanish()
    lab.coordinator.poll(0)
    state = lab.retained(topics.STATE, DeviceState)
    assert isinstance(state, DeviceState) and (state.state, state.boot) == ("offline", service.boot)


def test_a_second_agent_of_the_same_name_is_refused_and_the_first_stays(lab: Lab) -> None:
    first = serving(lab)
    second = lab.agent(host="b")
    lab.turn(lambda: second.state is State.STOPPED)
    with pytest.raises(Refused, match="already running"):
        second.run()
    assert first.state is State.SERVING
    state = lab.retained(topics.STATE, DeviceState)
    assert isinstance(state, DeviceState) and (state.state, state.boot) == ("online", first.boot)


def test_the_state_of_a_dead_agent_is_taken_over(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LISTEN_S", 0.3)
    ghost = DeviceState(state="online", boot="abc", since_unix=1.0)
    lab.publish(topics.STATE, ghost, DEVICE)
    service = lab.agent()
    lab.turn(lambda: service.state is State.SERVING)
    state = lab.retained(topics.STATE, DeviceState)
    assert isinstance(state, DeviceState) and state.boot == service.boot


def test_an_old_boots_last_will_does_not_stand(lab: Lab) -> None:
    service = serving(lab)
    lab.publish(topics.STATE, DeviceState(state="offline", boot="abc", since_unix=1.0), DEVICE)

    def restored() -> bool:
        state = lab.retained(topics.STATE, DeviceState)
        return isinstance(state, DeviceState) and state.boot == service.boot

    lab.turn(restored)


def test_two_agents_on_one_state_folder_are_refused(lab: Lab) -> None:
    lab.agent()
    with pytest.raises(Refused, match="another agent"):
        lab.agent()


def test_unknown_commands_are_answered_and_strange_reply_topics_are_not(lab: Lab) -> None:
    serving(lab)
    reply = topics.REPLY.on(SITE, "coordinator", "explode")
    lab.publish(topics.COMMAND, Command(id="1", reply_topic=reply), DEVICE, "explode")
    lab.turn(lambda: reply in lab.seen)
    answer = decode(lab.seen[reply][0], Reply, "test")
    assert not answer.ok and "explode" in answer.error
    desired = topics.DESIRED.on(SITE, "other")
    lab.publish(topics.COMMAND, Command(id="2", reply_topic=desired), DEVICE, "explode")
    for _ in range(10):
        lab.services[0].step(0.001)
    lab.coordinator.poll(0)
    assert desired not in lab.seen


def test_a_full_disk_refuses_the_order_instead_of_forgetting_the_epoch(lab: Lab, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    launcher = FakeLauncher()
    serving(lab, launcher)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.records.write_atomically", full)
    lab.publish(topics.DESIRED, desired_of(order_of()), DEVICE)
    lab.turn(lambda: b"state-not-saved" in b"".join(lab.seen.get(topics.EVENT.on(SITE, DEVICE), [])))
    assert launcher.stage_workers == []
    lab.turn(lambda: applied(lab).refused_epoch == 1)
    assert "No space left" in applied(lab).refused_because


def test_every_step_of_the_table_leads_somewhere_and_others_are_named() -> None:
    for (state, event), step in lifecycle.NEXT.items():
        assert lifecycle.handle(state, event) is step
    with pytest.raises(lifecycle.UnexpectedEvent, match="while stopped"):
        lifecycle.handle(State.STOPPED, lifecycle.Event.MEASURE)
    reached, frontier = {State.SEARCHING}, [State.SEARCHING]
    while frontier:
        state = frontier.pop()
        for (at, _), step in lifecycle.NEXT.items():
            if at is state and step.state not in reached:
                reached.add(step.state)
                frontier.append(step.state)
    assert reached == set(State)


def test_the_largest_order_fits_a_control_message() -> None:
    assert len(encode(desired_of(*(order_of(stage, 8) for stage in range(8))))) < 20_000


class BoardBroker:
    """A data broker on paper."""

    def __init__(self, folder: Path, wanted: Wanted, records: Records, changed: Callable[[], None]) -> None:
        self.at: DataBrokerAt | None = None
        self.because = "not started yet"
        self.starting = True
        self.reached_from: list[str] = []
        self.closed = False
        self.swift: DataBrokerAt | None = None
        """Where it is as soon as somebody waits for it."""
        self._changed = changed

    def await_started(self, timeout_s: float) -> None:
        assert 0 < timeout_s < 5, "heartbeats wait so long, too"
        if self.swift is not None:
            self.become(self.swift, "mosquitto 2.0.11")

    def reached(self, reached_from: str) -> None:
        self.reached_from.append(reached_from)

    def become(self, at: DataBrokerAt | None, because: str) -> None:
        self.at, self.because, self.starting = at, because, False
        self._changed()

    def close(self) -> None:
        self.closed = True


OWN = DataBrokerAt(address="mqtt://10.0.0.5:1884", url="mqtt://127.0.0.1:1884")


def with_broker(lab: Lab, launcher: FakeLauncher, swift: DataBrokerAt | None = None) -> tuple[Service, BoardBroker]:
    made: list[BoardBroker] = []

    def make(*arguments: object) -> BoardBroker:
        made.append(BoardBroker(*arguments))  # type: ignore[arg-type]
        made[0].swift = swift
        return made[0]

    service = lab.agent(launcher, data_broker_maker=make)
    lab.turn(lambda: service.state is State.SERVING)
    return service, made[0]


def info(lab: Lab) -> DeviceInfo:
    found = lab.retained(topics.INFO, DeviceInfo)
    assert isinstance(found, DeviceInfo)
    return found


def test_the_boards_broker_is_told_when_it_is_there(lab: Lab) -> None:
    service, broker = with_broker(lab, FakeLauncher())
    assert broker.reached_from == ["127.0.0.1"] and info(lab).data_broker == ""
    broker.become(OWN, "mosquitto 2.0.11")
    lab.turn(lambda: info(lab).data_broker == OWN.address)
    assert info(lab).data_broker_because == "mosquitto 2.0.11"
    broker.become(None, "mosquitto ended")
    lab.turn(lambda: info(lab).data_broker == "")
    service.stop()
    lab.turn(lambda: service.state is State.STOPPED)
    service.close()
    assert broker.closed


def test_what_is_announced_first_has_the_boards_broker_in_it(lab: Lab) -> None:
    """A plan made between two announcements would go around that broker, and stay so."""
    with_broker(lab, FakeLauncher(), OWN)
    told = [decode(payload, DeviceInfo, "info") for payload in lab.seen[topics.INFO.on(SITE, DEVICE)]]
    assert {one.data_broker for one in told} == {OWN.address}


def test_a_stage_behind_the_boards_broker_waits_until_that_is_there(lab: Lab) -> None:
    launcher = FakeLauncher()
    service, broker = with_broker(lab, launcher)
    lab.store(service, b"graph", b"weights")
    order = order_of(epoch=1)
    order = msgspec.structs.replace(order, inbox=msgspec.structs.replace(order.inbox, broker=OWN.address))
    lab.publish(topics.DESIRED, desired_of(order, epoch=1), DEVICE)
    lab.turn(lambda: phases(lab) == [(1, "waiting")])
    lab.turn(lambda: "own broker" in applied(lab).stages[0].detail)
    assert not launcher.alive
    broker.become(OWN, "mosquitto 2.0.11")
    lab.turn(lambda: phases(lab) == [(1, "ready")])
    [assignment] = launcher.assignments.values()
    assert isinstance(assignment, Assignment) and assignment.data_broker == OWN


def test_a_stage_behind_a_broker_that_is_elsewhere_fails_with_the_reason_and_keeps_its_weights(lab: Lab) -> None:
    launcher = FakeLauncher()
    service, broker = with_broker(lab, launcher)
    lab.store(service, b"graph", b"weights")
    order = order_of(epoch=1)
    moved = msgspec.structs.replace(order, inbox=msgspec.structs.replace(order.inbox, broker="mqtt://10.0.0.5:1"))
    for at, said in ((OWN, f"it is at {OWN.address}"), (None, "there is none")):
        broker.become(at, "as it is")
        lab.publish(topics.DESIRED, desired_of(moved, epoch=1), DEVICE)
        lab.turn(lambda: phases(lab) == [(1, "failed")])
        lab.turn(lambda: said in applied(lab).stages[0].detail)  # noqa: B023
    assert not launcher.alive and applied(lab).stages[0].fetched_bytes == applied(lab).stages[0].to_fetch_bytes > 0
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=2), epoch=2), DEVICE)
    lab.turn(lambda: phases(lab) == [(2, "ready")])


def training(data: str, **changes: object) -> StageOrder:
    task = TrainingTask(
        data=data, tokenizer=order_of().graph, rank=1, alpha=1.0, matrices=("q",), row_tokens=8, batch_rows=1, steps=2,
        learning_rate=0.1, most_norm=1.0, held_out=0.0, seed=1, **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    return order_of(engine="torch", runs="rounds", training=task)


def ends_of(data: str, **changes: object) -> StageOrder:
    return msgspec.structs.replace(training(data, role="ends", **changes), end_block=0)


def test_data_with_a_budget_are_for_private_jobs_alone(lab: Lab, tmp_path: Path) -> None:
    launcher = FakeLauncher()
    data = (("notes", str(tmp_path / "notes.jsonl")), ("poems", str(tmp_path / "poems.txt")))
    data = (*data, ("diary", str(tmp_path / "diary.txt")))
    bounds = (("notes", 8.0), ("diary", 2.0))
    service = serving(lab, launcher, data=data, data_epsilon=bounds, data_states=("diary",))
    found = lab.retained(topics.INFO, DeviceInfo)
    assert isinstance(found, DeviceInfo) and found.data == ("notes", "poems", "diary")
    assert (found.private_data, found.told_states) == (("notes", "diary"), ("diary",)) and found.knows_private_split
    lab.store(service, b"graph", b"weights")
    refused = "are for private jobs, without losses"
    for epoch, (order, said) in enumerate(
        [
            (training("mail"), "no data set 'mail' on this board; there are: diary, notes, poems"),
            (training("notes"), refused),
            (training("notes", privacy=Privacy(epsilon=1.0, losses=True)), refused),
            (training("notes", privacy=Privacy(epsilon=1.0)), ""),
            (ends_of("notes", privacy=Privacy(epsilon=1.0)), "are not to leave this board"),
            (ends_of("diary", privacy=Privacy(epsilon=1.0)), ""),
            (ends_of("diary"), refused),
            (msgspec.structs.replace(training("mail", role="trunk"), embedding=False, head=False), ""),
            (training("poems"), ""),
        ],
        start=1,
    ):
        lab.publish(topics.DESIRED, desired_of(msgspec.structs.replace(order, epoch=epoch), epoch=epoch), DEVICE)
        lab.turn(lambda: phases(lab) == [(epoch, "failed" if said else "ready")])  # noqa: B023
        assert said in applied(lab).stages[0].detail
        assert bool(launcher.alive) == (not said)
    [by_data] = [launcher.assignments[worker] for worker in launcher.alive]
    assert by_data.data_path == data[1][1] and by_data.most_epsilon is None  # type: ignore[union-attr]
    private = [made for made in launcher.assignments.values() if made.data_path == data[0][1]]  # type: ignore[union-attr]
    assert [made.most_epsilon for made in private] == [8.0]  # type: ignore[union-attr]
    assert Path(by_data.state_path) == service.config.state_dir  # type: ignore[union-attr]


def test_a_running_stage_that_is_to_be_reached_where_nobody_is_ends_and_says_why(lab: Lab) -> None:
    launcher = FakeLauncher()
    _, broker = with_broker(lab, launcher)
    broker.become(OWN, "mosquitto 2.0.11")
    lab.store(lab.services[0], b"graph", b"weights")
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=1), epoch=1), DEVICE)
    lab.turn(lambda: phases(lab) == [(1, "ready")])
    order = order_of(epoch=2)
    moved = msgspec.structs.replace(order, inbox=msgspec.structs.replace(order.inbox, broker="mqtt://10.0.0.5:1"))
    lab.publish(topics.DESIRED, desired_of(moved, epoch=2), DEVICE)
    lab.turn(lambda: phases(lab) == [(2, "failed")])
    assert "mqtt://10.0.0.5:1" in applied(lab).stages[0].detail


def test_an_order_with_a_broker_that_is_none_is_refused(lab: Lab) -> None:
    serving(lab)
    order = order_of(epoch=1)
    order = msgspec.structs.replace(order, next=msgspec.structs.replace(order.next, broker="http://x"))
    lab.publish(topics.DESIRED, desired_of(order, epoch=1), DEVICE)
    lab.turn(lambda: applied(lab).refused_epoch == 1)
    assert "no address of a broker" in applied(lab).refused_because
