"""Guessing tokens from prompt and answer, over slow links: on texts that repeat their prompt and on others.

Every text is answered without guesses, with at most one and with at most seven in steps of two rows or more, and as
plan and text have it (auto). Ratios are within a round. One guess and seven give one answer, since their steps are of
one class; auto gives one answer in all rounds, since it does not go by times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.report import Figure, at_least
from coordinator.inference.requests import GenerateRequest

Make = Callable[..., GenerateRequest]
Ask = Callable[[GenerateRequest], dict[str, Any]]

CODE = '''def read_settings(path):
    """Read a file of settings, one per line, and give them as a dictionary."""
    settings = {}
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, separator, value = line.partition("=")
            if not separator:
                raise ValueError(f"line {number} of {path} has no value")
            settings[name.strip()] = value.strip()
    return settings
'''
BEGUN = "".join(CODE.replace("read_settings", "load_settings").splitlines(keepends=True)[:5])
NEWS = (
    "The harbour of Lindow was closed for three days after the storm of last Tuesday tore two of its cranes from their "
    "rails. The harbour master, Ann Keller, said that nobody was hurt, and that the smaller of the two cranes can be "
    "used again by the end of the month. Eleven ships waited in the bay; four of them went on to Marlow. The town "
    "expects the repairs to cost two million crowns, half of which its insurance will pay."
)

REPEATS: dict[str, dict[str, Any]] = {
    "code edit": {
        "prompt": f"# Before:\n{CODE}\n# After, with another name:\n{BEGUN}",
        "raw": True,
    },
    "summary": {"prompt": f"News: {NEWS}\n\nThe news again, word by word: The harbour of Lindow", "raw": True},
}
"""Texts that repeat their prompt."""

OTHERS: dict[str, dict[str, Any]] = {
    "prose": {"prompt": "Write three sentences about the sea and the people who live by it."},
    "prose, drawn": {"prompt": "Tell me about a day in a small town.", "temperature": 1.0, "seed": 11},
}
MODES = ("off", "1", "7", "auto")


def measure(ask: Ask, make: Make, tokens: int, rounds: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Answers by text and mode, interleaved."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(rounds + 1):
        for name, text in (REPEATS | OTHERS).items():
            for mode in MODES:
                answer = ask(make(**text, max_tokens=tokens + 1, speculate=mode))
                if turn:  # the first one warms up
                    found.setdefault((name, mode), []).append(answer)
                    print(f"... {name}, {mode}: {answer['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return found


def figures(link: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Figure]:
    rows: list[Figure] = []
    for name in REPEATS | OTHERS:
        plain = found[name, "off"]
        rows.append(Figure(f"{link}, {name}: off", median(answer["tokens_per_s"] for answer in plain), "tokens/s"))
        for mode in MODES[1:]:
            answers = found[name, mode]
            ratio = median(
                answer["tokens_per_s"] / other["tokens_per_s"] for answer, other in zip(answers, plain, strict=True)
            )
            what = f"{link}, {name}: {mode} / off"
            sent = sum(answer["drafts_sent"] for answer in answers)
            if name in REPEATS and mode != "1":
                rows.append(at_least(what, ratio, "ratio", 1.5))
            elif mode == "auto":
                rows.append(at_least(what, ratio, "ratio", 0.95))
            else:
                rows.append(Figure(what, ratio, "ratio"))
            right = sum(answer["drafts_accepted"] for answer in answers) / sent if sent else 0.0
            rows.append(Figure(f"{link}, {name}: {mode}, guesses that were right", right, "share"))
        again = {tuple(answer["token_ids"]) for answer in found[name, "auto"]}
        rows.append(at_least(f"{link}, {name}: one answer of auto in all rounds", float(len(again) == 1), "", 1))
        same = {tuple(answer["token_ids"]) for mode in ("1", "7") for answer in found[name, mode]}
        rows.append(at_least(f"{link}, {name}: one answer in steps of two rows and more", float(len(same) == 1), "", 1))
    return rows
