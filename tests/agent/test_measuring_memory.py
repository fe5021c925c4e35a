"""What boards say of memory is what stages then take, on onnxruntime itself: a small model, the measuring worker's own
way to load it, and a stage of more blocks than were measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hwprofiles.measure import BATCHES

DEEP = 24
"""Blocks of the stage; six at the most are measured."""

CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from agent.workers import measuring
from agent.workers.pipe import MeasureModule, MeasureTask
from hwprofiles import stats
from hwprofiles.measure import resident_bytes
from models.build.stage import build_stage_graph
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
from tests.models.tiny import tiny_config
from wire.messages import KitModule

folder, what = Path(sys.argv[1]), sys.argv[2]
config = tiny_config(blocks=24, hidden=512, ffn=1536, heads=8, kv_heads=2, head_dim=64, max_context=512)

def graph(blocks):
    path = folder / f"{blocks}-{what}.onnx"
    made = build_stage_graph(config, "int4", "f16", first_block=0, end_block=blocks, embedding=False, head=False)
    path.write_bytes(made)
    return path

def spec(blocks):
    return StageSpec(embedding=False, head=False, first_block=0, end_block=blocks, hidden=512, vocabulary=320,
                     wire_dtype="f16", context_tokens=512, slots=1, threads=1)

if what == "measure":
    kit = KitModule(key="k", kind="block", graphs=(), hidden=512, vocabulary=320, wire_dtype="f16")
    item = MeasureModule(module=kit, graph_paths=tuple((n, str(graph(n))) for n in (1, 6)))
    task = MeasureTask(modules=(item,), threads=1, budget_s=0.05, site="s", device="d", login=None, speed=1.0)
    [found] = measuring.measure(task, type("Parent", (), {"say": lambda self, note: None})()).modules
    most = max(t.tokens for t in found.timings if t.phase == "decode")
    several = [t for t in found.timings if (t.phase, t.tokens) == ("decode", most)]
    steps = {t.stack: stats.median(t.samples.samples_s) for t in several}
    alone = {t.stack: stats.median(t.samples.samples_s) for t in found.timings
             if (t.phase, t.tokens, t.context) == ("decode", 1, several[0].context)}
    print(json.dumps({"base": found.base_bytes, "growth": found.resident_bytes, "rows": several[0].tokens,
                      "several_by_alone": steps[6] / alone[6]}))
else:
    engine = OnnxStage.load_synthetic(graph(24), spec(24), 1)
    slot = engine.open()
    rows = np.random.default_rng(1).standard_normal((64, 512), np.float32).astype(np.float16)
    for position in range(0, 256, 64):
        engine.step(slot, rows, position)
    print(json.dumps({"resident": resident_bytes(), "weights": engine._weights.size_bytes}))
"""


def told(folder: Path, what: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), what], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_deep_stage_takes_what_a_shallow_one_was_measured_to(tmp_path: Path) -> None:
    measured, stage = told(tmp_path, "measure"), told(tmp_path, "run")
    rows_bytes = DEEP * 256 * 2 * 2 * 64 * 4 + 64 * 512 * 4 * 16
    predicted = measured["base"] + DEEP * measured["growth"] / 6 + rows_bytes
    assert predicted == pytest.approx(stage["resident"], rel=0.15)
    assert measured["growth"] / 6 < 2 * stage["weights"] / DEEP
    assert measured["rows"] == max(BATCHES)
    assert 1.0 < measured["several_by_alone"] < 1.5 * max(BATCHES), "rows of several requests were run, in one step"
