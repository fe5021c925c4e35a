"""`edgelam`: the coordinator and its clients on the command line.

stdout is data, stderr is messages. Exit codes: wire.errors.ExitCode. A user's mistake gives two lines, never a
traceback; Ctrl-C ends at once and leaves nothing behind.
"""

from __future__ import annotations

import os
import sys

import click
import typer

from coordinator.commands.common import write_text
from coordinator.commands.model import app as model_app
from coordinator.commands.run import run
from coordinator.commands.show import devices, plan
from coordinator.commands.testbed import app as testbed_app
from coordinator.commands.topics import app as topics_app
from wire.errors import EdgelamError, ExitCode, render
from wire.version import VERSION

app = typer.Typer(
    name="edgelam",
    help="One large model on a shelf of unequal edge boards.\n\n"
    "Try first: edgelam demo. Then: edgelam up on one machine, edgelam-agent run on each board, "
    'edgelam run smollm2 --prompt "Hello".',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=True,
)
app.command()(devices)
app.command()(plan)
app.command()(run)
app.add_typer(model_app, name="model")
app.add_typer(testbed_app, name="testbed")
app.add_typer(topics_app, name="topics")


@app.command()
def version() -> None:
    """Print the version."""
    write_text(VERSION)


def _add_heavier_commands() -> None:
    """Commands in files of their own that import more."""
    from coordinator.commands.bench import bench
    from coordinator.commands.demo import demo
    from coordinator.commands.top import top
    from coordinator.commands.up import up

    for command in (up, top, bench, demo):
        app.command()(command)


def main() -> None:
    """Entry point: run the command line, turn errors into two lines and an exit code."""
    _add_heavier_commands()
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else int(ExitCode.OK))
    except EdgelamError as error:
        print(render(error), file=sys.stderr)
        sys.exit(int(error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        print("edgelam: interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except BrokenPipeError:
        # The reader of our output went away: not an error of anyone. Keep the interpreter from flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.OK))
    except click.ClickException as error:
        error.show()
        sys.exit(int(ExitCode.USAGE))


if __name__ == "__main__":
    main()
