"""Boards are told to measure again, and what they answer, or don't, is said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import preparing as preparing_module
from coordinator.calls import CallFailed, MeasureRequest
from tests.coordinator.memory_site import Client, until
from tests.coordinator.operations_site import Scenario, Site, played
from wire import topics
from wire.errors import Unreachable, UsageError
from wire.messages import Command, Reply


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    return partial(played, tmp_path)


class Ears(Client):
    """Hears the commands to a board, and can answer them."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site.lab.broker, f"ears-{name}")
        self.name = name
        self.listen(topics.COMMAND.on("lab", name, "+"))

    @property
    def commands(self) -> list[tuple[str, Command]]:
        found = []
        for message in self.poll():
            fields = topics.COMMAND.fields_of(message.topic)
            assert fields is not None
            found.append((fields[1], msgspec.json.decode(message.payload, type=Command)))
        return found

    def answer(self, command: Command, device: str = "", **changes: Any) -> None:
        fields = topics.REPLY.fields_of(command.reply_topic)
        assert fields is not None
        self.say(topics.REPLY, Reply(id=command.id, device=device or self.name, **changes), *fields)


def again(site: Site, *devices: str) -> asyncio.Future[list[str]]:
    request = MeasureRequest(model="tiny", again=True, devices=devices)
    return asyncio.ensure_future(site.operations.preparing.measure(request, site.said.append))


def test_all_that_are_online_are_asked_and_each_answer_is_told(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b")
        ears = [Ears(site, "a"), Ears(site, "b")]
        work = again(site)
        await until(lambda: all(ear.commands for ear in ears), "commands")
        for ear in ears:
            [(verb, command)] = ear.commands
            assert verb == "measure"
            ear.answer(command, ok=True, result={"measured": ["x", "y"], "failed": {}})
        assert await work == []
        assert {"a measured 2 modules", "b measured 2 modules"} <= set(site.said)

    play(scenario)


def test_only_the_boards_that_were_named_are_asked(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b")
        ears = [Ears(site, "a"), Ears(site, "b")]
        work = again(site, "b", "b")
        await until(lambda: bool(ears[1].commands), "a command")
        [(_, command)] = ears[1].commands
        ears[1].answer(command, ok=True, result={"measured": ["x"], "failed": {"y": "no memory"}})
        await work
        assert ears[0].commands == [] and "b measured 1 modules, 1 could not be" in site.said

    play(scenario)


def test_a_board_that_can_not_says_why(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        ear = Ears(site, "a")
        work = again(site)
        await until(lambda: bool(ear.commands), "a command")
        [(_, command)] = ear.commands
        ear.answer(command, ok=True, device="b", result={"measured": []})  # not from whom was asked
        ear.answer(msgspec.structs.replace(command, id="another"), ok=True)
        ear.answer(command, ok=False, error="no worker could be started")
        with pytest.raises(CallFailed, match="a: no worker could be started"):
            await work

    play(scenario)


def test_a_board_that_goes_away_or_is_silent_is_named(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b")
        ear = Ears(site, "a")
        work = again(site, "a")
        await until(lambda: bool(ear.commands), "a command")
        site.lab.boards["a"].leave()
        with pytest.raises(CallFailed, match="a went away"):
            await work
        with pytest.raises(Unreachable, match="a is offline"):
            await again(site, "a")
        with pytest.raises(UsageError, match="no board 'c'"):
            await again(site, "c")
        monkeypatch.setattr(preparing_module, "MEASURE_AGAIN_TIMEOUT_S", 0.05)
        with pytest.raises(CallFailed, match="b gave no answer"):
            await again(site, "b")

    play(scenario)


def test_replies_that_nobody_waits_for_are_dropped(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        ear = Ears(site, "a")
        said = Reply(id="1", device="a", ok=True)
        ear.say(topics.REPLY, said, "coordinator", "1")
        ear.say(topics.REPLY, b"{", "coordinator", "1")
        await until(lambda: site.lab.coordinator.refused_messages == 1, "the damaged one is counted")
        assert site.lab.coordinator.calls._replies == {}

    play(scenario)
