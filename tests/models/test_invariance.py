"""A partition is a detail of deployment: however a model is cut, not one bit of its answer changes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from models.families.config import Family
from tests.models.stages import Ring, load_stage, packed_tiny, spec_of

PROMPT = np.array([5, 77, 301, 8, 8, 150, 222], np.int64)
ALL_CUTS = [cuts for number in range(1, 4) for cuts in combinations(range(1, 4), number)]


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_cut_gives_the_bits_of_the_whole(family: Family, precision: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, family, precision, tied_embeddings=family.startswith("qwen"))
    tokens, logits = Ring.of(packed, tmp_path, ()).generate(PROMPT, 8)
    assert len(set(tokens)) > 1
    for cuts in ALL_CUTS:
        cut_tokens, cut_logits = Ring.of(packed, tmp_path, cuts).generate(PROMPT, 8)
        assert cut_tokens == tokens, cuts
        for whole, cut in zip(logits, cut_logits, strict=True):
            np.testing.assert_array_equal(cut, whole, err_msg=str(cuts))


@pytest.mark.parametrize("wire", ["f16", "bf16"])
def test_every_cut_gives_the_bits_of_the_whole_in_interleaved_gguf_and_other_wire_dtypes(
    wire: str, tmp_path: Path
) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4", wire, as_gguf=True)
    assert packed.config.rope_interleaved
    _, logits = Ring.of(packed, tmp_path, ()).generate(PROMPT, 6)
    for cuts in ((1,), (1, 3), (1, 2, 3)):
        _, cut_logits = Ring.of(packed, tmp_path, cuts).generate(PROMPT, 6)
        np.testing.assert_array_equal(np.array(cut_logits), np.array(logits))


def test_embedding_and_head_alone_on_their_devices_give_the_same_bits(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4", tied_embeddings=False)
    _, logits = Ring.of(packed, tmp_path, ()).generate(PROMPT, 6)
    specs = [
        spec_of(packed, 0, 0, head=False),
        spec_of(packed, 0, 4, embedding=False, head=False),
        spec_of(packed, 4, 4, embedding=False),
    ]
    _, alone = Ring([load_stage(packed, tmp_path, spec) for spec in specs]).generate(PROMPT, 6)
    np.testing.assert_array_equal(np.array(alone), np.array(logits))


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("chunks", [(2, 5), (3, 4), (2, 2, 3)])
def test_a_prompt_in_chunks_gives_the_bits_of_the_whole_prompt(
    precision: str, chunks: tuple[int, ...], tmp_path: Path
) -> None:
    packed = packed_tiny(tmp_path, "llama", precision)
    whole = Ring.of(packed, tmp_path, (2,)).step(PROMPT, 0).copy()
    ring, position = Ring.of(packed, tmp_path, (2,)), 0
    for size in chunks:
        logits = ring.step(PROMPT[position : position + size], position)
        position += size
    np.testing.assert_array_equal(logits, whole)


def test_two_requests_in_one_stage_do_not_touch_each_other(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4")
    alone, _ = Ring.of(packed, tmp_path, (2,)).generate(PROMPT, 6)
    first = Ring.of(packed, tmp_path, (2,))
    second = Ring(first.stages)
    other = PROMPT[::-1].copy()
    first.step(PROMPT, 0)
    second.step(other, 0)
    tokens, position = [int(np.argmax(first.step(PROMPT, 0)))], len(PROMPT)
    while len(tokens) < 6:
        second.step(other[:1], position)
        tokens.append(int(np.argmax(first.step(np.array(tokens[-1:], np.int64), position))))
        position += 1
    assert tokens == alone
