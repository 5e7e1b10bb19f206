"""Cuts tensors whose rows differ in spread into clusters of rows that are alike.

A code fits levels that are spread alike. Rows (or columns) of one tensor may not be: sorted by
their mean magnitude and cut into clusters, each a tensor of its own to the encoder, they share
streams with what they are like. The graph joins the clusters and puts the rows in order:

    Reshape(Gather(Concat(clusters), order), shape)[, Transpose]

Enters: levels. Leaves: parts of a graph, as from encoder.py, which does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from onnx import NodeProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.graph import read_values
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import Contents, Stored
from ecqx_onnx_converters.storage.packed import encoder, onnx_decoder, reader
from ecqx_onnx_converters.targets import Target

CLUSTERS = 4
LEAST_WEIGHTS = 1 << 14  # of a tensor that may be cut
LEAST_ROW = 16  # weights: of fewer, a mean says little
SAMPLED = 1 << 19  # weights that are looked at, about
NODE_BYTES = 500  # of the nodes and names of a tensor that is cut, its clusters' included
STREAM_BYTES = 125  # and of each cluster's stream; a value takes VALUE_BYTES in its tables
VALUE_BYTES = 2.3
LEAST_GAIN = 0.015  # of the bytes of a tensor; what is less is not worth the nodes


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is cut.

    Attributes:
        permutation: Order of axes in which it is taken as rows, outermost first.
        rows: Their number: the product of the first lengths in that order.
        order: int [rows], the sorted rows by their place in the tensor.
    """

    permutation: tuple[int, ...]
    rows: int
    order: np.ndarray

    def list_clusters(self, levels: np.ndarray) -> list[np.ndarray]:
        """Cut levels into clusters.

        Args:
            levels: int8, of the tensor that this was chosen for.

        Returns:
            int8 [rows of a cluster, weights of a row] each.
        """
        table = levels.transpose(self.permutation).reshape(self.rows, -1)
        return [table[own] for own in np.array_split(self.order, CLUSTERS)]


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """Encode one weight with streams and a decoder of its own.

    Args:
        levels: int8, any shape.
        name: What the integer tensor shall be called.
        target: Whether it folds decoders, and its highest opset.

    Returns:
        Parts of a graph; or why these levels or this target cannot have them.
    """
    return encode_all([(name, levels)], target)[0]


def encode_all(tensors: Sequence[tuple[str, np.ndarray]], target: Target) -> list[Stored | Refusal]:
    """Encode all packed weights of a file, cut into clusters where that saves bytes.

    Args:
        tensors: Name and int8 levels of each.
        target: Whether it folds decoders, and its highest opset.

    Returns:
        As `encoder.encode_all`.
    """
    # 1. Clusters in place of the tensors that are cut.
    cuts: list[Cut | None] = []
    whole: list[tuple[str, np.ndarray]] = []
    for name, levels in tensors:
        cut = choose_cut(levels) if target.decoders else None
        cuts.append(cut)
        if cut is None:
            whole.append((name, levels))
            continue
        for index, cluster in enumerate(cut.list_clusters(levels)):
            whole.append((f"{name}_c{index}", cluster))
    # 2. All of them encoded together, and joined.
    made = iter(encoder.encode_all(whole, target))
    stored: list[Stored | Refusal] = []
    for (name, levels), cut in zip(tensors, cuts, strict=True):
        if cut is None:
            stored.append(next(made))
            continue
        clusters = [next(made) for _ in range(CLUSTERS)]
        stored.append(_join(name, levels.shape, cut, clusters))
    return stored


