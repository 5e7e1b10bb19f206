"""Surveys of int8 tensors -> one Packed; and a Packed -> the tensors: what docs/packed-format.md specifies."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.limits import may_have_size
from ecqx_onnx_converters.storage.packed import tree
from ecqx_onnx_converters.storage.packed.units import (
    MAX_KINDS,
    Alphabet,
    context_behind,
    say,
    size_of,
    spellings,
)

MOST_CALLS = 32  # of the function that reads 8 bytes of every lane; more would save little of a large file, and take time
CALL_BYTES = 35  # in the file
CUT_BYTES = 35  # of a Split that a stream of one tensor has for its rest
STAGED_FROM = 1 << 20  # weights of a file; fewer leave some megabytes behind at most, and the stage takes 150 bytes
COMPACT_BELOW = 1 << 15  # bytes of all streams, of a file that is decoded in one stage
EVENED = 256  # lanes at the end of a stream that may give words to the last one
BLOCK = 1 << 15  # pairs, or bytes of payload, that are written at once: what is held meanwhile stays in a cache
LANE_BYTES = 0.6  # its end, and the bit before its first word; rather much, since a payload is there to be short


class Form(Enum):
    """The trees of a stream from left to right, each as the context that it is for and the bits that lead to it from the root.

    Reading goes on behind a word at the root (PLAIN); or by the sign of a number of each leaf, at inner node 2 where it is
    negative, 3 where it is 0, 4 where it is positive: of its value (SIGNS) or, so that there is just one context, of its negated
    advance (STEADY). A file has either PLAIN streams or the other two.
    """

    PLAIN = ((0, ""),)
    STEADY = ((None, "0"), (0, "1"))
    SIGNS = ((2, "00"), (1, "01"), (0, "1"))


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
    """payload: uint8 [bytes of a lane, lanes]; every lane begins with a whole code word.

    bits: uint8, the tree, filled up with ones, as 8 rows: the high bits of all bytes, then the next. advances: int8 [kinds + 1],
    negated, and values: int8 [kinds + 1], of the leaves in order; both begin with 0 for no unit, and where there are contexts end
    with 0 for each one that fills up the tree. slots: entries of a byte, 2, 4 or 8. compact: functions of few bytes decode it,
    which need more memory for each bit, and 8 slots.
    """

    payload: np.ndarray
    bits: np.ndarray
    advances: np.ndarray
    values: np.ndarray
    slots: int
    form: Form
    parts: tuple[Part, ...]
    compact: bool

    @property
    def turns(self) -> np.ndarray | None:
        """By whose signs it is told where leaves lead."""
        return {Form.PLAIN: None, Form.STEADY: self.advances, Form.SIGNS: self.values}[self.form]

    @property
    def rest(self) -> int:
        """Entries behind those of the last part."""
        return self.payload.size * self.slots - sum(part.entries for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


@dataclass(frozen=True, eq=False)
class Survey:
    """A tensor as a stream says it. said: see `contextual`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    said: np.ndarray
    top: int


def top_of(tensors: Sequence[np.ndarray]) -> int:
    """The largest |level| of tensors in [-128, 127]."""
    return max(max(int(levels.max()), -int(levels.min())) for levels in tensors)


