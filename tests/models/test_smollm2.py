"""The real model: the same answer as `transformers` in float32, and the same bits in one to four stages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import Packed, pack
from models.cache import cache_dir
from models.catalog import CATALOG
from models.fetch import is_cached
from models.formats.checkpoint import Checkpoint, open_checkpoint
from tests.models.stages import WIRE_OF, Ring, spec_of
from tests.models.test_speculation import held_equal
from tests.models.test_standard import standard_stage

pytestmark = pytest.mark.download

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "smollm2_reference.json").read_text())
TOLERANCE = 1e-3
CUTS: tuple[tuple[int, ...], ...] = ((13,), (10, 20), (9, 19, 28))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    entry = CATALOG[0]
    if not is_cached(entry, cache_dir()):
        pytest.skip(f"{entry.name} is not in the cache: edgelam model fetch {entry.name}")
    return open_checkpoint(entry.path(cache_dir()), cache_dir())


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Half a gigabyte of packed weights that shall not stay."""
    with tempfile.TemporaryDirectory(prefix="edgelam-test-") as path:
        yield Path(path)


def packed_as(precision: str, checkpoint: Checkpoint, folder: Path) -> Packed:
    return pack(checkpoint, precision, WIRE_OF[precision], folder)


@pytest.mark.slow
def test_float32_answers_what_transformers_answers(checkpoint: Checkpoint, folder: Path) -> None:
    ring = Ring.of(packed_as("f32", checkpoint, folder), folder, (), context_tokens=128)
    for case in REFERENCE["prompts"]:
        ids = np.array(case["ids"], np.int64)
        rows = {row["position"]: row for row in case["logits"]}
        for position in [position for position in rows if position < len(ids) - 1]:
            _agree(ring.step(ids[: position + 1], 0), rows[position])
        tokens, logits = ring.generate(ids, len(case["tokens"]))
        for position in [position for position in rows if position >= len(ids) - 1]:
            _agree(logits[position - len(ids) + 1], rows[position])
        assert tokens == case["tokens"], case["prompt"]


@pytest.mark.slow
def test_the_standard_graph_answers_what_transformers_answers(checkpoint: Checkpoint, folder: Path) -> None:
    """What TensorRT and GPU providers are given, here on the processor: float32 to the word, others next to it."""
    packed = packed_as("f32", checkpoint, folder)
    ring = Ring([standard_stage(packed, folder, spec_of(packed, 0, 30, context_tokens=128, threads=2))])
    for case in REFERENCE["prompts"][:2]:
        ids = np.array(case["ids"], np.int64)
        tokens, logits = ring.generate(ids, min(24, len(case["tokens"])))
        assert tokens == case["tokens"][: len(tokens)], case["prompt"]
        rows = {row["position"]: row for row in case["logits"]}
        _agree(logits[0], rows[len(ids) - 1])
    packed = packed_as("int8", checkpoint, folder)
    ids = np.array(REFERENCE["prompts"][0]["ids"], np.int64)
    fused = Ring.of(packed, folder, (), context_tokens=128).step(ids, 0).copy()
    standard = Ring([standard_stage(packed, folder, spec_of(packed, 0, 30, context_tokens=128, threads=2))])
    assert np.abs(standard.step(ids, 0) - fused).max() < 0.3 * fused.std()


def _agree(logits: Any, row: dict[str, Any]) -> None:
    ids = row["top_ids"] + REFERENCE["fixed_ids"]
    assert np.abs(logits[ids] - np.array(row["top_values"] + row["fixed_values"])).max() < TOLERANCE


@pytest.mark.parametrize(
    "precision", [pytest.param("f32", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow), "int4"]
)
def test_one_to_four_stages_give_the_same_bits(precision: str, checkpoint: Checkpoint, folder: Path) -> None:
    packed = packed_as(precision, checkpoint, folder)
    prompt = np.array(REFERENCE["prompts"][0]["ids"], np.int64)
    tokens, logits = Ring.of(packed, folder, (), context_tokens=128).generate(prompt, 8)
    assert tokens == REFERENCE["prompts"][0]["tokens"][:8]
    for cuts in CUTS:
        cut_tokens, cut_logits = Ring.of(packed, folder, cuts, context_tokens=128).generate(prompt, 8)
        assert cut_tokens == tokens
        np.testing.assert_array_equal(np.array(cut_logits), np.array(logits))


@pytest.mark.parametrize(("precision", "least"), [pytest.param("int8", 0.9, marks=pytest.mark.slow), ("int4", 0.65)])
def test_quantised_models_mostly_say_what_float32_says(
    precision: str, least: float, checkpoint: Checkpoint, folder: Path
) -> None:
    """Teacher-forced on a text of the reference; `make bench AREA=quality` measures on a longer one."""
    case = REFERENCE["prompts"][1]
    ids = np.array(case["ids"] + case["tokens"], np.int64)
    ring = Ring.of(packed_as(precision, checkpoint, folder), folder, (), context_tokens=128)
    said = []
    for position in range(len(ids) - 1):
        logits = ring.step(ids[position : position + 1], position)
        said.append(int(logits.argmax()))
    answers = slice(len(case["ids"]) - 1, None)
    assert (np.array(said)[answers] == ids[1:][answers]).mean() >= least


@pytest.mark.slow
def test_rows_over_guesses_have_the_bits_of_steps_of_two_rows(checkpoint: Checkpoint, folder: Path) -> None:
    packed = packed_as("int4", checkpoint, folder)
    prompt = np.array(REFERENCE["prompts"][0]["ids"], np.int64)
    cuts: dict[Any, tuple[int, ...]] = {(): (), (1,): (9,), (1, 3): (7, 20), (2,): (15,)}
    held_equal(lambda few: Ring.of(packed, folder, cuts[few], context_tokens=128), prompt, 20)
