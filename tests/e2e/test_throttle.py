"""A board gets hot while answers run: it is noticed, what runs moves away from it, and it does not move to and fro."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from testbed.site import until
from tests.e2e.hot import Answers, heated, longest_share, running, said, write_model
from tests.e2e.noise import Trial, undisturbed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.timeout(400)
def test_a_stream_leaves_a_board_that_gets_hot_and_is_nearly_as_fast_as_before(model: str, tmp_path: Path) -> None:
    def attempt(trial: Trial) -> None:
        found = heated(trial, model)
        assert len(found.pauses) == 1
        assert found.slowed < 0.7 * found.before, "the fault was one"
        assert found.after > 1.3 * found.slowed

    undisturbed(lambda number: running(tmp_path / str(number)), attempt)


@pytest.mark.timeout(400)
def test_a_board_that_is_hot_every_other_ten_seconds_moves_what_runs_once(model: str, tmp_path: Path) -> None:
    def attempt(trial: Trial) -> None:
        site = trial.site
        with Answers(site, model, objective="throughput") as answers:
            until(lambda: len(answers.times) > 100, 120.0, "tokens")
            hot = longest_share(site)
            for _ in range(2):
                for share in (0.3, 1.0):
                    trial.slow(hot, share)
                    time.sleep(10.0)
            assert len(said(site, "deployment-moved")) == 1 and not said(site, "device-as-measured")
        assert sum(len(end["pauses"]) for end in answers.ends) == 1

    undisturbed(lambda number: running(tmp_path / str(number)), attempt)
