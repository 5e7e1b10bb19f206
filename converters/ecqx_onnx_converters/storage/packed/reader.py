"""Reads packed weights out of an ONNX file, checking every part of them."""

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

# Begin and end of each tensor's entries in its stream, by the name that they have in the graph.
Cuts = dict[str, tuple[int, int]]


def count_own_bytes(entries: int, slots: int) -> int:
    """Count the bytes of the payload that are one tensor's.

    Args:
        entries: The tensor's.
        slots: Entries of a byte.

    Returns:
        Bytes, the last one counted whole.
    """
    return -(-entries // slots)


def decode(name: str, contents: Contents) -> np.ndarray:
    """Decode one weight; its stream is decoded once and kept in the contents' cache.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        int8 levels in the weight's shape.

    Raises:
        FileError: A node or an array is none that the encoder writes.
        KeyError: The file has no such tensor.
    """
    # 0. Slices, each by itself.
    slices, axis = _find_slices(name, contents)
    if slices:
        return _join_slices(name, [decode(part, contents) for part in slices], axis)
    # 1. The tensor's node, its stream's entries, its shape in coding order.
    node, permutation = _find_tensor_node(name, contents)
    stream, cuts = _read_stream(node, contents)
    shape = tuple(_read_sizes(node.input[3], contents).tolist())
    size = math.prod(shape)
    if not 0 < size < MAX_WEIGHTS:
        raise FileError(f"packed tensor '{name}' has shape {list(shape)}; the ONNX file is damaged")
    # 2. Its own entries become levels.
    begin, end = cuts[node.input[0]]
    advances = _read_constant(node.input[1], contents)
    values = _read_constant(node.input[2], contents)
    flat = reference_decoder.place_levels(stream[begin:end], advances, values, size)
    levels = flat.reshape(shape)
    # 3. Back into its own order of axes.
    if permutation is None:
        return levels
    if sorted(permutation) != list(range(levels.ndim)):
        raise FileError(
            f"packed tensor '{name}' is transposed by {permutation}; the ONNX file is damaged"
        )
    return np.ascontiguousarray(levels.transpose(permutation))


def stored_bytes(name: str, contents: Contents) -> int:
    """Count the bytes of the payload that are one weight's.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        Bytes of its own entries.
    """
    slices, _ = _find_slices(name, contents)
    if slices:
        return sum(stored_bytes(part, contents) for part in slices)
    node, _ = _find_tensor_node(name, contents)
    stream, cuts = _read_stream(node, contents)
    begin, end = cuts[node.input[0]]
    maker, _ = _find_makers(node, contents)
    payload = contents.initializers[maker.input[0]]
    slots = len(stream) // max(1, math.prod(payload.dims))
    return count_own_bytes(end - begin, slots)


def _find_slices(name: str, contents: Contents) -> tuple[list[str], int]:
    """The slices that a packed tensor is joined of, and along which axis; none where it is whole.

    FileError for a slice that is joined of slices itself.
    """
    node = contents.makers[name]
    if node.op_type != "Concat" or node.domain:
        return [], 0
    for part in node.input:
        if contents.makers[part].op_type == "Concat":
            raise FileError(
                f"packed tensor '{name}' is joined of slices of slices; the ONNX file is damaged"
            )
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    return list(node.input), axes[0] if axes else 0


def _join_slices(name: str, slices: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The tensor of its slices; FileError if they do not go together."""
    sizes = sum(part.size for part in slices)
    try:
        if sizes >= MAX_WEIGHTS:
            raise ValueError(f"{sizes} weights are too many")
        return np.concatenate(slices, axis=axis)
    except ValueError as error:
        raise FileError(
            f"the slices of packed tensor '{name}' can't be joined ({error});"
            " the ONNX file is damaged"
        ) from error


def _find_tensor_node(name: str, contents: Contents) -> tuple[NodeProto, list[int] | None]:
    """The node of a packed tensor, and the axes by which its outcome is transposed."""
    node = contents.makers[name]
    permutation: list[int] | None = None
    if node.op_type == "Transpose" and not node.domain:
        permutation = []
        for attribute in node.attribute:
            if attribute.name == "perm" and not permutation:
                permutation = list(attribute.ints)
        node = contents.makers[node.input[0]]
    is_ours = node.domain == DOMAIN and node.op_type == onnx_decoder.TENSOR
    if not is_ours or len(node.input) not in (4, 5):
        raise FileError(
            f"packed tensor '{name}' is made by {node.op_type} of {len(node.input)} inputs, not by"
            " its decoder; the ONNX file is damaged"
        )
    return node, permutation


def _find_makers(node: NodeProto, contents: Contents) -> tuple[NodeProto, NodeProto | None]:
    """What makes the entries that a tensor's node reads: D; and Split where several share them."""
    entries = node.input[0]
    maker = contents.makers[entries]
    split = None
    if maker.op_type == "Split" and not maker.domain:
        split = maker
        maker = contents.makers[split.input[0]]
    decoders = (onnx_decoder.DECODE, onnx_decoder.DECODE_BEFORE)
    if maker.op_type not in decoders or maker.domain != DOMAIN:
        raise FileError(
            f"the packed entries '{entries}' aren't made by their decoder; the ONNX file is damaged"
        )
    if len(maker.input) < 2 or (split is not None and len(split.input) != 2):
        raise FileError(
            f"the decoder of the packed entries '{entries}' lacks inputs; the ONNX file is damaged"
        )
    return maker, split


def _read_stream(node: NodeProto, contents: Contents) -> tuple[np.ndarray, Cuts]:
    """All entries of the stream that a tensor's node reads, decoded once, and where each's are."""
    maker, split = _find_makers(node, contents)
    key = maker.output[0]
    if key not in contents.cache:
        stream = _decode_stream(maker, contents)
        cuts = {key: (0, len(stream))}
        if split is not None:
            cuts = _read_cuts(split, len(stream), contents)
        contents.cache[key] = stream, cuts
    found: tuple[np.ndarray, Cuts] = contents.cache[key]
    return found


def _decode_stream(maker: NodeProto, contents: Contents) -> np.ndarray:
    """The entries that a node D, of this format or an earlier one, makes."""
    values = []
    for value in maker.input:
        if onnx_decoder.is_stage(value, contents.makers):
            values.append(np.array([1]))
        else:
            values.append(_read_constant(value, contents))
    payload, bits, *constants = values
    version, slots, context_signs = _recognize_format(constants)
    # 1. Where leaves lead; in format 2 there are two contexts, at inner nodes 1 and 2.
    after = None
    if context_signs is not None and version < 3:
        after = np.where(context_signs > 0, 1, 2)
    elif context_signs is not None:
        after = reference_decoder.find_next_nodes(context_signs)
    # 2. The tree; before format 4 its bits are in the order of its bytes.
    if bits.dtype != np.uint8:
        raise FileError(
            f"the tree of the packed weights has type {bits.dtype}; the ONNX file is damaged"
        )
    tree = reference_decoder.unpack_tree(bits)
    if version <= 3:
        tree = np.unpackbits(bits.reshape(-1))
    # 3. The payload; before format 3 it is [lanes, bytes of a lane].
    if version < 3:
        payload = payload.T
    elif payload.ndim != 2 or len(payload) % DIGIT:
        raise FileError(
            f"the payload of the packed weights has shape {list(payload.shape)};"
            " the ONNX file is damaged"
        )
    return reference_decoder.decode(payload, tree, slots, after)


def _read_cuts(split: NodeProto, entries: int, contents: Contents) -> Cuts:
    """Where a Split cuts so many entries."""
    sizes = _read_sizes(split.input[1], contents)
    if sizes.sum() != entries or len(sizes) != len(split.output):
        raise FileError(
            f"the packed entries are cut into parts of {sizes.tolist()[:9]};"
            " the ONNX file is damaged"
        )
    cuts = {}
    for output, end, size in zip(split.output, np.cumsum(sizes), sizes, strict=True):
        cuts[output] = (int(end - size), int(end))
    return cuts


def _recognize_format(constants: Sequence[np.ndarray]) -> tuple[int, int, np.ndarray | None]:
    """The format (1 and 2 alike: 2), slots and context signs, of D's inputs behind the tree."""
    for version, slots, known in onnx_decoder.list_known_constants():
        behind = constants[len(known) :]
        if behind and _are_same(behind[:1], [np.array([1])]):  # the number that a stage waits for
            behind = behind[1:]
        if _are_same(constants[: len(known)], known) and len(behind) <= 1:
            return version, slots, (behind[0] if behind else None)
    raise FileError(
        "the decoder of the packed weights has other constants than those of"
        " docs/packed-format.md; the file is damaged"
    )


def _are_same(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    """Whether arrays have the same types, shapes and values, pair by pair."""
    return len(ones) == len(others) and all(
        one.dtype == other.dtype and np.array_equal(one, other)
        for one, other in zip(ones, others, strict=True)
    )


def _read_sizes(name: str, contents: Contents) -> np.ndarray:
    """int64 numbers, none of them negative."""
    sizes = _read_constant(name, contents)
    if sizes.dtype != np.int64 or sizes.ndim != 1 or sizes.min(initial=0) < 0:
        raise FileError(
            f"the sizes '{name}' of packed weights are {sizes.dtype} {list(sizes.shape)};"
            " the ONNX file is damaged"
        )
    return sizes


def _read_constant(name: str, contents: Contents) -> np.ndarray:
    """The values of an initializer; KeyError where there is none."""
    return read_values(contents.initializers[name])
