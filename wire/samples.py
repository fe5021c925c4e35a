"""What else than texts a job may learn labels of: how boards make samples of their files. Part of job files and of
orders (wire.messages.TrainingTask) alike."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from wire import limits

Column = Annotated[str, Meta(min_length=1, max_length=64)]
Finite = Annotated[float, Meta(ge=-1e12, le=1e12)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]


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
    scale: Annotated[tuple[Positive, ...], Meta(max_length=limits.MAX_SERIES_COLUMNS)] = ()
    """How far each column's readings mostly are from that; none: 1. Declared, since boards tell no statistics."""
    kernels: Annotated[int, Meta(ge=8, le=limits.MAX_FEATURES)] = 512
    most_windows: Annotated[int, Meta(ge=2, le=limits.MAX_SAMPLES_KEPT)] = 10_000
    """Of a board; of more, so many are drawn."""

    @property
    def step(self) -> int:
        return self.window if self.stride is None else self.stride


class Images(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pictures in folders that are called like their labels, and what of a frozen net's graph their features are."""

    features: Annotated[str, Meta(max_length=1024)] = ""
    """Name of a tensor in the graph; '': the one that the catalog says."""
    pool: Literal["first", "mean"] = "first"
    """Of a tensor with a row for each part of the picture: 'first' is the class token of a vision transformer."""
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    """Of red, green and blue, 0 to 1, as the net was trained: ImageNet's."""
    deviation: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    most_pixels: Annotated[int, Meta(ge=1, le=limits.MAX_PIXELS)] = 25_000_000
    """Of a picture as its file says; a larger one is not decoded."""
    most_images: Annotated[int, Meta(ge=2, le=limits.MAX_SAMPLES_KEPT)] = 10_000
    """Of a board; of more, so many are drawn."""
