"""Virtual boards of one machine: it is measured once, and each board stretches what was found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.workers import emulated, lean, measuring
from agent.workers.clock import Clocks
from agent.workers.emulated import Machine, Shared
from agent.workers.pipe import MeasuredModule, MeasureModule, MeasureTask
from agent.workers.stretch import OnPaper
from hwprofiles.measure import estimate
from hwprofiles.profile import ModuleMeasurement, ModuleTiming, Samples
from models.build.stage import build_stage_graph
from tests.models.tiny import tiny_config
from wire.messages import KitModule

HERE = Machine(boot="b", threads=1, sets_speed={"software": "1", "governor": "performance"})


def found(key: str = "k", seconds: float = 0.01) -> ModuleMeasurement:
    samples = Samples(samples_s=(seconds,) * 6, warmup=2, stopped_because="test")
    timing = ModuleTiming(phase="decode", tokens=1, context=16, stack=1, samples=samples)
    return ModuleMeasurement(
        key=key, kind="block", engine="onnxruntime", threads=1, timings=(timing,), resident_bytes=1, base_bytes=1
    )


def test_what_one_found_the_others_find(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "not/yet/there", HERE)
    assert shared.find("k", "onnxruntime") is None
    shared.keep(found(), "onnxruntime 1")
    known = Shared(tmp_path / "not/yet/there", HERE).find("k", "onnxruntime")
    assert known is not None and (known.module, known.engine_name) == (found(), "onnxruntime 1")
    assert shared.find("other", "onnxruntime") is None and shared.find("k", "torch") is None


def test_what_is_unsteady_is_measured_again_by_the_next(tmp_path: Path) -> None:
    [timing] = found().timings
    samples = msgspec.structs.replace(timing.samples, valid=False, invalid_because="drift")
    unsteady = msgspec.structs.replace(found(), timings=(msgspec.structs.replace(timing, samples=samples),))
    shared = Shared(tmp_path, HERE)
    shared.keep(unsteady, "onnxruntime 1")
    assert shared.find("k", "onnxruntime") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": "c"},
        {"threads": 2},
        {"sets_speed": {"software": "2", "governor": "performance"}},
        {"sets_speed": {"software": "1", "governor": "powersave"}},
        {"sets_speed": {}},
    ],
)
def test_on_another_machine_it_is_measured_again(changes: dict[str, Any], tmp_path: Path) -> None:
    Shared(tmp_path, HERE).keep(found(), "onnxruntime 1")
    assert Shared(tmp_path, msgspec.structs.replace(HERE, **changes)).find("k", "onnxruntime") is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 9999, b"\xff", b"1" * (emulated.MAX_BYTES + 1)])
def test_a_damaged_file_is_measured_over(data: bytes, tmp_path: Path) -> None:
    shared = Shared(tmp_path, HERE)
    shared.keep(found(), "onnxruntime 1")
    [path] = tmp_path.iterdir()
    path.write_bytes(data)
    assert shared.find("k", "onnxruntime") is None
    shared.keep(found(), "onnxruntime 1")
    assert shared.find("k", "onnxruntime") is not None


def test_a_folder_that_can_not_be_written_to_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shared = Shared(tmp_path / "file", HERE)
    shared.keep(found(), "onnxruntime 1")
    assert shared.find("k", "onnxruntime") is None


def test_a_board_of_a_quarter_of_the_speed_takes_four_times_as_long() -> None:
    [step] = estimate(emulated.on_board(found(seconds=0.01), 0.25)).steps
    assert step.block_s == pytest.approx(0.04)


def test_steps_on_paper_are_timed_by_the_processor_and_judged_by_the_undisturbed() -> None:
    now = {"wall": 0.0, "busy": 0.0}

    def took(timer: OnPaper, busy_s: float, waited_s: float = 0.0) -> float:
        timer.begin()
        now["busy"] += busy_s
        now["wall"] += busy_s + waited_s
        return timer.end("decode", 1)

    clocks = Clocks(lambda: now["wall"], lambda: now["busy"])
    alone, several = OnPaper(1, clocks), OnPaper(2, clocks)
    assert took(alone, 0.010, waited_s=0.5) == pytest.approx(0.010)
    assert took(alone, 0.013) == pytest.approx(0.010)
    assert took(several, 0.010, waited_s=0.5) == pytest.approx(0.510)


def task(graphs: dict[int, str], **changes: Any) -> MeasureTask:
    kit = KitModule(key="k", kind="block", graphs=(), hidden=64, vocabulary=320, wire_dtype="f16")
    item = MeasureModule(module=kit, graph_paths=tuple(graphs.items()))
    fields: dict[str, Any] = {"modules": (item,), "threads": 1, "budget_s": 0.01, "site": "s", "device": "d",
                              "login": None, "speed": 0.5}  # fmt: skip
    return MeasureTask(**{**fields, **changes})


class Parent:
    def __init__(self) -> None:
        self.said: list[msgspec.Struct] = []

    def say(self, message: msgspec.Struct) -> None:
        self.said.append(message)


def test_boards_of_one_machine_measure_once_and_differ_by_their_speed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(blocks=6, max_context=512)
    graphs = {}
    for blocks in (1, 6):
        path = tmp_path / f"{blocks}.onnx"
        made = build_stage_graph(config, "int4", "f16", first_block=0, end_block=blocks, embedding=False, head=False)
        path.write_bytes(made)
        graphs[blocks] = str(path)
    hidden = config.hidden
    first = task(graphs, shared_folder=str(tmp_path / "shared"))
    kit = msgspec.structs.replace(first.modules[0].module, hidden=hidden)
    first = msgspec.structs.replace(first, modules=(msgspec.structs.replace(first.modules[0], module=kit),))
    for _ in range(20):  # on a busy machine times are unsteady, and what is unsteady is not shared
        parent, began_s = Parent(), time.monotonic()
        [measured] = measuring.measure(first, parent).modules  # type: ignore[arg-type]
        if all(timing.samples.valid for timing in measured.timings):
            break
    assert [said.module for said in parent.said if isinstance(said, MeasuredModule)] == [measured]

    def never(*_: Any) -> None:
        raise AssertionError("it is known already")

    monkeypatch.setattr(measuring, "start_engine", never)
    (tmp_path / "throttle").write_text("0.5")
    slower = msgspec.structs.replace(first, speed=0.25, throttle_path=str(tmp_path / "throttle"))
    parent = Parent()
    other = measuring.measure(slower, parent)  # type: ignore[arg-type]
    assert other.engines_loaded == {"onnxruntime": measuring.measure(first, Parent()).engines_loaded["onnxruntime"]}  # type: ignore[arg-type]
    [stretched] = other.modules
    assert [said.module for said in parent.said if isinstance(said, MeasuredModule)] == [stretched]
    for mine, its in zip(measured.timings, stretched.timings, strict=True):
        assert its.samples.samples_s == pytest.approx([4 * seconds for seconds in mine.samples.samples_s])
    assert stretched.resident_bytes == measured.resident_bytes
    # Anew: but what another board measured since it was asked for is as new.
    asked = msgspec.structs.replace(slower, shared_since_s=began_s)
    assert measuring.measure(asked, Parent()).modules == (stretched,)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="known already"):
        later = msgspec.structs.replace(slower, shared_since_s=time.monotonic())
        measuring.measure(later, Parent())  # type: ignore[arg-type]


def test_a_worker_runs_without_openssl_where_python_has_hashes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(
        "import hashlib, hmac, secrets, sys\nfrom paho.mqtt import client\n"
        "print(__name__, sys.argv[1:], hashlib.sha256(b'').hexdigest()[:8],\n"
        "      sorted(name for name in ('_ssl', '_hashlib') if sys.modules.get(name)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "agent.workers.lean", "worker", "more"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
    )  # fmt: skip
    left = "[]" if lean.can_do_without() else "['_hashlib', '_ssl']"
    assert done.stdout.strip() == f"__main__ ['more'] e3b0c442 {left}"


def test_openssl_stays_where_python_was_built_without_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lean.can_do_without()
    monkeypatch.setattr(lean, "OWN_HASHES", (*lean.OWN_HASHES, ("_no_such_hash",)))
    assert not lean.can_do_without()
