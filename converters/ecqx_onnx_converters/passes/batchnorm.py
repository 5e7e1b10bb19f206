"""Fold BatchNormalization into the quantised product before it: into its scales and its bias.

    gamma · (W x + b - mean) / sqrt(variance + epsilon) + beta  =  (f W) x + (f b + beta - f mean)
    f = gamma / sqrt(variance + epsilon)

W's integers stay: f goes into their step per output channel (its sign, where it is negative, into
the channel's levels). For Conv, ConvTranspose, Gemm, and MatMul of a matrix, whose bias is then an
Add. Products with a float weight are left to the runtime, which fuses these by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.graph.constants import list_names_inside
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    find_constant,
    list_subgraphs,
    list_value_names,
    make_fresh_name,
    read_values,
)
from ecqx_onnx_converters.graph.uses import find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight, with_factor
from ecqx_onnx_converters.passes.work import Work
from ecqx_onnx_converters.refusal import Refusal

BIASED = ("Conv", "ConvTranspose", "Gemm")
ROUNDING = (
    "Quant",
    "BipolarQuant",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "Round",
    "Floor",
    "Ceil",
    "Sign",
    "IntQuant",
    "Trunc",
)
INTEGERS = (
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
)


@dataclass(frozen=True)
class BatchNorm:
    """What became of one BatchNormalization.

    Attributes:
        name: of its output.
        weight: the weight that it went into; None if it stays.
        reason: why it stays, or where it is now.
    """

    name: str
    weight: str | None
    reason: str

    @property
    def sentence(self) -> str:
        """Why it stays, for the report; empty if it doesn't."""
        if self.weight is not None:
            return ""
        return f"BatchNormalization '{self.name}' stays: {self.reason}"


@dataclass(frozen=True, eq=False)
class _Product:
    """A quantised product and the BatchNormalization behind it. bias: float32 [C], zeros if there
    is none. C: output channels."""

    node: gs.Node
    weight: GraphWeight
    bias: np.ndarray


def fold_batchnorms(work: Work, *, before_rounding: bool = True) -> Work:
    """Fold each BatchNormalization into the quantized weight before it, where that is exact.

    Args:
        work: is not changed.
        before_rounding: fold, too, where values are rounded to integers further on, though not at
            once: the last bit of a float can then become a whole level.

    Returns:
        The new graph and matching, and as a note one BatchNorm for each such node of the main
        graph, which says whether it was folded or why not.

    Raises:
        ModelError: if the new graph cannot be written.
    """
    graph, matching = work.graph, work.matching
    nodes = [node for node in graph.proto.graph.node if node.op_type == "BatchNormalization"]
    if not nodes:
        return work
    constants = _Constants(graph)
    weights = {weight.name: weight for weight in matching.found}
    try:
        ends = (*graph.proto.graph.input, *graph.proto.graph.output)
        if untyped := [value.name for value in ends if not value.type.tensor_type.elem_type]:
            raise ValueError(f"'{untyped[0]}' has no type")
        surgeon = gs.import_onnx(graph.proto)
    except (KeyError, ValueError, TypeError) as error:
        # An attribute of bytes that are no text, say.
        reason = f"the graph can't be edited ({error})"
        left = [BatchNorm(node.output[0], None, reason) for node in nodes if node.output]
        return replace(work, notes=(*work.notes, *left))
    taken = list_value_names(graph.proto.graph)
    uses = {name: len(places) for name, places in find_uses(graph.proto.graph).items()}
    for value in graph.proto.graph.output:
        uses[value.name] = uses.get(value.name, 0) + 1
    matmul = any(node.op_type == "MatMul" for node in graph.proto.graph.node)
    ranks = _infer_ranks(graph, matching.found) if matmul else {}
    rounded = frozenset[str]() if before_rounding else _find_rounded_values(graph.proto)
    results = []
    for node in [node for node in surgeon.nodes if node.op == "BatchNormalization"]:
        name = node.outputs[0].name
        product = _find_product(node, surgeon, weights, constants, uses, ranks, rounded)
        folded: GraphWeight | Refusal
        if isinstance(product, Refusal):
            folded = product
        else:
            folded = _fold_one(node, product, surgeon, constants, taken)
        if isinstance(folded, Refusal):
            results.append(BatchNorm(name, None, folded.reason))
        else:
            weights[folded.name] = folded
            results.append(BatchNorm(name, folded.name, "its factor is in the weight's scales"))
    notes = (*work.notes, *results)
    if not any(result.weight for result in results):
        return replace(work, notes=notes)
    found = tuple(weights[weight.name] for weight in matching.found)
    return Work(_export_graph(surgeon, graph), replace(matching, found=found), notes)


