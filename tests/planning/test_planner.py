"""Plans give the best placement with its reasons, and errors that name what is missing."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.planning.explain import explain
from coordinator.planning.guessing import guessing_of
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Plan
from coordinator.planning.planner import (
    Candidate,
    make_plan,
    placement_of,
    repriced,
    request_of,
    same_placement,
    worth_moving,
)
from hwprofiles.reading import Absent, Failed
from tests.agent.fakes import order_of
from tests.planning.boards import MB, address, board, graph, link, request
from wire.errors import ExitCode, UsageError, render
from wire.limits import MAX_LIVE_REQUESTS, MAX_PROMPT_TOKENS
from wire.messages import StageOrder

ETHERNET = link(0.5e-3, 100e6 / 8)
WIFI = link(5e-3, 20e6 / 8)


def shelf() -> list[Candidate]:
    return [
        board("orin", 1.0, link_to_broker=ETHERNET),
        board("nuc", 1.25, link_to_broker=ETHERNET),
        board("pi5", 2.0, link_to_broker=ETHERNET),
        board("pi4", 4.0, link_to_broker=WIFI),
    ]


def plan(candidates: list[Candidate], **changes: object) -> Plan:
    return make_plan(graph(), candidates, request(**changes), address)


def left_out(made: Plan) -> dict[str, str]:
    return {left.device: left.because for left in made.left_out}


def holds_everything_once(made: Plan) -> bool:
    names = placement_of(made)
    return len(names) == 32 and sum(s.end_block - s.first_block for s in made.stages) == 30


def test_one_fast_board_alone_is_the_plan_and_it_says_dont_split() -> None:
    made = plan(shelf())
    assert [stage.device for stage in made.stages] == ["orin"]
    assert made.because.startswith("don't split: orin alone takes")
    assert made.alone.startswith("orin alone:")
    assert made.stages[0].hop_s == 0.0 and made.stages[0].hop_bytes == 0
    assert set(left_out(made)) == {"nuc", "pi5", "pi4"}
    assert all("not needed: with it a token would take" in because for because in left_out(made).values())


def test_asked_for_four_boards_the_plan_uses_four_and_says_what_one_would_do() -> None:
    made = plan(shelf(), boards_at_least=4)
    assert len({stage.device for stage in made.stages}) == 4
    assert holds_everything_once(made)
    assert made.because.startswith("at least 4 boards were asked for")
    assert "orin alone: 34.1 ms per token; this plan" in made.alone and "don't split unless" in made.alone
    blocks = {stage.device: stage.end_block - stage.first_block for stage in made.stages}
    assert blocks["orin"] == max(blocks.values()), "the fastest board gets the most"


def test_stage_figures_add_up_to_the_prediction() -> None:
    made = plan(shelf(), boards_at_least=3)
    total_s = sum(stage.compute_s + stage.hop_s for stage in made.stages)
    assert made.predicted_token_s == pytest.approx(total_s)
    assert made.predicted_slowest_s == pytest.approx(max(stage.compute_s for stage in made.stages))
    assert [stage.hop_bytes for stage in made.stages] == [2 * 576 + 64, 2 * 576 + 64, 4 + 64]
    assert [stage.inbox for stage in made.stages] == [address(n) for n in range(3)]
    assert made.stages[0].embedding and made.stages[-1].head
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in made.stages)
    assert all(stage.prefill_chunk_s is not None for stage in made.stages)


def test_throughput_balances_the_stages() -> None:
    made = plan(shelf(), objective="throughput")
    assert len(made.stages) == 4
    assert made.predicted_slowest_s < plan(shelf()).predicted_slowest_s / 2
    assert "a full pipeline gives a token every" in made.because
    assert "when the pipeline is full" in made.alone


def test_high_delay_does_not_keep_a_board_out_of_a_full_pipeline() -> None:
    far = board("remote", 1.0, link_to_broker=link(50e-3, 100e6 / 8))
    made = plan([board("near", 1.0), far], objective="throughput")
    assert {stage.device for stage in made.stages} == {"near", "remote"}
    assert [stage.device for stage in plan([board("near", 1.0), far]).stages] == ["near"]


def test_every_stage_says_why_its_share() -> None:
    made = plan(shelf(), objective="throughput")
    because = {stage.device: stage.because for stage in made.stages}
    assert "fastest per block" in because["orin"]
    assert "4.0 times slower per block than orin" in because["pi4"]
    assert "of 30 blocks" in because["pi4"] and "memory would allow" in because["pi4"]


def test_boards_too_small_alone_share_the_model() -> None:
    made = plan([board(name, 1.0, 180 * MB) for name in ("a", "b", "c")])
    assert len(made.stages) > 1
    assert holds_everything_once(made)
    assert made.alone == ""
    assert "no single board can hold the model" in made.because
    assert any("memory is full" in stage.because for stage in made.stages)


def test_boards_that_cannot_take_part_are_left_out_with_the_reason() -> None:
    candidates = [
        board("orin"),
        Candidate(device="new", profile=None, usable_memory_bytes=MB),
        msgspec.structs.replace(board("leaving"), unavailable="draining"),
        board("unsteady", valid=False),
        board("tiny", memory_bytes=64 * MB),
        board("deaf", 2.0, link_to_broker=Failed("no answer within 10 s")),
        board("banned"),
    ]
    because = left_out(plan(candidates, excluded=("banned",)))
    assert because["new"] == "has not measured itself yet"
    assert because["leaving"] == "draining"
    assert "drift" in because["unsteady"]
    assert "no module fits: the smallest needs" in because["tiny"]
    assert "no answer within 10 s; it could only hold the whole model" in because["deaf"]
    assert because["banned"] == "excluded by the request"


def test_pins_are_kept() -> None:
    made = plan(shelf(), pins={"embedding": "pi4", "head": "pi4"})
    assert [stage.device for stage in made.stages] == ["pi4"]
    made = plan(shelf(), pins={"embedding": "pi4", "block.29": "nuc", "head": "nuc"})
    where = placement_of(made)
    assert where["embedding"] == "pi4" and where["head"] == "nuc" and where["block.29"] == "nuc"
    assert "pinned here: embedding" in made.stages[0].because


def test_contradictory_pins_are_named() -> None:
    words = r"pins contradict: orin shall hold block\.20 and an earlier module, with block\.10 on pi5 between"
    with pytest.raises(Infeasible, match=words):
        plan(shelf(), pins={"block.0": "orin", "block.10": "pi5", "block.20": "orin"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pins": {"block.99": "orin"}}, "no such module"),
        ({"pins": {"head": "orin"}, "excluded": ("orin",)}, "the same request excludes orin"),
        ({"boards_at_least": 3, "boards_at_most": 2}, "no plan can be both"),
        ({"boards_at_least": 0}, "a plan has at least 1"),
        ({"context_tokens": 100_000}, "was made for 2048"),
    ],
)
def test_requests_that_contradict_themselves_are_usage_errors(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        plan(shelf(), **changes)
    assert refused.value.try_


@pytest.mark.parametrize(
    ("field", "value"),
    [("context_tokens", -1), ("context_tokens", 0), ("context_tokens", 1), ("context_tokens", MAX_PROMPT_TOKENS + 1),
     ("slots", 0), ("slots", MAX_LIVE_REQUESTS + 1)],
)  # fmt: skip
def test_what_no_order_can_say_is_not_planned(field: str, value: int) -> None:
    endless = msgspec.structs.replace(graph(), max_context_tokens=2**31)
    with pytest.raises(UsageError, match="not possible") as refused:
        make_plan(endless, shelf(), request(**{field: value}), address)
    assert refused.value.try_
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.to_builtins(order_of()), field: value}, type=StageOrder)


@pytest.mark.parametrize(
    ("candidates", "changes", "words"),
    [
        ([], {}, "there is no board to plan for"),
        ([Candidate(device="new", profile=None, usable_memory_bytes=MB)], {}, "new: has not measured itself yet"),
        (shelf(), {"boards_at_least": 5}, "at least 5 boards were asked for, 4 can take a share"),
        (shelf(), {"pins": {"head": "xavier"}}, "pin head -> xavier can't be kept: no such board is online"),
        ([board("a", 1.0, 130 * MB), board("b", 1.0, 130 * MB)], {}, "embedding of tiny-chat fits on no board"),
        ([board("a", 1.0, 165 * MB), board("b", 1.0, 160 * MB)], {}, "the 2 boards offer .* are missing"),
        (
            [board(n, 1.0, 180 * MB) for n in "abc"],
            {"boards_at_most": 2},
            "does not fit on 2 of these boards, only on more",
        ),
        (
            [board("a", 1.0, 190 * MB, link_to_broker=Absent("no link")), board("b", 1.0, 190 * MB)],
            {},
            "has to be split, and these boards can't take part: a: link not measured: no link",
        ),
    ],
)
def test_an_impossible_plan_says_what_is_missing(
    candidates: list[Candidate], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(Infeasible, match=words) as caught:
        plan(candidates, **changes)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert caught.value.try_
    assert len(render(caught.value).splitlines()) == 2


def test_a_large_cache_is_named_as_what_to_reduce() -> None:
    with pytest.raises(Infeasible) as caught:
        plan([board("a", 1.0, 200 * MB)], context_tokens=2_048, slots=8)
    assert "fewer slots (the KV cache takes" in caught.value.try_


def test_the_same_figures_give_the_same_plan_in_any_order() -> None:
    one = plan(shelf(), boards_at_least=3)
    assert msgspec.json.encode(one) == msgspec.json.encode(plan(shelf()[::-1], boards_at_least=3))
    assert msgspec.json.decode(msgspec.json.encode(one), type=Plan) == one


def test_a_plan_can_be_made_again_from_itself() -> None:
    pins = {"head": "nuc"}
    one = plan(shelf(), boards_at_least=2, pins=pins, excluded=("pi4",))
    assert make_plan(graph(), shelf(), request_of(one), address) == one


def test_a_slower_board_changes_the_plan_and_moving_pays() -> None:
    fast = [board("a", 1.0), board("b", 1.1)]
    running = plan(fast)
    assert [stage.device for stage in running.stages] == ["a"]
    slowed = [board("a", 4.0), board("b", 1.1)]
    better = plan(slowed)
    assert [stage.device for stage in better.stages] == ["b"]
    today = repriced(running, graph(), slowed)
    assert same_placement(today, running)
    assert today.predicted_token_s == pytest.approx(4 * running.predicted_token_s, rel=0.05)
    verdict = worth_moving(today, better)
    assert verdict and "less time per token" in verdict.because


def test_noise_does_not_move_a_running_plan() -> None:
    running = plan([board("a", 1.0), board("b", 1.02)])
    changed = [board("a", 1.04), board("b", 1.0)]
    better = plan(changed)
    assert not same_placement(running, better)
    verdict = worth_moving(repriced(running, graph(), changed), better)
    assert not verdict and "moving pays above 10%" in verdict.because
    assert not worth_moving(running, running)


def test_another_context_is_another_placement() -> None:
    assert worth_moving(plan(shelf()), plan(shelf(), context_tokens=1_024))


def test_the_explanation_shows_the_table_the_reasons_and_the_left_out() -> None:
    made = plan(shelf(), boards_at_least=2)
    text = "\n".join(explain(made, graph(), shelf()))
    assert guessing_of(made).because in text
    assert "tiny-chat int4 on 2 boards, least time per token" in text
    for part in ("stage  device", "why each share", "left out", "what would change the answer"):
        assert part in text
    for device in ("orin", "nuc", "pi5", "pi4"):
        assert device in text
    assert "compute binds" in text
    assert f"without {made.stages[0].device}:" in text


def test_the_explanation_says_how_much_more_memory_would_help_and_is_right() -> None:
    candidates = [board("fast", 1.0, 150 * MB), board("slow", 3.0)]
    made = plan(candidates)
    assert {stage.device for stage in made.stages} == {"slow"} or len(made.stages) == 2
    line = next(line for line in explain(made, graph(), candidates) if "more memory fast would" in line)
    more_bytes = float(line.split("with ")[1].split(" MB")[0]) * MB
    grown = [board("fast", 1.0, int(150 * MB + more_bytes + MB)), board("slow", 3.0)]
    assert plan(grown).predicted_token_s < made.predicted_token_s * 0.98
    assert plan([board("fast", 1.0, int(150 * MB + more_bytes / 2)), board("slow", 3.0)]).predicted_token_s > (
        plan(grown).predicted_token_s
    )


def test_the_explanation_of_a_single_board_asks_nothing_that_has_no_answer() -> None:
    candidates = [board("only", 1.0)]
    lines = explain(plan(candidates), graph(), candidates)
    assert not any("without only" in line for line in lines)
    assert "  compute binds: 100% of a token's time, 0% is spent in hops" in lines


def test_the_explanation_names_the_boards_that_a_plan_can_not_do_without() -> None:
    candidates = [board(name, 1.0, 180 * MB) for name in ("a", "b", "c")]
    lines = explain(plan(candidates), graph(), candidates)
    assert "  without a there is no plan" in lines


def test_links_bind_when_hops_take_most_of_the_time() -> None:
    candidates = [board(n, 0.1, 180 * MB, link_to_broker=WIFI) for n in "ab"] + [board("c", 0.1, 180 * MB)]
    made = plan(candidates)
    text = "\n".join(explain(made, graph(), candidates))
    assert "the links bind" in text
    assert "with a link as good as c's" in text
