"""Any number of int8 tensors -> one Packed, and back: what docs/packed-format.md specifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.storage import MAX_WEIGHTS
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
    first, values = (np.where(code.symbols >= 0, of[code.symbols], 0) if len(of) else np.zeros(len(code.symbols), np.int64)
                     for of in (-alphabet.advances, alphabet.values))
    return Packed(
        np.packbits(bits).reshape(lanes, lane_bytes),
        np.packbits(np.concatenate([code.bits, np.ones(-len(code.bits) % 8, np.uint8)])),
        np.concatenate([[0], first]).astype(np.int8),
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
        return [np.zeros(0, np.int64) for _ in walked], Alphabet(*[np.zeros(0, np.int64)] * 2, np.zeros((1 << 15, 1), np.int64))
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
    """The inverse, as the ONNX functions do it. FileError for what `pack` doesn't write."""
    bits = check(packed)
    state, met = tree.automaton(bits, tree.DIGIT // packed.slots)
    lanes, lane_bytes = packed.payload.shape
    entries = np.empty((lanes, lane_bytes, packed.slots), np.uint8)
    met, state, here = met.astype(np.uint8), state * 256, np.zeros(lanes, np.int64)
    for place in range(lane_bytes):
        index = here + packed.payload[:, place]
        entries[:, place] = met[index]
        here = state[index]
    stream = entries.reshape(-1)
    tensors, begin = [], 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        size = size_of(part.shape)
        cursor = np.cumsum(packed.advances.astype(np.int64)[own])
        if len(cursor) and cursor[-1] < -size:
            raise FileError(f"the packed payload moves past a tensor of {size} weights; the ONNX file is damaged")
        levels = np.zeros(size, np.int8)
        values = packed.values[own]
        named = values != 0
        levels[cursor[named]] = values[named]
        shape = [part.shape[axis] for axis in part.order]
        tensors.append(np.ascontiguousarray(levels.reshape(shape).transpose(np.argsort(part.order))))
    return tensors


def size_of(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def check(packed: Packed) -> np.ndarray:
    """The tree's bits, if the sizes and the tree are such as `pack` makes; FileError otherwise."""
    bits = np.unpackbits(packed.bits.reshape(-1))
    kinds = len(packed.advances) - 1
    inner = kinds - 1
    balance = np.cumsum(1 - 2 * bits[: 2 * inner].astype(np.int64)) + 1  # children still owed, less the one just read
    faults = [
        (packed.payload.ndim == 2 and packed.payload.dtype == np.uint8 and packed.payload.size > 0, "payload"),
        (packed.slots in (2, 4, 8), "slots"),
        (1 <= inner <= MAX_KINDS_INNER and packed.values.shape == packed.advances.shape == (kinds + 1,), "kinds of units"),
        (len(packed.bits) == -(-2 * inner // 8) and bits[: 2 * inner].sum() == kinds, "tree"),
        (bool((balance[: 2 * inner - 1 : 1] >= 0).all()), "tree"),
        (bool((packed.advances <= 0).all()) and packed.advances[0] == packed.values[0] == 0, "advances"),
        (all(len(part.order) == len(part.shape) and sorted(part.order) == list(range(len(part.shape))) for part in packed.parts), "axes"),
        (all(min(part.shape, default=1) >= 0 and 0 <= size_of(part.shape) < MAX_WEIGHTS for part in packed.parts), "shape"),
        (sum(part.entries for part in packed.parts) <= packed.payload.size * packed.slots
         and min((part.entries for part in packed.parts), default=0) >= 0, "entries"),
    ]
    for fine, what in faults:
        if not fine:
            raise FileError(f"the {what} of the packed weights can't be; the ONNX file is damaged")
    return bits[: 2 * inner]


MAX_KINDS_INNER = 255
