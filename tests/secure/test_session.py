"""Of many masked changes the sum comes out, whoever is lost, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from models.secure.fixed import HEADROOM, integers_of, mean_of, scale_of, weights_of
from models.secure.keys import Integers
from models.secure.session import (
    KEYS_BYTES,
    SEALED_BYTES,
    Member,
    Party,
    Roster,
    TellsTooMuch,
    threshold_of,
    unmasked,
)

FARTHEST = 0.5
LENGTH = 40


class Meeting:
    """A session as far as it has come, with changes of members called m0, m1, ..."""

    def __init__(self, count: int, seed: int = 0, samples: Sequence[int] = ()) -> None:
        drawn = random.Random(seed)
        self.names = [f"m{number}" for number in range(count)]
        self.samples = dict(zip(self.names, samples or [3 + number for number in range(count)], strict=True))
        numbers = np.random.default_rng(seed)
        self.changes = {name: numbers.uniform(-FARTHEST, FARTHEST, LENGTH).astype(np.float32) for name in self.names}
        self.parties = {name: Party(name, drawn.randbytes) for name in self.names}
        self.roster = self.roster_of()

    def roster_of(self, session: int = 9, **other_samples: int) -> Roster:
        samples = {**self.samples, **other_samples}
        members = [Member(name, samples[name], self.parties[name].keys) for name in self.names]
        return Roster("tune-n/7", 2, session, FARTHEST, members)

    def deal(self, among: Sequence[str]) -> dict[str, Any]:
        """Receiver -> what comes to it."""
        dealt = {name: self.parties[name].shares(self.roster) for name in among}
        found = {}
        for name in among:
            rows = np.zeros((len(self.names), SEALED_BYTES), np.uint8)
            for sender in among:
                rows[self.roster.places[sender]] = dealt[sender][self.roster.places[name]]
            found[name] = rows
        return found

    def masked(self, among: Sequence[str]) -> dict[str, Integers]:
        dealt = self.deal(among)
        return {name: self.parties[name].masked(among, dealt[name], self.changes[name]) for name in among}

    def plain(self, names: Sequence[str]) -> Integers:
        total = np.zeros(LENGTH, np.uint32)
        for name in names:
            total += integers_of(self.changes[name], self.roster.weights[name], self.roster.scale, FARTHEST)
        return total


def summed(vectors: Any) -> Integers:
    total = np.zeros(LENGTH, np.uint32)
    for vector in vectors:
        total += vector
    return total


@settings(deadline=None, max_examples=40)
@given(some.integers(3, 8), some.data())
def test_the_sum_comes_out_whoever_is_lost_on_the_way(count: int, data: some.DataObject) -> None:
    meeting = Meeting(count, data.draw(some.integers(0, 2**30)))
    least = max(3, threshold_of(count))

    def left_of(names: Sequence[str], at_least: int) -> list[str]:
        return sorted(data.draw(some.permutations(names))[: data.draw(some.integers(at_least, len(names)))])

    among = left_of(meeting.names, least)
    survivors = left_of(among, least)
    givers = left_of(survivors, threshold_of(count))
    sent = meeting.masked(among)
    revealed = {name: meeting.parties[name].revealed(survivors) for name in givers}
    total = unmasked(meeting.roster, among, survivors, summed(sent[name] for name in survivors), revealed)
    assert np.array_equal(total, meeting.plain(survivors)), "to the last bit"
    weights = [meeting.roster.weights[name] for name in survivors]
    mean = mean_of(total, weights, meeting.roster.scale, FARTHEST)
    samples = [meeting.samples[name] for name in survivors]
    expected = np.average([meeting.changes[name].astype(np.float64) for name in survivors], axis=0, weights=samples)
    most = len(survivors) / (2 * meeting.roster.scale * sum(weights))
    assert np.abs(mean - expected).max() <= most * (1 + 1e-9)
    assert most <= count * count * FARTHEST * HEADROOM / 2**32 / sum(weights) * (1 + 1e-9)


@pytest.mark.parametrize("lost", [[], ["m4"]])
def test_fewer_than_a_threshold_of_shares_give_nothing(lost: list[str]) -> None:
    meeting = Meeting(6)
    sent = meeting.masked(meeting.names)
    survivors = [name for name in meeting.names if name not in lost]
    total = summed(sent[name] for name in survivors)
    few = {name: meeting.parties[name].revealed(survivors) for name in survivors[: threshold_of(6) - 1]}
    with pytest.raises(ValueError, match="shares of 3 members, 4 are needed"):
        unmasked(meeting.roster, meeting.names, survivors, total, few)
    none = np.zeros_like(next(iter(few.values())))
    try:  # whoever makes up what is lacking
        found = unmasked(meeting.roster, meeting.names, survivors, total, {**few, survivors[-1]: none})
        assert not np.array_equal(found, meeting.plain(survivors))
    except ValueError as error:
        assert "shares" in str(error)


def test_never_both_shares_of_one_member() -> None:
    meeting = Meeting(5)
    meeting.masked(meeting.names)
    party, all_of_them = meeting.parties["m0"], meeting.names
    first = party.revealed(all_of_them)
    assert np.array_equal(party.revealed(all_of_them[::-1]), first), "the same again is no other"
    with pytest.raises(TellsTooMuch, match="both shares of one member"):
        party.revealed(all_of_them[:4])
    assert np.array_equal(party.revealed(all_of_them), first)
    assert len({row.tobytes() for row in first}) == 5


def test_nothing_is_masked_twice_by_the_same_mask() -> None:
    meeting = Meeting(5)
    dealt = meeting.deal(meeting.names)
    party = meeting.parties["m1"]
    first = party.masked(meeting.names, dealt["m1"], meeting.changes["m1"])
    other = party.masked(meeting.names, dealt["m1"], meeting.changes["m2"])
    assert np.array_equal(first, other), "what was answered once is answered so again"
    with pytest.raises(TellsTooMuch, match="a second sum"):
        party.masked(meeting.names[:4], dealt["m1"], meeting.changes["m1"])
    with pytest.raises(TellsTooMuch, match="another list"):
        party.shares(meeting.roster_of(session=10))


def test_who_is_told_something_else_makes_masks_that_do_not_cancel() -> None:
    """A coordinator that tells one member of other samples than the rest gets no sum."""
    meeting = Meeting(4)
    told, meeting.roster = meeting.roster, meeting.roster_of(m3=5000)
    meeting.parties["m0"].shares(meeting.roster)
    meeting.roster = told
    with pytest.raises(TellsTooMuch):
        meeting.deal(meeting.names)
    others = Meeting(4)
    dealt = others.deal(others.names)
    with pytest.raises(ValueError, match="not sealed for this session"):
        others.parties["m0"].masked(others.names, dealt["m1"], others.changes["m0"])


def test_one_masked_change_looks_like_chance() -> None:
    """Of zeros, with all others' masks: bits as often set as not, and nothing twice."""
    meeting = Meeting(3)
    meeting.changes = {name: np.zeros(20_000, np.float32) for name in meeting.names}
    sent = meeting.masked(meeting.names)
    for vector in sent.values():
        assert abs(np.unpackbits(vector.view(np.uint8)).mean() - 0.5) < 0.005
        assert len(np.unique(vector)) > 19_990
    again = Meeting(3, seed=1)
    again.changes = meeting.changes
    assert (again.masked(again.names)["m0"] == sent["m0"]).mean() < 0.001


