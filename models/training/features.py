"""What a board computes of its samples once, before anything is trained: their features, kept in memory.

Rows of a round (models.training.samples.Row) then are numbers of rows of that table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from models.training.data import MAX_SAID, BadRow
from models.training.images import Picture, pictures, pixels_of
from models.training.kernels import Kernels
from models.training.samples import Row, Split
from models.training.series import Window, windows
from wire.errors import CorruptData
from wire.samples import Images, Series

Floats = npt.NDArray[np.float32]

LEAST: Final = 1e-6
"""What is divided by at least."""
AT_ONCE: Final = 64
"""Windows that are read before their features are computed."""


class Features(NamedTuple):
    """`values` [n, hidden]; `rows`: n, with labels; `stretches` [n]: samples of one are alike, and may share readings;
    `said`: of the first bad rows."""

    values: Floats
    rows: list[Row]
    stretches: list[int]
    bad_rows: int
    said: tuple[BadRow, ...]

    def split(self, held_out: float, seed: int) -> Split:
        """Which are never trained on: stretches as wholes, drawn by the seed, so many as do not exceed that share; the
        smallest if none does. Of a single stretch its end."""
        sizes = Counter(self.stretches)
        wanted = math.ceil(held_out * len(self.rows))
        if not wanted or len(self.rows) < 2:
            return Split(tuple(self.rows), ())
        if len(sizes) == 1:
            end = max(1, len(self.rows) - wanted)
            return Split(tuple(self.rows[:end]), tuple(self.rows[end:]))
        order, taken, total = list(sizes), set[int](), 0
        for place in np.random.default_rng([seed, 1]).permutation(len(order)).tolist():
            if total + sizes[order[place]] <= wanted:
                taken.add(order[place])
                total += sizes[order[place]]
        taken = taken or {min(order, key=lambda stretch: sizes[stretch])}
        each = list(zip(self.rows, self.stretches, strict=True))
        return Split(
            tuple(row for row, stretch in each if stretch not in taken),
            tuple(row for row, stretch in each if stretch in taken),
        )


def kernels_of(series: Series, seed: int) -> Kernels:
    return Kernels(len(series.columns), series.window, series.kernels, seed)


def series_features(
    path: Path,
    series: Series,
    labels: Sequence[str],
    seed: int,
    keep_all: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Features:
    """Of all windows under a path, or of so many as are kept, drawn by the seed. Raises what models.training.series
    raises, and CorruptData where no window is left."""
    count, bad, said = 0, 0, list[BadRow]()
    for found in windows(path, series, labels, keep_all):
        if isinstance(found, Window):
            count += 1
            continue
        bad += 1
        if len(said) < MAX_SAID:
            said.append(found)
    if not count:
        why = f"; {said[0]}" if said else ""
        raise CorruptData(
            f"data {path.name}: no {series.window} rows of one label behind each other{why}", try_="a smaller window"
        )
    kept = drawn_of(count, series.most_windows, seed)
    kernels = kernels_of(series, seed)
    values, places, stretches = np.empty((len(kept), kernels.count), np.float32), list[int](), list[int]()
    every = (found for found in windows(path, series, labels, keep_all) if isinstance(found, Window))
    for batch in _batches(window for number, window in enumerate(every) if number in kept):
        start = len(places)
        if start + len(batch) > len(values):
            break  # who writes to the file meanwhile gets no more room
        values[start : start + len(batch)] = kernels.features(np.stack([window.values for window in batch]))
        places += [window.label for window in batch]
        stretches += [window.stretch for window in batch]
        say(f"features of {len(places)} of {len(kept)} windows")
    return Features(values[: len(places)], numbered(places), stretches, bad, tuple(said))


class Net(Protocol):
    """That makes features of pictures: agent.workers.frozen.FrozenNet."""

    height: int
    width: int
    hidden: int

    def features(self, picture: Floats) -> Floats:
        """[3, height, width] -> [hidden]."""


def image_features(
    path: Path,
    images: Images,
    labels: Sequence[str],
    seed: int,
    net: Net,
    keep_all: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Features:
    """Of all pictures under a path, or of so many as are kept, drawn by the seed; each brought to a mean square of 1.
    Raises what models.training.images raises, and CorruptData where no picture is left."""
    bad, said, found = 0, list[BadRow](), list[Picture]()
    for one in pictures(path, labels, keep_all):
        if isinstance(one, Picture):
            found.append(one)
            continue
        bad += 1
        if len(said) < MAX_SAID:
            said.append(one)
    kept = drawn_of(len(found), images.most_images, seed)
    chosen = [picture for number, picture in enumerate(found) if number in kept]
    values, places = np.empty((len(chosen), net.hidden), np.float32), list[int]()
    for picture in chosen:
        pixels = pixels_of(picture, images, net.width, net.height)
        if isinstance(pixels, BadRow):
            bad += 1
            if len(said) < MAX_SAID:
                said.append(pixels)
            continue
        made = net.features(pixels)
        values[len(places)] = made / max(float(np.sqrt(np.square(made).mean())), LEAST)
        places.append(picture.label)
        say(f"features of {len(places)} of {len(chosen)} pictures")
    if not places:
        why = f"; {said[0]}" if said else ""
        raise CorruptData(f"data {path.name}: no picture with one of the labels{why}", try_="a folder for each label")
    return Features(values[: len(places)], numbered(places), list(range(len(places))), bad, tuple(said))


def drawn_of(count: int, most: int, seed: int) -> range | frozenset[int]:
    """Which of so many samples are kept."""
    if count <= most:
        return range(count)
    return frozenset(np.random.default_rng([seed, 3]).permutation(count)[:most].tolist())


def numbered(labels: Sequence[int]) -> list[Row]:
    return [Row(np.array([number], np.int64), 1, label) for number, label in enumerate(labels)]


def _batches(found: Iterable[Window]) -> Iterable[list[Window]]:
    batch: list[Window] = []
    for window in found:
        batch.append(window)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
