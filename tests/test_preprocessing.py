"""Raw samples -> model inputs: by the formula, and the same again from JSON."""

import json

import numpy as np
import pytest

from ecqx_onnx.errors import DataError, FileError, OptionError
from ecqx_onnx.preprocessing import Preprocessing, infer_preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum, make_mel_filters
from tests.oracles.spectrum import log_mel_frame, mfcc_frame

SPECTRUM = Spectrum(
    8000, frame_length=24, hop=10, fft_length=32, mel_bands=6, coefficients=0, high_hz=3900.0
)
EVERYTHING = [
    Preprocessing(),
    Preprocessing(
        "image", scale=255.0, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_shape=(32, 24, 3)
    ),
    Preprocessing(
        "waveform", scale=32768.0, samples=16_000, spectrum=SPECTRUM, mean=(1.0,), std=(1 / 3,)
    ),
    Preprocessing("indices"),
]


def test_colour_images_become_channels_first_and_each_channel_has_its_own_mean_and_std():
    raw = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    x = Preprocessing("image", scale=255.0, mean=mean, std=std).apply(raw)
    assert x.shape == (2, 3, 4, 5)
    assert x.dtype == np.float32
    for n, c, h, w in np.ndindex(x.shape):
        slow = (np.float32(raw[n, h, w, c]) / np.float32(255) - np.float32(mean[c])) / np.float32(
            std[c]
        )
        assert x[n, c, h, w] == slow


def test_gray_images_get_a_channel():
    raw = np.full((2, 4, 5), 8, np.uint8)
    assert Preprocessing("image", scale=16.0).apply(raw).shape == (2, 1, 4, 5)
    assert (Preprocessing("image", scale=16.0).apply(raw) == 0.5).all()


def test_float_features_pass_as_they_are():
    raw = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    np.testing.assert_array_equal(Preprocessing("array").apply(raw), raw)


def test_indices_stay_integers():
    raw = np.array([[1, 2], [3, 4]], np.int32)
    assert Preprocessing("indices").apply(raw).dtype == np.int64


def test_waveform_without_spectrum_gets_a_channel():
    raw = np.array([[-32768, 16384]], np.int16)
    np.testing.assert_array_equal(
        Preprocessing("waveform", scale=32768.0).apply(raw), [[[-1.0, 0.5]]]
    )


@pytest.mark.parametrize("coefficients", [0, 4])
def test_spectrum_equals_the_slow_definition(coefficients):
    spectrum = Spectrum(
        8000,
        frame_length=24,
        hop=10,
        fft_length=32,
        mel_bands=6,
        coefficients=coefficients,
        high_hz=3900.0,
    )
    wave = np.random.default_rng(1).uniform(-1, 1, 55)
    frames = spectrum.apply(wave[None])[0]
    assert frames.shape == (4, coefficients or 6)  # whole frames only: starts 0, 10, 20, 30
    for index, frame in enumerate(frames):
        slow = log_mel_frame(
            wave[index * 10 : index * 10 + 24],
            sample_rate=8000, fft_length=32, bands=6, low_hz=20.0, high_hz=3900.0, floor=1e-6,
        )  # fmt: skip
        slow = mfcc_frame(slow, coefficients) if coefficients else slow
        # Both compute in float64 and the result is rounded to float32 once.
        np.testing.assert_allclose(frame, slow, rtol=1e-6, atol=1e-6)


def test_a_tone_is_loudest_in_the_band_around_it():
    spectrum = Spectrum(8000, frame_length=256, hop=128, fft_length=256, mel_bands=20)
    tone = np.sin(2 * np.pi * 1000 * np.arange(2000) / 8000)
    bin_of_tone = round(1000 * 256 / 8000)
    assert (
        spectrum.apply(tone[None])[0].argmax(axis=1)
        == make_mel_filters(spectrum)[:, bin_of_tone].argmax()
    ).all()


def test_spectra_are_normalised_per_band():
    wave = np.random.default_rng(0).integers(-9000, 9000, (2, 200)).astype(np.int16)
    plain = Preprocessing("waveform", scale=32768.0, spectrum=SPECTRUM)
    mean, std = tuple(range(6)), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    expected = (plain.apply(wave) - np.array(mean, np.float32)) / np.array(std, np.float32)
    np.testing.assert_array_equal(plain.normalized(mean, std).apply(wave), expected)


@pytest.mark.parametrize("preprocessing", EVERYTHING)
def test_json_reads_back_to_an_equal_value(preprocessing):
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


