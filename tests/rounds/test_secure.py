"""A round of a secure job comes to the mean of the updates of those who were in it, whoever is killed at whatever
moment, and the coordinator sees none of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from models.privacy.plan import norm_of
from tests.rounds.secure_table import NAMES, Table, decoded, job_of, shuffled
from wire.errors import Refused
from wire.frames import Kind, Parcel, Tensor
from wire.messages import StageError, UpdateMeta
from wire.privacy import Privacy
from wire.sums import SecureMeta

pytestmark = pytest.mark.torch

FOLDERS = itertools.count()


@pytest.fixture
def laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lays a table, each in a folder of its own."""

    def lay(*arguments: Any) -> Table:
        folder = tmp_path / str(next(FOLDERS))
        folder.mkdir()
        return Table(folder, monkeypatch, *arguments)

    return lay


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "fedsa"])
@pytest.mark.parametrize("labels", [(), ("x", "y")])
def test_the_mean_comes_out_but_for_rounding(rule: str, labels: tuple[str, ...], laid: Any) -> None:
    table = laid(job_of(rounds={"aggregation": rule}, labels=labels))
    found, expected = table.go(), table.plain(NAMES)
    assert found.dtype == np.float32 and np.abs(found - expected).max() <= 2e-7
    assert np.abs(expected - table.start).max() > 1e-3, "it has moved"
    record = table.exchange.record(1.0)
    assert set(record.devices) == set(NAMES) and not any(told.refused for told in record.devices.values())
    assert record.up_bytes == sum(told.sent_bytes for told in record.devices.values()) > 0


def test_no_update_leaves_a_board_but_masked(laid: Any) -> None:
    table = laid()
    table.go()
    assert table.kinds() == {(Kind.UPDATE, False), (Kind.SECURE, True)}
    lengths = [parcel.tensor.shape for parcel in table.said if decoded_step(parcel) == "masked"]
    assert len(lengths) == 4 and len(set(lengths)) == 1
    kept = b"".join(path.read_bytes() for path in table.folder.rglob("*") if path.is_file())
    for parcel in table.said:
        if decoded_step(parcel) in ("keys", "shares", "reveal"):
            assert bytes(parcel.tensor.array().tobytes()) not in kept, "nothing secret is put on disk"


def decoded_step(parcel: Parcel) -> str:
    return decoded(parcel, SecureMeta).step if parcel.kind is Kind.SECURE else ""


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_same_bits_in_whatever_order_answers_come(seed: int, laid: Any) -> None:
    calm = laid().go()
    table = laid()
    for _ in range(500):
        shuffled(table, seed)
        if not table.turn():
            break
    assert np.array_equal(table.exchange.aggregated(), calm)


def turns_of(table: Table) -> int:
    return next(number for number in itertools.count() if not table.turn())


def test_a_worker_that_is_killed_at_whatever_moment_changes_no_bit(laid: Any) -> None:
    calm, turns = laid().go(), turns_of(laid())
    for moment in range(turns):
        table = laid()
        for _ in range(moment):
            table.turn()
        table.restart_worker("b")
        assert np.array_equal(table.go(), calm), moment


def test_b_of_one_s_own_is_in_no_sum_and_a_killed_worker_changes_no_bit(laid: Any) -> None:
    job = job_of(rounds={"aggregation": "fedsa"})
    calm, turns = laid(job).go(), turns_of(laid(job))
    for moment in range(0, turns, 2):
        table = laid(job)
        for _ in range(moment):
            table.turn()
        table.restart_worker("b")
        assert np.array_equal(table.go(), calm), moment
        kept = table.workers["b"]._model.own.after(0)
        assert kept and all((values == 1).all() for values in kept.values()), "as one round made it"


def test_a_coordinator_that_is_killed_at_whatever_moment_changes_no_bit(laid: Any) -> None:
    calm, turns = laid().go(), turns_of(laid())
    for moment in range(turns):
        table = laid()
        for _ in range(moment):
            table.turn()
        table.restart_coordinator()
        assert np.array_equal(table.go(), calm), moment


def test_both_and_another_worker_killed_change_no_bit(laid: Any) -> None:
    calm, turns = laid().go(), turns_of(laid())
    for moment in range(0, turns, 3):
        table = laid()
        for _ in range(moment):
            table.turn()
        for name in ("a", "d"):
            table.restart_worker(name)
        table.restart_coordinator()
        for _ in range(5):
            table.turn()
        table.restart_worker("c")
        assert np.array_equal(table.go(), calm), moment


def until_step(table: Table, step: str, sent: int = 0) -> None:
    """Until `sent` boards have answered in a step."""
    while table.exchange._sum.step != step or len(table.exchange._sum._came) < sent:
        assert table.turn()


