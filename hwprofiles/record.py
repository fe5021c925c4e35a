"""A recording: the files and command output that the readers looked at, in a folder that replays to the same readings.

Only what a reader looked at is in it, so it stays small and holds nothing that nobody asked for. What names a person, a
machine or a network is removed before anything is written, and SOURCE says what was.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from hwprofiles import board, conditions, scrub, survey
from hwprofiles.probe import commands, engines, files, nvidia
from hwprofiles.probe.commands import Runner
from hwprofiles.profile import Snapshot
from hwprofiles.reading import Absent, Failed, Reading
from wire.errors import Refused
from wire.units import bytes_text
from wire.version import VERSION

MAX_RECORDING_BYTES: Final = 4 << 20
"""A recording of a board is below 100 KB; this much means that something is read that should not be."""

MAX_ENTRIES: Final = 20_000
"""Files and folders of a recording; a large server has some hundreds."""

SOURCE: Final = "SOURCE"

LIVE: Final = Path("/")


class Readings(NamedTuple):
    """All that the readers say of a board: what a replay must give again."""

    survey: survey.Survey
    board: board.Board
    conditions: Snapshot


class Recording(NamedTuple):
    """Path -> content of each file, folders that exist though nothing in them was read, and what was removed."""

    contents: dict[str, bytes]
    folders: tuple[str, ...]
    removed: dict[str, int]
    readings: Readings
    """As they were when this was taken, nothing removed."""


def read(root: Path = LIVE, run: Runner | None = None, device: str = "board") -> Readings:
    """Ask every reader once."""
    run = run or commands.runner_for(root)
    return Readings(survey.survey(root, device, run=run), board.read(root, run), conditions.snapshot(root, run))


def take(root: Path = LIVE, run: Runner | None = None, secrets: scrub.Secrets | None = None) -> Recording:
    """Look at everything once and keep it without what is personal; raise Refused if it is larger than 4 MB."""
    secrets = secrets or scrub.live_secrets(root)
    ask = run or commands.runner_for(root)
    answers: dict[tuple[str, ...], Reading[str] | Absent | Failed] = {}

    def once(command: tuple[str, ...]) -> Reading[str] | Absent | Failed:
        if command not in answers:
            answers[command] = ask(command)
        return answers[command]

    with files.watched() as looked:
        readings = read(root, once)
        if root == LIVE:
            files.text(root, "proc/self/status")  # a replay can't ask the scheduler which processors are allowed
    contents = dict(looked.contents)
    contents.update(_commands(answers))
    if root == LIVE:
        contents["proc/sys/kernel/arch"] = os.uname().machine.encode()
        contents[engines.RECORDED] = msgspec.json.encode(readings.survey.engines)
        if not isinstance(readings.board.gpus, Absent):
            contents[nvidia.RECORDED] = msgspec.json.encode(readings.board.gpus)
    scrubber = scrub.Scrubber(secrets)
    unreadable = {path: code for path, code in looked.unreadable.items() if path not in contents}
    folders = [scrubber.text(path) for path, folder in looked.exist.items() if folder]
    for path, folder in looked.exist.items():  # that it is there was all that anybody asked
        if not folder and path not in unreadable:
            contents.setdefault(path, b"")
    kept = {scrubber.text(path): scrubber.content(path, data) for path, data in contents.items()}
    if unreadable:
        lines = [f"{code} /{scrubber.text(path)}" for path, code in sorted(unreadable.items())]
        kept[files.UNREADABLE] = "\n".join([*lines, ""]).encode()
    recording = Recording(kept, tuple(folders), scrubber.removed, readings)
    _bound(len(kept) + len(folders), sum(map(len, kept.values())))
    return recording


def _commands(answers: dict[tuple[str, ...], Reading[str] | Absent | Failed]) -> dict[str, bytes]:
    kept = {}
    for command, answer in answers.items():
        where = commands.file_of(command)
        if isinstance(answer, Reading):
            kept[where] = f"{answer.value}\n".encode()
        elif isinstance(answer, Failed):
            kept[f"{where.removesuffix('.txt')}.failed"] = f"{answer.because}\n".encode()
    return kept


def _bound(entries: int, size_bytes: int) -> None:
    if entries > MAX_ENTRIES or size_bytes > MAX_RECORDING_BYTES:
        raise Refused(
            f"the recording has {entries} entries of {bytes_text(size_bytes)}, "
            f"at most {MAX_ENTRIES} of {bytes_text(MAX_RECORDING_BYTES)} are written"
        )


def source_text(recording: Recording, now_unix: float) -> str:
    """The text of SOURCE: whose capture this is, and what is not in it."""
    day = time.strftime("%Y-%m-%d", time.gmtime(now_unix))
    removed = [f"{what} ({count})" for what, count in sorted(recording.removed.items())]
    return (
        f"Recorded by edgelam-agent record {VERSION} on {day} (UTC), on the board itself.\n"
        "Holds what the readers looked at, and nothing else: files under their own paths, output of programs under\n"
        "commands/, what was there but could not be read in UNREADABLE, and engines as they were installed.\n"
        f"Removed: {', '.join(removed) or 'nothing was found that had to be'}.\n"
        "Addresses of network interfaces and names of processes are never recorded. Common names (nvidia, ubuntu,\n"
        "raspberrypi) and names of one or two letters are kept. Read it before you send it.\n"
        "Licence: none stated; who sends it says under which it may be kept.\n"
    )
