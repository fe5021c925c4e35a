"""A job's factors as a file that others load, with where they come from. Pure, but for numpy."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.rounds.job import Adapter, Job
from coordinator.rounds.store import JobRecord, RoundRecord, digest_of
from models.families.bert import BertConfig
from models.families.modalities import ModalitiesConfig
from models.formats.safetensors import to_bytes
from models.lora.adapter import (
    CONNECTORS_FILE,
    HEAD,
    AdapterSpec,
    Config,
    drawn,
    flat,
    length_of,
    named,
    shapes,
)
from models.lora.aggregate import (
    Factors,
    Update,
    aggregated,
    distance,
    joined,
    mixed,
    sent,
    shortened,
    shortened_to,
    size,
    taken,
)
from models.lora.files import adapter_files, head_file
from models.lora.held import at_rank, held_in, rank_of
from models.lora.looped import at_every_depth
from models.lora.serving import BLOCKS, CONFIG, PROVENANCE, TENSORS
from models.lora.whole import to_file
from models.training.kernels import VERSION as VERSION_OF_KERNELS
from wire.messages import UpdateMeta
from wire.modalities import connector_of
from wire.version import VERSION

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

GRADIENTS_ALONE: Final = "only gradients are covered; activations are not"
"""By the noise of a private job that splits its model: people are told wherever its epsilon is shown."""
NO_BOUND: Final = sys.maxsize
"""Of ranks."""


def spec_of(job: Job, device: str = "") -> AdapterSpec:
    """Of the job's adapter, or of the part of it that a device trains: its first ranks, which count as much there."""
    adapter: Adapter = job.adapter
    rank = adapter.rank_of(device)
    alpha = adapter.scale_alpha * rank / adapter.rank
    return AdapterSpec(
        rank=rank, alpha=alpha, matrices=adapter.matrices, seed=job.seed, labels=len(job.labels),
        blocks=job.train == "blocks", last_only=adapter.blocks == "last", looped=job.mode == "looped",
    )  # fmt: skip


def factors_in(config: Config, job: Job, factors: Floats) -> dict[str, Floats]:
    """A job's factors by name, of as many ranks as there are by now."""
    shaped = shapes(config, spec_of(job))
    return held_in(factors, shaped) if job.begins == "fresh" else named(factors, shaped)


def most_held(config: Config, job: Job) -> int:
    """Numbers of the factors that devices will be sent beside those that they train, at most."""
    if job.begins != "fresh":
        return 0
    return length_of(at_rank(shapes(config, spec_of(job)), job.adapter.most_rank))


def down_length(config: Config, job: Job, device: str, factors: int) -> int:
    """Numbers that a device is sent of a job's factors, which are so many."""
    if job.begins == "fresh":
        return factors
    shaped = shapes(config, spec_of(job, device))
    return length_of(shaped, parts_of(job, 0)) if job.begins == "own-b" else length_of(shaped)


def taken_by(config: Config, job: Job, device: str, factors: Floats) -> Floats:
    """What a device is sent of the job's factors: all, the first ranks, or those that are shared."""
    if job.begins == "own-b":
        shaped = shapes(config, spec_of(job))
        return flat(named(factors, shaped), shaped, parts_of(job, 0))
    if job.begins == "fresh" or job.adapter.rank_of(device) == job.adapter.rank:
        return factors
    rule, rank = job.rounds.aggregation, job.adapter.rank_of(device)
    whole = named(factors, shapes(config, spec_of(job)))
    found: dict[str, Floats] = {}
    for name in whole:
        if name.endswith(".a"):
            other = f"{name[:-1]}b"
            found[name], found[other] = taken(rule, Factors(whole[name], whole[other]), rank)
        elif name == HEAD:
            found[name] = whole[name]
    return flat(found, shapes(config, spec_of(job, device)))


def begun_by(config: Config, job: Job, device: str, round_number: int, start: Floats) -> Floats:
    """Of the factors that a device begins a round with, the parts that it sends back."""
    shaped, parts = shapes(config, spec_of(job, device)), parts_of(job, round_number)
    if job.begins == "fresh":
        head = {name: values for name, values in factors_in(config, job, start).items() if name == HEAD}
        return flat({**drawn(shaped, job.seed, round_number), **head}, shaped, parts)
    came = taken_by(config, job, device, start)
    return came if job.begins == "own-b" else flat(named(came, shaped), shaped, parts)


