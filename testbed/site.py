"""A whole site on this machine: coordinator, broker and virtual boards, for demo, tests and benchmarks.

The coordinator runs as the real program (`python -m coordinator.cli up`) in a process group of its own and dies with
us. What it needs to be found by is read from the file it writes, as its own clients do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.processes import start_child
from wire.errors import EdgelamError, Unreachable

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


class CoordinatorProcess:
    """`edgelam up` as a child: `start`, `stop`, `kill`; its log is in `<state>/coordinator.log`."""

    def __init__(
        self, state: Path, site: str, arguments: Sequence[str] = (), environment: Mapping[str, str] = {}
    ) -> None:
        self.state = state
        self.site = site
        self.log = state / "coordinator.log"
        self._arguments = [sys.executable, "-m", "coordinator.cli", "up", "--site", site, *arguments]
        self._environment = {**os.environ, "EDGELAM_STATE": str(state), **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Start it and wait until it is reachable; give its address file. Raise Unreachable with the log's end."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "coordinator.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = start_child(self._arguments, log, self._environment)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            address = self.address()
            if address is not None and address["pid"] == self.process.pid:
                return address
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise Unreachable(f"the coordinator did not start:\n{self.log_end()}", try_=f"the log is {self.log}")

    def address(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.state / "coordinator.json").read_text())
        except (OSError, ValueError):
            return None
        return found

    def log_end(self, lines: int = 8) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def stop(self) -> None:
        """End it in order; after STOP_TIMEOUT_S by force."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def until(condition: Callable[[], bool], timeout_s: float, what: str, period_s: float = 0.1) -> None:
    """Wait for a condition; raise EdgelamError naming `what` when time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise EdgelamError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(period_s)


def remove_tree(path: Path) -> None:
    """Remove a folder of ours with all in it; a missing one is fine."""
    shutil.rmtree(path, ignore_errors=True)
