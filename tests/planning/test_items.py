"""Item models are planned by what was measured of items, and by all that is live at a cut."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from coordinator.planning.cost import TRANSPORT_BYTES, stage_memory
from coordinator.planning.explain import explain
from coordinator.planning.planner import Candidate, PlanRequest, make_plan, placement_of, repriced
from coordinator.planning.problem import ITEM_META_BYTES, hop_bytes
from coordinator.planning.request import price
from coordinator.planning.room import run_needs
from hwprofiles.profile import ModuleMeasurement, ModuleTiming, Profile
from hwprofiles.reading import Absent
from models.graph import Edge, Graph, Items, Module
from tests.planning.boards import MB, WORKER_BYTES, address, link, profile, samples
from wire.frames import header_bytes

SKIP_BYTES, MAIN_BYTES, INPUT_BYTES, OUTPUT_BYTES = 40_000, 10_000, 600_000, 4_000
AROUND = header_bytes(1) + ITEM_META_BYTES
NAMES = ("embedding", "block.0", "block.1", "block.2", "head")


def unet(rows: int = 1) -> Graph:
    """A chain of five with a skip from the first module to the last and to the one before it."""
    modules = tuple(
        Module(
            name=name,
            kind="embedding" if name == "embedding" else "head" if name == "head" else "block",
            profile_key=f"items/{number}/f32",
            weight_bytes=MB,
            artifacts=(f"sha256:{number:064x}",),
            kv_bytes_per_token=0,
            macs_per_token=1,
        )
        for number, name in enumerate(NAMES)
    )
    edges = [edge(one, other, MAIN_BYTES, "main") for one, other in itertools.pairwise(NAMES)]
    edges += [edge("embedding", target, SKIP_BYTES, "skip") for target in ("block.2", "head")]
    return Graph(
        model="unet",
        family="items",
        precision="f32",
        wire_dtype="f32",
        hidden=1,
        vocabulary=1,
        blocks=3,
        max_context_tokens=1024,
        modules=modules,
        edges=tuple(edges),
        items=Items(rows=rows, input_bytes=INPUT_BYTES, output_bytes=OUTPUT_BYTES),
    )


def edge(source: str, target: str, size: int, tensor: str) -> Edge:
    return Edge(source=source, target=target, elements_per_token=size, bytes_per_token=size, tensor=tensor)


def board(name: str, seconds: float, rows: tuple[int, ...] = (1,)) -> Candidate:
    """Each module takes so long, and for more rows so much longer."""
    made: Profile = profile(name)
    modules = tuple(
        ModuleMeasurement(
            key=f"items/{number}/f32",
            kind="block",
            engine="onnxruntime",
            threads=1,
            timings=tuple(
                ModuleTiming(phase="prefill", tokens=count, context=0, stack=1, samples=samples(seconds * count))
                for count in rows
            ),
            resident_bytes=MB,
            base_bytes=WORKER_BYTES,
        )
        for number in range(len(NAMES))
    )
    return Candidate(device=name, profile=msgspec.structs.replace(made, modules=modules), usable_memory_bytes=1 << 30)


def request(**changes: object) -> PlanRequest:
    return msgspec.structs.replace(PlanRequest(deployment="unet", context_tokens=1024), **changes)


def test_a_tensor_that_several_modules_need_crosses_each_cut_once() -> None:
    skipping = MAIN_BYTES + SKIP_BYTES + AROUND
    assert hop_bytes(unet()) == (0, *[skipping] * 4, OUTPUT_BYTES + AROUND)
    chain = msgspec.structs.replace(unet(), edges=unet().edges[:4])
    assert hop_bytes(chain) == (0, *[MAIN_BYTES + AROUND] * 4, OUTPUT_BYTES + AROUND)


def test_a_plan_says_what_an_item_takes_and_what_it_sends() -> None:
    boards = [board("pi4", 0.2), board("pi5", 0.1)]
    plan = make_plan(unet(), boards, request(objective="throughput", boards_at_least=2), address)
    assert plan.runs == "items"
    by_device = {stage.device: stage for stage in plan.stages}
    assert by_device["pi4"].compute_s == pytest.approx(0.2) and by_device["pi5"].compute_s == pytest.approx(0.4)
    first, last = plan.stages
    assert (first.hop_bytes, last.hop_bytes) == (MAIN_BYTES + SKIP_BYTES + AROUND, OUTPUT_BYTES + AROUND)
    assert plan.predicted_token_s == pytest.approx(0.6 + first.hop_s + last.hop_s)
    assert plan.predicted_slowest_s == pytest.approx(0.4)
    assert set(placement_of(plan)) == set(NAMES)
    assert repriced(plan, unet(), boards).predicted_token_s == pytest.approx(plan.predicted_token_s)
    text = "\n".join(explain(plan, unet(), boards))
    assert "per item" in text and "items/s" in text and "tokens are guessed" not in text


def test_items_with_rows_are_priced_at_their_typical_number() -> None:
    plan = make_plan(unet(rows=40), [board("pi5", 0.001, (16, 64))], request(), address)
    assert plan.stages[0].compute_s == pytest.approx(5 * 0.040, rel=1e-3)


def test_one_board_alone_pays_for_the_way_in_and_the_way_out() -> None:
    near, far = (
        linked(board("near", 0.11), one_way_s=0.001, bytes_per_s=1e8),
        linked(board("far", 0.1), one_way_s=0.010, bytes_per_s=1e6),
    )
    into_s = 0.010 + (INPUT_BYTES + AROUND) / 1e6
    plan = make_plan(unet(), [far], request(), address)
    [stage] = plan.stages
    assert plan.predicted_token_s == pytest.approx(0.5 + into_s + 0.010 + (OUTPUT_BYTES + AROUND) / 1e6, rel=0.01)
    assert stage.hop_s == pytest.approx(plan.predicted_token_s - 0.5) and stage.hop_bytes == OUTPUT_BYTES + AROUND
    assert plan.predicted_slowest_s == pytest.approx(into_s - 0.010, rel=0.01), "its link binds, not its processor"
    for objective in ("latency", "throughput"):
        chosen = make_plan(unet(), [near, far], request(objective=objective, boards_at_most=1), address)
        assert [stage.device for stage in chosen.stages] == ["near"], "slower, and sooner done"
    many = [board(f"slow{number}", 0.3) for number in range(9)]
    assert {stage.device for stage in make_plan(unet(), [far, near, *many], request(), address).stages} == {"near"}


def test_a_board_without_a_link_may_still_do_it_all() -> None:
    made = board("alone", 0.1)
    off = msgspec.structs.replace(made, profile=msgspec.structs.replace(made.profile, link=Absent("not reached")))
    plan = make_plan(unet(), [off], request(), address)
    assert plan.predicted_token_s == pytest.approx(0.5) and plan.stages[0].hop_s == 0


def linked(made: Candidate, one_way_s: float, bytes_per_s: float) -> Candidate:
    return msgspec.structs.replace(
        made, profile=msgspec.structs.replace(made.profile, link=link(one_way_s, bytes_per_s))
    )


def holding(made: Candidate, held: dict[str, int]) -> Candidate:
    """The process grew by so much while these modules were loaded and run."""
    modules = tuple(
        msgspec.structs.replace(module, resident_bytes=held.get(module.key, MB)) for module in made.profile.modules
    )
    return msgspec.structs.replace(made, profile=msgspec.structs.replace(made.profile, modules=modules))


def test_modules_of_a_stage_share_what_they_take_while_they_run_and_a_table_holds_what_was_looked_up() -> None:
    grown = {"items/0/f32": MB // 4, "items/1/f32": 5 * MB, "items/2/f32": 3 * MB, "items/3/f32": MB // 8}
    made = holding(board("pi5", 0.1), grown)
    priced = price(unet(), [made], request())
    [cost] = priced.costs
    around = WORKER_BYTES + TRANSPORT_BYTES
    workload, modules = priced.workload, unet().modules

    def needed(first: int, end: int) -> int:
        return stage_memory(unet(), workload, cost, modules[first:end])[1] - around

    scratch = stage_memory(unet(), workload, cost, [])[1] - around
    assert needed(0, 1) - scratch == MB // 4, "a table of a megabyte, a quarter of which was touched"
    assert needed(1, 3) - scratch == 2 * MB + 4 * MB, "the weights of both, and the larger of 4 and 2 MB"
    assert needed(3, 4) - scratch == MB, "weights count, whatever the process grew by"
    needs = run_needs(unet(), workload, cost)
    for first, end in itertools.combinations(range(len(modules) + 1), 2):
        assert needs[first, end] == needed(first, end) + around
