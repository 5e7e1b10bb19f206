"""The JSON that says what happens to raw samples, as it lies in checkpoints and .onnx files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum

NAME = "preprocessing"
SUFFIX = ".json"
RAW = {
    "image": np.zeros((2, 6, 6, 3), np.uint8),
    "waveform": np.zeros((2, 2000), np.int16),
    "array": np.zeros((2, 5), np.float32),
    "indices": np.zeros((2, 5), np.int64),
}


def make_seeds() -> list[bytes]:
    """One of each kind."""
    mel = Spectrum(8000, frame_length=256, hop=160, fft_length=256, mel_bands=40)
    kinds = (
        Preprocessing(
            "image", scale=255.0, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), image_shape=(6, 6, 3)
        ),
        Preprocessing("waveform", scale=32768.0, samples=2000, spectrum=mel),
        Preprocessing("array", mean=(0.5,)),
        Preprocessing("indices"),
    )
    return [kind.to_json().encode() for kind in kinds]


def read(path: Path) -> None:
    """Parsed, then applied to raw samples of its kind."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise FileError("checkpoints and .onnx files hold UTF-8 only") from None
    preprocessing = Preprocessing.from_json(text)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    preprocessing.apply(RAW[preprocessing.kind])
