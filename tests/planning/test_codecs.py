"""Which codec each cut gets: against all combinations, within the error that is allowed, and what the plan says."""

from __future__ import annotations

from itertools import product
from math import log1p

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import codecs
from coordinator.planning.codecs import Answer, choose, cuts_of, with_codecs
from coordinator.planning.cost import LinkCost
from coordinator.planning.explain import explain
from coordinator.planning.plan import Plan
from coordinator.planning.planner import make_plan
from coordinator.planning.quality import at_most, percent_of
from models.codecs import CodecReport, CodecTime, CutCost
from tests.coordinator.plans import plan_of
from tests.hwprofiles import examples
from tests.planning.boards import address, board, graph, link, request
from wire.codecs import payload_bytes
from wire.frames import header_bytes
from wire.messages import CodecName

HIDDEN = 576
BLOCKS = 8


def cost(codec: CodecName, cuts: tuple[int, ...], nats: float, error: float = 0.001) -> CutCost:
    return CutCost(codec=codec, cuts=cuts, nats=nats, nats_error=error, agreement=0.95, logit_error=0.2)


def report(
    group: float = 0.002, token: float = 0.02, extra: tuple[CutCost, ...] = (), row_s: float = 2e-5
) -> CodecReport:
    """Every cut costs the same, but for the one behind block 4, which costs twice as much."""
    singles = [
        cost(codec, (cut,), nats * (2 if cut == 4 else 1))
        for codec, nats in (("int8-group", group), ("int8-token", token))
        for cut in range(0, BLOCKS + 1, 2)
    ]
    return CodecReport(
        codec_version=1, model="tiny", precision="int4", wire_dtype="f16", hidden=HIDDEN, blocks=BLOCKS,
        engine="onnxruntime", text="a text", text_digest="sha256:0", tokens=1000, perplexity=10.0,
        costs=(*singles, *extra),
        times=tuple(CodecTime(codec=c, row_s=row_s, chunk_row_s=row_s / 8) for c in ("int8-group", "int8-token")),
    )  # fmt: skip


def plan(*devices: str, objective: str = "latency", prefill_s: float | None = 0.05) -> Plan:
    made = plan_of(*devices)
    stages = tuple(
        msgspec.structs.replace(stage, prefill_chunk_s=prefill_s, hop_s=0.006, hop_bytes=1216 if not stage.head else 68)
        for stage in made.stages
    )
    return msgspec.structs.replace(
        made, stages=stages, objective=objective, prompt_tokens=512, prefill_chunk_tokens=64,
        predicted_first_token_s=1.0 if prefill_s else None, predicted_token_s=0.01 * len(devices),
    )  # fmt: skip


def links(*rates: float) -> dict[str, LinkCost]:
    names = ("a", "b", "c", "d")
    return {
        name: LinkCost(one_way_s=0.003, probe_bytes=1200, bytes_per_s=rate)
        for name, rate in zip(names, rates or (1e5,) * 4, strict=False)
    }


def test_nothing_is_coded_without_a_budget_and_the_plan_is_the_same() -> None:
    made = plan("a", "b", "c")
    assert with_codecs(made, HIDDEN, links(), report(), 0.0) is made


