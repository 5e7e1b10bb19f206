"""Random values for one input of a model that mean something to it.

Floats are normal, integers 0 or 1, which every table of two rows has. A mask that hides a whole
row makes NaN of it, or whatever a runtime's kernel does then: masks hide the end of rows, as a
batch of texts of unequal length has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MASK = "mask"
PADDING = "padding"  # of torch's attention: True is hidden
PAIRWISE = ("src_mask", "tgt_mask", "memory_mask", "attn_mask")  # [T, T], hidden or seen


def draw_values(
    name: str,
    dtype: type[np.generic] | np.dtype,
    shape: Sequence[int],
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw one input's values.

    Args:
        name: of the input; one with "mask" in it is a mask.
        dtype: any that numpy has.
        shape: its lengths.
        generator: advanced.

    Returns:
        An array of this type and shape.
    """
    is_float = np.issubdtype(dtype, np.floating)
    if MASK in name.lower() and len(shape) >= 2:
        return _draw_mask(name.lower(), shape, generator, is_float=is_float).astype(dtype)
    if is_float:
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def _draw_mask(
    name: str, shape: Sequence[int], generator: np.random.Generator, *, is_float: bool
) -> np.ndarray:
    """1 where a token is seen, by the convention of its name."""
    if is_float:  # added to scores, or multiplied with what it hides
        return np.ones(shape)
    last = shape[-1]
    if len(shape) > 2 or any(part in name for part in PAIRWISE):
        # Whatever 1 means, every row has both where it has two places.
        rows, columns = np.indices((shape[-2], last))
        return np.broadcast_to((rows + columns + 1) % 2, shape)
    lengths = generator.integers(1, last + 1, (shape[0], 1)) if last else np.zeros((shape[0], 1))
    lengths[:1] = last
    seen = np.arange(last) < lengths
    return ~seen if PADDING in name else seen
