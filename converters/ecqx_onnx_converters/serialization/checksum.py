"""Computes one CRC-32 over all that a runtime reads of a written model, and over our metadata.

That is graph, functions and every tensor. Packed levels have a checksum each, of what they are once
decoded; this one covers the rest too: biases, steps, shapes, attributes, names, labels. It lies
behind the deflated metadata (metadata.py), so that it costs five bytes, and versions that don't
know it read the file as before. Documentation, types of inner values, and the tool's name may
change without it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from onnx import GraphProto, ModelProto, TensorProto

Content = Callable[[TensorProto], bytes | None]


def compute_checksum(model: ModelProto, content: Content, *, start: int = 0) -> int:
    """Compute the checksum, the same whether tensors lie inside the model or in a file beside it.

    Args:
        model: The model; it isn't changed.
        content: Gives the raw data (row-major, little-endian) of a tensor that lies elsewhere; None
            for one that holds its own.
        start: A CRC-32 to go on from, say of the metadata.

    Returns:
        CRC-32 in [0, 2^32).
    """
    graph = model.graph
    # 1. Graph and functions without tensors, which may be larger than one protobuf holds.
    shell = ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
        graph=GraphProto(
            node=graph.node,
            input=graph.input,
            output=graph.output,
            sparse_initializer=graph.sparse_initializer,
        ),
    )
    crc = zlib.crc32(shell.SerializeToString(deterministic=True), start)
    # 2. Each tensor: what it is declared as, then its data.
    for tensor in graph.initializer:
        declared = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        crc = zlib.crc32(declared.SerializeToString(deterministic=True), crc)
        crc = zlib.crc32(_read_data(tensor, content), crc)
    return crc


def _read_data(tensor: TensorProto, content: Content) -> bytes:
    """A tensor's data, wherever it lies."""
    elsewhere = content(tensor)
    if elsewhere is not None:
        return elsewhere
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return tensor.SerializeToString(deterministic=True)  # as a list of numbers
