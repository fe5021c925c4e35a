"""`edgelam run MODEL --prompt TEXT`: one answer, streamed as it comes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from coordinator.commands.common import (
    CoordinatorUrl,
    Json,
    SiteKeyFile,
    client,
    model_name,
    print_json,
    status_line,
    write_text,
)
from coordinator.inference.requests import GenerateRequest
from coordinator.screens.plain import stages_text
from wire.errors import Unreachable, UsageError


def run(
    model: Annotated[str, typer.Argument(help="Catalog name, path to a .gguf or safetensors, or hf:REPO.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; '-' reads it from stdin.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that make up p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    raw: Annotated[bool, typer.Option(help="Send the prompt as it is, without the chat template.")] = False,
    ignore_stop: Annotated[bool, typer.Option(help="Go on after a stop token, to --max-tokens.")] = False,
    precision: Annotated[str, typer.Option(help="int4, int8 or f32.")] = "int4",
    objective: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    context: Annotated[int, typer.Option(help="Tokens that prompt and answer may have together.")] = 1024,
    boards_at_least: Annotated[int, typer.Option(help="Spread over at least this many boards.")] = 1,
    boards_at_most: Annotated[int, typer.Option(help="Use at most this many boards.")] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a token after which to give up; the first may take longer, by plan.")
    ] = 30.0,
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
        stall_timeout_s=timeout,
    )
    with client(coordinator, site_key_file) as there:
        end = follow(there.stream("/v1/generate", request), show=not json)
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
        elif kind == "token" and show:
            write_text(event["text"], end="")
        elif kind == "end":
            end = event
    if show:
        write_text("")
    if not end:
        raise Unreachable("the coordinator ended the answer early", try_="run again")
    return end
