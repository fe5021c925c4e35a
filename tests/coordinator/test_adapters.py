"""Adapters by the names that people have for them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coordinator import adapters as adapters_module
from coordinator.adapters import AdapterShelf, alike, answers
from coordinator.commands.common import adapter_name
from coordinator.journal import DeployRequest
from models.lora.serving import CONFIG, PROVENANCE, TENSORS, keep, kept_at
from wire.errors import CorruptData, UsageError


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
    assert second != first and shelf.superseded == {first}
    assert (kept_at(first, tmp_path / "cache") / TENSORS).read_bytes() == b"factors", "what runs keeps what it had"


def test_a_folder_is_found_by_its_path_and_keeps_where_it_comes_from(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "jobs", tmp_path / "cache")
    folder = written(tmp_path / "here")
    plain = found(shelf, str(folder))
    (folder / PROVENANCE).write_text('{"base": "sha256:1"}')
    told = found(shelf, str(folder))
    assert told != plain and (kept_at(told, tmp_path / "cache") / PROVENANCE).exists()


def test_the_same_factors_are_the_same_adapter_whatever_else_became_of_the_job(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "jobs", tmp_path / "cache")
    folder = written(tmp_path / "jobs" / "notes")
    (folder / PROVENANCE).write_text('{"base": "sha256:1", "held_out_loss": [4.0]}')
    first = found(shelf, "notes")
    (folder / PROVENANCE).write_text('{"base": "sha256:1", "held_out_loss": [4.0, 3.5]}')
    assert found(shelf, "notes") == first and not shelf.superseded
    (folder / PROVENANCE).write_text("no json")
    with pytest.raises(CorruptData, match="provenance"):
        found(shelf, "notes")


def test_what_nobody_wrote_is_not_read_again_unless_its_copy_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    plain = adapters_module.keep
    monkeypatch.setattr(adapters_module, "keep", lambda *given: kept.append(given) or plain(*given))
    shelf = AdapterShelf(tmp_path / "jobs", tmp_path / "cache")
    written(tmp_path / "jobs" / "notes")
    first = found(shelf, "notes")
    assert found(shelf, "notes") == first and len(kept) == 1
    (kept_at(first, tmp_path / "cache") / TENSORS).unlink()
    assert found(shelf, "notes") == first and len(kept) == 2


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    folder, cache = written(tmp_path / "here"), tmp_path / "cache"
    adapter = keep(folder, cache)
    (kept_at(adapter, cache) / TENSORS).write_bytes(b"cut")
    assert keep(folder, cache) == adapter and (kept_at(adapter, cache) / TENSORS).read_bytes() == b"factors"


def test_a_name_is_a_job_s_and_a_path_is_a_folder_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "notes")
    assert adapter_name("notes") == "notes" and adapter_name("") == ""
    assert adapter_name("./notes") == str(tmp_path / "notes") == adapter_name(str(tmp_path / "notes"))
    assert adapter_name("./nothing") == str(tmp_path / "nothing"), "the coordinator says that it is not there"


def test_what_was_deployed_answers_those_who_want_less() -> None:
    both, one, none = (DeployRequest(model="m", adapters=ids) for ids in (("1" * 32, "2" * 32), ("1" * 32,), ()))
    assert answers(both, one) and answers(both, none) and answers(one, none) and not answers(one, both)
    other = DeployRequest(model="m", context_tokens=99)
    assert alike(both, none) and not alike(both, other) and not answers(both, other)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "here")
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)
    with pytest.raises(UsageError, match="no file"):
        keep(folder, tmp_path / "cache")


@pytest.mark.parametrize("text", ["nothing", "../jobs", "0" * 32, "a\0b", "x" * 5000, "notes/../../etc"])
def test_what_is_neither_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    with pytest.raises(UsageError, match="no adapter"):
        found(AdapterShelf(tmp_path / "jobs", tmp_path / "cache"), text)
