"""Rounds to a grid of 2^bits - 1 levels: the step by least squares, errors that cancel.

With so few levels some weights lie beyond the outermost one. They take that level, and what is
lost by it is not pushed to others: it is no rounding error, and would be too much for them.
"""

from __future__ import annotations

import numpy as np

from ecqx_onnx.compression.model.weights import Weight
from ecqx_onnx.compression.rounding.rounding import ROWS_AT_ONCE, Rounded

CANDIDATES = np.linspace(0.1, 1.0, 37)  # of the step that reaches the largest weight
PER_ROW_FROM = 64  # columns, below which a step takes a noticeable share of its row
FEW_LEVELS = 3  # the outermost one, up to which rows of convolutions have steps of their own
PERCENTILE = 0.999  # of the magnitudes lies within the grid
LONG = 1000  # entries from which on a percentile leaves one out
SAMPLE = 1 << 18  # entries of a whole tensor that its step is fitted to


def outermost_level(bits: int) -> int:
    """Give the highest level of a symmetric grid.

    Args:
        bits: 2 to 8.

    Returns:
        2^(bits - 1) - 1; the grid has twice as many levels and zero.
    """
    highest: int = 2 ** (bits - 1) - 1
    return highest


def fit_capped_steps(weight: Weight, matrices: np.ndarray, highest: int) -> np.ndarray:
    """Choose the steps of a grid that ends at a level, by what is best at equal bytes.

    Measured on ResNet-20 and MiniLM (benchmarks/results/2026-12-01-compress.md): a step for each
    row wins for matrices, and for convolutions where levels are few. Errors in a convolution's
    windows cancel best where hardly a weight is clipped; for matrices the squared error decides.

    Args:
        weight: its layout says whether rows can have steps of their own.
        matrices: float32 [groups, rows, columns].
        highest: level.

    Returns:
        float32 [groups, rows, 1] or [1, 1, 1], positive.
    """
    by_row = weight.step_shape() != () and matrices.shape[-1] >= PER_ROW_FROM
    is_convolution = weight.kind.startswith("conv")
    if is_convolution and highest > FEW_LEVELS:
        by_row = False
    if not is_convolution:
        return fit_steps(matrices, highest, by_row=by_row)
    rows = np.abs(matrices if by_row else matrices.reshape(1, 1, -1))
    if rows.shape[-1] >= LONG:
        peaks = np.quantile(rows, PERCENTILE, axis=-1, keepdims=True)
    else:
        peaks = rows.max(axis=-1, keepdims=True)
    steps = (peaks / highest).astype(np.float32)
    return np.where(steps > 0, steps, np.float32(1.0))


def fit_steps(matrices: np.ndarray, highest: int, *, by_row: bool) -> np.ndarray:
    """Fit the step of smallest Σ (w - kΔ)², |k| <= highest.

    Args:
        matrices: float32 [groups, rows, columns].
        highest: level, at least 1.
        by_row: one step for each row, instead of one for all.

    Returns:
        float32 [groups, rows, 1] or [1, 1, 1], positive; 1 for rows of zeros.
    """
    if not by_row:
        flat = matrices.reshape(1, -1)
        spacing = -(-flat.shape[1] // SAMPLE)
        peak = np.abs(flat).max(axis=1, keepdims=True)
        return _fit(flat[:, ::spacing], peak, highest).reshape(1, 1, 1)
    rows = matrices.reshape(-1, matrices.shape[-1])
    peaks = np.abs(rows).max(axis=1, keepdims=True)
    return _fit(rows, peaks, highest).reshape(*matrices.shape[:2], 1)


def _fit(rows: np.ndarray, peaks: np.ndarray, highest: int) -> np.ndarray:
    """float32 [rows, 1]."""
    best = np.full(peaks.shape, np.inf)
    steps = np.ones(peaks.shape, np.float32)
    for share in CANDIDATES:
        tried = (peaks * np.float32(share / highest)).astype(np.float32)
        tried[~(tried > 0)] = 1.0
        levels = np.clip(np.rint(rows / tried), -highest, highest)
        error = np.square(rows - levels * tried, dtype=np.float64).sum(axis=1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        steps = np.where(better, tried, steps)
    return steps


def round_to_cancel(
    matrices: np.ndarray,
    steps: np.ndarray,
    highest: int,
    *,
    window: int = 1,
    cancels: bool = True,
) -> Rounded:
    """Levels near the weights whose errors add up to nearly zero over each window and each row.

    Inputs behind a Relu are positive, and neighbors in an image nearly equal: the output sees the
    sum of the errors. As many weights as the sum is steps away from zero take their second nearest
    level, those first for which it makes least difference [SQuant, Guo et al. 2022, arXiv
    2202.07471, its steps K and C, simplified].

    Args:
        matrices: float32 [groups, rows, columns].
        steps: float32, positive, broadcasts against [groups, rows, 1].
        highest: level.
        window: columns of one input channel, which lie side by side; 1 without.
        cancels: False for the nearest levels.

    Returns:
        Levels within +-highest, and the steps.
    """
    steps = np.broadcast_to(steps, (*matrices.shape[:2], 1)).astype(np.float32)
    levels = np.empty(matrices.shape, np.int8)
    loss = 0.0
    for group in range(len(matrices)):  # in parts: a table of words has many rows
        for start in range(0, matrices.shape[1], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            step = steps[group][part]
            position = matrices[group][part].astype(np.float64) / step
            found = np.clip(np.rint(position), -highest, highest)
            if cancels and window > 1:
                shape = (-1, window)
                found = _balance(found.reshape(shape), position.reshape(shape), highest)
                found = found.reshape(position.shape)
            if cancels:
                found = _balance(found, position, highest)
            levels[group][part] = found
            loss += float(np.square((found - position) * step).sum())
    return Rounded(levels, steps.copy(), loss, ())


def _balance(levels: np.ndarray, position: np.ndarray, highest: int) -> np.ndarray:
    """Levels [rows, columns] with each row's sum of errors within half a step, if ends allow it."""
    error = levels - position
    total = error.sum(axis=-1, keepdims=True)
    direction = np.sign(total)
    changed = levels - direction
    gain = error * direction
    possible = (np.abs(changed) <= highest) & (gain > 0)
    order = np.argsort(np.where(possible, -gain, np.inf), axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(order.shape[-1])[None], axis=-1)
    moved = possible & (place < np.rint(np.abs(total)))
    return np.where(moved, changed, levels)


def window_of(weight: Weight) -> int:
    """Count the columns of a weight's matrices that belong to one input channel.

    Args:
        weight: of the graph.

    Returns:
        Taps of a convolution's kernel; 1 for other weights.
    """
    return int(np.prod(weight.shape[2:])) if weight.kind == "conv" else 1
