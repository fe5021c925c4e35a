"""A real agent with real workers, broker, artifacts and engine: a tiny model answers, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models.build.kit import build_kit
from models.build.pack import Packed
from tests.agent.test_processes import Site, alive, needs_mosquitto
from tests.agent.test_store_and_fetch import Server
from tests.models.stages import Ring, packed_tiny, spec_of, stage_files
from wire import topics
from wire.channel import Inbox, Outbox
from wire.frames import Kind, Parcel, Tensor
from wire.messages import (
    Applied,
    ArtifactRef,
    Desired,
    EngineName,
    InboxAddress,
    Kit,
    KitModule,
    RequestMeta,
    Sampling,
    StageError,
    StageOrder,
    StageReport,
    Telemetry,
    decode,
    encode,
)

DEVICE = "pi5"
REPLY = InboxAddress(topic=topics.INBOX.on("lab", "requester-1", "0"))
APART = InboxAddress(topic=topics.INBOX.on("lab", "chat", "0-standby-pi5"))
PROMPT = [5, 9, 200, 31, 7, 77, 12, 3, 250]
NEW_TOKENS = 12

pytestmark = [needs_mosquitto, pytest.mark.timeout(90)]


class Deployment:
    """One agent that holds all stages of a tiny model, and a requester."""

    def __init__(self, folder: Path, packed: Packed) -> None:
        self.folder = folder
        self.packed = packed
        self.site = Site(folder)
        self.http = Server()
        self.inbox = Inbox(self.site.client, REPLY.topic)
        self.outbox = Outbox(self.site.client, self.address(0).topic)
        self.process = self.start_agent()
        self.requests = 0
        self.log = ""

    def start_agent(self) -> subprocess.Popen[bytes]:
        arguments = [
            "run", "--site", "lab", "--name", DEVICE, "--broker", self.site.url, "--threads", "1",
            "--state-dir", str(self.folder / "state"), "--cache-dir", str(self.folder / "device"),
            "--interfaces", "127.0.0.1",
        ]  # fmt: skip
        log = (self.folder / "agent.log").open("ab")
        return subprocess.Popen([sys.executable, "-m", "agent", *arguments], stderr=log)

    def address(self, stage: int) -> InboxAddress:
        return InboxAddress(topic=topics.INBOX.on("lab", "chat", str(stage)))

    def artifact(self, path: Path) -> ArtifactRef:
        return self.http.add(path.read_bytes())

    def deploy(
        self, cuts: tuple[int, ...], epoch: int, standby: bool = False, engine: EngineName = "onnxruntime"
    ) -> None:
        """Order the stages between `cuts`, all on this device; as copies that wait, with one inbox, if wanted."""
        bounds = [0, *cuts, self.packed.graph.blocks]
        stages = len(bounds) - 1
        orders = []
        for stage in range(stages):
            spec = spec_of(self.packed, bounds[stage], bounds[stage + 1])
            graph, weights = stage_files(self.packed, self.folder, spec)
            orders.append(
                StageOrder(
                    deployment="chat", epoch=epoch, stage=stage, stages=stages, model="tiny", engine=engine,
                    graph=self.artifact(graph), weights=tuple(self.artifact(path) for path in weights),
                    embedding=spec.embedding, head=spec.head, first_block=spec.first_block, end_block=spec.end_block,
                    hidden=spec.hidden, vocabulary=spec.vocabulary, wire_dtype=spec.wire_dtype,  # type: ignore[arg-type]
                    context_tokens=64, slots=2, prefill_chunk_tokens=4,
                    inbox=APART if standby else self.address(stage),
                    next=APART if standby else self.address((stage + 1) % stages), standby=standby,
                )
            )  # fmt: skip
        desired = Desired(device=DEVICE, epoch=epoch, artifacts_url=self.http.url, stages=tuple(orders))
        self.site.client.publish(topics.DESIRED.on("lab", DEVICE), encode(desired), qos=1, retain=True)
        self.site.wait(lambda: self.ready(epoch, stages), 40)

    def reports(self) -> tuple[StageReport, ...]:
        found = self.site.seen.get(topics.APPLIED.on("lab", DEVICE))
        return decode(found[-1], Applied, "test").stages if found else ()

    def ready(self, epoch: int, stages: int) -> bool:
        phases = [(report.epoch, report.phase) for report in self.reports()]
        return phases == [(epoch, "ready")] * stages

    def ask(self, epoch: int, prompt: list[int] = PROMPT, seed: int | None = None, **changes: Any) -> list[int]:
        """Send a prompt and give the answer; StageError becomes an AssertionError."""
        self.requests += 1
        sampling = Sampling() if seed is None else Sampling(temperature=1.0, seed=seed)
        fields = {"prompt_tokens": len(prompt), "max_new_tokens": NEW_TOKENS, **changes}
        meta = RequestMeta(reply=REPLY, sampling=sampling, **fields)
        ids = Tensor.of(np.array(prompt, np.int32))
        self.outbox.send(Parcel(Kind.TOKENS, epoch, self.requests, 0, 0, ids, msgspec.json.encode(meta)))
        tokens: list[int] = []
        final = False

        def finished() -> bool:
            nonlocal final
            while (delivery := self.inbox.take()) is not None:
                parcel = delivery.parcel
                self.inbox.done(delivery)
                if parcel.request == self.requests and parcel.kind is Kind.ERROR:
                    raise AssertionError(msgspec.json.decode(parcel.meta, type=StageError))
                if parcel.request == self.requests and parcel.tensor is not None:
                    assert parcel.position == len(prompt) + len(tokens)
                    tokens.extend(parcel.tensor.array().tolist())
                    final = parcel.final
            return final

        self.site.wait(finished)
        return tokens

    def workers(self) -> list[int]:
        """Process ids of the agent's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        self.site.close()
        self.http.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_tiny(tmp_path_factory.mktemp("tiny"), precision="int8")


