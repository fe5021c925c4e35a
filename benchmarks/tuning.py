"""What rounds cost beyond computing and the factors themselves, and what they teach.

Overhead: the model of tests (200,000 parameters, frozen) on boards of this machine, each with a little text and one
step a round, so that a round is next to nothing but the way of about 1 MB of factors to and fro. Overhead of a round is
its time less the longest step of any board. With links as of Wi-Fi, a round beside that step and the factors' two ways.

Flower: the same number of clients and updates of the same size, without any work, in Flower (benchmarks/parts/flower);
and what crosses the loopback interface in a round beside twice the factors (to a broker and from it).

Schedule: the same boards on links of their own, told how fast to send as if they shared one: what rounds take beside
what was planned for them, and what an outbox at a pace takes beside bytes / pace.

Memory: what a process that trains SmolLM2 or MiniLM takes at its peak beside what was foretold, whole and in parts
(benchmarks/parts/peaks).

Served: what adapters in a deployment cost a decode step (benchmarks/parts/served).

Sections: MiniLM learns to tell the section of a Debian package from its description, on eight boards of which each has
the packages of other maintainers (benchmarks/parts/sections), in modes federated and split, beside the same training in
one place with all of them.

Series: which exercise somebody makes, by the watch at their wrist: a board per person (benchmarks/parts/series).

Policies: what each way of choosing who takes part comes to in the same time (benchmarks/parts/policies).

Killed: jobs in which somebody is killed at a random moment: all modes, fedsa, stack (benchmarks/parts/killed).

Footprint: what an agent that can train takes while it does nothing, and what its worker takes beyond torch and a model
(benchmarks/parts/footprint).

Together: models that boards train together, beside one place (benchmarks/parts/together).

Foretold: rounds beside what mode 'auto' says that they take (benchmarks/parts/foretold).

Private: what a budget leaves of learning, with one factor or both (benchmarks/parts/private).

Perplexity: SmolLM2 with frozen 4 bit weights on boards that each have a part of a real text (benchmarks/texts); that on
what all of them hold out, before and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.parts import (
    flower,
    footprint,
    foretold,
    killed,
    peaks,
    policies,
    private,
    sections,
    series,
    served,
    together,
)
from benchmarks.parts.jobs import events_of
from benchmarks.parts.sites import MODEL, await_links, whole_site
from benchmarks.report import Figure, at_least, at_most, emit, machine
from coordinator.client import Client
from coordinator.rounds.job import Adapter, Job, Rounds
from testbed.boards import BoardSpec, preset, with_data, with_link
from testbed.links import preset as link_of
from tests.e2e.site import write_tiny_model
from wire import topics
from wire.broker import start_broker
from wire.channel import Inbox, Outbox
from wire.frames import Kind, Parcel, Tensor
from wire.limits import CHUNK_BYTES_DEFAULT, LEAST_SUMMED
from wire.mqtt import MqttTransport
from wire.pace import Pace
from wire.transport import Link

COUNTS = (2, 4, 8, 16)
ROUNDS = 8
PARTS = (
    "overhead",
    "flower",
    "perplexity",
    "schedule",
    "memory",
    "served",
    "sections",
    "series",
    "policies",
    "private",
    "killed",
    "footprint",
    "together",
    "foretold",
)
TEXT = Path(__file__).parent / "texts" / "python_reference.txt"
KNOWN_AFTER = 4
"""Rounds in which boards are timed."""
LEAST_LETTERS = 80
"""Of a paragraph: headings and lines of code alone are left out."""

RANK = 68
"""Of all matrices of the model: 1 MB."""


def boards_with_text(folder: Path, count: int, link: str) -> tuple[BoardSpec, ...]:
    boards = preset("equal", count)
    boards = with_link(boards, None if link == "none" else link_of(link))
    for board in boards:
        text = "\n".join(json.dumps({"text": f"{board.name} says hello world {line} times"}) for line in range(4))
        (folder / f"{board.name}.jsonl").write_text(text, encoding="utf-8")
    return with_data(boards, "notes", folder)


def rounds_of(
    there: Client, model: str, rounds: int, each: Callable[[], None] = lambda: None, secure: bool = False, **more: Any
) -> list[dict[str, Any]]:
    job = Job(
        name="secure" if secure else "bench",
        secure=secure,
        model=model,
        data="notes",
        precision="f32",
        adapter=Adapter(rank=RANK, matrices=("q", "k", "v", "o", "gate", "up", "down")),
        rounds=Rounds(count=rounds, steps=1, batch_rows=1, row_tokens=16, held_out=0.0, learning_rate=1e-4, **more),
    )
    return events_of(there, job, each)[1:-1]  # the first waits for workers to load, the last trains nothing


def overhead_s(one: dict[str, Any]) -> float:
    return float(one["wall_s"] - max(device["compute_s"] for device in one["devices"].values()))


def measured(count: int, link: str, rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        model = str(write_tiny_model(Path(folder)))
        data = Path(folder) / "notes"
        data.mkdir()
        boards = boards_with_text(data, count, link)
        with whole_site("f32", boards, model) as site:
            await_links(site.there)
            found = rounds_of(site.there, model, rounds)
            sums = rounds_of(site.there, model, rounds, secure=True, at_least=3) if count >= LEAST_SUMMED else []
    name = f"{count} boards, {link}"
    payload = median(one["up_bytes"] / count for one in found)
    took_s = median(overhead_s(one) for one in found)
    figures = [
        Figure(f"{name}: an update", payload / 1e6, "MB"),
        Figure(f"{name}: a round", median(one["wall_s"] for one in found) * 1e3, "ms"),
        Figure(f"{name}: beyond computing", took_s * 1e3, "ms"),
    ]
    if sums:
        each_bytes = [one["up_bytes"] / count for one in sums]
        figures += [
            Figure(f"{name}: a secure round", median(one["wall_s"] for one in sums) * 1e3, "ms"),
            Figure(f"{name}: sent by each board in it", median(each_bytes) / payload, "x an update"),
        ]
    spec = link_of(link)
    if spec is not None and spec.rate_bytes_per_s:
        ways_s = 2 * payload / spec.rate_bytes_per_s
        ratio = median(one["wall_s"] / (one["wall_s"] - overhead_s(one) + ways_s) for one in found)
        figures.append(at_most(f"{name}: a round / (computing + bytes / rate)", ratio, "ratio", 1.15))
    return figures


def beside_flower(count: int, rounds: int) -> list[Figure]:
    """Our rounds without links between boards, and Flower's."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        model = str(write_tiny_model(Path(folder)))
        data = Path(folder) / "notes"
        data.mkdir()
        crossed: list[int] = []
        with whole_site("f32", boards_with_text(data, count, "none"), model) as site:
            found = rounds_of(site.there, model, rounds + 1, lambda: crossed.append(loopback_bytes()))
    payload = [2 * (one["up_bytes"] + one["down_bytes"]) for one in found]
    sent = [later - earlier for earlier, later in itertools.pairwise(crossed)]
    ours_s = median(overhead_s(one) for one in found)
    update = median(one["up_bytes"] / count for one in found)
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        theirs_s = median(flower.rounds_s(count, int(update) // 4, rounds, Path(folder)))
    name = f"{count} boards, {update / 1e6:.2f} MB"
    return [
        Figure(f"{name}: beyond computing", ours_s * 1e3, "ms"),
        Figure(f"{name}: a round of Flower", theirs_s * 1e3, "ms"),
        at_most(f"{name}: ours / Flower's", ours_s / theirs_s, "ratio", 0.1),
        at_most(f"{name}: bytes / factors", median(s / p for s, p in zip(sent, payload, strict=True)), "ratio", 1.03),
    ]


def loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def planned(count: int, link: str, rounds: int) -> list[Figure]:
    """What rounds take beside what was planned, once each board is known."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        model = str(write_tiny_model(Path(folder)))
        data = Path(folder) / "notes"
        data.mkdir()
        with whole_site("f32", boards_with_text(data, count, link), model) as site:
            found = rounds_of(site.there, model, rounds + KNOWN_AFTER, medium="shared")[KNOWN_AFTER - 1 :]
    name = f"{count} boards, {link}, shared"
    ratio = median(one["wall_s"] / one["expected_s"] for one in found)
    return [
        Figure(f"{name}: a round", median(one["wall_s"] for one in found), "s"),
        at_least(f"{name}: a round / planned", ratio, "ratio", 0.75),
        at_most(f"{name}: a round / planned, too", ratio, "ratio", 1.25),
    ]


def paced(rate: float = 500e3, total: int = 2_000_000) -> Figure:
    """How far an outbox is from its pace over a broker."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        broker = start_broker(Path(folder), "127.0.0.1", 0)
        try:
            near, far = (MqttTransport(broker.url, name, keepalive_s=30) for name in ("near", "far"))
            topic = topics.INBOX.on("bench", "pace", "0")
            inbox, outbox = Inbox(far, topic), Outbox(near, topic)
            for transport in (near, far):
                transport.start()
            while near.link is not Link.UP or far.link is not Link.UP:
                near.poll(0.01)
                far.poll(0.01)
            outbox.pace = Pace(rate, CHUNK_BYTES_DEFAULT)
            began_s = time.monotonic()
            outbox.send(Parcel(Kind.UPDATE, 1, 1, 0, 0, Tensor.of(np.zeros(total, np.uint8))))
            while inbox.take() is None:
                near.poll(0.01)
                far.poll(0.01)
                outbox.tick()
                inbox.tick()
            took_s = time.monotonic() - began_s
        finally:
            broker.stop()
    return at_most("an outbox off its pace", 100 * abs(took_s * rate / total - 1), "%", 10)


def learnt(precision: str, rounds: int) -> list[Figure]:
    """What SmolLM2 learns of a text that lies on two boards."""
    paragraphs = [part for part in TEXT.read_text(encoding="utf-8").split("\n\n") if len(part) > LEAST_LETTERS]
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        data = Path(folder)
        boards = preset("equal", 2)
        for number, board in enumerate(boards):
            text = "\n\n".join(paragraphs[number :: len(boards)])
            (data / f"{board.name}.txt").write_text(text, encoding="utf-8")
        job = Job(
            name="bench",
            model=MODEL,
            data="text",
            precision=precision,  # type: ignore[arg-type]
            adapter=Adapter(rank=8, matrices=("q", "v", "o", "down")),
            rounds=Rounds(count=rounds, steps=8, batch_rows=2, row_tokens=64, held_out=0.1, learning_rate=5e-4),
        )
        began_s = time.monotonic()
        with whole_site(precision, with_data(boards, "text", data)) as site:
            found = events_of(site.there, job)
    most = max(found[-2]["devices"].values(), key=lambda device: device["compute_s"])
    before, after = found[0]["held_out_loss"], found[-1]["held_out_loss"]
    name = f"smollm2 {precision}, 2 boards, {rounds} rounds"
    return [
        Figure(f"{name}: held-out perplexity before", math.exp(before), ""),
        Figure(f"{name}: held-out perplexity after", math.exp(after), ""),
        at_most(f"{name}: after / before", math.exp(after - before), "ratio", 0.98),
        Figure(f"{name}: a board computes in a round", most["compute_s"], "s"),
        Figure(f"{name}: sent by each board in a round", most["sent_bytes"] / 1e6, "MB"),
        Figure(f"{name}: all of it", time.monotonic() - began_s, "s"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--boards", type=int, nargs="+", default=list(COUNTS), help="how many take part")
    parser.add_argument("--link", choices=("none", "ethernet", "wifi"), default="none")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--precision", choices=("int4", "int8", "f32"), default="int4", help="of smollm2's weights")
    parser.add_argument("--plot", type=Path, help="private: draw its curves into this .html")
    parser.add_argument("--trials", type=int, default=20, help="killed: of each mode")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    figures: list[Figure] = []
    if "overhead" in given.parts:
        for count in given.boards:
            figures += measured(count, given.link, given.rounds + 1)
        if given.link == "none":
            figures += measured(4, "wifi", given.rounds + 1)
    if "flower" in given.parts:
        figures += beside_flower(given.boards[0] if len(given.boards) == 1 else 4, given.rounds)
    if "schedule" in given.parts:
        figures += [paced(), *planned(given.boards[0] if len(given.boards) == 1 else 4, given.link, given.rounds)]
    if "memory" in given.parts:
        figures += peaks.measure()
    if "served" in given.parts:
        figures += served.measure(given.precision)
    if "sections" in given.parts:
        figures += sections.measure(given.rounds)
    if "series" in given.parts:
        figures += series.measure()
    if "policies" in given.parts:
        figures += policies.measure()
    if "private" in given.parts:
        figures += private.measure(given.plot)
    if "killed" in given.parts:
        for mode in killed.MODES:
            figures += killed.measure(given.trials, mode)
    if "footprint" in given.parts:
        figures += footprint.measure()
    if "together" in given.parts:
        figures += together.measure()
    if "foretold" in given.parts:
        figures += foretold.measure()
    if "perplexity" in given.parts:
        figures += learnt(given.precision, given.rounds)
    conditions = {**machine(), "rank": RANK, "rounds": given.rounds, "link": given.link, "parts": given.parts}
    return 0 if emit("tuning", conditions, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
