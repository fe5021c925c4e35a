"""A board with samples of two modalities: loaded as its order says, and its rounds told of modality by modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from agent.workers import training
from agent.workers.connectedwork import ConnectedWork
from agent.workers.pipe import Assignment, BrokerLogin
from agent.workers.stretch import Stretch
from tests.agent.test_roundwork import ORDER, REPLY, SITE
from tests.agent.training_fakes import Delivery, Sender
from tests.training.test_heads import task
from wire.errors import CorruptData
from wire.frames import Kind, Parcel, Tensor
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, StageError, UpdateMeta
from wire.modalities import Connected, Objective, Owned, Told
from wire.samples import Series

pytestmark = pytest.mark.torch

ANCHORS = ArtifactRef(digest=f"sha256:{9:064x}", size_bytes=4 * 3 * 4)
CONNECTED = Connected(
    width=4,
    modalities={
        "watch": Owned(data="wrist", series=Series(columns=("x",), window=9, kernels=8)),
        "phone": Owned(data="pocket", series=Series(columns=("y", "z"), window=9, kernels=8)),
    },
    anchors=ANCHORS.digest,
)
LENGTHS = {"connector.phone": 4 * 9, "connector.watch": 4 * 9, "head": 3 * 5}
PLAN = (
    Objective(modules=("connector.phone", "connector.watch"), objective="contrastive"),
    Objective(modules=("head",), objective="task"),
)


def assignment(folder: Path, **changes: Any) -> Assignment:
    rng = np.random.default_rng(1)
    for name, columns, windows in (("wrist", "x", 6), ("pocket", "y,z", 9)):
        rows = [f"{columns},label"]
        for place in range(windows):
            label = "abc"[place % 3]
            rows += [",".join([*map(str, rng.standard_normal(columns.count(",") + 1)), label]) for _ in range(9)]
        (folder / f"{name}.csv").write_text("\n".join(rows))
    (folder / "anchors").write_bytes(np.eye(3, 4, dtype="<f4").tobytes())
    wanted = task(steps=2, held_out=0.3, connected=CONNECTED, **changes)
    order = msgspec.structs.replace(ORDER, training=wanted, weights=(ANCHORS,))
    return Assignment(
        device="pi4", site=SITE, order=order, graph_path="", weight_paths=(str(folder / "anchors"),),
        threads=1, speed=1.0,
        data_paths={"watch": str(folder / "wrist.csv"), "phone": str(folder / "pocket.csv")},
        state_path=str(folder), login=BrokerLogin(url="", client_id=""),
    )  # fmt: skip


class Bench:
    def __init__(self, given: Assignment) -> None:
        self.sent: list[tuple[str, Parcel]] = []
        self.trainee = training.load(given)
        self.work = ConnectedWork(
            given.order, self.trainee, Sender(self.sent), lambda _: None, Stretch(1.0, 1), SITE, "pi4"  # type: ignore[arg-type]
        )  # fmt: skip

    def asked(self, number: int, **meta: Any) -> Parcel:
        fields = {"reply": InboxAddress(topic=REPLY), "round": number, "parts": ("c",), **meta}
        start = np.full(sum(LENGTHS.values()), 0.1, np.float32)
        data = msgspec.json.encode(RoundMeta(**fields))
        self.work.accept(Delivery(Parcel(Kind.ROUND, 7, number + 1, 0, 0, Tensor.of(start), data)), 0.0)  # type: ignore[arg-type]
        while self.work.work(0.0):
            pass
        return self.sent.pop()[1]


def test_a_round_trains_what_it_is_asked_for_and_tells_of_each_modality(tmp_path: Path) -> None:
    bench = Bench(assignment(tmp_path))
    answer = bench.asked(0, objectives=PLAN)
    update = msgspec.json.decode(answer.meta, type=UpdateMeta)
    assert answer.kind is Kind.UPDATE and answer.tensor is not None
    assert answer.tensor.shape == (sum(LENGTHS.values()),)
    assert update.by_modality.keys() == {"phone", "watch"}
    phone, watch = update.by_modality["phone"], update.by_modality["watch"]
    assert phone.samples + phone.held_out_count == 9 and watch.samples + watch.held_out_count == 6
    assert update.samples == phone.samples + watch.samples and phone.held_out_count and watch.held_out_count
    assert update.held_out_right == phone.held_out_right + watch.held_out_right
    head = bench.asked(1, objectives=PLAN[1:])
    assert head.tensor is not None and head.tensor.shape == (LENGTHS["head"],)
    judged = bench.asked(2, train=False)
    told = msgspec.json.decode(judged.meta, type=UpdateMeta)
    assert judged.tensor is None and told.by_modality["watch"] == Told(
        samples=watch.samples, held_out_count=watch.held_out_count, held_out_right=watch.held_out_right
    )


def test_a_round_that_asks_for_what_is_not_here_is_refused(tmp_path: Path) -> None:
    bench = Bench(assignment(tmp_path))
    for objectives, said in (
        ((), "says nothing of what its modules are for"),
        ((Objective(modules=("connector.camera",), objective="task"),), "no module connector.camera here"),
        ((*PLAN, PLAN[1]), "two objectives"),
    ):
        error = msgspec.json.decode(bench.asked(3, objectives=objectives).meta, type=StageError)
        assert error.code == "protocol" and said in error.text


def test_anchors_of_another_size_and_rows_that_are_none_are_named(tmp_path: Path) -> None:
    given = assignment(tmp_path)
    (tmp_path / "anchors").write_bytes(b"\0" * 40)
    with pytest.raises(CorruptData, match=r"anchors of 40 bytes, 48 are due for \[3, 4\]"):
        training.load(given)
    (tmp_path / "anchors").write_bytes(np.full((3, 4), np.nan, "<f4").tobytes())
    with pytest.raises(CorruptData, match="an anchor is no number"):
        training.load(given)
    strict = assignment(tmp_path, refuse_bad_rows=True)
    with (tmp_path / "pocket.csv").open("a") as file:
        file.write("\n1,none,a")
    with pytest.raises(CorruptData, match=r"data pocket: 1 rows are no samples: pocket\.csv:83"):
        training.load(strict)
