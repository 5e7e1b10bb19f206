"""Labelled samples that stream in batches: where raw samples come from, and a split of them.

A source reads raw samples in any order. A split is a choice of its samples in an order, with their
labels and the preprocessing that makes model inputs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

STATISTICS_BATCH = 256
SCAN_BATCH = 64
SMALLEST_STD = 1e-6  # below, a channel counts as constant and is divided by 1

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(raw batch [N, ...], generator) -> raw batch of the same shape and dtype."""


class Source(Protocol):
    """Raw samples that can be read in any order.

    They may be arrays in memory, files on disk, or JPEGs in a buffer. A source of files may also
    have a method `adapted(preprocessing, channels)`, which returns a source that reads them as
    these ask for.
    """

    @property
    def name(self) -> str:
        """What error messages call the samples, such as "x_train in mnist.npz"."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The type of raw samples."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one raw sample, without N."""
        ...

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read some samples.

        Args:
            rows: int64 [N], the samples' numbers from 0.

        Returns:
            Raw samples [N, *sample_shape].
        """
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples that lie in memory.

    Attributes:
        name: what error messages call them.
        x: the raw samples, [n, ...].
    """

    name: str
    x: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """The type of raw samples."""
        return self.x.dtype

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one raw sample, without N."""
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Take some samples.

        Args:
            rows: int64 [N], the samples' numbers from 0.

        Returns:
            Raw samples [N, ...], a copy.
        """
        return self.x[rows]


