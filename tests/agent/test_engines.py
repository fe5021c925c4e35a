"""On which engine a stage is loaded, what happens when it can't be, and with which a board measures itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent import hanging, stages
from agent.engines import CUDA_LIBRARY, Due, due, others
from agent.fetch import Progress
from agent.lifecycle import State
from agent.workers.inference import load
from agent.workers.measuring import measure
from agent.workers.pipe import (
    Assignment,
    BrokerLogin,
    Measured,
    MeasuredModule,
    MeasureModule,
    MeasureNote,
    MeasureTask,
    Status,
)
from hwprofiles.profile import Profile
from hwprofiles.reading import Absent, Failed, Reading
from models.build.kit import build_kit
from models.engine import cuda
from models.engine.base import EngineFailed, StageEngine
from models.engine.choice import first_that_works
from models.engine.names import AUTOMATIC, ENGINES, FALLBACKS
from tests.agent.fakes import DEVICE, SITE, FakeLauncher, Lab, desired_of, order_of, ref_of
from tests.agent.test_measuring import ask, measured
from tests.hwprofiles import examples
from tests.models.fake_tensorrt import GpuLikeMemory, fake_tensorrt
from tests.models.stages import packed_tiny, spec_of, stage_files
from tests.models.test_standard import standard_files
from wire import topics
from wire.errors import CorruptData
from wire.messages import Applied, EngineName, Kit, KitModule

PROMPT = np.array([5, 77, 301], np.int64)


def test_every_engine_ends_on_the_processor_and_none_before_itself() -> None:
    for engine in ENGINES:
        chain = (engine, *FALLBACKS[engine])
        assert chain[-1] == "onnxruntime" and len(set(chain)) == len(chain)
    assert set(AUTOMATIC) < set(ENGINES)


def failing(*broken: str) -> Callable[[EngineName], StageEngine]:
    def loads(name: EngineName) -> StageEngine:
        if name in broken:
            raise EngineFailed(f"no {name} here", try_=f"mend {name}")
        return name  # type: ignore[return-value]

    return loads


def test_the_next_engine_is_taken_and_every_reason_is_kept() -> None:
    assert first_that_works("tensorrt", failing(), {}) == ("tensorrt", "tensorrt", "")
    tried: list[str] = []
    found = first_that_works("tensorrt", failing("tensorrt", "onnxruntime-cuda"), {}, tried.append)
    assert found.name == "onnxruntime" and tried == ["tensorrt", "onnxruntime-cuda", "onnxruntime"]
    assert found.fell_back == "tensorrt: no tensorrt here; onnxruntime-cuda: no onnxruntime-cuda here"
    with pytest.raises(EngineFailed, match=r"no tensorrt here; .*no onnxruntime here") as caught:
        first_that_works("tensorrt", failing(*ENGINES), {})
    assert caught.value.try_ == "mend onnxruntime"
    with pytest.raises(EngineFailed, match=r"^no onnxruntime here$"):
        first_that_works("onnxruntime", failing("onnxruntime"), {})


def test_what_took_its_process_along_is_not_tried_again() -> None:
    tried: list[str] = []
    found = first_that_works("tensorrt", failing(), {"tensorrt": "killed by SIGSEGV"}, tried.append)
    assert tried == ["onnxruntime-cuda"] and found.fell_back == "tensorrt: killed by SIGSEGV"


def test_damaged_files_are_no_reason_for_another_engine() -> None:
    def loads(name: EngineName) -> StageEngine:
        raise CorruptData("weights are damaged")

    with pytest.raises(CorruptData):
        first_that_works("tensorrt", loads, {})


@pytest.fixture
def assignment(tmp_path: Path) -> Callable[..., Assignment]:
    packed = packed_tiny(tmp_path, "llama", "int4")
    spec = spec_of(packed, 0, 4)
    graph, weights = stage_files(packed, tmp_path, spec)
    standard, _ = standard_files(packed, tmp_path, spec)

    def made(engine: EngineName, **changes: Any) -> Assignment:
        order = order_of(
            engine=engine, embedding=True, head=True, first_block=0, end_block=4, hidden=spec.hidden,
            vocabulary=spec.vocabulary, wire_dtype=spec.wire_dtype, context_tokens=64, slots=2,
        )  # fmt: skip
        fields = {"standard_graph_path": str(standard), "engines_path": str(tmp_path / "engines"), **changes}
        return Assignment(
            device=DEVICE, site=SITE, order=order, graph_path=str(graph), threads=1, speed=1.0,
            weight_paths=tuple(map(str, weights)), login=BrokerLogin(url="", client_id=""), **fields,
        )  # fmt: skip

    return made


def with_gpu(monkeypatch: pytest.MonkeyPatch, *faults: str) -> Any:
    module = fake_tensorrt("10.3.0", faults)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda.CudaMemory, "open", GpuLikeMemory)
    return module


def test_a_board_without_a_gpu_answers_on_its_processor_and_says_why(
    assignment: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said: list[Status] = []
    chosen = load(assignment("tensorrt"), said.append)
    assert chosen.engine.name.endswith("CPUExecutionProvider")
    assert "tensorrt: tensorrt can't be imported" in chosen.fell_back
    assert "the installed onnxruntime has no CUDAExecutionProvider" in chosen.fell_back
    assert [status.trying for status in said] == ["tensorrt", "onnxruntime-cuda", "onnxruntime"]
    wanted = load(assignment("onnxruntime")).engine
    assert chosen.fell_back and not load(assignment("onnxruntime")).fell_back
    np.testing.assert_array_equal(
        chosen.engine.step(chosen.engine.open(), PROMPT, 0), wanted.step(wanted.open(), PROMPT, 0)
    )


def test_a_board_with_tensorrt_uses_it_and_says_that_it_builds(
    assignment: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = with_gpu(monkeypatch)
    said: list[Status] = []
    chosen = load(assignment("tensorrt"), said.append)
    assert chosen.name == "tensorrt" and not chosen.fell_back and chosen.engine.name.startswith("tensorrt 10.3.0 on")
    assert any("minutes" in status.detail and status.trying == "tensorrt" for status in said)
    load(assignment("tensorrt"))
    assert module.builds == 1


@pytest.mark.parametrize("fault", ["parse", "build", "load", "context", "run"])
def test_whatever_tensorrt_refuses_the_stage_answers(
    fault: str, assignment: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when only the first step fails: a stage is tried before it is ready."""
    with_gpu(monkeypatch, fault)
    chosen = load(assignment("tensorrt"))
    assert chosen.name == "onnxruntime" and chosen.fell_back.startswith("tensorrt: ")


