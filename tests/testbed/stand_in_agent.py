"""Stands in for the agent: takes its command line, writes it down, holds a worker, and dials what it was told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.testbed.peers import ask, connect


def main() -> None:
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    if options["--name"] == "broken":
        sys.exit("stand-in: this board is broken")
    if options["--name"] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(options["--state-dir"])
    folder.mkdir(parents=True, exist_ok=True)
    # The worker leaves our session and process group, as one that is started by a careless library would.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    written = {"arguments": sys.argv[1:], "worker": worker.pid, "pid": os.getpid(), "starts": 1}
    report = folder / "report.json"
    if report.exists():
        written["starts"] = json.loads(report.read_text())["starts"] + 1
    via = dict(pair.split("=", 1) for pair in options["--via"].split(",")) if "--via" in options else {}
    if "mqtt" in via:
        with connect(via["mqtt"]) as peer:
            ask(peer, 1, 1)
            written["round_trip_s"] = ask(peer, 1, 1)
    report.with_suffix(".new").write_text(json.dumps(written))
    report.with_suffix(".new").replace(report)
    while True:
        time.sleep(600)


if __name__ == "__main__":
    main()
