"""Predictions beside what is measured, over deployments at random.

A shelf of five boards of random speed measures itself once. Then links are drawn and measured, and deployments over
two to five of the boards: for latency one stream, for throughput as many streams as stages or twice as many, so that
steps have one row or two. The cut is the planner's own. Answers follow a prompt of as many tokens as steps are priced
at.

    latency       seconds per token of one stream, against predicted_token_s
    throughput    tokens per second of all streams, against the plan's pace (coordinator.planning.aims)
    memory        the most that workers held while all slots filled, against the plan's memory_bytes

What is timed while others have a part of this machine is timed again (benchmarks.quiet); the last trial counts.

Models that are no language models answer items (benchmarks.parts.predicted_items): seconds per item are held against
the same figures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final

import msgspec
from msgspec import Struct

from benchmarks.parts import load, predicted_items
from benchmarks.parts.prompts import prompt
from benchmarks.parts.random_shelves import fetched_everywhere, random_boards, random_link, relink, say
from benchmarks.parts.sites import MODEL, Site, whole_site
from benchmarks.quiet import QUIET, quietly
from benchmarks.report import Figure, at_most
from coordinator.inference.requests import GenerateRequest
from coordinator.planning.aims import filled_s, pace_s
from coordinator.planning.plan import Plan
from models.codecs import usual_text
from testbed.links import LinkSpec

BOARDS: Final = 5
PER_LINKS: Final = 5
"""Deployments with the same links."""
PER_SITE: Final = 10
CONTEXT_TOKENS: Final = 256
PROMPT_TOKENS: Final = 104
"""With 48 tokens behind it, a step sees 128 rows on the average: half of the context, as it is priced."""
TOKENS: Final = 48
FULL_TEXT: Final = 400
FULL_TOKENS: Final = 130
"""Letters of the prompts before, words of all kinds, and tokens behind each: together they touch what a plan reserves,
230 rows or so of each slot, all slots at once."""

Counters = Mapping[int, Mapping[str, float]]
"""Of each stage, by name."""


class Case(Struct, frozen=True, kw_only=True):
    """One deployment: seconds per token predicted and measured, and what its stages took and held."""

    model: str
    objective: str
    boards: int
    cut: str
    links: str
    predicted_s: float
    measured_s: float
    compute_s: tuple[float, float]
    """Predicted and measured, of all stages."""
    first_token_s: tuple[float, float] | None
    """None for items."""
    memory_ratios: tuple[float, ...]
    """Predicted by measured, for each stage."""
    lost_share: float = 0.0
    """Of the machine, that others had while answers were timed."""

    @property
    def error(self) -> float:
        """Share by which the prediction is off."""
        return abs(self.predicted_s / self.measured_s - 1)


def measure(seed: int, deployments: int, precision: str, model: str = MODEL) -> Iterator[Case]:
    """Draw, deploy, measure."""
    rng = random.Random(seed)
    left = deployments
    while left > 0:
        boards = random_boards(rng, BOARDS)
        say("; ".join(board.text() for board in boards))
        with whole_site(precision, boards, model) as site:
            names = [board.name for board in boards]
            fetched_everywhere(site, names, precision, model)
            links: dict[str, LinkSpec] = {}
            for _ in range(min(left, PER_SITE)):
                if not links or not left % PER_LINKS:
                    links = {name: random_link(rng) for name in names}
                    relink(site, links)
                if predicted_items.kind_of(model) != "language":
                    yield _item_case(site, rng, links, model)
                else:
                    yield _case(site, rng, links, precision, model)
                left -= 1


def _case(site: Site, rng: random.Random, links: Mapping[str, LinkSpec], precision: str, model: str) -> Case:
    names = list(links)
    count = rng.randint(2, len(names))
    chosen = rng.sample(names, count)
    objective = rng.choice(("latency", "throughput"))
    streams = 1 if objective == "latency" else count * rng.choice((1, 2))

    def request(number: int, rows: int, tokens: int) -> GenerateRequest:
        return GenerateRequest(
            model=model, prompt=prompt(rows - number), raw=True, max_tokens=tokens, ignore_stop=True,
            precision=precision, objective=objective, context_tokens=CONTEXT_TOKENS, slots=streams,
            boards_at_least=count, boards_at_most=count, speculate="off", topology="central",
            excluded=tuple(name for name in names if name not in chosen),
        )  # fmt: skip

    words = usual_text().words
    fill = [
        msgspec.structs.replace(request(number, 1, FULL_TOKENS), prompt=words[number * FULL_TEXT :][:FULL_TEXT])
        for number in range(streams)
    ]
    with load.resident_peaks(site.there.url) as peaks:
        load.together(site.there.url, fill)

    def ask() -> tuple[Counters, list[load.Stream], Counters]:
        before = load.settled_counters(site.there.url)
        found = load.together(site.there.url, [request(number, PROMPT_TOKENS, TOKENS) for number in range(streams)])
        return before, found, load.settled_counters(site.there.url)

    quiet = quietly(ask)
    before, found, after = quiet.value
    [deployment] = site.there.get("/v1/status")["deployments"]
    plan = deployment["plan"]
    held = {
        stage: most
        for (name, epoch, stage), most in peaks.items()
        if (name, epoch) == (plan["deployment"], plan["epoch"])
    }
    case = case_of(plan, found, before, after, held, _links_text(links, plan))
    return msgspec.structs.replace(case, lost_share=quiet.lost_share)


def _item_case(site: Site, rng: random.Random, links: Mapping[str, LinkSpec], model: str) -> Case:
    found = predicted_items.measure(site, rng, model, list(links))
    plan = found.plan
    return Case(
        model=plan["model"],
        objective=plan["objective"],
        boards=len(plan["stages"]),
        cut=_cut_text(plan),
        links=_links_text(links, plan),
        predicted_s=found.predicted_s,
        measured_s=found.measured_s,
        compute_s=found.compute_s,
        first_token_s=None,
        memory_ratios=_memory_ratios(plan, found.peak_bytes),
        lost_share=found.lost_share,
    )


def _cut_text(plan: Mapping[str, Any]) -> str:
    return " ".join(f"{stage['device']}:{stage['end_block'] - stage['first_block']}" for stage in plan["stages"])


def _memory_ratios(plan: Mapping[str, Any], resident_bytes: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(stage["memory_bytes"] / resident_bytes[stage["stage"]] for stage in plan["stages"])


def _links_text(links: Mapping[str, LinkSpec], plan: Mapping[str, Any]) -> str:
    return ", ".join(links[stage["device"]].text().removesuffix(" one way") for stage in plan["stages"])


def case_of(
    plan: Mapping[str, Any],
    streams: Sequence[load.Stream],
    before: Mapping[int, Mapping[str, float]],
    after: Mapping[int, Mapping[str, float]],
    resident_bytes: Mapping[int, float],
    links: str,
) -> Case:
    """What one deployment's answers say."""
    planned = msgspec.convert(plan, Plan)
    if planned.objective == "latency":
        [one] = streams
        predicted_s, measured_s = plan["predicted_token_s"], one.end["token_s"]
    else:
        predicted_s = pace_s(planned)
        measured_s = 1 / load.steady_rate(streams)

    def step_s(stage: int) -> float:
        rows = after[stage]["decode_rows"] - before[stage]["decode_rows"]
        return (after[stage]["decode_busy_s"] - before[stage]["decode_busy_s"]) / rows

    return Case(
        model=plan["model"],
        objective=plan["objective"],
        boards=len(planned.stages),
        cut=_cut_text(plan),
        links=links,
        predicted_s=predicted_s,
        measured_s=measured_s,
        compute_s=(
            sum(filled_s(planned, stage) for stage in planned.stages),
            sum(step_s(stage.stage) for stage in planned.stages),
        ),
        first_token_s=(plan["predicted_first_token_s"] or float("nan"), median(one.first_s for one in streams)),
        memory_ratios=_memory_ratios(plan, resident_bytes),
    )