def test_json_is_one_stable_line():
    text = Preprocessing("image", scale=255.0, mean=(0.5,), std=(0.25,)).to_json()
    assert text == (
        '{"image_shape": null, "kind": "image", "mean": [0.5], "samples": null, "scale": 255.0, '
        '"spectrum": null, '
        '"std": [0.25], "version": 1}'
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "video"}, "kind"),
        ({"kind": ["image"]}, "kind"),
        ({"scale": 0}, "scale"),
        ({"scale": "255"}, "scale"),
        ({"scale": True}, "scale"),
        ({"scale": 10**400}, "scale"),
        ({"mean": 0.5}, "mean"),
        ({"mean": [0.5, None]}, "mean"),
        ({"mean": [[0.5]]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"std": [1e-60]}, "std"),
        ({"mean": [1, 2, 3], "std": [1, 2]}, "channel"),
        ({"image_shape": [32, 32]}, "image_shape"),
        ({"image_shape": [10**9, 10**9, 3]}, "image_shape"),
        ({"samples": -5}, "samples"),
        ({"samples": 1.5}, "samples"),
        ({"spectrum": [1, 2]}, "spectrum"),
        ({"spectrum": {}}, "missing"),
        ({"kind": "image", "spectrum": vars(SPECTRUM)}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"version": 2}, "version"),
    ],
)
def test_hostile_json_is_one_clear_file_error(change, word):
    text = json.dumps({**json.loads(Preprocessing("waveform").to_json()), **change})
    with pytest.raises(FileError, match=word) as caught:
        Preprocessing.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"image"',
        "{}",
        '{"version": 1, "scale": NaN}',
        '{"version": 1, "mean": [1e999]}',
        "[" * 50_000,
        "9" * 90_000,
        "x" * 200_000,
        '{"version": 1, "\\ud800": 1}',
    ],
)
def test_text_that_is_no_preprocessing_is_a_file_error(text):
    with pytest.raises(FileError, match="recorded preprocessing"):
        Preprocessing.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"hop": 0},
        {"frame_length": 10**9},
        {"mel_bands": 0},
        {"fft_length": 16},
        {"coefficients": 7},
        {"high_hz": 5000.0},
        {"low_hz": -1.0},
        {"floor": 0.0},
        {"floor": float("nan")},
        {"sample_rate": 8000.0},
    ],
)
def test_spectra_that_cannot_be_are_refused(change):
    with pytest.raises(OptionError):
        Spectrum(**{**vars(SPECTRUM), **change})


@pytest.mark.parametrize(
    ("dtype", "sample_shape", "kind", "scale"),
    [
        (np.uint8, (28, 28), "image", 255.0),
        (np.uint8, (32, 32, 3), "image", 255.0),
        (np.uint8, (3, 32, 32), "array", 255.0),
        (np.uint8, (784,), "array", 255.0),
        (np.int16, (8000,), "waveform", 32768.0),
        (np.float32, (490,), "array", 1.0),
        (np.float64, (3, 8, 8), "array", 1.0),
        (np.int64, (20,), "indices", 1.0),
    ],
)
def test_dtype_and_shape_say_what_samples_are(dtype, sample_shape, kind, scale):
    inferred = infer_preprocessing(np.dtype(dtype), sample_shape)
    assert (inferred.kind, inferred.scale) == (kind, scale)
    inferred.check(np.dtype(dtype), sample_shape)


@pytest.mark.parametrize(
    ("preprocessing", "raw"),
    [
        (Preprocessing("image"), np.zeros((2, 4, 4), np.float32)),
        (Preprocessing("image"), np.zeros((2, 3, 32, 32), np.uint8)),
        (Preprocessing("image", mean=(0.1, 0.2)), np.zeros((2, 4, 4, 3), np.uint8)),
        (Preprocessing("waveform"), np.zeros((2, 4, 4), np.int16)),
        (Preprocessing("waveform", spectrum=SPECTRUM), np.zeros((2, 23), np.int16)),
        (Preprocessing("array"), np.zeros((2, 3), np.complex64)),
        (Preprocessing("indices"), np.zeros((2, 3), np.float32)),
        (Preprocessing("array"), np.zeros((2, 0), np.float32)),
    ],
)
def test_samples_that_do_not_fit_are_refused(preprocessing, raw):
    with pytest.raises(DataError, match="the data"):
        preprocessing.apply(raw)
