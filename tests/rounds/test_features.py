"""What boards are handed of a job on other samples than texts, and who can take part."""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.rounds.adapters import aggregate, files_of, parts_of, spec_of
from coordinator.rounds.features import series_base
from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.orders import able_devices, least_bytes
from coordinator.rounds.store import JobRecord
from coordinator.rounds.updates import farthest_of
from models.formats.safetensors import open_safetensors
from models.lora.adapter import flat, initial, length_of, shapes
from tests.rounds.test_trunks import Coordinator, info_of
from wire.messages import UpdateMeta
from wire.privacy import Privacy
from wire.samples import Series

SCHEMA = Series(columns=("x", "y"), window=30, kernels=20)
JOB = Job(name="n", model="series", data="watch", labels=("a", "b", "c"), series=SCHEMA, rounds=Rounds(count=2))
BASE = series_base(SCHEMA, 0)


def test_boards_that_do_not_know_such_samples_or_have_no_room_take_no_part() -> None:
    room = least_bytes(BASE, JOB, "any")
    infos = [
        info_of("good", room, data=("watch",), knows_features=True),
        info_of("past", room, data=("watch",)),
        info_of("small", room - 1, data=("watch",), knows_features=True),
    ]
    fleet: Any = Coordinator(infos, {})
    able, unable = able_devices(fleet, JOB, BASE)
    assert able == ("good",)
    assert "knows samples that are texts alone" in unable["past"] and "would take" in unable["small"]
    more = msgspec.structs.replace(SCHEMA, most_windows=200_000)
    assert series_base(more, 0).peak_bytes(JOB, "any", 4, True) - BASE.peak_bytes(JOB, "any", 4, True) > 190_000 * 80


def test_the_base_is_another_with_other_readings_or_kernels() -> None:
    others = [series_base(SCHEMA, 1), series_base(msgspec.structs.replace(SCHEMA, window=31), 0)]
    assert len({base.digest for base in (BASE, *others, series_base(SCHEMA, 0))}) == 3
    assert set(BASE.parts) == {"whole"} and not BASE.parts["whole"].files and not BASE.tokenizer


def test_the_task_module_is_all_that_travels_and_all_that_comes_out(tmp_path: Any) -> None:
    shaped = shapes(BASE.config, spec_of(JOB))
    assert parts_of(JOB, 0) == ("c",) and length_of(shaped) == 3 * 21
    start = flat(initial(BASE.config, spec_of(JOB)), shaped)
    updates = [
        (UpdateMeta(round=0, device="b", samples=3), start + 1),
        (UpdateMeta(round=0, device="a", samples=1), start + 5),
    ]
    made = aggregate(BASE.config, JOB, 0, start, updates)
    assert made.tolist() == [2.0] * 63, "the mean by samples"
    record = JobRecord(job=JOB, state="done", epoch=1, base=BASE.digest)
    files = files_of(BASE.config, record, made, [])
    assert set(files) == {"head.safetensors", "provenance.json"}
    (tmp_path / "head.safetensors").write_bytes(files["head.safetensors"])
    head = open_safetensors(tmp_path / "head.safetensors")
    assert msgspec.json.decode(head.metadata["series"], type=Series) == SCHEMA and head.metadata["seed"] == "0"
    assert head.view("weight").shape == (3, 20) and head.view("bias").tolist() == [2.0] * 3


def test_noise_is_for_one_part() -> None:
    """An update has the task module alone, so what is clipped by parts is clipped once."""
    joint = msgspec.structs.replace(JOB, privacy=Privacy(epsilon=2.0, unit="device"))
    each = msgspec.structs.replace(JOB, privacy=Privacy(epsilon=2.0, unit="device", by="per-factor"))
    assert farthest_of(joint) == farthest_of(each)
