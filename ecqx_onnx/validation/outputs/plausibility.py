"""What is probably wrong with data on which a model does badly.

A model that is judged on data with other class numbers, or brought to it in another way than in
training, still agrees with its own .onnx file in every sample. Only its accuracy tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecqx_onnx.validation.outputs.metrics import Proportion

FEWEST = 20  # samples, below which an accuracy tells nothing
MOST_CLASSES = 2000  # of which confusions are counted: 32 MB
RAW_PIXELS = 20.0  # inputs beyond this are no longer near 0..1 or a normal distribution
CLIPPED = 4.0  # times the calibrated range
WASTED = 1 / 50  # of the calibrated range


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often class i (row) was taken for class j (column): int64 [C, C]."""

    counts: np.ndarray

    @classmethod
    def count(cls, labels: np.ndarray, answers: np.ndarray, classes: int) -> Confusion:
        """Count pairs of label and answer.

        Args:
            labels: int64 [N], each in [0, classes).
            answers: int64 [N], each in [0, classes).
            classes: How many there are.

        Returns:
            The counts.
        """
        cells = np.bincount(
            labels.astype(np.int64) * classes + answers, minlength=classes * classes
        )
        return cls(cells.reshape(classes, classes))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    @property
    def right(self) -> Proportion:
        """Samples that got the class of their label."""
        return Proportion(int(np.trace(self.counts)), int(self.counts.sum()))


@dataclass(frozen=True)
class InputRange:
    """The lowest and highest value that went into the model's first input."""

    lowest: float
    highest: float

    @classmethod
    def of(cls, x: np.ndarray) -> InputRange | None:
        """Find the range of an input.

        Args:
            x: A batch of it.

        Returns:
            The range; None for an input that is no float, or empty.
        """
        if x.dtype.kind != "f" or not x.size:
            return None
        return cls(float(x.min()), float(x.max()))

    def widen(self, other: InputRange) -> InputRange:
        """Find the range of both.

        Args:
            other: The range of another batch.

        Returns:
            The range from the lower to the higher end.
        """
        return InputRange(min(self.lowest, other.lowest), max(self.highest, other.highest))

    @property
    def reach(self) -> float:
        """The largest absolute value."""
        return max(abs(self.lowest), abs(self.highest))


def doubt_accuracy(
    confusion: Confusion | None,
    *,
    who: str,
    inputs: InputRange | None = None,
    recorded: bool = True,
) -> tuple[str, ...]:
    """Say why a model that should know its classes does not.

    Args:
        confusion: of labels and answers; None where there are no labels.
        who: the model, as the subject of a sentence: "the float model", "PyTorch's model".
        inputs: what went into it.
        recorded: whether the preprocessing is one that somebody gave, and not a guess from the
            data's type.

    Returns:
        At most one sentence: on classes that are numbered otherwise, or on an accuracy no better
        than guessing.
    """
    if confusion is None or confusion.right.total < FEWEST:
        return ()
    right = confusion.right
    permuted = _find_permutation(confusion)
    if permuted is not None:
        first, share = permuted
        return (
            f"{who} is right for {100 * right.share:.1f} % of the samples, and would be for "
            f"{100 * share:.1f} % if the data"
            f" numbered its classes otherwise: what the data call {first[0]} it calls {first[1]}; "
            "give the classes the model's"
            " numbers, or names (`labels`, folders) that both have",
        )
    guess = float(confusion.counts.sum(1).max()) / right.total
    classes = int(np.count_nonzero(confusion.counts.sum(1)))
    if classes < 2 or right.share > guess + 0.1 * (1 - guess):
        return ()
    return (
        f"{who} is right for {100 * right.share:.1f} % of the samples, no better than guessing "
        f"({100 * guess:.1f} %):"
        f" {_find_likely_reason(inputs, recorded)}",
    )


def doubt_range(
    inputs: InputRange | None, calibrated: tuple[float, float] | None
) -> tuple[str, ...]:
    """Say that inputs are not those that the 8 bit activations were calibrated on.

    Args:
        inputs: What went into the model, or None.
        calibrated: The lowest and highest value that the first input's integers hold, or None.

    Returns:
        At most one sentence.
    """
    if inputs is None or calibrated is None:
        return ()
    low, high = calibrated
    reach = max(abs(low), abs(high))
    far = inputs.reach > CLIPPED * reach
    near = inputs.reach < WASTED * reach
    if not far and not near:
        return ()
    what = "are cut off there" if far else "fall on few of its levels"
    return (
        f"the network was calibrated on inputs from {low:.3g} to {high:.3g}; the data, from "
        f"{inputs.lowest:.3g} to"
        f" {inputs.highest:.3g}, {what}: bring them to the model as in calibration (pixels / 255, "
        "say)",
    )


def _find_likely_reason(inputs: InputRange | None, recorded: bool) -> str:
    if inputs is not None and inputs.highest > RAW_PIXELS:
        return (
            f"its inputs reach {inputs.highest:.3g}, and networks for images are trained on 0 to "
            "1 or so;"
            " give the preprocessing of the training (scale=255.0)"
        )
    if not recorded:
        return (
            "no preprocessing is recorded, so the data's type decided; give that of the training"
            " (ecqx_onnx.save(..., preprocessing=...), or PREPROCESSING in FILE.py)"
        )
    return "is it trained, and on data that were preprocessed in this way?"


def _find_permutation(confusion: Confusion) -> tuple[tuple[int, int], float] | None:
    """((label, the model's number for it), accuracy with the model's numbers), where labels are
    clearly numbered otherwise."""
    counts = confusion.counts
    used = np.flatnonzero(counts.sum(1))
    answers = counts[used].argmax(1)
    if len(used) < 2 or len(set(answers.tolist())) < len(used):
        return None
    total = int(counts.sum())
    share = float(counts[used, answers].sum()) / total
    moved = np.flatnonzero(answers != used)
    if not len(moved) or share < 0.7 or share < confusion.right.share + 0.1:
        return None
    first = int(moved[0])
    return (int(used[first]), int(answers[first])), share
