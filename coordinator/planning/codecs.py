"""Which codec each cut of a plan has: the fastest ones whose error stays within what is allowed. Pure.

An answer to a usual prompt is what is priced: the prompt in chunks, then tokens one by one. A codec saves the bytes
that it leaves out, at the rates of the links they would have crossed, and costs the time to code and decode. For a
single row that is often more than it saves, for a chunk hardly ever: so a cut with a codec uses it for the chunks of
prompts, and for rows of answers only where these are faster with it.

    latency      first token + ANSWER_TOKENS * time per token
    throughput   chunks * slowest part for a chunk + ANSWER_TOKENS * slowest part for a token

All combinations are tried while they are few (MOST_TRIED); beyond that, the cut that gains most is coded first, and so
on. The placement is the one that was found for hidden states as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil
from typing import Final, NamedTuple

import msgspec

from coordinator.planning.aims import filled_s
from coordinator.planning.cost import LinkCost
from coordinator.planning.plan import Plan, PlannedStage
from coordinator.planning.prefill import pipelined_s
from coordinator.planning.quality import at_most, logits_apart, measured_codecs, nats_of, percent_of
from hwprofiles.coding import coding_s
from hwprofiles.samples import Codings
from models.codecs import CodecReport
from wire.codecs import AS_IS, payload_bytes
from wire.frames import header_bytes
from wire.limits import CHUNK_BYTES_DEFAULT
from wire.messages import CodecName
from wire.units import seconds_text

ANSWER_TOKENS: Final = 128
"""Tokens of a usual answer: what `edgelam run` gives if nothing else is said."""

BOARD_SLOWER: Final = 4.0
"""A board that has not timed its codecs is taken to be so many times as slow at them as the coordinator's machine, on
which they were timed for the report: rather too much than too little."""

WORTH_CODING: Final = 0.01
"""An answer, or its first token, must take so much less time, or hidden states stay as they are."""

MOST_TRIED: Final = 20_000
"""Combinations of codecs: three codecs at nine cuts."""

Choice = tuple[CodecName, ...]
"""The codec of each cut, in order."""

Fits = Callable[[Choice], bool]


class _Hop(NamedTuple):
    """From a stage to the next one. Seconds per byte: on the whole way, and on its slowest link."""

    way_s: float
    busy_s: float


class Answer:
    """What an answer through a plan takes with codecs at its cuts."""

    def __init__(
        self,
        plan: Plan,
        hidden: int,
        links: Mapping[str, LinkCost],
        report: CodecReport,
        codings: Mapping[str, Codings] | None = None,
    ) -> None:
        """`codings`: what codecs were measured to take on devices of the plan, where they were."""
        self._plan = plan
        self._codings = codings or {}
        self._hidden = hidden
        self._times = {found.codec: found for found in report.times}
        self._hops = [_hop(plan, number, links) for number in range(len(plan.stages) - 1)]
        self._chunks = max(1, ceil(plan.prompt_tokens / plan.prefill_chunk_tokens))

    def seconds(self, choice: Choice) -> float:
        """The figure that is made as small as may be."""
        if self._plan.objective != "throughput":
            return (self.first_s(choice) or 0.0) + ANSWER_TOKENS * self.token_s(choice)
        chunk_s = self._pace_s(choice, self._plan.prefill_chunk_tokens) or 0.0
        return self._chunks * chunk_s + ANSWER_TOKENS * (self._pace_s(choice, 1) or 0.0)

    def token_s(self, choice: Choice) -> float:
        hops_s = sum(self.hop_s(number, codec) for number, codec in enumerate(self.of_rows(choice)))
        return sum(stage.compute_s for stage in self._plan.stages) + hops_s + self._plan.stages[-1].hop_s

    def of_rows(self, choice: Choice) -> Choice:
        """The codec of each cut for rows of answers. A full pipeline gains only where a link is its slowest part."""
        return tuple(codec if self._gains(number, codec) else AS_IS for number, codec in enumerate(choice))

    def _gains(self, number: int, codec: CodecName) -> bool:
        if self._plan.objective == "throughput":
            busy_s = self.message_bytes(AS_IS, 1) * self._hops[number].busy_s
            return busy_s > max(filled_s(self._plan, stage) for stage in self._plan.stages)
        return self.hop_s(number, codec) < self.hop_s(number, AS_IS)

    def hop_s(self, number: int, codec: CodecName, rows: int = 1) -> float:
        """Of so many rows in one message, coding and decoding included."""
        stage = self._plan.stages[number]
        size, hop = self.message_bytes(codec, rows), self._hops[number]
        # What is beyond a chunk crosses both links at once (coordinator.planning.cost).
        first = min(size, max(stage.hop_bytes, CHUNK_BYTES_DEFAULT))
        more_s = (first - stage.hop_bytes) * hop.way_s + (size - first) * hop.busy_s
        # A message below the measured one is not free: what it leaves out is taken off, but never all.
        return max(stage.hop_s / 2, stage.hop_s + more_s) + self._coding_s(number, codec, rows)

    def message_bytes(self, codec: CodecName, rows: int) -> int:
        return header_bytes(2) + payload_bytes(codec, self._plan.wire_dtype, self._hidden, rows)

    def slowest_s(self, choice: Choice) -> float:
        """The slowest part of a full pipeline, for a token."""
        return self._pace_s(choice, 1) or 0.0

    def first_s(self, choice: Choice) -> float | None:
        """Until the first token of the plan's prompt; None where a board has not measured prefill."""
        rows = self._plan.prefill_chunk_tokens
        stages_s = self._stages_s(choice, rows)
        if stages_s is None:
            return None
        # The coding is in the two stages.
        hops_s = [self.hop_s(n, codec, rows) - self._coding_s(n, codec, rows) for n, codec in enumerate(choice)]
        return pipelined_s(stages_s, hops_s, self._busy_s(choice, rows), self._chunks)

    def _pace_s(self, choice: Choice, rows: int) -> float | None:
        choice = self.of_rows(choice) if rows == 1 else choice
        stages_s = self._stages_s(choice, rows)
        return None if stages_s is None else max([*stages_s, *self._busy_s(choice, rows)])

    def _busy_s(self, choice: Choice, rows: int) -> list[float]:
        return [self.message_bytes(codec, rows) * hop.busy_s for codec, hop in zip(choice, self._hops, strict=True)]

    def _stages_s(self, choice: Choice, rows: int) -> list[float] | None:
        """Each stage's seconds for a message, its part of coding included."""
        found = []
        for number, stage in enumerate(self._plan.stages):
            stage_s = filled_s(self._plan, stage) if rows == 1 else stage.prefill_chunk_s
            if stage_s is None:
                return None
            beside = [*choice[max(0, number - 1) : number], *choice[number : number + 1]]
            found.append(stage_s + sum(self._end_s(number, codec, rows) for codec in beside))
        return found

    def _coding_s(self, cut: int, codec: CodecName, rows: int) -> float:
        return self._end_s(cut, codec, rows) + self._end_s(cut + 1, codec, rows)

    def _end_s(self, number: int, codec: CodecName, rows: int) -> float:
        """What a stage's board takes for its end of a cut: half of coding and decoding."""
        if codec == AS_IS:
            return 0.0
        seconds = self._measured_s(number, codec, rows)
        if seconds is None:
            took = self._times[codec]
            seconds = BOARD_SLOWER * (took.row_s if rows == 1 else rows * took.chunk_row_s)
        return seconds / 2

    def _measured_s(self, number: int, codec: CodecName, rows: int) -> float | None:
        found = self._codings.get(self._plan.stages[number].device)
        return None if found is None else coding_s(found, codec, self._plan.wire_dtype, rows, self._hidden)

    def untimed(self, choice: Choice) -> list[str]:
        """Boards at a cut with a codec that they have not timed."""
        ends = [(cut + end, codec) for cut, codec in enumerate(choice) if codec != AS_IS for end in (0, 1)]
        stages = [number for number, codec in ends if self._measured_s(number, codec, 1) is None]
        return list(dict.fromkeys(self._plan.stages[number].device for number in stages))


