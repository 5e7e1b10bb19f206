"""Find the quantized weights of someone else's graph, bit for bit.

What is left is the graph that reads them as plain values.

Looked for in the main graph and in every subgraph:

    DequantizeLinear(integers)
        a float weight: level = integer - zero point, step = scale
    DequantizeLinear([Clip](QuantizeLinear(floats)))
        the same, after computing the integers (QCDQ)
    Quant(floats), BipolarQuant(floats)
        the same (QONNX, see qonnx.py)
    integers that anything else reads (QLinearConv, MatMulInteger, …)
        they stay integers

A DequantizeLinear stays, and only its integers are stored anew, where runtimes make an integer
kernel of it (another input of its consumer is dequantised as well), where its result is no float32,
where a level fits no int8, and where a step is a block's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx_converters.foreign import qonnx, quantization_nodes
from ecqx_onnx_converters.foreign.quantization_nodes import Constant, Grid, Rule
from ecqx_onnx_converters.graph.graph import (
    NARROW,
    FloatGraph,
    find_constant,
    list_graphs,
    list_subgraphs,
    list_value_names,
    make_fresh_name,
    read_values,
    rename_values,
)
from ecqx_onnx_converters.graph.uses import find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight, Integers
from ecqx_onnx_converters.refusal import Refusal

READABLE = NARROW | {TensorProto.FLOAT, TensorProto.INT32}
# Operator -> position of an integer weight -> position of its zero point.
ZERO_POINTS = {
    "DequantizeLinear": {0: 2},
    "QLinearConv": {3: 5},
    "QLinearMatMul": {3: 5},
    "ConvInteger": {1: 3},
    "MatMulInteger": {1: 3},
    "QGemm": {3: 5},
}


@dataclass(frozen=True, eq=False)
class Foreign:
    """graph: the nodes that made the weights are gone. weights: what it reads now and nothing in it
    makes.

    replaced: weight name -> bytes of the tensors that it makes superfluous. refused: name of a
    value -> why it stays.
    """

    graph: FloatGraph
    weights: tuple[GraphWeight, ...]
    replaced: Mapping[str, int]
    refused: Mapping[str, str]


def find_quantized(graph: FloatGraph, *, leave: Collection[str] = ()) -> Foreign:
    """Find the quantized weights of a graph, wherever they are written down.

    Args:
        graph: is not changed.
        leave: weights (names as in an earlier result) that are to stay as they are.

    Returns:
        The weights, the graph that reads them as plain values, and what was refused, with reasons.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    search = _Search(FloatGraph(proto, graph.weights), frozenset(leave))
    search.visit(proto.graph, {})
    search.stored_integers()
    before = set(find_uses(graph.proto.graph))
    gone = _drop_unread(proto, before)
    weights = tuple(search.found.values())
    for values in (proto.graph.initializer, proto.graph.input):
        for index in reversed(
            [index for index, value in enumerate(values) if value.name in search.found]
        ):
            gone.add(values[index].name)
            del values[index]
    sizes = {
        tensor.name: count_bytes(tensor, graph)
        for tensor in graph.proto.graph.initializer
        if tensor.name in gone
    }
    replaced = {
        weight.name: sizes.pop(weight.sources[0], 0) for weight in weights
    }  # a shared tensor counts once
    left = {name: values for name, values in graph.weights.items() if name not in gone}
    refused = {name: reason for name, reason in search.refused.items() if name not in search.found}
    return Foreign(FloatGraph(proto, left), weights, replaced, refused)


Known = Mapping[str, TensorProto | Constant]