def wait(table: Table, seconds: float = 60.0) -> None:
    """Until nothing is on its way any more, and then for some time."""
    for _ in range(100):
        if not table.turn() or not table.post:
            break
    table.now_s += seconds
    table.turn()


@pytest.mark.parametrize("step", ["train", "keys", "shares", "masked", "reveal"])
def test_a_board_that_stays_away_is_left_out_behind_the_deadline(step: str, laid: Any) -> None:
    table = laid()
    until_step(table, step)
    table.away.add("c")
    for _ in range(60):
        assert table.turn() or step == "reveal"
    assert step == "reveal" or table.verdict == "waits", "before the deadline it is waited for"
    for _ in range(6):
        wait(table)
    assert table.verdict == "over"
    in_it = step == "reveal"
    names = NAMES if in_it else tuple(name for name in NAMES if name != "c")
    assert np.abs(table.exchange.aggregated() - table.plain(names)).max() <= 2e-7
    refused = {name for name, told in table.exchange.record(1.0).devices.items() if told.refused}
    assert refused == (set() if in_it else {"c"})
    if step == "masked":
        [said] = [event["text"] for event in table.told if event["event"] == "status"]
        assert "c lost on the way" in said, "its masks were taken off"


def test_a_board_that_comes_back_before_the_deadline_is_in_the_sum(laid: Any) -> None:
    calm, table = laid().go(), laid()
    until_step(table, "masked")
    table.away.add("c")
    for _ in range(30):
        table.turn()
    table.away.clear()
    table.now_s += 30.0
    assert np.array_equal(table.go(), calm)


def test_with_too_few_it_waits_until_there_are_enough(laid: Any) -> None:
    table = laid()
    until_step(table, "shares")
    table.away |= {"c", "d"}
    for _ in range(10):
        wait(table)
    assert table.verdict == "waits"
    table.away.clear()
    assert np.abs(table.go() - table.plain(NAMES)).max() <= 2e-7


def test_once_something_may_have_been_revealed_the_sum_is_of_the_same_boards_or_none(laid: Any) -> None:
    """c was lost; then two of the three that are left lose their keys, so that nobody can open the sum."""
    table = laid()
    until_step(table, "masked")
    table.away.add("c")
    while table.exchange._sum.step != "reveal":
        wait(table)
    table.post.clear()
    table.restart_worker("a")
    table.restart_worker("b")
    table.away.clear()
    expected = table.plain(("a", "b", "d"))
    assert np.abs(table.go() - expected).max() <= 2e-7, "c is back, and is not in it"
    assert table.exchange._sum.attempt == 2 and table.exchange._sum.devices == ("a", "b", "d")


def test_a_restarted_coordinator_sums_whom_it_had_settled_on_though_another_is_back(laid: Any) -> None:
    table = laid()
    until_step(table, "masked")
    table.away.add("c")
    while table.exchange._sum.step != "reveal":
        wait(table)
    table.turn()
    table.restart_coordinator()
    table.away.clear()
    assert np.abs(table.go() - table.plain(("a", "b", "d"))).max() <= 2e-7
    assert table.exchange.record(1.0).devices["c"].refused


def test_a_coordinator_that_forgets_of_whom_the_sum_was_is_refused_another_one(laid: Any) -> None:
    """As one would do that wants the difference of two sums; boards remember, also in another worker."""
    table = laid()
    until_step(table, "masked")
    table.away.add("c")
    while table.verdict == "waits":
        wait(table)
    assert table.verdict == "over"
    table.store._journal.forget_update("n", 0, "*")
    table.away.clear()
    for name in ("a", "b", "d"):
        table.restart_worker(name)
    table.restart_coordinator()
    for _ in range(300):
        if not table.turn():
            break
    assert table.verdict == "failed"
    assert "would tell of single boards" in table.exchange.state.refused["a"]


def test_a_coordinator_that_says_of_one_board_both_is_refused(laid: Any) -> None:
    table = laid()
    until_step(table, "reveal", 1)
    parcel = next(parcel for parcel in table.said if decoded_step(parcel) == "reveal")
    meta = SecureMeta(session=table.exchange._session, step="reveal", among=("a", "b", "d"))
    asked = Parcel(Kind.SECURE, 7, parcel.request, meta=msgspec.json.encode(meta))
    name = table.exchange._requests[parcel.request]
    table.bring(name, asked)
    last = table.said[-1]
    assert last.kind is Kind.ERROR and "both shares of one member" in decoded(last, StageError).text


