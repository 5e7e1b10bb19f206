"""How much the model's output moves when one weight is rounded: the a_l of the allocation.

Forward only, so that it works for any model: each weight in turn is rounded, with error feedback,
all the others stay float, and the outputs of some samples are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ecqx_onnx.compression.rounding.moments import MomentKey, Moments
from ecqx_onnx.compression.rounding.ordered import Layers, round_weight
from ecqx_onnx.runtime.runner import Feeds, Runner

PROBE = 0.7  # step of the perturbation, in units of the weight's deviation
LEAST = 1e-12  # squared relative error that is told from none


def measure_sensitivity(
    layers: Layers,
    units: Mapping[str, np.ndarray],
    moments: Mapping[MomentKey, Moments],
    runner: Runner,
    batches: Sequence[Feeds],
    *,
    probe: float = PROBE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Squared relative error of the outputs, per squared unit of each weight's step.

    Args:
        layers: the network.
        units: weight -> step of one unit.
        moments: of the float network.
        runner: with all of `layers.variable`.
        batches: some samples.
        probe: step, in units, at which it is measured.
        progress: called with (weights done, weights).
    Returns:
        Weight -> a_l, the mean over outputs of ||y - y'||² / ||y||², divided by probe².
    """
    expected = [runner.run(feeds) for feeds in batches]
    slopes = {}
    for number, weight in enumerate(layers.weights):
        if progress is not None:
            progress(number, len(layers.weights))
        key = MomentKey.of(weight)
        known = None if key is None else moments.get(key)
        step = units[weight.name] * np.float32(probe)
        one = round_weight(layers, weight, step, known, known, None)
        found = [runner.run(feeds, weights=one.changed) for feeds in batches]
        slopes[weight.name] = _measure_squared_error(expected, found) / probe**2
    return slopes


def fill_unmoved(slopes: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Slopes with those of weights that moved nothing raised to the typical one for their size.

    A branch that the data never take looks as if it did not matter; other data may take it.

    Args:
        slopes: weight -> a_l.
        sizes: weight -> entries.

    Returns:
        Weight -> a_l, all of them positive.
    """
    moving = [slopes[name] / sizes[name] for name in slopes if slopes[name] > LEAST]
    typical = float(np.median(moving)) if moving else 1.0
    return {
        name: slope if slope > LEAST else typical * sizes[name] for name, slope in slopes.items()
    }


def _measure_squared_error(
    expected: Sequence[Sequence[np.ndarray]], found: Sequence[Sequence[np.ndarray]]
) -> float:
    """Mean over outputs of ||y - y'||² / ||y||² over all batches."""
    outputs = len(expected[0])
    total = 0.0
    for index in range(outputs):
        square, moved = 0.0, 0.0
        for before, after in zip(expected, found, strict=True):
            y = before[index].astype(np.float64)
            z = after[index].astype(np.float64)
            square += float((y * y).sum())
            same = y.shape == z.shape
            moved += float(((y - z) ** 2).sum()) if same else float((y * y).sum())
        total += moved / square if square else 0.0
    return total / outputs if np.isfinite(total) else 1.0
