"""Refuses models that say, in constants, that they make gigantic tensors or count for ages.

A file of 200 bytes can hold a loop of 2^62 steps, or ask for a tensor of terabytes. What follows
from the values of inputs is not looked at: the time of a run is bounded by runtime/watchdog.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters.graph.graph import list_subgraphs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ecqx_onnx.errors import FileError

MOST_ENTRIES = 1 << 28  # of a tensor that an operator makes: a gigabyte of floats
MOST_STEPS = 10_000_000  # of loops that only count, those inside each other multiplied
MOST_CONSTANT = 1024  # entries of a tensor that can be a shape
# Which input of an operator is the shape that it makes, or the factors by which it repeats.
SHAPE_INPUTS = {
    "ConstantOfShape": 0,
    "Expand": 1,
    "Tile": 1,
    "OneHot": 1,
    "Resize": 3,
    "BlackmanWindow": 0,
    "HammingWindow": 0,
    "HannWindow": 0,
}
SHAPE_ATTRIBUTES = frozenset(("RandomNormal", "RandomUniform"))
STANDARD_DOMAINS = frozenset(("", "ai.onnx"))
Constants = Mapping[str, np.ndarray]


def check_claimed_work(path: Path, model: ModelProto) -> None:
    """Refuse a model whose constants claim more than any real one does.

    Args:
        path: its file, for the sentence.
        model: as parsed; its tensors hold as many values as their shapes say.

    Raises:
        FileError: for a loop that counts beyond MOST_STEPS, or an operator that is told by a
            constant to make more than MOST_ENTRIES values.
    """
    _check_graph(path, model.graph, {}, 1)
    for function in model.functions:
        _check_nodes(path, function.node, _find_constants(function.node, ()), 1)


def _check_graph(path: Path, graph: GraphProto, outer: Constants, steps: int) -> None:
    constants = {**outer, **_find_constants(graph.node, graph.initializer)}
    _check_nodes(path, graph.node, constants, steps)


def _check_nodes(path: Path, nodes: Iterable[NodeProto], constants: Constants, steps: int) -> None:
    """Nodes of one scope, and those of the graphs inside them.

    `steps` tells how often all loops around them count.
    """
    for node in nodes:
        inner_steps = steps
        if node.domain in STANDARD_DOMAINS:
            _check_size(path, node, constants)
            inner_steps = steps * max(1, _count_steps(node, constants))
        if inner_steps > MOST_STEPS and inner_steps > steps:
            raise FileError(
                f"{path}: {_name(node)} makes {inner_steps} steps, and more than {MOST_STEPS} are"
                " not run; is it damaged?"
            )
        for graph in list_subgraphs(node):
            _check_graph(path, graph, constants, inner_steps)


def _check_size(path: Path, node: NodeProto, constants: Constants) -> None:
    """A length counts even beside a zero: a tensor of 2^62 empty rows is a loop of 2^62 steps."""
    lengths = _find_lengths(node, constants)
    entries = math.prod(max(abs(length), 1) for length in lengths)
    if entries > MOST_ENTRIES:
        raise FileError(
            f"{path}: {_name(node)} makes a tensor of {entries} values (by {lengths[:9]}), and more"
            f" than {MOST_ENTRIES} are not made; is it damaged?"
        )


def _find_lengths(node: NodeProto, constants: Constants) -> list[int]:
    """The lengths or repeats that the node's constants state; empty where they state none."""
    if node.op_type == "Range":
        return _find_range(node, constants)
    if node.op_type in SHAPE_ATTRIBUTES:
        for attribute in node.attribute:
            if attribute.name == "shape":
                return list(attribute.ints)
    place = SHAPE_INPUTS.get(node.op_type)
    if place is None or place >= len(node.input):
        return []
    stated = constants.get(node.input[place])
    if stated is None or stated.dtype.kind not in "iu":
        return []
    return [int(length) for length in stated.reshape(-1)]


def _find_range(node: NodeProto, constants: Constants) -> list[int]:
    """How many values a Range of constants has: ceil((limit - start) / delta)."""
    ends = [constants.get(name) for name in node.input]
    numbers = [end.reshape(-1)[0] for end in ends if end is not None and end.size == 1]
    if len(numbers) != 3:
        return []
    start, limit, delta = (float(number) for number in numbers)
    if not delta or not all(map(math.isfinite, (start, limit, delta))):
        return []  # onnxruntime refuses it
    count = (limit - start) / delta
    return [math.ceil(count)] if 0 < count < math.inf else []


def _count_steps(node: NodeProto, constants: Constants) -> int:
    """How often a loop counts that nothing but its trip count ends; 0 for any other node.

    Exporters write "while" as a loop of 2^63-1 steps whose condition ends it.
    """
    if node.op_type != "Loop" or not node.input:
        return 0
    trips = constants.get(node.input[0])
    body = next(list_subgraphs(node), None)
    if trips is None or trips.size != 1 or body is None or not _is_always_true(body, constants):
        return 0
    return max(0, int(trips.reshape(-1)[0]))


def _is_always_true(body: GraphProto, constants: Constants) -> bool:
    """Whether the loop's body hands on its condition as it was, or a constant."""
    if len(body.input) < 2 or not body.output:
        return False
    inside = {**constants, **_find_constants(body.node, body.initializer)}
    sources = {}
    for node in body.node:
        if node.op_type == "Identity" and len(node.input) == 1 and len(node.output) == 1:
            sources[node.output[0]] = node.input[0]
    name = body.output[0].name
    for _ in range(len(sources)):
        name = sources.get(name, name)
    if name == body.input[1].name:
        return True
    value = inside.get(name)
    return value is not None and bool(value.all())


def _find_constants(
    nodes: Iterable[NodeProto], initializers: Iterable[TensorProto]
) -> dict[str, np.ndarray]:
    """Small tensors of numbers by name: initializers, and outputs of Constant."""
    tensors = [(tensor.name, tensor) for tensor in initializers]
    found: dict[str, np.ndarray] = {}
    for node in nodes:
        if node.op_type != "Constant" or not node.output:
            continue
        for attribute in node.attribute:
            if attribute.name == "value":
                tensors.append((node.output[0], attribute.t))
            elif attribute.name == "value_int":
                found[node.output[0]] = np.array(attribute.i)
            elif attribute.name == "value_ints":
                found[node.output[0]] = np.array(attribute.ints, np.int64)
            elif attribute.name == "value_float":
                found[node.output[0]] = np.array(attribute.f)
    for name, tensor in tensors:
        is_here = tensor.data_location != TensorProto.EXTERNAL
        if is_here and math.prod(tensor.dims) <= MOST_CONSTANT and _holds_numbers(tensor):
            found[name] = numpy_helper.to_array(tensor)
    return found


def _holds_numbers(tensor: Any) -> bool:
    return tensor.data_type in (
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.INT16,
        TensorProto.BOOL,
    )


def _name(node: NodeProto) -> str:
    shown = node.name or ", ".join(node.output)
    return f"node '{shown[:80]}' ({node.op_type})"
