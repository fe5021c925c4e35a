"""Reading small files under a root, with the reason when there is nothing to read."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from hwprofiles.reading import Absent, Failed, Reading

T = TypeVar("T")

MAX_FILE_BYTES: Final = 1 << 20
"""Much more than any file read here; a recorded tree is not trusted to be sane."""

MAX_QUOTED: Final = 60
"""Characters of an unreadable value that an error quotes."""


def text(root: Path, relative: str) -> Reading[str] | Absent | Failed:
    """Read a file as text without the NULs and white space at its end. `relative` has no leading slash.

    The source is named as the board names it ('/proc/meminfo'), whatever the root.
    """
    shown = f"/{relative}"
    try:
        with (root / relative).open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Absent(f"no {shown}")
    except OSError as error:
        return Failed(f"{errno.errorcode.get(error.errno or 0, 'error')} {shown}")
    return Reading(data.decode("utf-8", "replace").rstrip("\0 \t\r\n"), shown)


def parsed(root: Path, relative: str, parse: Callable[[str], T]) -> Reading[T] | Absent | Failed:
    """Read a file and make a value of it; a ValueError of `parse` is a Failed that quotes the text."""
    found = text(root, relative)
    if not isinstance(found, Reading):
        return found
    try:
        return Reading(parse(found.value), found.source)
    except ValueError:
        return Failed(f"{found.source} holds {found.value[:MAX_QUOTED]!r}")


def listed(root: Path, relative: str, pattern: str = "*") -> list[str]:
    """Names in a folder that match, sorted; empty if the folder can't be read (its absence is told by `text`)."""
    try:
        return sorted(path.name for path in (root / relative).glob(pattern))
    except OSError:
        return []


def exists(root: Path, relative: str) -> bool:
    try:
        return (root / relative).exists()
    except OSError:
        return False


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
