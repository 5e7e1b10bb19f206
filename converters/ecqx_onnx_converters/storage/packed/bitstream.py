"""Surveys of int8 tensors -> one Packed; and a Packed -> the tensors: what docs/packed-format.md specifies."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.stream import (
    Coding,
    ContextModel,
    Packed,
    Part,
    SymbolSequence,
    count_slots,
)
from ecqx_onnx_converters.storage.packed.symbols import (
    Alphabet,
    count_pairs,
    find_contexts,
    list_spellings,
    spell_pairs,
)

EVENED = 256  # lanes at the end of a stream that may give words to the last one
BLOCK = (
    1 << 15
)  # pairs, or bytes of payload, that are written at once: what is held meanwhile stays in a cache


def write_stream(
    sequences: Sequence[SymbolSequence], coding: Coding, lane_bytes: int, *, compact: bool
) -> Packed:
    """One stream, as `coding` says it."""
    code, width = coding.code(), huffman.DIGIT // count_slots(coding.shortest)
    leaves, ends, last = encode_symbols(sequences, coding.alphabet, code)
    fill = -len(code.bits) % 8
    gaps = np.full(fill if coding.context_model is not ContextModel.PLAIN else 0, -1)
    symbol_ids = np.concatenate(
        [[-1], code.symbol_ids, gaps]
    )  # what is no unit has advance and value 0
    advances, values = (
        np.append(of, 0)[symbol_ids].astype(np.int8)
        for of in (-coding.alphabet.advances, coding.alphabet.values)
    )
    payload, full = lay_codewords(
        leaves,
        ends,
        code,
        coding.context_model,
        lane_bytes,
        count_trailing_ones(code, coding.context_model, values),
    )
    entries = np.where(last > 0, -(-ends[last - 1] // width), 0) if len(ends) else last
    if full:
        entries[-1] = payload.size * huffman.DIGIT // width
    return Packed(
        np.ascontiguousarray(payload.T),
        pack_tree(np.append(code.bits, np.ones(fill, np.uint8))),
        advances,
        values,
        count_slots(coding.shortest),
        coding.context_model,
        tuple(
            Part(of.shape, of.permutation, int(own))
            for of, own in zip(sequences, np.diff(entries, prepend=0), strict=True)
        ),
        compact,
    )


def pack_tree(bits: np.ndarray) -> np.ndarray:
    """uint8 [8 n] of 0 and 1 -> uint8 [n], see `Packed.bits`."""
    return np.packbits(bits.reshape(8, -1), axis=0).reshape(-1)


def encode_symbols(
    sequences: Sequence[SymbolSequence], alphabet: Alphabet, code: huffman.Code
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> the stream's leaves, uint8; where the word of each ends, in bits, if they follow one another; and how many there are up
    to the end of each tensor."""
    top, context, done = sequences[0].top, 0, 0
    leaf_of = np.zeros(len(alphabet.counts) + 1, np.int64)
    leaf_of[code.symbol_ids[code.symbol_ids >= 0]] = np.flatnonzero(code.symbol_ids >= 0)
    spelling, count = list_spellings(alphabet, top)
    spelling = leaf_of[spelling]
    most = int(alphabet.counts.sum())
    leaves, ends, codewords, last = np.empty(most, np.uint8), np.empty(most, np.int64), 0, []
    for sequence in sequences:
        encoded = sequence.encoded
        if len(encoded):
            encoded = np.append(encoded[:1] + context * count_pairs(top), encoded[1:])
            context = int(find_contexts(top)[encoded[-1] % count_pairs(top)])
        for begin in range(0, len(encoded), BLOCK):
            symbols = spell_pairs(encoded[begin : begin + BLOCK], spelling, count)
            own = slice(codewords, codewords + len(symbols))
            leaves[own] = symbols
            np.cumsum(code.lengths[symbols], out=ends[own])
            ends[own] += done
            codewords, done = own.stop, int(ends[own][-1])
        last.append(codewords)
    return leaves[:codewords], ends[:codewords], np.array(last)


def count_trailing_ones(
    code: huffman.Code, context_model: ContextModel, values: np.ndarray
) -> np.ndarray:
    """How many ones may follow each leaf before they end a codeword: one fewer than the longest word there has, which is of
    ones."""
    longest = np.array(
        [code.lengths[code.trees == of].max() for of in range(len(context_model.value))]
    )
    if context_model is not ContextModel.SIGNS:
        return np.full(len(code.lengths), longest[-1] - 1)
    place = {context: of for of, (context, _) in enumerate(context_model.value)}
    behind = np.array([place[0], place[2], place[1]])[
        np.sign(values[1 : len(code.lengths) + 1]) + 1
    ]
    return longest[behind] - 1


