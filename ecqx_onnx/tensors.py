"""Quantized weights as values: integer levels and what they stand for. Numpy only.

A quantized weight is a small signed integer, its *level*; level 0 is the zero cluster. What a level
stands for is either a uniform grid (`Scale`: level k is k·Δ) or a table (`Codebook`: level k is
values[k]).
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

    Attributes:
        step: float32, positive and finite. Shape () for one step per tensor; else a shape that
            broadcasts against the levels and has their number of dimensions ([C, 1, 1, 1] for one
            step per output channel of a conv).
    """

    step: np.ndarray

    @property
    def axis(self) -> int | None:
        """The one dimension along which the step varies; None for one step per tensor.

        Raises:
            ModelError: The step varies along several.
        """
        varying = [axis for axis, length in enumerate(self.step.shape) if length > 1]
        if len(varying) > 1:
            raise ModelError(
                f"a step of shape {self.step.shape} varies along several axes and has no single"
                " quantisation axis"
            )
        return varying[0] if varying else None

    def transpose(self, permutation: Sequence[int]) -> Scale:
        """Reorder the step's axes as those of the levels.

        Args:
            permutation: Of the levels' axes, as numpy's transpose takes it.

        Returns:
            The same where one step is that of the whole tensor.
        """
        if self.step.ndim == 0:
            return self
        return Scale(self.step.transpose(permutation))


@dataclass(frozen=True, eq=False)
class Codebook:
    """Level k stands for values[k], with Python's negative indexing.

    For the ternary -a, 0, +b, values is [0, b, -a]. ONNX Gather takes negative indices as well, so
    a level is an index there too.

    Attributes:
        values: float32 [n], 1 <= n <= 256: the centroids. values[0] is 0.0 whenever zero is one of
            them, so that level 0 is always the zero cluster.
    """

    values: np.ndarray

    def transpose(self, permutation: Sequence[int]) -> Codebook:
        """Reorder axes: a table has none.

        Args:
            permutation: Of the levels' axes.

        Returns:
            The same codebook.
        """
        return self


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """One quantized weight: which level each entry has, and what the levels stand for.

    Attributes:
        name: The parameter's name in the PyTorch state dict (or the initializer's, for a foreign
            graph).
        levels: int8, the weight's shape.
        meaning: What the levels stand for.
    """

    name: str
    levels: np.ndarray
    meaning: Scale | Codebook

    def dequantize(self) -> np.ndarray:
        """Compute the weight that the levels stand for.

        Returns:
            float32, the levels' shape: what PyTorch's weight holds, and what the ONNX graph must
            reproduce bit for bit.
        """
        if isinstance(self.meaning, Codebook):
            values: np.ndarray = self.meaning.values[self.levels]
            return values
        scaled: np.ndarray = self.levels.astype(np.float32) * self.meaning.step
        return scaled

    def transpose(self, permutation: Sequence[int]) -> QuantTensor:
        """Reorder the axes of levels and steps.

        Args:
            permutation: As numpy's transpose takes it.

        Returns:
            A tensor that dequantizes to the transposed weight.
        """
        return replace(
            self,
            levels=self.levels.transpose(permutation),
            meaning=self.meaning.transpose(permutation),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.levels.shape

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.levels.size)

    @property
    def range(self) -> tuple[int, int]:
        """(lowest, highest) level that occurs; (0, 0) for an empty tensor."""
        if not self.size:
            return (0, 0)
        return (int(self.levels.min()), int(self.levels.max()))

    @property
    def bits(self) -> int:
        """Fewest bits, at least 1, that hold every level as a two's-complement or unsigned integer.

        Unsigned where no level is negative.
        """
        lowest, highest = self.range
        if lowest >= 0:
            return max(1, highest.bit_length())
        return 1 + max((-lowest - 1).bit_length(), highest.bit_length())

    @property
    def zeros(self) -> float:
        """Share of entries in the zero cluster, in [0, 1]; 0 for an empty tensor."""
        if not self.size:
            return 0.0
        return float(np.count_nonzero(self.levels == 0)) / self.size

    @property
    def entropy(self) -> float:
        """Zero-order entropy H of the levels, in bits per weight.

        H = -sum over k of P_k · log2 P_k, with P_k the share of level k: what an ideal memoryless
        code would spend (Shannon, "A mathematical theory of communication", 1948).
        """
        counts = np.bincount(self.levels.reshape(-1).view(np.uint8), minlength=1)
        shares = counts[counts > 0] / max(1, self.size)
        return max(0.0, float(-(shares * np.log2(shares)).sum()))


def total_entropy_bytes(tensors: Sequence[QuantTensor]) -> int:
    """Count the bytes that ideal memoryless codes, one per tensor, would spend on all levels.

    Args:
        tensors: Quantized weights.

    Returns:
        The sum of entropy times size, in bytes, rounded up.
    """
    return math.ceil(sum(tensor.entropy * tensor.size for tensor in tensors) / 8)
