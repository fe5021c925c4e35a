"""What boards agree on in pairs, and the numbers that come of it: X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869),
ChaCha20 as a stream of numbers and ChaCha20-Poly1305 to seal (RFC 8439). The one module that knows `cryptography`.

Every key is derived for one use: `context` says for which session, with all that its members are told of it, and `use`
for what in it. So a nonce of zeros is used once with each.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Integers = npt.NDArray[np.uint32]

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
_COUNTER_AND_NONCE: Final = bytes(16)
_NONCE: Final = bytes(12)


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes) -> bytes:
    """What both of two come to, each with its own private key. Raises ValueError for a public key that is none."""
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def derived(secret: bytes, context: bytes, use: str) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"edgelam secure " + context + use.encode()).derive(secret)


def numbers(key: bytes, count: int) -> Integers:
    """[count] that nobody without the key can tell from chance."""
    stream = Cipher(ChaCha20(key, _COUNTER_AND_NONCE), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def sealed(key: bytes, data: bytes) -> bytes:
    """TAG_BYTES longer."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, data, None)


def opened(key: bytes, data: bytes) -> bytes:
    """Raises ValueError for what was not sealed with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, data, None)
    except InvalidTag:
        raise ValueError("something that was not sealed for this session") from None
