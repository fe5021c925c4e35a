"""So many shares give a secret, fewer say nothing of it."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from models.secure import shamir
from models.secure.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, secret_of, shares_of

secrets = some.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


@given(secrets, some.integers(1, 8), some.integers(0, 4), some.randoms(use_true_random=False))
def test_any_shares_that_are_enough_give_the_secret(
    secret: bytes, threshold: int, more: int, drawn: random.Random
) -> None:
    shares = shares_of(secret, threshold, threshold + more, drawn.randbytes)
    assert all(len(share) == SHARE_BYTES for share in shares)
    chosen = drawn.sample(range(len(shares)), drawn.randint(threshold, len(shares)))
    assert secret_of({place + 1: shares[place] for place in chosen}) == secret


def test_the_prime_is_the_least_one_above_all_secrets() -> None:
    assert 2 ** (8 * SECRET_BYTES) < PRIME < 2 ** (8 * SHARE_BYTES)
    assert _is_prime(PRIME) and not any(_is_prime(number) for number in range(2**256, PRIME))


def test_too_few_shares_fit_every_secret_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a small field, all polynomials tried: whatever two shares of three are, each secret has as many of them."""
    monkeypatch.setattr(shamir, "PRIME", 11)
    seen: dict[tuple[int, int], list[int]] = {}
    for secret, first, second in itertools.product(range(11), repeat=3):
        values = [shamir._value([secret, first, second], x) for x in (1, 2)]
        seen.setdefault((values[0], values[1]), []).append(secret)
    assert len(seen) == 121 and all(sorted(fitting) == list(range(11)) for fitting in seen.values())


@given(secrets, some.integers(0, 2**30))
def test_too_few_or_another_s_give_another_secret(secret: bytes, seed: int) -> None:
    drawn = random.Random(seed)
    shares = shares_of(secret, 3, 4, drawn.randbytes)
    other = shares_of(drawn.randbytes(SECRET_BYTES), 3, 4, drawn.randbytes)
    for wrong in ({1: shares[0], 2: shares[1]}, {1: shares[0], 2: shares[1], 3: other[2]}):
        try:
            assert secret_of(wrong) != secret
        except ValueError as error:
            assert "no secret" in str(error)


@pytest.mark.parametrize(
    "shares", [{}, {0: bytes(SHARE_BYTES)}, {1: bytes(SHARE_BYTES - 1)}, {1: b"\xff" * SHARE_BYTES}]
)
def test_what_can_be_no_share_is_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ValueError):
        secret_of(shares)


@pytest.mark.parametrize(("size", "threshold", "count"), [(31, 2, 3), (32, 0, 3), (32, 4, 3)])
def test_what_can_not_be_shared_is_refused(size: int, threshold: int, count: int) -> None:
    with pytest.raises(ValueError):
        shares_of(bytes(size), threshold, count, random.Random(0).randbytes)


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test, to 40 bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True
