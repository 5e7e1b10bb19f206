"""Preprocessings that strangers wrote: no number in them asks for more memory than a sample
takes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing import spectrum as spectrum_module
from ecqx_onnx.preprocessing.spectrum import Spectrum

MEL = Spectrum(8000, frame_length=256, hop=160, fft_length=256, mel_bands=40)


def text(**changes: object) -> str:
    waveform = Preprocessing("waveform", scale=32768.0, samples=2000, spectrum=MEL)
    return json.dumps(json.loads(waveform.to_json()) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 2**31 - 1},
        {"samples": 2**24 + 1},
        {"samples": True},
        {"samples": 1e3},
        {"image_shape": [16_384, 16_384, 3]},
        {"image_shape": [4096, 4097, 1]},
        {"mean": [[1.0]]},
        {"mean": "12"},
        {"std": [0.0]},
        {"scale": 10**400},
        {"kind": ["image"]},
        {"kind": None},
        {"spectrum": []},
        {"spectrum": {"sample_rate": 8000}},
        {"__class__": 1},
        {"version": 2},
    ],
)
def test_numbers_that_no_training_writes_are_refused(changes):
    with pytest.raises(FileError, match="the recorded preprocessing cannot be used"):
        Preprocessing.from_json(text(**changes))


def test_frames_that_overlap_a_thousandfold_are_refused_before_they_are_cut():
    dense = Spectrum(16_000, frame_length=65_536, hop=1, fft_length=65_536, mel_bands=512)
    waveform = Preprocessing("waveform", scale=32768.0, spectrum=dense)
    with pytest.raises(DataError, match="use shorter ones or a larger hop"):
        waveform.apply(np.zeros((1, 2**20), np.int16))


def test_large_batches_give_the_same_to_the_bit_as_samples_alone(monkeypatch):
    waveforms = np.random.default_rng(0).normal(0, 0.1, (3, 2000)).astype(np.float32)
    together = MEL.apply(waveforms)
    monkeypatch.setattr(spectrum_module, "MOST_VALUES", 1)
    np.testing.assert_array_equal(MEL.apply(waveforms), together)
