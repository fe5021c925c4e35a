"""After a loss an answer goes on where it stood: nothing given is taken back, repeated or left out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from coordinator.inference import serve
from coordinator.inference.requests import GenerateRequest, Guesses
from coordinator.losses import Lost
from coordinator.planning.guessing import Guessing
from coordinator.turns import Hold
from tests.coordinator.memory_site import until
from tests.coordinator.test_serving import SLOTS, Ring, Scenario, collect, play, request, turns_free
from wire.errors import Degraded, EdgelamError, PeerError, Refused, Unreachable, UsageError
from wire.frames import Kind, Parcel
from wire.messages import RequestMeta, StageError

__all__ = ["play"]

Play = Callable[[Scenario], None]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RETRY_S", 0.02)


def start(made: Ring, **changes: Any) -> asyncio.Future[list[dict[str, Any]]]:
    return asyncio.ensure_future(collect(made.serving.generate(request(**changes))))


def rows(prompt: Parcel) -> str:
    assert prompt.tensor is not None
    return "".join(map(chr, prompt.tensor.array()))


def meta(prompt: Parcel) -> RequestMeta:
    return msgspec.json.decode(prompt.meta, type=RequestMeta)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events if event["event"] != "status"]


async def given(made: Ring, prompt: Parcel, text: str) -> None:
    """Let the head give these tokens, and wait until they have come."""
    generation = made.serving._live[prompt.request]
    for letter in text:
        made.give(prompt, generation._next_index, ord(letter))
        before = generation._next_index
        await until(lambda b=before: generation._next_index > b or generation.finished)  # type: ignore[misc]


def test_after_a_loss_the_answer_goes_on_behind_what_was_given(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, seed=5, temperature=1.0)
        first = await made.prompt()
        await given(made, first, "he")
        deployed = made.deploy()  # another epoch: the old one was lost
        second = await made.prompt(2)
        assert rows(second) == "abche", "prompt and what was given, so the positions go on"
        assert second.request != first.request and second.epoch == deployed.plan.epoch
        assert meta(second).prompt_tokens == 5 and meta(second).max_new_tokens == 8 - 2
        assert meta(second).sampling == meta(first).sampling
        made.answer(second, "llo")
        events = await work
        assert kinds(events) == ["start", "token", "token", "pause", "resume", "token", "token", "token", "end"]
        end = events[-1]
        assert end["text"] == "hello" and "".join(e["text"] for e in events if e["event"] == "token") == "hello"
        assert end["token_ids"] == [ord(letter) for letter in "hello"]
        assert (end["prompt_tokens"], end["finish_reason"]) == (3, "length")
        [pause] = end["pauses"]
        assert pause["given"] == 2 and "replaced" in pause["reason"] and pause["losses"] == 1
        assert 0 <= pause["detection_s"] <= pause["pause_s"]
        resume = next(event for event in events if event["event"] == "resume")
        assert resume["boards"] == ["a"] and resume["epoch"] == deployed.plan.epoch
        assert resume["pause_s"] == pause["pause_s"] and resume["reason"] == pause["reason"]
        assert made.operations.haste == [False, True], "the second time nobody waits for boards that may come"

    play(scenario)


def test_exact_asks_for_the_given_tokens_one_by_one_however_often_something_is_lost(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, exact=True)
        first = await made.prompt()
        assert meta(first).replay_tokens == 0
        await given(made, first, "he")
        made.deploy()
        second = await made.prompt(2)
        assert (meta(second).prompt_tokens, meta(second).replay_tokens) == (5, 2)
        await given(made, second, "l")
        made.deploy()
        third = await made.prompt(3)
        assert (meta(third).prompt_tokens, meta(third).replay_tokens) == (6, 3), "only the prompt was a prompt"
        made.answer(third, "lo")
        assert (await work)[-1]["text"] == "hello"

    play(scenario)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pays", [(True, False), (False, True)])
def test_an_answer_keeps_the_kind_of_steps_that_it_began_with(
    play: Play, monkeypatch: pytest.MonkeyPatch, pays: tuple[bool, bool], exact: bool
) -> None:
    """Whatever the plan after a loss would have its tokens guessed by; a new request goes by the new plan."""
    found = iter(pays)
    monkeypatch.setattr(serve, "guessing_of", lambda _plan: Guessing(next(found), "made up"))

    async def scenario(made: Ring) -> None:
        work = start(made, exact=exact)
        first = await made.prompt()
        await given(made, first, "he")
        made.deploy()
        second = await made.prompt(2)
        for prompt in (first, second):
            told = meta(prompt)
            assert told.speculate == (7 if pays[0] else 0) and told.padded == (exact and pays[0])
        assert meta(second).replay_tokens == (2 if exact and not pays[0] else 0)
        made.answer(second, "llo")
        assert (await work)[-1]["text"] == "hello"
        again = start(made)
        third = await made.prompt(3)
        assert meta(third).speculate == (7 if pays[1] else 0)
        made.answer(third, "hello")
        await again

    play(scenario)


@pytest.mark.parametrize("exact", [False, True])
def test_what_another_coordinator_gave_is_gone_on_behind(play: Play, exact: bool) -> None:
    async def scenario(made: Ring) -> None:
        before = tuple(ord(letter) for letter in "he")
        work = start(made, given=before, guesses=Guesses(3, True), exact=exact, seed=5, temperature=1.0)
        prompt = await made.prompt()
        assert rows(prompt) == "abche"
        told = meta(prompt)
        assert (told.prompt_tokens, told.max_new_tokens, told.speculate, told.padded) == (5, 6, 3, True)
        assert made.operations.haste == [True], "it was under way when its coordinator was lost"
        made.answer(prompt, "llo")
        events = await work
        assert kinds(events) == ["start", "token", "token", "token", "end"]
        assert events[-1]["text"] == "hello" and events[-1]["token_ids"] == [ord(letter) for letter in "hello"]
        start_event = next(event for event in events if event["event"] == "start")
        assert start_event["guesses"] == {"most": 3, "padded": True} and start_event["boards"] == ["a"]

    play(scenario)


def test_what_was_computed_one_by_one_is_computed_so_again(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, given=(104, 101), guesses=Guesses(), exact=True)
        prompt = await made.prompt()
        assert meta(prompt).replay_tokens == 2
        made.answer(prompt, "llo")
        assert (await work)[-1]["text"] == "hello"

    play(scenario)


@pytest.mark.parametrize(("last", "changes"), [(0, {}), (101, {"max_tokens": 2})])
def test_an_answer_that_was_given_whole_has_its_end_alone(play: Play, last: int, changes: dict[str, Any]) -> None:
    async def scenario(made: Ring) -> None:
        events = await start(made, given=(104, last), guesses=Guesses(), **changes)
        assert kinds(events) == ["end"] and events[-1]["token_ids"] == [104, last]
        assert events[-1]["finish_reason"] == ("stop" if last == 0 else "length")
        assert events[-1]["token_s"] is None

    play(scenario)


@pytest.mark.parametrize("given", [(1,) * 9, (0x110000,)])
def test_tokens_that_can_not_have_been_given_are_refused(play: Play, given: tuple[int, ...]) -> None:
    async def scenario(made: Ring) -> None:
        with pytest.raises(UsageError, match="given"):
            await start(made, given=given)

    play(scenario)


def test_late_tokens_of_the_old_epoch_and_of_the_old_request_change_nothing(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given(made, first, "he")
        made.deploy()
        second = await made.prompt(2)
        made.give(first, 2, ord("X"))
        made.give(first, 2, ord("X"), request=second.request)
        made.give(second, 0, ord("X"), request=first.request)
        made.give(first, 3, ord("X"), final=True)
        made.answer(second, "llo")
        assert (await work)[-1]["text"] == "hello"

    play(scenario)


def test_a_loss_before_the_first_token_sends_the_prompt_again(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await made.prompt()
        made.deploy()
        second = await made.prompt(2)
        assert rows(second) == "abc" and meta(second).max_new_tokens == 8
        made.answer(second, "ok")
        events = await work
        assert kinds(events) == ["start", "pause", "resume", "token", "token", "end"]
        assert events[-1]["pauses"][0]["given"] == 0

    play(scenario)


def test_all_requests_of_a_deployment_go_on_and_so_do_those_in_line(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        works = [start(made) for _ in range(SLOTS + 1)]
        for number in range(1, SLOTS + 1):
            await given(made, await made.prompt(number), "x")
        await asyncio.sleep(0.05)
        made.deploy()
        for number in range(SLOTS + 1, 2 * SLOTS + 2):
            prompt = await made.prompt(number)
            made.answer(prompt, "yz")
        answers = [(await work)[-1]["text"] for work in works]
        assert sorted(answers) == ["xyz"] * SLOTS + ["yz"]
        assert turns_free(made) == SLOTS

    play(scenario)


def test_who_may_be_disturbed_is_known_while_an_answer_runs_and_not_after(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        assert made.serving.why_stay("tiny") == ""
        for number, (changes, words) in enumerate(
            (({}, ""), ({"exact": True}, "exact"), ({"recoveries_at_most": 0}, "no recovery left")), start=1
        ):
            work = start(made, **changes)
            prompt = await made.prompt(number)
            said = made.serving.why_stay("tiny")
            assert words in said and bool(said) == bool(words)
            assert made.serving.why_stay("other") == ""
            made.answer(prompt, "hi")
            await work
            assert made.serving.why_stay("tiny") == ""

    play(scenario)


def test_an_answer_that_used_its_recoveries_up_is_not_disturbed_for_no_need(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, recoveries_at_most=1)
        await given(made, await made.prompt(), "he")
        assert made.serving.why_stay("tiny") == ""
        made.deploy()
        second = await made.prompt(2)
        assert "no recovery left" in made.serving.why_stay("tiny")
        made.answer(second, "llo")
        assert (await work)[-1]["text"] == "hello"

    play(scenario)


def test_an_answer_that_is_moved_is_told_why(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await given(made, await made.prompt(), "he")
        [record] = made.lab.coordinator.records()
        plan = msgspec.structs.replace(record.plan, epoch=record.plan.epoch + 1)
        moved = msgspec.structs.replace(record, plan=plan)
        made.lab.coordinator.put_in_force(moved, "pi4 runs at 0.30 of its profile")
        made.answer(await made.prompt(2), "llo")
        [pause] = (await work)[-1]["pauses"]
        assert pause["reason"].startswith("pi4 runs at 0.30 of its profile: tiny was replaced by epoch")

    play(scenario)


def test_a_stage_that_started_again_keeps_epoch_and_turn(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given(made, first, "he")
        made.serving.fail_deployment("tiny", "stage 0 of tiny ended")
        second = await made.prompt(2)
        assert second.epoch == first.epoch and second.request != first.request
        await made.closed(first.request)
        assert turns_free(made) == SLOTS - 1
        made.answer(second, "llo")
        assert (await work)[-1]["text"] == "hello"
        assert turns_free(made) == SLOTS

    play(scenario)


def test_losses_in_a_row_are_one_pause_and_count_as_recoveries(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, recoveries_at_most=2)
        await given(made, await made.prompt(), "he")
        for number in (2, 3):
            made.serving.fail_deployment("tiny", f"loss {number}")
            await made.prompt(number)
        made.answer(await made.prompt(3), "y")
        events = await work
        assert kinds(events).count("pause") == kinds(events).count("resume") == 1
        [pause] = events[-1]["pauses"]
        assert (pause["losses"], pause["reason"]) == (2, "loss 2")

    play(scenario)


def test_one_loss_more_than_allowed_is_the_error_of_that_loss_and_what_was_given_stays(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        events = []
        ended: list[EdgelamError] = []

        async def follow() -> None:
            try:
                async for event in made.serving.generate(request(recoveries_at_most=1)):
                    events.append(event)
            except EdgelamError as error:
                ended.append(error)

        work = asyncio.ensure_future(follow())
        await given(made, await made.prompt(), "he")
        made.serving.fail_deployment("tiny", "first loss")
        second = await made.prompt(2)
        await given(made, second, "l")
        made.serving.fail_deployment("tiny", "second loss")
        await work
        assert isinstance(ended[0], Unreachable) and ended[0].message == "second loss"
        assert "".join(event.get("text", "") for event in events if event["event"] == "token") == "hel"
        await made.closed(second.request)
        assert turns_free(made) == SLOTS

    play(scenario)


def test_what_is_missing_is_waited_for_and_then_the_answer_goes_on(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await given(made, await made.prompt(), "he")
        whole, tries = made.operations.ensure, []

        async def missing(*arguments: Any) -> Any:
            tries.append(arguments)
            if len(tries) < 4:
                raise Refused("2 boards are wanted, 1 is here")
            return await whole(*arguments)

        made.operations.ensure = missing  # type: ignore[method-assign]
        made.serving.fail_deployment("tiny", "b went away")
        made.answer(await made.prompt(2), "y")
        events = await work
        assert events[-1]["text"] == "hey" and len(tries) == 4
        assert any("2 boards are wanted" in event.get("text", "") for event in events), "it is said what is missing"

    play(scenario)


@pytest.mark.parametrize("how", ["refused", "slow"])
def test_patience_ends_and_the_error_says_what_was_lost_and_what_is_missing(how: str, play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made, recovery_timeout_s=0.3)
        await given(made, await made.prompt(), "he")

        async def never(*_arguments: Any) -> Any:
            if how == "refused":
                raise Refused("2 boards are wanted, 1 is here")
            await asyncio.sleep(3600)

        made.operations.ensure = never  # type: ignore[method-assign]
        began_s = time.monotonic()
        made.serving.fail_deployment("tiny", "b went away")
        with pytest.raises(Unreachable, match=r"b went away; .* 2 boards" if how == "refused" else "b went away"):
            await work
        assert 0.2 < time.monotonic() - began_s < 3.0
        assert turns_free(made) == SLOTS

    play(scenario)


@pytest.mark.parametrize("error", [UsageError("no such model"), Degraded("a could not load its stage")])
def test_what_can_not_be_cured_by_waiting_ends_the_answer_at_once(error: EdgelamError, play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await given(made, await made.prompt(), "he")

        async def fails(*_arguments: Any) -> Any:
            raise error

        made.operations.ensure = fails  # type: ignore[method-assign]
        made.serving.fail_deployment("tiny", "b went away")
        with pytest.raises(type(error), match=error.message):
            await work

    play(scenario)


def told(prompt: Parcel, code: str) -> dict[str, Any]:
    error = StageError(stage=0, device="a", code=code, text="because")  # type: ignore[arg-type]
    return {"kind": Kind.ERROR, "tensor": None, "meta": msgspec.json.encode(error), "request": prompt.request}


@pytest.mark.parametrize("code", ["deadline", "stopped"])
def test_a_stage_that_could_not_pass_something_on_is_a_loss(code: str, play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given(made, first, "he")
        made.give(first, 2, 0, **told(first, code))
        made.answer(await made.prompt(2), "y")
        assert (await work)[-1]["text"] == "hey"

    play(scenario)


@pytest.mark.parametrize(
    ("code", "kind"), [("too-long", Refused), ("busy", Refused), ("engine", EdgelamError), ("protocol", EdgelamError)]
)
def test_an_error_of_the_request_itself_is_no_loss(code: str, kind: type[EdgelamError], play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        first = await made.prompt()
        await given(made, first, "he")
        made.give(first, 2, 0, **told(first, code))
        with pytest.raises(kind, match="because"):
            await work
        assert len(made.prompts) == 1

    play(scenario)


def test_a_head_that_breaks_the_protocol_is_no_loss(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        made.give(await made.prompt(), 5, 104)
        with pytest.raises(PeerError):
            await work
        assert len(made.prompts) == 1

    play(scenario)


def test_a_deployment_that_somebody_removed_is_not_put_in_force_again(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await given(made, await made.prompt(), "he")
        made.lab.coordinator.take_out_of_force("tiny")
        with pytest.raises(Unreachable, match="out of force"):
            await work
        assert made.operations.asked == 1

    play(scenario)


def test_a_client_that_goes_away_in_a_pause_leaves_nothing(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        work = start(made)
        await given(made, await made.prompt(), "he")
        made.operations.ready.clear()
        made.serving.fail_deployment("tiny", "b went away")
        await until(lambda: made.operations.asked == 2)
        work.cancel()
        await asyncio.wait([work])
        await until(lambda: made.operations.cancelled == 1)
        assert turns_free(made) == SLOTS

    play(scenario)


def test_what_is_lost_before_it_is_ready_is_tried_again_also_for_a_request_that_has_not_begun(play: Play) -> None:
    async def scenario(made: Ring) -> None:
        whole, tries = made.operations.ensure, []

        async def lost_once(request_: Any, say: Any, hold: Hold, in_haste: bool) -> Any:
            tries.append(in_haste)
            if len(tries) == 1:
                raise Lost("the deployment is not ready: stage 1 on b: the device is offline")
            return await whole(request_, say, hold, in_haste)

        made.operations.ensure = lost_once  # type: ignore[method-assign]
        work = start(made)
        made.answer(await made.prompt(), "ok")
        events = await work
        assert kinds(events) == ["start", "token", "token", "end"] and tries == [False, True]
        assert events[-1]["pauses"] == []

    play(scenario)


def test_a_character_of_several_tokens_survives_a_loss_between_them(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bytewise:
        """Text comes when its bytes are complete, as with a byte-level tokenizer."""

        def __init__(self) -> None:
            self.held = b""

        def push(self, token: int) -> str:
            self.held += bytes([token])
            try:
                text, self.held = self.held.decode(), b""
            except UnicodeDecodeError:
                return ""
            return text

        def flush(self) -> str:
            return self.held.decode(errors="replace")

    async def scenario(made: Ring) -> None:
        from tests.coordinator.test_serving import FakeTokenizer

        monkeypatch.setattr(FakeTokenizer, "detokenizer", lambda _self: Bytewise())
        first_half, second_half = "é".encode()
        work = start(made)
        first = await made.prompt()
        made.give(first, 0, first_half)
        await until(lambda: made.serving._live[first.request]._next_index == 1)
        made.deploy()
        second = await made.prompt(2)
        made.give(second, 0, second_half, final=True)
        assert (await work)[-1]["text"] == "é"

    play(scenario)


@pytest.mark.parametrize("changes", [{"recoveries_at_most": -1}, {"recovery_timeout_s": 0.0}])
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        GenerateRequest(model="tiny", **changes).sampling()
