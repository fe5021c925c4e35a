"""What a testbed left on this machine: its state file, its processes, and how to end exactly those.

A process is known by its pid *and* its start time, so that a recycled pid is never signalled, and by a marker in its
environment, so that children of an agent that was killed are found too. The state file names the boot of the machine:
after a restart nothing in it is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from testbed.boards import BoardSpec
from testbed.cgroups import remove_group
from wire.errors import CorruptData, Refused, UsageError

STATE_FILE: Final = "testbed.json"
LOCK_FILE: Final = "lock"
FOLDERS: Final = ("boards", "logs")

MARKER: Final = "EDGELAM_TESTBED"
"""Environment variable of every process of a testbed: '<testbed>/<board>'."""

SWEEP_S: Final = 5.0
"""A process that got SIGKILL is gone in milliseconds; one in an uninterruptible read of a slow disk takes longer."""


class ProcessRecord(Struct, frozen=True, kw_only=True):
    """A process for as long as it lives. `started_ticks`: field 22 of /proc/PID/stat."""

    pid: int
    started_ticks: int


class BoardRecord(Struct, frozen=True, kw_only=True):
    spec: BoardSpec
    process: ProcessRecord
    log: str
    via: dict[str, str]


class TestbedState(Struct, frozen=True, kw_only=True):
    """The state file. `marker` is random; `machine_boot` is the kernel's boot id."""

    v: int = 1
    marker: str
    machine_boot: str
    site: str
    coordinator: str
    created_unix: float
    keeper: ProcessRecord
    boards: tuple[BoardRecord, ...] = ()
    groups: tuple[str, ...] = ()
    """cgroup folders."""
    warnings: tuple[str, ...] = ()


def started_ticks(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process started, in clock ticks after boot; None if there is none of that pid, or only its zombie."""
    try:
        text = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in brackets, and may hold spaces and brackets itself.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def record_of(pid: int) -> ProcessRecord | None:
    """Give the identity of a running process, None if it has ended."""
    ticks = started_ticks(pid)
    return None if ticks is None else ProcessRecord(pid=pid, started_ticks=ticks)


def is_alive(record: ProcessRecord) -> bool:
    return started_ticks(record.pid) == record.started_ticks


def condition(record: ProcessRecord) -> Literal["running", "stopped", "gone"]:
    """Whether this very process runs, was stopped by a signal, or has ended."""
    if not is_alive(record):
        return "gone"
    try:
        text = Path(f"/proc/{record.pid}/stat").read_text()
    except OSError:
        return "gone"
    return "stopped" if text.rpartition(")")[2].split()[0] in ("T", "t") else "running"


def send(record: ProcessRecord, number: int) -> bool:
    """Signal this very process; False if it has ended, whoever has its pid now."""
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the descriptor is held: from here on it can't become somebody else.
        if not is_alive(record):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def marked(marker: str, board: str | None = None) -> list[ProcessRecord]:
    """All processes of a testbed, or of one of its boards, that this user may look at."""
    wanted = f"{MARKER}={marker}/{board or ''}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        if any(line == wanted if board else line.startswith(wanted) for line in environment):
            record = record_of(int(entry.name))
            if record is not None:
                found.append(record)
    return found


def sweep(marker: str, also: Iterable[ProcessRecord] = ()) -> None:
    """Kill what is left of a testbed until nothing is; raise Refused if something survives SIGKILL."""
    deadline = time.monotonic() + SWEEP_S
    extra = list(also)
    while left := [*marked(marker), *(record for record in extra if is_alive(record))]:
        if time.monotonic() > deadline:
            pids = ", ".join(str(record.pid) for record in left)
            raise Refused(
                f"processes {pids} of the testbed do not end", try_="see what they wait for: ps -o stat,wchan"
            )
        for record in left:
            send(record, signal.SIGKILL)
        time.sleep(0.02)


def machine_boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def save(state_dir: Path, state: TestbedState) -> None:
    """Write the state file; a reader sees the old one or the new one."""
    temporary = state_dir / f"{STATE_FILE}.new"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    temporary.replace(state_dir / STATE_FILE)


def load(state_dir: Path) -> TestbedState | None:
    """Read the state file; None if there is none. Raises CorruptData."""
    try:
        data = (state_dir / STATE_FILE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(data, type=TestbedState)
    except msgspec.MsgspecError as error:
        raise CorruptData(
            f"{state_dir / STATE_FILE} is damaged: {error}", try_="end its processes by hand and remove the folder"
        ) from None


def down_command(state_dir: Path) -> str:
    """The command that ends the testbed of a folder, whatever its site."""
    return shlex.join(["edgelam", "testbed", "down", "--state", str(state_dir)])


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Hold the testbed folder, which is made if need be; raise Refused if somebody else does."""
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(
                f"a testbed is up in {state_dir}", try_=f"{down_command(state_dir)}, or another folder"
            ) from None
        try:
            same = os.fstat(descriptor).st_ino == path.stat().st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its last owner removed it between our two steps
    try:
        yield
    finally:
        os.close(descriptor)


def checked_folder(state_dir: Path) -> Path:
    """Give the folder back if it is new, empty, or a testbed's; raise UsageError otherwise: `down` empties it."""
    own = {STATE_FILE, f"{STATE_FILE}.new", LOCK_FILE, *FOLDERS}
    try:
        strangers = sorted(entry.name for entry in state_dir.iterdir() if entry.name not in own)
    except FileNotFoundError:
        return state_dir
    except NotADirectoryError:
        strangers = [state_dir.name]
    if strangers:
        raise UsageError(
            f"{state_dir} is no testbed folder: it holds {strangers[0]}", try_="name a new or empty folder"
        )
    return state_dir


def clear(state_dir: Path) -> bool:
    """End and remove what a testbed left; False if there was nothing. Call with the lock held; it stays.

    Raises CorruptData for a damaged state file, Refused if a process survives SIGKILL.
    """
    state = load(state_dir)
    if state is not None:
        if state.machine_boot == machine_boot():
            sweep(state.marker, (state.keeper, *(board.process for board in state.boards)))
        for group in state.groups:
            remove_group(Path(group))
    remove_files(state_dir)
    return state is not None


def remove_files(state_dir: Path) -> None:
    """Remove all that a testbed writes into its folder, but the lock."""
    for folder in FOLDERS:
        shutil.rmtree(state_dir / folder, ignore_errors=True)
    for name in (STATE_FILE, f"{STATE_FILE}.new"):
        (state_dir / name).unlink(missing_ok=True)


def remove_folder(state_dir: Path) -> None:
    """Remove the lock, and the folder if nothing is left in it. Call last, with the lock held."""
    (state_dir / LOCK_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        state_dir.rmdir()
