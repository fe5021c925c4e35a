"""What a round takes beside what mode 'auto' foretells, in each of its modes: MiniLM learns labels on four slow boards
with links as of Ethernet, of which two have data. Texts are as long as rounds let them be, and nothing is held out.

What blocks take was measured when sentences went through them: a deployment asks for that before any job.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from benchmarks.parts import sections
from benchmarks.parts.sites import SLOWED, Site, await_links, whole_site
from benchmarks.report import Figure, at_least, at_most
from coordinator.items.requests import ItemsRequest
from coordinator.rounds.job import Adapter, Job, Rounds
from testbed.boards import preset, with_data, with_link
from testbed.links import preset as link_of

BOARDS: Final = 4
WITH_DATA: Final = 2
ROUNDS: Final = Rounds(count=5, steps=8, batch_rows=4, row_tokens=64, held_out=0.0)
JOINED: Final = 20
"""Descriptions that make a text: more tokens than a round takes of it."""
MODES: Final = ("federated", "split", "pipeline")
UNITS: Final = {"ms": 1e-3, "s": 1.0, "min": 60.0}


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        equal = [msgspec.structs.replace(board, speed=SLOWED) for board in preset("equal", BOARDS)]
        boards = with_link(equal, link_of("ethernet"))
        labels = _write(data, [board.name for board in boards[:WITH_DATA]])
        job = Job(
            name="auto", model=sections.MODEL, data="rows", labels=labels, mode="auto",
            adapter=Adapter(matrices=("q", "v")), rounds=msgspec.structs.replace(ROUNDS, count=1),
        )  # fmt: skip
        with whole_site("f32", with_data(boards, "rows", data), sections.MODEL) as site:
            await_links(site.there)
            _measure_blocks(site)
            times, figures = _told(site, job), []
            for mode in MODES:
                wanted: Any = msgspec.structs.replace(job, name=mode, mode=mode, rounds=ROUNDS)
                walls = [event["wall_s"] for event in _events(site, wanted) if event["event"] == "round"]
                took_s = median(walls[1:-1])  # the first waits for workers to load, the last trains nothing
                figures += [
                    Figure(f"{mode}: a round is foretold to take", times[mode], "s"),
                    Figure(f"{mode}: a round", took_s, "s"),
                    at_least(f"{mode}: a round / foretold", took_s / times[mode], "ratio", 0.75),
                    at_most(f"{mode}: a round / foretold, too", took_s / times[mode], "ratio", 1.25),
                ]
    return figures


def _write(data: Path, names: list[str]) -> tuple[str, ...]:
    packages = sections.drawn(list(sections.index()), 400)
    labels = sections.labels_of(packages)
    for number, name in enumerate(names):
        own = packages[number :: len(names)]
        texts = [" ".join(one.description for one in own[at : at + JOINED]) for at in range(len(own) - JOINED)]
        lines = [json.dumps({"text": text, "label": one.section}) for text, one in zip(texts, own, strict=False)]
        (data / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return labels


def _measure_blocks(site: Site) -> None:
    request = ItemsRequest(model=sections.MODEL, texts=("sea",), boards_at_least=BOARDS, boards_at_most=BOARDS)
    site.there.last("/v1/items", request, lambda _text: None)


def _told(site: Site, job: Job) -> dict[str, float]:
    """Mode -> what is foretold, of what is said before the first round."""
    said = next(event["text"] for event in _events(site, job) if "is foretold to take" in event.get("text", ""))
    found = re.findall(r"([0-9.]+) (\w+) (federated|split|pipeline)", said.split("is foretold to take")[1])
    return {mode: float(number) * UNITS[unit] for number, unit, mode in found}


def _events(site: Site, job: Job) -> list[dict[str, Any]]:
    found = list(site.there.stream("/v1/jobs", job))
    if found[-1].get("state") != "done":
        raise SystemExit(f"the job {found[-1].get('state')}: {found[-1].get('because')}")
    return found
