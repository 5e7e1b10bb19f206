"""Takes from an activation the vectors that a weight's rows are multiplied with.

For a convolution these are its windows (im2col), for a matrix product the last axis, for an LSTM
the steps of its sequence. Padding of a convolution is part of its windows, as the weight sees it;
padded tokens of a sentence, which a mask marks, are left out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ecqx_onnx.compression.model.weights import Product, Window


def take_input_vectors(
    activation: np.ndarray,
    product: Product,
    *,
    groups: int = 1,
    limit: int = 1 << 62,
    offset: int = 0,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors [groups, count, length] that the product multiplies its weight with.

    Args:
        product: says how the activation is read: its layout and, for a convolution, its window.
        activation: the product's input (of an LSTM's recurrent weight: its output), any float type.
        groups: of the convolution; each has channels of its own. Directions of a recurrent state.
        limit: take about this many vectors, evenly spaced, where there are more.
        offset: where the spacing begins, so that batches see other places.
        mask: bool [N, T], False for tokens that are padding.

    Returns:
        float32 [groups, count, length]; groups is 1 where all share one input.
    """
    x = activation.astype(np.float32, copy=False)
    if product.layout == "window":
        assert product.window is not None
        return _cut_windows(x, product.window, groups, limit, offset)
    if product.layout == "channels":
        flat = x.reshape(len(x), groups, x.shape[1] // groups, -1)
        return _take_every(
            flat.transpose(1, 0, 3, 2).reshape(groups, -1, flat.shape[2]), limit, offset
        )
    if product.layout == "hidden":
        states = x.transpose(1, 0, 2, 3)  # [steps, directions, N, hidden] -> directions first
        return _take_every(states.reshape(states.shape[0], -1, states.shape[-1]), limit, offset)
    if product.layout == "first":
        x = x.T
    elif product.layout == "second_last":
        x = np.swapaxes(x, -1, -2)
    elif mask is not None:
        x = _without_padding(x, mask)
    return _take_every(x.reshape(1, -1, x.shape[-1]), limit, offset)


def _take_every(vectors: np.ndarray, limit: int, offset: int) -> np.ndarray:
    """Every k-th vector, so that at most about `limit` are left."""
    spacing = max(1, math.ceil(vectors.shape[1] / limit))
    return vectors[:, offset % spacing :: spacing]


def _without_padding(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """x [N, T, ..., n] or [N·T, n] -> the rows that the mask keeps, if it fits at all."""
    if x.ndim >= 3 and x.shape[:2] == mask.shape:
        return x[mask]
    if x.ndim == 2 and len(x) == mask.size:
        return x[mask.reshape(-1)]
    return x


def _cut_windows(x: np.ndarray, window: Window, groups: int, limit: int, offset: int) -> np.ndarray:
    """x [N, C, *spatial] -> [groups, count, C / groups · kernel], kernel axes fastest."""
    spatial = x.shape[2:]
    pads = _resolve_pads(window, spatial)
    padded = np.pad(x, ((0, 0), (0, 0), *pads)) if any(map(any, pads)) else x
    reach = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    axes = tuple(range(2, x.ndim))
    views = sliding_window_view(padded, reach, axis=axes)
    steps = tuple(slice(None, None, stride) for stride in window.strides)
    taps = tuple(slice(None, None, dilation) for dilation in window.dilations)
    views = views[(slice(None), slice(None), *steps, *taps)]
    places = views.shape[2 : x.ndim]
    count = len(x) * math.prod(places)
    spacing = max(1, math.ceil(count / limit))
    chosen = np.arange(offset % spacing, count, spacing)
    where = np.unravel_index(chosen, (len(x), *places))
    picked = views[(where[0], slice(None), *where[1:])]  # type: ignore[arg-type]  # [count, C, *kernel]
    channels = x.shape[1] // groups
    flat = picked.reshape(len(chosen), groups, channels * math.prod(window.kernel))
    return flat.transpose(1, 0, 2)


def _resolve_pads(window: Window, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
    """(begin, end) of each spatial axis, ONNX's auto_pad resolved."""
    rank = len(spatial)
    if window.auto_pad == "NOTSET":
        return [(window.pads[axis], window.pads[axis + rank]) for axis in range(rank)]
    if window.auto_pad == "VALID":
        return [(0, 0)] * rank
    pads = []
    for axis, length in enumerate(spatial):
        stride = window.strides[axis]
        reach = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        total = max(0, (math.ceil(length / stride) - 1) * stride + reach - length)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if window.auto_pad == "SAME_UPPER" else (large, small))
    return pads
