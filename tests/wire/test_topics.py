"""What each topic can tell of a board's data, and whether noise covers it."""

from __future__ import annotations

from wire.topics import TABLE, Tells, Writer

CONTROL = {"Command", "Desired", "Kit", "coordinator.planning.plan.Plan"}
"""Of the coordinator, which has no board's data."""


def test_every_topic_that_a_board_writes_says_what_it_tells() -> None:
    written_by_boards = [row for row in TABLE if row.writer is not Writer.COORDINATOR]
    assert {row.message for row in TABLE} - {row.message for row in written_by_boards} == CONTROL
    tensors = [row.name for row in written_by_boards if row.tells is not Tells.NOTHING]
    assert tensors == [row.name for row in TABLE if row.message == "frame"] == ["inbox"]


def test_the_registry_says_that_gradients_are_covered_and_activations_are_not() -> None:
    covered, uncovered = Tells.UPDATES.value.split("covered by its noise;")
    assert "gradients of one that splits its model" in covered and "activations" not in covered
    assert uncovered.endswith("not covered") and "activations, states, tokens" in uncovered
