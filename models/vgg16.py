"""VGG16 for CIFAR-10, with BatchNorm and one linear layer behind the convolutions.

Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR
2015, configuration D (arXiv 1409.1556); cut down for 32x32 images as is usual for CIFAR-10.
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (3, 32, 32)
PREPROCESSING = Preprocessing(
    "image", scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
# (channels, convolutions) of each stage, which pooling follows.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """float32 [N, 3, 32, 32] -> logits [N, classes]. 14 728 266 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = 3
        for channels, convolutions in STAGES:
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(channels_in, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                channels_in = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def vgg16() -> nn.Module:
    """The network for CIFAR-10, untrained."""
    return VGG16()
