"""What Prometheus reads at GET /metrics: the state of the site as it is now, and counts of what was served.

Names follow Prometheus' conventions: base units, `_total` for what only grows. No label grows with the number of
requests or clients: devices and stages are those that are there, outcomes and levels are tables. Counters of stages are
those of their workers, so they begin at 0 again with a new worker, as Prometheus expects of a restart.
docs/http.md lists all names.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from coordinator.deployments import readiness
from coordinator.inference.serve import Serving
from coordinator.measured import counters_of
from coordinator.notices import Level
from coordinator.presence import Presence
from coordinator.service import Coordinator
from coordinator.standbys import ready_copies
from wire.errors import Busy, Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.messages import StageCounters
from wire.version import PROTOCOL, VERSION

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Outcome = Literal["stop", "length", "cancelled", "busy", "refused", "unreachable", "failed"]
"""How a request ended: 'stop' and 'length' are whole answers, 'cancelled' means that the client went away."""

WAIT_BUCKETS_S: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 120.0, 600.0)
FIRST_TOKEN_BUCKETS_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
PAUSE_BUCKETS_S: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)

STAGE_LABELS: Final = ("deployment", "stage", "device")


def outcome_of(error: EdgelamError) -> Outcome:
    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, UsageError | Refused):
        return "refused"
    return "unreachable" if isinstance(error, Unreachable | Degraded) else "failed"


class Watched:
    """What was seen of one request. Who ends it on purpose sets `outcome` before."""

    def __init__(self) -> None:
        self.outcome: Outcome = "cancelled"
        self.tokens = 0
        self.began_s = time.monotonic()
        self.started_s: float | None = None
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.paused_s = 0.0
        """Of the time between the first token and the last."""


class Metrics:
    """Counts of one coordinator, in a registry of its own."""

    def __init__(self, coordinator: Coordinator, serving: Serving) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "edgelam_requests_total", "Requests that are over, by how they ended.", ["outcome"], registry=self.registry
        )
        for outcome in get_args(Outcome):
            self._requests.labels(outcome)
        self._prompt_tokens = Counter(
            "edgelam_prompt_tokens_total", "Tokens of prompts that were sent to the stages.", registry=self.registry
        )
        self._generated_tokens = Counter(
            "edgelam_generated_tokens_total", "Tokens that came from the stages.", registry=self.registry
        )
        self._wait_s = self._histogram(
            "edgelam_request_wait_seconds", "From the request to its turn at the stages.", WAIT_BUCKETS_S
        )
        self._first_token_s = self._histogram(
            "edgelam_time_to_first_token_seconds", "From the turn to the first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._token_s = self._histogram(
            "edgelam_time_per_token_seconds",
            "Mean over the tokens of a request after the first, pauses left out.",
            TOKEN_BUCKETS_S,
        )
        self._pause_s = self._histogram(
            "edgelam_pause_seconds", "Between two tokens of an answer, when something was lost.", PAUSE_BUCKETS_S
        )
        self.registry.register(_Site(coordinator, serving))
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, what: str, buckets_s: Iterable[float]) -> Histogram:
        return Histogram(name, what, buckets=tuple(buckets_s), registry=self.registry)

    async def page(self, _request: Request) -> Response:
        """Answer of GET /metrics."""
        return Response(generate_latest(_Shown(self.registry)), media_type=CONTENT_TYPE)

    async def watch(
        self, events: AsyncGenerator[dict[str, Any], None], watched: Watched
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Pass on the events of a request (coordinator.inference.serve) and count them."""
        try:
            async with aclosing(events):
                async for event in events:
                    self._saw(event, watched)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            raise  # 'cancelled', unless somebody knew better
        except BaseException as error:
            watched.outcome = outcome_of(error) if isinstance(error, EdgelamError) else "failed"
            raise
        finally:
            self._over(watched)

    def _saw(self, event: dict[str, Any], watched: Watched) -> None:
        now_s = time.monotonic()
        kind = event["event"]
        if kind == "start" and watched.started_s is None:
            watched.started_s = now_s
            self._prompt_tokens.inc(event["prompt_tokens"])
            self._wait_s.observe(now_s - watched.began_s)
        elif kind == "token":
            watched.tokens += 1
            watched.last_s = now_s
            self._generated_tokens.inc()
            if watched.first_s is None and watched.started_s is not None:
                watched.first_s = now_s
                self._first_token_s.observe(now_s - watched.started_s)
        elif kind == "resume":
            self._pause_s.observe(event["pause_s"])
            watched.paused_s += event["pause_s"] if watched.tokens else 0.0
        elif kind == "end":
            watched.outcome = event["finish_reason"]

    def _over(self, watched: Watched) -> None:
        self._requests.labels(watched.outcome).inc()
        if watched.tokens > 1 and watched.first_s is not None and watched.last_s is not None:
            busy_s = max(0.0, watched.last_s - watched.first_s - watched.paused_s)
            self._token_s.observe(busy_s / (watched.tokens - 1))


