"""What the agent says about what it did: replies to commands, and when the applied state is news. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from agent.jobs import Asked, Outcome
from agent.pairs import VERB as PROBE_PAIR
from hwprofiles.profile import LinkMeasurement
from hwprofiles.reading import Absent, Failed
from hwprofiles.samples import Sustained
from wire.messages import Applied, Command, Reply

PROGRESS_PERIOD_S: Final = 0.5
"""Reports in which only fetched bytes changed are published at most twice a second."""


class _Said(NamedTuple):
    phases: tuple[tuple[object, ...], ...]
    fetched: tuple[int, ...]


class AppliedNews:
    """Decides when the applied state is published: at once when a phase changed, slowly while bytes come in. Resident
    memory, which never stands still, is in the telemetry."""

    def __init__(self) -> None:
        self._said: _Said | None = None
        self._said_s = 0.0

    def news(self, applied: Applied, now_s: float) -> bool:
        """Whether to publish; if so it counts as said."""
        phases = tuple((r.deployment, r.stage, r.epoch, r.phase, r.detail, r.restarts) for r in applied.stages)
        heard = (applied.epoch, applied.refused_epoch, applied.refused_because)
        now = _Said((heard, *phases), tuple(report.fetched_bytes for report in applied.stages))
        if now == self._said:
            return False
        urgent = self._said is None or now.phases != self._said.phases
        if not urgent and now_s - self._said_s < PROGRESS_PERIOD_S:
            return False
        self._said, self._said_s = now, now_s
        return True


def reply_to(asked: Asked, command: Command, device: str, outcome: Outcome) -> Reply:
    """The answer to a command whose job is over."""
    error = outcome.error
    result: dict[str, object] = {"measured": outcome.measured, "failed": dict(outcome.failed)}
    if asked.verb == "probe-link" and not error:
        if isinstance(outcome.link, LinkMeasurement):
            result = {"link": msgspec.to_builtins(outcome.link)}
        else:
            error = outcome.link.because
    if asked.verb == "sustain" and not error:
        if isinstance(outcome.sustained, Sustained):
            result = {"windows": len(outcome.sustained.windows)}
        else:
            error = outcome.sustained.because
    if asked.verb == "probe-ways" and not error:
        result = {
            "round_trip_s": {url: outcome.ways[url] for url in asked.urls if url in outcome.ways},
            "failed": {url: outcome.ways_failed[url] for url in asked.urls if url in outcome.ways_failed},
        }
    if asked.verb == PROBE_PAIR and not error:
        measures = asked.pair is not None and asked.pair.measure
        found = outcome.pair
        if found is None or isinstance(found, Failed) or (measures and isinstance(found, Absent)):
            error = found.because if found is not None else "it was not measured"
        result = {"pair": msgspec.to_builtins(found)} if measures else {}
    return Reply(id=command.id, device=device, ok=not error, error=error[:4096], result={} if error else result)


def refusal_of(command: Command, device: str, problem: str) -> Reply:
    return Reply(id=command.id, device=device, ok=False, error=problem[:4096])
