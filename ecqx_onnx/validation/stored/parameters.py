"""Which float tensors of a model are in the file that was made from it, bit for bit.

Biases, BatchNormalization, tables, and what the quantized weights stand for, steps and all. Where
parameters were rounded to float16, or multiplied into each other, the other model must have
undergone the same before. (weights.py compares the integers, and knows of no such rewriting.)
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ecqx_onnx_converters.graph.uses import list_initializers
from ecqx_onnx_converters.serialization.reading import StoredWeight
from onnx import ModelProto, TensorProto, numpy_helper

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


@dataclass(frozen=True)
class ParametersComparison:
    """How many of a model's float tensors are in a file.

    Attributes:
        equal: those that are there, bit for bit.
        total: all of them.
        faults: one sentence for each that is not.
    """

    equal: int
    total: int
    faults: tuple[str, ...]


def list_float_tensors(model: ModelProto) -> dict[str, np.ndarray]:
    """The float initializers of all graphs in a model.

    Args:
        model: With its data in it; of a decoded float model, so that nothing is left to be computed
            of constants.

    Returns:
        Values by name; two of one name in two subgraphs count as one.
    """
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in list_initializers(model.graph)
        if tensor.data_type in FLOATS
    }


def compare_parameters(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    *,
    stored: Sequence[StoredWeight] = (),
) -> ParametersComparison:
    """Looks for each wanted tensor in the file by its type, shape and bits, since the file's names
    are others.

    Args:
        found: The file's float tensors.
        wanted: Those of the model that it was made from.
        stored: The file's quantised weights, which stand for wanted tensors, too.

    Returns:
        How many are there, and a sentence for each that is not.
    """
    dequantized = [
        np.ascontiguousarray(item.weight.dequantize())
        for item in stored
        if item.weight.integers is None
    ]
    there = Counter(_make_key(values) for values in (*found.values(), *dequantized))
    missing = dict[str, np.ndarray]()
    for name, values in wanted.items():
        keys = [_make_key(values)] + ([_make_key(values.T)] if values.ndim == 2 else [])
        present = next((key for key in keys if there[key]), None)
        if present is None:
            missing[name] = values
        else:
            there[present] -= 1  # of two that are equal, both must be there
    faults = tuple(_describe_fault(name, values, found, wanted) for name, values in missing.items())
    return ParametersComparison(len(wanted) - len(faults), len(wanted), faults)


def _make_key(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
    return values.dtype.name, values.shape, digest


def _describe_fault(
    name: str, values: np.ndarray, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> str:
    """With the number of values that differ from the most similar tensor in the file, which is
    probably meant for it."""
    known = {_make_key(other) for other in wanted.values()}
    alike = defaultdict(list)
    for other in found.values():
        if (
            other.dtype == values.dtype
            and other.shape == values.shape
            and _make_key(other) not in known
        ):
            alike[
                int(np.count_nonzero(_view_as_integers(other) != _view_as_integers(values)))
            ].append(other)
    shape = f"'{name}' {list(values.shape)}"
    if not alike:
        return f"parameter {shape} is not in the file"
    return f"parameter {shape} differs in {min(alike)} of {values.size} values"


def _view_as_integers(values: np.ndarray) -> np.ndarray:
    """As integers, so that -0 isn't 0."""
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
