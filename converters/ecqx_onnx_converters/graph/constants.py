"""The constant values of a graph: initializers, and what Constant nodes hold.

A value counts as constant, too, where a node computes it from constants alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from ecqx_onnx_converters.graph.graph import FloatGraph, list_subgraphs, read_values


class Constants:
    """Values of a graph that no input changes.

    Attributes:
        tensors: Those that are stored, by name: initializers and Constant nodes.
        weights: Values that are kept apart from the tensors, by initializer name.
        names: Every constant value, stored or computed; "" is the input that a node leaves out.
    """

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
        """Tells whether no input of the graph changes what the node computes.

        Args:
            node: A node of the main graph, after all those that it reads from.

        Returns:
            True if it, and every graph inside it, reads constants alone.
        """
        return all(name in self.names for name in (*node.input, *list_names_inside(node)))

    def holds(self, name: str) -> bool:
        """Tells whether a value is constant, stored or computed.

        Args:
            name: Of the value; "" stands for an input that is left out, and is constant.

        Returns:
            True if no input of the graph changes it.
        """
        return name in self.names

    def get(self, name: str) -> np.ndarray | None:
        """Gives the values of a constant that is stored.

        Args:
            name: Of an initializer or of the output of a Constant node.

        Returns:
            An array of the declared shape and type; None where the values are computed, where the
            name is unknown, and for a quantized weight, which is stored as levels.

        Raises:
            FileError: If the data does not fill the declared dims.
        """
        if name in self.weights:
            return self.weights[name]
        tensor = self.tensors.get(name)
        if tensor is None or not has_data(tensor):
            return None
        return read_values(tensor)


def has_data(tensor: TensorProto) -> bool:
    """Tells whether a tensor carries its values, and does not only declare them.

    Args:
        tensor: An initializer or the tensor of a Constant node.

    Returns:
        True if it has data, inside or external, or needs none because it has no elements.
    """
    if math.prod(tensor.dims) == 0:
        return True
    # raw_data, float_data and so on, and external_data.
    return any(field.name.endswith("_data") for field, _ in tensor.ListFields())


def list_names_inside(node: NodeProto) -> Iterator[str]:
    """Lists what the graphs inside a node read, their own values included.

    Args:
        node: Such as an If or a Loop.

    Returns:
        Names, some of them several times; none for a node without subgraphs.
    """
    for graph in list_subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from inner.input
            yield from list_names_inside(inner)
