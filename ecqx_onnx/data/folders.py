"""Data sets in folders: one subfolder of images or wavs per class, read when a batch needs them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from ecqx_onnx.data.dataset import Dataset
from ecqx_onnx.data.images import count_channels, decode_image
from ecqx_onnx.data.split import Source
from ecqx_onnx.data.text import check_text
from ecqx_onnx.data.waves import read_wav
from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
WAVS = (".wav",)
LARGEST_BATCH = 2**30  # bytes of raw samples
LOOKED_AT = 200  # files that tell whether a folder has colors
TEST_FOLDERS = ("test", "val", "validation")
SHOWN = 5  # classes in a message
NO_CLASSES = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")  # what systems leave in folders


def load_folder(root: Path, *, preprocessing: Preprocessing | None) -> Dataset:
    """List a folder of images or wavs as a data set; the files are read when a batch needs them.

    Args:
        root: holds one subfolder per class. root/train/CLASS and root/test/CLASS (or val,
            validation) are the splits where they exist; else 20 % are drawn for testing.
        preprocessing: how files become model inputs, their size and length too; None takes images
            as large as the first, and wavs of one second.

    Returns:
        The data set. Classes are the subfolders' names in sorted order; samples come in a fixed
        drawn order, not class by class.

    Raises:
        FileError: if the folder cannot be listed.
        DataError: if it has no classes, no files, or both images and wavs.
    """
    # 1. List the classes, then the files of each.
    try:
        parts = _find_train_and_test(root)
        names: set[str] = set()
        for part in parts.values():
            names.update(_list_subfolders(part))
        if not names:
            raise DataError(
                f"{root} has no subfolders: make one for each class and put its images or wavs "
                "there"
            )
        labels = sorted(names)
        files: dict[str, list[Path]] = {}
        classes: dict[str, np.ndarray] = {}
        for key, part in parts.items():
            files[key], classes[key] = _list_files_and_labels(part, labels)
    except OSError as error:
        raise FileError(
            f"{root} cannot be listed ({error.strerror or error}): check its permissions"
        ) from error

    # 2. All of them must be of one kind, as a model takes either.
    everything = list(chain.from_iterable(files.values()))
    if not everything:
        raise DataError(
            f"{root} holds no images ({', '.join(IMAGES)}) and no .wav files in its class folders: "
            "add some"
        )
    first = everything[0]
    if len({_is_wav(file) for file in everything}) > 1:
        raise DataError(
            f"{root} holds images and wavs, such as {first}: keep them in two data sets"
        )

    # 3. A source for each part.
    open_files = open_wavs if _is_wav(first) else open_images
    sources: dict[str, Source] = {}
    arrays = {"labels": np.array(labels)}
    for key, part in parts.items():
        sources["x" + key] = open_files(first, preprocessing, str(part), files[key])
        arrays["y" + key] = classes[key]
    dataset = Dataset.from_sources(str(root), sources, arrays, preprocessing=preprocessing)
    notes = _find_stray_folders(parts) + _find_absences(labels, classes)
    return replace(dataset, notes=tuple(notes))


def _is_wav(file: Path) -> bool:
    return file.suffix.lower() in WAVS


def _find_stray_folders(parts: Mapping[str, Path]) -> list[str]:
    """Sentences on folders that are no classes."""
    notes = []
    for part in parts.values():
        for name in NO_CLASSES:
            if (part / name).is_dir():
                notes.append(f"the folder {part / name} is no class and was left out")
    return notes


def _find_absences(labels: Sequence[str], classes: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences on classes without files: in all of the data, or in one of its two parts."""
    present = {key: set(y.tolist()) for key, y in classes.items()}
    somewhere = set().union(*present.values())
    notes = []
    empty = [name for label, name in enumerate(labels) if label not in somewhere]
    if empty:
        notes.append(
            f"there is no image and no wav in {_show_classes(empty)}: remove what is no class"
        )
    if len(present) < 2:
        return notes
    for key, part in (("_train", "training"), ("_test", "test")):
        absent = [labels[label] for label in sorted(somewhere - present[key])]
        if absent:
            notes.append(f"there are no {part} samples of {_show_classes(absent)}")
    return notes


def _show_classes(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    if len(names) == 1:
        return f"class {shown}"
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN} more"
    return f"classes {shown}"


def _find_train_and_test(root: Path) -> Mapping[str, Path]:
    """The parts: '_train' and '_test', or '' where the root is not divided.

    Folders of these names that hold no subfolders are classes like any other.
    """
    train = root / "train"
    for name in TEST_FOLDERS:
        test = root / name
        if test.is_dir() and _list_subfolders(test):
            return {"_train": train, "_test": test} if train.is_dir() else {"_test": test}
    if train.is_dir() and _list_subfolders(train):
        raise DataError(
            f"{root} has train/ and no test/ or val/: add one with the same classes, or name "
            f"{root}/train"
        )
    return {"": root}


def _list_subfolders(folder: Path) -> list[str]:
    """Names of the folders that can be classes, sorted; DataError if one is no text."""
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if entry.is_dir()]
    names = sorted(name for name in found if _can_be_class(name))
    for name in names:
        check_text(name, f"the class folder {os.fsencode(name)!r} in {folder}")
    return names


def _can_be_class(name: str) -> bool:
    return not name.startswith(".") and name not in NO_CLASSES


