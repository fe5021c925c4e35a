"""What would change the answer: every line can be checked by planning with that change."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.planning import sensitivity as module
from coordinator.planning.aims import pace_s
from coordinator.planning.explain import explain
from coordinator.planning.planner import WORTH_MOVING, Candidate, figure, make_plan, repriced
from coordinator.planning.slowed import Slowed
from tests.planning.boards import address, board, graph, link, request
from tests.planning.test_planner import ETHERNET, WIFI, plan, shelf

TURN = re.compile(r"^    (?P<board>\S+) (?P<times>[0-9.]+) times (?P<way>slower|faster): (?P<shares>.+)$")


def changes(candidates: list[Candidate], **asked: Any) -> list[str]:
    lines = explain(plan(candidates, **asked), graph(), candidates)
    return lines[lines.index("what would change the answer") + 1 :]


def with_speed(candidates: list[Candidate], name: str, times: float) -> list[Candidate]:
    """The board's steps take so many times as long."""
    return [
        Candidate(
            device=one.device, profile=one.profile, usable_memory_bytes=one.usable_memory_bytes,
            slowed=Slowed(times=times, because="test") if one.device == name else None,
        )
        for one in candidates
    ]  # fmt: skip


def lost(candidates: list[Candidate], name: str, times: float, **asked: Any) -> float:
    """By how much of its time today's plan is worse than the best one when a board takes so many times as long."""
    changed = with_speed(candidates, name, times)
    return figure(repriced(plan(candidates, **asked), graph(), changed)) / figure(plan(changed, **asked)) - 1


@pytest.mark.parametrize("asked", [{}, {"boards_at_least": 3}, {"objective": "throughput"}])
def test_from_the_stated_speed_on_another_plan_wins_and_not_much_before(asked: dict[str, Any]) -> None:
    found = [match for line in changes(shelf(), **asked) if (match := TURN.match(line))]
    assert len(found) >= 3
    for match in found:
        times = float(match["times"])
        for factor, wins in ((1.05, True), (1 / 1.2, False)):
            at = times * factor if match["way"] == "slower" else 1 / (times * factor)
            value = lost(shelf(), match["board"], at, **asked)
            assert (value >= WORTH_MOVING) == wins, (match[0], at, value)


def test_the_shares_of_the_other_plan_are_named() -> None:
    [line] = [line for line in changes(shelf()) if line.strip().startswith("nuc 1.")]
    assert line.endswith("times faster: nuc all (now nothing), orin nothing (now all)")


def test_boards_for_which_nothing_changes_are_in_one_line() -> None:
    candidates = [board("only", 1.0, link_to_broker=ETHERNET), board("snail", 50.0, link_to_broker=WIFI)]
    assert "    only, snail up to 8 times slower or faster: none saves as much" in changes(candidates)


def test_better_links_are_solved_with_better_links() -> None:
    [line] = [line for line in changes(shelf(), boards_at_least=4) if "links 2 times as good" in line]
    half = [
        board(name, speed, link_to_broker=link(delay, rate))
        for name, speed, delay, rate in (
            ("orin", 1.0, 0.25e-3, 25e6), ("nuc", 1.25, 0.25e-3, 25e6), ("pi5", 2.0, 0.25e-3, 25e6),
            ("pi4", 4.0, 2.5e-3, 5e6),
        )
    ]  # fmt: skip
    best_s, now_s = (plan(boards, boards_at_least=4).predicted_token_s for boards in (half, shelf()))
    assert f"{best_s * 1e3:.1f} ms instead of {now_s * 1e3:.1f} ms" in line


def test_one_more_board_is_planned_with() -> None:
    [line] = [line for line in changes(shelf(), objective="throughput") if "one more" in line]
    more = [*shelf(), board("orin2", 1.0, link_to_broker=ETHERNET)]
    best_s = pace_s(plan(more, objective="throughput"))
    assert line.startswith("  with one more orin: ") and f"{best_s * 1e3:.1f} ms instead of" in line
    assert "one more board, like any of these, would not make a token faster" in "\n".join(changes(shelf()))
    limited = changes(shelf(), objective="throughput", boards_at_most=4)
    assert not any("one more" in line for line in limited), "it could not take part"


def test_a_plan_for_one_board_is_explained_too() -> None:
    assert changes([board("only", 1.0)])


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._function(*arguments)


def test_the_number_of_searches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (5, 6, 12):
        search = Counted(module.solve_any)
        monkeypatch.setattr(module, "solve_any", search)
        boards = [board(f"b{number}", 1 + number / 4, link_to_broker=ETHERNET) for number in range(count)]
        model = graph(6)
        explain(make_plan(model, boards, request(objective="throughput"), address), model, boards)
        most = module.FEW if count <= module.FEW else module.MAX_ASKED
        assert 0 < search.calls <= 2 * most * (module.STEPS + 1) + 1
        monkeypatch.undo()
