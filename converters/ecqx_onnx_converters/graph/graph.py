"""ModelProto <-> FloatGraph: structure and weight data apart, the exporter's metadata gone.

The data of large models never meets a serializer: `FloatGraph.proto` declares each weight (name,
dims, type) and `FloatGraph.weights` holds its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.files import (
    read_external_bytes,
    read_external_values,
    read_proto,
    to_little_endian,
)

LARGE = (
    1 << 16
    # bytes; tensors of any number of dimensions and type from this size on are kept outside the proto
)
NATIVE = {  # types that numpy holds without help
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
NARROW = {  # types of weights that some quantiser has already turned into integers
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FloatGraph:
    """A float ONNX model with its weights taken out.

    proto: initializers named in `weights` carry dims and type but no data. They all belong to the
    main graph.
    weights: initializer name -> values; every float32 tensor of two or more dimensions, and
    whatever else is large.
    """

    proto: ModelProto
    weights: Mapping[str, np.ndarray]

    @classmethod
    def from_model(cls, model: ModelProto) -> FloatGraph:
        """Takes a copy. Weights in Constant nodes and in subgraphs become initializers of the main
        graph. FileError for data that doesn't fit its declared dims and type."""
        proto = ModelProto()
        proto.CopyFrom(model)
        return cls._take_apart(proto, None)

    @classmethod
    def load(cls, path: Path | str) -> FloatGraph:
        """The same, from a file and the external data beside it, if any; models of any size."""
        return cls._take_apart(read_proto(path), Path(path).parent)

    @classmethod
    def _take_apart(cls, proto: ModelProto, folder: Path | None) -> FloatGraph:
        strip_metadata(proto)
        _hoist(proto.graph)
        weights = {}
        for tensor in proto.graph.initializer:
            if folder is not None and tensor.data_location == TensorProto.EXTERNAL:
                if tensor.data_type in NATIVE:
                    weights[tensor.name] = read_external_values(tensor, folder)
                    clear_data(tensor)
                else:
                    content = read_external_bytes(tensor, folder)
                    clear_data(tensor)
                    tensor.raw_data = content
            elif _is_weight(tensor):
                weights[tensor.name] = read_values(tensor)
                clear_data(tensor)
        return cls(proto, weights)

    def to_model(self) -> ModelProto:
        """The model with its data back in place; for models that fit one protobuf (2 GB)."""
        model = ModelProto()
        model.CopyFrom(self.proto)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.raw_data = to_little_endian(self.weights[tensor.name])
        return model

    @property
    def opset(self) -> int:
        return find_opset(self.proto)


def find_opset(model: ModelProto) -> int:
    """Version of the standard operator set that the model imports; FileError without one."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise FileError(
        "the ONNX model imports no standard operator set; it is not a model that onnxruntime could "
        "run"
    )


def list_subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that the node's attributes hold (branches of an If, bodies of a Loop or Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def list_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph nested in it, outermost first."""
    yield graph
    for node in graph.node:
        for inner in list_subgraphs(node):
            yield from list_graphs(inner)


def list_value_names(graph: GraphProto) -> set[str]:
    """Every name that a value has anywhere in the graph and its subgraphs."""
    names: set[str] = set()
    for scope in list_graphs(graph):
        names.update(value.name for value in (*scope.input, *scope.output, *scope.initializer))
        names.update(sparse.values.name for sparse in scope.sparse_initializer)
        for node in scope.node:
            names.update(node.input)
            names.update(node.output)
    return names


def read_values(tensor: TensorProto) -> np.ndarray:
    """The values of an initializer or Constant; FileError when data and declaration disagree;
    nothing is allocated on the declaration's word."""
    if any(length < 0 for length in tensor.dims):
        raise FileError(
            f"tensor '{tensor.name}' declares dims {list(tensor.dims)}; the ONNX file is damaged, "
            "export it again"
        )
    if tensor.data_location == TensorProto.EXTERNAL:
        raise FileError(
            f"the data of tensor '{tensor.name}' lies in another file; load the model by its path, "
            "not as a single message"
        )
    try:
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(tuple(tensor.dims))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise FileError(
            f"tensor '{tensor.name}' declares dims {list(tensor.dims)}, which its data doesn't "
            f"fill ({error});"
            " the ONNX file is damaged, export it again"
        ) from error


