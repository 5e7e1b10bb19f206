"""Rounding without training: levels near the weights, chosen so that their errors cancel.

The nearest level is best for each weight alone. A layer's outputs, however, see the sum of the
errors times its inputs, which behind a Relu are all positive and, next to each other in an image,
nearly equal: errors that add up to zero over a filter's window, and over all of an output's
weights, nearly vanish in it. As many weights as the sum is steps away from zero take their second
nearest level, those first for which that makes least difference.
[SQuant, Guo et al. 2022, arXiv 2202.07471: its steps SQuant-K and SQuant-C, simplified]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecqx_onnx.quantization.levels.grid import Grid


def round_to_cancel(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Round weights so that each output's errors add up to half a step at most.

    Args:
        weight: float, outputs along dimension 0, one filter window per output and input in the
            dimensions from 2.
        step: as `fit_step` gives it.
        grid: the levels; its ends may be in the way of a smaller sum.

    Returns:
        int8, the weight's shape.
    """
    position = weight.detach().double() / step.double()
    levels = position.round().clamp(grid.lowest, grid.highest)
    if weight.ndim > 2:
        levels = _balance_rows(levels.flatten(2), position.flatten(2), grid).flatten(
            1
        )  # the errors of each window
        position = position.flatten(1)
    return _balance_rows(levels, position, grid).to(torch.int8).reshape(weight.shape)


def _balance_rows(levels: Tensor, position: Tensor, grid: Grid) -> Tensor:
    """The levels with each row's Σ (level - position) brought to within half a step."""
    error = levels - position
    total = error.sum(-1, keepdim=True)
    direction = total.sign()
    changed = levels - direction
    possible = (changed >= grid.lowest) & (changed <= grid.highest) & (error * direction > 0)
    order = torch.where(possible, error * direction, -torch.inf).argsort(
        dim=-1, descending=True, stable=True
    )
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return torch.where(possible & (place < total.abs().round()), changed, levels)
