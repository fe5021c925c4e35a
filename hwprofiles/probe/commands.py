"""Running the few programs that know what no file tells, live or replayed from a recorded tree."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

Runner = Callable[[tuple[str, ...]], Reading[str] | Absent | Failed]
"""Gives what a program printed. Absent: there is no such program."""

COMMAND_DEADLINE_S: Final = 2.0
"""Longer than any of these programs takes; a firmware that hangs must not hang the agent."""

ENDLESS: Final = ("tegrastats",)
"""Programs that print until they are stopped: what they said by the deadline is their answer."""


def live(command: tuple[str, ...]) -> Reading[str] | Absent | Failed:
    """Run a program without a shell, with English output, for at most 2 s."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_DEADLINE_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (FileNotFoundError, NotADirectoryError):
        return Absent(f"no program {command[0]}")
    except subprocess.TimeoutExpired as late:
        if command[0] in ENDLESS and late.stdout:
            return Reading(_text(late.stdout), shown)
        return Failed(f"{shown}: no answer within {COMMAND_DEADLINE_S:g} s")
    except OSError as error:
        return Failed(f"{shown}: {error.strerror or error}")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        return Failed(f"{shown}: exit {done.returncode}: {said[: files.MAX_QUOTED]}")
    return Reading(_text(done.stdout), shown)


def none_while_measuring(command: tuple[str, ...]) -> Reading[str] | Absent | Failed:
    """A runner for who measures at the moment: a process for each sample would disturb it."""
    return Absent(f"{command[0]} is not asked while something is measured")


def _text(printed: bytes) -> str:
    return printed[: files.MAX_FILE_BYTES].decode("utf-8", "replace").strip()


def file_of(command: tuple[str, ...]) -> str:
    """Where a recorded tree keeps what a program printed; what it failed with is beside it, as '.failed'."""
    return f"commands/{'-'.join(command)}.txt"


def recorded(root: Path) -> Runner:
    """Give the runner of a recorded tree: `vcgencmd get_throttled` is in commands/vcgencmd-get_throttled.txt.

    A program that the recorded board did not have is absent, as it was there.
    """

    def run(command: tuple[str, ...]) -> Reading[str] | Absent | Failed:
        where = file_of(command)
        found = files.text(root, where)
        if isinstance(found, Reading):
            return Reading(found.value, " ".join(command))
        failed = files.text(root, f"{where.removesuffix('.txt')}.failed")
        if isinstance(failed, Reading):
            return Failed(failed.value)
        return Absent(f"{' '.join(command)} was not recorded") if isinstance(found, Absent) else found

    return run


def runner_for(root: Path) -> Runner:
    """Programs are run only for the live root; another root is a recorded tree."""
    return live if root == Path("/") else recorded(root)
