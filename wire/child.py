"""A child process that never outlives us, and the file its words go to.

A small shell holds the child and reads a pipe of which we hold the other end: when we are gone, however that happened,
the pipe ends and the shell ends the child. PR_SET_PDEATHSIG would not do: the kernel clears it when mosquitto, started
as root, changes its user, it fires when the starting *thread* ends, and setting it needs preexec_fn, which is unsafe
beside threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

_KEEPER: Final = """
exec 3<&0 </dev/null
"$@" 3<&- &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
{
    read -r _ <&3
    kill -TERM "$child"
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        sleep 0.1
        kill -0 "$child" || exit
    done
    kill -KILL "$child"
} >/dev/null 2>&1 &
watcher=$!
exec 3<&-
while :; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break
done
kill -TERM "$watcher" 2>/dev/null
exit "$status"
"""

STOP_TIMEOUT_S: Final = 5.0
"""Grace before a kill: mosquitto writes its database when it is told to end."""

MAX_LOG_BYTES: Final = 1_048_576
"""A log file that is larger than this when the child starts is begun anew; the old one is kept as `.1`."""


class Child:
    """One running child process in a group of its own, with stdout and stderr appended to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start `command`; raises OSError if the shell or the log can't be opened."""
        self.log = log
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(log.suffix + ".1"))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "keeper", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + n after signal n, as shells say it, or -n if the shell got it as well."""
        return self._process.poll()

    def listens(self, port: int) -> bool | None:
        """Whether one of its processes listens on this TCP port; None where the system does not let us look."""
        hidden = False
        for process in self._members():
            try:
                connections = process.net_connections("tcp")
            except psutil.AccessDenied:  # root in a container may not look into a process that changed its user
                hidden = True
                continue
            except (psutil.Error, OSError):
                continue
            if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections):
                return True
        return None if hidden else False

    def _members(self) -> Iterator[psutil.Process]:
        for pid in psutil.pids():
            try:
                if os.getpgid(pid) == self._process.pid:
                    yield psutil.Process(pid)
            except (psutil.Error, OSError):
                continue

    def last_words(self) -> str:
        """The last line of the log, '' if there is none."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 2048))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def stop(self) -> None:
        """End the whole group, with a kill if it does not end in time, and wait for it."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        until_s = time.monotonic() + STOP_TIMEOUT_S
        while self._signal(signal.SIGKILL) and time.monotonic() < until_s:
            time.sleep(0.01)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> bool:
        """Signal the group; give whether any of it is left."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True
