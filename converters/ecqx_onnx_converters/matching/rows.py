"""(QuantTensors) -> an index of all their rows and columns; (float matrix) -> the levels of its
rows, found bit for bit.

Recurrent layers and attention reach the graph with their rows permuted, stacked, split or
transposed; the rows themselves stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale


@dataclass(frozen=True, eq=False)
class Gathered:
    tensor: QuantTensor
    sources: tuple[str, ...]


class RowIndex:
    """Rows of every tensor (seen as a matrix [-1, last]) and columns of every matrix, by their
    length."""

    def __init__(self, tensors: Sequence[QuantTensor]) -> None:
        self.tensors: dict[int, list[QuantTensor]] = {}
        for tensor in tensors:
            if len(tensor.shape) >= 2:
                for layout in (
                    [tensor, tensor.transpose((1, 0))] if len(tensor.shape) == 2 else [tensor]
                ):
                    self.tensors.setdefault(layout.shape[-1], []).append(layout)
        self.tables: dict[int, _Table] = {}

    def find(self, name: str, values: np.ndarray) -> Gathered | None:
        """values: float32, two or more dimensions. None unless every row is found, with one
        codebook or one kind of step."""
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
        self.multipliers = np.random.default_rng(0).integers(
            0, 1 << 63, length, dtype=np.uint64
        ) * np.uint64(2) + np.uint64(1)
        hashes = self._hash(self.rows)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def _hash(self, rows: np.ndarray) -> np.ndarray:
        """uint64 [R]; equal rows have equal hashes. Whether unequal ones differ is checked
        afterwards."""
        blocks = [
            (rows[i : i + BLOCK].view(np.uint32) * self.multipliers).sum(axis=1)
            for i in range(0, len(rows), BLOCK)
        ]
        return np.concatenate(blocks)

    def find(self, name: str, values: np.ndarray) -> Gathered | None:
        rows = _normalize_rows(values)
        slots = np.searchsorted(self.hashes, self._hash(rows))
        place = self.order[np.minimum(slots, len(self.order) - 1)]
        if not np.array_equal(self.rows[place], rows):
            return None
        # A row of zeros could be anyone's: it takes its step from the row before it, at the start
        # from the first other one.
        occupied = rows.any(axis=1)
        last = np.maximum.accumulate(np.where(occupied, np.arange(len(rows)), -1))
        like = place[np.where(last >= 0, last, np.argmax(occupied))]
        owners = [self.tensors[index] for index in dict.fromkeys(self.owner[like].tolist())]
        meaning = self._meaning(owners, like, values.shape)
        if meaning is None:
            return None
        return Gathered(
            QuantTensor(name, self.levels[place].reshape(values.shape), meaning),
            tuple(owner.name for owner in owners),
        )

    def _meaning(
        self, owners: Sequence[QuantTensor], like: np.ndarray, shape: tuple[int, ...]
    ) -> Scale | Codebook | None:
        """What the gathered levels stand for: one step per row, or what all owners share. None when
        they share nothing."""
        if not np.isnan(self.step[like]).any():
            return Scale(self.step[like].reshape((*shape[:-1], 1)))
        first = owners[0].meaning
        if isinstance(first, Codebook):
            books = [
                owner.meaning.values for owner in owners if isinstance(owner.meaning, Codebook)
            ]
            return (
                first
                if len(books) == len(owners)
                and all(np.array_equal(book, first.values) for book in books)
                else None
            )
        along = [
            owner.meaning.step
            for owner in owners
            if isinstance(owner.meaning, Scale) and owner.meaning.axis == len(owner.shape) - 1
        ]
        if len(along) != len(owners) or not all(
            np.array_equal(step.reshape(-1), along[0].reshape(-1)) for step in along
        ):
            return None
        return Scale(along[0].reshape((1,) * (len(shape) - 1) + (-1,)))


BLOCK = 4096  # rows hashed at a time


def _normalize_rows(values: np.ndarray) -> np.ndarray:
    """float32 [rows, last], contiguous, every zero positive."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]) + np.float32(0))


def _list_row_steps(tensor: QuantTensor) -> np.ndarray:
    """float32 [R]: the step of each row; NaN where a row has no single one."""
    rows = tensor.size // tensor.shape[-1]
    if isinstance(tensor.meaning, Codebook) or (
        tensor.meaning.step.ndim and tensor.meaning.step.shape[-1] > 1
    ):
        return np.full(rows, np.nan, np.float32)
    return np.broadcast_to(
        tensor.meaning.step.reshape(tensor.meaning.step.shape[:-1]), tensor.shape[:-1]
    ).reshape(rows)
