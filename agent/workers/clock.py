"""The two clocks of a step, as one argument: time that passed, and time that this thread computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple


class Clocks(NamedTuple):
    wall_s: Callable[[], float] = time.perf_counter
    processor_s: Callable[[], float] = time.thread_time


REAL: Final = Clocks()