def test_slow_links_get_the_shorter_codec_that_the_budget_allows() -> None:
    made = plan("a", "b", "c")
    small = with_codecs(made, HIDDEN, links(), report(), 2.0)
    large = with_codecs(made, HIDDEN, links(), report(), 20.0)
    assert [stage.codec for stage in small.stages] == ["int8-group", "int8-group", "as-is"]
    assert [stage.row_codec for stage in small.stages] == [stage.codec for stage in small.stages]
    assert [stage.codec for stage in large.stages] == ["int8-token", "int8-token", "as-is"]
    for got in (small, large):
        for stage in got.stages[:-1]:
            assert stage.hop_bytes == header_bytes(2) + payload_bytes(stage.codec, "f16", HIDDEN)
        assert got.stages[-1] == made.stages[-1]
        assert got.predicted_token_s == pytest.approx(
            made.predicted_token_s + sum(stage.hop_s for stage in got.stages) - 3 * 0.006
        )
        assert got.predicted_token_s < made.predicted_token_s
        assert got.predicted_first_token_s < made.predicted_first_token_s  # type: ignore[operator]
        assert 0 < got.perplexity_increase_percent <= got.error_budget_percent
        assert all(0 < stage.error_percent <= got.perplexity_increase_percent for stage in got.stages[:-1])
        assert [stage.logit_error for stage in got.stages] == [0.2, 0.2, 0.0]
    assert (
        "2 of 2 cuts in int8-group, rows of answers 2" in small.because
        and "a text" in small.because
        and "allowed: 2 %" in small.because
    )


def test_a_budget_that_does_for_one_cut_codes_the_one_on_the_slower_link() -> None:
    made = plan("a", "b", "c")
    got = with_codecs(made, HIDDEN, links(1e6, 1e6, 5e4), report(), percent_of(0.0031))
    assert cuts_of(made) == (2, 4)
    # The cut behind block 4 costs twice: too much; the other one is coded though its link is the faster.
    assert [stage.codec for stage in got.stages] == ["int8-group", "as-is", "as-is"]
    wider = with_codecs(made, HIDDEN, links(1e6, 1e6, 5e4), report(), percent_of(0.0051))
    assert [stage.codec for stage in wider.stages] == ["as-is", "int8-group", "as-is"]


def test_fast_links_keep_hidden_states_as_they_are_and_the_plan_says_so() -> None:
    got = with_codecs(plan("a", "b", "c"), HIDDEN, links(1e9, 1e9, 1e9), report(), 50.0)
    assert {stage.codec for stage in got.stages} == {"as-is"}
    assert "cross as they are" in got.because and got.perplexity_increase_percent == 0.0


def test_a_codec_that_takes_longer_than_it_saves_is_not_taken() -> None:
    got = with_codecs(plan("a", "b"), HIDDEN, links(), report(row_s=0.1), 50.0)
    assert {stage.codec for stage in got.stages} == {"as-is"}


def test_rows_of_answers_stay_as_they_are_where_coding_them_takes_longer_than_it_saves() -> None:
    made = plan("a", "b")
    got = with_codecs(made, HIDDEN, links(1e6, 1e6), report(row_s=1e-3), 1.0)
    assert [(stage.codec, stage.row_codec) for stage in got.stages] == [("int8-group", "as-is"), ("as-is", "as-is")]
    assert [(stage.hop_s, stage.hop_bytes) for stage in got.stages] == [(0.006, 1216), (0.006, 68)]
    assert got.predicted_token_s == pytest.approx(made.predicted_token_s)
    assert got.predicted_first_token_s < made.predicted_first_token_s  # type: ignore[operator]
    assert "1 of 1 cuts in int8-group, rows of answers none" in got.because


def test_a_link_that_was_the_slowest_part_is_so_no_more() -> None:
    made = msgspec.structs.replace(plan("a", "b", objective="throughput"), predicted_slowest_s=1216 / 1e5)
    got = with_codecs(made, HIDDEN, links(1e5, 1e5), report(), 2.0)
    assert got.stages[0].codec == "int8-group"
    assert got.predicted_slowest_s == pytest.approx(got.stages[0].hop_bytes / 1e5)


