"""(.npz file) -> named arrays, without trusting what the file says about itself; and JPEGs that lie in arrays."""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from tokenize import TokenError  # numpy's reader lets it through

import numpy as np

from ecqx_onnx.data.images import decode_image
from ecqx_onnx.errors import DataError, FileError

MOST_EXPANSION = 1032  # deflate's limit: no honest stream grows more


def read_npz(path: Path, *, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the `wanted` arrays that the file has. FileError for a file that is not what it says; nothing is unpickled.

    DataError if it has none of them. What a header claims is compared with the bytes that are there before memory is asked for.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            room = path.stat().st_size * MOST_EXPANSION
            infos = [info for info in archive.infolist() if info.filename.removesuffix(".npy") in wanted]
            if not infos:
                there = ", ".join(sorted(info.filename.removesuffix(".npy") for info in archive.infolist())[:5]) or "nothing"
                raise DataError(f"{path} has no 'x' (found: {there}): save x_train, y_train, x_test, y_test, or x and y")
            return {info.filename.removesuffix(".npy"): _read_member(path, archive, info, room) for info in infos}
    except FileNotFoundError:
        raise FileError(f"there is no file {path}: check the path") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise FileError(f"{path} cannot be read as .npz ({error}): save it anew with numpy.savez_compressed") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, room: int) -> np.ndarray:
    where = f"array '{info.filename.removesuffix('.npy')}' in {path}"
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the .npy format")
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
                shape, fortran, dtype = read_header(file)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, TokenError) as error:
            raise FileError(f"{where} has a damaged header ({error}): save it anew with numpy.savez_compressed") from error
        if dtype.hasobject or dtype.kind not in "biufU":
            raise FileError(f"{where} holds {dtype}, and only numbers and strings are read: save it as a plain array")
        if any(length < 0 for length in shape):
            raise FileError(f"{where} claims the shape {shape}: save it anew")
        claimed, present = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if present > room:
            raise FileError(f"{where} claims {present} bytes, more than the whole file could hold: save it anew")
        if claimed != present:
            raise FileError(f"{where} claims {claimed} bytes {shape} of {dtype} and {present} are there: save it anew")
        data = file.read()
        if len(data) != claimed:
            raise FileError(f"{where} ends after {len(data)} of {claimed} bytes: copy the file again")
    array = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)


class Jpegs:
    """Images of one size whose files lie end to end in one array; decoded when first read, then kept in memory."""

    def __init__(self, name: str, data: np.ndarray, offsets: np.ndarray) -> None:
        """data: uint8 [bytes]. offsets: integers [n + 1], image i is data[offsets[i] : offsets[i + 1]]. DataError if they lie."""
        if data.dtype != np.uint8 or data.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
            raise DataError(f"{name} must be uint8 [bytes] with integer offsets [n + 1], one more than images: save it so")
        offsets = offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) <= 0).any():
            raise DataError(f"the offsets of {name} must rise from 0 to its {len(data)} bytes: save them anew")
        self.name = name
        self.dtype = np.dtype(np.uint8)
        self._data, self._offsets = data, offsets
        first = self._decode(0, None)
        self.sample_shape = first.shape
        self._images = np.empty((len(self), *first.shape), np.uint8)
        self._decoded = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, rows: np.ndarray) -> np.ndarray:
        for row in rows[~self._decoded[rows]]:
            self._images[row] = self._decode(row, self.sample_shape)
            self._decoded[row] = True
        return self._images[rows]

    def _decode(self, row: int, shape: tuple[int, ...] | None) -> np.ndarray:
        file = self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()
        return decode_image(file, shape=shape, where=f"image {row} of {self.name}")
