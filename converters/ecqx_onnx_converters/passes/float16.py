"""(graph, weights that are quantised) -> the graph with its other float parameters as float16, cast
to float32 for their readers.

Runtimes fold the Cast while loading: inference is as it was, with rounded parameters. Vectors are
one tensor, cast once and split. A parameter is stored so where it takes fewer bytes, Cast included,
and where rounding is harmless:

    |float16(p) - p|  <=  2^-11 |p|           always: float16 has 11 significant bits, but below
    2^-14 fewer; or
                      <=  2^-11 max |p|       where p is only added or multiplied into sums (biases,
                      weights), since there
                                              the rounding of the tensor's largest entry outweighs
                                              it.

Steps of quantised weights, where a weight has several, are rounded by the first rule and
dequantised from float16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import Scale
from ecqx_onnx_converters.graph.files import to_little_endian
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    clear_data,
    list_value_names,
    make_fresh_name,
    read_values,
    rename_values,
)
from ecqx_onnx_converters.graph.uses import find_uses
from ecqx_onnx_converters.matching.matching import Matching

FEWEST = 16  # entries; a Cast node with short names has up to 30 bytes, and an entry saves two
RELATIVE = 2.0**-11
# Operators that are linear in their constants. (In a variance, say, a small entry counts as much as
# a large one.)
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "LSTM", "GRU", "RNN", "Gather"}
SCALED = {
    "QuantizeLinear",
    "DequantizeLinear",
}  # a bias's scale is the product of two others, exactly


@dataclass(frozen=True)
class Halved:
    """names: of the parameters. entries: how many numbers. rounding: the largest |float16(p) - p| /
    max |p| of one tensor.

    steps: how many steps of quantised weights are rounded as well.
    """

    names: tuple[str, ...]
    entries: int
    rounding: float
    steps: int = 0

    @property
    def sentence(self) -> str:
        """What was rounded and by how much, for the report."""
        if not self.names and not self.steps:
            return "no float parameter takes fewer bytes as float16"
        steps = f" and {self.steps:,} steps of quantised weights" if self.steps else ""
        return (
            f"{len(self.names)} float parameters ({self.entries:,} numbers){steps} are float16: "
            "parameters moved by at most"
            f" {self.rounding:.1e} of their tensor's largest"
        )


@dataclass(frozen=True, eq=False)
class Parameter:
    """tensor: as declared in a graph. half: its values as float16; moved: how far, as in
    Halved.rounding."""

    tensor: TensorProto
    half: np.ndarray
    moved: float


def round_to_float16(values: np.ndarray, *, linear: bool) -> np.ndarray | None:
    """Round values to float16, where that saves bytes and costs little.

    Args:
        values: float32, any shape.
        linear: whether all that read them are in LINEAR, so that an error counts against the
            largest entry instead of its own.

    Returns:
        float16 of the same shape, or None where it saves nothing or rounds too much.
    """
    if values.dtype != np.float32 or values.size < FEWEST or not np.isfinite(values).all():
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
        error = np.abs(half.astype(np.float64) - values)
    magnitude = np.abs(values.astype(np.float64))
    return half if (error <= RELATIVE * (magnitude.max() if linear else magnitude)).all() else None


def store_float16(graph: FloatGraph, quantized: Collection[str]) -> tuple[FloatGraph, Halved]:
    """Store float parameters as float16, with a Cast behind each.

    Args:
        graph: is not changed.
        quantized: names of initializers that will be stored as integers.

    Returns:
        The new graph, and what was rounded in it.
    """
    proto, weights = _copy(graph)
    main, taken = proto.graph, list_value_names(proto.graph)
    parameters = _list_parameters(proto, weights, quantized)
    vectors = [
        parameter for parameter in parameters if parameter.half.ndim == 1 and graph.opset >= 13
    ]
    names = tuple(parameter.tensor.name for parameter in parameters)
    nodes = _join_vectors(main, weights, vectors, taken) if len(vectors) > 1 else []
    for parameter in parameters:
        if len(vectors) > 1 and parameter in vectors:
            continue
        tensor = parameter.tensor
        tensor.data_type = TensorProto.FLOAT16
        _put(tensor, parameter.half, weights)
        wide = make_fresh_name(f"{tensor.name}.float32", taken)
        rename_values(main, tensor.name, wide)
        nodes.append(helper.make_node("Cast", [tensor.name], [wide], to=TensorProto.FLOAT))
    nodes.extend(main.node)
    del main.node[:]
    main.node.extend(nodes)
    for index in reversed([index for index, value in enumerate(main.input) if value.name in names]):
        del main.input[index]
    entries = sum(parameter.half.size for parameter in parameters)
    return FloatGraph(proto, weights), Halved(
        names, entries, max((parameter.moved for parameter in parameters), default=0.0)
    )


def _join_vectors(
    main: GraphProto, weights: dict[str, np.ndarray], vectors: list[Parameter], taken: set[str]
) -> list[NodeProto]:
    """Takes the vectors out of the graph's initializers; nodes that make them again under their
    names, from one tensor."""
    halves, wide, lengths = (
        make_fresh_name(name, taken) for name in ("float16", "float32", "lengths")
    )
    names = [parameter.tensor.name for parameter in vectors]
    for index in reversed(
        [index for index, tensor in enumerate(main.initializer) if tensor.name in names]
    ):
        weights.pop(main.initializer[index].name, None)
        del main.initializer[index]
    main.initializer.append(
        numpy_helper.from_array(np.concatenate([parameter.half for parameter in vectors]), halves)
    )
    sizes = [parameter.half.size for parameter in vectors]
    main.initializer.append(
        TensorProto(name=lengths, data_type=TensorProto.INT64, dims=[len(sizes)], int64_data=sizes)
    )
    cast = helper.make_node("Cast", [halves], [wide], to=TensorProto.FLOAT)
    return [cast, helper.make_node("Split", [wide, lengths], names)]


def store_half_steps(matching: Matching) -> tuple[Matching, int]:
    """Round the steps of weights that have several to float16, where that is harmless.

    Args:
        matching: is not changed.

    Returns:
        The matching with rounded steps, still float32, and how many numbers these are.
    """
    found, entries = [], 0
    for weight in matching.found:
        meaning = weight.tensor.meaning
        half = (
            round_to_float16(meaning.step, linear=False)
            if isinstance(meaning, Scale) and weight.integers is None
            else None
        )
        if half is not None:
            entries += half.size
            weight = replace(
                weight, tensor=replace(weight.tensor, meaning=Scale(half.astype(np.float32)))
            )
        found.append(weight)
    return replace(matching, found=tuple(found)), entries


def round_parameters(graph: FloatGraph, quantized: Collection[str]) -> FloatGraph:
    """Round the parameters that `store_float16` rounds, and keep them float32.

    Args:
        graph: is not changed.
        quantized: names of initializers that will be stored as integers.

    Returns:
        A new graph that computes what the one of `store_float16` does.
    """
    proto, weights = _copy(graph)
    for parameter in _list_parameters(proto, weights, quantized):
        _put(parameter.tensor, parameter.half.astype(np.float32), weights)
    return FloatGraph(proto, weights)


def _copy(graph: FloatGraph) -> tuple[ModelProto, dict[str, np.ndarray]]:
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    return proto, dict(graph.weights)


def _list_parameters(
    proto: ModelProto, weights: Mapping[str, np.ndarray], quantized: Collection[str]
) -> list[Parameter]:
    left, uses = {*quantized, *(value.name for value in proto.graph.output)}, find_uses(proto.graph)
    found = []
    for tensor in proto.graph.initializer:
        scale = any(use.node.op_type in SCALED for use in uses.get(tensor.name, []))
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in left and not scale:
            values = weights[tensor.name] if tensor.name in weights else read_values(tensor)
            half = round_to_float16(
                values, linear=all(use.node.op_type in LINEAR for use in uses.get(tensor.name, []))
            )
            if half is not None:
                error, largest = (
                    np.abs(half.astype(np.float64) - values).max(),
                    np.abs(values).max(),
                )
                found.append(Parameter(tensor, half, float(error / largest) if largest else 0.0))
    return found


def _put(tensor: TensorProto, values: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    if tensor.name in weights:
        weights[tensor.name] = values
    else:
        clear_data(tensor)
        tensor.raw_data = to_little_endian(values)
