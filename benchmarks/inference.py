"""The inference engine in figures, by parts.

    bare      one board and several beside onnxruntime's own call in a loop
    matrix    prompts, requests, boards and links, each figure beside its bound
    links     one stream over links of each kind, through the site's broker and the boards' own
    prompts   time to first token
    requests  several at the same time
    pairs     two deployments beside each other
    stalled   clients that stop reading
    speculate tokens guessed from prompt and answer, over wifi or the link asked for
    codecs    hidden states made smaller, over slow links

Unless parts are asked for, the first two are measured, in about ten minutes. Each part's module (benchmarks/parts) says
what it does and what its bounds are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import msgspec

from benchmarks.parts import bare, codecs, links, matrix, pairs, prompts, requests, speculate, stalled
from benchmarks.parts.sites import LINKS, MODEL, SLOWED, ask, site
from benchmarks.report import Figure, emit, machine
from coordinator.client import Client
from coordinator.inference.requests import GenerateRequest
from models.cache import cache_dir
from models.fetch import fetch
from testbed import links as links_of
from testbed.boards import preset

PARTS = ("bare", "matrix", "links", "prompts", "requests", "pairs", "stalled", "speculate", "codecs")
ORDINARY = ("bare", "matrix")
SOME = matrix.Choice(links=("ethernet", "wifi"), prompts=(32, 512), requests=(1, 8))
"""Cells that are measured unless others are asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=6, help="answers per round and number of boards")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--link", nargs="+", choices=LINKS, help="of bare and speculate (one), matrix and pairs")
    parser.add_argument("--parts", nargs="*", default=ORDINARY, choices=PARTS)
    parser.add_argument("--boards-of", nargs="+", type=int, metavar="N", help="matrix: numbers of boards")
    parser.add_argument("--prompts", nargs="+", type=int, metavar="N", help="matrix: tokens of prompts")
    parser.add_argument("--requests", nargs="+", type=int, metavar="N", help="matrix: requests at the same time")
    parser.add_argument("--full", action="store_true", help="matrix: all 108 cells: 25 minutes; else 24: 7 minutes")
    options = parser.parse_args()
    fetch(MODEL, cache_dir(), lambda text: print(f"... {text}", file=sys.stderr))
    figures: list[Figure] = []
    cells: list[matrix.Cell] = []
    conditions = {**machine(), **vars(options)}
    if "bare" in options.parts:
        raw, rows = bare.beside_the_bare_loop(options)
        figures += rows
        conditions["token_s_and_bare_s"] = raw
    if "matrix" in options.parts:
        cells = table(options)
    if "links" in options.parts:
        figures += over_links(options)
    if "prompts" in options.parts or "requests" in options.parts:
        figures += full_pipelines(options)
    if "pairs" in options.parts:
        for link in options.link or pairs.LINKS:
            figures += pairs.measure(link, options.precision, options.rounds)
    if "stalled" in options.parts:
        figures += stalled.measure(options.precision, options.boards)
    if "speculate" in options.parts:
        figures += guessing(options)
    if "codecs" in options.parts:
        figures += coded(options)
    return 0 if emit("inference", conditions, figures, matrix.figures(cells)) else 1


def table(options: argparse.Namespace) -> list[matrix.Cell]:
    """The matrix, printed row by row as it is measured."""
    some = matrix.Choice() if options.full else SOME
    choice = matrix.Choice(
        links=tuple(options.link or some.links),
        boards=tuple(options.boards_of or some.boards),
        prompts=tuple(options.prompts or some.prompts),
        requests=tuple(options.requests or some.requests),
        tokens=options.tokens,
    )
    print(matrix.heading(), flush=True)
    cells = []
    for cell in matrix.measure(choice, options.precision):
        cells.append(cell)
        print(matrix.line(cell), flush=True)
    print(flush=True)
    return cells


def over_links(options: argparse.Namespace) -> list[Figure]:
    """One stream over each kind of link."""
    rows: list[Figure] = []
    for link in LINKS:
        with site(options.precision, preset("equal", options.boards, link)) as there:

            def one(topology: str, there: Client = there) -> dict[str, Any]:
                return ask(there, options.boards, options.precision, options.tokens, topology=topology)

            found = links.measure(one, ["central", "auto"], options.rounds, options.answers)
            rows += links.figures(link, found, options.boards)
    return rows


def full_pipelines(options: argparse.Namespace) -> list[Figure]:
    """Prompts in chunks, and several requests, over one kind of link; boards are slowed."""
    link, count = "ethernet", options.boards
    spec = links_of.preset(link)
    raw_s = links.one_way_s(link)
    rows: list[Figure] = []
    boards = [msgspec.structs.replace(board, speed=SLOWED) for board in preset("equal", count, link)]
    with site(options.precision, boards) as there:

        def make(**changes: Any) -> GenerateRequest:
            fields = {"ignore_stop": True, "context_tokens": 1024, "objective": "throughput", "slots": 8,
                      "speculate": "off"}  # fmt: skip
            return GenerateRequest(model=MODEL, precision=options.precision, **{**fields, **changes})

        if "prompts" in options.parts:
            one = prompts.measure(there.url, make, 1, options.rounds)
            many = prompts.measure(there.url, make, count, options.rounds)
            [deployment] = there.get("/v1/status")["deployments"]
            rate = spec.rate_bytes_per_s if spec is not None else None
            hidden_bytes = prompts.hidden_bytes_of(deployment["plan"])
            bound_s = prompts.bound_s(there.url, make, count, rate, raw_s, hidden_bytes)
            rows += prompts.figures(link, one, many, count, bound_s)
        if "requests" in options.parts:
            rows += requests.figures(link, there.url, make, count, options.tokens)
            rows += requests.entering(link, there.url, make, count)
    return rows


def guessing(options: argparse.Namespace) -> list[Figure]:
    """One stream with and without guesses."""
    link, count = (options.link or ["wifi"])[0], options.boards
    with site(options.precision, preset("equal", count, link)) as there:

        def make(**changes: Any) -> GenerateRequest:
            return GenerateRequest(
                model=MODEL, precision=options.precision, ignore_stop=True, objective="throughput", context_tokens=1024,
                boards_at_least=count, boards_at_most=count, **changes,
            )  # fmt: skip

        def answer(request: GenerateRequest) -> dict[str, Any]:
            return there.last("/v1/generate", request, lambda text: print(f"... {text}", file=sys.stderr))

        return speculate.figures(link, speculate.measure(answer, make, 2 * options.tokens, options.rounds))


def coded(options: argparse.Namespace) -> list[Figure]:
    """Hidden states in codecs over slow links; boards are slowed."""
    subprocess.run(
        [sys.executable, "-m", "coordinator.cli", "model", "codecs", MODEL, "--precision", options.precision],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    rows = [*codecs.crossings("ethernet"), *codecs.crossings("wifi")]
    for link, spec in codecs.LINKS.items():
        equal = preset("equal", options.boards, "none")
        with site(
            options.precision, [msgspec.structs.replace(board, speed=SLOWED, link=spec) for board in equal]
        ) as there:
            pins = codecs.equal_cut(there, MODEL, options.precision, options.boards)

            def make(**changes: Any) -> GenerateRequest:
                fields = {"ignore_stop": True, "context_tokens": 1024, "speculate": "off"}
                return GenerateRequest(model=MODEL, precision=options.precision, **{**fields, **changes})

            found = codecs.measure(there, make, options.boards, pins, options.rounds, options.tokens)
            rows += codecs.figures(link, found)
    return rows


if __name__ == "__main__":
    sys.exit(main())
