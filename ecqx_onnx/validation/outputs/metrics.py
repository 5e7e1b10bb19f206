"""Accuracy with its interval, top-1 agreement and largest difference of outputs.

Each is measured on one batch; those of several batches are added up, in constant memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.errors import DataError

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Proportion:
    """A share that was counted, `hits` of `total`: an accuracy or an agreement.

    False as long as nothing was counted.
    """

    hits: int
    total: int

    @property
    def share(self) -> float:
        """hits / total, in [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval.

        Where the true share lies, given `total` independent samples.
        """
        # (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)  [Wilson 1927]
        n, p = self.total, self.share
        centre = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        scale = 1 + Z95**2 / n
        # At none and at all of n the formula gives 0 and 1, which rounding must not miss.
        low = (centre - half) / scale if self.hits else 0.0
        high = (centre + half) / scale if self.hits < n else 1.0
        return low, high

    def __add__(self, other: Proportion) -> Proportion:
        return Proportion(self.hits + other.hits, self.total + other.total)

    def __bool__(self) -> bool:
        return self.total > 0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.2f} % ({100 * low:.2f} to {100 * high:.2f})"

    def to_json(self) -> dict[str, float | int]:
        """Describe the proportion in JSON values.

        Returns:
            hits, total, share, and low and high of the 95 % interval.
        """
        low, high = self.interval
        return {
            "hits": self.hits,
            "total": self.total,
            "share": self.share,
            "low": low,
            "high": high,
        }


def is_classification(output: np.ndarray) -> bool:
    """Tell whether an output has the form of class scores.

    Args:
        output: Any output.

    Returns:
        True for floats [N, C] with C >= 2.
    """
    return output.ndim == 2 and output.shape[1] >= 2 and np.issubdtype(output.dtype, np.floating)


def measure_accuracy(output: np.ndarray, labels: np.ndarray) -> Proportion:
    """Count samples whose highest score is that of their label.

    Args:
        output: Scores [N, C].
        labels: Integers [N], each in [0, C).

    Returns:
        Right answers of N.

    Raises:
        DataError: A label is out of range.
    """
    classes = output.shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise DataError(
            f"label {wrong[0]} is out of range: the model tells {classes} classes apart (0 to "
            f"{classes - 1})"
        )
    return Proportion(int(np.count_nonzero(output.argmax(1) == labels)), len(labels))


@dataclass(frozen=True)
class Agreement:
    """Top-1 agreement of two models on the same inputs.

    Attributes:
        margin: the widest lead, by the first model's scores, that its class had over the other's
            where they disagree; 0 if they never do. A disagreement is only a rounded tie if its
            margin is within the rounding of both.
    """

    same: Proportion
    margin: float

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.same + other.same, max(self.margin, other.margin))


def measure_agreement(first: np.ndarray, second: np.ndarray) -> Agreement:
    """Count samples to which two models give the same class.

    Args:
        first: Scores [N, C] of the reference.
        second: Scores [N, C] of the other.

    Returns:
        The agreement, with the reference's widest lead where they disagree.
    """
    a, b, rows = first.argmax(1), second.argmax(1), np.arange(len(first))
    lead = np.nan_to_num((first[rows, a] - first[rows, b]).astype(np.float64), nan=math.inf)
    same = a == b
    return Agreement(
        Proportion(int(np.count_nonzero(same)), len(same)), float(lead[~same].max(initial=0.0))
    )


def find_largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Find max |first - second|.

    Args:
        first: Any array.
        second: Another.

    Returns:
        The difference. NaN against NaN and an infinity against itself are equal; anything else that
        is no number gives inf, as do two shapes that are not the same.
    """
    if first.shape != second.shape:
        return math.inf
    if first.size == 0:
        return 0.0
    if first.dtype.kind not in "biuf" or second.dtype.kind not in "biuf":  # text
        return 0.0 if np.array_equal(first, second) else math.inf
    a, b = first.astype(np.float64), second.astype(np.float64)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(equal, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())
