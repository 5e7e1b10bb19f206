"""ResNet-20 for CIFAR-10 with parameter-free (option A) shortcuts.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2 (arXiv
1512.03385).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing

INPUT_SHAPE = (3, 32, 32)
# CIFAR-10's own mean and std. The public float checkpoint was trained with ImageNet's and is as
# accurate with either; EC2T's ternary one was measured with these.
PREPROCESSING = Preprocessing(
    "image", scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    The first convolution halves height and width when the channels grow.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.grows = channels != channels_in
        self.conv1 = nn.Conv2d(
            channels_in, channels, 3, stride=2 if self.grows else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """Option A of the paper: every second pixel, and zeros for the new channels.

        Half of these lie in front of the others and half behind.
        """
        if not self.grows:
            return x
        new = self.conv1.out_channels - self.conv1.in_channels
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))


def _stage(channels_in: int, channels: int) -> nn.Module:
    return nn.Sequential(
        Block(channels_in, channels), Block(channels, channels), Block(channels, channels)
    )


class ResNet20(nn.Module):
    """float32 [N, 3, 32, 32] -> logits [N, classes]. 269 722 parameters for 10 classes.

    width: channels of the first stage; the other two have twice and four times as many.
    """

    def __init__(self, classes: int = 10, *, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width)
        self.layer2 = _stage(width, 2 * width)
        self.layer3 = _stage(2 * width, 4 * width)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> nn.Module:
    """The network for CIFAR-10, untrained."""
    return ResNet20()
