"""Read packed weights out of an ONNX file, with every part checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.graph import read_values
from ecqx_onnx_converters.storage import DOMAIN, MAX_WEIGHTS, Contents
from ecqx_onnx_converters.storage.packed import onnx_decoder, reference_decoder
from ecqx_onnx_converters.storage.packed.huffman import DIGIT


def count_own_bytes(entries: int, slots: int) -> int:
    """A tensor's stretch of the payload."""
    return -(-entries // slots)


def decode(name: str, contents: Contents) -> np.ndarray:
    node, permutation = find_tensor_node(name, contents)
    stream, begins = read_stream(node, contents)
    shape = tuple(read_sizes(node.input[3], contents).tolist())
    if not 0 < math.prod(shape) < MAX_WEIGHTS:
        raise FileError(f"packed tensor '{name}' has shape {list(shape)}; the ONNX file is damaged")
    begin, end = begins[node.input[0]]
    advances, values = (read_constant(table, contents) for table in node.input[1:3])
    levels = reference_decoder.place_levels(
        stream[begin:end], advances, values, math.prod(shape)
    ).reshape(shape)
    if permutation is not None:
        if sorted(permutation) != list(range(levels.ndim)):
            raise FileError(
                f"packed tensor '{name}' is transposed by {permutation}; the ONNX file is damaged"
            )
        levels = np.ascontiguousarray(levels.transpose(permutation))
    return levels


def stored_bytes(name: str, contents: Contents) -> int:
    node, _ = find_tensor_node(name, contents)
    stream, begins = read_stream(node, contents)
    begin, end = begins[node.input[0]]
    payload = contents.initializers[find_makers(node, contents)[0].input[0]]
    return count_own_bytes(end - begin, len(stream) // max(1, math.prod(payload.dims)))


def find_tensor_node(name: str, contents: Contents) -> tuple[NodeProto, list[int] | None]:
    """The node of a packed tensor, and the axes by which its outcome is transposed."""
    node, permutation = contents.makers[name], None
    if node.op_type == "Transpose" and not node.domain:
        permutation = next(
            (list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), []
        )
        node = contents.makers[node.input[0]]
    if (
        node.domain != DOMAIN
        or node.op_type != onnx_decoder.TENSOR
        or len(node.input) not in (4, 5)
    ):
        raise FileError(
            f"packed tensor '{name}' is made by {node.op_type} of {len(node.input)} inputs, not by its decoder;"
            " the ONNX file is damaged"
        )
    return node, permutation


def find_makers(node: NodeProto, contents: Contents) -> tuple[NodeProto, NodeProto | None]:
    """What makes the entries that a tensor's node reads: D, and Split where others have a share in them."""
    maker, split = contents.makers[node.input[0]], None
    if maker.op_type == "Split" and not maker.domain:
        maker, split = contents.makers[maker.input[0]], maker
    if (
        maker.op_type not in (onnx_decoder.DECODE, onnx_decoder.DECODE_BEFORE)
        or maker.domain != DOMAIN
    ):
        raise FileError(
            f"the packed entries '{node.input[0]}' aren't made by their decoder; the ONNX file is damaged"
        )
    if len(maker.input) < 2 or (split is not None and len(split.input) != 2):
        raise FileError(
            f"the decoder of the packed entries '{node.input[0]}' lacks inputs; the ONNX file is damaged"
        )
    return maker, split


def read_stream(
    node: NodeProto, contents: Contents
) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
    """All entries that the tensor's group holds (decoded once), and begin and end of each tensor's own, by name."""
    maker, split = find_makers(node, contents)
    key = maker.output[0]
    if key not in contents.cache:
        payload, bits, *constants = (read_constant(value, contents) for value in maker.input)
        version, slots, context_signs = recognize_format(constants)
        after = None
        if context_signs is not None:
            after = (
                np.where(context_signs > 0, 1, 2)
                if version < 3
                else reference_decoder.find_next_nodes(context_signs)
            )
        if bits.dtype != np.uint8:
            raise FileError(
                f"the tree of the packed weights has type {bits.dtype}; the ONNX file is damaged"
            )
        if version > 2 and (payload.ndim != 2 or len(payload) % DIGIT):
            raise FileError(
                f"the payload of the packed weights has shape {list(payload.shape)}; the ONNX file is damaged"
            )
        bits = (
            reference_decoder.unpack_tree(bits) if version > 3 else np.unpackbits(bits.reshape(-1))
        )
        stream = reference_decoder.decode(payload.T if version < 3 else payload, bits, slots, after)
        if split is None:
            contents.cache[key] = stream, {key: (0, len(stream))}
            return contents.cache[key]
        sizes = read_sizes(split.input[1], contents)
        if sizes.sum() != len(stream) or len(sizes) != len(split.output):
            raise FileError(
                f"the packed entries are cut into parts of {sizes.tolist()[:9]}; the ONNX file is damaged"
            )
        ends = np.cumsum(sizes)
        cuts = {
            output: (int(end - size), int(end))
            for output, end, size in zip(split.output, ends, sizes, strict=True)
        }
        contents.cache[key] = stream, cuts
    return contents.cache[key]


def recognize_format(constants: Sequence[np.ndarray]) -> tuple[int, int, np.ndarray | None]:
    """What D reads behind payload and tree -> the format (1 and 2 alike: 2), slots, and turns."""
    for version, slots, known in onnx_decoder.list_known_constants():
        if are_same(constants[: len(known)], known) and len(constants) <= len(known) + 1:
            return version, slots, (constants[len(known)] if len(constants) > len(known) else None)
    raise FileError(
        "the decoder of the packed weights has other constants than those of docs/packed-format.md; the file is damaged"
    )


def are_same(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return len(ones) == len(others) and all(
        one.dtype == other.dtype and np.array_equal(one, other)
        for one, other in zip(ones, others, strict=True)
    )


def read_sizes(name: str, contents: Contents) -> np.ndarray:
    sizes = read_constant(name, contents)
    if sizes.dtype != np.int64 or sizes.ndim != 1 or sizes.min(initial=0) < 0:
        raise FileError(
            f"the sizes '{name}' of packed weights are {sizes.dtype} {list(sizes.shape)}; the ONNX file is damaged"
        )
    return sizes


def read_constant(name: str, contents: Contents) -> np.ndarray:
    return read_values(contents.initializers[name])
