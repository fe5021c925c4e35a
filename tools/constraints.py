"""Write constraints.txt: the versions that the tests passed with, for every supported Python.

    python tools/constraints.py python3.10 python3.11 python3.12 python3.13 > constraints.txt

Each interpreter's own pip resolves the `dev` extra (wheels only), and a version that differs between Pythons gets a
marker. Interpreters must stand in ascending order and need pip 22.2 or newer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
HEADER = """\
# Versions that the tests pass with. Written by: python tools/constraints.py python3.10 .. python3.13
# A constraint asks for nothing by itself: `pip install -c constraints.txt edgelam` still chooses what it needs.
"""


def resolved(interpreter: str) -> tuple[str, dict[str, str]]:
    """Give the interpreter's version ('3.10') and the version of each distribution that `dev` needs on it."""
    version = subprocess.run(
        [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    wanted = subprocess.run(
        [interpreter, str(TOOLS / "requirements.py"), "dev"], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    handle, name = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    report = Path(name)
    try:
        subprocess.run(
            [interpreter, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
            + ["--report", name]
            + [line for line in wanted if line],
            check=True,
            stdout=sys.stderr,
        )
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    finally:
        report.unlink()
    return version, {normal(item["metadata"]["name"]): item["metadata"]["version"] for item in items}


def normal(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def merged(tables: dict[str, dict[str, str]]) -> list[str]:
    """Give constraint lines: no marker where all Pythons agree, else one line for each run of equal versions."""
    lines = []
    pythons = list(tables)
    for name in sorted({name for table in tables.values() for name in table}):
        versions = [tables[python].get(name) for python in pythons]
        if len(set(versions)) == 1:
            lines.append(f"{name}=={versions[0]}")
            continue
        for version in dict.fromkeys(version for version in versions if version):
            holders = [python for python, held in zip(pythons, versions, strict=True) if held == version]
            lines.append(f"{name}=={version} ; {marker(holders, pythons)}")
    return lines


def marker(holders: list[str], pythons: list[str]) -> str:
    """The shortest marker for `holders`, a run of neighbours in `pythons`; open at the ends of the list."""
    if len(holders) == 1 and holders[0] not in (pythons[0], pythons[-1]):
        return f'python_version == "{holders[0]}"'
    parts = []
    if holders[0] != pythons[0]:
        parts.append(f'python_version >= "{holders[0]}"')
    if holders[-1] != pythons[-1]:
        parts.append(f'python_version <= "{holders[-1]}"')
    return " and ".join(parts)


def main(interpreters: list[str]) -> int:
    if not interpreters:
        print(__doc__, file=sys.stderr)
        return 2
    tables = dict(resolved(interpreter) for interpreter in interpreters)
    print(HEADER + "\n".join(merged(tables)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
