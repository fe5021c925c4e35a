"""A testbed with stand-in agents: what it starts, what it breaks on purpose, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec import structs

from agent.workers.throttle import Throttle
from hwprofiles.survey import cores
from testbed import commands, state
from testbed.boards import BoardSpec
from testbed.commands import UpOptions, up
from testbed.links import LinkSpec
from testbed.relink import LINK_FILE, relink
from testbed.site import until
from testbed.throttle import slow
from tests.testbed.peers import Echo, ask, connect
from wire.discovery import Advertiser, coordinator_properties
from wire.errors import CorruptData, Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.ids import new_boot_id

AGENT = (sys.executable, "-m", "tests.testbed.stand_in_agent")
FREE = LinkSpec()
"""A shaped link that costs nothing, to have faults on."""


@pytest.fixture
def echo() -> Iterator[Echo]:
    with closing(Echo()) as echo:
        yield echo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bed"


def options(echo: Echo, folder: Path, *boards: BoardSpec, **more: Any) -> UpOptions:
    given = {"site": "lab", "coordinator": echo.address, "agent_command": AGENT, **more}
    return UpOptions(boards=boards, state_dir=folder, **given)


def eventually(condition: Callable[[], object], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def report(folder: Path, board: str, starts: int = 1) -> dict[str, Any]:
    """What a stand-in agent wrote when it was ready for the `starts`th time."""
    path = folder / "boards" / board / "state" / "report.json"
    assert eventually(lambda: path.exists() and json.loads(path.read_text())["starts"] == starts)
    written = json.loads(path.read_text())
    assert isinstance(written, dict)
    return written


def gone(*pids: int) -> bool:
    return all(state.record_of(pid) is None for pid in pids)


def test_boards_run_with_their_names_limits_and_links_and_end_without_a_trace(echo: Echo, folder: Path) -> None:
    fast = BoardSpec(name="fast")
    slow = BoardSpec(name="slow", speed=0.25, memory_bytes=1 << 30, link=LinkSpec(delay_s=0.02))
    with up(options(echo, folder, fast, slow)) as bed:
        one, two = report(folder, "fast"), report(folder, "slow")
        assert {(board.name, board.state) for board in bed.status().boards} == {
            ("fast", "running"),
            ("slow", "running"),
        }
        assert "--via" not in one["arguments"]
        assert two["arguments"][two["arguments"].index("--emulate-speed") + 1] == "0.25"
        assert two["round_trip_s"] >= 0.04
        assert bed.link_stats()["slow"].up_bytes == 18
        assert bed.log("slow").exists()
        running = [one["pid"], one["worker"], two["pid"], two["worker"], bed.state.keeper.pid]
        assert not gone(*running[:1])
    assert gone(*running)
    assert not folder.exists()
    bed.down()


def test_a_link_of_a_board_can_be_stalled_cut_and_changed(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one", link=FREE))) as bed:
        report(folder, "one")
        via = bed.state.boards[0].via["mqtt"]
        peer = connect(via, 0.3)
        ask(peer, 1, 1)
        bed.stall("one")
        with pytest.raises(TimeoutError):
            ask(peer, 1, 1)
        bed.resume("one")
        assert peer.recv(1)
        bed.set_link("one", LinkSpec(delay_s=0.03))
        assert ask(peer, 1, 1) >= 0.06
        bed.cut("one")
        with pytest.raises(ConnectionError):
            peer.recv(1)
        bed.resume("one")
        with connect(via) as again:
            assert ask(again, 1, 1)
            bed.reset("one")
            with pytest.raises(ConnectionError):
                again.recv(1)
        peer.close()


def test_a_link_is_changed_by_another_command_and_is_again_as_it_was(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one", link=FREE), BoardSpec(name="two"))) as bed:
        report(folder, "one")
        with connect(bed.state.boards[0].via["mqtt"]) as peer:
            relink(folder, "one", LinkSpec(delay_s=0.03))
            until(lambda: ask(peer, 1, 1) >= 0.06, 10.0, "the link is slow")
            assert relink(folder, "one", None) == FREE
            until(lambda: ask(peer, 1, 1) < 0.06, 10.0, "the link is as it was")
            (folder / "boards" / "one" / LINK_FILE).write_bytes(b"no link")
            relink(folder, "one", LinkSpec(delay_s=0.04))
            until(lambda: ask(peer, 1, 1) >= 0.08, 10.0, "the keeper still looks")
        with pytest.raises(Refused, match="no link that could be changed"):
            relink(folder, "two", None)
        with pytest.raises(UsageError, match="no board 'three'"):
            relink(folder, "three", None)
        with pytest.raises(UsageError, match="link delay"):
            relink(folder, "one", LinkSpec(delay_s=1e6))


def test_a_board_can_be_slowed_while_it_runs_and_keeps_that_over_a_restart(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one", speed=0.5))) as bed:
        arguments = report(folder, "one")["arguments"]
        throttle = Throttle(arguments[arguments.index("--emulate-throttle") + 1])
        assert throttle.share() == 1.0
        bed.slow("one", 0.3)
        assert throttle.share() == 0.3
        bed.kill("one")
        bed.start("one")
        assert throttle.share() == 0.3
        bed.slow("one", 1.0)
        assert throttle.share() == 1.0
        for board, share, words in (
            ("two", 0.5, "no board 'two'"),
            ("one", 0.0, "a share of 0"),
            ("one", 2.0, "a share"),
        ):
            with pytest.raises(UsageError, match=words):
                bed.slow(board, share)
    with pytest.raises(UsageError, match="no board"):
        slow(folder, "one", 0.5)


def test_a_board_is_killed_with_all_its_processes_and_started_again(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one"), BoardSpec(name="two"))) as bed:
        before, other = report(folder, "one"), report(folder, "two")
        bed.kill("one")
        assert eventually(lambda: gone(before["pid"], before["worker"]))
        assert not gone(other["pid"]) and not gone(other["worker"])
        assert {board.name: board.state for board in bed.status().boards} == {"one": "gone", "two": "running"}
        with pytest.raises(Refused, match="running"):
            bed.start("two")
        bed.start("one")
        after = report(folder, "one", starts=2)
        assert after["pid"] == bed.state.boards[0].process.pid
    assert gone(after["pid"], after["worker"])


def test_a_paused_board_hangs_and_goes_on_and_does_not_hold_up_the_end(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one"))) as bed:
        pids = [report(folder, "one")[key] for key in ("pid", "worker")]

        def stopped() -> list[bool]:
            return [psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids]

        bed.pause("one")
        assert eventually(lambda: all(stopped()))
        assert bed.status().boards[0].state == "stopped"
        bed.unpause("one")
        assert eventually(lambda: not any(stopped()))
        bed.pause("one")
    assert gone(*pids)


def test_faults_on_what_is_not_there_are_refused_by_name(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="one"))) as bed:
        with pytest.raises(Refused, match="no shaped link 'one'"):
            bed.stall("one")
        with pytest.raises(Refused, match="no board 'two'") as caught:
            bed.kill("two")
        assert caught.value.try_ == "one of: one"


def test_kill_9_of_whoever_started_it_ends_everything(echo: Echo, folder: Path) -> None:
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from testbed.boards import BoardSpec
        from testbed.commands import UpOptions, up
        bed = up(UpOptions(site="lab", boards=(BoardSpec(name="one"),), state_dir=Path({str(folder)!r}),
                           coordinator={echo.address!r}, agent_command={AGENT!r}))
        print("up", flush=True)
        time.sleep(600)
    """)
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"up\n"
    written = report(folder, "one")
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert eventually(lambda: gone(written["pid"], written["worker"]) and not folder.exists())


