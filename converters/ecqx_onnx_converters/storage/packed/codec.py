"""Any number of int8 tensors -> one Packed, and back: what docs/packed-format.md specifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations_with_replacement, zip_longest

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.storage.packed import tree
from ecqx_onnx_converters.storage.packed.units import MAX_KINDS, Alphabet, behind, choose_alphabets, kinds_of, pairs, tally, walk

RADICES = range(3, 17)  # how often a function of the decoder calls the one below
CALL_BYTES, LEVEL_BYTES = 36, 116  # in the file: a call more, and a function more
LANE_BYTES = 0.6  # its end, and the bit before its first word; rather much, since a payload is there to be short


class Form(Enum):
    """Where reading goes on behind a word: always at the root; always at inner node 2; or by the sign of the level, at 1 behind a
    positive one and at 2 behind others. A file has either PLAIN streams or the other two."""

    PLAIN = 0
    STEADY = 1
    SIGNS = 2


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
    values: int8 [kinds + 1], of the leaves in order; both begin with 0 for no unit, and where there are contexts end with 0 for
    each one that fills up the tree. slots: entries of a byte, 2, 4 or 8.
    """

    payload: np.ndarray
    bits: np.ndarray
    advances: np.ndarray
    values: np.ndarray
    slots: int
    form: Form
    parts: tuple[Part, ...]

    @property
    def turns(self) -> np.ndarray | None:
        """By which `after` tells where leaves lead."""
        return {Form.PLAIN: None, Form.STEADY: self.advances, Form.SIGNS: self.values}[self.form]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


@dataclass(frozen=True, eq=False)
class Survey:
    """A tensor as a stream says it: see `pairs` and `tally`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    runs: np.ndarray
    pair: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray, order: Sequence[int] | None = None) -> Survey:
        order = tuple(range(levels.ndim)) if order is None else tuple(order)
        return cls(levels.shape, order, *pairs(*walk(levels.transpose(order))))


@dataclass(frozen=True, eq=False)
class Coding:
    """How a stream is said. shortest: bits that each word has at least. nbytes: of words and tables, ends of lanes aside."""

    form: Form
    alphabet: Alphabet
    shortest: int
    code: tree.Code
    nbytes: int


def coding(alphabet: Alphabet, form: Form) -> Coding:
    """alphabet: of two contexts for SIGNS, of one otherwise."""
    if form is Form.STEADY:  # the second context is the only one in use
        alphabet = replace(alphabet, sizes=(0, *alphabet.sizes), spelling=np.concatenate([alphabet.spelling] * 2))
    shortest, code = best_code(alphabet)
    nbytes = (_bits(alphabet, code) + len(code.bits)) // 8 + 2 * len(code.symbols) + 4
    return Coding(form, alphabet, shortest, code, nbytes)


def pack(tensors: Sequence[np.ndarray], orders: Sequence[tuple[int, ...]] | None = None, form: Form | None = None) -> Packed:
    """int8 tensors, each with at least one weight and fewer than 2**31, as one stream.

    orders: see Part; by default the tensor's own. form: by default the one that takes fewest bytes; SIGNS can have 118 levels.
    """
    surveys = [Survey.of(levels, order) for levels, order in zip_longest(tensors, orders or [])]
    alphabets = choose_alphabets([tally(survey.runs, survey.pair) for survey in surveys])
    forms = [Form.PLAIN, Form.SIGNS][: len(alphabets)] if form is None else [form]
    how = min((coding(alphabets[made is Form.SIGNS], made) for made in forms), key=lambda way: way.nbytes)
    return write(surveys, how, math.prod(best_radices(how.nbytes, 1)))


def write(surveys: Sequence[Survey], how: Coding, lane_bytes: int) -> Packed:
    """One stream, as `how` says it."""
    contexts = contexts_of(surveys, how.form)
    kinds = [kinds_of(of.runs, of.pair, context, how.alphabet) for of, context in zip(surveys, contexts, strict=True)]
    code, lane = how.code, lane_bytes * 8
    leaf_of = np.zeros(len(how.alphabet.counts), np.int64)
    leaf_of[code.symbols[code.symbols >= 0]] = np.flatnonzero(code.symbols >= 0)
    leaves = leaf_of[np.concatenate([np.zeros(0, np.int64), *kinds])]
    lengths, turning = code.lengths[leaves], how.form is not Form.PLAIN
    ends, firsts = in_lanes(np.cumsum(lengths), lengths, lane, int(turning))
    bits = np.ones(len(firsts) * lane, np.uint8)  # a word of ones is the longest of its context: the rest of a lane ends none
    put_bits(bits, ends, code.codes[leaves], lengths)
    if turning and len(leaves):
        bits[np.arange(len(firsts)) * lane] = code.contexts[leaves[firsts]]
    width = tree.DIGIT // slots_of(how.shortest)
    last = np.cumsum([len(part) for part in kinds], dtype=np.int64)
    entries = np.array([-(-int(ends[count - 1]) // width) if count else 0 for count in last], np.int64)
    fill = -len(code.bits) % 8
    symbols = np.concatenate([[-1], code.symbols, np.full(fill * turning, -1)])  # what is no unit has advance and value 0
    advances, values = (np.append(of, 0)[symbols].astype(np.int8) for of in (-how.alphabet.advances, how.alphabet.values))
    return Packed(
        np.packbits(bits).reshape(len(firsts), lane_bytes),
        np.packbits(np.concatenate([code.bits, np.ones(fill, np.uint8)])),
        advances,
        values,
        slots_of(how.shortest),
        how.form,
        tuple(Part(of.shape, of.order, int(own)) for of, own in zip(surveys, np.diff(entries, prepend=0), strict=True)),
    )


def contexts_of(surveys: Sequence[Survey], form: Form) -> list[np.ndarray]:
    """Of each pair of each tensor of a stream."""
    if form is not Form.SIGNS:
        return [np.full(len(survey.pair), form.value) for survey in surveys]
    found, first = [], 1
    for survey in surveys:
        context = behind(survey.pair, first)
        found.append(context[:-1])
        first = int(context[-1])
    return found


def slots_of(shortest: int) -> int:
    return tree.DIGIT // shortest


def best_code(alphabet: Alphabet) -> tuple[int, tree.Code]:
    """Longer shortest words mean fewer entries to decode: they may cost half a percent."""
    counts = np.split(alphabet.counts, np.cumsum(alphabet.sizes)[:-1])
    codes = {shortest: tree.build(counts, shortest) for shortest in (1, 2, 4)}
    codes = {shortest: code for shortest, code in codes.items() if len(code.symbols) <= MAX_KINDS}
    bits = {shortest: _bits(alphabet, code) for shortest, code in codes.items()}
    shortest = max(of for of in codes if 0.995 * bits[of] <= min(bits.values()))
    return shortest, codes[shortest]


def _bits(alphabet: Alphabet, code: tree.Code) -> int:
    """Of all words."""
    return int((np.append(alphabet.counts, 0)[code.symbols] * code.lengths).sum())


def best_radices(size: int, streams: int, deepest: int = 3) -> tuple[int, ...]:
    """How often each level of the functions calls the one below; a lane has as many bytes as they all take steps together.

    size: bytes of all streams. Each call takes CALL_BYTES of the file, each level LEVEL_BYTES, each lane wastes LANE_BYTES, and
    of the last one of a stream half is empty.
    """

    def cost(radices: tuple[int, ...]) -> float:
        lane = math.prod(radices)
        return CALL_BYTES * sum(radices) + LEVEL_BYTES * len(radices) + LANE_BYTES * size / lane + streams * lane / 2

    depths = range(2, deepest + 1)
    return min((radices for depth in depths for radices in combinations_with_replacement(RADICES, depth)), key=cost)


def put_bits(bits: np.ndarray, ends: np.ndarray, codes: np.ndarray, lengths: np.ndarray) -> None:
    """Writes each code, high bit first, so that it ends before bit `end`."""
    for place in range(int(lengths.max(initial=0))):
        long = np.flatnonzero(lengths > place) if place else slice(None)
        bits[ends[long] - 1 - place] = (codes[long] >> place) & 1


def in_lanes(ends: np.ndarray, lengths: np.ndarray, lane: int, more: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each word ends when none may cross into another lane of `lane` bits, and the first word of each lane, which has
    `more` bits before it."""
    firsts, shifts, begin = [0], [more], 0
    while True:
        first = int(np.searchsorted(ends, begin + lane - more, side="right"))  # the first word that ends beyond the lane
        if first >= len(ends):
            break
        begin = int(ends[first]) - int(lengths[first])
        firsts.append(first)
        shifts.append(len(shifts) * lane + more - begin)
    return ends + np.repeat(shifts, np.diff([*firsts, len(ends)])), np.array(firsts)


