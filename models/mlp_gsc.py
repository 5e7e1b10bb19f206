"""MLP_GSC of the ECQx paper: a fully connected keyword spotter for Google Speech Commands.

Widths 512-512-256-256-128-128-12: Becking, Dreyer, Samek, Müller, Lapuschkin, "ECQx", 2021 (arXiv
2109.04236), section 5. Input, ours to choose: 10 MFCCs of 49 frames of 40 ms every 20 ms of one
second at 16 kHz, as in Zhang, Suda, Lai, Chandra, "Hello edge: keyword spotting on
microcontrollers", 2017 (arXiv 1711.07128).
"""

from __future__ import annotations

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum

INPUT_SHAPE = (1, 49, 10)
MFCC = Spectrum(16_000, frame_length=640, hop=320, fft_length=1024, mel_bands=40, coefficients=10)
PREPROCESSING = Preprocessing("waveform", scale=32768.0, samples=16_000, spectrum=MFCC)
WIDTHS = (512, 512, 256, 256, 128, 128)


class MLPGSC(nn.Module):
    """float32 [N, 1, 49, 10] -> logits [N, classes]. 766 688 parameters for 12 classes."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        features_in = 49 * 10
        layers: list[nn.Module] = [nn.Flatten(), nn.BatchNorm1d(features_in)]
        for features in WIDTHS:
            layers += [nn.Linear(features_in, features), nn.BatchNorm1d(features), nn.ReLU()]
            features_in = features
        self.layers = nn.Sequential(*layers, nn.Linear(features_in, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def mlp_gsc() -> nn.Module:
    """The network for the 12 classes, untrained."""
    return MLPGSC()
