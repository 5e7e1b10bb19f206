"""Arrays from .npz files, without trust in what a file says about itself; and JPEGs in arrays."""

from __future__ import annotations

import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from tokenize import TokenError  # numpy's reader lets it through
from typing import IO

import numpy as np

from ecqx_onnx.data.images import count_channels, decode_image
from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.inputs.reading import open_regular
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

MOST_EXPANSION = 1032  # deflate's limit: no honest stream grows more
# Bytes of all arrays; a file may hold more only if it grows less than LARGE_EXPANSION.
MOST_INFLATED = 2**29
LARGE_EXPANSION = 100
MOST_MEMBERS = 10_000
MOST_DIMENSIONS = 32
LOOKED_AT = 200  # images that tell whether there are colors
HIGHEST_CHARACTER = 0x10FFFF
# What zipfile and numpy raise on damaged files.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    RuntimeError, SyntaxError, struct.error, OverflowError,
)  # fmt: skip
# And what numpy's reader of headers raises besides.
DAMAGED_HEADER = (
    *DAMAGED, TypeError, AttributeError, KeyError, MemoryError, RecursionError, TokenError,
)  # fmt: skip


def read_npz(path: Path, *, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of numbers and strings; nothing is unpickled.

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
            infos = archive.infolist()
            if wanted is not None:
                infos = [info for info in infos if _name_array(info) in wanted]
            _check_claims(path, infos)
            if not infos and wanted is not None:
                found = sorted(map(_name_array, archive.infolist()))[:5]
                raise DataError(
                    f"{path} has no 'x' (found: {', '.join(found) or 'nothing'}): save x_train, "
                    "y_train, x_test, y_test, or x and y"
                )
            return {_name_array(info): _read_member(path, archive, info) for info in infos}
    except FileError:
        if not path.exists():
            raise FileError(f"there is no file {path}: check the path") from None
        raise
    except DAMAGED as error:
        raise FileError(
            f"{path} cannot be read as .npz ({error}): save it anew with numpy.savez_compressed"
        ) from error


def list_arrays(path: Path) -> list[str]:
    """List the arrays of a file; none of them is read.

    Args:
        path: the .npz file.

    Returns:
        Their names, sorted; none where the file is no archive.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return sorted(map(_name_array, archive.infolist()))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []  # reading it says why


def _name_array(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _check_claims(path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    """FileError where the archive claims more than it can hold, or more than memory should."""
    if len(infos) > MOST_MEMBERS:
        raise FileError(
            f"{path} holds {len(infos)} arrays, more than {MOST_MEMBERS}: save fewer in a file"
        )
    inflated = sum(info.file_size for info in infos)
    size = path.stat().st_size
    if inflated > size * MOST_EXPANSION:
        raise FileError(
            f"{path} claims {inflated} bytes, more than the whole file could hold: save it anew"
        )
    if inflated > max(MOST_INFLATED, LARGE_EXPANSION * size):
        raise FileError(
            f"{path} claims {inflated} bytes, more than {LARGE_EXPANSION} times its own:"
            " save it with numpy.savez, which does not compress"
        )


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    where = f"array '{_name_array(info)}' in {path}"
    with archive.open(info) as file:
        # 1. The header, which is only believed where it agrees with the bytes behind it.
        try:
            shape, is_fortran, dtype = _read_header(file)
        except DAMAGED_HEADER as error:
            raise FileError(
                f"{where} has a damaged header ({error}): save it anew with numpy.savez_compressed"
            ) from error
        if dtype.hasobject or dtype.itemsize == 0 or dtype.kind not in "biufU":
            raise FileError(
                f"{where} holds {dtype}, and only numbers and strings are read: save it as a plain "
                "array"
            )
        are_lengths = all(type(length) is int and length >= 0 for length in shape)
        if len(shape) > MOST_DIMENSIONS or not are_lengths:
            raise FileError(f"{where} claims the shape {shape}: save it anew")
        claimed = math.prod(shape) * dtype.itemsize
        present = info.file_size - file.tell()
        if claimed != present:
            raise FileError(
                f"{where} claims {claimed} bytes {shape} of {dtype} and {present} are there: save "
                "it anew"
            )
        # 2. The data.
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
    if is_fortran:
        return array.reshape(shape[::-1]).transpose()
    return array.reshape(shape)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the first axis changes fastest, dtype) as the file claims them."""
    version = np.lib.format.read_magic(file)
    with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the .npy format")


class Jpegs:
    """Images of one size whose files lie end to end in one array.

    Each is decoded when it is first read, then kept in memory.
    """

    def __init__(
        self, name: str, data: np.ndarray, offsets: np.ndarray, *, channels: int | None = None
    ) -> None:
        """Check where the images lie; only the first is decoded.

        Args:
            name: what error messages call them.
            data: uint8 [bytes], all files.
            offsets: integers [n + 1]; image i is data[offsets[i] : offsets[i + 1]].
            channels: 1 or 3; None takes 3 if any of the images looked at has colors.

        Raises:
            DataError: if data and offsets do not fit together, or the first is no image.
        """
        is_data = data.dtype == np.uint8 and data.ndim == 1
        if not is_data or offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
            raise DataError(
                f"{name} must be uint8 [bytes] with integer offsets [n + 1], one more than images: "
                "save it so"
            )
        offsets = offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) <= 0).any():
            raise DataError(
                f"the offsets of {name} must rise from 0 to its {len(data)} bytes: save them anew"
            )
        self.name = name
        self.dtype = np.dtype(np.uint8)
        self._data = data
        self._offsets = offsets
        height, width, own = self._decode(0, None).shape
        if channels is None:
            channels = 3 if own == 3 or self._have_colors() else 1
        self.sample_shape = (height, width, channels)
        self._images = np.empty((len(self), *self.sample_shape), np.uint8)
        self._decoded = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def adapted(self, preprocessing: Preprocessing, channels: int | None = None) -> Jpegs:
        """Read the images with the channels of a model.

        Args:
            preprocessing: three means say that images have colors; the size stays.
            channels: of the model, 1 or 3, where they are known.

        Returns:
            The images with these channels, or these ones where they have them already.
        """
        if channels is None and len(preprocessing.mean) == 3:
            channels = 3
        if channels in (None, self.sample_shape[2]):
            return self
        return Jpegs(self.name, self._data, self._offsets, channels=channels)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Take some images, of which those are decoded that were not read before.

        Args:
            rows: int64 [N], the samples' numbers from 0.

        Returns:
            uint8 [N, H, W, C].

        Raises:
            DataError: if a file is no image that can be read, or of another size.
        """
        for row in rows[~self._decoded[rows]]:
            self._images[row] = self._decode(row, self.sample_shape)
            self._decoded[row] = True
        return self._images[rows]

    def _have_colors(self) -> bool:
        """Whether any of some images, spread over all, has colors."""
        step = max(1, len(self) // LOOKED_AT)
        return any(
            count_channels(self._get_file(row), where=self.name) == 3
            for row in range(0, len(self), step)
        )

    def _decode(self, row: int, shape: tuple[int, ...] | None) -> np.ndarray:
        return decode_image(self._get_file(row), shape=shape, where=f"image {row} of {self.name}")

    def _get_file(self, row: int) -> bytes:
        return self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()
