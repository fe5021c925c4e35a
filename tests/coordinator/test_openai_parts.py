"""What the OpenAI door is made of: bodies that are checked, text that is cut at a stop string, and a pump between the
stages and a client that reads at its own pace."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import deploy_request
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.openai.bodies import MAX_STOP_CHARS, NEUTRAL, ChatBody, Settings, TextBody, decoded
from coordinator.openai.cut import Cut
from coordinator.openai.door import ask_of, settings
from coordinator.openai.errors import BadParameter, is_openai, openai_body, row_of
from coordinator.openai.offered import offered, offered_as
from coordinator.pump import Pump
from models.cache import models_dir
from models.catalog import UnknownModel
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import record_of
from wire.errors import Busy, CorruptData, Degraded, EdgelamError, Refused, Unreachable, UsageError

USER = {"role": "user", "content": "hi"}


def chat(**changes: Any) -> ChatBody:
    return decoded(json.dumps({"model": "m", "messages": [USER], **changes}).encode(), ChatBody)


def text(**changes: Any) -> TextBody:
    return decoded(json.dumps({"model": "m", "prompt": "hi", **changes}).encode(), TextBody)


def in_force(**fields: Any) -> DeploymentRecord:
    return msgspec.structs.replace(record_of(plan_of("a"), blocks=2), request=DeployRequest(**fields))


# Bodies.


def test_a_bare_request_is_openais_defaults() -> None:
    ask = ask_of(chat(), [])
    assert (ask.request.temperature, ask.request.top_p, ask.most_tokens, ask.stream) == (1.0, 1.0, None, False)
    assert ask.request.messages == (USER,)
    assert ask.chat and not ask.request.raw
    plain = ask_of(text(), [])
    assert (plain.request.prompt, plain.request.raw, plain.chat) == ("hi", True, False)


def test_what_is_asked_for_arrives() -> None:
    asked = chat(temperature=0, top_p=0.5, top_k=3, seed=7, max_tokens=5, stop=["a", "b"], stream=True,
                 stream_options={"include_usage": True})  # fmt: skip
    ask = ask_of(asked, [])
    request = ask.request
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.0, 0.5, 3, 7)
    assert (ask.most_tokens, ask.stops, ask.stream, ask.with_usage) == (5, ("a", "b"), True, True)
    assert ask_of(chat(max_tokens=5, max_completion_tokens=6), []).most_tokens == 6
    assert ask_of(chat(stop="x"), []).stops == ("x",)
    assert ask_of(chat(stop=[]), []).stops == ask_of(chat(stop=None), []).stops == ()


def test_without_a_seed_every_request_draws_anew_and_any_seed_is_possible() -> None:
    assert ask_of(chat(), []).request.seed != ask_of(chat(), []).request.seed
    for seed in (-1, -(2**63), 0, 2**63 - 1):
        ask_of(chat(seed=seed), []).request.sampling()


def test_parts_of_text_are_one_text_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": parts}, USER])
    assert ask_of(asked, []).request.messages[0] == {"role": "system", "content": "ab"}


def test_what_does_not_change_the_answer_is_ignored() -> None:
    chat(user="me", metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=True, nonsense=[1])


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_would_change_the_answer_and_is_not_done_is_refused_by_name(name: str) -> None:
    strange: list[Any] = [{"a": 1}, ["x"], "strange", 7]
    for value in strange:
        with pytest.raises(BadParameter, match=name) as refused:
            chat(**{name: value})
        assert refused.value.param == name and refused.value.try_
        with pytest.raises(BadParameter):
            text(**{name: value})
    for neutral in (None, *NEUTRAL[name]):
        chat(**{name: neutral})
        text(**{name: neutral})


def test_zero_logprobs_are_not_none() -> None:
    with pytest.raises(BadParameter, match="logprobs"):
        text(logprobs=0)


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("temperature", {"temperature": 2.5}), ("temperature", {"temperature": "hot"}), ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}), ("max_tokens", {"max_tokens": 10**9}), ("seed", {"seed": 2**63}),
        ("stop", {"stop": list("abcde")}), ("stop", {"stop": ""}), ("stop[1]", {"stop": ["a", 3]}),
        ("stop", {"stop": "x" * (MAX_STOP_CHARS + 1)}),
        ("messages", {"messages": []}), ("messages[0].role", {"messages": [{"role": "king", "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
        ("model", {"model": ""}), ("model", {"model": None}), ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("edgelam.context_tokens", {"edgelam": {"context_tokens": "many"}}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(param: str, changes: dict[str, Any]) -> None:
    with pytest.raises(BadParameter) as refused:
        chat(**changes)
    assert refused.value.param == param


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], ["a", "b"], [], "", [""]])
def test_a_prompt_is_one_text(prompt: Any) -> None:
    with pytest.raises(BadParameter) as refused:
        text(prompt=prompt).text()
    assert refused.value.param == "prompt"
    assert text(prompt=["one"]).text() == "one"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"a": ' + b"[" * 200_000])
def test_what_is_no_body_is_refused(data: bytes) -> None:
    for kind in (ChatBody, TextBody):
        with pytest.raises(BadParameter):
            decoded(data, kind)


# Which deployment answers.


def test_a_model_in_force_is_asked_as_it_is_deployed() -> None:
    fields: dict[str, Any] = {
        "model": "m", "precision": "int8", "context_tokens": 77, "slots": 9, "boards_at_least": 2,
        "excluded": ("slow",), "pins": (("head", "fast"),),
    }  # fmt: skip
    record = in_force(**fields)
    assert deploy_request(ask_of(chat(), [in_force(model="other"), record]).request) == record.request
    assert settings("m", Settings(), [in_force(model="other")]) == DeployRequest(model="m")


def test_settings_that_are_given_override_those_in_force() -> None:
    record = in_force(model="m", precision="int8", slots=9)
    wanted = settings("m", Settings(precision="f32", boards_at_least=2), [record])
    assert wanted == DeployRequest(model="m", precision="f32", slots=9, boards_at_least=2)


def test_guesses_concern_the_request_and_not_what_it_runs_on() -> None:
    record = in_force(model="m", precision="int8")
    assert settings("m", Settings(speculate="auto"), [record]) == record.request
    assert ask_of(chat(edgelam={"speculate": "7"}), [record]).request.speculate == "7"
    assert ask_of(chat(), [record]).request.speculate == "auto"


def test_a_request_can_say_all_that_a_deployment_is_made_of() -> None:
    """Else a deployment with other settings could never be asked as it is."""
    defaults = GenerateRequest(model="m", prompt="x")
    assert deploy_request(defaults) == DeployRequest(model="m")


def test_an_alias_finds_what_is_in_force_under_the_name() -> None:
    record = in_force(model="smollm2-135m-instruct", context_tokens=99)
    assert settings("SmolLM2", Settings(), [record]).context_tokens == 99


# Models.


def test_models_are_what_is_in_force_and_what_is_in_the_cache(tmp_path: Path) -> None:
    checkpoint = tmp_path / "mine.gguf"
    checkpoint.write_bytes(b"x")
    os.utime(checkpoint, (1000, 1000))
    (models_dir(tmp_path) / "hf" / "org--name" / "main").mkdir(parents=True)
    (models_dir(tmp_path) / "hf" / "org--name" / "v1.0").mkdir()
    record = msgspec.structs.replace(in_force(model=str(checkpoint)), checkpoint=str(checkpoint))
    listed = offered([record], tmp_path)
    assert [row["id"] for row in listed] == [str(checkpoint), "hf:org/name", "hf:org/name@v1.0"]
    assert listed[0] == {"id": str(checkpoint), "object": "model", "created": 1000, "owned_by": "local"}
    assert listed[1]["owned_by"] == "org" and listed[1]["object"] == "model" and listed[1]["created"] > 0
    for row in listed:
        assert offered_as(row["id"], [record], tmp_path) == row


@pytest.mark.parametrize("name", ["nope", "hf:org/name", "hf:///", "/no/such.gguf", "smollm2", "x" * 5000, "~nobody/x"])
def test_a_model_that_is_not_there_is_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        offered_as(name, [], tmp_path)


def test_a_model_whose_file_is_gone_is_listed_while_it_is_in_force(tmp_path: Path) -> None:
    [row] = offered([msgspec.structs.replace(in_force(model="m"), checkpoint=str(tmp_path / "gone"))], tmp_path)
    assert (row["id"], row["created"]) == ("m", 0)


# Errors.


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (UnknownModel("no"), 404, "invalid_request_error", "model_not_found", "model"),
        (BadParameter("no", param="stop"), 400, "invalid_request_error", None, "stop"),
        (UsageError("no"), 400, "invalid_request_error", None, None),
        (Busy("no"), 429, "rate_limit_error", "busy", None),
        (Refused("no"), 400, "invalid_request_error", "refused", None),
        (Unreachable("no"), 503, "server_error", "unreachable", None),
        (Degraded("no"), 503, "server_error", "degraded", None),
        (CorruptData("no"), 500, "server_error", "failed", None),
        (EdgelamError("no"), 500, "server_error", "failed", None),
    ],
)
def test_every_error_has_its_status_and_shape(
    error: EdgelamError, status: int, kind: str, code: str | None, param: str | None
) -> None:
    assert row_of(error).status == status
    assert openai_body(error) == {"error": {"message": "no", "type": kind, "param": param, "code": code}}


def test_an_error_says_what_to_try() -> None:
    assert openai_body(Refused("no", try_="yes"))["error"]["message"] == "no (try: yes)"


def test_only_openais_paths_speak_openai() -> None:
    assert all(map(is_openai, ("/v1/models", "/v1/models/a/b", "/v1/chat/completions", "/v1/completions")))
    assert not any(map(is_openai, ("/v1/status", "/v1/generate", "/", "/metrics", "/v1/catalog")))


# Stop strings.


def cut_whole(whole: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: up to where a stop string is complete for the first time, without the longest that is."""
    for end in range(len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


LETTERS = st.text(alphabet="ab", max_size=12)


@given(LETTERS, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4), st.data())
@example("ab", ["abb", "b"], None)
def test_where_a_text_is_cut_does_not_depend_on_its_pieces(whole: str, stops: list[str], data: Any) -> None:
    expected, found = cut_whole(whole, stops)
    for _ in range(3):
        cut, given_out, rest = Cut(stops), "", whole
        while rest and not cut.found:
            size = data.draw(st.integers(1, len(rest))) if data else 1
            given_out += cut.push(rest[:size])
            assert expected.startswith(given_out), "shown, and to be taken back"
            rest = rest[size:]
        assert cut.found == found
        assert given_out + cut.flush() == expected


