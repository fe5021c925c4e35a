"""One sum of many vectors, of which the coordinator learns the sum alone (Bonawitz et al., Practical secure aggregation
for privacy-preserving machine learning, CCS 2017, against a coordinator that is curious and keeps to the protocol).
Pure.

    keys      each member makes two pairs of keys, one to seal with, one for masks
    shares    each draws a seed for a mask of its own, cuts this seed and its private key for masks into shares, one for
              each member, and seals them
    masked    each sends its integers with its own mask on them, and for each other member the mask of that pair: the
              lower name adds it, the higher one takes it away. Members whose shares did not come count as not there
    reveal    of each member whose integers came the others give their shares of its seed, so that its own mask can be
              taken off; of each that was lost, their shares of its private key, so that its masks of pairs can

Never both of one: that would bare its integers. `Party` is a member's side, and refuses it; `unmasked` is the
coordinator's.

So many shares give a secret that two groups can't each have enough of them without a common member (`threshold_of`): to
be told by some that a member was lost, and by others that it was not, takes members that say both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from models.secure.fixed import Floats, integers_of, scale_of, weights_of
from models.secure.keys import KEY_BYTES, TAG_BYTES, Integers, agreed, derived, numbers, opened, public_of, sealed
from models.secure.shamir import SECRET_BYTES, SHARE_BYTES, RandomBytes, secret_of, shares_of
from wire.limits import LEAST_SUMMED, MAX_SUMMED

Rows = npt.NDArray[np.uint8]

KEYS_BYTES: Final = 2 * KEY_BYTES
"""A member's public keys: to seal with, and for masks."""
SEALED_BYTES: Final = 2 * SHARE_BYTES + TAG_BYTES
"""A share of a seed and one of a private key, for one member."""


class TellsTooMuch(ValueError):
    """Something that was asked for would tell more than one sum."""


class Member(NamedTuple):
    name: str
    samples: int
    keys: bytes

    @property
    def mask_key(self) -> bytes:
        return self.keys[KEY_BYTES:]


class Roster:
    """What all members of a session are told. Whoever is told something else makes other masks, which don't cancel."""

    def __init__(self, job: str, round_number: int, session: int, farthest: float, members: Sequence[Member]) -> None:
        """`farthest`: that an element may have gone. Raises ValueError for what can be no session."""
        names = [member.name for member in members]
        if not LEAST_SUMMED <= len(names) <= MAX_SUMMED or names != sorted(set(names)):
            raise ValueError(f"{len(names)} members, or not in order; {LEAST_SUMMED} to {MAX_SUMMED} can be")
        if any(len(member.keys) != KEYS_BYTES for member in members) or len({one.keys for one in members}) < len(names):
            raise ValueError("keys that are none, or of two members")
        if not 0 < farthest < 1e30 or min(member.samples for member in members) < 1:
            raise ValueError("changes without a bound, or a member without samples")
        self.round_number = round_number
        self.farthest = farthest
        self.members = {member.name: member for member in members}
        self.places = {name: place for place, name in enumerate(names)}
        self.threshold = threshold_of(len(names))
        self.scale = scale_of(len(names), farthest)
        self.weights = dict(zip(names, weights_of([member.samples for member in members]), strict=True))
        words = f"{job}\n{round_number}\n{session}\n{farthest!r}\n"
        words += "".join(f"{name} {samples} {keys.hex()}\n" for name, samples, keys in members)
        self.context = hashlib.sha256(words.encode()).digest()

    def known(self, names: Collection[str], among: Collection[str]) -> tuple[str, ...]:
        """Some of `among`, in order, enough for a sum. Raises ValueError."""
        if len(names) < max(self.threshold, LEAST_SUMMED) or len(set(names)) < len(names) or not set(names) <= {*among}:
            raise ValueError(f"{len(names)} members are too few of {len(self.members)}, or not of them")
        return tuple(sorted(names))

    def pair_key(self, private: bytes, mine: str, other: str) -> bytes:
        """Of the mask of a pair, by the private key of one of them."""
        secret = agreed(private, self.members[other].mask_key)
        return derived(secret, self.context, f"mask {min(mine, other)} {max(mine, other)}")

    def own_key(self, seed: bytes, name: str) -> bytes:
        """Of a member's own mask."""
        return derived(seed, self.context, f"own {name}")


