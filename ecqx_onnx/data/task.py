"""Data of any task: one or several inputs, and targets of any shape, or none.

    boxes.npz         x (or x_train, x_test) and y of any type and shape; without y, unlabeled
    pairs.npz         arrays called as the network's arguments are, and `targets` (or y)
    photos/           images or wavs without folders of classes: unlabeled
    load.py:function  a function that returns such arrays in a dict, or an object with `train` and
                      `test`, which have `batches` and `divide` as a Split has

Labeled samples of classes are `Dataset`s; `load_training_data` tells both apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecqx_onnx.data import load_dataset
from ecqx_onnx.data.dataset import TEST_FRACTION, Dataset
from ecqx_onnx.data.folders import IMAGES, WAVS, open_images, open_wavs
from ecqx_onnx.data.npz import list_arrays, read_npz
from ecqx_onnx.data.split import Arrays, Augmentation, Source
from ecqx_onnx.errors import DataError, InputError, OptionError
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.preprocessing.preprocessing import Preprocessing, infer_preprocessing

TARGETS = ("y", "targets", "target", "labels")
PARTS = ("", "_train", "_test")
ONE_INPUT = "x"


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Some samples with inputs and targets of any kind.

    Attributes:
        name: what error messages call them.
        sources: raw samples by the network's arguments; {"x": ...} for one input.
        targets: any array [n, ...] of all samples; None without.
        rows: int64, which samples.
        preprocessing: of the only input; None where there are several, which are taken as they are.
    """

    name: str
    sources: Mapping[str, Source]
    targets: np.ndarray | None
    rows: np.ndarray
    preprocessing: Preprocessing | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_targets(self) -> bool:
        """Whether there is something to compare outputs with."""
        return self.targets is not None

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: np.random.Generator | None = None,
        augment: Augmentation | None = None,
    ) -> Iterator[tuple[Any, np.ndarray | None]]:
        """Read the samples batch by batch; one batch is in memory at a time.

        Args:
            batch_size: samples of a batch; the last may have fewer.
            shuffle: a generator that draws a new order; a last batch of a single sample is then
                left out, as BatchNorm cannot train on it.
            augment: changes raw training samples of the only input at random; needs `shuffle`.

        Yields:
            (inputs, targets): an array [N, ...], or {argument: array}; an array or None.

        Raises:
            OptionError: if augment comes with several inputs.
            DataError: if a sample holds NaN or infinity, or cannot be read.
        """
        order = self.rows if shuffle is None else shuffle.permutation(self.rows)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            if shuffle is not None and len(rows) == 1 < min(batch_size, len(order)):
                return
            raw = {name: self._read(name, rows) for name in self.sources}
            if augment is not None and shuffle is not None:
                if len(raw) != 1:
                    raise OptionError("augmentation is for networks of one input: leave it out")
                raw = {name: augment(value, shuffle) for name, value in raw.items()}
            yield self._bring(raw), None if self.targets is None else self.targets[rows]

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        raw = self.sources[name].read(rows)
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            raise DataError(
                f"{self.sources[name].name} holds NaN or infinity in samples {rows.min()} to"
                f" {rows.max()}: replace the values or drop the samples"
            )
        return raw

    def _bring(self, raw: Mapping[str, np.ndarray]) -> Any:
        """Raw samples as the network takes them."""
        if self.preprocessing is not None:
            (only,) = raw.values()
            return self.preprocessing.apply(only)
        return {name: _use_torch_type(value) for name, value in raw.items()}

    def divide(self, fraction: float, *, seed: int = 0) -> tuple[TaskSplit, TaskSplit]:
        """Set a part of the samples aside.

        Args:
            fraction: the part's share, between 0 and 1.
            seed: decides which samples are drawn, the same on every machine.

        Returns:
            (rest, part), both in the order of this split and with at least one sample.

        Raises:
            DataError: if there are fewer than 2 samples.
        """
        if len(self) < 2:
            raise DataError(
                f"{self.name} has {len(self)} samples, too few to set some aside: use more data"
            )
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        order = np.random.RandomState(seed).permutation(len(self))
        rest = replace(self, rows=self.rows[np.sort(order[count:])])
        return rest, replace(self, rows=self.rows[np.sort(order[:count])])


