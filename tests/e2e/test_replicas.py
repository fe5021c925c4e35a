"""With two copies of each stage a lost board costs no download: the copy on another board takes over."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.e2e.losses import (
    FAULTS,
    SETTLE_S,
    TOKENS,
    Model,
    answer,
    await_nothing_left,
    check,
    plan_anew,
    plan_of,
    sampling_of,
    workers_of,
)
from tests.e2e.site import Site
from wire.errors import Refused

pytestmark = pytest.mark.timeout(300)

UNFETCHED = iter(("int8", "f32"))
"""Precisions of which no board holds anything yet: one for each try of a test."""

IDLE_S = 4.0
IDLE_SHARE = 0.05
"""Of a processor, that a copy may use while it waits."""


def fetched_bytes(site: Site) -> int:
    """What boards have fetched from the coordinator since it started."""
    with urllib.request.urlopen(f"{site.address['http_url']}/metrics") as page:
        found = re.search(r"^edgelam_artifact_bytes_total (\S+)$", page.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def copies(site: Site) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = site.get("/v1/status")["deployments"][0]["standbys"]
    return rows


def await_copies(site: Site, timeout_s: float = SETTLE_S) -> None:
    """Every stage has a copy that could take over now."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        rows, stages = copies(site), plan_of(site)["stages"]
        if {row["stage"] for row in rows if row["phase"] == "ready"} == {stage["stage"] for stage in stages}:
            return
        assert time.monotonic() < deadline_s, rows
        time.sleep(0.1)


def steps_of_copies(site: Site) -> int:
    where = {(standby["stage"], standby["device"]) for standby in plan_of(site)["standbys"]}
    return sum(
        row["prefill_steps"] + row["decode_steps"]
        for device in site.get("/v1/devices")["devices"]
        for row in device["counters"]
        if (row["stage"], device["device"]) in where
    )


def deploy(site: Site, model: Model, **changes: Any) -> None:
    plan_anew(site)
    answer(site, model, sampling_of(0), lambda: None, 1, replicas=2, **changes)
    await_copies(site)


@pytest.mark.parametrize(
    ("fault", "exact"),
    [
        pytest.param("board killed", True, marks=pytest.mark.slow),
        pytest.param("board stopped", False, marks=pytest.mark.slow),
        pytest.param("cable pulled", True, marks=pytest.mark.slow),
    ],
)
def test_a_lost_boards_stage_goes_on_on_its_copy_without_a_download(
    fault: str, exact: bool, losing_site: Site, model: Model
) -> None:
    """Exact ones are drawn, the other is greedy."""
    site, sampling = losing_site, sampling_of(1 if exact else 0)
    deploy(site, model)
    plan = plan_of(site)
    victim = plan["stages"][0]["device"]
    [heir] = [standby["device"] for standby in plan["standbys"] if standby["stage"] == 0]
    before = {process.pid for process in workers_of(site, heir)}
    assert steps_of_copies(site) == 0, "copies make no steps"
    cut = [(stage["first_block"], stage["end_block"]) for stage in plan["stages"]]
    fetched: list[int] = []
    undo: list[Callable[[], None]] = []

    def strike() -> None:
        fetched.append(fetched_bytes(site))
        undo.append(FAULTS[fault](site, victim))

    try:
        outcome = answer(site, model, sampling, strike, 15, exact=exact, replicas=2)
        fetched.append(fetched_bytes(site))
    finally:
        for heal in undo:
            heal()
    assert len(outcome.end["pauses"]) == 1
    check(outcome, model, sampling, exact=exact)
    [resumed] = [event for event in outcome.events if event["event"] == "resume"]
    assert resumed["boards"][0] == heir and victim not in resumed["boards"]
    assert fetched[0] == fetched[1], "bytes were fetched after the loss"
    after = plan_of(site)
    assert [(stage["first_block"], stage["end_block"]) for stage in after["stages"]] == cut
    assert before == {process.pid for process in workers_of(site, heir)}, "nothing was loaded again"
    site.await_states(dict.fromkeys(("board1", "board2", "board3"), "online"))
    await_copies(site)  # made again, on the board that came back or another
    assert plan_of(site)["epoch"] == after["epoch"] and plan_of(site)["replicas_because"] == ""
    await_nothing_left(site)


@pytest.mark.slow
@pytest.mark.flaky(reruns=1)  # as many tries as there are precisions
def test_without_copies_the_same_loss_costs_a_download(losing_site: Site, model: Model) -> None:
    """The control: what nobody has fetched yet (another precision) has to be fetched in the pause."""
    site = losing_site
    plan_anew(site)
    fields: dict[str, Any] = {"precision": next(UNFETCHED), "boards_at_most": 2}
    fetched: list[int] = []
    victims: list[str] = []

    def strike() -> None:
        fetched.append(fetched_bytes(site))
        victims.append(plan_of(site)["stages"][0]["device"])
        site.boards.kill(victims[0])

    try:
        outcome = answer(site, model, sampling_of(0), strike, 15, **fields)
        fetched.append(fetched_bytes(site))
    finally:
        for victim in victims:
            site.boards.start(victim)
    assert len(outcome.end["pauses"]) == 1 and len(outcome.end["token_ids"]) == TOKENS
    assert fetched[1] - fetched[0] > 10_000
    site.await_states(dict.fromkeys(("board1", "board2", "board3"), "online"))
    await_nothing_left(site)


@pytest.mark.slow
def test_a_copy_that_waits_costs_next_to_no_processor_time(losing_site: Site, model: Model) -> None:
    site = losing_site
    deploy(site, model)
    workers = [worker for board in site.boards.status().boards for worker in workers_of(site, board.name)]
    assert len(workers) == len(plan_of(site)["stages"]) + len(plan_of(site)["standbys"]) > 2
    before = [used_s(worker) for worker in workers]
    time.sleep(IDLE_S)
    shares = [(used_s(worker) - used) / IDLE_S for worker, used in zip(workers, before, strict=True)]
    assert max(shares) < IDLE_SHARE, shares


def used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.slow
def test_too_many_copies_are_refused_with_what_is_missing(losing_site: Site, model: Model) -> None:
    plan_anew(losing_site)
    with pytest.raises(Refused, match=r"4 copies of each stage need 4 boards, and there are 3"):
        answer(losing_site, model, sampling_of(0), lambda: None, 1, replicas=4)
    wanted = ("--context", "128", "--boards-at-least", "2", "--replicas", "2")
    found = losing_site.cli("plan", model.path, *wanted, "--explain")
    assert found.returncode == 0, found.stderr
    assert "copies that wait" in found.stdout and "after the loss of any one board" in found.stdout
