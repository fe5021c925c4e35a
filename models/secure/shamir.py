"""A secret in shares: so many of them give it, fewer say nothing of it (Shamir, How to share a secret, 1979). Pure.

The secret is the value at 0 of a polynomial over the integers mod PRIME whose other coefficients are drawn by chance;
share x, counted from 1, is its value at x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

PRIME: Final = 2**256 + 297
"""The least prime above all secrets."""
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33

RandomBytes = Callable[[int], bytes]
"""Gives so many, such as secrets.token_bytes."""


def shares_of(secret: bytes, threshold: int, count: int, random_bytes: RandomBytes) -> list[bytes]:
    """Shares 1 to `count`, of which any `threshold` give the secret."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes in {count} shares of which {threshold} are needed")
    # 16 bytes more than the prime has make what is left uneven by the modulus one part in 2^127.
    drawn = [int.from_bytes(random_bytes(SHARE_BYTES + 15), "little") % PRIME for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "little"), *drawn]
    return [_value(coefficients, x).to_bytes(SHARE_BYTES, "little") for x in range(1, count + 1)]


def secret_of(shares: Mapping[int, bytes]) -> bytes:
    """The secret that enough shares, by their numbers, come from. Raises ValueError for what can be none. Of too few,
    or of one that belongs to another secret, comes another secret: who needs to know has to compare."""
    if not shares or min(shares) < 1:
        raise ValueError("no shares, or one without a number")
    values = {x: int.from_bytes(share, "little") for x, share in shares.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()) or max(values.values()) >= PRIME:
        raise ValueError("a share that can be none")
    total = 0
    for x, value in values.items():
        over = under = 1
        for other in values:
            if other != x:
                over = over * other % PRIME
                under = under * (other - x) % PRIME
        total += value * over * pow(under, -1, PRIME)
    secret = total % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("shares that are of no secret")
    return secret.to_bytes(SECRET_BYTES, "little")


def _value(coefficients: list[int], x: int) -> int:
    """Horner's rule."""
    found = 0
    for coefficient in reversed(coefficients):
        found = (found * x + coefficient) % PRIME
    return found
