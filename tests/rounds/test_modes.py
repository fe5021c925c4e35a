"""Mode 'auto': split where boards can't hold the model, or where that is clearly faster by what they measured, on one
board or on several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.rounds import modes
from coordinator.rounds.bases import base_of
from coordinator.rounds.cutting import Cut
from coordinator.rounds.foretold import Rates, federated_s, rates_of, split_s
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.modes import chosen, settled_mode
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


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Device -> operations/s and bytes/s of its profile."""
    found: dict[str, tuple[float, float]] = {}
    monkeypatch.setattr(modes, "rates_of", lambda profile: Rates(*found.get(profile, (0.0, 0.0))))
    monkeypatch.setattr("coordinator.rounds.trunks.product_rate", lambda profile: found.get(profile, (0.0, 0.0))[0])
    monkeypatch.setattr("coordinator.rounds.trunks.link_rate", lambda profile: found.get(profile, (0.0, 0.0))[1])
    return found


class Fleet(Coordinator):
    def profiles(self) -> dict[str, Any]:
        return {info.device: info.device for info in self._infos}


def settled(infos: list[Any], base: Any, job: Job = JOB) -> tuple[str, str]:
    fleet: Any = Fleet(infos, {})
    found, because = settled_mode(fleet, job, base)
    return found.mode, because


def boards(*names: str, **changes: Any) -> list[Any]:
    return [info_of(name, data=("notes",), **changes) for name in names]


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
    infos, named = [*boards("a", "b"), info_of("nuc")], msgspec.structs.replace(JOB, trunk="nuc")
    assert settled(infos, base)[1].endswith("and of some it was not measured how fast they are")
    rates.update(a=(1e9, 1e8), b=(1e9, 1e8), nuc=(1e9, 1e8))
    mode, because = settled(infos, base, named)
    assert mode == "federated" and "federated: all boards with data can hold the model, and a round is" in because
    rates.update(a=(1e6, 1e10), b=(1e6, 1e10), nuc=(1e11, 1e10))
    mode, because = settled(infos, base, named)
    assert mode == "split" and "a round is foretold to take " in because and because.endswith(" split")


def test_it_is_a_pipeline_where_several_boards_are_clearly_faster(
    base: Any, rates: dict[str, tuple[float, float]]
) -> None:
    with_data = [f"pi{number}" for number in range(12)]
    rates.update(dict.fromkeys(with_data, (5e7, 1e10)), nuc=(1e9, 1e10), orin=(1e9, 1e10))
    infos = [*boards(*with_data), info_of("nuc"), info_of("orin")]
    mode, because = settled(infos, base)
    assert mode == "pipeline"
    assert all(f" {name}" in because for name in ("federated", "split", "pipeline")), "the time of each is told"
    job = msgspec.structs.replace(JOB, trunk="nuc")
    assert settled(infos, base, job)[0] == "split", "a board that is named has them"
    rates.update(orin=(1e7, 1e10))
    assert settled(infos, base)[0] == "split", "the other is too slow to be of use"


def test_what_is_not_clearly_faster_is_not_taken() -> None:
    assert chosen({"federated": 10.0, "split": 7.9, "pipeline": 7.0}) == "split"
    assert chosen({"federated": 10.0, "split": 8.1, "pipeline": 7.9}) == "pipeline"
    assert chosen({"federated": 10.0, "split": 8.1, "pipeline": 8.1}) == "federated"
    assert chosen({"split": 3.0, "pipeline": 2.0}) == "pipeline", "where no board has the memory for more"
    assert chosen({"split": None, "pipeline": None}) == "split"
    assert chosen({"federated": 10.0, "split": None, "pipeline": 1.0}) == "pipeline"


