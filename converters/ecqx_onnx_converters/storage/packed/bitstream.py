"""Writes a stream: symbol sequences become codewords, and codewords become lanes of bytes.

docs/packed-format.md specifies what is written; reference_decoder.py reads it. Enters: the symbol
sequences of some tensors and the coding of their stream. Leaves: a `Packed`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.alphabets.alphabet import Alphabet
from ecqx_onnx_converters.storage.packed.alphabets.spelling import list_spellings, spell_pairs
from ecqx_onnx_converters.storage.packed.stream import (
    Coding,
    ContextModel,
    Packed,
    Part,
    SymbolSequence,
    count_slots,
)
from ecqx_onnx_converters.storage.packed.symbols import count_pairs, find_contexts

EVENED = 256  # lanes at the end of a stream that may give codewords to the last one
# Pairs, or bytes of payload, that are written at once: what is held meanwhile stays in a cache.
BLOCK = 1 << 15


def write_stream(
    sequences: Sequence[SymbolSequence], coding: Coding, lane_bytes: int, *, compact: bool
) -> Packed:
    """Write one stream.

    Args:
        sequences: Its tensors.
        coding: Its context model, symbols and codeword lengths.
        lane_bytes: Bytes of a lane, a multiple of 8.
        compact: See `Packed`.

    Returns:
        The arrays of the stream.
    """
    code = coding.build_code()
    plain = coding.context_model is ContextModel.PLAIN
    # 1. Symbols of all tensors, one after the other.
    leaves, ends, last = _encode_symbols(sequences, coding.alphabet, code)
    # 2. Tables by leaf. What is no symbol has advance and value 0: none at all, fillers, and with
    #    contexts also each 1 that fills up the tree, since a reader takes it for a leaf.
    fill = -len(code.bits) % 8
    gaps = np.full(0 if plain else fill, -1)
    symbol_ids = np.concatenate([[-1], code.symbol_ids, gaps])
    advances = np.append(-coding.alphabet.advances, 0)[symbol_ids].astype(np.int8)
    values = np.append(coding.alphabet.values, 0)[symbol_ids].astype(np.int8)
    # 3. The payload; `ends` then says where codewords end in it.
    ones = _count_trailing_ones(code, coding.context_model, values)
    payload, full = _lay_codewords(leaves, ends, code, coding.context_model, lane_bytes, ones)
    # 4. A tensor's entries end with the part of a byte in which its last codeword ends.
    width = huffman.DIGIT // count_slots(coding.shortest)
    entries = last
    if len(ends):
        entries = np.where(last > 0, -(-ends[last - 1] // width), 0)
    if full:
        entries[-1] = payload.size * huffman.DIGIT // width
    own_entries = np.diff(entries, prepend=0)
    parts = []
    for sequence, own in zip(sequences, own_entries, strict=True):
        parts.append(Part(sequence.shape, sequence.permutation, int(own)))
    return Packed(
        payload=np.ascontiguousarray(payload.T),
        bits=pack_tree(np.append(code.bits, np.ones(fill, np.uint8))),
        advances=advances,
        values=values,
        slots=count_slots(coding.shortest),
        context_model=coding.context_model,
        parts=tuple(parts),
        compact=compact,
    )


def pack_tree(bits: np.ndarray) -> np.ndarray:
    """Pack the bits of a tree.

    Args:
        bits: uint8 [8 n] of 0 and 1.

    Returns:
        uint8 [n], see `Packed.bits`.
    """
    return np.packbits(bits.reshape(8, -1), axis=0).reshape(-1)


def _encode_symbols(
    sequences: Sequence[SymbolSequence], alphabet: Alphabet, code: huffman.Code
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stream's symbols as leaves, uint8; where the codeword of each ends, in bits, if they
    follow one another; and how many there are up to the end of each tensor.
    """
    top = sequences[0].top
    # 1. The table that spells pairs, in leaves instead of symbol ids.
    leaf_of = np.zeros(len(alphabet.counts) + 1, np.int64)
    leaf_of[code.symbol_ids[code.symbol_ids >= 0]] = np.flatnonzero(code.symbol_ids >= 0)
    spelling, count = list_spellings(alphabet, top)
    spelling = leaf_of[spelling]
    # 2. Room for all symbols.
    most = int(alphabet.counts.sum())
    leaves = np.empty(most, np.uint8)
    ends = np.empty(most, np.int64)
    codewords = 0
    done = 0  # bits
    context = 0
    last = []
    for sequence in sequences:
        encoded = sequence.encoded
        # 3. The context of a tensor's first pair is what the tensor before it ends with.
        if len(encoded):
            encoded = np.append(encoded[:1] + context * count_pairs(top), encoded[1:])
            context = int(find_contexts(top)[encoded[-1] % count_pairs(top)])
        # 4. Block by block: symbols, and the sum of their codewords' lengths.
        for begin in range(0, len(encoded), BLOCK):
            symbols = spell_pairs(encoded[begin : begin + BLOCK], spelling, count)
            own = slice(codewords, codewords + len(symbols))
            leaves[own] = symbols
            np.cumsum(code.lengths[symbols], out=ends[own])
            ends[own] += done
            codewords = own.stop
            done = int(ends[codewords - 1])
        last.append(codewords)
    return leaves[:codewords], ends[:codewords], np.array(last)


