"""Factors that stay on a board: a round that is done again begins with the same, and what is lost is not made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.workers.own import OwnFactors  # noqa: E402
from agent.workers.roundwork import RoundWork  # noqa: E402
from agent.workers.stretch import Stretch  # noqa: E402
from models.lora.adapter import AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.training.samples import Row, Split  # noqa: E402
from tests.agent.test_roundwork import ORDER, REPLY, SITE, TASK  # noqa: E402
from tests.agent.training_fakes import Delivery, Sender  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.training.test_llama import stage  # noqa: E402
from wire.errors import CorruptData  # noqa: E402
from wire.frames import Kind, Parcel, Tensor  # noqa: E402
from wire.messages import InboxAddress, RoundMeta, StageError, UpdateMeta  # noqa: E402

pytestmark = pytest.mark.torch

SHAPED = {"block.0.q.a": (2, 3), "block.0.q.b": (4, 2)}
SPEC = AdapterSpec(rank=2, alpha=4.0, matrices=("q", "v"), seed=3)


def b_of(value: float) -> dict[str, Any]:
    return {"block.0.q.a": np.zeros((2, 3), np.float32), "block.0.q.b": np.full((4, 2), value, np.float32)}


def own_in(folder: Path, epoch: int = 7) -> OwnFactors:
    return OwnFactors(folder, epoch, SHAPED, lambda factors: {"told": str(sorted(factors)).encode()})


def values(own: OwnFactors, after: int) -> list[float]:
    return sorted(set(own.after(after)["block.0.q.b"].flatten().tolist()))


def test_it_begins_with_zeros_and_has_what_a_round_made_after_a_restart(tmp_path: Path) -> None:
    assert values(own_in(tmp_path), -1) == [0.0]
    own_in(tmp_path).keep(0, -1, b_of(1.5))
    assert values(own_in(tmp_path), 0) == [1.5] and values(own_in(tmp_path), -1) == [0.0]


def test_what_the_last_round_began_with_is_there_until_another_begins_with_something_later(tmp_path: Path) -> None:
    own = own_in(tmp_path)
    own.keep(0, -1, b_of(1.0))
    own.keep(1, 0, b_of(2.0))
    own.keep(1, 0, b_of(2.0))
    assert (values(own, 0), values(own, 1)) == ([1.0], [2.0]), "round 1 may be asked for again"
    own.keep(2, 0, b_of(3.0))
    assert (values(own, 0), values(own, 2)) == ([1.0], [3.0]), "round 1 did not count"
    own.keep(4, 2, b_of(4.0))
    assert len(list(tmp_path.glob("b-*"))) == 2


def test_another_job_of_the_name_begins_anew(tmp_path: Path) -> None:
    own_in(tmp_path).keep(0, -1, b_of(1.0))
    with pytest.raises(CorruptData, match="lost"):
        own_in(tmp_path, epoch=8).after(0)
    own_in(tmp_path, epoch=8).keep(0, -1, b_of(2.0))
    assert [path.name for path in tmp_path.glob("b-*")] == ["b-8-0.safetensors"]


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "of another shape"])
def test_what_is_damaged_is_said_and_not_taken_for_zeros(damage: str, tmp_path: Path) -> None:
    own = own_in(tmp_path)
    own.keep(3, -1, b_of(1.0))
    path = tmp_path / "b-7-3.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-4], "changed": data[:-1] + b"\1"}.get(damage, data))
    if damage == "gone":
        path.unlink()
    if damage == "of another shape":
        own = OwnFactors(tmp_path, 7, {"block.0.q.b": (4, 3)}, lambda _: {})
    with pytest.raises(CorruptData, match="as round 3 made them, are lost"):
        own.after(3)


class Board:
    """A worker of a small model with rows, over a folder that outlives it."""

    def __init__(self, folder: Path, begins: str) -> None:
        packed = packed_tiny(folder)
        self.shaped = shapes(packed.config, SPEC)
        self.start = initial(packed.config, SPEC)
        task = msgspec.structs.replace(TASK, begins=begins, rank=2, alpha=4.0, matrices=("q", "v"), seed=3)
        rng = np.random.default_rng(5)
        rows = tuple(Row(rng.integers(0, packed.graph.vocabulary, 4 + number), 1) for number in range(5))
        own = OwnFactors(folder / "own", 7, self.shaped, lambda _: {})
        self.stage = stage(packed, folder, 0, packed.graph.blocks, self.start, SPEC)
        self.own = own if begins == "own-b" else None
        self.shaped_rows = Split(rows[1:], rows[:1])
        model = type("Model", (), {
            "stage": self.stage, "shaped": self.shaped, "rows": self.shaped_rows, "bad_rows": 0, "fingerprint": "f",
            "ledger": None, "own": self.own,
        })  # fmt: skip
        self.sent: list[tuple[str, Parcel]] = []
        order = msgspec.structs.replace(ORDER, training=task)
        self.work = RoundWork(order, model(), Sender(self.sent), lambda _: None, Stretch(1.0, 1), SITE, "pi4")  # type: ignore[arg-type]

    def ask(self, number: int, vector: Any, parts: tuple[str, ...], own: int = -1, train: bool = True) -> Parcel:
        meta = RoundMeta(reply=InboxAddress(topic=REPLY), round=number, parts=parts, own=own, train=train)  # type: ignore[arg-type]
        tensor = None if vector is None else Tensor.of(vector)
        parcel = Parcel(Kind.ROUND, 7, number * 10 + own + 2, 0, 0, tensor, msgspec.json.encode(meta))
        self.work.accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]
        while self.work.work(0.0):
            pass
        return self.sent[-1][1]


def told(parcel: Parcel) -> UpdateMeta:
    assert parcel.kind is Kind.UPDATE, parcel.meta
    return msgspec.json.decode(parcel.meta, type=UpdateMeta)


def test_a_round_that_is_done_again_after_a_kill_comes_to_the_same_and_no_step_is_made_twice(tmp_path: Path) -> None:
    board = Board(tmp_path, "own-b")
    a = flat(board.start, board.shaped, ("a",))
    first = board.ask(0, a, ("a",))
    assert first.tensor is not None and first.tensor.shape == a.shape, "A alone is sent"
    sent = first.tensor.array()
    before = board.ask(1, sent, ("a",), own=0)
    made = {number: flat(board.own.after(number), board.shaped, ("b",)).tobytes() for number in (0, 1)}  # type: ignore[union-attr]
    again = Board(tmp_path, "own-b")
    after = again.ask(1, sent, ("a",), own=0)
    assert before.tensor is not None and after.tensor is not None
    assert (before.tensor.array() == after.tensor.array()).all() and told(before).loss == told(after).loss
    assert flat(again.own.after(1), again.shaped, ("b",)).tobytes() == made[1] != made[0]  # type: ignore[union-attr]


def test_what_is_held_out_is_judged_with_its_own_b(tmp_path: Path) -> None:
    board = Board(tmp_path, "own-b")
    a = flat(board.start, board.shaped, ("a",))
    zeros = told(board.ask(5, a, ("a",), own=-1, train=False)).held_out_loss
    board.ask(0, a, ("a",))
    own = told(board.ask(5, a, ("a",), own=0, train=False)).held_out_loss
    assert zeros is not None and own is not None and zeros != own
    plain = Board(tmp_path, "shared")
    b = board.own.after(0)  # type: ignore[union-attr]
    whole = {**named(a, board.shaped, ("a",)), **b}
    assert own == told(plain.ask(0, flat(whole, board.shaped), ("a", "b"), train=False)).held_out_loss


def test_a_board_that_has_lost_its_factors_says_so(tmp_path: Path) -> None:
    board = Board(tmp_path, "own-b")
    answer = board.ask(4, flat(board.start, board.shaped, ("a",)), ("a",), own=3)
    assert answer.kind is Kind.ERROR
    assert "as round 3 made them, are lost" in msgspec.json.decode(answer.meta, type=StageError).text


def test_fresh_factors_train_beside_what_was_learnt(tmp_path: Path) -> None:
    """Held factors count as if they were in the weights: a board with the same ones as its own judges the same."""
    board = Board(tmp_path, "fresh")
    nothing = told(board.ask(9, None, ("a", "b"), train=False)).held_out_loss
    rng = np.random.default_rng(1)
    learnt = {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name, shape in board.shaped.items()}
    vector = flat(learnt, board.shaped)
    beside = told(board.ask(0, vector, ("a", "b"), train=False)).held_out_loss
    plain = Board(tmp_path, "shared")
    assert beside == pytest.approx(told(plain.ask(0, vector, ("a", "b"), train=False)).held_out_loss, rel=1e-6)
    assert nothing is not None and beside is not None and abs(nothing - beside) > 1e-4
    update = board.ask(1, vector, ("a", "b"))
    assert update.tensor is not None and update.tensor.shape == (len(vector),), "its own, of its own rank"
    made = named(update.tensor.array(), board.shaped)
    assert all(np.abs(made[name]).max() > 0 for name in made)
    held = {name: factor.numpy() for name, factor in board.stage.held.items()}
    assert all((held[name] == learnt[name]).all() for name in learnt), "what was learnt is not trained"
    half = board.ask(2, vector[:-1], ("a", "b"))
    assert half.kind is Kind.ERROR and b"for each rank" in half.meta
