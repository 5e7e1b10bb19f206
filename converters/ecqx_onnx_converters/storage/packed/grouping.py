"""Decides which tensors of a file share a stream, and how each stream is coded.

A stream has tables of its own, so that tensors whose levels are spread alike belong together: pairs
of streams are joined as long as that saves bytes, by an estimate. Only of a small file, one stream
is really tried beside those that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed.alphabets.alphabet import NEAR, Alphabet, choose_alphabets
from ecqx_onnx_converters.storage.packed.choices import (
    choose_calls,
    choose_min_codeword_length,
    is_compact,
)
from ecqx_onnx_converters.storage.packed.huffman import DIGIT
from ecqx_onnx_converters.storage.packed.stream import Coding, ContextModel, SymbolSequence
from ecqx_onnx_converters.storage.packed.symbols import count_pairs_by_context

STREAM_BYTES = 125  # what one more stream takes in the file, its payload and tables aside
STEP_BYTES = 3  # and what it must save for each step that a runtime takes for it at load
CONTEXTS_BYTES = 135  # a decoder of several contexts
# Pairs, about 32 kB, before it is known how many bytes. Of fewer, one stream and several alphabets
# are tried.
FEW = 3 << 14
MIN_GAIN_BYTES = 8  # switch to another alphabet only above this
SYMBOL_BITS = 22  # what a pair takes that is a symbol of its own, about
APART_BITS = 9  # and each time that it is spelled with others


def arrange(sequences: Sequence[SymbolSequence]) -> tuple[list[tuple[list[int], Coding]], bool]:
    """Group the tensors of a file into streams.

    Args:
        sequences: All tensors of the file.

    Returns:
        Of each stream the ascending indices of its tensors, and its coding; one stream, or PLAIN
        ones, where more saves too little. And whether the streams are compact, see `stream.Packed`.
    """
    # 1. Groups by an estimate, each with its best alphabets.
    tallies = [count_pairs_by_context(sequence.encoded, sequence.top) for sequence in sequences]
    groups, apart = _group_tensors(tallies)
    candidates = [_list_codings(tallies, members, NEAR[0]) for members in groups]
    few = sum(len(sequence.encoded) for sequence in sequences) < FEW
    # 2. A small file: is one stream better after all?
    if few and len(groups) > 1:
        everything = list(range(len(sequences)))
        single = [_list_codings(tallies, everything, NEAR[0])]
        _, single_bytes = _choose_codings(single)
        _, several_bytes = _choose_codings(candidates)
        if single_bytes <= several_bytes + (len(groups) - 1) * apart:
            groups = [everything]
            candidates = single
    # 3. A small file: other alphabets to begin with.
    if few:
        for near in NEAR[1:]:
            for index, members in enumerate(groups):
                others = _list_codings(tallies, members, near)
                candidates[index] = tuple(map(_choose_smaller, candidates[index], others))
    # 4. Contexts or none, compact or longer codewords: the same for all streams of a file.
    streams, _ = _choose_codings(candidates)
    compact = is_compact(sequences, streams)
    if not compact:
        streams = choose_min_codeword_length(streams)
    return list(zip(groups, streams, strict=True)), compact


def _list_codings(
    tallies: Sequence[np.ndarray], members: Sequence[int], near: int
) -> tuple[Coding, ...]:
    """A group's coding as PLAIN, and its coding in a file of several contexts."""
    alphabets = choose_alphabets([tallies[member] for member in members], near)
    plain = Coding.of(ContextModel.PLAIN, alphabets[0], shortest=1)
    return plain, _choose_contexts(alphabets)


def _choose_smaller(one: Coding, other: Coding) -> Coding:
    """The other only if it saves more than the decoder may differ by."""
    return other if other.nbytes < one.nbytes - MIN_GAIN_BYTES else one


def _choose_codings(candidates: Sequence[tuple[Coding, ...]]) -> tuple[list[Coding], int]:
    """The codings of a file's streams, and their bytes, what several contexts take included."""
    plain = [coding for coding, _ in candidates]
    with_contexts = [coding for _, coding in candidates]
    plain_bytes = sum(coding.nbytes for coding in plain)
    contexts_bytes = sum(coding.nbytes for coding in with_contexts) + CONTEXTS_BYTES
    if contexts_bytes < plain_bytes:
        return with_contexts, contexts_bytes
    return plain, plain_bytes


