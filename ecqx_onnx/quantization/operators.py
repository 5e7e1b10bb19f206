"""Operators that no module wraps: their spellings, and the tensors in their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def list_spellings(*names: str) -> frozenset[Callable]:
    """Every spelling of these operators: torch.x, torch.nn.functional.x and Tensor.x."""
    homes = (torch, F, Tensor)
    return frozenset(getattr(home, name) for home in homes for name in names if hasattr(home, name))


ADDITIONS = list_spellings("add", "__add__", "__radd__")

AUGMENTED = {
    f"__i{name}__": getattr(Tensor, f"__{name}__") for name in ("add", "sub", "mul", "truediv")
}


def find_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in find_tensors(item)]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value
