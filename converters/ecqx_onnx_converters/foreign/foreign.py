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
    bytes of several integers (MatMulNBits, GatherBlockQuantized; sub_byte.py)
        the integers are taken out of them, and put back by the decoder

A DequantizeLinear stays, and only its integers are stored anew, where runtimes make an integer
kernel of it (another input of its consumer is dequantized as well), where its result is no float32,
where a level fits no int8, and where a step is a block's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx_converters.foreign import qonnx, quantization_nodes
from ecqx_onnx_converters.foreign.quantization_nodes import Constant, Grid, Rule
from ecqx_onnx_converters.foreign.sub_byte import find_bits
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
from ecqx_onnx_converters.matching.digits import join_digits, split_digits
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
    "QAttention": {1: 7},
    "DynamicQuantizeMatMul": {1: 3},
    "MatMulIntegerToFloat": {1: 5},
    "DynamicQuantizeLSTM": {1: 9, 2: 11},
}


@dataclass(frozen=True, eq=False)
class Foreign:
    """The quantized weights of a graph, and the graph without the nodes that made them.

    Attributes:
        graph: the graph; the nodes that made the weights are gone.
        weights: what it reads now and nothing in it makes.
        replaced: source of weights -> bytes of the tensor, which they make superfluous; weights of
            one source are stored once.
        refused: name of a value -> why it stays.
    """

    graph: FloatGraph
    weights: tuple[GraphWeight, ...]
    replaced: Mapping[str, int]
    refused: Mapping[str, str]


def find_quantized(graph: FloatGraph, *, leave: Collection[str] = ()) -> Foreign:
    """Find the quantized weights of a graph, wherever they are written down.

    Args:
        graph: as another tool has written it; it isn't changed.
        leave: weights (names as in an earlier result) that are to stay as they are.

    Returns:
        The weights, a copy of the graph that reads them as plain values, and what was refused, with
        reasons.
    """
    # 1. Take the weights out of a copy of the graph.
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    search = _Search(FloatGraph(proto, graph.weights), frozenset(leave))
    search.visit(proto.graph, {})
    search.take_stored_integers()

    # 2. Drop what only they have read, and their own initializers.
    read_before = set(find_uses(graph.proto.graph))
    gone = _drop_unread(proto, read_before)
    gone.update(_remove_values(proto.graph, search.found.keys()))

    # 3. Count what they replace.
    weights = tuple(search.found.values())
    replaced = {weight.sources[0]: 0 for weight in weights}
    for tensor in graph.proto.graph.initializer:
        if tensor.name in gone and tensor.name in replaced:
            replaced[tensor.name] = _count_bytes(tensor, graph)
    left = {name: values for name, values in graph.weights.items() if name not in gone}
    refused = {name: reason for name, reason in search.refused.items() if name not in search.found}
    return Foreign(FloatGraph(proto, left), weights, replaced, refused)


Known = Mapping[str, TensorProto | Constant]


