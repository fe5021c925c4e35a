"""Decode through the whole path, beside the bare onnxruntime loop in the same run.

    control      the whole model in one process: onnxruntime's call in a loop, inputs written, largest logit taken
                 (a child: `python -m benchmarks.parts.bare PRECISION TOKENS PROMPT_TOKENS QUOTA`)
    1 board      client, broker, one stage
    N boards     the same model cut over N boards of equal quota, QUOTA of a core each; the control has as much

N boards of a whole core each are told too, without a target: on a machine with fewer cores than boards a step of one
stage runs beside the bookkeeping of the others, on boards of their own it doesn't (docs/decisions/0006).

Machines are noisy: each answer stands between two runs of the control, and is compared with their mean. Figures are
medians over all answers, ratios medians over the ratios of each with its own control. Every round deploys anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from agent.workers.stretch import Stretch
from benchmarks.parts.sites import CONTEXT_TOKENS, MODEL, ask, compute_s, site
from benchmarks.report import Figure, at_least, at_most
from models.build.pack import pack
from models.build.stage import build_stage_graph
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
from models.formats.checkpoint import open_checkpoint
from testbed.boards import preset

QUOTA = 0.4
"""Of a core, which each board has: four boards then need less than a machine of two cores has."""

REFERENCE_BYTES = 220_000
"""What llama.cpp's RPC moves per token for this model: most of it logits."""


def control(precision: str, tokens: int, prompt_tokens: int, quota: float) -> None:
    """Child process: decode `tokens` tokens with the whole model, one thread and a quota of a core; print seconds per
    token per line in."""
    checkpoint = open_checkpoint(resolve(MODEL, cache_dir()), cache_dir())
    packed = pack(checkpoint, precision, "f32" if precision == "f32" else "f16", cache_dir())
    graph = packed.graph
    data = build_stage_graph(
        packed.config, precision, graph.wire_dtype, first_block=0, end_block=graph.blocks, embedding=True, head=True
    )
    spec = StageSpec(
        embedding=True,
        head=True,
        first_block=0,
        end_block=graph.blocks,
        hidden=graph.hidden,
        vocabulary=graph.vocabulary,
        wire_dtype=graph.wire_dtype,
        context_tokens=CONTEXT_TOKENS,
        slots=1,
        threads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.onnx"
        path.write_bytes(data)
        engine = OnnxStage.load(path, list(packed.files.values()), spec)
    slot = engine.open()
    stretch = Stretch(quota, 1)
    prompt = np.arange(1, prompt_tokens + 1, dtype=np.int64)
    print("ready", flush=True)
    for _ in sys.stdin:
        logits = engine.step(slot, prompt, 0)
        engine.step(slot, prompt[:1], prompt_tokens)  # binds the buffers of a step of one row
        step = engine.bare_run(slot, 1)
        token = np.array([int(logits.argmax())], dtype=np.int64)
        started_s = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + tokens):
            stretch.begin()
            logits = step(token, position)
            stretch.end("decode", 1, position)
            token[0] = logits.argmax()
        print((time.perf_counter() - started_s) / tokens, flush=True)


class Control:
    """The child that runs `control`."""

    def __init__(self, precision: str, tokens: int, prompt_tokens: int, quota: float) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.parts.bare", precision, str(tokens), str(prompt_tokens), str(quota)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the control process ended early")
        return line.strip()

    def token_s(self) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(10)


def measure(options: argparse.Namespace, counts: Sequence[int], quota: float) -> dict[int, list[dict[str, Any]]]:
    """All rounds; gives the answers per number of boards, each with the seconds per token of its control beside it."""
    answers: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    boards = [msgspec.structs.replace(board, speed=quota) for board in preset("equal", max(counts), link_of(options))]
    with site(options.precision, boards) as there:
        first = ask(there, 1, options.precision, 8)
        bare = Control(options.precision, options.tokens, first["prompt_tokens"], quota)
        try:
            for _ in range(options.rounds):
                for count in counts:
                    ask(there, count, options.precision, 8)
                    before_s = bare.token_s()
                    for _ in range(options.answers):
                        answer = ask(there, count, options.precision, options.tokens)
                        after_s = bare.token_s()
                        answers[count].append({**answer, "bare_s": (before_s + after_s) / 2})
                        before_s = after_s
        finally:
            bare.close()
    return answers


