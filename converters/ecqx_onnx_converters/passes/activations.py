"""Put QuantizeLinear and DequantizeLinear around the nodes that can run on integers.

Activations become uint8, asymmetric [Jacob et al. 2018, arXiv 1712.05877, sec. 2.1]:

    x = s (q - z),   s = (high - low) / 255,   z = round(-low / s)

with low <= 0 <= high, so that zero is exact.

Weights keep their integers and get their DequantizeLinear from the writer; biases become int32 with
scale s_x s_w. Written like this, onnxruntime fuses DequantizeLinear -> operator -> QuantizeLinear
into one integer kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.tensors import Scale
from ecqx_onnx_converters.graph.constants import Constants, list_names_inside
from ecqx_onnx_converters.graph.graph import FloatGraph, list_value_names
from ecqx_onnx_converters.graph.names import NameMaker
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.passes.integer_nodes import (
    FloatNode,
    IntegerNode,
    IntegerNodes,
    find_clip_bounds,
    find_integer_nodes,
)
from ecqx_onnx_converters.passes.work import Work

LEVELS = 255  # uint8 has so many steps
SMALLEST = float(np.finfo(np.float32).tiny)
ROUNDED_BY_RUNTIME = (
    "Conv",
    "ConvTranspose",
    "Gemm",
)  # whose float weights onnxruntime 1.32 may take to 8 bits by itself
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
LARGEST_BIAS = 2**30  # steps; leaves the other half of int32 to the sums

Ranges = Mapping[str, tuple[float, float]]
"""Value name -> (lowest, highest) that it takes, by calibration."""


@dataclass(frozen=True)
class UInt8:
    """A grid of bytes: x = scale (q - zero_point), q in [0, 255].

    Attributes:
        scale: float32.
    """

    scale: np.float32
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float) -> UInt8:
        """Choose the grid for values in [low, high], widened to hold zero.

        Args:
            low: the lowest value.
            high: the highest value.

        Returns:
            The grid; a value that is always zero gets the scale 1.
        """
        low, high = min(0.0, low), max(0.0, high)
        if low == high:
            return cls(np.float32(1), 0)
        scale = np.float32(max((high - low) / LEVELS, SMALLEST))
        return cls(scale, int(np.clip(np.rint(-low / float(scale)), 0, LEVELS)))

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """Round values to the grid, as QuantizeLinear does it.

        Args:
            values: float, any shape.

        Returns:
            uint8, of the same shape.
        """
        return np.clip(np.rint(values / self.scale) + self.zero_point, 0, LEVELS).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class IntegerKernels:
    """Which nodes of a graph run on integers.

    Attributes:
        weights: names of the weights that an integer kernel reads; in the graph they are still
            float initializers.
        kernels: operator -> how many of its nodes run on integers.
        stays: nodes that don't, with the reason.
    """

    weights: frozenset[str]
    kernels: Mapping[str, int]
    stays: tuple[FloatNode, ...]

    @property
    def sentence(self) -> str:
        """Empty: reports list the kernels and what stays."""
        return ""


def replace_pooling(work: Work) -> Work:
    """Replace each mean over all pixels by a GlobalAveragePool, which has an integer kernel.

    Args:
        work: is not changed.

    Returns:
        The same with a new graph.
    """
    graph = work.graph
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input)
    }
    constants, names = Constants(graph), NameMaker(list_value_names(proto.graph))
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        nodes += _make_pooling(
            node, ranks.get(node.input[0], 0) if node.input else 0, constants, names
        ) or [node]
    return replace(work, graph=_put_nodes(proto, nodes, graph.weights))


def _put_nodes(
    proto: ModelProto, nodes: Sequence[NodeProto], weights: Mapping[str, np.ndarray]
) -> FloatGraph:
    """`proto`, which is changed, with these nodes and no initializer that nothing reads any
    more."""
    copies = [
        NodeProto.FromString(node.SerializeToString()) for node in nodes
    ]  # some are still owned by the graph
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    read = {value.name for value in proto.graph.output}
    for node in copies:
        read.update((*node.input, *list_names_inside(node)))
    unread = {tensor.name for tensor in proto.graph.initializer} - read
    for values in (
        proto.graph.initializer,
        proto.graph.input,
    ):  # old exporters list weights among the inputs, too
        for index in reversed(
            [index for index, value in enumerate(values) if value.name in unread]
        ):
            del values[index]
    return FloatGraph(
        proto, {name: values for name, values in weights.items() if name not in unread}
    )


def _make_pooling(
    node: NodeProto, rank: int, constants: Constants, names: NameMaker
) -> list[NodeProto] | None:
    if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx") or rank < 3:
        return None
    numbers = {
        attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
    }
    axes = constants.get(node.input[1]) if len(node.input) > 1 else numbers.get("axes")
    if axes is None or sorted(int(axis) % rank for axis in axes) != list(range(2, rank)):
        return None
    if numbers.get("keepdims", 1):
        return [helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]])]
    pooled = names("p")
    return [
        helper.make_node("GlobalAveragePool", [node.input[0]], [pooled]),
        helper.make_node("Flatten", [pooled], [node.output[0]], axis=1),
    ]


def carry_ranges(graph: FloatGraph, values: Sequence[str], known: Ranges) -> Ranges:
    """Find the range of each value: its own, or that of one with the same entries reshaped.

    Args:
        graph: where the values are.
        values: their names.
        known: the ranges that a training ended with.

    Returns:
        Value name -> (lowest, highest), for all of `values`.

    Raises:
        OptionError: if a value has none.
    """
    ranges = dict(known)
    for node in (*graph.proto.graph.node, *reversed(graph.proto.graph.node)):
        if node.op_type in RESHAPES:
            for one, other in ((node.input[0], node.output[0]), (node.output[0], node.input[0])):
                if one in ranges:
                    ranges.setdefault(other, ranges[one])
    missing = [name for name in values if name not in ranges]
    if missing:
        raise OptionError(
            f"the checkpoint has no range for {len(missing)} of the {len(values)} activations, "
            f"'{missing[0]}' the first: "
            "training did not see it as the exported graph has it; add --calibration DATA, which "
            "gives all of them new ones"
        )
    return {name: ranges[name] for name in values}


def quantize_activations(work: Work, ranges: Ranges) -> Work:
    """Put QuantizeLinear and DequantizeLinear where integer kernels take the nodes between them.

    Args:
        work: its graph is float; is not changed.
        ranges: of every value in `find_integer_nodes(graph, found).ranges`.

    Returns:
        The new graph; its weights, of which a step may have been raised to hold a bias; and as the
        last note an IntegerKernels.

    Raises:
        ModelError: if there is nothing to run on integers.
    """
    refused: dict[str, str] = {}
    while True:
        plan = find_integer_nodes(work.graph, work.matching.found, refused=refused)
        if not plan.weights:
            first = ""
            if plan.stays:
                stays = plan.stays[0]
                first = f" ({stays.operator} '{stays.name}': {stays.reason})"
            raise ModelError(
                f"no node of the model can run on integers{first}; convert without --activations "
                "int8"
            )
        rewriter = _Rewriter(work.graph, work.matching.found, plan, ranges)
        too_large = rewriter.run()
        if not too_large:
            return rewriter.finish(work)
        refused |= too_large


class _Rewriter:
    """Emits the new nodes in order. bytes: value -> its uint8 twin; floats: value -> where
    operators read it as a float."""

    def __init__(
        self, graph: FloatGraph, found: Sequence[GraphWeight], plan: IntegerNodes, ranges: Ranges
    ) -> None:
        self.source, self.plan, self.ranges = graph, plan, ranges
        self.proto = ModelProto()
        self.proto.CopyFrom(graph.proto)
        self.weights = {weight.name: weight for weight in found}
        self.constants = Constants(graph)
        self.names = NameMaker(list_value_names(self.proto.graph))
        self.nodes: list[NodeProto] = []
        self.formats: dict[str, UInt8] = {}
        self.bytes: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.stored: dict[tuple[str, bytes], str] = {}
        self.too_large: dict[str, str] = {}
        self.made = {
            done.output for done in plan.nodes.values() if not done.float_output
        }  # values that integer nodes make

    def run(self) -> Mapping[str, str]:
        """Weights that cannot stay, with the reason; empty when the graph is done."""
        skipped = {done.absorbed for done in self.plan.nodes.values()}
        for index, node in enumerate(self.source.proto.graph.node):
            if index in skipped:
                continue
            if index in self.plan.nodes:
                self._integer(node, self.plan.nodes[index])
                continue
            for name in {*node.input, *list_names_inside(node)} & self.made:
                self._float(name)
            self.nodes.append(self._kept_float(node))
        for value in self.proto.graph.output:
            if value.name in self.made:
                self._float(value.name)
        return self.too_large

    def finish(self, work: Work) -> Work:
        kernels: dict[str, int] = {}
        for index in self.plan.nodes:
            operator = self.source.proto.graph.node[index].op_type
            kernels[operator] = kernels.get(operator, 0) + 1
        graph = _put_nodes(self.proto, self.nodes, self.source.weights)
        matching = replace(work.matching, found=tuple(self.weights.values()))
        note = IntegerKernels(self.plan.weights, kernels, self.plan.stays)
        return Work(graph, matching, (*work.notes, note))

    def _kept_float(self, node: NodeProto) -> NodeProto:
        """onnxruntime rounds float weights to 8 bits, unasked and with one step for all, where
        their operator stands between DequantizeLinear and QuantizeLinear. It does not look through
        the largest of one value.
        """
        if node.op_type not in ROUNDED_BY_RUNTIME or node.input[0] not in self.made:
            return node
        changed = NodeProto.FromString(node.SerializeToString())
        changed.input[0] = self.names("m")
        self.nodes.append(helper.make_node("Max", [node.input[0]], [changed.input[0]]))
        return changed

    def _integer(self, node: NodeProto, how: IntegerNode) -> None:
        changed = NodeProto.FromString(node.SerializeToString())
        if how.kind == "kernel":
            self._kernel(changed, how)
            return
        source = node.input[0]
        changed.input[0] = self._bytes(source)
        self.formats[how.output] = self.formats[source]
        self.bytes[how.output] = changed.output[0] = self.names("u")
        if how.kind == "clip":
            low, high = find_clip_bounds(node, self.constants) or (-np.inf, np.inf)
            bounds = [
                self._store(self.formats[source].quantize(np.array(bound))) for bound in (low, high)
            ]
            changed = helper.make_node("Clip", [changed.input[0], *bounds], list(changed.output))
        elif node.op_type == "Pad":
            if len(node.input) > 2 and node.input[2]:
                value = self.constants.get(node.input[2])
            else:
                value = None
            padding = self._store(
                self.formats[source].quantize(np.zeros(()) if value is None else value.reshape(()))
            )
            changed.input[:] = [changed.input[0], node.input[1], padding, *node.input[3:]]
        self.nodes.append(changed)

    def _kernel(self, node: NodeProto, how: IntegerNode) -> None:
        first = node.input[how.activations[0]]
        for position in how.activations:
            node.input[position] = self._float(node.input[position])
        for position in how.constants:
            values = self.constants.get(node.input[position])
            assert values is not None  # find_integer_nodes takes stored constants only
            node.input[position] = self._constant(values)
        if len(node.input) > 1 and node.input[1] in self.plan.weights:
            weight = self.weights.get(node.input[1])
        else:
            weight = None
        if weight is not None and len(node.input) > 2 and node.input[2]:
            node.input[2] = self._bias(node.input[2], weight, first)
        self.nodes.append(node)
        if how.float_output:
            return
        node.output[0] = self.names("f")
        self.formats[how.output] = UInt8.of(*self._range(how.output))
        self._quantize(node.output[0], how.output)

    def _range(self, name: str) -> tuple[float, float]:
        low, high = self.ranges[name]
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(
                f"activation '{name}' ranges from {low} to {high}: only finite values can be "
                "quantised"
            )
        return low, high

    def _bytes(self, name: str) -> str:
        if name not in self.bytes:  # a float operator or the caller makes it
            self.formats[name] = UInt8.of(*self._range(name))
            self._quantize(name, name)
        return self.bytes[name]

    def _quantize(self, source: str, name: str) -> None:
        self.bytes[name] = self.names("u")
        self.nodes.append(
            helper.make_node(
                "QuantizeLinear",
                [source, *self._parameters(self.formats[name])],
                [self.bytes[name]],
            )
        )

    def _float(self, name: str) -> str:
        """What reads as the dequantised value: it has the value's own name where no float operator
        makes that."""
        if name not in self.floats:
            self.floats[name] = name if name in self.made else self.names("d")
            source = self._bytes(name)
            inputs = [source, *self._parameters(self.formats[name])]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [self.floats[name]]))
        return self.floats[name]

    def _parameters(self, format: UInt8) -> tuple[str, str]:
        return self._store(np.array(format.scale, np.float32)), self._store(
            np.array(format.zero_point, np.uint8)
        )

    def _constant(self, values: np.ndarray) -> str:
        format = UInt8.of(float(values.min()), float(values.max()))
        output = self.names("d")
        node = helper.make_node(
            "DequantizeLinear",
            [self._store(format.quantize(values)), *self._parameters(format)],
            [output],
        )
        self.nodes.append(node)
        return output

    def _bias(self, name: str, weight: GraphWeight, source: str) -> str:
        """int32 with the scale of the sums, s_x s_w, so that the kernel adds it to them as it is
        [Jacob et al., sec. 2.4].

        source: the activation that meets the weight.
        """
        bias = self.constants.get(name)
        assert bias is not None  # find_integer_nodes takes stored ones only
        weight = self.weights[weight.name] = self._with_room_for(
            bias.reshape(-1), weight, self.formats[source].scale
        )
        meaning = weight.tensor.meaning
        assert isinstance(meaning, Scale)  # find_integer_nodes takes no other
        scale = np.asarray(self.formats[source].scale * meaning.step, np.float32).reshape(
            () if meaning.axis is None else (-1,)
        )
        with np.errstate(over="ignore", divide="ignore"):
            levels = np.rint(bias.reshape(-1).astype(np.float64) / scale)
        if not (np.abs(levels) <= LARGEST_BIAS).all():
            worst = int(np.argmax(np.abs(levels)))
            reason = (
                f"the bias of output {worst} is {np.abs(levels[worst]):.1e} steps of its sums, "
                "more than int32 holds"
            )
            self.too_large[weight.name] = reason
        inputs = [
            self._store(np.clip(levels, -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)),
            self._store(scale),
        ]
        dequantize = helper.make_node("DequantizeLinear", inputs, [self.names("d")])
        if scale.ndim:
            dequantize.attribute.append(helper.make_attribute("axis", 0))
        self.nodes.append(dequantize)
        return dequantize.output[0]

    def _with_room_for(
        self, bias: np.ndarray, weight: GraphWeight, scale: np.float32
    ) -> GraphWeight:
        """BatchNorm leaves channels that died in training a factor of almost nothing, so that their
        bias would be too many steps. Such a channel's step is raised: its n weights then move the
        output by less than n·2^-18 of the bias, and before by less.
        """
        meaning = weight.tensor.meaning
        uses = sum(weight.name in node.input for node in self.source.proto.graph.node)
        if (
            not weight.rescaled
            or uses > 1
            or not isinstance(meaning, Scale)
            or meaning.axis is None
        ):
            return weight
        least = (np.abs(bias.astype(np.float64)) / (float(scale) * (LARGEST_BIAS - 1))).astype(
            np.float32
        )
        step = np.maximum(meaning.step, least.reshape(meaning.step.shape))
        return replace(weight, tensor=replace(weight.tensor, meaning=Scale(step)))

    def _store(self, values: np.ndarray) -> str:
        """An initializer; equal ones are stored once."""
        key = (f"{values.dtype}{values.shape}", values.tobytes())
        if key not in self.stored:
            self.stored[key] = self.names("c")
            self.proto.graph.initializer.append(numpy_helper.from_array(values, self.stored[key]))
        return self.stored[key]
