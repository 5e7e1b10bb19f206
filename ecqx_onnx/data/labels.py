"""Checks of labels: class numbers are integers, one for each sample, and class names are text."""

from __future__ import annotations

import numpy as np

from ecqx_onnx.data.text import check_text
from ecqx_onnx.errors import DataError

MOST_CLASSES = 65_536


def check_labels(where: str, y: np.ndarray, classes: int) -> np.ndarray:
    """Check the class numbers of samples.

    Args:
        where: what error messages call them, such as "y_train in mnist.npz".
        y: the labels as they were found, of any type and shape.
        classes: how many classes there may be.

    Returns:
        int64 [n], each in [0, classes).

    Raises:
        DataError: if they are no integers [n], or one lies outside.
    """
    if y.dtype.kind not in "iu" or y.ndim != 1:
        found = f"{where} is {y.dtype} {y.shape}"
        raise DataError(
            f"{found}, and labels must be integers, one for each sample: {_suggest_labels(y)}"
        )
    outside = np.nonzero((y < 0) | (y >= classes))[0]
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where} holds the label {int(y[row])} in row {row}: labels must lie between 0 and "
            f"{classes - 1}"
        )
    return y.astype(np.int64)


def _suggest_labels(y: np.ndarray) -> str:
    """What to do about labels that are no integers [N]."""
    if y.dtype.kind == "U":
        return "number the classes, and save their names as `labels`"
    one_each = y.ndim > 0 and y.shape[0] == y.size
    if y.dtype.kind == "f" and one_each and not np.array_equal(y, np.round(y)):
        return (
            "these are values of a regression, which has no classes; compare models on them with "
            "--inputs, without labels"
        )
    if y.ndim == 2 and y.shape[1] > 1:
        return "take the argmax of one-hot rows"
    return "save them as int64 [N]"


def check_class_names(name: str, labels: np.ndarray | None) -> tuple[str, ...]:
    """Check the class names of a data set.

    Args:
        name: what error messages call the data set.
        labels: strings [classes]; None where the data have no names.

    Returns:
        The names, class i is called names[i]; empty for None.

    Raises:
        DataError: if they are no strings, too many, or one is no text that files can hold.
    """
    if labels is None:
        return ()
    if labels.dtype.kind != "U" or labels.ndim != 1 or not 0 < len(labels) <= MOST_CLASSES:
        raise DataError(
            f"labels in {name} is {labels.dtype} {labels.shape}, and must be strings: give one for "
            "each class"
        )
    for number, label in enumerate(labels):
        check_text(str(label), f"class {number} of {name}")
    return tuple(map(str, labels))
