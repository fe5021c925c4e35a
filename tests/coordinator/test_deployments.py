"""Orders carry a plan out exactly, and readiness believes only reports of the plan's own epoch."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from msgspec import Struct

from coordinator.deployments import check_orders, deployment_name, desired_for, held_elsewhere, make_orders, readiness
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.planning.plan import Plan
from models.graph import Edge, Graph, Module
from tests.coordinator.plans import plan_of
from wire.errors import Refused
from wire.ids import is_name
from wire.messages import Applied, ArtifactRef, StageReport


class _Config(Struct, frozen=True):
    blocks: int = 4


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def graph_of(blocks: int) -> Graph:
    def module(name: str, kind: str, number: int) -> Module:
        return Module(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            profile_key=kind,
            weight_bytes=1000,
            artifacts=(digest(number),),
            kv_bytes_per_token=4,
            macs_per_token=1,
        )

    modules = [module("embedding", "embedding", 99)]
    modules += [module(f"block.{i}", "block", i) for i in range(blocks)]
    modules += [module("head", "head", 99)]
    edges = tuple(
        Edge(source=a.name, target=b.name, elements_per_token=8, bytes_per_token=16) for a, b in pairwise(modules)
    )
    return Graph(
        model="tiny",
        family="llama",
        precision="int4",
        wire_dtype="f16",
        hidden=8,
        vocabulary=32,
        blocks=blocks,
        max_context_tokens=256,
        modules=tuple(modules),
        edges=edges,
    )


def record_of(plan: Plan, blocks: int = 4) -> DeploymentRecord:
    orders = make_orders(
        plan,
        graph_of(blocks),
        _Config(),
        lambda stage: ArtifactRef(digest=digest(1000 + stage.stage), size_bytes=10),
        lambda found: ArtifactRef(digest=found, size_bytes=1000),
    )
    return DeploymentRecord(
        name=plan.deployment, request=DeployRequest(model="tiny"), plan=plan, orders=orders, checkpoint="tiny.gguf"
    )


def report(plan: Plan, stage: int, phase: str, epoch: int | None = None, detail: str = "") -> StageReport:
    return StageReport(
        deployment=plan.deployment,
        epoch=plan.epoch if epoch is None else epoch,
        stage=stage,
        phase=phase,  # type: ignore[arg-type]
        detail=detail,
    )


def applied(plan: Plan, device: str, *reports: StageReport) -> Applied:
    return Applied(device=device, boot="ab", epoch=plan.epoch, stages=reports)


def test_each_stage_gets_the_files_of_its_modules_once_and_its_successor_in_the_ring() -> None:
    plan = plan_of("a", "b")
    orders = record_of(plan).orders
    (first,), (second,) = orders["a"], orders["b"]
    assert [weight.digest for weight in first.weights] == [digest(99), digest(0), digest(1)]
    assert [weight.digest for weight in second.weights] == [digest(2), digest(3), digest(99)]
    assert first.next == second.inbox
    assert second.next == first.inbox


def test_a_stage_with_tied_embedding_and_head_fetches_the_shared_file_once() -> None:
    (order,) = record_of(plan_of("a"), blocks=2).orders["a"]
    assert [weight.digest for weight in order.weights] == [digest(99), digest(0), digest(1)]
    assert order.next == order.inbox


def test_a_device_is_told_the_stages_of_all_deployments() -> None:
    record = record_of(plan_of("a", "b"))
    assert len(desired_for("a", 9, [record], "http://x").stages) == 1
    assert desired_for("c", 9, [record], "http://x").stages == ()


@pytest.mark.parametrize(
    "changes", [{"context_tokens": 0}, {"slots": 0}, {"slots": 1000}, {"prefill_chunk_tokens": 1}], ids=str
)
def test_orders_that_a_device_could_not_read_are_refused(changes: dict[str, int]) -> None:
    fine = record_of(plan_of("a", "b"))
    check_orders(fine, [], "http://x")
    with pytest.raises(Refused, match="b could not take its orders"):
        broken = msgspec.structs.replace(fine.orders["b"][0], **changes)
        check_orders(msgspec.structs.replace(fine, orders={**fine.orders, "b": (broken,)}), [], "http://x")


def test_a_refused_order_counts_for_the_plan_that_it_came_with_and_earlier_ones() -> None:
    plan = plan_of("a")

    def failed(refused_epoch: int, *reports: StageReport) -> bool:
        told = applied(plan, "a", *reports)
        told = msgspec.structs.replace(told, refused_epoch=refused_epoch, refused_because="no such field")
        return bool(readiness(plan, {"a": told}, lambda _: True).failed)

    assert failed(plan.epoch) and failed(plan.epoch + 1)
    assert not failed(plan.epoch - 1)
    assert not failed(plan.epoch + 1, report(plan, 0, "ready")), "what was taken before goes on"


@pytest.mark.parametrize("phase", ["waiting", "fetching", "loading", "stopping"])
def test_a_deployment_is_ready_only_when_every_stage_is(phase: str) -> None:
    plan = plan_of("a", "b")
    done = {"a": applied(plan, "a", report(plan, 0, "ready")), "b": applied(plan, "b", report(plan, 1, "ready"))}
    assert readiness(plan, done, lambda _: True).ready
    half = {**done, "b": applied(plan, "b", report(plan, 1, phase))}
    state = readiness(plan, half, lambda _: True)
    assert not state.ready
    assert phase in state.text()


def test_a_report_of_another_epoch_does_not_count() -> None:
    plan = plan_of("a")
    old = {"a": applied(plan, "a", report(plan, 0, "ready", epoch=plan.epoch - 1))}
    assert not readiness(plan, old, lambda _: True).ready


def test_a_failed_stage_is_named_with_its_reason() -> None:
    plan = plan_of("a")
    state = readiness(plan, {"a": applied(plan, "a", report(plan, 0, "failed", detail="disk full"))}, lambda _: True)
    assert state.failed == (("a", "disk full"),)


def test_a_stage_on_a_device_that_went_away_is_not_ready() -> None:
    plan = plan_of("a")
    done = {"a": applied(plan, "a", report(plan, 0, "ready"))}
    state = readiness(plan, done, lambda _: False)
    assert not state.ready
    assert "offline" in state.text()


def test_memory_of_other_deployments_counts_and_the_own_does_not() -> None:
    record = record_of(plan_of("a", "b"))
    assert held_elsewhere([record], "other", "a") == 110_000_000
    assert held_elsewhere([record], "tiny", "a") == 0


def test_two_models_in_one_deep_folder_are_two_deployments() -> None:
    folder = "/home/somebody/.cache/of/some/program/models/"
    names = {deployment_name(f"{folder}{name}.gguf") for name in ("one", "other")}
    assert len(names) == 2
    assert all(is_name(name) for name in names)


@pytest.mark.parametrize("model", ["smollm2", "hf:Org/My_Model.1B-Instruct", "/data/x y.gguf", "日本", "-", "a" * 90])
def test_any_model_gives_a_legal_deployment_name(model: str) -> None:
    assert is_name(deployment_name(model))
