"""What quantisation costs in words: perplexity and agreement of 4 and 8 bit with float32 on a real text.

    make bench AREA=quality
    make bench AREA=quality ARGS="--tokens 3000 --text other.txt"

What codecs at cuts cost (docs/decisions/0012) is measured by models.judge, on as many tokens as --codec-tokens says.

Teacher-forced: each precision is given the same tokens one by one, as in decoding, and asked for the next. Agreement
is the part of positions where it would say what float32 says. The text is a part of the Python Language Reference
(benchmarks/texts, with its licence); perplexity depends on the text, the ratios hardly do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.engine import whole_model
from benchmarks.report import Figure, at_least, at_most, emit, machine
from models.build.pack import pack
from models.cache import cache_dir
from models.catalog import resolve
from models.codecs import CodecReport, text_in
from models.engine.onnx import OnnxStage
from models.formats.checkpoint import open_checkpoint
from models.judge import judge
from models.text import Tokenizer

TEXT: Final = Path(__file__).parent / "texts" / "python_reference.txt"
WIRE_OF: Final = {"f32": "f32", "int8": "f16", "int4": "f16"}
SURE_BY: Final = 1.0
"""Lead of float32's first choice over its second, in logits, above which another choice would be felt as an error."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--codec-tokens", type=int, default=2000)
    parser.add_argument("--precisions", nargs="*", default=list(WIRE_OF), choices=WIRE_OF, help="for codecs")
    asked = parser.parse_args()
    checkpoint = open_checkpoint(resolve(asked.model, cache_dir()), cache_dir())
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    ids = np.array(tokenizer.encode(asked.text.read_text(encoding="utf-8"))[: asked.tokens], np.int64)
    conditions = machine() | {"model": asked.model, "text": asked.text.name, "tokens": len(ids)}
    judged: dict[str, _Judged] = {}
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        for precision, wire in WIRE_OF.items():
            stage = whole_model(checkpoint, precision, wire, Path(folder), threads, len(ids))
            judged[precision] = _Judged(stage, ids)
            print(f"{precision}: done", file=sys.stderr)
    figures = _figures(judged)
    words = text_in(asked.text)
    ids_of_text = tokenizer.encode(words.words)[: asked.codec_tokens]
    for precision in asked.precisions:
        packed = pack(checkpoint, precision, WIRE_OF[precision], cache_dir())
        figures += _codec_figures(judge(packed, ids_of_text, words, threads, 3600.0, _say))
    return 0 if emit("quality", conditions, figures) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _codec_figures(report: CodecReport) -> list[Figure]:
    """Each codec at the worst single cut, at three cuts, and at all."""
    rows: list[Figure] = []
    for codec in dict.fromkeys(cost.codec for cost in report.costs):
        costs = [cost for cost in report.costs if cost.codec == codec]
        worst = max((cost for cost in costs if len(cost.cuts) == 1), key=lambda cost: cost.nats)
        for what, cost in (
            ("worst cut", worst),
            ("3 cuts", next(cost for cost in costs if len(cost.cuts) == 3)),
            ("all cuts", next(cost for cost in costs if len(cost.cuts) == report.blocks + 1)),
        ):
            name = f"{report.precision}, {codec}, {what}"
            rows += [
                Figure(f"{name}: perplexity", 100 * (np.exp(cost.nats) - 1), "%"),
                Figure(f"{name}: perplexity +-", 100 * cost.nats_error, "%"),
                Figure(f"{name}: agreement", cost.agreement, "of positions"),
                Figure(f"{name}: logits apart", cost.logit_error, "rms"),
            ]
    return rows


class _Judged:
    """What one precision says at each position: `choice` [n], `lead` of it [n], and its perplexity."""

    def __init__(self, stage: OnnxStage, ids: npt.NDArray[np.int64]) -> None:
        slot = stage.open()
        self.choice = np.zeros(len(ids) - 1, np.int64)
        self.lead = np.zeros(len(ids) - 1)
        surprise = np.zeros(len(ids) - 1)
        for position in range(len(ids) - 1):
            logits = stage.step(slot, ids[position : position + 1], position).astype(np.float64)
            second, first = np.partition(logits, -2)[-2:]
            self.choice[position] = int(logits.argmax())
            self.lead[position] = first - second
            surprise[position] = first + np.log(np.exp(logits - first).sum()) - logits[ids[position + 1]]
        self.perplexity = float(np.exp(surprise.mean()))


def _figures(judged: dict[str, _Judged]) -> list[Figure]:
    exact = judged["f32"]
    sure = exact.lead >= SURE_BY
    figures = [Figure("perplexity f32", exact.perplexity, "")]
    # What is promised is what was measured when the formats were chosen, with a little room (docs/decisions/0003).
    for precision, worst, agreed in (("int8", 1.02, 0.95), ("int4", 1.3, 0.75)):
        found = judged[precision]
        same = found.choice == exact.choice
        figures += [
            Figure(f"perplexity {precision}", found.perplexity, ""),
            at_most(f"perplexity {precision} to f32", found.perplexity / exact.perplexity, "x", worst),
            at_least(f"agreement {precision}", float(same.mean()), "of positions", agreed),
            Figure(f"agreement {precision} where f32 is sure", float(same[sure].mean()), "of positions"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(main())
