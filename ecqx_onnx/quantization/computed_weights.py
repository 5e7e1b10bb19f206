"""A weight W = f(g, v) that its module computes in every forward pass, held on its levels there.

The quantizer stands behind f: the module goes on with kΔ, and the gradient of kΔ goes through to W
and so to g and v, which the optimizer trains (straight-through). W, computed anew from g and v, is
the background weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from ecqx_onnx.quantization.on_levels import OnLevels, OnLevelsHook
from ecqx_onnx.quantization.parametrizations import Parametrized, compute_effective_weight


class ComputedWeight:
    """Holds one computed weight on its levels, until it is let go of."""

    def __init__(self, model: nn.Module, entry: Parametrized, *, absolute: bool) -> None:
        """Stand behind the weight's computation.

        Args:
            model: of which `entry` is; gets a parametrization or a hook more.
            entry: the weight.
            absolute: whether its gradient is multiplied by |kΔ|.
        """
        self._model, self._entry = model, entry
        self._module: Any = model.get_submodule(entry.layer)
        self.on_levels = OnLevels(compute_effective_weight(model, entry), absolute=absolute)
        self._handle: Any = None
        if entry.hook is None:
            parametrize.register_parametrization(
                self._module, entry.tensor, self.on_levels, unsafe=True
            )
        else:
            hook = OnLevelsHook(entry.tensor, self.on_levels)
            self._handle = self._module.register_forward_pre_hook(hook)

    @torch.no_grad()
    def compute_background(self) -> Tensor:
        """Compute W of what the optimizer has made of its parameters.

        Returns:
            A tensor of its own.
        """
        if self._handle is not None:
            return compute_effective_weight(self._model, self._entry).detach().clone()
        chain = self._module.parametrizations[self._entry.tensor]
        steps, held = list(chain), chain[-1]
        assert held is self.on_levels
        del chain[-1]
        try:
            return compute_effective_weight(self._model, self._entry).detach().clone()
        finally:
            chain.append(steps[-1])

    def let_go(self) -> None:
        """The module computes W again."""
        if self._handle is not None:
            self._handle.remove()
            return
        chain = self._module.parametrizations[self._entry.tensor]
        del chain[-1]
