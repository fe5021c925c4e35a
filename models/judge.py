"""What codecs cost a model in quality: measured with its own weights and our own engine, on a text.

The text is run through the model as it is, and once more for each *trial*: a codec at a set of cuts. At every position
the trial's logits are compared with those of the model as it is: by how much is the next word of the text more
surprising (in nats; its mean is the logarithm of the ratio of perplexities), is the likeliest word the same, how far
are the logits apart. The text is given, so nothing drifts: the differences are those of single steps.

Layer by layer: one block is loaded, all trials go through it, the next one is loaded. So a model needs no more memory
than a block, and what the trials have in common is computed once. Positions are taken in windows that begin anew.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import exp, sqrt
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from models.build.pack import Packed
from models.build.stage import build_stage_graph
from models.codecs import CodecReport, CodecTime, CutCost, Text
from models.coding import CodingStep
from models.engine.base import Array, StageSpec
from models.engine.onnx import OnnxStage
from wire.codecs import AS_IS, CODEC_VERSION, ELEMENT_BYTES, codecs_for
from wire.coding import coder
from wire.errors import Refused, UsageError
from wire.messages import CodecName
from wire.units import seconds_text

WINDOW_TOKENS: Final = 512
"""Of text that is given in one piece; longer ones would cost more attention and say the same."""

CHUNK_ROWS: Final = 128
HEAD_ROWS: Final = 32
"""Positions whose logits are in memory at once, twice: 12 MB for a vocabulary of 50,000."""

LEAST_TOKENS: Final = 256
MOST_TOKENS: Final = 65_536
MOST_BYTES: Final = 512 * 1024 * 1024
"""For the hidden states of all trials: the coordinator may be a board itself."""

MOST_SINGLE_CUTS: Final = 9
"""Places for a cut that are tried alone; between two of them counts the worse one."""

EVEN_CUTS: Final = (2, 3, 4)
"""So many cuts together, evenly spread; besides them, all cuts that there are."""

OTHER_BYTES: Final = 32 * 1024 * 1024
TIMES: Final = 15
"""To time a codec, and what is run through before each time: more than caches hold."""

Floats = npt.NDArray[np.float64]
Say = Callable[[str], None]


class Trial(NamedTuple):
    codec: CodecName
    cuts: frozenset[int]


def trials_for(codecs: Sequence[CodecName], blocks: int) -> list[Trial]:
    """Each codec at single cuts, at a few evenly spread, and at all."""
    count = min(MOST_SINGLE_CUTS, blocks + 1)
    singles = [frozenset({round(index * blocks / (count - 1))}) for index in range(count)] if blocks else []
    evens = [
        frozenset(round(index * blocks / (cuts + 1)) for index in range(1, cuts + 1))
        for cuts in EVEN_CUTS
        if cuts < blocks
    ]
    sets = list(dict.fromkeys([*singles, *evens, frozenset(range(blocks + 1))]))
    return [Trial(codec, cuts) for codec in codecs for cuts in sets]


def judge(packed: Packed, ids: Sequence[int], text: Text, threads: int, most_s: float, say: Say) -> CodecReport:
    """Measure every codec that the model can have. Takes fewer of the tokens if all would last longer than `most_s`.

    Raises UsageError for a text that is too short, Refused if even LEAST_TOKENS would last too long.
    """
    graph = packed.graph
    if len(ids) < LEAST_TOKENS:
        raise UsageError(f"the text has {len(ids)} tokens, {LEAST_TOKENS} are needed", try_="a longer --text")
    codecs = [codec for codec in codecs_for(graph.wire_dtype, graph.hidden) if codec != AS_IS]
    trials = trials_for(codecs, graph.blocks)
    with _Model(packed, threads) as model:
        tokens = _as_many_as(model, np.array(ids[:MOST_TOKENS], np.int64), trials, most_s)
        if len(tokens) < len(ids):
            say(f"{len(tokens)} of {len(ids)} tokens are taken: in {seconds_text(most_s)}, and in memory, are no more")
        say(f"{len(trials)} trials over {len(tokens)} tokens: about {seconds_text(model.lasts_s(trials, len(tokens)))}")
        rows, trials = _through_blocks(model, tokens, trials, say)
        perplexity, costs = _compared(model, tokens, rows, trials, say)
        engine = model.engine_name
    return CodecReport(
        codec_version=CODEC_VERSION,
        model=graph.model,
        precision=graph.precision,
        wire_dtype=graph.wire_dtype,
        hidden=graph.hidden,
        blocks=graph.blocks,
        engine=engine,
        text=text.name,
        text_digest=text.digest,
        tokens=len(tokens),
        perplexity=perplexity,
        costs=tuple(costs),
        times=tuple(_time_of(codec, graph.wire_dtype, graph.hidden) for codec in codecs),
    )


def _as_many_as(model: _Model, ids: npt.NDArray[np.int64], trials: Sequence[Trial], most_s: float) -> Any:
    """As many tokens as `most_s` seconds and MOST_BYTES allow."""
    model.time(ids)
    token_s = model.lasts_s(trials, len(ids)) / len(ids)
    fit = int(min(most_s / token_s, len(ids)))
    if fit < LEAST_TOKENS:
        raise Refused(
            f"{LEAST_TOKENS} tokens would last {seconds_text(token_s * LEAST_TOKENS)}",
            try_=f"--seconds {int(token_s * LEAST_TOKENS) + 1}",
        )
    row_bytes = model.graph.hidden * ELEMENT_BYTES[model.graph.wire_dtype]
    room = MOST_BYTES // (row_bytes * (len(trials) + 1))
    return ids[: min(fit, max(room, LEAST_TOKENS))]


def _through_blocks(
    model: _Model, ids: npt.NDArray[np.int64], trials: list[Trial], say: Say
) -> tuple[dict[Trial | None, Array], list[Trial]]:
    """Hidden states behind the last block [n, hidden] of the model as it is (None) and of each trial; and the trials
    whose codec could carry them."""
    graph = model.graph
    as_is = model.embedded(ids)
    apart: dict[Trial, Array] = {}
    given_up: set[CodecName] = set()
    said_s = time.monotonic()
    for block in range(graph.blocks + 1):
        for trial in trials:
            if block in trial.cuts and trial.codec not in given_up:
                crossing = coder(trial.codec, graph.wire_dtype, graph.hidden)
                rows = apart.get(trial, as_is)
                if crossing.unfit(rows):
                    given_up.add(trial.codec)
                    say(f"{trial.codec} can't carry this model: its hidden states are too large before block {block}")
                else:
                    apart[trial] = crossing.decode(crossing.encode(rows)).copy()
        for trial in [trial for trial in apart if trial.codec in given_up]:
            del apart[trial]
        if block == graph.blocks:
            break
        run = model.block(block)
        as_is = run(as_is)
        for trial, rows in apart.items():
            apart[trial] = run(rows)
        if time.monotonic() - said_s > 2.0:
            said_s = time.monotonic()
            say(f"{block + 1} of {graph.blocks} blocks")
    found: dict[Trial | None, Array] = {None: as_is}
    found.update((trial, rows) for trial, rows in apart.items())
    return found, [trial for trial in trials if trial in apart]


def _compared(
    model: _Model, ids: npt.NDArray[np.int64], rows: dict[Trial | None, Array], trials: Sequence[Trial], say: Say
) -> tuple[float, list[CutCost]]:
    """Perplexity as it is, and what each trial cost. The last position of a window has no next word."""
    say("comparing")
    places = np.array([at for at in range(len(ids) - 1) if (at + 1) % model.window])
    surprise = np.zeros((len(trials) + 1, len(places)))
    same = np.zeros((len(trials), len(places)), np.bool_)
    apart = np.zeros((len(trials), len(places)))
    for start in range(0, len(places), HEAD_ROWS):
        piece = slice(start, min(start + HEAD_ROWS, len(places)))
        at = places[piece]
        wanted = ids[at + 1]
        as_is = model.logits(rows[None][at]).copy()
        best = as_is.argmax(axis=1)
        surprise[-1, piece] = _surprise(as_is, wanted)
        for number, trial in enumerate(trials):
            logits = model.logits(rows[trial][at])
            surprise[number, piece] = _surprise(logits, wanted)
            same[number, piece] = logits.argmax(axis=1) == best
            apart[number, piece] = np.square(logits - as_is).mean(axis=1)
    costs = []
    for number, trial in enumerate(trials):
        more = surprise[number] - surprise[-1]
        costs.append(
            CutCost(
                codec=trial.codec,
                cuts=tuple(sorted(trial.cuts)),
                nats=float(more.mean()),
                nats_error=float(2 * more.std() / sqrt(len(more))),
                agreement=float(same[number].mean()),
                logit_error=float(sqrt(apart[number].mean())),
            )
        )
    return exp(float(surprise[-1].mean())), costs


def _surprise(logits: Array, wanted: npt.NDArray[np.int64]) -> Floats:
    """-log of the probability of the wanted words [n], from logits [n, vocabulary]."""
    most = logits.max(axis=1)
    total = np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)
    surprise: Floats = most + np.log(total) - logits[np.arange(len(wanted)), wanted]
    return surprise


def _time_of(codec: CodecName, wire_dtype: str, hidden: int) -> CodecTime:
    def seconds(rows: int) -> float:
        step = CodingStep(codec, wire_dtype, rows, hidden, OTHER_BYTES)
        return float(np.median([step() for _ in range(TIMES)])) / rows

    return CodecTime(codec=codec, row_s=seconds(1), chunk_row_s=seconds(64))


class _Model:
    """The modules of a packed model, one loaded at a time but for embedding and head. A context: it has a folder."""

    def __init__(self, packed: Packed, threads: int) -> None:
        self.graph = packed.graph
        self.window = min(WINDOW_TOKENS, packed.graph.max_context_tokens)
        self.engine_name = ""
        self._packed = packed
        self._threads = threads
        self._folder = Path()
        self._head: OnnxStage | None = None
        self._head_slots: list[int] = []
        self._block_s = self._head_s = 0.0
        """Per token."""
        self._stack = ExitStack()

    def __enter__(self) -> _Model:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edgelam-judge-")))
        self._head = self._load(self.graph.blocks, self.graph.blocks, head=True, slots=HEAD_ROWS)
        self._head_slots = [self._head.open() for _ in range(HEAD_ROWS)]
        self.engine_name = self._head.name
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def embedded(self, ids: npt.NDArray[np.int64]) -> Array:
        return _runner(self._load(0, 0, embedding=True), self.window)(ids)

    def block(self, number: int) -> Callable[[Array], Array]:
        """Runs rows through one block, window by window."""
        return _runner(self._load(number, number + 1), self.window)

    def logits(self, rows: Array) -> Array:
        """Of up to HEAD_ROWS rows; valid until the next call."""
        assert self._head is not None
        slots = self._head_slots[: len(rows)]
        logits, failed = self._head.step_many(slots, rows, [0] * len(rows))
        for error in failed.values():
            raise error
        return logits

    def time(self, ids: npt.NDArray[np.int64]) -> None:
        """See how long the first block and the head take."""
        rows = self.embedded(ids[: self.window])
        run = self.block(0)
        run(rows)
        self._block_s = _seconds(lambda: run(rows)) / len(rows)
        few = rows[:HEAD_ROWS]
        _surprise(self.logits(few), ids[: len(few)])
        self._head_s = _seconds(lambda: _surprise(self.logits(few), ids[: len(few)])) / len(few)

    def lasts_s(self, trials: Sequence[Trial], tokens: int) -> float:
        """How long all of it will last, as far as that was seen."""
        blocks = self.graph.blocks + sum(self.graph.blocks - min(trial.cuts) for trial in trials)
        return tokens * (blocks * self._block_s + (len(trials) + 1) * self._head_s)

    def _load(self, first: int, end: int, *, embedding: bool = False, head: bool = False, slots: int = 1) -> OnnxStage:
        graph = self.graph
        data = build_stage_graph(
            self._packed.config, graph.precision, graph.wire_dtype,
            first_block=first, end_block=end, embedding=embedding, head=head,
        )  # fmt: skip
        path = self._folder / "stage.onnx"
        path.write_bytes(data)
        names = ["embedding"] * embedding + [f"block.{block}" for block in range(first, end)] + ["head"] * head
        digests = dict.fromkeys(digest for name in names for digest in graph.module(name).artifacts)
        spec = StageSpec(
            embedding=embedding, head=head, first_block=first, end_block=end, hidden=graph.hidden,
            vocabulary=graph.vocabulary, wire_dtype=graph.wire_dtype, context_tokens=self.window, slots=slots,
            threads=self._threads,
        )  # fmt: skip
        return OnnxStage.load(path, [self._packed.files[digest] for digest in digests], spec)


def _runner(stage: OnnxStage, window: int) -> Callable[[Array], Array]:
    slot = stage.open()

    def run(rows: Array) -> Array:
        found: list[Array] = []
        for start in range(0, len(rows), window):
            end = min(start + window, len(rows))
            for at in range(start, end, CHUNK_ROWS):
                found.append(stage.step(slot, rows[at : min(at + CHUNK_ROWS, end)], at - start).copy())
        return np.concatenate(found)

    return run


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s