class _Constants:
    """float32 vectors of the main graph by name."""

    def __init__(self, graph: FloatGraph) -> None:
        self.weights = graph.weights
        self.tensors = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
        for node in graph.proto.graph.node:
            value = find_constant(node)
            if value is not None:
                self.tensors[node.output[0]] = value

    def get(self, name: str) -> np.ndarray | None:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            return None
        return self.weights[name] if name in self.weights else read_values(tensor)


def _find_product(
    node: gs.Node,
    surgeon: gs.Graph,
    weights: Mapping[str, GraphWeight],
    constants: _Constants,
    uses: Mapping[str, int],
    ranks: Mapping[str, int],
    rounded: Collection[str],
) -> _Product | Refusal:
    """What stands before the BatchNormalization, if it is a product that can take the factor."""
    if len(node.outputs) > 1 or node.attrs.get("training_mode", 0):
        return Refusal("it is in training mode")
    before = node.inputs[0].inputs[0] if len(node.inputs[0].inputs) == 1 else None
    if before is None or before.op not in (*BIASED, "MatMul") or len(before.inputs) < 2:
        return Refusal(f"it follows {'an input' if before is None else before.op}, no product")
    weight = weights.get(before.inputs[1].name)
    if weight is None:
        return Refusal("the weight before it is float, and the runtime fuses these")
    if weight.integers is not None:
        return Refusal(f"'{weight.name}' is read as integers")
    if uses[before.outputs[0].name] > 1 or any(
        output is before.outputs[0] for output in surgeon.outputs
    ):
        return Refusal("something else reads what it normalises, too")
    follows = any(user.op in ROUNDING for user in node.outputs[0].outputs)
    if follows or node.outputs[0].name in rounded:
        return Refusal(
            "what follows it rounds to integers, where the last bit of a float can become a whole "
            "level"
        )
    if uses[weight.name] > 1:
        return Refusal(f"'{weight.name}' feeds other nodes, too")
    if before.op == "MatMul" and ranks.get(before.outputs[0].name) != 2:
        return Refusal(
            "it normalises another axis than the product's last, as far as shapes are known"
        )
    if before.op == "Gemm" and any(
        before.attrs.get(name, default) != default for name, default in GEMM.items()
    ):
        return Refusal("the Gemm before it scales or transposes its operands")
    channels = count_channels(before, weight.tensor.shape)
    named = before.inputs[2].name if len(before.inputs) > 2 else ""
    bias = constants.get(named) if named else np.zeros(channels, np.float32)
    if (
        bias is None
        or bias.size not in (1, channels)
        or (bias.size > 1 and bias.shape[-1] != channels)
    ):
        return Refusal("the bias before it is no constant of one value per channel")
    return _Product(before, weight, np.broadcast_to(bias.reshape(-1), channels))


def _find_rounded_values(model: ModelProto) -> frozenset[str]:
    """Names of the values that are rounded to integers somewhere behind, in sorted nodes."""
    functions = {(function.domain, function.name): function for function in model.functions}
    rounding: set[tuple[str, str]] = set()
    for key, function in functions.items():
        if any(_rounds(node, frozenset()) for node in function.node):
            rounding.add(key)
    while True:  # functions that call these
        more = set(rounding)
        for key, function in functions.items():
            if any((node.domain, node.op_type) in rounding for node in function.node):
                more.add(key)
        if more == rounding:
            break
        rounding = more
    found: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in ("Shape", "Size"):  # of these values alone, nothing depends
            continue
        if _rounds(node, rounding) or not found.isdisjoint(node.output):
            found.update(node.input)
            found.update(list_names_inside(node))
    return frozenset(found - {""})


def _rounds(node: NodeProto, rounding: Collection[tuple[str, str]]) -> bool:
    """Whether a node, or one in a graph inside it, makes whole numbers of floats."""
    if node.op_type in ROUNDING or (node.domain, node.op_type) in rounding:
        return True
    if node.op_type == "Cast" and any(entry.i in INTEGERS for entry in node.attribute):
        return True
    for inner in list_subgraphs(node):
        if any(_rounds(part, rounding) for part in inner.node):
            return True
    return False


GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _infer_ranks(graph: FloatGraph, weights: Iterable[GraphWeight]) -> Mapping[str, int]:
    """Value name -> its number of dimensions, as far as shape inference tells."""
    model = ModelProto()
    model.CopyFrom(graph.proto)
    present = {
        value.name
        for value in (*model.graph.initializer, *model.graph.input, *model.graph.value_info)
    }
    model.graph.value_info.extend(
        helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.tensor.shape)
        for weight in weights
        if weight.name not in present
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        return {}
    typed = [
        value
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    ]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in typed}


