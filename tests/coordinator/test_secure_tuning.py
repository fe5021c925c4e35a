"""Who is asked in a secure job, and who is not believed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.coordinator.memory_site import until
from tests.coordinator.test_tuning import JOB, operations, play, update
from wire import topics
from wire.errors import Refused

__all__ = ["operations", "play"]


def test_a_board_that_can_not_mask_its_update_is_not_asked_in_a_secure_job(play: Any) -> None:
    async def scenario(bench: Any) -> None:
        async with bench() as made:
            await made.with_trainers(a=update, b=update, c=update)
            rounds = msgspec.structs.replace(JOB.rounds, at_least=3)
            wanted = msgspec.structs.replace(JOB, secure=True, rounds=rounds)
            for trainer in made.trainers[1:]:
                info = next(one.info for one in made.lab.coordinator.devices() if one.name == trainer.name)
                trainer.say(topics.INFO, msgspec.structs.replace(info, knows_secure=True), trainer.name)
            await until(lambda: sum(one.info.knows_secure for one in made.lab.coordinator.devices()) == 2, "updated")
            with pytest.raises(Refused, match=r"2 of 3 boards .*a: its software, 0\.1\.0, can't mask updates"):
                await made.tuning.begin(wanted, lambda _: None)
            trainer = made.trainers[0]
            trainer.say(
                topics.INFO, msgspec.structs.replace(info, device="a", boot=trainer.boot, knows_secure=True), "a"
            )
            await until(lambda: all(one.info.knows_secure for one in made.lab.coordinator.devices()), "updated, too")
            end = await made.through(wanted)
            assert end["state"] == "failed" and "holds an update without a mask" in end["because"], "they lied"
            assert end["secure"] and all(trainer.held.secure for trainer in made.trainers)

    play(scenario)
