"""Preprocessing: what turns raw samples (pixels, waveforms, features, indices) into model inputs.

Its JSON travels in the checkpoint and in the ONNX metadata, so that `validate` and runners in other
languages repeat it, all in float32:

    x = raw / scale
    x = log-mel or MFCC frames of x, for a waveform with a spectrum
    x = (x - mean) / std
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ecqx_onnx.errors import DataError, FileError, OptionError
from ecqx_onnx.preprocessing.spectrum import MOST_VALUES, Spectrum

KINDS = ("image", "waveform", "array", "indices")
NEEDS = {
    "image": "uint8 [N, H, W] or [N, H, W, channels]",
    "waveform": "int16 or float [N, samples]",
    "array": "numbers [N, ...]",
    "indices": "integers [N, ...]",
}
SHOWN = 4  # values of a mean, in words
MOST_CHANNELS = 8192  # with a mean and a standard deviation each
LONGEST_JSON = 100_000  # characters; ours has some hundreds
MOST_SAMPLES = 2**24  # of a waveform: 17 minutes at 16 kHz
MOST_LENGTH = 16_384  # of an image, in pixels
MOST_PIXELS = 2**24  # to which an image is brought


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw samples before the model sees them.

    What raw samples are, and what becomes of them, by kind::

        "image"     uint8 [N, H, W] or [N, H, W, C]   -> float32 [N, C, H, W]
        "waveform"  int16 or float [N, T]             -> float32 [N, 1, T], or with a
                                                         spectrum [N, 1, frames, bands]
        "array"     anything numeric [N, ...]         -> float32 [N, ...], as it lies
        "indices"   integers [N, ...], say of words   -> int64 [N, ...], unchanged

    Attributes:
        kind: one of the above.
        scale: raw values are divided by it: 255 for 8-bit pixels, 32768 for 16-bit audio, 1 for
            none.
        mean: is subtracted. Empty for none, one value for all, or one per channel (axis 1; of
            spectra: per band, the last axis).
        std: divides; as many values as for the mean, each above 0.
        image_shape: (H, W, C) to which image *files* are brought before: the shorter side is
            resized, the middle cut out. None: as they are.
        samples: T to which wav *files* are cut or zero-padded at the end before. None: one second.
        spectrum: the audio front end of waveforms.

    Raises:
        OptionError: if a value is of the wrong type or out of range.

    Example:
        >>> mnist = Preprocessing("image", scale=255.0, mean=(0.1307,), std=(0.3081,))
        >>> mnist.apply(pixels).shape  # pixels: uint8 [64, 28, 28]
        (64, 1, 28, 28)
    """

    kind: str = "array"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    samples: int | None = None
    spectrum: Spectrum | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(
                f"a preprocessing's kind must be one of {', '.join(KINDS)}, not {self.kind!r}"
            )
        if not _is_number(self.scale) or self.scale <= 0:
            raise OptionError(
                f"a preprocessing's scale must be a finite number above 0, not {self.scale!r}"
            )
        self._check_normalization()
        if self.image_shape is not None and not _is_image_shape(self.image_shape):
            raise OptionError(
                "image_shape must be (height, width, channels) with 1 or 3 channels, not "
                f"{self.image_shape!r}"
            )
        if self.samples is not None and not _is_count(self.samples, MOST_SAMPLES):
            raise OptionError(
                f"samples must be a whole number from 1 to {MOST_SAMPLES}, not "
                f"{str(self.samples)[:40]}"
            )
        is_spectrum = self.spectrum is None or isinstance(self.spectrum, Spectrum)
        if not is_spectrum or (self.spectrum is not None and self.kind != "waveform"):
            raise OptionError(f"a spectrum needs waveforms, and the kind is {self.kind!r}")
        if self.kind == "indices" and (self.scale != 1 or self.mean or self.std):
            raise OptionError("indices reach the model unchanged: leave scale, mean and std out")

    def _check_normalization(self) -> None:
        """OptionError unless mean and std are finite numbers that fit together."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(map(_is_number, values)):
                raise OptionError(
                    f"a preprocessing's {name} must be a tuple of finite numbers, not "
                    f"{str(values)[:80]}"
                )
            if len(values) > MOST_CHANNELS:
                raise OptionError(
                    f"a preprocessing's {name} has {len(values)} values, more than {MOST_CHANNELS}"
                )
        if not all(np.float32(value) > 0 for value in self.std):
            raise OptionError(f"a preprocessing's std must be above 0, not {self.std!r}")
        lengths = {len(self.mean), len(self.std)}
        if len(lengths) == 2 and not lengths & {0, 1}:
            raise OptionError(
                f"mean has {len(self.mean)} values and std has {len(self.std)}: give one for each "
                "channel in both"
            )

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Make model inputs of raw samples.

        Args:
            raw: a batch [N, ...], as the kind asks for.

        Returns:
            The model's input: float32, int64 for indices; see the class for its shape.

        Raises:
            DataError: if raw does not fit.
        """
        self.check(raw.dtype, raw.shape[1:])
        if self.kind == "indices":
            return raw.astype(np.int64)
        if self.kind == "image":
            raw = raw[:, None] if raw.ndim == 3 else raw.transpose(0, 3, 1, 2)
        x = np.ascontiguousarray(raw, dtype=np.float32)
        if self.scale != 1:
            x = x / np.float32(self.scale)
        if self.spectrum is not None:
            x = self.spectrum.apply(x)
        if self.kind == "waveform":
            x = x[:, None]
        if self.mean:
            x = x - self._per_channel(self.mean, x.shape)
        if self.std:
            x = x / self._per_channel(self.std, x.shape)
        return x

    def check(
        self, dtype: np.dtype, sample_shape: tuple[int, ...], *, where: str = "the data"
    ) -> None:
        """Check that raw samples fit this preprocessing.

        Args:
            dtype: of the raw samples.
            sample_shape: of one raw sample, without N.
            where: what the error message calls them.

        Raises:
            DataError: if they do not fit, naming `where`.
        """
        if 0 in sample_shape or not self._takes(dtype, sample_shape):
            raise DataError(
                f"{where} holds {_show_type(dtype, sample_shape)} where the preprocessing of kind "
                f"'{self.kind}' needs {NEEDS[self.kind]}: change either"
            )
        channels = self._count_channels(sample_shape)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) > 1 and len(values) != channels:
                raise DataError(
                    f"the preprocessing has {len(values)} values as {name}: give {channels} to fit "
                    f"{where}"
                )
        if self.spectrum is not None:
            self._check_frames(self.spectrum, sample_shape[0], where)

    def _takes(self, dtype: np.dtype, sample_shape: tuple[int, ...]) -> bool:
        """Whether the kind allows raw samples of this dtype and shape."""
        axes = len(sample_shape)
        if self.kind == "image":
            return dtype == np.uint8 and (axes == 2 or (axes == 3 and sample_shape[2] <= 4))
        if self.kind == "waveform":
            return (dtype == np.int16 or dtype.kind == "f") and axes == 1
        if self.kind == "array":
            return dtype.kind in "buif" and axes > 0
        return dtype.kind in "ui" and axes > 0

    @staticmethod
    def _check_frames(spectrum: Spectrum, samples: int, where: str) -> None:
        """DataError if waveforms of this length have no frame, or too many."""
        if spectrum.frames(samples) < 1:
            raise DataError(
                f"{where} holds waveforms of {samples} samples, less than a frame of "
                f"{spectrum.frame_length}: use longer ones or another spectrum"
            )
        if spectrum.values(samples) > MOST_VALUES:
            raise DataError(
                f"{where} holds waveforms of {samples} samples, of which the spectrum makes"
                f" {spectrum.values(samples)} values in frames that overlap, more than "
                f"{MOST_VALUES}: use shorter ones or a larger hop"
            )

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """Replace the mean and the standard deviation.

        Args:
            mean: one value, or one per channel; empty for none.
            std: likewise, each above 0.

        Returns:
            The same preprocessing with these.
        """
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def describe(self) -> str:
        """Say in words what happens to raw samples.

        Returns:
            Words such as "image, values / 255, minus 0.1307, divided by 0.3081".
        """
        words = [self.kind]
        if self.image_shape is not None:
            words.append("resized to " + "x".join(map(str, self.image_shape)))
        if self.samples is not None:
            words.append(f"{self.samples} samples")
        if self.scale != 1:
            words.append(f"values / {self.scale:g}")
        if self.spectrum is not None:
            words.append("MFCC" if self.spectrum.coefficients else "log-mel spectrum")
        if self.mean:
            words.append(f"minus {_show_value(self.mean)}")
        if self.std:
            words.append(f"divided by {_show_value(self.std)}")
        if len(words) == 1:
            words.append("values as they are")
        return ", ".join(words)

    def to_json(self) -> str:
        """Write the preprocessing as JSON, as checkpoints and .onnx files record it.

        Returns:
            One line of JSON that `from_json` reads back to an equal value.
        """
        return json.dumps({"version": 1, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read what `to_json` wrote.

        Args:
            text: JSON from a file, which may hold anything.

        Returns:
            The preprocessing.

        Raises:
            FileError: if it is no preprocessing, with the reason in one sentence.
        """
        try:
            fields = _parse_json_object(text)
            if fields.pop("version", None) != 1:
                raise OptionError("it is not of version 1, the one this tool reads")
            spectrum = fields.pop("spectrum", None)
            if isinstance(spectrum, dict):
                spectrum = Spectrum(**spectrum)
            elif spectrum is not None:
                raise OptionError(f"its spectrum is {type(spectrum).__name__}, not an object")
            for name, value in fields.items():
                if isinstance(value, list):  # JSON has no tuples
                    fields[name] = tuple(value)
            return cls(**fields, spectrum=spectrum)
        except (OptionError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FileError(
                f"the recorded preprocessing cannot be used: {error}; give the preprocessing anew"
            ) from error

    def _count_channels(self, sample_shape: tuple[int, ...]) -> int:
        """How many values mean and std may have for raw samples of this shape."""
        if self.kind == "image":
            return sample_shape[2] if len(sample_shape) == 3 else 1
        if self.kind == "waveform":
            return 1 if self.spectrum is None else self.spectrum.bands
        return sample_shape[0]

    def _per_channel(self, values: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The values as float32 that broadcasts against a batch of this shape."""
        if self.spectrum is not None or len(values) == 1:
            return np.asarray(values, np.float32)
        return np.asarray(values, np.float32).reshape(1, -1, *(1,) * (len(shape) - 2))


def infer_preprocessing(
    dtype: np.dtype, sample_shape: tuple[int, ...], *, where: str = "the data"
) -> Preprocessing:
    """Infer the preprocessing that raw samples ask for by their dtype and shape.

    Args:
        dtype: of the raw samples.
        sample_shape: of one raw sample, without N.
        where: what the error message calls them.

    Returns:
        The preprocessing, without mean and standard deviation.

    Raises:
        DataError: if dtype and shape leave open what the samples are.
    """
    channels_last = len(sample_shape) == 3 and sample_shape[2] in (1, 3)
    if dtype == np.uint8 and (len(sample_shape) == 2 or channels_last):
        return Preprocessing("image", scale=255.0)
    if dtype == np.uint8:  # channels first, or flattened images
        return Preprocessing("array", scale=255.0)
    if dtype == np.int16 and len(sample_shape) == 1:
        return Preprocessing("waveform", scale=32768.0)
    if dtype.kind in "bf":
        return Preprocessing("array")
    if dtype.kind in "iu" and len(sample_shape) == 1:
        return Preprocessing("indices")
    raise DataError(
        f"{where} holds {_show_type(dtype, sample_shape)}, which says nothing certain: save images "
        "as uint8 [N, H, W, channels], audio as int16 [N, samples], features as float32"
    )


def _show_type(dtype: np.dtype, sample_shape: tuple[int, ...]) -> str:
    lengths = "".join(f", {length}" for length in sample_shape)
    return f"{dtype} [N{lengths}]"


def _show_value(values: tuple[float, ...]) -> str:
    shown = [f"{value:.4g}" for value in values[:SHOWN]]
    if len(values) == 1:
        return shown[0]
    if len(values) > SHOWN:
        shown.append("...")
    return f"({', '.join(shown)})"


def _is_number(value: Any) -> bool:
    # Finite in float32 too, where the arithmetic happens; NaN is not.
    return type(value) in (int, float) and abs(value) <= 3.4e38


def _is_count(value: Any, highest: int) -> bool:
    return type(value) is int and 1 <= value <= highest


def _is_image_shape(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    if not all(_is_count(length, MOST_LENGTH) for length in value):
        return False
    height, width, channels = value
    return channels in (1, 3) and height * width <= MOST_PIXELS


def _parse_json_object(text: str) -> Any:
    if len(text) > LONGEST_JSON:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST_JSON}")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"it is {type(fields).__name__}, not an object")
    return fields
