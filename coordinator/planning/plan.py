"""A plan: which stage runs where, with the predicted figures and the reason for each choice. Pure data."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from wire.messages import InboxAddress

Objective = Literal["latency", "throughput"]


class PlannedStage(Struct, frozen=True, kw_only=True):
    """Blocks are [first_block, end_block). Times are per decoded token."""

    stage: int
    device: str
    embedding: bool
    head: bool
    first_block: int
    end_block: int
    held_bytes: int
    memory_bytes: int
    """What the stage needs on the device in all (worker, engine, weights, KV), against `memory_limit_bytes`."""
    memory_limit_bytes: int
    compute_s: float
    hop_s: float
    """From this stage to the next one in the ring; from the head back to the first."""
    hop_bytes: int
    """Payload bytes of the message that crosses, header included."""
    inbox: InboxAddress
    because: str
    prefill_chunk_s: float | None = None
    """Time per prefill chunk; None when the device has not measured prefill."""


class LeftOut(Struct, frozen=True, kw_only=True):
    device: str
    because: str


class Limits(Struct, frozen=True, kw_only=True):
    """What the plan had to keep; a plan carries it, so that it can be explained and made again."""

    boards_at_least: int = 1
    boards_at_most: int | None = None
    pins: dict[str, str] = {}
    """Module -> the device that must hold it."""
    excluded: tuple[str, ...] = ()
    expected_tokens: int = 256
    """Rows in the KV cache at which a decode step was priced."""
    accept_unsteady: bool = False
    """Whether figures were used that a board itself marked as not to be trusted."""


class Plan(Struct, frozen=True, kw_only=True):
    v: int = 1
    deployment: str
    epoch: int
    model: str
    precision: str
    wire_dtype: Literal["f32", "f16", "bf16"]
    objective: Objective
    topology: Literal["central", "direct"]
    context_tokens: int
    slots: int
    prefill_chunk_tokens: int
    stages: tuple[PlannedStage, ...]
    left_out: tuple[LeftOut, ...]
    predicted_token_s: float
    """Time per decoded token of one stream: all compute and hops once round the ring."""
    predicted_slowest_s: float
    """The slowest stage or hop: the bound on throughput of a full pipeline."""
    because: str
    """Why this plan and not another, in one or two sentences."""
    alone: str = ""
    """Best single device, when one can hold the whole model: its predicted time and how it compares."""
    limits: Limits = Limits()
