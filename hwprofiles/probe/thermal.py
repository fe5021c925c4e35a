"""Temperatures and throttling: thermal zones, throttle alerts (Jetson), firmware throttle word (Raspberry Pi)."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files, proc
from hwprofiles.probe.commands import Runner
from hwprofiles.reading import Absent, Failed, Reading

_THERMAL: Final = "sys/class/thermal"

OFF_C: Final = -256.0
"""What Jetson sensors say while the block they sit in is switched off."""

FAKE_ZONES: Final = ("PMIC",)
"""Zones that report a constant (50 or 100 degrees), whatever the temperature."""

COLDEST_C: Final = -60.0
HOTTEST_C: Final = 200.0
"""Outside of this no board of ours works: the sensor is broken or not connected."""

THROTTLE_WORDS: Final = (
    (0, "under-voltage"),
    (1, "frequency capped"),
    (2, "throttled"),
    (3, "soft temperature limit"),
)
"""Bits of the Raspberry Pi's throttle word: now. The same 16 bits higher: has happened since boot."""
SINCE_BOOT_SHIFT: Final = 16

NOW: Final = " now"
SINCE_BOOT: Final = " since boot"
"""What stands behind each word of a reading; hwprofiles.report.verdict goes by it."""

_FIRMWARE_PATTERNS: Final = ("soc/soc:firmware/get_throttled", "soc@*/*firmware*/get_throttled")
_ALERT_SUFFIX: Final = "-throttle-alert"


class Zone(NamedTuple):
    """One sensor: `name` is its folder, `kind` what it says it measures."""

    name: str
    kind: str
    celsius: Reading[float] | Absent | Failed


def zones(root: Path) -> tuple[Zone, ...]:
    """All thermal zones in the order of their numbers; empty where there are none."""
    found = []
    for name in sorted(files.listed(root, _THERMAL, "thermal_zone*"), key=lambda name: (len(name), name)):
        kind = files.text(root, f"{_THERMAL}/{name}/type")
        kind_text = kind.value if isinstance(kind, Reading) else "unnamed"
        found.append(Zone(name, kind_text, _celsius(root, name, kind_text)))
    return tuple(found)


def _celsius(root: Path, name: str, kind: str) -> Reading[float] | Absent | Failed:
    found = files.parsed(root, f"{_THERMAL}/{name}/temp", files.whole)
    if not isinstance(found, Reading):
        return found
    celsius = found.value / 1000
    if celsius == OFF_C:
        return Absent(f"{name} {kind} is switched off")
    if any(kind.startswith(fake) for fake in FAKE_ZONES):
        return Absent(f"{name} {kind} reports a constant, not a temperature")
    if not COLDEST_C < celsius < HOTTEST_C:
        return Failed(f"{name} {kind} says {celsius:g} C")
    return Reading(celsius, f"{name} {kind}")


def hottest(root: Path) -> Reading[float] | Absent | Failed:
    """The highest temperature of all zones in degrees Celsius, and which zone has it."""
    found = [zone.celsius for zone in zones(root)]
    readings = [one for one in found if isinstance(one, Reading)]
    if readings:
        return max(readings, key=lambda one: one.value)
    failed = [one for one in found if isinstance(one, Failed)]
    if failed:
        return failed[0]
    return found[0] if found else Absent("no thermal zones")


def throttle(root: Path, run: Runner) -> Reading[str] | Absent | Failed:
    """What slows the board down, in words; 'none' only where a source said so.

    The Raspberry Pi's word is taken from sysfs, else from vcgencmd; other boards answer by their throttle alerts.
    """
    word = _throttle_word(root, run)
    if isinstance(word, Reading):
        return Reading(throttle_words(word.value), word.source)
    alerts = _throttle_alerts(root)
    return word if isinstance(alerts, Absent) else alerts


def throttle_words(word: int) -> str:
    """0x50005 -> '0x50005: under-voltage now, throttled now, under-voltage since boot, throttled since boot'."""
    said = [f"{name}{NOW}" for bit, name in THROTTLE_WORDS if word >> bit & 1]
    said += [f"{name}{SINCE_BOOT}" for bit, name in THROTTLE_WORDS if word >> (bit + SINCE_BOOT_SHIFT) & 1]
    return f"{word:#x}: {', '.join(said)}" if said else f"{word:#x}: none"


def parse_throttle_word(text: str) -> int:
    """'throttled=0x50005', '0x50005' or '50005' (all hexadecimal) -> 0x50005; raise ValueError."""
    word = int(text.strip().removeprefix("throttled="), 16)
    if not 0 <= word < 1 << 32:
        raise ValueError(text)
    return word


def _throttle_word(root: Path, run: Runner) -> Reading[int] | Absent | Failed:
    for pattern in _FIRMWARE_PATTERNS:
        for path in files.matches(root, "sys/devices/platform", pattern):
            return files.parsed(root, path, parse_throttle_word)
    board = proc.board(root)
    if not isinstance(board, Reading) or "Raspberry Pi" not in board.value:
        return Absent("the board tells nothing about throttling")
    said = run(("vcgencmd", "get_throttled"))
    if not isinstance(said, Reading):
        return said
    try:
        return Reading(parse_throttle_word(said.value), said.source)
    except ValueError:
        return Failed(f"{said.source} says {said.value[: files.MAX_QUOTED]!r}")


def _throttle_alerts(root: Path) -> Reading[str] | Absent | Failed:
    """Cooling devices whose type ends in -throttle-alert: a state above 0 is throttling now."""
    states: dict[str, Reading[int] | Absent | Failed] = {}
    for name in files.listed(root, _THERMAL, "cooling_device*"):
        kind = files.text(root, f"{_THERMAL}/{name}/type")
        if isinstance(kind, Reading) and kind.value.endswith(_ALERT_SUFFIX):
            states[kind.value] = files.parsed(root, f"{_THERMAL}/{name}/cur_state", files.whole)
    raised = [kind for kind, state in states.items() if isinstance(state, Reading) and state.value > 0]
    if raised:
        return Reading(
            ", ".join(f"{kind.removesuffix(_ALERT_SUFFIX)} throttled{NOW}" for kind in raised), "throttle alerts"
        )
    unread = [state for state in states.values() if not isinstance(state, Reading)]
    if unread:
        return Failed(unread[0].because)
    return Reading("none", "throttle alerts") if states else Absent("no throttle alerts")
