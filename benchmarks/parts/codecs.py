"""What codecs gain where links are slow: first token of a long prompt and time per token, with and without them.

The same cut in both cases (the plan for throughput, pinned), boards slowed to a share of a core (why:
benchmarks.parts.prompts), answers interleaved. Codecs are those that the planner takes for an error budget of 2 %;
bytes per token are compared with the formula. What they cost in quality is in `make bench AREA=quality`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, Final

import numpy as np

from benchmarks.parts.links import one_way_s, over
from benchmarks.parts.prompts import LONG, prompt
from benchmarks.report import Figure, at_most
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from coordinator.journal import DeployRequest
from testbed.links import WIFI, LinkSpec
from wire.codecs import codecs_for, payload_bytes
from wire.coding import Coder, coder
from wire.frames import header_bytes
from wire.tensors import Tensor

SLOW: Final = LinkSpec(rate_bytes_per_s=2e6 / 8, delay_s=0.005, jitter_s=0.001)
"""A wireless link at the edge of its range."""

LINKS: Final = {"wifi": WIFI, "2 Mbit/s": SLOW}
BUDGETS_PERCENT: Final = (0.0, 2.0)
Make = Callable[..., GenerateRequest]


HIDDEN: Final = 576
"""Of SmolLM2-135M, whose stream is float16."""

CHUNK_ROWS: Final = 64
TRIPS: Final = 15


def crossings(link: str) -> list[Figure]:
    """What rows take from one array to the other over a link of this kind, by plain TCP: coded, sent, decoded."""
    rows: list[Figure] = []
    back_s = one_way_s(link)
    for count in (1, CHUNK_ROWS):
        given = np.random.default_rng(0).standard_normal((count, HIDDEN)).astype(np.float16)
        for codec in codecs_for("f16", HIDDEN):
            size = header_bytes(2) + payload_bytes(codec, "f16", HIDDEN, count)
            with _taker(size) as address, over(link, address) as reached:
                host, _, port = reached.rpartition(":")
                with socket.create_connection((host, int(port)), 10.0) as connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    took_s = median(_crossing_s(connection, coder(codec, "f16", HIDDEN), given) for _ in range(TRIPS))
            what = "a row" if count == 1 else f"{count} rows"
            rows.append(Figure(f"{link}: {what} ({size} bytes), {codec}", (took_s - back_s) * 1e3, "ms"))
    return rows


def _crossing_s(connection: socket.socket, crossing: Coder, given: np.ndarray[Any, Any]) -> float:
    time.sleep(0.05)  # what a shaper lets through at full speed is there again
    began_s = time.perf_counter()
    made: Tensor = crossing.encode(given)
    connection.sendall(bytes(header_bytes(2)) + b"".join(made.buffers))
    connection.recv(1)
    crossing.decode(made)
    return time.perf_counter() - began_s


@contextlib.contextmanager
def _taker(size: int) -> Iterator[str]:
    """Takes messages of this size, and answers each with a byte when it is whole."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                left = size
                while data := connection.recv(left):
                    left -= len(data)
                    if not left:
                        left = size
                        connection.sendall(b"x")

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def equal_cut(there: Client, model: str, precision: str, boards: int) -> tuple[tuple[str, str], ...]:
    """Pins that give the placement for throughput: the ends of each stage on its board."""
    wanted = DeployRequest(
        model=model, precision=precision, objective="throughput", boards_at_least=boards, boards_at_most=boards
    )
    pins: list[tuple[str, str]] = []
    for stage in there.last("/v1/plan", wanted, lambda _text: None)["plan"]["stages"]:
        ends = {stage["first_block"], stage["end_block"] - 1} if stage["end_block"] > stage["first_block"] else set()
        names = ["embedding"] * stage["embedding"] + [f"block.{block}" for block in sorted(ends)]
        pins += [(name, stage["device"]) for name in [*names, *["head"] * stage["head"]]]
    return tuple(pins)


def measure(
    there: Client, make: Make, boards: int, pins: tuple[tuple[str, str], ...], rounds: int, tokens: int
) -> dict[float, list[dict[str, Any]]]:
    """Budget -> ends of answers, with the plan that gave each."""
    found: dict[float, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS_PERCENT}
    for _ in range(rounds):
        for budget, answers in found.items():
            request = make(
                prompt=prompt(LONG), raw=True, max_tokens=tokens, boards_at_least=boards, boards_at_most=boards,
                objective="latency", pins=pins, error_budget_percent=budget,
            )  # fmt: skip
            there.last("/v1/generate", request, lambda _text: None)  # deploys, and warms up
            for _ in range(2):
                answer = there.last("/v1/generate", request, lambda _text: None)
                [deployment] = there.get("/v1/status")["deployments"]
                answers.append({**answer, "plan": deployment["plan"]})
    return found


def figures(link: str, found: dict[float, list[dict[str, Any]]]) -> list[Figure]:
    rows: list[Figure] = []
    plain, coded = found.values()
    names = {"as is": plain, "coded": coded}
    for name, answers in names.items():
        sent = [stage["sent_bytes_per_token"] for stage in answers[-1]["stages"]]
        formula = [stage["formula_bytes"] for stage in answers[-1]["stages"]]
        predicted_s = answers[-1]["plan"]["predicted_first_token_s"]
        rows += [
            Figure(f"{link}, {name}: first token of {LONG}", _median(answers, "time_to_first_token_s"), "s"),
            Figure(f"{link}, {name}: first token, predicted", predicted_s, "s"),
            Figure(f"{link}, {name}: between tokens", _median(answers, "token_s") * 1e3, "ms"),
            Figure(f"{link}, {name}: bytes per token over a cut", sent[0], "bytes", "the formula", sent == formula),
        ]
    used = sorted({stage["codec"] for stage in coded[-1]["plan"]["stages"][:-1]})
    first, token = (_median(coded, key) / _median(plain, key) for key in ("time_to_first_token_s", "token_s"))
    name = f"{link}: between tokens, {' and '.join(used)} / as is"
    soonest = f"{link}: first token, {' and '.join(used)} / as is"
    # Where all crosses as it is in both, the ratio says how far such answers scatter, and nothing else.
    rows_coded = any(stage["row_codec"] != "as-is" for stage in coded[-1]["plan"]["stages"])
    return [
        *rows,
        at_most(soonest, first, "ratio", 1.05) if used != ["as-is"] else Figure(soonest, first, "ratio"),
        at_most(name, token, "ratio", 1.05) if rows_coded else Figure(name, token, "ratio"),
    ]


def _median(answers: list[dict[str, Any]], key: str) -> float:
    return float(median(answer[key] for answer in answers))
