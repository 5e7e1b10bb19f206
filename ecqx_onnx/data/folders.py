"""(a folder with one subfolder of images or wavs per class) -> sources that read the files when a batch needs them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ecqx_onnx.data.dataset import Dataset, Source
from ecqx_onnx.data.images import count_channels, decode_image
from ecqx_onnx.data.text import check_text
from ecqx_onnx.data.waves import read_wav
from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
WAVS = (".wav",)
LARGEST_BATCH = 2**30  # bytes of raw samples
LOOKED_AT = 200  # files that tell whether a folder has colors
TEST_FOLDERS = ("test", "val", "validation")
NO_CLASSES = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")  # what systems leave in folders


def load_folder(root: Path, *, preprocessing: Preprocessing | None) -> Dataset:
    """Classes are the subfolders' names in sorted order; files come in a fixed drawn order, not class by class.

    root/train/CLASS and root/test/CLASS (or val, validation) are the splits where they exist; else 20 % are drawn for testing.
    """
    try:
        parts = find_train_and_test(root)
        labels = sorted({name for part in parts.values() for name in list_subfolders(part)})
        if not labels:
            raise DataError(
                f"{root} has no subfolders: make one for each class and put its images or wavs there"
            )
        listed = {key: list_files_and_labels(part, labels) for key, part in parts.items()}
    except OSError as error:
        raise FileError(
            f"{root} cannot be listed ({error.strerror or error}): check its permissions"
        ) from error

    everything = [file for files, _ in listed.values() for file in files]
    if not everything:
        raise DataError(
            f"{root} holds no images ({', '.join(IMAGES)}) and no .wav files in its class folders: add some"
        )
    first = everything[0]
    if len({file.suffix.lower() in WAVS for file in everything}) > 1:
        raise DataError(
            f"{root} holds images and wavs, such as {first}: keep them in two data sets"
        )
    make_source = (
        partial(open_wavs, first, preprocessing)
        if first.suffix.lower() in WAVS
        else partial(open_images, first, preprocessing)
    )
    sources: dict[str, Source] = {
        "x" + key: make_source(str(parts[key]), files) for key, (files, _) in listed.items()
    }
    arrays = {"y" + key: y for key, (_, y) in listed.items()} | {"labels": np.array(labels)}
    dataset = Dataset.from_sources(str(root), sources, arrays, preprocessing=preprocessing)
    return replace(
        dataset,
        notes=tuple(
            find_stray_folders(parts)
            + find_absences(labels, {key: y for key, (_, y) in listed.items()})
        ),
    )


def find_stray_folders(parts: Mapping[str, Path]) -> list[str]:
    """Sentences on folders that are no classes."""
    found = [
        part / name for part in parts.values() for name in NO_CLASSES if (part / name).is_dir()
    ]
    return [f"the folder {folder} is no class and was left out" for folder in found]


def find_absences(labels: Sequence[str], classes: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences on classes without files: in all of the data, or in one of its two parts."""
    present = {key: set(y.tolist()) for key, y in classes.items()}
    somewhere = set().union(*present.values())
    empty = [name for label, name in enumerate(labels) if label not in somewhere]
    notes = (
        [f"there is no image and no wav in {show_classes(empty)}: remove what is no class"]
        if empty
        else []
    )
    for key, part in (("_train", "training"), ("_test", "test")):
        if len(present) < 2:
            break
        absent = [labels[label] for label in sorted(somewhere - present[key])]
        notes += [f"there are no {part} samples of {show_classes(absent)}"] if absent else []
    return notes


def show_classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        ("class " if len(names) == 1 else "classes ")
        + ", ".join(f"'{name}'" for name in names[:5])
        + more
    )


def find_train_and_test(root: Path) -> Mapping[str, Path]:
    """'_train' and '_test', or '' for a root without such folders (or whose folders of these names are classes)."""
    test = next(
        (
            root / name
            for name in TEST_FOLDERS
            if (root / name).is_dir() and list_subfolders(root / name)
        ),
        None,
    )
    if test is None:
        if (root / "train").is_dir() and list_subfolders(root / "train"):
            raise DataError(
                f"{root} has train/ and no test/ or val/: add one with the same classes, or name {root}/train"
            )
        return {"": root}
    return (
        {"_train": root / "train", "_test": test} if (root / "train").is_dir() else {"_test": test}
    )