def choose_cut(levels: np.ndarray) -> Cut | None:
    """Choose along which axes a tensor is cut, if at all.

    Args:
        levels: int8, any shape.

    Returns:
        The cut of fewest bytes, by an estimate from the entropies of the clusters; None where it
        saves too little.
    """
    if levels.ndim < 2 or levels.size < LEAST_WEIGHTS:
        return None
    axes = tuple(range(levels.ndim))
    candidates = {
        (axes, levels.shape[0]),
        (axes, levels.size // levels.shape[-1]),
        ((axes[-1], *axes[:-1]), levels.shape[-1]),
        ((1, 0, *axes[2:]), levels.shape[1]),
    }
    best: Cut | None = None
    plain = _estimate_bytes([levels.reshape(levels.shape[0], -1)], levels.size)
    least = plain * (1 - LEAST_GAIN)
    for permutation, rows in sorted(candidates):
        if rows < 2 * CLUSTERS or levels.size // rows < LEAST_ROW:
            continue
        table = levels.transpose(permutation).reshape(rows, -1)
        # 1. Rows by their mean magnitude, from some of their columns.
        table = table[:, :: -(-levels.size // SAMPLED)]
        order = np.argsort(np.abs(table.astype(np.int16)).mean(axis=1), kind="stable")
        # 2. What clusters of these take, and the order itself.
        clusters = [table[own] for own in np.array_split(order, CLUSTERS)]
        nbytes = _estimate_bytes(clusters, levels.size) + NODE_BYTES
        nbytes += onnx_decoder.make_tensor("", _invert(order)).ByteSize()
        if nbytes < least:
            least = nbytes
            best = Cut(permutation, rows, order)
    return best


def _invert(order: np.ndarray) -> np.ndarray:
    """int32: where each row is among the sorted ones."""
    return np.argsort(order).astype(np.int32)


def _estimate_bytes(clusters: Sequence[np.ndarray], size: int) -> float:
    """Bytes of a code for each cluster, from the entropy of levels that stand for `size` of them.

    The entropy of few samples is too small by (values - 1) / (2 ln 2) bits in all [Miller 1955].
    """
    sampled = sum(cluster.size for cluster in clusters)
    total = 0.0
    for cluster in clusters:
        flat = np.ascontiguousarray(cluster).reshape(-1).view(np.uint8)
        counts = np.bincount(flat, minlength=256)
        counts = counts[counts > 0]
        bits = float((counts * np.log2(cluster.size / counts)).sum())
        bits += (len(counts) - 1) / (2 * math.log(2))
        total += bits / 8 * size / sampled + VALUE_BYTES * len(counts) + STREAM_BYTES
    return total


def _join(
    name: str, shape: tuple[int, ...], cut: Cut, clusters: Sequence[Stored | Refusal]
) -> Stored | Refusal:
    """The parts of all clusters, and the nodes that make one tensor of them."""
    stored = []
    for cluster in clusters:
        if isinstance(cluster, Refusal):
            return cluster
        stored.append(cluster)
    coded_shape = np.array([shape[axis] for axis in cut.permutation], np.int64)
    order = onnx_decoder.make_tensor(f"{name}_o", _invert(cut.order))
    lengths = onnx_decoder.make_tensor(f"{name}_v", coded_shape)
    straight = cut.permutation == tuple(range(len(shape)))
    reshaped = name if straight else f"{name}_t"
    nodes = [
        helper.make_node("Concat", [part.levels for part in stored], [f"{name}_j"], axis=0),
        helper.make_node("Gather", [f"{name}_j", order.name], [f"{name}_g"]),
        helper.make_node("Reshape", [f"{name}_g", lengths.name], [reshaped]),
    ]
    if not straight:
        inverse = np.argsort(cut.permutation).tolist()
        nodes.append(helper.make_node("Transpose", [reshaped], [name], perm=inverse))
    parts = [node for part in stored for node in part.nodes]
    initializers = [tensor for part in stored for tensor in part.initializers]
    own_bytes = sum(part.nbytes for part in stored) + order.ByteSize()
    return replace(
        stored[0],
        levels=name,
        initializers=(*initializers, order, lengths),
        nodes=(*parts, *nodes),
        own_bytes=own_bytes,
    )


@dataclass(frozen=True, eq=False)
class _Joined:
    """What the nodes that join a tensor say; inverse: of the Transpose behind, if there is one."""

    clusters: tuple[str, ...]
    order: str
    shape: str
    inverse: tuple[int, ...] | None


def _find_joined(name: str, contents: Contents) -> _Joined | None:
    """How a tensor is joined; None where it is none of clusters."""
    node = contents.makers[name]
    inverse = None
    if _is_standard(node, "Transpose"):
        before = contents.makers.get(node.input[0])
        if before is None or not _is_standard(before, "Reshape"):
            return None
        inverse = tuple(value for entry in node.attribute for value in entry.ints)
        node = before
    if not _is_standard(node, "Reshape"):
        return None
    gather = contents.makers[node.input[0]]
    concat = contents.makers[gather.input[0]]
    if not (_is_standard(gather, "Gather") and _is_standard(concat, "Concat")):
        raise FileError(
            f"packed tensor '{name}' is made by {concat.op_type} and {gather.op_type}, not of"
            " clusters; the ONNX file is damaged"
        )
    return _Joined(tuple(concat.input), gather.input[1], node.input[1], inverse)


def _is_standard(node: NodeProto, operator: str) -> bool:
    return node.op_type == operator and not node.domain


def decode(name: str, contents: Contents) -> np.ndarray:
    """Decode one weight, whole or of clusters.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        int8 levels in the weight's shape.

    Raises:
        FileError: A node or an array is none that the encoder writes.
        KeyError: The file has no such tensor.
    """
    joined = _find_joined(name, contents)
    if joined is None:
        return reader.decode(name, contents)
    order = read_values(contents.initializers[joined.order])
    shape = read_values(contents.initializers[joined.shape])
    tables = [reader.decode(cluster, contents) for cluster in joined.clusters]
    try:
        rows = np.concatenate(tables)
        if order.dtype != np.int32 or not np.array_equal(np.sort(order), np.arange(len(rows))):
            raise ValueError("the order of its rows is none")
        levels = rows[order].reshape(shape.astype(np.int64))
        if joined.inverse is not None:
            levels = levels.transpose(joined.inverse)
    except (TypeError, ValueError) as error:
        raise FileError(
            f"the clusters of packed tensor '{name}' can't be joined ({error});"
            " the ONNX file is damaged"
        ) from error
    return np.ascontiguousarray(levels)


def stored_bytes(name: str, contents: Contents) -> int:
    """Count the bytes of the payload that are one weight's.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        Bytes of its own entries, and of the order of its rows.
    """
    joined = _find_joined(name, contents)
    if joined is None:
        return reader.stored_bytes(name, contents)
    count = partial(reader.stored_bytes, contents=contents)
    order = contents.initializers[joined.order]
    return sum(map(count, joined.clusters)) + order.ByteSize()
