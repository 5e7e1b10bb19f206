"""Prefix codes: Huffman lengths, canonical codewords and tree, and an automaton that reads bytes.

Nodes are numbered breadth first; of each tree the leaves at a depth come first. Then the tree is
one bit for each child of each inner node, 1 for a leaf: the k-th inner node (the root is the 0th)
owns bits 2k and 2k + 1, the k-th 1 is the k-th leaf, the k-th 0 the k-th inner node after the root.
A code of several contexts has a tree for each, that hangs somewhere below the root. Every leaf lies
at least `shortest` deep in its tree, so that `shortest` bits end at most one codeword.

Sources: Huffman, "A method for the construction of minimum-redundancy codes", 1952; canonical
codes: Schwartz and Kallick, "Generating a canonical prefix encoding", 1964.
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
    """A prefix code, its leaves in breadth-first order.

    Attributes:
        symbol_ids: int [leaves], -1 for a filler.
        lengths: int [leaves], bits of each codeword below the root of its tree.
        codes: int64 [leaves], these bits.
        trees: int [leaves], which tree each leaf is in.
        bits: uint8 [2 * inner nodes] of 0 and 1, the trees and what they hang on.
    """

    symbol_ids: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray
    trees: np.ndarray
    bits: np.ndarray


def build_code(parts: Sequence[tuple[np.ndarray, np.ndarray]], roots: Sequence[int] = (0,)) -> Code:
    """Build the canonical code of one or several trees.

    Args:
        parts: Of each tree its symbol ids, and the lengths of their codewords and of fillers behind
            them, see `compute_codeword_lengths`.
        roots: How deep each tree hangs, from left to right: one at the root, or two at depth 1, or
            two at depth 2 and one at depth 1.

    Returns:
        The code.
    """
    # 1. The leaves of each tree by length, fillers among them.
    made = []
    for own, own_lengths in parts:
        fillers = np.full(len(own_lengths) - len(own), -1)
        by_length = np.argsort(own_lengths, kind="stable")
        made.append((np.concatenate([own, fillers])[by_length], own_lengths[by_length]))
    symbol_ids = np.concatenate([ids for ids, _ in made])
    lengths = np.concatenate([own_lengths for _, own_lengths in made])
    trees = np.repeat(np.arange(len(made)), [len(ids) for ids, _ in made])
    # 2. Breadth first: by depth below the root of all, then by tree.
    depths = lengths + np.array(roots)[trees]
    order = np.lexsort((trees, depths))
    leaves = np.zeros((int(depths.max()) + 1, len(made)), int)
    np.add.at(leaves, (depths, trees), 1)
    # 3. Depth by depth: codewords count up, and are doubled at the next depth.
    codes: list[int] = []  # of the leaves in this order
    bits: list[int] = []
    code = [0] * len(made)  # the next codeword of each tree
    nodes = [1] * len(made)  # its nodes at this depth that are not taken by leaves
    for depth, row in enumerate(leaves.tolist()):
        if 0 < depth <= max(roots):
            bits += [0, 0]  # roots, and what they hang on
        for part, count in enumerate(row):
            if depth > roots[part]:
                code[part] = code[part] << 1
                nodes[part] = nodes[part] * 2
                codes += range(code[part], code[part] + count)
                bits += [1] * count + [0] * (nodes[part] - count)
                code[part] += count
                nodes[part] -= count
    # A codeword of 50 bits, more than `bitstream.put_codewords` takes, needs 3 * 10**10 symbols.
    return Code(
        symbol_ids=symbol_ids[order],
        lengths=lengths[order],
        codes=np.array(codes, np.int64),
        trees=trees[order],
        bits=np.array(bits, np.uint8),
    )


def compute_codeword_lengths(counts: np.ndarray, shortest: int, *, alone: bool) -> np.ndarray:
    """Compute Huffman's codeword lengths with a least length.

    Huffman's algorithm merges the two rarest trees until one is left; stopped where 2**shortest are
    left, and these hung at depth `shortest`, no codeword is shorter than that.

    Args:
        counts: int [symbols], how often each symbol occurs.
        shortest: Bits of the shortest codeword: 1, 2 or 4.
        alone: Whether it is the only tree of its stream; another that nothing uses is a tree of two
            fillers.

    Returns:
        int [symbols + fillers], in bits; fillers make up the 2**shortest trees.
    """
    least = shortest if len(counts) or alone else 1
    sizes = counts.tolist()
    sizes += [0] * (2**least - len(counts))
    # 1. Merge. An entry of the heap is size and node in one integer, so that ties go by node.
    heap = [size * NODES + node for node, size in enumerate(sizes)]
    heapify(heap)
    parents = [0] * len(sizes)
    while len(heap) > 2**least:
        one = heappop(heap)
        two = heap[0]
        merged = len(parents)
        parents[one % NODES] = merged
        parents[two % NODES] = merged
        heapreplace(heap, (one // NODES + two // NODES) * NODES + merged)
        parents.append(0)
    # 2. Depths from the roots down: a parent's number is higher than its children's.
    depth = [least] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if parents[node]:
            depth[node] = depth[parents[node]] + 1
    return np.array(depth[: len(sizes)])


def build_automaton(
    bits: np.ndarray, shortest: int, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Build the table that reads a prefix code a byte at a time.

    Args:
        bits: 0 and 1, [2 * inner nodes], see `Code.bits`.
        shortest: Bits of the shortest codeword: 1, 2 or 4; a slot has as many bits of a byte.
        after: int [leaves + 1], the inner node where a leaf, counted from 1, leads.

    Returns:
        By the index inner node * 256 + byte: the next inner node, [inner nodes * 256]; and the leaf
        counted from 1 that each slot ended, 0 for none, [inner nodes * 256, 8 / shortest].
    """
    # 1. For one bit: the next inner node, and the leaf that was met.
    leaf = bits.astype(np.int64)
    inner = 1 - leaf
    state = np.where(leaf == 1, after[np.cumsum(leaf)], np.cumsum(inner)).reshape(-1, 2)
    met = (np.cumsum(leaf) * leaf).reshape(-1, 2, 1)
    # 2. For twice as many bits: the table applied to itself, three times.
    width = 1
    while width < DIGIT:
        before = np.broadcast_to(met[:, :, None], (*met.shape[:2], *met.shape[1:]))
        behind = met[state]
        shared = 2 * width <= shortest  # one slot: at most one of both has met a leaf
        if shared:
            together = np.maximum(before, behind)
        else:
            together = np.concatenate([before, behind], axis=3)
        met = together.reshape(len(state), -1, together.shape[3])
        state = state[state].reshape(len(state), -1)
        width *= 2
    return state.reshape(-1), met.reshape(-1, met.shape[2])
