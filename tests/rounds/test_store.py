"""Jobs on disk: what was counted is there after a crash, once, and what is damaged is not taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.journal import Journal
from coordinator.rounds.job import Job
from coordinator.rounds.store import DeviceRound, JobRecord, JobStore, RoundRecord
from wire.errors import CorruptData
from wire.messages import UpdateMeta

JOB = Job(name="n", model="m", data="d")
START = np.arange(4, dtype=np.float32)


def opened(folder: Path) -> JobStore:
    journal = Journal(folder / "journal.sqlite")
    journal.open()
    return JobStore(folder / "jobs", journal)


def done(number: int) -> RoundRecord:
    return RoundRecord(
        round=number, devices={"a": DeviceRound(samples=1)}, loss=1.0, held_out_loss=2.0, wall_s=1.0, down_bytes=1,
        up_bytes=1, ended_unix=0.0,
    )  # fmt: skip


def keep(store: JobStore, device: str, number: int = 0, value: float = 1.0) -> None:
    digest = store.write_update("n", number, device, START + np.float32(value))
    store.count_update("n", UpdateMeta(round=number, device=device, samples=3), digest)


def test_what_was_counted_is_there_after_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.begin(JobRecord(job=JOB, state="running"), START)
    keep(store, "b", value=2.0)
    keep(store, "a")
    again = opened(tmp_path)
    record = again.records()["n"]
    assert (again.factors(record) == START).all()
    found = again.updates("n", 0)
    assert list(found) == ["a", "b"] and (found["b"][1] == START + 2).all() and found["a"][0].samples == 3


def test_an_update_counts_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.begin(JobRecord(job=JOB, state="running"), START)
    keep(store, "a")
    with pytest.raises(ValueError, match="is there already"):
        keep(store, "a")


def test_a_round_that_is_over_takes_its_updates_with_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    record = store.begin(JobRecord(job=JOB, state="running"), START)
    keep(store, "a")
    ahead = store.finish_round(record, done(0), store.write_next(record, START * 2), "running")
    again = opened(tmp_path)
    assert again.records()["n"] == ahead and ahead.round == 1
    assert (again.factors(ahead) == START * 2).all()
    assert again.updates("n", 0) == {} and [one.round for one in again.rounds("n")] == [0]
    assert sorted(path.name for path in again.folder_of("n").iterdir()) == ["factors-1.f32"]


def test_files_that_the_journal_does_not_know_of_count_for_nothing(tmp_path: Path) -> None:
    """Killed after the file was written and before the journal knew."""
    store = opened(tmp_path)
    record = store.begin(JobRecord(job=JOB, state="running"), START)
    store.write_update("n", 0, "a", START)
    assert opened(tmp_path).updates("n", 0) == {}
    keep(store, "a", value=5.0)
    assert (opened(tmp_path).updates("n", 0)["a"][1] == START + 5).all()
    assert (store.factors(record) == START).all()


def test_what_is_damaged_is_not_taken(tmp_path: Path) -> None:
    store = opened(tmp_path)
    record = store.begin(JobRecord(job=JOB, state="running"), START)
    keep(store, "a")
    (store.folder_of("n") / "update-0-a.f32").write_bytes(b"1234")
    assert store.updates("n", 0) == {}
    keep(store, "a", value=4.0)
    assert (store.updates("n", 0)["a"][1] == START + 4).all(), "it may come again"
    (store.folder_of("n") / "factors-0.f32").write_bytes(START[::-1].tobytes())
    with pytest.raises(CorruptData, match="not what was written"):
        store.factors(record)


def test_a_new_job_of_a_name_has_nothing_of_the_old_one(tmp_path: Path) -> None:
    store = opened(tmp_path)
    record = store.begin(JobRecord(job=JOB, state="running"), START)
    keep(store, "a")
    store.finish_round(record, done(0), store.write_next(record, START), "done")
    keep(store, "a", number=1)
    store.begin(JobRecord(job=JOB, state="running"), START * 3)
    again = opened(tmp_path)
    assert again.rounds("n") == [] and again.updates("n", 1) == {} and again.records()["n"].round == 0