def parts_of(job: Job, round_number: int) -> tuple[str, ...]:
    """Which factors devices train and send in a round; a task module goes with them in all of them, or alone."""
    if job.on_features:
        return ("c",)
    trained = ("w",) if job.train == "blocks" else sent(job.rounds.aggregation, round_number)
    return (*trained, *(("c",) if job.labels else ()))


def aggregate(
    config: Config,
    job: Job,
    round_number: int,
    start: Floats,
    updates: Sequence[tuple[UpdateMeta, Floats]],
    most_rank: int | None = None,
) -> Floats:
    """What the factors become by the updates, which hold the parts that were sent: the same bits in whatever order. Of
    'stack' no more than `most_rank` ranks are left, where it is not said the job's."""
    most_rank = job.adapter.most_rank if most_rank is None else most_rank
    shaped = shapes(config, spec_of(job))
    parts = parts_of(job, round_number)
    before = factors_in(config, job, start)
    if job.rounds.most_change is not None:
        updates = _shortened(config, job, round_number, start, updates, job.rounds.most_change)
    sent_in = [(meta, named(vector, shapes(config, spec_of(job, meta.device)), parts)) for meta, vector in updates]
    found: dict[str, Floats] = {}
    for name in shaped:
        if name == HEAD or name.endswith(".w"):
            in_order = sorted(sent_in, key=lambda one: one[0].device)
            samples = [meta.samples for meta, _ in in_order]
            found[name] = mixed([factors[name] for _, factors in in_order], samples, job.rounds.middle)
        if not name.endswith(".a"):
            continue
        other = f"{name[:-1]}b"
        of_module = [
            Update(
                meta.device,
                meta.samples,
                Factors(factors.get(name, before[name]), factors.get(other, before[other])),
            )
            for meta, factors in sent_in
        ]
        made = aggregated(job.rounds.aggregation, of_module, round_number, job.rounds.middle)
        if job.begins == "fresh":
            made = joined(Factors(before[name], before[other]), made)
            if made.rank > most_rank:
                made = shortened(made, most_rank)
            found[name], found[other] = made
            continue
        # Where nobody of the largest rank took part, the ranks beyond stay as they were.
        found[name] = np.concatenate([made.a, before[name][made.rank :]])
        found[other] = np.concatenate([made.b, before[other][:, made.rank :]], axis=1)
    return flat(found, shaped)


def lost(
    config: Config, job: Job, round_number: int, start: Floats, updates: Sequence[tuple[UpdateMeta, Floats]],
    found: Floats,
) -> float | None:  # fmt: skip
    """Of all that was learnt by 'stack', the share for which there were too few ranks: Frobenius norms of the products,
    all matrices together. None with another rule."""
    if job.begins != "fresh":
        return None
    exact = factors_in(config, job, aggregate(config, job, round_number, start, updates, NO_BOUND))
    if sum(values.size for values in exact.values()) == len(found):
        return 0.0
    kept = factors_in(config, job, found)
    missed, whole = 0.0, 0.0
    for name in (name for name in exact if name.endswith(".a")):
        all_of_it, left = (Factors(one[name], one[f"{name[:-1]}b"]) for one in (exact, kept))
        missed += distance(all_of_it, left) ** 2
        whole += size(all_of_it) ** 2
    return math.sqrt(missed / whole) if whole else 0.0


def moved(config: Config, job: Job, round_number: int, start: Floats, mean: Doubles) -> Floats:
    """What the factors become where the mean of all changes of the parts that were sent is known alone."""
    shaped = shapes(config, spec_of(job))
    before = named(start, shaped)
    parts = parts_of(job, round_number)
    after = (flat(before, shaped, parts).astype(np.float64) + mean).astype(np.float32)
    return flat({**before, **named(after, shaped, parts)}, shaped)


def _shortened(
    config: Config,
    job: Job,
    round_number: int,
    start: Floats,
    updates: Sequence[tuple[UpdateMeta, Floats]],
    most: float,
) -> list[tuple[UpdateMeta, Floats]]:
    began = [begun_by(config, job, meta.device, round_number, start) for meta, _ in updates]
    changes = shortened_to(most, [vector - before for (_, vector), before in zip(updates, began, strict=True)])
    return [(meta, before + change) for (meta, _), before, change in zip(updates, began, changes, strict=True)]


