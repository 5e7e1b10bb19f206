"""CIFAR-10 as it is at hand: 50 000 training images as JPEG, 8068 of them lossless; two test sets.

    ecqx-onnx quantize models/resnet20.py:resnet20 \\
        --data benchmarks/cifar10_mixed.py:lossless_test ...

Both train on the same 58 068 images. `lossless_test` tests on the first 1017 official test images,
comparable with published numbers (95 % interval about ±1.7 points); `jpeg_test` on all 10 000, JPEG
re-encoded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecqx_onnx.data.npz import Jpegs, read_npz

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def lossless_test() -> dict[str, np.ndarray]:
    """uint8 [58068, 32, 32, 3] for training, [1017, 32, 32, 3] for testing, and their labels."""
    lossless = read_npz(DATA / "cifar10_lossless_part.npz", wanted=("x_test", "y_test"))
    return _load_training() | lossless


def lossless_thrice() -> dict[str, np.ndarray]:
    """As `lossless_test`, with each lossless training image three times: uint8 [74204, 32, 32, 3]
    for training."""
    lossless = read_npz(
        DATA / "cifar10_lossless_part.npz", wanted=("x_train", "y_train", "x_test", "y_test")
    )
    twice = {name: np.concatenate([lossless[name]] * 2) for name in ("x_train", "y_train")}
    training = {
        name: np.concatenate([values, twice[name]]) for name, values in _load_training().items()
    }
    return training | {name: lossless[name] for name in ("x_test", "y_test")}


def jpeg_test() -> dict[str, np.ndarray]:
    """uint8 [58068, 32, 32, 3] for training, [10000, 32, 32, 3] for testing, and their labels."""
    return _load_training() | _decode_jpegs("test")


def _load_training() -> dict[str, np.ndarray]:
    lossless = read_npz(DATA / "cifar10_lossless_part.npz", wanted=("x_train", "y_train"))
    return {
        name: np.concatenate([values, lossless[name]])
        for name, values in _decode_jpegs("train").items()
    }


def _decode_jpegs(part: str) -> dict[str, np.ndarray]:
    arrays = read_npz(
        DATA / "cifar10_jpeg.npz", wanted=(f"jpeg_{part}", f"offset_{part}", f"y_{part}")
    )
    images = Jpegs(f"jpeg_{part}", arrays[f"jpeg_{part}"], arrays[f"offset_{part}"])
    return {f"x_{part}": images.read(np.arange(len(images))), f"y_{part}": arrays[f"y_{part}"]}
