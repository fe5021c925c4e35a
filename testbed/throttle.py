"""Boards that get hot: a virtual board is given a share of its speed while it runs, which its agent does not notice."""

from __future__ import annotations

from pathlib import Path

from testbed import state
from testbed.boards import LEAST_SHARE, THROTTLE_FILE
from wire.errors import Refused, UsageError


def slow(state_dir: Path, board: str, share: float) -> None:
    """Let a board of a testbed have a share of its speed; its agent and its profile know nothing of it.

    Raises UsageError, Refused (its limits are the kernel's), CorruptData.
    """
    if not LEAST_SHARE <= share <= 1.0:
        raise UsageError(f"a share of {share:g}", try_=f"{LEAST_SHARE:g} to 1; 1 is all of its speed")
    running = state.load(state_dir)
    boards = [record.spec.name for record in running.boards] if running is not None else []
    if running is None or board not in boards:
        raise UsageError(f"no board {board!r} is up here", try_=f"one of: {', '.join(boards) or 'none'}")
    if running.groups:
        raise Refused("these boards are limited by the kernel", try_="bring them up with --limits emulated")
    path = state_dir / "boards" / board / THROTTLE_FILE
    draft = path.with_suffix(".new")
    draft.write_text(f"{share:g}\n", encoding="ascii")
    draft.replace(path)
