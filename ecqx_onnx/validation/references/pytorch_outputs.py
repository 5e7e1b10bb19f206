"""The outputs of a PyTorch model, as they are and in float64: what bounds are derived from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ecqx_onnx.errors import ModelError

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


def run_reference(
    reference: torch.nn.Module,
    inputs: Sequence[np.ndarray],
    *,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> tuple[np.ndarray, ...]:
    """Run PyTorch's model as it is, in evaluation mode; buffers that it writes are given back.

    Args:
        reference: The model.
        inputs: Its arguments, one batch.
        replaced: Parameters that take the place of the model's own in this run, by name.

    Returns:
        Its outputs, flattened.

    Raises:
        ModelError: The model does not take these inputs.
    """
    arguments = [torch.from_numpy(array) for array in inputs]
    with torch.no_grad(), _hold_evaluation_mode(reference):
        try:
            outputs = torch.func.functional_call(
                reference,
                {**_copy_buffers(reference), **(replaced or {})},
                tuple(_place_on_device(reference, arguments)),
            )
            return _convert_to_arrays(outputs)
        except Exception as error:  # the network is anybody's, and torch raises anything
            shapes = ", ".join(str(list(array.shape)) for array in inputs)
            message = " ".join(str(error).split())[:200]
            raise ModelError(
                f"the PyTorch model cannot run on the data (inputs of shape {shapes}): {message}"
            ) from None


def run_reference_exactly(
    reference: torch.nn.Module, inputs: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...] | None:
    """Run PyTorch's model in float64.

    The parameters are replaced by float64 ones for this call only. What the code still makes in a
    lower precision (`torch.zeros(..., dtype=torch.float32)`, `x.float()`, constants of an exported
    program) is raised to float64 by a dispatch mode.

    Args:
        reference: The model.
        inputs: Its arguments, one batch.

    Returns:
        Its outputs in float64, flattened; None if some operation has no float64 form.
    """
    tensors = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    raised = {name: _raise_precision(value.detach()) for name, value in tensors.items()}
    arguments = [_raise_precision(torch.from_numpy(array)) for array in inputs]
    with torch.no_grad(), _hold_evaluation_mode(reference), _Float64():
        try:
            outputs = torch.func.functional_call(
                reference, raised, tuple(_place_on_device(reference, arguments))
            )
        except Exception:  # the network is anybody's, and torch raises anything
            return None
        arrays = _convert_to_arrays(outputs)
    low = any(
        np.issubdtype(array.dtype, np.floating) and array.dtype != np.float64 for array in arrays
    )
    return None if low else arrays


def _copy_buffers(reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a forward that keeps a running state writes into: each run starts from the same."""
    return {name: value.detach().clone() for name, value in reference.named_buffers()}


@contextmanager
def _hold_evaluation_mode(reference: torch.nn.Module) -> Iterator[None]:
    """Dropout and BatchNorm in evaluation mode, each module's own flag given back after.

    (Exported ones have no `.eval()`.)
    """
    training = [module for module in reference.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Float64(TorchDispatchMode):
    """Every operation gets float64 where it would have got, or was told to make, a lower
    precision."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(
            *tree_map(_raise_precision, args), **tree_map(_raise_precision, kwargs or {})
        )


def _raise_precision(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in LOW_PRECISION else value
    return torch.float64 if isinstance(value, torch.dtype) and value in LOW_PRECISION else value


def _place_on_device(
    reference: torch.nn.Module, arguments: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    parameter = next(reference.parameters(), None)
    return [
        argument if parameter is None else argument.to(parameter.device) for argument in arguments
    ]


def _convert_to_arrays(outputs: Any) -> tuple[np.ndarray, ...]:
    return tuple(
        leaf.detach().cpu().numpy()
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, torch.Tensor)
    )
