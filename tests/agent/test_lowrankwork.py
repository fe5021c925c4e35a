"""Workers that say gradients by the last low-rank matrix: the same comes of it, for fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.lora.adapter import AdapterSpec, shapes  # noqa: E402
from tests.agent.test_splitwork import ENDS, STEPS, Bench, expected  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.training.split_models import Halves, llama  # noqa: E402
from wire.frames import Kind, Parcel  # noqa: E402
from wire.messages import SplitMeta  # noqa: E402

pytestmark = pytest.mark.torch

RANK = 2
SPEC = AdapterSpec(rank=RANK, alpha=4.0, matrices=("down",), seed=4, last_only=True)


class LowRankBench(Bench):
    """A language model with factors at the last matrix."""

    spec = SPEC

    def __init__(self, folder: Path, parts: Any, uplink: str = "lowrank", **options: Any) -> None:
        self.parts, self.doing = parts, {"uplink_grad": uplink}
        folder.mkdir(exist_ok=True)
        super().__init__(folder, **options)

    @staticmethod
    def model(folder: Path, cuts: tuple[int, ...]) -> tuple[Halves, dict[str, Any]]:
        packed, rng = packed_tiny(folder, "llama", "f32", "f32"), np.random.default_rng(1)
        shaped = shapes(packed.config, SPEC)
        begun = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shaped.items()}
        return llama(packed, folder, SPEC, ENDS, begun, cuts), begun

    def round(self) -> dict[str, int]:
        """Make it; gives the bytes of what each board with data sent."""
        for device in self.works:
            self.ask(device)
        self.through()
        found = self.updates()
        assert set(found) == {*self.segments, *ENDS}
        return {device: found[device][0].peer_sent_bytes for device in ENDS}


@pytest.mark.parametrize("parts", [("a",), ("b",), ("a", "b")])
def test_it_comes_to_the_same_for_fewer_bytes(parts: tuple[str, ...], tmp_path: Path) -> None:
    cut = LowRankBench(tmp_path / "cut", parts, "cut", held_out=0)
    short = LowRankBench(tmp_path / "lowrank", parts, held_out=0)
    long_bytes, short_bytes = cut.round(), short.round()
    np.testing.assert_allclose(short.factors(), cut.factors(), atol=1e-5)
    np.testing.assert_allclose(short.factors(), expected(short), atol=1e-5)
    width = short.halves.config.hidden
    for device in ENDS:
        states = long_bytes[device] / 2  # gradients by features are as long as states
        gradients = short_bytes[device] - states
        by_u, by_b = states * RANK / width, 4 * STEPS * width * RANK
        assert gradients == by_u * ("a" in parts) + by_b * ("b" in parts)
        assert short.updates()[device][0].loss == pytest.approx(cut.updates()[device][0].loss, rel=1e-5)
    if parts == ("a",):
        assert short.updates()["t"][0].peer_sent_bytes == cut.updates()["t"][0].peer_sent_bytes + 2 * 4 * width * RANK


@pytest.mark.parametrize("order", [("u", "t", "a", "n", "b"), ("a", "n", "b", "t", "u")])
def test_segments_without_factors_come_along_and_are_sent_no_gradients(order: tuple[str, ...], tmp_path: Path) -> None:
    one = LowRankBench(tmp_path / "one", ("a", "b"))
    one.round()
    several = LowRankBench(tmp_path / "several", ("a", "b"), cuts=(1, 3))
    gradients: list[Parcel] = []
    for device in order:
        several.ask(device)
        while True:
            for work in several.works.values():
                while work.runnable:
                    work.work(0.0)
            gradients += [parcel for _, parcel in several.sent if parcel.kind is Kind.GRADIENT]
            if not several.turn():
                break
    assert np.array_equal(several.factors(), one.factors())
    updates = several.updates()
    assert updates["t"][1] is None and updates["u"][1] is None and updates["n"][1] is not None
    assert all(updates[name][0].samples == 4 + 5 for name in several.segments)
    said = [(msgspec.json.decode(parcel.meta, type=SplitMeta).place, parcel.tensor is None) for parcel in gradients]
    for place, is_empty in ((None, False), (2, True), (1, True)):
        assert said.count((place, is_empty)) == len(ENDS) * STEPS
    assert len(said) == 3 * len(ENDS) * STEPS
    assert all(not work.live and not work.runnable and not work._waiting for work in several.works.values())


WRONG: dict[str, Any] = {
    "gradients are no numbers": lambda values: np.where(np.arange(len(values)) == 1, np.nan, values),
    "were due": lambda values: values[:-2],
    "too large to be added": lambda values: np.full_like(values, 3e38),
}


@pytest.mark.parametrize("words", sorted(WRONG))
def test_who_sends_gradients_that_can_t_be_is_named(words: str, tmp_path: Path) -> None:
    bench = LowRankBench(tmp_path, ("a", "b"))
    for device in bench.works:
        bench.ask(device)
    for _ in range(100):
        bench.turn_with("a", Kind.GRADIENT, WRONG[words])
        if bench.told:
            break
    bench.through()
    [error] = bench.errors()
    assert (error.code, error.device) == ("protocol", "a") and words in error.text


def test_a_gradient_without_numbers_is_none_of_a_board_with_data(tmp_path: Path) -> None:
    bench = LowRankBench(tmp_path, ("a", "b"), held_out=0)
    bench.ask("t")
    for place, words in ((None, "has no numbers"), (0, "was not asked for")):
        meta = SplitMeta(device="a", place=place, step=0)
        bench.give("t", Parcel(Kind.GRADIENT, 7, 5, 0, 0, None, msgspec.json.encode(meta)))
        bench.through()
        assert words in bench.works["t"].last_refusal and not bench.told


def test_what_the_trunk_says_wrong_is_told(tmp_path: Path) -> None:
    bench = LowRankBench(tmp_path, ("a", "b"), held_out=0)
    for device in bench.works:
        bench.ask(device)
    for _ in range(100):
        bench.turn_with("a", Kind.FEATURES, lambda values: values[:-1])
        if bench.told:
            break
    [error] = bench.errors()
    assert error.code == "protocol" and "were due" in error.text


def test_a_round_of_other_factors_is_refused(tmp_path: Path) -> None:
    bench = LowRankBench(tmp_path, ("a", "b"))
    wrong = {"block.0.up.a": (RANK, 4), "block.0.up.b": (4, RANK)}
    for device in ("a", "t"):
        bench.works[device]._model.shaped = wrong  # type: ignore[misc]
        bench.ask(device)
        bench.through()
        assert not bench.works[device].live
    said = {(error.code, error.device) for error in bench.errors()}
    assert said == {("engine", "a"), ("engine", "t")}
