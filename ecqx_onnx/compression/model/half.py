"""Makes a float16 graph one of float32, with float16 kept at its inputs and outputs.

Weights are compressed as float32: the file holds integers anyway, and a CPU computes in float32.
"""

from __future__ import annotations

import numpy as np
from ecqx_onnx_converters.graph.files import to_little_endian
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    clear_data,
    list_graphs,
    list_value_names,
    make_fresh_name,
    rename_values,
)
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def is_half(graph: FloatGraph) -> bool:
    """Whether some initializer of two or more dimensions is float16.

    Args:
        graph: a graph with its initializers.

    Returns:
        True if it has one.
    """
    tensors = graph.proto.graph.initializer
    return any(tensor.data_type == HALF and len(tensor.dims) >= 2 for tensor in tensors)


def to_float32(graph: FloatGraph) -> FloatGraph:
    """The graph with every float16 tensor, Cast and value as float32; its interface stays.

    Args:
        graph: with float16 tensors; it is not changed.

    Returns:
        A new graph whose inputs and outputs keep their types.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    weights = dict(graph.weights)
    for tensor in proto.graph.initializer:
        if tensor.data_type == HALF:
            values = weights[tensor.name] if tensor.name in weights else _read_values(tensor)
            tensor.data_type = FULL
            clear_data(tensor)
            if tensor.name in weights or len(tensor.dims) >= 2:
                weights[tensor.name] = values.astype(np.float32)
            else:
                tensor.raw_data = to_little_endian(values.astype(np.float32))
    for scope in list_graphs(proto.graph):
        scope.ClearField("value_info")
        for node in scope.node:
            _widen_attributes(node)
        if scope is not proto.graph:
            _widen_scope(scope)
    _keep_interface(proto)
    return FloatGraph(proto, weights)


def _read_values(tensor: TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


def _widen_scope(scope) -> None:  # type: ignore[no-untyped-def]
    """Types of a subgraph's initializers, inputs and outputs."""
    for tensor in scope.initializer:
        if tensor.data_type == HALF:
            wide = numpy_helper.from_array(_read_values(tensor).astype(np.float32), tensor.name)
            tensor.CopyFrom(wide)
    for value in (*scope.input, *scope.output):
        if value.type.tensor_type.elem_type == HALF:
            value.type.tensor_type.elem_type = FULL


def _widen_attributes(node: NodeProto) -> None:
    """Casts to float16, and constants in attributes."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == HALF:
            attribute.i = FULL
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == HALF:
            wide = numpy_helper.from_array(
                _read_values(attribute.t).astype(np.float32), attribute.t.name
            )
            attribute.t.CopyFrom(wide)


def _keep_interface(proto: ModelProto) -> None:
    """float16 inputs are cast to float32 for their readers, outputs back."""
    graph, taken = proto.graph, list_value_names(proto.graph)
    before, after = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == HALF:
            wide = make_fresh_name(f"{value.name}_wide", taken)
            rename_values(graph, value.name, wide)
            before.append(helper.make_node("Cast", [value.name], [wide], to=FULL))
    for value in graph.output:
        if value.type.tensor_type.elem_type == HALF:
            wide = make_fresh_name(f"{value.name}_wide", taken)
            for node in graph.node:
                for index, name in enumerate(node.output):
                    if name == value.name:
                        node.output[index] = wide
            rename_values(graph, value.name, wide)
            after.append(helper.make_node("Cast", [wide], [value.name], to=HALF))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])
