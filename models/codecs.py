"""What codecs cost a model: the report of models.judge, kept beside the pack; and the text that it is measured on.

A report belongs to a checkpoint, a precision and the layout of packs, as the folder does, and to a wire dtype and a
version of the codecs, as its name says. What can't be read is as if it had not been measured.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from models.build.pack import Packed
from models.cache import write_atomic
from wire.codecs import CODEC_VERSION
from wire.errors import UsageError
from wire.messages import CodecName

TOPICS: Final = ("objects", "execmodel", "types", "specialnames")
"""Chapters of the Python Language Reference that every Python carries for `help()`: a text that users have too. They
differ a little from version to version, so reports name the text's digest."""

MAX_TEXT_BYTES: Final = 16 * 1024 * 1024


class CutCost(Struct, frozen=True, kw_only=True):
    """What a codec at some cuts cost. A cut is the number of blocks before it: 0 lies behind the embedding."""

    codec: CodecName
    cuts: tuple[int, ...]
    nats: float
    """Mean surprise at the text's words beyond that of the model as it is."""
    nats_error: float
    """Two standard errors of it: what chance of this text may hide, or show."""
    agreement: float
    """Share of positions at which the likeliest word is the same."""
    logit_error: float
    """Root mean square of the logits' differences."""

    @property
    def at_most(self) -> float:
        return max(0.0, self.nats) + self.nats_error


class CodecTime(Struct, frozen=True, kw_only=True):
    """Seconds to code and decode, on the machine that measured."""

    codec: CodecName
    row_s: float
    chunk_row_s: float
    """Of a row among the rows of a chunk."""


class CodecReport(Struct, frozen=True, kw_only=True):
    """All that was measured of a model at one precision."""

    schema: Literal["edgelam.codecs/1"] = "edgelam.codecs/1"
    codec_version: int
    model: str
    precision: str
    wire_dtype: Literal["f32", "f16", "bf16"]
    hidden: int
    blocks: int
    engine: str
    text: str
    """What the text is, for people."""
    text_digest: str
    tokens: int
    perplexity: float
    """Of the model as it is."""
    costs: tuple[CutCost, ...]
    times: tuple[CodecTime, ...]


class Text(NamedTuple):
    """`name` for people; `digest` of its bytes."""

    name: str
    words: str
    digest: str


def usual_text() -> Text:
    """The text to measure on when none is given; raise UsageError on a Python without it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        words = "\n".join(topics[name] for name in TOPICS)
    except (ImportError, AttributeError, KeyError):
        raise UsageError("this Python comes without its documentation (pydoc_data)", try_="--text FILE") from None
    return _text("Python Language Reference", words)


def text_in(path: Path) -> Text:
    """The text of a file; raise UsageError if it is none."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"{path} has more than {MAX_TEXT_BYTES} bytes", try_="a shorter --text")
        words = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"can't read {path}: {(error.strerror or str(error)).lower()}", try_="another --text"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8", try_="another --text") from None
    return _text(path.name, words)


def _text(name: str, words: str) -> Text:
    return Text(name, words, f"sha256:{hashlib.sha256(words.encode()).hexdigest()}")


def report_path(packed: Packed) -> Path:
    """Where the report of a packed model is, or would be."""
    folder = next(iter(packed.files.values())).parent
    return folder / f"codecs-{packed.graph.wire_dtype}-v{CODEC_VERSION}.json"


def load_report(packed: Packed) -> CodecReport | None:
    """What was measured of a packed model; None if nothing was."""
    try:
        report = msgspec.json.decode(report_path(packed).read_bytes(), type=CodecReport)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None  # never measured, or damaged: measuring is the answer to both
    graph = packed.graph
    measured = report.precision, report.wire_dtype, report.hidden, report.blocks, report.codec_version
    here = graph.precision, graph.wire_dtype, graph.hidden, graph.blocks, CODEC_VERSION
    return report if measured == here else None


def save_report(packed: Packed, report: CodecReport) -> Path:
    """Keep a report; raise OSError if it can't be written."""
    path = report_path(packed)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(report)))
    return path
