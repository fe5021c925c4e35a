"""What a coordinator takes of an error budget, refuses, and tells the boards."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.asked import check_measured, checked
from coordinator.deployments import make_orders
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import deploy_request
from coordinator.journal import DeployRequest
from coordinator.openai.bodies import ChatBody, decoded
from coordinator.openai.door import ask_of
from coordinator.screens.plain import plan_text
from coordinator.shelf import Prepared
from models.codecs import CodecReport, save_report
from tests.coordinator.plans import plan_of
from tests.models.stages import packed_tiny
from wire.errors import Refused, UsageError
from wire.messages import ArtifactRef


def test_an_exact_answer_and_an_error_budget_contradict() -> None:
    with pytest.raises(UsageError, match="exact, and an error budget of 2 %"):
        GenerateRequest(model="tiny", prompt="a", exact=True, error_budget_percent=2.0).sampling()
    GenerateRequest(model="tiny", prompt="a", error_budget_percent=2.0).sampling()
    GenerateRequest(model="tiny", prompt="a", exact=True).sampling()


@pytest.mark.parametrize("percent", [-0.1, 100.1, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(percent: float) -> None:
    with pytest.raises(UsageError, match="error budget"):
        checked(DeployRequest(model="tiny", error_budget_percent=percent))


def test_requests_with_other_budgets_want_other_deployments() -> None:
    one, other = (deploy_request(GenerateRequest(model="tiny", error_budget_percent=p)) for p in (0.0, 1.0))
    assert one != other and one == DeployRequest(model="tiny")


def test_a_body_of_openais_kind_may_name_a_budget() -> None:
    body = (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "edgelam": {"error_budget_percent": 1.5}}'
    )
    assert ask_of(decoded(body, ChatBody), []).request.error_budget_percent == 1.5


def test_codecs_that_nobody_has_measured_are_refused_with_the_command_that_does(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, precision="int4")
    prepared = Prepared("tiny", None, packed, None)  # type: ignore[arg-type]
    allowed = DeployRequest(model="tiny", precision="int4", error_budget_percent=1.0)
    with pytest.raises(Refused, match="not measured") as refused:
        check_measured(allowed, prepared)
    assert refused.value.try_ == "edgelam model codecs tiny --precision int4"
    check_measured(msgspec.structs.replace(allowed, error_budget_percent=0.0), prepared)
    graph = packed.graph
    report = CodecReport(
        codec_version=1, model="tiny", precision="int4", wire_dtype=graph.wire_dtype, hidden=graph.hidden,
        blocks=graph.blocks, engine="", text="", text_digest="", tokens=1, perplexity=1.0, costs=(), times=(),
    )  # fmt: skip
    save_report(packed, report)
    check_measured(allowed, prepared)


def test_both_stages_at_a_cut_are_told_its_codec(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, precision="int4")
    codecs = ("int8-group", "int8-token")
    ref = ArtifactRef(digest="sha256:" + "0" * 64, size_bytes=1)
    made = plan_of("a", "b")
    stages = [
        msgspec.structs.replace(stage, first_block=2 * n, end_block=2 * n + 2) for n, stage in enumerate(made.stages)
    ]
    for codec in codecs:
        plan = msgspec.structs.replace(
            made,
            stages=(msgspec.structs.replace(stages[0], codec=codec, row_codec="int8-token"), stages[1]),
            perplexity_increase_percent=0.5,
        )
        orders = make_orders(plan, packed.graph, packed.config, lambda _stage: ref, lambda _digest: ref)
        [first], [second] = orders["a"], orders["b"]
        assert (first.codec_out, second.codec_in) == (codec, codec)
        assert (first.codec_in, second.codec_out) == ("as-is", "as-is")
        assert (first.row_codec_out, second.row_codec_in) == ("int8-token", "int8-token")
        assert (first.row_codec_in, second.row_codec_out) == ("as-is", "as-is")
        shown = f"1232 B {codec}" if codec == "int8-token" else f"1232 B (prompts: {codec})"
        assert shown in plan_text(msgspec.to_builtins(plan))


def test_plans_of_before_are_read_as_they_were() -> None:
    plan = msgspec.to_builtins(plan_of("a", "b"))
    for stage in plan["stages"]:
        del stage["codec"], stage["row_codec"], stage["error_percent"], stage["logit_error"]
    del plan["error_budget_percent"], plan["perplexity_increase_percent"]
    assert msgspec.convert(plan, type(plan_of("a"))) == plan_of("a", "b")
