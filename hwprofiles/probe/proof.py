"""Proof that an engine works here: it is loaded in a process of its own and computes a product whose result is checked.

`engines` says what is installed, which is less: libraries may be missing, a driver may not fit, and onnxruntime falls
back to the processor without a word. This takes seconds and some hundred megabytes per engine for a moment, so it is
done when somebody asks, one engine after the other.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import msgspec
from msgspec import Struct

from hwprofiles.probe.engines import ENGINES
from hwprofiles.reading import Absent, Failed, Reading

DEADLINE_S: Final = 90.0
"""A Raspberry Pi takes 10 s to import torch from an SD card, CUDA as long again to start the first time."""

MAX_ANSWER_BYTES: Final = 65_536

MATMUL_MODEL: Final = (
    "CAgSADpAChEKAXgKAXgSAXkiBk1hdE11bBIBZ1oTCgF4Eg4KDAgBEggKAggCCgIIAmITCgF5Eg4KDAgBEggKAggCCgIIAkIECgAQDQ=="
)
"""ONNX: y = x @ x, 2 x 2, float32 (operator set 13)."""

_SCRIPTS: Final = {
    "onnxruntime": f"""
import base64, json, numpy, onnxruntime as engine
x = numpy.array([[1, 2], [3, 4]], numpy.float32)
ways = {{}}
for name in engine.get_available_providers():
    if name == "AzureExecutionProvider":
        continue
    try:
        options = engine.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = engine.InferenceSession(base64.b64decode("{MATMUL_MODEL}"), options, providers=[name])
        if session.get_providers()[0] != name:
            ways[name] = "fell back to " + session.get_providers()[0]
        elif session.run(None, {{"x": x}})[0].tolist() != [[7, 10], [15, 22]]:
            ways[name] = "gave a wrong result"
        else:
            ways[name] = ""
    except Exception as error:
        ways[name] = type(error).__name__ + ": " + str(error)[:300]
print(json.dumps({{"version": engine.__version__, "ways": ways}}))
""",
    "torch": """
import json, torch as engine
ways = {}
for name in ["cpu"] + (["cuda"] if engine.cuda.is_available() else []):
    try:
        x = engine.tensor([[1.0, 2.0], [3.0, 4.0]], device=name)
        ways[name] = "" if (x @ x).cpu().tolist() == [[7, 10], [15, 22]] else "gave a wrong result"
    except Exception as error:
        ways[name] = type(error).__name__ + ": " + str(error)[:300]
print(json.dumps({"version": engine.__version__, "ways": ways}))
""",
    "tensorrt": """
import json, tensorrt as engine
try:
    builder = engine.Builder(engine.Logger(engine.Logger.ERROR))
    ways = {"builder": "" if builder else "no builder: is there a GPU?"}
except Exception as error:
    ways = {"builder": type(error).__name__ + ": " + str(error)[:300]}
print(json.dumps({"version": engine.__version__, "ways": ways}))
""",
}
"""Print one JSON line. The names of `ways` are those of the engine: providers, devices."""


class Proof(Struct, frozen=True):
    version: str
    ways: dict[str, str]
    """Provider or device -> '' if it computed the right result, else what went wrong. Of TensorRT only that its builder
    starts: an engine for it is built when a stage needs one."""

    @property
    def works(self) -> bool:
        return any(not because for because in self.ways.values())


def prove(
    engine: str, python: str = sys.executable, deadline_s: float = DEADLINE_S
) -> Reading[Proof] | Absent | Failed:
    """Load one engine of `ENGINES` and compute with each provider or device that it offers."""
    try:
        done = subprocess.run(
            (python, "-c", _SCRIPTS[engine]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Failed(f"{engine}: not loaded within {deadline_s:g} s")
    except OSError as error:
        return Failed(f"{engine}: {error.strerror or error}")
    if done.returncode != 0:
        return _not_loaded(engine, done.returncode, done.stderr.decode("utf-8", "replace"))
    line = done.stdout[-MAX_ANSWER_BYTES:].strip().rpartition(b"\n")[2]
    try:
        return Reading(msgspec.json.decode(line, type=Proof), "loaded and computed with")
    except msgspec.DecodeError as error:
        return Failed(f"{engine}: {error}")


def _not_loaded(engine: str, code: int, said: str) -> Absent | Failed:
    """A missing engine is absent; one whose libraries are missing has failed, with the loader's words."""
    last = said.strip().rpartition("\n")[2][:300]
    if last == f"ModuleNotFoundError: No module named '{engine}'":
        return Absent(f"{engine} is not installed")
    if code < 0:
        return Failed(f"{engine}: ended by signal {-code}: {last}")
    return Failed(f"{engine}: {last or f'exit {code}'}")


def prove_all(python: str = sys.executable) -> dict[str, Reading[Proof] | Absent | Failed]:
    return {engine: prove(engine, python) for engine in ENGINES}
