"""What Prometheus reads: every figure moves when the world does, and nothing that strangers say makes a series."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from coordinator.api import make_app
from coordinator.inference import serve
from coordinator.metrics import Metrics, Outcome, Watched, outcome_of
from coordinator.notices import notice
from coordinator.promised import Ratio
from coordinator.slowness import SLOWER_WINDOWS
from tests.coordinator.memory_site import Lab, running, until
from tests.coordinator.test_serving import Ring, request, ring
from wire import topics
from wire.errors import Busy, CorruptData, Degraded, EdgelamError, PeerError, Refused, Unreachable, UsageError
from wire.messages import StageCounters, Telemetry
from wire.version import VERSION

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Figures:
    """(name, labels) -> value; fails for what Prometheus would not take."""
    figures: Figures = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, f"{family.name} does not say what it is"
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in figures, f"{key} twice"
            figures[key] = sample.value
    return figures


async def _page(metrics: Metrics) -> str:
    response = await metrics.page(None)  # type: ignore[arg-type]
    return bytes(response.body).decode()


class Reader:
    """Reads the page of one site."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def figures(self) -> Figures:
        return parsed(await _page(self.metrics))

    async def get(self, name: str, **labels: str) -> float:
        return (await self.figures())[name, frozenset(labels.items())]