def clear_data(tensor: TensorProto) -> None:
    for field in (
        "raw_data",
        "float_data",
        "double_data",
        "int32_data",
        "int64_data",
        "uint64_data",
        "external_data",
        "data_location",
    ):
        tensor.ClearField(field)


def strip_metadata(model: ModelProto) -> None:
    """Removes documentation, stack traces, paths and node names, in place; metadata that a user put
    on the model itself stays."""
    kept = [
        (entry.key, entry.value)
        for entry in model.metadata_props
        if not entry.key.startswith(("pkg.", "namespace"))
    ]
    _strip(model)
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)


def _strip(message: Message) -> None:
    """Clears doc_string, metadata_props and node names here and in every message below, tensors'
    data excepted."""
    if isinstance(message, TensorProto):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")
        return
    if isinstance(message, NodeProto):
        message.ClearField("name")
    for field, value in list(message.ListFields()):
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in value if hasattr(value, "__len__") else [value]:
                _strip(child)


def _is_weight(tensor: TensorProto) -> bool:
    floats = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2
    return tensor.data_type in NATIVE and (
        floats or tensor.ByteSize() >= LARGE or tensor.data_location == TensorProto.EXTERNAL
    )


def _is_hoisted(tensor: TensorProto) -> bool:
    return _is_weight(tensor) or (tensor.data_type in NARROW and len(tensor.dims) >= 2)


def _hoist(main: GraphProto) -> None:
    """Moves weights out of Constant nodes and subgraphs into the main graph's initializers, in
    place.

    A subgraph sees the values of the graph around it, so its consumers need no change except where
    a name is already taken.
    """
    taken = list_value_names(main)
    for scope in list(list_graphs(main)):
        outputs = {
            value.name for value in scope.output
        }  # a graph's own output must be made inside it
        moved = []
        for position in reversed(range(len(scope.initializer) if scope is not main else 0)):
            if (
                _is_hoisted(scope.initializer[position])
                and scope.initializer[position].name not in outputs
            ):
                moved.append(_copy(scope.initializer[position], scope.initializer[position].name))
                del scope.initializer[position]
        for position in reversed(range(len(scope.node))):
            value, name = find_constant(scope.node[position]), scope.node[position].output[:1]
            if value is not None and _is_hoisted(value) and name[0] not in outputs:
                moved.append(_copy(value, name[0]))
                del scope.node[position]
        for tensor in reversed(moved):
            if any(defines_function(graph, tensor.name) for graph in list_graphs(main)):
                old, tensor.name = tensor.name, make_fresh_name(tensor.name, taken)
                rename_values(scope, old, tensor.name)
            main.initializer.append(tensor)


def _copy(tensor: TensorProto, name: str) -> TensorProto:
    copied = TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied


def find_constant(node: NodeProto) -> TensorProto | None:
    """The tensor that a Constant node holds; None for every other node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def defines_function(graph: GraphProto, name: str) -> bool:
    made = (output for node in graph.node for output in node.output)
    return name in made or any(value.name == name for value in (*graph.input, *graph.initializer))


def make_fresh_name(wish: str, taken: set[str]) -> str:
    """`wish`, or `wish_1`, `wish_2` … when it is taken; the result counts as taken from then on."""
    name, number = wish, 0
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name)
    return name


def rename_values(graph: GraphProto, old: str, new: str) -> None:
    """Renames what nodes read, here and in subgraphs that don't define `old` anew."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
        for inner in list_subgraphs(node):
            if not defines_function(inner, old):
                rename_values(inner, old, new)
