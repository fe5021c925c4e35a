"""Losses in the middle of an answer: what can be lost, what must come of it, and what may not be left behind."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import psutil
import pytest

from agent.workers.requests import chunks_of
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.resuming import answer_events
from coordinator.preparing import PREFILL_CHUNK_TOKENS
from models.build.pack import pack
from models.formats.checkpoint import open_checkpoint
from models.sampling import draw
from models.text import Tokenizer
from testbed import commands
from testbed.boards import BoardSpec
from testbed.links import LinkSpec
from testbed.site import CoordinatorProcess
from tests.e2e.site import Site, prefer_own_ports
from tests.models.stages import WIRE_OF, Ring
from wire.broker import mosquitto_path
from wire.messages import Sampling
from wire.mqtt import MqttTransport

PROMPT: Final = "hello world and more words " * 3
TOKENS: Final = 60
CONTEXT: Final = 256
BOARDS: Final = 3
LINK: Final = LinkSpec(delay_s=0.003)
"""Slow enough that a loss comes in the middle of an answer, and a link that can be cut."""

SETTLE_S: Final = 60.0
"""Processes start within a second, and within many on a machine that does other things too. Nothing waits it out."""


@contextmanager
def running_losses_site(folder: Path) -> Iterator[Site]:
    """A coordinator and three boards of unequal speed on links that can be cut."""
    name = f"loss-{random.SystemRandom().randrange(1 << 24):x}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name)
    site = Site(folder, coordinator, coordinator.start())
    try:
        boards = tuple(
            BoardSpec(name=f"board{number}", speed=speed, memory_bytes=1 << 30, link=LINK)
            for number, speed in ((1, 1.0), (2, 0.7), (3, 0.4))
        )
        site.testbed = commands.up(commands.UpOptions(site=name, boards=boards, state_dir=folder / "testbed"))
        site.testbed.await_connected(print)
        site.await_states({board.name: "online" for board in boards})
        yield site
    except BaseException:
        print(coordinator.log_end(40))
        raise
    finally:
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


class Model:
    """The model in this process: what the stages must say, whatever was lost."""

    def __init__(self, path: str, folder: Path, precision: str = "int4") -> None:
        self.path = path
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = open_checkpoint(Path(path), folder)
        self.tokenizer = Tokenizer.from_checkpoint(checkpoint)
        self.prompt = list(self.tokenizer.encode(PROMPT))
        self._ring = Ring.of(
            pack(checkpoint, precision, WIRE_OF[precision], folder), folder, (), context_tokens=CONTEXT
        )

    def says(self, ids: list[int], count: int, sampling: Sampling) -> list[int]:
        """`count` tokens behind these, which are run as a prompt."""
        given = np.array(ids, np.int64)
        for start, end in chunks_of(len(ids), PREFILL_CHUNK_TOKENS):
            logits = self._ring.step(given[start:end], start)
        tokens = [draw(logits, sampling, len(ids))]
        for position in range(len(ids), len(ids) + count - 1):
            tokens.append(draw(self._ring.step(np.array(tokens[-1:]), position), sampling, position + 1))
        return tokens

    def says_in_pairs(self, ids: list[int], count: int, sampling: Sampling) -> list[int]:
        """The same in steps of two rows, the second of which is a dummy."""
        logits = self._ring.step(np.array(ids, np.int64), 0, 2)[-1]
        tokens = [draw(logits, sampling, len(ids))]
        for position in range(len(ids), len(ids) + count - 1):
            logits = self._ring.step(np.array(tokens[-1:] * 2), position, 2)[0]
            tokens.append(draw(logits, sampling, position + 1))
        return tokens


class Outcome(NamedTuple):
    end: dict[str, Any]
    events: list[dict[str, Any]]
    pauses_s: list[float]
    """Longest gaps between two token events, as a client sees them, one per pause."""


def sampling_of(number: int) -> Sampling:
    """Greedy for even numbers."""
    return Sampling(temperature=1.2, top_k=40, seed=number) if number % 2 else Sampling()


def answer(
    site: Site, model: Model, sampling: Sampling, fault: Callable[[], None], after: int, **changes: Any
) -> Outcome:
    """One answer, with a fault after so many tokens."""
    fields: dict[str, Any] = {
        "model": model.path, "prompt": PROMPT, "raw": True, "max_tokens": TOKENS, "context_tokens": CONTEXT,
        "ignore_stop": True, "boards_at_least": 2, "objective": "throughput", "speculate": "off",
        "temperature": sampling.temperature,
        "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": sampling.seed,
    }  # fmt: skip
    request = GenerateRequest(**{**fields, **changes})
    events: list[dict[str, Any]] = []
    gaps: list[float] = []
    tokens, last_s, paused = 0, 0.0, False
    for event in answer_events(site.client, request):
        events.append(event)
        paused = paused or event["event"] == "pause"
        if event["event"] != "token":
            continue
        now_s = time.monotonic()
        if paused:
            gaps.append(now_s - last_s)
        tokens, last_s, paused = tokens + 1, now_s, False
        if tokens == after:
            fault()
    return Outcome(events[-1], events, gaps)


def check(outcome: Outcome, model: Model, sampling: Sampling, exact: bool | None) -> None:
    """Nothing given was taken back, and what came after each loss is what a prompt of all before gives: or, if it was
    to be exact, what would have come without any loss. None: its rows shared steps, whose last bits are others."""
    end = outcome.end
    streamed = [event["id"] for event in outcome.events if event["event"] == "token"]
    assert end["event"] == "end" and end["token_ids"] == streamed and len(streamed) == TOKENS
    assert end["text"] == model.tokenizer.decode(streamed) == "".join(
        event["text"] for event in outcome.events if event["event"] == "token"
    )  # fmt: skip
    kinds = [event["event"] for event in outcome.events if event["event"] in ("pause", "resume")]
    assert kinds == ["pause", "resume"] * len(end["pauses"])
    if exact:
        assert streamed == model.says(model.prompt, TOKENS, sampling)
        return
    if exact is None:
        return
    bounds = [0, *(pause["given"] for pause in end["pauses"]), TOKENS]
    for start, stop in pairwise(bounds):
        if start < stop:
            expected = model.says(model.prompt + streamed[:start], stop - start, sampling)
            assert streamed[start:stop] == expected, f"tokens {start} to {stop}"


# What is lost, and what undoes it.

Undo = Callable[[], None]


def workers_of(site: Site, board: str) -> list[psutil.Process]:
    [pid] = [found.pid for found in site.boards.status().boards if found.name == board]
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "agent.workers.inference" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def kill_worker(site: Site, board: str) -> Undo:
    for worker in workers_of(site, board):
        worker.kill()
    return lambda: None


def stop_worker(site: Site, board: str) -> Undo:
    """SIGSTOP to the worker alone: the agent's heartbeat goes on. The agent kills it."""
    for worker in workers_of(site, board):
        worker.send_signal(signal.SIGSTOP)
    return lambda: None


