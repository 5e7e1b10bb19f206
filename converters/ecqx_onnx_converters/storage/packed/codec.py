"""Any number of int8 tensors -> one Packed, and back: what docs/packed-format.md specifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.storage.packed import tree
from ecqx_onnx_converters.storage.packed.units import Alphabet, choose_alphabet, kinds_of, pairs, walk

VERSION = 1
RADICES = range(4, 17)  # steps that a function of the decoder calls; two levels of it make radix**2 steps of a byte
CALL_BYTES = 60  # a step more in both levels, in the file
LANE_BYTES = 0.4


@dataclass(frozen=True)
class Part:
    """One tensor. order: the axes in which it is coded, outermost first; entries: how many of the stream are its own."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    entries: int

    @property
    def turned(self) -> bool:
        return self.order != tuple(range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Packed:
    """payload: uint8 [lanes, bytes of a lane]; every lane begins with a whole code word.

    bits: uint8, the tree, eight to a byte, high bit first, filled up with ones. advances: int8 [kinds + 1], negated, and
    values: int8 [kinds + 1], of the leaves in order; both begin with 0 for no unit. slots: entries of a byte, 2, 4 or 8.
    """

    payload: np.ndarray
    bits: np.ndarray
    advances: np.ndarray
    values: np.ndarray
    slots: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


def pack(tensors: Sequence[np.ndarray], orders: Sequence[tuple[int, ...]] | None = None) -> Packed:
    """int8 tensors, each with at least one weight and fewer than 2**31. orders: see Part; by default the tensor's own."""
    if orders is None:
        orders = [tuple(range(levels.ndim)) for levels in tensors]
    walked = [pairs(*walk(levels.transpose(order))) for levels, order in zip(tensors, orders, strict=True)]
    kinds, alphabet = spell(walked)
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *kinds]), minlength=len(alphabet.advances))
    shortest, code = best_code(counts)
    leaf_of = np.zeros(len(counts), np.int64)
    leaf_of[code.symbols[code.symbols >= 0]] = np.flatnonzero(code.symbols >= 0)
    leaves = leaf_of[np.concatenate([np.zeros(0, np.int64), *kinds])]
    ends = np.cumsum(code.lengths[leaves])
    lane_bytes = best_radix(int(ends[-1]) // 8 if len(ends) else 0) ** 2
    ends, lanes = in_lanes(ends, code.lengths[leaves], lane_bytes * 8)
    bits = np.ones(lanes * lane_bytes * 8, np.uint8)  # a word of ones is the longest: the rest of a lane ends none
    put_bits(bits, ends, code.codes[leaves], code.lengths[leaves])
    width = tree.DIGIT // slots_of(shortest)
    last = np.cumsum([len(part) for part in kinds], dtype=np.int64)
    entries = np.array([-(-int(ends[count - 1]) // width) if count else 0 for count in last], np.int64)
    parts = [
        Part(levels.shape, tuple(order), int(own))
        for levels, order, own in zip(tensors, orders, np.diff(entries, prepend=0), strict=True)
    ]
    advances, values = (np.append(of, 0)[code.symbols] for of in (-alphabet.advances, alphabet.values))  # a filler's are 0
    return Packed(
        np.packbits(bits).reshape(lanes, lane_bytes),
        np.packbits(np.concatenate([code.bits, np.ones(-len(code.bits) % 8, np.uint8)])),
        np.concatenate([[0], advances]).astype(np.int8),
        np.concatenate([[0], values]).astype(np.int8),
        slots_of(shortest),
        tuple(parts),
    )


def spell(walked: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], Alphabet]:
    """What `pairs` gave for each tensor -> kinds of units of each, and the alphabet they share."""
    counts, runs = np.zeros(1 << 15, np.int64), 0
    for run, pair in walked:
        counts += np.bincount(pair, minlength=len(counts))
        runs += int(run.sum())
    if not counts.any():
        none = np.zeros(0, np.int64)
        return [none for _ in walked], Alphabet(none, none, np.zeros((1 << 15, 1), np.int64))
    alphabet = choose_alphabet(counts, runs)
    return [kinds_of(run, pair, alphabet) for run, pair in walked], alphabet


def slots_of(shortest: int) -> int:
    return tree.DIGIT // shortest


def best_code(counts: np.ndarray) -> tuple[int, tree.Code]:
    """Longer shortest words mean fewer entries to decode: they may cost half a percent."""
    best, fewest = (4, tree.build(counts, 4)), 0.0
    for shortest in (4, 2, 1):
        code = tree.build(counts, shortest)
        size = float((np.append(counts, 0)[code.symbols] * code.lengths).sum())
        if shortest == 4 or size < 0.995 * fewest:
            best, fewest = (shortest, code), size
    return best


def best_radix(size: int) -> int:
    """Each lane wastes about LANE_BYTES at its end, each step costs its calls."""
    return min(RADICES, key=lambda radix: CALL_BYTES * radix + LANE_BYTES * size / radix**2)


def put_bits(bits: np.ndarray, ends: np.ndarray, codes: np.ndarray, lengths: np.ndarray) -> None:
    """Writes each code, high bit first, so that it ends before bit `end`."""
    for place in range(int(lengths.max(initial=0))):
        long = np.flatnonzero(lengths > place) if place else slice(None)
        bits[ends[long] - 1 - place] = (codes[long] >> place) & 1


def in_lanes(ends: np.ndarray, lengths: np.ndarray, lane: int) -> tuple[np.ndarray, int]:
    """Where each word ends when none may cross into another lane of `lane` bits, and the number of lanes."""
    firsts, shifts, begin = [0], [0], 0
    while True:
        first = int(np.searchsorted(ends, begin + lane, side="right"))  # the first word that ends beyond the lane
        if first >= len(ends):
            break
        begin = int(ends[first]) - int(lengths[first])
        firsts.append(first)
        shifts.append(len(shifts) * lane - begin)
    return ends + np.repeat(shifts, np.diff([*firsts, len(ends)])), len(firsts)


def unpack(packed: Packed) -> list[np.ndarray]:
    """The inverse of `pack`, as the ONNX functions do it. FileError for what `pack` doesn't write."""
    stream = decode(packed.payload, packed.bits, packed.slots)
    tensors, begin = [], 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        levels = place(own, packed.advances, packed.values, math.prod(part.shape))
        shape = [part.shape[axis] for axis in part.order]
        tensors.append(np.ascontiguousarray(levels.reshape(shape).transpose(np.argsort(part.order))).reshape(part.shape))
    return tensors


def decode(payload: np.ndarray, bits: np.ndarray, slots: int) -> np.ndarray:
    """-> entries, uint8 [payload bytes * slots]: for each part of each byte the leaf it ended, counted from 1, or 0."""
    bits = np.unpackbits(bits.reshape(-1)) if bits.dtype == np.uint8 else np.zeros(0, np.uint8)
    balance = np.cumsum(2 * bits.astype(np.int64) - 1)
    inner = (int(np.argmax(balance == 2)) + 1) // 2 if len(bits) else 0  # all children are there once leaves are two ahead
    whole = bits[: 2 * inner].sum() == inner + 1 and len(bits) == -(-2 * inner // 8) * 8 and bits[2 * inner :].all()
    if not (
        whole and 1 <= inner < 255 and slots in (2, 4, 8) and payload.dtype == np.uint8 and payload.ndim == 2 and payload.size
    ):
        raise FileError("the tree or the payload of the packed weights is none; the ONNX file is damaged")
    state, met = tree.automaton(bits[: 2 * inner], tree.DIGIT // slots)
    lanes, columns = payload.shape
    entries = np.empty((lanes, columns, slots), np.uint8)
    met, state, here = met.astype(np.uint8), state * 256, np.zeros(lanes, np.int64)
    for column in range(columns):
        index = here + payload[:, column]
        entries[:, column] = met[index]
        here = state[index]
    return entries.reshape(-1)


def place(entries: np.ndarray, advances: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """A tensor's entries and the tables of its group -> int8 levels [size] in coding order."""
    fits = advances.dtype == values.dtype == np.int8 and advances.ndim == 1 and advances.shape == values.shape
    if not fits or int(entries.max(initial=0)) >= len(advances) or advances.max(initial=0) > 0:
        raise FileError("the tables of the packed weights have no such units; the ONNX file is damaged")
    cursor = np.cumsum(advances.astype(np.int64)[entries])
    if len(cursor) and cursor[-1] < -size:
        raise FileError(f"the packed weights move past a tensor of {size}; the ONNX file is damaged")
    levels = np.zeros(size, np.int8)
    found = values[entries]
    named = np.flatnonzero(found)
    np.add.at(levels, cursor[named], found[named])  # each index once, unless damaged
    return levels