def cuts_of(plan: Plan) -> tuple[int, ...]:
    """How many blocks are before each cut."""
    return tuple(stage.end_block for stage in plan.stages[:-1])


def choose(answer: Answer, cuts: Sequence[int], report: CodecReport, budget_percent: float) -> Choice:
    """The codecs with which an answer takes the least time, as exact as is asked for; of equals the more exact."""
    offered: Choice = (AS_IS, *measured_codecs(report))
    budget = nats_of(budget_percent)

    def error(choice: Choice) -> float:
        return at_most(report, list(zip(choice, cuts, strict=True)))

    if len(offered) ** len(cuts) > MOST_TRIED:
        return _one_by_one(answer, cuts, offered, lambda choice: error(choice) <= budget)
    best: Choice = (AS_IS,) * len(cuts)
    best_at = answer.seconds(best), 0.0
    for choice in product(offered, repeat=len(cuts)):
        seconds = answer.seconds(choice)
        if seconds > best_at[0]:
            continue
        found = error(choice)
        if found <= budget and (seconds, found) < best_at:
            best, best_at = choice, (seconds, found)
    return best


def with_codecs(
    plan: Plan,
    hidden: int,
    links: Mapping[str, LinkCost],
    report: CodecReport | None,
    budget_percent: float,
    codings: Mapping[str, Codings] | None = None,
) -> Plan:
    """The plan with a codec at each cut, its figures with them, and the reason. Without a report all stays as it is:
    nothing is more exact. `links`, `codings`: of the plan's devices; the latter of those that timed their codecs."""
    if budget_percent <= 0:
        return plan
    plan = msgspec.structs.replace(plan, error_budget_percent=budget_percent)
    if len(plan.stages) < 2:
        return _said(plan, "Without a cut there is nothing to code")
    if report is None or any(stage.device not in links for stage in plan.stages):
        return _said(plan, "Hidden states cross as they are: what codecs cost this model is not known just now")
    answer, cuts = Answer(plan, hidden, links, report, codings), cuts_of(plan)
    plainly: Choice = (AS_IS,) * len(cuts)
    choice = choose(answer, cuts, report, budget_percent)
    before_s, after_s = answer.seconds(plainly), answer.seconds(choice)
    gain = max(_gain(before_s, after_s), _gain(answer.first_s(plainly), answer.first_s(choice)))
    if choice == plainly or gain < WORTH_CODING:
        why = "no codec that keeps the error budget is faster" if choice == plainly else f"codecs would gain {gain:.1%}"
        return _said(plan, f"Hidden states cross as they are: {why}")
    of_rows = answer.of_rows(choice)
    increase = percent_of(at_most(report, list(zip(choice, cuts, strict=True))))
    stages = [
        _coded(plan.stages[number], answer, number, codec, row_codec, report)
        for number, (codec, row_codec) in enumerate(zip(choice, of_rows, strict=True))
    ]
    first_s, plain_first_s, said_s = answer.first_s(choice), answer.first_s(plainly), plan.predicted_first_token_s
    if said_s is not None and first_s is not None and plain_first_s is not None:
        said_s = max(0.0, said_s + first_s - plain_first_s)
    coded = sum(codec != AS_IS for codec in choice)
    names = ", ".join(dict.fromkeys(codec for codec in choice if codec != AS_IS))
    rows = sum(codec != AS_IS for codec in of_rows)
    what = "an answer in a full pipeline" if plan.objective == "throughput" else "an answer"
    return _said(
        msgspec.structs.replace(
            plan,
            stages=(*stages, plan.stages[-1]),
            predicted_token_s=plan.predicted_token_s + answer.token_s(choice) - answer.token_s(plainly),
            predicted_slowest_s=plan.predicted_slowest_s + answer.slowest_s(choice) - answer.slowest_s(plainly),
            predicted_first_token_s=said_s,
            perplexity_increase_percent=increase,
        ),
        f"Prompts cross {coded} of {len(cuts)} cuts in {names}, rows of answers {rows or 'none'}: {what} of "
        f"{ANSWER_TOKENS} tokens to a prompt of {plan.prompt_tokens} takes {seconds_text(after_s)} instead of "
        f"{seconds_text(before_s)}; perplexity rises by at most {increase:.2g} % (allowed: {budget_percent:g} %), as "
        f"measured on {report.tokens} tokens of {report.text}; {_coding_text(answer.untimed(choice))}",
    )