def kill_board(site: Site, board: str) -> Undo:
    site.boards.kill(board)
    return lambda: site.boards.start(board)


def kill_agent(site: Site, board: str) -> Undo:
    """Its workers end with it."""
    [pid] = [found.pid for found in site.boards.status().boards if found.name == board]
    psutil.Process(pid).kill()

    def again() -> None:
        site.boards.kill(board)
        site.boards.start(board)

    return again


def stop_board(site: Site, board: str) -> Undo:
    site.boards.pause(board)
    return lambda: site.boards.unpause(board)


def cut_link(site: Site, board: str) -> Undo:
    site.boards.cut(board)
    return lambda: site.boards.resume(board)


def pull_cable(site: Site, board: str) -> Undo:
    site.boards.stall(board)
    return lambda: site.boards.resume(board)


def reset_link(site: Site, board: str) -> Undo:
    site.boards.reset(board)
    return lambda: None


def kill_broker(site: Site, _board: str) -> Undo:
    until_s = time.monotonic() + SETTLE_S  # one that was killed by the last trial may still be on its way back
    while time.monotonic() < until_s:
        for child in psutil.Process(site.address["pid"]).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _is_broker(child):
                    child.kill()
                    return lambda: None
        time.sleep(0.1)
    pytest.fail("the coordinator runs no broker")


def _is_broker(process: psutil.Process) -> bool:
    """Not the shell that holds one (wire.child), whose words are the same."""
    words = process.cmdline()
    embedded = "wire.embedded" in words and Path(words[0]).name.startswith("python")
    return "mosquitto" in process.name() or embedded


AWAY_S: Final[list[float]] = []
"""For how long coordinators were away: whoever starts them again decides that."""

_STARTER: Final = ThreadPoolExecutor(1)
"""What it starts dies with its thread, which therefore stays."""


def kill_coordinator(site: Site, _board: str) -> Undo:
    """And start it again, as systemd does. Its broker dies with it."""
    began_s = time.monotonic()
    site.coordinator.kill()

    def again() -> None:
        site.await_broker_gone()
        site.restart_coordinator()
        AWAY_S.append(time.monotonic() - began_s)

    restarting = _STARTER.submit(again)

    def heal() -> None:
        restarting.result()
        site.await_states(dict.fromkeys(site.states(), "online"))

    return heal


def kill_own_broker(site: Site, board: str) -> Undo:
    """The broker that the board's agent runs for the stages on it (docs/decisions/0007)."""
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    [pid] = [found.pid for found in site.boards.status().boards if found.name == board]
    for child in psutil.Process(pid).children(recursive=True):
        if "mosquitto" in child.name():
            child.kill()
            return lambda: None
    pytest.fail(f"{board} runs no broker")


