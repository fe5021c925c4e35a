"""Adapters by the names that people have for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.adapters import AdapterShelf, joined
from models.lora.serving import CONFIG, PROVENANCE, TENSORS, kept_at
from wire.errors import UsageError


def found(shelf: AdapterShelf, text: str) -> str:
    return asyncio.run(shelf.find(text))


def written(folder: Path, what: bytes = b"factors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text("{}")
    (folder / TENSORS).write_bytes(what)
    return folder


def test_a_job_has_the_adapter_of_its_last_round(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "jobs", tmp_path / "cache")
    (tmp_path / "jobs" / "notes").mkdir(parents=True)
    with pytest.raises(UsageError, match="no round is over"):
        found(shelf, "notes")
    written(tmp_path / "jobs" / "notes")
    first = found(shelf, "notes")
    assert found(shelf, "notes") == first == found(shelf, first)
    written(tmp_path / "jobs" / "notes", b"better ones")
    second = found(shelf, "notes")
    assert second != first
    assert (kept_at(first, tmp_path / "cache") / TENSORS).read_bytes() == b"factors", "what runs keeps what it had"


def test_a_folder_is_found_by_its_path_and_keeps_where_it_comes_from(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "jobs", tmp_path / "cache")
    folder = written(tmp_path / "here")
    plain = found(shelf, str(folder))
    (folder / PROVENANCE).write_text('{"base": "sha256:1"}')
    told = found(shelf, str(folder))
    assert told != plain and (kept_at(told, tmp_path / "cache") / PROVENANCE).exists()


@pytest.mark.parametrize("text", ["nothing", "../jobs", "0" * 32, "a\0b", "x" * 5000, "notes/../../etc"])
def test_what_is_neither_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    with pytest.raises(UsageError, match="no adapter"):
        found(AdapterShelf(tmp_path / "jobs", tmp_path / "cache"), text)


def test_of_too_many_the_earliest_are_left_out() -> None:
    ids = tuple(f"{number:032x}" for number in range(8))
    assert joined(ids, ("a" * 32,)) == (*ids[1:], "a" * 32)
    assert joined(ids, ids[:1]) == (*ids[1:], ids[0])
    assert joined((), ids[:2]) == ids[:2]