def _list_files_and_labels(part: Path, labels: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """The images and wavs below part/CLASS and the class of each, in a fixed drawn order."""
    files: list[Path] = []
    classes: list[int] = []
    for label, name in enumerate(labels):
        if not (part / name).is_dir():
            continue
        for path in sorted((part / name).iterdir()):
            if path.suffix.lower() in IMAGES + WAVS and not path.name.startswith("."):
                files.append(path)
                classes.append(label)
    # RandomState, because numpy promises its numbers for all versions.
    order = np.random.RandomState(0).permutation(len(files))
    return [files[i] for i in order], np.array(classes, dtype=np.int64)[order]


def _check_batch(name: str, count: int, shape: Sequence[int], size: int) -> None:
    """DataError where so many samples of `size` bytes a value take more memory than a batch may."""
    needed = count * math.prod(shape) * size
    if needed > LARGEST_BATCH:
        raise DataError(
            f"{count} samples of shape {tuple(shape)} in {name} take {needed} bytes, more than"
            f" {LARGEST_BATCH}: use a smaller batch size, or a preprocessing that makes samples "
            "smaller"
        )


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, decoded whenever they are read.

    Attributes:
        name: what error messages call them.
        files: one per sample.
        sample_shape: (H, W, C), C is 1 or 3.
        resize: whether images of another size are resized; else they are a DataError.
        dtype: uint8.
    """

    name: str
    files: Sequence[Path]
    sample_shape: tuple[int, ...]
    resize: bool
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> ImageFiles:
        """Read the files as a model takes them.

        Args:
            preprocessing: says the size, and by three means that images have colors.
            channels: of the model, 1 or 3, where they are known.

        Returns:
            The files in this size, with these channels.
        """
        height, width, own = preprocessing.image_shape or self.sample_shape
        if preprocessing.image_shape is None and len(preprocessing.mean) == 3:
            own = 3
        resize = self.resize or preprocessing.image_shape is not None
        return replace(self, sample_shape=(height, width, channels or own), resize=resize)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Decode some images.

        Args:
            rows: int64 [N], the samples' numbers from 0; N is at least 1.

        Returns:
            uint8 [N, H, W, C].

        Raises:
            DataError: if a file cannot be read, has another size, or all take too much memory.
        """
        _check_batch(self.name, len(rows), self.sample_shape, 1)
        images = []
        for row in rows:
            file = self.files[row]
            images.append(
                decode_image(file, shape=self.sample_shape, where=str(file), resize=self.resize)
            )
        return np.stack(images)


def open_images(
    first: Path, preprocessing: Preprocessing | None, name: str, files: Sequence[Path]
) -> ImageFiles:
    """Make a source of image files.

    Args:
        first: the file that tells the size where the preprocessing does not.
        preprocessing: says the size to which all are resized; None takes them as they are.
        name: what error messages call the files.
        files: one per sample.

    Returns:
        The files; in color if any of those looked at has colors, or the preprocessing says so.

    Raises:
        DataError: if one of the files looked at is no image that can be read.
    """
    height, width, channels = decode_image(first, shape=None, where=str(first)).shape
    if channels == 1 and _have_colors(_take_some(files)):
        channels = 3
    found = ImageFiles(name, files, (height, width, channels), resize=False)
    return found if preprocessing is None else found.adapted(preprocessing)


def _have_colors(files: Sequence[Path]) -> bool:
    return any(count_channels(file, where=str(file)) == 3 for file in files)


def _take_some(files: Sequence[Path]) -> Sequence[Path]:
    return files[:: max(1, len(files) // LOOKED_AT)]


@dataclass(frozen=True, eq=False)
class WavFiles:
    """Wavs as int16, cut or zero-padded at the end to one length.

    Attributes:
        name: what error messages call them.
        files: one per sample.
        sample_shape: (T,), the samples of each.
        rate: Hz, the same for all.
        dtype: int16.
    """

    name: str
    files: Sequence[Path]
    sample_shape: tuple[int]
    rate: int
    dtype = np.dtype(np.int16)

    def __len__(self) -> int:
        return len(self.files)

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> WavFiles:
        """Read the files as a model takes them.

        Args:
            preprocessing: says the length; its spectrum says the rate.
            channels: of images, without meaning here.

        Returns:
            The files in this length, at this rate. One second stays one second at another rate.
        """
        rate = self.rate
        if preprocessing.spectrum is not None:
            rate = preprocessing.spectrum.sample_rate
        (samples,) = self.sample_shape
        if samples == self.rate:
            samples = rate
        if preprocessing.samples is not None:
            samples = preprocessing.samples
        return replace(self, sample_shape=(samples,), rate=rate)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read the beginnings of some wavs.

        Args:
            rows: int64 [N], the samples' numbers from 0.

        Returns:
            int16 [N, T].

        Raises:
            DataError: if a file cannot be read, has another rate, or all take too much memory.
        """
        _check_batch(self.name, len(rows), self.sample_shape, 2)
        waves = np.zeros((len(rows), *self.sample_shape), np.int16)
        for target, row in zip(waves, rows, strict=True):
            rate, samples = read_wav(self.files[row], most=len(target))
            if rate != self.rate:
                raise DataError(
                    f"{self.files[row]} has {rate} Hz where {self.rate} are expected: resample it"
                )
            target[: len(samples)] = samples
        return waves


def open_wavs(
    first: Path, preprocessing: Preprocessing | None, name: str, files: Sequence[Path]
) -> WavFiles:
    """Make a source of wav files.

    Args:
        first: the file whose rate all are expected to have.
        preprocessing: says the length, and by its spectrum the rate; None takes one second.
        name: what error messages call the files.
        files: one per sample.

    Returns:
        The files, of which the first T samples are read.

    Raises:
        DataError: if the first is no wav that can be read.
    """
    rate, _ = read_wav(first, most=0)
    found = WavFiles(name, files, (rate,), rate)
    return found if preprocessing is None else found.adapted(preprocessing)
