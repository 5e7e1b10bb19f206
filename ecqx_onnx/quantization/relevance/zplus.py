"""LRP's z+ rule at half of zennit's price.

    R_x = Σ_z (x·w)+ R_z / Σ (x·w)+

with (·)+ the positive part; a positive bias counts in the denominator. zennit runs the layer on x+
with w+ and on x- with w-, each forward and backward. After a ReLU x- is zero, so here the second
half is left out then: the same numbers. `relevance` puts this rule wherever a composite says
zennit.rules.ZPlus.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ecqx_onnx.quantization.relevance.functional import stabilize


class PositiveContributions:
    """A rule with the interface of a zennit Hook, as far as `relevance` uses it."""

    def copy(self) -> PositiveContributions:
        """Copy the rule, as zennit does for each layer.

        Returns:
            The rule itself, since it has no state.
        """
        return self

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Remember nothing: backward is given the input again.

        Args:
            module: a convolution or linear layer.
            inputs: its input, alone.
            output: its output.
        """

    def backward(
        self, module: Any, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]
    ) -> tuple[Tensor]:
        """Share the relevance of the output by positive contributions alone: the z+ rule.

        Args:
            module: a convolution or linear layer.
            grad_input: the layer's input x, alone.
            grad_output: the relevance R of its output, alone.

        Returns:
            The relevance of x, alone.
        """
        (x,), (R,) = grad_input, grad_output
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        with torch.enable_grad():
            smallest = float(x.amin()) if x.numel() else 0.0
            positive = (x if smallest >= 0 else x.clamp(min=0)).detach().requires_grad_()
            z = run_with(
                module, weight.clamp(min=0), None if bias is None else bias.clamp(min=0), positive
            )
            parts = [positive]
            if not smallest >= 0:
                parts.append(x.clamp(max=0).requires_grad_())
                z = z + run_with(module, weight.clamp(max=0), None, parts[1])
            gradients = torch.autograd.grad(z, parts, R / stabilize(z.detach()))
        shares = [
            gradient.mul_(part.detach()) for part, gradient in zip(parts, gradients, strict=True)
        ]
        return (shares[0] if len(shares) == 1 else shares[0] + shares[1],)


def run_with(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Run a layer's own forward with other parameters, past its hooks.

    Args:
        module: a linear or convolutional layer; as before afterwards.
        weight: in place of its own, the same shape.
        bias: in place of its own; None for none.
        x: its input.

    Returns:
        The layer's output.
    """
    kept = dict(module._parameters)
    try:
        module._parameters.update({"weight": weight, "bias": bias})  # type: ignore[dict-item]
        return module.forward(x)
    finally:
        module._parameters.clear()
        module._parameters.update(kept)
