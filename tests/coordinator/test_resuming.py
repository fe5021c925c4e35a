"""A client whose coordinator goes away asks the next one for the rest, and shows a pause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from coordinator.client import Broken
from coordinator.inference import resuming
from coordinator.inference.requests import GenerateRequest, Guesses
from coordinator.inference.resuming import answer_events
from wire.errors import EdgelamError, Refused, Unreachable, UsageError

START = {"event": "start", "deployment": "m", "epoch": 3, "boards": ["a"], "prompt_tokens": 2,
         "guesses": {"most": 7, "padded": True}}  # fmt: skip
GONE = Broken("no coordinator at http://x (connection reset)")


def token(letter: str) -> dict[str, Any]:
    return {"event": "token", "id": ord(letter), "text": letter}


def end(*pauses: dict[str, Any]) -> dict[str, Any]:
    return {"event": "end", "text": "hello", "pauses": list(pauses)}


class Coordinators:
    """One after the other, each says its events; an error among them is raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[GenerateRequest] = []

    def __call__(self) -> Any:
        return self

    def __enter__(self) -> Coordinators:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def stream(self, _path: str, request: GenerateRequest) -> Iterator[dict[str, Any]]:
        self.asked.append(request)
        for event in self.scripts.pop(0):
            if isinstance(event, EdgelamError):
                raise event
            yield event


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "RETRY_S", 0.001)


REQUEST = GenerateRequest(model="m", prompt="x")


def hear(coordinators: Coordinators, **changes: Any) -> list[dict[str, Any]]:
    request = GenerateRequest(model="m", prompt="x", **changes)
    return list(answer_events(coordinators, request))


def test_without_a_loss_all_is_as_it_came() -> None:
    events = [{"event": "status", "text": "packing"}, START, token("h"), end()]
    coordinators = Coordinators(events)
    assert hear(coordinators) == events and coordinators.asked == [REQUEST]


@pytest.mark.parametrize("how", ["an error", "the end of the stream"])
def test_the_next_one_is_asked_for_what_is_behind_what_was_given(how: str) -> None:
    gone = [GONE] if how == "an error" else []
    second = {**START, "epoch": 4, "boards": ["b", "c"]}
    coordinators = Coordinators(
        [START, token("h"), token("e"), *gone], [GONE], [Refused("no board is online")], [second, token("l"), end()]
    )
    events = hear(coordinators)
    assert [event["event"] for event in events] == ["start", "token", "token", "pause", "resume", "token", "end"]
    assert [request.given for request in coordinators.asked] == [(), *[(104, 101)] * 3]
    assert coordinators.asked[-1].guesses == Guesses(7, True)
    pause, resume = events[3], events[4]
    assert (pause["reason"], pause["given"]) == ("the coordinator went away", 2)
    assert (resume["epoch"], resume["boards"]) == (4, ["b", "c"]) and resume["pause_s"] > 0
    [told] = events[-1]["pauses"]
    assert told["given"] == 2 and 0 <= told["detection_s"] <= told["pause_s"] == resume["pause_s"]


def test_the_rest_has_the_adapter_that_the_beginning_had() -> None:
    """A job may have another one by then."""
    started = {**START, "adapter": "1" * 32}
    coordinators = Coordinators([started, token("h"), GONE], [{**START, "adapter": "1" * 32}, token("e"), end()])
    hear(coordinators, adapter="notes")
    assert [request.adapter for request in coordinators.asked] == ["notes", "1" * 32]


def test_it_may_be_lost_again_and_boards_too() -> None:
    board = {"reason": "pi4 did not answer", "given": 3, "losses": 1, "detection_s": 0.1, "pause_s": 0.2}
    coordinators = Coordinators(
        [START, token("h"), GONE],
        [START, token("e"), token("l"), {"event": "pause", "reason": "pi4 did not answer", "given": 3},
         {"event": "resume", "pause_s": 0.2, "epoch": 5, "boards": [], "reason": ""}, token("l"), GONE],
        [START, token("o"), end(board)],
    )  # fmt: skip
    events = hear(coordinators)
    kinds = [event["event"] for event in events]
    assert kinds.count("start") == 1 and kinds.count("pause") == kinds.count("resume") == 3
    assert "".join(event["text"] for event in events if event["event"] == "token") == "hello"
    assert [pause["given"] for pause in events[-1]["pauses"]] == [1, 3, 4]
    assert coordinators.asked[-1].given == tuple(ord(letter) for letter in "hell")


def test_what_was_lost_behind_the_last_token_is_the_end_alone() -> None:
    coordinators = Coordinators([START, token("h"), GONE], [end()])
    events = hear(coordinators)
    assert [event["event"] for event in events] == ["start", "token", "pause", "resume", "end"]
    assert events[-1]["pauses"][0]["pause_s"] > 0


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ([GONE], {}),
        ([START, token("h"), GONE], {"recoveries_at_most": 0}),
        ([START, token("h"), Refused("busy")], {}),
        ([START, token("h"), Unreachable("the answer could not go on")], {}),
    ],
)
def test_what_is_no_loss_of_a_coordinator_in_an_answer_is_raised(script: list[Any], changes: dict[str, Any]) -> None:
    with pytest.raises(EdgelamError) as caught:
        hear(Coordinators(script), **changes)
    assert caught.value is script[-1]


def test_patience_ends() -> None:
    coordinators = Coordinators([START, token("h"), GONE], *[[GONE]] * 10_000)
    with pytest.raises(Unreachable, match=r"went away; the answer could not go on within 0 s: no coordinator"):
        hear(coordinators, recovery_timeout_s=0.05)


def test_what_can_not_be_is_not_tried_for_long() -> None:
    with pytest.raises(UsageError, match="another model"):
        hear(Coordinators([START, token("h"), GONE], [UsageError("another model")]))
