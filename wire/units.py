"""Numbers with units, for people. Machines get plain numbers with the unit in the name."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """1_536 -> '1.5 KB'. Powers of 1024, as memory is sold."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < (1024 if unit == "B" else 1023.95) or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds_text(seconds: float) -> str:
    """0.0123 -> '12.3 ms'. What would be rounded up to the next unit is given in that."""
    if abs(seconds) < 999.5e-6:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 0.99995:
        return f"{seconds * 1e3:.1f} ms"
    if abs(seconds) < 119.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min"


def rate_text(bytes_per_s: float) -> str:
    """12_500_000 -> '100 Mbit/s'. Powers of 1000, as links are sold."""
    return f"{bytes_per_s * 8 / 1e6:.0f} Mbit/s" if bytes_per_s * 8 >= 1e7 else f"{bytes_per_s * 8 / 1e6:.1f} Mbit/s"
