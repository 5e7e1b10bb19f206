"""Chooses the rare values of a wide stream that are spelled as their neighbor and a correction.

A byte names a symbol, so that a stream has symbols for 244 values at most; int8 has 255 that are
not zero. Where more occur, some rare ones are spelled as the symbol of the value next to them,
nearer to zero, and behind it a *correction*: a symbol of advance 0, whose value, 1 or -1, is added
in the same place. Enters: how often each value occurs. Leaves: the values that are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_corrected(counts: np.ndarray, room: int) -> np.ndarray:
    """Choose the values that have no symbol of their own.

    Args:
        counts: int [2 top + 1], how often each value from -top to top occurs.
        room: How many values, corrections included, can have a symbol.

    Returns:
        Ascending int values, the rarest that do; empty where all values find room. None is the
        neighbor of another.
    """
    top = len(counts) // 2
    occurring = (np.flatnonzero(counts) - top).tolist()
    free = {value for value in occurring if value}
    missing = len(free) - room
    if missing <= 0:
        return np.zeros(0, np.int64)
    chosen = set[int]()
    neighbors = set[int]()
    for value in sorted(free, key=lambda value: (counts[value + top], -abs(value), value)):
        if len(chosen) == missing + len({value > 0 for value in chosen}):
            break
        neighbor = find_neighbor(value)
        if value not in neighbors and neighbor in free and neighbor not in chosen:
            chosen.add(value)
            neighbors.add(neighbor)
    return np.array(sorted(chosen), np.int64)


def find_neighbor(value: int) -> int:
    """Find the value whose symbol stands in for a corrected one.

    Args:
        value: A level, not zero.

    Returns:
        The level next to it, nearer to zero.
    """
    return value - 1 if value > 0 else value + 1


def merge_corrected(counts: np.ndarray, corrected: np.ndarray) -> np.ndarray:
    """Count pairs of corrected values as those of their neighbors.

    Args:
        counts: int [..., 2 top + 1], the last axis that of the values.
        corrected: See `choose_corrected`.

    Returns:
        A copy in which no corrected value occurs.
    """
    top = counts.shape[-1] // 2
    merged = counts.copy()
    for value in corrected.tolist():
        merged[..., find_neighbor(value) + top] += counts[..., value + top]
        merged[..., value + top] = 0
    return merged


def needs_corrections(tensors: Sequence[np.ndarray], room: int) -> bool:
    """Tell whether a stream of all tensors would have more values than symbols.

    Args:
        tensors: int8, any shapes.
        room: How many values can have a symbol.

    Returns:
        True if more values than that occur. If not, none of their streams has corrections.
    """
    found = np.zeros(256, bool)
    for levels in tensors:
        found |= np.bincount(levels.astype(np.uint8).reshape(-1), minlength=256) > 0
    return int(np.count_nonzero(found[1:])) > room