def test_an_order_without_a_standard_graph_falls_back(
    assignment: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch)
    chosen = load(assignment("tensorrt", standard_graph_path=""))
    assert chosen.name == "onnxruntime" and "no graph of standard operators" in chosen.fell_back


def test_a_worker_on_the_processor_imports_nothing_of_other_engines(
    assignment: Callable[..., Assignment], tmp_path: Path
) -> None:
    """They would take memory that boards need."""
    (tmp_path / "assignment.json").write_bytes(msgspec.json.encode(assignment("onnxruntime")))
    script = (
        "import msgspec, sys; from agent.workers.inference import load; from agent.workers.pipe import Assignment; "
        "chosen = load(msgspec.json.decode(open(sys.argv[1], 'rb').read(), type=Assignment)); "
        "print(chosen.name, *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "assignment.json")], capture_output=True, text=True, check=True
    )
    name, *imported = done.stdout.split()
    others = {"built", "cuda", "expand", "providers", "shapes", "standard", "tensorrt", "torch"}
    assert name == "onnxruntime" and "models.engine.onnx" in imported
    assert not {"torch", "tensorrt", "onnx"} & set(imported)
    assert not {f"models.engine.{other}" for other in others} & set(imported)


@pytest.mark.torch
def test_torch_is_an_engine_like_others(assignment: Callable[..., Assignment]) -> None:
    torch = pytest.importorskip("torch")
    chosen = load(assignment("torch"))
    assert chosen.engine.name == f"torch {torch.__version__} cpu" and not chosen.fell_back
    if not torch.cuda.is_available():
        without = load(assignment("torch-cuda"))
        assert without.name == "onnxruntime" and "torch-cuda: torch" in without.fell_back


@pytest.fixture
def lab(tmp_path: Path):  # type: ignore[no-untyped-def]
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def applied(lab: Lab) -> Applied:
    found = lab.retained(topics.APPLIED, Applied)
    assert isinstance(found, Applied)
    return found


