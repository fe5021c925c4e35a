"""Messages for people: control messages as one line of JSON, frames by kind, dtype, shape, request and size."""

from __future__ import annotations

from typing import Any

import msgspec

from wire import frames, topics
from wire.drafts import drafts_in
from wire.errors import PeerError
from wire.flow import parse_credit
from wire.rows import rows_in
from wire.transport import Inbound

MAX_SHOWN_CHARACTERS = 400
MAX_SHOWN_ROWS = 8


def row(message: Inbound) -> dict[str, Any]:
    """One message as plain data: topic, bytes, retained, and either `frame`, `json` or `unreadable`."""
    found = topics.match(message.topic)
    base: dict[str, Any] = {
        "topic": message.topic,
        "bytes": len(message.payload),
        "retained": message.retained,
        "message": found[0].message if found else None,
    }
    if found and found[0] is topics.INBOX:
        return {**base, **_frame(message)}
    if found and found[0] is topics.CREDIT:
        return {**base, **_credit(message)}
    try:
        return {**base, "json": msgspec.json.decode(message.payload)} if message.payload else {**base, "json": None}
    except (msgspec.DecodeError, RecursionError) as error:
        return {**base, "unreadable": str(error)}


def _frame(message: Inbound) -> dict[str, Any]:
    try:
        frame = frames.parse(message.payload)
    except PeerError as error:
        return {"unreadable": error.message}
    rows: list[dict[str, Any]] = []
    drafts: tuple[int, ...] = ()
    if frame.flags & frames.FLAG_DRAFTS and frame.chunk == 0:
        try:
            drafts = drafts_in(frame.meta, frame.shape)
        except PeerError as error:
            return {"unreadable": error.message}
    if frame.kind is frames.Kind.ROWS and frame.chunk == 0:
        try:
            found = rows_in(frame.meta, frame.shape)
        except PeerError as error:
            return {"unreadable": error.message}
        rows = [{"request": f"{row.request:016x}", "position": row.position} for row in found]
    return {
        "frame": {
            "kind": frame.kind.name,
            "dtype": frame.dtype.name,
            "shape": list(frame.shape),
            "request": f"{frame.request:016x}",
            "epoch": frame.epoch,
            "position": frame.position,
            "final": bool(frame.flags & frames.FLAG_FINAL),
            "chunk": frame.chunk,
            "chunks": frame.chunks,
            "payload_bytes": len(frame.payload),
            "meta_bytes": len(frame.meta),
            "rows": rows,
            "drafts": list(drafts),
        }
    }


def _credit(message: Inbound) -> dict[str, Any]:
    try:
        credit = parse_credit(message.payload)
    except PeerError as error:
        return {"unreadable": error.message}
    return {"credit": {"stream": f"{credit.stream:016x}", "limit": credit.limit}}


def describe(message: Inbound) -> str:
    """One message as a line."""
    facts = row(message)
    mark = " (retained)" if message.retained else ""
    head = f"{facts['topic']}{mark} {facts['bytes']} B"
    if "frame" in facts:
        frame = facts["frame"]
        shape = "x".join(str(size) for size in frame["shape"])
        chunks = f" chunk {frame['chunk'] + 1}/{frame['chunks']}" if frame["chunks"] > 1 else ""
        final = " final" if frame["final"] else ""
        tensor = f"{head}  {frame['kind']} {frame['dtype']}[{shape}]"
        if frame["rows"]:
            return f"{tensor}{final}{chunks} {_rows_text(frame['rows'])} epoch {frame['epoch']}"
        guessed = ", ".join(map(str, frame["drafts"]))
        return (
            f"{tensor} position {frame['position']}{final}{chunks} "
            f"request {frame['request'][:8]} epoch {frame['epoch']}{f' guessed {guessed}' if guessed else ''}"
        )
    if "credit" in facts:
        return f"{head}  credit up to {facts['credit']['limit']} for stream {facts['credit']['stream'][:8]}"
    if "unreadable" in facts:
        return f"{head}  unreadable: {facts['unreadable']}"
    text = msgspec.json.encode(facts["json"]).decode()
    return f"{head}  {text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + ' ...'}"


def _rows_text(rows: list[dict[str, Any]]) -> str:
    """Whose rows they are: 'requests 1a2b3c4d at 70, 5e6f7a8b at 12'."""
    shown = ", ".join(f"{row['request'][:8]} at {row['position']}" for row in rows[:MAX_SHOWN_ROWS])
    more = f" and {len(rows) - MAX_SHOWN_ROWS} more" if len(rows) > MAX_SHOWN_ROWS else ""
    return f"requests {shown}{more}"
