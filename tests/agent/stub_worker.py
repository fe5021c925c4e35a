"""A worker process that does what its first line says: for tests of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import time

from msgspec import Struct

from agent.workers.child import become_worker
from agent.workers.pipe import MeasureNote, Tell


class Say(Struct):
    what: str


def main() -> None:
    parent = become_worker()
    what = parent.first(Say).what
    if what == "crash":
        print("printed by a library")
        print("about to fail", file=sys.stderr)
        sys.exit(7)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "deaf":
        time.sleep(60)
    parent.listen(lambda: None)
    parent.say(MeasureNote(note=f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.getsid(0)}"))
    while not parent.gone:
        for told in parent.told(Tell):
            parent.say(MeasureNote(note=f"told stop={told.stop}"))
        time.sleep(0.01)


if __name__ == "__main__":
    main()
