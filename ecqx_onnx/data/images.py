"""Image files to uint8 pixels [H, W, C], the same to the bit as the page of `deploy --to web`."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.inputs.reading import open_regular

MOST_PIXELS = 64_000_000
LARGEST_IMAGE = 2**28  # bytes of a file
# What Pillow may open, whatever the file is called: its other readers are less known, and one
# starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# What Pillow raises on damaged files, by its many decoders.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    ArithmeticError, MemoryError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_GRAY = ("1", "L", "LA", "I", *_SIXTEEN_BITS)
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # the tag in EXIF
# How the stored picture becomes the one that was taken (CIPA DC-008, Exif 2.3, table 6).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    file: Path | bytes, *, shape: tuple[int, ...] | None, where: str, resize: bool = False
) -> np.ndarray:
    """Read an image as people see it: turned as its EXIF data say, transparent places white.

    Args:
        file: a path, or the file's bytes.
        shape: (H, W, C) that is expected; None takes the file's own, with 1 channel for gray files
            and 3 for others.
        where: what error messages call the file.
        resize: bring the shorter side to `shape` and cut out the middle; otherwise another size is
            a DataError.

    Returns:
        uint8 [H, W, C]. Of 16 bits the upper eight; gray from RGB by ITU-R 601-2.

    Raises:
        DataError: if it is no image that can be read, too large, or of another size.
    """
    with _open_image(file, where) as image:
        channels = shape[2] if shape else _count_own_channels(image)
        pixels = _turn_upright(_make_opaque(image, where), image)
        pixels = pixels.convert("L" if channels == 1 else "RGB")
    if shape and (pixels.height, pixels.width) != tuple(shape[:2]):
        if not resize:
            raise DataError(
                f"{where} is {pixels.height}x{pixels.width} and others are {shape[0]}x{shape[1]} "
                "(height x width): "
                "make them alike, or give the preprocessing an image_shape to which all are resized"
            )
        pixels = _resize_and_crop(pixels, shape[0], shape[1])
    return np.asarray(pixels, dtype=np.uint8).reshape(pixels.height, pixels.width, channels)


def count_channels(file: Path | bytes, *, where: str) -> int:
    """Tell whether an image has colors; its pixels are not decoded.

    Args:
        file: a path, or the file's bytes.
        where: what error messages call the file.

    Returns:
        1 for a gray image, 3 for others.

    Raises:
        DataError: if it is no image that can be read.
    """
    with _open_image(file, where) as image:
        return _count_own_channels(image)


def _open_content(file: Path | bytes) -> BinaryIO:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    return open_regular(file, most=LARGEST_IMAGE)


@contextmanager
def _open_image(file: Path | bytes, where: str) -> Iterator[Image.Image]:
    try:
        # Pillow warns about odd metadata, and about large images, which are refused here.
        with (
            warnings.catch_warnings(action="ignore"),
            _open_content(file) as content,
            Image.open(content, formats=FORMATS) as image,
        ):
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"{where} has {image.width}x{image.height} pixels, more than {MOST_PIXELS}: "
                    "make it smaller"
                )
            if image.mode not in _GRAY + _COLOR or (
                image.mode == "I" and image.format not in ("PNG", "PPM")
            ):
                raise DataError(
                    f"{where} has the pixel format {image.mode}: save it with 8 or 16 bit gray or "
                    "RGB pixels"
                )
            yield image
    except FileError as error:
        raise DataError(f"{where} cannot be read as an image: {error}") from error
    except _DAMAGED as error:
        reason = str(error).partition(" <")[0]  # Pillow appends the open file's repr
        raise DataError(
            f"{where} cannot be read as an image ({reason}): repair or remove it"
        ) from error


def _count_own_channels(image: Image.Image) -> int:
    return 1 if image.mode in _GRAY else 3


def _make_opaque(image: Image.Image, where: str) -> Image.Image:
    """The image in gray or RGB, laid over white where it lets light through.

    out = round(c·a / 255) + 255 - a, for color c and opacity a of 0 to 255: what a canvas that was
    white shows.
    """
    key = image.info.get("transparency")
    if image.mode in ("I", *_SIXTEEN_BITS):
        wide = np.asarray(image).astype(np.int64)
        gray = (wide >> 8).astype(np.uint8)
        if isinstance(key, int):  # one gray value lets all light through
            gray = np.where(wide == key, 255, gray).astype(np.uint8)
        return Image.fromarray(gray)
    if isinstance(key, tuple) and max(key) > 255:
        raise DataError(
            f"{where} makes one color of 16 bits transparent: save it with an alpha channel"
        )
    if image.mode not in ("LA", "PA", "RGBA") and key is None:
        return image.convert("RGB") if image.mode == "P" else image
    pixels = np.asarray(image.convert("RGBA")).astype(np.int32)
    color = pixels[..., :3]
    alpha = pixels[..., 3:]
    over_white = (color * alpha + 127) // 255 + 255 - alpha
    return Image.fromarray(over_white.astype(np.uint8))


def _turn_upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Turn pixels as the EXIF data of their image say.

    In JPEG and PNG files, as browsers do, and by EXIF data alone, not XMP.
    """
    stored = image.info.get("exif")
    if image.format not in ("JPEG", "PNG") or not isinstance(stored, bytes):
        return pixels
    exif = Image.Exif()
    try:
        exif.load(stored)
        turn = _TURNS.get(exif.get(_ORIENTATION, 1))
    except _DAMAGED:  # the picture is fine all the same
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest middle part with the wanted aspect, resized (bilinear, antialiased)."""
    scale = min(image.width / width, image.height / height)
    cut_width = width * scale
    cut_height = height * scale
    left = (image.width - cut_width) / 2
    top = (image.height - cut_height) / 2
    # Rounding must not reach beyond the picture.
    right = min(image.width, left + cut_width)
    bottom = min(image.height, top + cut_height)
    box = (left, top, right, bottom)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)
