"""The real thing: install.sh on a Debian that boots systemd, from a bundle and without any network."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.install.container import PYTHON, Container, what_is_missing

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT = "edgelam-agent.service"
INSTALL = ("/bundle/install.sh", "--offline", "/bundle")

pytestmark = [
    pytest.mark.install,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    arguments = ["--python", PYTHON, "--machine", platform.machine(), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/bundle.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def board(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    with Container({"/bundle": bundle}, tmp_path_factory.mktemp("log") / "console") as booted:
        yield booted


def traces(board: Container) -> str:
    """Everything that an installation may leave: files that bear the name, and users."""
    named = board.run("find", "/etc", "/opt", "/usr", "/var", "/run/systemd", "-xdev", "-name", "*edgelam*").stdout
    return named + board.run("grep", "-h", "edgelam", "/etc/passwd", "/etc/group", check=False).stdout


def wait_for(what: str, holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.3)


def test_a_boards_life_from_installing_to_leaving_no_trace(board: Container) -> None:
    before = traces(board)
    planned = board.run(*INSTALL, "--dry-run").stdout
    assert "would    running" in planned
    assert traces(board) == before

    done = board.run(*INSTALL, "--site", "lab", "--name", "pi5", "--site-key", "-", given="secret\n").stdout
    assert "changed  running" in done

    # Type=notify: active means that the agent itself said READY=1, here with no broker and no network to search.
    assert board.state(UNIT, "ActiveState") == "active"
    assert board.state(UNIT, "NRestarts") == "0"
    main_process = board.state(UNIT, "MainPID")
    assert board.run("stat", "-c", "%U", f"/proc/{main_process}").stdout.strip() == "edgelam"
    time.sleep(3)
    assert board.state(UNIT, "ActiveState") == "active"
    journal = board.run("journalctl", "-u", UNIT, "--no-pager").stdout
    assert "Traceback" not in journal
    assert board.run("stat", "-c", "%a %U", "/etc/edgelam/site.key").stdout.split() == ["600", "edgelam"]
    assert board.run("systemctl", "is-enabled", UNIT).stdout.strip() == "enabled"

    again = board.run(*INSTALL, "--site", "lab", "--name", "pi5", "--site-key", "-", given="secret\n").stdout
    assert "done: 0 changed" in again

    board.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", UNIT)
    wait_for("restarted after a crash", lambda: board.state(UNIT, "MainPID") not in ("0", main_process))
    wait_for("active again", lambda: board.state(UNIT, "ActiveState") == "active")

    verdict = board.run("systemd-analyze", "verify", f"/etc/systemd/system/{UNIT}")
    assert (verdict.stdout + verdict.stderr).strip() == ""

    board.run("/bundle/install.sh", "--uninstall")
    assert board.state(UNIT, "ActiveState") == "inactive"
    assert board.run("test", "-d", "/var/lib/edgelam", check=False).returncode == 0
    board.run("/bundle/install.sh", "--uninstall", "--purge")
    assert traces(board) == before


def test_a_hung_agent_is_restarted_by_the_watchdog(board: Container) -> None:
    board.run(*INSTALL)
    # A shorter watchdog than a user gets, so that the test need not wait half a minute.
    board.run("mkdir", "-p", f"/etc/systemd/system/{UNIT}.d")
    board.run("sh", "-c", f"printf '[Service]\\nWatchdogSec=4\\n' >/etc/systemd/system/{UNIT}.d/test.conf")
    board.run("systemctl", "daemon-reload")
    board.run("systemctl", "restart", UNIT)
    hung = board.state(UNIT, "MainPID")
    time.sleep(6)
    assert board.state(UNIT, "MainPID") == hung, "the watchdog took a healthy agent"
    board.run("systemctl", "kill", "--kill-who=main", "--signal=STOP", UNIT)
    wait_for("restarted by the watchdog", lambda: board.state(UNIT, "MainPID") not in ("0", hung))
    board.run("/bundle/install.sh", "--uninstall", "--purge")