@dataclass(frozen=True, eq=False)
class Split:
    """Some samples of a source, in an order, with their labels.

    Attributes:
        source: where the raw samples are read.
        rows: int64 [n], which samples of the source.
        y: int64 [n], the class of each.
        preprocessing: how raw samples become model inputs.
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
        """Read the samples batch by batch; one batch is in memory at a time.

        Args:
            batch_size: samples of a batch; the last may have fewer.
            shuffle: a generator that draws a new order, and what `augment` needs. When shuffling, a
                last batch of a single sample is left out, as BatchNorm cannot train on it.
            augment: changes raw training samples at random; needs `shuffle`.

        Yields:
            (x, y): the model's input [N, ...], float32 (int64 for indices), and int64 [N] classes.

        Raises:
            OptionError: if batch_size is below 1, or augment comes without shuffle.
            DataError: if a sample holds NaN or infinity, or cannot be read.
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
            self._check_finite(raw, batch)
            if augment is not None and shuffle is not None:
                raw = augment(raw, shuffle)
            yield self.preprocessing.apply(raw), self.y[batch]

    def _check_finite(self, raw: np.ndarray, batch: np.ndarray) -> None:
        """DataError naming the first sample of the batch that holds NaN or infinity."""
        if raw.dtype.kind != "f" or np.isfinite(raw).all():
            return
        is_finite = np.isfinite(raw).reshape(len(raw), -1).all(axis=1)
        first = batch[np.nonzero(~is_finite)[0][0]]
        raise DataError(
            f"{self.source.name} holds NaN or infinity in sample {self.rows[first]}: replace "
            "the values or drop the sample"
        )

    def take(self, count: int) -> Split:
        """Take samples that are evenly spaced over the split.

        The first ones of a sorted data set would all be of one class.

        Args:
            count: how many; all if the split has fewer.

        Returns:
            The split with these samples only.
        """
        count = min(count, len(self))
        return self.pick(np.arange(count) * len(self) // max(1, count))

    def pick(self, chosen: np.ndarray) -> Split:
        """Pick samples by their places in the split.

        Args:
            chosen: int64 [k], places from 0 to len(self) - 1.

        Returns:
            The split with these samples, in this order.
        """
        return replace(self, rows=self.rows[chosen], y=self.y[chosen])

    def divide(self, fraction: float, *, seed: int = 0) -> tuple[Split, Split]:
        """Set a part of the samples aside.

        Args:
            fraction: the part's share of the samples, between 0 and 1.
            seed: decides which samples are drawn, the same on every machine.

        Returns:
            (rest, part), both in the order of this split and with at least one sample.

        Raises:
            OptionError: if fraction does not lie between 0 and 1.
            DataError: if there are fewer than 2 samples.
        """
        if not 0 < fraction < 1:
            raise OptionError(
                f"a fraction of {fraction} does not divide a data set: use one between 0 and 1"
            )
        if len(self) < 2:
            raise DataError(
                f"{self.source.name} has {len(self)} samples, too few to set some aside: use more "
                "data"
            )
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        # RandomState, because numpy promises its numbers for all versions: a held-out set must stay
        # held out.
        order = np.random.RandomState(seed).permutation(len(self))
        rest = self.pick(np.sort(order[count:]))
        part = self.pick(np.sort(order[:count]))
        return rest, part

    def find_only_value(self) -> float | None:
        """Find the raw value that all samples hold in every place, as empty recordings do.

        Returns:
            The value; None as soon as there are two.
        """
        values: set[float] = set()
        for start in range(0, len(self), SCAN_BATCH):
            raw = self.source.read(self.rows[start : start + SCAN_BATCH])
            values |= {float(raw.min()), float(raw.max())}
            if len(values) > 1:
                return None
        return values.pop() if values else None

    def with_preprocessing(
        self, preprocessing: Preprocessing, *, channels: int | None = None
    ) -> Split:
        """Bring the same samples to the model in another way.

        Args:
            preprocessing: files are read in the size and length that it asks for.
            channels: of the model's images, where they are known; files are read with as many.

        Returns:
            The split with this preprocessing.

        Raises:
            DataError: if the samples do not fit it.
        """
        adapted = getattr(self.source, "adapted", None)
        source = self.source if adapted is None else adapted(preprocessing, channels)
        preprocessing.check(source.dtype, source.sample_shape, where=source.name)
        return replace(self, source=source, preprocessing=preprocessing)

    def fitted(self, input_shape: Sequence[int | None]) -> Split:
        """Fit the samples to a model's input, where they leave a choice.

        Images are read gray or as RGB by the model's channels; float samples [H, W] get a channel
        before them where the model has one; uint8 samples [H, W] lose it where it has none.

        Args:
            input_shape: of one sample of the model's input, without N; None is any length.

        Returns:
            The split as the model takes it, or this one where there is nothing to choose.
        """
        shape = self.source.sample_shape
        kind = self.preprocessing.kind
        if kind == "image" and len(input_shape) == 3 and input_shape[0] in (1, 3):
            return self.with_preprocessing(self.preprocessing, channels=input_shape[0])
        if isinstance(self.source, Arrays) and self.source.dtype.kind == "f" and len(shape) == 2:
            takes_channel = len(input_shape) == 3 and input_shape[0] in (1, None)
            if kind == "array" and takes_channel:
                return replace(self, source=replace(self.source, x=self.source.x[:, None]))
        plain = not self.preprocessing.mean and not self.preprocessing.std
        if kind == "image" and len(shape) == 2 and len(input_shape) == 2 and plain:
            return self.with_preprocessing(replace(self.preprocessing, kind="array"))
        return self

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Compute the mean and standard deviation of each channel before normalization.

        Returns:
            (mean, standard deviation), as `Preprocessing.normalized` takes them; the deviation of a
            constant channel is given as 1.
        """
        plain = replace(self, preprocessing=replace(self.preprocessing, mean=(), std=()))
        total = np.zeros(1)
        squares = np.zeros(1)
        count = 0
        for x, _ in plain.batches(STATISTICS_BATCH):
            axes: tuple[int, ...] = (0, *range(2, x.ndim))
            if plain.preprocessing.spectrum is not None:  # its bands are the last axis
                axes = tuple(range(x.ndim - 1))
            wide = x.astype(np.float64)
            total = total + wide.sum(axes)
            squares = squares + (wide**2).sum(axes)
            count += x.size // total.size
        mean = total / count
        std = np.sqrt(np.maximum(0.0, squares / count - mean**2))
        return tuple(mean.tolist()), tuple(np.where(std > SMALLEST_STD, std, 1.0).tolist())
