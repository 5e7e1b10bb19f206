"""Finds the tensor that losses and metrics look at, in whatever a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecqx_onnx.errors import DataError, ModelError

FIRST_CHOICES = ("logits", "scores", "prediction", "predictions", "output", "out")


def list_tensors(output: Any) -> dict[str, Tensor]:
    """List the floating-point tensors of an output.

    Args:
        output: a tensor, or a dict, dataclass, tuple or list that holds tensors, at any depth.

    Returns:
        Tensors by name, such as "logits" or "1.boxes", in the order they are met; one tensor alone
        has the name "".
    """
    found: dict[str, Tensor] = {}
    _collect("", output, found)
    return found


def _collect(prefix: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            found[prefix] = value
        return
    for key, item in _list_items(value):
        _collect(f"{prefix}.{key}" if prefix else str(key), item, found)


def _list_items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return []


def find_scores(output: Any) -> Tensor:
    """Find the tensor of an output that targets are compared with.

    Args:
        output: what the model returned.

    Returns:
        The tensor itself; of several the one called `logits`, or as in FIRST_CHOICES; else the
        first one.

    Raises:
        ModelError: if it holds no tensor of floats.
    """
    found = list_tensors(output)
    if not found:
        raise ModelError(
            f"the model returns a {type(output).__name__} without a tensor of floats: give --loss"
            " FILE.py:FUNCTION, which gets what the model returned"
        )
    for name in FIRST_CHOICES:
        if name in found:
            return found[name]
    return next(iter(found.values()))


def align(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Bring scores and targets of equal size to one shape.

    [N, 1] against [N] would broadcast to [N, N], and train on nonsense without a word.

    Args:
        scores: the model's output.
        target: as many values.

    Returns:
        Both, in the scores' shape; the target as floats.

    Raises:
        DataError: if they differ in more than axes of length one.
    """
    shape = [length for length in scores.shape if length != 1]
    if shape != [length for length in target.shape if length != 1]:
        raise DataError(
            f"targets of shape {tuple(target.shape)} do not fit the model's output"
            f" {tuple(scores.shape)}: give one value for each value of the output"
        )
    return scores, target.to(scores.dtype).reshape(scores.shape)


def move_classes_second(scores: Tensor, target: Tensor) -> Tensor:
    """Bring class scores to the order of torch's cross entropy.

    Args:
        scores: [N, C, ...], or [N, ..., C] as language models have them.
        target: the classes [N, ...].

    Returns:
        [N, C, ...].

    Raises:
        DataError: if there is not one target for each set of scores.
    """
    if scores.ndim >= 2 and target.shape == (scores.shape[0], *scores.shape[2:]):
        return scores
    if scores.ndim >= 3 and target.shape == scores.shape[:-1]:
        return scores.movedim(-1, 1)
    raise DataError(
        f"targets of {target.dtype} {tuple(target.shape)} do not fit the model's output"
        f" {tuple(scores.shape)}: cross-entropy needs one class index per sample (or position), and"
        " one output per class; --loss mse, l1, bce or dice is for other targets"
    )


def call_model(model: Callable[..., Any], x: Any) -> Any:
    """Run a model on a batch.

    Args:
        model: a module.
        x: its input, a tuple of its inputs, or a mapping of its arguments.

    Returns:
        What the model returns.
    """
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, tuple):
        return model(*x)
    return model(x)


def count_samples(x: Any) -> int:
    """Count the samples of a batch.

    Args:
        x: a tensor, or a tuple or mapping of tensors, [N, ...].

    Returns:
        N of the first tensor.
    """
    if isinstance(x, Tensor):
        return len(x)
    values = x.values() if isinstance(x, Mapping) else x
    return count_samples(next(iter(values)))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change every tensor of a batch.

    Args:
        change: what is done to each.
        value: a tensor, or mappings, tuples and lists of them; other values stay.

    Returns:
        The same structure with changed tensors.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(change, item) for item in value)
    return value


@torch.no_grad()
def run_float(teacher: nn.Module, x: Any) -> Any:
    """Run the float network on a batch, without gradients.

    Args:
        teacher: the network as it was before the training.
        x: as for `call_model`.

    Returns:
        Its outputs.
    """
    return call_model(teacher, x)
