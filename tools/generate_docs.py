"""Write the pages of docs/ that are tables of the code: `python tools/generate_docs.py`, or `--check` to compare only.

A fact stands in one place. Topics, exit codes, the agent's settings and the shape of reports stand in the code; these
pages are made from them, and a test compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from agent.config import SETTINGS
from hwprofiles.report.compare import Comparison
from hwprofiles.report.document import Report, json_schema
from wire import errors, topics

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "<!-- Made by tools/generate_docs.py from {source}: change it there. -->"

WHAT_CODES_MEAN = {
    errors.ExitCode.OK: "done",
    errors.ExitCode.FAILED: "it failed, or a file, an artifact or a message from the network is damaged",
    errors.ExitCode.USAGE: "the command line, or a file that it names, is wrong",
    errors.ExitCode.REFUSED: "a rule says no: unsupported model, too little memory on the boards, identity in use",
    errors.ExitCode.UNREACHABLE: "broker, coordinator or device can't be reached",
    errors.ExitCode.DEGRADED: "it worked, but not all of it",
    errors.ExitCode.INTERRUPTED: "ended by Ctrl-C; nothing is left running",
}


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def topics_page() -> str:
    rows = [
        (
            f"`{row.template}`",
            f"`{row.message}`",
            str(row.qos),
            "yes" if row.retained else "no",
            row.writer.value,
            row.what,
            row.tells.value,
        )
        for row in topics.TABLE
    ]
    return f"""{MADE.format(source="wire/topics.py")}
# Topics

All that crosses the brokers. Retained topics say what is; the others say what happens. Control messages are JSON with
a version `v` and can be read with any MQTT client; tensors under `act/` are binary frames, shown by
`edgelam topics tail` as shape and type. Nothing is sent at QoS 2. Where the plan is `direct`, activations cross the
brokers of boards, not the site's; `topics tail` listens there, too, and begins such lines with the board's name.

{table(("topic", "message", "QoS", "retained", "who may write", "what", "of a board's data"), rows)}"""


def exit_codes_page() -> str:
    rows = [(str(int(code)), code.name.lower(), WHAT_CODES_MEAN[code]) for code in errors.ExitCode]
    return f"""{MADE.format(source="wire/errors.py")}
# Exit codes

Both programs, `edgelam` and `edgelam-agent`, end with one of these. An error is two lines on stderr: what happened, and
after `try:` what to do.

{table(("code", "name", "meaning"), rows)}"""


def settings_page() -> str:
    rows = [(f"`--{row.flag} {row.metavar}`", f"`{row.variable}`", f"`{row.flag}`", row.what) for row in SETTINGS]
    return f"""{MADE.format(source="agent/config.py")}
# Settings of the agent

A flag of `edgelam-agent` wins over its environment variable, that over the key in the configuration file
(`--config FILE`, `EDGELAM_CONFIG`, else `/etc/edgelam/agent.json`), and that over the default. The service reads its
variables from `/etc/edgelam/agent.env`.

{table(("flag", "variable", "key", "what"), rows)}"""


def schema_text(kind: type[Struct]) -> str:
    """The JSON Schema of a document, keys sorted."""
    return json.dumps(json_schema(kind), indent=1, sort_keys=True) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "topics.md": topics_page,
    "exit-codes.md": exit_codes_page,
    "agent-settings.md": settings_page,
    "report.schema.json": lambda: schema_text(Report),
    "comparison.schema.json": lambda: schema_text(Comparison),
}


def main(arguments: list[str]) -> int:
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
    if stale:
        print(f"not as the code says: {', '.join(stale)}; try: python tools/generate_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
