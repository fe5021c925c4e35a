"""The process that owns a running testbed: its links, its agents, and the duty to leave nothing behind.

    whoever calls `testbed.commands.up`
      └─ keeper (session of its own): links of all boards in its event loop
           ├─ agent of board 1 (session of its own) ── its workers
           └─ agent of board 2 ...

The keeper takes one order (a line of JSON on standard input), answers once everything runs, and then obeys commands
(testbed.control and the ones below). It ends everything when its input ends, so kill -9 of the caller is enough; on
SIGTERM, SIGINT and SIGHUP; and on {"op": "down"}. Detached, the end of input means nothing. When the keeper itself is
killed, the kernel kills its agents, and `down` or the next `up` finds the rest by the state file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from hwprofiles.survey import cores
from testbed import cgroups, state
from testbed.boards import DATA, DATA_OWN, AgentOptions, BoardSpec, agent_arguments, overcommitted
from testbed.control import MAX_LINE_BYTES, Answer, LinkControl, obey, refusal, serve_lines
from testbed.links import Address, parse_address
from testbed.processes import end_group, start_child
from testbed.relink import follow
from testbed.shaper import Shaper, new_event_loop
from testbed.state import MARKER, BoardRecord, TestbedState
from wire.broker import free_port
from wire.errors import EdgelamError, Refused, UsageError

GRACE_S: Final = 5.0
"""What agents may take to end in order: 2 s for the last messages, and as much again under load."""

EARLY_S: Final = 0.5
"""An agent that ends within it could not start at all; later deaths are seen by `status`."""

POLL_S: Final = 0.02
LOG_TAIL_BYTES: Final = 2_000

Limits = Literal["emulated", "cgroup"]


class KeeperOrder(Struct, frozen=True, kw_only=True):
    """What to run. Addresses are HOST:PORT of the coordinator's broker and HTTP API; '' if it has none."""

    state_dir: str
    marker: str
    mqtt: str
    http: str
    boards: tuple[BoardSpec, ...]
    agent: AgentOptions
    limits: Limits = "emulated"
    detach: bool = False
    seed: int = 0


class BoardCommand(Struct, frozen=True, kw_only=True, tag_field="op", tag="board"):
    """kill: SIGKILL to all processes of a board, as a power cut; pause and continue: SIGSTOP and SIGCONT to all of
    them; start: its agent again, with the same state and cache."""

    board: str
    act: Literal["kill", "pause", "continue", "start"]


class Down(Struct, frozen=True, kw_only=True, tag_field="op", tag="down"):
    pass


KeeperControl = LinkControl | BoardCommand | Down


