"""What a user wants trained: a TOML file, checked as a whole, so that all that is wrong with it is said at once.

    model = "smollm2"
    data = "notes"          # name of a data set in the settings of the boards

    [adapter]
    rank = 8

    [rounds]
    count = 20

docs/tuning.md lists all keys with what they stand for when they are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from coordinator.rounds.schedule import Penalty
from models.lora.aggregate import ANY_RANKS, Middle
from models.privacy.accountant import noise_for
from wire.errors import UsageError
from wire.ids import is_name
from wire.limits import (
    LEAST_SUMMED,
    MAX_ADAPTER_RANK,
    MAX_LABELS,
    MAX_PROMPT_TOKENS,
    MAX_SEGMENTS,
    MAX_SPLIT_ROWS,
    MAX_SUMMED,
)
from wire.messages import Label, Matrix, Privacy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COUNTED: Final = ("random", "round-robin", "fastest")
"""Of `who`: so many as `devices` says."""
SPLIT: Final = ("split", "pipeline", "looped")
"""Modes in which boards with data have the ends of a model alone."""
ONE_SET: Final = ("fedavg", "ffa", "rolora")
"""Rules that say which factors are trained, where there is one set of them."""
MAX_FILE_BYTES: Final = 1024 * 1024
MOST_NAME: Final = 27
"""Letters: 'tune-' goes before it in topics, which have 32."""

Who = Literal["all", "random", "round-robin", "fastest", "scheduled"]


class Adapter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """None: twice the rank."""
    matrices: Annotated[tuple[Matrix, ...], Meta(min_length=1, max_length=7)] = ("q", "v")
    ranks: dict[str, Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]] = {}
    """Device -> its own rank, at most `rank`: it is sent and trains so many of the first."""

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
    aggregation: Literal["fedavg", "ffa", "rolora", "pad", "svd"] = "fedavg"
    """models.lora.aggregate."""
    middle: Middle = "mean"
    """What stands for the elements of all devices, with 'fedavg', 'ffa' and 'rolora'."""
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


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    model: str
    data: str
    mode: Literal["federated", "split", "pipeline", "looped", "auto"] = "federated"
    """'split': boards with data have the ends of the model, and one board all blocks, or as few as can hold them;
    'pipeline': as many boards as make a step fast, two at least; 'looped': one block at every depth, whose
    heads and columns are divided among several boards; 'auto': what coordinator.rounds.modes says."""
    trunk: str | tuple[str, ...] = ()
    """Of a split model: the board that has the blocks, or those among which they are divided, in this order; none:
    those that multiply fastest."""
    train: Literal["factors", "blocks"] = "factors"
    """'blocks': all weights of all blocks instead of factors beside some, of a sentence encoder."""
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

    @property
    def is_split(self) -> bool:
        return self.mode in SPLIT

    @property
    def trunks(self) -> tuple[str, ...]:
        return tuple(name for name in ((self.trunk,) if isinstance(self.trunk, str) else self.trunk) if name)


def load_job(path: Path) -> Job:
    """Read a job file; raise UsageError that lists all that is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"job {path}: {(error.strerror or str(error)).lower()}", try_="edgelam tune JOB.toml"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"job {path}: more than {MAX_FILE_BYTES} bytes", try_="a TOML file, docs/tuning.md")
    try:
        raw = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"job {path}: not TOML: {error}", try_="docs/tuning.md") from None
    return job_of({"name": path.stem.lower().replace("_", "-"), **raw}, str(path))


def job_of(raw: Mapping[str, Any], where: str) -> Job:
    """The job that a table says; raise UsageError that lists all that is wrong with it."""
    problems: list[str] = []
    values = _fields(Job, raw, "", problems)
    if {"name", "data"} <= values.keys():
        said = {problem.split(":")[0] for problem in problems}
        problems += [problem for problem in _contradictions(values) if problem.split(":")[0] not in said]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UsageError(f"job {where}:{lines}", try_="docs/tuning.md lists the keys")
    return Job(**values)


def checked(job: Job) -> Job:
    """A job that came as JSON, where each field is right by itself; raise UsageError as `job_of`."""
    return job_of(msgspec.to_builtins(job), job.name)


def against_split(job: Job) -> list[str]:
    """What in a job does not go with a model that is split."""
    return _about_split(msgspec.structs.asdict(job), "split")


