"""Models are packed once for all who ask, and what was cut off is not taken for whole."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.shelf import MOST_WITH_ADAPTERS, Shelf
from models.build import pack as pack_module
from models.cache import hash_file
from tests.coordinator.memory_site import until
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.errors import EdgelamError, Unreachable


def silent(_text: str) -> None:
    return


class SlowShelf(Shelf):
    """Packs when told to."""

    def __init__(self) -> None:
        super().__init__(Path("cache"))
        self.go = threading.Event()
        self.packed = 0
        self.failure: Exception | None = None

    def _prepare(self, model: str, precision: str, progress: Callable[[str], None], adapters: tuple[str, ...]) -> Any:
        self.go.wait(10)
        self.packed += 1
        if self.failure is not None:
            raise self.failure
        return f"{model} at {precision}"


def test_a_model_is_packed_once_for_all_who_ask_even_if_the_first_gives_up() -> None:
    async def scenario() -> None:
        shelf = SlowShelf()
        works = [asyncio.ensure_future(shelf.prepare("tiny", "int4", silent)) for _ in range(3)]
        await asyncio.sleep(0.02)
        works[0].cancel()
        await asyncio.wait(works[:1])
        shelf.go.set()
        assert await asyncio.gather(*works[1:]) == ["tiny at int4"] * 2
        assert await shelf.prepare("tiny", "int4", silent) == "tiny at int4"
        assert shelf.packed == 1

    asyncio.run(scenario())


def test_a_model_that_could_not_be_packed_is_tried_again_when_asked_again() -> None:
    async def scenario() -> None:
        shelf = SlowShelf()
        shelf.go.set()
        shelf.failure = EdgelamError("no space")
        for _ in range(2):
            with pytest.raises(EdgelamError, match="no space"):
                await shelf.prepare("tiny", "int4", silent)
        assert shelf.packed == 2 and not shelf._under_way and not shelf.prepared()

    asyncio.run(scenario())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint each of whose files takes a moment to pack."""
    config = tiny_config(blocks=6)
    write_gguf(tmp_path / "tiny.gguf", config, random_tensors(config))
    quick = pack_module.module_tensors

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return quick(*arguments)

    monkeypatch.setattr(pack_module, "module_tensors", slow)
    return tmp_path / "tiny.gguf"


def test_packing_that_is_ended_leaves_nothing_that_is_taken_for_whole(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def packed() -> list[Path]:
        return sorted((cache / "packs").glob("*/[!.]*"))

    async def ended() -> None:
        shelf = Shelf(cache)
        work = asyncio.ensure_future(shelf.prepare(str(tiny), "int4", silent))
        await until(lambda: bool(packed()), "the first file")
        await shelf.close()
        with pytest.raises(Unreachable, match="ending"):
            await work

    async def whole() -> int:
        prepared = await Shelf(cache).prepare(str(tiny), "int4", silent)
        for digest, path in prepared.packed.files.items():
            assert hash_file(path) == digest
        return len(prepared.packed.files)

    asyncio.run(ended())
    before = len(packed())
    assert not list((cache / "packs").glob("*/index.json")) and not list((cache / "packs").glob("*/.*"))
    assert before < asyncio.run(whole())


def test_work_that_can_not_be_ended_does_not_hold_up_the_end() -> None:
    async def scenario() -> None:
        shelf = SlowShelf()
        work = asyncio.ensure_future(shelf.prepare("tiny", "int4", silent))
        await asyncio.sleep(0.02)
        await shelf.close()
        work.cancel()

    started_s = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - started_s < 6, "SlowShelf takes 10 s"


def test_of_a_model_with_adapters_a_few_sets_are_kept_ready() -> None:
    async def scenario() -> None:
        shelf = SlowShelf()
        shelf.go.set()
        await shelf.prepare("tiny", "int4", silent)
        for number in range(MOST_WITH_ADAPTERS + 2):
            await shelf.prepare("tiny", "int4", silent, (f"{number:032x}",))
        assert len(shelf.prepared()) == MOST_WITH_ADAPTERS + 1
        packed = shelf.packed
        await shelf.prepare("tiny", "int4", silent)
        assert shelf.packed == packed, "the base stays"

    asyncio.run(scenario())