class Keeper:
    """A running testbed. `start`, then `act` as often as wanted, then `stop`."""

    def __init__(self, order: KeeperOrder) -> None:
        self._order = order
        self._folder = Path(order.state_dir)
        self._shaper = Shaper(order.seed)
        self._groups: dict[str, cgroups.Group] = {}
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._arguments: dict[str, list[str]] = {}
        self._records: dict[str, BoardRecord] = {}
        self._warnings: list[str] = []
        self.ended = asyncio.Event()

    async def start(self) -> TestbedState:
        """Start links and agents and write the state file; raise EdgelamError, with everything stopped again."""
        try:
            for folder in state.FOLDERS:
                (self._folder / folder).mkdir(exist_ok=True)
            self._weigh()
            self._save()
            if self._order.limits == "cgroup":
                self._make_groups()
            for board in self._order.boards:
                via = await self._make_link(board)
                self._start_agent(board, {name: address.text() for name, address in via.items()})
            written = self._save()
            await asyncio.sleep(EARLY_S)
            for name, agent in self._agents.items():
                if agent.poll() is not None:
                    raise EdgelamError(
                        f"the agent of board {name} ended at once with {agent.returncode}:\n{self._log_end(name)}",
                        try_="run it by hand: " + shlex.join(self._arguments[name]),
                    )
        except BaseException:
            await self.stop()
            raise
        return written

    async def _make_link(self, board: BoardSpec) -> dict[str, Address]:
        """Shape a board's link: forwards to the broker and to HTTP, and one from others to the board's own broker, all
        sharing it."""
        if board.link is None:
            return {}
        self._shaper.add_link(board.name, board.link)
        upstreams = {"mqtt": self._order.mqtt, "http": self._order.http}
        here = Address("127.0.0.1", 0)
        via = {
            name: await self._shaper.add_forward(board.name, name, here, parse_address(upstream, f"{name} upstream"))
            for name, upstream in upstreams.items()
            if upstream
        }
        own = Address("127.0.0.1", free_port("127.0.0.1", 0))
        return {
            **via,
            DATA: await self._shaper.add_forward(board.name, DATA, here, own, inward=True),
            DATA_OWN: own,
        }

    def _weigh(self) -> None:
        """Warn if the boards may use more of this machine than there is."""
        usable = cores(Path("/")).usable
        total = sum(board.speed for board in self._order.boards)
        if self._order.limits == "cgroup":
            warning = cgroups.overcommitted(total, usable)
        else:
            warning = overcommitted(total * self._order.agent.threads, usable)
        if warning:
            self._warnings.append(warning)

    def _make_groups(self) -> None:
        for board in self._order.boards:
            name = f"edgelam-{self._order.marker}-{board.name}"
            self._groups[board.name] = cgroups.create(name, board.speed, board.memory_bytes)
            self._save()

    def _start_agent(self, board: BoardSpec, via: dict[str, str]) -> None:
        folder = self._folder / "boards" / board.name
        folder.mkdir(exist_ok=True)
        log = self._folder / "logs" / f"{board.name}.log"
        group = self._groups.get(board.name)
        dial = {name: parse_address(text, name) for name, text in via.items()}
        arguments = self._arguments[board.name] = agent_arguments(board, self._order.agent, folder, dial)
        with log.open("ab") as opened:
            agent = start_child(
                arguments,
                opened,
                {**os.environ, MARKER: f"{self._order.marker}/{board.name}"},
                enter=group.members_files if group else (),
            )
        self._agents[board.name] = agent
        # An agent that has ended already is found by its exit code later; its record must not be anybody else's.
        process = state.record_of(agent.pid) or state.ProcessRecord(pid=agent.pid, started_ticks=-1)
        self._records[board.name] = BoardRecord(spec=board, process=process, log=str(log), via=via)

    def _save(self) -> TestbedState:
        own = state.record_of(os.getpid())
        if own is None:
            raise EdgelamError("/proc is not readable", try_="mount it: mount -t proc proc /proc")
        written = TestbedState(
            marker=self._order.marker,
            machine_boot=state.machine_boot(),
            site=self._order.agent.site,
            coordinator=self._order.mqtt,
            created_unix=time.time(),
            keeper=own,
            boards=tuple(self._records.values()),
            groups=tuple(str(folder) for group in self._groups.values() for folder in group.folders),
            warnings=tuple(self._warnings),
        )
        state.save(self._folder, written)
        return written

    def _log_end(self, name: str) -> str:
        text = Path(self._records[name].log).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return "\n".join(text.splitlines()[-8:])

    async def act(self, command: LinkControl | BoardCommand | Down) -> Answer:
        """Carry out one command; raise EdgelamError."""
        if isinstance(command, Down):
            self.ended.set()
            return Answer(ok=True)
        if not isinstance(command, BoardCommand):
            return await obey(self._shaper, command)
        if command.board not in self._agents:
            raise Refused(f"no board {command.board!r}", try_=f"one of: {', '.join(self._agents)}")
        if command.act == "start":
            return self._restart(command.board)
        number = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP, "continue": signal.SIGCONT}[command.act]
        self._signal_board(command.board, number)
        if command.act == "kill":
            await self._gone([self._agents[command.board]], state.SWEEP_S)
        return Answer(ok=True)

    def _signal_board(self, name: str, number: int) -> None:
        """Signal all processes of a board, those that it starts meanwhile included."""
        done: set[int] = set()
        while news := [one for one in state.marked(self._order.marker, name) if one.pid not in done]:
            for process in news:
                state.send(process, number)
                done.add(process.pid)

    def _restart(self, name: str) -> Answer:
        if self._agents[name].poll() is None:
            raise Refused(f"the agent of board {name} is running", try_="kill it first")
        record = self._records[name]
        self._start_agent(record.spec, record.via)
        self._save()
        return Answer(ok=True, result={"pid": self._agents[name].pid})

    async def follow_links(self) -> None:
        """Change links as other commands ask for it, for ever."""
        await follow(self._folder, self._order.boards, self._shaper)

    async def stop(self) -> None:
        """End agents in order, then by force; then links, groups and files."""
        for agent in self._agents.values():
            end_group(agent, signal.SIGTERM)
        for name in self._agents:
            self._signal_board(name, signal.SIGCONT)  # who is stopped can't end
        await self._gone(list(self._agents.values()), GRACE_S)
        state.sweep(self._order.marker)
        for agent in self._agents.values():
            agent.wait()
        await self._shaper.close()
        for group in self._groups.values():
            group.remove()
        state.remove_files(self._folder)

    @staticmethod
    async def _gone(agents: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
        """Wait until all have ended, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)


def main() -> int:
    """Read the order, run it, end it. Exit code 0 if everything was removed."""
    try:
        order = msgspec.json.decode(_first_line(), type=KeeperOrder)
        folder = state.checked_folder(Path(order.state_dir))
        with state.locked(folder):
            try:
                state.clear(folder)
                loop = new_event_loop()
                try:
                    loop.run_until_complete(_run(order, folder))
                finally:
                    loop.close()
            finally:
                state.remove_folder(folder)
    except EdgelamError as error:
        _say(msgspec.json.encode(refusal(error)) + b"\n")
        return error.exit_code
    return 0


async def _run(order: KeeperOrder, folder: Path) -> None:
    keeper = Keeper(order)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, keeper.ended.set)
    written = await keeper.start()
    # From here on nobody may be there to read: what goes wrong is in the log.
    with (folder / "logs" / "keeper.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    _say(msgspec.json.encode(Answer(ok=True, result=msgspec.to_builtins(written))) + b"\n")
    reading = asyncio.ensure_future(serve_lines(0, KeeperControl, keeper.act, _say))
    following = asyncio.ensure_future(keeper.follow_links())
    if not order.detach:
        reading.add_done_callback(lambda _: keeper.ended.set())
    try:
        await keeper.ended.wait()
    finally:
        reading.cancel()
        following.cancel()
        await asyncio.gather(reading, following, return_exceptions=True)
        await keeper.stop()


def _first_line() -> bytes:
    """The order, byte-exact: what follows it in the pipe stays there."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise UsageError("the order ended early", try_="start testbeds with: edgelam testbed up")
        line += byte
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"an order of more than {MAX_LINE_BYTES} bytes")
    return bytes(line)


def _say(line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the caller has gone; the end of input says so too
        while line:
            line = line[os.write(1, line) :]


if __name__ == "__main__":
    raise SystemExit(main())
