"""A labelled data set: a training split, a test split, and the names of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.data.labels import MOST_CLASSES, check_class_names, check_labels
from ecqx_onnx.data.split import Arrays, Source, Split
from ecqx_onnx.errors import DataError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing, infer_preprocessing

TEST_FRACTION = 0.2  # held out of data that do not say what tests


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data set.

    Attributes:
        name: what messages call it.
        train: the training split; None for data that only test.
        test: the test split.
        labels: the classes' names; class i is labels[i].
        named: whether the names came with the data; else they are the numbers 0, 1, ...
        notes: what a user should know of the data, one sentence each.
    """

    name: str
    train: Split | None
    test: Split
    labels: tuple[str, ...]
    named: bool = True
    notes: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """How raw samples become model inputs, the same in both splits."""
        return self.test.preprocessing

    def with_preprocessing(self, preprocessing: Preprocessing) -> Dataset:
        """Bring the same samples to the model in another way.

        Args:
            preprocessing: what is done to raw samples instead.

        Returns:
            The data set with this preprocessing.

        Raises:
            DataError: if the samples do not fit it.
        """
        train = None if self.train is None else self.train.with_preprocessing(preprocessing)
        return replace(self, train=train, test=self.test.with_preprocessing(preprocessing))

    def fitted(self, input_shape: Sequence[int | None]) -> Dataset:
        """Fit the samples to a model's input, where they leave a choice; see `Split.fitted`.

        Args:
            input_shape: of one sample of the model's input, without N; None is any length.

        Returns:
            The data set as the model takes it.
        """
        train = None if self.train is None else self.train.fitted(input_shape)
        return replace(self, train=train, test=self.test.fitted(input_shape))

    def normalized(self, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Dataset:
        """Normalize the samples by a mean and a standard deviation.

        Args:
            mean: one value, or one per channel.
            std: likewise. Without both, the statistics of the training split are taken.

        Returns:
            The data set whose preprocessing subtracts the mean and divides by the deviation.

        Raises:
            DataError: if the statistics are wanted and there is no training split.
        """
        if not mean and not std:
            mean, std = self.training.statistics()
        return self.with_preprocessing(self.preprocessing.normalized(mean, std))

    @property
    def training(self) -> Split:
        """The training split. DataError if there is none."""
        if self.train is None:
            raise DataError(
                f"{self.name} has no training samples: add them (x_train and y_train, or a folder "
                "train/)"
            )
        return self.train

    def check_outputs(self, outputs: int) -> None:
        """Check that a classifier has an output for each label.

        Args:
            outputs: how many classes the model scores.

        Raises:
            DataError: if a label lies outside these classes.
        """
        highest = max(int(split.y.max()) for split in (self.train, self.test) if split is not None)
        if highest >= outputs:
            raise DataError(
                f"{self.name} has the label {highest}, and the model has {outputs} outputs: use a "
                "model with more"
            )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        arrays: Mapping[str, np.ndarray],
        *,
        preprocessing: Preprocessing | None = None,
    ) -> Dataset:
        """Make a data set of arrays in memory.

        Args:
            name: what messages call it.
            arrays: x_train, y_train, x_test, y_test (the first two may be missing); or x and y,
                which are divided by the boolean array is_test where there is one, else by a fixed
                draw of 20 % for testing. labels, an array of strings, names the classes.
            preprocessing: by default what dtype and shape of the samples ask for.

        Returns:
            The data set; the samples are not copied.

        Raises:
            DataError: for anything that cannot be a labelled data set.

        Example:
            >>> Dataset.from_arrays("toy", {"x": images, "y": classes}).test.batches(64)
        """
        sources: dict[str, Source] = {
            key: Arrays(f"{key} in {name}", np.atleast_1d(arrays[key]))
            for key in ("x", "x_train", "x_test")
            if key in arrays
        }
        return cls.from_sources(name, sources, arrays, preprocessing=preprocessing)

    @classmethod
    def from_sources(
        cls,
        name: str,
        sources: Mapping[str, Source],
        arrays: Mapping[str, np.ndarray],
        *,
        preprocessing: Preprocessing | None = None,
    ) -> Dataset:
        """Make a data set of samples that are read when they are needed.

        Args:
            name: what messages call it.
            sources: the samples by name: x, or x_train and x_test.
            arrays: the rest of what `from_arrays` takes, such as y_test and labels.
            preprocessing: by default what dtype and shape of the samples ask for.

        Returns:
            The data set.

        Raises:
            DataError: for anything that cannot be a labelled data set.
        """
        _require_samples(name, {*sources, *arrays})
        names = check_class_names(name, arrays.get("labels"))
        splits = {
            key: _make_split(name, key, source, arrays, names, preprocessing)
            for key, source in sources.items()
        }
        if "x_test" in splits:
            train = splits.get("x_train")
            test = splits["x_test"]
        else:
            train, test = _hold_out_test_split(name, splits["x"], arrays)
        if train is not None:
            _require_alike(name, train.source, test.source)
        classes = 1 + max(int(split.y.max()) for split in splits.values())
        name = name.encode("utf-8", "backslashreplace").decode()  # a path that is not UTF-8
        labels = names or tuple(map(str, range(classes)))
        return cls(name, train, test, labels, named=bool(names))


