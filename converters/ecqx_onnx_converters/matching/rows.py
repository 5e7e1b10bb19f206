"""Find the levels of a float matrix row by row, bit for bit, in an index of quantized tensors.

Recurrent layers and attention reach the graph with their rows permuted, stacked, split or
transposed; the rows themselves stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

BLOCK = 4096  # rows hashed at a time


@dataclass(frozen=True, eq=False)
class Gathered:
    """Levels put together from rows of QuantTensors.

    Attributes:
        tensor: the levels and what they stand for, in the shape that was looked for.
        sources: names of the QuantTensors, in the order of their first rows.
    """

    tensor: QuantTensor
    sources: tuple[str, ...]


class RowIndex:
    """Rows of every tensor (seen as a matrix [-1, last]) and columns of every matrix, by their
    length."""

    def __init__(self, tensors: Sequence[QuantTensor]) -> None:
        self.tensors: dict[int, list[QuantTensor]] = {}
        for tensor in tensors:
            if len(tensor.shape) < 2:
                continue
            layouts = [tensor]
            if len(tensor.shape) == 2:
                layouts.append(tensor.transpose((1, 0)))
            for layout in layouts:
                self.tensors.setdefault(layout.shape[-1], []).append(layout)
        self.tables: dict[int, _Table] = {}

    def find(self, name: str, values: np.ndarray) -> Gathered | None:
        """Finds the levels of every row of a weight.

        Args:
            name: for the tensor put together.
            values: float32; a weight of less than two dimensions has no rows.

        Returns:
            The levels in the shape of `values`; None unless every row is found, and all with one
            codebook or one kind of step.
        """
        length = values.shape[-1]
        if values.ndim < 2 or length not in self.tensors:
            return None
        if length not in self.tables:
            self.tables[length] = _Table(self.tensors[length])
        return self.tables[length].find(name, values)


class _Table:
    """All rows of one length.

    levels: int8 [R, length]. rows: float32 [R, length], what the levels stand for. owner: int [R],
    index of the row's tensor.
    step: float32 [R], NaN where a row has a codebook or several steps.
    """

    def __init__(self, tensors: Sequence[QuantTensor]) -> None:
        self.tensors = tensors
        length = tensors[0].shape[-1]
        self.levels = np.concatenate([tensor.levels.reshape(-1, length) for tensor in tensors])
        self.rows = np.concatenate([_normalize_rows(tensor.dequantize()) for tensor in tensors])
        self.owner = np.concatenate(
            [np.full(tensor.size // length, index) for index, tensor in enumerate(tensors)]
        )
        self.step = np.concatenate([_list_row_steps(tensor) for tensor in tensors])
        # Odd multipliers, one per column: a row's hash is its dot product with them, mod 2^64.
        drawn = np.random.default_rng(0).integers(0, 1 << 63, length, dtype=np.uint64)
        self.multipliers = drawn * np.uint64(2) + np.uint64(1)
        hashes = self._hash(self.rows)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def _hash(self, rows: np.ndarray) -> np.ndarray:
        """uint64 [R]; equal rows have equal hashes. Whether unequal ones differ is checked
        afterwards."""
        blocks = []
        for start in range(0, len(rows), BLOCK):
            bits = rows[start : start + BLOCK].view(np.uint32)
            blocks.append((bits * self.multipliers).sum(axis=1))
        return np.concatenate(blocks)

    def find(self, name: str, values: np.ndarray) -> Gathered | None:
        """See RowIndex.find; the rows of `values` have the table's length."""
        # 1. The place of each row, by its hash; a hash alone proves nothing.
        rows = _normalize_rows(values)
        slots = np.searchsorted(self.hashes, self._hash(rows))
        place = self.order[np.minimum(slots, len(self.order) - 1)]
        if not np.array_equal(self.rows[place], rows):
            return None

        # 2. A row of zeros could be anyone's: it takes its step from the row before it, at the
        # start from the first other one.
        occupied = rows.any(axis=1)
        last = np.maximum.accumulate(np.where(occupied, np.arange(len(rows)), -1))
        like = place[np.where(last >= 0, last, np.argmax(occupied))]
        owners = [self.tensors[index] for index in dict.fromkeys(self.owner[like].tolist())]

        # 3. The levels, if they all stand for values in one way.
        meaning = self._find_meaning(owners, like, values.shape)
        if meaning is None:
            return None
        tensor = QuantTensor(name, self.levels[place].reshape(values.shape), meaning)
        return Gathered(tensor, tuple(owner.name for owner in owners))

    def _find_meaning(
        self, owners: Sequence[QuantTensor], like: np.ndarray, shape: tuple[int, ...]
    ) -> Scale | Codebook | None:
        """What the gathered levels stand for: one step per row, or what all owners share. None when
        they share nothing."""
        if not np.isnan(self.step[like]).any():
            return Scale(self.step[like].reshape((*shape[:-1], 1)))
        first = owners[0].meaning
        if isinstance(first, Codebook):
            for owner in owners:
                book = owner.meaning
                if not isinstance(book, Codebook) or not np.array_equal(book.values, first.values):
                    return None
            return first
        # Steps along the last axis: every row has all of them.
        along = []
        for owner in owners:
            scale = owner.meaning
            if isinstance(scale, Scale) and scale.axis == len(owner.shape) - 1:
                along.append(scale.step.reshape(-1))
        if len(along) != len(owners):
            return None
        if not all(np.array_equal(steps, along[0]) for steps in along):
            return None
        return Scale(along[0].reshape((1,) * (len(shape) - 1) + (-1,)))


def _normalize_rows(values: np.ndarray) -> np.ndarray:
    """float32 [rows, last], contiguous, every zero positive."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]) + np.float32(0))


def _list_row_steps(tensor: QuantTensor) -> np.ndarray:
    """float32 [R]: the step of each row; NaN where a row has no single one."""
    rows = tensor.size // tensor.shape[-1]
    if isinstance(tensor.meaning, Codebook):
        return np.full(rows, np.nan, np.float32)
    step = tensor.meaning.step
    if step.ndim and step.shape[-1] > 1:
        return np.full(rows, np.nan, np.float32)
    per_row = step.reshape(step.shape[:-1])
    return np.broadcast_to(per_row, tensor.shape[:-1]).reshape(rows)
