"""Makes the steps of a stage, draws where it is the head, and has what came of them sent.

What fails one row of a step, or ends its request, leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent.workers.due import Due
from agent.workers.filing import Filing
from agent.workers.guessing import run_and_draw
from agent.workers.held import Held
from agent.workers.marks import Marks, clock
from agent.workers.requests import Live, Made, Tally, Unit, run_rows
from agent.workers.sending import UNSENT, Sending
from agent.workers.stretch import Stretch
from models.engine.base import ContextFull, EngineFailed, StageEngine
from wire.errors import EdgelamError
from wire.frames import Parcel
from wire.messages import Sampling


class Steps:
    """`draw(logits, sampling, position)` gives a token."""

    def __init__(
        self,
        engine: StageEngine,
        held: Held,
        due: Due,
        filing: Filing,
        say: Sending,
        draw: Callable[[Any, Sampling, int], int],
        stretch: Stretch,
        tally: Tally,
    ) -> None:
        self.made: Made | None = None
        """A step that was made before its rows were filed (agent.workers.ahead)."""
        self.marks = Marks(held.order.embedding)
        self._engine = engine
        self._held = held
        self._due = due
        self._filing = filing
        self._say = say
        self._draw = draw
        self._stretch = stretch
        self._tally = tally

    def make(self, units: Sequence[Unit], now_s: float) -> None:
        """Run rows of requests that are still there. A row that was run before comes alone (agent.workers.due)."""
        lives = self._held.lives
        units = [unit for unit in units if lives.get(unit.live.request) is unit.live]
        if len(units) > 1:
            self._together(units, now_s)
        elif units:
            self._alone(units[0], now_s)

    def _alone(self, unit: Unit, now_s: float) -> None:
        live = unit.live
        made, self.made = self.made, None
        if made is None or made.live is not live or made.position != live.run or unit.count != 1:
            made = self._run(unit, live)
        if made.error is not None:
            self._held.fail_step(live, made.error)
            return
        self._count((unit,), unit.count, made.busy_s, made.ended_s, now_s)
        if made.sent_bytes:
            self._tally.decode_sent_bytes += made.sent_bytes
        if not self._held.order.head:
            # FLAG_FINAL matters up to the last chunk of the prompt; a decode step is known by its position.
            final = unit.final and live.run <= live.prompt_tokens
            if not made.sent_bytes:
                try:
                    if unit.drafts:
                        self._say.guessed(live, made.result, unit.drafts)
                    else:
                        self._say.hidden(live, made.result, unit.count, final, unit.meta)
                except UNSENT as error:
                    self._unsent([live], error)
        elif made.tokens:
            if unit.drafts:
                live.run = live.filed = live.settled = made.position + len(made.tokens)
                self._tally.decode_rows += len(made.tokens) - 1
            self._give_tokens([(live, made.tokens)], bool(made.sent_bytes))

    def _together(self, units: list[Unit], now_s: float) -> None:
        """One row of each of several requests, as one step and one parcel."""
        head = self._held.order.head
        self._stretch.begin()
        result, failed = run_rows(self._engine, units)
        failed = self._say.unfit(result, of_answers=True) | failed
        good = [index for index in range(len(units)) if index not in failed]
        tokens: list[tuple[Live, tuple[int, ...]]] = []
        if head:
            for index in good:
                live = units[index].live
                tokens.append((live, (self._draw(result[index], live.sampling, live.run + 1),)))
        contexts = sum(unit.live.run for unit in units)
        busy_s, ended_s = self._stretch.end("rows", len(units), contexts // len(units)), clock()
        for index, error in failed.items():
            self._held.fail_step(units[index].live, error)
        if not good:
            return
        run = [units[index] for index in good]
        self._count(run, 1, busy_s, ended_s, now_s)
        if head:
            self._give_tokens(tokens, False)
        else:
            lives, rows = [unit.live for unit in run], result if len(good) == len(units) else result[good]
            try:
                self._say.rows(lives, rows)
            except UNSENT as error:
                self._unsent(lives, error)

    def _run(self, unit: Unit, live: Live) -> Made:
        self._stretch.begin()
        try:
            result, tokens = run_and_draw(self._engine, self._draw, self._held.order.head, unit, self._ends)
            for error in self._say.unfit(result, of_answers=bool(unit.drafts)).values():
                return Made(live=live, position=live.run, error=error)
        except (ContextFull, EngineFailed) as error:
            return Made(live=live, position=live.run, error=error)
        kind = "drafts" if unit.drafts else "last" if unit.final else "chunk"
        busy_s = self._stretch.end(kind, unit.count, live.run)
        return Made(live=live, position=live.run, busy_s=busy_s, result=result, tokens=tokens, ended_s=clock())

    def _count(self, units: Sequence[Unit], count: int, busy_s: float, ended_s: float, now_s: float) -> None:
        """`count` rows of each were run in `busy_s`."""
        tally = self._tally
        if count == 1 or units[0].drafts:
            self.marks.ran(units, busy_s, ended_s)
            tally.decode_rows_run += count * len(units)
            tally.decode_context_tokens += count * sum(unit.live.run for unit in units)
        for unit in units:
            unit.live.run += count
            unit.live.seen_s = now_s + busy_s
        if count == 1 or units[0].drafts:
            tally.decode_steps += 1
            tally.decode_rows += len(units)
            tally.decode_busy_s += busy_s
            self._due.ran(busy_s, units[0].lone)
        else:
            tally.prefill_steps += 1
            tally.prefill_tokens += count
            tally.prefill_busy_s += busy_s
            self._due.ran(busy_s, True)

    def _unsent(self, lives: Sequence[Live], error: EdgelamError) -> None:
        """Rows of these requests could not be sent to the next stage: tell the requesters."""
        for live in lives:
            self._tally.unsent += 1
            self._held.fail(live.reply, live.request, "deadline", error.message)

    def _give_tokens(self, drawn: Sequence[tuple[Live, tuple[int, ...]]], sent: bool) -> None:
        """Send tokens to the first stage, but for those that end an answer, unless it was `sent` there already; and
        each to its requester."""
        told: list[tuple[Live, Parcel]] = [
            (live, self._say.token_parcel(live, tokens, self._ends(live, tokens[-1], live.run)))
            for live, tokens in drawn
        ]
        going = [(live, parcel) for live, parcel in told if not parcel.final]
        try:
            if going and self._held.order.embedding:
                self._filing.drawn_here(going)
            elif going and not sent:
                self._say.tokens([parcel for _, parcel in going])
        except UNSENT:
            for live, _ in going:
                self._held.drop(live)
            told = [(live, parcel) for live, parcel in told if parcel.final]
        for live, parcel in told:
            if parcel.final:
                self._held.end(live)
            try:
                self._say.to_requester(live.reply, parcel)
            except UNSENT:
                self._held.drop(live)

    def _ends(self, live: Live, token: int, position: int) -> bool:
        given = position - live.prompt_tokens + 1
        context_tokens = self._held.order.context_tokens
        return token in live.stop_ids or given >= live.max_new_tokens or position >= context_tokens