@pytest.mark.parametrize("unit", ["sample", "device"])
def test_noise_of_the_board_goes_on_before_the_mask(unit: str, laid: Any) -> None:
    """Of unit 'device' alone is the noise put on the change, which the fake round does; it is in the sum."""
    privacy = Privacy(epsilon=50.0, unit=unit, clip=0.01)  # type: ignore[arg-type]
    if unit == "sample":
        table = laid(job_of(privacy=privacy))
        for name in NAMES:
            table.workers[name]._made = _without_noise(table.workers[name])
        table.go()
    else:
        table = laid(job_of(privacy=privacy))
        moved = table.go() - table.start
        norm = norm_of(privacy, 2)
        noise = table.exchange.updates["a"][0].noise
        assert noise is not None
        shares = np.array([table.samples[name] for name in NAMES]) / sum(table.samples.values())
        expected = noise * 2 * norm * float(np.sqrt((shares**2).sum()))
        assert 0.5 * expected < moved.std() < 2 * expected, "of the noise of four boards, weighted"
        assert table.exchange._farthest < 1e3
    told = table.exchange.record(1.0).devices
    assert all(one.noise is not None and one.epsilon for one in told.values())
    assert all((table.folder / name / "d.json").is_file() for name in NAMES), "paid for"


def _without_noise(worker: Any) -> Any:
    made = worker._made

    def without(meta: Any, start: Any) -> Any:
        found, told = made(meta, start)
        found._guard = None
        return found, told

    return without


def changed(parcel: Parcel, **fields: Any) -> Parcel:
    return msgspec.structs.replace(parcel, **fields)


@pytest.mark.parametrize("step", ["keys", "shares", "masked"])
@pytest.mark.parametrize(
    "wrong", [None, np.zeros(3, np.uint8), np.zeros((4, 82), np.float32), np.zeros((4, 1, 82), np.uint8), "no JSON"]
)
def test_an_answer_that_can_be_none_puts_its_board_out_and_the_others_go_on(step: str, wrong: Any, laid: Any) -> None:
    table = laid()
    until_step(table, step)
    done = False
    for _ in range(400):
        for place, (to, parcel) in enumerate(table.post):
            if not to and _is_of(parcel, table, "c", step) and not done:
                bad = (
                    changed(parcel, meta=b"{")
                    if isinstance(wrong, str)
                    else changed(parcel, tensor=None if wrong is None else Tensor.of(wrong))
                )
                table.post[place], done = ("", bad), True
                break
        if not table.turn():
            break
    assert done and table.verdict == "over" and set(table.exchange.state.refused) == {"c"}
    expected = table.plain(("a", "b", "d"))
    assert np.abs(table.exchange.aggregated() - expected).max() <= 2e-7


def _is_of(parcel: Parcel, table: Table, name: str, step: str) -> bool:
    return parcel.request == _request_of(table, name) and parcel.meta != b"{" and decoded_step(parcel) == step


def _request_of(table: Table, name: str) -> int:
    return next(request for request, known in table.exchange._requests.items() if known == name)


def test_an_update_without_a_mask_is_refused(laid: Any) -> None:
    table = laid()
    until_step(table, "train")
    for parcel in (
        Parcel(Kind.UPDATE, 7, _request_of(table, "c"), tensor=Tensor.of(np.zeros(4, np.float32)),
               meta=msgspec.json.encode(UpdateMeta(round=0, device="c", samples=2))),
        Parcel(Kind.UPDATE, 7, _request_of(table, "d"),
               meta=msgspec.json.encode(UpdateMeta(round=0, device="d", samples=0))),
    ):  # fmt: skip
        table.exchange.heard(parcel)
    assert "without a mask" in table.exchange.state.refused["c"]
    assert table.exchange.state.refused["d"] == "is of no samples"
    table.turn()
    assert table.verdict == "failed", "two are too few"


def test_a_sum_that_can_be_none_ends_the_job(laid: Any) -> None:
    table = laid()
    until_step(table, "masked")
    while table.turn():
        for place, (to, parcel) in enumerate(table.post):
            if not to and _is_of(parcel, table, "c", "masked"):
                noise = np.random.default_rng(1).integers(-(2**31), 2**31, parcel.tensor.shape, np.int32)
                table.post[place] = ("", changed(parcel, tensor=Tensor.of(noise)))
    assert table.verdict == "over"
    with pytest.raises(Refused, match="the sum of a, b, c, d is none"):
        table.exchange.aggregated()


@pytest.mark.parametrize("epoch", [6, 8])
def test_what_is_of_no_session_of_now_is_dropped(epoch: int, laid: Any) -> None:
    table = laid()
    until_step(table, "shares", 1)
    old = next(parcel for parcel in table.said if decoded_step(parcel) == "keys")
    assert table.exchange.heard(old), "of another step"
    assert not table.exchange.heard(changed(old, epoch=epoch))
    assert not table.exchange.heard(changed(old, request=1))
    meta = SecureMeta(session=table.exchange._session + 1, step="shares")
    assert table.exchange.heard(changed(old, meta=msgspec.json.encode(meta)))
    assert np.abs(table.go() - table.plain(NAMES)).max() <= 2e-7
