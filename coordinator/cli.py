"""`edgelam`: the coordinator and its clients on the command line.

stdout is data, stderr is messages. Exit codes: wire.errors.ExitCode. A user's mistake gives two lines, never a
traceback; Ctrl-C ends at once and leaves nothing behind.
"""

from __future__ import annotations

import functools
import signal
import sys
from typing import Annotated, Final

import typer

from coordinator.commands.common import Json, print_json, write_text
from coordinator.commands.model import app as model_app
from coordinator.commands.run import run
from coordinator.commands.show import devices, plan
from coordinator.commands.testbed import app as testbed_app
from coordinator.commands.topics import app as topics_app
from wire.errors import EdgelamError, ExitCode, UsageError, render
from wire.version import PROTOCOL, VERSION

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

CommandLineError: Final[type[Exception]] = typer.BadParameter.__mro__[2]
"""What typer raises for a wrong command line: click's ClickException, of the click that typer uses. Recent versions
carry one inside themselves, so importing click would name another class."""


@app.command()
def version(json: Json = False) -> None:
    """Print the version."""
    if json:
        print_json({"schema": "edgelam.version/1", "version": VERSION, "protocol": PROTOCOL})
    else:
        write_text(VERSION)


def _version_and_end(wanted: bool) -> None:
    if wanted:
        write_text(VERSION)
        raise typer.Exit(int(ExitCode.OK))


@app.callback()
def _before_any_command(
    version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version_and_end, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version_wanted  # its callback has done all there is to do


@functools.cache
def _add_heavier_commands() -> None:
    """Commands in files of their own that import more; once."""
    from coordinator.commands.bench import bench
    from coordinator.commands.demo import demo
    from coordinator.commands.items import embed, infer
    from coordinator.commands.label import label
    from coordinator.commands.report import app as report_app
    from coordinator.commands.top import top
    from coordinator.commands.tune import tune
    from coordinator.commands.up import up

    for command in (up, top, bench, demo, embed, label, infer, tune):
        app.command()(command)
    app.add_typer(report_app, name="report")


def main() -> None:
    """Entry point: run the command line, turn errors into two lines and an exit code."""
    _add_heavier_commands()
    try:
        code = app(standalone_mode=False, prog_name="edgelam")
        if code == ExitCode.INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else int(ExitCode.OK))
    except EdgelamError as error:
        print(render(error), file=sys.stderr)
        sys.exit(int(error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, while the interpreter ends, changes nothing
        print("edgelam: interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except CommandLineError as error:
        _tell(error)
        sys.exit(int(ExitCode.USAGE))


def _tell(error: Exception) -> None:
    """Two lines for a wrong command line; the help where there was no command at all."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(str(error), file=sys.stderr)
        return
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "edgelam"
    words = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    print(render(UsageError(words, try_=f"{where} --help")), file=sys.stderr)


if __name__ == "__main__":
    main()
