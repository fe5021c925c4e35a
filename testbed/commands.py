"""Testbeds as a user meets them: up, down, status. Plain functions; the command line adds words and colours."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from testbed import state
from testbed.boards import AgentOptions, BoardSpec, checked_boards
from testbed.control import Answer, command_of
from testbed.keeper import GRACE_S, KeeperOrder, Limits
from testbed.links import LinkSpec, broker_address, parse_address
from testbed.processes import with_source
from testbed.shaper import LinkStats
from testbed.state import MARKER, BoardRecord, TestbedState
from testbed.throttle import slow
from wire.addresses import host_port_text
from wire.discovery import find_coordinator
from wire.errors import Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.ids import checked_name, site_option

FIND_TIMEOUT_S: Final = 10.0
UP_TIMEOUT_S: Final = 60.0
"""Starting 64 interpreters on one core takes that long."""

ANSWER_TIMEOUT_S: Final = 20.0
DOWN_TIMEOUT_S: Final = GRACE_S + 15.0

CONNECT_PATIENCE_S: Final = 15.0
"""How long no other board may connect: an agent needs one to three seconds of a core until it has."""

MAX_TOLD: Final = 4
"""Boards that a message gives reasons for: the others mostly have the same one."""

LOG_TAIL_BYTES: Final = 4_000
_LOG_PREFIX = re.compile(r"^[A-Z]+ edgelam\.[a-z.]+: (?:  )?")

AGENT_COMMAND: Final = (sys.executable, "-m", "agent")


class UpOptions(Struct, frozen=True, kw_only=True):
    """What `up` is asked for. Without `coordinator` the one of `site` is found over mDNS."""

    site: str
    boards: tuple[BoardSpec, ...]
    state_dir: Path
    coordinator: str = ""
    """Its broker: HOST:PORT or mqtt://HOST:PORT."""
    coordinator_http: str = ""
    """HOST:PORT of its HTTP API."""
    interfaces: tuple[str, ...] = ("127.0.0.1",)
    limits: Limits = "emulated"
    threads: int = 1
    detach: bool = False
    """Keep running when this program ends; `down` ends it."""
    agent_command: tuple[str, ...] = AGENT_COMMAND
    find_timeout_s: float = FIND_TIMEOUT_S
    seed: int = 0
    """Of the links' jitter."""


