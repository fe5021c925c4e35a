"""What is measured in one go: commands that wait for it, modules, an engine, and what comes out. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from msgspec import Struct

from agent.pairs import PairAsk
from agent.workers.pipe import Measured
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, PairMeasurement, Snapshot
from hwprofiles.reading import Absent, Failed
from hwprofiles.samples import Sustained
from models.engine.names import PROCESSOR, STANDARD
from wire.messages import ArtifactRef, Command, EngineName, KitModule

NOTHING: Final = Measured(
    modules=(), failed={}, link=Absent("not measured yet"), engines_loaded={}, allow_spinning=False
)
"""What a worker found that did not live to say it."""


class Subject(Struct, frozen=True, kw_only=True):
    """Whose measure is taken."""

    site: str
    device: str
    threads: int
    speed: float
    throttle_path: str = ""
    shared_folder: str = ""
    """As in a measuring task."""
    emulation: str
    budget_s: float
    profile_path: Path
    engines: tuple[EngineName, ...] | None = None
    """To measure with besides the processor; None: those for a GPU that are there."""
    engines_path: str = ""
    cache_folder: str = ""
    """On the disk that is measured; '' = none is."""


class Asked(NamedTuple):
    """A command that waits for a measurement: 'measure' (the whole kit), 'probe-link', 'sustain' (steps without a
    pause, for minutes), 'probe-ways' (round trips to the brokers of boards, `urls`), or 'probe-pair' (one end of the
    way between two boards). `command` is None where nobody waits for a reply."""

    verb: str
    command: Command | None
    urls: tuple[str, ...] = ()
    sustained_s: float = 0.0
    """With 'sustain': how long the board is put under load."""
    pair: PairAsk | None = None


class Outcome(NamedTuple):
    """A job is over. `asked` are the commands that waited for it; `link` is what this job found of it; `error` is '' if
    something was measured."""

    asked: tuple[Asked, ...]
    measured: tuple[str, ...]
    failed: Mapping[str, str]
    link: LinkMeasurement | Absent | Failed
    error: str
    ways: Mapping[str, float] = {}
    ways_failed: Mapping[str, str] = {}
    pair: PairMeasurement | Absent | Failed | None = None
    sustained: Sustained | Absent | Failed = NOTHING.sustained


class Job:
    """One job, from when it is due until its worker has ended."""

    def __init__(self, modules: tuple[KitModule, ...], link: bool, board: bool, asked: tuple[Asked, ...]) -> None:
        self.modules = modules
        self.link = link
        self.board = board
        """Ceilings and disk, and temperature meanwhile."""
        self.asked = asked
        self.engine: EngineName = PROCESSOR
        self.sustained_s = max((one.sustained_s for one in asked), default=0.0)
        """Above 0: this job is nothing else."""
        self.ways = tuple(dict.fromkeys(url for one in asked for url in one.urls))
        self.pair = asked[0].pair if asked else None
        self.failed: dict[str, str] = {}
        self.worker = 0
        self.launched_s = 0.0
        self.before: Snapshot | None = None
        self.disturbed = False
        self.parts: list[ModuleMeasurement] = []
        """What the worker has said before it said all."""
        self.result: Measured | None = None

    def graphs_of(self, module: KitModule) -> list[ArtifactRef]:
        """What must be here to measure a module with the job's engine."""
        standard = module.standard if self.engine in STANDARD else ()
        return [ref for _, ref in (*module.graphs, *standard)]

    @property
    def wanted_files(self) -> dict[str, ArtifactRef]:
        """Graphs of all its modules, by digest."""
        return {ref.digest: ref for module in self.modules for ref in self.graphs_of(module)}


def together(asked: list[Asked]) -> tuple[tuple[Asked, ...], list[Asked]]:
    """What one job does, and what the next ones do: a sustained load and a pair go with nothing else."""
    first = next((one for one in asked if one.pair is not None), asked[0])
    if first.pair is not None:  # the other end waits, and nothing else may use the link
        return (first,), [one for one in asked if one is not first]
    if first.sustained_s:
        return (first,), asked[1:]
    return tuple(one for one in asked if not one.sustained_s), [one for one in asked if one.sustained_s]
