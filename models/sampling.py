"""One token out of logits: pure, and the same token whenever the same step is run again.

Randomness is a function of (seed, position) and nothing else: Philox, a counter-based generator, keyed with both. A
stage that is lost and rebuilt draws what the first one drew, if its logits are the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from models.engine.base import EngineFailed
from wire.messages import Sampling

_NUCLEUS_FIRST: Final = 1024
"""Tokens sorted at first for top_p: sorting a vocabulary of 50,000 takes milliseconds; a nucleus is rarely wider."""


def draw(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """Give a token id from float32 logits [vocabulary].

    `position` is that of the token to be drawn, counted from the start of the prompt. Temperature 0 is the largest
    logit, the lowest id among equals; otherwise temperature, then top_k, then top_p over what top_k left (0 and 1.0
    switch them off). Raises EngineFailed when the logits are not numbers.
    """
    best = int(np.argmax(logits))
    # argmax gives the first NaN if there is one, so this one comparison covers all of them.
    if not np.isfinite(logits[best]):
        raise EngineFailed(
            f"logits are not finite ({logits[best]} for token {best})",
            try_="deploy with wire dtype bf16, or f32: this model leaves the range of f16",
        )
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return best
    ids = _top(logits, sampling.top_k) if 0 < sampling.top_k < logits.size else None
    kept = logits if ids is None else logits[ids]
    with np.errstate(over="ignore"):  # a temperature near 0 gives -inf for all but the best, which is what it means
        weights = np.exp((kept.astype(np.float64) - float(logits[best])) / sampling.temperature)
    if sampling.top_p < 1.0:
        nucleus = _nucleus(weights, sampling.top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weights = weights[nucleus]
    cumulated = np.cumsum(weights)
    at = int(np.searchsorted(cumulated, uniform(sampling.seed, position) * cumulated[-1], side="right"))
    at = min(at, weights.size - 1)
    return at if ids is None else int(ids[at])


def uniform(seed: int, position: int) -> float:
    """Give the number in [0, 1) that belongs to (seed, position): the top 53 bits of Philox's first word."""
    word = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def _top(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Give the positions of the `count` largest values, largest first, lower positions first among equals."""
    least = np.partition(values, values.size - count)[values.size - count]
    found = np.flatnonzero(values >= least)
    return found[np.argsort(-values[found], kind="stable")][:count]


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Give the positions of the fewest largest weights whose sum reaches `top_p` of the whole."""
    wanted = top_p * float(weights.sum())
    for count in (min(_NUCLEUS_FIRST, weights.size), weights.size):
        order = _top(weights, count)
        enough = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
        if enough <= count:
            return order[:enough]
    return order
