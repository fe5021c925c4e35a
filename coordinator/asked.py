"""What a user may ask for: refused here before any work is done for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from coordinator.journal import DeployRequest
from coordinator.planning.aims import check_objective
from coordinator.planning.plan import Topology
from coordinator.planning.request import check_engine, check_numbers, check_replicas, check_reserve
from coordinator.planning.topology import TOPOLOGIES
from coordinator.shelf import Prepared, canonical, is_item_model
from models.build.pack import Packed
from models.codecs import load_report
from models.engine.names import PROCESSOR
from wire.errors import Refused, UsageError

PRECISIONS = ("int4", "int8", "f32")
T = TypeVar("T")
MOST_ERROR_PERCENT = 100.0
"""Beyond twice the perplexity nobody wants an answer."""


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", try_=", ".join(PRECISIONS))


def checked(request: DeployRequest) -> DeployRequest:
    """The request with the model's one name; raise UsageError for what can be refused before any work is done."""
    check_precision(request.precision)
    model = canonical(request.model)
    if is_item_model(model):
        request = _of_items(request)
    weights, pins = _once(request.weights, "weights for"), _once(request.pins, "pins of")
    check_objective(request.objective, weights, request.tokens_per_s)
    check_reserve(request.reserve_percent)
    check_engine(request.engine)
    topology_of(request)
    if request.adapters and request.engine not in ("auto", PROCESSOR):
        raise Refused(f"adapters run on {PROCESSOR} alone, not on {request.engine}", try_="leave the engine out")
    if not 0 <= request.error_budget_percent <= MOST_ERROR_PERCENT:
        raise UsageError(
            f"an error budget of {request.error_budget_percent:g} % is not possible",
            try_=f"--error-budget from 0 (exact forms only) to {MOST_ERROR_PERCENT:g}",
        )
    slots = 1 if request.slots is None else request.slots
    check_numbers(request.context_tokens, slots, request.boards_at_least, request.boards_at_most)
    check_replicas(request.replicas, request.pins)
    return msgspec.structs.replace(
        request,
        model=model,
        pins=tuple(sorted(pins.items())),
        weights=tuple(sorted(weights.items())),
    )


def _once(pairs: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
    """Pairs as a mapping; raise UsageError for a name that has two values."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise UsageError(f"{what} {name} contradict: {found[name]} and {value}", try_="drop one of them")
    return found


def _of_items(request: DeployRequest) -> DeployRequest:
    """Item models run at the precision of their file, on onnxruntime, and have no tokens and no perplexity."""
    if request.adapters:
        raise Refused(f"{request.model} is no language model: it takes no adapter", try_="leave the adapter out")
    if request.objective == "ttft" or request.tokens_per_s is not None:
        raise Refused(
            f"{request.model} is no language model: it gives no tokens, and runs on onnxruntime",
            try_="--objective latency, throughput, energy or memory",
        )
    if request.precision == "int8" or request.error_budget_percent:
        raise Refused(
            f"{request.model} is no language model: it runs as its file has it",
            try_="leave precision and error budget out",
        )
    if request.engine not in ("auto", "onnxruntime"):
        check_engine(request.engine)
        raise Refused(
            f"{request.model} is no language model: it runs on onnxruntime, not on {request.engine}",
            try_="leave the engine out",
        )
    return msgspec.structs.replace(request, precision="f32")


def check_measured(request: DeployRequest, prepared: Prepared) -> None:
    """Raise Refused if codecs are allowed that nobody has measured."""
    packed = prepared.packed
    if request.error_budget_percent and (not isinstance(packed, Packed) or load_report(packed) is None):
        raise Refused(
            f"what codecs cost {request.model} at {request.precision} is not measured",
            try_=f"edgelam model codecs {request.model} --precision {request.precision}",
        )


def topology_of(request: DeployRequest) -> Topology:
    """What is asked for; raise UsageError if there is no such topology."""
    for known in TOPOLOGIES:
        if request.topology == known:
            return known
    raise UsageError(f"topology {request.topology!r} is unknown", try_=", ".join(TOPOLOGIES))
