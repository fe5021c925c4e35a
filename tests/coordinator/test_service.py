"""What is acknowledged is on disk first, what was lost comes again, and nothing that arrives breaks the coordinator."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from coordinator.fleet import Presence
from coordinator.journal import DeploymentRecord, DeployRequest, Journal
from coordinator.notices import TABLE
from coordinator.service import EPOCH_JUMP_LIMIT, Coordinator
from coordinator.view import device_rows, status_row
from hwprofiles.reading import Absent, Failed
from tests.coordinator.memory_site import SITE, Board, Client, Lab, running, until
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import record_of, report
from tests.planning.boards import link, profile
from wire import topics
from wire.errors import Refused, UsageError
from wire.limits import MAX_CONTROL_BYTES, MAX_DEVICES, OFFLINE_AFTER_S, SUSPECT_AFTER_S
from wire.memory import MemoryBroker
from wire.messages import ArtifactRef, Desired, Kit, StageReport

DEVICE_TOPICS = (topics.STATE, topics.INFO, topics.PROFILE, topics.TELEMETRY, topics.APPLIED)
GARBAGE = (
    b"\x00", b"{}", b"null", b"[]", b"nan", b'"x"', b"\xff\xfe\x80", b"{" * 20_000, b"[" * 100_000, b'{"v":1}',
    b'{"v":1e999}', b'{"v":-1,"state":"online","boot":"ab","since_unix":0}', b'{"v":1,"device":"pi5","boot":"\\ud800"}',
    b'{"v":1,"seq":-1,"boot":"zz","mono_s":1e300}', bytes(MAX_CONTROL_BYTES + 1), b" " * MAX_CONTROL_BYTES,
    b'{"schema":"edgelam.profile/1","source":"live","modules":' + b"[" * 2000,
)  # fmt: skip


def lab_test(scenario: Callable[[Lab], Awaitable[None]], state: Path, broker: MemoryBroker | None = None) -> None:
    async def run() -> None:
        async with running(state, broker) as lab:
            await scenario(lab)

    asyncio.run(run())


def record(coordinator: Coordinator, *devices: str, model: str = "tiny") -> DeploymentRecord:
    made = record_of(plan_of(*devices, epoch=coordinator.next_epoch()), blocks=2 * len(devices))
    return msgspec.structs.replace(made, request=DeployRequest(model=model))


def losses(coordinator: Coordinator) -> list[tuple[str, str]]:
    """What the requests are told, from now on."""
    told: list[tuple[str, str]] = []
    coordinator.on_deployment_lost = lambda name, reason: told.append((name, reason))
    return told


# Garbage.


@pytest.mark.parametrize("topic", [*DEVICE_TOPICS, topics.EVENT], ids=lambda topic: topic.name)
def test_garbage_is_counted_each_time_and_said_once(topic: topics.Topic, tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        vandal = Client(lab.broker, "vandal")
        for payload in GARBAGE * 2:
            vandal.say(topic, payload, "pi5")
        await until(lambda: lab.coordinator.refused_messages == 2 * len(GARBAGE), "all counted")
        assert len(lab.notices("bad-message")) == 1
        assert "pi5" in lab.notices("bad-message")[0]
        await lab.with_boards("pi4")
        assert lab.coordinator.hub.alive

    lab_test(scenario, tmp_path)


def test_mutations_of_honest_messages_never_break_anything_that_is_shown(tmp_path: Path) -> None:
    dice = random.Random(11)

    async def scenario(lab: Lab) -> None:
        await lab.with_boards("pi5")
        lab.boards["pi5"].apply(1, StageReport(deployment="tiny", epoch=1, stage=0, phase="ready"))
        lab.boards["pi5"].say(topics.PROFILE, msgspec.json.encode(profile("pi5")), "pi5")
        honest = [(topic, lab.broker.retained[topic.on(SITE, "pi5")]) for topic in DEVICE_TOPICS if topic.retained]
        vandal = Client(lab.broker, "vandal")
        for _ in range(400):
            topic, payload = dice.choice(honest)
            data = bytearray(payload)
            for _ in range(dice.randrange(1, 4)):
                at = dice.randrange(len(data))
                data[at : at + dice.randrange(3)] = dice.choice(
                    [b"9", b'"', b"null", b"[", b"-", bytes([dice.randrange(256)])]
                )
            vandal.say(topic, bytes(data) or b"x", dice.choice(["pi5", "pi4"]))
        vandal.say(topics.EVENT, b"x", "the-last")
        await until(lambda: any("the-last" in text for text in lab.notices("bad-message")), "the last one")
        lab.coordinator.tick()
        msgspec.json.encode([device_rows(lab.coordinator), status_row(lab.coordinator), list(lab.coordinator.notices)])

    lab_test(scenario, tmp_path)


def test_names_that_are_none_are_counted_and_said_once_whatever_they_are(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        vandal = Client(lab.broker, "vandal")
        for number in range(50):
            vandal.say(topics.TELEMETRY, b"x", f"Not A Name {number}")
        vandal.say(topics.STATE, b"x", "n" * 60_000)
        await until(lambda: lab.coordinator.refused_messages == 51, "all counted")
        (said,) = lab.notices("bad-message")
        assert len(said) < 200
        assert not lab.coordinator.devices()

    lab_test(scenario, tmp_path)


def test_a_message_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        Client(lab.broker, "old").say(topics.STATE, b'{"v":7,"state":"online","boot":"ab","since_unix":0}', "pi5")
        await until(lambda: lab.coordinator.refused_messages == 1)
        (said,) = [event for event in lab.coordinator.notices if event.code == "bad-message"]
        assert "protocol 7" in said.text and "version" in said.try_

    lab_test(scenario, tmp_path)


def test_a_cleared_topic_is_no_message(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        cleaner = Client(lab.broker, "cleaner")
        for topic in DEVICE_TOPICS:
            cleaner.say(topic, b"", "pi5")
        await lab.with_boards("pi4")
        assert lab.coordinator.refused_messages == 0

    lab_test(scenario, tmp_path)


def test_a_thousand_made_up_devices_leave_room_for_real_ones_in_notices_and_memory(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        liar = Board(lab.broker, "x")
        for number in range(MAX_DEVICES + 200):
            liar.name = f"made-up-{number}"
            liar.leave()
        await until(lambda: len(lab.coordinator.devices()) == MAX_DEVICES, "full")
        await lab.with_boards("pi5")
        assert len(lab.coordinator.devices()) == MAX_DEVICES
        assert len(lab.coordinator.notices) <= (lab.coordinator.notices.maxlen or 0)

    lab_test(scenario, tmp_path)


def test_a_profile_without_samples_is_shown_as_unknown(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("pi5")
        empty = link(0.001, 1e7)
        empty = msgspec.structs.replace(empty, round_trip=msgspec.structs.replace(empty.round_trip, samples_s=()))
        lab.boards["pi5"].say(
            topics.PROFILE, msgspec.json.encode(msgspec.structs.replace(profile("pi5"), link=empty)), "pi5"
        )
        await until(lambda: "pi5" in lab.coordinator.profiles())
        assert device_rows(lab.coordinator)[0]["round_trip_s"] is None

    lab_test(scenario, tmp_path)


def link_of(lab: Lab) -> object:
    found = lab.coordinator.profiles().get("pi5")
    return found.link if found is not None else None


def test_a_board_whose_link_is_not_yet_known_has_not_measured_itself(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("pi5")
        known = profile("pi5")
        keys = {module.key for module in known.modules}
        for link_now, expected in (
            (Absent("connection lost"), False),
            (Failed("nothing came back"), True),
            (known.link, True),
        ):
            lab.boards["pi5"].say(
                topics.PROFILE, msgspec.json.encode(msgspec.structs.replace(known, link=link_now)), "pi5"
            )
            await until(lambda link_now=link_now: link_of(lab) == link_now, repr(link_now))
            assert lab.coordinator.has_measured("pi5", keys) is expected
        one = known.modules[0].key
        tried = msgspec.structs.replace(known, modules=known.modules[1:], failed={one: "no kernel for it"})
        lab.boards["pi5"].say(topics.PROFILE, msgspec.json.encode(tried), "pi5")
        await until(lambda: bool(lab.coordinator.profiles()["pi5"].failed))
        assert lab.coordinator.has_measured("pi5", keys), "nobody waits for what was tried"
        assert not lab.coordinator.has_measured("pi5", keys | {"another"})

    lab_test(scenario, tmp_path)


# What is in force.


def test_a_deployment_is_on_disk_before_anybody_hears_of_it(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b")
        published: list[str] = []
        on_disk_then: list[int] = []

        def spy(topic: topics.Topic, _payload: bytes, *fields: str) -> None:
            published.append(topic.name)
            other = Journal(tmp_path / "journal.sqlite")
            other.open()
            on_disk_then.append(len(other.deployments()))
            other.close()

        lab.coordinator.hub.publish = spy  # type: ignore[method-assign]
        lab.coordinator.put_in_force(record(lab.coordinator, "a", "b"))
        assert published == ["desired", "desired", "plan"]
        assert on_disk_then == [1, 1, 1]

    lab_test(scenario, tmp_path)


def test_what_can_not_be_journaled_is_not_published(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        made = record(lab.coordinator, "a")
        lab.coordinator.journal.close()
        with pytest.raises(RuntimeError):
            lab.coordinator.put_in_force(made)
        assert not lab.coordinator.records()
        lab.coordinator.journal.open()
        await asyncio.sleep(0.05)
        assert not lab.boards["a"].orders

    lab_test(scenario, tmp_path)


def with_files(made: DeploymentRecord, device: str, count: int) -> DeploymentRecord:
    """The same deployment, whose stage on `device` has so many files of weights."""
    files = tuple(ArtifactRef(digest=f"sha256:{number:064x}", size_bytes=1) for number in range(count))
    (order,) = made.orders[device]
    return msgspec.structs.replace(
        made, orders={**made.orders, device: (msgspec.structs.replace(order, weights=files),)}
    )


def test_orders_too_large_for_a_message_are_refused_before_anything_is_journaled(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b")
        running = record(lab.coordinator, "a")
        lab.coordinator.put_in_force(running)
        await until(lambda: bool(lab.boards["a"].orders))
        told = losses(lab.coordinator)
        too_large = with_files(record(lab.coordinator, "a", "b"), "b", 3000)
        with pytest.raises(Refused, match=r"orders for b would take .*, a message may have") as raised:
            lab.coordinator.put_in_force(too_large)
        assert "--boards-at-least" in raised.value.try_
        assert lab.coordinator.records() == [running] == lab.coordinator.journal.deployments()
        assert not told, "what ran runs on"
        lab.coordinator.put_in_force(with_files(record(lab.coordinator, "a", "b"), "b", 1000))
        await until(lambda: bool(lab.boards["b"].orders))
        assert len(lab.boards["b"].orders[-1].stages[0].weights) == 1000

    lab_test(scenario, tmp_path)


def test_what_a_device_holds_for_other_models_counts_too(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.coordinator.put_in_force(with_files(record(lab.coordinator, "a"), "a", 1500))
        another = with_files(record(lab.coordinator, "a"), "a", 1500)
        plan = msgspec.structs.replace(another.plan, deployment="another")
        with pytest.raises(Refused, match="orders for a"):
            lab.coordinator.put_in_force(msgspec.structs.replace(another, name="another", plan=plan))
        lab.coordinator.put_in_force(another)  # in place of the first it fits

    lab_test(scenario, tmp_path)


def test_a_plan_too_large_for_a_message_is_refused(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        made = record(lab.coordinator, "a")
        plan = msgspec.structs.replace(made.plan, because="x" * MAX_CONTROL_BYTES)
        with pytest.raises(Refused, match="the plan of tiny"):
            lab.coordinator.put_in_force(msgspec.structs.replace(made, plan=plan))
        assert not lab.coordinator.journal.deployments()

    lab_test(scenario, tmp_path)


def test_each_device_is_told_its_stages_and_the_plan_is_retained(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b", "c")
        made = record(lab.coordinator, "a", "b")
        lab.coordinator.put_in_force(made)
        await until(lambda: bool(lab.boards["a"].orders and lab.boards["b"].orders))
        assert lab.boards["a"].orders[-1].stages == made.orders["a"]
        assert lab.boards["b"].orders[-1].epoch >= made.plan.epoch
        await until(lambda: topics.PLAN.on(SITE, "tiny") in lab.broker.retained)
        assert not lab.boards["c"].orders

    lab_test(scenario, tmp_path)


def test_a_broker_that_lost_everything_gets_everything_again(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b")
        made = record(lab.coordinator, "a", "b")
        lab.coordinator.put_in_force(made)
        lab.coordinator.offer_kit(Kit(artifacts_url="http://x", modules=()))
        mine = {topics.DESIRED.on(SITE, name) for name in "ab"} | {topics.PLAN.on(SITE, "tiny"), topics.KIT.on(SITE)}
        await until(lambda: mine <= set(lab.broker.retained), "published")
        await until(
            lambda: b"http://x" in lab.broker.retained[topics.KIT.on(SITE)], "the kit, not the empty one before"
        )
        before = {topic: lab.broker.retained[topic] for topic in mine}
        lab.broker.stop()
        assert not lab.broker.retained
        await until(lambda: not lab.coordinator.broker_up, "down")
        lab.broker.start()
        await until(lambda: mine <= set(lab.broker.retained), "published again")
        assert {topic: lab.broker.retained[topic] for topic in mine} == before

    lab_test(scenario, tmp_path)


def test_a_restarted_coordinator_publishes_what_is_in_force_under_the_same_plan(tmp_path: Path) -> None:
    made: list[DeploymentRecord] = []

    async def first(lab: Lab) -> None:
        await lab.with_boards("a")
        made.append(record(lab.coordinator, "a"))
        lab.coordinator.put_in_force(made[0])

    async def second(lab: Lab) -> None:
        topic = topics.DESIRED.on(SITE, "a")
        await until(lambda: topic in lab.broker.retained)
        desired = msgspec.json.decode(lab.broker.retained[topic], type=Desired)
        assert desired.stages == made[0].orders["a"], "the stages keep their epoch, so nothing is loaded anew"
        assert desired.epoch > made[0].plan.epoch
        assert lab.coordinator.in_force(made[0])

    lab_test(first, tmp_path)
    lab_test(second, tmp_path, MemoryBroker())


def test_a_removal_that_was_journaled_but_not_published_reaches_the_device_after_a_restart(tmp_path: Path) -> None:
    """The device still runs what was removed: nobody but the device remembers it."""
    epoch: list[int] = []

    async def first(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.coordinator.put_in_force(record(lab.coordinator, "a"))
        epoch.append(lab.coordinator.records()[0].plan.epoch)
        lab.coordinator.journal.remove_deployment("tiny")  # and then the power failed

    async def second(lab: Lab) -> None:
        await lab.with_boards("a")
        board = lab.boards["a"]
        board.apply(epoch[0], StageReport(deployment="tiny", epoch=epoch[0], stage=0, phase="ready"))
        await until(lambda: bool(lab.coordinator.applied()))
        lab.coordinator.tick()
        await until(lambda: bool(board.orders), "an order")
        assert board.orders[-1].stages == ()
        assert board.orders[-1].epoch > epoch[0]

    lab_test(first, tmp_path)
    lab_test(second, tmp_path, MemoryBroker())


def test_taking_out_of_force_ends_the_stages_the_plan_and_the_requests(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.coordinator.put_in_force(record(lab.coordinator, "a"))
        await until(lambda: bool(lab.boards["a"].orders))
        told: list[tuple[str, str]] = []
        lab.coordinator.on_deployment_removed = lambda name, reason: told.append((name, reason))
        lab.coordinator.take_out_of_force("tiny")
        await until(lambda: lab.boards["a"].orders[-1].stages == ())
        first, last = lab.boards["a"].orders[0], lab.boards["a"].orders[-1]
        assert last.epoch > first.epoch
        assert [name for name, _ in told] == ["tiny"]
        await until(lambda: topics.PLAN.on(SITE, "tiny") not in lab.broker.retained)

    lab_test(scenario, tmp_path)


def test_a_replaced_plan_ends_the_requests_of_the_old_one(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b")
        lab.coordinator.put_in_force(record(lab.coordinator, "a"))
        told = losses(lab.coordinator)
        lab.coordinator.put_in_force(record(lab.coordinator, "b"))
        assert [name for name, _ in told] == ["tiny"] and "replaced" in told[0][1]
        await until(lambda: bool(lab.boards["a"].orders) and lab.boards["a"].orders[-1].stages == ())

    lab_test(scenario, tmp_path)


# Epochs.


def test_a_new_epoch_is_above_all_that_devices_have_applied(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.boards["a"].apply(5000)
        await until(lambda: bool(lab.coordinator.applied()))
        assert lab.coordinator.next_epoch() == 5001
        assert lab.coordinator.next_epoch() == 5002

    lab_test(scenario, tmp_path)


def test_an_absurd_applied_epoch_does_not_push_ours_out_of_range(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.boards["a"].apply(2**53)
        await until(lambda: bool(lab.coordinator.applied()))
        assert lab.coordinator.next_epoch() < EPOCH_JUMP_LIMIT
        lab.coordinator.tick()
        assert not lab.boards["a"].orders

    lab_test(scenario, tmp_path)


def test_a_device_that_obeys_a_later_epoch_than_ours_gets_an_order_that_it_takes(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        made = record(lab.coordinator, "a")
        lab.coordinator.put_in_force(made)
        lab.boards["a"].apply(900)
        await until(lambda: bool(lab.coordinator.applied()))
        lab.coordinator.tick()
        await until(lambda: bool(lab.boards["a"].orders) and lab.boards["a"].orders[-1].epoch > 900)
        assert lab.boards["a"].orders[-1].stages == made.orders["a"]
        count = len(lab.boards["a"].orders)
        lab.coordinator.tick()
        await asyncio.sleep(0.05)
        assert len(lab.boards["a"].orders) == count, "said once"

    lab_test(scenario, tmp_path)


def test_a_plan_that_was_overtaken_by_a_correction_is_still_published_above_it(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b")
        made = record(lab.coordinator, "a")
        lab.boards["b"].apply(3, StageReport(deployment="stray", epoch=3, stage=0, phase="ready"))
        await until(lambda: bool(lab.coordinator.applied()))
        lab.coordinator.tick()
        await until(lambda: bool(lab.boards["b"].orders))
        corrected = lab.boards["b"].orders[-1].epoch
        assert corrected > made.plan.epoch
        lab.coordinator.put_in_force(made)
        await until(lambda: bool(lab.boards["a"].orders))
        assert lab.boards["a"].orders[-1].epoch > corrected

    lab_test(scenario, tmp_path)


# Losses.


def test_a_device_that_leaves_ends_the_requests_of_its_deployments(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a", "b", "c")
        lab.coordinator.put_in_force(record(lab.coordinator, "a", "b"))
        told = losses(lab.coordinator)
        lab.boards["c"].leave()
        lab.boards["b"].leave()
        await until(lambda: bool(told))
        assert [name for name, _ in told] == ["tiny"]
        assert "b went away" in told[0][1]

    lab_test(scenario, tmp_path)


def test_a_device_that_falls_silent_ends_its_requests_when_it_is_offline_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        coordinator = lab.coordinator
        coordinator.put_in_force(record(coordinator, "a"))
        told = losses(coordinator)
        beat_s = coordinator.fleet.devices["a"].beat_s
        assert beat_s is not None
        clock = Clock(beat_s + SUSPECT_AFTER_S + 0.1)
        monkeypatch.setattr("coordinator.service.time", clock)
        coordinator.tick()
        assert coordinator.fleet.devices["a"].presence is Presence.SUSPECT and not told
        clock.now_s = beat_s + OFFLINE_AFTER_S + 0.1
        coordinator.tick()
        assert coordinator.fleet.devices["a"].presence is Presence.OFFLINE
        assert [name for name, _ in told] == ["tiny"]

    lab_test(scenario, tmp_path)


class Clock:
    """The part of the module time that the service uses."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s


