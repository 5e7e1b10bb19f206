"""Which nodes read a value, and at which input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, helper

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
