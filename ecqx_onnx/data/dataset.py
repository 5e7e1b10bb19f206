"""Raw samples and their labels -> splits that stream preprocessed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ecqx_onnx.data.text import check_text
from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing, infer_preprocessing

MOST_CLASSES = 65_536

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(raw batch [N, ...], generator) -> raw batch of the same shape and dtype."""


class Source(Protocol):
    """Raw samples that can be read in any order: arrays in memory, files on disk, JPEGs in a buffer."""

    @property
    def name(self) -> str: ...  # what an error message calls it: "x_train in mnist.npz"

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """rows: int64 [N] -> raw samples [N, *sample_shape].

        A source of files may also have `adapted(preprocessing, channels)`, which reads them as these ask for.
        """
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples that lie in memory."""

    name: str
    x: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.x[rows]


@dataclass(frozen=True, eq=False)
class Split:
    """Some samples of a source, in an order, with their labels.

    rows: int64 [n], which samples of the source. y: int64 [n], the class of each.
    """

    source: Source
    rows: np.ndarray
    y: np.ndarray
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: np.random.Generator | None = None,
        augment: Augmentation | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (x, y): the model's input [N, ...] float32 (int64 for indices), and classes int64 [N]; one batch in memory.

        shuffle: a generator for a new order, and for `augment`, which changes raw samples for training. When shuffling, a last
        batch of a single sample is left out, as BatchNorm cannot train on it.
        """
        if batch_size < 1:
            raise OptionError(f"a batch size of {batch_size} holds no sample: use at least 1")
        if augment is not None and shuffle is None:
            raise OptionError("augmentation draws from the generator given as `shuffle`: give one")
        order = np.arange(len(self)) if shuffle is None else shuffle.permutation(len(self))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            if shuffle is not None and len(batch) == 1 < min(batch_size, len(order)):
                return
            raw = self.source.read(self.rows[batch])
            if raw.dtype.kind == "f" and not np.isfinite(raw).all():
                bad = batch[np.nonzero(~np.isfinite(raw).reshape(len(raw), -1).all(axis=1))[0][0]]
                raise DataError(
                    f"{self.source.name} holds NaN or infinity in sample {self.rows[bad]}: replace the values or drop the sample"
                )
            if augment is not None and shuffle is not None:
                raw = augment(raw, shuffle)
            yield self.preprocessing.apply(raw), self.y[batch]

    def take(self, count: int) -> Split:
        """`count` samples evenly spaced over the split (sorted data sets would give one class otherwise); all if it has fewer."""
        count = min(count, len(self))
        return self._pick(np.arange(count) * len(self) // max(1, count))

    def divide(self, fraction: float, *, seed: int = 0) -> tuple[Split, Split]:
        """(rest, part): `part` holds that fraction of the samples, at least one, drawn by the seed; both keep the order."""
        if not 0 < fraction < 1:
            raise OptionError(
                f"a fraction of {fraction} does not divide a data set: use one between 0 and 1"
            )
        if len(self) < 2:
            raise DataError(
                f"{self.source.name} has {len(self)} samples, too few to set some aside: use more data"
            )
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        # RandomState, because numpy promises its numbers for all versions: a held-out set must stay held out.
        order = np.random.RandomState(seed).permutation(len(self))
        return self._pick(np.sort(order[count:])), self._pick(np.sort(order[:count]))

    def only_value(self) -> float | None:
        """The raw value that all of its samples hold in every place; None as soon as there are two."""
        values: set[float] = set()
        for start in range(0, len(self), 64):
            raw = self.source.read(self.rows[start : start + 64])
            values |= {float(raw.min()), float(raw.max())}
            if len(values) > 1:
                return None
        return values.pop() if values else None

    def with_preprocessing(
        self, preprocessing: Preprocessing, *, channels: int | None = None
    ) -> Split:
        """The same samples, brought to the model in another way. channels: of the model's images, where they are known.

        Files are read in the size, length and channels that this asks for. DataError if the samples do not fit.
        """
        adapted = getattr(self.source, "adapted", None)
        source = self.source if adapted is None else adapted(preprocessing, channels)
        preprocessing.check(source.dtype, source.sample_shape, where=source.name)
        return replace(self, source=source, preprocessing=preprocessing)

    def fitted(self, input_shape: Sequence[int | None]) -> Split:
        """As a model takes them whose one sample has this shape, where the samples leave a choice; None: any length.

        Gray or RGB images by the model's channels; float [H, W] with a channel before them, or uint8 ones without.
        """
        shape, kind = self.source.sample_shape, self.preprocessing.kind
        if kind == "image" and len(input_shape) == 3 and input_shape[0] in (1, 3):
            return self.with_preprocessing(self.preprocessing, channels=input_shape[0])
        plain = not self.preprocessing.mean and not self.preprocessing.std
        gray = isinstance(self.source, Arrays) and self.source.dtype.kind == "f" and len(shape) == 2
        if kind == "array" and gray and len(input_shape) == 3 and input_shape[0] in (1, None):
            return replace(self, source=replace(self.source, x=self.source.x[:, None]))
        if kind == "image" and len(shape) == 2 and len(input_shape) == 2 and plain:
            return self.with_preprocessing(replace(self.preprocessing, kind="array"))
        return self

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, standard deviation) per channel before normalisation, as `Preprocessing.normalized` takes them."""
        plain = replace(self, preprocessing=replace(self.preprocessing, mean=(), std=()))
        total, squares, count = np.zeros(1), np.zeros(1), 0
        for x, _ in plain.batches(256):
            axes = (
                tuple(range(x.ndim - 1))
                if plain.preprocessing.spectrum is not None
                else (0, *range(2, x.ndim))
            )
            wide = x.astype(np.float64)
            total, squares = total + wide.sum(axes), squares + (wide**2).sum(axes)
            count += x.size // total.size
        mean = total / count
        std = np.sqrt(np.maximum(0.0, squares / count - mean**2))
        return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())

    def _pick(self, chosen: np.ndarray) -> Split:
        return replace(self, rows=self.rows[chosen], y=self.y[chosen])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data set. labels: the classes' names, class i is labels[i]. train is None for pure test sets.

    named: whether the names came with the data; else they are the numbers 0, 1, ... notes: what a user should know of the
    data, one sentence each.
    """

    name: str
    train: Split | None
    test: Split
    labels: tuple[str, ...]
    named: bool = True
    notes: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        return self.test.preprocessing

    def with_preprocessing(self, preprocessing: Preprocessing) -> Dataset:
        """The same samples, brought to the model in another way. DataError if they do not fit."""
        train = None if self.train is None else self.train.with_preprocessing(preprocessing)
        return replace(self, train=train, test=self.test.with_preprocessing(preprocessing))

    def fitted(self, input_shape: Sequence[int | None]) -> Dataset:
        """See `Split.fitted`."""
        train = None if self.train is None else self.train.fitted(input_shape)
        return replace(self, train=train, test=self.test.fitted(input_shape))

    def normalized(self, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Dataset:
        """With this mean and standard deviation; without arguments, those of the training split."""
        if not mean and not std:
            mean, std = self.training.statistics()
        return self.with_preprocessing(self.preprocessing.normalized(mean, std))

    @property
    def training(self) -> Split:
        """The training split. DataError if there is none."""
        if self.train is None:
            raise DataError(
                f"{self.name} has no training samples: add them (x_train and y_train, or a folder train/)"
            )
        return self.train

    def check_outputs(self, outputs: int) -> None:
        """DataError if a label lies outside a classifier's `outputs` classes."""
        highest = max(int(split.y.max()) for split in (self.train, self.test) if split is not None)
        if highest >= outputs:
            raise DataError(
                f"{self.name} has the label {highest}, and the model has {outputs} outputs: use a model with more"
            )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        arrays: Mapping[str, np.ndarray],
        *,
        preprocessing: Preprocessing | None = None,
    ) -> Dataset:
        """From x_train, y_train, x_test, y_test (the first two may be missing), or from x and y.

        x and y are divided by the boolean array is_test where there is one, else by a fixed draw of 20 % for testing.
        labels, an array of strings, names the classes. preprocessing: by default what dtype and shape ask for.
        DataError for anything that cannot be a labelled data set.
        """
        samples = [key for key in ("x", "x_train", "x_test") if key in arrays]
        sources: dict[str, Source] = {
            key: Arrays(f"{key} in {name}", np.atleast_1d(arrays[key])) for key in samples
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
        """As `from_arrays`, with the samples (x, or x_train and x_test) behind sources."""
        for required in (
            ("x_test", "y_test")
            if {"x_test", "x_train", "y_test", "y_train"} & {*sources, *arrays}
            else ("x", "y")
        ):
            if required not in sources and required not in arrays:
                found = ", ".join(sorted({*sources, *arrays})) or "nothing"
                raise DataError(
                    f"{name} has no '{required}' (found: {found}): save x_train, y_train, x_test, y_test, or x and y"
                )
        names = list_class_names(name, arrays.get("labels"))
        ready = {
            key: make_split(name, key, source, arrays, names, preprocessing)
            for key, source in sources.items()
        }
        train, test = (
            (ready.get("x_train"), ready["x_test"])
            if "x_test" in ready
            else hold_out_test_split(name, ready["x"], arrays)
        )
        if train is not None and (train.source.dtype, train.source.sample_shape) != (
            test.source.dtype,
            test.source.sample_shape,
        ):
            raise DataError(
                f"{name} holds training samples of {train.source.dtype} {train.source.sample_shape} and test samples of "
                f"{test.source.dtype} {test.source.sample_shape}: make them alike"
            )
        classes = 1 + max(int(split.y.max()) for split in ready.values())
        name = name.encode("utf-8", "backslashreplace").decode()  # a path that is not UTF-8
        labels = names or tuple(map(str, range(classes)))
        return cls(name, train, test, labels, named=bool(names))


def make_split(
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
            f"{name} has {len(source)} samples in '{key}' and {len(y)} labels in '{y_key}': make the lengths equal"
        )
    if len(y) == 0:
        raise DataError(f"{source.name} is empty: give at least one sample")
    if preprocessing is None:
        preprocessing = infer_preprocessing(source.dtype, source.sample_shape, where=source.name)
    preprocessing.check(source.dtype, source.sample_shape, where=source.name)
    return Split(source, np.arange(len(y)), y, preprocessing)


def hold_out_test_split(
    name: str, split: Split, arrays: Mapping[str, np.ndarray]
) -> tuple[Split | None, Split]:
    """(train, test) of x and y."""
    if "is_test" not in arrays:
        return split.divide(0.2, seed=0) if len(split) > 1 else (None, split)
    is_test = arrays["is_test"]
    if is_test.dtype != bool or is_test.shape != (len(split),):
        raise DataError(
            f"is_test in {name} is {is_test.dtype} {is_test.shape}: save it as bool ({len(split)},), True for each test sample"
        )
    if not is_test.any():
        raise DataError(f"is_test in {name} marks no sample for testing: mark some")
    return (None if is_test.all() else split._pick(np.nonzero(~is_test)[0])), split._pick(
        np.nonzero(is_test)[0]
    )


def check_labels(where: str, y: np.ndarray, classes: int) -> np.ndarray:
    """int64 [n], each in [0, classes). DataError otherwise."""
    if y.dtype.kind not in "iu" or y.ndim != 1:
        found = f"{where} is {y.dtype} {y.shape}"
        raise DataError(
            f"{found}, and labels must be integers, one for each sample: {_label_hint(y)}"
        )
    outside = np.nonzero((y < 0) | (y >= classes))[0]
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where} holds the label {int(y[row])} in row {row}: labels must lie between 0 and {classes - 1}"
        )
    return y.astype(np.int64)


def _label_hint(y: np.ndarray) -> str:
    """What to do about labels that are no integers [N]."""
    if y.dtype.kind == "U":
        return "number the classes, and save their names as `labels`"
    if (
        y.dtype.kind == "f"
        and y.ndim
        and y.shape[0] == y.size
        and not np.array_equal(y, np.round(y))
    ):
        return "these are values of a regression, which has no classes; compare models on them with --inputs, without labels"
    if y.ndim == 2 and y.shape[1] > 1:
        return "take the argmax of one-hot rows"
    return "save them as int64 [N]"


def list_class_names(name: str, labels: np.ndarray | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    if labels.dtype.kind != "U" or labels.ndim != 1 or not 0 < len(labels) <= MOST_CLASSES:
        raise DataError(
            f"labels in {name} is {labels.dtype} {labels.shape}, and must be strings: give one for each class"
        )
    return tuple(
        check_text(str(label), f"class {number} of {name}") for number, label in enumerate(labels)
    )
