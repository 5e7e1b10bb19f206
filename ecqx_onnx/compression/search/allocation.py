"""Shares the bits among the weights: one dial moves all steps together.

With the output's squared error D_l = a_l Δ_l² and the rate R_l(Δ_l), both of weight l, the least
error at a given rate is where every bit buys the same:

    Δ_l = argmin_Δ  a_l Δ² + λ R_l(Δ)        for one λ, the same for all weights

At high rates R_l = n_l (h_l - log2 Δ), so that Δ_l is proportional to sqrt(n_l / a_l). At the low
rates that count here, R_l is the entropy of the levels, measured on a ladder of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LADDER = tuple(2.0 ** (k / 6) for k in range(-30, 13))  # steps in units of the weight's deviation
FINEST, COARSEST = LADDER[0], LADDER[-1]


@dataclass(frozen=True, eq=False)
class RateCurve:
    """What a weight costs at each step.

    Attributes:
        name: of the weight.
        size: entries.
        unit: float32, broadcasts against its matrices; step of `LADDER`'s 1.0.
        bits: float64 [len(LADDER)], entropy per entry at each rung.
    """

    name: str
    size: int
    unit: np.ndarray
    bits: np.ndarray

    def bits_at(self, multiple: float) -> float:
        """Interpolate the rate at a step between two rungs, in the logarithm of the step.

        Args:
            multiple: the step in units, positive.

        Returns:
            Bits per entry; those of the nearest rung beyond the ladder.
        """
        return float(np.interp(np.log2(multiple), np.log2(LADDER), self.bits))


def measure_rate(name: str, matrices: np.ndarray, unit: np.ndarray) -> RateCurve:
    """The entropy of the nearest levels at each rung of the ladder.

    Args:
        name: of the weight.
        matrices: float32 [groups, rows, columns].
        unit: float32, positive; broadcasts against the matrices.

    Returns:
        The curve of this weight.
    """
    scaled = (matrices / unit).reshape(-1)
    if scaled.size > 1 << 18:  # a share of a large weight says as much
        scaled = scaled[:: scaled.size >> 18]
    bits = np.array([entropy(np.rint(scaled / np.float32(rung))) for rung in LADDER])
    return RateCurve(name, int(matrices.size), unit, bits)


def entropy(levels: np.ndarray) -> float:
    """Compute the zero-order entropy of integers.

    Args:
        levels: of any shape.

    Returns:
        Bits per entry, 0 for no entries.
    """
    if not levels.size:
        return 0.0
    _, counts = np.unique(levels, return_counts=True)
    shares = counts / levels.size
    return max(0.0, float(-(shares * np.log2(shares)).sum()))


def allocate(
    curves: Sequence[RateCurve], slopes: Mapping[str, float], dial: float
) -> dict[str, float]:
    """The step of each weight at one position of the dial.

    Args:
        curves: rate of each weight.
        slopes: weight -> a_l: squared output error at a step of one unit, any common scale. A
            weight whose slope is 0 moves nothing and gets the coarsest step.
        dial: log2 of λ; higher is coarser, for all weights together.
    Returns:
        Weight -> step as a multiple of its unit, between FINEST and COARSEST.
    """
    steps = np.log2(np.array(LADDER))
    fine = np.linspace(steps[0], steps[-1], 4 * len(steps) - 3)
    chosen = {}
    for curve in curves:
        rate = np.interp(fine, steps, curve.bits) * curve.size
        error = slopes.get(curve.name, 0.0) * 2.0 ** (2 * fine)
        cost = error + 2.0**dial * rate
        # Of equal costs the coarsest: a rate that is zero everywhere needs no fine step.
        best = len(cost) - 1 - int(np.argmin(cost[::-1]))
        chosen[curve.name] = float(2.0 ** fine[best])
    return chosen


def _share_evenly(curves: Sequence[RateCurve], dial: float) -> dict[str, float]:
    """Every weight the same multiple of its own deviation, 2^dial: what a sensitivity must beat."""
    multiple = float(np.clip(2.0**dial, FINEST, COARSEST))
    return {curve.name: multiple for curve in curves}


def _find_dial_range(
    curves: Sequence[RateCurve], slopes: Mapping[str, float]
) -> tuple[float, float]:
    """(finest, coarsest) dial between which the steps move at all."""
    largest = max((slopes.get(curve.name, 0.0) / curve.size for curve in curves), default=1.0)
    smallest = min(
        (slopes[c.name] / c.size for c in curves if slopes.get(c.name, 0.0) > 0), default=largest
    )
    # At the optimum of the high rates 2 a Δ² = λ n / ln 2.
    low = np.log2(max(smallest, 1e-30) * 2 * FINEST**2)
    high = np.log2(max(largest, 1e-30) * 2 * COARSEST**2)
    return float(low), float(high)


def _expect_bits(curves: Sequence[RateCurve], multiples: Mapping[str, float]) -> float:
    """Entropy of all weights together, in bits, by the curves."""
    return sum(curve.bits_at(multiples[curve.name]) * curve.size for curve in curves)


def find_dial(
    curves: Sequence[RateCurve], slopes: Mapping[str, float], bits: float, *, rounds: int = 40
) -> float:
    """Find the dial at which the curves expect a number of bits, by bisection.

    Args:
        curves: rate of each weight.
        slopes: weight -> a_l, as for `allocate`.
        bits: of all weights together.
        rounds: how often the range is halved.

    Returns:
        The position; an end of the range where none expects so many.
    """
    low, high = _find_dial_range(curves, slopes)
    for _ in range(rounds):
        middle = (low + high) / 2
        if _expect_bits(curves, allocate(curves, slopes, middle)) > bits:
            low = middle
        else:
            high = middle
    return (low + high) / 2
