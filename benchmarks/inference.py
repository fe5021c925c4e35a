"""Decode through the whole path, beside the bare onnxruntime loop in the same run.

    control      the whole model in one process: onnxruntime's call in a loop, inputs written, largest logit taken
    1 board      client, broker, one stage
    N boards     the same model cut over N boards of equal speed, links not shaped

Machines are noisy: each answer stands between two runs of the control, and is compared with their mean. Figures are
medians over all answers, ratios medians over the ratios of each with its own control. Every round deploys anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import Figure, at_least, at_most, emit, machine
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from models.build.pack import pack
from models.build.stage import build_stage_graph
from models.cache import cache_dir
from models.catalog import resolve
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
from models.fetch import fetch
from models.formats.checkpoint import open_checkpoint
from testbed import commands
from testbed.boards import BoardSpec, preset
from testbed.site import CoordinatorProcess, until

MODEL = "smollm2"
PROMPT = "Write three sentences about the sea and the people who live by it."
CONTEXT_TOKENS = 512
REFERENCE_BYTES = 220_000
"""What llama.cpp's RPC moves per token for this model: most of it logits."""


def control(precision: str, tokens: int, prompt_tokens: int) -> None:
    """Child process: decode `tokens` tokens with the whole model, one thread; print seconds per token per line in."""
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
    prompt = np.arange(1, prompt_tokens + 1, dtype=np.int64)
    print("ready", flush=True)
    for _ in sys.stdin:
        logits = engine.step(slot, prompt, 0)
        engine.step(slot, prompt[:1], prompt_tokens)  # binds the buffers of a step of one row
        step = engine.bare_run(slot, 1)
        token = np.array([int(logits.argmax())], dtype=np.int64)
        started_s = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + tokens):
            token[0] = step(token, position).argmax()
        print((time.perf_counter() - started_s) / tokens, flush=True)


class Control:
    """The child that runs `control`."""

    def __init__(self, precision: str, tokens: int, prompt_tokens: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.inference", "--control", str(prompt_tokens), "--tokens", str(tokens),
             "--precision", precision],
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


def ask(there: Client, boards: int, precision: str, tokens: int, objective: str = "throughput") -> dict[str, Any]:
    """One answer over exactly so many boards. Equal boards get equal shares for throughput; for one stream alone
    nearly all would go to one."""
    request = GenerateRequest(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=tokens + 1,
        ignore_stop=True,
        precision=precision,
        objective=objective,
        context_tokens=CONTEXT_TOKENS,
        boards_at_least=boards,
        boards_at_most=boards,
    )
    return there.last("/v1/generate", request, lambda text: print(f"... {text}", file=sys.stderr))


@contextlib.contextmanager
def site(precision: str, boards: list[BoardSpec]) -> Iterator[Client]:
    """A coordinator and virtual boards, as processes, all online."""
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        state = Path(folder)
        name = f"bench-{os.getpid()}"
        coordinator = CoordinatorProcess(state, name, ["--model", MODEL, "--precision", precision])
        address = coordinator.start()
        try:
            with (
                commands.up(commands.UpOptions(site=name, boards=boards, state_dir=state / "testbed")),
                Client(address["http_url"]) as there,
            ):

                def all_online() -> bool:
                    states = [device["state"] for device in there.get("/v1/devices")["devices"]]
                    return states.count("online") == len(boards)

                until(all_online, 60.0, "all boards online")
                yield there
        finally:
            coordinator.stop()


def measure(options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """All rounds; gives the answers per number of boards, each with the seconds per token of its control beside it."""
    counts = [1, options.boards]
    answers: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with site(options.precision, preset("equal", options.boards, options.link)) as there:
        first = ask(there, 1, options.precision, 8)
        bare = Control(options.precision, options.tokens, first["prompt_tokens"])
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


def compute_s(answer: dict[str, Any]) -> float:
    return float(sum(stage["measured_compute_s"] for stage in answer["stages"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=6, help="answers per round and number of boards")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--link", default="none", choices=["none", "ethernet", "wifi"])
    parser.add_argument("--control", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.control:
        control(options.precision, options.tokens, options.control)
        return 0
    fetch(MODEL, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    found = measure(options)
    ones, splits = found[1], found[options.boards]
    bare_s = median(answer["bare_s"] for answer in (*ones, *splits))
    one_s, many_s = (median(answer["token_s"] for answer in answers) for answers in (ones, splits))
    ratio_one, ratio_many = (
        median(answer["bare_s"] / answer["token_s"] for answer in answers) for answers in (ones, splits)
    )
    hop_s = median((answer["token_s"] - compute_s(answer)) / options.boards for answer in splits)
    overhead_s = median((answer["token_s"] - answer["bare_s"]) / options.boards for answer in splits)
    prediction = median(answer["predicted_token_s"] / answer["token_s"] for answer in splits)
    stage = splits[-1]["stages"][0]
    hop = stage["sent_bytes_per_token"]
    shaped = options.link != "none"
    figures = [
        Figure("bare onnxruntime loop", 1 / bare_s, "tokens/s"),
        Figure("one board, whole path", 1 / one_s, "tokens/s"),
        Figure(f"{options.boards} boards", 1 / many_s, "tokens/s"),
        # The targets are promised for links that are not shaped: a shaped link has a bound of its own.
        Figure("one board / bare loop", ratio_one, "ratio")
        if shaped
        else at_least("one board / bare loop", ratio_one, "ratio", 0.9),
        Figure(f"{options.boards} boards / bare loop", ratio_many, "ratio")
        if shaped
        else at_least(f"{options.boards} boards / bare loop", ratio_many, "ratio", 0.75),
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
    raw = {
        str(count): [[answer["token_s"], answer["bare_s"]] for answer in answers] for count, answers in found.items()
    }
    conditions = {**machine(), **vars(options), "token_s_and_bare_s": raw}
    return 0 if emit("inference", conditions, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
