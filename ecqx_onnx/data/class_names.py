"""Number the classes of a data set as a model numbers them, by comparing class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ecqx_onnx.data.dataset import Dataset
from ecqx_onnx.data.split import Split
from ecqx_onnx.errors import DataError

SHOWN = 8  # names in a message


def match_classes(
    dataset: Dataset, labels: Sequence[str], *, outputs: int | None = None
) -> tuple[Dataset, tuple[str, ...]]:
    """Number the classes of a data set as the model does.

    Args:
        dataset: what the model is judged on. Where its classes have no names of their own (numbers
            in an array), nothing is changed.
        labels: the model's class names in the order of its scores; empty, or "0", "1", ... where it
            has none.
        outputs: how many classes the model scores, where that is known.

    Returns:
        The data set whose labels are the model's, and notes: those of the data set, and what could
        not be matched.

    Raises:
        DataError: if a class with samples is not among the model's, or the model has a name twice.
    """
    if not dataset.named:
        return dataset, dataset.notes
    # 1. The names that the model knows; a model without names counts its classes.
    known = tuple(labels)
    unnamed = known == _number_names(len(labels))
    if unnamed:
        known = _number_names(outputs or len(labels))
    used = _find_used_classes(dataset)
    if unnamed and not all(dataset.labels[label] in known for label in used):
        return dataset, (*dataset.notes, _describe_unmatched(dataset, outputs))
    # 2. Each name must lead to one class.
    repeated = _find_repeated_name(known)
    if repeated is not None:
        raise DataError(
            f"the model has the class name '{repeated}' twice, so classes can't be matched: rename "
            "one of them"
        )
    # 3. The model's number for each class of the data; -1 where no sample has the class.
    places = {name: place for place, name in enumerate(known)}
    for label in used:
        name = dataset.labels[label]
        if name not in places:
            raise DataError(
                f"{dataset.name} has the class '{name}', which the model does not know "
                f"(its classes: {_show_some(known)}): rename the class as the model calls it, "
                "or leave it out"
            )
    numbered = np.array([places.get(name, -1) for name in dataset.labels], np.int64)
    train = None if dataset.train is None else _renumber_split(dataset.train, numbered)
    test = _renumber_split(dataset.test, numbered)
    return replace(dataset, train=train, test=test, labels=known), dataset.notes


def _number_names(count: int) -> tuple[str, ...]:
    """The names that stand for none: "0", "1", ..."""
    return tuple(map(str, range(count)))


def _find_repeated_name(names: tuple[str, ...]) -> str | None:
    """The first name that occurs more than once."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def _find_used_classes(dataset: Dataset) -> list[int]:
    """The classes that have samples, ascending."""
    used = set(dataset.test.y.tolist())
    if dataset.train is not None:
        used |= set(dataset.train.y.tolist())
    return sorted(used)


def _renumber_split(split: Split, numbered: np.ndarray) -> Split:
    return replace(split, y=numbered[split.y])


def _describe_unmatched(dataset: Dataset, outputs: int | None) -> str:
    count = len(dataset.labels)
    order = (
        f"the classes of {dataset.name} are taken in sorted order ({_show_some(dataset.labels)})"
    )
    if outputs is not None and outputs != count:
        return (
            f"the model tells {outputs} classes apart and has no names for them, the data have "
            f"{count}: {order}"
        )
    return f"the model has no names for its classes: {order}"


def _show_some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN} more"
    return shown
