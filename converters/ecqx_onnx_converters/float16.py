"""(graph, weights that are quantised) -> the graph with its other float parameters as float16, cast to float32 for their readers.

Runtimes fold the Cast while loading: inference is as it was, with rounded parameters. A parameter is stored so where it takes
fewer bytes, Cast included, and where rounding is harmless:

    |float16(p) - p|  <=  2^-11 |p|           always: float16 has 11 significant bits, but below 2^-14 fewer; or
                      <=  2^-11 max |p|       where p is only added or multiplied into sums (biases, weights), since there
                                              the rounding of the tensor's largest entry outweighs it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ecqx_onnx_converters.consumers import find_uses
from ecqx_onnx_converters.files import little_endian_bytes
from ecqx_onnx_converters.graph import FloatGraph, clear_data, fresh_name, rename, tensor_values, value_names

FEWEST = 16  # entries; a Cast node with short names has up to 30 bytes, and an entry saves two
RELATIVE = 2.0**-11
# Operators that are linear in their constants. (In a variance, say, a small entry counts as much as a large one.)
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "LSTM", "GRU", "RNN", "Gather"}


@dataclass(frozen=True)
class Halved:
    """names: of the parameters. entries: how many numbers. rounding: the largest |float16(p) - p| / max |p| of one tensor."""

    names: tuple[str, ...]
    entries: int
    rounding: float

    @property
    def sentence(self) -> str:
        if not self.names:
            return "no float parameter takes fewer bytes as float16"
        return (
            f"{len(self.names)} float parameters ({self.entries:,} numbers) are float16: they moved by at most"
            f" {self.rounding:.1e} of their tensor's largest"
        )


@dataclass(frozen=True, eq=False)
class Parameter:
    """tensor: as declared in a graph. half: its values as float16; moved: how far, as in Halved.rounding."""

    tensor: TensorProto
    half: np.ndarray
    moved: float


def rounded(values: np.ndarray, *, linear: bool) -> np.ndarray | None:
    """values: float32. As float16, or None where that saves nothing or rounds too much. linear: its readers are all in LINEAR."""
    if values.dtype != np.float32 or values.size < FEWEST or not np.isfinite(values).all():
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
        error = np.abs(half.astype(np.float64) - values)
    magnitude = np.abs(values.astype(np.float64))
    return half if (error <= RELATIVE * (magnitude.max() if linear else magnitude)).all() else None


def with_float16(graph: FloatGraph, quantised: Collection[str]) -> tuple[FloatGraph, Halved]:
    """quantised: names of initializers that will be stored as integers. The graph given isn't changed."""
    proto, weights = _copy(graph)
    main, taken = proto.graph, value_names(proto.graph)
    parameters = _parameters(proto, weights, quantised)
    casts = []
    for parameter in parameters:
        tensor = parameter.tensor
        tensor.data_type = TensorProto.FLOAT16
        _put(tensor, parameter.half, weights)
        wide = fresh_name(f"{tensor.name}.float32", taken)
        rename(main, tensor.name, wide)
        casts.append(helper.make_node("Cast", [tensor.name], [wide], to=TensorProto.FLOAT))
    nodes = [*casts, *main.node]
    del main.node[:]
    main.node.extend(nodes)
    names = tuple(parameter.tensor.name for parameter in parameters)
    for index in reversed([index for index, value in enumerate(main.input) if value.name in names]):
        del main.input[index]
    entries = sum(parameter.half.size for parameter in parameters)
    return FloatGraph(proto, weights), Halved(names, entries, max((parameter.moved for parameter in parameters), default=0.0))


def round_parameters(graph: FloatGraph, quantised: Collection[str]) -> FloatGraph:
    """What `with_float16` makes the graph compute, with plain float32 parameters."""
    proto, weights = _copy(graph)
    for parameter in _parameters(proto, weights, quantised):
        _put(parameter.tensor, parameter.half.astype(np.float32), weights)
    return FloatGraph(proto, weights)


def _copy(graph: FloatGraph) -> tuple[ModelProto, dict[str, np.ndarray]]:
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    return proto, dict(graph.weights)


def _parameters(proto: ModelProto, weights: Mapping[str, np.ndarray], quantised: Collection[str]) -> list[Parameter]:
    left, uses = {*quantised, *(value.name for value in proto.graph.output)}, find_uses(proto.graph)
    found = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in left:
            values = weights[tensor.name] if tensor.name in weights else tensor_values(tensor)
            half = rounded(values, linear=all(use.node.op_type in LINEAR for use in uses.get(tensor.name, [])))
            if half is not None:
                error, largest = np.abs(half.astype(np.float64) - values).max(), np.abs(values).max()
                found.append(Parameter(tensor, half, float(error / largest) if largest else 0.0))
    return found


def _put(tensor: TensorProto, values: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    if tensor.name in weights:
        weights[tensor.name] = values
    else:
        clear_data(tensor)
        tensor.raw_data = little_endian_bytes(values)
