"""A board is planned on the engine with which it measured itself to be fastest, unless another is asked for."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.deployments import fallbacks, make_orders, needs_standard
from coordinator.planning.cost import Power
from coordinator.planning.explain import explain
from coordinator.planning.plan import Plan, Standby
from coordinator.planning.planner import Candidate, Infeasible, make_plan, repriced, same_placement, worth_moving
from coordinator.standbys import with_copies
from hwprofiles.profile import ModuleMeasurement, Profile
from hwprofiles.reading import Reading
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import graph_of
from tests.planning import boards
from tests.planning.test_powered import energy, run
from wire.errors import Refused
from wire.messages import Applied, ArtifactRef, EngineName, StageReport

GRAPH = boards.graph()


def on(engine: str, profile: Profile) -> tuple[ModuleMeasurement, ...]:
    return tuple(msgspec.structs.replace(module, engine=engine) for module in profile.modules)


def board(name: str = "orin", gpu: str = "tensorrt", times: float = 5.0) -> Candidate:
    """A board whose GPU is so many times as fast as its processor."""
    slow = boards.profile(name)
    fast = boards.profile(
        name, block_s=1e-3 / times, overhead_s=2e-4 / times, embedding_s=3e-4 / times, head_s=4e-3 / times
    )
    profile = msgspec.structs.replace(slow, modules=(*slow.modules, *on(gpu, fast)))
    return Candidate(device=name, profile=profile, usable_memory_bytes=4_096 * boards.MB)


def planned(*candidates: Candidate, engine: str = "auto") -> Plan:
    return make_plan(GRAPH, candidates, boards.request(engine=engine), boards.address)


@pytest.mark.parametrize("gpu", ["tensorrt", "onnxruntime-cuda"])
def test_the_faster_engine_is_chosen_and_the_plan_says_so(gpu: str) -> None:
    plan = planned(board(gpu=gpu))
    assert [stage.engine for stage in plan.stages] == [gpu]
    alone = planned(board(gpu=gpu), engine="onnxruntime")
    assert alone.stages[0].engine == "onnxruntime"
    assert alone.predicted_token_s == pytest.approx(5 * plan.predicted_token_s)
    lines = "\n".join(explain(plan, GRAPH, [board(gpu=gpu)]))
    assert gpu in lines and f"5.0 times as fast on {gpu} as on onnxruntime" in lines


def test_a_gpu_that_is_slower_than_the_processor_is_left_alone() -> None:
    assert planned(board(times=0.5)).stages[0].engine == "onnxruntime"


def test_what_is_plainly_written_is_used_when_it_is_asked_for_only() -> None:
    assert planned(board(gpu="torch-cuda")).stages[0].engine == "onnxruntime"
    assert planned(board(gpu="torch-cuda"), engine="torch-cuda").stages[0].engine == "torch-cuda"


def test_an_engine_that_nobody_measured_is_refused_with_the_reason() -> None:
    with pytest.raises(Infeasible, match=r"has not measured .* on onnxruntime-cuda"):
        planned(board(), engine="onnxruntime-cuda")


def test_each_board_has_its_own_engine_and_a_plan_is_made_again_with_the_same_wish() -> None:
    pair = [
        board("orin"),
        Candidate(device="pi5", profile=boards.profile("pi5"), usable_memory_bytes=4_096 * boards.MB),
    ]
    plan = make_plan(GRAPH, pair, boards.request(boards_at_least=2), boards.address)
    assert {stage.device: stage.engine for stage in plan.stages} == {"orin": "tensorrt", "pi5": "onnxruntime"}
    again = repriced(plan, GRAPH, pair)
    assert same_placement(plan, again) and again.limits.engine == "auto"
    wished = make_plan(GRAPH, pair, boards.request(boards_at_least=2, engine="onnxruntime"), boards.address)
    assert {stage.engine for stage in repriced(wished, GRAPH, pair).stages} == {"onnxruntime"}


def orders_of(plan: Plan) -> dict[tuple[str, int], tuple[EngineName, bool]]:
    """(device, stage) -> engine, and whether the order has a graph in standard operators."""
    ref = ArtifactRef(digest=f"sha256:{1:064x}", size_bytes=1)
    made = make_orders(
        plan, graph_of(4), boards.Nothing(), lambda _: ref, lambda _: ref,
        lambda stage: ref if needs_standard(plan, stage) else None,
    )  # fmt: skip
    orders = with_copies(plan, made, "lab")
    return {(d, o.stage): (o.engine, o.standard_graph is not None) for d, found in orders.items() for o in found}


def test_orders_carry_the_engine_and_the_graph_that_it_reads() -> None:
    plan = plan_of("a", "b")
    assert orders_of(plan) == {("a", 0): ("onnxruntime", False), ("b", 1): ("onnxruntime", False)}
    first, second = plan.stages
    plan = msgspec.structs.replace(plan, stages=(msgspec.structs.replace(first, engine="tensorrt"), second))
    assert orders_of(plan) == {("a", 0): ("tensorrt", True), ("b", 1): ("onnxruntime", False)}


def test_a_copy_runs_on_the_engine_of_its_own_board() -> None:
    plan = plan_of("a", "b")
    copy = Standby(
        stage=1, device="c", held_bytes=1, memory_bytes=1, memory_limit_bytes=2, compute_s=0.1, prefill_chunk_s=None,
        hop_in_s=0.0, hop_s=0.0, transfer_in_s=0.0, transfer_s=0.0, engine="tensorrt",
    )  # fmt: skip
    plan = msgspec.structs.replace(plan, standbys=(copy,), replicas=2)
    assert orders_of(plan) == {
        ("a", 0): ("onnxruntime", False), ("b", 1): ("onnxruntime", True), ("c", 1): ("tensorrt", True)
    }  # fmt: skip


def said(stage: int, fell_back: str = "", epoch: int = 1) -> StageReport:
    return StageReport(deployment="tiny", epoch=epoch, stage=stage, phase="ready", fell_back=fell_back)


def test_a_fallback_is_told_once() -> None:
    before = Applied(device="orin", boot="ab", epoch=1, stages=(said(0), said(1, "no GPU")))
    now = Applied(device="orin", boot="ab", epoch=2, stages=(said(0, "no memory"), said(1, "no GPU", epoch=2)))
    assert [report.stage for report in fallbacks(before, now)] == [0]
    assert [report.stage for report in fallbacks(None, now)] == [0, 1]
    assert fallbacks(now, now) == () == fallbacks(before, None)


def test_where_joules_count_a_board_computes_on_what_it_measured_them_with() -> None:
    """Its GPU takes another power, of which nothing is known."""
    measured = energy(run("decode", Reading(12.0, "meter")))
    orin = board()
    assert orin.profile is not None
    metered = msgspec.structs.replace(orin, profile=msgspec.structs.replace(orin.profile, energy=measured))
    plan = make_plan(GRAPH, [metered], boards.request(objective="energy"), boards.address)
    assert plan.stages[0].engine == "onnxruntime" and plan.predicted_token_j
    with pytest.raises(Refused, match="the power of orin was not measured"):
        make_plan(GRAPH, [metered], boards.request(objective="energy", engine="tensorrt"), boards.address)
    told = msgspec.structs.replace(orin, power=Power(active_w=20.0, idle_w=5.0, covers="the board"))
    made = make_plan(GRAPH, [told], boards.request(objective="energy"), boards.address)
    assert made.stages[0].engine == "tensorrt", "somebody says what the board takes as it is"


def test_what_failed_on_a_board_is_left_out_unless_it_is_asked_for() -> None:
    without = msgspec.structs.replace(board(), without={"tensorrt": "no kernel for this GPU"})
    plan = planned(without)
    assert plan.stages[0].engine == "onnxruntime" and "no kernel for this GPU" in plan.stages[0].because
    assert planned(without, engine="tensorrt").stages[0].engine == "tensorrt"
    before = planned(board())
    again = repriced(before, GRAPH, [without])
    assert again.stages[0].engine == "onnxruntime", "what it was planned for is not what runs"
    assert again.predicted_token_s == pytest.approx(5 * before.predicted_token_s)


def test_a_running_plan_is_priced_on_what_it_runs_on() -> None:
    slow = planned(board(), engine="onnxruntime")
    slow = msgspec.structs.replace(slow, limits=msgspec.structs.replace(slow.limits, engine="auto"))
    today = repriced(slow, GRAPH, [board()])
    assert today.predicted_token_s == pytest.approx(slow.predicted_token_s) and same_placement(slow, today)
    assert worth_moving(today, planned(board()))


def test_a_plan_of_before_engines_were_chosen_runs_on_the_processor() -> None:
    kept = msgspec.to_builtins(planned(board()))
    del kept["limits"]["engine"]
    for stage in kept["stages"]:
        del stage["engine"]
    read = msgspec.convert(kept, Plan)
    assert [stage.engine for stage in read.stages] == ["onnxruntime"] and read.limits.engine == "auto"
    old = {key: value for key, value in msgspec.to_builtins(boards.profile("a")).items() if key != "pending"}
    assert msgspec.convert(old, Profile) == boards.profile("a")
