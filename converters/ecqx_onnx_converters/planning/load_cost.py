"""Estimate what decoding the packed weights of a file takes a runtime while it loads the file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed.stages import estimate_peak

# Of onnxruntime 1.32 on one thread of a server, by `make bench-load`: nanoseconds for a weight, and
# more for a level that is not zero.
WEIGHT_NANOSECONDS = 6
LEVEL_NANOSECONDS = 50
TOLD_FROM = 1 << 18  # weights; fewer are decoded in less than 20 ms


def describe_load(levels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Say what decoding costs at every load.

    Args:
        levels: int8, the packed tensors of a file.

    Returns:
        One sentence; none for a small file.
    """
    weights = sum(tensor.size for tensor in levels)
    if weights < TOLD_FROM:
        return ()
    found = sum(int(np.count_nonzero(tensor)) for tensor in levels)
    seconds = (WEIGHT_NANOSECONDS * weights + LEVEL_NANOSECONDS * found) / 1e9
    return (
        f"loading decodes {weights / 1e6:.1f} million packed weights: about {seconds:.1g} s of CPU"
        f" and {estimate_peak(levels) / 1e6:.0f} MB at the peak, which the float weights"
        f" ({4 * weights / 1e6:.0f} MB) are part of",
    )
