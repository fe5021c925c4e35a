"""Operations on a coordinator whose boards and models are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from coordinator.journal import DeployRequest
from coordinator.operations import Operations
from coordinator.turns import Hold
from models.graph import Graph
from tests.coordinator.memory_site import Lab, running, until
from tests.planning import boards
from wire import topics
from wire.errors import UsageError
from wire.messages import Desired, StageReport

Scenario = Callable[["Site"], Awaitable[None]]


def silent(_text: str) -> None:
    return


class Config(Struct, frozen=True):
    blocks: int = 2


class Packed(NamedTuple):
    graph: Graph
    config: Config
    files: dict[str, Path]
    adapters: None = None


class Checkpoint(NamedTuple):
    path: Path


class Prepared(NamedTuple):
    packed: Packed
    checkpoint: Checkpoint


class KitEntry(NamedTuple):
    key: str
    kind: str
    graphs: dict[int, bytes]
    standard: dict[int, bytes] = {}  # noqa: RUF012
    hidden: int = 8
    vocabulary: int = 32
    wire_dtype: str = "f16"
    runs: str = "tokens"


class FakeShelf:
    """Models of two blocks; each name has module keys of its own beside the ones that boards have measured."""

    def __init__(self, folder: Path, blocks: int = 2) -> None:
        self._folder = folder
        self._blocks = blocks
        self.kits = 0
        self.gone: set[str] = set()
        """Adapters that can't be had any more."""

    async def prepare(
        self, model: str, precision: str, progress: Callable[[str], None], adapters: tuple[str, ...] = ()
    ) -> Prepared:
        if self.gone.intersection(adapters):
            raise UsageError("it is gone")
        graph = msgspec.structs.replace(boards.graph(self._blocks), model=model)
        files = {}
        for module in graph.modules:
            for digest in module.artifacts:
                files[digest] = self._folder / digest.removeprefix("sha256:")
                files[digest].write_bytes(b"weights")
        return Prepared(Packed(graph, Config(), files), Checkpoint(self._folder / "tiny.gguf"))

    def kit_of(self, prepared: Prepared) -> list[KitEntry]:
        self.kits += 1
        keys = dict.fromkeys(module.profile_key for module in prepared.packed.graph.modules)
        return [KitEntry(key, "block", {1: key.encode()}) for key in keys]


class Site:
    def __init__(self, lab: Lab, folder: Path, blocks: int = 2) -> None:
        self.lab = lab
        self.shelf = FakeShelf(folder, blocks)
        self.operations = Operations(lab.coordinator, self.shelf)  # type: ignore[arg-type]
        self.said: list[str] = []

    async def measured(self, *names: str) -> None:
        await self.lab.with_boards(*names)
        for name in names:
            self.lab.boards[name].say(topics.PROFILE, msgspec.json.encode(boards.profile(name)), name)
        await until(lambda: set(names) <= set(self.lab.coordinator.profiles()), "profiles")

    def report(self, phase: str, detail: str = "") -> None:
        """All boards that have orders carry out the latest as far as `phase`."""
        for board in (board for board in self.lab.boards.values() if board.orders):
            desired: Desired = board.orders[-1]
            reports = [
                StageReport(deployment=o.deployment, epoch=o.epoch, stage=o.stage, phase=phase, detail=detail)  # type: ignore[arg-type]
                for o in desired.stages
            ]
            board.apply(desired.epoch, *reports)

    async def ordered(self, deployment: str) -> None:
        def came() -> bool:
            return any(o.deployment == deployment for b in self.lab.boards.values() for d in b.orders for o in d.stages)

        await until(came, f"orders of {deployment}")

    def ensure(self, model: str = "tiny", hold: Hold | None = None, **changes: Any) -> asyncio.Future[Any]:
        """What a request does first. `hold` stays; without one it is over when the deployment is there."""
        request, own = DeployRequest(model=model, **changes), hold or Hold()

        async def run() -> Any:
            try:
                return await self.operations.ensure(request, self.said.append, own)
            finally:
                if hold is None:
                    own.close()

        return asyncio.ensure_future(run())

    async def ensured(self, hold: Hold, **changes: Any) -> Any:
        """A request whose deployment is ready, and that goes on."""
        work = self.ensure(hold=hold, **changes)
        await self.carry_out(work)
        return (await work)[0]

    async def carry_out(self, work: asyncio.Future[Any]) -> None:
        """The boards load what they are told until the request has its deployment."""
        while not work.done():
            self.report("ready")
            await asyncio.sleep(0.01)


def played(folder: Path, scenario: Scenario) -> None:
    """A scenario on a site of its own."""

    async def whole() -> None:
        async with running(folder / "state") as lab:
            await scenario(Site(lab, folder))

    asyncio.run(whole())
