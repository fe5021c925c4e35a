"""Jobs in which boards keep B for themselves, or begin each round with fresh factors, on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

from coordinator.rounds.job import Job
from tests.e2e.losses import PROMPT, Model
from tests.e2e.site import Site
from tests.e2e.test_tuning import merged
from tests.e2e.tuning import (
    TRAINED,
    adapter_of,
    job,
    kill_the_coordinator_of,
    killing_a_worker,
    own_adapter,
    own_folder,
    rounds_of,
    same,
    tuning_site,
)
from wire.errors import EdgelamError
from wire.messages import Sampling

pytestmark = pytest.mark.torch

__all__ = ["tuning_site"]


def ranked(model: str, name: str, **rounds: Any) -> Job:
    wanted = job(model, name, aggregation="stack", **rounds)
    adapter = msgspec.structs.replace(wanted.adapter, ranks={"board1": 1}, most_rank=8)
    return msgspec.structs.replace(wanted, adapter=adapter)


@pytest.mark.slow
def test_with_fedsa_whoever_is_killed_all_have_the_same_bits_and_a_board_s_own_adapter_answers(
    tuning_site: Site, tiny_model: str, tmp_path: Path
) -> None:
    site, names = tuning_site, ("calm-own", "killed-own", "killed-hub-own")
    rounds_of(site, job(tiny_model, names[0], aggregation="fedsa", count=3))
    killing_a_worker(site, job(tiny_model, names[1], aggregation="fedsa", count=3))
    kill_the_coordinator_of(site, job(tiny_model, names[2], aggregation="fedsa", count=3))
    for name in names[1:]:
        assert same(adapter_of(site, name), adapter_of(site, names[0]))
        for board in TRAINED:
            assert same(own_adapter(site, name, board), own_adapter(site, names[0], board))
    with pytest.raises(EdgelamError, match="each board that took part has its own"):
        site.run(tiny_model, 2, prompt=PROMPT, precision="f32", max_tokens=4, adapter=names[0])
    shown = site.cli("tune", "report", names[0])
    assert shown.returncode == 0 and "fedsa" in shown.stdout, shown.stdout
    mine = own_adapter(site, names[0], "board1")
    folder = str(own_folder(site, names[0], "board1"))
    end = site.run(tiny_model, 2, prompt=PROMPT, precision="f32", max_tokens=24, adapter=folder)
    model = merged(tiny_model, mine, 2.0, tmp_path)
    assert end["token_ids"] == model.says(model.prompt, 24, Sampling())
    base = Model(tiny_model, tmp_path / "base", "f32")
    assert end["token_ids"] != base.says(base.prompt, 24, Sampling())


@pytest.mark.slow
def test_with_stack_boards_of_unequal_ranks_come_to_the_same_bits_whoever_is_killed(
    tuning_site: Site, tiny_model: str, tmp_path: Path
) -> None:
    site = tuning_site
    rounds = rounds_of(site, ranked(tiny_model, "calm-stack", count=3))
    calm = adapter_of(site, "calm-stack")
    sides = [values.shape for values in calm.values()]
    per_rank = 4 * sum(max(shape) for shape in sides)
    assert {min(shape) for shape in sides} == {8}, "three ranks a round, eight at most"
    assert [one["down_bytes"] for one in rounds] == [2 * rank * per_rank for rank in (0, 3, 6, 8)]
    assert [one["up_bytes"] for one in rounds[:3]] == [3 * per_rank] * 3, "each sends what it has trained"
    assert [one["lost"] for one in rounds[:2]] == [0, 0] and rounds[2]["lost"] > 0 and rounds[3]["lost"] is None
    assert rounds[-1]["held_out_loss"] < rounds[0]["held_out_loss"]
    killing_a_worker(site, ranked(tiny_model, "killed-stack", count=3))
    kill_the_coordinator_of(site, ranked(tiny_model, "killed-hub-stack", count=3))
    for name in ("killed-stack", "killed-hub-stack"):
        assert same(adapter_of(site, name), calm)
    end = site.run(tiny_model, 2, prompt=PROMPT, precision="f32", max_tokens=24, adapter="calm-stack")
    model = merged(tiny_model, calm, 2.0, tmp_path)
    assert end["token_ids"] == model.says(model.prompt, 24, Sampling())
