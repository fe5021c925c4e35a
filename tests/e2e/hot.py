"""A site of boards that are slow enough to be told apart, answers on it, and what they see when a board gets hot."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from coordinator.inference.requests import GenerateRequest
from testbed import commands
from testbed.boards import BoardSpec
from testbed.site import CoordinatorProcess, until
from tests.e2e.noise import Trial
from tests.e2e.site import Site
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.errors import EdgelamError

SPEED: Final = 0.12
"""Of a core, so that three boards and all else have room on two."""

TOKENS: Final = 250
NOTICED_S: Final = 30.0
"""Three windows of two seconds, the one that the change fell into, and a second of telemetry each way; and as much
again on a machine that does other things too."""

HEALTHY_S: Final = 10.0
"""Five windows of work: enough for a board that does not keep its profile to be found slow."""


def write_model(folder: Path) -> str:
    """Blocks that take about two milliseconds on such a board: steps are long beside what surrounds them. Eleven of
    them are cut into 4, 4 and 3; and into 5, 5 and 1, where one board is three times as slow as the others."""
    config = tiny_config("llama", blocks=11, hidden=384, ffn=1024, heads=6, kv_heads=2, head_dim=64, max_context=512)
    return str(write_gguf(folder / "mid.gguf", config, random_tensors(config, 0), "F32"))


class Answers:
    """So many answers at once, one after the other, as long as this is open; `times` is when each token came."""

    def __init__(self, site: Site, model: str, streams: int = 1, **changes: Any) -> None:
        self._site = site
        fields = {
            "prompt": "hello world", "raw": True, "max_tokens": TOKENS, "context_tokens": 512, "ignore_stop": True,
            "boards_at_least": 3, "stall_timeout_s": 30.0,
        }  # fmt: skip
        self._request = GenerateRequest(model=model, **{**fields, **changes})
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(streams)]
        self.times: list[float] = []
        self.ends: list[dict[str, Any]] = []
        self.failed: list[BaseException] = []

    def __enter__(self) -> Answers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.failed, self.failed

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._site.client() as there:
                    for event in there.stream("/v1/generate", self._request):
                        assert event["event"] != "error", event
                        if event["event"] == "token":
                            self.times.append(time.monotonic())
                        elif event["event"] == "end":
                            self.ends.append(event)
        except BaseException as error:  # noqa: BLE001 - the test's own thread raises it
            self.failed.append(error)

    def rate(self, begin_s: float, end_s: float) -> float:
        """Tokens per second."""
        return sum(begin_s <= at < end_s for at in self.times) / (end_s - begin_s)


BOARDS: Final = tuple(BoardSpec(name=name, speed=SPEED, memory_bytes=1 << 30) for name in ("one", "two", "three"))


@contextmanager
def running(folder: Path, boards: tuple[BoardSpec, ...] = BOARDS) -> Iterator[Site]:
    coordinator = CoordinatorProcess(folder, f"hot-{os.urandom(3).hex()}", ("--verbose",))
    site = Site(folder, coordinator, coordinator.start())
    try:
        site.testbed = commands.up(commands.UpOptions(site=coordinator.site, boards=boards, state_dir=folder / "bed"))
        site.testbed.await_connected(print)
        yield site
    except BaseException:
        print(coordinator.log_end(60))
        raise
    finally:
        with contextlib.suppress(EdgelamError):
            print(*[notice["text"] for notice in site.get("/v1/notices")["notices"]], sep="\n")
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


def plan_of(site: Site) -> dict[str, Any]:
    [deployment] = site.get("/v1/status")["deployments"]
    plan: dict[str, Any] = deployment["plan"]
    return plan


def blocks_of(site: Site) -> dict[str, int]:
    return {stage["device"]: stage["end_block"] - stage["first_block"] for stage in plan_of(site)["stages"]}


def said(site: Site, code: str) -> list[str]:
    return [notice["text"] for notice in site.get("/v1/notices")["notices"] if notice["code"] == code]


def longest_share(site: Site) -> str:
    shares = blocks_of(site)
    return max(shares, key=lambda device: shares[device])


class Figures(NamedTuple):
    """Tokens per second before, while the hot board has its share, and after the move; and what the answers saw."""

    hot: str
    before: float
    slowed: float
    after: float
    pauses: list[dict[str, Any]]


def heated(trial: Trial, model: str, **asked: Any) -> Figures:
    """Let the board with the largest share get hot while answers run, and wait until what runs has moved."""
    site = trial.site
    with Answers(site, model, **asked) as answers:
        until(lambda: len(answers.times) > 100, 120.0, "tokens")
        time.sleep(HEALTHY_S)
        assert not said(site, "device-slow"), "all boards keep their profiles"
        shares, hot = blocks_of(site), longest_share(site)
        slowed_s = time.monotonic()
        trial.slow(hot, 0.3)
        until(lambda: bool(said(site, "device-slow")), NOTICED_S, "it is noticed")
        noticed_s = time.monotonic()
        until(lambda: bool(said(site, "deployment-moved")), 10.0, "it moves")
        moved_s = time.monotonic()
        time.sleep(9.0)
        end_s = time.monotonic()
        assert blocks_of(site)[hot] < shares[hot]
        [row] = [row for row in site.get("/v1/devices")["devices"] if row["device"] == hot]
        assert 0.1 < row["speed"] < 0.6 and hot in said(site, "device-slow")[0]
    assert all(len(end["token_ids"]) == TOKENS for end in answers.ends), "no token was lost or given twice"
    found = Figures(
        hot,
        answers.rate(slowed_s - 6.0, slowed_s),
        answers.rate(slowed_s + 1.0, noticed_s),
        answers.rate(moved_s + 4.0, end_s),
        [pause for end in answers.ends for pause in end["pauses"]],
    )
    pauses_s = [round(pause["pause_s"], 2) for pause in found.pauses]
    print(f"noticed after {noticed_s - slowed_s:.1f} s, moved after {moved_s - slowed_s:.1f} s, pauses {pauses_s} s")
    print(f"tokens/s: {found.before:.0f} before, {found.slowed:.0f} slowed, {found.after:.0f} moved")
    assert all(f"{hot} runs at 0." in pause["reason"] for pause in found.pauses)
    return found
