"""Stages on whatever executes a graph of standard operators (models.build.standard): slots, keys and values, checks.

An executor computes and this class keeps what lasts: one buffer per tensor of keys or values in the executor's memory,

    [slots, kv_heads, context, head_dim]

which the graph only reads. What a step makes for its rows is copied behind the rows before, so a step that fails has
changed nothing that counts. A step over several requests runs all slots and throws away what was not asked for: on the
devices that this is for a row more costs little, and buffers never move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from models.engine.base import Array, ContextFull, EngineFailed, NoSlot, StageSpec, without_adapters
from models.engine.device import ALIGNMENT_BYTES, At, Executor, Limits, size_bytes
from models.engine.expand import compute_of
from models.engine.manifest import StageManifest
from models.engine.memory import rope_tables
from models.engine.rows import WIRE_DTYPES, has_special
from wire.errors import EdgelamError

MOST_ROWS: Final = 128
"""Of one request in one execution; longer steps are made in pieces. Shapes above cost memory and time to build for."""

MOST_LOGITS: Final = 16
"""Rows of logits of one step: as many as tokens are ever guessed, and one."""

CONTEXT_STEP: Final = 64
"""The buffers' context is a multiple of it: places of slots stay aligned for every size of head."""


def limits_of(spec: StageSpec) -> Limits:
    context = -(-spec.context_tokens // CONTEXT_STEP) * CONTEXT_STEP
    return Limits(rows=min(MOST_ROWS, spec.context_tokens), logits_rows=MOST_LOGITS, slots=spec.slots, context=context)


class StandardStage:
    """See `models.engine.base.StageEngine`."""

    def __init__(self, executor: Executor, manifest: StageManifest, spec: StageSpec) -> None:
        self._executor = executor
        self._memory = executor.memory
        self._manifest = manifest
        self._spec = spec
        self._limits = limits_of(spec)
        self._rows: list[int | None] = [None] * spec.slots
        """Rows run of the request in each slot; None where it is free."""
        self._taken_bytes = 0
        config, limits = manifest.config, self._limits
        self._kept_dtype = compute_of(manifest.precision)
        self._tensors = [f"kv.{index}.{part}" for index in manifest.blocks for part in ("key", "value")]
        self._row_bytes = size_bytes((config.head_dim,), self._kept_dtype)
        self._slot_bytes = config.kv_heads * limits.context * self._row_bytes
        self._buffers = [self._take(spec.slots * self._slot_bytes) for _ in self._tensors]
        most = max(limits.rows, spec.slots)
        self._fresh = [self._take(most * config.kv_heads * self._row_bytes) for _ in self._tensors]
        self._fixed = self._constants() if manifest.blocks else {}
        width = 1 if manifest.embedding else config.hidden
        self._given = self._take(size_bytes((most, width), "f32"))
        self._position = self._take(size_bytes((spec.slots,), "i32"))
        self._hidden = self._take(size_bytes((most, config.hidden), "f32"))
        self._wanted = self._take(size_bytes((limits.logits_rows,), "i32"))
        logits = max(limits.logits_rows, spec.slots) if manifest.head else 0
        self._logits = self._take(size_bytes((logits, config.vocabulary), "f32"))

    @property
    def name(self) -> str:
        return self._executor.name

    @property
    def manifest(self) -> StageManifest:
        return self._manifest

    @property
    def held_bytes(self) -> int:
        """All memory that was taken, whoever uses it."""
        return self._executor.held_bytes + self._taken_bytes

    @property
    def idle_bytes(self) -> int:
        return self._rows.count(None) * len(self._tensors) * self._slot_bytes

    def open(self, adapter: str = "") -> int:
        without_adapters(adapter)
        if None not in self._rows:
            raise NoSlot(f"all {len(self._rows)} slots are taken", try_="try again when a request has ended")
        slot = self._rows.index(None)
        self._rows[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        self._run_rows(slot)
        self._rows[slot] = None

    def row(self, slot: int) -> None:
        """None: what is given and what comes has to be copied."""
        self._run_rows(slot)

    def step(self, slot: int, given: Array, position: int, logits_rows: int = 1) -> Array:
        count = given.shape[0] if given.ndim else 0
        self._check_place(slot, position, count)
        if not 1 <= logits_rows <= min(count, self._limits.logits_rows):
            raise EngineFailed(f"logits of {logits_rows} rows in a step of {count}, at most {MOST_LOGITS} are made")
        rows = self._checked(given)
        # What lies behind `position` is overwritten from here on; if the step fails the slot ends there.
        self._rows[slot] = position
        results = []
        first = count % self._limits.rows or min(count, self._limits.rows)
        ends = range(first, count + 1, self._limits.rows)
        for start, end in zip((0, *ends), ends, strict=False):
            last = end == count
            results.append(self._piece(slot, rows[start:end], position + start, logits_rows if last else 1))
        if not self._manifest.head:
            return results[0] if len(results) == 1 else np.concatenate(results)
        return results[-1][0] if logits_rows == 1 else results[-1]

    def step_many(
        self, slots: Sequence[int], given: Array, positions: Sequence[int]
    ) -> tuple[Array, dict[int, EdgelamError]]:
        if not slots or len(set(slots)) != len(slots):
            raise EngineFailed(f"a step over the slots {list(slots)}, which should be different ones")
        rows = self._checked(given, check_tokens=False)
        failed: dict[int, EdgelamError] = {}
        for index, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            try:
                self._check_place(slot, position, 1)
                self._check_tokens(rows[index : index + 1])
            except (ContextFull, EngineFailed) as error:
                failed[index] = error
        head, spec = self._manifest.head, self._spec
        made = np.zeros((len(slots), spec.vocabulary), np.float32) if head else self._nothing(len(slots))
        fine = [index for index in range(len(slots)) if index not in failed]
        if not fine:
            return made, failed
        if len(slots) == 1:
            # A row alone is the same step as in `step`.
            made[0] = self.step(slots[0], given, positions[0])
            return made, failed
        places = [slots[index] for index in fine]
        whole = np.zeros((spec.slots, *rows.shape[1:]), rows.dtype)
        whole[places] = rows[fine]
        begins = np.zeros(spec.slots, np.int32)
        begins[places] = [positions[index] for index in fine]
        for index in fine:
            self._rows[slots[index]] = positions[index]
        hidden, logits = self._execute(0, spec.slots, whole[:, None], begins, np.zeros(1, np.int32))
        for index in fine:
            slot = slots[index]
            if self._special(hidden[slot]):
                failed[index] = self._overflow()
                continue
            self._keep(slot, positions[index], slot, 1)
            self._rows[slot] = positions[index] + 1
            made[index] = logits[slot] if head else hidden[slot, 0]
        return made, failed

    def _piece(self, slot: int, rows: Array, position: int, logits_rows: int) -> Array:
        """One execution over rows of one request: hidden states [n, hidden], or logits [logits_rows, vocabulary]."""
        count = len(rows)
        wanted = np.arange(count - logits_rows, count, dtype=np.int32)
        hidden, logits = self._execute(slot, 1, rows[None], np.array([position], np.int32), wanted)
        if self._special(hidden):
            raise self._overflow()
        self._keep(slot, position, 0, count)
        self._rows[slot] = position + count
        return logits if self._manifest.head else hidden[0]

    def _execute(self, slot: int, requests: int, rows: Array, begins: Array, wanted: Array) -> tuple[Array, Array]:
        """Run rows [requests, n, ..] of the requests from this slot on: (hidden states, logits), on the host."""
        manifest, memory, config = self._manifest, self._memory, self._manifest.config
        count, wire = rows.shape[1], manifest.wire_dtype
        given: dict[str, At] = {}
        results: dict[str, At] = {}
        memory.write(self._given, rows)
        if manifest.embedding:
            given["tokens"] = At(self._given, (requests, count), "i32")
        else:
            given["hidden"] = At(self._given, rows.shape, wire)
        hidden = np.empty((requests, count, config.hidden), WIRE_DTYPES[wire]) if self._makes_hidden else rows
        if self._makes_hidden:
            results["hidden.out"] = At(self._hidden, hidden.shape, wire)
        if manifest.blocks:
            memory.write(self._position, begins)
            given["position"] = At(self._position, (requests,), "i32")
            given |= self._fixed
            given["offsets"] = At(self._fixed["places"].address, (count,), "i32")
        shape = (requests, config.kv_heads, self._limits.context, config.head_dim)
        fresh = (requests, config.kv_heads, count, config.head_dim)
        for name, buffer, made in zip(self._tensors, self._buffers, self._fresh, strict=True):
            given[name] = At(buffer + slot * self._slot_bytes, shape, self._kept_dtype)
            results[f"{name}.new"] = At(made, fresh, self._kept_dtype)
        logits = np.empty((requests * len(wanted) if manifest.head else 0, config.vocabulary), np.float32)
        if manifest.head:
            memory.write(self._wanted, wanted)
            given["logits_rows"] = At(self._wanted, wanted.shape, "i32")
            results["logits"] = At(self._logits, logits.shape, "f32")
        self._executor.run(given, results)
        if self._makes_hidden:
            memory.read(self._hidden, hidden)
        if manifest.head:
            memory.read(self._logits, logits)
        memory.wait()
        return hidden, logits

    def _keep(self, slot: int, position: int, request: int, count: int) -> None:
        """Copy what was made for rows of a request of the step behind the rows before, in its slot."""
        heads, row = self._manifest.config.kv_heads, self._row_bytes
        pitch = self._limits.context * row
        for buffer, made in zip(self._buffers, self._fresh, strict=True):
            to = buffer + slot * self._slot_bytes + position * row
            self._memory.copy_rows(to, pitch, made + request * heads * count * row, count * row, count * row, heads)

    def _constants(self) -> dict[str, At]:
        """What all steps are given."""
        context, config = self._limits.context, self._manifest.config
        places = np.arange(context, dtype=np.int32)
        found: dict[str, tuple[Array, str]] = {"places": (places, "i32")}
        for name, table in zip(("rope.cos", "rope.sin"), rope_tables(config, context), strict=True):
            found[name] = (table, "f32")
        kept = {name: At(self._take(array.nbytes), array.shape, dtype) for name, (array, dtype) in found.items()}
        for name, (array, _) in found.items():
            self._memory.write(kept[name].address, array)
        return kept

    def _take(self, wanted_bytes: int) -> int:
        self._taken_bytes += wanted_bytes
        return self._memory.take(max(wanted_bytes, ALIGNMENT_BYTES))

    @property
    def _makes_hidden(self) -> bool:
        return self._manifest.embedding or bool(self._manifest.blocks)

    def _nothing(self, count: int) -> Array:
        return np.zeros((count, self._spec.hidden), WIRE_DTYPES[self._spec.wire_dtype])

    def _run_rows(self, slot: int) -> int:
        found = self._rows[slot] if 0 <= slot < len(self._rows) else None
        if found is None:
            raise EngineFailed(f"slot {slot} is not open")
        return found

    def _check_place(self, slot: int, position: int, count: int) -> None:
        run = self._run_rows(slot)
        if position + count > self._spec.context_tokens:
            raise ContextFull(f"{position + count} tokens in a context of {self._spec.context_tokens}")
        if not 0 <= position <= run or count == 0:
            raise EngineFailed(f"step of {count} rows at position {position} after {run} rows")

    def _checked(self, given: Array, check_tokens: bool = True) -> Array:
        """Token ids as int32, or hidden states as they travel. Raises EngineFailed."""
        if self._manifest.embedding:
            if given.ndim != 1 or given.dtype.kind not in "iu":
                raise EngineFailed(f"given {given.dtype} {list(given.shape)}, expected token ids")
            if check_tokens:
                self._check_tokens(given)
            return np.clip(given, -1, self._spec.vocabulary).astype(np.int32)
        wanted = WIRE_DTYPES[self._spec.wire_dtype]
        if given.dtype != wanted or given.ndim != 2 or given.shape[1] != self._spec.hidden:
            raise EngineFailed(
                f"given {given.dtype} {list(given.shape)}, expected {wanted} [{len(given)}, {self._spec.hidden}]"
            )
        return np.ascontiguousarray(given)

    def _check_tokens(self, given: Array) -> None:
        if self._manifest.embedding and given.size:
            least, most = int(given.min()), int(given.max())
            if least < 0 or most >= self._spec.vocabulary:
                raise EngineFailed(f"token ids {least} to {most} in a vocabulary of {self._spec.vocabulary}")

    def _special(self, hidden: Array) -> bool:
        bits = hidden.view({2: np.uint16, 4: np.uint32}[hidden.itemsize])
        return has_special(bits, np.empty_like(bits), self._spec.wire_dtype)

    def _overflow(self) -> EngineFailed:
        what = "the output of the stage" if self._makes_hidden else "the hidden states given"
        return EngineFailed(
            f"{what} left the range of {self._spec.wire_dtype}",
            try_="deploy with wire dtype bf16" if self._spec.wire_dtype == "f16" else "check the checkpoint",
        )