@dataclass(eq=False)
class _Search:
    """One pass over the graph, which it edits.

    Attributes:
        graph: the graph, edited in place.
        leave: names of weights that stay as they are.
        found: name -> weight.
        refused: name of a value -> why it stays.
    """

    graph: FloatGraph
    leave: frozenset[str]
    found: dict[str, GraphWeight] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        main = self.graph.proto.graph
        self.uses = find_uses(main)
        self.makers: dict[str, NodeProto] = {}
        for scope in list_graphs(main):
            for node in scope.node:
                self.makers.update(dict.fromkeys(node.output, node))
        self.taken = list_value_names(main)

    def visit(self, scope: GraphProto, outer: Known) -> None:
        """Nodes in their order, each after those that it reads, and the graphs inside them. outer:
        constants around the scope."""
        known = {**outer, **{tensor.name: tensor for tensor in scope.initializer}}
        outputs = {value.name for value in scope.output}
        for node in list(scope.node):
            tensor = find_constant(node)
            made = self.evaluate_node(node, known)
            if tensor is not None:
                known[node.output[0]] = tensor
            elif isinstance(made, Constant):  # by QuantizeLinear or Clip: a step on the way
                known[node.output[0]] = made
            elif isinstance(made, Grid) and node.output[0] not in outputs:
                self.take_grid(scope, node, made)
            elif isinstance(made, Refusal) and not self.take_integers(scope, node, known):
                stays = node.output[0]
                if node.op_type == "DequantizeLinear":
                    stays = node.input[0]
                self.refused[stays] = made.reason
            for inner in list_subgraphs(node):
                self.visit(inner, known)

    def evaluate_node(self, node: NodeProto, known: Known) -> Constant | Grid | Refusal | None:
        """What the node makes of constants; None for a node of no interest, or one that reads
        something else."""
        rule = _find_rule(node)
        inputs = [self.read_constant(name, known) if name else None for name in node.input]
        if rule is None:
            return None
        for name, value in zip(node.input, inputs, strict=True):
            if name and value is None:
                return None
        if inputs[0] is not None and inputs[0].values.ndim < 2:
            return None  # a bias, or an activation's scale
        made = rule(node, inputs)
        dequantized = isinstance(made, Grid) and node.op_type == "DequantizeLinear"
        if dequantized and self.meets_integers(node, known):
            return Refusal("its consumer computes with integers")
        return made

    def read_constant(self, name: str, known: Known) -> Constant | None:
        """The values of a known constant; None for one of a type that no weight has."""
        value = known.get(name)
        if value is None or isinstance(value, Constant):
            return value
        if value.data_type not in READABLE:
            return None
        values = self.graph.weights.get(name)
        if values is None:
            values = read_values(value)
        wide = np.float32 if value.data_type == TensorProto.FLOAT else np.int32
        return Constant(values.astype(wide, copy=False), value.data_type, name)

    def meets_integers(self, node: NodeProto, known: Known) -> bool:
        """Some consumer reads another dequantized value, one that varies."""
        for use in self.uses.get(node.output[0], []):
            for name in use.node.input:
                maker = self.makers.get(name)
                if maker is None or name == node.output[0]:
                    continue
                if maker.op_type == "DequantizeLinear" and maker.input[0] not in known:
                    return True
        return False

    def take_grid(self, scope: GraphProto, node: NodeProto, made: Grid) -> None:
        """Makes a weight of what the node computes, and removes the node."""
        tensor = QuantTensor("", made.levels, Scale(made.step))
        transpose = self.find_only_transpose(scope, node)
        # Integers that others read, too, are stored once: as they are or, a matrix, as its
        # transpose.
        if made.levels.ndim != 2 and len(self.uses.get(made.source, ())) > 1:
            transpose = None
        last = node if transpose is None else transpose
        name = self.make_name(scope, last)
        if name in self.leave:
            return
        # A Linear weight on its way to MatMul is stored as the product reads it.
        if transpose is not None:
            scope.node.remove(node)
            permutation: Sequence[int] = range(made.levels.ndim)[::-1]
            for entry in transpose.attribute:
                if entry.name == "perm":
                    permutation = list(entry.ints)
                    break
            tensor = tensor.transpose(permutation)
        self.take(scope, last, name)
        self.found[name] = GraphWeight(name, replace(tensor, name=name), (made.source,))

    def find_only_transpose(self, scope: GraphProto, node: NodeProto) -> NodeProto | None:
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
        if node.op_type != "DequantizeLinear":
            return False
        value = known.get(node.input[0])
        if not isinstance(value, Constant) or value.maker is None:
            return False
        if node.input[0] in {output.name for output in scope.output}:
            return False
        if value.maker not in scope.node:
            return True  # an outer graph's node, taken there for another consumer
        name = self.make_name(scope, value.maker)
        if name in self.leave:
            return False
        self.take(scope, value.maker, name)
        zero = None
        if len(node.input) > 2 and node.input[2]:
            zero = self.read_constant(node.input[2], known)
        self.found[name] = _make_integer_weight(name, value, zero)
        return True

    def make_name(self, scope: GraphProto, node: NodeProto) -> str:
        """The name under which the node's output can be a value of the main graph; the same in each
        pass over a graph."""
        if scope is self.graph.proto.graph:
            return node.output[0]
        return make_fresh_name(node.output[0], self.taken)  # another branch may use the same name

    def take(self, scope: GraphProto, node: NodeProto, name: str) -> None:
        """Removes the node; its output becomes a value of the main graph."""
        scope.node.remove(node)
        if name != node.output[0]:
            rename_values(scope, node.output[0], name)

    def take_stored_integers(self) -> None:
        """Makes weights of the narrow integer initializers that something still reads."""
        graph = self.graph.proto.graph
        uses = find_uses(graph)
        known: dict[str, TensorProto | Constant] = {
            tensor.name: tensor for tensor in graph.initializer
        }
        for name, maker in self.makers.items():
            value = find_constant(maker)
            if value is not None:
                known[name] = value
        stay = self.leave.union(value.name for value in graph.output)
        for tensor in graph.initializer:
            if tensor.data_type not in NARROW or len(tensor.dims) < 2:
                continue
            if tensor.name not in uses or tensor.name in stay:
                continue
            use = uses[tensor.name][0]
            position = ZERO_POINTS.get(use.node.op_type, {}).get(use.position)
            zero = None
            if position is not None and position < len(use.node.input):
                zero = self.read_constant(use.node.input[position], known)
            bits = find_bits(tensor, uses[tensor.name])
            constant = self.read_constant(tensor.name, known)
            if isinstance(bits, Refusal):
                self.refused[tensor.name] = bits.reason
            elif constant is not None and constant.values.size and bits == 8:
                self.found[tensor.name] = _make_integer_weight(tensor.name, constant, zero)
            elif constant is not None and constant.values.size:
                self.found[tensor.name] = _make_sub_byte_weight(tensor.name, constant, bits)


