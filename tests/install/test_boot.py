"""The real thing: install.sh on a Debian that boots systemd, from a bundle and without any network."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.site import write_tiny_model
from tests.install.container import PYTHON, Container, what_is_missing

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT = "edgelam-agent.service"
PROGRAM = "/opt/edgelam/current/bin/edgelam"
INSTALL = ("/bundle/install.sh", "--offline", "/bundle")

pytestmark = [
    pytest.mark.install,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
]


def made_bundle(out: Path, role: str) -> Path:
    arguments = ["--python", PYTHON, "--machine", platform.machine(), "--out", str(out), "--role", role]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/bundle.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_bundle(tmp_path_factory.mktemp("bundle"), "agent")


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


def test_an_installed_coordinator_and_an_installed_board_answer(tmp_path: Path) -> None:
    """What the units forbid (files, system calls, addresses, devices) keeps nothing from working: both brokers start,
    the board measures itself, fetches weights, loads and answers."""
    bundle, models = made_bundle(tmp_path / "bundle", "coordinator"), tmp_path / "models"
    models.mkdir()
    write_tiny_model(models)
    for folder in (tmp_path, models):
        folder.chmod(0o755)
    with Container({"/bundle": bundle, "/models": models}, tmp_path / "console") as both:
        both.run("systemctl", "disable", "--now", "mosquitto.service")  # Debian starts one; ours need none of it
        both.run(*INSTALL, "--role", "coordinator", "--site", "lab")
        coordinator = "edgelam-coordinator.service"
        key = "/var/lib/edgelam-coordinator/site.key"
        wait_for("a site key", lambda: both.run("test", "-s", key, check=False).returncode == 0)
        both.run(*INSTALL, "--site", "lab", "--name", "nuc", "--site-key", key)

        def edgelam(*command: str, check: bool = True) -> str:
            return both.run(PROGRAM, *command, "--coordinator", "http://127.0.0.1:8571", check=check).stdout

        def online() -> bool:
            return "online" in edgelam("devices", check=False)

        wait_for("the board is online", online)
        answer = edgelam(
            "run",
            "/models/tiny0.gguf",
            "--prompt",
            "hello",
            "--context",
            "128",
            "--raw",
            "--max-tokens",
            "8",
            "--ignore-stop",
            "--json",
        )
        end = json.loads(answer)
        assert len(end["token_ids"]) == 8 and [stage["device"] for stage in end["stages"]] == ["nuc"]
        brokers = both.run("sh", "-c", "cat /proc/[0-9]*/comm | grep -c '^mosquitto$'").stdout.strip()
        assert brokers == "2", "the site's and the board's own"
        for unit in (UNIT, coordinator):
            journal = both.run("journalctl", "-u", unit, "--no-pager").stdout
            assert "Traceback" not in journal and "denied" not in journal.lower(), journal
            assert both.state(unit, "NRestarts") == "0"
        both.run("systemctl", "restart", coordinator)
        wait_for("the board is online again", online)
        both.run("/bundle/install.sh", "--uninstall", "--purge")
        both.run("/bundle/install.sh", "--role", "coordinator", "--uninstall", "--purge")
        assert traces(both) == ""