def test_a_restarted_agent_ends_the_requests_of_its_old_workers(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.coordinator.put_in_force(record(lab.coordinator, "a"))
        told = losses(lab.coordinator)
        Board(lab.broker, "a", boot="b00701").join()
        await until(lambda: bool(told))

    lab_test(scenario, tmp_path)


@pytest.mark.parametrize("how", ["loading", "failed", "started again unseen"])
def test_a_worker_that_ended_ends_its_requests(how: str, tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        made = record(lab.coordinator, "a")
        lab.coordinator.put_in_force(made)
        ready = report(made.plan, 0, "ready")
        lab.boards["a"].apply(made.plan.epoch, ready)
        lab.boards["a"].apply(made.plan.epoch, ready)
        await until(lambda: bool(lab.coordinator.applied()))
        told = losses(lab.coordinator)
        if how == "started again unseen":
            lab.boards["a"].apply(made.plan.epoch, msgspec.structs.replace(ready, restarts=1))
        else:
            lab.boards["a"].apply(made.plan.epoch, report(made.plan, 0, how, detail="signal 9"))
        await until(lambda: bool(told))
        assert [name for name, _ in told] == ["tiny"] and "stage 0" in told[0][1]

    lab_test(scenario, tmp_path)


def test_a_lost_broker_ends_the_requests_that_were_under_way_and_is_said(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.with_boards("a")
        lab.coordinator.put_in_force(record(lab.coordinator, "a"))
        told = losses(lab.coordinator)
        lab.broker.stop()
        await until(lambda: bool(told))
        assert lab.notices("broker-lost")
        assert not lab.coordinator.broker_up
        assert lab.coordinator.is_online("a"), "silence means nothing while we ourselves hear nothing"

    lab_test(scenario, tmp_path)


# The rest.


def test_notices_are_rows_of_the_table_and_the_oldest_give_way(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        vandal = Client(lab.broker, "vandal")
        for number in range(300):
            vandal.say(topics.STATE, b"x", f"board-{number}")
        await until(lambda: lab.coordinator.refused_messages == 300)
        assert len(lab.coordinator.notices) == lab.coordinator.notices.maxlen
        assert {event.code for event in lab.coordinator.notices} <= set(TABLE)

    lab_test(scenario, tmp_path)


@pytest.mark.parametrize("where", ["/dev/null/state", "/proc/edgelam-test"])
def test_a_state_folder_that_can_not_be_written_is_the_users_mistake(where: str) -> None:
    with pytest.raises(UsageError, match="can't be opened"):
        Journal(Path(where) / "journal.sqlite").open()
