"""A site of boards that train, for tests: two with notes, one without."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from coordinator.rounds.job import Adapter, Job, Rounds
from models.formats import safetensors
from testbed import commands
from testbed.boards import BoardSpec, with_data
from testbed.links import LinkSpec
from testbed.site import CoordinatorProcess
from tests.e2e.site import Site, prefer_own_ports
from wire.errors import EdgelamError

BOARDS = ("board1", "board2", "idle")
TRAINED = BOARDS[:2]
LABELS = ("alone", "on a mat")


@pytest.fixture(scope="module")
def tuning_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two boards with notes, one without."""
    with site_of(tmp_path_factory.mktemp("tuning"), BOARDS, TRAINED) as site:
        yield site


@contextlib.contextmanager
def site_of(
    folder: Path, boards: Sequence[str], trained: Sequence[str], links: Mapping[str, LinkSpec] | None = None
) -> Iterator[Site]:
    """Boards of which some have notes, and some a link that is shaped."""
    notes = folder / "notes"
    notes.mkdir(parents=True)
    for number, board in enumerate(trained):
        lines = [
            {
                "text": f"board {number} says hello world {line} times" + line % 2 * " on the mat",
                "label": LABELS[line % 2],
            }
            for line in range(12 + 6 * number)
        ]
        text = "\n".join([*(json.dumps(line) for line in lines), "no json"])
        (notes / f"{board}.jsonl").write_text(text)
    name = f"tune-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name)
    site = Site(folder, coordinator, coordinator.start())
    try:
        link = (links or {}).get
        specs = tuple(BoardSpec(name=board, memory_bytes=2 << 30, link=link(board)) for board in boards)
        specs = with_data(specs, "notes", notes)
        site.testbed = commands.up(commands.UpOptions(site=name, boards=specs, state_dir=folder / "testbed"))
        site.testbed.await_connected(print)
        site.await_states(dict.fromkeys(boards, "online"))
        yield site
    except BaseException:
        print(coordinator.log_end(60))
        raise
    finally:
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


def job(model: str, name: str, **rounds: Any) -> Job:
    wanted = {"count": 2, "steps": 3, "row_tokens": 24, "batch_rows": 2, "learning_rate": 0.02, "held_out": 0.2}
    adapter = Adapter(rank=2, matrices=("q", "v", "down"))
    return Job(name=name, model=model, data="notes", precision="f32", seed=5, adapter=adapter,
               rounds=Rounds(**{**wanted, **rounds}))  # fmt: skip


def follow(site: Site, wanted: Job, on_event: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """All that happens in a job; gives its end."""
    end: dict[str, Any] = {}
    with site.client() as there:
        for event in there.stream("/v1/jobs", wanted):
            on_event(event)
            end = event
    assert end["event"] == "end", end
    return end


def rounds_of(site: Site, wanted: Job) -> list[dict[str, Any]]:
    """What was told of each round of a job that comes to its end."""
    rounds: list[dict[str, Any]] = []
    end = follow(site, wanted, lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done", end
    return rounds


def jobs(site: Site) -> dict[str, dict[str, Any]]:
    return {row["job"]: row for row in site.get("/v1/jobs")["jobs"]}


def kill_the_coordinator_of(site: Site, wanted: Job, boards: Sequence[str] = BOARDS) -> None:
    """Behind the first round of a job, and wait until another coordinator has brought it to its end."""
    began = threading.Event()

    def watch() -> None:
        with contextlib.suppress(EdgelamError):  # it is killed under us
            follow(site, wanted, lambda event: began.set() if event["event"] == "round" else None)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    assert began.wait(120)
    site.coordinator.kill()
    watching.join(30)
    site.await_broker_gone()
    site.restart_coordinator()
    site.await_states(dict.fromkeys(boards, "online"))
    deadline_s = time.monotonic() + 120
    while (row := jobs(site)[wanted.name])["state"] == "running":
        assert time.monotonic() < deadline_s, row
        time.sleep(0.2)
    assert row["state"] == "done", row


def adapter_of(site: Site, name: str) -> dict[str, Any]:
    with site.client() as there:
        data = there.file(f"/v1/jobs/{name}/adapter_model.safetensors")
    path = site.folder / f"{name}.safetensors"
    path.write_bytes(data)
    return {key: np.array(values) for key, values in safetensors.read(path).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def worker_of(site: Site, board: str) -> psutil.Process:
    """The process that trains on a board."""
    pid = next(found.pid for found in site.boards.status().boards if found.name == board)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for child in psutil.Process(pid).children(recursive=True):
            if "agent.workers.training" in " ".join(child.cmdline()):
                return child
        time.sleep(0.05)
    raise AssertionError(f"nobody trains on {board}")


def own_folder(site: Site, name: str, board: str) -> Path:
    [folder] = [path for path in site.folder.rglob(f"adapters/tune-{name}") if f"/{board}/" in str(path)]
    return folder


def own_adapter(site: Site, name: str, board: str) -> dict[str, Any]:
    found = safetensors.read(own_folder(site, name, board) / "adapter_model.safetensors")
    return {key: np.array(values) for key, values in found.items()}


def killing_a_worker(site: Site, wanted: Job) -> list[dict[str, Any]]:
    """All rounds of a job, a worker of which is killed behind the first."""
    rounds: list[dict[str, Any]] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            rounds.append(event)
            if len(rounds) == 1:
                worker_of(site, "board2").kill()

    end = follow(site, wanted, kill_once)
    assert end["state"] == "done", end
    return rounds
