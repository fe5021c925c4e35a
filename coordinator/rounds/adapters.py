"""A job's factors as a file that others load, with where they come from. Pure, but for numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    HEAD_FILE,
    AdapterSpec,
    Config,
    flat,
    named,
    peft_modules,
    shapes,
    to_peft,
)
from models.lora.aggregate import Factors, Update, aggregated, mixed, sent, shortened_to, taken
from models.lora.looped import at_every_depth
from models.lora.serving import BLOCKS, CONFIG, PROVENANCE, TENSORS
from models.lora.whole import to_file
from models.training.kernels import VERSION as VERSION_OF_KERNELS
from wire.messages import UpdateMeta
from wire.modalities import connector_of
from wire.version import VERSION

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def spec_of(job: Job, device: str = "") -> AdapterSpec:
    """Of the job's adapter, or of the part of it that a device trains: its first ranks, which count as much there."""
    adapter: Adapter = job.adapter
    rank = adapter.rank_of(device)
    alpha = adapter.scale_alpha * rank / adapter.rank
    return AdapterSpec(
        rank=rank, alpha=alpha, matrices=adapter.matrices, seed=job.seed, labels=len(job.labels),
        blocks=job.train == "blocks", last_only=adapter.blocks == "last", looped=job.mode == "looped",
    )  # fmt: skip


def taken_by(config: Config, job: Job, device: str, factors: Floats) -> Floats:
    """What a device is sent of the job's factors: all, or the first ranks."""
    if job.adapter.rank_of(device) == job.adapter.rank:
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
) -> Floats:
    """What the factors become by the updates, which hold the parts that were sent: the same bits in whatever order."""
    shaped = shapes(config, spec_of(job))
    parts = parts_of(job, round_number)
    before = named(start, shaped)
    if job.rounds.most_change is not None:
        updates = _shortened(config, job, parts, start, updates, job.rounds.most_change)
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
        # Where nobody of the largest rank took part, the ranks beyond stay as they were.
        found[name] = np.concatenate([made.a, before[name][made.rank :]])
        found[other] = np.concatenate([made.b, before[other][:, made.rank :]], axis=1)
    return flat(found, shaped)


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
    parts: tuple[str, ...],
    start: Floats,
    updates: Sequence[tuple[UpdateMeta, Floats]],
    most: float,
) -> list[tuple[UpdateMeta, Floats]]:
    began = []
    for meta, _ in updates:
        shaped = shapes(config, spec_of(job, meta.device))
        began.append(flat(named(taken_by(config, job, meta.device, start), shaped), shaped, parts))
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


def privacy_of(job: Job, rounds: Sequence[RoundRecord]) -> Any:
    """For a job's provenance: what was asked for, and what each device spent of it."""
    if job.privacy is None:
        return "none: updates were sent without noise"
    return {**msgspec.to_builtins(job.privacy), "spent": spent_by(rounds)}


def _peft(config: Config, job: Job, spec: AdapterSpec) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if isinstance(config, BertConfig) else "CAUSAL_LM",
        "base_model_name_or_path": job.model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **peft_modules(config, spec),
    }


def files_of(config: Config, record: JobRecord, factors: Floats, rounds: Sequence[RoundRecord]) -> dict[str, bytes]:
    """PEFT's two files, a task module if there is one, and where the adapter comes from. Weights that were trained
    themselves are in a file of the same name, by the names of a checkpoint."""
    job = record.job
    spec = spec_of(job)
    by_name = named(factors, shapes(config, spec))
    tensors: dict[str, Any]
    if job.on_features:
        tensors, settings = {}, {}
    elif spec.blocks:
        assert isinstance(config, BertConfig)
        whole = at_every_depth(config, by_name) if spec.looped else by_name
        tensors, settings = to_file(config, whole), {"peft_type": BLOCKS, "r": 1, "lora_alpha": 1.0}
    else:
        tensors, settings = dict(to_peft(config, by_name)), _peft(config, job, spec)
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
        **(_told_of_modalities(record, rounds) if job.modalities else {}),
        "privacy": privacy_of(job, rounds),
        "updates": "masked: of each round the coordinator knew their sum alone" if job.secure else "known one by one",
    }
    head: dict[str, bytes] = {}
    if HEAD in by_name:
        parts = {"weight": by_name[HEAD][:, :-1].copy(), "bias": by_name[HEAD][:, -1].copy()}
        told = {"format": "pt", "labels": msgspec.json.encode(job.labels).decode(), **_samples_of(job)}
        head[HEAD_FILE] = to_bytes(parts, told)
    if isinstance(config, ModalitiesConfig):
        head[CONNECTORS_FILE] = _connectors(by_name, job)
    found = {**head, PROVENANCE: msgspec.json.format(msgspec.json.encode(provenance))}
    if job.on_features:
        return found
    return {
        **found,
        TENSORS: to_bytes(tensors, {"format": "pt"}),
        CONFIG: msgspec.json.format(msgspec.json.encode(settings)),
    }


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
