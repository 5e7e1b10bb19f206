"""The constant values of a graph, wherever they are written down: initializers or Constant
nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from ecqx_onnx_converters.graph.graph import FloatGraph, list_subgraphs, read_values


class Constants:
    """Values of a graph that no input changes."""

    def __init__(self, graph: FloatGraph) -> None:
        self.tensors = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
        self.weights = graph.weights
        self.names = {"", *self.tensors}
        for node in graph.proto.graph.node:
            if self.is_constant(node):
                self.names.update(node.output)
                if node.op_type == "Constant" and node.attribute[0].name == "value":
                    self.tensors[node.output[0]] = node.attribute[0].t

    def is_constant(self, node: NodeProto) -> bool:
        return all(name in self.names for name in (*node.input, *list_names_inside(node)))

    def holds(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str) -> np.ndarray | None:
        """The values, where they are stored and not computed; None for a quantised weight, which is
        stored as levels."""
        if name in self.weights:
            return self.weights[name]
        tensor = self.tensors.get(name)
        return None if tensor is None or not has_data(tensor) else read_values(tensor)


def has_data(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) == 0 or any(
        field.name.endswith("_data") for field, _ in tensor.ListFields()
    )


def list_names_inside(node: NodeProto) -> Iterator[str]:
    """Names that graphs inside the node read."""
    for graph in list_subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from inner.input
            yield from list_names_inside(inner)
