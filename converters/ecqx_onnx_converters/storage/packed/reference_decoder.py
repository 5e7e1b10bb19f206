"""Decode packed streams in numpy, step by step as the ONNX functions do it."""

from __future__ import annotations

import math

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.limits import may_have_size
from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.stream import Packed


def unpack_tree(packed: np.ndarray) -> np.ndarray:
    """The inverse."""
    return np.unpackbits(packed.reshape(1, -1), axis=0).reshape(-1)


def unpack_stream(packed: Packed) -> list[np.ndarray]:
    """The inverse of `write`, as the ONNX functions do it. FileError for what `write` doesn't."""
    after = None if packed.context_signs is None else find_next_nodes(packed.context_signs)
    stream = decode(packed.payload, unpack_tree(packed.bits), packed.slots, after)
    tensors, begin = [], 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        levels = place_levels(own, packed.advances, packed.values, math.prod(part.shape))
        shape = [part.shape[axis] for axis in part.permutation]
        tensors.append(
            np.ascontiguousarray(
                levels.reshape(shape).transpose(np.argsort(part.permutation))
            ).reshape(part.shape)
        )
    return tensors


def find_next_nodes(context_signs: np.ndarray) -> np.ndarray:
    """The inner node that each leaf leads to."""
    return 3 + np.sign(context_signs.astype(np.int64))


def decode(
    payload: np.ndarray, bits: np.ndarray, slots: int, after: np.ndarray | None
) -> np.ndarray:
    """payload: uint8 [bytes of a lane, lanes]; bits: uint8, the tree, of 0 and 1. -> entries, uint8 [payload bytes * slots]: for
    each part of each byte the leaf it ended, counted from 1, or 0.

    after: int [leaves + 1], see `find_next_nodes`; None: all lead to the root. FileError for what is damaged.
    """
    balance = np.cumsum(2 * bits.astype(np.int64) - 1)
    inner = (
        (int(np.argmax(balance == 2)) + 1) // 2 if len(bits) else 0
    )  # all children are there once leaves are two ahead
    whole = (
        bits[: 2 * inner].sum() == inner + 1
        and len(bits) == -(-2 * inner // 8) * 8
        and bits[2 * inner :].all()
    )
    if not (
        whole
        and 1 <= inner < 255
        and slots in (2, 4, 8)
        and payload.dtype == np.uint8
        and payload.ndim == 2
        and payload.size
    ):
        raise FileError(
            "the tree or the payload of the packed weights is none; the ONNX file is damaged"
        )
    if after is None:
        after = np.zeros(int(bits.sum()) + 1, np.int64)
    elif after.shape != (int(bits.sum()) + 1,) or after.max() >= len(bits) // 2:
        raise FileError(
            "the tree of the packed weights has no such contexts; the ONNX file is damaged"
        )
    state, met = huffman.build_automaton(bits, huffman.DIGIT // slots, after)
    rows, lanes = payload.shape
    entries = np.empty((lanes, rows, slots), np.uint8)
    met, state, here = met.astype(np.uint8), state * 256, np.zeros(lanes, np.int64)
    for row in range(rows):
        index = here + payload[row]
        entries[:, row] = met[index]
        here = state[index]
    return entries.reshape(-1)


def place_levels(
    entries: np.ndarray, advances: np.ndarray, values: np.ndarray, size: int
) -> np.ndarray:
    """A tensor's entries and the tables of its group -> int8 levels [size] in coding order."""
    fits = (
        advances.dtype == values.dtype == np.int8
        and advances.ndim == 1
        and advances.shape == values.shape
    )
    if not fits or int(entries.max(initial=0)) >= len(advances) or advances.max(initial=0) > 0:
        raise FileError(
            "the tables of the packed weights have no such units; the ONNX file is damaged"
        )
    if not may_have_size(size, len(entries)):
        raise FileError(
            f"{len(entries)} entries claim a packed tensor of {size} weights; the ONNX file is damaged"
        )
    cursor = np.cumsum(advances.astype(np.int64)[entries])
    if len(cursor) and cursor[-1] < -size:
        raise FileError(
            f"the packed weights move past a tensor of {size}; the ONNX file is damaged"
        )
    levels = np.zeros(size, np.int8)
    found = values[entries]
    named = np.flatnonzero(found)
    np.add.at(levels, cursor[named], found[named])  # each index once, unless damaged
    return levels
