"""List the weights of someone else's model that packing does not even look at, and say why."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.graph.graph import list_graphs, list_subgraphs
from ecqx_onnx_converters.planning.plan import Kept
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto

SMALLEST = 64  # entries; tables of fewer hold shapes and the like, no weights
PACKABLE = "float32 and integers of at most 8 bits can be packed"


def list_left_alone(graph: FloatGraph, told: Collection[str]) -> tuple[Kept, ...]:
    """List tensors of two or more dimensions that nothing else has said a word about.

    Args:
        graph: The model.
        told: Names of those that are packed, or stay for a reason that is known.

    Returns:
        Each of SMALLEST entries or more, with its shape and the reason, in the graph's order.
    """
    main = graph.proto.graph
    found: dict[str, Kept] = {}
    for scope in list_graphs(main):
        outputs = {value.name for value in scope.output}
        for name, tensor in _list_tensors(scope):
            if not _may_be_weight(tensor.dims) or name in told:
                continue
            reason = _explain_type(tensor)
            if not reason and name in outputs:
                reason = "it is an output of its graph"
            elif not reason:
                reason = "nothing that multiplies or dequantizes it is known"
            found.setdefault(name, Kept(name, tuple(tensor.dims), reason))
        for sparse in scope.sparse_initializer:
            name = sparse.values.name
            if _may_be_weight(sparse.dims) and name not in told:
                reason = "it is stored as a sparse tensor already"
                found.setdefault(name, Kept(name, tuple(sparse.dims), reason))
    for function in graph.proto.functions:
        for name, tensor in _list_constants(function):
            if _may_be_weight(tensor.dims):
                name = f"{function.domain}.{function.name}.{name}"
                reason = "it lies in a function, where packing does not look"
                found.setdefault(name, Kept(name, tuple(tensor.dims), reason))
    return tuple(found.values())


def _may_be_weight(dims: Sequence[int]) -> bool:
    """Whether a tensor of this shape is worth a word."""
    return len(dims) >= 2 and math.prod(dims) >= SMALLEST


def _explain_type(tensor: TensorProto) -> str:
    """Why a tensor of this type can't be packed; "" for a type that can."""
    kinds = TensorProto.DataType
    if tensor.data_type == TensorProto.FLOAT:
        return ""
    name = kinds.Name(tensor.data_type) if tensor.data_type in kinds.values() else "unknown"
    if name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2"):
        return ""
    return f"it is {name}; {PACKABLE}"


def _list_tensors(scope: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Initializers and Constants of a graph, without those of graphs inside it."""
    for tensor in scope.initializer:
        yield tensor.name, tensor
    for node in scope.node:
        yield from _read_constant(node)


def _list_constants(function: FunctionProto) -> Iterator[tuple[str, TensorProto]]:
    """Constants of a function and of all graphs inside it."""
    for node in function.node:
        yield from _read_constant(node)
        for inner in list_subgraphs(node):
            for scope in list_graphs(inner):
                yield from _list_tensors(scope)


def _read_constant(node: NodeProto) -> Iterator[tuple[str, TensorProto]]:
    """The tensor of a Constant, under the name of its output."""
    if node.op_type != "Constant" or not node.output:
        return
    for attribute in node.attribute:
        if attribute.name == "value":
            yield node.output[0], attribute.t
