"""What memory gives at best: passes over arrays that no cache holds, in as many threads as the engine has.

Decoding reads every weight once for each token, so the rate of reading is its ceiling, whatever the engine. The passes
are those of STREAM (J. McCalpin, 1995) as far as numpy has them in one call, and counted as there: `read` n bytes,
`copy` 2 n, `add` 3 n for arrays of n bytes. What a processor fetches before it overwrites it is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from hwprofiles import stats
from hwprofiles.measure import Step, StopRule, estimate, sample
from hwprofiles.profile import ModuleMeasurement, Phase
from hwprofiles.reading import Absent
from hwprofiles.samples import Ceilings, Rate
from wire.units import bytes_text

LEAST_ARRAY_BYTES: Final = 16 << 20
"""Many times the caches of small boards, and passes over it take milliseconds."""
CACHES_PER_ARRAY: Final = 2
"""The arrays of a copy together hold four times the last cache, as STREAM asks."""
ARRAYS: Final = 3
ROOM_SHARE: Final = 0.25
"""Of the memory that is free, the arrays take at most this share: a board that begins to swap measures its disk."""

READ: Final = "read"

Floats = npt.NDArray[np.float32]


def array_bytes(cache_bytes: int, free_bytes: int) -> int | Absent:
    """How large each array is to be; absent if there is no room for one that no cache holds."""
    wanted = max(LEAST_ARRAY_BYTES, CACHES_PER_ARRAY * cache_bytes)
    room = int(free_bytes * ROOM_SHARE) // ARRAYS
    if wanted > room:
        return Absent(f"three arrays of {bytes_text(wanted)} need more than a quarter of {bytes_text(free_bytes)}")
    return wanted


def memory_rates(size_bytes: int, threads: int, time_budget_s: float) -> tuple[Rate, ...]:
    """Time `read`, `copy` and `add` over arrays of `size_bytes`; each for about `time_budget_s`."""
    rule = StopRule(time_budget_s=time_budget_s, max_samples=60)
    count = size_bytes // 4 // threads
    arrays = [np.full(count * threads, 1.0, np.float32) for _ in range(ARRAYS)]
    shares = [[array[at * count : (at + 1) * count] for array in arrays] for at in range(threads)]
    passes: tuple[tuple[str, int, Callable[[list[Floats]], None]], ...] = (
        (READ, 1, _read),
        ("copy", 2, _copy),
        ("add", 3, _add),
    )
    with ThreadPoolExecutor(threads) as pool:
        return tuple(
            Rate(what=what, amount=times * 4 * count * threads, samples=sample(_timed(pool, work, shares), rule))
            for what, times, work in passes
        )


def _timed(pool: ThreadPoolExecutor, work: Callable[[list[Floats]], None], shares: list[list[Floats]]) -> Step:
    def step() -> float:
        began_s = perf_counter()
        list(pool.map(work, shares))
        return perf_counter() - began_s

    return step


def _read(arrays: list[Floats]) -> None:
    """Or is the cheapest that numpy does with each word: other reductions are limited by arithmetic."""
    words = arrays[0][: len(arrays[0]) // 2 * 2].view(np.uint64)
    np.bitwise_or.reduce(words)


def _copy(arrays: list[Floats]) -> None:
    np.copyto(arrays[1], arrays[0])


def _add(arrays: list[Floats]) -> None:
    np.add(arrays[0], arrays[1], out=arrays[2])


def per_second(rate: Rate) -> float | None:
    """Amount over the median time; None if nothing was timed."""
    values = rate.samples.samples_s
    middle_s = stats.median(values) if values else 0.0
    return rate.amount / middle_s if middle_s > 0 else None


def interval_per_second(rate: Rate) -> tuple[float, float] | None:
    """The 95 % interval of `per_second`, the slower end first."""
    found = stats.median_interval(rate.samples.samples_s)
    return (rate.amount / found[1], rate.amount / found[0]) if found is not None and found[0] > 0 else None


def best(rates: tuple[Rate, ...]) -> float | None:
    """The highest of several rates."""
    return max((found for found in map(per_second, rates) if found is not None), default=None)


def reading(found: Ceilings) -> float | None:
    """Bytes a second that memory gives at best to who only reads; a copy moves no more than it."""
    return best(found.memory)


def best_of_blocks(modules: Iterable[ModuleMeasurement]) -> float | None:
    """The most operations a second that a block was measured to make, whatever its weights' form."""
    rates = [
        block.row_operations * step.tokens / step.block_s
        for block in modules
        if block.kind == "block" and block.row_operations
        for step in estimate(block).steps
        if step.valid and step.block_s > 0
    ]
    return max(rates, default=None)


class Achieved(Struct, frozen=True, kw_only=True):
    """What a module makes of the board, derived from the time of its steps: one module, without a step's own cost."""

    key: str
    phase: Phase
    tokens: int
    context: int
    bytes_per_s: float
    """Of weights."""
    operations_per_s: float
    memory_share: float | None
    """Of the rate of reading."""
    product_share: float | None
    """Of the best rate of products."""

    @property
    def intensity(self) -> float:
        """Operations for each byte of weights."""
        return self.operations_per_s / self.bytes_per_s


def achieved(module: ModuleMeasurement, found: Ceilings) -> tuple[Achieved, ...]:
    """The valid points of a module whose weights are known, at the shortest context: keys and values are not counted.
    An embedding looks up one row for each token and has no place here."""
    if not module.weight_bytes or not module.row_operations or module.kind == "embedding":
        return ()
    memory, products = reading(found), best(found.products)
    # Of a chunk of a prompt a language model's head runs the last row alone; that of an item model, which does not
    # decode, all rows.
    last_row = module.kind == "head" and any(timing.phase == "decode" for timing in module.timings)
    shortest: dict[tuple[Phase, int], Achieved] = {}
    for step in sorted(estimate(module).steps, key=lambda step: -step.context):
        if step.valid and step.block_s > 0 and not (last_row and step.phase == "prefill"):
            moved, done = module.weight_bytes / step.block_s, module.row_operations * step.tokens / step.block_s
            shortest[step.phase, step.tokens] = Achieved(
                key=module.key,
                phase=step.phase,
                tokens=step.tokens,
                context=step.context,
                bytes_per_s=moved,
                operations_per_s=done,
                memory_share=moved / memory if memory else None,
                product_share=done / products if products else None,
            )
    return tuple(sorted(shortest.values(), key=lambda one: one.tokens))