def test_kill_9_of_the_keeper_kills_the_agents_and_down_removes_the_rest(echo: Echo, folder: Path) -> None:
    bed = up(options(echo, folder, BoardSpec(name="one")))
    written = report(folder, "one")
    os.kill(bed.state.keeper.pid, signal.SIGKILL)
    assert eventually(lambda: gone(written["pid"])), "the kernel did not end the agent with its keeper"
    with pytest.raises(EdgelamError, match="ended"):
        bed.stall("one")
    seen = commands.status(folder)
    assert seen is not None and not seen.kept
    bed.down()
    assert gone(written["worker"])
    assert not folder.exists()


def test_the_next_up_clears_what_a_killed_one_left(echo: Echo, folder: Path) -> None:
    first = up(options(echo, folder, BoardSpec(name="one")))
    left = report(folder, "one")
    os.kill(first.state.keeper.pid, signal.SIGKILL)
    with up(options(echo, folder, BoardSpec(name="two"))) as second:
        assert gone(left["pid"], left["worker"])
        assert not (folder / "boards" / "one").exists()
        report(folder, "two")
        assert [board.name for board in second.boards] == ["two"]
    first.down()


def test_a_detached_testbed_stays_and_another_command_ends_it(echo: Echo, folder: Path) -> None:
    bed = up(options(echo, folder, BoardSpec(name="one", link=FREE), detach=True))
    written = report(folder, "one")
    with pytest.raises(Refused, match="detached"):
        bed.stall("one")
    seen = commands.status(folder)
    assert seen is not None and seen.kept and seen.boards[0].state == "running"
    slow(folder, "one", 0.5)
    assert (folder / "boards/one/throttle").read_text() == "0.5\n", "no keeper is needed for that"
    with pytest.raises(Refused, match="a testbed is up") as caught:
        up(options(echo, folder, BoardSpec(name="two")))
    assert caught.value.try_.startswith(f"edgelam testbed down --state {folder}, "), "whatever its site"
    assert not gone(written["pid"]), "a refused `up` harmed the testbed that is up"
    program = f"from pathlib import Path; from testbed.commands import down; print(down(Path({str(folder)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n", done.stderr
    assert gone(written["pid"], written["worker"])
    assert not folder.exists()
    assert commands.down(folder) is False
    assert commands.status(folder) is None


