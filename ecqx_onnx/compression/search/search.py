"""Turns the dial until the file keeps to its bounds: the smallest, or within a size the best.

Coordinates are bits per weight. A finer file is a better one, so that one number is searched for:
its bytes are nearly linear in the bits, and errors halve with each bit more, which tells where to
look next; a bracket makes sure that the search ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ecqx_onnx.compression.search.bounds import Bounds
from ecqx_onnx.compression.search.points import Candidate, Point
from ecqx_onnx.compression.search.quality import Quality
from ecqx_onnx.validation.outputs.metrics import Proportion

LEAST_BITS, MOST_BITS = 0.3, 6.5
START = 2.2
CLOSE = 0.015  # share of bits within which a bracket is closed
MOST_POINTS = 10
USUAL_POINTS = 3  # for a size; a bound of quality takes up to twice as many
ROOM = 0.985  # a size is used at least so far, if quality is to be had for it


@dataclass(frozen=True, eq=False)
class Found:
    """What a search has found.

    Attributes:
        chosen: the best candidate: one that holds all bounds, if there is any.
        points: all tried, in the order of trying.
        held: whether `chosen` holds the bounds on the search samples.
    """

    chosen: Candidate
    points: tuple[Point, ...]
    held: bool


def search(
    make: Callable[[float], Candidate],
    bounds: Bounds,
    *,
    entries: int,
    say: Callable[[str], None] = lambda text: None,
    most_points: int = MOST_POINTS,
) -> Found:
    """Find the dial's position that keeps to the bounds.

    Args:
        make: bits per weight -> candidate.
        bounds: at least one of them.
        entries: quantized weights.
        say: told of each point.
        most_points: at most so many are made.

    Returns:
        The candidate chosen, every point, and whether the bounds hold on the search samples.
    """
    dial = _Dial(make, say, most_points)
    if bounds.limits_quality:
        dial.usual = 2 * USUAL_POINTS
        return _find_smallest(dial, bounds)
    return _find_best_within(dial, bounds, entries)


class _Dial:
    """Makes each point once and remembers the candidates that matter."""

    def __init__(
        self, make: Callable[[float], Candidate], say: Callable[[str], None], most: int
    ) -> None:
        self._make, self._say, self._most = make, say, most
        self._start = time.monotonic()
        self.usual = USUAL_POINTS
        self.points: list[Point] = []

    @property
    def spent(self) -> bool:
        return len(self.points) >= self._most

    def at(self, bits: float) -> Candidate:
        candidate = self._make(bits)
        self.points.append(candidate.point)
        done = len(self.points)
        each = (time.monotonic() - self._start) / done
        left = max(0, min(self.usual, self._most) - done)
        guess = f" (about {each * left:.0f} s for {left} more)" if left else ""
        self._say(f"point {done}: {candidate.point.sentence}{guess}")
        return candidate


def _find_best_within(dial: _Dial, bounds: Bounds, entries: int) -> Found:
    """The finest file within a size."""
    bits = bounds.bits_per_weight or START
    if bounds.max_bytes is not None:
        bits = min(bits, 8 * bounds.max_bytes / max(1, entries))
    bits = min(max(bits, LEAST_BITS), MOST_BITS)
    low, high = LEAST_BITS, MOST_BITS
    best: Candidate | None = None
    smallest: Candidate | None = None
    while True:
        candidate = dial.at(bits)
        excess = _measure_excess(candidate.point, bounds, entries)
        if excess <= 0:
            if best is None or bits > best.point.bits:
                best = candidate
            low = max(low, bits)
        else:
            high = min(high, bits)
        if smallest is None or candidate.point.nbytes < smallest.point.nbytes:
            smallest = candidate
        full = excess <= 0 and -excess <= (1 - ROOM) * max(candidate.point.bits_per_weight, 0.2)
        if full or dial.spent or (bits in (low, high) and _is_closed(low, high)):
            break
        # Nearly linear: go where the size is used up but for a thousandth.
        wish = bits - excess - 0.002 * bits
        if not low < wish < high:
            wish = high if excess <= 0 and high == MOST_BITS else (low + high) / 2
            wish = low if excess > 0 and low == LEAST_BITS and wish <= LEAST_BITS * 1.5 else wish
        if any(math.isclose(wish, point.bits, rel_tol=1e-4) for point in dial.points):
            break
        bits = wish
    return Found(best or smallest, tuple(dial.points), best is not None)


def _measure_excess(point: Point, bounds: Bounds, entries: int) -> float:
    """Bits per weight by which the point is too large; negative where there is room."""
    excess = -math.inf
    if bounds.max_bytes is not None:
        excess = 8 * (point.nbytes - bounds.max_bytes) / max(1, entries)
    if bounds.bits_per_weight is not None:
        excess = max(excess, point.bits_per_weight - bounds.bits_per_weight)
    return excess


def _is_closed(low: float, high: float) -> bool:
    return high - low <= CLOSE * high


def _find_smallest(dial: _Dial, bounds: Bounds) -> Found:
    """The coarsest file that holds the quality bounds, on the search samples and with a margin."""
    low, high = LEAST_BITS, MOST_BITS
    bits = START
    best: Candidate | None = None
    closest: Candidate | None = None
    while True:
        candidate = dial.at(bits)
        ratio = _measure_quality_ratio(candidate.point.quality, bounds)
        same = any(point.nbytes == candidate.point.nbytes for point in dial.points[:-1])
        if ratio <= 1.0:
            best, high = candidate, bits
        else:
            low = bits
        better = closest is None or ratio < _measure_quality_ratio(closest.point.quality, bounds)
        if better:
            closest = candidate
        if dial.spent or same or _is_closed(low, high):
            break
        wish = _choose_next_bits(bits, ratio, low, high)
        if any(math.isclose(wish, point.bits, rel_tol=1e-4) for point in dial.points):
            break
        bits = wish
    chosen = best or closest
    assert chosen is not None
    held = not bounds.misses(
        chosen.point.quality, chosen.point.nbytes, chosen.point.bits_per_weight
    )
    return Found(chosen, tuple(dial.points), held)


def _choose_next_bits(bits: float, ratio: float, low: float, high: float) -> float:
    """Where the bound is expected to be met exactly: a bit more halves the error."""
    wish = (low + high) / 2
    if ratio > 0 and math.isfinite(ratio):
        wish = bits + min(1.5, max(-1.0, math.log2(ratio)))
    width = high - low
    if high == MOST_BITS and wish >= high:
        return high
    if low == LEAST_BITS and wish <= low:
        return low
    # Inside, and not so near an end that the bracket hardly shrinks.
    edge = 0.1 * width if low > LEAST_BITS and high < MOST_BITS else 0.0
    return min(max(wish, low + edge), high - edge)


def _measure_quality_ratio(quality: Quality, bounds: Bounds) -> float:
    """How much of what is allowed is used up, with a margin for samples that were not seen: above
    1.0 a bound is missed."""
    used = [0.0]
    if bounds.max_error is not None:
        used.append(quality.uncertain_error / bounds.max_error)
    if bounds.min_agreement is not None and quality.agreement is not None:
        used.append(_share_used(_count_lost(quality.agreement), 1 - bounds.min_agreement / 100))
    if bounds.max_drop is not None and quality.drop is not None:
        samples = quality.agreement.total if quality.agreement is not None else quality.samples
        # One sample more or less is chance: a drop is told from none by more than that.
        allowed = bounds.max_drop + 50.0 / max(1, samples)
        used.append(max(0.0, quality.drop) / allowed)
        if quality.agreement is not None:
            # Few samples hide a drop: what changes its class can't be far above what may be lost.
            rough = 1 - quality.agreement.share
            used.append(rough / (0.02 + 4 * bounds.max_drop / 100))
    return max(used)


def _count_lost(same: Proportion) -> Proportion:
    return Proportion(same.total - same.hits, same.total)


def _share_used(lost: Proportion, allowed: float) -> float:
    """The share lost and a standard error, against what is allowed."""
    share = lost.share
    error = math.sqrt(share * (1 - share) / lost.total)
    wanted = share + error
    if allowed <= 0:
        return 0.0 if lost.hits == 0 else math.inf
    return wanted / allowed


def sort_finest_first(points: Sequence[Point]) -> tuple[Point, ...]:
    """Sort points for a table.

    Args:
        points: in any order.

    Returns:
        By bytes, falling.
    """
    return tuple(sorted(points, key=lambda point: -point.nbytes))
