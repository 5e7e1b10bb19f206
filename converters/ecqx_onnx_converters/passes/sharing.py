"""Store tensors of equal bytes once, and leave out those that nothing reads.

Exporters write a tensor once for each branch or each use of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from onnx import ModelProto, TensorProto

from ecqx_onnx_converters.graph.graph import FloatGraph, list_graphs, read_values, rename_values
from ecqx_onnx_converters.graph.uses import find_uses

LEAST = 256  # bytes of a tensor; smaller ones are hardly worth a change


@dataclass(frozen=True, eq=False)
class Shared:
    """A graph whose tensors are stored once.

    Attributes:
        graph: reads the same values.
        equal: how many tensors were another one's equal.
        unread: how many tensors nothing has read.
        nbytes: of all these.
    """

    graph: FloatGraph
    equal: int
    unread: int
    nbytes: int


def share_equal_tensors(graph: FloatGraph) -> Shared:
    """Let all that read tensors of equal type, shape and bytes read the first of them.

    Args:
        graph: it isn't changed.

    Returns:
        The graph without the others, and without large tensors that nothing reads. Those that a
        caller can replace, and that the graph gives out, stay.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    main = proto.graph
    stay = {annotation.tensor_name for annotation in main.quantization_annotation}
    for scope in list_graphs(main):
        stay.update(value.name for value in scope.output)
    if proto.ir_version >= 4:  # before, every initializer was listed as an input
        stay.update(value.name for value in main.input)
    uses = find_uses(main)
    first = dict[tuple[int, tuple[int, ...], bytes], str]()
    gone = dict[str, int]()
    equal = 0
    for tensor in main.initializer:
        values = _read(tensor, graph)
        if tensor.name in stay or values is None or values.nbytes < LEAST:
            continue
        key = (tensor.data_type, tuple(tensor.dims), _hash(values))
        if tensor.name not in uses:
            gone[tensor.name] = values.nbytes
        elif key in first:
            rename_values(main, tensor.name, first[key])
            gone[tensor.name] = values.nbytes
            equal += 1
        else:
            first[key] = tensor.name
    for listed in (main.initializer, main.input):
        for index in reversed(range(len(listed))):
            if listed[index].name in gone:
                del listed[index]
    left = {name: values for name, values in graph.weights.items() if name not in gone}
    shared = FloatGraph(proto, left)
    return Shared(shared, equal, len(gone) - equal, sum(gone.values()))


def _read(tensor: TensorProto, graph: FloatGraph) -> np.ndarray | None:
    """A tensor's values; None for strings."""
    if tensor.data_type == TensorProto.STRING:
        return None
    if tensor.name in graph.weights:
        return graph.weights[tensor.name]
    return read_values(tensor)


def _hash(values: np.ndarray) -> bytes:
    """Of the bytes."""
    return sha256(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data).digest()