@dataclass(frozen=True, eq=False)
class TaskData:
    """A data set of any task.

    Attributes:
        name: what messages call it.
        train: the samples to train on.
        test: held out from training and from every choice.
        notes: what a user should know, one sentence each.
        labels: none; classes have names in a `Dataset`.
    """

    name: str
    train: Any
    test: Any
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How raw samples become inputs; None where they are taken as they are."""
        return getattr(self.test, "preprocessing", None)

    def with_preprocessing(self, preprocessing: Preprocessing) -> TaskData:
        """Bring the same samples to the network in another way.

        Args:
            preprocessing: what is done to raw samples of the only input.

        Returns:
            The data with this preprocessing.

        Raises:
            OptionError: if there are several inputs, or the data come ready from a function.
            DataError: if the samples do not fit it.
        """
        if self.preprocessing is None or not isinstance(self.test, TaskSplit):
            raise OptionError(
                f"{self.name} gives the network's inputs as they are, which --mean and --std are"
                " not for: leave them out"
            )
        for source in self.test.sources.values():
            preprocessing.check(source.dtype, source.sample_shape, where=source.name)
        return replace(
            self,
            train=replace(self.train, preprocessing=preprocessing),
            test=replace(self.test, preprocessing=preprocessing),
        )


def load_training_data(spec: str, arguments: Sequence[str], *, classes: bool) -> Dataset | TaskData:
    """Load the data of a training.

    Args:
        spec: an .npz file, a folder, "sklearn:digits", or "FILE.py:FUNCTION".
        arguments: names of the network's inputs, in order.
        classes: whether the loss is the one for classes; then labels must be integers.

    Returns:
        A `Dataset` where the samples have one input and a class each; else `TaskData`.

    Raises:
        FileError: if a file is missing, damaged, or of none of these forms.
        DataError: if the contents fit no training.
    """
    path = Path(spec)
    if is_function_spec(spec):
        return _make(spec, _call(spec), arguments, classes=classes)
    if path.suffix == ".npz" and path.is_file():
        wanted: set[str] = set()
        for part in PARTS:
            wanted.update(f"{name}{part}" for name in (ONE_INPUT, *TARGETS, *arguments))
        found = read_npz(path, wanted={*wanted, "is_test", "jpeg_test"})
        if "jpeg_test" in found:
            return load_dataset(spec)
        return _make(path.name, found, arguments, classes=classes, present=list_arrays(path))
    if spec and os.path.isdir(path) and not any(entry.is_dir() for entry in path.iterdir()):
        return _open_folder(path)
    return load_dataset(spec)


def _call(spec: str) -> Any:
    function = load_function(spec)
    try:
        return function()
    except InputError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise DataError(
            f"the function {spec} fails ({type(error).__name__}: {error}): mend it"
        ) from error


def _make(
    name: str,
    found: Any,
    arguments: Sequence[str],
    *,
    classes: bool,
    present: Sequence[str] = (),
) -> Dataset | TaskData:
    """present: names of all that the file holds, for the message."""
    if isinstance(found, Dataset | TaskData):
        return found
    if not isinstance(found, Mapping):
        if all(hasattr(getattr(found, part, None), "batches") for part in ("train", "test")):
            return TaskData(name, found.train, found.test)
        raise DataError(
            f"{name} gives a {type(found).__name__}: return a dict of arrays, such as x and y, or"
            " an object with `train` and `test`, which have `batches` and `divide`"
        )
    arrays = {str(key): np.asarray(value) for key, value in found.items()}
    inputs = _list_inputs(name, arrays, arguments, present or sorted(arrays))
    targets = _find_targets(arrays, inputs)
    if inputs == (ONE_INPUT,) and classes and _are_classes(arrays, targets):
        if targets not in (None, "y"):
            arrays |= {f"y{part}": arrays[f"{targets}{part}"] for part in _list_parts(arrays, "y")}
        return Dataset.from_arrays(name, arrays)
    return _make_task(name, arrays, inputs, targets, classes=classes)


def _list_inputs(
    name: str, arrays: Mapping[str, np.ndarray], arguments: Sequence[str], present: Sequence[str]
) -> tuple[str, ...]:
    """Arrays named as arguments win over x."""
    named = tuple(argument for argument in arguments if _list_parts(arrays, argument))
    if len(named) > 1 or (named and not _list_parts(arrays, ONE_INPUT)):
        return named
    if _list_parts(arrays, ONE_INPUT):
        return (ONE_INPUT,)
    shown = ", ".join(present[:8]) or "nothing"
    raise DataError(
        f"{name} has no 'x', and no arrays named as the network's inputs"
        f" {', '.join(arguments) or '(it takes none)'} (found: {shown}): save them so"
    )


def _list_parts(arrays: Mapping[str, np.ndarray], name: str) -> tuple[str, ...]:
    return tuple(part for part in PARTS if f"{name}{part}" in arrays)


def _find_targets(arrays: Mapping[str, np.ndarray], inputs: Sequence[str]) -> str | None:
    for name in TARGETS:
        parts = [f"{name}{part}" for part in _list_parts(arrays, name)]
        if name not in inputs and parts and arrays[parts[0]].dtype.kind in "biuf":
            return name  # names of classes are texts
    return None


def _are_classes(arrays: Mapping[str, np.ndarray], targets: str | None) -> bool:
    if targets is None:
        return False
    found = [arrays[f"{targets}{part}"] for part in _list_parts(arrays, targets)]
    return all(array.dtype.kind in "iu" and array.ndim == 1 for array in found)


def _make_task(
    name: str,
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    targets: str | None,
    *,
    classes: bool,
) -> TaskData:
    if classes and targets is not None:
        _refuse_values(name, arrays, targets)
    notes: tuple[str, ...] = ()
    if targets is None:
        notes = (f"{name} has no targets: training follows the float network's outputs",)
    if f"{inputs[0]}_test" in arrays and f"{inputs[0]}_train" in arrays:
        train = _make_split(name, arrays, inputs, targets, "_train")
        return TaskData(name, train, _make_split(name, arrays, inputs, targets, "_test"), notes)
    everything = _make_split(name, arrays, inputs, targets, _list_parts(arrays, inputs[0])[0])
    is_test = arrays.get("is_test")
    if is_test is None:
        train, test = everything.divide(TEST_FRACTION)
        return TaskData(name, train, test, notes)
    if is_test.dtype != bool or is_test.shape != (len(everything),) or not is_test.any():
        raise DataError(
            f"is_test in {name} is {is_test.dtype} {is_test.shape}: save it as bool"
            f" ({len(everything)},), True for each test sample, of which there must be some"
        )
    train = replace(everything, rows=np.nonzero(~is_test)[0])
    return TaskData(name, train, replace(everything, rows=np.nonzero(is_test)[0]), notes)


def _refuse_values(name: str, arrays: Mapping[str, np.ndarray], targets: str) -> None:
    """DataError for values of a regression where classes are wanted."""
    part = _list_parts(arrays, targets)[0]
    array = arrays[f"{targets}{part}"]
    if array.dtype.kind == "f" and array.ndim == 1:
        raise DataError(
            f"{targets}{part} in {name} is {array.dtype} {array.shape}, and cross-entropy needs"
            " classes: choose --loss mse or l1 for values, bce for 0 and 1, or save classes as"
            " int64"
        )


def _make_split(
    name: str,
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    targets: str | None,
    part: str,
) -> TaskSplit:
    sources: dict[str, Source] = {}
    for argument in inputs:
        key = f"{argument}{part}"
        if key not in arrays:
            raise DataError(f"{name} has no '{key}' beside '{inputs[0]}{part}': add it")
        sources[argument] = Arrays(f"{key} in {name}", np.atleast_1d(arrays[key]))
    y = None
    if targets is not None:
        if f"{targets}{part}" not in arrays:
            raise DataError(f"{name} has no '{targets}{part}' for '{inputs[0]}{part}': add it")
        y = _check_targets(f"{targets}{part} in {name}", arrays[f"{targets}{part}"])
    lengths = {f"{key}{part}": len(source) for key, source in sources.items()}
    if y is not None:
        lengths[f"{targets}{part}"] = len(y)
    for key, length in lengths.items():
        if length == 0:
            raise DataError(f"{key} in {name} is empty: give at least two samples")
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise DataError(f"{name} holds samples of different number ({shown}): make them equal")
    preprocessing = None
    if tuple(inputs) == (ONE_INPUT,):
        source = sources[ONE_INPUT]
        preprocessing = infer_preprocessing(source.dtype, source.sample_shape, where=source.name)
    first = sources[inputs[0]]
    return TaskSplit(first.name, sources, y, np.arange(len(first)), preprocessing)


def _check_targets(where: str, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind not in "biuf" or y.ndim == 0:
        raise DataError(f"{where} is {y.dtype} {y.shape}: save targets as numbers [N, ...]")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise DataError(f"{where} holds NaN or infinity: replace the values or drop the samples")
    return _use_torch_type(y)


def _use_torch_type(array: np.ndarray) -> np.ndarray:
    """float32 for floats, int64 for integers, bool as it is: what networks and losses take."""
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind in "iu":
        return np.ascontiguousarray(array, dtype=np.int64)
    return np.ascontiguousarray(array)


def _open_folder(path: Path) -> TaskData:
    """Images or wavs without folders of classes."""
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (*IMAGES, *WAVS))
    if len(files) < 2:
        raise DataError(
            f"{path} has neither folders of classes nor some images ({', '.join(IMAGES)}) or .wav"
            " files: add some"
        )
    are_wavs = files[0].suffix.lower() in WAVS
    name = f"the files in {path}"
    opened: Source
    opened = (open_wavs if are_wavs else open_images)(files[0], None, name, files)
    preprocessing = infer_preprocessing(opened.dtype, opened.sample_shape, where=name)
    split = TaskSplit(name, {ONE_INPUT: opened}, None, np.arange(len(files)), preprocessing)
    train, test = split.divide(TEST_FRACTION)
    note = f"{path} has no folders of classes: training follows the float network's outputs"
    return TaskData(str(path), train, test, (note,))