def link_of(options: argparse.Namespace) -> str:
    """The first that was given; none at all is none."""
    return str(options.link[0]) if options.link else "none"


def beside_the_bare_loop(options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    """One board and several beside onnxruntime's own call in a loop: the raw seconds, and rows."""
    whole = measure(options, (1, options.boards), 1.0)
    ones, crowded = whole[1], whole[options.boards]
    splits = measure(options, (options.boards,), QUOTA)[options.boards]
    shown = {"1": ones, f"{options.boards}": crowded, f"{options.boards} of {QUOTA}": splits}
    bare_s, slow_bare_s = (median(answer["bare_s"] for answer in answers) for answers in (ones, splits))
    one_s, many_s = (median(answer["token_s"] for answer in answers) for answers in (ones, splits))
    ratio_one, ratio_crowded, ratio_many = (
        median(answer["bare_s"] / answer["token_s"] for answer in answers) for answers in shown.values()
    )
    hop_s = median((answer["token_s"] - compute_s(answer)) / options.boards for answer in splits)
    overhead_s = median((answer["token_s"] - answer["bare_s"]) / options.boards for answer in splits)
    prediction = median(answer["predicted_token_s"] / answer["token_s"] for answer in splits)
    stage = splits[-1]["stages"][0]
    hop = stage["sent_bytes_per_token"]
    shaped = link_of(options) != "none"
    figures = [
        Figure("bare onnxruntime loop", 1 / bare_s, "tokens/s"),
        Figure("one board, whole path", 1 / one_s, "tokens/s"),
        Figure(f"bare onnxruntime loop, {QUOTA} of a core", 1 / slow_bare_s, "tokens/s"),
        Figure(f"{options.boards} boards of {QUOTA} of a core", 1 / many_s, "tokens/s"),
        # The targets are promised for links that are not shaped: a shaped link has a bound of its own.
        Figure("one board / bare loop", ratio_one, "ratio")
        if shaped
        else at_least("one board / bare loop", ratio_one, "ratio", 0.9),
        Figure(f"{options.boards} boards of {QUOTA} / bare loop of {QUOTA}", ratio_many, "ratio")
        if shaped
        else at_least(f"{options.boards} boards of {QUOTA} / bare loop of {QUOTA}", ratio_many, "ratio", 0.75),
        Figure(f"{options.boards} boards of a core / bare loop", ratio_crowded, "ratio"),
        Figure("compute of all stages", median(map(compute_s, splits)) * 1e3, "ms/token"),
        Figure(
            "compute of all stages / bare loop",
            median(compute_s(answer) / answer["bare_s"] for answer in splits),
            "ratio",
        ),
        Figure("a hop: all but the steps", hop_s * 1e3, "ms"),
        Figure("what a cut adds to the bare loop", overhead_s * 1e3, "ms"),
        Figure("bytes per token per hop", hop, "bytes", "the formula", hop == stage["formula_bytes"]),
        at_most("a hop / llama.cpp RPC", hop / REFERENCE_BYTES, "ratio", 0.01),
        Figure("predicted / measured time per token", prediction, "ratio", "0.75 to 1.25", 0.75 <= prediction <= 1.25),
        Figure("time to first token, split", median(answer["time_to_first_token_s"] for answer in splits), "s"),
    ]
    raw = {name: [[answer["token_s"], answer["bare_s"]] for answer in answers] for name, answers in shown.items()}
    return raw, figures


if __name__ == "__main__":
    control(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
