"""Make channels of activations equally large, where that costs nothing.

Bytes have one step for all channels of an activation. A channel that is small beside the others
gets few of the 256 values, and a depthwise convolution behind it may blow it up again: BatchNorm
gives it a large factor there. Between a product and a depthwise convolution each channel c can have
a factor f_c of its own, since both have a step per channel anyway and a Relu between them lets
positive factors through [cross-layer equalisation, Nagel et al. 2019, arXiv 1906.04721]:

    f_c = 2^floor(log2(largest of all channels / largest of channel c))

The step of the product is multiplied by f_c, the one behind it divided by f_c. Powers of two, so
that no rounding changes and the integers stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx_converters.graph.constants import Constants
from ecqx_onnx_converters.graph.graph import FloatGraph, list_value_names
from ecqx_onnx_converters.graph.names import NameMaker
from ecqx_onnx_converters.graph.uses import find_positions, find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.passes.work import Work

LARGEST_FACTOR = 2**12  # a channel that is smaller still says nothing


@dataclass(frozen=True)
class Place:
    """Where channels can be equalised.

    Attributes:
        value: between the two.
        before, behind: indices of the convolutions in the graph.
    """

    value: str
    before: int
    behind: int


def find_places(work: Work) -> tuple[Place, ...]:
    """Find each Conv that a depthwise Conv follows, with or without a Relu between.

    Args:
        work: where to look; both weights must be quantized.

    Returns:
        The places; nobody else reads the two weights, or what is between.
    """
    graph, matching = work.graph, work.matching
    nodes, constants = graph.proto.graph.node, Constants(graph)
    uses = {name: len(places) for name, places in find_uses(graph.proto.graph).items()}
    outputs = {value.name for value in graph.proto.graph.output}
    makers = find_positions(nodes)
    weights = {
        weight.name: weight for weight in matching.found if isinstance(weight.tensor.meaning, Scale)
    }

    def alone(name: str) -> bool:
        return uses.get(name, 0) == 1 and name not in outputs

    def quantized(node: NodeProto) -> bool:
        biased = len(node.input) > 2 and bool(node.input[2])
        return (
            node.op_type == "Conv"
            and node.input[1] in weights
            and uses.get(node.input[1]) == 1
            and (not biased or constants.get(node.input[2]) is not None)
        )

    found = []
    for behind, node in enumerate(nodes):
        if (
            not quantized(node)
            or not _is_depthwise(node, weights[node.input[1]])
            or not alone(node.input[0])
        ):
            continue
        before = makers.get(node.input[0])
        if before is not None and nodes[before].op_type == "Relu" and alone(nodes[before].input[0]):
            before = makers.get(nodes[before].input[0])
        if before is not None and quantized(nodes[before]):
            found.append(Place(node.input[0], before, behind))
    return tuple(found)


def _is_depthwise(node: NodeProto, weight: GraphWeight) -> bool:
    """One input channel for each group. (Several outputs may share one.)"""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return groups > 1 and weight.tensor.shape[1] == 1 and weight.tensor.shape[0] % groups == 0


def equalize(work: Work, places: Sequence[Place], peaks: Mapping[str, np.ndarray]) -> Work:
    """Make channels equally large at each place, by scaling both weights against each other.

    Args:
        work: is not changed.
        places: from `find_places`.
        peaks: of each place's value, the largest magnitude of each channel, float [C].

    Returns:
        The new graph and matching, which compute the same function.
    """
    graph, matching = work.graph, work.matching
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    nodes = proto.graph.node
    constants = Constants(graph)
    names = NameMaker(list_value_names(proto.graph))
    weights = {weight.name: weight for weight in matching.found}
    for place in places:
        factor = _choose_factors(peaks[place.value])
        if (factor == 1).all():
            continue
        before, behind = nodes[place.before], nodes[place.behind]
        weights[before.input[1]] = _scale_weight(weights[before.input[1]], factor)
        each = len(weights[behind.input[1]].tensor.levels) // len(factor)
        weights[behind.input[1]] = _scale_weight(
            weights[behind.input[1]], np.repeat(1 / factor, each)
        )
        if len(before.input) > 2 and before.input[2]:
            bias = next((t for t in proto.graph.initializer if t.name == before.input[2]), None)
            if bias is None or bias.name in graph.weights:
                values = constants.get(before.input[2])
            else:
                values = numpy_helper.to_array(bias)
            assert values is not None  # find_places takes stored ones only
            before.input[2] = names("b")
            proto.graph.initializer.append(
                numpy_helper.from_array((values * factor).astype(np.float32), before.input[2])
            )
    found = tuple(weights[weight.name] for weight in matching.found)
    return replace(
        work, graph=FloatGraph(proto, graph.weights), matching=replace(matching, found=found)
    )


def _choose_factors(peaks: np.ndarray) -> np.ndarray:
    """float32 [C], powers of two from 1 up; 1 for a channel that is always zero."""
    largest = float(peaks.max(initial=0.0))
    room = largest / np.maximum(
        peaks.astype(np.float64), max(largest / LARGEST_FACTOR, float(np.finfo(np.float32).tiny))
    )
    room = np.where(peaks > 0, room, 1.0)
    return np.exp2(np.floor(np.log2(np.maximum(room, 1.0)))).astype(np.float32)


def _scale_weight(weight: GraphWeight, factor: np.ndarray) -> GraphWeight:
    tensor = weight.tensor
    assert isinstance(tensor.meaning, Scale)  # find_places takes no other
    step = tensor.meaning.step * factor.reshape(-1, *(1,) * (tensor.levels.ndim - 1))
    return replace(
        weight,
        tensor=QuantTensor(tensor.name, tensor.levels, Scale(step.astype(np.float32))),
        rescaled=True,
    )
