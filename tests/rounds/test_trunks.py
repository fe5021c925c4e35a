"""Which board gets the blocks: the fastest that can hold them, or the one that the job names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.trunks import ends_of, keeps_all, product_rate, trunk_of
from hwprofiles.samples import Ceilings, Rate, Samples
from tests.hwprofiles.test_ceilings import weighed
from wire.messages import DeviceInfo, EngineInfo

JOB = Job(name="n", model="m", data="notes", mode="split", adapter=Adapter(rank=1), rounds=Rounds())
GB = 1 << 30


class Base:
    """1 GB for the blocks, and half as much for each board beside if all is kept; half for the ends."""

    def trunk_bytes(self, _job: Job, ends: int, remember: bool) -> int:
        return GB + (ends * GB // 2 if remember else 0)

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
    return SimpleNamespace(ceilings=ceilings, modules=())


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
    assert (chosen.device, chosen.because) == ("orin", because)
    assert chosen.unable == {
        "pi": "would take 1.5 GB of its 1.0 GB of memory",
        "bare": "no torch: not looked for",
        "gone": "offline",
        "past": "its software, 0.1.0, knows no split models",
    }


def test_where_nothing_was_measured_it_says_so() -> None:
    chosen = found(Coordinator([info_of("b"), info_of("a")], {}))
    assert chosen.device == "a" and "none has measured" in chosen.because


def test_a_board_that_the_job_names_is_it_or_nobody() -> None:
    coordinator = Coordinator([info_of("a"), info_of("b", GB // 2)], {"a": 5.0})
    assert found(coordinator, msgspec.structs.replace(JOB, trunk="a")).because == "the job names it"
    for name, why in (("b", "would take"), ("c", "not heard of")):
        chosen = found(coordinator, msgspec.structs.replace(JOB, trunk=name))
        assert chosen.device == "" and list(chosen.unable) == [name] and why in chosen.unable[name]


def test_who_has_ample_memory_keeps_what_gradients_need() -> None:
    coordinator: Any = Coordinator([info_of("a")], {})
    base: Any = Base()
    assert keeps_all(coordinator, JOB, base, "a", ("x", "y", "z"))
    assert not keeps_all(coordinator, JOB, base, "a", ("a", "x", "y", "z"))
    assert not keeps_all(coordinator, JOB, base, "nobody", ("x",))
    few = msgspec.structs.replace(JOB, rounds=Rounds(who="random", devices=2))
    assert ends_of(few, ("a", "b", "c")) == 2 and ends_of(JOB, ("a", "b", "c")) == 3


def test_rates_are_of_float32_and_nothing_where_there_are_none() -> None:
    assert product_rate(profile_of(3.0)) == pytest.approx(3e9)
    assert product_rate(None) is None
    virtual: Any = SimpleNamespace(ceilings=None, modules=(weighed(),))
    assert product_rate(virtual) == pytest.approx(160e9, rel=0.01), "what its blocks make"
    assert product_rate(SimpleNamespace(ceilings=None, modules=())) is None  # type: ignore[arg-type]
