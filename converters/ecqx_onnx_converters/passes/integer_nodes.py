"""Find the nodes of a float graph that can run on integer kernels, and why each other one can't.

onnxruntime has kernels on 8-bit integers for products (QLinearConv, QGemm, QLinearMatMul),
elementwise sums and products, averages and concatenation. Operators that only move values (MaxPool,
Reshape, Slice, Pad ...) work on the bytes as they are. Relu and Clip right after a kernel cost
nothing: the kernel's output saturates at the ends of its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from ecqx_onnx.tensors import Scale
from ecqx_onnx_converters.dequantization.dequantization import refuse_standard
from ecqx_onnx_converters.graph.constants import Constants, list_names_inside
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.uses import find_positions, find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight

PRODUCTS = ("Conv", "Gemm", "MatMul")
PAIRS = ("Add", "Mul")
UNARY = ("GlobalAveragePool", "AveragePool", "LeakyRelu", "Sigmoid")
MOVES = (
    "MaxPool",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Slice",
    "Pad",
    "Expand",
    "Identity",
)
CLIPS = ("Relu", "Clip")


@dataclass(frozen=True)
class IntegerNode:
    """How one node works on integers.

    Attributes:
        kind: "kernel" (its inputs and output pass through QuantizeLinear and DequantizeLinear,
            which the runtime fuses with it), "move" (it gets the bytes) or "clip" (the same, with
            its bounds quantised).
        activations: positions of the inputs that are activations.
        constants: positions of the inputs that are float constants, to be quantised to 8 bit.
        output: the value that comes out, which is the absorbed Relu's or Clip's where there is one.
        absorbed: index of that Relu or Clip.
        float_output: a Gemm or MatMul whose sums go to float operators at full precision.
    """

    kind: str
    activations: tuple[int, ...]
    output: str
    constants: tuple[int, ...] = ()
    absorbed: int | None = None
    float_output: bool = False


@dataclass(frozen=True)
class FloatNode:
    """A node that stays float.

    Attributes:
        name: of its weight, or of the value that it makes.
    """

    operator: str
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class IntegerNodes:
    """What of a graph can run on integers.

    Attributes:
        nodes: by their index in the graph.
        stays: every other node that computes on activations.
        ranges: values whose range decides how they are quantised.
        weights: those that feed integer kernels.
    """

    nodes: Mapping[int, IntegerNode]
    stays: tuple[FloatNode, ...]
    ranges: tuple[str, ...]
    weights: frozenset[str]


def find_integer_nodes(
    graph: FloatGraph, found: Sequence[GraphWeight], *, refused: Mapping[str, str] | None = None
) -> IntegerNodes:
    """Find the nodes that onnxruntime's integer kernels can run.

    Args:
        graph: float.
        found: its quantized weights.
        refused: weights that must stay float, with the reason.

    Returns:
        The nodes, those that stay float with the reason, and the values whose ranges are needed.
    """
    return _Search(graph, found, refused or {}).result()


class _Search:
    """Nodes are visited in the order of the graph, which is that of execution."""

    def __init__(
        self, graph: FloatGraph, found: Sequence[GraphWeight], refused: Mapping[str, str]
    ) -> None:
        self.graph, self.nodes = graph, graph.proto.graph.node
        self.constants = Constants(graph)
        self.weights = {weight.name: weight for weight in found}
        self.refused = dict(refused)
        self.uses = find_uses(graph.proto.graph)
        self.outputs = {value.name for value in graph.proto.graph.output}
        self.types = _infer_element_types(graph)
        self.makers = find_positions(self.nodes)
        self.readers = self._readers()
        self.quantized: set[str] = set()  # values that exist as bytes
        self.integer: dict[int, IntegerNode] = {}
        self.reasons: dict[int, str] = {}
        self._refuse_shared_weights()

    def result(self) -> IntegerNodes:
        for index, node in enumerate(self.nodes):
            if not self.constants.is_constant(node):
                self._visit(index, node)
        self._leave_tails_float()
        absorbed = {node.absorbed for node in self.integer.values()}
        stays = tuple(
            FloatNode(node.op_type, self._name(node), self.reasons[index])
            for index, node in enumerate(self.nodes)
            if index in self.reasons
            and index not in absorbed
            and self.types.get(node.output[0], TensorProto.FLOAT) in FLOATS
        )
        weights = {
            self.nodes[index].input[1]
            for index in self.integer
            if self._weight_of(self.nodes[index])
        }
        return IntegerNodes(
            self.integer, stays, tuple(dict.fromkeys(self._ranges())), frozenset(weights)
        )

    def _readers(self) -> Mapping[str, list[int]]:
        """Value -> indices of the nodes that read it, in themselves or in a graph inside them."""
        readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in {*node.input, *list_names_inside(node)}:
                readers.setdefault(name, []).append(index)
        return readers

    def _visit(self, index: int, node: NodeProto) -> None:
        if index in {done.absorbed for done in self.integer.values()}:
            return
        found = self._judge(index, node)
        if isinstance(found, str):
            self.reasons[index] = found
        else:
            self.integer[index] = found
            self.quantized.add(found.output)

    def _judge(self, index: int, node: NodeProto) -> IntegerNode | str:
        """The IntegerNode, or why it stays float."""
        operator = node.op_type
        if node.domain not in ("", "ai.onnx"):
            return f"onnxruntime has no integer kernel for {node.domain}.{operator}"
        if operator in PRODUCTS:
            return self._kernel(index, node, self._product(node))
        if operator not in (*PAIRS, *UNARY, *MOVES, *CLIPS, "Concat"):
            return f"onnxruntime has no integer kernel for {operator}"
        if not any(name in self.quantized for name in node.input):
            return "its inputs are float, and integers would not pay for the conversion"
        if operator in UNARY:
            return self._kernel(index, node, (0,))
        if operator in (*PAIRS, "Concat"):
            return self._kernel(index, node, self._operands(node))
        if operator in CLIPS:
            bounds = self.bounds(node)
            if bounds:
                return IntegerNode("clip", (0,), node.output[0])
            return "its bounds are no constants"
        return self._move(node)

    def _move(self, node: NodeProto) -> IntegerNode | str:
        if node.input[0] not in self.quantized or any(
            name in self.quantized for name in node.input[1:]
        ):
            return f"onnxruntime has no integer kernel for {node.op_type} of several activations"
        if len([name for name in node.output if name]) > 1:
            return (
                f"onnxruntime has no integer kernel for {node.op_type} with {len(node.output)} "
                "outputs"
            )
        if (
            node.op_type == "Pad"
            and len(node.input) > 2
            and node.input[2]
            and self.constants.get(node.input[2]) is None
        ):
            return "it pads with a computed value"
        return IntegerNode("move", (0,), node.output[0])

    def _kernel(
        self, index: int, node: NodeProto, activations: tuple[int, ...] | str
    ) -> IntegerNode | str:
        """With the Relu or Clip that follows and nothing else reads."""
        if isinstance(activations, str):
            return activations
        for position in activations:
            kind = self.types.get(node.input[position], TensorProto.FLOAT)
            if kind != TensorProto.FLOAT:
                return f"its input '{node.input[position]}' is no float32"
        constants = tuple(
            p for p in range(len(node.input)) if node.op_type in PAIRS and p not in activations
        )
        output, absorbed = node.output[0], None
        readers = self.readers.get(output, [])
        if (
            len(readers) == 1
            and output not in self.outputs
            and self.nodes[readers[0]].op_type in CLIPS
        ):
            bounds = self.bounds(self.nodes[readers[0]])
            if (
                bounds and bounds[0] <= 0 <= bounds[1]
            ):  # a range always holds zero, so other bounds take a Clip of their own
                absorbed, output = readers[0], self.nodes[readers[0]].output[0]
        return IntegerNode("kernel", activations, output, constants, absorbed)

    def _operands(self, node: NodeProto) -> tuple[int, ...] | str:
        activations = tuple(
            p for p, name in enumerate(node.input) if not self.constants.holds(name)
        )
        for position in set(range(len(node.input))) - set(activations):
            values = self.constants.get(node.input[position])
            if node.op_type == "Concat" or values is None or values.dtype != np.float32:
                return (
                    f"its operand '{node.input[position]}' is a constant that {node.op_type} has "
                    "no integer kernel for"
                )
        return activations

    def _product(self, node: NodeProto) -> tuple[int, ...] | str:
        if len(node.input) < 2 or self.constants.holds(node.input[0]):
            return "its first input is a constant"
        if node.op_type == "MatMul" and not self.constants.holds(node.input[1]):
            return (0, 1)
        weight = node.input[1]
        if weight not in self.weights:
            return f"its weight '{weight}' is not quantised"
        numbers = {
            attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
        }
        if node.op_type == "Gemm" and (
            numbers.get("alpha", 1.0),
            numbers.get("beta", 1.0),
            numbers.get("transA", 0),
        ) != (
            1,
            1,
            0,
        ):
            return "its alpha, beta or transA is not the default"
        reason = explain_float(self.weights[weight], find_output_axis(node))
        if reason is not None:
            return reason
        if len(node.input) > 2 and node.input[2]:
            bias, tensor = self.constants.get(node.input[2]), self.weights[weight].tensor
            if bias is None or bias.dtype != np.float32:
                return "its bias is computed"
            if bias.size != tensor.shape[find_output_axis(node)]:
                return (
                    f"its bias has {bias.size} values for {tensor.shape[find_output_axis(node)]} "
                    "outputs"
                )
        return self.refused.get(weight, (0,))

    def _refuse_shared_weights(self) -> None:
        """A weight that some consumer reads as a float must come without DequantizeLinear for all
        of them."""
        for name in self.weights:
            for use in self.uses.get(name, []):
                integer = (
                    use.scope is self.graph.proto.graph
                    and use.position == 1
                    and use.node.op_type in PRODUCTS
                )
                if not integer or isinstance(self._product(use.node), str):
                    self.refused.setdefault(
                        name,
                        (
                            f"its weight '{name}' is read by {use.node.op_type}, too, which stays "
                            "float"
                        ),
                    )

    def _weight_of(self, node: NodeProto) -> str | None:
        return node.input[1] if node.op_type in PRODUCTS and node.input[1] in self.weights else None

    def _name(self, node: NodeProto) -> str:
        return self._weight_of(node) or next(
            (name for name in node.input if name in self.weights), node.output[0]
        )

    def bounds(self, node: NodeProto) -> tuple[float, float] | None:
        return find_clip_bounds(node, self.constants)

    def _leave_tails_float(self) -> None:
        """Sums of a last Gemm or MatMul keep full precision, also through operators that only carry
        them to float ones."""
        for index in reversed(list(self.integer)):
            node, done = self.nodes[index], self.integer[index]
            if done.absorbed is not None or self._has_integer_readers(done.output):
                continue
            if node.op_type in ("Gemm", "MatMul"):
                self.integer[index] = replace(done, float_output=True)
            elif (done.kind == "move" or done.constants) and self._begins_with_product(index):
                del self.integer[index]
                self.reasons[index] = "it carries the last product's float sums to float operators"

    def _has_integer_readers(self, name: str) -> bool:
        return any(
            reader in self.integer and name in self.nodes[reader].input
            for reader in self.readers.get(name, [])
        )

    def _begins_with_product(self, index: int) -> bool:
        """The node, and each before it that has no other reader, only carries values on from a Gemm
        or MatMul."""
        node, done = self.nodes[index], self.integer[index]
        source = node.input[done.activations[0]]
        maker = self.makers.get(source)
        if (
            maker is None
            or maker not in self.integer
            or len(self.readers[source]) > 1
            or self.integer[maker].absorbed is not None
        ):
            return False
        if self.nodes[maker].op_type in ("Gemm", "MatMul"):
            return True
        carries = self.integer[maker].kind == "move" or bool(self.integer[maker].constants)
        return carries and self._begins_with_product(maker)

    def _ranges(self) -> Iterator[str]:
        made = {done.output for done in self.integer.values()}
        for index, done in self.integer.items():
            for position in done.activations:
                if self.nodes[index].input[position] not in made:
                    yield self.nodes[index].input[position]
            if done.kind == "kernel" and not done.float_output:
                yield done.output


FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def find_output_axis(node: NodeProto) -> int:
    """Find the axis of the weight along which the outputs lie.

    Args:
        node: a Conv, Gemm or MatMul.

    Returns:
        0 or 1.
    """
    if node.op_type == "Gemm":
        if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            return 0
        return 1
    return 0 if node.op_type == "Conv" else 1


def explain_float(weight: GraphWeight, axis: int) -> str | None:
    """Say why no integer kernel can read a weight.

    Args:
        weight: a quantized weight.
        axis: along which the outputs lie.

    Returns:
        The reason in words; None if one can.
    """
    refusal = refuse_standard(weight.tensor)
    if refusal is not None:
        return f"its weight '{weight.name}' has no integers for a kernel: {refusal.reason}"
    assert isinstance(weight.tensor.meaning, Scale)  # narrowed by why_not_standard
    if weight.tensor.meaning.axis not in (None, axis) or (
        axis == 1 and len(weight.tensor.shape) != 2
    ):
        return (
            f"the step of its weight '{weight.name}' varies along its inputs; integer kernels want "
            "one per output"
        )
    return None


def find_clip_bounds(node: NodeProto, constants: Constants) -> tuple[float, float] | None:
    """Find the bounds of a Relu or Clip.

    Args:
        node: the Relu or Clip.
        constants: of the graph.

    Returns:
        (lowest, highest); None where they are computed.
    """
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = [-math.inf, math.inf]
    for position, name in enumerate(node.input[1:3]):
        if name:
            value = constants.get(name)
            if value is None or value.size != 1:
                return None
            bounds[position] = float(value.reshape(()))
    for attribute in node.attribute:  # opset 6
        bounds[("min", "max").index(attribute.name)] = attribute.f
    return bounds[0], bounds[1]


def _infer_element_types(graph: FloatGraph) -> Mapping[str, int]:
    """Value name -> TensorProto type, as far as onnx can infer it."""
    proto = onnx.shape_inference.infer_shapes(graph.proto)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    return {
        value.name: value.type.tensor_type.elem_type
        for value in values
        if value.type.HasField("tensor_type")
    }
