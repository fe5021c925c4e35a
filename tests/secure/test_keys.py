"""What two agree on, what is derived of it, and what a board does that has no `cryptography`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from models.secure.keys import KEY_BYTES, TAG_BYTES, agreed, derived, numbers, opened, public_of, sealed


def test_two_agree_as_in_rfc_7748() -> None:
    """Section 6.1."""
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice_s_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert public_of(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert agreed(bob, alice_s_public).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    other = bytes(range(KEY_BYTES))
    assert agreed(other, public_of(bob)) == agreed(bob, public_of(other))


def test_numbers_are_chacha20_as_in_rfc_8439() -> None:
    """Appendix A.1, test vector 1: key, nonce and counter of zeros."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert numbers(bytes(KEY_BYTES), 8).tobytes().hex() == expected
    assert numbers(bytes(KEY_BYTES), 3).tolist() == numbers(bytes(KEY_BYTES), 8).tolist()[:3]
    assert numbers(bytes(KEY_BYTES), 0).dtype == np.uint32


def test_each_use_and_context_has_a_key_of_its_own() -> None:
    made = {derived(b"s" * 32, context, use) for context in (b"one", b"two") for use in ("mask a b", "mask a c")}
    assert len(made) == 4 and all(len(key) == KEY_BYTES for key in made)


def test_what_was_sealed_is_opened_with_the_same_key_alone() -> None:
    key, other = derived(b"s" * 32, b"", "a"), derived(b"s" * 32, b"", "b")
    box = sealed(key, b"shares")
    assert len(box) == 6 + TAG_BYTES and opened(key, box) == b"shares"
    for wrong_key, wrong_box in ((other, box), (key, box[:-1]), (key, b""), (key, bytes([box[0] ^ 1]) + box[1:])):
        with pytest.raises(ValueError, match="not sealed for this session"):
            opened(wrong_key, wrong_box)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_none(length: int) -> None:
    with pytest.raises(ValueError):
        agreed(bytes(range(32)), b"\x09" * length)


@pytest.mark.torch
def test_a_board_without_cryptography_can_do_other_jobs() -> None:
    pytest.importorskip("torch")
    code = "import sys; sys.modules['cryptography'] = None; import agent.workers.training, agent.service"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
