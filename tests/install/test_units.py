"""The systemd units say nothing that systemd doesn't know, and give away no more than they must."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
NAMES = ("edgelam-agent", "edgelam-coordinator")

MOST_EXPOSED = 25
"""Of 100, as `systemd-analyze security` counts: a plain service has 96. With access to a GPU allowed."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")


def systemd_version() -> int:
    if shutil.which("systemd-analyze") is None:
        return 0
    shown = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"systemd (\d+)", shown)
    return int(found[1]) if found else 0


def verify(unit: Path) -> str:
    """What systemd has to say about a unit, with /bin/true in place of programs that are not installed here."""
    unit.write_text(re.sub(r"/opt/edgelam/current/bin/\S+", "/bin/true", unit.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    # Words about other units of this machine are not ours.
    return "".join(line for line in (done.stdout + done.stderr).splitlines(keepends=True) if unit.stem in line)


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    unit = Path(shutil.copy(UNITS / f"{name}.service", tmp_path))
    assert verify(unit) == ""


@needs_systemd
def test_a_misspelt_key_would_be_seen(tmp_path: Path) -> None:
    unit = Path(shutil.copy(UNITS / "edgelam-agent.service", tmp_path))
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHoome="))
    assert "ProtectHoome" in verify(unit)


@pytest.mark.skipif(systemd_version() < 250, reason="systemd-analyze security --offline needs systemd 250")
@pytest.mark.parametrize("name", NAMES)
def test_exposure_is_low(name: str) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={MOST_EXPOSED}",
            str(UNITS / f"{name}.service"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize("name", NAMES)
def test_units_run_what_the_installer_installs(name: str) -> None:
    text = (UNITS / f"{name}.service").read_text()
    program = {"edgelam-agent": "edgelam-agent run", "edgelam-coordinator": "edgelam up"}[name]
    assert f"ExecStart=/opt/edgelam/current/bin/{program}" in text
    assert f"EnvironmentFile=-/etc/edgelam/{name.removeprefix('edgelam-')}.env" in text


def test_an_out_of_memory_kill_takes_a_worker_and_not_the_agent() -> None:
    text = (UNITS / "edgelam-agent.service").read_text()
    assert "OOMPolicy=continue" in text
    watchdog = re.search(r"^WatchdogSec=(\d+)$", text, re.MULTILINE)
    assert watchdog and int(watchdog[1]) >= 30
