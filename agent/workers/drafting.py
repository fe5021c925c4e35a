"""How many tokens the first stage guesses before a step, so that a round of the ring gives more than one.

A step over the last token and k guesses gives 1 + a + a^2 + .. + a^k tokens when each guess is right with likelihood a,
and takes longer than one over fewer rows. Whether guesses are right is learned while the answer comes, and shows for
those, too, that were not sent: what would have been guessed is compared with what comes.

A request that is `padded` has steps of at least two rows, all of one class of shapes (docs/decisions/0011): how many
guesses it has changes nothing but its speed, so the time of rounds, as measured by when tokens come back, decides. The
others have steps of one row, too, and which rows stand alone shows in last bits. So there the text alone decides, as
if a row cost the same everywhere: the same prompt has the same steps, on whatever boards and however long they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agent.workers.lookup import Guess, Lookup

MANY: Final = (0, 1, 3, 7)
"""Guesses in a step. Steps of few sizes need few buffers, and kernels like rows by powers of two."""

FIRST_LIKELIHOOD: Final = {0: 0.0, 1: 0.2, 2: 0.4, 3: 0.6}
"""Of a guess by the length of the run that it follows, until it was measured."""

FIRST_ROW_COST: Final = 0.1
"""What a further row adds to a round, until it was measured: little on slow links, 0.25 to 0.4 without any."""

LEARNING: Final = 0.125
"""Weight of a new figure beside the old ones."""

ROW_COST: Final = 0.2
"""What a further row is taken to add to a round of one row, where times must not decide: more than on slow links, less
than without any. A guess goes along when it is likelier than that."""

FEWEST: Final = 2
"""Rows in a step of a padded request."""

LEAST_ROUNDS: Final = 4
"""Rounds of the fewest rows before the first guess of more: what more rows cost is told by the difference."""

LONGEST: Final = 4.0
"""A round longer than so many usual ones was kept up by something else."""


class Rounds:
    """How long rounds take by the rows of their steps: so much for the FEWEST, and so much more for each further."""

    def __init__(self) -> None:
        self.count = 0
        self._base_s = 0.0
        self._row_s: float | None = None

    def add(self, rows: int, round_s: float) -> None:
        if rows <= FEWEST:
            self.count += 1
            if self.count == 1:
                self._base_s = round_s
            self._base_s += LEARNING * (min(round_s, LONGEST * self._base_s) - self._base_s)
        elif self.count:
            row_s = max(0.0, min(round_s, LONGEST * self._base_s) - self._base_s) / (rows - FEWEST)
            self._row_s = row_s if self._row_s is None else self._row_s + LEARNING * (row_s - self._row_s)

    def expected(self, rows: int) -> float:
        """In rounds of the fewest rows."""
        if self._row_s is None or not self._base_s:
            return 1.0 + FIRST_ROW_COST * (rows - FEWEST)
        return 1.0 + self._row_s / self._base_s * (rows - FEWEST)


class Drafting:
    """What one request's first stage knows of its text and its rounds. Times are monotonic."""

    def __init__(self, prompt: Sequence[int], most: int, padded: bool) -> None:
        self.padded = padded
        self.drafts: tuple[int, ...] = ()
        """Of the step under way."""
        self.counted = 0
        """How many of them were guessed: one that only fills a row is not."""
        self._many = [many for many in MANY if padded <= many <= most]
        self._lookup = Lookup()
        self._lookup.add(prompt)
        self._likely = dict(FIRST_LIKELIHOOD)
        self._rounds = Rounds()
        self._guess = Guess((), 0)
        self._began_s: float | None = None

    def came(self, tokens: Sequence[int], now_s: float) -> int:
        """These tokens were drawn from the step under way; give how many of them had been guessed."""
        if self._began_s is not None:
            self._rounds.add(1 + len(self.drafts), now_s - self._began_s)
        self._began_s = now_s
        right = min(len(tokens) - 1, self.counted)
        self._learn(tokens)
        self._lookup.add(tokens)
        self.drafts, self.counted = (), 0
        return right

    def _learn(self, tokens: Sequence[int]) -> None:
        """Compare with what was, or would have been, guessed: up to the first that was wrong."""
        length = self._guess.length
        for guessed, token in zip(self._guess.tokens, tokens, strict=False):
            self._likely[length] += LEARNING * ((guessed == token) - self._likely[length])
            if guessed != token:
                break

    def draft(self, last: int, room: int, company: bool) -> tuple[int, ...]:
        """The guesses for the next step: at most `room`, which is at least 1 if the request is padded. With `company`,
        other requests, those that may step alone rather share their steps."""
        self._guess = self._lookup.guess(self._many[-1])
        many = 0 if company and not self.padded else self._worth(room)
        self.drafts = self._guess.tokens[:many]
        self.counted = len(self.drafts)
        if self.padded and not self.drafts:
            self.drafts = (last,)
        return self.drafts

    def _worth(self, room: int) -> int:
        """How many guesses give the most tokens per second."""
        least = self._many[0]
        fitting = [many for many in self._many if many <= room]
        if not self._guess.tokens or not fitting or (self.padded and self._rounds.count < LEAST_ROUNDS):
            return least
        likely = self._likely[self._guess.length]
        return max(fitting, key=lambda many: tokens_of(likely, many) / self._round(1 + many))

    def _round(self, rows: int) -> float:
        """How long a round of so many rows takes, in those of the fewest."""
        return self._rounds.expected(rows) if self.padded else 1.0 + ROW_COST * (rows - 1)


def tokens_of(likely: float, many: int) -> float:
    """Tokens that a step over so many guesses gives, on average."""
    return sum(likely**right for right in range(many + 1))
