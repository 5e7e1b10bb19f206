"""Which quantized weights of a file are PyTorch's, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ecqx_onnx_converters.matching.matching import GraphWeight, match
from ecqx_onnx_converters.serialization.reading import StoredWeight

from ecqx_onnx.tensors import QuantTensor


@dataclass(frozen=True)
class WeightsComparison:
    """What comparing the weights found.

    Attributes:
        equal: How many are right.
        total: How many there are.
        rescaled: How many carry a BatchNorm's factor per channel.
        absent: PyTorch's quantized weights that the graph does not have under any name.
        faults: One sentence for each that is wrong.
    """

    equal: int
    total: int
    rescaled: int
    absent: tuple[str, ...]
    faults: tuple[str, ...]


def compare_weights(
    stored: Sequence[StoredWeight],
    decoded: Mapping[str, np.ndarray],
    tensors: Sequence[QuantTensor],
) -> WeightsComparison:
    """Compare a file's weights with its checksums, the runtime's decoding and PyTorch's values.

    Args:
        stored: As our reader decodes them; empty for a foreign file, whose float weights are
            compared as they are.
        decoded: By name in the file's graph, what the runtime computed from the stored integers:
            floats, and the integers of tables of which it dequantizes only the rows asked for.
        tensors: PyTorch's; empty to check the file in itself.

    Returns:
        How many are right, and a sentence for each that is not.
    """
    own: set[str] = set()
    for item in stored:
        own.update((item.value, item.levels_name))
    values = {
        name: weight for name, weight in decoded.items() if weight.ndim >= 2 and name not in own
    }
    for item in stored:
        values[item.weight.name] = np.ascontiguousarray(item.weight.dequantize())
    matching = match(values, tensors)
    matched = {weight.name: weight for weight in matching.found}
    faults: dict[str, str] = {}
    for item in stored:
        name = item.weight.name
        fault = _find_stored_fault(item) or _find_decoding_fault(item, decoded)
        if fault is None and tensors:
            found = matched.get(name)
            if found is None:
                fault = _describe_other_values(values[name], name, tensors)
            else:
                fault = _find_rescaling_fault(item.weight, found)
        if fault is not None:
            faults[name] = f"weight '{name}' {fault}"
    named = {item.weight.name for item in stored}
    for missing in matching.missing:
        if missing.name in values and missing.name not in named:
            faults[missing.name] = (
                f"weight '{missing.name}' "
                f"{_describe_other_values(values[missing.name], missing.name, tensors)}"
            )
    absent = tuple(missing.name for missing in matching.missing if missing.name not in values)
    total = len(stored) or len(tensors) - len(absent)
    rescaled = sum(weight.rescaled for weight in matching.found)
    return WeightsComparison(total - len(faults), total, rescaled, absent, tuple(faults.values()))


def _find_stored_fault(item: StoredWeight) -> str | None:
    if item.crc_ok:
        return None
    return (
        "has other integers than the file's own checksum says: it was changed after it was written"
    )


def _find_decoding_fault(item: StoredWeight, decoded: Mapping[str, np.ndarray]) -> str | None:
    """What the runtime computed lies under the weight's name in the graph, maybe transposed.

    Else under that of its integers.
    """
    if item.weight.integers is None and item.value in decoded:
        wanted, found = np.ascontiguousarray(item.weight.dequantize()), decoded[item.value]
    elif item.weight.integers is None and item.levels_name in decoded:
        wanted, found = item.weight.tensor.levels, decoded[item.levels_name]
    else:
        return None
    if _are_same(wanted, found) or (wanted.ndim == 2 and _are_same(wanted.T, found)):
        return None
    return "is decoded to other values by the runtime than its integers and scale stand for"


def _find_rescaling_fault(weight: GraphWeight, found: GraphWeight) -> str | None:
    """A weight with a BatchNorm in it was found up to one factor per channel.

    Its integers must be PyTorch's.
    """
    if not found.rescaled or np.array_equal(weight.tensor.levels, found.tensor.levels):
        return None
    changed = int(np.count_nonzero(weight.tensor.levels != found.tensor.levels))
    return f"has {changed} of {weight.tensor.size} integers that are not PyTorch's"


def _describe_other_values(values: np.ndarray, name: str, tensors: Sequence[QuantTensor]) -> str:
    for tensor in tensors:
        if tensor.name == name and tensor.shape == values.shape:
            return (
                "differs from PyTorch's in "
                f"{int(np.count_nonzero(tensor.dequantize() != values))} of {tensor.size} values"
            )
    return (
        "is none of PyTorch's quantised weights, not even transposed, reordered or scaled per "
        "channel"
    )


def _are_same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and bool(np.array_equal(first, second))
