"""A job on a site of processes, for measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from coordinator.client import Client
from coordinator.commands.tune import round_text
from coordinator.rounds.job import Job


def events_of(there: Client, job: Job, each: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """The rounds of a job; `each` is called behind every one."""
    found = []
    for event in there.stream("/v1/jobs", job):
        if event["event"] == "status":
            print(f"... {event['text']}", file=sys.stderr)
        elif event["event"] == "round":
            print(f"... {round_text(event)}", file=sys.stderr)
            found.append(event)
            each()
        elif event["event"] == "end" and event["state"] != "done":
            raise SystemExit(f"the job {event['state']}: {event['because']}")
    return found
