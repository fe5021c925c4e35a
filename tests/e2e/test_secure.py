"""Secure jobs on real processes: the same adapter, of which the coordinator saw sums alone, whoever is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

pytest.importorskip("torch")

from coordinator.rounds.job import Job
from tests.e2e.site import Site
from tests.e2e.tuning import (
    adapter_of,
    follow,
    job,
    kill_the_coordinator_of,
    rounds_of,
    same,
    site_of,
    worker_of,
)
from wire.errors import EdgelamError
from wire.privacy import Privacy

pytestmark = pytest.mark.torch

BOARDS = ("board1", "board2", "board3", "board4")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(tmp_path_factory.mktemp("secure"), BOARDS, BOARDS) as made:
        yield made


def secure(model: str, name: str, **changes: Any) -> Job:
    rounds = {"at_least": 3, **changes.pop("rounds", {})}
    return msgspec.structs.replace(job(model, name, **rounds), **{"secure": True, **changes})


@pytest.fixture(scope="module")
def undisturbed(site: Site, tiny_model: str) -> dict[str, Any]:
    rounds = rounds_of(site, secure(tiny_model, "calm"))
    for one in rounds[:2]:
        assert set(one["devices"]) == set(BOARDS) and not any(told["refused"] for told in one["devices"].values())
        assert one["up_bytes"] > 0
    assert rounds[2]["held_out_loss"] < rounds[0]["held_out_loss"], "two rounds have taught it something"
    return adapter_of(site, "calm")


def test_masked_it_comes_to_the_same_but_for_rounding(site: Site, tiny_model: str) -> None:
    rounds_of(site, secure(tiny_model, "plain", secure=False, rounds={"count": 1}))
    rounds_of(site, secure(tiny_model, "once", rounds={"count": 1}))
    plain, masked = adapter_of(site, "plain"), adapter_of(site, "once")
    assert plain.keys() == masked.keys()
    for name in plain:
        # 4^2 * 0.24 * 8 / (2^32 * the sum of weights) is 3e-9; and float32: a step of what A holds is 2e-7.
        most = 2e-8 if "lora_B" in name else 5e-7
        assert float(np.abs(plain[name] - masked[name]).max()) < most, name
    assert max(float(np.abs(plain[name]).max()) for name in plain if "lora_B" in name) > 0.01, "it has moved"


def test_it_is_told_that_updates_were_masked(site: Site, undisturbed: dict[str, Any]) -> None:
    with site.client() as there:
        provenance = msgspec.json.decode(there.file("/v1/jobs/calm/provenance.json"))
    assert provenance["updates"].startswith("masked")
    shown = site.cli("tune", "report", "calm")
    assert "updates were masked" in shown.stdout.lower(), shown.stdout
    assert "masked" in site.cli("tune", "status", "calm").stdout


@pytest.mark.slow
def test_a_worker_that_is_killed_does_its_round_again(site: Site, tiny_model: str, undisturbed: dict[str, Any]) -> None:
    killed: list[psutil.Process] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round" and not killed:
            killed.append(worker_of(site, "board2"))
            killed[0].kill()

    end = follow(site, secure(tiny_model, "killed-worker"), kill_once)
    assert killed and end["state"] == "done", end
    assert same(adapter_of(site, "killed-worker"), undisturbed)


@pytest.mark.slow
def test_a_coordinator_that_is_killed_goes_on_with_the_round(
    site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    kill_the_coordinator_of(site, secure(tiny_model, "killed-hub"), BOARDS)
    assert same(adapter_of(site, "killed-hub"), undisturbed)


@pytest.mark.slow
def test_noise_of_the_board_goes_on_before_the_mask(site: Site, tiny_model: str) -> None:
    wanted = secure(tiny_model, "private", privacy=Privacy(epsilon=3.0))
    rounds = rounds_of(site, wanted)
    assert [one["round"] for one in rounds] == [0, 1]
    assert all(told["noise"] > 0.5 for one in rounds for told in one["devices"].values())


def test_what_needs_single_updates_is_refused_before_anything_starts(site: Site, tiny_model: str) -> None:
    with pytest.raises(EdgelamError, match=r"rounds\.middle: 'median' looks at each update"):
        follow(site, secure(tiny_model, "none", rounds={"middle": "median"}))


@pytest.mark.slow
def test_a_board_that_is_lost_in_a_round_is_left_out_of_its_sum(site: Site, tiny_model: str) -> None:
    """Last: the board is stopped while the second round is made, and stays away."""
    stopped: list[psutil.Process] = []

    def stop_once(event: dict[str, Any]) -> None:
        rounds.append(event)
        if event["event"] == "round" and not stopped:
            pid = next(found.pid for found in site.boards.status().boards if found.name == "board4")
            board = psutil.Process(pid)
            stopped.extend([board, *board.children(recursive=True)])
            for process in stopped:
                process.suspend()

    rounds: list[dict[str, Any]] = []
    began_s = time.monotonic()
    try:
        end = follow(site, secure(tiny_model, "lost", rounds={"timeout_s": 8.0}), stop_once)
    finally:
        for process in reversed(stopped):
            process.resume()
    assert end["state"] == "done" and time.monotonic() - began_s < 100, end
    done = [event for event in rounds if event["event"] == "round"]
    assert not any(told["refused"] for told in done[0]["devices"].values())
    assert {board for board, told in done[1]["devices"].items() if told["refused"]} == {"board4"}
    assert done[2]["held_out_loss"] < done[0]["held_out_loss"]