def test_what_can_not_become_a_stop_string_is_not_held_back() -> None:
    cut = Cut(["END"])
    assert [cut.push(piece) for piece in ("one", " E", "N", "T", "EN", "D", "more")] == [
        "one",
        " ",
        "",
        "ENT",
        "",
        "",
        "",
    ]
    assert cut.found and cut.flush() == ""
    assert Cut([]).push("anything") == "anything"


# The pump.


async def _count(upto: int, fails: Exception | None = None) -> AsyncGenerator[int, None]:
    for number in range(upto):
        yield number
        await asyncio.sleep(0)
    if fails is not None:
        raise fails


def test_a_reader_that_does_not_read_holds_nothing_up() -> None:
    async def play() -> None:
        pump = Pump(_count(100))
        await asyncio.sleep(0.05)
        assert pump._taking.done(), "all was taken though nobody reads"
        assert len(pump) == 100 and not pump.over
        assert [await pump.next(0.0) for _ in range(100)] == list(range(100))
        assert await pump.next(5.0) is None and pump.over

    asyncio.run(asyncio.wait_for(play(), 3.0))


@pytest.mark.parametrize("fails", [Refused("no"), OSError("disk")])
def test_an_error_comes_behind_what_came_before_it(fails: Exception) -> None:
    async def play() -> None:
        pump = Pump(_count(2, fails))
        assert [await pump.next(1.0), await pump.next(1.0)] == [0, 1]
        with pytest.raises(EdgelamError, match=r"no|disk"):
            await pump.next(1.0)

    asyncio.run(asyncio.wait_for(play(), 3.0))


def test_silence_is_none_and_closing_ends_the_work_at_once() -> None:
    ended = []

    async def silent() -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            ended.append(True)

    async def play() -> None:
        pump = Pump(silent())
        assert await pump.next(0.01) is None and not pump.over
        await pump.close()
        assert ended and pump.over
        await pump.close()

    asyncio.run(asyncio.wait_for(play(), 3.0))
