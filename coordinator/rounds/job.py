"""What a user wants trained, as a TOML file says it (coordinator.rounds.jobfile).

    model = "smollm2"
    data = "notes"          # name of a data set in the settings of the boards

    [adapter]
    rank = 8

    [rounds]
    count = 20

docs/tuning.md lists all keys with what they stand for when they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from coordinator.rounds.schedule import Penalty
from models.lora.aggregate import Middle, Rule
from models.privacy.plan import most_drawn
from wire.factors import Begins
from wire.limits import MAX_ADAPTER_RANK, MAX_LABELS, MAX_MODALITIES, MAX_OBJECTIVES, MAX_PROMPT_TOKENS, MAX_WIDTH
from wire.messages import Label, Matrix
from wire.modalities import Module, Purpose, Temperature
from wire.privacy import Privacy
from wire.samples import Images, Series

COUNTED: Final = ("random", "round-robin", "fastest")
"""Of `who`: so many as `devices` says."""
SPLIT: Final = ("split", "pipeline", "looped")
"""Modes in which boards with data have the ends of a model alone."""
ONE_SET: Final = ("fedavg", "ffa", "rolora")
"""Rules that say which factors are trained, where there is one set of them."""
SUMS: Final = (*ONE_SET, "fedsa")
"""Rules that need the mean of updates alone."""
BEGINS: Final[Mapping[str, Begins]] = {"fedsa": "own-b", "stack": "fresh"}
"""With what devices begin a round, by these rules."""
SERIES: Final = "series"
"""The model of windows of readings, made of the job's seed (models.training.kernels): there is no file of it."""
MOST_NAME: Final = 27
"""Letters: 'tune-' goes before it in topics, which have 32."""

Who = Literal["all", "random", "round-robin", "fastest", "scheduled"]


class Adapter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """None: twice the rank."""
    matrices: Annotated[tuple[Matrix, ...], Meta(min_length=1, max_length=7)] = ("q", "v")
    blocks: Literal["all", "last"] = "all"
    """Which of the model's have factors."""
    ranks: dict[str, Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]] = {}
    """Device -> its own rank, at most `rank`: it is sent and trains so many of the first; with 'stack' so many anew."""
    most_rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)] = 64
    """With 'stack', of all that has been learnt, which gets the ranks of all devices in each round; what is beyond is
    left out as well as can be."""

    @property
    def scale_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def rank_of(self, device: str) -> int:
        return self.ranks.get(device, self.rank)