def test_a_mask_that_is_left_over_is_out_of_range() -> None:
    meeting = Meeting(4)
    sent = meeting.masked(meeting.names)
    weights = list(meeting.roster.weights.values())
    with pytest.raises(ValueError, match="of 40 elements are farther"):
        mean_of(summed(sent.values()), weights, meeting.roster.scale, FARTHEST)


def test_what_is_too_far_is_cut_and_what_is_no_number_is_refused() -> None:
    scale, weights = scale_of(3, FARTHEST), weights_of([2, 4, 4])
    assert weights == (0.5, 1.0, 1.0)
    cut = integers_of(np.array([7.0, -7.0], np.float32), 1.0, scale, FARTHEST)
    assert cut.view(np.int32).tolist() == [round(FARTHEST * scale), -round(FARTHEST * scale)]
    assert 3 * abs(int(cut.view(np.int32)[0])) <= 2**31 // HEADROOM + 3
    with pytest.raises(ValueError, match="no number"):
        integers_of(np.array([np.nan], np.float32), 1.0, scale, FARTHEST)


def test_a_long_change_in_pieces_is_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    change = np.linspace(-FARTHEST, FARTHEST, 1000, dtype=np.float32)
    whole = integers_of(change, 0.7, scale_of(3, FARTHEST), FARTHEST)
    monkeypatch.setattr("models.secure.fixed.PIECE", 7)
    assert np.array_equal(integers_of(change, 0.7, scale_of(3, FARTHEST), FARTHEST), whole)


