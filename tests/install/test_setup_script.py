"""tools/setup.sh: which Python it takes, what it says where none will do, and that it is quick when all is ready."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


TOOLS = (
    *("cat", "chmod", "cut", "dirname", "env", "find", "flock", "grep", "ls", "mkdir", "mktemp", "mv", "printf", "rm"),
    *("sh", "sha256sum", "tail", "uname"),
)
"""What any Linux has, besides Python."""


class Clone:
    """A clone with nothing but what setup.sh reads, and a PATH in which only the given Pythons stand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.shims = folder / "shims"
        self.cache = folder / "cache"
        (self.folder / "tools").mkdir(parents=True)
        self.shims.mkdir()
        for name in ("tools/setup.sh", "tools/requirements.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, self.folder / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            if found:
                (self.shims / tool).symlink_to(found)

    def python(self, name: str, says: str, then: str = "exit 1") -> Path:
        """A Python that answers the probe with `says`, for example '11 ready'; `then` runs for anything else."""
        shim = self.shims / name
        log = self.folder.parent / "calls"
        shim.write_text(f'#!/bin/sh\necho "$0 $*" >>"{log}"\nif [ "$1" = - ]; then echo "{says}"; exit; fi\n{then}\n')
        shim.chmod(0o755)
        return shim

    def setup(self, extra: str = "demo", **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.shims), "HOME": str(self.cache), "EDGELAM_CACHE": str(self.cache), **settings}
        return subprocess.run(
            ["sh", str(self.folder / "tools/setup.sh"), extra], env=environment, capture_output=True, text=True
        )


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a user sees when it won't do: one line, and exit code 2."""
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_too_old_a_python_is_said_in_one_line_with_the_remedy(clone: Clone) -> None:
    clone.python("python3", "9 ready")
    line = the_line(clone.setup())
    assert "needs Python 3.10 to 3.13, but python3 is Python 3.9" in line
    assert "sudo apt install python3" in line


def test_no_python_is_said_in_one_line_with_the_remedy(clone: Clone) -> None:
    line = the_line(clone.setup())
    assert "python3 is not there" in line
    assert "sudo apt install python3 python3-venv" in line


def test_a_missing_venv_module_is_said_in_one_line_with_the_remedy(clone: Clone) -> None:
    clone.python("python3", "12 no-venv")
    assert the_line(clone.setup()).endswith("Python 3.12 has no venv module; try: sudo apt install python3.12-venv")


def test_a_python_that_is_too_new_is_passed_over_for_one_that_will_do(clone: Clone) -> None:
    clone.python("python3", "14 ready")
    clone.python("python3.12", "12 ready", then="echo chosen; exit 1")
    assert "venv failed" in clone.setup().stderr
    assert "python3.12 -m venv" in (clone.folder.parent / "calls").read_text()


def test_the_given_python_is_the_only_one_asked(clone: Clone) -> None:
    clone.python("python3", "12 ready")
    other = clone.python("other", "9 ready")
    assert f"{other} is Python 3.9" in the_line(clone.setup(PYTHON=str(other)))


@pytest.fixture
def ready(clone: Clone) -> Clone:
    """A clone whose Python pretends to make environments and to install; `python -m pip download` brings one wheel."""
    clone.python(
        "python3",
        "11 ready",
        then="""
        case "$*" in
        "-m venv"*)
            for last; do :; done
            mkdir -p "$last/bin"; cat "$0" >"$last/bin/python"; chmod 755 "$last/bin/python" ;;
        "-c import platform"*) echo cp311-test ;;
        *"pip download"*)
            [ -z "${NO_NETWORK:-}" ] || exit 1
            while [ "$1" != --dest ]; do shift; done; echo wheel >"$2/thing-1-py3-none-any.whl" ;;
        *"pip install"*--requirement*)
            [ -z "${BREAK_INSTALL:-}" ] || exit 1
            while [ "$1" != --find-links ]; do shift; done; [ -e "$2/thing-1-py3-none-any.whl" ] ;;
        esac""",
    )
    return clone


def calls(clone: Clone) -> str:
    """Calls of Python since the last time this was asked."""
    log = clone.folder.parent / "calls"
    text = log.read_text() if log.exists() else ""
    log.write_text("")
    return text


def test_a_second_run_does_nothing_at_all(ready: Clone) -> None:
    assert ready.setup().returncode == 0
    assert "pip download" in calls(ready)
    assert ready.setup().returncode == 0
    assert calls(ready) == ""


def test_a_second_clone_needs_no_network(ready: Clone) -> None:
    assert ready.setup().returncode == 0
    shutil.rmtree(ready.folder / ".venv")
    again = ready.setup(NO_NETWORK="yes")
    assert again.returncode == 0, again.stderr


def test_new_requirements_are_installed(ready: Clone) -> None:
    ready.setup()
    calls(ready)
    with (ready.folder / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert ready.setup().returncode == 0
    assert "pip install" in calls(ready)


def test_without_network_and_cache_it_says_what_to_try(ready: Clone) -> None:
    failed = ready.setup(NO_NETWORK="yes")
    assert failed.returncode == 2
    assert "try: check the network and pip's index" in failed.stderr


def test_an_interrupted_installation_is_made_good(ready: Clone) -> None:
    assert ready.setup(BREAK_INSTALL="yes").returncode == 2
    calls(ready)
    assert ready.setup().returncode == 0
    assert "pip install" in calls(ready)


def test_a_clone_that_was_moved_gets_a_new_environment(ready: Clone) -> None:
    ready.setup()
    calls(ready)
    moved = ready.folder.with_name("moved")
    ready.folder.rename(moved)
    ready.folder = moved
    assert ready.setup().returncode == 0
    assert "-m venv --clear" in calls(ready)
    assert (moved / ".venv" / "place").read_text().strip() == str(moved)


def test_pip_is_never_told_to_leave_the_environment() -> None:
    text = (REPOSITORY / "tools/setup.sh").read_text()
    commands = [line for line in text.splitlines() if "pip " in line and not line.lstrip().startswith("#")]
    assert not [
        line for line in commands if "--user" in line or "--break-system-packages" in line or "config set" in line
    ]


def test_requirements_follow_extras_and_hold_the_build_backend() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/requirements.py"), "demo"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    names = [line.split(">")[0] for line in done.stdout.split()]
    assert {"setuptools", "numpy", "typer", "amqtt"} <= set(names)
    assert not [name for name in names if name.startswith("edgelam")]
    unknown = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/requirements.py"), "nonsense"], capture_output=True, text=True
    )
    assert unknown.returncode == 2
    assert "demo" in unknown.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("script", ["install.sh", "tools/setup.sh", "tools/base_size.sh", ".ci/run"])
def test_shell_scripts_are_clean(script: str) -> None:
    done = subprocess.run(["shellcheck", str(REPOSITORY / script)], capture_output=True, text=True)
    assert done.stdout == ""
