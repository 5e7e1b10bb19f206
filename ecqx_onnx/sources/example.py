"""The example that a network is traced with: given, FILE.py's, or made of shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ecqx_onnx.errors import OptionError
from ecqx_onnx.options.input_shape import InputShape, TypedShape
from ecqx_onnx.runtime.random_values import draw_values
from ecqx_onnx.sources.loading import Loaded

MOST_VALUES = 2**28


def choose_example(example: Any, input_shape: InputShape | None, loaded: Loaded) -> Any:
    """Take the example that is given, or make one.

    Args:
        example: a batch, or the forward's arguments in a tuple or by name; or None.
        input_shape: of one sample without the batch, or of each input by name; or None.
        loaded: the network, whose FILE.py may have an EXAMPLE or an INPUT_SHAPE.

    Returns:
        What comes first of these; where only a shape is known a batch of two zeros, where inputs
        have names their values by `draw_values`.

    Raises:
        OptionError: nothing says the shape, or it is too large.
    """
    if example is not None:
        return example
    if isinstance(input_shape, Mapping):
        generator = np.random.default_rng(0)
        return {name: _draw(name, spec, generator) for name, spec in input_shape.items()}
    if not input_shape and loaded.example is not None:
        return loaded.example
    shape = input_shape or loaded.input_shape
    if shape is None:
        raise OptionError(
            "the model's input shape is not known; add --input-shape 3,32,32 (no batch), or"
            " INPUT_SHAPE = (3, 32, 32) to FILE.py; for several inputs --input-shape"
            " NAME=1,16:int64 each (with the batch), or EXAMPLE to FILE.py"
        )
    _check_size(tuple(shape))
    if loaded.preprocessing is not None and loaded.preprocessing.kind == "indices":
        return torch.zeros(2, *shape, dtype=torch.int64)
    return torch.zeros(2, *shape)


def _draw(name: str, spec: TypedShape, generator: np.random.Generator) -> torch.Tensor:
    _check_size(spec.shape)
    return torch.from_numpy(draw_values(name, np.dtype(spec.dtype), spec.shape, generator))


def _check_size(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MOST_VALUES:
        raise OptionError(
            f"an input of shape {shape} has more than 2^28 entries; give the shape of one sample"
        )
