"""Quantities as people read them. Powers of 1000 everywhere: 1 MB is 10^6 bytes, in plans, reports and the terminal alike."""

from __future__ import annotations

NOTHING = "–"
"""Shown for an unknown value."""

# Quantity -> its units and their sizes, smallest first.
SCALES: dict[str, tuple[tuple[str, float], ...]] = {
    "bytes": (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)),
    "seconds": (("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86400.0)),
    "flops": (("FLOP", 1.0), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15)),
    "joules": (("J", 1.0), ("kJ", 1e3), ("MJ", 1e6), ("GJ", 1e9)),
}


def scale_of(largest: float, quantity: str) -> tuple[float, str]:
    """The (divisor, unit) of an axis whose values go up to ``largest``. Seconds read better up to two minutes."""
    unit, size = SCALES[quantity][0]
    for larger_unit, larger_size in SCALES[quantity]:
        if largest >= (2 * larger_size if quantity == "seconds" and larger_size > 1 else larger_size):
            unit, size = larger_unit, larger_size
    return size, unit


def readable(value: float | None, quantity: str) -> str:
    """A value of a quantity (bytes, seconds, flops, joules) with the unit that suits it; a dash for None and NaN."""
    if value is None or value != value:
        return NOTHING
    if quantity == "seconds":
        return duration(value)
    divisor, unit = scale_of(abs(value), quantity)
    number = value / divisor
    if divisor == 1.0 and quantity == "bytes":
        return f"{number:.0f} {unit}"
    return f"{number:,.0f} {unit}" if abs(number) >= 1000 else f"{number:.3g} {unit}"


def size(num_bytes: float | None) -> str:
    """Bytes as 512 B, 4.1 kB, 12.3 MB."""
    return readable(num_bytes, "bytes")


def energy(joules: float | None) -> str:
    """Joules as 12 J, 4.1 kJ, 1.3 MJ."""
    return readable(joules, "joules")


def duration(seconds: float) -> str:
    """Seconds as 4.3 s, 43 s, 2 m 05 s, 3 h 20 m or 5 d 2 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def percent(fraction: float | None) -> str:
    """A fraction of 1 in percent; a dash for None and NaN."""
    return NOTHING if fraction is None or fraction != fraction else f"{100 * fraction:.1f} %"
