"""Adapters that share a deployment, and which of them stay when it is made anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coordinator import preparing as preparing_module
from coordinator.journal import DeployRequest
from coordinator.planning.planner import Infeasible
from tests.coordinator.operations_site import Scenario, Site
from wire.errors import Refused, UsageError
from wire.limits import MAX_ADAPTERS

ONE, OTHER = "1" * 32, "2" * 32


def test_requests_with_several_adapters_and_with_none_share_a_deployment(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        found = []
        for adapters in ((ONE,), (), (OTHER,), (ONE,), ()):
            work = site.ensure(adapters=adapters)
            await site.carry_out(work)
            found.append((await work)[0])
        assert [record.request.adapters for record in found] == [
            (ONE,), (ONE,), (ONE, OTHER), (ONE, OTHER), (ONE, OTHER),
        ]  # fmt: skip
        assert found[0] == found[1] and found[2] == found[3] == found[4]
        assert len(site.lab.coordinator.records()) == 1

    play(scenario)


def test_an_adapter_that_is_gone_keeps_no_other_from_being_deployed(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        await site.carry_out(site.ensure(adapters=(ONE,)))
        site.shelf.gone = {ONE}
        work = site.ensure(adapters=(OTHER,))
        await site.carry_out(work)
        assert (await work)[0].request.adapters == (OTHER,)
        assert any("not beside adapter 11111111" in line for line in site.said)
        with pytest.raises(UsageError, match="gone"):
            await site.ensure(adapters=(ONE,))

    play(scenario)


def test_engines_that_run_no_adapters_are_refused_and_none_is_planned_for(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        with pytest.raises(Refused, match="adapters run on onnxruntime"):
            await site.ensure(adapters=(ONE,), engine="tensorrt")
        work = site.ensure(adapters=(ONE,))
        await site.carry_out(work)
        assert [stage.engine for stage in (await work)[0].plan.stages] == ["onnxruntime"]

    play(scenario)
    assert preparing_module.plan_request(DeployRequest(model="m", adapters=(ONE,)), "m").engine == "onnxruntime"
    assert preparing_module.plan_request(DeployRequest(model="m"), "m").engine == "auto"


def test_a_later_adapter_of_a_job_takes_the_place_of_the_earlier_one(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        await site.carry_out(site.ensure(adapters=(ONE,)))
        site.operations.superseded = {ONE}
        work = site.ensure(adapters=(OTHER,))
        await site.carry_out(work)
        assert (await work)[0].request.adapters == (OTHER,)

    play(scenario)


def test_of_too_many_adapters_those_go_that_nobody_used_for_longest(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        ids = [f"{number:032x}" for number in range(MAX_ADAPTERS)]
        for adapter in (*ids, ids[0], "f" * 32):
            work = site.ensure(adapters=(adapter,))
            await site.carry_out(work)
        assert (await work)[0].request.adapters == (*ids[2:], ids[0], "f" * 32)

    play(scenario)


def test_an_explicit_deployment_has_no_adapters_but_its_own(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        await site.carry_out(site.ensure(adapters=(ONE,)))
        work = asyncio.ensure_future(site.operations.deploy(DeployRequest(model="tiny"), site.said.append))
        await site.carry_out(work)
        assert (await work).request.adapters == ()

    play(scenario)


def test_adapters_that_leave_no_room_are_left_out(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        await site.carry_out(site.ensure(adapters=(ONE,)))
        plan = site.operations.preparing.plan

        async def tight(request: DeployRequest, *given: Any) -> Any:
            if len(request.adapters) > 1:
                raise Infeasible("no room")
            return await plan(request, *given)

        monkeypatch.setattr(site.operations.preparing, "plan", tight)
        work = site.ensure(adapters=(OTHER,))
        await site.carry_out(work)
        assert (await work)[0].request.adapters == (OTHER,) and any("no room" in line for line in site.said)

    play(scenario)