def unpack(packed: Packed) -> list[np.ndarray]:
    """The inverse of `pack`, as the ONNX functions do it. FileError for what `pack` doesn't write."""
    stream = decode(packed.payload, packed.bits, packed.slots, packed.turns)
    tensors, begin = [], 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        levels = place(own, packed.advances, packed.values, math.prod(part.shape))
        shape = [part.shape[axis] for axis in part.order]
        tensors.append(np.ascontiguousarray(levels.reshape(shape).transpose(np.argsort(part.order))).reshape(part.shape))
    return tensors


def decode(payload: np.ndarray, bits: np.ndarray, slots: int, turns: np.ndarray | None) -> np.ndarray:
    """-> entries, uint8 [payload bytes * slots]: for each part of each byte the leaf it ended, counted from 1, or 0.

    turns: int8 [leaves + 1]; where it is positive a leaf leads to inner node 1, elsewhere to 2; None: all lead to the root.
    """
    bits = np.unpackbits(bits.reshape(-1)) if bits.dtype == np.uint8 else np.zeros(0, np.uint8)
    balance = np.cumsum(2 * bits.astype(np.int64) - 1)
    inner = (int(np.argmax(balance == 2)) + 1) // 2 if len(bits) else 0  # all children are there once leaves are two ahead
    whole = bits[: 2 * inner].sum() == inner + 1 and len(bits) == -(-2 * inner // 8) * 8 and bits[2 * inner :].all()
    if not (
        whole and 1 <= inner < 255 and slots in (2, 4, 8) and payload.dtype == np.uint8 and payload.ndim == 2 and payload.size
    ):
        raise FileError("the tree or the payload of the packed weights is none; the ONNX file is damaged")
    if turns is not None and (turns.dtype != np.int8 or turns.shape != (int(bits.sum()) + 1,) or bits[:2].any()):
        raise FileError("the tree of the packed weights has no two contexts; the ONNX file is damaged")
    after = np.zeros(inner + 2, np.int64) if turns is None else np.where(turns > 0, 1, 2)
    state, met = tree.automaton(bits[: 2 * inner], tree.DIGIT // slots, after)
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