@pytest.fixture
def deployment(tmp_path: Path, packed: Packed) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, packed)
    yield deployment
    deployment.close()


def expected(packed: Packed, folder: Path) -> list[int]:
    """The answer without network and agents, in the same chunks."""
    ring = Ring.of(packed, folder, ())
    for start, end in ((0, 4), (4, 7), (7, 9)):
        logits = ring.step(np.array(PROMPT[start:end], np.int64), start)
    tokens = [int(np.argmax(logits))]
    for position in range(len(PROMPT), len(PROMPT) + NEW_TOKENS - 1):
        tokens.append(int(np.argmax(ring.step(np.array(tokens[-1:], np.int64), position))))
    return tokens


def test_the_answer_is_the_same_bits_however_the_model_is_cut(deployment: Deployment, tmp_path: Path) -> None:
    answer = expected(deployment.packed, tmp_path)
    for epoch, cuts in ((1, ()), (2, (2,)), (3, (1, 3))):
        deployment.deploy(cuts, epoch)
        assert deployment.ask(epoch) == answer, cuts
        assert deployment.ask(epoch, seed=3) == deployment.ask(epoch, seed=3)
    [first, *_] = deployment.reports()
    assert first.held_bytes > 0 and first.resident_bytes > 0 and first.fetched_bytes == first.to_fetch_bytes

    def counted() -> bool:
        beats = deployment.site.seen.get(topics.TELEMETRY.on("lab", DEVICE), [])
        stages = decode(beats[-1], Telemetry, "test").stages
        return len(stages) == 3 and all(stage.requests >= 3 and stage.sent_bytes > 0 for stage in stages)

    deployment.site.wait(counted)


def test_a_stage_whose_engine_is_not_there_answers_on_the_next_one_and_says_so(
    deployment: Deployment, tmp_path: Path
) -> None:
    """No board of these tests has TensorRT, nor an onnxruntime with CUDA; the orders have no standard graph either."""
    deployment.deploy((2,), 1, engine="tensorrt")
    assert deployment.ask(1) == expected(deployment.packed, tmp_path)
    for report in deployment.reports():
        assert report.engine.endswith("CPUExecutionProvider")
        assert report.fell_back.startswith("tensorrt: ") and "; onnxruntime-cuda: " in report.fell_back

    def counted() -> bool:
        beats = deployment.site.seen.get(topics.TELEMETRY.on("lab", DEVICE), [])
        stages = decode(beats[-1], Telemetry, "test").stages
        return [stage.engine for stage in stages] == [report.engine for report in deployment.reports()]

    deployment.site.wait(counted)


