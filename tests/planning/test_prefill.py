"""How long a prompt takes, and in which chunks it should enter."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.inference.patience import prefill_s
from coordinator.planning.planner import Candidate, PlanRequest, make_plan, repriced
from coordinator.planning.prefill import PROMPT_TOKENS, WORTH_CHUNKING, pipelined_s
from tests.planning.boards import address, graph, profile

times = st.floats(1e-4, 1.0)


def simulated_s(stages_s: list[float], hops_s: list[float], chunks: int) -> float:
    """Brute force: every chunk goes from stage to stage, each of which does one thing at a time, in order."""
    free_s = [0.0] * len(stages_s)
    arrives_s = 0.0
    for _ in range(chunks):
        arrives_s = 0.0
        for number, stage_s in enumerate(stages_s):
            free_s[number] = max(free_s[number], arrives_s) + stage_s
            arrives_s = free_s[number] + (hops_s[number] if number < len(hops_s) else 0.0)
    return arrives_s


@given(st.lists(times, min_size=1, max_size=6), times, st.integers(1, 20))
def test_the_formula_is_what_a_pipeline_does(stages_s: list[float], hop_s: float, chunks: int) -> None:
    hops_s = [hop_s] * (len(stages_s) - 1)
    assert pipelined_s(stages_s, hops_s, [], chunks) == pytest.approx(simulated_s(stages_s, hops_s, chunks))


def plan_with(*smaller: int, overhead_s: float = 2e-4, boards: int = 4):
    candidates = [
        Candidate(device=name, profile=profile(name, overhead_s=overhead_s), usable_memory_bytes=2 << 30)
        for name in ("a", "b", "c", "d")[:boards]
    ]
    request = PlanRequest(
        deployment="tiny", context_tokens=2_048, boards_at_least=boards, boards_at_most=boards,
        slots=8, objective="throughput", smaller_chunks=smaller,
    )  # fmt: skip
    return make_plan(graph(), candidates, request, address), candidates


def test_smaller_chunks_are_taken_where_the_first_token_comes_sooner() -> None:
    whole, _ = plan_with()
    small, candidates = plan_with(32)
    assert (whole.prefill_chunk_tokens, small.prefill_chunk_tokens) == (64, 32)
    assert whole.predicted_first_token_s and small.predicted_first_token_s
    assert small.predicted_first_token_s <= WORTH_CHUNKING * whole.predicted_first_token_s
    assert small.prompt_tokens == PROMPT_TOKENS
    assert [s.device for s in small.stages] == [s.device for s in whole.stages]
    again = repriced(small, graph(), candidates)
    assert again.prefill_chunk_tokens == 32 and again.predicted_first_token_s == small.predicted_first_token_s
    assert small.predicted_first_token_s <= prefill_s(small, PROMPT_TOKENS), "patience waits for the upper bound"


def test_where_a_step_costs_much_chunks_stay_large() -> None:
    plan, _ = plan_with(32, overhead_s=0.5)
    assert plan.prefill_chunk_tokens == 64


def test_one_board_has_no_pipeline_to_fill() -> None:
    plan, _ = plan_with(32, boards=1)
    assert plan.prefill_chunk_tokens == 64
    [stage] = plan.stages
    assert stage.prefill_chunk_s is not None
    assert plan.predicted_first_token_s == pytest.approx(8 * stage.prefill_chunk_s)


def test_half_of_a_short_context_is_the_prompt() -> None:
    candidates = [Candidate(device="a", profile=profile("a"), usable_memory_bytes=2 << 30)]
    plan = make_plan(graph(), candidates, PlanRequest(deployment="tiny", context_tokens=128), address)
    assert plan.prompt_tokens == 64


def test_a_board_that_has_not_measured_prefill_gives_no_prediction() -> None:
    whole = profile("a")
    modules = tuple(
        msgspec.structs.replace(module, timings=tuple(t for t in module.timings if t.phase == "decode"))
        for module in whole.modules
    )
    candidates = [
        Candidate(device="a", profile=msgspec.structs.replace(whole, modules=modules), usable_memory_bytes=2 << 30)
    ]
    request = PlanRequest(deployment="tiny", context_tokens=512, smaller_chunks=(32,))
    plan = make_plan(graph(), candidates, request, address)
    assert plan.predicted_first_token_s is None and plan.prefill_chunk_tokens == 64
