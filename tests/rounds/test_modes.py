"""Mode 'auto': split where boards can't hold the model, or where that is clearly faster by what they measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.rounds import modes
from coordinator.rounds.bases import base_of
from coordinator.rounds.cutting import Cut
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.modes import federated_s, settled_mode, split_s
from coordinator.shelf import Prepared
from models.text import Tokenizer
from tests.models.stages import packed_tiny, tiny_checkpoint
from tests.rounds.test_trunks import Coordinator, info_of, profile_of

JOB = Job(name="n", model="tiny", data="notes", mode="auto", precision="f32", adapter=Adapter(rank=2), rounds=Rounds())
GB = 1 << 30
SMALL = 1 << 28


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = tiny_checkpoint(folder, as_gguf=True)
    packed = packed_tiny(folder, precision="f32", as_gguf=True)
    return base_of(Prepared("tiny", checkpoint, packed, Tokenizer.from_checkpoint(checkpoint)), JOB)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Device -> operations/s and bytes/s of its profile."""
    found: dict[str, tuple[float, float]] = {}
    monkeypatch.setattr(modes, "_rates", lambda profile: found.get(profile, (0.0, 0.0)))
    return found


class Fleet(Coordinator):
    def profiles(self) -> dict[str, Any]:
        return {info.device: info.device for info in self._infos}


def settled(infos: list[Any], base: Any, job: Job = JOB) -> tuple[str, str]:
    fleet: Any = Fleet(infos, {})
    fleet.profiles_of_trunks = None
    found, because = settled_mode(fleet, job, base)
    return found.mode, because


def boards(*names: str, **changes: Any) -> list[Any]:
    return [info_of(name, data=("notes",), **changes) for name in names]


@pytest.fixture(autouse=True)
def no_trunk_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.rounds.trunks.product_rate", lambda _profile: 1.0)
    monkeypatch.setattr("coordinator.rounds.trunks.link_rate", lambda _profile: None)


def test_a_job_that_says_its_mode_has_it(base: Any) -> None:
    for mode in ("federated", "split"):
        assert settled(boards("a"), base, msgspec.structs.replace(JOB, mode=mode)) == (mode, "")  # type: ignore[arg-type]


def test_what_boards_can_t_hold_is_split(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_bytes = base.peak_bytes(JOB, "pi", 1, remember=False)
    monkeypatch.setattr(type(base), "ends_bytes", lambda *_: whole_bytes // 2)
    infos = [*boards("nuc"), *boards("pi", memory_bytes=whole_bytes - 1)]
    mode, because = settled(infos, base)
    assert mode == "split" and because.startswith("split: 1 of 2 boards with data can't hold the model (pi would take")


def test_what_does_not_go_with_it_is_not_split(base: Any) -> None:
    shared = msgspec.structs.replace(JOB, rounds=Rounds(medium="shared"))
    mode, because = settled(boards("a"), base, shared)
    assert mode == "federated" and because.startswith("federated: rounds.medium: 'shared' means nothing")
    secure = msgspec.structs.replace(JOB, secure=True, rounds=Rounds(at_least=3))
    assert settled(boards("a"), base, secure)[1].startswith("federated: secure: not with mode = 'split'")
    assert settled(boards("a", knows_split=False), base) == ("federated", "federated: no boards can have the blocks")


def test_where_all_can_hold_it_the_times_decide(base: Any, rates: dict[str, tuple[float, float]]) -> None:
    infos = [*boards("a", "b"), info_of("nuc")]
    assert settled(infos, base)[1].endswith("and of some it was not measured how fast they are")
    rates.update(a=(1e9, 1e8), b=(1e9, 1e8), nuc=(1e9, 1e8))
    mode, because = settled(infos, base, msgspec.structs.replace(JOB, trunk="nuc"))
    assert mode == "federated" and "federated: all boards with data can hold the model, and a round is" in because
    rates.update(a=(1e6, 1e10), b=(1e6, 1e10), nuc=(1e11, 1e10))
    mode, because = settled(infos, base, msgspec.structs.replace(JOB, trunk="nuc"))
    assert mode == "split" and because.startswith("split: a round is foretold to take ")


def test_a_round_takes_what_the_slowest_or_the_trunk_takes(base: Any, rates: dict[str, tuple[float, float]]) -> None:
    profiles: Any = {name: name for name in ("a", "b", "t")}
    rates.update(a=(1e9, 1e12), b=(2e9, 1e12), t=(4e9, 1e12))
    blocks = base.config.blocks
    trunk = (Cut("t", 0, blocks),)
    apart_s, together_s = federated_s(base, JOB, profiles, ("a", "b")), split_s(base, JOB, profiles, ("a", "b"), trunk)
    assert apart_s is not None and together_s is not None
    assert together_s == pytest.approx(apart_s * 2 / 4, rel=0.01), "the trunk computes for both, four times as fast"
    rates.update(b=(2e9, 1e3))
    slow_s = split_s(base, JOB, profiles, ("a", "b"), trunk)
    assert slow_s is not None and slow_s > 100 * together_s
    unknown = (Cut("t", 0, 1), Cut("c", 1, blocks))
    assert federated_s(base, JOB, profiles, ("a", "c")) is None
    assert split_s(base, JOB, profiles, ("a", "b"), unknown) is None
    rates.update(b=(2e9, 1e12), u=(4e9, 1e12))
    halves = (Cut("t", 0, blocks // 2), Cut("u", blocks // 2, blocks))
    many = ("a", "b") * 20
    whole_s, halves_s = (
        split_s(base, JOB, profiles, many, trunk),
        split_s(base, JOB, {**profiles, "u": "u"}, many, halves),
    )
    assert whole_s is not None and halves_s is not None
    assert halves_s == pytest.approx(whole_s / 2, rel=0.05), "both work at the same time"


def test_rates_are_those_of_profiles() -> None:
    unknown: Any = SimpleNamespace(ceilings=None, modules=(), link=None)
    assert modes._rates(None) == (0.0, 0.0) and modes._rates(unknown) == (0.0, 0.0)
    known = profile_of(3.0)
    known.link = None
    assert modes._rates(known)[0] == pytest.approx(3e9)


def test_a_file_may_say_auto_with_a_trunk(tmp_path: Path) -> None:
    from coordinator.rounds.jobfile import load_job

    path = tmp_path / "notes.toml"
    path.write_text('model = "m"\ndata = "notes"\nmode = "auto"\ntrunk = "nuc"\n')
    assert (load_job(path).mode, load_job(path).trunk) == ("auto", "nuc")
