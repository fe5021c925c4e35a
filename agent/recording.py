"""`edgelam-agent record` and `info --replay`: what a board's sensors say, taken along and read again elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from wire.errors import ExitCode


def record(output: str | None) -> int:
    """Record this board and say what was removed; needs no root, which reads some sensors more."""
    from hwprofiles import archive
    from hwprofiles.record import SOURCE, take
    from wire.units import bytes_text

    now_unix = time.time()
    path = Path(output or time.strftime("edgelam-recording-%Y%m%d-%H%M%S.tar.gz", time.gmtime(now_unix)))
    recording = take()
    archive.write(recording, path, now_unix)
    size_bytes = sum(map(len, recording.contents.values()))
    print(f"recorded  {len(recording.contents)} files, {bytes_text(size_bytes)}, in {path}")
    removed = ", ".join(f"{what} ({count})" for what, count in sorted(recording.removed.items()))
    print(f"removed   {removed or 'nothing was found that had to be'}; see {SOURCE} in it")
    print(f"check     edgelam-agent info --replay {path}")
    return ExitCode.OK


def replay(recording: str, as_json: bool) -> int:
    """Show what the readers make of a recording; its figures are never taken for this board's."""
    import msgspec

    from hwprofiles import archive, plain, sensors
    from hwprofiles.record import read

    with archive.opened(Path(recording)) as root:
        survey, board, conditions = read(root)
    if as_json:
        shown = {"source": "replayed", "survey": survey, "board": board, "conditions": conditions}
        print(msgspec.json.format(msgspec.json.encode(plain.named(shown))).decode())
        return ExitCode.OK
    print(f"source    REPLAYED from {recording}, not read now")
    for item, value in (*sensors.survey_lines(survey), *sensors.condition_lines(conditions), *sensors.lines(board)):
        print(f"{item:<9} {value}")
    return ExitCode.OK
