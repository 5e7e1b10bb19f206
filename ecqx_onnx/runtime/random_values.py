"""Random values for one input of a model that mean something to it.

Floats are normal, integers 0 or 1, which every table of two rows has, or below the rows of the
table that they index; positions count, lengths are those of the longest row. A mask that hides a
whole row makes NaN of it, or whatever a runtime's kernel does then: masks hide the end of rows, as
a batch of texts of unequal length has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MASK = "mask"
PADDING = "padding"  # of torch's attention: True is hidden
POSITION = "position"
LENGTHS = ("length", "lengths", "len", "lens", "seqlen", "seqlens")
PAIRWISE = ("src_mask", "tgt_mask", "memory_mask", "attn_mask")  # [T, T], hidden or seen


def draw_values(
    name: str,
    dtype: type[np.generic] | np.dtype,
    shape: Sequence[int],
    generator: np.random.Generator,
    *,
    bound: int | None = None,
    length: int | None = None,
) -> np.ndarray:
    """Draw one input's values.

    Args:
        name: of the input; one with "mask" in it is a mask.
        dtype: any that numpy has.
        shape: its lengths.
        generator: advanced.
        bound: what integers have to stay below, where that is known.
        length: of the sequence that an input of lengths counts, where that is known.

    Returns:
        An array of this type and shape.
    """
    is_float = np.issubdtype(dtype, np.floating)
    is_count = not is_float and dtype != np.bool_
    if is_count and length is not None and names_lengths(name) and len(shape) <= 1:
        return np.full(shape, length, dtype)
    if MASK in name.lower() and len(shape) >= 2:
        return _draw_mask(name.lower(), shape, generator, is_float=is_float).astype(dtype)
    if is_float:
        return generator.standard_normal(shape).astype(dtype)
    if bound is not None and POSITION in name.lower() and shape:
        return np.broadcast_to(np.arange(shape[-1]) % bound, shape).astype(dtype)
    if np.dtype(dtype) == np.object_:  # text
        return generator.integers(0, 10, shape).astype(str).astype(object)
    most = 2 if bound is None else bound
    if is_count and np.dtype(dtype).kind in "iu":
        most = min(most, int(np.iinfo(dtype).max))
    return generator.integers(0, most, shape).astype(dtype)


def names_lengths(name: str) -> bool:
    """Tell whether an input holds lengths of sequences, by its name.

    Args:
        name: such as "input_lengths" or "src_len".

    Returns:
        True for the names that exporters give such inputs.
    """
    parts = name.lower().replace(".", "_").replace("/", "_").split("_")
    return any(part in LENGTHS for part in parts)


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
