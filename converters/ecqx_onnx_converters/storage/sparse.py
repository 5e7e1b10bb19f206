"""The sparse codec: one sparse initializer of the INT8 levels that are not zero and where they lie.

Positions are INT64 in row-major order. Nine bytes per level that is not zero: smaller than dense
INT8 above 88.9 % zeros, than INT4 above 94.4 %, than INT2 above 97.2 %. Runtimes make it dense when
they load it. onnxruntime refuses INT4 and INT2 here.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import SparseTensorProto, TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.limits import may_have_size
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import MAX_WEIGHTS, Contents, Stored
from ecqx_onnx_converters.targets import Target

OPSET = 11  # the first with sparse initializers


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """Encode one weight as one sparse initializer.

    Args:
        levels: int8, any shape.
        name: What the integer tensor shall be called.
        target: Whether it has sparse tensors.

    Returns:
        Parts of a graph; or that the target has no sparse tensors.
    """
    if not target.sparse:
        return Refusal(f"target '{target.name}' has no sparse tensors")
    flat = np.ascontiguousarray(levels).reshape(-1)
    positions = np.flatnonzero(flat).astype("<i8")
    values = TensorProto(
        name=name,
        data_type=TensorProto.INT8,
        dims=[positions.size],
        raw_data=flat[positions].tobytes(),
    )
    indices = TensorProto(
        data_type=TensorProto.INT64, dims=[positions.size], raw_data=positions.tobytes()
    )
    sparse = SparseTensorProto(values=values, indices=indices, dims=levels.shape)
    return Stored(
        storage="sparse",
        label="sparse INT8",
        levels=name,
        type=TensorProto.INT8,
        opset=OPSET,
        sparse_initializers=(sparse,),
    )


def decode(name: str, contents: Contents) -> np.ndarray:
    """Decode one weight.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        int8 levels in the weight's shape.

    Raises:
        FileError: Dims, values and positions do not go together.
        KeyError: The file has no such tensor.
    """
    sparse = contents.sparse_initializers[name]
    dims = list(sparse.dims)
    values = np.frombuffer(sparse.values.raw_data, np.int8)
    size = math.prod(dims)
    index_bytes = len(sparse.indices.raw_data)
    if index_bytes != 8 * values.size or min(dims, default=0) < 0 or size > MAX_WEIGHTS:
        raise FileError(
            f"sparse tensor '{name}' has dims {dims}, {values.size} values and {index_bytes} bytes"
            " of positions; the ONNX file is damaged"
        )
    if not may_have_size(size, values.size):
        raise FileError(
            f"sparse tensor '{name}' claims {size} weights for {values.size} values;"
            " the ONNX file is damaged"
        )
    positions = np.frombuffer(sparse.indices.raw_data, "<i8")
    if values.size:
        outside = positions.min() < 0 or positions.max() >= size
        if outside or (np.diff(positions) <= 0).any():
            raise FileError(
                f"sparse tensor '{name}' has positions outside its {size} weights or out of order;"
                " the ONNX file is damaged"
            )
    levels = np.zeros(size, np.int8)
    levels[positions] = values
    return levels.reshape(sparse.dims)


def stored_bytes(name: str, contents: Contents) -> int:
    """Count the bytes of a weight in a file.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        Bytes of the sparse initializer.
    """
    return contents.sparse_initializers[name].ByteSize()
