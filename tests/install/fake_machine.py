"""A machine that is not there: a root folder and a PATH of shims, so that install.sh can be run by anyone, quickly.

The shims keep their state (users, groups, enabled and running units) as files, and write every call to `calls`. The
shim of Python makes an environment folder and pretends that pip worked.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

SHIMS = {
    "getent": """
        case "$1 $2" in "group video" | "group render") exit 0 ;; esac
        [ -e "$FAKE/$1.$2" ]""",
    "useradd": 'for last; do :; done; touch "$FAKE/passwd.$last" "$FAKE/group.$last"',
    "userdel": 'rm "$FAKE/passwd.$1" "$FAKE/group.$1"',
    "groupdel": 'rm "$FAKE/group.$1"',
    "usermod": 'echo "$3" >>"$FAKE/groups"',
    "id": """
        case $1 in
        -nG) cat "$FAKE/groups" 2>/dev/null || true ;;
        *) exec /usr/bin/id "$@" ;;
        esac""",
    "chown": "true",
    "uname": 'echo "${FAKE_MACHINE:-x86_64}"',
    "systemctl": """
        [ "$1" != --quiet ] || shift
        for last; do :; done
        case $1 in
        is-enabled | is-active) [ -e "$FAKE/$1.$last" ] ;;
        enable) touch "$FAKE/is-enabled.$last" ;;
        disable) rm -f "$FAKE/is-enabled.$last" "$FAKE/is-active.$last" ;;
        restart)
            rm -f "$FAKE/is-active.$last"
            running=$(readlink "$DESTDIR/opt/edgelam/current")
            case $running in *"${FAKE_BROKEN:-none}"*) echo "Job failed"; exit 1 ;; esac
            echo "$running" >"$FAKE/is-active.$last" ;;
        esac""",
    "python3": """
        case "$1 $2" in
        "-c import sys"*) echo "${FAKE_MINOR:-11}" ;;
        "-c import ensurepip"*) [ -z "${FAKE_NO_VENV:-}" ] ;;
        "-m venv")
            for last; do :; done
            mkdir -p "$last/bin"
            cp "$0" "$last/bin/python"
            printf '#!/bin/sh\\necho 0.1.0\\n' >"$last/bin/edgelam-agent"
            chmod +x "$last/bin/edgelam-agent"
            cp "$last/bin/edgelam-agent" "$last/bin/edgelam" ;;
        "-m pip")
            if [ -n "${FAKE_PIP_FAILS:-}" ]; then echo "no matching distribution for numpy"; exit 1; fi ;;
        *) exit 1 ;;
        esac""",
}


class FakeMachine:
    """`run("--site", "lab")` runs install.sh there; `files()` tells what exists."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.fake = folder / "fake"
        shims = folder / "shims"
        for made in (self.root / "run/systemd/system", self.fake, shims):
            made.mkdir(parents=True)
        for name, body in SHIMS.items():
            shim = shims / name
            shim.write_text(f'#!/bin/sh\nset -eu\necho "{name} $*" >>"$FAKE/calls"\n{body}\n')
            shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        self.environment = {
            "PATH": f"{shims}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "DESTDIR": str(self.root),
            "PYTHON": str(shims / "python3"),
            "HOME": str(folder),
        }

    def run(
        self, *arguments: str, given: str = "", script: Path = REPOSITORY / "install.sh", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the installer with `given` on standard input; `settings` (FAKE_...) shape the machine."""
        return subprocess.run(
            ["sh", str(script), *arguments],
            input=given,
            env={**self.environment, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def files(self) -> dict[str, str]:
        """Every file, link and folder under the root, with what it holds."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_symlink():
                text = f"-> {path.readlink()}"
            elif path.is_dir():
                text = "folder"
            else:
                text = path.read_text(errors="replace")
            found[str(path.relative_to(self.root))] = text
        return found

    def calls(self) -> list[str]:
        log = self.fake / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def active_release(self, unit: str = "edgelam-agent.service") -> str:
        """The release that the unit was started from; '' when it does not run."""
        state = self.fake / f"is-active.{unit}"
        return state.read_text().strip() if state.exists() else ""
