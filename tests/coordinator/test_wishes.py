"""What `plan` and `run` are asked to keep, from the command line to the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.asked import checked
from coordinator.commands.wishes import pins_of, weights_of
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import deploy_request
from coordinator.journal import DeployRequest
from coordinator.turns import Hold
from tests.coordinator.operations_site import Scenario, Site
from wire.errors import UsageError


def test_pins_and_weights_are_pairs() -> None:
    assert pins_of(["embedding=pi4", "block.0=pi4"]) == (("embedding", "pi4"), ("block.0", "pi4"))
    assert weights_of(["latency=1", "memory=0.5"]) == (("latency", 1.0), ("memory", 0.5))
    assert pins_of(None) == weights_of(None) == ()
    for text in ("embedding", "=pi4", "embedding=", ""):
        with pytest.raises(UsageError, match="is not MODULE=BOARD"):
            pins_of([text])
    with pytest.raises(UsageError, match="could not convert"):
        weights_of(["latency=much"])


def test_two_pins_of_a_module_are_named_and_equal_ones_are_one() -> None:
    twice = DeployRequest(model="tiny", pins=(("head", "a"), ("embedding", "b"), ("head", "a")))
    assert checked(twice).pins == (("embedding", "b"), ("head", "a"))
    with pytest.raises(UsageError, match="pins of head contradict: a and b"):
        checked(DeployRequest(model="tiny", pins=(("head", "a"), ("head", "b"))))
    with pytest.raises(UsageError, match="weights for latency contradict"):
        checked(DeployRequest(model="tiny", objective="weighted", weights=(("latency", 1.0), ("latency", 2.0))))


def test_a_request_for_an_answer_has_all_that_a_deployment_can_be_asked_for() -> None:
    wishes = {"tokens_per_s": 3.0, "reserve_percent": 20.0, "engine": "torch", "weights": (("memory", 1.0),)}
    asked = deploy_request(GenerateRequest(model="tiny", pins=(("head", "a"),), excluded=("b",), **wishes))  # type: ignore[arg-type]
    assert {name: getattr(asked, name) for name in wishes} == wishes
    assert (asked.pins, asked.excluded) == ((("head", "a"),), ("b",))


def test_wishes_reach_the_plan_and_the_boards(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b", "c")
        record = await site.ensured(
            Hold(), objective="weighted", weights=(("memory", 1.0), ("latency", 2.0)), excluded=("c",),
            pins=(("head", "b"), ("embedding", "a")), reserve_percent=25.0, boards_at_most=2,
        )  # fmt: skip
        limits = record.plan.limits
        assert limits.pins == {"head": "b", "embedding": "a"} and limits.excluded == ("c",)
        assert limits.weights == {"latency": 2.0, "memory": 1.0} and limits.reserve_percent == 25.0
        assert [stage.device for stage in record.plan.stages] == ["a", "b"]
        assert record.plan.stages[1].head and record.plan.predicted_cost is not None
        assert {order.engine for orders in record.orders.values() for order in orders} == {"onnxruntime"}

    play(scenario)


def test_a_plan_for_a_load_is_put_in_force(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b")
        record = await site.ensured(Hold(), objective="throughput", tokens_per_s=5.0)
        assert record.plan.limits.tokens_per_s == 5.0 and "carries 5 tokens/s" in record.plan.because
        again = await site.ensured(Hold(), objective="throughput", tokens_per_s=5.0)
        assert again == record

    play(scenario)
