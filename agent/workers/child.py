"""The life of a worker process: it ends when its supervisor does, and says what it does line by line.

stdout is taken for status lines and nothing else: what libraries print goes to stderr, whose last lines the supervisor
shows when the worker dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from msgspec import Struct

from agent.workers.pipe import MAX_LINE_BYTES, line_of, read_line

PR_SET_PDEATHSIG: Final = 1
READ_BYTES: Final = 65_536
OOM_SCORE: Final = 500
"""The kernel takes a worker before the supervisor: it can be started again, and the supervisor says what happened."""

LAST_WORD_S: Final = 5.0
"""After the supervisor is gone, a worker that is still inside a step is ended after this."""

S = TypeVar("S", bound=Struct)


class Parent:
    """The supervisor, seen from a worker."""

    def __init__(self, source: int, sink: BinaryIO) -> None:
        self._source = source
        self._read = b""
        self._sink = sink
        self._told: deque[bytes] = deque()
        self._mutex = threading.Lock()
        self.gone = False
        """The supervisor closed our input, or vanished."""

    def first(self, kind: type[S]) -> S:
        """Read the assignment; exit if there is none."""
        line = self._line()
        if not line.endswith(b"\n"):
            raise SystemExit(0)
        return read_line(line, kind)

    def listen(self, wake: Callable[[], None]) -> None:
        """Read what else is told in a thread, and `wake` at each line and at the end."""
        threading.Thread(target=self._listen, args=(wake,), name="stdin", daemon=True).start()

    def told(self, kind: type[S]) -> list[S]:
        """What was told since the last call."""
        found = []
        while self._told:
            found.append(read_line(self._told.popleft(), kind))
        return found

    def say(self, message: Struct) -> None:
        """Write one line; a supervisor that does not listen any more is gone."""
        try:
            with self._mutex:
                self._sink.write(line_of(message))
                self._sink.flush()
        except OSError:
            self.gone = True

    def _line(self) -> bytes:
        """The next line; without its end when there is no more, or no end in sight.

        Read from the descriptor itself: a thread that waits inside sys.stdin would hold its lock at exit.
        """
        while b"\n" not in self._read and len(self._read) < MAX_LINE_BYTES:
            piece = os.read(self._source, READ_BYTES)
            if not piece:
                break
            self._read += piece
        line, end, self._read = self._read.partition(b"\n")
        return line + end

    def _listen(self, wake: Callable[[], None]) -> None:
        while (line := self._line()).endswith(b"\n"):
            self._told.append(line)
            wake()
        self.gone = True
        wake()
        threading.Event().wait(LAST_WORD_S)
        os._exit(0)


def become_worker() -> Parent:
    """Tie this process to its supervisor and give the line to it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C in a terminal is the supervisor's to handle; it then closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # A sandbox may forbid it; the kernel then takes whom it takes.
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Parent(0, sink)
