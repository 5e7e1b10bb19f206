"""Spectra of waveforms: log-mel energies or mel-frequency cepstral coefficients (MFCCs).

Numpy only. Written from the textbook definition (Davis and Mermelstein 1980; mel scale of the HTK
book, equation 5.13), with no choice that is not a parameter or stated here, so that runners in
other languages can repeat it: frames without padding, a periodic Hann window, zero-padding to the
FFT size, power spectrum, triangular filters that are linear in Hz and not normalized by area,
natural logarithm, orthonormal DCT-II.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ecqx_onnx.errors import OptionError

MOST_VALUES = 2**24  # in all frames of one waveform, before the filters


LARGEST_FLOAT = sys.float_info.max  # JSON has whole numbers beyond it
COUNTS = (  # (name, lowest, highest)
    ("sample_rate", 1, 1_000_000),
    ("frame_length", 2, 65_536),
    ("hop", 1, 65_536),
    ("fft_length", 2, 65_536),
    ("mel_bands", 1, 512),
    ("coefficients", 0, 512),
)


@dataclass(frozen=True)
class Spectrum:
    """An audio front end: log-mel energies, or MFCCs where `coefficients` is given.

    Attributes:
        sample_rate: Hz.
        frame_length: samples of a frame, 2 to 65536.
        hop: samples from the beginning of a frame to that of the next.
        fft_length: samples of the FFT, at least frame_length; frames are zero-padded to it.
        mel_bands: number of triangular filters between low_hz and high_hz, 1 to 512.
        coefficients: how many MFCCs are kept, at most mel_bands; 0 keeps the log-mel energies.
        low_hz: where the lowest filter begins, Hz.
        high_hz: where the highest filter ends, Hz, at most half of the sample rate.
        floor: added to each energy before the logarithm, above 0 (waveforms lie in [-1, 1]).

    Raises:
        OptionError: if a value is of the wrong type or out of range.
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
        for name, lowest, highest in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not lowest <= value <= highest:
                raise OptionError(
                    f"a spectrum's {name} must be a whole number from {lowest} to {highest}, not "
                    f"{value!r}"
                )
        for name in ("low_hz", "high_hz", "floor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= LARGEST_FLOAT:
                raise OptionError(
                    f"a spectrum's {name} must be a finite number of at least 0, not {value!r}"
                )
        if self.fft_length < self.frame_length:
            raise OptionError(
                f"fft_length {self.fft_length} is shorter than frame_length {self.frame_length}: "
                "raise it"
            )
        if self.coefficients > self.mel_bands:
            raise OptionError(
                f"{self.coefficients} coefficients cannot come from {self.mel_bands} mel_bands: "
                "ask for fewer"
            )
        if not self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise OptionError(
                f"a spectrum's band {self.low_hz}-{self.high_hz} Hz must rise, up to half of "
                f"{self.sample_rate} Hz at most"
            )
        if self.floor == 0:
            raise OptionError(
                "a spectrum's floor of 0 would take the logarithm of silence: use a small number "
                "such as 1e-6"
            )

    @property
    def bands(self) -> int:
        """Values per frame."""
        return self.coefficients or self.mel_bands

    def frames(self, samples: int) -> int:
        """Count the whole frames of a waveform.

        Args:
            samples: the waveform's length.

        Returns:
            At least 0.
        """
        return max(0, 1 + (samples - self.frame_length) // self.hop)

    def values(self, samples: int) -> int:
        """Count the values that all frames of a waveform hold, which bounds the memory they take.

        Args:
            samples: the waveform's length.

        Returns:
            Frames times fft_length, as they are zero-padded for the FFT.
        """
        return self.frames(samples) * self.fft_length

    def apply(self, waveforms: np.ndarray) -> np.ndarray:
        """Compute the spectra of waveforms.

        Args:
            waveforms: float [N, T] in [-1, 1].

        Returns:
            float32 [N, frames, bands].

        Raises:
            OptionError: if T is shorter than one frame.
        """
        count = self.frames(waveforms.shape[1])
        if count < 1:
            raise OptionError(
                f"a waveform of {waveforms.shape[1]} samples is shorter than one frame of "
                f"{self.frame_length}"
            )
        if len(waveforms) > 1 and len(waveforms) * self.values(waveforms.shape[1]) > MOST_VALUES:
            return np.concatenate([self.apply(waveform) for waveform in waveforms[:, None]])
        # 1. Overlapping frames, windowed: [N, frames, frame_length].
        starts = np.arange(count) * self.hop
        framed = waveforms[:, starts[:, None] + np.arange(self.frame_length)]
        windowed = framed * _make_hann_window(self.frame_length)
        # 2. Power spectrum, then the energy that each triangular filter lets through.
        spectrum = np.fft.rfft(windowed, n=self.fft_length)
        energies = (spectrum.real**2 + spectrum.imag**2) @ make_mel_filters(self).T
        # 3. Logarithm, then the lowest coefficients of the DCT across bands.
        values = np.log(energies + self.floor)
        if self.coefficients:
            values = values @ _make_dct_matrix(self.mel_bands)[: self.coefficients].T
        return values.astype(np.float32)


def _convert_to_mel(hertz: float) -> float:
    """mel = 2595 log10(1 + Hz / 700), the HTK book, equation 5.13."""
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


@lru_cache(maxsize=8)
def make_mel_filters(spectrum: Spectrum) -> np.ndarray:
    """Make the triangular filters, whose corners are evenly spaced in mel.

    Args:
        spectrum: says how many filters lie between which frequencies.

    Returns:
        float64 [mel_bands, fft_length // 2 + 1]: triangles that are linear in Hz, of height 1.
    """
    lowest = _convert_to_mel(spectrum.low_hz)
    highest = _convert_to_mel(spectrum.high_hz)
    mels = np.linspace(lowest, highest, spectrum.mel_bands + 2)
    corners = 700.0 * (10.0 ** (mels[:, None] / 2595.0) - 1.0)  # back to Hz
    # Filter i begins at corner i, peaks at i + 1 and ends at i + 2.
    left = corners[:-2]
    center = corners[1:-1]
    right = corners[2:]
    bins = np.arange(spectrum.fft_length // 2 + 1) * (spectrum.sample_rate / spectrum.fft_length)
    rising = (bins - left) / (center - left)
    falling = (right - bins) / (right - center)
    return np.maximum(0.0, np.minimum(rising, falling))


@lru_cache(maxsize=8)
def _make_hann_window(length: int) -> np.ndarray:
    """The periodic Hann window, float64 [length]: 1/2 - 1/2 cos(2 pi i / length)."""
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)


@lru_cache(maxsize=8)
def _make_dct_matrix(bands: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [bands, bands].

    Row i is sqrt(2/M) cos(pi i (j + 1/2) / M) for M bands, and row 0 is divided by sqrt(2).
    """
    rows = np.arange(bands)[:, None]
    columns = np.arange(bands)[None, :]
    matrix = math.sqrt(2.0 / bands) * np.cos(np.pi * rows * (columns + 0.5) / bands)
    matrix[0] /= math.sqrt(2.0)
    return matrix
