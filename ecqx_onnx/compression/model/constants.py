"""Applies Reshape, Transpose and the like to constant weights, so that products read them directly.

Old exporters write `MatMul(x, Transpose(W))` or `MatMul(x, Reshape(W))`: the weight is then not what
the product's input is, and would be taken for a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ecqx_onnx_converters.consumers import find_uses
from ecqx_onnx_converters.graph import (
    FloatGraph,
    constant_value,
    fresh_name,
    rename,
    tensor_values,
    value_names,
)
from onnx import ModelProto, NodeProto, TensorProto, helper

MOVES = ("Reshape", "Transpose", "Identity", "Flatten", "Squeeze", "Unsqueeze")


def apply_moves(graph: FloatGraph) -> FloatGraph:
    """The graph with such nodes on weights gone; the weights lie as they are read.

    Only weights with that one reader in the main graph are touched. The graph given stays.
    """
    if not any(node.op_type in MOVES for node in graph.proto.graph.node):
        return graph
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    arrays = dict(graph.weights)
    changed = True
    while changed:
        changed = _apply_one(proto, arrays)
    _drop_unread(proto, before=graph.proto)
    return FloatGraph(proto, arrays)


def _apply_one(proto: ModelProto, arrays: dict[str, np.ndarray]) -> bool:
    """One node less, if there is one that only moves a weight's entries."""
    main = proto.graph
    outputs = {value.name for value in main.output}
    uses = find_uses(main)
    small = _small_constants(proto)
    for index, node in enumerate(main.node):
        name = node.input[0] if node.input else ""
        moves = node.op_type in MOVES and node.domain in ("", "ai.onnx")
        if not moves or name not in arrays or node.output[0] in outputs or name in outputs:
            continue
        values = arrays[name]
        if values.dtype != np.float32 or len(uses[name]) != 1:
            continue
        moved = _moved(values, node, small)
        if moved is None:
            continue
        wanted = fresh_name(f"{name}.moved", value_names(main))
        _replace_initializer(proto, name, wanted, moved)
        del arrays[name]
        arrays[wanted] = moved
        old = node.output[0]
        del main.node[index]
        rename(main, old, wanted)
        return True
    return False


def _small_constants(proto: ModelProto) -> Mapping[str, np.ndarray]:
    """Integer constants of the main graph: shapes and axes."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) <= 1:
            found[tensor.name] = tensor_values(tensor)
    for node in proto.graph.node:
        value = constant_value(node)
        if value is not None and value.data_type == TensorProto.INT64:
            found[node.output[0]] = tensor_values(value)
    return found


def _moved(
    values: np.ndarray, node: NodeProto, small: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """What the node makes of the values; None where that is not certain."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if node.op_type == "Identity":
        return values
    if node.op_type == "Transpose":
        return np.ascontiguousarray(values.transpose(attributes.get("perm")))
    if node.op_type == "Flatten":
        axis = int(attributes.get("axis", 1)) % (values.ndim + 1)
        return values.reshape(int(np.prod(values.shape[:axis])), -1)
    given = attributes.get("shape" if node.op_type == "Reshape" else "axes")
    if given is None and len(node.input) > 1:
        given = small.get(node.input[1])
    if given is None:
        return None
    numbers = [int(number) for number in np.atleast_1d(given)]
    if node.op_type == "Reshape":
        if attributes.get("allowzero", 0):
            return None
        lengths = [values.shape[i] if n == 0 else n for i, n in enumerate(numbers)]
        return values.reshape(lengths)
    if node.op_type == "Squeeze":
        return values.squeeze(tuple(numbers))
    return np.expand_dims(values, tuple(numbers))


def _drop_unread(proto: ModelProto, *, before: ModelProto) -> None:
    """Shapes and axes that only the nodes that are gone have read."""
    still = set(find_uses(proto.graph)) | {value.name for value in proto.graph.output}
    unread = {name for name in find_uses(before.graph) if name not in still}
    for values in (proto.graph.initializer, proto.graph.input):
        for index in reversed(range(len(values))):
            if values[index].name in unread and values[index].name in _initialized(before):
                del values[index]


def _initialized(proto: ModelProto) -> set[str]:
    return {tensor.name for tensor in proto.graph.initializer}


def _replace_initializer(proto: ModelProto, old: str, new: str, values: np.ndarray) -> None:
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.name == old:
            del proto.graph.initializer[index]
            break
    for index, value in enumerate(proto.graph.input):
        if value.name == old:  # opset 8 lists weights among the inputs
            del proto.graph.input[index]
            break
    tensor = proto.graph.initializer.add(name=new, data_type=TensorProto.FLOAT)
    tensor.dims.extend(values.shape)
