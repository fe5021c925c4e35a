"""A worker's own memory."""

from __future__ import annotations

import ctypes


def give_back_memory() -> None:
    """Give memory that was freed back to the kernel: loading a stage leaves some MB of it with the C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's; musl has none, and keeps less
        trim(0)
