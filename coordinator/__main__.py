"""The door of `edgelam`: Ctrl-C is heard from the first moment, though the commands take half a second to import."""

from __future__ import annotations

import sys

from wire.errors import ExitCode


def main() -> None:
    """Run the command line; exits with its exit code."""
    try:
        from coordinator.cli import main as run
    except KeyboardInterrupt:
        print("edgelam: interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    run()


if __name__ == "__main__":
    main()
