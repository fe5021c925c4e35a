"""Measuring emulated boards: their machine is measured, once for all of them, and each board stretches what was found.

Boards of equal speed must come out equal, or a plan for them is not even. The processor of a machine that is itself a
part of a larger one is up to half as fast again for seconds or minutes (the same step of six blocks: 122 or 166 ms, a
minute apart), so boards that each measured it, one after the other, were taken to be that unequal. And a step that need
not be stretched while it is measured leaves time for several rounds of all steps, of which the least disturbed counts.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.records import write_atomically
from agent.workers.pipe import MeasureTask
from agent.workers.stretch import OnPaper, Stretch
from hwprofiles import conditions
from hwprofiles.profile import ModuleMeasurement, sets_speed

LOG = logging.getLogger("edgelam.measuring")

ROUNDS: Final = 3
"""Over all steps of a module; of each step the quickest run counts."""

MAX_BYTES: Final = 1 << 20
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


def is_emulated(task: MeasureTask) -> bool:
    """Whether the board is a part of the machine that is measured."""
    return task.speed < 1.0 or bool(task.throttle_path or task.shared_folder)


def rounds_of(task: MeasureTask) -> int:
    """How often all steps of a module are gone through."""
    return ROUNDS if is_emulated(task) else 1


def timer_of(task: MeasureTask) -> OnPaper | Stretch:
    """What times steps: of a real board the clock and nothing else."""
    return OnPaper(task.threads) if is_emulated(task) else Stretch(1.0, task.threads)


class Machine(Struct, frozen=True, kw_only=True):
    """What may not have changed since, or it is measured again."""

    boot: str
    threads: int
    sets_speed: dict[str, str]
    """As a profile has it (hwprofiles.profile.sets_speed)."""


class Found(Struct, frozen=True, kw_only=True):
    """A module as the machine runs it, and what its engine said it was."""

    machine: Machine
    measured_at_s: float
    """By the machine's monotonic clock."""
    module: ModuleMeasurement
    engine_name: str


def machine(threads: int) -> Machine:
    """The one that this process runs on."""
    return Machine(
        boot=BOOT.read_text(encoding="ascii").strip(),
        threads=threads,
        sets_speed={what: str(value) for what, value in sets_speed(conditions.snapshot())},
    )


def on_board(module: ModuleMeasurement, speed: float) -> ModuleMeasurement:
    """What a board of this share of the machine's speed takes."""
    return msgspec.structs.replace(
        module,
        timings=tuple(
            msgspec.structs.replace(
                timing,
                samples=msgspec.structs.replace(
                    timing.samples, samples_s=tuple(seconds / speed for seconds in timing.samples.samples_s)
                ),
            )
            for timing in module.timings
        ),
    )


class Shared:
    """A folder of what was found. Only who holds the turn (agent.workers.measuring) may use it."""

    def __init__(self, folder: Path, here: Machine) -> None:
        self._folder, self._here = folder, here

    def find(self, key: str, engine: str, since_s: float = 0.0) -> Found | None:
        """What another board of this machine found since then; None if there is nothing that still holds."""
        path = self._path(key, engine)
        try:
            with path.open("rb") as file:
                found = msgspec.json.decode(file.read(MAX_BYTES), type=Found)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            LOG.warning("%s: %s; measured again", path, error)
            return None
        holds = (found.machine, found.module.key, found.module.engine) == (self._here, key, engine)
        return found if holds and found.measured_at_s >= since_s else None

    def keep(self, module: ModuleMeasurement, engine_name: str) -> None:
        """For the others, but for what is unsteady: the next one may be luckier. That it can't be kept costs them the
        time to measure it."""
        if not all(timing.samples.valid for timing in module.timings):
            return
        now_s = time.monotonic()
        found = Found(machine=self._here, measured_at_s=now_s, module=module, engine_name=engine_name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(module.key, module.engine), msgspec.json.encode(found))
        except OSError as error:
            LOG.warning("%s: %s", self._folder, error)

    def _path(self, key: str, engine: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{engine} {key}'.encode()).hexdigest()[:32]}.json"