def _find_rule(node: NodeProto) -> Rule | None:
    """What evaluates the node; None for one of no interest."""
    if node.domain in ("", "ai.onnx"):
        return quantization_nodes.RULES.get(node.op_type)
    if node.domain in qonnx.DOMAINS:
        return qonnx.RULES.get(node.op_type.partition("_")[0])  # Quant_FLOOR: qonnx_functions.py
    return None


def _make_integer_weight(name: str, integers: Constant, zero: Constant | None) -> GraphWeight:
    """Levels count from the integer that most often stands for zero, where that leaves them in
    int8."""
    offset = 0
    if zero is not None and zero.values.size:
        values, counts = np.unique(zero.values, return_counts=True)
        offset = int(values[counts.argmax()])
    lowest = int(integers.values.min())
    highest = int(integers.values.max())
    offset = next(
        least for least in (offset, 0, 128) if lowest - least >= -128 and highest - least <= 127
    )
    levels = (integers.values - offset).astype(np.int8)
    tensor = QuantTensor(name, levels, Scale(np.ones((), np.float32)))
    return GraphWeight(name, tensor, (integers.source,), integers=Integers(integers.type, offset))


def _make_sub_byte_weight(name: str, integers: Constant, bits: int) -> GraphWeight:
    """Levels count from the integer that occurs most often."""
    digits = split_digits(integers.values, bits)
    center = int(np.bincount(digits.reshape(-1), minlength=1 << bits).argmax())
    levels = (digits - center).astype(np.int8)
    form = Integers(integers.type, bits=bits)
    everywhere = np.full(form.digits, center, np.int8)
    offset = int(join_digits(everywhere, form)[0])
    tensor = QuantTensor(name, levels, Scale(np.ones((), np.float32)))
    return GraphWeight(name, tensor, (integers.source,), integers=replace(form, offset=offset))


def _drop_unread(proto: ModelProto, read_before: set[str]) -> set[str]:
    """Removes, in place, constants and quantizing nodes that were read before and no longer are.
    Names of what went."""
    gone: set[str] = set()
    while True:  # what is removed may have been the last to read something else
        read = set(find_uses(proto.graph))
        for scope in list_graphs(proto.graph):
            read.update(value.name for value in scope.output)
        names = read_before - read
        size = len(gone)
        for scope in list_graphs(proto.graph):
            gone.update(_remove_unread(scope, names))
        if len(gone) == size:
            return gone


def _remove_unread(scope: GraphProto, names: set[str]) -> Iterator[str]:
    """Removes nodes all of whose outputs, and initializers that, are among the names; their
    names."""
    for index in reversed(range(len(scope.node))):
        node = scope.node[index]
        if node.op_type in ("Constant", "QuantizeLinear", "Clip") and set(node.output) <= names:
            yield node.output[0]
            del scope.node[index]
    constants = {tensor.name for tensor in scope.initializer} & names
    yield from _remove_values(scope, constants)


def _remove_values(scope: GraphProto, names: Collection[str]) -> Iterator[str]:
    """Removes initializers and inputs of these names; their names."""
    for values in (scope.initializer, scope.input):
        for index in reversed(range(len(values))):
            name = values[index].name
            if name in names:
                yield name
                del values[index]


def _count_bytes(tensor: TensorProto, graph: FloatGraph) -> int:
    """Bytes of an initializer, whose values may lie beside the graph."""
    if tensor.name in graph.weights:
        return graph.weights[tensor.name].nbytes
    return tensor.ByteSize()