def test_a_crash_while_an_engine_loads_costs_that_engine_until_the_next_epoch(lab: Lab) -> None:
    launcher = FakeLauncher(ready=False)
    service = lab.agent(launcher)
    lab.store(service, b"graph", b"weights", b"standard")
    lab.turn(lambda: service.state is State.SERVING)
    order = order_of(engine="tensorrt", standard_graph=ref_of(b"standard"))
    lab.publish(topics.DESIRED, desired_of(order), DEVICE)

    def tried(worker: int) -> Assignment:
        lab.turn(lambda: worker in launcher.assignments)
        found = launcher.assignments[worker]
        assert isinstance(found, Assignment)
        return found

    first = tried(1)
    assert first.crashed == {} and Path(first.standard_graph_path).read_bytes() == b"standard"
    launcher.say(1, Status(phase="loading", epoch=1, trying="tensorrt"))
    launcher.kill(1, "killed by SIGSEGV")
    assert tried(2).crashed == {"tensorrt": "the worker that loaded it killed by SIGSEGV"}
    ready = Status(phase="ready", epoch=1, engine="onnxruntime 1 CPU", fell_back="tensorrt: killed by SIGSEGV")
    launcher.say(2, ready)
    lab.turn(lambda: applied(lab).stages[0].phase == "ready")
    assert applied(lab).stages[0].engine == "onnxruntime 1 CPU"
    assert applied(lab).stages[0].fell_back == "tensorrt: killed by SIGSEGV"
    other = msgspec.structs.replace(order, epoch=2, slots=3)
    lab.publish(topics.DESIRED, desired_of(other, epoch=2), DEVICE)
    assert tried(3).crashed == {}


def test_an_engine_that_hangs_while_it_loads_is_done_without(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hanging, "LOADING_HANGS_AFTER_S", 0.3)
    monkeypatch.setattr(stages, "LOOK_PERIOD_S", 0.05)
    launcher = FakeLauncher(ready=False)
    service = lab.agent(launcher)
    lab.store(service, b"graph", b"weights", b"standard")
    lab.turn(lambda: service.state is State.SERVING)
    lab.publish(topics.DESIRED, desired_of(order_of(engine="tensorrt", standard_graph=ref_of(b"standard"))), DEVICE)
    lab.turn(lambda: 1 in launcher.assignments)
    launcher.say(1, Status(phase="loading", epoch=1, trying="tensorrt"))
    lab.turn(lambda: 2 in launcher.assignments)
    second = launcher.assignments[2]
    assert isinstance(second, Assignment)
    assert second.crashed["tensorrt"].startswith("the worker that loaded it hung: no word and no processor time")


# Measuring.


def kit_module(key: str = "a") -> KitModule:
    graphs, standard = ((1, ref_of(b"the graph of a block")),), ((1, ref_of(b"standard")),)
    return KitModule(key=key, kind="block", graphs=graphs, standard=standard, hidden=8, vocabulary=32, wire_dtype="f32")


def test_engines_of_a_gpu_are_measured_where_they_are_installed_or_asked_for(tmp_path: Path) -> None:
    plain = {"onnxruntime": Reading("1", str(tmp_path)), "tensorrt": Absent("no"), "torch": Reading("2", "/opt")}
    assert others(plain, None) == ()
    assert others(plain, ("onnxruntime", "torch")) == ("torch",)
    assert others(plain | {"tensorrt": Reading("10", "/usr")}, None) == ("tensorrt",)
    assert others(plain | {"tensorrt": Reading("10", "/usr")}, ()) == ()
    (tmp_path / CUDA_LIBRARY).parent.mkdir()
    (tmp_path / CUDA_LIBRARY).touch()
    assert others(plain, None) == ("onnxruntime-cuda",)
    assert due(("tensorrt",), (), (kit_module(),), None) is None, "the processor first"


def test_a_module_that_runs_items_is_measured_on_the_processor_alone() -> None:
    task = MeasureTask(
        device=DEVICE, site=SITE, modules=(MeasureModule(module=kit_module(), graph_paths=()),), login=None,
        threads=1, speed=1.0,
    )  # fmt: skip
    known = examples.profile(modules=measured(task).modules)
    assert due(("tensorrt",), (), (kit_module(),), known) == Due("tensorrt", (kit_module(),))
    items = msgspec.structs.replace(kit_module(), runs="items", standard=())
    assert due(("tensorrt",), (), (items,), known) is None


