"""Operators that no module wraps: their spellings, and the tensors in their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def list_spellings(*names: str) -> frozenset[Callable]:
    """Find every spelling of operators: torch.x, torch.nn.functional.x and Tensor.x.

    Args:
        *names: of the operators; one that torch lacks is left out.

    Returns:
        The functions.
    """
    found: set[Any] = set()
    for home in (torch, F, Tensor):
        found.update(getattr(home, name) for name in names if hasattr(home, name))
    return frozenset(found)


ADDITIONS = list_spellings("add", "__add__", "__radd__")

AUGMENTED = {
    f"__i{name}__": getattr(Tensor, f"__{name}__") for name in ("add", "sub", "mul", "truediv")
}


def find_tensors(value: Any) -> list[Tensor]:
    """Find the tensors in arguments.

    Args:
        value: anything; lists, tuples and dicts are looked into.

    Returns:
        The tensors, in order.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:
        found += find_tensors(item)
    return found


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Replace the tensors in arguments.

    Args:
        value: anything; lists, tuples and dicts are looked into.
        function: gives each tensor's replacement.

    Returns:
        The same structure.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value
