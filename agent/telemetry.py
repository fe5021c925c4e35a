"""The heartbeat: processor time and memory of the agent and its workers, as the kernel counts them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from wire.messages import StageCounters, Telemetry


class Pulse:
    """Makes one heartbeat after the other."""

    def __init__(self, boot: str, memory_bytes: int, root: Path = Path("/")) -> None:
        self._boot = boot
        self._memory_bytes = memory_bytes
        self._proc = root / "proc"
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._seq = 0
        self._before: dict[int, float] = {}
        self._before_s = 0.0

    def beat(
        self, now_s: float, pids: Iterable[int], temperature_c: float | None, stages: tuple[StageCounters, ...]
    ) -> Telemetry:
        """Give the heartbeat; `cpu_fraction` is over the time since the one before."""
        processor_s = {pid: processor_s_of(pid, self._proc) for pid in pids}
        used_s = sum(max(0.0, now - self._before.get(pid, now)) for pid, now in processor_s.items())
        elapsed_s = now_s - self._before_s
        fraction = used_s / elapsed_s if self._before and elapsed_s > 0 else 0.0
        self._before, self._before_s = processor_s, now_s
        self._seq += 1
        return Telemetry(
            seq=self._seq,
            boot=self._boot,
            mono_s=now_s,
            cpu_fraction=min(fraction, 4096.0),
            memory_used_bytes=sum(self._resident_bytes(pid) for pid in processor_s),
            memory_bytes=self._memory_bytes,
            temperature_c=temperature_c,
            stages=stages[:64],
        )

    def _resident_bytes(self, pid: int) -> int:
        try:
            text = (self._proc / str(pid) / "statm").read_text(encoding="ascii")
            return int(text.split()[1]) * self._page_bytes
        except (OSError, ValueError, IndexError):
            return 0


def processor_s_of(pid: int, proc: Path = Path("/proc")) -> float:
    """User and system time of a process; 0 for one that is gone."""
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        fields = text[text.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
