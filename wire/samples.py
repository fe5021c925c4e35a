"""What else than texts a job may learn labels of: how boards make samples of their files. Part of job files and of
orders (wire.messages.TrainingTask) alike."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from wire import limits

Column = Annotated[str, Meta(min_length=1, max_length=64)]
Finite = Annotated[float, Meta(ge=-1e12, le=1e12)]


class Series(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows of readings in a file with named columns, cut into windows. A window never crosses a bad row, the end of a
    file, or where label or `id` change; nor, with `time`, a gap."""

    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=limits.MAX_SERIES_COLUMNS)]
    """Of readings."""
    label: Column = "label"
    id: Annotated[str, Meta(max_length=64)] = ""
    """Column that says which recording a row belongs to; '': a file is one."""
    time: Annotated[str, Meta(max_length=64)] = ""
    """Column of times that grow; '': there is none, and no gap within a file."""
    most_gap: Annotated[float, Meta(gt=0, le=1e12)] | None = None
    """Between the times of two rows that follow each other, in the column's own unit."""
    window: Annotated[int, Meta(ge=limits.LEAST_SERIES_WINDOW, le=limits.MAX_SERIES_WINDOW)] = 100
    """Rows."""
    stride: Annotated[int, Meta(ge=1, le=limits.MAX_SERIES_WINDOW)] | None = None
    """Rows from the beginning of a window to that of the next; None: `window`."""
    centre: Annotated[tuple[Finite, ...], Meta(max_length=limits.MAX_SERIES_COLUMNS)] = ()
    """Of each column's readings, roughly; none: 0."""
    scale: Annotated[tuple[Annotated[float, Meta(gt=0, le=1e12)], ...], Meta(max_length=limits.MAX_SERIES_COLUMNS)] = ()
    """How far each column's readings mostly are from that; none: 1. Declared, since boards tell no statistics."""
    kernels: Annotated[int, Meta(ge=8, le=limits.MAX_FEATURES)] = 512
    most_windows: Annotated[int, Meta(ge=2, le=limits.MAX_SAMPLES_KEPT)] = 10_000
    """Of a board; of more, so many are drawn."""

    @property
    def step(self) -> int:
        return self.window if self.stride is None else self.stride
