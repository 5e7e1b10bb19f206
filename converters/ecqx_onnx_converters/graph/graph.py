"""A float ONNX graph whose structure and weights are kept apart, without the exporter's metadata.

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

# Bytes; tensors of any number of dimensions and any type of this size or more are kept outside the
# proto.
LARGE = 1 << 16
NATIVE = {  # types that numpy holds without help
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
NARROW = {  # types of weights that some quantiser has already turned into integers
    TensorProto.INT8, TensorProto.INT4, TensorProto.INT2,
    TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT2,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FloatGraph:
    """A float ONNX model with its weights taken out.

    Attributes:
        proto: The structure; initializers named in `weights` carry dims and type but no data. They
            all belong to the main graph.
        weights: Values by initializer name: every float32 tensor of two or more dimensions, and
            whatever else is large.
    """

    proto: ModelProto
    weights: Mapping[str, np.ndarray]

    @classmethod
    def from_model(cls, model: ModelProto) -> FloatGraph:
        """Takes the weights out of a copy of a model.

        Weights in Constant nodes and in subgraphs become initializers of the main graph.

        Args:
            model: With its data inside; it is not changed.

        Returns:
            The same model, structure and weights apart.

        Raises:
            FileError: For data that does not fit its declared dims and type.
        """
        proto = ModelProto()
        proto.CopyFrom(model)
        return cls._take_apart(proto, None)

    @classmethod
    def load(cls, path: Path | str) -> FloatGraph:
        """Reads a model of any size, from a file and the external data beside it, if any.

        Args:
            path: The .onnx file.

        Returns:
            The model, structure and weights apart.

        Raises:
            FileError: If it cannot be read or is damaged.
        """
        return cls._take_apart(read_proto(path), Path(path))

    @classmethod
    def _take_apart(cls, proto: ModelProto, path: Path | None) -> FloatGraph:
        strip_metadata(proto)
        _hoist(proto.graph)
        weights = {}
        for tensor in proto.graph.initializer:
            if path is not None and tensor.data_location == TensorProto.EXTERNAL:
                if tensor.data_type in NATIVE:
                    weights[tensor.name] = read_external_values(tensor, path)
                    clear_data(tensor)
                else:
                    content = read_external_bytes(tensor, path)
                    clear_data(tensor)
                    tensor.raw_data = content
            elif _is_weight(tensor):
                weights[tensor.name] = read_values(tensor)
                clear_data(tensor)
        return cls(proto, weights)

    def to_model(self) -> ModelProto:
        """Puts the data back in place, for models that fit one protobuf (2 GB).

        Returns:
            A complete model; this one is not changed.
        """
        model = ModelProto()
        model.CopyFrom(self.proto)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.raw_data = to_little_endian(self.weights[tensor.name])
        return model

    @property
    def opset(self) -> int:
        """The version of the standard operator set that the model imports."""
        return find_opset(self.proto)


def find_opset(model: ModelProto) -> int:
    """Finds the version of the standard operator set that a model imports.

    Args:
        model: Any ONNX model.

    Returns:
        The opset, such as 17.

    Raises:
        FileError: If it imports none.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise FileError(
        "the ONNX model imports no standard operator set; it is not a model that onnxruntime could "
        "run"
    )


def list_subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Lists the graphs that a node's attributes hold.

    Args:
        node: Such as an If (its branches), a Loop or a Scan (its body).

    Returns:
        The graphs, without those nested in them.
    """
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def list_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Lists a graph and every graph nested in it.

    Args:
        graph: The outermost.

    Returns:
        All of them, outermost first.
    """
    yield graph
    for node in graph.node:
        for inner in list_subgraphs(node):
            yield from list_graphs(inner)


def list_value_names(graph: GraphProto) -> set[str]:
    """Collects every name that a value has anywhere in a graph and its subgraphs.

    Args:
        graph: The outermost.

    Returns:
        The names, of values that are read and of values that are made.
    """
    names: set[str] = set()
    for scope in list_graphs(graph):
        names.update(value.name for value in (*scope.input, *scope.output, *scope.initializer))
        names.update(sparse.values.name for sparse in scope.sparse_initializer)
        for node in scope.node:
            names.update(node.input)
            names.update(node.output)
    return names


def read_values(tensor: TensorProto) -> np.ndarray:
    """Reads the values of an initializer or Constant.

    Nothing is allocated on the declaration's word.

    Args:
        tensor: With its data inside.

    Returns:
        A contiguous array of the declared shape and type.

    Raises:
        FileError: If the data is external or does not fill the declared dims.
    """
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
    """Removes a tensor's data, in place; name, dims and type stay.

    Args:
        tensor: Whose data is inside or external.
    """
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
    """Removes documentation, stack traces, paths and node names, in place.

    Args:
        model: Metadata that a user put on the model itself stays.
    """
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
            continue
        if field.message_type is None:
            continue
        children = value if hasattr(value, "__len__") else [value]  # a repeated field, or one
        for child in children:
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
        # A graph's own output must be made inside it.
        outputs = {value.name for value in scope.output}
        moved = []

        # 1. Take the initializers of a subgraph, from the last on, so that positions stay right.
        places = range(0 if scope is main else len(scope.initializer))
        for position in reversed(places):
            tensor = scope.initializer[position]
            if _is_hoisted(tensor) and tensor.name not in outputs:
                moved.append(_copy(tensor, tensor.name))
                del scope.initializer[position]

        # 2. Take what Constant nodes hold.
        for position in reversed(range(len(scope.node))):
            value = find_constant(scope.node[position])
            if value is None or not _is_hoisted(value):
                continue
            name = scope.node[position].output[0]
            if name not in outputs:
                moved.append(_copy(value, name))
                del scope.node[position]

        # 3. Put them into the main graph, under another name where the name means something else.
        for tensor in reversed(moved):
            if any(defines_value(graph, tensor.name) for graph in list_graphs(main)):
                old = tensor.name
                tensor.name = make_fresh_name(old, taken)
                rename_values(scope, old, tensor.name)
            main.initializer.append(tensor)


def _copy(tensor: TensorProto, name: str) -> TensorProto:
    copied = TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied


def find_constant(node: NodeProto) -> TensorProto | None:
    """Finds the tensor that a Constant node holds.

    Args:
        node: Of any operator.

    Returns:
        The tensor; None for every other node, and for Constants that hold plain numbers.
    """
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def defines_value(graph: GraphProto, name: str) -> bool:
    """Tells whether a graph itself defines a value, as input, initializer or output of a node.

    Args:
        graph: Looked at without the graphs inside it.
        name: Of the value.

    Returns:
        True if the name has a meaning of its own there.
    """
    if any(value.name == name for value in (*graph.input, *graph.initializer)):
        return True
    return any(name in node.output for node in graph.node)


def make_fresh_name(wish: str, taken: set[str]) -> str:
    """Makes a name that no value has.

    Args:
        wish: Taken as it is where it is free.
        taken: Names in use; the result is added.

    Returns:
        `wish`, or `wish_1`, `wish_2` and so on.
    """
    name = wish
    number = 0
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name)
    return name


def rename_values(graph: GraphProto, old: str, new: str) -> None:
    """Renames what nodes read, in place, here and in subgraphs that don't define `old` anew.

    Args:
        graph: Whose nodes read the value.
        old: The name that they read.
        new: The name that they read from then on.
    """
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
        for inner in list_subgraphs(node):
            if not defines_value(inner, old):
                rename_values(inner, old, new)
