"""The values that travel between rooms: integer levels and what they stand for. Numpy only.

A quantised weight is a small signed integer, its *level*; level 0 is the zero cluster. What a level stands for is either
a uniform grid (`Scale`: level k is k·Δ) or a table (`Codebook`: level k is values[k]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.errors import ModelError


@dataclass(frozen=True, eq=False)
class Scale:
    """Level k stands for k·step (a uniform grid that contains zero).

    step: float32, shape () for one step per tensor, else a shape that broadcasts against the levels and has their number
    of dimensions ([C, 1, 1, 1] for one step per output channel of a conv). Positive and finite.
    """

    step: np.ndarray

    @property
    def axis(self) -> int | None:
        """The one dimension along which the step varies; None for one step per tensor. ModelError if it varies along several."""
        varying = [axis for axis, length in enumerate(self.step.shape) if length > 1]
        if len(varying) > 1:
            raise ModelError(
                f"a step of shape {self.step.shape} varies along several axes and has no single quantisation axis"
            )
        return varying[0] if varying else None

    def transpose(self, permutation: Sequence[int]) -> Scale:
        return self if self.step.ndim == 0 else Scale(self.step.transpose(permutation))


@dataclass(frozen=True, eq=False)
class Codebook:
    """Level k stands for values[k], with Python's negative indexing: for the ternary -a, 0, +b, values is [0, b, -a].

    values: float32 [n], 1 <= n <= 256. values[0] is 0.0 whenever zero is one of them, so that level 0 is always the zero
    cluster. ONNX Gather takes negative indices as well, so a level is an index there too.
    """

    values: np.ndarray

    def transpose(self, permutation: Sequence[int]) -> Codebook:
        return self


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """One quantised weight: which level each entry has, and what the levels stand for.

    name: the parameter's name in the PyTorch state dict (or the initializer's, for a foreign graph).
    levels: int8, the weight's shape.
    """

    name: str
    levels: np.ndarray
    meaning: Scale | Codebook

    def dequantize(self) -> np.ndarray:
        """float32, the levels' shape: what PyTorch's weight holds and what the ONNX graph must reproduce bit for bit."""
        if isinstance(self.meaning, Codebook):
            return self.meaning.values[self.levels]
        return self.levels.astype(np.float32) * self.meaning.step

    def transpose(self, permutation: Sequence[int]) -> QuantTensor:
        return replace(
            self,
            levels=self.levels.transpose(permutation),
            meaning=self.meaning.transpose(permutation),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape

    @property
    def size(self) -> int:
        return int(self.levels.size)

    @property
    def range(self) -> tuple[int, int]:
        """(lowest, highest) level that occurs; (0, 0) for an empty tensor."""
        return (int(self.levels.min()), int(self.levels.max())) if self.size else (0, 0)

    @property
    def bits(self) -> int:
        """Fewest bits that hold every level as one two's-complement, or one unsigned, integer. At least 1."""
        lowest, highest = self.range
        if lowest >= 0:
            return max(1, highest.bit_length())
        return 1 + max((-lowest - 1).bit_length(), highest.bit_length())

    @property
    def zeros(self) -> float:
        """Share of entries in the zero cluster, in [0, 1]; 0 for an empty tensor."""
        return float(np.count_nonzero(self.levels == 0)) / self.size if self.size else 0.0

    @property
    def entropy(self) -> float:
        """Zero-order entropy of the levels, in bits per weight: what an ideal memoryless code would spend."""
        counts = np.bincount(self.levels.reshape(-1).view(np.uint8), minlength=1)
        shares = counts[counts > 0] / max(1, self.size)
        return max(0.0, float(-(shares * np.log2(shares)).sum()))


def total_entropy_bytes(tensors: Sequence[QuantTensor]) -> int:
    """Bytes that ideal memoryless codes, one per tensor, would spend on all levels."""
    return math.ceil(sum(tensor.entropy * tensor.size for tensor in tensors) / 8)
