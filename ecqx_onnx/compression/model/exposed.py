"""Lets values inside If, Loop and Scan be read from outside: they become outputs at every level.

A weight that a branch or a loop's body multiplies with has an input that only exists in there. For
the statistics of that input the value is handed out:

    If          one more output of both branches; the branch without the value gives an empty tensor
    Loop, Scan  one more stacked output: the value of each round, along a new first axis

Only the graph that statistics are taken from is changed, never the one that is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    list_subgraphs,
    list_value_names,
    make_fresh_name,
)
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ecqx_onnx.compression.model.weights import Product, Weight

STACKING = ("Loop", "Scan")
FLAT = ("last", "sequence")  # layouts that a further first axis does not change


@dataclass(frozen=True, eq=False)
class Exposed:
    """graph: with more outputs. weights: those in subgraphs have a product that can be watched."""

    graph: FloatGraph
    weights: tuple[Weight, ...]


@dataclass(frozen=True, eq=False)
class _Level:
    """A node of some scope, and the graph among its attributes that one goes into."""

    node: NodeProto
    inside: GraphProto


def expose_inputs(graph: FloatGraph, weights: Sequence[Weight]) -> Exposed:
    """Hand out the inputs of weights that only subgraphs multiply with.

    Args:
        graph: a float graph; it is not changed.
        weights: of that graph.

    Returns:
        A graph with the values among its nodes' outputs, and the weights with products that name
        them. Weights whose input can't be handed out are as they were.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    taken = list_value_names(proto.graph)
    made: dict[tuple[int, str], str] = {}
    found = []
    for weight in weights:
        product = None if weight.watched is not None else _hand_out(proto, weight, taken, made)
        if product is not None:
            weight = replace(weight, products=(product, *weight.products))
        found.append(weight)
    if not made and all(new is old for new, old in zip(found, weights, strict=True)):
        return Exposed(graph, tuple(weights))
    return Exposed(FloatGraph(proto, graph.weights), tuple(found))


def _hand_out(
    proto: ModelProto, weight: Weight, taken: set[str], made: dict[tuple[int, str], str]
) -> Product | None:
    """The weight's first product that can be watched from the main graph."""
    for product in weight.products:
        if product.main or product.value is None or product.layout in ("rows", "unwatched"):
            continue
        way = _find_way(proto.graph, product.node_output, weight.name)
        if way is None:
            continue
        depth = _find_scope(way, product.value)
        levels = way[:depth]
        stacked = any(level.node.op_type in STACKING for level in levels)
        if any(level.node.op_type not in ("If", *STACKING) for level in levels):
            continue
        if stacked and product.layout not in FLAT:
            continue
        key = (id(levels[-1].inside) if levels else 0, product.value)
        if key not in made:
            made[key] = _lift(levels, product.value, taken)
        return replace(product, value=made[key], main=True)
    return None


def _find_way(scope: GraphProto, output: str, weight: str) -> list[_Level] | None:
    """Levels from this scope into the one whose node makes `output` from the weight."""
    for node in scope.node:
        if output in node.output and weight in node.input:
            return []
        for inside in list_subgraphs(node):
            rest = _find_way(inside, output, weight)
            if rest is not None:
                return [_Level(node, inside), *rest]
    return None


def _find_scope(way: Sequence[_Level], value: str) -> int:
    """How many levels lead to the scope that makes the value; 0 where the main graph does."""
    for depth in range(len(way), 0, -1):
        inside = way[depth - 1].inside
        makers = {name for node in inside.node for name in node.output}
        makers |= {entry.name for entry in inside.input}
        if value in makers:
            return depth
    return 0


def _lift(levels: Sequence[_Level], value: str, taken: set[str]) -> str:
    """The value's name in the main graph, after it is an output of every level."""
    name = value
    for level in reversed(levels):
        name = _lift_once(level, name, taken)
    return name


def _lift_once(level: _Level, value: str, taken: set[str]) -> str:
    node, inside = level.node, level.inside
    # An output must be made by a node of its own graph, which a loop's input is not.
    _add_output(inside, helper.make_node("Identity", [value], [""]), taken)
    for other in list_subgraphs(node):
        if other is not inside and node.op_type == "If":
            empty = helper.make_tensor("empty", TensorProto.FLOAT, [0], [])
            _add_output(other, helper.make_node("Constant", [], [""], value=empty), taken)
    outside = make_fresh_name(f"{value}.watched", taken)
    # Trailing outputs that nobody reads may have been left out.
    states = 1 if node.op_type == "Loop" else 0
    while len(node.output) < len(inside.output) - 1 - states:
        node.output.append("")
    node.output.append(outside)
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)
    return outside


def _add_output(scope: GraphProto, node: NodeProto, taken: set[str]) -> None:
    name = make_fresh_name("watched", taken)
    node.output[0] = name
    scope.node.append(node)
    scope.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
