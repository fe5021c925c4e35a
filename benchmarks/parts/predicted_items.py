"""Items of one size beside their prediction: sentences of 64 tokens, or pictures.

One at a time for latency. For throughput as many at once as fill the stages twice over; what is timed are all of a
bunch, of which the first has to pass all stages and the others follow at the pace of the slowest part.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import psutil

from benchmarks.parts import load
from benchmarks.parts.sites import Site
from benchmarks.quiet import quietly
from coordinator.client import Client
from coordinator.items.requests import ItemsRequest, TensorBody
from models.catalog import find

ROWS: Final = 64
"""Of a sentence: so many are priced."""
PER_REQUEST: Final = {"encoder": 16, "image": 4}
"""Items, the median of which is a latency. Of pictures one request holds no more."""
BUNCH: Final = {"encoder": 64, "image": 16}
"""Items of a bunch, for throughput, at least."""
FILLED: Final = 2
"""Items on their way for each stage."""


class Bunch(NamedTuple):
    """`item_s` is the median of a request's items; `wall_s` from the first request to the last answer, or, of one
    request alone, without the way of the request itself."""

    items: int
    item_s: float
    wall_s: float
    end: dict[str, Any]


def kind_of(model: str) -> str:
    entry = find(model)
    return "language" if entry is None else entry.kind


def request(model: str, items: int, streams: int, **deployment: Any) -> ItemsRequest:
    """So many alike items."""
    if kind_of(model) == "encoder":
        # Two tokens stand around a text; "sea" is one.
        return ItemsRequest(model=model, texts=("sea " * (ROWS - 2),) * items, slots=streams, **deployment)
    picture = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    body = TensorBody(dtype="f32", shape=picture.shape, data=picture.tobytes())
    return ItemsRequest(model=model, items=({"": body},) * items, slots=streams, **deployment)


def answered(url: str, requests: Sequence[ItemsRequest]) -> Bunch:
    """Ask all at once; raises what the first that failed raised."""

    def ask(one: ItemsRequest) -> dict[str, Any]:
        with Client(url) as there:
            return there.last("/v1/items", one, lambda _text: None)

    began_s = time.monotonic()
    ends = load.at_once([partial(ask, one) for one in requests])
    wall_s = time.monotonic() - began_s
    items = sum(end["items"] for end in ends)
    if len(ends) == 1 and ends[0]["items_per_s"]:
        wall_s = items / ends[0]["items_per_s"]
    return Bunch(items, median(end["item_s"] for end in ends), wall_s, ends[-1])


class Measured(NamedTuple):
    plan: dict[str, Any]
    predicted_s: float
    measured_s: float
    compute_s: tuple[float, float]
    peak_bytes: Mapping[int, float]
    """Stage -> the most that its worker had resident while it answered."""
    lost_share: float


def measure(site: Site, rng: random.Random, model: str, names: Sequence[str]) -> Measured:
    """One deployment over some of the boards."""
    kind = kind_of(model)
    count = rng.randint(2, len(names))
    chosen = rng.sample(list(names), count)
    objective = rng.choice(("latency", "throughput"))
    streams = 1 if objective == "latency" else FILLED * count
    deployment = {
        "objective": objective, "boards_at_least": count, "boards_at_most": count, "topology": "central",
        "excluded": tuple(name for name in names if name not in chosen),
    }  # fmt: skip

    def ask(items: int) -> Bunch:
        requests = [items] if kind == "encoder" else [PER_REQUEST[kind]] * (items // PER_REQUEST[kind])
        return answered(site.there.url, [request(model, one, streams, **deployment) for one in requests])

    ask(PER_REQUEST[kind])
    for worker in workers(site).values():
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5", encoding="ascii")
    items = PER_REQUEST[kind] if objective == "latency" else max(BUNCH[kind], 2 * streams)
    quiet = quietly(partial(ask, items))
    found = quiet.value
    peaks = {device: _peak_bytes(worker.pid) for device, worker in workers(site).items()}
    records = site.there.get("/v1/status")["deployments"]
    [plan] = [record["plan"] for record in records if record["plan"]["deployment"] == found.end["deployment"]]
    token_s, slowest_s = plan["predicted_token_s"], plan["predicted_slowest_s"]
    if objective == "latency":
        predicted_s, measured_s = token_s, found.item_s
    else:
        pace_s = max(slowest_s, token_s / plan["slots"])
        predicted_s = (token_s + (found.items - 1) * pace_s) / found.items
        measured_s = found.wall_s / found.items
    stages = found.end["stages"]
    compute_s = (
        sum(stage["predicted_compute_s"] for stage in stages),
        sum(stage["measured_compute_s"] for stage in stages),
    )
    peak_bytes = {stage["stage"]: float(peaks[stage["device"]]) for stage in plan["stages"]}
    return Measured(plan, predicted_s, measured_s, compute_s, peak_bytes, quiet.lost_share)


def workers(site: Site) -> dict[str, psutil.Process]:
    """Board -> the process through which items go."""
    found = {}
    for board in site.boards.status().boards:
        for process in psutil.Process(board.pid).children(recursive=True):
            if "agent.workers.items" in process.cmdline():
                found[board.name] = process
    return found


def _peak_bytes(pid: int) -> int:
    """VmHWM: what is given back between items is among it, which a look now and then would not see."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
