"""Axes of charts: round numbers at which to draw lines, and words for them that differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_DIGITS = 15  # of a float64


def choose_ticks(high: float, low: float = 0.0) -> list[float]:
    """Choose three to six round numbers within a range.

    Args:
        high: its upper end.
        low: its lower end.

    Returns:
        The numbers, rising; `low` alone where the range is empty or not finite.
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def label_ticks(ticks: Sequence[float]) -> list[str]:
    """Write numbers with the fewest digits that tell them apart.

    Args:
        ticks: as `choose_ticks` gives them, evenly spaced.

    Returns:
        A word for each; no two are the same, and each is its number to a hundredth of the step.
    """
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 0.0
    # What is left of 0 after a sum of steps is not written as 1e-17.
    ticks = [0.0 if abs(tick) < 1e-9 * step else tick for tick in ticks]
    for digits in range(1, MOST_DIGITS):
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        pairs = zip(labels, ticks, strict=True)
        close = all(abs(float(label) - tick) <= 0.01 * step for label, tick in pairs)
        if close and len(set(labels)) == len(ticks):
            return [_write_plainly(label) for label in labels]
    return [repr(tick) for tick in ticks]


def _write_plainly(label: str) -> str:
    """`1e+02` as 100; very small and very large numbers keep their exponent."""
    value = float(label)
    if "e" in label and 1 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return label
