"""A depthwise-separable keyword spotter: ten spoken digits, one second at 8 kHz, log-mel input.

The DS-CNN of Zhang, Suda, Lai, Chandra, "Hello edge: keyword spotting on microcontrollers", 2017
(arXiv 1711.07128), small size: one convolution, four depthwise-separable blocks of 64 channels,
average pooling.
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum

INPUT_SHAPE = (1, 49, 40)
LOG_MEL = Spectrum(8_000, frame_length=256, hop=160, fft_length=256, mel_bands=40)
PREPROCESSING = Preprocessing("waveform", scale=32768.0, samples=8_000, spectrum=LOG_MEL)
CHANNELS = 64
BLOCKS = 4


def _separable(channels: int) -> nn.Module:
    """A 3x3 convolution of each channel alone, then a 1x1 convolution across channels.

    As in MobileNet, arXiv 1704.04861.
    """
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class KeywordSpotter(nn.Module):
    """float32 [N, 1, 49, 40] -> logits [N, classes]. 23 052 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)  # brings the energies to the net's scale
        self.conv = nn.Conv2d(1, CHANNELS, (10, 4), stride=(2, 2), padding=(4, 1), bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(*(_separable(CHANNELS) for _ in range(BLOCKS)))
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(CHANNELS, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(self.norm(x))))  # [N, 64, 24, 20]
        x = self.blocks(x).mean((2, 3))
        return self.linear(self.dropout(x))


def kws_dscnn() -> nn.Module:
    """The network for the ten digits, untrained."""
    return KeywordSpotter()
