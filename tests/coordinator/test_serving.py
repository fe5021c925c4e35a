"""A request takes its turn, gives each token, and leaves nothing behind however it ends: no slot, no turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.adapters import AdapterShelf
from coordinator.inference import serve
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import Serving
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.turns import Hold, Holds
from tests.coordinator.memory_site import Client, Lab, running, until
from tests.coordinator.plans import inbox as inbox_of
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import record_of, report
from wire.channel import Inbox, Outbox
from wire.errors import EdgelamError, PeerError, Refused, Unreachable, UsageError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.ids import new_stream_id
from wire.messages import RequestMeta

SLOTS = 2
"""Of the plan; nobody asked for a number."""
Scenario = Callable[["Ring"], Awaitable[None]]


class FakeTokenizer:
    """One token per letter."""

    stop_ids = (0,)
    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def detokenizer(self) -> FakeTokenizer:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


class FakePrepared:
    tokenizer = FakeTokenizer()
    packed = SimpleNamespace(graph=SimpleNamespace(vocabulary=0x110000))


class FakeOperations:
    """Gives the deployment in force; `ready` can be held back."""

    def __init__(self, lab: Lab) -> None:
        self.preparing = self
        self.lab = lab
        self.ready = asyncio.Event()
        self.ready.set()
        self.asked = 0
        self.haste: list[bool] = []
        self.cancelled = 0
        self.holds = Holds(lambda: None)

    async def prepare(
        self, _model: str, _precision: str, _progress: Callable[[str], None], _adapters: tuple[str, ...] = ()
    ) -> Any:
        return FakePrepared()

    async def ensure(
        self, _request: DeployRequest, progress: Callable[[str], None], hold: Hold, in_haste: bool = False
    ) -> tuple[Any, Any]:
        self.haste.append(in_haste)
        self.asked += 1
        progress("packing")
        try:
            await self.ready.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        record = self.lab.coordinator.records()[0]
        hold.take(self.holds, (record.name, record.plan.epoch))
        return record, FakePrepared()

    def usable(self, record: DeploymentRecord) -> bool:
        return self.lab.coordinator.in_force(record)


class Ring:
    """A site with one deployment, whose first stage is played by the test."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.operations = FakeOperations(lab)
        self.serving = Serving(lab.coordinator, self.operations, AdapterShelf(Path("no jobs"), Path("no cache")))  # type: ignore[arg-type]
        self._stage = Client(lab.broker, "stage")
        self._inbox = Inbox(self._stage.transport, inbox_of(0).topic)
        reply = lab.coordinator.hub.reply_inbox.topic
        self._outbox = Outbox(self._stage.transport, reply, stream=new_stream_id())
        self.prompts: list[Parcel] = []
        self.closes: list[int] = []
        self.inquiries: list[Parcel] = []

    def deploy(self) -> DeploymentRecord:
        coordinator = self.lab.coordinator
        plan = plan_of("a", epoch=coordinator.next_epoch())
        plan = msgspec.structs.replace(plan, slots=SLOTS)
        made = msgspec.structs.replace(record_of(plan, blocks=2), request=DeployRequest(model="tiny"))
        coordinator.put_in_force(made)
        self.lab.boards["a"].apply(plan.epoch, report(plan, 0, "ready"))
        return made

    def poll(self) -> None:
        self._stage.poll()
        while (delivery := self._inbox.take()) is not None:
            if delivery.parcel.kind is Kind.CLOSE:
                self.closes.append(delivery.parcel.request)
            elif delivery.parcel.kind is Kind.INQUIRY:
                self.inquiries.append(delivery.parcel)
            else:
                self.prompts.append(delivery.parcel)
            self._inbox.done(delivery)

    async def prompt(self, count: int = 1) -> Parcel:
        """Wait until so many prompts have come; give the last."""

        def came() -> bool:
            self.poll()
            return len(self.prompts) >= count

        await until(came, f"{count} prompts")
        return self.prompts[count - 1]

    async def closed(self, request: int) -> None:
        def came() -> bool:
            self.poll()
            return request in self.closes

        await until(came, "a CLOSE")

    def give(self, prompt: Parcel, index: int, token: int, final: bool = False, **changes: Any) -> None:
        meta = msgspec.json.decode(prompt.meta, type=RequestMeta)
        fields: dict[str, Any] = {
            "kind": Kind.TOKENS,
            "epoch": prompt.epoch,
            "request": prompt.request,
            "position": meta.prompt_tokens + index,
            "flags": FLAG_FINAL if final else 0,
            "tensor": Tensor.of(np.array([token], dtype=np.int32)),
        }
        self._outbox.send(Parcel(**{**fields, **changes}))

    def answer(self, prompt: Parcel, text: str) -> None:
        for index, letter in enumerate(text):
            self.give(prompt, index, ord(letter), final=index == len(text) - 1)


