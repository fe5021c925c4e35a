"""The power of a board, from what it measured of its own. Pure."""

from __future__ import annotations

from coordinator.planning.cost import Power
from hwprofiles.profile import Profile
from hwprofiles.reading import Reading
from hwprofiles.samples import EnergyMeasurement


def power_of(profile: Profile) -> Power | None:
    """Watts while it makes decode steps without a pause, and while it waits; None if either was not measured."""
    energy = profile.energy
    if not isinstance(energy, EnergyMeasurement) or not isinstance(energy.idle_w, Reading):
        return None
    known = [
        (run.joules.value, run.duration_s)
        for run in energy.runs
        if run.phase == "decode" and isinstance(run.joules, Reading) and run.duration_s > 0
    ]
    if not known:
        return None
    active_w = sum(joules for joules, _ in known) / sum(duration_s for _, duration_s in known)
    return Power(active_w=active_w, idle_w=energy.idle_w.value, covers=energy.covers)
