"""What about the conditions of a measurement spoils every figure of it: throttling and load. Pure."""

from __future__ import annotations

from typing import Final

from hwprofiles.probe.thermal import NOW, SINCE_BOOT
from hwprofiles.profile import Profile
from hwprofiles.reading import Reading
from hwprofiles.samples import Course

LOADED_SHARE: Final = 0.5
"""Processes that ran or waited before measuring, per core, above which the board is called loaded. The load average
also counts the agent itself, and what was measured a minute ago."""

OTHERS_SHARE: Final = 0.25
"""Of the processor, used by everything else on the machine while modules were measured."""


def conditions_because(profile: Profile) -> tuple[str, ...]:
    """What spoils the figures; empty if nothing does."""
    return (*throttled_because(profile), *loaded_because(profile))


def throttled_because(profile: Profile) -> tuple[str, ...]:
    before, after = profile.conditions.throttle_before, profile.conditions.throttle_after
    found = [
        f"throttled {when} measuring: {reading.value}"
        for when, reading in (("before", before), ("after", after))
        if isinstance(reading, Reading) and NOW in reading.value
    ]
    if not found and isinstance(before, Reading) and isinstance(after, Reading):
        fresh = _since_boot(after.value) - _since_boot(before.value)
        found = [f"throttled while measuring: {event} had not happened before" for event in sorted(fresh)]
    return tuple(found)


def _since_boot(words: str) -> set[str]:
    """'0x50000: under-voltage since boot, throttled since boot' -> {'under-voltage', 'throttled'}."""
    said = words.partition(": ")[2].split(", ")
    return {event.removesuffix(SINCE_BOOT) for event in said if event.endswith(SINCE_BOOT)}


def loaded_because(profile: Profile) -> tuple[str, ...]:
    """A board that did something else: before, by its load; meanwhile, by what others took of the processor."""
    found = []
    load, cores = profile.conditions.load_before, profile.cores.online
    if load > LOADED_SHARE * cores:
        found.append(f"load of {load:.1f} on {cores} cores before measuring")
    share = profile.course.processor_share if isinstance(profile.course, Course) else None
    if share is not None and share > OTHERS_SHARE:
        found.append(f"everything else on the machine used {share:.0%} of the processor meanwhile")
    return tuple(found)
