"""What is wrong with a job whose fields are right by themselves. Pure; docs/tuning.md lists the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from coordinator.rounds.job import (
    COUNTED,
    MOST_NAME,
    ONE_SET,
    SERIES,
    SPLIT,
    SUMS,
    Adapter,
    Job,
    Modality,
    Planned,
    Rounds,
    Space,
)
from models.lora.aggregate import ANY_RANKS
from models.privacy.accountant import noise_for
from models.privacy.plan import most_drawn
from wire.ids import is_name
from wire.limits import LEAST_SUMMED, MAX_MODALITIES, MAX_SEGMENTS, MAX_SPLIT_ROWS, MAX_SUMMED, MAX_WINDOW_READINGS
from wire.modalities import HEAD, connector_of
from wire.privacy import Privacy
from wire.samples import Series

MOST_PRIVATE_STEPS: Final = 1000
"""Of a round of a private job that splits its model: a board's ledger names each."""


def contradictions(values: Mapping[str, Any]) -> list[str]:
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
    if rounds.aggregation == "stack" and adapter.most_rank < adapter.rank:
        found.append(f"adapter.most_rank: {adapter.most_rank}, less than adapter.rank, {adapter.rank}")
    if rounds.aggregation != "stack" and adapter.most_rank != Adapter().most_rank:
        found.append("adapter.most_rank: means something with aggregation = 'stack' alone")
    if len(set(adapter.matrices)) != len(adapter.matrices):
        found.append("adapter.matrices: one is listed twice")
    if values.get("modalities"):
        found += _about_modalities(values)
    else:
        found += [f"{key}: missing" for key in ("model", "data") if not values.get(key)]
        found += ["space: means something with modalities alone"] if values.get("space", Space()) != Space() else []
        found += ["plan: means something with modalities alone"] if values.get("plan") else []
        found += _about_features(values)
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
    if values.get("uplink_grad") == "lowrank":
        found += _about_lowrank(values, mode)
    privacy = values.get("privacy")
    if privacy is not None and values.get("bad_rows") == "refuse":
        found.append("bad_rows: 'refuse' would tell whether there are any, which no private job tells")
    if values.get("secure"):
        found += _about_secure(values)
    return found + ([] if privacy is None else _impossible(privacy, rounds))


def against_split(job: Job) -> list[str]:
    """What in a job does not go with a model that is split."""
    return _about_split(msgspec.structs.asdict(job), "split")


def _about_split(values: Mapping[str, Any], mode: str) -> list[str]:
    """What does not go with a model that is split: all boards make each step together."""
    rounds, found = values.get("rounds", Rounds()), []
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
        found += _about_private_split(values, mode)
    if values.get("secure"):
        found.append(
            f"secure: not with mode = {mode!r}: states and gradients can't be masked, each is needed by itself"
        )
    return found


