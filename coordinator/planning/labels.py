"""Cut a chain over many devices: dynamic programming in which every partial chain remembers its devices.

For each (modules placed, last device) the KEPT cheapest partial chains are kept, and a chain is continued only with
devices that it does not hold. What falls out of the kept ones is lost, but no order of the devices is fixed beforehand.
It takes N L (N + L) steps: 64 devices and 80 blocks are a twentieth of a second.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from coordinator.planning.partition import Costs, Floats, Found, Placement, Run

KEPT: Final = 3
"""Partial chains kept for each cut and last device, each cut before at another place."""


def labelled(costs: Costs) -> Found:
    """Search by partial chains that remember their devices. Limits on the number of stages are not kept."""
    return _LabelledFound(costs)


class _LabelledFound:
    def __init__(self, costs: Costs) -> None:
        devices, length = costs.stage.shape[0], costs.stage.shape[1] - 1
        shape = (length + 1, devices, KEPT)
        self._value: Floats = np.full(shape, np.inf)
        self._start = np.zeros(shape, dtype=np.int64)
        """Where the last run of a partial chain begins."""
        self._before = np.zeros((length + 1, devices), dtype=np.int64)
        """Which partial chain, as device * KEPT + rank, a run that begins here on this device continues."""
        self._first = np.zeros(shape, dtype=np.int64)
        self._used: npt.NDArray[np.bool_] = np.zeros((*shape, devices), dtype=np.bool_)
        arrived: Floats = np.full((length + 1, devices), np.inf)
        arrived[0] = 0.0
        for j in range(1, length + 1):
            self._keep(j, costs.join(arrived[:j], costs.stage[:, :j, j].T))
            onward = costs.join(self._value[j][:, :, None], costs.hop[:, None, :, j])
            onward = np.where(self._used[j], np.inf, onward).reshape(devices * KEPT, devices)
            self._before[j] = onward.argmin(axis=0)
            arrived[j] = onward.min(axis=0)
        self._length = length
        self._ends = self._closed(costs)

    def _keep(self, j: int, totals: Floats) -> None:
        """`totals` [j, N]: of a chain whose last run is i..j - 1 on a device."""
        devices = totals.shape[1]
        starts = np.argsort(totals, axis=0, kind="stable")[:KEPT]
        for rank, start in enumerate(starts):
            device = np.arange(devices)
            self._value[j, :, rank] = totals[start, device]
            self._start[j, :, rank] = start
            before = self._before[start, device]
            held = self._used[start, before // KEPT, before % KEPT] & (start > 0)[:, None]
            held[device, device] = True
            self._used[j, :, rank] = held
            self._first[j, :, rank] = np.where(start > 0, self._first[start, before // KEPT, before % KEPT], device)

    def _closed(self, costs: Costs) -> dict[int, tuple[float, int, int]]:
        """Number of stages -> the cheapest ring of that many: cost, last device, rank."""
        ends: dict[int, tuple[float, int, int]] = {}
        for d, rank in np.argwhere(np.isfinite(self._value[-1])):
            stages = int(self._used[-1, d, rank].sum())
            total = costs.join(self._value[-1, d, rank], costs.hop[d, self._first[-1, d, rank], -1])
            if np.isfinite(total) and (stages not in ends or total < ends[stages][0]):
                ends[stages] = (float(total), int(d), int(rank))
        return {stages: end for stages, end in ends.items() if stages <= costs.at_most}

    @property
    def best_by_stages(self) -> dict[int, float]:
        return {stages: total for stages, (total, _, _) in self._ends.items()}

    def trace(self, stages: int) -> Placement:
        _, device, rank = self._ends[stages]
        runs: list[Run] = []
        end = self._length
        while end:
            start = int(self._start[end, device, rank])
            runs.append(Run(device, start, end))
            before = int(self._before[start, device])
            device, rank, end = before // KEPT, before % KEPT, start
        return tuple(reversed(runs))
