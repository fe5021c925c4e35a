"""Deployments are changed one at a time, and nobody waits longer than for what concerns him."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from coordinator import operations as operations_module
from coordinator.journal import DeployRequest
from coordinator.planning.best import best_plan
from coordinator.preparing import MAX_KIT_MODULES
from coordinator.turns import Hold, Holds
from tests.coordinator.memory_site import until
from tests.coordinator.operations_site import Checkpoint, Config, KitEntry, Packed, Prepared, Scenario, Site, silent
from tests.planning import boards
from wire import topics
from wire.errors import Degraded, Refused, Unreachable, UsageError
from wire.messages import Kit


def test_a_model_is_planned_ordered_and_ready_once_and_then_found(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        first = site.ensure()
        await site.ordered("tiny")
        site.report("ready")
        record, _ = await first
        again, _ = await site.ensure()
        assert again == record
        assert len(site.lab.coordinator.records()) == 1

    play(scenario)


def test_two_equal_requests_at_once_are_answered_by_one_deployment(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        works = [site.ensure(), site.ensure()]
        await site.ordered("tiny")
        site.report("ready")
        (one, _), (other, _) = await asyncio.gather(*works)
        assert one == other

    play(scenario)


def test_a_deployment_that_loads_holds_up_no_other(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        ready = site.ensure("ready")
        await site.ordered("ready")
        site.report("ready")
        await ready
        loading = site.ensure("loading")
        await site.ordered("loading")
        record, _ = await asyncio.wait_for(site.ensure("ready"), 5)
        assert record.name == "ready" and not loading.done()
        third = site.ensure("third")
        await site.ordered("third")
        for work in (loading, third):
            work.cancel()
        await asyncio.wait([loading, third])

    play(scenario)


def test_a_deployment_can_be_removed_while_it_loads_and_who_waits_is_told(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        work = site.ensure()
        await site.ordered("tiny")
        await asyncio.wait_for(site.operations.remove("tiny"), 5)
        with pytest.raises(Refused, match="was removed"):
            await work

    play(scenario)


# What runs is not replaced.


def test_a_request_with_other_settings_waits_for_those_that_run_and_says_for_what(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        running = Hold()
        first = await site.ensured(running)
        other = site.ensure(context_tokens=64)
        await until(lambda: any("waiting for it" in text for text in site.said), "it is said")
        assert any("1 request uses tiny" in text and "context 1024" in text for text in site.said)
        await asyncio.sleep(0.05)
        assert site.lab.coordinator.in_force(first) and not other.done()
        running.close()
        await site.carry_out(other)
        second, _ = await other
        assert second.plan.context_tokens == 64 and second.plan.epoch > first.plan.epoch

    play(scenario)


def test_what_runs_too_long_is_named_and_goes_on(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(site: Site) -> None:
        monkeypatch.setattr(operations_module, "BUSY_TIMEOUT_S", 0.05)
        await site.measured("a")
        first = await site.ensured(Hold())
        with pytest.raises(Refused, match=r"1 request uses tiny .*int4, latency, context 1024, 1 board"):
            await site.ensure(context_tokens=64)
        with pytest.raises(Refused, match="busy"):
            await site.operations.deploy(DeployRequest(model="tiny", objective="throughput"), silent)
        assert site.lab.coordinator.in_force(first)
        again, _ = await site.ensure()
        assert again == first, "and the next one is not kept from it"

    play(scenario)


def test_who_waits_for_a_change_is_not_overtaken_by_those_who_are_content_with_what_runs(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        running, newcomer = Hold(), Hold()
        await site.ensured(running)
        other = site.ensure(hold=newcomer, context_tokens=64)
        await until(lambda: any("waiting for it" in text for text in site.said))
        late = site.ensure()
        await until(lambda: "waiting for another change of tiny" in site.said)
        running.close()
        await site.carry_out(other)
        assert (await other)[0].plan.context_tokens == 64
        await asyncio.sleep(0.05)
        assert not late.done(), "it is now the one that waits"
        newcomer.close()
        await site.carry_out(late)
        assert (await late)[0].plan.context_tokens == 1024
        assert not len(site.operations._lines) and not len(site.operations._holds)

    play(scenario)


def test_a_busy_model_holds_up_no_other_model(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        await site.ensured(Hold())
        waits = site.ensure(context_tokens=64)
        await until(lambda: any("waiting for it" in text for text in site.said))
        another = site.ensure("another")
        await site.carry_out(another)
        assert (await another)[0].name == "another" and not waits.done()
        waits.cancel()
        await asyncio.wait([waits])

    play(scenario)


def test_a_deployment_that_is_broken_is_replaced_whoever_holds_it(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a", "b")
        first = await site.ensured(Hold())
        (device,) = first.orders
        site.lab.boards.pop(device).leave()
        await until(lambda: not site.operations.usable(first))
        second = await site.ensured(Hold())
        assert set(second.orders).isdisjoint(first.orders)

    play(scenario)


def test_a_request_that_is_over_holds_nothing_even_if_its_deployment_comes_late() -> None:
    holds, hold = Holds(lambda: None), Hold()
    hold.take(holds, ("tiny", 1))
    hold.take(holds, ("tiny", 2))
    assert (holds.count(("tiny", 1)), holds.count(("tiny", 2))) == (0, 1)
    hold.close()
    hold.take(holds, ("tiny", 3))
    assert not len(holds)


def test_a_stage_that_can_not_be_loaded_is_named(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        work = site.ensure()
        await site.ordered("tiny")
        site.report("failed", "no space left")
        with pytest.raises(Degraded, match="a could not load its stage: no space left"):
            await work

    play(scenario)


def test_a_failed_deployment_is_tried_anew_under_a_new_epoch(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        work = site.ensure()
        await site.ordered("tiny")
        site.report("failed", "no space left")
        await asyncio.wait([work])
        (failed,) = site.lab.coordinator.records()
        work = site.ensure()
        await until(lambda: site.lab.coordinator.records()[0] != failed)
        await until(lambda: site.lab.boards["a"].orders[-1].epoch > failed.plan.epoch)
        site.report("ready")
        record, _ = await work
        assert record.plan.epoch > failed.plan.epoch

    play(scenario)


def test_a_board_that_goes_away_while_it_loads_ends_the_waiting(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.measured("a")
        work = site.ensure()
        await site.ordered("tiny")
        site.lab.boards["a"].leave()
        with pytest.raises(Unreachable, match="offline"):
            await work

    play(scenario)


def test_without_any_board_it_is_said_what_to_start(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        with pytest.raises(Unreachable, match="no board is online") as raised:
            await site.ensure()
        assert "edgelam-agent" in raised.value.try_

    play(scenario)


def test_a_request_that_gives_up_lets_the_next_one_plan(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        await site.lab.with_boards("a")  # has measured nothing
        first = site.ensure()
        await until(lambda: any("measuring on a" in text for text in site.said))
        first.cancel()
        await asyncio.wait([first])
        await site.measured("a")
        second = site.ensure()
        await site.ordered("tiny")
        site.report("ready")
        record, _ = await second
        assert site.lab.coordinator.records() == [record]

    play(scenario)


@pytest.mark.parametrize("changes", [{"precision": "int3"}, {"objective": "beauty"}])
def test_words_that_mean_nothing_are_refused(changes: dict[str, str], play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        with pytest.raises(UsageError):
            await site.operations.preparing.plan(DeployRequest(model="tiny", **changes), silent)

    play(scenario)


def test_what_is_said_of_a_plan_is_sentences_with_a_full_stop_between_them() -> None:
    candidates = [boards.board("a", valid=False), boards.board("b", valid=False)]
    graph = boards.graph(8)
    rough = best_plan(graph, candidates, boards.request(boards_at_least=2), boards.address)
    asked, caution = rough.because.split(". ")
    assert asked.startswith("at least 2 boards") and caution.startswith("Some of the figures are unsteady")
    assert not rough.because.endswith(".")
    steady = best_plan(graph, [boards.board("a")], boards.request(), boards.address)
    assert "unsteady" not in steady.because


def test_removing_what_is_not_there_names_what_is(play: Callable[[Scenario], None]) -> None:
    async def scenario(site: Site) -> None:
        with pytest.raises(UsageError, match="nosuch"):
            await site.operations.remove("nosuch")

    play(scenario)


def test_the_kit_is_built_once_per_model_and_never_outgrows_its_message(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(site: Site) -> None:
        await site.operations.preparing.prepare("tiny", "int4", silent)
        await site.operations.preparing.prepare("tiny", "int4", silent)
        assert site.shelf.kits == 1
        for number in range(40):
            keys = [KitEntry(f"block-{number}-{part}", "block", {1: b"x"}) for part in range(3)]
            monkeypatch.setattr(site.shelf, "kit_of", lambda _prepared, keys=keys: keys)
            graph = boards.graph(1)
            modules = tuple(
                msgspec.structs.replace(module, profile_key=entry.key)
                for module, entry in zip(graph.modules, keys, strict=True)
            )
            prepared = Prepared(
                Packed(msgspec.structs.replace(graph, modules=modules), Config(), {}), Checkpoint(Path("x"))
            )
            await site.operations.preparing._offer_kit(prepared)  # type: ignore[arg-type]
        topic = topics.KIT.on("lab")
        await until(lambda: topic in site.lab.broker.retained and b"block-39-2" in site.lab.broker.retained[topic])
        kit = msgspec.json.decode(site.lab.broker.retained[topic], type=Kit)
        assert len(kit.modules) == MAX_KIT_MODULES

    play(scenario)
