"""(.npz file) -> named arrays, without trusting what the file says about itself; and JPEGs that lie in arrays."""

from __future__ import annotations

import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from tokenize import TokenError  # numpy's reader lets it through

import numpy as np

from ecqx_onnx.data.images import count_channels, decode_image
from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.inputs.reading import open_regular
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

MOST_EXPANSION = 1032  # deflate's limit: no honest stream grows more
MOST_INFLATED = (
    2**29
)  # bytes of all arrays; a file may hold more only if it grows less than LARGE_EXPANSION
LARGE_EXPANSION = 100
MOST_MEMBERS = 10_000
MOST_DIMENSIONS = 32
LOOKED_AT = 200  # images that tell whether there are colors
HIGHEST_CHARACTER = 0x10FFFF
DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError,
    SyntaxError, struct.error, OverflowError,
)  # fmt: skip


def read_npz(path: Path, *, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of numbers and strings; nothing is unpickled.

    What a header claims is compared with the bytes that are there before memory is asked for.

    Args:
        path: the .npz file.
        wanted: names of the arrays that are read if the file has them; all if None.

    Returns:
        The arrays by their names.

    Raises:
        FileError: if the file is not what it says.
        DataError: if it has none of those wanted.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            room = path.stat().st_size * MOST_EXPANSION
            infos = archive.infolist()
            if wanted is not None:
                infos = [info for info in infos if info.filename.removesuffix(".npy") in wanted]
            if len(infos) > MOST_MEMBERS:
                raise FileError(
                    f"{path} holds {len(infos)} arrays, more than {MOST_MEMBERS}: save fewer in a file"
                )
            inflated = sum(info.file_size for info in infos)
            if inflated > room:
                raise FileError(
                    f"{path} claims {inflated} bytes, more than the whole file could hold: save it anew"
                )
            if inflated > max(MOST_INFLATED, LARGE_EXPANSION * path.stat().st_size):
                raise FileError(
                    f"{path} claims {inflated} bytes, more than {LARGE_EXPANSION} times its own:"
                    " save it with numpy.savez, which does not compress"
                )
            if not infos and wanted is not None:
                there = (
                    ", ".join(
                        sorted(info.filename.removesuffix(".npy") for info in archive.infolist())[
                            :5
                        ]
                    )
                    or "nothing"
                )
                raise DataError(
                    f"{path} has no 'x' (found: {there}): save x_train, y_train, x_test, y_test, or x and y"
                )
            return {
                info.filename.removesuffix(".npy"): _read_member(path, archive, info)
                for info in infos
            }
    except FileError:
        if not path.exists():
            raise FileError(f"there is no file {path}: check the path") from None
        raise
    except DAMAGED as error:
        raise FileError(
            f"{path} cannot be read as .npz ({error}): save it anew with numpy.savez_compressed"
        ) from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    where = f"array '{info.filename.removesuffix('.npy')}' in {path}"
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the .npy format")
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
                shape, fortran, dtype = read_header(file)
        except (
            *DAMAGED,
            TypeError,
            AttributeError,
            KeyError,
            MemoryError,
            RecursionError,
            TokenError,
        ) as error:
            raise FileError(
                f"{where} has a damaged header ({error}): save it anew with numpy.savez_compressed"
            ) from error
        if dtype.hasobject or dtype.itemsize == 0 or dtype.kind not in "biufU":
            raise FileError(
                f"{where} holds {dtype}, and only numbers and strings are read: save it as a plain array"
            )
        if len(shape) > MOST_DIMENSIONS or any(
            type(length) is not int or length < 0 for length in shape
        ):
            raise FileError(f"{where} claims the shape {shape}: save it anew")
        claimed, present = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if claimed != present:
            raise FileError(
                f"{where} claims {claimed} bytes {shape} of {dtype} and {present} are there: save it anew"
            )
        data = file.read()
        if len(data) != claimed:
            raise FileError(
                f"{where} ends after {len(data)} of {claimed} bytes: copy the file again"
            )
    if dtype.kind == "U":
        codes = np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if (codes > HIGHEST_CHARACTER).any():
            raise FileError(f"{where} holds what is no text: save it anew")
    array = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)


class Jpegs:
    """Images of one size whose files lie end to end in one array; decoded when first read, then kept in memory."""

    def __init__(
        self, name: str, data: np.ndarray, offsets: np.ndarray, *, channels: int | None = None
    ) -> None:
        """data: uint8 [bytes]. offsets: integers [n + 1], image i is data[offsets[i] : offsets[i + 1]]. DataError if they lie.

        channels: 1 or 3; None: 3 if any of those looked at has colors.
        """
        if (
            data.dtype != np.uint8
            or data.ndim != 1
            or offsets.dtype.kind not in "iu"
            or offsets.ndim != 1
            or len(offsets) < 2
        ):
            raise DataError(
                f"{name} must be uint8 [bytes] with integer offsets [n + 1], one more than images: save it so"
            )
        offsets = offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) <= 0).any():
            raise DataError(
                f"the offsets of {name} must rise from 0 to its {len(data)} bytes: save them anew"
            )
        self.name = name
        self.dtype = np.dtype(np.uint8)
        self._data, self._offsets = data, offsets
        height, width, own = self._decode(0, None).shape
        some = range(0, len(self), max(1, len(self) // LOOKED_AT))
        if (
            channels is None
            and own == 1
            and any(count_channels(self._file(row), where=name) == 3 for row in some)
        ):
            own = 3
        self.sample_shape = (height, width, channels or own)
        self._images = np.empty((len(self), *self.sample_shape), np.uint8)
        self._decoded = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> Jpegs:
        """With the channels of the model, where these are known."""
        if channels is None and len(preprocessing.mean) == 3:
            channels = 3
        if channels in (None, self.sample_shape[2]):
            return self
        return Jpegs(self.name, self._data, self._offsets, channels=channels)

    def read(self, rows: np.ndarray) -> np.ndarray:
        for row in rows[~self._decoded[rows]]:
            self._images[row] = self._decode(row, self.sample_shape)
            self._decoded[row] = True
        return self._images[rows]

    def _decode(self, row: int, shape: tuple[int, ...] | None) -> np.ndarray:
        return decode_image(self._file(row), shape=shape, where=f"image {row} of {self.name}")

    def _file(self, row: int) -> bytes:
        return self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()
