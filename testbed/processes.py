"""Children that die with us, whatever ends us.

A child gets SIGKILL from the kernel when its parent ends (PR_SET_PDEATHSIG), so kill -9 of a testbed leaves nobody.
The kernel counts the *thread* that started the child as its parent: start children from a thread that lives as long
as they shall, which is the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import site
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from wire.errors import UsageError

_PR_SET_PDEATHSIG: Final = 1
"""<linux/prctl.h>"""

_libc = ctypes.CDLL(None, use_errno=True)


def start_child(
    arguments: Sequence[str],
    log: IO[bytes] | int,
    environment: Mapping[str, str],
    *,
    enter: Sequence[Path] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own that ends with us; standard output and error go to `log`.

    `enter`: membership files of control groups that it enters first. Raises UsageError if it can't be started.
    """
    before = _before_exec(os.getpid(), [bytes(path) for path in enter])
    try:
        return subprocess.Popen(
            list(arguments),
            stdin=stdin,
            stdout=log if stdout is None else stdout,
            stderr=log,
            env=with_source(environment),
            start_new_session=True,
            preexec_fn=before,  # noqa: PLW1509 - only system calls there: no locks, no imports, no allocation to speak of
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"can't start {arguments[0]}: {error}", try_="is it installed, and executable?") from None


def _before_exec(parent: int, enter: Sequence[bytes]) -> Callable[[], None]:
    def before() -> None:
        for path in enter:
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, b"0")
            os.close(descriptor)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it ended before we asked to be told

    return before


def with_source(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `python -m testbed...` works from any folder.

    An installed package is found anyway; a source tree is put on PYTHONPATH.
    """
    root = str(Path(__file__).resolve().parent.parent)
    if root in site.getsitepackages():
        return dict(environment)
    rest = environment.get("PYTHONPATH", "")
    if root in rest.split(os.pathsep):
        return dict(environment)
    return {**environment, "PYTHONPATH": f"{root}{os.pathsep}{rest}" if rest else root}


def end_group(leader: subprocess.Popen[bytes], number: int) -> None:
    """Signal a child's whole process group; nothing if it is gone."""
    if leader.returncode is None:
        try:
            os.killpg(leader.pid, number)
        except ProcessLookupError:
            return