FAULTS: Final[dict[str, Callable[[Site, str], Undo]]] = {
    "worker killed": kill_worker,
    "worker stopped": stop_worker,
    "agent killed": kill_agent,
    "board killed": kill_board,
    "board stopped": stop_board,
    "link cut": cut_link,
    "cable pulled": pull_cable,
    "link reset": reset_link,
    "broker killed": kill_broker,
    "board's own broker killed": kill_own_broker,
    "coordinator killed": kill_coordinator,
}


# What is left.


def plan_of(site: Site) -> dict[str, Any]:
    plan: dict[str, Any] = site.get("/v1/status")["deployments"][0]["plan"]
    return plan


def plan_anew(site: Site) -> None:
    """Have the next request planned on all boards that are there."""
    with site.client() as there:
        for deployment in there.get("/v1/status")["deployments"]:
            there.delete(f"/v1/deployments/{deployment['name']}")


def leftovers(site: Site) -> list[str]:
    """What is on the boards that should not be: requests in slots, stages of no plan, workers of no stage."""
    found: list[str] = []
    wanted: dict[str, int] = {}
    for stage in (*plan_of(site)["stages"], *plan_of(site)["standbys"]):
        wanted[stage["device"]] = wanted.get(stage["device"], 0) + 1
    for device in site.get("/v1/devices")["devices"]:
        name = device["device"]
        if device["state"] != "online":
            found.append(f"{name} is {device['state']}")
        if len(device["stages"]) != wanted.get(name, 0) or any(row["phase"] != "ready" for row in device["stages"]):
            found.append(f"{name}: {[(row['epoch'], row['stage'], row['phase']) for row in device['stages']]}")
        live = sum(row["live"] for row in device["counters"])
        if live:
            found.append(f"{name}: {live} requests hold slots")
        if len(workers_of(site, name)) != wanted.get(name, 0):
            found.append(f"{name}: {len(workers_of(site, name))} workers")
    return found


def await_nothing_left(site: Site) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while found := leftovers(site):
        assert time.monotonic() < deadline_s, f"{found}\n{site.log_ends()}"
        time.sleep(0.2)


def retained_activations(site: Site) -> list[str]:
    found: list[str] = []
    transport = MqttTransport(site.address["mqtt_url"], "looks-for-leftovers", keepalive_s=10)
    everything = f"edgelam/v1/{site.coordinator.site}/act/#"
    transport.subscribe(everything, lambda message: found.append(message.topic) if message.retained else None)
    transport.start()
    deadline_s = time.monotonic() + 1.0
    while time.monotonic() < deadline_s:
        transport.poll(0.1)
    transport.close()
    return found


class Trial(NamedTuple):
    seed: int
    detection_s: float
    pause_s: float
    losses: int
    reason: str
    cut: tuple[tuple[str, int, int], ...]


def trial(site: Site, model: Model, fault: str, seed: int) -> Trial | None:
    """One answer with this fault at a random moment, on a random board of the plan; checks all but the time it took.
    None if the answer was over before anything was lost of it."""
    rng = random.Random(f"{fault} {seed}")
    sampling, exact = sampling_of(seed), seed % 4 in (1, 2)
    undo: list[Undo] = []
    plan_anew(site)

    def strike() -> None:
        devices = [stage["device"] for stage in plan_of(site)["stages"]]
        undo.append(FAULTS[fault](site, rng.choice(devices)))

    try:
        topology = "direct" if FAULTS[fault] is kill_own_broker else "auto"
        after = rng.randrange(1, TOKENS - 15)
        outcome = answer(site, model, sampling, strike, after, exact=exact, topology=topology)
    finally:
        for heal in undo:
            heal()
    check(outcome, model, sampling, exact)
    await_nothing_left(site)
    if not outcome.pauses_s:  # no token came behind it: the end alone may have been lost
        return None
    pause = outcome.end["pauses"][0]
    # A client knows at once that its coordinator is gone, and can do nothing until there is one.
    known_s = AWAY_S[-1] if FAULTS[fault] is kill_coordinator else pause["detection_s"]
    cut = tuple((s["device"], s["first_block"], s["end_block"]) for s in plan_of(site)["stages"])
    return Trial(seed, known_s, outcome.pauses_s[0], pause["losses"], pause["reason"], cut)


def figures(fault: str, trials: list[Trial]) -> str:
    """For docs/recovery.md: one row of its table."""
    detection = sorted(found.detection_s for found in trials)
    pause = sorted(found.pause_s for found in trials)
    return (
        f"| {fault} | {len(trials)} | {median(detection):.2f} | {percentile(detection, 0.95):.2f} "
        f"| {median(pause):.2f} | {percentile(pause, 0.95):.2f} | {len({found.cut for found in trials})} |"
    )


def percentile(ordered: list[float], share: float) -> float:
    return ordered[max(0, ceil(share * len(ordered)) - 1)]
