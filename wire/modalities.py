"""Samples of several modalities in one job: each has features of its own, which a linear connector maps into a space
that all share, where one task module tells labels. Modules are called 'connector.NAME', and 'head'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from wire import limits
from wire.ids import Digest, Name
from wire.samples import Images, Series

CONNECTOR: Final = "connector."
"""Before the name of its modality."""
HEAD: Final = "head"

Module = Annotated[str, Meta(pattern=r"^(head|connector\.[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?)$")]
Purpose = Literal["task", "contrastive"]
"""'task': cross entropy of the labels. 'contrastive': InfoNCE (van den Oord and others, 2018) of where a sample is
with its label's anchor against those of all labels: cross entropy over cosines, divided by a temperature."""
Temperature = Annotated[float, Meta(gt=1e-3, le=10)]
Count = Annotated[int, Meta(ge=0, le=2**53)]


class Owned(Struct, frozen=True, kw_only=True):
    """A modality that a device has samples of."""

    data: Name
    """Name of a data set in the device's own settings."""
    series: Series | None = None
    images: Images | None = None
    graph: Digest | None = None
    """Among the order's weights: of the net that makes features of pictures."""
    weights: Annotated[tuple[Digest, ...], Meta(max_length=4096)] = ()
    """Of that net, among the order's."""


class Connected(Struct, frozen=True, kw_only=True):
    """What a device trains of a job of several modalities: connectors of those that it owns, and the task module."""

    width: Annotated[int, Meta(ge=1, le=limits.MAX_WIDTH)]
    """Of the space."""
    modalities: Annotated[dict[Name, Owned], Meta(min_length=1, max_length=limits.MAX_MODALITIES)]
    anchors: Digest | None = None
    """Among the order's weights: where labels are in that space, [labels, width] float32 of length 1 each."""
    temperature: Temperature = 0.1


class Objective(Struct, frozen=True, kw_only=True):
    """What some modules are trained for in a round; no module is in two of them."""

    modules: Annotated[tuple[Module, ...], Meta(min_length=1, max_length=limits.MAX_MODALITIES + 1)]
    objective: Purpose


class Told(Struct, frozen=True, kw_only=True):
    """What a device says of one of its modalities."""

    samples: Count
    """That it has to train on: the weight of its connector among those of others."""
    held_out_count: Count = 0
    """Labels of what is held out."""
    held_out_right: Count = 0
    """Of these, told right."""


ByModality = Annotated[dict[Name, Told], Meta(max_length=limits.MAX_MODALITIES)]


def modules_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """All that are trained."""
    return tuple(module for one in objectives for module in one.modules)


def connector_of(modality: str) -> str:
    return f"{CONNECTOR}{modality}"


def accuracy_by(told: Sequence[Mapping[str, Told]]) -> dict[str, float]:
    """Modality -> share of the held-out labels that all devices together told right; without those of which nothing is
    held out. Nobody has more right than there were."""
    counts: dict[str, int] = {}
    right: dict[str, int] = {}
    for one in told:
        for name, found in one.items():
            counts[name] = counts.get(name, 0) + found.held_out_count
            right[name] = right.get(name, 0) + min(found.held_out_right, found.held_out_count)
    return {name: right[name] / count for name, count in sorted(counts.items()) if count}
