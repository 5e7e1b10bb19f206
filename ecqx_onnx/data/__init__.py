"""(data set as users have it: file, folder, name or function) -> Dataset that streams batches.

    digits.npz           x_train, y_train, x_test, y_test, or x and y (is_test says which are held out, else a fixed draw)
    photos/              one folder of images per class, or of wavs; folders train/ and test/ above them are honoured
    sklearn:digits       scikit-learn's handwritten digits: 1797 images of 8x8, no download
    loader.py:function   a function that returns such arrays in a dict, or a Dataset

`load_dataset` tells them apart by their form.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ecqx_onnx.data.dataset import Augmentation, Dataset, Source, Split
from ecqx_onnx.data.folders import load_folder
from ecqx_onnx.data.npz import Jpegs, read_npz
from ecqx_onnx.errors import DataError, FileError, InputError
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

__all__ = ["Augmentation", "Dataset", "Source", "Split", "load_dataset"]

_ARRAYS = ("x", "y", "x_train", "y_train", "x_test", "y_test", "is_test", "labels")
_JPEGS = ("jpeg_train", "offset_train", "jpeg_test", "offset_test")


def load_dataset(spec: str, *, preprocessing: Preprocessing | None = None) -> Dataset:
    """spec: one of the forms above. preprocessing: by default what dtype and shape ask for (pixels / 255, no mean and std).

    FileError if a file is missing or damaged, DataError if its contents are no labelled data set.
    """
    if spec.startswith("sklearn:"):
        return load_sklearn(spec, preprocessing)
    if is_function_spec(spec):
        return load_from_function(spec, preprocessing)
    path = Path(spec)
    if spec and os.path.isdir(path):  # unlike Path's, these take any text for an answer
        return load_folder(path, preprocessing=preprocessing)
    if path.suffix == ".npz":
        return load_npz(path, preprocessing)
    if not spec or not os.path.exists(path):
        raise FileError(
            f"there is no data set '{spec}': give a .npz file, a folder, sklearn:digits or FILE.py:FUNCTION"
        )
    raise FileError(
        f"{spec} is no data set that can be read: give a .npz file, a folder, sklearn:digits or FILE.py:FUNCTION"
    )


def load_npz(path: Path, preprocessing: Preprocessing | None) -> Dataset:
    arrays = read_npz(path, wanted={*_ARRAYS, *_JPEGS})
    if "jpeg_test" not in arrays:
        return Dataset.from_arrays(path.name, arrays, preprocessing=preprocessing)
    jpegs: dict[str, Source] = {}
    for part in ("train", "test"):
        if f"jpeg_{part}" in arrays:
            if f"offset_{part}" not in arrays:
                raise DataError(
                    f"{path} has 'jpeg_{part}' and no 'offset_{part}': add where each image begins"
                )
            jpegs[f"x_{part}"] = Jpegs(
                f"jpeg_{part} in {path.name}", arrays[f"jpeg_{part}"], arrays[f"offset_{part}"]
            )
    return Dataset.from_sources(path.name, jpegs, arrays, preprocessing=preprocessing)


def load_sklearn(spec: str, preprocessing: Preprocessing | None) -> Dataset:
    if spec != "sklearn:digits":
        raise DataError(f"'{spec}' is not known: sklearn:digits is")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "sklearn:digits needs scikit-learn: install it with pip install 'ecqx-onnx[demo]'"
        ) from None
    digits = load_digits()
    arrays = {
        "x": digits.images.astype(np.uint8),
        "y": digits.target.astype(np.int64),
    }  # pixels are whole numbers, 0 to 16
    return Dataset.from_arrays(
        spec, arrays, preprocessing=preprocessing or Preprocessing("image", scale=16.0)
    )


def load_from_function(spec: str, preprocessing: Preprocessing | None) -> Dataset:
    function = load_function(spec)
    try:
        result = function()
        if isinstance(result, Mapping):
            result = {name: np.asarray(value) for name, value in result.items() if name in _ARRAYS}
    except InputError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise DataError(
            f"the function {spec} fails ({type(error).__name__}: {error}): mend it"
        ) from error
    if isinstance(result, Dataset):
        return result if preprocessing is None else result.with_preprocessing(preprocessing)
    if not isinstance(result, Mapping):
        raise DataError(
            f"the function {spec} returns {type(result).__name__}: return a dict of x_train, y_train, x_test, y_test"
        )
    return Dataset.from_arrays(spec, result, preprocessing=preprocessing)
