"""(data set, the model's class names) -> the same data set with the model's numbers for its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ecqx_onnx.data.dataset import Dataset, Split
from ecqx_onnx.errors import DataError

SHOWN = 8  # names in a message


def match_classes(
    dataset: Dataset, labels: Sequence[str], *, outputs: int | None = None
) -> tuple[Dataset, tuple[str, ...]]:
    """Number the classes of a data set as the model does.

    Args:
        dataset: what the model is judged on. Where its classes have no names of their own (numbers in an array), nothing
            is changed.
        labels: the model's class names in the order of its scores; empty, or "0", "1", ... where it has none.
        outputs: how many classes the model scores, where that is known.

    Returns:
        The data set whose labels are the model's, and notes: those of the data set, and what could not be matched.

    Raises:
        DataError: if a class with samples is not among the model's, or the model has a name twice.
    """
    if not dataset.named:
        return dataset, dataset.notes
    numbers = tuple(map(str, range(outputs if outputs else len(labels))))
    unnamed = not labels or tuple(labels) == tuple(map(str, range(len(labels))))
    known = numbers if unnamed else tuple(labels)
    used = find_used_classes(dataset)
    if unnamed and not all(dataset.labels[label] in known for label in used):
        return dataset, (*dataset.notes, describe_unmatched(dataset, outputs))
    twice = (
        next((name for name in known if known.count(name) > 1), None)
        if len(known) < 10_000
        else None
    )
    if twice is not None:
        raise DataError(
            f"the model has the class name '{twice}' twice, so classes can't be matched: rename one of them"
        )
    places = {name: place for place, name in enumerate(known)}
    for label in used:
        if (name := dataset.labels[label]) not in places:
            raise DataError(
                f"{dataset.name} has the class '{name}', which the model does not know (its classes: {show_some(known)}):"
                " rename the class as the model calls it, or leave it out"
            )
    numbered = np.array([places.get(name, -1) for name in dataset.labels], np.int64)
    train = None if dataset.train is None else renumber_split(dataset.train, numbered)
    test = renumber_split(dataset.test, numbered)
    return replace(dataset, train=train, test=test, labels=known), dataset.notes


def find_used_classes(dataset: Dataset) -> list[int]:
    """The classes that have samples, ascending."""
    splits = [split for split in (dataset.train, dataset.test) if split is not None]
    return sorted({int(label) for split in splits for label in np.unique(split.y)})


def renumber_split(split: Split, numbered: np.ndarray) -> Split:
    return replace(split, y=numbered[split.y])


def describe_unmatched(dataset: Dataset, outputs: int | None) -> str:
    count = len(dataset.labels)
    order = f"the classes of {dataset.name} are taken in sorted order ({show_some(dataset.labels)})"
    if outputs is not None and outputs != count:
        return f"the model tells {outputs} classes apart and has no names for them, the data have {count}: {order}"
    return f"the model has no names for its classes: {order}"


def show_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
