"""Folders of sound: one file among them is hostile."""

from __future__ import annotations

import io
import shutil
import struct
import wave
from pathlib import Path

import numpy as np

from ecqx_onnx.data import load_dataset

NAME = "wav"
SUFFIX = ".wav"


def make_seeds() -> list[bytes]:
    """16 bit mono at two rates, and one with a chunk before and one after the samples."""
    plain = _saved(8000)
    extra = struct.pack("<4sI", b"LIST", 5) + b"INFO\0\0"
    at = plain.index(b"data")
    return [plain, _saved(16_000), plain[:at] + extra + plain[at:], plain + extra]


def _saved(rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.arange(100, dtype="<i2").tobytes())
    return buffer.getvalue()


def read(path: Path) -> None:
    """As the only sound of a data set."""
    folder = path.parent / "sounds"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "test" / "yes").mkdir(parents=True)
    shutil.copyfile(path, folder / "test" / "yes" / "1.wav")
    list(load_dataset(str(folder)).test.batches(4))
