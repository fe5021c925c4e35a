"""Removing what names a person, a machine or a network from recorded text and paths.

Replaced, not cut, and the same text always by the same word: a path that one file names must still be there under its
new name. Words that say nothing about anybody (the user 'nvidia', a host called 'raspberrypi') stay, since they are
part of readings.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Reading

FEWEST_CHARACTERS: Final = 3
"""Shorter names would be found in the middle of figures and words."""

COMMON_NAMES: Final = frozenset(
    (
        *("root", "user", "board", "host", "localhost", "linux", "arm", "edgelam"),
        *("nvidia", "jetson", "orin", "nano", "ubuntu", "debian", "raspberry", "raspberrypi"),
    )
)
"""Names that thousands of boards have."""

_SERIAL_FILES: Final = (
    "proc/device-tree/serial-number",
    "etc/machine-id",
    *(f"sys/class/dmi/id/{name}" for name in ("product_serial", "board_serial", "chassis_serial", "product_uuid")),
)

_MAC = re.compile(r"(?<![0-9A-Fa-f:-])[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}(?![0-9A-Fa-f:-])")
_MAC_NAME = re.compile(r"\b(enx|wlx)([0-9a-f]{12})\b")
_UUID = re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
_LONG_ID = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{32,64}(?![0-9A-Za-z])")
_V4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
_V6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?![\w:])")

CUT: Final = {
    "proc/self/mountinfo": (re.compile(r" - cgroup2? "), "mounts other than control groups"),
    "proc/self/status": (re.compile(r"^Cpus_allowed"), "the process's status but for its processors"),
    "proc/cpuinfo": (re.compile(r"^(?!Serial\b)"), "serial number in cpuinfo"),
}
"""File -> which of its lines are kept, and what the others are."""

VERSIONS: Final = ("engines.json", "nvml.json")
"""Files in which four numbers with dots between them are versions, not addresses."""


class Secrets(NamedTuple):
    names: tuple[str, ...]
    """Of host and users."""
    serials: tuple[str, ...]


def live_secrets(root: Path = Path("/")) -> Secrets:
    """Names and numbers of this machine, as far as this user may see them; none for a recorded tree."""
    if root != Path("/"):
        return Secrets((), ())
    host = socket.gethostname()
    names = {host, host.partition(".")[0], *(os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER"))}
    with contextlib.suppress(KeyError):  # a container may run under a number that has no name
        names.add(pwd.getpwuid(os.getuid()).pw_name)
    names.add(Path.home().name)
    serials = (files.text(root, path) for path in _SERIAL_FILES)
    return Secrets(_worth(names), _worth(found.value.strip() for found in serials if isinstance(found, Reading)))


def _worth(words: Iterable[str]) -> tuple[str, ...]:
    """Longest first, so that no word is replaced within another."""
    kept = {word for word in words if len(word) >= FEWEST_CHARACTERS and word.lower() not in COMMON_NAMES}
    return tuple(sorted(kept, key=lambda word: (-len(word), word)))


class Scrubber:
    """Replaces, and counts what it replaced in `removed`: kind -> how many different ones."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._words: dict[tuple[str, str], str] = {}
        self._cut: set[str] = set()

    @property
    def removed(self) -> dict[str, int]:
        found = dict.fromkeys(sorted(self._cut), 1)
        for kind, _ in self._words:
            found[kind] = found.get(kind, 0) + 1
        return found

    def content(self, path: str, data: bytes) -> bytes:
        """The content of a file, NULs and bytes that are no text kept."""
        text = data.decode("utf-8", "surrogateescape")
        if path in CUT:
            keep, what = CUT[path]
            lines = text.splitlines(keepends=True)
            kept = [line for line in lines if keep.search(line)]
            if len(kept) < len(lines):
                self._cut.add(what)
            text = "".join(kept)
        return self.text(text, addresses=path not in VERSIONS).encode("utf-8", "surrogateescape")

    def text(self, text: str, addresses: bool = True) -> str:
        for serial in self._secrets.serials:
            if serial in text:
                text = text.replace(serial, self._word("serial number", serial))
        for name in self._secrets.names:
            pattern = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
            text = re.sub(pattern, lambda found: self._word("name of host or user", found[0]), text)
        text = _UUID.sub(lambda found: self._word("identifier", found[0]), text)
        text = _LONG_ID.sub(lambda found: self._word("identifier", found[0]), text)
        text = _MAC_NAME.sub(lambda found: f"{found[1]}{self._count('MAC address', found[2]):012d}", text)
        text = _MAC.sub(lambda found: f"00:00:00:00:00:{self._count('MAC address', found[0]) % 256:02x}", text)
        return _V6.sub(self._address, _V4.sub(self._address, text)) if addresses else text

    def _address(self, found: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(found[0])
        except ValueError:
            return found[0]  # a time, a version
        return found[0] if address.is_unspecified or address.is_loopback else self._word("IP address", found[0])

    def _word(self, kind: str, secret: str) -> str:
        return f"removed-{kind.partition(' ')[0].lower()}-{self._count(kind, secret)}"

    def _count(self, kind: str, secret: str) -> int:
        if (kind, secret) not in self._words:
            number = sum(other == kind for other, _ in self._words) + 1
            self._words[kind, secret] = str(number)
        return int(self._words[kind, secret])