class Rounds(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Annotated[int, Meta(ge=1, le=100_000)] = 10
    steps: Annotated[int, Meta(ge=1, le=100_000)] = 8
    """Of each device in a round."""
    batch_rows: Annotated[int, Meta(ge=1, le=4096)] = 4
    rows_at_once: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Of these, whose gradients are made at one time; None: all, or as many as a board has the memory for."""
    row_tokens: Annotated[int, Meta(ge=2, le=MAX_PROMPT_TOKENS)] = 128
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 5e-4
    most_norm: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Of a step's gradient."""
    aggregation: Rule = "fedavg"
    middle: Middle = "mean"
    """What stands for the elements of all devices, with rules for one rank."""
    most_change: Annotated[float, Meta(ge=1, le=1e6)] | None = None
    """An update that has changed more than so many times the median of all is shortened to that."""
    who: Who = "all"
    devices: Annotated[int, Meta(ge=1, le=256)] = 1
    """In a round, with who = 'random', 'round-robin' or 'fastest'."""
    delay_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """What a round is to take in the long run, with who = 'scheduled'."""
    tradeoff: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """coordinator.rounds.schedule.Knobs; None: 30 times the delay."""
    penalty: Penalty = "quadratic"
    least_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Of rounds that each device takes part in, in the long run."""
    medium: Literal["own", "shared"] = "own"
    """'shared': all boards send over one channel, as on Wi-Fi, and each is told how fast it may."""
    airtime: Literal["planned", "equal"] = "planned"
    """How a shared medium is divided."""
    at_least: Annotated[int, Meta(ge=1, le=256)] = 1
    """Updates without which a round does not count."""
    timeout_s: Annotated[float, Meta(ge=1, le=1e6)] = 600.0
    """After which a round goes on without those who are missing."""
    held_out: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of each device's samples on which the loss is judged, and that is never trained on."""


class Modality(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several kinds of samples of a job: series or images."""

    data: str
    """Name of a data set; boards that have it own the modality."""
    model: str = ""
    """That makes features of pictures."""
    series: Series | None = None
    images: Images | None = None


class Space(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That connectors of several modalities map into."""

    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 64
    anchors: str = ""
    """A sentence encoder: what it makes of the labels' words is where a contrastive objective draws samples."""
    temperature: Temperature = 0.1
    """Of a contrastive objective: cosines are divided by it."""


class Planned(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What some modules are trained for, by whom and when; modules that nothing is planned for stay as they are."""

    modules: Annotated[tuple[Module, ...], Meta(min_length=1, max_length=MAX_MODALITIES + 1)]
    objective: Purpose = "task"
    devices: tuple[str, ...] = ()
    """None: all that have the module."""
    every: Annotated[int, Meta(ge=1, le=100_000)] = 1
    """Rounds, from `first` on."""
    first: Annotated[int, Meta(ge=0, le=100_000)] = 0
    last: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    """None: to the end."""

    def at(self, number: int) -> bool:
        """Whether it is for a round."""
        behind = number - self.first
        return behind >= 0 and behind % self.every == 0 and (self.last is None or number <= self.last)


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    model: str = ""
    """'' with modalities alone, as `data`."""
    data: str = ""
    mode: Literal["federated", "split", "pipeline", "looped", "auto"] = "federated"
    """'split': boards with data have the ends of the model, and one board all blocks, or as few as can hold them;
    'pipeline': as many boards as make a step fast, two at least; 'looped': one block at every depth, whose
    heads and columns are divided among several boards; 'auto': what coordinator.rounds.modes says."""
    trunk: str | tuple[str, ...] = ()
    """Of a split model: the board that has the blocks, or those among which they are divided, in this order; none:
    those that multiply fastest."""
    train: Literal["factors", "blocks"] = "factors"
    """'blocks': all weights of all blocks instead of factors beside some, of a sentence encoder."""
    uplink_grad: Literal["cut", "lowrank"] = "cut"
    """What boards with the ends of a split model send back: the gradient by features, or those by the last matrix's
    factors, which are shorter (models.training.lowrank)."""
    labels: Annotated[tuple[Label, ...], Meta(max_length=MAX_LABELS)] = ()
    """Which of these a text has is learnt, by a sentence encoder; none: to say the text, by a language model."""
    precision: Literal["int4", "int8", "f32"] = "int4"
    """Of a language model's frozen weights; an encoder's are f32."""
    devices: tuple[str, ...] = ()
    """None: all that have the data."""
    bad_rows: Literal["leave-out", "refuse"] = "leave-out"
    """What becomes of rows that are no samples; or of the board that has one."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    adapter: Adapter = Adapter()
    rounds: Rounds = Rounds()
    privacy: Privacy | None = None
    secure: bool = False
    """Whether boards mask their updates, so that of each round their sum alone is learnt."""
    series: Series | None = None
    """Samples are windows of readings, of which the task module alone learns the labels."""
    images: Images | None = None
    """Samples are pictures, of whose features the task module alone learns the labels."""
    modalities: dict[str, Modality] = {}
    """Samples are of several kinds, whose features connectors map into one space; each board trains those of the kinds
    that it has."""
    space: Space = Space()
    plan: Annotated[tuple[Planned, ...], Meta(max_length=MAX_OBJECTIVES)] = ()
    """None: all modules for their task, in all rounds."""

    @property
    def is_split(self) -> bool:
        return self.mode in SPLIT

    @property
    def step_rows(self) -> int:
        """Most samples of a board's step: private ones are drawn by chance."""
        by_chance = self.privacy is not None and self.is_split
        return most_drawn(self.rounds.batch_rows) if by_chance else self.rounds.batch_rows

    @property
    def trunks(self) -> tuple[str, ...]:
        return tuple(name for name in ((self.trunk,) if isinstance(self.trunk, str) else self.trunk) if name)

    @property
    def begins(self) -> Begins:
        """With what devices begin a round."""
        return BEGINS.get(self.rounds.aggregation, "shared")

    @property
    def on_features(self) -> bool:
        """Whether samples are features that nobody trains: a task module is trained, and connectors to it, if any."""
        return self.series is not None or self.images is not None or bool(self.modalities)

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Of which boards that take part have at least one."""
        return tuple(one.data for one in self.modalities.values()) or (self.data,)

    @property
    def trains(self) -> str:
        """The model, for people."""
        return self.model or f"connectors of {', '.join(self.modalities)}"


def with_models(job: Job, named: Callable[[str], str]) -> Job:
    """The same with other names of its models."""
    modalities = {
        name: msgspec.structs.replace(one, model=named(one.model)) if one.model else one
        for name, one in job.modalities.items()
    }
    model = named(job.model) if job.model else ""
    anchors = named(job.space.anchors) if job.space.anchors else ""
    space = msgspec.structs.replace(job.space, anchors=anchors)
    return msgspec.structs.replace(job, model=model, modalities=modalities, space=space)
