"""Counts of symbols -> a canonical Huffman tree, its codes, and the automaton that reads it a byte at a time.

Nodes are numbered breadth first; of each tree the leaves at a depth come first. Then the tree is one bit for each child of each
inner node, 1 for a leaf: the k-th inner node (the root is the 0th) owns bits 2k and 2k + 1, the k-th 1 is the k-th leaf, the k-th
0 the k-th inner node after the root. A code of several contexts has a tree for each, that hangs somewhere below the root. Every
leaf lies at least `shortest` deep in its tree, so that `shortest` bits end at most one code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

import numpy as np

NODES = 1 << 16  # of a tree, at most
DIGIT = 8  # bits that the automaton reads at once


@dataclass(frozen=True, eq=False)
class Code:
    """Leaves in breadth-first order: symbol (-1: a filler), length and code below the root of its tree, and which tree that is.

    bits: uint8 [2 * inner nodes].
    """

    symbol_ids: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray
    trees: np.ndarray
    bits: np.ndarray


def build_code(parts: Sequence[tuple[np.ndarray, np.ndarray]], roots: Sequence[int] = (0,)) -> Code:
    """parts: of each tree its symbols, and the lengths of their words and of fillers behind, see `compute_codeword_lengths`.
    roots: how deep
    each tree hangs, from left to right: one at the root, or two at depth 1, or two at depth 2 and one at depth 1."""
    made = []
    for own, lengths in parts:
        symbol_ids = np.concatenate([own, np.full(len(lengths) - len(own), -1)])
        order = np.argsort(lengths, kind="stable")
        made.append((symbol_ids[order], lengths[order]))
    owner = np.repeat(np.arange(len(made)), [len(symbol_ids) for symbol_ids, _ in made])
    symbol_ids, lengths = (np.concatenate(of) for of in zip(*made, strict=True))
    depths = lengths + np.array(roots)[owner]
    order = np.lexsort((owner, depths))
    leaves = np.zeros((int(depths.max()) + 1, len(made)), int)
    np.add.at(leaves, (depths, owner), 1)
    codes: list[int] = []  # of the leaves in this order
    code, nodes, bits = [0] * len(made), [1] * len(made), list[int]()
    for depth, row in enumerate(leaves.tolist()):
        if 0 < depth <= max(roots):
            bits += [0, 0]  # roots, and what they hang on
        for part, count in enumerate(row):
            if depth > roots[part]:
                code[part], nodes[part] = code[part] << 1, nodes[part] * 2
                codes += range(code[part], code[part] + count)
                bits += [1] * count + [0] * (nodes[part] - count)
                code[part], nodes[part] = code[part] + count, nodes[part] - count
    # A code of 50 bits, more than `codec.put_words` takes, is made of 3 * 10**10 words at least.
    return Code(
        symbol_ids[order],
        lengths[order],
        np.array(codes, np.int64),
        owner[order],
        np.array(bits, np.uint8),
    )


def compute_codeword_lengths(counts: np.ndarray, shortest: int, *, alone: bool) -> np.ndarray:
    """Huffman's, stopped where 2**shortest trees are left: these hang at depth `shortest`. At the end those of fillers.

    alone: whether it is the only tree; where nothing is said another is a tree of two.
    """
    least = shortest if len(counts) or alone else 1
    sizes = [*counts.tolist(), *[0] * (2**least - len(counts))]
    heap = [size * NODES + node for node, size in enumerate(sizes)]
    heapify(heap)
    parents = [0] * len(sizes)
    while len(heap) > 2**least:
        one, two = heappop(heap), heap[0]
        parents[one % NODES] = parents[two % NODES] = len(parents)
        heapreplace(heap, (one // NODES + two // NODES) * NODES + len(parents))
        parents.append(0)
    depth = [least] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if parents[node]:
            depth[node] = depth[parents[node]] + 1
    return np.array(depth[: len(sizes)])


def build_automaton(
    bits: np.ndarray, shortest: int, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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
        together = (
            np.maximum(before, after)
            if 2 * width <= shortest
            else np.concatenate([before, after], axis=3)
        )
        met = together.reshape(len(state), -1, together.shape[3])
        state = state[state].reshape(len(state), -1)
        width *= 2
    return state.reshape(-1), met.reshape(-1, met.shape[2])
