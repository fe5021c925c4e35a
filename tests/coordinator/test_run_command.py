"""What `edgelam run` shows of an answer, pauses and all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.commands.run import follow
from coordinator.inference.requests import GenerateRequest
from coordinator.journal import DeployRequest

EVENTS: list[dict[str, Any]] = [
    {"event": "start"},
    {"event": "token", "id": 1, "text": "he"},
    {"event": "pause", "reason": "pi4 did not\x1b answer", "given": 1},
    {"event": "status", "text": "epoch 7: 2 stages on 2 boards"},
    {"event": "resume", "pause_s": 1.57, "epoch": 7, "boards": ["pi5", "orin"], "reason": "pi4 did not answer"},
    {"event": "token", "id": 2, "text": "llo"},
    {"event": "end", "text": "hello"},
]


def test_a_pause_is_told_beside_the_text_and_not_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert follow(iter(EVENTS), show=True) == EVENTS[-1]
    shown = capsys.readouterr()
    assert shown.out == "hello\n"
    assert shown.err.splitlines() == [
        "... paused after 1 tokens: pi4 did not? answer",
        "... epoch 7: 2 stages on 2 boards",
        "... goes on after 1.6 s, on pi5, orin",
    ]


def test_on_a_terminal_it_is_dim_and_on_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    follow(iter(EVENTS), show=True)
    assert "\n\x1b[2m... paused after 1 tokens: pi4 did not? answer\x1b[0m\n" in capsys.readouterr().err


class Answering:
    """Stands for the coordinator: remembers what it was asked."""

    asked: list[GenerateRequest | DeployRequest]

    def __init__(self) -> None:
        self.asked = []

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def stream(self, _path: str, request: GenerateRequest) -> Iterator[dict[str, Any]]:
        self.asked.append(request)
        yield EVENTS[-1]

    def last(self, _path: str, request: DeployRequest, _status: object) -> dict[str, Any]:
        self.asked.append(request)
        return {"plan": {}, "explanation": ["why"]}


@pytest.mark.parametrize(("option", "replicas"), [((), 1), (("--replicas", "2"), 2)])
def test_both_commands_ask_for_so_many_copies(
    option: tuple[str, ...], replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Answering()
    for module in ("run", "show"):
        monkeypatch.setattr(f"coordinator.commands.{module}.client", lambda *_: there)
    for arguments in (["run", "m", "--prompt", "x", "--json"], ["plan", "m", "--explain"]):
        done = CliRunner().invoke(app, [*arguments, *option])
        assert done.exit_code == 0, done.output
    assert [request.replicas for request in there.asked] == [replicas, replicas]
