"""Which nodes read a value, at which input, and which node makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.graph.graph import list_graphs


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a value is read.

    Attributes:
        scope: The graph or subgraph in which the node lies.
        node: It reads the value.
        position: The input at which it does, from 0.
    """

    scope: GraphProto
    node: NodeProto
    position: int

    @property
    def attributes(self) -> dict:
        """The node's attributes as Python values, by name."""
        return {
            attribute.name: helper.get_attribute_value(attribute)
            for attribute in self.node.attribute
        }


def find_uses(graph: GraphProto) -> Mapping[str, Sequence[Use]]:
    """Finds where each value is read.

    Args:
        graph: Looked at with its subgraphs.

    Returns:
        Value name -> every use; values that nobody reads are missing.
    """
    uses: dict[str, list[Use]] = {}
    for scope in list_graphs(graph):
        for node in scope.node:
            for position, name in enumerate(node.input):
                uses.setdefault(name, []).append(Use(scope, node, position))
    return uses


def find_makers(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    """Finds which node makes each value.

    Args:
        nodes: Of one graph, without those of its subgraphs.

    Returns:
        Value name -> the node whose output it is.
    """
    makers: dict[str, NodeProto] = {}
    for node in nodes:
        for name in node.output:
            makers[name] = node
    return makers


def find_positions(nodes: Iterable[NodeProto]) -> dict[str, int]:
    """Finds at which place stands the node that makes each value.

    Args:
        nodes: Of one graph, without those of its subgraphs.

    Returns:
        Value name -> index of the node whose output it is.
    """
    positions: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            positions[name] = index
    return positions


def list_initializers(graph: GraphProto) -> list[TensorProto]:
    """Lists the initializers of a graph and of all graphs inside it.

    Args:
        graph: The outermost.

    Returns:
        The tensors, those of the outermost graph first; sparse ones are left out.
    """
    found: list[TensorProto] = []
    for scope in list_graphs(graph):
        found.extend(scope.initializer)
    return found


def list_operators(graph: GraphProto) -> set[str]:
    """Lists the operators that a graph's nodes call, those of its subgraphs as well.

    Args:
        graph: The outermost.

    Returns:
        Names such as "Conv", without their domains.
    """
    found: set[str] = set()
    for scope in list_graphs(graph):
        found.update(node.op_type for node in scope.node)
    return found


def set_attribute(node: NodeProto, name: str, value: int) -> None:
    """Sets an attribute of a node, in place, whether it was there or not.

    Args:
        node: The node.
        name: Of the attribute.
        value: Its new value.
    """
    present = [attribute for attribute in node.attribute if attribute.name == name]
    for attribute in present:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
