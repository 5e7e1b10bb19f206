"""Say what the integers in someone else's .onnx file would take at best."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path

from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.foreign.foreign import find_quantized
from onnx import TensorProto

from ecqx_onnx.inspection.result import InspectedTensor


def list_foreign_integers(path: Path) -> tuple[InspectedTensor, ...]:
    """List the integer weights of a file that is not ours.

    Args:
        path: of the .onnx file; external data lies beside it.

    Returns:
        A row for each tensor of integers that `pack` would store anew, with the bytes that it takes
        now. Levels count from the zero point, as far as int8 allows.

    Raises:
        FileError: the file is damaged.
    """
    graph = FloatGraph.load(path)
    types = {tensor.name: tensor.data_type for tensor in graph.proto.graph.initializer}
    rows = []
    seen = set[str]()
    for weight in find_quantized(graph).weights:
        source = weight.sources[0]
        element_type = types.get(source, TensorProto.FLOAT)
        if element_type == TensorProto.FLOAT or source in seen:
            continue  # integers that a QuantizeLinear makes; another reader of the same
        seen.add(source)
        storage = TensorProto.DataType.Name(element_type)
        form = "standard"
        if weight.integers is not None:
            form = "read as integers"
            if weight.integers.digits > 1:
                storage = f"{storage}, {weight.integers.digits} in each"
        bits = _count_bits(element_type)
        if weight.integers is not None and weight.integers.digits > 1:
            bits = weight.integers.bits
        nbytes = -(-weight.tensor.levels.size * bits // 8)
        rows.append(
            InspectedTensor.from_tensor(weight.tensor, weight.sources, storage, form, nbytes)
        )
    return tuple(rows)


def _count_bits(element_type: int) -> int:
    """Bits of an element: the number at the end of the type's name."""
    return int(TensorProto.DataType.Name(element_type).lstrip(string.ascii_uppercase))


def describe_gain(rows: Sequence[InspectedTensor]) -> str:
    """Describe what a code at the entropy of all rows would take.

    Args:
        rows: see `list_foreign_integers`.

    Returns:
        A sentence; "" without rows.
    """
    nbytes = sum(row.nbytes for row in rows)
    if not nbytes:
        return ""
    least = sum(row.entropy * math.prod(row.shape) for row in rows) / 8
    return (
        f"{nbytes:,} bytes of integers have an entropy of {least:,.0f} bytes"
        f" ({least / nbytes:.0%}); `pack` comes near that, and adds its decoder of about 1.5 kB"
    )
