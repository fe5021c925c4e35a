"""A profile that its board's work never bears out is not believed; that of a board that only became slow is."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.distrust import (
    KEPT_WINDOWS,
    MAX_KEPT,
    MOST_TIMES,
    TIMES,
    WINDOWS,
    Distrust,
    Trust,
    Verdict,
    claimed,
    modules_digest,
    with_doubt,
)
from coordinator.planning.slowed import Slowed
from coordinator.promised import Ratio, Work, ratio_of
from tests.planning import boards

ONE, OTHER = "sha256:1", "sha256:2"


def trust(*known: Distrust) -> Trust:
    made = Trust({doubt.device: doubt for doubt in known})
    made.profiled("pi5", ONE)
    return made


def saw(judge: Trust, *times: float, common: float = 1.0, device: str = "pi5") -> list[Verdict | None]:
    return [judge.saw(device, Ratio(value, value), common, 1e9) for value in times]


def test_a_profile_that_is_wrong_from_the_first_is_not_believed() -> None:
    judge = trust()
    *before, verdict = saw(judge, 9.0, 10.0, 11.0)
    assert before == [None] * (WINDOWS - 1) and verdict is not None and verdict.kind == "doubted"
    assert judge.of("pi5") == verdict.distrust and judge.times("pi5") == 10.0
    assert "took 10.0 times as long as its profile says (found on 20" in verdict.distrust.because
    assert saw(judge, 10.0, 10.0) == [None, None], "it is known"


def test_a_board_that_kept_its_word_once_is_slow_and_no_liar() -> None:
    judge = trust()
    assert not any(saw(judge, 1.3, *[10.0] * 20)) and judge.of("pi5") is None


def test_what_all_boards_of_a_deployment_have_in_common_is_no_lie() -> None:
    assert not any(saw(trust(), *[9.0] * 10, common=6.0))


def test_windows_between_slow_and_lying_decide_nothing() -> None:
    judge = trust()
    assert not any(saw(judge, 9.0, 9.0, TIMES * 0.7, 9.0, 9.0, TIMES * 0.7))
    assert saw(judge, 9.0, 9.0, 9.0)[-1] is not None, "it has not kept its word yet"


def test_it_is_believed_when_it_measured_itself_anew_and_found_out_again() -> None:
    judge = trust()
    saw(judge, 9.0, 9.0, 9.0)
    assert judge.profiled("pi5", ONE) is None
    verdict = judge.profiled("pi5", OTHER)
    assert verdict is not None and verdict.kind == "measured" and judge.of("pi5") is None
    assert saw(judge, 9.0, 9.0, 9.0)[-1] is not None and judge.of("pi5") is not None


def test_it_is_believed_when_it_keeps_its_word_for_long() -> None:
    judge = trust()
    saw(judge, 9.0, 9.0, 9.0)
    assert not any(saw(judge, *[1.1] * (KEPT_WINDOWS - 1), 8.0, *[1.1] * (KEPT_WINDOWS - 1)))
    [verdict] = saw(judge, 1.1)
    assert verdict is not None and verdict.kind == "kept" and judge.of("pi5") is None
    assert not any(saw(judge, *[9.0] * 10)), "now it is slow"


def test_it_is_remembered_over_a_restart_while_the_profile_is_the_same() -> None:
    doubt = Distrust(device="pi5", modules=ONE, times=8.0, since_unix=1e9)
    assert trust(doubt).of("pi5") == doubt
    judge = Trust({"pi5": doubt})
    verdict = judge.profiled("pi5", OTHER)
    assert verdict is not None and verdict.kind == "measured" and judge.of("pi5") is None


def test_nothing_is_said_of_boards_without_a_profile_and_of_too_many() -> None:
    judge = Trust({})
    assert not any(saw(judge, *[9.0] * 10))
    crowd = {f"b{n}": Distrust(device=f"b{n}", modules=ONE, times=8.0, since_unix=0.0) for n in range(MAX_KEPT)}
    judge = Trust(crowd)
    judge.profiled("pi5", ONE)
    assert not any(saw(judge, *[9.0] * 10)) and len(judge.all) == MAX_KEPT


def test_a_lie_without_bounds_is_reckoned_with_bounds() -> None:
    judge = trust()
    saw(judge, 1e9, 1e9, 1e9)
    assert judge.times("pi5") == MOST_TIMES


def test_a_promise_of_next_to_nothing_is_compared_if_the_steps_are_long() -> None:
    long, short = Work(100, 100, 0.8, 0.0), Work(100, 100, 0.2, 0.0)
    assert ratio_of(long, 0.5e-3) is None, "what is around a step of half a millisecond may take as long"
    assert claimed(long, 0.5e-3) == pytest.approx((16.0, 16.0))
    assert claimed(short, 0.5e-3) is None and claimed(short, 1.5e-3) is not None
    for step_s in (None, 0.0):
        assert claimed(long, step_s) is None
    assert claimed(Work(0, 0, 0.1, 0.0), 1.0) is None


def test_another_link_is_no_other_profile_of_modules() -> None:
    profile = boards.profile("pi5")
    assert modules_digest(profile) == modules_digest(boards.profile("pi5", link_to_broker=boards.link(1.0, 1e6)))
    assert modules_digest(profile) != modules_digest(boards.profile("pi5", block_s=2e-3))


def test_doubt_and_slowness_multiply() -> None:
    doubt = Distrust(device="pi5", modules=ONE, times=8.0, since_unix=1e9)
    slow = Slowed(times=2.0, because="runs at 0.50 of its profile since 12:03")
    both = with_doubt(slow, doubt)
    assert (
        both is not None
        and both.times == 16.0
        and both.because.endswith("and now runs at 0.50 of its profile since 12:03")
    )
    assert with_doubt(None, None) is None and with_doubt(slow, None) is slow
    assert msgspec.json.decode(msgspec.json.encode(doubt), type=Distrust) == doubt
