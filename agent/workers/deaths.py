"""Why a worker died, in words: by signal, by exit code, or by the kernel for want of memory."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

TAIL_LINES = 3


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed for want of memory, control groups counted; None if unknown."""
    try:
        text = (root / "proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return None


def words_for(code: int, stderr_tail: Sequence[str], kills_before: int | None, kills_after: int | None) -> str:
    """Give one line about a process that ended with `code` (negative: by that signal)."""
    tail = " | ".join(line.strip() for line in stderr_tail[-TAIL_LINES:] if line.strip())
    said = f"; it said: {tail}" if tail else ""
    if code >= 0:
        return f"ended with exit code {code}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    starved = kills_before is not None and kills_after is not None and kills_after > kills_before
    if -code == signal.SIGKILL and starved:
        return "killed by the kernel: out of memory"
    return f"killed by {name}{said}"