def with_others(
    lab: Lab,
    launcher: FakeLauncher,
    stored: tuple[bytes, ...] = (b"the graph of a block", b"standard"),
    keys: tuple[str, ...] = ("a",),
) -> Any:
    service = lab.agent(launcher, engines=("tensorrt", "torch"))
    lab.store(service, *stored)
    lab.turn(lambda: service.state is State.SERVING)
    lab.publish(topics.KIT, Kit(artifacts_url="http://127.0.0.1:1", modules=tuple(map(kit_module, keys))))
    return service


def on_engine(task: MeasureTask) -> Measured:
    found = measured(task)
    modules = tuple(msgspec.structs.replace(module, engine=task.engine) for module in found.modules)
    return msgspec.structs.replace(found, modules=modules, engines_loaded={task.engine: f"{task.engine} 1"})


def profile_of(lab: Lab) -> Profile | None:
    found = lab.retained(topics.PROFILE, Profile)
    assert found is None or isinstance(found, Profile)
    return found


def test_other_engines_are_measured_after_the_processor_and_a_crash_costs_only_them(lab: Lab) -> None:
    launcher = FakeLauncher()

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, MeasureNote(note="at it"))
        if task.engine == "tensorrt":
            launcher.kill(worker, "killed by SIGSEGV")
            return
        launcher.say(worker, on_engine(task))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    with_others(lab, launcher)

    def done() -> bool:
        found = profile_of(lab)
        return found is not None and len(found.modules) == 2 and not found.pending

    lab.turn(done)
    found = profile_of(lab)
    assert found is not None and [(m.key, m.engine) for m in found.modules] == [("a", "onnxruntime"), ("a", "torch")]
    assert found.engines["tensorrt"] == Failed("the measuring worker killed by SIGSEGV")
    assert found.failed == {}
    tasks = [task for task in launcher.assignments.values() if isinstance(task, MeasureTask)]
    assert [task.engine for task in tasks] == ["onnxruntime", "tensorrt", "torch"]
    assert [bool(task.login) for task in tasks] == [True, False, False]
    assert Path(tasks[1].modules[0].standard_paths[0][1]).read_bytes() == b"standard"
    pending = [msgspec.json.decode(data, type=Profile).pending for data in lab.seen[topics.PROFILE.on(SITE, DEVICE)]]
    assert pending[0] == "tensorrt" and pending[-1] == ""


def test_what_an_engine_had_measured_before_its_worker_died_is_kept_beside_the_processors(lab: Lab) -> None:
    launcher = FakeLauncher()

    def answer(worker: int, task: MeasureTask) -> None:
        said = on_engine(task)
        if task.engine == "tensorrt":
            launcher.say(worker, MeasuredModule(module=said.modules[0]))
            launcher.kill(worker, "killed by SIGKILL")
            return
        launcher.say(worker, said)
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    service = with_others(lab, launcher, keys=("a", "b"))
    lab.turn(lambda: service.measured)
    found = profile_of(lab)
    assert found is not None and not found.pending and found.failed == {}
    assert {(m.key, m.engine) for m in found.modules} == {
        ("a", "onnxruntime"), ("b", "onnxruntime"), ("a", "tensorrt"), ("a", "torch"), ("b", "torch"),
    }  # fmt: skip
    assert found.engines["tensorrt"] == Failed("the measuring worker killed by SIGKILL")


def test_a_measurement_that_is_asked_for_is_made_anew_on_every_engine(lab: Lab) -> None:
    """Also on one that failed before: it may have been mended."""
    launcher = FakeLauncher()
    broken = {"tensorrt"}

    def answer(worker: int, task: MeasureTask) -> None:
        if task.engine not in broken:
            launcher.say(worker, on_engine(task))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    service = with_others(lab, launcher)
    lab.turn(lambda: service.measured)
    broken.clear()
    assert ask(lab, "measure").ok
    lab.turn(lambda: service.measured)
    tasks = [task.engine for task in launcher.assignments.values() if isinstance(task, MeasureTask)]
    assert tasks == ["onnxruntime", "tensorrt", "torch", "onnxruntime", "tensorrt", "torch"]
    found = profile_of(lab)
    assert found is not None and [m.engine for m in found.modules] == ["onnxruntime", "tensorrt", "torch"]
    assert found.engines["tensorrt"] == Reading("tensorrt 1", "loaded by the measuring worker")