def count_channels(product: gs.Node, shape: Sequence[int]) -> int:
    """Count the output channels of a product.

    Args:
        product: a Conv, ConvTranspose, Gemm or MatMul.
        shape: of its weight.

    Returns:
        How many channels the product's output has.
    """
    if product.op == "ConvTranspose":
        return int(shape[1]) * int(product.attrs.get("group", 1))
    if product.op == "Conv" or product.attrs.get("transB", 0):
        return int(shape[0])
    return int(shape[1])


def _place_along_channels(product: gs.Node, shape: Sequence[int], values: np.ndarray) -> np.ndarray:
    """values [C], one per output channel, in a shape that broadcasts against the weight."""
    rest = (1,) * (len(shape) - 2)
    if (
        product.op == "ConvTranspose"
    ):  # [in, out / groups, …]: input channel i belongs to group i // (in / groups)
        groups = int(product.attrs.get("group", 1))
        if groups == 1:
            return values.reshape(1, -1, *rest)
        return np.repeat(values.reshape(groups, -1), shape[0] // groups, axis=0).reshape(
            shape[0], shape[1], *rest
        )
    if product.op == "Conv" or product.attrs.get("transB", 0):
        return values.reshape(-1, 1, *rest)
    return values.reshape(1, -1)


def _fold_one(
    node: gs.Node, product: _Product, surgeon: gs.Graph, constants: _Constants, taken: set[str]
) -> GraphWeight | Refusal:
    """Takes the node out; the weight with the factor in it."""
    parameters = [constants.get(tensor.name) for tensor in node.inputs[1:5]]
    channels = product.bias.size
    if len(parameters) != 4 or any(
        values is None or values.shape != (channels,) for values in parameters
    ):
        return Refusal("its parameters are no float32 constants of one value per channel")
    gamma, beta, mean, variance = (
        values.astype(np.float64) for values in parameters if values is not None
    )
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        bias = (factor * product.bias + beta - factor * mean).astype(np.float32)
    if not (np.isfinite(factor).all() and np.isfinite(bias).all()):
        return Refusal("its factor isn't finite")
    weight = _rescale_weight(product, factor.astype(np.float32))
    if weight is None:
        return Refusal("a level of -128 would have to change its sign")
    constant = gs.Constant(make_fresh_name(f"{weight.name}.bias", taken), bias)
    before = product.node
    if before.op == "MatMul":
        node.op, node.attrs, node.inputs = "Add", {}, [node.inputs[0], constant]
        return weight
    before.inputs = [*before.inputs[:2], constant]
    before.outputs = list(node.outputs)
    node.outputs.clear()
    surgeon.nodes.remove(node)
    return weight


def _rescale_weight(product: _Product, factor: np.ndarray) -> GraphWeight | None:
    weight, tensor = product.weight, product.weight.tensor
    spread = _place_along_channels(product.node, tensor.shape, factor)
    dead = np.abs(spread) < np.finfo(np.float32).tiny  # a step of 0 would be none
    made = with_factor(tensor, np.where(dead, np.float32(0), spread), dead, scaled=False)
    if made is None:
        return None
    if made.factor is None or weight.factor is None:
        together = made.factor
    else:
        together = made.factor * weight.factor
    return replace(made, name=weight.name, sources=weight.sources, factor=together)


def _export_graph(surgeon: gs.Graph, graph: FloatGraph) -> FloatGraph:
    """Nodes and initializers come from graphsurgeon, everything else from the graph: graphsurgeon
    keeps no metadata of a model, and it moves initializers that only a subgraph reads into that
    subgraph, so these nodes come from the graph, too."""
    exported = gs.export_onnx(surgeon).graph
    branching = {
        node.output[0]: node for node in graph.proto.graph.node if any(list_subgraphs(node))
    }
    for node in exported.node:
        if any(list_subgraphs(node)):
            node.CopyFrom(branching[node.output[0]])
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    del proto.graph.node[:]
    proto.graph.node.extend(exported.node)
    kept = {tensor.name for tensor in exported.initializer} | set(find_uses(proto.graph))
    kept |= {value.name for value in proto.graph.output}
    for index in reversed(
        [index for index, tensor in enumerate(proto.graph.initializer) if tensor.name not in kept]
    ):
        del proto.graph.initializer[index]
    present = {tensor.name for tensor in proto.graph.initializer}
    proto.graph.initializer.extend(
        tensor for tensor in exported.initializer if tensor.name not in present
    )
    left = {name: values for name, values in graph.weights.items() if name in kept}
    inputs = [
        value
        for value in proto.graph.input
        if value.name in kept or value.name not in _list_initialized(graph)
    ]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    return FloatGraph(proto, left)


def _list_initialized(graph: FloatGraph) -> set[str]:
    return {tensor.name for tensor in graph.proto.graph.initializer}
