"""Stages on onnxruntime's GPU provider: asked for as it wants to be, and never taken for it when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import Packed
from models.engine import providers, session
from models.engine.base import EngineFailed
from models.engine.cuda import CudaMemory
from models.engine.device import HostMemory
from models.engine.providers import CUDA, load_stage, load_synthetic
from tests.models.stages import Ring, packed_tiny, spec_of
from tests.models.test_standard import PROMPT, standard_files


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_tiny(tmp_path_factory.mktemp("packed"), "llama", "int8")


def test_the_way_to_the_provider_gives_the_answer_of_the_usual_engine(packed: Packed, tmp_path: Path) -> None:
    """All of it but the device: the processor's provider, in this machine's memory."""
    spec = spec_of(packed, 0, 4)
    path, weights = standard_files(packed, tmp_path, spec)
    stage = load_stage(path, weights, spec, session.PROVIDER, HostMemory)
    wanted = Ring.of(packed, tmp_path, ()).step(PROMPT, 0).copy()
    assert np.abs(Ring([stage]).step(PROMPT, 0) - wanted).max() < 0.05 * wanted.std()
    assert stage.held_bytes > sum(path.stat().st_size for path in weights), "expanded"
    made = load_synthetic(path, spec, 1, session.PROVIDER, HostMemory)
    assert np.isfinite(made.step(made.open(), PROMPT, 0)).all()


def test_an_onnxruntime_without_the_provider_is_told_from_one_that_fails(packed: Packed, tmp_path: Path) -> None:
    spec = spec_of(packed, 0, 4)
    path, weights = standard_files(packed, tmp_path, spec)
    if CUDA in session.available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(EngineFailed, match="the installed onnxruntime has no CUDAExecutionProvider, but"):
        load_stage(path, weights, spec)


class Fallen:
    """What onnxruntime gives when a provider's library can't be loaded: a session on the processor, without a word."""

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize(("precision", "tf32"), [("int8", "1"), ("f32", "0")])
def test_a_session_that_fell_back_by_itself_is_no_gpu(
    precision: str, tf32: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tiny(tmp_path, "llama", precision)
    spec = spec_of(packed, 0, 4)
    path, weights = standard_files(packed, tmp_path, spec)
    asked: list[tuple[str, Mapping[str, str]]] = []

    def opened(graph: bytes, options: Any, wanted: Any) -> Fallen:
        asked.extend(wanted)
        return Fallen()

    monkeypatch.setattr(providers, "available_providers", lambda: (CUDA, session.PROVIDER))
    monkeypatch.setattr(session, "_session", opened)
    with pytest.raises(EngineFailed, match="fell back to CPUExecutionProvider, asked for CUDAExecutionProvider"):
        load_stage(path, weights, spec, CUDA, HostMemory)
    (name, options), last = asked
    assert name == CUDA and options["use_tf32"] == tf32 and options["arena_extend_strategy"] == "kSameAsRequested"
    assert last == session.PROVIDER, "for what the provider has no kernel for"


@pytest.mark.board
def test_on_a_gpu_for_real(packed: Packed, tmp_path: Path) -> None:
    """Needs onnxruntime-gpu and a GPU: python -m pytest -m board tests/models/test_providers.py."""
    if CUDA not in session.available_providers():
        pytest.skip(f"this onnxruntime has no {CUDA}")
    spec = spec_of(packed, 0, 4)
    path, weights = standard_files(packed, tmp_path, spec)
    wanted = Ring.of(packed, tmp_path, ()).step(PROMPT, 0).copy()
    stage = load_stage(path, weights, spec, CUDA, CudaMemory.open)
    assert np.abs(Ring([stage]).step(PROMPT, 0) - wanted).max() < 0.1 * wanted.std()