def test_shares_that_do_not_fit_are_told() -> None:
    meeting = Meeting(4)
    sent = meeting.masked(meeting.names)
    survivors = meeting.names[:3]
    revealed = {name: meeting.parties[name].revealed(survivors).copy() for name in survivors}
    revealed["m1"][3] = 1
    with pytest.raises(ValueError, match="share"):
        unmasked(meeting.roster, meeting.names, survivors, summed(sent[name] for name in survivors), revealed)


@pytest.mark.parametrize("count", range(3, 49))
def test_two_groups_that_could_each_open_something_have_a_member_in_common(count: int) -> None:
    assert 2 * threshold_of(count) > count and threshold_of(count) <= count


def test_what_can_be_no_session_is_refused() -> None:
    meeting = Meeting(4)
    members = list(meeting.roster.members.values())
    for wrong in (
        members[:2],
        members[::-1],
        [*members[:3], members[2]],
        [*members[:3], members[3]._replace(keys=members[0].keys)],
        [*members[:3], members[3]._replace(keys=bytes(KEYS_BYTES - 1))],
        [*members[:3], members[3]._replace(samples=0)],
    ):
        with pytest.raises(ValueError):
            Roster("tune-n/7", 2, 9, FARTHEST, wrong)
    for farthest in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError):
            Roster("tune-n/7", 2, 9, farthest, members)
    stranger = Party("m9", random.Random(5).randbytes)
    with pytest.raises(ValueError, match="without this one"):
        stranger.shares(meeting.roster)
    with pytest.raises(ValueError, match="not asked for"):
        stranger.masked(meeting.names, np.zeros((4, SEALED_BYTES), np.uint8), meeting.changes["m0"])
    dealt = meeting.deal(meeting.names)
    party = meeting.parties["m0"]
    for among in ((), meeting.names[:2], [*meeting.names, "m9"], meeting.names[1:], ["m0", "m0", "m1"]):
        with pytest.raises(ValueError):
            party.masked(among, dealt["m0"], meeting.changes["m0"])
    with pytest.raises(ValueError):
        party.masked(meeting.names, dealt["m0"][:2], meeting.changes["m0"])
    with pytest.raises(ValueError, match="nothing of this member"):
        party.revealed(meeting.names)


def test_a_public_key_that_leads_nowhere_is_refused() -> None:
    """Of low order: whatever the private key, zeros would be agreed on (RFC 7748, section 6.1)."""
    meeting = Meeting(3)
    members = [one._replace(keys=bytes(KEYS_BYTES)) if one.name == "m2" else one
               for one in meeting.roster.members.values()]  # fmt: skip
    with pytest.raises(ValueError):
        meeting.parties["m0"].shares(Roster("tune-n/7", 2, 9, FARTHEST, members))
