"""Applies Reshape, Slice, Concat and the like to constant weights, so that products read them.

Exporters write `MatMul(x, Transpose(W))`, or put an LSTM's gates in another order by Slice and
Concat: the weight is then not what the product's input is, and would be taken for a table. Only
operators that move entries are applied; none of them makes a tensor larger than its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ecqx_onnx_converters.graph.files import to_little_endian
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    find_constant,
    list_value_names,
    make_fresh_name,
    read_values,
    rename_values,
)
from ecqx_onnx_converters.graph.uses import find_uses
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

MOVES = (
    "Reshape", "Transpose", "Identity", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat",
    "Split",
)  # fmt: skip
SMALL = 4096  # entries of shapes, axes and biases that are looked at


def apply_moves(graph: FloatGraph) -> FloatGraph:
    """The graph with such nodes on float constants gone; constants lie as they are read.

    Only nodes of the main graph are applied. The graph given is not changed.

    Args:
        graph: a float graph.

    Returns:
        A new graph, or the same one if there is no such node.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    arrays = dict(graph.weights)
    known = _list_constants(proto, arrays)
    outputs = {value.name for value in proto.graph.output}
    taken = list_value_names(proto.graph)
    gone = []
    for index, node in enumerate(proto.graph.node):
        made = _move_constants(proto, node, known, outputs)
        if made is None:
            continue
        gone.append(index)
        for old, values in zip(node.output, made, strict=True):
            if not old:
                continue
            name = make_fresh_name(f"{old}.constant", taken)
            _put(proto, arrays, name, values)
            known[name] = values
            rename_values(proto.graph, old, name)
    if not gone:
        return graph
    for index in reversed(gone):
        del proto.graph.node[index]
    _drop_unread(proto, arrays)
    return FloatGraph(proto, arrays)


def _list_constants(proto: ModelProto, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, and small constants of the main graph."""
    found = dict(arrays)
    for tensor in proto.graph.initializer:
        kinds = (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT)
        small = tensor.data_type in kinds and np.prod(tensor.dims) <= SMALL
        if small and tensor.name not in arrays:
            found[tensor.name] = read_values(tensor)
    for node in proto.graph.node:
        value = find_constant(node)
        if value is not None and value.data_type in (TensorProto.INT64, TensorProto.FLOAT):
            found[node.output[0]] = read_values(value)
        elif node.op_type == "Constant" and node.attribute[0].name in ("value_ints", "value_int"):
            given = helper.get_attribute_value(node.attribute[0])
            found[node.output[0]] = np.array(given, np.int64)
    return found


def _move_constants(
    proto: ModelProto, node: NodeProto, known: Mapping[str, np.ndarray], outputs: set[str]
) -> list[np.ndarray] | None:
    """What the node makes of float constants; None where it is another node, or can't be told."""
    if node.op_type not in MOVES or node.domain not in ("", "ai.onnx"):
        return None
    names = [name for name in node.input if name]
    if not names or any(name not in known for name in names):
        return None
    if known[names[0]].dtype != np.float32 or outputs & set(node.output):
        return None
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(known[name].dtype), known[name].shape
        )
        for name in dict.fromkeys(names)
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "move", inputs, results)
    model = helper.make_model(graph, opset_imports=proto.opset_import)
    try:
        made = ReferenceEvaluator(model).run(None, {name: known[name] for name in names})
    except Exception:  # the evaluator raises anything; the node then stays
        return None
    return [np.ascontiguousarray(values) for values in made]


def _put(proto: ModelProto, arrays: dict[str, np.ndarray], name: str, values: np.ndarray) -> None:
    """A new initializer; its data among the weights from two dimensions on."""
    tensor = proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT)
    tensor.dims.extend(values.shape)
    if values.ndim >= 2:
        arrays[name] = values
    else:
        tensor.raw_data = to_little_endian(values)


def _drop_unread(proto: ModelProto, arrays: dict[str, np.ndarray]) -> None:
    """Constants that only nodes that are gone have read, and those made on the way."""
    still = set(find_uses(proto.graph)) | {value.name for value in proto.graph.output}
    unread = {tensor.name for tensor in proto.graph.initializer} - still
    for values in (proto.graph.initializer, proto.graph.input):
        for index in reversed(range(len(values))):
            if values[index].name in unread:
                del values[index]
    for name in unread & set(arrays):
        del arrays[name]
