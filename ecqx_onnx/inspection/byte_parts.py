"""Count what each byte of an ONNX file is for."""

from __future__ import annotations

from collections import Counter

import onnx
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.storage import DOMAIN
from onnx import TensorProto

from ecqx_onnx.inputs.onnx_file import OnnxFile, count_stored_bytes

NARROW = {
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.INT2,
    TensorProto.UINT2,
}
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def list_scale_names(proto: onnx.ModelProto) -> set[str]:
    """Find the steps, codebooks and factors: what dequantizing nodes read beside the levels.

    Args:
        proto: of ours or of someone else.

    Returns:
        Names of initializers and other values.
    """
    names: set[str] = set()
    for graph in list_graphs(proto.graph):
        for node in graph.node:
            if node.domain == DOMAIN or node.op_type == "DequantizeLinear":
                names.update(node.input[1:])
    return names


def count_byte_parts(file: OnnxFile, scales: set[str]) -> dict[str, int]:
    """Count a file's bytes by purpose.

    Args:
        file: the model; the files of its external data count, too.
        scales: what `list_scale_names` gives.

    Returns:
        Bytes by purpose, which sum to the file's size. What no other purpose takes is the graph's
        structure (nodes, dims, tags; padding of external data).
    """
    parts: Counter[str] = Counter()
    for graph in list_graphs(file.proto.graph):
        for tensor in graph.initializer:
            parts[_name_purpose(tensor, scales)] += _count_data_bytes(tensor)
            parts["names"] += len(tensor.name.encode())
        for sparse in graph.sparse_initializer:
            parts["quantised integers"] += _count_data_bytes(sparse.values) + _count_data_bytes(
                sparse.indices
            )
            parts["names"] += len(sparse.values.name.encode())
        for value in (*graph.input, *graph.output, *graph.value_info):
            parts["names"] += len(value.name.encode())
        for node in graph.node:
            parts["names"] += sum(
                len(name.encode()) for name in (node.name, *node.input, *node.output)
            )
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    parts[_name_purpose(attribute.t, scales)] += _count_data_bytes(attribute.t)
    parts["functions"] = sum(function.ByteSize() for function in file.proto.functions)
    parts["metadata"] = sum(entry.ByteSize() for entry in file.proto.metadata_props)
    parts["graph structure"] = file.size - sum(parts.values())
    return dict(parts)


def _name_purpose(tensor: TensorProto, scales: set[str]) -> str:
    if tensor.data_type in NARROW:
        return "quantised integers"
    if tensor.data_type in FLOATS:
        return "steps and codebooks" if tensor.name in scales else "float parameters"
    return "other constants"


def _count_data_bytes(tensor: TensorProto) -> int:
    """Bytes of the values alone, in the file or beside it."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return count_stored_bytes(tensor)
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    bare = TensorProto()
    bare.CopyFrom(tensor)
    for name in (
        "float_data",
        "double_data",
        "int32_data",
        "int64_data",
        "uint64_data",
        "string_data",
    ):
        bare.ClearField(name)
    return tensor.ByteSize() - bare.ByteSize()
