"""Everything a step needs, bound to the session beforehand.

Bindings are kept for each place of keys and values and number of rows that come again (one, few, the last other number,
one of each of several requests), so that a step writes its rows and two numbers into buffers that are bound already.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import numpy as np

from models.engine.base import Array, EngineFailed, StageSpec
from models.engine.manifest import StageManifest
from models.engine.memory import rope_tables
from models.engine.places import Places
from models.engine.rows import Rows
from models.engine.session import Session, value

BINDINGS_PER_SLOT: Final = 8
"""Kept: single rows, a chunk of a prompt, and ranges that begin here, which come and go with the requests."""

SMALL_ROWS: Final = 16
"""Steps of so many rows of one request come again and again where tokens are guessed; buffers for them stay."""

_Shape = tuple[int, int, int, int]
"""First place, requests, rows of each, rows with logits: what a binding is for."""


class Bound:
    """Buffers of rows, and bindings of them to places."""

    def __init__(self, session: Session, manifest: StageManifest, places: Places, spec: StageSpec) -> None:
        self._session = session
        self._manifest = manifest
        self._places = places
        self._slots = spec.slots
        tables = rope_tables(manifest.config, spec.context_tokens) if manifest.blocks else ()
        self._tables = [value(table) for table in tables]
        self._rows: dict[tuple[int, int], Rows] = {}
        """Of one request, by their number and that of those with logits: small ones, and one other number."""
        self._many_rows: Rows | None = None
        """One row of each request, for as many as there are slots."""
        self._bindings: OrderedDict[_Shape, Any] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Rope tables and buffers of rows."""
        kinds = (*self._rows.values(), self._many_rows)
        rows = sum(rows.size_bytes for rows in kinds if rows is not None)
        return rows + sum(int(np.prod(table.shape())) * 4 for table in self._tables)

    def rows(self, count: int, logits_rows: int) -> Rows:
        """Buffers for `count` rows of one request. Raises EngineFailed for logits of more rows than there are."""
        return self._rows.get((count, logits_rows)) or self._new_rows(count, logits_rows)

    def one(self, place: int, rows: Rows, count: int, logits_rows: int) -> Any:
        """For steps over these `rows` of the request in a place."""
        return self._bindings.get((place, 1, count, logits_rows)) or self._bind(place, rows)

    def many(self, first: int, requests: int) -> tuple[Rows, Any]:
        """For steps over a row of each request in so many places from `first` on."""
        if self._many_rows is None:
            self._many_rows = Rows(self._manifest, self._slots, 1)
        rows = self._many_rows.first(requests)
        return rows, self._bindings.get((first, requests, 1, 1)) or self._bind(first, rows)

    def has(self, place: int, count: int) -> bool:
        """Whether a step of so many rows was made in a place lately."""
        return (place, 1, count, 1) in self._bindings

    def _new_rows(self, count: int, logits_rows: int) -> Rows:
        """Keep buffers for few rows and for one other number: chunks of a prompt but the last are of one size."""
        if not 1 <= logits_rows <= count:
            raise EngineFailed(f"logits of {logits_rows} rows in a step of {count}")
        many = count > SMALL_ROWS
        for other in [kept for kept in self._rows if kept[0] > SMALL_ROWS] if many else []:
            del self._rows[other]
            for shape in [shape for shape in self._bindings if shape[2:] == other]:
                del self._bindings[shape]
        self._rows[count, logits_rows] = Rows(self._manifest, 1, count, logits_rows)
        return self._rows[count, logits_rows]

    def _bind(self, first: int, rows: Rows) -> Any:
        """Bind the buffers of rows and the keys and values from this place on. The longest kept binding makes room."""
        binding = self._session.binding()
        given = "tokens" if self._manifest.embedding else "hidden"
        binding.bind_ortvalue_input(given, value(rows.given, _wire_of(rows.given)))
        if self._manifest.blocks:
            binding.bind_ortvalue_input("last_row", value(rows.last_row))
            binding.bind_ortvalue_input("rows", value(rows.end))
            if rows.adapters is not None:
                binding.bind_ortvalue_input("adapters", value(rows.adapters))
            for name, table in zip(("rope.cos", "rope.sin"), self._tables, strict=True):
                binding.bind_ortvalue_input(name, table)
        if rows.hidden is not None:
            binding.bind_ortvalue_output("hidden.out", value(rows.hidden, _wire_of(rows.hidden)))
        if rows.logits is not None:
            binding.bind_ortvalue_input("logits_from", value(rows.logits_from))
            binding.bind_ortvalue_output("logits", value(rows.logits))
        requests = len(rows.given)
        for name, buffer in self._places.views(first, requests):
            shared = value(buffer)
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(f"{name}.out", shared)
        logits_rows = len(rows.logits) // requests if rows.logits is not None else 1
        self._bindings[first, requests, rows.given.shape[1], logits_rows] = binding
        while len(self._bindings) > BINDINGS_PER_SLOT * self._slots:
            self._bindings.popitem(last=False)
        return binding


def _wire_of(array: Array) -> str:
    return "bf16" if array.dtype == np.uint16 else ""
