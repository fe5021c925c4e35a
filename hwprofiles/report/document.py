"""The Report document: profiles of one or several boards with raw samples, figures, and verdicts with reasons.

Markdown, HTML, terminal and CSV are made of this document, and it of profiles. Figures follow from samples: a report
whose figures don't is refused when it is read, so nobody mends a figure by hand unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from hwprofiles import seal
from hwprofiles.profile import Profile, compact, digest
from hwprofiles.report.verdict import Section, Verdict, in_all, sections
from wire.errors import CorruptData, Refused, UsageError
from wire.units import bytes_text
from wire.version import VERSION

MAX_BOARDS: Final = 64
"""Boards of one report: as many as a plan may have."""
MAX_REPORT_BYTES: Final = 32 * 1024 * 1024
"""Largest JSON of a report: 64 profiles of 200 KB, and more than as much again for what is derived from them."""


class BoardReport(Struct, frozen=True, kw_only=True):
    device: str
    profile_digest: str
    """'sha256:...' of the profile's JSON, samples and all."""
    verdict: Verdict
    because: tuple[str, ...]
    sections: tuple[Section, ...]
    profile: Profile


class Report(Struct, frozen=True, kw_only=True):
    """`schema` names version and kind, so that the file explains itself."""

    schema: Literal["edgelam.report/1"] = "edgelam.report/1"
    made_by: str
    """Version of edgelam that derived the figures."""
    made_at_unix: float
    verdict: Verdict
    """INVALID if that of any board is."""
    boards: Annotated[tuple[BoardReport, ...], Meta(max_length=MAX_BOARDS)]
    missing: Annotated[dict[str, str], Meta(max_length=1024)] = {}
    """Boards that were asked for and have no profile, and why."""
    doubted: Annotated[dict[str, str], Meta(max_length=1024)] = {}
    """Boards whose work did not bear out their profiles, in the coordinator's words: these are INVALID for it."""


def make(
    profiles: Sequence[Profile],
    now_unix: float,
    missing: Mapping[str, str] | None = None,
    doubted: Mapping[str, str] | None = None,
) -> Report:
    """Judge profiles and put them into one document. Raises Refused for more than 64."""
    if len(profiles) > MAX_BOARDS:
        raise Refused(f"{len(profiles)} boards: a report takes {MAX_BOARDS}", try_="several reports")
    doubts = dict(doubted or {})
    boards = tuple(_board(compact(profile), doubts.get(profile.identity.device, "")) for profile in profiles)
    return Report(
        made_by=VERSION,
        made_at_unix=now_unix,
        verdict="VALID" if boards and all(board.verdict == "VALID" for board in boards) else "INVALID",
        boards=boards,
        missing=dict(missing or {}),
        doubted=doubts,
    )


def _board(profile: Profile, doubt: str) -> BoardReport:
    judged = sections(profile)
    verdict, because = in_all(profile, judged)
    if doubt:
        verdict, because = "INVALID", (*because, f"not believed: the board {doubt}")
    return BoardReport(
        device=profile.identity.device,
        profile_digest=digest(profile),
        verdict=verdict,
        because=because,
        sections=judged,
        profile=profile,
    )


def encode(report: Report) -> bytes:
    """The report as JSON, keys in a fixed order."""
    return msgspec.json.encode(report, order="deterministic")


def load(path: Path) -> Report:
    """Read a report, or a profile, which becomes a report of one board.

    Raises UsageError if there is no file, CorruptData if it is neither, is too large, of an unknown version, or says
    what does not follow from its samples. Figures that another version of edgelam derived are derived anew.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REPORT_BYTES + 1)
            written_at_unix = os.fstat(file.fileno()).st_mtime
    except OSError as error:
        raise UsageError(
            f"can't read {path}: {(error.strerror or str(error)).lower()}", try_="edgelam bench --json -o FILE"
        ) from None
    if len(data) > MAX_REPORT_BYTES:
        raise CorruptData(f"{path}: larger than any report ({bytes_text(MAX_REPORT_BYTES)})", try_="another file")
    try:
        kind = msgspec.json.decode(data, type=_Kind).schema
        _check_version(kind, path)
        if kind.startswith("edgelam.profile/"):
            profile = msgspec.json.decode(data, type=Profile)
            if seal.broken(data):
                raise CorruptData(
                    f"{path}: it was changed after it was measured", try_="edgelam-agent bench --format json, once more"
                )
            return make([profile], written_at_unix)
        read = msgspec.json.decode(data, type=Report)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptData(
            f"{path}: neither a report nor a profile: {error}", try_="edgelam bench --json -o FILE"
        ) from None
    anew = make([board.profile for board in read.boards], read.made_at_unix, read.missing, read.doubted)
    if read.made_by == VERSION and encode(anew) != encode(read):
        raise CorruptData(
            f"{path}: what it says does not follow from its samples: it was changed after it was made",
            try_="edgelam bench --json -o FILE",
        )
    return anew


class _Kind(Struct):
    schema: str


def _check_version(kind: str, path: Path) -> None:
    """Raise CorruptData for a document of a version that is not read here: a later edgelam has written it."""
    name, _, version = kind.rpartition("/")
    if name in ("edgelam.profile", "edgelam.report") and version != "1":
        raise CorruptData(
            f"{path}: of a later version ({kind[:40]}): edgelam {VERSION} reads {name}/1",
            try_="a newer edgelam here, or a file of this one: edgelam bench --json -o FILE",
        )


def json_schema(kind: type[Struct]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a document, the same on every Python."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_alike(msgspec.json.schema(kind))}


def _alike(value: Any) -> Any:
    """Descriptions in one line, since Pythons differ in the indentation of docstrings, and tuples without what is in
    them in names of types, since Python 3.10 leaves it out."""
    if isinstance(value, list):
        return [_alike(one) for one in value]
    if isinstance(value, str):
        return " ".join(value.replace("tuple_str__...__", "tuple_").replace("[tuple[str, ...]]", "[tuple]").split())
    if not isinstance(value, dict):
        return value
    return {_alike(key): _alike(one) for key, one in value.items()}
