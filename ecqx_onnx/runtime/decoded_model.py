"""The decoded float model: a model's graph with every constant computed by the runtime itself.

It is what a session holds after folding, as a plain float model. It serves twice: its initializers
are what the runtime really decoded, to be compared with PyTorch's weights, and its latency is the
baseline for the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from ecqx_onnx_converters.graph.graph import list_subgraphs
from ecqx_onnx_converters.graph.uses import find_makers, list_initializers
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ecqx_onnx.errors import CheckFailed
from ecqx_onnx.inputs.onnx_file import count_stored_bytes
from ecqx_onnx.runtime.float_activations import remove_quantization
from ecqx_onnx.runtime.sessions import open_session, run

# Operators that give another result each time: never constant, whatever their inputs.
RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}
SERIALIZED_LIMIT = 2**31 - 2**24  # bytes of tensors: protobuf's 2 GB, less the graph around them
PIECE = 2**28  # bytes of constants that are decoded in one session


@dataclass(frozen=True, eq=False)
class DecodedModel:
    """A model whose constants are decoded.

    Attributes:
        proto: no node in it computes on constants alone.
        weights: its float32 initializers by name.
        integers: those of int8.
    """

    proto: ModelProto
    weights: Mapping[str, np.ndarray]
    integers: Mapping[str, np.ndarray]

    def serialize(self) -> bytes | None:
        """Write the model with its activations on floats, too.

        Returns:
            The bytes of an ONNX file; None above protobuf's 2 GB.
        """
        tensors = list_initializers(self.proto.graph)
        if sum(map(count_stored_bytes, tensors)) > SERIALIZED_LIMIT:
            return None
        return remove_quantization(self.proto).SerializeToString()


def decode_model(model: ModelProto) -> DecodedModel:
    """Let the runtime decode a model's constants.

    Args:
        model: with its data loaded; not changed.

    Returns:
        The decoded model.

    Raises:
        CheckFailed: the runtime cannot decode them.
    """
    proto = ModelProto()
    proto.CopyFrom(model)
    _fold_constants(proto.graph, proto, {})
    del proto.metadata_props[:]
    floats: dict[str, np.ndarray] = {}
    integers: dict[str, np.ndarray] = {}
    for tensor in list_initializers(proto.graph):
        if tensor.data_type == TensorProto.FLOAT:
            floats[tensor.name] = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.INT8:
            integers[tensor.name] = numpy_helper.to_array(tensor)
    return DecodedModel(proto, floats, integers)


def _fold_constants(graph: GraphProto, model: ModelProto, outer: Mapping[str, TensorProto]) -> None:
    """Replace the nodes that depend on constants only by initializers with their results.

    Then those of the inner graphs, which see the outer constants.
    """
    # An initializer that is an input too may be overridden: it is not constant.
    inputs = {value.name for value in graph.input}
    constants = dict(outer)
    for tensor in graph.initializer:
        if tensor.name not in inputs:
            constants[tensor.name] = tensor
    for sparse in graph.sparse_initializer:
        constants[sparse.values.name] = _make_dense(sparse)
    constant, rest = _split_graph(graph, set(constants))
    frontier = _find_readers(rest, graph) & find_makers(constant).keys()
    computed = _evaluate(constant, sorted(frontier), constants, model)
    del graph.node[:]
    graph.node.extend(rest)
    constants.update(computed)
    used = _find_readers(rest, graph) | inputs
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [
        constants[sparse.values.name]
        for sparse in graph.sparse_initializer
        if sparse.values.name in used
    ]
    kept += list(computed.values())
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    del graph.sparse_initializer[:]
    graph.initializer.extend(copies)
    for node in graph.node:
        for inner in list_subgraphs(node):
            _fold_constants(inner, model, constants)


def _split_graph(graph: GraphProto, constants: set[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    constant, rest, known = [], [], set(constants)
    for node in graph.node:
        fixed = all(not name or name in known for name in node.input) and node.op_type not in RANDOM
        if fixed and not any(_reads_outside(inner) for inner in list_subgraphs(node)):
            constant.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    return constant, rest


def _reads_outside(graph: GraphProto) -> bool:
    made = {value.name for value in (*graph.input, *graph.initializer)}
    made.update(find_makers(graph.node))
    return not _find_readers(list(graph.node), graph) - {""} <= made


def _evaluate(
    nodes: list[NodeProto],
    names: list[str],
    constants: Mapping[str, TensorProto],
    model: ModelProto,
) -> dict[str, TensorProto]:
    """What the runtime computes for `names`, a piece at a time.

    It runs without optimizations, each operator exactly as written.
    """
    makers = find_makers(nodes)
    results: dict[str, TensorProto] = {}
    piece: list[str] = []
    read: set[str] = set()
    for name in names:
        piece.append(name)
        read |= _find_ancestors(name, makers)
        if (
            name == names[-1]
            or sum(count_stored_bytes(constants[n]) for n in read & constants.keys()) > PIECE
        ):
            used = [node for node in nodes if not read.isdisjoint(node.output)]
            results.update(
                _run_piece(
                    used, piece, [constants[n] for n in sorted(read & constants.keys())], model
                )
            )
            piece, read = [], set()
    return results


def _find_ancestors(name: str, makers: Mapping[str, NodeProto]) -> set[str]:
    """The name and all that it is computed from."""
    found, queue = set(), [name]
    while queue:
        current = queue.pop()
        if current and current not in found:
            found.add(current)
            queue.extend(makers[current].input if current in makers else ())
    return found


def _run_piece(
    nodes: list[NodeProto], names: list[str], constants: list[TensorProto], model: ModelProto
) -> dict[str, TensorProto]:
    if sum(map(count_stored_bytes, constants)) > SERIALIZED_LIMIT:
        raise CheckFailed(
            f"the constants behind '{names[-1]}' take more than 2 GB, more than a session can be "
            "given at once"
        )
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    graph = onnx.helper.make_graph(nodes, "constants", [], outputs, constants)
    part = onnx.helper.make_model(
        graph,
        functions=model.functions,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    results = run(open_session(part.SerializeToString(), level="disabled"), ())
    return {
        name: numpy_helper.from_array(array, name)
        for name, array in zip(names, results, strict=True)
    }


def _find_readers(nodes: list[NodeProto], graph: GraphProto) -> set[str]:
    """Names that the nodes, the graphs inside them, or the graph's outputs read."""
    names = {value.name for value in graph.output}
    for node in nodes:
        names.update(node.input)
        for inner in list_subgraphs(node):
            names |= _find_readers(list(inner.node), inner)
    return names


def _make_dense(sparse: onnx.SparseTensorProto) -> TensorProto:
    values = numpy_helper.to_array(sparse.values)
    dense = np.zeros(int(np.prod(sparse.dims)), values.dtype)
    dense[numpy_helper.to_array(sparse.indices)] = values
    return numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), sparse.values.name)
