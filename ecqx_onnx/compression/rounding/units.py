"""The unit of a weight's step: one for the tensor, or one for each output row.

A convolution whose BatchNorm is folded in has rows of very different sizes, and its outputs count
alike: one step for all is right, and takes no room. A matrix of a transformer has rows with single
entries at a hundred deviations; a step of its own keeps such a row's levels within int8.
"""

from __future__ import annotations

import numpy as np

from ecqx_onnx.compression.model.weights import Weight

PER_ROW_FROM = 128  # columns: below, a step for each row takes a noticeable share of its levels


def choose_unit(weight: Weight, matrices: np.ndarray) -> np.ndarray:
    """float32 [1, 1, 1] or [groups, rows, 1], positive: what a step of 1.0 is.

    Args:
        weight: its layout says whether rows can have steps of their own.
        matrices: float32 [groups, rows, columns].

    Returns:
        The root mean square of all entries, or that of each row.
    """
    whole = np.float32(np.sqrt(np.mean(np.square(matrices, dtype=np.float64))))
    whole = max(whole, np.finfo(np.float32).tiny)
    columns = matrices.shape[-1]
    by_row = weight.kind in ("matrix", "matrix_transposed") and columns >= PER_ROW_FROM
    if not by_row or weight.step_shape() == ():
        return np.full((1, 1, 1), whole, np.float32)
    rows = np.sqrt(np.mean(np.square(matrices, dtype=np.float64), axis=-1, keepdims=True))
    return np.maximum(rows, 1e-3 * whole).astype(np.float32)