@pytest.fixture
def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Ring, Reader], Awaitable[None]]], None]:
    monkeypatch.setattr(serve, "COUNTERS_WAIT_S", 0.01)

    def run(scenario: Callable[[Ring, Reader], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with ring(tmp_path) as made:
                await scenario(made, Reader(Metrics(made.lab.coordinator, made.serving)))

        asyncio.run(asyncio.wait_for(whole(), 30))

    return run


async def consumed(made: Ring, reader: Reader) -> None:
    async with aclosing(reader.metrics.watch(made.serving.generate(request()), Watched())) as events:
        async for _ in events:
            pass


async def served(made: Ring, reader: Reader, answer: str, number: int = 1) -> None:
    """One request that is answered."""
    work = asyncio.ensure_future(consumed(made, reader))
    made.answer(await made.prompt(number), answer)
    await work


def test_an_answer_moves_requests_tokens_and_times(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        before = await reader.figures()
        assert before["edgelam_requests_total", frozenset({("outcome", "length")})] == 0, "there before the first one"
        await served(made, reader, "hello")
        await served(made, reader, "h\0", 2)
        assert await reader.get("edgelam_requests_total", outcome="length") == 1
        assert await reader.get("edgelam_requests_total", outcome="stop") == 1
        assert await reader.get("edgelam_prompt_tokens_total") == 6
        assert await reader.get("edgelam_generated_tokens_total") == 7
        for name in ("request_wait", "time_to_first_token", "time_per_token"):
            assert await reader.get(f"edgelam_{name}_seconds_count") == 2
            assert 0 <= await reader.get(f"edgelam_{name}_seconds_sum") < 10

    play(scenario)


def test_a_pause_is_measured_and_is_no_time_per_token(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        work = asyncio.ensure_future(consumed(made, reader))
        prompt = await made.prompt()
        made.give(prompt, 0, ord("h"))
        await until(lambda: made.serving._live[prompt.request]._next_index == 1)
        await asyncio.sleep(0.3)
        made.deploy()
        made.answer(await made.prompt(2), "i")
        await work
        assert await reader.get("edgelam_pause_seconds_count") == 1
        assert await reader.get("edgelam_pause_seconds_sum") >= 0.3
        assert await reader.get("edgelam_time_per_token_seconds_sum") < 0.1

    play(scenario)


def test_live_and_waiting_requests_are_counted_while_they_are(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        made.operations.ready.clear()
        work = asyncio.ensure_future(served(made, reader, "hello"))
        await until(lambda: made.serving.waiting == 1)
        assert await reader.get("edgelam_requests_waiting") == 1
        made.operations.ready.set()
        await until(lambda: made.serving.live == 1)
        assert await reader.get("edgelam_requests_live") == 1
        assert await reader.get("edgelam_requests_waiting") == 0
        await work
        assert await reader.get("edgelam_requests_live") == 0

    play(scenario)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Busy("x"), "busy"), (Refused("x"), "refused"), (UsageError("x"), "refused"), (Unreachable("x"), "unreachable"),
        (Degraded("x"), "unreachable"), (PeerError("x"), "failed"), (CorruptData("x"), "failed"),
        (EdgelamError("x"), "failed"), (OSError("x"), "failed"), (None, "cancelled"),
    ],
)  # fmt: skip
def test_every_end_of_a_request_has_its_outcome(error: Exception | None, outcome: str, play: Any) -> None:
    async def events() -> AsyncGenerator[dict[str, Any], None]:
        yield {"event": "status", "text": "packing"}
        if error is not None:
            raise error
        yield {"event": "start", "prompt_tokens": 1}

    async def scenario(_made: Ring, reader: Reader) -> None:
        watch = reader.metrics.watch(events(), Watched())
        assert (await watch.__anext__())["event"] == "status"
        if error is None:
            await watch.aclose()
        else:
            with pytest.raises(type(error)):
                await watch.__anext__()
        for name in get_args(Outcome):
            assert await reader.get("edgelam_requests_total", outcome=name) == (name == outcome)

    if isinstance(error, EdgelamError):
        assert outcome_of(error) == outcome
    play(scenario)


def test_devices_broker_deployments_and_notices_are_as_they_are(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        coordinator = made.lab.coordinator
        assert await reader.get("edgelam_build_info", version=VERSION, protocol="1") == 1
        assert await reader.get("edgelam_broker_up") == 1
        assert await reader.get("edgelam_devices", state="online") == 1
        assert await reader.get("edgelam_devices", state="offline") == 0
        assert await reader.get("edgelam_device_speed_ratio", device="a") == 1
        for _ in range(SLOWER_WINDOWS):
            coordinator.slowness.saw("a", Ratio(4.0, 4.0), 0.0, 0.0)
        assert await reader.get("edgelam_device_speed_ratio", device="a") == 0.25
        [record] = coordinator.records()
        assert await reader.get("edgelam_deployment_epoch", deployment="tiny") == record.plan.epoch
        assert await reader.get("edgelam_deployment_stages", deployment="tiny") == 1
        await until(lambda: bool(coordinator.applied()))
        assert await reader.get("edgelam_deployment_ready", deployment="tiny") == 1
        labels = {
            "deployment": "tiny",
            "model": "tiny",
            "precision": "int4",
            "objective": "latency",
            "topology": "central",
        }
        assert await reader.get("edgelam_deployment_info", **labels) == 1
        errors = await reader.get("edgelam_notices_total", level="error")
        for _ in range(300):
            coordinator.note(notice("fleet-full", device="x", limit=1))
        assert await reader.get("edgelam_notices_total", level="error") == errors + 300, "also what is kept no more"
        made.lab.boards["a"].leave()
        await until(lambda: not coordinator.online())
        assert await reader.get("edgelam_devices", state="offline") == 1
        assert await reader.get("edgelam_deployment_ready", deployment="tiny") == 0
        coordinator.take_out_of_force("tiny")
        assert not [
            name for name, _ in await reader.figures() if name.startswith(("edgelam_deployment", "edgelam_stage"))
        ]

    play(scenario)


def counters(epoch: int, deployment: str = "tiny", stage: int = 0, **changes: Any) -> StageCounters:
    fields: dict[str, Any] = {"requests": 2, "prefill_steps": 3, "prefill_tokens": 30, "prefill_busy_s": 0.5}
    fields |= {
        "drafts_sent": 9,
        "drafts_accepted": 4,
        "decode_steps": 7,
        "decode_busy_s": 0.25,
        "sent_bytes": 1000,
        "received_bytes": 900,
    }
    return StageCounters(deployment=deployment, epoch=epoch, stage=stage, **{**fields, "resident_bytes": 5, **changes})


async def tell(lab: Lab, *told: StageCounters) -> None:
    board = lab.boards["a"]
    board.seq += 1
    said = Telemetry(
        seq=board.seq,
        boot=board.boot,
        mono_s=board.seq,
        cpu_fraction=0.1,
        memory_used_bytes=1,
        memory_bytes=2,
        stages=told,
    )
    board.say(topics.TELEMETRY, said, "a")
    await until(lambda: lab.coordinator.telemetry()["a"].seq == board.seq)


def test_stages_are_counted_by_what_their_workers_say(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        epoch = made.lab.coordinator.records()[0].plan.epoch
        await tell(made.lab, counters(epoch))
        labels = {"deployment": "tiny", "stage": "0", "device": "a"}
        expected = {
            "requests_total": 2, "prefill_steps_total": 3, "prefill_tokens_total": 30,
            "prefill_busy_seconds_total": 0.5, "decode_steps_total": 7, "decode_busy_seconds_total": 0.25,
            "drafts_sent_total": 9, "drafts_accepted_total": 4,
            "sent_bytes_total": 1000, "received_bytes_total": 900, "refused_frames_total": 0,
            "resident_memory_bytes": 5,
        }  # fmt: skip
        for name, value in expected.items():
            assert await reader.get(f"edgelam_stage_{name}", **labels) == value
        await tell(made.lab, counters(epoch, decode_steps=8, resident_bytes=0))
        assert await reader.get("edgelam_stage_decode_steps_total", **labels) == 8
        figures = await reader.figures()
        assert ("edgelam_stage_resident_memory_bytes", frozenset(labels.items())) not in figures, "not known is not 0"

    play(scenario)


def test_what_a_device_invents_makes_no_series(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        epoch = made.lab.coordinator.records()[0].plan.epoch
        before = len(await reader.figures())
        invented = [counters(epoch, deployment=f"d{n}") for n in range(30)]
        invented += [counters(epoch, stage=n + 1) for n in range(20)] + [counters(epoch + n + 1) for n in range(10)]
        await tell(made.lab, *invented)
        assert len(await reader.figures()) == before

    play(scenario)


def test_two_coordinators_in_one_process_count_for_themselves(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as lab:
            serving = serve.Serving(lab.coordinator, None, None)  # type: ignore[arg-type]
            one, other = (Metrics(lab.coordinator, serving) for _ in range(2))
            await one.watch(_nothing(), Watched()).__anext__()
            one._prompt_tokens.inc(5)
            assert await Reader(one).get("edgelam_prompt_tokens_total") == 5
            assert await Reader(other).get("edgelam_prompt_tokens_total") == 0

    asyncio.run(scenario())


async def _nothing() -> AsyncGenerator[dict[str, Any], None]:
    yield {"event": "status", "text": ""}


def test_the_page_is_guarded_and_typed_as_prometheus_wants_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as lab:
            serving = serve.Serving(lab.coordinator, None, None)  # type: ignore[arg-type]
            app = make_app(lab.coordinator, None, serving, None, "key")  # type: ignore[arg-type]

            def ask() -> None:
                inside = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)).get("/metrics")
                assert inside.status_code == 200
                assert inside.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
                assert parsed(inside.text)
                outside = TestClient(app, base_url="http://127.0.0.1", client=("10.0.0.9", 1))
                assert outside.get("/metrics").status_code == 401
                assert outside.get("/metrics", headers={"Authorization": "Bearer key"}).status_code == 200

            await asyncio.to_thread(ask)

    asyncio.run(scenario())


def test_every_name_is_documented_and_no_other(play: Any) -> None:
    async def scenario(made: Ring, reader: Reader) -> None:
        await tell(made.lab, counters(made.lab.coordinator.records()[0].plan.epoch))
        families = text_string_to_metric_families(await _page(reader.metrics))
        names = {
            family.name + ("_total" if family.type == "counter" else "")
            for family in families
            if family.name.startswith("edgelam_")
        }
        page = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
        assert set(re.findall(r"`(edgelam_[a-z_]+)", page)) == names

    play(scenario)
