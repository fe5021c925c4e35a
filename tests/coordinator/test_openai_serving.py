"""The OpenAI door on a real `Serving`, whose stages are played by the tests: a request ends when its client does, and
who does not read holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.types import ASGIApp

from coordinator.api import make_app
from coordinator.inference import serve
from tests.coordinator.memory_site import until
from tests.coordinator.test_openai import KEY, TEXT, asked, call
from tests.coordinator.test_serving import Ring, ring, turns_free


@pytest.fixture
def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Ring, ASGIApp], Awaitable[None]]], None]:
    """Run a scenario on a real Serving; nothing may be left behind."""
    monkeypatch.setattr(serve, "COUNTERS_WAIT_S", 0.01)

    def run(scenario: Callable[[Ring, ASGIApp], Awaitable[None]]) -> None:
        async def all_of_it() -> None:
            async with ring(tmp_path) as made:
                app = make_app(made.lab.coordinator, made.operations, made.serving, None, KEY)  # type: ignore[arg-type]
                await scenario(made, app)
                await until(lambda: made.serving.live == 0 and made.serving.waiting == 0, "no request is left behind")
                assert not made.operations.holds

        asyncio.run(asyncio.wait_for(all_of_it(), 30))

    return run


def test_busy_stages_are_a_rate_limit_error(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(made: Ring, app: ASGIApp) -> None:
        monkeypatch.setattr(serve, "MAX_WAITING", 0)
        with pytest.raises(openai.RateLimitError):
            await asked(app, lambda client: client.completions.create(**TEXT))

    play(scenario)


def test_a_deployment_in_force_answers_with_its_own_settings(play: Any) -> None:
    async def scenario(made: Ring, app: ASGIApp) -> None:
        work = asyncio.ensure_future(asked(app, lambda client: client.completions.create(**TEXT, temperature=0)))
        made.answer(await made.prompt(), "hello")
        assert (await work).choices[0].text == "hello"
        assert len(made.prompts) == 1 and len(made.lab.coordinator.records()) == 1

    play(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "working", "answering"])
def test_a_client_that_goes_away_ends_its_request_at_the_stages(stream: bool, when: str, play: Any) -> None:
    async def scenario(made: Ring, app: ASGIApp) -> None:
        gone = asyncio.Event()
        if when == "waiting":
            made.operations.ready.clear()
        sent: list[Any] = []
        work = asyncio.ensure_future(call(app, "/v1/completions", TEXT | {"stream": stream}, sent, gone))
        if when == "waiting":
            await until(lambda: made.serving.waiting == 1)
            gone.set()
        else:
            prompt = await made.prompt()
            if when == "answering":
                made.give(prompt, 0, 104)
                await until(lambda: not stream or any(b'"text":"h"' in part.get("body", b"") for part in sent))
            gone.set()
            await made.closed(prompt.request)
        await asyncio.wait_for(work, 5.0)
        assert not any(b"[DONE]" in part.get("body", b"") for part in sent)

    play(scenario)


def test_a_stop_string_ends_the_request_at_the_stages(play: Any) -> None:
    async def scenario(made: Ring, app: ASGIApp) -> None:
        work = asyncio.ensure_future(asked(app, lambda client: client.completions.create(**TEXT, stop="ll")))
        prompt = await made.prompt()
        for index, letter in enumerate("hello"):
            made.give(prompt, index, ord(letter))
        await made.closed(prompt.request)
        answer = await work
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("he", "stop")

    play(scenario)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/generate"])
def test_a_client_that_does_not_read_gives_its_turn_back_and_holds_no_more_than_its_answer(
    path: str, play: Any
) -> None:
    async def scenario(made: Ring, app: ASGIApp) -> None:
        reads = asyncio.Event()
        sent: list[Any] = []
        body = TEXT | {"stream": True, "max_tokens": 500}
        work = asyncio.ensure_future(call(Stuck(sent, reads, after=2).around(app), path, body, []))
        prompt = await made.prompt()
        made.answer(prompt, "x" * 500)
        await until(lambda: made.serving.live == 0, "all of it has come")
        await until(lambda: turns_free(made) == 2, "and others may have the turn")
        await until(lambda: len(sent) == 2, "the client is given the first of it")
        await asyncio.sleep(0.05)
        assert len(sent) == 2, "and takes nothing more yet"
        reads.set()
        await work
        assert sum(part.get("body", b"").count(b'"text":"x"') for part in sent) == 500

    play(scenario)


class Stuck:
    """Between an app and a client that takes no more than `after` messages until `reads` is set."""

    def __init__(self, sent: list[Any], reads: asyncio.Event, after: int) -> None:
        self._sent = sent
        self._reads = reads
        self._after = after

    def around(self, app: ASGIApp) -> ASGIApp:
        async def run(scope: Any, receive: Any, _send: Any) -> None:
            async def send(message: Any) -> None:
                self._sent.append(message)
                if len(self._sent) >= self._after:
                    await self._reads.wait()

            await app(scope, receive, send)

        return run
