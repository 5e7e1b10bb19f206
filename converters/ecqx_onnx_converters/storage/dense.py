"""int8 levels <-> one initializer of the narrowest integer type that holds them: INT8, INT4, INT2 or their unsigned twins, or
several to a byte as digits (radix.py) where that is smaller and the target folds functions.

Sub-byte types are packed as the ONNX specification says: row-major, the first element in the lowest bits of each byte, the last
byte filled with zero bits.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import MAX_WEIGHTS, Contents, Stored, radix
from ecqx_onnx_converters.targets import OPSET_OF_TYPE, Target

# type -> (bits, lowest level, highest level), narrowest first. UINT8 is never needed: levels are int8.
TYPES: dict[int, tuple[int, int, int]] = {
    TensorProto.INT2: (2, -2, 1),
    TensorProto.UINT2: (2, 0, 3),
    TensorProto.INT4: (4, -8, 7),
    TensorProto.UINT4: (4, 0, 15),
    TensorProto.INT8: (8, -128, 127),
}


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """One initializer `name` of the narrowest type that the target has, or digits if fewer bytes."""
    whole = encode_whole_bits(levels, name, target)
    digits = (
        radix.encode(levels, name)
        if target.decoders and target.max_opset >= radix.OPSET and levels.size
        else None
    )
    return (
        whole
        if digits is None or (isinstance(whole, Stored) and whole.nbytes <= digits.nbytes)
        else digits
    )


def encode_whole_bits(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    lowest, highest = (int(levels.min()), int(levels.max())) if levels.size else (0, 0)
    for kind, (bits, least, most) in TYPES.items():
        if kind in target.dense_types and least <= lowest and highest <= most:
            tensor = TensorProto(
                name=name, data_type=kind, dims=levels.shape, raw_data=pack_bits(levels, bits)
            )
            label = f"dense {TensorProto.DataType.Name(kind)}"
            return Stored("dense", label, name, kind, OPSET_OF_TYPE[kind], initializers=(tensor,))
    return Refusal(
        f"levels from {lowest} to {highest} fit no integer type of target '{target.name}'"
    )


def decode(name: str, contents: Contents) -> np.ndarray:
    if radix.is_digits(contents.makers.get(name)):
        return radix.decode(name, contents)
    tensor = contents.initializers[name]
    size = math.prod(tensor.dims)
    if tensor.data_type not in TYPES or min(tensor.dims, default=0) < 0 or size > MAX_WEIGHTS:
        raise FileError(
            f"integer tensor '{name}' has type {tensor.data_type} and dims {list(tensor.dims)}; the ONNX file is damaged"
        )
    bits, least, _ = TYPES[tensor.data_type]
    if len(tensor.raw_data) != (size * bits + 7) // 8:
        raise FileError(
            f"integer tensor '{name}' of dims {list(tensor.dims)} has {len(tensor.raw_data)} bytes; the ONNX file is damaged"
        )
    return unpack_bits(tensor.raw_data, bits, size, signed=least < 0).reshape(tensor.dims)


def stored_bytes(name: str, contents: Contents) -> int:
    if radix.is_digits(contents.makers.get(name)):
        return radix.stored_bytes(name, contents)
    return contents.initializers[name].ByteSize()


def pack_bits(levels: np.ndarray, bits: int) -> bytes:
    """levels in the range of `bits`-bit integers -> packed bytes."""
    flat = np.ascontiguousarray(levels, np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    per_byte = 8 // bits
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    padded[: flat.size] = flat & ((1 << bits) - 1)
    packed = np.zeros(padded.size // per_byte, np.uint8)
    for position in range(per_byte):
        packed |= padded[position::per_byte] << np.uint8(position * bits)
    return packed.tobytes()


def unpack_bits(data: bytes, bits: int, size: int, *, signed: bool) -> np.ndarray:
    """The inverse: int8 [size]."""
    packed = np.frombuffer(data, np.uint8)
    levels = np.empty((packed.size, 8 // bits), np.int8)
    for position in range(8 // bits):
        high = packed << np.uint8(
            8 - bits * (position + 1)
        )  # the level in the highest bits: shifting back extends its sign
        levels[:, position] = (high.view(np.int8) if signed else high) >> (8 - bits)
    return levels.reshape(-1)[:size]
