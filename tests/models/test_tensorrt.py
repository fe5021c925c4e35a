"""The TensorRT engine: built once, kept, checked, built again; for real on a board, else against what is documented."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import Packed
from models.engine import built
from models.engine.base import EngineFailed, StageSpec
from models.engine.built import BuiltEngines, BuiltFrom
from models.engine.cuda import CudaMemory
from models.engine.device import ALIGNMENT_BYTES
from models.engine.standard import StandardStage
from models.engine.tensorrt import import_tensorrt, load_stage
from tests.models.fake_tensorrt import GpuLikeMemory, fake_tensorrt
from tests.models.stages import Ring, packed_tiny, spec_of
from tests.models.test_standard import PROMPT, standard_files


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_tiny(tmp_path_factory.mktemp("packed"), "llama", "int4")


def module_of(monkeypatch: pytest.MonkeyPatch, version: str = "10.3.0", *faults: str) -> Any:
    module = fake_tensorrt(version, faults)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def stage(
    packed: Packed, folder: Path, spec: StageSpec | None = None, memory: Any = None, said: Any = None
) -> StandardStage:
    spec = spec or spec_of(packed, 0, 4)
    path, weights = standard_files(packed, folder, spec)
    gpu = memory or GpuLikeMemory()
    return load_stage(
        path, weights, spec, BuiltEngines(folder / "engines"), lambda: gpu, ([] if said is None else said).append
    )


def test_it_answers_what_onnxruntime_answers(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_of(monkeypatch)
    wanted = Ring.of(packed, tmp_path, ()).step(PROMPT, 0).copy()
    bounds = list(pairwise((0, 2, 4)))
    ring = Ring([stage(packed, tmp_path, spec_of(packed, *ends)) for ends in bounds])
    assert np.abs(ring.step(PROMPT, 0) - wanted).max() < 0.2 * wanted.std()
    assert ring.stages[0].name.startswith("tensorrt 10.3.0 on Fake")
    one, two = stage(packed, tmp_path), stage(packed, tmp_path)
    slots = one.open(), one.open()
    for slot in (*slots, two.open()):
        (one if slot in slots else two).step(slot, PROMPT, 0)
    many, failed = one.step_many(list(slots), np.array([5, 6]), [7, 7])
    alone = two.step(two.open(), np.append(PROMPT, 6), 0)
    assert not failed and np.abs(many[1] - alone).max() < 0.02 * alone.std()


def test_float32_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(monkeypatch)
    packed = packed_tiny(tmp_path, "qwen3", "f32")
    tokens, logits = Ring([stage(packed, tmp_path)]).generate(PROMPT, 6)
    wanted_tokens, wanted = Ring.of(packed, tmp_path, ()).generate(PROMPT, 6)
    assert tokens == wanted_tokens and np.abs(np.array(logits) - np.array(wanted)).max() < 1e-3
    assert module.last_config.cleared == ["tf32"]


def test_an_engine_is_built_once_for_a_board_a_version_and_a_stage(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, said = module_of(monkeypatch), list[str]()
    stage(packed, tmp_path, said=said)
    stage(packed, tmp_path, said=said)
    assert module.builds == 1 and len(said) == 1 and "minutes" in said[0]
    stage(packed, tmp_path, spec_of(packed, 0, 4, slots=3))
    assert module.builds == 2, "other shapes"
    stage(packed, tmp_path, memory=GpuLikeMemory("Fake, compute capability 11.0, 20 multiprocessors"))
    assert module.builds == 3, "another board"
    newer = module_of(monkeypatch, "10.16.2")
    stage(packed, tmp_path)
    assert newer.builds == 1, "another version"
    files = [path.name for path in (tmp_path / "engines").iterdir()]
    assert len([name for name in files if name.endswith(".engine")]) == 4
    assert not [name for name in files if name.startswith(".building-")]


@pytest.mark.parametrize("damage", ["cut", "a byte", "empty", "garbage", "nothing"])
def test_a_damaged_engine_is_built_again(
    damage: str, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(monkeypatch)
    stage(packed, tmp_path)
    (kept,) = (tmp_path / "engines").glob("*.engine")
    data = bytearray(kept.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "a byte":
        data[len(data) // 2] ^= 1
    elif damage == "garbage":
        data = bytearray(b"no engine at all")
    elif damage == "empty":
        data = bytearray()
    kept.write_bytes(data)
    assert np.isfinite(Ring([stage(packed, tmp_path)]).step(PROMPT, 0)).all()
    assert module.builds == (1 if damage == "nothing" else 2)
    stage(packed, tmp_path)
    assert module.builds == (1 if damage == "nothing" else 2)


def test_an_engine_that_tensorrt_does_not_take_is_built_again(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole, and says this version: TensorRT knows better."""
    module_of(monkeypatch)
    stage(packed, tmp_path)
    other = module_of(monkeypatch)
    load = other.Runtime.deserialize_cuda_engine
    calls = []

    def refuses_twice(runtime: Any, plan: bytes) -> Any:
        calls.append(plan)
        return load(runtime, plan) if len(calls) > 2 else None

    monkeypatch.setattr(other.Runtime, "deserialize_cuda_engine", refuses_twice)
    stage(packed, tmp_path)
    assert other.builds == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("parse", "can't read the graph: no importer"),
        ("build", "can't build the stage: out of memory"),
        ("load", "can't load what it built: version tag"),
        ("context", "no memory to run in"),
        ("run", "failed"),
    ],
)
def test_what_goes_wrong_is_said(
    fault: str, words: str, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of(monkeypatch, "10.3.0", fault)
    with pytest.raises(EngineFailed, match=words):
        Ring([stage(packed, tmp_path)]).step(PROMPT, 0)


def test_what_can_not_be_imported_or_is_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineFailed, match="can't be imported"):
        import_tensorrt()
    module_of(monkeypatch, "8.6.2")
    with pytest.raises(EngineFailed, match=r"8\.6\.2 is too old"):
        import_tensorrt()