def test_a_first_token_that_comes_sooner_is_worth_it_and_chance_is_not() -> None:
    made = plan("a", "b", prefill_s=0.05)
    slow = tuple(msgspec.structs.replace(stage, compute_s=0.1) for stage in made.stages)
    long = msgspec.structs.replace(made, stages=slow)
    answer = Answer(long, HIDDEN, links(2.5e6, 2.5e6), report())
    gain_s = answer.seconds(("as-is",)) - answer.seconds(("int8-group",))
    assert 0 < gain_s < 0.005 * answer.seconds(("as-is",)), "little of the whole answer"
    got = with_codecs(long, HIDDEN, links(2.5e6, 2.5e6), report(), 1.0)
    assert got.stages[0].codec == "int8-group"
    assert got.predicted_first_token_s < 0.99 * long.predicted_first_token_s  # type: ignore[operator]
    fast = with_codecs(long, HIDDEN, links(1e8, 1e8), report(row_s=1e-7), 1.0)
    assert fast.stages[0].codec == "as-is" and "codecs would gain" in fast.because


def test_one_stage_or_no_report_changes_nothing_but_what_is_said() -> None:
    alone = with_codecs(plan("a"), HIDDEN, links(), report(), 5.0)
    unknown = with_codecs(plan("a", "b"), HIDDEN, links(), None, 5.0)
    assert "Without a cut" in alone.because and "not known just now" in unknown.because
    for got in (alone, unknown):
        assert {stage.codec for stage in got.stages} == {"as-is"} and got.error_budget_percent == 5.0


def test_through_a_boards_own_broker_only_the_slower_link_counts() -> None:
    central = plan("a", "b")
    inbox = msgspec.structs.replace(central.stages[1].inbox, broker="mqtt://10.0.0.2:1884")
    second = msgspec.structs.replace(central.stages[1], inbox=inbox)
    direct = msgspec.structs.replace(central, stages=(central.stages[0], second))
    saved = [
        answer.hop_s(0, "as-is") - answer.hop_s(0, "int8-group")
        for answer in (Answer(made, HIDDEN, links(1e6, 1e6), report()) for made in (central, direct))
    ]
    coding_s = codecs.BOARD_SLOWER * 2e-5
    assert saved[0] + coding_s == pytest.approx(2 * (saved[1] + coding_s))


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.floats(2e4, 1e7), min_size=4, max_size=4),
    group=st.floats(-0.01, 0.03),
    token=st.floats(-0.01, 0.1),
    budget=st.floats(0.1, 30),
    objective=st.sampled_from(["latency", "throughput"]),
    prefill_s=st.sampled_from([None, 0.01, 0.2]),
)
def test_no_other_combination_within_the_budget_is_faster(
    rates: list[float], group: float, token: float, budget: float, objective: str, prefill_s: float | None
) -> None:
    made, judged = plan("a", "b", "c", "d", objective=objective, prefill_s=prefill_s), report(group, token)
    answer = Answer(made, HIDDEN, links(*rates), judged)
    cuts = cuts_of(made)
    all_choices = list(product(("as-is", "int8-group", "int8-token"), repeat=3))
    allowed = [c for c in all_choices if at_most(judged, list(zip(c, cuts, strict=True))) <= log1p(budget / 100)]
    chosen = choose(answer, cuts, judged, budget)
    assert chosen in allowed
    assert answer.seconds(chosen) == min(map(answer.seconds, allowed))


def test_where_combinations_are_too_many_cuts_are_coded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made, judged = plan("a", "b", "c", "d"), report()
    answer = Answer(made, HIDDEN, links(), judged)
    best = choose(answer, cuts_of(made), judged, 2.0)
    monkeypatch.setattr(codecs, "MOST_TRIED", 1)
    greedy = choose(answer, cuts_of(made), judged, 2.0)
    assert at_most(judged, list(zip(greedy, cuts_of(made), strict=True))) <= log1p(0.02)
    assert answer.seconds(best) <= answer.seconds(greedy) < answer.seconds(("as-is",) * 3)


def test_errors_of_cuts_add_up_and_uncertainties_by_their_squares() -> None:
    judged = report()
    assert at_most(judged, [("as-is", 2), ("as-is", 4)]) == 0.0
    assert at_most(judged, [("int8-group", 2)]) == pytest.approx(0.002 + 0.001)
    assert at_most(judged, [("int8-group", 2), ("int8-group", 6)]) == pytest.approx(0.004 + 0.001 * 2**0.5)


