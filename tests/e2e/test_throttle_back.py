"""A board that was hot and has cooled gets its share again, without haste. It runs beside test_throttle in CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.slowness import DWELL_S
from testbed.site import until
from tests.e2e.hot import Answers, blocks_of, heated, plan_of, running, said, write_model
from tests.e2e.noise import Trial, undisturbed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.timeout(600)
def test_a_hot_board_gets_less_to_do_and_its_share_again_when_it_has_cooled(model: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"objective": "throughput"}

    def attempt(trial: Trial) -> None:
        site = trial.site
        with Answers(site, model, max_tokens=8, **asked) as answers:
            until(lambda: bool(answers.ends), 120.0, "a first answer")
        equal = blocks_of(site)
        found = heated(trial, model, streams=3, **asked)
        assert 1 <= len(found.pauses) <= 3
        assert found.slowed < 0.8 * found.before, "the fault was one"
        assert found.after > 1.15 * found.slowed
        # It cools; answers go on, and nothing is disturbed for that.
        trial.slow(found.hot, 1.0)
        epoch = plan_of(site)["epoch"]
        with Answers(site, model, **asked) as answers:
            until(lambda: bool(said(site, "device-as-measured")), 5 * DWELL_S, "it is well again")
            assert plan_of(site)["epoch"] == epoch
        assert not [pause for end in answers.ends for pause in end["pauses"]]
        # The boards are alike: which of them have four blocks and which has three is no matter of speed, but of what
        # each has loaded. Where another board is slow by now, it may have more than that.
        least = min(equal.values())
        assert least >= 2
        until(lambda: blocks_of(site)[found.hot] >= least, 70.0, "when nobody uses it, it moves back")
        assert trial.others_slow() or sorted(blocks_of(site).values()) == sorted(equal.values())

    undisturbed(lambda number: running(tmp_path / str(number)), attempt)
