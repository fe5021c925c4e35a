"""Jobs in which somebody is killed at a random moment (kill -9): what comes of them beside one in which nobody was.

A board that is killed loses its agent and all workers, and is switched on again; a coordinator is started again with
what it has on disk; a worker and a broker are their owners' to start again. The jobs have one seed and the same boards,
so their adapters are to be the same, bit by bit: an update that was lost, or counted twice, would change them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import msgspec
import psutil

from benchmarks.report import Figure, at_least, at_most
from coordinator.rounds.job import Adapter, Job, Rounds
from models.lora.adapter import HEAD_FILE
from models.lora.serving import TENSORS
from testbed import commands
from testbed.boards import BoardSpec, with_data
from testbed.site import CoordinatorProcess, until
from tests.e2e.site import Site, prefer_own_ports, write_tiny_model
from tests.models.tiny_bert import write_bert
from wire.errors import EdgelamError, UsageError

BOARDS: Final = ("board1", "board2")
VICTIMS: Final = ("a worker", "a board", "the coordinator", "the broker")
PATIENCE_S: Final = 180.0
"""For one job, whatever happens in it."""


RULES: Final = ("fedsa", "stack")
"""Of federated jobs, by which boards keep factors, or begin with fresh ones."""
MODES: Final = ("federated", "split", "pipeline", "looped", *RULES)
LABELS: Final = ("odd", "even")
"""Where there is no text to learn but that of a sentence encoder."""


class Found(NamedTuple):
    """What came of a job."""

    adapter: bytes
    rounds: list[int]
    """As they count."""


def measure(trials: int, mode: str) -> list[Figure]:
    rng = random.Random(1)
    killed: Counter[str] = Counter()
    same = 0
    took_s: list[float] = []
    with running(mode) as (site, model):
        calm_s, calm = undisturbed(site, model, mode)
        for number in itertools.count():
            if killed.total() == trials:
                break
            victim = VICTIMS[killed.total() % len(VICTIMS)]
            at_s = rng.uniform(0, calm_s)
            began_s = time.monotonic()
            found = disturbed(site, job_of(model, f"{mode}-{number}", mode), victim, at_s, rng)
            if found is None:
                continue  # it was over before, or there was no such process at that moment
            took_s.append(time.monotonic() - began_s)
            fits = found.adapter == calm and found.rounds == list(range(len(found.rounds)))
            same += fits
            killed[victim] += 1
            said = "the same" if fits else "ANOTHER ADAPTER"
            print(f"... {number}: {victim} killed after {at_s:.2f} s: {said}, {took_s[-1]:.1f} s", file=sys.stderr)
    return [
        *(Figure(f"{mode}: {victim} killed", count, "times") for victim, count in killed.items()),
        Figure(f"{mode}: an undisturbed job", calm_s, "s"),
        at_least(f"{mode}: adapters that are the same, bit by bit", same, "jobs", trials),
        at_most(f"{mode}: the longest job", max(took_s), "s", PATIENCE_S),
    ]


@contextlib.contextmanager
def running(mode: str = "federated") -> Iterator[tuple[Site, str]]:
    """A coordinator and two boards with notes, and a model for jobs of a mode."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as name:
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        for number, board in enumerate(BOARDS):
            said = [f"board {number} says hello world {line} times" for line in range(12)]
            lines = [json.dumps({"text": text, "label": LABELS[line % 2]}) for line, text in enumerate(said)]
            (notes / f"{board}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        prefer_own_ports(folder)
        coordinator = CoordinatorProcess(folder, f"killed-{os.getpid()}")
        site = Site(folder, coordinator, coordinator.start())
        try:
            specs = with_data(tuple(BoardSpec(name=board, memory_bytes=2 << 30) for board in BOARDS), "notes", notes)
            options = commands.UpOptions(site=coordinator.site, boards=specs, state_dir=folder / "testbed")
            with commands.up(options) as site.testbed:
                site.await_states(dict.fromkeys(BOARDS, "online"))
                yield site, str(write_bert(folder / "bert") if mode == "looped" else write_tiny_model(folder))
        finally:
            coordinator.stop()


def job_of(model: str, name: str, mode: str) -> Job:
    """`mode` is a job's, or a rule."""
    rule, mode = (mode, "federated") if mode in RULES else ("fedavg", mode)
    rounds = Rounds(
        count=4, steps=3, row_tokens=24, batch_rows=2, learning_rate=0.02, held_out=0.2, aggregation=rule,  # type: ignore[arg-type]
    )  # fmt: skip
    job = Job(name=name, model=model, data="notes", mode=mode, precision="f32", seed=5, rounds=rounds)  # type: ignore[arg-type]
    if mode == "looped":
        slower = msgspec.structs.replace(rounds, learning_rate=0.002)
        return msgspec.structs.replace(job, labels=LABELS, train="blocks", rounds=slower)
    ranks, most_rank = ({"board1": 1}, 8) if rule == "stack" else ({}, Adapter().most_rank)
    adapter = Adapter(rank=2, matrices=("q", "v", "down"), ranks=ranks, most_rank=most_rank)
    return msgspec.structs.replace(job, adapter=adapter)


def undisturbed(site: Site, model: str, mode: str) -> tuple[float, bytes]:
    """How long a job takes once the coordinator has read the model, and its adapter."""
    took_s = []
    for number in range(4):
        name = begin(site, job_of(model, f"{mode}-calm-{number}", mode))
        began_s = time.monotonic()
        row = finished(site, name)
        took_s.append(time.monotonic() - began_s)
        if row["state"] != "done":
            raise UsageError(f"a job that nobody disturbed {row['state']}: {row['because']}")
    return median(took_s[1:]), adapter_of(site, name)


def disturbed(site: Site, job: Job, victim: str, at_s: float, rng: random.Random) -> Found | None:
    """What comes of a job in which somebody is killed so long after it was begun; None if nobody was."""
    begin(site, job)
    time.sleep(at_s)
    struck = state_of(site, job.name)["state"] == "running" and strike(site, victim, rng)
    row = finished(site, job.name)
    if not struck:
        return None
    if row["state"] != "done":
        print(f"... {job.name} {row['state']}: {row['because']}\n{site.log_ends()}", file=sys.stderr)
        return Found(b"", [])
    each = site.get(f"/v1/jobs/{job.name}/rounds")["each"]
    return Found(adapter_of(site, job.name), [one["round"] for one in each])


def begin(site: Site, job: Job) -> str:
    """Begin a job; its name, once the coordinator has said that it has it."""
    site.await_states(dict.fromkeys(BOARDS, "online"))
    told: queue.Queue[str] = queue.Queue()

    def follow() -> None:
        try:
            with site.client() as there:
                for event in there.stream("/v1/jobs", job):
                    told.put(event["event"])
        except EdgelamError as error:  # it may be killed under us
            told.put(str(error))

    threading.Thread(target=follow, daemon=True).start()
    while (event := told.get(timeout=PATIENCE_S)) != "begun":
        if event != "status":
            raise UsageError(f"{job.name} was not begun: {event}")
    return job.name


def finished(site: Site, name: str) -> dict[str, Any]:
    """The row of a job that is over."""
    found: dict[str, Any] = {}

    def over() -> bool:
        with contextlib.suppress(EdgelamError):
            found.update(state_of(site, name))
        return bool(found.get("state", "running") != "running")

    until(over, PATIENCE_S, f"{name} is over")
    return found


def state_of(site: Site, name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = site.get("/v1/jobs")["jobs"]
    return next(row for row in rows if row["job"] == name)


def strike(site: Site, victim: str, rng: random.Random) -> bool:
    """Kill, and start again what nobody else does; False if there is no such process."""
    board = rng.choice(BOARDS)
    if victim in ("a worker", "the broker"):
        board_pid = next(found.pid for found in site.boards.status().boards if found.name == board)
        host = site.coordinator.process
        assert host is not None
        pid, words = (board_pid, "agent.workers.training") if victim == "a worker" else (host.pid, "mosquitto")
        return kill_of(pid, words)
    if victim == "the coordinator":
        site.coordinator.kill()
        site.await_broker_gone()
        site.restart_coordinator()
    else:
        site.boards.kill(board)
        site.boards.start(board)
    return True


def kill_of(pid: int, words: str) -> bool:
    """All processes below one, in whose command line these words are; False if there are none."""
    killed = False
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(child.cmdline()):
                child.kill()
                killed = True
    return killed


def adapter_of(site: Site, name: str) -> bytes:
    """With the task module, if there is one."""
    files = (TENSORS, HEAD_FILE) if "looped" in name else (TENSORS,)
    with site.client() as there:
        return b"".join(there.file(f"/v1/jobs/{name}/{file}") for file in files)
