"""Which figure each hop of a plan was priced with, and how old it is, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.planning.plan import Plan
from coordinator.planning.request import Candidate
from coordinator.planning.topology import hops_of
from hwprofiles.profile import LinkMeasurement
from wire.units import seconds_text


def hop_lines(plan: Plan, candidates: Sequence[Candidate], now_unix: float) -> list[str]:
    """One line per hop; none for a plan of one stage. `candidates`: those the plan was made from."""
    boards = {candidate.device: candidate for candidate in candidates}
    lines = []
    for stage, (sender, receiver) in zip(plan.stages, hops_of(plan), strict=False):
        known = [boards.get(sender), boards.get(receiver)]
        way = boards[sender].direct.get(receiver) if sender in boards else None
        if stage.central_hop_s and way is not None:
            slow = f", and {seconds_text(way.more_s)} longer now" if way.more_s > 0 else ""
            figure = f"the pair, measured {_age(now_unix - way.measured_at_unix)} ago{slow}"
        elif plan.stages[(stage.stage + 1) % len(plan.stages)].inbox.broker:
            figure = "round trips to the boards' own brokers, asked for a plan since the coordinator's start"
        else:
            figure = "the boards' own links through the site's broker, " + " and ".join(
                _own_link(board, name, now_unix) for board, name in zip(known, (sender, receiver), strict=True)
            )
        lines.append(f"{sender} to {receiver}: {seconds_text(stage.hop_s)}, by {figure}")
    return lines


def _own_link(board: Candidate | None, name: str, now_unix: float) -> str:
    profile = board.profile if board is not None else None
    if board is None or profile is None or not isinstance(profile.link, LinkMeasurement):
        return f"{name}'s not known any more"
    slow = f", {board.link_slowed.because}" if board.link_slowed is not None else ""
    return f"{name}'s measured {_age(now_unix - profile.conditions.measured_at_unix)} ago{slow}"


def _age(seconds: float) -> str:
    """Of figures: '40 s', '12 min', '5 h', '3 days'."""
    seconds = max(0.0, seconds)
    for unit_s, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"