def test_an_agent_that_ignores_the_request_to_end_is_killed(echo: Echo, folder: Path) -> None:
    with up(options(echo, folder, BoardSpec(name="stubborn"))):
        written = report(folder, "stubborn")
    assert gone(written["pid"], written["worker"])


def test_an_agent_that_can_not_start_is_an_error_with_the_end_of_its_log(echo: Echo, folder: Path) -> None:
    with pytest.raises(
        EdgelamError, match="board broken ended at once with 1:\nstand-in: this board is broken"
    ) as caught:
        up(options(echo, folder, BoardSpec(name="fine"), BoardSpec(name="broken")))
    assert "--name broken" in caught.value.try_
    assert not folder.exists()
    with pytest.raises(UsageError, match="can't start /no/such/agent"):
        up(options(echo, folder, BoardSpec(name="one"), agent_command=("/no/such/agent",)))
    assert not folder.exists()


def test_a_folder_with_something_else_in_it_is_not_touched(echo: Echo, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        up(options(echo, tmp_path, BoardSpec(name="one")))
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        commands.down(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_coordinator_is_found_over_mdns_and_its_absence_is_said(echo: Echo, folder: Path) -> None:
    site = f"t{new_boot_id()}"
    asked = options(echo, folder, BoardSpec(name="one", link=FREE), site=site, coordinator="", find_timeout_s=0.5)
    with pytest.raises(Unreachable, match=site):
        up(asked)
    assert not folder.exists()
    port = int(echo.address.rpartition(":")[2])
    advertiser = Advertiser(
        site, "coordinator", "coordinator", new_boot_id(), port, coordinator_properties(port), ["127.0.0.1"]
    )
    advertiser.start()
    patient = structs.replace(asked, find_timeout_s=15.0)
    with closing(advertiser), up(patient):
        arguments = report(folder, "one")["arguments"]
        assert "--broker" not in arguments
        via = arguments[arguments.index("--via") + 1]
        assert [pair.partition("=")[0] for pair in via.split(",")] == ["mqtt", "http"]


@pytest.mark.parametrize(("spare", "warnings"), [(0, 0), (1, 1)])
def test_boards_that_may_use_more_than_the_machine_has_are_warned_about(
    spare: int, warnings: int, echo: Echo, folder: Path
) -> None:
    machine = int(cores(Path("/")).usable)
    with up(options(echo, folder, BoardSpec(name="one"), threads=machine + spare)) as bed:
        assert len(bed.warnings) == warnings
        assert all(f"would use {machine + 1} cores, this machine has" in warning for warning in bed.warnings)
        assert bed.status().warnings == bed.warnings


@pytest.mark.parametrize("scheme", ["", "mqtt://"])
def test_boards_that_can_not_connect_are_said_with_the_reason(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "CONNECT_PATIENCE_S", 4.0)
    boards = (BoardSpec(name="near"), BoardSpec(name="far", link=FREE))
    with up(UpOptions(site="lab", boards=boards, state_dir=folder, coordinator=f"{scheme}127.0.0.1:1")) as bed:
        with pytest.raises(Unreachable, match="2 of 2 boards are not connected to the broker at") as caught:
            bed.await_connected(lambda _text: None)
        assert "near: broker mqtt://127.0.0.1:1: " in caught.value.message
        assert f"far: broker mqtt://{bed.state.boards[1].via['mqtt']}: " in caught.value.message, "past its link"
        (folder / "boards" / "near" / "state" / "broker").touch()
        said: list[str] = []
        bed.kill("far")
        with pytest.raises(Degraded, match="1 of 2 boards are not connected") as caught_too:
            bed.await_connected(said.append)
        assert "far: has ended; " in caught_too.value.message
        assert said == ["1 of 2 boards are connected"]


def test_a_recycled_pid_is_never_signalled() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mistaken = state.ProcessRecord(pid=bystander.pid, started_ticks=1)
    assert not state.is_alive(mistaken)
    assert not state.send(mistaken, signal.SIGKILL)
    assert bystander.poll() is None
    own = state.record_of(bystander.pid)
    assert own is not None
    assert state.send(own, signal.SIGKILL)
    bystander.wait()
    assert bystander.stdin is not None
    bystander.stdin.close()
    assert not state.send(own, signal.SIGKILL)


def test_a_damaged_state_file_is_said_not_guessed(folder: Path) -> None:
    folder.mkdir()
    (folder / state.STATE_FILE).write_text('{"v": 1')
    for ask_for in (commands.status, commands.down):
        with pytest.raises(CorruptData, match=r"testbed\.json is damaged"):
            ask_for(folder)


def test_after_a_restart_of_the_machine_nothing_is_signalled_and_the_files_go(echo: Echo, folder: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = state.record_of(bystander.pid)
    assert record is not None
    (folder / "boards").mkdir(parents=True)
    state.save(
        folder,
        state.TestbedState(
            marker="m", machine_boot="another boot", site="lab", coordinator="", created_unix=0.0, keeper=record
        ),
    )
    assert commands.status(folder) is None
    assert commands.down(folder)
    assert not folder.exists()
    assert bystander.poll() is None
    bystander.communicate(b"\n")
