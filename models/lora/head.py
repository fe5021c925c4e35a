"""A trained task module as its file says it (head.safetensors): what tells labels, and of which samples.

    scores = weight @ features + bias

Features are an encoder's mean over a text; or, as the file's metadata say, those of windows of readings (`series`,
`seed`; models.training.kernels), or those of pictures (`images`, `model`; models.items.pictured).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.formats import safetensors
from models.training.kernels import VERSION
from wire.errors import CorruptData, Refused
from wire.limits import MAX_FEATURES, MAX_LABELS
from wire.messages import Label
from wire.samples import Images, Series

Floats = npt.NDArray[np.float32]

MOST_HEAD_BYTES: Final = 1 << 26
_AS_WRITTEN: Final = "the file as it was written"


class _Told(Struct, frozen=True, kw_only=True):
    """Metadata, whose values are texts."""

    labels: str
    series: str = ""
    images: str = ""
    model: str = ""
    seed: Annotated[str, Meta(pattern=r"^(|0|[1-9][0-9]{0,18})$")] = ""
    kernels: str = ""


class Head(Struct, frozen=True, eq=False, kw_only=True):
    """`weight` [labels, hidden], `bias` [labels]: finite float32. With neither `series` nor `images` it is of texts."""

    labels: tuple[str, ...]
    weight: Floats
    bias: Floats
    series: Series | None = None
    seed: int = 0
    """Of the kernels of `series`."""
    images: Images | None = None
    model: str = ""
    """Net whose features of `images` are taken, as the job names it."""

    def shares(self, features: Floats) -> npt.NDArray[np.float64]:
        """[n, hidden] -> [n, labels], each row adding up to 1."""
        scores = (features @ self.weight.T + self.bias).astype(np.float64)
        found = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(found / found.sum(axis=1, keepdims=True))


def read_head(path: Path) -> Head:
    """Raises UsageError (not there), CorruptData (damaged), Refused (sizes that can't be, or features of another
    version)."""
    file = safetensors.open_safetensors(path)
    try:
        told = msgspec.convert(file.metadata, type=_Told)
        labels = msgspec.json.decode(told.labels, type=tuple[Label, ...])
        series = msgspec.json.decode(told.series, type=Series) if told.series else None
        images = msgspec.json.decode(told.images, type=Images) if told.images else None
        weight, bias = (np.array(file.float32(name), np.float32) for name in ("weight", "bias"))
    except (KeyError, msgspec.MsgspecError) as error:
        raise CorruptData(f"{path}: {error}", try_=_AS_WRITTEN) from None
    if not 2 <= len(set(labels)) == len(labels) <= MAX_LABELS:
        raise Refused(f"{path}: {len(labels)} labels", try_=f"2 to {MAX_LABELS}, each once")
    hidden = weight.shape[-1] if weight.ndim == 2 else 0
    wanted = (len(labels), series.kernels if series is not None else hidden)
    if weight.shape != wanted or bias.shape != wanted[:1] or not 1 <= hidden <= MAX_FEATURES:
        raise Refused(
            f"{path}: a weight of {list(weight.shape)} for {len(labels)} labels"
            + (f" and {series.kernels} kernels" if series is not None else ""),
            try_=_AS_WRITTEN,
        )
    if series is not None and not {len(series.centre), len(series.scale)} <= {0, len(series.columns)}:
        raise CorruptData(f"{path}: centre or scale of other columns than there are", try_=_AS_WRITTEN)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise CorruptData(f"{path}: has values that are no numbers")
    if series is not None and told.kernels != str(VERSION):
        raise Refused(
            f"{path}: features of version {told.kernels or 'none'}, here it is {VERSION}", try_="train it anew"
        )
    return Head(
        labels=labels,
        weight=weight,
        bias=bias,
        series=series,
        seed=int(told.seed or 0),
        images=images,
        model=told.model,
    )
