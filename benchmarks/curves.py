"""(points of a curve, an axis, a value on it) -> the accuracy there: how methods are compared at equal zeros or equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

Point = Mapping[
    str, float
]  # accuracy in %, and what it is compared at: zeros, bits per weight, entropy in bytes


def at(points: Iterable[Point], axis: str, value: float) -> float | None:
    """The accuracy where `axis` has this value, linear between neighbours; None outside the curve."""
    for a, b in pairwise(sorted(points, key=lambda point: point[axis])):
        if a[axis] <= value <= b[axis]:
            return a["accuracy"] + (b["accuracy"] - a["accuracy"]) * (value - a[axis]) / max(
                1e-9, b[axis] - a[axis]
            )
    return None
