"""Which tensors of a file share a stream, and how each stream is said.

A stream has tables of its own, so that tensors whose levels are spread alike belong together: pairs of streams are joined as long
as that saves bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed.codec import Coding, Form, Survey, best_calls, codings
from ecqx_onnx_converters.storage.packed.tree import DIGIT
from ecqx_onnx_converters.storage.packed.units import Alphabet, choose_alphabets

STREAM_BYTES = 140  # what one more stream takes in the file, its payload and tables aside
STEP_BYTES = 3  # and what it must save for each step that a runtime takes for it at load
CONTEXTS_BYTES = 130  # a decoder of several contexts
KIND_BITS, APART_BITS = 22, 9  # what a pair takes that has a kind of its own, about; and each time that it is said with others


def arrange(surveys: Sequence[Survey]) -> list[tuple[list[int], Coding]]:
    """-> the streams: indices of their tensors, ascending, and how they are said. One, or PLAIN, where more saves too little."""
    tallies = [survey.tally() for survey in surveys]
    whole = choose_alphabets(tallies)
    plain = Coding.of(Form.PLAIN, whole[0], shortest=1)
    apart = STREAM_BYTES + STEP_BYTES * DIGIT * best_calls(plain.nbytes, 1)
    groups = _groups([counts for counts, _ in tallies], apart)
    everything = [list(range(len(surveys)))]
    ways = [(everything, [plain]), (everything, [_turning(whole)])]
    if len(groups) > 1:
        alphabets = [choose_alphabets([tallies[member] for member in members]) for members in groups]
        ways.append((groups, [Coding.of(Form.PLAIN, own[0], shortest=1) for own in alphabets]))
        ways.append((groups, [_turning(own) for own in alphabets]))

    def cost(way: tuple[list[list[int]], list[Coding]]) -> int:
        streams = way[1]
        turns = CONTEXTS_BYTES if streams[0].form is not Form.PLAIN else 0
        return sum(how.nbytes for how in streams) + apart * len(streams) + turns

    groups, streams = min(ways, key=cost)
    return list(zip(groups, codings([(how.form, how.alphabet) for how in streams]), strict=True))


def _turning(alphabets: Sequence[Alphabet]) -> Coding:
    """Of one context in its place or, where there is an alphabet for that and it saves something, of all."""
    ways = zip((Form.STEADY, Form.SIGNS), alphabets, strict=False)
    return min((Coding.of(form, alphabet, shortest=1) for form, alphabet in ways), key=lambda way: way.nbytes)


def _groups(counts: Sequence[np.ndarray], apart: int) -> list[list[int]]:
    """counts: of each tensor, see `tally`; apart: bytes that each group costs. Joins the pair of groups that saves most, until
    none does."""
    tables = np.stack([of.reshape(len(of), -1) for of in counts])
    tables = tables[:, :, tables.any(axis=(0, 1))].astype(np.float32)
    members, sizes, left = [[index] for index in range(len(tables))], _estimate(tables), np.ones(len(tables), bool)
    saving = np.full((len(tables), len(tables)), -1.0)
    for one in range(len(tables)):
        saving[one, :one] = sizes[one] + sizes[:one] + apart - _estimate(tables[one] + tables[:one])
    while saving.max(initial=0) > 0:
        other, one = divmod(int(saving.argmax()), len(tables))
        members[one] = sorted(members[one] + members[other])
        tables[one] += tables[other]
        sizes[one] = _estimate(tables[one])
        left[other] = False
        saving[[one, other]] = saving[:, [one, other]] = -1
        rest = np.flatnonzero(left & (np.arange(len(left)) != one))
        saving[np.maximum(one, rest), np.minimum(one, rest)] = (
            sizes[one] + sizes[rest] + apart - _estimate(tables[one] + tables[rest])
        )
    return [members[index] for index in np.flatnonzero(left)]


def _estimate(tables: np.ndarray) -> np.ndarray:
    """Bytes of streams whose pairs are counted in tables [..., contexts, pairs], with one context or all."""

    def size(counts: np.ndarray) -> np.ndarray:
        bits = counts * np.log2(np.maximum(counts.sum(axis=-1, keepdims=True), 1) / np.maximum(counts, 1))
        return np.minimum(bits + KIND_BITS, APART_BITS * counts).sum(axis=(-2, -1)) / 8

    return np.minimum(size(tables), size(tables.sum(axis=-2, keepdims=True)))
