"""`edgelam run MODEL --prompt TEXT`: one answer, streamed as it comes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from coordinator.commands.common import (
    AtLeast,
    AtMost,
    CoordinatorUrl,
    Copies,
    ErrorBudget,
    Json,
    ModelName,
    Precision,
    SiteKeyFile,
    Slots,
    Through,
    WhatFor,
    adapter_name,
    aside,
    client,
    model_name,
    print_json,
    status_line,
    write_text,
)
from coordinator.commands.wishes import Engine, Exclude, Load, Pins, Reserve, Weigh, pins_of, weights_of
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.resuming import answer_events
from coordinator.screens.plain import stages_text
from wire.errors import Unreachable, UsageError


def run(
    model: ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; '-' reads it from stdin.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that make up p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    raw: Annotated[bool, typer.Option(help="Send the prompt as it is, without the chat template.")] = False,
    ignore_stop: Annotated[bool, typer.Option(help="Go on after a stop token, to --max-tokens.")] = False,
    precision: Precision = "int4",
    objective: WhatFor = "latency",
    topology: Through = "auto",
    context: Annotated[int, typer.Option(help="Tokens that prompt and answer may have together.")] = 1024,
    slots: Slots = None,
    error_budget: ErrorBudget = 0.0,
    tokens_per_second: Load = None,
    weigh: Weigh = None,
    boards_at_least: AtLeast = 1,
    boards_at_most: AtMost = 64,
    replicas: Copies = 1,
    exclude: Exclude = None,
    pin: Pins = None,
    reserve: Reserve = 10.0,
    engine: Engine = "auto",
    adapter: Annotated[
        str, typer.Option(help="A LoRA adapter: a job of edgelam tune, or ./FOLDER in PEFT's layout.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(help="Seconds without a token after which to give up; the first may take longer, by plan.")
    ] = 30.0,
    recoveries: Annotated[int, typer.Option(help="How often the answer may go on after a loss; 0 ends it.")] = 8,
    recovery_timeout: Annotated[
        float, typer.Option(help="From a loss until the answer must go on, in seconds.")
    ] = 60.0,
    exact: Annotated[
        bool, typer.Option(help="After a loss go on with the very tokens that would have come; takes longer.")
    ] = False,
    speculate: Annotated[
        str,
        typer.Option(
            help="Guess tokens from prompt and answer: off, auto (where links are slow), or 1 to 7 in each round.",
            autocompletion=lambda: ["off", "auto", "7"],
        ),
    ] = "auto",
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Run a prompt through MODEL, planned and deployed first if need be.

    Example: edgelam run smollm2 --prompt "What is the capital of France?" --max-tokens 32
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("no prompt", try_='edgelam run MODEL --prompt "TEXT" (or --prompt - and stdin)')
    request = GenerateRequest(
        model=model_name(model),
        prompt=text,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ignore_stop=ignore_stop,
        precision=precision,
        objective=objective,
        context_tokens=context,
        boards_at_least=boards_at_least,
        boards_at_most=boards_at_most,
        slots=slots,
        topology=topology,
        replicas=replicas,
        tokens_per_s=tokens_per_second,
        weights=weights_of(weigh),
        excluded=tuple(exclude or ()),
        pins=pins_of(pin),
        reserve_percent=reserve,
        engine=engine,
        adapter=adapter_name(adapter),
        error_budget_percent=error_budget,
        stall_timeout_s=timeout,
        recoveries_at_most=recoveries,
        recovery_timeout_s=recovery_timeout,
        exact=exact,
        speculate=speculate,
    )
    end = follow(answer_events(lambda: client(coordinator, site_key_file), request), show=not json)
    if json:
        print_json({"schema": "edgelam.run/1", **{key: value for key, value in end.items() if key != "event"}})
    else:
        print(stages_text(end), file=sys.stderr)


def follow(events: Any, show: bool) -> dict[str, Any]:
    """Show tokens on stdout and status on stderr as they come; give the last event."""
    end: dict[str, Any] = {}
    for event in events:
        kind = event.get("event")
        if kind == "status":
            status_line(event["text"])
        elif kind == "pause":
            aside(f"paused after {event['given']} tokens: {event['reason']}")
        elif kind == "resume":
            aside(f"goes on after {event['pause_s']:.1f} s, on {', '.join(event['boards'])}")
        elif kind == "token" and show:
            write_text(event["text"], end="")
        elif kind == "end":
            end = event
    if show:
        write_text("")
    if not end:
        raise Unreachable("the coordinator ended the answer early", try_="run again")
    return end
