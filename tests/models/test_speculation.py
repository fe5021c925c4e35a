"""Several rows of a request in a step: each gets the bits that it gets beside one other row, or in a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.engine.base import EngineFailed
from models.families.config import Family
from tests.models.stages import Ring, packed_tiny

PROMPT = np.array([5, 77, 301, 8, 8, 150, 222], np.int64)
Logits = np.ndarray[tuple[int, ...], np.dtype[Any]]


def padded(ring: Ring, prompt: Any, count: int) -> tuple[list[int], list[Logits]]:
    """Greedy tokens by steps of two rows, the second of which is a dummy, and the logits that each was drawn from."""
    logits = [ring.step(prompt, 0, 2)[-1].copy()]
    tokens = [int(np.argmax(logits[0]))]
    for position in range(len(prompt), len(prompt) + count - 1):
        logits.append(ring.step(np.array(tokens[-1:] * 2, np.int64), position, 2)[0].copy())
        tokens.append(int(np.argmax(logits[-1])))
    return tokens, logits


def guessed(ring: Ring, prompt: Any, count: int, answer: list[int], seed: int) -> tuple[list[int], list[Logits], int]:
    """The same by steps over guesses, of which some are right and some are not; and how many steps it took."""
    generator = np.random.default_rng(seed)
    logits = [ring.step(prompt, 0, 2)[-1].copy()]
    tokens, steps = [int(np.argmax(logits[0]))], 0
    while len(tokens) < count:
        many = int(generator.integers(1, 8))
        right = answer[len(tokens) : len(tokens) + int(generator.integers(0, many + 1))]
        drafts = [*right, *generator.integers(0, 300, many)][:many]
        found = ring.step(np.array([tokens[-1], *drafts], np.int64), len(prompt) + len(tokens) - 1, many + 1)
        assert found.shape[0] == many + 1
        steps += 1
        for row, drafted in zip(found, [*drafts, -1], strict=True):
            logits.append(row.copy())
            tokens.append(int(np.argmax(row)))
            if tokens[-1] != drafted:
                break
    return tokens[:count], logits[:count], steps


def held_equal(ring_of: Any, prompt: Any, count: int) -> None:
    tokens, logits = padded(ring_of(()), prompt, count)
    for seed, cuts in enumerate(((), (1,), (1, 3))):
        again, found, steps = guessed(ring_of(cuts), prompt, count, tokens, seed)
        assert again == tokens
        assert steps < count - 1  # some guesses were right
        np.testing.assert_array_equal(np.array(found), np.array(logits))
    # What was given, computed again as a prompt, goes on with the same bits.
    for given in (1, count // 2, count - 1):
        resumed = ring_of((2,)).step(np.array([*prompt, *tokens[:given]], np.int64), 0, 2)[-1]
        np.testing.assert_array_equal(resumed, logits[given])


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_over_guesses_have_the_bits_of_steps_of_two_rows(family: Family, precision: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, family, precision)
    held_equal(lambda cuts: Ring.of(packed, tmp_path, cuts), PROMPT, 24)


def test_logits_of_more_rows_than_a_step_has_are_refused(tmp_path: Path) -> None:
    ring = Ring.of(packed_tiny(tmp_path, "llama", "f32"), tmp_path, ())
    for rows in (0, 8):
        with pytest.raises(EngineFailed, match="7"):
            ring.step(PROMPT, 0, rows)
    assert ring.step(PROMPT, 0, 7).shape == (7, 320)


def test_one_row_has_the_same_bits_after_steps_of_several(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4")
    plain, guessing = Ring.of(packed, tmp_path, (2,)), Ring.of(packed, tmp_path, (2,))
    row = np.array([9], np.int64)
    plain.step(PROMPT, 0)
    guessing.step(PROMPT, 0)
    guessing.step(np.array([9, 4, 4, 4], np.int64), 7, 4)
    np.testing.assert_array_equal(guessing.step(row, 7), plain.step(row, 7))