class BoardStatus(Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    state: Literal["running", "stopped", "gone"]
    is_: str = msgspec.field(name="is")
    """What the board is, in words."""
    log: str


class TestbedStatus(Struct, frozen=True, kw_only=True):
    site: str
    coordinator: str
    kept: bool
    """False if its keeper was killed: `down` cleans up."""
    boards: tuple[BoardStatus, ...]
    warnings: tuple[str, ...]


class Testbed:
    """A testbed that is up. Ends with `down`, with the `with` block, or with this process, unless it is detached.

    Faults are methods: `kill`, `pause` and `start` are the board's processes, `stall`, `cut` and `reset` its link.
    """

    __test__ = False  # pytest: no test class

    def __init__(self, running: TestbedState, state_dir: Path, keeper: subprocess.Popen[bytes] | None) -> None:
        self.state = running
        self.state_dir = state_dir
        self._keeper = keeper
        self._lock = threading.Lock()

    @property
    def boards(self) -> tuple[BoardSpec, ...]:
        return tuple(board.spec for board in self.state.boards)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.state.warnings

    def log(self, board: str) -> Path:
        return self.state_dir / "logs" / f"{board}.log"

    def kill(self, board: str) -> None:
        """kill -9 to everything on the board: a power cut."""
        self._ask({"op": "board", "board": board, "act": "kill"})

    def start(self, board: str) -> None:
        """Start a killed board again, with the state and cache it had."""
        self._ask({"op": "board", "board": board, "act": "start"})
        self.state = state.load(self.state_dir) or self.state

    def pause(self, board: str) -> None:
        """SIGSTOP to everything on the board: it hangs, and its connections stay open."""
        self._ask({"op": "board", "board": board, "act": "pause"})

    def unpause(self, board: str) -> None:
        self._ask({"op": "board", "board": board, "act": "continue"})

    def stall(self, board: str) -> None:
        """Pull the cable: nothing passes and nobody is told."""
        self._ask({"op": "stall", "link": board})

    def cut(self, board: str) -> None:
        """Reset the board's connections and refuse new ones."""
        self._ask({"op": "cut", "link": board})

    def resume(self, board: str) -> None:
        """Undo `stall` and `cut`."""
        self._ask({"op": "resume", "link": board})

    def reset(self, board: str) -> None:
        """Reset the board's connections once."""
        self._ask({"op": "reset", "link": board})

    def slow(self, board: str, share: float) -> None:
        """Let the board have this share of its speed from now on, as when it is too hot; 1 is all of it."""
        slow(self.state_dir, board, share)

    def set_link(self, board: str, link: LinkSpec) -> None:
        """Change rate, delay and jitter of a board that was given a link."""
        self._ask(msgspec.to_builtins(command_of(link, board)))

    def link_stats(self) -> Mapping[str, LinkStats]:
        """Bytes carried and connections of each shaped link."""
        return {one.link: one for one in self._ask({"op": "stats"}).links}

    def status(self) -> TestbedStatus:
        return status_of(self.state)

    def await_connected(self, say: Callable[[str], None]) -> None:
        """Block until every board is connected to its broker; `say` hears how far that is.

        Raises Unreachable (none is) or Degraded (some are not), saying which and why, once a board has ended or no
        other one has connected for CONNECT_PATIENCE_S.
        """
        records = self.state.boards
        missing, news_s = list(records), time.monotonic()
        while missing:
            still = [record for record in missing if not self._has_connected(record)]
            if len(still) < len(missing):
                news_s = time.monotonic()
                say(f"{len(records) - len(still)} of {len(records)} boards are connected")
            missing = still
            dead = any(state.condition(record.process) == "gone" for record in missing)
            if missing and (dead or time.monotonic() - news_s > CONNECT_PATIENCE_S):
                raise self._not_connected(missing)
            time.sleep(0.1)

    def _has_connected(self, record: BoardRecord) -> bool:
        """Whether its agent has remembered the broker that it was admitted by."""
        return (self.state_dir / "boards" / record.spec.name / "state" / "broker").exists()

    def _not_connected(self, missing: Sequence[BoardRecord]) -> EdgelamError:
        kind = Unreachable if len(missing) == len(self.state.boards) else Degraded
        told = []
        for record in missing[:MAX_TOLD]:
            ended = "has ended; " if state.condition(record.process) == "gone" else ""
            told.append(f"{record.spec.name}: {ended}{_last_words(record.log)}")
        more = f"; and {len(missing) - MAX_TOLD} more" if len(missing) > MAX_TOLD else ""
        return kind(
            f"{len(missing)} of {len(self.state.boards)} boards are not connected to the broker at "
            f"{self.state.coordinator} ({'; '.join(told)}{more})",
            try_=f"is a coordinator up there? edgelam up{site_option(self.state.site)} starts one; "
            "fewer --boards if this machine is busy",
        )

    def wait(self) -> None:
        """Block until the testbed is ended by somebody else (`down` from another command)."""
        if self._keeper is not None:
            self._keeper.wait()

    def down(self) -> None:
        """End every process and remove every file of it. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            _close(keeper)
            try:
                keeper.wait(DOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                keeper.kill()
                keeper.wait()
        down(self.state_dir)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _ask(self, command: dict[str, Any]) -> Answer:
        if self._keeper is None:
            raise Refused("this testbed is detached, or down", try_="bring it up without detaching to give it faults")
        with self._lock:
            _write(self._keeper, msgspec.json.encode(command) + b"\n")
            return _answer(self._keeper, ANSWER_TIMEOUT_S, state.down_command(self.state_dir))


def up(options: UpOptions) -> Testbed:
    """Start a testbed and give it once all agents run; what an earlier one left in `state_dir` is ended first.

    Raises UsageError, Unreachable (no coordinator), Refused (one is up in that folder), EdgelamError (an agent ended
    at once; the text has the end of its log).
    """
    order = _order(options)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "testbed.keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=with_source({**os.environ, MARKER: f"{order.marker}/keeper"}),
        start_new_session=True,
    )
    try:
        _write(keeper, msgspec.json.encode(order) + b"\n")
        answer = _answer(keeper, UP_TIMEOUT_S, "start it again, or with fewer boards")
        running = msgspec.convert(answer.result, TestbedState)
    except BaseException:
        _close(keeper)  # it ends everything at the end of its input, also when it has not answered yet
        keeper.send_signal(signal.SIGTERM)
        keeper.wait(DOWN_TIMEOUT_S)
        raise
    if not options.detach:
        return Testbed(running, options.state_dir, keeper)
    _close(keeper)
    keeper.returncode = 0  # not ours to wait for any more; init reaps it
    return Testbed(running, options.state_dir, None)


def _order(options: UpOptions) -> KeeperOrder:
    """Check the options, find the coordinator, and make the keeper's order."""
    checked_name(options.site, "site")
    boards = checked_boards(options.boards)
    if options.threads < 1:
        raise UsageError(f"{options.threads} threads per board", try_="at least 1")
    mqtt, http = options.coordinator, options.coordinator_http
    if mqtt:
        mqtt = broker_address(mqtt).text()
    else:
        found = find_coordinator(options.site, options.find_timeout_s, options.interfaces)
        mqtt = host_port_text(found.broker_hosts[0], found.port)
        http = http or (host_port_text(found.addresses[0], found.http_port) if found.http_port else "")
    if http:
        parse_address(http, "coordinator's HTTP API")
    agent = AgentOptions(
        command=options.agent_command,
        site=options.site,
        broker=f"mqtt://{mqtt}" if options.coordinator else "",
        interfaces=options.interfaces,
        threads=options.threads,
        emulate=options.limits == "emulated",
    )
    return KeeperOrder(
        state_dir=str(options.state_dir.absolute()),
        marker=secrets.token_hex(6),
        mqtt=mqtt,
        http=http,
        boards=boards,
        agent=agent,
        limits=options.limits,
        detach=options.detach,
        seed=options.seed,
    )


def down(state_dir: Path) -> bool:
    """End the testbed of a folder and remove all of it; False if there was none. Raises CorruptData, Refused."""
    if not state_dir.is_dir():
        return False
    running = state.load(state_dir)
    if running is not None and running.machine_boot == state.machine_boot():
        state.send(running.keeper, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_TIMEOUT_S
        while state.is_alive(running.keeper) and time.monotonic() < deadline:
            time.sleep(0.02)
        if state.is_alive(running.keeper):
            state.sweep(running.marker)
    if not state_dir.is_dir():
        return True
    state.checked_folder(state_dir)
    with state.locked(state_dir):
        try:
            return state.clear(state_dir) or running is not None
        finally:
            state.remove_folder(state_dir)


def status(state_dir: Path) -> TestbedStatus | None:
    """What runs in a folder; None if no testbed is up there. Raises CorruptData."""
    running = state.load(state_dir)
    if running is None or running.machine_boot != state.machine_boot():
        return None
    return status_of(running)


def status_of(running: TestbedState) -> TestbedStatus:
    boards = tuple(
        BoardStatus(
            name=board.spec.name,
            pid=board.process.pid,
            state=state.condition(board.process),
            is_=board.spec.text(),
            log=board.log,
        )
        for board in running.boards
    )
    return TestbedStatus(
        site=running.site,
        coordinator=running.coordinator,
        kept=state.is_alive(running.keeper),
        boards=boards,
        warnings=running.warnings,
    )


def _last_words(log: str) -> str:
    """The last line of a board's log that says something."""
    try:
        lines = Path(log).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    return _LOG_PREFIX.sub("", said[-1]) if said else "its log is empty"


def _write(keeper: subprocess.Popen[bytes], line: bytes) -> None:
    assert keeper.stdin is not None
    try:
        keeper.stdin.write(line)
        keeper.stdin.flush()
    except OSError as error:
        raise EdgelamError(f"the testbed has ended ({error.strerror})", try_="start it again") from None


def _answer(keeper: subprocess.Popen[bytes], timeout_s: float, silent_try: str) -> Answer:
    """Read one line from the keeper; raise what it refused, or EdgelamError if it ended or hangs.

    `silent_try` is the hint for the last.
    """
    assert keeper.stdout is not None
    descriptor = keeper.stdout.fileno()
    deadline = time.monotonic() + timeout_s
    line = bytearray()
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise EdgelamError(f"the testbed did not answer within {timeout_s:g} s", try_=silent_try)
        part = os.read(descriptor, 65536)
        if not part:
            raise EdgelamError("the testbed has ended", try_="start it again")
        line += part
    answer = msgspec.json.decode(line, type=Answer)
    if not answer.ok:
        raise _refused(answer)
    return answer


def _refused(answer: Answer) -> EdgelamError:
    kinds: Sequence[type[EdgelamError]] = (UsageError, Refused)
    kind = next((kind for kind in kinds if kind.exit_code == answer.exit_code), EdgelamError)
    return kind(answer.error, try_=answer.try_)


def _close(keeper: subprocess.Popen[bytes]) -> None:
    for pipe in (keeper.stdin, keeper.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read all
                pipe.close()
