"""Replace a weight W by its level kΔ wherever the module computes with it.

The gradient of kΔ goes to W unchanged (straight-through). It is the last parametrization of a
weight, or runs behind the forward pre-hook of torch's older weight_norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """(W, kΔ, factor) -> kΔ forward; the gradient, times the factor if there is one, to W."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, quantized: Tensor, absolute: bool) -> Tensor:
        ctx.factor = None
        if absolute:
            magnitude = quantized.abs()
            ctx.factor = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        return (gradient if ctx.factor is None else gradient * ctx.factor), None, None


class OnLevels(nn.Module):
    """The last step of a weight's computation: whatever W is, the module gets kΔ.

    Attributes:
        quantized: kΔ, of the weight's shape and type.
        absolute: whether the gradient is multiplied by |kΔ|.
    """

    quantized: Tensor

    def __init__(self, W: Tensor, *, absolute: bool) -> None:
        super().__init__()
        self.absolute = absolute
        self.register_buffer("quantized", W.detach().clone(), persistent=False)

    def forward(self, W: Tensor) -> Tensor:
        """kΔ, to which W has the gradient.

        Args:
            W: the weight as its module computes it.

        Returns:
            A tensor of its shape and dtype.
        """
        return _StraightThrough.apply(W, self.quantized, self.absolute)  # type: ignore[no-any-return]


class OnLevelsHook:
    """A forward pre-hook that runs OnLevels behind the hook of an old weight_norm."""

    def __init__(self, tensor: str, on_levels: OnLevels) -> None:
        self.tensor, self.on_levels = tensor, on_levels

    def __call__(self, module: nn.Module, _: Any) -> None:
        setattr(module, self.tensor, self.on_levels(getattr(module, self.tensor)))
