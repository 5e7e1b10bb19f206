"""Counts of symbols -> a canonical Huffman tree, its codes, and the automaton that reads it a byte at a time.

Nodes are numbered breadth first; of each tree the leaves at a depth come first. Then the tree is one bit for each child of each
inner node, 1 for a leaf: the k-th inner node (the root is the 0th) owns bits 2k and 2k + 1, the k-th 1 is the k-th leaf, the k-th
0 the k-th inner node after the root. A code of two contexts has a tree for each, whose roots are the root's children, inner nodes
1 and 2. Every leaf lies at least `shortest` deep in its tree, so that `shortest` bits end at most one code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

DIGIT = 8  # bits that the automaton reads at once


@dataclass(frozen=True, eq=False)
class Code:
    """Leaves in breadth-first order: symbol (-1: a filler), length, code and context of each. bits: uint8 [2 * inner nodes].

    Where there are two contexts, length and code are without the word's first bit, which is the context.
    """

    symbols: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray
    contexts: np.ndarray
    bits: np.ndarray


def build(counts: Sequence[np.ndarray], shortest: int) -> Code:
    """counts: of each context int [symbols], each > 0; symbols are numbered through. The shortest code whose words have
    `shortest` bits or more."""
    parts, begin = [], 0
    for own in counts:
        least = shortest if len(own) or len(counts) == 1 else 1  # where nothing is said a tree is a tree
        fillers = max(0, 2**least - len(own))
        lengths = _lengths(np.concatenate([own, np.zeros(fillers, np.int64)]), least)
        symbols = np.concatenate([begin + np.arange(len(own)), np.full(fillers, -1)])
        order = np.lexsort((np.arange(len(symbols)), lengths))
        parts.append((symbols[order], lengths[order]))
        begin += len(own)
    owner = np.repeat(np.arange(len(parts)), [len(symbols) for symbols, _ in parts])
    symbols, lengths = (np.concatenate(of) for of in zip(*parts, strict=True))
    order = np.lexsort((owner, lengths))
    codes = np.zeros(len(symbols), np.int64)  # 2**31 words of 255 symbols are at most 44 bits long
    code, nodes = [0] * len(parts), [1] * len(parts)
    bits = [] if len(parts) == 1 else [0] * len(parts)
    for depth in range(1, int(lengths.max()) + 1):
        for part in range(len(parts)):
            leaves = np.flatnonzero((owner == part) & (lengths == depth))
            code[part], nodes[part] = code[part] << 1, nodes[part] * 2
            codes[leaves] = code[part] + np.arange(len(leaves))
            bits += [1] * len(leaves) + [0] * (nodes[part] - len(leaves))
            code[part], nodes[part] = code[part] + len(leaves), nodes[part] - len(leaves)
    return Code(symbols[order], lengths[order], codes[order], owner[order], np.array(bits, np.uint8))


def _lengths(counts: np.ndarray, shortest: int) -> np.ndarray:
    """Huffman's, stopped where 2**shortest trees are left: these hang at depth `shortest`."""
    heap = [(int(count), index, [index]) for index, count in enumerate(counts)]
    heapify(heap)
    depth, fresh = np.full(len(counts), shortest), len(counts)
    while len(heap) > 2**shortest:
        (one, _, left), (two, _, right) = heappop(heap), heappop(heap)
        depth[left + right] += 1
        heappush(heap, (one + two, fresh, left + right))
        fresh += 1
    return depth


def automaton(bits: np.ndarray, shortest: int, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> next inner node [inner nodes * 256], and leaf counted from 1 that was met, 0 for none, [inner nodes * 256, slots].

    A slot is a part of the byte: 8 / slots bits. Index: inner node * 256 + byte. after: int [leaves + 1], inner node where a
    leaf leads.
    """
    leaf = bits.astype(np.int64)
    inner = 1 - leaf
    state = np.where(leaf == 1, after[np.cumsum(leaf)], np.cumsum(inner)).reshape(-1, 2)
    met = (np.cumsum(leaf) * leaf).reshape(-1, 2, 1)
    width = 1
    while width < DIGIT:
        before = np.broadcast_to(met[:, :, None], (*met.shape[:2], *met.shape[1:]))
        after = met[state]
        together = np.maximum(before, after) if 2 * width <= shortest else np.concatenate([before, after], axis=3)
        met = together.reshape(len(state), -1, together.shape[3])
        state = state[state].reshape(len(state), -1)
        width *= 2
    return state.reshape(-1), met.reshape(-1, met.shape[2])