def test_nobody_waits_for_an_engine_that_is_not_to_be_measured_any_more(lab: Lab) -> None:
    """The agent was started again with other settings before it came to that engine."""
    launcher = FakeLauncher()
    launcher.on_measure = lambda worker, task: (
        launcher.say(worker, on_engine(task)) if task.engine == "onnxruntime" else None,
        launcher.kill(worker, "ended") if task.engine == "onnxruntime" else None,
    )
    first = with_others(lab, launcher)
    lab.turn(lambda: (found := profile_of(lab)) is not None and found.pending == "tensorrt")
    first.close()  # as a kill: nothing is said, nothing is written
    lab.services.remove(first)
    second = lab.agent(FakeLauncher(), engines=())
    lab.turn(lambda: second.state is State.SERVING)
    lab.publish(topics.KIT, Kit(artifacts_url="http://127.0.0.1:1", modules=(kit_module(),)))
    lab.turn(lambda: (found := profile_of(lab)) is not None and not found.pending)
    lab.turn(lambda: second.measured)
    found = profile_of(lab)
    assert found is not None and [module.engine for module in found.modules] == ["onnxruntime"]


def test_a_standard_graph_that_can_not_be_had_costs_the_engine_and_nothing_else(lab: Lab) -> None:
    launcher = FakeLauncher()

    def answer(worker: int, task: MeasureTask) -> None:
        launcher.say(worker, on_engine(task))
        launcher.kill(worker, "ended with exit code 0")

    launcher.on_measure = answer
    service = with_others(lab, launcher, stored=(b"the graph of a block",))

    def fetch_fails() -> bool:
        assert service._measuring is not None
        service._measuring.fetched(Progress(ref_of(b"standard").digest, 0, failed="404"))
        found = profile_of(lab)
        return found is not None and len(found.modules) == 2 and not found.pending

    lab.turn(fetch_fails)
    found = profile_of(lab)
    assert found is not None and isinstance(found.engines["tensorrt"], Failed) and found.failed == {}
    tasks = [task.engine for task in launcher.assignments.values() if isinstance(task, MeasureTask)]
    assert tasks == ["onnxruntime", "torch"]


class NoParent:
    def say(self, message: msgspec.Struct) -> None:
        pass


@pytest.mark.parametrize("engine", ["tensorrt", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_measuring_worker_measures_on_another_engine(
    engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    with_gpu(monkeypatch)
    packed = packed_tiny(tmp_path, "llama", "int4")
    items = []
    for entry in build_kit(packed.config, "int4", "f16"):
        paths: dict[str, list[tuple[int, str]]] = {"graphs": [], "standard": []}
        for kind, found in (("graphs", entry.graphs), ("standard", entry.standard)):
            for stack, data in found.items():
                path = tmp_path / f"{entry.kind}-{kind}-{stack}.onnx"
                path.write_bytes(data)
                paths[kind].append((stack, str(path)))
        module = KitModule(
            key=entry.key, kind=entry.kind, hidden=entry.hidden, vocabulary=entry.vocabulary,
            wire_dtype=entry.wire_dtype,
            graphs=tuple((stack, ref_of(b"graph")) for stack, _ in paths["graphs"]),
        )  # fmt: skip
        items.append(
            MeasureModule(module=module, graph_paths=tuple(paths["graphs"]), standard_paths=tuple(paths["standard"]))
        )
    task = MeasureTask(
        device=DEVICE, site=SITE, modules=tuple(items), login=None, threads=1, speed=1.0, budget_s=0.02,
        engine=engine, engines_path=str(tmp_path / "engines"),
    )  # fmt: skip
    found = measure(task, NoParent())  # type: ignore[arg-type]
    assert found.failed == {} and [module.engine for module in found.modules] == [engine] * 3
    assert all(module.resident_bytes > 0 and module.timings for module in found.modules)
    assert found.engines_loaded[engine].startswith(f"{engine} ")
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, "models.engine.torch", raising=False)
    assert set(measure(task, NoParent()).failed) == {item.module.key for item in items}  # type: ignore[arg-type]
