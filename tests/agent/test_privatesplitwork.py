"""Workers with the ends of a model in a private job: what they tell, and what their ledgers say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.workers.endswork import Steps  # noqa: E402
from agent.workers.ledger import Account, Book, Ledger  # noqa: E402
from models.privacy.accountant import epsilon  # noqa: E402
from models.privacy.plan import Measure, measure_of  # noqa: E402
from tests.agent.test_lowrankwork import LowRankBench  # noqa: E402
from tests.agent.test_splitwork import ENDS, STEPS, inbox  # noqa: E402
from wire.frames import Kind  # noqa: E402
from wire.messages import UpdateMeta  # noqa: E402
from wire.privacy import Channel, Privacy  # noqa: E402

pytestmark = pytest.mark.torch


class PrivateBench(LowRankBench):
    """Boards with data have a ledger each, which another bench finds there again."""

    def __init__(
        self, folder: Path, cuts: tuple[int, ...] = (), owners: float | None = None, rounds: int = 1, **privacy: Any
    ) -> None:
        self.books = folder / "books"
        super().__init__(folder, ("b",), cuts=cuts)
        self.task = msgspec.structs.replace(
            self.task, rounds=rounds, privacy=Privacy(**{"epsilon": 4.0, "clip": 0.5, **privacy})
        )
        for device, work in self.works.items():
            work.adopt(msgspec.structs.replace(work.order, training=self.task))
            part: Any = work._model
            part.ledger = Ledger(self.books / device, "d", owners if device == "a" else None)
            part.fingerprint, part.bad_rows = "rows", 0

    def made(self, **asked: Any) -> list[Any]:
        """Make a round; gives what boards with data sent as gradients."""
        for device in self.works:
            self.ask(device, **asked)
        return self.gradients()

    def gradients(self) -> list[Any]:
        found = []
        while True:
            for work in self.works.values():
                while work.runnable:
                    work.work(0.0)
            for topic, parcel in self.sent:
                if parcel.kind is Kind.GRADIENT and topic == inbox(self.segments[-1]):
                    assert parcel.tensor is not None
                    found.append((parcel.meta, parcel.tensor.array().tobytes()))
            if not self.turn():
                return sorted(found)

    def until_told(self, device: str) -> None:
        """Something of it."""
        while not (self.books / device / "d.json").exists():
            self.turn()

    def account(self, device: str) -> Account:
        book = msgspec.json.decode((self.books / device / "d.json").read_bytes(), type=Book)
        [account] = book.jobs.values()
        assert np.allclose(account.spent, book.all.spent)
        return account

    def meta(self, device: str) -> UpdateMeta:
        return self.updates()[device][0]


def test_a_round_is_paid_for_step_by_step_and_says_what_it_cost(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path)
    gradients = bench.made()
    assert len(gradients) == len(ENDS) * STEPS
    for place, device in enumerate(ENDS):
        meta, account = bench.meta(device), bench.account(device)
        measure = measure_of(bench.task, 4 + place, 1, 0, 0)
        assert meta.noise == measure.noise and account.releases == STEPS
        assert meta.epsilon == pytest.approx(epsilon(measure.cost, 1e-5)) and 3.9 < (meta.epsilon or 0) <= 4.0
        assert np.allclose(account.spent, measure.cost)
        assert meta.loss is None and meta.held_out_loss is None and meta.held_out_count == 0, "losses are not told"
        assert meta.compute_s == 0 and bench.works[device].tally.prefill_steps == 0, "nor how long it took"
    factors = bench.factors()
    assert np.isfinite(factors).all() and bench.updates()["t"][0].compute_s > 0
    assert bench.updates()["t"][0].noise is None


@pytest.mark.parametrize("cuts", [(), (2,)])
def test_who_is_killed_comes_to_the_same_bits_and_pays_nothing_more(cuts: Any, tmp_path: Path) -> None:
    first = PrivateBench(tmp_path, cuts)
    for device in first.works:
        first.ask(device)
    first.until_told("a")
    assert first.account("a").releases == 1
    again = PrivateBench(tmp_path, cuts)
    gradients = again.made(session=9)
    assert again.account("a").releases == again.account("b").releases == STEPS
    book = again.account("a")
    anew = PrivateBench(tmp_path, cuts)
    assert anew.made(session=11) == gradients
    assert anew.account("a") == book
    assert np.array_equal(anew.factors(), again.factors())
    other = PrivateBench(tmp_path / "other", cuts)
    assert other.made() != gradients, "of another key"


def test_the_same_step_of_other_features_is_another_release_and_costs_more(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path, rounds=3)
    bench.made()
    first, spent = bench.account("a"), bench.meta("a").epsilon
    moved = PrivateBench(tmp_path, rounds=3)
    for device in moved.works:
        moved.ask(device)
    while not moved.told:
        moved.turn_with("a", Kind.FEATURES, lambda values: values * np.float32(1.001))
    moved.through()
    account = moved.account("a")
    assert account.releases == 2 * STEPS and all(len(told) == 2 for told in account.steps.told.values())
    measure = measure_of(moved.task, 4, 1, 0, 0)
    more = STEPS * (measure.cost_again(0) + measure.cost_again(1))
    assert np.allclose(account.spent, more) and (account.spent > 2 * first.spent * (1 - 1e-9)).all()
    assert (moved.meta("a").epsilon or 0) > (spent or 0)


def test_each_step_draws_anew_and_the_same_when_it_is_made_again(tmp_path: Path) -> None:
    measure, privacy, came = Measure(8.0, 0.5, STEPS, 1.0), Privacy(epsilon=9.0), np.ones(3, np.float32)

    def steps(name: str) -> Steps:
        return Steps(Ledger(tmp_path, "d"), "job", name, measure, privacy)

    def drawn(made: Steps, step: int) -> Any:
        return made.draws(step).uniform(4).tobytes()

    first = steps("round 1")
    before = [drawn(first, step) for step in range(STEPS)]
    noise = [first.paid(step, came).uniform(4).tobytes() for step in range(2)]
    assert len({*before, *noise}) == STEPS + 2, "of each step others, and other numbers than for its noise"
    assert [drawn(steps("round 1"), step) for step in range(STEPS)] == before
    steps("round 2").paid(0, came)
    assert drawn(steps("round 1"), 0) not in before, "behind another round nobody remembers how often these were used"


def test_behind_the_budget_nothing_is_told(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path)
    bench.made()
    before = bench.account("a")
    anew = PrivateBench(tmp_path)
    anew.works["a"]._model.fingerprint = "other rows"  # type: ignore[misc]
    anew.ask("t")
    anew.ask("a")
    assert not anew.gradients()
    [error] = anew.errors()
    assert (error.code, error.device) == ("engine", "a") and "the budget of tune-n/7 is spent" in error.text
    assert anew.account("a") == before and not anew.works["a"].live


def test_a_budget_that_ends_within_a_round_ends_the_round(tmp_path: Path) -> None:
    """Where a step had to be told twice."""
    bench = PrivateBench(tmp_path)
    for device in bench.works:
        bench.ask(device)
    bench.until_told("a")
    anew = PrivateBench(tmp_path)
    for device in anew.works:
        anew.ask(device, session=6)
    while not anew.told:
        anew.turn_with("a", Kind.FEATURES, lambda values: values * np.float32(1.001))
    [error] = anew.errors()
    assert (error.code, error.device) == ("engine", "a") and "the budget of tune-n/7 is spent" in error.text
    assert epsilon(anew.account("a").spent, 1e-5) <= 4.0 and 1 < anew.account("a").releases <= STEPS


def test_what_the_owner_allows_is_never_passed(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path, owners=3.0)
    for device in bench.works:
        bench.ask(device)
    bench.turn()
    [error] = bench.errors()
    assert error.device == "a" and "what this board allows for its data is spent" in error.text
    assert not (bench.books / "a" / "d.json").exists(), "not even a step, since the round could not be ended"


def test_a_damaged_ledger_tells_nothing(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path)
    for device in bench.works:
        bench.ask(device)
    bench.until_told("a")
    (bench.books / "a" / "d.json").write_bytes(b"{")
    while not bench.told:
        bench.turn()
    assert [(one.code, one.device, "can't be read" in one.text) for one in bench.errors()] == [("engine", "a", True)]


def test_what_goes_wrong_with_the_data_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = PrivateBench(tmp_path)
    bench.works["a"]._model.stage.embedded = lambda ids: _raise(f"secret {ids}")  # type: ignore[method-assign]
    for device in bench.works:
        bench.ask(device)
    bench.through()
    [error] = bench.errors()
    assert error.code == "engine" and "its own log says why" in error.text and "secret" in capsys.readouterr().err


def _raise(text: str) -> Any:
    raise RuntimeError(text)


def test_parts_that_no_noise_covers_are_not_begun(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path)
    bench.parts = ("a",)
    bench.ask("a")
    bench.through()
    [error] = bench.errors()
    assert error.code == "engine" and "no noise covers" in error.text
    assert not (bench.books / "a" / "d.json").exists()


def test_over_a_bad_channel_noise_is_more_and_the_budget_lasts(tmp_path: Path) -> None:
    bench = PrivateBench(tmp_path, channel=Channel(sigma=1e4))
    bench.made()
    assert (bench.meta("a").noise or 0) > measure_of(bench.task, 4, 1, 0, 0).noise / 1e4 > 0
    assert 0 < (bench.meta("a").epsilon or 0) < 0.1
