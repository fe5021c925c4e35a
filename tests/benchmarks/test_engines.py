"""The benchmark of engines, on a model that takes no time: who has a GPU leaves a record with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engines
from tests.models.stages import tiny_checkpoint


def test_engines_are_timed_apart_and_those_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    tiny_checkpoint(tmp_path, as_gguf=True)
    arguments = ["--model", str(tmp_path / "llama.gguf"), "--engines", "tensorrt", "--steps", "4"]
    assert engines.main(arguments) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["conditions"]["onnxruntime"].endswith("CPUExecutionProvider")
    names = {figure["name"]: figure["value"] for figure in said["figures"]}
    assert names["onnxruntime: decode step"] > 0 and names["onnxruntime: load again"] > 0
    if "can't be imported" in said["conditions"]["tensorrt"]:
        assert not any(name.startswith("tensorrt") for name in names)
    else:
        assert names["tensorrt: logits apart from onnxruntime's, of their spread"] < engines.APART


def test_a_library_that_takes_its_process_along_costs_its_engine(tmp_path: Path) -> None:
    spec = engines.StageSpec(
        embedding=True, head=True, first_block=0, end_block=1, hidden=8, vocabulary=32, wire_dtype="f16",
        context_tokens=64, slots=1, threads=1,
    )  # fmt: skip
    task = engines.Task(engine="onnxruntime", folder=str(tmp_path / "nowhere"), weights=(), spec=spec, steps=1)
    assert engines.apart(task).because


def test_figures_say_how_far_answers_are_apart(tmp_path: Path) -> None:
    rows = engines.np.arange(12.0, dtype=engines.np.float32).reshape(2, 6)
    engines.np.save(tmp_path / "onnxruntime.npy", rows)
    engines.np.save(tmp_path / "tensorrt.npy", rows[:, ::-1])
    found = engines.Found(name="t", decode_s=(0.001, 0.003), prefill_s=0.01, load_s=2.0, again_s=1.0)
    figures = {figure.name: figure for figure in engines.figures_of("tensorrt", found, tmp_path)}
    assert figures["tensorrt: decode step"].value == pytest.approx(2.0)
    apart = figures["tensorrt: logits apart from onnxruntime's, of their spread"]
    assert apart.value > 0.5 and apart.holds is False
    assert figures["tensorrt: same first choice"].value == 0
    assert engines.figures_of("tensorrt", engines.Found(because="no GPU"), tmp_path) == []