def spent_by(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    """Device -> epsilon that a private job has spent there."""
    found: dict[str, float] = {}
    for done in rounds:
        for device, told in done.devices.items():
            if told.epsilon is not None:
                found[device] = max(told.epsilon, found.get(device, 0.0))
    return found


def uncovered(job: Job) -> str:
    """What of a private job no noise is on, in words; '' where nothing more than docs/tuning.md says of all."""
    return GRADIENTS_ALONE if job.privacy is not None and job.is_split else ""


def privacy_of(job: Job, rounds: Sequence[RoundRecord]) -> Any:
    """For a job's provenance: what was asked for, and what each device spent of it."""
    if job.privacy is None:
        return "none: updates were sent without noise"
    return {**msgspec.to_builtins(job.privacy), "spent": spent_by(rounds), "covers": uncovered(job) or "updates"}


def files_of(config: Config, record: JobRecord, factors: Floats, rounds: Sequence[RoundRecord]) -> dict[str, bytes]:
    """PEFT's two files, a task module if there is one, and where the adapter comes from. Weights that were trained
    themselves are in a file of the same name, by the names of a checkpoint."""
    job = record.job
    spec = spec_of(job)
    by_name = factors_in(config, job, factors)
    if job.begins == "fresh":
        rank = rank_of(shapes(config, spec), len(factors))
        spec = msgspec.structs.replace(spec, rank=rank, alpha=spec.scale * rank)
    trained: dict[str, bytes] = {}
    if spec.blocks:
        assert isinstance(config, BertConfig)
        whole = at_every_depth(config, by_name) if spec.looped else by_name
        tensors, settings = to_file(config, whole), {"peft_type": BLOCKS, "r": 1, "lora_alpha": 1.0}
        trained = {
            TENSORS: to_bytes(tensors, {"format": "pt"}),
            CONFIG: msgspec.json.format(msgspec.json.encode(settings)),
        }
    elif not job.on_features:
        trained = adapter_files(config, spec, job.model, by_name, job.labels)
    samples = {device: found.samples for done in rounds for device, found in done.devices.items() if found.samples}
    provenance: dict[str, Any] = {
        "schema": "edgelam.adapter/1",
        "edgelam": VERSION,
        "job": msgspec.to_builtins(job),
        "base": record.base,
        "factors": digest_of(factors.astype("<f4", copy=False).tobytes()),
        "rounds": sum(done.trained for done in rounds),
        "samples": samples,
        "held_out_loss": [done.held_out_loss for done in rounds],
        "held_out_accuracy": [done.held_out_accuracy for done in rounds] if job.labels else None,
        "personal": job.begins == "own-b",
        **(_told_of_modalities(record, rounds) if job.modalities else {}),
        "privacy": privacy_of(job, rounds),
        "updates": "masked: of each round the coordinator knew their sum alone" if job.secure else "known one by one",
    }
    head = head_file(by_name, job.labels, **_samples_of(job))
    if isinstance(config, ModalitiesConfig):
        head[CONNECTORS_FILE] = _connectors(by_name, job)
    return {**trained, **head, PROVENANCE: msgspec.json.format(msgspec.json.encode(provenance))}


def _connectors(by_name: Mapping[str, Floats], job: Job) -> bytes:
    """All connectors, and how the features before them were made."""
    tensors: dict[str, Floats] = {}
    for name in job.modalities:
        connector = by_name[f"{connector_of(name)}.c"]
        tensors |= {f"{name}.weight": connector[:, :-1].copy(), f"{name}.bias": connector[:, -1].copy()}
    return to_bytes(tensors, {"format": "pt", **_samples_of(job)})


def _told_of_modalities(record: JobRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """For the provenance of a job of several: who had which, and how well labels were told of each."""
    each = {device: found.by_modality for done in rounds for device, found in done.devices.items() if found.by_modality}
    return {
        "modalities": record.owns,
        "samples_by_modality": {
            device: {name: told.samples for name, told in by_modality.items()} for device, by_modality in each.items()
        },
        "held_out_accuracy_by_modality": [done.accuracy_by for done in rounds],
    }


def _samples_of(job: Job) -> dict[str, str]:
    """How features were made for a task module, so that others can make them."""
    if job.modalities:
        return {
            "modalities": msgspec.json.encode(job.modalities).decode(),
            "seed": str(job.seed),
            "kernels": str(VERSION_OF_KERNELS),
        }
    if job.images is not None:
        return {"images": msgspec.json.encode(job.images).decode(), "model": job.model}
    if job.series is None:
        return {}
    return {
        "series": msgspec.json.encode(job.series).decode(),
        "seed": str(job.seed),
        "kernels": str(VERSION_OF_KERNELS),
    }