@dataclass(eq=False)
class _Search:
    """One pass over the graph, which it edits."""

    graph: FloatGraph
    leave: frozenset[str]
    found: dict[str, GraphWeight] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        main = self.graph.proto.graph
        self.uses = find_uses(main)
        self.makers = {
            output: node
            for scope in list_graphs(main)
            for node in scope.node
            for output in node.output
        }
        self.taken = list_value_names(main)

    def visit(self, scope: GraphProto, outer: Known) -> None:
        """Nodes in their order, each after those that it reads, and the graphs inside them. outer:
        constants around the scope."""
        known = {**outer, **{tensor.name: tensor for tensor in scope.initializer}}
        outputs = {value.name for value in scope.output}
        for node in list(scope.node):
            tensor = find_constant(node)
            made = self.made(node, known)
            if tensor is not None:
                known[node.output[0]] = tensor
            elif isinstance(made, Constant):  # by QuantizeLinear or Clip: a step on the way
                known[node.output[0]] = made
            elif isinstance(made, Grid) and node.output[0] not in outputs:
                self.take_grid(scope, node, made)
            elif isinstance(made, Refusal) and not self.take_integers(scope, node, known):
                self.refused[
                    node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
                ] = made.reason
            for inner in list_subgraphs(node):
                self.visit(inner, known)

    def made(self, node: NodeProto, known: Known) -> Constant | Grid | Refusal | None:
        """What the node makes of constants; None for a node of no interest, or one that reads
        something else."""
        rule = _find_rule(node)
        inputs = [self.constant(name, known) if name else None for name in node.input]
        if rule is None or any(
            value is None and name for value, name in zip(inputs, node.input, strict=True)
        ):
            return None
        if inputs[0] is not None and inputs[0].values.ndim < 2:
            return None  # a bias, or an activation's scale
        made = rule(node, inputs)
        if (
            isinstance(made, Grid)
            and node.op_type == "DequantizeLinear"
            and self.meets_integers(node, known)
        ):
            return Refusal("its consumer computes with integers")
        return made

    def constant(self, name: str, known: Known) -> Constant | None:
        value = known.get(name)
        if value is None or isinstance(value, Constant):
            return value
        if value.data_type not in READABLE:
            return None
        values = self.graph.weights[name] if name in self.graph.weights else read_values(value)
        wide = values.astype(
            np.float32 if value.data_type == TensorProto.FLOAT else np.int32, copy=False
        )
        return Constant(wide, value.data_type, name)

    def meets_integers(self, node: NodeProto, known: Known) -> bool:
        """Some consumer reads another dequantised value, one that varies."""
        for use in self.uses.get(node.output[0], []):
            makers = [
                self.makers[name]
                for name in use.node.input
                if name in self.makers and name != node.output[0]
            ]
            if any(
                maker.op_type == "DequantizeLinear" and maker.input[0] not in known
                for maker in makers
            ):
                return True
        return False

    def take_grid(self, scope: GraphProto, node: NodeProto, made: Grid) -> None:
        tensor = QuantTensor("", made.levels, Scale(made.step))
        transpose = self.only_transpose(scope, node)
        name = self.name(scope, node if transpose is None else transpose)
        if name in self.leave:
            return
        if (
            transpose is not None
        ):  # a Linear weight on its way to MatMul: stored as the product reads it
            scope.node.remove(node)
            order = [list(entry.ints) for entry in transpose.attribute if entry.name == "perm"]
            node, tensor = (
                transpose,
                tensor.transpose(order[0] if order else range(made.levels.ndim)[::-1]),
            )
        self.take(scope, node, name)
        self.found[name] = GraphWeight(name, replace(tensor, name=name), (made.source,))

    def only_transpose(self, scope: GraphProto, node: NodeProto) -> NodeProto | None:
        """The node's one consumer, if it is a Transpose in the same graph whose result is no
        output."""
        uses = self.uses.get(node.output[0], [])
        if len(uses) != 1 or uses[0].node.op_type != "Transpose" or uses[0].scope is not scope:
            return None
        outputs = {value.name for value in scope.output}
        return None if uses[0].node.output[0] in outputs else uses[0].node

    def take_integers(self, scope: GraphProto, node: NodeProto, known: Known) -> bool:
        """Of a DequantizeLinear that stays: the integers that QuantizeLinear makes for it of
        floats. Whether it was so."""
        value = known.get(node.input[0])
        if (
            node.op_type != "DequantizeLinear"
            or not isinstance(value, Constant)
            or value.maker is None
        ):
            return False
        if node.input[0] in {output.name for output in scope.output}:
            return False
        if (
            value.maker in scope.node
        ):  # else an outer graph's node, taken there for another consumer
            name = self.name(scope, value.maker)
            if name in self.leave:
                return False
            self.take(scope, value.maker, name)
            zero = (
                self.constant(node.input[2], known)
                if len(node.input) > 2 and node.input[2]
                else None
            )
            self.found[name] = _make_integer_weight(name, value, zero)
        return True

    def name(self, scope: GraphProto, node: NodeProto) -> str:
        """Under which the node's output can be a value of the main graph; the same in each pass
        over a graph."""
        if scope is self.graph.proto.graph:
            return node.output[0]
        return make_fresh_name(node.output[0], self.taken)  # another branch may use the same name

    def take(self, scope: GraphProto, node: NodeProto, name: str) -> None:
        """Removes the node; its output becomes a value of the main graph."""
        scope.node.remove(node)
        if name != node.output[0]:
            rename_values(scope, node.output[0], name)

    def stored_integers(self) -> None:
        """Narrow integer initializers that something still reads."""
        graph = self.graph.proto.graph
        uses = find_uses(graph)
        known: dict[str, TensorProto | Constant] = {
            tensor.name: tensor for tensor in graph.initializer
        }
        for name, maker in self.makers.items():
            value = find_constant(maker)
            if value is not None:
                known[name] = value
        for tensor in graph.initializer:
            wanted = tensor.data_type in NARROW and len(tensor.dims) >= 2 and tensor.name in uses
            if (
                wanted
                and tensor.name not in self.leave
                and not any(tensor.name == value.name for value in graph.output)
            ):
                use = uses[tensor.name][0]
                position = ZERO_POINTS.get(use.node.op_type, {}).get(
                    use.position, len(use.node.input)
                )
                zero = (
                    self.constant(use.node.input[position], known)
                    if position < len(use.node.input)
                    else None
                )
                constant = self.constant(tensor.name, known)
                if constant is not None and constant.values.size:
                    self.found[tensor.name] = _make_integer_weight(tensor.name, constant, zero)


