"""A Debian that really boots: systemd in a container of its own, thrown away after use.

The root file system is made once (mmdebstrap, under a minute) and kept in the user's cache; each container is an
overlay over it, so nothing written inside stays.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

SUITE = "bookworm"
PYTHON = "3.11"
"""The suite's own Python: the bundle under test is made for it."""

PACKAGES = "systemd,systemd-sysv,dbus,libpam-systemd,python3,python3-venv,ca-certificates,mosquitto"
BOOT_LIMIT_S = 90.0


def what_is_missing() -> str:
    """Why no container can be booted here; '' if one can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in ("mmdebstrap", "systemd-nspawn", "nsenter", "pgrep") if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def root_file_system() -> Path:
    """Make the root file system, or take the one in the cache. Raise CalledProcessError with what was said."""
    base = (
        os.environ.get("EDGELAM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgelam"
    )
    kept = Path(base) / f"rootfs-{SUITE}-2"
    if kept.exists():
        return kept
    making = kept.with_name(f"{kept.name}.making-{os.getpid()}")
    making.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", SUITE, str(making)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        making.rename(kept)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)}: {error.stderr[-600:]}") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return kept


class Container:
    """A booted Debian; use as a context. `binds` are folders of this machine, read-only inside: {inside: outside}."""

    def __init__(self, binds: dict[str, Path], log: Path) -> None:
        self.machine = f"edgelam-test-{os.getpid()}"
        self.log = log
        self._binds = binds
        self._leader = 0

    def __enter__(self) -> Container:
        command = [
            "systemd-nspawn", "--quiet", f"--directory={root_file_system()}", "--boot", "--volatile=overlay",
            "--register=no", "--keep-unit", "--private-network", "--console=pipe", f"--machine={self.machine}",
            *(f"--bind-ro={outside}:{inside}" for inside, outside in self._binds.items()),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_for_boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._leader and self._nspawn.poll() is None:
            self.run("systemctl", "poweroff", check=False)
        try:
            self._nspawn.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._nspawn.pid, signal.SIGKILL)
            self._nspawn.wait()

    def run(self, *command: str, check: bool = True, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside; with `check`, a failure raises with what it said."""
        inside = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "--", *command]
        clean = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        done = subprocess.run(inside, input=given, capture_output=True, text=True, env=clean, timeout=240)
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            )
        return done

    def state(self, unit: str, name: str) -> str:
        """One property of a unit, as systemd sees it."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def _wait_for_boot(self) -> None:
        deadline = time.monotonic() + BOOT_LIMIT_S
        while time.monotonic() < deadline and self._nspawn.poll() is None:
            if not self._leader:
                children = subprocess.run(["pgrep", "-P", str(self._nspawn.pid)], capture_output=True, text=True).stdout
                self._leader = int(children.split()[0]) if children else 0
            elif self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the container did not boot: {self.log.read_text(errors='replace')[-600:]}")
