"""LeNet-5 for MNIST.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc.
IEEE 86(11), 1998; with ReLU, max pooling and a plain linear classifier, as it is trained today.
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (1, 28, 28)
PREPROCESSING = Preprocessing("image", scale=255.0, mean=(0.1307,), std=(0.3081,))


class LeNet5(nn.Module):
    """float32 [N, 1, 28, 28] -> logits [N, classes]. 61 706 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.conv1(x)))  # [N, 6, 14, 14]
        x = self.pool(self.relu(self.conv2(x)))  # [N, 16, 5, 5]
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc3(self.relu(self.fc2(x)))


def lenet5() -> nn.Module:
    """The network for MNIST's ten classes, untrained."""
    return LeNet5()
