"""Which tensors of a file share a stream, and how each stream is said.

A stream has tables of its own, so that tensors whose levels are spread alike belong together: pairs of streams are joined as long
as that saves bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecqx_onnx_converters.storage.packed.codec import Coding, Form, Survey, coding
from ecqx_onnx_converters.storage.packed.units import choose_alphabets, tally

STREAM_BYTES, TURN_BYTES = 170, 115  # what one more stream takes beside its payload and tables; and a decoder of two contexts
KIND_BITS, APART_BITS = 22, 9  # what a pair takes that has a kind of its own, about; and each time that it is said with others


def arrange(surveys: Sequence[Survey]) -> list[tuple[list[int], Coding]]:
    """-> the streams: indices of their tensors, ascending, and how they are said. One, or PLAIN, where more saves nothing."""
    tallies = [tally(survey.runs, survey.pair) for survey in surveys]
    everything, groups = list(range(len(surveys))), _groups([counts for counts, _ in tallies])
    whole = choose_alphabets(tallies)
    apart = [choose_alphabets([tallies[member] for member in members]) if len(groups) > 1 else whole for members in groups]
    plain, steady = ([coding(alphabets[0], form) for alphabets in apart] for form in (Form.PLAIN, Form.STEADY))
    signs = [[coding(alphabet, Form.SIGNS) for alphabet in alphabets[1:]] for alphabets in apart]
    turning = [min([one, *two], key=lambda way: way.nbytes) for one, two in zip(steady, signs, strict=True)]
    ways = [([everything], [coding(whole[0], Form.PLAIN)]), (groups, plain), (groups, turning)]
    return list(zip(*min(ways, key=lambda way: _bytes(way[1])), strict=True))


def _bytes(streams: Sequence[Coding]) -> int:
    turning = streams[0].form is not Form.PLAIN
    return sum(how.nbytes for how in streams) + STREAM_BYTES * (len(streams) - 1) + TURN_BYTES * turning


def _groups(counts: Sequence[np.ndarray]) -> list[list[int]]:
    """counts: of each tensor, see `tally`. Joins the pair of groups that saves most until none saves anything."""
    used = np.flatnonzero(sum(of.sum(axis=0) for of in counts))
    members, tables = [[index] for index in range(len(counts))], [of[:, used].astype(np.float64) for of in counts]
    sizes = [_estimate(table) for table in tables]

    def saved(one: int, other: int) -> float:
        return sizes[one] + sizes[other] + STREAM_BYTES - _estimate(tables[one] + tables[other])

    left = set(range(len(counts)))
    saving = {(one, other): saved(one, other) for other in left for one in range(other)}
    while saving:
        (one, other), most = max(saving.items(), key=lambda entry: entry[1])
        if most <= 0:
            break
        members[one] = sorted(members[one] + members[other])
        tables[one] = tables[one] + tables[other]
        sizes[one] = _estimate(tables[one])
        left.discard(other)
        saving = {pair: bytes_ for pair, bytes_ in saving.items() if not {one, other} & set(pair)}
        saving |= {(min(one, third), max(one, third)): saved(*sorted((one, third))) for third in left - {one}}
    return [members[index] for index in sorted(left)]


def _estimate(table: np.ndarray) -> float:
    """Bytes of a stream whose pairs are counted in table [2 contexts, pairs], with one context or two."""

    def size(counts: np.ndarray) -> float:
        bits = counts * np.log2(np.maximum(counts.sum(axis=-1, keepdims=True), 1) / np.maximum(counts, 1))
        return float(np.minimum(bits + KIND_BITS, APART_BITS * counts).sum()) / 8

    return min(size(table), size(table.sum(axis=0)))
