"""A stage that does not answer is left out, one that forgot is told again, one that works is left in peace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from coordinator.inference import serve, silence, watch
from coordinator.presence import Presence
from tests.coordinator.memory_site import until
from tests.coordinator.test_recovery import given as given_tokens
from tests.coordinator.test_recovery import start
from tests.coordinator.test_serving import Ring, Scenario, play
from tests.coordinator.test_silence import standing
from wire.frames import Kind, Parcel
from wire.messages import Inquiry

__all__ = ["play"]

Play = Callable[[Scenario], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RETRY_S", 0.02)
    monkeypatch.setattr(watch.Pace, "deadline_s", lambda _self, _live: 0.05)
    monkeypatch.setattr(watch.Pace, "answer_s", lambda _self: 0.1)
    monkeypatch.setattr(silence, "UNSURE_S", 0.2)


async def inquiry(made: Ring, count: int = 1) -> Parcel:
    def came() -> bool:
        made.poll()
        return len(made.inquiries) >= count

    await until(came, f"{count} inquiries")
    return made.inquiries[count - 1]


def say(made: Ring, prompt: Parcel, asked: Parcel, known: bool) -> None:
    number = msgspec.json.decode(asked.meta, type=Inquiry).number
    meta = msgspec.json.encode(standing(0, number, known, waiting=known))
    made.give(prompt, 0, 0, kind=Kind.STANDING, tensor=None, meta=meta)


def test_a_stage_that_is_there_but_forgot_the_request_gets_it_again(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given_tokens(made, first, "he")
        asked = await inquiry(made)
        assert (asked.request, asked.epoch) == (first.request, first.epoch)
        say(made, first, asked, known=False)
        second = await made.prompt(2)
        made.answer(second, "y")
        end = (await work)[-1]
        assert end["text"] == "hey" and "does not know the request" in end["pauses"][0]["reason"]
        assert made.lab.coordinator.is_online("a")

    play(scenario)


def test_a_stage_that_works_is_left_in_peace(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given_tokens(made, first, "he")
        for count in (1, 2, 3):
            say(made, first, await inquiry(made, count), known=True)
        made.give(first, 2, ord("y"), final=True)
        end = (await work)[-1]
        assert end["text"] == "hey" and end["pauses"] == []

    play(scenario)


def test_a_stage_that_does_not_answer_is_left_out_until_it_beats_and_its_deployment_is_given_up(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        coordinator = made.lab.coordinator
        record = coordinator.records()[0]
        work = start(made)
        await given_tokens(made, await made.prompt(), "he")
        await inquiry(made)
        made.operations.ready.clear()
        await made.lab.with_boards("other")
        await until(lambda: coordinator.fleet.devices["a"].presence is Presence.OFFLINE)
        assert coordinator.given_up(record) and made.lab.notices("device-unanswering")
        made.lab.boards["a"].beat()
        await until(lambda: coordinator.is_online("a"), "its heartbeat brings it back")
        assert coordinator.given_up(record), "but not into the plan that it was left out of"
        made.deploy()
        assert not coordinator._given_up
        made.operations.ready.set()
        made.answer(await made.prompt(2), "y")
        end = (await work)[-1]
        assert end["text"] == "hey" and end["pauses"][0]["reason"] == "a did not answer"

    play(scenario)


def test_if_nothing_at_all_is_heard_nobody_is_left_out(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, stall_timeout_s=1.0, recoveries_at_most=0)
        first = await made.prompt()
        await given_tokens(made, first, "he")
        await inquiry(made, 3)
        assert made.lab.coordinator.is_online("a")
        made.give(first, 2, ord("y"), final=True)
        assert (await work)[-1]["text"] == "hey"

    play(scenario)


@pytest.mark.parametrize("meta", [b"", b"{", b'{"stage":-1,"number":1,"known":true}', b'{"known":"x"}', b"[" * 4000])
def test_an_answer_that_can_not_be_read_is_none(meta: bytes, play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given_tokens(made, first, "he")
        await inquiry(made)
        made.give(first, 0, 0, kind=Kind.STANDING, tensor=None, meta=meta)
        made.give(first, 2, ord("y"), final=True)
        assert (await work)[-1]["text"] == "hey"

    play(scenario)


def test_a_flood_of_answers_is_not_kept(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given_tokens(made, first, "h")
        generation = made.serving._live[first.request]
        parcel = Parcel(Kind.STANDING, first.epoch, first.request, meta=msgspec.json.encode(standing(0, 99)))
        for _ in range(10_000):
            generation.feed(parcel)
        assert len(generation._items) <= 256
        made.give(first, 1, ord("i"), final=True)
        assert (await work)[-1]["text"] == "hi"
        await asyncio.sleep(0)

    play(scenario)
