"""A link becomes ten times slower while answers run: it is noticed without a byte more, and what runs moves away from
it, once; pairs of boards are measured before, as a plan would use them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import pytest

from testbed.boards import BoardSpec
from testbed.links import LinkSpec
from testbed.site import until
from tests.e2e.hot import Answers, plan_of, running, said
from tests.e2e.noise import Trial, undisturbed
from tests.e2e.site import Site
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.broker import mosquitto_path

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")

LINK: Final = LinkSpec(rate_bytes_per_s=100e6 / 8, delay_s=0.002)
SLOWER: Final = LinkSpec(rate_bytes_per_s=10e6 / 8, delay_s=0.020)
NOTICED_S: Final = 25.0
"""Three windows of two seconds, and the round trips of two boards on a machine that does other things too."""

MOVED_S: Final = 30.0
"""What was asked for: faster than before within it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config("llama", blocks=6, hidden=128, ffn=256, heads=4, kv_heads=2, head_dim=32, max_context=512)
    return str(write_gguf(tmp_path_factory.mktemp("model") / "small.gguf", config, random_tensors(config, 0), "F32"))


def linked(names: tuple[str, ...]) -> tuple[BoardSpec, ...]:
    """Equal boards, all on one kind of link."""
    return tuple(BoardSpec(name=name, speed=0.3, memory_bytes=1 << 30, link=LINK) for name in names)


def used(site: Site) -> list[str]:
    return [stage["device"] for stage in plan_of(site)["stages"]]


def slowed(site: Site, model: str, boards: int) -> None:
    """Slow the link of a board that is used, and see that what runs leaves it, once, and is faster then."""
    asked: dict[str, Any] = {"boards_at_least": boards, "boards_at_most": boards, "speculate": "off", "max_tokens": 350}
    with Answers(site, model, **asked) as answers:
        until(lambda: len(answers.times) > 30, 300.0, "tokens")
        time.sleep(10.0)
        assert not said(site, "link-slow"), "all links are as they measured"
        epoch, slow = plan_of(site)["epoch"], used(site)[-1]
        began_s = time.monotonic()
        before, predicted = answers.rate(began_s - 8, began_s), 1 / plan_of(site)["predicted_token_s"]
        site.boards.set_link(slow, SLOWER)
        until(lambda: bool(said(site, "link-slow")), NOTICED_S, "it is noticed")
        noticed_s = time.monotonic()
        bad = answers.rate(began_s + 1, noticed_s)
        until(lambda: bool(said(site, "deployment-moved")), MOVED_S - (noticed_s - began_s), "it moves")
        moved_s = time.monotonic()
        until(lambda: answers.rate(time.monotonic() - 3, time.monotonic()) > 1.3 * bad, MOVED_S, "it is faster")
        faster_s = time.monotonic()
        time.sleep(12.0)
        end_s = time.monotonic()
        after = answers.rate(end_s - 8, end_s)
        notices = said(site, "link-slow")
    print(
        f"{boards} boards, {slow}: {before:.0f} tokens/s before ({predicted:.0f} predicted), {bad:.0f} slowed, "
        f"{after:.0f} after; noticed after {noticed_s - began_s:.1f} s, moved after {moved_s - began_s:.1f} s, faster "
        f"after {faster_s - began_s:.1f} s"
    )
    assert len(notices) == 1 and f"the link of {slow} " in notices[0], notices
    assert slow not in used(site) and plan_of(site)["epoch"] > epoch
    assert len(said(site, "deployment-moved")) == 1, "one move for one change"
    assert faster_s - began_s < MOVED_S and after > 0.7 * before and bad < 0.6 * before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ring_leaves_a_board_whose_link_became_ten_times_slower(model: str, tmp_path: Path) -> None:
    def attempt(trial: Trial) -> None:
        site = trial.site
        slowed(site, model, boards=3)
        pairs = {
            (device["device"], pair["peer"])
            for device in site.get("/v1/devices")["devices"]
            for pair in site.get(f"/v1/profiles/{device['device']}")["pairs"]
        }
        assert len(pairs) == 6, "all pairs of a small fleet were measured for the first plan"

    undisturbed(lambda number: running(tmp_path / str(number), linked(("one", "two", "three", "four"))), attempt)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_two_boards_the_one_whose_link_it_is_is_found_by_asking(model: str, tmp_path: Path) -> None:
    def attempt(trial: Trial) -> None:
        slowed(trial.site, model, boards=2)

    undisturbed(lambda number: running(tmp_path / str(number), linked(("one", "two", "three"))), attempt)
