"""Names of models: what they mean, and what is said when they mean nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.cache import cache_dir
from models.catalog import CATALOG, entries, find, hub_name, is_cached, resolve
from wire.errors import UsageError


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("EDGELAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/edgelam")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_dir() == Path("/var/x/edgelam")
    monkeypatch.setenv("EDGELAM_CACHE", "~/models")
    assert cache_dir() == Path("/home/someone/models")


def test_every_entry_is_complete_and_no_name_is_used_twice() -> None:
    names = [name for entry in entries() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    for entry in CATALOG:
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in (entry.archive_sha256, entry.file_sha256))
        assert entry.licence and entry.package_licence and entry.version in entry.source


def test_a_name_or_an_alias_in_any_case_finds_the_entry() -> None:
    assert find("smollm2") is find("SmolLM2-135M-Instruct") is CATALOG[0]
    assert find("smollm3") is None


def test_a_model_that_is_not_fetched_yet_says_the_command(tmp_path: Path) -> None:
    for name in ("smollm2", "hf:owner/some-model@v2"):
        with pytest.raises(UsageError, match="not in the cache") as caught:
            resolve(name, tmp_path)
        assert caught.value.try_ == f"edgelam model fetch {name}"


def test_a_file_of_another_size_is_not_the_model(tmp_path: Path) -> None:
    entry = CATALOG[0]
    entry.path(tmp_path).parent.mkdir(parents=True)
    entry.path(tmp_path).write_bytes(b"half")
    assert not is_cached(entry, tmp_path)
    with pytest.raises(UsageError, match="not in the cache"):
        resolve(entry.name, tmp_path)


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve(str(tmp_path / "a.gguf"), tmp_path) == tmp_path / "a.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert resolve("./smollm2", tmp_path) == Path("smollm2")
    with pytest.raises(UsageError, match="not in the cache"):
        resolve("smollm2", tmp_path)


def test_a_misspelt_name_gets_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'smolm2'") as caught:
        resolve("smolm2", tmp_path)
    assert "did you mean smollm2" in caught.value.try_


def test_an_unknown_name_gets_the_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'xyzzy'") as caught:
        resolve("xyzzy", tmp_path)
    assert all(entry.name in caught.value.try_ for entry in CATALOG)


def test_a_path_that_is_not_there_is_said_to_be_a_path(tmp_path: Path) -> None:
    for name in ("/no/where", "model.gguf", "no\0thing.gguf"):
        with pytest.raises(UsageError, match="no such file"):
            resolve(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["hf:", "hf:one", "hf:../x", "hf:a/..", "hf:a/b/c", "hf:a/b@", "hf:a/b@../x", "hf:a/b c"]
)
def test_a_repository_name_cannot_leave_the_cache(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a repository"):
        resolve(name, tmp_path)


def test_a_repository_has_a_folder_for_each_revision(tmp_path: Path) -> None:
    main, tagged = hub_name("hf:Owner/Model-1.5"), hub_name("hf:Owner/Model-1.5@v1.0")
    assert (main.revision, tagged.revision) == ("main", "v1.0")
    assert main.folder(tmp_path) != tagged.folder(tmp_path)
    tagged.folder(tmp_path).mkdir(parents=True)
    assert resolve("hf:Owner/Model-1.5@v1.0", tmp_path) == tagged.folder(tmp_path)
