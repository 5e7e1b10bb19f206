"""Decodes packed streams in numpy, step by step as the ONNX functions do it."""

from __future__ import annotations

import math

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.limits import may_have_size
from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.stream import Packed


def unpack_tree(packed: np.ndarray) -> np.ndarray:
    """Unpack the bits of a tree; the inverse of `bitstream.pack_tree`.

    Args:
        packed: uint8, of n bytes in any shape.

    Returns:
        uint8 [8 n] of 0 and 1.
    """
    return np.unpackbits(packed.reshape(1, -1), axis=0).reshape(-1)


def unpack_stream(packed: Packed) -> list[np.ndarray]:
    """Decode a stream; the inverse of `bitstream.write_stream`.

    Args:
        packed: The arrays of the stream.

    Returns:
        int8 levels of each tensor in its own shape.

    Raises:
        FileError: The arrays are none that `write_stream` makes.
    """
    after = None
    if packed.context_signs is not None:
        after = find_next_nodes(packed.context_signs)
    stream = decode(packed.payload, unpack_tree(packed.bits), packed.slots, after)
    tensors = []
    begin = 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        levels = place_levels(own, packed.advances, packed.values, math.prod(part.shape))
        coded_shape = [part.shape[axis] for axis in part.permutation]
        restored = levels.reshape(coded_shape).transpose(np.argsort(part.permutation))
        tensors.append(np.ascontiguousarray(restored).reshape(part.shape))
    return tensors


def find_next_nodes(context_signs: np.ndarray) -> np.ndarray:
    """Find the inner node that each leaf leads to.

    Args:
        context_signs: int8 [leaves + 1], see `Packed.context_signs`.

    Returns:
        int64 [leaves + 1]: 2 behind a negative number, 3 behind 0, 4 behind a positive one.
    """
    return 3 + np.sign(context_signs.astype(np.int64))


def decode(
    payload: np.ndarray, bits: np.ndarray, slots: int, after: np.ndarray | None
) -> np.ndarray:
    """Read the payload of a stream, all lanes at once.

    Args:
        payload: uint8 [bytes of a lane, lanes].
        bits: uint8 of 0 and 1, the tree, filled up with ones.
        slots: Entries of a byte: 2, 4 or 8.
        after: int [leaves + 1], see `find_next_nodes`; None where all lead to the root.

    Returns:
        uint8 [payload bytes * slots], lane after lane: for each part of each byte the leaf that it
        ended, counted from 1, or 0.

    Raises:
        FileError: Tree, payload and contexts do not go together.
    """
    # 1. The tree ends where leaves outnumber inner nodes: all children are there.
    balance = np.cumsum(2 * bits.astype(np.int64) - 1)
    inner = (int(np.argmax(balance == 2)) + 1) // 2 if len(bits) else 0
    ends_well = bits[: 2 * inner].sum() == inner + 1
    filled_up = len(bits) == -(-2 * inner // 8) * 8 and bits[2 * inner :].all()
    tree_fits = ends_well and filled_up and 1 <= inner < 255
    payload_fits = payload.dtype == np.uint8 and payload.ndim == 2 and payload.size
    if not (tree_fits and payload_fits and slots in (2, 4, 8)):
        raise FileError(
            "the tree or the payload of the packed weights is none; the ONNX file is damaged"
        )
    # 2. Contexts lead to inner nodes that the tree has.
    leaves = int(bits.sum())
    if after is None:
        after = np.zeros(leaves + 1, np.int64)
    elif after.shape != (leaves + 1,) or after.max() >= len(bits) // 2:
        raise FileError(
            "the tree of the packed weights has no such contexts; the ONNX file is damaged"
        )
    # 3. A byte of every lane a step.
    state, met = huffman.build_automaton(bits, huffman.DIGIT // slots, after)
    met = met.astype(np.uint8)
    state = state * 256
    rows, lanes = payload.shape
    entries = np.empty((lanes, rows, slots), np.uint8)
    here = np.zeros(lanes, np.int64)
    for row in range(rows):
        index = here + payload[row]
        entries[:, row] = met[index]
        here = state[index]
    return entries.reshape(-1)


def place_levels(
    entries: np.ndarray, advances: np.ndarray, values: np.ndarray, size: int
) -> np.ndarray:
    """Place the values of a tensor's symbols.

    Args:
        entries: uint8, the tensor's part of what `decode` gives.
        advances: int8 [leaves + 1], see `Packed`.
        values: int8 [leaves + 1], see `Packed`.
        size: How many weights the tensor has.

    Returns:
        int8 [size], levels in coding order.

    Raises:
        FileError: The tables do not have these symbols, or they lead out of the tensor.
    """
    types_fit = advances.dtype == values.dtype == np.int8
    shapes_fit = advances.ndim == 1 and advances.shape == values.shape
    known = types_fit and shapes_fit and int(entries.max(initial=0)) < len(advances)
    if not known or advances.max(initial=0) > 0:
        raise FileError(
            "the tables of the packed weights have no such symbols; the ONNX file is damaged"
        )
    if not may_have_size(size, len(entries)):
        raise FileError(
            f"{len(entries)} entries claim a packed tensor of {size} weights;"
            " the ONNX file is damaged"
        )
    # The cursor starts behind the last weight and moves down: it is an index from the end.
    cursor = np.cumsum(advances.astype(np.int64)[entries])
    if len(cursor) and cursor[-1] < -size:
        raise FileError(
            f"the packed weights move past a tensor of {size}; the ONNX file is damaged"
        )
    # A symbol that moves it names a weight that none before has named; one that does not, a
    # correction, adds to what the one before has led to.
    levels = np.zeros(size, np.int8)
    found = values[entries]
    moves = advances[entries] != 0
    placed = np.flatnonzero(moves & (found != 0))
    levels[cursor[placed]] = found[placed]
    corrections = np.flatnonzero(~moves & (found != 0))
    if len(corrections):
        _add_corrections(levels, cursor[corrections], found[corrections])
    return levels


def _add_corrections(levels: np.ndarray, places: np.ndarray, corrections: np.ndarray) -> None:
    """Adds them, in place; FileError where one comes before all weights, or leads out of int8."""
    named, which = np.unique(places, return_inverse=True)
    sums = levels[named].astype(np.int64)
    np.add.at(sums, which, corrections)
    if named.max() >= 0 or sums.min() < -128 or sums.max() > 127:
        raise FileError("a correction of packed weights leads nowhere; the ONNX file is damaged")
    levels[named] = sums