class _Shown(CollectorRegistry):
    """What a registry collects, without the time at which each series was made: half of the page, and nobody's
    question. The library can leave it out for a whole process only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Site(Collector):
    """The state of the site at the moment of reading."""

    def __init__(self, coordinator: Coordinator, serving: Serving) -> None:
        self._coordinator = coordinator
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        coordinator, serving = self._coordinator, self._serving
        yield _gauge(
            "edgelam_build_info", "Version of this coordinator.", ("version", "protocol"), {(VERSION, str(PROTOCOL)): 1}
        )
        yield _gauge("edgelam_broker_up", "Whether the broker is connected.", (), {(): coordinator.broker_up})
        states = Tally(device.presence for device in coordinator.devices())
        yield _gauge(
            "edgelam_devices",
            "Devices by how present they are.",
            ("state",),
            {(state.value,): states[state] for state in Presence},
        )
        yield _gauge(
            "edgelam_device_speed_ratio",
            "Speed of a device as a share of what it measured; 1 where it keeps that.",
            ("device",),
            {
                (name,): 1 / (found.times if (found := coordinator.slowed(name)) else 1.0)
                for name in coordinator.online()
            },
        )
        yield _gauge("edgelam_requests_live", "Requests that the stages work on.", (), {(): serving.live})
        yield _gauge(
            "edgelam_requests_waiting",
            "Requests that wait for a deployment or for their turn.",
            (),
            {(): serving.waiting},
        )
        yield _total(
            "edgelam_notices", "Notices for people.", ("level",), {(v,): coordinator.noted[v] for v in get_args(Level)}
        )
        yield _total(
            "edgelam_refused_messages",
            "Messages that could not be read.",
            (),
            {(): coordinator.refused_messages},
        )
        yield _total(
            "edgelam_artifact_bytes",
            "Bytes of weights and graphs that boards fetched.",
            (),
            {(): coordinator.artifacts.handed_bytes},
        )
        yield from self._deployments()
        yield from self._stages()

    def _deployments(self) -> Iterator[Metric]:
        records = self._coordinator.records()
        applied = self._coordinator.applied()
        yield _gauge(
            "edgelam_deployment_info",
            "Deployments in force.",
            ("deployment", "model", "precision", "objective", "topology"),
            {(r.name, r.plan.model, r.plan.precision, r.plan.objective, r.plan.topology): 1 for r in records},
        )
        labels = ("deployment",)
        yield _gauge(
            "edgelam_deployment_epoch",
            "Grows with every change of a deployment.",
            labels,
            {(record.name,): record.plan.epoch for record in records},
        )
        yield _gauge(
            "edgelam_deployment_stages",
            "Stages of a deployment.",
            labels,
            {(record.name,): len(record.plan.stages) for record in records},
        )
        yield _gauge(
            "edgelam_deployment_ready",
            "Whether all stages of a deployment are loaded.",
            labels,
            {(r.name,): readiness(r.plan, applied, self._coordinator.is_online).ready for r in records},
        )
        yield _gauge(
            "edgelam_deployment_standbys_ready",
            "Copies of stages that are loaded and wait.",
            labels,
            {(r.name,): len(ready_copies(r.plan, applied, self._coordinator.is_online)) for r in records},
        )

    def _stages(self) -> Iterator[Metric]:
        """Counters of stages in force only: what a device may say beyond that makes no series."""
        telemetry = self._coordinator.telemetry()
        rows: dict[tuple[str, ...], StageCounters] = {}
        for record in self._coordinator.records():
            for (device, stage), counters in counters_of(record.plan, telemetry).items():
                rows[record.name, str(stage), device] = counters
        for name, what, field in (
            ("requests", "Requests that came to a stage.", "requests"),
            ("prefill_steps", "Steps over chunks of prompts.", "prefill_steps"),
            ("prefill_tokens", "Tokens of prompts that went through a stage.", "prefill_tokens"),
            ("prefill_busy_seconds", "Time spent in prefill steps.", "prefill_busy_s"),
            ("decode_steps", "Steps that make a token of an answer, or several.", "decode_steps"),
            ("decode_busy_seconds", "Time spent in decode steps.", "decode_busy_s"),
            ("drafts_sent", "Tokens that were guessed for steps.", "drafts_sent"),
            ("drafts_accepted", "Guessed tokens that were right.", "drafts_accepted"),
            ("sent_bytes", "Payload bytes that a stage sent.", "sent_bytes"),
            ("received_bytes", "Payload bytes that came to a stage.", "received_bytes"),
            ("refused_frames", "Frames that a stage did not take.", "refused_frames"),
        ):
            values = {labels: getattr(counters, field) for labels, counters in rows.items()}
            yield _total(f"edgelam_stage_{name}", what, STAGE_LABELS, values)
        yield _gauge(
            "edgelam_stage_resident_memory_bytes",
            "Memory of a stage's worker as the kernel counts it.",
            STAGE_LABELS,
            {labels: counters.resident_bytes for labels, counters in rows.items() if counters.resident_bytes},
        )


def _gauge(name: str, what: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]) -> Metric:
    return _filled(GaugeMetricFamily(name, what, labels=labels), values)


def _total(name: str, what: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]) -> Metric:
    """`_total` is put behind the name."""
    return _filled(CounterMetricFamily(name, what, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: dict[tuple[str, ...], float]) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family
