"""Reading small files under a root, with the reason when there is nothing to read.

Every path that a reader looks at passes through here, so that `watched` knows what a recording must hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, TypeVar

from hwprofiles.reading import Absent, Failed, Reading

T = TypeVar("T")

MAX_FILE_BYTES: Final = 1 << 20
"""Much more than any file read here; a recorded tree is not trusted to be sane."""

_MOST_FILES_BYTES: Final = 4096

MAX_QUOTED: Final = 60
"""Characters of an unreadable value that an error quotes."""

UNREADABLE: Final = "UNREADABLE"
"""File of a recorded tree that names what was there but could not be read: 'EACCES /sys/...', one a line."""


class Looked:
    """What readers looked at: contents of files, reasons of those that could not be read, and names that exist."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.unreadable: dict[str, str] = {}
        self.exist: dict[str, bool] = {}
        """Path -> whether it is a folder."""


_LOOKED: ContextVar[Looked | None] = ContextVar("looked", default=None)


@contextlib.contextmanager
def watched() -> Iterator[Looked]:
    """Collect what is looked at within the block by this thread. A file is then read once: who asks again is given the
    same content, so that all readings are of what is kept."""
    looked = Looked()
    token = _LOOKED.set(looked)
    try:
        yield looked
    finally:
        _LOOKED.reset(token)


def text(root: Path, relative: str) -> Reading[str] | Absent | Failed:
    """Read a file as text without the NULs and white space at its end. `relative` has no leading slash.

    The source is named as the board names it ('/proc/meminfo'), whatever the root.
    """
    shown = f"/{relative}"
    looked = _LOOKED.get()
    try:
        data = looked.contents.get(relative) if looked is not None else None
        if data is None:
            with (root / relative).open("rb") as file:
                data = file.read(_MOST_FILES_BYTES)
                if len(data) == _MOST_FILES_BYTES:  # a buffer for the largest at once would be most of the time
                    data += file.read(MAX_FILE_BYTES - len(data))
    except (FileNotFoundError, NotADirectoryError):
        code = "" if root == Path("/") else _recorded_error(root, relative)
        if not code:
            return Absent(f"no {shown}")
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "error")
    else:
        if looked is not None:
            looked.contents[relative] = data
        return Reading(data.decode("utf-8", "replace").rstrip("\0 \t\r\n"), shown)
    if looked is not None:
        looked.unreadable[relative] = code
    return Failed(f"{code} {shown}")


def _recorded_error(root: Path, relative: str) -> str:
    """Why this file could not be read when the tree was recorded; '' if that is not said."""
    try:
        with (root / UNREADABLE).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_FILE_BYTES).splitlines()
    except OSError:
        return ""
    for line in lines:
        code, _, path = line.partition(" ")
        if path == f"/{relative}":
            return code
    return ""


def parsed(root: Path, relative: str, parse: Callable[[str], T]) -> Reading[T] | Absent | Failed:
    """Read a file and make a value of it; a ValueError of `parse` is a Failed that quotes the text."""
    found = text(root, relative)
    if not isinstance(found, Reading):
        return found
    try:
        return Reading(parse(found.value), found.source)
    except ValueError:
        return Failed(f"{found.source} holds {found.value[:MAX_QUOTED]!r}")


def matches(root: Path, relative: str, pattern: str) -> list[str]:
    """Paths below a folder that match, relative to the root, sorted; none if the folder can't be read (its absence is
    told by `text`). Without pathlib's glob, since samplers call this ten times a second."""
    found = [relative]
    for part in pattern.split("/"):
        found = [f"{folder}/{name}" for folder in found for name in _names(root, folder) if fnmatchcase(name, part)]
    looked = _LOOKED.get()
    if looked is not None:
        looked.exist.update({path: _is_folder(root, path) for path in found})
    return sorted(found)


def _is_folder(root: Path, relative: str) -> bool:
    try:
        return (root / relative).is_dir()
    except OSError:
        return False


def _names(root: Path, folder: str) -> list[str]:
    try:
        with os.scandir(root / folder) as entries:
            return [entry.name for entry in entries]
    except OSError:
        return []


def listed(root: Path, relative: str, pattern: str = "*") -> list[str]:
    """Names in a folder that match, sorted; `pattern` has no slash."""
    return [path.rpartition("/")[2] for path in matches(root, relative, pattern)]


def exists(root: Path, relative: str) -> bool:
    try:
        found = (root / relative).exists()
        looked = _LOOKED.get()
        if found and looked is not None:
            looked.exist[relative] = _is_folder(root, relative)
    except OSError:
        return False
    return found


def whole(text: str) -> int:
    """A whole number of at most 64 bits; raise ValueError for anything else, so that no sum of a few overflows."""
    number = int(text)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(text)
    return number


def number_list(listing: str) -> tuple[int, ...]:
    """'0-2,5' -> (0, 1, 2, 5), as the kernel writes processors; raise ValueError for anything else or above 65,536."""
    numbers: list[int] = []
    for part in filter(None, listing.strip().split(",")):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 65_536:
            raise ValueError(listing)
        numbers.extend(range(low, high + 1))
    return tuple(sorted(set(numbers)))
