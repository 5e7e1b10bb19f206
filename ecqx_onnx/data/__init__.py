"""Labelled data sets as users have them: files, folders, names or functions, read in batches.

`load_dataset` tells the forms apart:

    digits.npz           x_train, y_train, x_test, y_test; or x and y, where is_test says which
                         samples are held out, else a fixed draw does
    photos/              one folder of images or of wavs per class; folders train/ and test/ above
                         them are honoured
    sklearn:digits       scikit-learn's handwritten digits: 1797 images of 8x8, no download
    loader.py:function   a function that returns such arrays in a dict, or a Dataset
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ecqx_onnx.data.dataset import Dataset
from ecqx_onnx.data.folders import load_folder
from ecqx_onnx.data.npz import Jpegs, read_npz
from ecqx_onnx.data.split import Augmentation, Source, Split
from ecqx_onnx.errors import DataError, FileError, InputError, explain_missing_package
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

__all__ = ["Augmentation", "Dataset", "Source", "Split", "load_dataset"]

_ARRAYS = ("x", "y", "x_train", "y_train", "x_test", "y_test", "is_test", "labels")
_JPEGS = ("jpeg_train", "offset_train", "jpeg_test", "offset_test")


def load_dataset(spec: str, *, preprocessing: Preprocessing | None = None) -> Dataset:
    """Load a data set in any of the forms that the module lists.

    Args:
        spec: an .npz file, a folder, "sklearn:digits", or "FILE.py:FUNCTION".
        preprocessing: how raw samples become model inputs; by default what their dtype and shape
            ask for (uint8 pixels / 255, no mean and no standard deviation).

    Returns:
        The data set; files of a folder are read when a batch needs them.

    Raises:
        FileError: if a file is missing, damaged, or of none of these forms.
        DataError: if the contents are no labelled data set.

    Example:
        >>> dataset = load_dataset("mnist.npz")
        >>> for x, y in dataset.test.batches(64): ...
    """
    if spec.startswith("sklearn:"):
        return _load_sklearn(spec, preprocessing)
    if is_function_spec(spec):
        return _load_from_function(spec, preprocessing)
    path = Path(spec)
    if spec and os.path.isdir(path):  # unlike Path's, these take any text for an answer
        return load_folder(path, preprocessing=preprocessing)
    if path.suffix == ".npz":
        return _load_npz(path, preprocessing)
    if not spec or not os.path.exists(path):
        raise FileError(
            f"there is no data set '{spec}': give a .npz file, a folder, sklearn:digits or "
            "FILE.py:FUNCTION"
        )
    raise FileError(
        f"{spec} is no data set that can be read: give a .npz file, a folder, sklearn:digits or "
        "FILE.py:FUNCTION"
    )


def _load_npz(path: Path, preprocessing: Preprocessing | None) -> Dataset:
    arrays = read_npz(path, wanted={*_ARRAYS, *_JPEGS})
    if "jpeg_test" not in arrays:
        return Dataset.from_arrays(path.name, arrays, preprocessing=preprocessing)
    jpegs: dict[str, Source] = {}
    for part in ("train", "test"):
        data = arrays.get(f"jpeg_{part}")
        offsets = arrays.get(f"offset_{part}")
        if data is None:
            continue
        if offsets is None:
            raise DataError(
                f"{path} has 'jpeg_{part}' and no 'offset_{part}': add where each image begins"
            )
        jpegs[f"x_{part}"] = Jpegs(f"jpeg_{part} in {path.name}", data, offsets)
    return Dataset.from_sources(path.name, jpegs, arrays, preprocessing=preprocessing)


def _load_sklearn(spec: str, preprocessing: Preprocessing | None) -> Dataset:
    if spec != "sklearn:digits":
        raise DataError(f"'{spec}' is not known: sklearn:digits is")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise explain_missing_package(error, spec) or error from None
    digits = load_digits()
    # Pixels are whole numbers from 0 to 16.
    arrays = {"x": digits.images.astype(np.uint8), "y": digits.target.astype(np.int64)}
    if preprocessing is None:
        preprocessing = Preprocessing("image", scale=16.0)
    return Dataset.from_arrays(spec, arrays, preprocessing=preprocessing)


def _load_from_function(spec: str, preprocessing: Preprocessing | None) -> Dataset:
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
        if preprocessing is None:
            return result
        return result.with_preprocessing(preprocessing)
    if not isinstance(result, Mapping):
        raise DataError(
            f"the function {spec} returns {type(result).__name__}: return a dict of x_train, "
            "y_train, x_test, y_test"
        )
    return Dataset.from_arrays(spec, result, preprocessing=preprocessing)
