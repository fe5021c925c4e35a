"""Stages on onnxruntime: weights mapped once, KV cache in place, one call per step.

A step must cost what the operators cost, so all it needs is bound beforehand (models.engine.bound); what is left is to
check what was given, and what came of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from models.engine.base import Array, ContextFull, EngineFailed, RowStep, StageSpec
from models.engine.bound import Bound
from models.engine.manifest import StageManifest, load_graph
from models.engine.memory import Weights, made_weights, map_weights
from models.engine.places import Places, Slot
from models.engine.rows import WIRE_DTYPES, Rows, has_special
from models.engine.session import Session
from wire.errors import EdgelamError

TOKEN_BYTES: Final = 4
"""Of a token id as it travels, int32."""


class OnnxStage:
    """A stage loaded into one onnxruntime session. See `models.engine.base.StageEngine`."""

    def __init__(self, session: Session, manifest: StageManifest, weights: Weights, spec: StageSpec) -> None:
        self._session = session
        self._manifest = manifest
        self._weights = weights
        self._spec = spec
        self._places = Places(manifest, spec.context_tokens, spec.slots)
        self._bound = Bound(session, manifest, self._places, spec)
        self._batches: OrderedDict[tuple[int, ...], _Batch] = OrderedDict()
        """By slots in the order given; forgotten when one is closed or moved."""
        self.run = session.run
        """Make a step with what is bound; raises EngineFailed."""

    @classmethod
    def load(cls, graph_path: Path, weight_paths: Iterable[Path], spec: StageSpec) -> OnnxStage:
        """Load a graph and the files that hold its weights; more tensors than the stage needs do no harm.

        Raises EngineFailed (not our graph, another stage than ordered, weights missing or of the wrong shape, or what
        onnxruntime says), CorruptData (a damaged file), Refused (a context the model can't do).
        """
        graph, manifest = load_graph(graph_path, spec)
        manifest.config.check_context(spec.context_tokens)
        return cls._start(graph, manifest, map_weights(manifest.weights, weight_paths), spec, graph_path)

    @classmethod
    def load_synthetic(cls, graph_path: Path, spec: StageSpec, seed: int) -> OnnxStage:
        """Load a graph with weights made up here, for measuring: time does not depend on their values."""
        graph, manifest = load_graph(graph_path, spec)
        weights = made_weights(manifest.weights, graph_path.parent, seed)
        return cls._start(graph, manifest, weights, spec, graph_path)

    @classmethod
    def _start(
        cls, graph: bytes, manifest: StageManifest, weights: Weights, spec: StageSpec, graph_path: Path
    ) -> OnnxStage:
        session = Session(graph, weights.tensors, spec.threads, graph_path.name)
        weights.forget_pages()
        return cls(session, manifest, weights, spec)

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def vocabulary(self) -> int:
        return self._spec.vocabulary

    @property
    def manifest(self) -> StageManifest:
        return self._manifest

    @property
    def held_bytes(self) -> int:
        """Weights, rope tables, KV buffers of the slots in use (in full), buffers of rows."""
        return self._weights.size_bytes + self._places.used_bytes + self._bound.size_bytes

    @property
    def idle_bytes(self) -> int:
        """Nothing: a place that nobody uses has no pages."""
        return 0

    def open(self, adapter: str = "") -> int:
        adapters = self._manifest.adapters
        ranks = adapters.columns(adapter) if adapters is not None and adapter else None
        if adapter and ranks is None and self._manifest.blocks:
            raise EngineFailed(f"adapter {adapter} is not in this stage: run again")
        slot = self._places.open()
        slot.ranks = ranks
        return slot.number

    def close(self, slot: int) -> None:
        self._places.close(self._places.find(slot))
        for slots in [slots for slots in self._batches if slot in slots]:
            del self._batches[slots]

    def step(self, slot: int, given: Array, position: int, logits_rows: int = 1) -> Array:
        opened = self._places.find(slot)
        count = given.shape[0] if given.ndim else 0
        self._check_place(opened, position, count)
        end = position + count
        if not self._manifest.head:
            logits_rows = 1
        rows = self._bound.rows(count, logits_rows)
        binding = self._bound.one(opened.place, rows, count, logits_rows)
        into = rows.given_rows
        if given.shape != into.shape or not (given.dtype == into.dtype or _fits(given.dtype, into.dtype)):
            raise EngineFailed(f"given {given.dtype} {list(given.shape)}, expected {into.dtype} {list(into.shape)}")
        into[...] = given
        rows.take(0, opened.ranks)
        rows.last_row.fill(end - 1)
        rows.end.fill(end)
        self._check_given(rows)
        # What lies behind `position` is overwritten from here on; if the step fails the slot ends there.
        opened.rows = position
        self.run(binding)
        self.settle(opened, rows, end)
        return rows.result

    def step_many(
        self, slots: Sequence[int], given: Array, positions: Sequence[int]
    ) -> tuple[Array, dict[int, EdgelamError]]:
        if len(slots) == 1:
            return self._row_alone(slots[0], given, positions[0])
        batch = self._batches.get(tuple(slots)) or self._new_batch(slots)
        rows = batch.rows
        wanted = (len(slots), *rows.given.shape[2:])
        if given.shape != wanted or not (given.dtype == rows.given.dtype or _fits(given.dtype, rows.given.dtype)):
            raise EngineFailed(f"given {given.dtype} {list(given.shape)}, expected {rows.given.dtype} {list(wanted)}")
        failed = self._unfit(batch.slots, given, positions)
        if failed:
            return self._rows_without(failed, slots, given, positions)
        at = slice(None) if batch.in_order else batch.order
        rows.given[at, 0] = given
        if rows.adapters is not None:
            for place, slot in zip(batch.order, batch.slots, strict=True):
                rows.take(place, slot.ranks)
        rows.last_row[at] = positions
        rows.end.fill(max(positions) + 1)
        for slot, position in zip(batch.slots, positions, strict=True):
            slot.rows = position
        self.run(batch.binding)
        if self._has_special(rows):
            failed = self._overflows(rows, batch.order)
        for index, slot in enumerate(batch.slots):
            if index not in failed:
                slot.rows += 1
        result = rows.result if rows.logits is not None else rows.result[:, 0]
        return result[at], failed

    def _row_alone(self, slot: int, given: Array, position: int) -> tuple[Array, dict[int, EdgelamError]]:
        try:
            return self.step(slot, given, position).reshape(1, -1), {}
        except (ContextFull, EngineFailed) as error:
            return self._nothing(1), {0: error}

    def _nothing(self, count: int) -> Array:
        """What rows that could not be run have got."""
        if self._manifest.head:
            return np.zeros((count, self._spec.vocabulary), np.float32)
        return np.zeros((count, self._spec.hidden), WIRE_DTYPES[self._spec.wire_dtype])

    def row(self, slot: int) -> RowStep | None:
        opened = self._places.find(slot)
        if not self._bound.has(opened.place, 1):
            return None
        return _OneRow(self, opened, self._bound.rows(1, 1))

    def binding_of_one(self, slot: Slot) -> Any:
        """For steps of one row, where the slot lies now."""
        return self._bound.one(slot.place, self._bound.rows(1, 1), 1, 1)

    def settle(self, opened: Slot, rows: Rows, end: int) -> None:
        """Count the rows of a step, unless it gave what is no number. Raises EngineFailed."""
        if self._has_special(rows):
            raise self._overflow()
        opened.rows = end

    def bare_run(self, slot: int, count: int) -> Callable[[Array, int], Array]:
        """Give onnxruntime's own call for steps of `count` rows, inputs written and nothing checked: what a benchmark
        compares `step` with. A step of so many rows must have been made in the slot."""
        rows = self._bound.rows(count, 1)
        binding = self._bound.one(self._places.find(slot).place, rows, count, 1)

        def run(given: Array, position: int) -> Array:
            rows.given_rows[...] = given
            rows.last_row.fill(position + count - 1)
            rows.end.fill(position + count)
            self._session.bare_run(binding)
            return rows.result

        return run

    def _check_place(self, slot: Slot, position: int, count: int) -> None:
        """Raise ContextFull or EngineFailed if no rows can come here."""
        if position + count > self._spec.context_tokens:
            raise ContextFull(f"{position + count} tokens in a context of {self._spec.context_tokens}")
        if not 0 <= position <= slot.rows or count == 0:
            raise EngineFailed(f"step of {count} rows at position {position} after {slot.rows} rows")

    def _check_given(self, rows: Rows) -> None:
        if self._manifest.embedding:
            least, most = int(rows.given.min()), int(rows.given.max())
            if least < 0 or most >= self._spec.vocabulary:
                raise EngineFailed(f"token ids {least} to {most} in a vocabulary of {self._spec.vocabulary}")

    def _unfit(self, slots: Sequence[Slot], given: Array, positions: Sequence[int]) -> dict[int, EdgelamError]:
        """Which rows of a batch can't be run, and why."""
        failed: dict[int, EdgelamError] = {}
        for index, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            try:
                self._check_place(slot, position, 1)
                if self._manifest.embedding and not 0 <= int(given[index]) < self._spec.vocabulary:
                    raise EngineFailed(f"token id {int(given[index])} in a vocabulary of {self._spec.vocabulary}")
            except (ContextFull, EngineFailed) as error:
                failed[index] = error
        return failed

    def _rows_without(
        self, failed: dict[int, EdgelamError], slots: Sequence[int], given: Array, positions: Sequence[int]
    ) -> tuple[Array, dict[int, EdgelamError]]:
        """Run the rows that did not fail. Those that did get zeros."""
        fine = [index for index in range(len(slots)) if index not in failed]
        results = self._nothing(len(slots))
        if fine:
            there = [slots[index] for index in fine], given[fine], [positions[index] for index in fine]
            results[fine], later = self.step_many(*there)
            failed |= {fine[index]: error for index, error in later.items()}
        return results, failed

    def _has_special(self, rows: Rows) -> bool:
        """Did a step give what is no number? A stage of a head alone has no hidden states of its own to look at, and
        its product may hide a NaN: there it is what was given."""
        return has_special(rows.bits, rows.scratch, self._spec.wire_dtype)

    def _overflows(self, rows: Rows, order: Sequence[int]) -> dict[int, EdgelamError]:
        """The rows of a batch that are no numbers."""
        wire = self._spec.wire_dtype
        return {
            index: self._overflow()
            for index, at in enumerate(order)
            if has_special(rows.bits[at], rows.scratch[at], wire)
        }

    def _overflow(self) -> EngineFailed:
        own = self._manifest.embedding or self._manifest.blocks
        what = "the output of the stage" if own else "the hidden states given"
        return EngineFailed(
            f"{what} left the range of {self._spec.wire_dtype}",
            try_="deploy with wire dtype bf16" if self._spec.wire_dtype == "f16" else "check the checkpoint",
        )

    def _new_batch(self, slots: Sequence[int]) -> _Batch:
        """Bring the slots side by side, and keep what their steps need."""
        opened = [self._places.find(slot) for slot in slots]
        if not opened or len(set(slots)) != len(opened):
            raise EngineFailed(f"a step over the slots {list(slots)}, which should be different ones")
        before = [slot.place for batch in self._batches.values() for slot in batch.slots]
        first = self._places.gather(opened, self._other_teams(opened))
        if before != [slot.place for batch in self._batches.values() for slot in batch.slots]:
            self._batches.clear()
        rows, binding = self._bound.many(first, len(opened))
        order = [slot.place - first for slot in opened]
        batch = self._batches[tuple(slots)] = _Batch(opened, order, order == sorted(order), rows, binding)
        while len(self._batches) > self._spec.slots:
            self._batches.popitem(last=False)
        return batch

    def _other_teams(self, together: Sequence[Slot]) -> list[list[Slot]]:
        """Who else stepped together, the last ones first; nobody is in two teams."""
        seen, teams = set(map(id, together)), []
        for batch in reversed(self._batches.values()):
            if seen.isdisjoint(map(id, batch.slots)):
                seen.update(map(id, batch.slots))
                teams.append(batch.slots)
        return teams


class _OneRow:
    """See `models.engine.base.RowStep`. All that is looked up was looked up before: a step that has run through the
    caches finds this code cold, and cold code costs by its length."""

    def __init__(self, stage: OnnxStage, slot: Slot, rows: Rows) -> None:
        self._stage = stage
        self._slot = slot
        self._place = slot.place
        self._binding = stage.binding_of_one(slot)
        self._rows = rows
        self._tokens = rows.given if rows.given.dtype == np.int64 else None
        self._given = rows.given.view(np.uint8).reshape(-1).data
        self._vocabulary = stage.vocabulary
        self.output = None if rows.logits is not None else rows.result.view(np.uint8).reshape(-1).data
        self.result: Array = rows.result

    def fill(self, given: memoryview) -> bool:
        if self._tokens is None:
            if len(given) != len(self._given):
                return False
            self._given[:] = given
            return True
        token = int.from_bytes(given, "little", signed=True)
        if len(given) != TOKEN_BYTES or not 0 <= token < self._vocabulary:
            return False
        self._tokens.fill(token)
        return True

    def run(self, position: int) -> None:
        rows, slot = self._rows, self._slot
        if rows.adapters is not None:
            rows.take(0, slot.ranks)
        if slot.place != self._place:
            self._binding, self._place = self._stage.binding_of_one(slot), slot.place
        rows.last_row.fill(position)
        rows.end.fill(position + 1)
        slot.rows = position
        self._stage.run(self._binding)

    def settle(self, position: int) -> None:
        self._stage.settle(self._slot, self._rows, position + 1)


class _Batch(NamedTuple):
    """Requests that step together."""

    slots: list[Slot]
    order: list[int]
    """Where among the rows of a step each of them is."""
    in_order: bool
    rows: Rows
    binding: Any


def _fits(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Token ids may come in any integer type that int64 holds; hidden states come as they are wanted."""
    return wanted == np.int64 and given.kind in "iu" and given != np.uint64
