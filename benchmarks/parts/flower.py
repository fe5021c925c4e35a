"""What Flower's rounds take on this machine with as many clients and updates of the same size: the control.

It gets an environment of its own in the cache folder, from the package index, once: no dependency of ours.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from models.cache import cache_dir
from wire.errors import Unreachable

VERSION: Final = "1.41.0"
APP: Final = Path(__file__).parents[1] / "peers" / "flower_app"
START_S: Final = 60.0
RUN_S: Final = 300.0


def environment() -> Path:
    """The folder of Flower's programs; raise Unreachable where they can't be had."""
    folder = cache_dir() / "benchmarks" / f"flower-{VERSION}"
    programs = folder / "bin"
    if (programs / "installed").is_file():
        return programs
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(programs / "python"), "-m", "pip", "install", "--quiet", f"flwr=={VERSION}"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unreachable(
                f"Flower {VERSION} can't be installed: {done.stderr.strip()[-200:]}", try_="--parts overhead"
            )
    (programs / "installed").touch()
    return programs


def rounds_s(clients: int, elements: int, rounds: int, folder: Path) -> list[float]:
    """Seconds of each round, but for the first, in which processes start."""
    programs = environment()
    variables = {**os.environ, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
    variables["PATH"] = f"{programs}:{variables['PATH']}"
    port = _free_port()
    config = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "config.toml").write_text(config, encoding="utf-8")
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> None:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            child = subprocess.Popen(
                [str(programs / arguments[0]), *arguments[1:]],
                env=variables,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(_end, child)

        link = ("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        start("superlink", *link, "--health-server-address", f"127.0.0.1:{_free_port()}")
        _await_listening(port)
        for number in range(clients):
            node = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}")
            start(f"supernode-{number}", *node, "--host", "127.0.0.1", "--port", str(_free_port()))
        wanted = f"rounds={rounds} clients={clients} elements={elements}"
        done = subprocess.run(
            [str(programs / "flwr"), "run", str(APP), "here", "--stream", "--run-config", wanted],
            env=variables, cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False,
        )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("rounds_s "):
            took: list[float] = json.loads(line.removeprefix("rounds_s "))
            return took[1:]
    raise Unreachable(f"Flower's run failed: {(done.stdout + done.stderr).strip()[-400:]}", try_="--parts overhead")


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def _await_listening(port: int) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise Unreachable("Flower's superlink does not listen", try_="--parts overhead")


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    for signal in (15, 9):
        try:
            os.killpg(child.pid, signal)
        except ProcessLookupError:
            break
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            continue
