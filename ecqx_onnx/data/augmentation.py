"""Augmentations: random changes of training batches that keep the class of each sample.

Each takes a raw batch and a random generator, which alone decides the change, and returns a batch
of the same shape and dtype.
"""

from __future__ import annotations

import numpy as np

from ecqx_onnx.data.split import Augmentation


def crop_and_flip(
    images: np.ndarray, generator: np.random.Generator, *, padding: int = 4
) -> np.ndarray:
    """Shift images at random, zeros fill; then mirror each with probability 1/2.

    The usual augmentation of CIFAR-10: He, Zhang, Ren, Sun, "Deep residual learning for image
    recognition", CVPR 2016, section 4.2.

    Args:
        images: [N, H, W] or [N, H, W, C], any dtype.
        generator: decides each shift and each mirroring.
        padding: the furthest shift in each direction, in pixels.

    Returns:
        The changed images, of the same shape and dtype.
    """
    moved = shift_images(images, generator, most=padding)
    flip = generator.random(len(images)) < 0.5
    moved[flip] = moved[flip][:, :, ::-1]
    return moved


def shift_images(
    images: np.ndarray, generator: np.random.Generator, *, most: int = 2
) -> np.ndarray:
    """Shift each image at random down or up, and right or left; zeros fill.

    Args:
        images: [N, H, W] or [N, H, W, C], any dtype.
        generator: decides each shift.
        most: the furthest shift in each direction, in pixels.

    Returns:
        The shifted images, of the same shape and dtype.
    """
    count, height, width = images.shape[:3]
    channels = ((0, 0),) * (images.ndim - 3)
    padded = np.pad(images, ((0, 0), (most, most), (most, most), *channels))
    # A shift is where the picture is cut out of its padded copy.
    down, right = generator.integers(0, 2 * most + 1, (2, count, 1, 1))
    rows = down + np.arange(height)[:, None]
    columns = right + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows, columns]


def shift_audio(
    waveforms: np.ndarray, generator: np.random.Generator, *, most: float = 0.1
) -> np.ndarray:
    """Shift each waveform at random in time, earlier or later; zeros fill.

    Args:
        waveforms: [N, T], any dtype.
        generator: decides each shift.
        most: the furthest shift, as a fraction of T.

    Returns:
        The shifted waveforms, of the same shape and dtype.
    """
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
