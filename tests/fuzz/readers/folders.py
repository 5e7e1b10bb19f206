"""Folders of classes with odd names, links, pipes and huge files in them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from ecqx_onnx.data import load_dataset
from tests.fuzz.folders import mutate_folder, unpack
from tests.fuzz.mutation import write_zip
from tests.fuzz.readers.images import _saved as saved_image
from tests.fuzz.readers.wav import _saved as saved_wav

NAME = "folders"
SUFFIX = ".zip"


def make_seeds() -> list[bytes]:
    """Two classes of images; splits of them; sounds."""
    generator = np.random.default_rng(0)
    pictures = [
        saved_image(Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)), "png")
        for _ in range(4)
    ]
    flat = [
        (f"{label}/{number}.png", pictures[number])
        for label in ("cat", "dog")
        for number in range(4)
    ]
    split = [(f"{part}/{name}", content) for part in ("train", "val") for name, content in flat]
    sounds = [
        (f"{label}/{number}.wav", saved_wav(8000)) for label in ("no", "yes") for number in range(3)
    ]
    return [write_zip(members) for members in (flat, split, sounds)]


def mutate(seed: bytes, source: random.Random) -> bytes:
    """Names, contents and kinds of files."""
    return mutate_folder(seed, source)


def read(path: Path) -> None:
    """Every split of the folder."""
    folder = path.parent / "data"
    if not unpack(path, folder):
        return
    dataset = load_dataset(str(folder))
    for split in (dataset.train, dataset.test):
        if split is not None:
            list(split.batches(4))
