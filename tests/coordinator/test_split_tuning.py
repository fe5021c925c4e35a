"""Jobs that split their model: where the blocks go."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.rounds.job import Adapter
from tests.coordinator.memory_site import until
from tests.coordinator.test_tuning import JOB, Trainer, operations, play, update
from wire import topics
from wire.errors import Refused
from wire.frames import Kind, Parcel
from wire.messages import RoundMeta, StageError, UpdateMeta
from wire.privacy import Privacy

__all__ = ["operations", "play"]


def ends_update(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
    """Of a board that has the ends of a split model."""
    assert parcel.tensor is None and meta.split is not None
    told = UpdateMeta(round=meta.round, device=board.name, samples=4, held_out_loss=2.0, held_out_count=3, loss=1.0)
    return Parcel(Kind.UPDATE, parcel.epoch, parcel.request, 0, 0, None, msgspec.json.encode(told))


@pytest.mark.parametrize("another", [True, False])
def test_blocks_leave_a_board_that_could_not_have_them_if_there_is_another(another: bool, play: Any) -> None:
    failed: list[int] = []

    def fails_once(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        if failed:
            return update(board, parcel, meta)
        failed.append(meta.round)
        error = StageError(stage=255, device=board.name, code="engine", text="out of memory")
        return Parcel(Kind.ERROR, parcel.epoch, parcel.request, 0, 0, None, msgspec.json.encode(error))

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            answers = {"t": fails_once, "z": ends_update, **({"u": update} if another else {})}
            await made.with_trainers(**answers)
            for trainer in made.trainers:
                info = next(one.info for one in made.lab.coordinator.devices() if one.name == trainer.name)
                data = info.data if trainer.name == "z" else ()
                memory = 2**32 if trainer.name != "z" else made.ends_bytes(JOB)
                told = msgspec.structs.replace(info, knows_split=True, data=data, memory_bytes=memory)
                trainer.say(topics.INFO, told, trainer.name)
            await until(lambda: all(one.info.knows_split for one in made.lab.coordinator.devices()), "infos")
            end = await made.through(msgspec.structs.replace(JOB, mode="split"))
            assert end["state"] == "failed" and "out of memory" in end["because"]
            assert made.store.records()["n"].passed_over == ("t",)
            made.tuning.resume("n")
            assert (await made.follow("n"))["state"] == "done"
            record = made.store.records()["n"]
            [trunk] = record.trunk
            assert (trunk.device, trunk.stage) == ("u" if another else "t", 254), "it moved once"
            assert record.passed_over == (("t",) if another else ())
            assert set(made.rounds()[-1]["devices"]) == {"z", trunk.device}

    play(scenario)


def timed(own_s: dict[str, float]) -> Any:
    """A trunk that says how long boards took by themselves."""

    def answer(board: Trainer, parcel: Parcel, meta: RoundMeta) -> Parcel:
        assert meta.split is not None
        made = update(board, parcel, meta)
        ends = [peer.device for peer in meta.split.ends]
        told = msgspec.json.decode(made.meta, type=UpdateMeta)
        told = msgspec.structs.replace(told, own_s={device: own_s[device] for device in (*ends, "stranger")})
        return msgspec.structs.replace(made, meta=msgspec.json.encode(told))

    return answer


@pytest.mark.parametrize("who", ["fastest", "scheduled"])
def test_a_slow_board_is_left_out_of_steps_that_all_make_together_when_it_is_known(who: str, play: Any) -> None:
    fields = {"delay_s": 1e-9, "tradeoff": 1e-12, "least_share": 0.0} if who == "scheduled" else {"devices": 2}
    rounds = msgspec.structs.replace(JOB.rounds, who=who, count=7, **fields)
    own_s = {"a": 1e-5, "b": 50.0, "c": 2e-5, "stranger": 1.0}

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(t=timed(own_s), a=ends_update, b=ends_update, c=ends_update)
            for trainer in made.trainers:
                info = next(one.info for one in made.lab.coordinator.devices() if one.name == trainer.name)
                data = info.data if trainer.name != "t" else ()
                trainer.say(topics.INFO, msgspec.structs.replace(info, knows_split=True, data=data), trainer.name)
            await until(lambda: all(one.info.knows_split for one in made.lab.coordinator.devices()), "infos")
            end = await made.through(msgspec.structs.replace(JOB, mode="split", trunk="t", rounds=rounds))
            assert end["state"] == "done", end
            trained = [set(one["devices"]) - {"t"} for one in made.rounds()[:-1]]
            assert [number for number, devices in enumerate(trained) if "b" in devices] == [0], "tried, and then known"
            assert trained[-1] == ({"a", "c"} if who == "fastest" else {"a"})
            record = made.store.records()["n"]
            assert set(record.timing) == {"a", "b", "c"} and record.timing["a"].compute_s == pytest.approx(1e-5)
            first, last = made.rounds()[0], made.rounds()[-2]
            assert record.timing["b"].compute_s == first["devices"]["b"]["own_s"] <= first["wall_s"], "not as it says"
            assert first["expected_s"] is None and last["expected_s"] > 1e-5
            assert record.each_s > 0 and made.rounds()[-1]["expected_s"] is None


def test_a_private_job_takes_nobody_who_does_not_know_how_and_nothing_that_has_no_noise(play: Any) -> None:
    wanted = msgspec.structs.replace(
        JOB, mode="split", uplink_grad="lowrank", privacy=Privacy(epsilon=4.0), trunk="t", devices=("z",),
        adapter=Adapter(rank=2, matrices=("down",), blocks="last"),
        rounds=msgspec.structs.replace(JOB.rounds, aggregation="ffa"),
    )  # fmt: skip

    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(t=lambda *_: None, z=ends_update)
            told = {"knows_split": True, "knows_privacy": True, "private_data": ("d",)}

            async def says(**more: Any) -> None:
                told.update(more)
                for trainer in made.trainers:
                    info = next(one.info for one in made.lab.coordinator.devices() if one.name == trainer.name)
                    data = info.data if trainer.name == "z" else ()
                    told["private_data"] = data
                    trainer.say(topics.INFO, msgspec.structs.replace(info, **told, data=data), trainer.name)
                known = told.items()
                await until(
                    lambda: all(
                        getattr(one.info, key) == value
                        for one in made.lab.coordinator.devices() if one.name == "z"
                        for key, value in known if key != "private_data"
                    ),
                    "infos",
                )  # fmt: skip

            await says()
            with pytest.raises(Refused, match="states of its data, which no noise covers, are not to leave it"):
                await made.tuning.begin(wanted, lambda _: None)
            await says(told_states=(JOB.data,))
            with pytest.raises(Refused, match="knows no private jobs of split models"):
                await made.tuning.begin(wanted, lambda _: None)
            await says(knows_private_split=True)
            end = await made.through(wanted)
            assert end["state"] == "failed" and "z: says nothing of noise" in end["because"]
            said = [event["text"] for event in made.events if event["event"] == "status"]
            assert any("only gradients are covered; activations are not" in text for text in said)

    play(scenario)
