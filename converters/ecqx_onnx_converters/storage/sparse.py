"""int8 levels <-> one sparse_initializer: the INT8 levels that aren't zero and their INT64 positions in row-major order.

Nine bytes per level that isn't zero: smaller than dense INT8 above 88.9 % zeros, than INT4 above 94.4 %, than INT2 above 97.2 %.
Runtimes make it dense when they load it. onnxruntime refuses INT4 and INT2 here.
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


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    if not target.sparse:
        return Refusal(f"target '{target.name}' has no sparse tensors")
    flat = np.ascontiguousarray(levels).reshape(-1)
    positions = np.flatnonzero(flat).astype("<i8")
    sparse = SparseTensorProto(
        values=TensorProto(
            name=name,
            data_type=TensorProto.INT8,
            dims=[positions.size],
            raw_data=flat[positions].tobytes(),
        ),
        indices=TensorProto(
            data_type=TensorProto.INT64, dims=[positions.size], raw_data=positions.tobytes()
        ),
        dims=levels.shape,
    )
    return Stored(
        "sparse", "sparse INT8", name, TensorProto.INT8, 11, sparse_initializers=(sparse,)
    )


def decode(name: str, contents: Contents) -> np.ndarray:
    sparse = contents.sparse_initializers[name]
    values, size = np.frombuffer(sparse.values.raw_data, np.int8), math.prod(sparse.dims)
    if (
        len(sparse.indices.raw_data) != 8 * values.size
        or min(sparse.dims, default=0) < 0
        or size > MAX_WEIGHTS
    ):
        raise FileError(
            f"sparse tensor '{name}' has dims {list(sparse.dims)}, {values.size} values and {len(sparse.indices.raw_data)} bytes"
            " of positions; the ONNX file is damaged"
        )
    if not may_have_size(size, values.size):
        raise FileError(
            f"sparse tensor '{name}' claims {size} weights for {values.size} values; the ONNX file is damaged"
        )
    positions = np.frombuffer(sparse.indices.raw_data, "<i8")
    if values.size and (
        positions.min() < 0 or positions.max() >= size or (np.diff(positions) <= 0).any()
    ):
        raise FileError(
            f"sparse tensor '{name}' has positions outside its {size} weights or out of order; the ONNX file is damaged"
        )
    levels = np.zeros(size, np.int8)
    levels[positions] = values
    return levels.reshape(sparse.dims)


def stored_bytes(name: str, contents: Contents) -> int:
    return contents.sparse_initializers[name].ByteSize()
