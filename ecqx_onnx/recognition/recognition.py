"""Float weights that some quantiser has already put on few values -> the same weights as levels, bit for bit.

Tried in this order: one uniform grid for the tensor, one per output channel, a codebook of at most 256 values.
Nothing is rounded: a tensor is recognised only if its levels give back every float exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

MAX_LEVEL = 127
MAX_CODEBOOK = 256
# A grid so wide that few of its levels occur (0, 0.3 and -0.17 are levels 0, 90 and -51) takes more bits than a codebook.
SMALL_LEVEL, SMALL_CODEBOOK = 15, 16
SAMPLE = 4096  # entries looked at before the whole tensor is


@dataclass(frozen=True)
class NotRecognized:
    """Why a tensor stays float."""

    name: str
    reason: str


def recognize(name: str, weight: np.ndarray) -> QuantTensor | NotRecognized:
    """weight: float32, any shape. Exact, or the reason why not; a result always takes fewer bytes than the floats."""
    if weight.ndim < 2:
        return NotRecognized(name, "a vector (bias or normalisation): stays float")
    if weight.size == 0 or not np.isfinite(weight).all():
        return NotRecognized(
            name, "it is empty" if weight.size == 0 else "it holds NaN or infinite values"
        )
    found = fit_one_step(weight)
    if found is None:
        found = next(
            (f for axis in (0, 1) if (f := fit_channel_steps(weight, axis)) is not None), None
        )
    if found is None:
        return NotRecognized(
            name,
            f"its {weight.size} entries lie on more than {MAX_CODEBOOK} values and on no uniform grid per channel",
        )
    tensor = QuantTensor(name, *found)
    table = (
        tensor.meaning.step.size
        if isinstance(tensor.meaning, Scale)
        else tensor.meaning.values.size
    )
    if tensor.size * tensor.bits + 32 * table >= 24 * tensor.size:
        return NotRecognized(
            name, f"{table} scales or values for {tensor.size} entries would save next to nothing"
        )
    return tensor


def fit_one_step(weight: np.ndarray) -> tuple[np.ndarray, Scale | Codebook] | None:
    if np.unique(weight.reshape(-1)[:SAMPLE]).size > MAX_CODEBOOK:
        return None
    values, index = np.unique(
        weight + np.float32(0), return_inverse=True
    )  # -0.0 and 0.0 are one value
    if values.size > MAX_CODEBOOK:
        return None
    grid = fit_grid(values[None, :])
    if grid is not None and (np.abs(grid[0]).max() <= SMALL_LEVEL or values.size > SMALL_CODEBOOK):
        levels, step = grid
        return levels[0][index].reshape(weight.shape), Scale(step.reshape(()))
    # Rotate the sorted table so that zero (or the value nearest to it) is entry 0 and the negative ones wrap round to the
    # end; a level is then a signed index, as Codebook says. Rotation keeps neighbours, but the table must not be longer
    # on either side than int8 reaches.
    zero = int(np.argmin(np.abs(values)))
    zero = min(max(zero, values.size - 128), 128)
    levels = (index.reshape(weight.shape) - zero).astype(np.int8)
    return levels, Codebook(np.roll(values, -zero).astype(np.float32))


def fit_channel_steps(weight: np.ndarray, axis: int) -> tuple[np.ndarray, Scale] | None:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    if np.unique(rows[np.argmax(np.abs(rows).max(axis=1))]).size > MAX_CODEBOOK:
        return None
    grid = fit_grid(rows)
    if grid is None:
        return None
    levels, step = grid
    moved = [weight.shape[axis], *(length for i, length in enumerate(weight.shape) if i != axis)]
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.moveaxis(levels.reshape(moved), 0, axis), Scale(step.reshape(shape))


def fit_grid(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(levels int8 [C, n], step float32 [C]) with float32(level)*step == rows bit for bit, the fewest levels each; or None."""
    peak = np.abs(rows).max(axis=1).astype(np.float32)
    levels = np.zeros(rows.shape, np.int8)
    step = np.ones(len(rows), np.float32)
    pending = np.flatnonzero(peak > 0)
    for highest in range(1, MAX_LEVEL + 1):
        for direction in (0.0, np.inf, -np.inf):  # peak/highest rounded, and its two neighbours
            if pending.size == 0:
                return levels, step
            candidate = peak[pending] / np.float32(highest)
            if direction:
                candidate = np.nextafter(candidate, np.float32(direction))
            if not (candidate > 0).all():
                continue
            # A cheap look at each row's first entries spares nearly all full comparisons.
            head = rows[pending, :8]
            likely = (np.rint(head / candidate[:, None]) * candidate[:, None] == head).all(axis=1)
            chosen, candidate = pending[likely], candidate[likely]
            if chosen.size == 0:
                continue
            k = np.rint(rows[chosen] / candidate[:, None])
            exact = ((k * candidate[:, None] == rows[chosen]) & (np.abs(k) <= MAX_LEVEL)).all(
                axis=1
            )
            levels[chosen[exact]] = k[exact].astype(np.int8)
            step[chosen[exact]] = candidate[exact]
            pending = np.setdiff1d(pending, chosen[exact])
    return (levels, step) if pending.size == 0 else None
