"""What the journal acknowledged is there after a crash, and an epoch never comes twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.artifacts import Artifacts
from coordinator.journal import Journal
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import record_of
from wire.errors import CorruptData


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


def opened(path: Path) -> Journal:
    journal = Journal(path)
    journal.open()
    return journal


def test_epochs_grow_over_restarts_and_above_what_devices_have_applied(path: Path) -> None:
    journal = opened(path)
    first, second = journal.next_epoch(), journal.next_epoch(at_least=50)
    assert first >= 1
    assert second == 51
    # No close: the process was killed.
    assert opened(path).next_epoch() == 52


def test_a_deployment_survives_a_crash_word_for_word(path: Path) -> None:
    record = record_of(plan_of("a", "b"))
    opened(path).save_deployment(record)
    assert opened(path).deployments() == [record]


def test_a_removed_deployment_stays_removed(path: Path) -> None:
    journal = opened(path)
    journal.save_deployment(record_of(plan_of("a")))
    journal.remove_deployment("tiny")
    assert opened(path).deployments() == []


def test_a_file_that_is_no_journal_is_refused_by_name(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is not a database, it is a letter" * 100)
    with pytest.raises(CorruptData, match=r"journal\.sqlite"):
        opened(path)


def test_a_damaged_record_is_refused_by_name(path: Path) -> None:
    journal = opened(path)
    journal._db.execute("INSERT INTO deployment VALUES ('tiny', x'7b7d')")
    with pytest.raises(CorruptData, match="tiny"):
        journal.deployments()


def test_artifacts_are_served_after_a_restart_and_not_when_the_file_is_gone(path: Path, tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "files", opened(path))
    ref = artifacts.add_bytes(b"graph", "g.onnx")
    again = Artifacts(tmp_path / "files", opened(path))
    again.open()
    found = again.path_of(ref.digest)
    assert found is not None
    assert found.read_bytes() == b"graph"
    found.unlink()
    assert again.path_of(ref.digest) is None
