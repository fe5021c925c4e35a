"""A part of the coordinator that fails ends all of it with its error; a part that is done does not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from coordinator.changes import Changes
from coordinator.commands import up as up_command
from coordinator.config import Ports, read_ports, write_ports
from coordinator.runner import Options, Runner, artifacts_host, listening
from wire.broker import PORT_TRIES, Broker
from wire.errors import EdgelamError, Refused, Unreachable, UsageError


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        site="lab", listen="127.0.0.1", mqtt_port=0, http_port=0, broker_url="", models=(), precision="int4",
        state=tmp_path / "state",
    )  # fmt: skip


def play(options: Options, scenario: Callable[[Runner], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(scenario(Runner(options)), 10)

    asyncio.run(whole())


async def forever() -> None:
    await asyncio.Event().wait()


async def done() -> None:
    return


async def fails() -> None:
    raise EdgelamError("the HTTP door ended")


def test_a_part_that_fails_ends_the_run_with_its_error(options: Options) -> None:
    async def scenario(runner: Runner) -> None:
        runner._tasks = [asyncio.ensure_future(part()) for part in (forever, fails)]
        with pytest.raises(EdgelamError, match="HTTP door"):
            await runner.run()

    play(options, scenario)


def test_a_part_that_is_done_leaves_the_others_running_until_told_to_stop(options: Options) -> None:
    async def scenario(runner: Runner) -> None:
        runner._tasks = [asyncio.ensure_future(part()) for part in (forever, done)]
        running = asyncio.ensure_future(runner.run())
        await asyncio.sleep(0.05)
        assert not running.done()
        runner.stopping.set()
        await running

    play(options, scenario)


def test_a_dead_connection_thread_ends_the_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        alive = False

    class Coordinator:
        hub = Hub()
        broker_up = True
        changes = Changes()

        def tick(self) -> None:
            return

    async def scenario(runner: Runner) -> None:
        monkeypatch.setattr("coordinator.runner.WATCH_PERIOD_S", 0.0)
        runner.coordinator = Coordinator()  # type: ignore[assignment]
        runner._tasks = [asyncio.ensure_future(runner._watch())]
        with pytest.raises(EdgelamError, match="connection to the broker"):
            await runner.run()

    play(options, scenario)


def test_an_http_door_that_closes_unasked_is_an_error(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        should_exit = False

        def __init__(self, _config: object) -> None:
            return

        async def serve(self, sockets: list[socket.socket]) -> None:
            return

    async def scenario(runner: Runner) -> None:
        monkeypatch.setattr("coordinator.runner._Server", Server)
        runner.coordinator = object()  # type: ignore[assignment]
        with listening("127.0.0.1", 0, 0) as door:
            runner._door = door
            with pytest.raises(EdgelamError, match="door"):
                await runner._serve_http(None, None, None, None)  # type: ignore[arg-type]

    play(options, scenario)


def test_a_state_folder_is_for_one_coordinator_at_a_time(options: Options) -> None:
    async def scenario(runner: Runner) -> None:
        runner.check()
        with pytest.raises(Refused, match="runs already"):
            Runner(options).check()
        await runner.stop()
        another = Runner(options)
        another.check()
        await another.stop()

    play(options, scenario)


def test_a_runner_that_never_started_can_be_stopped(options: Options) -> None:
    play(options, lambda runner: runner.stop())


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        yield door.getsockname()[1]


def test_a_default_port_that_is_taken_gives_way_and_a_wanted_one_does_not(taken: int) -> None:
    with listening("127.0.0.1", 0, taken) as door:
        assert door.getsockname()[1] not in (0, taken)
    with pytest.raises(UsageError, match=str(taken)):
        listening("127.0.0.1", taken, 0)


def test_a_port_that_somebody_takes_before_the_broker_does_is_another_one(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two coordinators that are started at one moment choose the same port."""
    squatters: list[socket.socket] = []

    def start_broker(_directory: Path, host: str, port: int, _credentials: object) -> Broker:
        squatters.append(socket.create_server((host, port)))
        raise Unreachable(f"did not start on {port}")

    monkeypatch.setattr("coordinator.runner.start_broker", start_broker)
    with pytest.raises(Unreachable):
        Runner(options)._start_broker()
    ports = [squatter.getsockname()[1] for squatter in squatters]
    assert len(set(ports)) == len(ports) == PORT_TRIES
    for squatter in squatters:
        squatter.close()


def test_a_broker_that_can_not_start_is_not_tried_on_other_ports(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def start_broker(_directory: Path, _host: str, port: int, _credentials: object) -> Broker:
        tried.append(port)
        raise Unreachable("no broker is installed")

    monkeypatch.setattr("coordinator.runner.start_broker", start_broker)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    options.state.mkdir()
    write_ports(options.state, Ports(free, 0))
    with pytest.raises(Unreachable):
        Runner(options)._start_broker()
    assert tried == [free]


def test_the_last_port_is_taken_again_if_it_is_free(taken: int) -> None:
    with listening("127.0.0.1", 0, 0) as door:
        free = door.getsockname()[1]
    with listening("127.0.0.1", 0, taken, last=free) as door:
        assert door.getsockname()[1] == free
    with listening("127.0.0.1", 0, free, last=taken) as door:
        assert door.getsockname()[1] == free
    with pytest.raises(UsageError, match=str(taken)):
        listening("127.0.0.1", taken, 0, last=free)


def test_ports_are_remembered_and_a_file_that_is_none_is_no_ports(tmp_path: Path) -> None:
    assert read_ports(tmp_path) == Ports()
    write_ports(tmp_path, Ports(40001, 40002))
    assert read_ports(tmp_path) == Ports(40001, 40002)
    (tmp_path / "ports.json").write_bytes(b"[1,")
    assert read_ports(tmp_path) == Ports()


def test_a_board_fetches_weights_where_it_reaches_our_broker() -> None:
    assert artifacts_host("127.0.0.1", broker_elsewhere=False) == "127.0.0.1"
    assert artifacts_host("10.0.0.5", broker_elsewhere=True) == "10.0.0.5"
    assert artifacts_host("0.0.0.0", broker_elsewhere=False) == "0.0.0.0", "a board puts the broker's host in"
    assert artifacts_host("0.0.0.0", broker_elsewhere=True) != "0.0.0.0", "the broker's host would be another machine"


@pytest.mark.parametrize(("said", "replan"), [("on", True), ("off", False)])
def test_whether_what_runs_may_move_is_as_it_is_told(
    said: Literal["on", "off"], replan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Options] = []

    async def serve(options: Options, _on_ready: object) -> None:
        asked.append(options)

    monkeypatch.setattr(up_command, "serve", serve)
    up_command.up(replan=said)
    up_command.up()
    assert [options.replan for options in asked] == [replan, True]
