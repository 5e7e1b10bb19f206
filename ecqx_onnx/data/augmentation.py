"""(raw training batch, generator) -> raw batch of the same shape, slightly changed; the generator alone decides how."""

from __future__ import annotations

import numpy as np

from ecqx_onnx.data.dataset import Augmentation


def crop_and_flip(
    images: np.ndarray, generator: np.random.Generator, *, padding: int = 4
) -> np.ndarray:
    """images [N, H, W] or [N, H, W, C], zero-padded and cut out again at a random place, every second one mirrored.

    He et al. 2016, section 4.2: the usual augmentation of CIFAR-10.
    """
    moved = shift_images(images, generator, most=padding)
    flip = generator.random(len(images)) < 0.5
    moved[flip] = moved[flip][:, :, ::-1]
    return moved


def shift_images(
    images: np.ndarray, generator: np.random.Generator, *, most: int = 2
) -> np.ndarray:
    """images [N, H, W] or [N, H, W, C], each moved by at most `most` pixels down or up and right or left; zeros fill."""
    count, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), *((0, 0),) * (images.ndim - 3)))
    down, right = generator.integers(0, 2 * most + 1, (2, count, 1, 1))
    return padded[
        np.arange(count)[:, None, None], down + np.arange(height)[:, None], right + np.arange(width)
    ]


def shift_audio(
    waveforms: np.ndarray, generator: np.random.Generator, *, most: float = 0.1
) -> np.ndarray:
    """waveforms [N, T], each moved in time by at most that fraction of T; zeros fill."""
    count, length = waveforms.shape
    reach = int(most * length)
    padded = np.pad(waveforms, ((0, 0), (reach, reach)))
    start = generator.integers(0, 2 * reach + 1, (count, 1))
    return padded[np.arange(count)[:, None], start + np.arange(length)]


AUGMENTATIONS: dict[str, Augmentation] = {
    "crop_and_flip": crop_and_flip,
    "shift_images": shift_images,
    "shift_audio": shift_audio,
}
