"""(waveforms [N, T], spectrum parameters) -> log-mel energies or MFCCs [N, frames, bands]. Numpy only.

Written from the textbook definition (Davis and Mermelstein 1980; mel scale of the HTK book, eq. 5.13), with no choice that is not
a parameter or stated below, so that runners in other languages can repeat it:
frames without padding, a periodic Hann window, zero-padding to the FFT size, power spectrum, triangular filters that are linear
in Hz and not normalised by area, natural logarithm, orthonormal DCT-II.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ecqx_onnx.errors import OptionError

MOST_VALUES = 2**24  # in all frames of one waveform, before the filters


@dataclass(frozen=True)
class Spectrum:
    """An audio front end: log-mel energies, or MFCCs where `coefficients` is given.

    sample_rate: Hz. frame_length, hop: samples. fft_length: samples, at least frame_length.
    mel_bands: number of triangular filters between low_hz and high_hz. coefficients: how many MFCCs are kept, at most mel_bands;
    0 keeps the log-mel energies. floor: added to each energy before the logarithm (waveforms lie in [-1, 1]).
    """

    sample_rate: int
    frame_length: int
    hop: int
    fft_length: int
    mel_bands: int
    coefficients: int = 0
    low_hz: float = 20.0
    high_hz: float = 4000.0
    floor: float = 1e-6

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("sample_rate", 1, 1_000_000),
            ("frame_length", 2, 65_536),
            ("hop", 1, 65_536),
            ("fft_length", 2, 65_536),
            ("mel_bands", 1, 512),
            ("coefficients", 0, 512),
        ):
            value = getattr(self, name)
            if type(value) is not int or not lowest <= value <= highest:
                raise OptionError(
                    f"a spectrum's {name} must be a whole number from {lowest} to {highest}, not {value!r}"
                )
        for name in ("low_hz", "high_hz", "floor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise OptionError(
                    f"a spectrum's {name} must be a finite number of at least 0, not {value!r}"
                )
        if self.fft_length < self.frame_length:
            raise OptionError(
                f"fft_length {self.fft_length} is shorter than frame_length {self.frame_length}: raise it"
            )
        if self.coefficients > self.mel_bands:
            raise OptionError(
                f"{self.coefficients} coefficients cannot come from {self.mel_bands} mel_bands: ask for fewer"
            )
        if not self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise OptionError(
                f"a spectrum's band {self.low_hz}-{self.high_hz} Hz must rise, up to half of {self.sample_rate} Hz at most"
            )
        if self.floor == 0:
            raise OptionError(
                "a spectrum's floor of 0 would take the logarithm of silence: use a small number such as 1e-6"
            )

    @property
    def bands(self) -> int:
        """Values per frame."""
        return self.coefficients or self.mel_bands

    def frames(self, samples: int) -> int:
        """How many whole frames a waveform of this many samples has; at least 0."""
        return max(0, 1 + (samples - self.frame_length) // self.hop)

    def values(self, samples: int) -> int:
        """How many values all frames of a waveform of this many samples hold, zero-padded as for the FFT."""
        return self.frames(samples) * self.fft_length

    def apply(self, waveforms: np.ndarray) -> np.ndarray:
        """waveforms: float [N, T] in [-1, 1] -> float32 [N, frames, bands]. OptionError if T is shorter than one frame."""
        count = self.frames(waveforms.shape[1])
        if count < 1:
            raise OptionError(
                f"a waveform of {waveforms.shape[1]} samples is shorter than one frame of {self.frame_length}"
            )
        if len(waveforms) > 1 and len(waveforms) * self.values(waveforms.shape[1]) > MOST_VALUES:
            return np.concatenate([self.apply(waveform) for waveform in waveforms[:, None]])
        starts = np.arange(count) * self.hop
        framed = waveforms[
            :, starts[:, None] + np.arange(self.frame_length)
        ]  # [N, frames, frame_length]
        spectrum = np.fft.rfft(framed * make_hann_window(self.frame_length), n=self.fft_length)
        energies = (spectrum.real**2 + spectrum.imag**2) @ make_mel_filters(self).T
        values = np.log(energies + self.floor)
        if self.coefficients:
            values = values @ make_dct_matrix(self.mel_bands)[: self.coefficients].T
        return values.astype(np.float32)


def convert_to_mel(hertz: np.ndarray | float) -> np.ndarray | float:
    return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)


@lru_cache(maxsize=8)
def make_mel_filters(spectrum: Spectrum) -> np.ndarray:
    """float64 [mel_bands, fft_length // 2 + 1]: triangles whose corners are evenly spaced in mel, linear in Hz, of height 1."""
    corners = np.linspace(
        convert_to_mel(spectrum.low_hz), convert_to_mel(spectrum.high_hz), spectrum.mel_bands + 2
    )
    left, centre, right = (
        700.0 * (10.0 ** (corners[i : i + spectrum.mel_bands, None] / 2595.0) - 1.0)
        for i in range(3)
    )
    bins = np.arange(spectrum.fft_length // 2 + 1) * (spectrum.sample_rate / spectrum.fft_length)
    return np.maximum(
        0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    )


@lru_cache(maxsize=8)
def make_hann_window(length: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)


@lru_cache(maxsize=8)
def make_dct_matrix(bands: int) -> np.ndarray:
    """Orthonormal DCT-II, [bands, bands]: row i is sqrt(2/M) cos(pi i (j + 1/2) / M), row 0 divided by sqrt(2)."""
    rows, columns = np.arange(bands)[:, None], np.arange(bands)[None, :]
    matrix = math.sqrt(2.0 / bands) * np.cos(np.pi * rows * (columns + 0.5) / bands)
    matrix[0] /= math.sqrt(2.0)
    return matrix