def _coding_text(untimed: Sequence[str]) -> str:
    if not untimed:
        return "coding takes what the boards measured"
    return f"coding on {', '.join(untimed)}, not measured there, is priced at {BOARD_SLOWER:g} times the coordinator's"


def _coded(
    stage: PlannedStage, answer: Answer, number: int, codec: CodecName, row_codec: CodecName, report: CodecReport
) -> PlannedStage:
    if codec == AS_IS:
        return stage
    return msgspec.structs.replace(
        stage,
        codec=codec,
        row_codec=row_codec,
        hop_s=answer.hop_s(number, row_codec),
        hop_bytes=answer.message_bytes(row_codec, 1),
        transfer_s=stage.transfer_s * answer.message_bytes(row_codec, 1) / stage.hop_bytes,
        error_percent=percent_of(at_most(report, [(codec, stage.end_block)])),
        logit_error=logits_apart(report, codec, stage.end_block),
    )


def _gain(before_s: float | None, after_s: float | None) -> float:
    return 1 - after_s / before_s if before_s and after_s is not None else 0.0


def _one_by_one(answer: Answer, cuts: Sequence[int], offered: Choice, fits: Fits) -> Choice:
    """Change one cut after the other, always the one that gains most, while the error allows."""
    choice: Choice = (AS_IS,) * len(cuts)
    while True:
        others = [
            (*choice[:number], codec, *choice[number + 1 :])
            for number in range(len(cuts))
            for codec in offered
            if codec != choice[number]
        ]
        better = [(answer.seconds(other), other) for other in others if fits(other)]
        if not better or min(better)[0] >= answer.seconds(choice):
            return choice
        choice = min(better)[1]


def _hop(plan: Plan, number: int, links: Mapping[str, LinkCost]) -> _Hop:
    sender, receiver = plan.stages[number], plan.stages[number + 1]
    rates_s = [1 / links[stage.device].bytes_per_s for stage in (sender, receiver)]
    # The site's broker stores a message and forwards it; straight to a board's own, both links carry it at once.
    return _Hop(max(rates_s) if receiver.inbox.broker else sum(rates_s), max(rates_s))


def _said(plan: Plan, sentence: str) -> Plan:
    return msgspec.structs.replace(plan, because=f"{plan.because.rstrip('.')}. {sentence}.")