class Party:
    """A member's side of one session. What was answered once is answered so again, and nothing else."""

    def __init__(self, name: str, random_bytes: RandomBytes) -> None:
        self.name = name
        self._random = random_bytes
        self._seal_key, self._mask_key, self._seed = (random_bytes(KEY_BYTES) for _ in range(3))
        self.keys = public_of(self._seal_key) + public_of(self._mask_key)
        self._roster: Roster | None = None
        self._dealt: Rows | None = None
        self._own: bytes = b""
        """The shares that it keeps of its own secrets."""
        self._masked: tuple[tuple[str, ...], Integers] | None = None
        self._held: dict[str, bytes] = {}
        """Member -> the share of its seed, and behind it that of its private key."""
        self._revealed: tuple[str, ...] = ()

    def shares(self, roster: Roster) -> Rows:
        """[members, SEALED_BYTES] shares for each other member; the own row is zeros. Raises ValueError."""
        if self._roster is not None and self._roster.context != roster.context:
            raise TellsTooMuch("another list of members for the same keys")
        if self._dealt is None:
            if roster.members.get(self.name, Member("", 0, b"")).keys != self.keys:
                raise ValueError("a list of members without this one, or with other keys than it has")
            count = len(roster.members)
            of_seed = shares_of(self._seed, roster.threshold, count, self._random)
            of_key = shares_of(self._mask_key, roster.threshold, count, self._random)
            dealt = np.zeros((count, SEALED_BYTES), np.uint8)
            for name, place in roster.places.items():
                both = of_seed[place] + of_key[place]
                if name == self.name:
                    self._own = both
                else:
                    box = sealed(self._box_key(roster, self.name, name), both)
                    dealt[place] = np.frombuffer(box, np.uint8)
            self._roster, self._dealt = roster, dealt
        return self._dealt

    def masked(self, among: Collection[str], dealt: Rows, change: Floats) -> Integers:
        """[m] this member's change with masks on it, for a sum with those `among` whose shares came, which `dealt`
        [members, SEALED_BYTES] holds. Raises ValueError."""
        roster = self._joined()
        names = roster.known(among, roster.members)
        if self._masked is not None:
            if self._masked[0] != names:
                raise TellsTooMuch("a second sum with the same masks, of other members")
            return self._masked[1]
        if self.name not in names or dealt.shape != (len(roster.members), SEALED_BYTES):
            raise ValueError("a sum without this member, or shares that are none")
        held = {self.name: self._own}
        for name in names:
            if name != self.name:
                box = dealt[roster.places[name]].tobytes()
                held[name] = opened(self._box_key(roster, name, self.name), box)
        weight = roster.weights[self.name]
        total = integers_of(change, weight, roster.scale, roster.farthest)
        total += numbers(roster.own_key(self._seed, self.name), len(total))
        for name in names:
            _add_pair(total, roster, self._mask_key, self.name, name)
        self._masked, self._held = (names, total), held
        return total

    def revealed(self, survivors: Collection[str]) -> Rows:
        """[members, SHARE_BYTES] of each survivor the share of its seed, of each that was lost the share of its private
        key. Raises ValueError; TellsTooMuch where other survivors were named before."""
        roster = self._joined()
        if self._masked is None:
            raise ValueError("nothing of this member is in the sum")
        names = roster.known(survivors, self._masked[0])
        if self.name not in names:
            raise ValueError("a sum without this member")
        if self._revealed not in ((), names):
            raise TellsTooMuch("both shares of one member are asked for: once as of one whose part came, once as lost")
        self._revealed = names
        found = np.zeros((len(roster.members), SHARE_BYTES), np.uint8)
        for name, both in self._held.items():
            share = both[:SHARE_BYTES] if name in names else both[SHARE_BYTES:]
            found[roster.places[name]] = np.frombuffer(share, np.uint8)
        return found

    def _joined(self) -> Roster:
        if self._roster is None:
            raise ValueError("shares were not asked for yet")
        return self._roster

    def _box_key(self, roster: Roster, sender: str, receiver: str) -> bytes:
        """Of what one seals for another; one of them is this member."""
        other = receiver if sender == self.name else sender
        secret = agreed(self._seal_key, roster.members[other].keys[:KEY_BYTES])
        return derived(secret, roster.context, f"shares {sender} {receiver}")


def threshold_of(members: int) -> int:
    """Shares that give a secret: two thirds of the members, so more than half. A third may be lost."""
    return -(-2 * members // 3)


def unmasked(
    roster: Roster,
    among: Collection[str],
    survivors: Collection[str],
    total: Integers,
    revealed: Mapping[str, Rows],
) -> Integers:
    """[m] the sum of the survivors' integers, from `total`, that of what they sent. `among` are the members that made
    masks for one another; `revealed`: survivor -> what it gave, from at least a threshold of them. Raises ValueError
    for shares that don't fit."""
    givers = sorted(revealed)[: roster.threshold]
    if len(givers) < roster.threshold:
        raise ValueError(f"shares of {len(givers)} members, {roster.threshold} are needed")
    found: Integers = total.copy()
    for name in roster.known(survivors, among):
        secret = secret_of({roster.places[giver] + 1: _share(revealed[giver], roster, name) for giver in givers})
        found -= numbers(roster.own_key(secret, name), len(found))
    for name in sorted(set(among) - set(survivors)):
        private = secret_of({roster.places[giver] + 1: _share(revealed[giver], roster, name) for giver in givers})
        if public_of(private) != roster.members[name].mask_key:
            raise ValueError(f"shares of the key of {name} that don't fit it")
        for survivor in sorted(survivors):
            _add_pair(found, roster, private, name, survivor)
    return found


def _share(rows: Rows, roster: Roster, name: str) -> bytes:
    share: bytes = rows[roster.places[name]].tobytes()
    return share


def _add_pair(total: Integers, roster: Roster, private: bytes, mine: str, other: str) -> None:
    """What one of a pair adds; of the coordinator, in the place of a member that was lost, what its partner lacks."""
    if mine != other:
        mask = numbers(roster.pair_key(private, mine, other), len(total))
        if mine < other:
            total += mask
        else:
            total -= mask


assert SECRET_BYTES == KEY_BYTES, "seeds and private keys are what is shared"