def _choose_contexts(alphabets: Sequence[Alphabet]) -> Coding:
    """One context, or, where there is an alphabet for that and it saves something, all of them."""
    best = Coding.of(ContextModel.STEADY, alphabets[0], shortest=1)
    for alphabet in alphabets[1:]:
        signs = Coding.of(ContextModel.SIGNS, alphabet, shortest=1)
        if signs.nbytes < best.nbytes:
            best = signs
    return best


def _group_tensors(counts: Sequence[np.ndarray]) -> tuple[list[list[int]], int]:
    """Groups of tensors, and the bytes that one more costs.

    counts: of each tensor, see `count_pairs_by_context`. Joins the pair of groups that saves most,
    about, until none does.
    """
    # 1. Tables [tensors, contexts + 1, pairs + 1]: the last context is all together, the last
    #    pair is the sum of all. A pair too rare to be a symbol ever counts in the sum only.
    tables = np.stack([of.reshape(len(of), -1) for of in counts])
    often = tables.sum(axis=(0, 1)) * APART_BITS > SYMBOL_BITS
    tables = np.concatenate([tables[:, :, often], tables.sum(axis=2, keepdims=True)], axis=2)
    tables = np.concatenate([tables, tables.sum(axis=1, keepdims=True)], axis=1, dtype=np.float32)
    # 2. What a group of its own costs, from the size of one stream of all.
    whole = tables.sum(axis=0)
    size = float(_estimate_sizes(whole)) + APART_BITS / 8 * float(whole[-1, -1])
    apart = STREAM_BYTES + STEP_BYTES * DIGIT * choose_calls(round(size), 1)
    # 3. What joining each two groups saves.
    members = [[index] for index in range(len(tables))]
    sizes = _estimate_sizes(tables)
    left = np.ones(len(tables), bool)
    saving = np.full((len(tables), len(tables)), -1.0)
    for one in range(len(tables)):
        joined = _estimate_sizes(tables[one] + tables[:one])
        saving[one, :one] = sizes[one] + sizes[:one] + apart - joined
    # 4. Join the best two, and estimate anew only what has to do with them.
    while saving.max(initial=0) > 0:
        other, one = divmod(int(saving.argmax()), len(tables))
        members[one] = sorted(members[one] + members[other])
        tables[one] += tables[other]
        sizes[one] += sizes[other] + apart - saving[other, one]
        left[other] = False
        saving[[one, other]] = -1
        saving[:, [one, other]] = -1
        rest = np.flatnonzero(left & (np.arange(len(left)) != one))
        joined = _estimate_sizes(tables[one] + tables[rest])
        later = np.maximum(one, rest)
        earlier = np.minimum(one, rest)
        saving[later, earlier] = sizes[one] + sizes[rest] + apart - joined
    return [members[index] for index in np.flatnonzero(left)], apart


def _estimate_sizes(tables: np.ndarray) -> np.ndarray:
    """Bytes of streams with all contexts or one, less what they take if no pair is a symbol.

    A pair that occurs n times of N saves n (APART_BITS + log2(n / N)) - SYMBOL_BITS bits if it
    becomes a symbol, or nothing.

    tables: [..., contexts + 1, pairs + 1], see `_group_tensors`.
    """
    saved = np.maximum(tables[..., :-1], 1)
    saved *= 2**APART_BITS / np.maximum(tables[..., -1:], 1)
    saved = np.log(saved, out=saved)  # numpy's logarithm to base 2 takes twice as long
    saved *= tables[..., :-1]
    saved -= SYMBOL_BITS * math.log(2)
    sizes = np.maximum(saved, 0, out=saved) @ np.ones(saved.shape[-1], np.float32)
    return np.maximum(sizes[..., :-1].sum(axis=-1), sizes[..., -1]) * (-1 / 8 / math.log(2))