def _count_trailing_ones(
    code: huffman.Code, context_model: ContextModel, values: np.ndarray
) -> np.ndarray:
    """How many ones may follow each leaf before they end a codeword.

    One fewer than the longest codeword there has, which is of ones.
    """
    trees = range(len(context_model.value))
    longest = np.array([code.lengths[code.trees == tree].max() for tree in trees])
    if context_model is not ContextModel.SIGNS:
        return np.full(len(code.lengths), longest[-1] - 1)
    tree_of = {context: tree for tree, (context, _) in enumerate(context_model.value)}
    by_sign = np.array([tree_of[0], tree_of[2], tree_of[1]])  # negative, run of zeros, positive
    behind = by_sign[np.sign(values[1 : len(code.lengths) + 1]) + 1]
    return longest[behind] - 1


def _lay_codewords(
    leaves: np.ndarray,
    ends: np.ndarray,
    code: huffman.Code,
    context_model: ContextModel,
    lane_bytes: int,
    ones: np.ndarray,
) -> tuple[np.ndarray, bool]:
    """Lay codewords into lanes: uint8 [lanes, lane_bytes], and whether nothing in it can be taken
    for a codeword behind the last one.

    leaves, ends: see `_encode_symbols`; ends are moved to where each codeword ends in the payload.
    ones: see `_count_trailing_ones`.
    """
    # 1. The path from the root to a leaf's own tree, which precedes the first codeword of a lane.
    paths = [path for _, path in context_model.value]
    heads = np.array([len(path) for path in paths])[code.trees]
    leads = np.array([int(path or "0", 2) for path in paths])[code.trees]
    # 2. The first codeword of each lane, and by how much its codewords move.
    lane = lane_bytes * 8
    firsts, full = _split_into_lanes(ends, leaves, code.lengths, heads, ones, lane)
    first = leaves[firsts].astype(np.int64) if len(leaves) else np.zeros(0, np.int64)
    lane_begins = np.arange(len(first)) * lane
    begins_before = ends[firsts[: len(first)]] - code.lengths[first]
    shifts = lane_begins + heads[first] - begins_before
    borders = np.append(firsts, len(leaves))
    # 3. Some lanes at once: codewords, then the path before the first one.
    payload = np.empty((len(firsts), lane_bytes), np.uint8)
    at_once = max(1, BLOCK // lane_bytes)
    for begin in range(0, len(firsts), at_once):
        own = payload[begin : begin + at_once]
        border = borders[begin : begin + len(own) + 1]
        codewords = leaves[border[0] : border[-1]].astype(np.int64)
        end = ends[border[0] : border[-1]]
        end += np.repeat(shifts[begin : begin + len(own)], np.diff(border)[: len(shifts)])
        starts = end - code.lengths[codewords] - begin * lane
        # The longest codeword of a context is of ones: the rest of a lane, ones, ends none.
        laid = _put_codewords(own.size, starts, codewords, code.codes, code.lengths)
        own[:] = laid.reshape(own.shape)
        if context_model is not ContextModel.PLAIN and len(codewords):
            first = codewords[border[:-1] - border[0]]
            laid = _put_codewords(own.size, np.arange(len(own)) * lane, first, leads, heads)
            own &= laid.reshape(own.shape)
    return payload, full


def _put_codewords(
    nbytes: int, starts: np.ndarray, leaves: np.ndarray, codes: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """uint8 [nbytes] of ones but for the codewords, none of which overlap.

    starts: where each begins, in bits, ascending. A codeword is the low lengths[leaf] (at most 49)
    bits of codes[leaf], high bit first.
    """
    # 1. Complements of the codewords, so that what lies between them is 0, at the high end of 64
    #    bits, moved to where they begin behind a multiple of `cell`.
    longest = int(lengths.max(initial=0))
    cell = 32 if longest <= 33 else 16
    complements = ((1 << lengths) - 1 - codes).astype(np.uint64)
    flipped = complements << (64 - np.maximum(lengths, 1)).astype(np.uint64)
    windows = np.cumsum(flipped[leaves] >> (starts & cell - 1).view(np.uint64))
    # 2. The sum of all that begin in the same cell, as the difference of running sums: right even
    #    where the sum before has passed 2**64.
    cells = starts >> (cell.bit_length() - 1)
    last = np.flatnonzero(np.append(cells[1:] != cells[:-1], len(cells) > 0))
    sums = np.diff(windows[last], prepend=np.uint64(0))
    # 3. 64 bits reach into the next cells: these share them with what begins there.
    parts = sums.astype(">u8").view(f">u{cell // 8}").reshape(-1, 64 // cell)
    zeros = np.zeros(-(-nbytes * 8 // cell) + 64 // cell, f">u{cell // 8}")
    first = cells[last]
    for offset in range(64 // cell):
        zeros[first + offset] += parts[:, offset]
    return 255 - zeros.view(np.uint8)[:nbytes]


def _split_into_lanes(
    ends: np.ndarray,
    leaves: np.ndarray,
    lengths: np.ndarray,
    heads: np.ndarray,
    ones: np.ndarray,
    lane: int,
) -> tuple[np.ndarray, bool]:
    """The first codeword of each lane of `lane` bits, and whether the last lane is safe at its end.

    No codeword crosses into another lane; the first of a lane has heads[leaf] bits before it. The
    end of the last lane is safe if the ones that fill it up end no codeword: the lanes before it
    have given it codewords for that.

    ends, leaves: of each codeword; lengths, heads, ones: of each leaf.
    """
    count = len(ends)
    if not count:
        return np.zeros(1, np.int64), False
    # Buffers and lists: single elements are read faster from them than from arrays.
    end = ends.data
    leaf = leaves.data
    length = lengths.tolist()
    before = heads.tolist()
    behind = ones.tolist()

    def find_begin(codeword: int) -> int:
        return int(end[codeword]) - length[leaf[codeword]]

    def count_rest(first: int, last: int) -> int:
        """Bits that are left of a lane of the codewords from `first` up to `last`."""
        return lane - before[leaf[first]] - (int(end[last - 1]) - find_begin(first))

    def find_next_lane(first: int) -> int:
        """The codeword behind the last that a lane from `first` on has room for."""
        limit = find_begin(first) + lane - before[leaf[first]]
        return bisect_right(end, limit, first, min(first + lane + 1, count))

    # 1. Fill each lane with as many codewords as fit.
    firsts = [0]
    while (first := find_next_lane(firsts[-1])) < count:
        firsts.append(first)
    # 2. From the end: the first codeword that the last lane can begin with, then the lane before
    #    it, and so on, until that is the stream's first or EVENED lanes are done.
    earliest = [count]
    while earliest[-1] and len(earliest) <= min(EVENED, len(firsts)):
        last = earliest[-1]
        limit = int(end[last - 1]) - lane
        first = bisect_left(end, limit, max(0, last - lane - 1), last - 1)
        first += int(find_begin(first) < limit)
        while count_rest(first, last) < 0:
            first += 1
        earliest.append(first)
    # 3. From there on: each lane gives the next one as many codewords as it can, as long as the
    #    ones that replace them end no codeword and the lanes behind still have room for all.
    moved = firsts[: len(firsts) - len(earliest) + 2]
    for least in earliest[-2:0:-1]:
        first = moved[-1]
        last = find_next_lane(first)
        while first < last - 1 >= least and count_rest(first, last - 1) <= behind[leaf[last - 2]]:
            last -= 1
        moved.append(last)
    # 4. Keep that only if it has filled the last lane.
    full = count_rest(moved[-1], count) <= behind[leaf[count - 1]]
    return np.array(moved if full else firsts), full
