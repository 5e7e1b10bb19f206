"""A small convolutional network for scikit-learn's 8x8 digits, which `make demo` trains.

It stands here, and not in models/, so that installed packages have it too.
"""

from __future__ import annotations

from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (1, 8, 8)
PREPROCESSING = Preprocessing("image", scale=16.0)


def digits_cnn() -> nn.Module:
    """Make the network, untrained; 38 282 parameters, about 99 % of held-out digits once trained.

    Returns:
        A module that takes float32 [N, 1, 8, 8] in [0, 1] and gives logits [N, 10].
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
