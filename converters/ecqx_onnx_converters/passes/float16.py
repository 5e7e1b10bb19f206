"""Store float parameters that are not quantised as float16, with a Cast to float32 behind them.

Runtimes fold the Cast while loading: inference is as it was, with rounded parameters. Vectors are
one tensor, cast once and split. A parameter is stored so where it takes fewer bytes, Cast included,
and where rounding is harmless:

    |float16(p) - p|  <=  2^-11 |p|        always, or
                      <=  2^-11 max |p|    where p is only added or multiplied into sums.

float16 has 11 significant bits, but fewer below 2^-14. In sums (biases, weights) the rounding of
the tensor's largest entry outweighs that of its small ones.

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
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.passes.work import Work

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
    """What was rounded to float16.

    Attributes:
        names: of the parameters.
        entries: how many numbers these are.
        rounding: the largest |float16(p) - p| / max |p| of one tensor.
        steps: how many steps of quantised weights are rounded as well.
    """

    names: tuple[str, ...] = ()
    entries: int = 0
    rounding: float = 0.0
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
    """One float parameter that can be stored as float16.

    Attributes:
        tensor: as declared in a graph.
        half: its values as float16.
        moved: how far, as in Halved.rounding.
    """

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
    if linear:
        magnitude = magnitude.max()
    if (error <= RELATIVE * magnitude).all():
        return half
    return None


def store_float16(work: Work) -> Work:
    """Store float parameters as float16, with a Cast behind each.

    Args:
        work: its quantized weights are left alone. Is not changed.

    Returns:
        The new graph; a Halved as the last note says what was rounded, `round_steps` included.
    """
    graph = work.graph
    proto, weights = _copy(graph)
    main, taken = proto.graph, list_value_names(proto.graph)
    parameters = _list_parameters(proto, weights, _list_quantized(work))
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
    halved = Halved(
        names,
        entries=sum(parameter.half.size for parameter in parameters),
        rounding=max((parameter.moved for parameter in parameters), default=0.0),
        steps=sum(note.steps for note in work.find_notes(Halved)),
    )
    others = [note for note in work.notes if not isinstance(note, Halved)]
    return replace(work, graph=FloatGraph(proto, weights), notes=(*others, halved))


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


def round_steps(work: Work) -> Work:
    """Round the steps of weights that have several to float16, where that is harmless.

    Args:
        work: is not changed.

    Returns:
        The matching with rounded steps, still float32; a Halved as the last note counts them.
    """
    found: list[GraphWeight] = []
    entries = 0
    for weight in work.matching.found:
        half = _round_step(weight)
        if half is not None:
            entries += half.size
            tensor = replace(weight.tensor, meaning=Scale(half.astype(np.float32)))
            weight = replace(weight, tensor=tensor)
        found.append(weight)
    matching = replace(work.matching, found=tuple(found))
    return replace(work, matching=matching, notes=(*work.notes, Halved(steps=entries)))


def _round_step(weight: GraphWeight) -> np.ndarray | None:
    """The weight's steps as float16; None where it has none, or they stay float32."""
    meaning = weight.tensor.meaning
    if weight.integers is not None or not isinstance(meaning, Scale):
        return None
    return round_to_float16(meaning.step, linear=False)


def round_parameters(work: Work) -> Work:
    """Round the parameters that `store_float16` rounds, and keep them float32.

    Args:
        work: its quantized weights are left alone. Is not changed.

    Returns:
        A new graph that computes what the one of `store_float16` does.
    """
    proto, weights = _copy(work.graph)
    for parameter in _list_parameters(proto, weights, _list_quantized(work)):
        _put(parameter.tensor, parameter.half.astype(np.float32), weights)
    return replace(work, graph=FloatGraph(proto, weights))


def _list_quantized(work: Work) -> set[str]:
    """Names of the initializers that will be stored as integers."""
    return {weight.name for weight in work.matching.found}


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
