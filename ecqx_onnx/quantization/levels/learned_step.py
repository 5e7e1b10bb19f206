"""Step sizes Δ that are learned together with the weights.

LSQ (Esser et al., "Learned step size quantization", arXiv 1902.08153): through the straight-through
estimator
    ∂(kΔ)/∂Δ = k - W/Δ  inside the grid,  k where W is beyond it,
here followed by Adam on log Δ, so that a step stays positive and its rate does not depend on its
size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecqx_onnx.errors import OptionError
from ecqx_onnx.quantization.levels.grid import Grid

MOMENTS = (0.9, 0.999)  # Adam's


class StepOptimizer:
    """Adam on log Δ of one tensor. State: how many steps, and two moments shaped as Δ."""

    def __init__(self, step: Tensor, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first, self.second = torch.zeros_like(step), torch.zeros_like(step)

    @torch.no_grad()
    def step(
        self,
        name: str,
        gradient: Tensor | None,
        background: Tensor,
        levels: Tensor,
        step: Tensor,
        grid: Grid,
    ) -> Tensor:
        """Take one step of Adam on log Δ.

        Args:
            name: the weight's, for the message.
            gradient: of the loss with respect to the weight kΔ, its shape.
            background: W, likewise.
            levels: k, int8, likewise.
            step: Δ, float32, () or keepdims-shaped.
            grid: the levels that there are.

        Returns:
            The next Δ, shaped as the present one.

        Raises:
            OptionError: there is no gradient.
        """
        if gradient is None:
            raise OptionError(
                f"step='learned' needs the gradient of '{name}': "
                "call quantizer.step() before optimizer.zero_grad()"
            )
        position = background / step
        beyond = (position <= grid.lowest) | (position >= grid.highest)
        slope = torch.where(beyond, levels.to(position.dtype), levels - position)
        slope = (gradient * slope).sum_to_size(step.shape).float() * step  # ∂L/∂log Δ = Δ ∂L/∂Δ
        self.count += 1
        self.first.lerp_(slope, 1 - MOMENTS[0])
        self.second.lerp_(slope.square(), 1 - MOMENTS[1])
        unbiased = self.first / (1 - MOMENTS[0] ** self.count)
        spread = (self.second / (1 - MOMENTS[1] ** self.count)).sqrt()
        return step * torch.exp(-self.rate * unbiased / (spread + 1e-12))

    def to(self, device: torch.device) -> None:
        """Move the moments.

        Args:
            device: where the weight is now.
        """
        self.first, self.second = self.first.to(device), self.second.to(device)

    def state(self) -> dict[str, Any]:
        """Copy what a resumed run needs.

        Returns:
            The count and the two moments.
        """
        return {"count": self.count, "first": self.first.clone(), "second": self.second.clone()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state.

        Args:
            state: as `state` gave it.
            device: where the weight is.
        """
        self.count = state["count"]
        self.first = state["first"].clone()
        self.second = state["second"].clone()
        self.to(device)