def _require_samples(name: str, found: set[str]) -> None:
    """DataError unless there are samples and labels for testing, or both undivided."""
    divided = bool({"x_test", "x_train", "y_test", "y_train"} & found)
    for required in ("x_test", "y_test") if divided else ("x", "y"):
        if required not in found:
            shown = ", ".join(sorted(found)) or "nothing"
            raise DataError(
                f"{name} has no '{required}' (found: {shown}): save x_train, y_train, x_test, "
                "y_test, or x and y"
            )


def _require_alike(name: str, train: Source, test: Source) -> None:
    """DataError if training and test samples differ in type or shape."""
    if (train.dtype, train.sample_shape) != (test.dtype, test.sample_shape):
        raise DataError(
            f"{name} holds training samples of {train.dtype} {train.sample_shape} and test samples "
            f"of {test.dtype} {test.sample_shape}: make them alike"
        )


def _make_split(
    name: str,
    key: str,
    source: Source,
    arrays: Mapping[str, np.ndarray],
    names: tuple[str, ...],
    preprocessing: Preprocessing | None,
) -> Split:
    """The samples `key` with their labels, checked."""
    y_key = "y" + key[1:]
    if y_key not in arrays:
        raise DataError(
            f"{name} has '{key}' and no '{y_key}': add the labels, one integer for each sample"
        )
    y = check_labels(f"{y_key} in {name}", arrays[y_key], len(names) or MOST_CLASSES)
    if len(y) != len(source):
        raise DataError(
            f"{name} has {len(source)} samples in '{key}' and {len(y)} labels in '{y_key}': make "
            "the lengths equal"
        )
    if len(y) == 0:
        raise DataError(f"{source.name} is empty: give at least one sample")
    if preprocessing is None:
        preprocessing = infer_preprocessing(source.dtype, source.sample_shape, where=source.name)
    preprocessing.check(source.dtype, source.sample_shape, where=source.name)
    return Split(source, np.arange(len(y)), y, preprocessing)


def _hold_out_test_split(
    name: str, split: Split, arrays: Mapping[str, np.ndarray]
) -> tuple[Split | None, Split]:
    """(train, test) of x and y."""
    if "is_test" not in arrays:
        if len(split) == 1:
            return None, split
        return split.divide(TEST_FRACTION, seed=0)
    is_test = arrays["is_test"]
    if is_test.dtype != bool or is_test.shape != (len(split),):
        raise DataError(
            f"is_test in {name} is {is_test.dtype} {is_test.shape}: save it as bool "
            f"({len(split)},), True for each test sample"
        )
    if not is_test.any():
        raise DataError(f"is_test in {name} marks no sample for testing: mark some")
    train = None if is_test.all() else split.pick(np.nonzero(~is_test)[0])
    return train, split.pick(np.nonzero(is_test)[0])