@asynccontextmanager
async def ring(state: Path) -> AsyncIterator[Ring]:
    async with running(state) as lab:
        await lab.with_boards("a")
        made = Ring(lab)
        made.deploy()
        yield made


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    monkeypatch.setattr(serve, "COUNTERS_WAIT_S", 0.01)

    def run(scenario: Scenario) -> None:
        async def whole() -> None:
            async with ring(tmp_path) as made:
                await scenario(made)
                await until(lambda: made.serving.live == 0, "no request is left behind")
                assert made.serving._waiting == 0
                assert not made.operations.holds, "nothing is held any more"

        asyncio.run(whole())

    return run


def request(**changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "stall_timeout_s": 5.0}
    return GenerateRequest(**{**fields, **changes})


async def collect(events: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    async with aclosing(events):
        return [event async for event in events]


Answer = asyncio.Task[list[dict[str, Any]]]


async def answering(made: Ring, waiting: int, **changes: Any) -> list[Answer]:
    """As many requests as there are slots, each at the stage, and after them those that wait for a turn. Prompts are
    encoded in threads: of two that were asked for at once, either may be the first."""
    asked = [made.serving.generate(request(**changes)) for _ in range(SLOTS + waiting)]
    works = [asyncio.ensure_future(collect(events)) for events in asked[:SLOTS]]
    await made.prompt(SLOTS)
    for number, events in enumerate(asked[SLOTS:], SLOTS + 1):
        works.append(asyncio.ensure_future(collect(events)))
        await until(lambda: made.operations.asked == number)  # noqa: B023
    await asyncio.sleep(0.05)
    return works


def turns_free(made: Ring) -> int:
    _, turn = made.serving._turns["tiny"]
    return turn._value


def test_an_answer_is_status_start_tokens_and_end(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        prompt = await made.prompt()
        assert prompt.tensor is not None and list(prompt.tensor.array()) == [97, 98, 99]
        made.answer(prompt, "hello")
        events = await work
        kinds = [event["event"] for event in events]
        assert kinds == ["status", "start", *["token"] * 5, "end"]
        assert events[-1]["text"] == "hello"
        assert events[-1]["finish_reason"] == "length"
        made.poll()
        assert not made.closes, "what ended by itself need not be closed"

    play(scenario)


def test_a_stop_token_shows_no_text(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        prompt = await made.prompt()
        made.answer(prompt, "hi\0")
        end = (await work)[-1]
        assert (end["text"], end["finish_reason"], len(end["token_ids"])) == ("hi", "stop", 3)

    play(scenario)


@pytest.mark.parametrize("after", ["status", "start", "token"])
def test_a_client_that_goes_away_frees_its_turn_and_its_slot_at_the_stages(
    after: str, play: Callable[[Scenario], None]
) -> None:
    async def scenario(made: Ring) -> None:
        events = made.serving.generate(request())
        async for event in events:
            if event["event"] == "start":
                prompt = await made.prompt()
                made.give(prompt, 0, 104)
            if event["event"] == after:
                break
        await events.aclose()
        assert made.serving.live == 0
        if after != "status":
            await made.closed(prompt.request)
            assert turns_free(made) == SLOTS

    play(scenario)


def test_a_cancelled_request_frees_everything_while_it_waits_for_a_token(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        prompt = await made.prompt()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await made.closed(prompt.request)
        assert turns_free(made) == SLOTS

    play(scenario)


def test_a_client_that_goes_away_while_a_model_is_made_ready_stops_waiting_for_it(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(made: Ring) -> None:
        made.operations.ready.clear()
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        await until(lambda: made.operations.asked == 1)
        await asyncio.sleep(0.02)
        work.cancel()
        await asyncio.wait([work])
        await until(lambda: made.operations.cancelled == 1)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
        assert not [task for task in left if "get" in repr(task.get_coro())], "nobody waits for a status any more"

    play(scenario)


def test_requests_beyond_the_slots_wait_for_their_turn(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        works = await answering(made, waiting=2)
        made.poll()
        assert len(made.prompts) == SLOTS and made.serving.live == SLOTS
        for number in range(1, SLOTS + 3):
            made.answer(await made.prompt(number), "ok")
        answers = await asyncio.gather(*works)
        assert [events[-1]["text"] for events in answers] == ["ok"] * (SLOTS + 2)

    play(scenario)


def test_a_client_that_goes_away_in_the_line_takes_no_turn(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        works = await answering(made, waiting=2)
        works[SLOTS].cancel()
        for number in range(1, SLOTS + 2):
            made.answer(await made.prompt(number), "ok")
        await asyncio.wait(works)
        assert works[SLOTS].cancelled() and works[SLOTS + 1].result()[-1]["text"] == "ok"
        assert turns_free(made) == SLOTS

    play(scenario)


def test_the_turn_is_free_for_the_next_before_the_figures_are_in(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(made: Ring) -> None:
        monkeypatch.setattr(serve, "COUNTERS_WAIT_S", 60.0)
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        made.answer(await made.prompt(), "ok")
        await until(lambda: turns_free(made) == SLOTS and made.serving.live == 0)
        assert not work.done(), "it waits for the stages' counters"
        work.cancel()
        await asyncio.wait([work])

    play(scenario)


def test_too_many_waiting_requests_are_refused_however_they_wait(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(made: Ring) -> None:
        monkeypatch.setattr(serve, "MAX_WAITING", 3)
        made.operations.ready.clear()
        works = [asyncio.ensure_future(collect(made.serving.generate(request()))) for _ in range(3)]
        await until(lambda: made.operations.asked == 3)
        with pytest.raises(Refused, match="waiting"):
            await collect(made.serving.generate(request()))
        for work in works:
            work.cancel()
        await asyncio.wait(works)

    play(scenario)


def test_without_recoveries_a_lost_deployment_ends_its_requests_at_once_and_the_waiting_ones_go_on_with_the_next(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(made: Ring) -> None:
        works = await answering(made, waiting=1, recoveries_at_most=0)
        first = made.prompts[0]
        made.deploy()  # another epoch
        for work in works[:SLOTS]:
            with pytest.raises(Unreachable, match="replaced"):
                await work
        prompt = await made.prompt(SLOTS + 1)
        assert prompt.epoch > first.epoch, "nobody sends to a plan that is gone"
        made.answer(prompt, "ok")
        assert (await works[SLOTS])[-1]["text"] == "ok"
        assert len(made.serving._turns) == 1

    play(scenario)


def test_epochs_come_and_go_without_a_trace(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        for number in range(1, 6):
            work = asyncio.ensure_future(collect(made.serving.generate(request())))
            made.answer(await made.prompt(number), "ok")
            await work
            made.deploy()
        assert len(made.serving._turns) == 1

    play(scenario)


def test_without_recoveries_a_lost_broker_ends_requests_and_the_next_one_says_what_is_wrong(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request(recoveries_at_most=0))))
        await made.prompt()
        made.lab.broker.stop()
        with pytest.raises(Unreachable, match="broker"):
            await work
        with pytest.raises(Unreachable, match="nothing was sent"):
            await collect(made.serving.generate(request(recoveries_at_most=0)))
        assert turns_free(made) == SLOTS

    play(scenario)


def test_a_prompt_may_take_as_long_as_the_plan_says_and_the_stages_keep_it_so_long(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(made: Ring) -> None:
        monkeypatch.setattr(
            serve, "first_token_timeout_s", lambda _plan, _tokens, prompts, _floor_s, _replay: 100.0 * prompts
        )
        works = []
        for number in (1, 2):
            works.append(asyncio.ensure_future(collect(made.serving.generate(request(stall_timeout_s=0.1)))))
            meta = msgspec.json.decode((await made.prompt(number)).meta, type=RequestMeta)
            assert meta.idle_timeout_s == 100.0 * number, "what runs beside it counts"
        await asyncio.sleep(0.3)
        assert not any(work.done() for work in works)
        for number in (1, 2):
            made.answer(await made.prompt(number), "ok")
        assert [(await work)[-1]["text"] for work in works] == ["ok", "ok"]

    play(scenario)


def test_a_silent_stage_is_given_up_and_closed(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request(stall_timeout_s=0.1))))
        prompt = await made.prompt()
        made.give(prompt, 0, 104)
        with pytest.raises(Unreachable, match="after 1 tokens"):
            await work
        await made.closed(prompt.request)

    play(scenario)


BROKEN: dict[str, dict[str, Any]] = {
    "a float": {"tensor": Tensor.of(np.array([1.5], dtype=np.float32))},
    "two tokens": {"tensor": Tensor.of(np.array([1, 2], dtype=np.int32))},
    "a matrix": {"tensor": Tensor.of(np.array([[1]], dtype=np.int32))},
    "a gap": {"position": 5},
    "an unreadable error": {"kind": Kind.ERROR, "tensor": None, "meta": b"{"},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_head_that_breaks_the_protocol_ends_the_request_with_an_error(
    how: str, play: Callable[[Scenario], None]
) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        prompt = await made.prompt()
        made.give(prompt, 0, 104, **BROKEN[how])
        with pytest.raises(PeerError):
            await work
        await made.closed(prompt.request)

    play(scenario)


def test_a_head_that_never_ends_is_ended_after_the_tokens_that_were_asked_for(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request(max_tokens=3))))
        prompt = await made.prompt()
        for index in range(4):
            made.give(prompt, index, 104)
        with pytest.raises(PeerError):
            await work
        await made.closed(prompt.request)

    play(scenario)


def test_what_is_said_of_other_epochs_and_requests_changes_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        work = asyncio.ensure_future(collect(made.serving.generate(request())))
        prompt = await made.prompt()
        made.give(prompt, 0, 120, epoch=prompt.epoch - 1)
        made.give(prompt, 0, 120, request=prompt.request ^ 2)
        made.answer(prompt, "ok")
        assert (await work)[-1]["text"] == "ok"

    play(scenario)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "either"),
        ({"messages": ({"role": "user", "content": "x"},)}, "either"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"stall_timeout_s": 0.0}, "stall_timeout_s"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_packed(
    changes: dict[str, Any], words: str, play: Callable[[Scenario], None]
) -> None:
    async def scenario(made: Ring) -> None:
        with pytest.raises(UsageError, match=words):
            await collect(made.serving.generate(request(**changes)))
        assert made.operations.asked == 0

    play(scenario)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "x" * 2000}, "exceed the context of 1024"),
        ({"prompt": "x", "max_tokens": 64, "context_tokens": 64}, "exceed the context of 64"),
        ({"context_tokens": 1}, "not possible"),
        ({"precision": "int5"}, "int5"),
        ({"boards_at_least": 3, "boards_at_most": 2}, "no plan can be both"),
    ],
)
def test_what_can_only_be_refused_changes_no_deployment(
    changes: dict[str, Any], words: str, play: Callable[[Scenario], None]
) -> None:
    async def scenario(made: Ring) -> None:
        before = made.lab.coordinator.records()
        with pytest.raises(UsageError, match=words) as refused:
            await collect(made.serving.generate(request(**changes)))
        assert refused.value.try_
        assert made.operations.asked == 0, "no deployment was looked for"
        assert made.lab.coordinator.records() == before

    play(scenario)


def test_an_error_while_a_model_is_made_ready_is_the_answer(play: Callable[[Scenario], None]) -> None:
    async def scenario(made: Ring) -> None:
        async def fails(_request: Any, progress: Callable[[str], None], _hold: Hold, _in_haste: bool) -> Any:
            progress("packing")
            raise Refused("not this one")

        made.operations.ensure = fails  # type: ignore[method-assign]
        with pytest.raises(EdgelamError, match="not this one"):
            await collect(made.serving.generate(request()))

    play(scenario)