def test_guessed_tokens_are_those_of_steps_of_two_rows_however_the_model_is_cut(
    deployment: Deployment, tmp_path: Path
) -> None:
    ring = Ring.of(deployment.packed, tmp_path, ())
    answer = [int(np.argmax(ring.step(np.array(PROMPT, np.int64), 0, 2)[-1]))]
    while len(answer) < 40:
        pair = np.array(answer[-1:] * 2, np.int64)
        answer.append(int(np.argmax(ring.step(pair, len(PROMPT) + len(answer) - 1, 2)[0])))
    for epoch, cuts in ((1, ()), (2, (1, 3))):
        deployment.deploy(cuts, epoch)
        for most in (1, 7):
            assert deployment.ask(epoch, max_new_tokens=40, speculate=most, padded=True) == answer, (cuts, most)
            drawn = [deployment.ask(epoch, seed=3, max_new_tokens=40, speculate=m, padded=True) for m in (most, 3)]
            assert drawn[0] == drawn[1]
        assert len(deployment.ask(epoch, max_new_tokens=40, speculate=7)) == 40

    def counted() -> bool:
        beats = deployment.site.seen.get(topics.TELEMETRY.on("lab", DEVICE), [])
        stages = decode(beats[-1], Telemetry, "test").stages
        return len(stages) == 3 and any(0 < stage.drafts_accepted <= stage.drafts_sent for stage in stages)

    deployment.site.wait(counted)


def test_a_killed_worker_and_a_killed_agent_come_back_and_answer(deployment: Deployment, tmp_path: Path) -> None:
    answer = expected(deployment.packed, tmp_path)
    deployment.deploy((2,), 1)
    assert deployment.ask(1) == answer
    victim = deployment.workers()[0]
    os.kill(victim, signal.SIGKILL)
    deployment.site.wait(lambda: any("SIGKILL" in report.detail for report in deployment.reports()))
    deployment.site.wait(lambda: deployment.ready(1, 2))
    assert deployment.ask(1) == answer
    assert sorted(report.restarts for report in deployment.reports()) == [0, 1]

    asked, workers = len(deployment.http.asked), deployment.workers()
    deployment.process.kill()
    deployment.process.wait()
    deployment.site.seen.clear()
    deployment.process = deployment.start_agent()
    deployment.site.wait(lambda: deployment.ready(1, 2), 30)
    assert deployment.ask(1) == answer
    assert len(deployment.http.asked) == asked, "weights of the last boot are used again"
    assert not any(alive(pid) for pid in workers)


def test_a_broker_that_dies_leaves_the_workers_loaded_and_they_answer_again(
    deployment: Deployment, tmp_path: Path
) -> None:
    answer = expected(deployment.packed, tmp_path)
    deployment.deploy((2,), 1)
    workers = deployment.workers()
    deployment.site.stop_broker()
    deployment.site.seen.clear()
    time.sleep(0.3)
    deployment.site.start_broker()
    deployment.site.wait(lambda: deployment.ready(1, 2))
    time.sleep(1.5)  # workers reconnect every second, on their own
    assert deployment.ask(1) == answer and deployment.workers() == workers


def test_a_new_epoch_is_adopted_by_the_same_processes(deployment: Deployment, tmp_path: Path) -> None:
    answer = expected(deployment.packed, tmp_path)
    deployment.deploy((1,), 1)
    workers = deployment.workers()
    assert deployment.ask(1) == answer
    deployment.deploy((1,), 2)
    assert deployment.ask(2) == answer and deployment.workers() == workers

    def counted() -> list[tuple[int, int]]:
        beats = deployment.site.seen.get(topics.TELEMETRY.on("lab", DEVICE), [])
        stages = decode(beats[-1], Telemetry, "test").stages if beats else ()
        return [(stage.requests, stage.decode_rows) for stage in stages if stage.epoch == 2]

    # Of this epoch alone.
    deployment.site.wait(lambda: counted() == [(1, NEW_TOKENS - 1)] * 2)


def test_a_copy_makes_no_steps_and_is_adopted_with_what_it_has_loaded(deployment: Deployment, tmp_path: Path) -> None:
    answer = expected(deployment.packed, tmp_path)
    deployment.deploy((), 1, standby=True)
    assert [report.standby for report in deployment.reports()] == [True]
    workers, asked = deployment.workers(), len(deployment.http.asked)
    meta = RequestMeta(reply=REPLY, sampling=Sampling(), prompt_tokens=len(PROMPT), max_new_tokens=NEW_TOKENS)
    ids = Tensor.of(np.array(PROMPT, np.int32))
    outbox = Outbox(deployment.site.client, APART.topic)
    outbox.send(Parcel(Kind.TOKENS, 1, 99, 0, 0, ids, msgspec.json.encode(meta)))

    def refused() -> bool:
        beats = deployment.site.seen.get(topics.TELEMETRY.on("lab", DEVICE), [])
        stages = decode(beats[-1], Telemetry, "test").stages if beats else ()
        assert not any(stage.prefill_steps or stage.decode_steps or stage.requests for stage in stages)
        return any(stage.refused_frames == 1 for stage in stages)

    deployment.site.wait(refused)
    deployment.deploy((), 2)
    assert [report.standby for report in deployment.reports()] == [False]
    assert deployment.ask(2) == answer
    assert deployment.workers() == workers and len(deployment.http.asked) == asked