@dataclass(frozen=True, eq=False)
class Coding:
    """How a stream is said. alphabet: of all contexts for SIGNS, of one otherwise. shortest: bits that each word has at least.
    lengths: of each tree, see `tree.word_lengths`. nbytes: of words and tables, ends of lanes aside."""

    form: Form
    alphabet: Alphabet
    shortest: int
    lengths: tuple[np.ndarray, ...]
    nbytes: int

    @classmethod
    def of(cls, form: Form, alphabet: Alphabet, shortest: int) -> Coding:
        counts = [alphabet.counts[kinds] for kinds in _kinds(form, alphabet)]
        lengths = tuple(tree.word_lengths(own, shortest, alone=form is Form.PLAIN) for own in counts)
        words = sum(int((own * of[: len(own)]).sum()) for own, of in zip(counts, lengths, strict=True))
        leaves = sum(map(len, lengths))
        return cls(form, alphabet, shortest, lengths, (words + 2 * leaves - 2) // 8 + 2 * leaves + 4)

    @property
    def leaves(self) -> int:
        return sum(map(len, self.lengths))

    def code(self) -> tree.Code:
        parts = list(zip(_kinds(self.form, self.alphabet), self.lengths, strict=True))
        return tree.build(parts, [len(path) for _, path in self.form.value])


def _kinds(form: Form, alphabet: Alphabet) -> list[np.ndarray]:
    """Of each tree."""
    ends = np.cumsum(alphabet.sizes)
    begins = ends - alphabet.sizes
    return [np.arange(0 if of is None else begins[of], 0 if of is None else ends[of]) for of, _ in form.value]


def lengthened(streams: list[Coding]) -> list[Coding]:
    """streams: of a file, with words of one bit or more. -> with one, two or four bits at least.

    More of these mean fewer entries to decode: they may cost two per mille.
    """
    made = {1: streams} | {shortest: [Coding.of(how.form, how.alphabet, shortest) for how in streams] for shortest in (2, 4)}
    sizes = {
        shortest: sum(how.nbytes for how in streams)
        for shortest, streams in made.items()
        if all(how.leaves <= MAX_KINDS for how in streams)
    }
    return made[max(shortest for shortest, size in sizes.items() if 0.998 * size <= min(sizes.values()))]


def is_compact(surveys: Sequence[Survey], streams: Sequence[Coding]) -> bool:
    """See `Packed`. surveys, streams: of all tensors of a file."""
    small = sum(math.prod(survey.shape) for survey in surveys) < STAGED_FROM
    return small and sum(how.nbytes for how in streams) < COMPACT_BELOW


def write(surveys: Sequence[Survey], how: Coding, lane_bytes: int, *, compact: bool) -> Packed:
    """One stream, as `how` says it."""
    code, width = how.code(), tree.DIGIT // slots_of(how.shortest)
    leaves, ends, last = words_of(surveys, how.alphabet, code)
    fill = -len(code.bits) % 8
    gaps = np.full(fill if how.form is not Form.PLAIN else 0, -1)
    symbols = np.concatenate([[-1], code.symbols, gaps])  # what is no unit has advance and value 0
    advances, values = (np.append(of, 0)[symbols].astype(np.int8) for of in (-how.alphabet.advances, how.alphabet.values))
    payload, full = lay_words(leaves, ends, code, how.form, lane_bytes, ones_behind(code, how.form, values))
    entries = np.where(last > 0, -(-ends[last - 1] // width), 0) if len(ends) else last
    if full:
        entries[-1] = payload.size * tree.DIGIT // width
    return Packed(
        np.ascontiguousarray(payload.T),
        pack_tree(np.append(code.bits, np.ones(fill, np.uint8))),
        advances,
        values,
        slots_of(how.shortest),
        how.form,
        tuple(Part(of.shape, of.order, int(own)) for of, own in zip(surveys, np.diff(entries, prepend=0), strict=True)),
        compact,
    )


def pack_tree(bits: np.ndarray) -> np.ndarray:
    """uint8 [8 n] of 0 and 1 -> uint8 [n], see `Packed.bits`."""
    return np.packbits(bits.reshape(8, -1), axis=0).reshape(-1)


def unpack_tree(packed: np.ndarray) -> np.ndarray:
    """The inverse."""
    return np.unpackbits(packed.reshape(1, -1), axis=0).reshape(-1)


def words_of(surveys: Sequence[Survey], alphabet: Alphabet, code: tree.Code) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> the stream's leaves, uint8; where the word of each ends, in bits, if they follow one another; and how many there are up
    to the end of each tensor."""
    top, context, done = surveys[0].top, 0, 0
    leaf_of = np.zeros(len(alphabet.counts) + 1, np.int64)
    leaf_of[code.symbols[code.symbols >= 0]] = np.flatnonzero(code.symbols >= 0)
    spelling, count = spellings(alphabet, top)
    spelling = leaf_of[spelling]
    most = int(alphabet.counts.sum())
    leaves, ends, words, last = np.empty(most, np.uint8), np.empty(most, np.int64), 0, []
    for survey in surveys:
        said = survey.said
        if len(said):
            said = np.append(said[:1] + context * size_of(top), said[1:])
            context = int(context_behind(top)[said[-1] % size_of(top)])
        for begin in range(0, len(said), BLOCK):
            units = say(said[begin : begin + BLOCK], spelling, count)
            own = slice(words, words + len(units))
            leaves[own] = units
            np.cumsum(code.lengths[units], out=ends[own])
            ends[own] += done
            words, done = own.stop, int(ends[own][-1])
        last.append(words)
    return leaves[:words], ends[:words], np.array(last)


def ones_behind(code: tree.Code, form: Form, values: np.ndarray) -> np.ndarray:
    """How many ones may follow each leaf before they end a word: one fewer than the longest word there has, which is of ones."""
    longest = np.array([code.lengths[code.trees == of].max() for of in range(len(form.value))])
    if form is not Form.SIGNS:
        return np.full(len(code.lengths), longest[-1] - 1)
    place = {context: of for of, (context, _) in enumerate(form.value)}
    behind = np.array([place[0], place[2], place[1]])[np.sign(values[1 : len(code.lengths) + 1]) + 1]
    return longest[behind] - 1


def lay_words(
    leaves: np.ndarray, ends: np.ndarray, code: tree.Code, form: Form, lane_bytes: int, ones: np.ndarray
) -> tuple[np.ndarray, bool]:
    """leaves, ends: see `words_of`; ends are moved to where each word ends in what is returned: uint8 [lanes, lane_bytes]; and
    whether nothing in it can be taken for a word behind the last one. ones: see `ones_behind`."""
    paths = [path for _, path in form.value]
    heads = np.array([len(path) for path in paths])[code.trees]
    leads = np.array([int(path or "0", 2) for path in paths])[code.trees]  # the way from the root to a leaf's own tree
    lane = lane_bytes * 8
    firsts, full = in_lanes(ends, leaves, code.lengths, heads, ones, lane)
    first = leaves[firsts].astype(np.int64) if len(leaves) else np.zeros(0, np.int64)
    shifts = np.arange(len(first)) * lane + heads[first] + code.lengths[first] - ends[firsts[: len(first)]]
    borders = np.append(firsts, len(leaves))
    payload = np.empty((len(firsts), lane_bytes), np.uint8)
    at_once = max(1, BLOCK // lane_bytes)
    for begin in range(0, len(firsts), at_once):
        own = payload[begin : begin + at_once]
        border = borders[begin : begin + len(own) + 1]
        words, end = leaves[border[0] : border[-1]].astype(np.int64), ends[border[0] : border[-1]]
        end += np.repeat(shifts[begin : begin + len(own)], np.diff(border)[: len(shifts)])
        starts = end - code.lengths[words] - begin * lane
        # A word of ones is the longest of its context: the rest of a lane, ones, ends none.
        own[:] = put_words(own.size, starts, words, code.codes, code.lengths).reshape(own.shape)
        if form is not Form.PLAIN and len(words):
            first = words[border[:-1] - border[0]]
            own &= put_words(own.size, np.arange(len(own)) * lane, first, leads, heads).reshape(own.shape)
    return payload, full


def slots_of(shortest: int) -> int:
    return tree.DIGIT // shortest


def best_calls(size: int, streams: int) -> int:
    """How often the decoder calls the function that reads 8 bytes of every lane; a lane has as many bytes as they all read.

    size: bytes of all streams. Each call takes CALL_BYTES of the file, each lane wastes LANE_BYTES, and of the last one of a
    stream half is empty.
    """

    def cost(calls: int) -> float:
        lane = tree.DIGIT * calls
        return CALL_BYTES * calls + LANE_BYTES * size / lane + streams * lane / 2

    return min(range(1, MOST_CALLS + 1), key=cost)


def put_words(nbytes: int, starts: np.ndarray, leaves: np.ndarray, codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint8 [nbytes] of ones but for the words, none of which overlap: from each of `starts` on, in bits and ascending, the low
    lengths[leaf] (at most 49) bits of codes[leaf], high bit first."""
    # The words' complements, each in 64 bits that begin at a multiple of `cell`, are added up; so are those that share it.
    longest = int(lengths.max(initial=0))
    cell = 32 if longest <= 33 else 16
    flipped = ((1 << lengths) - 1 - codes).astype(np.uint64) << (64 - np.maximum(lengths, 1)).astype(np.uint64)
    windows = np.cumsum(flipped[leaves] >> (starts & cell - 1).view(np.uint64))
    cells = starts >> (cell.bit_length() - 1)
    last = np.flatnonzero(np.append(cells[1:] != cells[:-1], len(cells) > 0))
    sums = np.diff(windows[last], prepend=np.uint64(0))  # right even where the sum before has passed 2**64
    parts = sums.astype(">u8").view(f">u{cell // 8}").reshape(-1, 64 // cell)
    zeros, first = np.zeros(-(-nbytes * 8 // cell) + 64 // cell, f">u{cell // 8}"), cells[last]
    for offset in range(64 // cell):
        zeros[first + offset] += parts[:, offset]
    return 255 - zeros.view(np.uint8)[:nbytes]


def in_lanes(
    ends: np.ndarray, leaves: np.ndarray, lengths: np.ndarray, heads: np.ndarray, ones: np.ndarray, lane: int
) -> tuple[np.ndarray, bool]:
    """The first word of each lane of `lane` bits: no word crosses into another lane, the first has heads[leaf] bits before it.
    And whether the ones that fill up the last lane end no word: the lanes before it have given it words for that.

    ends: of each word; leaves: of each word; lengths, heads, ones: of each leaf.
    """
    count = len(ends)
    if not count:
        return np.zeros(1, np.int64), False
    end, leaf, length, before, behind = ends.data, leaves.data, lengths.tolist(), heads.tolist(), ones.tolist()

    def begin(word: int) -> int:
        return int(end[word]) - length[leaf[word]]

    def rest(first: int, last: int) -> int:
        """Bits that are left of a lane of the words from `first` up to `last`."""
        return lane - before[leaf[first]] - (int(end[last - 1]) - begin(first))

    def full_lane(first: int) -> int:
        """The word behind the last that a lane from `first` on has room for."""
        return bisect_right(end, begin(first) + lane - before[leaf[first]], first, min(first + lane + 1, count))

    firsts = [0]
    while (first := full_lane(firsts[-1])) < count:
        firsts.append(first)
    earliest = [count]  # of the last lane the first word that it can begin with, of the one before it, and so on
    while earliest[-1] and len(earliest) <= min(EVENED, len(firsts)):
        last = earliest[-1]
        first = bisect_left(end, int(end[last - 1]) - lane, max(0, last - lane - 1), last - 1)
        first += int(begin(first) < int(end[last - 1]) - lane)
        while rest(first, last) < 0:
            first += 1
        earliest.append(first)
    moved = firsts[: len(firsts) - len(earliest) + 2]
    for least in earliest[-2:0:-1]:
        first, last = moved[-1], full_lane(moved[-1])
        while first < last - 1 >= least and rest(first, last - 1) <= behind[leaf[last - 2]]:
            last -= 1
        moved.append(last)
    full = rest(moved[-1], count) <= behind[leaf[count - 1]]
    return np.array(moved if full else firsts), full


def unpack(packed: Packed) -> list[np.ndarray]:
    """The inverse of `write`, as the ONNX functions do it. FileError for what `write` doesn't."""
    after = None if packed.turns is None else next_nodes(packed.turns)
    stream = decode(packed.payload, unpack_tree(packed.bits), packed.slots, after)
    tensors, begin = [], 0
    for part in packed.parts:
        own = stream[begin : begin + part.entries]
        begin += part.entries
        levels = place(own, packed.advances, packed.values, math.prod(part.shape))
        shape = [part.shape[axis] for axis in part.order]
        tensors.append(np.ascontiguousarray(levels.reshape(shape).transpose(np.argsort(part.order))).reshape(part.shape))
    return tensors


def next_nodes(turns: np.ndarray) -> np.ndarray:
    """The inner node that each leaf leads to."""
    return 3 + np.sign(turns.astype(np.int64))


def decode(payload: np.ndarray, bits: np.ndarray, slots: int, after: np.ndarray | None) -> np.ndarray:
    """payload: uint8 [bytes of a lane, lanes]; bits: uint8, the tree, of 0 and 1. -> entries, uint8 [payload bytes * slots]: for
    each part of each byte the leaf it ended, counted from 1, or 0.

    after: int [leaves + 1], see `next_nodes`; None: all lead to the root. FileError for what is damaged.
    """
    balance = np.cumsum(2 * bits.astype(np.int64) - 1)
    inner = (int(np.argmax(balance == 2)) + 1) // 2 if len(bits) else 0  # all children are there once leaves are two ahead
    whole = bits[: 2 * inner].sum() == inner + 1 and len(bits) == -(-2 * inner // 8) * 8 and bits[2 * inner :].all()
    if not (
        whole and 1 <= inner < 255 and slots in (2, 4, 8) and payload.dtype == np.uint8 and payload.ndim == 2 and payload.size
    ):
        raise FileError("the tree or the payload of the packed weights is none; the ONNX file is damaged")
    if after is None:
        after = np.zeros(int(bits.sum()) + 1, np.int64)
    elif after.shape != (int(bits.sum()) + 1,) or after.max() >= len(bits) // 2:
        raise FileError("the tree of the packed weights has no such contexts; the ONNX file is damaged")
    state, met = tree.automaton(bits, tree.DIGIT // slots, after)
    rows, lanes = payload.shape
    entries = np.empty((lanes, rows, slots), np.uint8)
    met, state, here = met.astype(np.uint8), state * 256, np.zeros(lanes, np.int64)
    for row in range(rows):
        index = here + payload[row]
        entries[:, row] = met[index]
        here = state[index]
    return entries.reshape(-1)


def place(entries: np.ndarray, advances: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """A tensor's entries and the tables of its group -> int8 levels [size] in coding order."""
    fits = advances.dtype == values.dtype == np.int8 and advances.ndim == 1 and advances.shape == values.shape
    if not fits or int(entries.max(initial=0)) >= len(advances) or advances.max(initial=0) > 0:
        raise FileError("the tables of the packed weights have no such units; the ONNX file is damaged")
    if not may_have_size(size, len(entries)):
        raise FileError(f"{len(entries)} entries claim a packed tensor of {size} weights; the ONNX file is damaged")
    cursor = np.cumsum(advances.astype(np.int64)[entries])
    if len(cursor) and cursor[-1] < -size:
        raise FileError(f"the packed weights move past a tensor of {size}; the ONNX file is damaged")
    levels = np.zeros(size, np.int8)
    found = values[entries]
    named = np.flatnonzero(found)
    np.add.at(levels, cursor[named], found[named])  # each index once, unless damaged
    return levels
