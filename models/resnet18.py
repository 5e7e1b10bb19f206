"""ResNet-18 for images of 224x224, with the 20 classes of Pascal VOC.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, table 1 (arXiv
1512.03385). Parameters have torchvision's names, so that its state dicts fit where the number of
classes does.
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (3, 224, 224)
PREPROCESSING = Preprocessing(
    "image",
    scale=255.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    image_shape=(224, 224, 3),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    The shortcut is a 1x1 convolution where height and width are halved (option B of the paper).
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 if channels == channels_in else 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride == 2:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
            )
        else:
            self.downsample = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


def _stage(channels_in: int, channels: int) -> nn.Module:
    return nn.Sequential(Block(channels_in, channels), Block(channels, channels))


class ResNet18(nn.Module):
    """float32 [N, 3, 224, 224] -> logits [N, classes]. 11 186 772 parameters for 20 classes."""

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64)
        self.layer2 = _stage(64, 128)
        self.layer3 = _stage(128, 256)
        self.layer4 = _stage(256, 512)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # [N, 64, 56, 56]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18() -> nn.Module:
    """The network for the 20 classes, untrained."""
    return ResNet18()
