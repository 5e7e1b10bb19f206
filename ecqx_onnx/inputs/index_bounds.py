"""Find how large the integers may be that a model takes: ids index a table of so many rows.

From each node that looks something up, indices are followed back to the inputs that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.storage import DOMAIN
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

# Operators whose first input goes on, in another shape or type.
PASSING = (
    "Cast",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
# Operators whose first input has the shape of what they make.
SAME_SHAPE = ("DequantizeLinear", "QuantizeLinear", "Cast", "Clip", "Identity", "Dequantize")
# Operators whose axis of the table is 0 unless they say otherwise: position of table, of indices.
LOOK_UPS = {"Gather": (0, 1), "GatherElements": (0, 1), "GatherBlockQuantized": (0, 1)}
# The same of onnxruntime's fused embedding: (table, indices), twice.
EMBEDDINGS = ((2, 0), (4, 1))
DEEPEST = 64  # nodes between an input and a look-up


@dataclass(frozen=True, eq=False)
class _Graph:
    """What is looked up by name in a model."""

    makers: Mapping[str, NodeProto]
    tensors: Mapping[str, TensorProto]

    @classmethod
    def of(cls, model: ModelProto) -> _Graph:
        makers: dict[str, NodeProto] = {}
        tensors: dict[str, TensorProto] = {}
        for scope in list_graphs(model.graph):
            tensors.update((tensor.name, tensor) for tensor in scope.initializer)
            for node in scope.node:
                makers.update((name, node) for name in node.output)
                value = _find_attribute(node, "value")
                if node.op_type == "Constant" and value is not None:
                    tensors[node.output[0]] = value.t
        return cls(makers, tensors)


def find_index_bounds(model: ModelProto) -> Mapping[str, int]:
    """Find what the integers that a model takes have to stay below.

    Args:
        model: Any, external data left where it is.

    Returns:
        Input name -> the rows of the smallest table that it indexes; only inputs that index one
        whose size the file states.
    """
    graph = _Graph.of(model)
    inputs = {value.name for value in model.graph.input} - graph.tensors.keys()
    bounds: dict[str, int] = {}
    for scope in list_graphs(model.graph):
        for node in scope.node:
            for indices, length in _list_look_ups(node, graph):
                for name, offset in _trace_back(indices, graph, inputs):
                    most = max(1, length - offset)
                    bounds[name] = min(most, bounds.get(name, most))
    return bounds


def _list_look_ups(node: NodeProto, graph: _Graph) -> Iterator[tuple[str, int]]:
    """(name of the indices, number of rows) of each table that a node looks something up in."""
    pairs: tuple[tuple[int, int], ...] = ()
    if node.op_type in LOOK_UPS:
        pairs = (LOOK_UPS[node.op_type],)
    elif node.op_type == "EmbedLayerNormalization":
        pairs = EMBEDDINGS
    elif node.op_type == "OneHot" and len(node.input) > 1:
        depth = graph.tensors.get(node.input[1])
        if depth is not None and depth.data_location != TensorProto.EXTERNAL:
            yield node.input[0], int(numpy_helper.to_array(depth).reshape(-1)[0])
    axis = _find_attribute(node, "axis")
    for table, indices in pairs:
        if max(table, indices) >= len(node.input) or not node.input[indices]:
            continue
        length = _find_length(node.input[table], 0 if axis is None else axis.i, graph)
        if length:
            yield node.input[indices], length


def _find_length(name: str, axis: int, graph: _Graph) -> int | None:
    """How long an axis of a constant is; None where the file does not state it."""
    for _ in range(DEEPEST):
        if name in graph.tensors:
            dims = tuple(graph.tensors[name].dims)
            return dims[axis] if -len(dims) <= axis < len(dims) else None
        node = graph.makers.get(name)
        if node is None or not node.input:
            return None
        if node.op_type == "Transpose":
            order = _find_attribute(node, "perm")
            if order is None or not 0 <= axis < len(order.ints):
                return None
            axis = order.ints[axis]
        elif node.domain == DOMAIN and node.op_type != "Dequantize":
            return _find_stated_length(node, axis, graph)
        elif node.op_type not in SAME_SHAPE:
            return None
        name = node.input[0]
    return None


def _find_stated_length(node: NodeProto, axis: int, graph: _Graph) -> int | None:
    """Of a weight that a function of ours decodes: one of its inputs is the shape."""
    for name in node.input:
        tensor = graph.tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.INT64 or len(tensor.dims) != 1:
            continue
        shape = numpy_helper.to_array(tensor)
        if shape.size > 1 and 0 <= axis < shape.size:
            return int(shape[axis])
    levels = graph.makers.get(node.input[0])
    if levels is not None and levels.domain == DOMAIN and levels is not node:
        return _find_stated_length(levels, axis, graph)
    return None


def _trace_back(start: str, graph: _Graph, inputs: set[str]) -> Iterator[tuple[str, int]]:
    """(input, what is added to it on the way) for each input that a value comes from."""
    waiting = [(start, 0, 0)]
    seen: set[str] = set()
    while waiting:
        name, offset, depth = waiting.pop()
        if name in inputs:
            yield name, offset
            continue
        node = graph.makers.get(name)
        if node is None or name in seen or depth > DEEPEST:
            continue
        seen.add(name)
        if node.op_type in PASSING and node.input:
            waiting.append((node.input[0], offset, depth + 1))
        elif node.op_type in ("Concat", "Where", "Min", "Max"):
            waiting += [(part, offset, depth + 1) for part in node.input]
        elif node.op_type in ("Add", "Sub") and len(node.input) == 2:
            added = _read_largest(node.input[1], graph)
            other = 0
            if added is None and node.op_type == "Add":
                other = 1
                added = _read_largest(node.input[0], graph)
            if added is not None:
                sign = 1 if node.op_type == "Add" else -1
                waiting.append((node.input[other], offset + sign * added, depth + 1))


def _read_largest(name: str, graph: _Graph) -> int | None:
    """The largest of a constant's integers; None for anything else."""
    tensor = graph.tensors.get(name)
    if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
        return None
    values = numpy_helper.to_array(tensor)
    if not values.size or not np.issubdtype(values.dtype, np.integer):
        return None
    return int(values.max())


def _find_attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """A node's attribute of this name, if it has one."""
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute
    return None