def _about_private_split(values: Mapping[str, Any], mode: str) -> list[str]:
    """What a board's noise can't cover: all but a step's gradient by B alone."""
    rounds, privacy = values.get("rounds", Rounds()), values["privacy"]
    if mode == "looped" or values.get("uplink_grad", "cut") != "lowrank":
        wants = "goes with mode = 'split' or 'pipeline' and uplink_grad = 'lowrank'"
        return [f"privacy: not with mode = {mode!r} so: noise on gradients of a split model {wants} alone"]
    found = []
    if privacy.unit != "sample":
        found.append(f"privacy.unit: {privacy.unit!r}; with mode = {mode!r} each step is told, so noise is by sample")
    if rounds.aggregation != "ffa":
        found.append(
            f"rounds.aggregation: {rounds.aggregation}; privacy with mode = {mode!r} wants 'ffa': B alone is trained,"
            " noise would be on each token's gradient by A"
        )
    if rounds.steps > MOST_PRIVATE_STEPS:
        found.append(f"rounds.steps: {rounds.steps}; boards remember what each told, {MOST_PRIVATE_STEPS} at most")
    if rounds.batch_rows <= MAX_SPLIT_ROWS < (most := most_drawn(rounds.batch_rows)):
        found.append(
            f"rounds.batch_rows: {rounds.batch_rows}; by chance it may be {most}, with mode = {mode!r}"
            f" at most {MAX_SPLIT_ROWS}"
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


def _about_lowrank(values: Mapping[str, Any], mode: str) -> list[str]:
    """What gradients by a low-rank matrix ask for: that nothing before it is trained, and nothing lies behind it."""
    found, adapter = [], values.get("adapter", Adapter())
    if mode not in SPLIT:
        found.append(f"uplink_grad: 'lowrank' goes with mode = 'split' or 'pipeline', not with {mode!r}")
    if values.get("train") == "blocks":
        return [*found, "uplink_grad: 'lowrank' is of factors, and train = 'blocks' has none"]
    if values.get("labels"):
        found.append("uplink_grad: 'lowrank' is for language models, which learn no labels")
    if adapter.blocks != "last":
        found.append(f"adapter.blocks: {adapter.blocks!r}; uplink_grad = 'lowrank' wants 'last'")
    if adapter.matrices != ("down",):
        said = ", ".join(adapter.matrices)
        found.append(f"adapter.matrices: {said}; uplink_grad = 'lowrank' wants down alone, the last before the cut")
    return found


def _about_looped(values: Mapping[str, Any]) -> list[str]:
    """What one block at every depth does not go without: the weights of blocks that differ can't be one."""
    found = []
    if values.get("train", "factors") != "blocks":
        found.append("train: 'blocks' with mode = 'looped', which trains the weights of one block for all depths")
    if not values.get("labels"):
        found.append("labels: missing; mode = 'looped' is for sentence encoders, which learn labels")
    if (who := values.get("rounds", Rounds()).who) in ("fastest", "scheduled"):
        found.append(f"rounds.who: {who!r}; with mode = 'looped' nobody knows how long a board takes by itself")
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
    if rounds.aggregation not in SUMS:
        found.append(f"rounds.aggregation: {rounds.aggregation} is no sum of updates; with secure {', '.join(SUMS)}")
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


def _about_features(values: Mapping[str, Any]) -> list[str]:
    """What samples that are no texts ask for, and what means nothing with them."""
    series, images = values.get("series"), values.get("images")
    found = []
    if series is None and values.get("model") == SERIES:
        found.append("series: missing; it says which columns are readings")
    if series is None and images is None:
        return found
    if series is not None and images is not None:
        found.append("images: not beside series; a job has samples of one kind")
    if series is not None and values.get("model", SERIES) != SERIES:
        found.append(f"model: {values['model']!r} takes no readings; with series it is {SERIES!r}")
    found += _about_task_modules(values)
    return found + ([] if series is None else _about_series(series))


def _about_task_modules(values: Mapping[str, Any]) -> list[str]:
    """What means nothing where samples are features that nobody trains."""
    found = []
    if not values.get("labels"):
        found.append("labels: missing; which of these a sample has is what is learnt")
    if values.get("mode", "federated") != "federated":
        found.append(f"mode: {values['mode']!r}; there is nothing to split below a task module on features")
    if values.get("adapter", Adapter()) != Adapter():
        found.append("adapter: means nothing where the task module alone is trained")
    rounds, plain = values.get("rounds", Rounds()), Rounds()
    if rounds.aggregation != "fedavg":
        found.append(f"rounds.aggregation: {rounds.aggregation} is for low-rank factors, and there are none")
    if rounds.row_tokens != plain.row_tokens:
        found.append("rounds.row_tokens: samples are no texts")
    return found


def _about_modalities(values: Mapping[str, Any]) -> list[str]:
    """What goes with samples of several kinds, and what means nothing with them."""
    modalities: Mapping[str, Modality] = values["modalities"]
    found = []
    if not 2 <= len(modalities) <= MAX_MODALITIES:
        found.append(f"modalities: {len(modalities)}; 2 to {MAX_MODALITIES} of them share a space")
    for name, one in modalities.items():
        where = f"modalities.{name}"
        if not is_name(name):
            found.append(f"{where}: {name!r} is no name")
        if (one.series is None) == (one.images is None):
            found.append(f"{where}: one of series and images")
        elif one.images is not None and not one.model:
            found.append(f"{where}.model: missing; a net that takes pictures")
        elif one.series is not None and one.model:
            found.append(f"{where}.model: {one.model!r} takes no readings")
        if one.series is not None:
            found += _about_series(one.series, f"{where}.")
    for key in ("model", "data", "series", "images"):
        if values.get(key):
            found.append(f"{key}: not beside modalities, each of which has its own")
    if values.get("privacy") is not None:
        found.append("privacy: not with modalities; what a board says of each is in the clear")
    if values.get("secure"):
        found.append("secure: not with modalities: updates of several lengths make no sum")
    return found + _about_task_modules(values) + _about_plan(values)


def _about_plan(values: Mapping[str, Any]) -> list[str]:
    """What modules are trained for, where the job says it: for one thing at a time."""
    plan: Sequence[Planned] = values.get("plan", ())
    rounds, devices, found = values.get("rounds", Rounds()), values.get("devices", ()), []
    modules = {HEAD, *map(connector_of, values["modalities"])}
    for place, planned in enumerate(plan):
        where = f"plan.{place}"
        unknown = sorted(set(planned.modules) - modules)
        if unknown:
            found.append(f"{where}.modules: no module {', '.join(unknown)}; there are {', '.join(sorted(modules))}")
        if len(set(planned.modules)) != len(planned.modules):
            found.append(f"{where}.modules: one is listed twice")
        if planned.objective == "contrastive" and HEAD in planned.modules:
            found.append(
                f"{where}.modules: head has nothing to do with where samples are; contrastive is of connectors"
            )
        strange = sorted(set(planned.devices) - set(devices)) if devices else []
        if strange:
            found.append(f"{where}.devices: {', '.join(strange)} not among devices")
        if planned.first >= rounds.count or (planned.last is not None and planned.last < planned.first):
            found.append(f"{where}: is for none of the rounds 0 to {rounds.count - 1}")
    contrastive = any(planned.objective == "contrastive" for planned in plan)
    space = values.get("space", Space())
    if contrastive and not space.anchors:
        found.append("space.anchors: missing; a contrastive objective draws samples to what a sentence encoder makes")
    if not contrastive and space != Space(width=space.width):
        found.append("space.anchors: and temperature mean something with a contrastive objective alone")
    return found + _at_one_time(plan, rounds.count)


def _at_one_time(plan: Sequence[Planned], count: int) -> list[str]:
    """What is trained for two things in one round, or is a round in which nothing is trained: the first of each."""
    found: dict[str, str] = {}
    for number in range(count if plan else 0):
        at = [planned for planned in plan if planned.at(number)]
        modules = [module for planned in at for module in planned.modules]
        if not modules:
            found.setdefault("", f"plan: nothing is trained in round {number}")
        for module in {module for module in modules if modules.count(module) > 1}:
            found.setdefault(module, f"plan: {module} is trained for two objectives in round {number}")
    return sorted(found.values())


def _about_series(series: Series, where: str = "") -> list[str]:
    found = []
    named = [*series.columns, series.label, *filter(None, (series.id, series.time))]
    if len(set(named)) != len(named):
        found.append(f"{where}series.columns: one is named twice, or is label, id or time as well")
    if series.most_gap is not None and not series.time:
        found.append(f"{where}series.most_gap: means something beside series.time alone")
    for name in ("centre", "scale"):
        given = len(getattr(series, name))
        if given not in (0, len(series.columns)):
            found.append(f"{where}series.{name}: {given} numbers for {len(series.columns)} columns")
    if series.window * len(series.columns) > MAX_WINDOW_READINGS:
        found.append(f"{where}series.window: at most {MAX_WINDOW_READINGS} readings, of all columns together")
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
    named += [(f"modalities.{name}.data", one.data) for name, one in values.get("modalities", {}).items()]
    named += [("data", values["data"])] if values.get("data") else []
    named += [("plan", device) for planned in values.get("plan", ()) for device in planned.devices]
    return [*named, *(("adapter.ranks", device) for device in ranks)]
