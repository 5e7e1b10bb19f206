"""Data sets in .npz files, and .npz files of a model's inputs."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecqx_onnx.data import load_dataset
from ecqx_onnx.validation.equivalence import load_inputs
from tests.fuzz.mutation import INTEGERS, mutate_bytes, mutate_text, mutate_zip

NAME = "npz"
SUFFIX = ".npz"
TYPES = (
    "<f4",
    "|O",
    "<U9",
    "|S4",
    "<c8",
    "<M8[s]",
    "|V9999999999",
    "<f2",
    "|b1",
    "i4,i4",
    "<U99999999999",
)


def make_seeds() -> list[bytes]:
    """Arrays of numbers, with names of classes, and of JPEGs; stored and deflated."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 3
    images = generator.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(images[0]).save(jpeg, "jpeg")
    pictures = np.frombuffer(jpeg.getvalue() * 2, np.uint8)
    offsets = np.array([0, 1, 2]) * len(jpeg.getvalue())
    return [
        _saved(x=x, y=y),
        _saved(
            x_train=images,
            y_train=y[:6],
            x_test=images[:3],
            y_test=y[:3],
            labels=np.array(list("abc")),
        ),
        _saved(jpeg_test=pictures, offset_test=offsets, y_test=np.array([0, 1])),
        _saved(
            compress=True, x=np.asfortranarray(x), y=y.astype(np.uint8), is_test=np.arange(12) < 4
        ),
    ]


def _saved(*, compress: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def mutate(seed: bytes, source: random.Random) -> bytes:
    """Changes the archive, or the header of an array in it."""
    if source.random() < 0.25:
        return mutate_bytes(seed, source)
    return mutate_zip(seed, source, _mutate_npy)


def _mutate_npy(content: bytes, source: random.Random) -> bytes:
    if content[:6] != b"\x93NUMPY" or source.random() < 0.2:
        return mutate_bytes(content, source)
    length = struct.unpack("<H", content[8:10])[0]
    header, data = content[10 : 10 + length], content[10 + length :]
    kind = source.randrange(4)
    if kind == 0:
        header = mutate_text(header, source)
    elif kind == 1:
        start, end = header.index(b"descr': '") + 9, header.index(b"', 'fortran")
        header = header[:start] + source.choice(TYPES).encode() + header[end:]
    elif kind == 2:
        start, end = header.index(b"'shape': (") + 10, header.index(b")")
        lengths = [source.choice(INTEGERS) for _ in range(source.choice((0, 1, 2, 3, 300)))]
        header = header[:start] + ", ".join(map(str, lengths)).encode() + header[end:]
    else:
        data = mutate_bytes(data, source)
    version = source.choice(
        (content[:8], content[:8], content[:6] + b"\x02\x00", content[:6] + b"\x03\x00")
    )
    size = struct.pack("<H" if version[6] == 1 else "<I", min(len(header), 65535))
    return version + size + header + data


def read(path: Path) -> None:
    """As `--data` and, if that refuses it, as `--inputs`."""
    inputs = load_inputs(path)
    assert all(isinstance(array, np.ndarray) for array in inputs.values())
    dataset = load_dataset(str(path))
    for split in (dataset.train, dataset.test):
        if split is not None:
            list(split.batches(4))
