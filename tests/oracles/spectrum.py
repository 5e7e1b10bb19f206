"""Log-mel and MFCC, one number at a time, from the definitions: a direct Fourier sum, one triangle,
one cosine sum."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence


def to_mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def to_hertz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


def log_mel_frame(
    frame: Sequence[float],
    *,
    sample_rate: int,
    fft_length: int,
    bands: int,
    low_hz: float,
    high_hz: float,
    floor: float,
) -> list[float]:
    """The log energies of one frame in each mel band."""
    length = len(frame)
    windowed = [
        value * (0.5 - 0.5 * math.cos(2 * math.pi * n / length)) for n, value in enumerate(frame)
    ]
    power = []
    for k in range(fft_length // 2 + 1):
        total = sum(
            value * cmath.exp(-2j * math.pi * k * n / fft_length)
            for n, value in enumerate(windowed)
        )
        power.append(abs(total) ** 2)

    spacing = (to_mel(high_hz) - to_mel(low_hz)) / (bands + 1)
    corners = [to_hertz(to_mel(low_hz) + i * spacing) for i in range(bands + 2)]
    energies = []
    for band in range(bands):
        left, centre, right = corners[band : band + 3]
        energy = 0.0
        for k, p in enumerate(power):
            hertz = k * sample_rate / fft_length
            if left < hertz <= centre:
                energy += p * (hertz - left) / (centre - left)
            elif centre < hertz < right:
                energy += p * (right - hertz) / (right - centre)
        energies.append(math.log(energy + floor))
    return energies


def mfcc_frame(log_energies: Sequence[float], coefficients: int) -> list[float]:
    """The orthonormal DCT-II of the log energies."""
    bands = len(log_energies)
    result = []
    for i in range(coefficients):
        total = sum(
            value * math.cos(math.pi * i * (j + 0.5) / bands)
            for j, value in enumerate(log_energies)
        )
        result.append(total * math.sqrt((1 if i == 0 else 2) / bands))
    return result