def heading() -> str:
    columns = f"{'predicted':>10}{'measured':>10}{'off':>7}{'compute':>9}{'hops':>7}{'memory':>8}"
    return f"{'objective':<11}{columns}  cut, links"


def line(case: Case) -> str:
    """Compute, hops and memory: predicted by measured. Hops of one stream are what is not compute."""
    hops = (case.predicted_s - case.compute_s[0]) / max(1e-9, case.measured_s - case.compute_s[1])
    hops_text = f"{hops:.2f}" if case.objective == "latency" else "-"
    return (
        f"{case.objective:<11}{case.predicted_s * 1e3:>7.1f} ms{case.measured_s * 1e3:>7.1f} ms"
        f"{case.predicted_s / case.measured_s - 1:>+7.0%}{case.compute_s[0] / case.compute_s[1]:>9.2f}{hops_text:>7}"
        f"{median(case.memory_ratios):>8.2f}  {case.cut}; {case.links}"
        + (f"; others had {case.lost_share:.0%} of the machine" if case.lost_share > QUIET else "")
    )


def at_share(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def figures(cases: Sequence[Case]) -> list[Figure]:
    """Errors of all cases, and of each objective."""
    rows: list[Figure] = []
    for model in dict.fromkeys(case.model for case in cases):
        for objective in ("latency", "throughput"):
            errors = [case.error for case in cases if (case.model, case.objective) == (model, objective)]
            if not errors:
                continue
            rows.append(Figure(f"{model}, {objective}: deployments", len(errors), ""))
            rows.append(at_most(f"{model}, {objective}: error, median", median(errors), "share", 0.10))
            rows.append(at_most(f"{model}, {objective}: error, 9 of 10", at_share(errors, 0.9), "share", 0.25))
        memory = [abs(ratio - 1) for case in cases if case.model == model for ratio in case.memory_ratios]
        rows.append(at_most(f"{model}: error of memory, 9 of 10", at_share(memory, 0.9), "share", 0.10))
        disturbed = sum(case.lost_share > QUIET for case in cases if case.model == model)
        rows.append(Figure(f"{model}: deployments that were disturbed at each trial", disturbed, ""))
        alone = [case for case in cases if (case.model, case.objective) == (model, "latency")]
        firsts = [case.first_token_s for case in alone if case.first_token_s is not None]
        if firsts:
            error = median(abs(predicted_s / measured_s - 1) for predicted_s, measured_s in firsts)
            rows.append(Figure(f"{model}: error of the first token's time, median", error, "share"))
    return rows
