"""A model whose graph decodes its weights -> its float twin: the same graph, every constant computed by the runtime itself.

The twin is what a session holds after folding, as a plain float model. It serves twice: its initializers are what the
runtime really decoded, to be compared with PyTorch's weights, and its latency is the yardstick for the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ecqx_onnx.errors import CheckFailed
from ecqx_onnx.validation.sessions import open_session, run

# Operators that give another result each time: never constant, whatever their inputs.
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
SERIALISED_LIMIT = 2**31 - 2**20  # protobuf's 2 GB, less the graph around the weights


@dataclass(frozen=True, eq=False)
class FloatTwin:
    """proto: no node in it computes on constants alone. weights: its float32 initializers by name."""

    proto: ModelProto
    weights: Mapping[str, np.ndarray]

    def serialize(self) -> bytes | None:
        """None if it is above protobuf's 2 GB."""
        if self.proto.ByteSize() > SERIALISED_LIMIT:
            return None
        return self.proto.SerializeToString()


def float_twin(model: ModelProto) -> FloatTwin:
    """model: with its data loaded; not changed. CheckFailed if the runtime cannot decode its constants."""
    proto = ModelProto()
    proto.CopyFrom(model)
    _fold(proto.graph, proto, {})
    del proto.metadata_props[:]
    weights: dict[str, np.ndarray] = {}
    _collect(proto.graph, weights)
    return FloatTwin(proto, weights)


def _fold(graph: GraphProto, model: ModelProto, outer: Mapping[str, TensorProto]) -> None:
    """Replace the nodes of `graph` that depend on constants only by initializers with their results; then its inner graphs."""
    inputs = {value.name for value in graph.input}  # an initializer that is an input too may be overridden: not constant
    constants = dict(outer)
    constants.update({tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs})
    for sparse in graph.sparse_initializer:
        constants[sparse.values.name] = _dense(sparse)
    constant, rest = _split(graph, set(constants))
    frontier = _read_by(rest, graph) & {name for node in constant for name in node.output}
    computed = _evaluate(constant, sorted(frontier), constants, model)
    del graph.node[:]
    graph.node.extend(rest)
    constants.update(computed)
    used = _read_by(rest, graph) | inputs
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [constants[sparse.values.name] for sparse in graph.sparse_initializer if sparse.values.name in used]
    kept += list(computed.values())
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    del graph.sparse_initializer[:]
    graph.initializer.extend(copies)
    for node in graph.node:
        for inner in _inner_graphs(node):
            _fold(inner, model, constants)


def _split(graph: GraphProto, constants: set[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    constant, rest, known = [], [], set(constants)
    for node in graph.node:
        fixed = all(not name or name in known for name in node.input) and node.op_type not in RANDOM
        if fixed and not _inner_graphs(node):
            constant.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    return constant, rest


def _evaluate(
    nodes: list[NodeProto], names: list[str], constants: Mapping[str, TensorProto], model: ModelProto
) -> dict[str, TensorProto]:
    """What the runtime computes for `names`, without optimisations: each operator exactly as written."""
    if not names:
        return {}
    needed = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in names],
        [constants[name] for name in sorted(needed & constants.keys())],
    )
    part = onnx.helper.make_model(graph, functions=model.functions, opset_imports=model.opset_import, ir_version=model.ir_version)
    if part.ByteSize() > SERIALISED_LIMIT:
        raise CheckFailed("its weights take more than 2 GB at once, which validation cannot decode in one piece")
    outputs = run(open_session(part.SerializeToString(), level="disabled"), ())
    return {name: numpy_helper.from_array(array, name) for name, array in zip(names, outputs, strict=True)}


def _read_by(nodes: list[NodeProto], graph: GraphProto) -> set[str]:
    """Names that the nodes, the graphs inside them, or the graph's outputs read."""
    names = {value.name for value in graph.output}
    for node in nodes:
        names.update(node.input)
        for inner in _inner_graphs(node):
            names |= _read_by(list(inner.node), inner)
    return names


def _inner_graphs(node: NodeProto) -> list[GraphProto]:
    single = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return single + [graph for attribute in node.attribute for graph in attribute.graphs]


def _dense(sparse: onnx.SparseTensorProto) -> TensorProto:
    values = numpy_helper.to_array(sparse.values)
    dense = np.zeros(int(np.prod(sparse.dims)), values.dtype)
    dense[numpy_helper.to_array(sparse.indices)] = values
    return numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), sparse.values.name)


def _collect(graph: GraphProto, weights: dict[str, np.ndarray]) -> None:
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            weights[tensor.name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        for inner in _inner_graphs(node):
            _collect(inner, weights)
