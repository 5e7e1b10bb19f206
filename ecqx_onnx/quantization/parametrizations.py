"""Handle weights that a module computes from other parameters in every forward (weight_norm, say).

Such a weight W = f(g, v) is no parameter itself: what a graph multiplies, and what is to be
quantised, is W. Both kinds that torch has are known here: torch.nn.utils.parametrize (the new
weight_norm and spectral_norm, any own parametrization), and forward pre-hooks (the old weight_norm
and spectral_norm, torch.nn.utils.prune).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ecqx_onnx.errors import ModelError
from ecqx_onnx.quantization.on_levels import OnLevels, OnLevelsHook


@dataclass(frozen=True, eq=False)
class Parametrized:
    """One weight that is computed in every forward pass.

    Attributes:
        layer: the module's name in the model.
        tensor: the weight's name in the module ("weight").
        kind: who computes it, as its class is called.
        hook: the forward pre-hook of the old kind, None for the new one.
        sources: full names of the parameters that it is computed from.
    """

    layer: str
    tensor: str
    kind: str
    hook: Any
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """The weight's full name, as if it were a parameter."""
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor

    @property
    def advice(self) -> str:
        """One sentence: why it stays float and what to do."""
        layer = f"model.{self.layer}" if self.layer else "model"
        call = f"torch.nn.utils.parametrize.remove_parametrizations({layer}, '{self.tensor}')"
        if isinstance(self.hook, WeightNorm):
            call = f"torch.nn.utils.remove_weight_norm({layer}, '{self.tensor}')"
        if isinstance(self.hook, SpectralNorm):
            call = f"torch.nn.utils.remove_spectral_norm({layer}, '{self.tensor}')"
        if isinstance(self.hook, BasePruningMethod):
            call = f"torch.nn.utils.prune.remove({layer}, '{self.tensor}')"
        old = "" if self.hook is None else ", which is remove_parametrizations for this kind"
        return (
            f"{self.kind} computes '{self.name}' in every forward pass, so it stays float: call "
            f"{call} first{old}"
        )


def find_parametrized(model: nn.Module) -> tuple[Parametrized, ...]:
    """Every weight of the model that is computed in each forward pass, in the order of its modules.

    Args:
        model: any module; it is only looked at.

    Returns:
        One entry for each such weight; empty for most models.
    """
    found: list[Parametrized] = []
    for layer, module in model.named_modules():
        found.extend(_find_in_module(layer, module))
    return tuple(found)


def _find_in_module(layer: str, module: nn.Module) -> Iterator[Parametrized]:
    prefix = f"{layer}." if layer else ""
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for tensor, chain in parametrizations.items():
            steps = [step for step in chain if not isinstance(step, OnLevels)]
            kinds = [type(step).__name__.lstrip("_") for step in steps]
            sources = [
                f"{prefix}parametrizations.{tensor}.{name}" for name, _ in chain.named_parameters()
            ]
            yield Parametrized(layer, tensor, " and ".join(kinds), None, tuple(sources))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            if isinstance(hook, WeightNorm):
                names = [f"{hook.name}_g", f"{hook.name}_v"]
            else:
                names = [f"{hook.name}_orig"]
            yield Parametrized(
                layer, hook.name, type(hook).__name__, hook, tuple(prefix + name for name in names)
            )
        if isinstance(hook, BasePruningMethod):
            tensor = hook._tensor_name
            yield Parametrized(
                layer, tensor, f"pruning ({type(hook).__name__})", hook, (f"{prefix}{tensor}_orig",)
            )


@torch.no_grad()
def compute_effective_weight(model: nn.Module, entry: Parametrized) -> Tensor:
    """The weight as the module would compute it in evaluation; nothing of the model changes.

    Args:
        model: the model that `entry` was found in.
        entry: one of its parametrized weights.

    Returns:
        A tensor of the weight's shape and dtype.
    """
    module: Any = model.get_submodule(entry.layer)
    if isinstance(entry.hook, WeightNorm):
        return entry.hook.compute_weight(module)
    if isinstance(entry.hook, SpectralNorm):
        return entry.hook.compute_weight(module, do_power_iteration=False)
    if isinstance(entry.hook, BasePruningMethod):
        return entry.hook.apply_mask(module)
    chain = module.parametrizations[entry.tensor]
    was_training = [(step, step.training) for step in chain.modules()]
    try:
        chain.eval()  # spectral_norm moves its buffers in training
        return chain()
    finally:
        for step, training in was_training:
            step.training = training


def merge_parametrizations(model: nn.Module) -> tuple[Parametrized, ...]:
    """Make every parametrized weight a plain parameter with its present value, in place.

    Args:
        model: changed in place: the parameters that a weight was computed from are gone.

    Returns:
        What was merged, in order.

    Raises:
        ModelError: a parametrization cannot be removed.
    """
    found = find_parametrized(model)
    for entry in found:
        try:
            _merge(model.get_submodule(entry.layer), entry)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            NotImplementedError,
            LookupError,
        ) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(
                f"the weight '{entry.name}' is computed by {entry.kind} in every forward pass, and "
                "this cannot be merged into "
                f"it ({reason}): call remove_parametrizations on your model first"
            ) from error
    return found


def _merge(module: nn.Module, entry: Parametrized) -> None:
    if isinstance(entry.hook, WeightNorm):
        nn.utils.remove_weight_norm(module, entry.tensor)
    elif isinstance(entry.hook, SpectralNorm):
        nn.utils.remove_spectral_norm(module, entry.tensor)
    elif isinstance(entry.hook, BasePruningMethod):
        nn.utils.prune.remove(module, entry.tensor)
    else:
        # A copy shares the class that torch made for its original, and removing takes the weight's
        # property off the class.
        kind = type(module)
        members = {
            name: value
            for name, value in vars(kind).items()
            if name not in ("__dict__", "__weakref__")
        }
        module.__class__ = type(kind.__name__, kind.__bases__, members)
        was_training = module.training
        module.eval()  # spectral_norm moves its buffers in training
        parametrize.remove_parametrizations(module, entry.tensor, leave_parametrized=True)
        module.train(was_training)
    _merge_levels(module, entry.tensor)


@torch.no_grad()
def _merge_levels(module: nn.Module, tensor: str) -> None:
    """Where a quantizer's hook held the weight on its levels, the parameter gets them."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, OnLevelsHook) and hook.tensor == tensor:
            del module._forward_pre_hooks[key]
            getattr(module, tensor).copy_(hook.on_levels.quantized)


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a module only keeps from its last forward pass are copied without
    their graph.

    Args:
        model: any module.

    Returns:
        A module that shares no tensor with `model`; ties between parameters are kept.

    Raises:
        Exception: whatever an attribute of the model raises when it is copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            for tensor in _find_computed_tensors(value):
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _find_computed_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with a graph behind them, which copy.deepcopy refuses, in an attribute or its
    lists and dicts."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _find_computed_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_computed_tensors(item)
