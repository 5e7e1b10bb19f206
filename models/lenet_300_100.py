"""LeNet-300-100 for MNIST, the fully connected net on which compression papers compare.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc.
IEEE 86(11), 1998; with ReLU, as in Han, Mao, Dally, "Deep compression", ICLR 2016 (arXiv
1510.00149).
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (1, 28, 28)
PREPROCESSING = Preprocessing("image", scale=255.0, mean=(0.1307,), std=(0.3081,))


class LeNet300100(nn.Module):
    """float32 [N, 1, 28, 28] -> logits [N, classes]. 266 610 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc3(self.relu(self.fc2(x)))


def lenet_300_100() -> nn.Module:
    """The network for MNIST's ten classes, untrained."""
    return LeNet300100()
