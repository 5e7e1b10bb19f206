"""(image file, wanted shape) -> uint8 pixels [H, W, C]."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.reading import open_regular

MOST_PIXELS = 64_000_000
LARGEST_IMAGE = 2**28  # bytes of a file
# What Pillow may open, whatever the file is called: its other readers are less known, and one starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# What Pillow raises on damaged files, by its many decoders.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, MemoryError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_GRAY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def decode_image(file: Path | bytes, *, shape: tuple[int, ...] | None, where: str, resize: bool = False) -> np.ndarray:
    """uint8 [H, W, C]. shape: what is expected; None takes the file's own, with 1 channel for gray files and 3 for others.

    resize: bring the shorter side to `shape` and cut out the middle; otherwise another size is a DataError.
    """
    try:
        # Pillow warns about odd metadata, and about large images, which are refused here.
        with (
            warnings.catch_warnings(action="ignore"),
            io.BytesIO(file) if isinstance(file, bytes) else open_regular(file, most=LARGEST_IMAGE) as content,
            Image.open(content, formats=FORMATS) as image,
        ):
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{where} has {image.width}x{image.height} pixels, more than {MOST_PIXELS}: make it smaller")
            if image.mode not in _GRAY + _COLOUR:
                raise DataError(f"{where} has the pixel format {image.mode}: save it with 8 bit gray or RGB pixels")
            channels = shape[2] if shape else (1 if image.mode in _GRAY else 3)
            pixels = image.convert("L" if channels == 1 else "RGB")
    except FileError as error:
        raise DataError(f"{where} cannot be read as an image: {error}") from error
    except _DAMAGED as error:
        raise DataError(f"{where} cannot be read as an image ({error}): repair or remove it") from error
    if shape and (pixels.height, pixels.width) != tuple(shape[:2]):
        if not resize:
            raise DataError(
                f"{where} is {pixels.height}x{pixels.width} and others are {shape[0]}x{shape[1]} (height x width): "
                "make them alike, or give the preprocessing an image_shape to which all are resized"
            )
        pixels = _resize_and_crop(pixels, shape[0], shape[1])
    return np.asarray(pixels, dtype=np.uint8).reshape(pixels.height, pixels.width, channels)


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest middle part with the wanted aspect, resized (bilinear, antialiased)."""
    scale = min(image.width / width, image.height / height)
    cut_width, cut_height = width * scale, height * scale
    left, top = (image.width - cut_width) / 2, (image.height - cut_height) / 2
    box = (left, top, min(image.width, left + cut_width), min(image.height, top + cut_height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)
