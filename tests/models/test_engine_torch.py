"""The onnxruntime engine computes what plain torch computes, for every family and both rope layouts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.families.config import Family
from tests.models.stages import Ring, packed_tiny, spec_of, stage_files

pytestmark = pytest.mark.torch

PROMPT = np.array([5, 77, 301, 8, 8, 150, 222], np.int64)
TOLERANCE = 1e-3

CASES: list[tuple[Family, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"as_gguf": True}),
    ("llama", {"tied_embeddings": False, "rope_factors": (1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {}),
    ("qwen3", {}),
]


@pytest.fixture(autouse=True, scope="module")
def wants_torch() -> None:
    """Not while tests are collected: that takes seconds, in each process that shares them."""
    pytest.importorskip("torch")


def torch_ring(packed: Any, folder: Path, cuts: tuple[int, ...]) -> Ring:
    from models.engine.torch import TorchStage

    stages = []
    for first, end in pairwise((0, *cuts, packed.graph.blocks)):
        spec = spec_of(packed, first, end)
        path, weights = stage_files(packed, folder, spec)
        stages.append(TorchStage.load(path, weights, spec))
    return Ring(list(stages))


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: str(value)[:30])
def test_float32_logits_agree_with_torch(family: Family, options: dict[str, Any], tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, family, "f32", **options)
    tokens, logits = Ring.of(packed, tmp_path, (1,)).generate(PROMPT, 8)
    reference_tokens, reference = torch_ring(packed, tmp_path, ()).generate(PROMPT, 8)
    assert np.abs(np.array(logits) - np.array(reference)).max() < TOLERANCE
    assert tokens == reference_tokens


def test_gguf_and_hugging_face_files_of_one_model_give_one_answer(tmp_path: Path) -> None:
    interleaved = packed_tiny(tmp_path, "llama", "f32", as_gguf=True)
    halves = packed_tiny(tmp_path, "llama", "f32")
    assert interleaved.config.rope_interleaved and not halves.config.rope_interleaved
    first, second = (Ring.of(packed, tmp_path, ()).generate(PROMPT, 6)[1] for packed in (interleaved, halves))
    assert np.abs(np.array(first) - np.array(second)).max() < TOLERANCE


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.05), ("int4", 0.2)])
def test_quantised_products_are_those_of_the_expanded_weights(precision: str, most: float, tmp_path: Path) -> None:
    """Activations are rounded to 8 bit blockwise: so not equal, but near, relative to the spread of the logits."""
    packed = packed_tiny(tmp_path, "llama", precision)
    _, logits = Ring.of(packed, tmp_path, ()).generate(PROMPT, 1)
    _, reference = torch_ring(packed, tmp_path, (2,)).generate(PROMPT, 1)
    assert np.abs(logits[0] - reference[0]).max() < most * reference[0].std()


@pytest.mark.parametrize("wire", ["f16", "bf16"])
def test_stages_of_both_engines_can_stand_in_one_ring(wire: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "qwen3", "f32", wire)
    onnx, torch = Ring.of(packed, tmp_path, (2,)), torch_ring(packed, tmp_path, (2,))
    mixed = Ring([onnx.stages[0], torch.stages[1]])
    whole = Ring.of(packed, tmp_path, ()).step(PROMPT, 0).copy()
    assert np.abs(mixed.step(PROMPT, 0) - whole).max() < (0.05 if wire == "f16" else 0.4)
