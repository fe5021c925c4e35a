"""What the cache holds is listed with its size, and removed by that name only."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.build.pack import pack
from models.formats.checkpoint import open_checkpoint
from models.stored import remove, stored
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.errors import UsageError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a fetched model, one of a hub, and a pack of the first."""
    folder = tmp_path / "cache"
    checkpoint = folder / "models" / "tiny" / "tiny.gguf"
    checkpoint.parent.mkdir(parents=True)
    config = tiny_config()
    write_gguf(checkpoint, config, random_tensors(config))
    hub = folder / "models" / "hf" / "org--name" / "main"
    hub.mkdir(parents=True)
    (hub / "model.safetensors").write_bytes(bytes(1000))
    pack(open_checkpoint(checkpoint, folder), "int4", "f16", folder)
    return folder


def test_checkpoints_and_packs_are_listed_with_sizes_and_where_they_come_from(cache: Path) -> None:
    hub, tiny, packed = stored(cache)
    assert (hub.name, hub.kind, hub.size_bytes) == ("models/hf/org--name/main", "checkpoint", 1000)
    assert tiny.name == "models/tiny" and tiny.size_bytes == (cache / "models/tiny/tiny.gguf").stat().st_size
    assert (packed.kind, packed.of) == ("pack", "tiny.gguf")
    assert packed.size_bytes == sum(path.stat().st_size for path in (cache / packed.name).iterdir())


def test_what_is_removed_is_gone_and_packed_again_when_asked(cache: Path) -> None:
    *_, packed = stored(cache)
    assert remove(cache, packed.name) == packed
    assert packed not in stored(cache)
    assert not list((cache / "packs").iterdir())
    pack(open_checkpoint(cache / "models/tiny/tiny.gguf", cache), "int4", "f16", cache)
    assert stored(cache)[-1] == packed


@pytest.mark.parametrize("name", ["", ".", "..", "models", "packs", "models/../..", "/etc", "models/tiny/", "digests"])
def test_no_other_folder_can_be_removed(name: str, cache: Path) -> None:
    before = sorted(cache.rglob("*"))
    with pytest.raises(UsageError, match="not in the cache"):
        remove(cache, name)
    assert sorted(cache.rglob("*")) == before


def test_an_empty_cache_holds_nothing(tmp_path: Path) -> None:
    assert stored(tmp_path / "none") == []


def test_a_damaged_note_takes_a_name_and_nothing_else(cache: Path) -> None:
    for note in (cache / "digests").iterdir():
        note.write_bytes(b"{")
    assert [entry.of for entry in stored(cache)] == ["", "", ""]
