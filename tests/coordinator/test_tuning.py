"""Jobs over boards in memory that answer as a test wants: what counts, what does not, what is left after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import base_of
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.offers import Timing
from coordinator.rounds.store import JobStore
from coordinator.rounds.tuning import Tuning
from coordinator.shelf import Prepared
from models.lora.adapter import length_of, shapes
from models.text import Tokenizer
from tests.coordinator.memory_site import SITE, Board, Lab, running, until
from tests.models.stages import packed_tiny, tiny_checkpoint
from wire import topics
from wire.channel import Inbox, Outbox
from wire.errors import EdgelamError, Refused, UsageError
from wire.frames import Kind, Parcel, Tensor
from wire.memory import MemoryBroker
from wire.messages import DeviceInfo, EngineInfo, RoundMeta, StageError, StageReport, UpdateMeta
from wire.privacy import Privacy

JOB = Job(name="n", model="tiny", data="notes", precision="f32", adapter=Adapter(rank=1, matrices=("q",)),
          rounds=Rounds(count=2, learning_rate=0.01, steps=1))  # fmt: skip


class Trainer(Board):
    """Adds to the factors of each round what `answers` says."""

    def __init__(self, broker: MemoryBroker, name: str, answer: Callable[[Trainer, Parcel, RoundMeta], Any]) -> None:
        super().__init__(broker, name)
        self._answer = answer
        self._inbox: Inbox | None = None
        self.asked: list[int] = []
        self.restarts = 0
        self.closed = 0

    def join(self) -> None:
        super().join()
        info = DeviceInfo(
            device=self.name, boot=self.boot, software="0.1.0", board="made up", arch="x86_64", os="Linux",
            python="3.11", cores=4.0, cores_because="no limit", memory_bytes=2**32, memory_because="total",
            engines=(EngineInfo(name="torch", version="2.9"),), data=("notes",),
        )  # fmt: skip
        self.say(topics.INFO, info, self.name)

    def turn(self) -> None:
        """Hold what was ordered, and answer what came."""
        orders = self.orders
        if orders and orders[-1].stages:
            [order] = orders[-1].stages
            if self._inbox is None or self._inbox_topic != order.inbox.topic:
                self._inbox, self._inbox_topic = Inbox(self.transport, order.inbox.topic), order.inbox.topic
                self.transport.poll(0)
            report = StageReport(
                deployment=order.deployment, epoch=order.epoch, stage=order.stage, phase="ready",
                restarts=self.restarts,
            )  # fmt: skip
            self.apply(orders[-1].epoch, report)
            self.held = order.training
        if self._inbox is None:
            return
        self._inbox.tick()
        while (delivery := self._inbox.take()) is not None:
            parcel = delivery.parcel
            if parcel.kind is Kind.CLOSE:
                self.closed += 1
                self._inbox.done(delivery)
                continue
            meta = msgspec.json.decode(parcel.meta, type=RoundMeta)
            self.asked.append(meta.round)
            self._inbox.done(delivery)
            answer = self._answer(self, parcel, meta)
            if answer is not None:
                Outbox(self.transport, meta.reply.topic).send(answer)
                self.transport.poll(0)


def update(board: Trainer, parcel: Parcel, meta: RoundMeta, change: Any = 0.001, **changes: Any) -> Parcel:
    """What an honest board answers, unless `changes` say otherwise."""
    assert parcel.tensor is not None
    told = UpdateMeta(round=meta.round, device=board.name, samples=4, held_out_loss=2.0, held_out_count=3, loss=1.0)
    vector = (parcel.tensor.array() + np.float32(change)).astype(np.float32)
    tensor = Tensor.of(vector) if meta.train else None
    made = Parcel(Kind.UPDATE, parcel.epoch, parcel.request, 0, 0, tensor, msgspec.json.encode(told))
    return msgspec.structs.replace(made, **changes)


class Operations:
    """Prepares one tiny model."""

    def __init__(self, folder: Path) -> None:
        checkpoint = tiny_checkpoint(folder, as_gguf=True)
        packed = packed_tiny(folder, precision="f32", as_gguf=True)
        self.prepared = Prepared("tiny", checkpoint, packed, Tokenizer.from_checkpoint(checkpoint))
        self.preparing = self

    async def prepare(self, _model: str, _precision: str, _say: Any) -> Prepared:
        return self.prepared

    async def await_broker(self) -> None:
        return


class Bench:
    def __init__(self, lab: Lab, operations: Operations, folder: Path) -> None:
        self.lab = lab
        self.operations = operations
        self.store = JobStore(folder / "jobs", lab.coordinator.journal)
        self.tuning = Tuning(lab.coordinator, operations, self.store)  # type: ignore[arg-type]
        self.trainers: list[Trainer] = []
        self.events: list[dict[str, Any]] = []

    async def with_trainers(self, **answers: Any) -> None:
        for name, answer in answers.items():
            trainer = Trainer(self.lab.broker, name, answer)
            trainer.join()
            self.trainers.append(trainer)
        await until(lambda: set(answers) <= set(self.lab.coordinator.online()), "boards online")
        await until(
            lambda: all(device.info and device.info.data for device in self.lab.coordinator.devices()), "data known"
        )

    async def through(self, job: Job = JOB) -> dict[str, Any]:
        """Begin a job and see it through; gives its end."""
        await self.tuning.begin(job, lambda _: None)
        return await self.follow(job.name)

    async def follow(self, name: str) -> dict[str, Any]:
        async def watch() -> None:
            async for event in self.tuning.follow(name):
                self.events.append(event)

        watching = asyncio.ensure_future(watch())
        await self.turns(watching.done)
        await watching
        return self.events[-1]

    async def turns(self, done: Callable[[], bool]) -> None:
        def turn() -> bool:
            for trainer in self.trainers:
                trainer.turn()
            return done()

        await until(turn, "the boards are done")

    def ends_bytes(self, job: Job) -> int:
        """Room for the ends of the model, and for nothing beside them."""
        return base_of(self.operations.prepared, job).ends_bytes(job)

    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "round"]


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Operations:
    return Operations(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def play(tmp_path: Path, operations: Operations) -> Any:
    @asynccontextmanager
    async def bench() -> Any:
        async with running(tmp_path) as lab:
            made = Bench(lab, operations, tmp_path)
            try:
                yield made
            finally:
                await made.tuning.close()

    def run(scenario: Callable[..., Awaitable[None]]) -> None:
        asyncio.run(asyncio.wait_for(scenario(bench), 60))

    return run


def factors(bench: Bench) -> Any:
    return bench.store.factors(bench.store.records()["n"])


def test_two_boards_make_an_adapter_of_the_mean(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(
                a=lambda *given: update(*given, change=0.001), b=lambda *given: update(*given, change=0.003)
            )
            end = await made.through()
            assert (end["state"], end["round"], end["held_out_loss"]) == ("done", 2, 2.0)
            assert [one["round"] for one in made.rounds()] == [0, 1, 2]
            packed = made.operations.prepared.packed
            length = length_of(shapes(packed.config, spec_of(JOB)))
            assert made.rounds()[0]["up_bytes"] == made.rounds()[0]["down_bytes"] == 2 * 4 * length
            assert factors(made)[-1] == pytest.approx(0.004, rel=1e-4), "B begins at nothing, and moves by 0.002 twice"
            for trainer in made.trainers:
                assert trainer.asked == [0, 1, 2]
                await until(lambda trainer=trainer: trainer.orders[-1].stages == (), "nothing is left to hold")
            config = msgspec.json.decode(made.tuning.file("n", "adapter_config.json"))
            assert config["target_modules"] == ["q_proj"]

    play(scenario)


def damaged(board: Trainer, parcel: Parcel, meta: RoundMeta, what: str) -> Parcel:
    assert parcel.tensor is not None
    if not meta.train:
        return update(board, parcel, meta)
    size = parcel.tensor.shape[0]
    vectors = {
        "NaN": np.full(size, np.nan, np.float32),
        "short": np.zeros(size - 1, np.float32),
        "half": np.zeros(size, np.float16),
        "scaled": np.full(size, 1e6, np.float32),
    }
    if what in vectors:
        return update(board, parcel, meta, tensor=Tensor.of(vectors[what]))
    honest = msgspec.json.decode(update(board, parcel, meta).meta, type=UpdateMeta)
    metas = {
        "replayed": msgspec.structs.replace(honest, round=meta.round + 7),
        "of another": msgspec.structs.replace(honest, device="b"),
        "of nothing": msgspec.structs.replace(honest, samples=0),
    }
    data = msgspec.json.encode(metas[what]) if what in metas else b"{"
    return msgspec.structs.replace(update(board, parcel, meta), meta=data)


@pytest.mark.parametrize("what", ["NaN", "short", "half", "scaled", "replayed", "of another", "of nothing", "no JSON"])
def test_what_is_no_update_changes_nothing_and_its_sender_is_named(what: str, play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=lambda *given: damaged(*given, what), b=update)
            end = await made.through()
            assert end["state"] == "done"
            assert [event["device"] for event in made.events if event["event"] == "refused"] == ["a", "a"]
            assert all(one["devices"]["a"]["refused"] for one in made.rounds()[:2])
            assert factors(made)[-1] == pytest.approx(0.002, rel=1e-4), "as by b alone"

    play(scenario)


def test_boards_of_different_ranks_train_their_part(play: Any) -> None:
    sizes: dict[str, int] = {}

    def answer(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        assert parcel.tensor is not None
        sizes[board.name] = parcel.tensor.shape[0]
        return update(board, parcel, meta)

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(small=answer, large=answer)
            ranks = Adapter(rank=4, matrices=("q",), ranks={"small": 1})
            rounds = msgspec.structs.replace(JOB.rounds, aggregation="svd")
            end = await made.through(msgspec.structs.replace(JOB, adapter=ranks, rounds=rounds))
            assert end["state"] == "done"
            assert sizes["large"] == 4 * sizes["small"]
            tasks = {trainer.name: trainer.held for trainer in made.trainers}
            assert {name: (task.rank, task.alpha) for name, task in tasks.items()} == {"small": (1, 2), "large": (4, 8)}

    play(scenario)


def test_what_comes_twice_counts_once(play: Any) -> None:
    def twice(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        Outbox(board.transport, meta.reply.topic).send(update(board, parcel, meta))
        return update(board, parcel, meta, change=0.005)

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=twice)
            assert (await made.through())["state"] == "done"
            assert factors(made)[-1] == pytest.approx(0.002, rel=1e-4)

    play(scenario)


def test_a_board_that_fails_is_out_of_the_round_and_too_few_end_the_job(play: Any) -> None:
    def failing(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        told = StageError(stage=0, device=board.name, code="engine", text="the loss is nan")
        return Parcel(Kind.ERROR, parcel.epoch, parcel.request, meta=msgspec.json.encode(told))

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=failing)
            end = await made.through()
            assert end["state"] == "failed" and "a: the loss is nan" in end["because"]
            made.trainers[0]._answer = update
            assert made.tuning.resume("n")["state"] == "running"
            assert (await made.follow("n"))["state"] == "done"

    play(scenario)


def test_behind_the_deadline_a_round_goes_on_without_who_is_missing(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=lambda _b, _p, meta: None)
            end = await made.through(
                msgspec.structs.replace(JOB, rounds=msgspec.structs.replace(JOB.rounds, timeout_s=1.0))
            )
            assert end["state"] == "done"
            assert [one["devices"]["b"]["refused"] for one in made.rounds()] == ["no answer in time"] * 3
            await until(lambda: made.trainers[1].turn() or made.trainers[1].closed >= 2, "it need not go on")

    play(scenario)


def test_a_worker_that_was_started_again_is_asked_again(play: Any) -> None:
    def dies_once(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel | None:
        if board.restarts == 0:
            board.restarts = 1
            return None
        return update(board, parcel, meta)

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=dies_once)
            assert (await made.through())["state"] == "done"
            assert made.trainers[0].asked == [0, 0, 1, 2]

    play(scenario)


def test_a_coordinator_that_was_killed_goes_on_with_what_was_counted(play: Any, tmp_path: Path) -> None:
    silent = True

    def hesitates(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel | None:
        return None if silent else update(board, parcel, meta)

    async def scenario(bench: Any) -> None:
        nonlocal silent
        async with bench() as first:
            await first.with_trainers(a=update, b=hesitates)
            await first.tuning.begin(JOB, lambda _: None)
            await first.turns(lambda: "a" in first.store.updates("n", 0) and bool(first.trainers[1].asked))
        silent = False
        async with bench() as second:
            await second.with_trainers(a=update, b=hesitates)
            second.tuning.restore()
            assert all(order.stages for trainer in second.trainers for order in trainer.orders), "nobody is to stop"
            assert (await second.follow("n"))["state"] == "done"
            assert 0 not in second.trainers[0].asked, "what was counted is not asked for again"
            assert 0 in second.trainers[1].asked

    play(scenario)


def test_who_takes_part_in_a_round_is_settled_once(play: Any) -> None:
    rounds = msgspec.structs.replace(JOB.rounds, who="random", devices=1, count=1)
    wanted = msgspec.structs.replace(JOB, rounds=rounds)

    async def scenario(bench: Any) -> None:
        async with bench() as first:
            await first.with_trainers(a=lambda *_: None, b=lambda *_: None)
            await first.tuning.begin(wanted, lambda _: None)
            await first.turns(lambda: bool(first.trainers[0].asked or first.trainers[1].asked))
            [chosen] = first.store.records()["n"].chosen
        async with bench() as second:
            await second.with_trainers(a=update, b=update, c=update)
            second.tuning.restore()
            assert (await second.follow("n"))["state"] == "done"
            assert list(second.rounds()[0]["devices"]) == [chosen]

    play(scenario)


def test_behind_a_restart_boards_that_took_part_are_given_a_moment(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as first:
            await first.with_trainers(a=lambda *_: None, b=lambda *_: None)
            await first.tuning.begin(JOB, lambda _: None)
            await first.turns(lambda: all(trainer.asked for trainer in first.trainers))
        async with bench() as second:
            record = second.store.records()["n"]
            second.store.save(msgspec.structs.replace(record, chosen=()))  # killed before it was settled
            await second.with_trainers(a=update)
            second.tuning.restore()
            await asyncio.sleep(0.3)
            await second.with_trainers(b=update)
            assert (await second.follow("n"))["state"] == "done"
            assert set(second.rounds()[0]["devices"]) == {"a", "b"}

    play(scenario)


def test_a_board_of_little_memory_computes_again_and_one_of_less_is_not_chosen(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=update, c=update)
            for trainer, memory in zip(made.trainers, (2**32, 500 * 2**20, 2**28), strict=True):
                info = next(one.info for one in made.lab.coordinator.devices() if one.name == trainer.name)
                trainer.say(topics.INFO, msgspec.structs.replace(info, memory_bytes=memory), trainer.name)
            await until(
                lambda: {one.info.memory_bytes for one in made.lab.coordinator.devices()} >= {2**28}, "memory is known"
            )
            all_three = msgspec.structs.replace(JOB, rounds=msgspec.structs.replace(JOB.rounds, at_least=3))
            with pytest.raises(Refused, match=r"c: would take \d.* of its 256.* of memory; fewer rounds\.row_tokens"):
                await made.tuning.begin(all_three, lambda _: None)
            assert (await made.through())["state"] == "done"
            assert set(made.rounds()[0]["devices"]) == {"a", "b"}
            assert [trainer.held.remember for trainer in made.trainers[:2]] == [True, False]

    play(scenario)


def test_a_board_that_has_no_room_for_a_batch_takes_fewer_rows_at_a_time(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=update)
            job = msgspec.structs.replace(JOB, rounds=msgspec.structs.replace(JOB.rounds, batch_rows=5))
            base = base_of(made.operations.prepared, job)
            room = base.peak_bytes(job, "b", 3, remember=False)
            assert base.peak_bytes(job, "b", 5, remember=False) > room
            board = made.trainers[1]
            info = next(one.info for one in made.lab.coordinator.devices() if one.name == "b")
            board.say(topics.INFO, msgspec.structs.replace(info, memory_bytes=room), "b")
            await until(
                lambda: room in {one.info.memory_bytes for one in made.lab.coordinator.devices()}, "memory is known"
            )
            assert (await made.through(job))["state"] == "done"
            assert [(one.held.remember, one.held.rows_at_once) for one in made.trainers] == [(True, 5), (False, 3)]

    play(scenario)


def test_a_shared_medium_is_divided_and_boards_are_told_how_fast_to_send(play: Any) -> None:
    metas: list[RoundMeta] = []

    def note(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        metas.append(meta)
        return update(board, parcel, meta)

    async def scenario(bench: Any) -> None:
        for airtime in ("planned", "equal"):
            metas.clear()
            rounds = msgspec.structs.replace(JOB.rounds, medium="shared", airtime=airtime)
            async with bench() as made:
                await made.with_trainers(a=note, b=note)
                assert (await made.through(msgspec.structs.replace(JOB, rounds=rounds)))["state"] == "done"
                paces = [meta.bytes_per_s for meta in metas if meta.train]
                assert len(paces) == 4 and all(pace is not None for pace in paces)
                assert paces[:2] == pytest.approx([0.5e9, 0.5e9]), "two boards that nothing is known of have half each"
                assert [meta.bytes_per_s for meta in metas if not meta.train] == [None, None]
                assert [one["expected_s"] is not None for one in made.rounds()] == [False, True, False]
                assert set(made.store.records()["n"].timing) == {"a", "b"}

    play(scenario)


def slow(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
    """A board that says that it computes for 50 s."""
    made = update(board, parcel, meta)
    told = msgspec.structs.replace(msgspec.json.decode(made.meta, type=UpdateMeta), compute_s=50.0)
    return msgspec.structs.replace(made, meta=msgspec.json.encode(told))


@pytest.mark.parametrize("who", ["fastest", "scheduled"])
def test_a_slow_board_is_left_out_when_it_is_known(who: str, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody here computes for 50 s, so what the board says is believed.
    monkeypatch.setattr("coordinator.rounds.running.learnt", lambda _, __, took: Timing(compute_s=took.compute_s))
    fields = {"delay_s": 1e-3, "tradeoff": 1e-3, "least_share": 0.0} if who == "scheduled" else {"devices": 2}
    rounds = msgspec.structs.replace(JOB.rounds, who=who, count=9, **fields)

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=slow, c=update)
            assert (await made.through(msgspec.structs.replace(JOB, rounds=rounds)))["state"] == "done"
            trained = [set(one["devices"]) for one in made.rounds()[:-1]]
            assert [number for number, devices in enumerate(trained) if "b" in devices] == [0], "tried, and then known"
            record = made.store.records()["n"]
            assert record.timing["b"].compute_s > 40 > record.timing["a"].compute_s
            assert set(made.rounds()[-1]["devices"]) == {"a", "b", "c"}, "all judge what came out"

    play(scenario)


def test_a_board_whose_software_knows_no_privacy_is_not_asked_in_a_private_job(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update)
            wanted = msgspec.structs.replace(JOB, privacy=Privacy(epsilon=4.0))
            with pytest.raises(Refused, match="knows no private jobs"):
                await made.tuning.begin(wanted, lambda _: None)
            [trainer] = made.trainers
            info = made.lab.coordinator.devices()[0].info
            trainer.say(topics.INFO, msgspec.structs.replace(info, knows_privacy=True), "a")
            await until(lambda: made.lab.coordinator.devices()[0].info.knows_privacy, "it was updated")
            end = await made.through(wanted)
            assert end["state"] == "failed" and "says nothing of noise" in end["because"], "it lied"

    play(scenario)


def test_a_board_that_is_away_when_a_round_begins_is_not_waited_for(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=update)
            made.trainers[1].leave()
            await until(lambda: "b" not in made.lab.coordinator.online(), "b has left")
            await made.tuning.begin(msgspec.structs.replace(JOB, devices=("a", "b")), lambda _: None)
            assert (await made.follow("n"))["state"] == "done"
            assert [set(one["devices"]) for one in made.rounds()] == [{"a"}, {"a"}, {"a"}]

    play(scenario)


def test_what_can_not_be_is_refused(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            with pytest.raises(Refused, match="0 of 1 boards"):
                await made.tuning.begin(JOB, lambda _: None)
            await made.with_trainers(a=lambda *_: None)
            with pytest.raises(Refused, match="a: has no data 'poems'"):
                await made.tuning.begin(msgspec.structs.replace(JOB, data="poems"), lambda _: None)
            with pytest.raises(Refused, match="gone: not heard of"):
                await made.tuning.begin(msgspec.structs.replace(JOB, devices=("gone",)), lambda _: None)
            with pytest.raises(EdgelamError, match="context"):
                long = msgspec.structs.replace(JOB.rounds, row_tokens=100_000)
                await made.tuning.begin(msgspec.structs.replace(JOB, rounds=long), lambda _: None)
            await made.tuning.begin(JOB, lambda _: None)
            with pytest.raises(UsageError, match="is under way"):
                await made.tuning.begin(JOB, lambda _: None)
            with pytest.raises(UsageError, match="no adapter yet"):
                made.tuning.file("n", "adapter_model.safetensors")
            with pytest.raises(UsageError, match="no file"):
                made.tuning.file("n", "../journal.sqlite")
            for name in ("x", "../n", ""):
                with pytest.raises(UsageError, match="no job"):
                    await made.tuning.stop(name)
            assert (await made.tuning.stop("n"))["state"] == "stopped"
            assert made.tuning.rows()[0]["because"] == "somebody stopped it"

    play(scenario)


def test_a_topic_of_a_job_is_one_of_the_site() -> None:
    assert topics.INBOX.on(SITE, f"tune-{'n' * 27}", "0")
