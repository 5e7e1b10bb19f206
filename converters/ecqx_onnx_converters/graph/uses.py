"""Which nodes read a value, and at which input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, helper

from ecqx_onnx_converters.graph.graph import list_graphs


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a value is read: input `position` of `node`, which lies in `scope` (the graph
    or a subgraph)."""

    scope: GraphProto
    node: NodeProto
    position: int

    @property
    def attributes(self) -> dict:
        return {
            attribute.name: helper.get_attribute_value(attribute)
            for attribute in self.node.attribute
        }


def find_uses(graph: GraphProto) -> Mapping[str, Sequence[Use]]:
    """Value name -> every use, in subgraphs too."""
    uses: dict[str, list[Use]] = {}
    for scope in list_graphs(graph):
        for node in scope.node:
            for position, name in enumerate(node.input):
                uses.setdefault(name, []).append(Use(scope, node, position))
    return uses


def set_attribute(node: NodeProto, name: str, value: int) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
