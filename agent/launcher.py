"""Starts worker processes and carries lines to and from them.

Workers get a session of their own, so that Ctrl-C reaches only the supervisor, and die with it (agent.workers.child).
Two threads per worker read its pipes; what they read waits in `drain` for the supervisor's thread, which is woken.
Workers are started from the supervisor's main thread only: the kernel ties them to the thread that started them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Final, Protocol

from msgspec import Struct

from agent.telemetry import processor_s_of
from agent.workers.deaths import oom_kills, words_for
from agent.workers.pipe import MAX_LINE_BYTES

LOG = logging.getLogger("edgelam.launcher")

STDERR_LINES: Final = 20
POLITE_S: Final = 5.0
"""A worker that does not end by itself after its input was closed is killed after this."""

LEAN: Final = "agent.workers.lean"
"""What starts each worker."""


class Line(Struct, frozen=True):
    """A worker said something."""

    worker: int
    text: bytes


class Ended(Struct, frozen=True):
    """A worker is gone; `asked` = because it was told to."""

    worker: int
    asked: bool
    words: str


class Launcher(Protocol):
    """Workers are known by number; numbers are never used twice."""

    def launch(self, module: str, first: bytes, threads: int) -> int: ...

    def tell(self, worker: int, line: bytes) -> None: ...

    def end(self, worker: int) -> None:
        """Close the worker's input; kill it if it is still there after POLITE_S (at a later `tick`)."""

    def kill(self, worker: int) -> None:
        """End it at once; `drain` reports it as one that was not asked to."""

    def processor_s(self, worker: int) -> float:
        """Processor time that it has used so far; 0 for one that is gone."""

    def tick(self, now_s: float) -> None: ...

    def drain(self) -> list[Line | Ended]: ...

    @property
    def pids(self) -> tuple[int, ...]: ...


class _Child:
    def __init__(self, process: subprocess.Popen[bytes], kills: int | None) -> None:
        self.process = process
        self.kills_before = kills
        self.tail: deque[str] = deque(maxlen=STDERR_LINES)
        self.ending_since_s = 0.0
        self.asked = False


class ProcessLauncher:
    """The real one."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._children: dict[int, _Child] = {}
        self._events: deque[Line | Ended] = deque()
        self._next = 1

    def launch(self, module: str, first: bytes, threads: int) -> int:
        """Start `python -m module` and write `first` to it. Raise OSError if it can't be started."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(threads)
        command = [sys.executable, "-m", LEAN, module]
        kills = oom_kills()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        number, self._next = self._next, self._next + 1
        child = self._children[number] = _Child(process, kills)
        threading.Thread(target=self._read, args=(number, child, first), name=f"worker-{number}", daemon=True).start()
        return number

    def tell(self, worker: int, line: bytes) -> None:
        """Write a short line; a worker that is gone is reported by `drain`, not here."""
        child = self._children.get(worker)
        if child is not None and child.process.stdin is not None and not child.asked:
            with contextlib.suppress(OSError):
                child.process.stdin.write(line)
                child.process.stdin.flush()

    def end(self, worker: int) -> None:
        child = self._children.get(worker)
        if child is None or child.asked:
            return
        child.asked = True
        child.ending_since_s = time.monotonic()
        if child.process.stdin is not None:
            with contextlib.suppress(OSError):
                child.process.stdin.close()

    def tick(self, now_s: float) -> None:
        for child in self._children.values():
            if child.asked and now_s - child.ending_since_s > POLITE_S:
                child.ending_since_s = now_s
                _kill(child)

    def kill(self, worker: int) -> None:
        child = self._children.get(worker)
        if child is not None:
            _kill(child)

    def processor_s(self, worker: int) -> float:
        child = self._children.get(worker)
        return processor_s_of(child.process.pid) if child is not None else 0.0

    def drain(self) -> list[Line | Ended]:
        found = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Ended):
                self._children.pop(event.worker, None)
            found.append(event)
        return found

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.process.pid for child in list(self._children.values()))

    # The threads.

    def _read(self, number: int, child: _Child, first: bytes) -> None:
        """Write the assignment, read lines until the worker closes its output, and reap it."""
        process = child.process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        errors = threading.Thread(target=_read_errors, args=(process.stderr, child.tail), daemon=True)
        errors.start()
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed by `end` meanwhile
            process.stdin.write(first)
            process.stdin.flush()
        while line := process.stdout.readline(MAX_LINE_BYTES):
            if line.endswith(b"\n"):
                self._events.append(Line(number, line))
                self._wake()
        process.stdout.close()
        code = process.wait()
        errors.join(1.0)
        with contextlib.suppress(OSError):
            process.stdin.close()
        words = words_for(code, list(child.tail), child.kills_before, oom_kills())
        self._events.append(Ended(number, child.asked, words))
        self._wake()


def _kill(child: _Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)


def _read_errors(source: IO[bytes], tail: deque[str]) -> None:
    while line := source.readline(4096):
        text = line.decode(errors="replace").rstrip()
        tail.append(text[:400])
        LOG.debug("worker: %s", text)
    source.close()
