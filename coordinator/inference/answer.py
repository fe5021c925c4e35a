"""One answer over all losses: what was given of it stays given, and what is still to come goes on behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from coordinator.inference.requests import Generation, Guesses, Token
from coordinator.journal import DeploymentRecord
from coordinator.measured import Key, StageMeasured
from coordinator.shelf import Prepared
from wire.messages import StageCounters


class Pause(Struct, kw_only=True):
    """A silence in the middle of an answer. Times are seconds."""

    reason: str
    """What was lost first."""
    given: int
    """Tokens that were given before."""
    losses: int = 1
    """What was lost before the answer went on: what came in its place may be lost too."""
    detection_s: float
    """From the last token (or from the sending of the prompt) until the loss was known."""
    pause_s: float | None = None
    """From the last token (or from the sending of the prompt) to the next one."""


class Answer:
    """What has come so far, and the generation that the rest will come from."""

    def __init__(
        self,
        prompt_ids: list[int],
        prepared: Prepared,
        stop_ids: tuple[int, ...],
        given: Sequence[Token] = (),
        guesses: Guesses | None = None,
    ) -> None:
        """`given` and `guesses`: of an answer that another coordinator began."""
        self.prompt_ids = prompt_ids
        self.stop_ids = stop_ids
        self.tokens: list[Token] = []
        self.pauses: list[Pause] = []
        self.recoveries = 0
        self._detokenizer = prepared.tokenizer.detokenizer()
        self._pieces: list[str] = []
        self._started_s: float | None = None
        self._sign_s = 0.0
        """The last sign of life: a token, or the sending of a prompt."""
        self._kept = 0
        """Tokens that were given before the generation under way."""
        self.before: dict[Key, StageCounters] = {}
        """Counters of the stages when the generation under way began."""
        self.guesses = guesses
        """Decided when the first generation begins."""
        for token in given:
            self.add(token)
        self._kept = self._given_before = len(given)

    @property
    def complete(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].final

    @property
    def paused(self) -> bool:
        return bool(self.pauses) and self.pauses[-1].pause_s is None

    @property
    def rows(self) -> list[int]:
        """What a generation must begin with: the prompt and what was given."""
        return self.prompt_ids + [token.id for token in self.tokens]

    @property
    def steps(self) -> int:
        """Decode steps that the generation under way took."""
        return len(self.tokens) - self._kept - 1

    @property
    def least_rows(self) -> int:
        """Rows that each stage has counted at least when all is over: how many guesses of the last step were right only
        the head knows."""
        return max(min(self.steps, 1), self.steps - (self.guesses.most if self.guesses else 0))

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def begins(self, generation: Generation, before: dict[Key, StageCounters]) -> None:
        """The rest will come from this generation; `before` are the counters of its stages."""
        self.before = before
        self._kept = len(self.tokens)
        if self._started_s is None:
            self._started_s = generation.started_s
        if not self.paused:
            self._sign_s = generation.started_s

    def add(self, token: Token) -> str:
        """Take the next token; give the text that it completes. A stop token has none."""
        if self.paused:
            self.pauses[-1].pause_s = token.arrived_s - self._sign_s
        self._sign_s = token.arrived_s
        self.tokens.append(token)
        text = "" if token.final and token.id in self.stop_ids else self._detokenizer.push(token.id)
        if token.final:
            text += self._detokenizer.flush()
        self._pieces.append(text)
        return text

    def lost(self, reason: str, now_s: float) -> None:
        """The generation under way is gone."""
        self.recoveries += 1
        if self.paused:
            self.pauses[-1].losses += 1
        else:
            self.pauses.append(Pause(reason=reason, given=len(self.tokens), detection_s=now_s - self._sign_s))

    def summary(self, record: DeploymentRecord, rows: tuple[StageMeasured, ...]) -> dict[str, Any]:
        """The last event: figures of this request. Rates are over decode steps, pauses left out; None where there were
        too few."""
        ours = self.tokens[self._given_before :] or self.tokens[-1:]
        first_s, last_s = ours[0].arrived_s, ours[-1].arrived_s
        within = [pause.pause_s or 0.0 for pause in self.pauses if pause.given > self._given_before]
        steps = len(ours) - 1 - len(within)
        busy_s = last_s - first_s - sum(within)
        token_s = busy_s / steps if steps > 0 and busy_s > 0 else None
        hops = [row.sent_bytes_per_token for row in rows]
        known = [value for value in hops if value is not None]
        return {
            "event": "end",
            "text": self.text,
            "token_ids": [token.id for token in self.tokens],
            "finish_reason": "stop" if self.tokens[-1].id in self.stop_ids else "length",
            "prompt_tokens": len(self.prompt_ids),
            "time_to_first_token_s": first_s - (self._started_s or first_s),
            "token_s": token_s,
            "tokens_per_s": 1.0 / token_s if token_s else None,
            "predicted_token_s": record.plan.predicted_token_s,
            "bytes_per_token": sum(known) if len(known) == len(hops) else None,
            "deployment": record.name,
            "epoch": record.plan.epoch,
            "drafts_sent": sum(row.drafts_sent for row in rows),
            "drafts_accepted": sum(row.drafts_accepted for row in rows),
            "pauses": [msgspec.to_builtins(pause) for pause in self.pauses],
            "stages": [msgspec.to_builtins(row) for row in rows],
        }
