"""Takes integers of few bits out of the bytes that hold several of them, and puts them back."""

from __future__ import annotations

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.matching.matching import Integers


def split_digits(integers: np.ndarray, bits: int) -> np.ndarray:
    """Split bytes into the integers that they hold.

    Args:
        integers: 0 to 255, of any type, one dimension or more.
        bits: Of each integer in a byte: 2, 4 or 8.

    Returns:
        int32, the last axis 8 / bits times as long; of each byte the low bits first.
    """
    shifts = np.arange(0, 8, bits)
    digits = (integers.astype(np.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return digits.reshape(*integers.shape[:-1], -1)


def join_digits(levels: np.ndarray, form: Integers) -> np.ndarray:
    """Compute the integers that the graph reads.

    Args:
        levels: int8, as stored.
        form: What they stand for.

    Returns:
        int32: levels plus offset; where a byte holds several, the last axis is that of the bytes.

    Raises:
        FileError: The levels fill no whole bytes.
    """
    if form.digits == 1:
        return levels.astype(np.int32) + form.offset
    if not levels.ndim or levels.shape[-1] % form.digits:
        raise FileError(
            f"{list(levels.shape)} integers of {form.bits} bits fill no bytes; the ONNX file is"
            " damaged"
        )
    parts = levels.reshape(*levels.shape[:-1], -1, form.digits).astype(np.int32)
    return parts @ list_powers(form).astype(np.int32) + form.offset


def list_powers(form: Integers) -> np.ndarray:
    """List what each level counts in its byte.

    Args:
        form: How many bits a level has.

    Returns:
        int8 [levels in a byte], of the first level 1.
    """
    return (1 << np.arange(0, 8, form.bits)).astype(np.int8)
