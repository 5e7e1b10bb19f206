"""Rewriting a graph for a newer opset with onnx's version converter, or saying why it can't be.

Where `refuse_opset` has nothing against it, declaring the newer opset is enough and this isn't
needed.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto, helper, version_converter

from ecqx_onnx_converters.graph.graph import FloatGraph, find_opset, list_graphs
from ecqx_onnx_converters.graph.opsets import CHANGED, is_runtime_own, refuse_opset, set_opset
from ecqx_onnx_converters.refusal import Refusal

# Operators that the converter leaves as they are where their meaning changes (the tests pin it).
HIDING = "ecqx.runtime"  # domain in which the converter leaves alone what it doesn't know
UNTRUSTED = ("GroupNormalization", "GridSample", "Hardmax")


def raise_opset(graph: FloatGraph, opset: int) -> FloatGraph | Refusal:
    """Rewrites a graph for a newer opset.

    Args:
        graph: It isn't changed. Its model-local functions have to mean the same in the newer opset.
        opset: The one to reach.

    Returns:
        A new graph with the same weights; `graph` itself if it has that opset or a newer one; a
        Refusal if the converter doesn't take it there, or can't be trusted with an operator.

    Raises:
        FileError: If the model imports no standard operator set.
    """
    present = find_opset(graph.proto)
    if opset <= present:
        return graph
    operators: set[str] = set()
    for scope in list_graphs(graph.proto.graph):
        standard = [node for node in scope.node if node.domain in ("", "ai.onnx")]
        operators.update(node.op_type for node in standard)
    for name in UNTRUSTED:
        if name in operators and present < CHANGED[name] <= opset:
            return Refusal(
                f"{name} changes between opset {present} and {opset}, which onnx's version "
                "converter overlooks"
            )
    functions = ModelProto(opset_import=graph.proto.opset_import, functions=graph.proto.functions)
    refusal = refuse_opset(functions, opset)
    if refusal is not None:
        return refusal
    stripped = strip_weights(graph)
    _hide_runtime_own(stripped, present)
    try:
        converted = version_converter.convert_version(stripped, opset)
    except REFUSALS as error:
        return Refusal(
            f"onnx's version converter doesn't take it to opset {opset}: "
            f"{' '.join(str(error).split())[:200]}"
        )
    _show_runtime_own(converted)
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    # The converter gets neither the data of weights nor the functions, and gives back more
    # value_info than it got.
    del proto.graph.node[:]
    proto.graph.node.extend(converted.graph.node)
    there = {tensor.name for tensor in proto.graph.initializer}
    proto.graph.initializer.extend(
        tensor for tensor in converted.graph.initializer if tensor.name not in there
    )
    for scope in list_graphs(proto.graph):
        scope.ClearField("value_info")
    set_opset(proto, opset)
    return FloatGraph(proto, graph.weights)


def _hide_runtime_own(model: ModelProto, opset: int) -> None:
    """Moves onnxruntime's own operators out of the standard domain, in place."""
    for scope in list_graphs(model.graph):
        for node in scope.node:
            if node.domain in ("", "ai.onnx") and is_runtime_own(node, opset):
                node.domain = HIDING
    model.opset_import.append(helper.make_opsetid(HIDING, 1))


def _show_runtime_own(model: ModelProto) -> None:
    """Moves them back, in place."""
    for scope in list_graphs(model.graph):
        for node in scope.node:
            if node.domain == HIDING:
                node.domain = ""


# What onnx's version converter raises where it can't.
REFUSALS = (
    RuntimeError,
    ValueError,
    onnx.shape_inference.InferenceError,
    version_converter.ConvertError,
)


def strip_weights(graph: FloatGraph) -> ModelProto:
    """Makes a model whose weights, as their data lies elsewhere, are inputs.

    Args:
        graph: It isn't changed.

    Returns:
        A model that onnx's tools take without the data.
    """
    model = ModelProto()
    model.CopyFrom(graph.proto)
    listed = {value.name for value in model.graph.input}
    for index in reversed(range(len(model.graph.initializer))):
        tensor = model.graph.initializer[index]
        if tensor.name in graph.weights:
            if tensor.name not in listed:
                model.graph.input.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
            del model.graph.initializer[index]
    return model
