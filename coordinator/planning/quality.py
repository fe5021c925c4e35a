"""How much worse a model may say things with codecs at its cuts, by what was measured of it (models.judge). Pure.

Surprise is counted in nats per word beyond that of the model as it is: 0.01 is one per cent of perplexity. Cuts were
measured alone, at some places; between two places the worse one counts. For several cuts their means are added, and
their uncertainties by their squares. Where several were measured together and came out worse than so predicted, all
predictions for that codec grow by as much. More than with the codec at all cuts at once it can't be.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, hypot, log1p

from models.codecs import CodecReport, CutCost
from wire.codecs import AS_IS
from wire.messages import CodecName

Cut = tuple[CodecName, int]
"""A codec, and how many blocks are before the cut."""


def nats_of(percent: float) -> float:
    """An increase of perplexity as surprise."""
    return log1p(percent / 100)


def percent_of(nats: float) -> float:
    """A surprise as an increase of perplexity."""
    return 100 * (exp(min(nats, 700.0)) - 1)


def measured_codecs(report: CodecReport) -> tuple[CodecName, ...]:
    """Codecs that were measured at single cuts."""
    return tuple(dict.fromkeys(cost.codec for cost in report.costs if len(cost.cuts) == 1))


def at_most(report: CodecReport, cuts: Sequence[Cut]) -> float:
    """The surprise that these cuts cause at most, together. Raises KeyError for a codec that was not measured."""
    coded = [(codec, cut) for codec, cut in cuts if codec != AS_IS]
    if not coded:
        return 0.0
    found = _added(report, coded) * max(_compounding(report, codec) for codec, _ in coded)
    codecs = {codec for codec, _ in coded}
    if len(codecs) == 1:
        found = min([found, *(cost.at_most for cost in report.costs if _is_everywhere(report, cost, coded[0][0]))])
    return found


def _added(report: CodecReport, cuts: Sequence[Cut]) -> float:
    alone = [_alone(report, codec, cut) for codec, cut in cuts]
    return sum(max(0.0, nats) for nats, _ in alone) + hypot(*(error for _, error in alone))


def _alone(report: CodecReport, codec: CodecName, cut: int) -> tuple[float, float]:
    """Surprise and uncertainty of a single cut."""
    sides = _beside(report, codec, cut)
    return max(cost.nats for cost in sides), max(cost.nats_error for cost in sides)


def logits_apart(report: CodecReport, codec: CodecName, cut: int) -> float:
    """How far logits are apart with a codec at a single cut. Raises KeyError for one that was not measured."""
    return max(cost.logit_error for cost in _beside(report, codec, cut))


def _beside(report: CodecReport, codec: CodecName, cut: int) -> tuple[CutCost, CutCost]:
    """What was measured at this cut, twice, or at its neighbours."""
    places = {cost.cuts[0]: cost for cost in report.costs if cost.codec == codec and len(cost.cuts) == 1}
    if not places:
        raise KeyError(codec)
    before = max((place for place in places if place <= cut), default=min(places))
    after = min((place for place in places if place >= cut), default=max(places))
    return places[before], places[after]


def _compounding(report: CodecReport, codec: CodecName) -> float:
    """How much worse measured combinations are than the sum of their cuts says; 1 if none is."""
    together = [cost for cost in report.costs if cost.codec == codec and len(cost.cuts) > 1]
    ratios = []
    for cost in together:
        said = _added(report, [(codec, cut) for cut in cost.cuts])
        if said > 0:
            ratios.append(cost.nats / said)
    return max([1.0, *ratios])


def _is_everywhere(report: CodecReport, cost: CutCost, codec: CodecName) -> bool:
    return cost.codec == codec and len(cost.cuts) == report.blocks + 1
