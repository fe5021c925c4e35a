"""Which board gets the blocks: the fastest that can hold them, or the one that the job names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.rounds.cutting import Cut
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.trunks import ends_of, keeps_all, product_rate, trunk_of, where_text
from hwprofiles.samples import Ceilings, Rate, Samples
from models.families.config import LlamaConfig
from tests.hwprofiles.test_ceilings import weighed
from wire.messages import DeviceInfo, EngineInfo

JOB = Job(name="n", model="m", data="notes", mode="split", adapter=Adapter(rank=1), rounds=Rounds())
GB = 1 << 30


class Base:
    """1 GB for the blocks, and half as much for each board beside if all is kept; half for the ends."""

    config = LlamaConfig(
        family="llama", hidden=64, blocks=4, heads=4, kv_heads=4, head_dim=16, ffn=96, vocabulary=100,
        rope_base=1e4, rope_interleaved=False, rms_eps=1e-5,
    )  # fmt: skip

    def trunk_bytes(self, _job: Job, ends: int, remember: bool, blocks: int = 4) -> int:
        return blocks * GB // 4 + (ends * GB // 2 if remember else 0)

    def ends_bytes(self, _job: Job) -> int:
        return GB // 2


def info_of(name: str, memory_bytes: int = 4 * GB, **changes: Any) -> DeviceInfo:
    info = DeviceInfo(
        device=name, boot="1", software="0.1.0", board="b", arch="x86_64", os="Linux", python="3.11", cores=4.0,
        cores_because="no limit", memory_bytes=memory_bytes, memory_because="total",
        engines=(EngineInfo(name="torch", version="2.9"),), knows_split=True,
    )  # fmt: skip
    return msgspec.structs.replace(info, **changes)


def profile_of(gflops: float) -> Any:
    samples = Samples(samples_s=(1.0, 1.0, 1.0), warmup=1, stopped_because="", valid=True)
    amounts = {"f32": int(gflops * 1e9), "int4": 10**15}
    rates = tuple(Rate(what=what, amount=amount, samples=samples) for what, amount in amounts.items())
    ceilings = Ceilings(threads=1, memory=(), array_bytes=1, cache_bytes=0, products=rates, engine="e")
    return SimpleNamespace(ceilings=ceilings, modules=(), link=None)


class Coordinator:
    def __init__(self, infos: list[DeviceInfo], rates: dict[str, float], offline: tuple[str, ...] = ()) -> None:
        self._infos, self._rates, self._offline = infos, rates, offline

    def devices(self) -> list[Any]:
        return [SimpleNamespace(name=info.device, info=info) for info in self._infos]

    def is_online(self, name: str) -> bool:
        return name not in self._offline

    def profiles(self) -> dict[str, Any]:
        return {name: profile_of(rate) for name, rate in self._rates.items()}


def found(coordinator: Coordinator, job: Job = JOB, with_data: tuple[str, ...] = ("pi",)) -> Any:
    return trunk_of(coordinator, job, Base(), with_data)  # type: ignore[arg-type]


def test_the_fastest_that_can_hold_the_blocks_gets_them() -> None:
    infos = [info_of("pi", GB), info_of("nuc"), info_of("old"), info_of("orin"), info_of("bare", engines=()),
             info_of("gone"), info_of("past", knows_split=False)]  # fmt: skip
    rates = {"pi": 900.0, "nuc": 40.0, "orin": 90.5, "gone": 500.0}
    chosen = found(Coordinator(infos, rates, offline=("gone",)))
    because = "multiplies fastest of 3 that can hold the blocks: 90.5 GFLOP/s"
    assert (chosen.cuts, chosen.because) == ((Cut("orin", 0, 4),), because)
    assert where_text(chosen.cuts, because) == f"the blocks are on orin: {because}"
    assert chosen.unable == {
        "bare": "no torch: not looked for",
        "gone": "offline",
        "past": "its software, 0.1.0, knows no split models",
    }


def test_where_nothing_was_measured_it_says_so() -> None:
    chosen = found(Coordinator([info_of("b"), info_of("a")], {}))
    assert chosen.cuts == (Cut("a", 0, 4),) and "none has measured" in chosen.because


def test_a_board_that_the_job_names_is_it_or_nobody() -> None:
    coordinator = Coordinator([info_of("a"), info_of("b", GB // 2)], {"a": 5.0})
    assert found(coordinator, msgspec.structs.replace(JOB, trunk="a")).because == "the job names it"
    for name, why in (("b", "has memory for 2 of 4 blocks"), ("c", "not heard of")):
        chosen = found(coordinator, msgspec.structs.replace(JOB, trunk=name))
        assert not chosen.cuts and list(chosen.unable) == [name] and why in chosen.unable[name]


def test_what_no_board_can_hold_is_cut_among_as_few_as_can() -> None:
    infos = [info_of("a", 3 * GB // 4), info_of("b", GB // 2), info_of("c", GB // 2), info_of("d", GB // 5)]
    chosen = found(Coordinator(infos, {"b": 9.0, "a": 2.0, "c": 1.0, "d": 99.0}))
    assert chosen.cuts == (Cut("a", 0, 2), Cut("b", 2, 4))
    assert chosen.because == "of 3 that can have some; GFLOP/s: 2, 9"
    assert chosen.unable == {"d": "would take 256.0 MB of its 204.8 MB of memory for one block"}
    assert not found(Coordinator(infos[1:2], {})).cuts


def test_a_pipeline_has_two_boards_at_least_and_more_if_that_is_faster() -> None:
    pipeline = msgspec.structs.replace(JOB, mode="pipeline")
    coordinator = Coordinator([info_of(name) for name in ("a", "b", "c")], {"a": 9.0, "b": 9.0, "c": 8.0})
    assert [one.device for one in found(coordinator, pipeline).cuts] == ["a", "b"], "one board sends: nothing overlaps"
    many = found(coordinator, pipeline, ("w", "x", "y", "z"))
    assert [(one.device, one.blocks) for one in many.cuts] == [("a", 2), ("b", 2)], "four blocks: two at a time"
    named = found(coordinator, msgspec.structs.replace(pipeline, trunk=("c", "a")))
    assert (named.cuts, named.because) == ((Cut("c", 0, 2), Cut("a", 2, 4)), "the job names them")
    assert not found(Coordinator([info_of("a")], {}), pipeline).cuts


def test_who_was_passed_over_has_blocks_only_where_others_can_t() -> None:
    coordinator: Any = Coordinator([info_of("a"), info_of("b")], {"a": 9.0, "b": 1.0})
    base: Any = Base()
    assert trunk_of(coordinator, JOB, base, (), ("a",)).cuts[0].device == "b"
    assert trunk_of(coordinator, JOB, base, (), ("a", "b")).cuts[0].device == "a"


def test_who_has_ample_memory_keeps_what_gradients_need() -> None:
    coordinator: Any = Coordinator([info_of("a")], {})
    base: Any = Base()
    assert keeps_all(coordinator, JOB, base, Cut("a", 0, 4), ("x", "y", "z"))
    assert not keeps_all(coordinator, JOB, base, Cut("a", 0, 4), ("a", "x", "y", "z"))
    assert not keeps_all(coordinator, JOB, base, Cut("nobody", 0, 4), ("x",))
    few = msgspec.structs.replace(JOB, rounds=Rounds(who="random", devices=2))
    assert ends_of(few, ("a", "b", "c")) == 2 and ends_of(JOB, ("a", "b", "c")) == 3
    scheduled = msgspec.structs.replace(JOB, rounds=Rounds(who="scheduled", delay_s=1.0))
    assert ends_of(scheduled, ("a", "b", "c")) == 3, "all of them, in some round"


def test_rates_are_of_float32_and_nothing_where_there_are_none() -> None:
    assert product_rate(profile_of(3.0)) == pytest.approx(3e9)
    assert product_rate(None) is None
    virtual: Any = SimpleNamespace(ceilings=None, modules=(weighed(),))
    assert product_rate(virtual) == pytest.approx(160e9, rel=0.01), "what its blocks make"
    assert product_rate(SimpleNamespace(ceilings=None, modules=())) is None  # type: ignore[arg-type]