def lay_codewords(
    leaves: np.ndarray,
    ends: np.ndarray,
    code: huffman.Code,
    context_model: ContextModel,
    lane_bytes: int,
    ones: np.ndarray,
) -> tuple[np.ndarray, bool]:
    """leaves, ends: see `encode_symbols`; ends are moved to where each word ends in what is returned: uint8 [lanes,
    lane_bytes]; and
    whether nothing in it can be taken for a word behind the last one. ones: see `count_trailing_ones`."""
    paths = [path for _, path in context_model.value]
    heads = np.array([len(path) for path in paths])[code.trees]
    leads = np.array([int(path or "0", 2) for path in paths])[
        code.trees
    ]  # the way from the root to a leaf's own tree
    lane = lane_bytes * 8
    firsts, full = split_into_lanes(ends, leaves, code.lengths, heads, ones, lane)
    first = leaves[firsts].astype(np.int64) if len(leaves) else np.zeros(0, np.int64)
    shifts = (
        np.arange(len(first)) * lane
        + heads[first]
        + code.lengths[first]
        - ends[firsts[: len(first)]]
    )
    borders = np.append(firsts, len(leaves))
    payload = np.empty((len(firsts), lane_bytes), np.uint8)
    at_once = max(1, BLOCK // lane_bytes)
    for begin in range(0, len(firsts), at_once):
        own = payload[begin : begin + at_once]
        border = borders[begin : begin + len(own) + 1]
        codewords, end = (
            leaves[border[0] : border[-1]].astype(np.int64),
            ends[border[0] : border[-1]],
        )
        end += np.repeat(shifts[begin : begin + len(own)], np.diff(border)[: len(shifts)])
        starts = end - code.lengths[codewords] - begin * lane
        # A word of ones is the longest of its context: the rest of a lane, ones, ends none.
        own[:] = put_codewords(own.size, starts, codewords, code.codes, code.lengths).reshape(
            own.shape
        )
        if context_model is not ContextModel.PLAIN and len(codewords):
            first = codewords[border[:-1] - border[0]]
            own &= put_codewords(own.size, np.arange(len(own)) * lane, first, leads, heads).reshape(
                own.shape
            )
    return payload, full


def put_codewords(
    nbytes: int, starts: np.ndarray, leaves: np.ndarray, codes: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """uint8 [nbytes] of ones but for the words, none of which overlap: from each of `starts` on, in bits and ascending, the low
    lengths[leaf] (at most 49) bits of codes[leaf], high bit first."""
    # The words' complements, each in 64 bits that begin at a multiple of `cell`, are added up; so are those that share it.
    longest = int(lengths.max(initial=0))
    cell = 32 if longest <= 33 else 16
    flipped = ((1 << lengths) - 1 - codes).astype(np.uint64) << (
        64 - np.maximum(lengths, 1)
    ).astype(np.uint64)
    windows = np.cumsum(flipped[leaves] >> (starts & cell - 1).view(np.uint64))
    cells = starts >> (cell.bit_length() - 1)
    last = np.flatnonzero(np.append(cells[1:] != cells[:-1], len(cells) > 0))
    sums = np.diff(
        windows[last], prepend=np.uint64(0)
    )  # right even where the sum before has passed 2**64
    parts = sums.astype(">u8").view(f">u{cell // 8}").reshape(-1, 64 // cell)
    zeros, first = np.zeros(-(-nbytes * 8 // cell) + 64 // cell, f">u{cell // 8}"), cells[last]
    for offset in range(64 // cell):
        zeros[first + offset] += parts[:, offset]
    return 255 - zeros.view(np.uint8)[:nbytes]


def split_into_lanes(
    ends: np.ndarray,
    leaves: np.ndarray,
    lengths: np.ndarray,
    heads: np.ndarray,
    ones: np.ndarray,
    lane: int,
) -> tuple[np.ndarray, bool]:
    """The first word of each lane of `lane` bits: no word crosses into another lane, the first has heads[leaf] bits before it.
    And whether the ones that fill up the last lane end no codeword: the lanes before it have given it words for that.

    ends: of each word; leaves: of each word; lengths, heads, ones: of each leaf.
    """
    count = len(ends)
    if not count:
        return np.zeros(1, np.int64), False
    end, leaf, length, before, behind = (
        ends.data,
        leaves.data,
        lengths.tolist(),
        heads.tolist(),
        ones.tolist(),
    )

    def begin(codeword: int) -> int:
        return int(end[codeword]) - length[leaf[codeword]]

    def rest(first: int, last: int) -> int:
        """Bits that are left of a lane of the words from `first` up to `last`."""
        return lane - before[leaf[first]] - (int(end[last - 1]) - begin(first))

    def full_lane(first: int) -> int:
        """The word behind the last that a lane from `first` on has room for."""
        return bisect_right(
            end, begin(first) + lane - before[leaf[first]], first, min(first + lane + 1, count)
        )

    firsts = [0]
    while (first := full_lane(firsts[-1])) < count:
        firsts.append(first)
    earliest = [
        count
    ]  # of the last lane the first word that it can begin with, of the one before it, and so on
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