def built_from(what: str) -> BuiltFrom:
    return BuiltFrom(board="b", builder="tensorrt 10", graph=what, weights=(), shapes="")


def test_kept_engines_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    kept = BuiltEngines(tmp_path / "engines", most_bytes=3000)
    for number, name in enumerate("abc"):
        kept.put(built_from(name), bytes(800))
        path = tmp_path / "engines" / f"{built_from(name).key}.engine"
        os.utime(path, (1000 + number, 1000 + number))
    assert kept.get(built_from("a")) == bytes(800), "used, so the newest now"
    kept.put(built_from("d"), bytes(800))
    assert [kept.get(built_from(name)) is not None for name in "abcd"] == [True, False, True, True]
    kept.put(built_from("e"), bytes(9000))
    assert [kept.get(built_from(name)) is not None for name in "acde"] == [False, False, False, True]


def test_whoever_waits_for_his_turn_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "LOOK_AGAIN_S", 0.01)
    kept, said = BuiltEngines(tmp_path / "engines"), threading.Semaphore(0)
    words: list[str] = []

    def say(text: str) -> None:
        words.append(text)
        said.release()

    def wait() -> None:
        with kept.turn(say):
            words.append("its turn")

    with kept.turn():
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert said.acquire(timeout=20) and said.acquire(timeout=20), "again and again, so it is not taken for hanging"
        assert "its turn" not in words
    waiter.join(20)
    assert words[-1] == "its turn" and words[0] == "waits for another engine that is built"


def test_a_folder_that_can_not_be_written_costs_building_again(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of(monkeypatch)
    (tmp_path / "engines").write_text("no folder")
    with pytest.raises(EngineFailed, match="no engine can be built in"):
        stage(packed, tmp_path)


class Driver:
    """libcuda's functions over this machine's memory, in the form in which ctypes calls them."""

    def __init__(self, fail: str = "") -> None:
        self.fail = fail
        self.kept: list[Any] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fail:
                return 2
            if hasattr(type(self), f"_{name}"):
                getattr(self, f"_{name}")(*arguments)
            return 0

        return call

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        memory = ctypes.create_string_buffer(b"x" * size.value, size.value + ALIGNMENT_BYTES)
        self.kept.append(memory)
        address._obj.value = -(-ctypes.addressof(memory) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def _cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> None:
        ctypes.memset(address.value, value.value, size.value)

    def _cuMemcpyHtoDAsync_v2(self, to: Any, given: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(to.value, given.value, size.value)

    _cuMemcpyDtoHAsync_v2 = _cuMemcpyHtoDAsync_v2

    def _cuMemcpy2DAsync_v2(self, copy: Any, stream: Any) -> None:
        said = copy._obj
        assert (said.src_type, said.dst_type) == (2, 2) and ctypes.sizeof(said) == 128
        for row in range(said.height):
            ctypes.memmove(said.dst_device + row * said.dst_pitch, said.src_device + row * said.src_pitch, said.width)

    def _cuGetErrorString(self, code: int, words: Any) -> None:
        words._obj.value = b"out of memory"

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = b"Orin"

    def _cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> None:
        value._obj.value = {75: 8, 76: 7, 16: 8}[which]


def test_memory_of_a_gpu_is_what_the_driver_says() -> None:
    driver = Driver()
    memory = CudaMemory(driver)
    assert memory.device_name == "Orin, compute capability 8.7, 8 multiprocessors"
    given = np.arange(12, dtype=np.int32).reshape(3, 4)
    one, two = memory.take(48), memory.take(96)
    memory.write(one, given)
    memory.copy_rows(two, 32, one, 16, 16, 3)
    into = np.ones(24, np.int32)
    memory.read(two, into)
    memory.wait()
    np.testing.assert_array_equal(into.reshape(3, 8)[:, :4], given)
    assert not into.reshape(3, 8)[:, 4:].any(), "what was taken is zeroed"
    assert driver.calls[-1] == "cuStreamSynchronize"


def test_memory_of_a_stage_that_is_no_more_goes_back_to_the_board() -> None:
    driver = Driver()
    memory = CudaMemory(driver)
    for size_bytes in (48, 96):
        memory.take(size_bytes)
    assert "cuMemFree_v2" not in driver.calls
    del memory
    assert driver.calls[-2:] == ["cuMemFree_v2", "cuMemFree_v2"]


def test_what_the_driver_refuses_is_said() -> None:
    with pytest.raises(EngineFailed, match=r"cuMemAlloc_v2: out of memory \(2\)"):
        CudaMemory(Driver("cuMemAlloc_v2")).take(1 << 40)


@pytest.mark.board
def test_on_a_gpu_for_real(packed: Packed, tmp_path: Path) -> None:
    """Needs TensorRT 10 or later and a GPU: python -m pytest -m board tests/models/test_tensorrt.py."""
    pytest.importorskip("tensorrt")
    try:
        memory = CudaMemory.open()
    except EngineFailed as error:
        pytest.skip(str(error))
    for precision, most in (("f32", 1e-2), ("int8", 0.1), ("int4", 0.3)):
        model = packed_tiny(tmp_path / precision, "llama", precision)
        wanted = Ring.of(model, tmp_path / precision, ()).generate(PROMPT, 8)[1]
        given = Ring([stage(model, tmp_path / precision, memory=memory)]).generate(PROMPT, 8)[1]
        assert np.abs(given[0] - wanted[0]).max() < most * wanted[0].std(), precision
