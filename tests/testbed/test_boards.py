"""What virtual boards are, and how their agents are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed import boards, links
from testbed.boards import AgentOptions, BoardSpec, agent_arguments
from testbed.links import Address
from wire.errors import UsageError


@pytest.mark.parametrize("count", range(1, 9))
def test_a_shelf_is_unequal_and_may_be_started(count: int) -> None:
    shelf = boards.checked_boards(boards.shelf(count))
    assert len(shelf) == count
    assert len({board.speed for board in shelf}) == len({board.speed for board in boards.shelf(count)})
    if count >= 4:
        assert len({board.speed for board in shelf}) >= 4
        assert len({board.memory_bytes for board in shelf}) >= 3
        assert {board.link for board in shelf} == {links.ETHERNET, links.WIFI}


def test_equal_boards_are_alike_but_for_their_names() -> None:
    made = boards.preset("equal", 4)
    assert len({board.name for board in made}) == 4
    assert {(board.speed, board.memory_bytes, board.link) for board in made} == {(1.0, 2 << 30, None)}


def test_a_named_link_replaces_all_links() -> None:
    assert {board.link for board in boards.preset("shelf", 4, "wifi")} == {links.WIFI}
    assert {board.link for board in boards.preset("shelf", 4, "none")} == {None}


@pytest.mark.parametrize(("name", "count"), [("shelf", 0), ("shelf", 9), ("equal", 65), ("cupboard", 2)])
def test_presets_that_do_not_exist_are_refused(name: str, count: int) -> None:
    with pytest.raises(UsageError) as caught:
        boards.preset(name, count)
    assert caught.value.try_


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "0 boards"),
        ([BoardSpec(name="a"), BoardSpec(name="a")], "two boards are named 'a'"),
        ([BoardSpec(name="A/b")], "not a name"),
        ([BoardSpec(name="a", speed=0)], "speed"),
        ([BoardSpec(name="a", speed=2)], "speed"),
        ([BoardSpec(name="a", memory_bytes=1000)], "memory of 1000 B"),
        ([BoardSpec(name="a", link=links.LinkSpec(delay_s=-1))], "link delay"),
    ],
)
def test_boards_that_can_not_be_are_refused(made: list[BoardSpec], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        boards.checked_boards(made)


def test_the_agents_command_line_says_what_the_board_is() -> None:
    board = BoardSpec(name="pi4", speed=0.25, memory_bytes=1 << 30)
    options = AgentOptions(command=("agent",), site="lab", interfaces=("127.0.0.1",))
    via = {"mqtt": Address("127.0.0.1", 4001), "http": Address("127.0.0.1", 4002)}
    assert " ".join(agent_arguments(board, options, Path("/b/pi4"), via)) == (
        "agent run --site lab --name pi4 --state-dir /b/pi4/state --cache-dir /b/pi4/cache --interfaces 127.0.0.1 "
        "--via mqtt=127.0.0.1:4001,http=127.0.0.1:4002 --emulate-speed 0.25 "
        "--emulate-throttle /b/pi4/throttle --emulate-shared /b/.measured --emulate-memory 1073741824 --threads 1"
    )


def test_limits_by_the_kernel_are_not_emulated_as_well() -> None:
    options = AgentOptions(command=("agent",), site="lab", broker="mqtt://10.0.0.5:1883", emulate=False)
    arguments = agent_arguments(BoardSpec(name="pi4", speed=0.25), options, Path("/b"), {})
    assert not [argument for argument in arguments if argument.startswith("--emulate")]
    assert arguments[arguments.index("--broker") + 1] == "mqtt://10.0.0.5:1883"


def test_the_shelf_on_two_cores_is_more_than_there_is_and_a_line_says_what_that_means() -> None:
    total = sum(board.speed for board in boards.preset("shelf", 4))
    warning = boards.overcommitted(total, 2)
    assert "would use 2.55 cores, this machine has 2" in warning
    assert "one answer at a time is not slowed" in warning and "\n" not in warning
    assert boards.overcommitted(total, 4) == ""