def test_no_job_is_looped_unasked(base: Any, rates: dict[str, tuple[float, float]]) -> None:
    rates.update(a=(1.0, 1.0), nuc=(1e12, 1e12), orin=(1e12, 1e12))
    infos = [*boards("a"), info_of("nuc", knows_looped=True), info_of("orin", knows_looped=True)]
    assert settled(infos, base)[0] in ("federated", "split", "pipeline")
    assert "looped" not in settled(infos, base)[1]


def blocks_of(base: Any, passes: int) -> float:
    """Operations of one batch through all blocks so many times, and of its way to the scores and back."""
    config, tokens = base.config, JOB.rounds.batch_rows * JOB.rounds.row_tokens
    kv = config.kv_heads * config.head_dim
    weights = config.hidden * (2 * config.heads * config.head_dim + 2 * kv + 3 * config.ffn)
    return 2.0 * passes * config.blocks * weights * tokens


def scores_of(base: Any) -> float:
    return 4.0 * base.config.hidden * base.config.vocabulary * JOB.rounds.batch_rows * JOB.rounds.row_tokens


def test_a_round_takes_what_the_slowest_or_the_trunk_takes(base: Any) -> None:
    rates = {"a": Rates(1e9, 1e15), "b": Rates(2e9, 1e15), "t": Rates(4e9, 1e15), "u": Rates(4e9, 1e15)}
    rates["c"] = Rates(0.0, 1e12)
    blocks, steps, ends = base.config.blocks, JOB.rounds.steps, ("a", "b")
    trunk = (Cut("t", 0, blocks),)
    apart = steps * (blocks_of(base, 2) + scores_of(base)) / 1e9
    assert federated_s(base, JOB, rates, ends) == pytest.approx(apart, rel=1e-3)
    twice = steps * (blocks_of(base, 3) + scores_of(base)) / 1e9
    assert federated_s(base, JOB, rates, ends, ("a",)) == pytest.approx(twice, rel=1e-3)
    together = steps * (2 * blocks_of(base, 2) / 4e9 + scores_of(base) / 1e9)
    assert split_s(base, JOB, rates, ends, trunk) == pytest.approx(together, rel=1e-3), "the trunk computes for both"
    slow = {**rates, "b": Rates(2e9, 1e3)}
    states = 4 * JOB.rounds.batch_rows * JOB.rounds.row_tokens * base.config.hidden
    assert split_s(base, JOB, slow, ends, trunk) == pytest.approx(together + steps * 3 * states / 1e3, rel=1e-2)
    late = {**rates, "t": Rates(4e9, 1e15, 2.0), "a": Rates(1e9, 1e15, 1.0)}
    assert split_s(base, JOB, late, ends, trunk) == pytest.approx(together + steps * 3 * (2.0 + 1.0), rel=1e-3)
    unknown = (Cut("t", 0, 1), Cut("c", 1, blocks))
    assert federated_s(base, JOB, rates, ("a", "c")) is None
    assert split_s(base, JOB, rates, ends, unknown) is None
    halves, many = (Cut("t", 0, blocks // 2), Cut("u", blocks // 2, blocks)), ("a", "b") * 20
    piped = steps * ((40 + 1) * blocks_of(base, 2) / 2 / 4e9 + scores_of(base) / 1e9)
    assert split_s(base, JOB, rates, many, halves) == pytest.approx(piped, rel=1e-3), "both work at the same time"


def test_rates_are_those_of_profiles() -> None:
    unknown: Any = SimpleNamespace(ceilings=None, modules=(), link=None)
    assert rates_of(None) == rates_of(unknown) == Rates(0.0, 0.0)
    known = profile_of(3.0)
    known.link = None
    assert rates_of(known).products == pytest.approx(3e9) and not rates_of(known).known


def test_a_file_may_say_auto_with_a_trunk(tmp_path: Path) -> None:
    from coordinator.rounds.jobfile import load_job

    path = tmp_path / "notes.toml"
    path.write_text('model = "m"\ndata = "notes"\nmode = "auto"\ntrunk = "nuc"\n')
    assert (load_job(path).mode, load_job(path).trunk) == ("auto", "nuc")
