"""Print what must be installed for `base` or an extra, one requirement a line: `python tools/requirements.py dev`.

Reads pyproject.toml, so that the requirements stand in one place, and follows extras that name each other
(`edgelam[coordinator]`). The build backend comes along, because the project is installed without build isolation.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no tomllib, but every pip carries its twin
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_OWN_EXTRA = re.compile(r"^edgelam\[([a-z,]+)\]$")


def requirements(pyproject: dict[str, Any], extra: str) -> list[str]:
    """Give build, base and extra requirements, sorted, the project itself left out; KeyError for an unknown extra."""
    project = pyproject["project"]
    found = {*pyproject["build-system"]["requires"], *project["dependencies"]}
    waiting = [] if extra == "base" else [extra]
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = _OWN_EXTRA.match(requirement)
            if own:
                waiting.extend(own.group(1).split(","))
            else:
                found.add(requirement)
    return sorted(found)


def main(arguments: list[str]) -> int:
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extra = arguments[0] if arguments else "base"
    try:
        print("\n".join(requirements(pyproject, extra)))
    except KeyError as unknown:
        known = ", ".join(["base", *pyproject["project"]["optional-dependencies"]])
        print(f"requirements: no extra {unknown}; there are: {known}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
