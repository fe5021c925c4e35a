"""How what a job measured and what was known before become one profile. Pure.

Modules that were measured under other conditions than those that the profile now states keep what was wrong with
theirs (`spoiled_because`), so that a later, better job does not make old figures believed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from agent.workers.pipe import Measured
from hwprofiles import conditions
from hwprofiles.profile import NOT_MEASURED, LinkMeasurement, ModuleMeasurement, Profile, Snapshot
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.spoiled import conditions_because
from hwprofiles.survey import Engines, Survey

EMULATED: Final = Absent("an emulated board has that of the machine underneath, which would not be its own")

OF_BOARD: Final = ("ceilings", "disk", "codings", "course", "energy")
"""Parts of a profile that are the board's, not its modules'."""

MAX_REASON_LETTERS: Final = 1024
MAX_MODULES: Final = 256

WITHOUT_FIGURES: Final[Mapping[str, str]] = {
    "torch": "it is the reference; --engines torch measures it, too",
    "tensorrt": "not yet, or --engines leaves it out",
}
"""Engines that a board may have without figures: why there are none."""


class Found(Struct, frozen=True, kw_only=True):
    """What a job came to, be it over or cut off."""

    result: Measured
    failed: Mapping[str, str]
    link_asked: bool
    board_asked: bool
    sustained_asked: bool = False
    anew: bool = False
    """Somebody asked for all of it anew: what was measured before with other engines goes, too, and is due."""
    engines_failed: Mapping[str, str] = {}
    """Engines that could not be measured with, and why."""
    disturbed: bool
    """The device lost its broker meanwhile: what was found of the link says nothing."""
    before: Snapshot
    now: Snapshot


def joined(known: Profile | None, found: Found, survey: Survey, emulation: str, in_kit: Collection[str]) -> Profile:
    """The profile as it is after a job. `in_kit`: keys of modules that are asked for today."""
    result = found.result
    if found.sustained_asked and known is not None:  # its own conditions are in it
        return msgspec.structs.replace(known, sustained=result.sustained)
    fresh = {(module.key, module.engine) for module in result.modules}
    if found.anew and known is not None:
        renewed = {module.key for module in result.modules}
        fresh |= {(module.key, module.engine) for module in known.modules if module.key in renewed}
    made = Profile(
        source="emulated" if emulation else "live",
        emulation=emulation,
        identity=survey.identity,
        memory=survey.memory,
        cores=survey.cores,
        conditions=conditions.join(found.before, found.now, result.allow_spinning),
        engines=engines_in_words(survey.engines, result.engines_loaded, known, found.engines_failed),
        modules=(*_kept(known, fresh, in_kit), *result.modules)[-MAX_MODULES:],
        link=_link(known, found),
        failed=_failed(known, found, {key for key, _ in fresh}, in_kit),
        pairs=known.pairs if known is not None else (),
        sustained=result.sustained if found.sustained_asked or known is None else known.sustained,
    )
    if emulation:
        return msgspec.structs.replace(made, **dict.fromkeys(OF_BOARD, EMULATED))
    if found.board_asked:
        return msgspec.structs.replace(made, **_of_board(known, result))
    if known is None:
        return made
    return msgspec.structs.replace(made, **{name: getattr(known, name) for name in OF_BOARD})


def _of_board(known: Profile | None, result: Measured) -> dict[str, object]:
    """Course and energy need a module: a job without one leaves what was known of them."""
    found: dict[str, object] = {"ceilings": result.ceilings, "disk": result.disk, "codings": result.codings}
    if result.modules or known is None:
        return {**found, "course": result.course, "energy": result.energy}
    return {**found, "course": known.course, "energy": known.energy}


def board_is_due(known: Profile | None, emulation: str) -> bool:
    """Whether nobody has tried yet to measure ceilings and disk."""
    return not emulation and (known is None or known.ceilings == NOT_MEASURED)


def _kept(
    known: Profile | None, fresh: Collection[tuple[str, str]], in_kit: Collection[str]
) -> list[ModuleMeasurement]:
    """Modules of the kit last, so that the oldest of others are dropped where all of them are too many."""
    if known is None:
        return []
    wrong = "; ".join(conditions_because(known))[:MAX_REASON_LETTERS]
    kept = [
        module if module.spoiled_because or not wrong else msgspec.structs.replace(module, spoiled_because=wrong)
        for module in known.modules
        if (module.key, module.engine) not in fresh
    ]
    return sorted(kept, key=lambda module: module.key in in_kit)


def _link(known: Profile | None, found: Found) -> LinkMeasurement | Absent | Failed:
    link = found.result.link
    if isinstance(link, Failed) and found.disturbed:
        link = Absent(link.because)
    # What was measured to another broker is nearer to the truth than nothing.
    unasked = not found.link_asked
    if isinstance(link, Absent) and known is not None and (unasked or isinstance(known.link, LinkMeasurement)):
        return known.link
    return link


def _failed(known: Profile | None, found: Found, fresh: Collection[str], in_kit: Collection[str]) -> dict[str, str]:
    """Why modules have no figures: those of the kit first, should they be too many."""
    all_of = {**(known.failed if known is not None else {}), **found.failed}
    keys = sorted((key for key in all_of if key not in fresh), key=lambda key: key not in in_kit)
    return {key: all_of[key][:MAX_REASON_LETTERS] for key in keys[:MAX_MODULES]}


def engines_in_words(
    found: Engines, loaded: Mapping[str, str], known: Profile | None, failed: Mapping[str, str]
) -> Engines:
    """What the profile says of each engine: what was loaded to measure with, now or for the modules known before; else
    why it has no figures. Those that are no package of their own are named when they were tried."""
    said: Engines = {}
    measured_before = {module.engine for module in known.modules} if known is not None else set()
    for name, reading in found.items():
        said[name] = reading
        if name in loaded:
            said[name] = Reading(loaded[name], "loaded by the measuring worker")
        elif known is not None and name in measured_before and name in known.engines:
            said[name] = known.engines[name]
        elif isinstance(reading, Reading) and name in WITHOUT_FIGURES:
            because = WITHOUT_FIGURES[name]
            said[name] = Absent(f"not measured, though {name} {reading.value} is installed: {because}")
    for name in (measured_before | loaded.keys()) - found.keys():
        before = known.engines.get(name) if known is not None else None
        if name in loaded:
            said[name] = Reading(loaded[name], "loaded by the measuring worker")
        elif before is not None:
            said[name] = before
    return said | {name: Failed(because) for name, because in failed.items()}
