"""MNIST's training images alone, the last 10 000 for testing: the test set chooses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecqx_onnx.data.npz import read_npz

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist.npz"
TESTED = 10_000


def mnist_validation() -> dict[str, np.ndarray]:
    """uint8 [50000, 28, 28] for training, [10000, 28, 28] for testing, and their labels."""
    arrays = read_npz(MNIST, wanted=("x_train", "y_train"))
    images, labels = arrays["x_train"], arrays["y_train"]
    training = {"x_train": images[:-TESTED], "y_train": labels[:-TESTED]}
    return training | {"x_test": images[-TESTED:], "y_test": labels[-TESTED:]}