def _find_rule(node: NodeProto) -> Rule | None:
    if node.domain in ("", "ai.onnx"):
        return quantization_nodes.RULES.get(node.op_type)
    return qonnx.RULES.get(node.op_type) if node.domain in qonnx.DOMAINS else None


def _make_integer_weight(name: str, integers: Constant, zero: Constant | None) -> GraphWeight:
    """Levels count from the integer that most often stands for zero, where that leaves them in
    int8."""
    offset = 0
    if zero is not None and zero.values.size:
        values, counts = np.unique(zero.values, return_counts=True)
        offset = int(values[counts.argmax()])
    lowest, highest = int(integers.values.min()), int(integers.values.max())
    offset = next(
        least for least in (offset, 0, 128) if lowest - least >= -128 and highest - least <= 127
    )
    levels = (integers.values - offset).astype(np.int8)
    tensor = QuantTensor(name, levels, Scale(np.ones((), np.float32)))
    return GraphWeight(name, tensor, (integers.source,), integers=Integers(integers.type, offset))


def _drop_unread(proto: ModelProto, read_before: set[str]) -> set[str]:
    """Removes, in place, constants and quantising nodes that were read before and no longer are.
    Names of what went."""
    gone: set[str] = set()
    while True:
        read = set(find_uses(proto.graph)) | {
            value.name for scope in list_graphs(proto.graph) for value in scope.output
        }
        names = read_before - read
        size = len(gone)
        for scope in list_graphs(proto.graph):
            gone.update(_remove(scope, names))
        if len(gone) == size:
            return gone


def _remove(scope: GraphProto, names: set[str]) -> Iterator[str]:
    for index in reversed(range(len(scope.node))):
        node = scope.node[index]
        if node.op_type in ("Constant", "QuantizeLinear", "Clip") and set(node.output) <= names:
            yield node.output[0]
            del scope.node[index]
    constants = {tensor.name for tensor in scope.initializer} & names
    for values in (scope.initializer, scope.input):
        for index in reversed(
            [index for index, value in enumerate(values) if value.name in constants]
        ):
            yield values[index].name
            del values[index]


def count_bytes(tensor: TensorProto, graph: FloatGraph) -> int:
    """Count the bytes that a tensor takes in the file.

    Args:
        tensor: an initializer or the value of a Constant.
        graph: holds the values that are taken out of their tensors.

    Returns:
        Bytes.
    """
    return graph.weights[tensor.name].nbytes if tensor.name in graph.weights else tensor.ByteSize()
