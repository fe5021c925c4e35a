"""What supervisor and workers say to each other: JSON lines, one struct each, over the worker's stdin and stdout.

The first line to a worker is its assignment. End of input means that the supervisor is gone: the worker ends.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from hwprofiles.profile import NOT_ASKED, LinkMeasurement, ModuleMeasurement, PairMeasurement, PairWay
from hwprofiles.reading import Absent, Failed
from hwprofiles.samples import Ceilings, Codings, Course, DiskMeasurement, EnergyMeasurement, Sustained
from wire.messages import EngineName, KitModule, StageCounters, StageOrder

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""Longest line either side reads: an order of 4096 weight files with long paths, or a profile with all samples."""

S = TypeVar("S", bound=Struct)


class BrokerLogin(Struct, frozen=True, kw_only=True):
    """How a worker reaches the broker with a connection of its own."""

    url: str
    client_id: str
    username: str = ""
    password: str = ""


class DataBrokerAt(Struct, frozen=True, kw_only=True):
    """The broker of this board: where plans say that it is, and where it is for us."""

    address: str
    url: str


class Assignment(Struct, frozen=True, kw_only=True):
    """To an inference worker: hold this stage. Paths belong to `order.graph` and `order.weights`, in order."""

    device: str
    site: str
    order: StageOrder
    graph_path: str
    weight_paths: tuple[str, ...]
    standard_graph_path: str = ""
    """Belongs to `order.standard_graph`; '' if it has none."""
    tokenizer_path: str = ""
    data_path: str = ""
    """Belong to `order.training`."""
    data_paths: dict[str, str] = {}
    """By modality, where it names several."""
    state_path: str = ""
    """Folder of what this board remembers: in `privacy/` what it told of its data, in `adapters/` its own factors."""
    most_epsilon: float | None = None
    """Of the data set, as the board's owner wants it."""
    engines_path: str = ""
    """Folder of engines that were built on this board."""
    gpu: bool = False
    """Whether a worker that trains may use one."""
    crashed: dict[str, str] = {}
    """Engines with which a worker of this stage died while it loaded, and how: they are not tried again."""
    login: BrokerLogin
    data_broker: DataBrokerAt | None = None
    threads: int
    speed: float
    throttle_path: str = ""
    """Emulated: where it is said which share of `speed` there is now."""
    memory_limit_bytes: int = 0
    """Emulated memory that the stage must fit in; 0 = none."""


class Tell(Struct, frozen=True, kw_only=True):
    """To a running inference worker."""

    adopt: StageOrder | None = None
    """New epoch, inbox or neighbours for what is loaded; weights and config are left out."""
    data_broker: DataBrokerAt | None = None
    """Goes with `adopt`: the board's own broker as it is now."""
    stop: bool = False


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From an inference worker: at each change, and each second once it is loaded."""

    phase: Literal["loading", "ready", "failed"]
    epoch: int
    detail: str = ""
    engine: str = ""
    fell_back: str = ""
    """Why it is not the engine that was ordered."""
    trying: EngineName | Literal[""] = ""
    """While loading: the engine that is tried. If this is the last word, that is what it died of."""
    held_bytes: int = 0
    resident_bytes: int = 0
    counters: StageCounters | None = None
    answered: bool = False
    """A request has just ended: whoever made it waits for the counters."""
    final: bool = False
    """Failed in a way that starting again would not cure."""


class MeasureModule(Struct, frozen=True, kw_only=True):
    module: KitModule
    graph_paths: tuple[tuple[int, str], ...]
    """(number of blocks stacked, file)."""
    standard_paths: tuple[tuple[int, str], ...] = ()
    """The same in standard operators, for engines that read no others."""


class PairTask(Struct, frozen=True, kw_only=True):
    """One end of the measurement of a pair. With equal logins one connection serves both ways."""

    peer: str
    measure: bool
    """Else: answer the other board, which does."""
    way: PairWay
    token: int
    inward: BrokerLogin
    outward: BrokerLogin


class MeasureTask(Struct, frozen=True, kw_only=True):
    """To a measuring worker: time these, then the link, then end."""

    device: str
    site: str
    modules: tuple[MeasureModule, ...]
    login: BrokerLogin | None
    """None = leave the link alone."""
    ways: tuple[tuple[str, BrokerLogin], ...] = ()
    """Brokers of boards to whom round trips are timed, each under the name that the asker has for it."""
    pair: PairTask | None = None
    threads: int
    speed: float
    throttle_path: str = ""
    """As in an assignment."""
    shared_folder: str = ""
    """Where emulated boards of one machine keep for each other what it was measured to be; '' = nowhere."""
    shared_since_s: float = 0.0
    """What they measured before, by the machine's monotonic clock, is not taken: somebody asked for it anew. Whoever is
    asked at the same time still measures once for all."""
    budget_s: float = 0.5
    """Seconds per point."""
    nice: int = 0
    engine: EngineName = "onnxruntime"
    engines_path: str = ""
    """As in an assignment."""
    board: bool = False
    """Also what memory, arithmetic and disk give, and the course of temperature and clocks: of a real board, that is
    to say, since an emulated one has them from the machine that it is emulated on."""
    cache_folder: str = ""
    """On the disk that is measured; '' = none."""
    sustained_s: float = 0.0
    """Above 0: nothing but steps of the first module, for so long."""
    yields: bool = False
    """Stages run on this board: each point waits, a while, until they have nothing to do."""


class Measured(Struct, frozen=True, kw_only=True, tag="measured"):
    """From a measuring worker, the last line: what it got, and per module key why not."""

    modules: tuple[ModuleMeasurement, ...]
    failed: dict[str, str]
    link: LinkMeasurement | Absent | Failed
    engines_loaded: dict[str, str]
    """Engine -> what it said it is, proof that it runs here."""
    allow_spinning: bool
    ways: dict[str, float] = {}
    """Median round trip to each of the brokers asked for, seconds."""
    ways_failed: dict[str, str] = {}
    pair: PairMeasurement | Absent | Failed | None = None
    """None: no pair was asked for. Absent: nothing is known; or the other board was answered, which is as well."""
    ceilings: Ceilings | Absent | Failed = Absent("not asked for")
    disk: DiskMeasurement | Absent | Failed = Absent("not asked for")
    codings: Codings | Absent | Failed = Absent("not asked for")
    course: Course | Absent | Failed = Absent("not asked for")
    energy: EnergyMeasurement | Absent | Failed = Absent("not asked for")
    sustained: Sustained | Absent | Failed = NOT_ASKED


class MeasuredModule(Struct, frozen=True, kw_only=True, tag="module"):
    """From a measuring worker, when it is done with a module: kept even if the worker dies before it is through."""

    module: ModuleMeasurement


class MeasureNote(Struct, frozen=True, kw_only=True, tag="note"):
    """From a measuring worker: how far it is, for people."""

    note: Annotated[str, Meta(max_length=4096)]


def line_of(message: Struct) -> bytes:
    """One line; JSON has no raw newlines."""
    return msgspec.json.encode(message) + b"\n"


def read_line(line: bytes, kind: type[S]) -> S:
    """Parse a line; raise msgspec.ValidationError or DecodeError."""
    return msgspec.json.decode(line, type=kind)
