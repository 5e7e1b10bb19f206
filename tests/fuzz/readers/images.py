"""Folders of images: one file among them is hostile."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ecqx_onnx.data import load_dataset
from ecqx_onnx.preprocessing import Preprocessing

NAME = "images"
SUFFIX = ".png"
FORMATS = ("png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm")


def make_seeds() -> list[bytes]:
    """A small picture in every format that is read, gray, palette and color, and animated."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    seeds = [_saved(image, kind) for kind in FORMATS]
    seeds += [_saved(image.convert("L"), "png"), _saved(image.convert("P"), "png")]
    seeds += [_saved(image.convert("CMYK"), "jpeg"), _saved(image, "jpeg", progressive=True)]
    seeds += [
        _saved(image, "tiff", compression="tiff_lzw"),
        _saved(image, "tiff", compression="tiff_deflate"),
    ]
    frames = [image.rotate(90 * turn) for turn in range(3)]
    seeds += [
        _saved(image, kind, save_all=True, append_images=frames) for kind in ("gif", "png", "webp")
    ]
    return seeds


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def read(path: Path) -> None:
    """As the only image of a data set, as it is and brought to another size."""
    for resized in (None, Preprocessing("image", scale=255.0, image_shape=(8, 8, 3))):
        folder = path.parent / "images"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "test" / "cat").mkdir(parents=True)
        shutil.copyfile(path, folder / "test" / "cat" / "1.png")
        list(load_dataset(str(folder), preprocessing=resized).test.batches(4))
