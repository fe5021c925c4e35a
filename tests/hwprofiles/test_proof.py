"""An engine is proved by a result, not by being installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agent import cli
from hwprofiles.probe import proof
from hwprofiles.reading import Absent, Failed, Reading
from wire.errors import ExitCode


def interpreter(folder: Path, script: str) -> str:
    """A program that answers in Python's place."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_onnxruntime_computes_on_the_processor() -> None:
    found = proof.prove("onnxruntime")
    assert isinstance(found, Reading) and found.value.works
    assert found.value.ways["CPUExecutionProvider"] == "" and "AzureExecutionProvider" not in found.value.ways


def test_engine_that_is_not_installed_is_absent_and_one_without_its_libraries_has_failed(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "echo \"ModuleNotFoundError: No module named 'tensorrt'\" >&2; exit 1")
    assert proof.prove("tensorrt", python) == Absent("tensorrt is not installed")
    python = interpreter(tmp_path, "echo 'ImportError: libnvinfer.so.10: cannot open shared object file' >&2; exit 1")
    found = proof.prove("tensorrt", python)
    assert isinstance(found, Failed) and "libnvinfer.so.10" in found.because


def test_missing_module_of_an_installed_engine_is_failed(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "echo \"ModuleNotFoundError: No module named 'numpy'\" >&2; exit 1")
    assert isinstance(proof.prove("onnxruntime", python), Failed)


@pytest.mark.parametrize(
    ("script", "because"),
    [
        ("kill -ILL $$", "signal 4"),
        ("echo nonsense", "onnxruntime: "),
        ("exec sleep 9", "not loaded within"),
        ("exit 3", "exit 3"),
    ],
)
def test_engine_that_crashes_babbles_or_hangs_has_failed(tmp_path: Path, script: str, because: str) -> None:
    found = proof.prove("onnxruntime", interpreter(tmp_path, script), deadline_s=0.5)
    assert isinstance(found, Failed) and because in found.because


def test_provider_that_fell_back_does_not_work(tmp_path: Path) -> None:
    answer = '{"version": "1", "ways": {"CUDAExecutionProvider": "fell back to CPUExecutionProvider"}}'
    found = proof.prove("onnxruntime", interpreter(tmp_path, f"echo warning; echo '{answer}'"))
    assert isinstance(found, Reading) and not found.value.works


def test_wrong_results_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proof._SCRIPTS, "onnxruntime", proof._SCRIPTS["onnxruntime"].replace("[15, 22]", "[15, 23]"))
    found = proof.prove("onnxruntime", sys.executable)
    assert isinstance(found, Reading) and found.value.ways["CPUExecutionProvider"] == "gave a wrong result"


@pytest.mark.parametrize("other", [["--json"], ["--replay", "/x"]])
def test_proof_of_another_board_or_as_json_is_refused(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--prove", *other]) == ExitCode.USAGE
    assert "--prove" in capsys.readouterr().err


def test_proof_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = proof.Proof("1.31.1", {"CPUExecutionProvider": "", "CUDAExecutionProvider": "fell back"})
    monkeypatch.setattr(proof, "prove_all", lambda: {"onnxruntime": Reading(shown, "x"), "torch": Absent("none")})
    assert cli.main(["info", "--prove"]) == ExitCode.OK
    said = capsys.readouterr().out
    assert "proof     onnxruntime 1.31.1 on CPUExecutionProvider: right result" in said
    assert "on CUDAExecutionProvider: FAILED: fell back" in said and "torch: absent: none" in said