def test_between_two_measured_places_the_worse_one_counts() -> None:
    judged = report()
    assert at_most(judged, [("int8-group", 3)]) == at_most(judged, [("int8-group", 4)])
    assert at_most(judged, [("int8-group", 5)]) == at_most(judged, [("int8-group", 4)])
    assert at_most(judged, [("int8-group", 7)]) == at_most(judged, [("int8-group", 6)])


def test_what_was_measured_together_and_came_out_worse_makes_all_predictions_worse() -> None:
    worse = report(extra=(cost("int8-group", (2, 6), 3 * (0.004 + 0.001 * 2**0.5)),))
    assert at_most(worse, [("int8-group", 2)]) == pytest.approx(3 * at_most(report(), [("int8-group", 2)]))
    assert at_most(worse, [("int8-token", 2)]) == at_most(report(), [("int8-token", 2)])
    better = report(extra=(cost("int8-group", (2, 6), -0.01),))
    assert at_most(better, [("int8-group", 2)]) == at_most(report(), [("int8-group", 2)])


def test_no_cuts_cost_more_than_all_of_them() -> None:
    everywhere = report(extra=(cost("int8-group", tuple(range(BLOCKS + 1)), 0.003),))
    cuts: list[tuple[CodecName, int]] = [("int8-group", cut) for cut in (2, 4, 6)]
    assert at_most(everywhere, cuts) == pytest.approx(0.003 + 0.001)
    assert at_most(everywhere, cuts) < at_most(report(), cuts)


def test_a_codec_that_was_not_measured_has_no_error_that_could_be_said() -> None:
    with pytest.raises(KeyError):
        at_most(report(), [("bf16", 2)])


def test_a_plan_from_profiles_can_be_coded_and_explained() -> None:
    boards = [board(name, memory_bytes=240 << 20, link_to_broker=link(0.005, 1e5)) for name in ("a", "b", "c")]
    model = graph()
    made = make_plan(model, boards, request(boards_at_least=3), address)
    judged = msgspec.structs.replace(report(), blocks=model.blocks)
    got = with_codecs(made, HIDDEN, links(), judged, 2.0)
    assert "int8-group" in {stage.codec for stage in got.stages[:-1]}
    text = "\n".join(explain(got, model, boards))
    assert "what codecs cost" in text and "int8-group, perplexity up by" in text
    assert "what codecs cost" not in "\n".join(explain(made, model, boards))


def test_each_end_of_a_cut_takes_what_its_board_measured() -> None:
    """Board a timed its codecs, board b did not: half of what each has."""
    made = plan("a", "b")
    measured = examples.codings(row_s=8e-5, more_s=0.0)
    coded, plainly = (Answer(made, HIDDEN, links(), report(), of) for of in ({"a": measured}, {}))
    apart = plainly.hop_s(0, "int8-group") - coded.hop_s(0, "int8-group")
    assert apart == pytest.approx((codecs.BOARD_SLOWER * 2e-5 - 8e-5) / 2, abs=1e-9)
    assert coded.untimed(("int8-group",)) == ["b"] and coded.untimed(("as-is",)) == []
    said = with_codecs(made, HIDDEN, links(), report(), 2.0, {"a": measured}).because
    assert "coding on b, not measured there, is priced at 4 times" in said
    both = with_codecs(made, HIDDEN, links(), report(), 2.0, {"a": measured, "b": measured}).because
    assert "coding takes what the boards measured" in both


def test_a_board_that_is_slow_at_coding_gets_its_rows_as_they_are() -> None:
    made = plan("a", "b")
    slow = examples.codings(row_s=2.0, more_s=0.0)
    assert with_codecs(made, HIDDEN, links(), report(), 2.0).stages[0].codec == "int8-group"
    assert with_codecs(made, HIDDEN, links(), report(), 2.0, {"a": slow, "b": slow}).stages[0].codec == "as-is"
