"""A plan: which stage runs where, with the predicted figures and the reason for each choice. Pure data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from msgspec import Struct

from wire.messages import CodecName, EngineName, InboxAddress, Runs

Objective = Literal["latency", "ttft", "throughput", "energy", "memory", "weighted"]
"""coordinator.planning.aims says what each is."""
Topology = Literal["auto", "central", "direct"]
"""What is asked for; a plan is one of the latter two."""


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
    batches_s: tuple[tuple[int, float], ...] = ()
    """(requests, seconds) of a step of one row of each, by rising number; none: each row takes what one alone does."""
    prefill_chunk_s: float | None = None
    """Time per prefill chunk; None when the device has not measured prefill."""
    transfer_s: float = 0.0
    """For which that message keeps the busiest link on its way."""
    central_hop_s: float = 0.0
    """Through the site's broker, where `hop_s` is of the way straight to the next board's own as both measured it; 0
    where it is not."""
    codec: CodecName = "as-is"
    """Of the chunks of prompts that go to the next stage."""
    row_codec: CodecName = "as-is"
    """Of the rows of answers: the same, or as they are where that is faster. `hop_s` and `hop_bytes` are with it."""
    compute_j: float | None = None
    """Joules that its board takes while it computes one token; `prefill_chunk_j` for a chunk of a prompt. None where
    power is not known."""
    prefill_chunk_j: float | None = None
    error_percent: float = 0.0
    """By how much perplexity rises at most with this cut's codec alone, as measured."""
    logit_error: float = 0.0
    """How far logits are apart then, root mean square."""
    engine: EngineName = "onnxruntime"
    """What it shall run on; where it runs on another, the board says so."""


class Standby(Struct, frozen=True, kw_only=True):
    """A second copy of a stage: loaded on another device, and idle. Times are what the stage would take there."""

    stage: int
    device: str
    held_bytes: int
    memory_bytes: int
    memory_limit_bytes: int
    compute_s: float
    prefill_chunk_s: float | None
    hop_in_s: float
    """From the stage before, through the site's broker, as the ring was when this was planned; `hop_s` to the next."""
    hop_s: float
    transfer_in_s: float
    """For which those messages keep the busiest link on their way."""
    transfer_s: float
    engine: EngineName = "onnxruntime"


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
    tokens_per_s: float | None = None
    """The load that a plan for throughput has to carry; None: as much as can be."""
    weights: dict[str, float] = {}
    """Objective -> weight, of a weighted plan."""
    reserve_percent: float = 10.0
    """Of each board's usable memory, that stays free."""
    engine: str = "auto"
    """All stages on this one, or each board on the one with which it is fastest."""


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
    predicted_first_token_s: float | None = None
    """Of a prompt of `prompt_tokens`, through an idle pipeline; None where a board has not measured prefill."""
    prompt_tokens: int = 0
    predicted_slowest_s: float
    """The slowest stage or hop for a token of a full pipeline, whose steps have the rows of a group: the bound on its
    throughput."""
    token_error_s: float = 0.0
    """Half the 95 % interval of `predicted_token_s`, from the spread of what was measured; `slowest_error_s` that of
    `predicted_slowest_s`."""
    slowest_error_s: float = 0.0
    predicted_token_j: float | None = None
    """Joules per token of one stream, of all boards of the plan, idle ones included; None where power is not known."""
    predicted_memory_share: float | None = None
    """What the fullest board is given, as a share of what stages may take there."""
    predicted_cost: float | None = None
    """Of a weighted plan."""
    because: str
    """Why this plan and not another, in one or two sentences."""
    alone: str = ""
    """Best single device, when one can hold the whole model: its predicted time and how it compares."""
    replicas: int = 1
    """Copies of each stage that were asked for, the one that works included."""
    standbys: tuple[Standby, ...] = ()
    replicas_because: str = ""
    """Which copies are missing, and why, when there are fewer than were asked for."""
    limits: Limits = Limits()
    runs: Runs = "tokens"
    """With "items", what is said per token is per item, and what goes back from the head is its answer."""
    slots_because: str = ""
    """Why `slots` is less than usual, when nobody asked for a number."""
    error_budget_percent: float = 0.0
    """By how much codecs may raise perplexity; 0: hidden states cross as they are."""
    perplexity_increase_percent: float = 0.0
    """By how much the codecs of all cuts raise it together at most, as measured (coordinator.planning.quality)."""


class Draft(NamedTuple):
    """A plan without its reasons, which may take as long as the plan; `finished()` gives it with them."""

    plan: Plan
    finished: Callable[[], Plan]

    @staticmethod
    def of(plan: Plan) -> Draft:
        """One that has its reasons."""
        return Draft(plan, lambda: plan)
