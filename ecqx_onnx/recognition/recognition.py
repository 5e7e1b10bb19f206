"""Recognize float weights that some quantizer has already put on few values, bit for bit.

Tried in this order: one uniform grid for the tensor, one per output channel, a codebook of at most
256 values. Nothing is rounded: a tensor is recognized only if its levels give back every float
exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

MAX_LEVEL = 127
MAX_CODEBOOK = 256
# A grid so wide that few of its levels occur (0, 0.3 and -0.17 are levels 0, 90 and -51) takes more
# bits than a codebook: beyond SMALL_LEVEL one of up to SMALL_CODEBOOK values is taken instead.
SMALL_LEVEL = 15
SMALL_CODEBOOK = 16
SAMPLE = 4096  # entries looked at before the whole tensor is


@dataclass(frozen=True)
class NotRecognized:
    """Why a tensor stays float."""

    name: str
    reason: str


def recognize(name: str, weight: np.ndarray) -> QuantTensor | NotRecognized:
    """Find levels that give back a float weight exactly.

    Args:
        name: of the weight.
        weight: float32, any shape.

    Returns:
        The quantized weight, which always takes fewer bytes than the floats; or the reason why not.
    """
    if weight.ndim < 2:
        return NotRecognized(name, "a vector (bias or normalisation): stays float")
    if weight.size == 0:
        return NotRecognized(name, "it is empty")
    if not np.isfinite(weight).all():
        return NotRecognized(name, "it holds NaN or infinite values")
    found = _fit_one_step(weight)
    for axis in (0, 1):  # of the output channels: first in most weights, second in a Gemm's
        if found is None:
            found = _fit_channel_steps(weight, axis)
    if found is None:
        return NotRecognized(
            name,
            f"its {weight.size} entries lie on more than {MAX_CODEBOOK} values and on no uniform"
            " grid per channel",
        )
    tensor = QuantTensor(name, *found)
    meaning = tensor.meaning
    table = meaning.step.size if isinstance(meaning, Scale) else meaning.values.size
    # In bits, against the 32 of a float: three quarters of them at most.
    if tensor.size * tensor.bits + 32 * table >= 24 * tensor.size:
        return NotRecognized(
            name, f"{table} scales or values for {tensor.size} entries would save next to nothing"
        )
    return tensor


def _fit_one_step(weight: np.ndarray) -> tuple[np.ndarray, Scale | Codebook] | None:
    """Levels with one step for the tensor, or with a codebook; None for too many values."""
    if np.unique(weight.reshape(-1)[:SAMPLE]).size > MAX_CODEBOOK:
        return None
    # With 0 added, -0.0 and 0.0 are one value.
    values, index = np.unique(weight + np.float32(0), return_inverse=True)
    if values.size > MAX_CODEBOOK:
        return None
    grid = _fit_grid(values[None, :])
    if grid is not None and (np.abs(grid[0]).max() <= SMALL_LEVEL or values.size > SMALL_CODEBOOK):
        levels, step = grid
        return levels[0][index].reshape(weight.shape), Scale(step.reshape(()))
    # Rotate the sorted table so that zero (or the value nearest to it) is entry 0 and the negative
    # ones wrap round to the end; a level is then a signed index, as Codebook says. Rotation keeps
    # neighbors, but the table must not be longer on either side than int8 reaches.
    zero = int(np.argmin(np.abs(values)))
    zero = min(max(zero, values.size - 128), 128)
    levels = (index.reshape(weight.shape) - zero).astype(np.int8)
    return levels, Codebook(np.roll(values, -zero).astype(np.float32))


def _fit_channel_steps(weight: np.ndarray, axis: int) -> tuple[np.ndarray, Scale] | None:
    """Levels with a step for each index of one axis; None if there are none."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    # The largest channel tells soon that a weight is an ordinary float.
    if np.unique(rows[np.argmax(np.abs(rows).max(axis=1))]).size > MAX_CODEBOOK:
        return None
    grid = _fit_grid(rows)
    if grid is None:
        return None
    levels, step = grid
    moved = [weight.shape[axis], *weight.shape[:axis], *weight.shape[axis + 1 :]]
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.moveaxis(levels.reshape(moved), 0, axis), Scale(step.reshape(shape))


def _fit_grid(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The fewest levels on a uniform grid for each row, if there are such.

    (levels int8 [C, n], step float32 [C]) with float32(level) * step == rows bit for bit; None if a
    row lies on no grid of at most MAX_LEVEL levels to either side.
    """
    peak = np.abs(rows).max(axis=1).astype(np.float32)
    levels = np.zeros(rows.shape, np.int8)
    step = np.ones(len(rows), np.float32)
    pending = np.flatnonzero(peak > 0)
    for highest in range(1, MAX_LEVEL + 1):
        # 1. If a row's largest entry is level `highest`, its step is peak / highest, rounded, or
        #    one of that number's two neighbors.
        for direction in (0.0, np.inf, -np.inf):
            if pending.size == 0:
                return levels, step
            candidate = peak[pending] / np.float32(highest)
            if direction:
                candidate = np.nextafter(candidate, np.float32(direction))
            if not (candidate > 0).all():
                continue
            # 2. A cheap look at each row's first entries spares nearly all full comparisons.
            head = rows[pending, :8]
            likely = (np.rint(head / candidate[:, None]) * candidate[:, None] == head).all(axis=1)
            chosen = pending[likely]
            candidate = candidate[likely]
            if chosen.size == 0:
                continue
            # 3. Rows that the step gives back bit for bit are done: no lower `highest` did.
            k = np.rint(rows[chosen] / candidate[:, None])
            is_equal = k * candidate[:, None] == rows[chosen]
            exact = (is_equal & (np.abs(k) <= MAX_LEVEL)).all(axis=1)
            levels[chosen[exact]] = k[exact].astype(np.int8)
            step[chosen[exact]] = candidate[exact]
            pending = np.setdiff1d(pending, chosen[exact])
    return (levels, step) if pending.size == 0 else None
