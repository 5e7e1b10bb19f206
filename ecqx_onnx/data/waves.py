"""Wav files to int16 samples of one channel, the same to the bit as the page of `deploy --to web`.

RIFF/WAVE as in "Multimedia Programming Interface and Data Specifications 1.0" (IBM, Microsoft
1991), with WAVE_FORMAT_EXTENSIBLE. PCM of 8, 16, 24 or 32 bits and floats of 32 or 64, any number
of channels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.inputs.reading import open_regular

LARGEST_WAV = 2**32  # bytes, what the format can hold
SHORTEST = 36  # bytes behind the first eight: a format, and samples to come
MOST_CHANNELS = 64
FORMAT_BYTES = 40  # of a format chunk; what may follow says nothing on the samples
# Numbers of formats (wFormatTag).
PCM = 1
FLOAT = 3
EXTENSIBLE = 0xFFFE
NAMES = {
    PCM: "PCM",
    FLOAT: "floats",
    2: "ADPCM",
    6: "A-law",
    7: "mu-law",
    17: "IMA ADPCM",
    85: "MP3",
}
WIDTHS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}  # bits


@dataclass(frozen=True)
class Format:
    """How the samples of a wav are stored.

    Attributes:
        kind: PCM or FLOAT.
        channels: at least 1.
        rate: samples a second of each channel, Hz.
        bits: of one value of one channel.
    """

    kind: int
    channels: int
    rate: int
    bits: int

    @property
    def block(self) -> int:
        """Bytes of one value of each channel."""
        return self.channels * self.bits // 8


def read_wav(path: Path, *, most: int) -> tuple[int, np.ndarray]:
    """Read the beginning of a wav.

    Args:
        path: the file.
        most: samples of each channel that are wanted.

    Returns:
        (sample rate in Hz, int16 [at most `most`]): the mean of the channels; 32768 stands for 1.0.

    Raises:
        DataError: if it is no wav, is damaged, or holds something else than PCM and floats.
    """
    try:
        with open_regular(path, most=LARGEST_WAV) as file:
            found, data = _find_data(file, path, most)
    except FileError as error:
        raise DataError(f"{path} cannot be read as a wav: {error}") from error
    except (OSError, struct.error, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a wav ({str(error) or 'it ends too early'}): repair or "
            "remove it"
        ) from error
    return found.rate, _round_to_int16(_read_values(data, found), path)


def _find_data(file: BinaryIO, path: Path, most: int) -> tuple[Format, bytes]:
    """The format, and the bytes of the first `most` samples."""
    head = file.read(12)
    claimed = int.from_bytes(head[4:8], "little")
    if 0 < claimed < SHORTEST:  # 0 is what writers leave that did not come back to it
        raise DataError(
            f"{path} cannot be read as a wav (it claims {claimed} bytes): repair or remove it"
        )
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise DataError(
            f"{path} cannot be read as a wav (it does not begin with RIFF and WAVE): repair or "
            "remove it"
        )
    found: Format | None = None
    while True:
        name, size = struct.unpack("<4sI", _read_exactly(file, 8))
        if name == b"data":
            break
        if name == b"fmt ":
            taken = min(size, FORMAT_BYTES)
            found = _parse_format(_read_exactly(file, taken), path)
            size -= taken
        file.seek(size + size % 2, 1)  # chunks begin at even places
    if found is None:
        raise DataError(
            f"{path} cannot be read as a wav (its samples come before their format): repair or "
            "remove it"
        )
    data = file.read(min(size, most * found.block))
    return found, data[: len(data) // found.block * found.block]


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _parse_format(chunk: bytes, path: Path) -> Format:
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", chunk[:16])
    if kind == EXTENSIBLE and len(chunk) >= 26:
        # The GUID's first two bytes are the older number.
        (kind,) = struct.unpack("<H", chunk[24:26])
    if kind not in WIDTHS or bits not in WIDTHS[kind]:
        held = NAMES.get(kind, f"format {kind}")
        raise DataError(f"{path} holds {held} of {bits} bit: convert it to PCM of 16 bit")
    if not 1 <= channels <= MOST_CHANNELS or block != channels * bits // 8:
        raise DataError(
            f"{path} claims {channels} channels of {bits} bit in {block} bytes: repair or remove it"
        )
    if not 0 < rate <= 1_000_000:
        raise DataError(f"{path} claims {rate} samples a second: repair or remove it")
    return Format(kind, channels, rate, bits)


def _read_values(data: bytes, found: Format) -> np.ndarray:
    """The samples as float64 [n, channels]; 1.0 is full scale."""
    if found.kind == FLOAT:
        values = np.frombuffer(data, f"<f{found.bits // 8}").astype(np.float64)
    elif found.bits == 8:  # these alone have no sign
        values = (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    elif found.bits == 24:
        low, middle, high = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32).T
        signed_high = high.astype(np.int8).astype(np.int32)  # the sign is in the last byte
        values = (low + (middle << 8) + (signed_high << 16)) / 2.0**23
    else:
        values = np.frombuffer(data, f"<i{found.bits // 8}") / 2.0 ** (found.bits - 1)
    return values.reshape(-1, found.channels)


def _round_to_int16(values: np.ndarray, path: Path) -> np.ndarray:
    """round(32768 · mean over channels), halves upwards, clipped: int16 [n]."""
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds NaN or infinity: repair or remove it")
    total = np.zeros(len(values))
    for channel in values.T:  # one after the other, so that the page can round alike
        total += channel
    scaled = np.floor(total / values.shape[1] * 32768 + 0.5)
    return np.clip(scaled, -32768, 32767).astype(np.int16)
