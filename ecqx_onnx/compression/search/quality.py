"""How far a changed model's outputs are from the float model's: error, agreement, accuracy.

Outputs come in batches; sums are kept, not the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.validation.outputs.metrics import Proportion


@dataclass(frozen=True)
class OutputQuality:
    """One output of the model, over all samples.

    Attributes:
        error: ||y - y'|| / ||y||.
        uncertainty: standard error of that, as a share of it.
        cosine: mean over samples of the cosine of y and y', flattened.
        worst_sample, worst_error: the sample that moved furthest, by its own relative error.
    """

    name: str
    error: float
    uncertainty: float
    cosine: float
    worst_sample: int
    worst_error: float


@dataclass(frozen=True)
class Quality:
    """How good a changed model is, against the float model.

    Attributes:
        outputs: one entry an output.
        agreement: of the classes; None where no output has classes.
        accuracy, float_accuracy: on labels; None without.
    """

    outputs: tuple[OutputQuality, ...]
    agreement: Proportion | None
    accuracy: Proportion | None
    float_accuracy: Proportion | None
    samples: int

    @property
    def error(self) -> float:
        """The largest error over the outputs."""
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def uncertain_error(self) -> float:
        """The same with what chance may have left out: two sets of samples of this size differ by
        sqrt(2) standard errors."""
        return max(
            (output.error * (1 + 2**0.5 * output.uncertainty) for output in self.outputs),
            default=0.0,
        )

    @property
    def drop(self) -> float | None:
        """Percentage points of accuracy lost, float minus file."""
        if self.accuracy is None or self.float_accuracy is None:
            return None
        return 100 * (self.float_accuracy.share - self.accuracy.share)


class QualitySum:
    """Adds batches up."""

    def __init__(self, names: Sequence[str], *, classes: tuple[int, int] | None = None) -> None:
        """
        Args:
            names: of the outputs.
            classes: (index of the output with class scores, its axis of classes), if one has.
        """
        self._names = tuple(names)
        self._classes = classes
        self._square = np.zeros(len(self._names))
        self._moved = np.zeros(len(self._names))
        self._moved_square = np.zeros(len(self._names))
        self._cosine = np.zeros(len(self._names))
        self._worst = [(0, 0.0)] * len(self._names)
        self._samples = 0
        self._same = Proportion(0, 0)
        self._right = Proportion(0, 0)
        self._float_right = Proportion(0, 0)

    def add(
        self,
        expected: Sequence[np.ndarray],
        found: Sequence[np.ndarray],
        labels: np.ndarray | None,
        size: int,
    ) -> None:
        """Add the outputs of the float model and of the other one for the same batch.

        Args:
            expected: outputs of the float model, in the order of the names.
            found: outputs of the other model.
            labels: integers [size]; None without.
            size: samples in the batch.
        """
        for index, (y, z) in enumerate(zip(expected, found, strict=True)):
            self._add_output(index, y, z, size)
        self._samples += size
        if self._classes is None:
            return
        which, axis = self._classes
        y, z = expected[which], found[which]
        one, other = y.argmax(axis), z.argmax(axis)
        same = one == other
        self._same += Proportion(int(np.count_nonzero(same)), int(same.size))
        if labels is not None and y.ndim == 2:
            self._right += Proportion(int(np.count_nonzero(other == labels)), len(labels))
            self._float_right += Proportion(int(np.count_nonzero(one == labels)), len(labels))

    def _add_output(self, index: int, y: np.ndarray, z: np.ndarray, size: int) -> None:
        rows = size if y.ndim and len(y) == size and y.shape == z.shape else 1
        if y.shape != z.shape:  # a detector that keeps another number of boxes
            self._square[index] += float((y.astype(np.float64) ** 2).sum())
            self._moved[index] += float((y.astype(np.float64) ** 2).sum())
            return
        a = y.astype(np.float64).reshape(rows, -1)
        b = z.astype(np.float64).reshape(rows, -1)
        # Where the float model itself gives infinities (masked logits), equal ones are no error.
        equal = ~np.isfinite(a) & (a == b)
        a, b = np.where(equal, 0.0, a), np.where(equal, 0.0, b)
        square = (a * a).sum(axis=1)
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(((a - b) ** 2).sum(axis=1), nan=np.inf)
        norms = np.sqrt(square * (b * b).sum(axis=1))
        dots = (a * b).sum(axis=1)
        cosines = np.divide(dots, norms, out=(moved == 0).astype(np.float64), where=norms > 0)
        self._square[index] += square.sum()
        self._moved[index] += moved.sum()
        self._moved_square[index] += (moved**2).sum()
        self._cosine[index] += cosines.mean() * size
        relative = np.sqrt(moved / np.maximum(square, np.finfo(np.float64).tiny))
        place = int(relative.argmax()) if relative.size else 0
        if relative.size and relative[place] > self._worst[index][1]:
            self._worst[index] = (self._samples + place, float(relative[place]))

    def finish(self) -> Quality:
        """Give the quality over everything that was added.

        Returns:
            Errors for each output, and shares where there are classes or labels.
        """
        outputs = []
        for index, name in enumerate(self._names):
            square = max(float(self._square[index]), np.finfo(np.float64).tiny)
            moved = float(self._moved[index])
            error = float(np.sqrt(moved / square)) if moved else 0.0
            cosine = float(self._cosine[index]) / max(1, self._samples)
            uncertainty = self._uncertainty(index)
            outputs.append(OutputQuality(name, error, uncertainty, cosine, *self._worst[index]))
        return Quality(
            tuple(outputs),
            self._same if self._same else None,
            self._right if self._right else None,
            self._float_right if self._float_right else None,
            self._samples,
        )

    def _uncertainty(self, index: int) -> float:
        """Standard error of a root mean square, as a share: half of that of the mean square."""
        count = self._samples
        mean = float(self._moved[index]) / max(1, count)
        if count < 2 or not mean > 0 or not np.isfinite(self._moved_square[index]):
            return 0.0
        variance = max(0.0, float(self._moved_square[index]) / count - mean**2)
        return 0.5 * float(np.sqrt(variance / count)) / mean
