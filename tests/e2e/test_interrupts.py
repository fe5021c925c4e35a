"""Ctrl-C and SIGTERM at any moment: no process, no file, no namespace and no control group stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from models.cache import cache_dir, models_dir
from models.catalog import CATALOG
from models.fetch import is_cached
from testbed.cgroups import hierarchy
from tests.testbed.test_cgroups import lab
from wire.errors import ExitCode

pytestmark = pytest.mark.slow

PATIENCE_S = 180.0
"""Boards of all sites on a machine measure one after the other: who comes last waits for neighbours, too."""
END_S = 20.0
"""From the signal to the end: agents get five seconds to leave in order, the coordinator as many."""


class House:
    """Everything that a program may write to, in a folder of the test: home, state, cache, temporary files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.cache = root / "cache"
        self.log = root / "log"
        for name in ("state", "cache", "tmp", "home"):
            (root / name).mkdir()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`edgelam` as a shell would start it; what it prints goes to `log`."""
        # Libraries that hold back where CI or a setting says so shall not do that here.
        kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("ORT_")}
        environment = {
            **kept, "HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp"),
            "EDGELAM_STATE": str(self.state), "EDGELAM_CACHE": str(self.cache), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def said(self, words: str) -> Callable[[], bool]:
        """Whether the program, or the coordinator that it started, has said so."""

        def found() -> bool:
            logs = (self.log, *self.state.glob("*/coordinator.log"))
            return any(words in log.read_text(errors="replace") for log in logs if log.exists())

        return found

    def processes(self) -> list[psutil.Process]:
        """Processes that were started in this house, however far down."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("EDGELAM_STATE") == str(self.state):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def groups(self) -> set[Path]:
        """Control groups that were made for these processes."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
                names = {line.split(":", 2)[2].lstrip("/") for line in lines if "edgelam" in line}
                roots = (hierarchy().cpu, hierarchy().memory) if names else ()
                found |= {root / name for root in roots for name in names}
        return found

    def files(self) -> set[str]:
        """What lies in state, home and temporary folder; and what is half written in the cache."""
        kept = {path for path in self.cache.rglob("*") if ".edgelam-" in path.name or path.name.startswith(".")}
        for folder in (self.state, self.root / "tmp", self.root / "home"):
            kept |= {path for path in folder.rglob("*") if path.is_file()}
        return {str(path.relative_to(self.root)) for path in kept}


def wait_until(condition: Callable[[], bool], program: subprocess.Popen[bytes], house: House) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert program.poll() is None and time.monotonic() < deadline_s, house.log.read_text(errors="replace")
        time.sleep(0.02)


def interrupt(program: subprocess.Popen[bytes], house: House, number: int, code: ExitCode) -> None:
    """Send the signal, and a second one as the impatient do; then nothing of it is left."""
    groups = house.groups()
    program.send_signal(number)
    time.sleep(0.3)
    program.send_signal(number)
    assert program.wait(END_S) == int(code), house.log.read_text(errors="replace")
    deadline_s = time.monotonic() + 5
    while (left := house.processes()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert [process.cmdline() for process in left] == []
    assert [group for group in groups if group.exists()] == []
    assert house.files() == set()
    assert "Traceback" not in house.log.read_text(errors="replace")


def housed(folder: Path) -> Iterator[House]:
    folder.mkdir()
    house = House(folder)
    yield house
    for process in house.processes():
        process.kill()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    yield from housed(tmp_path / "house")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[House]:
    """A second one, for what runs beside the program that is interrupted."""
    yield from housed(tmp_path / "elsewhere")


@pytest.mark.timeout(300)
@pytest.mark.download
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("", signal.SIGINT),  # the coordinator is starting
        ("1. coordinator of site", signal.SIGINT),  # boards are starting
        ("packing smollm2", signal.SIGINT),
        ("measuring on", signal.SIGTERM),
        ("5. ", signal.SIGINT),  # weights are on their way, then tokens
    ],
    ids=["starting", "boards", "packing", "measuring", "running"],
)
def test_a_demo_that_is_interrupted_leaves_nothing(moment: str, number: int, house: House) -> None:
    if not is_cached(CATALOG[0], cache_dir()):
        pytest.skip(f"{CATALOG[0].name} is not in the cache: edgelam model fetch {CATALOG[0].name}")
    models_dir(house.cache).symlink_to(models_dir(cache_dir()))
    if moment != "packing smollm2" and (cache_dir() / "packs").is_dir():
        (house.cache / "packs").symlink_to(cache_dir() / "packs")
    demo = house.start("demo", "--preset", "equal", "--boards", "2", "--max-tokens", "400")
    wait_until(house.said(moment) if moment else lambda: len(house.processes()) > 1, demo, house)
    interrupt(demo, house, number, ExitCode.INTERRUPTED)


@pytest.mark.parametrize(
    ("limits", "number", "code"),
    [
        ("emulated", signal.SIGINT, ExitCode.INTERRUPTED),
        ("emulated", signal.SIGTERM, ExitCode.OK),
        pytest.param("cgroup", signal.SIGINT, ExitCode.INTERRUPTED, marks=lab),
    ],
)
def test_a_testbed_that_is_interrupted_leaves_nothing(
    limits: str, number: int, code: ExitCode, house: House, elsewhere: House
) -> None:
    site = f"t{os.urandom(4).hex()}"
    up = elsewhere.start("up", "--site", site)
    wait_until((elsewhere.state / "coordinator.json").exists, up, elsewhere)
    testbed = house.start("testbed", "up", "--site", site, "--boards", "2", "--limits", limits)
    wait_until(house.said("boards are up"), testbed, house)
    assert bool(house.groups()) == (limits == "cgroup")
    interrupt(testbed, house, number, code)
    up.send_signal(signal.SIGTERM)
    assert up.wait(END_S) == int(ExitCode.OK)
