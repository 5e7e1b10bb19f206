"""Raw samples (pixels, waveforms, features, indices) -> model inputs, and the JSON that says how. Numpy only.

The JSON travels in the checkpoint and in the ONNX metadata, so that `validate` and runners in other languages repeat it:

    x = raw / scale;  a waveform with a spectrum becomes log-mel or MFCC frames;  x = (x - mean) / std      all in float32
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
MOST_CHANNELS = 8192  # with a mean and a standard deviation each
LONGEST_JSON = 100_000  # characters; ours has some hundreds
MOST_SAMPLES = 2**24  # of a waveform: 17 minutes at 16 kHz
MOST_PIXELS = 2**24  # to which an image is brought


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw samples before the model sees them.

    kind: "image"     uint8 [N, H, W] or [N, H, W, C]      -> float32 [N, C, H, W]
          "waveform"  int16 or float [N, T]                -> float32 [N, 1, T], with a spectrum [N, 1, frames, bands]
          "array"     anything numeric [N, ...]            -> float32 [N, ...], as it lies
          "indices"   integers [N, ...], say of words      -> int64 [N, ...], unchanged
    scale: raw values are divided by it: 255 for 8 bit pixels, 32768 for 16 bit audio, 1 for none.
    mean, std: empty for none; else one value for all, or one per channel (axis 1; of spectra: per band, the last axis).
    image_shape: (H, W, C) to which image *files* are brought before: shorter side resized, middle cut out. None: as they are.
    samples: T to which wav *files* are cut or zero-padded at the end before. None: one second.
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
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(map(_is_number, values)):
                raise OptionError(
                    f"a preprocessing's {name} must be a tuple of finite numbers, not {str(values)[:80]}"
                )
            if len(values) > MOST_CHANNELS:
                raise OptionError(
                    f"a preprocessing's {name} has {len(values)} values, more than {MOST_CHANNELS}"
                )
        if not all(np.float32(value) > 0 for value in self.std):
            raise OptionError(f"a preprocessing's std must be above 0, not {self.std!r}")
        if (
            self.mean
            and self.std
            and len(self.mean) != len(self.std)
            and 1 not in (len(self.mean), len(self.std))
        ):
            raise OptionError(
                f"mean has {len(self.mean)} values and std has {len(self.std)}: give one for each channel in both"
            )
        if self.image_shape is not None and not (
            isinstance(self.image_shape, tuple)
            and len(self.image_shape) == 3
            and all(_is_count(length, 16_384) for length in self.image_shape)
            and self.image_shape[2] in (1, 3)
            and self.image_shape[0] * self.image_shape[1] <= MOST_PIXELS
        ):
            raise OptionError(
                f"image_shape must be (height, width, channels) with 1 or 3 channels, not {self.image_shape!r}"
            )
        if self.samples is not None and not _is_count(self.samples, MOST_SAMPLES):
            raise OptionError(
                f"samples must be a whole number from 1 to {MOST_SAMPLES}, not {str(self.samples)[:40]}"
            )
        if self.spectrum is not None and (
            not isinstance(self.spectrum, Spectrum) or self.kind != "waveform"
        ):
            raise OptionError(f"a spectrum needs waveforms, and the kind is {self.kind!r}")
        if self.kind == "indices" and (self.scale != 1 or self.mean or self.std):
            raise OptionError("indices reach the model unchanged: leave scale, mean and std out")

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """A batch of raw samples [N, ...] -> the model's input, float32 (int64 for indices). DataError if raw does not fit."""
        self.check(raw.dtype, raw.shape[1:])
        if self.kind == "indices":
            return raw.astype(np.int64)
        if self.kind == "image":
            raw = raw[:, None] if raw.ndim == 3 else raw.transpose(0, 3, 1, 2)
        x = np.ascontiguousarray(raw, dtype=np.float32)
        if self.scale != 1:
            x = x / np.float32(self.scale)
        if self.kind == "waveform":
            x = x if self.spectrum is None else self.spectrum.apply(x)
            x = x[:, None]
        if self.mean:
            x = x - self._per_channel(self.mean, x.shape)
        if self.std:
            x = x / self._per_channel(self.std, x.shape)
        return x

    def check(
        self, dtype: np.dtype, sample_shape: tuple[int, ...], *, where: str = "the data"
    ) -> None:
        """DataError naming `where` if raw samples of this dtype and shape (without N) do not fit this preprocessing."""
        fits = {
            "image": dtype == np.uint8
            and (len(sample_shape) == 2 or (len(sample_shape) == 3 and sample_shape[2] <= 4)),
            "waveform": (dtype == np.int16 or dtype.kind == "f") and len(sample_shape) == 1,
            "array": dtype.kind in "buif" and len(sample_shape) > 0,
            "indices": dtype.kind in "ui" and len(sample_shape) > 0,
        }[self.kind]
        if not fits or 0 in sample_shape:
            needs = {
                "image": "uint8 [N, H, W] or [N, H, W, channels]",
                "waveform": "int16 or float [N, samples]",
                "array": "numbers [N, ...]",
                "indices": "integers [N, ...]",
            }[self.kind]
            found = f"{dtype} [N{''.join(f', {length}' for length in sample_shape)}]"
            raise DataError(
                f"{where} holds {found} where the preprocessing of kind '{self.kind}' needs {needs}: change either"
            )
        channels = self._channels(sample_shape)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) > 1 and len(values) != channels:
                raise DataError(
                    f"the preprocessing has {len(values)} values as {name}: give {channels} to fit {where}"
                )
        if self.spectrum is not None and self.spectrum.frames(sample_shape[0]) < 1:
            raise DataError(
                f"{where} holds waveforms of {sample_shape[0]} samples, less than a frame of {self.spectrum.frame_length}: "
                "use longer ones or another spectrum"
            )
        if self.spectrum is not None and self.spectrum.values(sample_shape[0]) > MOST_VALUES:
            raise DataError(
                f"{where} holds waveforms of {sample_shape[0]} samples, of which the spectrum makes"
                f" {self.spectrum.values(sample_shape[0])} values in frames that overlap, more than {MOST_VALUES}:"
                " use shorter ones or a larger hop"
            )

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """The same with this mean and standard deviation (each one value, or one per channel)."""
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def describe(self) -> str:
        """What happens to raw samples, in words: "image, pixels / 255, minus 0.1307, divided by 0.3081"."""
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
            words.append(f"minus {show_value(self.mean)}")
        if self.std:
            words.append(f"divided by {show_value(self.std)}")
        return ", ".join(words) if len(words) > 1 else f"{self.kind}, values as they are"

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back to an equal value."""
        return json.dumps({"version": 1, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """The reverse of `to_json`. FileError with one sentence for anything else."""
        try:
            fields = parse_json_object(text)
            if fields.pop("version", None) != 1:
                raise OptionError("it is not of version 1, the one this tool reads")
            if isinstance(spectrum := fields.pop("spectrum", None), dict):
                fields["spectrum"] = Spectrum(**spectrum)
            elif spectrum is not None:
                raise OptionError(f"its spectrum is {type(spectrum).__name__}, not an object")
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items()
            }
            return cls(**values)
        except (OptionError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FileError(
                f"the recorded preprocessing cannot be used: {error}; give the preprocessing anew"
            ) from error

    def _channels(self, sample_shape: tuple[int, ...]) -> int:
        if self.kind == "image":
            return sample_shape[2] if len(sample_shape) == 3 else 1
        if self.kind == "waveform":
            return 1 if self.spectrum is None else self.spectrum.bands
        return sample_shape[0]

    def _per_channel(self, values: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
        """values as float32 that broadcasts against a batch of this shape."""
        if self.spectrum is not None or len(values) == 1:
            return np.asarray(values, np.float32)
        return np.asarray(values, np.float32).reshape(1, -1, *(1,) * (len(shape) - 2))


def infer_preprocessing(
    dtype: np.dtype, sample_shape: tuple[int, ...], *, where: str = "the data"
) -> Preprocessing:
    """The preprocessing that raw samples of this dtype and shape (without N) ask for, without mean and std. DataError if none."""
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
    found = f"{dtype} [N{''.join(f', {length}' for length in sample_shape)}]"
    raise DataError(
        f"{where} holds {found}, which says nothing certain: save images as uint8 [N, H, W, channels], "
        "audio as int16 [N, samples], features as float32"
    )


def show_value(values: tuple[float, ...]) -> str:
    more = ", ..." if len(values) > 4 else ""
    listed = ", ".join(f"{value:.4g}" for value in values[:4]) + more
    return listed if len(values) == 1 else f"({listed})"


def _is_number(value: Any) -> bool:
    # Finite in float32 too, where the arithmetic happens.
    return type(value) in (int, float) and abs(value) <= 3.4e38  # NaN is not


def _is_count(value: Any, highest: int) -> bool:
    return type(value) is int and 1 <= value <= highest


def parse_json_object(text: str) -> Any:
    if len(text) > LONGEST_JSON:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST_JSON}")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"it is {type(fields).__name__}, not an object")
    return fields
