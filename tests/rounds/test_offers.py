"""What is known of a device from what it took."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.offers import (
    UNKNOWN_BYTES_PER_S,
    Timing,
    Took,
    joint_offer_of,
    learnt,
    learnt_together,
    offer_of,
    weights_of,
)
from coordinator.rounds.settling import LEAST_PACE, pace_of, settled
from coordinator.rounds.store import JobRecord

LINK = 1e6


def test_who_was_never_timed_counts_as_fast() -> None:
    found = offer_of("a", Timing(), None, 1000, 500, 0)
    assert found.offset_s < 1e-3 and found.rate == UNKNOWN_BYTES_PER_S and found.weight == 1
    assert offer_of("a", Timing(), LINK, 10**6, 500, 7).offset_s == pytest.approx(1.0)


def test_what_is_not_transfer_is_computing_where_nobody_tells_it() -> None:
    found = learnt(None, LINK, Took(wall_s=5.0, compute_s=0.0, down_bytes=10**6, up_bytes=10**6))
    assert found == Timing(compute_s=pytest.approx(3.0), bytes_per_s=0.0)
    again = learnt(found, LINK, Took(wall_s=7.0, compute_s=0.0, down_bytes=10**6, up_bytes=10**6))
    assert again.compute_s == pytest.approx(4.0), "half of the old and half of the new"


def test_a_clear_transfer_tells_the_rate() -> None:
    took = Took(wall_s=10.0, compute_s=2.0, down_bytes=10**6, up_bytes=10**6)
    assert learnt(None, None, took).bytes_per_s == pytest.approx(0.25e6)
    assert learnt(None, LINK, took).bytes_per_s == pytest.approx(0.625e6), "beside what its profile says"
    shared = Took(wall_s=10.0, compute_s=2.0, down_bytes=10**6, up_bytes=10**6, share=0.25, sharers=4)
    assert learnt(None, None, shared).bytes_per_s == pytest.approx(1e6), "alone it would have had all of the medium"


def test_a_short_transfer_says_nothing_of_the_rate() -> None:
    took = Took(wall_s=2.05, compute_s=2.0, down_bytes=1000, up_bytes=1000)
    found = learnt(Timing(compute_s=2.0, bytes_per_s=5e5), LINK, took)
    assert found.bytes_per_s == 5e5 and found.compute_s == pytest.approx(2.02, abs=0.01)


def test_what_a_board_says_of_its_computing_is_no_more_than_it_took() -> None:
    found = learnt(None, LINK, Took(wall_s=2.0, compute_s=1e12, down_bytes=1000, up_bytes=1000))
    assert found.compute_s <= 2.0


def test_a_board_that_keeps_to_its_pace_is_not_taken_for_slow() -> None:
    took = Took(wall_s=4.0, compute_s=1.0, down_bytes=0, up_bytes=10**6, share=0.5, paced=True)
    assert learnt(None, LINK, took).bytes_per_s == 0.0, "2 MB in 3 s: its pace and some overhead"
    slower = msgspec.structs.replace(took, wall_s=9.0)
    assert learnt(None, LINK, slower).bytes_per_s == pytest.approx((LINK + 2e6 / 8) / 2)


def test_what_a_round_takes_beyond_its_slowest_board_is_shared_by_number() -> None:
    timing, each_s = learnt_together({}, None, {"a": 1.0, "b": 3.0}, 4.0)
    assert timing == {"a": Timing(compute_s=1.0), "b": Timing(compute_s=3.0)} and each_s == 0.5
    timing, each_s = learnt_together(timing, each_s, {"b": 2.0}, 3.0)
    assert timing == {"a": Timing(compute_s=1.0), "b": Timing(compute_s=2.0, warm=True)}, (
        "the first round was to warm up"
    )
    assert each_s == 1.0, "the same"
    timing, each_s = learnt_together(timing, each_s, {"b": 4.0}, 6.0)
    assert timing["b"].compute_s == 3.0 and each_s == 1.5, "half of the old and half of the new"
    timing, each_s = learnt_together(timing, each_s, {"b": 7.0}, None)
    assert timing["b"].compute_s == 5.0 and each_s == 1.5, "a round that was begun anew says nothing of that"
    assert learnt_together(timing, each_s, {}, 9.0) == (timing, 1.5)
    found = joint_offer_of("b", timing["b"], 7)
    assert (found.offset_s, found.sent_bytes, found.weight) == (5.0, 0.0, 7.0)
    assert joint_offer_of("new", Timing(), 0).offset_s == 0.0, "so it is tried"


def test_a_round_that_all_make_together_is_planned_by_its_slowest_and_their_number() -> None:
    job = Job(name="n", model="m", data="d", mode="split", rounds=Rounds(who="fastest", devices=2))
    timing = {"a": Timing(compute_s=1.0), "b": Timing(compute_s=3.0), "c": Timing(compute_s=2.0)}
    record = JobRecord(job=job, state="running", timing=timing, each_s=0.25)
    offers = [joint_offer_of(name, known, 1) for name, known in timing.items()]
    found = settled(record, list(timing), offers, False)
    assert found["chosen"] == ("a", "c") and found["expected_s"] == pytest.approx(2.5)
    assert settled(msgspec.structs.replace(record, each_s=None), list(timing), offers, False)["expected_s"] is None
    new = [*offers, joint_offer_of("d", Timing(), 1)]
    assert settled(record, [*timing, "d"], new, False) == {"chosen": ("a", "d"), "expected_s": None}, "it is tried"
    everybody = msgspec.structs.replace(record, job=msgspec.structs.replace(job, rounds=Rounds()))
    assert settled(everybody, list(timing), offers, False)["expected_s"] == pytest.approx(3.75)


def test_nobody_is_told_to_send_more_slowly_than_the_round_lasts() -> None:
    offer = offer_of("a", Timing(compute_s=5.0, bytes_per_s=5e6), None, 0, 500_000, 1)
    assert pace_of(offer, 0.5, 600.0) == 2.5e6
    assert pace_of(offer, 1e-4, 20.0) == pytest.approx(100_000), "to be done in half of the patience"
    assert pace_of(offer, 1e-9, 1e6) == LEAST_PACE
    assert pace_of(offer, 1e-9, 4.0) == 5e6, "there is no time left: as fast as it can"


def test_who_never_told_how_much_he_has_is_taken_for_usual() -> None:
    assert weights_of({"a": 10, "b": 20}, ["a", "b", "c"]) == {"a": 10, "b": 20, "c": 15}
    assert weights_of({}, ["a", "c"]) == {"a": 1, "c": 1}
