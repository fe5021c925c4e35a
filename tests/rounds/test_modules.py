"""Modules of several modalities: who has which, groups of boards, and the files that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.commands.tune import round_text
from coordinator.rounds.adapters import files_of, spec_of
from coordinator.rounds.anchors import projected
from coordinator.rounds.features import modalities_base, series_base
from coordinator.rounds.job import Job, Modality, Planned, Rounds, Space
from coordinator.rounds.modules import (
    check_told,
    grouped,
    held_by,
    lengths_of,
    objectives_of,
    owned_by,
    parts_by,
    taken_of,
    trained_by,
)
from coordinator.rounds.orders import Placed, able_devices, least_bytes, make_orders, task_of
from coordinator.rounds.report import JobReport, csv_of, part_of
from coordinator.rounds.running import round_event
from coordinator.rounds.store import DeviceRound, JobRecord, RoundRecord
from models.formats.safetensors import open_safetensors
from models.lora.adapter import flat, initial, named, shapes
from tests.rounds.test_trunks import GB, Coordinator, info_of
from wire.errors import PeerError, UsageError
from wire.messages import ArtifactRef, UpdateMeta
from wire.modalities import Objective, Told
from wire.samples import Series

WATCH, PHONE = Series(columns=("x", "y"), window=30, kernels=20), Series(columns=("z",), window=30, kernels=12)
JOB = Job(
    name="n", labels=("a", "b", "c"), space=Space(width=4), rounds=Rounds(count=2), seed=1,
    modalities={"watch": Modality(data="wrist", series=WATCH), "phone": Modality(data="pocket", series=PHONE)},
)  # fmt: skip
BASE = modalities_base(JOB, {"watch": series_base(WATCH, 1), "phone": series_base(PHONE, 1)})
CONFIG: Any = BASE.config
OWNS = {"a": ("phone", "watch"), "b": ("watch",), "c": ("phone",)}
RECORD = JobRecord(job=JOB, state="running", epoch=1, base=BASE.digest, owns=OWNS)
SHAPED = shapes(CONFIG, spec_of(JOB))
START = flat(initial(CONFIG, spec_of(JOB)), SHAPED)


def update(device: str, samples: dict[str, int], seed: int) -> tuple[UpdateMeta, Any]:
    sent = taken_of(CONFIG, RECORD, device, START)
    by_modality = {name: Told(samples=count) for name, count in samples.items()}
    meta = UpdateMeta(round=0, device=device, samples=sum(samples.values()), by_modality=by_modality)
    return meta, sent + np.random.default_rng(seed).standard_normal(len(sent)).astype(np.float32)


UPDATES = [update("a", {"phone": 3, "watch": 1}, 1), update("b", {"watch": 5}, 2), update("c", {"phone": 2}, 3)]


def test_a_board_has_the_modules_of_its_modalities_alone() -> None:
    assert list(SHAPED) == ["connector.phone.c", "connector.watch.c", "head.c"]
    assert held_by(CONFIG, RECORD, "b") == {"connector.watch.c": (4, 21), "head.c": (3, 5)}
    assert lengths_of(CONFIG, RECORD, 0, "c", 999) == (4 * 13 + 15, 4 * 13 + 15)
    whole = named(START, SHAPED)
    assert (taken_of(CONFIG, RECORD, "b", START) == flat(whole, held_by(CONFIG, RECORD, "b"))).all()
    infos = [
        info_of("both", GB, data=("pocket", "wrist")),
        info_of("own", GB, data=("pocket", "wrist"), private_data=("wrist",)),
        info_of("none", GB, data=("notes",)),
    ]
    assert [owned_by(JOB, info) for info in infos] == [("phone", "watch"), ("phone",), ()]


def test_each_module_is_the_mean_of_its_owners_by_their_samples_of_it() -> None:
    found = named(grouped(CONFIG, RECORD, 0, START, UPDATES), SHAPED)
    of = {meta.device: named(vector, held_by(CONFIG, RECORD, meta.device)) for meta, vector in UPDATES}
    phone = (3 * of["a"]["connector.phone.c"] + 2 * of["c"]["connector.phone.c"]) / 5
    watch = (1 * of["a"]["connector.watch.c"] + 5 * of["b"]["connector.watch.c"]) / 6
    head = (4 * of["a"]["head.c"] + 5 * of["b"]["head.c"] + 2 * of["c"]["head.c"]) / 11
    np.testing.assert_allclose(found["connector.phone.c"], phone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["connector.watch.c"], watch, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["head.c"], head, rtol=1e-5, atol=1e-6)


def test_the_order_in_which_updates_come_changes_no_bit() -> None:
    found = grouped(CONFIG, RECORD, 0, START, UPDATES)
    for order in ([2, 0, 1], [1, 2, 0]):
        assert (grouped(CONFIG, RECORD, 0, START, [UPDATES[place] for place in order]) == found).all()


def test_a_module_of_which_nobody_took_part_stays_as_it_was() -> None:
    found = named(grouped(CONFIG, RECORD, 0, START, [UPDATES[1], update("a", {"phone": 0, "watch": 2}, 4)]), SHAPED)
    assert (found["connector.phone.c"] == named(START, SHAPED)["connector.phone.c"]).all()
    assert not (found["connector.watch.c"] == named(START, SHAPED)["connector.watch.c"]).all()


def test_medians_and_bounds_are_of_each_module() -> None:
    wild = (UPDATES[1][0], UPDATES[1][1] + np.float32(1000))
    bounded = msgspec.structs.replace(JOB, rounds=Rounds(most_change=1.5))
    record = msgspec.structs.replace(RECORD, job=bounded)
    found = named(grouped(CONFIG, record, 0, START, [UPDATES[0], wild, UPDATES[2]]), SHAPED)
    assert np.abs(found["head.c"]).max() < 20 and np.abs(found["connector.phone.c"]).max() < 20
    middle = msgspec.structs.replace(RECORD, job=msgspec.structs.replace(JOB, rounds=Rounds(middle="median")))
    found = named(grouped(CONFIG, middle, 0, START, [UPDATES[0], wild, UPDATES[2]]), SHAPED)
    assert np.abs(found["head.c"]).max() < 20


@pytest.mark.parametrize(
    ("by_modality", "said"),
    [
        ({}, "is of modalities none, phone, watch were due"),
        ({"phone": Told(samples=4), "other": Told(samples=0)}, "is of modalities other, phone"),
        ({"phone": Told(samples=4), "watch": Told(samples=9)}, "other samples of modalities than 4 in all"),
        (
            {"phone": Told(samples=4), "watch": Told(samples=0, held_out_count=3)},
            "held-out labels of modalities than 0",
        ),
    ],
)
def test_what_a_board_says_of_modalities_must_fit(by_modality: dict[str, Told], said: str) -> None:
    with pytest.raises(PeerError, match=said):
        check_told(UpdateMeta(round=0, device="a", samples=4, by_modality=by_modality), OWNS["a"])


def test_boards_are_asked_for_memory_by_what_they_own() -> None:
    small = least_bytes(BASE.of(("phone",)), JOB, "any")
    assert small < least_bytes(BASE, JOB, "any")
    infos = [
        info_of("phone", small, data=("pocket",), knows_features=True, knows_modalities=True),
        info_of("both", small, data=("pocket", "wrist"), knows_features=True, knows_modalities=True),
        info_of("past", GB, data=("pocket",), knows_features=True),
        info_of("none", GB, data=("notes",), knows_features=True, knows_modalities=True),
    ]
    able, unable = able_devices(Coordinator(infos, {}), JOB, BASE)  # type: ignore[arg-type]
    assert able == ("phone",)
    assert "would take" in unable["both"] and "one kind alone" in unable["past"]
    assert unable["none"] == "has no data 'wrist' or 'pocket'"


def test_orders_name_what_each_board_owns() -> None:
    ref = ArtifactRef(digest=f"sha256:{1:064x}", size_bytes=1)
    placed = {("whole", 0): Placed(BASE.parts["whole"], ref, ())}
    orders = make_orders("lab", RECORD, OWNS, BASE, task_of(JOB, None, None), placed, {})  # type: ignore[arg-type]
    owned = {device: order.training.connected.modalities for device, (order,) in orders.items()}  # type: ignore[union-attr]
    assert {device: tuple(one) for device, one in owned.items()} == OWNS
    assert owned["b"]["watch"].data == "wrist" and owned["b"]["watch"].series == WATCH
    assert parts_by(RECORD, 0, "b") == ("connector.watch", "head")


def test_the_files_say_all_that_telling_a_label_takes(tmp_path: Path) -> None:
    factors = START + np.float32(0.5)
    files = files_of(CONFIG, RECORD, factors, [])
    assert set(files) == {"head.safetensors", "connectors.safetensors", "provenance.json"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    made = open_safetensors(tmp_path / "connectors.safetensors")
    by_name = named(factors, SHAPED)
    assert (made.view("watch.weight") == by_name["connector.watch.c"][:, :-1]).all()
    assert (made.view("phone.bias") == by_name["connector.phone.c"][:, -1]).all()
    told = msgspec.json.decode(made.metadata["modalities"], type=dict[str, Modality])
    assert told == JOB.modalities and made.metadata["seed"] == "1"
    assert msgspec.json.decode(files["provenance.json"])["modalities"]["b"] == ["watch"]


PLANNED = msgspec.structs.replace(
    JOB,
    plan=(
        Planned(modules=("connector.watch",), objective="contrastive", every=2),
        Planned(modules=("head", "connector.phone"), devices=("a",), first=1),
    ),
)


def test_a_board_is_told_what_is_planned_for_its_modules() -> None:
    of_a = [objectives_of(PLANNED, number, "a", OWNS["a"]) for number in range(3)]
    watch = Objective(modules=("connector.watch",), objective="contrastive")
    rest = Objective(modules=("connector.phone", "head"), objective="task")
    assert of_a == [(watch,), (rest,), (watch, rest)]
    assert objectives_of(PLANNED, 2, "b", OWNS["b"]) == (watch,)
    assert [trained_by(PLANNED, number, "b", OWNS["b"]) for number in range(3)] == [True, False, True]
    assert not any(trained_by(PLANNED, number, "c", OWNS["c"]) for number in range(3)), "planned for a alone"


def test_modules_that_nothing_is_planned_for_stay_as_they_are() -> None:
    record = msgspec.structs.replace(RECORD, job=PLANNED)
    assert lengths_of(CONFIG, record, 0, "a", 999)[1] == 4 * 21
    meta, vector = update("b", {"watch": 5}, 2)
    sent = named(vector, held_by(CONFIG, record, "b"))["connector.watch.c"]
    found = named(grouped(CONFIG, record, 0, START, [(meta, sent.reshape(-1))]), SHAPED)
    assert (found["connector.watch.c"] == sent).all()
    for name in ("connector.phone.c", "head.c"):
        assert (found[name] == named(START, SHAPED)[name]).all()


def test_anchors_keep_the_angles_of_what_an_encoder_made() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((4, 384)).astype(np.float32)
    vectors[1] = vectors[0] + 0.3 * vectors[1]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    made = projected(vectors, "abcd", 1024, 5)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(made @ made.T, units @ units.T, atol=0.15)
    assert (projected(vectors, "abcd", 1024, 5) == made).all()
    assert not (projected(vectors, "abcd", 1024, 6) == made).all()
    with pytest.raises(UsageError, match="'c' and 'a' are one to the encoder"):
        projected(vectors[[0, 1, 0]], "abc", 16, 5)
    with pytest.raises(UsageError, match="no vectors of these labels"):
        projected(np.zeros((2, 4), np.float32), "ab", 16, 5)


def told(watch: tuple[int, int] | None, phone: tuple[int, int] | None, refused: str = "") -> DeviceRound:
    each = {"phone": phone, "watch": watch}
    by_modality = {
        name: Told(samples=10, held_out_count=counts[0], held_out_right=counts[1])
        for name, counts in each.items()
        if counts is not None
    }
    return DeviceRound(samples=10 * len(by_modality), by_modality=by_modality, refused=refused)


def test_the_report_tells_of_each_modality_and_board() -> None:
    devices = {"a": told((4, 1), (10, 2)), "b": told((6, 3), None), "c": told(None, (5, 5), "late")}
    first = RoundRecord(round=0, devices=devices, loss=1.0, held_out_loss=1.0, wall_s=1.0, down_bytes=1, up_bytes=1,
                        ended_unix=0.0)  # fmt: skip
    better = {"a": told((4, 4), (10, 6)), "b": told((6, 5), None)}
    last = msgspec.structs.replace(first, round=1, devices=better)
    assert first.accuracy_by == {"phone": 0.2, "watch": 0.4}
    report = JobReport(job=JOB, state="done", each=(first, last))
    table = next(table for table in part_of(report).tables if table.title == "Modalities")
    assert table.rows == (
        ("phone", "2", "20", "20.0% right -> 60.0% right", "a 60.0% right, c 100.0% right"),
        ("watch", "2", "20", "40.0% right -> 90.0% right", "a 100.0% right, b 83.3% right"),
    )
    lines = csv_of(report).splitlines()
    assert lines[0].endswith("modality,modality_samples,modality_held_out_count,modality_held_out_right")
    assert [line.split(",")[-4:] for line in lines[1:]] == [
        ["phone", "10", "10", "2"], ["watch", "10", "4", "1"], ["watch", "10", "6", "3"], ["phone", "10", "5", "5"],
        ["phone", "10", "10", "6"], ["watch", "10", "4", "4"], ["watch", "10", "6", "5"],
    ]  # fmt: skip
    assert "phone 20.0% right, watch 40.0% right" in round_text(round_event(first))
