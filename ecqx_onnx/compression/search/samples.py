"""Reads data as users have it, labeled or not, as samples by the names of a model's inputs.

inputs.npz       arrays called as the model's inputs are, and `labels` if there are any
images.npz       x_train, x_test or x, with or without y_train, y_test, y; for one input
photos/          images or wavs, with or without a folder for each class
load.py:samples  yields or returns an array, (inputs, labels) or {input: array}
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecqx_onnx.data import Dataset, Source, Split, load_dataset
from ecqx_onnx.data.folders import IMAGES, WAVS, open_images, open_wavs
from ecqx_onnx.data.npz import read_npz
from ecqx_onnx.data.split import Arrays
from ecqx_onnx.errors import DataError, FileError, InputError
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.preprocessing.preprocessing import Preprocessing, infer_preprocessing
from ecqx_onnx.runtime.runner import Batch
from ecqx_onnx.runtime.sessions import NUMPY_TYPES

FEWEST = 32
MOST_LOOKED_AT = 1000  # files that tell whether a folder holds images
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class InputSpec:
    """One input of the model: name, onnxruntime's type ("tensor(float)"), lengths (None: free)."""

    name: str
    type: str
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, node: Any) -> InputSpec:
        """Read the description of an input from a session.

        Args:
            node: onnxruntime's description, with name, type and shape.

        Returns:
            The input; lengths that are no integers are free.
        """
        lengths = tuple(n if isinstance(n, int) else None for n in node.shape)
        return cls(node.name, node.type, lengths)

    @property
    def dtype(self) -> np.dtype:
        """numpy's type. DataError for types that no array has."""
        if self.type not in NUMPY_TYPES:
            raise DataError(f"the model's input '{self.name}' is a {self.type}: only tensors work")
        return np.dtype(NUMPY_TYPES[self.type])


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a source, and what brings them to the model.

    sources: input -> raw samples. preprocessing: for the only input; None: arrays as they are.
    rows: which samples. labels: int64, one a sample in `rows`; None without.
    calls: each sample is all of a call's inputs, whose first axis is no batch (an LSTM's state).
    """

    name: str
    inputs: tuple[InputSpec, ...]
    sources: Mapping[str, Source]
    preprocessing: Preprocessing | None
    rows: np.ndarray
    labels: np.ndarray | None
    calls: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, chosen: np.ndarray) -> Samples:
        """Choose samples by their place in `rows`.

        Args:
            chosen: integers, or a mask.

        Returns:
            New samples of the same source.
        """
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, rows=self.rows[chosen], labels=labels)

    def take(self, count: int) -> Samples:
        """Take samples evenly spaced.

        Args:
            count: how many; all if there are fewer.

        Returns:
            New samples of the same source.
        """
        count = min(count, len(self))
        return self.pick(np.arange(count) * len(self) // max(1, count))

    def batches(self, size: int) -> Iterator[tuple[Feeds, np.ndarray | None]]:
        """Read the samples batch by batch.

        Args:
            size: samples at a time; the last batch may have fewer.

        Yields:
            (inputs by name, labels or None).
        """
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            labels = None if self.labels is None else self.labels[part]
            yield self._read(self.rows[part]), labels

    def feeds(self, size: int) -> list[Feeds]:
        """Read all batches at once, without labels.

        Args:
            size: samples at a time.

        Returns:
            Inputs by name, for each batch.
        """
        return [inputs for inputs, _ in self.batches(size)]

    def _read(self, rows: np.ndarray) -> Feeds:
        found = {}
        for spec in self.inputs:
            raw = self.sources[spec.name].read(rows)
            if raw.dtype.kind == "f" and not np.isfinite(raw).all():
                raise DataError(
                    f"{self.sources[spec.name].name} holds NaN or infinity in samples {rows[0]} to"
                    f" {rows[-1]}: replace the values or drop the samples"
                )
            if self.calls:
                if len(rows) != 1:
                    raise DataError(f"each sample of {self.name} is a call of its own")
                raw = raw[0]
            x = raw if self.preprocessing is None else self.preprocessing.apply(raw)
            found[spec.name] = _fit(x, spec)
        return Batch(found, len(rows))


def _fit(x: np.ndarray, spec: InputSpec) -> np.ndarray:
    """x in the type and shape that the input wants; DataError where it can't be."""
    dtype = spec.dtype
    if x.dtype.kind == "f" and dtype.kind in "iu":
        raise DataError(f"input '{spec.name}' takes {spec.type}, and the data give {x.dtype}")
    lengths = spec.shape[1:]
    if not spec.shape and x.ndim == 1 and len(x) and (x == x[0]).all():
        return np.asarray(x[0], dtype=dtype)  # a setting, the same for all samples
    fits = len(spec.shape) == x.ndim and all(
        wanted in (None, there) for wanted, there in zip(lengths, x.shape[1:], strict=False)
    )
    if not fits:
        wanted = "any shape" if not spec.shape else ["any" if n is None else n for n in spec.shape]
        raise DataError(
            f"input '{spec.name}' takes {wanted}, and the data give {list(x.shape)}: give samples "
            "of that shape, the batch first"
        )
    return np.ascontiguousarray(x, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Splits:
    """Three sets of samples that don't overlap.

    statistics: what rounding learns from. search: what the dial is chosen on. verdict: what quality
    is stated for. labels: names of the classes, () without.
    """

    statistics: Samples
    search: Samples
    verdict: Samples
    labels: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The sizes, in words."""
        return (
            f"{len(self.statistics)} samples for statistics, {len(self.search)} for the search,"
            f" {len(self.verdict)} for the verdict"
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """What DATA holds: everything in `samples`, or a part of its own for the verdict in `test`."""

    samples: Samples
    test: Samples | None
    labels: tuple[str, ...]


def load_splits(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    samples: int = 1024,
    seed: int = 0,
) -> Splits:
    """Reads DATA and divides it.

    Args:
        data: one of the forms above; in Python also an array, {input: array}, (inputs, labels), a
            Dataset or a Split.
        inputs: of the model.
        preprocessing: by default what types and shapes ask for.
        samples: at most so many are used; of a test set of its own as many again.
        seed: of the draw.

    Returns:
        Samples for statistics, for the search and for the verdict, which share none.

    Raises:
        DataError: fewer than 32 samples, or they don't fit the model.
        FileError: a file is missing or damaged.
    """
    if samples < FEWEST:
        raise DataError(f"--samples {samples} is too few to learn from: use at least {FEWEST}")
    found = _find(data, tuple(inputs), preprocessing)
    everything = found.samples
    if len(everything) < FEWEST:
        raise DataError(
            f"{everything.name} has {len(everything)} samples to learn from, and {FEWEST} are the"
            " fewest: add some, they need no labels"
        )
    drawn = np.random.RandomState(seed).permutation(len(everything))[:samples]
    drawn = drawn.astype(np.int64)
    eighth = max(1, len(drawn) // 8)
    if found.test is not None:
        quarter = max(1, len(drawn) // 4)
        search = everything.pick(np.sort(drawn[:quarter]))
        statistics = everything.pick(np.sort(drawn[quarter:]))
        splits = Splits(statistics, search, found.test.take(samples), found.labels)
    else:
        parts = (drawn[2 * eighth :], drawn[:eighth], drawn[eighth : 2 * eighth])
        rest, search, last = (everything.pick(np.sort(part)) for part in parts)
        splits = Splits(rest, search, last, found.labels)
    next(splits.statistics.batches(1))  # so that what doesn't fit is told before work begins
    return splits


def load_samples(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    samples: int | None = None,
) -> Samples:
    """Read DATA to judge a file on: the test samples where there are any, else all of them.

    Args:
        data: one of the forms above.
        inputs: of the model.
        preprocessing: by default what types and shapes ask for.
        samples: at most so many, evenly spaced; None for all.

    Returns:
        The samples.

    Raises:
        DataError: there is none, or they don't fit the model.
        FileError: a file is missing or damaged.
    """
    found = _find(data, tuple(inputs), preprocessing)
    chosen = found.samples if found.test is None else found.test
    if not len(chosen):
        raise DataError(f"{chosen.name} holds no sample: there is nothing to judge by")
    return chosen if samples is None else chosen.take(samples)


def load_calibration(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    samples: int = 512,
    seed: int = 0,
) -> Samples:
    """Read DATA to round by: the training samples where there are any, else all of them.

    Args:
        data: one of the forms above.
        inputs: of the model.
        preprocessing: by default what types and shapes ask for.
        samples: at most so many, drawn.
        seed: of the draw.

    Returns:
        The samples.

    Raises:
        DataError: fewer than 32 samples, or they don't fit the model.
        FileError: a file is missing or damaged.
    """
    found = _find(data, tuple(inputs), preprocessing).samples
    if min(len(found), samples) < FEWEST:
        raise DataError(
            f"{found.name} gives {min(len(found), samples)} samples to round by, and {FEWEST} are"
            " the fewest: add some, they need no labels"
        )
    drawn = np.random.RandomState(seed).permutation(len(found))[:samples]
    return found.pick(np.sort(drawn.astype(np.int64)))


def holds_inputs(data: Any, names: Sequence[str]) -> bool:
    """Tell whether data say themselves which array is which input.

    Args:
        data: one of the forms above.
        names: of all of the model's inputs.

    Returns:
        True for an .npz or a mapping with an array for each of them.
    """
    if isinstance(data, Mapping):
        return all(name in data for name in names)
    if isinstance(data, str | Path) and Path(data).suffix == ".npz":
        there = _names_in(Path(data))
        return all(name in there for name in names)
    return False


def _find(data: Any, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None) -> _Found:
    if isinstance(data, Dataset):
        return _from_dataset(data, inputs, preprocessing)
    if isinstance(data, Split):
        return _Found(_from_split(data, inputs, preprocessing), None, ())
    if isinstance(data, str | Path):
        return _from_text(str(data), inputs, preprocessing)
    return _from_values("the data", data, inputs, preprocessing)


def _from_text(
    text: str, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None
) -> _Found:
    if is_function_spec(text):
        function = load_function(text)
        try:
            result = function()
            if not isinstance(result, Dataset | Split | Mapping | tuple | np.ndarray):
                result = _collect(result)
        except InputError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise DataError(f"{text} fails ({type(error).__name__}: {error}): mend it") from error
        if isinstance(result, Dataset | Split):
            return _find(result, inputs, preprocessing)
        return _from_values(text, result, inputs, preprocessing)
    path = Path(text)
    if path.suffix == ".npz":
        return _from_npz(path, inputs, preprocessing)
    if text and path.is_dir():
        if preprocessing is None and _holds_images(path):
            preprocessing = _fit_images(inputs)
        files = _loose_files(path)
        if files:
            return _from_files(path, files, inputs, preprocessing)
    return _from_dataset(load_dataset(text, preprocessing=preprocessing), inputs, preprocessing)


def _holds_images(folder: Path) -> bool:
    """Whether one of the first files, in the folder itself or below, is an image."""
    looked_at = islice(folder.rglob("*"), MOST_LOOKED_AT)
    return any(path.suffix.lower() in IMAGES for path in looked_at)


def _fit_images(inputs: tuple[InputSpec, ...]) -> Preprocessing | None:
    """Images in the size of the model's only input; None where it leaves the size open."""
    lengths = inputs[0].shape[1:] if len(inputs) == 1 else ()
    if len(lengths) != 3 or lengths[0] not in (1, 3) or None in lengths:
        return None
    channels, height, width = (int(length or 0) for length in lengths)
    return Preprocessing("image", scale=255.0, image_shape=(height, width, channels))


def _loose_files(folder: Path) -> list[Path]:
    """Images or wavs that lie in the folder itself, without classes."""
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise FileError(f"{folder} cannot be listed ({error.strerror or error})") from error
    return [path for path in there if path.suffix.lower() in IMAGES + WAVS and path.is_file()]


def _from_files(
    folder: Path,
    files: Sequence[Path],
    inputs: tuple[InputSpec, ...],
    preprocessing: Preprocessing | None,
) -> _Found:
    wavs = [path for path in files if path.suffix.lower() in WAVS]
    if wavs and len(wavs) < len(files):
        raise DataError(f"{folder} holds images and wavs: keep them in two folders")
    make = open_wavs if wavs else open_images
    source = make(files[0], preprocessing, str(folder), files)
    return _Found(_from_source(source, inputs, preprocessing, None), None, ())


def _from_npz(
    path: Path, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None
) -> _Found:
    names = _names_in(path)
    wanted = [spec.name for spec in inputs]
    if all(name in names for name in wanted):
        arrays = read_npz(path, wanted={*wanted, "labels"})
        labels = arrays.pop("labels", None)
        by_name = {name: arrays[name] for name in wanted}
        return _Found(_from_arrays(path.name, by_name, labels, inputs, preprocessing), None, ())
    if "jpeg_train" in names or "jpeg_test" in names:
        dataset = load_dataset(str(path), preprocessing=preprocessing)
        return _from_dataset(dataset, inputs, preprocessing)
    keys = {"x", "y", "x_train", "y_train", "x_test", "y_test", "labels", "is_test"}
    if not keys & {"x", "x_train", "x_test"} & set(names) or len(inputs) > 1:
        raise DataError(
            f"{path} holds {', '.join(sorted(names)[:6]) or 'nothing'}, and the model takes"
            f" {', '.join(wanted)}: save one array for each input, called like it"
        )
    arrays = read_npz(path, wanted=keys)
    return _from_keys(path.name, arrays, inputs, preprocessing)


def _names_in(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename.removesuffix(".npy") for info in archive.infolist()]
    except FileNotFoundError:
        raise FileError(f"there is no file {path}: check the path") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise FileError(
            f"{path} cannot be read as .npz ({error}): save it anew with numpy.savez_compressed"
        ) from error


def _from_keys(
    name: str,
    arrays: Mapping[str, np.ndarray],
    inputs: tuple[InputSpec, ...],
    preprocessing: Preprocessing | None,
) -> _Found:
    """x_train and x_test, or x alone; y beside them where it is there."""
    made: dict[str, Samples] = {}
    for key in ("x", "x_train", "x_test"):
        if key in arrays:
            y = arrays.get("y" + key[1:])
            by_name = {inputs[0].name: arrays[key]}
            made[key] = _from_arrays(f"{key} in {name}", by_name, y, inputs, preprocessing)
    labels = arrays.get("labels")
    classes = tuple(map(str, labels)) if labels is not None and labels.dtype.kind == "U" else ()
    is_test = arrays.get("is_test")
    if "x" in made and is_test is not None and is_test.dtype == bool and is_test.any():
        whole = made["x"]
        if is_test.shape == (len(whole),) and not is_test.all():
            return _Found(
                whole.pick(np.nonzero(~is_test)[0]), whole.pick(np.nonzero(is_test)[0]), classes
            )
    if "x_train" in made:
        return _Found(made["x_train"], made.get("x_test"), classes)
    return _Found(made.get("x", made.get("x_test")), None, classes)  # type: ignore[arg-type]


def _collect(parts: Any) -> Any:
    """What a generator yields, batch by batch, as one value of the same form."""
    batches = list(parts)
    if not batches:
        raise DataError("it yields no sample")
    if isinstance(batches[0], Mapping):
        return _join_by_name(batches)
    if isinstance(batches[0], tuple):
        columns = zip(*batches, strict=True)
        return tuple(_join(column) for column in columns)
    return np.concatenate([np.asarray(batch) for batch in batches])


def _join(column: Sequence[Any]) -> Any:
    if isinstance(column[0], Mapping):
        return _join_by_name(column)
    return np.concatenate([np.atleast_1d(np.asarray(part)) for part in column])


def _join_by_name(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {}
    for name in parts[0]:
        joined[name] = np.concatenate([part[name] for part in parts])
    return joined


def _from_values(
    name: str, value: Any, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None
) -> _Found:
    """An array, {input: array}, or (one of these, labels)."""
    labels = None
    if isinstance(value, tuple) and len(value) == 2:
        value, labels = value[0], np.asarray(value[1])
    if isinstance(value, Mapping):
        if labels is None and "labels" in value and "labels" not in {spec.name for spec in inputs}:
            labels = np.asarray(value["labels"])
        missing = [spec.name for spec in inputs if spec.name not in value]
        keys = {"x", "x_train", "x_test"} & set(value)
        if missing and keys and len(inputs) == 1:
            arrays = {key: np.asarray(array) for key, array in value.items()}
            return _from_keys(name, arrays, inputs, preprocessing)
        if missing:
            raise DataError(f"{name} has no '{missing[0]}', which is an input of the model: add it")
        by_name = {spec.name: np.asarray(value[spec.name]) for spec in inputs}
    elif len(inputs) == 1:
        by_name = {inputs[0].name: np.asarray(value)}
    else:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(f"{name} is one array, and the model takes {names}: give one for each")
    return _Found(_from_arrays(name, by_name, labels, inputs, preprocessing), None, ())


def _from_arrays(
    name: str,
    arrays: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    inputs: tuple[InputSpec, ...],
    preprocessing: Preprocessing | None,
) -> Samples:
    lengths = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    count = next(iter(lengths.values()))
    for key, length in lengths.items():
        if length != count:
            raise DataError(f"{name} has {length} samples in '{key}' and {count} in others")
        if arrays[key].dtype.kind not in "biuf":
            raise DataError(f"'{key}' in {name} holds {arrays[key].dtype}, and must hold numbers")
    if labels is not None:
        labels = _checked_labels(name, labels, count)
    sources = {key: Arrays(f"{key} in {name}", array) for key, array in arrays.items()}
    calls = all(arrays[spec.name].ndim == len(spec.shape) + 1 for spec in inputs)
    if calls and preprocessing is None:
        return Samples(name, inputs, sources, None, np.arange(count), labels, calls=True)
    if len(inputs) == 1:
        source = next(iter(sources.values()))
        return _from_source(source, inputs, preprocessing, labels)
    return Samples(name, inputs, sources, None, np.arange(count), labels)


def _checked_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) != count:
        raise DataError(
            f"the labels of {name} are {labels.dtype} {labels.shape}, and must be integers, one "
            f"for each of the {count} samples"
        )
    return labels.astype(np.int64)


def _from_source(
    source: Source,
    inputs: tuple[InputSpec, ...],
    preprocessing: Preprocessing | None,
    labels: np.ndarray | None,
) -> Samples:
    """One input: raw samples, brought to the model as their type and shape ask for."""
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(f"{source.name} gives one input, and the model takes {names}")
    if preprocessing is None:
        preprocessing = _inferred(source, inputs[0])
    if preprocessing is not None:
        preprocessing.check(source.dtype, source.sample_shape, where=source.name)
    rows = np.arange(len(source))
    return Samples(source.name, inputs, {inputs[0].name: source}, preprocessing, rows, labels)


def _inferred(source: Source, spec: InputSpec) -> Preprocessing | None:
    """None where the model takes what is there: integers, or pixels in the order that they have."""
    if spec.dtype.kind in "iub" or source.dtype.kind == "f":
        return None
    usual = infer_preprocessing(source.dtype, source.sample_shape, where=source.name)
    if usual.kind != "image" or len(source.sample_shape) != 3:
        return usual
    lengths, raw = spec.shape[1:], source.sample_shape
    turned = (raw[2], *raw[:2])
    fits_raw = len(lengths) == 3 and all(n in (None, m) for n, m in zip(lengths, raw, strict=True))
    fits = len(lengths) == 3 and all(n in (None, m) for n, m in zip(lengths, turned, strict=True))
    if fits_raw and not fits:
        return Preprocessing("array", scale=255.0)
    return usual


def _from_dataset(
    data: Dataset, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None
) -> _Found:
    test = _from_split(data.test, inputs, preprocessing)
    if data.train is None:
        return _Found(test, None, data.labels)
    return _Found(_from_split(data.train, inputs, preprocessing), test, data.labels)


def _from_split(
    split: Split, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None
) -> Samples:
    made = _from_source(split.source, inputs, preprocessing or split.preprocessing, None)
    return replace(made, rows=split.rows, labels=split.y)