def list_subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name for entry in entries if entry.is_dir() and can_be_class(entry.name)
        )
    for name in names:
        check_text(name, f"the class folder {os.fsencode(name)!r} in {folder}")
    return names


def can_be_class(name: str) -> bool:
    return not name.startswith(".") and name not in NO_CLASSES


def list_files_and_labels(part: Path, labels: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """The images and wavs below part/CLASS and the class of each, in a fixed drawn order."""
    found = [
        (path, label)
        for label, name in enumerate(labels)
        if (part / name).is_dir()
        for path in sorted((part / name).iterdir())
        if path.suffix.lower() in IMAGES + WAVS and not path.name.startswith(".")
    ]
    order = np.random.RandomState(0).permutation(len(found))
    return [found[i][0] for i in order], np.array([found[i][1] for i in order], dtype=np.int64)


def _check_batch(name: str, count: int, shape: Sequence[int], size: int) -> None:
    """DataError where so many samples of `size` bytes a value take more memory than a batch may."""
    needed = count * math.prod(shape) * size
    if needed > LARGEST_BATCH:
        raise DataError(
            f"{count} samples of shape {tuple(shape)} in {name} take {needed} bytes, more than"
            f" {LARGEST_BATCH}: use a smaller batch size, or a preprocessing that makes samples smaller"
        )


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, decoded whenever they are read. sample_shape: [H, W, C]."""

    name: str
    files: Sequence[Path]
    sample_shape: tuple[int, ...]
    resize: bool
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> ImageFiles:
        """In the size that the preprocessing says, and with the channels of the model, where these are known."""
        height, width, own = preprocessing.image_shape or self.sample_shape
        if preprocessing.image_shape is None and len(preprocessing.mean) == 3:
            own = 3
        resize = self.resize or preprocessing.image_shape is not None
        return replace(self, sample_shape=(height, width, channels or own), resize=resize)

    def read(self, rows: np.ndarray) -> np.ndarray:
        files = [self.files[row] for row in rows]
        _check_batch(self.name, len(files), self.sample_shape, 1)
        return np.stack(
            [
                decode_image(file, shape=self.sample_shape, where=str(file), resize=self.resize)
                for file in files
            ]
        )


def open_images(
    first: Path, preprocessing: Preprocessing | None, name: str, files: Sequence[Path]
) -> ImageFiles:
    """As large as the first file, in color if any file is; or as the preprocessing says."""
    height, width, channels = decode_image(first, shape=None, where=str(first)).shape
    if channels == 1 and any(
        count_channels(file, where=str(file)) == 3 for file in take_some(files)
    ):
        channels = 3
    found = ImageFiles(name, files, (height, width, channels), resize=False)
    return found if preprocessing is None else found.adapted(preprocessing)


def take_some(files: Sequence[Path]) -> Sequence[Path]:
    return files[:: max(1, len(files) // LOOKED_AT)]


@dataclass(frozen=True, eq=False)
class WavFiles:
    """Wavs as int16, cut or zero-padded at the end to sample_shape [T]. rate: Hz, the same for all."""

    name: str
    files: Sequence[Path]
    sample_shape: tuple[int]
    rate: int
    dtype = np.dtype(np.int16)

    def __len__(self) -> int:
        return len(self.files)

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> WavFiles:
        """As long as the preprocessing says; a spectrum tells the rate."""
        rate = self.rate if preprocessing.spectrum is None else preprocessing.spectrum.sample_rate
        samples = preprocessing.samples or (
            rate if self.sample_shape == (self.rate,) else self.sample_shape[0]
        )
        return replace(self, sample_shape=(samples,), rate=rate)

    def read(self, rows: np.ndarray) -> np.ndarray:
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
    rate = read_wav(first, most=0)[0]
    found = WavFiles(name, files, (rate,), rate)
    return found if preprocessing is None else found.adapted(preprocessing)
