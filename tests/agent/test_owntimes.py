"""A board's own time is that in which others could do nothing for it."""

from __future__ import annotations

from agent.workers.owntimes import OwnTimes


def test_a_clock_runs_from_an_answer_to_the_next_states() -> None:
    times = OwnTimes(("a", "b"), 10.0)
    times.came("a", 11.0, last=True)
    times.came("b", 14.0, last=True)
    assert times.own_s == {"a": 1.0, "b": 4.0}
    times.came("b", 15.0, last=True)
    assert times.own_s["b"] == 4.0, "it waits for the blocks"
    times.answered("a", 16.0)
    times.came("a", 16.5, last=False)
    assert times.own_s["a"] == 1.5, "its gradient"
    times.came("a", 17.0, last=True)
    assert times.own_s["a"] == 2.0, "and the states of the next step behind it"
    times.answered("b", 20.0)
    assert times.own_s == {"a": 2.0, "b": 4.0}, "a clock that still runs counts when something has come"
    times.came("stranger", 21.0, last=True)
    assert times.own_s.keys() == {"a", "b"}
