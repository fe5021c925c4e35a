"""A profile that was changed by hand is found out; one that was only written otherwise is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hwprofiles import seal
from hwprofiles.profile import Profile, compact, encode, load, save
from hwprofiles.report import document
from tests.hwprofiles import examples
from wire.errors import CorruptData


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(examples.profile(), tmp_path / "pi5.json")
    return tmp_path / "pi5.json"


def test_a_kept_profile_is_sealed_and_read_as_it_was(path: Path) -> None:
    assert json.loads(path.read_bytes())["seal"].startswith("sha256:")
    assert load(path) == compact(examples.profile())
    assert document.load(path).boards[0].profile == load(path)


def test_indented_or_reordered_it_holds(path: Path) -> None:
    whole = json.loads(path.read_bytes())
    for text in (json.dumps(whole, indent=4), json.dumps(dict(reversed(whole.items())))):
        path.write_text(text)
        assert load(path) == compact(examples.profile())


def faster(whole: Any) -> None:
    samples = whole["modules"][0]["timings"][0]["samples"]
    samples["samples_s"] = [value / 10 for value in samples["samples_s"]]


def roomier(whole: Any) -> None:
    whole["memory"]["usable_bytes"] *= 4


def otherwise_sealed(whole: Any) -> None:
    whole["seal"] = "sha256:" + "0" * 64


@pytest.mark.parametrize("change", [faster, roomier, otherwise_sealed])
def test_a_changed_one_is_refused_and_kept(path: Path, change: Any) -> None:
    whole = json.loads(path.read_bytes())
    change(whole)
    path.write_text(json.dumps(whole))
    before = path.read_bytes()
    for read in (load, document.load):
        with pytest.raises(CorruptData, match=r"pi5\.json: .*changed after it was measured") as caught:
            read(path)
        assert caught.value.try_
    assert path.read_bytes() == before


def test_one_of_before_there_were_seals_is_taken(path: Path) -> None:
    path.write_bytes(encode(examples.profile()))
    assert load(path) == compact(examples.profile())


def test_what_a_later_version_adds_is_sealed_too(path: Path) -> None:
    data = seal.sealed(msgspec.json.encode({**msgspec.json.decode(encode(examples.profile())), "later": {"read": 5}}))
    assert not seal.broken(data)
    assert seal.broken(data.replace(b'"read":5', b'"read":6'))
    assert msgspec.json.decode(data, type=Profile) == compact(examples.profile())