def _fields(kind: type[Struct], raw: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The fields of a table, each checked for itself; what is wrong goes into `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"{where.rstrip('.') or 'job'}: not a table")
        return {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems += [f"{where}{key}: no such key; there are {', '.join(fields)}" for key in raw if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                problems.append(f"{where}{name}: missing")
            continue
        table = _table_of(field.type)
        if table is not None and (raw[name] is not None or field.default is not None):
            before = len(problems)
            inner = _fields(table, raw[name], f"{where}{name}.", problems)
            if len(problems) == before or table in (Adapter, Rounds):
                values[name] = table(**inner)
            continue
        try:
            values[name] = msgspec.convert(raw[name], type=field.type)
        except msgspec.ValidationError as error:
            problems.append(f"{where}{name}: {str(error).split(' - at ')[0]}")
    return values


def _table_of(kind: Any) -> type[Struct] | None:
    """The struct that a field is, or may be."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, Struct):
            return one
    return None


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with fields that are right by themselves."""
    adapter, rounds = values.get("adapter", Adapter()), values.get("rounds", Rounds())
    devices = values.get("devices", ())
    mode, trunk = values.get("mode", "federated"), values.get("trunk", ())
    found = _about_split(values, mode) if mode in SPLIT else []
    if trunk and mode == "federated":
        found.append("trunk: means nothing with mode = 'federated'")
    if not isinstance(trunk, str) and len(set(trunk)) != len(trunk):
        found.append("trunk: one is listed twice")
    if mode in ("pipeline", "looped") and trunk and (isinstance(trunk, str) or len(trunk) < 2):
        found.append(f"trunk: one board, mode = {mode!r} wants two at least")
    if mode == "looped":
        found += _about_looped(values)
    if not is_name(values["name"]) or len(values["name"]) > MOST_NAME:
        found.append(f"name: {values['name']!r} is none: up to {MOST_NAME} lower-case letters, digits and hyphens")
    found += [f"{key}: {text!r} is no name" for key, text in _names(values) if not is_name(text)]
    if len(set(devices)) != len(devices):
        found.append("devices: one is listed twice")
    labels = values.get("labels", ())
    if len(set(labels)) != len(labels):
        found.append("labels: one is listed twice")
    if len(labels) == 1:
        found.append("labels: with one there is nothing to tell apart")
    found += [
        f"adapter.ranks.{device}: {rank}, more than adapter.rank, {adapter.rank}"
        for device, rank in adapter.ranks.items()
        if rank > adapter.rank
    ]
    if any(rank != adapter.rank for rank in adapter.ranks.values()) and rounds.aggregation not in ANY_RANKS:
        found.append(f"rounds.aggregation: {rounds.aggregation} needs one rank for all, not adapter.ranks")
    if len(set(adapter.matrices)) != len(adapter.matrices):
        found.append("adapter.matrices: one is listed twice")
    found += _about_rounds(rounds)
    most = len(devices) or 256
    if rounds.who in COUNTED:
        most = min(most, rounds.devices)
        if devices and rounds.devices > len(devices):
            found.append(f"rounds.devices: {rounds.devices} of {len(devices)} devices")
    if rounds.at_least > most:
        found.append(f"rounds.at_least: {rounds.at_least} updates from {most} devices")
    if values.get("train") == "blocks":
        found += _about_blocks(values)
    privacy = values.get("privacy")
    if privacy is not None and values.get("bad_rows") == "refuse":
        found.append("bad_rows: 'refuse' would tell whether there are any, which no private job tells")
    if values.get("secure"):
        found += _about_secure(values)
    return found + ([] if privacy is None else _impossible(privacy, rounds))


def _about_split(values: Mapping[str, Any], mode: str) -> list[str]:
    """What does not go with a model that is split: all boards make each step together."""
    rounds, found = values.get("rounds", Rounds()), []
    if rounds.who in ("fastest", "scheduled"):
        found.append(f"rounds.who: {rounds.who!r} means nothing with mode = {mode!r}, where all wait for one another")
    if rounds.aggregation not in ONE_SET:
        found.append(f"rounds.aggregation: {rounds.aggregation}; with mode = {mode!r} there is one set of factors")
    plain = {"middle": "mean", "most_change": None, "medium": "own", "rows_at_once": None}
    found += [
        f"rounds.{key}: {getattr(rounds, key)!r} means nothing with mode = {mode!r}"
        for key, left_out in plain.items()
        if getattr(rounds, key) != left_out
    ]
    if values.get("adapter", Adapter()).ranks:
        found.append(f"adapter.ranks: mean nothing with mode = {mode!r}: there is one set of factors")
    if rounds.batch_rows > MAX_SPLIT_ROWS:
        found.append(f"rounds.batch_rows: {rounds.batch_rows}; with mode = {mode!r} at most {MAX_SPLIT_ROWS}")
    if values.get("privacy") is not None:
        found.append(f"privacy: not with mode = {mode!r}: states and gradients would have to be covered, and are not")
    if values.get("secure"):
        found.append(
            f"secure: not with mode = {mode!r}: states and gradients can't be masked, each is needed by itself"
        )
    return found


def _about_blocks(values: Mapping[str, Any]) -> list[str]:
    """What means nothing where weights are trained themselves."""
    found, rounds = [], values.get("rounds", Rounds())
    if not values.get("labels"):
        found.append("train: 'blocks' is for sentence encoders, which learn labels")
    if values.get("adapter", Adapter()) != Adapter():
        found.append("adapter: there is none with train = 'blocks'")
    if rounds.aggregation != "fedavg":
        found.append(f"rounds.aggregation: {rounds.aggregation} is of factors, and train = 'blocks' has none")
    if values.get("privacy") is not None:
        found.append("privacy: not with train = 'blocks': noise on so many numbers leaves nothing")
    return found


def _about_looped(values: Mapping[str, Any]) -> list[str]:
    """What one block at every depth does not go without: the weights of blocks that differ can't be one."""
    found = []
    if values.get("train", "factors") != "blocks":
        found.append("train: 'blocks' with mode = 'looped', which trains the weights of one block for all depths")
    if not values.get("labels"):
        found.append("labels: missing; mode = 'looped' is for sentence encoders, which learn labels")
    if len(values.get("trunk", ())) > MAX_SEGMENTS and not isinstance(values["trunk"], str):
        found.append(f"trunk: {len(values['trunk'])} boards, {MAX_SEGMENTS} at most")
    return found


def _about_secure(values: Mapping[str, Any]) -> list[str]:
    """What needs more than the sum of updates, or times that boards take by themselves."""
    rounds, privacy, found = values.get("rounds", Rounds()), values.get("privacy"), []
    plain = {
        "middle": ("mean", "looks at each update"),
        "most_change": (None, "looks at each update"),
        "medium": ("own", "needs to know how long each board sends, and boards wait for one another"),
    }
    found += [
        f"rounds.{key}: {getattr(rounds, key)!r} {why}; not with secure"
        for key, (left_out, why) in plain.items()
        if getattr(rounds, key) != left_out
    ]
    if rounds.aggregation not in ONE_SET:
        found.append(f"rounds.aggregation: {rounds.aggregation} is no sum of updates; with secure {', '.join(ONE_SET)}")
    if rounds.who in ("fastest", "scheduled"):
        found.append(f"rounds.who: {rounds.who!r} needs to know how long each board takes; not with secure")
    if values.get("adapter", Adapter()).ranks:
        found.append("adapter.ranks: not with secure: updates of several lengths make no sum")
    if rounds.at_least < LEAST_SUMMED:
        found.append(
            f"rounds.at_least: {rounds.at_least}; with secure at least {LEAST_SUMMED}, sums of fewer tell much"
        )
    if max(rounds.at_least, rounds.devices) > MAX_SUMMED:
        found.append(f"rounds: more than {MAX_SUMMED} boards in a sum; not with secure")
    if privacy is not None and privacy.unit == "device" and privacy.channel is not None:
        found.append("privacy.channel: noise without a bound, with unit 'device'; not with secure")
    return found


def _about_rounds(rounds: Rounds) -> list[str]:
    """Keys that say something only beside others."""
    found = []
    if rounds.who not in COUNTED and rounds.devices != 1:
        found.append(f"rounds.devices: with who = {rounds.who!r} their number is not given")
    if rounds.who == "scheduled" and rounds.delay_s is None:
        found.append("rounds.delay_s: missing; who = 'scheduled' needs to know how long a round may take")
    if rounds.who != "scheduled":
        given = {"delay_s": None, "tradeoff": None, "penalty": "quadratic", "least_share": 0.1}
        found += [
            f"rounds.{key}: means something with who = 'scheduled' alone"
            for key, left_out in given.items()
            if getattr(rounds, key) != left_out
        ]
    if rounds.middle != "mean" and rounds.aggregation in ANY_RANKS:
        found.append(f"rounds.middle: {rounds.aggregation} takes the mean alone")
    if rounds.airtime == "equal" and rounds.medium != "shared":
        found.append("rounds.airtime: there is nothing to divide unless medium = 'shared'")
    return found


def _impossible(privacy: Privacy, rounds: Rounds) -> list[str]:
    releases = rounds.count * (rounds.steps if privacy.unit == "sample" else 1)
    try:
        noise_for(privacy.epsilon, privacy.delta, releases)
    except ValueError as error:
        return [f"privacy.epsilon: {error}, at delta {privacy.delta:g}"]
    return []


def _names(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    ranks = values.get("adapter", Adapter()).ranks
    named = [("devices", device) for device in values.get("devices", ())]
    trunk = values.get("trunk", ())
    named += [("trunk", name) for name in ((trunk,) if isinstance(trunk, str) else trunk) if name]
    return [("data", values["data"]), *named, *(("adapter.ranks", device) for device in ranks)]