def test_files_that_are_no_stage_are_a_failed_phase_with_the_reason(deployment: Deployment, tmp_path: Path) -> None:
    deployment.deploy((), 1)
    good = msgspec.json.decode(deployment.site.seen[topics.DESIRED.on("lab", DEVICE)][-1], type=Desired)
    bad = deployment.http.add(b"no graph at all")
    order = msgspec.structs.replace(good.stages[0], epoch=2, graph=bad)
    desired = msgspec.structs.replace(good, epoch=2, stages=(order,))
    deployment.site.client.publish(topics.DESIRED.on("lab", DEVICE), encode(desired), qos=1, retain=True)
    deployment.site.wait(lambda: [report.phase for report in deployment.reports()] == ["failed"], 40)
    assert "graph" in deployment.reports()[0].detail
    deployment.deploy((), 3)
    assert len(deployment.ask(3)) == NEW_TOKENS


def offer_kit(deployment: Deployment) -> list[KitModule]:
    modules = []
    for entry in build_kit(deployment.packed.config, "int8", "f16"):
        graphs = tuple((stack, deployment.http.add(data)) for stack, data in entry.graphs.items())
        modules.append(
            KitModule(
                key=entry.key, kind=entry.kind, graphs=graphs, hidden=entry.hidden, vocabulary=entry.vocabulary,
                wire_dtype=entry.wire_dtype,
            )
        )  # fmt: skip
    kit = Kit(artifacts_url=deployment.http.url, modules=tuple(modules))
    deployment.site.client.publish(topics.KIT.on("lab"), encode(kit), qos=1, retain=True)
    return modules


def test_the_kit_of_a_model_is_measured_in_a_worker(deployment: Deployment) -> None:
    modules = offer_kit(deployment)
    profile_topic = topics.PROFILE.on("lab", DEVICE)
    deployment.site.wait(lambda: profile_topic in deployment.site.seen, 120)
    profile = json.loads(deployment.site.seen[profile_topic][-1])
    assert {module["key"] for module in profile["modules"]} == {module.key for module in modules}
    assert profile["engines"]["onnxruntime"]["value"].startswith("onnxruntime ")
    assert profile["link"]["broker"] == deployment.site.url
    assert all(module["base_bytes"] > 1 << 20 and module["timings"] for module in profile["modules"])
    assert all(module["weight_bytes"] > 0 and module["took_s"] > 0 for module in profile["modules"])
    assert profile["ceilings"]["type"] == "measured" and len(profile["ceilings"]["products"]) == 2
    codings = profile["codings"]
    assert codings["type"] == "measured" and {one["rows"] for one in codings["timings"]} == {1, 64}
    assert all(0 < min(one["samples"]["samples_s"]) < 1 for one in codings["timings"])
    assert profile["disk"]["type"] in ("measured", "absent"), "absent where the test's folder is in memory"
    assert list((deployment.folder / "device" / "artifacts").glob("tmp*")) == []


def test_measuring_that_is_cut_off_by_a_kill_goes_on_where_it_was(deployment: Deployment) -> None:
    modules = offer_kit(deployment)
    kept = deployment.folder / "state" / "profile.json"
    deployment.site.wait(kept.exists, 60)
    deployment.process.kill()
    deployment.process.wait()
    before = {module["key"]: module for module in json.loads(kept.read_bytes())["modules"]}
    assert 0 < len(before) < len(modules), "killed after the first module, before the last"
    deployment.process = deployment.start_agent()
    profile_topic = topics.PROFILE.on("lab", DEVICE)

    def whole() -> bool:
        said = deployment.site.seen.get(profile_topic)
        return bool(said) and len(json.loads(said[-1])["modules"]) == len(modules)

    deployment.site.wait(whole, 60)
    after = {module["key"]: module for module in json.loads(deployment.site.seen[profile_topic][-1])["modules"]}
    for key, module in before.items():
        assert after[key]["timings"] == module["timings"], "what was measured is not measured again"
