"""Which tensors of a file share a stream, and how each stream is said.

A stream has tables of its own, so that tensors whose levels are spread alike belong together: pairs of streams are joined as long
as that saves bytes, by an estimate: only of a small file one stream is really tried beside those that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed.choices import (
    choose_calls,
    choose_min_codeword_length,
    is_compact,
)
from ecqx_onnx_converters.storage.packed.huffman import DIGIT
from ecqx_onnx_converters.storage.packed.stream import Coding, ContextModel, SymbolSequence
from ecqx_onnx_converters.storage.packed.symbols import (
    NEAR,
    Alphabet,
    choose_alphabets,
    count_pairs_by_context,
)

STREAM_BYTES = 125  # what one more stream takes in the file, its payload and tables aside
STEP_BYTES = 3  # and what it must save for each step that a runtime takes for it at load
CONTEXTS_BYTES = 135  # a decoder of several contexts
FEW = (
    3 << 14
)  # pairs, about 32 kB, before it is known how many. Of fewer, one stream and several alphabets are tried
ALIKE_BYTES = 8  # by which ways to say a stream hardly differ
SYMBOL_BITS, APART_BITS = (
    22,
    9,
)  # what a pair takes that has a kind of its own, about; and each time that it is said with others


def arrange(sequences: Sequence[SymbolSequence]) -> tuple[list[tuple[list[int], Coding]], bool]:
    """-> the streams: indices of their tensors, ascending, and how they are said. One, or PLAIN, where more saves too little. And
    whether they are compact, see `stream.Packed`."""
    tallies = [count_pairs_by_context(sequence.encoded, sequence.top) for sequence in sequences]
    groups, apart = group_tensors(tallies)
    candidates = [list_codings(tallies, members, NEAR[0]) for members in groups]
    few = sum(len(sequence.encoded) for sequence in sequences) < FEW
    if few and len(groups) > 1:
        everything = list(range(len(sequences)))
        whole = [list_codings(tallies, everything, NEAR[0])]
        if choose_codings(whole)[1] <= choose_codings(candidates)[1] + (len(groups) - 1) * apart:
            groups, candidates = [everything], whole
    for near in NEAR[1:] if few else ():
        others = (list_codings(tallies, members, near) for members in groups)
        candidates = [
            tuple(map(choose_smaller, *pair)) for pair in zip(candidates, others, strict=True)
        ]
    streams, _ = choose_codings(candidates)
    compact = is_compact(sequences, streams)
    return list(
        zip(groups, streams if compact else choose_min_codeword_length(streams), strict=True)
    ), compact


def list_codings(
    tallies: Sequence[np.ndarray], members: Sequence[int], near: int
) -> tuple[Coding, ...]:
    """How a group of tensors is encoded: PLAIN, and in a file of several contexts. near: see `symbols.NEAR`."""
    alphabets = choose_alphabets([tallies[member] for member in members], near)
    return Coding.of(ContextModel.PLAIN, alphabets[0], shortest=1), choose_contexts(alphabets)


def choose_smaller(one: Coding, other: Coding) -> Coding:
    return other if other.nbytes < one.nbytes - ALIKE_BYTES else one


def choose_codings(candidates: Sequence[tuple[Coding, ...]]) -> tuple[list[Coding], int]:
    """candidates: of each stream. -> those of the file, and their bytes, what several contexts take included."""
    plain, with_contexts = (list(of) for of in zip(*candidates, strict=True))
    sizes = (
        sum(coding.nbytes for coding in plain),
        sum(coding.nbytes for coding in with_contexts) + CONTEXTS_BYTES,
    )
    return (with_contexts if sizes[1] < sizes[0] else plain), min(sizes)


def choose_contexts(alphabets: Sequence[Alphabet]) -> Coding:
    """Of one context in its place or, where there is an alphabet for that and it saves something, of all."""
    candidates = zip((ContextModel.STEADY, ContextModel.SIGNS), alphabets, strict=False)
    return min(
        (Coding.of(context_model, alphabet, shortest=1) for context_model, alphabet in candidates),
        key=lambda candidate: candidate.nbytes,
    )


def group_tensors(counts: Sequence[np.ndarray]) -> tuple[list[list[int]], int]:
    """counts: of each tensor, see `count_pairs_by_context`. Joins the pair of groups that saves most, about, until none does.
    -> groups, and the
    bytes that one more costs."""
    tables = np.stack([of.reshape(len(of), -1) for of in counts])
    often = (
        tables.sum(axis=(0, 1)) * APART_BITS > SYMBOL_BITS
    )  # others never have kinds of their own
    tables = np.concatenate([tables[:, :, often], tables.sum(axis=2, keepdims=True)], axis=2)
    tables = np.concatenate([tables, tables.sum(axis=1, keepdims=True)], axis=1, dtype=np.float32)
    whole = tables.sum(axis=0)
    size = float(estimate_sizes(whole)) + APART_BITS / 8 * float(whole[-1, -1])
    apart = STREAM_BYTES + STEP_BYTES * DIGIT * choose_calls(round(size), 1)
    members, sizes, left = (
        [[index] for index in range(len(tables))],
        estimate_sizes(tables),
        np.ones(len(tables), bool),
    )
    saving = np.full((len(tables), len(tables)), -1.0)
    for one in range(len(tables)):
        saving[one, :one] = (
            sizes[one] + sizes[:one] + apart - estimate_sizes(tables[one] + tables[:one])
        )
    while saving.max(initial=0) > 0:
        other, one = divmod(int(saving.argmax()), len(tables))
        members[one] = sorted(members[one] + members[other])
        tables[one] += tables[other]
        sizes[one] += sizes[other] + apart - saving[other, one]
        left[other] = False
        saving[[one, other]] = saving[:, [one, other]] = -1
        rest = np.flatnonzero(left & (np.arange(len(left)) != one))
        saving[np.maximum(one, rest), np.minimum(one, rest)] = (
            sizes[one] + sizes[rest] + apart - estimate_sizes(tables[one] + tables[rest])
        )
    return [members[index] for index in np.flatnonzero(left)], apart


def estimate_sizes(tables: np.ndarray) -> np.ndarray:
    """Bytes of streams with all contexts or one, less what they take if no pair has a kind of its own. tables: how often pairs
    occur, in each context and at last in all together; at the end of each row how many there are, rare ones included."""
    saved = np.maximum(tables[..., :-1], 1)
    saved *= 2**APART_BITS / np.maximum(tables[..., -1:], 1)
    saved = np.log(saved, out=saved)  # numpy's logarithm to base 2 takes twice as long
    saved *= tables[..., :-1]
    saved -= SYMBOL_BITS * math.log(2)
    sizes = np.maximum(saved, 0, out=saved) @ np.ones(saved.shape[-1], np.float32)
    return np.maximum(sizes[..., :-1].sum(axis=-1), sizes[..., -1]) * (-1 / 8 / math.log(2))
