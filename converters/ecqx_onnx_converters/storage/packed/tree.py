"""Counts of symbols -> a canonical Huffman tree, its codes, and the automaton that reads it a byte at a time.

Nodes are numbered breadth first; at each depth the leaves come first. Then the tree is one bit for each child of each inner
node, 1 for a leaf: the k-th inner node (the root is the 0th) owns bits 2k and 2k + 1, the k-th 1 is the k-th leaf, the k-th 0 the
k-th inner node after the root. Every leaf lies at least `shortest` deep, so that `shortest` bits end at most one code.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

DIGIT = 8  # bits that the automaton reads at once


@dataclass(frozen=True, eq=False)
class Code:
    """Leaves in breadth-first order: symbol (-1: a filler), length and code of each; bits: uint8 [2 * inner nodes], 1 a leaf."""

    symbols: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray
    bits: np.ndarray


def build(counts: np.ndarray, shortest: int) -> Code:
    """counts: int [symbols], each > 0. The shortest code whose words have `shortest` bits or more."""
    symbols = np.concatenate([np.arange(len(counts)), np.full(max(0, 2**shortest - len(counts)), -1)])
    lengths = _lengths(np.concatenate([counts, np.zeros(len(symbols) - len(counts), np.int64)]), shortest)
    order = np.lexsort((np.arange(len(symbols)), lengths))
    symbols, lengths = symbols[order], lengths[order]
    leaves = np.bincount(lengths)
    codes, bits = np.zeros(len(symbols), np.int64), []  # 2**31 words of 255 symbols are at most 44 bits long
    code, nodes, done = 0, 1, 0
    for depth in range(1, len(leaves)):
        code, nodes = code << 1, nodes * 2
        codes[done : done + leaves[depth]] = code + np.arange(leaves[depth])
        bits += [1] * leaves[depth] + [0] * (nodes - leaves[depth])
        code, nodes, done = code + int(leaves[depth]), nodes - int(leaves[depth]), done + int(leaves[depth])
    return Code(symbols, lengths, codes, np.array(bits, np.uint8))


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


def automaton(bits: np.ndarray, shortest: int) -> tuple[np.ndarray, np.ndarray]:
    """-> next inner node [inner nodes * 256], and leaf counted from 1 that was met, 0 for none, [inner nodes * 256, slots].

    A slot is a part of the byte: 8 / slots bits. Index: inner node * 256 + byte.
    """
    leaf = bits.astype(np.int64)
    inner = 1 - leaf
    state = (np.cumsum(inner) * inner).reshape(-1, 2)
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
