"""The dense codec: one initializer of the narrowest integer type that holds the levels.

That is INT8, INT4, INT2 or an unsigned type; or several levels to a byte as digits (radix.py) where
that is smaller and the target folds functions. Types below a byte are packed as the ONNX
specification says (TensorProto.raw_data): row-major, the first element in the lowest bits of each
byte, the last byte filled up with zero bits.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import MAX_WEIGHTS, Contents, Stored, radix
from ecqx_onnx_converters.targets import INT8_TYPES, OPSET_OF_TYPE, Target

# Type -> (bits, lowest level, highest level), narrowest first. UINT8 is never needed: levels are
# int8.
TYPES: dict[int, tuple[int, int, int]] = {
    TensorProto.INT2: (2, -2, 1),
    TensorProto.UINT2: (2, 0, 3),
    TensorProto.INT4: (4, -8, 7),
    TensorProto.UINT4: (4, 0, 15),
    TensorProto.INT8: (8, -128, 127),
}


# Weights of a tensor that is stored in whole bits where there is a type below a byte for it: at
# load digits leave 40 bytes a weight behind, a Cast of INT4 next to nothing.
WHOLE_FROM = 1 << 16


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """Encode one weight as one initializer, or as digits and a node if these take fewer bytes.

    Large tensors are digits only where the alternative is a byte for each weight.

    Args:
        levels: int8, any shape.
        name: What the integer tensor shall be called.
        target: Which integer types it has, and whether it folds functions.

    Returns:
        The smaller of both; or why no integer type of the target holds the levels.
    """
    whole = _encode_whole_bits(levels, name, target)
    folds_digits = target.decoders and target.max_opset >= radix.OPSET
    if not folds_digits or not levels.size:
        return whole
    if levels.size >= WHOLE_FROM and isinstance(whole, Stored) and whole.type not in INT8_TYPES:
        return whole
    digits = radix.encode(levels, name)
    if isinstance(whole, Stored) and whole.nbytes <= digits.nbytes:
        return whole
    return digits


def _encode_whole_bits(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """One initializer of the narrowest type that the target has."""
    lowest = int(levels.min()) if levels.size else 0
    highest = int(levels.max()) if levels.size else 0
    for element_type, (bits, least, most) in TYPES.items():
        if element_type in target.dense_types and least <= lowest and highest <= most:
            data = pack_bits(levels, bits)
            tensor = TensorProto(
                name=name, data_type=element_type, dims=levels.shape, raw_data=data
            )
            return Stored(
                storage="dense",
                label=f"dense {TensorProto.DataType.Name(element_type)}",
                levels=name,
                type=element_type,
                opset=OPSET_OF_TYPE[element_type],
                initializers=(tensor,),
            )
    return Refusal(
        f"levels from {lowest} to {highest} fit no integer type of target '{target.name}'"
    )


def decode(name: str, contents: Contents) -> np.ndarray:
    """Decode one weight.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        int8 levels in the weight's shape.

    Raises:
        FileError: Its type, dims and number of bytes do not go together.
        KeyError: The file has no such tensor.
    """
    if radix.is_digits(contents.makers.get(name)):
        return radix.decode(name, contents)
    tensor = contents.initializers[name]
    dims = list(tensor.dims)
    size = math.prod(dims)
    if tensor.data_type not in TYPES or min(dims, default=0) < 0 or size > MAX_WEIGHTS:
        raise FileError(
            f"integer tensor '{name}' has type {tensor.data_type} and dims {dims};"
            " the ONNX file is damaged"
        )
    bits, least, _ = TYPES[tensor.data_type]
    if len(tensor.raw_data) != (size * bits + 7) // 8:
        raise FileError(
            f"integer tensor '{name}' of dims {dims} has {len(tensor.raw_data)} bytes;"
            " the ONNX file is damaged"
        )
    return unpack_bits(tensor.raw_data, bits, size, signed=least < 0).reshape(tensor.dims)


def stored_bytes(name: str, contents: Contents) -> int:
    """Count the bytes of a weight in a file.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        Bytes of the initializer, and of the node where the levels are digits.
    """
    if radix.is_digits(contents.makers.get(name)):
        return radix.stored_bytes(name, contents)
    return contents.initializers[name].ByteSize()


def pack_bits(levels: np.ndarray, bits: int) -> bytes:
    """Pack integers of fewer than 8 bits into bytes, the first in the lowest bits.

    Args:
        levels: int8, any shape, within the range of `bits`-bit integers.
        bits: 2, 4 or 8.

    Returns:
        ceil(size * bits / 8) bytes.
    """
    flat = np.ascontiguousarray(levels, np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    per_byte = 8 // bits
    nbytes = -(-flat.size // per_byte)
    padded = np.zeros(nbytes * per_byte, np.uint8)
    padded[: flat.size] = flat & ((1 << bits) - 1)
    packed = np.zeros(nbytes, np.uint8)
    for position in range(per_byte):
        packed |= padded[position::per_byte] << np.uint8(position * bits)
    return packed.tobytes()


def unpack_bits(data: bytes, bits: int, size: int, *, signed: bool) -> np.ndarray:
    """Unpack what `pack_bits` packed.

    Args:
        data: Packed bytes.
        bits: 2, 4 or 8.
        size: How many integers there are.
        signed: Whether they are two's-complement numbers.

    Returns:
        int8 [size].
    """
    packed = np.frombuffer(data, np.uint8)
    per_byte = 8 // bits
    levels = np.empty((packed.size, per_byte), np.int8)
    for position in range(per_byte):
        # With the level in the highest bits, shifting back extends its sign.
        high = packed << np.uint8(8 - bits * (position + 1))
        if signed:
            levels[:, position] = high.view(np.int8) >> (8 - bits)
        else:
            levels[:, position] = high >> (8 - bits)
    return levels.reshape(-1)[:size]
