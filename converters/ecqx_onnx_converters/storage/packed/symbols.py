"""Turns int8 levels into pairs: how far the next level that is not zero lies, and what it is.

A tensor is walked from its last weight to its first, since a cursor that only moves down is an ONNX
index as it is: it starts behind the last weight, each symbol (advance, value) moves it down by 1 to
128 weights, and its value is added there. What no symbol names is zero. A *pair* is one number,

    pair = (advance - 1) * (2 top + 1) + value + top        top: the largest |level| of the file

and a pair of a context is that plus context * `count_pairs(top)`. Which pairs are symbols of their
own, and how the others are spelled with these, is alphabets/.
"""

from __future__ import annotations

from functools import cache

import numpy as np

FURTHEST = 128  # weights that one symbol can pass; advances are kept as int8, negated
CONTEXTS = 3  # behind a negative level, a positive one, a run of zeros


def walk_levels(levels: np.ndarray, top: int) -> np.ndarray:
    """Turn levels into pairs.

    Args:
        levels: int8 in [-top, top], in coding order: row-major after the permutation of axes.
        top: The largest |level| of the file.

    Returns:
        int64 pairs from the last weight to the first: for each level that is not zero, its distance
        to the one before and its value, behind a pair of advance 128 and value 0 for each 128 zeros
        between them.
    """
    flat = np.ascontiguousarray(levels).reshape(-1)
    # 1. How many zeros follow each level that is not zero.
    where = np.flatnonzero(flat != 0)
    pair = np.diff(where, append=flat.size)
    pair -= 1
    # 2. Whole runs of 128 of them become pairs of their own.
    far = np.flatnonzero(pair >= FURTHEST)
    runs, pair[far] = np.divmod(pair[far], FURTHEST)
    # 3. Distance and value in one number, in place: the array is as long as the weights.
    pair *= 2 * top + 1
    pair += flat.take(where)
    pair += top
    if len(far):
        pair = np.insert(pair, np.repeat(far + 1, runs), find_whole_run(top))
    return pair[::-1]


def count_pairs(top: int) -> int:
    """Count the possible pairs of one context.

    Args:
        top: The largest |level| of the file.

    Returns:
        128 advances times 2 top + 1 values.
    """
    return FURTHEST * (2 * top + 1)


def find_whole_run(top: int) -> int:
    """Find the pair of 128 zeros.

    Args:
        top: The largest |level| of the file.

    Returns:
        The pair of advance 128 and value 0.
    """
    return count_pairs(top) - 1 - top


@cache
def find_contexts(top: int) -> np.ndarray:
    """Find the context of what follows each pair.

    Args:
        top: The largest |level| of the file.

    Returns:
        int [pairs]: 0 behind a negative level, 1 behind a positive one, 2 behind a run of zeros.
    """
    return np.tile(np.repeat([0, 2, 1], [top, 1, top]), FURTHEST)


def add_contexts(pair: np.ndarray, top: int) -> np.ndarray:
    """Move each pair into the context that the one before it gives.

    Args:
        pair: int64 pairs of one tensor, see `walk_levels`.
        top: The largest |level| of the file.

    Returns:
        int64 pairs of all contexts: those of the first, of the second, of the third. The first pair
        is of the first context, since what will precede it is not known yet.
    """
    encoded = pair.copy()
    encoded[1:] += (find_contexts(top) * count_pairs(top))[pair[:-1]]
    return encoded


def count_pairs_by_context(encoded: np.ndarray, top: int) -> np.ndarray:
    """Count how often each pair occurs in each context.

    Args:
        encoded: int64 pairs of all contexts, see `add_contexts`.
        top: The largest |level| of the file.

    Returns:
        int [CONTEXTS, 128, 2 top + 1]. The first pair is counted behind both signs, since what will
        precede it is not known.
    """
    counts = np.bincount(encoded, minlength=CONTEXTS * count_pairs(top))
    counts[encoded[:1] + count_pairs(top)] += 1
    return counts.reshape(CONTEXTS, FURTHEST, -1)
