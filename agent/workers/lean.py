"""Runs a worker without OpenSSL: `python -m agent.workers.lean MODULE`.

paho and the library of hash functions load it wherever it is there, 5 MB in each worker. Workers speak MQTT to brokers
as they are, without TLS, and hash little; Python's own hash functions do for that. Where Python was built
without its own, OpenSSL stays.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import Any, Final

WITHOUT: Final = ("ssl", "_hashlib")
"""None in sys.modules is an ImportError for whoever wants them, as on a Python that was built without OpenSSL."""

OWN_HASHES: Final = (("_sha2", "_sha256"), ("_sha2", "_sha512"), ("_sha1",), ("_md5",), ("_sha3",), ("_blake2",))
"""Of each at least one; the first name is that of Python 3.12 and later."""


def can_do_without() -> bool:
    """Whether Python has hash functions of its own."""
    return all(any(importlib.util.find_spec(name) is not None for name in names) for names in OWN_HASHES)


def main() -> None:
    """Run the module that the command line names."""
    module = sys.argv.pop(1)
    if can_do_without():
        hidden: dict[str, Any] = dict.fromkeys(WITHOUT)
        sys.modules.update(hidden)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
