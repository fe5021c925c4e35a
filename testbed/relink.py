"""Links that change: a virtual board gets another link while it runs, from any command, which it does not notice.

Who asks writes the new link into the board's folder, and the keeper, whose links they are, looks there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from testbed import state
from testbed.boards import BoardSpec
from testbed.links import LinkSpec, checked_link
from testbed.shaper import Shaper
from wire.errors import EdgelamError, Refused, UsageError

LOG = logging.getLogger("edgelam.testbed")

LINK_FILE: Final = "link"
LOOK_PERIOD_S: Final = 0.2
MAX_LINK_BYTES: Final = 4096


def relink(state_dir: Path, board: str, spec: LinkSpec | None) -> LinkSpec:
    """Give a board of a testbed another link, or with None the one that it was brought up with; gives what it has then.

    Raises UsageError, Refused (it has no shaped link), CorruptData.
    """
    running = state.load(state_dir)
    boards = {record.spec.name: record.spec for record in running.boards} if running is not None else {}
    if board not in boards:
        raise UsageError(f"no board {board!r} is up here", try_=f"one of: {', '.join(boards) or 'none'}")
    first = boards[board].link
    if first is None:
        raise Refused(f"{board} has no link that could be changed", try_="edgelam testbed up --link ethernet")
    wanted = checked_link(spec or first)
    path = state_dir / "boards" / board / LINK_FILE
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(wanted))
    draft.replace(path)
    return wanted


async def follow(folder: Path, boards: Iterable[BoardSpec], shaper: Shaper) -> None:
    """Give links what is written for them, for ever."""
    paths = {board.name: folder / "boards" / board.name / LINK_FILE for board in boards if board.link is not None}
    seen: dict[str, bytes] = {}
    while True:
        for name, path in paths.items():
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_LINK_BYTES)
            except OSError:
                continue  # nothing was asked for
            if data == seen.get(name):
                continue
            seen[name] = data
            try:
                shaper.link(name).change(msgspec.json.decode(data, type=LinkSpec))
            except (EdgelamError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                LOG.warning("%s: %s", path, error)
        await asyncio.sleep(LOOK_PERIOD_S)
