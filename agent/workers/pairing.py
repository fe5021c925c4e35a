"""The measuring worker's part in the measurement of a pair: its two connections, and one of the two ends."""

from __future__ import annotations

import time

from agent.workers.cold import Cold, sweep_bytes
from agent.workers.dataplane import data_connection
from agent.workers.pipe import PairTask
from hwprofiles.pairs import Answerer, Ends, measure_pair
from hwprofiles.profile import PairMeasurement
from hwprofiles.reading import Absent, Failed
from wire import topics
from wire.several import Several


def take_part(task: PairTask, site: str, device: str) -> PairMeasurement | Absent | Failed:
    """Measure the way to the other board; or answer it, and then say Absent if all went well."""
    inward = data_connection(task.inward)
    outward = inward if task.outward == task.inward else data_connection(task.outward)
    members = list(dict.fromkeys((inward, outward)))
    for transport in members:
        transport.start()
    ends = Ends(inward, outward, inward.poll if len(members) == 1 else Several(members).poll)
    own, peer = (topics.INBOX.on(site, name, "pair") for name in (device, task.peer))
    cold = Cold(sweep_bytes())
    try:
        if task.measure:
            return measure_pair(ends, own, peer, task.peer, task.way, task.token, time.time(), before=cold)
        because = Answerer(ends, own, peer, task.token, after=cold).serve()
        return Failed(because) if because else Absent("answered")
    finally:
        for transport in members:
            transport.close()
