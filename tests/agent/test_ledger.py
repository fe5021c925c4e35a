"""A board's ledger: written before anything is told, by job and in all, and never passed."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest

from agent.workers import ledger as module
from agent.workers.ledger import Book, Ledger, Spent, release_of
from models.privacy.accountant import ORDERS, Doubles, cost, epsilon
from wire.errors import CorruptData

COST = 4 * cost(8.0)
DELTA = 1e-5
ONE, TWO = epsilon(COST, DELTA), epsilon(2 * COST, DELTA)


def book(folder: Path) -> Book:
    return msgspec.json.decode((folder / "notes.json").read_bytes(), type=Book)


def test_what_is_told_is_entered_by_job_and_in_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "notes")
    _, spent = ledger.spend("a/1", "first", COST, 4, 9.0, DELTA)
    assert spent == pytest.approx(ONE)
    _, spent = Ledger(tmp_path, "notes").spend("a/1", "second", COST, 4, 9.0, DELTA)
    assert spent == pytest.approx(TWO)
    _, spent = ledger.spend("b/2", "third", COST, 4, 9.0, DELTA)
    assert spent == pytest.approx(ONE)
    kept = book(tmp_path)
    assert {job: account.releases for job, account in kept.jobs.items()} == {"a/1": 8, "b/2": 4}
    assert kept.all.releases == 12 and np.allclose(kept.all.spent, 3 * COST)


def test_what_is_made_anew_costs_nothing_and_has_the_same_noise(tmp_path: Path) -> None:
    first, _ = Ledger(tmp_path, "notes").spend("a/1", "first", COST, 4, 9.0, DELTA)
    again, spent = Ledger(tmp_path, "notes").spend("a/1", "first", COST, 4, 9.0, DELTA)
    assert spent == pytest.approx(ONE) and book(tmp_path).all.releases == 4
    assert (first.normal(5) == again.normal(5)).all()
    other, _ = Ledger(tmp_path, "notes").spend("a/1", "second", COST, 4, 9.0, DELTA)
    assert not (
        other.normal(5) == Ledger(tmp_path, "notes").spend("a/1", "second", COST, 4, 9, DELTA)[0].normal(9)[4:]
    ).any()


def test_a_budget_is_never_passed_and_what_is_refused_is_not_entered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "notes")
    ledger.spend("a/1", "first", COST, 4, ONE, DELTA)
    before = (tmp_path / "notes.json").read_bytes()
    with pytest.raises(Spent, match=r"the budget of a/1 is spent: epsilon \d"):
        ledger.spend("a/1", "second", COST, 4, (ONE + TWO) / 2, DELTA)
    assert (tmp_path / "notes.json").read_bytes() == before
    ledger.spend("a/1", "second", COST, 4, TWO, DELTA)


def test_what_the_owner_allows_goes_over_all_jobs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "notes", (ONE + TWO) / 2)
    ledger.spend("a/1", "first", COST, 4, 99.0, DELTA)
    with pytest.raises(Spent, match="what this board allows for its data is spent"):
        ledger.spend("b/2", "first", COST, 4, 99.0, DELTA)
    Ledger(tmp_path, "mail", (ONE + TWO) / 2).spend("b/2", "first", COST, 4, 99.0, DELTA)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"all":{"cost":[1.0]}}', msgspec.json.encode(Book(orders=len(ORDERS) + 1))],
)
def test_a_damaged_book_tells_nothing(damage: bytes, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "notes")
    ledger.spend("a/1", "first", COST, 4, 9.0, DELTA)
    (tmp_path / "notes.json").write_bytes(damage)
    with pytest.raises(CorruptData, match=r"notes\.json"):
        ledger.spend("a/1", "second", COST, 4, 9.0, DELTA)


def test_a_cut_key_tells_nothing_and_a_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    Ledger(tmp_path, "notes").spend("a/1", "first", COST, 4, 9.0, DELTA)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(CorruptData, match="key: 5 bytes"):
        Ledger(tmp_path, "notes").spend("a/1", "second", COST, 4, 9.0, DELTA)


def test_another_key_than_the_books_tells_nothing(tmp_path: Path) -> None:
    Ledger(tmp_path, "notes").spend("a/1", "first", COST, 4, 9.0, DELTA)
    (tmp_path / "key").unlink()
    with pytest.raises(CorruptData, match=r"not the one of notes\.json"):
        Ledger(tmp_path, "notes").spend("a/1", "first", COST, 4, 9.0, DELTA)


def test_old_jobs_are_forgotten_but_not_what_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_JOBS", 16)
    ledger = Ledger(tmp_path, "notes")
    for number in range(20):
        ledger.spend(f"a/{number}", "only", COST, 1, 9.0, DELTA)
    kept = book(tmp_path)
    assert len(kept.jobs) == 16 and "a/19" in kept.jobs and "a/0" not in kept.jobs
    assert np.allclose(kept.all.spent, 20 * COST)


def test_a_release_is_named_by_all_that_it_is_made_of() -> None:
    assert release_of("a", 1, "b") == release_of("a", 1, "b") != release_of("a", 2, "b")


def spend_step(folder: Path, step: int, release: str, name: str = "round 1", most: float = 9.0) -> float:
    """Epsilon of the job with it."""
    return Ledger(folder, "notes").spend_step("a/1", name, step, release, again, most, DELTA)[1]


def again(times: int) -> Doubles:
    return (1 + times) * COST


def test_steps_of_a_round_are_remembered_and_cost_once(tmp_path: Path) -> None:
    before = Ledger(tmp_path, "notes").steps("a/1", "round 1").before
    for step, release in enumerate(("x", "y", "x2")):
        spend_step(tmp_path, step, release)
    told = (tmp_path / "notes.json").read_bytes()
    noise = [Ledger(tmp_path, "notes").spend_step("a/1", "round 1", 1, "y", again, 9.0, DELTA)[0] for _ in range(2)]
    assert (noise[0].normal(5) == noise[1].normal(5)).all()
    assert spend_step(tmp_path, 0, "x") == pytest.approx(epsilon(3 * COST, DELTA))
    assert (tmp_path / "notes.json").read_bytes() == told
    assert Ledger(tmp_path, "notes").steps("a/1", "round 1").before == before == 0


def test_another_release_with_the_same_samples_costs_what_that_costs(tmp_path: Path) -> None:
    spend_step(tmp_path, 0, "x")
    assert spend_step(tmp_path, 0, "other") == pytest.approx(epsilon(3 * COST, DELTA)), "COST, and twice that"
    assert spend_step(tmp_path, 0, "x") == pytest.approx(epsilon(3 * COST, DELTA)), "both are remembered"
    assert book(tmp_path).jobs["a/1"].releases == 2


def test_who_comes_back_to_a_round_behind_another_begins_it_as_a_new_one(tmp_path: Path) -> None:
    """Others are drawn then, since nobody remembers how often the first ones were used."""
    spend_step(tmp_path, 0, "x", "round 1")
    spend_step(tmp_path, 0, "x", "round 2")
    steps = Ledger(tmp_path, "notes").steps("a/1", "round 1")
    assert (steps.before, steps.told) == (2, {})
    assert Ledger(tmp_path, "notes").steps("a/1", "round 2").before == 1


def test_a_step_beyond_a_budget_is_not_entered(tmp_path: Path) -> None:
    spend_step(tmp_path, 0, "x", most=ONE)
    before = (tmp_path / "notes.json").read_bytes()
    with pytest.raises(Spent, match="the budget of a/1 is spent"):
        spend_step(tmp_path, 1, "y", most=(ONE + TWO) / 2)
    ledger = Ledger(tmp_path, "notes", (ONE + TWO) / 2)
    with pytest.raises(Spent, match="what this board allows"):
        ledger.spend_step("b/1", "round 1", 0, "x", again, 99.0, DELTA)
    with pytest.raises(Spent, match="what this board allows"):
        ledger.check("b/1", COST, 99.0, DELTA)
    ledger.check("b/1", 0.1 * COST, 99.0, DELTA)
    assert (tmp_path / "notes.json").read_bytes() == before
